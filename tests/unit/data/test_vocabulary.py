"""tiktoken files and sentencepiece models give the tokens of their own libraries; no text gives a control token."""

import ast
import base64
import inspect
import io
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.text import CONTROL_TOKENS, Tokenizer, Turn
from megatron_medgpt.data.vocabulary import O200K_PIECES, _byte_letters

TEXTS = [
    "A round lesion in the upper left lobe, 12 mm.\nNo effusion.", "The patient's chest X-ray shows nothing.",
    "  Two  spaces, tabs\tand\n\nline breaks ", "Läsion im linken Oberlappen; 磁共振成像. 🩻", "don't I'LL 1234567", "",
    "<s> </s> <unk> <0x41> <|end|> <|return|>", "qzj",
]  # fmt: skip
LETTERS = st.sampled_from("abcdeé ,.\nAB12<>|'磁🩻")
ASK = [Turn("user", "<image>\nWhere is the lesion?"), Turn("assistant", "left"), Turn("user", "Size?"),
       Turn("assistant", "small")]  # fmt: skip


@pytest.fixture(scope="module")
def tiktoken_file(tokenizer, tmp_path_factory):
    """The ranks of a trained byte-level vocabulary, as tiktoken writes them."""
    model = json.loads(tokenizer.tokenizer_json)["model"]
    byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokens = [bytes(byte_of[c] for c in piece) for piece, _ in sorted(model["vocab"].items(), key=lambda kv: kv[1])]
    tokens.append(b"qzj")  # no merge leads to it: only a piece that is looked up whole can be this token
    path = tmp_path_factory.mktemp("tiktoken") / "small.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def theirs(path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in path.read_text().splitlines())}
    return tiktoken.Encoding("small", pat_str=O200K_PIECES, mergeable_ranks=ranks, special_tokens={})


def test_a_tiktoken_file_gives_tiktokens_tokens(tiktoken_file):
    ours, reference = Tokenizer.load(tiktoken_file), theirs(tiktoken_file)
    for text in TEXTS:
        assert ours.encode(text) == reference.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text(LETTERS, max_size=40))
def test_any_text_gives_tiktokens_tokens(tiktoken_file, text):
    assert _loaded(tiktoken_file).encode(text) == _loaded(tiktoken_file, theirs).encode_ordinary(text)


_LOADED = {}


def _loaded(path, load=Tokenizer.load):
    if (path, load) not in _LOADED:
        _LOADED[path, load] = load(path)
    return _LOADED[path, load]


def test_the_pattern_is_o200ks():
    openai = pytest.importorskip("tiktoken_ext.openai_public")
    tree = ast.parse(inspect.getsource(openai.o200k_base))
    (pattern,) = (n.value.args[0] for n in ast.walk(tree) if isinstance(n, ast.Assign) and n.targets[0].id == "pat_str")
    assert "|".join(piece.value for piece in pattern.elts) == O200K_PIECES


def test_a_whole_o200k_file_has_gpt_oss_ids(tmp_path):
    # Bytes and then every three-byte string in order: as many ranks as o200k_base has.
    tokens = [bytes([b]) for b in range(256)]
    tokens += [number.to_bytes(3, "big") for number in range(199_998 - 256)]
    path = tmp_path / "o200k_base.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    ours = Tokenizer.load(path)
    assert ours.vocab_size == 201_088
    assert (ours.pad_id, ours.return_id, ours.channel_id, ours.start_id, ours.end_id, ours.message_id) == (
        199_999, 200_002, 200_005, 200_006, 200_007, 200_008,
    )  # fmt: skip
    assert ours.image_mark_id == 200_013


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bytes are missing"), (b"YQ== 0\n", "ranks have gaps"), (b"not base64 at all\n", "not a tik"),
        (b"YQ== x\n", "is not a tiktoken file"), (b"\xff\xfe\n", "is not a tiktoken file"),
    ],
)  # fmt: skip
def test_what_is_no_tiktoken_file_is_refused(tmp_path, content, message):
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        Tokenizer.load(tmp_path)


