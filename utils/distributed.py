"""Ranks of a torchrun launch, read from its environment."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, `local_rank` on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, local_rank: int = 0) -> "Ranks":
        """Return what torchrun set, or a single process; `local_rank` serves launchers that pass it as an option."""
        return cls(
            int(os.environ.get("RANK", 0)),
            int(os.environ.get("WORLD_SIZE", 1)),
            int(os.environ.get("LOCAL_RANK", local_rank)),
        )

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return this rank's share of the items, every item with exactly one rank."""
        return list(items[self.rank :: self.world])

    def wait_for_all(self) -> None:
        """Return when every rank has got here. Ranks that finish early wait for up to a day."""
        if self.world == 1:
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        dist.barrier()
