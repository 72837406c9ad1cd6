"""Evaluation files made ready for the page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import WorkError
from megatron_medgpt.observe.report import charts

PUBLISHED = Path(__file__).with_name("published.json")
"""Figures of others, by task and protocol; shown only beside the same task under the same protocol."""

PROTOCOL_NAMES = {
    "official-qa": "OmniMedVQA question-answering score: the option most similar to the written answer",
    "official-prefix": "OmniMedVQA prefix score: the option with the lowest mean cross-entropy after the question",
    "letter": "Letter protocol (MedEvalKit): lettered options, the letter is read from the answer",
    "short-answer": "Short answers: exact match, token F1",
    "report": "Written reports: BLEU and ROUGE count shared words and say nothing about clinical correctness",
    "chat-likelihood": "The option with the lowest mean cross-entropy as the assistant's answer",
}
CONTROL_NAMES = {
    "blank_image": "Blank image", "shuffled_image": "Shuffled image", "text_only": "No image",
}  # fmt: skip


WITHOUT = {
    "blank_image": "with a blank image", "shuffled_image": "with another question's image",
    "text_only": "with no image",
}  # fmt: skip
MODALITY_NAMES = {
    "CT(Computed Tomography)": "CT", "MR (Mag-netic Resonance Imaging)": "MR", "ultrasound": "Ultrasound",
    "OCT (Optical Coherence Tomography": "OCT",
}  # fmt: skip
"""How the page writes OmniMedVQA's modalities, which its files spell in these ways."""


def control_name(control: str) -> str:
    return CONTROL_NAMES.get(control, control.replace("_", " "))


def modality_name(modality: str) -> str:
    return MODALITY_NAMES.get(modality, modality)


def answerer(result: Mapping[str, Any]) -> str:
    """Who gave the answers: the run's own model, an exported folder, a server's model, or a file of answers."""
    if "predictions" in result:
        return Path(result["predictions"].get("file", "recorded answers")).stem
    engine = result.get("engine", "")
    if engine.startswith("endpoint ") and " model " in engine:
        return engine.split(" model ", 1)[1]
    return engine.partition("@")[0] if engine.startswith("transformers ") else "This model"


def _said_by(result: Mapping[str, Any]) -> str:
    if "predictions" in result:
        return f"Answers of {answerer(result)}"
    return f"Answered by {result['engine']}" if result.get("engine") else ""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The evaluation files of a folder in name order, files of recorded answers last and those with controls first;
    other JSON files are left alone."""
    results = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WorkError(f"{path} is not JSON ({error})") from None
        if isinstance(content, dict) and {"task", "protocol", "accuracy", "ci95", "n"} <= content.keys():
            results.append(content | {"file": path.name})
    return sorted(results, key=lambda result: ("predictions" in result, not result.get("controls")))


def headline(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What a reader should know first: the first evaluation's figure, and whether its answers come from the picture.

    They are said to where the interval of every control lies below the interval of the figure.
    """
    if not results or "text" in results[0]:
        return None
    main = results[0]
    low, high = main["ci95"]
    intervals = main.get("controls_ci95") or {}
    controls = main.get("controls") or {}
    said = ", ".join(f"{WITHOUT.get(name, control_name(name))} {value:.1%}" for name, value in controls.items())
    name = answerer(main)
    note = "" if name == "This model" else f"Answers of {name}. "
    note += f"{main['task']}, {main['protocol']} protocol; 95% interval {low:.1%} to {high:.1%}"
    if main.get("chance"):
        note += f"; guessing gives {main['chance']:.1%}"
    from_picture = bool(controls) and all(
        intervals.get(name, [value, value])[1] < low for name, value in controls.items()
    )
    if not controls:
        finding = "Measured without controls: how much of this comes from the picture is not known."
    elif from_picture:
        finding = f"The answers come from the picture: {said}."
    else:
        finding = f"It is not shown that the answers come from the picture: {said}."
    return {
        "figure": f"{main['accuracy']:.1%}", "what": f"of {main['n']:,} questions right", "finding": finding,
        "doubt": not from_picture, "note": note,
    }  # fmt: skip


