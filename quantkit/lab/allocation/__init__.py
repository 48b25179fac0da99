"""Where bits matter, and the least damaging recipe for a number of bytes. May import evaluation; offers
sensitivity.measure and optimize.optimize."""
