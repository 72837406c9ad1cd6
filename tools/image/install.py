"""Install Megatron-MedGPT into an image without touching what the base image brought. Standard library only.

    install.py dependencies         what setup.py names and the base lacks, at the versions of constraints.txt
    install.py package              the package itself, without dependencies
    install.py kernels              CUDA kernels, where there is nvcc and something to build
    install.py bill-of-materials    every Python distribution and system package, as CycloneDX JSON

The NGC image pins its own packages through PIP_CONSTRAINT; torch, TransformerEngine, apex, triton and DALI of NVIDIA's
builds must stay. So what is installed already is left as it is, and pip gets the base's versions as constraints.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from pathlib import Path
from urllib.parse import quote

KEPT = ("torch", "torchvision", "triton", "pytorch-triton", "transformer-engine", "transformer_engine", "apex", "numpy",
        "nvidia-dali-cuda130", "nvidia-dali-cuda120", "flash-attn")  # fmt: skip
"""Never replaced where the base has them."""
TOLD = ("torch", "transformer-engine", "apex", "nvidia-dali-cuda130", "triton")


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def wanted() -> list[str]:
    """The CORE list of setup.py, read without running it."""
    tree = ast.parse(Path("setup.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CORE":
            return ast.literal_eval(node.value)
    raise SystemExit("install: setup.py has no list CORE")


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0]


def install_dependencies(pip_args: list[str]) -> None:
    """From the lock with hashes where there is one for this Python and machine, else within constraints.txt."""
    for name in TOLD:
        print(f"base image: {name} {installed(name) or 'absent'}", flush=True)
    before = {name: installed(name) for name in KEPT}
    lock = lock_file()
    text = lock.read_text(encoding="utf-8") if lock.is_file() else None
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        if text is None:
            print(f"no {lock.name}: versions of constraints.txt, without hashes")
            listed.write(base_constraints(Path("constraints.txt").read_text(encoding="utf-8")))
            listed.flush()
            # The base's own constraints name exact local builds that no index has; ours repeat those that matter.
            needed = [r for r in wanted() if not (name_of(r) in KEPT and installed(name_of(r)))]
            pip(["install", *needed, *pip_args], {**os.environ, "PIP_CONSTRAINT": listed.name})
        else:
            listed.write("\n".join(missing_of(text)) + "\n")
            listed.flush()
            environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
            pip(["install", "--no-deps", "--require-hashes", "-r", listed.name, *pip_args], environment)
    changed = [name for name in KEPT if before[name] not in (None, installed(name))]
    if changed:
        raise SystemExit(f"install: pip replaced {', '.join(changed)} of the base image")


def lock_file() -> Path:
    """The lock of this Python and machine; tools/image/lock.py writes it."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return Path("tools/image") / f"requirements-{python}-{platform.machine()}.lock"


def missing_of(lock: str) -> list[str]:
    """Lines of the lock that the base has not, or has outside setup.py's bounds."""
    from pip._vendor.packaging.requirements import Requirement  # Python's own library cannot compare versions

    bounds = {name_of(r).lower(): Requirement(r).specifier for r in wanted()}
    lines = []
    for line in lock.splitlines():
        name = name_of(line)
        if not line or line.startswith("#") or (name in KEPT and installed(name)):
            continue
        version = installed(name)
        if version is None or not bounds.get(name.lower(), Requirement(name).specifier).contains(
            version, prereleases=True
        ):
            lines.append(line)
    return lines


def base_constraints(locked: str) -> str:
    """Our versions, but for what the base has already: those at the base's version."""
    lines = []
    for line in locked.splitlines():
        name = name_of(line.strip())
        if name and not name.startswith("#") and not installed(name):
            lines.append(line)
    lines += [f"{name}=={version}" for name in KEPT if (version := installed(name))]
    return "\n".join(lines) + "\n"


def install_package(pip_args: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    pip(["install", "--no-deps", "--no-build-isolation", ".", *pip_args], environment)


def pip(arguments: list[str], environment: dict[str, str]) -> None:
    outside = [] if not externally_managed() else ["--break-system-packages"]
    command = [sys.executable, "-m", "pip", *arguments[:1], "--no-cache-dir", *outside, *arguments[1:]]
    print("+", shlex.join(command), flush=True)
    subprocess.run(command, check=True, env=environment)


def externally_managed() -> bool:
    """Debian's and Ubuntu's own Python refuses pip (PEP 668); in an image it is the only one."""
    return (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").exists()


def build_kernels() -> None:
    """Compile the CUDA sources of the installed package, where there is nvcc, into the package itself."""
    from medgpt_kernels import nvcc  # installed by the step before; needs no torch

    compiler = nvcc.find()
    if compiler is None:
        print("kernels: no nvcc in this image; CUDA sources are not compiled, Triton serves instead")
        return
    for library in nvcc.build_all():
        print(f"kernels: {library} for sm_{', sm_'.join(nvcc.architectures(compiler))}")


def bill_of_materials() -> dict:
    """CycloneDX 1.5: every Python distribution and, where dpkg knows them, every system package."""
    system = _os_release()
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "component": {"type": "container", "name": "medgpt", "version": installed("megatron-medgpt") or "unknown"},
            "properties": [
                {"name": "medgpt:system", "value": system.get("PRETTY_NAME", "unknown")},
                {"name": "medgpt:python", "value": platform.python_version()},
            ],
        },
        "components": [*_distributions(), *_system_packages(system.get("ID", "debian"))],
    }


def _distributions() -> list[dict]:
    found = {d.metadata["Name"]: d for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return [
        _component(f"pkg:pypi/{quote(name.lower())}@{quote(d.version)}", name, d.version, _licence(d))
        for name, d in sorted(found.items(), key=lambda item: item[0].lower())
    ]


def _component(purl: str, name: str, version: str, licence: dict | None = None) -> dict:
    found = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    return found if licence is None else {**found, "licenses": [licence]}


def _licence(d: importlib.metadata.Distribution) -> dict:
    """The SPDX expression where there is one; some packages put the whole text into License, so its first line."""
    if expression := d.metadata.get("License-Expression"):
        return {"expression": expression}
    lines = (d.metadata.get("License") or "").strip().splitlines() or ["unknown"]
    return {"license": {"name": lines[0]}}


def _os_release() -> dict[str, str]:
    file = Path("/etc/os-release")
    pairs = [line.partition("=") for line in file.read_text().splitlines()] if file.is_file() else []
    return {name: value.strip('"') for name, _, value in pairs}


def _system_packages(system: str) -> list[dict]:
    if shutil.which("dpkg-query") is None:
        return []
    listed = ["dpkg-query", "--show", "--showformat=${Package}\t${Version}\t${Architecture}\n"]
    shown = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    rows = [line.split("\t") for line in shown.splitlines()]
    return [
        _component(f"pkg:deb/{system}/{name}@{quote(version)}?arch={architecture}", name, version)
        for name, version, architecture in rows
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("dependencies", "package", "kernels", "bill-of-materials"))
    parser.add_argument("--pip-args", default="", help="passed to pip, e.g. another index")
    parser.add_argument("--out", type=Path, default=Path("bill-of-materials.json"))
    options = parser.parse_args()
    if options.action == "dependencies":
        install_dependencies(shlex.split(options.pip_args))
    elif options.action == "package":
        install_package(shlex.split(options.pip_args))
    elif options.action == "kernels":
        build_kernels()
    else:
        bill = bill_of_materials()
        options.out.write_text(json.dumps(bill, indent=1) + "\n", encoding="utf-8")
        print(f"bill of materials: {len(bill['components'])} Python and system packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
