"""Models: convolutional, residual, recurrent and Transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.convergence.data import CHARACTERS, WINDOW


class DigitsNet(nn.Sequential):
    """3x3 and 1x1 convolutions, batch norm and two fully connected layers."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 32, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions that halve the image, and a 1x1 convolution as a shortcut."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, out, 1, stride=2, bias=False), nn.BatchNorm2d(out)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(images) + self.shortcut(images))


class ResidualNet(nn.Sequential):
    """Three residual blocks with batch norm, from ``width`` channels to eight times as many."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            ResidualBlock(width, 2 * width),
            ResidualBlock(2 * width, 4 * width),
            ResidualBlock(4 * width, 8 * width),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10),
        )  # fmt: skip


class LongShortTermMemory(nn.Module):
    """A character language model with one recurrent layer."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, 64)
        self.recurrent = nn.LSTM(64, width, batch_first=True)
        self.out = nn.Linear(width, CHARACTERS)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.recurrent(self.embedding(characters))[0])
        return logits


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project_in, self.project_out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        split = self.project_in(hidden).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: torch.Tensor = self.project_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class TransformerBlock(nn.Module):
    """Attention and a network of two layers, each after a layer norm and with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.forward_layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(hidden)
        summed: torch.Tensor = hidden + self.forward_layers(hidden)
        return summed


class Transformer(nn.Module):
    """A causal character language model with two blocks."""

    def __init__(self, width: int = 96, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, width)
        self.position = nn.Parameter(0.02 * torch.randn(WINDOW, width))
        blocks = [TransformerBlock(width, heads) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.out = nn.Linear(width, CHARACTERS)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.blocks(self.embedding(characters) + self.position))
        return logits


class TokenTransformer(nn.Module):
    """A causal language model of tokens, whose output layer has the embedding's weights.

    Args:
        tokens: size of the vocabulary.
        length: of a text, in tokens.
        width: of the hidden state.
        blocks: how many there are.
        heads: of attention.
    """

    def __init__(self, tokens: int, length: int, width: int, blocks: int, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        nn.init.normal_(
            self.embedding.weight, std=0.02
        )  # so that scores are small in the first step
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layers = [TransformerBlock(width, heads) for _ in range(blocks)]
        self.blocks = nn.Sequential(*layers, nn.LayerNorm(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks(self.embedding(tokens) + self.position)
        return F.linear(hidden, self.embedding.weight)
