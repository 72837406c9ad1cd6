"""The whole way on phantoms, on this machine: images, ingest, two stages in two layouts, evaluation, export, report.

Every part is the one that users run: the demo only calls them in order and says what they found.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.config.load import to_yaml
from megatron_medgpt.config.schema import BlendConfig, RunConfig
from megatron_medgpt.parallel.launch import run_ranks
from megatron_medgpt.recipes import recipe

MARK = ".medgpt-demo"
"""Marks a folder that an earlier demo made and this one may replace."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    num_train: int
    num_validation: int
    num_test: int


FULL = Sizes(num_train=4000, num_validation=160, num_test=384)
QUICK = Sizes(num_train=96, num_validation=16, num_test=64)


PROTOCOLS = ("chat-likelihood", "official-qa", "official-prefix", "letter")
"""The first is how the demo's model was taught to answer; the others are OmniMedVQA's published ones, in whose forms it
has never seen a question."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where the phantoms, their datasets and their questions lie."""

    tokenizer: Path
    captions: Path
    dialogues: Path
    validation_captions: Path
    validation_dialogues: Path
    questions: Path


def run_demo(out: Path, *, num_ranks: int = 2, quick: bool = False) -> dict[str, Any]:
    """Run the demo in ``out`` and return what ``out/summary.json`` holds.

    Raises:
        UsageError: ``out`` holds something else than an earlier demo, or the ranks cannot carry the layouts.
        WorkError: a part failed.
    """
    if num_ranks not in (2, 4):
        raise UsageError(f"--nproc {num_ranks}; the demo's layouts are made for 2 or 4 ranks")
    started = time.perf_counter()
    _prepare_folder(out)
    study = _say("phantoms and datasets", lambda: make_study(out, QUICK if quick else FULL))
    config = demo_config(out, study, quick=quick)
    run_file = out / "run.yaml"
    run_file.write_text(to_yaml(config), encoding="utf-8")
    _say("training", lambda: _train(run_file, num_ranks, Path(config.out)))
    results = out / "run" / "eval" / "phantoms.json"
    _say("evaluation", lambda: _command(_evaluation(study, out / "run", results), 2))
    result_file = results.with_name(f"phantoms.{PROTOCOLS[0]}.json")
    result = json.loads(result_file.read_text(encoding="utf-8"))
    export = _say("export, and the same questions to transformers", lambda: _export(out, study, result_file))
    summary = {
        "seconds": round(time.perf_counter() - started, 1),
        "layouts": _layouts(config, num_ranks),
        "n": result["n"],
        "accuracy": result["accuracy"],
        "ci95": result["ci95"],
        "controls": result["controls"],
        "by_question_type": result["by_question_type"],
        "by_modality": result["by_modality"],
        "protocols": {
            protocol: json.loads(results.with_name(f"phantoms.{protocol}.json").read_text(encoding="utf-8"))["accuracy"]
            for protocol in PROTOCOLS
        },
        "export": export,
    }
    _write_summary(out, summary)
    _say_what_was_learned(out, summary, quick)
    return summary


def make_study(out: Path, sizes: Sizes) -> Study:
    """Phantoms as files, a tokenizer for their texts, and three datasets made by ``medgpt ingest``."""
    from megatron_medgpt.data.text import train_tokenizer
    from megatron_medgpt.ingest.command import run_ingest
    from megatron_medgpt.ingest.phantom_study import make_phantoms

    files = make_phantoms(
        out / "phantoms", num_train=sizes.num_train, num_validation=sizes.num_validation, num_test=sizes.num_test
    )
    study = Study(
        tokenizer=out / "tokenizer", captions=out / "data" / "captions", dialogues=out / "data" / "dialogues",
        validation_captions=out / "data" / "validation-captions",
        validation_dialogues=out / "data" / "validation-dialogues", questions=files.questions,
    )  # fmt: skip
    train_tokenizer(_texts(files.train_captions, files.train_dialogues), study.tokenizer, vocab_size=512)
    key = out / "identity.key"
    key.write_text(secrets.token_hex(32), encoding="ascii")
    key.chmod(0o600)
    for table, dataset in (
        (files.train_captions, study.captions),
        (files.train_dialogues, study.dialogues),
        (files.validation_captions, study.validation_captions),
        (files.validation_dialogues, study.validation_dialogues),
    ):
        run_ingest([table], out=dataset, tokenizer=study.tokenizer, key_file=key)
    return study


def _texts(*tables: Path) -> Iterator[str]:
    """Every text of the phantoms' tables."""
    for table in tables:
        text = table.read_text(encoding="utf-8")
        for record in json.loads(text) if table.suffix == ".json" else map(json.loads, text.splitlines()):
            yield from (turn["value"] for turn in record.get("conversations", ()))
            if "caption" in record:
                yield record["caption"]


def demo_config(out: Path, study: Study, *, quick: bool) -> RunConfig:
    """The demo's recipe with its folders under ``out``."""
    run = recipe("demo-quick" if quick else "demo")
    align, instruct = run.stages
    paths = {"demo/data/captions": str(study.captions), "demo/data/dialogues": str(study.dialogues)}

    def placed(blend: tuple[BlendConfig, ...]) -> tuple[BlendConfig, ...]:
        return tuple(replace(entry, path=paths[entry.path]) for entry in blend)

    return replace(
        run,
        out=str(out / "run"),
        tokenizer=str(study.tokenizer),
        stages=(
            replace(
                align,
                data=placed(align.data),
                validation_data=(BlendConfig(path=str(study.validation_captions)),),
            ),
            replace(
                instruct,
                data=placed(instruct.data),
                validation_data=(BlendConfig(path=str(study.validation_dialogues)),),
                questions=str(study.questions),
            ),
        ),
    )


