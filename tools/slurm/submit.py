"""Submit jobs, or a chain of them, from one YAML of settings (tools/slurm/settings.example.yaml).

    python tools/slurm/submit.py --settings cluster.yaml train [--dry-run]
    python tools/slurm/submit.py --settings cluster.yaml chain [--dry-run]

Each job starts when the one before it has ended well. ``--dry-run`` prints every command and writes nothing. What a job
needs to know is written to WORKSPACE/slurm/<job>.env (mode 0600) and given to it as a file: sbatch's command line and
the exported environment hold no settings and no secret.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
CODE = HERE.parent.parent
EXPORTED = "PATH,HOME,USER,LANG,SLURM_CONF"
DEFAULTS: dict[str, Any] = {
    "workspace": None, "account": "", "partition": "", "nodes": 1, "gpus_per_node": 0, "gpu": "cpu",
    "ranks_per_node": "", "cpus_per_task": "", "time": "24:00:00", "extra": [], "launch": "torchrun", "runtime": "bare",
    "image": "", "mounts": "", "python": "python", "setup": "", "network_interface": "", "save_seconds": 300,
    "max_restarts": 3, "preflight": "yes", "preflight_seconds": 180, "min_free_gb": 20, "min_bandwidth_gb_s": 0,
    "needs": [], "meet_seconds": 300, "peer_seconds": 120, "token_file": "", "train": {}, "chain": [],
}  # fmt: skip
CHOICES = {
    "launch": ("torchrun", "srun"),
    "runtime": ("bare", "pyxis", "apptainer"),
    "preflight": ("yes", "no"),
    "gpu": ("cpu", "h100", "h200", "b200", "b300", "gb200", "gb300"),
}
SECRET = re.compile(r"(^|_)(token|secret|password|api_?key)s?$", re.IGNORECASE)
JOBS = ("ingest", "convert", "train", "evaluate")
FIELDS = {
    "ingest": {"inputs", "out", "tokenizer", "elements", "key_file", "options"},
    "convert": {"arguments"},
    "train": {"run", "out", "overrides", "nodes"},
    "evaluate": {"arguments"},
}

SITE_FIELDS = ("account", "partition", "time", "cpus_per_task", "extra")
"""Settings that a job of a chain may have of its own: an ingest runs in a CPU partition."""


class SettingsError(Exception):
    """Names the setting and what is allowed."""


class NotSent(Exception):
    """Names the job that Slurm did not take."""


@dataclass(frozen=True)
class Job:
    """One sbatch call."""

    name: str
    script: str
    settings: dict[str, str]
    options: list[str]
    files: dict[str, str] = field(default_factory=dict)
    """Further files that the job reads: setting's name -> content."""


