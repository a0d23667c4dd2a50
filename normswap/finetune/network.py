"""Fetching with an end: without a network what is cached is used, and what is not fails at once.

Libraries that fetch try again for minutes. Here one connection to the hub is tried first; if none comes about, the hub
library is offline for the time of the block. Nothing is set for good, and no environment variable is touched.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

_PATIENCE = 4.0  # seconds for a name server and a handshake
_SLOWEST = 10.0  # seconds without an answer, for libraries that would wait without end


class Network(NamedTuple):
    """Whether the hub, or the proxy before it, answers; if not, what is in the way and what to do about it."""

    is_reachable: bool
    obstacle: str = ""


@contextmanager
def bounded_fetching() -> Iterator[Network]:
    """Yield whether the hub can be reached; if not, whatever the block asks of it fails at once if it is not cached."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Network(False, "HF_HUB_OFFLINE forbids fetching them: unset it")
        return
    if _answers(*_address(constants.ENDPOINT)):
        yield Network(True)
        return
    host = urlsplit(constants.ENDPOINT).hostname
    before, patience = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    _set_offline(constants, True)
    socket.setdefaulttimeout(_SLOWEST)
    try:
        yield Network(False, f"{host} cannot be reached: connect to the network")
    finally:
        _set_offline(constants, before)
        socket.setdefaulttimeout(patience)


def _set_offline(constants: Any, value: bool) -> None:
    import huggingface_hub.utils as utils

    constants.HF_HUB_OFFLINE = value
    # Older versions decide it for a session when that is made.
    getattr(utils, "reset_sessions", lambda: None)()


def _address(url: str) -> tuple[str, int]:
    """The host and port to which a request for `url` connects first: those of a proxy, if one is set for it."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    default = {"http": 80, "https": 443}.get(parts.scheme, 1080)
    return parts.hostname or "", parts.port or default


def _answers(host: str, port: int) -> bool:
    """Say whether a connection comes about in time. In a thread, since name servers keep to no limit."""
    answers: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), _PATIENCE).close()
            answers.append(True)
        except OSError:
            answers.append(False)

    thread = Thread(target=connect, name=f"connection to {host} (process {os.getpid()})", daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return answers == [True]
