"""ICC profiles of version 2 made by hand (ICC.1:2001-04), and what their colours are in sRGB by the formulas.

Shares no code with the library that reads profiles.
"""

from __future__ import annotations

import itertools
import struct

import numpy as np

D50 = np.array([0.9642, 1.0, 0.8249])
# x and y of red, green and blue, and of the white D65
PRIMARIES = {
    "sRGB": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "Adobe RGB": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
    "Display P3": ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
}
WHITE = (0.3127, 0.3290)
INKS = {  # L*, a*, b* of paper and of each ink alone; mixtures are as dark and grey as a rule of thumb
    (0, 0, 0, 0): (100, 0, 0),
    (1, 0, 0, 0): (55, -37, -50),
    (0, 1, 0, 0): (48, 74, -3),
    (0, 0, 1, 0): (89, -5, 93),
    (0, 1, 1, 0): (47, 68, 48),
}


def rgb_profile(space: str, gamma: float) -> bytes:
    tags = {f"{name}TRC".encode(): _gamma(gamma) for name in "rgb"}
    tags |= {
        f"{name}XYZ".encode(): _xyz(column) for name, column in zip("rgb", _matrix(space).T, strict=True)
    }
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _gamma(gamma)})


def cmyk_profile() -> bytes:
    """Four inks, a table of two steps each from paper to full ink (lut8Type, 6.5.7)."""
    corners = [INKS.get(inks, (0, 0, 0)) for inks in itertools.product((0, 1), repeat=4)]
    table = bytes(
        round(number) for light, a, b in corners for number in (light * 255 / 100, a + 128, b + 128)
    )
    identity = b"".join(struct.pack(">i", 65536 * (row == column)) for row in range(3) for column in range(3))
    straight = bytes(range(256))
    lut = b"mft1\0\0\0\0\x04\x03\x02\0" + identity + straight * 4 + table + straight * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


def srgb_of_rgb(space: str, gamma: float, levels: tuple[int, ...]) -> np.ndarray:
    """float [3], 0 to 255: the sRGB levels of a colour of `rgb_profile(space, gamma)`."""
    return _srgb(_matrix(space) @ (np.array(levels) / 255) ** gamma)


def srgb_of_grey(gamma: float, level: float) -> float:
    return float(_srgb(D50 * (level / 255) ** gamma)[0])


def srgb_of_inks(inks: tuple[int, int, int, int]) -> np.ndarray:
    light, a, b = INKS[inks]
    y = (light + 16) / 116
    roots = np.array([y + a / 500, y, y - b / 200])
    return _srgb(D50 * np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)))


def _srgb(xyz: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, from XYZ relative to D50."""
    linear = np.clip(np.linalg.solve(_matrix("sRGB"), xyz), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _matrix(space: str) -> np.ndarray:
    """Linear RGB to XYZ relative to D50, columns red, green, blue; whites adapted as Bradford does."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in PRIMARIES[space]]).T
    x, y = WHITE
    white = np.array([x / y, 1, (1 - x - y) / y])
    to_xyz = columns * np.linalg.solve(columns, white)
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    gains = np.diag((cones @ D50) / (cones @ white))
    adapted: np.ndarray = np.linalg.inv(cones) @ gains @ cones @ to_xyz
    return adapted


def _gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))


def _xyz(numbers: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(number * 65536) for number in numbers))


def _profile(device: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"wtpt": _xyz(D50), **tags}
    place = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content
    head = (
        bytes(8) + b"\x02\x10\0\0" + device + space + pcs + struct.pack(">6H", 2001, 1, 1, 0, 0, 0) + b"acsp"
    )
    head = head.ljust(68, b"\0") + _xyz(D50)[8:]
    return struct.pack(">I", place + len(body)) + (head.ljust(128, b"\0") + table + body)[4:]
