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

or as the rivals do: PRISM on a frozen backbone,

    python examples/train_head.py --backbone org/my-diffusion-lm --dataset train.jsonl --output_dir build/prism \
        --artifacts one_step --artifacts_only --average_over artifacts --head_type mlp --head_reread false

or RemeDi's random tokens (`--artifacts uniform`). `--streaming --max_steps 2000` reads a dataset that does not fit in
memory.

All arguments of `transformers.TrainingArguments` are taken too (`--report_to`, `--bf16`, ...); several processes run
by `accelerate launch`. A run that was stopped goes on from its last checkpoint with `--resume`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_from_disk
from transformers import AutoTokenizer, HfArgumentParser, set_seed

from dsc_hf.evaluation import collect_states
from dsc_hf.training import CorrectionHeadConfig, CorrectionHeadTrainer, DataArguments, ModelArguments


@dataclass
class StateArguments:
    """The decodes that the head learns from."""

    state_prompts: int = field(
        default=0, metadata={"help": "Train on states of decoding so many prompts of the dataset, not on artifacts."}
    )
    states_per_prompt: int = field(default=8, metadata={"help": "States kept of each decode."})
    state_batch_size: int = field(default=64, metadata={"help": "Prompts decoded at once."})


def state_settings(lengths: dict[str, Any]) -> list[dict[str, Any]]:
    """Decodes of all speeds, fixed and adaptive, half of them with tokens taken back, for states like those that the
    head will judge."""
    speeds: list[dict[str, Any]] = [{"tokens_per_step": k} for k in range(1, 9)]
    speeds += [{"unmasking": "entropy_bound", "entropy_bound": nats} for nats in (0.1, 0.5, 1.0)]
    remasking = {"remasking_score": "visible", "remask_scope": "generated", "max_remasks_per_position": 2}
    plain = [{**lengths, **speed, "remasking_score": "none"} for speed in speeds]
    return plain + [{**lengths, **speed, "remask_threshold": 0.8, **remasking} for speed in speeds]


def decoding_states(
    model, rows: Dataset | IterableDataset, args: StateArguments, lengths: dict[str, Any], seed: int, where: Path
) -> Dataset:
    """Collect states, once: a resumed run reads them from disk."""
    if not where.exists():
        prompts = [row["prompt_ids"] for row in islice(rows, args.state_prompts)]
        states = collect_states(
            model, prompts, state_settings(lengths), args.states_per_prompt, args.state_batch_size, seed
        )
        aside = where.with_name(where.name + ".partial")
        states.save_to_disk(aside)
        aside.rename(where)
    return load_from_disk(where)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, StateArguments, DataArguments, CorrectionHeadConfig))
    model_args, state_args, data_args, args = parser.parse_args_into_dataclasses()
    if state_args.state_prompts and "labels" in args.target_kinds:
        parser.error("--state_prompts collects states without labels: it needs other --targets, such as leave_one_out")
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.backbone)
    collator = data_args.collator(tokenizer)
    model = model_args.load(tokenizer)
    args.check_backbone(model)
    train_dataset, eval_dataset = data_args.load(tokenizer, args.seed)
    if state_args.state_prompts:
        where = Path(args.output_dir) / "states"
        train_dataset = decoding_states(model, train_dataset, state_args, model_args.lengths(), args.seed, where)
    model_args.fill_in_detection(args)
    trainer = CorrectionHeadTrainer(
        model=model,
        args=args,
        judge=model_args.load_judge(tokenizer),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=tokenizer,
    )
    model_args.train_and_save(trainer, remasking_score="head")


if __name__ == "__main__":
    main()
