"""What a diagnosis found, as data and as Markdown."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

TRUTHS = {
    "judge": "the judge, on states of real decoding",
    "references": "the references, with the model's own look-back artifacts in them: these states are not from free "
    "decoding, and another right wording counts as wrong",
    "leave_one_out": "a stand-in, on states of real decoding: a token counts as wrong if the model gives it a "
    "probability below 0.5 given all others. Give a judge or references to learn what is wrong",
}


@dataclass
class ScoreDiagnosis:
    """One score; None where it was not measured, NaN where no token was wrong, or all were.

    Args:
        score (`str`): its name.
        auroc (`float`), average_precision (`float`): of error probabilities against wrong tokens; with their standard
            errors `auroc_error`, `average_precision_error`, by a bootstrap over prompts.
        calibration_error (`float`): see [`~dsc_hf.evaluation.detection.calibration_error`].
        cost (`float`): time of a forward pass with this score over that of plain decoding.
        extra_positions (`float`): tokens that go through the backbone beside those of plain decoding, in a pass.
        missing (`str`): why there is nothing.
    """

    score: str
    auroc: float | None = None
    auroc_error: float | None = None
    average_precision: float | None = None
    average_precision_error: float | None = None
    calibration_error: float | None = None
    cost: float | None = None
    extra_positions: float | None = None
    missing: str | None = None


@dataclass
class Diagnosis:
    """What [`~dsc_hf.evaluation.diagnose`] found.

    Args:
        truth (`str`): who said what is wrong: `"judge"`, `"references"` or `"leave_one_out"`.
        rows (`list[ScoreDiagnosis]`): the scores.
        prompts (`int`), states (`int`), tokens (`int`): how many were judged.
        error_rate (`float`): share of the tokens that are wrong.
        score (`str`, *optional*): the recommended one; None if no score finds the errors.
        threshold (`float`, *optional*): the error probability above which to take back.
        precision (`float`, *optional*), recall (`float`, *optional*): at this threshold, on these states.
        settings (`dict`): what is recommended, as arguments of `generate()`.
        reason (`str`): why.
    """

    truth: str
    rows: list[ScoreDiagnosis]
    prompts: int
    states: int
    tokens: int
    error_rate: float
    score: str | None = None
    threshold: float | None = None
    precision: float | None = None
    recall: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can say it: NaN is None."""
        values = asdict(self)
        rows = [{name: _or_none(value) for name, value in row.items()} for row in values.pop("rows")]
        return {**{name: _or_none(value) for name, value in values.items()}, "rows": rows}

    def as_markdown(self) -> str:
        """The table, what could not be measured, and the recommendation."""
        lines = [
            f"{self.tokens} tokens of {self.states} states of {self.prompts} prompts, {100 * self.error_rate:.1f} % "
            f"wrong. What is wrong is said by {TRUTHS[self.truth]}.",
            "",
            "| score | AUROC | average precision | calibration error | cost of a pass | extra positions |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_line(row, self.truth) for row in self.rows if row.missing is None]
        notes = [f"- `{row.score}` is not available: {row.missing}" for row in self.rows if row.missing is not None]
        lines += ["", *notes, ""] if notes else [""]
        lines += [f"Recommended: {self.reason}", "", "```json", json.dumps(self.settings, indent=2), "```"]
        return "\n".join(lines)


def _line(row: ScoreDiagnosis, truth: str) -> str:
    """A row of the table."""
    cells = [
        f"{value:.3f} ± {error:.3f}" if value is not None else "(the truth)" if row.score == truth else ""
        for value, error in ((row.auroc, row.auroc_error), (row.average_precision, row.average_precision_error))
    ]
    cells.append("" if row.calibration_error is None else f"{row.calibration_error:.3f}")
    cells.append("" if row.cost is None else f"{row.cost:.2f}")
    cells.append("" if row.extra_positions is None else f"{row.extra_positions:.1f}")
    return f"| `{row.score}` | " + " | ".join(cells) + " |"


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


__all__ = ["Diagnosis", "ScoreDiagnosis"]
