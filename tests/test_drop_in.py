"""Small promises of a `PreTrainedModel` that libraries rely on; the larger ones have files of their own."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsc_hf.__main__ import main


def test_embeddings_may_be_replaced_but_not_resized(model, prompt):
    expected = model(prompt).logits
    replaced = torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight.clone())
    model.set_input_embeddings(replaced)
    assert model.get_input_embeddings() is replaced and torch.equal(model(prompt).logits, expected)
    with pytest.raises(ValueError, match="can't be resized"):
        model.resize_token_embeddings(40)


@pytest.mark.parametrize("merged", [False, True])
def test_loading_on_the_meta_device_is_not_blamed_on_the_checkpoint(checkpoint, tmp_path, merged):
    if merged:
        AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path, merge_backbone=True)
        checkpoint = tmp_path
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_what_the_loss_is_a_mean_of_is_known_to_trainer(model):
    """Else Trainer would take our forward's `**kwargs` for a promise to obey `num_items_in_batch`."""
    assert model.accepts_loss_kwargs is False


def test_unknown_commands_are_named():
    with pytest.raises(SystemExit, match="No installed package has a command 'trnsformers'"):
        main(["trnsformers", "serve"])
    with pytest.raises(SystemExit, match="python -m dsc_hf lm_eval"):
        main([])
