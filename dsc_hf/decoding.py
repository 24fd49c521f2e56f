"""The decode loop: unmask, score, take back, block by block (arXiv 2601.06428, algorithm 1).

Rows are independent: each has its own current block and step counter, goes on as soon as its block is done, and leaves
the batch when it is finished. Nothing here knows prompts or text: a *canvas* has positions to fill, in blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad
from transformers import LogitsProcessorList

from .remasking import SCORES, Reading, RemaskState, ThresholdSelection
from .unmasking import FixedUnmasking


@dataclass
class DecodingStep:
    """One step of the decode, for all rows of the batch, on the CPU. Tensors `(B, L)`, `active` `(B,)`.

    Args:
        sequences (`torch.LongTensor`): the ids after the step.
        unmasked (`torch.BoolTensor`): positions that were filled.
        remasked (`torch.BoolTensor`): positions that were taken back.
        scored (`torch.BoolTensor`): positions that were judged.
        active (`torch.BoolTensor`): rows that took part.
    """

    sequences: torch.Tensor
    unmasked: torch.Tensor
    remasked: torch.Tensor
    scored: torch.Tensor
    active: torch.Tensor


@dataclass
class Canvas:
    """The state of a batch of decodes, one row each; device tensors unless said.

    Args:
        ids (`torch.LongTensor`): `(B, L)`.
        blocks (`torch.LongTensor`): `(B, L)`, the block of each position to fill, from 0; -1 for all others.
        attention_mask (`torch.LongTensor`), position_ids (`torch.LongTensor`): `(B, L)`.
    """

    ids: torch.Tensor
    blocks: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor = field(init=False)  # (B,) CPU: row in the caller's batch
    current: torch.Tensor = field(init=False)  # (B,) CPU: block that is worked on
    step: torch.Tensor = field(init=False)  # (B,) CPU: steps done in this block
    verification: torch.Tensor = field(init=False)  # (B,) CPU: of this block: 0 not yet, 1 in this step, 2 done
    written: torch.Tensor = field(init=False)  # (B, L): probability of each token when it was written
    errors: torch.Tensor = field(init=False)  # (B, L): error probability when last judged, NaN before
    state: RemaskState = field(init=False)
    forward_passes: torch.Tensor = field(init=False)  # (B,) CPU

    def __post_init__(self):
        batch = len(self.ids)
        self.rows = torch.arange(batch)
        for name in ("current", "step", "verification", "forward_passes"):
            setattr(self, name, torch.zeros(batch, dtype=torch.long))
        self.written = torch.ones(self.ids.shape, device=self.ids.device)
        self.errors = torch.full_like(self.written, torch.nan)
        self.state = RemaskState.empty(self.ids)

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows (`(B,)` CPU indices)."""
        for name in ("rows", "current", "step", "verification", "forward_passes"):
            setattr(self, name, getattr(self, name)[rows])
        rows = rows.to(self.ids.device)
        for name in ("ids", "blocks", "attention_mask", "position_ids", "written", "errors"):
            setattr(self, name, getattr(self, name)[rows])
        self.state = self.state.select_rows(rows)


@dataclass
class DecodingOptions:
    """What a decode does; see [`DSCGenerationConfig`] for the meaning of each."""

    mask_token_id: int
    token_count: int | None
    unmasking: FixedUnmasking
    score: str
    selection: ThresholdSelection
    stride: int
    scope: str
    rescore: bool
    verify_block: bool
    sample: bool
    logits_processor: LogitsProcessorList
    generator: torch.Generator | None
    history: list[DecodingStep] | None

    @property
    def remasks(self) -> bool:
        return self.score != "none" and self.selection.threshold < 1 and self.selection.top_k != 0


@dataclass
class Prediction:
    """What the backbone says in one forward; tensors `(B, L)`, zero outside the columns that were asked for.

    Args:
        tokens (`torch.LongTensor`): the predicted token.
        confidence (`torch.Tensor`): its probability; NaN where no token can be chosen.
        visible (`torch.Tensor`): the probability of the token that stands there.
        error_logits (`torch.Tensor`, *optional*): the head's logits for *correct*.
    """

    tokens: torch.Tensor
    confidence: torch.Tensor
    visible: torch.Tensor
    error_logits: torch.Tensor | None


