"""``medgpt train``: from the command line to a finished run."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_medgpt.config.errors import MedgptError, UsageError, in_one_line
from megatron_medgpt.config.load import load_run, override_run, to_yaml
from megatron_medgpt.config.schema import RunConfig, StageConfig
from megatron_medgpt.data.exclude import read_excluded
from megatron_medgpt.data.manifest import MANIFEST, read_manifest
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.evaluate.scorers import check_protocol
from megatron_medgpt.evaluate.tasks import TASKS, load_task
from megatron_medgpt.observe.marker import (
    NAME,
    Status,
    marker_text,
    put_back,
    read_state,
    read_status,
    write_marker,
)
from megatron_medgpt.observe.whole import write_whole
from megatron_medgpt.parallel.launch import launched, run_ranks
from megatron_medgpt.parallel.plan import Layout
from megatron_medgpt.train.layouts import check_stage

log = logging.getLogger(__name__)


def run_train(run: str, overrides: Sequence[str], *, num_ranks: int = 1, dry_run: bool = False) -> int:
    """Train a recipe or a run.yaml; start the ranks first unless torchrun or srun has done so.

    Returns:
        The exit code: 0 when every stage is done, or when a signal stopped the run after it was saved.
    """
    if num_ranks < 1:
        raise UsageError(f"--nproc {num_ranks}: must be at least 1")
    config = find_run(run, overrides)
    if not dry_run:
        _refuse_second(Path(config.out))  # in a rank: before all have met, so that none of its own has written yet
    if not launched():
        check_before_start(config, num_ranks)
        if num_ranks > 1:
            flags = ["--dry-run"] if dry_run else []
            return run_ranks(["train", run, *overrides, *flags], num_ranks)
    return train_here(config, dry_run=dry_run)


def find_run(run: str, overrides: Sequence[str]) -> RunConfig:
    """A recipe by its name, or a YAML file by its path, with overrides applied."""
    from megatron_medgpt.recipes import RECIPES, recipe

    if run in RECIPES:
        return override_run(recipe(run), overrides)
    if run.endswith((".yaml", ".yml")) or os.path.exists(run):
        config = load_run(Path(run), overrides)
        _refuse_moved(Path(run), config, overrides)
        return config
    import difflib

    close = difflib.get_close_matches(run, RECIPES, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"recipes: {', '.join(sorted(RECIPES))}"
    raise UsageError(f"{run!r} is neither a recipe nor a YAML file; {hint}")


def _refuse_moved(file: Path, config: RunConfig, overrides: Sequence[str]) -> None:
    """Refuse to train elsewhere than in the run folder whose run.yaml was named: it was moved, copied, or named from
    another folder than it was written in."""
    folder = file.parent
    if not (folder / NAME).is_file() or any(override.startswith("out=") for override in overrides):
        return
    if folder.resolve() != Path(config.out).resolve():
        raise UsageError(
            f"{file} lies in a run folder and says out={config.out}, which is another one; add out={folder} to "
            f"continue the run that it lies in, or out={config.out}"
        )


def check_before_start(config: RunConfig, num_ranks: int) -> list[Layout]:
    """Everything that can be refused without torch, before any process is started or any file is written.

    Returns:
        The layout of each stage.
    """
    layouts = [check_stage(config, stage, num_ranks) for stage in config.stages]
    _check_out(Path(config.out))
    if not (Path(config.tokenizer) / "tokenizer.json").is_file():
        raise UsageError(f"tokenizer={config.tokenizer}: no tokenizer.json there")
    words = Tokenizer.load(Path(config.tokenizer))
    check_vocabulary(config, words)
    for stage in config.stages:
        for blend in (*stage.data, *stage.validation_data):
            _check_dataset(stage.name, Path(blend.path), words, config)
        read_excluded(stage.exclude, field=f"stages.{stage.name}.exclude=")
        _check_questions(stage)
    start_from = config.checkpoint.start_from
    if start_from is not None and not (Path(start_from) / "manifest.json").is_file():
        raise UsageError(
            f"checkpoint.start_from={start_from}: no whole checkpoint there (no manifest.json); "
            "name a step-NNNNNNNN folder, or one that medgpt convert wrote"
        )
    return layouts


def check_vocabulary(config: RunConfig, words: Tokenizer) -> None:
    """Refuse a model whose embedding has fewer rows than the tokenizer has tokens."""
    if words.vocab_size > config.model.language.vocab_size:
        raise UsageError(
            f"model.language.vocab_size={config.model.language.vocab_size} is smaller than the {words.vocab_size} "
            f"tokens of {config.tokenizer}; set it to at least that"
        )


def _check_out(out: Path) -> None:
    """Refuse a run folder that cannot be made; said now, before the ranks are started."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UsageError(f"out={out}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"out={out}: no permission to write in {there}; name another folder")


def _refuse_second(out: Path) -> None:
    """Refuse a run folder in which a run goes on: both would write its metrics and checkpoints."""
    state = read_state(out)
    if state is not None and state.alive:
        raise UsageError(f"out={out}: a run goes on there ({state.process}); let it end, stop it, or set another out=")


