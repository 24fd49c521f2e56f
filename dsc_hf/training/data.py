"""Datasets of prompts and responses: read, tokenised, with unusable rows dropped and counted."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .collator import PromptResponseCollator

logger = logging.get_logger(__name__)


@dataclass
class DataArguments:
    """Which rows to train on and how they are laid out.

    Args:
        dataset (`str`): a JSON Lines file, or the id of a dataset on the Hub.
        dataset_config (`str`, *optional*), dataset_split (`str`): of a dataset on the Hub.
        prompt_column (`str`), response_column (`str`): the columns with the texts.
        max_length (`int`), response_length (`int`, *optional*): see [`PromptResponseCollator`].
        maskable_eos (`str`): the EOS rule: a number (the paper: 16), `all` or `random`.
        apply_chat_template (`bool`): put prompts as user messages through the tokenizer's chat template.
        eval_rows (`int`): rows held back from the end of the dataset for evaluation.
    """

    dataset: str = field(metadata={"help": "JSON Lines file, or id of a dataset on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompts."})
    response_column: str = field(default="response", metadata={"help": "Column with the responses."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of prompt, response and EOS together."})
    response_length: int | None = field(default=None, metadata={"help": "Tokens of response and EOS."})
    maskable_eos: str = field(default="16", metadata={"help": "EOS tokens that may be masked: number, all, random."})
    apply_chat_template: bool = field(default=False, metadata={"help": "Put prompts through the chat template."})
    eval_rows: int = field(default=0, metadata={"help": "Rows held back for evaluation."})

    def load(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset | None]:
        """Read and tokenise: the rows to train on, and those held back (None if `eval_rows` is 0)."""
        rows = tokenize_prompts_and_responses(
            read_dataset(self.dataset, self.dataset_config, self.dataset_split),
            tokenizer,
            self.prompt_column,
            self.response_column,
            self.max_length,
            self.response_length,
            self.apply_chat_template,
        )
        if not 0 <= self.eval_rows < len(rows):
            raise ValueError(f"`eval_rows={self.eval_rows}` must leave some of the {len(rows)} rows to train on.")
        train = len(rows) - self.eval_rows
        return rows.select(range(train)), rows.select(range(train, len(rows))) if self.eval_rows else None

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> PromptResponseCollator:
        """The collator that these arguments describe."""
        named = {"all": None, "random": "random"}
        rule = self.maskable_eos
        if rule not in named and not rule.isdecimal():
            raise ValueError(f"`maskable_eos={rule!r}` must be a number, 'all' or 'random'.")
        rule = named[rule] if rule in named else int(rule)
        return PromptResponseCollator(tokenizer, self.max_length, self.response_length, rule)


def read_dataset(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """Read a JSON Lines file, or a split of a dataset on the Hub.

    Raises:
        `ValueError`: there is no such file or dataset.
    """
    if os.path.isfile(name):
        return load_dataset("json", data_files=name, split="train")
    try:
        return load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"`dataset={name!r}` is no file and could not be read from the Hub: {error}") from error


def tokenize_prompts_and_responses(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    prompt_column: str = "prompt",
    response_column: str = "response",
    max_length: int = 1024,
    response_length: int | None = None,
    apply_chat_template: bool = False,
) -> Dataset:
    """Tokenise prompt and response rows, dropping those that can't be trained on and reporting how many.

    Args:
        dataset (`datasets.Dataset`): rows with two text columns. Other columns are kept.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's tokenizer.
        prompt_column (`str`), response_column (`str`): names of the columns.
        max_length (`int`): longest prompt and response together, with at least one EOS, in tokens.
        response_length (`int`, *optional*): longest response with its EOS, in tokens.
        apply_chat_template (`bool`): put the prompt as a user message through the tokenizer's chat template.

    Returns:
        `datasets.Dataset`: the rows that can be used, with `prompt_ids` and `response_ids` (without EOS).

    Raises:
        `ValueError`: a column is missing, or no row is left.
    """
    for argument, column in (("prompt_column", prompt_column), ("response_column", response_column)):
        if column not in dataset.column_names:
            raise ValueError(f"`{argument}={column!r}` is not a column of the dataset; it has {dataset.column_names}.")

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        """One row's ids, and whether it is empty, too long or fine."""
        prompt, response = row[prompt_column] or "", row[response_column] or ""
        if apply_chat_template:
            messages = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=not apply_chat_template).input_ids
        response_ids = tokenizer(response, add_special_tokens=False).input_ids
        longest = min(max_length - len(prompt_ids), response_length or max_length)
        state = "empty" if not response_ids or not prompt_ids else "long" if len(response_ids) >= longest else "ok"
        return {"prompt_ids": prompt_ids, "response_ids": response_ids, "_state": state}

    rows = dataset.map(tokenize, desc="Tokenising")
    states = list(rows["_state"])
    empty, too_long = states.count("empty"), states.count("long")
    if empty or too_long:
        logger.warning(
            f"Dropped {empty} rows without a prompt or response and {too_long} rows longer than the limit "
            f"(`max_length={max_length}`, `response_length={response_length}`), of {len(states)}."
        )
    kept = rows.select([i for i, state in enumerate(states) if state == "ok"]).remove_columns("_state")
    if len(kept) == 0:
        raise ValueError(
            f"`dataset` has no usable row: of {len(states)}, {empty} have no prompt or response and {too_long} are "
            f"longer than `max_length={max_length}` or `response_length={response_length}`. Raise these limits or "
            "check the columns."
        )
    return kept
