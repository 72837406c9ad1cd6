"""CUDA or CPU: the only file that knows the difference, and what megatron-core needs replaced to run without CUDA.

megatron-core names the CUDA device in many places (``torch.cuda.current_device()``, ``device="cuda"``, streams). On a
CPU its modules are given a stand-in for the name ``torch`` in which these answer for the CPU. Only modules of
``megatron.core`` see the stand-in: every other library and, but for its gloo groups, PyTorch stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_medgpt.config.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Platform:
    """Where the work runs."""

    kind: str
    """``cuda`` or ``cpu``."""
    device: torch.device
    """Device of this rank."""
    backend: str
    """Backend of ``torch.distributed``."""
    name: str
    """For people: the accelerator's name, or how many CPU threads this rank uses."""

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has finished what was queued (nothing to wait for on a CPU)."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def peak_memory_bytes(self) -> int:
        """Largest memory this process has held: on the accelerator, or resident on the host."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        import resource  # not on every system that can import this package

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.cache
def platform(local_rank: int = 0, kind: str = "auto") -> Platform:
    """Choose the platform of this process.

    Args:
        local_rank: place of this rank on its node; the accelerator with this number is used.
        kind: ``auto`` (CUDA where there is a device), ``cuda`` or ``cpu``.

    Raises:
        UsageError: when CUDA is asked for and there is none, or there are fewer devices than local ranks.
    """
    if kind not in ("auto", "cuda", "cpu"):
        raise UsageError(f"platform {kind!r}; allowed: auto, cuda, cpu")
    if kind == "cpu" and torch.cuda.is_available():
        raise UsageError("platform cpu on a machine with CUDA devices: set CUDA_VISIBLE_DEVICES= (empty) instead")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        threads = torch.get_num_threads()
        return Platform(
            kind="cpu", device=torch.device("cpu"), backend="gloo", name=f"CPU, {threads} thread{'s' * (threads > 1)}"
        )
    if not torch.cuda.is_available():
        raise UsageError("platform cuda was asked for, but torch finds no CUDA device; set it to cpu or auto")
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise UsageError(
            f"local rank {local_rank} has no accelerator of its own: this node has {num_devices}; "
            f"start at most {num_devices} processes here"
        )
    device = torch.device("cuda", local_rank)
    return Platform(kind="cuda", device=device, backend="nccl", name=torch.cuda.get_device_name(device))


def current_device() -> torch.device:
    """Where modules of this process put their parameters."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@functools.cache
def engine_version() -> tuple[int, ...]:
    """Version of megatron-core as numbers, e.g. (0, 16, 1)."""
    import megatron.core

    return tuple(int(part) for part in megatron.core.__version__.split(".")[:3] if part.isdigit())


# ---- what megatron-core needs replaced on a CPU: one function per defect ------------------------------------------

ENGINE_MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.models.gpt",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.rerun_state_machine",
)
"""Loaded before the stand-in is handed out, so that no module of the engine that we use is missed."""

FACTORIES = (
    "arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "randn", "tensor", "zeros",
    "zeros_like",
)  # fmt: skip


@functools.cache
def prepare_engine() -> None:
    """Make megatron-core usable on this machine's platform. Call before anything of it is built; idempotent."""
    if torch.cuda.is_available():
        return
    with warnings.catch_warnings():
        # Six lines saying that TransformerEngine and apex are absent: `medgpt doctor` says it once.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
        for name in ENGINE_MODULES:
            importlib.import_module(name)
    stand_in = _copy_of_module(torch)
    stand_in.cuda = _copy_of_module(torch.cuda)
    answer_device_queries(stand_in)
    give_streams_that_do_nothing(stand_in)
    place_factories_on_the_cpu(stand_in)
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in
    accept_cpu_tensors_in_the_optimizer()
    exchange_optimizer_state_on_the_host()
    hand_lists_to_all_to_all()
    skip_collectives_of_one_rank()
    draw_no_random_numbers_on_the_device()
    share_one_network_loop()


def _copy_of_module(module: types.ModuleType) -> Any:
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update(module.__dict__)
    copy.__getattr__ = functools.partial(getattr, module)  # submodules that are imported later
    return copy


def answer_device_queries(stand_in: Any) -> None:
    """megatron-core allocates on ``torch.cuda.current_device()`` and calls ``set_device`` and ``synchronize``; all
    three raise in a PyTorch without CUDA (0.16.1 to 0.19.2: tensor_parallel/layers.py, mappings.py, p2p)."""
    stand_in.cuda.current_device = lambda: torch.device("cpu")
    stand_in.cuda.set_device = lambda device: None
    stand_in.cuda.synchronize = lambda device=None: None
    stand_in.cuda.empty_cache = lambda: None


