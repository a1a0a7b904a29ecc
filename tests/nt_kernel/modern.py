"""Modern architectures, small: each once, in float64, with two point sets of different sizes and masses per layer."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.nt_kernel.architectures import Architecture, expected_kinds, settled
from tests.nt_kernel.cases import F64, Custom
from tests.reference import layers_of

VOCABULARY = 7


def images(n: int, *shape: int):
    return torch.randn(n, *shape, dtype=F64)


def words(n: int, T: int):
    return torch.randint(0, VOCABULARY, (n, T))


def built(make, samples, n=3, m=2, seed=0, **known):
    """() -> Architecture: ``make()`` is the model, ``samples(n)`` n points, ``known`` kinds that no type tells."""

    def build() -> Architecture:
        torch.manual_seed(seed)
        model = settled(make())
        mass = {layer: (0.5, 1.0, 2.0)[i % 3] for i, layer in enumerate(layers_of(model))}
        return Architecture(model, samples(n), samples(m), expected_kinds(model, **known), mass)

    return build


def resnet():
    """Basic blocks with BatchNorm and in-place ReLU; the second halves the map, its shortcut is a projection."""

    def block(c, d, stride):
        shortcut = nn.Sequential(nn.Conv2d(c, d, 1, stride, bias=False), nn.BatchNorm2d(d)) if stride > 1 else None
        parts = {
            "conv1": nn.Conv2d(c, d, 3, stride, 1, bias=False),
            "bn1": nn.BatchNorm2d(d),
            "conv2": nn.Conv2d(d, d, 3, 1, 1, bias=False),
            "bn2": nn.BatchNorm2d(d),
            "relu": nn.ReLU(inplace=True),
            "shortcut": shortcut or nn.Identity(),
        }
        forward = lambda s, x: s.relu(s.bn2(s.conv2(s.relu(s.bn1(s.conv1(x))))) + s.shortcut(x))  # noqa: E731
        return Custom(forward, **parts)

    stem = [nn.Conv2d(3, 3, 3, 1, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, block(3, 3, 1), block(3, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def convnext():
    """Depthwise 7 × 7, LayerNorm with channels last, an MLP as two Linear, layer scale."""

    def forward(s, x):
        h = s.norm(s.depthwise(x).permute(0, 2, 3, 1))
        return x + (s.scale * s.narrow(F.gelu(s.wide(h)))).permute(0, 3, 1, 2)

    def block(d):
        return Custom(
            forward,
            depthwise=nn.Conv2d(d, d, 7, padding=3, groups=d),
            norm=nn.LayerNorm(d),
            wide=nn.Linear(d, 2 * d),
            narrow=nn.Linear(2 * d, d),
            scale=nn.Parameter(0.5 + torch.rand(d)),
        )

    return nn.Sequential(
        nn.Conv2d(2, 4, 2, 2), block(4), block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


def vision_transformer():
    """Patches by a strided convolution, a class token, positions, two pre-norm blocks, the class token read out."""

    def block(d):
        def forward(s, x):
            h = s.first(x)
            x = x + s.at(h, h, h, need_weights=False)[0]
            return x + s.mlp(s.second(x))

        mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        at = nn.MultiheadAttention(d, 2, batch_first=True)
        return Custom(forward, first=nn.LayerNorm(d), at=at, second=nn.LayerNorm(d), mlp=mlp)

    def forward(s, x):
        h = s.patch(x).flatten(2).mT
        h = torch.cat([s.token.expand(len(h), -1, -1), h], 1) + s.positions
        return s.head(s.norm(s.blocks(h))[:, 0])

    return Custom(
        forward,
        patch=nn.Conv2d(1, 4, 2, 2),
        token=nn.Parameter(torch.randn(1, 1, 4)),
        positions=nn.Parameter(torch.randn(1, 5, 4)),
        blocks=nn.Sequential(block(4), block(4)),
        norm=nn.LayerNorm(4),
        head=nn.Linear(4, 3),
    )


def tied_encoder():
    """``nn.TransformerEncoder`` (post-norm) on token ids; the head reads the embedding's weight, outputs [N, T, V]."""
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(s, ids):
        return s.head(s.encoder(s.embed(ids) + s.positions))

    model = Custom(
        forward,
        embed=nn.Embedding(VOCABULARY, 4),
        positions=nn.Parameter(torch.randn(3, 4)),
        encoder=encoder,
        head=nn.Linear(4, VOCABULARY, bias=False),
    )
    model.head.weight = model.embed.weight
    return model