def predict(model, canvas: Canvas, options: DecodingOptions, columns: slice, with_head: bool) -> Prediction:
    """One backbone forward on the canvas, and the head on top if asked.

    The confidence of a token is the backbone's own probability of it (mask and padding ids excluded), before any
    logits processor; the processors see one row for each position.
    """
    inputs = (canvas.attention_mask, canvas.position_ids)
    raw, hidden_states = model.read(canvas.ids, *inputs)
    error_logits = model.score(canvas.ids, raw, hidden_states, *inputs) if with_head else None
    ids, logits = canvas.ids[:, columns], raw[:, columns].float()
    _ban(logits, options)
    log_z = logits.logsumexp(-1)
    scores = logits
    if options.logits_processor:
        width = ids.shape[1]
        flat = options.logits_processor(canvas.ids.repeat_interleave(width, 0), logits.flatten(0, 1).clone())
        scores = _ban(flat.view_as(logits), options)
    best, tokens = scores.max(-1)
    if options.sample:  # argmax of p / Exp(1) is a draw from p
        noise = torch.empty_like(scores).exponential_(generator=options.generator)
        tokens = (scores - noise.log()).argmax(-1)

    def probability(of: torch.Tensor) -> torch.Tensor:
        return (logits.gather(-1, of[..., None])[..., 0] - log_z).exp()

    confidence = probability(tokens).masked_fill(~(best > -torch.inf), torch.nan)
    room = (columns.start, canvas.ids.shape[1] - columns.stop)
    return Prediction(pad(tokens, room), pad(confidence, room), pad(probability(ids), room), error_logits)


def _ban(logits: torch.Tensor, options: DecodingOptions) -> torch.Tensor:
    """Give no chance to the mask token and to ids that are no tokens, in place."""
    logits[..., options.mask_token_id] = -torch.inf
    if options.token_count is not None:
        logits[..., options.token_count :] = -torch.inf
    return logits


def judge(prediction: Prediction, written: torch.Tensor, options: DecodingOptions) -> torch.Tensor:
    """Error probabilities `(B, L)` by the chosen score."""
    reading = Reading(prediction.error_logits, prediction.visible, written, options.generator)
    return SCORES[options.score](reading)


