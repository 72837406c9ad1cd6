"""The fused projector against its reference, forward and every gradient; the reference against a loop over tokens."""

# ruff: noqa: E501  (mutants quote the kernels' source as it stands)

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from medgpt_kernels import projector as package
from medgpt_kernels.dispatch import triton_refusal
from medgpt_kernels.projector import cases, op, reference
from medgpt_kernels.testing import assert_as_close_as_torch, mutant

needs_triton = pytest.mark.skipif(triton_refusal() is not None, reason=str(triton_refusal()))
SEQUENCE, ROWS = 23, 2


def inputs(images, side, fold, width, inner, hidden, *, dtype, norm, device="cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(images)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    D = fold * fold * width
    made = {
        "text": normal(SEQUENCE, ROWS, hidden), "features": normal(images, side * side, width) + 0.5,
        "w1": normal(inner, D, scale=D**-0.5), "b1": normal(inner), "w2": normal(hidden, inner, scale=inner**-0.5),
        "b2": normal(hidden),
    }  # fmt: skip
    if norm:
        made |= {"norm_weight": normal(D) + 1, "norm_bias": normal(D)}
    return made


def placed(images, side, fold, device="cpu", first: int = 0) -> op.Placement:
    """Some tokens of each image, the last token of the last image twice, one token of image 0 not at all."""
    per_image = (side // fold) ** 2
    tokens = [t for t in range(first, images * per_image) if t != 1] + [images * per_image - 1]
    places = torch.randperm(SEQUENCE * ROWS, generator=torch.Generator().manual_seed(1))[: len(tokens)].tolist()
    return op.placement(tokens, places, num_images=images, side=side, fold=fold, device=device)


def outcome(implementation: str, given: dict, at: op.Placement) -> list[torch.Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    norm = (leaves["norm_weight"], leaves["norm_bias"]) if "norm_weight" in leaves else None
    out = op.project_into(
        leaves["text"], leaves["features"], at, leaves["w1"], leaves["b1"], leaves["w2"], leaves["b2"], norm=norm,
        implementation=implementation,
    )  # fmt: skip
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(given["text"].dtype)
    out.backward(grad.to(out.device))
    return [out.detach(), *(leaf.grad for leaf in leaves.values())]


def test_reference_folds_patches_row_by_row_and_replaces_the_text():
    given = inputs(2, 4, 2, 3, 5, 6, dtype=torch.float64, norm=False)
    at = placed(2, 4, 2)
    merged = reference.project_into(
        given["text"], given["features"], at.patch_N, at.place_N, given["w1"], given["b1"], given["w2"], given["b2"],
        side=4, fold=2,
    ).flatten(0, 1)  # fmt: skip
    expected = given["text"].flatten(0, 1).clone()
    for patch, place in zip(at.patch_N.tolist(), at.place_N.tolist()):
        image, y, x = patch // 16, patch % 16 // 4, patch % 4
        grid = given["features"][image].view(4, 4, 3)
        row = torch.cat([grid[y, x], grid[y, x + 1], grid[y + 1, x], grid[y + 1, x + 1]])
        expected[place] = given["w2"] @ F.gelu(given["w1"] @ row + given["b1"]) + given["b2"]
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", cases.SMALL)
def test_forward_and_every_gradient(shape, dtype, norm, device):
    given = inputs(*shape, dtype=dtype, norm=norm, device=device)
    at = placed(*shape[:3], device)
    ours, plain = outcome("triton", given, at), outcome("reference", given, at)
    exact = outcome("reference", {name: value.double() for name, value in given.items()}, at)
    assert len(ours) == (9 if norm else 7)
    for a, b, c in zip(ours, plain, exact):
        assert_as_close_as_torch(a, b, c)
    assert (ours[1].flatten(0, 1)[at.place_N.long()] == 0).all()


@needs_triton
@pytest.mark.parametrize("norm", [False, True])
def test_a_slice_without_image_tokens_leaves_the_text_and_gives_zero_gradients(norm, device):
    given = inputs(*cases.SMALL[0], dtype=torch.float32, norm=norm, device=device)
    at = op.placement([], [], num_images=2, side=4, device=device)
    out, d_text, *rest = outcome("triton", given, at)
    assert torch.equal(out, given["text"])
    assert d_text.abs().sum() > 0 and all((grad == 0).all() for grad in rest)


@pytest.mark.parametrize(
    ("tokens", "places", "named"),
    [
        ([0, 1], [3, 3], "names a position twice"),
        ([16], [0], "tokens must lie in 0 .. 15"),
        ([0], [], "1 tokens for 0"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(tokens, places, named):
    with pytest.raises(ValueError, match=named):
        op.placement(tokens, places, num_images=1, side=4)


def test_a_call_that_cannot_be_served_is_refused_by_name():
    given = inputs(*cases.SMALL[0], dtype=torch.float32, norm=False)
    at = placed(2, 4, 1)
    args = [given[name] for name in ("features", "w1", "b1", "w2", "b2")]
    with pytest.raises(ValueError, match="text_SBH is bfloat16"):
        op.project_into(given["text"].bfloat16(), args[0], at, *args[1:])
    with pytest.raises(ValueError, match="weight_1 has 23 columns"):
        op.project_into(given["text"], args[0], at, args[1][:, 1:], *args[2:])
    with pytest.raises(ValueError, match="features_IPF has 1 images; the placement is for 2"):
        op.project_into(given["text"], args[0][:1], at, *args[1:])


MUTANTS = {
    "bias dropped": ("acc += tl.load(bias_ptr + columns", "acc += 0 * tl.load(bias_ptr + columns"),
    "patches folded column by column": ("(part // FOLD * side + part % FOLD)", "(part % FOLD * side + part // FOLD)"),
    "slope of gelu without its density": ("grad *= share + u * tl.exp(-0.5 * u * u) * DENSITY", "grad *= share"),
    "stale row": ("to = tl.load(out_map_ptr + rows, mask=row_mask, other=0).to(tl.int64)", "to = rows"),
    "one user of a shared token": ("total += tl.load(grad_ptr + place", "total = tl.load(grad_ptr + place"),
    "wrong tail mask": ("a = tl.load(a_ptr + place, mask=row_mask[:, None] & (k[None, :] < K_SIZE)", "a = tl.load(a_ptr + place, mask=row_mask[:, None] & (k[None, :] < K_SIZE - 1)"),
}  # fmt: skip


@needs_triton
def test_every_mutant_is_caught(device):
    from medgpt_kernels.projector import triton as kernels

    given = inputs(*cases.SMALL[1], dtype=torch.float32, norm=False, device=device)
    at = placed(*cases.SMALL[1][:3], device)
    expected = outcome("reference", given, at)

    def agrees() -> bool:
        return all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(outcome("triton", given, at), expected))

    assert agrees()
    caught = set()
    for name, change in MUTANTS.items():
        with mutant(kernels, *change, package=package):
            if not agrees():
                caught.add(name)
    assert caught == set(MUTANTS)
