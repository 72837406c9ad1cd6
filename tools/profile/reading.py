"""How fast records become batches: from shards, from raw files, and with WebDataset, Energon and Hugging Face datasets.

    python tools/profile/reading.py --work build/reading --out reading.json

The same JPEG pictures lie in every form; every reader gives normalised float32 tensors of 336 x 336 px in batches of
16, in a shuffled order where it can, in one process with one thread. Pillow is the decoder of all peers; ours is
measured with it too. The readers take turns, each in a process of its own, and the best of the turns counts: CPU
seconds, files in the page cache. ``copy`` reads the pixels of the same records, in the same shuffled order, with one
``preadv`` each into the same buffer, and does nothing else: the raw read bandwidth. It and ``records`` are also taken
in one process, pass by pass in turns, and the median of the ratios is the share of the raw bandwidth.

The peers are no dependencies of the package; one that is not installed is named and left out.
    pip install webdataset megatron-energon datasets
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_medgpt.config.schema import BlendConfig
from megatron_medgpt.data.loader import open_stage
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.square import pad_rgb, square
from megatron_medgpt.data.text import train_tokenizer
from megatron_medgpt.ingest.command import run_ingest
from megatron_medgpt.types import ImageSpec

SPEC = ImageSpec(
    size_px=336, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), num_tokens=576
)
BATCH = 16
PASSES = 128
"""Over the pixel shard, where it is read and nothing else is done: one takes milliseconds."""
NEEDS = {"webdataset": "webdataset", "energon": "megatron.energon", "datasets": "datasets"}


def make(work: Path, count: int) -> None:
    """Pictures of 1024 x 800 px with the look of tissue, in every form."""
    work.mkdir(parents=True)
    rng = np.random.default_rng(0)
    texts = [f"A round lesion, number {number}." for number in range(count)]
    (work / "images").mkdir()
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (25, 32, 3), dtype=np.uint8)).resize((1024, 800), Image.BICUBIC)
        grain = np.asarray(coarse, np.int16) + rng.normal(0, 8, (800, 1024, 1)).astype(np.int16)
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(work / "images" / f"{number:05d}.jpg", quality=90)
    rows = [{"image": f"{number:05d}.jpg", "caption": text} for number, text in enumerate(texts)]
    (work / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer(texts, work / "tokenizer", 400)
    for store in ("encoded", "pixels"):
        run_ingest(
            [work / "captions.jsonl"], out=work / store, tokenizer=work / "tokenizer", image_root=work / "images",
            store=store, key_file=work / "key", workers=1, echo=lambda line: None,
        )  # fmt: skip
    with tarfile.open(work / "train-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, text in enumerate(texts):
            for ending, content in (
                ("jpg", (work / "images" / f"{number:05d}.jpg").read_bytes()), ("txt", text.encode())
            ):  # fmt: skip
                member = tarfile.TarInfo(f"{number:05d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def tensor_of(image: Image.Image) -> torch.Tensor:
    """A normalised tensor as a careful user of a peer writes it."""
    pixels = torch.from_numpy(np.array(square(image, SPEC.size_px, pad_rgb(SPEC)))).permute(2, 0, 1).float().div_(255)
    return pixels.sub_(torch.tensor(SPEC.mean).view(3, 1, 1)).div_(torch.tensor(SPEC.std).view(3, 1, 1))


def in_batches(images: Iterator[torch.Tensor]) -> Iterator[int]:
    batch: list[torch.Tensor] = []
    for image in images:
        batch.append(image)
        if len(batch) == BATCH:
            yield torch.stack(batch).shape[0]
            batch = []
    if batch:
        yield torch.stack(batch).shape[0]


def ours(work: Path, store: str, reader: str) -> Iterator[int]:
    """Whole micro-batches: tokens, labels, positions and pixels."""
    stage = open_stage(
        [BlendConfig(path=str(work / store))], tokenizer_fingerprint=None, image=SPEC, sequence_length=2600, seed=0,
        reader=reader, cache_bytes=0,
    )  # fmt: skip
    for row in range(0, stage.num_rows_per_epoch, 4):
        yield len(stage.take(row, min(4, stage.num_rows_per_epoch - row)).pixels_ICYX)


def records(work: Path) -> Iterator[int]:
    """Records alone: tokens, targets and 8-bit pixels into the buffer of a batch, in a shuffled order."""
    dataset = Dataset(work / "pixels")
    buffer = np.empty((BATCH, SPEC.size_px, SPEC.size_px, 3), np.uint8)
    order = np.random.default_rng(0).permutation(len(dataset)).tolist() * PASSES
    for first in range(0, len(order), BATCH):
        tokens = 0
        for place, number in enumerate(order[first : first + BATCH]):
            sample = dataset[number]
            tokens += sample.token_ids.size
            dataset.read_pixels(sample.image_keys[0], buffer[place])
        yield len(order[first : first + BATCH])


def copy(work: Path) -> Iterator[int]:
    """The bytes of the pixel shard, nothing else."""
    size = SPEC.size_px**2 * 3
    buffer = np.empty((BATCH, size), np.uint8)
    for path in sorted((work / "pixels").glob("*.image.bin")):
        file = os.open(path, os.O_RDONLY)
        count = os.fstat(file).st_size // (size + 12)
        order = np.random.default_rng(0).permutation(count).tolist() * PASSES
        for place, number in enumerate(order):
            os.preadv(file, [buffer[place % BATCH]], number * (size + 12) + 12)
        os.close(file)
        yield len(order)


def decoder_alone(work: Path) -> Iterator[int]:
    """What DALI's decoder can do at best with these files: no records, no squares, no tensors."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    def pipeline():
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        return fn.decoders.image(
            encoded, device="cpu", output_type=types.RGB, jpeg_fancy_upsampling=True, use_fast_idct=False
        )

    built = pipeline()
    built.build()
    files = [np.fromfile(path, np.uint8) for path in sorted((work / "images").glob("*.jpg"))]
    for first in range(0, len(files), BATCH):
        built.run(encoded=files[first : first + BATCH])
        yield len(files[first : first + BATCH])


