"""What our modules keep for the backward pass, in bytes, by arithmetic. No torch.

Each term is one tensor that autograd holds; ``tests/unit/parallel/test_activations`` adds up the tensors that a real
chunk saves and compares. Sizes are per rank: ``tokens`` is a micro-batch, ``local`` the slice of it that a tensor rank
holds between the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medgpt.config.schema import KernelConfig, LanguageConfig, ModelConfig, VisionConfig

WIDE = 4
"""Norms, router and loss compute in fp32 at least."""
ROW_TILE = 128
"""Rows that the fused experts multiply together; the rows of each expert are padded to whole tiles."""
LOGITS_CHUNK_BYTES = 2**28
"""Of the chunked loss (``medgpt_kernels.cross_entropy``)."""
AS_MEASURED = KernelConfig()
ATTENTION = ("flex", "fused_cpu")


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sizes of one micro-batch that memory and time depend on."""

    tokens: int
    targets: int
    """Only rows with a target go through the head."""
    images: float
    """Images of the micro-batch; a tensor rank encodes its share."""
    rows: int = 1


def layer_bytes(
    c: LanguageConfig, batch: MicroBatch, *, bytes_per_value: int, tensor: int, attention: str = "flex",
    routed_share: float = 1.0, kernels: KernelConfig = AS_MEASURED, expert: int = 1,
) -> int:  # fmt: skip
    """One decoder layer without recomputation.

    Args:
        routed_share: rows that this rank's experts receive, over the mean of the ranks.
        expert: ranks that share the experts.
    """
    b, tokens, local = bytes_per_value, batch.tokens, batch.tokens / tensor
    heads, groups = c.num_attention_heads * c.head_dim / tensor, c.num_query_groups * c.head_dim / tensor
    norms = 2 * local * (2 * WIDE * c.hidden_size + WIDE)  # input in fp32, normalised in fp32, 1 / rms
    attention_in = local * c.hidden_size * b  # linear_qkv keeps its slice and gathers again
    if attention == "flex":
        # query and key rotated; the value, a view that keeps all of linear_qkv's output; output without and with sink
        core = tokens * b * (heads + groups + (heads + 2 * groups) + 2 * heads)
        core += tokens * c.num_attention_heads / tensor * (WIDE + b)  # log-sum-exp, share of the sink
    else:
        core = tokens * b * 4 * heads  # query, key and value repeated for every head, output
        core += tokens * c.num_attention_heads / tensor * WIDE
    routing = local * (c.hidden_size * b + c.num_experts_per_token * (8 + WIDE))  # its input; chosen ids, their softmax
    if kernels.permute != "fused":  # map and weights by expert, order of the rows
        routing += local * (c.num_experts * (1 + b) + c.num_experts_per_token * 8)
    elif expert > 1:  # places of the rows, which the exchange ordered, and of the sum over each token's
        routing += 2 * local * c.num_experts_per_token * 4
    return int(norms + attention_in + core + routing + _expert_bytes(c, local * routed_share, b, kernels, expert))


