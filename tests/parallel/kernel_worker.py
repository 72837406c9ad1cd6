"""One rank of the check of kernel choices across ranks.

    kernel_worker.py FOLDER

With two expert ranks: a MoE layer whose dispatcher sends FP8 rows does, bit for bit, what the plain one does on rows
rounded before they are sent, its gradient is the plain one's, and its output lies within a bound derived from norms of
what it is with rows that are not rounded; the fused router and dispatcher give the whole model
the engine's loss and gradients; packed experts are split and found again. With two data ranks and with two expert
ranks: gradients written into the optimizer's buffer are autograd's, to the bit. With two tensor ranks: the chunked
loss is the whole one. Prints ``same`` and ends with 0, or fails.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from layout_cases import MODEL, own_part, row
from medgpt_kernels.mx.reference import dequantise_mxfp4, dequantise_rows, quantise_rows

from megatron_medgpt.checkpoint import state
from megatron_medgpt.checkpoint.find import holds_packed_experts
from megatron_medgpt.checkpoint.load import load_checkpoint
from megatron_medgpt.checkpoint.manifest import CheckpointFacts
from megatron_medgpt.checkpoint.save import save_checkpoint
from megatron_medgpt.config.schema import KernelConfig, ParallelConfig
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel import groups
from megatron_medgpt.parallel.plan import make_layout

from megatron.core.distributed import (  # isort: skip  (groups has prepared the engine)
    DistributedDataParallel,
    DistributedDataParallelConfig,
)


def model_and_groups(parallel: ParallelConfig, dtype=torch.float32, options=None, **kernels):
    layout = make_layout(parallel, MODEL, 2)
    made = groups.build_groups(layout)
    chosen = KernelConfig(**kernels)
    return build_model(MODEL, layout=layout, groups=made, dtype=dtype, kernels=chosen, **(options or {}))[0], made


def model_with(parallel: ParallelConfig, dtype=torch.float32, **kernels):
    return model_and_groups(parallel, dtype, **kernels)[0]


class Rounded(torch.autograd.Function):
    """Rows as E4M3 holds them; the gradient as it comes."""

    @staticmethod
    def forward(ctx, rows):
        return dequantise_rows(*quantise_rows(rows))

    @staticmethod
    def backward(ctx, grad):
        return grad


def outcome(layer, x):
    x = x.detach().clone().requires_grad_()
    out = layer(x)[0]
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    return out.detach(), x.grad


def check_dispatch(rank: int) -> None:
    parallel = ParallelConfig(expert=2)
    x = torch.randn(16, 1, MODEL.language.hidden_size, generator=torch.Generator().manual_seed(rank))
    ours = outcome(model_with(parallel, dispatch="fp8").language.decoder.layers[0].mlp, x)
    groups.destroy_groups()
    layer = model_with(parallel).language.decoder.layers[0].mlp
    plain = outcome(layer, x)
    dispatcher = layer.token_dispatcher
    send = dispatcher.token_dispatch
    dispatcher.token_dispatch = lambda rows, probs: send(Rounded.apply(rows), probs)
    expected = outcome(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))
    away_T = (ours[0] - plain[0]).flatten(0, 1).norm(dim=1)
    bound_T = dispatch_bound(layer, x.flatten(0, 1))
    assert (away_T > 0).any() and (away_T <= bound_T).all(), (away_T / bound_T).max()
    groups.destroy_groups()


def dispatch_bound(layer, x_TH: torch.Tensor) -> torch.Tensor:
    """How far rounding a token before it is sent can move its output, by norms alone.

    A token's output is a mean (its router weights add up to 1) of f(x) = W2 act(W1 x + b1) + b2 over its experts, so
    |f(x + d) - f(x)| <= |W2| s |W1| |d| in spectral norms, s the largest slope of the activation between x and x + d.
    E4M3 rounds a normal number by 2^-4 of itself at most, and the smaller ones by 2^-10 of a scale that is at most
    1 / 224 of the largest of its group. The activation g sigmoid(1.702 g) (u + 1) has the partial slopes
    <= 1.1 (1 + r) and <= r where |g| and |u| are at most r.
    """
    size_T, largest_T = x_TH.norm(dim=1), x_TH.abs().amax(1)
    moved_T = 2**-4 * size_T + x_TH.shape[1] ** 0.5 * 2**-10 / 224 * largest_T
    longest = torch.stack([size_T.max(), moved_T.max()])
    torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)  # experts see the tokens of both ranks
    experts, slope = layer.experts, torch.zeros(())
    for w1, b1, w2 in zip(experts.gate_up.detach(), experts.gate_up_bias.detach(), experts.down.detach()):
        r = float(w1.norm(dim=0).max() * longest.sum() + b1.abs().max())
        s = math.hypot(1.1 * (1 + r), r)
        slope = torch.maximum(slope, s * torch.linalg.matrix_norm(w1, 2) * torch.linalg.matrix_norm(w2, 2))
    torch.distributed.all_reduce(slope, op=torch.distributed.ReduceOp.MAX)
    return slope * moved_T + 1e-5 * size_T  # and the order of fp32 sums


def check_loss(rank: int) -> None:
    parallel = ParallelConfig(tensor=2)
    results = []
    for loss in ("whole", "chunked"):
        model = model_with(parallel, loss=loss)
        length = row(0).token_ids_BS.shape[1]
        first = rank * length // 2
        batch = own_part(row(0), first=first, end=first + length // 2, dtype=torch.float32)
        value = model(batch)
        value.sum().backward()
        results.append((value.detach(), model.language.output_layer.weight.grad, model.projector.linear_1.weight.grad))
        groups.destroy_groups()
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def loss_and_grads(model, batch):
    loss = model(batch)
    loss.sum().backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def check_fused(rank: int) -> None:
    """Without rounding the ways differ in the order of sums alone; in FP8 they round the same rows."""
    for degrees, experts in (
        ({"expert": 2}, "bf16"), ({"expert": 2}, "fp8"), ({"tensor": 2, "expert": 2}, "fp8"), ({}, "bf16"),
    ):  # fmt: skip
        parallel = ParallelConfig(**degrees)
        length = row(0).token_ids_BS.shape[1]
        share = length // parallel.tensor
        first = rank % parallel.tensor * share
        batch = own_part(row(rank // parallel.tensor), first=first, end=first + share, dtype=torch.float64)
        dispatch = "fp8" if experts == "fp8" else "bf16"
        found = []
        for permute, router in (("engine", "reference"), ("fused", "fused")):
            model = model_with(
                parallel, torch.float64, experts=experts, dispatch=dispatch, permute=permute, router=router
            )
            found.append(loss_and_grads(model, batch))
            groups.destroy_groups()
        assert len(found[0]) == len(found[1]) > 40
        for a, b in zip(*found):
            error = float((a - b).norm() / (b.norm() + 1e-30))
            assert error < 1e-12, (degrees, experts, error)


def check_main_grad(rank: int) -> None:
    """Two micro-batches, the second of which leaves experts idle that the first used."""
    wrapper = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    cases = (({}, "grouped", torch.bfloat16), ({"expert": 2}, "grouped", torch.float32),
             ({"expert": 2}, "bf16", torch.bfloat16))  # fmt: skip
    for degrees, experts, dtype in cases:
        found, written = [], []
        for way in ("autograd", "direct"):
            model, pg = model_and_groups(ParallelConfig(**degrees), dtype, experts=experts, expert_gradients=way)
            wrapped = DistributedDataParallel(config=model.config, ddp_config=wrapper, module=model, pg_collection=pg)
            wrapped.zero_grad_buffer()
            for micro in range(2):
                length = row(0).token_ids_BS.shape[1]
                wrapped(own_part(row(2 * rank + micro), first=0, end=length, dtype=dtype)).sum().backward()
            written.append(bool(model.language.decoder.layers[0].mlp.experts.gate_up.grad_added_to_main_grad))
            found.append([p.main_grad.clone() for p in model.parameters()])
            groups.destroy_groups()
        assert written == [False, True]
        assert all(torch.equal(a, b) for a, b in zip(*found)), (degrees, experts, dtype)
        assert all(a.count_nonzero() for a in found[0][:4])


def check_packed(rank: int, folder: Path) -> None:
    """Packed experts of two ranks are saved, and loaded whole and unpacked by each of two data ranks."""
    options = {"frozen": ("experts",), "packed_experts": True}
    model, pg = model_and_groups(ParallelConfig(expert=2), options=options)
    own = model.language.decoder.layers[1].mlp.experts
    mine = [own.down_blocks.clone(), own.down_scales.clone()]
    save_checkpoint(folder, 1, state.model_state([model], pg), CheckpointFacts(step=1), parallel_group=pg.dp_cp)
    groups.destroy_groups()
    path = folder / "step-00000001"
    assert holds_packed_experts(path)
    model, pg = model_and_groups(ParallelConfig())
    loaded, _ = load_checkpoint(path, state.model_state([model], pg, packed_experts=True))
    state.load_weights([model], loaded)
    whole = model.language.decoder.layers[1].mlp.experts.down
    share = len(whole) // 2
    expected = dequantise_mxfp4(*mine, torch.float32).transpose(1, 2)
    assert torch.equal(whole[rank * share : (rank + 1) * share], expected)
    groups.destroy_groups()


def main() -> None:
    world = groups.start(timeout_s=300, kind="cpu")
    check_dispatch(world.rank)
    check_fused(world.rank)
    check_main_grad(world.rank)
    check_packed(world.rank, Path(sys.argv[1]))
    check_loss(world.rank)
    groups.stop()
    print("same")


if __name__ == "__main__":
    main()
