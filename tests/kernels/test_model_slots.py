"""The fused kernels in the model's slots do what the plain modules do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from medgpt_kernels.dispatch import triton_refusal
from medgpt_kernels.grouped_mlp import launch

pytest.importorskip("megatron.core")  # a GPU machine may have only what the kernels need

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import KernelConfig, ModelConfig, ProjectorConfig
from megatron_medgpt.model.experts import expert_products
from megatron_medgpt.model.fused_dispatch import RoutedRows
from megatron_medgpt.model.merge import ImageRun, merge_images
from megatron_medgpt.model.projector import Projector

needs_triton = pytest.mark.skipif(triton_refusal() is not None, reason=str(triton_refusal()))


@needs_triton
@pytest.mark.parametrize(("fold", "norm"), [(1, False), (2, False), (2, True)])
def test_fused_projector_writes_what_projecting_and_merging_gives(fold, norm):
    """On a slice that cuts a span, with an image that two runs share."""
    model = ModelConfig(language=TINY, vision=TINY_CLIP, projector=ProjectorConfig(pixel_shuffle=fold, norm=norm))
    patches = model.vision.patches_per_side**2
    runs = [ImageRun(0, 3, 0, 1, 3), ImageRun(1, 0, 1, 0, 4), ImageRun(1, 7, 0, 0, 4)]
    projector = Projector(model, torch.float32)
    text, features = torch.randn(12, 2, TINY.hidden_size), torch.randn(2, patches, TINY_CLIP.hidden_size)
    results = []
    for way in (projector.into, lambda t, f, r: merge_images(t, projector(f, r), r)):
        leaves = [text.clone().requires_grad_(), features.clone().requires_grad_()]
        projector.zero_grad()
        out = way(*leaves, runs)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        results.append([out.detach(), *(leaf.grad for leaf in leaves), *(p.grad for p in projector.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bf16", "fp8", "mxfp4"])
def test_expert_choices_are_the_plain_experts_up_to_their_rounding(name):
    generator = torch.Generator().manual_seed(0)
    H, F, counts = 64, 32, torch.tensor([5, 0, 9])

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    given = [normal(14, H), counts, torch.rand(14, generator=generator), normal(3, H, 2 * F, scale=H**-0.5),
             normal(3, 2 * F), normal(3, F, H, scale=F**-0.5), normal(3, H)]  # fmt: skip
    plain = expert_products("grouped", H, F)(*given, limit=7.0)
    error = (expert_products(name, H, F)(*given, limit=7.0) - plain).norm() / plain.norm()
    low, high = {"bf16": (0.0, 1e-6), "fp8": (1e-3, 2**-4), "mxfp4": (1e-2, 2**-2)}[name]
    assert low <= error <= high


@pytest.mark.parametrize("name", ["bf16", "fp8", "mxfp4"])
def test_rows_in_any_order_are_the_sorted_rows_summed_over_their_slots(name):
    """What the fused dispatcher hands over: tokens with two slots each, instead of their rows sorted by expert."""
    generator = torch.Generator().manual_seed(1)
    H, F, E, T = 64, 32, 4, 13
    experts_TK = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(T)]).int()
    x, weights_TK = torch.randn(T, H, generator=generator), torch.rand(T, 2, generator=generator)
    stacks = [
        torch.randn(s, generator=generator) * s[-2] ** -0.5 for s in ((E, H, 2 * F), (E, 2 * F), (E, F, H), (E, H))
    ]
    products = expert_products(name, H, F)
    found = products(x, RoutedRows(experts_TK), weights_TK, *stacks, limit=7.0)
    entry = torch.argsort(experts_TK.flatten().long(), stable=True)
    counts = torch.bincount(experts_TK.flatten(), minlength=E)
    rows = products(x[entry // 2], counts, weights_TK.flatten()[entry], *stacks, limit=7.0)
    torch.testing.assert_close(found, torch.zeros_like(x).index_add(0, entry // 2, rows), rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("schedule", launch.SCHEDULES)
@pytest.mark.parametrize("name", ["bf16", "fp8", "mxfp4"])
def test_every_schedule_gives_what_the_reference_gives(name, schedule, device):
    """Through the function that stands in the model's slot, with the gradients of rows, weights and one stack: the same
    products of the same rounded numbers, so that only the order of sums differs, and in FP8 a few values that lie
    between two numbers."""
    generator = torch.Generator().manual_seed(3)
    H, F, counts = 64, 32, torch.tensor([5, 0, 9])
    shapes = ((14, H), (14,), (3, H, 2 * F), (3, 2 * F), (3, F, H), (3, H))
    stacks = [(torch.randn(s, generator=generator) * s[-2 % len(s)] ** -0.5).to(device) for s in shapes]
    found = []
    for chosen in ("auto", schedule):
        rows, weights, *rest = (t.clone().requires_grad_() for t in stacks)
        out = expert_products(name, H, F, schedule=chosen)(rows, counts, weights, *rest, limit=7.0)
        out.backward(torch.linspace(-1, 1, out.numel(), device=device).view_as(out))
        found.append((out.detach(), rows.grad, weights.grad, rest[0].grad))
    for a, b in zip(*found):
        assert (a - b).norm() <= (2e-3 if name == "fp8" else 1e-6) * b.norm()


def test_the_fused_dispatcher_needs_experts_that_gather():
    with pytest.raises(UsageError, match=r"kernels.permute=fused .* set kernels.experts to bf16, fp8 or mxfp4"):
        KernelConfig(permute="fused", experts="grouped")


def test_mxfp4_refuses_sizes_that_are_not_whole_blocks():
    with pytest.raises(
        UsageError, match=r"kernels\.experts=mxfp4 needs model\.language\.hidden_size to divide by 32; it is 40"
    ):
        expert_products("mxfp4", 40, 32)


@pytest.mark.parametrize(
    "field", ["experts", "expert_schedule", "expert_gradients", "router", "permute", "dispatch", "projector", "loss"]
)
def test_an_unknown_kernel_choice_is_refused_with_what_is_allowed(field):
    with pytest.raises(UsageError, match=f"kernels.{field}='fast'; allowed: "):
        replace(KernelConfig(), **{field: "fast"})
