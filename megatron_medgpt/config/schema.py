"""The whole configuration of a run: frozen dataclasses, each checked when it is built.

A config is never changed after it is built; numbers that follow from it are computed where they are needed
(``parallel.plan`` for the layout). Checks that need only one section live in its ``__post_init__``; checks across
sections live in ``RunConfig.__post_init__``. No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_medgpt.config.errors import UsageError

MODULES = ("encoder", "projector", "language", "experts", "router")
"""Names by which stages freeze modules and set their learning rates. ``language`` is the language model without its
experts and routers: embedding, attention, norms and head."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UsageError(message)


def _positive(section: str, **values: float) -> None:
    for name, value in values.items():
        _require(value > 0, f"{section}.{name} is {value}; it must be greater than 0")


def _not_negative(section: str, **values: float) -> None:
    for name, value in values.items():
        _require(value >= 0, f"{section}.{name} is {value}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Shape of a GPT-oss language model. The defaults are GPT-oss 20B (openai/gpt-oss ``gpt_oss/torch/model.py``)."""

    num_layers: int = 24
    hidden_size: int = 2880
    num_attention_heads: int = 64
    num_query_groups: int = 8
    head_dim: int = 64
    num_experts: int = 32
    num_experts_per_token: int = 4
    expert_hidden_size: int = 2880
    vocab_size: int = 201_088
    sliding_window: int = 128
    """Positions a token sees on the windowed layers (0, 2, 4, ...), itself included."""
    norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    rope_base: float = 150_000.0
    yarn_factor: float = 32.0
    yarn_original_length: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    max_length: int = 131_072
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _positive(
            "model.language",
            num_layers=self.num_layers, hidden_size=self.hidden_size, num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups, head_dim=self.head_dim, num_experts=self.num_experts,
            num_experts_per_token=self.num_experts_per_token, expert_hidden_size=self.expert_hidden_size,
            vocab_size=self.vocab_size, sliding_window=self.sliding_window, norm_eps=self.norm_eps,
            swiglu_limit=self.swiglu_limit, yarn_factor=self.yarn_factor,
            yarn_original_length=self.yarn_original_length, yarn_beta_fast=self.yarn_beta_fast,
            yarn_beta_slow=self.yarn_beta_slow, max_length=self.max_length,
        )  # fmt: skip
        _not_negative("model.language", init_std=self.init_std)
        _require(self.rope_base > 1, f"model.language.rope_base is {self.rope_base}; it must be greater than 1")
        _require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"model.language.num_query_groups={self.num_query_groups} does not divide "
            f"num_attention_heads={self.num_attention_heads}",
        )
        _require(self.head_dim % 2 == 0, f"model.language.head_dim={self.head_dim} must be even (rotary halves)")
        _require(
            self.num_experts_per_token <= self.num_experts,
            f"model.language.num_experts_per_token={self.num_experts_per_token} exceeds num_experts={self.num_experts}",
        )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shape of a vision encoder. The defaults are CLIP ViT-L/14-336; ``kind: siglip`` is SigLIP so400m (MedSigLIP)."""

    kind: Literal["clip", "siglip"] = "clip"
    num_layers: int = 24
    hidden_size: int = 1024
    num_attention_heads: int = 16
    mlp_hidden_size: int = 4096
    image_size_px: int = 336
    """Resolution the model is run at."""
    pretrained_size_px: int = 336
    """Resolution of the position table in the weights; interpolated (bicubic) where it differs from the one above."""
    patch_size_px: int = 14
    norm_eps: float = 1e-5
    feature_layer: int = -2
    """Which hidden state is the feature: -1 the last layer's output before any post-norm, -2 the one before it."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        _require(self.kind in ("clip", "siglip"), f"model.vision.kind={self.kind!r}; allowed: clip, siglip")
        _positive(
            "model.vision",
            num_layers=self.num_layers, hidden_size=self.hidden_size, num_attention_heads=self.num_attention_heads,
            mlp_hidden_size=self.mlp_hidden_size, patch_size_px=self.patch_size_px, norm_eps=self.norm_eps,
            std=min(self.std),
        )  # fmt: skip
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"model.vision.num_attention_heads={self.num_attention_heads} does not divide "
            f"hidden_size={self.hidden_size}",
        )
        for name in ("image_size_px", "pretrained_size_px"):
            size = getattr(self, name)
            _require(
                size >= self.patch_size_px,
                f"model.vision.{name}={size} is smaller than one patch of {self.patch_size_px} px",
            )
        _require(
            -self.num_layers - 1 <= self.feature_layer <= -1,
            f"model.vision.feature_layer={self.feature_layer}; allowed: -1 to {-self.num_layers - 1}",
        )

    @property
    def patches_per_side(self) -> int:
        return self.image_size_px // self.patch_size_px


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """LLaVA's two-layer GELU MLP from encoder features to the language model's hidden size."""

    pixel_shuffle: int = 1
    """2 folds every 2x2 patches into one image token (four times fewer tokens)."""
    norm: bool = False
    """LayerNorm over the (shuffled) row in front of the first layer, as InternVL's projector has it. LLaVA's layout has
    neither norm nor pixel shuffle, so such a projector is exported alone (``--part projector``)."""
    hidden_size: int | None = None
    """Width between the two layers; the language model's hidden size when not given."""

    def __post_init__(self) -> None:
        _require(self.pixel_shuffle in (1, 2), f"model.projector.pixel_shuffle={self.pixel_shuffle}; allowed: 1, 2")
        if self.hidden_size is not None:
            _positive("model.projector", hidden_size=self.hidden_size)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    language: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)

    def __post_init__(self) -> None:
        side, fold = self.vision.patches_per_side, self.projector.pixel_shuffle
        _require(
            side % fold == 0,
            f"model.projector.pixel_shuffle={fold} does not divide the encoder's {side} patches a side; set it to 1",
        )

    @property
    def tokens_per_image(self) -> int:
        """Positions of the sequence that one image becomes."""
        return (self.vision.patches_per_side // self.projector.pixel_shuffle) ** 2


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of the mesh. Data parallelism is what is left of the world; tensor > 1 brings sequence parallelism."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank (interleaved 1F1B when > 1)."""
    expert: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    """Decoder layers of each pipeline stage in model order (``pipeline * virtual_pipeline`` numbers), for uneven
    splits; even when not given. The encoder and the embedding stand on the first, the head on the last."""

    def __post_init__(self) -> None:
        _positive(
            "parallel", tensor=self.tensor, pipeline=self.pipeline, virtual_pipeline=self.virtual_pipeline,
            expert=self.expert,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Which implementation serves each slot. ``auto`` is the fastest that serves this machine; nothing falls back
    silently: a named implementation that cannot serve a call is an error."""

    attention: Literal["auto", "reference", "flex"] = "auto"
    experts: Literal["auto", "reference", "grouped", "bf16", "fp8", "mxfp4"] = "auto"
    """``bf16``: fused, in the run's precision. ``fp8``: products of experts in E4M3. ``mxfp4``: expert weights rounded
    to MXFP4 at every use, with a straight-through gradient. On a CPU these three are plain PyTorch. ``auto`` is
    ``grouped``, PyTorch's products, until the fused ones have been measured on a GPU."""
    expert_gradients: Literal["auto", "autograd", "direct"] = "auto"
    """``direct`` (``auto``) writes gradients of expert weights into the optimizer's buffer expert by expert;
    ``autograd`` makes them for all experts of a layer and then adds them. On a CPU the bits are the same."""
    router: Literal["auto", "reference", "fused"] = "auto"
    """``fused``: logits, choice and weights in one pass, logits in float32 (plain PyTorch on a CPU). ``auto`` is
    ``reference``, PyTorch's operations in the run's precision, until the fused one has been measured on a GPU."""
    permute: Literal["auto", "engine", "fused"] = "auto"
    """``fused`` sends rows in the order of their experts and lets the experts gather what they multiply; needs
    ``experts`` bf16, fp8 or mxfp4. ``auto`` is ``engine``, megatron-core's sorting before and after the experts."""
    dispatch: Literal["bf16", "fp8"] = "bf16"
    """Numbers of the rows that expert-parallel ranks send each other: ``bf16`` is the run's precision."""
    projector: Literal["auto", "reference", "fused"] = "auto"
    """``fused`` writes the projected rows into the sequence; it needs Triton."""
    loss: Literal["auto", "whole", "chunked"] = "auto"
    """``chunked`` never holds the logits of all tokens; it makes them twice. ``auto`` is ``whole``."""

    def __post_init__(self) -> None:
        choices = {
            "attention": ("auto", "reference", "flex"),
            "experts": ("auto", "reference", "grouped", "bf16", "fp8", "mxfp4"),
            "expert_gradients": ("auto", "autograd", "direct"),
            "router": ("auto", "reference", "fused"),
            "permute": ("auto", "engine", "fused"),
            "dispatch": ("bf16", "fp8"),
            "projector": ("auto", "reference", "fused"),
            "loss": ("auto", "whole", "chunked"),
        }
        for name, allowed in choices.items():
            _require(
                getattr(self, name) in allowed,
                f"kernels.{name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}",
            )
        _require(
            self.permute != "fused" or self.experts in ("bf16", "fp8", "mxfp4"),
            f"kernels.permute=fused gives the experts rows in any order, which kernels.experts={self.experts} does not "
            "take; set kernels.experts to bf16, fp8 or mxfp4",
        )


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """One dataset folder of a stage's blend."""

    path: str
    weight: float = 1.0
    """Share of samples relative to the other entries, in units of the dataset's own passes: weights 2 and 1 show the
    first dataset twice per epoch for once of the second."""

    def __post_init__(self) -> None:
        _positive("stages.data", weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate factor over the steps of a stage: linear warm-up, then the named decay to ``min_factor``."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    min_factor: float = 0.1

    def __post_init__(self) -> None:
        _require(
            self.kind in ("cosine", "linear", "constant"),
            f"schedule.kind={self.kind!r}; allowed: cosine, linear, constant",
        )
        _not_negative("schedule", warmup_steps=self.warmup_steps)
        _require(0 <= self.min_factor <= 1, f"schedule.min_factor is {self.min_factor}; allowed: 0 to 1")


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
        _positive("optimizer", learning_rate=self.learning_rate, eps=self.eps)
        _not_negative("optimizer", weight_decay=self.weight_decay, clip_grad_norm=self.clip_grad_norm)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} is {value}; it must be 0 or more and less than 1")
        for module, rate in self.module_learning_rates.items():
            _require(
                module in MODULES,
                f"optimizer.module_learning_rates names {module!r}; allowed: {', '.join(MODULES)}",
            )
            _not_negative("optimizer.module_learning_rates", **{module: rate})


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
    _require(known, f"{field_name}={metric!r}; allowed: {', '.join(VALIDATION_METRICS)}, option_accuracy/NAME")
    at = f"stages.{stage.name}"
    _require(stage.validation_interval > 0, f"{field_name}={metric} needs {at}.validation_interval > 0")
    of_questions = metric.startswith("option_")
    given = stage.questions is not None if of_questions else bool(stage.validation_data)
    _require(given, f"{field_name}={metric} needs {at}.{'questions' if of_questions else 'validation_data'}")


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
            _require(0 <= value <= most, f"augment.{name}={value}; allowed: 0 to {most}")


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
        _require(self.patience >= 0, f"exit.patience={self.patience} must be 0 or more")
        _require(
            self.metric is None or self.threshold is not None or self.patience > 0,
            f"exit.metric={self.metric} ends nothing; set exit.threshold or exit.patience",
        )
        for name in ("threshold", "patience"):
            value = getattr(self, name)
            _require(self.metric is not None or not value, f"exit.{name}={value} needs exit.metric")


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
    validation_data: tuple[BlendConfig, ...] = ()
    validation_interval: int = 0
    """Steps between validations; 0 turns them off."""
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
        _require(bool(self.data), f"{at}.data is empty; name at least one dataset folder")
        _positive(
            at, num_steps=self.num_steps, sequence_length=self.sequence_length, micro_batch_rows=self.micro_batch_rows,
            global_batch_rows=self.global_batch_rows,
        )  # fmt: skip
        for module in self.frozen:
            _require(module in MODULES, f"{at}.frozen names {module!r}; allowed: {', '.join(MODULES)}")
        _require(set(self.frozen) != set(MODULES), f"{at}.frozen names every module; nothing would learn")
        _require(self.experts in ("plain", "packed"), f"{at}.experts={self.experts!r}; allowed: plain, packed")
        _require(
            self.experts == "plain" or "experts" in self.frozen,
            f"{at}.experts=packed: packed experts do not learn; add experts to {at}.frozen, or set it to plain",
        )
        _require(
            self.question_protocol in ("chat-likelihood", "official-prefix"),
            f"{at}.question_protocol={self.question_protocol!r}; allowed: chat-likelihood, official-prefix",
        )
        _positive(at, num_questions=self.num_questions, validation_rows=self.validation_rows)
        _not_negative(
            at, validation_interval=self.validation_interval,
            router_balance_coefficient=self.router_balance_coefficient,
            router_z_coefficient=self.router_z_coefficient,
        )  # fmt: skip
        _check_metric(f"{at}.exit.metric", self.exit.metric, self)
        _check_metric(f"{at}.best_by", self.best_by, self)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    interval: int = 500
    """Steps between checkpoints; one is always written at the end of a stage."""
    keep: int = 2
    """Newest verified checkpoints kept; ends of stages are always kept."""
    start_from: str | None = None
    """A checkpoint folder whose weights the first stage starts from; random initialisation when not given."""

    def __post_init__(self) -> None:
        _positive("checkpoint", interval=self.interval, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    interval: int = 10
    """Steps between progress lines. metrics.jsonl gets every step."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _positive("log", interval=self.interval)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: what is trained, on what, how it is split, and where everything goes."""

    name: str
    out: str
    """Run folder."""
    tokenizer: str
    """Folder with tokenizer.json (see ``data/text``)."""
    stages: tuple[StageConfig, ...]
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: Literal["none", "layer"] = "none"
    """``layer`` keeps only each layer's input and computes the rest again in the backward pass."""
    image_reader: Literal["auto", "dali", "pillow"] = "auto"
    seed: int = 1234
    num_threads: int = 0
    """CPU threads per rank; 0 shares the machine's cores among its ranks."""

    def __post_init__(self) -> None:
        _require(bool(self.stages), "stages is empty; a run needs at least one stage")
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), f"stages have the same name twice: {names}")
        _require(self.precision in ("bf16", "fp32"), f"precision={self.precision!r}; allowed: bf16, fp32")
        _require(self.recompute in ("none", "layer"), f"recompute={self.recompute!r}; allowed: none, layer")
        _require(self.num_threads >= 0, f"num_threads is {self.num_threads}; it must be 0 or more")
        for stage in self.stages:
            _require(
                stage.sequence_length <= self.model.language.max_length,
                f"stages.{stage.name}.sequence_length={stage.sequence_length} exceeds "
                f"model.language.max_length={self.model.language.max_length}",
            )
            _require(
                stage.sequence_length > self.model.tokens_per_image,
                f"stages.{stage.name}.sequence_length={stage.sequence_length} cannot hold one image of "
                f"{self.model.tokens_per_image} tokens",
            )
            for name in ("hidden_size", "expert_hidden_size"):
                size = getattr(self.model.language, name)
                _require(
                    stage.experts == "plain" or size % 32 == 0,
                    f"stages.{stage.name}.experts=packed: MXFP4 shares a scale among 32 values, and "
                    f"model.language.{name}={size} does not divide by 32; set it to plain",
                )

    def layout_of(self, stage: StageConfig) -> ParallelConfig:
        """Degrees of the mesh of one stage."""
        return stage.parallel or self.parallel
