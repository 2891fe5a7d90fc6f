"""What tests of judges share: tiny random models in the published layouts, a server that says what it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from diffalign.reward_models.answering import Answer, Question

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
"""Where the published texts are in a development checkout; they are no part of the project."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>"]  # fmt: skip


def data_folder(name: str, *files: str) -> Path:
    """A folder of published texts, or a skipped test."""
    for file in files:
        if not (DATA / name / file).is_file():
            pytest.skip(f"{file} is not in ../shared/data/{name}")
    return DATA / name


def noise(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that make every part matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan = p[0].numel() if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator) * (fan**-0.5 if p.ndim > 1 else 0.1))
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)


def save_vlm(folder: Path) -> Path:
    """A random Qwen2.5-VL with processor, as transformers publishes it; "Yes", "No", "yes", "no" are one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={c: i for i, c in enumerate(alphabet)}, merges=[], pad_token=_CONTROL[0], eos_token=_CONTROL[2],
        additional_special_tokens=_CONTROL,
    )  # fmt: skip
    tokenizer.add_tokens(["Yes", "No", "yes", "no"])
    pixels = {"min_pixels": 28 * 28, "max_pixels": 4 * 28 * 28}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**pixels), tokenizer, Qwen2VLVideoProcessor(**pixels), chat_template=CHAT_TEMPLATE
    )
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None,
            "eos_token_id": ids("<|im_end|>"), "pad_token_id": ids("<|endoftext|>"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    randomise(model)
    model.generation_config = GenerationConfig(  # sampling, as published models have it
        eos_token_id=[ids("<|im_end|>"), ids("<|endoftext|>")], pad_token_id=ids("<|endoftext|>"),
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20,
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_clip_flant5(folder: Path, *, tied: bool = False) -> Path:
    """A random CLIP-FlanT5 in the published layout: shards of a T5 with a projector, a CLIP beside it in `tower`."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁Yes", *sorted(set("abcdefghijklmnopqrstuvwxyzADEHPRSTU,.:?\"'"))]
    tokenizer = T5Tokenizer(vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=48, feed_forward_proj="gated-gelu", tie_word_embeddings=tied, **sizes)
    t5 = T5ForConditionalGeneration(config)
    if not tied:  # transformers 5 ties every new T5
        t5.lm_head.weight = torch.nn.Parameter(torch.empty(48, 16))
    projector = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.GELU(), torch.nn.Linear(16, 16))
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14, "projection_dim": 8}  # fmt: skip
    text = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "projection_dim": 8}  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for seed, part in enumerate((t5, projector, clip)):
        randomise(part, seed)
    clip.save_pretrained(folder / "tower")
    state = t5.state_dict()
    if tied:
        del state["lm_head.weight"]
    state |= {f"mm_projector.{name}": value for name, value in projector.state_dict().items()}
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, held in shards.items():
        torch.save({name: state[name].clone() for name in held}, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    published = {
        **sizes, "vocab_size": 48, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": tied,
        "model_type": "clip_t5", "architectures": ["CLIPT5ForConditionalGeneration"], "decoder_start_token_id": 0,
        "pad_token_id": 0, "eos_token_id": 1, "mm_vision_tower": str(folder / "tower"), "mm_hidden_size": 24,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(published))
    tokenizer.save_pretrained(folder)
    return folder


class Say:
    """An `Answerer` that says what a function makes of each question."""

    def __init__(self, reply: Callable[[Question], str | Answer], identity: str = "say"):
        self.reply, self.identity = reply, identity
        self.asked: list[Question] = []

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += questions
        replies = [self.reply(question) for question in questions]
        return [reply if isinstance(reply, Answer) else Answer(reply) for reply in replies]


Reply = tuple[int, bytes]


def completion(text: str | None, reason: str = "stop", logprobs: dict[str, float] | None = None) -> Reply:
    """A good response of an OpenAI-compatible server."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    if logprobs is not None:
        top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
        choice["logprobs"] = {"content": [{"token": text, "top_logprobs": top}]}
    return 200, json.dumps({"choices": [choice]}).encode()


class FakeServer:
    """A real HTTP server on this machine whose replies a test decides.

    Attributes:
        reply: From a request and its number (from 0) to status and body; may sleep, or change `promised`.
        requests: The bodies that came, as JSON.
        headers: Their headers.
        most: Most requests that were under way at once.
    """

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda request, number: completion("yes")
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.promised: int | None = None
        self.most = self._now = 0
        self._lock = threading.Lock()
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer._handle(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Patient(ThreadingHTTPServer):
            request_queue_size = 128  # five, as it is otherwise, is fewer than ask at once

        self._server = Patient(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            status, body = self.reply(request, number)
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(body) if self.promised is None else self.promised))
            handler.end_headers()
            handler.wfile.write(body)
        except OSError:
            pass  # the client did not wait
        finally:
            with self._lock:
                self._now -= 1

    def hang(self, request: dict[str, Any], number: int) -> Reply:
        """A reply that never comes."""
        self.released.wait(30)
        return completion("late")

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        time.sleep(0)


@pytest.fixture
def server() -> Any:
    fake = FakeServer()
    yield fake
    fake.close()
