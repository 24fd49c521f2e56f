"""Every system of the comparison on the demo model: what is tuned on validation problems, and how it is measured.

A *system* (`systems.py`) is a model and arguments of `generate()`, of which some are free. For each budget of forward
passes the free ones are chosen on validation problems, in the same way for all systems: the most accurate setting
within the budget. Test problems of several seeds are then solved with what was chosen. All that was run is kept in a
journal, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from solve import Solved, faster_dtype, generate_batch, solve
from systems import MODELS, SYSTEMS, System
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging
from word_problems import draw_problems

import dsc_hf  # noqa: F401  (registers the Auto classes)
from dsc_hf.evaluation.costs import measure_costs
from dsc_hf.evaluation.curves import comparison, plot_curves
from dsc_hf.evaluation.request_log import RequestLog, key_of

BUDGETS = (10, 15, 20, 30, 50)
"""Forward passes for a problem; a setting belongs to the lowest budget that holds it."""

Settings = dict[str, Any]


def require(name: str) -> None:
    """Raise a `ValueError` if one of `MODELS` was not trained here."""
    if not MODELS[name].is_dir():
        raise ValueError(
            f"The model {name!r} is not in {MODELS[name]}: train it by `python examples/demo_model/train_rivals.py "
            f"--only {name}`, or leave its systems out (`--systems`)."
        )


def load(name: str, dtype: torch.dtype):
    """One of `MODELS`."""
    require(name)
    return AutoModel.from_pretrained(MODELS[name], dtype=dtype).eval()


class Runner:
    """Solves problems with systems, each job once.

    Args:
        journal ([`RequestLog`]): what was run already.
        dtype (`torch.dtype`, *optional*): of the backbone; by default the faster one.
    """

    def __init__(self, journal: RequestLog, dtype: torch.dtype | None = None):
        self.journal, self.dtype = journal, dtype or faster_dtype()
        self.loaded: tuple[str, Any] = ("", None)
        self.tokenizer = AutoTokenizer.from_pretrained(MODELS["dsc"])

    def model(self, name: str):
        """One of `MODELS`; the last one is kept."""
        if self.loaded[0] != name:
            self.loaded = (name, load(name, self.dtype))
        return self.loaded[1]

    def run(self, model: str, settings: Settings, split: str, seed: int, problems: int) -> dict[str, Any]:
        """Solve `problems` problems of a split; from the journal if that was done before."""
        job = {"model": model, "settings": settings, "split": split, "seed": seed, "problems": problems}
        key = key_of(job)
        if key not in self.journal:
            drawn = draw_problems(problems, seed, split)
            solved = solve(self.model(model), self.tokenizer, drawn, batch_size=100, generator=seed, **settings)
            self.journal.append([{"key": key, "job": job, "dtype": str(self.dtype), **_record(solved)}])
        return self.journal[key]


def _record(solved: Solved) -> dict[str, Any]:
    """What the journal keeps: means, and for each problem whether it was solved (for paired differences)."""
    bits = {name: np.packbits(getattr(solved, name)).tobytes().hex() for name in ("right", "valid")}
    summary = solved.summary()
    del summary["problems"]
    return {**summary, **bits}


def solved_bits(record: dict[str, Any], name: str) -> np.ndarray:
    """`right` or `valid` of each problem of a record, `(problems,)` of bool."""
    packed = np.frombuffer(bytes.fromhex(record[name]), dtype=np.uint8)
    return np.unpackbits(packed, count=record["job"]["problems"]).astype(bool)


def choose(
    runner: Runner, system: System, problems: int, seed: int, budgets: Sequence[float] = BUDGETS
) -> dict[float, Settings]:
    """The most accurate setting of a system within each budget of passes, on validation problems.

    Accuracy is the mean of the final number's and the whole reasoning's. A budget in which the best setting also fits
    the next lower one has none of its own.
    """
    rows = [(s, runner.run(system.model, s, "validation", seed, problems)) for s in system.settings()]
    chosen: dict[float, Settings] = {}
    for budget in budgets:
        within = [(s, r) for s, r in rows if r["forward_passes"] <= budget]
        if within:
            best = max(within, key=lambda row: row[1]["accuracy"] + row[1]["reasoning_accuracy"])[0]
            if best not in chosen.values():
                chosen[budget] = best
    return chosen


def system_costs(runner: Runner, systems: Sequence[System], rounds: int = 5, problems: int = 50) -> dict[str, float]:
    """Time of a forward pass of each system over that of plain decoding; one setting for each, at its first speed."""
    drawn = draw_problems(problems, 0, "validation")
    models = {name: load(name, runner.dtype) for name in {s.model for s in systems}}

    def solve_once(system: System):
        settings = next(iter(system.settings()))
        return generate_batch(models[system.model], runner.tokenizer, drawn, generator=0, **settings)[0]

    costs = measure_costs({s.name: partial(solve_once, s) for s in systems}, "plain", rounds)
    return {name: round(cost.time, 3) for name, cost in costs.items()}


def measure(
    runner: Runner,
    systems: Sequence[System],
    problems: int,
    seeds: Sequence[int],
    validation_problems: int,
    validation_seed: int = 100,
) -> list[dict[str, Any]]:
    """Choose and measure all systems.

    Returns:
        `list[dict]`: a row for each system and setting: `method, label, settings, budget, accuracy, standard_error,
        reasoning_accuracy, forward_passes, remasks, problems, seeds` and `records`, those of the journal, one a seed.
    """
    chosen = {}
    for system in logging.tqdm(systems, desc="Choosing settings"):
        chosen[system.name] = choose(runner, system, validation_problems, validation_seed)
    jobs = [(s, budget, settings) for s in systems for budget, settings in chosen[s.name].items()]
    bar = logging.tqdm(total=len(jobs) * len(seeds), desc="Solving test problems")
    records: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for seed in seeds:  # whole comparisons first, further seeds later
        for system, budget, settings in jobs:
            bar.set_postfix_str(f"{system.name}, seed {seed}")
            record = runner.run(system.model, settings, "test", seed, problems)
            records.setdefault((system.name, budget), []).append(record)
            bar.update()
    bar.close()
    return [summarise(s, budget, settings, records[s.name, budget]) for s, budget, settings in jobs]


def summarise(system: System, budget: float, settings: Settings, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Pool the seeds of one setting; every seed has problems of its own."""
    right = np.concatenate([solved_bits(record, "right") for record in records])
    means = {
        name: round(statistics.fmean(record[name] for record in records), 4)
        for name in ("accuracy", "reasoning_accuracy", "forward_passes", "remasks", "positions", "tokens_per_forward")
    }
    return {
        "method": system.name,
        "label": system.label,
        "settings": settings,
        "budget": budget,
        **means,
        "standard_error": round(float(right.std() / len(right) ** 0.5), 4),
        "problems": records[0]["job"]["problems"],
        "seeds": [record["job"]["seed"] for record in records],
        "records": records,
    }


