"""Errors that a user can mend. The command line prints their one line and exits with their code."""

from collections.abc import Iterator
from contextlib import contextmanager


class MedgptError(Exception):
    """An expected failure: one line that names what was found, what is allowed and what to set."""

    exit_code = 1


class UsageError(MedgptError):
    """Wrong usage or configuration: exit code 2. Nothing was written."""

    exit_code = 2


class WorkError(MedgptError):
    """The work itself failed (data, checkpoint, machine): exit code 1."""

    exit_code = 1


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Lets what the system refuses inside name this file: of one that is open already it does not say which."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def in_one_line(error: OSError) -> str:
    """What the system refused, with the files it was asked for."""
    files = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    said = " ".join((error.strerror or str(error) or type(error).__name__).split())
    return f"{files}: {said}" if files else said
