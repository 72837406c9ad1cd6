"""Questions as the token documents that a model reads: one per option for likelihood, one open for generation."""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.text import IMAGE_MARK, Tokenizer, Turn
from megatron_medgpt.evaluate.scorers import prompt
from megatron_medgpt.evaluate.scorers.official import prefix_continuation
from megatron_medgpt.evaluate.tasks.question import Question

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_medgpt.data.pixels import PixelSource

Scored = tuple[np.ndarray, tuple[tuple[int, int], ...]]
"""Token ids int32 (n,), an image one mark, and the half-open spans of them that are scored."""


def option_documents(question: Question, protocol: str, tokenizer: Tokenizer) -> list[Scored]:
    """One document per option, in order; what is scored is the option.

    ``chat-likelihood`` is the chat form of training: the image and the bare question from the user, the option as the
    assistant's final words, its end token included. ``official-prefix`` has no chat around it: image, prompt, option,
    split into tokens together (as the benchmark's runners do) and cut at the length of the prompt's own tokens.
    """
    if protocol == "chat-likelihood":
        user = Turn("user", _with_mark(question, prompt(protocol, question)))
        rendered = [tokenizer.render([user, Turn("assistant", _plain(option))]) for option in question.options]
        return [(document.token_ids, document.target_spans[-1:]) for document in rendered]
    mark = [tokenizer.image_mark_id] if question.image is not None else []
    prefix = _plain(prompt(protocol, question))
    start = len(mark) + len(tokenizer.encode(prefix))
    documents: list[Scored] = []
    for option in question.options:
        ids = np.asarray([*mark, *tokenizer.encode(prefix + prefix_continuation(_plain(option)))], dtype=np.int32)
        documents.append((ids, ((start, ids.size),)))
    return documents


def open_document(question: Question, protocol: str, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids int32 (n,) of the question, ending where the assistant's final words begin."""
    user = Turn("user", _with_mark(question, prompt(protocol, question)))
    return tokenizer.render([user], open_answer=True).token_ids


def encoded_picture(question: Question) -> bytes:
    """The question's image as JPEG or PNG bytes; other formats that Pillow reads become PNG.

    Raises:
        UsageError: no image, unreadable, or not a picture.
    """
    data = question.image_bytes()
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.format in ("JPEG", "PNG"):
                return data
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "PNG")
            return buffer.getvalue()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = type(error).__name__
        raise UsageError(f"question {question.question_id}: its image is not a readable picture ({reason})") from error


def pixel_reader(source: PixelSource) -> Callable[[list[Hashable]], Tensor]:
    """Pixels of encoded pictures, whose bytes are their own keys, as ``data.collate`` asks for them."""

    def read(pictures: list[Hashable]) -> Tensor:
        return source.read(pictures, lambda picture: ("encoded", np.frombuffer(picture, np.uint8)))  # type: ignore[call-overload]

    return read


def check_decodes(question: Question, data: bytes) -> None:
    """Decode a picture whole; UsageError names the question of one that breaks off."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = type(error).__name__
        raise UsageError(f"question {question.question_id}: its image does not decode ({reason})") from error


def _with_mark(question: Question, text: str) -> str:
    return f"{IMAGE_MARK}\n{_plain(text)}" if question.image is not None else _plain(text)


def _plain(text: str) -> str:
    """Text of a set in which the image mark is written out would otherwise count as one more image."""
    return text.replace(IMAGE_MARK, "")
