"""What the hub says about a repository, and one file of it fetched and checked.

The client is `huggingface_hub`, whose own environment variables hold (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE,
proxies, timeouts). Its own download throws the received part away when the process ends; ours appends to
`DIGEST.incomplete`, so that the next start goes on. The digest that the hub states is the SHA-256 of a large
file, and for a small one the SHA-1 of its git blob.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies

import avatarctl
from avatarctl.errors import (
    AvatarctlError,
    EnvironmentMissing,
    Interrupted,
    UnusableWeights,
    UsageError,
    WeightsMissing,
)
from avatarctl.events import BytesMoved, Emit, Notice
from avatarctl.hub.locate import hub_constants

__all__ = [
    "HubFile",
    "Listing",
    "check_access",
    "digest_of",
    "endpoint",
    "fetch",
    "hub_errors",
    "kept_bytes",
    "list_files",
]

DIGEST: Final = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
ATTEMPTS: Final = 5
"""Tries in a row that brought no byte before a download is given up."""
PAUSE = 1.0
"""Seconds before the second of them; each further pause is twice as long."""
CHUNK: Final = 2**20
AGAIN: Final = "run the same command again: what was fetched is kept"
_RETRIED: Final = frozenset({408, 416, 429, 500, 502, 503, 504})
_MANY: Final = 100_000
_LARGEST: Final = 2**50
"""Bytes of a file, beyond which no listing is believed."""
_LONGEST_NAME: Final = 1024
_LONGEST_PART: Final = 200
"""Bytes between two `/`. Disks take 255; the notes beside a file have longer names than it."""


@dataclass(frozen=True)
class HubFile:
    """One file at one commit. size: bytes, None if the hub does not say; digest: SHA-256 (64 hexadecimal
    digits) or the SHA-1 of the git blob (40)."""

    repo: str
    commit: str
    name: str
    size: int | None
    digest: str

    def __str__(self) -> str:
        return f"{self.repo}/{self.name}"


@dataclass(frozen=True)
class Listing:
    """A repository at one commit. license: as its card says; gated: its owner asks for consent first."""

    repo: str
    commit: str
    license: str
    gated: bool
    files: Mapping[str, HubFile]

    def select(self, names: str) -> list[HubFile]:
        """The files that a name of a row means: the first of "a|b" that exists; all of a folder "a/".

        Raises WeightsMissing if there is none.
        """
        for name in names.split("|"):
            if name.endswith("/"):
                found = [file for path, file in self.files.items() if path.startswith(name)]
            else:
                found = [self.files[name]] if name in self.files else []
            if found:
                return found
        wanted = names.replace("|", " or ")
        raise WeightsMissing(f"the repository has no {wanted}", where=self.repo)


def endpoint() -> str:
    """The address of the hub without a user name or password in it."""
    parts = urlsplit(hub_constants().ENDPOINT)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if host else "the hub"


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Tells in one line what went wrong with `what`; never with the library's text, which may hold secrets.

    Raises WeightsMissing (nothing there, no access, no connection) or UnusableWeights (no hub at all).
    """
    from huggingface_hub import errors

    try:
        yield
    except AvatarctlError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise WeightsMissing(
            "HF_HUB_OFFLINE is set: the hub is not asked", where=what, fix="unset it to fetch"
        ) from error
    except errors.HfHubHTTPError as error:
        cause, fix = _refusal(error, what)
        raise WeightsMissing(cause, where=what, fix=fix) from error
    except errors.LocalEntryNotFoundError as error:
        raise WeightsMissing(f"no connection to {endpoint()}", where=what, fix=AGAIN) from error
    except errors.HTTPError as error:
        cause = f"no connection to {endpoint()} ({type(error).__name__})"
        raise WeightsMissing(
            cause, where=what, fix=f"check the network, HF_ENDPOINT and {_proxies(schemes=True)}"
        ) from error
    except UnicodeEncodeError as error:
        raise WeightsMissing(
            "the token of the hub holds characters that no token has", where=what, fix="set HF_TOKEN anew"
        ) from error


