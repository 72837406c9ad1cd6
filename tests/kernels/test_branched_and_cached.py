"""Attention over documents that fork, and of one query over kept keys, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from medgpt_kernels.sink_attention import flex
from medgpt_kernels.sink_attention.cached import cached_sink_attention
from medgpt_kernels.sink_attention.op import PackedRows, sink_attention

HEADS, GROUPS, DIM = 4, 2, 8
# One document: a trunk of 7 and branches of 5, 1 and 9; then a document without branches, and padding.
BRANCHES = torch.tensor([0] * 7 + [1] * 5 + [2] + [3] * 9 + [0] * 6 + [0] * 2)[None]
POSITIONS = torch.tensor(
    [*range(7), *range(7, 12), 7, *range(7, 16), *range(6), *range(2)]
)[None]  # fmt: skip
DOCUMENTS = torch.tensor([0] * 22 + [1] * 6 + [2] * 2, dtype=torch.int32)[None]
WINDOWS = {"no window": None, "window": 4, "window of one": 1, "window beyond": 100}


def inputs(length: int, batch: int = 1):
    generator = torch.Generator().manual_seed(length)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    key, value = drawn(batch, GROUPS, length, DIM), drawn(batch, GROUPS, length, DIM)
    return drawn(batch, HEADS, length, DIM), key, value, drawn(HEADS)


def weighted(query_D, keys, values, sink, scale):
    scores = torch.stack([query_D @ key * scale for key in keys] + [sink])
    weights = torch.softmax(scores, 0)[:-1]
    return sum(w * value for w, value in zip(weights, values))


def path_of(place: int) -> list[int]:
    """Places of the text that ends at a place: of its document, the trunk and the own branch."""
    same = [t for t in range(place + 1) if DOCUMENTS[0, t] == DOCUMENTS[0, place]]
    return [t for t in same if BRANCHES[0, t] in (0, BRANCHES[0, place])]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["reference", "fused_cpu", "flex"])
def test_a_branch_sees_its_trunk_and_itself(name, window):
    window = WINDOWS[window]
    query, key, value, sinks = inputs(DOCUMENTS.shape[1])
    wanted = torch.zeros_like(query)
    for a in range(HEADS):
        for s in range(query.shape[2]):
            seen = path_of(s)[-window:] if window else path_of(s)
            group = a // (HEADS // GROUPS)
            wanted[0, a, s] = weighted(query[0, a, s], key[0, group, seen], value[0, group, seen], sinks[a], 0.3)
    branches = (BRANCHES, POSITIONS)
    if name == "flex":
        found = flex.sink_attention(query, key, value, sinks, flex.block_mask(DOCUMENTS, window, branches), scale=0.3)
    else:
        rows = PackedRows(DOCUMENTS, name, branches)
        found = sink_attention(query, key, value, sinks, rows, window=window, scale=0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_one_query_sees_the_places_that_are_not_masked():
    query, key, value, sinks = inputs(9, batch=3)
    unseen = torch.zeros(3, 9, dtype=torch.bool)
    unseen[0, 4:], unseen[2, ::2] = True, True
    key = key.masked_fill(unseen[:, None, :, None], 1e30)  # what is not seen must not matter
    wanted = torch.stack(
        [
            torch.stack(
                [
                    weighted(query[n, a, 0], key[n, a // 2, ~unseen[n]], value[n, a // 2, ~unseen[n]], sinks[a], 0.3)
                    for a in range(HEADS)
                ]
            )
            for n in range(3)
        ]
    )
    found = cached_sink_attention(query[:, :, 0], key, value, sinks, unseen, scale=0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
