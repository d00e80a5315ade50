"""What `tesseract serve` makes of its flags: a volunteer's limits, and how steps are taken."""

import dataclasses

import click
import pytest
from click.testing import CliRunner

from tesseract_async.cli.building import make_builder
from tesseract_async.cli.serve_options import ServeOptions, serve_options, volunteer_options
from tesseract_async.server.contract import VolunteerSettings


def test_every_limit_has_its_flag_and_its_help() -> None:
    seen: list[VolunteerSettings] = []

    @click.command()
    @volunteer_options
    def command(*, limits: VolunteerSettings) -> None:
        seen.append(limits)

    assert [option.name for option in command.params] == [field.name for field in dataclasses.fields(VolunteerSettings)]
    assert all(isinstance(option, click.Option) and option.help for option in command.params)
    assert CliRunner().invoke(command, []).exit_code == 0
    assert seen == [VolunteerSettings()], "the defaults are the same"
    described = {option.name: option.help for option in command.params if isinstance(option, click.Option)}
    assert described["max_memory_bytes"] == "Use at most this much memory, such as '4 GiB'.", "its first sentence"
    assert described["hours"] is not None and described["hours"].endswith("24:00'; may be given several times.")
    refused = CliRunner().invoke(command, ["--data-quota", "0"])
    assert refused.exit_code == 2 and "data_quota_bytes is more than 0" in refused.output


def test_steps_are_taken_as_the_flags_say() -> None:
    seen: list[ServeOptions] = []

    @click.command()
    @serve_options
    def command(*, serving: ServeOptions) -> None:
        seen.append(serving)

    flags = "--experts ffn.0 --size in_features=4 --learning-rate 0.5 --optimizer-option weight_decay=0.25 "
    flags += "--schedule linear --schedule-option num_warmup_steps=10 --training clip_gradient_norm=2 "
    result = CliRunner().invoke(command, flags.split())
    assert result.exit_code == 0, result.output
    backend = make_builder(seen[0], VolunteerSettings(), keeps_learning_rate=False).build("ffn.0", None)
    backend.prepare()
    assert backend.optimizer is not None and backend.settings.clip_gradient_norm == 2
    (group,) = backend.optimizer.param_groups
    assert (group["weight_decay"], group["lr"]) == (0.25, 0.05)
    refused = CliRunner().invoke(command, ["--experts", "ffn.0", "--schedule-option", "num_steps=3"])
    assert refused.exit_code == 2 and "--schedule-option needs --schedule" in refused.output
    serving = dataclasses.replace(seen[0], training=(("journal", 1),))
    with pytest.raises(ValueError, match="unknown training options: journal"):
        make_builder(serving, VolunteerSettings(), keeps_learning_rate=False).build("ffn.0", None)