def _expert_bytes(c: LanguageConfig, tokens: float, b: int, kernels: KernelConfig, expert: int) -> float:
    h, f, routed = c.hidden_size, c.expert_hidden_size, tokens * c.num_experts_per_token
    if not is_fused(kernels):
        # permuted rows, gate and up before the activation, activated, output before its weight, weight
        return routed * b * (h + 2 * f + f + h + 1)
    gathered = kernels.permute == "fused" and expert == 1  # the router's input is what the product reads
    rows = 0 if gathered else routed * h * b
    return rows + padded_rows(routed, c.num_experts // expert) * 2 * f * b + routed * WIDE


def is_fused(kernels: KernelConfig) -> bool:
    """Whether the experts are the fused layer, which keeps rows and pre-activation alone."""
    return kernels.experts in ("bf16", "fp8", "mxfp4")


def padded_rows(routed: float, num_experts: int) -> float:
    """Rows of the fused layer's pre-activation, a bound known on the host however the rows fall on the experts
    (``medgpt_kernels.route.reference.num_tiles``)."""
    return (routed + min(num_experts, routed) * (ROW_TILE - 1)) // ROW_TILE * ROW_TILE


def layer_input_bytes(c: LanguageConfig, batch: MicroBatch, *, bytes_per_value: int, tensor: int) -> int:
    """What is left of a layer that recomputes itself."""
    return int(batch.tokens / tensor * c.hidden_size * bytes_per_value)


def head_bytes(
    c: LanguageConfig, batch: MicroBatch, *, bytes_per_value: int, tensor: int, kernels: KernelConfig = AS_MEASURED
) -> int:
    """Final norm, head and loss: kept from the forward to the backward pass of the last stage."""
    local, b = batch.tokens / tensor, bytes_per_value
    norm = local * (2 * WIDE * c.hidden_size + WIDE)
    gathered = 0.0 if tensor == 1 else batch.tokens * c.hidden_size * b
    if kernels.loss == "chunked":  # rows, log-sum-exp, labels, whether there is one, places
        return int(norm + gathered + batch.targets * (c.hidden_size * b + WIDE + 8 + 1 + 8))
    logits = batch.targets * (c.hidden_size * b + c.vocab_size / tensor * b + 2 * WIDE + 3 * 8)
    return int(norm + gathered + logits)


def loss_peak_bytes(
    c: LanguageConfig, batch: MicroBatch, *, bytes_per_value: int, tensor: int, kernels: KernelConfig = AS_MEASURED,
    frozen: bool = False,
) -> int:  # fmt: skip
    """What the loss needs for a moment on top: the gradient of the logits in fp32, its copy in the model's dtype and a
    temporary of the exponential. Chunked: one chunk of logits, and the head's gradient in fp32 unless it is frozen."""
    b, vocab = bytes_per_value, c.vocab_size / tensor
    if kernels.loss == "chunked":
        head = 0.0 if frozen else vocab * c.hidden_size * (WIDE + b)
        return int(min(max(LOGITS_CHUNK_BYTES, vocab * b), batch.targets * vocab * b) + head)
    return int(batch.targets * vocab * (2 * WIDE + b))


def vision_bytes(
    model: ModelConfig, batch: MicroBatch, *, bytes_per_value: int, tensor: int, frozen: bool,
    kernels: KernelConfig = AS_MEASURED,
) -> int:  # fmt: skip
    """Encoder and projector for the images of one tensor rank. A frozen encoder keeps nothing."""
    v, b, images = model.vision, bytes_per_value, batch.images / tensor
    rows = images * model.tokens_per_image
    width_in = v.hidden_size * model.projector.pixel_shuffle**2
    middle = model.projector.hidden_size or model.language.hidden_size
    norm = width_in + 2 * WIDE / b if model.projector.norm else 0  # its input beside its output; mean and deviation
    after_gelu = 0 if kernels.projector == "fused" else middle
    projector = rows * b * (norm + width_in + middle + after_gelu)  # features, before and after the GELU
    if frozen:
        return int(projector)
    places = v.patches_per_side**2 + (v.kind == "clip")
    num_layers = v.num_layers + 1 + v.feature_layer
    pixels = 3 * v.image_size_px**2 * b
    pre_norm = places * (v.hidden_size + 2) * b if v.kind == "clip" else 0
    layers = num_layers * places * (_vision_layer_values(v) * b + WIDE * v.num_attention_heads)
    return int(projector + images * (pixels + pre_norm + layers))


def _vision_layer_values(v: VisionConfig) -> int:
    """Values per place: inputs, outputs and statistics of two norms, q, k, v, attention output, MLP."""
    activation = 3 if v.kind == "clip" else 2  # x * sigmoid(1.702 x) keeps x, the sigmoid and the product
    return 2 * (2 * v.hidden_size + 2) + 4 * v.hidden_size + activation * v.mlp_hidden_size
