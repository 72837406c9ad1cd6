"""A real Slurm on this machine: two nodes on one host, everything in one folder. For tests and for trying launchers.

    python tools/slurm/local_cluster.py start FOLDER     prints what to export; needs root, slurm-wlm and munge
    python tools/slurm/local_cluster.py stop FOLDER

The daemons are munged, slurmctld and one slurmd per node; ``stop`` ends exactly those, by their pid files. The second
node has a mount namespace of its own, so that a folder can be missing there alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

NODES = ("n1", "n2")
OWN_MOUNTS = ("n2",)
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
START_S = 30.0


def missing_programs() -> list[str]:
    """Programs that are not installed (Debian and Ubuntu: ``apt install slurm-wlm munge``)."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class LocalCluster:
    """Slurm on one host. ``environment`` is what sbatch and its like need to find it."""

    def __init__(self, folder: Path, *, cpus: int = 2, gpus: int = 0, first_port: int | None = None):
        """``gpus`` are what Slurm believes to be in a node, as it does of one whose driver is gone."""
        self.folder = folder.resolve()
        self.cpus, self.gpus = cpus, gpus
        self._given_port = first_port

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Write the configuration and start the daemons; returns when both nodes are idle.

        Raises:
            RuntimeError: a program is missing, this is not root, or the nodes did not come up; says what the log says.
        """
        if missing_programs():
            raise RuntimeError(
                f"{', '.join(missing_programs())} not found; Debian, Ubuntu: apt install slurm-wlm munge"
            )
        if os.geteuid() != 0:
            raise RuntimeError("slurmd must be started as root")
        self._write_configuration()
        try:
            self._run(
                "munged", f"--key-file={self.folder}/munge.key", f"--socket={self.folder}/munge.sock", "--force",
                f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
                f"--seed-file={self.folder}/munge.seed",
            )  # fmt: skip
            self._run("slurmctld")
            for node in NODES:
                self.start_node(node)
            self._wait_until_idle()
        except BaseException:
            self.stop()
            raise

    def start_node(self, node: str) -> None:
        own = ("unshare", "--mount", "--propagation", "private") if node in OWN_MOUNTS else ()
        self._run(*own, "slurmd", "-N", node)

    def run_on(self, node: str, *command: str) -> str:
        """Run a command among the mounts of a node, as its jobs see them."""
        pid = (self.folder / f"{node}.pid").read_text().strip()
        return self.run("nsenter", f"--mount=/proc/{pid}/ns/mnt", *command)

    def kill_node(self, node: str) -> None:
        """SIGKILL a node's slurmd, as a crash of the node would end it."""
        self._end(self.folder / f"{node}.pid", signal.SIGKILL)

    def run(self, *command: str, timeout_s: float = 60.0) -> str:
        """Run a Slurm command and return what it prints. Raises RuntimeError with its last words if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout_s)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout.strip()

    def job_fields(self, job_id: str) -> dict[str, str]:
        """``scontrol show job`` as a mapping: JobState, Restarts, Reason, NodeList, ..."""
        words = self.run("scontrol", "show", "job", job_id).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def stop(self) -> None:
        """End the daemons by their pid files."""
        for name in (*NODES, "slurmctld", "munged"):
            self._end(self.folder / f"{name}.pid", signal.SIGTERM)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=START_S)
        if done.returncode:
            raise RuntimeError(f"{command[0]} did not start: {(done.stderr or done.stdout).strip()}")

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.run("sinfo", "--noheader", "--Node", "--format=%t").split() == ["idle"] * len(NODES):
                return
            time.sleep(0.3)
        log = (self.folder / "slurmctld.log").read_text()[-500:]
        raise RuntimeError(f"the nodes are not idle after {START_S:.0f} s; slurmctld says: {log}")

    def _end(self, pid_file: Path, how: signal.Signals) -> None:
        try:
            pid = int(pid_file.read_text())
            os.kill(pid, how)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
            time.sleep(0.05)
        pid_file.unlink(missing_ok=True)

    def _write_configuration(self) -> None:
        for name in ("state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        # munged refuses a folder that others can write
        self.folder.chmod(0o755)
        host, ports = socket.gethostname().split(".")[0], self._ports()
        gpus = f"\nGresTypes=gpu\nNodeName=n[1-2] Gres=gpu:{self.gpus}" if self.gpus else "\nNodeName=n[1-2]"
        if self.gpus:
            for number in range(self.gpus):  # slurmd counts devices that exist, whatever they are
                os.mknod(self.folder / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
            (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n")
        (self.folder / "slurm.conf").write_text(
            f"""ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge.sock
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmdPidFile={self.folder}/%n.pid
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd-%n.log
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
KillWait=5
SlurmdTimeout=10
MinJobAge=600{gpus} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[1] + 1}] CPUs={self.cpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
        )

    def _ports(self) -> tuple[int, int]:
        if self._given_port is not None:
            return self._given_port, self._given_port + 1
        for first in range(17000 + os.getpid() % 4000, 30000, 3):
            if all(_is_free(first + i) for i in range(3)):
                return first, first + 1
        raise RuntimeError("no three free ports in a row")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    cluster = LocalCluster(arguments.folder)
    if arguments.action == "stop":
        cluster.stop()
        return 0
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        cluster.start()
    except RuntimeError as error:
        print(f"local cluster: {error}", file=sys.stderr)
        return 1
    print(f"export SLURM_CONF={cluster.folder}/slurm.conf")
    return 0


if __name__ == "__main__":
    sys.exit(main())
