"""The TLS machine: two of them joined by function calls, and impostors."""

import ssl
from datetime import datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from tesseract_async.errors import HandshakeFailed, ProtocolError
from tesseract_async.identity import Identity, PeerID
from tesseract_async.transport.certificates import ALPN, make_contexts, peer_id_of
from tesseract_async.transport.tls import TlsMachine

ALICE, BOB = Identity.from_seed(b"a" * 32), Identity.from_seed(b"b" * 32)


def machines(
    expected: PeerID | None = None, dialing: ssl.SSLContext | None = None, accepting: ssl.SSLContext | None = None
) -> tuple[TlsMachine, TlsMachine]:
    client = TlsMachine(dialing or make_contexts(ALICE)[0], server_side=False, expected=expected)
    server = TlsMachine(accepting or make_contexts(BOB)[1], server_side=True)
    return client, server


def shake(client: TlsMachine, server: TlsMachine) -> None:
    """Runs both handshakes to their end, or to the error of one of them."""
    done = {client: False, server: False}
    for _ in range(5):
        for here, there in ((client, server), (server, client)):
            if not done[here]:
                done[here] = here.handshake()
            there.receive_data(memoryview(here.data_to_send()))
    assert all(done.values())


def read(machine: TlsMachine, size: int = 1 << 20) -> bytes:
    out, buffer = b"", memoryview(bytearray(size))
    while count := machine.read_into(buffer):
        out += bytes(buffer[:count])
    return out


def test_both_ends_know_each_other() -> None:
    client, server = machines(expected=BOB.peer_id)
    shake(client, server)
    assert client.peer_id == BOB.peer_id and server.peer_id == ALICE.peer_id


def test_no_session_can_be_resumed_without_showing_the_certificate() -> None:
    client, server = machines()
    client.handshake()
    server.receive_data(memoryview(client.data_to_send()))
    server.handshake()
    client.receive_data(memoryview(server.data_to_send()))
    assert client.handshake()
    server.receive_data(memoryview(client.data_to_send()))
    assert server.handshake()
    assert not server.data_to_send(), "tickets are all that an acceptor could say now"


def test_bytes_arrive_whole_in_pieces_of_any_size() -> None:
    client, server = machines()
    shake(client, server)
    data = bytes(range(256)) * 1000
    client.write(memoryview(data))
    client.write(b"end")
    cipher = memoryview(client.data_to_send())
    received = b""
    while cipher:
        server.receive_data(cipher[:1000])
        cipher = cipher[1000:]
        received += read(server, 777)
    assert received == data + b"end"
    server.write(b"back")
    client.receive_data(memoryview(server.data_to_send()))
    assert read(client) == b"back"


def test_a_farewell_is_an_end_of_file() -> None:
    client, server = machines()
    shake(client, server)
    client.close()
    server.receive_data(memoryview(client.data_to_send()))
    with pytest.raises(EOFError):
        read(server)


def test_a_stranger_is_told_nothing() -> None:
    client, server = machines(expected=ALICE.peer_id)
    client.handshake()
    server.receive_data(memoryview(client.data_to_send()))
    server.handshake()
    client.receive_data(memoryview(server.data_to_send()))
    with pytest.raises(HandshakeFailed, match="another peer") as caught:
        client.handshake()
    assert caught.value.reason == "wrong_peer" and client.data_to_send() == b""


def test_garbage_and_other_protocols_fail_with_a_typed_error() -> None:
    for data in (b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\x16\x03\x01\x02\x00" + bytes(600), b"\xff" * 50):
        for machine in machines():
            machine.receive_data(memoryview(data))
            try:
                assert not machine.handshake()  # waits for more
            except HandshakeFailed as error:
                assert error.reason == "tls"


def test_corrupt_records_are_protocol_errors() -> None:
    client, server = machines()
    shake(client, server)
    client.write(b"secret")
    cipher = bytearray(client.data_to_send())
    cipher[-1] ^= 1
    server.receive_data(memoryview(bytes(cipher)))
    with pytest.raises(ProtocolError, match="TLS"):
        read(server)


def test_without_a_certificate_nobody_gets_in() -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.verify_mode = ssl.CERT_NONE
    bare.set_alpn_protocols([ALPN])
    client, server = machines(dialing=bare)
    with pytest.raises(HandshakeFailed):
        shake(client, server)
    assert server.peer_id is None


def test_old_versions_and_other_applications_are_refused() -> None:
    old = make_contexts(ALICE)[0]
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    other = make_contexts(ALICE)[0]
    other.set_alpn_protocols(["http/1.1"])
    for context in (old, other):
        client, server = machines(dialing=context)
        with pytest.raises(HandshakeFailed):
            shake(client, server)
        assert server.peer_id is None


PUBLISHED = Ed25519PrivateKey.from_private_bytes(b"this secret is published: no CA.")


def certificate_of(key: Any, encoding: serialization.Encoding = serialization.Encoding.DER) -> bytes:
    """As anybody can make one, since the key that signs is known to all."""
    node, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("node", "tesseract"))
    builder = x509.CertificateBuilder().subject_name(node).issuer_name(issuer).public_key(key).serial_number(7)
    builder = builder.not_valid_before(datetime(2000, 1, 1)).not_valid_after(datetime(9999, 12, 31))
    return builder.sign(PUBLISHED, None).public_bytes(encoding)


def test_only_ed25519_keys_that_are_not_published_name_a_peer() -> None:
    assert peer_id_of(certificate_of(Ed25519PrivateKey.from_private_bytes(b"a" * 32).public_key())) == ALICE.peer_id
    for certificate in (
        None,
        b"",
        b"\x30\x03\x02\x01\x01",
        certificate_of(ec.generate_private_key(ec.SECP256R1()).public_key()),
        certificate_of(PUBLISHED.public_key()),
    ):
        with pytest.raises(HandshakeFailed) as caught:
            peer_id_of(certificate)
        assert caught.value.reason == "certificate"


def test_a_certificate_without_its_key_is_of_no_use(tmp_path: Any) -> None:
    bobs = Ed25519PrivateKey.from_private_bytes(b"b" * 32).public_key()
    stolen = certificate_of(bobs, serialization.Encoding.PEM)
    (tmp_path / "stolen.pem").write_bytes(ALICE.private_pem() + stolen)
    with pytest.raises(ssl.SSLError):
        make_contexts(ALICE)[0].load_cert_chain(tmp_path / "stolen.pem")
