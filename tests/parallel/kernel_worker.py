"""One rank of the check of kernel choices across ranks.

    kernel_worker.py

With two expert ranks: a MoE layer whose dispatcher sends FP8 rows does, bit for bit, what the plain one does on rows
rounded before they are sent, and its gradient is the plain one's. With two tensor ranks: the chunked loss is the whole
one. Prints ``same`` and ends with 0, or fails.
"""

from __future__ import annotations

import torch
from layout_cases import MODEL, own_part, row
from medgpt_kernels.mx.reference import dequantise_rows, quantise_rows

from megatron_medgpt.config.schema import KernelConfig, ParallelConfig
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel import groups
from megatron_medgpt.parallel.plan import make_layout


def model_with(parallel: ParallelConfig, **kernels):
    layout = make_layout(parallel, MODEL, 2)
    made = groups.build_groups(layout)
    return build_model(MODEL, layout=layout, groups=made, dtype=torch.float32, kernels=KernelConfig(**kernels))[0]


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
    difference = (ours[0] - plain[0]).norm() / plain[0].norm()
    # E4M3 rounds each value by at most 2^-4 of itself; the layer is a smooth function with random signs.
    assert 0 < difference < 2**-4, difference
    groups.destroy_groups()


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


def main() -> None:
    world = groups.start(timeout_s=60, kind="cpu")
    check_dispatch(world.rank)
    check_loss(world.rank)
    groups.stop()
    print("same")


if __name__ == "__main__":
    main()
