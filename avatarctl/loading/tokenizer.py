"""The tokenizer of a prompt, from a stranger's tokenizer.json.

The file is a small program: steps that rewrite the text before it is cut into tokens. A few of them, each of
which writes a thousand letters for one, turn a word into gigabytes. What the steps can do is bounded before
the library sees them.
"""

from __future__ import annotations

import base64
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from avatarctl.errors import UnusableWeights, printable
from avatarctl.files.strict_json import read_object

__all__ = ["read_tokenizer"]

_LONGEST_FILE: Final = 32 << 20
"""UMT5's holds 256 000 tokens in about 17 MB."""

_STEPS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_MOST_VALUES: Final = 256
_LONGEST_WRITTEN: Final = 8
"""Characters that one step writes for what it finds; UMT5's writes one."""

_MOST_GROWTH: Final = 1024
"""Of a text by all steps together, at worst. Unicode's own compatibility forms are up to 18 times as long."""

_COMPATIBILITY: Final = 18
_LONGEST_TABLE: Final = 4 << 20
"""Base64 characters; Unicode's forms of one letter take about 300 000."""

_PROBE: Final = (string.ascii_letters + string.digits + " .").ljust(64)
_MOST_PROBE_GROWTH: Final = 8


def read_tokenizer(folder: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """The tokenizer exactly as tokenizer.json describes it, for an encoder of `vocabulary` tokens.

    Not through AutoTokenizer: transformers 5 builds T5's class anew from the vocabulary alone, with another
    unknown token and without the normaliser, so that other token ids come out (measured). Nothing but this
    one file is read, hence no code and no class that a stranger names.

    Raises UnusableWeights, also where its steps could make a text grow without reason.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnusableWeights("tokenizer.json is not there", where=folder, fix="fetch google/umt5-xxl/ again")
    _check_steps(path, read_object(path, _LONGEST_FILE))
    try:
        words = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_file(str(path)), pad_token="<pad>", eos_token="</s>"
        )
    except Exception as error:  # the library raises the base class itself
        raise UnusableWeights(f"is no tokenizer: {str(error)[:200]}", where=path) from error
    known = words.get_vocab()
    last = max(known.values(), default=-1)
    if last >= vocabulary:
        raise UnusableWeights(
            f"knows token {last}, and the text encoder has {vocabulary} tokens: they do not belong together",
            where=path,
        )
    normalizer = words.backend_tokenizer.normalizer
    if normalizer and len(normalizer.normalize_str(_PROBE)) > _MOST_PROBE_GROWTH * len(_PROBE):
        raise _growing(path)
    ended = words("", add_special_tokens=True).input_ids
    if ended != [words.eos_token_id]:
        raise UnusableWeights("does not end a prompt with </s>, as UMT5 needs", where=path)
    return words


def _check_steps(path: Path, fields: dict[str, Any]) -> None:
    """Raise UnusableWeights for steps that are no prompt's."""
    model = fields.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "Unigram":  # others write a prefix of any length before each piece
        raise UnusableWeights(f"is no tokenizer of UMT5: {printable(kind)[:60]}, not Unigram", where=path)
    after = fields.get("post_processor")
    if isinstance(after, dict) and after.get("type") != "TemplateProcessing":
        raise UnusableWeights(
            f"is no tokenizer of UMT5: it ends a prompt by {printable(after.get('type'))[:60]}, not by "
            "TemplateProcessing",
            where=path,
        )
    growth = 1
    for section in _STEPS:
        for count, value in enumerate(_values(fields.get(section))):
            if count >= _MOST_VALUES:
                raise UnusableWeights(f"its {section} has too many steps", where=path)
            if isinstance(value, dict):
                growth *= _growth(path, value)
    if growth > _MOST_GROWTH:
        raise _growing(path)


def _values(value: object) -> Iterator[object]:
    """`value` and everything in it; not by recursion, as a stranger chose the depth."""
    left = [value]
    while left:
        value = left.pop()
        yield value
        left.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


def _growth(path: Path, step: dict[str, Any]) -> int:
    """How many characters a step makes of one, at most."""
    for name in ("content", "prepend", "replacement"):
        if isinstance(text := step.get(name), str) and len(text) > _LONGEST_WRITTEN:
            raise UnusableWeights(
                f"one of its steps writes {len(text)} characters for what it finds; {_LONGEST_WRITTEN} at "
                "most are read",
                where=path,
            )
    match step.get("type"):
        case "Replace":
            found = step.get("pattern")
            found = found.get("String") if isinstance(found, dict) else None
            written = len(str(step.get("content", "")))
            # A regular expression may find nothing, between any two letters.
            return max(1, -(-written // len(found))) if isinstance(found, str) and found else written + 1
        case "Prepend":
            return 1 + len(str(step.get("prepend", "")))
        case "Precompiled":
            return _longest_mapped(path, step.get("precompiled_charsmap"))
        case "NFKC" | "NFKD":
            return _COMPATIBILITY
        case "NFC" | "NFD" | "BertNormalizer" | "ByteLevel" | "Lowercase" | "StripAccents":
            return 4
        case "Metaspace":
            return 2  # one more before every piece
    return 1


def _longest_mapped(path: Path, table: object) -> int:
    """Characters of the longest text that a compiled table of SentencePiece puts for another: the size of a
    trie in 4 bytes, the trie, then the texts, each ended by a zero byte."""
    if not isinstance(table, str) or len(table) > _LONGEST_TABLE:
        raise UnusableWeights("its precompiled_charsmap is no text of a sane length", where=path)
    try:
        data = base64.b64decode(table, validate=True)
    except ValueError as error:  # also text that is not ASCII
        raise UnusableWeights("its precompiled_charsmap is not base64", where=path) from error
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(1, *(len(text.decode("utf-8", "replace")) for text in texts.split(b"\0")))


def _growing(path: Path) -> UnusableWeights:
    return UnusableWeights("its steps make a text many times longer than UMT5's do", where=path)
