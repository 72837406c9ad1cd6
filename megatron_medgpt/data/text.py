"""Text to token ids: the tokenizer of a language model and GPT-oss's harmony layout of a dialogue.

A dialogue becomes

    <|start|>developer<|message|># Instructions\\n\\n{system text}\\n\\n<|end|>
    <|start|>user<|message|>{text with image marks}<|end|>
    <|start|>assistant<|channel|>final<|message|>{text}<|return|>

without line breaks between messages (openai-harmony's format; ``<|end|>`` in place of ``<|return|>`` on assistant turns
that are not the last). Nothing of it depends on a clock or on the machine. ``CHAT_TEMPLATE`` is the same layout for
exported models. Targets of the loss are the assistant's texts and the token that ends each.

Text of users is data: a string such as ``<|return|>`` inside it is spelled out byte by byte and never becomes the
control token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.vocabulary import O200K_PIECES, from_sentencepiece, from_tiktoken

IMAGE_MARK = "<image>"
"""Place of an image in the text of a turn; becomes the tokenizer's image-mark token."""
IMAGE_TOKEN = "<|image|>"
IMAGE_TOKEN_IN_GPT_OSS = "<|reserved_200013|>"
"""The reserved token of o200k_harmony that stands for an image where no ``<|image|>`` is named."""
ROLES = ("system", "user", "assistant")

CONTROL_TOKENS = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
    "<|message|>", "<|call|>", IMAGE_TOKEN, "<|endofprompt|>",
)  # fmt: skip
"""Control tokens of o200k_harmony, in its order, with the image mark where GPT-oss reserves 200013."""

CHAT_TEMPLATE = (
    "{%- macro parts(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|image|>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' or message['role'] == 'developer' -%}"
    "{{- '<|start|>developer<|message|># Instructions\\n\\n' + parts(message['content']) + '\\n\\n<|end|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + parts(message['content']) -}}"
    "{{- '<|return|>' if loop.last else '<|end|>' -}}"
    "{%- else -%}{{- '<|start|>user<|message|>' + parts(message['content']) + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant<|channel|>final<|message|>' -}}{%- endif -%}"
)
"""Jinja chat template of exported models: renders what ``Tokenizer.render`` encodes (tested)."""

