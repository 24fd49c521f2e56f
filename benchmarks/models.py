"""Models to measure with: random weights, made in a moment, with the shapes that decide what decoding costs.

LLaDA-8B spends its time on the width of its blocks and on 126,464 logits a position. A model with its vocabulary and 8
blocks of width 512 shows both on a CPU: there the LM head costs about 2.5 times what its blocks do together.

Weights are fp32 by default: CPUs without bf16 instructions are slower in bf16, and probabilities tie in bf16, so that
functions that are right fill different masks (unless they take them in fp32). Embeddings are tied, which halves the
memory (LLaDA's are not tied; it changes no cost): 0.4 GB of weights, 0.7 GB while they are made. A forward of
`(1, 512)` makes 0.26 GB of logits, a softmax as much again.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dsc_hf import DSCForMaskedDiffusion


@torch.no_grad()
def make_model(
    vocab_size: int = 126_464,
    layers: int = 8,
    width: int = 512,
    *,
    attention_heads: int = 8,
    max_positions: int = 4096,
    mask_token_id: int | None = None,
    attention_block_length: int | None = None,
    logit_scale: float = 10.0,
    head_layers: int = 2,
    head_width: int | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> DSCForMaskedDiffusion:
    """A random bidirectional Llama under a correction head that counts as trained.

    The weights are scaled so that decoding is as uneven as in life: queries and keys are large, so that attention is
    peaked and what is predicted differs from position to position and changes with every token that is written;
    `logit_scale` is the standard deviation of the logits, 10 giving confidences all over (0, 1), so that a threshold
    of 0.9 fills about 3 tokens a forward. The head's error probabilities are spread too: a threshold of 0.9 takes a
    few tokens back in each block.

    Args:
        vocab_size (`int`), layers (`int`), width (`int`), attention_heads (`int`), max_positions (`int`): of the
            backbone. Its MLPs have 3 times the width, as LLaDA's.
        mask_token_id (`int`, *optional*): by default the 128th from the end, as LLaDA's. Ids behind it are padding of
            the embeddings. There is no EOS.
        attention_block_length (`int`, *optional*): make it block-causal.
        logit_scale (`float`): see above.
        head_layers (`int`), head_width (`int`, *optional*): of the correction head; by default it is as wide as the
            backbone. (The default head of LLaDA-8B has half its width.)
        dtype (`torch.dtype`): of the backbone; the head is fp32.
        attn_implementation (`str`), device: of both.
        seed (`int`): of the weights.
    """
    mask_token_id = vocab_size - 128 if mask_token_id is None else mask_token_id
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=attention_heads,
        max_position_embeddings=max_positions,
        is_causal=False,
        tie_word_embeddings=True,
        initializer_range=width**-0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        mask_token_id=mask_token_id,
        token_count=mask_token_id + 1,
        attn_implementation=attn_implementation,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = LlamaForCausalLM(config)
        for block in backbone.model.layers:
            block.self_attn.q_proj.weight *= 2.0
        backbone.model.norm.weight *= logit_scale
        backbone.to(device=device, dtype=dtype)
        model = DSCForMaskedDiffusion.from_backbone(
            backbone,
            mask_token_id=mask_token_id,
            attention_block_length=attention_block_length,
            head_num_layers=head_layers,
            head_hidden_size=head_width,
        )
        _scale_head(model)
    return model.eval()


def _scale_head(model: DSCForMaskedDiffusion) -> None:
    """Give the head weights of standard deviation `1 / sqrt(inputs)`, its logits some spread and the median 0 over the
    backbone's own predictions, and call it trained."""
    head = model.correction_head
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    head.score.weight *= 3.0
    ids = torch.randint(1, model.config.mask_token_id, (1, 64)).to(model.device)
    ids[:, 32:] = model.config.mask_token_id
    ids[:, 32:] = model.read(ids)[0][:, 32:, : model.config.mask_token_id].argmax(-1)
    head.score.bias -= model.score(ids, *model.read(ids))[:, 32:].median()
    model.config.head_trained = True
