"""Option likelihoods of our own model, in the layout in which it lies: no generation, one number per option.

Every rank plans the same batches from the questions alone: a question is a row, its options branches of one text
(``branches``), so its picture is encoded and its words are read once. What comes out does not depend on the number of
ranks, up to the order of floating-point sums inside the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.collate import RowShape
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.evaluate.branches import Tree, batch_of_trees, loss_spans, trees_of
from megatron_medgpt.evaluate.controls import blank_picture
from megatron_medgpt.evaluate.documents import Scored, check_decodes, encoded_picture, option_documents
from megatron_medgpt.evaluate.order import by_length
from megatron_medgpt.evaluate.predictions import Prediction
from megatron_medgpt.evaluate.scorers import LIKELIHOOD
from megatron_medgpt.evaluate.tasks.question import Question
from megatron_medgpt.types import ImageSpec, MedBatch


class Forward(Protocol):
    """Token losses in some layout; ``evaluate.forward.LayoutForward`` is one."""

    @property
    def data_rank(self) -> int: ...
    @property
    def data_size(self) -> int: ...
    @property
    def tensor_size(self) -> int: ...
    @property
    def pipeline_size(self) -> int: ...
    @property
    def first_stage(self) -> bool: ...
    def row_length(self, num_positions: int) -> int: ...
    def own_positions(self, sequence_length: int) -> tuple[int, int] | None: ...
    def token_losses(self, batches: Sequence[MedBatch]) -> list[Tensor]: ...
    def gather_data(self, own: Any) -> list[Any]: ...
    def gather_model(self, own: Any) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A question ready for a batch."""

    question: Question
    trees: tuple[Tree, ...]
    """Of its options in order; one, unless they are too many for a row."""
    length: int
    """Positions of the longest tree."""


@dataclass(frozen=True, slots=True)
class _Round:
    """What all ranks work on until the next answers: batches of one shape, those of a data-parallel rank together."""

    own: list[list[Prepared]]
    num_rows: int
    length: int