_HEADER_WORDS = ("user", "assistant", "developer", "final")
_MARK_WITH_BREAKS = re.compile(r"\n?<image>\n?")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a dialogue. ``text`` holds ``<image>`` where an image stands."""

    role: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """A dialogue as tokens. An image is one mark token."""

    token_ids: np.ndarray
    """int32 (n,)."""
    target_spans: tuple[tuple[int, int], ...]
    """Half-open ranges of ``token_ids`` that are targets."""
    num_images: int


def split_at_images(text: str) -> list[str]:
    """Texts between the image marks of a turn; one line break on either side of a mark goes with it.

    LLaVA's files write ``<image>\\n`` before or ``\\n<image>`` after the question at random; both mean one thing.
    """
    return _MARK_WITH_BREAKS.split(text)


def _tokenizer_file(place: Path) -> Path:
    if place.is_file():
        return place
    others = sorted(p for p in place.iterdir() if p.suffix in (".tiktoken", ".model")) if place.is_dir() else []
    if (place / "tokenizer.json").is_file():
        return place / "tokenizer.json"
    if len(others) != 1:
        raise UsageError(
            f"tokenizer {place} has no tokenizer.json, and not exactly one .tiktoken or .model file; give the folder "
            "of a GPT-oss tokenizer, or the file itself"
        )
    return others[0]


class Tokenizer:
    """A language model's tokenizer and its harmony control tokens.

    Load one with ``Tokenizer.load(place)``. ``fingerprint`` is the sha256 of tokenizer.json (of what the file became,
    where it was another); datasets remember it.
    """

    def __init__(self, tokenizer_json: bytes, source: str) -> None:
        self.source, self.tokenizer_json = source, tokenizer_json
        self.fingerprint = hashlib.sha256(tokenizer_json).hexdigest()
        try:
            self._backend = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
        except Exception as error:  # the library raises plain Exception on any malformed file
            raise UsageError(f"tokenizer {source} is not a readable tokenizer.json: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        # Control tokens in the text of users are encoded as ordinary text; ours are placed by id.
        self._backend.encode_special_tokens = True
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        image = self._backend.token_to_id(IMAGE_TOKEN)
        self.image_mark_id = image if image is not None else self._control(IMAGE_TOKEN_IN_GPT_OSS)
        self.start_id, self.message_id, self.channel_id, self.end_id, self.return_id, self.pad_id = (
            self._control(token)
            for token in ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|endoftext|>")
        )
        self.unknown_id = self._unknown()
        """Id that stands for text the vocabulary cannot spell, or None where it spells every byte."""
        control = {self.image_mark_id, self.start_id, self.message_id, self.channel_id, self.end_id, self.return_id}
        if control.intersection(self._backend.encode("".join(CONTROL_TOKENS), add_special_tokens=False).ids):
            raise UsageError(
                f"tokenizer {source} turns control tokens in plain text into control tokens; mark its harmony tokens "
                '"special": true under added_tokens of tokenizer.json'
            )

    @classmethod
    def load(cls, place: str | Path) -> Tokenizer:
        """Read a tokenizer.json, a tiktoken rank file (``.tiktoken``) or a sentencepiece model (``.model``).

        ``place`` is the file, or a folder with one of them; tokenizer.json comes first.

        Raises:
            UsageError: no such file, not a tokenizer, or harmony's control tokens are missing.
        """
        path = _tokenizer_file(Path(place))
        content = path.read_bytes()
        if path.suffix == ".tiktoken":
            content = from_tiktoken(content, str(place))
        elif path.suffix == ".model":
            content = from_sentencepiece(content, str(place), CONTROL_TOKENS)
        return cls(content, str(place))

    def _control(self, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise UsageError(
                f"tokenizer {self.source} has no {token}; a GPT-oss (o200k_harmony) tokenizer or one made by "
                "train_tokenizer has it"
            )
        return token_id

    def _unknown(self) -> int | None:
        model = json.loads(self.tokenizer_json)["model"]
        if model.get("byte_fallback"):
            return None
        token = model.get("unk_token")
        return model.get("unk_id") if token is None else self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; control tokens written in it are spelled out."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Iterable[int], *, keep_control: bool = False) -> str:
        """Text of token ids; control tokens are left out unless asked for."""
        return self._backend.decode([int(i) for i in token_ids], skip_special_tokens=not keep_control)

    @cached_property
    def _headers(self) -> dict[str, list[int]]:
        return {
            "system": [self.start_id, *self.encode("developer"), self.message_id],
            "user": [self.start_id, *self.encode("user"), self.message_id],
            "assistant": [
                self.start_id, *self.encode("assistant"), self.channel_id, *self.encode("final"), self.message_id,
            ],
        }  # fmt: skip

    def _content(self, text: str) -> list[int]:
        first, *rest = split_at_images(text)
        ids = self.encode(first) if first else []
        for piece in rest:
            ids.append(self.image_mark_id)
            if piece:
                ids.extend(self.encode(piece))
        return ids

    def render(self, turns: Sequence[Turn], *, open_answer: bool = False) -> Rendered:
        """Lay a dialogue out as harmony tokens.

        ``open_answer`` appends the header of an assistant's final message, for a model to continue.

        Raises:
            UsageError: an unknown role.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(turns):
            if turn.role not in ROLES:
                raise UsageError(f"a dialogue has the role {turn.role!r}; allowed: {', '.join(ROLES)}")
            ids.extend(self._headers[turn.role])
            start = len(ids)
            # One call for the whole text: byte-pair merges may reach across "\n\n".
            ids.extend(self._content(f"# Instructions\n\n{turn.text}\n\n" if turn.role == "system" else turn.text))
            if turn.role == "assistant":
                ids.append(self.return_id if number == len(turns) - 1 and not open_answer else self.end_id)
                spans.append((start, len(ids)))
            else:
                ids.append(self.end_id)
        if open_answer:
            ids.extend(self._headers["assistant"])
        token_ids = np.asarray(ids, dtype=np.int32)
        return Rendered(token_ids, tuple(spans), int((token_ids == self.image_mark_id).sum()))


def train_tokenizer(texts: Iterable[str], out: str | Path, vocab_size: int = 512) -> Tokenizer:
    """Train a small byte-level BPE with harmony's control tokens and write it as a tokenizer folder.

    Merges come first, control tokens after them, ``<|reserved_N|>`` fill up to exactly ``vocab_size`` ids: the order of
    o200k_harmony. The same texts give the same bytes.

    Raises:
        UsageError: ``vocab_size`` cannot hold the 256 bytes and the control tokens.
    """
    smallest = 256 + len(CONTROL_TOKENS)
    if vocab_size < smallest:
        raise UsageError(f"vocab_size={vocab_size} is too small; 256 bytes and the control tokens need {smallest}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS), show_progress=False, special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    # The words of the message headers stand in every dialogue: give each of them a token of its own.
    backend.train_from_iterator((piece for text in texts for piece in (text, *_HEADER_WORDS)), trainer)
    num_free = vocab_size - backend.get_vocab_size() - len(CONTROL_TOKENS)
    reserved = [f"<|reserved_{backend.get_vocab_size() + len(CONTROL_TOKENS) + i}|>" for i in range(num_free)]
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in (*CONTROL_TOKENS, *reserved)])
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=False), encoding="utf-8")
    write_tokenizer_settings(folder)
    return Tokenizer.load(folder)


def write_tokenizer_settings(folder: str | Path) -> None:
    """Write tokenizer_config.json and chat_template.jinja beside a tokenizer.json, for transformers and vLLM."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|startoftext|>", "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>", "image_token": IMAGE_TOKEN, "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (Path(folder) / "chat_template.jinja").write_text(CHAT_TEMPLATE + "\n", encoding="utf-8")
