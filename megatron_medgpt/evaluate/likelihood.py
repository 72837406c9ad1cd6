"""Option likelihoods of our own model, in the layout in which it lies: no generation, one number per option.

Every rank plans the same batches from the questions alone: whole questions, packed into rows, the options of a
question sharing the pixels of its picture. Batch ``i`` belongs to data-parallel rank ``i % data``. What comes out does
not depend on the number of ranks, up to the order of floating-point sums inside the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.collate import Placement, RowShape, batch_of_documents, pack_documents
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.evaluate.controls import blank_picture
from megatron_medgpt.evaluate.documents import Scored, check_decodes, encoded_picture, option_documents
from megatron_medgpt.evaluate.predictions import Prediction
from megatron_medgpt.evaluate.scorers import LIKELIHOOD
from megatron_medgpt.evaluate.tasks.question import Question
from megatron_medgpt.types import IGNORE_INDEX, ImageSpec, MedBatch


class Forward(Protocol):
    """Token losses in some layout; ``evaluate.forward.LayoutForward`` is one."""

    @property
    def data_rank(self) -> int: ...
    @property
    def data_size(self) -> int: ...
    @property
    def tensor_size(self) -> int: ...
    @property
    def first_stage(self) -> bool: ...
    def own_positions(self, sequence_length: int) -> tuple[int, int] | None: ...
    def token_losses(self, batches: Sequence[MedBatch]) -> list[Tensor]: ...
    def gather_data(self, own: Any) -> list[Any]: ...
    def gather_model(self, own: Any) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A question ready for packing."""

    question: Question
    documents: tuple[Scored, ...]
    lengths: tuple[int, ...]
    """Positions of each document, its image counted in full."""


class LikelihoodEngine:
    """Scores options by mean cross-entropy (nats) over the option's tokens. All ranks call ``answers`` together.

    Args:
        num_rows: rows of a batch, and ``sequence_length`` positions each (a multiple of the tensor degree).
        batches_per_call: micro-batches per data-parallel rank handed to one schedule; more keep a pipeline fuller.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        tokenizer: Tokenizer,
        image: ImageSpec,
        sequence_length: int,
        num_rows: int = 1,
        batches_per_call: int = 4,
        reader: str = "auto",
        description: str = "checkpoint",
        source: PixelSource | None = None,
    ) -> None:
        if sequence_length % forward.tensor_size:
            raise UsageError(
                f"evaluation rows of {sequence_length} positions cannot be split over {forward.tensor_size} "
                "tensor ranks"
            )
        self.description = description
        self.image = image
        self._forward, self._tokenizer = forward, tokenizer
        self._num_rows, self._batches_per_call = num_rows, batches_per_call
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
        plan = self._plan(prepared)
        size, rank = self._forward.data_size, self._forward.data_rank
        per_round = size * self._batches_per_call
        for start in range(0, len(plan), per_round):
            part = plan[start : start + per_round]
            num_own = -(-len(part) // size)
            own = [part[i * size + rank] if i * size + rank < len(part) else [] for i in range(num_own)]
            for predictions in self._forward.gather_data(self._scored(own)):
                yield from predictions

    def _prepare(self, questions: Sequence[Question], protocol: str) -> tuple[list[Prepared], list[Prediction]]:
        prepared, refused = [], []
        for question in questions:
            documents = option_documents(question, protocol, self._tokenizer)
            extra = self.image.num_tokens - 1 if question.image is not None else 0
            lengths = tuple(ids.size + extra for ids, _ in documents)
            if not documents or len(pack_rows(lengths, self._shape.sequence_length)) not in range(
                1, self._num_rows + 1
            ):
                refused.append(Prediction(question_id=question.question_id, error=self._too_long(lengths)))
            else:
                prepared.append(Prepared(question, tuple(documents), lengths))
        return prepared, refused

    def _too_long(self, lengths: tuple[int, ...]) -> str:
        if not lengths:
            return "the question has no options"
        return (
            f"its {len(lengths)} options need {sum(lengths)} positions, a batch has {self._num_rows} x "
            f"{self._shape.sequence_length}"
        )

    def _plan(self, prepared: Sequence[Prepared]) -> list[list[Prepared]]:
        """Batches of whole questions in order, each filled until the next question's options no longer fit."""
        batches: list[list[Prepared]] = []
        lengths: list[int] = []
        room = self._num_rows * self._shape.sequence_length
        for one in prepared:
            together = [*lengths, *one.lengths]
            fits = batches and sum(together) <= room
            if fits and len(pack_rows(together, self._shape.sequence_length)) <= self._num_rows:
                batches[-1].append(one)
                lengths = together
            else:
                batches.append([one])
                lengths = list(one.lengths)
        return batches

    def _scored(self, own: Sequence[Sequence[Prepared]]) -> list[Prediction]:
        built = [self._build(batch) for batch in own]
        # A rank sees only the pictures of its own positions, and of the first stage; a broken one counts for all.
        seen = [errors for _, _, errors in built]
        errors = {
            name: why for rank in self._forward.gather_model(seen) for batch in rank for name, why in batch.items()
        }
        losses = self._forward.token_losses([batch for batch, _, _ in built])
        predictions = []
        for one_batch, (batch, placements, _), token_loss_BS in zip(own, built, losses):
            means = _document_means(batch.label_ids_BS, token_loss_BS.cpu(), placements)
            for one in one_batch:
                own_means, means = means[: len(one.documents)], means[len(one.documents) :]
                name = one.question.question_id
                if name in errors:
                    predictions.append(Prediction(question_id=name, error=errors[name]))
                else:
                    predictions.append(Prediction(question_id=name, option_losses=tuple(own_means)))
        return predictions

    def _build(self, batch: Sequence[Prepared]) -> tuple[MedBatch, list[Placement], dict[str, str]]:
        """The batch, where its documents lie, and the questions whose picture cannot be shown (a blank stands in)."""
        errors: dict[str, str] = {}
        try:
            return *self._collated(batch, errors, whole=False), errors
        except WorkError:
            # One broken picture must not take the batch along: find it by decoding each by itself.
            return *self._collated(batch, errors, whole=True), errors

    def _collated(
        self, batch: Sequence[Prepared], errors: dict[str, str], *, whole: bool
    ) -> tuple[MedBatch, list[Placement]]:
        documents = []
        for one in batch:
            images = [] if one.question.image is None else [self._picture(one.question, errors, whole)]
            documents += [(ids, spans, images) for ids, spans in one.documents]
        return batch_of_documents(
            documents, shape=self._shape, source=self._source, num_rows=self._num_rows,
            keep=self._forward.own_positions(self._shape.sequence_length), with_pixels=self._forward.first_stage,
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


def pack_rows(lengths: Sequence[int], sequence_length: int) -> list[list[int]]:
    """Rows for these documents, or none when one is longer than a row."""
    return [] if max(lengths, default=0) > sequence_length else pack_documents(lengths, sequence_length)


def _document_means(label_ids_BS: Tensor, token_loss_BS: Tensor, placements: Sequence[Placement]) -> list[float]:
    """Mean loss over the targets of each document, summed in float64."""
    means = []
    for place in placements:
        targets = label_ids_BS[place.row, place.start : place.end] != IGNORE_INDEX
        losses = token_loss_BS[place.row, place.start : place.end].double()
        means.append(float((losses * targets).sum() / targets.sum()))
    return means
