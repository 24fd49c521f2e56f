"""Which masked positions to fill in a step."""

from __future__ import annotations

import torch


def rank(values: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """The rank of each candidate in its row, 0 for the highest value; equal values keep their order.

    Args:
        values (`torch.Tensor`): `(B, L)`.
        candidates (`torch.BoolTensor`): `(B, L)`; all others are ranked behind.

    Returns:
        `torch.LongTensor`: `(B, L)`.
    """
    order = values.masked_fill(~candidates, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


class FixedUnmasking:
    """Fill the `tokens_per_step` masks whose predicted tokens are most probable (algorithm 1, "unmask top k").

    Args:
        tokens_per_step (`int`): `k`.
    """

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step

    def __call__(self, confidence: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Choose positions.

        Args:
            confidence (`torch.Tensor`): `(B, L)`, probability of the predicted token.
            masked (`torch.BoolTensor`): `(B, L)`, positions that may be filled.

        Returns:
            `torch.BoolTensor`: `(B, L)`, at most `k` and, where there is a mask, at least one a row.
        """
        return masked & (rank(confidence, masked) < self.tokens_per_step)
