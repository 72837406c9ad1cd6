"""What a conversion does at its limits: memory, space, and folders that are not what they say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_medgpt.config.errors import MedgptError, WorkError
from megatron_medgpt.convert import command
from megatron_medgpt.convert.mapped import TensorSpec
from megatron_medgpt.convert.safetensor import SafetensorsFolder, SafetensorsWriter, read_json
from megatron_medgpt.convert.stream import PART_BYTES, staged_folder
from tests.published_models import CLIP, on_mxfp4_grid, random_weights, write_folder, write_gpt_oss
from tests.small_data import small_tokenizer

_THREADS = 1

_BOTH_WAYS = """
import resource, sys
from pathlib import Path
from megatron_medgpt.convert.hf_to_megatron import import_hf, plan_import
from megatron_medgpt.convert.megatron_to_hf import export_hf
from megatron_medgpt.data.text import Tokenizer
published, work, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
peaks = [peak()]
import_hf(plan_import(published, new_vision="tiny-clip"), work / "checkpoint", num_threads=threads)
peaks.append(peak())
export_hf(work / "checkpoint", work / "hf", tokenizer=work / "tokenizer", part="language", num_threads=threads)
peaks.append(peak())
print(*peaks)
"""


def test_memory_is_a_few_parts_whatever_the_size_of_the_model(tmp_path):
    """0.8 GB through at most four parts of 64 MiB a thread: one that is read, moved, laid out and written."""
    language = replace(CLIP.language, num_layers=2, hidden_size=1024, expert_hidden_size=1024, num_experts=64)
    wide = replace(CLIP, language=language)
    meta = {n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in _language_shapes(wide).items()}
    published = _sparse_gpt_oss(tmp_path / "published", wide, meta)
    num_bytes = sum(path.stat().st_size for path in published.glob("*.safetensors"))
    allowed = 4 * _THREADS * PART_BYTES
    assert num_bytes > 2 * allowed
    small_tokenizer(tmp_path / "tokenizer")
    done = subprocess.run(
        [sys.executable, "-c", _BOTH_WAYS, str(published), str(tmp_path), str(_THREADS)],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start, imported, exported = map(int, done.stdout.split()[-3:])
    assert imported - start < allowed, (imported - start) / PART_BYTES
    assert exported - start < allowed, (exported - start) / PART_BYTES


def _language_shapes(config):
    from megatron_medgpt.convert.hf_to_megatron import model_shapes

    return {name: shape for name, shape in model_shapes(config).items() if name.startswith("language.")}


def _sparse_gpt_oss(folder: Path, config, meta) -> Path:
    """A published folder of noughts that takes no room on the disk."""
    from megatron_medgpt.convert.gpt_oss import gpt_oss_table
    from megatron_medgpt.convert.llava import published_language_config

    folder.mkdir()
    specs = {n: TensorSpec.of(t) for n, t in gpt_oss_table(config.language, "language.").to_published(meta).items()}
    writer = SafetensorsWriter(folder, specs)
    writer.finish()
    (folder / "config.json").write_text(json.dumps(published_language_config(config.language).to_diff_dict()))
    return folder


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(WorkError, match="free some space"), staged_folder(tmp_path / "out", 1 << 62):
        pass
    assert not list(tmp_path.iterdir())


# --- folders that are not what they say --------------------------------------------------------------------------


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _cut(folder: Path) -> None:
    shard = _shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def _lose(folder: Path) -> None:
    _shards(folder)[1].unlink()


def _index_names_absent_file(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = read_json(index)
    content["weight_map"]["lm_head.weight"] = "model-00099-of-00099.safetensors"
    index.write_text(json.dumps(content))


def _index_leaves_the_folder(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = read_json(index)
    content["weight_map"]["lm_head.weight"] = "../model.safetensors"
    index.write_text(json.dumps(content))


def _rewritten(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    files = SafetensorsFolder(folder)
    tensors = {name: files.tensor(name).clone() for name in files.names}
    config = read_json(folder / "config.json")
    for path in folder.iterdir():
        path.unlink()
    edit(tensors)
    write_folder(folder, tensors, config)


ROUTER = "model.layers.1.mlp.router.weight"
DAMAGES = {
    "truncated shard": (_cut, 2, "truncated"),
    "missing shard": (_lose, 2, "is missing; fetch the folder again"),
    "index names an absent file": (_index_names_absent_file, 2, "model-00099-of-00099.safetensors is missing"),
    "index leads out of the folder": (_index_leaves_the_folder, 2, "no file of this folder"),
    "no configuration": (lambda f: (f / "config.json").unlink(), 2, "config.json is missing"),
    "unreadable configuration": (lambda f: (f / "config.json").write_text("{"), 2, "not readable JSON"),
    "a configuration's key twice": (
        lambda f: (f / "config.json").write_text('{"model_type": "gpt_oss", "model_type": "llama"}'), 2, "stands twice",
    ),
    "another model": (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), 2, "model_type='llama'"),
    "unknown tensor": (lambda f: _rewritten(f, lambda t: t.update(extra=torch.ones(2))), 1, "the first: extra"),
    "missing tensor": (lambda f: _rewritten(f, lambda t: t.pop(ROUTER)), 1, ROUTER),
    "wrong shape": (lambda f: _rewritten(f, lambda t: t.update({ROUTER: t[ROUTER][:, :-1].clone()})), 2, "has shape"),
    "wrong dtype": (lambda f: _rewritten(f, lambda t: t.update({ROUTER: t[ROUTER].int()})), 2, "torch.int32"),
    "no model at all": (lambda f: [path.unlink() for path in f.iterdir()], 2, "name a model's folder"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line_and_an_exit_code_and_stays_as_it_is(tmp_path, damage):
    published = write_gpt_oss(tmp_path / "published", CLIP, random_weights(CLIP), max_shard_bytes=100_000)
    edit, exit_code, said = DAMAGES[damage]
    edit(published)
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in published.iterdir()}
    with pytest.raises(MedgptError) as raised:
        command.hf_to_megatron(published, tmp_path / "out", new_vision="tiny-clip")
    assert raised.value.exit_code == exit_code
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert {path.name: hashlib.sha256(path.read_bytes()).digest() for path in published.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_inspect_tells_what_an_imported_checkpoint_was_made_of_without_reading_its_tensors(tmp_path):
    published = write_gpt_oss(tmp_path / "published", CLIP, on_mxfp4_grid(random_weights(CLIP)), experts="mxfp4")
    command.hf_to_megatron(published, tmp_path / "out", new_vision="tiny-clip", keep_packed=True)
    for path in (tmp_path / "out").glob("*.distcp"):  # the same size, nothing of what was in it
        path.write_bytes(bytes(path.stat().st_size))
    tool = Path(__file__).parents[2] / "tools" / "convert" / "inspect_checkpoint.py"
    done = subprocess.run(
        [sys.executable, str(tool), str(tmp_path / "out")], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"imported  language: {published} (gpt_oss, MXFP4 experts)" in done.stdout
    assert "imported  vision: new tiny-clip, random weights, seed 1234" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "mlp.experts.down_blocks" in line)
    assert line.split()[1:3] == ["uint8", "2x8x64x2x16"]
