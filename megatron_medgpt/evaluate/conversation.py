"""One question to an exported folder, through transformers; the answer comes as it is written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.evaluate.engine import check_effort
from megatron_medgpt.evaluate.scorers.harmony import final_channel
from megatron_medgpt.parallel.platform import platform

_WAIT_S = 1.0


class HuggingFaceConversation:
    """An image-text-to-text model of a Hugging Face folder, greedy. No remote code is run, nothing is fetched.

    Args:
        folder: what ``medgpt convert megatron-to-hf`` wrote.
        device: ``auto`` (CUDA where there is a device), ``cuda`` or ``cpu``.
        reasoning_effort: passed to the chat template of a model that thinks first (GPT-oss: low, medium, high).
    """

    def __init__(
        self, folder: Path | str, *, device: str = "auto", max_new_tokens: int = 512,
        reasoning_effort: str | None = None,
    ) -> None:  # fmt: skip
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.folder, self.max_new_tokens, self.reasoning_effort = Path(folder), max_new_tokens, reasoning_effort
        if not (self.folder / "config.json").is_file():
            raise UsageError(f"--hf {folder}: no config.json there; give the folder that convert wrote")
        if max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {max_new_tokens} must be at least 1")
        place = platform(0, device)
        try:
            self._processor = AutoProcessor.from_pretrained(self.folder, local_files_only=True)
            check_effort(self._processor, folder, reasoning_effort)
            self._model = AutoModelForImageTextToText.from_pretrained(
                self.folder, dtype="auto", local_files_only=True
            ).to(place.device)
        except (OSError, ValueError) as error:
            raise UsageError(f"--hf {folder} cannot be opened as a model of images and text: {error}") from None
        self._model.eval()
        self.description = f"{self.folder.name} on {place.name}"

    def stream(self, question: str, picture: Image.Image | None) -> Iterator[str]:
        """The answer so far, again and again until it is whole. Thinking is not shown; a cut one ends in an ellipsis.

        Raises:
            UsageError: an empty question, or one that is too long for the model.
            WorkError: the model failed, or wrote nothing to be shown.
        """
        from transformers import TextIteratorStreamer

        inputs = self._inputs(question, picture)
        streamer = TextIteratorStreamer(
            self._processor.tokenizer, skip_prompt=True, timeout=_WAIT_S, skip_special_tokens=False
        )
        outcome: dict[str, Any] = {}
        arguments = {**inputs, "streamer": streamer, "do_sample": False, "max_new_tokens": self.max_new_tokens}
        worker = threading.Thread(target=self._generate, args=(arguments, outcome), daemon=True)
        worker.start()
        text = ""
        for piece in _pieces(streamer, worker):
            text += piece
            yield (final_channel(text) or "").strip()
        worker.join()
        if "error" in outcome:
            raise WorkError(f"the model failed: {outcome['error']}") from outcome["error"]
        whole = (final_channel(text) or "").strip()
        if not whole:
            raise WorkError("the model's answer is empty; ask in other words, or allow more --max-new-tokens")
        yield f"{whole} …" if outcome["truncated"] else whole

    def answer(self, question: str, picture: Image.Image | None) -> str:
        """The whole answer."""
        *_, last = self.stream(question, picture)
        return last

    def _inputs(self, question: str, picture: Image.Image | None) -> dict[str, Any]:
        # Control tokens that a person types are words: the processor would take an image mark for a second image.
        words = question.strip().replace("<|", "< |")
        if not words:
            raise UsageError("the question is empty; ask something about the image")
        content: list[dict[str, str]] = [{"type": "text", "text": words}]
        if picture is not None:
            content.insert(0, {"type": "image"})
        settings = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        text = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False, **settings
        )
        images = None if picture is None else [picture.convert("RGB")]
        inputs = self._processor(text=[text], images=images, return_tensors="pt").to(self._model.device)
        room = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        needed = inputs["input_ids"].shape[1] + self.max_new_tokens
        if room is not None and needed > room:
            raise UsageError(f"question and answer may take {needed} tokens, the model has {room}; ask less at once")
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        return dict(inputs)

    def _generate(self, arguments: dict[str, Any], outcome: dict[str, Any]) -> None:
        import torch

        try:
            with torch.inference_mode():
                output = self._model.generate(**arguments)
        except Exception as error:  # of a thread: it is raised where the answer is read
            outcome["error"] = error
            return
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        outcome["truncated"] = not ends.intersection(output[0, arguments["input_ids"].shape[1] :].tolist())


def _pieces(streamer: Any, worker: threading.Thread) -> Iterator[str]:
    """The streamer's pieces; it ends also when the worker died and will never end it."""
    from queue import Empty

    while True:
        try:
            yield next(streamer)
        except StopIteration:
            return
        except Empty:
            if not worker.is_alive():
                return
