"""``medgpt``, which is ``python -m megatron_medgpt``: Ctrl-C ends in one line while it is still being imported.

From there on ``commands.stopping`` hears it.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Entry point: ``cli.main``, with SIGINT heard before its imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    # Blocked by who started this rank, for the time before.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    from megatron_medgpt.cli import main as run

    run()


def _stop(number: int, _frame: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"medgpt: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    os._exit(128 + number)  # an exception would have to come through whatever is being imported


if __name__ == "__main__":
    main()
