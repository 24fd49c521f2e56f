"""Training of the backbone (stage 1) and of the correction head (stage 2)."""

from .collator import PromptResponseCollator
from .data import DataArguments, read_dataset, tokenize_prompts_and_responses
from .sft import MaskedDiffusionConfig, MaskedDiffusionTrainer, masked_diffusion_loss

__all__ = [
    "DataArguments",
    "MaskedDiffusionConfig",
    "MaskedDiffusionTrainer",
    "PromptResponseCollator",
    "masked_diffusion_loss",
    "read_dataset",
    "tokenize_prompts_and_responses",
]
