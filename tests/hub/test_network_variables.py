"""Proxies and addresses of the hub as they are set on machines: one line, what to set, never a password."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tests.hub.hub_server import HubServer
from tests.hub.pulling import NAME, error_of, models

CLOSED = "127.0.0.1:9"


@pytest.fixture
def proxied(client: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A client that has made no session yet, on a machine that states no proxy and excepts nobody."""
    for kind in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{kind}_proxy", raising=False)
        monkeypatch.delenv(f"{kind.upper()}_PROXY", raising=False)
    close_session()
    yield monkeypatch
    close_session()


@pytest.mark.parametrize(
    ("address", "fix"),
    [
        ("hf-mirror.com", "(set it to https://hf-mirror.com)"),
        ("hub.example.org:8080/hf", "(set it to https://hub.example.org:8080/hf)"),
        ("me:secret@hub.example.org", "(unset it, or set it to one)"),
        ("ftp://hub.example.org", "(unset it, or set it to one)"),
        ("https://[::1", "(unset it, or set it to one)"),
        ("https://", "(unset it, or set it to one)"),
        ("", "(unset it, or set it to one)"),
    ],
)
def test_an_endpoint_that_is_no_address(address: str, fix: str, proxied: pytest.MonkeyPatch) -> None:
    proxied.setattr(constants, "ENDPOINT", address)
    error = error_of(models("pull", NAME, code=4))
    assert error == f"HF_ENDPOINT: is no address such as https://HOST {fix}"


@pytest.mark.parametrize("address", ["socks5://me:secret@127.0.0.1:1", "socks5h://127.0.0.1:1"])
@pytest.mark.parametrize("variable", ["ALL_PROXY", "https_proxy"])
@pytest.mark.skipif(find_spec("socksio") is not None, reason="socksio is here")
def test_a_socks_proxy(variable: str, address: str, proxied: pytest.MonkeyPatch) -> None:
    proxied.setenv(variable, address)
    error = error_of(models("pull", NAME, code=4))
    assert error.startswith(f"{variable}: a SOCKS proxy needs the package socksio (`pip install socksio`")
    assert "secret" not in error


@pytest.mark.parametrize(
    "address", ["socks4://127.0.0.1:1", "ftp://127.0.0.1:1", "http://127.0.0.1:port", "127.0.0.1:port", ":::"]
)
def test_a_proxy_that_is_none(address: str, proxied: pytest.MonkeyPatch) -> None:
    proxied.setenv("HTTP_PROXY", address)
    error = error_of(models("pull", NAME, code=4))
    assert error.startswith("HTTP_PROXY: the address of a proxy cannot be used (set it to http://HOST:PORT")


def test_a_proxy_without_a_scheme_is_asked_and_named_where_it_fails(
    hub: HubServer, proxied: pytest.MonkeyPatch
) -> None:
    """It is one of HTTP then, which may be right: only where nothing comes is it worth a word."""
    proxied.setenv("HTTP_PROXY", CLOSED)
    error = error_of(models("pull", NAME, code=4))
    assert "no connection to" in error
    assert "HF_ENDPOINT and HTTP_PROXY, which is an HTTP proxy without socks5:// in front" in error
    assert hub.requests == []
    close_session()
    proxied.setenv("HTTP_PROXY", hub.url.removeprefix("http://"))
    models("pull", NAME)
    assert hub.requests, "the server answers what a proxy is asked"


def test_a_proxy_that_is_excepted_is_not_looked_at(hub: HubServer, proxied: pytest.MonkeyPatch) -> None:
    proxied.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    proxied.setenv("NO_PROXY", "*")
    models("pull", NAME)
    assert hub.requests
