"""One forward of any backbone: its attention mask in the form that it obeys, its logits aligned, its tapped states.

Three facts about a backbone are read from a config, that of the backbone or that of [`DSCForMaskedDiffusion`]:

- `logits_shift`: position `i - logits_shift` predicts token `i`; 1 where an autoregressive model was converted;
- `attention_block_length`: attention is full within blocks of so many positions and causal between them, or None;
- `padding_mask`: how padding is told to the model: `"2d"`, `"4d_additive"`, `"4d_bool"`, or `"none"` if it ignores
  every mask. Stock classes obey all but the last.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone_parts import transformer_blocks

logger = logging.get_logger(__name__)

PADDING_MASKS = ("2d", "4d_additive", "4d_bool", "none")


def run_backbone(
    backbone: PreTrainedModel,
    config: Any,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    tap_layer: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One forward of a backbone.

    Args:
        backbone (`PreTrainedModel`): possibly wrapped for distributed training.
        config: has `logits_shift`, `attention_block_length` and `padding_mask`; those that are absent are 0, None and
            `"2d"`.
        input_ids (`torch.LongTensor`): `(B, L)`.
        attention_mask (`torch.Tensor`, *optional*): `(B, L)`, 0 at padding.
        position_ids (`torch.LongTensor`, *optional*): `(B, L)`, counted from 0; by default the column.
        tap_layer (`int`, *optional*): the block whose output is wanted.

    Returns:
        `tuple`: logits `(B, L, V)`, position `i` predicting token `i`, and the states `(B, L, D)`, or None.
    """
    form = getattr(config, "padding_mask", None) or "2d"
    if form == "none" and attention_mask is not None and not attention_mask.all():
        logits, states = _by_padding(backbone, input_ids, attention_mask, position_ids, tap_layer)
    else:
        inputs = {"input_ids": input_ids}
        accepted = forward_arguments(backbone)
        if position_ids is not None and "position_ids" in accepted:
            inputs["position_ids"] = position_ids + position_offset(backbone)
        if form != "none":
            inputs["attention_mask"] = _mask(backbone, config, form, input_ids, attention_mask, position_ids)
        if "timesteps" in accepted:  # MDLM's time: it ignores the numbers, but stops without them
            inputs["timesteps"] = torch.zeros(len(input_ids), device=input_ids.device)
        logits, states = _forward(backbone, inputs, tap_layer)
    return align_logits(logits, getattr(config, "logits_shift", 0) or 0, attention_mask), states


def align_logits(logits: torch.Tensor, shift: int, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Move logits so that position `i` predicts token `i`.

    Args:
        logits (`torch.Tensor`): `(B, L, V)`, position `i - shift` predicting token `i`.
        shift (`int`): 0 or 1. The first token of a row, which none predicts, keeps its own position's logits.
        attention_mask (`torch.Tensor`, *optional*): `(B, L)`, 0 at padding, to find the first token of each row.
    """
    if shift == 0:
        return logits
    aligned = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    if attention_mask is not None:
        rows, first = torch.arange(len(logits), device=logits.device), attention_mask.long().argmax(1)
        aligned[rows, first] = logits[rows, first]
    return aligned


def aligned_logits(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Logits `(B, L, V)` of a bare backbone, position `i` predicting token `i`."""
    return run_backbone(model, getattr(model, "module", model).config, input_ids, attention_mask)[0]


def allowed_attention(
    config: Any, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
) -> torch.BoolTensor:
    """Which key (last axis) each query may see, `(B, L, L)`: no padding, and no later block.

    Blocks are counted in positions, so that a row's are the same with any padding. Every query sees itself.

    Args:
        config: as of [`run_backbone`].
        attention_mask (`torch.Tensor`): `(B, L)`, 0 at padding.
        position_ids (`torch.LongTensor`, *optional*): `(B, L)`; by default the column.
    """
    batch, length = attention_mask.shape
    columns = torch.arange(length, device=attention_mask.device)
    allowed = attention_mask.bool()[:, None].expand(batch, length, length)
    block_length = getattr(config, "attention_block_length", None)
    if block_length is not None:
        blocks = (columns[None] if position_ids is None else position_ids) // block_length
        allowed = allowed & (blocks[:, :, None] >= blocks[:, None])
    return allowed | (columns[:, None] == columns)


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(B, L, L)` bool to `(B, 1, L, L)`, 0 where allowed and the lowest number elsewhere: right under every attention
    implementation that takes masks (boolean ones are right under sdpa only)."""
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def position_offset(model: nn.Module) -> int:
    """The position id of the first token: `padding_idx + 1` where position embeddings have a place for padding (the
    RoBERTa family, ESM), what the embeddings' own list begins with (Nystromformer: 2), 0 elsewhere."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.padding_idx + 1
    for name, listed in model.named_buffers():
        if name.endswith("embeddings.position_ids") and listed.numel() and listed.device.type != "meta":
            return int(listed.flatten()[0])
    return 0


def forward_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments of a model's forward, with their defaults."""
    model = getattr(model, "module", model)
    return {name: argument.default for name, argument in inspect.signature(model.forward).parameters.items()}


def _mask(backbone, config, form, input_ids, attention_mask, position_ids) -> torch.Tensor | None:
    """The attention mask in the form that the backbone obeys."""
    if form == "2d" and getattr(config, "attention_block_length", None) is None:
        return attention_mask
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    allowed = allowed_attention(config, attention_mask, position_ids)
    if form == "4d_bool":
        return allowed[:, None]
    return additive_mask(allowed, next(backbone.parameters()).dtype)


def _forward(backbone, inputs: dict[str, Any], tap_layer: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Raw logits, and the tapped block's output by a forward hook."""
    tapped = []

    def tap(module, arguments, output):
        tapped.append(output[0] if isinstance(output, tuple) else output)

    if tap_layer is None:
        return _logits(backbone(**inputs)), None
    handle = transformer_blocks(backbone)[tap_layer].register_forward_hook(tap)
    try:
        logits = _logits(backbone(**inputs))
    finally:
        handle.remove()
    return logits, tapped[-1]


def _logits(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def _by_padding(backbone, input_ids, attention_mask, position_ids, tap_layer):
    """For a backbone that ignores masks: each group of rows with equal padding on its own, without the padding."""
    logger.warning_once(
        f"{type(backbone).__name__} obeys no padding mask: rows with different padding are run one group after the "
        "other. Batches of prompts of one length are faster."
    )
    results: list[torch.Tensor | None] = [None, None]
    masks, group = attention_mask.bool().unique(dim=0, return_inverse=True)
    for i, mask in enumerate(masks):
        rows, columns = (group == i).nonzero()[:, :1], mask.nonzero()[:, 0]
        positions = None if position_ids is None else position_ids[rows, columns]
        parts = run_backbone(
            backbone, _IgnoresMasks, input_ids[rows, columns], position_ids=positions, tap_layer=tap_layer
        )
        for j, part in enumerate(parts):
            if part is not None:
                if results[j] is None:
                    results[j] = part.new_zeros(*input_ids.shape, part.shape[-1])
                results[j][rows, columns] = part
    return results


class _IgnoresMasks:
    padding_mask = "none"


__all__ = ["align_logits", "aligned_logits", "allowed_attention", "run_backbone", "transformer_blocks"]
