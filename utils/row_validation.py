"""What validations of a training without phrases share: every rank measures its images, the first draws them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from .distributed import Ranks
from .evaluation_report import folder_name
from .evaluator import gather
from .metrics import over_sets
from .visualize import save_picture


class RowValidation:
    """Measures a step on every validation set, row by row; all ranks call it.

    What is measured is up to `rows`, `summarise` and `sheet`; `numbers` names what is averaged over the sets.

    Args:
        sets: by name, as `utils.validation.ValidationSet`.
        folder: of the run; sheets go to `pictures/` below it.
    """

    numbers: tuple[str, ...]

    def __init__(self, sets: Mapping[str, Any], folder: Path, ranks: Ranks) -> None:
        self.sets, self.folder, self.ranks = sets, folder, ranks

    def __call__(self, module: nn.Module, step: int) -> dict[str, float]:
        """Return the numbers of all sets; {} where there are none."""
        return over_sets({name: self._measure(name, module, step) for name in self.sets}, self.numbers)

    def rows(self, module: nn.Module, batch: Any) -> list[Any]:
        """Return what is kept of a batch on the device, with the `order` that rows of all ranks are put in."""
        raise NotImplementedError

    def summarise(self, rows: Sequence[Any]) -> dict[str, float]:
        """Return the numbers of some rows."""
        raise NotImplementedError

    def sheet(self, rows: Sequence[Any], dataset: Any) -> np.ndarray:
        """Return a picture of the first images, uint8 RGB."""
        raise NotImplementedError

    def _measure(self, name: str, module: nn.Module, step: int) -> dict[str, float]:
        entry, found = self.sets[name], []
        device = next(module.parameters()).device
        with tqdm(total=len(entry.dataset), desc=name, unit="image", disable=not self.ranks.is_first, leave=False) as b:
            for batch in entry.batches():
                found += self.rows(module, batch.to(device))
                b.update(len(batch.keys) * self.ranks.world)
        rows = sorted((row for part in gather(found, self.ranks) for row in part), key=lambda row: row.order)
        if self.ranks.is_first:
            path = self.folder / "pictures" / folder_name(name) / f"step_{step:08d}.png"
            save_picture(path, self.sheet(rows, entry.dataset))
        return self.summarise(rows)
