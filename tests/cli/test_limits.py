"""The limits as flags."""

from __future__ import annotations

import dataclasses

import click

from tesseract_async.cli.limits import OPTIONS, limit_options
from tesseract_async.server.contract import VolunteerSettings


def test_every_limit_has_its_flag_and_its_help() -> None:
    @click.command()
    @limit_options
    def command() -> None: ...

    flags = {option.name for option in command.params}
    assert flags == set(OPTIONS)
    assert len(flags) == len(dataclasses.fields(VolunteerSettings))
    assert all(isinstance(option, click.Option) and option.help for option in command.params)
    defaults = {option.name: option.default for option in command.params}
    assert defaults["pause_after"] == VolunteerSettings().pause_after
    assert defaults["resume_after"] == VolunteerSettings().resume_after
    assert defaults["quota_period"] == VolunteerSettings().quota_period
