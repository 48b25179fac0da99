"""Pages of figures: what a file or a plan is, as plain data, and the figures that are drawn of it. May import
everything but the command line and the API. `documents` reads, `sections` chooses figures, `write` makes the files;
pictures draws."""
