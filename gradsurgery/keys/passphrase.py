"""Randomness for keys: from the operating system, from a seed, or stretched from a passphrase (scrypt, RFC 7914)."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from gradsurgery.errors import SelectionError

COST = {"n": 2**17, "r": 8, "p": 1}
"""About 128 MiB and a third of a second a guess."""
SALT = b"gradsurgery/permutation-key/1/"


class PassphraseRandom(random.Random):
    """A stream of bits that only the passphrase tells: SHAKE-256 over a scrypt of it.

    Args:
        passphrase: The secret; its strength bounds the key's.
        salt: What else the key is for, e.g. the model's fingerprint: equal passphrases then give different keys.
    """

    def __init__(self, passphrase: str, salt: str = "") -> None:
        if not isinstance(passphrase, str) or not passphrase:
            raise SelectionError("a passphrase is a non-empty text.")
        self._seed = hashlib.scrypt(passphrase.encode(), salt=SALT + salt.encode(), maxmem=2**28, dklen=32, **COST)
        self._block, self._left, self._bits = 0, 0, 0
        super().__init__(0)

    def getrandbits(self, k: int) -> int:
        while self._left < k:
            raw = hashlib.shake_256(self._seed + self._block.to_bytes(8, "little")).digest(1 << 16)
            self._bits |= int.from_bytes(raw, "little") << self._left
            self._block, self._left = self._block + 1, self._left + 8 * len(raw)
        out = self._bits & ((1 << k) - 1)
        self._bits, self._left = self._bits >> k, self._left - k
        return out

    def random(self) -> float:
        return self.getrandbits(53) / (1 << 53)

    def seed(self, *args: Any, **kwargs: Any) -> None:
        """The passphrase is the seed."""


def source_of(seed: int | None, passphrase: str | None, salt: str = "") -> random.Random:
    """Where a key's randomness comes from.

    Raises:
        SelectionError: both a seed and a passphrase, or a seed that is no whole number.
    """
    if seed is not None and passphrase is not None:
        raise SelectionError("a key is drawn from a seed or from a passphrase, not from both.")
    if passphrase is not None:
        return PassphraseRandom(passphrase, salt)
    if seed is None:
        return random.SystemRandom()
    if type(seed) is not int:
        raise SelectionError(f"seed is a whole number, not {seed!r}.")
    return random.Random(seed)