def webdataset(work: Path) -> Iterator[int]:
    import webdataset as wds

    data = wds.WebDataset(str(work / "train-000000.tar"), shardshuffle=False).shuffle(64).decode("pilrgb")
    return in_batches(tensor_of(sample["jpg"]) for sample in data)


def energon(work: Path) -> Iterator[int]:
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset

    alone = WorkerConfig(rank=0, world_size=1, num_workers=0)
    data = get_train_dataset(
        work / "energon", worker_config=alone, batch_size=BATCH, shuffle_buffer_size=64, max_samples_per_sequence=None,
        repeat=False,
    )  # fmt: skip
    for batch in get_loader(data):
        yield torch.stack([tensor_of(_as_image(image)) for image in batch.image]).shape[0]


def _as_image(pixels: torch.Tensor) -> Image.Image:
    if isinstance(pixels, Image.Image):
        return pixels
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def datasets(work: Path) -> Iterator[int]:
    from datasets import Dataset as Table
    from datasets import Image as Column

    paths = sorted((work / "images").glob("*.jpg"))
    rows = {"image": [{"bytes": p.read_bytes(), "path": None} for p in paths], "caption": ["x"] * len(paths)}
    parquet = work / "table.parquet"
    if not parquet.exists():
        Table.from_dict(rows).cast_column("image", Column()).to_parquet(parquet)
    table = Table.from_parquet(str(parquet), cache_dir=str(work / "hf")).shuffle(seed=0)
    return in_batches(tensor_of(row["image"]) for row in table)


def prepare_energon(work: Path) -> None:
    """What ``energon prepare`` asks a person, answered."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    folder = work / "energon"
    folder.mkdir()
    os.link(work / "train-000000.tar", folder / "train-000000.tar")
    BaseWebdatasetFactory.prepare_dataset(
        folder, ["train-000000.tar"], split_parts_ratio=[("train", 1.0)], tar_index_only=False, workers=1
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: CaptioningSample\n"
        "field_map:\n  image: jpg\n  caption: txt\n__module__: megatron.energon\n__class__: StandardWebdatasetFactory\n"
    )


READERS: dict[str, Callable[[Path], Iterator[int]]] = {
    "copy": copy, "records": records,
    "ours, pixel shards": lambda work: ours(work, "pixels", "pillow"),
    "ours, DALI": lambda work: ours(work, "encoded", "dali"),
    "ours, Pillow": lambda work: ours(work, "encoded", "pillow"),
    "DALI decodes, no more": decoder_alone, "webdataset": webdataset, "energon": energon, "datasets": datasets,
}  # fmt: skip


def measure(work: Path, name: str) -> dict[str, float]:
    """One pass in this process, after a first that opens files and starts decoders."""
    torch.set_num_threads(1)
    sum(READERS[name](work))
    cpu, wall = time.process_time(), time.monotonic()
    images = sum(READERS[name](work))
    return {"images": images, "cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall}


def share_of_raw(work: Path) -> dict[str, float]:
    """Raw read time over the time of records, in CPU seconds of one process: median, least and most of 11 pairs."""
    for side in (copy, records):
        sum(side(work))
    ratios = []
    for _ in range(11):
        used = []
        for side in (copy, records):
            began = time.process_time()
            count = sum(side(work))
            used.append(time.process_time() - began)
        ratios.append(used[0] / used[1])
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios), "records_a_pass": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/reading"))
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=[*READERS, "share"], help="one reader, in this process")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(share_of_raw(given.work) if given.only == "share" else measure(given.work, given.only)))
        return
    missing = [name for name, module in NEEDS.items() if not _installed(module)]
    if not given.work.exists():
        make(given.work, given.images)
        if "energon" not in missing:
            prepare_energon(given.work)
    best: dict[str, dict[str, float]] = {}
    for _ in range(given.turns):
        for name in (name for name in READERS if name not in missing):
            facts = _alone(given.work, name)
            if name not in best or facts["cpu_s"] < best[name]["cpu_s"]:
                best[name] = facts
    share = _alone(given.work, "share")
    print("records, share of the raw bandwidth: {median:.2f} ({least:.2f} to {most:.2f})".format(**share))
    for name, facts in best.items():
        print(f"{name:22s} {facts['images'] / facts['cpu_s']:10.0f} images per CPU second ({facts['images']} images)")
    for name in missing:
        print(f"{name:20s} is not installed: pip install {NEEDS[name].replace('.', '-')}")
    if given.out:
        given.out.write_text(json.dumps(best | {"share": share}, indent=1) + "\n")


def _alone(work: Path, name: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", str(work), "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return facts


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
