"""What rounds which tensors, decided by measurement. May import allocation, for its groups, and evaluation; offers
tuning.tune, and in `cost` what rounding by a plan takes."""
