"""Greedy answers of our own model, held by one process.

The simplest form that is right: the whole text is run again for every new token, pictures included. Questions of a
batch are packed into rows, so short prompts cost little; a key-value cache would cost less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.collate import RowShape, batch_of_documents
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.evaluate.documents import check_decodes, encoded_picture, open_document
from megatron_medgpt.evaluate.predictions import Prediction
from megatron_medgpt.evaluate.scorers import GENERATIVE
from megatron_medgpt.evaluate.tasks.question import Question
from megatron_medgpt.types import ImageSpec, MedBatch


class GreedyEngine:
    """Writes answers token by token, always the likeliest.

    Args:
        logits: gives (S, B, V) of a batch, e.g. ``lambda batch: model(batch.to(device), want="logits")`` under
            ``torch.no_grad``; the model lies whole in this process.
        sequence_length: positions of a row; a question and its answer must fit.
    """

    def __init__(
        self,
        logits: Callable[[MedBatch], Tensor],
        *,
        tokenizer: Tokenizer,
        image: ImageSpec,
        sequence_length: int,
        questions_per_batch: int = 8,
        max_new_tokens: int = 64,
        reader: str = "auto",
        description: str = "checkpoint",
        source: PixelSource | None = None,
    ) -> None:
        self.description = f"{description}, greedy, at most {max_new_tokens} new tokens"
        self.image = image
        self._logits, self._tokenizer = logits, tokenizer
        self._questions_per_batch, self._max_new_tokens = questions_per_batch, max_new_tokens
        self._shape = RowShape(
            sequence_length=sequence_length, image_mark_id=tokenizer.image_mark_id, pad_id=tokenizer.pad_id,
            tokens_per_image=image.num_tokens,
        )  # fmt: skip
        self._source = source or PixelSource(image, reader=reader)

    def answers(self, questions: Sequence[Question], protocol: str) -> Iterator[Prediction]:
        """One prediction per question; ``truncated`` where the limit came before the end token."""
        if protocol not in GENERATIVE:
            raise UsageError(f"protocol {protocol} needs no generation; allowed here: {', '.join(GENERATIVE)}")
        for start in range(0, len(questions), self._questions_per_batch):
            ready, prompts, pictures = [], [], []
            for question in questions[start : start + self._questions_per_batch]:
                try:
                    pictures.append(self._pictures(question))
                    prompts.append(self._prompt(question, protocol))
                    ready.append(question)
                except UsageError as error:
                    del pictures[len(prompts) :]
                    yield Prediction(question_id=question.question_id, error=str(error))
            for question, (text, ended) in zip(ready, self._continue(prompts, pictures)):
                yield Prediction(question_id=question.question_id, text=text, truncated=not ended)

    def _pictures(self, question: Question) -> list[bytes]:
        if question.image is None:
            return []
        data = encoded_picture(question)
        check_decodes(question, data)
        return [data]

    def _prompt(self, question: Question, protocol: str) -> np.ndarray:
        ids = open_document(question, protocol, self._tokenizer)
        needed = ids.size + (self.image.num_tokens - 1 if question.image is not None else 0) + self._max_new_tokens
        if needed > self._shape.sequence_length:
            raise UsageError(
                f"question {question.question_id} with its answer needs {needed} positions, a row has "
                f"{self._shape.sequence_length}; evaluate with longer rows"
            )
        return ids

    def _continue(self, prompts: list[np.ndarray], pictures: list[list[bytes]]) -> list[tuple[str, bool]]:
        """(text, whether it ended by itself) of each prompt."""
        written: list[list[int]] = [[] for _ in prompts]
        ends = {self._tokenizer.return_id, self._tokenizer.end_id}
        open_ones = list(range(len(prompts)))
        for _ in range(self._max_new_tokens):
            if not open_ones:
                break
            documents = [
                (np.concatenate([prompts[i], np.asarray(written[i], np.int32)]), (), pictures[i]) for i in open_ones
            ]
            batch, placements = batch_of_documents(documents, shape=self._shape, source=self._source)
            with torch.no_grad():
                logits_SBV = self._logits(batch)
            for i, place in zip(open_ones, placements):
                written[i].append(int(logits_SBV[place.end - 1, place.row].argmax()))
            open_ones = [i for i in open_ones if written[i][-1] not in ends]
        ended = [bool(ids) and ids[-1] in ends for ids in written]
        return [(self._tokenizer.decode(ids[:-1] if done else ids), done) for ids, done in zip(written, ended)]