def _say_what_was(out: Path) -> None:
    """What the log should tell about the attempt before this one, which could not say it itself."""
    state = read_state(out)
    if state is None or state.status != "running":
        return
    if state.cut_off:
        log.warning("the run here %s", state.describe())
    else:
        log.warning("%s is %s; if it still goes on, stop one of the two: both write there", out, state.describe())


def _check_questions(stage: StageConfig) -> None:
    """Refuse a set of questions that the first validation, perhaps hours away, could not ask."""
    at = f"stages.{stage.name}"
    if stage.question_task not in TASKS:
        raise UsageError(f"{at}.question_task={stage.question_task!r}; allowed: {', '.join(TASKS)}")
    if stage.questions is None:
        return
    if not Path(stage.questions).exists():
        raise UsageError(f"{at}.questions={stage.questions}: no such folder")
    try:
        check_protocol(stage.question_protocol, load_task(stage.question_task, stage.questions).questions)
    except MedgptError as error:
        raise UsageError(f"{at}.questions={stage.questions}: {error}") from None


def _check_dataset(stage: str, folder: Path, words: Tokenizer, config: RunConfig) -> None:
    if not (folder / MANIFEST).is_file():
        raise UsageError(
            f"stages.{stage}: {folder} is not a dataset folder (no {MANIFEST}); make one with `medgpt ingest`"
        )
    manifest, _ = read_manifest(folder)
    if manifest.tokenizer["sha256"] != words.fingerprint:
        raise UsageError(
            f"stages.{stage}: {folder} was made with another tokenizer than {config.tokenizer} (sha256 "
            f"{manifest.tokenizer['sha256'][:12]}, not {words.fingerprint[:12]}); ingest it again, or set tokenizer="
        )


def train_here(config: RunConfig, *, dry_run: bool) -> int:
    """Train in this process, which is one rank of its world."""
    from megatron_medgpt.model.build import check_kernels, kernel_choices
    from megatron_medgpt.observe.log import say_platform, set_up_log
    from megatron_medgpt.parallel import groups
    from megatron_medgpt.train.stages import run_stages

    rank = int(os.environ.get("RANK", "0"))
    set_up_log(rank)
    set_threads(config)
    out, begun = Path(config.out), False
    before = marker_text(out)  # before all ranks have met, so that none of this command has written yet

    def begin() -> None:
        nonlocal begun
        begun = True
        if world.is_first:
            _keep_settings(config)

    world = groups.start()
    try:
        layouts = " then ".join(layout.describe() for layout in check_before_start(config, world.size))
        check_kernels(config.kernels, config.model, world.device)
        say_platform(f"{world.platform.name}, {config.precision}", layouts, world.size)
        chosen = kernel_choices(config.kernels, world.device)
        log.info("kernels: %s", ", ".join(f"{name} {choice}" for name, choice in chosen.items()))
        if dry_run:
            from megatron_medgpt.train.dry_run import run_dry

            run_dry(config, world)
            return 0
        if world.is_first:
            _say_what_was(out)
            write_marker(out, "running")
            if not (out / "run.yaml").exists():  # one that is there stays until this configuration goes with the rest
                _keep_settings(config)
        end = run_stages(config, world, begun=begin)
        if world.is_first:
            write_marker(out, end.status, step=end.step)
            log.info("%s after step %d; checkpoint %s", end.status, end.step, end.checkpoint)
        return 0
    except BaseException as error:
        if out.is_dir() and not dry_run:
            refused = isinstance(error, UsageError) and not begun
            if not (refused and put_back(out, before)):
                _note_end(out, error)
        raise
    finally:
        groups.stop()


def _keep_settings(config: RunConfig) -> None:
    write_whole(Path(config.out) / "run.yaml", to_yaml(config))
    keep_tokenizer(Path(config.tokenizer), Path(config.out) / "tokenizer")


def _note_end(out: Path, error: BaseException) -> None:
    """Let the marker say how a run ended that did not come to its end.

    Every rank may have a word. The first that has failed is the reason; the others only lost their peer.
    """
    if isinstance(error, MedgptError):
        ending: tuple[Status, str | None] = ("failed", str(error))
    elif isinstance(error, OSError) and not isinstance(error, ConnectionError):
        ending = ("failed", in_one_line(error))
    elif isinstance(error, Exception):
        ending = ("crashed", " ".join(f"{type(error).__name__}: {error}".split())[:500])
    else:  # a signal outside of the steps
        ending = ("stopped", None)
    if ending[0] != "failed" and read_status(out) != "running":
        return
    try:
        write_marker(out, ending[0], reason=ending[1])
    except OSError as unwritten:  # a full disk, which may be the very reason
        log.error("%s cannot be written (%s); it says running", out / NAME, in_one_line(unwritten))


def keep_tokenizer(source: Path, copy: Path) -> None:
    """A copy in the run folder: evaluation and export then need nothing beside it."""
    if source.resolve() != copy.resolve():
        shutil.copytree(source, copy, dirs_exist_ok=True)


def set_threads(config: RunConfig) -> None:
    """CPU threads of this rank: as configured, or the machine's cores shared among its ranks."""
    import torch

    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.num_threads or max(1, len(os.sched_getaffinity(0)) // ranks_here))
