"""Recipes as their authors see them: why a tensor got its type, what two recipes differ in, recipes cloned from GGUFs
and exchanged with other tools, and (in sizes/) the lock that a CI job holds sizes against. May import planning and
what is below; offers review, clone, interchange, report and sizes to the command line."""
