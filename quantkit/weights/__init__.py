"""Weights by the names and rows of the output, decoded from whatever the source stores. May import kernels,
model and what is below; offers rows.RowReader."""
