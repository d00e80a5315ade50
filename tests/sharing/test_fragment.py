"""Fragments: the same updates give the same bits everywhere, and the rule is Nesterov's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.errors import ProtocolError
from tesseract_async.sharing.fragment import KEPT_UPDATES, Copy, Fragment, Outer, Update, anchor_root
from tesseract_async.sharing.layout import Cut, MergeKind
from tesseract_async.wire import compression

STEPPED = Cut(MergeKind.STEPPED, 0, 300)


def noise(seed: int, n: int = 300) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_the_rule_is_sgd_with_nesterovs_momentum() -> None:
    outer = Outer(learning_rate=0.7, momentum=0.9, codec="none")
    fragment = Fragment(STEPPED, outer, noise(0))
    parameter = torch.nn.Parameter(noise(0).double())
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    for step in range(20):
        mean = noise(step + 1)
        fragment.step(mean)
        parameter.grad = mean.double()
        optimizer.step()
    assert torch.allclose(fragment.anchor.double(), parameter.detach(), atol=1e-5)


def test_what_is_evaluated_is_where_the_members_were() -> None:
    """The anchor is ahead of that, by the momentum."""
    outer, begun = Outer(codec="none"), noise(0)
    fragment, copy = Fragment(STEPPED, outer, begun), Copy(Fragment(STEPPED, outer, begun.clone()))
    assert torch.equal(fragment.merged(), begun)
    fragment.step(noise(1))
    assert torch.allclose(fragment.merged(), begun - noise(1), atol=1e-6)
    assert torch.allclose(fragment.anchor, begun - 1.5 * noise(1), atol=1e-6)
    for seed in range(2, 12):
        fragment.step(noise(1))  # steady progress, of which the older part is left
        copy.merge(fragment.updates[-1:] if seed > 2 else fragment.updates, epoch=0)
        assert torch.equal(copy.merged(), fragment.merged())
    assert torch.allclose(fragment.merged() - fragment.anchor, noise(1) * 2 / 3, atol=0.01)
    plain = Fragment(STEPPED, Outer(momentum=0.0, codec="none"), begun)
    plain.step(noise(1))
    assert torch.equal(plain.merged(), plain.anchor)


@settings(max_examples=30)
@given(st.data())
def test_equal_versions_have_equal_bits_whatever_way_they_came(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(compression.CODECS))
    outer = Outer(
        learning_rate=data.draw(st.sampled_from([1.0, 0.7])),
        momentum=data.draw(st.sampled_from([0.0, 0.5])),
        codec=codec,
    )
    primary = Fragment(STEPPED, outer, noise(0))
    hosts = [Fragment(STEPPED, outer, noise(0)) for _ in range(3)]
    trainer = Copy(Fragment(STEPPED, outer, noise(0)))
    local = noise(0)
    for step in range(data.draw(st.integers(1, 14))):
        primary.step(noise(step + 1) * 0.01)
        for host in hosts:
            if data.draw(st.booleans()):  # it heard nothing of the last rounds, or hears some twice
                if (since := primary.since(host.version, host.root)) is None:
                    host.__init__(
                        STEPPED,
                        outer,
                        primary.anchor.clone(),
                        version=primary.version,
                        momentum=primary.momentum,
                        updates=primary.updates,
                    )  # type: ignore[misc]
                host.replay([*(since or ()), *(since or ())])
                assert (host.root, host.version) == (primary.root, primary.version)
                assert torch.equal(host.anchor, primary.anchor)
                if host.momentum is not None and primary.momentum is not None:
                    assert torch.equal(host.momentum, primary.momentum)
    trainer.push(local)
    since = primary.since(*trainer.base[1:])
    if since is None:
        assert primary.version > KEPT_UPDATES
        local += trainer.rebase(primary, epoch=2)
    else:
        local += trainer.merge(since, epoch=2)
    assert trainer.base == (2, primary.version, primary.root)
    assert torch.equal(trainer.merged(), primary.merged())
    assert torch.allclose(local, primary.anchor, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_alone_without_codec_and_momentum_it_equals_plain_training(steps: int) -> None:
    outer = Outer(momentum=0.0, codec="none")
    primary, copy = Fragment(STEPPED, outer, noise(0)), Copy(Fragment(STEPPED, outer, noise(0)))
    plain, local = noise(0), noise(0)
    for step in range(30):
        plain -= 0.01 * noise(step)
        local -= 0.01 * noise(step)
        if step % 5 == 0:
            difference = compression.decode(
                memoryview(bytearray(copy.push(local.clone()))), torch.float32, (300,), "none"
            )
            primary.step(difference)
        if copy.sent is not None and step % 5 == steps:
            local += copy.merge(primary.since(*copy.base[1:]) or (), epoch=1)
    assert torch.allclose(local, plain, atol=2e-6)


def test_what_a_trainer_learned_while_its_push_travelled_stays() -> None:
    outer = Outer(momentum=0.5)
    primary, copy = Fragment(STEPPED, outer, torch.zeros(300)), Copy(Fragment(STEPPED, outer, torch.zeros(300)))
    local = torch.full((300,), 1.0)
    copy.push(local.clone())
    local += 5.0  # later steps
    primary.step(torch.full((300,), -7.0))
    local += copy.merge(primary.since(*copy.base[1:]) or (), epoch=1)
    assert torch.allclose(local, primary.anchor + 5.0)
    before = copy.anchor
    local += copy.rebase(Fragment(STEPPED, outer, torch.full((300,), 100.0), version=50), epoch=3)
    assert torch.allclose(local - 100.0, primary.anchor + 5.0 - before, atol=1e-5)


def test_updates_that_lie_change_nothing() -> None:
    outer = Outer()
    primary, host = Fragment(STEPPED, outer, noise(0)), Fragment(STEPPED, outer, noise(0))
    good = [primary.step(noise(step)) for step in range(1, 4)]
    nan = bytes(compression.encode(torch.full((300,), math.nan), outer.codec))
    lies: list[list[Update]] = [
        [good[1]],
        [good[0], good[2]],
        [good[0], Update(2, good[2].data, good[1].root)],
        [good[0], Update(2, good[1].data[:-1], good[1].root)],
        [Update(1, nan, bytes(16))],
        [good[0], Update(2, good[1].data, good[0].root)],
    ]
    for updates in lies:
        with pytest.raises(ProtocolError):
            host.replay(updates)
        assert host.version == 0 and torch.equal(host.anchor, noise(0)) and host.updates == ()
        assert host.momentum is not None and not host.momentum.any()
    host.replay(good)
    assert host.root == primary.root
    copy = Copy(Fragment(STEPPED, outer, noise(0)))
    copy.push(noise(9))
    for updates in [*lies, []]:
        with pytest.raises(ProtocolError):
            copy.merge(updates, epoch=1)
        assert copy.sent is not None and torch.equal(copy.anchor, noise(0))


def test_a_base_of_another_branch_is_not_built_on() -> None:
    one, other = Fragment(STEPPED, Outer(), noise(0)), Fragment(STEPPED, Outer(), noise(0))
    one.step(noise(1))
    other.step(noise(2))
    one.step(noise(3))
    assert one.since(1, other.root) is None and one.since(3, one.root) is None
    assert [update.version for update in one.since(0, anchor_root(noise(0))) or ()] == [1, 2]
    assert one.since(2, one.root) == ()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fragment(STEPPED, Outer(), noise(0, 299)),
        lambda: Fragment(STEPPED, Outer(), noise(0).double()),
        lambda: Fragment(STEPPED, Outer(), torch.full((300,), math.inf)),
        lambda: Fragment(STEPPED, Outer(), noise(0), version=-1),
        lambda: Fragment(STEPPED, Outer(), noise(0), momentum=noise(0, 2)),
        lambda: Fragment(STEPPED, Outer(), noise(0), version=1, updates=[Update(1, b"", bytes(16))]),
        lambda: Fragment(STEPPED, Outer(), noise(0), version=3, updates=[Update(2, b"", anchor_root(noise(0)))]),
    ],
)
def test_states_that_do_not_fit_are_refused(make: object) -> None:
    with pytest.raises(ProtocolError):
        make()  # type: ignore[operator]


def test_integers_take_the_newest_values_exactly() -> None:
    cut = Cut(MergeKind.NEWEST, 0, 2)
    fragment = Fragment(cut, Outer(), torch.tensor([1, 2]))
    copy = Copy(Fragment(cut, Outer(), torch.tensor([1, 2])))
    local = torch.tensor([5, 2**60 + 1])
    copy.push(local.clone())
    fragment.step(torch.tensor([7, 2**60 + 3]))
    local[0] += 2  # what is counted while the push travels stays
    local += copy.merge(fragment.since(*copy.base[1:]) or (), epoch=1)
    assert torch.equal(local, torch.tensor([9, 2**60 + 3]))
    local += copy.rebase(Fragment(cut, Outer(), torch.tensor([10, 2**60]), version=50), epoch=3)
    assert torch.equal(local, torch.tensor([12, 2**60]))
