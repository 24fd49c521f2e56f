"""Does a score find the wrong tokens? AUROC, average precision, calibration on visible tokens of decoding states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from sklearn.metrics import average_precision_score, roc_auc_score

from ..remasking import Reading, head_score, leave_one_out_score, visible_score
from .reliability import calibration_error
from .states import left_pad


def detection_quality(scores: np.ndarray, wrong: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """How well error probabilities find wrong tokens.

    Args:
        scores (`np.ndarray`): `(N,)`, error probabilities.
        wrong (`np.ndarray`): `(N,)` of bool.
        threshold (`float`): tokens with a higher error probability count as found.

    Returns:
        `dict`: `auroc`, `average_precision` (NaN where all tokens are right, or all wrong), `calibration_error` (see
        [`calibration_error`]), `fire_rate` (share of tokens above the threshold) and `error_rate`; all NaN of no
        tokens.
    """
    rate = float(np.mean(wrong)) if len(wrong) else float("nan")
    told_apart = 0 < rate < 1
    return {
        "auroc": float(roc_auc_score(wrong, scores)) if told_apart else float("nan"),
        "average_precision": float(average_precision_score(wrong, scores)) if told_apart else float("nan"),
        "calibration_error": calibration_error(scores, wrong),
        "fire_rate": float(np.mean(scores > threshold)) if len(wrong) else float("nan"),
        "error_rate": rate,
    }


@torch.no_grad()
def score_states(model, states: Dataset, names: Sequence[str], batch_size: int = 64) -> dict[str, list[np.ndarray]]:
    """Error probabilities of all tokens of decoding states.

    Args:
        model ([`DSCForMaskedDiffusion`]): the model.
        states (`datasets.Dataset`): from [`collect_states`].
        names (`list[str]`): scores: `head`, `visible`, `leave_one_out`; or `head_logit`, the head's score before the
            sigmoid, which keeps apart what a probability rounds to 0 or 1.
        batch_size (`int`): states read at once.

    Returns:
        `dict`: for each score a list of `(response length,)` arrays, one a state, NaN at masked positions.

    Raises:
        `ValueError`: `leave_one_out` of a backbone that takes no 4D masks or position ids.
    """
    from ..training.leave_one_out import leave_one_out_probabilities  # which imports this package

    functions = {"head": head_score, "visible": visible_score, "leave_one_out": leave_one_out_score}
    functions["head_logit"] = lambda reading: -reading.error_logits
    results: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for start in range(0, len(states), batch_size):
        batch = states[start : start + batch_size]
        rows = [p + s for p, s in zip(batch["prompt_ids"], batch["state_ids"], strict=True)]
        ids, mask = (x.to(model.device) for x in left_pad(rows, model.config.pad_token_id or 0))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits, hidden_states = model.read(ids, mask, positions)
        asked = {"head", "head_logit"} & set(names)
        error_logits = model.score(ids, logits, hidden_states, mask, positions) if asked else None
        left_out = None
        if "leave_one_out" in names:
            lengths = torch.tensor([len(state) for state in batch["state_ids"]], device=ids.device)
            response = torch.arange(ids.shape[1], 0, -1, device=ids.device) <= lengths[:, None]
            left_out = leave_one_out_probabilities(model, ids, response, mask)
        logits[..., model.config.mask_token_id] = -torch.inf
        probabilities = logits.float().softmax(-1).gather(-1, ids[..., None])[..., 0]
        reading = Reading(error_logits, probabilities, left_out)
        for name in names:
            scores = functions[name](reading).masked_fill(ids == model.config.mask_token_id, torch.nan).cpu().numpy()
            results[name] += [row[-len(state) :] for row, state in zip(scores, batch["state_ids"], strict=True)]
    return results
