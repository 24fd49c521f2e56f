"""Leave-one-out probabilities of all response tokens in one forward, by shadow masks.

A mask token is appended for every response position, with that position's id. The text does not see these *shadows*;
the shadow of position `i` sees itself and all of the text but token `i`, so it predicts what should stand there
(WINO's shadow block over the whole response; see `methods.md`, section 4).
"""

from __future__ import annotations

import torch

from ..backbones import accepts_position_ids, position_offset


def leave_one_out_probabilities(
    model, input_ids: torch.Tensor, response_mask: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """The backbone's probability of each response token, given all others.

    Args:
        model ([`DSCForMaskedDiffusion`]): the wrapped backbone; it must take 4D masks and position ids.
        input_ids (`torch.LongTensor`): `(B, L)`, padded on the right or left.
        response_mask (`torch.BoolTensor`): `(B, L)`, the positions to leave out, one at a time.
        attention_mask (`torch.LongTensor`): `(B, L)`, 0 at padding.

    Returns:
        `torch.Tensor`: `(B, L)`, fp32; 0 outside the response. At masked positions, the mask token's (meaningless).

    Raises:
        `ValueError`: the backbone takes no position ids.
    """
    backbone, mask_token_id = model.backbone, model.config.mask_token_id
    if not accepts_position_ids(backbone):
        raise ValueError(
            f"`targets='leave_one_out'` needs a backbone that takes position ids and 4D masks; "
            f"{type(backbone).__name__} does not. Use `targets='labels'`."
        )
    batch, length = input_ids.shape
    width = int(response_mask.sum(1).max())
    columns = torch.arange(length, device=input_ids.device)
    # (B, W): the column each shadow stands for; rows with a shorter response repeat a padded one
    columns = torch.where(response_mask, columns, length).sort(dim=1).values[:, :width].clamp(max=length - 1)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    shadow_positions = (positions.gather(1, columns) - model.config.logits_shift).clamp(min=0)
    ids = torch.cat([input_ids, torch.full_like(columns, mask_token_id)], dim=1)

    allowed = torch.zeros(batch, length + width, length + width, dtype=torch.bool, device=ids.device)
    allowed[:, :, :length] = attention_mask.bool()[:, None]
    allowed[:, length:, :length] &= columns[:, :, None] != torch.arange(length, device=ids.device)
    allowed |= torch.eye(length + width, dtype=torch.bool, device=ids.device)  # itself, and no empty row
    dtype = next(backbone.parameters()).dtype
    mask = torch.zeros(allowed.shape, dtype=dtype, device=ids.device).masked_fill(~allowed, torch.finfo(dtype).min)
    with torch.no_grad():
        logits = (
            backbone(
                input_ids=ids,
                attention_mask=mask[:, None],
                position_ids=torch.cat([positions, shadow_positions], dim=1) + position_offset(backbone),
            )
            .logits[:, length:]
            .float()
        )
    logits[..., mask_token_id] = -torch.inf
    tokens = input_ids.gather(1, columns)
    probability = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
    result = torch.zeros(batch, length, device=ids.device).scatter(1, columns, probability)
    return result * response_mask
