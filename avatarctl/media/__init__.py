"""Sound and pictures, in and out: files and arrays on one side, streams of samples on the other."""

from avatarctl.media.background import BackgroundWriter
from avatarctl.media.files import check_regular_file
from avatarctl.media.growing_file import partial_path
from avatarctl.media.picture import Picture, load_picture, picture_from_array
from avatarctl.media.sound import Sound, open_sound, sound_from_array, write_sound
from avatarctl.media.sound_survey import SoundSurvey, survey
from avatarctl.media.video import AudioBlocks, VideoWriter
from avatarctl.media.waveform import MODEL_RATE, Soundtrack, Waveform

__all__ = [
    "MODEL_RATE",
    "AudioBlocks",
    "BackgroundWriter",
    "Picture",
    "Sound",
    "SoundSurvey",
    "Soundtrack",
    "VideoWriter",
    "Waveform",
    "check_regular_file",
    "load_picture",
    "open_sound",
    "partial_path",
    "picture_from_array",
    "sound_from_array",
    "survey",
    "write_sound",
]
