"""Plans on disk: made once, shared, named by content, and never trusted when they are damaged."""

import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_medgpt.data import plans as room
from megatron_medgpt.data.pack import plan_epoch
from megatron_medgpt.data.plans import EpochPlans

FIELDS = ("first_of_row", "samples", "images_of_row")


@pytest.fixture
def made(monkeypatch):
    """Counts the plans that are made; they are small, and kept all the same."""
    monkeypatch.setattr(room, "KEPT_ON_DISK_FROM", 1)
    lengths = np.random.default_rng(0).integers(1, 20, 300).astype(np.int32)
    calls = []

    def make(epoch):
        calls.append(epoch)
        return plan_epoch(np.arange(300), lengths, 64, 0, epoch, lengths % 3)

    make.calls = calls
    return make


def same(one, two):
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in FIELDS)


def test_a_plan_is_made_once_and_read_by_every_other(made, tmp_path):
    first = EpochPlans(made, "k" * 64, tmp_path / "plans")[3]
    second = EpochPlans(made, "k" * 64, tmp_path / "plans")[3]
    assert made.calls == [3]
    assert same(first, second)
    assert isinstance(second.samples, np.memmap)
    assert same(first, plan_of(made, 3))


def plan_of(make, epoch):
    return EpochPlans(make, "", None)[epoch]


@pytest.mark.parametrize("change", ["another key", "another epoch"])
def test_another_content_is_another_plan(made, tmp_path, change):
    EpochPlans(made, "k" * 64, tmp_path)[0]
    key, epoch = ("k" * 16 + "x" * 48, 0) if change == "another key" else ("k" * 64, 1)
    assert same(EpochPlans(made, key, tmp_path)[epoch], plan_of(made, epoch))
    assert made.calls[:2] == [0, epoch]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "pickled", "no json"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_damaged_plan_is_made_anew(made, tmp_path, field, damage):
    EpochPlans(made, "k" * 64, tmp_path)[0]
    (path,) = tmp_path.glob(f"*.{field}.npy")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-8])
    elif damage == "missing":
        path.unlink()
    elif damage == "pickled":
        np.save(path, np.array([{"code": "never run"}], object), allow_pickle=True)
        (entry,) = tmp_path.glob("*.json")
        facts = json.loads(entry.read_text())
        facts[field] = room._sha256(path)
        entry.write_text(json.dumps(facts))
    else:
        next(tmp_path.glob("*.json")).write_text("[")
    assert same(EpochPlans(made, "k" * 64, tmp_path)[0], plan_of(made, 0))
    assert made.calls[:2] == [0, 0]
    EpochPlans(made, "k" * 64, tmp_path)[0]
    assert made.calls == [0, 0, 0]  # the second of them was made without a folder


def test_of_ranks_that_begin_together_one_makes_the_plan(tmp_path):
    program = (
        "import sys, time, numpy as np\nfrom megatron_medgpt.data import pack, plans\nplans.KEPT_ON_DISK_FROM = 1\n"
        "def make(epoch):\n    print('made', flush=True); time.sleep(1)\n"
        "    return pack.plan_epoch(np.arange(9), np.full(9, 4, np.int32), 8, 0, epoch)\n"
        f"print(plans.EpochPlans(make, 'k' * 64, __import__('pathlib').Path({str(tmp_path)!r}))[0].num_rows)\n"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(3)
    ]
    said = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert sorted(said) == ["5\n", "5\n", "made\n5\n"]


def test_small_plans_are_not_kept(tmp_path):
    def make(epoch):
        return plan_epoch(np.arange(9), np.full(9, 4, np.int32), 8, 0, epoch)

    assert EpochPlans(make, "k" * 64, tmp_path)[0].num_rows == 5
    assert not list(tmp_path.glob("*.npy"))


def test_plans_of_epochs_long_past_are_removed(made, tmp_path):
    plans = EpochPlans(made, "k" * 64, tmp_path)
    for epoch in range(6):
        plans[epoch]
    kept = {path.name.split("-epoch-")[1][:5] for path in tmp_path.glob("*.npy")}
    assert kept == {"00000", "00004", "00005"}
    assert same(EpochPlans(made, "k" * 64, tmp_path)[2], plan_of(made, 2))
