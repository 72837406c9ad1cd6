"""How near DALI's decoder on the GPU (``mixed``) is to its CPU decoder and to Pillow, and how fast the three are.

    python tools/gpu/decoders.py --out decoders.json       # exit code 77 where there is no DALI or no GPU
    python tools/gpu/decoders.py --rehearse                # without a GPU: the GPU's pipeline, run on the CPU

Pictures of every way a JPEG may hold its colours (4:4:4, 4:2:2, 4:2:0, grey, progressive) and PNG, smooth with edges
and a little noise, in many sizes; differences in grey levels of 255 over the squares that an encoder sees, and whether
a picture's square depends on what it is decoded with. Rates are of 1024 x 1024 JPEG files to squares of 336 px that lie
on the CPU, as a stage takes them: one thread, sides in turns, median of five rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from megatron_medgpt.data.pixels import PillowDecoder
from megatron_medgpt.types import ImageSpec

SPEC = ImageSpec(size_px=336, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.269, 0.261, 0.276), num_tokens=576)
KINDS: dict[str, dict[str, Any]] = {
    "JPEG 4:4:4": {"format": "JPEG", "quality": 92, "subsampling": 0},
    "JPEG 4:2:2": {"format": "JPEG", "quality": 92, "subsampling": 1},
    "JPEG 4:2:0": {"format": "JPEG", "quality": 92, "subsampling": 2},
    "JPEG grey": {"format": "JPEG", "quality": 92},
    "JPEG progressive": {"format": "JPEG", "quality": 92, "progressive": True},
    "PNG": {"format": "PNG"},
}
ROUNDS = 5


class Decoder(Protocol):
    def decode(self, images: list[np.ndarray]) -> np.ndarray: ...


def encoded(kind: str, count: int, largest_px: int, least_px: int = 200) -> list[np.ndarray]:
    """uint8 files of pictures of ``least_px`` to ``largest_px`` a side."""
    rng = np.random.default_rng(list(KINDS).index(kind))
    files = []
    for _ in range(count):
        width, height = (int(n) for n in rng.integers(least_px, largest_px + 1, 2))
        blocks = rng.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        image = Image.fromarray(np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8))
        out = io.BytesIO()
        (image.convert("L") if kind.endswith("grey") else image).save(out, **KINDS[kind])
        files.append(np.frombuffer(out.getvalue(), np.uint8))
    return files


def differences(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Of two stacks of squares, in grey levels."""
    apart = np.abs(one.astype(np.int16) - other)
    return {
        "largest": int(apart.max()), "mean": round(float(apart.mean()), 4),
        "share_above_2": round(float((apart > 2).mean()), 6),
    }  # fmt: skip


def rates(sides: dict[str, Decoder], images: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Images a second of each side, and its rate over the second side's."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side.decode(images)
            if turn:  # the first round allocates
                seconds[name].append(time.perf_counter() - began)
    base = list(sides)[1]
    return {
        name: {
            "images_per_s": round(len(images) / statistics.median(taken), 1),
            "times": round(statistics.median(b / t for b, t in zip(seconds[base], taken)), 2),
        }
        for name, taken in seconds.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--rehearse", action="store_true", help="run the GPU's pipeline on the CPU, at toy size")
    given = parser.parse_args()
    try:
        import nvidia.dali
        import torch

        from megatron_medgpt.data.dali import DaliDecoder
    except ImportError as error:
        print(f"{error.name} is not installed", file=sys.stderr)
        raise SystemExit(77) from None
    if given.rehearse:
        gpu, device = DaliDecoder(SPEC, resize_in_dali=True), "none: its pipeline on the CPU"
    elif torch.cuda.is_available():
        gpu, device = DaliDecoder(SPEC, device="mixed", device_id=0), torch.cuda.get_device_name(0)
    else:
        print("no CUDA GPU; --rehearse runs without one", file=sys.stderr)
        raise SystemExit(77)
    count, largest_px = (3, 400) if given.rehearse else (48, 1400)
    cpu, pillow = DaliDecoder(SPEC), PillowDecoder(SPEC)
    result: dict[str, Any] = {"gpu": device, "dali": nvidia.dali.__version__, "differences": {}}
    for kind in KINDS:
        files = encoded(kind, count, largest_px)
        squares = gpu.decode(files)
        alone = np.concatenate([gpu.decode([file]) for file in files])
        found = {
            "from DALI on the CPU": differences(squares, cpu.decode(files)),
            "from Pillow": differences(squares, pillow.decode(files)),
            "decoded one by one": differences(squares, alone),
        }
        result["differences"][kind] = found
        print(kind, *(f"{name}: {value}" for name, value in found.items()), sep="; ", flush=True)
    large = encoded("JPEG 4:2:0", 2 if given.rehearse else 64, 1024, least_px=1024)
    result["rates"] = rates({"DALI on the GPU": gpu, "DALI on the CPU": cpu, "Pillow": pillow}, large)
    print(json.dumps(result["rates"]))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
