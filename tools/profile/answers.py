"""Benchmark of the evaluation's engines: option losses against one forward per option, writing against transformers.

    python tools/profile/answers.py --out answers.json          # both workloads; --workload demo for one

Questions and pictures are the phantoms'. Both sides of a comparison have the same weights, run in one process with the
same threads, and take turns; what they find is compared every time: losses to 1e-5 relative, tokens one by one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from step import machine
from transformers import LlavaForConditionalGeneration
from workload import SMALL, SMALL_CLIP

from megatron_medgpt.config.schema import ModelConfig, ParallelConfig, ProjectorConfig
from megatron_medgpt.convert.llava import canonical_name, llava_table, published_config
from megatron_medgpt.data.collate import RowShape, batch_of_documents
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.data.text import Tokenizer, train_tokenizer
from megatron_medgpt.evaluate.decode import GreedyWriter, Prompt
from megatron_medgpt.evaluate.documents import encoded_picture, open_document, option_documents, pixel_reader
from megatron_medgpt.evaluate.forward import LayoutForward
from megatron_medgpt.evaluate.likelihood import LikelihoodEngine
from megatron_medgpt.evaluate.tasks import load_task
from megatron_medgpt.evaluate.tasks.question import Question
from megatron_medgpt.ingest.phantom_study import make_phantoms
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel.groups import build_groups, destroy_groups, start, stop
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.recipes.demo import MODEL as DEMO
from megatron_medgpt.types import ImageSpec

MODELS = {
    # LLaVA's layout has no pixel shuffle.
    "demo": replace(DEMO, projector=ProjectorConfig()),
    "small": ModelConfig(language=SMALL, vision=SMALL_CLIP),
}
LONGEST = 1024


class Sides:
    """The same random weights in our model and in transformers'."""

    def __init__(self, model: ModelConfig, words: Tokenizer, world, experts: str):
        torch.manual_seed(0)
        config = published_config(model, words.image_mark_id)
        self.published = LlavaForConditionalGeneration._from_config(
            config, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self.published.model.language_model.set_experts_implementation(experts)
        with torch.no_grad():
            for parameter in self.published.parameters():
                if parameter.ndim > 1:  # wide enough that every question is answered differently
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
        layout = make_layout(ParallelConfig(), model, world.size)
        groups = build_groups(layout)
        (ours,) = build_model(model, layout=layout, groups=groups, dtype=torch.float32)
        tensors = {canonical_name(name): tensor for name, tensor in self.published.state_dict().items()}
        ours.load_state_dict(llava_table(model).to_ours(tensors)[0], strict=True)
        self.words = words
        self.image = ImageSpec(
            size_px=model.vision.image_size_px, mean=model.vision.mean, std=model.vision.std,
            num_tokens=model.tokens_per_image,
        )  # fmt: skip
        self.forward = LayoutForward([ours], groups, world.device)
        self.source = PixelSource(self.image, reader="pillow")
        self.shape = RowShape(
            sequence_length=LONGEST, image_mark_id=words.image_mark_id, pad_id=words.pad_id,
            tokens_per_image=self.image.num_tokens,
        )  # fmt: skip


def option_losses(sides: Sides, questions: list[Question], repeats: int) -> dict:
    """The engine against a forward for every option of every question."""
    engine = LikelihoodEngine(
        sides.forward, tokenizer=sides.words, image=sides.image, sequence_length=LONGEST, num_rows=2,
        source=sides.source,
    )  # fmt: skip

    def ours() -> np.ndarray:
        found = {p.question_id: p.option_losses for p in engine.answers(questions, "chat-likelihood")}
        return np.concatenate([found[question.question_id] for question in questions])

    def naive() -> np.ndarray:
        means = []
        for question in questions:
            for ids, spans in option_documents(question, "chat-likelihood", sides.words):
                length = ids.size + sides.image.num_tokens - 1
                batch, _ = batch_of_documents(
                    [(ids, spans, [encoded_picture(question)])], shape=replace(sides.shape, sequence_length=length),
                    source=sides.source,
                )  # fmt: skip
                (losses_BS,) = sides.forward.token_losses([batch])
                means.append(float(losses_BS.double().sum() / batch.num_targets))
        return np.array(means)

    figures, found = in_turn({"ours": ours, "naive": naive}, repeats)
    np.testing.assert_allclose(found["ours"], found["naive"], rtol=1e-5)
    return {"what": "option losses", "against": "one forward per option", "num": len(found["ours"])} | figures


def written(sides: Sides, questions: list[Question], new_tokens: int, repeats: int) -> dict:
    """Greedy writing of a batch of prompts of different lengths against ``generate``."""
    prompts = [
        Prompt(token_ids=open_document(question, "letter", sides.words), images=(encoded_picture(question),))
        for question in questions
    ]
    writer = GreedyWriter(sides.forward, shape=sides.shape, source=sides.source)
    longest = max(map(writer.length_of, prompts))
    mark, width = sides.words.image_mark_id, sides.image.num_tokens

    def ours() -> list[list[int]]:
        return writer.write([prompts], max_new_tokens=new_tokens, ends=frozenset(), longest=longest)[0]

    def theirs() -> list[list[int]]:
        ids_BS = torch.full((len(prompts), longest), sides.words.pad_id)
        mask_BS = torch.zeros_like(ids_BS)
        for row, prompt in enumerate(prompts):
            ids = np.repeat(prompt.token_ids, np.where(prompt.token_ids == mark, width, 1))
            ids_BS[row, longest - ids.size :] = torch.from_numpy(ids.astype(np.int64))
            mask_BS[row, longest - ids.size :] = 1
        pixels = pixel_reader(sides.source)([image for prompt in prompts for image in prompt.images])
        with torch.inference_mode():
            out_BS = sides.published.generate(
                input_ids=ids_BS, attention_mask=mask_BS, pixel_values=pixels, do_sample=False,
                max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=sides.words.pad_id,
            )  # fmt: skip
        return out_BS[:, longest:].tolist()

    figures, found = in_turn({"ours": ours, "transformers": theirs}, repeats)
    if found["ours"] != found["transformers"]:
        raise SystemExit("the sides do not write the same tokens")
    lengths = sorted(map(writer.length_of, prompts))
    return {
        "what": f"{len(prompts)} answers of {new_tokens} tokens, prompts of {lengths[0]} to {lengths[-1]}",
        "against": "transformers generate", "num": len(prompts) * new_tokens,
    } | figures  # fmt: skip


def in_turn(sides: dict[str, Callable], repeats: int) -> tuple[dict, dict]:
    """Median seconds of each side and ratio of a turn, the least and the greatest, one turn apart as warm-up; and what
    each found."""
    wall, cpu, found = {name: [] for name in sides}, {name: [] for name in sides}, {}
    for repeat in range(repeats + 1):
        for name in sorted(sides, reverse=repeat % 2 == 1):
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            found[name] = sides[name]()
            wall[name].append(time.perf_counter() - wall_start)
            cpu[name].append(time.process_time() - cpu_start)
    first, second = sides
    ratios = sorted(b / a for a, b in zip(cpu[first][1:], cpu[second][1:]))
    figures = {
        "wall_s": {name: statistics.median(times[1:]) for name, times in wall.items()},
        "cpu_s": {name: statistics.median(times[1:]) for name, times in cpu.items()},
        "times_faster_cpu": statistics.median(ratios),
        "times_faster_cpu_range": [ratios[0], ratios[-1]],
    }
    return figures, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", choices=sorted(MODELS), help="may be given several times")
    parser.add_argument("--experts", default="grouped_mm", choices=("eager", "grouped_mm"), help="of transformers")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    world, results = start(), []
    with tempfile.TemporaryDirectory() as folder:
        study = make_phantoms(Path(folder) / "phantoms", num_train=8, num_test=options.questions)
        questions = list(load_task("phantoms", study.questions).questions)
        words = train_tokenizer([q.question for q in questions], Path(folder) / "tokenizer", 512)
        for name in options.workload or MODELS:
            sides = Sides(MODELS[name], words, world, options.experts)
            for result in (
                option_losses(sides, questions, options.repeats),
                written(sides, questions[:8], options.new_tokens, options.repeats),
                written(sides, questions[:1], options.new_tokens, options.repeats),
            ):
                results.append({"workload": name} | result)
                print(json.dumps(results[-1]), flush=True)
            destroy_groups()
    stop()
    if options.out:
        content = {"machine": machine(options.threads), "experts_of_transformers": options.experts, "results": results}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
