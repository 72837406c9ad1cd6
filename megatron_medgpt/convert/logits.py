"""What two models answer to the same prompts: ours in any layout, transformers', and the numbers between them.

A round trip of tensors proves nothing (a matrix that is transposed on the way in and on the way out comes back clean);
what a model computes does.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.config.load import build
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.parallel.launch import meeting_of

FP32_BOUND = 2e-5
"""Largest difference of fp32 logits, relative to the largest logit where that exceeds 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Token ids with the image mark repeated for every position of an image, and the images' pixels."""

    token_ids: Tensor
    """int64 (n,)."""
    image_starts: tuple[int, ...]
    pixels_ICYX: Tensor
    """float32, normalised; I may be 0."""


def make_prompts(config: ModelConfig, image_token_id: int, *, images: bool, seed: int = 0) -> list[Prompt]:
    """Random prompts longer than the sliding window: text, and (with ``images``) one and two images between text."""
    generator = torch.Generator().manual_seed(seed)
    window, num_tokens, size = config.language.sliding_window, config.tokens_per_image, config.vision.image_size_px

    def text(length: int) -> Tensor:
        ids = torch.randint(0, config.language.vocab_size - 1, (length,), generator=generator)
        return ids + (ids >= image_token_id)  # every id but the image mark's

    def prompt(*parts: int | None) -> Prompt:
        pieces, starts, at = [], [], 0
        for part in parts:
            piece = torch.full((num_tokens,), image_token_id) if part is None else text(part)
            if part is None:
                starts.append(at)
            pieces.append(piece)
            at += len(piece)
        return Prompt(torch.cat(pieces), tuple(starts), torch.randn(len(starts), 3, size, size, generator=generator))

    prompts = [prompt(2 * window + 5), prompt(window + 1), prompt(7)]
    if images:
        prompts += [prompt(3, None, window + 3), prompt(None, 4, None, window // 2)]
    return prompts


@dataclass(frozen=True, slots=True)
class Comparison:
    """Logits of one model against another's over all positions of some prompts."""

    name: str
    num_positions: int
    cosine: float
    """Smallest over the positions."""
    max_difference: float
    argmax_agreement: float
    kl: float
    """Mean Kullback-Leibler divergence from the expected distribution, in nats."""
    largest_logit: float

    @property
    def within_bound(self) -> bool:
        scale = max(1.0, self.largest_logit)
        finite = math.isfinite(self.max_difference) and math.isfinite(self.largest_logit)
        return finite and self.max_difference <= FP32_BOUND * scale and self.argmax_agreement == 1.0


def compare_logits(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> Comparison:
    """Compare (positions, V) logits prompt by prompt; a NaN on either side is a difference of infinity."""
    one = torch.cat([logits.double() for logits in found])
    two = torch.cat([logits.double() for logits in expected])
    difference = (one - two).abs()
    worst = float(torch.where(difference.isnan(), math.inf, difference).max())
    log_two, log_one = two.log_softmax(-1), one.log_softmax(-1)
    return Comparison(
        name=name,
        num_positions=one.shape[0],
        cosine=float(torch.nn.functional.cosine_similarity(one, two, dim=-1).min()),
        max_difference=worst,
        argmax_agreement=float((one.argmax(-1) == two.argmax(-1)).double().mean()),
        kl=float((log_two.exp() * (log_two - log_one)).sum(-1).mean()),
        largest_logit=float(two.abs().max()),
    )


def transformers_logits(model: Any, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Logits (positions, V) of a transformers model, prompt by prompt."""
    found = []
    with torch.no_grad():
        for prompt in prompts:
            images = {"pixel_values": prompt.pixels_ICYX.to(model.dtype)} if prompt.image_starts else {}
            found.append(model(input_ids=prompt.token_ids[None], use_cache=False, **images).logits[0].float())
    return found


def open_transformers(folder: Path, *, images: bool) -> Any:
    """The model of a folder in fp32 on the CPU; MXFP4 is dequantised. Runs no code of the folder's.

    Raises:
        UsageError: config.json names code or an attention implementation, which transformers would go and fetch; or it
            describes parameters that the weights do not have, which transformers would draw at random.
    """
    import transformers

    from megatron_medgpt.convert.safetensor import read_json

    values = read_json(folder / "config.json")
    refuse_code(values, str(folder / "config.json"))
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    if values.get("quantization_config"):
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    kind = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise UsageError(
            f"{folder}: transformers finds no tensor for {len(missing)} parameters, the first {missing[0]}; "
            "config.json and the weights are not of one model"
        )
    model = model.eval().float()
    model.set_attn_implementation("eager")
    return model


def refuse_code(values: Any, where: str) -> None:
    """Raise UsageError when a configuration, at any depth, names code to run."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name == "auto_map" or ("implementation" in name and value not in (None, "eager", "sdpa")):
                raise UsageError(f"{where}: {name}={value!r} names code to run; it is not opened")
            refuse_code(value, where)
    elif isinstance(values, list):
        for value in values:
            refuse_code(value, where)


def layout_from_text(text: str) -> ParallelConfig:
    """``tp2-pp2-ep2`` (any of tp, pp, vpp, ep; ``single`` for none) as a section of the configuration.

    Raises:
        UsageError: the text is not of that form.
    """
    names = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "ep": "expert"}
    fields: dict[str, int] = {}
    for piece in [] if text == "single" else text.split("-"):
        name = piece.rstrip("0123456789")
        if name not in names or name == piece or names[name] in fields:
            raise UsageError(f"layout {text!r}: expected e.g. single, tp2, ep2, tp2-ep2, pp2-vpp2")
        fields[names[name]] = int(piece[len(name) :])
    return ParallelConfig(**fields)


def world_size_of(parallel: ParallelConfig) -> int:
    """The smallest number of ranks that the layout runs on."""
    model = parallel.tensor * parallel.pipeline
    stage = math.lcm(parallel.tensor, parallel.expert)
    return max(model, parallel.pipeline * stage)


def our_logits(
    checkpoint: Path, config: ModelConfig, prompts: Sequence[Prompt], parallel: ParallelConfig, *,
    weights_as: str = "float32", experts_as: str | None = None, timeout_s: float = 1800.0,
) -> list[Tensor]:  # fmt: skip
    """Logits of a checkpoint of ours in a layout, in fp32; the ranks are processes of their own.

    Args:
        weights_as: dtype that the weights are rounded to before they are computed with in fp32.
        experts_as: scale rule; the experts are quantised to MXFP4 and back before that.

    Raises:
        WorkError: a rank failed, or the ranks took longer than ``timeout_s``.
    """
    with tempfile.TemporaryDirectory(prefix="medgpt-verify-") as folder:
        task, result = Path(folder) / "task.pt", Path(folder) / "logits.pt"
        torch.save(
            {
                "settings": json.dumps(
                    {
                        "checkpoint": str(checkpoint), "model": asdict(config), "parallel": asdict(parallel),
                        "weights_as": weights_as, "experts_as": experts_as, "result": str(result),
                    }
                ),
                "prompts": [(p.token_ids, list(p.image_starts), p.pixels_ICYX) for p in prompts],
            },
            task,
        )  # fmt: skip
        command = [sys.executable, "-m", "megatron_medgpt.convert.rank", str(task)]
        run_ranks(command, world_size_of(parallel), Path(folder), timeout_s)
        if not result.is_file():
            raise WorkError("the ranks ended without writing their logits")
        return torch.load(result, weights_only=True)


def run_ranks(command: Sequence[str], size: int, folder: Path, timeout_s: float) -> None:
    """Run a command as ``size`` ranks of one world on this machine, logs into ``folder``.

    Raises:
        WorkError: a rank failed (with its last line), or they took longer than ``timeout_s``. None is left running.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + timeout_s
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for rank in range(size):
                meeting, descriptors = meeting_of(rank, listener)
                world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **meeting}
                with open(folder / f"rank{rank}.log", "wb") as log:
                    ranks.append(
                        subprocess.Popen(
                            command, env=os.environ | world, stdout=log, stderr=log, start_new_session=True,
                            pass_fds=descriptors,
                        )
                    )  # fmt: skip
        while any(process.poll() is None for process in ranks) and not any(process.returncode for process in ranks):
            if time.monotonic() > deadline:
                raise WorkError(f"the {size} ranks took longer than {timeout_s:.0f} s")
            time.sleep(0.02)
        for rank, process in enumerate(ranks):
            if process.returncode:
                said = (folder / f"rank{rank}.log").read_text(errors="replace").strip().splitlines()
                raise WorkError(f"rank {rank} of {size} failed: {said[-1] if said else 'no message'}")
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def config_of_task(settings: Mapping[str, Any]) -> tuple[ModelConfig, ParallelConfig]:
    """The two configurations of a task file."""
    return (
        build(ModelConfig, settings["model"], "model"),
        build(ParallelConfig, settings["parallel"], "parallel"),
    )
