"""Backbones: which transformers model a checkpoint becomes, and the few facts about it that decoding needs.

A backbone is a checkpoint of a known family ([`families`]), a stock `AutoModelForMaskedLM`, or a stock causal class
whose config says `is_causal=False`; others run their own code, if the user says so. Everything that would make it
compute something else than its authors trained is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils.hub import resolve_revision

from .backbone_forward import position_offset
from .backbone_parts import embedding_count
from .families import FAMILIES, Family, find_family
from .hub_errors import lost_connection, unreadable
from .remote_backbones import load_remote_backbone

LOCATION_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


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
    pretrained_model_name_or_path: str,
    config: PreTrainedConfig | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a backbone, strictly: a checkpoint with missing, misfitting or unknown weights is refused.

    Args:
        pretrained_model_name_or_path (`str`): a folder or a Hub id.
        config (`PreTrainedConfig`, *optional*): instead of the checkpoint's own.
        trust_remote_code (`bool`): run the checkpoint's own code, for what is no known family and no stock class.
        kwargs: passed to the Auto class's `from_pretrained` (`revision`, `dtype`, `device_map`, `token`, ...).

    Returns:
        `PreTrainedModel`: frozen, in eval mode. Its config says `mask_token_id`, `logits_shift` and
        `attention_block_length`, where they are known.

    Raises:
        `ValueError`: there is no such checkpoint, it is corrupt, weights are missing, or it is no usable class.
    """
    name, family = pretrained_model_name_or_path, None
    with readable_errors("backbone", name):
        if config is None:
            raw, _ = PreTrainedConfig.get_config_dict(
                name, **{k: kwargs[k] for k in LOCATION_ARGUMENTS if k in kwargs}
            )
            family = find_family(raw)
            if family is not None:
                config = _family_config(name, family, raw)
            elif "auto_map" in raw and (trust_remote_code or raw.get("model_type") not in CONFIG_MAPPING):
                return freeze(load_remote_backbone(name, trust_remote_code, **kwargs))
            else:
                config = _stock_config(name, raw, kwargs)
        model, info = auto_class_of(config).from_pretrained(
            name,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            key_mapping=None if family is None else family.key_mapping,
            **kwargs,
        )
    refuse_incomplete(name, info)
    if family is not None:
        _refuse_unknown(name, family, info)
        if family.key_mapping is not None:  # else saving would write upstream names under a stock config
            model._weight_conversions = []
    return freeze(model)


def _raw_config(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    return PreTrainedConfig.get_config_dict(name, **{k: kwargs[k] for k in LOCATION_ARGUMENTS if k in kwargs})[0]


def _family_config(name: str, family: Family, raw: dict[str, Any]) -> PreTrainedConfig:
    try:
        config = family.config(raw)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"The {family.name} checkpoint {name!r} can't be used: {error}") from error
    stock = config.__class__.__name__.removesuffix("Config")
    config.architectures = [f"{stock}ForCausalLM"]
    return config


def _stock_config(name: str, raw: dict[str, Any], kwargs: dict[str, Any]) -> PreTrainedConfig:
    if raw.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"The backbone {name!r} has `model_type={raw.get('model_type')!r}`, which transformers does not know, and "
            f"brings no code of its own. Known families of diffusion LMs: {', '.join(f.name for f in FAMILIES)}."
        )
    return AutoConfig.from_pretrained(name, **{k: kwargs[k] for k in LOCATION_ARGUMENTS if k in kwargs})


@contextmanager
def readable_errors(what: str, name: str) -> Iterator[None]:
    """Turn what transformers, safetensors and the Hub raise while loading into a `ValueError` that says what to do."""
    try:
        yield
    except OSError as error:
        advice = "Check the path or Hub id, or pass a loaded model."
        raise unreadable(f"The {what} {name!r}", error, advice) from error
    except (RuntimeError, StrictDataclassError) as error:
        if type(error).__name__ == "OutOfMemoryError" or "meta device" in str(error):  # not the checkpoint's fault
            raise
        raise ValueError(f"The {what} {name!r} does not fit its config.json: {error}") from error
    except Exception as error:
        if lost_connection(error) and not isinstance(error, ValueError):  # else it has been told already
            raise unreadable(f"The {what} {name!r}", error, "") from error
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"The weights of the {what} {name!r} are corrupt ({error}); fetch them again.") from error


def refuse_incomplete(name: str, loading_info: dict[str, Any], ignore: tuple[str, ...] = ()) -> None:
    """Raise a `ValueError` if `from_pretrained` reported weights that are missing or have another shape."""
    mismatched = sorted(loading_info.get("mismatched_keys", ()), key=str)
    misfit = [k if isinstance(k, str) else f"{k[0]} is {tuple(k[1])}, not {tuple(k[2])}" for k in mismatched]
    found = {k if isinstance(k, str) else k[0] for k in mismatched}
    missing = sorted(k for k in loading_info.get("missing_keys", ()) if not (ignore and k.startswith(ignore)))
    missing = [k for k in missing if k not in found]
    if missing or misfit:
        raise ValueError(
            f"The checkpoint {name!r} does not hold the weights that its config.json describes: missing "
            f"{missing[:5] or 'none'} ({len(missing)}), wrong shape {misfit[:5] or 'none'} ({len(misfit)}). "
            "It would run with random weights; fetch or save it again."
        )


