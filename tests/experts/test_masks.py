from tesseract_async.experts.masks import Masks
from tests.experts.fake_network import peer

A, B = peer(1), peer(2)


def test_the_first_failure_is_forgiven_with_the_next_manifest_later_ones_after_longer_and_longer() -> None:
    masks, now, seen = Masks(), 100.0, []
    for sequence in range(12):
        if masks.hides(A, "f.0", sequence, now):
            continue
        masks.failed(A, "f.0", sequence, now)
        assert masks.hides(A, "f.0", sequence, now + 1e9), "an old manifest is no news"
        began = now
        while masks.hides(A, "f.0", sequence + 1, now):
            now += 1.0
        seen.append(now - began)
    assert seen == [0, 15, 30, 60, 120, 240, 480, 600, 600, 600, 600, 600]
    assert masks.doubt(A, "f.0") == 12
    assert not masks.hides(A, "f.1", 0, now) and not masks.hides(B, "f.0", 0, now)
    assert masks.doubt(A, "f.1") == 1 and masks.doubt(B, "f.0") == 0
    assert masks.answered(A, "f.0") and not masks.answered(A, "f.0")
    assert not masks.hides(A, "f.0", 0, now) and masks.doubt(A, "f.0") == masks.doubt(A, "f.1") == 0


def test_calls_that_fail_at_once_are_one_failure() -> None:
    masks = Masks()
    for _ in range(10):
        masks.failed(A, "f.0", 5, 0.0)
    assert masks.doubt(A, "f.0") == 1 and not masks.hides(A, "f.0", 6, 0.0)


def test_lateness_raises_doubt_and_hides_nobody() -> None:
    masks = Masks()
    for _ in range(5):
        masks.late(A, "f.0")
    assert masks.doubt(A, "f.0") == 5 and not masks.hides(A, "f.0", 0, 0.0)
    masks.failed(A, "f.0", 3, 0.0)
    assert masks.hides(A, "f.0", 3, 0.0) and not masks.hides(A, "f.0", 4, 0.0), "its first failure"
    masks.failed(A, "f.0", 4, 0.0)
    assert masks.hides(A, "f.0", 5, 14.9) and not masks.hides(A, "f.0", 5, 15.0)


def test_what_is_remembered_is_bounded() -> None:
    masks = Masks()
    for number in range(10_000):
        masks.failed(peer(number), f"f.{number}", 1, 0.0)
    assert len(masks) <= 512 and masks.doubt(peer(9_999), "f.9999") == 1 and masks.doubt(peer(0), "f.0") == 0