def views(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Everything that the page shows of the evaluations; those of one set and protocol are told apart by their file."""
    names = [f"{result['task']}, {result['protocol']}" for result in results]
    shown = []
    for name, result in zip(names, results):
        file = Path(result["file"]).stem if names.count(name) > 1 else ""
        shown.append(view(result) | {"file": file, "label": f"{name} ({file})" if file else name})
    return shown


def view(result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the page shows of one evaluation."""
    name = answerer(result)
    bars = [(name, result["accuracy"], result["ci95"], "ours")]
    intervals = result.get("controls_ci95", {})
    for control, accuracy in result.get("controls", {}).items():
        bars.append((control_name(control), accuracy, intervals.get(control), "control"))
    published = _published(result, name)
    counts = {
        "without an answer (wrong)": result.get("failed"),
        "read by similarity only": result.get("unparsed"), "cut at the token limit": result.get("truncated"),
        **{f"no answer: {reason}": n for reason, n in (result.get("failed_reasons") or {}).items()},
        **{f"problem: {kind.replace('_', ' ')}": n for kind, n in (result.get("problems") or {}).items()},
    }  # fmt: skip
    return {
        "id": f"result-{Path(result['file']).stem.replace(' ', '-')}",
        "task": result["task"],
        "protocol": result["protocol"],
        "protocol_name": PROTOCOL_NAMES.get(result["protocol"], ""),
        "measure": "exact matches" if "text" in result else "accuracy",
        "accuracy": result["accuracy"],
        "ci95": result["ci95"],
        "notes": result.get("notes") or [],
        "words": _word_figures(result),
        "macro": result.get("macro_by_modality"),
        "by": _said_by(result),
        "paired": _paired(result, name),
        "chart": charts.interval_chart(bars, result.get("chance")),
        "right": "" if result.get("correct") is None else f"{result['correct']:,} of {result['n']:,}",
        "counts": {name: count for name, count in counts.items() if count is not None},
        "table": _table(result),
        "published": published,
    }


def _paired(result: Mapping[str, Any], name: str) -> str:
    """The paired test against another evaluation in words; nothing where none was made."""
    paired = result.get("paired")
    if not paired:
        return ""
    better, p_value = paired["difference"] > 0, paired["p_value"]
    finding = "no difference is shown" if p_value >= 0.05 else f"{name if better else 'the other'} is better"
    return (
        f"Against {Path(paired['against']).stem} on the same {paired['n']:,} questions: "
        f"{100 * paired['difference']:+.1f} points; right here alone {paired['only_second']:,}, there alone "
        f"{paired['only_first']:,}: {finding} (p = {p_value:.2g}, McNemar's exact test)"
    )


def side_by_side(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """All evaluations in one table, so that protocols and controls can be compared; None for fewer than two."""
    if len(results) < 2:
        return None
    controls = list(dict.fromkeys(name for result in results for name in result.get("controls") or {}))
    same = Counter((result["task"], result["protocol"]) for result in results)
    rows = [
        {
            "task": result["task"], "protocol": result["protocol"], "n": result["n"], "accuracy": result["accuracy"],
            "file": Path(result["file"]).stem if same[result["task"], result["protocol"]] > 1 else "",
            "ci95": result["ci95"], "chance": result.get("chance"), "failed": result.get("failed"),
            "unparsed": result.get("unparsed"), "name": answerer(result),
            "controls": [(result.get("controls") or {}).get(name) for name in controls],
        }
        for result in sorted(results, key=lambda result: (result["task"], result["protocol"], result["file"]))
    ]  # fmt: skip
    return {"controls": [control_name(name) for name in controls], "rows": rows}


def _word_figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Figures of texts by the name the page gives them."""
    names = {"token_f1": "token F1", "token_recall": "token recall"}
    found = {name: result[key] for key, name in names.items() if key in result}
    text = result.get("text") or {}
    names = {"bleu1": "BLEU-1", "bleu4": "BLEU-4", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    return found | {name: text[key] for key, name in names.items() if key in text}


def _table(result: Mapping[str, Any]) -> dict[str, Any]:
    """Modality by question type; each cell is (accuracy, right, n) or None."""
    cells = result.get("by_modality_and_question_type") or {}
    kinds = sorted(result.get("by_question_type") or {})
    rows = []
    for modality, total in (result.get("by_modality") or {}).items():
        own = cells.get(modality, {})
        rows.append({"name": modality_name(modality), "cells": [own.get(kind) for kind in kinds], "total": total})
    return {
        "kinds": kinds,
        "rows": rows,
        "totals": [result["by_question_type"][kind] for kind in kinds],
        "all": {"accuracy": result["accuracy"], "n": result["n"], "correct": result.get("correct")},
    }


def _published(result: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Others' figures for the same task and protocol, with this one in its place among them."""
    known = json.loads(PUBLISHED.read_text(encoding="utf-8")).get(result["task"], {}).get(result["protocol"])
    if known is None:
        return None
    own = {"model": name, "accuracy": result["accuracy"], "source": "this run", "own": True}
    entries = sorted([*known["entries"], own], key=lambda entry: -entry["accuracy"])
    whole = known.get("questions")
    caution = ""
    if whole is None:
        caution = f"On how many questions is not stated there; this run was asked {result['n']:,}."
    elif whole != result["n"]:
        caution = f"They were measured on {whole:,} questions, this run on {result['n']:,}: not the same measurement."
    return {"note": known["note"], "entries": entries, "caution": caution}
