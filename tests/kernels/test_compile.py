"""Triton kernels become machine code for Hopper, on the tensor cores, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "kernels" / "compile.py"


def test_expert_products_of_every_format_compile_to_hopper_matrix_instructions(tmp_path):
    """The smallest of the product kernels, in every weight format and through pointers and descriptors;
    ``kernels/compile.py`` does all of them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "--only", "rows_kernel", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-1500:]
    made = [row for row in json.loads((tmp_path / "out.json").read_text()) if row["kernel"] == "rows_kernel"]
    kinds = {(row["by"], row["options"]["num_stages"], row["options"]["KIND"]) for row in made}
    ways = (("triton", 3), ("persistent", 3), ("persistent", 4))
    assert kinds == {(*way, kind) for way in ways for kind in ("plain", "fp8", "mxfp4")}
    assert all(row["wgmma"] and not row["mma"] and row["fits"] and not row["stack_bytes"] for row in made)
    assert all((row["tma"] > 0) == (row["by"] == "persistent") for row in made)
