"""The certificates by which TLS carries Ed25519 identities, without any authority (`docs/design/wire.md`, section 1).

Python's `ssl` has no callback that could accept an unknown certificate, and OpenSSL accepts no self-signed one from a
client: so every leaf is signed by a CA key that is published right here.
"""

import datetime
import ssl
import tempfile
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from tesseract_async.errors import HandshakeFailed
from tesseract_async.identity import Identity, PeerID

ALPN: Final = "tesseract/1"
_CA_KEY: Final = Ed25519PrivateKey.from_private_bytes(b"this secret is published: no CA.")
_CA_PUBLIC: Final = _CA_KEY.public_key().public_bytes_raw()
_NOT_BEFORE: Final = datetime.datetime(2000, 1, 1)
_NOT_AFTER: Final = datetime.datetime(9999, 12, 31, 23, 59, 59)  # RFC 5280, 4.1.2.5: no expiration


def _certificate(subject: str, key: Ed25519PublicKey, *, ca: bool) -> x509.Certificate:
    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name("tesseract"))
        .public_key(key)
        .serial_number(1 if ca else x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
    if ca:
        # of the nine usages, in order, it only signs certificates
        usage = x509.KeyUsage(*(number == 5 for number in range(9)))
        builder = builder.add_extension(usage, critical=True)
    else:
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(_CA_KEY.public_key())
        builder = builder.add_extension(authority, critical=False)
    return builder.sign(_CA_KEY, None)


def make_contexts(identity: Identity) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the contexts with which `identity` dials and accepts. Blocks for some milliseconds."""
    own = Ed25519PublicKey.from_public_bytes(identity.public_key)
    leaf = _certificate("node", own, ca=False).public_bytes(serialization.Encoding.PEM)
    authority = _certificate("tesseract", _CA_KEY.public_key(), ca=True).public_bytes(serialization.Encoding.DER)
    dialing = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.num_tickets = 0  # a resumed session would not show the certificate again
    # load_cert_chain reads files only; the directory is readable by its owner only, and gone at once
    with tempfile.TemporaryDirectory(prefix="tesseract-") as folder:
        path = Path(folder) / "node.pem"
        path.touch(0o600)
        path.write_bytes(identity.private_pem() + leaf)
        for context in (dialing, accepting):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(path)
            context.load_verify_locations(cadata=authority)
            context.set_alpn_protocols([ALPN])
    return dialing, accepting


def peer_id_of(certificate: bytes | None) -> PeerID:
    """Return who holds the key of this DER certificate, which TLS has verified. Raises: HandshakeFailed."""
    if certificate is None:
        raise HandshakeFailed("certificate", "the peer showed no certificate")
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except Exception:  # untrusted bytes: the parser documents no closed list of errors
        raise HandshakeFailed("certificate", "the peer's certificate cannot be read") from None
    if not isinstance(key, Ed25519PublicKey):
        raise HandshakeFailed("certificate", "the peer's certificate holds no Ed25519 key")
    raw = key.public_bytes_raw()
    if raw == _CA_PUBLIC:
        raise HandshakeFailed("certificate", "the peer uses the published key, which proves nothing")
    return PeerID.from_public_key(raw)
