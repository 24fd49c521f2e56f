"""Which written tokens to take back: how wrong they look (scores) and which of the worst go (selection)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .unmasking import rank


@dataclass
class Reading:
    """What one forward tells about the sequence, for scores to use. All tensors `(B, L)`; each score needs one.

    Args:
        error_logits (`torch.Tensor`): the head's logits for *correct*.
        visible_probability (`torch.Tensor`): the backbone's probability of the token that stands there.
        left_out_probability (`torch.Tensor`): its probability given all other tokens.
        written_probability (`torch.Tensor`): its probability when it was written.
        generator (`torch.Generator`, *optional*): source of randomness.
    """

    error_logits: torch.Tensor | None = None
    visible_probability: torch.Tensor | None = None
    left_out_probability: torch.Tensor | None = None
    written_probability: torch.Tensor | None = None
    generator: torch.Generator | None = None


def head_score(reading: Reading) -> torch.Tensor:
    """The correction head: `P_error = sigmoid(-logit)` (arXiv 2601.06428, section 4)."""
    return torch.sigmoid(-reading.error_logits)


def visible_score(reading: Reading) -> torch.Tensor:
    """One minus the backbone's probability of the visible token in this very forward; needs no training."""
    return 1 - reading.visible_probability


def leave_one_out_score(reading: Reading) -> torch.Tensor:
    """One minus the token's probability given all others, by shadow masks (WINO); needs no training."""
    return 1 - reading.left_out_probability


def written_score(reading: Reading) -> torch.Tensor:
    """One minus the token's probability when it was written; needs no training."""
    return 1 - reading.written_probability


def random_score(reading: Reading) -> torch.Tensor:
    """`U(0, 1)`: the control of table 7."""
    like = reading.written_probability
    return torch.rand(like.shape, generator=reading.generator, device=like.device)


SCORES: dict[str, Callable[[Reading], torch.Tensor]] = {
    "head": head_score,
    "visible": visible_score,
    "leave_one_out": leave_one_out_score,
    "written": written_score,
    "random": random_score,
}
"""All remasking scores by name: `Reading -> error probability` `(B, L)`."""


NEEDS = {"head": "head", "visible": "visible", "leave_one_out": "left_out"}
"""What a score needs of a forward, beside the predictions at masks."""


@dataclass
class RemaskState:
    """What the selection remembers of each row.

    Args:
        remasks (`torch.LongTensor`): `(B, L)`, how often each position was taken back.
        block_remasks (`torch.LongTensor`): `(B,)`, how many in the current block.
        stamps (`torch.LongTensor`): `(B, L)`, the running number of each position's last remask in this block, from
            1; 0 if there was none. The FIFO buffer of the last `B` remasked positions is `stamps > block_remasks - B`.
    """

    remasks: torch.Tensor
    block_remasks: torch.Tensor
    stamps: torch.Tensor

    @classmethod
    def empty(cls, like: torch.Tensor) -> RemaskState:
        """A state without remasks for ids `(B, L)`."""
        return cls(torch.zeros_like(like), torch.zeros_like(like[:, 0]), torch.zeros_like(like))

    def begin_block(self, rows: torch.Tensor) -> None:
        """Clear the buffer and the count of rows `(B,)` that enter a new block."""
        self.block_remasks = self.block_remasks.masked_fill(rows, 0)
        self.stamps = self.stamps.masked_fill(rows[:, None], 0)

    def select_rows(self, rows: torch.Tensor) -> RemaskState:
        """The state of some rows only."""
        return RemaskState(self.remasks[rows], self.block_remasks[rows], self.stamps[rows])


@dataclass
class ThresholdSelection:
    """The selection of algorithm 1: the top `K` by error probability above `tau`, unless recently taken back.

    Args:
        threshold (`float`): `tau`; 1 or more never fires.
        top_k (`int`, *optional*): `K`, at most so many a step; None for no limit.
        buffer_size (`int`): `B`, positions among the last `B` remasked ones of this block are left alone.
        max_per_position (`int`, *optional*): how often one position may be taken back at all.
        max_per_block (`int`): how many remasks a block may have; ends every decode.
        strict (`bool`): take the top `K` first and filter then, as algorithm 1 is printed: positions in the buffer
            waste a slot.
    """

    threshold: float
    top_k: int | None
    buffer_size: int
    max_per_position: int | None
    max_per_block: int
    strict: bool = False

    def __call__(self, scores: torch.Tensor, candidates: torch.Tensor, state: RemaskState) -> torch.Tensor:
        """Choose positions to take back and note them in `state`.

        Args:
            scores (`torch.Tensor`): `(B, L)`, error probabilities.
            candidates (`torch.BoolTensor`): `(B, L)`, tokens that may be judged.
            state ([`RemaskState`]): updated in place.

        Returns:
            `torch.BoolTensor`: `(B, L)`.
        """
        slots = candidates.shape[1] if self.top_k is None else self.top_k
        blocked = (state.stamps > 0) & (state.stamps > state.block_remasks[:, None] - self.buffer_size)
        allowed = candidates & (scores > self.threshold) & ~blocked
        if self.max_per_position is not None:
            allowed &= state.remasks < self.max_per_position
        if self.strict:
            allowed &= rank(scores, candidates) < slots
        places = rank(scores, allowed)
        left = (self.max_per_block - state.block_remasks).clamp(max=slots)[:, None]
        chosen = allowed & (places < left)
        state.stamps = torch.where(chosen, state.block_remasks[:, None] + places + 1, state.stamps)
        state.block_remasks = state.block_remasks + chosen.sum(1)
        state.remasks = state.remasks + chosen
        return chosen
