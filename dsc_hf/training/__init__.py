"""Training of the backbone (stage 1) and of the correction head (stage 2)."""

from .artifacts import Artifacts, FutureContextAugmentation
from .collator import PromptResponseCollator
from .correction import CorrectionHeadConfig, CorrectionHeadTrainer
from .data import DataArguments, read_dataset, tokenize_prompts_and_responses
from .leave_one_out import leave_one_out_probabilities
from .sft import MaskedDiffusionConfig, MaskedDiffusionTrainer, masked_diffusion_loss

__all__ = [
    "Artifacts",
    "CorrectionHeadConfig",
    "CorrectionHeadTrainer",
    "DataArguments",
    "FutureContextAugmentation",
    "MaskedDiffusionConfig",
    "MaskedDiffusionTrainer",
    "PromptResponseCollator",
    "leave_one_out_probabilities",
    "masked_diffusion_loss",
    "read_dataset",
    "tokenize_prompts_and_responses",
]
