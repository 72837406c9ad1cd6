"""``medgpt chat``: a question on the command line, or the page."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_medgpt.chat.picture import WARNING, read_picture
from megatron_medgpt.config.errors import UsageError


def run_chat(
    hf: Path, image: Path | None, question: str | None, *, host: str, port: int, device: str = "auto",
    max_new_tokens: int = 512, reasoning_effort: str | None = None, allow_burned_in: bool = False,
) -> None:  # fmt: skip
    """Answer one question about one image on stdout; without either, serve the page until interrupted.

    Raises:
        UsageError: an image without a question, a host that is not this machine, or a file that is refused.
        WorkError: the model failed, or its answer is empty.
    """
    print(WARNING, file=sys.stderr, flush=True)
    if (image is None) != (question is None):
        raise UsageError('give both an image and a question: medgpt chat --hf DIR image.dcm "What is shown?"')
    if question is not None and not question.strip():
        raise UsageError("the question is empty; ask something about the image")
    picture = None
    if image is not None:
        picture = read_picture(image, allow_burned_in=allow_burned_in)
    else:
        from megatron_medgpt.chat.page import build_page, check_host, check_port, gradio_module, serve

        check_host(host)
        check_port(host, port)
        gradio_module()  # what is missing is said before a model is loaded
    from megatron_medgpt.evaluate.conversation import HuggingFaceConversation

    conversation = HuggingFaceConversation(
        hf, device=device, max_new_tokens=max_new_tokens, reasoning_effort=reasoning_effort
    )
    if picture is not None:
        print(f"{picture.describe()}; {conversation.description}", file=sys.stderr, flush=True)
        print(conversation.answer(str(question), picture.image))
        return
    page = build_page(conversation, allow_burned_in=allow_burned_in)
    print(f"page: http://{host}:{port} (only from this machine; Ctrl-C stops it)", file=sys.stderr, flush=True)
    serve(page, host=host, port=port)
