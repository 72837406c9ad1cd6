"""The command ``medgpt``: its commands in the order of its help, and how errors end it.

The commands stand in ``commands``; none of them imports a room before it is called.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from megatron_medgpt import __version__
from megatron_medgpt.commands.convert import convert
from megatron_medgpt.commands.data import ingest, inspect, phantoms
from megatron_medgpt.commands.evaluate import chat, evaluate, report, score
from megatron_medgpt.commands.options import Json
from megatron_medgpt.commands.train import demo, plan, train
from megatron_medgpt.config.errors import MedgptError, UsageError

app = typer.Typer(
    name="medgpt",
    help="Train, evaluate and export biomedical GPT-oss vision-language models on megatron-core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"medgpt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if debug:
        os.environ["MEDGPT_DEBUG"] = "1"


@app.command()
def doctor(json: Json = False) -> None:
    """What this machine has, what will be used, what is missing and how to get it.

    Example: `medgpt doctor`
    """
    from megatron_medgpt.observe.doctor import run_doctor

    raise typer.Exit(run_doctor(json=json))


for _command in (demo, phantoms, ingest, inspect, train):
    app.command()(_command)
app.command("eval")(evaluate)
for _command in (score, plan, chat, report):
    app.command()(_command)
app.add_typer(convert, name="convert")


def main() -> None:
    """Entry point: an expected error is one line on stderr and its exit code, never a traceback.

    What the machine refuses (a full disk, a file that may not be read) is expected too: the work has failed.
    """
    try:
        app()
    except OSError as error:
        if os.environ.get("MEDGPT_DEBUG"):
            raise
        _say_failed(_in_one_line(error))
        raise SystemExit(MedgptError.exit_code) from None
    except MedgptError as error:
        if os.environ.get("MEDGPT_DEBUG"):
            raise
        rank = os.environ.get("RANK", "0")
        if isinstance(error, UsageError):
            if rank == "0":  # every rank has found the same
                print(f"medgpt: error: {error}", file=sys.stderr, flush=True)
        else:
            _say_failed(str(error))
        sys.stdout.flush()
        raise SystemExit(error.exit_code) from None


def _say_failed(reason: str) -> None:
    at = f"rank {os.environ.get('RANK', '0')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"medgpt: {at}failed: {reason}", file=sys.stderr, flush=True)


def _in_one_line(error: OSError) -> str:
    files = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    said = " ".join((error.strerror or str(error) or type(error).__name__).split())
    return f"{files}: {said}" if files else said


if __name__ == "__main__":
    main()
