"""What every room stands on: errors, files and folders opened with care, copying, worker threads, text tables.
Imports nothing of quantkit; knows nothing of models."""