class RotaryBlock(nn.Module):
    """RMSNorm, causal attention by functions on bare parameters, SwiGLU."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv = nn.Parameter(torch.randn(3 * d, d) / d**0.5)
        self.out = nn.Parameter(torch.randn(d, d) / d**0.5)
        self.gate, self.up, self.down = nn.Linear(d, 6, False), nn.Linear(d, 6, False), nn.Linear(6, d, False)

    def forward(self, x):
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = map(split, F.linear(self.norm1(x), self.qkv).chunk(3, -1))
        seen = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        x = x + F.linear(seen.transpose(1, 2).flatten(2), self.out)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def turned(self, t):
        """Rotary positions: pairs of coordinates turned by an angle proportional to the position."""
        angle = torch.arange(t.shape[-2], dtype=t.dtype, device=t.device)[:, None]
        a, b = t.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def gpt():
    def forward(s, ids):
        return F.linear(s.norm(s.blocks(s.embed(ids)))[:, -1], s.head)

    return Custom(
        forward,
        embed=nn.Embedding(VOCABULARY, 4),
        blocks=nn.Sequential(RotaryBlock(4, 2), RotaryBlock(4, 2)),
        norm=nn.RMSNorm(4),
        head=nn.Parameter(torch.randn(3, 4)),
    )


def mixer():
    def block(T, d):
        def forward(s, x):
            x = x + s.tokens(s.first(x).mT).mT
            return x + s.channels(s.second(x))

        mlp = lambda n: nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n))  # noqa: E731
        return Custom(forward, first=nn.LayerNorm(d), tokens=mlp(T), second=nn.LayerNorm(d), channels=mlp(d))

    patches = nn.Sequential(nn.Conv2d(2, 4, 2, 2), nn.Flatten(2))
    forward = lambda s, x: s.head(s.norm(s.blocks(s.patches(x).mT)).mean(1))  # noqa: E731
    return Custom(forward, patches=patches, blocks=block(4, 4), norm=nn.LayerNorm(4), head=nn.Linear(4, 2))


def unet():
    """Down by max pooling, up by a transposed convolution, the early map concatenated; a map [N, 1, 4, 4] comes out."""

    def forward(s, x):
        early = s.down(x)
        deep = s.deep(F.max_pool2d(early, 2))
        return s.out(s.join(torch.cat([early, s.up(deep)], 1)))

    step = lambda c, d: nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.GroupNorm(1, d), nn.SiLU(inplace=True))  # noqa: E731
    return Custom(
        forward,
        down=step(1, 3),
        deep=step(3, 4),
        up=nn.ConvTranspose2d(4, 2, 2, 2),
        join=step(5, 3),
        out=nn.Conv2d(3, 1, 1),
    )


def recurrent():
    """Two cells unrolled over time, one on top of the other, beside an LSTM module of two layers."""

    def forward(s, x):
        a, b = x.new_zeros(len(x), 3), None
        for t in range(x.shape[1]):
            a = s.low(x[:, t], a)
            b = s.high(a, b)
        return s.head(torch.cat([b[0], s.lstm(x)[0][:, -1]], -1))

    return Custom(
        forward,
        low=nn.GRUCell(2, 3),
        high=nn.LSTMCell(3, 3),
        lstm=nn.LSTM(2, 3, num_layers=2, batch_first=True),
        head=nn.Linear(6, 2),
    )


def equilibrium():
    """Fixed-point iteration z ← tanh(norm(Wz + Ux)), one layer called six times."""

    def forward(s, x):
        drive, z = s.inject(x), x.new_zeros(len(x), 4)
        for _ in range(6):
            z = torch.tanh(s.norm(s.loop(z) + drive))
        return s.head(z)

    return Custom(forward, inject=nn.Linear(3, 4), loop=nn.Linear(4, 4), norm=nn.LayerNorm(4), head=nn.Linear(4, 2))


def graph_network():
    """Messages over the edges of a ring with one chord, the same layers in both rounds, nodes summed at the end."""
    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])

    def forward(s, x):  # [N, nodes, features]
        h = s.encode(x)
        for _ in range(2):
            messages = F.relu(s.message(torch.cat([h[:, edges[0]], h[:, edges[1]]], -1)))
            h = h + s.update(torch.zeros_like(h).index_add(1, edges[1], messages))
        return s.head(h.sum(1))

    return Custom(
        forward, encode=nn.Linear(2, 3), message=nn.Linear(6, 3), update=nn.Linear(3, 3), head=nn.Linear(3, 2)
    )


def time_first():
    """[T, N, d] inside, T = N: nothing in the sizes tells time from samples."""

    def forward(s, x):
        h = s.into(x.transpose(0, 1))
        return s.head(s.encoder(h).mean(0))

    layer = nn.TransformerEncoderLayer(4, 2, 5, norm_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return Custom(forward, into=nn.Linear(2, 4), encoder=encoder, head=nn.Linear(4, 2))


MODERN = {
    "ResNet": built(resnet, lambda n: images(n, 3, 6, 6), seed=1),
    "ConvNeXt": built(convnext, lambda n: images(n, 2, 8, 8), **{"1__scale": "elementwise", "2__scale": "elementwise"}),
    "vision transformer": built(
        vision_transformer, lambda n: images(n, 1, 4, 4), token="elementwise", positions="elementwise"
    ),
    "encoder, tied head": built(tied_encoder, lambda n: words(n, 3), n=2, m=1, embed__weight="explicit"),
    "GPT": built(gpt, lambda n: words(n, 5), head="linear", blocks__0__qkv="linear", blocks__1__out="linear"),
    "MLP-Mixer": built(mixer, lambda n: images(n, 2, 4, 4)),
    "U-Net": built(unet, lambda n: images(n, 1, 4, 4), n=2, m=1),
    "recurrent": built(recurrent, lambda n: images(n, 3, 2)),
    "equilibrium": built(equilibrium, lambda n: images(n, 3)),
    "graph network": built(graph_network, lambda n: images(n, 4, 2)),
    "transformer, T = N": built(time_first, lambda n: images(n, 3, 2), n=3, m=2),
}
