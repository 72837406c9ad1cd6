"""Section ``stages``: what one stage of the curriculum learns, from which data, how, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_medgpt.config.checks import not_negative, positive, require
from megatron_medgpt.config.layout import ParallelConfig

MODULES = ("encoder", "projector", "language", "experts", "router")
"""Names by which stages freeze modules and set their learning rates. ``language`` is the language model without its
experts and routers: embedding, attention, norms and head."""


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """One dataset folder of a stage's blend."""

    path: str
    weight: float = 1.0
    """Share of samples relative to the other entries, in units of the dataset's own passes: weights 2 and 1 show the
    first dataset twice per epoch for once of the second."""

    def __post_init__(self) -> None:
        positive("stages.data", weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate factor over the steps of a stage: linear warm-up, then the named decay to ``min_factor``."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    min_factor: float = 0.1

    def __post_init__(self) -> None:
        require(
            self.kind in ("cosine", "linear", "constant"),
            f"schedule.kind={self.kind!r}; allowed: cosine, linear, constant",
        )
        not_negative("schedule", warmup_steps=self.warmup_steps)
        require(0 <= self.min_factor <= 1, f"schedule.min_factor is {self.min_factor}; allowed: 0 to 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay; biases, norms and sinks are not decayed."""

    learning_rate: float = 2e-5
    module_learning_rates: dict[str, float] = field(default_factory=dict)
    """Overrides per module (see ``MODULES``), e.g. ``{projector: 1e-3}``."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        positive("optimizer", learning_rate=self.learning_rate, eps=self.eps)
        not_negative("optimizer", weight_decay=self.weight_decay, clip_grad_norm=self.clip_grad_norm)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}; it must be 0 or more and less than 1")
        for module, rate in self.module_learning_rates.items():
            require(
                module in MODULES,
                f"optimizer.module_learning_rates names {module!r}; allowed: {', '.join(MODULES)}",
            )
            not_negative("optimizer.module_learning_rates", **{module: rate})


VALIDATION_METRICS = ("validation_loss", "validation_ppl", "option_accuracy", "option_loss")
"""Figures of a validation. ``option_accuracy/NAME`` is the accuracy of one modality or kind of question."""


def lower_is_better(metric: str) -> bool:
    """Whether a validation figure is a loss, or a share of right answers."""
    return not metric.startswith("option_accuracy")


def _check_metric(field_name: str, metric: str | None, stage: StageConfig) -> None:
    """Refuse a figure that no validation of the stage has."""
    if metric is None:
        return
    known = metric in VALIDATION_METRICS or metric.startswith("option_accuracy/")
    require(known, f"{field_name}={metric!r}; allowed: {', '.join(VALIDATION_METRICS)}, option_accuracy/NAME")
    at = f"stages.{stage.name}"
    require(stage.validation_interval > 0, f"{field_name}={metric} needs {at}.validation_interval > 0")
    of_questions = metric.startswith("option_")
    given = stage.questions is not None if of_questions else bool(stage.validation_data)
    require(given, f"{field_name}={metric} needs {at}.{'questions' if of_questions else 'validation_data'}")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Changes of training pictures, drawn anew for every picture in every epoch; all off by default.

    Each number is the most that is done in either direction.
    """

    rotate_degrees: float = 0.0
    shift: float = 0.0
    """Share of the side."""
    zoom: float = 0.0
    """0.1 zooms between 1/1.1 and 1.1."""
    brightness: float = 0.0
    """Share of the range from black to white that is added."""
    contrast: float = 0.0
    """Share by which differences from mid-grey grow or shrink."""
    mirror: bool = False
    """Turns half of the pictures over, left to right. It makes a left lung a right one: only for pictures without
    sides (microscopy, dermoscopy) and texts that name none."""

    def __post_init__(self) -> None:
        for name, most in (("rotate_degrees", 180), ("shift", 0.5), ("zoom", 1), ("brightness", 1), ("contrast", 1)):
            value = getattr(self, name)
            require(0 <= value <= most, f"augment.{name}={value}; allowed: 0 to {most}")


@dataclass(frozen=True, kw_only=True)
class ExitConfig:
    """Ends a stage before ``num_steps`` by a validation figure (checked at every validation)."""

    metric: str | None = None
    """One of ``VALIDATION_METRICS``, or ``option_accuracy/NAME``."""
    threshold: float | None = None
    """The stage ends at this loss or less, or at this accuracy or more; never by it when not given."""
    patience: int = 0
    """The stage ends after this many validations in a row without a new best; never by it when 0."""

    def __post_init__(self) -> None:
        require(self.patience >= 0, f"exit.patience={self.patience} must be 0 or more")
        require(
            self.metric is None or self.threshold is not None or self.patience > 0,
            f"exit.metric={self.metric} ends nothing; set exit.threshold or exit.patience",
        )
        for name in ("threshold", "patience"):
            value = getattr(self, name)
            require(self.metric is not None or not value, f"exit.{name}={value} needs exit.metric")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the curriculum. The next stage starts from the last one's weights with a fresh optimizer."""

    name: str
    data: tuple[BlendConfig, ...]
    num_steps: int
    sequence_length: int = 2048
    micro_batch_rows: int = 1
    global_batch_rows: int = 8
    """Packed rows of one optimizer step over all data-parallel ranks."""
    frozen: tuple[str, ...] = ()
    """Modules that do not learn (see ``MODULES``)."""
    experts: Literal["plain", "packed"] = "plain"
    """``packed`` keeps the experts, which must be frozen, in MXFP4 (17 bytes for 32 weights) and decodes them where
    they are used. It starts from a checkpoint of ``medgpt convert hf-to-megatron --keep-packed`` or of another such
    stage; a ``plain`` stage unpacks what it starts from."""
    parallel: ParallelConfig | None = None
    """Layout of this stage; the run's layout when not given."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    exclude: str | None = None
    """JSONL with a ``sample_id`` a line (``tools/data/audit_leakage.py`` writes one): those samples of ``data`` are
    left out."""
    validation_data: tuple[BlendConfig, ...] = ()
    validation_interval: int = 0
    """Steps between validations; 0 turns them off."""
    validation_max_share: float = 0.0
    """Share of the stage's time that validations may take: one that is due and would take more waits for the next
    interval (the first and the last do not). 0 puts none off, so that they come at the same steps in every run."""
    validation_rows: int = 16
    """Packed rows of one validation, the same ones every time."""
    questions: str | None = None
    """Folder (or table) of an evaluation set whose option-likelihood accuracy is measured at each validation."""
    question_task: str = "omnimedvqa"
    """Which set it is, by the name that ``medgpt eval`` knows it by."""
    question_protocol: Literal["chat-likelihood", "official-prefix"] = "chat-likelihood"
    num_questions: int = 64
    """Evenly spread over the set, the same ones every time."""
    best_by: str | None = None
    """A validation figure (as ``exit.metric``): the checkpoint of the best validation is written and kept, and
    ``checkpoints/best`` names it."""
    router_balance_coefficient: float = 0.0
    router_z_coefficient: float = 0.0
    exit: ExitConfig = field(default_factory=ExitConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        at = f"stages.{self.name}"
        require(bool(self.data), f"{at}.data is empty; name at least one dataset folder")
        positive(
            at, num_steps=self.num_steps, sequence_length=self.sequence_length, micro_batch_rows=self.micro_batch_rows,
            global_batch_rows=self.global_batch_rows,
        )  # fmt: skip
        for module in self.frozen:
            require(module in MODULES, f"{at}.frozen names {module!r}; allowed: {', '.join(MODULES)}")
        require(set(self.frozen) != set(MODULES), f"{at}.frozen names every module; nothing would learn")
        require(self.experts in ("plain", "packed"), f"{at}.experts={self.experts!r}; allowed: plain, packed")
        require(
            self.experts == "plain" or "experts" in self.frozen,
            f"{at}.experts=packed: packed experts do not learn; add experts to {at}.frozen, or set it to plain",
        )
        require(
            self.question_protocol in ("chat-likelihood", "official-prefix"),
            f"{at}.question_protocol={self.question_protocol!r}; allowed: chat-likelihood, official-prefix",
        )
        positive(at, num_questions=self.num_questions, validation_rows=self.validation_rows)
        not_negative(
            at, validation_interval=self.validation_interval, validation_max_share=self.validation_max_share,
            router_balance_coefficient=self.router_balance_coefficient,
            router_z_coefficient=self.router_z_coefficient,
        )  # fmt: skip
        require(
            self.validation_max_share < 1,
            f"{at}.validation_max_share is {self.validation_max_share}; it must be below 1 (0.05 is 5 %)",
        )
        _check_metric(f"{at}.exit.metric", self.exit.metric, self)
        _check_metric(f"{at}.best_by", self.best_by, self)