def _refusal(error: Any, what: str) -> tuple[str, str | None]:
    """(cause, what to do) for an HTTP status of 400 or more."""
    from huggingface_hub import errors

    repo = "/".join(what.split("/")[:2])
    status = _status(error)
    if isinstance(error, errors.GatedRepoError):
        return (
            "its owner asks for consent before it can be fetched",
            f"accept the terms at {endpoint()}/{repo}, then set HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint()} has no such repository, or it is private", "check the name, or set HF_TOKEN"
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no such file", None
    if isinstance(error, errors.RevisionNotFoundError):
        return "the commit is gone from the repository", "run the same command again"
    if status in (401, 403):
        return f"no access (HTTP {status})", "check HF_TOKEN and what it may read"
    return f"{endpoint()} answered with HTTP {status}", "try again later"


def _proxies(*, schemes: bool = False) -> str:
    """The variables of the proxies that the client asks, in words; never their values, which may hold a
    password. schemes: with what it takes an address without a scheme for."""
    names = []
    for kind in ("https", "http", "all"):
        name = f"{kind}_proxy" if f"{kind}_proxy" in os.environ else f"{kind.upper()}_PROXY"
        if address := getproxies().get(kind):
            of_http = schemes and "://" not in address
            names.append(f"{name}{', which is an HTTP proxy without socks5:// in front' if of_http else ''}")
    return " and ".join(names) or "the proxy"


def _check_endpoint(address: str) -> None:
    """Raises EnvironmentMissing if the hub's address is none."""
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets, or a port that is no number
        usable = False
    if not usable:
        plain = re.fullmatch(r"[\w.-]+\.\w+(:\d+)?(/[\w./-]*)?", address, re.ASCII)  # nobody's password
        fix = f"set it to https://{address}" if plain else "unset it, or set it to one"
        raise EnvironmentMissing("is no address such as https://HOST", where="HF_ENDPOINT", fix=fix)


def _check_environment() -> None:
    """Asks the client for what it reads on this machine before it can ask anybody.

    Raises UsageError (a time that is none) or EnvironmentMissing (token or certificates cannot be read, a
    proxy cannot be used).
    """
    from huggingface_hub.utils import build_hf_headers, get_session

    constants = hub_constants()
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        if getattr(constants, name) <= 0:
            raise UsageError(f"{name} must be a positive number of seconds", where="environment")
    try:
        build_hf_headers()
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentMissing(
            "the token of the hub cannot be read",
            where=constants.HF_TOKEN_PATH,
            fix="check HF_HOME and HF_TOKEN_PATH, or set HF_TOKEN",
        ) from error
    try:
        get_session()
    except OSError as error:
        raise EnvironmentMissing(
            "the certificates for secure connections cannot be read",
            where="environment",
            fix="check SSL_CERT_FILE and SSL_CERT_DIR",
        ) from error
    except ImportError as error:
        raise EnvironmentMissing(
            "a SOCKS proxy needs the package socksio",
            where=_proxies(),
            fix="`pip install socksio`, or set it to http://HOST:PORT",
        ) from error
    except Exception as error:  # of several classes, not all of them public
        raise EnvironmentMissing(
            "the address of a proxy cannot be used",
            where=_proxies(),
            fix="set it to http://HOST:PORT or socks5://HOST:PORT",
        ) from error


def list_files(repo: str) -> Listing:
    """Every file of the repository as it is now, with sizes and digests.

    Raises WeightsMissing as `hub_errors`; UnusableWeights if the answer is not a hub's, or a file name leads
    out of the repository; what `_check_endpoint` and `_check_environment` raise.
    """
    timeout = float(hub_constants().HF_HUB_ETAG_TIMEOUT)
    _check_endpoint(hub_constants().ENDPOINT)  # with a wrong one the client cannot even be imported
    from huggingface_hub import HfApi

    with hub_errors(repo):
        _check_environment()
        try:
            info = HfApi().model_info(repo, files_metadata=True, timeout=timeout)
            return _read_listing(repo, info)
        except UnicodeEncodeError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UnusableWeights(
                f"the answer of {endpoint()} is not the one of a hub", where=repo, fix="check HF_ENDPOINT"
            ) from error


def _read_listing(repo: str, info: Any) -> Listing:
    """Raises what a wrong answer makes Python raise, or UnusableWeights.

    `.cache/huggingface/` of a repository is left out: somebody uploaded the notes of a download, and they
    would pass for our own about this one.
    """
    commit = str(info.sha)
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or len(info.siblings) > _MANY:
        raise ValueError("no commit")
    files = {}
    for sibling in info.siblings:
        name = _inside(repo, sibling.rfilename)
        if name.startswith(".cache/huggingface/"):
            continue
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if not DIGEST.fullmatch(digest):
            raise ValueError("no digest")
        size = sibling.lfs.size if sibling.lfs else sibling.size
        if size is not None and not (type(size) is int and 0 <= size < _LARGEST):
            raise ValueError("no size")
        files[name] = HubFile(repo, commit, name, size, digest)
    for name in files:
        if any(str(parent) in files for parent in PurePosixPath(name).parents):
            raise UnusableWeights(f"the hub lists {name[:100]!r} below a file, not a folder", where=repo)
    return Listing(repo, commit, _license(info.card_data), bool(info.gated), files)


def _inside(repo: str, name: str) -> str:
    """`name`, which becomes a path on this disk. Raises UnusableWeights unless it stays in its folder."""
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or "\\" in name or ":" in name or not name.isprintable():
        raise UnusableWeights(f"the hub lists a file named {name[:100]!r}", where=repo)
    if len(name.encode()) > _LONGEST_NAME or any(len(part.encode()) > _LONGEST_PART for part in parts):
        raise UnusableWeights(f"the hub lists a file with too long a name: {name[:100]!r}...", where=repo)
    return name


def _license(card: Any) -> str:
    """The licence of a model card; `license_name` says more where `license` is "other"."""
    if card is None:
        return ""
    named = getattr(card, "license_name", None) if card.license in (None, "other") else None
    stated = named or card.license or ""
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)[:200]


