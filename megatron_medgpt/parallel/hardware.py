"""Accelerators and the networks between them: the numbers that predictions of time and memory stand on.

Peaks are dense BF16 of the data sheets. ``sustained_flops`` is what a large matrix product holds under the power limit:
790 TFLOP/s were measured on an H200 at 700 W (80 % of its peak), and the H100 is the same chip at the same power. On
Blackwell no such measurement of ours exists; the data sheets give one die, 2.5 PFLOP/s at 1,400 W, and the same die at
1,000 to 1,200 W, and we take its sustained rate as proportional to the power limit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_medgpt.config.errors import UsageError

GB = 10**9
TERA = 10**12
GIB = 1024**3
_BLACKWELL_FLOPS_PER_WATT = 2500 * TERA / 1400


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of GPU in the system it is usually sold in."""

    name: str
    generation: str
    """Efficiencies are calibrated per generation."""
    memory_bytes: int
    """What CUDA reports; planning leaves ``RESERVED`` of it free."""
    peak_flops: float
    sustained_flops: float
    memory_bandwidth: float
    """Bytes per second, read plus write, reached by a copy."""
    gpus_per_domain: int
    """GPUs that NVLink joins: 8 in an HGX node, 72 in an NVL72 rack."""
    domain_bandwidth: float
    """Bytes per second that one GPU sends to its domain: 80 % of one direction of NVLink (DeepEP reaches 726 to
    740 GB/s of 900 on Blackwell)."""
    network_bandwidth: float
    """Bytes per second that one GPU sends out of its domain: 90 % of its network adapter."""


RESERVED = 0.08
"""Share of the memory that planning leaves to the CUDA context, NCCL's buffers and the allocator's gaps."""

_H100 = Accelerator(
    name="h100", generation="hopper", memory_bytes=int(79.1 * GIB), peak_flops=989 * TERA, sustained_flops=790 * TERA,
    memory_bandwidth=2.9 * TERA, gpus_per_domain=8, domain_bandwidth=360 * GB, network_bandwidth=45 * GB,
)  # fmt: skip
_B200 = Accelerator(
    name="b200", generation="blackwell", memory_bytes=int(178 * GIB), peak_flops=2250 * TERA,
    sustained_flops=1000 * _BLACKWELL_FLOPS_PER_WATT, memory_bandwidth=6.9 * TERA, gpus_per_domain=8,
    domain_bandwidth=720 * GB, network_bandwidth=45 * GB,
)  # fmt: skip
ACCELERATORS: dict[str, Accelerator] = {
    a.name: a
    for a in (
        _H100,
        replace(_H100, name="h200", memory_bytes=int(139.8 * GIB), memory_bandwidth=4.3 * TERA),
        _B200,
        replace(_B200, name="b300", memory_bytes=int(268 * GIB), network_bandwidth=90 * GB,
                sustained_flops=1100 * _BLACKWELL_FLOPS_PER_WATT),
        replace(_B200, name="gb200", memory_bytes=int(185 * GIB), peak_flops=2500 * TERA, gpus_per_domain=72,
                sustained_flops=1200 * _BLACKWELL_FLOPS_PER_WATT),
        replace(_B200, name="gb300", memory_bytes=int(276 * GIB), peak_flops=2500 * TERA, gpus_per_domain=72,
                network_bandwidth=90 * GB, sustained_flops=1400 * _BLACKWELL_FLOPS_PER_WATT),
    )
}  # fmt: skip


def accelerator(name: str) -> Accelerator:
    """An accelerator by its name. Raises UsageError for one that is not in the table."""
    if name.lower() not in ACCELERATORS:
        raise UsageError(f"--gpu {name}: not known; allowed: {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name.lower()]
