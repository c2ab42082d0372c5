"""Data sets: images with phrases and masks, behind one reader. `datasets.catalog.open_dataset` opens one by name."""
