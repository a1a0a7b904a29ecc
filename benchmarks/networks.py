"""The networks beyond ``studies.data.models``: a small CNN, a residual network, a transformer. Plain ``torch.nn`` only.

BatchNorm is in eval mode with statistics of its own: the residual network that the most peers can run.
"""

import torch
from torch import Tensor, nn


def convolutional() -> nn.Sequential:
    """Conv 1→16→32, 3×3, ReLU, each followed by a 2×2 max pool, then a linear layer; for [N, 1, 28, 28]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm and the identity, or a 1×1 projection where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(residual + self.shortcut(x))


def residual(widths: tuple[int, ...] = (16, 32, 64), outputs: int = 10) -> nn.Sequential:
    """A ResNet-8: a 3×3 stem, one block per width (stride 2 from the second on), global average, linear; for CIFAR."""
    pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
    return nn.Sequential(
        nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
        *(ResidualBlock(before, after, 1 if i == 0 else 2) for i, (before, after) in enumerate(pairs)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], outputs),
    )


class Transformer(nn.Module):
    """Token and position embeddings, two encoder blocks (width 64, 4 heads, 128 hidden), mean over tokens, linear."""

    def __init__(self, vocabulary: int = 100, tokens: int = 32, width: int = 64, outputs: int = 10):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(tokens, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1))


def draw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw every parameter and statistic in place, with no global random state: weights N(0, 1/fan-in), the rest near
    its usual value but not at it, so that no contender gets zeros or ones for free.

    >>> draw(nn.Linear(4, 1)).weight.tolist() == draw(nn.Linear(4, 1)).weight.tolist()
    True
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if not t.is_floating_point():
                continue
            noise = torch.empty(t.shape, dtype=torch.float64).normal_(generator=generator)
            if t.dim() == 1:
                usual = 1.0 if name.endswith(("running_var", "weight")) else 0.0
                t.copy_(usual + 0.1 * noise.clamp(-3, 3))
            else:
                t.copy_(noise * t[0].numel() ** -0.5)
    return model
