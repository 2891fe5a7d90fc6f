"""The model card of a run, and its way to the Hub: a small server on this machine stands in for the Hub."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import save_file

from diffalign.backbones.base import LORA_FILE
from diffalign.config import RunConfig, dump_config
from diffalign.model_card import CARD, CURVES, card, draw_curves, read_run, render_card, write_card
from diffalign.public_text import public
from diffalign.publishing import PublishingError, files_to_publish, push, push_to_hub

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SCORE = {"value": 0.625, "ci95": [0.5, 0.75], "n": 8, "details": {"wins": 5, "ties": 0, "losses": 3}}
COMPARISON = {
    "scores": {
        "win_rate/pickscore": SCORE,
        "difference/pickscore": {"value": 0.5, "ci95": None, "n": 8, "details": {"base": 20.0, "aligned": 20.5}},
        "judge_score/base": {**SCORE, "value": 0.5},
        "judge_score/aligned": {**SCORE, "value": 0.75},
        "judge_score/difference": {**SCORE, "value": 0.25},
    },
    "n_expected": 8,
    "n_missing": 0,
    "partial": False,
    "sampling": {"guidance_scale": 7.5, "num_inference_steps": 25},
    "warnings": ["few | pairs"],
}


def make_run(folder: Path, **settings: Any) -> Path:
    """What a finished run leaves: configuration, facts, metrics, weights, scores, pictures, caches, checkpoints."""
    raw = {
        "output_dir": str(folder),
        "model": {"pretrained_model_name_or_path": BASE, "lora": {"rank": 4, "alpha": 8.0}},
        "data": {"dataset_name": "yuvalkirstain/pickapic_v2"},
        "trainer": {"name": "diffusion_dpo", "beta": 2000.0},
        "training": {"num_validation_pairs": 2, "validation_prompts": ["a ```red``` [cube]", "a dog"]},
        **settings,
    }
    config = RunConfig.model_validate(raw)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "run.json").write_text(json.dumps({"method": "beta 2000 -> kappa 1000", "kappa": 1000.0, "pairs": 30}))
    rows = [{"step": s, "train/loss": 0.69 / s, "train/implicit_accuracy": 0.5 + s / 400} for s in range(1, 101)]
    rows += [{"step": s, "validation/loss": 0.7, "validation/implicit_accuracy": 0.5} for s in (0, 50, 100)]
    lines = [json.dumps(row) for row in rows] + ['{"step": 7, "event": "warning"}', '{"step": 101, "train/lo']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    save_file({"unet.x.lora_A.weight": torch.ones(2, 2)}, folder / LORA_FILE)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "comparison.json").write_text(json.dumps(COMPARISON))
    (folder / "validation").mkdir()
    for step in (0, 50, 100):
        Image.new("RGB", (8, 8)).save(folder / "validation" / f"step-{step:06d}.png")
    report = {"rows": 40, "kept": 32, "ties": 8, "unlabelled": 0, "identical": 0, "corrupt": []}
    for name in ("cache/abc", "checkpoint-100"):
        (folder / name).mkdir(parents=True)
    (folder / "cache" / "abc" / "manifest.json").write_text(json.dumps({"report": report, "size": [512, 768]}))
    (folder / "checkpoint-100" / "state.pt").write_bytes(b"optimizer")
    shutil.copy(folder / LORA_FILE, folder / "checkpoint-100")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


# --- the card --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_card_of_a_lora_run(run: Path) -> None:
    assert card(str(run)) == f"model card: {run / CARD}"
    loaded = ModelCard.load(run / CARD)
    assert loaded.data.to_dict() == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "datasets": ["yuvalkirstain/pickapic_v2"],
        "library_name": "diffusers",
        "tags": ["diffusers", "preference-alignment", "diffusion-dpo", "diffalign", "lora"],
    }
    text = loaded.text
    for expected in (
        "LoRA weights (rank 4, alpha 8)",
        f"pipe = DiffusionPipeline.from_pretrained('{BASE}')\npipe.load_lora_weights('path/to/this/folder')",
        "split `train`",
        "32 pairs of 40 rows (8 ties), at 512x768 px",
        "Trained on 30 of them; about 2 more",
        "kappa 1000",
        f"({CURVES})",
        "(validation/step-000000.png)",
        "(validation/step-000100.png)",
        "| pickscore | 20 | 20.5 | +0.5 | 62.5% \\[50.0%, 75.0%\\] | 5/0/3 | 8 |",
        "| share of right pictures | 50.0% \\[50.0%, 75.0%\\] | 75.0% ",
        "guidance\\_scale 7.5",
        "few \\| pairs",
        "diffalign train config.yaml\ndiffalign evaluate config.yaml",
        "None was stated",
    ):
        assert expected in text, expected
    assert "step-000050" not in text
    assert "diffalign pairs" not in text
    fence = "````"  # longer than the one in the prompt
    inside = text.partition(f"{fence}yaml\n")[2].partition(f"\n{fence}\n")[0]
    assert yaml.safe_load(inside) == public(yaml.safe_load((run / "config.yaml").read_text()))
    assert str(run.parent) not in text


@pytest.mark.slow
def test_licence_and_place_are_the_users(run: Path) -> None:
    loaded = ModelCard.load(write_card(run, license="openrail++", repo_id="ada/aligned"))
    assert loaded.data.license == "openrail++"
    assert "# aligned\n" in loaded.text
    assert "pipe.load_lora_weights('ada/aligned')" in loaded.text


@pytest.mark.slow
def test_base_that_is_no_hub_model(tmp_path: Path, tiny_pipeline: Path) -> None:
    """A local folder's name says nothing to others and does not get into the front matter; its family does."""
    local = make_run(tmp_path / "local", model={"pretrained_model_name_or_path": str(tiny_pipeline), "lora": {}})
    data = ModelCard.load(write_card(local)).data.to_dict()
    assert "base_model" not in data
    assert data["pipeline_tag"] == "text-to-image"
    model = {"pretrained_model_name_or_path": "diffalign://shapes", "lora": {"rank": 2}}
    drawn = {"prompts": "diffalign://shapes/train", "reward_model": "shapes"}
    text = write_card(make_run(tmp_path / "shapes", model=model, data=None, pairs=drawn), repo_id="a/b").read_text()
    assert "base_model:" not in text
    assert "folder = snapshot_download('a/b')" in text
    assert "by the reward model `shapes`" in text
    assert "diffalign pairs config.yaml\ndiffalign train config.yaml" in text


