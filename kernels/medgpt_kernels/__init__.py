"""Kernels of Megatron-MedGPT, usable alone: each op is a folder with its reference beside it."""
