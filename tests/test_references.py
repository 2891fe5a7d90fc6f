"""Earlier states as the reference: adapters, whole weights, runs that started from an adapter, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.backbones import LoRA, load_policy
from diffalign.references import INITIAL, References


def outputs(policy: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (batch.chosen, torch.tensor([10, 700]), batch.conditioning)
    with torch.no_grad():
        return policy.predict(*arguments), policy.frozen().predict(*arguments)


@pytest.mark.parametrize(
    "kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dora", "full", "continued"))]
)
def test_the_reference_is_the_named_state(
    kind: str, tiny_pipeline: Path, tmp_path: Path, policies: Any, batches: Any
) -> None:
    lora = {"lora": LoRA(rank=2), "dora": LoRA(rank=2, use_dora=True)}.get(kind)
    start = None
    if kind == "continued":
        earlier: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
        policies.move_away(earlier, 0.1)
        earlier.save_trained(tmp_path / "earlier")
        start = tmp_path / "earlier"
    policy: Any = load_policy(str(tiny_pipeline), lora=lora, train=True, start=start)
    references, batch = References(policy), batches(2)
    _, initial = outputs(policy, batch)
    policies.move_away(policy, 0.05)
    kept, _ = outputs(policy, batch)
    references.keep("first")
    policies.move_away(policy, 0.05)
    now, reference = outputs(policy, batch)
    assert torch.equal(reference, initial)  # keeping changes nothing
    assert not torch.equal(now, kept)

    references.use("first")
    assert references.current == "first"
    policy_output, reference = outputs(policy, batch)
    assert torch.equal(policy_output, now)
    torch.testing.assert_close(reference, kept, rtol=0, atol=1e-6)
    assert all(parameter.requires_grad for parameter in policy.trainable_parameters())
    trained = {id(p) for p in policy.trainable_parameters()}
    modules = [policy.denoiser, *([policy._frozen] if policy._frozen is not None else [])]
    assert not any(p.requires_grad for m in modules for p in m.parameters() if id(p) not in trained)

    references.use(INITIAL)
    assert torch.equal(outputs(policy, batch)[1], initial)
    references.use("first")  # a second time, from what is there
    torch.testing.assert_close(outputs(policy, batch)[1], kept, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_later_process_finds_the_states(tiny_pipeline: Path, tmp_path: Path, policies: Any, batches: Any) -> None:
    batch = batches(2)
    policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    policies.move_away(policy, 0.1)
    references = References(policy)
    references.begin(tmp_path)
    references.keep("step-30")
    kept = outputs(policy, batch)[0]

    again: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    found = References(again)
    found.begin(tmp_path)
    found.use("step-30")
    assert torch.equal(outputs(again, batch)[1], kept)
    with pytest.raises(ValueError, match="'step-60' was not kept"):
        found.use("step-60")
    (tmp_path / "references" / "step-90.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="step-90.safetensors is not a readable safetensors file"):
        found.use("step-90")
    with pytest.raises(ValueError, match="'initial' is what training started from"):
        found.keep(INITIAL)
    found.drop("step-90")
    assert not (tmp_path / "references" / "step-90.safetensors").exists()


def test_a_fingerprint_is_of_the_weights(tiny_pipeline: Path, tmp_path: Path, policies: Any) -> None:
    """The same from memory and from the file; a later state takes the earlier one's place in memory only."""
    policy: Any = load_policy(str(tiny_pipeline), lora=LoRA(rank=2), train=True)
    references = References(policy)
    references.begin(tmp_path)
    references.keep("first")
    first = references.fingerprint("first")
    policies.move_away(policy)
    references.keep("second")
    assert references.fingerprint("first") == first != references.fingerprint("second")
    assert references.fingerprint(INITIAL) == INITIAL
    references.keep("first")
    assert references.fingerprint("first") == references.fingerprint("second")
    assert sorted(path.name for path in (tmp_path / "references").iterdir()) == [
        "first.safetensors",
        "second.safetensors",
    ]
