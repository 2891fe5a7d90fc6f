"""A reward model on another machine, behind `diffalign serve-reward`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from diffalign.reward_models.base import RewardInfo, RewardModel, Scores, WeightsError
from diffalign.reward_models.http_json import JsonClient, RequestError
from diffalign.reward_models.media import Media
from diffalign.reward_models.wire import encode_media, info_from_json

__all__ = ["RemoteReward"]

TOKEN_ENV = "DIFFALIGN_REWARD_TOKEN"
"""Environment variable with the token, unless told otherwise."""


LARGEST_REQUEST = 16_000_000
"""Characters of a request, about, which no server's limit is below by default."""


class RemoteReward(RewardModel):
    """Scores that a server computes: heavy models stay on the machine they fit on.

    `info` and `fingerprint` are those of the model on the server, so that scores computed there and here with the same
    weights take each other's place. Pictures are sent as 8-bit RGB in PNG, which every scorer makes of them anyway.
    There is no gradient. A server that fails, refuses or hangs gives invalid scores with its reason, after retries of
    429, 5xx, timeouts and connections that break; only at the start, when it is asked what it serves, is that an error.
    """

    info = RewardInfo(
        name="remote",
        license="that of the model on the server",
        weights=(),
        kind=frozenset({"image", "video"}),
        needs_prompt=False,  # known when the server has been asked
        differentiable=False,
    )

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        model: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        token_env: str = TOKEN_ENV,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
    ):
        """Asks the server what it serves.

        Args:
            path_or_id: Its address, such as http://localhost:8000, or with the model: http://localhost:8000#pickscore.
            model: Which of its models; None is the only one.
            timeout: Seconds for one attempt of a request, a batch of pictures included.
            retries: Further attempts after 429, 5xx, timeouts and connections that break.
            backoff: Seconds before the first of them; doubles with each.
            token_env: Environment variable with the server's token, if it wants one.
            device: Has no effect: the server decides.
            dtype: Likewise.
            local_files_only: Likewise; the server is asked in any case.

        Raises:
            ValueError: If the address or a number is not as described.
            WeightsError: If the server does not answer, refuses the token, or does not serve the model.
        """
        super().__init__()
        address, _, fragment = str(path_or_id or "").partition("#")
        self.client = JsonClient(address, token_env=token_env, timeout=timeout, retries=retries, backoff=backoff)
        self.model = model or fragment or None
        about = self._find(address, token_env)
        self.info = info_from_json(about)
        self.item_ndim = 4 if about.get("item_ndim") == 4 else 3
        self._fingerprint = str(about["fingerprint"])

    def _find(self, address: str, token_env: str) -> Mapping[str, Any]:
        """The server's description of the model."""
        try:
            answer = self.client.get("/v1/models")
            served: dict[str, Mapping[str, Any]] = {str(m["name"]): m for m in answer["models"] if "fingerprint" in m}
        except RequestError as error:
            hint = (
                f"; set {token_env} to its token" if error.status == 401 else "; is `diffalign serve-reward` running?"
            )
            raise WeightsError(f"cannot use the reward models of {address}: {error}{hint}") from error
        except (KeyError, TypeError) as error:
            raise WeightsError(f"{address} is no reward server: /v1/models gives {answer!s:.80}") from error
        if self.model is None and len(served) == 1:
            return served.popitem()[1]
        if self.model not in served:
            wanted = "expected the name of one model" if self.model is None else f"there is no {self.model!r}"
            raise WeightsError(f"{address}: {wanted} (available: {', '.join(sorted(served))})")
        return served[str(self.model)]

    def preprocess(self, item: Media) -> dict[str, Any]:
        """See `RewardModel`: the medium as it is sent."""
        return encode_media(item, self.info.kind)

    def score_prepared(self, prepared: Sequence[dict[str, Any]], texts: Sequence[str]) -> Scores:
        """See `RewardModel`; one request for the batch, or several if it is large."""
        items = [{"prompt": text, **medium} for medium, text in zip(prepared, texts, strict=True)]
        results = [result for group in _requests(items) for result in self._ask(group)]
        uncertainties, answers = [result.uncertainty for result in results], [result.raw for result in results]
        return Scores(
            dims={name: torch.tensor([result.dims[name] for result in results]) for name in self.info.dims},
            uncertainty=torch.tensor(uncertainties) if not all(math.isnan(value) for value in uncertainties) else None,
            raw=answers if any(answers) else None,
            errors=[result.error for result in results],
        )

    def _ask(self, items: Sequence[Mapping[str, Any]]) -> list[_Result]:
        """What the server says of the items of one request."""
        try:
            answer = self.client.post("/v1/score", {"model": self.info.name, "items": items})
            results = [_read_result(result, self.info.dims) for result in answer["results"]]
            if len(results) != len(items):
                raise ValueError(f"{len(results)} results for {len(items)} items")
            return results
        except RequestError as error:
            reason = str(error)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{self.client.host} sent no scores: {error!r:.200}"
        return [_Result(dict.fromkeys(self.info.dims, math.nan), error=reason)] * len(items)

    def fingerprint(self) -> str:
        """That of the model on the server when it was asked first."""
        return self._fingerprint

    @property
    def device(self) -> torch.device:
        """The CPU: here is nothing to put elsewhere."""
        return torch.device("cpu")


@dataclass(frozen=True)
class _Result:
    """What a server says of one item; NaN where it says nothing."""

    dims: Mapping[str, float]
    uncertainty: float = math.nan
    raw: str = ""
    error: str | None = None


def _read_result(content: Mapping[str, Any], names: Sequence[str]) -> _Result:
    """One entry of a server's answer; raises KeyError, TypeError, ValueError or AttributeError if it is none."""
    return _Result(
        dims={name: _number(content["dims"].get(name)) for name in names},
        uncertainty=_number(content.get("uncertainty")),
        raw=str(content.get("raw") or ""),
        error=None if content["valid"] else str(content.get("error") or "the server gave no score and no reason"),
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _requests(items: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The items in their order, in lists of up to `LARGEST_REQUEST` characters; a larger one goes alone."""
    group: list[dict[str, Any]] = []
    total = 0
    for item in items:
        size = sum(
            len(part) for value in item.values() for part in (value if isinstance(value, list) else [str(value)])
        )
        if group and total + size > LARGEST_REQUEST:
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group
