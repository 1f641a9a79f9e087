"""Who owns which entries of a bucket: they are dealt out among owners, as cards are.

Neighbouring entries go to different owners, so that each has a sample of every layer, and gets and
hands out about as much as any other, whichever layers there is much of in a step.  What an owner
has of a layer is a *piece*; an entry's number in its piece grows with its index in the layer.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from hvd_dls.core.wire.layout import Bucket
from hvd_dls.errors import DLSError

_PIECE = 1024  # entries of a piece, at least, if there are enough: each has a record of its own
_PIECES = 4  # that each owner has, at least, before they become so large
_FACTOR = np.uint64(0x9E3779B1)  # Knuth's: 2**32 over the golden ratio


def rotation(rounds: np.ndarray, hands: np.ndarray | int) -> np.ndarray:
    """Where each round of dealing begins: int64 in [0, hands), so that no pattern meets a hand.

    Args:
        rounds: numbers of rounds, of ``hands`` entries each.
        hands: among which they are dealt out.
    """
    mixed = (np.asarray(rounds, np.uint64) * _FACTOR) & np.uint64(0xFFFFFFFF)
    return (mixed >> np.uint64(16)).astype(np.int64) % hands


def places(size: int, hand: int, hands: int) -> np.ndarray:
    """Which entries of a layer a hand has: int64, ascending.

    Args:
        size: of the layer.
        hand: its number.
        hands: among which the layer is dealt out.
    """
    rounds = np.arange(-(-size // hands))
    where = rounds * hands + (hand + rotation(rounds, hands)) % hands
    own: np.ndarray = where[where < size]
    return own


class Dealing:
    """The S pieces of a bucket, owner by owner; of each owner, in the order of layers.

    Args:
        bucket: to be dealt out.
        owners: number of them, P.

    Attributes:
        layers: (S,) each piece's layer, by its number in the bucket.
        hand: (S,) which hand of this layer it is.
        hands: (S,) among how many the layer is dealt out.
        first: (P + 1,) each owner's first piece, and S.

    Raises:
        DLSError: the bucket has fewer entries than there are owners.
    """

    def __init__(self, bucket: Bucket, owners: int) -> None:
        if bucket.size < owners:
            raise DLSError(
                f"exchange='sparse_allreduce': bucket {bucket.name!r} of {bucket.size} entries "
                f"cannot be split among {owners} ranks; raise dense_below, so that its layers go "
                "dense"
            )
        self.bucket, self.owners = bucket, owners
        sizes = np.diff(bucket.offsets)
        piece = min(max(bucket.size // (_PIECES * owners), 1), _PIECE)
        self._hands = np.clip(sizes // piece, 1, owners)
        # The next layer's first hand goes to who is next.
        self._begins = (np.cumsum(self._hands) - self._hands) % owners
        hand = (np.arange(owners)[:, None] - self._begins) % owners
        of, self.layers = np.nonzero(hand < self._hands)
        self.hand, self.hands = hand[of, self.layers], self._hands[self.layers]
        self.first = np.searchsorted(of, np.arange(owners + 1))
        self._number = np.full(hand.shape, -1)  # of the piece that an owner has of a layer
        self._number[of, self.layers] = np.arange(len(of))

    @cached_property
    def sizes(self) -> np.ndarray:
        """(S,) entries of each piece."""
        whole = np.diff(self.bucket.offsets)[self.layers]
        rounds, rest = np.divmod(whole, self.hands)
        last = (self.hand + rotation(rounds, self.hands)) % self.hands < rest
        sizes: np.ndarray = rounds + last
        return sizes

    def pieces_of(self, layers: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where entries are.

        Args:
            layers: (K,) each one's layer.
            indices: (K,) in their layer.

        Returns:
            (K,) int64 pieces, and (K,) uint32 numbers therein.
        """
        hands = self._hands[layers]
        rounds, seat = np.divmod(indices.astype(np.int64), hands)
        hand = (seat - rotation(rounds, hands)) % hands
        owner = (self._begins[layers] + hand) % self.owners
        return self._number[owner, layers], rounds.astype(np.uint32)

    def indices_of(self, pieces: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(K,) int64 indices in their layer: the inverse of ``pieces_of``."""
        rounds, hands = numbers.astype(np.int64), self.hands[pieces]
        where: np.ndarray = rounds * hands + (self.hand[pieces] + rotation(rounds, hands)) % hands
        return where

    def label(self, piece: int) -> str:
        """A piece's name within its layer: "hand/hands"."""
        return f"{self.hand[piece]}/{self.hands[piece]}"

    def places(self, piece: int) -> np.ndarray:
        """Which entries of its layer a piece has: see ``places``."""
        size = self.bucket.layers[self.layers[piece]].size
        return places(size, int(self.hand[piece]), int(self.hands[piece]))


def places_of(size: int, label: str) -> np.ndarray:
    """Which entries of a layer of this size a piece has, by its ``label``.

    Raises:
        ValueError: that is no label.
    """
    hand, hands = map(int, label.split("/"))
    if not 0 <= hand < hands <= max(size, 1):
        raise ValueError(f"hand {hand} of {hands}, of a layer of {size} entries")
    return places(size, hand, hands)
