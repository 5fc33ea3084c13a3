"""What a configuration file may be made of; of the rest a person is told file, line, cause and cure."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path

import pytest

from avatarctl.config import read_assignment, read_config
from avatarctl.errors import ConfigError, PathNotFound


def read(tmp_path: Path, content: str | bytes) -> dict[str, object]:
    path = tmp_path / "job.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return {dotted: setting.value for dotted, setting in read_config(path).settings.items()}


REFUSED: dict[str, tuple[str | bytes, int | None, str]] = {
    "unknown key, near": ("train:\n  learing_rate: 1\n", 2, r"did you mean train\.learning_rate\?"),
    "unknown key, of another section": ("runtime:\n  steps: 1\n", 2, r"sampling\.steps or validation\.steps"),
    "unknown key, misplaced and mistyped": ("runtime:\n  guidance_scal: 1\n", 2, r"guidance_scale\?"),
    "unknown key, like nothing": ("checkpoint:\n  zzzz: 1\n", 2, "it has every, keep_last, resume"),
    "key in capitals": ("runtime:\n  SEED: 1\n", 2, r"did you mean runtime\.seed\?"),
    "key with a space": ("runtime:\n  'seed ': 1\n", 2, r"'seed '.*did you mean runtime\.seed\?"),
    "unknown section, near": ("runtimes:\n  seed: 1\n", 1, r"no section 'runtimes'.*did you mean runtime\?"),
    "unknown section, a key's name": ("seed: 1\n", 1, r"no section 'seed'.*did you mean runtime\.seed\?"),
    "unknown section, like nothing": ("\nzzzz:\n  seed: 1\n", 2, "the sections are model, input"),
    "duplicate key": ("runtime:\n  seed: 1\n\n  seed: 1\n", 4, "duplicate key 'seed'.* line 2"),
    "duplicate section": ("runtime: {seed: 1}\nsampling: {steps: 1}\nruntime: {}\n", 3, "'runtime'.* line 1"),
    "section without keys": ("runtime:\nsampling: {steps: 1}\n", 1, "section runtime has no keys"),
    "section of one value": ("runtime: 3\n", 1, "section runtime: expected keys and values"),
    "section of a list": ("runtime: [seed]\n", 1, "section runtime: expected keys and values"),
    "key without value": ("runtime:\n  seed:\n", 2, r"runtime\.seed has no value.*keep the default"),
    "tilde": ("runtime:\n  seed: ~\n", 2, "has no value"),
    "alias": ("runtime:\n  seed: *a\n", 2, r"alias \*a is not allowed"),
    "anchor": ("runtime: &a\n  seed: 1\n", 1, "anchor &a is not allowed"),
    "merge key": ("runtime:\n  <<: {seed: 1}\n", 2, "no key '<<'"),
    "tag of a python object": (
        "runtime:\n  seed: !!python/object/apply:os.getcwd []\n",
        2,
        "tag .*not allowed",
    ),
    "tag of a plain type": ("runtime:\n  seed: !!int 3\n", 2, "tag .*not allowed"),
    "tab as indentation": ("runtime:\n\tseed: 1\n", 2, "tab in the indentation.*use spaces"),
    "second document": ("runtime: {seed: 1}\n---\nruntime: {seed: 2}\n", 2, "second YAML document"),
    "unclosed": ("runtime:\n  trackers: [jsonl\nsampling: {steps: 1}\n", 3, "not valid YAML"),
    "list as key": ("runtime:\n  [a]: 1\n", 2, "a key must be a word"),
    "mapping as key": ("runtime:\n  {a: b}: 1\n", 2, "a key must be a word"),
    "root is a list": ("- runtime\n", 1, "the root is a list"),
    "root is a text": ("\nruntime\n", 2, "the root is a string"),
    "nested too deeply": ("runtime: " + "[" * 60 + "]" * 60, 1, "nested too deeply"),
    "control character": ("runtime:\n  device: a\x1b[31m\n", 2, r"control character '\\x1b'"),
    "NUL": ("runtime:\n  seed: 1\n\0", 3, r"control character '\\x00'"),
    "bytes that are no UTF-8": (
        b"runtime:\n  seed: 1\n  device: \xe9\n",
        3,
        "not UTF-8 text: byte 0xe9.*UTF-8",
    ),
    "command without a name": ("command:\nruntime: {seed: 1}\n", 1, "command: expected the name"),
    "asked without sections": ("asked: yes\n", 1, "asked: expected sections"),
    "asked unknown": ("asked:\n  runtime:\n    sed: 1\n", 3, r"did you mean runtime\.seed\?"),
    "escaped beyond Unicode": ('input:\n  prompt: "\\UFFFFFFFF"\n', None, "not valid YAML"),
    "seed as a date": ("runtime:\n  seed: 2024-99-99\n", 2, "expected an integer.*'2024-99-99'"),
    "base 60": ("runtime:\n  seed: 1:30\n", 2, "expected an integer.*'1:30'"),
    "huge number": ("runtime:\n  seed: " + "9" * 100_000, 2, "expected an integer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_file_line_and_cause(name: str, tmp_path: Path) -> None:
    content, line, says = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    place = re.escape(str(tmp_path / "job.yaml")) + (f":{line}" if line else "")
    assert re.match(f"{place}: ", message), message
    assert re.search(says, message), message
    assert "\n" not in message and len(message) < 600
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "content", ["", "# only a remark\n", "---\n", "~\n", "--- null\n...\n", "\ufeff", "\n\n"]
)
def test_empty_file_is_refused_by_name(content: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"job\.yaml: the file is empty; expected sections.*leave out --config"
    ):
        read(tmp_path, content)


PLAIN = "runtime:\n  seed: 5\ninput:\n  prompt: grüße\n"


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.encode(),
        codecs.BOM_UTF8 + PLAIN.encode(),
        PLAIN.encode("utf-16"),
        codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"),
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace("\n", "\r").encode(),
        ("---\n" + PLAIN + "...\n").encode(),
        ("%YAML 1.2\n---\n" + PLAIN).encode(),
        b"{runtime: {seed: 5}, input: {prompt: 'gr\xc3\xbc\xc3\x9fe'}}",
        b'"runtime": {"seed": 5}\ninput: {prompt: "gr\\xfc\\xdfe"}',
    ],
    ids=[
        "utf-8",
        "utf-8 bom",
        "utf-16 le",
        "utf-16 be",
        "crlf",
        "cr",
        "marks",
        "directive",
        "flow",
        "json-like",
    ],
)
def test_same_settings_in_other_clothes(content: bytes, tmp_path: Path) -> None:
    assert read(tmp_path, content) == {"runtime.seed": 5, "input.prompt": "grüße"}


def test_torn_utf16(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not UTF-16 text"):
        read(tmp_path, PLAIN.encode("utf-16")[:-1])


def test_scalars_mean_what_their_key_says(tmp_path: Path) -> None:
    text = """
