"""The training loop. It receives its objects: an engine, batches, and functions that save and measure."""

import contextlib
import logging
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import Ranks
from .engine import Engine
from .errors import TrainingError
from .files import write_json
from .logger import RunLogger
from .run_folder import RunFolder, write_state

MAX_SKIPPED = 20
"""Steps in a row that fp16 may leave out while its loss scale comes down."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves: a linear rise over `warmup` steps, then down to `final` at `steps`, or constant.

    The kind `drops` is constant but for the steps in `drops`: from each on it is a tenth of what it was.
    """

    kind: str
    warmup: int
    steps: int
    drops: tuple[int, ...] = ()
    final: float = 0.0

    def factor(self, step: int) -> float:
        """Return what the learning rates of step `step` (from 0) are multiplied with, 0..1."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.kind in ("constant", "drops"):
            return 0.1 ** sum(step >= drop for drop in self.drops)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left


@dataclass(frozen=True)
class Hooks:
    """What the trainer calls without knowing it.

    * `inputs`: a batch on the device -> the arguments of the module.
    * `save`: (folder, whole weights) writes a model that inference loads. Rank 0 calls it.
    * `validate`: (module with whole weights, step) -> scores, or {} where nothing is measured. All ranks call it.
    * `best_by`: which score says what the best weights are.
    * `extra_state`: whole weights -> those of them that `save` does not write, to be found in a checkpoint again.
    """

    inputs: Callable[[Any], tuple[Any, ...]]
    save: Callable[[Any, dict[str, Tensor]], None]
    validate: Callable[[nn.Module, int], dict[str, float]]
    extra_state: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    best_by: str = "ciou"


class Stopped(Exception):
    """SIGTERM came; a checkpoint was written."""


class Trainer:
    """Trains, measures and saves; can be killed at any moment and goes on as if nothing had happened.

    What is random in a forward depends on the seed, the step and the rank alone, so a checkpoint needs no random state.

    Args:
        config: a `configs.training.TrainConfig`; its `optim`, `terms`, `val` and `run` are read.
    """

    def __init__(self, engine: Engine, config: Any, hooks: Hooks, folder: RunFolder, ranks: Ranks) -> None:
        self.engine, self.config, self.hooks, self.folder, self.ranks = engine, config, hooks, folder, ranks
        optim = config.optim
        self.schedule = Schedule(optim.schedule, optim.warmup, optim.steps, optim.drops, optim.final)
        self.step, self.best, self._skipped = 0, -math.inf, 0
        self._is_stopping = False

    def resume(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        """Load the optimizer and the place of a run; the weights are the caller's to load.

        Args:
            state: what `read_state` returned for the checkpoint.
        """
        images = self._images_per_step()
        if state["images_per_step"] != images:
            raise TrainingError(
                f"{checkpoint} was trained with {state['images_per_step']} images per step, here are {images}: it "
                f"would go on at another place of the data. Give --optim.global_batch {state['images_per_step']}"
            )
        if self.engine.keeps_optimizer != ("optimizer" in state["engine"]):
            raise TrainingError(
                f"the optimizer of {checkpoint} was written by another kind of strategy. Go on with the same "
                "run.strategy as before, or start anew from its weights with model.checkpoint"
            )
        self.step, self.best = state["step"], state["best"]
        if self.ranks.is_first:
            self.folder.recover()
            if state["is_best"]:
                self.folder.set_best(checkpoint)  # again: a kill may have come between the two
        engine = state["engine"]
        if not self.ranks.is_first:  # the optimizer comes from rank 0; the loss scale each rank has for itself
            engine = {key: value for key, value in engine.items() if key == "scaler"}
        self.engine.load_optimizer_state(engine)
        self.engine.load_shards(checkpoint)

    def run(self, steps: Callable[[int, int], Iterator[list[Any]]]) -> None:
        """Train to the end.

        Args:
            steps: (start, stop) -> the batches of each step.

        Raises:
            TrainingError: the loss or the gradients are not finite; `nan.json` says on what.
            Stopped: after SIGTERM, when all is saved.
        """
        earlier = signal.signal(signal.SIGTERM, self._stop_soon)
        log = RunLogger(self.folder.path, self.step, self.config.optim.steps, self.ranks.is_first)
        if self.engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.engine.device)
        try:
            self._run(steps, log)
        finally:
            log.close()
            signal.signal(signal.SIGTERM, earlier)

    def _stop_soon(self, *_: Any) -> None:
        self._is_stopping = True

    def _run(self, steps: Callable[[int, int], Iterator[list[Any]]], log: RunLogger) -> None:
        total, run = self.config.optim.steps, self.config.run
        speed = _Speed()
        self.engine.module.train()
        for batches in speed.waiting(steps(self.step, total)):
            numbers, phrases, stop = self._step(batches)
            self.step += 1
            speed.add(phrases)
            log.step(numbers["loss"])
            is_last = self.step == total
            if self.step % run.log_every == 0 or is_last:
                log.record(self.step, numbers | speed.numbers(self.engine.device))
            with speed.paused():
                if is_last or (self.step % self.config.val.every == 0 and not stop):
                    self._evaluate(log)
                elif self.step % run.save_every == 0 or stop:
                    self._save()
            if stop and not is_last:
                raise Stopped(f"SIGTERM: saved at step {self.step}; the same command goes on from there")

    def _step(self, batches: Sequence[Any]) -> tuple[dict[str, float], float, bool]:
        """Do one optimizer step; return what to log, the phrases of all ranks, and whether to stop."""
        terms, world = self.config.terms(), self.ranks.world
        torch.manual_seed(((self.config.run.seed * 1_000_003 + self.step) * 4099 + self.ranks.rank) % 2**63)
        batches = [batch.to(self.engine.device) for batch in batches]
        phrases = self._sum([sum(len(batch.phrases) for batch in batches)])[0]
        # Ranks may hold different numbers of phrases, and their gradients are averaged: the sum over all phrases is
        # divided by their number over all ranks, so that each phrase counts the same.
        scale = torch.tensor(list(terms.values()), device=self.engine.device) * (world / phrases)
        per_phrase = []
        for i, batch in enumerate(batches):
            with self.engine.autocast():
                inputs = self.hooks.inputs(batch)
            is_last = i == len(batches) - 1
            per_phrase.append(self.engine.accumulate(inputs, lambda losses: (losses @ scale).sum(), is_last))
        sums = torch.cat(per_phrase).double().sum(0).tolist()
        *totals, bad, stop = self._sum([*sums, float(not math.isfinite(sum(sums))), float(self._is_stopping)])
        if bad and not self.engine.uses_scaler:
            self._fail("loss", batches, per_phrase)
        factor = self.schedule.factor(self.step)
        norm = self.engine.update(factor)
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if self._skipped > (MAX_SKIPPED if self.engine.uses_scaler else 0):
            self._fail("gradient", batches, per_phrase)
        numbers = {
            "loss": sum(total * weight for total, weight in zip(totals, terms.values(), strict=True)) / phrases,
            **{name: total / phrases for name, total in zip(terms, totals, strict=True)},
            "grad_norm": norm,
            "lr": max(group["lr"] for group in self.engine.optimizer.param_groups),
        }
        return numbers, phrases, stop > 0

    def _sum(self, values: list[float]) -> list[float]:
        """Return the values summed over ranks."""
        if self.ranks.world == 1:
            return values
        kind = torch.float32 if self.engine.device.type == "mps" else torch.float64
        tensor = torch.tensor(values, dtype=kind, device=self.engine.device)
        with self._together():
            dist.all_reduce(tensor)
        return tensor.tolist()

    def _fail(self, what: str, batches: Sequence[Any], per_phrase: list[Tensor]) -> None:
        path = self.folder.path / f"nan.rank{self.ranks.rank}.json"
        rows = torch.cat(per_phrase).tolist()
        names = [
            (phrase, name) for batch in batches for phrase, name in zip(batch.phrases, batch.phrase_ids, strict=True)
        ]
        write_json(
            path,
            {
                "step": self.step,
                "images": [key for batch in batches for key in batch.keys],
                "phrases": [
                    {"phrase": phrase, "id": name} | dict(zip(self.config.terms(), row, strict=True))
                    for (phrase, name), row in zip(names, rows, strict=True)
                ],
            },
        )
        raise TrainingError(
            f"the {what} of step {self.step} is not a finite number; {path} lists its phrases. The weights were not "
            "changed. Lower optim.lr, or use bf16 instead of fp16; then start again with --run.resume auto"
        )

    def _evaluate(self, log: RunLogger) -> None:
        with self.engine.whole_module() as module, torch.no_grad(), self.engine.autocast():
            module.eval()
            scores = self.hooks.validate(module, self.step)
        self.engine.module.train()
        score = scores.get(self.hooks.best_by, -math.inf)
        is_best = score > self.best
        if is_best:
            self.best = score
        if scores:
            log.record(self.step, scores, "val")
            log.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        self._save(is_best)

    def _save(self, is_best: bool = False) -> None:
        tensors, state = self.engine.tensors(), self.engine.optimizer_state()
        partial = self.folder.partial(self.step)
        if self.ranks.is_first:
            self.folder.begin(self.step)
            self.hooks.save(partial, tensors)
            content = {
                "step": self.step,
                "best": self.best,
                "is_best": is_best,
                "images_per_step": self._images_per_step(),
                "engine": state,
                "extra": self.hooks.extra_state(tensors),
            }
            write_state(partial, content)
        self._meet()
        self.engine.save_shards(partial)
        self._meet()
        if self.ranks.is_first:
            self.folder.commit(self.step)
            if is_best:
                self.folder.set_best(self.folder.checkpoint(self.step))
            self.folder.keep(self.config.run.keep)
        self._meet()

    def _images_per_step(self) -> int:
        return self.config.optim.global_batch or self.config.data.batch_size * self.ranks.world

    def _meet(self) -> None:
        if self.ranks.world > 1:
            with self._together():
                dist.barrier()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Say in one line that other ranks are gone, where torch says it in many."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(f"rank {self.ranks.rank} lost the others ({reason}). See what they said") from None


class _Speed:
    """How fast it goes since the last time it was asked."""

    def __init__(self) -> None:
        self._phrases, self._waited, self._since = 0.0, 0.0, time.perf_counter()

    def waiting(self, items: Iterator[Any]) -> Iterator[Any]:
        """Yield the items, and measure how long they kept the loop waiting."""
        while True:
            start = time.perf_counter()
            item = next(items, None)
            self._waited += time.perf_counter() - start
            if item is None:
                return
            yield item

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that evaluating and saving take."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def add(self, phrases: float) -> None:
        """Count the phrases of a step."""
        self._phrases += phrases

    def numbers(self, device: torch.device) -> dict[str, float]:
        """Return phrases per second of all ranks, the share of time spent waiting for data, and memory in GB."""
        seconds = time.perf_counter() - self._since
        values = {
            "phrases_per_s": self._phrases / seconds,
            "data_wait": self._waited / seconds,
            "memory_gb": _peak_memory(device) / 1e9,
            "time": time.time(),
        }
        self._phrases, self._waited, self._since = 0.0, 0.0, time.perf_counter()
        return values


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
