"""A volunteer's limits as flags."""

import dataclasses

import click
from click.testing import CliRunner

from tesseract_async.cli.volunteer_options import volunteer_options
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
    refused = CliRunner().invoke(command, ["--data-quota", "0"])
    assert refused.exit_code == 2 and "data_quota_bytes is more than 0" in refused.output
