"""What answers questions: the interface of the engines, and the two that drive standard servers and folders."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.evaluate.documents import encoded_picture
from megatron_medgpt.evaluate.folder_identity import folder_fingerprint
from megatron_medgpt.evaluate.predictions import Prediction
from megatron_medgpt.evaluate.scorers import GENERATIVE, prompt
from megatron_medgpt.evaluate.tasks.question import Question

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024
"""A cap of 64 cut 6,200 of 8,518 answers in one public run of this benchmark; truncations are reported."""
GIVE_UP_AFTER = 50
"""Questions in a row that fail by a server's doing, each with its retries, before the rest is left for later."""
FIRST_FAILED = 8
"""When as many have failed and none was answered, the server is asked for a word; if it has none, the rest is left."""
PROBE_S = 30.0
"""Seconds that it has for that word."""


class Engine(Protocol):
    """Answers questions under a protocol, in any order, each as soon as it is known."""

    @property
    def description(self) -> str:
        """What answered, for the evaluation file; equal for equal models."""

    def settings(self, protocol: str) -> dict[str, Any]:
        """What the answers depend on beside the model (token limit, reasoning effort), for the evaluation file."""

    def answers(self, questions: Sequence[Question], protocol: str) -> Iterator[Prediction]:
        """One prediction per question. An answer that failed carries ``error``; it is not left out."""


