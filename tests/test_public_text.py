"""Folders of this machine stay out of what is published; everything else stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from diffalign.public_text import public, public_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/ada/models/mine", "mine"),
        ("/srv/ada/my models/mine/", "mine"),
        ("~/models/mine", "mine"),
        ("C:\\Users\\ada\\mine", "mine"),
        ("/srv/ada/.cache/huggingface/hub/models--owner--name/snapshots/0123abc", "owner/name"),
        ("/cache/models--owner--name/snapshots/0123abc/unet", "owner/name/unet"),
        ("saved /srv/ada/runs/a/checkpoint-3; go on", "saved checkpoint-3; go on"),
        ("diffalign train /srv/ada/config.yaml", "diffalign train config.yaml"),
    ],
)
def test_local_paths_become_their_last_part(text: str, expected: str) -> None:
    assert public(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "diffalign://shapes/held_out",
        "runs/mine",
        "configs/prompts/validation.txt",
        "https://huggingface.co/owner/name",
        "black and/or white, 1/2 of a cat",
        "loss / step",
        "",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert public(text) == text


def test_files_are_shortened_only_where_they_must_be(tmp_path: Path) -> None:
    plain = tmp_path / "plain.json"
    plain.write_text('{"a":   1}')
    assert public_bytes(plain) is None
    assert public_bytes(tmp_path / "weights.safetensors") is None
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"output_dir": "/srv/ada/run", "seed": 3}))
    assert yaml.safe_load(public_bytes(config) or b"") == {"output_dir": "run", "seed": 3}
    lines = tmp_path / "metrics.jsonl"
    lines.write_text('{"step": 1}\n{"step": 2, "message": "see /srv/ada/run"}\n{"torn')
    sent = (public_bytes(lines) or b"").decode().splitlines()
    assert sent[0] == '{"step": 1}'
    assert json.loads(sent[1]) == {"step": 2, "message": "see run"}
    assert sent[2] == '{"torn'
