"""Calibration text: from files of texts, or of chats through the model's own template, to rows of tokens.

    .txt       plain text, one or many documents
    .jsonl     an object a line: ``text``, or ``messages`` (role, content), or ``conversations`` (from, value)
    .parquet   the same as columns; needs pyarrow

Texts are put in an order drawn by seed and joined, as models are trained, until there are enough tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from ..models.tokenizer import Tokenizer

SAMPLES, LENGTH = 128, 512
_PIECE = 16384  # characters of a plain text that are taken together, up to the end of a line
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
Document = str | list[dict[str, Any]]  # a text, or the messages of a chat


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on. files: texts; none: what the model writes itself (see `own`).

    samples, length: rows and their tokens; None: the default, or what there is.  seed: decides which texts are taken
    when there are more.
    """

    files: tuple[Path, ...]
    samples: int | None = None
    length: int | None = None
    seed: int = 0

    def rows(self, longest: int | None) -> tuple[int, int]:
        """(samples, length) as asked for, or by default; BadInput for what the model cannot take."""
        length = min(LENGTH, longest or LENGTH) if self.length is None else self.length
        if type(length) is not int or length < 2 or (longest is not None and length > longest):
            upper = "" if longest is None else f" to {longest}, the most that this model can take"
            raise BadInput(f"sequence_length={length!r}: give tokens of a sample, 2{upper}")
        samples = SAMPLES if self.samples is None else self.samples
        if type(samples) is not int or samples < 1:
            raise BadInput(f"samples={samples!r}: give how many rows of text to calibrate on, 1 or more")
        return samples, length


def read_tokens(calibration: Calibration, folder: Path, longest: int | None, vocabulary: int) -> NDArray[np.int64]:
    """Rows of tokens (samples, length) for the model in a folder.

    longest: tokens that the model can take.  vocabulary: how many there are.
    BadInput, in one line, for files that are no text, hold too little of it, or lengths the model cannot take.
    """
    samples, length = calibration.rows(longest)
    documents = [document for file in calibration.files for document in read_documents(file)]
    order = np.random.default_rng(calibration.seed).permutation(len(documents))
    tokenizer = Tokenizer(folder)
    where = ", ".join(map(str, calibration.files))
    if tokenizer.chat_template is None and not all(isinstance(document, str) for document in documents):
        raise BadInput(
            f"{where}: chats need the model's chat template, and {folder} has none; give plain text, or add"
            " chat_template.jinja to the folder"
        )
    tokens = _take((documents[i] for i in order), tokenizer, samples * length)
    rows = min(samples, len(tokens) // length)
    if rows < 1 or (calibration.samples is not None and rows < samples):
        raise BadInput(
            f"{where}: {len(tokens)} tokens of text; {samples} samples of {length} tokens take {samples * length}:"
            " give more text, or smaller --samples or --sequence-length"
        )
    found = np.asarray(tokens[: rows * length], np.int64).reshape(rows, length)
    if found.max() >= vocabulary:
        raise BadInput(
            f"{where}: token {found.max()} of the tokenizer is beyond the model's vocabulary of {vocabulary}"
        )
    return found


def _take(documents: Iterable[Document], tokenizer: Tokenizer, wanted: int) -> list[int]:
    """Tokens of documents one after the other, until there are enough."""
    tokens: list[int] = []
    for document in documents:
        if isinstance(document, str):
            tokens += tokenizer.encode(document)
        else:
            text = tokenizer.render_chat(document, add_generation_prompt=False)
            tokens += tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) >= wanted:
            break
    return tokens


def read_documents(file: Path) -> list[Document]:
    """The texts and chats of a file; BadInput says what is wrong with it, and in which line."""
    if not file.is_file():
        wrong = "is a folder; give a file with text" if file.is_dir() else "there is no such file"
        raise BadInput(f"--calibration {file}: {wrong}")
    if file.suffix == ".parquet":
        found = [_document(row, f"{file}, row {number}") for number, row in enumerate(_parquet(file), 1)]
    else:
        text = _text(file)
        if file.suffix in (".jsonl", ".json"):
            found = [_document(value, where) for value, where in _objects(text, file)]
        else:
            found = list(_pieces(text))
    if not found:
        raise BadInput(f"--calibration {file}: the file is empty; give a text like those the model will see")
    return found


def _text(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"--calibration {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"--calibration {file}: byte {error.start} is not UTF-8; save the text as UTF-8") from None
    if not text.strip():
        raise BadInput(f"--calibration {file}: the file is empty; give a text like those the model will see")
    return text


def _pieces(text: str) -> Iterator[str]:
    """Parts of about `_PIECE` characters, cut at the ends of lines."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _PIECE)
        stop = len(text) if stop < 0 else stop + 1
        if text[start:stop].strip():
            yield text[start:stop]
        start = stop


def _objects(text: str, file: Path) -> Iterator[tuple[Any, str]]:
    """The values of a file of JSON lines, or of one JSON list."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise BadInput(f"--calibration {file}: not JSON: {error}") from None
        yield from ((value, f"{file}, item {number}") for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line), f"{file}, line {number}"
            except ValueError as error:
                raise BadInput(f"--calibration {file}, line {number}: not JSON: {error}") from None


def _document(value: Any, where: str) -> Document:
    if isinstance(value, Mapping):
        if isinstance(text := value.get("text"), str):
            return text
        if isinstance(messages := value.get("messages"), Sequence) and all(map(_is_message, messages)):
            return [dict(message) for message in messages]
        if isinstance(turns := value.get("conversations"), Sequence) and all(map(_is_turn, turns)):
            return [{"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]
    raise BadInput(f"--calibration {where}: needs 'text', or 'messages' of role and content")


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("from"), str) and isinstance(value.get("value"), str)


def _parquet(file: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise BadInput(f"--calibration {file}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        names = [name for name in parquet.read_schema(file).names if name in ("text", "messages", "conversations")]
        rows: list[dict[str, Any]] = parquet.read_table(file, columns=names).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise BadInput(f"--calibration {file}: not parquet: {' '.join(str(error).split())[:200]}") from None
    return rows
