"""Audio, text and video encoders (spec/omniavatar.md b, c, d)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor
from transformers import BatchEncoding, UMT5Config, UMT5EncoderModel, Wav2Vec2Config

from avatarctl.models.encode import AudioFeatures
from avatarctl.models.text import PromptEncoder
from avatarctl.models.vae import WanVae
from avatarctl.models.wav2vec import FrameWav2Vec2, normalise_waveform
from avatarctl.timeline import SAMPLES_PER_FRAME
from avatarctl.weights.wan import UMT5_ENCODER

from ..golden import Checks, Reader
from .building import load, settings

checks = Checks()

AUDIO = "wav2vec_features.safetensors"
TEXT = "text_encoder.safetensors"
VIDEO = "vae.safetensors"
_AUDIO = 1e-4
_TEXT = 1e-5
_VIDEO = 1e-5


def _moments(audio: Tensor) -> tuple[float, float]:
    """Mean and population variance."""
    return float(audio.double().mean()), float(audio.double().var(correction=0))


def _wav2vec(reader: Reader) -> FrameWav2Vec2:
    model = FrameWav2Vec2(Wav2Vec2Config(**json.loads(reader.metadata["config"]))).eval()
    load(model, reader.group("state."), reader)
    return model


class _Recording:
    """A recording in memory as the pipeline reads one: zeros outside."""

    def __init__(self, samples: Tensor) -> None:
        self._samples = samples

    def read(self, start: int, stop: int) -> np.ndarray:
        inside = self._samples[max(start, 0) : max(stop, 0)]
        before = max(0, min(stop, 0) - start)
        return torch.nn.functional.pad(inside, (before, stop - start - before - len(inside))).numpy()


def _features(reader: Reader, frames: int) -> Tensor:
    """[frames, width] the way the pipeline gets them, from raw audio."""
    audio = reader.take("audio")
    mean, variance = _moments(audio)
    source = AudioFeatures(
        _wav2vec(reader),
        _Recording(audio),
        samples=len(audio),
        mean=mean,
        variance=variance,
        frames=frames,
        window_seconds=None,
        device=torch.device("cpu"),
    )
    return source.rows(0, frames)[0]


@checks(AUDIO, compares=("features_padded",), needs=("state.*", "audio"))
def features_padded(reader: Reader) -> None:
    frames = len(reader.take("features_padded"))
    reader.compare("features_padded", _features(reader, frames), atol=_AUDIO)


@checks(AUDIO, compares=("features_natural",), needs=("state.*", "audio"))
def features_natural(reader: Reader) -> None:
    frames = len(reader.take("features_natural"))
    reader.compare("features_natural", _features(reader, frames), atol=_AUDIO)


@checks(AUDIO, compares=("input_values",), needs=("audio",))
def normalised_audio(reader: Reader) -> None:
    audio = reader.take("audio")
    reader.compare("input_values", normalise_waveform(audio, *_moments(audio)), atol=1e-6, rtol=1e-6)


@checks(AUDIO, compares=("input_values_padded",), needs=("audio",))
def padded_audio(reader: Reader) -> None:
    """What the encoder is given for the padded frame count: zeros behind the normalised audio."""
    given: list[Tensor] = []

    class Listener:
        width = 1

        def features(self, waveform: Tensor, frames: int) -> Tensor:
            given.append(waveform)
            return torch.zeros(1, frames, 1)

    audio = reader.take("audio")
    frames = len(reader.take("input_values_padded")) // SAMPLES_PER_FRAME
    mean, variance = _moments(audio)
    AudioFeatures(
        Listener(),
        _Recording(audio),
        samples=len(audio),
        mean=mean,
        variance=variance,
        frames=frames,
        window_seconds=None,
        device=torch.device("cpu"),
    ).rows(0, frames)
    assert given[0].shape == (1, frames * SAMPLES_PER_FRAME)
    reader.compare("input_values_padded", given[0][0], atol=1e-6, rtol=1e-6)


@checks(AUDIO, compares=("cnn_features",), needs=("state.*", "audio"))
@torch.no_grad()
def convolution_features(reader: Reader) -> None:
    """The convolution stack alone, on the padded audio, before interpolation."""
    audio, frames = reader.take("audio"), int(reader.metadata["padded_frames"])
    waveform = normalise_waveform(audio, *_moments(audio))
    waveform = torch.nn.functional.pad(waveform, (0, frames * SAMPLES_PER_FRAME - len(audio)))
    reader.compare("cnn_features", _wav2vec(reader).feature_extractor(waveform[None])[0], atol=_AUDIO)


def _umt5(reader: Reader) -> UMT5EncoderModel:
    sizes = settings(reader)
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=sizes["vocab"],
            d_model=sizes["dim"],
            d_kv=sizes["dim_attn"] // sizes["num_heads"],
            d_ff=sizes["dim_ffn"],
            num_layers=sizes["num_layers"],
            num_heads=sizes["num_heads"],
            relative_attention_num_buckets=sizes["num_buckets"],
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    state = UMT5_ENCODER.rename_to_internal(reader.group("state."))
    load(model, state, reader, UMT5_ENCODER.to_original)
    return model


@checks(TEXT, compares=("hidden_raw",), needs=("state.*", "ids", "mask"))
@torch.no_grad()
def text_states(reader: Reader) -> None:
    ids, mask = reader.take("ids"), reader.take("mask")
    states = _umt5(reader)(input_ids=ids, attention_mask=mask).last_hidden_state
    reader.compare("hidden_raw", states, atol=_TEXT)


@checks(TEXT, compares=("context_zero_padded",), needs=("state.*", "ids", "mask"))
def text_context(reader: Reader) -> None:
    """Each prompt by itself and without its padding, from its recorded tokens."""
    ids, mask = reader.take("ids"), reader.take("mask")
    tokens = [row[: int(real.sum())][None] for row, real in zip(ids, mask, strict=True)]
    encoder = PromptEncoder(
        _umt5(reader), lambda place, **_: BatchEncoding({"input_ids": tokens[place]}), ids.shape[1]
    )
    places: Any = range(len(tokens))
    made = torch.cat([encoder.encode(place, torch.device("cpu")) for place in places])
    reader.compare("context_zero_padded", made, atol=_TEXT)


def _codec(reader: Reader) -> WanVae:
    sizes = reader.metadata
    levels = json.loads(sizes["dim_mult"])
    vae = AutoencoderKLWan(
        base_dim=int(sizes["dim"]),
        z_dim=int(sizes["z_dim"]),
        dim_mult=levels,
        num_res_blocks=int(sizes["num_res_blocks"]),
    ).eval()
    state = convert_wan_vae_to_diffusers(reader.group("state."))
    load(vae, state, reader)
    return WanVae(vae)


@checks(VIDEO, compares=("latent_video",), needs=("state.*", "video"))
def encode_video(reader: Reader) -> None:
    reader.compare("latent_video", _codec(reader).encode(reader.take("video")), atol=_VIDEO)


@checks(VIDEO, compares=("latent_first_frame",), needs=("state.*", "video"))
def encode_first_frame(reader: Reader) -> None:
    first = reader.take("video")[:, :, :1]
    reader.compare("latent_first_frame", _codec(reader).encode(first), atol=_VIDEO)


@checks(VIDEO, compares=("decoded",), needs=("state.*", "latent_video"))
def decode_video(reader: Reader) -> None:
    reader.compare("decoded", _codec(reader).decode(reader.take("latent_video")), atol=_VIDEO)


@checks(VIDEO, compares=("decoded",), needs=("state.*", "latent_video"))
def decode_as_a_stream(reader: Reader) -> None:
    """One latent frame at a time: the recorded video, and the whole decode bit for bit."""
    codec, latents = _codec(reader), reader.take("latent_video")
    decoder = codec.decoder()
    streamed = torch.cat([decoder.push(frame) for frame in latents.split(1, dim=2)], dim=2)
    assert torch.equal(streamed, codec.decode(latents))
    reader.compare("decoded", streamed, atol=_VIDEO)
