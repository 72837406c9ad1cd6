"""The tensor files of a checkpoint: megatron-core's ``torch_dist`` format, without its writer processes and pickles.

What is stored is what megatron-core stores (any megatron-core can read the folder), with two differences:

- Written by this process through torch's own file writer. megatron-core 0.16.1 forks writer processes and a spawned
  queue manager: 2 to 6 s per save on two ranks, and a writer that dies (out of memory, psutil missing) leaves its rank
  waiting for ever.
- Tensors only. A ``ShardedObject`` is a pickle that runs when it is read, so none is written and none is read; what is
  not a tensor travels as JSON in the manifest. ``common.pt`` is an empty dict that 0.16.1's loader insists on.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint import save as write_torch_dist
from torch.distributed.checkpoint.metadata import StorageMeta

from megatron_medgpt.checkpoint.manifest import write_durably
from megatron_medgpt.checkpoint.metadata import COMMON
from megatron_medgpt.checkpoint.ranks import on_first_rank, reason
from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.parallel.platform import prepare_engine

prepare_engine()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.core import (  # noqa: E402
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess  # noqa: E402
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies  # noqa: E402
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper  # noqa: E402

# 0.19 calls common.pt deprecated at every load; 0.16.1 cannot read a folder without it.
logging.getLogger("megatron.core.dist_checkpointing.strategies.common").setLevel(logging.ERROR)


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def write_rank_state(folder: Path, rank: int, values: Mapping[str, Any]) -> None:
    write_durably(folder / rank_file(rank), (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())


def sharded_tensors(sharded_state: Mapping[str, Any]) -> Iterator[ShardedTensor]:
    """The sharded tensors of a nested state, factories built."""
    for leaf in nested_values(dict(sharded_state)):
        if isinstance(leaf, ShardedTensorFactory):
            yield from (part for part in nested_values(leaf.build()) if isinstance(part, ShardedTensor))
        elif isinstance(leaf, ShardedTensor):
            yield leaf


def tensors_nbytes(sharded_state: Mapping[str, Any]) -> int:
    """Bytes that this rank's main replicas will take."""
    return sum(
        leaf.data.numel() * leaf.data.element_size()
        for leaf in sharded_tensors(sharded_state)
        if leaf.data is not None and is_main_replica(leaf.replica_id)
    )


def write_tensors(
    sharded_state: dict[str, Any], folder: Path, *, parallel_group: torch.distributed.ProcessGroup | None = None
) -> None:
    """Write the tensors into an empty folder, flushed to the disk. Collective over the world.

    Raises:
        TypeError: a leaf is not a sharded tensor (it would have to be pickled).
    """
    _refuse_other_leaves(sharded_state)
    strategy: Any = _InProcessWriter("torch_dist", 1)
    if parallel_group is not None and parallel_group.size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, parallel_group)
    tensors, _ = save_preprocess(sharded_state)
    strategy.save(tensors, folder)

    def finish() -> None:
        common = io.BytesIO()
        torch.save({}, common)
        write_durably(folder / COMMON, common.getvalue())
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))

    on_first_rank(finish)


def read_tensors(sharded_state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a sharded state from a folder that ``metadata.stored_tensors`` has accepted. Collective over the world.

    Raises:
        UsageError: a file cannot be read, or holds something else than tensors.
    """
    try:
        return dist_checkpointing.load(sharded_state, str(folder), strict="assume_ok_unexpected")
    except (CheckpointException, CheckpointingException, pickle.UnpicklingError) as error:
        raise UsageError(f"checkpoint {folder} cannot be read: {reason(error)}; use another checkpoint") from error


class _InProcessWriter(torch_strategies.TorchDistSaveShardedStrategy):
    """megatron-core's translation of sharded tensors, written by torch's FileSystemWriter in this process."""

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        state, _, _ = torch_strategies._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        # One thread: torch's writer loses what a second thread raises.
        writer = _PathlessWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True, thread_count=1)
        planner = torch_strategies.MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        write_torch_dist(torch_strategies.mcore_to_pyt_state_dict(state, False), storage_writer=writer, planner=planner)


class _PathlessWriter(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Without the folder's path, which torch pickles as a pathlib object: the folder will be renamed."""
        return StorageMeta(save_id=self.save_id)


def _refuse_other_leaves(sharded_state: Mapping[str, Any]) -> None:
    for leaf in nested_values(dict(sharded_state)):
        if isinstance(leaf, ShardedObject) or not isinstance(leaf, ShardedTensor | ShardedTensorFactory):
            name = getattr(leaf, "key", repr(leaf)[:80])
            raise TypeError(f"{name} ({type(leaf).__name__}) is not a sharded tensor; put it into the facts as JSON")
