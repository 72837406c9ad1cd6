from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.presets import GPT_OSS_20B, TINY
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.parallel.plan import make_layout

MODEL = ModelConfig(language=TINY)


def test_degrees_that_fit_give_every_derived_number():
    layout = make_layout(ParallelConfig(tensor=2, pipeline=2, expert=2), MODEL, 8)
    assert (layout.data, layout.expert_data) == (2, 2)
    assert layout.sequence_parallel
    assert layout.describe() == "TP2·PP2·EP2·DP2"


def test_chunks_of_the_interleaved_schedule_cover_every_layer_once():
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    layout = make_layout(parallel, MODEL, 2)
    chunks = [c for rank in range(2) for c in layout.chunks_of(rank)]
    layers = [layer for c in sorted(chunks) for layer in layout.layers_of_chunk(c)]
    assert layers == list(range(TINY.num_layers))
    assert layout.chunks_of(1) == (1, 3)


def test_an_uneven_split_is_kept_as_given():
    model = ModelConfig(language=GPT_OSS_20B)
    layout = make_layout(ParallelConfig(pipeline=4, layers_per_stage=(7, 7, 7, 3)), model, 4)
    assert layout.uneven
    assert layout.layers_of_chunk(3) == range(21, 24)


@pytest.mark.parametrize(
    ("parallel", "world", "says"),
    [
        (ParallelConfig(tensor=3), 3, "parallel.tensor=3 does not divide"),
        (ParallelConfig(expert=3), 3, "parallel.expert=3 does not divide"),
        (ParallelConfig(tensor=2, pipeline=2), 6, "not a multiple of"),
        (ParallelConfig(expert=4), 2, "parallel.expert=4 does not divide the 2 ranks"),
        (ParallelConfig(pipeline=3), 3, r"e\.g\. \[2, 1, 1\]"),
        (ParallelConfig(pipeline=2, layers_per_stage=(3, 2)), 2, "add up to"),
        (ParallelConfig(virtual_pipeline=2), 1, "needs parallel.pipeline > 1"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_what_would_do(parallel, world, says):
    with pytest.raises(UsageError, match=says) as caught:
        make_layout(parallel, MODEL, world)
    assert "\n" not in str(caught.value)


def test_tensor_degree_must_divide_the_query_groups():
    model = replace(MODEL, language=replace(TINY, num_query_groups=1))
    with pytest.raises(UsageError, match="num_query_groups=1"):
        make_layout(ParallelConfig(tensor=2), model, 2)
