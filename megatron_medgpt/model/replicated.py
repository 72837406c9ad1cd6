"""Modules that every tensor-parallel rank holds whole and runs on its own share of the rows.

The vision encoder and the projector are such modules. Tensor rank r encodes the images that reach into its slice of
the sequence and projects the rows inside it, so ranks see different inputs and their gradients are *partial sums*: the
gradient of the model is the sum over the tensor group. megatron-core's ``finalize_model_grads`` makes that sum for
parameters that carry ``sequence_parallel=True`` when the transformer's configuration has sequence parallelism on.
"""

from __future__ import annotations

import torch
from torch import nn


class ReplicatedModule(nn.Module):
    """Base of the modules above: gradient mark, deterministic initialisation, sharded state.

    Args:
        tp_group: the tensor-parallel group, only to tell replicas apart when a checkpoint is written; None in one
            process.
    """

    def __init__(self, tp_group: torch.distributed.ProcessGroup | None = None):
        super().__init__()
        self.tp_group = tp_group

    def finish(self, *, seed: int, device: torch.device | None) -> None:
        """Give storage to every parameter, initialise it and mark it; subclasses call it at the end of ``__init__``.

        Subclasses build their layers on the meta device, so that torch draws no weights of its own. The weights come
        from a generator of this module's: replicas must start equal, whatever each rank's global random state holds.

        Args:
            device: the CPU when not given; a meta device leaves the module without storage.
        """
        device = device or torch.device("cpu")
        if device.type != "meta":
            self.to_empty(device=device)
            generator = torch.Generator(device=device).manual_seed(seed)
            with torch.no_grad():
                self.reset_parameters(generator)
        for parameter in self.parameters():
            parameter.sequence_parallel = True

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Write every parameter; what is left out keeps whatever the memory held."""
        raise NotImplementedError

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The state as megatron-core's checkpoints want it: whole tensors, replicated over tensor and data ranks.

        Args:
            metadata: must hold ``dp_cp_group``, the data-parallel group, unless megatron-core's own global groups are
                to be used for both (then None, and no ``tp_group``).
        """
        # Here and not at the top: the encoder itself runs without the engine, and needs no second of its import.
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        dp_cp_group = (metadata or {}).get("dp_cp_group")
        if dp_cp_group is not None and self.tp_group is None:
            # megatron-core would take a missing tensor group as rank 0 on every rank, and then every tensor rank would
            # claim to be the one that writes.
            raise ValueError("metadata names dp_cp_group, but this module was built without tp_group")
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {}, sharded_offsets, tp_group=self.tp_group, dp_cp_group=dp_cp_group
        )
