"""Manifests: how a server says, in bytes, which experts of one grid it hosts. No I/O.

A server publishes one *manifest* per grid: where it can be dialed, which coordinates it hosts, for which of them it
is the primary, and a sequence number that grows with every renewal. Who published it and until when it holds is the
network's business and stands in the entry around it. The same bytes are stored under the grid's key (`grid_key`), for
readers that want all experts, and under a shard key (`shard_key`) of each hosted uid, for readers that want that one.

Experts that do not fit `MAX_PART_BYTES` go to numbered parts. Each part is complete in itself, so that a lost part
costs its own experts only.

Layout, integers big-endian::

    4 bytes  ``tsm`` and the format (3): by them a holder knows a manifest, whatever the key (`experts.trust`)
    1 byte   length of the prefix, then as many of UTF-8
    6 bytes  sequence
    1 byte   0: bare uids; 1: of a granted run, 2: of an open one, and then:
               32 bytes  peer id of the run's owner
               1 byte    length of the run's name, then as many of UTF-8
               2 bytes   length of the server's grant, then the grant (`experts.grants`); 0 where none is needed
    1 byte   number of addresses, then each:
               1 byte   kind: 4 (IPv4), 6 (IPv6) or 0 (name)
               4 or 16 bytes, or 1 byte length and as many of UTF-8
               2 bytes  port
    1 byte   number of rendezvous nodes, then each: an address as above, and 32 bytes of peer id
    1 byte   number of dimensions of the grid
    1 byte   width: bytes per coordinate (1, 2 or 4)
    2 bytes  number of experts, n
    n x dimensions x width bytes   coordinates, expert by expert, strictly ascending: none stands there twice
    ceil(n / 8) bytes              one bit per expert, highest first: whether this server is its primary
    n x 4 bytes                    in a run: the epoch of each expert's lineage that this server knows

One record per uid would cost more than eight times as much at 8 experts per server: the record's key and signature
weigh more than the coordinates.
"""

import functools
import hashlib
import ipaddress
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tesseract_async.errors import ProtocolError
from tesseract_async.identity import PeerID
from tesseract_async.network.address_scope import PUBLIC, AddressScope, kind_of
from tesseract_async.transport.base import MAX_HOST, split_host_port
from tesseract_async.wire.heads import MAX_GRANT_BYTES

Coordinates = npt.NDArray[np.int64]
"""``[experts, dimensions]``, every row one expert's place on the grid."""

MAGIC = b"tsm\3"
"""The first bytes of every manifest; the last one is its format."""
SEQUENCE_BYTES = 6
RUN_ID_BYTES = 16
MODES = ("bare", "granted", "open")
"""Modes: everybody may host; peers with a grant of the run's owner may; all but revoked peers may."""
MAX_PART_BYTES = 880
MAX_ADDRESSES = 8
MAX_PUBLIC_HOSTS = 2
"""Public hosts (or names) of one version of IP that a reader dials for one server."""
MAX_RENDEZVOUS = 4
MAX_DIMS = 8
MAX_COORDINATE = 2**32 - 1
MAX_UID_LENGTH = 256
MAX_PREFIX_BYTES = 255
NUM_SHARDS = 256
"""Shards per prefix. A server renews at most this many entries, however many experts it hosts, and a reader that looks
for one of 4,096 uids reads the manifests of 16."""

_WIDTHS = {1: ">u1", 2: ">u2", 4: ">u4"}


@functools.lru_cache(maxsize=8192)
def split_uid(uid: str) -> tuple[str, tuple[int, ...]]:
    """``"ffn.3.7"`` -> ``("ffn", (3, 7))``. The prefix may hold dots itself, but no part of it is a number.

    Raises: ValueError for anything that `join_uid` would not give back unchanged.
    """
    parts = uid.split(".")
    first = len(parts)
    while first > 0 and parts[first - 1].isascii() and parts[first - 1].isdigit():
        first -= 1
    prefix, numbers = ".".join(parts[:first]), parts[first:]
    coords = tuple(int(number) for number in numbers) if len(numbers) <= MAX_DIMS else ()
    if not coords or not is_prefix(prefix) or len(uid) > MAX_UID_LENGTH or join_uid(prefix, coords) != uid:
        raise ValueError(f"not an expert's uid, such as 'ffn.3.7' (a prefix, then 1 to {MAX_DIMS} numbers): {uid!r}")
    if max(coords) > MAX_COORDINATE:
        raise ValueError(f"coordinates are at most {MAX_COORDINATE}: {uid!r}")
    return prefix, coords


def join_uid(prefix: str, coords: Sequence[int]) -> str:
    """The inverse of `split_uid`."""
    return ".".join((prefix, *map(str, coords)))


