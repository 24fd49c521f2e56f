"""Config of the small remote-code backbone of the tests."""

from transformers import PreTrainedConfig


class ToyConfig(PreTrainedConfig):
    """Sizes, and the ways in which the model can differ from a good one (see `remote_backbone.VARIANTS`)."""

    model_type = "toy_remote"

    def __init__(
        self,
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        mask_token_id=2,
        attention="full",
        padding="2d",
        positions="rotary",
        frequencies="computed",
        output="object",
        block_output="tensor",
        **kwargs,
    ):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.max_position_embeddings = num_attention_heads, max_position_embeddings
        self.mask_token_id = mask_token_id
        self.attention, self.padding, self.positions = attention, padding, positions
        self.frequencies, self.output, self.block_output = frequencies, output, block_output
        super().__init__(pad_token_id=pad_token_id, **kwargs)
