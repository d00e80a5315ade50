"""Tokens prove that a node that sends from an address also receives there (BEP 5). Pure."""

from __future__ import annotations

import hashlib
import random as random_module

from tesseract_async.network.datagrams import TOKEN_BYTES

TOKEN_LIFETIME = 300.0
"""Seconds for which a token is good at least; at most twice as long."""


class Tokens:
    """The tokens that one node gives out: keyed hashes of addresses, so that nothing has to be remembered."""

    def __init__(self, random: random_module.Random, *, now: float) -> None:
        self._random = random
        self._secrets = (random.randbytes(16), random.randbytes(16))
        self._until = now + TOKEN_LIFETIME

    def give(self, packed_address: bytes) -> bytes:
        """Return the present token of an address."""
        return _token(self._secrets[0], packed_address)

    def holds(self, token: bytes, packed_address: bytes) -> bool:
        """Return True if `token` was given to the address under this secret or the one before."""
        return any(token == _token(secret, packed_address) for secret in self._secrets)

    def rotate(self, now: float) -> None:
        """Change the secret when its time has come."""
        if now >= self._until:
            self._secrets = (self._random.randbytes(16), self._secrets[0])
            self._until = now + TOKEN_LIFETIME


def _token(secret: bytes, packed_address: bytes) -> bytes:
    return hashlib.blake2b(packed_address, key=secret, digest_size=TOKEN_BYTES).digest()
