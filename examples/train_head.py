# /// script
# dependencies = ["dsc-hf[train]"]
# ///
"""Stage 2: train a correction head on a frozen diffusion LM.

By look-back artifacts on prompts and responses, as in the paper:

    python examples/train_head.py --backbone org/my-diffusion-lm --dataset train.jsonl --output_dir build/head \
        --eval_rows 200 --eval_strategy steps --eval_steps 200 --max_steps 2000 --learning_rate 2e-3

or by leave-one-out distillation on the model's own decodes, which reads the prompts only:

    python examples/train_head.py --backbone org/my-diffusion-lm --dataset train.jsonl --output_dir build/head \
        --targets leave_one_out --state_prompts 10000 --max_steps 2000 --learning_rate 2e-3

All arguments of `transformers.TrainingArguments` are taken too (`--report_to`, `--bf16`, ...); several processes run
by `accelerate launch`. A run that was stopped goes on from its last checkpoint with `--resume`.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer, HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from dsc_hf import DSCForMaskedDiffusion
from dsc_hf.evaluation import collect_states
from dsc_hf.training import CorrectionHeadConfig, CorrectionHeadTrainer, DataArguments


@dataclass
class HeadArguments:
    """The backbone, the head on it, and the decodes it learns from."""

    backbone: str = field(metadata={"help": "Folder or Hub id of the frozen diffusion LM."})
    base_name: str | None = field(
        default=None, metadata={"help": "How the head's checkpoint names the backbone, such as ../my-backbone."}
    )
    tap_layer: int = field(default=-2, metadata={"help": "Block whose output the head reads."})
    head_hidden_size: int | None = field(default=None, metadata={"help": "Width of the head."})
    head_num_layers: int = field(default=2, metadata={"help": "Transformer layers of the head."})
    head_reread: bool = field(default=True, metadata={"help": "Let the head read the visible token's probability."})
    state_prompts: int = field(
        default=0, metadata={"help": "Train on states of decoding so many prompts of the dataset, not on artifacts."}
    )
    states_per_prompt: int = field(default=8, metadata={"help": "States kept of each decode."})
    state_batch_size: int = field(default=64, metadata={"help": "Prompts decoded at once."})
    generation: str = field(
        default="{}", metadata={"help": "JSON: decoding defaults to save, such as lengths and thresholds."}
    )
    judge: str | None = field(
        default=None, metadata={"help": "FILE.py:NAME of a function(tokenizer) that returns the judge for evaluation."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})


def load_judge(reference: str, tokenizer):
    """Run `FILE.py`, call its `NAME` with the tokenizer, return the judge."""
    path, _, name = reference.partition(":")
    if not Path(path).is_file() or not name:
        raise ValueError(f"`judge={reference!r}` must be FILE.py:NAME of a function.")
    return runpy.run_path(path)[name](tokenizer)


def state_settings(lengths: dict[str, Any]) -> list[dict[str, Any]]:
    """Decodes of all speeds, half of them with tokens taken back, for states like those that the head will judge."""
    remasking = {"remasking_score": "visible", "remask_scope": "generated", "max_remasks_per_position": 2}
    plain = [{"tokens_per_step": k, "remasking_score": "none"} for k in range(1, 9)]
    corrected = [{"tokens_per_step": k, "remask_threshold": 0.8, **remasking} for k in range(1, 9)]
    return [{**lengths, **setting} for setting in plain + corrected]


def decoding_states(
    model, rows: Dataset, args: HeadArguments, lengths: dict[str, Any], seed: int, where: Path
) -> Dataset:
    """Collect states, once: a resumed run reads them from disk."""
    if not where.exists():
        prompts = rows.select(range(min(args.state_prompts, len(rows))))["prompt_ids"]
        states = collect_states(
            model, prompts, state_settings(lengths), args.states_per_prompt, args.state_batch_size, seed
        )
        aside = where.with_name(where.name + ".partial")
        states.save_to_disk(aside)
        aside.rename(where)
    return load_from_disk(where)


def main() -> None:
    parser = HfArgumentParser((HeadArguments, DataArguments, CorrectionHeadConfig))
    head_args, data_args, args = parser.parse_args_into_dataclasses()
    if head_args.state_prompts and args.targets == "labels":
        parser.error("--state_prompts collects states without labels: it needs --targets leave_one_out")
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(head_args.backbone)
    model = DSCForMaskedDiffusion.from_backbone(
        head_args.backbone,
        tokenizer=tokenizer,
        tap_layer=head_args.tap_layer,
        head_hidden_size=head_args.head_hidden_size,
        head_num_layers=head_args.head_num_layers,
        head_reread=head_args.head_reread,
    )
    model.config.base_model_name_or_path = head_args.base_name or head_args.backbone
    generation = json.loads(head_args.generation)
    train_dataset, eval_dataset = data_args.load(tokenizer)
    lengths = {k: generation[k] for k in ("max_new_tokens", "block_length") if k in generation}
    if head_args.state_prompts:
        where = Path(args.output_dir) / "states"
        train_dataset = decoding_states(model, train_dataset, head_args, lengths, args.seed, where)
    args.remove_unused_columns = False  # the collator reads prompt_ids and response_ids
    args.detection_settings = args.detection_settings or [
        {**lengths, "tokens_per_step": 3, "remasking_score": "none"},
        {
            **lengths,
            "tokens_per_step": 3,
            "remasking_score": "visible",
            "remask_threshold": 0.9,
            "remask_scope": "generated",
            "max_remasks_per_position": 1,
        },
    ]
    trainer = CorrectionHeadTrainer(
        model=model,
        args=args,
        judge=load_judge(head_args.judge, tokenizer) if head_args.judge else None,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=data_args.collator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir) if head_args.resume else None)
    model.generation_config.update(**{"remasking_score": "head", **generation})
    trainer.save_model()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
