"""The benchmark's peers write what generate() and literal computations of their algorithms write."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import MASK, TOKENS, left_pad, make_llama, prompt_ids
from conftest import make_model as make_small_model
from torch.nn.functional import pad
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dsc_hf import DSCForMaskedDiffusion

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from models import make_model  # noqa: E402
from peers import LowConfidenceRemasking, fast_dllm_dual, fast_dllm_prefix, fast_dllm_v2, llada_reference  # noqa: E402

IDS = {"mask_id": MASK, "token_count": TOKENS}
PEERS = [llada_reference, fast_dllm_prefix, fast_dllm_dual]


@pytest.fixture(scope="module")
def backbone():
    return make_llama()


@pytest.fixture
def widths(backbone, monkeypatch):
    """The number of columns in each forward of the backbone, as they come."""
    found = []

    def forward(*args, **kwargs):
        found.append(kwargs["input_ids"].shape[1])
        return type(backbone).forward(backbone, *args, **kwargs)

    monkeypatch.setattr(backbone, "forward", forward)
    return found


def assert_filled(ids: torch.Tensor, prompt: torch.Tensor, gen_length: int):
    """Prompt, then tokens."""
    assert ids.shape == (len(prompt), prompt.shape[1] + gen_length)
    assert torch.equal(ids[:, : prompt.shape[1]], prompt)
    assert (ids != MASK).all() and (ids < TOKENS).all()


# LLaDA


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("gen_length", "block_length", "k"), [(12, 12, 1), (12, 4, 1), (12, 4, 4), (16, 8, 3), (13, 5, 2), (6, 8, 4)]
)
def test_llada_reference_writes_what_generate_writes(gen_length, block_length, k, seed):
    model, prompt = make_small_model(seed=seed), prompt_ids(5, rows=4, seed=seed)
    expected = model.generate(
        prompt,
        max_new_tokens=gen_length,
        block_length=block_length,
        tokens_per_step=k,
        return_dict_in_generate=True,
    )
    sizes = {"gen_length": gen_length, "block_length": block_length, "tokens_per_step": k}
    ids, forwards = llada_reference(model.backbone, prompt, **sizes, **IDS)
    assert_filled(ids, prompt, gen_length)
    assert torch.equal(ids, expected.sequences)
    assert expected.forward_passes.tolist() == [forwards] * 4


def test_llada_reference_takes_left_padding(model):
    prompt, mask = left_pad([prompt_ids(length, seed=length)[0] for length in (3, 6, 5)])
    expected = model.generate(prompt, attention_mask=mask, max_new_tokens=8, block_length=4, tokens_per_step=2)
    ids, _ = llada_reference(model.backbone, prompt, mask, gen_length=8, block_length=4, tokens_per_step=2, **IDS)
    assert torch.equal(ids, expected)


# One step


def distributions(*confidences: float) -> torch.Tensor:
    """Logits `(1, n, 32)` that give token 10 + i the i-th confidence, and more to the mask and to an id beyond the
    vocabulary, both to be passed over."""
    chances = torch.zeros(1, len(confidences), 32)
    for i, confidence in enumerate(confidences):
        chances[0, i, 4:TOKENS] = (1 - confidence) / (TOKENS - 5)
        chances[0, i, 10 + i] = confidence
    logits = chances.log()
    logits[..., MASK] = logits[..., TOKENS] = 9.0
    return logits


@pytest.mark.parametrize(
    ("arguments", "filled"),
    [
        ({"tokens_per_step": 1}, {2}),
        ({"tokens_per_step": 2}, {2, 4}),
        ({"tokens_per_step": 9}, {0, 2, 3, 4}),
        ({"threshold": 0.95}, {2}),  # at least one
        ({"threshold": 0.75}, {2, 4}),
        ({"threshold": 0.0}, {0, 2, 3, 4}),
    ],
)
def test_a_step_fills_the_right_masks(arguments, filled):
    """Column 1 is written, column 5 belongs to a later block; the rows of a batch do not look at each other."""
    logits = distributions(0.5, 0.99, 0.9, 0.3, 0.8, 0.99).expand(3, -1, -1).clone()
    ids = torch.tensor([[MASK, 7, MASK, MASK, MASK, MASK], [7, 7, 7, 7, 7, MASK], [7, 7, 7, MASK, 7, MASK]])
    LowConfidenceRemasking(**IDS, **arguments)(ids, logits, end=5)
    expected = [10 + i if i in filled else MASK for i in range(6)]
    expected[1] = 7
    assert ids.tolist() == [expected, [7, 7, 7, 7, 7, MASK], [7, 7, 7, 13, 7, MASK]]


@pytest.mark.parametrize("arguments", [{}, {"tokens_per_step": 1, "threshold": 0.9}])
def test_one_rule_must_be_given(arguments):
    with pytest.raises(ValueError, match="one of `tokens_per_step` and `threshold`"):
        LowConfidenceRemasking(MASK, **arguments)


def test_float64_probabilities_change_no_token(backbone):
    sizes = {"gen_length": 8, "block_length": 4, "tokens_per_step": 2}
    prompt = prompt_ids(rows=2)
    single, double = (
        llada_reference(backbone, prompt, **sizes, **IDS, softmax_dtype=d) for d in (None, torch.float64)
    )
    assert torch.equal(single[0], double[0])


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("threshold", "forwards"), [(0.0, 3), (1.0, 12)])
def test_threshold_limits(backbone, peer, threshold, forwards):
    """Everything above 0: one forward a block; nothing above 1: one a token."""
    sizes = {"gen_length": 12, "block_length": 4, "threshold": threshold}
    prompt = prompt_ids()
    ids, made = peer(backbone, prompt, **sizes, **IDS)
    assert_filled(ids, prompt, 12)
    assert made == forwards


@pytest.mark.parametrize("peer", PEERS)
def test_threshold_above_all_confidences_is_one_token_a_step(backbone, peer):
    sizes = {"gen_length": 12, "block_length": 4}
    prompt = prompt_ids()
    above = peer(backbone, prompt, **sizes, **IDS, threshold=1.0)
    one = peer(backbone, prompt, **sizes, **IDS, tokens_per_step=1)
    assert torch.equal(above[0], one[0]) and above[1] == one[1]


# Fast-dLLM v1


class LiteralLlama:
    """A Llama written out with matrices, for one row, that attends to given keys and values in columns that it does
    not compute."""

    def __init__(self, backbone):
        self.backbone, self.config = backbone, backbone.config

    def __call__(self, ids, columns, frozen=None):
        """Logits `(len(columns), V)` of these columns, and each layer's keys and values `(heads, L, d)`.

        `frozen` are keys and values of all columns, in each layer; they hold outside `columns`.
        """
        model, heads = self.backbone.model, self.config.num_attention_heads
        states, used = model.embed_tokens(ids[columns]), []
        cos, sin = model.rotary_emb(states[None], torch.tensor(columns)[None])
        for i, layer in enumerate(model.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(states)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (p(normed).view(len(columns), heads, -1).transpose(0, 1) for p in projections)
            q, k = (x[0] for x in apply_rotary_pos_emb(q[None], k[None], cos, sin))
            keys, values = (torch.zeros(heads, len(ids), q.shape[-1]) if frozen is None else x for x in (k, v))
            if frozen is not None:
                keys, values = (x.clone() for x in frozen[i])
            keys[:, columns], values[:, columns] = k, v
            used.append((keys, values))
            weights = (q @ keys.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
            states = states + attention.o_proj((weights @ values).transpose(0, 1).flatten(1))
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        return self.backbone.lm_head(model.norm(states)), used


@torch.no_grad()
def literal_fast_dllm(backbone, prompt, gen_length, block_length, k, threshold, dual):
    """Fast-dLLM v1 for one row, token by token, without a cache: whatever is frozen in a block is computed again in
    each step, from the canvas as it was when the block began."""
    llama, ids, forwards = LiteralLlama(backbone), pad(prompt, (0, gen_length), value=MASK), 0
    everything = list(range(len(ids)))
    for start in range(len(prompt), len(ids), block_length):
        end = min(start + block_length, len(ids))
        at_begin, first = ids.clone(), True
        while MASK in ids[start:end].tolist():
            columns = everything if first else everything[start:end] if dual else everything[start:]
            frozen = None if first else llama(at_begin, everything)[1]
            logits = llama(ids, columns, frozen)[0]
            forwards, first = forwards + 1, False
            found = []
            for i in range(start, end):
                chances = logits[columns.index(i)].clone()
                chances[MASK] = -torch.inf
                chances = chances[:TOKENS].softmax(-1).tolist()
                if ids[i] == MASK:
                    found.append((max(chances), i, chances.index(max(chances))))
            found.sort(reverse=True)
            limit = k if threshold is None else max(1, sum(p > threshold for p, _, _ in found))
            for _, i, token in found[:limit]:
                ids[i] = token
    return ids, forwards


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize(("k", "threshold"), [(1, None), (2, None), (3, None), (None, 0.5), (None, 0.8)])
@pytest.mark.parametrize(("gen_length", "block_length"), [(12, 4), (10, 4), (8, 8)])
def test_fast_dllm_is_its_literal_computation(backbone, dual, k, threshold, gen_length, block_length):
    peer = fast_dllm_dual if dual else fast_dllm_prefix
    sizes = {"gen_length": gen_length, "block_length": block_length}
    for seed in range(4):
        prompt = prompt_ids(5, seed=seed)
        ids, forwards = peer(backbone, prompt, **sizes, tokens_per_step=k, threshold=threshold, **IDS)
        expected, expected_forwards = literal_fast_dllm(backbone, prompt[0], *sizes.values(), k, threshold, dual)
        assert_filled(ids, prompt, gen_length)
        assert ids[0].tolist() == expected.tolist()
        assert forwards == expected_forwards


def test_caches_are_approximate_and_differ(backbone):
    """Else the tests of the caches against each other would show nothing."""
    sizes = {"gen_length": 16, "block_length": 8, "tokens_per_step": 1}
    a, b, c = (peer(backbone, prompt_ids(rows=4), **sizes, **IDS)[0] for peer in PEERS)
    assert not torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(b, c)


@pytest.mark.parametrize("peer", [fast_dllm_prefix, fast_dllm_dual])
@pytest.mark.parametrize("block_length", [4, 12])
def test_caches_change_nothing_where_no_step_reads_them(backbone, peer, block_length):
    """One step a block, one block or more: all forwards are full ones."""
    sizes = {"gen_length": 12, "block_length": block_length, "tokens_per_step": block_length}
    cached, uncached = (p(backbone, prompt_ids(rows=3), **sizes, **IDS) for p in (peer, llada_reference))
    assert torch.equal(cached[0], uncached[0])
    assert cached[1] == uncached[1] == 12 // block_length


@pytest.mark.parametrize("peer", [fast_dllm_prefix, fast_dllm_dual])
def test_rows_of_a_batch_are_independent_with_caches(backbone, peer):
    sizes, prompt = {"gen_length": 12, "block_length": 4, "threshold": 0.6}, prompt_ids(rows=4)
    together, forwards = peer(backbone, prompt, **sizes, **IDS)
    alone = [peer(backbone, row[None], **sizes, **IDS) for row in prompt]
    assert torch.equal(together, torch.cat([ids for ids, _ in alone]))
    assert forwards >= max(made for _, made in alone)


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (llada_reference, [13] * 4),
        (fast_dllm_prefix, [13, 8, 13, 4]),  # block and what is behind it
        (fast_dllm_dual, [13, 4, 13, 4]),  # block alone
    ],
)
def test_each_forward_has_the_columns_it_needs(backbone, widths, peer, expected):
    _, forwards = peer(backbone, prompt_ids(5), gen_length=8, block_length=4, tokens_per_step=2, **IDS)
    assert widths == expected
    assert forwards == 4


@pytest.mark.parametrize("peer", PEERS)
def test_eager_attention_writes_the_same(backbone, peer):
    eager = make_llama()
    eager.set_attn_implementation("eager")
    sizes = {"gen_length": 12, "block_length": 4, "tokens_per_step": 1}
    results = [peer(b, prompt_ids(rows=2), **sizes, **IDS)[0] for b in (backbone, eager)]
    assert torch.equal(*results)


# Fast-dLLM v2


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("prompt_length", [3, 4, 9])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_block_causal_cache_is_exact(backbone, shift, prompt_length, k):
    """On a block-causal model, cached tokens are those of generate(), which forwards everything in each step."""
    model = DSCForMaskedDiffusion.from_backbone(backbone, attention_block_length=4)
    model.config.logits_shift, model.config.token_count = shift, TOKENS
    model.generation_config.eos_token_id = None
    prompt = prompt_ids(prompt_length, rows=3)
    expected = model.generate(prompt, max_new_tokens=12, tokens_per_step=k, return_dict_in_generate=True)
    ids, forwards = fast_dllm_v2(
        backbone, prompt, gen_length=12, block_length=4, logits_shift=shift, tokens_per_step=k, **IDS
    )
    assert torch.equal(ids, expected.sequences)
    blocks = -(-(prompt_length + 12) // 4) - prompt_length // 4
    extra = (prompt_length >= 4) + blocks - 1  # prefill and commits
    assert forwards == int(expected.forward_passes[0]) + extra


def test_block_causal_forwards_are_one_block_wide(backbone, widths):
    fast_dllm_v2(backbone, prompt_ids(9), gen_length=7, block_length=4, tokens_per_step=2, **IDS)
    assert widths == [8] + [4, 4, 4] + [4, 4]  # prefill; 3 masks and a commit; 4 masks


# Models

SMALL = {"vocab_size": 2048, "layers": 4, "width": 128, "attention_heads": 2}


@pytest.fixture(scope="module")
def benchmark_model():
    return make_model(**SMALL)


def test_benchmark_model_predicts_unevenly(benchmark_model):
    """Predictions differ between positions and react to what is written, with confidences all over (0, 1)."""
    model = benchmark_model
    mask_id = model.config.mask_token_id
    assert mask_id == 2048 - 128 and model.config.token_count == mask_id + 1
    ids = pad(torch.randint(1, mask_id, (4, 16)), (0, 32), value=mask_id)
    best = []
    for first in (5, 6):
        ids[:, 16] = first
        best.append(model.read(ids)[0][:, 17:, :mask_id].softmax(-1).max(-1))
    assert all(len(set(row.tolist())) > 10 for row in best[0].indices)
    assert (best[0].indices != best[1].indices).float().mean() > 0.1
    low, high = best[0].values.quantile(torch.tensor([0.1, 0.9]))
    assert low < 0.5 and high > 0.8


def test_benchmark_model_has_a_head_that_takes_tokens_back(benchmark_model):
    model = benchmark_model
    assert model.config.head_trained and len(model.correction_head.layers) == 2
    out = model.generate(
        prompt_ids(rows=4), max_new_tokens=32, remasking_score="head", return_dict_in_generate=True, tokens_per_step=4
    )
    assert (out.tokens_remasked > 0).all()
    assert (out.sequences < model.config.mask_token_id).all()


def test_benchmark_model_is_the_same_for_a_seed_and_leaves_the_random_state(benchmark_model):
    state = torch.random.get_rng_state()
    again = make_model(**SMALL)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), benchmark_model.parameters(), strict=True))


def test_peers_run_on_the_benchmark_model(benchmark_model):
    """The reference writes what generate() writes there too, and the caches differ from it, as they should."""
    model, prompt = benchmark_model, prompt_ids(20, rows=2)
    ids = {"mask_id": model.config.mask_token_id, "token_count": model.config.token_count}
    sizes = {"gen_length": 24, "block_length": 8, "tokens_per_step": 2}
    results = [peer(model.backbone, prompt, **sizes, **ids) for peer in PEERS]
    expected = model.generate(prompt, max_new_tokens=24, block_length=8, tokens_per_step=2)
    assert torch.equal(results[0][0], expected)
    assert [forwards for _, forwards in results] == [12] * 3
    assert all(not torch.equal(a[0], b[0]) for a, b in pairwise(results))


def test_block_causal_benchmark_model():
    model = make_model(vocab_size=512, layers=2, width=32, attention_heads=2, attention_block_length=8)
    ids = {"mask_id": model.config.mask_token_id, "token_count": model.config.token_count}
    prompt = prompt_ids(12, rows=2)
    cached, _ = fast_dllm_v2(model.backbone, prompt, gen_length=20, block_length=8, tokens_per_step=2, **ids)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=20, tokens_per_step=2))
