"""What the image's installer leaves alone. The build itself is run by ``make image-test``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "image"))

import install  # noqa: E402  (a program, not a package)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def base_with(monkeypatch, **versions: str) -> None:
    monkeypatch.setattr(install, "installed", lambda name: versions.get(name.replace("-", "_")))


def test_the_lists_of_setup_py_are_read_without_running_it():
    assert any(r.startswith("megatron-core>=") for r in install.wanted())


def test_a_lock_installs_what_the_base_lacks_and_nothing_that_nvidia_ships(monkeypatch):
    base_with(monkeypatch, torch="2.14.0a0+nv26.06", numpy="1.26.4", rich="13.0")
    lock = "numpy==2.4.6 --hash=sha256:a\nrich==15.0.0 --hash=sha256:b\nmegatron-core==0.19.2 --hash=sha256:c\n"
    assert install.missing_of(lock) == ["megatron-core==0.19.2 --hash=sha256:c"]


def test_a_version_of_the_base_that_is_too_old_is_replaced(monkeypatch):
    base_with(monkeypatch, pillow="11.0.0")
    line = "pillow==13.0.0 --hash=sha256:a"
    assert install.missing_of(line + "\n") == [line]


def test_without_a_lock_the_base_keeps_its_versions(monkeypatch):
    base_with(monkeypatch, torch="2.14.0a0+nv26.06", rich="13.0")
    constraints = install.base_constraints("rich==15.0.0\ntyper==0.29.2\n").splitlines()
    assert constraints == ["typer==0.29.2", "torch==2.14.0a0+nv26.06"]


@pytest.mark.parametrize("lock", sorted(p.name for p in (ROOT / "tools/image").glob("requirements-*.lock")))
def test_every_line_of_a_lock_has_a_hash_and_torch_is_left_to_the_base(lock):
    lines = [line for line in (ROOT / "tools/image" / lock).read_text().splitlines() if not line.startswith("#")]
    assert all(" --hash=sha256:" in line for line in lines)
    names = {install.name_of(line).lower() for line in lines}
    assert {"megatron-core", "numpy", "transformers"} <= names
    assert not names & {"torch", "triton"}


@pytest.mark.parametrize("lock", sorted(p.name for p in (ROOT / "tools/image").glob("requirements-*.lock")))
def test_a_lock_holds_every_dependency_of_setup_py(lock):
    lines = (ROOT / "tools/image" / lock).read_text().splitlines()
    names = {install.name_of(line).lower() for line in lines if not line.startswith("#")}
    missing = {install.name_of(requirement).lower() for requirement in install.wanted()} - names - {"torch"}
    assert not missing, "run: make lock"


def test_the_bill_of_materials_lists_every_distribution_and_system_package_once():
    bill = install.bill_of_materials()
    components = bill["components"]
    assert {"torch", "megatron-core"} <= {c["name"] for c in components if c["purl"].startswith("pkg:pypi/")}
    if shutil.which("dpkg-query"):
        assert any(c["purl"].startswith("pkg:deb/") and c["name"] == "libc6" for c in components)
    assert all(c["version"] and c["purl"].startswith(("pkg:pypi/", "pkg:deb/")) for c in components)
    references = [c["bom-ref"] for c in components]
    assert len(set(references)) == len(references), "CycloneDX wants them unique"


def test_data_runs_and_environments_do_not_enter_the_image():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        word
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for word in line.split()[1:-1]
    ]
    assert {word.split("/")[0] for word in copied} == set(allowed)
