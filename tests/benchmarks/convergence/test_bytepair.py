"""Byte-pair tokens: known pairs, and texts that come back."""

from __future__ import annotations

import pytest

TEXT = "low low low lower newest\n    newest newest widest widest\n\n  x_1 = {10: 'é'}  \n"


def test_the_most_frequent_pairs_are_joined_first():
    from benchmarks.convergence.bytepair import learn

    # "es" and "st" are five times there each, as is "w" with "e" or "i": larger numbers first.
    vocabulary = learn("newest newest newest widest widest", 259)
    assert vocabulary.merges == [(ord("s"), ord("t")), (ord("e"), 256), (ord("w"), 257)]
    assert vocabulary.encode("west").tolist() == [258]
    assert vocabulary.encode("es w").tolist() == [ord("e"), ord("s"), ord(" "), ord("w")]


@pytest.mark.parametrize("size", [256, 260, 1000])
def test_a_text_comes_back(size):
    from benchmarks.convergence.bytepair import learn

    vocabulary = learn(TEXT, size)
    for text in (TEXT, "", "another one,\t\r\n with ünseen\x00 characters  "):
        tokens = vocabulary.encode(text)
        assert vocabulary.decode(tokens) == text
        assert (tokens < 256 + len(vocabulary.merges)).all()
    assert len(vocabulary.merges) <= size - 256


def test_repeated_letters_are_joined_in_pairs():
    from benchmarks.convergence.bytepair import learn

    vocabulary = learn("aaaaa aaaaa", 300)
    assert vocabulary.merges[0] == (97, 97)
    assert vocabulary.decode(vocabulary.encode("aaaaaaa")) == "aaaaaaa"


def test_the_same_text_gives_the_same_vocabulary():
    from benchmarks.convergence.bytepair import learn

    assert learn(TEXT, 280).merges == learn(TEXT, 280).merges