def is_prefix(text: str) -> bool:
    """Return whether `text` can precede coordinates: printable, without spaces, dots between parts only, no number."""
    return all(part and part.isprintable() and " " not in part and not part.isdigit() for part in text.split("."))


@dataclass(frozen=True, slots=True)
class RunTag:
    """The run that a server's experts belong to: all that a holder needs to tell who has authority there."""

    owner: PeerID
    name: str
    mode: str
    """``granted``, or ``open`` to everybody."""

    def run_id(self, prefix: str) -> bytes:
        """16 bytes that nobody else's run has: a hash of owner, mode, name and the prefix of its uids."""
        text = b"\0".join((self.mode.encode(), self.name.encode(), prefix.encode()))
        return hashlib.sha256(b"tesseract run id 1\0" + self.owner + text).digest()[:RUN_ID_BYTES]


def grid_key(prefix: str, tag: RunTag | None = None) -> str:
    """Return the key of the manifests of all servers with experts of this grid: of bare uids, or of a run's."""
    return f"experts/{prefix}" if tag is None else f"run-experts/{tag.run_id(prefix).hex()}"


def shard_key(uid: str, tag: RunTag | None = None) -> str:
    """Return the key of the manifests that hold this uid, among those of a few hundred other uids at most."""
    prefix, _ = split_uid(uid)
    return _shard_key(grid_key(prefix, tag), uid)


def _shard_key(grid: str, uid: str) -> str:
    return f"{grid}/{_shard_of(uid):02x}"


def _shard_of(uid: str) -> int:
    return hashlib.sha256(uid.encode()).digest()[0] % NUM_SHARDS


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    prefix: str
    """The prefix of the grid."""
    sequence: int
    """The manifest of a server with the highest sequence holds."""
    addresses: tuple[str, ...]
    """``host:port``, the preferred one first. Empty for a server that can be reached through `rendezvous` only."""
    rendezvous: tuple[str, ...]
    """``host:port/PEER_ID``: nodes that pass on a request to dial back, or relay."""
    coords: Coordinates
    primary: npt.NDArray[np.bool_]
    """``[experts]``: whether this server is the one that trains it."""
    tag: RunTag | None = None
    """The run that they belong to; None: bare uids."""
    grant: bytes = b""
    """The server's, unread."""
    epochs: npt.NDArray[np.int64] | None = None
    """``[experts]``, in a run: of each expert's lineage, as far as this server knows it."""

    @property
    def num_dims(self) -> int:
        return int(self.coords.shape[1])

    def within(self, scope: AddressScope) -> "Manifest":
        """Keep only the addresses that `scope` allows, one for each host, and no more of them than one computer has:
        the writer of a manifest has its readers dial what it names.

        Raises: ProtocolError where nothing is left.
        """
        addresses, rendezvous = addresses_within(scope, self.addresses, self.rendezvous)
        return replace(self, addresses=addresses, rendezvous=rendezvous)

    def only(self, rows: npt.NDArray[np.bool_]) -> "Manifest":
        """Return the manifest with these experts only. Raises: ProtocolError where nothing is left."""
        if not rows.any():
            raise ProtocolError("a manifest of experts that its server may not host")
        epochs = None if self.epochs is None else self.epochs[rows]
        return replace(self, coords=self.coords[rows], primary=self.primary[rows], epochs=epochs)

    def keys(self) -> Iterator[str]:
        """The keys under which it may stand: its grid's, and the shards of the experts in it, each once."""
        grid = grid_key(self.prefix, self.tag)
        yield grid
        seen: set[str] = set()
        for row in self.coords.tolist():
            key = _shard_key(grid, join_uid(self.prefix, row))
            if key not in seen:
                seen.add(key)
                yield key