def decode(
    model,
    canvas: Canvas,
    options: DecodingOptions,
    finish: Callable[[Canvas, torch.Tensor], torch.Tensor],
    on_step: Callable[[Canvas], None] | None = None,
) -> None:
    """Fill the canvas; finished rows are handed to `finish` in the rows' own order of completion.

    Until no row is left:

    1. Read: one backbone forward on all rows, which also gives the tapped states for the head.
    2. Unmask: fill masks of each row's block by the unmasking policy.
    3. Take back: every `stride`-th step of a block, unless this step has just filled its last mask, judge the tokens
       that stood there *before* this step (`rescore` spends another forward and judges the updated sequence) and
       remask those that the selection picks.
    4. Complete: a row whose block has no mask goes on to its next block, or, once, to a verification: one more step
       that has nothing to fill and only judges. `finish(canvas, completed)` gets the rows `(B,)` that completed a
       block and says which of them are done; these leave the batch.

    Args:
        model ([`DSCForMaskedDiffusion`]): for `read` and `score`.
        canvas ([`Canvas`]): changed in place, left without rows.
        options ([`DecodingOptions`]): what to do.
        finish (`Callable`): as above; called with the canvas before rows advance.
        on_step (`Callable`, *optional*): called after every step.

    Raises:
        `ValueError`: no token can be chosen: the logits are NaN, or every token is banned.
    """
    ends = [int(column) + 1 for column in _last_columns(canvas.blocks)]
    start = int((canvas.blocks >= 0).any(0).nonzero()[0])
    with_head = options.remasks and options.score == "head"
    while len(canvas.rows):
        columns = slice(start, ends[int(canvas.current.max())])
        device = canvas.ids.device
        current = canvas.current.to(device)[:, None]
        in_block = (canvas.blocks == current) if options.scope == "block" else canvas.blocks.ge(0)
        in_block = in_block & (canvas.blocks <= current)
        masked = (canvas.blocks >= 0) & (canvas.blocks <= current) & (canvas.ids == options.mask_token_id)

        # 1. Read
        verifying = canvas.verification == 1
        scoring = (verifying | (canvas.step % options.stride == options.stride - 1)) & options.remasks
        any_scoring = bool(scoring.any())
        ask_head = with_head and bool((verifying if options.rescore else scoring).any())
        prediction = predict(model, canvas, options, columns, ask_head)
        canvas.forward_passes += 1

        # 2. Unmask
        unmasked = options.unmasking(prediction.confidence, masked)
        canvas.ids = torch.where(unmasked, prediction.tokens, canvas.ids)
        canvas.written = torch.where(unmasked, prediction.confidence, canvas.written)
        broken = (prediction.confidence.isnan() & masked).any(1)
        unfilled = masked & ~unmasked

        # 3. Take back
        remasked = scored = torch.zeros_like(unmasked)
        if any_scoring:
            judged = scoring.to(device) & (unfilled.any(1) | verifying.to(device))
            if options.rescore:
                again = judged.cpu() & ~verifying  # a verification has already read the finished block
                if again.any():
                    prediction = predict(model, canvas, options, columns, with_head)
                    canvas.forward_passes += again
                any_scoring = bool((again | verifying).any())
        if any_scoring:
            scored = in_block & ~masked & judged[:, None]
            errors = judge(prediction, canvas.written, options)
            remasked = options.selection(errors, scored, canvas.state)
            canvas.errors = torch.where(scored, errors, canvas.errors).masked_fill(remasked, torch.nan)
            canvas.ids = canvas.ids.masked_fill(remasked, options.mask_token_id)

        # 4. Complete
        filled = ~(unfilled | remasked).any(1)
        filled, broken = torch.stack([filled, broken]).cpu()  # the step's one synchronisation
        if broken.any():
            raise ValueError(
                f"No token can be chosen for row {int(canvas.rows[broken][0])} of `input_ids`: the backbone returned "
                "NaN logits (check its weights and dtype; fp16 overflows where bf16 does not), or `suppress_tokens`, "
                "`bad_words_ids` or a `logits_processor` leave no token (allow some)."
            )
        if options.history is not None:
            _record(options.history, canvas, unmasked, remasked, scored)
        if on_step is not None:
            on_step(canvas)
        canvas.verification += verifying
        verify = filled & (canvas.verification == 0) & (options.verify_block and options.remasks)
        canvas.verification += verify
        completed = filled & ~verify
        canvas.step += 1
        if completed.any():
            _advance(canvas, completed, finish)


def _advance(canvas: Canvas, completed: torch.Tensor, finish: Callable[[Canvas, torch.Tensor], torch.Tensor]) -> None:
    """Move rows with a completed block on to their next; drop those that are done."""
    last = canvas.blocks.amax(1).cpu()
    done = completed & (finish(canvas, completed) | (canvas.current >= last))
    canvas.current += completed
    canvas.step = canvas.step.masked_fill(completed, 0)
    canvas.verification = canvas.verification.masked_fill(completed, 0)
    canvas.state.begin_block(completed.to(canvas.ids.device))
    if done.any():
        canvas.select((~done).nonzero()[:, 0])


def _last_columns(blocks: torch.Tensor) -> torch.Tensor:
    """The last column of each block over all rows, `(number of blocks,)`, never falling."""
    columns = torch.arange(blocks.shape[1], device=blocks.device)
    last = [torch.where(blocks == block, columns, 0).max() for block in range(int(blocks.max()) + 1)]
    return torch.stack(last).cummax(0).values


def _record(history: list, canvas: Canvas, unmasked, remasked, scored) -> None:
    """Append a step to the history, in the order of the caller's rows."""
    batch = history[0].active.shape[0] if history else len(canvas.rows)
    previous = history[-1].sequences if history else torch.zeros(batch, canvas.ids.shape[1], dtype=torch.long)

    def place(values: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        base = base.clone()
        base[canvas.rows] = values.cpu()
        return base

    nothing = torch.zeros(batch, canvas.ids.shape[1], dtype=torch.bool)
    active = torch.zeros(batch, dtype=torch.bool)
    active[canvas.rows] = True
    history.append(
        DecodingStep(place(canvas.ids, previous), *(place(v, nothing) for v in (unmasked, remasked, scored)), active)
    )
