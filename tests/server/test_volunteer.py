"""The keeper against a server that writes down what it is told, with a machine and a clock that obey the test."""

import asyncio
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tesseract_async.metrics import Metrics
from tesseract_async.server.contract import Hours, VolunteerSettings, WorkPermission
from tesseract_async.server.volunteer import ThisMachine, VolunteerKeeper

NOON = 1_772_539_200.0  # 2026-03-03, 12:00 UTC


class FakeServer:
    def __init__(self) -> None:
        self.node = SimpleNamespace(metrics=Metrics())
        self.told: list[tuple[str, float]] = []
        self.changed = asyncio.Event()

    async def pause(self, reason: str, *, retry_after: float) -> None:
        self.told.append((reason, retry_after))
        self.changed.set()

    async def resume(self) -> None:
        self.told.append(("resume", 0.0))
        self.changed.set()

    def free_memory(self) -> int:
        self.free()
        return 0

    def free(self) -> None:
        """What forgetting does to the machine."""


class FakeMachine:
    def __init__(self) -> None:
        self.now = NOON
        self.share = 0.0
        self.held = 0

    def load(self) -> float:
        return self.share

    def memory(self) -> int:
        return self.held

    def clock(self) -> float:
        return self.now


def keeper(server: FakeServer, machine: FakeMachine, limits: VolunteerSettings, **options: Any) -> VolunteerKeeper:
    return VolunteerKeeper(server, limits, machine=machine, clock=machine.clock, **options)  # type: ignore[arg-type]


async def test_load_pauses_and_calm_resumes() -> None:
    server, machine = FakeServer(), FakeMachine()
    order: list[str] = []

    async def before() -> None:
        order.append(f"before, after {len(server.told)} words")

    limits = VolunteerSettings(pause_above_load=0.3, pause_after=5.0, resume_after=60.0)
    told: list[WorkPermission] = []
    one = keeper(server, machine, limits, before_pause=before, before_resume=before, tell=told.append)
    machine.share = 0.9
    assert (await one.look()).serve
    machine.now += 5
    assert not (await one.look()).serve
    assert not (await one.look()).serve
    assert server.told == [("this volunteer's computer rests: its owner uses the machine", 60.0)]
    assert server.node.metrics.snapshot()["volunteer_serving"] == 0.0
    machine.share = 0.0
    await one.look()
    machine.now += 60
    assert (await one.look()).serve
    assert server.told[1:] == [("resume", 0.0)]
    assert order == ["before, after 0 words", "before, after 1 words"]
    assert [verdict.serve for verdict in told] == [False, True]


async def test_callers_are_told_when_to_come_back() -> None:
    server, machine = FakeServer(), FakeMachine()
    here = datetime.fromtimestamp(machine.now)  # in the machine's zone, as the contract
    minutes = 60 * here.hour + here.minute
    closed = Hours((minutes + 120) % 1440, (minutes + 180) % 1440)
    one = keeper(server, machine, VolunteerSettings(hours=(closed,)))
    await one.look()
    ((reason, retry_after),) = server.told
    assert "outside of its hours" in reason
    assert retry_after == 2 * 3600


async def test_memory_is_watched(caplog: pytest.LogCaptureFixture) -> None:
    server, machine = FakeServer(), FakeMachine()
    one = keeper(server, machine, VolunteerSettings(max_memory_bytes=1000 << 20))
    machine.held = 2000 << 20
    assert (await one.look()).reason == "its memory limit is reached"
    assert server.told == [("this volunteer's computer rests: its memory limit is reached", 60.0)]
    assert "holds 2000 MiB, its limit is 1000 MiB" in caplog.text and "no new work is taken" in caplog.text
    caplog.clear()
    await one.look()
    assert not caplog.text, "once, not every second"
    machine.held = 2200 << 20
    await one.look()
    assert "holds 2200 MiB" in caplog.text
    machine.held = 960 << 20
    assert not (await one.look()).serve, "clearly below"
    machine.held = 10
    assert (await one.look()).serve
    assert server.node.metrics.snapshot()["volunteer_memory_bytes"] == 10


async def test_what_is_kept_for_callers_is_forgotten_before_work_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    server, machine = FakeServer(), FakeMachine()
    one = keeper(server, machine, VolunteerSettings(max_memory_bytes=1000 << 20))
    machine.held = 1100 << 20
    server.free = lambda: setattr(machine, "held", 900 << 20)  # type: ignore[method-assign]
    assert (await one.look()).serve and not server.told
    assert "it holds 900 MiB" in caplog.text and "no new work" not in caplog.text


async def test_bytes_count_towards_the_quota_and_outlive_a_restart(tmp_path: Path) -> None:
    server, machine = FakeServer(), FakeMachine()
    limits = VolunteerSettings(data_quota_bytes=1000)
    server.node.metrics.count("transport_bytes_sent", 10**6)  # before this keeper: not its business
    file = tmp_path / "state" / "usage.json"
    async with keeper(server, machine, limits, usage_file=file) as one:
        assert one.verdict.serve
        server.node.metrics.count("transport_bytes_sent", 400)
        server.node.metrics.count("transport_bytes_received", 300)
        server.node.metrics.count("network_bytes_received", 299)
        assert (await one.look()).serve
        server.node.metrics.count("network_bytes_sent", 1)
        assert "data quota" in (await one.look()).reason
    again = FakeServer()
    async with keeper(again, machine, limits, usage_file=file):
        assert len(again.told) == 1, "it begins with a pause"
    machine.now += 40 * 86400
    async with keeper(FakeServer(), machine, limits, usage_file=file) as one:
        assert one.verdict.serve
    file.write_text("garbage")
    async with keeper(FakeServer(), machine, limits, usage_file=file) as one:
        assert one.verdict.serve


async def test_an_unwritable_file_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    server, machine = FakeServer(), FakeMachine()
    async with keeper(server, machine, VolunteerSettings(), usage_file=tmp_path / "file" / "usage.json"):
        server.node.metrics.count("transport_bytes_sent", 1)


async def test_it_looks_by_itself() -> None:
    server, machine = FakeServer(), FakeMachine()
    limits = VolunteerSettings(pause_above_load=0.3, pause_after=0.0)
    async with keeper(server, machine, limits, period=0.01), asyncio.timeout(30):
        machine.share = 0.9
        await server.changed.wait()
    assert len(server.told) == 1


async def test_a_failure_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    server, machine = FakeServer(), FakeMachine()
    limits = VolunteerSettings(pause_above_load=0.3, pause_after=0.0)
    failed = asyncio.Event()

    async def fail() -> None:
        failed.set()
        raise TimeoutError

    async with keeper(server, machine, limits, period=0.01, before_pause=fail) as one, asyncio.timeout(30):
        machine.share = 0.9
        await failed.wait()
        machine.share = 0.0
        machine.now += 1000
        await one.look()
        machine.now += 1000
        await server.changed.wait()
    assert server.told == [("resume", 0.0)]
    assert "could not be looked after: TimeoutError" in caplog.text


def test_this_machine_is_seen() -> None:
    machine = ThisMachine()
    assert 0.0 <= machine.load() <= 1.0
    assert 10 * 2**20 < machine.memory() < psutil.virtual_memory().total


def test_own_work_is_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 80.0)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(cpu_percent=lambda interval: 200.0))
    assert ThisMachine().load() == pytest.approx(0.3)
