"""Option likelihoods of an exported folder, by transformers alone: the same documents as a checkpoint is asked with."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.evaluate.documents import Scored, option_documents
from megatron_medgpt.evaluate.engine import HuggingFaceEngine
from megatron_medgpt.evaluate.folder_identity import folder_fingerprint
from megatron_medgpt.evaluate.predictions import Prediction
from megatron_medgpt.evaluate.scorers import GENERATIVE, LIKELIHOOD
from megatron_medgpt.evaluate.tasks.question import Question
from megatron_medgpt.types import ImageSpec


class HuggingFaceLikelihoodEngine:
    """Scores options by mean cross-entropy (nats) over its tokens, one batch a question. No remote code is run.

    Args:
        folder: what ``medgpt convert megatron-to-hf`` wrote.
        dtype: to load the weights in; the folder's own when not given.
        model: the folder's model where it is loaded already.
    """

    def __init__(
        self, folder: Path | str, *, device: str = "cpu", dtype: torch.dtype | None = None, model: Any = None
    ) -> None:  # fmt: skip
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UsageError(f"--hf {folder}: no config.json there; give the folder that convert wrote")
        self.description = f"transformers {folder.resolve().name}@{folder_fingerprint(folder)}"
        self._device = torch.device(device)
        self._tokenizer = Tokenizer.load(folder)
        self._pictures = AutoProcessor.from_pretrained(folder).image_processor
        self._model = model or AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or "auto")
        self._model.to(device).eval()
        vision = self._model.config.vision_config
        self.image = ImageSpec(
            size_px=vision.image_size, mean=tuple(self._pictures.image_mean), std=tuple(self._pictures.image_std),
            num_tokens=self._model.config.image_seq_length,
        )  # fmt: skip

    def settings(self, protocol: str) -> dict[str, Any]:
        return {}

    def answers(self, questions: Sequence[Question], protocol: str) -> Iterator[Prediction]:
        """One prediction per question; one whose picture cannot be read carries ``error``.

        Raises:
            UsageError: not a likelihood protocol.
        """
        if protocol not in LIKELIHOOD:
            raise UsageError(f"protocol {protocol} needs written answers; allowed here: {', '.join(LIKELIHOOD)}")
        for question in questions:
            try:
                pixels = self._pixels(question)
            except (UsageError, OSError) as error:
                yield Prediction(question_id=question.question_id, error=str(error))
                continue
            documents = option_documents(question, protocol, self._tokenizer)
            losses = self._option_losses(documents, pixels)
            yield Prediction(question_id=question.question_id, option_losses=tuple(losses))

    def _pixels(self, question: Question) -> Tensor | None:
        """(1, 3, size, size) of the question's picture in the model's dtype, by the exported processor."""
        if question.image is None:
            return None
        picture = Image.open(io.BytesIO(question.image_bytes())).convert("RGB")
        return self._pictures(picture, return_tensors="pt")["pixel_values"].to(self._device, self._model.dtype)

    def _option_losses(self, documents: Sequence[Scored], pixels: Tensor | None) -> list[float]:
        expanded = [self._expand(ids, spans) for ids, spans in documents]
        length = max(ids.size for ids, _ in expanded)
        ids_BS = torch.full((len(expanded), length), self._tokenizer.pad_id)
        mask_BS = torch.zeros(len(expanded), length, dtype=torch.long)
        target_BS = torch.zeros(len(expanded), length, dtype=torch.bool)
        for row, (ids, is_target) in enumerate(expanded):
            ids_BS[row, : ids.size] = torch.from_numpy(ids)
            mask_BS[row, : ids.size] = 1
            target_BS[row, : ids.size] = torch.from_numpy(is_target)
        images = {} if pixels is None else {"pixel_values": pixels.expand(len(expanded), -1, -1, -1)}
        with torch.inference_mode():
            logits = self._model(
                input_ids=ids_BS.to(self._device), attention_mask=mask_BS.to(self._device), **images
            ).logits
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2).double().cpu(), ids_BS[:, 1:], reduction="none")
        wanted = target_BS[:, 1:]
        return [float(row[w].mean()) for row, w in zip(loss, wanted)]

    def _expand(self, ids: np.ndarray, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids with the image mark repeated for its image, and which of them are scored."""
        is_target = np.zeros(ids.size, bool)
        for start, end in spans:
            is_target[start:end] = True
        repeats = np.where(ids == self._tokenizer.image_mark_id, self.image.num_tokens, 1)
        return np.repeat(ids.astype(np.int64), repeats), np.repeat(is_target, repeats)


class HuggingFaceFolderEngine:
    """A Hugging Face folder that answers under every protocol, by option likelihoods or in writing; loaded once."""

    def __init__(self, folder: Path | str, **settings: Any) -> None:
        self._greedy = HuggingFaceEngine(folder, **settings)
        self._likelihood = HuggingFaceLikelihoodEngine(folder, model=self._greedy.model)
        self.description, self.image = self._greedy.description, self._likelihood.image

    def settings(self, protocol: str) -> dict[str, Any]:
        return self._of(protocol).settings(protocol)

    def answers(self, questions: Sequence[Question], protocol: str) -> Iterator[Prediction]:
        return self._of(protocol).answers(questions, protocol)

    def _of(self, protocol: str) -> HuggingFaceEngine | HuggingFaceLikelihoodEngine:
        return self._greedy if protocol in GENERATIVE else self._likelihood
