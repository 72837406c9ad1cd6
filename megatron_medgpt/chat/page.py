"""The local page: one image, one question, one answer. Only this machine can open it, and it asks the network nothing.

An upload is read, windowed as in training and deleted; the page shows the pixels and never a name, a header or a path.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_medgpt.chat.picture import WARNING, picture_of
from megatron_medgpt.config.errors import MedgptError, UsageError
from megatron_medgpt.evaluate.conversation import HuggingFaceConversation

LOOPBACK = ("127.0.0.1", "localhost")
GRACE_S = 2
"""An open page keeps a connection for as long as it is open."""
CONTENT_SECURITY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; form-action 'self'"
)
"""Gradio's page names scripts and fonts of other hosts; a browser that follows this loads none of them."""
_STYLE = """
.medgpt-warning { position: fixed !important; bottom: 0; left: 0; right: 0; z-index: 50; background: #7a2e12;
  color: #fff; font-weight: 600; padding: .55rem 2rem !important; border-radius: 0 !important; }
.gradio-container { padding-bottom: 4rem !important; }
.medgpt-warning p { color: #fff; margin: 0; }
.medgpt-picture img { width: 100%; height: 100%; object-fit: contain; background: #000; }
footer { display: none !important; }
:focus-visible { outline: 3px solid #0b6e99 !important; outline-offset: 2px !important; }
.dark :focus-visible { outline-color: #5cc0ea !important; }
"""
_NO_IMAGE = "Open an image first: DICOM, JPEG or PNG."


def check_host(host: str) -> None:
    """Raise UsageError unless the host is this machine's own."""
    if host not in LOOPBACK:
        raise UsageError(
            f"--host {host}: the page shows medical images and has no log-in, so it serves this machine alone "
            f"({' or '.join(LOOPBACK)}); from elsewhere use ssh -L 7860:127.0.0.1:7860"
        )


def check_port(host: str, port: int) -> None:
    """Raise UsageError where there is no such port, or something listens already."""
    if not 1 <= port <= 65535:
        raise UsageError(f"--port {port}; allowed: 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"--port {port} cannot be used ({error.strerror}); give another --port") from None


def build_page(conversation: HuggingFaceConversation, *, allow_burned_in: bool = False) -> Any:
    """The page as a Gradio app (Blocks). Endpoints for programs: ``/open`` and ``/ask``."""
    gradio = gradio_module()

    def refusal(words: str) -> Exception:
        # Stays until it is closed: in Gradio's ten seconds not everybody has read it, or come to it by keyboard.
        return gradio.Error(words, duration=None, print_exception=False)

    def open_file(path: str) -> tuple[Any, str, Any]:
        file = Path(path)
        try:
            content = file.read_bytes()
        finally:
            file.unlink(missing_ok=True)
        try:
            picture = picture_of(content, allow_burned_in=allow_burned_in)
        except MedgptError as error:
            raise refusal(str(error)) from None
        return picture.image.convert("RGB"), picture.describe(), picture.image

    def ask(question: str, image: Any) -> Iterator[str]:
        if image is None:
            raise refusal(_NO_IMAGE)
        try:
            yield from conversation.stream(question or "", image)
        except MedgptError as error:
            raise refusal(str(error)) from None

    with gradio.Blocks(title="Megatron-MedGPT", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"{WARNING}", elem_classes="medgpt-warning")
        gradio.Markdown(
            f"# Ask about one image\nModel: {conversation.description}. A picture is windowed as in training; nothing "
            "of its header is kept or shown, and nothing leaves this machine."
        )
        held = gradio.State(None)
        with gradio.Row():
            with gradio.Column():
                upload = gradio.UploadButton("Open an image (DICOM, JPEG, PNG)", file_count="single", variant="primary")
                shown = gradio.Image(
                    label="What the model sees",
                    interactive=False,
                    format="png",
                    type="pil",
                    height=420,
                    buttons=["fullscreen"],
                    alt_text="The picture that the model sees",
                    elem_classes="medgpt-picture",
                )
                facts = gradio.Textbox(label="Picture", value="none yet", interactive=False)
            with gradio.Column():
                # Of two lines and more Gradio takes Enter for a new line and Shift+Enter for the end.
                question = gradio.Textbox(
                    label="Question", placeholder="What does the image show?", lines=1, max_lines=6,
                    info="Enter asks; Shift+Enter begins a new line.",
                )  # fmt: skip
                button = gradio.Button("Ask", variant="primary")
                answer = gradio.Textbox(label="Answer", interactive=False, lines=8)
                gradio.Markdown(f"{WARNING} A language model can be wrong in any sentence.")
        # The answer to the last picture must not stand beside the next one.
        upload.upload(open_file, upload, [shown, facts, held], api_name="open").then(
            lambda: "", None, answer, api_visibility="private"
        )
        gradio.on([button.click, question.submit], ask, [question, held], answer, api_name="ask", concurrency_limit=1)
    return page


def serve(page: Any, *, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM. Requests under another host's name (DNS rebinding) are refused.

    Raises:
        UsageError: not a host of this machine, or the port is taken.
    """
    check_host(host)
    check_port(host, port)
    gradio = gradio_module()
    import uvicorn

    theme = gradio.themes.Base(
        primary_hue="cyan", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(  # Gradio's own cyan bears white text at 2.4 to 1 only; this is 5.6
        button_primary_background_fill="#0b6e99", button_primary_background_fill_hover="#095a7d",
        button_primary_background_fill_dark="#0b6e99", button_primary_text_color="#ffffff",
    )  # fmt: skip
    # uvicorn stops on SIGTERM and then raises it again; this lets the caller put away the uploads.
    signal.signal(signal.SIGTERM, _leave)
    uvicorn.run(
        _app(gradio, page, theme), host=host, port=port, log_level="warning", access_log=False,
        timeout_graceful_shutdown=GRACE_S,
    )  # fmt: skip


def _leave(number: int, frame: object) -> None:
    raise SystemExit(0)


def _app(gradio: Any, page: Any, theme: Any) -> Any:
    from fastapi import FastAPI, Request
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))

    @app.middleware("http")
    async def close_to_the_network(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = CONTENT_SECURITY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    return gradio.mount_gradio_app(
        app, page, path="/", theme=theme, css=_STYLE, footer_links=[], run_history=False, ssr_mode=False, pwa=False,
        enable_monitoring=False, max_file_size="256mb",
    )  # fmt: skip


def gradio_module() -> Any:
    """Gradio, or UsageError with how to get it."""
    try:
        import gradio
    except ImportError:
        raise UsageError("the page needs Gradio; pip install 'megatron-medgpt[chat]', or ask on the line: medgpt chat "
                         "--hf DIR IMAGE QUESTION") from None  # fmt: skip
    return gradio
