"""TLS 1.3 as a pure machine over `ssl.MemoryBIO`: ciphertext goes in and comes out, the same over every pipe."""

import ssl
from collections.abc import Callable

from tesseract_async.errors import HandshakeFailed, ProtocolError
from tesseract_async.identity import PeerID
from tesseract_async.transport.certificates import ALPN, peer_id_of


class TlsMachine:
    """One end of a TLS connection. The peer's bytes raise only `ProtocolError`; after one the machine is dead."""

    __slots__ = ("peer_id", "receive_data", "data_to_send", "ciphertext", "_outgoing", "_tls", "_expected")

    def __init__(self, context: ssl.SSLContext, *, server_side: bool, expected: PeerID | None = None) -> None:
        self.peer_id: PeerID | None = None
        """The peer at the other end; None until the handshake is done."""
        self.ciphertext = ssl.MemoryBIO()
        """The part of what `receive_data` took that was not read yet."""
        self._outgoing = ssl.MemoryBIO()
        self.receive_data: Callable[[memoryview], int] = self.ciphertext.write
        """Takes ciphertext of the pipe's."""
        self.data_to_send: Callable[[], bytes] = self._outgoing.read
        """Returns ciphertext for the pipe; empty if there is none."""
        self._tls = context.wrap_bio(self.ciphertext, self._outgoing, server_side=server_side)
        self._expected = expected

    def handshake(self) -> bool:
        """Go on with the handshake; True once it is done, when the dialer has checked `expected`.

        Raises: HandshakeFailed. What `data_to_send` gives then (an alert) may still be sent.
        """
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise HandshakeFailed("tls", f"TLS handshake failed: {error.reason or error}") from None
        if self._tls.selected_alpn_protocol() != ALPN:
            raise HandshakeFailed("tls", f"the peer does not speak {ALPN}")
        peer_id = peer_id_of(self._tls.getpeercert(binary_form=True))
        if self._expected is not None and peer_id != self._expected:
            # the last flight of the handshake is discarded, too: nothing is written to a stranger
            self._outgoing.read()
            sentence = f"another peer ({peer_id.short}) answers there, not {self._expected.short}"
            raise HandshakeFailed("wrong_peer", sentence)
        self.peer_id = peer_id
        return True

    def read_into(self, buffer: memoryview) -> int:
        """Plaintext bytes written into `buffer`; 0 if more ciphertext is needed. Raises: ProtocolError; EOFError."""
        tls = self._tls
        if not self.ciphertext.pending and not tls.pending():
            return 0
        try:
            count = tls.read(len(buffer), buffer)
        except ssl.SSLWantReadError:
            return 0
        except ssl.SSLZeroReturnError:
            raise EOFError from None
        except ssl.SSLError as error:
            raise ProtocolError(f"TLS: {error.reason or error}") from None
        if not count:
            raise EOFError
        return int(count)

    def write(self, data: bytes | memoryview) -> None:
        """Encrypt `data` at once; its memory is free again on return. Raises: ProtocolError."""
        try:
            view = memoryview(data)
            while view:
                view = view[self._tls.write(view) :]
        except ssl.SSLError as error:
            raise ProtocolError(f"TLS: {error.reason or error}") from None

    def close(self) -> None:
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # WantRead: the peer's own farewell is not waited for