@pytest.mark.slow
def test_card_of_full_fine_tuning(run: Path) -> None:
    (run / LORA_FILE).unlink()
    (run / "unet").mkdir()
    (run / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    save_file({"x": torch.ones(1)}, run / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = ModelCard.load(write_card(run))
    assert loaded.data["base_model_relation"] == "finetune"
    assert "lora" not in loaded.data.tags
    assert "unet = UNet2DConditionModel.from_pretrained('path/to/this/folder', subfolder=\"unet\")" in loaded.text
    assert f"from_pretrained('{BASE}', unet=unet)" in loaded.text
    names = files_to_publish(run, read_run(run).weights)
    assert {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"} <= set(names)


def test_what_is_missing_is_said(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "evaluation")
    shutil.rmtree(run / "validation")
    shutil.rmtree(run / "cache")
    text = write_card(run).read_text()
    assert "Not evaluated yet" in text
    assert "![" not in text
    assert not (run / CURVES).exists()


@pytest.mark.slow
def test_commands_of_the_run_are_shown_as_they_were(run: Path) -> None:
    (run / "run.json").write_text(json.dumps({"commands": ["diffalign train configs/x.yaml seed=3"]}))
    assert "```bash\ndiffalign train configs/x.yaml seed=3\n```" in write_card(run).read_text()


@pytest.mark.slow
def test_curves(run: Path, tmp_path: Path) -> None:
    content = draw_curves(run)
    assert content is not None
    (tmp_path / "curves.png").write_bytes(content)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1000, 300)
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {(0x3F, 0x8F, 0xD2), (0xE0, 0x80, 0x3A)} <= colors
    assert draw_curves(run) == content


def test_folders_without_a_finished_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        write_card(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no config\.yaml"):
        write_card(tmp_path)
    (run / "evaluation" / "comparison.json").write_text("{}")
    with pytest.raises(ValueError, match="not a comparison"):
        write_card(run)
    (run / "run.json").write_text("[")
    with pytest.raises(ValueError, match="not JSON"):
        write_card(run)
    (run / "run.json").unlink()
    (run / LORA_FILE).unlink()
    with pytest.raises(ValueError, match="holds no trained weights"):
        write_card(run)


def test_a_refiners_example_starts_from_an_image(run: Path) -> None:
    refiner = dataclasses.replace(read_run(run), family="StableDiffusionXLImg2ImgPipeline")
    text = render_card(refiner)
    assert "pipeline_tag: image-to-image" in text
    assert 'pipe("a red cube", image=image, strength=0.3)' in text
    assert "image=image" not in render_card(read_run(run))


def test_both_experts_are_loaded(run: Path) -> None:
    second = run / "pytorch_lora_weights_transformer_2.safetensors"
    shutil.copy(run / LORA_FILE, second)
    line = f"pipe.load_lora_weights('ada/aligned', weight_name='{second.name}', load_into_transformer_2=True)"
    assert line in render_card(read_run(run), repo_id="ada/aligned")
    assert second.name in files_to_publish(run, read_run(run).weights)


def test_weights_that_went_on_from_others_say_so(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "started_from": "/srv/ada/runs/first", "cache": "abc"}))
    (run / "cache" / "other").mkdir()
    (run / "cache" / "other" / "manifest.json").write_text("{}")  # the run notes which cache was its own
    text = render_card(read_run(run))
    assert "Training went on from the weights `first`, which are contained in these" in text
    assert "32 pairs of 40 rows" in text
    assert "/srv/ada" not in text


# --- the Hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """The part of the Hub's protocol that an upload of small files speaks; remembers what it was sent."""

    def __init__(self) -> None:
        hub = self
        self.requests: list[str] = []
        self.files: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}
        self.refuse = ""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(b"")

            def do_POST(self) -> None:
                self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def answer(self, body: bytes) -> None:
                hub.requests.append(self.path)
                known = self.headers.get("Authorization") == "Bearer hf_right"
                status, content = hub.reply(self.path, body) if known else (401, {"error": "Invalid username"})
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.refuse and self.refuse in path:
            return 403, {"error": "no rights here"}
        if "whoami" in path:
            return 200, {"name": "ada", "type": "user"}
        if path.endswith("/repos/create"):
            self.created = json.loads(body)
            return 200, {"url": f"{self.address}/ada/aligned"}
        if "/preupload/" in path:
            wanted = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return 200, {"files": [{**f, "shouldIgnore": False, "oid": None} for f in wanted]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.address}/ada/aligned/commit/1"}
        if "validate-yaml" in path:
            return 200, {"errors": [], "warnings": []}
        return 404, {"error": "Repository not found"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = Hub()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.mark.slow
def test_push_uploads_what_explains_the_weights_and_nothing_else(hub: Hub, run: Path) -> None:
    url = push_to_hub(run, "ada/aligned", private=True, license="mit", token="hf_right", endpoint=hub.address)
    assert url == f"{hub.address}/ada/aligned/commit/1"
    assert set(hub.files) == {
        CARD,
        CURVES,
        LORA_FILE,
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "evaluation/comparison.json",
        "validation/step-000000.png",
        "validation/step-000100.png",
    }
    for name, sent in hub.files.items():
        if name != "config.yaml":
            assert sent == (run / name).read_bytes(), name
    assert yaml.safe_load(hub.files["config.yaml"]) == public(yaml.safe_load((run / "config.yaml").read_text()))
    assert not any(str(run.parent).encode() in sent for sent in hub.files.values())
    assert b"pipe.load_lora_weights('ada/aligned')" in hub.files[CARD]
    assert hub.created.get("private") or hub.created.get("visibility") == "private"
    assert sum("/commit/" in path for path in hub.requests) == 1


@pytest.mark.slow
def test_a_card_edited_by_hand_is_published_as_it_is(hub: Hub, run: Path) -> None:
    edited = write_card(run).read_text().replace("# run", "# My own words")
    (run / CARD).write_text(edited)
    push_to_hub(run, "ada/aligned", token="hf_right", endpoint=hub.address)
    assert hub.files[CARD].decode() == edited
    write_card(run)  # written here and untouched: the place is filled in
    push_to_hub(run, "ada/aligned", token="hf_right", endpoint=hub.address)
    assert b"load_lora_weights('ada/aligned')" in hub.files[CARD]


@pytest.mark.slow
def test_refusals_send_nothing(hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("aligned", "a/b/c", "ada/no spaces"):
        with pytest.raises(PublishingError, match="cannot be the name of a repository"):
            push_to_hub(run, name, token="hf_right", endpoint=hub.address)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PublishingError, match="no token for the Hub, nothing was uploaded") as error:
        push_to_hub(run, "ada/aligned", endpoint=hub.address)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishingError, match="offline mode is on"):
        push(str(run), "ada/aligned")
    assert hub.requests == []
    assert not (run / CARD).exists()
    with pytest.raises(ValueError, match="does not exist"):
        push_to_hub(tmp_path / "none", "ada/aligned", token="hf_right", endpoint=hub.address)


@pytest.mark.slow
def test_hub_that_is_away_or_refuses(hub: Hub, run: Path) -> None:
    with pytest.raises(PublishingError, match="does not accept the token .*, nothing was uploaded") as error:
        push_to_hub(run, "ada/aligned", token="hf_wrong", endpoint=hub.address)
    assert "\n" not in str(error.value)
    hub.refuse = "/repos/create"
    with pytest.raises(PublishingError, match=r"could not upload to ada/aligned, .* no rights here") as error:
        push_to_hub(run, "ada/aligned", token="hf_right", endpoint=hub.address)
    assert "\n" not in str(error.value)
    assert hub.files == {}
    with pytest.raises(PublishingError, match="the Hub is out of reach"):
        push_to_hub(run, "ada/aligned", token="hf_right", endpoint="http://127.0.0.1:9")
