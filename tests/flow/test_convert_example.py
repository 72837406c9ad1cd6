"""The import, train, export example, as a reader gives it."""

from __future__ import annotations

from tests.example_scripts import run_example


def test_the_example_goes_from_public_weights_to_an_answer_of_transformers(tmp_path):
    lines = run_example("02_import_train_export", tmp_path / "work").splitlines()
    assert "equal" in lines
    # The weights are random, and so may be the answer's lines.
    assert any(line.startswith("answer:") for line in lines)
