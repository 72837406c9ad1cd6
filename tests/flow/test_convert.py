"""Conversions from end to end: through the engine's layouts, through the commands, and through what goes wrong."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config, save_config

from megatron_medgpt.checkpoint.find import verify as verify_checkpoint
from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.config.schema import ParallelConfig, ProjectorConfig
from megatron_medgpt.convert import command
from megatron_medgpt.convert.hf_to_megatron import import_hf, plan_import
from megatron_medgpt.convert.logits import open_transformers, run_ranks
from megatron_medgpt.convert.megatron_to_hf import export_hf
from megatron_medgpt.convert.safetensor import SafetensorsFolder, read_json
from megatron_medgpt.convert.stored import StoredCheckpoint
from tests.published_models import (
    CLIP,
    SIGLIP,
    on_mxfp4_grid,
    random_weights,
    write_checkpoint,
    write_folder,
    write_gpt_oss,
    write_original,
    write_tower,
)
from tests.small_data import small_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("convert") / "checkpoint", CLIP, random_weights(CLIP))


def _stored(path: Path) -> dict[str, torch.Tensor]:
    stored = StoredCheckpoint(path)
    return {name: stored.tensor(name).clone() for name in stored.names}


def _equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_saved_by_four_ranks_is_read_and_exported_like_one_of_a_single_process(
    checkpoint, tokenizer, tmp_path
):
    """An imported checkpoint is loaded in TP2 x PP2 x EP2, saved from there in as many pieces, and exported."""
    parallel = ParallelConfig(tensor=2, pipeline=2, expert=2)
    settings = {"model": asdict(CLIP), "parallel": asdict(parallel), "load": str(checkpoint), "save": str(tmp_path)}
    task = tmp_path / "task.json"
    task.write_text(json.dumps(settings))
    run_ranks([sys.executable, str(Path(__file__).with_name("convert_worker.py")), str(task)], 4, tmp_path, 900)
    saved = tmp_path / "step-00000005"
    assert len(list(saved.glob("*.distcp"))) > 1
    assert _equal(_stored(saved), random_weights(CLIP))
    stored = StoredCheckpoint(saved)
    for name, tensor in random_weights(CLIP).items():
        if tensor.ndim and len(tensor) > 5:
            assert torch.equal(stored.tensor(name, 3, len(tensor) - 1), tensor[3:-1])
    export_hf(saved, tmp_path / "hf", tokenizer=tokenizer, dtype="fp32")
    export_hf(checkpoint, tmp_path / "expected", tokenizer=tokenizer, dtype="fp32")
    names = ("model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja")
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "mxfp4"])
def test_an_export_that_is_imported_and_exported_again_is_the_same_to_the_byte(config, dtype, tokenizer, tmp_path):
    """MXFP4 alone keeps values, not bytes (a group that has lost its largest code fits a smaller scale); with the
    first export as the original it keeps both."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config, random_weights(config))
    export_hf(checkpoint, tmp_path / "one", tokenizer=tokenizer, dtype=dtype, max_shard_bytes=300_000)
    back = import_hf(plan_import(tmp_path / "one"), tmp_path / "back")
    original = tmp_path / "one" if dtype == "mxfp4" else None
    export_hf(back, tmp_path / "two", tokenizer=tokenizer, dtype=dtype, max_shard_bytes=300_000, original=original)
    shards = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(shards) > 1
    for name in [*shards, "config.json", "model.safetensors.index.json"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    if dtype == "fp32":
        assert _equal(_stored(back), random_weights(config))


@pytest.mark.parametrize("write", [write_gpt_oss, write_original], ids=["transformers", "openai"])
def test_untouched_mxfp4_experts_come_out_byte_for_byte(write, tokenizer, tmp_path):
    """One expert of one layer is trained; only its two matrices are quantised again."""
    weights = on_mxfp4_grid(random_weights(CLIP))
    published = write(tmp_path / "published", CLIP, weights, experts="mxfp4")
    for name in SafetensorsFolder(published).names:  # other bytes for the same values: half the values, twice the scale
        if name.endswith(("_blocks", ".blocks")):
            _halve_where_exact(published, name)
    tower = write_tower(tmp_path / "tower", CLIP, weights)
    trained = _stored(import_hf(plan_import(published, vision=tower), tmp_path / "imported"))
    trained["language.decoder.layers.1.mlp.experts.gate_up"][3] += 0.01
    trained["language.decoder.layers.1.mlp.experts.down"][3] += 0.01
    checkpoint = write_checkpoint(tmp_path / "trained", CLIP, trained)
    summary = export_hf(checkpoint, tmp_path / "hf", tokenizer=tokenizer, dtype="mxfp4", original=published)
    assert (summary.num_experts, summary.num_experts_kept) == (32, 30)
    assert read_json(tmp_path / "hf" / "quantisation.json")["num_kept_byte_for_byte"] == 30
    out, source = SafetensorsFolder(tmp_path / "hf"), SafetensorsFolder(published)
    original = write is write_original
    for layer in range(2):
        for ours, theirs in (("gate_up_proj", "mlp1_weight"), ("down_proj", "mlp2_weight")):
            for leaf in ("blocks", "scales"):
                name = f"model.layers.{layer}.mlp.experts.{ours}_{leaf}"
                name_in = f"block.{layer}.mlp.{theirs}.{leaf}" if original else name
                kept = [i for i in range(8) if (layer, i) != (1, 3)]
                assert torch.equal(out.tensor("language_model." + name)[kept], source.tensor(name_in)[kept])


def _halve_where_exact(folder: Path, blocks_name: str) -> None:
    """Write groups, where every value's half is on the grid too, as the halves under the next larger scale."""
    files = SafetensorsFolder(folder)
    tensors = {name: files.tensor(name).clone() for name in files.names}
    blocks, scales = tensors[blocks_name], tensors[blocks_name.replace("blocks", "scales")]
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    # Codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; only 0.5 and 1.5 have no half there.
    half = torch.tensor([0, 255, 1, 255, 2, 3, 4, 5], dtype=torch.uint8)[(codes & 7).long()]
    able = (half != 255).all(-1)
    moved = half | (codes & 8)
    packed = moved[..., ::2] | (moved[..., 1::2] << 4)
    blocks[able], scales[able] = packed[able], scales[able] + 1
    (folder / "model.safetensors").unlink()
    write_folder(folder, tensors, read_json(folder / "config.json"))


def test_a_projector_with_pixel_shuffle_and_norm_travels_alone_and_is_refused_as_a_part_of_a_llava(tokenizer, tmp_path):
    config = replace(CLIP, projector=ProjectorConfig(pixel_shuffle=2, norm=True))
    weights = random_weights(config)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config, weights)
    with pytest.raises(UsageError, match="pixel_shuffle=2 and norm=True"):
        export_hf(checkpoint, tmp_path / "hf", tokenizer=tokenizer)
    export_hf(checkpoint, tmp_path / "projector", dtype="fp32", part="projector")
    language = write_gpt_oss(tmp_path / "language", CLIP, weights)
    parts = {"vision": write_tower(tmp_path / "tower", CLIP, weights), "projector": tmp_path / "projector"}
    plan = plan_import(language, **parts)
    assert plan.config.projector == config.projector
    for of_a_new_one in ({"pixel_shuffle": 2}, {"projector_norm": True}):
        with pytest.raises(UsageError, match=r"shapes a new projector, and .*projector gives one"):
            plan_import(language, **parts, **of_a_new_one)
    assert _equal(_stored(import_hf(plan, tmp_path / "out")), weights)


