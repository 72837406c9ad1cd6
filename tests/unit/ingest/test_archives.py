"""WebDataset tars, Energon folders and bare folders of pairs, honest ones and hostile ones."""

import gzip
import json
import os
import tarfile

import pytest
import yaml
from medical_files import encoded, picture
from tars import special, tar_of

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.text import Turn
from megatron_medgpt.ingest.sources import Inline, open_source

PNG, JPEG = encoded("PNG", picture(20, 20)), encoded("JPEG")
DIALOGUE = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A lesion."}]


def records_of(path, **options):
    return list(open_source(path, **options).read())


def as_json(value):
    return json.dumps(value).encode()


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(members, **options))
    return path


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz"])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_with_one_key_are_one_sample(tmp_path, ending, format):
    long = "folder/" + "k" * 180
    members = [("./a.jpg", JPEG), ("./a.txt", "A läsion.".encode()), (f"{long}.png", PNG), (f"{long}.txt", b"Two.")]
    path = write_tar(tmp_path / f"t.{ending}", members, mode="w" if ending == "tar" else "w:gz", format=format)
    source = open_source(path)
    assert source.describe() == f"t.{ending}: format caption (image=image, text=caption)"
    first, second = source.read()
    assert first.images == (Inline.of(JPEG),)
    assert first.images[0].content == JPEG
    assert first.turns[1] == Turn("assistant", "A läsion.")
    assert (first.source_id, second.source_id) == (f"id:t.{ending}/a", f"id:t.{ending}/{long}")


