"""Guesses at the next tokens, so that one pass over the weights checks several instead of making one.

The model draws each token from its own logits all the same, and goes on only as long as the draw is the guess
(Leviathan et al., arXiv 2211.17192, for drawing that is repeatable): the text is the same token for token, greedy or
sampled, whatever was guessed. Wrong guesses cost time, so there are as many as have paid so far, down to none. What
a draft costs is measured, for its bytes say too little: where weights lie in the processor's cache, nearly a step.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..errors import BadInput, PenjingError, Unsupported
from ..kernels import Sampler
from ..models.step import Chunk, StepModel
from .blocks import blocks_for
from .messages import SamplingParams
from .sampler import sampler_for
from .scheduler import Work

log = logging.getLogger("penjing.engine")

Tokens = NDArray[np.int32]

LONGEST_MATCH, SHORTEST_MATCH = 8, 2  # tokens that a place must share with the end of the text
ROW_COST = 0.1  # what one more row costs in a step that is bound by reading weights, of the step's time
MEASURED = 5  # steps of each kind that are timed, of which the fastest counts
MOST_ROWS = 16  # in a step with guesses: with more, products are bound by arithmetic and nothing is gained
PROBE_EVERY = 32  # tokens that are written without guesses before one is tried again
TRIALS = 4  # guesses that a draft may make for a sequence beyond those that pay, before it is given up for this one
TRY_EVERY = 32  # sequences, of which one is tried with a draft that has not paid of late


def look_up(tokens: Tokens, count: int) -> list[int]:
    """What followed the last place in ``tokens`` that looks like their end, as if it went on so; or nothing.

    The longest match of `SHORTEST_MATCH` to `LONGEST_MATCH` tokens counts, of equal ones the latest (Saxena, "Prompt
    lookup decoding", 2023).
    """
    places = np.flatnonzero(tokens[:-1] == tokens[-1])
    length = 1
    while length < min(LONGEST_MATCH, len(tokens)):
        longer = places[places >= length]
        longer = longer[tokens[longer - length] == tokens[-1 - length]]
        if not len(longer):
            break
        places, length = longer, length + 1
    if length < SHORTEST_MATCH or not len(places):
        return []
    return [int(token) for token in np.resize(tokens[places[-1] + 1 :], count)]  # repeated, if it meets the end


class Guesser(Protocol):
    cost: float
    """Time that one guess takes to be made and checked, as a share of a step of the model."""
    reads: bool
    """Does it read all that it guesses after, in steps of its own?"""

    def guess(self, works: Sequence[Work], tokens: Mapping[str, Tokens]) -> dict[str, list[int]]:
        """For those of the works that ask for guesses, at most so many; all tokens of their sequences are given."""

    def checked(self, work: Work, guesses: int, accepted: int) -> int | None:
        """So many of the guesses were right. How many leading positions others may use; None for all."""

    def give_up(self, id: str) -> None:
        """No guess will be asked for this sequence any more."""

    def forget(self, id: str) -> None: ...


class PromptLookup:
    """The text itself says what comes next: names, quotations, code."""

    cost, reads = ROW_COST, False

    def guess(self, works: Sequence[Work], tokens: Mapping[str, Tokens]) -> dict[str, list[int]]:
        return {work.id: look_up(tokens[work.id], work.guesses) for work in works if work.guesses}

    def checked(self, work: Work, guesses: int, accepted: int) -> int | None:
        return None

    def give_up(self, id: str) -> None: ...

    def forget(self, id: str) -> None: ...


def check_tokens(draft: Checkpoint, target: Checkpoint) -> None:
    """BadInput if a draft's tokenizer gives other numbers to tokens: its guesses would be at another text."""
    first, second = (_tokens(each) for each in (draft, target))
    if first is not None and second is not None and first != second:
        raise BadInput(
            f"{draft.path}: its tokenizer is not that of {target.path}; a draft is a smaller copy of the same model"
        )


def _tokens(checkpoint: Checkpoint) -> tuple[Any, Any] | None:
    """What tokenizer.json numbers; None without one, which whoever reads text will say better."""
    stored = checkpoint.side_files.get("tokenizer.json")
    try:
        values = json.loads(stored.read_bytes() if isinstance(stored, Path) else stored or b"null")
    except (ValueError, RecursionError):
        return None
    return (values.get("model"), values.get("added_tokens")) if isinstance(values, dict) else None


def measured_cost(
    draft: StepModel, target: StepModel, most: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Time of one of ``most`` guesses, made by the draft and checked by the model, as a share of a step of the model.

    clock: seconds. Both must have room for ``most + 1`` positions in the first blocks of their caches, which nobody
    uses yet and whoever does will write over.
    """
    greedy = SamplingParams(temperature=0)
    table = np.arange(blocks_for(most + 1), dtype=np.int32)

    def seconds(model: StepModel, guesses: int) -> float:
        sampler = sampler_for(greedy, [], (), model.config.vocab_size)
        chunk = Chunk(np.zeros(1 + guesses, np.int32), 0, table, sampler=sampler, guesses=guesses)
        start = clock()
        model.step([chunk])
        return clock() - start

    kinds = ((target, 0), (target, most), (draft, 0))
    rounds = [[seconds(*kind) for kind in kinds] for _ in range(MEASURED)]  # alternating: a slow moment meets all
    one, several, guess = (min(times) for times in zip(*rounds, strict=True))
    return float((guess + max(0.0, several - one) / most) / one)


class Draft:
    """A smaller copy of the model guesses, greedily.

    Its cache is in the same blocks as the model's: one table, one allocator, and what is shared of one is shared of
    the other. It reads prompts in the same steps, and what is written when it is asked for a guess; only positions
    that both have computed are offered to others.
    """

    reads = True

    def __init__(self, model: StepModel, target: StepModel, longest: int, step_tokens: int, cost: float) -> None:
        """longest: positions that it must have.  step_tokens: that it computes at once.  cost: see `measured_cost`.

        Raises BadInput if it is no model for the same tokens, Unsupported if it cannot be one.
        """
        if model.has_state:
            raise Unsupported("the draft has recurrent state, which cannot be taken back when a guess is wrong")
        if model.config.vocab_size != target.config.vocab_size:
            raise BadInput(
                f"the draft has a vocabulary of {model.config.vocab_size} tokens, the model one of "
                f"{target.config.vocab_size}; a draft is a smaller copy of the same model"
            )
        if model.config.max_position < longest:
            raise BadInput(f"the draft has positions for {model.config.max_position} tokens; {longest} are needed")
        self.cost = cost
        self._model = model
        self._step_tokens = step_tokens
        self._samplers: dict[str, Sampler] = {}
        self._drafted: dict[str, int] = {}  # leading positions that are in its cache
        self._lost: set[str] = set()  # sequences in whose cache is a gap, or that are not worth reading

    def guess(self, works: Sequence[Work], tokens: Mapping[str, Tokens]) -> dict[str, list[int]]:
        asked, chunks = [], []
        room = self._step_tokens - sum(work.count for work in works if work.reads)
        for work in works:
            start = work.start if work.reads else min(work.start, self._drafted.get(work.id, work.start))
            end = work.start + work.count
            if work.id in self._lost or not (work.reads or work.guesses) or (not work.reads and end - start > room):
                continue
            room -= 0 if work.reads else end - start
            asked.append(work)
            sampler = self._sampler(work.id) if work.guesses else None
            chunks.append(Chunk(tokens[work.id][start:end], start, work.table, sampler=sampler))
            self._drafted[work.id] = start
        found: dict[str, list[int]] = {}
        self._draw(asked, chunks, found)
        for each in asked:
            if each.id not in self._lost:
                self._drafted[each.id] = each.start + each.count
        for done in range(1, max((work.guesses for work in asked), default=0)):
            more = [work for work in asked if work.guesses > done and len(found.get(work.id, ())) == done]
            self._draw(more, [self._next(work, found[work.id][-1], done) for work in more], found)
        return found

    def _next(self, work: Work, guess: int, done: int) -> Chunk:
        place = work.start + work.count + done - 1
        return Chunk(np.array([guess], np.int32), place, work.table, sampler=self._sampler(work.id))

    def _sampler(self, id: str) -> Sampler:
        if id not in self._samplers:
            greedy = SamplingParams(temperature=0)
            self._samplers[id] = sampler_for(greedy, [], (), self._model.config.vocab_size)
        return self._samplers[id]

    def _draw(self, works: Sequence[Work], chunks: Sequence[Chunk], found: dict[str, list[int]]) -> None:
        if not chunks:
            return
        try:
            results = self._model.step(chunks)
        except (PenjingError, MemoryError, RuntimeError, ArithmeticError) as error:
            log.warning("the draft failed, and guesses no more for %d sequences: %s", len(works), error)
            self._lost.update(work.id for work in works)
            return
        for work, result in zip(works, results, strict=True):
            if result.error:
                self._lost.add(work.id)
            elif result.tokens:
                found.setdefault(work.id, []).append(result.tokens[0])

    def checked(self, work: Work, guesses: int, accepted: int) -> int | None:
        if guesses and work.id not in self._lost:  # the last guess was made, not read
            self._drafted[work.id] = work.start + work.count + min(accepted, guesses - 1)
        return self._drafted.get(work.id, 0)

    def give_up(self, id: str) -> None:
        self._lost.add(id)

    def forget(self, id: str) -> None:
        self._drafted.pop(id, None)
        self._samplers.pop(id, None)
        self._lost.discard(id)


@dataclass
class Acceptance:
    """How often guesses were right, of late; it begins with a little hope."""

    right: float = 1.2
    tried: float = 2.0
    idle: int = 0

    def note(self, guesses: int, accepted: int) -> None:
        """The guesses behind the first wrong one were never tried."""
        self.right = 0.8 * self.right + accepted
        self.tried = 0.8 * self.tried + min(guesses, accepted + 1)

    @property
    def rate(self) -> float:
        return min(self.right / self.tried, 0.99)

    def lightly(self) -> Acceptance:
        """The same rate with the weight of a beginning, for the next sequence."""
        return Acceptance(2.0 * self.rate, 2.0)

    def best(self, most: int, cost: float) -> int:
        """How many guesses give most tokens for the time, at ``cost`` steps each (Leviathan et al., theorem 3.8).

        That is none unless they are right more often than they cost steps.
        """
        rate = self.rate

        def speed(count: int) -> float:
            return (1 - rate ** (count + 1)) / (1 - rate) / (1 + cost * count)

        return max(range(most + 1), key=speed)


class Speculation:
    """Guesses for all sequences, and the account of them.

    drafts: times that anything was guessed.  guessed, accepted: tokens.
    """

    def __init__(self, guesser: Guesser, most: int) -> None:
        if most < 1:
            raise BadInput(f"num_speculative_tokens={most}: at least 1 is needed")
        self.guesser = guesser
        self.most = most
        self.drafts = self.guessed = self.accepted = 0
        self._acceptance: dict[str, Acceptance] = {}
        self._of_all = Acceptance()
        self._given_up: set[str] = set()
        self._seen = 0

    def wanted(self, left: Mapping[str, int]) -> dict[str, int]:
        """How many guesses are worth their time for sequences that write; ``left``: tokens that each may yet write."""
        each = (MOST_ROWS - len(left)) // max(1, len(left))
        if each < 1:
            return {}
        found = {}
        for id, tokens in left.items():
            acceptance = self._of(id)
            count = 0 if id in self._given_up else acceptance.best(min(self.most, each), self.guesser.cost)
            if not count:
                count = self._probe(id, acceptance)
            found[id] = min(count, tokens - 1)  # the last token comes from the model anyway
        return found

    def guess(self, works: Sequence[Work], tokens: Mapping[str, Tokens]) -> dict[str, list[int]]:
        for work in works:
            self._of(work.id)
        return self.guesser.guess(works, tokens)

    def _of(self, id: str) -> Acceptance:
        """The account of a sequence. One that nothing will be gained for is given up before its prompt is read."""
        if id not in self._acceptance:
            self._seen += 1
            self._acceptance[id] = begun = self._of_all.lightly() if self.guesser.reads else Acceptance()
            tried = self._seen % TRY_EVERY == 0 and self.guesser.cost < 1
            if self.guesser.reads and begun.rate <= self.guesser.cost and not tried:
                self._give_up(id)
        return self._acceptance[id]

    def _probe(self, id: str, acceptance: Acceptance) -> int:
        """A guess all the same, now and then: a text may change.

        A draft has to read all that it did not guess in, which can cost more than is ever gained: it gets a few trials,
        one after another, and if they do not bring the sequence back it is left alone.
        """
        if id in self._given_up:
            return 0
        acceptance.idle += 1
        if not self.guesser.reads:
            return int(acceptance.idle % PROBE_EVERY == 0)
        if acceptance.idle > TRIALS:
            self._give_up(id)
            return 0
        return 1

    def _give_up(self, id: str) -> None:
        self._given_up.add(id)
        self.guesser.give_up(id)

    def checked(self, work: Work, guesses: int, accepted: int) -> int | None:
        """See `Guesser.checked`."""
        if guesses:
            self.drafts += 1
            self.guessed += guesses
            self.accepted += accepted
            self._acceptance[work.id].note(guesses, accepted)
            self._of_all.note(guesses, accepted)
        return self.guesser.checked(work, guesses, accepted)

    def forget(self, id: str) -> None:
        self._acceptance.pop(id, None)
        self._given_up.discard(id)
        self.guesser.forget(id)
