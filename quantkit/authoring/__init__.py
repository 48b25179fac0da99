"""Recipes as their authors see them: why a tensor got its type, what two recipes differ in, recipes cloned from GGUFs
and exchanged with other tools, (in sizes/) the lock that a CI job holds sizes against, (in which/) the one that suits
a machine, and (in publishing/) the card of what was made of one. May import planning and what is below; offers review,
clone, interchange, report, sizes, which and publishing to the command line."""
