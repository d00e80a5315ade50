"""Whom a data channel's checks are sent to."""

from tesseract_async.nat.hole_punching import MAX_TRIED, plausible
from tesseract_async.nat.offers import Candidate, Description
from tesseract_async.network.address_scope import AddressScope


def description(*hosts: str) -> Description:
    """Candidates at these hosts: ``host`` in private networks, else ``srflx``."""
    kinds = ["host" if host.startswith(("192.168.", "10.", "127.")) else "srflx" for host in hosts]
    return Description(
        "user",
        "password" * 3,
        bytes(32),
        tuple(
            Candidate(kind, host, 1000 + number, 2**31 - number, str(number))
            for number, (kind, host) in enumerate(zip(kinds, hosts, strict=True))
        ),
    )


def hosts_of(offered: Description, *, origin: str | None, own: Description, scope: AddressScope) -> list[str]:
    return sorted(one.host for one in plausible(offered, own, origin=origin, allows=scope.allows).candidates)


HOME = AddressScope(["192.168.1.2"])
OWN = description("192.168.1.2", "8.8.8.8")


def test_an_offer_leads_to_where_it_came_from_only() -> None:
    third = [f"9.9.9.{number}" for number in range(10)] + ["169.254.169.254", "192.168.1.1"]
    assert hosts_of(description("9.9.0.1", *third[:11]), origin="9.9.0.1", own=OWN, scope=HOME) == ["9.9.0.1"]
    assert hosts_of(description(*third), origin="9.9.0.1", own=OWN, scope=HOME) == []
    assert hosts_of(description(*["9.9.0.1"] * 12), origin="9.9.0.1", own=OWN, scope=HOME) == ["9.9.0.1"] * MAX_TRIED
    v6 = description("2a00::1", "2a00::2", "2a00:0:0:1::1")
    assert hosts_of(v6, origin="2a00::9", own=OWN, scope=HOME) == ["2a00::1", "2a00::2"]


def test_private_addresses_are_tried_behind_the_same_nat_only() -> None:
    peer = description("192.168.1.7", "8.8.8.8")
    assert hosts_of(peer, origin="8.8.8.8", own=OWN, scope=HOME) == ["192.168.1.7", "8.8.8.8"]
    assert hosts_of(peer, origin="8.8.4.4", own=OWN, scope=HOME) == []
    assert hosts_of(description("10.0.0.1", "8.8.8.8"), origin="8.8.8.8", own=OWN, scope=HOME) == ["8.8.8.8"]
    public = AddressScope(["8.8.8.8"])
    assert hosts_of(peer, origin="8.8.8.8", own=OWN, scope=public) == ["8.8.8.8"]
    assert hosts_of(description("127.0.0.1"), origin="127.0.0.1", own=OWN, scope=HOME) == []


def test_an_answer_leads_to_one_public_host_of_each_kind() -> None:
    many = description("9.9.0.1", "9.9.1.1", "9.9.2.1", "2a00::1", "2a01::1", "192.168.1.7")
    assert hosts_of(many, origin=None, own=OWN, scope=HOME) == ["2a00::1", "9.9.0.1"]
    same = description("192.168.1.7", "8.8.8.8")
    assert hosts_of(same, origin=None, own=OWN, scope=HOME) == ["192.168.1.7", "8.8.8.8"]
    assert hosts_of(description("192.168.1.7"), origin=None, own=description("192.168.1.2"), scope=HOME) == [
        "192.168.1.7"
    ]
