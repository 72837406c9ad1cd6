"""Conversions of a model of full width, with random weights: seconds, bytes per second, peak memory, beside ``cp``.

    python tools/convert/benchmark.py --work DIR                      20B in MXFP4 in and out, packed (42 GB of disk)
    python tools/convert/benchmark.py --work DIR --scarce --state cold                             the same in 28 GB
    python tools/convert/benchmark.py --work DIR --dtype bf16 --layers 1

The published folder is made of random blocks once and kept in DIR. Every measurement runs in a process of its own, so
that its peak memory is its own, and ends with a flush of the disk, ``cp`` too. It is made twice: ``cold``, after what
it reads was dropped from the page cache (the machine below may still have it), and ``warm``, when it was just read. The
seconds of a conversion include the start of Python and its imports (row ``start-up``). With ``--turns`` the three take
turns, and the last lines are the medians' ratios: seconds of ``cp`` by seconds of the conversion, with and without the
start-up. Before each, memory for the page cache is touched and freed: a virtual machine's first touch of a page can
cost more than the copy (here 2 s a GB, against 0.6 for ``cp``), and whichever came first would pay it for the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_medgpt.checkpoint.manifest import hash_file
from megatron_medgpt.config.presets import GPT_OSS_20B
from megatron_medgpt.config.schema import ModelConfig
from megatron_medgpt.convert.gpt_oss import gpt_oss_table
from megatron_medgpt.convert.hf_to_megatron import import_hf, model_shapes, plan_import
from megatron_medgpt.convert.llava import published_language_config
from megatron_medgpt.convert.mapped import TensorSpec
from megatron_medgpt.convert.megatron_to_hf import export_hf
from megatron_medgpt.convert.safetensor import SafetensorsWriter
from megatron_medgpt.data.text import train_tokenizer


def make_published(folder: Path, num_layers: int, experts: Literal["plain", "mxfp4"]) -> None:
    """A GPT-oss folder of the 20B's width: random bytes as blocks, scales of ordinary size, small random weights."""
    language = replace(GPT_OSS_20B, num_layers=num_layers)
    config = ModelConfig(language=language)
    table = gpt_oss_table(language, "language.", experts=experts)
    shapes = model_shapes(config)
    specs = {}
    for row in table.rows:
        ours = torch.empty(shapes[row.ours], dtype=torch.bfloat16, device="meta")
        specs.update({n: TensorSpec.of(t) for n, t in zip(row.published, row.move.to_published(ours))})
    folder.mkdir(parents=True)
    writer = SafetensorsWriter(folder, specs)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1 << 28,), dtype=torch.uint8, generator=generator)
    small = (torch.randn(1 << 27, generator=generator) * 0.02).bfloat16()
    for name, spec in specs.items():
        rows = spec.shape[0]
        step = max(1, rows * (1 << 27) // max(spec.num_bytes, 1))
        for first in range(0, rows, step):
            shape = (min(step, rows - first), *spec.shape[1:])
            count = torch.Size(shape).numel()
            if name.endswith("_scales"):
                part = (noise[:count] % 8 + 118).view(shape)
            else:
                part = (noise if spec.dtype == torch.uint8 else small)[:count].view(shape)
            writer.write(name, first, part)
    writer.finish()
    values = published_language_config(language).to_diff_dict()
    (folder / "config.json").write_text(json.dumps(values))


def measure(name: str, command: list[str], read: Path, num_bytes: int, *, cold: bool) -> dict[str, Any]:
    """Run a command and flush the disk; its seconds, rate and largest resident memory (of any of its processes).

    Args:
        read: folder that the command reads; dropped from the page cache first, or read first.
    """
    os.sync()
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    touch = f"import numpy; numpy.empty({min(int(1.1 * num_bytes), free // 2)}, dtype='u1')[::4096] = 1"
    subprocess.run([sys.executable, "-c", touch], check=True)
    for path in read.glob("*"):
        with open(path, "rb", buffering=0) as stream:
            if cold:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(1 << 24):
                    pass
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{name} failed: {' '.join(command)}")
    row = {
        "what": f"{name}, {'cold' if cold else 'warm'}", "seconds": round(seconds, 1),
        "gb_per_s": round(num_bytes / 1e9 / seconds, 3), "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of weights."""
    return {path.name: hash_file(path).sha256 for path in folder.glob("*.safetensors")}


def _median(rows: list[dict[str, Any]], what: str) -> float:
    return statistics.median(row["seconds"] for row in rows if row["what"] == what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with space for three copies")
    parser.add_argument("--dtype", choices=("mxfp4", "bf16"), default="mxfp4")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--unpack", action="store_true", help="MXFP4 to a bf16 checkpoint and back to MXFP4")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--state", choices=("cold", "warm"), action="append", help="both when not given")
    parser.add_argument("--turns", type=int, default=1, help="measurements of each; the ratios are of their medians")
    parser.add_argument("--scarce", action="store_true", help="remove what was imported before the export; one --state")
    parser.add_argument("--step", choices=("make", "import", "export"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scarce and (len(arguments.state or ()) != 1 or arguments.unpack or arguments.turns != 1):
        parser.error("--scarce removes the published folder: it goes with one --state and turn, without --unpack")
    work, packed = arguments.work, arguments.dtype == "mxfp4" and not arguments.unpack
    source, start, out = work / f"published-{arguments.dtype}-{arguments.layers}", work / "checkpoint", work / "export"
    if arguments.step == "make":
        make_published(source, arguments.layers, "mxfp4" if arguments.dtype == "mxfp4" else "plain")
        return
    if arguments.step == "import":
        plan = plan_import(source, new_vision="tiny-clip", keep_packed=packed)
        import_hf(plan, start, num_threads=arguments.threads)
        return
    if arguments.step == "export":
        export_hf(
            start, out, tokenizer=work / "tokenizer", dtype=arguments.dtype, part="language",
            num_threads=arguments.threads, original=source if arguments.unpack else None,
        )  # fmt: skip
        return
    again = [sys.executable, __file__, *sys.argv[1:], "--step"]
    if not source.exists():  # in a process of its own: a child starts with its parent's peak memory
        subprocess.run([*again, "make"], check=True)
    train_tokenizer(["what is this?"], work / "tokenizer", 400)
    num_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    rows = []
    copied = work / "copy"
    for folder in (start, out, copied):
        shutil.rmtree(folder, ignore_errors=True)
    nothing = [sys.executable, "-c", "import megatron_medgpt.convert.command"]
    rows.append(measure("start-up", nothing, work / "tokenizer", 0, cold=False))
    copy = ["cp", "-r", str(source), str(copied)]
    expected = digests(source)
    for state in [*(arguments.state or ("cold", "warm"))] * arguments.turns:
        cold = state == "cold"
        rows.append(measure("cp", copy, source, num_bytes, cold=cold))
        shutil.rmtree(copied)
        rows.append(measure("hf-to-megatron", [*again, "import"], source, num_bytes, cold=cold))
        if arguments.scarce:
            shutil.rmtree(source)
        rows.append(measure("megatron-to-hf", [*again, "export"], start, num_bytes, cold=cold))
        same = digests(out) == expected
        shutil.rmtree(out)
        shutil.rmtree(start)
        if not same:
            raise SystemExit("what came out is not what went in")
    ratios, started = {}, _median(rows, "start-up, warm")
    for state in arguments.state or ("cold", "warm"):
        middle = {what: _median(rows, f"{what}, {state}") for what in ("cp", "hf-to-megatron", "megatron-to-hf")}
        ratios[state] = {
            what: {"whole": round(middle["cp"] / seconds, 2), "started": round(middle["cp"] / (seconds - started), 2)}
            for what, seconds in middle.items() if what != "cp"
        }  # fmt: skip
        print(json.dumps({"state": state, "of the rate of cp": ratios[state], "turns": arguments.turns}))
    result = {
        "gb": round(num_bytes / 1e9, 2), "dtype": arguments.dtype, "layers": arguments.layers,
        "unpacked": arguments.unpack, "same_bytes_out": True, "rows": rows, "of_cp": ratios,
        "threads": arguments.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__,
        "own_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "language": asdict(GPT_OSS_20B)["hidden_size"],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
