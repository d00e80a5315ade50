"""The command `tesseract` and the list of its subcommands."""

from __future__ import annotations

import importlib

import click

import tesseract_async

COMMANDS = {
    "demo": (
        "tesseract_async.cli.demo.command",
        "Train a small mixture of experts with separate processes, on this machine.",
    ),
    "dht": ("tesseract_async.cli.dht", "Run a bootstrap node: a first address for others to join by."),
    "export": ("tesseract_async.cli.export", "Collect a run's weights into a folder that loads without the swarm."),
    "run": ("tesseract_async.cli.start_run", "Start a training run: sign what it consists of."),
    "serve": ("tesseract_async.cli.serve", "Lend this machine: host experts."),
}


class LazyGroup(click.Group):
    """Imports a subcommand's module when that subcommand is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # from the table: asking every command for its own sentence would import them all
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(tesseract_async.__version__, prog_name="tesseract")
def main() -> None:
    """Train one large mixture-of-experts model on computers that volunteers lend.

    Try `tesseract demo` first. To train across machines, run `tesseract dht` on one that all can reach, and
    `tesseract serve` wherever experts shall live.
    """
