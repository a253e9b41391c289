"""Blocks of cache: whose they are, what they hold, which of them goes first."""

from __future__ import annotations

import numpy as np
import pytest

from penjing.engine.blocks import BLOCK, Blocks, block_name, blocks_for, root_name


def names(*letters: str) -> list[bytes]:
    return [letter.encode() for letter in letters]


def filled(count: int, *letters: str) -> tuple[Blocks, list[int]]:
    """The first blocks taken and named."""
    blocks = Blocks(count)
    table = [blocks.take() for _ in letters]
    for block, name in zip(table, names(*letters), strict=True):
        blocks.name(block, name)
    return blocks, table


@pytest.mark.parametrize(("positions", "expected"), [(0, 0), (1, 1), (BLOCK, 1), (BLOCK + 1, 2)])
def test_blocks_for(positions: int, expected: int) -> None:
    assert blocks_for(positions) == expected


def test_a_block_is_given_to_one_and_comes_back() -> None:
    blocks = Blocks(3)
    table = [blocks.take() for _ in range(3)]
    assert sorted(table) == [0, 1, 2]
    assert (blocks.available, blocks.held) == (0, 3)
    blocks.release(table[:2])
    assert (blocks.available, blocks.held) == (2, 1)


def test_what_is_found_is_the_longest_beginning() -> None:
    blocks, table = filled(6, "a", "b", "c")
    assert blocks.find(names("a", "b", "c", "d")) == table
    assert blocks.find(names("a", "x", "c")) == table[:1]
    assert blocks.find(names("x", "b")) == []


def test_a_shared_block_comes_back_from_the_last_holder() -> None:
    blocks, table = filled(2, "a", "b")
    blocks.hold(table[0])
    blocks.release(table)
    assert blocks.held == 1
    assert blocks.unheld(table) == 1
    blocks.release(table[:1])
    assert blocks.held == 0
    assert blocks.find(names("a", "b")) == table


def test_the_longest_unused_is_forgotten_first_and_ends_before_beginnings() -> None:
    blocks, table = filled(4, "a", "b", "c", "d")
    blocks.release(table[2:])  # c, d: d first
    blocks.release(table[:2])
    assert [blocks.take() for _ in range(2)] == [table[3], table[2]]
    assert blocks.find(names("a", "b")) == table[:2]
    blocks.hold(table[0])  # used again
    blocks.release(table[:1])
    assert blocks.take() == table[1]
    assert blocks.find(names("a")) == table[:1]


def test_free_ones_go_before_those_that_hold_something() -> None:
    blocks, table = filled(3, "a")
    blocks.release(table)
    assert {blocks.take(), blocks.take()} == {1, 2}
    assert blocks.find(names("a")) == table


def test_of_two_that_hold_the_same_the_first_is_shared() -> None:
    blocks, table = filled(2, "a")
    twin = blocks.take()
    blocks.name(twin, b"a")
    blocks.release([twin, *table])
    assert blocks.find(names("a")) == table
    assert blocks.take() == twin


def test_names_say_all_that_is_before_and_the_salt() -> None:
    tokens = np.arange(BLOCK, dtype=np.int32)
    other = tokens.copy()
    other[-1] += 1
    first = block_name(root_name(""), tokens)
    found = {
        first,
        block_name(root_name(""), other),
        block_name(root_name("salt"), tokens),
        block_name(first, tokens),
        block_name(block_name(root_name(""), other), tokens),
    }
    assert len(found) == 5
    assert {len(name) for name in found} == {32}
    assert block_name(root_name(""), tokens) == first
