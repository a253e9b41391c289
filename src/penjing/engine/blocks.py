"""Who has which block of the key-value cache, and what full blocks hold, so that requests share what is common.

The cache is paged (Kwon et al., "PagedAttention", SOSP 2023): a sequence has a table of blocks of `BLOCK` positions, in
any order. A full block is named by a hash of its tokens and of all tokens before them, so whoever begins with the same
tokens finds it. Only full blocks are shared, and nobody writes into them again, so none is ever copied.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..kernels import KV_TOKENS

BLOCK = KV_TOKENS
NAME_BYTES = 32  # long enough that nobody finds two texts of one name, not even on purpose


def blocks_for(positions: int) -> int:
    return -(-positions // BLOCK)


def root_name(salt: str) -> bytes:
    """What the first block of a sequence follows: sequences of different salts never share a block."""
    return hashlib.blake2b(salt.encode(), digest_size=NAME_BYTES, person=b"penjing.salt").digest()


def block_name(before: bytes, tokens: NDArray[np.int32]) -> bytes:
    """The name of a full block of ``tokens`` that follows the block named ``before``."""
    return hashlib.blake2b(before + tokens.tobytes(), digest_size=NAME_BYTES, person=b"penjing.block").digest()


class Blocks:
    """Blocks 0 … count − 1. Each is free, held by one sequence or more, or kept for its contents by nobody.

    Those that nobody holds are given away when no free one is left, the longest unused first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(reversed(range(count)))  # the last one given back goes out first: its memory is there already
        self._kept: OrderedDict[int, None] = OrderedDict()  # named and held by nobody, the longest unused first
        self._holders = [0] * count
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        return self.count - self.available

    def take(self) -> int:
        """A block for one holder, its contents forgotten; there must be one available."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            del self._named[self._names.pop(block)]
        self._holders[block] = 1
        return block

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks of the first names, as far as they are all there. They are not held by this."""
        found = []
        for name in names:
            if (block := self._named.get(name)) is None:
                break
            found.append(block)
        return found

    def unheld(self, blocks: Sequence[int]) -> int:
        """How many of these nobody holds: holding them makes so many fewer available."""
        return sum(not self._holders[block] for block in blocks)

    def hold(self, block: int) -> None:
        """One holder more of a named block."""
        if not self._holders[block]:
            del self._kept[block]
        self._holders[block] += 1

    def name(self, block: int, name: bytes) -> None:
        """The block is full, and nobody will write into it again. The first of a name is the one that is shared."""
        if name not in self._named:
            self._named[name] = block
            self._names[block] = name

    def release(self, table: Sequence[int]) -> None:
        """One holder less of each. The end of the table is forgotten before its beginning, which more texts share."""
        for block in reversed(table):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._names:
                self._kept[block] = None
            else:
                self._free.append(block)
