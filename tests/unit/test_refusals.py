"""What the command line refuses: one line, its exit code, and nothing written or loaded before it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_medgpt import cli
from megatron_medgpt.ingest.phantom_study import make_phantoms


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    make_phantoms(folder / "phantoms", num_train=4, num_test=4, seed=0)
    (folder / "a-file").write_text("x")
    (folder / "a-folder").mkdir()
    table = next((folder / "phantoms/test/QA_information/Open-access").glob("*.json"))
    answers = [{"question_id": q["question_id"], "prediction": None, "option_losses": [1.0, 2.0, 3.0, 4.0]}
               for q in json.loads(table.read_text())]  # fmt: skip
    (folder / "losses.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    letters = [{"question_id": answer["question_id"], "prediction": "A"} for answer in answers]
    (folder / "letters.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in letters))
    (folder / "empty.json").write_text("{}")
    (folder / "alone.json").write_text('{"task": "phantoms", "protocol": "letter"}')
    (folder / "model.yaml").write_text("model: {language: tiny, vision: tiny-clip}\n")
    return folder


INGEST = "ingest phantoms/train/captions.jsonl --image-root phantoms/train --tokenizer absent"
EVAL = "eval phantoms --data phantoms/test --hf a-folder"
SCORE = "score phantoms --data phantoms/test --predictions losses.jsonl"
AGAINST = "score phantoms --data phantoms/test --predictions letters.jsonl --protocol letter --out new --against"
PLAN = "plan --gpus 1 --sequence-length 1024"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{INGEST} --out new --max-reject-rate 7", "--max-reject-rate 7"),
        (f"{INGEST} --out new --max-reject-rate nan", "--max-reject-rate nan"),
        (f"{INGEST} --out new --workers -3", "--workers -3"),
        (f"{INGEST} --out a-file", "a-file is a file"),
        (f"{INGEST} --out a-file/new", "a-file is a file"),
        ("inspect a-folder --sample 2 --png absent/x.png", "--png absent/x.png"),
        ("inspect a-folder --sample 2 --png x.txt", "--png x.txt"),
        ("inspect a-folder --sample 0 --png x.png", "--sample 0"),
        (f"{EVAL} --out a-folder", "--out a-folder is a folder"),
        (f"{EVAL} --out a-file/x.json", "a-file is a file"),
        (f"{EVAL} --out new --limit 0", "--limit 0"),
        (f"{EVAL} --out new --nproc 0", "--nproc 0"),
        (f"{EVAL} --out new --tensor 2", "--tensor"),
        ("eval phantom --data phantoms/test --hf a-folder --out new", "task 'phantom'"),
        ("eval phantoms --data absent --hf a-folder --out new", "--data absent"),
        (f"{SCORE} --out a-folder", "--out a-folder is a folder"),
        (f"{SCORE} --out a-file/x.json", "a-file is a file"),
        (f"{SCORE} --out new --protocol letter", "--protocol letter"),
        (f"{EVAL} --out new --concurrency 4", "--concurrency is for --endpoint"),
        (f"{EVAL} --out new --api-key k", "--api-key is for --endpoint"),
        (f"{EVAL} --out new --model m", "--model is for --endpoint"),
        (f"{EVAL} --out new --tokenizer t", "--tokenizer is for --checkpoint"),
        (f"{EVAL} --out new --sequence-length 8", "--sequence-length is for --checkpoint"),
        (f"{EVAL} --out new --reader dali", "--reader is for --checkpoint"),
        (f"{EVAL} --out new --protocol chat-likelihood --max-new-tokens 9", "--max-new-tokens is of written answers"),
        (
            "eval phantoms --data phantoms/test --checkpoint absent --out new --reader foo",
            "--reader foo; allowed: auto",
        ),
        ("score phantoms --data phantoms/test --predictions a-folder --out new", "a-folder is a folder"),
        (f"{AGAINST} empty.json", "--against empty.json is no evaluation file (no 'task' in it)"),
        (f"{AGAINST} a-file", "--against a-file is no JSON"),
        (f"{AGAINST} a-folder", "--against a-folder: Is a directory"),
        (f"{AGAINST} alone.json", "alone.items.jsonl is missing"),
        (f"{PLAN} --model model.yaml --vision medsiglip-448", "model.yaml names its own encoder"),
        (f"{PLAN} --model tiny --mxfp4-frozen", "add --frozen experts"),
        ("convert megatron-to-hf --checkpoint absent --out phantoms", "phantoms exists and is never overwritten"),
        ("convert megatron-to-hf --checkpoint absent --out a-file/new", "a-file is a file"),
        ("convert megatron-to-hf --checkpoint absent --out new --scale-rule odd", "--scale-rule odd"),
        ("convert megatron-to-hf --checkpoint absent --out new --scale-rule even", "needs --dtype mxfp4"),
        ("convert hf-to-megatron --language absent --out phantoms", "phantoms exists and is never overwritten"),
        ("convert verify --checkpoint absent --hf absent --no-logits --images", "--no-logits has none"),
        ("chat --hf a-folder --port 99999", "--port 99999"),
        ("chat --hf a-folder --port 0", "--port 0"),
    ],
)
def test_a_refusal_is_one_line_and_writes_nothing(
    made: Path, line: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    before = sorted(made.rglob("*"))
    assert _run(line.split(), monkeypatch) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("medgpt:")]
    assert len(errors) == 1 and said in errors[0]
    assert sorted(made.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian small", "no such command 'trian'; did you mean 'train'? See `medgpt --help`"),
        ("convert verfy", "no such command 'verfy'; did you mean 'verify'? See `medgpt convert --help`"),
        ("train small --nprocs 2", "no such option: --nprocs; did you mean --nproc? See `medgpt train --help`"),
        ("train", "missing argument 'run'; see `medgpt train --help`"),
        ("ingest table --out new", "missing option '--tokenizer'; see `medgpt ingest --help`"),
        ("plan --model tiny --gpus many", "invalid value for '--gpus': "),
        ("plan --model", "option '--model' requires an argument; see `medgpt plan --help`"),
        ("report run another", "another"),
        ("doctor --json=yes", "see `medgpt doctor --help`"),
    ],
)
def test_a_command_line_that_cannot_be_is_one_line_with_the_mend(
    line: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(line.split(), monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("medgpt: error: ") and said in shown.err and "--help`" in shown.err


def test_an_empty_question_is_refused_before_the_model_is_opened(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["chat", "--hf", "absent", str(made / "a-file"), " "], monkeypatch) == 2
    assert "the question is empty" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_line_with_the_file(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **named: object) -> None:
        raise OSError(28, "No space left on device", "answers.jsonl")

    monkeypatch.setattr("megatron_medgpt.evaluate.score.score", full)
    monkeypatch.delenv("MEDGPT_DEBUG", raising=False)
    monkeypatch.chdir(made)
    assert _run(f"{SCORE} --out new".split(), monkeypatch) == 1
    assert capsys.readouterr().err == "medgpt: failed: answers.jsonl: No space left on device\n"


def _run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["medgpt", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_a_key_in_the_environment_is_for_other_runs_than_this(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEDGPT_API_KEY", "secret")
    monkeypatch.chdir(made)
    assert _run(f"{EVAL} --out new".split(), monkeypatch) == 2
    said = capsys.readouterr().err
    assert "no config.json there" in said and "--api-key" not in said
