"""A row of a table to images and turns, one function for each format."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_medgpt.data.picture import LARGEST_FILE_BYTES
from megatron_medgpt.data.text import IMAGE_MARK, Turn
from megatron_medgpt.ingest.sources.columns import dialogue_key, option_columns
from megatron_medgpt.ingest.sources.record import Image, Inline, RecordError

CAPTION_PROMPTS = ("Describe the image.", "What does the image show?", "Explain the picture briefly.")
Columns = Mapping[str, str]
Content = tuple[tuple[Image, ...], list[Turn]]
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "developer": "system",
}  # fmt: skip
_LETTERS = "ABCDEFGH"
_LETTER_PREFIX = re.compile(r"\s*([A-H])\s*[:.)]\s*(.*)", re.DOTALL)


def from_llava(row: Mapping[str, Any], columns: Columns) -> Content:
    key = dialogue_key(row)
    if key is None:
        raise RecordError("no-conversation")
    turns = []
    for turn in row[key]:
        if not isinstance(turn, dict):
            raise RecordError("bad-turn")
        turns.append(Turn(_role(turn.get("from")), _text(turn.get("value"))))
    return images_of(row.get(columns.get("image", "image"))), turns


def from_messages(row: Mapping[str, Any], columns: Columns) -> Content:
    """Chat messages; the images stand in ``images``, or in the parts of the messages themselves (OpenAI, HF)."""
    if not isinstance(row.get("messages"), list):
        raise RecordError("no-conversation")
    turns, inside = [], []
    for turn in row["messages"]:
        if not isinstance(turn, dict):
            raise RecordError("bad-turn")
        content = turn.get("content")
        if isinstance(content, list):
            texts = []
            for part in content:
                text, images = _part(part)
                texts.append(text)
                inside.extend(images)
            content = "".join(texts)
        turns.append(Turn(_role(turn.get("role")), _text(content)))
    beside = images_of(row.get("images", row.get(columns.get("image", "image"))))
    if inside and beside:
        raise RecordError("images-stated-twice")
    return (*inside, *beside), turns


def _part(part: Any) -> tuple[str, tuple[Image, ...]]:
    """Text of one part of a message, and the image that it holds itself."""
    part = part if isinstance(part, dict) else {}
    kind = part.get("type")
    if kind not in ("image", "image_url", "input_image"):
        return _text(part.get("text")), ()
    value = part.get("image_url", part.get("image", part.get("url", part.get("path"))))
    if isinstance(value, dict) and "url" in value:
        value = value["url"]
    return IMAGE_MARK, images_of(value)


def from_caption(row: Mapping[str, Any], columns: Columns) -> Content:
    text = _text(row.get(columns["text"])).strip()
    return caption_turns(images_of(row.get(columns["image"])), text)


def caption_turns(images: tuple[Image, ...], text: str) -> Content:
    """A caption as the answer to one of a few questions, chosen by the content."""
    if not images:
        raise RecordError("no-image")
    which = hashlib.sha256(json.dumps([names_of(images), text]).encode()).digest()[0] % len(CAPTION_PROMPTS)
    return images, [Turn("user", IMAGE_MARK * len(images) + "\n" + CAPTION_PROMPTS[which]), Turn("assistant", text)]


def from_vqa(row: Mapping[str, Any], columns: Columns) -> Content:
    answer = row.get(columns["answer"])
    if isinstance(answer, list):  # several people's answers: the one given most often, of equals the first
        answers = [_text(one).strip() for one in answer]
        if not answers:
            raise RecordError("no-answer")
        answer = max(answers, key=answers.count)
    question = _text(row.get(columns["question"])).strip()
    return images_of(row.get(columns["image"])), [Turn("user", question), Turn("assistant", _text(answer).strip())]


def from_mcq(row: Mapping[str, Any], columns: Columns) -> Content:
    """Question and options, one a line; the target is the text of the right option, as the scorers ask for it."""
    options = _options(row, columns)
    stated = [row[columns[name]] for name in ("answer", "label") if name in columns and columns[name] in row]
    right = _right_option(options, [value for value in stated if value is not None])
    question = _text(row.get(columns["question"])).strip()
    listed = "\n".join(f"{letter}. {option}" for letter, option in options.items())
    turns = [Turn("user", f"{question}\n{listed}"), Turn("assistant", options[right])]
    return images_of(row.get(columns["image"])), turns


def _options(row: Mapping[str, Any], columns: Columns) -> dict[str, str]:
    """Letter -> text without a letter of its own (PMC-VQA writes ``A:`` before each)."""
    value = row.get(columns.get("options", ""))
    if isinstance(value, dict):
        found = {str(letter).upper(): option for letter, option in value.items()}
    elif isinstance(value, list):
        found = dict(zip(_LETTERS, value))
    else:
        found = {letter: row[column] for letter, column in option_columns(row)}
    options = {}
    for letter, option in found.items():
        if option in (None, ""):
            continue
        own = _LETTER_PREFIX.fullmatch(_text(option))
        if text := (own[2] if own and own[1] == letter else option).strip():
            options[letter] = text
    if len(options) < 2 or not set(options) <= set(_LETTERS) or (isinstance(value, list) and len(value) > 8):
        raise RecordError("no-options")
    return options


def _right_option(options: Mapping[str, str], stated: list[Any]) -> str:
    """Letter of the right option, which an answer or a label states as its text, its letter or its index."""
    for value in stated:
        if type(value) is int:
            if 0 <= value < len(options):
                return list(options)[value]
            continue
        text = _text(value).strip()
        own = _LETTER_PREFIX.fullmatch(text)
        meant = {letter for letter, option in options.items() if option == text}
        if text.upper() in options:
            meant.add(text.upper())
        if not meant and own and options.get(own[1]) == own[2].strip():
            meant.add(own[1])
        if len({options[letter] for letter in meant}) > 1:
            raise RecordError("answer-is-ambiguous")
        if meant:
            return min(meant)
    raise RecordError("answer-is-no-option")


def images_of(value: Any) -> tuple[Image, ...]:
    """The images of a field: names, bytes, structs of both (HF), ``data:`` URIs, or a list of these."""
    if value is None or (isinstance(value, str) and not value):
        return ()
    return tuple(_image(one) for one in (value if isinstance(value, list) else [value]))


def _image(value: Any) -> Image:
    if isinstance(value, dict):
        content = value.get("bytes")
        if content is not None and not isinstance(content, bytes):
            raise RecordError("image-is-not-a-name")
        value = content or value.get("path")
    if isinstance(value, bytes):
        return Inline.of(value)
    if isinstance(value, str) and value[:5].lower() == "data:":
        return Inline.of(_data_uri(value))
    if not isinstance(value, str | Inline):
        raise RecordError("image-is-not-a-name")
    return value


def _data_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RecordError("bad-data-uri")
    if len(body) > LARGEST_FILE_BYTES:
        raise RecordError("file-too-large")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError("bad-data-uri") from error


def names_of(images: tuple[Image, ...]) -> list[str]:
    """What tells the images of a record apart from others: names, and digests of contents."""
    return [image if isinstance(image, str) else image.digest for image in images]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise RecordError("text-is-not-a-string")
    return value


def _role(name: Any) -> str:
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RecordError("unknown-role")
    return role


CONVERTERS: dict[str, Callable[[Mapping[str, Any], Columns], Content]] = {
    "llava": from_llava, "messages": from_messages, "caption": from_caption, "vqa": from_vqa, "mcq": from_mcq,
}  # fmt: skip
