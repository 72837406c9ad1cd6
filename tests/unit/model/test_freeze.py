"""Every parameter has one owner; freezing turns gradients off for the named owners and on for the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import MODULES
from megatron_medgpt.model.freeze import ParameterCount, count_parameters, freeze, module_of


def _stand_in() -> nn.Module:
    """A module with the names of ``MedGPT`` and one parameter of another size for each owner."""
    model = nn.Module()
    layer = nn.Module()
    layer.self_attention = nn.Linear(2, 2)
    layer.mlp = nn.Module()
    layer.mlp.router = nn.Linear(3, 1, bias=False)
    layer.mlp.experts = nn.Linear(5, 1, bias=False)
    model.language = nn.Module()
    model.language.embedding = nn.Embedding(4, 2)
    model.language.decoder = nn.Module()
    model.language.decoder.layers = nn.ModuleList([layer])
    model.vision = nn.Linear(7, 1, bias=False)
    model.projector = nn.Linear(11, 1, bias=False)
    return model


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("vision.layers.0.qkv.weight", "encoder"),
        ("projector.linear_1.weight", "projector"),
        ("language.embedding.word_embeddings.weight", "language"),
        ("language.output_layer.weight", "language"),
        ("language.decoder.final_layernorm.weight", "language"),
        ("language.decoder.layers.11.self_attention.core_attention.sinks", "language"),
        ("language.decoder.layers.11.pre_mlp_layernorm.weight", "language"),
        ("language.decoder.layers.11.mlp.router.weight", "router"),
        ("language.decoder.layers.11.mlp.experts.down_bias", "experts"),
        ("module.module.language.decoder.layers.0.mlp.experts.gate_up", "experts"),
    ],
)
def test_owner_of_a_parameter(name, module):
    assert module_of(name) == module


@pytest.mark.parametrize("name", ["lm_head.weight", "visionary.weight", "decoder.layers.0.mlp.experts.down"])
def test_a_parameter_without_owner_is_refused(name):
    with pytest.raises(ValueError, match="belongs to none"):
        module_of(name)


@pytest.mark.parametrize("frozen", [(), ("encoder",), ("encoder", "language", "experts", "router"), ("router",)])
def test_gradients_are_off_for_the_frozen_modules_and_on_for_all_others(frozen):
    model = _stand_in()
    model.requires_grad_(False)  # an earlier stage froze other modules
    freeze(model, frozen)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (module_of(name) not in frozen), name


def test_counts_cover_every_parameter_of_all_chunks():
    chunks = [_stand_in(), _stand_in()]
    counts = freeze(chunks, ("encoder", "experts"))
    assert counts == {
        "encoder": ParameterCount(0, 14),
        "projector": ParameterCount(22, 0),
        "language": ParameterCount(28, 0),
        "experts": ParameterCount(0, 10),
        "router": ParameterCount(6, 0),
    }
    assert tuple(counts) == MODULES
    total = sum(count.trainable + count.frozen for count in count_parameters(chunks).values())
    assert total == sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


def test_an_unknown_module_is_refused_and_nothing_is_frozen():
    model = _stand_in()
    with pytest.raises(UsageError, match=r"'vision'.*allowed: encoder"):
        freeze(model, ("encoder", "vision"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_only_trainable_modules_get_gradients():
    model = _stand_in()
    freeze(model, ("encoder",))
    (model.projector(torch.ones(1, 11)) + model.vision(torch.ones(1, 7))).sum().backward()
    assert model.vision.weight.grad is None
    assert model.projector.weight.grad is not None
