"""Which layer wins, what a change of model takes over, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatarctl.config import (
    ConfigFile,
    ModelRowDefaults,
    Resolved,
    Setting,
    dump_run,
    read_assignment,
    read_config,
    resolve,
)
from avatarctl.errors import ConfigError
from avatarctl.registry import COMPAT, configure, find_model

ROWS = {
    "one": ModelRowDefaults("one", {"sampling.steps": 10, "output.crf": 11, "model.audio_offset": 1}),
    "two": ModelRowDefaults("two", {"sampling.steps": 20}),
    "stated": ModelRowDefaults("stated", {"model.audio_offset": 0}, audio_offset_stated=True),
}
MODES = {"reference": {"output.crf": 12, "output.lead_silence": 0.3, "model.audio_offset": 1}}


def merged(
    *options: str,
    file: ConfigFile | None = None,
    ambient: dict[str, object] | None = None,
    model: str = "one",
) -> Resolved:
    return resolve(
        ROWS.__getitem__,
        MODES,
        file,
        dict(read_assignment(text, f"-o {text}") for text in options),
        default_model=model,
        ambient={name: Setting(value, "VARIABLE") for name, value in (ambient or {}).items()},
    )


def written(tmp_path: Path, text: str) -> ConfigFile:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return read_config(path)


def test_each_layer_covers_the_one_below(tmp_path: Path) -> None:
    file = written(tmp_path, "output: {crf: 14}\n")
    reference = "model.compat=reference"
    assert resolve(lambda name: ModelRowDefaults(name, {}), {}, None, {}).cfg.output.crf == 18
    assert merged().cfg.output.crf == 11
    assert merged(reference).cfg.output.crf == 12
    assert merged(reference, ambient={"output.crf": 13}).cfg.output.crf == 13
    assert merged(reference, ambient={"output.crf": 13}, file=file).cfg.output.crf == 14
    found = merged(reference, "output.crf=15", ambient={"output.crf": 13}, file=file)
    assert found.cfg.output.crf == 15
    assert found.cfg.sampling.steps == 10  # what no layer above says stays
    assert found.cfg.output.lead_silence == 0.3


def test_every_value_knows_where_it_comes_from(tmp_path: Path) -> None:
    file = written(tmp_path, "runtime:\n  seed: 3\n")
    found = merged("model.compat=reference", file=file, ambient={"model.weights_root": "/w"})
    assert found.origins["sampling.steps"] == "model row one"
    assert found.origins["output.lead_silence"] == "compat reference"
    assert found.origins["model.weights_root"] == "VARIABLE"
    assert found.origins["runtime.seed"].endswith("job.yaml:2")
    assert found.origins["model.compat"].startswith("-o ")
    assert set(found.asked) == {"runtime.seed", "model.compat"}


def test_model_of_the_file_chooses_the_row(tmp_path: Path) -> None:
    assert merged(file=written(tmp_path, "model: {name: two}\n")).cfg.sampling.steps == 20
    assert merged("model.name=one", file=written(tmp_path, "model: {name: two}\n")).cfg.sampling.steps == 10


def test_compat_may_come_from_the_file(tmp_path: Path) -> None:
    assert merged(file=written(tmp_path, "model: {compat: reference}\n")).cfg.output.crf == 12


@pytest.fixture
def run_file(tmp_path: Path) -> ConfigFile:
    """Of a run of model `one` where only the seed and the prompt were asked for."""
    text = dump_run(merged("runtime.seed=7", "input.prompt=hello"), "infer")
    return written(tmp_path, text)


def test_run_file_repeats_resolved_values(run_file: ConfigFile) -> None:
    found = merged(file=run_file, model="two")
    assert (found.cfg.model.name, found.cfg.sampling.steps, found.cfg.runtime.seed) == ("one", 10, 7)
    assert set(found.asked) == {"runtime.seed", "input.prompt"}


def test_run_file_with_another_model_gives_only_what_was_asked(run_file: ConfigFile) -> None:
    found = merged("model.name=two", file=run_file)
    assert (found.cfg.model.name, found.cfg.sampling.steps, found.cfg.output.crf) == ("two", 20, 18)
    assert (found.cfg.runtime.seed, found.cfg.input.prompt) == (7, "hello")
    assert set(found.asked) == {"model.name", "runtime.seed", "input.prompt"}


def test_run_file_with_another_compat_gives_only_what_was_asked(run_file: ConfigFile) -> None:
    found = merged("model.compat=reference", file=run_file)
    assert (found.cfg.output.crf, found.cfg.output.lead_silence, found.cfg.runtime.seed) == (12, 0.3, 7)


def test_run_file_with_the_same_model_named_again_keeps_everything(run_file: ConfigFile) -> None:
    assert merged("model.name=one", file=run_file).cfg == merged(file=run_file).cfg


def test_compat_against_an_explicit_offset() -> None:
    with pytest.raises(ConfigError, match=r"audio_offset 0 contradicts model\.compat reference") as caught:
        merged("model.compat=reference", "model.audio_offset=0")
    assert caught.value.exit_code == 2
    assert merged("model.compat=reference", "model.audio_offset=1").cfg.model.audio_offset == 1


def test_compat_against_an_offset_in_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "model:\n  audio_offset: 0\n")
    with pytest.raises(ConfigError, match=r"job.yaml:2: .*contradicts"):
        merged("model.compat=reference", file=file)


def test_a_row_that_states_its_offset_keeps_it() -> None:
    found = merged("model.compat=reference", model="stated")
    assert found.cfg.model.audio_offset == 0
    assert found.cfg.output.lead_silence == 0.3
    (notice,) = found.notices
    assert "stated" in notice and "audio_offset 0" in notice and "reference" in notice
    assert merged(model="stated").notices == ()


def test_compat_of_the_shipped_rows() -> None:
    published = configure("model.name=omniavatar-14b")
    assert (published.model.audio_offset, published.output.lead_silence) == (1, 0.0)
    reference = configure("model.name=omniavatar-14b", "model.compat=reference")
    assert (reference.model.audio_offset, reference.output.lead_silence) == (1, 0.3)
    assert configure("model.name=omniavatar-14b", "model.compat=fork").model.audio_offset == 0
    for mode in ("reference", "fork"):
        found = resolve(
            lambda name: find_model(name).for_config,
            COMPAT,
            None,
            dict([read_assignment(f"model.compat={mode}", "-o")]),
        )
        assert found.cfg.model.audio_offset == 0
        assert len(found.notices) == (1 if mode == "reference" else 0)
    with pytest.raises(ConfigError, match="contradicts"):
        configure("model.name=omniavatar-14b", "model.compat=fork", "model.audio_offset=1")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("long_video.num_frames=13", "long_video.overlap_frames=13"), "overlap_frames 13 must be below"),
        (("long_video.num_frames=9", "long_video.overlap_frames=13"), "below long_video.num_frames 9"),
        (("long_video.overlap_frames=0",), "fused only"),
        (("output.width=64",), "output.width is given without output.height"),
        (("output.height=64",), "output.height is given without output.width"),
        (("data.width=64",), "data.width is given without data.height"),
        (("input.image=a", "input.video=b"), "both given"),
    ],
)
def test_impossible_together(options: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        merged(*options)
    assert str(caught.value).startswith("-o "), "the message names one of the options"


def test_impossible_together_names_both_places(tmp_path: Path) -> None:
    file = written(tmp_path, "long_video:\n  num_frames: 9\n")
    with pytest.raises(ConfigError, match=r"-o .*must be below.*from .*job.yaml:2"):
        merged("long_video.overlap_frames=13", file=file)


def test_half_a_size_is_refused_even_where_the_row_has_the_other_half() -> None:
    with pytest.raises(ConfigError, match=r"without output\.height"):
        configure("output.width=32")


def test_half_a_size_may_change_a_whole_one_of_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "output: {width: 64, height: 64}\n")
    output = merged("output.width=32", file=file).cfg.output
    assert (output.width, output.height) == (32, 64)


def test_a_wrong_value_in_a_row_is_a_loud_mistake() -> None:
    bad = ModelRowDefaults("bad", {"sampling.steps": 0})
    with pytest.raises(ConfigError, match="model row bad"):
        resolve(lambda name: bad, {}, None, {})


@pytest.mark.parametrize("name", ["batch_branches", "batch_passes"])
def test_an_older_name_of_a_key_keeps_working(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"sampling:\n  {name}: true\n")
    found = read_config(path).settings
    assert {key: setting.value for key, setting in found.items()} == {"sampling.batch_branches": True}
    assert read_assignment(f"sampling.{name}=true", "-o")[0] == "sampling.batch_branches"


def test_both_names_of_a_key_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sampling:\n  batch_branches: true\n  batch_passes: false\n")
    with pytest.raises(ConfigError, match=r"batch_passes is sampling\.batch_branches, which is set too"):
        read_config(path)
