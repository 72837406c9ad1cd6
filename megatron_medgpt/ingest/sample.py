"""A record and its decoded images to the tokens of one training sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from megatron_medgpt.data.text import IMAGE_MARK, Tokenizer
from megatron_medgpt.ingest.decode import Decoded
from megatron_medgpt.ingest.facts import Facts, facts_of_sample, facts_of_table
from megatron_medgpt.ingest.identity import sample_id
from megatron_medgpt.ingest.sources import Record, RecordError
from megatron_medgpt.types import Sample


def make_sample(
    record: Record, images: Sequence[Decoded], tokenizer: Tokenizer, *, key: bytes, longest_tokens: int
) -> Sample:
    """Tokens, targets, images, an opaque id, and what ``facts_of`` the record says.

    Raises:
        RecordError: the sample is longer than ``longest_tokens`` (an image counted as one), marks and images differ, or
            the vocabulary cannot spell a text.
    """
    rendered = tokenizer.render(record.turns)
    if rendered.num_images != len(images):
        raise RecordError("marks-and-images-differ")
    if rendered.token_ids.size > longest_tokens:
        raise RecordError("over-long")
    if tokenizer.unknown_id is not None and tokenizer.unknown_id in rendered.token_ids:
        raise RecordError("not-in-vocabulary")
    facts = facts_of(record, images)
    return Sample(
        sample_id=sample_id(key, record.source_id), token_ids=rendered.token_ids, target_spans=rendered.target_spans,
        images=tuple(image.picture.encoded for image in images), modality=facts.modality, body_part=facts.body_part,
        view=facts.view, laterality=facts.laterality,
    )  # fmt: skip


def facts_of(record: Record, images: Sequence[Decoded]) -> Facts:
    """Modality, body part, view and laterality: the table's, else those of the files."""
    stated = facts_of_table(record.modality, body_part=record.body_part, view=record.view, laterality=record.laterality)
    return facts_of_sample(stated, (image.facts for image in images))


def repeat_marks(record: Record, counts: Sequence[int]) -> Record:
    """The record with the mark of its n-th file repeated ``counts[n]`` times: a file may become several pictures."""
    if all(count == 1 for count in counts):
        return record
    left = iter(counts)
    turns = tuple(
        replace(turn, text=re.sub(re.escape(IMAGE_MARK), lambda mark: mark[0] * next(left), turn.text))
        for turn in record.turns
    )
    return replace(record, turns=turns)