def test_megatrons_converter_writes_dialogues_and_others_write_columns(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", JPEG), ("1.json", as_json(DIALOGUE))])
    write_tar(tmp_path / "b.tar", [("2.json", as_json({"question": "q", "answer": "a"})), ("2.img.png", PNG)])
    (first,), (second,) = records_of(tmp_path / "a.tar"), records_of(tmp_path / "b.tar")
    assert first.turns[0].text == "What is it?\n<image>"
    assert second.turns == (Turn("user", "<image>\nq"), Turn("assistant", "a"))


def test_several_images_of_a_sample_are_in_the_order_of_their_numbers(tmp_path):
    pictures = [encoded("PNG", picture(20, 20, seed=k)) for k in range(11)]
    members = [(f"s.{k}.png", content) for k, content in enumerate(pictures)]
    (record,) = records_of(write_tar(tmp_path / "t.tar", [*members, ("s.txt", b"Eleven.")]))
    assert record.images == tuple(map(Inline.of, pictures))


def test_tars_of_a_folder_and_of_a_range_are_one_input(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"s-{number:03}.tar", [("k.png", PNG), ("k.txt", b"%d" % number)])
    names = [record.turns[1].text for record in records_of(tmp_path)]
    assert names == ["0", "1", "2"]
    assert [r.turns[1].text for r in records_of(str(tmp_path / "s-{001..002}.tar"))] == names[1:]
    assert len({record.source_id for record in records_of(tmp_path)}) == 3


BAD_SAMPLES = {
    "not-utf-8": [("b.png", PNG), ("b.txt", b"\xff\xfe")],
    "not-json": [("b.png", PNG), ("b.json", b"{nothing")],
    "duplicate-key": [("b.png", PNG), ("b.json", b'{"caption": "x", "caption": "y"}')],
    "several-texts": [("b.png", PNG), ("b.txt", b"x"), ("b.json", b'{"caption": "y"}')],
    "duplicate-part": [("b.png", PNG), ("b.png", PNG), ("b.txt", b"x")],
    "no-image": [("b.txt", b"x")],
    "text-is-not-a-string": [("b.png", PNG)],
}


@pytest.mark.parametrize("reason", BAD_SAMPLES)
def test_a_bad_sample_carries_its_reason_and_the_next_is_read(tmp_path, reason):
    members = [("a.png", PNG), ("a.txt", b"x"), *BAD_SAMPLES[reason], ("c.png", PNG), ("c.txt", b"x")]
    records = records_of(write_tar(tmp_path / "t.tar", members))
    assert [record.problem for record in records] == ["", reason, ""]


def test_a_member_above_the_cap_is_counted_and_not_kept(tmp_path, monkeypatch):
    from megatron_medgpt.ingest.sources import archive

    monkeypatch.setattr(archive, "LARGEST_FILE_BYTES", 5000)
    members = [
        ("a.png", PNG),
        ("a.txt", b"x"),
        ("b.png", bytes(5001)),
        ("b.txt", b"x"),
        ("c.png", PNG),
        ("c.txt", b"x"),
    ]
    records = records_of(write_tar(tmp_path / "t.tar", members))
    assert [record.problem for record in records] == ["", "file-too-large", ""]


HOSTILE = {
    "leaves by its name": ("../outside.png", PNG), "is absolute": ("/etc/outside.png", PNG),
    "leaves through a folder": ("a/../../outside.png", PNG),
    "is a link": special("b.png", tarfile.SYMTYPE, "/etc/passwd"),
    "is a hard link": special("b.png", tarfile.LNKTYPE, "a.png"), "is a pipe": special("b.png", tarfile.FIFOTYPE),
    "is a device": special("b.png", tarfile.CHRTYPE), "has holes": special("b.png", tarfile.GNUTYPE_SPARSE),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_archive_with_a_hostile_member_is_refused_and_nothing_written(tmp_path, kind):
    inside = tmp_path / "in"
    path = write_tar(inside / "t.tar", [("a.png", PNG), ("a.txt", b"x"), HOSTILE[kind], ("c.txt", b"x")])
    with pytest.raises(WorkError, match=r"t\.tar: a member .* behind member 2"):
        records_of(path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "t.tar"]


def test_a_long_name_of_either_kind_can_be_hostile_too(tmp_path):
    for number, format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        name = "../" + "x" * 200 + ".png"
        path = write_tar(tmp_path / f"{number}.tar", [("a.png", PNG), ("a.txt", b"x"), (name, PNG)], format=format)
        with pytest.raises(WorkError, match="leaves the archive"):
            records_of(path)


def test_damage_is_refused_where_python_would_stop_reading_silently(tmp_path):
    whole = tar_of([("a.png", PNG), ("a.txt", b"x"), ("b.png", PNG), ("b.txt", b"y")])
    third = next(at for at in range(0, len(whole), 512) if whole[at : at + 5] == b"b.png")
    flipped = bytearray(whole)
    flipped[third] ^= 1
    changes = {"bad checksum": bytes(flipped), "breaks off": whole[: third + 100], "breaks  off": whole[:third]}
    for message, content in changes.items():
        (tmp_path / "t.tar").write_bytes(content)
        with pytest.raises(WorkError, match=f"{' '.join(message.split())} behind member 2"):
            records_of(tmp_path / "t.tar")
    (tmp_path / "t.tar").write_bytes(whole + whole)
    with pytest.raises(WorkError, match="something stands behind its end, behind member 4"):
        records_of(tmp_path / "t.tar")
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(WorkError, match="behind member"):
        records_of(tmp_path / "t.tar.gz")


def test_a_header_that_claims_exabytes_asks_for_no_memory(tmp_path):
    info = tarfile.TarInfo("b.png")
    info.size = 1 << 50
    header = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "t.tar").write_bytes(tar_of([("a.png", PNG), ("a.txt", b"x")])[:-10240] + header)
    with pytest.raises(WorkError, match="breaks off"):
        records_of(tmp_path / "t.tar")


def energon(folder, tars, dataset, splits):
    for name, members in tars.items():
        write_tar(folder / name, members)
    (folder / ".nv-meta").mkdir(exist_ok=True)
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(dataset))
    (folder / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump(splits))
    return folder


def sample_type(name):
    return {"sample_type": {"__module__": "megatron.energon", "__class__": name}}


def test_an_energon_captioning_folder_is_read_by_its_split(tmp_path):
    tars = {f"shards/shard_{n:03}.tar": [("k.jpg", JPEG), ("k.txt", b"caption %d" % n)] for n in range(3)}
    splits = {"split_parts": {"train": ["shards/shard_{000..001}.tar"], "val": ["shards/shard_002.tar"]}, "exclude": []}
    meta = {**sample_type("CaptioningSample"), "field_map": {"image": "png,jpg", "caption": "txt"}}
    source = open_source(energon(tmp_path, tars, meta, splits))
    assert "Energon Captioning, part train of train, val: 2 tars" in source.describe()
    assert [record.turns[1].text for record in source.read()] == ["caption 0", "caption 1"]