long_video: {strategy: off}
sampling: {steps: 025, shift: 5}
train: {learning_rate: 1e-4}
input: {prompt: yes, negative_prompt: "", image: 2024-01-01, audio: '007'}
data: {force: true}
"""
    assert read(tmp_path, text) == {
        "long_video.strategy": "off",
        "sampling.steps": 25,
        "sampling.shift": 5.0,
        "train.learning_rate": 0.0001,
        "input.prompt": "yes",
        "input.negative_prompt": "",
        "input.image": "2024-01-01",
        "input.audio": "007",
        "data.force": True,
    }


def test_block_texts(tmp_path: Path) -> None:
    assert read(tmp_path, "input:\n  prompt: >-\n    a\n    b\n") == {"input.prompt": "a b"}
    assert read(tmp_path, "input:\n  prompt: |\n    a\n    b\n") == {"input.prompt": "a\nb\n"}


def test_lists_as_block_flow_or_text(tmp_path: Path) -> None:
    for text in ("\n    - sync\n    - lpips", " [sync, lpips]", " sync,lpips", " sync, lpips"):
        assert read(tmp_path, f"aux:\n  losses:{text}\n") == {"aux.losses": ("sync", "lpips")}


def test_duplicate_inside_a_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"job\.yaml:4: duplicate key 'dit'.* line 3"):
        read(tmp_path, "model:\n  weights:\n    dit: a\n    dit: b\n")


def test_larger_than_a_configuration_can_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read(tmp_path, "# " + "x" * (1 << 20))


def test_folder_pipe_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(PathNotFound, match="no such configuration file"):
        read_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_config(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_config(tmp_path / "pipe")


def test_awkward_file_name_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\nb\u202e.yaml"
    path.write_text("runtime:\n  sed: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    message = str(caught.value)
    assert r"a\x1b[31m\nb\u202e.yaml:2" in message
    assert not set("\x1b\n\u202e") & set(message)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected section.key=value"),
        ("runtime.seed", "expected section.key=value"),
        ("seed=1", "expected section.key=value"),
        ("=1", "expected section.key=value"),
        ("runtme.seed=1", "did you mean runtime?"),
        ("runtime.sed=1", "did you mean runtime.seed?"),
        ("sampling.seed=1", "did you mean runtime.seed?"),
        ("runtime.seed.x=1", "runtime has no key"),
        ("model.weights.=a", "part names out of dit"),
        ("a\x1b.b=1", r"'a\x1b'"),
    ],
)
def test_assignment_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_assignment(text, "-o here")
    assert str(caught.value).startswith("-o here: ") and says in str(caught.value)


def test_assignment_keeps_later_equals_signs() -> None:
    assert read_assignment("input.prompt=a=b", "-o")[1].value == "a=b"
    assert read_assignment(" input.prompt = a", "-o")[1].value == " a"