def addresses_within(
    scope: AddressScope, addresses: Sequence[str], rendezvous: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what `Manifest.within` keeps of them. Raises: ProtocolError where nothing is left."""
    found: dict[str, str] = {}
    num_public: Counter[bool] = Counter()
    for address in scope.allowed(addresses):
        host = split_host_port(address)[0]
        if host in found:
            continue
        if (kind := kind_of(host)) is None or kind == PUBLIC:
            num_public[":" in host] += 1
            if num_public[":" in host] > MAX_PUBLIC_HOSTS:
                continue
        found[host] = address
    passing = tuple(text for text in rendezvous if scope.allowed([text.partition("/")[0]]))
    if not found and not passing:
        raise ProtocolError("a manifest whose addresses cannot be dialed from here")
    return tuple(found.values()), passing


def encode_manifest(
    addresses: Sequence[str],
    experts: Mapping[tuple[int, ...], bool],
    *,
    prefix: str,
    sequence: int,
    rendezvous: Sequence[str] = (),
    tag: RunTag | None = None,
    grant: bytes = b"",
    epochs: Mapping[tuple[int, ...], int] | None = None,
    max_part_bytes: int = MAX_PART_BYTES,
) -> list[tuple[bytes, list[tuple[int, ...]]]]:
    """The parts that say: at these addresses live `experts` of a grid (coordinates -> whether it is the primary).

    In a run, `tag` names it, `grant` says that this server may host, and `epochs` says how far each expert's lineage is
    known (0 where it is not named). Returns each part's bytes and the coordinates in it.

    Raises: ValueError for too many or no addresses, a malformed one, a malformed prefix, or experts of differing
    numbers of dimensions.
    """
    if len(addresses) > MAX_ADDRESSES or len(rendezvous) > MAX_RENDEZVOUS or not (addresses or rendezvous):
        raise ValueError(
            f"a server has at most {MAX_ADDRESSES} addresses and {MAX_RENDEZVOUS} rendezvous nodes, and one of either "
            f"at least; not {len(addresses)} and {len(rendezvous)}"
        )
    if len({len(coords) for coords in experts}) != 1:
        raise ValueError("the experts of one grid have equally many coordinates, and there is at least one expert")
    if not is_prefix(prefix) or len(prefix.encode()) > MAX_PREFIX_BYTES:
        raise ValueError(f"not a prefix of at most {MAX_PREFIX_BYTES} bytes, without a number between dots: {prefix!r}")
    ordered = sorted(experts)
    num_dims = len(ordered[0])
    width = next(width for width in _WIDTHS if max(map(max, ordered)) < 256**width)
    head = b"".join(
        (
            MAGIC + _short(prefix.encode()) + sequence.to_bytes(SEQUENCE_BYTES, "big") + encode_tag(tag, grant),
            encode_addresses(addresses, rendezvous),
            bytes([num_dims, width]),
        )
    )
    # 2 bytes for the count; n experts take n * (dims * width) bytes and n bits, rounded up, and their epochs
    num_per_part = (max_part_bytes - len(head) - 2) * 8 // (8 * (num_dims * width + 4 * (tag is not None)) + 1)
    if num_per_part < 1:
        raise ValueError("the addresses leave no room for experts")
    if len(ordered) > num_per_part:  # a part of few shards is stored under few keys
        ordered.sort(key=lambda key: _shard_of(join_uid(prefix, key)))
    parts = []
    for start in range(0, len(ordered), num_per_part):
        some = sorted(ordered[start : start + num_per_part])
        part = head + len(some).to_bytes(2, "big") + np.array(some, dtype=_WIDTHS[width]).tobytes()
        part += np.packbits(np.array([experts[key] for key in some], dtype=bool)).tobytes()
        if tag is not None:
            part += np.array([(epochs or {}).get(key, 0) for key in some], dtype=">u4").tobytes()
        parts.append((part, some))
    return parts


def decode_manifest(value: object, *, prefix: str | None = None) -> Manifest:
    """Read one part. Untrusted. Raises: ProtocolError, also where it belongs to another grid than `prefix`."""
    if type(value) is not bytes or len(value) > MAX_PART_BYTES or not value.startswith(MAGIC):
        raise ProtocolError(f"not a manifest of this format, of at most {MAX_PART_BYTES} bytes")
    try:
        manifest = _decode(Reader(value, len(MAGIC)))
    except (IndexError, UnicodeDecodeError, ValueError):
        raise ProtocolError("a malformed manifest") from None
    if prefix is not None and manifest.prefix != prefix:
        raise ProtocolError("a manifest of another grid")
    return manifest


class Reader:
    """Take untrusted bytes piece by piece. Raises: ProtocolError where they are cut short."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data = data
        self._at = start

    def take(self, length: int) -> bytes:
        taken = self._data[self._at : self._at + length]
        if len(taken) != length:
            raise ProtocolError("a manifest that is cut short")
        self._at += length
        return taken

    def number(self, width: int = 1) -> int:
        return int.from_bytes(self.take(width), "big")

    def short(self) -> bytes:
        return self.take(self.number())

    def array(self, dtype: str, count: int) -> npt.NDArray[np.int64]:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype).astype(np.int64)

    def is_at_end(self) -> bool:
        return self._at == len(self._data)


