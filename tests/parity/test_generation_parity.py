"""Greedy generation with the cache against transformers' ``generate``: the same tokens, one by one, in fp32.

Prompts of different lengths with no image, one and two, beyond the sliding window (16) and YaRN's original length (64);
"""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from published_vision import scatter_weights
from transformers import LlavaForConditionalGeneration

from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import KernelConfig, ModelConfig, ParallelConfig
from megatron_medgpt.convert.llava import canonical_name, llava_table, published_config
from megatron_medgpt.data.collate import RowShape
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.evaluate.decode import GreedyWriter, Prompt
from megatron_medgpt.evaluate.documents import pixel_reader
from megatron_medgpt.evaluate.forward import LayoutForward
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel.groups import build_groups, destroy_groups, start, stop
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.types import ImageSpec

MODEL = ModelConfig(language=replace(TINY, num_layers=4), vision=TINY_CLIP)
MARK = MODEL.language.vocab_size - 1
IMAGE = ImageSpec(
    size_px=TINY_CLIP.image_size_px, mean=TINY_CLIP.mean, std=TINY_CLIP.std, num_tokens=MODEL.tokens_per_image
)
SHAPE = RowShape(sequence_length=400, image_mark_id=MARK, pad_id=0, tokens_per_image=IMAGE.num_tokens)
NEW_TOKENS = 40
PARTS = ((3,), (90,), (4, "image", 9), (2, "image", "image", 31), ("image", 1), (15,), (16,), (17,))


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE.size_px, IMAGE.size_px, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_prompts() -> list[Prompt]:
    random = np.random.default_rng(5)
    prompts = []
    for number, parts in enumerate(PARTS):
        ids = [[MARK] if part == "image" else random.integers(1, MARK, part).tolist() for part in parts]
        images = tuple(picture(10 * number + i) for i in range(parts.count("image")))
        prompts.append(Prompt(token_ids=np.concatenate(ids).astype(np.int32), images=images))
    return prompts


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(published_config(MODEL, MARK)).eval()
    model.model.language_model.set_attn_implementation("eager")
    model.model.language_model.set_experts_implementation("eager")
    scatter_weights(model, seed=13)
    return model


@pytest.fixture(scope="module", params=["auto", "reference"])
def writer(request, published):
    world = start(timeout_s=60, kind="cpu")
    groups = build_groups(make_layout(ParallelConfig(), MODEL, world.size))
    layout = make_layout(ParallelConfig(), MODEL, 1)
    kernels = KernelConfig(attention=request.param)
    (ours,) = build_model(MODEL, layout=layout, groups=groups, dtype=torch.float32, kernels=kernels)
    tensors = {canonical_name(name): tensor for name, tensor in published.state_dict().items()}
    ours.load_state_dict(llava_table(MODEL).to_ours(tensors)[0], strict=True)
    yield GreedyWriter(
        LayoutForward([ours], groups, world.device), shape=SHAPE, source=PixelSource(IMAGE, reader="pillow")
    )
    destroy_groups()
    stop()


@pytest.fixture(scope="module")
def expected(published):
    return [published_tokens(published, prompt) for prompt in make_prompts()]


def published_tokens(published, prompt: Prompt) -> list[int]:
    repeats = np.where(prompt.token_ids == MARK, IMAGE.num_tokens, 1)
    ids = torch.from_numpy(np.repeat(prompt.token_ids, repeats).astype(np.int64))[None]
    pictures = {}
    if prompt.images:
        pictures["pixel_values"] = pixel_reader(PixelSource(IMAGE, reader="pillow"))(list(prompt.images))
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        out = published.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **pictures, **settings
        )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def write(writer, prompts, ends=frozenset()):
    longest = max(map(writer.length_of, prompts))
    return writer.write([prompts], max_new_tokens=NEW_TOKENS, ends=ends, longest=longest)[0]


def test_a_batch_of_unequal_prompts_gets_the_tokens_of_each_alone(writer, expected):
    assert len({token for tokens in expected for token in tokens}) >= 30  # not one token for ever
    assert write(writer, make_prompts()) == expected


@pytest.mark.parametrize("number", [1, 3])
def test_a_prompt_alone_gets_its_tokens(writer, expected, number):
    assert write(writer, [make_prompts()[number]]) == [expected[number]]


def test_sequences_that_end_leave_the_others_as_they_were(writer, expected):
    # Chosen so that the sequences stop at many different steps, one of them never: the batch shrinks several times.
    ends = frozenset({172, 368})
    cut = []
    for tokens in expected:
        stop_at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        cut.append(tokens[: stop_at + 1])
    assert len({len(tokens) for tokens in cut}) >= 6
    assert write(writer, make_prompts(), ends) == cut


def test_windowed_layers_keep_no_more_than_their_window(writer):
    prompts = make_prompts()
    forward = writer._forward
    longest = max(map(writer.length_of, prompts))
    cache = forward.make_cache([writer.length_of(p) for p in prompts], capacity=longest + NEW_TOKENS)
    forward.next_tokens([writer._prompts(prompts, len(prompts), longest)], [cache])
    places = [key.shape[2] for _, (key, _) in sorted(cache._kept.items())]
    assert places == [MODEL.language.sliding_window, longest + NEW_TOKENS] * 2