def _refuse_unknown(name: str, family: Family, loading_info: dict[str, Any]) -> None:
    """Raise a `ValueError` for weights that the stock class has no place for: upstream would have used them."""
    unknown = sorted(k for k in loading_info.get("unexpected_keys", ()) if not k.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise ValueError(
            f"The {family.name} checkpoint {name!r} holds weights that its config.json does not speak of: "
            f"{unknown[:5]} ({len(unknown)}). Without them it would give wrong logits; it is another model."
        )


def without_peft_wrapper(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, adapters injected as they are; anything else as it is.

    Raises:
        `ValueError`: the adapter works on prompts or hidden states outside the model's own layers.
    """
    if not (hasattr(model, "get_base_model") and hasattr(model, "peft_config")):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError("The backbone has a prompt-learning adapter; only adapters of its layers (LoRA) can be used.")
    base = model.get_base_model()
    base.peft_config, base._hf_peft_config_loaded = model.peft_config, True
    return base


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model in eval mode and turn off its gradients."""
    return model.requires_grad_(False).eval()


def mask_token_id_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """The mask token's id, from the config or the tokenizer, checked against the embeddings.

    Raises:
        `ValueError`: nothing names one, they disagree, or the model has no embedding for it.
    """
    token = getattr(model.config, "mask_token", None)
    found = {
        "the config's `mask_token_id`": getattr(model.config, "mask_token_id", None),
        "the tokenizer's `mask_token_id`": getattr(tokenizer, "mask_token_id", None),
        f"the family's token {token!r} in the tokenizer": _id_of(token, tokenizer),
    }
    found = {source: token_id for source, token_id in found.items() if token_id is not None}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{source} is {token_id}" for source, token_id in found.items())
        raise ValueError(f"{said}: pass `mask_token_id=` the one that the backbone was trained with.")
    if not found:
        hint = "" if token is None else f" (the family's is {token!r}, which its tokenizer has)"
        raise ValueError(
            "`mask_token_id` is in neither the backbone's config nor its tokenizer; pass `mask_token_id=` or set it "
            f"in the config{hint}."
        )
    return check_token_id(model, "mask_token_id", next(iter(found.values())))


def _id_of(token: str | None, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    return None if token is None or tokenizer is None else tokenizer.get_vocab().get(token)


def token_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """Special tokens and the number of real tokens, as fields of [`DSCConfig`].

    EOS is every token that ends a response: those that tokenizer, generation config and config name, and the family's
    end of turn. Embeddings may be padded beyond the tokenizer: ids from `token_count` on are never written.
    """
    sources = (tokenizer, getattr(model, "generation_config", None), model.config)

    def values(name: str) -> list[int]:
        found = [getattr(source, name, None) for source in sources]
        return [i for value in found if value is not None for i in (value if isinstance(value, list) else [value])]

    ends = [_id_of(token, tokenizer) for token in getattr(model.config, "end_tokens", None) or ()]
    eos = list(dict.fromkeys([*values("eos_token_id"), *(i for i in ends if i is not None)]))
    counts = [None if tokenizer is None else len(tokenizer), getattr(model.config, "token_count", None)]
    return {
        "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
        "pad_token_id": next(iter(values("pad_token_id")), None),
        "bos_token_id": next(iter(values("bos_token_id")), None),
        "token_count": min((count for count in counts if count is not None), default=None),
    }


def pinned_revision(name: str, revision: str | None = None, **kwargs: Any) -> str | None:
    """The commit that a revision of a Hub repository is now, so that a head can name its backbone exactly; the
    revision as it is where there is none to ask (a folder, no connection)."""
    where = {k: kwargs[k] for k in ("cache_dir", "local_files_only", "token") if k in kwargs}
    found = resolve_revision(name, revision=revision, **where)
    return getattr(found, "resolved", found)


def check_token_id(model: PreTrainedModel, name: str, token_id: int) -> int:
    """Return a token id that the model has an embedding for, or raise a `ValueError` that names it."""
    size = embedding_count(model)
    if not 0 <= token_id < size:
        raise ValueError(f"`{name}={token_id}` is outside the backbone's {size} embeddings.")
    return token_id


def find_tokenizer(name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a backbone, or None if there is none. Dream's own class, which is remote code, is a copy of
    Qwen2's, which is taken instead."""
    kwargs.setdefault("trust_remote_code", False)  # else transformers asks on the terminal
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" not in str(error) or _raw_config(name_or_path, kwargs).get("model_type") != "Dream":
            return None
    return Qwen2Tokenizer.from_pretrained(name_or_path, **kwargs)


def max_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a sequence may have, or None if nothing says."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else limit - position_offset(model)
