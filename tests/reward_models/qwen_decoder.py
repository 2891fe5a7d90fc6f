"""Qwen2's decoder from its definition, in NumPy and float64, with positions 0, 1, 2, ..."""

from __future__ import annotations

import numpy as np
import torch


def decode(text_model: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    """Final normed states [L, D] of embeddings [L, D], with the weights of a Qwen2VLTextModel."""
    config = text_model.config
    w = {name: value.double().numpy() for name, value in text_model.state_dict().items()}
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    theta = config.rope_parameters["rope_theta"]
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(0, size, 2) / size)
    turn = np.exp(1j * angles)

    def norm(values: np.ndarray, name: str) -> np.ndarray:
        return values / np.sqrt((values**2).mean(-1, keepdims=True) + config.rms_norm_eps) * w[name + ".weight"]

    def rotate(values: np.ndarray) -> np.ndarray:
        """A pair is an element of the first half and its partner in the second, turned as a complex number."""
        turned = (values[:, : size // 2] + 1j * values[:, size // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    unseen = np.triu(np.full((len(x), len(x)), -np.inf), 1)
    for layer in range(config.num_hidden_layers):
        at = f"layers.{layer}."
        y = norm(x, at + "input_layernorm")
        q, k, v = (y @ w[f"{at}self_attn.{n}_proj.weight"].T + w[f"{at}self_attn.{n}_proj.bias"] for n in "qkv")
        results = []
        for head in range(heads):
            group = head * groups // heads
            own, shared = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
            logits = rotate(q[:, own]) @ rotate(k[:, shared]).T / np.sqrt(size) + unseen
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            results.append(weights / weights.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(results, axis=-1) @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm")
        gate = y @ w[at + "mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "norm")
