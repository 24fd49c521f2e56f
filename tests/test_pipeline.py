"""`pipeline("text-generation")` on a saved checkpoint gives what `generate()` gives."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import dsc_hf

CHAT = [{"role": "user", "content": "hello there"}]


@pytest.fixture
def pipe(checkpoint):
    """A pipeline from a folder; only the Auto classes know whose model it is."""
    return pipeline("text-generation", model=checkpoint)


@pytest.fixture
def write(checkpoint):
    """The text that `generate()` writes behind a prompt, and the token ids of both."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)

    def write(prompt, **options):
        if isinstance(prompt, str):
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            inputs = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        ids = model.generate(**inputs, **options)[0]
        return tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return write


def test_a_string_is_continued_with_the_stored_settings(pipe, write):
    assert isinstance(pipe.model, dsc_hf.DSCForMaskedDiffusion)
    text = pipe("hello")[0]["generated_text"]
    assert text == "hello" + write("hello")
    assert write("hello") != write("hello", remasking_score="none")  # the stored `remasking_score="head"` matters


def test_only_the_response_on_request(pipe, write):
    assert pipe("hello", return_full_text=False)[0]["generated_text"] == write("hello")


def test_a_chat_is_answered(pipe, write):
    messages = pipe(CHAT)[0]["generated_text"]
    assert messages == [*CHAT, {"role": "assistant", "content": write(CHAT)}]
    assert write(CHAT) != write("hello there")  # the template was applied


@pytest.mark.parametrize("kind", ["strings", "chats"])
def test_a_batch_of_unequal_prompts_equals_single_prompts(pipe, write, kind):
    prompts = ["hello", "a much longer prompt", "b"]
    if kind == "chats":
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    together = [out[0]["generated_text"] for out in pipe(prompts, batch_size=2, return_full_text=False)]
    assert together == [write(prompt) for prompt in prompts] and len(set(together)) == 3


def test_arguments_of_generate_pass_through(pipe, write):
    options = {"block_length": 4, "remasking_score": "visible", "tokens_per_step": 2, "max_new_tokens": 24}
    got = pipe("hello", **options, return_full_text=False)[0]["generated_text"]
    assert got == write("hello", **options) != write("hello", max_new_tokens=24)
    with pytest.raises(ValueError, match="blok_length"):
        pipe("hello", blok_length=4)


def test_arguments_given_with_the_pipeline_are_kept(checkpoint, write):
    pipe = pipeline("text-generation", model=checkpoint, block_length=4, remasking_score="none")
    assert pipe("hello", return_full_text=False)[0]["generated_text"] == write(
        "hello", block_length=4, remasking_score="none"
    )


def test_nothing_is_sampled_unless_asked(pipe):
    """The pipeline's own defaults are `do_sample=True, temperature=0.7`, unless generation_config.json says."""
    with torch.random.fork_rng():
        texts = set()
        for seed in range(3):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            texts.add(pipe("hello")[0]["generated_text"])
            assert torch.equal(torch.get_rng_state(), state)
        assert len(texts) == 1
        assert len({pipe("hello", do_sample=True)[0]["generated_text"] for _ in range(3)}) > 1