class EndpointEngine:
    """An OpenAI-compatible server (vLLM's ``/v1/chat/completions``), greedy.

    ``reasoning_effort`` is sent as such (GPT-oss takes low, medium, high). A failing request is tried ``retries`` times
    with growing pauses, which the log says once; then the question counts as wrong, with the reason. The server is
    taken to be gone when ``GIVE_UP_AFTER`` questions in a row have failed, or the first ``FIRST_FAILED`` and a request
    of one word too (which a server answers that only cannot take these questions).

    vLLM, which says in ``/v1/models`` who it is, is asked to leave special tokens in: without harmony's marks nobody
    could tell a thought that was cut off from an answer.
    """

    def __init__(
        self, url: str, *, model: str | None = None, concurrency: int = 16, retries: int = 4, timeout_s: float = 300,
        max_new_tokens: int = MAX_NEW_TOKENS, reasoning_effort: str | None = None, pause_s: float = 1.0,
        api_key: str | None = None,
    ) -> None:  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--endpoint {url}: must begin with http:// or https://")
        if concurrency < 1:
            raise UsageError(f"--concurrency {concurrency} must be at least 1")
        self.url = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1") + "/v1"
        self.concurrency, self.retries, self.timeout_s, self.pause_s = concurrency, retries, timeout_s, pause_s
        self.max_new_tokens, self.reasoning_effort = max_new_tokens, reasoning_effort
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._given_up, self._has_complained = threading.Event(), False
        self._extensions: dict[str, Any] = {}
        self.model = self._served(model)

    @property
    def description(self) -> str:
        return f"endpoint {self.url} model {self.model}"

    def settings(self, protocol: str) -> dict[str, Any]:
        return _settings(self.max_new_tokens, self.reasoning_effort)

    def answers(self, questions: Sequence[Question], protocol: str) -> Iterator[Prediction]:
        """One prediction per question, in the order in which the server answers.

        Raises:
            WorkError: the server answers nothing, or no longer, or is another model.
        """
        _require_generative(protocol, "an endpoint")
        self._given_up.clear()
        waiting, running, failed_in_a_row, answered = iter(questions), set[Future](), 0, False
        pool = ThreadPoolExecutor(self.concurrency)  # no block of its own, which would wait for slow answers at a stop
        try:
            while True:
                # A bounded window: images are read late, and a killed run loses at most that many answers.
                for question in islice(waiting, 2 * self.concurrency - len(running)):
                    running.add(pool.submit(self._answer, question, protocol))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    prediction, is_its_fault = future.result()
                    failed_in_a_row = failed_in_a_row + 1 if is_its_fault else 0
                    answered = answered or prediction.error is None
                    yield prediction
                    begun_badly = failed_in_a_row == min(FIRST_FAILED, len(questions)) and not answered
                    if failed_in_a_row == GIVE_UP_AFTER or (begun_badly and not self._says_a_word()):
                        number = f"{failed_in_a_row} question{'s' if failed_in_a_row > 1 else ''}"
                        which = f"the first {number} all" if begun_badly else f"{number} in a row"
                        raise WorkError(
                            f"--endpoint {self.url}: {which} failed, the last with: {prediction.error}. "
                            "Nothing more is asked; what was answered is kept, and the same command asks the rest"
                        )
        finally:
            self._given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _says_a_word(self) -> bool:
        """Whether the server answers anything at all, as the model that is asked."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        try:
            reply = self._call("/chat/completions", body, tries=1, timeout_s=min(PROBE_S, self.timeout_s))
            says = bool(reply["choices"]) and reply.get("model") in (None, self.model)
        except (WorkError, KeyError, TypeError, AttributeError):
            return False
        if says:
            log.warning("--endpoint %s answers, but not one of the first questions; the others are asked", self.url)
        return says

    def _served(self, model: str | None) -> str:
        """The model to ask for; the server's own name where none is given, refused where it serves others."""
        try:
            entries = self._call("/models", None, tries=1)["data"]
            served = [str(entry["id"]) for entry in entries]
            if any(entry.get("owned_by") == "vllm" for entry in entries):
                self._extensions = {"skip_special_tokens": False}
        except WorkError as error:
            if "HTTP 401" in str(error) or "HTTP 403" in str(error):
                raise WorkError(f"--endpoint: {error}; give the server's key in MEDGPT_API_KEY") from None
            raise WorkError(f"--endpoint: {error}; is the server up, and is this its address?") from None
        except (KeyError, TypeError, AttributeError):
            raise WorkError(f"--endpoint {self.url}/models does not answer as an OpenAI-compatible server") from None
        if model is None and len(served) == 1:
            return served[0]
        if model not in served:
            raise UsageError(f"--endpoint {self.url} serves {', '.join(served)}, not {model}; name one of them")
        return model

    def _answer(self, question: Question, protocol: str) -> tuple[Prediction, bool]:
        """The prediction, and whether it failed by the server's doing."""
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt(protocol, question)}]
        try:
            if question.image is not None:
                content.insert(0, {"type": "image_url", "image_url": {"url": data_url(encoded_picture(question))}})
        except UsageError as error:
            return Prediction(question_id=question.question_id, error=str(error)), False
        body: dict[str, Any] = {
            "model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0,
            "max_tokens": self.max_new_tokens, **self._extensions,
        }  # fmt: skip
        if self.reasoning_effort is not None:
            body["reasoning_effort"] = self.reasoning_effort
        try:
            reply = self._call("/chat/completions", body)
            if reply.get("model") not in (None, self.model):
                raise WorkError(f"asked for {self.model}, answered by {reply['model']}")
            choice = reply["choices"][0]
            text, end = choice["message"]["content"], choice.get("finish_reason")
            if not isinstance(text, str | None):
                raise TypeError(f"content is a {type(text).__name__}")
        except WorkError as error:
            return Prediction(question_id=question.question_id, error=str(error)), True
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            why = f"not a reply of chat completions ({type(error).__name__}: {error})"
            return Prediction(question_id=question.question_id, error=why), True
        prediction = Prediction(question_id=question.question_id, text=text or "", truncated=end == "length")
        return prediction, False

    def _call(
        self, path: str, body: dict[str, Any] | None, *, tries: int | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        tries = self.retries + 1 if tries is None else tries
        reason, attempt = "", 0
        for attempt in range(1, tries + 1):
            request = urllib.request.Request(self.url + path, data=data, headers=self._headers)
            try:
                with urllib.request.urlopen(request, timeout=timeout_s or self.timeout_s) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_said(error)}"
                if error.code < 500 and error.code not in (408, 429):
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:  # the last: a reply cut off in the middle
                reason = str(getattr(error, "reason", None) or error)
            if attempt == tries:
                break
            self._complain(f"{self.url}{path}: {reason}; such requests are tried {tries} times")
            if self._given_up.wait(self.pause_s * 2 ** (attempt - 1)):
                break
        times = f" {attempt} times, last" if attempt > 1 else ""
        raise WorkError(f"{self.url}{path} failed{times}: {reason}")

    def _complain(self, what: str) -> None:
        """Say the first fault at once; the answers file has those of every question."""
        if not self._has_complained:
            self._has_complained = True
            log.warning("%s", what)


