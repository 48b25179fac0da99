"""What every room stands on: errors, files and folders opened with care, journals and locks of work that can be gone on
with, copying, worker threads, text tables. Imports nothing of quantkit; knows nothing of models."""
