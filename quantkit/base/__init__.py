"""What every room builds on: errors, safe handling of files and folders, journals and locks for resumable work,
copying, worker threads, text tables. Imports nothing from quantkit; knows nothing about models."""
