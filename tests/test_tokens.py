"""The tokenizer beside a backbone: found without the upstream config and its code, and never lost silently."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import MASK, TOKENS, VOCAB, make_tokenizer
from transformers import EsmConfig, EsmForMaskedLM, LlamaConfig, RoFormerConfig, RoFormerForMaskedLM

from dsc_hf import DSCForMaskedDiffusion
from dsc_hf.tokens import find_tokenizer

FIXTURES = Path(__file__).parent / "fixtures/backbones"
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def copy_of(name: str, tmp_path: Path, **changes) -> Path:
    """A family's checkpoint, its config.json changed."""
    folder = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def upstream_tokenizer(folder: Path, *tokens: str, **changes) -> None:
    """The tests' tokenizer in a folder, with more tokens, and its config changed."""
    tokenizer = make_tokenizer()
    tokenizer._special_tokens_map["mask_token"] = None
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_it_is_found_or_not_there(backbone_folder, tmp_path):
    assert find_tokenizer(str(backbone_folder)).mask_token_id == MASK
    assert find_tokenizer(str(backbone_folder), LlamaConfig()).mask_token_id == MASK
    (tmp_path / "empty").mkdir()
    assert find_tokenizer(str(tmp_path / "empty")) is None
    shutil.move(backbone_folder, tmp_path / "outer/inner")
    assert find_tokenizer(str(tmp_path / "outer"), subfolder="inner").mask_token_id == MASK
    assert find_tokenizer(str(tmp_path / "outer")) is None


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ['{"broken', "[1]", "{}"])
def test_a_corrupt_one_is_an_error(file, content, backbone_folder):
    if (file, content) == ("tokenizer_config.json", "{}"):
        pytest.skip("is right")
    (backbone_folder / file).write_text(content)
    with pytest.raises(ValueError, match="The tokenizer of the backbone .*could not be read.*or pass `tokenizer=`"):
        DSCForMaskedDiffusion.from_backbone(str(backbone_folder), mask_token_id=MASK)


@pytest.mark.parametrize(
    "model_class, config_class", [(EsmForMaskedLM, EsmConfig), (RoFormerForMaskedLM, RoFormerConfig)]
)
def test_a_folder_without_one_needs_none(model_class, config_class, tmp_path):
    config = config_class(**SIZES, vocab_size=VOCAB, max_position_embeddings=64, pad_token_id=0, mask_token_id=MASK)
    model_class(config).save_pretrained(tmp_path)
    assert DSCForMaskedDiffusion.from_backbone(str(tmp_path), head_num_attention_heads=2).config.token_count is None


def test_a_package_that_it_needs_is_named(tmp_path):
    config = RoFormerConfig(**SIZES, vocab_size=VOCAB, max_position_embeddings=64, mask_token_id=MASK)
    RoFormerForMaskedLM(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\n[MASK]\n")
    with pytest.raises(ValueError, match="The tokenizer of the backbone .*rjieba.*Install what it needs"):
        DSCForMaskedDiffusion.from_backbone(str(tmp_path), head_num_attention_heads=2)


@pytest.mark.parametrize(
    "name, scaling",
    [
        ("a2d_llama", {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("dream", {"rope_type": "yarn"}),
        ("a2d_qwen3", {"type": "yarn"}),
    ],
)
def test_the_upstream_config_is_not_read_for_it(name, scaling, tmp_path, caplog):
    scaling |= {"factor": 4.0, "original_max_position_embeddings": 64}
    folder = copy_of(name, tmp_path, rope_scaling=scaling, max_position_embeddings=256, mask_token_id=None)
    upstream_tokenizer(folder, "<|mask|>")
    config = DSCForMaskedDiffusion.from_backbone(str(folder)).config
    assert (config.mask_token_id, config.token_count) == (TOKENS, TOKENS + 1)
    assert "You are using a model of type" not in caplog.text


def test_dreams_own_class_is_qwen2s(tmp_path, caplog):
    folder = copy_of("dream", tmp_path, mask_token_id=None, auto_map={"AutoConfig": "configuration_dream.DreamConfig"})
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3, "<|mask|>": 4}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    special = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    added = {"3": "<|endoftext|>", "4": "<|mask|>"}
    said = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {i: {"content": token, **special} for i, token in added.items()},
        "mask_token": "<|mask|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    assert find_tokenizer(str(folder), trust_remote_code=True)("ab")["input_ids"] == [2]
    model = DSCForMaskedDiffusion.from_backbone(str(folder))
    assert (model.config.mask_token_id, model.config.token_count) == (4, 5)
    assert "You are using a model of type" not in caplog.text


@pytest.mark.parametrize("name", ["llada", "sdar", "dream"])
def test_a_familys_code_never_runs(name, tmp_path):
    """Not even with `trust_remote_code=True`."""
    auto_map = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    folder = copy_of(name, tmp_path, mask_token_id=None, auto_map=auto_map)
    token = {"llada": "<|mdm_mask|>", "sdar": "<|MASK|>", "dream": "<|mask|>"}[name]
    remote = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
    upstream_tokenizer(folder, token, **remote)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for trust in ({}, {"trust_remote_code": True}):
        assert DSCForMaskedDiffusion.from_backbone(str(folder), **trust).config.mask_token_id == TOKENS
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_an_unknown_class_needs_its_code(tmp_path):
    folder = copy_of("llada", tmp_path)
    remote = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["code.OwnTokenizer", None]}}
    upstream_tokenizer(folder, **remote)
    with pytest.raises(ValueError, match="read it and pass `trust_remote_code=True`, or `tokenizer=`"):
        DSCForMaskedDiffusion.from_backbone(str(folder))
