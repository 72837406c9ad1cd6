"""A run from its configuration to its end, in this process: stages, resume, freezing, guards."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_medgpt.checkpoint.find import find_latest, read_facts, resolve_checkpoint
from megatron_medgpt.checkpoint.manifest import read_manifest
from megatron_medgpt.checkpoint.metadata import stored_tensors
from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.config.load import load_run
from megatron_medgpt.config.schema import ExitConfig, OptimizerConfig
from megatron_medgpt.evaluate.run import evaluate_model
from megatron_medgpt.observe.metrics import read_metrics
from megatron_medgpt.train import cadence, step
from megatron_medgpt.train.command import train_here
from tests.small_data import COLOURS, picture, small_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run whose data other runs of this file share."""
    return small_run(tmp_path_factory.mktemp("run"))


def fresh(base, tmp_path: Path, **changes):
    return replace(base, out=str(tmp_path / "run"), **changes)


def values(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    from torch.distributed.checkpoint import FileSystemReader, load

    tensors = {
        name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in stored_tensors(checkpoint).items()
    }
    load(tensors, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return tensors


def assert_same(ours: Path, theirs: Path) -> None:
    left, right = values(ours), values(theirs)
    assert left.keys() == right.keys() and left
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ, first {different[:3]}"


def losses(run) -> list[str]:
    return [float(line["loss"]).hex() for line in read_metrics(Path(run.out) / "metrics.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    run = fresh(base, tmp_path_factory.mktemp("whole"))
    assert train_here(run, dry_run=False) == 0
    return run


def test_a_run_goes_through_its_stages_and_learns(uninterrupted):
    records = read_metrics(Path(uninterrupted.out) / "metrics.jsonl")
    assert [(r["stage"], r["stage_step"]) for r in records] == [
        *(("align", i) for i in range(1, 7)), *(("instruct", i) for i in range(1, 5))
    ]  # fmt: skip
    assert records[-1]["validation_loss"] < records[2]["validation_loss"] - 0.5
    assert {"tokens_per_s", "grad_norm", "lr", "mem_gb", "step_s", "samples"} <= records[0].keys()


def test_the_resolved_configuration_in_the_run_folder_is_the_run(uninterrupted):
    assert load_run(Path(uninterrupted.out) / "run.yaml") == uninterrupted


@pytest.mark.parametrize("stop_after", [1, 4, 8])
def test_a_run_stopped_by_a_signal_and_continued_is_bitwise_the_uninterrupted_one(
    base, uninterrupted, tmp_path, monkeypatch, stop_after
):
    run = fresh(base, tmp_path)
    record = cadence.Cadence._record

    def stop(self, parts, progress, *rest):
        if progress.step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return record(self, parts, progress, *rest)

    monkeypatch.setattr(cadence.Cadence, "_record", stop)
    assert train_here(run, dry_run=False) == 0
    assert read_facts(find_latest(Path(run.out) / "checkpoints")).step in (stop_after, stop_after + 1)
    monkeypatch.undo()
    assert train_here(run, dry_run=False) == 0
    assert losses(run) == losses(uninterrupted)
    last, whole = (find_latest(Path(r.out) / "checkpoints") for r in (run, uninterrupted))
    assert_same(last, whole)
    assert read_facts(last).sample_chain == read_facts(whole).sample_chain


def test_a_finished_run_started_again_changes_nothing(uninterrupted):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (Path(uninterrupted.out) / "checkpoints").iterdir())
    assert train_here(uninterrupted, dry_run=False) == 0
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in (Path(uninterrupted.out) / "checkpoints").iterdir())


def test_frozen_modules_keep_every_bit_and_the_others_learn(base, tmp_path):
    frozen = ("encoder", "language", "experts", "router")
    stages = tuple(replace(s, frozen=frozen, num_steps=2, validation_interval=0) for s in base.stages)
    run = fresh(base, tmp_path, stages=stages)
    train_here(run, dry_run=False)
    first, last = (values(Path(run.out) / "checkpoints" / f"step-{n:08d}") for n in (2, 4))
    moved = {name for name in first if not name.startswith("optimizer") and not torch.equal(first[name], last[name])}
    assert moved and all(name.startswith("projector.") for name in moved)


def test_a_module_has_its_own_learning_rate(base, tmp_path):
    still = OptimizerConfig(learning_rate=1e-3, module_learning_rates={"experts": 1e-12, "router": 1e-12})
    stages = (replace(base.stages[0], optimizer=still, num_steps=1, validation_interval=0),
              replace(base.stages[1], optimizer=still, num_steps=1, validation_interval=0))  # fmt: skip
    run = fresh(base, tmp_path, stages=stages)
    train_here(run, dry_run=False)
    first, last = (values(Path(run.out) / "checkpoints" / f"step-{n:08d}") for n in (1, 2))
    change = {n: float((first[n] - last[n]).abs().max()) for n in first if not n.startswith("optimizer")}
    assert max(v for n, v in change.items() if ".mlp." in n) < 1e-9
    assert max(v for n, v in change.items() if "word_embeddings" in n) > 1e-4


def test_a_stage_ends_when_its_exit_criterion_is_reached(base, tmp_path):
    goal = ExitConfig(metric="validation_loss", threshold=100.0)
    run = fresh(base, tmp_path, stages=(replace(base.stages[0], exit=goal, num_steps=50),))
    train_here(run, dry_run=False)
    assert read_facts(find_latest(Path(run.out) / "checkpoints")).step == base.stages[0].validation_interval


def question_table(folder: Path) -> Path:
    """Four questions about pictures of one colour, as a user's own table."""
    rng, rows = np.random.default_rng(3), []
    folder.mkdir()
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(picture(colour, rng))
        rows.append(
            {
                "question": "What colour is the picture?", "answer": f"It is {colour}.", "image": f"{colour}.png",
                "options": [f"It is {name}." for name in COLOURS], "modality": "photograph",
            }
        )  # fmt: skip
    table = folder / "questions.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    return table


def test_a_run_is_evaluated_under_several_protocols_with_one_loading(uninterrupted, tmp_path):
    protocols = ["official-qa,official-prefix", "letter"]
    code = evaluate_model(
        "table", data=question_table(tmp_path / "set"), out=tmp_path / "eval" / "colours.json", arguments=(),
        checkpoint=Path(uninterrupted.out), protocols=protocols, max_new_tokens=8, text_only=True, reader="pillow",
    )  # fmt: skip
    assert code == 0
    for protocol in ("official-qa", "official-prefix", "letter"):
        result = json.loads((tmp_path / "eval" / f"colours.{protocol}.json").read_text())
        assert (result["protocol"], result["n"], result["failed"]) == (protocol, 4, 0)
        assert set(result["controls"]) == {"blank_image", "shuffled_image", "text_only"}
        whole = find_latest(Path(uninterrupted.out) / "checkpoints")
        assert result["engine"] == f"checkpoint {whole.name}@{read_manifest(whole).digest[:12]}", "steps are no names"
        assert result["settings"].get("max_new_tokens") == (None if protocol == "official-prefix" else 8)
        assert len(json.loads((tmp_path / "eval" / f"colours.{protocol}.gallery.json").read_text())) == 4
    with pytest.raises(UsageError, match="--protocol letters; allowed: official-qa"):
        evaluate_model(
            "table", data=tmp_path, out=tmp_path / "x.json", arguments=(), checkpoint=Path(uninterrupted.out),
            protocols=["letters"],
        )  # fmt: skip


def test_a_stage_that_gets_no_better_ends_and_its_best_checkpoint_is_kept(base, tmp_path, capfd):
    # A learning rate that throws the weights away: the first validation is the best one.
    stage = replace(
        base.stages[0], num_steps=20, validation_interval=1, optimizer=OptimizerConfig(learning_rate=3.0),
        exit=ExitConfig(metric="option_loss", patience=3), best_by="option_loss",
        questions=str(question_table(tmp_path / "questions")), question_task="table", num_questions=4,
    )  # fmt: skip
    checkpoint = replace(base.checkpoint, keep=1)
    run = fresh(base, tmp_path, stages=(stage,), checkpoint=checkpoint)
    assert train_here(run, dry_run=False) == 0
    records = read_metrics(Path(run.out) / "metrics.jsonl")
    found = [record["option_loss"] for record in records]
    best = found.index(min(found)) + 1
    assert best < len(found) < 20
    assert len(found) == best + 3
    assert {"option_accuracy", "option_accuracy/photograph", "option_failed"} <= records[0].keys()
    assert all(record["option_failed"] == 0 for record in records)
    # A validation after every step: what it costs is written down, and said once.
    spent = sum(record["validation_s"] for record in records)
    assert 0 < records[-1]["validation_share"] < spent / sum(record["step_s"] for record in records)
    said = "".join(capfd.readouterr())
    assert said.count("a longer stages.") == 1
    assert f"stages.{stage.name}.validation_interval" in said
    checkpoints = Path(run.out) / "checkpoints"
    assert resolve_checkpoint(checkpoints / "best").name == f"step-{best:08d}"
    assert resolve_checkpoint(checkpoints).name == f"step-{len(found):08d}"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [
        f"step-{best:08d}", f"step-{len(found):08d}"
    ]  # fmt: skip


def test_dear_validations_are_put_off_but_the_first_and_the_last(base, tmp_path, capfd):
    stage = replace(base.stages[0], num_steps=6, validation_interval=2, validation_max_share=0.0001)
    run = fresh(base, tmp_path, stages=(stage,))
    assert train_here(run, dry_run=False) == 0
    records = read_metrics(Path(run.out) / "metrics.jsonl")
    assert [record["step"] for record in records if "validation_s" in record] == [2, 6]
    said = "".join(capfd.readouterr())
    assert said.count("those due are put off until they fit into 0.01 %") == 1
    assert train_here(run, dry_run=True) == 0
    assert "every 2 steps: " in (said := " ".join(capfd.readouterr().out.split()))
    assert "but put off to take 0.0%" in said


def test_a_loss_that_is_not_finite_stops_the_run_before_any_parameter_changes(base, tmp_path, monkeypatch):
    run = fresh(base, tmp_path)
    loss = step.sum_of_losses

    def poisoned(batch, token_loss_BS):
        total, count, report = loss(batch, token_loss_BS)
        return total * float("nan"), count, {name: value * float("nan") for name, value in report.items()}

    train_here(replace(run, stages=(replace(run.stages[0], num_steps=3),)), dry_run=False)
    before = values(find_latest(Path(run.out) / "checkpoints"))
    monkeypatch.setattr(step, "sum_of_losses", poisoned)
    changed = replace(run, stages=(replace(run.stages[0], num_steps=3), run.stages[1]))
    with pytest.raises(WorkError, match=r"not finite on 1 rank.*no parameter was changed"):
        train_here(changed, dry_run=False)
    after = find_latest(Path(run.out) / "checkpoints")
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(after).items())
    [record] = (Path(run.out) / "non-finite").iterdir()
    assert json.loads(record.read_text())["samples"]


def test_resuming_with_other_data_order_is_refused(base, tmp_path):
    run = fresh(base, tmp_path)
    train_here(replace(run, stages=(replace(run.stages[0], num_steps=6),)), dry_run=False)
    checkpoint = find_latest(Path(run.out) / "checkpoints")
    (checkpoint.parent / "step-00000006").rename(tmp_path / "end")  # the run now stands in the middle of the stage
    out = Path(run.out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 1.0}\n')  # of a step after the checkpoint
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_bytes((out / "tokenizer" / "tokenizer.json").read_bytes())
    (tmp_path / "words" / "note").touch()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shorter = replace(run, stages=(replace(run.stages[0], num_steps=2), run.stages[1]))
    for other, says in (
        (replace(run, seed=run.seed + 1), "data plan of stage align has changed"),
        (shorter, "num_steps=2, but 3 steps are done"),
    ):
        with pytest.raises(UsageError, match=says):
            train_here(replace(other, tokenizer=str(tmp_path / "words")), dry_run=False)
    plans = out / "plans"
    assert before == {
        p: p.read_bytes() for p in out.rglob("*") if p.is_file() and (plans not in p.parents or p in before)
    }


def test_a_dry_run_prints_sizes_and_writes_nothing(base, tmp_path, capsys):
    run = fresh(base, tmp_path)
    assert train_here(run, dry_run=True) == 0
    printed = capsys.readouterr().out
    assert "stage align" in printed and "memory per rank" in printed and "tokens/s" in printed
    assert not Path(run.out).exists()
