"""What a forward pass of a decode costs, measured beside others in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers.utils import logging


@dataclass
class Cost:
    """What a forward pass of a decode costs, with all that is done beside it.

    Args:
        time (`float`): over that of the decode that is compared with.
        positions (`float`): tokens that go through the backbone in it, mean of a row.
    """

    time: float
    positions: float


def measure_costs(
    decodes: Mapping[str, Callable[[], object]], baseline: str, rounds: int = 5, progress: bool = True
) -> dict[str, Cost]:
    """Time decodes side by side: all of them in every round, in alternating order, after a round to warm up.

    Args:
        decodes (`dict[str, Callable]`): by name; each decodes once and returns the [`DSCGenerationOutput`].
        baseline (`str`): the one that the others are compared with, in every round; the median of the rounds counts.
        rounds (`int`): how many.
        progress (`bool`): show a progress bar.

    Raises:
        `ValueError`: `rounds` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"`rounds={rounds}` must be at least 1.")
    ratios: dict[str, list[float]] = {name: [] for name in decodes}
    positions: dict[str, float] = {}
    for number in logging.tqdm(range(rounds + 1), desc="Measuring costs", disable=not progress):
        seconds: dict[str, float] = {}
        for name in decodes if number % 2 else reversed(decodes):
            began = time.perf_counter()
            output = decodes[name]()
            passes = float(output.forward_passes.float().mean())
            seconds[name] = (time.perf_counter() - began) / passes
            positions[name] = float(output.positions_computed.float().mean()) / passes
        for name, value in seconds.items() if number else ():
            ratios[name].append(value / seconds[baseline])
    return {name: Cost(statistics.median(values), positions[name]) for name, values in ratios.items()}


__all__ = ["Cost", "measure_costs"]
