"""Decoding states and detection quality."""

import numpy as np
import pytest
import torch
from conftest import MASK, TOKENS, prompt_ids

from dsc_hf.evaluation import collect_states, detection_quality, score_states

SETTINGS = [{"max_new_tokens": 8, "block_length": 4, "tokens_per_step": 2}]


def test_quality_of_perfect_random_and_reversed_scores():
    wrong = np.array([True] * 50 + [False] * 150)
    perfect = detection_quality(wrong.astype(float), wrong)
    assert perfect["auroc"] == 1 and perfect["average_precision"] == pytest.approx(1) and perfect["error_rate"] == 0.25
    assert detection_quality(-wrong.astype(float), wrong)["auroc"] == 0
    constant = detection_quality(np.zeros(200), wrong)
    assert constant["auroc"] == 0.5 and constant["average_precision"] == pytest.approx(0.25)


def test_quality_is_nan_where_nothing_can_be_told_apart():
    quality = detection_quality(np.array([0.1, 0.2]), np.array([False, False]))
    assert np.isnan(quality["auroc"]) and np.isnan(quality["average_precision"]) and quality["error_rate"] == 0


def test_calibration_error_and_fire_rate_by_hand():
    scores = np.array([0.05, 0.08, 0.45, 0.42, 0.93, 1.0])
    wrong = np.array([False, False, True, False, True, True])
    quality = detection_quality(scores, wrong, threshold=0.43)
    gaps = [abs(0.13 - 0), abs(0.87 - 1), abs(1.93 - 2)]  # in the bins from 0, 0.4 and 0.9
    assert quality["calibration_error"] == pytest.approx(sum(gaps) / 6)
    assert quality["fire_rate"] == pytest.approx(3 / 6)
    perfect = detection_quality(np.array([0.25] * 4), np.array([True, False, False, False]))
    assert perfect["calibration_error"] == pytest.approx(0) and perfect["fire_rate"] == 0
    assert np.isnan(list(detection_quality(np.array([]), np.array([], dtype=bool)).values())).all()


def test_states_are_those_that_the_decode_went_through(model):
    prompts = [row.tolist() for row in prompt_ids(5, 3)]
    states = collect_states(model, prompts, SETTINGS, states_per_prompt=2, batch_size=2, progress=False)
    assert states["prompt_index"] == [0, 0, 1, 1, 2, 2]
    output = model.generate(torch.tensor(prompts), output_history=True, return_dict_in_generate=True, **SETTINGS[0])
    visited = [step.sequences[:, 5:].tolist() for step in output.history][:-1]
    for index, state in zip(states["prompt_index"], states["state_ids"], strict=True):
        assert state in [step[index] for step in visited] and MASK in state


def test_states_say_with_which_probability_their_tokens_were_written(model):
    settings = {**SETTINGS[0], "remasking_score": "visible", "remask_threshold": 0.5, "remask_scope": "generated"}
    prompts = [row.tolist() for row in prompt_ids(5, 3)]
    output = model.generate(torch.tensor(prompts), output_history=True, return_dict_in_generate=True, **settings)
    ids = torch.cat([torch.tensor(prompts), torch.full((3, 8), MASK)], 1)
    expected = torch.ones(ids.shape)
    for step in output.history:
        logits = model(ids).logits
        logits[..., MASK] = logits[..., TOKENS:] = -torch.inf
        probabilities = logits.softmax(-1).gather(-1, step.sequences[..., None])[..., 0]
        filled = step.unmasked & (step.sequences != MASK)
        expected, ids = torch.where(filled, probabilities, expected), step.sequences
        visible = step.sequences != MASK
        torch.testing.assert_close(step.written[visible], expected[visible])
    assert sum(int(step.remasked.sum()) for step in output.history)
    states = collect_states(model, prompts, [settings], states_per_prompt=50, progress=False)
    for state in states:
        rows = [s.written[state["prompt_index"], 5:].tolist() for s in output.history]
        assert state["written_probabilities"] in rows


def test_same_seed_gives_the_same_states(model):
    prompts = [row.tolist() for row in prompt_ids(5, 4)]
    first, second = (collect_states(model, prompts, SETTINGS, 2, seed=5, progress=False) for _ in range(2))
    assert first["state_ids"] == second["state_ids"]


def test_scores_of_states_equal_those_of_the_model(model):
    prompts = [row.tolist() for row in prompt_ids(5, 3)] + [[4, 5]]
    states = collect_states(model, prompts, SETTINGS, 2, progress=False)
    scores = score_states(model, states, ["head", "visible"], batch_size=3)
    for i, state in enumerate(states):
        ids = torch.tensor([state["prompt_ids"] + state["state_ids"]])
        output = model(ids)
        error = torch.sigmoid(-output.error_logits)[0, -8:]
        logits = output.logits
        logits[..., MASK] = -torch.inf
        visible = 1 - logits.softmax(-1).gather(-1, ids[..., None])[0, -8:, 0]
        hidden = torch.tensor(state["state_ids"]) == MASK
        for name, expected in (("head", error), ("visible", visible)):
            assert np.isnan(scores[name][i]).tolist() == hidden.tolist()
            np.testing.assert_allclose(scores[name][i][~hidden], expected.detach()[~hidden], atol=1e-5)


def test_empty_arguments_are_named(model):
    with pytest.raises(ValueError, match="prompts"):
        collect_states(model, [], SETTINGS)
    with pytest.raises(ValueError, match="settings"):
        collect_states(model, [[4]], [])
