"""Datasets are read and tokenised; rows that can't be trained on are dropped and counted, never cut."""

import json

import pytest
from datasets import Dataset

from dsc_hf.training import DataArguments, data, read_dataset, tokenize_prompts_and_responses

ROWS = Dataset.from_dict(
    {"question": ["ab", "cd", "ef", ""], "answer": ["xyz", "", "x" * 50, "y"], "id": [1, 2, 3, 4]}
)


def tokenize(tokenizer, rows=ROWS, **arguments):
    return tokenize_prompts_and_responses(rows, tokenizer, "question", "answer", **arguments)


def test_rows_without_text_or_too_long_are_dropped_and_counted(tokenizer, monkeypatch):
    messages = []
    monkeypatch.setattr(data.logger, "warning", messages.append)
    kept = tokenize(tokenizer, max_length=20)
    assert kept["id"] == [1] and kept["prompt_ids"] == [[4, 5]] and kept["response_ids"] == [[27, 28, 29]]
    assert "2 rows without a prompt or response and 1 rows longer" in messages[0]


def test_a_row_needs_room_for_one_eos(tokenizer):
    rows = ROWS.select([0])
    assert len(tokenize(tokenizer, rows, max_length=6)) == 1
    with pytest.raises(ValueError, match="1 are longer than `max_length=5`"):
        tokenize(tokenizer, rows, max_length=5)
    with pytest.raises(ValueError, match="response_length=3"):
        tokenize(tokenizer, rows, response_length=3)


def test_missing_column_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"prompt_column='prompt'.*question"):
        tokenize_prompts_and_responses(ROWS, tokenizer)


def test_json_lines_are_read_and_rows_held_back(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "ab", "response": c}) for c in "cdefg"))
    train, held_back = DataArguments(dataset=str(path), eval_rows=2).load(tokenizer)
    assert len(train) == 3 and held_back["response"] == ["f", "g"]
    assert DataArguments(dataset=str(path)).load(tokenizer)[1] is None
    with pytest.raises(ValueError, match="eval_rows=5"):
        DataArguments(dataset=str(path), eval_rows=5).load(tokenizer)


@pytest.mark.parametrize(("rule", "expected"), [("16", 16), ("all", None), ("random", "random")])
def test_eos_rule_is_parsed(tokenizer, rule, expected):
    assert DataArguments(dataset="x", maskable_eos=rule).collator(tokenizer).maskable_eos == expected


def test_unknown_eos_rule_and_missing_dataset_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="maskable_eos='many'"):
        DataArguments(dataset="x", maskable_eos="many").collator(tokenizer)
    with pytest.raises(ValueError, match="nowhere"):
        read_dataset(str(tmp_path / "nowhere.jsonl"))
