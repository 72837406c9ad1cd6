"""The vision-language model of one pipeline chunk: encoder, projector, language model, loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from medgpt_kernels.cross_entropy.op import cross_entropy as chunked_cross_entropy
from medgpt_kernels.sink_attention import op
from torch import Tensor

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import KernelConfig, ModelConfig
from megatron_medgpt.model.attention import RowInfo
from megatron_medgpt.model.cache import KeyValueCache
from megatron_medgpt.model.experts import PADDING_CATEGORY
from megatron_medgpt.model.greedy import likeliest
from megatron_medgpt.model.language import EngineConfig, build_language
from megatron_medgpt.model.loss import cross_entropy
from megatron_medgpt.model.merge import image_runs, merge_images
from megatron_medgpt.model.projector import Projector
from megatron_medgpt.model.rope import concentration, inverse_frequencies
from megatron_medgpt.model.vision import build_vision
from megatron_medgpt.model.whole_layer import continue_whole, lies_whole
from megatron_medgpt.parallel.plan import Layout
from megatron_medgpt.parallel.platform import current_device, prepare_engine
from megatron_medgpt.types import IGNORE_INDEX, ImageSpan, MedBatch

prepare_engine()

from megatron.core.dist_checkpointing.mapping import ShardedStateDict  # noqa: E402  (after the engine was prepared)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer.enums import ModelType  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402


class MedGPT(MegatronModule):
    """One pipeline chunk. The first holds encoder, projector and embedding, the last the head.

    Attributes:
        vision, projector: on the first chunk, else None. Every tensor rank holds them whole, encodes the images that
            reach into its slice of the sequence and projects the rows inside it, so nothing is gathered; their
            gradients are summed over the tensor group.
        language: megatron-core's ``GPTModel`` of this chunk.
    """

    def __init__(
        self, model: ModelConfig, config: EngineConfig, *, layout: Layout, chunk: int, groups: Any,
        kernels: KernelConfig, seed: int,
    ):  # fmt: skip
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = chunk == 0
        self.post_process = chunk == len(layout.layers_per_chunk) - 1
        self.vp_stage = chunk // layout.pipeline if layout.virtual_pipeline > 1 else None
        self.share_embeddings_and_output_weights = False
        self.first_layer = layout.layers_of_chunk(chunk).start
        self.tp_group = groups.tp
        device, dtype = current_device(), config.params_dtype
        self.attention = attention_on(device, kernels)
        self.kernels = kernels
        self.vision = self.projector = None
        if self.pre_process:
            made = {"device": device, "tp_group": groups.tp}
            self.vision = build_vision(model.vision, dtype, seed=seed, recompute=config.recompute_layers, **made)
            self.projector = Projector(model, dtype, seed=seed + 1, **made)
        self.language = build_language(config, model.language, layout=layout, chunk=chunk, groups=groups)
        self.lies_whole = lies_whole(config)
        self.rope_factor = concentration(model.language)
        frequencies = inverse_frequencies(model.language).to(device)
        self.inverse_frequencies = frequencies  # no buffer: a cast of the model must not cast them

    def forward(
        self, batch: MedBatch, *, want: Literal["loss", "logits", "next"] = "loss", cache: KeyValueCache | None = None
    ) -> Tensor:
        """Run this chunk on one micro-batch.

        Args:
            cache: of the batch's sequences; this forward fills or continues it. ``want="next"`` needs one.

        Returns:
            On the last chunk: the loss of every position (B, S), at least float32, 0 without a target; or the logits
            (S, B, V / TP) of this rank's slice of the vocabulary; or the likeliest next token (N,) int64 of the
            cache's sequences, the same on every tensor rank. On the others: hidden states (S / TP, B, H) for the next.
        """
        first, end = self._own_positions(batch)
        hidden_SBH = self._embed(batch, first, end) if self.pre_process else None
        rows = RowInfo(
            batch.document_ids_BS, batch.position_ids_BS, inverse_frequencies=self.inverse_frequencies,
            rope_factor=self.rope_factor, dtype=self.config.params_dtype, attention=self.attention,
            categories_T=token_categories(batch, first, end) if self.training else None, num_targets=batch.num_targets,
            branch_ids_BS=batch.branch_ids_BS, cache=cache,
        )  # fmt: skip
        if cache is not None and cache.filled and self.lies_whole and not torch.is_grad_enabled():
            hidden_SBH = continue_whole(self.language.decoder, hidden_SBH, rows)
        else:
            hidden_SBH = self.language.decoder(hidden_states=hidden_SBH, attention_mask=rows)
        if not self.post_process:
            return hidden_SBH
        if want == "logits":
            return self.language.output_layer(hidden_SBH)[0]
        if want == "next":
            assert cache is not None
            return self._next_tokens(hidden_SBH, cache)
        return self._loss(hidden_SBH, batch)

    def _own_positions(self, batch: MedBatch) -> tuple[int, int]:
        """The slice of the sequence that this tensor rank holds between the layers."""
        length, size = batch.token_ids_BS.shape[1], self.tp_group.size()
        if length % size:
            raise ValueError(f"{length} positions cannot be split over {size} tensor ranks")
        share = length // size
        return self.tp_group.rank() * share, (self.tp_group.rank() + 1) * share

    def _embed(self, batch: MedBatch, first: int, end: int) -> Tensor:
        embedding = self.language.embedding.word_embeddings
        hidden = embedding(batch.token_ids_BS)
        text_SBH = hidden if embedding.reduce_scatter_embeddings else hidden.transpose(0, 1).contiguous()
        runs = image_runs(batch.image_spans, first=first, end=end)
        if not runs and not torch.is_grad_enabled():
            return text_SBH
        pixels = batch.pixels_ICYX
        if pixels is None:
            size = self.vision.config.image_size_px
            pixels = torch.empty(0, 3, size, size, device=text_SBH.device)
        # With no images too: a rank without images must still hold a graph for the parameters that others train.
        if self.kernels.projector == "fused":
            return self.projector.into(text_SBH, self.vision(pixels), runs)
        rows_NH = self.projector(self.vision(pixels), runs)
        return merge_images(text_SBH, rows_NH, runs)

    def _loss(self, hidden_SBH: Tensor, batch: MedBatch) -> Tensor:
        """Cross entropy. Only rows with a target go through the head: prompts and images cost nothing there."""
        if self.tp_group.size() > 1:
            # The head's gradient is a partial sum over vocabulary slices on every rank; the gather's backward adds up.
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=True, group=self.tp_group
            )
        labels_BS = batch.label_ids_BS
        batch_rows, length = labels_BS.shape
        wanted = (labels_BS != IGNORE_INDEX).flatten()
        if wanted.is_cuda:
            place_N = torch.nonzero_static(wanted, size=batch.num_targets)[:, 0]  # no wait for the device
        else:
            place_N = wanted.nonzero()[:, 0]
        hidden_NH = hidden_SBH.transpose(0, 1).flatten(0, 1).index_select(0, place_N)
        weight_VH, labels_N = self.language.output_layer.weight, labels_BS.flatten()[place_N]
        if self.kernels.loss == "chunked":
            first_id = self.tp_group.rank() * weight_VH.shape[0]
            loss_N = chunked_cross_entropy(hidden_NH, weight_VH, labels_N, first_id=first_id, group=self.tp_group)
        else:
            loss_N = cross_entropy(F.linear(hidden_NH, weight_VH), labels_N, self.tp_group)
        return loss_N.new_zeros(batch_rows * length).index_add(0, place_N, loss_N).view(batch_rows, length)

    def _next_tokens(self, hidden_SBH: Tensor, cache: KeyValueCache) -> Tensor:
        if self.tp_group.size() > 1:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=self.tp_group)
        num = len(cache)
        if cache.filled:
            hidden_NH = hidden_SBH[:num, 0]
        else:
            hidden_NH = hidden_SBH[cache.last_places_N, torch.arange(num, device=hidden_SBH.device)]
        return likeliest(F.linear(hidden_NH, self.language.output_layer.weight), self.tp_group)

    def set_input_tensor(self, input_tensor: Tensor | Sequence[Tensor | None] | None) -> None:
        """Hidden states of the previous chunk; the pipeline schedule calls it before ``forward``."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> None:
        """Embedding and head share nothing in GPT-oss; megatron-core asks."""
        return None

    def routers(self) -> list[Any]:
        """The routers of this chunk in layer order."""
        return [layer.mlp.router for layer in self.language.decoder.layers]

    def expert_load(self) -> Tensor:
        """Tokens that each expert of each layer of this chunk received since ``reset_expert_load``, by category.

        (layers, categories, E) int64 on the device, this rank's tokens only: sum over the tensor and data groups for
        the whole batch. Category ``2 * modality`` is text, ``2 * modality + 1`` image tokens; padding is left out.
        """
        return torch.stack([router.load_CE[:PADDING_CATEGORY] for router in self.routers()])

    def router_losses(self) -> Tensor:
        """(layers, 2) float64: balance and z loss, each the sum over micro-batches of loss times targets."""
        return torch.stack([router.losses for router in self.routers()])

    def reset_expert_load(self) -> None:
        """Start counting anew: the loads and the router losses."""
        for router in self.routers():
            router.load_CE.zero_()
            router.losses.zero_()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """State for megatron-core's checkpoints. ``metadata`` holds ``dp_cp_group``."""
        state: ShardedStateDict = {}
        for name in ("vision", "projector", "language"):
            module = getattr(self, name)
            if module is not None:
                state.update(module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return state


def token_categories(batch: MedBatch, first: int, end: int) -> Tensor:
    """Category of every token of the positions ``[first, end)``, in the order s * B + b (int64)."""
    modality_BS = batch.modality_ids_BS[:, first:end].long()
    categories_BS = torch.where(modality_BS < 0, PADDING_CATEGORY, 2 * modality_BS)
    for span in _clipped(batch.image_spans, first, end):
        categories_BS[span.row, span.start : span.start + span.num_tokens] += 1
    return categories_BS.t().flatten()


def _clipped(spans: Sequence[ImageSpan], first: int, end: int):
    for run in image_runs(spans, first=first, end=end):
        yield ImageSpan(row=run.row, start=run.start, image=run.image, num_tokens=run.length)


def attention_on(device: torch.device, kernels: KernelConfig) -> str:
    """Implementation of attention that a configuration means on a device.

    Raises:
        UsageError: the named one cannot serve it.
    """
    try:
        return op.choose(kernels.attention, device)
    except ValueError as error:
        raise UsageError(f"kernels.attention={kernels.attention}: {error}") from None
