"""Phrase encoders: a phrase and a small image in, one vector out."""
