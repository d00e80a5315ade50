"""Tokens prove that whoever sends from an address also receives there (BEP 5). Pure."""

from __future__ import annotations

import hashlib
import random as random_module

from tesseract_async.network.datagrams import TOKEN_BYTES


class Tokens:
    """What one node gives out: a keyed hash of the address, so that nothing has to be remembered.

    A token is good for `lifetime` seconds at least and twice that at most.
    """

    def __init__(self, random: random_module.Random, *, lifetime: float, now: float) -> None:
        self._random = random
        self._lifetime = lifetime
        self._secrets = (random.randbytes(16), random.randbytes(16))
        self._until = now + lifetime

    def give(self, packed_address: bytes) -> bytes:
        """The present token of an address."""
        return _token(self._secrets[0], packed_address)

    def holds(self, token: bytes, packed_address: bytes) -> bool:
        """Whether `token` was given to the address under this secret or the one before."""
        return any(token == _token(secret, packed_address) for secret in self._secrets)

    def rotate(self, now: float) -> None:
        """Changes the secret when its time has come."""
        if now >= self._until:
            self._secrets = (self._random.randbytes(16), self._secrets[0])
            self._until = now + self._lifetime


def _token(secret: bytes, packed_address: bytes) -> bytes:
    return hashlib.blake2b(packed_address, key=secret, digest_size=TOKEN_BYTES).digest()
