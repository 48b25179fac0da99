"""Weights of a model by the names and rows of its output, decoded from whatever a source stores. May import kernels,
model and what is below; offers rows.RowReader."""
