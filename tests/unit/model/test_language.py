"""The language model in one process: what its modules carry, count and refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import KernelConfig, ModelConfig, ParallelConfig
from megatron_medgpt.model.build import build_model
from megatron_medgpt.model.experts import NUM_CATEGORIES
from megatron_medgpt.parallel import groups
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.types import IGNORE_INDEX, ImageSpan, MedBatch

MODEL = ModelConfig(language=replace(TINY, num_layers=2), vision=TINY_CLIP)
LENGTH = 40


@pytest.fixture(scope="module")
def one_process():
    groups.start(timeout_s=60)
    yield groups.build_groups(make_layout(ParallelConfig(), MODEL, 1))
    groups.stop()


def build(one_process, model=MODEL, **options):
    (built,) = build_model(model, layout=make_layout(ParallelConfig(), model, 1), groups=one_process, **options)
    return built


def batch(*, images: int = 1, seed: int = 0) -> MedBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TINY.vocab_size, (1, LENGTH), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, :20], labels[:, -6:] = IGNORE_INDEX, IGNORE_INDEX
    modality = torch.full((1, LENGTH), 3, dtype=torch.int8)
    modality[:, -5:] = -1
    documents = (modality < 0).to(torch.int32)
    spans = tuple(ImageSpan(row=0, start=2, image=0, num_tokens=MODEL.tokens_per_image) for _ in range(images))
    return MedBatch(
        token_ids_BS=tokens, label_ids_BS=labels, document_ids_BS=documents, modality_ids_BS=modality,
        position_ids_BS=torch.cat([torch.arange(LENGTH - 5), torch.arange(5)])[None], image_spans=spans,
        pixels_ICYX=torch.randn(images, 3, 56, 56, generator=generator) if images else None,
        num_targets=int((labels != IGNORE_INDEX).sum()),
    )  # fmt: skip


def test_loss_stands_at_the_targets_and_nowhere_else(one_process):
    rows = batch()
    loss_BS = build(one_process)(rows)
    assert loss_BS.dtype == torch.float32
    assert torch.equal(loss_BS != 0, rows.label_ids_BS != IGNORE_INDEX)


def test_the_loss_of_the_head_at_targets_is_that_of_all_logits(one_process):
    model, rows = build(one_process), batch()
    logits_SBV = model(rows, want="logits")
    wanted = torch.nn.functional.cross_entropy(
        logits_SBV.transpose(0, 1).flatten(0, 1), rows.label_ids_BS.flatten(), reduction="none"
    )
    torch.testing.assert_close(model(rows).flatten(), wanted)


def test_a_row_without_images_still_gives_the_projector_a_gradient_of_zero(one_process):
    model = build(one_process)
    model(batch(images=0)).sum().backward()
    for name, parameter in model.projector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_frozen_language_model_still_lets_the_projector_learn(one_process):
    model = build(one_process, frozen=("encoder", "language", "experts", "router"))
    model(batch()).sum().backward()
    assert all(parameter.grad.norm() > 0 for parameter in model.projector.parameters())
    assert all(parameter.grad is None for parameter in model.language.parameters())


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_expert_load_counts_every_token_once_by_category(one_process, recompute):
    model = build(one_process, recompute=recompute)
    for seed in range(2):
        model(batch(seed=seed)).sum().backward()
    load = model.expert_load()
    assert load.shape == (2, NUM_CATEGORIES, TINY.num_experts)
    images, text, top_k = MODEL.tokens_per_image, LENGTH - 5 - MODEL.tokens_per_image, TINY.num_experts_per_token
    assert (load.sum(-1)[:, 2 * 3 + 1] == 2 * images * top_k).all()
    assert (load.sum(-1)[:, 2 * 3] == 2 * text * top_k).all()
    assert load.sum() == 2 * 2 * (images + text) * top_k
    model.reset_expert_load()
    assert not model.expert_load().any()


def test_router_losses_are_their_definitions(one_process):
    """Switch loss E * sum(share * mean probability) and mean squared log-sum-exp, without the padding."""
    model = build(one_process, router_balance_coefficient=0.1, router_z_coefficient=0.1)
    rows, seen = batch(), []
    router = model.routers()[0]
    handle = router.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(rows)
    handle.remove()
    logits = torch.nn.functional.linear(seen[0].flatten(0, 1), router.weight, router.bias)[: LENGTH - 5].double()
    share = torch.zeros(TINY.num_experts, dtype=torch.float64)
    chosen = logits.topk(TINY.num_experts_per_token, dim=-1).indices.flatten()
    share.scatter_add_(0, chosen, torch.full_like(chosen, 1 / len(chosen), dtype=torch.float64))
    balance = TINY.num_experts * (share * logits.softmax(-1).mean(0)).sum()
    wanted = torch.stack([balance, logits.logsumexp(-1).square().mean()]) * rows.num_targets
    torch.testing.assert_close(model.router_losses()[0], wanted.detach(), rtol=1e-5, atol=0)


def test_router_losses_add_their_gradient_and_leave_the_loss_alone(one_process):
    rows = batch()
    gradients = []
    for coefficient in (0.0, 0.5):
        model = build(one_process, router_balance_coefficient=coefficient, router_z_coefficient=coefficient)
        loss = model(rows).sum()
        loss.backward()
        gradients.append((loss.item(), model.routers()[0].weight.grad))
    assert gradients[0][0] == gradients[1][0]
    assert not torch.equal(gradients[0][1], gradients[1][1])


def test_expert_parameters_carry_the_marks_that_the_engine_counts_by(one_process):
    experts = build(one_process).language.decoder.layers[0].mlp.experts
    for parameter in experts.parameters():
        assert parameter.allreduce is False
        assert (parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride) == (True, 0, 1)


def test_every_weight_that_is_split_is_marked(one_process):
    model = build(one_process)
    marked = {name for name, weight in model.named_parameters() if getattr(weight, "tensor_model_parallel", False)}
    layer = "language.decoder.layers.0."
    assert {
        "language.embedding.word_embeddings.weight", "language.output_layer.weight",
        f"{layer}self_attention.linear_qkv.weight", f"{layer}self_attention.linear_qkv.bias",
        f"{layer}self_attention.linear_proj.weight", f"{layer}self_attention.core_attention.sinks",
    } <= marked  # fmt: skip
    assert f"{layer}self_attention.linear_proj.bias" not in marked
    assert f"{layer}mlp.router.weight" not in marked


def test_two_builds_with_one_seed_are_equal_and_with_two_differ(one_process):
    first, second, other = (build(one_process, seed=seed).state_dict() for seed in (1, 1, 2))
    tensors = [name for name, value in first.items() if torch.is_tensor(value)]
    assert all(torch.equal(first[name], second[name]) for name in tensors)
    assert not torch.equal(first["language.output_layer.weight"], other["language.output_layer.weight"])


def test_a_vocabulary_that_cannot_be_split_is_refused(one_process):
    model = replace(MODEL, language=replace(MODEL.language, vocab_size=511))
    layout = make_layout(ParallelConfig(tensor=2), model, 2)
    with pytest.raises(UsageError, match=r"vocab_size=511 is not a multiple of parallel\.tensor=2"):
        build_model(model, layout=layout, groups=one_process)


@pytest.mark.skipif(torch.cuda.is_available(), reason="flex serves CUDA")
def test_a_kernel_that_cannot_serve_this_machine_is_refused(one_process):
    with pytest.raises(UsageError, match="flex has no backward pass on a CPU"):
        build(one_process, kernels=KernelConfig(attention="flex"))