def test_an_energon_folder_of_questions_uses_its_field_map(tmp_path):
    content = as_json({"qa": [{"q": "Where?", "a": ["left", "right", "right"]}]})
    meta = {
        "__module__": "megatron.energon", "__class__": "VQAWebdataset",
        "field_map": {"image": "jpg", "context": "json[qa][0][q]", "answers": "json[qa][0][a]"},
    }  # fmt: skip
    members = [("k.jpg", JPEG), ("k.json", content), ("l.jpg", JPEG), ("l.json", b"{}"), ("m.jpg", JPEG)]
    splits = {"split_parts": {"train": ["s.tar"]}, "exclude": ["s.tar/m"]}
    first, second = records_of(energon(tmp_path, {"s.tar": members}, meta, splits))
    assert first.turns == (Turn("user", "<image>\nWhere?"), Turn("assistant", "right"))
    assert second.problem == "field-not-found"


def test_an_energon_folder_of_multiple_choice(tmp_path):
    content = as_json({"question": "Where?", "choices": ["left", "right"], "correct": 1})
    field_map = {
        "image": "jpg", "context": "json[question]", "choices": "json[choices]", "correct_choice_idx": "json[correct]",
    }  # fmt: skip
    splits = {"split_parts": {"train": ["s.tar"]}}
    tars = {"s.tar": [("k.jpg", JPEG), ("k.json", content)]}
    source = open_source(
        energon(tmp_path, tars, {**sample_type("MultiChoiceVQASample"), "field_map": field_map}, splits)
    )
    (record,) = source.read()
    assert source.format == "mcq"
    assert record.turns == (Turn("user", "<image>\nWhere?\nA. left\nB. right"), Turn("assistant", "right"))


def test_a_crude_energon_folder_is_its_tars(tmp_path):
    tars = {"s.tar": [("k.jpg", JPEG), ("k.json", as_json(DIALOGUE))]}
    meta = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (record,) = records_of(energon(tmp_path, tars, meta, {"split_parts": {"train": ["s.tar"]}}))
    assert record.turns[1].text == "A lesion."


@pytest.mark.parametrize(
    ("meta", "splits", "message"),
    [
        ({**sample_type("CaptioningSample"), "sample_loader": "x.py:f"}, {}, "wants its own code"),
        (sample_type("CaptioningSample"), {}, "has no field_map"),
        (sample_type("OCRSample"), {}, "has samples of OCR; allowed"),
        ({**sample_type("CaptioningSample"), "field_map": {"image": "jpg"}}, {}, "has no caption in its field_map"),
        (sample_type("CrudeSample"), {"split_parts": {"val": []}}, "has no part train"),
        (sample_type("CrudeSample"), {"split_parts": {"train": ["../s.tar"]}}, "cannot be used: path-outside"),
        (sample_type("CrudeSample"), {"split_parts": {"train": ["none.tar"]}}, "cannot be used: missing-file"),
        ("text", {}, "is not a mapping"),
        ({"sample_type": ["CaptioningSample"]}, {}, "has samples of no class"),
        (sample_type("CrudeSample"), {"split_parts": {"train": [["s.tar"]]}}, "something else than a list of names"),
        (sample_type("CrudeSample"), {"split_parts": ["train"]}, "has no part train"),
    ],
)
def test_an_energon_description_that_cannot_be_used_is_refused(tmp_path, meta, splits, message):
    splits = splits or {"split_parts": {"train": ["s.tar"]}}
    folder = energon(tmp_path / "set", {"s.tar": [("k.jpg", JPEG), ("k.txt", b"x")]}, meta, splits)
    write_tar(tmp_path / "s.tar", [("k.jpg", JPEG), ("k.txt", b"x")])
    with pytest.raises(UsageError, match=message):
        open_source(folder)


