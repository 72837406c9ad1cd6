"""Compiling CUDA C++ sources with nvcc to a library with a plain C interface, loaded through ctypes.

No PyTorch headers are involved, so a source compiles wherever nvcc is, with a GPU or without, and in seconds. A library
is kept under a name made of its sources, its flags and the compiler, so a stale one is never loaded. An image compiles
its libraries when it is built (``build_all``); elsewhere each is compiled on first use.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import pathlib
import shutil
import subprocess
import tempfile

ARCHITECTURES = ("90a", "100a")
"""One library holds the code of each of these that the compiler knows (100a: nvcc 12.8 and later)."""
BUILT = "built"
"""Folder beside a source for the library that was compiled when an image was built."""
FLAGS = ("-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", "-Werror", "all-warnings")


def find() -> str | None:
    """Path of nvcc: of the toolkit on the PATH, else of NVIDIA's wheels (nvidia-cuda-nvcc with nvidia-cuda-cccl), or
    None."""
    on_path = shutil.which("nvcc")
    if on_path is not None:
        return on_path
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package is not None else None
    found = sorted(str(path) for folder in folders or () for path in pathlib.Path(folder).glob("cu*/bin/nvcc"))
    return found[-1] if found else None


def architectures(compiler: str) -> tuple[str, ...]:
    """Those of ``ARCHITECTURES`` that a compiler knows."""
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(name for name in ARCHITECTURES if f"compute_{name.rstrip('a')}" in known)


def _call(source: pathlib.Path, more_flags: tuple[str, ...]) -> tuple[list[str], str]:
    """The compiler with its flags, and the name of the library that it makes of ``source``."""
    compiler = find()
    if compiler is None:
        raise RuntimeError(
            "nvcc is not on the PATH; install the CUDA toolkit (12.0 or later), or its wheels with pip install "
            "nvidia-cuda-nvcc nvidia-cuda-cccl, or use implementation triton"
        )
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures(compiler)]
    flags = [*FLAGS, *code, *more_flags]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(" ".join((*flags, version)).encode())
    for part in sorted(source.parent.glob("*.cu*")):
        digest.update(part.read_bytes())
    return [compiler, *flags], f"{source.stem}-{digest.hexdigest()[:16]}.so"


def compile_library(source: pathlib.Path, folder: pathlib.Path, *more_flags: str) -> pathlib.Path:
    """Compile ``source`` for ``ARCHITECTURES`` into ``folder``.

    Raises:
        RuntimeError: nvcc is missing or refuses the source; its message is included.
    """
    command, name = _call(source, more_flags)
    library = folder / name
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = pathlib.Path(scratch) / library.name
            done = subprocess.run([*command, str(source), "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc cannot compile {source.name}:\n{done.stderr.strip()}")
            made.replace(library)
    return library


@functools.cache
def load(source: pathlib.Path) -> ctypes.CDLL:
    """The compiled library: the image's own, or made on first use under the user's cache folder."""
    folder = source.parent / BUILT
    if not (folder / _call(source, ())[1]).is_file():
        folder = pathlib.Path.home() / ".cache" / "medgpt_kernels"
    return ctypes.CDLL(str(compile_library(source, folder)))


def build_all() -> list[pathlib.Path]:
    """Compile every CUDA source of the package beside itself, for an image whose code is read-only."""
    sources = sorted(pathlib.Path(__file__).parent.glob("*/cuda/*.cu"))
    return [compile_library(source, source.parent / BUILT) for source in sources]
