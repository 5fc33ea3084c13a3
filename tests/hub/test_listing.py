"""Answers about a repository that no hub gives: one line each, and nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from avatarctl.errors import UnusableWeights
from avatarctl.hub.client import list_files
from tests.hub import hub_server
from tests.hub.hub_server import HubServer, Status
from tests.hub.test_pull import NAME, REPO, error_of, incomplete, models

COMMIT = "0123456789abcdef" * 2 + "01234567"


def listing(*names: str, size: str = "5000") -> bytes:
    siblings = ", ".join(
        f'{{"rfilename": {json.dumps(name)}, "lfs": {{"sha256": "{"a" * 64}", "size": {size}, '
        f'"pointerSize": 134}}}}'
        for name in names
    )
    return f'{{"id": "{REPO}", "sha": "{COMMIT}", "siblings": [{siblings}]}}'.encode()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"[" * 200_000, "is not the one of a hub"),
        *((listing("a.safetensors", size=size), "is not the one of a hub")
          for size in ("-5", "1e400", "1" + "0" * 400, "1.5", "true", f"{2**62}")),
        (listing("a.safetensors", "a.safetensors/b.safetensors"), "below a file, not a folder"),
        (listing("x/" * 2000 + "a.safetensors"), "too long a name"),
        (listing("x" * 201), "too long a name"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_answers_beyond_reason(
    body: bytes, says: str, hub: HubServer, client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Content-Type": "application/json"}
    monkeypatch.setattr(
        hub_server._Handler, "_listing", lambda self, name, blobs: self._send(200, body, headers)
    )
    with pytest.raises(UnusableWeights, match=says):
        list_files(REPO)
    assert says in error_of(models("pull", NAME, code=3))


def test_the_same_answer_with_sane_numbers(
    hub: HubServer, client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = listing("a.safetensors", "x" * 200, "b/a.safetensors")
    headers = {"Content-Type": "application/json"}
    monkeypatch.setattr(
        hub_server._Handler, "_listing", lambda self, name, blobs: self._send(200, body, headers)
    )
    assert {file.size for file in list_files(REPO).files.values()} == {5000}


def test_notes_of_somebodys_download_are_no_files(hub: HubServer, client: Path) -> None:
    hub.repos["org/loras"].files[".cache/huggingface/avatarctl.json"] = b'{"license": "forged"}'
    assert sorted(list_files("org/loras").files) == sorted({*hub.repos["org/loras"].files} - {
        ".cache/huggingface/avatarctl.json"
    })  # fmt: skip


def test_a_server_that_has_no_such_range_at_all(hub: HubServer, client: Path) -> None:
    hub.faults["model.safetensors"] = [Status(416)] * 9
    assert "after 0 of" in error_of(models("pull", NAME, code=4))
    assert not incomplete(client)
