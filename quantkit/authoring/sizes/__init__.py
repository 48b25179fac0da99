"""Sizes of recipes on models, locked in a file that is readable in a diff: the lock, the comparison, its report."""
