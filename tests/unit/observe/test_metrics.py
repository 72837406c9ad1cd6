from __future__ import annotations

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_medgpt.observe.metrics import MetricsWriter, drop_steps_after, peak_flops, peak_flops_of, read_metrics


def write_steps(folder, first, last, *, resume_step=0, tensorboard=False):
    with MetricsWriter(folder, tensorboard=tensorboard, resume_step=resume_step) as metrics:
        for step in range(first, last + 1):
            metrics.write({"step": step, "stage": "align", "loss": 1 / step, "lr": 1e-4, "experts": {"ct": step}})


def test_one_object_per_step_with_nested_keys_flattened(tmp_path):
    write_steps(tmp_path, 1, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert json.loads(lines[1]) == {"step": 2, "stage": "align", "loss": 0.5, "lr": 1e-4, "experts/ct": 2}


def test_a_step_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    metrics = MetricsWriter(tmp_path, tensorboard=False)
    metrics.write({"step": 1, "loss": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    metrics.close()


@pytest.mark.parametrize("resume_step", range(6))
def test_resume_drops_the_steps_that_will_be_done_again(tmp_path, resume_step):
    write_steps(tmp_path, 1, 5)
    write_steps(tmp_path, resume_step + 1, 7, resume_step=resume_step)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 8))


def test_a_line_cut_by_a_kill_is_dropped_on_resume_and_not_read(tmp_path):
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        complete = whole[:length].count(b"\n")
        steps = [record["step"] for record in read_metrics(path)]
        assert steps[:complete] == list(range(1, complete + 1))
        assert len(steps) <= complete + 1
        drop_steps_after(path, 3)
        assert path.read_bytes() == whole[: whole[:length].rfind(b"\n") + 1]


def test_damage_in_the_middle_is_not_passed_over(tmp_path):
    write_steps(tmp_path, 1, 4)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:10], *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"delimiter|Unterminated|Expecting"):
        read_metrics(path)


def test_numbers_that_json_lacks_survive(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as metrics:
        metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["loss"])
    assert record["grad_norm"] == math.inf


def test_tensorboard_gets_the_tags_that_megatron_users_know(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(
            {"step": 4, "stage": "align", "loss": 2.5, "lr": 1e-4, "grad_norm": 0.5, "samples": 8, "step_s": 0.25,
             "tflops_per_device": 120.0, "validation_loss": 3.0, "expert_load/ct": 0.4}
        )  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {tag: events.Scalars(tag)[0] for tag in events.Tags()["scalars"]}
    assert set(found) == {
        "lm loss", "learning-rate", "grad-norm", "batch-size", "iteration-time", "throughput", "lm loss validation",
        "expert_load/ct",
    }  # fmt: skip
    assert (found["lm loss"].value, found["lm loss"].step) == (2.5, 4)


def test_tensorboard_drops_the_steps_that_will_be_done_again(tmp_path):
    write_steps(tmp_path, 1, 5, tensorboard=True)
    # A run goes on in another second. Within one TensorBoard reads the tenth file of a process before its ninth.
    (before,) = (tmp_path / "tensorboard").iterdir()
    seconds = before.name.split(".")[3]
    before.rename(before.with_name(before.name.replace(seconds, f"{int(seconds) - 60}")))
    write_steps(tmp_path, 3, 4, resume_step=2, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [event.step for event in events.Scalars("lm loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA B200", 2.25e15), ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA L40S", 362e12), ("NVIDIA A1000", None), ("", None),
    ],
)  # fmt: skip
def test_peak_is_found_by_whole_words_of_the_name(name, peak):
    assert peak_flops_of(name) == peak


def test_a_cpu_has_no_known_peak():
    assert peak_flops("cpu") is None
