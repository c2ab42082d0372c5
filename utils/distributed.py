"""Ranks of a torchrun launch, read from its environment."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from .errors import ModelError, TrainingError

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, `local_rank` on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, local_rank: int = 0) -> "Ranks":
        """Return what torchrun set, or a single process; `local_rank` serves launchers that pass it as an option."""
        try:
            ranks = cls(
                int(os.environ.get("RANK", 0)),
                int(os.environ.get("WORLD_SIZE", 1)),
                int(os.environ.get("LOCAL_RANK", local_rank)),
            )
        except ValueError as error:
            raise ModelError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers ({error}). Use torchrun") from None
        if not 0 <= ranks.rank < ranks.world:
            raise ModelError(f"RANK {ranks.rank} is not below WORLD_SIZE {ranks.world}. Use torchrun")
        return ranks

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return this rank's share of the items, every item with exactly one rank."""
        return list(items[self.rank :: self.world])

    def join(self, backend: str = "gloo") -> None:
        """Meet the other ranks before any work; does nothing for a single process.

        Args:
            backend: of torch.distributed; `cpu:gloo,cuda:nccl` where tensors on GPUs are exchanged.

        Raises:
            ModelError: the launcher did not say where to meet, or they did not come.
        """
        if self.world == 1:
            return
        import torch.distributed as dist

        if dist.is_initialized():
            return
        logger.info("rank %d of %d meets the others", self.rank, self.world)
        try:
            dist.init_process_group(backend, timeout=timedelta(days=1))
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"the {self.world} ranks did not meet ({error}). Start them with torchrun") from None

    def agree(self, value: object, what: str) -> None:
        """Check that every rank has the same value.

        Raises:
            TrainingError: they differ; `what` says in what, and the remedy.
        """
        if self.world == 1:
            return
        import torch.distributed as dist

        values: list[object] = [None] * self.world
        dist.all_gather_object(values, value)
        if any(other != value for other in values):
            raise TrainingError(f"the ranks see different things ({', '.join(map(str, values))}) as {what}")

    def leave(self) -> None:
        """Take leave of the other ranks, before the process ends."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def wait_for_all(self) -> None:
        """Return when every rank has got here. Ranks that finish early wait for up to a day."""
        if self.world == 1:
            return
        import torch.distributed as dist

        self.join()
        logger.info("rank %d waits for the others", self.rank)
        dist.barrier()
