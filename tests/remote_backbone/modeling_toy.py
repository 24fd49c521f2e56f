"""A small bidirectional transformer as a Hub checkpoint would carry it, with a config field for most ways to be wrong.

As it stands it is right under transformers 5: rotary frequencies are computed in the forward, because v5 builds the
model on the meta device and fills a non-persistent buffer with whatever is in memory.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_toy import ToyConfig


def rotary_frequencies(width: int) -> torch.Tensor:
    return 1.0 / 100.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)


class ToyRotary(nn.Module):
    """`x` `(B, H, L, W)` turned by its column; where the frequencies are kept is `config.frequencies`."""

    def __init__(self, config):
        super().__init__()
        self.width = config.hidden_size // config.num_attention_heads
        if config.frequencies != "computed":
            persistent = config.frequencies == "persistent"
            self.register_buffer("inv_freq", rotary_frequencies(self.width), persistent=persistent)

    def forward(self, x):
        frequencies = self.inv_freq if hasattr(self, "inv_freq") else rotary_frequencies(self.width).to(x.device)
        angles = torch.arange(x.shape[2], device=x.device)[:, None].float() * frequencies.float()
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class ToyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.rotary = ToyRotary(config) if config.positions == "rotary" else nn.Identity()
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = self.rotary(q), self.rotary(k)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.mlp_norm(x))
        return (x, None) if self.config.block_output == "tuple" else x


class ToyPreTrainedModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.6)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, ToyRotary) and self.config.frequencies == "initialised":
            with torch.no_grad():
                module.inv_freq.copy_(rotary_frequencies(module.width))


class ToyForMaskedLM(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.positions == "absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, width)
        self.layers = nn.ModuleList(ToyBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def attention(self, length, attention_mask, x):
        """What each query may see, in a form that sdpa takes, or None for everything."""
        i = torch.arange(length, device=x.device)
        seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=x.device)
        if self.config.attention == "causal":
            seen = i[:, None] >= i
        elif self.config.attention == "block":
            seen = (i[:, None] // self.config.block_length) >= (i // self.config.block_length)
        padding = self.config.padding
        if attention_mask is None or padding == "ignored":
            return seen
        if padding.startswith("2d") and attention_mask.dim() == 2:
            if padding == "2d_causal_if_padded" and not attention_mask.all():
                seen = i[:, None] >= i
            return seen & attention_mask.bool()[:, None, None] | (i[:, None] == i)
        if padding == "4d_bool" and attention_mask.dtype == torch.bool and attention_mask.dim() == 4:
            return seen & attention_mask
        if padding in ("4d_additive", "2d_causal_if_padded") and attention_mask.dim() == 4:
            return attention_mask.to(x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)  # eager adds boolean masks
        if attention_mask.dim() != 2:
            raise ValueError(f"the attention mask must be (B, L), not {tuple(attention_mask.shape)}")
        return seen  # any other form is silently ignored

    def embed(self, input_ids, position_ids=None):
        x = self.embed_tokens(input_ids)
        if self.config.positions == "absolute":
            columns = torch.arange(input_ids.shape[1], device=x.device)[None]
            x = x + self.embed_positions(columns if position_ids is None else position_ids)
        return x

    def logits(self, x, attention_mask=None):
        mask = self.attention(x.shape[1], attention_mask, x)
        for layer in self.layers:
            x = layer(x, mask)
            x = x[0] if isinstance(x, tuple) else x
        logits = self.lm_head(self.norm(x))
        return {"tensor": logits, "tuple": (logits,), "object": MaskedLMOutput(logits=logits)}[self.config.output]

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.logits(self.embed(input_ids, position_ids), attention_mask)