def _decode(reader: Reader) -> Manifest:
    prefix = reader.short().decode()
    if not is_prefix(prefix):
        raise ProtocolError("a manifest with a malformed prefix")
    sequence = reader.number(SEQUENCE_BYTES)
    tag, grant = decode_tag(reader)
    addresses, rendezvous = decode_addresses(reader)
    num_dims, width, num_experts = reader.number(), reader.number(), reader.number(2)
    if not 0 < num_dims <= MAX_DIMS or width not in _WIDTHS or num_experts == 0:
        raise ProtocolError("a manifest without experts or dimensions")
    coords = reader.array(_WIDTHS[width], num_experts * num_dims).reshape(num_experts, num_dims)
    change = np.diff(coords, axis=0)
    first = (change != 0).argmax(axis=1)  # the dimension that decides; 0 for equal rows, where the change is 0
    if not (change[np.arange(len(change)), first] > 0).all():
        raise ProtocolError("a manifest whose coordinates do not ascend strictly")
    bits = np.frombuffer(reader.take((num_experts + 7) // 8), np.uint8)
    primary = np.unpackbits(bits, count=num_experts).astype(bool)
    epochs = None if tag is None else reader.array(">u4", num_experts)
    if not reader.is_at_end():
        raise ProtocolError("a manifest of the wrong length")
    return Manifest(prefix, sequence, addresses, rendezvous, coords, primary, tag, grant, epochs)


def encode_addresses(addresses: Sequence[str], rendezvous: Sequence[str]) -> bytes:
    """Encode a peer's addresses, and the nodes that help to reach it. Raises: ValueError for a malformed one."""
    some = bytes([len(addresses)]), *map(_encode_address, addresses)
    return b"".join((*some, bytes([len(rendezvous)]), *map(_encode_rendezvous, rendezvous)))


def decode_addresses(reader: Reader) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The inverse of `encode_addresses`. Raises: ProtocolError, IndexError, UnicodeDecodeError, ValueError."""
    if (num_addresses := reader.number()) > MAX_ADDRESSES:
        raise ProtocolError("a manifest with too many addresses")
    addresses = tuple(_decode_address(reader) for _ in range(num_addresses))
    if (num_rendezvous := reader.number()) > MAX_RENDEZVOUS or not (num_addresses or num_rendezvous):
        raise ProtocolError("a manifest with too many rendezvous nodes, or without any address")
    return addresses, tuple(f"{_decode_address(reader)}/{PeerID(reader.take(32))}" for _ in range(num_rendezvous))


def _short(data: bytes) -> bytes:
    """Return at most 255 bytes, preceded by their number."""
    return bytes([len(data)]) + data


def encode_tag(tag: RunTag | None, grant: bytes) -> bytes:
    if tag is None:
        return b"\0"
    if len(grant) > MAX_GRANT_BYTES:
        raise ValueError(f"a grant has at most {MAX_GRANT_BYTES} bytes")
    kind = bytes([MODES.index(tag.mode)])
    return kind + tag.owner + _short(tag.name.encode()) + len(grant).to_bytes(2, "big") + grant


def decode_tag(reader: Reader) -> tuple[RunTag | None, bytes]:
    mode = MODES[reader.number()]
    if mode == "bare":
        return None, b""
    tag = RunTag(PeerID(reader.take(32)), reader.short().decode(), mode)
    if (num_bytes := reader.number(2)) > MAX_GRANT_BYTES:
        raise ProtocolError("a manifest whose grant is too long")
    return tag, reader.take(num_bytes)


def _encode_address(address: str) -> bytes:
    host, port = split_host_port(address)
    if not 0 < port < 2**16:
        raise ValueError(f"nobody can be dialed at port {port}: {address!r}")
    try:
        ip = ipaddress.ip_address(host)
        packed = bytes([ip.version]) + ip.packed
    except ValueError:
        if not 0 < len(host.encode()) < 254 or not _is_name(host):
            raise ValueError(f"not an address, such as 198.51.100.7:31337: {address!r}") from None
        packed = b"\0" + _short(host.encode())
    return packed + port.to_bytes(2, "big")


def _encode_rendezvous(node: str) -> bytes:
    address, _, peer_id = node.partition("/")
    return _encode_address(address) + PeerID.parse(peer_id)


def _decode_address(reader: Reader) -> str:
    kind = reader.number()
    if kind == 0:
        host = reader.short().decode()
        if not _is_name(host) or len(host) > MAX_HOST:
            raise ProtocolError("a malformed host name")
    elif kind == 4:
        host = str(ipaddress.IPv4Address(reader.take(4)))
    elif kind == 6:
        host = f"[{ipaddress.IPv6Address(reader.take(16))}]"
    else:
        raise ProtocolError("an address of an unknown kind")
    if (port := reader.number(2)) == 0:
        raise ProtocolError("an address without a port")
    return f"{host}:{port}"


def _is_name(host: str) -> bool:
    return bool(host) and all(part.replace("-", "").replace("_", "").isalnum() for part in host.split("."))


def experts_by_grid(uids: Mapping[str, bool]) -> Iterator[tuple[str, dict[tuple[int, ...], bool]]]:
    """Group uids (-> primary) by prefix: ``("ffn", {(3, 7): True})``. Raises: ValueError for a malformed uid."""
    grids: dict[str, dict[tuple[int, ...], bool]] = {}
    for uid, primary in uids.items():
        prefix, coords = split_uid(uid)
        grids.setdefault(prefix, {})[coords] = primary
    yield from grids.items()
