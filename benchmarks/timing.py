"""Timing side by side: candidates take turns, so that a busy machine slows all of them alike."""

import json
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from utils.files import write_json


def take_turns(candidates: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each candidate over `rounds` turns, after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(rows: list[dict[str, Any]], path: Path, facts: dict[str, Any]) -> None:
    """Print rows as a table and write them as JSON with the facts of the machine."""
    for question in dict.fromkeys(row["question"] for row in rows):
        print(f"\n{question}")
        for row in (row for row in rows if row["question"] == question):
            numbers = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float))
            target = f"  target {row['target']}" if "target" in row else ""
            print(f"  {row['name']:44} {numbers}{target}")
    write_json(path, {"machine": facts, "rows": rows})
    print(f"\nwritten: {path}\nmachine: {json.dumps(facts)}")


def machine_facts(args: Any, device: torch.device, start: float) -> dict[str, Any]:
    """Return what figures depend on, for `report`.

    Args:
        args: options with `threads` and `rounds`.
        start: `time.time()` when the benchmark began.
    """
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "rounds": args.rounds,
        "minutes": round((time.time() - start) / 60, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
