"""Is a Hugging Face folder the model of a checkpoint? For Slurm jobs: the same as ``medgpt convert verify``.

python tools/convert/verify.py --checkpoint runs/a --hf export --layout single --layout tp2-ep2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_medgpt.config.errors import MedgptError
from megatron_medgpt.convert.command import verify


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--layout", action="append", default=[], help="e.g. single, tp2-ep2, pp2-vpp2; several times")
    parser.add_argument("--no-logits", action="store_true", help="tensors and configuration only")
    parser.add_argument("--vision", type=Path, help="also compare the tower with this published one")
    parser.add_argument("--num-threads", type=int, default=2)
    arguments = parser.parse_args()
    return verify(
        arguments.checkpoint, arguments.hf, layouts=arguments.layout, logits=not arguments.no_logits,
        vision=arguments.vision, num_threads=arguments.num_threads,
    )  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MedgptError as error:
        print(f"verify: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
