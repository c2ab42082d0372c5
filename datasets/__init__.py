"""Data sets. Has an `__init__` so that this folder wins over an installed Hugging Face `datasets`."""
