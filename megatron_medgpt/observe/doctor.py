"""What this machine has, what of it will be used, and what is missing: the function behind ``medgpt doctor``.

Only torch is imported, to ask it for devices; everything else is looked up by its metadata, so that the answer comes
in a few seconds and a broken optional package cannot break it.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import json as json_format
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_medgpt.config.errors import UsageError

Status = Literal["ok", "absent", "warning", "error"]

REQUIRED = {
    "megatron-core": "0.16.1",
    "torch": "2.10",
    "psutil": "0",
    "numpy": "0",
    "transformers": "5.3",
    "safetensors": "0",
    "tokenizers": "0",
    "pyyaml": "0",
    "omegaconf": "2.3",
    "typer": "0",
    "rich": "0",
    "pydicom": "3.0.2",
    "pillow": "12.2",
}
"""Distributions that the main job needs, with the least version (the reasons stand in setup.py)."""

DICOM_CODECS = {
    "python-gdcm": "JPEG (12-bit, lossless)",
    "pyjpegls": "JPEG-LS",
    "pylibjpeg-openjpeg": "JPEG 2000, HTJ2K",
    "pylibjpeg-rle": "RLE",
}

TESTED_LINES = ("0.16", "0.19")
SHARED_MEMORY_BYTES = 1 << 30
"""NCCL and the image loader pass buffers through /dev/shm; containers often have 64 MB."""
FREE_DISK_BYTES = 5 << 30


@dataclass(frozen=True, kw_only=True)
class Finding:
    name: str
    status: Status
    found: str
    mend: str = ""
    """What to do about it, when something should be done."""


def run_doctor(json: bool = False, run: Path | None = None) -> int:
    """Print the findings and the verdict; return 0 when the main job can run here, else 1.

    Raises:
        UsageError: ``run`` is not a run folder that says how it stands.
    """
    examined = examine(run)
    if json:
        print(json_format.dumps(examined, indent=1))
    else:
        print(_as_text(examined))
    return 0 if examined["can_run"] else 1


def examine(run: Path | None = None) -> dict[str, Any]:
    """The findings as JSON values; with those of a run folder where one is given.

    Returns:
        ``{"findings": [{"name", "status", "found", "mend"}], "will_use": {what: which}, "can_run": bool, "verdict"}``.
        ``status`` is ``ok``, ``absent`` (optional, not there), ``warning`` or ``error`` (the main job cannot run).
    """
    devices, torch_finding = _torch()
    findings = [_python(), *_required(), torch_finding, _megatron_line(), *devices.findings]
    findings += [*_optional(has_gpu=devices.num_gpus > 0), *_codecs(), *_machine(has_gpu=devices.num_gpus > 0)]
    findings += [] if run is None else [_run(run)]
    errors = [finding for finding in findings if finding.status == "error"]
    can_run = not errors
    will_use = _will_use(devices) if can_run else {}
    verdict = (
        f"medgpt train can run here, on {will_use['platform']}"
        if can_run
        else "medgpt train cannot run here: " + "; ".join(f"{error.name} {error.found}" for error in errors)
    )
    return {
        "findings": [asdict(finding) for finding in findings],
        "will_use": will_use,
        "can_run": can_run,
        "verdict": verdict,
    }


@dataclass(frozen=True, kw_only=True)
class _Devices:
    num_gpus: int
    name: str
    findings: tuple[Finding, ...]


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding(name="Python", status="ok", found=found)


def _required() -> list[Finding]:
    findings = []
    for name, least in REQUIRED.items():
        found = version_of(name)
        if found is None:
            why = "; without it megatron-core's own save waits for ever" if name == "psutil" else ""
            mend = f"pip install '{name}>={least}'" if least != "0" else f"pip install {name}"
            findings.append(Finding(name=name, status="error", found="is not installed", mend=mend + why))
        elif _numbers(found) < _numbers(least):
            mend = f"pip install '{name}>={least}'"
            findings.append(Finding(name=name, status="error", found=f"is {found}, needed {least}", mend=mend))
        elif name not in ("torch", "megatron-core"):  # these two have lines of their own
            findings.append(Finding(name=name, status="ok", found=found))
    return findings


def _torch() -> tuple[_Devices, Finding]:
    no_devices = _Devices(num_gpus=0, name="CPU", findings=())
    if version_of("torch") is None:
        return no_devices, Finding(name="PyTorch", status="absent", found="not installed")
    try:
        import torch
    except (ImportError, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        return no_devices, Finding(
            name="PyTorch", status="error", found=f"cannot be imported: {text}", mend="install torch again"
        )
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    finding = Finding(name="PyTorch", status="ok", found=f"{torch.__version__}, built for {built_for}")
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        gpus = tuple(
            Finding(name=f"GPU {index}", status="ok", found=f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
            for index, gpu in enumerate(properties)
        )
        return _Devices(num_gpus=len(gpus), name=f"{len(gpus)} x {properties[0].name}", findings=gpus), finding
    if glob.glob("/dev/nvidia[0-9]*"):
        mend = "install a CUDA build of torch" if not torch.version.cuda else "check the driver with nvidia-smi"
        gpu = Finding(name="GPU", status="warning", found="there is one, which torch cannot use", mend=mend)
    else:
        gpu = Finding(name="GPU", status="absent", found="none; the CPU is used, with gloo")
    return _Devices(num_gpus=0, name="CPU", findings=(gpu,)), finding


def _megatron_line() -> Finding:
    found = version_of("megatron-core")
    if found is None:
        return Finding(name="megatron-core", status="absent", found="not installed")
    line = ".".join(found.split(".")[:2])
    if line in TESTED_LINES:
        return Finding(name="megatron-core", status="ok", found=f"{found} (a tested line)")
    mend = "tested are 0.16.1 (Python 3.10, 3.11) and 0.19 (Python 3.12 and newer)"
    return Finding(name="megatron-core", status="warning", found=f"{found}, not a tested line", mend=mend)


def _optional(*, has_gpu: bool) -> list[Finding]:
    findings = [_transformer_engine(), _apex()]
    dali = next((name for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if version_of(name)), None)
    if dali:
        findings.append(Finding(name="DALI", status="ok", found=f"{version_of(dali)} ({dali})"))
    else:
        mend = "pip install 'megatron-medgpt[dali]'; until then Pillow decodes the images"
        findings.append(Finding(name="DALI", status="absent", found="not installed", mend=mend))
    triton = version_of("triton")
    if triton:
        findings.append(Finding(name="Triton", status="ok", found=triton))
    else:
        status: Status = "warning" if has_gpu else "absent"
        mend = "pip install 'megatron-medgpt[cuda]' for the fused kernels" if has_gpu else ""
        findings.append(Finding(name="Triton", status=status, found="not installed", mend=mend))
    findings.append(_nvcc())
    return findings


def _transformer_engine() -> Finding:
    found = version_of("transformer-engine")
    if found is None:
        return Finding(name="TransformerEngine", status="absent", found="not installed; our own modules are used")
    if _numbers(found) < (2, 12):
        mend = "packed attention with sinks needs 2.12 or newer; ours is used"
        return Finding(name="TransformerEngine", status="warning", found=found, mend=mend)
    return Finding(name="TransformerEngine", status="ok", found=found)


def _apex() -> Finding:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding(name="apex", status="absent", found="not installed; torch's optimizer is used")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        mend = "pip uninstall apex; NVIDIA's is built from its repository or comes with NGC images"
        return Finding(name="apex", status="warning", found="PyPI's apex, which is not NVIDIA's", mend=mend)
    if importlib.util.find_spec("amp_C") is None:
        mend = "build it again with its CUDA extensions"
        return Finding(name="apex", status="warning", found="NVIDIA's, without its CUDA extensions", mend=mend)
    return Finding(name="apex", status="ok", found="NVIDIA's, with CUDA extensions")


def _nvcc() -> Finding:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if path is None:
        return Finding(name="nvcc", status="absent", found="not found; only building CUDA sources needs it")
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(name="nvcc", status="warning", found=f"{path} does not run ({error})")
    release = re.search(r"release (\S+?),", answer)
    return Finding(name="nvcc", status="ok", found=f"CUDA {release[1] if release else '?'} at {path}")


def _codecs() -> list[Finding]:
    missing = [f"{name} ({what})" for name, what in DICOM_CODECS.items() if version_of(name) is None]
    if not missing:
        return [Finding(name="DICOM codecs", status="ok", found=", ".join(DICOM_CODECS.values()))]
    mend = "pip install " + " ".join(entry.split()[0] for entry in missing)
    return [Finding(name="DICOM codecs", status="warning", found=f"without {', '.join(missing)}", mend=mend)]


def _machine(*, has_gpu: bool) -> list[Finding]:
    findings = [Finding(name="CPU", status="ok", found=f"{num_cores()} cores{_memory()}")]
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        small = has_gpu and size < SHARED_MEMORY_BYTES
        mend = "start the container with --shm-size=8g or --ipc=host" if small else ""
        status: Status = "warning" if small else "ok"
        findings.append(Finding(name="shared memory", status=status, found=_gigabytes(size), mend=mend))
    free = shutil.disk_usage(Path.cwd()).free
    low = free < FREE_DISK_BYTES
    mend = "checkpoints need room: free some, or run elsewhere" if low else ""
    findings.append(
        Finding(name="disk", status="warning" if low else "ok", found=f"{_gigabytes(free)} free here", mend=mend)
    )
    return findings


def _run(folder: Path) -> Finding:
    from megatron_medgpt.observe.marker import NAME, read_state  # wants rich, which may be what is missing

    state = read_state(folder)
    if state is None:
        raise UsageError(f"--run {folder}: no {NAME} there that says how a run stands; give the out folder of a run")
    ended_well = state.status in ("done", "stopped", "running") and not state.cut_off
    return Finding(name=f"run {folder}", status="ok" if ended_well else "warning", found=state.describe())


def _will_use(devices: _Devices) -> dict[str, str]:
    gpu = devices.num_gpus > 0
    return {
        "platform": f"{devices.name} (NCCL)" if gpu else f"CPU, {num_cores()} cores (gloo)",
        "attention": "FlexAttention" if gpu else "fused on the CPU, sinks and windows in its mask",
        "images": "DALI"
        if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
        else "Pillow",
        "engine": f"megatron-core {version_of('megatron-core')}",
    }


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f", {_gigabytes(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} of memory"
    except (ValueError, OSError):
        return ""


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: ``2.13.0+cpu`` -> (2, 13, 0)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()


def _as_text(examined: dict[str, Any]) -> str:
    findings = examined["findings"]
    width = max(len(finding["name"]) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding['status']:>8}  {finding['name']:<{width}}  {finding['found']}")
        if finding["mend"]:
            lines.append(f"{'':>8}  {'':<{width}}  -> {finding['mend']}")
    lines += [f"{'use':>8}  {what:<{width}}  {which}" for what, which in examined["will_use"].items()]
    return "\n".join([*lines, "", examined["verdict"]])
