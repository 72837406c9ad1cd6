"""Bytes changed at random: every reader gives records, or one of our errors; never another, never a long wait.

A smoke form runs with the other tests (the same cases every time). ``MEDGPT_FUZZ_CASES=20000`` runs as many new cases
for each reader (make fuzz).
"""

import base64
import io
import json
import os
import shutil
from contextlib import suppress

import pytest
from caps import capped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from medical_files import dicom, encoded, picture
from tars import tar_of

from megatron_medgpt.config.errors import MedgptError
from megatron_medgpt.data.picture import PictureError, canonical
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.data.verify import verify
from megatron_medgpt.ingest.command import run_ingest
from megatron_medgpt.ingest.decode import decode
from megatron_medgpt.ingest.sources import open_source

CASES = int(os.environ.get("MEDGPT_FUZZ_CASES", 0))
fuzz = settings(
    max_examples=CASES or 40, deadline=None, derandomize=not CASES, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

PNG, JPEG = encoded("PNG", picture(20, 20)), encoded("JPEG", picture(24, 16))
ROWS = [{"id": f"r{k}", "image": f"{k}.png", "caption": f"A läsion, number {k}.", "view": "PA"} for k in range(4)]
DIALOGUE = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "!"}]  # fmt: skip
MCQ = {"image": "a", "question": "Where?", "option_A": "left", "option_B": "right", "answer": "B"}


def parquet_bytes():
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = pyarrow.BufferOutputStream()
    table = pyarrow.table(
        {"image": [{"bytes": PNG, "path": "x"}] * 3, "question": ["a", "b", "c"], "answer": ["d"] * 3}
    )
    parquet.write_table(table, out, write_page_checksum=True)
    return out.getvalue().to_pybytes()


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


MEMBERS = [("a.png", PNG), ("a.txt", b"x"), ("b/c.jpg", JPEG), ("b/c.json", json.dumps(DIALOGUE).encode())]
TABLES = {
    "caption.jsonl": lambda: jsonl(ROWS),
    "llava.json": lambda: json.dumps([{"id": k, "image": "a", "conversations": DIALOGUE} for k in "abc"]).encode(),
    "messages.jsonl": lambda: jsonl([{"messages": MESSAGES, "images": ["a"]}] * 2),
    "mcq.json": lambda: json.dumps([MCQ, MCQ]).encode(),
    "caption.csv": lambda: b'image,caption\na.png,"x, ""y"""\nb.png,z\n',
    "vqa.tsv": lambda: "image\tquestion\tanswer\na.png\tä?\tb\n".encode(),
    "vqa.parquet": parquet_bytes,
    "set.tar": lambda: tar_of(MEMBERS),
    "long.tar": lambda: tar_of([("n" * 150 + ".png", PNG), ("n" * 150 + ".txt", b"x")], format=2),
    "set.tar.gz": lambda: tar_of(MEMBERS, mode="w:gz"),
}  # fmt: skip

CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
        st.tuples(st.just("set"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 600)),
        st.tuples(st.just("repeat"), st.floats(0, 1), st.integers(1, 600)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("end"), st.floats(0, 1), st.just(0)),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def changed(content, changes):
    content = bytearray(content)
    for kind, place, what in changes:
        at = int(place * max(len(content) - 1, 0))
        if kind == "flip" and content:
            content[at] ^= 1 << what
        elif kind == "set":
            content[at : at + len(what)] = what
        elif kind == "cut":
            del content[at : at + what]
        elif kind == "repeat":
            content[at:at] = content[at : at + what]
        elif kind == "insert":
            content[at:at] = what
        elif kind == "end":
            del content[at:]
    return bytes(content)


@pytest.mark.parametrize("name", TABLES)
@fuzz
@given(changes=CHANGES)
def test_a_damaged_table_or_archive_gives_records_or_our_error(tmp_path_factory, name, changes):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(changed(_whole(name), changes))
    with capped():
        try:
            records = list(open_source(path).read())
        except MedgptError as error:
            assert "\n" not in str(error).strip()
            return
    assert [record.number for record in records] == list(range(len(records)))
    assert all(record.problem or (record.turns and record.source_id) for record in records)


DESCRIPTIONS = {
    "dataset.yaml": b"sample_type: {__module__: megatron.energon, __class__: CaptioningSample}\n"
                    b"field_map: {image: 'jpg,png', caption: 'json[0][value]'}\n",
    "split.yaml": b"split_parts: {train: ['s-{000..000}.tar'], val: []}\nexclude: [s-000.tar/x]\n",
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIPTIONS)
@fuzz
@given(changes=CHANGES)
def test_a_damaged_energon_description_gives_records_or_our_error(tmp_path_factory, name, changes):
    folder = tmp_path_factory.getbasetemp() / "energon"
    (folder / ".nv-meta").mkdir(parents=True, exist_ok=True)
    (folder / "s-000.tar").write_bytes(tar_of([("c.jpg", JPEG), ("c.json", json.dumps(DIALOGUE).encode())]))
    for other, content in DESCRIPTIONS.items():
        (folder / ".nv-meta" / other).write_bytes(changed(content, changes) if other == name else content)
    with capped(), suppress(MedgptError):
        assert all(record.problem or record.turns for record in open_source(folder).read())


