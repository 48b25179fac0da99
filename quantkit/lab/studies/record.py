"""The name of the record of which file is which variant: all that the command line needs of it."""

RECORD = "files.json"
