"""Stage 2: training the correction head on the frozen backbone (arXiv 2601.06428, eq. 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..evaluation import collect_states, detection_quality, score_states
from ..model_card import make_model_card
from ..modeling_dsc import DSCForMaskedDiffusion, correction_loss
from .artifacts import FutureContextAugmentation
from .base import DiffusionTrainer, DiffusionTrainingArguments
from .collator import IGNORE_INDEX
from .leave_one_out import leave_one_out_probabilities

Judge = Callable[[Sequence[int], Sequence[int]], Sequence[bool]]
"""Says which tokens of a response state are wrong: prompt ids and state ids to `(response length,)` of bool."""


@dataclass
class CorrectionHeadConfig(DiffusionTrainingArguments):
    """Arguments of [`CorrectionHeadTrainer`]; the artifacts' are those of [`FutureContextAugmentation`].

    Args:
        targets (`str`): `"labels"`: a token is correct if it equals the response's (the paper). `"leave_one_out"`: the
            backbone's probability of the token given all others, soft; needs no labels.
        artifacts_only (`bool`): loss only on the tokens that the model wrote (PRISM).
        wrong_weight (`float`): weight of the loss on wrong tokens, the rare class.
        detection_settings (`list[dict]` or `str`, *optional*): arguments of `generate` for the decodes whose states
            the head is evaluated on; by default plain decoding with 3 tokens a step.
        detection_prompts (`int`): how many prompts of the evaluation set are decoded for that.
    """

    targets: str = field(default="labels", metadata={"help": "labels or leave_one_out."})
    min_artifacts: int = field(default=1, metadata={"help": "Fewest artifacts in a row."})
    max_artifacts: int = field(default=8, metadata={"help": "Most artifacts in a row."})
    literal: bool = field(default=False, metadata={"help": "Choose artifacts as the paper's formula reads."})
    block_length: int | None = field(default=None, metadata={"help": "Corrupt block-wise, as decoding does."})
    block_share: float = field(default=0.5, metadata={"help": "Share of rows corrupted block-wise."})
    sample_share: float = field(default=0.5, metadata={"help": "Share of rows with sampled artifacts."})
    by_confidence: bool = field(default=False, metadata={"help": "Write the most confident artifacts."})
    artifacts_only: bool = field(default=False, metadata={"help": "Loss on artifacts only."})
    wrong_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on wrong tokens."})
    detection_settings: list[dict[str, Any]] | None = field(default=None, metadata={"help": "How to decode for it."})
    detection_prompts: int = field(default=64, metadata={"help": "Prompts decoded to measure detection."})

    def __post_init__(self):
        super().__post_init__()
        if self.targets not in ("labels", "leave_one_out"):
            raise ValueError(f"`targets={self.targets!r}` must be 'labels' or 'leave_one_out'.")
        if self.wrong_weight <= 0:
            raise ValueError(f"`wrong_weight={self.wrong_weight}` must be positive.")


class CorrectionHeadTrainer(DiffusionTrainer):
    """Trains the correction head; the backbone stays bit-identical. A [`~transformers.Trainer`] in everything else.

    Rows are prompts and responses, into which artifacts are written (look-back, eq. 4.1), or states collected from
    real decoding by [`~dsc_hf.evaluation.collect_states`] (`state_ids` instead of `response_ids`; for
    `targets="leave_one_out"`). Evaluation adds `auroc` and `average_precision` of the head on states that decoding of
    evaluation prompts visits, and those of the training-free `visible` score to compare with.

    Args:
        model ([`DSCForMaskedDiffusion`]): the wrapped backbone.
        args ([`CorrectionHeadConfig`]): the arguments.
        judge (`Callable`, *optional*): says which tokens of a state are wrong, given the ids of prompt and state; by
            default those that differ from the reference response, which also counts other right wordings as wrong.
        kwargs: everything else that [`~transformers.Trainer`] takes.
    """

    args: CorrectionHeadConfig

    def __init__(
        self, model: DSCForMaskedDiffusion, args: CorrectionHeadConfig, judge: Judge | None = None, **kwargs: Any
    ):
        if not isinstance(model, DSCForMaskedDiffusion):
            raise ValueError(f"`model` is a {type(model).__name__}; wrap it by `DSCForMaskedDiffusion.from_backbone`.")
        super().__init__(model=model, args=args, **kwargs)
        self.judge = judge
        self.artifacts = FutureContextAugmentation(
            mask_token_id=model.config.mask_token_id,
            min_artifacts=args.min_artifacts,
            max_artifacts=args.max_artifacts,
            literal=args.literal,
            block_length=args.block_length,
            block_share=args.block_share,
            sample_share=args.sample_share,
            by_confidence=args.by_confidence,
            eps=args.eps,
            stratified=args.stratified_times,
        )
        self._detection: tuple[Dataset, list[np.ndarray]] | None = None

    def train(self, *args: Any, **kwargs: Any):
        """Train; the head counts as trained from now on."""
        self.model.config.head_trained = True
        return super().train(*args, **kwargs)

    def corrupt(self, inputs, generator):
        """Write artifacts into clean rows, or take states as they are, and make the targets."""
        model: DSCForMaskedDiffusion = self.accelerator.unwrap_model(self.model)
        attention_mask, labels = inputs["attention_mask"], inputs["labels"]
        response = labels != IGNORE_INDEX
        if self.args.targets == "leave_one_out" and "is_state" in inputs:
            ids = inputs["input_ids"]
            counted = response & (ids != model.config.mask_token_id)
        else:
            made = self.artifacts(
                inputs["input_ids"],
                response,
                lambda ids, places: model.read(ids, attention_mask, places=places)[0],
                generator,
            )
            ids, targets, counted = made.ids, made.correct.float(), made.counted
            if self.args.artifacts_only:
                counted = made.written
        if self.args.targets == "leave_one_out":
            targets = leave_one_out_probabilities(model, ids, response, attention_mask)
        return {"input_ids": ids, "attention_mask": attention_mask, "targets": targets, "counted": counted}

    def loss_sum(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]):
        """Eq. 4.1 over one batch."""
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_error_logits=True,
            output_logits=False,
        )
        targets = inputs["targets"]
        weights = inputs["counted"] * (targets + self.args.wrong_weight * (1 - targets))
        return correction_loss(outputs.error_logits, targets, weights), outputs

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The loss, and detection quality on decoding states."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        detection = {f"{metric_key_prefix}_{k}": v for k, v in self.detection(rows).items()}
        self.log(detection)
        return {**metrics, **detection}

    def detection(self, rows: Dataset) -> dict[str, float]:
        """AUROC and average precision of the head and of the `visible` score on states of real decoding.

        Args:
            rows (`datasets.Dataset`): `prompt_ids` and, without a judge, `response_ids`.
        """
        model: DSCForMaskedDiffusion = self.accelerator.unwrap_model(self.model)
        model.eval()
        if self._detection is None:
            self._detection = self._collect(model, rows)
        states, wrong = self._detection
        scores = score_states(model, states, ["head", "visible"], self.args.per_device_eval_batch_size)
        result = {}
        for name, prefix in (("head", ""), ("visible", "visible_")):
            values = np.concatenate(scores[name])
            seen = ~np.isnan(values)
            quality = detection_quality(values[seen], np.concatenate(wrong)[seen])
            result |= {f"{prefix}{key}": value for key, value in quality.items() if key != "error_rate" or not prefix}
        return result

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card of the model ([`make_model_card`]) to `output_dir`. Arguments are those of
        [`~transformers.Trainer`]; what the card has no place for is not used."""
        card = make_model_card(
            self.accelerator.unwrap_model(self.model),
            self.hub_model_id or model_name,
            remote_code=True,
            language=language,
            license=license,
            tags=tags or (),
            datasets=dataset_tags or (),
            training_data=dataset if isinstance(dataset, str) else ", ".join(dataset or ()) or None,
        )
        card.save(Path(self.args.output_dir) / "README.md")

    def _collect(self, model: DSCForMaskedDiffusion, rows: Dataset) -> tuple[Dataset, list[np.ndarray]]:
        """States of decoding evaluation prompts, and which of their tokens are wrong."""
        rows = rows.select(range(min(self.args.detection_prompts, len(rows))))
        settings = self.args.detection_settings or [{"tokens_per_step": 3, "remasking_score": "none"}]
        if isinstance(settings, dict):
            settings = [settings]
        batch_size = self.args.per_device_eval_batch_size
        states = collect_states(model, rows["prompt_ids"], settings, 4, batch_size, self.args.seed, progress=False)
        wrong = []
        eos = self.processing_class.eos_token_id if self.processing_class else model.config.eos_token_id
        for state in states:
            if self.judge is not None:
                wrong.append(np.asarray(self.judge(state["prompt_ids"], state["state_ids"]), dtype=bool))
                continue
            if "response_ids" not in rows.column_names:
                raise ValueError(
                    "`eval_dataset` has no `response_ids` to compare decoding states with; give `judge=`, or turn "
                    "evaluation off."
                )
            reference = np.full(len(state["state_ids"]), eos)
            response = rows[state["prompt_index"]]["response_ids"][: len(reference)]
            reference[: len(response)] = response
            wrong.append(reference != np.asarray(state["state_ids"]))
        return states, wrong
