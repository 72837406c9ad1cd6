"""Stand-ins for the public weights: a GPT-oss and a CLIP folder as transformers writes them, tiny and random.

python small_weights.py OUT TOKENIZER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, GptOssConfig, GptOssForCausalLM

from megatron_medgpt.data.text import Tokenizer


def main(out: Path, tokenizer: Path) -> None:
    torch.manual_seed(0)
    language = GptOssConfig(
        num_hidden_layers=4, hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
        num_local_experts=8, num_experts_per_tok=2, intermediate_size=64, sliding_window=16,
        vocab_size=Tokenizer.load(tokenizer).vocab_size, max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    GptOssForCausalLM(language).save_pretrained(out / "language")
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    CLIPVisionModel(vision).save_pretrained(out / "vision")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
