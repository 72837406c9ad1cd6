"""The report: whole from a whole run, honest from a part of one, one file that asks the network for nothing."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import re

import pytest
from PIL import Image

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.observe.report import write_report
from megatron_medgpt.observe.report.charts import short_number
from megatron_medgpt.observe.report.curves import read_metrics
from megatron_medgpt.observe.report.evaluation import view

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Collects tags and text, and checks that elements close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.faults = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"{tag} closed out of order at {self.getpos()}")

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 90, 90)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def evaluation(task="phantoms", protocol="letter", **more):
    cell = {"n": 4, "correct": 3, "accuracy": 0.75}
    return {
        "task": task, "protocol": protocol, "n": 4, "correct": 3, "accuracy": 0.75, "macro_by_modality": 0.75,
        "by_modality": {"CT": cell}, "by_question_type": {"Place": cell, "Shape": cell},
        "by_modality_and_question_type": {"CT": {"Place": cell}}, "unparsed": 1, "failed": 2, "truncated": 0,
        "ci95": [0.5, 0.9], "chance": 0.25, "problems": {"missing_image": 2}, "controls": {"blank_image": 0.26},
        "controls_ci95": {"blank_image": [0.2, 0.3]}, "engine": "step-3", "failed_reasons": {"empty answer": 2},
    } | more  # fmt: skip


@pytest.fixture
def run(tmp_path):
    rows = []
    for step in range(1, 401):
        row = {"step": step, "stage": "align" if step <= 150 else "instruct", "loss": 5 / step + 0.1, "lr": 1e-3,
               "grad_norm": 1.0, "tokens": 100, "tokens_per_s": 1e4, "step_s": 0.5, "time/data_s": 0.01}  # fmt: skip
        if step % 100 == 0:
            row |= {"validation_loss": 0.3, "expert_load/ct image": [0.7, 0.3], "expert_entropy/ct image": 0.88}
        rows.append(row)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40')
    (tmp_path / "run.yaml").write_text(
        "name: <b>run</b>\nseed: 7\nparallel: {tensor: 2}\nstages:\n"
        "- {name: align, num_steps: 150, frozen: [language], data: [{path: data/a, weight: 2.0}]}\n"
        "- {name: instruct, num_steps: 300, data: [{path: gone}]}\n"
    )
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "dataset.json").write_text(
        json.dumps({"num_samples": 5, "num_images": 4, "num_tokens": 1234, "rejects": {"truncated": 3}})
    )
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "a.json").write_text(json.dumps(evaluation()))
    (tmp_path / "eval" / "b.json").write_text(json.dumps(evaluation()))
    (tmp_path / "eval" / "a.answers.json").write_text(json.dumps({"engine": "x"}))
    card = {"question": "Where <here>?", "options": ["left", "right"], "answer": "left", "prediction": "right",
            "correct": False, "modality": "CT", "question_type": "Place", "image_png_base64": picture()}  # fmt: skip
    (tmp_path / "eval" / "gallery.json").write_text(json.dumps([card]))
    (tmp_path / "summary.json").write_text(
        json.dumps({"seconds": 61, "layouts": ["EP2", "TP2"], "versions": {"torch": "9"}})
    )
    return tmp_path


def page_of(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    return Page(text), text


def test_the_page_is_well_formed_and_complete(run):
    page, _ = page_of(run)
    assert page.faults == []
    assert page.open == []
    said = " ".join(" ".join(page.text).split())
    for words in ("75.0%", "Blank image", "26.0%", "TP2", "1,234", "3 truncated", "all but language", "150 of 150",
                  "250 of 300", "problem: missing image", "no answer: empty answer",
                  "without an answer (wrong)", "Where <here>?", "0.88",
                  "not for clinical use", "0:01:01"):  # fmt: skip
        assert words in said, words


def test_nothing_is_fetched_from_anywhere(run):
    page, text = page_of(run)
    assert page.all("script") == page.all("link") == page.all("iframe") == []
    sources = [attrs["src"] for attrs in page.all("img")]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert all(attrs["href"].startswith("#") for attrs in page.all("a"))
    assert not re.search(r"url\(|@import|https?://", text)


def test_names_from_files_are_text_and_never_markup(run):
    text = page_of(run)[1]
    assert "<b>" not in text
    assert "&lt;b&gt;run&lt;/b&gt;" in text


def test_readers_without_eyes_or_mouse_find_their_way(run):
    page, _ = page_of(run)
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("nav")) == 1
    assert page.all("html")[0]["lang"] == "en"
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(attrs.get("aria-label") for attrs in page.all("svg"))
    assert all(attrs.get("scope") for attrs in page.all("th"))
    every_id = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    ids = set(every_id)
    assert len(ids) == len(every_id)
    assert all(attrs["href"][1:] in ids for attrs in page.all("a"))
    assert all(attrs["aria-labelledby"] in ids for _, attrs in page.tags if "aria-labelledby" in attrs)
    scrolling = [attrs for _, attrs in page.tags if attrs.get("class") == "scroll"]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolling)
    labels = [attrs["aria-label"] for attrs in scrolling]
    assert len(set(labels)) == len(labels)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_from_its_ground_in_light_and_dark(run):
    _, text = page_of(run)
    light, dark = re.findall(r":root \{(.*?)\}", text, re.S)[:2]
    for theme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
        for ink in ("text", "soft", "accent", "good", "bad", "c0", "c1", "c2", "c3", "c4", "c5"):
            for ground in ("page", "card"):
                bright, dim = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
                # WCAG 2.2, 1.4.3: 4.5 for text
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, ground)


def test_published_figures_stand_only_beside_their_task_and_protocol(run):
    assert "Lingshu" not in page_of(run)[1]
    (run / "eval" / "b.json").unlink()
    (run / "eval" / "a.json").write_text(json.dumps(evaluation("omnimedvqa", "letter")))
    assert "Lingshu" in page_of(run)[1]
    entries = view(evaluation("omnimedvqa", "letter") | {"file": "a.json"})["published"]["entries"]
    assert [entry["model"] for entry in entries if "own" in entry] == ["This model"]
    (run / "eval" / "a.json").write_text(json.dumps(evaluation("omnimedvqa", "official-qa")))
    assert "Lingshu" not in page_of(run)[1]
    assert "50.2%" in page_of(run)[1]
    assert "On how many questions is not stated there; this run was asked 4." in page_of(run)[1]
    whole = evaluation("omnimedvqa", "letter")
    (run / "eval" / "a.json").write_text(json.dumps(whole))
    assert "this run on 4: not the same measurement" in page_of(run)[1]
    (run / "eval" / "a.json").write_text(json.dumps(whole | {"n": 88_996}))
    assert "not the same measurement" not in page_of(run)[1]
    (run / "eval" / "a.json").write_text(json.dumps(evaluation("omnimedvqa", "chat-likelihood")))
    assert "Published" not in page_of(run)[1]


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.yaml", "summary.json", "eval"])
def test_a_part_of_a_run_gives_a_page_of_what_is_there(run, tmp_path_factory, name):
    alone = tmp_path_factory.mktemp("part")
    (run / name).rename(alone / name)
    page, _ = page_of(alone)
    assert page.faults == []


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds none of"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="no such run folder"):
        write_report(tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.yaml", "a: ["), ("summary.json", "{"), ("eval/a.json", "{"), ("eval/gallery.json", "{}"),
        ("eval/gallery.json", '[{"question": "Q"}]'),
        ("eval/gallery.json",
         '[{"question": "Q", "answer": "", "prediction": "", "correct": true, "image": "../run.yaml"}]'),
        ("metrics.jsonl", "what\n"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_and_no_page_is_left(run, name, content):
    (run / name).write_text(content)
    with pytest.raises(WorkError, match=re.escape(name.split("/")[-1])):
        write_report(run)
    assert not (run / "report.html").exists()
    assert not list(run.glob(".report*"))


def test_steps_that_restart_with_a_stage_go_on_in_the_picture(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    path.write_text("".join(json.dumps({"step": step, "stage": stage, "loss": 1.0}) + "\n" for stage, step in steps))
    metrics = read_metrics(path)
    assert [row["x"] for row in metrics.rows] == [1, 2, 3, 4]
    assert [(span.name, span.first, span.last) for span in metrics.stages] == [("a", 1, 2), ("b", 3, 4)]


def test_thinning_keeps_means_and_extremes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    losses = [math.sin(i) for i in range(32_000)]
    losses[12_345] = 50.0
    path.write_text("".join(json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(losses)))
    series = read_metrics(path).series("loss")
    assert len(series.xs) == 320
    assert max(series.highs) == 50.0
    assert sum(series.ys) / 320 == pytest.approx(sum(losses) / len(losses))


def test_values_that_are_not_numbers_do_not_break_a_curve(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 401, "stage": "instruct", "loss": "nan", "grad_norm": None}) + "\n")
    assert page_of(run)[0].faults == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2e-5, "2e-5"), (0.034, "0.034"), (1234.0, "1234"), (35_200.0, "35.2k"), (1.2e6, "1.2M"), (-3e9, "-3G")],
)
def test_figures_are_short(value, text):
    assert short_number(value) == text


def said_by(folder):
    page, _ = page_of(folder)
    assert page.faults == []
    assert page.open == []
    return " ".join(" ".join(page.text).split())


def test_protocols_stand_side_by_side_with_their_controls(run):
    prefix = evaluation("phantoms", "official-prefix") | {"accuracy": 0.25, "controls": {}, "unparsed": 7}
    (run / "eval" / "c.json").write_text(json.dumps(prefix))
    said = said_by(run)
    assert "Side by side" in said
    assert "phantoms official-prefix 4 25.0%" in said
    for name in ("b", "c"):
        (run / "eval" / f"{name}.json").unlink()
    assert "Side by side" not in said_by(run)


def headline_of(run, **more):
    (run / "eval" / "b.json").unlink(missing_ok=True)
    (run / "eval" / "a.json").write_text(json.dumps(evaluation(**more)))
    said = said_by(run)
    return said[: said.index("Training loss")]


def test_the_first_words_say_whether_the_answers_come_from_the_picture(run):
    assert "75.0% of 4 questions right The answers come from the picture: with a blank image 26.0%." in headline_of(run)
    overlap = {"blank_image": [0.2, 0.51]}  # the figure's own interval begins at 0.5
    assert "not shown that the answers come from the picture" in headline_of(run, controls_ci95=overlap)
    above = {"controls": {"blank_image": 0.6}, "controls_ci95": {}}
    assert "not shown that the answers come from the picture" in headline_of(run, **above)
    assert "Measured without controls" in headline_of(run, controls={}, controls_ci95={})
    # shared words of reports are no share of right answers
    assert "questions right" not in headline_of(run, task="reports", protocol="report", text={"bleu1": 0.1})


def test_answers_of_others_are_never_called_this_model_s(run):
    paired = {"against": "b.json", "n": 4, "only_first": 2, "only_second": 3, "difference": 0.25, "p_value": 1.0}
    recorded = {
        "predictions": {"file": "other.jsonl", "given": 4}, "controls": {}, "accuracy": 0.9, "paired": paired
    }  # fmt: skip
    others = evaluation(**recorded)
    del others["engine"]
    (run / "eval" / "a.json").write_text(json.dumps(others))
    (run / "eval" / "b.json").write_text(json.dumps(evaluation(engine="endpoint http://h/v1 model med-7b")))
    said = said_by(run)
    assert "This model" not in said
    assert "Answers of other." in said
    assert "Against b on the same 4 questions: +25.0 points; right here alone 3, there alone 2: no difference" in said
    # The first words are of a model's own answers, even where a file of others comes first by name and is better.
    assert "75.0% of 4 questions right" in said[: said.index("Training loss")]
    assert "Answers of med-7b." in said[: said.index("Training loss")]
    (run / "eval" / "b.json").write_text(json.dumps(evaluation()))
    assert "This model" in said_by(run)


def test_modalities_of_omnimedvqa_are_written_as_people_write_them(run):
    cell = {"n": 4, "correct": 3, "accuracy": 0.75}
    table = {"by_modality": {"MR (Mag-netic Resonance Imaging)": cell, "Gait": cell}}
    (run / "eval" / "a.json").write_text(json.dumps(evaluation(**table)))
    said = said_by(run)
    assert "Mag-netic" not in said
    assert "MR – – 75% 4" in said
    assert "Gait – – 75% 4" in said


def test_accuracy_is_drawn_on_all_of_its_scale(run):
    with (run / "metrics.jsonl").open("a") as file:
        rows = ({"step": 401 + i, "stage": "instruct", "option_accuracy": 0.8 + i / 100} for i in range(3))
        file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    text = page_of(run)[1]
    chart = text[text.index("Held-out accuracy while training") :].split("</svg>")[0]
    assert re.findall(r">(\d+%)</text>", chart) == ["0%", "20%", "40%", "60%", "80%", "100%"]


def test_a_run_that_was_moved_with_its_data_still_finds_it(run, tmp_path_factory):
    base = tmp_path_factory.mktemp("elsewhere")
    (run / "data").rename(base / "data")
    run.rename(base / "run")
    assert "1,234" in said_by(base / "run")


def test_notes_and_figures_of_words_are_shown(run):
    words = {"exact": 0.25, "bleu4": 0.123, "rougeL": 0.456, "bleu_signature": "s", "mean_words": {}}
    (run / "eval" / "a.json").write_text(
        json.dumps(evaluation("reports", "report") | {"text": words, "notes": ["16 questions, published 88,996"]})
    )
    said = said_by(run)
    for text in ("exact matches", "BLEU-4 0.123", "ROUGE-L 0.456", "16 questions, published 88,996"):
        assert text in said, text


def audit():
    picture_pair = {
        "kind": "near", "bits_of_64": 2, "bits_of_256": 9, "task": "phantoms", "question_ids": ["q0"],
        "num_questions": 3, "question": "Q?", "dataset": "align", "image": "shard-00000 image 4",
        "evaluation_png_base64": picture(), "training_png_base64": picture(),
    }  # fmt: skip
    return {
        "settings": {"distance_of_64": 8, "confirm_of_256": 32, "ngram_words": 8, "share_of_ngrams": 0.7},
        "training": [{"dataset": "align", "samples": 50, "samples_with_picture": 2, "samples_with_text": 1}],
        "evaluation": [{"task": "phantoms", "questions": 4, "pictures": 4}], "pictures": {"exact": 0, "near": 1},
        "questions": {"pictures": 1, "texts": 1, "any": 2, "of": 4}, "template": {"runs": 1, "questions": 0},
        "flagged": {"phantoms": {"q0": ["near"], "q1": ["text"]}}, "pairs": [picture_pair], "excluded_samples": 2,
        "text_pairs": [{"task": "phantoms", "question_id": "q1", "share": 1.0, "question": "<i>Q</i>",
                        "training_text": "T", "dataset": "align", "sample_id": "0"}],
    }  # fmt: skip


def test_leakage_is_shown_with_both_pictures_and_the_accuracy_without_it(run):
    assert "Leakage" not in said_by(run)
    (run / "leakage").mkdir()
    (run / "leakage" / "leakage.json").write_text(json.dumps(audit()))
    # U+2028 may stand in an answer and ends no line
    items = [{"question_id": f"q{n}", "correct": n != 3, "output": "a\u2028b"} for n in range(4)]
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (run / "eval" / "a.items.jsonl").write_text(lines, encoding="utf-8")
    said = said_by(run)
    assert "2 of 64 and 9 of 256 bits differ" in said
    # of q0 to q3 all but q3 are right; q0's picture was seen, and q1's text
    assert "phantoms letter 75.0% 4 100.0% 1 66.7% 3 50.0% 2" in said
    page, text = page_of(run)
    assert len([attrs for attrs in page.all("img") if "picture of" in attrs["alt"]]) == 2
    assert "<i>" not in text
    test_readers_without_eyes_or_mouse_find_their_way(run)
    test_nothing_is_fetched_from_anywhere(run)


@pytest.mark.parametrize(("name", "content"), [("leakage.json", "{}"), ("leakage.json", "["), ("a.items.jsonl", "{}")])
def test_a_broken_audit_is_named(run, name, content):
    (run / "leakage").mkdir()
    (run / "leakage" / "leakage.json").write_text(json.dumps(audit()))
    (run / ("eval" if name.startswith("a.") else "leakage") / name).write_text(content)
    with pytest.raises(WorkError, match=re.escape(name)):
        write_report(run)


def test_every_evaluation_has_its_own_gallery(run):
    cards = json.loads((run / "eval" / "gallery.json").read_text())
    (run / "eval" / "b.gallery.json").write_text(json.dumps([cards[0] | {"question": "Another?"}]))
    page, _ = page_of(run)
    said = " ".join(" ".join(page.text).split())
    assert said.index("Another?") < said.index("Where <here>?")
    assert [attrs for attrs in page.all("details") if "open" in attrs] == [{"open": None}]


def test_data_is_shown_with_its_share_of_every_stage(run):
    (run / "data" / "b").mkdir()
    facts = {"num_samples": 15, "num_images": 4, "num_tokens": 9, "rejects": {}, "modalities": {"ct": 15}}
    (run / "data" / "b" / "dataset.json").write_text(json.dumps(facts))
    (run / "run.yaml").write_text(
        "name: x\nstages:\n- {name: align, num_steps: 1, data: [{path: data/a, weight: 2.0}, {path: data/b}]}\n"
    )
    said = said_by(run)
    # 2 passes over 5 samples beside one over 15
    assert "align weight 2, 40% of its samples" in said
    assert "align weight 1, 60% of its samples" in said
    assert "ct 15" in said


def test_tensorboard_gets_the_same_figures_and_pictures_once(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_report(run)
    assert not (run / "tensorboard").exists()
    (run / "tensorboard").mkdir()
    write_report(run)
    write_report(run)
    events = EventAccumulator(str(run / "tensorboard" / "report"))
    events.Reload()
    (point,) = events.Scalars("eval/phantoms/letter/accuracy")
    assert (point.step, point.value) == (400, 0.75)
    assert events.Scalars("eval/phantoms/letter (b)/control/blank_image")[0].value == pytest.approx(0.26)
    assert len(events.Tags()["images"]) == 1
    (image,) = events.Images(events.Tags()["images"][0])
    assert (image.width, image.height) == (8, 8)
