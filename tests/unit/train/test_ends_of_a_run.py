"""``state.json`` says how a run ended, however that was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.config.load import to_yaml
from megatron_medgpt.config.schema import KernelConfig, RunConfig
from megatron_medgpt.observe.marker import write_marker
from megatron_medgpt.train import command, stages
from tests.small_data import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_run(tmp_path_factory.mktemp("ends"))


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (OSError(28, "No space left on device", "x.bin"), ("failed", "x.bin: No space left on device")),
        (WorkError("step 3: loss is not finite"), ("failed", "step 3: loss is not finite")),
        (RuntimeError("Connection closed\nby peer"), ("crashed", "RuntimeError: Connection closed by peer")),
        (ConnectionResetError(104, "reset"), ("crashed", "ConnectionResetError: [Errno 104] reset")),
        (KeyboardInterrupt(), ("stopped", None)),
    ],
)
def test_an_ending_is_recorded_with_its_reason(
    run: RunConfig, error: BaseException, state: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object, **__: object) -> None:
        assert _state(run)["status"] == "running"
        raise error

    monkeypatch.setattr(stages, "run_stages", end)
    with pytest.raises(type(error)):
        command.train_here(run, dry_run=False)
    status, reason = state
    assert _state(run) == {"status": status} | ({} if reason is None else {"reason": reason})


def test_the_first_failure_is_the_reason_and_not_what_it_brought_about(tmp_path: Path) -> None:
    write_marker(tmp_path, "failed", reason="rank 1: the disk is full")
    command._note_end(tmp_path, RuntimeError("rank 0: Connection closed by peer"))
    command._note_end(tmp_path, KeyboardInterrupt())
    assert json.loads((tmp_path / "state.json").read_text())["reason"] == "rank 1: the disk is full"


def test_a_kernel_that_cannot_serve_the_machine_is_refused_before_anything_is_written(
    run: RunConfig, tmp_path: Path
) -> None:
    config = replace(run, out=str(tmp_path / "new"), kernels=KernelConfig(attention="flex"))
    with pytest.raises(UsageError, match=r"kernels\.attention=flex: .* set it to auto"):
        command.train_here(config, dry_run=False)
    assert not (tmp_path / "new").exists()


def test_a_run_that_goes_on_is_not_joined_by_a_second_and_one_that_was_cut_off_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run), encoding="utf-8")
    trained = []
    monkeypatch.setattr(
        stages,
        "run_stages",
        lambda *_, **__: trained.append(1) or stages.RunEnd(status="done", step=1, checkpoint=None),
    )
    out = Path(run.out)
    write_marker(out, "running")
    with pytest.raises(
        UsageError, match=r"a run goes on there \(process \d+ on .*; let it end, stop it, or set another out="
    ):
        command.run_train(str(path), [])
    with pytest.raises(UsageError, match="a run goes on there"):
        command.run_train(str(path), [], num_ranks=2)
    assert trained == [] and _state(run)["status"] == "running"

    marker = _state(run)
    (out / "state.json").write_text(json.dumps(marker | {"began": 1}))
    assert command.run_train(str(path), []) == 0
    assert trained == [1] and _state(run)["status"] == "done"
    assert "warning: the run here ended without a word" in capfd.readouterr().err


def test_a_run_folder_that_was_moved_is_not_taken_for_the_one_it_came_from(run: RunConfig, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    write_marker(moved, "stopped", step=3)
    (moved / "run.yaml").write_text(to_yaml(run), encoding="utf-8")
    with pytest.raises(UsageError, match=rf"says out={run.out}, which is another one; add out={moved} to continue"):
        command.find_run(str(moved / "run.yaml"), [])
    assert command.find_run(str(moved / "run.yaml"), [f"out={moved}"]).out == str(moved)
    (tmp_path / "copy.yaml").write_text(to_yaml(run), encoding="utf-8")
    assert command.find_run(str(tmp_path / "copy.yaml"), []).out == run.out


def _state(run: RunConfig) -> dict:
    return json.loads((Path(run.out) / "state.json").read_text())
