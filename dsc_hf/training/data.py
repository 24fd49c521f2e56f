"""Datasets of prompts and responses: read, tokenised, with unusable rows dropped and counted."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
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
        eval_rows (`int`): rows held back for evaluation, from the end of the dataset; from its beginning if it is
            streamed.
        streaming (`bool`): read the dataset while training, for one that does not fit in memory or on disk. It has no
            length: `max_steps` must be given.
        shuffle_buffer (`int`): so many rows of a streamed dataset are read ahead and shuffled.
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
    streaming: bool = field(default=False, metadata={"help": "Read while training; needs --max_steps."})
    shuffle_buffer: int = field(default=1000, metadata={"help": "Rows of a stream that are shuffled together."})

    def __post_init__(self):
        if self.eval_rows < 0:
            raise ValueError(f"`eval_rows={self.eval_rows}` must not be negative.")
        if self.shuffle_buffer < 1:
            raise ValueError(f"`shuffle_buffer={self.shuffle_buffer}` must be at least 1.")

    def load(
        self, tokenizer: PreTrainedTokenizerBase, seed: int = 0, responses: bool = True
    ) -> tuple[Dataset | IterableDataset, Dataset | None]:
        """Read and tokenise: the rows to train on, and those held back (None if `eval_rows` is 0).

        Args:
            tokenizer (`PreTrainedTokenizerBase`): the backbone's.
            seed (`int`): of the order of streamed rows.
            responses (`bool`): whether they are needed; if not, rows have them if there is such a column.

        Raises:
            `ValueError`: a column is missing, no row can be used, or the tokenizer has no EOS token.
        """
        self.collator(tokenizer)  # its complaints come before the work
        dataset = read_dataset(self.dataset, self.dataset_config, self.dataset_split, self.streaming)
        rows = tokenize_prompts_and_responses(
            dataset,
            tokenizer,
            self.prompt_column,
            self.response_column if responses or self.response_column in columns_of(dataset) else None,
            self.max_length,
            self.response_length,
            self.apply_chat_template,
        )
        if self.streaming:
            held_back = Dataset.from_list(list(rows.take(self.eval_rows))) if self.eval_rows else None
            return rows.skip(self.eval_rows).shuffle(seed, buffer_size=self.shuffle_buffer), held_back
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


def read_dataset(
    name: str, config: str | None = None, split: str = "train", streaming: bool = False, argument: str = "dataset"
) -> Dataset | IterableDataset:
    """Read a JSON Lines file, or a split of a dataset on the Hub; open it only, if it is to be streamed. `argument` is
    what errors call the name.

    Raises:
        `ValueError`: there is no such file or dataset, or nothing in it.
    """
    if os.path.isfile(name):
        try:
            return load_dataset("json", data_files=name, split="train", streaming=streaming)
        except StopIteration as error:  # what it says of an empty file
            raise ValueError(f"`{argument}={name!r}` has no rows; give one JSON object a line.") from error
    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}={name!r}` is no file and could not be read from the Hub: {error}") from error


def tokenize_prompts_and_responses(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    prompt_column: str = "prompt",
    response_column: str | None = "response",
    max_length: int = 1024,
    response_length: int | None = None,
    apply_chat_template: bool = False,
) -> Dataset | IterableDataset:
    """Tokenise prompt and response rows, dropping those that can't be trained on and reporting how many. Rows of a
    streamed dataset are tokenised when they are read, and reported as [`DroppedRows`] says.

    Args:
        dataset (`datasets.Dataset` or `IterableDataset`): rows with two text columns. Other columns are kept.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's tokenizer.
        prompt_column (`str`), response_column (`str`): names of the columns; without the second there are prompts
            only.
        max_length (`int`): longest prompt and response together, with at least one EOS, in tokens.
        response_length (`int`, *optional*): longest response with its EOS, in tokens.
        apply_chat_template (`bool`): put the prompt as a user message through the tokenizer's chat template.

    Returns:
        The same kind of dataset: the rows that can be used, with `prompt_ids` and, if there are responses,
        `response_ids` (without EOS).

    Raises:
        `ValueError`: a column is missing, or no row is left.
    """
    columns = {"prompt_column": prompt_column, "response_column": response_column}
    check_columns(dataset, **{argument: column for argument, column in columns.items() if column is not None})

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        """One row's ids, and whether it is empty, too long or fine."""
        prompt_ids = tokenize_prompt(tokenizer, row[prompt_column] or "", apply_chat_template)
        if response_column is None:
            state = "empty" if not prompt_ids else "long" if len(prompt_ids) >= max_length else "ok"
            return {"prompt_ids": prompt_ids, "_state": state}
        response_ids = tokenizer(row[response_column] or "", add_special_tokens=False).input_ids
        longest = min(max_length - len(prompt_ids), response_length or max_length)
        state = "empty" if not response_ids or not prompt_ids else "long" if len(response_ids) >= longest else "ok"
        return {"prompt_ids": prompt_ids, "response_ids": response_ids, "_state": state}

    dropped = DroppedRows(max_length, response_length)
    if isinstance(dataset, IterableDataset):
        return dataset.map(tokenize).filter(dropped.keep, input_columns="_state").remove_columns("_state")
    rows = dataset.map(tokenize, desc="Tokenising")
    states = list(rows["_state"])
    dropped.empty, dropped.too_long, dropped.rows = states.count("empty"), states.count("long"), len(states)
    if dropped.empty or dropped.too_long:
        logger.warning(dropped.report())
    kept = rows.select([i for i, state in enumerate(states) if state == "ok"]).remove_columns("_state")
    if len(kept) == 0:
        raise ValueError(
            f"`dataset` has no usable row: of {len(states)}, {dropped.empty} have no prompt or response and "
            f"{dropped.too_long} are longer than `max_length={max_length}` or `response_length={response_length}`. "
            "Raise these limits or check the columns."
        )
    return kept


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, apply_chat_template: bool = False) -> list[int]:
    """The ids of a prompt; of a user message with the tokenizer's chat template around it, if that is asked for."""
    if apply_chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=not apply_chat_template).input_ids


def check_columns(dataset: Dataset | IterableDataset, **columns: str) -> None:
    """Raise a `ValueError` naming the argument, if a column that it names is not there."""
    known = columns_of(dataset)
    for argument, column in columns.items():
        if column not in known:
            raise ValueError(f"`{argument}={column!r}` is not a column of the dataset; it has {known}.")


@dataclass
class DroppedRows:
    """Counts the rows of a dataset that can't be trained on. Those of a stream, which may never end, are reported when
    1, 10, 100, ... have been dropped, by each process that reads it.

    Args:
        max_length (`int`), response_length (`int`, *optional*): the limits, for the report.
    """

    max_length: int
    response_length: int | None
    empty: int = 0
    too_long: int = 0
    rows: int = 0

    def keep(self, state: str) -> bool:
        """Count one row; whether it can be used."""
        self.rows += 1
        self.empty += state == "empty"
        self.too_long += state == "long"
        dropped = str(self.empty + self.too_long)
        if state != "ok" and dropped == "1" + "0" * (len(dropped) - 1):
            logger.warning(self.report())
        return state == "ok"

    def report(self) -> str:
        """How many were dropped, and why."""
        return (
            f"Dropped {self.empty} rows without a prompt or response and {self.too_long} rows longer than the limit "
            f"(`max_length={self.max_length}`, `response_length={self.response_length}`), of {self.rows}."
        )


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """The names of the columns; a stream may have to be read for them."""
    if dataset.column_names is not None:
        return dataset.column_names
    return list(next(iter(dataset), {}))
