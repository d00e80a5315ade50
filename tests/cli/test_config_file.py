"""Options from a TOML file: the same checks and the same sentences as for flags, and flags go before it."""

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tesseract_async.cli.config_file import config_option
from tesseract_async.cli.serve_options import volunteer_options
from tesseract_async.server.contract import Hours, VolunteerSettings


def make() -> tuple[click.Command, list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []

    @click.command()
    @config_option
    @click.option("--num-experts", type=int, default=1)
    @click.option("--initial-peers", "-p", multiple=True)
    @click.option("--public", is_flag=True)
    @volunteer_options
    def command(**values: Any) -> None:
        seen.append(values)

    return command, seen


def invoke(tmp_path: Path, text: str, *flags: str) -> tuple[int, str, dict[str, Any]]:
    file = tmp_path / "volunteer.toml"
    file.write_text(text)
    command, seen = make()
    result = CliRunner().invoke(command, ["--config", str(file), *flags])
    return result.exit_code, result.output, seen[0] if seen else {}


TEXT = """
num-experts = 4
[join]
initial_peers = ["a:1", "b:2"]
public = true
[limits]
max-memory = "2 GiB"
max_upload = "8 Mbit/s"
data-quota = 1000
quota-period = "week"
hours = ["22:00-07:00", "sat 00:00-24:00"]
pause-above-load = 0.25
resume-after = "2 min"
"""


def test_a_file_gives_every_option(tmp_path: Path) -> None:
    status, output, values = invoke(tmp_path, TEXT)
    assert status == 0, output
    assert (values["num_experts"], values["initial_peers"], values["public"]) == (4, ("a:1", "b:2"), True)
    assert values["limits"] == VolunteerSettings(
        max_memory_bytes=2**31,
        max_upload_rate=1e6,
        data_quota_bytes=1000,
        quota_period="week",
        hours=(Hours.parse("22:00-07:00"), Hours.parse("sat 00:00-24:00")),
        pause_above_load=0.25,
        resume_after=120.0,
    )


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    _, _, values = invoke(tmp_path, TEXT, "--num-experts", "9", "--hours", "01:00-02:00", "--max-upload", "1 MB/s")
    assert values["num_experts"] == 9
    assert values["limits"].hours == (Hours.parse("01:00-02:00"),)
    assert values["limits"].max_upload_rate == 1e6
    assert values["limits"].max_memory_bytes == 2**31


def test_one_value_may_stand_without_brackets(tmp_path: Path) -> None:
    _, _, values = invoke(tmp_path, 'initial-peers = "a:1"\nhours = "22:00-07:00"')
    assert values["initial_peers"] == ("a:1",)
    assert values["limits"].hours == (Hours.parse("22:00-07:00"),)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("num-experts = ", "is not TOML"),
        ("num-expert = 3", "did you mean num_experts?"),
        ("[limits]\nspeed = 3", "speed is not an option of this command"),
        ("config = 'other.toml'", "config is not an option"),
        ("num-experts = 3\n[join]\nnum_experts = 4", "is given twice"),
        ("num-experts = [3]", "takes one value"),
        ("num-experts = 'many'", "not a valid integer"),
        ("max-upload = '10 MB'", "20 Mbit/s or 2 MB/s"),
        ("hours = '7-9'", "not hours"),
        ("quota-period = 'year'", "year"),
        ("pause-above-load = 30", "pause_above_load is a share"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, text: str, sentence: str) -> None:
    status, output, _ = invoke(tmp_path, text)
    assert status == 2
    assert sentence in " ".join(output.split())


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    command, _ = make()
    result = CliRunner().invoke(command, ["--config", str(tmp_path / "none.toml")])
    assert result.exit_code == 2
    assert "does not exist" in result.output
