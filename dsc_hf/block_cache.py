"""Keys and values of a whole canvas, so that a forward need only run over the columns that changed."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class CanvasLayer(CacheLayerMixin):
    """Keys and values `(B, H, L, D)` of one layer for every column of a canvas.

    Other caches grow; this one has a place for each column. A forward over some columns replaces theirs and attends to
    all, whatever lies between: committed blocks, the prompt, and, for a model that sees them, later masks.
    """

    def __init__(self, window: CanvasWindow):
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The first forward has to run over all columns."""
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put in the states `(B, H, W, D)` of the window's columns; returns those of all columns."""
        columns = self.window.columns
        if columns is None:
            self.lazy_initialization(key_states, value_states)
        else:
            place = columns[:, None, :, None].expand_as(key_states)
            self.keys.scatter_(2, place, key_states)
            self.values.scatter_(2, place, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.keys.shape[2] if self.is_initialized else query_length), 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1


class CanvasWindow:
    """Which columns `(B, W)` the current forward runs over; None for all."""

    columns: torch.Tensor | None = None


class CanvasCache(Cache):
    """A [`CanvasLayer`] for each layer of a model, and the window that they share.

    Args:
        num_layers (`int`): of the model.
    """

    def __init__(self, num_layers: int):
        self.window = CanvasWindow()
        super().__init__(layers=[CanvasLayer(self.window) for _ in range(num_layers)])

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch, `(B',)`."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


__all__ = ["CanvasCache"]
