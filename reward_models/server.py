"""A small HTTP server for reward models, the body of `diffalign serve-reward`; the other side is `remote`.

The event loop reads requests, checks the token before the body and sizes before content, and answers. One thread
decodes and scores, for all models: what waits for the same model when it is free is scored as one batch. Nothing that
arrives is executed, unpickled or written anywhere but, a video, into a temporary folder.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import queue
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.reward_models.base import RewardModel
from diffalign.reward_models.media import InvalidMediaError, Media
from diffalign.reward_models.wire import Limits, decode_media, info_to_json, results_to_json

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

__all__ = ["Worker", "build_app", "check_access", "require_server", "run_server"]

logger = logging.getLogger("diffalign")

BODY_SECONDS = 60.0
"""How long a client may take to send a request."""
WAITING_ITEMS = 2048
"""Media that may wait for the worker; beyond, clients are asked to come back."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _Refused(Exception):  # noqa: N818
    """A request that gets an error as its answer."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


@dataclass
class _Job:
    """One request: its items, and where the results go."""

    model: str
    items: list[Mapping[str, Any]]
    done: Future[list[dict[str, Any]]] = field(default_factory=Future)


class Worker:
    """The thread that scores."""

    def __init__(self, models: Mapping[str, RewardModel], batch_size: int, limits: Limits):
        self.models, self.batch_size, self.limits = models, batch_size, limits
        self.waiting = 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="reward-worker", daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def stop(self) -> None:
        """Ends when the job at hand is done."""
        self._jobs.put(None)

    def submit(self, model: str, items: list[Mapping[str, Any]]) -> Future[list[dict[str, Any]]]:
        """Scores items when their turn comes.

        Raises:
            _Refused: If too many wait already.
        """
        job = _Job(model, items)
        with self._lock:
            if self.waiting and self.waiting + len(items) > WAITING_ITEMS:
                raise _Refused(429, f"{self.waiting} items are waiting; come back later", {"Retry-After": "2"})
            self.waiting += len(items)
        self._jobs.put(job)
        return job.done

    def _run(self) -> None:
        held: _Job | None = None
        while (job := held or self._jobs.get()) is not None:
            held, jobs = None, [job]
            # What else waits for the same model joins, up to one batch; the first job of another model is next.
            while sum(len(j.items) for j in jobs) < self.batch_size and not self._jobs.empty():
                following = self._jobs.get()
                if following is None or following.model != job.model:
                    held = following
                    if following is None:
                        self._jobs.put(None)
                    break
                jobs.append(following)
            self._finish(jobs)

    def _finish(self, jobs: Sequence[_Job]) -> None:
        count = sum(len(job.items) for job in jobs)
        jobs = [job for job in jobs if job.done.set_running_or_notify_cancel()]  # others' clients have gone
        if jobs:
            self._answer(jobs)
        with self._lock:
            self.waiting -= count

    def _answer(self, jobs: Sequence[_Job]) -> None:
        """Scores jobs as one batch; where that fails, each by itself, so that only the one to blame gets an error."""
        items = [item for job in jobs for item in job.items]
        try:
            results = self._score(self.models[jobs[0].model], items)
        except Exception as error:  # whatever a model raises: the client is told, and the next job is another one's
            logger.exception("%s failed on %d items", jobs[0].model, len(items))
            if len(jobs) == 1:
                jobs[0].done.set_exception(error)
                return
            for job in jobs:
                self._answer([job])
        else:
            for job in jobs:
                job.done.set_result(results[: len(job.items)])
                results = results[len(job.items) :]

    def _score(self, model: RewardModel, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = [{} for _ in items]
        with tempfile.TemporaryDirectory() as folder:
            media: dict[int, Media] = {}
            for i, item in enumerate(items):
                try:
                    media[i] = decode_media(item, self.limits, Path(folder))
                    if item.get("prompt") is None and model.info.needs_prompt:
                        raise InvalidMediaError(f"there is no prompt, and {model.info.name} cannot score without")
                except InvalidMediaError as error:
                    media.pop(i, None)
                    none = dict.fromkeys(model.info.dims)
                    results[i] = {"valid": False, "dims": none, "uncertainty": None, "raw": None, "error": str(error)}
            if media:
                prompts = [items[i].get("prompt") or "" for i in media]
                output = model.score(list(media.values()), prompts, batch_size=self.batch_size, on_invalid="nan")
                for i, result in zip(media, results_to_json(output), strict=True):
                    results[i] = result
        return results


def require_server() -> Any:
    """The packages of the extra `serve`: fastapi and uvicorn.

    Raises:
        ValueError: If they are not installed.
    """
    try:
        import fastapi
        import uvicorn
    except ImportError as error:
        raise ValueError("serving needs FastAPI and uvicorn: pip install 'diffalign[serve]'") from error
    return fastapi, uvicorn


def build_app(
    models: Sequence[RewardModel], *, token: str | None = None, limits: Limits | None = None, batch_size: int = 32
) -> FastAPI:
    """The application with its worker, which runs as long as the application does.

    Args:
        models: What is served, under the names in their infos, which differ.
        token: What clients have to send as bearer token; None lets everyone in.
        limits: What is accepted; None is the default.
        batch_size: Media per forward pass.

    Raises:
        ValueError: If FastAPI is missing, there is no model, or two have one name.
    """
    fastapi, _ = require_server()
    from fastapi.responses import JSONResponse

    served = {model.info.name: model for model in models}
    if not served or len(served) != len(models):
        raise ValueError(f"expected models with different names, got {[model.info.name for model in models]}")
    for model in models:
        if model.info.groupwise or model.info.pairwise_native:
            raise ValueError(f"{model.info.name} compares media, and requests are scored one by one; serve its parts")
    limits = limits or Limits()
    worker = Worker(served, batch_size, limits)
    about = [
        info_to_json(model.info) | {"fingerprint": model.fingerprint(), "item_ndim": model.item_ndim}
        for model in models
    ]

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    async def guarded(answer: Callable[[], Awaitable[Any]], request: Any) -> Any:
        """The answer as JSON, or the refusal."""
        try:
            if token is not None and not _allowed(request.headers.get("authorization", ""), token):
                raise _Refused(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})
            return JSONResponse(await answer())
        except _Refused as refused:
            return JSONResponse({"error": {"message": str(refused)}}, refused.status, refused.headers)

    app = fastapi.FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    async def health(request: Request) -> Any:
        return JSONResponse({"status": "ok", "models": list(served), "waiting": worker.waiting})

    async def list_models(request: Request) -> Any:
        async def answer() -> Any:
            return {"models": about}

        return await guarded(answer, request)

    async def score(request: Request) -> Any:
        async def answer() -> Any:
            body = await _read_body(request, limits.body)
            model, items = await asyncio.to_thread(_parse, body, served, limits)
            waiting = worker.submit(model, items)
            try:
                return {"results": await asyncio.wrap_future(waiting)}
            except Exception as error:  # whatever the model raised; the worker has logged it
                raise _Refused(500, f"{model} failed: {type(error).__name__}") from error

        return await guarded(answer, request)

    # Plain routes: FastAPI would read a body by itself, before the token and its size are checked.
    app.add_route("/health", health, methods=["GET"])
    app.add_route("/v1/models", list_models, methods=["GET"])
    app.add_route("/v1/score", score, methods=["POST"])
    result: FastAPI = app
    return result


def check_access(host: str, token: str | None) -> None:
    """Raises ValueError if other machines could use the server without a token, or if its packages are missing."""
    require_server()
    if host not in _LOOPBACK and not token:
        raise ValueError(
            f"listening on {host} without a token would let everyone in; name an environment variable that holds one "
            "with --token-env, or listen on 127.0.0.1"
        )


def run_server(app: FastAPI, host: str, port: int) -> None:
    """Answers requests until it is interrupted; uvicorn's log says where.

    Args:
        app: See `build_app`.
        host: Address to listen on; see `check_access`.
        port: Its port; 0 picks a free one.
    """
    _, uvicorn = require_server()
    with suppress(KeyboardInterrupt):  # which uvicorn passes on when it has closed everything
        uvicorn.run(app, host=host, port=port, log_level="info", access_log=False, ws="none")


def _allowed(header: str, token: str) -> bool:
    """Whether the header holds the token; takes as long for every wrong one."""
    return hmac.compare_digest(header.encode("utf-8", "replace"), f"Bearer {token}".encode())


async def _read_body(request: Any, most: int) -> bytes:
    """The body, of which no more than `most` bytes are ever held."""
    too_large = _Refused(413, f"the request is larger than {most} bytes; send fewer media at once")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError as error:
        raise _Refused(408, f"the request did not arrive within {BODY_SECONDS:g} s") from error
    return bytes(body)


def _parse(body: bytes, served: Mapping[str, Any], limits: Limits) -> tuple[str, list[Mapping[str, Any]]]:
    """Model and items of a request."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Refused(400, "the request is no JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("items"), list):
        raise _Refused(400, 'expected {"model": name, "items": [...]}')
    name, items = content.get("model"), content["items"]
    if not isinstance(name, str) or name not in served:
        raise _Refused(404, f"there is no model {name!r:.80} (available: {', '.join(served)})")
    if not 0 < len(items) <= limits.items:
        raise _Refused(413, f"expected 1 to {limits.items} items, got {len(items)}")
    for i, item in enumerate(items):
        prompt = item.get("prompt") if isinstance(item, dict) else 0
        if not (prompt is None or isinstance(prompt, str)):
            raise _Refused(400, f"item {i} must be an object whose prompt is a text or null")
        if prompt is not None and len(prompt) > limits.prompt:
            raise _Refused(413, f"the prompt of item {i} is longer than {limits.prompt} characters")
    return name, items
