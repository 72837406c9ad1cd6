"""The house keeps its own rules: nothing of one machine, no unfinished corners, every room explained."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_function_is_longer_than_a_screen_and_a_half():
    import ast

    long = []
    for path in tracked("megatron_medgpt/*.py", "kernels/medgpt_kernels/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.body[0].lineno + 1
                if length > 100:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {length}")
    assert not long, long


def test_errors_are_not_swallowed():
    swallowed = re.compile(r"except[^\n]*:\s*\n\s+pass\b")
    found = [str(p.relative_to(ROOT)) for p in tracked("*.py") if swallowed.search(p.read_text(encoding="utf-8"))]
    assert not [name for name in found if not name.startswith("tests/house")], found


def test_every_relative_link_of_the_documentation_leads_somewhere():
    link = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")
    dead = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in tracked("*.md")
        for target in link.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not dead, dead


def test_every_command_of_the_readme_exists():
    from megatron_medgpt.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    used = set(re.findall(r"^medgpt ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert used and used <= known, used - known
