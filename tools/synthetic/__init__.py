"""Parts of `tools/make_synthetic.py`: objects, sprites, backgrounds, scenes, phrases, the data set's files."""
