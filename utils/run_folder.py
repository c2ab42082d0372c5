"""Checkpoints of a training run: each a folder that appears whole or not at all."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from .errors import TrainingError
from .files import atomic_folder, atomic_path, recover_folder

STATE = "training.pt"
_STEP = re.compile(r"^step_(\d{8})$")

logger = logging.getLogger(__name__)


class RunFolder:
    """`checkpoints/step_00000500/` for going on, `best/` for use, below one folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints, self.best = self.path / "checkpoints", self.path / "best"

    def write_config(self, text: str) -> None:
        """Write the resolved configuration, `config.yaml`; where a run goes on with another one, say what changed."""
        path = self.path / "config.yaml"
        if self.steps() and path.is_file():
            before = path.read_text("utf-8").splitlines()
            changed = [line.strip() for line in text.splitlines() if line not in before]
            if changed:
                logger.warning("%s goes on with other settings than before: %s", self.path, "; ".join(changed))
        with atomic_path(path) as temporary:
            temporary.write_text(text, "utf-8")

    def steps(self) -> list[int]:
        """Return the steps that have a whole checkpoint, in order."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(int(match[1]) for path in self.checkpoints.iterdir() if (match := _STEP.match(path.name)))

    def checkpoint(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.checkpoints / f"step_{step:08d}"

    def find(self, resume: str) -> Path | None:
        """Return the checkpoint to go on from.

        Args:
            resume: `auto`, `never`, or a checkpoint folder.

        Raises:
            TrainingError: `never`, but there are checkpoints; or no such checkpoint.
        """
        steps = self.steps()
        if resume == "auto":
            return self.checkpoint(steps[-1]) if steps else None
        if resume == "never":
            if steps:
                raise TrainingError(
                    f"{self.path} holds checkpoints up to step {steps[-1]}. Go on with --run.resume auto, or give "
                    "another --run.out"
                )
            return None
        if not (Path(resume) / STATE).is_file():
            raise TrainingError(
                f"--run.resume {resume} is no checkpoint: it has no {STATE}. Allowed: auto, never, a folder"
            )
        if steps and Path(resume).resolve() != self.checkpoint(steps[-1]).resolve():
            raise TrainingError(
                f"--run.resume {resume}: {self.path} holds a newer checkpoint, of step {steps[-1]}. Give another "
                "--run.out, or move the newer ones away"
            )
        return Path(resume)

    def partial(self, step: int) -> Path:
        """Return where a step's checkpoint is written before it is whole."""
        return self.checkpoints / f".step_{step:08d}.partial"

    def begin(self, step: int) -> None:
        """Make an empty `partial` folder."""
        shutil.rmtree(self.partial(step), ignore_errors=True)
        self.partial(step).mkdir(parents=True)

    def commit(self, step: int) -> None:
        """Make the `partial` folder the checkpoint of a step; until now there was none."""
        shutil.rmtree(self.checkpoint(step), ignore_errors=True)
        self.partial(step).rename(self.checkpoint(step))

    def keep(self, count: int) -> None:
        """Remove all but the newest checkpoints, and what killed runs left half-written."""
        for step in self.steps()[:-count]:
            shutil.rmtree(self.checkpoint(step))
        for path in self.checkpoints.glob(".*.partial"):
            shutil.rmtree(path)

    def recover(self) -> None:
        """Put `best` back where a killed run left it aside."""
        recover_folder(self.best)

    def set_best(self, checkpoint: Path) -> None:
        """Make a checkpoint's model the best one, without what only training needs."""
        with atomic_folder(self.best) as folder:
            for path in checkpoint.iterdir():
                if path.is_file() and path.name != STATE:
                    shutil.copyfile(path, folder / path.name)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write what only training needs into a checkpoint."""
    with atomic_path(folder / STATE) as temporary:
        torch.save(state, temporary)


def read_state(folder: Path) -> dict[str, Any]:
    """Return what `write_state` wrote.

    Raises:
        TrainingError: it is damaged.
    """
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a damaged file
        reason = " ".join(str(error).split())[:100]
        raise TrainingError(
            f"{folder / STATE} is damaged ({reason}). Remove {folder} to go on from the one before"
        ) from None
