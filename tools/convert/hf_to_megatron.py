"""Published weights to one Megatron checkpoint, for Slurm jobs: the same as ``medgpt convert hf-to-megatron``.

python tools/convert/hf_to_megatron.py --language gpt-oss-20b --vision clip-vit-large-patch14-336 --out start
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_medgpt.config.errors import MedgptError
from megatron_medgpt.convert.command import hf_to_megatron


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language", type=Path, required=True, help="folder of a GPT-oss, LLaVA or InternVL model")
    parser.add_argument("--vision", type=Path, help="folder of a CLIP or SigLIP model")
    parser.add_argument("--new-vision", help="preset of an encoder with random weights instead")
    parser.add_argument("--projector", type=Path, help="folder of a projector that was exported alone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="same", help="same, bf16 or fp32")
    parser.add_argument("--feature-layer", type=int)
    parser.add_argument("--image-size-px", type=int)
    parser.add_argument("--pixel-shuffle", type=int, default=1)
    parser.add_argument("--projector-norm", action="store_true", help="a new projector gets a norm in front")
    parser.add_argument("--keep-packed", action="store_true", help="leave MXFP4 experts packed")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--num-threads", type=int, default=2)
    arguments = vars(parser.parse_args())
    return hf_to_megatron(arguments.pop("language"), arguments.pop("out"), **arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MedgptError as error:
        print(f"hf_to_megatron: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