def _prepare_folder(out: Path) -> None:
    if out.exists():
        if not (out / MARK).is_file():
            raise UsageError(f"--out {out} exists and no demo made it; choose another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).touch()


def _evaluation(study: Study, run: Path, result: Path) -> list[str]:
    return [
        "eval", "phantoms", "--data", str(study.questions), "--checkpoint", str(run), "--out", str(result),
        "--protocol", ",".join(PROTOCOLS), "--sequence-length", "512", "--max-new-tokens", "16",
    ]  # fmt: skip


def _export(out: Path, study: Study, result_file: Path) -> dict[str, Any]:
    """The trained model in the Hugging Face layout, and what transformers answers with it."""
    from megatron_medgpt.convert.megatron_to_hf import export_hf

    result = json.loads(result_file.read_text(encoding="utf-8"))
    folder, asked = out / "exported", out / "exported-answers" / "phantoms.json"
    export_hf(out / "run", folder, tokenizer=study.tokenizer, dtype="fp32", evaluation=[result])
    _command(
        ["eval", "phantoms", "--data", str(study.questions), "--hf", str(folder), "--protocol", PROTOCOLS[0],
         "--no-controls", "--out", str(asked)], 1,
    )  # fmt: skip
    ours, theirs = _answers(result_file), _answers(asked)
    return {
        "folder": folder.name,
        "accuracy": json.loads(asked.read_text(encoding="utf-8"))["accuracy"],
        "same_answers": sum(theirs[question] == answer for question, answer in ours.items()),
        "n": len(ours),
    }


def _answers(result_file: Path) -> dict[str, str]:
    lines = result_file.with_suffix(".items.jsonl").read_text(encoding="utf-8").splitlines()
    return {item["question_id"]: item["prediction"] for item in map(json.loads, lines)}


def _train(run_file: Path, num_ranks: int, run: Path) -> None:
    _command(["train", str(run_file)], num_ranks)
    status = json.loads((run / "state.json").read_text(encoding="utf-8"))["status"]
    if status != "done":
        raise WorkError(f"training was {status}; `medgpt train {run_file} --nproc {num_ranks}` continues it")


def _command(arguments: list[str], num_ranks: int) -> None:
    code = run_ranks(arguments, num_ranks)
    if code != 0:
        raise WorkError(f"`medgpt {' '.join(arguments)}` ended with exit code {code}; its message stands above")


def _layouts(config: RunConfig, num_ranks: int) -> list[str]:
    from megatron_medgpt.train.layouts import check_stage

    return [f"{stage.name} {check_stage(config, stage, num_ranks).describe()}" for stage in config.stages]


def _say(what: str, work):
    started = time.perf_counter()
    print(f"== {what}", flush=True)
    result = work()
    print(f"== {what}: {time.perf_counter() - started:.0f} s", flush=True)
    return result


def _write_summary(out: Path, summary: dict[str, Any]) -> None:
    from megatron_medgpt.observe.report import write_report

    text = json.dumps(summary, indent=1) + "\n"
    (out / "summary.json").write_text(text, encoding="utf-8")
    (out / "run" / "summary.json").write_text(text, encoding="utf-8")
    shutil.copyfile(write_report(out / "run"), out / "report.html")


def _say_what_was_learned(out: Path, summary: dict[str, Any], quick: bool) -> None:
    controls, export = summary["controls"], summary["export"]
    low, high = summary["ci95"]
    from_picture = low > max(controls.values())
    verdict = "the answers come from the picture" if from_picture else "the pictures were not used"
    lines = [
        "",
        f"Learned in {summary['seconds'] / 60:.1f} minutes ({', then '.join(summary['layouts'])}): "
        f"{summary['accuracy']:.1%} of {summary['n']} held-out four-option questions right "
        f"(95 % interval {low:.1%} to {high:.1%}; chance is 25 %).",
        f"With a blank image {controls['blank_image']:.1%}, with another patient's image "
        f"{controls['shuffled_image']:.1%}: {verdict}.",
        *(f"  {name}: {value['accuracy']:.1%} of {value['n']}" for name, value in summary["by_question_type"].items()),
        f"Exported to {out / export['folder']}: transformers gets {export['accuracy']:.1%} right, "
        f"with the same answer to {export['same_answers']} of {export['n']} questions.",
        f"Report: {out / 'report.html'}",
        "",
        "Next, on your own data:",
        f"  {_program()} ingest captions.jsonl --image-root images --tokenizer TOKENIZER --out data/align",
        f"  {_program()} train my-run.yaml --dry-run       (begin with a copy of {out / 'run.yaml'})",
        f"  {_program()} eval omnimedvqa --data OmniMedVQA --checkpoint runs/mine --out runs/mine/eval/omnimedvqa.json",
    ]
    if quick:
        lines.insert(1, "This was the quick form: it shows that everything runs, and learns next to nothing.")
    print("\n".join(lines), flush=True)


def _program() -> str:
    """How this program was called, so that the next commands can be pasted."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "medgpt" and called.parent != Path() else "medgpt"
