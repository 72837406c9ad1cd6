"""A Megatron checkpoint to a Hugging Face folder, for Slurm jobs: the same as ``medgpt convert megatron-to-hf``.

python tools/convert/megatron_to_hf.py --checkpoint runs/a --out export --dtype mxfp4
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_medgpt.config.errors import MedgptError
from megatron_medgpt.convert.command import megatron_to_hf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or a run (its newest one)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="bf16", help="bf16, fp32 or mxfp4")
    parser.add_argument("--part", default="whole", help="whole, language or projector")
    parser.add_argument("--tokenizer", type=Path, help="folder of tokenizer.json; the run's own when not given")
    parser.add_argument("--scale-rule", default="up", help="up, floor, even or ceil")
    parser.add_argument("--original", type=Path, help="published MXFP4 model whose untouched experts keep their bytes")
    parser.add_argument("--evaluation", type=Path, action="append", default=[], help="of medgpt eval, for the card")
    parser.add_argument("--num-threads", type=int, default=2)
    arguments = vars(parser.parse_args())
    return megatron_to_hf(arguments.pop("checkpoint"), arguments.pop("out"), **arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MedgptError as error:
        print(f"megatron_to_hf: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