def paired_difference(a: dict[str, Any], b: dict[str, Any], name: str = "right") -> tuple[float, float]:
    """Mean difference of two rows on the same problems and its standard error, in points."""
    difference = np.concatenate(
        [
            solved_bits(x, name).astype(float) - solved_bits(y, name)
            for x, y in zip(a["records"], b["records"], strict=True)
        ]
    )
    return 100 * float(difference.mean()), 100 * float(difference.std() / len(difference) ** 0.5)


def compare_all(runner: Runner, args: Namespace) -> None:
    """Measure every system (or `args.systems`), print the table, write `comparison.json` and the plots."""
    unknown = sorted(set(args.systems or ()) - set(SYSTEMS))
    if unknown:
        raise ValueError(f"`systems`: {unknown[0]!r} is none of {', '.join(SYSTEMS)}.")
    systems = [system for name, system in SYSTEMS.items() if name in (args.systems or SYSTEMS)]
    for system in systems:
        require(system.model)
    rows = measure(runner, systems, args.problems, args.seeds, args.validation_problems)
    costs = system_costs(runner, [SYSTEMS["plain"], *(s for s in systems if s.name != "plain")])
    for row in rows:
        row["compute"] = round(row["forward_passes"] * costs[row["method"]], 3)
    print_rows(rows, "All systems on the demo model", args)
    save(rows, args.output_dir / "comparison.json")
    labels = {system.name: system.label for system in systems}
    for x in ("forward_passes", "compute"):
        plot_curves(rows, args.output_dir / f"comparison_{x}", x=x, title=_setup(args), labels=labels)
    print(f"Wrote comparison.json and comparison_{{forward_passes,compute}}.{{png,svg}} in {args.output_dir}.")


def _setup(args: Namespace) -> str:
    return f"{args.problems} held-back problems for each of {len(args.seeds)} seeds; bars: standard error"


def print_rows(rows: list[dict[str, Any]], title: str, args: Namespace) -> None:
    """A Markdown table."""
    print(f"\n{title} ({_setup(args).partition(';')[0]}; ± one standard error)\n")
    print("| system | settings | accuracy (%) | whole reasoning (%) | passes | compute | remasks |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        compute = f"{row['compute']:.1f}" if "compute" in row else ""
        print(
            f"| {row['label']} | {_short(row['settings'])} | {100 * row['accuracy']:.1f} ± "
            f"{100 * row['standard_error']:.1f} | {100 * row['reasoning_accuracy']:.1f} | {row['forward_passes']:.1f} "
            f"| {compute} | {row['remasks']:.1f} |"
        )


def _short(settings: Settings) -> str:
    """The arguments that differ between the settings of one system."""
    names = {"tokens_per_step": "k", "confidence_threshold": "confidence", "entropy_bound": "nats"}
    names |= {"remask_threshold": "τ", "remask_budget": "budget", "remdm_eta": "η"}
    names |= {"corrector_stride": "N", "corrector_steps": "S"}
    return ", ".join(f"{short} {settings[name]}" for name, short in names.items() if name in settings)


def save(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows (without the records of the journal) as a checked `comparison.json`."""
    kept = [{k: v for k, v in row.items() if k not in ("records", "label")} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    comparison([{"compute": row["forward_passes"], **row} for row in kept], path=path)
