"""What this machine is: GPU, versions, and what the checks will find missing, as JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import platform
import shutil

import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "megatron-core",
    "transformer-engine",
    "liger-kernel",
    "nvidia-dali-cuda130",
    "pytest",
    "numpy",
)


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "gpus": torch.cuda.device_count(), "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    found = {
        **(gpu() if torch.cuda.is_available() else {"gpu": None}),
        "python": platform.python_version(), "cuda": torch.version.cuda,
        "packages": {name: version(name) for name in PACKAGES},
        "tools": {name: shutil.which(name) for name in ("nvcc", "compute-sanitizer", "ncu")},
    }  # fmt: skip
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