def test_the_projector_travels_alone(checkpoint, tmp_path):
    export_hf(checkpoint, tmp_path / "projector", dtype="fp32", part="projector")
    assert set(SafetensorsFolder(tmp_path / "projector").names) == {
        f"multi_modal_projector.linear_{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")
    }
    weights = random_weights(CLIP, seed=8)
    plan = plan_import(
        write_gpt_oss(tmp_path / "language", CLIP, weights),
        vision=write_tower(tmp_path / "tower", CLIP, weights),
        projector=tmp_path / "projector",
    )
    found = _stored(import_hf(plan, tmp_path / "out"))
    expected = {n: t for n, t in random_weights(CLIP).items() if n.startswith("projector.")}
    assert _equal(found, {**weights, **expected})


def test_packed_experts_stay_packed_in_the_checkpoint_and_come_out_byte_for_byte(tokenizer, tmp_path, capsys):
    weights = on_mxfp4_grid(random_weights(CLIP))
    published = write_gpt_oss(tmp_path / "published", CLIP, weights, experts="mxfp4")
    found = _stored(import_hf(plan_import(published, new_vision="tiny-clip", keep_packed=True), tmp_path / "out"))
    source = SafetensorsFolder(published)
    for leaf in ("blocks", "scales"):
        name = f"language.decoder.layers.1.mlp.experts.down_{leaf}"
        assert torch.equal(found[name], source.tensor(f"model.layers.1.mlp.experts.down_proj_{leaf}"))
    with pytest.raises(UsageError, match="--dtype mxfp4"):
        export_hf(tmp_path / "out", tmp_path / "hf", tokenizer=tokenizer)
    export_hf(tmp_path / "out", tmp_path / "hf", tokenizer=tokenizer, dtype="mxfp4", part="language")
    exported = SafetensorsFolder(tmp_path / "hf")
    for name in source.names:
        assert torch.equal(
            exported.tensor(name).to(source.spec(name).dtype),
            source.tensor(name).bfloat16().to(source.spec(name).dtype),
        ), name
    assert command.verify(tmp_path / "out", published) == 0  # by logits: ours unpacked, transformers' dequantised
    assert " ok\n" in capsys.readouterr().out


