"""Recipes from their authors' point of view: why a tensor got its type, how two recipes differ, recipes cloned from
GGUFs and exchanged with other tools; in sizes/ the lock that a CI job checks sizes against, in which/ the recipe that
suits a machine, in publishing/ the card of a built model. May import planning and what is below; offers review, clone,
interchange, report, sizes, which and publishing to the command line."""
