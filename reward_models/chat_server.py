"""Asks a vision-language model behind an OpenAI-compatible server (vLLM, SGLang and others)."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from math import exp
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from diffalign.resumable import write_atomically
from diffalign.reward_models.answering import Answer, Question
from diffalign.reward_models.http_json import JsonClient, RequestError

__all__ = ["ChatServer"]

TOP_LOGPROBS = 20
"""Most probable first tokens that are asked for, the most that the OpenAI interface gives."""
_CACHE_VERSION = 1


class ChatServer:
    """An `Answerer` behind `POST {base_url}/chat/completions`.

    Temperature 0 is sent explicitly: `do_sample`, which some published clients send instead, is not part of the
    interface and leaves the server at its own temperature. An answer that does not come, or not in the format of the
    interface, is an `Answer` with a reason. Retried are 429, 5xx, timeouts and connections that break, nothing else.

    With `cache`, every answer is a file there, found again by template, question, model, pixels and limits, whatever
    the server's address: `model` must name the weights. A process that is killed leaves whole files only.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        token_env: str = "DIFFALIGN_JUDGE_TOKEN",
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 0.5,
        cache: str | Path | None = None,
        image_format: Literal["png", "jpeg"] = "png",
        chat_template_options: Mapping[str, Any] | None = None,
    ):
        """Asks nothing yet.

        Args:
            base_url: Address up to and with the version, such as http://localhost:8000/v1.
            model: Name under which the server serves the model; also its name in the cache.
            token_env: Environment variable with the bearer token, see `JsonClient`.
            concurrency: Requests at once, >= 1.
            timeout: Seconds for one whole request, > 0.
            retries: Further attempts after a failed one, >= 0.
            backoff: Seconds before the first of them, see `JsonClient`.
            cache: Folder for answers, or None.
            image_format: How pictures travel: "png", exact, or "jpeg" of quality 95, as the published clients of
                UnifiedReward send them; another picture, another answer.
            chat_template_options: Sent as `chat_template_kwargs`, such as {"enable_thinking": False} for Qwen3.5.

        Raises:
            ValueError: If an argument is out of range or the address is no http or https URL.
        """
        if not model:
            raise ValueError("expected the name under which the server serves the model, got ''")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        if image_format not in ("png", "jpeg"):
            raise ValueError(f"image_format must be 'png' or 'jpeg', got {image_format!r}")
        self.client = JsonClient(base_url, token_env=token_env, timeout=timeout, retries=retries, backoff=backoff)
        self.model, self.concurrency, self.image_format = model, concurrency, image_format
        self.cache = None if cache is None else Path(cache).expanduser()
        self.chat_template_options = dict(chat_template_options or {})

    @property
    def identity(self) -> str:
        """See `Answerer`: the name of the model and all that is sent beside the question."""
        options = json.dumps(self.chat_template_options, sort_keys=True)
        return f"server {self.model!r} {self.image_format} {options}"

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """See `Answerer`. Equal questions are asked once, at most `concurrency` requests are under way at once."""
        pictures = {id(image): image for question in questions for image in question.images}
        hashes = {key: _hash(image) for key, image in pictures.items()}
        keys = [self._key(question, [hashes[id(image)] for image in question.images]) for question in questions]
        unique = dict(zip(keys, questions, strict=True))
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            answers = dict(zip(unique, pool.map(self._answer, unique, unique.values()), strict=True))
        return [answers[key] for key in keys]

    def _answer(self, key: str, question: Question) -> Answer:
        path = None if self.cache is None else self.cache / key[:2] / f"{key}.json"
        known = None if path is None else _read_cached(path)
        if known is not None:
            return known
        try:
            answer = _read_answer(self.client.post("/chat/completions", self._request(question)), question)
        except RequestError as error:
            return Answer(error=str(error))
        except RecursionError:
            return Answer(error=f"the answer of {self.client.host} is nested too deep to be a chat completion")
        if path is not None and answer.error is None:
            _write_cached(path, question, self.model, answer)
        return answer

    def _request(self, question: Question) -> dict[str, Any]:
        """The body of the request; pictures before the text, as all published templates want it."""
        content = [{"type": "image_url", "image_url": {"url": self._data_url(i)}} for i in question.images]
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}],
            "temperature": 0,
            "max_tokens": question.max_tokens,
        }
        if question.words:
            request |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if self.chat_template_options:
            request["chat_template_kwargs"] = self.chat_template_options
        return request

    def _data_url(self, image: Image.Image) -> str:
        buffer = io.BytesIO()
        options = {"quality": 95} if self.image_format == "jpeg" else {}
        image.save(buffer, self.image_format, **options)
        return f"data:image/{self.image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def _key(self, question: Question, hashes: Sequence[str]) -> str:
        """Hexadecimal digits that change with everything the answer depends on."""
        limits = [question.max_tokens, question.words]
        key = [_CACHE_VERSION, self.identity, question.template, question.text, hashes, limits]
        return sha256(json.dumps(key).encode()).hexdigest()


def _hash(image: Image.Image) -> str:
    """Of the pixels, so that it depends on no encoder."""
    return sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def _read_answer(content: Any, question: Question) -> Answer:
    """The answer in a response, or why it is not what the interface promises."""
    try:
        choice = content["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
        if not isinstance(text, str):
            raise TypeError(f"the message holds {type(text).__name__} instead of text")
        probabilities = _probabilities(choice, question.words) if question.words else {}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        return Answer(error=f"not a chat completion ({error!r:.100}): {json.dumps(content):.100}")
    # JSON may hold halves of surrogate pairs, which no file takes.
    return Answer(text.encode("utf-8", "replace").decode(), reason != "length", probabilities)


def _probabilities(choice: Mapping[str, Any], words: Sequence[str]) -> dict[str, float]:
    """Of the asked words, those among the most probable first tokens."""
    if not choice.get("logprobs"):
        raise ValueError("the server sent no logprobs, which were asked for")
    first = choice["logprobs"]["content"][0]["top_logprobs"]
    return {entry["token"]: exp(min(entry["logprob"], 0.0)) for entry in first if entry["token"] in words}


def _read_cached(path: Path) -> Answer | None:
    """The answer in a file of the cache, None if there is none or the file is damaged."""
    try:
        content = json.loads(path.read_bytes())
        return Answer(str(content["answer"]), bool(content["finished"]), dict(content["probabilities"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cached(path: Path, question: Question, model: str, answer: Answer) -> None:
    """Question and answer as a file that people can read as well.

    Two processes that share the folder may write the same file at once: one of them then finds its temporary file
    renamed already by the other.
    """
    content = {
        "model": model,
        "template": question.template,
        "question": question.text,
        "answer": answer.text,
        "finished": answer.finished,
        "probabilities": dict(answer.probabilities),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        write_atomically(path, json.dumps(content).encode())
