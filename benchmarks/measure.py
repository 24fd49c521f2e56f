"""Times of functions that take turns, peak memory, and what machine it was.

On a shared machine a time means little; a ratio of times taken right after each other means more. So functions that
are compared take turns in one process, in an order that turns around every round; ratios are taken within each round,
and their median is reported with the quartiles.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

Times = dict[str, list[float]]
LEAST_ROUNDS = 3


def take_turns(
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    seconds: float,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> Times:
    """Seconds that each function takes, one number for each round.

    Args:
        functions (`dict`): what is measured; called once before, unmeasured.
        rounds (`int`): how often each is measured.
        seconds (`float`): stop when the next round would end later than this, but not before 3 rounds.
        check (`Callable`, *optional*): gets the results of the unmeasured calls; raises if they are wrong.
    """
    began = time.perf_counter()
    results = {name: function() for name, function in functions.items()}
    if check is not None:
        check(results)
    del results
    times: Times = {name: [] for name in functions}
    for turn in range(rounds):
        round_began = time.perf_counter()
        gc.collect()
        for name in functions if turn % 2 == 0 else reversed(functions):
            start = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - start)
        now = time.perf_counter()
        if turn + 1 >= LEAST_ROUNDS and now - began + now - round_began > seconds:
            break
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def ratio(times: Times, above: str, below: str) -> dict[str, float]:
    """Median and quartiles of the ratio of two functions' times, taken round by round."""
    return spread([a / b for a, b in zip(times[above], times[below], strict=True)])


def measured_row(section: str, name: str, times: Times, above: str, below: str, **details: Any) -> dict[str, Any]:
    """A row of the results: seconds of every function, and the ratio of two of them."""
    return {
        "section": section,
        "name": name,
        "rounds": len(times[above]),
        "ratio_of": [above, below],
        "ratio": ratio(times, above, below),
        "seconds": {function: spread(values) for function, values in times.items()},
        **details,
    }


def peak_memory(function: Callable[[], Any]) -> float | None:
    """How many MiB more than before the process holds at most while a function runs; None where the system can't say
    (it needs Linux). Memory that the allocator keeps from an earlier call is given back first, so that it counts."""
    function()  # what is set up once does not count
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except (AttributeError, OSError):
        return None
    before = _memory("VmRSS")
    function()
    return (_memory("VmHWM") - before) / 1024


def _memory(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(int((_first("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 1) or None,
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _first(path: str, name: str) -> str | None:
    """The first value of this name in a file of `name: value` lines."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
