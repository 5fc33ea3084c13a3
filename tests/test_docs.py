"""Documentation that runs."""

import re
from pathlib import Path

import pytest

from avatarctl.demo.clips import clip
from avatarctl.media import open_video, write_audio, write_clip
from tests.training.running import typed

ROOT = Path(__file__).parent.parent


def test_the_library_example_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/python.md", "exec"), {})
    assert (tmp_path / "hello.mp4").stat().st_size > 1000
    assert "hello.mp4 25" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["architecture.md", "contributing.md"])
def test_files_named_in_the_house_exist(page: str) -> None:
    """A page about the house that names rooms which are not there misleads more than none."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rooms = {path.name for path in (ROOT / "avatarctl").rglob("*") if "__pycache__" not in path.parts}
    named = set(re.findall(r"`([a-z_0-9]+\.py)`", text))
    assert named and named <= rooms, f"not in the house: {sorted(named - rooms)}"


def test_every_defect_of_the_public_trainer_names_tests_that_exist() -> None:
    """A promise that nothing holds is none."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = text.partition("## Defects of the public trainer")[2].splitlines()
    rows = [row for row in rows if re.match(r"\| (\d+|spec/\S+ g\.\d) \|", row)]
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    tests = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and set(named) <= tests, row


def test_what_people_of_other_repositories_are_sent_to_exists() -> None:
    """Each row names a key, a flag or a command of ours, or says that there is none."""
    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    keys = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    commands = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    flags = set(re.findall(r"--[a-z][a-z-]*", commands))
    known = set()
    for section in re.split(r"^## ", keys, flags=re.MULTILINE)[1:]:
        known |= {
            f"{section.split()[0]}.{key}" for key in re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
        }
    tables = text.partition("## Files")[0]
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith(("| `", "| …"))]
    assert len(rows) > 80
    for row in rows:
        ours = row[1]
        assert re.match(r"`|gone|not yet|nothing to type", ours), row
        named = re.findall(r"`([a-z]+\.[a-z_]+)`", " ".join(row[1:]))
        assert set(named) <= known | {"config.json"}, (set(named) - known, row)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours)) <= flags, row


def write_clip_of(seed: int, path: Path) -> None:
    """Nine frames of somebody who talks."""
    drawn = clip(seed, 9)
    write_clip(path, iter([drawn.frames]), audio=drawn.speech.audio)


def test_a_page_leads_from_raw_clips_to_a_dubbed_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/dub-your-clips.md, its first lines as they stand there, with clips that are smaller and fewer."""
    text = (ROOT / "docs" / "dub-your-clips.md").read_text(encoding="utf-8")
    lines = [line.split()[1:] for line in re.findall(r"^    (avatarctl .*)", text, re.MULTILINE)[:4]]
    assert [line[0] for line in lines] == ["precompute-latents", "precompute-audio", "train", "infer"]
    monkeypatch.chdir(tmp_path)
    Path("talks").mkdir()
    for number in range(3):
        write_clip_of(number, Path(f"talks/{number}.mp4"))
    write_clip_of(7, Path("clip.mp4"))
    write_audio(Path("hello.wav"), clip(8, 9).speech.audio, 16_000)
    learnt = ["--size", "32x32", "--frames", "9"]
    more = [learnt, learnt, [*learnt, "--max-steps", "1", "--batch-size", "1"], ["--steps", "1"]]
    for line, words in zip(lines, more, strict=True):
        made = typed(*line, *words)
        assert made.exit_code == 0, made.output
    assert Path("runs/mine/validation.jsonl").is_file()
    with open_video(Path("dubbed.mp4")) as reader:
        assert (reader.width, reader.height, reader.frames) == (32, 32, 9)
