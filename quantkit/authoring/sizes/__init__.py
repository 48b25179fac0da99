"""Sizes of recipes on models, locked in a file that reads well in a diff: the lock, the comparison, its report."""
