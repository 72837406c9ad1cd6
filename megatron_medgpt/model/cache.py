"""Keys and values of text under way, so that a new token costs one position and not the whole text again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from medgpt_kernels.sink_attention.cached import cached_sink_attention
from torch import Tensor


class KeyValueCache:
    """Keys and values of N sequences in the layers that this rank holds; one cache per micro-batch.

    The first forward with a cache fills it: its batch has one prompt in each of the first N rows, from position 0.
    Every later one adds a token to each sequence: its batch is one row with a position per sequence, the first N of
    them in the cache's order (more are padding). ``advance`` stands between two forwards.

    A windowed layer keeps as many places as its window and uses them in turn; the others ``capacity`` places.

    Args:
        lengths: positions of each prompt.
        capacity: positions that a prompt and what is written after it may have.
    """

    def __init__(self, lengths: Sequence[int], *, capacity: int, device: torch.device) -> None:
        if min(lengths) < 1 or max(lengths) > capacity:
            raise ValueError(f"prompts of {min(lengths)} to {max(lengths)} positions for a capacity of {capacity}")
        self.lengths = list(lengths)
        self.filled = False
        self._capacity, self._device = capacity, device
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._step: dict[int, tuple[Any, Tensor | None]] = {}
        self._lengths_N = torch.tensor(self.lengths, device=device)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def last_places_N(self) -> Tensor:
        """Place of each prompt's last token in its row; of use before the cache is filled."""
        return self._lengths_N - 1

    def fill(self, layer: int, window: int | None, key_BQSD: Tensor, value_BQSD: Tensor) -> None:
        """Keep what a layer computed of the prompts. Padding behind a prompt is kept too and never seen."""
        num_places = self._places(window)
        self._kept[layer] = (self._taken(key_BQSD, num_places), self._taken(value_BQSD, num_places))

    def attend(
        self, layer: int, window: int | None, query_NAD: Tensor, key_NQD: Tensor, value_NQD: Tensor, sinks_A: Tensor,
        *, scale: float,
    ) -> Tensor:  # fmt: skip
        """Keep the newest key and value of every sequence and attend to all that its query sees: (N, A, D)."""
        key_NQTD, value_NQTD = self._kept[layer]
        num_places = key_NQTD.shape[2]
        newest, unseen_NT = self._places_of_step(num_places)
        key_NQTD[newest] = key_NQD
        value_NQTD[newest] = value_NQD
        used = min(max(self.lengths) + 1, num_places)
        return cached_sink_attention(
            query_NAD, key_NQTD[:, :, :used], value_NQTD[:, :, :used], sinks_A, unseen_NT, scale=scale
        )

    def advance(self) -> None:
        """The forward is over: what it kept counts from now on."""
        if self.filled:
            self.lengths = [length + 1 for length in self.lengths]
            self._lengths_N = self._lengths_N + 1
        self.filled = True
        self._step.clear()

    def keep(self, sequences: Sequence[int]) -> None:
        """Go on with these sequences alone, in this order."""
        self.lengths = [self.lengths[i] for i in sequences]
        index = torch.tensor(list(sequences), device=self._device)
        self._lengths_N = self._lengths_N[index]
        self._kept = {layer: (key[index], value[index]) for layer, (key, value) in self._kept.items()}
        self._step.clear()

    def _places(self, window: int | None) -> int:
        return self._capacity if window is None else min(window, self._capacity)

    def _taken(self, rows_BQSD: Tensor, num_places: int) -> Tensor:
        """(N, Q, T, D): place t holds the last position of the prompt that is t modulo T; zeros where there is none."""
        num, groups, length, dim = len(self), *rows_BQSD.shape[1:]
        kept_NQTD = rows_BQSD.new_zeros(num, groups, num_places, dim)
        if length <= num_places:
            kept_NQTD[:, :, :length] = rows_BQSD[:num]
            return kept_NQTD
        last_N1 = self.last_places_N[:, None]
        places_NT = last_N1 - (last_N1 - torch.arange(num_places, device=self._device)) % num_places
        index_NQTD = places_NT.clamp(min=0)[:, None, :, None].expand(-1, groups, -1, dim)
        return kept_NQTD.copy_(rows_BQSD[:num].gather(2, index_NQTD))

    def _places_of_step(self, num_places: int) -> tuple[Any, Tensor | None]:
        """Where a layer of so many places keeps the newest key of every sequence, and which of its used places hold
        nothing (None where all hold something); made once for all such layers."""
        if num_places not in self._step:
            sequences = torch.arange(len(self), device=self._device)
            used = min(max(self.lengths) + 1, num_places)
            unseen_NT = None
            if min(self.lengths) + 1 < used:
                unseen_NT = torch.arange(used, device=self._device) > self._lengths_N[:, None]
            newest = (sequences, slice(None), self._lengths_N % num_places)
            if min(self.lengths) == max(self.lengths):  # one place of all sequences: a slice, which is written faster
                newest = (slice(None), slice(None), self.lengths[0] % num_places)
            self._step[num_places] = newest, unseen_NT
        return self._step[num_places]
