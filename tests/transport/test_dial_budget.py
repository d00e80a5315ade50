"""Dials in vain are counted by target, and end after a few."""

import pytest

from tesseract_async.transport.tcp import DialBudget, DialedInVain

FAILED = ConnectionRefusedError()


def num_dials(budget: DialBudget, addresses: list[str], *, seconds: int) -> int:
    """Dials of what names nobody, by one who tries each address once a second."""
    count = 0
    for now in range(seconds):
        for address in addresses:
            try:
                budget.check(address, float(now))
                count += 1
                budget.finished(address, FAILED, float(now))
            except DialedInVain as error:
                budget.finished(address, error, float(now))
    return count


def test_a_target_is_left_alone_after_a_few_dials() -> None:
    assert num_dials(DialBudget(), ["8.8.8.8:1"], seconds=100) <= 8 + 100 * 0.2 + 1


def test_the_ports_of_a_host_count_together() -> None:
    assert num_dials(DialBudget(), [f"8.8.8.8:{port}" for port in range(1, 1000)], seconds=100) <= 64 + 160 + 1


def test_the_right_one_at_last_makes_up_for_it() -> None:
    budget = DialBudget()
    for _ in range(9):
        budget.finished("8.8.8.8:1", FAILED, 0.0)
    with pytest.raises(DialedInVain, match="failed too often"):
        budget.check("8.8.8.8:1", 1.0)
    budget.check("8.8.8.8:2", 1.0)
    budget.finished("8.8.8.8:1", None, 1.0)
    assert num_dials(budget, ["8.8.8.8:1"], seconds=100) == num_dials(DialBudget(), ["8.8.8.8:1"], seconds=100)


def test_what_is_remembered_is_bounded() -> None:
    budget = DialBudget()
    for number in range(10_000):
        budget.finished(f"[2a00::{number:x}]:1", FAILED, 0.0)
    assert len(budget._failed) <= 4096
    for port in range(1, 100):
        budget.finished(f"127.0.0.1:{port}", FAILED, 0.0)
    budget.check("127.0.0.1:1000", 0.0)
