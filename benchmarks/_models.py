"""Trained networks of a real size, from files: ResNet-20 for CIFAR-10, a language model of 260 k parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -- ResNet-20 ----------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two convolutions with a shortcut that subsamples and pads with zeros, without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class ResNet20(nn.Module):
    """He et al. (2016), with shortcuts of option A."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(out.mean((2, 3)))


def resnet20(folder: Path) -> nn.Module:
    (file,) = (folder / "models" / "cifar10-resnet").glob("resnet20*.th")
    weights = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    return model.eval()


def cifar10_test(folder: Path) -> tuple[Tensor, Tensor]:
    """Normalised test images ``(10000, 3, 32, 32)`` and labels; any prefix of 10 n is balanced."""
    with np.load(folder / "cifar10" / "cifar10-test.npz") as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous(), labels.long()


# -- a language model ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head = n_heads, n_kv_heads, dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head, bias=False)
        self.wo = nn.Linear(n_heads * self.head, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = rotated(self.wq(x).view(n, t, self.n_heads, self.head))
        k = rotated(self.wk(x).view(n, t, self.n_kv_heads, self.head))
        v = self.wv(x).view(n, t, self.n_kv_heads, self.head)
        k, v = (z.repeat_interleave(self.n_heads // self.n_kv_heads, dim=2) for z in (k, v))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).reshape(n, t, -1))


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding of pairs of neighbouring features."""
    t, half = x.shape[1], x.shape[3] // 2
    angles = torch.outer(torch.arange(t), 10000.0 ** (-torch.arange(half) / half)).to(x)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class Layer(nn.Module):
    def __init__(self, dim: int, hidden: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.attention = Attention(dim, n_heads, n_kv_heads)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Llama(nn.Module):
    """A decoder with rotary and tied embeddings and grouped queries: tokens ``(N, T)`` to logits ``(N, T, C)``."""

    def __init__(
        self, dim: int, hidden: int, n_layers: int, n_heads: int, n_kv_heads: int, vocabulary: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(Layer(dim, hidden, n_heads, n_kv_heads) for _ in range(n_layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, vocabulary, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def stories260k(folder: Path) -> nn.Module:
    """From the format of llama2.c, version 0: seven integers, then the weights of each kind for all layers."""
    file = folder / "models" / "stories260K" / "stories260K.bin"
    dim, hidden, n_layers, n_heads, n_kv_heads, vocabulary, _ = np.fromfile(file, np.int32, 7).tolist()
    weights = torch.from_numpy(np.fromfile(file, np.float32, offset=28))
    model = Llama(dim, hidden, n_layers, n_heads, n_kv_heads, vocabulary)
    layers = list(model.layers)
    in_order: list[nn.Module] = [
        model.embedding,
        *(layer.attention_norm for layer in layers),
        *(layer.attention.wq for layer in layers),
        *(layer.attention.wk for layer in layers),
        *(layer.attention.wv for layer in layers),
        *(layer.attention.wo for layer in layers),
        *(layer.ffn_norm for layer in layers),
        *(layer.w1 for layer in layers),
        *(layer.w2 for layer in layers),
        *(layer.w3 for layer in layers),
        model.norm,
    ]
    start = 0
    with torch.no_grad():
        for module in in_order:
            weight: Tensor = module.weight  # type: ignore[assignment]
            weight.copy_(weights[start : start + weight.numel()].view_as(weight))
            start += weight.numel()
    return model.eval()


def stories_tokens(model: nn.Module, n_samples: int, length: int, seed: int = 0) -> Tensor:
    """Token sequences ``(n_samples, length + 1)`` that the model itself writes, from the token that starts a story."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((n_samples, 1), 1)
    with torch.no_grad():
        for _ in range(length):
            p = model(tokens)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], dim=1)
    return tokens


# -- adapters and a vision transformer ----------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable product of low rank (Hu et al., 2022)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.lora_b.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x))


def with_lora(model: nn.Module, rank: int = 4) -> nn.Module:
    """The language model with adapters on its queries and values; only these require a gradient."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Attention):
            module.wq, module.wv = LoRALinear(module.wq, rank), LoRALinear(module.wv, rank)
    return model


class VisionTransformer(nn.Module):
    """Patches of 4 x 4, a class token, learned positions, two encoder layers: 110 thousand parameters."""

    def __init__(self, dim: int = 64, n_layers: int = 2, n_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, dim) / dim**0.5)
        self.positions = nn.Parameter(torch.randn(1, 65, dim) / dim**0.5)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT
        h = torch.cat([self.token.expand(len(h), -1, -1), h], dim=1) + self.positions
        return self.head(self.norm(self.encoder(h)[:, 0]))
