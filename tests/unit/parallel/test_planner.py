from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.load import load_run
from megatron_medgpt.config.presets import GPT_OSS_20B, TINY, TINY_CLIP
from megatron_medgpt.config.schema import BlendConfig, ModelConfig, ParallelConfig, StageConfig
from megatron_medgpt.parallel.hardware import accelerator
from megatron_medgpt.parallel.memory import chunks_in_flight, rank_memory
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.parallel.plan_command import run_plan
from megatron_medgpt.parallel.planner import Request, balanced_split, make_plan

MODEL = ModelConfig(language=GPT_OSS_20B)
REQUEST = Request(model=MODEL, num_gpus=8, gpu=accelerator("h100"))
STAGE = StageConfig(name="s", data=(BlendConfig(path="d"),), num_steps=1, sequence_length=4096, global_batch_rows=64)


def memory(parallel: ParallelConfig, world: int, rank: int = 0, **changes):
    layout = make_layout(parallel, MODEL, world)
    options = {"precision": "bf16", "recompute": "layer", "pipeline_rank": rank, **changes}
    return rank_memory(MODEL, layout, STAGE, **options)


def test_four_stages_of_the_20b_balance_to_7_7_7_3():
    assert balanced_split(REQUEST, tensor=1, pipeline=4, virtual=1, expert=2) == (7, 7, 7, 3)


def test_a_head_that_few_tokens_reach_gets_more_layers_beside_it():
    from dataclasses import replace

    split = balanced_split(replace(REQUEST, target_share=0.1), tensor=1, pipeline=4, virtual=1, expert=2)
    assert split == (6, 6, 6, 6)


def test_an_encoder_takes_layers_from_the_first_stage():
    from dataclasses import replace

    split = balanced_split(replace(REQUEST, images_per_row=6.0), tensor=1, pipeline=4, virtual=1, expert=2)
    assert split[0] < split[1]


def test_every_layout_offered_fits_and_the_fastest_comes_first():
    plan = make_plan(REQUEST, keep=50)
    limit = 0.92 * REQUEST.gpu.memory_bytes
    assert plan.best
    assert all(candidate.peak_bytes <= limit for candidate in plan.best)
    assert plan.best[0].step.total <= 1.04 * min(candidate.step.total for candidate in plan.best)
    assert sum(plan.refused.values()) > 0


def test_training_state_is_the_derived_18_bytes_a_parameter():
    """20B on 8 GPUs, EP8: 2.389 B expert parameters at 18 bytes (43.0 GB); attention, embedding, head, encoder and
    projector at 6 + 12 / 8."""
    state = memory(ParallelConfig(expert=8), 8)
    others = 24 * 26.55e6 + 2 * 579.1e6 + 290.9e6 + 11.2e6
    assert (state.weights + state.gradients + state.optimizer) / 1e9 == pytest.approx(43.0 + 7.5e-9 * others, rel=0.002)


def test_frozen_experts_as_mxfp4_take_a_quarter_of_their_weights():
    from dataclasses import replace

    frozen = replace(STAGE, frozen=("experts", "language", "router", "encoder"))
    layout = make_layout(ParallelConfig(), MODEL, 1)
    options = {"precision": "bf16", "recompute": "layer", "pipeline_rank": 0}
    plain, packed = (
        rank_memory(MODEL, layout, frozen, mxfp4_frozen=mxfp4, **options).weights for mxfp4 in (False, True)
    )
    assert packed < 0.35 * plain


def test_interleaving_holds_more_micro_batches_in_flight():
    plain = make_layout(ParallelConfig(pipeline=4), MODEL, 4)
    virtual = make_layout(ParallelConfig(pipeline=4, virtual_pipeline=3), MODEL, 4)
    assert [chunks_in_flight(plain, r, 64) for r in range(4)] == [4, 3, 2, 1]
    assert [chunks_in_flight(virtual, r, 64) / 3 for r in range(4)] == pytest.approx([5, 13 / 3, 11 / 3, 3])


