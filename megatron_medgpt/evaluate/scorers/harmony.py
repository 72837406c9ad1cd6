"""The part of a GPT-oss answer that is scored: the ``final`` channel of its last assistant message.

Format: openai/harmony, ``<|start|>assistant<|channel|>final<|message|>...<|return|>``. Thinking stands in the
``analysis`` channel and is not an answer.
"""

from __future__ import annotations

import re

_MESSAGE = re.compile(
    r"<\|channel\|>\s*(?P<channel>\w+)[^<]*<\|message\|>(?P<text>.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.S,
)
_STRIPPED = re.compile(r"\Aanalysis.*assistantfinal", re.S)
_LEADING_MESSAGE = re.compile(r"\A\s*final\s*<\|message\|>")
_ENDS = ("<|return|>", "<|end|>", "<|call|>")


def final_channel(text: str) -> str | None:
    """The answer within a model's output; None when it thought but never came to its final channel.

    Text without harmony marks is the answer itself. Also reads output from which a decoder dropped the special tokens
    (``analysis...assistantfinal...``), and output that continues a prompt ending in ``<|channel|>``.
    """
    if _LEADING_MESSAGE.match(text):
        text = "<|channel|>" + text.lstrip()
    if "<|channel|>" in text:
        finals = [match["text"] for match in _MESSAGE.finditer(text) if match["channel"] == "final"]
        return finals[-1].strip() if finals else None
    stripped = _STRIPPED.match(text)
    if stripped:
        return text[stripped.end() :].strip()
    for end in _ENDS:
        text = text.split(end)[0]
    return text
