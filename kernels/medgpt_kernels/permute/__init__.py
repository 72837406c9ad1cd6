"""Tokens to rows sorted by expert, through an all-to-all in bf16 or FP8, and their weighted sum back."""