def test_verify_passes_the_right_folder_and_fails_a_wrong_one_by_tensors_and_by_logits(
    checkpoint, tokenizer, tmp_path, capsys
):
    export_hf(checkpoint, tmp_path / "hf", tokenizer=tokenizer, dtype="fp32")
    assert command.verify(checkpoint, tmp_path / "hf", layouts=("single", "tp2-ep2")) == 0
    said = capsys.readouterr().out
    assert said.count(" ok\n") == 2 and "100.00 %" in said
    files = SafetensorsFolder(tmp_path / "hf")
    tensors = {name: files.tensor(name).clone() for name in files.names}
    wrong = "language_model.model.layers.1.mlp.experts.down_proj"
    tensors[wrong] = tensors[wrong].transpose(-1, -2).contiguous()
    config = read_json(tmp_path / "hf" / "config.json")
    write_folder(tmp_path / "wrong", tensors, config)
    assert command.verify(checkpoint, tmp_path / "wrong") == 1
    said = capsys.readouterr().out
    assert "1 differ" in said and "layers.1.mlp.experts.down" in said and "OUTSIDE THE BOUND" in said
    config["text_config"]["sliding_window"] = 17
    write_folder(tmp_path / "window", {name: files.tensor(name) for name in files.names}, config)
    assert command.verify(checkpoint, tmp_path / "window", logits=False) == 1
    assert "language.sliding_window: 16 and 17" in capsys.readouterr().out


def test_a_folder_that_lacks_what_its_configuration_describes_is_not_compared_with_random_weights(tmp_path):
    published = write_gpt_oss(tmp_path / "published", CLIP, random_weights(CLIP), experts="mxfp4")
    config = read_json(published / "config.json")
    del config["quantization_config"]
    (published / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"no tensor for 4 parameters, the first model\.layers\.0\.mlp\.experts"):
        open_transformers(published, images=False)


@pytest.mark.parametrize(
    "values", [{"auto_map": {"AutoModel": "x.Y"}}, {"text_config": {"_attn_implementation_internal": "a/b"}}], ids=str
)
def test_a_configuration_that_names_code_is_never_handed_to_transformers(values):
    from megatron_medgpt.convert.logits import refuse_code

    with pytest.raises(UsageError, match="names code to run"):
        refuse_code(values, "config.json")