def read_settings(path: Path) -> dict[str, Any]:
    """Settings with defaults, checked.

    Raises:
        SettingsError: an unknown or impossible setting.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(given, dict):
        raise SettingsError(f"{path}: expected name: value lines")
    for name in given:
        if name not in DEFAULTS:
            raise SettingsError(f"{path}: unknown setting {name!r}; known: {', '.join(DEFAULTS)}")
    settings = {**DEFAULTS, **given}
    if settings["preflight"] in (True, False):  # YAML reads yes and no as booleans
        settings["preflight"] = "yes" if settings["preflight"] else "no"
    for name, allowed in CHOICES.items():
        if settings[name] not in allowed:
            raise SettingsError(f"{path}: {name}={settings[name]!r}; allowed: {', '.join(allowed)}")
    if not settings["workspace"]:
        raise SettingsError(f"{path}: workspace is missing; a folder that every node sees")
    if settings["runtime"] != "bare" and not settings["image"]:
        raise SettingsError(f"{path}: runtime={settings['runtime']} needs image")
    _refuse_secrets(settings, str(path))
    return settings


def _refuse_secrets(tree: Any, where: str) -> None:
    if isinstance(tree, dict):
        for name, value in tree.items():
            if SECRET.search(str(name)) and value:
                raise SettingsError(f"{where}: {name} looks like a secret; put it into a file of mode 600 (token_file)")
            _refuse_secrets(value, f"{where}: {name}")
    elif isinstance(tree, list):
        for value in tree:
            _refuse_secrets(value, where)
    elif isinstance(tree, str) and re.search(r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9]{20,}", tree):
        raise SettingsError(f"{where}: holds a token; put it into a file of mode 600 (token_file)")


def make_job(kind: str, entry: dict[str, Any], settings: dict[str, Any]) -> list[Job]:
    """The sbatch calls of one entry; an ingest is an array and a merge.

    Raises:
        SettingsError: a field is missing or unknown.
    """
    known = sorted({*FIELDS[kind], *SITE_FIELDS, "job", "name"})
    if unknown := sorted(set(entry) - set(known)):
        raise SettingsError(f"{kind}: unknown field {unknown[0]!r}; known: {', '.join(known)}")
    common = {name: settings[name] for name in DEFAULTS if name not in ("train", "chain", "extra", "workspace")}
    common |= {"workspace": settings["workspace"], "code": str(CODE), "needs": " ".join(settings["needs"])}
    name = entry.get("name", kind)
    make = {"ingest": _ingest, "convert": _command, "train": _train, "evaluate": _command}[kind]
    return make(kind, name, entry, settings, common)


def _required(kind: str, entry: dict[str, Any], *names: str) -> list[Any]:
    for name in names:
        if not entry.get(name):
            raise SettingsError(f"{kind}: {name} is missing")
    return [entry[name] for name in names]


def _below(settings: dict[str, Any], path: str) -> str:
    return str(Path(settings["workspace"]) / path)


def _train(kind: str, name: str, entry: dict[str, Any], settings: dict[str, Any], common: dict[str, Any]) -> list[Job]:
    run, out = _required(kind, entry, "run", "out")
    nodes = entry.get("nodes", settings["nodes"])
    ranks = settings["ranks_per_node"] or settings["gpus_per_node"] or 1
    if Path(run).is_file():  # the job begins in the workspace, not here
        run = str(Path(run).resolve())
    own = {"run": run, "out": _below(settings, out), "overrides": " ".join(entry.get("overrides", []))}
    tasks = ranks if settings["launch"] == "srun" else 1
    options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--signal=TERM@{settings['save_seconds']}"]
    if settings["gpus_per_node"]:
        options.append(f"--gpus-per-node={settings['gpus_per_node']}")
    common = {**common, "ranks_per_node": ranks}
    return [Job(name, "train.sbatch", _shell({**common, **own}), [*options, *_site(settings, entry)])]


def _ingest(kind: str, name: str, entry: dict[str, Any], settings: dict[str, Any], common: dict[str, Any]) -> list[Job]:
    inputs, out, tokenizer, key_file = _required(kind, entry, "inputs", "out", "tokenizer", "key_file")
    elements = entry.get("elements", len(inputs))
    own = {
        "out": _below(settings, out), "tokenizer": tokenizer, "num_parts": elements, "gpu": "cpu", "gpus_per_node": 0,
        "ingest_options": " ".join(entry.get("options", [])), "key_file": key_file,
    }  # fmt: skip
    shell = _shell({**common, **own})
    files = {"INPUT_LIST": "".join(f"{item}\n" for item in inputs)}
    array = Job(name, "ingest.sbatch", shell, [f"--array=0-{elements - 1}", *_site(settings, entry)], files)
    return [array, Job(f"{name}-merge", "merge.sbatch", shell, _site(settings, entry), files)]


def _command(
    kind: str, name: str, entry: dict[str, Any], settings: dict[str, Any], common: dict[str, Any]
) -> list[Job]:
    (arguments,) = _required(kind, entry, "arguments")
    variable = {"convert": "convert_arguments", "evaluate": "eval_arguments"}[kind]
    ranks = settings["ranks_per_node"] or settings["gpus_per_node"] or 1
    own = {variable: " ".join(arguments), "out": settings["workspace"], "ranks_per_node": ranks}
    options = ["--nodes=1"]
    if settings["gpus_per_node"] and kind == "evaluate":
        options.append(f"--gpus-per-node={settings['gpus_per_node']}")
    return [Job(name, f"{kind}.sbatch", _shell({**common, **own}), [*options, *_site(settings, entry)])]


def _site(settings: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """Options that a site asks for; those of the job itself come first."""
    of_job = {name: entry.get(name, settings[name]) for name in SITE_FIELDS}
    extra = of_job.pop("extra")
    return [f"--{name.replace('_', '-')}={value}" for name, value in of_job.items() if value] + list(extra)


def _shell(values: dict[str, Any]) -> dict[str, str]:
    return {name.upper(): str(value) for name, value in values.items() if value != ""}


def jobs_of(what: str, settings: dict[str, Any]) -> list[Job]:
    """All sbatch calls in order. Raises SettingsError."""
    if what == "train":
        return make_job("train", settings["train"], settings)
    jobs = []
    for entry in settings["chain"]:
        kind = entry.get("job")
        if kind not in JOBS:
            raise SettingsError(f"chain: job={kind!r}; allowed: {', '.join(JOBS)}")
        jobs += make_job(kind, entry, settings)
    if not jobs:
        raise SettingsError("chain is empty; list jobs under chain: in the settings")
    names = [job.name for job in jobs]
    if len(set(names)) != len(names):
        raise SettingsError(f"chain: two jobs have one name ({', '.join(names)}); give each a name:")
    return jobs


def sbatch_command(job: Job, settings_file: Path, logs: Path, after: str | None) -> list[str]:
    command = ["sbatch", "--parsable", f"--job-name={job.name}", f"--export={EXPORTED}", *job.options]
    pattern = "%x_%A_%a.log" if job.script == "ingest.sbatch" else "%x_%j.log"
    command.append(f"--output={logs / pattern}")
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return [*command, str(HERE / job.script), str(settings_file)]


def write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(text, encoding="utf-8")


def submit(jobs: list[Job], workspace: Path, *, dry_run: bool) -> list[str]:
    """Submit every job after the one before it; returns their numbers (or placeholders).

    Raises:
        NotSent: sbatch refused a job; names the job, repeats what sbatch said, and says which are sent already.
    """
    folder, numbers = workspace / "slurm", []
    for job in jobs:
        file = folder / f"{job.name}.env"
        lists = {name: folder / f"{job.name}.{name.lower()}" for name in job.files}
        settings = {**job.settings, **{name: str(path) for name, path in lists.items()}}
        command = sbatch_command(job, file, folder, numbers[-1] if numbers else None)
        if dry_run:
            print(shlex.join(command))
            numbers.append(f"<{job.name}>")
            continue
        for name, path in lists.items():
            write_private(path, job.files[name])
        write_private(file, "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items()))
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = "; ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())
            sent = f". Jobs before it are sent; take them back with scancel {' '.join(numbers)}" if numbers else ""
            raise NotSent(f"job {job.name}: {said}{sent}")
        numbers.append(done.stdout.strip().split(";")[0])
        print(f"{job.name}: job {numbers[-1]}" + (f" after {numbers[-2]}" if len(numbers) > 1 else ""))
    return numbers


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "chain"))
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="print every job; write and submit nothing")
    options = parser.parse_args(arguments)
    try:
        settings = read_settings(options.settings)
        submit(jobs_of(options.what, settings), Path(settings["workspace"]), dry_run=options.dry_run)
    except SettingsError as error:
        print(f"submit: error: {error}", file=sys.stderr)
        return 2
    except NotSent as error:
        print(f"submit: failed: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # no sbatch here, a workspace that cannot be written
        print(f"submit: failed: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
