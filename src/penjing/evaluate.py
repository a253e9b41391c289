"""How well a model predicts held-out text, and what compressing changed: ΔL, perplexity, KL, top-1 agreement.

The text is cut into windows of `context_length` tokens, one beginning every `stride` tokens; a window scores the
tokens that no window before it has scored, each predicted from what is left of it in the window. All windows go
through one block of the model after another, so that no more than one block's weights are in memory.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import hardware, models
from .checkpoint.atomic import read_json
from .checkpoint.journal import ARTIFACT
from .errors import BadCheckpoint, BadInput, PenjingError
from .models.tokenizer import Tokenizer
from .overlap import check_held_out
from .stats import paired_change

if TYPE_CHECKING:
    from .models.foreign.texts import GraphTexts

Texts: TypeAlias = "models.Stream | GraphTexts"
Logits: TypeAlias = Callable[[NDArray[np.int64]], NDArray[np.float32]]
Interval: TypeAlias = tuple[float, float]
# How far the work is: (done, all of it), in blocks; called from the thread that evaluates.
Progress: TypeAlias = Callable[[float, float], None]

SPILL_BYTES = 1 << 30  # activations beyond this lie in a temporary file
LENGTH = 512  # tokens in a window
LOGITS = 1 << 22  # logits that are in memory at once, so that tokens × vocabulary never is


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats per token, over `tokens` scored tokens.

    With a base: `loss_change` is loss − base_loss, `kl` the mean of KL(base‖model) over next-token distributions, and
    `top1_agreement` the share of tokens for which both prefer the same. Each 95 % interval is that of a mean over
    windows (paired, for the loss), and None where there is only one window.
    """

    tokens: int
    loss: float
    perplexity: float
    context_length: int
    stride: int
    windows: int
    seconds: float
    peak_rss_bytes: int
    base_loss: float | None = None
    base_perplexity: float | None = None
    loss_change: float | None = None
    loss_change_ci95: Interval | None = None
    kl: float | None = None
    kl_ci95: Interval | None = None
    top1_agreement: float | None = None
    top1_agreement_ci95: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `penjing evaluate --json` prints it; the fields about a base only if there was one."""
        values = asdict(self)
        return values if self.base_loss is not None else {k: v for k, v in values.items() if v is not None}

    def __str__(self) -> str:
        rows = [f"loss        {self.loss:.4f}   perplexity {self.perplexity:.3f}"]
        if self.base_loss is not None:
            rows += [
                f"base loss   {self.base_loss:.4f}   perplexity {self.base_perplexity:.3f}",
                f"change ΔL  {self.loss_change:+.4f}   {interval(self.loss_change_ci95, '+.4f')}",
                f"KL          {self.kl:.5f}  {interval(self.kl_ci95, '.5f')}",
                f"same top-1  {self.top1_agreement:.2%}   {interval(self.top1_agreement_ci95, '.2%')}",
            ]
        where = f"{self.tokens} tokens in {self.windows} windows of {self.context_length}, stride {self.stride}"
        return "\n".join([*rows, f"on          {where}; {self.seconds:.1f} s"])


def interval(ends: Sequence[float] | None, form: str) -> str:
    """An interval's ends in a number format, or that there is none."""
    return f"95 % [{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "no interval: one window only"


@dataclass(frozen=True)
class Window:
    """A piece of text that is computed on its own; its last `scored` tokens count."""

    tokens: NDArray[np.int64]
    scored: int


