"""With which audio offset a model is trained: a wrong one moves the lips, and no loss shows it.

spec/omniavatar.md f.4, g.3: published image-to-video weights show audio frame k in video frame k + 1; the
public trainer, and everything that dubs a video, in frame k.
"""

from __future__ import annotations

from dataclasses import replace

from avatarctl.config import RunConfig
from avatarctl.errors import UsageError
from avatarctl.loading.sources import find_sources
from avatarctl.registry import Row
from avatarctl.weights.recognise import open_model

__all__ = ["settled_offset"]


def settled_offset(cfg: RunConfig, row: Row, *, of_video: bool, asked: bool) -> tuple[RunConfig, str]:
    """`cfg` with the audio offset of the run, and a line for people where the row says another.

    Of a video it is 0, whatever the weights were made with. Of an image it is that of the weights, 0 for a
    plain base. asked: whether somebody set it, by a file, an option or `model.compat`; then it stays, and
    `training/run.py` refuses what makes no sense.

    Raises UsageError where the offset of the weights is only an assumption.
    """
    stated = cfg.model.audio_offset
    if of_video:
        if asked or stated == 0:
            return cfg, ""
        why = "audio frame k drives frame k of a video"
        return _with(cfg, 0), f"audio offset 0: {why}; the weights had {stated}"
    if row.source == "package" or cfg.train.init == "random":
        return cfg, ""
    sources = find_sources(row, cfg.model)
    if sources.missing or not sources.dit:
        return cfg, ""
    held = open_model(sources.dit[-1])
    offset = 0 if held.audio_offset is None else held.audio_offset  # a plain base has learnt none
    if asked:
        differs = offset != stated and held.audio_offset is not None and not held.audio_offset_assumed
        line = f"audio offset {stated}, as asked; the weights have {offset} ({held.audio_offset_rule})"
        return cfg, line if differs else ""
    if held.audio_offset_assumed:
        raise UsageError(
            "nothing tells whether these weights show audio frame k in frame k or in frame k + 1, and "
            "training the other way moves the lips",
            where=held.path,
            fix="--audio-offset 1 for published image-to-video weights, 0 for those of the public trainer",
        )
    return _with(cfg, offset), "" if offset == stated else f"audio offset {offset}: that of {held.path}"


def _with(cfg: RunConfig, offset: int) -> RunConfig:
    assert offset in (0, 1)
    return replace(cfg, model=replace(cfg.model, audio_offset=offset))  # type: ignore[arg-type]
