"""A small decoder-only transformer, which keeps its last hidden states and its head apart."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INITIAL_DEVIATION = 0.02


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int


class Block(nn.Module):
    """Causal attention and a feed-forward network, each behind a norm and beside a shortcut."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm, self.norm = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.queries_keys_values = nn.Linear(size.width, 3 * size.width, bias=False)
        self.attended = nn.Linear(size.width, size.width, bias=False)
        self.widen = nn.Linear(size.width, 4 * size.width)
        self.narrow = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.queries_keys_values(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attended(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm(x)), approximate="tanh"))


class LanguageModel(nn.Module):
    """Turns tokens into hidden states; logits are `hidden @ head.T`, if anybody needs them."""

    def __init__(self, vocabulary: int, length: int, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, size.width)
        self.positions = nn.Parameter(torch.empty(length, size.width))
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=INITIAL_DEVIATION)
        for block in self.blocks:
            # What is added to the shortcut, so that its variance does not grow with the depth.
            for layer in (block.attended, block.narrow):
                layer.weight.data /= math.sqrt(2 * size.layers)

    @property
    def head(self) -> Tensor:
        """(vocabulary, width), shared with the embedding."""
        return self.tokens.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """The hidden states (batch, length, width) that say what follows each token."""
        x = self.tokens(inputs) + self.positions[: inputs.shape[1]]
        return self.norm(self.blocks(x))
