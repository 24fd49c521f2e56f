"""A backbone's fingerprint: a head works on the backbone it was trained on, and is not put on another unnoticed."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import nn

SAMPLED_NUMBERS = 64


def backbone_fingerprint(backbone: nn.Module) -> dict[str, Any]:
    """Number of parameters, and hashes of shape and some numbers of one weight of each kind, at different depths.

    The numbers are rounded to bfloat16, so that the fingerprint is that of the checkpoint, whether it was loaded in
    fp32 or bf16. Adapters don't count.

    Returns:
        `dict`: `parameters` (int), `dtype` (str) and `samples`, the name of each sampled weight to its hash.
    """
    weights = _own_parameters(backbone)
    kinds: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if _is_readable(weight):
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    sampled = [names[i % len(names)] for i, names in enumerate(kinds.values())]
    return {
        "parameters": sum(weight.numel() for weight in weights.values()),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "samples": {name: _hash(weights[name]) for name in sampled},
    }


def refuse_other_backbone(backbone: nn.Module, fingerprint: dict[str, Any]) -> None:
    """Raise a `ValueError` if a backbone is not the one that a fingerprint was taken of.

    Quantised weights and those on no device can't be compared and are left out; fp16 rounds too differently from
    bfloat16 to be compared with another precision.
    """
    weights = _own_parameters(backbone)
    count = sum(weight.numel() for weight in weights.values())
    quantised = getattr(backbone, "is_quantized", False)
    differences = []
    if count != fingerprint["parameters"] and not quantised:
        differences.append(f"it has {count:,} parameters, not {fingerprint['parameters']:,}")
    dtypes = {str(backbone.dtype).removeprefix("torch."), fingerprint["dtype"]}
    if "float16" not in dtypes or len(dtypes) == 1:
        changed = [
            name
            for name, value in fingerprint["samples"].items()
            if name in weights and _is_readable(weights[name]) and _hash(weights[name]) != value
        ]
        if changed:
            differences.append(
                f"{len(changed)} of {len(fingerprint['samples'])} sampled weights differ ({changed[0]})"
            )
    if differences:
        raise ValueError(
            f"This is another backbone than the head was trained on: {' and '.join(differences)}. Load the original "
            "(`base_model_name_or_path` and `base_model_revision` in the head's config). For an experiment with a "
            "relative of it, load the head's config, set `backbone_fingerprint=None` in it, and pass it as `config=`."
        )


def _own_parameters(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters without those of adapters, under the names that they have without adapters."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in backbone.named_parameters()
        if "lora_" not in name and ".modules_to_save." not in name
    }


def _is_readable(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() and weight.device.type != "meta"


def _hash(weight: torch.Tensor) -> str:
    flat = weight.detach().flatten()
    places = torch.linspace(0, len(flat) - 1, min(SAMPLED_NUMBERS, len(flat)), dtype=torch.float64).long()
    numbers = flat[places.to(flat.device)].cpu().to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    return hashlib.sha256(str(tuple(weight.shape)).encode() + numbers).hexdigest()[:12]


__all__ = ["backbone_fingerprint", "refuse_other_backbone"]
