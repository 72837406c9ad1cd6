"""What a layout writes: greedy continuations of a few prompts, shared by the data-parallel ranks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from layout_cases import MODEL
from PIL import Image

from megatron_medgpt.data.collate import RowShape
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.evaluate.decode import GreedyWriter, Prompt
from megatron_medgpt.evaluate.forward import LayoutForward
from megatron_medgpt.types import ImageSpec

MARK = MODEL.language.vocab_size - 1
NEW_TOKENS = 20
"""More than the sliding window (16) holds."""
PARTS = ((3,), (41, "image"), ("image", 5, "image", 7), (17,), (2, "image", 30))
ENDS = frozenset({81, 218, 226})
"""Chosen so that the continuations end at different steps, one of them not at all: batches shrink on every rank."""


def written(chunks: Sequence[torch.nn.Module], groups: Any) -> list[list[int]]:
    """The continuation of every prompt, in order, on every rank."""
    forward = LayoutForward(chunks, groups, torch.device("cpu"))
    vision = MODEL.vision
    image = ImageSpec(size_px=vision.image_size_px, mean=vision.mean, std=vision.std, num_tokens=MODEL.tokens_per_image)
    shape = RowShape(sequence_length=128, image_mark_id=MARK, pad_id=0, tokens_per_image=image.num_tokens)
    writer = GreedyWriter(forward, shape=shape, source=PixelSource(image, reader="pillow"))
    prompts = make_prompts(image.size_px)
    longest = max(map(writer.length_of, prompts))
    own = list(range(forward.data_rank, len(prompts), forward.data_size))
    shares = [own[group :: writer.num_groups] for group in range(writer.num_groups)]
    found = writer.write(
        [[prompts[i] for i in share] for share in shares], max_new_tokens=NEW_TOKENS, ends=ENDS, longest=longest
    )
    mine = {i: tokens for share, group in zip(shares, found) for i, tokens in zip(share, group)}
    whole = {i: tokens for rank in forward.gather_data(mine) for i, tokens in rank.items()}
    return [whole[i] for i in range(len(prompts))]


def make_prompts(size_px: int) -> list[Prompt]:
    random = np.random.default_rng(9)
    prompts = []
    for parts in PARTS:
        ids = [[MARK] if part == "image" else random.integers(0, MARK, part).tolist() for part in parts]
        pictures = [random.integers(0, 256, (size_px, size_px, 3), np.uint8) for _ in range(parts.count("image"))]
        prompts.append(Prompt(token_ids=np.concatenate(ids).astype(np.int32), images=tuple(map(png, pictures))))
    return prompts


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
