"""The shipped recipes, a YAML file each; read by quantkit.recipe as the resources of this package."""
