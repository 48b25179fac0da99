"""Pages of figures: reads what a file or a plan is as plain data, and chooses the figures for it. May import everything
but the command line and the API. `documents` reads, `sections` chooses figures, `write` makes the files; the room
pictures draws."""