def test_a_model_that_cannot_fit_is_refused_with_what_would_come_nearest():
    with pytest.raises(UsageError, match=r"does not fit 1 x h100 .* nearest: .* GiB\. Take more GPUs") as caught:
        run_plan("gpt-oss-20b", gpus=1, gpu="h100")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": "gpt-5", "gpus": 8}, "neither a preset"),
        ({"model": "tiny", "gpus": 8, "gpu": "tpu"}, "--gpu tpu: not known"),
        ({"model": "tiny", "gpus": 0}, "--gpus 0"),
        ({"model": "tiny", "gpus": 8, "frozen": ["heart"]}, "--frozen names 'heart'"),
        ({"model": "tiny", "gpus": 8, "vision": "eye"}, "--vision eye"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_option(arguments, says):
    with pytest.raises(UsageError, match=says):
        run_plan(**arguments)


def test_the_written_run_loads_and_is_the_recommended_one(tmp_path):
    out = tmp_path / "run.yaml"
    tree = json.loads(run_plan("gpt-oss-20b", gpus=16, gpu="h100", json=True, out=out))
    run = load_run(out)
    assert run.parallel.expert == tree["layouts"][0]["parallel"]["expert"]
    assert run.stages[0].micro_batch_rows == tree["layouts"][0]["micro_batch_rows"]


def test_a_plan_with_packed_experts_is_written_as_such(tmp_path):
    """19.1 B weights of experts: 38.2 GB, or 10.15 GB packed."""
    out, frozen = tmp_path / "run.yaml", ["encoder", "language", "experts", "router"]
    packed, plain = (
        json.loads(run_plan("gpt-oss-20b", gpus=1, gpu="h100", frozen=frozen, mxfp4_frozen=m, json=True, out=out))
        for m in (True, False)
    )
    assert load_run(out).stages[0].experts == "plain"
    run_plan("gpt-oss-20b", gpus=1, gpu="h100", frozen=frozen, mxfp4_frozen=True, out=out)
    assert load_run(out).stages[0].experts == "packed"
    weights = [tree["layouts"][0]["stages"][0]["memory"]["weights"] / 1e9 for tree in (packed, plain)]
    assert weights[1] - weights[0] == pytest.approx(38.2 - 10.15, abs=0.1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_share": 1.5}, "--target-share 1.5: must be between 0 and 1"),
        ({"efficiency": 0.0}, "--efficiency 0: must be between"),
        ({"skew": 0.5}, "--skew 0.5: must be at least 1"),
        ({"images_per_row": -1.0}, "--images-per-row -1: must be at least 0"),
    ],
)
def test_impossible_shares_are_one_line(options, says):
    with pytest.raises(UsageError, match=says):
        run_plan("tiny", gpus=1, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 0}, "--keep 0: must be at least 1"),
        ({"sequence_length": 4096}, "--sequence-length 4096: exceeds model.language.max_length=2048"),
        ({"sequence_length": 9}, "--sequence-length 9: cannot hold one image of"),
        ({"out": "."}, "--out . is a folder; name a file in it"),
        ({"plot": "plan.pdf"}, "end it in .png"),
        ({"out": f"{__file__}/run.yaml"}, "is a file; name a folder"),
    ],
)
def test_what_could_not_be_run_or_written_is_refused_before_planning(options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(says)):
        given = {"sequence_length": 1024, **options}
        run_plan("tiny", gpus=1, **{k: Path(v) if isinstance(v, str) else v for k, v in given.items()})
    assert not list(tmp_path.iterdir())


def test_folders_of_the_planned_run_are_made(tmp_path):
    run_plan("tiny", gpus=1, sequence_length=1024, out=tmp_path / "a" / "b" / "run.yaml")
    assert (tmp_path / "a" / "b" / "run.yaml").is_file()


def test_the_table_names_layouts_stages_and_refusals(tmp_path):
    text = run_plan("gpt-oss-20b", gpus=16, gpu="h100", plot=tmp_path / "plan.png")
    assert "tok/s/GPU" in text
    assert "images/s" in text
    assert "refused: needs more than" in text
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_a_model_can_be_given_as_yaml(tmp_path):
    (tmp_path / "m.yaml").write_text("model:\n  language: tiny\n  vision: tiny-clip\n")
    tree = json.loads(run_plan(str(tmp_path / "m.yaml"), gpus=2, sequence_length=256, json=True))
    assert ModelConfig(language=TINY, vision=TINY_CLIP).tokens_per_image < 256
    assert tree["parameters"]["experts"] > 0


def test_a_plan_takes_kernels_as_training_does_and_writes_them_into_the_run(tmp_path):
    """Memory and time follow the choice; FP8's rate is said to be an assumption."""
    out = tmp_path / "run.yaml"
    given = {"gpus": 8, "gpu": "h200", "json": True, "keep": 1}
    plain = json.loads(run_plan("gpt-oss-20b", **given))
    fp8 = json.loads(run_plan("gpt-oss-20b", ["kernels.experts=fp8", "kernels.permute=fused"], out=out, **given))
    chunked = json.loads(run_plan("gpt-oss-20b", ["kernels.loss=chunked"], **given))
    assert fp8["kernels"]["experts"] == load_run(out).kernels.experts == "fp8"
    assert load_run(out).kernels.permute == "fused"
    assert fp8["layouts"][0]["step"]["total"] < plain["layouts"][0]["step"]["total"]
    assert chunked["layouts"][0]["peak_bytes"] < plain["layouts"][0]["peak_bytes"]
    assert chunked["layouts"][0]["step"]["total"] > plain["layouts"][0]["step"]["total"]
    table = run_plan("gpt-oss-20b", ["kernels.experts=fp8"], gpus=8, keep=1)
    assert "kernels.experts=fp8" in table and "1.58 times as fast as in BF16: not measured" in table


def test_a_run_given_as_yaml_brings_its_kernels(tmp_path):
    text = "model:\n  language: tiny\n  vision: tiny-clip\nkernels:\n  experts: mxfp4\n  loss: chunked\n"
    (tmp_path / "m.yaml").write_text(text)
    given = {"gpus": 1, "sequence_length": 256, "json": True}
    assert json.loads(run_plan(str(tmp_path / "m.yaml"), **given))["kernels"]["experts"] == "mxfp4"
    changed = json.loads(run_plan(str(tmp_path / "m.yaml"), ["kernels.experts=bf16"], **given))["kernels"]
    assert (changed["experts"], changed["loss"]) == ("bf16", "chunked")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("kernels.experts=fast", "kernels.experts='fast'; allowed: auto, reference"),
        ("kernels.expert=fp8", "unknown field 'kernels.expert'; did you mean 'experts'?"),
        ("kernels.permute=fused", "kernels.permute=fused gives the experts rows in any order"),
        ("stages.train.num_steps=3", "a plan takes kernels.field=value alone"),
        ("kernels.experts", "is not of the form section.field=value"),
    ],
)
def test_kernels_that_no_run_could_have_are_refused(override, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        run_plan("tiny", [override], gpus=1, sequence_length=256)
