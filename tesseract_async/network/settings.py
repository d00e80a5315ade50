"""Every number that the network lets its user choose, with what it is for."""

from __future__ import annotations

from dataclasses import dataclass

MAX_DATAGRAM_BYTES = 1200
"""No datagram is longer: it fits every path of the internet without fragments (RFC 9000, section 14)."""
MIN_REQUEST_BYTES = 400
"""A request without a token is padded to this, so that a full reply is never more than 3 x what was sent."""
AMPLIFICATION = 3
"""Reply bytes per request byte towards an address that has proven nothing."""
CLOCK_SKEW = 30.0
"""Seconds by which the clocks of two nodes may differ without harm."""


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """Times are seconds. The defaults suit the open internet and a single machine alike."""

    k: int = 20
    """Contacts per bucket, and holders per record (Maymounkov & Mazieres 2002, section 2.2)."""
    num_paths: int = 4
    """Disjoint paths of a lookup (Baumgart & Mies 2007, section 4.4)."""
    alpha: int = 8
    """Requests that one lookup has under way, over all its paths."""
    num_equal_holders: int = 3
    """A read ends when so many holders report the same digests."""
    narrow_for: float = 0.02
    """For so long a read has only as many requests under way as it needs equal answers, and one to spare; then `alpha`.
    Where round trips are short, a question costs more than the wait for its answer."""
    max_calls: int = 512
    """RPCs under way at one node; more wait for their turn."""
    num_retransmissions: int = 2
    """How often an RPC is sent again before it counts as failed."""
    first_timeout: float = 0.5
    """Wait for a reply where no round trip has been measured yet."""
    min_timeout: float = 0.15
    """Shortest wait for a reply, however fast the peer was before: event loops pause for garbage and for others."""
    max_timeout: float = 2.0
    """Longest wait for a reply before sending again."""
    token_lifetime: float = 300.0
    """A node changes the secret of its address tokens this often; the secret before stays good as long again."""
    questionable_after: float = 300.0
    """A contact silent for so long is pinged before it keeps its place against a newcomer."""
    unreachable_for: float = 60.0
    """A contact that failed is not asked again within this time, unless it is heard from."""
    refresh_period: float = 1800.0
    """A bucket that no lookup touched for so long is refreshed (section 2.3)."""
    seed_period: float = 60.0
    """Seeds are asked again this often, so that two halves of a network find each other."""
    min_seed_backoff: float = 0.5
    """First wait before seeds are asked again while nobody answers; doubles up to `seed_period`."""
    join_timeout: float = 5.0
    """How long a read or write waits for the first contact of a node that was given seeds."""
    max_ttl: float = 86400.0
    """Records that live longer are refused."""
    max_storage_bytes: int = 256 * 2**20
    """Bytes of records held for others; beyond them new entries are refused."""
    max_entries_per_key: int = 16384
    """Entries of one dictionary."""
    max_entries_per_owner: int = 1024
    """Entries of one dictionary by the same owner."""
    pages_in_flight: int = 64
    """Pages of one large dictionary asked for at a time."""
    path_cache_lifetime: float = 30.0
    """A copy of a single value lives so long on the nodes next to its holders, half as long with each doubling of the
    nodes that are nearer; 0 keeps none."""
    republish_period: float = 600.0
    """Holders compare what they hold with those closest to the key this often."""
    max_range_per_bucket: int = 2
    """Contacts of one address range (/24, /48) in a bucket; loopback and private addresses are exempt from ranges."""
    max_range_per_table: int = 10
    """Contacts of one range in the routing table."""
    max_range_per_shortlist: int = 3
    """Candidates of one range on one path of a lookup."""
    max_entries_per_range: int = 1024
    """Entries of one dictionary that came from one range."""
    max_copies_per_range: int = 4096
    """Entries of one dictionary that holders of one range copied here: these are others', and in good faith many."""
    max_range_per_holder_set: int = 2
    """Holders of one range among the k of a record. In a read, those of one range count as one."""
    max_request_rate: float = 4000.0
    """What one range (or address and port) may ask for in a second: 1 a request, 4 a signature made or checked."""
    max_repairs: int = 32
    """Entries that one read sends to holders that were found stale."""

    def __post_init__(self) -> None:
        for name in ("k", "num_paths", "alpha", "num_equal_holders", "max_calls", "pages_in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
