"""Megatron-MedGPT: distributed pretraining of biomedical GPT-oss vision-language models."""

__version__ = "0.1.0"
