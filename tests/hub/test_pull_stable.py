"""The rows of a model that is published for two shapes of video: fetched over a connection that breaks,
found, checked, damaged, and run; with small files of the published form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from PIL import Image

from avatarctl.cli import app
from avatarctl.hub.locate import locate
from avatarctl.registry import find
from tests.hub.hub_server import Break, HubServer, Repo, Status
from tests.hub.pulling import error_of, incomplete, models
from tests.pipelines import tiny_stable_release as stable

SQUARE, OBLONG = "stableavatar-1.3b", "stableavatar-1.3b-rec-vec"
REPO, AUDIO = "FrancisRing/StableAvatar", "facebook/wav2vec2-base-960h"
FILE = "StableAvatar-1.3B/transformer3d-{}.pt"
CLIP = "Wan2.1-Fun-V1.1-1.3B-InP/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def files_of(folder: Path) -> dict[str, bytes]:
    """Name in a repository -> bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the repository, and one that no row wants."""
    root = tmp_path_factory.mktemp("published")
    stable.tiny_stable_release().write(root)
    files = files_of(root / stable.FOLDER)
    return files | {"Wan2.1-Fun-V1.1-1.3B-InP/diffusion_pytorch_model.safetensors": b"not needed" * 1000}


@pytest.fixture
def release(hub: HubServer, published: dict[str, bytes]) -> dict[str, bytes]:
    """The same, on the hub."""
    audio = "wav2vec2-base-960h/"
    hub.repos[REPO] = Repo(dict(published), license="mit")
    hub.repos[AUDIO] = Repo(
        {name.removeprefix(audio): held for name, held in published.items() if name.startswith(audio)}
    )
    return published


def wanted(release: dict[str, bytes], shape: str) -> set[str]:
    """Names in both repositories that a run needs."""
    own = {name for name in release if name.startswith("Wan2.1-Fun") and "google/" in name}
    own |= {name for name in release if name.endswith(".pth")}
    return {*own, FILE.format(shape), "config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.mark.parametrize(("row", "shape"), [(SQUARE, "square"), (OBLONG, "rec-vec")])
def test_each_shape_over_a_broken_connection(
    row: str, shape: str, release: dict[str, bytes], hub: HubServer, client: Path
) -> None:
    size = len(release[FILE.format(shape)])
    hub.faults[FILE.format(shape)] = [Break(size // 3), Status(503), Break(size // 4, clean=True)]
    hub.faults[CLIP] = [Break(2000)]
    result = models("pull", row)
    assert set(hub.fetched()) == wanted(release, shape), "nothing else, and the other shape not"
    assert f"license    {REPO}: mit" in result.stderr
    assert locate(find(row), None).files[FILE.format(shape)].read_bytes() == release[FILE.format(shape)]
    assert not incomplete(client)
    shown = models("show", row).stdout
    assert "all files are here" in shown and f"{FILE.format(shape)}\n" in shown and "missing" not in shown
    hub.requests.clear()
    checked = models("verify", row).stdout
    assert hub.requests == [] and f"total        {len(wanted(release, shape))} ok" in checked
    assert "nothing to fetch" in models("pull", row).stderr


def test_show_names_the_other_shape_and_how_to_fetch_it(
    release: dict[str, bytes], hub: HubServer, client: Path
) -> None:
    models("pull", SQUARE)
    line = f"other      {OBLONG}, for landscape or portrait videos: "
    shown = models("show", SQUARE).stdout
    assert f"{line}avatarctl models pull {OBLONG}" in shown.splitlines()
    hub.requests.clear()
    models("pull", "--for", f"infer --model {SQUARE} --size 832x480")
    assert hub.fetched() == [FILE.format("rec-vec")], "the encoders are here"
    assert f"{line}here" in models("show", SQUARE).stdout.splitlines()
    assert json.loads(models("show", SQUARE, "--json").stdout)["instead"] == [OBLONG]


def test_a_changed_byte_is_found(release: dict[str, bytes], hub: HubServer, client: Path) -> None:
    models("pull", SQUARE, OBLONG)
    path = locate(find(OBLONG), None).files[FILE.format("rec-vec")]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.resolve().write_bytes(content)
    damaged = models("verify", OBLONG, code=3)
    assert f"damaged      {path}: its SHA-256 is not " in damaged.stdout
    assert f"remove it, then `avatarctl models pull {OBLONG}`" in error_of(damaged)
    assert models("verify", SQUARE).stdout.splitlines()[-1].endswith(" ok")


def test_what_was_pulled_runs_by_the_words_of_the_screen(
    release: dict[str, bytes], hub: HubServer, client: Path, tmp_path: Path
) -> None:
    """Nothing is here; what the error says is typed; one file runs, with a line; then the fitting one."""
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (48, 40, 3), np.uint8)).save(tmp_path / "face.png")
    soundfile.write(tmp_path / "voice.wav", random.standard_normal(3_200) * 0.1, 16_000)

    def infer(model: str, size: str, out: str) -> tuple[int, str]:
        """Exit code, and what was said, without the breaks of its lines."""
        words = f"infer --model {model} --image {tmp_path}/face.png --audio {tmp_path}/voice.wav"
        words += f" --size {size} --steps 1 --num-frames 9 --overlap 5 --dtype float32"
        words += f" --memory full --out {out}.mp4"  # the row states the sizes of the real encoders
        result = CliRunner().invoke(app, words.split(), prog_name="avatarctl")
        return result.exit_code, " ".join(result.stderr.split())

    code, said = infer(SQUARE, "64x32", "a")
    assert code == 4 and "transformer3d-rec-vec.pt" in said and f"`avatarctl models pull {OBLONG}`" in said
    assert "transformer3d-square" not in said
    models("pull", OBLONG)
    code, said = infer(SQUARE, "64x32", "a")
    assert code == 0 and "was trained for" not in said, said
    line = f"was trained for landscape or portrait videos, and this one is 32x32; {SQUARE} is made for such"
    for model in (SQUARE, OBLONG):
        code, said = infer(model, "32x32", model)
        assert code == 0 and line in said, said
    models("pull", SQUARE)
    code, said = infer(SQUARE, "32x32", "b")
    assert "transformer3d-square.pt is used, of several, as the video is 32x32" in said
    assert code == 0 and "was trained for" not in said
