"""Byte-pair tokens: a vocabulary learnt from a text, and texts as numbers of tokens.

Sennrich, Haddow and Birch, 2016 (arXiv:1508.07909), over bytes, as in GPT-2: the vocabulary begins
with the 256 bytes, and the most frequent pair of neighbours becomes a token, again and again.
Pairs do not reach over the ends of words.  The same text always gives the same vocabulary.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

# A line's end with the next one's indentation, a word with the space in front of it, ...
WORDS = re.compile(r"\s*\n *| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+")
Word = tuple[int, ...]
Pair = tuple[int, int]


class BytePairs:
    """A vocabulary.

    Args:
        merges: pairs of tokens that become one; the i-th becomes token 256 + i.
    """

    def __init__(self, merges: Iterable[Pair]) -> None:
        self.merges = list(merges)
        self._numbers = {pair: 256 + i for i, pair in enumerate(self.merges)}
        self._known: dict[str, Word] = {}

    def encode(self, text: str) -> np.ndarray:
        """Returns the tokens of a text, (n,) int64."""
        tokens: list[int] = []
        for word in WORDS.findall(text):
            if word not in self._known:
                self._known[word] = self._merged(tuple(word.encode()))
            tokens += self._known[word]
        return np.array(tokens, np.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of tokens; what is no UTF-8 is replaced."""
        parts = [bytes([byte]) for byte in range(256)]
        for left, right in self.merges:
            parts.append(parts[left] + parts[right])
        return b"".join(parts[token] for token in tokens).decode(errors="replace")

    def _merged(self, word: Word) -> Word:
        none = len(self.merges) + 256
        while len(word) > 1:
            pair = min(itertools.pairwise(word), key=lambda p: self._numbers.get(p, none))
            if pair not in self._numbers:
                break
            word = _replaced(word, pair, self._numbers[pair])
        return word


def learn(text: str, size: int) -> BytePairs:
    """Learns a vocabulary.

    Args:
        text: to learn it from.
        size: of the vocabulary; it is smaller if there is nothing left to join.
    """
    found = Counter(WORDS.findall(text))
    words = [tuple(word.encode()) for word in found]
    times = list(found.values())
    counts: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # words that have a pair, or had it
    for number, word in enumerate(words):
        for pair in itertools.pairwise(word):
            counts[pair] += times[number]
            places[pair].add(number)
    merges: list[Pair] = []
    while len(merges) < size - 256 and counts:
        best = max(counts, key=lambda pair: (counts[pair], pair))
        for number in places.pop(best):
            word, joined = words[number], _replaced(words[number], best, 256 + len(merges))
            for pair in itertools.pairwise(word):
                counts[pair] -= times[number]
                if not counts[pair]:
                    del counts[pair]
            for pair in itertools.pairwise(joined):
                counts[pair] += times[number]
                places[pair].add(number)
            words[number] = joined
        merges.append(best)
    return BytePairs(merges)


def _replaced(word: Word, pair: Pair, token: int) -> Word:
    """Returns a word in which a pair, wherever it is, has become a token."""
    replaced, at = [], 0
    while at < len(word):
        if word[at : at + 2] == pair:
            replaced.append(token)
            at += 2
        else:
            replaced.append(word[at])
            at += 1
    return tuple(replaced)
