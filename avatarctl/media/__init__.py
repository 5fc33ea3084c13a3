"""Audio, images and video, in and out: files and arrays on one side, streams of samples on the other."""

from avatarctl.media.audio import Audio, audio_from_array, open_audio, write_audio
from avatarctl.media.audio_survey import AudioSurvey, survey
from avatarctl.media.background import BackgroundWriter
from avatarctl.media.clip_writer import write_clip
from avatarctl.media.files import check_regular_file
from avatarctl.media.frames import FittedFrames, LengthRule, Video, fitted_matrix, video_from_array
from avatarctl.media.growing_file import partial_path
from avatarctl.media.image import StillImage, image_from_array, load_image
from avatarctl.media.video import AudioBlocks, VideoWriter
from avatarctl.media.video_reader import VideoReader, open_video
from avatarctl.media.waveform import MODEL_RATE, Soundtrack, Waveform

__all__ = [
    "MODEL_RATE",
    "Audio",
    "AudioBlocks",
    "AudioSurvey",
    "BackgroundWriter",
    "FittedFrames",
    "LengthRule",
    "Soundtrack",
    "StillImage",
    "Video",
    "VideoReader",
    "VideoWriter",
    "Waveform",
    "audio_from_array",
    "check_regular_file",
    "fitted_matrix",
    "image_from_array",
    "load_image",
    "open_audio",
    "open_video",
    "partial_path",
    "survey",
    "video_from_array",
    "write_audio",
    "write_clip",
]