@fuzz
@given(changes=CHANGES)
def test_a_damaged_text_beside_a_picture_gives_a_record_or_its_reason(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "pairs"
    folder.mkdir(exist_ok=True)
    for stem in "ab":
        (folder / f"{stem}.png").write_bytes(PNG)
    (folder / "a.json").write_bytes(b'{"caption": "x"}')
    (folder / "b.json").write_bytes(changed(b'{"caption": "A l\xc3\xa4sion.", "id": 7}', changes))
    with capped():
        assert len(list(open_source(folder).read())) == 2


@pytest.mark.parametrize("kind", ["tiktoken", "model"])
@fuzz
@given(changes=CHANGES)
def test_a_damaged_vocabulary_is_a_tokenizer_or_our_error(tmp_path_factory, kind, changes):
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(changed(_vocabulary(kind), changes))
    with capped():
        try:
            words = Tokenizer.load(path)
        except MedgptError:
            return
        words.decode(words.encode("A lesion <|end|>"))


def _vocabulary(kind):
    if kind not in _WHOLE:
        tokens = [bytes([b]) for b in range(256)] + [b"le", b"si", b"on", b"lesi", b"lesion"]
        ranks = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)).encode()
        sentencepiece, out = pytest.importorskip("sentencepiece"), io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["A lesion in the lobe."] * 9), model_writer=out, vocab_size=40, num_threads=1,
            normalization_rule_name="identity",  # the library panics on a damaged table of characters
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        _WHOLE["tiktoken"], _WHOLE["model"] = ranks, out.getvalue()
    return _WHOLE[kind]


_WHOLE = {}


def _whole(name):
    if name not in _WHOLE:
        _WHOLE[name] = TABLES[name]()
    return _WHOLE[name]


FILES = {
    "jpeg": lambda: JPEG, "progressive jpeg": lambda: encoded("JPEG", picture(24, 16), progressive=True),
    "png": lambda: PNG, "palette png": lambda: encoded("PNG", picture(mode="P")),
    "dicom": lambda: dicom(__import__("numpy").arange(256, dtype="uint16").reshape(16, 16)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
@fuzz
@given(changes=CHANGES)
def test_a_damaged_picture_is_decoded_or_refused_for_a_reason(name, changes):
    if name not in _WHOLE:
        _WHOLE[name] = FILES[name]()
    content = changed(_WHOLE[name], changes)
    with capped():
        try:
            (taken,) = decode(content, allow_burned_in=True)
        except PictureError as error:
            assert error.reason
            return
    assert (
        canonical(taken.picture.encoded).encoded == taken.picture.encoded
    )  # what is taken would be taken again, unchanged


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(changes=CHANGES)
def test_a_damaged_file_in_a_tree_costs_its_own_record_and_no_other(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "tree"
    folder.mkdir(exist_ok=True)
    (folder / "reports.csv").write_text("SOPInstanceUID,report\n1.2.3.4.5,A.\n1.2.3.4.6,B.\n")
    if "whole" not in _WHOLE:
        _WHOLE["whole"] = dicom(__import__("numpy").zeros((16, 16), "uint16"))
        _WHOLE["other"] = dicom(__import__("numpy").zeros((16, 16), "uint16"), SOPInstanceUID="1.2.3.4.6")
    (folder / "a").write_bytes(_WHOLE["whole"])
    (folder / "b").write_bytes(changed(_WHOLE["other"], changes))
    with capped():
        first, second = open_source(folder / "reports.csv").read()
    assert "a" in first.images
    assert set(second.images) <= {"b"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tokenizer_folder):
    """A small ingested dataset and the bytes of its files."""
    folder = tmp_path_factory.mktemp("dataset")
    for k in range(4):
        (folder / f"{k}.png").write_bytes(encoded("PNG", picture(20, 20, seed=k)))
    (folder / "t.jsonl").write_bytes(jsonl(ROWS))
    (folder / "key").write_bytes(b"k" * 32)
    run_ingest(
        [folder / "t.jsonl"], out=folder / "out", tokenizer=tokenizer_folder, key_file=folder / "key", workers=1,
        records_per_shard=2, echo=lambda line: None,
    )  # fmt: skip
    return folder / "out"


def read_all(folder):
    opened = Dataset(folder)
    return [
        (s.token_ids.tolist(), s.target_spans_flat.tolist(), s.modality, s.sample_id,
         [opened.image(key).tobytes() for key in s.image_keys])
        for s in (opened[number] for number in range(len(opened)))
    ]  # fmt: skip


@fuzz
@given(which=st.integers(0, 1000), changes=CHANGES)
def test_a_damaged_dataset_is_refused_found_by_verify_or_read_as_it_was(dataset, which, changes):
    whole = read_all(dataset)
    names = sorted(p.name for p in dataset.iterdir() if p.name.startswith("shard-") or p.name == "dataset.json")
    damaged = dataset.parent / "damaged"
    shutil.copytree(dataset, damaged, dirs_exist_ok=True)
    path = damaged / names[which % len(names)]
    path.unlink()
    path.write_bytes(changed((dataset / path.name).read_bytes(), changes))
    with capped():
        try:
            read_all(damaged)
            if list(verify(damaged)):
                return
        except MedgptError:
            return
        assert read_all(damaged) == whole
