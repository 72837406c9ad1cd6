"""Compiling CUDA C++ sources with nvcc to a library with a plain C interface, loaded through ctypes.

No PyTorch headers are involved, so a source compiles wherever nvcc is, with a GPU or without, and in seconds. A library
is kept under a name made of its sources, its flags and the compiler, so a stale one is never loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import pathlib
import shutil
import subprocess
import tempfile

ARCHITECTURE = "-gencode=arch=compute_90a,code=sm_90a"
FLAGS = ("-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", "-Werror", "all-warnings")


def find() -> str | None:
    """Path of nvcc, or None."""
    return shutil.which("nvcc")


def compile_library(source: pathlib.Path, folder: pathlib.Path, *more_flags: str) -> pathlib.Path:
    """Compile ``source`` for sm_90a into ``folder``.

    Raises:
        RuntimeError: nvcc is missing or refuses the source; its message is included.
    """
    compiler = find()
    if compiler is None:
        raise RuntimeError(
            "nvcc is not on the PATH; install the CUDA toolkit (12.0 or later) or use implementation triton"
        )
    flags = (*FLAGS, ARCHITECTURE, *more_flags)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(" ".join((*flags, version)).encode())
    for part in sorted(source.parent.glob("*.cu*")):
        digest.update(part.read_bytes())
    library = folder / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = pathlib.Path(scratch) / library.name
            done = subprocess.run([compiler, *flags, str(source), "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc cannot compile {source.name}:\n{done.stderr.strip()}")
            made.replace(library)
    return library


@functools.cache
def load(source: pathlib.Path) -> ctypes.CDLL:
    """The compiled library, made on first use under the user's cache folder."""
    folder = pathlib.Path.home() / ".cache" / "medgpt_kernels"
    return ctypes.CDLL(str(compile_library(source, folder)))
