"""Where bits matter, and the recipe of least damage for so many bytes. May import evaluation; offers
sensitivity.measure and optimize.optimize."""
