"""Files of a run folder, read with an error that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import WorkError


def read_json(path: Path, default: Any) -> Any:
    """JSON of a file, ``default`` where it is absent; WorkError where it is broken."""
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkError(f"{path} is not JSON ({error})") from None