def _url_and_headers(file: HubFile) -> tuple[str, dict[str, str]]:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="avatarctl", library_version=avatarctl.__version__)
    # A compressed answer has another length than the file, and no ranges.
    return hf_hub_url(file.repo, file.name, revision=file.commit), headers | {"Accept-Encoding": "identity"}


def check_access(file: HubFile) -> None:
    """Asks whether `file` may be fetched. Raises WeightsMissing if not."""
    from huggingface_hub import get_hf_file_metadata

    url, _ = _url_and_headers(file)
    with hub_errors(file.repo):
        get_hf_file_metadata(url, timeout=float(hub_constants().HF_HUB_ETAG_TIMEOUT))


def kept_bytes(partial: Path) -> int:
    """Bytes of a file that an earlier start has fetched."""
    return partial.stat().st_size if partial.is_file() else 0


def fetch(file: HubFile, partial: Path, emit: Emit, should_stop: Callable[[], bool]) -> None:
    """Completes `partial` from the hub, from where it ends, and checks it.

    Raises:
        WeightsMissing: no access, an answer about something of another size, or the connection brought
            nothing `ATTEMPTS` times; the part is kept.
        UnusableWeights: the bytes are not those that the hub states; the part is removed.
        Interrupted: `should_stop()`; the part is kept.
    """
    resumed = kept_bytes(partial) > 0
    if resumed:
        emit(Notice(f"{file}: going on after {kept_bytes(partial)} bytes"))
    _complete(file, partial, emit, should_stop)
    cause = _difference(file, partial, emit)
    if cause and resumed:
        # The older part may be what is wrong: one new start, before the hub is blamed.
        emit(Notice(f"{file}: {cause}; the part from an earlier start is dropped", "warning"))
        partial.unlink()
        _complete(file, partial, emit, should_stop)
        cause = _difference(file, partial, emit)
    if cause:
        partial.unlink(missing_ok=True)
        raise UnusableWeights(f"{cause}: the file was removed", where=file, fix="run the same command again")


def _difference(file: HubFile, path: Path, emit: Emit) -> str:
    """What is wrong with the bytes, or nothing."""
    size = kept_bytes(path)
    if file.size is not None and size != file.size:
        return f"{size} bytes came instead of {file.size}"
    if digest_of(path, file.digest, lambda done: emit(BytesMoved(f"checking {file}", done, size))) == (
        file.digest
    ):
        return ""
    return f"the {'SHA-256' if len(file.digest) == 64 else 'SHA-1'} is not the one that the hub states"


