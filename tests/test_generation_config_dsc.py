"""DSCGenerationConfig: strict arguments, one table of defaults, a file that keeps every field."""

import json

import pytest
from transformers import GenerationConfig

from dsc_hf import DSCConfig, DSCGenerationConfig
from dsc_hf.generation_config_dsc import UNSUPPORTED
from dsc_hf.remasking import SCORES

EVERYTHING = {
    "block_length": 8,
    "unmasking": "entropy_bound",
    "tokens_per_step": 2,
    "confidence_threshold": 0.9,
    "entropy_bound": 0.3,
    "max_tokens_per_step": 5,
    "cache": "none",
    "head_context": "block",
    "remasking_score": "head",
    "remask_stride": 3,
    "remask_threshold": 0.7,
    "remask_top_k": 4,
    "remask_buffer_size": 5,
    "remask_scope": "generated",
    "max_remasks_per_position": 6,
    "max_remasks_per_block": 7,
    "rescore": True,
    "verify_block": True,
    "strict_paper": True,
    "output_error_probabilities": True,
    "output_history": True,
}


def test_every_field_is_known_here():
    assert set(EVERYTHING) == set(DSCGenerationConfig._dsc_defaults())


def test_unset_means_none():
    config = DSCGenerationConfig()
    assert all(getattr(config, name) is None for name in EVERYTHING)


def test_round_trip(tmp_path):
    config = DSCGenerationConfig(**EVERYTHING, do_sample=False, max_new_tokens=9, eos_token_id=[1, 3])
    config.save_pretrained(tmp_path)
    again = DSCGenerationConfig.from_pretrained(tmp_path)
    assert again == config and type(again) is DSCGenerationConfig
    for name, value in {**EVERYTHING, "do_sample": False, "max_new_tokens": 9, "eos_token_id": [1, 3]}.items():
        assert getattr(again, name) == value
        assert json.loads((tmp_path / "generation_config.json").read_text())[name] == value


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="`remask_treshold=0.5` is no argument of generate"):
        DSCGenerationConfig(remask_treshold=0.5)


@pytest.mark.parametrize("name", ["num_beams", "min_length", "no_repeat_ngram_size", "output_logits"])
def test_autoregressive_arguments_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}=.*no meaning for diffusion decoding"):
        DSCGenerationConfig(**{name: 3})


def test_neutral_values_of_autoregressive_arguments_pass():
    DSCGenerationConfig(**UNSUPPORTED)


BAD = [
    ("block_length", 0, "integer of at least 1"),
    ("block_length", 2.0, "integer of at least 1"),
    ("tokens_per_step", True, "integer of at least 1"),
    ("remask_stride", 0, "integer of at least 1"),
    ("remask_top_k", -1, "integer of at least 0"),
    ("remask_buffer_size", -1, "integer of at least 0"),
    ("max_remasks_per_position", "1", "integer of at least 0"),
    ("max_remasks_per_block", -2, "integer of at least 0"),
    ("max_new_tokens", 0, "integer of at least 1"),
    ("num_return_sequences", 0, "integer of at least 1"),
    ("remask_threshold", -0.5, "0 takes back every token"),
    ("remask_threshold", float("nan"), "0 takes back every token"),
    ("remask_threshold", True, "0 takes back every token"),
    ("remask_threshold", "0.5", "0 takes back every token"),
    ("rescore", "no", "True or False"),
    ("verify_block", 2, "True or False"),
    ("remasking_score", "heads", r"one of \['none', 'head'"),
    ("remask_scope", "all", r"one of \['block', 'generated'\]"),
    ("bad_words_ids", [[4], [5, 6]], "words of one token"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_values_say_what_would_do(name, value, message):
    with pytest.raises(ValueError, match=f"`{name}=.*{message}"):
        DSCGenerationConfig(**{name: value})


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_updates_are_checked_too(name, value, message):
    with pytest.raises(ValueError, match=f"`{name}=.*{message}"):
        DSCGenerationConfig().update(**{name: value})


@pytest.mark.parametrize("score", ["none", *SCORES])
def test_every_score_may_be_chosen(score):
    assert DSCGenerationConfig(remasking_score=score).remasking_score == score


def test_edges_pass():
    DSCGenerationConfig(remask_top_k=0, remask_buffer_size=0, max_remasks_per_block=0, remask_threshold=0)
    DSCGenerationConfig(remask_threshold=1.5, bad_words_ids=[[4], [5]])


def test_model_configs_give_special_tokens_only():
    config = DSCConfig(eos_token_id=1, pad_token_id=0, mask_token_id=2)
    made = DSCGenerationConfig.from_model_config(config)
    assert (made.eos_token_id, made.pad_token_id, made.bos_token_id) == (1, 0, None)
    assert type(made) is DSCGenerationConfig and not made._from_model_config


def test_it_is_a_generation_config():
    assert isinstance(DSCGenerationConfig(), GenerationConfig)
