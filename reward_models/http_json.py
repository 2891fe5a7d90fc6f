"""A client for JSON over HTTP that always comes back: each request has a deadline, and so has each answer's size.

The standard library is enough for it; proxies of the environment are not used, since a scorer's server is a machine of
one's own. Retried are 429, 5xx, timeouts and connections that break, a bounded number of times; a server that is not
there, is not trusted or speaks something else is not asked again.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import time
from contextlib import suppress
from threading import Timer
from typing import Any
from urllib.parse import urlsplit

__all__ = ["JsonClient", "RequestError"]

LARGEST_ANSWER = 64_000_000
"""Bytes of a response that are read at most."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts at most, whatever the server's Retry-After says."""


class RequestError(RuntimeError):
    """A request without a usable answer; the message is one line.

    Attributes:
        status: HTTP status, or None where none came.
        again: Whether another attempt might have brought one.
        wait: Seconds that the server asked to wait, 0 if it did not.
    """

    def __init__(self, reason: str, status: int | None = None, *, again: bool = False, wait: float = 0.0):
        super().__init__(reason)
        self.status, self.again, self.wait = status, again, wait


class JsonClient:
    """Sends JSON to one server and gives back its JSON.

    Safe to use from several threads: each request has its own connection.
    """

    def __init__(
        self, url: str, *, token_env: str | None = None, timeout: float = 60.0, retries: int = 3, backoff: float = 0.5
    ):
        """Asks nothing yet.

        Args:
            url: Address of the server, such as http://localhost:8000, with a path if its interface is below one.
            token_env: Environment variable with the bearer token, read at each request and sent if it is set.
            timeout: Seconds for one whole attempt, from connecting to the last byte, > 0.
            retries: Further attempts after a failed one, >= 0.
            backoff: Seconds before the first of them; each later one waits twice as long, or as long as the server
                says, at most `LONGEST_PAUSE`.

        Raises:
            ValueError: If the address is no http or https URL, holds a password, or a number is out of range.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected an address such as http://localhost:8000, got {url!r}")
        if parts.username or parts.password:
            raise ValueError("the address holds a password; put the token into an environment variable instead")
        if timeout <= 0 or retries < 0 or backoff < 0:
            raise ValueError(
                f"expected timeout > 0, retries >= 0 and backoff >= 0, got {timeout:g}, {retries} and {backoff:g}"
            )
        self.secure, self.host, self.port = parts.scheme == "https", parts.hostname, parts.port
        self.root = parts.path.rstrip("/")
        self.token_env, self.timeout, self.retries, self.backoff = token_env, timeout, retries, backoff

    def get(self, path: str) -> Any:
        """The answer to a GET of `path`, below the address; errors as in `post`."""
        return self._ask("GET", path, None)

    def post(self, path: str, content: Any) -> Any:
        """The answer to a POST of JSON.

        Raises:
            RequestError: If no answer came in time, not with a status of success, or not as JSON, after all retries.
        """
        return self._ask("POST", path, json.dumps(content, allow_nan=False).encode())

    def _ask(self, method: str, path: str, body: bytes | None) -> Any:
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(method, path, body)
            except RequestError as error:
                if error.again and attempt < self.retries:
                    time.sleep(min(max(self.backoff * 2**attempt, error.wait), LONGEST_PAUSE))
                    continue
                tried = f" ({attempt + 1} attempts)" if attempt else ""
                raise RequestError(f"{error}{tried}", error.status, again=error.again) from error
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, method: str, path: str, body: bytes | None) -> Any:
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.timeout)
        headers = {"Accept": "application/json"} | ({} if body is None else {"Content-Type": "application/json"})
        if self.token_env is not None and (token := os.environ.get(self.token_env, "").strip()):
            headers["Authorization"] = f"Bearer {token}"
        started = time.monotonic()
        deadline: Timer | None = None
        try:
            connection.connect()
            # The socket's own timeout starts anew with every byte; this one counts for the whole request.
            left = max(self.timeout - (time.monotonic() - started), 0.001)
            deadline = Timer(left, _shut_socket, [connection.sock])
            deadline.daemon = True
            deadline.start()
            connection.request(method, self.root + path, body, headers)
            response = connection.getresponse()
            content = response.read(LARGEST_ANSWER + 1)
            if response.length and len(content) <= LARGEST_ANSWER:  # read(n) is silent about a body that ends early
                raise http.client.IncompleteRead(content, response.length)
        except (OSError, http.client.HTTPException) as error:
            # A socket that the timer shut fails in ways that do not look like a timeout.
            if isinstance(error, TimeoutError) or time.monotonic() - started >= self.timeout:
                raise RequestError(f"no answer from {self.host} within {self.timeout:g} s", again=True) from error
            what = str(error) or type(error).__name__
            raise RequestError(f"the connection to {self.host} failed: {what}", again=_passes(error)) from error
        finally:
            if deadline is not None:
                deadline.cancel()
            connection.close()
        if not 200 <= response.status < 300:
            again = response.status == 429 or response.status >= 500
            reason = f"{self.host} answered {response.status}: {_reason(response, content)}"
            raise RequestError(reason, response.status, again=again, wait=_retry_after(response))
        if len(content) > LARGEST_ANSWER:
            raise RequestError(f"the answer of {self.host} is longer than {LARGEST_ANSWER} bytes", response.status)
        try:
            return json.loads(content)
        except ValueError as error:
            shown = " ".join(content[:80].decode("utf-8", "replace").split())
            raise RequestError(f"the answer of {self.host} is no JSON: {shown!r}", response.status) from error


def _passes(error: OSError | http.client.HTTPException) -> bool:
    """Whether another attempt may get through where a connection failed.

    A server with more callers than it takes at once, or one that is being restarted, resets connections or ends them
    in the middle; a network may have no way there for a moment. If nobody listens at the address, or somebody who is
    not trusted, it is the address that is wrong.
    """
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, ConnectionRefusedError | ssl.SSLError):
        return isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    return isinstance(error, OSError | http.client.IncompleteRead)


def _shut_socket(sock: socket.socket) -> None:
    """Ends the wait of whichever thread reads from the socket."""
    with suppress(OSError):
        # That of the plain socket: what TLS adds to it is not meant for another thread.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _reason(response: http.client.HTTPResponse, content: bytes) -> str:
    """The server's own reason on one line: {"error": text} or {"error": {"message": text}} where it sends that."""
    try:
        error = json.loads(content)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        text = content[:200].decode("utf-8", "replace")
    return " ".join(text.split())[:200] or response.reason


def _retry_after(response: http.client.HTTPResponse) -> float:
    """Seconds of a Retry-After header; 0 without one, and for a date, which the usual pause serves as well."""
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if value.isdigit() else 0.0
