"""A small random model in the layout of our export, with the export's own processor."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_medgpt.config.presets import TINY_CLIP
from megatron_medgpt.convert.assets import write_processor
from megatron_medgpt.data.text import train_tokenizer


def write_small_export(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, GptOssConfig, LlavaConfig, LlavaForConditionalGeneration

    ours = train_tokenizer(["What does the image show? A round lesion in the left lung."] * 20, folder, 400)
    torch.manual_seed(3)
    text = GptOssConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, pad_token_id=ours.pad_id,
        eos_token_id=ours.return_id,
    )  # fmt: skip
    size, patch = TINY_CLIP.image_size_px, TINY_CLIP.patch_size_px
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=size,
        patch_size=patch,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=ours.image_mark_id,
        image_seq_length=(size // patch) ** 2,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    write_processor(folder, TINY_CLIP)
    return folder
