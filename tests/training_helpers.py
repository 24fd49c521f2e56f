"""Small datasets and trainers for the training tests."""

import torch
from conftest import make_llama, make_model, make_tokenizer
from datasets import Dataset

from dsc_hf.training import (
    CorrectionHeadConfig,
    CorrectionHeadTrainer,
    MaskedDiffusionConfig,
    MaskedDiffusionTrainer,
    PromptResponseCollator,
)


def make_rows(count: int = 24, seed: int = 0) -> Dataset:
    """Prompts of 3 to 5 letters, responses of 4 to 8."""
    generator = torch.Generator().manual_seed(seed)

    def letters(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(4, 30, (length,), generator=generator).tolist()

    return Dataset.from_list([{"prompt_ids": letters(3, 5), "response_ids": letters(4, 8)} for _ in range(count)])


def make_trainer(kind: str, output_dir, rows=None, model=None, **arguments):
    """A stage 1 (`"sft"`) or stage 2 (`"head"`) trainer on tiny models."""
    sft = kind == "sft"
    tokenizer = make_tokenizer()
    if model is None:
        model = make_llama(initializer_range=0.1) if sft else make_model()
    judge = {k: arguments.pop(k) for k in ("judge",) if k in arguments}
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    if not sft:
        defaults["detection_settings"] = [{"max_new_tokens": 8, "block_length": 4, "tokens_per_step": 2}]
    config = (MaskedDiffusionConfig if sft else CorrectionHeadConfig)(**{**defaults, **arguments})
    rows = make_rows() if rows is None else rows
    return (MaskedDiffusionTrainer if sft else CorrectionHeadTrainer)(
        model=model,
        args=config,
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        data_collator=PromptResponseCollator(tokenizer, max_length=16, maskable_eos=2),
        processing_class=tokenizer,
        **judge,
    )


def losses(trainer) -> list[float]:
    """The logged training losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}
