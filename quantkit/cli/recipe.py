"""quantkit recipe: a stand-in for the group, which comes from another branch."""

from __future__ import annotations

import click

from .transfer import export, from_gguf, import_


@click.group("recipe")
def recipe() -> None:
    """Clone, import and export recipes.

    \b
    quantkit recipe from-gguf R1-UD-IQ1_S-00001-of-00003.gguf -o my.yaml
    """


for _command in (from_gguf, import_, export):
    recipe.add_command(_command)
