"""Small PyTorch networks, one for each thing that capturing must cope with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def settled(module: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode, with running statistics that aren't the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                layer.weight.uniform_(0.5, 1.5, generator=generator)
                layer.bias.normal_(0, 0.2, generator=generator)
    return module.eval()


class Residual(nn.Module):
    """Convolutions, batch norms, a depthwise one, ReLU6, a residual sum, pooling, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = self.stem(x)
        z = self.pointwise(self.relu(self.bn(self.depthwise(y))))
        z += y
        z = self.relu(z)
        return self.fc(self.drop(F.adaptive_avg_pool2d(z, 1).flatten(1)))


class Branches(nn.Module):
    """Branches that are concatenated, max pooling, grouped and transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.up2 = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = torch.cat([F.relu(self.left(x)), F.max_pool2d(self.right(x), 3, 1, 1)], 1)
        return self.up2(F.relu(self.bn(self.up(y))))


class Mlp(nn.Module):
    """Linear layers, one of them without bias, one a plain matrix product, and softmax."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.fc2 = nn.Linear(16, 12, bias=False)
        self.matrix = nn.Parameter(torch.randn(12, 4) / 3)

    def forward(self, x):
        return (F.relu(self.fc2(F.relu(self.fc1(x)))) @ self.matrix).softmax(-1)


class Attention(nn.Module):
    """Fused attention with a mask, an embedding, layer norm, GELU."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.positions = nn.Parameter(torch.randn(16, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.heads = heads

    def forward(self, ids, mask=None):
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        b, n, w = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        allowed = None if mask is None else mask[:, None, None, :].bool()
        y = F.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2).reshape(b, n, w)
        return F.gelu(self.norm(x + self.out(y)))


class Tied(nn.Module):
    """An output layer tied to the embedding, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = torch.tanh(self.layer(self.embed(ids)))
        return self.head(torch.tanh(self.layer(x)))


class Overwriting(nn.Module):
    """In-place ops of every sort, on tensors, on views, and on a buffer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        y = self.fc(x)
        early = y[:, 4:]
        y.relu_()
        y[:, 0] = 3.0
        y[:, 1:3] *= 2
        z = y.transpose(0, 1)
        z.add_(1)
        y.masked_fill_(y > 4, 4.0)
        return F.hardswish(y, inplace=True), early * 2


class Nested(nn.Module):
    """Nested inputs, keyword arguments, and a nested result with what isn't a tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, pair, scale=2.0, *, extra=None):
        x, rest = pair
        y = self.a(x) * scale
        if extra is not None:
            y = y + extra
        return {"sum": y + self.b(rest["y"]), "list": [y, None, "text"], "x": x}
