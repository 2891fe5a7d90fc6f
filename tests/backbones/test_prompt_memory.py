"""Embeddings that are remembered: what is encoded how often, and that pictures stay those of the plain pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.backbones import load_policy
from diffalign.backbones.prompt_memory import PromptMemory
from tests.backbones.families import sd3

PROMPTS = ["a red square", "a blue circle", "a red square"]


def embed(prompts: list[str]) -> Mapping[str, Tensor]:
    """Rows of 4 numbers, 16 bytes, that say which prompt they are of."""
    EMBEDDED.append(prompts)
    return {"hidden": torch.tensor([[float(len(prompt))] * 4 for prompt in prompts])}


EMBEDDED: list[list[str]] = []


@pytest.fixture
def embedded() -> list[list[str]]:
    EMBEDDED.clear()
    return EMBEDDED


def lengths(rows: Mapping[str, Tensor]) -> list[int]:
    return [int(row[0]) for row in rows["hidden"]]


def test_a_prompt_is_encoded_once_per_list_and_a_list_once(embedded: list[list[str]]) -> None:
    memory = PromptMemory()
    for _ in range(2):
        assert lengths(memory.recall(["aa", "b", "aa", "ccc", "b"], embed)) == [2, 1, 2, 3, 1]
    assert embedded == [["aa", "b", "ccc"]]
    assert lengths(memory.recall(["b", "aa"], embed)) == [1, 2]  # another list: as a batch without memory encodes it
    assert embedded[1:] == [["b", "aa"]]
    memory.clear()
    assert memory.held == 0
    assert lengths(memory.recall(["b", "aa"], embed)) == [1, 2]
    assert len(embedded) == 3


def test_a_full_memory_keeps_what_it_has(embedded: list[list[str]]) -> None:
    memory = PromptMemory(limit=40)
    for _ in range(3):  # of a longer cycle, a memory that drops the oldest would find nothing
        for prompts in (["a"], ["bb"], ["ccc"]):
            assert lengths(memory.recall(prompts, embed)) == [len(prompts[0])]
    assert memory.held == 32
    assert embedded == [["a"], ["bb"], ["ccc"], ["ccc"], ["ccc"]]


@contextmanager
def encodings(policy: Any) -> Iterator[list[int]]:
    """Rows of every call of the text encoder inside the block."""
    rows: list[int] = []
    hook = policy.pipeline.text_encoder.register_forward_hook(
        lambda module, arguments, output: rows.append(len(output[0])), always_call=True
    )
    try:
        yield rows
    finally:
        hook.remove()


def test_the_text_encoder_runs_for_new_prompts_alone(tiny_pipeline: Path) -> None:
    policy: Any = load_policy(str(tiny_pipeline))
    how: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 2}
    with encodings(policy) as rows:
        first = policy.sample(PROMPTS, [0, 1, 2], **how)
        assert rows == [2, 1]  # two prompts, and the unconditional row
        assert torch.equal(policy.sample(PROMPTS, [0, 1, 2], **how), first)
        assert policy.encode_unconditional(3).tensors["hidden"].shape[0] == 3
        assert rows == [2, 1]
        policy.sample(["a green circle"], [0], **how)
        assert rows == [2, 1, 1]
    policy.free_encoders()  # they may come back as others
    policy.reload_encoders()
    with encodings(policy) as rows:
        assert torch.equal(policy.sample(PROMPTS, [0, 1, 2], **how), first)
        assert rows == [2, 1]


def test_the_unconditional_rows_are_the_empty_prompt(tiny_pipeline: Path) -> None:
    policy: Any = load_policy(str(tiny_pipeline))
    expected = policy.encode_prompts(["", ""])
    for _ in range(2):
        torch.testing.assert_close(dict(policy.encode_unconditional(2).tensors), dict(expected.tensors))


def test_pictures_of_half_precision_text_are_the_pipelines(tmp_path: Path) -> None:
    """The pipeline takes its latents' dtype from its embeddings: they must come in the encoder's own."""
    family = sd3.FAMILIES[0]
    family.save(tmp_path / "pipeline")
    policy: Any = load_policy(str(tmp_path / "pipeline"), size=family.size, dtype=torch.bfloat16)
    assert policy.pipeline.text_encoder.dtype == torch.bfloat16
    seeds, guidance = [0, 1], 3.0
    drawn = policy.sample(PROMPTS[:2], seeds, guidance_scale=guidance, num_inference_steps=2)
    with torch.no_grad(), policy._drawing_weights(False):
        plain = policy.pipeline(
            prompt=PROMPTS[:2],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=2,
            output_type="pt",
            **policy._sampling_arguments(guidance),
        ).images
    torch.testing.assert_close(drawn, plain.float(), rtol=0, atol=1e-6)
