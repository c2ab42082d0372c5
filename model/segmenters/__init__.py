"""Segmenter families: an image and prompt embeddings in, masks out. One file each, none imports another family."""