def _said(error: urllib.error.HTTPError) -> str:
    """The first words of what stands behind a refusal, which may be cut off itself."""
    try:
        return " ".join(error.read(300).decode("utf-8", "replace").split())
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def check_effort(processor: Any, folder: Path | str, effort: str | None) -> None:
    """Raise UsageError for a reasoning effort that the chat template of ``folder`` would not read."""
    if effort is not None and "reasoning_effort" not in str(processor.chat_template):
        raise UsageError(
            f"--reasoning-effort {effort}: the chat template of {folder} knows no reasoning effort; leave it out"
        )


class HuggingFaceEngine:
    """A Hugging Face folder of an image-text-to-text model, greedy, through transformers. No remote code is run."""

    def __init__(
        self, folder: Path | str, *, device: str = "cpu", batch_size: int = 8, max_new_tokens: int = MAX_NEW_TOKENS,
        reasoning_effort: str | None = None,
    ) -> None:  # fmt: skip
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.folder, self.batch_size, self.max_new_tokens = Path(folder), batch_size, max_new_tokens
        self.reasoning_effort = reasoning_effort
        if not (self.folder / "config.json").is_file():
            raise UsageError(f"--hf {folder}: no config.json there; give the folder that convert wrote")
        self.description = f"transformers {self.folder.resolve().name}@{folder_fingerprint(self.folder)}"
        self._torch = torch
        self.processor = AutoProcessor.from_pretrained(self.folder)
        self.processor.tokenizer.padding_side = "left"
        check_effort(self.processor, folder, reasoning_effort)
        self.model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype="auto").to(device).eval()

    def settings(self, protocol: str) -> dict[str, Any]:
        return _settings(self.max_new_tokens, self.reasoning_effort)

    def answers(self, questions: Sequence[Question], protocol: str) -> Iterator[Prediction]:
        _require_generative(protocol, "a Hugging Face folder")
        for start in range(0, len(questions), self.batch_size):
            batch = []
            for question in questions[start : start + self.batch_size]:
                try:
                    batch.append((question, *self._rendered(question, protocol)))
                except (UsageError, OSError) as error:
                    yield Prediction(question_id=question.question_id, error=str(error))
            if batch:
                yield from self._generate(batch)

    def _rendered(self, question: Question, protocol: str) -> tuple[str, Image.Image | None]:
        content: list[dict[str, str]] = [{"type": "text", "text": prompt(protocol, question)}]
        picture = None
        if question.image is not None:
            content.insert(0, {"type": "image"})
            picture = Image.open(io.BytesIO(question.image_bytes())).convert("RGB")
        settings = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False, **settings
        )
        return text, picture

    def _generate(self, batch: list[tuple[Question, str, Image.Image | None]]) -> Iterator[Prediction]:
        pictures = [picture for _, _, picture in batch if picture is not None]
        inputs = self.processor(
            text=[text for _, text, _ in batch], images=pictures or None, return_tensors="pt", padding=True
        ).to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with self._torch.inference_mode():
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        for (question, _, _), ids in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist()):
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=False)
            pad = self.processor.tokenizer.pad_token
            yield Prediction(
                question_id=question.question_id,
                text=text.split(pad)[0] if pad else text,
                truncated=not ends.intersection(ids),
            )


def _settings(max_new_tokens: int, reasoning_effort: str | None) -> dict[str, Any]:
    effort = "the model's default" if reasoning_effort is None else reasoning_effort
    return {"greedy": True, "max_new_tokens": max_new_tokens, "reasoning_effort": effort}


def data_url(image: bytes) -> str:
    """An image as the ``data:`` URL that chat servers take."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _require_generative(protocol: str, engine: str) -> None:
    if protocol not in GENERATIVE:
        raise UsageError(
            f"protocol {protocol} needs token losses, which {engine} does not give; use --checkpoint, "
            f"or one of {', '.join(GENERATIVE)}"
        )
