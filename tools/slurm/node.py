"""The one task of a node: torchrun with the flags that let its ranks save when Slurm sends a signal.

    srun --ntasks-per-node=1 python tools/slurm/node.py --ranks 8 -- train run.yaml out=runs/a

By default torchrun dies at once of SIGUSR1 and gives its ranks 30 s after SIGTERM; both lose the step. A node that
fails says its name and what went wrong. Standard library only.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from heartbeat import Heartbeat

MEET_S = 300
"""Seconds that the nodes have to find each other."""


def torchrun_command(
    *, ranks: int, nodes: int, node: int, address: str, port: str, save_seconds: int, meet_seconds: float = MEET_S
) -> list[str]:
    """torchrun up to the module it runs. It waits a little longer than we do, whose message names the node."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--node-rank={node}",
        f"--nproc-per-node={ranks}", f"--master-addr={address}", f"--master-port={port}", "--max-restarts=0",
        f"--rdzv-conf=timeout={round(meet_seconds) + 30}", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
    ]  # fmt: skip
    if _knows("--shutdown-timeout"):
        command.append(f"--shutdown-timeout={max(30, save_seconds - 60)}")
    return command


def _knows(flag: str) -> bool:
    """PyTorch before 2.9 has no --shutdown-timeout."""
    torch = importlib.util.find_spec("torch")  # found, not imported: that takes seconds
    if torch is None or torch.origin is None:
        return False
    return flag in (Path(torch.origin).parent / "distributed" / "run.py").read_text(encoding="utf-8")


def port_fault(address: str, port: int) -> str | None:
    """Why the first node cannot open the meeting point, in one line; None when it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return f"port {port} on {address} cannot be opened: {error.strerror}"
    return None


def reach_fault(address: str, port: int, deadline_s: float) -> str | None:
    """Why another node cannot reach the meeting point within the deadline; None when it can."""
    last, end = "", time.monotonic() + deadline_s
    while time.monotonic() < end:
        try:
            with socket.create_connection((address, port), timeout=5):
                return None
        except OSError as error:
            last = error.strerror or str(error)
            time.sleep(0.5)
    return f"cannot reach the first node at {address}:{port} within {deadline_s:.0f} s: {last}"


def _watch_peers(
    name: str, first: bool, address: str, port: int, deadline_s: float, agent: subprocess.Popen,
    expected: tuple[str, ...], meet_s: float,
) -> Heartbeat:  # fmt: skip
    """End this node's ranks when a peer has been silent for the deadline or never came, and say which."""

    def give_up(absent: list[str]) -> None:
        for peer in absent:
            print(
                f"node {name}: node {peer} did not come within {meet_s:.0f} s; giving up", file=sys.stderr, flush=True
            )
        agent.kill()  # it waits in the rendezvous and has no ranks yet

    def end(silent: dict[str, float]) -> None:
        for peer, seconds in silent.items():
            print(f"node {name}: nothing heard from node {peer} for {seconds:.0f} s; ending this node's ranks",
                  file=sys.stderr, flush=True)  # fmt: skip
        # They hang in a collective, so a signal that asks them to save would wait for ever.
        for child in _children(agent.pid):
            os.kill(child, signal.SIGKILL)

    heartbeat = Heartbeat(
        name=name, first=first, address=address, port=port, deadline_s=deadline_s, lost=end, never_came=give_up,
        expected=expected if first else (), meet_s=meet_s,
    )  # fmt: skip
    heartbeat.start()
    return heartbeat


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.is_file() else []


def _note(number: int, agent: subprocess.Popen, stopping: list[int]) -> None:
    """Remember a signal; pass it on only where Slurm has not given it to torchrun too (a second one ends torchrun)."""
    stopping.append(number)
    if "SLURM_STEP_ID" not in os.environ and len(stopping) == 1:
        agent.send_signal(number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True, help="ranks of this node")
    parser.add_argument("--save-seconds", type=int, default=300, help="time between SIGTERM and the end")
    parser.add_argument("--meet-seconds", type=float, default=MEET_S, help="time for the nodes to find each other")
    parser.add_argument("--peer-seconds", type=float, default=120, help="silence of a node that ends the job")
    parser.add_argument("--nodes", default="", help="names of all nodes, separated by commas; who is missed is named")
    parser.add_argument("arguments", nargs="+", help="of medgpt")
    options = parser.parse_args()
    name, node = os.environ.get("SLURMD_NODENAME", socket.gethostname()), int(os.environ.get("SLURM_NODEID", "0"))
    nodes, address = int(os.environ.get("SLURM_NNODES", "1")), os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT", "29500")
    command = torchrun_command(
        ranks=options.ranks, nodes=nodes, node=node, address=address, port=port, save_seconds=options.save_seconds,
        meet_seconds=options.meet_seconds,
    )  # fmt: skip
    if node == 0 and (fault := port_fault(address, int(port))):
        print(f"node {name}: {fault}; submit again for another port", file=sys.stderr, flush=True)
        return 4
    agent = subprocess.Popen([*command, "-m", "megatron_medgpt.cli", *options.arguments])
    heartbeat = None
    if nodes > 1:
        expected = tuple(filter(None, options.nodes.split(",")))
        try:
            heartbeat = _watch_peers(
                name, node == 0, address, int(port) + 2, options.peer_seconds, agent, expected, options.meet_seconds
            )
        except OSError as error:
            print(f"node {name}: UDP port {int(port) + 2} cannot be opened: {error.strerror}; submit again for another",
                  file=sys.stderr, flush=True)  # fmt: skip
            agent.kill()
            return 4
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda signum, _: _note(signum, agent, stopping))
    if node > 0 and (fault := reach_fault(address, int(port), options.meet_seconds)) and agent.poll() is None:
        print(f"node {name}: {fault}", file=sys.stderr, flush=True)
        agent.terminate()
        agent.wait(timeout=60)
        return 4
    code = agent.wait()
    if heartbeat is not None:
        heartbeat.close()
    if stopping:
        # torchrun returns 1 though its ranks have saved. With any other code than 0 srun would kill the nodes that are
        # still saving; whether the run goes on is in its marker.
        print(f"node {name}: stopped by {signal.Signals(stopping[0]).name}", flush=True)
        return 0
    if code:
        print(f"node {name}: torchrun ended with {code}", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