class LikelihoodEngine:
    """Scores options by mean cross-entropy (nats) over the option's tokens. All ranks call ``answers`` together.

    Args:
        sequence_length: positions of the longest row.
        num_rows: rows of a batch of that length; shorter rows are more.
        batches_per_call: micro-batches per data-parallel rank handed to one schedule, which keep a pipeline full; as
            many as it has stages when not given.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        tokenizer: Tokenizer,
        image: ImageSpec,
        sequence_length: int,
        num_rows: int = 1,
        batches_per_call: int | None = None,
        reader: str = "auto",
        source: PixelSource | None = None,
    ) -> None:
        if sequence_length % forward.tensor_size:
            raise UsageError(
                f"evaluation rows of {sequence_length} positions cannot be split over {forward.tensor_size} "
                "tensor ranks"
            )
        self.settings: dict[str, Any] = {}
        self.image = image
        self._forward, self._tokenizer = forward, tokenizer
        self._positions_per_batch = num_rows * sequence_length
        self._batches_per_call = batches_per_call or forward.pipeline_size
        self._shape = RowShape(
            sequence_length=sequence_length, image_mark_id=tokenizer.image_mark_id, pad_id=tokenizer.pad_id,
            tokens_per_image=image.num_tokens,
        )  # fmt: skip
        self._source = source or PixelSource(image, reader=reader)
        self._blank = blank_picture(image.mean, image.size_px)

    def answers(self, questions: Sequence[Question], protocol: str) -> Iterator[Prediction]:
        """One prediction per question, on every rank; those of a round come when the round is done.

        Raises:
            UsageError: not a likelihood protocol.
        """
        if protocol not in LIKELIHOOD:
            raise UsageError(f"protocol {protocol} needs written answers; allowed here: {', '.join(LIKELIHOOD)}")
        prepared, refused = self._prepare(questions, protocol)
        yield from refused
        for work in self._plan(prepared):
            for predictions in self._forward.gather_data(self._scored(work)):
                yield from predictions

    def _prepare(self, questions: Sequence[Question], protocol: str) -> tuple[list[Prepared], list[Prediction]]:
        prepared, refused = [], []
        for question in questions:
            documents = option_documents(question, protocol, self._tokenizer)
            trees = documents and trees_of(
                documents, image_mark_id=self._shape.image_mark_id, tokens_per_image=self._shape.tokens_per_image,
                longest=self._shape.sequence_length,
            )  # fmt: skip
            length = max((tree.length for tree in trees), default=0)
            if not trees or len(trees) * self._forward.row_length(length) > self._positions_per_batch:
                refused.append(Prediction(question_id=question.question_id, error=self._too_long(question, documents)))
            else:
                prepared.append(Prepared(question, tuple(trees), length))
        return prepared, refused

    def _too_long(self, question: Question, documents: Sequence[Scored]) -> str:
        if not documents:
            return "the question has no options"
        extra = self.image.num_tokens - 1 if question.image is not None else 0
        return (
            f"its longest option needs {max(ids.size for ids, _ in documents) + extra} positions and it has "
            f"{len(documents)}; a row has {self._shape.sequence_length}, a batch {self._positions_per_batch}"
        )

    def _plan(self, prepared: Sequence[Prepared]) -> Iterator[_Round]:
        """Rounds of whole questions, the longest first; the same on every rank, from the questions alone."""
        waiting = by_length(prepared, [one.length for one in prepared])
        lengths = np.array([one.length for one in waiting], np.int64)
        longest = np.maximum.accumulate(lengths[::-1])[::-1]  # of those from here on; buckets are not sorted inside
        rows_left = np.cumsum([len(one.trees) for one in waiting][::-1])[::-1]
        num_batches = self._forward.data_size * self._batches_per_call
        first = self._forward.data_rank * self._batches_per_call
        at = 0
        while at < len(waiting):
            length = self._forward.row_length(int(longest[at]))
            evenly = -(-int(rows_left[at]) // num_batches)
            num_rows = max(min(self._positions_per_batch // length, evenly), len(waiting[at].trees))
            batches = []
            for _ in range(num_batches):
                batches.append(_fitting(waiting, at, num_rows))
                at += len(batches[-1])
            yield _Round(batches[first : first + self._batches_per_call], num_rows, length)

    def _scored(self, work: _Round) -> list[Prediction]:
        built = [self._build(batch, work) for batch in work.own]
        # A rank sees only the pictures of its own positions, and of the first stage; a broken one counts for all.
        seen = [errors for _, errors in built]
        errors = {
            name: why for rank in self._forward.gather_model(seen) for batch in rank for name, why in batch.items()
        }
        losses = self._forward.token_losses([batch for batch, _ in built])
        predictions = []
        for questions, token_loss_BS in zip(work.own, losses):
            rows = iter(token_loss_BS.cpu().double())
            for one in questions:
                means = [
                    float(row_S[start:end].mean())
                    for tree, row_S in zip(one.trees, rows)
                    for start, end in loss_spans(tree, self._shape)
                ]
                name = one.question.question_id
                if name in errors:
                    predictions.append(Prediction(question_id=name, error=errors[name]))
                else:
                    predictions.append(Prediction(question_id=name, option_losses=tuple(means)))
        return predictions

    def _build(self, questions: Sequence[Prepared], work: _Round) -> tuple[MedBatch, dict[str, str]]:
        """The batch, and the questions whose picture cannot be shown (a blank stands in)."""
        errors: dict[str, str] = {}
        try:
            return self._collated(questions, work, errors, whole=False), errors
        except WorkError:
            # One broken picture must not take the batch along: find it by decoding each by itself.
            return self._collated(questions, work, errors, whole=True), errors

    def _collated(
        self, questions: Sequence[Prepared], work: _Round, errors: dict[str, str], *, whole: bool
    ) -> MedBatch:  # fmt: skip
        rows = []
        for one in questions:
            pictures = () if one.question.image is None else (self._picture(one.question, errors, whole),)
            rows += [(tree, pictures) for tree in one.trees]
        return batch_of_trees(
            rows, num_rows=work.num_rows, shape=replace(self._shape, sequence_length=work.length),
            source=self._source if self._forward.first_stage else None,
            keep=self._forward.own_positions(work.length),
        )  # fmt: skip

    def _picture(self, question: Question, errors: dict[str, str], whole: bool) -> bytes:
        try:
            data = encoded_picture(question)
            if whole:
                check_decodes(question, data)
            return data
        except UsageError as error:
            errors[question.question_id] = str(error)
            return self._blank


def _fitting(waiting: Sequence[Prepared], at: int, num_rows: int) -> list[Prepared]:
    """Questions from place ``at`` on whose trees fit into so many rows."""
    end = at
    while end < len(waiting) and len(waiting[end].trees) <= num_rows:
        num_rows -= len(waiting[end].trees)
        end += 1
    return list(waiting[at:end])
