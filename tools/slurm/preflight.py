"""Is every node of a job fit to train? Each node writes what it finds; the judge compares and names the bad one.

    preflight.py node --found DIR --shared RUN --needs /data --needs /shared/tokenizer
    preflight.py judge --found DIR --nodes n1,n2 --gpus 8 --gpu h100

Exit codes of the judge: 0 fit, 3 not fit (one line per fault: node, cause). Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

NOT_FIT = 3
MAX_CLOCK_SKEW_S = 20.0
"""Nodes start within a few seconds of each other; more is a clock that is wrong."""
MIN_FREE_BYTES = 20 * 10**9
MIN_MEMORY_MIB = {"h100": 79_000, "h200": 140_000, "b200": 175_000, "b300": 265_000, "gb200": 180_000, "gb300": 270_000}
BUSY_MIB = 2_000
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "nvidia-dali-cuda130", "transformers")
PROBE_BYTES = 4 * 2**20
BILL_OF_MATERIALS = Path("/opt/medgpt/bill-of-materials.json")
"""Every build of our image writes one with a number of its own (tools/image/install.py)."""


def inspect_node(shared: Path, needs: tuple[Path, ...] = ()) -> dict:
    """Everything that the judge compares, of the node this runs on.

    Args:
        shared: the run folder, which must be writable.
        needs: folders and files that must be there.
    """
    return {
        "node": node_name(),
        "time": time.time(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "code": code_hash(),
        "system": _system(),
        "image": _image(),
        "gpus": _gpus(),
        "shared": shared_fault(shared),
        "missing": [fault for fault in map(missing_fault, needs) if fault is not None],
        "free_bytes": shutil.disk_usage(shared).free if shared.is_dir() else 0,
    }


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_hash() -> str | None:
    """Of every Python file of the installed package, by its path within it; None where it is not installed."""
    digest = hashlib.sha256()
    for package in ("megatron_medgpt", "medgpt_kernels"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return None
        root = Path(spec.origin).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _system() -> str:
    release = Path("/etc/os-release")
    pretty = (
        [line for line in release.read_text().splitlines() if line.startswith("PRETTY_NAME=")]
        if release.is_file()
        else []
    )
    return (pretty or ["PRETTY_NAME=unknown"])[0].partition("=")[2].strip('"')


def _image() -> str | None:
    """Which build of the image this is; None outside of it."""
    try:
        return hashlib.sha256(BILL_OF_MATERIALS.read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def _gpus() -> list[dict] | None:
    """Name and memory of every GPU; None without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(", ") for line in shown.strip().splitlines()]
    return [{"name": name, "memory_mib": int(total), "used_mib": int(used)} for name, total, used in rows]


def shared_fault(shared: Path) -> str | None:
    """Why the run folder cannot be used from this node; None when it can."""
    probe = shared / f".preflight-{node_name()}-{os.getpid()}"
    try:
        with probe.open("wb") as stream:
            stream.write(b"\0" * PROBE_BYTES)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return f"{shared} cannot be written: {error.strerror}"
    finally:
        probe.unlink(missing_ok=True) if shared.is_dir() else None
    return None


def missing_fault(path: Path) -> str | None:
    """Why a folder or file that the job reads is not there; None when it is."""
    try:
        if path.is_dir():
            with os.scandir(path) as entries:
                return None if next(entries, None) else f"{path} is empty; is it mounted?"
        path.stat()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}; is it mounted?"
    return None


def report(found: Path, shared: Path, needs: tuple[Path, ...]) -> str | None:
    """Write what this node has where the judge looks for it. Why it could not be written, or None."""
    told = inspect_node(shared, needs)
    aside = found / f".{told['node']}.{os.getpid()}"
    try:
        aside.write_text(json.dumps(told), encoding="utf-8")
        aside.replace(found / f"{told['node']}.json")
    except OSError as error:
        return told["shared"] or f"{found} cannot be written: {error.strerror}; is it the folder that all nodes share?"
    return None


