"""Shapes shared by tests and benchmark."""

SMALL = ((1, 24, 40), (37, 40, 1100), (6, 16, 1024))
"""(T, H, V)."""
BENCH = ((8192, 2880, 201_088),)