KINDS = {
    "bpe with bytes": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                       "remove_extra_whitespaces": False},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True},
    "unigram": {"model_type": "unigram", "user_defined_symbols": ["<sep>"]},
    "bpe without prefix": {"model_type": "bpe", "add_dummy_prefix": False},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def sentencepiece_file(request, tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS[:5], "Where is the lesion?", "A mass in the lobe."] * 20), model_writer=out,
        vocab_size=360 if "bytes" in request.param else 100, character_coverage=1.0, hard_vocab_limit=False,
        num_threads=1, minloglevel=2, **KINDS[request.param],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(out.getvalue())
    return path


def test_a_sentencepiece_model_gives_its_own_tokens(sentencepiece_file):
    import sentencepiece

    ours = Tokenizer.load(sentencepiece_file.parent)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    for text in TEXTS[:6]:
        assert ours.encode(text) == reference.encode(text), text
    assert ours.vocab_size == reference.vocab_size() + len(CONTROL_TOKENS)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(LETTERS, max_size=30))
def test_any_text_gives_sentencepieces_text_and_no_control_token(sentencepiece_file, text):
    import sentencepiece

    ours = _loaded(sentencepiece_file)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    ids = ours.encode(text)
    control = {i for i in range(reference.vocab_size()) if reference.is_control(i)}
    assert not control.intersection(ids) and max(ids, default=0) < reference.vocab_size()
    if ours.unknown_id not in ids:
        assert ours.decode(ids).strip() == reference.decode(reference.encode(text)).strip()


def test_control_pieces_and_bytes_written_out_stay_text(sentencepiece_file):
    import sentencepiece

    ours = Tokenizer.load(sentencepiece_file)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    ids = ours.encode(TEXTS[6])
    assert not {i for i in range(reference.vocab_size()) if reference.is_control(i)}.intersection(ids)
    if ours.unknown_id is None:
        assert ours.decode(ids).strip() == TEXTS[6]
    else:
        assert ours.unknown_id in ids  # <, | and > were never seen by this vocabulary


def test_a_dialogue_has_its_marks_targets_and_ends(sentencepiece_file):
    ours = Tokenizer.load(sentencepiece_file)
    rendered = ours.render(ASK)
    ends = [int(rendered.token_ids[end - 1]) for _, end in rendered.target_spans]
    assert ends == [ours.end_id, ours.return_id]
    texts = [ours.decode(rendered.token_ids[a:b]).strip() for a, b in rendered.target_spans]
    assert (texts, rendered.num_images) == (["left", "small"], 1)


def test_the_same_file_gives_the_same_tokenizer_in_every_process(sentencepiece_file, tiktoken_file):
    program = "import sys; from megatron_medgpt.data.text import Tokenizer\nfor p in sys.argv[1:]: " + (
        "print(Tokenizer.load(p).fingerprint)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, sentencepiece_file, tiktoken_file], capture_output=True, text=True, timeout=600
    ).stdout.split()
    assert found == [Tokenizer.load(sentencepiece_file).fingerprint, Tokenizer.load(tiktoken_file).fingerprint]


def test_what_is_no_sentencepiece_model_is_refused(tmp_path):
    for content in (b"", b"\xff\xff\xff\xff", b"nothing of the kind"):
        (tmp_path / "x.model").write_bytes(content)
        with pytest.raises(UsageError, match="is not a sentencepiece model"):
            Tokenizer.load(tmp_path)


def test_a_text_that_the_vocabulary_cannot_spell_is_rejected(tmp_path):
    from megatron_medgpt.ingest.sample import make_sample
    from megatron_medgpt.ingest.sources import Record, RecordError

    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a lesion user assistant developer final"] * 20), model_writer=out, vocab_size=60,
        hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "t.model").write_bytes(out.getvalue())
    ours = Tokenizer.load(tmp_path)
    good, bad = (Record(0, (), (Turn("user", "a lesion"), Turn("assistant", text))) for text in ("a user", "a 磁"))
    options = {"key": b"k" * 32, "longest_tokens": 100}
    assert make_sample(good, [], ours, **options).token_ids.size
    with pytest.raises(RecordError, match="not-in-vocabulary"):
        make_sample(bad, [], ours, **options)
