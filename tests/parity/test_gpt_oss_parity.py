"""The language model against transformers' GPT-oss with the same random weights.

Weights are drawn wide (norms around 1, biases and sinks too), so that every term of the architecture moves the logits;
sequences are longer than the sliding window (16) and run past YaRN's original length (64).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from gpt_oss_names import in_our_layout

from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import KernelConfig, ModelConfig, ParallelConfig
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.types import IGNORE_INDEX, MedBatch

LANGUAGE = TINY
LENGTH = 150
MODEL = ModelConfig(language=LANGUAGE, vision=TINY_CLIP)


def published_model(dtype: torch.dtype = torch.float32):
    config = transformers.GptOssConfig(
        num_hidden_layers=LANGUAGE.num_layers, hidden_size=LANGUAGE.hidden_size, head_dim=LANGUAGE.head_dim,
        num_attention_heads=LANGUAGE.num_attention_heads, num_key_value_heads=LANGUAGE.num_query_groups,
        num_local_experts=LANGUAGE.num_experts, num_experts_per_tok=LANGUAGE.num_experts_per_token,
        intermediate_size=LANGUAGE.expert_hidden_size, vocab_size=LANGUAGE.vocab_size,
        sliding_window=LANGUAGE.sliding_window, rms_norm_eps=LANGUAGE.norm_eps,
        max_position_embeddings=LANGUAGE.max_length, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": LANGUAGE.rope_base, "factor": LANGUAGE.yarn_factor,
            "original_max_position_embeddings": LANGUAGE.yarn_original_length,
            "beta_fast": LANGUAGE.yarn_beta_fast, "beta_slow": LANGUAGE.yarn_beta_slow, "truncate": False,
        },
    )  # fmt: skip
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = transformers.GptOssForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter.shape[-1] if "experts" not in name else parameter.shape[-2]
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1 or name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * fan_in**-0.5)
    return model.to(dtype)


def our_model(published, groups, *, dtype=torch.float32, **options):
    layout = make_layout(ParallelConfig(), MODEL, 1)
    (model,) = build_model(MODEL, layout=layout, groups=groups, dtype=dtype, frozen=("encoder", "projector"), **options)
    weights = in_our_layout(published.state_dict(), LANGUAGE)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith(("vision.", "projector.")) or name.endswith("_extra_state") for name in missing), missing
    return model


def batch_of(documents: list[torch.Tensor], *, with_labels: bool = True) -> MedBatch:
    """One row with the documents one after the other."""
    ids = torch.cat(documents)[None]
    labels = torch.cat([torch.cat([d[1:], torch.tensor([IGNORE_INDEX])]) for d in documents])[None]
    return MedBatch(
        token_ids_BS=ids,
        label_ids_BS=labels,
        position_ids_BS=torch.cat([torch.arange(len(d)) for d in documents])[None],
        document_ids_BS=torch.cat([torch.full((len(d),), i, dtype=torch.int32) for i, d in enumerate(documents)])[None],
        modality_ids_BS=torch.zeros_like(ids, dtype=torch.int8),
        num_targets=int((labels != IGNORE_INDEX).sum()),
    )


def document(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, LANGUAGE.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def published():
    return published_model()


KERNELS = {
    "fused": KernelConfig(),
    "reference": KernelConfig(attention="reference", experts="reference"),
}


@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_are_those_of_transformers(published, one_process, kernels):
    model = our_model(published, one_process, kernels=KERNELS[kernels])
    ids = document(LENGTH)
    with torch.no_grad():
        theirs = published(input_ids=ids[None]).logits
        ours = model(batch_of([ids]), want="logits").transpose(0, 1)
    assert (ours - theirs).abs().max() <= 2e-5
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_gradient_of_every_parameter_is_that_of_transformers(published, one_process, kernels, recompute):
    model = our_model(published, one_process, kernels=KERNELS[kernels], recompute=recompute)
    ids = document(LENGTH)
    batch = batch_of([ids])
    loss_BS = model(batch)
    loss_BS.sum().backward()

    published.zero_grad()
    logits = published(input_ids=ids[None]).logits
    theirs_S = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:], reduction="none")
    theirs_S.sum().backward()
    torch.testing.assert_close(loss_BS[0, :-1], theirs_S, rtol=1e-5, atol=1e-5)
    assert loss_BS[0, -1] == 0

    wanted = in_our_layout({name: p.grad for name, p in published.named_parameters()}, LANGUAGE)
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(wanted)
    errors = {name: relative(found[name], wanted[name]) for name in wanted}
    assert max(errors.values()) <= 1e-5, {name: error for name, error in errors.items() if error > 1e-5}
    assert all(wanted[name].norm() > 0 for name in wanted)


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_packed_document_is_as_it_would_be_alone(published, one_process, kernels):
    model = our_model(published, one_process, kernels=KERNELS[kernels])
    documents = [document(length, seed=length) for length in (37, 5, 90, 1, 18)]
    with torch.no_grad():
        packed = model(batch_of(documents), want="logits")[:, 0]
        for ids, logits in zip(documents, packed.split([len(d) for d in documents])):
            alone = published(input_ids=ids[None]).logits[0]
            assert (logits - alone).abs().max() <= 2e-5


@pytest.mark.parametrize("kernels", KERNELS)
def test_bf16_is_within_twice_the_error_of_transformers_in_bf16(one_process, kernels):
    ids = document(LENGTH)
    theirs = published_model(torch.bfloat16)
    ours = our_model(theirs, one_process, dtype=torch.bfloat16, kernels=KERNELS[kernels])
    with torch.no_grad():
        their_logits = theirs(input_ids=ids[None]).logits.double()
        our_logits = ours(batch_of([ids]), want="logits").transpose(0, 1).double()
        exact = theirs.double()(input_ids=ids[None]).logits  # the same bf16 weights, computed in float64
    assert relative(our_logits, exact) <= 2 * relative(their_logits, exact)


@pytest.mark.parametrize("kernels", KERNELS)
def test_float64_is_kept_from_end_to_end(published, one_process, kernels):
    """transformers casts to float32 in each of its norms, hence one float32 rounding for each."""
    ids = document(LENGTH)
    theirs = published_model(torch.float64)
    model = our_model(theirs, one_process, dtype=torch.float64, kernels=KERNELS[kernels])
    with torch.no_grad():
        ours = model(batch_of([ids]), want="logits").transpose(0, 1)
        assert ours.dtype == torch.float64
        num_norms = 2 * LANGUAGE.num_layers + 1
        assert relative(ours, theirs(input_ids=ids[None]).logits) <= num_norms * torch.finfo(torch.float32).eps


def test_a_wrong_window_is_seen(published, one_process):
    """One position more in the window is an error that has been published twice (Megatron-LM 3690, Bridge 2656)."""
    wide = replace(MODEL, language=replace(LANGUAGE, sliding_window=LANGUAGE.sliding_window + 1))
    layout = make_layout(ParallelConfig(), wide, 1)
    (model,) = build_model(wide, layout=layout, groups=one_process)
    model.load_state_dict(in_our_layout(published.state_dict(), LANGUAGE), strict=False)
    ids = document(LENGTH)
    with torch.no_grad():
        ours = model(batch_of([ids]), want="logits").transpose(0, 1)
        assert (ours - published(input_ids=ids[None]).logits).abs().max() > 1e-2


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()
