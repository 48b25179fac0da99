"""Rounding by torch, on a GPU or any other device of torch: what quantkit.rounding does, for many rows at a time.

May import what quantkit.rounding may, and torch; nothing imports it before a device is asked for. Offers `rows`, which
rounds rows under a factor, and `rounder`, which does it for a build. The CPU's bytes are the reference. These are made
by the same steps in the same order wherever a row is on its own; matrix products and sums have the device's order. So
most blocks are the CPU's to the bit, and where a comparison was close they are others, about as good.

ggml's own choice of scales, from which each search starts, stays on the CPU for blocks of 256: of all that is done for
a row it is the smallest part. Matrices are [columns, rows] here, so that a column of all rows is contiguous.
"""