def test_a_run_or_its_checkpoints_folder_stands_for_its_newest_checkpoint(checkpoint, tokenizer, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-00000003").symlink_to(checkpoint)
    (run / "checkpoints" / "latest").write_text("step-00000003\n")
    (run / "run.yaml").write_text(f"tokenizer: {tokenizer}\n")
    (run / "checkpoints" / "best").write_text("step-00000003\n")
    places = [run, run / "checkpoints", run / "checkpoints" / "latest", run / "checkpoints" / "best"]
    for number, place in enumerate(places):
        export_hf(place, tmp_path / f"hf{number}")
        assert (tmp_path / f"hf{number}" / "tokenizer.json").is_file()
    with pytest.raises(UsageError, match="is no checkpoint and holds none"):
        export_hf(tmp_path / "nothing", tmp_path / "x")
    with pytest.raises(UsageError, match="--tokenizer"):
        export_hf(checkpoint, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("layout", "says"), [("tp9", "parallel.tensor=9 does not divide"), ("two", "layout 'two'")])
def test_a_layout_that_cannot_be_is_refused_before_anything_is_compared(checkpoint, tmp_path, layout, says):
    with pytest.raises(UsageError, match=says):
        command.verify(checkpoint, tmp_path / "not there", layouts=("single", layout), logits=False)


def test_nothing_is_overwritten_and_nothing_half_written_is_left(checkpoint, tokenizer, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(UsageError, match="never overwritten"):
        export_hf(checkpoint, tmp_path / "taken", tokenizer=tokenizer)
    weights = random_weights(CLIP)
    weights["language.decoder.layers.1.mlp.router.bias"][2] = float("nan")
    poisoned = write_checkpoint(tmp_path / "poisoned", CLIP, weights)
    with pytest.raises(WorkError, match=r"layers\.1\.mlp\.router\.bias is not finite"):
        export_hf(poisoned, tmp_path / "out", tokenizer=tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poisoned", "taken"]


def test_an_altered_checkpoint_is_not_exported(tokenizer, tmp_path):
    """Neither where its values are others, nor where its archives are broken: read before the hash is known."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", CLIP, random_weights(CLIP))
    verify_checkpoint(checkpoint)
    path = next(checkpoint.glob("*.distcp"))
    good = path.read_bytes()
    damaged = [bytes(len(good))]
    for position in (0, 1000, len(good) // 2, len(good) - 30, len(good) - 1):
        damaged.append(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"content of {path.name} is not what was written .sha256"):
            export_hf(checkpoint, tmp_path / "out", tokenizer=tokenizer)
        assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
    path.write_bytes(good)
    (checkpoint / "metadata.json").write_bytes(b" " * (checkpoint / "metadata.json").stat().st_size)
    with pytest.raises(UsageError, match=r"content of metadata\.json"):
        export_hf(checkpoint, tmp_path / "out", tokenizer=tokenizer)


def test_an_imported_checkpoint_names_the_format_that_megatron_core_writes(checkpoint, tmp_path):
    save_config(CheckpointingConfig("torch_dist", 1), str(tmp_path))
    ours = json.loads((checkpoint / "metadata.json").read_bytes())
    assert read_json(tmp_path / "metadata.json").items() <= ours.items()  # 0.19 has dropped two, and passes over them
    assert maybe_load_config(str(checkpoint)) == CheckpointingConfig("torch_dist", 1)


def test_the_converters_start_without_megatron_core():
    """It takes two of the five seconds that everything took to import."""
    code = "import sys, megatron_medgpt.convert.command; print([n for n in sys.modules if 'megatron.core' in n])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert out.stdout.strip() == "[]"


_CONVERT = """
import sys
from pathlib import Path
from megatron_medgpt.config.errors import MedgptError
from megatron_medgpt.convert.command import hf_to_megatron
try:
    print("start", flush=True)
    sys.exit(hf_to_megatron(Path(sys.argv[1]), Path(sys.argv[2]), new_vision="tiny-clip"))
except MedgptError as error:
    print("medgpt:", error)
    sys.exit(error.exit_code)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    published = write_gpt_oss(tmp_path / "published", CLIP, random_weights(CLIP))

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(published), str(tmp_path / "out")],
        preexec_fn=small_files, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "was not written" in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published"]


_DIES = """
import os, signal
from megatron_medgpt.convert import store
left, pwrite, write = 8 << 20, os.pwrite, store._HashedFile.write

def count(num_bytes):
    global left
    left -= num_bytes
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return num_bytes

def write_and_count(file, data):
    view = memoryview(data).cast("B")
    return sum(count(write(file, view[start : start + 1024])) for start in range(0, len(view), 1024))

os.pwrite = lambda *given: count(pwrite(*given))
store._HashedFile.write = write_and_count
"""
"""A conversion that is killed when it has written 8 of its 50 MB, however fast it is."""


_EXPORT = """
import sys
from pathlib import Path
from megatron_medgpt.convert.command import megatron_to_hf
sys.exit(megatron_to_hf(Path(sys.argv[1]), Path(sys.argv[2]), part="language", dtype="fp32", tokenizer=sys.argv[3]))
"""


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_conversion_that_was_killed_is_never_taken_for_a_whole_one_and_starts_again(way, tokenizer, tmp_path):
    wide = replace(CLIP, language=replace(CLIP.language, num_layers=2, vocab_size=200_000))
    expected = {n: t for n, t in random_weights(wide).items() if n.startswith("language.")}
    out = tmp_path / "out"
    if way == "import":
        source = write_gpt_oss(tmp_path / "source", wide, expected)
        arguments, written = ["-c", _DIES + _CONVERT, str(source), str(out)], "*.distcp"
    else:
        source = write_checkpoint(tmp_path / "source", wide, random_weights(wide))
        arguments, written = ["-c", _DIES + _EXPORT, str(source), str(out), str(tokenizer)], "*.safetensors"
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(path.stat().st_blocks > 8 for path in tmp_path.glob(f".tmp-out.*/{written}"))
    assert not out.exists() and len(list(tmp_path.glob(".tmp-out.*"))) == 1
    left = next(tmp_path.glob(".tmp-out.*"))
    with pytest.raises(UsageError):
        StoredCheckpoint(left) if way == "import" else plan_import(left, new_vision="tiny-clip")
    if way == "import":
        import_hf(plan_import(source, new_vision="tiny-clip"), out)
        found = {name: tensor for name, tensor in _stored(out).items() if name.startswith("language.")}
        assert _equal(found, expected)
    else:
        export_hf(source, out, part="language", dtype="fp32", tokenizer=tokenizer)
        assert command.verify(source, out, logits=False) == 0
    assert not list(tmp_path.glob(".tmp-out.*"))