def _complete(file: HubFile, partial: Path, emit: Emit, should_stop: Callable[[], bool]) -> None:
    """Fetches until the file is whole, through connections that break and servers that are busy."""
    if file.size is not None and kept_bytes(partial) > file.size:
        partial.unlink()
    if file.size == 0:
        partial.touch()
    failures = 0
    while file.size is None or kept_bytes(partial) < file.size:
        before = kept_bytes(partial)
        with hub_errors(str(file)):
            broken = _try(file, partial, emit, should_stop)
        if broken is None and (file.size is None or kept_bytes(partial) >= file.size):
            return
        if before and _status(broken) == 416:
            return  # the file ends here, whatever its stated size: `_difference` names it
        failures = failures + 1 if kept_bytes(partial) <= before else 0
        if failures == ATTEMPTS:
            total = f" of {file.size}" if file.size is not None else ""
            cause = f"after {kept_bytes(partial)}{total} bytes nothing more came in {ATTEMPTS} tries"
            raise WeightsMissing(cause, where=file, fix=AGAIN) from broken
        _wait(PAUSE * 2 ** (failures - 1), should_stop)


def _try(file: HubFile, partial: Path, emit: Emit, should_stop: Callable[[], bool]) -> Exception | None:
    """One request; returns what broke it if that may pass, raises it if not."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        _append(file, partial, emit, should_stop)
    except HfHubHTTPError as error:
        if _status(error) not in _RETRIED:
            raise
        return error
    except HTTPError as error:
        return error
    return None


def _status(error: object) -> int:
    """The HTTP status of an answer, 0 for anything else."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _append(file: HubFile, partial: Path, emit: Emit, should_stop: Callable[[], bool]) -> None:
    """One request for what `partial` lacks; its bytes are appended as they come."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    url, headers = _url_and_headers(file)
    start = kept_bytes(partial)
    if start:
        headers["Range"] = f"bytes={start}-"
    timeout = float(hub_constants().HF_HUB_DOWNLOAD_TIMEOUT)
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        if response.status_code != 206 or not response.headers.get("Content-Range", "").startswith(
            f"bytes {start}-"
        ):
            start = 0  # the server sends the whole file, whatever was asked
        _refuse_other_answer(file, response, partial=response.status_code == 206)
        with partial.open("ab" if start else "wb") as target:
            done = start
            for chunk in response.iter_bytes():
                target.write(chunk)
                done += len(chunk)
                emit(BytesMoved(str(file), done, file.size or 0))
                if file.size is not None and done > file.size:
                    return  # no need to see the rest: `_difference` names it
                if should_stop():
                    raise Interrupted("stopped", where=file, fix=AGAIN)


def _refuse_other_answer(file: HubFile, response: Any, *, partial: bool) -> None:
    """Raises WeightsMissing for an answer about something of another size, before a byte of it is kept: the
    login page of a network, say, which answers everything with "200 OK"."""
    if file.size is None or "Content-Encoding" in response.headers:
        return  # the length of a compressed answer is not the one of the file
    if partial:
        stated = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        stated = response.headers.get("Content-Length", "")
    if stated.isascii() and stated.isdecimal() and len(stated) < 20 and int(stated) != file.size:
        raise WeightsMissing(
            f"the answer is about {int(stated)} bytes, the file has {file.size}: nothing of it was kept",
            where=file,
            fix=f"check that no login page or proxy answers instead of {endpoint()}",
        )


def _wait(seconds: float, should_stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if should_stop():
            raise Interrupted("stopped", fix=AGAIN)
        time.sleep(0.05)


def digest_of(path: Path, like: str, progress: Callable[[int], None] = lambda done: None) -> str:
    """The digest of a file in the form of `like`: SHA-256, or the SHA-1 that git gives its content."""
    if len(like) == 64:
        hashed = hashlib.sha256()
    else:
        hashed = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hashed.update(chunk)
            done += len(chunk)
            progress(done)
    return hashed.hexdigest()
