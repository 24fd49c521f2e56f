"""What both trainers share: resuming, accumulation, processes, whole checkpoints, the optimizer pair."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import losses, make_trainer, weights

from dsc_hf.training.base import MuonWithAdamW


class Killed(Exception):
    pass


def kill_at(trainer, step):
    """Make a trainer die before its step number `step`."""
    train_step = trainer.training_step

    def dying(*args, **kwargs):
        if trainer.state.global_step == step:
            raise Killed
        return train_step(*args, **kwargs)

    trainer.training_step = dying


@pytest.mark.parametrize("kind", ["sft", "head"])
@pytest.mark.parametrize("muon", [None, 1e-2])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, kind, muon):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "muon_learning_rate": muon}
    whole = make_trainer(kind, tmp_path / "whole", **arguments)
    whole.train()
    killed = make_trainer(kind, tmp_path / "killed", **arguments)
    kill_at(killed, 3)
    with pytest.raises(Killed):
        killed.train()
    resumed = make_trainer(kind, tmp_path / "killed", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    for name, value in weights(whole.model).items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_checkpoints_hold_the_head_only_and_resume_without_a_warning(tmp_path, caplog, recwarn):
    arguments = {"save_strategy": "steps", "save_steps": 2}
    make_trainer("head", tmp_path, max_steps=2, **arguments).train()
    saved = load_file(tmp_path / "checkpoint-2/model.safetensors")
    assert saved and all(name.startswith("correction_head.") for name in saved)
    resumed = make_trainer("head", tmp_path, max_steps=4, **arguments)
    caplog.clear()
    recwarn.clear()
    with caplog.at_level("WARNING", logger="transformers"):
        resumed.train(resume_from_checkpoint=True)
    said = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
    said += [str(warning.message) for warning in recwarn if "pin_memory" not in str(warning.message)]
    assert not [text for text in said if "PAD/BOS/EOS" not in text]  # the test's model has no EOS on purpose
    assert resumed.state.global_step == 4


@pytest.mark.parametrize("kind", ["sft", "head"])
def test_loss_is_averaged_over_the_tokens_of_the_accumulated_batch(tmp_path, kind):
    trainer = make_trainer(kind, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=3, max_steps=1)
    sums, items = [], []
    loss_sum = trainer.loss_sum

    def spy(model, inputs):
        total, outputs = loss_sum(model, inputs)
        sums.append(float(total))
        items.append(int(inputs["counted"].sum()))
        return total, outputs

    trainer.loss_sum = spy
    trainer.train()
    assert len(sums) == 2 and items[0] != items[1]
    assert losses(trainer)[0] == pytest.approx(sum(sums) / sum(items), rel=1e-4)


def test_a_save_that_dies_leaves_no_checkpoint_behind(tmp_path):
    trainer = make_trainer("head", tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    save = trainer._save_optimizer_and_scheduler

    def dying(output_dir):
        if trainer.state.global_step == 4:
            raise Killed
        save(output_dir)

    trainer._save_optimizer_and_scheduler = dying
    with pytest.raises(Killed):
        trainer.train()
    assert [p.name for p in Path(tmp_path).glob("checkpoint-*")] == ["checkpoint-2"]


def test_checkpoints_are_rotated_and_the_best_one_is_kept_by_its_own_path(tmp_path):
    trainer = make_trainer(
        "head",
        tmp_path,
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    left = {p.name for p in Path(tmp_path).glob("checkpoint-*")}
    assert len(left) == 2 and not (tmp_path / ".saving").exists()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.exists()
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert ".saving" not in json.dumps(state)


def test_optimizer_pair_survives_saving_and_loading():
    def make():
        torch.manual_seed(0)
        matrix, vector = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((4, 6), (6,)))
        return matrix, vector, MuonWithAdamW([matrix], [vector], muon_lr=0.1, lr=0.01, weight_decay=0.0)

    def step(matrix, vector, optimizer):
        optimizer.zero_grad()
        (matrix @ vector).square().sum().backward()
        optimizer.step()

    a, b = make(), make()
    for _ in range(3):
        step(*a)
    with torch.no_grad():
        b[0].copy_(a[0]), b[1].copy_(a[1])
    b[2].load_state_dict(copy.deepcopy(a[2].state_dict()))
    for _ in range(2):
        step(*a), step(*b)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    for group in b[2].param_groups:
        group["lr"] = 0.0
    before = b[0].clone(), b[1].clone()
    step(*b)  # the scheduler's rates reach both parts
    assert torch.equal(before[0], b[0]) and torch.equal(before[1], b[1])


SCRIPT = """
import sys; sys.path[:0] = {paths}
from training_helpers import losses, make_trainer
trainer = make_trainer("head", sys.argv[1], max_steps=2, per_device_train_batch_size=int(sys.argv[2]), seed=3)
trainer.train()
if trainer.is_world_process_zero():
    print("LOSSES", losses(trainer), trainer.args.world_size)
trainer.accelerator.end_training()
"""


def test_two_processes_train_one_model(tmp_path):
    tests = Path(__file__).parent
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(paths=[str(tests), str(tests.parent)]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)}
    run = subprocess.run(
        [*launch, str(script), str(tmp_path / "out"), "2"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("LOSSES"))
    assert line.endswith(" 2") and "nan" not in line
