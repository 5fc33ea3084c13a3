"""The networks that preparation needs, loaded when one is first touched, and who they are."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from avatarctl.data.known import Known
from avatarctl.errors import WeightsMissing
from avatarctl.events import Emit
from avatarctl.loading.sources import Sources, check_packaged, find_sources, missing_line
from avatarctl.registry import Row, encoder_part
from avatarctl.weights.weight_file import WeightFile

if TYPE_CHECKING:
    import torch
    from torch import nn

    from avatarctl.config import RunConfig
    from avatarctl.loading.modules import Part, SomeModules

__all__ = ["Encoders"]

_FILES: Final = {"vae": ("vae",), "text": ("text", "tokenizer"), "audio": ("audio",), "image": ("clip",)}
"""What in `Sources.encoders` a part is loaded from."""


class Encoders:
    """Where the networks of `parts` come from, and who they are; `modules` has them, each loaded when it is
    touched. aside: another network needs the device, so that these wait on the host and each of their
    modules comes for its own call, but for the text encoder, which is used once and dropped.

    Raises WeightsMissing.
    """

    def __init__(
        self,
        row: Row,
        cfg: RunConfig,
        parts: tuple[Part, ...],
        known: Known,
        emit: Emit,
        *,
        check: bool = True,
        aside: bool = False,
    ) -> None:
        self._row, self._cfg, self._parts, self._known, self._emit = row, cfg, parts, known, emit
        self._aside = aside
        assert cfg.data.width is not None and cfg.data.height is not None
        self.sources: Sources = find_sources(row, cfg.model, (cfg.data.width, cfg.data.height))
        self.missing = _missing(row, self.sources, parts)
        if row.source == "package":
            check_packaged(row, self.sources)
        if check:
            self.require()

    def require(self) -> None:
        """Raises WeightsMissing, naming the files of these parts that are not here."""
        if self.missing:
            fix = (
                None
                if self._row.source == "path"
                else f"`avatarctl models pull {self.sources.row}` fetches them"
            )
            raise WeightsMissing(missing_line(self.missing), where=self._row.name, fix=fix)

    @functools.cached_property
    def modules(self) -> SomeModules:
        """Another part, and the transformer, raises AttributeError."""
        from avatarctl.loading.modules import SomeModules, load_parts
        from avatarctl.models.device import resolve_device
        from avatarctl.placement.place import HOST, leaf_by_leaf

        device = resolve_device(self._cfg.runtime.device)
        held: WeightFile | None = None  # no transformer that encoders are compared with

        def build(part: Part) -> Any:
            waits = part != "text" and self._wait_on_host(device)
            cfg, place = self._cfg, HOST if waits else device
            made = load_parts(
                self._row, self.sources, held, cfg, (part,), place, self._emit, computes=device
            ).get(part)
            if waits and made is not None:
                leaf_by_leaf(cast("nn.Module", made), device)
            return made

        return SomeModules(self._parts, build, device)

    def _wait_on_host(self, device: torch.device) -> bool:
        """On a CPU it would be one memory, and copies for nothing."""
        return self._aside and device.type != "cpu"

    def exact_vae(self) -> Any:
        """The VAE in float32, on the device; that of `modules` where it is one, or on a CPU."""
        from avatarctl.loading.modules import load_parts

        runtime, device = self._cfg.runtime, self.modules.device
        is_exact = runtime.dtype in (None, "float32") or device.type == "cpu"
        if is_exact and not self._wait_on_host(device):
            return self.modules.vae
        cfg = replace(self._cfg, runtime=replace(runtime, dtype="float32"))
        wanted: tuple[Part, ...] = ("vae",)
        return load_parts(self._row, self.sources, None, cfg, wanted, self.modules.device, self._emit)["vae"]

    def identity(self, part: str) -> str:
        """Names the network of a part by the bytes of its files, or by the row that draws it at random."""
        paths = [path for key in _FILES[part] if (path := self.sources.encoders.get(key))]
        if not paths:
            return f"random {self._row.name} {part}"
        if part == "vae" and (config := self.sources.encoders.get("config")):
            paths.append(config)
        digest = hashlib.sha256()
        for path in (file for each in paths for file in _files(each)):
            facts = self._known.facts(path, "weights", lambda file: {"digest": _digest(file)})
            digest.update(f"{path.name} {facts['digest']}\n".encode())
        return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """The file, or those of a folder that a network or a tokenizer is read from."""
    if path.is_file():
        yield path
        return
    suffixes = {".safetensors", ".bin", ".json", ".model"}
    yield from sorted(each for each in path.iterdir() if each.is_file() and each.suffix in suffixes)


def _digest(path: Path) -> str:
    """SHA-256; of large files that of samples (files/hashes.py), which training changes all the same."""
    from avatarctl.files.hashes import FileHashes

    with FileHashes() as hashes:
        hashes.start([path])
        (digest,) = hashes.digests([path])
    return digest.sha256 or str(digest.sampled_sha256)


def _missing(row: Row, sources: Sources, parts: tuple[Part, ...]) -> tuple[Any, ...]:
    """Of what is missing the files of these parts; a row that is random needs none."""
    lacking = {key for part in parts for key in _FILES.get(part, ()) if key not in sources.encoders}
    if row.source == "package":
        return sources.missing
    named = {wanted for wanted in sources.missing if encoder_part(wanted.file) in lacking}
    of_audio = {
        wanted
        for wanted in sources.missing
        if "audio" in lacking and not encoder_part(wanted.file) and _is_of_audio(wanted.hub_id)
    }
    return tuple(wanted for wanted in sources.missing if wanted in named | of_audio)


def _is_of_audio(hub_id: str) -> bool:
    from avatarctl.registry import ROWS

    return any(each.hub_id == hub_id and each.part == "audio" for each in ROWS.values())
