"""Block number formats: MXFP4, and FP8 with a power-of-two scale per 1x128 or 128x128 block. See README.md."""
