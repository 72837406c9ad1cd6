"""Rows by number: exact resume, any data-parallel size, layout of labels and images, and the prefetching thread."""

import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from png_examples import png_of

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.config.schema import AugmentConfig, BlendConfig
from megatron_medgpt.data.augment import augmented, draws
from megatron_medgpt.data.collate import Document, RowShape, batch_of_documents, collate
from megatron_medgpt.data.loader import chain, open_stage
from megatron_medgpt.data.pixels import PixelSource, chosen_decoder
from megatron_medgpt.data.prefetch import Prefetcher
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.square import pad_rgb, square
from megatron_medgpt.types import IGNORE_INDEX, ImageSpec

SPEC = ImageSpec(
    size_px=28,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    num_tokens=4,
)
LENGTH = 96


def stage_of(*folders, weight=1.0, **changes):
    options = {"tokenizer_fingerprint": None, "image": SPEC, "sequence_length": LENGTH, "seed": 5, "reader": "pillow"}
    return open_stage([BlendConfig(path=str(f), weight=weight) for f in folders], **{**options, **changes})


def same(one, two):
    fields = ("token_ids_BS", "label_ids_BS", "position_ids_BS", "document_ids_BS", "modality_ids_BS", "pixels_ICYX")
    return all(torch.equal(getattr(one, f), getattr(two, f)) for f in fields) and (
        (one.image_spans, one.sample_ids, one.num_targets) == (two.image_spans, two.sample_ids, two.num_targets)
    )


@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_resume_at_every_position_gives_the_same_rest(write_dataset, weight):
    folder = write_dataset()
    whole = stage_of(folder, weight=weight)
    rows = 2 * whole.num_rows_per_epoch + 3
    batches = [whole.take(row, 1) for row in range(rows)]
    for start in range(rows):
        resumed = stage_of(folder, weight=weight)
        assert resumed.plan_hash == whole.plan_hash
        assert same(resumed.take(start, 1), batches[start])
        assert resumed.sample_ids(start, rows - start) == [i for b in batches[start:] for i in b.sample_ids]


@pytest.mark.parametrize("data_ranks", [1, 2, 3, 4])
def test_any_number_of_data_ranks_sees_one_global_order(write_dataset, data_ranks):
    stage = stage_of(write_dataset())
    step_rows = 12
    in_order = stage.sample_ids(0, 2 * step_rows)
    share = step_rows // data_ranks
    seen = []
    for step in range(2):
        for rank in range(data_ranks):
            seen += stage.take(step * step_rows + rank * share, share, with_pixels=False).sample_ids
    assert seen == in_order


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order(write_dataset):
    stage = stage_of(write_dataset("one", 40), write_dataset("two", 7, first_id=1000))
    rows = stage.num_rows_per_epoch
    first, second = stage.sample_ids(0, rows), stage.sample_ids(rows, rows)
    expected = sorted(f"{i:032x}" for i in [*range(40), *range(1000, 1007)])
    assert sorted(first) == sorted(second) == expected
    assert first != second


def test_labels_positions_and_documents_are_those_of_the_definition(write_dataset):
    folder = write_dataset()
    dataset, stage = Dataset(folder), stage_of(folder)
    batch = stage.take(0, 4)
    targets = 0
    for row in range(4):
        at = 0
        for number, sample_number in enumerate(stage.samples_of(row)):
            sample = dataset[sample_number]
            expanded, is_target = [], []
            start, end = sample.target_spans_flat.tolist()
            for place, token in enumerate(sample.token_ids.tolist()):
                repeats = SPEC.num_tokens if token == dataset.image_mark_id else 1
                expanded += [token] * repeats
                is_target += [start <= place < end] * repeats
            for offset, token in enumerate(expanded):
                follows = offset + 1 < len(expanded) and is_target[offset + 1]
                assert batch.token_ids_BS[row, at + offset] == token
                assert batch.label_ids_BS[row, at + offset] == (expanded[offset + 1] if follows else IGNORE_INDEX)
                assert batch.position_ids_BS[row, at + offset] == offset
                assert batch.document_ids_BS[row, at + offset] == number
                assert batch.modality_ids_BS[row, at + offset] == sample.modality
                targets += follows
            at += len(expanded)
        assert (batch.token_ids_BS[row, at:] == stage.shape.pad_id).all()
        assert (batch.label_ids_BS[row, at:] == IGNORE_INDEX).all()
        assert (batch.document_ids_BS[row, at:] == len(stage.samples_of(row))).all()
        assert (batch.modality_ids_BS[row, at:] == -1).all()
    assert batch.num_targets == targets


