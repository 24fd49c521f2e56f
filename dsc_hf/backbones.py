"""Backbones: which transformers model a checkpoint becomes, and the few facts about it that decoding needs.

A backbone is a stock `AutoModelForMaskedLM`, or a stock causal class whose config says `is_causal=False`. Everything
that would make it compute something else than its authors trained is refused here.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from .hub_errors import lost_connection, unreadable


def _class_names(mapping) -> set[str]:
    return {name for value in mapping.values() for name in ([value] if isinstance(value, str) else value)}


def auto_class_of(config: PreTrainedConfig, class_name: str | None = None):
    """The Auto class that builds a backbone with this config.

    Args:
        config (`PreTrainedConfig`): the backbone's config.
        class_name (`str`, *optional*): name of the model class; by default the config's `architectures`.

    Returns:
        `AutoModelForMaskedLM` or `AutoModelForCausalLM`.

    Raises:
        `ValueError`: the class is neither, or is causal.
    """
    name = class_name or next(iter(config.architectures or []), None)
    if name in _class_names(MODEL_FOR_MASKED_LM_MAPPING_NAMES):
        return AutoModelForMaskedLM
    if name in _class_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if getattr(config, "is_causal", None) is False:
            return AutoModelForCausalLM
        raise ValueError(
            f"The backbone is a {name} with `is_causal={getattr(config, 'is_causal', None)}`: it attends to the left "
            "only and can't fill masks. If it was trained as a diffusion LM, set `is_causal` to false in its "
            "config.json."
        )
    raise ValueError(
        f"`architectures={config.architectures}` of the backbone's config is no stock masked LM or causal LM class of "
        "transformers; a diffusion LM in one of these classes can be used."
    )


def load_backbone(
    pretrained_model_name_or_path: str, config: PreTrainedConfig | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a stock backbone, strictly: a checkpoint with missing or misfitting weights is refused.

    Args:
        pretrained_model_name_or_path (`str`): a folder or a Hub id.
        config (`PreTrainedConfig`, *optional*): instead of the checkpoint's own.
        kwargs: passed to the Auto class's `from_pretrained` (`revision`, `dtype`, `device_map`, `token`, ...).

    Returns:
        `PreTrainedModel`: frozen, in eval mode.

    Raises:
        `ValueError`: there is no such checkpoint, it is corrupt, weights are missing, or it is no usable class.
    """
    name = pretrained_model_name_or_path
    location = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    try:
        if config is None:
            config = AutoConfig.from_pretrained(name, **{k: kwargs[k] for k in location if k in kwargs})
        auto_class = auto_class_of(config)
        model, info = auto_class.from_pretrained(
            name, config=config, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except OSError as error:
        advice = "Check the path or Hub id, or pass a loaded model."
        raise unreadable(f"The backbone {name!r}", error, advice) from error
    except RuntimeError as error:
        raise ValueError(f"The backbone {name!r} does not fit its config.json: {error}") from error
    except Exception as error:
        if lost_connection(error):
            raise unreadable(f"The backbone {name!r}", error, "") from error
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"The weights of the backbone {name!r} are corrupt ({error}); fetch them again.") from error
    refuse_incomplete(name, info)
    return freeze(model)


def refuse_incomplete(name: str, loading_info: dict[str, Any], ignore: tuple[str, ...] = ()) -> None:
    """Raise a `ValueError` if `from_pretrained` reported weights that are missing or have another shape."""
    missing = sorted(k for k in loading_info.get("missing_keys", ()) if not k.startswith(ignore) or not ignore)
    misfit = [k if isinstance(k, str) else k[0] for k in loading_info.get("mismatched_keys", ())]
    if missing or misfit:
        raise ValueError(
            f"The checkpoint {name!r} does not hold the weights that its config.json describes: missing "
            f"{missing[:5] or 'none'} ({len(missing)}), wrong shape {misfit[:5] or 'none'} ({len(misfit)}). "
            "It would run with random weights; fetch or save it again."
        )


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model in eval mode and turn off its gradients."""
    return model.requires_grad_(False).eval()


def transformer_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a model's transformer blocks.

    Raises:
        `ValueError`: no list of `num_hidden_layers` modules is found.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__} has no list of `num_hidden_layers={depth}` blocks to take states from.")


def mask_token_id_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """The mask token's id, from the config or the tokenizer, checked against the embeddings.

    Raises:
        `ValueError`: neither names one, they disagree, or the model has no embedding for it.
    """
    from_config = getattr(model.config, "mask_token_id", None)
    from_tokenizer = getattr(tokenizer, "mask_token_id", None)
    if from_config is not None and from_tokenizer is not None and from_config != from_tokenizer:
        raise ValueError(
            f"The config says `mask_token_id={from_config}` and the tokenizer {from_tokenizer}; set both to the token "
            "that the backbone was trained with."
        )
    mask_token_id = from_tokenizer if from_config is None else from_config
    if mask_token_id is None:
        raise ValueError(
            "`mask_token_id` is in neither the backbone's config nor its tokenizer; pass `mask_token_id=` or set it "
            "in the config."
        )
    return check_token_id(model, "mask_token_id", mask_token_id)


def check_token_id(model: PreTrainedModel, name: str, token_id: int) -> int:
    """Return a token id that the model has an embedding for, or raise a `ValueError` that names it."""
    size = model.get_input_embeddings().weight.shape[0]
    if not 0 <= token_id < size:
        raise ValueError(f"`{name}={token_id}` is outside the backbone's {size} embeddings.")
    return token_id


def find_tokenizer(name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a backbone, or None if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError, KeyError):
        return None


def position_offset(model: PreTrainedModel) -> int:
    """The position id of the first token: `padding_idx + 1` in the RoBERTa family, 0 elsewhere."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids") and hasattr(module, "padding_idx"):
            return module.padding_idx + 1
    return 0


def max_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a sequence may have, or None if nothing says."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else limit - position_offset(model)


def accepts_position_ids(model: PreTrainedModel) -> bool:
    """Whether the model's forward takes `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters


def align_logits(logits: torch.Tensor, shift: int) -> torch.Tensor:
    """Move logits so that position `i` predicts token `i`.

    Args:
        logits (`torch.Tensor`): `(B, L, V)`, position `i - shift` predicting token `i`.
        shift (`int`): 0 for most diffusion LMs; 1 where an autoregressive model was converted (Dream). The first
            `shift` tokens then have no prediction of their own and repeat the first logits.
    """
    if shift == 0:
        return logits
    return torch.cat([logits[:, :1].expand(-1, shift, -1), logits[:, :-shift]], dim=1)


def aligned_logits(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """One forward of a backbone (possibly wrapped for distributed training): logits `(B, L, V)`, position `i`
    predicting token `i`."""
    config = getattr(model, "module", model).config
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return align_logits(logits, getattr(config, "logits_shift", 0))
