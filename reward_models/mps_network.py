"""The network of MPS between CLIP's towers and the score: image tokens look at the words of a prompt.

Module and parameter names are those of the published checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = ["CrossConfig", "CrossModel"]


@dataclass(frozen=True)
class CrossConfig:
    """Sizes of the cross model; the defaults are the published ones.

    Attributes:
        dim: Width of tokens, that of CLIP's joint space.
        layers: How often it looks at the words.
        heads: Heads of the queries; keys and values have one.
        head_width: Width of a head, even.
        ff_mult: Width of the feed-forward parts as a multiple of `dim`.
    """

    dim: int = 1024
    layers: int = 4
    heads: int = 16
    head_width: int = 64
    ff_mult: int = 4


class CrossModel(nn.Module):
    """Layers of cross-attention to words and of self-attention among image tokens, each added to what it reads."""

    def __init__(self, config: CrossConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([_Residual(_CrossAttention(config)), _Residual(_ParallelBlock(config))])
            for _ in range(config.layers)
        )

    def forward(self, tokens: Tensor, words: Tensor, visible: Tensor) -> Tensor:
        """Image tokens [B, N, D] that have looked at words [B, L, D] where `visible` [B, L] is True."""
        for layer in self.layers:
            cross, own = layer.children()
            tokens = own(cross(tokens, words, visible))
        return tokens

    def fill_constants(self) -> None:
        """Gives the buffers their values, for a network that was made on the meta device."""
        for module in self.modules():
            if isinstance(module, _Norm):
                module.bias = torch.zeros(module.weight.shape)
            elif isinstance(module, _Rotary):
                module.inv_freq = _frequencies(2 * len(module.inv_freq))


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        added: Tensor = self.fn(x, *context)
        return added + x


class _Norm(nn.Module):
    """Layer normalisation whose bias is no parameter but a stored zero."""

    bias: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, eps=1e-5)


class _SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class _Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves of a head as the pairs' two parts."""

    inv_freq: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("inv_freq", _frequencies(width))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the frequencies but never casts them: bfloat16 would turn the last of 257 tokens by up to a radian."""
        self.inv_freq = self.inv_freq.to(fn(self.inv_freq).device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., N, W] turned by each token's place."""
        angles = torch.arange(x.shape[-2], device=x.device)[:, None] * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


def _frequencies(width: int) -> Tensor:
    return 10000.0 ** (-torch.arange(0, width, 2).float() / width)


class _CrossAttention(nn.Module):
    """Attention of normalised image tokens to words as they are, beside a feed-forward part that reads the same."""

    def __init__(self, c: CrossConfig):
        super().__init__()
        self.heads = c.heads
        inner, hidden = c.heads * c.head_width, c.ff_mult * c.dim
        self.norm = _Norm(c.dim)
        self.to_q = nn.Linear(c.dim, inner, bias=False)
        self.to_kv = nn.Linear(c.dim, 2 * c.head_width, bias=False)
        self.to_out = nn.Linear(inner, c.dim, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(c.dim, 2 * hidden, bias=False), _SwiGLU(), nn.Linear(hidden, c.dim, bias=False)
        )

    def forward(self, x: Tensor, words: Tensor, visible: Tensor) -> Tensor:
        x = self.norm(x)
        key, value = self.to_kv(words).chunk(2, dim=-1)
        query = _split(self.to_q(x), self.heads)
        attended = _attention(query, key, value, visible[:, None, None, :])
        out: Tensor = self.to_out(attended) + self.ff(x)
        return out


class _ParallelBlock(nn.Module):
    """Self-attention and a feed-forward part that read the same normalised tokens through one fused projection."""

    def __init__(self, c: CrossConfig):
        super().__init__()
        self.heads = c.heads
        inner, hidden = c.heads * c.head_width, c.ff_mult * c.dim
        self.widths = (inner, c.head_width, c.head_width, 2 * hidden)
        self.norm = _Norm(c.dim)
        self.rotary_emb = _Rotary(c.head_width)
        self.fused_attn_ff_proj = nn.Linear(c.dim, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(inner, c.dim, bias=False)
        self.ff_out = nn.Sequential(_SwiGLU(), nn.Linear(hidden, c.dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, hidden = self.fused_attn_ff_proj(self.norm(x)).split(self.widths, dim=-1)
        query, key = self.rotary_emb(_split(query, self.heads)), self.rotary_emb(key)
        out: Tensor = self.attn_out(_attention(query, key, value, None)) + self.ff_out(hidden)
        return out


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * W] to [B, H, N, W]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def _attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Queries [B, H, N, W] on one head of keys and values [B, L, W]: [B, N, H * W]; queries are divided by W^0.5."""
    shape = (-1, query.shape[1], -1, -1)
    key, value = key[:, None].expand(shape), value[:, None].expand(shape)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible).transpose(1, 2).flatten(2)
