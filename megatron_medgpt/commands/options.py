"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option("--out", help="Where the result is written.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
