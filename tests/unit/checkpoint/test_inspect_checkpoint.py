from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from sharded_example import write

TOOL = Path(__file__).parents[3] / "tools" / "convert" / "inspect_checkpoint.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("inspect_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def run(tmp_path):
    write(tmp_path / "checkpoints", 1)
    write(
        tmp_path / "checkpoints",
        2,
        stage_name="align",
        stage_end=True,
        layout={"tensor": 2},
        lineage=("step-00000001@ab",),
    )
    return tmp_path


def test_names_shapes_lineage_and_layout_are_shown_without_loading(main, run, capsys, monkeypatch):
    monkeypatch.setattr("torch.load", lambda *a, **k: pytest.fail("a tensor was loaded"))
    assert main([str(run / "checkpoints" / "step-00000002"), "--verify"]) == 0
    shown = capsys.readouterr().out
    for words in ("'align'", "its end", "tensor 2", "step-00000001@ab", "layer.weight", "4x33x7", "3 tensors", "right"):
        assert words in shown


def test_a_run_folder_means_its_newest_step(main, run, capsys):
    assert main([str(run), "--json", "--match", "bias"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["facts"]["step"] == 2
    assert shown["tensors"] == {"head.bias": {"shape": [5], "dtype": "float32", "bytes": 20, "chunks": 1}}


def test_an_altered_file_is_found_when_asked(main, run, capsys):
    shard = run / "checkpoints" / "step-00000002" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[900] ^= 1
    shard.write_bytes(content)
    assert main([str(run)]) == 0
    assert "contents not checked" in capsys.readouterr().out
    assert main([str(run), "--verify"]) == 2
    assert "__0_0.distcp" in capsys.readouterr().err


def test_no_checkpoint_is_wrong_usage(main, tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err
