"""Typed configuration: the dataclasses of `schema.py`, the YAML files beside them and their loader."""
