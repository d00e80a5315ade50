"""What every node knows about others' manifests before it holds them. No I/O.

Keys are hashes: nobody can tell what text one was made of. But a manifest says by its first bytes that it is one, and
names its grid and coordinates, from which the keys follow under which it may stand (`Manifest.keys`). One of a run
names its owner, too, and shows that its server may host there: the key is a hash of whose word counts.
"""

from __future__ import annotations

import msgpack

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.grants import ROLES, decode_grant
from tesseract_async.experts.manifest import MAGIC, decode_manifest
from tesseract_async.identity import SignedRecord
from tesseract_async.network.entries import key_digest

_BEGINNINGS = {0xC4: 2, 0xC5: 3}
"""Bytes of msgpack before those of a byte string: of up to 255, and of more."""


def belongs_under_its_key(record: SignedRecord) -> bool:
    """Whether a record is a whole manifest of experts that its key is for, or no manifest at all. A `RecordCheck`.

    So a server cannot fill the shards of experts that it does not claim to host, nor the key of one grid with experts
    of another, nor any key of a granted run without a grant: readers do not pay for strangers. Untrusted; raises
    nothing. A manifest of 400 experts costs up to 400 hashes, half a millisecond; a grant its signature checks, once.
    """
    value = record.value
    start = _BEGINNINGS.get(value[0], 0) if value else 0
    if not start or not value.startswith(MAGIC, start):
        return True
    try:
        manifest = decode_manifest(msgpack.unpackb(value))
        if not any(key_digest(key) == record.key for key in manifest.keys()):
            return False
        tag = manifest.tag
        if tag is None or tag.mode == "open" or tag.owner == record.owner:
            return True
        grant = decode_grant(manifest.grant)
    except (ProtocolError, ValueError, msgpack.UnpackException):
        return False
    of_run = grant.run_id == tag.run_id(manifest.prefix) and grant.root == tag.owner
    return of_run and grant.peer == record.owner and bool(grant.roles & ROLES["host"])