def faults(
    reports: dict[str, dict], nodes: list[str], *, gpus: int, gpu: str, min_free: int = MIN_FREE_BYTES
) -> list[str]:
    """One line per fault, naming the node."""
    found = [f"node {n}: no answer; it could not start the check (is it up, is the folder mounted?)"
             for n in nodes if n not in reports]  # fmt: skip
    if not reports:
        return found
    for node, report in sorted(reports.items()):
        found += [f"node {node}: {fault}" for fault in _own_faults(report, gpus=gpus, gpu=gpu, min_free=min_free)]
    for field in ("image", "code", "python", "packages", "system"):
        found += _odd_ones(reports, field, nodes)
    times = {node: report["time"] for node, report in reports.items()}
    middle = sorted(times.values())[len(times) // 2]
    found += [
        f"node {node}: its clock is {t - middle:+.0f} s off the others'; check chrony or ntpd"
        for node, t in times.items()
        if abs(t - middle) > MAX_CLOCK_SKEW_S
    ]
    return found


def _own_faults(report: dict, *, gpus: int, gpu: str, min_free: int) -> list[str]:
    found = []
    if report["shared"]:
        found.append(report["shared"])
    elif report["free_bytes"] < min_free:
        found.append(
            f"{report['free_bytes'] / 1e9:.1f} GB free on the run folder's disk; {min_free / 1e9:.0f} GB are needed"
        )
    found += report["missing"]
    if report["code"] is None:
        found.append("megatron_medgpt is not installed for this python")
    if gpus == 0:
        return found
    cards = report["gpus"]
    if cards is None:
        return [*found, "nvidia-smi does not run; is the driver loaded, does the container see the GPUs (--nv)?"]
    if len(cards) < gpus:
        found.append(f"{len(cards)} GPU(s), {gpus} expected")
    for number, card in enumerate(cards):
        if card["memory_mib"] < MIN_MEMORY_MIB.get(gpu, 0):
            found.append(
                f"GPU {number} is {card['name']} with {card['memory_mib']} MiB, {gpu} has {MIN_MEMORY_MIB[gpu]}"
            )
        if card["used_mib"] > BUSY_MIB:
            found.append(f"GPU {number} has {card['used_mib']} MiB in use by another process")
    return found


def _odd_ones(reports: dict[str, dict], field: str, nodes: list[str]) -> list[str]:
    """Nodes that differ from what most nodes have; of two nodes, from the first, which runs the batch script."""
    in_order = [n for n in nodes if n in reports] + sorted(set(reports) - set(nodes))
    values = {node: json.dumps(reports[node][field], sort_keys=True) for node in in_order}
    usual = max(values.values(), key=list(values.values()).count)  # the first of those that are equally many
    return [f"node {n}: {field} {v} differs from {usual} elsewhere" for n, v in sorted(values.items()) if v != usual]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("node", "judge"))
    parser.add_argument("--found", type=Path, required=True, help="folder of the nodes' reports")
    parser.add_argument("--shared", type=Path, help="the run folder")
    parser.add_argument("--needs", type=Path, action="append", default=[], help="must be there; repeatable")
    parser.add_argument("--gpus", type=int, default=0, help="expected per node")
    parser.add_argument("--gpu", default="cpu", help="their kind")
    parser.add_argument("--nodes", default="", help="names, separated by commas")
    parser.add_argument("--min-free-gb", type=float, default=MIN_FREE_BYTES / 1e9)
    options = parser.parse_args()
    if options.action == "node":
        if fault := report(options.found, options.shared, tuple(options.needs)):
            print(f"preflight: node {node_name()}: {fault}", file=sys.stderr)
            return NOT_FIT
        return 0
    reports = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in options.found.glob("*.json")}
    nodes = options.nodes.split(",")
    found = faults(reports, nodes, gpus=options.gpus, gpu=options.gpu, min_free=int(options.min_free_gb * 1e9))
    for fault in found:
        print(f"preflight: {fault}", file=sys.stderr)
    if not found:
        print(f"preflight: {len(nodes)} node(s) fit")
    return NOT_FIT if found else 0


if __name__ == "__main__":
    sys.exit(main())
