"""Refusing to be read as a causal LM by callers that do not ask what a model is."""

from __future__ import annotations

import sys

import torch


def refuse_causal_use() -> None:
    """Raise if lm-eval's `hf` model is about to take log-likelihoods from our logits.

    It takes every `AutoModelForCausalLM` for causal: it would read the prediction of the token before, made with the
    scored token in sight. Nothing in its call says so, only who calls.

    Raises:
        `ValueError`: with what to do instead.
    """
    if "lm_eval.models.huggingface" not in sys.modules or torch.compiler.is_compiling():
        return
    frame = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if frame.f_code.co_name == "_loglikelihood_tokens" and module.startswith("lm_eval."):
            raise ValueError(
                "This task asks for log-likelihoods (`output_type: multiple_choice`, `loglikelihood` or "
                "`loglikelihood_rolling`), which lm-eval's `hf` model reads as those of a causal LM; a masked "
                "diffusion LM's logits are not. Use tasks that generate (`output_type: generate_until`)."
            )
        frame = frame.f_back


__all__ = ["refuse_causal_use"]
