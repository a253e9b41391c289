"""Who computes what in the next step. Knows no tensors and no clock, so that a simulator can drive it.

Continuous batching (Yu et al., "Orca", OSDI 2022) with chunked prefill (Agrawal et al., arXiv 2308.16369) on a paged
cache. Sequences have a rank, by which everything goes: each step gives one token to each that is writing, then what is
left of its room to prompts. Memory is given block by block, and when there is none left, the last in rank is put back
into the queue; what it had computed stays findable as long as nobody needs the memory. The first in rank always goes
on, so every sequence comes to its end.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, OutOfBudget
from .blocks import BLOCK, Blocks, block_name, blocks_for, root_name

Policy: TypeAlias = Literal["fcfs", "priority"]

# With the policy "priority", one level of priority is worth so many places in the order of arrival: within as many
# requests priorities are strict, and nobody is passed over by more than that for each level.
PLACES_PER_PRIORITY = 256


@dataclass(frozen=True)
class Limits:
    """What the engine may use.

    max_num_seqs: sequences that compute at once.  max_num_batched_tokens: tokens in one step.
    max_model_len: prompt and output of one sequence.  blocks: of cache, for all sequences together.
    prefix_caching: sequences share the blocks that they begin with.  policy: whose turn it is.
    mixed_prefill: prompt tokens in a step in which other sequences are writing; bounds how long a prompt holds them up.
    scored_prefill: prompt tokens in a step whose log-probabilities are wanted; bounds the logits.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    blocks: int
    prefix_caching: bool = True
    policy: Policy = "fcfs"
    mixed_prefill: int = 64
    scored_prefill: int = 64

    def __post_init__(self) -> None:
        names = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "blocks", "mixed_prefill", "scored_prefill")
        for name in names:
            if getattr(self, name) < 1:
                raise BadInput(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise BadInput(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: each of max_num_seqs={self.max_num_seqs} "
                "sequences needs one token a step"
            )


@dataclass(frozen=True)
class Work:
    """Tokens [start, start + count) of a sequence are to be computed, and up to ``guesses`` more if somebody has some.

    table: the blocks for all of them.  slot: where its state is, for models that have one; nobody else's meanwhile.
    samples: a new token follows.  reads: these are not its newest token alone: a prompt, or what was lost.
    """

    id: str
    start: int
    count: int
    guesses: int
    samples: bool
    reads: bool
    table: NDArray[np.int32]
    slot: int


@dataclass(eq=False)
class _Sequence:
    """tokens: with room for those to come, ``length`` of them known, ``computed`` of them in the cache."""

    id: str
    rank: tuple[int, int]
    tokens: NDArray[np.int32]
    prompt: int
    length: int
    salt: str
    scored: bool
    computed: int = 0
    cached: int = 0
    named: int = 0
    admissions: int = 0
    slot: int = -1
    table: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)

    @property
    def reads(self) -> bool:
        return self.length - self.computed > 1 or self.computed < self.prompt

    @property
    def missing(self) -> int:
        """Blocks that what it has to read will take."""
        return max(0, blocks_for(self.length) - len(self.table))

    @property
    def reusable(self) -> int:
        """Leading blocks that may come from others: never the last token's, because what follows it is not kept."""
        return 0 if self.scored else (self.length - 1) // BLOCK

    def names_of(self, first: int, end: int) -> list[bytes]:
        """Names of its blocks, all of them full."""
        for index in range(len(self.names), end):
            before = self.names[-1] if self.names else root_name(self.salt)
            self.names.append(block_name(before, self.tokens[index * BLOCK : (index + 1) * BLOCK]))
        return self.names[first:end]


