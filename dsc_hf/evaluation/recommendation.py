"""Which score a diagnosis recommends, with which threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..generation_config_dsc import DSCGenerationConfig
from ..remasking_selections import SELECTION_ARGUMENTS
from .detection import best_threshold
from .diagnosis_report import Diagnosis

REMASKING = {"remasking_score", "remask_selection", "remask_action", *SELECTION_ARGUMENTS}
"""Arguments of `generate()` that only say what is taken back."""
CONTROL = "random"
EFFORT = {"visible": 0, "written": 0, "head": 1, "leave_one_out": 2}
"""The scores by what they need beside the plain forward: nothing, a head, shadow masks."""


def recommend(
    diagnosis: Diagnosis,
    scores: dict[str, np.ndarray],
    drawn: dict[str, np.ndarray],
    wrong: np.ndarray,
    settings: Mapping[str, Any],
    config: DSCGenerationConfig,
) -> None:
    """Choose a score and its threshold, or none, and write them and the reason into the diagnosis; the rules are those
    of [`~dsc_hf.evaluation.diagnose`].

    Args:
        diagnosis ([`Diagnosis`]): with its rows.
        scores (`dict`): error probabilities `(N,)` of the scores to choose from.
        drawn (`dict`): average precision `(resamples,)` of each in the same draws of a bootstrap.
        wrong (`np.ndarray`): `(N,)` of bool.
        settings (`dict`): arguments of `generate()` that were given.
        config ([`DSCGenerationConfig`]): all of them.
    """
    rows = [row for row in diagnosis.rows if row.score in scores and row.score != CONTROL]
    chance = math.sqrt((len(wrong) + 1) / (12 * wrong.sum() * (~wrong).sum())) if 0 < wrong.mean() < 1 else math.nan
    able = [row for row in rows if row.auroc - 2 * max(row.auroc_error, chance) > 0.5]
    if not able:
        none = f"no token is wrong, of {len(wrong)}" if not wrong.any() else "no score finds errors here"
        diagnosis.reason = f"{none}; don't remask (no AUROC is more than two standard errors above 0.5)."
        kept = {name: value for name, value in settings.items() if name not in {*REMASKING, "remask_scope"}}
        diagnosis.settings = {**kept, "remasking_score": "none"}
        return
    cost = {row.score: max(1, row.cost or 1) for row in able}  # less is noise
    worth = {row.score: row.average_precision / cost[row.score] for row in able}
    most = max(able, key=lambda row: worth[row.score])

    def is_level(score: str) -> bool:
        """Whether it is within a standard error of the best."""
        apart = drawn[most.score] / cost[most.score] - drawn[score] / cost[score]
        apart = apart[~np.isnan(apart)]
        return worth[most.score] - worth[score] <= (apart.std(ddof=1) if len(apart) > 1 else 0)

    level = [row for row in able if is_level(row.score)]
    best = min(level, key=lambda row: (EFFORT[row.score], -worth[row.score]))
    threshold = best_threshold(scores[best.score], wrong)
    above = scores[best.score] > threshold
    diagnosis.score, diagnosis.threshold = best.score, threshold
    diagnosis.precision, diagnosis.recall = float(wrong[above].mean()), float(above[wrong].mean())
    diagnosis.settings = {
        **{name: value for name, value in settings.items() if name != "head_context" or best.score == "head"},
        "remasking_score": best.score,
        "remask_threshold": threshold,
        "remask_scope": config.remask_scope,
        "max_remasks_per_position": config.max_remasks_per_position or 1,
    }
    first = (
        f"the best average precision{' over cost' if best.cost else ''} of the scores whose AUROC is more than two "
        "standard errors above 0.5"
    )
    chosen = f", with {first}" if best is most else f": level with `{most.score}`, which has {first}, and needs less"
    diagnosis.reason = (
        f"`{best.score}`{chosen}. The threshold is the best on these states if a wrong token costs as much as ten "
        f"right ones written again: {100 * above.mean():.1f} % of the tokens lie above it, "
        f"{100 * diagnosis.precision:.0f} % of these are wrong, and {100 * diagnosis.recall:.0f} % of the wrong ones "
        "are found."
    )


__all__ = ["REMASKING", "recommend"]
