"""Mel spectrogram, StableSyncNet and the sync loss (spec/losses-and-eval.md 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from avatarctl.conditioning.mel import frame_mel, mel_columns, mel_filters, mel_spectrogram, pre_emphasis
from avatarctl.timeline import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from avatarctl.training.sync_loss import SyncMode, sync_cosines, sync_loss, sync_starts

from ..golden import Checks, Reader
from .building import expected, tiny_syncnet

checks = Checks()

MEL = "mel.safetensors"
SYNC = "sync_loss.safetensors"
SYNCNET = "stable_syncnet_tiny.safetensors"
_FRAMES = 16
_STRIDE = 8
_MEL = 1e-5
_MEL_FLOAT32 = 5e-5
_LOSS = 1e-6
_EMBEDDING = 1e-5
# One window's group norms divide by next to nothing: in float32 the gradient of the frames is off by 1 % of
# what float64 gives, the recorded one by 0.5 %.
_GRADIENT = 1.5e-2
_MODES: tuple[SyncMode, ...] = ("logits", "prob")
_COLUMNS_PER_SECOND = 80


@checks(MEL, compares=("mel_full",), needs=("wave",))
def whole_mel(reader: Reader) -> None:
    wave = reader.take("wave")
    reader.compare("mel_full", mel_spectrogram(wave), atol=_MEL)
    reader.compare("mel_full", mel_spectrogram(wave, torch.float32), atol=_MEL_FLOAT32)


@checks(MEL, compares=("mel_basis",))
def filters(reader: Reader) -> None:
    reader.compare("mel_basis", mel_filters(), atol=1e-7)


@checks(MEL, compares=("preemphasis_first64",), needs=("wave",))
def high_frequencies(reader: Reader) -> None:
    reader.compare("preemphasis_first64", pre_emphasis(reader.take("wave"))[:64], atol=1e-12)


@checks(MEL, compares=("mel_segment",), needs=("wave", "start_frames"))
def mel_of_frames(reader: Reader) -> None:
    wave = reader.take("wave")
    windows = [_window(wave, start, _FRAMES) for start in reader.take("start_frames").tolist()]
    mel = torch.cat([frame_mel(window, _FRAMES) for window in windows])
    reader.compare("mel_segment", mel, atol=_MEL)


@checks(MEL, compares=("mel_slice",), needs=("wave", "start_frames"))
def columns_of_the_whole(reader: Reader) -> None:
    """The other published way: not what we train with, and what shows the difference."""
    whole, columns = mel_spectrogram(reader.take("wave")), mel_columns(_FRAMES)
    starts = [frame * _COLUMNS_PER_SECOND // FPS for frame in reader.take("start_frames").tolist()]
    slices = torch.stack([whole[:, start : start + columns] for start in starts])
    reader.compare("mel_slice", slices, atol=_MEL)


@checks(MEL, compares=("mel_short_4000", "mel_short_padded"), needs=("wave",))
def short_mel(reader: Reader) -> None:
    wave = reader.take("wave")[:4000]
    reader.compare("mel_short_4000", mel_spectrogram(wave), atol=_MEL)
    reader.compare("mel_short_padded", frame_mel(wave, _FRAMES)[0], atol=_MEL)


@checks(MEL, compares=("overlap_windows_52_step3",), needs=("wave",))
def sliding_windows(reader: Reader) -> None:
    whole = mel_spectrogram(reader.take("wave")[:24000])
    windows = whole.unfold(1, mel_columns(_FRAMES), 3).transpose(0, 1)
    recorded = len(reader.take("overlap_windows_52_step3"))
    reader.compare("overlap_windows_52_step3", windows[::8][:recorded].unsqueeze(1), atol=_MEL)


@checks(SYNCNET, compares=("*",))
def weights_by_the_formula(reader: Reader) -> None:
    """The stored weights are those that every other check makes for itself."""
    for name, tensor in tiny_syncnet(reader).state_dict().items():
        reader.compare(name, tensor)


@checks(SYNC, compares=("chunk_starts",), needs=("pred_rgb",))
def windows(reader: Reader) -> None:
    starts = sync_starts(reader.take("pred_rgb").shape[2], _FRAMES, _STRIDE)
    reader.compare("chunk_starts", torch.tensor(list(starts)))


@checks(SYNC, compares=("lower_frame0_patch",), needs=("pred_rgb",))
def lower_faces(reader: Reader) -> None:
    lower = tiny_syncnet(reader).lower_faces(reader.take("pred_rgb")[:, :, :1])
    reader.compare("lower_frame0_patch", lower[0, :, 0, 40:48, 100:116], atol=1e-6)


@checks(SYNC, compares=("audio_embeds",), needs=("wave", "chunk_starts"))
def audio_embeddings(reader: Reader) -> None:
    mel = torch.stack([frame_mel(each, _FRAMES) for each in _windows(reader)])
    reader.compare("audio_embeds", F.normalize(tiny_syncnet(reader).audio_encoder(mel)), atol=_EMBEDDING)


@checks(SYNC, compares=("vision_embeds",), needs=("pred_rgb", "chunk_starts"))
def frame_embeddings(reader: Reader) -> None:
    """In float64: float32 alone moves the worst of them by 1.4e-5, see the gradient."""
    judge = tiny_syncnet(reader).double()
    lower = judge.lower_faces(reader.take("pred_rgb").double())
    windows = [lower[:, :, start : start + _FRAMES] for start in reader.take("chunk_starts").tolist()]
    silence = frame_mel(torch.zeros(1, _FRAMES * SAMPLES_PER_FRAME), _FRAMES).double()
    embeddings = [judge(window, silence)[0] for window in windows]
    reader.compare("vision_embeds", torch.cat(embeddings), atol=_EMBEDDING)


@checks(
    SYNC,
    compares=("cosine", "loss_per_chunk_*", "loss_logits", "loss_prob"),
    needs=("vision_embeds", "audio_embeds"),
)
def losses_of_recorded_embeddings(reader: Reader) -> None:
    cosines = F.cosine_similarity(reader.take("vision_embeds"), reader.take("audio_embeds"), dim=1)
    reader.compare("cosine", cosines.unsqueeze(1), atol=_LOSS)
    _compare_losses(reader, cosines)


@checks(
    SYNC,
    compares=("cosine", "loss_per_chunk_*", "loss_logits", "loss_prob", "grad_*"),
    needs=("pred_rgb", "wave"),
)
def losses_and_gradients_of_frames(reader: Reader) -> None:
    frames = reader.take("pred_rgb").requires_grad_()
    waveform = _window(reader.take("wave"), 0, frames.shape[2])[None]
    cosines = sync_cosines(tiny_syncnet(reader), frames, waveform, _STRIDE)
    reader.compare("cosine", cosines.T, atol=1e-5)
    _compare_losses(reader, cosines[0], atol=1e-5)
    gradient = {
        mode: torch.autograd.grad(sync_loss(cosines, mode).mean(), frames, retain_graph=True)[0]
        for mode in _MODES
    }
    reader.compare("grad_logits", gradient["logits"], relative_l2=_GRADIENT)
    reader.compare("grad_logits_abs_sum", _absolute_sum(gradient["logits"]), rtol=_GRADIENT)
    reader.compare("grad_prob_sum", _absolute_sum(gradient["prob"]), rtol=_GRADIENT)


@checks("expected.json", compares=("bce_table.*", "stable_syncnet_tiny.params"))
def table_of_losses(reader: Reader) -> None:
    for row, entry in enumerate(expected(reader)["bce_table"]):
        cosine = torch.tensor([entry["cos"]])
        reader.compare(f"bce_table.{row}.cos", float(entry["cos"]))
        for mode in _MODES:
            loss = float(sync_loss(cosine, mode))
            reader.compare(f"bce_table.{row}.{mode}", loss, atol=1e-6)
    parameters = sum(each.numel() for each in tiny_syncnet(reader).parameters())
    reader.compare("stable_syncnet_tiny.params", parameters)


def _window(wave: Tensor, start: int, frames: int) -> Tensor:
    assert SAMPLES_PER_FRAME * FPS == SAMPLE_RATE
    return wave[start * SAMPLES_PER_FRAME : (start + frames) * SAMPLES_PER_FRAME]


def _windows(reader: Reader) -> list[Tensor]:
    wave = reader.take("wave")
    return [_window(wave, start, _FRAMES) for start in reader.take("chunk_starts").tolist()]


def _compare_losses(reader: Reader, cosines: Tensor, atol: float = _LOSS) -> None:
    for mode in _MODES:
        losses = sync_loss(cosines, mode)
        # -ln c of a cosine that is off by 1e-6 is off by 1e-6 / c.
        reader.compare(f"loss_per_chunk_{mode}", losses, atol=3 * atol)
        reader.compare(f"loss_{mode}", losses.mean().reshape(1), atol=atol)


def _absolute_sum(gradient: Tensor) -> Tensor:
    return gradient.double().abs().sum().reshape(1)