def test_every_span_shows_the_image_of_its_sample(write_dataset):
    folder = write_dataset()
    stage = stage_of(folder)
    batch = stage.take(0, 6)
    source = PixelSource(SPEC, "pillow")
    marks = batch.token_ids_BS == stage.shape.image_mark_id
    for span in batch.image_spans:
        assert marks[span.row, span.start : span.start + span.num_tokens].all()
        marks[span.row, span.start : span.start + span.num_tokens] = False
    assert not marks.any()
    spans = iter(batch.image_spans)
    dataset = Dataset(folder)
    for row in range(6):
        for number in stage.samples_of(row):
            for k in range(int(dataset.num_images[number])):
                record = np.frombuffer(png_of(10 * number + k), np.uint8)
                expected = source.read([(number, k)], lambda _, record=record: ("encoded", record))
                assert torch.equal(batch.pixels_ICYX[next(spans).image], expected[0])


def test_slices_of_the_sequence_list_only_the_images_that_reach_into_them(write_dataset):
    stage = stage_of(write_dataset())
    whole = stage.take(0, 4)
    halves = [stage.take(0, 4, keep=keep) for keep in ((0, LENGTH // 2), (LENGTH // 2, LENGTH))]
    for (first, end), half in zip(((0, LENGTH // 2), (LENGTH // 2, LENGTH)), halves):
        expected = [(s.row, s.start) for s in whole.image_spans if s.start < end and s.start + s.num_tokens > first]
        assert [(s.row, s.start) for s in half.image_spans] == expected
        assert torch.equal(half.label_ids_BS, whole.label_ids_BS)
        for span in half.image_spans:
            (same_span,) = [s for s in whole.image_spans if (s.row, s.start) == (span.row, span.start)]
            assert torch.equal(half.pixels_ICYX[span.image], whole.pixels_ICYX[same_span.image])
    across = [s for s in whole.image_spans if s.start < LENGTH // 2 < s.start + s.num_tokens]
    assert sum(len(h.image_spans) for h in halves) == len(whole.image_spans) + len(across)
    bare = stage.take(0, 4, with_pixels=False)
    assert bare.pixels_ICYX is None
    assert bare.pixels_ICYX is None and bare.image_spans == whole.image_spans


@pytest.mark.parametrize(
    ("keep", "listed"), [((0, 4), 0), ((0, 5), 1), ((3, 5), 1), ((5, 6), 1), ((7, 16), 1), ((8, 16), 0), (None, 1)]
)
def test_an_image_is_listed_exactly_where_one_of_its_positions_is_kept(keep, listed):
    shape = RowShape(sequence_length=16, image_mark_id=9, pad_id=0, tokens_per_image=4)
    document = Document(np.array([1, 1, 1, 1, 9, 2]), np.array([5, 6]), image_keys=("x",))  # image at 4 .. 7
    asked = []
    batch = collate([[document]], shape, keep=keep, pixels=lambda keys: asked.extend(keys) or torch.zeros(len(keys)))
    assert len(batch.image_spans) == len(asked) == listed


def test_a_slice_without_images_has_pixels_of_no_image(write_dataset):
    stage = stage_of(write_dataset())
    assert stage.take(0, 1, keep=(LENGTH - 1, LENGTH)).pixels_ICYX.shape == (0, 3, 28, 28)


def test_samples_that_do_not_fit_are_refused_with_their_count_or_left_out_by_choice(write_dataset):
    folder = write_dataset()
    lengths = stage_of(folder)._lengths
    limit = int(np.sort(lengths)[-4]) - 1
    too_long = int((lengths > limit).sum())
    with pytest.raises(UsageError, match=f"{too_long} of 40 samples do not fit sequence_length={limit}"):
        stage_of(folder, sequence_length=limit)
    stage = stage_of(folder, sequence_length=limit, drop_over_long=True)
    assert stage.num_over_long == too_long
    assert len(stage.sample_ids(0, stage.num_rows_per_epoch)) == 40 - too_long


def test_samples_that_are_listed_are_left_out_of_every_epoch_and_the_others_are_not(write_dataset):
    folders = [write_dataset(), write_dataset("second", num_samples=20, first_id=64)]
    ids = [Dataset(folder).sample_id(number) for folder, number in zip(folders, (3, 7))]
    listed = frozenset({*ids, "f" * 32})  # the last is of another stage's data
    stage = stage_of(*folders, excluded=listed)
    everything = stage_of(*folders)
    assert stage.num_excluded == stage.describe()["excluded"] == 2
    assert stage.plan_hash != everything.plan_hash
    assert stage_of(*folders, excluded=frozenset(ids)).plan_hash != stage.plan_hash
    rows = stage.num_rows_per_epoch
    for epoch in range(2):
        shown = stage.sample_ids(epoch * rows, rows)
        assert sorted(shown + ids) == sorted(everything.sample_ids(0, everything.num_rows_per_epoch))
    resumed = stage_of(*folders, excluded=listed)
    assert resumed.plan_hash == stage.plan_hash
    assert same(resumed.take(rows + 1, 2), stage.take(rows + 1, 2))


def test_an_over_long_sample_that_is_listed_is_no_obstacle_and_an_empty_stage_is_refused(write_dataset):
    folder = write_dataset()
    dataset = Dataset(folder)
    lengths = dataset.token_lengths + dataset.num_images * (SPEC.num_tokens - 1)
    longest = int(lengths.argmax())
    fits = int(np.delete(lengths, longest).max())
    over_long = frozenset(dataset.sample_id(n) for n in range(len(dataset)) if lengths[n] > fits)
    with pytest.raises(UsageError, match="do not fit"):
        stage_of(folder, sequence_length=fits)
    assert stage_of(folder, sequence_length=fits, excluded=over_long).num_over_long == 0
    with pytest.raises(UsageError, match=r"leave fewer samples out \(exclude\)"):
        stage_of(folder, excluded=frozenset(dataset.sample_id(n) for n in range(len(dataset))))


def test_marks_that_do_not_match_the_images_stop_the_batch():
    shape = RowShape(sequence_length=16, image_mark_id=9, pad_id=0, tokens_per_image=4)
    document = Document(np.array([1, 9, 2]), np.array([2, 3]), image_keys=())
    with pytest.raises(WorkError, match="1 image marks and 0 images"):
        collate([[document]], shape)


@pytest.mark.parametrize("change", ["seed", "sequence_length", "image", "weight"])
def test_whatever_changes_the_order_changes_the_plans_hash(write_dataset, change):
    folder = write_dataset()
    other = {
        "seed": {"seed": 6},
        "sequence_length": {"sequence_length": 97},
        "image": {"image": ImageSpec(size_px=28, mean=SPEC.mean, std=SPEC.std, num_tokens=5)},
        "weight": {"weight": 2.0},
    }[change]
    assert stage_of(folder).plan_hash != stage_of(folder, **other).plan_hash


def test_the_hash_chain_does_not_depend_on_batches_and_finds_lost_repeated_and_swapped_samples():
    ids = [f"{i:032x}" for i in range(9)]
    whole = chain("", ids)
    assert chain(chain(chain("", ids[:2]), ids[2:7]), ids[7:]) == whole
    for wrong in (ids[1:], [*ids, ids[-1]], [ids[1], ids[0], *ids[2:]]):
        assert chain("", wrong) != whole


def test_documents_with_one_image_encode_it_once_and_lie_where_it_is_said():
    shape = RowShape(sequence_length=20, image_mark_id=9, pad_id=0, tokens_per_image=4)
    picture, other = png_of(1), png_of(2)
    documents = [(np.array([1, 9, 2, 10 + i]), [(3, 4)], [picture]) for i in range(4)]
    documents.append((np.array([1, 9, 2, 3, 30]), [(4, 5)], [other]))
    batch, placements = batch_of_documents(documents, shape=shape, source=PixelSource(SPEC, "pillow"), num_rows=3)
    assert batch.token_ids_BS.shape == (3, 20)
    assert batch.pixels_ICYX.shape[0] == 2
    for number, place in enumerate(placements):
        labels = batch.label_ids_BS[place.row, place.start : place.end]
        assert labels[labels != IGNORE_INDEX].tolist() == [10 + number if number < 4 else 30]
    with pytest.raises(UsageError, match="5 documents need 3 rows of 20"):
        batch_of_documents(documents, shape=shape, source=None, num_rows=1)


def test_pixels_are_normalised_squares_padded_with_the_mean_colour():
    wide = np.full((10, 40, 3), 255, np.uint8)
    out = io.BytesIO()
    Image.fromarray(wide).save(out, "PNG")
    record = np.frombuffer(out.getvalue(), np.uint8)
    pixels = PixelSource(SPEC, "pillow").read([0], lambda _: ("encoded", record))
    colour = torch.tensor([(c / 255 - m) / s for c, m, s in zip(pad_rgb(SPEC), SPEC.mean, SPEC.std)])
    white = torch.tensor([(1 - m) / s for m, s in zip(SPEC.mean, SPEC.std)])
    assert torch.allclose(pixels[0, :, 0, 14], colour, atol=1e-6)
    assert torch.allclose(pixels[0, :, 14, 14], white, atol=1e-6)
    assert pixels.shape == (1, 3, 28, 28)


def test_the_pixel_path_is_that_of_llava_image_processor():
    transformers = pytest.importorskip("transformers")
    processor = transformers.LlavaImageProcessorPil if hasattr(transformers, "LlavaImageProcessorPil") else None
    if processor is None:
        pytest.skip("this transformers has no Pillow backend of LlavaImageProcessor")
    image = Image.open(io.BytesIO(png_of(3, 60, 41)))
    theirs = processor(
        do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=SPEC.mean,
        image_std=SPEC.std,
    )(image, return_tensors="pt")["pixel_values"]  # fmt: skip
    ours = PixelSource(SPEC, "pillow").normalise(np.array(square(image, 28, pad_rgb(SPEC)))[None])
    assert torch.allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize("cache_bytes", [0, 3 * 28 * 28 * 2, 1 << 20])
def test_the_cache_changes_nothing_but_time(write_dataset, cache_bytes):
    folder = write_dataset()
    plain, cached = stage_of(folder, cache_bytes=0), stage_of(folder, cache_bytes=cache_bytes)
    for _ in range(2):
        assert same(plain.take(0, 6), cached.take(0, 6))
    assert len(cached.pixels._cache) <= cache_bytes // (3 * 28 * 28)


def test_an_unknown_reader_is_refused(write_dataset):
    with pytest.raises(UsageError, match="allowed: auto, dali, pillow"):
        stage_of(write_dataset(), reader="opencv")


def test_the_prefetcher_keeps_the_order_and_hands_on_errors():
    def work(number):
        if number == 5:
            raise WorkError("row 5 is damaged")
        return number * 2

    with Prefetcher(work, range(5), depth=2) as results:
        assert list(results) == [0, 2, 4, 6, 8]
    with Prefetcher(work, range(9), depth=2) as results, pytest.raises(WorkError, match="row 5"):
        list(results)


def test_the_prefetcher_stays_within_its_depth_and_stops_its_thread():
    started, before = [], set(threading.enumerate())
    with Prefetcher(lambda n: started.append(n) or n, range(100), depth=3) as results:
        next(results)
        time.sleep(0.3)
        assert len(started) <= 1 + 3 + 1
        (thread,) = set(threading.enumerate()) - before
    assert thread.name == "prefetch" and not thread.is_alive()


def test_the_prefetching_thread_outlives_the_last_batch():
    """Without it libgomp lets the model's threads spin, and the last steps of a stage took 3 to 7 times as long."""
    before = set(threading.enumerate())
    with Prefetcher(lambda n: n, range(2), depth=2) as results:
        assert [next(results), next(results)] == [0, 1]
        (thread,) = set(threading.enumerate()) - before
        thread.join(timeout=0.5)
        assert thread.is_alive()
    assert not thread.is_alive()


@pytest.mark.parametrize(("data_ranks", "micro_rows"), [(2, 1), (4, 1), (2, 2), (1, 4)])
def test_ranks_have_about_the_same_number_of_images_at_one_time_and_in_a_step(write_dataset, data_ranks, micro_rows):
    folder = write_dataset(num_samples=120)
    plain, even = stage_of(folder), stage_of(folder, rows_per_step=16)
    images_of_row = [plain.take(row, 1, with_pixels=False).num_images for row in range(64)]
    assert max(images_of_row) - min(images_of_row) >= 3
    for step in range(4):
        first = 16 * step
        rows = [even.take(row, 1, with_pixels=False).num_images for row in range(first, first + 16)]
        assert rows == sorted(rows, reverse=True)
        assert sorted(even.sample_ids(first, 16)) == sorted(plain.sample_ids(first, 16))
        micro_batches = np.reshape(rows, (-1, data_ranks, micro_rows)).sum(-1)
        totals = micro_batches.sum(0)
        assert totals.max() - totals.min() <= micro_rows * (max(rows) - min(rows))
        assert (np.diff(micro_batches, axis=1) <= 0).all()


@pytest.mark.parametrize("rows_per_step", [1, 6])
def test_resume_within_evened_steps_and_changed_pictures_gives_the_same_rest(write_dataset, rows_per_step):
    folder = write_dataset(num_samples=20)
    options = {"rows_per_step": rows_per_step, "augment": AUGMENT, "weight": 0.7}
    whole = stage_of(folder, **options)
    batches = [whole.take(row, 1) for row in range(14)]
    for start in (0, 1, 5, 6, 13):
        assert same(stage_of(folder, **options).take(start, 1), batches[start])


AUGMENT = AugmentConfig(rotate_degrees=10, shift=0.05, zoom=0.1, brightness=0.1, contrast=0.1)


def test_pictures_change_with_the_epoch_and_the_sample_and_with_nothing_else(write_dataset):
    folder = write_dataset(num_samples=30)
    plain = stage_of(folder)
    changed, cached, seeded = (
        stage_of(folder, augment=AUGMENT, **more) for more in ({}, {"cache_bytes": 0}, {"seed": 6})
    )
    rows = changed.num_rows_per_epoch

    def picture_of(stage, epoch):
        """Sample id -> its first picture."""
        batch = stage.take(epoch * rows, rows)
        found = {}
        for span in batch.image_spans:
            before = sum(len(stage.samples_of(epoch * rows + row)) for row in range(span.row))
            number = before + int(batch.document_ids_BS[span.row, span.start])
            found.setdefault(batch.sample_ids[number], batch.pixels_ICYX[span.image])
        return found

    first, again, second, other = (
        picture_of(changed, 0), picture_of(cached, 0), picture_of(changed, 1), picture_of(seeded, 0)
    )  # fmt: skip
    original = picture_of(plain, 0)
    assert len(first) > 10
    for sample, picture in first.items():
        assert torch.equal(picture, again[sample])
        for different in (second[sample], other[sample], original[sample]):
            assert not torch.equal(picture, different)
    labels = [stage.take(0, rows, with_pixels=False).label_ids_BS for stage in (plain, changed)]
    assert torch.equal(*labels)


def test_one_image_of_two_samples_is_changed_in_two_ways():
    square_YXC = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    one, two = (augmented(square_YXC, AUGMENT, draws(0, 0, sample, 0), (0, 0, 0)) for sample in "ab")
    assert (one != two).any()


def test_a_turn_of_ninety_degrees_a_shift_and_a_mirror_are_what_they_say():
    square_YXC = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    quarter = augmented(square_YXC, AugmentConfig(rotate_degrees=90), np.array([1, 0, 0, 0, 0, 0, 0], float), (9, 9, 9))
    # Pillow's bilinear cuts to whole numbers, and the cosine of 90 degrees is 6e-17: one of 255 may be lost.
    assert np.abs(quarter.astype(int) - np.rot90(square_YXC, -1)).max() <= 1
    right = augmented(square_YXC, AugmentConfig(shift=0.25), np.array([0, 1, 0, 0, 0, 0, 0], float), (1, 2, 3))
    assert (right[:, 7:] == square_YXC[:, :21]).all()
    assert (right[:, :7] == (1, 2, 3)).all()
    down = augmented(square_YXC, AugmentConfig(shift=0.25), np.array([0, 0, 1, 0, 0, 0, 0], float), (1, 2, 3))
    assert (down[7:] == square_YXC[:21]).all()
    mirrored = augmented(square_YXC, AugmentConfig(mirror=True), np.full(7, -1.0), (0, 0, 0))
    assert (mirrored == square_YXC[:, ::-1]).all()
    brighter = augmented(square_YXC, AugmentConfig(brightness=0.2), np.array([0, 0, 0, 0, 1, 0, 0], float), (0, 0, 0))
    assert (brighter == np.round(np.minimum(square_YXC + 51.0, 255))).all()
    assert augmented(square_YXC, AugmentConfig(), np.ones(7), (0, 0, 0)) is square_YXC


def test_the_draws_are_pinned_and_spread_over_the_range():
    # A resumed run must see the pictures it would have seen: these numbers must never change.
    assert draws(1, 2, "abc", 0).round(6).tolist()[:3] == [0.644155, 0.310434, 0.475678]
    many = np.stack([draws(0, 0, str(i), 0) for i in range(2000)])
    assert np.abs(many.mean(0)).max() < 0.06 and np.abs(many.std(0) - 3**-0.5).max() < 0.03
    assert many.min() >= -1 and many.max() < 1


def test_no_left_becomes_a_right_unless_it_is_asked_for():
    assert AugmentConfig().mirror is False
    square_YXC = np.zeros((28, 28, 3), np.uint8)
    square_YXC[8:20, 2:6] = 255  # something on the left
    for sample in range(200):
        shown = augmented(square_YXC, AUGMENT, draws(0, 0, str(sample), 0), (0, 0, 0)).astype(int)
        assert shown[:, :14].sum() > shown[:, 14:].sum()


@pytest.mark.parametrize("field", ["rotate_degrees", "shift", "zoom", "brightness", "contrast"])
def test_a_change_out_of_range_is_refused(field):
    with pytest.raises(UsageError, match=rf"augment\.{field}=-0\.1; allowed: 0 to"):
        AugmentConfig(**{field: -0.1})


def test_changes_and_rows_per_step_are_part_of_the_plans_hash(write_dataset):
    folder = write_dataset()
    hashes = {stage_of(folder, **more).plan_hash for more in ({}, {"augment": AUGMENT}, {"rows_per_step": 4})}
    assert len(hashes) == 3
    assert stage_of(folder, augment=AugmentConfig()).plan_hash in hashes


@pytest.mark.parametrize(
    ("reader", "device", "installed", "chosen"),
    [
        ("auto", "cuda:3", True, "mixed"), ("dali", "cuda:0", True, "mixed"), ("auto", "cpu", True, "cpu"),
        ("dali", None, True, "cpu"), ("auto", "cuda:3", False, "pillow"), ("pillow", "cuda:3", True, "pillow"),
    ],
)  # fmt: skip
def test_dali_decodes_on_the_gpu_where_there_is_one(reader, device, installed, chosen):
    assert chosen_decoder(reader, device and torch.device(device), installed) == chosen


def test_dali_that_is_not_installed_is_one_line():
    with pytest.raises(UsageError, match="DALI is not installed"):
        chosen_decoder("dali", None, False)


def test_which_decoder_is_used_is_said_once(write_dataset, caplog):
    stage = stage_of(write_dataset())
    with caplog.at_level("INFO"):
        for row in range(3):
            stage.take(row, 1)
    assert [record.getMessage() for record in caplog.records].count("images are decoded by Pillow") == 1
