"""Chat messages with their images beside them, inside them, or as data: URIs."""

import base64
import json

import pytest
from medical_files import encoded

from megatron_medgpt.ingest.sources import Inline, open_source

PNG = encoded("PNG")
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
TEXT = {"type": "text", "text": "\nWhat is it?"}


def record_of(tmp_path, content, **more):
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A lesion."}], **more}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    (record,) = open_source(tmp_path / "m.jsonl").read()
    return record


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URI}}, {"type": "image_url", "image_url": URI},
        {"type": "image", "image": URI}, {"type": "image", "url": URI}, {"type": "input_image", "image_url": URI},
    ],
)  # fmt: skip
def test_an_image_part_may_hold_the_image_itself(tmp_path, part):
    record = record_of(tmp_path, [part, TEXT])
    assert record.images == (Inline.of(PNG),)
    assert record.images[0].content == PNG
    assert record.turns[0].text == "<image>\nWhat is it?"


def test_an_image_part_may_hold_a_name(tmp_path):
    record = record_of(tmp_path, [{"type": "image", "image": "a.png"}, TEXT, {"type": "image", "path": "b.png"}])
    assert record.images == ("a.png", "b.png")


def test_images_beside_the_messages_fill_the_marks(tmp_path):
    assert record_of(tmp_path, "<image><image> Compare.", images=["a.png", {"path": "b.png"}]).images == (
        "a.png", "b.png",
    )  # fmt: skip
    assert record_of(tmp_path, [{"type": "image"}, TEXT], images=[URI]).images == (Inline.of(PNG),)


def test_text_alone_needs_no_image(tmp_path):
    record = record_of(tmp_path, "What is a lesion?")
    assert (record.images, record.problem) == ((), "")


@pytest.mark.parametrize(
    ("content", "more", "reason"),
    [
        ([{"type": "image", "image": "a.png"}, TEXT], {"images": ["b.png"]}, "images-stated-twice"),
        ([{"type": "image", "image": "data:image/png;base64,@@@"}, TEXT], {}, "bad-data-uri"),
        ([{"type": "image", "image": "data:image/png,abc"}, TEXT], {}, "bad-data-uri"),
        ([{"type": "image"}, TEXT], {}, "marks-and-images-differ"),
        ([{"type": "audio"}], {}, "text-is-not-a-string"),
        ("<image> What?", {"images": ["a", "b"]}, "marks-and-images-differ"),
        ("<image> What?", {"images": [3]}, "image-is-not-a-name"),
        ("<image> What?", {"images": [{"bytes": "x"}]}, "image-is-not-a-name"),
    ],
)
def test_what_does_not_fit_carries_its_reason(tmp_path, content, more, reason):
    assert record_of(tmp_path, content, **more).problem == reason
