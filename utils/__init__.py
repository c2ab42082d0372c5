"""What `model/` and `datasets/` share: images, masks, phrases, devices, errors. Imports nothing else of ours."""