class NullStream:
    """Stands where megatron-core wants a CUDA stream or event: on a CPU everything is in order already."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> NullStream:
        return self

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def give_streams_that_do_nothing(stand_in: Any) -> None:
    """The all-to-all dispatcher makes and waits for CUDA streams whatever the device
    (0.16.1 moe/token_dispatcher.py:445, 0.19.2 :469)."""
    only_stream = NullStream()
    stand_in.cuda.Stream = NullStream
    stand_in.cuda.Event = NullStream
    stand_in.cuda.current_stream = lambda device=None: only_stream
    stand_in.cuda.default_stream = lambda device=None: only_stream
    stand_in.cuda.stream = lambda stream: contextlib.nullcontext()
    stand_in.cuda.is_current_stream_capturing = lambda: False


def place_factories_on_the_cpu(stand_in: Any) -> None:
    """Schedules, gradient clipping and the optimizer write ``device="cuda"``
    (0.16.1 pipeline_parallel/schedules.py:596, optimizer/clip_grads.py:103, optimizer/optimizer.py:473)."""

    def placed(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return on_cpu

    for name in FACTORIES:
        setattr(stand_in, name, placed(getattr(torch, name)))


@contextlib.contextmanager
def _cpu_tensors_pass_for_cuda() -> Iterator[None]:
    """``tensor.type()`` answers with the CUDA name of the type; float64, a dtype for tests, counts as float32."""
    real = torch.Tensor.type
    names = {
        torch.float64: "torch.cuda.FloatTensor", torch.float32: "torch.cuda.FloatTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor", torch.float16: "torch.cuda.HalfTensor",
    }  # fmt: skip

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.dtype not in names:
            return real(self, *args, **kwargs)
        return names[self.dtype]

    torch.Tensor.type = type_name  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.type = real  # type: ignore[method-assign]


def accept_cpu_tensors_in_the_optimizer() -> None:
    """The optimizers sort parameters by the text of ``tensor.type()`` and refuse names that do not begin with
    ``torch.cuda`` (0.16.1 optimizer/distrib_optimizer.py:361, optimizer.py:671, clip_grads.py:167)."""
    clip_grads = importlib.import_module("megatron.core.optimizer.clip_grads")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer = importlib.import_module("megatron.core.optimizer.optimizer")

    def passing(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with _cpu_tensors_pass_for_cuda():
                return function(*args, **kwargs)

        return wrapped

    for owner in (distributed.DistributedOptimizer, optimizer.Float16OptimizerWithFloat16Params):
        owner.__init__ = passing(owner.__init__)
    clip = passing(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = clip
    optimizer.clip_grad_by_total_norm_fp32 = clip


def exchange_optimizer_state_on_the_host() -> None:
    """The reshardable optimizer state is gathered through ``tensor.cuda()``; a tensor on the CPU stays there
    (0.16.1 optimizer/distrib_optimizer.py:1089, 0.19.2 :1374)."""
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    gather = distributed.DistributedOptimizer.get_parameter_state_dp_zero

    @functools.wraps(gather)
    def on_the_host(*args: Any, **kwargs: Any) -> Any:
        real = torch.Tensor.cuda
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
        try:
            return gather(*args, **kwargs)
        finally:
            torch.Tensor.cuda = real  # type: ignore[method-assign]

    distributed.DistributedOptimizer.get_parameter_state_dp_zero = on_the_host


def hand_lists_to_all_to_all() -> None:
    """The dispatcher turns split sizes into numpy only when they come from CUDA; gloo's all-to-all refuses tensors
    (0.16.1 moe/moe_utils.py:1093, 0.19.2 :1184)."""
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")

    def host_copy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = host_copy
    dispatcher.maybe_move_tensor_to_cpu = host_copy


def skip_collectives_of_one_rank() -> None:
    """Gradient buffers are reduced and parameters gathered in place, also over a group of one rank, where gloo copies
    the whole buffer onto itself (measured: 0.3 s of a 4.4 s step). NCCL knows this case."""
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def wrapped(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            if group is not None and group.size() == 1 and output.data_ptr() == tensor.data_ptr():
                return None
            return collective(output, tensor, *args, **kwargs)

        return wrapped

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, unless_alone(getattr(buffers, name)))


def draw_no_random_numbers_on_the_device() -> None:
    """Sequence-parallel blocks fork the CUDA generator for dropout, which the CPU lacks and this model has not
    (0.16.1 and 0.19.2 transformer/transformer_block.py). The engine's own tracker for inference forks nothing."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def share_one_network_loop() -> None:
    """Every gloo group makes a network device of its own, whose thread wakes up a hundred times a second, and a layout
    has 20 groups to 100. One device serves all groups of a process (torch 2.11, 2.13: distributed_c10d.py makes each
    group without options)."""
    gloo = torch.distributed.ProcessGroupGloo
    make = gloo.__init__
    devices: dict[int, list[Any]] = {}  # by process: threads do not survive a fork

    @functools.wraps(make)
    def with_the_first_device(self: Any, store: Any, rank: int, size: int, *args: Any, **kwargs: Any) -> None:
        shared = devices.get(os.getpid())
        if shared is None or args or set(kwargs) != {"timeout"}:
            make(self, store, rank, size, *args, **kwargs)
            devices.setdefault(os.getpid(), self.options._devices)
            return
        options = gloo._Options()
        options._devices, options._threads, options._timeout = shared, 2 * len(shared), kwargs["timeout"]
        make(self, store, rank, size, options)

    gloo.__init__ = with_the_first_device
