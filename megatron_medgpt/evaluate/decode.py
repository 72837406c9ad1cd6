"""Greedy continuations of prompts with a key-value cache, in the layout in which the model lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_medgpt.data.collate import Document, RowShape, collate
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.evaluate.documents import pixel_reader
from megatron_medgpt.evaluate.forward import LayoutForward
from megatron_medgpt.types import MedBatch

SHRINK_BELOW = 0.75
"""Sequences that have ended leave a batch when less than this share of it is open: each time the cache is copied."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A text to be continued. An image is one mark in ``token_ids``."""

    token_ids: np.ndarray
    images: tuple[bytes, ...] = ()


@dataclass(kw_only=True, slots=True)
class _Group:
    """The prompts of one micro-batch: which of them are in the cache still, and what has been written."""

    written: list[list[int]]
    in_cache: list[int]
    is_open: list[bool] = field(default_factory=list)

    @property
    def open_places(self) -> list[int]:
        return [place for place, number in enumerate(self.in_cache) if self.is_open[number]]


class GreedyWriter:
    """Writes always the likeliest token. All ranks call ``write`` together, with as many groups.

    Args:
        shape: ``sequence_length`` is the most that a prompt and its continuation may have.
    """

    def __init__(self, forward: LayoutForward, *, shape: RowShape, source: PixelSource) -> None:
        self._forward, self._shape, self._source = forward, shape, source

    @property
    def num_groups(self) -> int:
        """Groups that keep every stage of the pipeline at work."""
        return self._forward.pipeline_size

    def length_of(self, prompt: Prompt) -> int:
        return prompt.token_ids.size + len(prompt.images) * (self._shape.tokens_per_image - 1)

    def write(
        self, groups: Sequence[Sequence[Prompt]], *, max_new_tokens: int, ends: frozenset[int], longest: int
    ) -> list[list[list[int]]]:
        """New tokens of every prompt of every group, the end token included where one came.

        Args:
            groups: of this data-parallel rank, ``num_groups`` of them; a group may be empty.
            longest: positions of the longest prompt of all ranks.
        """
        # A group without prompts takes part with one that is never read: its peers wait for it.
        filled = [list(group) or [Prompt(token_ids=np.array([self._shape.pad_id]))] for group in groups]
        states = [
            _Group(
                written=[[] for _ in prompts], in_cache=list(range(len(prompts))), is_open=[bool(group)] * len(prompts)
            )
            for prompts, group in zip(filled, groups)
        ]
        length = self._forward.row_length(longest)
        num_rows = max(map(len, filled))
        caches = [
            self._forward.make_cache([self.length_of(p) for p in prompts], capacity=longest + max_new_tokens)
            for prompts in filled
        ]
        batches = [self._prompts(prompts, num_rows, length) for prompts in filled]
        newest: list[list[int]] = []
        with self._forward.evaluating():
            for step in range(max_new_tokens):
                if step:
                    most = max(map(len, caches))
                    batches = [
                        self._forward.newest_tokens(tokens, cache, most=most) for tokens, cache in zip(newest, caches)
                    ]
                newest = self._forward.next_tokens(batches, caches)
                for state, tokens in zip(states, newest):
                    for place in state.open_places:
                        number = state.in_cache[place]
                        state.written[number].append(tokens[place])
                        state.is_open[number] = tokens[place] not in ends
                if not self._forward.on_any_rank(any(any(state.is_open) for state in states)):
                    break
                newest = [self._shrunk(*of_group) for of_group in zip(states, newest, caches)]
        return [state.written if group else [] for state, group in zip(states, groups)]

    def _shrunk(self, state: _Group, tokens: list[int], cache) -> list[int]:
        """Let ended sequences go where it pays; the newest tokens of those that stay."""
        stays = state.open_places or [0]
        if len(stays) >= SHRINK_BELOW * len(state.in_cache):
            return tokens
        cache.keep(stays)
        state.in_cache = [state.in_cache[place] for place in stays]
        return [tokens[place] for place in stays]

    def _prompts(self, prompts: Sequence[Prompt], num_rows: int, length: int) -> MedBatch:
        shape = RowShape(
            sequence_length=length, image_mark_id=self._shape.image_mark_id, pad_id=self._shape.pad_id,
            tokens_per_image=self._shape.tokens_per_image,
        )  # fmt: skip
        no_targets = np.zeros(0, np.int64)
        rows: list[list[Document]] = [[Document(p.token_ids, no_targets, p.images)] for p in prompts]
        rows += [[] for _ in range(num_rows - len(rows))]
        pixels = pixel_reader(self._source) if self._forward.first_stage else None
        return collate(rows, shape, keep=self._forward.own_positions(length), pixels=pixels)
