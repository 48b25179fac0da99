"""The file name of the record of variants, apart from `files` so that the command line can import it alone."""

RECORD = "files.json"
