"""Any damage to any file of a dataset: reading gives our own errors or a batch, in time; verify finds all of it.

MEDGPT_FUZZ_CASES=20000 runs the long form (make fuzz).
"""

import os
import random
import resource
import time

import pytest

from megatron_medgpt.config.errors import MedgptError
from megatron_medgpt.config.schema import BlendConfig
from megatron_medgpt.data.loader import open_stage
from megatron_medgpt.data.manifest import read_manifest, write_manifest
from megatron_medgpt.data.verify import verify
from megatron_medgpt.types import ImageSpec

CASES = int(os.environ.get("MEDGPT_FUZZ_CASES", "250"))
SPEC = ImageSpec(size_px=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), num_tokens=4)
LONGEST_S, LARGEST_GROWTH_MIB = 2.0, 256


def damaged(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """The content after one of the things that disks, networks and people do to files."""
    at = rng.randrange(len(content))
    few = rng.randrange(1, 9)
    return rng.choice(
        [
            lambda: content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :],
            lambda: content[:at] + rng.randbytes(few) + content[at + few :],
            lambda: content[:at] + b"\xff" * few + content[at + few :],
            lambda: content[:at],
            lambda: content + rng.randbytes(few),
            lambda: content[:at] + content[at + few :],
            lambda: content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :],
            lambda: rng.choice(others),
            lambda: b"",
        ]
    )()


def read_everything(folder):
    stage = open_stage(
        [BlendConfig(path=str(folder))], tokenizer_fingerprint=None, image=SPEC, sequence_length=96, seed=0,
        reader="pillow", drop_over_long=True,
    )  # fmt: skip
    for row in range(min(stage.num_rows_per_epoch, 8)):
        stage.take(row, 1)


@pytest.mark.timeout(max(1200, CASES))
def test_any_damage_is_a_typed_error_or_a_batch_and_verify_finds_all_of_it(write_dataset, tokenizer):
    folder = write_dataset(num_samples=6, per_shard=3)
    (folder / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
    (folder / "rejects.jsonl").write_text('{"record": 7, "reason": "empty-file"}\n')
    manifest = read_manifest(folder)[0]
    write_manifest(
        folder, manifest.shards, tokenizer=manifest.tokenizer, store=manifest.store, num_records=7,
        rejects={"empty-file": 1}, provenance={},
    )  # fmt: skip
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    read_everything(folder)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"read": 0, "refused": 0}
    for case in range(CASES):
        rng = random.Random(case)
        path = rng.choice(list(files))
        content = damaged(rng, files[path], list(files.values()))
        path.write_bytes(content)
        began = time.process_time()
        try:
            read_everything(folder)
            outcomes["read"] += 1
        except MedgptError:
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"case {case}: {path.name}: {type(error).__name__}: {error}") from error
        assert time.process_time() - began < LONGEST_S, case
        try:
            faults = list(verify(folder))
        except MedgptError as error:
            faults = [str(error)]
        assert bool(faults) == (content != files[path]), f"case {case}: {path.name}"
        path.write_bytes(files[path])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    assert grown < LARGEST_GROWTH_MIB
    assert min(outcomes.values()) > 0
    assert list(verify(folder)) == []
