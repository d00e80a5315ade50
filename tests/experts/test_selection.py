"""Which experts a server hosts: what it was asked for, within its run, its grant, its memory and its checkpoints."""

import pytest

from tesseract_async.experts.authority import Authority
from tesseract_async.experts.choice import EXPIRED, Selection, select_experts
from tesseract_async.experts.grants import sign_grant
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import RunManifest, sign_run
from tesseract_async.identity import Identity

NOW = 2e9
ME = Identity.generate().peer_id
PATTERN = ExpertPattern.parse("ffn.[0:2].[0:2]")


def select(
    *patterns: str,
    num_experts: int | None = None,
    authority: Authority | None = None,
    stored: tuple[str, ...] = (),
    max_experts: int | None = None,
) -> Selection:
    return select_experts(
        ME,
        [ExpertPattern.parse(text) for text in patterns],
        num_experts=num_experts,
        run=None if authority is None else authority.run.manifest,
        authority=authority,
        stored=stored,
        max_experts=max_experts,
        now=NOW,
    )


def test_all_of_the_patterns_are_hosted_without_a_number() -> None:
    assert select("ffn.0.1", "ffn.0.[0:2]") == Selection(["ffn.0.1", "ffn.0.0"])
    with pytest.raises(ValueError, match="2 experts were asked for, but only 1 fit --max-memory"):
        select("ffn.0.[0:2]", max_experts=1)


def test_what_was_trained_here_before_is_taken_first() -> None:
    stored = ("ffn.1.1", "ffn.0.1", "ffn.7.7", "other")
    assert select(str(PATTERN), num_experts=3, stored=stored) == Selection(["ffn.0.1", "ffn.1.1"], 1, PATTERN)
    assert select(str(PATTERN), num_experts=1, stored=stored).uids == ["ffn.0.1"]
    limited = select(str(PATTERN), num_experts=3, stored=stored, max_experts=2)
    assert limited.num_more == 0 and limited.notes == ("only 2 of 3 experts fit --max-memory",)
    with pytest.raises(ValueError, match="one pattern"):
        select("ffn.0", "ffn.1", num_experts=1)


def test_an_expired_grant_hosts_what_it_hosted_and_nothing_more() -> None:
    owner = Identity.generate()
    signed = sign_run(owner, RunManifest("digits", "ffn", (1, 4), "ffn"))

    def authority(*, expired: bool = False) -> Authority:
        made = Authority(signed)
        until = int(NOW) + (-5 if expired else 1000)
        covers = ExpertPattern.parse("ffn.0.[0:3]")
        grant = sign_grant(owner, made.run_id, ME, ["host"], serial=1, not_after=until, pattern=covers)
        assert made.learn_grant(grant.blob)
        return made

    assert select("ffn.0.[0:2]", authority=authority()).uids == ["ffn.0.0", "ffn.0.1"]
    for pattern, sentence in (("ffn.0.3", "does not cover ffn.0.3"), ("ffn.0.[0:5]", "beyond"), ("x.0.0", "not part")):
        with pytest.raises(ValueError, match=sentence):
            select(pattern, authority=authority())
    for patterns in ((), ("ffn.0.[0:2]",)):
        with pytest.raises(ValueError, match="has expired: ask the run's owner to renew it"):
            select(*patterns, authority=authority(expired=True))
    left = select("ffn.0.[0:2]", authority=authority(expired=True), stored=("ffn.0.1",))
    assert left == Selection(["ffn.0.1"], notes=(EXPIRED,))
    kept = select(authority=authority(), stored=("ffn.0.1", "ffn.0.3"))
    assert kept.uids == ["ffn.0.1"], "of what the grant covers"
