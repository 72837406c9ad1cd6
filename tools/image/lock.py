"""Write tools/image/requirements-PYTHON-MACHINE.lock: what the image installs, at one version, with hashes.

    python tools/image/lock.py [--pip-args "--find-links /wheels"]

Resolved by pip for the Python and platform that run this, within setup.py's bounds and constraints.txt. What NVIDIA's
images bring (torch, triton, ...) is left out: their builds are on no index, and the image's digest pins them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from install import lock_file, wanted

LEFT_OUT = ("torch", "torchvision", "triton")


def locked(report: dict) -> list[str]:
    """One requirement per line, hashes included, sorted by name."""
    lines = []
    for item in report["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name.lower() in LEFT_OUT or name.lower().startswith(("nvidia-", "cuda-")):
            continue
        digests = item["download_info"]["archive_info"].get("hashes", {})
        lines.append(f"{name}=={version} --hash=sha256:{digests['sha256']}")
    return sorted(lines, key=str.lower)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=lock_file())
    parser.add_argument("--pip-args", default="")
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [
            sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report",
            report.name, "-c", "constraints.txt", *shlex.split(options.pip_args), *wanted(),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        lines = locked(json.loads(Path(report.name).read_text(encoding="utf-8")))
    version = ".".join(map(str, sys.version_info[:2]))
    head = f"# Python {version}, {sys.platform}. Written by tools/image/lock.py; do not edit.\n"
    options.out.write_text(head + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{options.out}: {len(lines)} distributions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
