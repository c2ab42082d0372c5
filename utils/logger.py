"""What a training run tells: a progress bar, JSON lines and tensorboard, on rank 0 alone."""

import contextlib
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .files import atomic_path

LOG = "log.jsonl"


class RunLogger:
    """Writes `log.jsonl` and `tensorboard/` below a folder; records after step `start` of an earlier run are dropped.

    Args:
        is_first: other ranks log nothing.
    """

    def __init__(self, folder: Path, start: int, steps: int, is_first: bool = True) -> None:
        self.folder, self._bar, self._board = folder, None, None
        if not is_first:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._forget_after(start)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def _forget_after(self, start: int) -> None:
        path = self.folder / LOG
        if not path.is_file():
            return
        kept = []
        for line in path.read_text("utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a stopped run may have left half a line
                kept += [line] if json.loads(line)["step"] <= start else []
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), "utf-8")

    def step(self, loss: float) -> None:
        """Move the bar by one step."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update()

    def record(self, step: int, values: dict[str, Any], group: str = "train") -> None:
        """Write numbers of a step."""
        if self._board is None:
            return
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "group": group, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{group}/{name}", value, step)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text)

    def close(self) -> None:
        """Finish the bar and the files."""
        if self._bar is not None:
            self._bar.close()
            self._board.close()
