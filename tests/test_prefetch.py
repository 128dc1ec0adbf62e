"""Pairs come in order, sources are loaded once while they are held, and few are held."""

import threading

import pytest

from gim_jax.prefetch import load_pairs


def exhaustive(num):
    return [(str(i), str(j)) for i in range(num) for j in range(i + 1, num)]


def test_each_source_is_loaded_once_where_all_fit():
    loaded = []
    pairs = exhaustive(9)
    found = list(load_pairs(pairs, lambda s: loaded.append(s) or f"<{s}>"))
    assert found == [(f"<{a}>", f"<{b}>") for a, b in pairs]
    assert sorted(loaded) == sorted({s for pair in pairs for s in pair})


def test_few_are_held_and_the_farthest_is_dropped_first():
    alive, loaded = [0], []

    class Item:
        def __init__(self, source):
            self.source = source
            loaded.append(source)
            alive[0] += 1

        def __del__(self):
            alive[0] -= 1

    pairs, found, most = exhaustive(12), [], 0
    for a, b in load_pairs(pairs, Item, ahead=2, capacity=6, threads=1):
        found.append((a.source, b.source))
        most = max(most, alive[0])
    assert found == pairs
    assert most <= 6 + 2 * 2 + 2  # held, loaded early, in use
    assert len(loaded) < 45  # dropping the least recently used would load all of each row again: 1 + 11 + 10 + ... = 67


def test_two_are_loaded_while_the_first_is_used():
    third = threading.Event()

    def load(source):
        if source == "c":
            third.set()
        return source

    pairs = load_pairs([("a", "b"), ("c", "d")], load, ahead=1)
    assert next(pairs) == ("a", "b")
    assert third.wait(10)  # although nobody has asked for the second pair
    pairs.close()


def test_an_error_comes_at_its_pair_and_not_before():
    def load(source):
        if source == "bad":
            raise ValueError("bad: no image")
        return source

    pairs = load_pairs([("a", "b"), ("a", "bad"), ("a", "b")], load)
    assert next(pairs) == ("a", "b")
    with pytest.raises(ValueError, match="bad: no image"):
        next(pairs)


def test_objects_without_a_name_are_sources_of_their_own():
    assert list(load_pairs([([1], [1])], lambda s: s)) == [([1], [1])]
