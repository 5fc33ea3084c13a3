"""The real client of the hub, pointed at a server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from avatarctl.hub import client as hub_module
from tests.hub.hub_server import HubServer, Repo

CONFIG = b'{"model_type": "wav2vec2"}\n'
WEIGHTS = bytes(range(256)) * 4000
"""1,024,000 bytes: several reads of the client, so that a connection can break between them."""


def wav2vec() -> Repo:
    return Repo(
        {
            "config.json": CONFIG,
            "model.safetensors": WEIGHTS,
            "preprocessor_config.json": b"{}",
            "pytorch_model.bin": WEIGHTS[::-1],
            "README.md": b"# about it",
        }
    )


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A hub with wav2vec 2.0, LoRA files, and StableSyncNet."""
    loras = Repo({"a.safetensors": WEIGHTS[:5000], "sub/b.safetensors": WEIGHTS[:6000], "x.pt": b"pickle",
                  "config.json": b"{}"}, license="other", card={"license_name": "my-own"})  # fmt: skip
    server = HubServer(
        facebook__wav2vec2_base_960h=wav2vec(),
        org__loras=loras,
        ByteDance__LatentSync_1_6=Repo({"stable_syncnet.pt": WEIGHTS[:3000], "other.pt": b"x" * 2000}),
    )
    server.repos["facebook/wav2vec2-base-960h"] = server.repos.pop("facebook/wav2vec2_base_960h")
    server.repos["ByteDance/LatentSync-1.6"] = server.repos.pop("ByteDance/LatentSync_1_6")
    with server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process's client of the hub, as HF_ENDPOINT and HF_HOME would set it; the cache's folder.

    The current folder is an empty one.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("AVATARCTL_WEIGHTS", raising=False)
    monkeypatch.setattr(hub_module, "PAUSE", 0.01)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return tmp_path / "hub"
