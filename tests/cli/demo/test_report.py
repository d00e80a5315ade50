"""What the demo's lines add up to: the view, the table, the verdict, the picture."""

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tesseract_async.cli.demo import plan, report, view
from tesseract_async.cli.demo.progress import DemoProgress


def step(number: int, *, accuracy: float | None = None, error: str | None = None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "event": "step",
        "step": number,
        "live": plan.UIDS[: 16 - number],
        "num_calls": 28 * number,
    }
    if error is None:
        facts["loss"] = 2.0 / number
    else:
        facts["error"] = error
    return facts if accuracy is None else facts | {"accuracy": accuracy}


def finished(*accuracies: float, models: str = "aa", **options: Any) -> DemoProgress:
    progress = DemoProgress(plan.DemoOptions(steps=3, **options))
    for number in range(3):
        progress.servers[f"server {number + 1}"].alive = True
        progress.take(f"server {number + 1}", {"event": "report", "versions": {"digits.0.0": 10 * number}}, 0.0)
    for number, accuracy in enumerate(accuracies):
        name = f"trainer {number + 1}"
        progress.take(name, {"event": "ready"}, 0.0)
        progress.take(name, step(1, accuracy=0.2), 1.0)
        progress.take(name, step(2, error="NotEnoughExperts: nobody"), 2.0)
        progress.take(name, step(3, accuracy=accuracy), 4.0)
        progress.take(name, {"event": "done", "model": models[number], "accuracy": accuracy}, 4.0)
    server = progress.servers["server 2"]
    progress.killed_at, progress.returned_at = 1.5, 3.0
    server.versions_at_return = {"digits.0.0": 4}
    progress.note(1.5, "server 2 was killed")
    return progress


def text(renderable: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_every_expert_has_one_server() -> None:
    for num_servers in (1, 2, 3, 5, 16):
        dealt = plan.assign(num_servers)
        assert sorted(uid for uids in dealt for uid in uids) == sorted(plan.UIDS)
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_progress_is_what_the_slower_trainer_did() -> None:
    progress = DemoProgress(plan.DemoOptions(steps=3))
    assert progress.accuracy is None and progress.share == 0
    progress.take("trainer 1", step(3, accuracy=0.99), 1.0)
    assert progress.share == 0 and progress.accuracy is None
    assert progress.trainers["trainer 1"].calls_per_second == 0
    progress.take("trainer 2", step(1), 1.0)
    progress.take("trainer 2", step(2, accuracy=0.5), 2.0)
    assert progress.share == 2 / 3 and progress.accuracy == 0.5
    assert progress.trainers["trainer 2"].calls_per_second == 28
    assert progress.live == frozenset(plan.UIDS[:14])


def test_the_verdict_follows_the_lower_accuracy() -> None:
    assert finished(0.98, 0.971).passed
    assert not finished(0.99, 0.969).passed
    assert not finished(0.99, 0.98, models="ab").passed
    assert "different models" in report.verdict(finished(0.99, 0.98, models="ab"))
    assert not DemoProgress(plan.DemoOptions()).passed
    assert "the goal was 0.97" in report.verdict(finished(0.98, 0.971))
    assert "less than" in report.verdict(finished(0.98, 0.5))
    assert "frozen" in report.verdict(finished(0.3, 0.4, freeze_experts=True))
    assert "nothing" in report.verdict(DemoProgress(plan.DemoOptions()))


def test_the_summary_holds_the_figures() -> None:
    shown = text(report.summary(finished(0.98, 0.971)))
    for figure in (
        "0.980",
        "0.971",
        "168 (42 per second)",
        "killed at 1.5 s, back at 3.0 s",
        "4 kept, 6 since its return",
    ):
        assert figure in shown
    late = finished(0.98, 0.971)
    late.servers["server 2"].alive, late.servers["server 2"].versions_at_return = False, None
    assert "was not back" in text(report.summary(late))


def test_a_frame_shows_trainers_experts_and_the_log() -> None:
    progress = finished(0.98, 0.971)
    progress.servers["server 2"].alive = False
    shown = text(view.draw(progress, 4.0))
    for word in ("trainer 1", "0.980", "3/3", "server 2 was killed", "gone", "alive", "●", "·"):
        assert word in shown
    text(view.draw(DemoProgress(plan.DemoOptions()), 0.0))


@pytest.mark.parametrize("terminal", [False, True])
async def test_showing_ends_with_the_last_state(terminal: bool, tmp_path: Path) -> None:
    progress = finished(0.98, 0.971)
    with (tmp_path / "out").open("w") as file:
        console = Console(file=file, force_terminal=terminal, width=100)
        showing = asyncio.create_task(view.show(progress, lambda: 10.0, console))
        await asyncio.sleep(0)
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)
    shown = (tmp_path / "out").read_text()
    assert "server 2 was killed" in shown
    assert "trainer 1" in shown


@pytest.mark.parametrize("accuracies", [(0.98, 0.971), ()])
def test_the_picture_is_a_png(tmp_path: Path, accuracies: tuple[float, ...]) -> None:
    report.plot(finished(*accuracies), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
