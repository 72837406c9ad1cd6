"""Train a small byte-level BPE tokenizer with GPT-oss's control tokens on the texts of some tables.

    python tools/data/train_tokenizer.py captions.jsonl dialogues.json --out tokenizer --vocab-size 512

Every string of a JSON or JSONL file counts as text, except under the keys that name images or ids. For the public
GPT-oss weights take their own tokenizer.json instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import MedgptError, UsageError
from megatron_medgpt.data.text import train_tokenizer

NO_TEXT = ("image", "images", "id", "from", "role", "modality")


def strings(value: Any) -> Iterator[str]:
    """Every text inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in NO_TEXT:
                yield from strings(item)


def texts(path: Path) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            yield from strings(json.loads(content))
        else:
            for line in filter(str.strip, content.splitlines()):
                yield from strings(json.loads(line))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", type=Path, help="JSON or JSONL files")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=512)
    given = parser.parse_args()
    made = train_tokenizer((text for path in given.tables for text in texts(path)), given.out, given.vocab_size)
    print(f"{given.out}: {made.vocab_size} tokens")


if __name__ == "__main__":
    try:
        main()
    except MedgptError as error:
        print(f"train_tokenizer: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
