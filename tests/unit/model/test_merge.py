"""The merge against a plain loop over positions, forward and gradients, at every cut of the sequence."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medgpt.model.merge import ImageRun, image_runs, merge_images, take_image_rows
from megatron_medgpt.types import ImageSpan

WIDTH = 5


def _random_spans(rng: random.Random, rows: int, length: int, images: int, tokens: int) -> tuple[ImageSpan, ...]:
    """Spans that do not overlap, in any order; images may be named by several spans or by none."""
    spans = []
    for row in range(rows):
        position = rng.randrange(0, tokens + 1)
        while images and position + tokens <= length:
            spans.append(ImageSpan(row=row, start=position, image=rng.randrange(images), num_tokens=tokens))
            position += tokens + rng.choice((0, 0, 1, rng.randrange(1, length)))
    rng.shuffle(spans)
    return tuple(spans)


def _plain_merge(text: torch.Tensor, image_rows: torch.Tensor, spans, first: int) -> torch.Tensor:
    """Position by position with torch.stack, so that autograd alone gives the gradients."""
    places = {(span.start + i, span.row): image_rows[span.image, i] for span in spans for i in range(span.num_tokens)}
    local, rows, _ = text.shape
    return torch.stack(
        [torch.stack([places.get((first + s, b), text[s, b]) for b in range(rows)]) for s in range(local)]
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 3),
    slices=st.sampled_from([1, 2, 4]),
    images=st.integers(0, 3),
    tokens=st.integers(1, 9),
)
def test_merge_equals_a_plain_loop_on_every_slice(seed, rows, slices, images, tokens):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    local = 8
    spans = _random_spans(rng, rows, slices * local, images, tokens)
    features = torch.randn(images, tokens, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    text = torch.randn(slices * local, rows, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(text.shape, generator=generator, dtype=torch.float64)

    expected = _plain_merge(text, features, spans, 0)
    expected_gradients = torch.autograd.grad((expected * probe).sum(), (text, features), allow_unused=True)

    parts = []
    for first in range(0, slices * local, local):
        runs = image_runs(spans, first=first, end=first + local)
        parts.append(merge_images(text[first : first + local], take_image_rows(features, runs), runs))
    merged = torch.cat(parts)
    assert torch.equal(merged, expected)
    gradients = torch.autograd.grad((merged * probe).sum(), (text, features))
    for gradient, plain in zip(gradients, expected_gradients):
        # sums of at most a few numbers whose order may differ
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if plain is None else plain)


def test_slices_share_out_every_image_token_once():
    spans = (ImageSpan(row=0, start=3, image=0, num_tokens=20), ImageSpan(row=1, start=0, image=1, num_tokens=20))
    seen = []
    for first in range(0, 32, 8):
        for run in image_runs(spans, first=first, end=first + 8):
            assert run.start >= 0 and run.start + run.length <= 8
            seen += [(run.row, first + run.start + i, run.image, run.offset + i) for i in range(run.length)]
    assert sorted(seen) == sorted((s.row, s.start + i, s.image, i) for s in spans for i in range(s.num_tokens))


def test_text_without_images_keeps_its_values_and_the_rows_stay_in_the_graph():
    text = torch.randn(8, 2, WIDTH, requires_grad=True)
    features = torch.randn(0, 4, WIDTH, requires_grad=True)
    merged = merge_images(text, take_image_rows(features, ()), ())
    assert torch.equal(merged, text)
    merged.sum().backward()
    assert torch.equal(text.grad, torch.ones_like(text))
    assert features.grad.shape == (0, 4, WIDTH)


def test_the_mark_under_an_image_gets_no_gradient_and_the_image_gets_it_all():
    text = torch.zeros(6, 1, WIDTH, requires_grad=True)
    rows = torch.zeros(2, WIDTH, requires_grad=True)
    merge_images(text, rows, (ImageRun(0, 3, 0, 0, 2),)).sum().backward()
    assert text.grad[:, 0, 0].tolist() == [1, 1, 1, 0, 0, 1]
    assert rows.grad[:, 0].tolist() == [1, 1]


def test_the_text_given_in_is_not_changed():
    text = torch.zeros(4, 1, WIDTH)
    merge_images(text, torch.ones(2, WIDTH), (ImageRun(0, 1, 0, 0, 2),))
    assert text.abs().max() == 0


def test_rows_of_another_number_than_the_runs_need_are_refused():
    with pytest.raises(ValueError, match="3 image rows for runs of 2 tokens"):
        merge_images(torch.zeros(4, 1, WIDTH), torch.ones(3, WIDTH), (ImageRun(0, 1, 0, 0, 2),))


def test_whole_images_in_order_are_taken_without_a_copy():
    features = torch.randn(2, 3, WIDTH)
    rows = take_image_rows(features, (ImageRun(0, 0, 0, 0, 3), ImageRun(0, 5, 1, 0, 3)))
    assert rows.data_ptr() == features.data_ptr()


def test_bf16_rows_get_bf16_gradients_from_an_fp32_stream():
    text = torch.zeros(4, 1, WIDTH, requires_grad=True)
    rows = torch.ones(2, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    merge_images(text, rows, (ImageRun(0, 1, 0, 0, 2),)).sum().backward()
    assert rows.grad.dtype == torch.bfloat16
