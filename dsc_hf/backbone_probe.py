"""What a remote-code backbone really computes, found by running it on a few random ids before it is used.

Nothing that its code or config claims is believed: which positions see which, whether a padding mask is obeyed and in
which form, whether there are logits and hidden states at all.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone_forward import run_backbone
from .backbone_parts import embedding_count, transformer_blocks

logger = logging.get_logger(__name__)

ROWS, LENGTH, PADDING = 2, 16, 5
LONG = 128
"""Tokens of the one row that tells full attention from long blocks."""
KNOWN_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "timesteps")
LENGTH_LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "model_length")


@dataclass(frozen=True)
class BackboneProbe:
    """What was seen of a backbone.

    Args:
        padding_mask (`str`): the form of padding mask that it obeys: `"2d"`, `"4d_additive"`, `"4d_bool"` or `"none"`.
        num_layers (`int`), hidden_size (`int`): number and width of its blocks.
        vocab_size (`int`): number of logits a token.
        tensors (`int`): how many weights were found equal to the file's.
    """

    padding_mask: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    tensors: int = 0

    def __str__(self) -> str:
        return (
            f"{self.tensors} weights equal the file's, two loads give the same logits, attention is bidirectional, "
            f"padding mask {self.padding_mask!r}, {self.num_layers} blocks of width {self.hidden_size}, "
            f"{self.vocab_size} logits"
        )


def probe_ids(model: PreTrainedModel, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> torch.LongTensor:
    """Random ids `(rows, length)` that the model embeds, none of them its mask or padding, the same at every call.

    Raises:
        `ValueError`: too few ids are left.
    """
    tokens = _allowed_ids(model)
    chosen = torch.randint(len(tokens), (rows, length), generator=torch.Generator().manual_seed(seed))
    return tokens[chosen].to(model.device)


def _allowed_ids(model: PreTrainedModel) -> torch.LongTensor:
    config = model.config.get_text_config()
    special = {getattr(config, "mask_token_id", None), getattr(config, "pad_token_id", None)}
    size = min(embedding_count(model), getattr(config, "vocab_size", None) or embedding_count(model))
    tokens = torch.tensor([i for i in range(size) if i not in special])
    if len(tokens) < 2:
        raise ValueError(f"{type(model).__name__} embeds {size} ids, which leaves none to probe it with.")
    return tokens


def read_logits(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    form: str = "none",
    attention_mask: torch.LongTensor | None = None,
    position_ids: torch.LongTensor | None = None,
) -> torch.Tensor:
    """Logits `(B, L, V)` in float32 on the CPU, as decoding would get them; ids that are nowhere predicted (-inf in
    every position, as MDLM's mask token) count as 0.

    Raises:
        `ValueError`: the code stopped, or its output is no finite logits.
    """
    try:
        with torch.no_grad():
            logits, _ = run_backbone(
                model, SimpleNamespace(padding_mask=form), input_ids, attention_mask, position_ids
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"The code of {type(model).__name__} stopped in its forward on {tuple(input_ids.shape)} random ids with "
            f"{type(error).__name__}: {error}. It may be written for another version of transformers than "
            f"{transformers.__version__}: ask its authors, or install the version it was written for."
        ) from error
    shape = getattr(logits, "shape", ())
    if len(shape) != 3 or shape[:2] != input_ids.shape or not logits.is_floating_point():
        raise ValueError(
            f"{type(model).__name__} returned {tuple(shape)} {getattr(logits, 'dtype', type(logits).__name__)} for "
            f"{tuple(input_ids.shape)} ids, not floating-point logits (B, L, V)."
        )
    logits = logits.float().cpu()
    logits = logits.masked_fill((logits == -torch.inf).all(dim=(0, 1)), 0.0)
    if not logits.isfinite().all():
        raise ValueError(
            f"{int((~logits.isfinite()).sum())} of the {logits.numel()} logits that {type(model).__name__} gives for "
            "random ids are not finite. Fetch the checkpoint again, try another `dtype`, or ask its authors."
        )
    return logits


def close_enough(
    model: PreTrainedModel, logits: torch.Tensor, expected: torch.Tensor, same_inputs: bool = False
) -> bool:
    """Whether two sets of a model's logits are the same up to its rounding through many layers.

    Args:
        model (`PreTrainedModel`): that gave them.
        logits (`torch.Tensor`), expected (`torch.Tensor`): of one shape.
        same_inputs (`bool`): they come from inputs of the same shape, masks included, and so from the same kernels.
    """
    difference, spread = logits - expected, expected.std()
    if _is_coarse(model):  # single logits may be far off where attention is sharp
        return bool(difference.square().mean().sqrt() <= (0.01 if same_inputs else 0.1) * spread)
    return bool(difference.abs().max() <= (1e-5 if same_inputs else 1e-4) * spread)


def _is_coarse(model: PreTrainedModel) -> bool:
    return model.dtype not in (torch.float32, torch.float64) or getattr(model, "hf_quantizer", None) is not None


def reached_positions(
    model: PreTrainedModel, input_ids: torch.LongTensor, changed: int | slice, **inputs
) -> torch.LongTensor:
    """Positions whose logits change, beyond rounding, with the tokens at the positions `changed`."""
    other, tokens = input_ids.clone(), _allowed_ids(model)
    other[:, changed] = torch.where(other[:, changed] == tokens[0], tokens[-1], tokens[0])
    logits = read_logits(model, input_ids, **inputs)
    difference = (logits - read_logits(model, other, **inputs)).abs().amax(dim=(0, 2))
    return (difference > (0.05 if _is_coarse(model) else 1e-6) * logits.std()).nonzero()[:, 0]


def first_reached(model: PreTrainedModel, input_ids: torch.LongTensor, changed: int) -> int:
    """The first of [`reached_positions`]; L if there is none."""
    return next(iter(reached_positions(model, input_ids, changed).tolist()), input_ids.shape[1])


def refuse_causal(model: PreTrainedModel) -> None:
    """Raise a `ValueError` unless every token sees those on both sides of it."""
    config, name = model.config.get_text_config(), type(model).__name__
    limits = [limit for field in LENGTH_LIMITS if isinstance(limit := getattr(config, field, None), int)]
    for length in (LENGTH, min([LONG, *(limit for limit in limits if limit >= LENGTH)])):
        ids = probe_ids(model, 1 if length > LENGTH else ROWS, length)
        if 0 in reached_positions(model, ids, slice(length // 2, None)):
            continue
        # the last token reaches back to the start of its block; the token before that to the start of the block before
        start = first_reached(model, ids, length - 1)
        before = first_reached(model, ids, start - 1) if start else 0
        is_block = first_reached(model, ids, start) == start
        if is_block and start - before > 1:
            raise ValueError(
                f"{name} has block-causal attention: token {length - 1} changes no logits before position {start}, "
                f"token {start - 1} none before {before}, so blocks are {start - before} long. "
                "`attention_block_length` is not supported for remote code; convert the checkpoint to a stock class."
            )
        if is_block or length == LENGTH:  # else a window, which is shorter than the long row
            raise ValueError(
                f"{name} is causal: changing tokens {length // 2} to {length - 1} does not change the logits of token "
                "0. A masked diffusion LM sees both sides of a mask. If this one was trained to, its code has a switch "
                "for it: set that in config.json."
            )
    ids = probe_ids(model)
    if LENGTH - 1 not in reached_positions(model, ids, slice(0, LENGTH // 2)):
        raise ValueError(f"In {name} the last of {LENGTH} tokens does not see the first half; no language model.")


def padding_form(model: PreTrainedModel) -> str:
    """The first of the padding mask forms that the model obeys, or `"none"` with a warning.

    A form is obeyed if, with a row padded on the left, the logits of its tokens do not change with the ids of the
    padding, are those of the row without padding, and still depend on tokens to their right.
    """
    arguments = inspect.signature(model.forward).parameters.values()
    seen = {}
    if any(a.name == "attention_mask" or a.kind is a.VAR_KEYWORD for a in arguments):
        for form in ("2d", "4d_additive", "4d_bool"):
            seen[form] = _why_not(model, form)
            if seen[form] is None:
                return form
    logger.warning(
        f"{type(model).__name__} obeys no padding mask "
        f"({'; '.join(f'{form}: {why}' for form, why in seen.items()) or 'its forward takes none'}). Prompts of "
        "different lengths will be run in groups of equal length, which is slower."
    )
    return "none"


def _why_not(model: PreTrainedModel, form: str) -> str | None:
    """What is wrong with a model's logits under a form of padding mask, or None."""
    ids, attention_mask = probe_ids(model), torch.ones(ROWS, LENGTH, dtype=torch.long, device=model.device)
    positions = attention_mask.cumsum(1) - 1
    alone = [read_logits(model, ids[:1], position_ids=positions[:1])]
    alone.append(read_logits(model, ids[1:, PADDING:], position_ids=positions[1:, : LENGTH - PADDING]))
    try:
        whole = read_logits(model, ids, form, attention_mask, positions)
        attention_mask[1, :PADDING] = 0
        inputs = {"form": form, "attention_mask": attention_mask, "position_ids": attention_mask.cumsum(1) - 1}
        inputs["position_ids"].clamp_(min=0)
        padded = read_logits(model, ids, **inputs)
        other = ids.clone()
        other[1, :PADDING] = ids[0, :PADDING].flip(0)
        repadded = read_logits(model, other, **inputs)
        row = {"form": form, "attention_mask": attention_mask[1:], "position_ids": inputs["position_ids"][1:]}
        reached = reached_positions(model, ids[1:], slice((PADDING + LENGTH) // 2, None), **row)
    except ValueError as error:
        return f"stops ({str(error.__cause__ or error).splitlines()[0][:120]})"
    if not close_enough(model, whole[:1], alone[0]):
        return "changes logits where there is no padding"
    if not close_enough(model, repadded[1, PADDING:], padded[1, PADDING:], same_inputs=True):
        return "logits change with the ids of the padding"
    if PADDING not in reached:
        return "attention turns causal with padding"
    for logits, expected in zip((padded[0], padded[1, PADDING:]), alone, strict=True):
        if not close_enough(model, logits, expected[0]):
            off = (logits - expected[0]).abs().max()
            return f"logits are off by up to {off:.2g} from those without padding"
    return None


def refuse_unknown_arguments(model: PreTrainedModel) -> None:
    """Raise a `ValueError` if the forward needs arguments that only its authors could give."""
    needed = [
        a.name
        for a in inspect.signature(model.forward).parameters.values()
        if a.default is a.empty and a.kind not in (a.VAR_KEYWORD, a.VAR_POSITIONAL) and a.name not in KNOWN_ARGUMENTS
    ]
    if needed:
        raise ValueError(
            f"The forward of {type(model).__name__} requires `{needed[0]}`, which is unknown here; known are "
            f"{', '.join(KNOWN_ARGUMENTS)}. Give it a default in the checkpoint's code."
        )


def block_width(model: PreTrainedModel) -> tuple[int, int]:
    """Number and width of the blocks, each of which has to be called and to give states `(B, L, D)`.

    Raises:
        `ValueError`: a forward hook can't take hidden states from them.
    """
    blocks, seen, ids = transformer_blocks(model), {}, probe_ids(model)

    def look(block, arguments, output):
        seen[block] = output[0] if isinstance(output, tuple) else output

    handles = [block.register_forward_hook(look) for block in blocks]
    try:
        read_logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    for i, block in enumerate(blocks):
        shape = tuple(getattr(seen.get(block), "shape", ()))
        if len(shape) != 3 or shape[:2] != ids.shape:
            was = f"gave {shape or type(seen[block]).__name__}" if block in seen else "was not called"
            raise ValueError(
                f"No hidden states can be taken from {type(model).__name__}: for {tuple(ids.shape)} ids block {i} "
                f"({type(block).__name__}) {was}, not states (B, L, D)."
            )
    return len(blocks), seen[blocks[0]].shape[-1]


def probe_behaviour(model: PreTrainedModel, tensors: int = 0) -> BackboneProbe:
    """Run every check that one loaded model allows.

    Raises:
        `ValueError`: it can't be used; says what was seen.
    """
    refuse_unknown_arguments(model)
    ids = probe_ids(model)
    logits, again = read_logits(model, ids), read_logits(model, ids)
    if not close_enough(model, again, logits, same_inputs=True):
        raise ValueError(
            f"{type(model).__name__} gives other logits for the same ids at every forward, off by up to "
            f"{(again - logits).abs().max():.2g}: it draws random numbers (dropout, noise) even in eval mode. Its "
            "code has to be changed, or fetched in another revision."
        )
    num_layers, hidden_size = block_width(model)
    vocab_size, embedded = logits.shape[-1], embedding_count(model)
    if vocab_size != embedded and (vocab_size == hidden_size or vocab_size < len(_allowed_ids(model))):
        raise ValueError(
            f"{type(model).__name__} embeds {embedded} ids and returns {vocab_size} numbers a token: no logits. If "
            "its code has a class with an LM head, name that in the `auto_map` of config.json."
        )
    refuse_causal(model)
    return BackboneProbe(padding_form(model), num_layers, hidden_size, vocab_size, tensors)


__all__ = ["BackboneProbe", "probe_behaviour", "probe_ids", "read_logits"]
