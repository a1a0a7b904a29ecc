"""ResNet-18 for 32 × 32 images (He et al., arXiv 1512.03385, with the 3 × 3 stem used on CIFAR): a factory for studies."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def resnet18(inputs, outputs: int, width: int = 64) -> "nn.Module":
    """Stem, four stages of two basic blocks (``width`` · 1, 2, 4, 8 channels, stride 2 between them), mean, linear layer.

    ``inputs``: (channels, height, width), or the number of pixels of a flat row of a 3-channel square image.

    >>> import torch
    >>> net = resnet18((3, 8, 8), 10, width=4)
    >>> net(torch.zeros(2, 3, 8, 8)).shape, sum(p.dim() > 1 for p in net.parameters())
    (torch.Size([2, 10]), 21)
    """
    from torch import nn

    channels, flat = (3, True) if isinstance(inputs, int) else (inputs[0], False)
    side = round((inputs / 3) ** 0.5) if flat else 0
    if flat and 3 * side * side != inputs:
        raise ValueError(f"rows of {inputs} numbers are no square images of 3 channels")
    layers: list[nn.Module] = [nn.Unflatten(1, (3, side, side))] if flat else []
    layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inside = width
    for stage in range(4):
        out = width * 2**stage
        for block in range(2):
            layers.append(_block(inside, out, 2 if stage and not block else 1))
            inside = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, outputs))


def _block(inside: int, out: int, stride: int) -> "nn.Module":
    """Two 3 × 3 convolutions with batch normalisation around a shortcut."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
                nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out),
            )  # fmt: skip
            same = stride == 1 and inside == out
            self.shortcut = (
                nn.Identity()
                if same
                else nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            )

        def forward(self, x):
            return (self.body(x) + self.shortcut(x)).relu()

    return Block()
