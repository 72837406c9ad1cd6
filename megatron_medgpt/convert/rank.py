"""One rank that computes the logits of a checkpoint; started by ``logits.our_logits``, not by people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medgpt.checkpoint import state
from megatron_medgpt.checkpoint.find import holds_packed_experts
from megatron_medgpt.checkpoint.load import load_checkpoint
from megatron_medgpt.config.schema import KernelConfig
from megatron_medgpt.convert.layout import packed
from megatron_medgpt.convert.logits import Prompt, config_of_task
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel.groups import build_groups, destroy_groups, start, stop
from megatron_medgpt.parallel.plan import Layout, make_layout
from megatron_medgpt.types import IGNORE_INDEX, ImageSpan, MedBatch

from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip  (groups has prepared the engine)


def batch_of_prompts(prompts: Sequence[Prompt], num_image_tokens: int, multiple: int) -> MedBatch:
    """All prompts packed into one row, padded to a multiple of ``multiple`` with a document of its own."""
    lengths = [len(prompt.token_ids) for prompt in prompts]
    padding = -sum(lengths) % multiple
    lengths += [padding] if padding else []
    ids = torch.cat([*(prompt.token_ids for prompt in prompts), torch.zeros(padding, dtype=torch.int64)])
    spans, images, at = [], 0, 0
    for prompt in prompts:
        for begin in prompt.image_starts:
            spans.append(ImageSpan(row=0, start=at + begin, image=images, num_tokens=num_image_tokens))
            images += 1
        at += len(prompt.token_ids)
    modality = torch.zeros(len(ids), dtype=torch.int8)
    modality[at:] = -1
    return MedBatch(
        token_ids_BS=ids[None],
        label_ids_BS=torch.full((1, len(ids)), IGNORE_INDEX),
        position_ids_BS=torch.cat([torch.arange(length) for length in lengths])[None],
        document_ids_BS=torch.repeat_interleave(torch.tensor(lengths)).to(torch.int32)[None],
        modality_ids_BS=modality[None],
        pixels_ICYX=torch.cat([prompt.pixels_ICYX for prompt in prompts]),
        image_spans=tuple(spans),
        num_tokens=at,
        num_images=images,
        num_documents=len(lengths),
    )


def run_prompts(chunks: Sequence[Any], layout: Layout, groups: Any, batch: MedBatch) -> Tensor | None:
    """Logits (S, V) of one row through the pipeline, on the ranks of the last stage; None on the others."""

    def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
        return model(next(batches), want="logits"), lambda output, non_loss_data=False: output.detach()

    # The interleaved schedule wants as many micro-batches as stages: the same one again.
    count = 1 if layout.virtual_pipeline == 1 else layout.pipeline
    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter([batch] * count) for _ in chunks] if len(chunks) > 1 else iter([batch]),
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=count,
            seq_length=batch.token_ids_BS.shape[1], micro_batch_size=1, forward_only=True, collect_non_loss_data=True,
        )  # fmt: skip
    if not collected:
        return None
    own_SV = collected[0][:, 0].contiguous()
    parts = [torch.empty_like(own_SV) for _ in range(groups.tp.size())]
    dist.all_gather(parts, own_SV, group=groups.tp)
    return torch.cat(parts, dim=-1)


def load_weights_of(checkpoint: Path | str, chunks: Sequence[Any], groups: Any) -> None:
    """Load a checkpoint's weights into the chunks of this rank; MXFP4 experts are unpacked."""
    places = state.model_state(chunks, groups, packed_experts=holds_packed_experts(checkpoint))
    loaded, _ = load_checkpoint(checkpoint, places, weights_only=True)
    state.load_weights(chunks, loaded)


def round_weights(chunks: Sequence[Any], dtype: torch.dtype) -> None:
    """Give every weight a value that ``dtype`` holds."""
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.copy_(parameter.to(dtype))


def quantise_experts(chunks: Sequence[Any], rule: str) -> None:
    """Replace every expert's weights by what MXFP4 makes of them."""
    move = packed(torch.float32, rule)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if name.endswith((".experts.gate_up", ".experts.down")):
                    for expert in parameter:
                        expert.copy_(move.to_ours(list(move.to_published(expert[None])))[0])


def main(task: Path) -> None:
    saved = torch.load(task, weights_only=True)
    settings = json.loads(saved["settings"])
    prompts = [Prompt(ids, tuple(starts), pixels) for ids, starts, pixels in saved["prompts"]]
    config, parallel = config_of_task(settings)
    world = start(kind="cpu")
    torch.set_num_threads(max(1, torch.get_num_threads() // world.size))
    layout = make_layout(parallel, config, world.size)
    groups = build_groups(layout)
    chunks = build_model(
        config, layout=layout, groups=groups, dtype=torch.float32, kernels=KernelConfig(attention="reference")
    )
    load_weights_of(settings["checkpoint"], chunks, groups)
    if settings["experts_as"]:
        quantise_experts(chunks, settings["experts_as"])
    round_weights(chunks, getattr(torch, settings["weights_as"]))
    batch = batch_of_prompts(prompts, config.tokens_per_image, layout.tensor)
    logits = run_prompts(chunks, layout, groups, batch)
    if logits is not None and groups.tp.rank() == 0 and groups.dp.rank() == 0:
        lengths = [len(prompt.token_ids) for prompt in prompts]
        torch.save([part.float().clone() for part in logits[: sum(lengths)].split(lengths)], settings["result"])
    dist.barrier()
    destroy_groups()
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
