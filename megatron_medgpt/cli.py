"""The command ``medgpt``: its commands in the order of its help, and how errors end it.

The commands stand in ``commands``; none of them imports a room before it is called.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from megatron_medgpt import __version__
from megatron_medgpt.commands.convert import convert
from megatron_medgpt.commands.data import ingest, inspect, phantoms
from megatron_medgpt.commands.evaluate import chat, evaluate, report, score
from megatron_medgpt.commands.options import Json
from megatron_medgpt.commands.stopping import Stopped, stoppable
from megatron_medgpt.commands.train import demo, plan, train
from megatron_medgpt.config.errors import MedgptError, UsageError, in_one_line

_CommandLineError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What typer raises for a command line; the versions for Python 3.10 have it from click, later ones from themselves."""

app = typer.Typer(
    name="medgpt",
    help="Train, evaluate and export biomedical GPT-oss vision-language models on megatron-core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


BEGIN, USE = "To begin with", "Evaluating and using a model"
"""Headings of the help."""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"medgpt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["MEDGPT_DEBUG"] = "1"


@app.command(rich_help_panel=BEGIN)
def doctor(
    json: Json = False,
    run: Annotated[Path | None, typer.Option(help="Also say how the run of this folder stands.")] = None,
) -> None:
    """What this machine has, what will be used, what is missing and how to get it.

    Example: `medgpt doctor`
    """
    from megatron_medgpt.observe.doctor import run_doctor

    raise typer.Exit(run_doctor(json=json, run=run))


app.command(rich_help_panel=BEGIN)(demo)
for _command in (phantoms, ingest, inspect):
    app.command(rich_help_panel="Data")(_command)
for _command in (plan, train):
    app.command(rich_help_panel="Training")(_command)
app.command("eval", rich_help_panel=USE)(evaluate)
for _command in (score, report, chat):
    app.command(rich_help_panel=USE)(_command)
app.add_typer(convert, name="convert", rich_help_panel=USE)


def main() -> None:
    """Entry point: an expected error is one line on stderr and its exit code, never a traceback.

    What the machine refuses (a full disk, a file that may not be read) is expected too: the work has failed. A signal
    ends with 128 and its number, as shells have it.
    """
    _prepare_output()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers too goes by it; bars fill a log
    try:
        with stoppable():
            _run()
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":  # every rank was told
            print(f"medgpt: {stop}", file=sys.stderr)
        _leave(stop.exit_code)
    except OSError as error:
        if os.environ.get("MEDGPT_DEBUG"):
            raise
        if not (isinstance(error, BrokenPipeError) and _reader_has_left()):
            _say_failed(_what_failed(error))
        raise SystemExit(MedgptError.exit_code) from None
    except MedgptError as error:
        if os.environ.get("MEDGPT_DEBUG"):
            raise
        if isinstance(error, UsageError):
            _say_refused(str(error))
        else:
            _say_failed(str(error))
        _leave(error.exit_code)


def _leave(exit_code: int) -> NoReturn:
    _reader_has_left()
    sys.stderr.flush()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        os._exit(exit_code)  # the end would wait for their server or disk to answer
    raise SystemExit(exit_code) from None


def _what_failed(error: OSError) -> str:
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the folder in which medgpt was called is gone; change to one that is there"
    return in_one_line(error)


def _prepare_output() -> None:
    """Names of files may hold bytes that are no text, and a service may be started without an output."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open to the end)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _run() -> None:
    """Run the command of this process's arguments. Not by ``app()``, which ends the process in a way of its own."""
    root, arguments = typer.main.get_command(app), sys.argv[1:]
    try:
        with root.make_context("medgpt", arguments) as context:
            root.invoke(context)
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from None
    except _CommandLineError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # ``medgpt`` alone, which is a question
            error.show()
        else:
            wrong = _what_is_wrong(error)
            see = " See" if wrong.endswith("?") else "; see"
            _say_refused(f"{wrong}{see} `{_command_of(root, arguments)} --help`")
        raise SystemExit(error.exit_code) from None


def _what_is_wrong(error: Any) -> str:
    """Typer's words for a command line that cannot be, in one line, with the nearest option."""
    said = error.message if getattr(error, "possibilities", None) else error.format_message()
    said = re.sub(r"\. (\w)", lambda found: f"; {found[1].lower()}", " ".join(said.split()).rstrip("."))
    nearest = f"; did you mean {error.possibilities[0]}?" if getattr(error, "possibilities", None) else ""
    return f"{said[:1].lower()}{said[1:]}{nearest}"


def _command_of(group: Any, arguments: Sequence[str]) -> str:
    """The command that was called, as far as it is one: ``medgpt convert verify``."""
    names = ["medgpt"]
    for argument in arguments:
        if argument in getattr(group, "commands", {}):
            names.append(argument)
            group = group.commands[argument]
    return " ".join(names)


def _reader_has_left() -> bool:
    """Whether nobody takes our output any more (``medgpt plan ... | head``), which is no failure to speak of."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return True
    return False


def _say_refused(reason: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # every rank has found the same
        print(f"medgpt: error: {reason}", file=sys.stderr, flush=True)


def _say_failed(reason: str) -> None:
    at = f"rank {os.environ.get('RANK', '0')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"medgpt: {at}failed: {reason}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
