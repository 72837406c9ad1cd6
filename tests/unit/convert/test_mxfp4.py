"""MXFP4 is exact: every byte under every scale, every tie, every rule against a statement of its own."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_medgpt.config.errors import WorkError
from megatron_medgpt.convert.mxfp4 import SCALE_RULES, VALUES, dequantise, quantise

ALL_BYTES = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
"""One row of 16 groups that hold every byte once."""


def _every_byte_under(scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    return ALL_BYTES, torch.full((1, 16), scale, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_byte_under_every_finite_scale_is_what_transformers_makes_of_it(dtype):
    compared = 0
    for scale in range(253):
        blocks, scales = _every_byte_under(scale)
        expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0].T
        assert torch.equal(dequantise(blocks, scales, dtype).view(torch.uint8), expected.contiguous().view(torch.uint8))
        compared += expected.numel()
    assert compared == 253 * 512


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0, 1, 126, 127, 252])
def test_every_value_is_the_code_times_the_power_of_two(dtype, scale):
    blocks, scales = _every_byte_under(scale)
    found = dequantise(blocks, scales, dtype).double().flatten().tolist()
    codes = [code for byte in range(256) for code in (byte & 15, byte >> 4)]
    assert found == [VALUES[code] * 2.0 ** (scale - 127) for code in codes]


def test_scale_255_is_refused_wherever_it_stands():
    blocks, scales = _every_byte_under(127)
    scales[0, 11] = 255
    with pytest.raises(WorkError, match="1 MXFP4 scales are 255"):
        dequantise(blocks, scales)


@pytest.mark.parametrize("scale", [253, 254])
def test_a_scale_that_overflows_the_dtype_is_refused(scale):
    with pytest.raises(WorkError, match=f"scale {scale} gives values beyond the range"):
        dequantise(*_every_byte_under(scale))


def test_blocks_that_do_not_belong_to_the_scales_are_refused():
    with pytest.raises(WorkError, match="do not belong"):
        dequantise(torch.zeros(2, 4, 16, dtype=torch.uint8), torch.zeros(2, 5, dtype=torch.uint8))


TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [-100, -3, 0, 5, 100])
@pytest.mark.parametrize("tie", TIES)
def test_a_tie_goes_to_the_even_code_and_a_hair_beside_it_to_its_neighbour(tie, exponent, sign):
    """The first value of the group is 6, which fixes the scale under the rules up and floor."""
    below, above = (math.nextafter(tie, side) for side in (0.0, 9.0))
    near = [float(torch.tensor(x, dtype=torch.float32)) for x in (below, above)]  # float32 is what is rounded
    down = float(torch.nextafter(torch.tensor(tie), torch.tensor(0.0)))
    up = float(torch.nextafter(torch.tensor(tie), torch.tensor(9.0)))
    assert near == [tie, tie] and down < tie < up
    group = torch.zeros(32)
    group[:4] = sign * torch.tensor([6.0, tie, down, up]) * 2.0**exponent
    for rule in ("up", "floor"):
        found = dequantise(*quantise(group, rule), torch.float32)[:4] * sign / 2.0**exponent
        lower = max(v for v in VALUES[:8] if v < tie)
        upper = min(v for v in VALUES[:8] if v > tie)
        assert found.tolist() == [6.0, TIES[tie], lower, upper]


def _scale_by_definition(largest: float, rule: str) -> int:
    """E8M0 byte from the definition, in exact arithmetic."""
    if largest == 0:
        return 0
    exact = Fraction(largest)

    def floor_log2(x: Fraction) -> int:
        power = 0
        while Fraction(2) ** power > x:
            power -= 1
        while Fraction(2) ** (power + 1) <= x:
            power += 1
        return power

    def ceil_log2(x: Fraction) -> int:
        power = floor_log2(x)
        return power if Fraction(2) ** power == x else power + 1

    if rule == "up":
        # A quotient below float32's normal numbers counts as the smallest of them, as in triton_kernels.
        power = ceil_log2(max(Fraction(float(torch.tensor(largest) / 6)), Fraction(2) ** -126))
    elif rule == "floor":
        power = floor_log2(exact) - 2
    elif rule == "ceil":
        power = ceil_log2(exact) - 2
    else:  # round to two significant bits, half up, then floor
        power = floor_log2(exact)
        power += (exact / Fraction(2) ** power >= Fraction(7, 4)) - 2
    return min(max(power + 127, 0), 254)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_scales_follow_the_rules_definition_around_every_edge(rule):
    edges = [m * 2.0**e for e in (-20, -1, 0, 7) for m in (1.0, 1.5, 1.75, 2.0, 3.0, 6.0)]
    around = [float(torch.nextafter(torch.tensor(x), torch.tensor(t))) for x in edges for t in (0.0, 1e30)]
    for largest in [0.0, *edges, *around, 2.0**-126, 3.4e38]:
        group = torch.zeros(32)
        group[7] = -largest
        assert int(quantise(group, rule)[1]) == _scale_by_definition(largest, rule), (rule, largest)


def test_only_the_rule_up_never_saturates():
    group = torch.full((32,), 7.9)
    assert float(dequantise(*quantise(group, "floor"), torch.float32).max()) == 6.0
    assert float(dequantise(*quantise(group, "up"), torch.float32).max()) == 8.0


def test_elements_take_the_nearest_value_of_the_grid():
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    for rule in SCALE_RULES:
        blocks, scales = quantise(values, rule)
        found = dequantise(blocks, scales, torch.float32)
        factors = 2.0 ** (scales.float() - 127).repeat_interleave(32, -1)
        grid = torch.tensor(VALUES)
        best = (grid * factors[..., None] - values[..., None]).abs().amin(-1)
        assert torch.equal((found - values).abs(), best)


@pytest.mark.parametrize("rule", ["up", "floor", "even"])
def test_quantising_what_was_dequantised_keeps_every_value(rule):
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (64, 9, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1, 250, (64, 9), generator=generator, dtype=torch.uint8)
    values = dequantise(blocks, scales, torch.float32)
    assert torch.equal(dequantise(*quantise(values, rule), torch.float32), values)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_refused(poison):
    values = torch.zeros(64)
    values[40] = poison
    with pytest.raises(WorkError, match="not all finite"):
        quantise(values)


def test_a_group_of_zeros_and_the_signs_of_what_rounds_to_zero_are_kept():
    group = torch.zeros(32)
    assert quantise(group)[1].item() == 0
    group[:3] = torch.tensor([6.0, -0.1, 0.1])
    found = dequantise(*quantise(group), torch.float32)
    assert torch.signbit(found[1]) and not torch.signbit(found[2])
