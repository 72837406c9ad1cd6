"""Tokenizers in other files than tokenizer.json, turned into one: tiktoken ranks and sentencepiece models.

What comes out is the whole tokenizer with harmony's control tokens, as the same bytes for the same file, so that
everything else (fingerprints, shards, exports) knows one kind. A tiktoken file of GPT-oss (o200k) keeps its ids. Behind
a sentencepiece model, which has no such tokens, they follow its vocabulary.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_medgpt.config.errors import UsageError

O200K_PIECES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How o200k splits text before byte-pair merging (tiktoken_ext/openai_public.py)."""
_O200K_SIZE, _HARMONY_SIZE = 199_998, 201_088
_OTHER_PATTERNS = {100_256: "cl100k", 50_256: "r50k", 50_280: "p50k"}
"""Sizes of tiktoken files that split text in another way, which the file does not say."""
_CONTROL_OF_O200K = {
    199_998: "<|startoftext|>", 199_999: "<|endoftext|>", 200_002: "<|return|>", 200_003: "<|constrain|>",
    200_005: "<|channel|>", 200_006: "<|start|>", 200_007: "<|end|>", 200_008: "<|message|>", 200_012: "<|call|>",
    200_018: "<|endofprompt|>",
}  # fmt: skip
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2
_SPACE = "▁"
_UNTYPEABLE = "\x00"
"""Before a control piece of a sentencepiece model: texts with NUL are refused, so no text can become one."""


def from_tiktoken(content: bytes, source: str) -> bytes:
    """tokenizer.json of a tiktoken rank file (o200k: GPT-oss's own ids, 201,088 of them).

    Raises:
        UsageError: not such a file, or one whose way to split text is another.
    """
    ranks = _ranks(content, source)
    if len(ranks) in _OTHER_PATTERNS:
        raise UsageError(f"tokenizer {source} is {_OTHER_PATTERNS[len(ranks)]}; GPT-oss needs o200k_base.tiktoken")
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    backend = Tokenizer(
        models.BPE(
            vocab={spelled[token]: rank for token, rank in ranks.items()}, merges=_merges(ranks, ranks, spelled),
            ignore_merges=True,
        )
    )  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    shift = len(ranks) - _O200K_SIZE
    last = _HARMONY_SIZE if shift == 0 else max(_CONTROL_OF_O200K) + 1
    names = [_CONTROL_OF_O200K.get(i, f"<|reserved_{i + shift}|>") for i in range(_O200K_SIZE, last)]
    if shift:
        names[200_013 - _O200K_SIZE] = "<|image|>"
    _add_control(backend, names)
    return backend.to_str(pretty=False).encode()


def _ranks(content: bytes, source: str) -> dict[bytes, int]:
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise UsageError(f"tokenizer {source} is not a tiktoken file: {error}") from error
    if sorted(ranks.values()) != list(range(len(pairs))) or not {bytes([b]) for b in range(256)} <= ranks.keys():
        raise UsageError(f"tokenizer {source} is not a tiktoken file: its ranks have gaps, or bytes are missing")
    return ranks


def _merges(pieces: Iterable, rank_of: Mapping, spelled: Mapping) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best piece first: what merging by a piece's own rank does."""
    merges = []
    for piece in sorted(pieces, key=rank_of.__getitem__):
        ways = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        ways = [way for way in ways if way[0] in rank_of and way[1] in rank_of]
        ways.sort(key=lambda way: (rank_of[way[0]], rank_of[way[1]]))
        merges.extend((spelled[left], spelled[right]) for left, right in ways)
    return merges


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]


def _add_control(backend: Tokenizer, names: Sequence[str]) -> None:
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def from_sentencepiece(content: bytes, source: str, control_tokens: Sequence[str]) -> bytes:
    """tokenizer.json of a sentencepiece model (unigram or BPE) with ``control_tokens`` behind its vocabulary.

    Every text starts with the model's dummy prefix where it has one, as sentencepiece does it.

    Raises:
        UsageError: not such a model, or one with a feature that tokenizer.json cannot express.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise UsageError(f"tokenizer {source} is not a sentencepiece model: {error}") from error
    kinds = {piece.type for piece in model.pieces}
    if not model.pieces or model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise UsageError(f"tokenizer {source} is not a sentencepiece model of the kinds unigram or BPE")
    known = {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE}
    if not kinds <= known or model.trainer_spec.treat_whitespace_as_suffix:
        raise UsageError(f"tokenizer {source} has unused pieces or whitespace as suffix; neither can be expressed")
    if _unknown_id(model) is None:
        raise UsageError(f"tokenizer {source} has no piece for what it does not know")
    try:
        return _built(model, control_tokens)
    except Exception as error:  # the library raises plain Exception on pieces and tables that contradict each other
        raise UsageError(f"tokenizer {source} is a damaged sentencepiece model: {error}") from error


def _built(model, control_tokens: Sequence[str]) -> bytes:
    backend = Tokenizer(_unigram(model) if model.trainer_spec.model_type == _UNIGRAM else _bpe(model))
    backend.normalizer = _normalizer(model.normalizer_spec)
    # A byte piece written out in a text must not become that byte.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), behavior="isolated")
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    named = [(_written(piece), piece.type) for piece in model.pieces]
    defined = [name for name, kind in named if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in defined])
    _add_control(backend, [name for name, kind in named if kind in (_CONTROL, _UNKNOWN)])
    _add_control(backend, control_tokens)
    return backend.to_str(pretty=False).encode()


def _written(piece) -> str:
    return _UNTYPEABLE + piece.piece if piece.type in (_CONTROL, _UNKNOWN) else piece.piece


def _unigram(model) -> models.Unigram:
    lowest = min((piece.score for piece in model.pieces if piece.type == _NORMAL), default=0.0)
    vocab = [(_written(piece), piece.score if piece.type == _NORMAL else lowest) for piece in model.pieces]
    return models.Unigram(vocab, _unknown_id(model), model.trainer_spec.byte_fallback)


def _bpe(model) -> models.BPE:
    normal = {piece.piece: -piece.score for piece in model.pieces if piece.type == _NORMAL}
    unknown = _unknown_id(model)
    return models.BPE(
        vocab={_written(piece): number for number, piece in enumerate(model.pieces)},
        merges=_merges(normal, normal, {name: name for name in normal}), byte_fallback=model.trainer_spec.byte_fallback,
        unk_token=None if unknown is None else _written(model.pieces[unknown]), fuse_unk=True,
    )  # fmt: skip


def _unknown_id(model) -> int | None:
    return next((number for number, piece in enumerate(model.pieces) if piece.type == _UNKNOWN), None)


def _normalizer(spec) -> normalizers.Normalizer:
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
