"""Where the rows of a MoE layer lie: an index made from the choices without a sort. Nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medgpt_kernels.dispatch import check, check_axes, check_contiguous, check_dtype, check_shape, choose
from medgpt_kernels.route import reference
from medgpt_kernels.route.blocks import BLOCK_T, MAX_EXPERTS, block_e, cdiv, is_tile, kernels, serves
from medgpt_kernels.route.reference import num_tiles


@dataclass(frozen=True, slots=True, eq=False)
class RowIndex:
    """Where the rows of a MoE layer lie: sorted by expert, within an expert by token, runs padded to whole tiles.

    R is a bound known on the host; what the choices do not need is marked unused.
    """

    row_entry: Tensor
    """(R,) int32: ``token * K + slot``, -1 on padding."""
    token_row: Tensor
    """(T, K) int32: the row of each choice."""
    tile_expert: Tensor
    """(R / tile,) int32: expert of each tile of rows, -1 on unused tiles."""
    counts: Tensor
    """(E,) int32: rows of each expert, without padding."""
    tile: int

    @property
    def num_rows(self) -> int:
        return self.row_entry.shape[0]


@torch.library.custom_op("medgpt_kernels::row_index", mutates_args=())
def _index(
    experts_TK: Tensor, histogram: Tensor | None, num_experts: int, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, K), device = experts_TK.shape, experts_TK.device
    sizes = {"K": K, "BLOCK_T": BLOCK_T, "BLOCK_E": block_e(num_experts)}
    blocks, tiles = cdiv(T, BLOCK_T), num_tiles(T * K, num_experts, tile)
    made = {"dtype": torch.int32, "device": device}
    row_entry, token_row = torch.empty(tiles * tile, **made), torch.empty((T, K), **made)
    tile_expert = torch.empty(tiles if tile > 1 else 0, **made)
    counts = torch.empty(num_experts, **made)
    triton = kernels()
    if histogram is None:
        histogram = torch.empty((blocks, num_experts), **made)
        if blocks:
            triton.histogram_kernel[(blocks,)](experts_TK, histogram, T, num_experts, **sizes)
    base = torch.empty((blocks, num_experts), **made)
    triton.scan_kernel[(1,)](
        histogram, base, counts, tile_expert, row_entry, blocks, tiles, num_experts, TILE=tile,
        BLOCK_E=block_e(num_experts), CHUNK=64,
    )  # fmt: skip
    if blocks:
        triton.index_kernel[(blocks,)](experts_TK, base, row_entry, token_row, T, num_experts, **sizes)
    return row_entry, token_row, tile_expert, counts


@_index.register_fake
def _(experts_TK, histogram, num_experts, tile):
    T, K = experts_TK.shape
    tiles = num_tiles(T * K, num_experts, tile)
    made = {"dtype": torch.int32}
    return (
        experts_TK.new_empty((tiles * tile,), **made),
        experts_TK.new_empty((T, K), **made),
        experts_TK.new_empty((tiles if tile > 1 else 0,), **made),
        experts_TK.new_empty((num_experts,), **made),
    )


def index(
    experts_TK: Tensor, num_experts: int, *, tile: int = 128, histogram: Tensor | None = None,
    implementation: str = "auto",
) -> RowIndex:  # fmt: skip
    """Sort the choices by expert, stably, in two launches (three without the router's histogram).

    Args:
        experts_TK: int32, contiguous, distinct within a token, each in 0 .. num_experts - 1.
        tile: rows of a tile of the grouped products, a power of two of at least 16; or 1 for rows without padding, as
            an exchange between ranks wants them (``tile_expert`` is then empty).
        histogram: ``Routing.histogram`` of the same choices.
    """
    check_dtype("experts_TK", experts_TK, (torch.int32,))
    check_axes("experts_TK", experts_TK, "(T, K)")
    check(tile == 1 or is_tile(tile), f"tile={tile}; allowed: 1 and powers of two from 16")
    check(1 <= num_experts <= MAX_EXPERTS, f"num_experts={num_experts}; allowed: 1 to {MAX_EXPERTS}")
    check_contiguous(experts_TK=experts_TK)
    if histogram is not None:
        check_dtype("histogram", histogram, (torch.int32,))
        check_shape("histogram", histogram, (cdiv(experts_TK.shape[0], BLOCK_T), num_experts))
        check_contiguous(experts_TK=experts_TK, histogram=histogram)
    if choose("route.index", implementation, serves(experts_TK)) == "reference":
        made = list(reference.index(experts_TK.cpu(), num_experts, tile))
        made[2] = made[2] if tile > 1 else made[2][:0]
        return RowIndex(*(part.to(experts_TK.device) for part in made), tile)
    return RowIndex(*_index(experts_TK, histogram, num_experts, tile), tile)


@torch.library.custom_op("medgpt_kernels::row_index_sorted", mutates_args=())
def _index_sorted(counts_E: Tensor, num_rows: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    E = counts_E.shape[0]
    tiles = num_tiles(num_rows, E, tile)
    made = {"dtype": torch.int32, "device": counts_E.device}
    row_entry, token_row = torch.empty(tiles * tile, **made), torch.empty((num_rows, 1), **made)
    tile_expert = torch.empty(tiles, **made)
    if tiles:
        kernels().index_sorted_kernel[(tiles,)](
            counts_E, row_entry, token_row, tile_expert, E, TILE=tile, BLOCK_E=block_e(E)
        )
    return row_entry, token_row, tile_expert


@_index_sorted.register_fake
def _(counts_E, num_rows, tile):
    tiles = num_tiles(num_rows, counts_E.shape[0], tile)
    made = {"dtype": torch.int32}
    return (
        counts_E.new_empty((tiles * tile,), **made),
        counts_E.new_empty((num_rows, 1), **made),
        counts_E.new_empty((tiles,), **made),
    )


def index_sorted(counts_E: Tensor, num_rows: int, *, tile: int = 128, implementation: str = "auto") -> RowIndex:
    """The index of rows that are sorted by expert already, in one launch; "tokens" are these rows, K is 1.

    Args:
        counts_E: int32 or int64 on the device, adding up to ``num_rows``.
    """
    check_axes("counts_E", counts_E, "(E)")
    check(num_rows >= 0, f"num_rows={num_rows}; it must not be negative")
    check_dtype("counts_E", counts_E, (torch.int32, torch.int64))
    E = counts_E.shape[0]
    check(1 <= E <= MAX_EXPERTS, f"counts_E is of {E} experts; allowed: 1 to {MAX_EXPERTS}")
    check(is_tile(tile), f"tile={tile}; allowed: powers of two from 16")
    check_contiguous(counts_E=counts_E)
    if choose("route.index_sorted", implementation, serves(counts_E)) == "reference":
        made = (part.to(counts_E.device) for part in reference.index_sorted(counts_E, num_rows, tile))
    else:
        made = _index_sorted(counts_E, num_rows, tile)
    row_entry, token_row, tile_expert = made
    return RowIndex(row_entry, token_row, tile_expert, counts_E.to(torch.int32), tile)
