"""Making a plan from a catalogue and a recipe: types, bytes, the layout of files, what fits on which GPU. Pure: no
weight is read, but an importance matrix is checked. May import model, recipe and what is below."""
