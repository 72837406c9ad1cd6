"""Written answers of our own model, in the layout in which it lies: greedy, with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.collate import RowShape
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.evaluate.decode import GreedyWriter, Prompt
from megatron_medgpt.evaluate.documents import check_decodes, encoded_picture, open_document
from megatron_medgpt.evaluate.forward import LayoutForward
from megatron_medgpt.evaluate.order import by_length
from megatron_medgpt.evaluate.predictions import Prediction
from megatron_medgpt.evaluate.scorers import GENERATIVE
from megatron_medgpt.evaluate.tasks.question import Question
from megatron_medgpt.types import ImageSpec


@dataclass(frozen=True, slots=True)
class _Ready:
    """A question whose prompt fits."""

    question: Question
    prompt: Prompt
    """Without its picture, which is read late."""
    length: int


class GreedyEngine:
    """Writes answers token by token, always the likeliest. All ranks call ``answers`` together.

    The answer begins in the final channel, as the model was trained: there is no thinking, and no effort to choose.

    Args:
        sequence_length: positions that a question and its answer may have.
        questions_per_batch: of one micro-batch; a data-parallel rank has as many of them under way as the pipeline has
            stages.
    """

    def __init__(
        self,
        forward: LayoutForward,
        *,
        tokenizer: Tokenizer,
        image: ImageSpec,
        sequence_length: int,
        questions_per_batch: int = 16,
        max_new_tokens: int = 64,
        reader: str = "auto",
        source: PixelSource | None = None,
    ) -> None:
        self.settings = {"greedy": True, "max_new_tokens": max_new_tokens, "reasoning_effort": "none"}
        self.image = image
        self._forward, self._tokenizer = forward, tokenizer
        self._questions_per_batch, self._max_new_tokens = questions_per_batch, max_new_tokens
        self._sequence_length = sequence_length
        shape = RowShape(
            sequence_length=sequence_length, image_mark_id=tokenizer.image_mark_id, pad_id=tokenizer.pad_id,
            tokens_per_image=image.num_tokens,
        )  # fmt: skip
        self._writer = GreedyWriter(forward, shape=shape, source=source or PixelSource(image, reader=reader))
        self._ends = frozenset({tokenizer.return_id, tokenizer.end_id})

    def answers(self, questions: Sequence[Question], protocol: str) -> Iterator[Prediction]:
        """One prediction per question, on every rank; ``truncated`` where the limit came before the end token.

        Raises:
            UsageError: not a protocol of written answers.
        """
        if protocol not in GENERATIVE:
            raise UsageError(f"protocol {protocol} needs no generation; allowed here: {', '.join(GENERATIVE)}")
        ready, refused = self._prepare(questions, protocol)
        yield from refused
        ready = by_length(ready, [one.length for one in ready])
        num_groups = self._writer.num_groups * self._forward.data_size
        while ready:
            per_group = min(self._questions_per_batch, -(-len(ready) // num_groups))
            groups = [ready[i * per_group : (i + 1) * per_group] for i in range(num_groups)]
            ready = ready[num_groups * per_group :]
            first = self._forward.data_rank * self._writer.num_groups
            longest = max(one.length for group in groups for one in group)
            own = self._written(groups[first : first + self._writer.num_groups], longest)
            for predictions in self._forward.gather_data(own):
                yield from predictions

    def _prepare(self, questions: Sequence[Question], protocol: str) -> tuple[list[_Ready], list[Prediction]]:
        ready, refused = [], []
        for question in questions:
            ids = open_document(question, protocol, self._tokenizer)
            length = ids.size + (self.image.num_tokens - 1 if question.image is not None else 0)
            needed = length + self._max_new_tokens
            if needed > self._sequence_length:
                why = f"with its answer it needs {needed} positions, a row has {self._sequence_length}"
                refused.append(Prediction(question_id=question.question_id, error=why))
            else:
                ready.append(_Ready(question, Prompt(token_ids=ids), length))
        return ready, refused

    def _written(self, groups: Sequence[Sequence[_Ready]], longest: int) -> list[Prediction]:
        predictions: list[Prediction] = []
        asked: list[list[Question]] = [[] for _ in groups]
        prompts: list[list[Prompt]] = [[] for _ in groups]
        for number, group in enumerate(groups):
            for one in group:
                try:
                    images = self._pictures(one.question)
                except UsageError as error:
                    predictions.append(Prediction(question_id=one.question.question_id, error=str(error)))
                    continue
                asked[number].append(one.question)
                prompts[number].append(Prompt(token_ids=one.prompt.token_ids, images=images))
        written = self._writer.write(prompts, max_new_tokens=self._max_new_tokens, ends=self._ends, longest=longest)
        for group_questions, group_tokens in zip(asked, written):
            predictions += [self._prediction(*pair) for pair in zip(group_questions, group_tokens)]
        return predictions

    def _pictures(self, question: Question) -> tuple[bytes, ...]:
        if question.image is None:
            return ()
        data = encoded_picture(question)
        check_decodes(question, data)
        return (data,)

    def _prediction(self, question: Question, tokens: list[int]) -> Prediction:
        ended = tokens[-1] in self._ends
        text = self._tokenizer.decode(tokens[:-1] if ended else tokens)
        return Prediction(question_id=question.question_id, text=text, truncated=not ended)
