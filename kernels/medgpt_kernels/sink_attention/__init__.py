"""Causal attention with learnable sinks, a sliding window and packed documents. See README.md."""
