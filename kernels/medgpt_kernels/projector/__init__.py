"""Encoder features to their places in the sequence: pixel shuffle, norm, two layers with GELU, scatter."""