def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str],
    against: str | Path | None = None,
    *,
    context_length: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on held-out text, and the change against the model it was made from.

    model, against: folders.  data: a ``.txt`` file (one text), a ``.jsonl`` file (a text in ``text`` of each line), or
    texts.  context_length: 512 by default, or what the model can take.  stride: that by default, so that windows do not
    overlap.  max_tokens: use only so many from the beginning.  Raises BadInput, before any work, for text or settings
    that cannot be measured, for models of different vocabularies, for text that the model was calibrated on, and
    PenjingError if a loss is not finite.
    """
    began = time.monotonic()
    streams = [models.texts(folder) for folder in ([model] if against is None else [model, against])]
    models.use_threads(threads)
    if context_length is None:
        context_length = min([LENGTH, *(stream.config.max_position for stream in streams)])
    stride = context_length if stride is None else stride
    _check_settings(streams, context_length, stride, max_tokens)
    texts = read_texts(data) if isinstance(data, (str, Path)) else list(data)
    check_held_out(texts, calibrated_text(model), _name(data))
    documents = _tokens(streams, texts, max_tokens)
    windows = [window for document in documents for window in cut(document, context_length, stride)]
    if not windows:
        raise BadInput(f"{_name(data)}: the text is {sum(map(len, documents))} tokens; at least 2 are needed")
    total = len(windows) * sum(_steps(stream) for stream in streams)
    scores = _measure(streams, windows, _Counter(progress or _ignore, total))
    return Evaluation(
        **_summary(scores, windows),
        context_length=context_length,
        stride=stride,
        windows=len(windows),
        seconds=time.monotonic() - began,
        peak_rss_bytes=hardware.peak_memory_bytes(),
    )


def calibrated_text(model: str | Path) -> list[int]:
    """The sketch (see `overlap`) of what a compressed model was calibrated on; empty where it was not."""
    artifact = Path(model) / ARTIFACT
    found = read_json(artifact, BadCheckpoint).get("calibrated_text") if artifact.is_file() else None
    return [value for value in found if type(value) is int] if isinstance(found, list) else []


def _steps(stream: Texts) -> int:
    """Of a window through a model: its blocks, if they go one after the other, and the logits."""
    return stream.config.layers + 1 if isinstance(stream, models.Stream) else 1


def _ignore(done: float, total: float) -> None:
    pass


class _Counter:
    """Adds up what was done and says so; a unit is one window through one block."""

    def __init__(self, progress: Progress, total: float) -> None:
        self.progress, self.total, self.done = progress, total, 0.0

    def add(self, amount: float) -> None:
        self.done += amount
        self.progress(self.done, self.total)


def _name(data: str | Path | Sequence[str]) -> str:
    return str(data) if isinstance(data, (str, Path)) else "data"


def _check_settings(streams: Sequence[Texts], length: int, stride: int, max_tokens: int | None) -> None:
    for stream in streams:
        if not 2 <= length <= stream.config.max_position:
            raise BadInput(
                f"context_length={length}: {stream.checkpoint.path} can take 2 to {stream.config.max_position} tokens"
            )
    if not 1 <= stride <= length:
        raise BadInput(f"stride={stride}: give 1 to context_length = {length}")
    if max_tokens is not None and max_tokens < 2:
        raise BadInput(f"max_tokens={max_tokens}: at least 2 tokens are needed, one to predict the other from")
    sizes = {stream.config.vocab_size for stream in streams}
    if len(sizes) > 1:
        raise BadInput(
            f"vocabularies of {streams[0].config.vocab_size} and {streams[1].config.vocab_size} tokens "
            f"have no KL: {streams[1].checkpoint.path} is not what {streams[0].checkpoint.path} was made from"
        )


def read_texts(file: str | Path) -> list[str]:
    """The texts of a ``.jsonl`` file (one in ``text`` of each line) or the one of any other file, as UTF-8."""
    file = Path(file)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror}; give a file with text") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: byte {error.start} is not UTF-8; give a text file") from None
    if not text.strip():
        raise BadInput(f"{file}: there is no text in it")
    if file.suffix != ".jsonl":
        return [text]
    return [_text_of(line, f"{file}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise BadInput(f"{where}: an object with a string in 'text' is needed")
    return str(value["text"])


def _tokens(streams: Sequence[Texts], texts: Sequence[str], limit: int | None) -> list[NDArray[np.int64]]:
    """Token ids of each text, the first ``limit`` of all; every model must read the text as the same tokens."""
    read = [[Tokenizer(stream.checkpoint.path).encode(text) for text in texts] for stream in streams]
    if any(ids != read[0] for ids in read):
        raise BadInput(
            f"the tokenizers of {' and '.join(str(stream.checkpoint.path) for stream in streams)} "
            "read the text as different tokens; losses per token cannot be compared"
        )
    documents, left = [], math.inf if limit is None else limit
    for ids in read[0]:
        documents.append(np.array(ids[: int(min(left, len(ids)))], np.int64))
        left -= len(documents[-1])
    vocabulary = streams[0].config.vocab_size
    if any(document.size and document.max() >= vocabulary for document in documents):
        raise BadInput(
            f"{streams[0].checkpoint.path}: the tokenizer has ids beyond the model's vocabulary of {vocabulary}"
        )
    return documents


def cut(document: NDArray[np.int64], length: int, stride: int) -> Iterator[Window]:
    """Windows over one text; the first token of a window cannot be predicted, and counts where another scored it."""
    scored_to = 0
    for start in range(0, len(document), stride):
        end = min(start + length, len(document))
        scored = end - max(scored_to, start + 1)
        if scored > 0:
            yield Window(document[start:end], scored)
        scored_to = end
        if end == len(document):
            break


@dataclass(frozen=True)
class _Scores:
    """Per scored token: losses float64 of the models, and with a base KL and whether both prefer the same token."""

    losses: NDArray[np.float64]  # (models, tokens)
    kl: NDArray[np.float64]
    agree: NDArray[np.float64]


def _measure(streams: Sequence[Texts], windows: Sequence[Window], counter: _Counter) -> _Scores:
    """The last block's output of each model in turn, then the logits of all side by side, some rows at a time."""
    with tempfile.TemporaryDirectory(prefix="penjing-") as spill:
        ways = [_logits(stream, windows, Path(spill) / str(number), counter) for number, stream in enumerate(streams)]
        rows, targets = _targets(windows)
        losses = np.empty((len(streams), len(rows)))
        kl, agree = np.zeros(len(rows)), np.zeros(len(rows))
        step = max(1, LOGITS // streams[0].config.vocab_size)
        for low in range(0, len(rows), step):
            part = slice(low, low + step)
            logs = [log_softmax(logits(rows[part])) for logits in ways]
            for number, log in enumerate(logs):
                losses[number, part] = -log[np.arange(len(log)), targets[part]]
            if len(logs) == 2:
                kl[part], agree[part] = _compare(logs[1], logs[0])
            counter.add(len(streams) * len(windows) * len(logs[0]) / len(rows))
    return _Scores(losses, kl, agree)


def _logits(stream: Texts, windows: Sequence[Window], spill: Path, counter: _Counter) -> Logits:
    """What makes logits (n, vocabulary) of rows of all windows' tokens, in ascending order."""
    if not isinstance(stream, models.Stream):
        return stream.reader([window.tokens for window in windows])
    x, head = _hidden(stream, windows, spill, counter), stream.head()
    return lambda rows: stream.logits(x[rows], *head)


def _hidden(stream: models.Stream, windows: Sequence[Window], spill: Path, counter: _Counter) -> NDArray[np.float32]:
    """What comes out of the last block, for the tokens of all windows: float32 (tokens, hidden)."""
    sizes = [len(window.tokens) for window in windows]
    shape = (sum(sizes), stream.config.hidden)
    x: NDArray[np.float32]
    if 4 * shape[0] * shape[1] > SPILL_BYTES:
        x = np.memmap(spill, np.float32, "w+", shape=shape)
    else:
        x = np.empty(shape, np.float32)
    stream.embed(np.concatenate([window.tokens for window in windows]), x)
    for block in stream.blocks():
        stream.run(block, x, sizes, done=counter.add)
    return x


def _targets(windows: Sequence[Window]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of all windows' tokens from which a scored token is predicted, and that token."""
    rows, targets, start = [], [], 0
    for window in windows:
        size = len(window.tokens)
        rows.append(np.arange(start + size - window.scored - 1, start + size - 1))
        targets.append(window.tokens[size - window.scored :])
        start += size
    return np.concatenate(rows), np.concatenate(targets)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities over the last axis, in place."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits


def _compare(base: NDArray[np.float32], model: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """KL(base‖model) and whether the most likely tokens agree, for each row of log-probabilities."""
    kl = np.einsum("ij,ij->i", np.exp(base), base - model, dtype=np.float64)
    return kl, base.argmax(axis=1) == model.argmax(axis=1)


def _summary(scores: _Scores, windows: Sequence[Window]) -> dict[str, Any]:
    means = [float(losses.mean()) for losses in scores.losses]
    if not all(map(math.isfinite, means)):
        raise PenjingError("the loss is not finite; the weights hold numbers that cannot be computed with")
    summary: dict[str, Any] = {"tokens": scores.losses.shape[1], "loss": means[0], "perplexity": _exp(means[0])}
    if len(means) == 1:
        return summary
    clusters = np.repeat(np.arange(len(windows)), [window.scored for window in windows])
    nothing = np.zeros(len(clusters))
    measured = {
        "loss_change": paired_change(scores.losses[1], scores.losses[0], clusters),
        "kl": paired_change(nothing, scores.kl, clusters),
        "top1_agreement": paired_change(nothing, scores.agree, clusters),
    }
    summary |= {"base_loss": means[1], "base_perplexity": _exp(means[1])}
    summary |= {name: change.mean for name, change in measured.items()}
    for name, change in measured.items():
        summary[f"{name}_ci95"] = (change.low, change.high) if change.n > 1 else None
    return summary


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # float64 ends at e^709
