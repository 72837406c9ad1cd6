"""The published rules of scoring written down a second time, from their descriptions, sharing no code with ours."""

from __future__ import annotations

import re
from difflib import SequenceMatcher


def letter(texts: list[str], answer: str, output: str) -> bool:
    """Whether an output is right under the letter protocol, step by step from its description."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"[: len(texts)]
    gold = answer
    for letter, text in zip(alphabet, texts):
        if text == answer:
            gold = letter
    choices = [f"{letter}. {text}".lower() for letter, text in zip(alphabet.upper(), texts)]

    pieces, rest = [], output
    while "<answer>" in rest:
        _, rest = rest.split("<answer>", 1)
        if "</answer>" not in rest:
            break
        piece, rest = rest.split("</answer>", 1)
        pieces.append(piece)
    inside = "".join(piece + " " for piece in pieces).strip()
    text = (inside if inside else output).lower()

    letters = list(alphabet)
    if text.split("\n\n")[0] in letters:
        text = text.split("\n\n")[0]
    elif text.split("\n\n")[-1].split(".")[0] in letters:
        text = text.split("\n\n")[-1].split(".")[0]

    if "boxed" in text:
        text = balanced(text)
    elif "<answer>" in text:
        opened = [part.split("</answer>")[0] for part in text.split("<answer>")[1:] if "</answer>" in part]
        text = " ".join(opened).strip() or text
    for phrase in ("**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:", "答案:",
                   "final answer", "final answer is"):  # fmt: skip
        text = text[text.rindex(phrase) + len(phrase) :] if phrase in text else text

    text = text.strip().lower().replace("\n", "")
    head = text.partition(".")[0].rpartition(":")[2]
    gold = gold.strip().lower()
    if head == gold:
        return True
    if head in letters:
        return choices[letters.index(head)] == gold
    if head in choices:
        return gold in letters and choices.index(head) == letters.index(gold)
    best, best_ratio = 0, 0.0
    for place, choice in enumerate(choices):
        ratio = SequenceMatcher(None, choice, text).ratio()
        if ratio > best_ratio:
            best, best_ratio = place, ratio
    return gold in (letters[best], choices[best])


def balanced(text: str) -> str:
    start = text.rfind("\\boxed{")
    if start < 0:
        return "None"
    depth, inside = 0, ""
    for character in text[start + 7 :]:
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth < 0:
                return inside.strip() or "none"
        inside += character
    return "None"


def official(options: list[str], output: str) -> int | None:
    """OmniMedVQA's question-answering score: the first option that is strictly more similar than all before it."""
    best, kept = 0, None
    for place, option in enumerate(options):
        ratio = SequenceMatcher(a=option, b=output).ratio()
        if ratio > best:
            best, kept = ratio, place
    return kept


def short(answer: str, output: str, closed: bool) -> tuple[bool, float, float]:
    """(right, F1, recall) of an open or yes/no question: MedEvalKit's rule with its two slips mended."""
    gold = answer.lower().strip()
    inside = balanced(output)
    if inside in ("None", "none"):
        tags = re.findall(r"<answer>(.*?)</answer>", output, re.S)
        inside = " ".join(tags).strip() or output
    said = inside.strip().lower()
    if "boxed" in said:
        said = balanced(said).lower()
    elif re.search(r"<answer>.*?</answer>", said, re.S):
        said = " ".join(re.findall(r"<answer>(.*?)</answer>", said, re.S)).strip() or said
    for phrase in ("**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:", "答案:",
                   "final answer", "final answer is"):  # fmt: skip
        said = said.rpartition(phrase)[2]
    said = said.strip()
    plain = "".join(character for character in said if character not in "\n.")
    if gold in ("yes", "no"):
        words = {word for word in ("yes", "no") if word in plain}
        right = words == {gold}
    else:
        right = (plain if closed else said) == gold
    a, b = set(gold.split()), set(said.split())
    if not a and not b:
        return right, 1.0, 1.0
    shared = len(a & b)
    return right, (2 * shared / (len(a) + len(b)) if shared else 0.0), (shared / len(a) if shared else 0.0)


def final(text: str) -> str | None:
    """The final channel of a harmony answer that is written out with its control tokens."""
    if "<|channel|>" not in text:
        return re.split(r"<\|(?:return|end|call)\|>", text)[0]
    messages = []
    for part in text.split("<|channel|>")[1:]:
        header, mark, body = part.partition("<|message|>")
        if mark and re.match(r"\s*final\b", header) and "<" not in header:
            messages.append(re.split(r"<\|(?:end|return|call|start)\|>", body)[0].strip())
    return messages[-1] if messages else None
