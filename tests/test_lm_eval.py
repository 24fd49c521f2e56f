"""lm-eval's stock `hf` model on a DSC checkpoint: generation tasks give what `generate()` gives, tasks that read the
logits of a causal LM are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsc_hf.__main__ import main

pytest.importorskip("lm_eval")
QUESTIONS = ["hello", "a much longer question", "b", "what is it"]
TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/letters.jsonl
test_split: test
output_type: {output_type}
doc_to_text: "{{{{question}}}} "
doc_to_target: "{{{{answer}}}}"
{more}
"""
GENERATE = """
generation_kwargs:
  until: ["{stop}"]
  max_gen_toks: 24
  block_length: 4
  remasking_score: visible
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def write(checkpoint):
    """What `generate()` writes behind each question, cut at the stop string."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)

    def write(stop):
        texts = []
        for question in QUESTIONS:
            inputs = tokenizer(question + " ", return_tensors="pt")
            options = {"max_new_tokens": 24, "block_length": 4, "remasking_score": "visible"}
            ids = model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :]
            texts.append(tokenizer.decode(ids, skip_special_tokens=True).split(stop)[0])
        return texts

    return write


@pytest.fixture
def task(tmp_path, write):
    """Writes a task with a local dataset, whose first two answers are right, to a folder; returns the stop string."""

    def task(output_type="generate_until", more=None):
        plain = write("|")
        stop = plain[0][5]  # a letter that ends at least the first text early
        answers = [*write(stop)[:2], "wrong", "wrong"]
        rows = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
        (tmp_path / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        more = GENERATE.format(stop=stop) if more is None else more
        (tmp_path / "letters.yaml").write_text(TASK.format(folder=tmp_path, output_type=output_type, more=more))
        return stop

    return task


def evaluate(checkpoint, folder, **kwargs):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model="hf",
        tasks=["letters"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        **{"model_args": {"pretrained": checkpoint}, **kwargs},
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_generation_tasks_give_what_generate_gives(checkpoint, tmp_path, task, write, batch_size):
    """Also in batches, where lm-eval's stopping criteria remember a verdict for each row."""
    stop = task()
    results = evaluate(checkpoint, tmp_path, batch_size=batch_size)
    samples = sorted(results["samples"]["letters"], key=lambda sample: sample["doc_id"])
    texts = [sample["resps"][0][0] for sample in samples]
    assert texts == write(stop) and any(len(text) < 24 for text in texts) and len(set(texts)) > 1
    assert results["results"]["letters"]["exact_match,none"] == 0.5


def test_a_model_in_memory_is_evaluated(checkpoint, tmp_path, task, write):
    from lm_eval.models.huggingface import HFLM

    stop, model = task(), AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    results = simple_evaluate(model=wrapped, tasks=["letters"], task_manager=manager, bootstrap_iters=0)
    assert {sample["resps"][0][0] for sample in results["samples"]["letters"]} == set(write(stop))


CHOICES = 'doc_to_choice: ["a", "b"]\n'


@pytest.mark.parametrize(
    ("output_type", "more"), [("multiple_choice", CHOICES), ("loglikelihood", ""), ("loglikelihood_rolling", "")]
)
def test_tasks_that_need_a_causal_lm_are_refused(checkpoint, tmp_path, task, output_type, more):
    """They would read our logits one position off, with the answer in sight: numbers that mean nothing."""
    task(output_type, more)
    if output_type == "multiple_choice":
        text = (tmp_path / "letters.yaml").read_text().replace('"{{answer}}"', "0")
        (tmp_path / "letters.yaml").write_text(text)
    with pytest.raises(ValueError, match="causal"):
        evaluate(checkpoint, tmp_path, batch_size=2)


def test_forward_outside_of_lm_eval_is_not_refused(checkpoint):
    import lm_eval.models.huggingface  # noqa: F401

    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(checkpoint)(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.slow  # the command reads all of its own tasks first
def test_the_stock_command_evaluates_the_code_of_the_checkpoint(checkpoint, tmp_path, task, write):
    """`lm_eval run --model hf --model_args pretrained=FOLDER,trust_remote_code=True`, without this package."""
    stop = task()
    (tmp_path / "dsc_hf.py").write_text("raise ImportError('the package is not installed')")
    command = ["run", "--model", "hf", "--model_args", f"pretrained={checkpoint},trust_remote_code=True"]
    command += ["--tasks", "letters", "--include_path", tmp_path, "--device", "cpu", "--batch_size", "2"]
    command += ["--output_path", tmp_path / "out", "--log_samples"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *map(str, command)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    samples = next(Path(tmp_path / "out").rglob("samples_letters*.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, samples), key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == write(stop)


def test_the_command_line_in_a_process_that_knows_the_model(capsys, monkeypatch):
    """`python -m dsc_hf lm_eval ...` is the stock command."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as exit:
        main(["lm_eval", "run", "--help"])
    assert exit.value.code == 0 and "--model_args" in capsys.readouterr().out