def test_an_energon_description_cannot_make_python_objects(tmp_path):
    folder = energon(tmp_path, {"s.tar": [("k.jpg", JPEG)]}, {}, {"split_parts": {"train": ["s.tar"]}})
    (folder / ".nv-meta" / "dataset.yaml").write_text("x: !!python/object/apply:os.system ['touch canary']\n")
    with pytest.raises(UsageError, match="is not YAML"):
        open_source(folder)
    assert not os.path.exists("canary")


def test_a_nest_of_aliases_in_an_energon_description_is_not_written_out(tmp_path):
    nest = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    nest += "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 12))
    folder = energon(tmp_path, {"s.tar": [("k.jpg", JPEG)]}, {}, {"split_parts": {"train": ["s.tar"]}})
    dataset, split = folder / ".nv-meta" / "dataset.yaml", folder / ".nv-meta" / "split.yaml"
    dataset.write_text(nest + "__class__: CaptioningWebdataset\nfield_map: {image: *a11, caption: txt}\n")
    with pytest.raises(UsageError, match="has no image in its field_map"):
        open_source(folder)
    dataset.write_text("__class__: CrudeWebdataset\n")
    split.write_text(nest + "split_parts: {train: [*a11]}\n")
    with pytest.raises(UsageError, match="something else than a list of names"):
        open_source(folder)


def test_pictures_with_texts_beside_them_need_no_table(tmp_path):
    files = {
        "a.jpg": JPEG, "a.txt": "A läsion.".encode(), "deep/b.png": PNG, "deep/b.json": as_json(DIALOGUE),
        "c.png": PNG, "c.json": as_json({"caption": "C.", "id": "own"}), "notes.md": b"other", "lonely.png": PNG,
        "orphan.txt": b"x", "d.png": PNG, "d.jpg": JPEG, "d.txt": b"x", "e.gif": b"GIF89a", "e.txt": b"x",
        ".hidden/f.png": PNG,
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    source = open_source(tmp_path)
    assert source.describe().endswith("pairs of files; 1 other files are not read")
    assert [(r.images, r.problem) for r in source.read()] == [
        (("a.jpg",), ""), (("c.png",), ""), ((), "several-images"), (("e.gif",), ""), ((), "no-text-beside-it"),
        ((), "no-image"), ((), "text-is-not-a-string"),
    ]  # fmt: skip


def test_a_text_that_is_a_pipe_or_leads_outside_is_counted_and_not_opened(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    for name in ("a", "b", "c"):
        (folder / f"{name}.png").write_bytes(PNG)
    (folder / "a.txt").write_text("A.")
    os.mkfifo(folder / "b.txt")
    (folder / "c.txt").symlink_to(tmp_path / "secret.txt")
    assert [record.problem for record in records_of(folder)] == ["", "not-a-file", "path-outside"]


def test_an_input_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "t.jsonl")
    with pytest.raises(UsageError, match="is not a regular file"):
        open_source(tmp_path / "t.jsonl")


@pytest.mark.parametrize("name", ["t.zip", "t", "memory://folder", "s-{002..001}.tar"])
def test_an_input_of_no_known_kind_names_the_kinds(tmp_path, name):
    given = name if "://" in name else tmp_path / name
    if "{" not in name and "://" not in name:
        given.write_bytes(b"x")
    with pytest.raises(UsageError, match=r"one of \.json, \.jsonl|is empty or too long"):
        open_source(given)


def test_a_shard_is_closed_early_where_its_records_carry_many_bytes(tmp_path, tokenizer_folder, key_file, monkeypatch):
    from megatron_medgpt.data.shards import Dataset
    from megatron_medgpt.ingest import command

    pictures = [encoded("PNG", picture(20, 20, seed=k)) for k in range(6)]
    members = [m for k, c in enumerate(pictures) for m in ((f"{k}.png", c), (f"{k}.txt", b"caption %d" % k))]
    path = write_tar(tmp_path / "t.tar", members)
    monkeypatch.setattr(command, "_CARRIED_BYTES", 2 * len(pictures[0]))
    options = {"tokenizer": tokenizer_folder, "key_file": key_file, "workers": 1, "echo": lambda line: None}
    summary = command.run_ingest([path], out=tmp_path / "out", **options)
    assert summary.num_samples == 6
    assert [shard.num_samples for shard in Dataset(tmp_path / "out").manifest.shards] == [2, 2, 2]
