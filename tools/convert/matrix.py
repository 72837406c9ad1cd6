"""Layouts x dtypes x towers: a tiny model of every feature is imported, exported and verified by logits in each.

    python tools/convert/matrix.py [--layout single --layout tp2-ep2 ...] [--dtype fp32 ...] [--tower clip ...]

Prints the table of convert/README.md: the largest difference of a logit between transformers on the export and the
checkpoint's model in that layout, both in fp32 on the export's weights. Exit 1 when one lies outside its bound.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GptOssConfig,
    GptOssForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_medgpt.convert.hf_to_megatron import import_hf, plan_import
from megatron_medgpt.convert.megatron_to_hf import export_hf
from megatron_medgpt.convert.verify import verify
from megatron_medgpt.data.text import Tokenizer, train_tokenizer

LAYOUTS = ("single", "tp2-ep2", "ep2", "pp2", "pp2-vpp2")
DTYPES = ("fp32", "bf16", "mxfp4")
TOWERS = {"clip": (CLIPVisionConfig, CLIPVisionModel), "siglip": (SiglipVisionConfig, SiglipVisionModel)}


def published(folder: Path, tower: str, vocab_size: int) -> tuple[Path, Path]:
    """Random GPT-oss and tower folders, with weights large enough to be seen in the logits."""
    torch.manual_seed(0)
    language = GptOssConfig(
        num_hidden_layers=4, hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
        num_local_experts=8, num_experts_per_tok=2, intermediate_size=64, sliding_window=16, vocab_size=vocab_size,
        max_position_embeddings=2048, initializer_range=0.15,
    )  # fmt: skip
    GptOssForCausalLM(language).save_pretrained(folder / "language")
    kind, model = TOWERS[tower]
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    model(kind(**shape, image_size=56, patch_size=14)).save_pretrained(folder / "vision")
    return folder / "language", folder / "vision"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", action="append", help="one or several; all when not given")
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--tower", action="append", choices=TOWERS)
    arguments = parser.parse_args()
    layouts, passed = tuple(arguments.layout or LAYOUTS), True
    print("| tower | dtype | " + " | ".join(layouts) + " |\n" + "|---" * (2 + len(layouts)) + "|", flush=True)
    for tower in arguments.tower or TOWERS:
        with tempfile.TemporaryDirectory(prefix="medgpt-matrix-") as name:
            work = Path(name)
            train_tokenizer(["what is this?"], work / "tokenizer", 400)
            language, vision = published(work, tower, Tokenizer.load(work / "tokenizer").vocab_size)
            checkpoint = import_hf(plan_import(language, vision=vision), work / "checkpoint")
            for dtype in arguments.dtype or DTYPES:
                export_hf(checkpoint, work / dtype, tokenizer=work / "tokenizer", dtype=dtype)
                report = verify(checkpoint, work / dtype, layouts=layouts)
                passed = passed and report.passed
                found = [f"{c.max_difference:.1e}" + ("" if c.within_bound else " !") for c in report.comparisons]
                print(f"| {tower} | {dtype} | " + " | ".join(found) + " |", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