class Scheduler:
    """prefix_queries, prefix_hits: prompt tokens looked up among the blocks that are there, and found."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.blocks = Blocks(limits.blocks)
        self.preemptions = self.prefix_queries = self.prefix_hits = 0
        self._arrivals = 0
        self._waiting: list[_Sequence] = []  # by rank
        self._running: list[_Sequence] = []  # by rank
        self._sequences: dict[str, _Sequence] = {}
        self._slots = list(reversed(range(limits.max_num_seqs)))
        self._work: dict[str, Work] = {}  # of the step that is being made up
        self._under_way: set[bytes] = set()  # blocks that it computes

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def tokens(self, id: str) -> NDArray[np.int32]:
        """Prompt and output of a sequence so far."""
        sequence = self._sequences[id]
        return sequence.tokens[: sequence.length]

    def cached(self, id: str) -> int:
        """Prompt tokens that a sequence found in the cache when it read its prompt."""
        return self._sequences[id].cached

    def writing(self) -> list[str]:
        """Sequences that need nothing but their newest token to go on."""
        return [each.id for each in self._running if not each.reads]

    def add(
        self,
        id: str,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        scored: bool = False,
        priority: int = 0,
        salt: str = "",
    ) -> None:
        """Queue a sequence that may write ``max_tokens`` more.

        scored: its prompt's log-probabilities are wanted, so all of it is computed.  priority: with that policy, the
        lower the earlier.  salt: only sequences of the same salt share blocks.
        Raises BadInput if it is longer than the model's window, OutOfBudget if no empty engine could hold it.
        """
        limits, size = self.limits, len(prompt)
        if size + max_tokens > limits.max_model_len:
            raise BadInput(
                f"{size} prompt tokens and max_tokens={max_tokens} are {size + max_tokens} tokens; "
                f"max_model_len is {limits.max_model_len}"
            )
        if priority and limits.policy != "priority":
            raise BadInput(f"priority={priority}: this engine serves in order of arrival (--scheduling-policy fcfs)")
        positions = size + max(max_tokens, 1) - 1  # the last token that it writes is never read back
        if blocks_for(positions) > limits.blocks:
            raise OutOfBudget(
                f"{positions} positions take {blocks_for(positions)} blocks of cache ({BLOCK} positions each); "
                f"the engine has {limits.blocks} for all requests together"
            )
        tokens = np.empty(size + max_tokens, np.int32)
        tokens[:size] = prompt
        rank = (self._arrivals + PLACES_PER_PRIORITY * priority, self._arrivals)
        self._arrivals += 1
        self._sequences[id] = _Sequence(id, rank, tokens, size, size, salt, scored)
        _insert(self._waiting, self._sequences[id])

    def schedule(self, wanted: Mapping[str, int] | None = None) -> list[Work]:
        """The next step; call `advance` for each when it is computed.

        wanted: how many guesses those that write would like to have checked; they get what room and memory there is.
        """
        self._work, self._under_way = {}, set()
        writing = [each for each in self._running if not each.reads]
        spare = self.limits.max_num_batched_tokens - len(writing)
        if self._waiting or len(writing) < len(self._running):  # somebody has to read, and goes before guesses
            spare -= self.limits.mixed_prefill
        for each in writing:
            if each.slot >= 0 and self._grow(each, each.length):  # it may have been put back for one before it
                guesses = min((wanted or {}).get(each.id, 0), max(spare, 0), self._free_positions(each))
                self._grow(each, each.length + guesses)
                spare -= guesses
                self._give(each, 1, guesses)
        self._admit()
        self._read(any_writes=bool(writing))
        return list(self._work.values())

    def advance(self, id: str, computed: int, drawn: Sequence[int] = (), shareable: int | None = None) -> None:
        """``computed`` positions of a sequence are in the cache now, and these tokens follow.

        shareable: leading positions that others may use, if not all of them.
        """
        each = self._sequences[id]
        each.computed = computed
        each.tokens[each.length : each.length + len(drawn)] = drawn
        each.length += len(drawn)
        if not self.limits.prefix_caching:
            return
        full = min(computed, computed if shareable is None else shareable) // BLOCK
        for index in range(each.named, full):
            self.blocks.name(each.table[index], each.names_of(index, index + 1)[0])
        each.named = max(each.named, full)

    def remove(self, id: str) -> bool:
        """Forget a sequence, wherever it is, and free its memory; False if there is none of that id."""
        if (each := self._sequences.pop(id, None)) is None:
            return False
        if each.slot >= 0:
            self._put_back(each)
        else:
            self._waiting.remove(each)
        return True

    def _read(self, *, any_writes: bool) -> None:
        """What is left of the step's room goes to those that read, in the order of their ranks."""
        room = self.limits.max_num_batched_tokens - sum(each.count + each.guesses for each in self._work.values())
        if any_writes:
            room = min(room, self.limits.mixed_prefill)
        scored = self.limits.scored_prefill
        for each in list(self._running):
            if each.slot < 0 or not each.reads:
                continue
            self._reuse(each, self._find(each))
            count = min(each.length - each.computed, room, scored if each.scored else room)
            # A block that somebody before it computes in this step it will find there in the next one.
            if count < 1 or self._is_under_way(each) or not self._grow(each, each.computed + count):
                continue
            room -= count
            scored -= count if each.scored else 0
            self._give(each, count, 0)

    def _give(self, each: _Sequence, count: int, guesses: int) -> None:
        end = each.computed + count
        if self.limits.prefix_caching and each.reads:
            full = min(blocks_for(end), each.length // BLOCK)
            self._under_way.update(each.names_of(each.computed // BLOCK, full))
        table = np.array(each.table, np.int32)
        samples = end == each.length
        self._work[each.id] = Work(each.id, each.computed, count, guesses, samples, each.reads, table, each.slot)

    def _admit(self) -> None:
        """From the queue to those that compute, as long as the first fits; those behind it wait with it.

        It fits if its tokens do, beside those that others have still to read, with a block to grow for each of them.
        """
        promised = sum(each.missing for each in self._running if each.reads)
        while self._waiting and len(self._running) < self.limits.max_num_seqs:
            head = self._waiting[0]
            reused = self._find(head)
            need = blocks_for(head.length) - len(reused)
            free = self.blocks.available - self.blocks.unheld(reused)
            if need + promised + len(self._running) > free:
                break
            self._waiting.pop(0)
            head.slot = self._slots.pop()
            head.admissions += 1
            _insert(self._running, head)
            if self.limits.prefix_caching and not head.scored and head.admissions == 1:
                self.prefix_queries += head.prompt
            self._reuse(head, reused)
            promised += head.missing

    def _find(self, each: _Sequence) -> list[int]:
        """Blocks of others that continue what it has computed; only from a border between blocks on."""
        if not self.limits.prefix_caching or each.computed % BLOCK:
            return []
        return self.blocks.find(each.names_of(each.computed // BLOCK, each.reusable))

    def _reuse(self, each: _Sequence, found: Sequence[int]) -> None:
        for block in found:
            self.blocks.hold(block)
        each.table += found
        each.computed += len(found) * BLOCK
        each.named = max(each.named, len(each.table)) if found else each.named
        if each.admissions == 1:
            each.cached += len(found) * BLOCK
            self.prefix_hits += len(found) * BLOCK

    def _is_under_way(self, each: _Sequence) -> bool:
        index = each.computed // BLOCK
        if each.computed % BLOCK or index >= each.reusable or not self._under_way:
            return False
        return each.names_of(index, index + 1)[0] in self._under_way

    def _free_positions(self, each: _Sequence) -> int:
        """Positions beyond its length that it can have without taking a block from anybody."""
        return (len(each.table) + self.blocks.available) * BLOCK - each.length

    def _grow(self, each: _Sequence, positions: int) -> bool:
        """Blocks for so many positions, at the cost of those that come after it in rank; False if they have none."""
        need = blocks_for(positions) - len(each.table)
        while need > self.blocks.available:
            victim = next(other for other in reversed(self._running) if other.table or other is each)
            if victim is each:  # it keeps what it has and waits, until one before it wants that
                return False
            self._put_back(victim)
            self.preemptions += 1
            _insert(self._waiting, victim)
        each.table += [self.blocks.take() for _ in range(need)]
        return True

    def _put_back(self, each: _Sequence) -> None:
        """Out of those that compute, its blocks given back; it begins again with what is still there of them."""
        self.blocks.release(each.table)
        self._running.remove(each)
        self._work.pop(each.id, None)
        self._slots.append(each.slot)
        each.slot, each.table, each.computed, each.named = -1, [], 0, 0


def _insert(sequences: list[_Sequence], each: _Sequence) -> None:
    bisect.insort(sequences, each, key=lambda other: other.rank)
