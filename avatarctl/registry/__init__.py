"""Which models, encoders and other published files exist: rows of data, no classes of networks.

row.py      what a row says        networks.py  sizes of the networks
rows.py     every row              defaults.py  what a run of a model starts from
choose.py   a name to its row
"""

from avatarctl.registry.choose import (
    based_on,
    configure,
    find,
    find_model,
    fitting,
    outside_training,
    video_shape,
)
from avatarctl.registry.defaults import COMPAT
from avatarctl.registry.row import (
    ASSETS,
    ENCODER_FILES,
    NEEDS_WEIGHTS,
    NOT_YET,
    WORKS,
    Kind,
    Row,
    Status,
    TrainedFor,
    VideoShape,
    Wanted,
    encoder_part,
)
from avatarctl.registry.rows import JUDGES, PROFILED, PROFILED_MODEL, ROWS

__all__ = [
    "ASSETS",
    "COMPAT",
    "ENCODER_FILES",
    "JUDGES",
    "NEEDS_WEIGHTS",
    "NOT_YET",
    "PROFILED",
    "PROFILED_MODEL",
    "ROWS",
    "WORKS",
    "Kind",
    "Row",
    "Status",
    "TrainedFor",
    "VideoShape",
    "Wanted",
    "based_on",
    "configure",
    "encoder_part",
    "find",
    "find_model",
    "fitting",
    "outside_training",
    "video_shape",
]
