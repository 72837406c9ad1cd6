"""Option likelihoods and written answers are the same in every layout, on every rank, whatever shares a batch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from question_folders import omnimedvqa_folder, read_questions, write_questions

from megatron_medgpt.data.text import train_tokenizer
from megatron_medgpt.parallel.launch import meeting_of

HERE = Path(__file__).parent
RESUMED = "1,1,1"
"""Goes on with the answers that a run in one process left behind."""
LAYOUTS = ("1,2,1", RESUMED, "2,1,2")
"""Every layout of up to four ranks writes the same tokens: ``tests/parallel``. Here the engines share the work."""


def run_ranks(world_size: int, folder: Path, layouts: tuple[str, ...], timeout_s: float = 500) -> None:
    """Start the worker on ``world_size`` processes, each a session of its own, and end all of them in any case."""
    processes = []
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for rank in range(world_size):
                meeting, descriptors = meeting_of(rank, listener)
                environment = os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1",
                    **meeting,
                }  # fmt: skip
                log = (folder / f"world{world_size}-rank{rank}.log").open("w")
                command = [sys.executable, str(HERE / "engine_worker.py"), str(folder), *layouts]
                processes.append(
                    subprocess.Popen(
                        command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                        pass_fds=descriptors,
                    )
                )  # fmt: skip
        for rank, process in enumerate(processes):
            assert process.wait(timeout_s) == 0, (folder / f"world{world_size}-rank{rank}.log").read_text()[-3000:]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def leave_unfinished(finished: Path, begun: Path) -> None:
    """The answers file of a run that was killed: some lines, the last of them cut in two."""
    begun.mkdir()
    for note in finished.glob("*.answers.json"):
        (begun / note.name).write_bytes(note.read_bytes())
        lines = note.with_suffix(".jsonl").read_bytes().splitlines(keepends=True)
        (begun / note.name).with_suffix(".jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:20])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    # 21 questions: neither the batches nor the rounds come out even over two ranks.
    omnimedvqa_folder(folder / "set", num_questions=21, questions_per_image=2)
    rows = read_questions(folder / "set")
    (folder / "set" / "Images" / "3.png").write_bytes(b"<html>not found</html>")
    whole = (folder / "set" / "Images" / "5.png").read_bytes()
    (folder / "set" / "Images" / "5.png").write_bytes(whole[: len(whole) // 2])
    del rows[4]["option_D"], rows[5]["option_C"], rows[5]["option_D"]
    rows[9]["question"] = "What is it? " * 200
    write_questions(folder / "set", rows)
    train_tokenizer(["What is number 3? PET scan CT scan Blood test Fundus imaging"] * 20, folder / "tokenizer", 400)
    run_ranks(1, folder, ("1,1,1",))
    (folder / "1,1,1-rank0.json").rename(folder / "single.json")
    (folder / "1,1,1").rename(folder / "single")
    leave_unfinished(folder / "single", folder / RESUMED)
    run_ranks(2, folder, LAYOUTS)
    return folder


def read(path: Path, protocol: str = "chat-likelihood") -> dict[str, list]:
    return json.loads(path.read_text())[protocol]


def test_broken_pictures_and_long_questions_fail_alone_and_count(folder):
    failed = {key: error for key, (error, _) in read(folder / "single.json").items() if error}
    assert sorted(failed) == ["P_0006", "P_0007", "P_0009", "P_0010", "P_0011"]
    assert "not a readable picture" in failed["P_0006"]
    assert "positions" in failed["P_0009"]
    assert "does not decode" in failed["P_0010"]
    result = json.loads((folder / "single" / "chat-likelihood.json").read_text())
    assert (result["n"], result["failed"]) == (21, 5)


def test_every_question_has_one_loss_per_option(folder):
    counts = [len(losses) for error, losses in read(folder / "single.json").values() if not error]
    assert sorted(counts) == [2, 3] + [4] * 14


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_equal_the_single_process(folder, layout):
    single, split = read(folder / "single.json"), read(folder / f"{layout}-rank0.json")
    assert single.keys() == split.keys()
    for key, (error, losses) in single.items():
        assert (error is None) == (split[key][0] is None)
        if error is None:
            # float32 throughout: 4 layers of sums of 64 terms in another order, about 60 roundings of 2^-24 each
            np.testing.assert_allclose(split[key][1], losses, rtol=60 * 2**-24)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_answers_equal_the_single_process(folder, layout):
    single, split = read(folder / "single.json", "letter"), read(folder / f"{layout}-rank0.json", "letter")
    assert len({text for error, text in single.values() if not error}) > 1
    assert sum(error is None for error, _ in single.values()) >= 16
    assert split == single


def test_a_run_on_two_ranks_goes_on_with_what_one_rank_has_answered(folder):
    begun = (folder / "single" / "letter.answers.jsonl").read_bytes().splitlines()[:9]
    lines = (folder / RESUMED / "letter.answers.jsonl").read_bytes().splitlines()
    assert lines[:9] == begun
    asked_again = [json.loads(line)["question_id"] for line in lines[9:]]
    kept = [json.loads(line) for line in begun]
    assert not {row["question_id"] for row in kept if "error" not in row} & set(asked_again)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_hold_the_same_answers(folder, layout):
    first = json.loads((folder / f"{layout}-rank0.json").read_text())
    for path in folder.glob(f"{layout}-rank*.json"):
        assert json.loads(path.read_text()) == first


@pytest.mark.parametrize("layout", LAYOUTS)
def test_controls_are_the_same_in_every_layout(folder, layout):
    for name in ("chat-likelihood.json", "letter.json"):
        single, split = (json.loads((folder / where / name).read_text()) for where in ("single", layout))
        assert split["controls"] == single["controls"]
        assert split["accuracy"] == single["accuracy"]
