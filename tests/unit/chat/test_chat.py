"""Asking an exported model: pictures as in training, nothing of a header, and a page for this machine alone."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_medgpt.chat.command import run_chat
from megatron_medgpt.chat.page import check_host
from megatron_medgpt.chat.picture import WARNING, picture_of, read_picture
from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.evaluate.conversation import HuggingFaceConversation
from megatron_medgpt.ingest.decode import decode
from tests.small_export import write_small_export
from tests.unit.ingest.medical_files import dicom

SECRET = "CANARY^NAME"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write_small_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def ct(tmp_path_factory):
    """A CT of 60 x 40 in stored values around water, with a name in its header."""
    stored = np.random.default_rng(0).integers(900, 1300, (40, 60)).astype(np.uint16)
    path = tmp_path_factory.mktemp("ct") / f"{SECRET}.dcm"
    path.write_bytes(dicom(stored, Modality="CT", PatientName=SECRET, RescaleIntercept=-1024, RescaleSlope=1))
    return path


def test_a_dicom_is_windowed_as_ingest_does_it(ct):
    picture = read_picture(ct)
    (training,) = decode(ct.read_bytes())
    assert np.asarray(picture.image).tobytes() == np.asarray(Image.open(_bytes(training.picture.encoded))).tobytes()
    assert picture.describe() == "CT, 60 × 40 pixels, 8 bits"


def _bytes(content):
    import io

    return io.BytesIO(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "image"),
        (b"no picture at all", "image"),
        (dicom(np.zeros((20, 20), np.uint16), BurnedInAnnotation="YES"), "--allow-burned-in"),
        (dicom(np.zeros((20, 20), np.uint16), Modality="US"), "does not rule it out"),
    ],
)
def test_what_training_would_refuse_is_refused_with_the_mend(content, words):
    with pytest.raises(UsageError, match=words):
        picture_of(content)
    if b"DICM" in content:
        assert picture_of(content, allow_burned_in=True).image.size == (20, 20)


def test_an_answer_is_the_same_every_time_and_depends_on_the_picture(export, ct):
    conversation = HuggingFaceConversation(export, device="auto", max_new_tokens=8)
    image = read_picture(ct).image
    pieces = list(conversation.stream("What does the image show?", image))
    assert len(pieces) > 1
    assert pieces[-1].startswith(pieces[0])
    assert conversation.answer("What does the image show?", image) == pieces[-1]
    white = Image.new("L", (30, 30), 255)
    assert conversation.answer("What does the image show?", white) != pieces[-1]


def test_a_reasoning_effort_that_the_template_does_not_read_is_refused(export):
    with pytest.raises(UsageError, match=r"--reasoning-effort low: the chat template .* knows no reasoning effort"):
        HuggingFaceConversation(export, device="cpu", reasoning_effort="low")


def test_an_image_mark_that_a_person_types_is_words(export, ct):
    conversation = HuggingFaceConversation(export, max_new_tokens=2)
    conversation.answer("What is <|image|> and <|end|> here?", read_picture(ct).image)
    with pytest.raises(UsageError, match="empty"):
        conversation.answer("   ", None)
    with pytest.raises(UsageError, match="ask less at once"):
        HuggingFaceConversation(export, max_new_tokens=200_000).answer("What?", None)


def test_an_answer_of_nothing_is_no_answer(export, ct):
    conversation = HuggingFaceConversation(export, device="cpu", max_new_tokens=1)
    settings = conversation._model.generation_config
    settings.forced_eos_token_id = settings.eos_token_id
    with pytest.raises(WorkError, match=r"the model's answer is empty; ask in other words, or allow more --max-new"):
        conversation.answer("What does the image show?", read_picture(ct).image)


def test_the_line_answers_on_stdout_and_warns_on_every_screen(export, ct, capsys):
    run_chat(export, ct, "What does the image show?", host="127.0.0.1", port=7860, max_new_tokens=4)
    said = capsys.readouterr()
    assert said.out.strip()
    assert WARNING in said.err
    assert SECRET not in said.out + said.err


@pytest.mark.parametrize(
    ("image", "question", "host", "words"),
    [
        (None, "What?", "127.0.0.1", "both an image and a question"),
        (Path("gone.png"), None, "127.0.0.1", "both an image and a question"),
        (Path("gone.png"), "What?", "127.0.0.1", "no such file"),
        (None, None, "0.0.0.0", "this machine alone"),
        (None, None, "example.org", "this machine alone"),
    ],
)
def test_wrong_use_is_refused_before_a_model_is_loaded(tmp_path, image, question, host, words):
    with pytest.raises(UsageError, match=words):
        run_chat(tmp_path / "no-model", image, question, host=host, port=7860)


def test_a_folder_without_a_model_and_strange_hosts_are_refused(tmp_path, ct):
    with pytest.raises(UsageError, match=r"no config\.json"):
        run_chat(tmp_path, ct, "What?", host="127.0.0.1", port=7860)
    check_host("localhost")
    with pytest.raises(UsageError, match="ssh -L"):
        check_host("::")


@pytest.fixture
def page(export, tmp_path):
    """The page as a user starts it; (its address, the folder of its uploads, the process)."""
    pytest.importorskip("gradio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "megatron_medgpt.cli", "chat", "--hf", str(export), "--port", str(port),
               "--max-new-tokens", "6"]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, process)
        yield address, tmp_path, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(address, process):
    for _ in range(2400):
        assert process.poll() is None, process.stderr.read()
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.25)
    raise AssertionError("the page did not come up in ten minutes")


def test_the_page_answers_deletes_uploads_and_stays_on_this_machine(page, export, ct):
    from gradio_client import Client, handle_file

    address, folder, process = page
    client = Client(address, verbose=False, analytics_enabled=False, download_files=False)
    _, facts, *_ = client.predict(handle_file(str(ct)), api_name="/open")
    assert facts == "CT, 60 × 40 pixels, 8 bits"
    answer = client.predict("What does the image show?", api_name="/ask")
    conversation = HuggingFaceConversation(export, max_new_tokens=6)
    assert answer == conversation.answer("What does the image show?", read_picture(ct).image)
    uploaded = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in uploaded if SECRET.encode() in path.read_bytes() or path.suffix == ".dcm"]

    with urllib.request.urlopen(address, timeout=10) as response:
        html, headers = response.read().decode(), response.headers
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert WARNING in html
    rebound = urllib.request.Request(address, headers={"Host": "attacker.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(rebound, timeout=10)
    listening = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=False).stdout
    port = address.rsplit(":", 1)[1]
    assert not re.search(rf"(0\.0\.0\.0|\*|\[::\]):{port}\b", listening)

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 0
    assert not list(folder.glob("medgpt-chat-*"))
