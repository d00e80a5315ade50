"""The command `tesseract` and the list of its subcommands."""

import difflib
import importlib
import io
import os
import sys
from typing import Any

import click

import tesseract_async

# name: (module, the command in it, a sentence for the list)
COMMANDS = {
    "bench": ("bench", "command", "Measure what this machine would contribute."),
    "call": ("call", "command", "Try an expert: call it, and see what comes back."),
    "dashboard": ("dashboard", "command", "Serve a web page that shows the swarm."),
    "demo": ("demo.command", "command", "Train a small mixture of experts with separate processes, on this machine."),
    "dht": ("dht", "command", "Run a bootstrap node: a first address for others to join by."),
    "doctor": ("doctor", "command", "Look for what would keep this machine from taking part."),
    "restore": ("save", "restore", "Take experts back to a saved state."),
    "save": ("save", "save", "Write a model into a folder that loads without the swarm."),
    "get": ("records", "get", "Show what the network holds under a key."),
    "join": ("join", "command", "Take part in a run, with nothing but its invite."),
    "keygen": ("keygen", "command", "Make a key file, by which a node keeps its id."),
    "put": ("records", "put", "Store a value under a key."),
    "run": ("owning", "command", "Start a training run, and manage who takes part in it."),
    "serve": ("serve", "command", "Lend this machine: host experts."),
    "top": ("top", "command", "Show the swarm live in the terminal."),
}


CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    "show_default": True,
    # every option may be given as an environment variable: TESSERACT_SERVE_DEVICE=cuda
    "auto_envvar_prefix": "TESSERACT",
}


class LazyGroup(click.Group):
    """A group that imports a subcommand's module when that subcommand is asked for."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command; help that cannot be written, for instance to a full disk, ends in a sentence."""
        try:
            return super().main(*args, **extra)
        except OSError as error:
            click.echo(f"Error: {error.strerror or error}", err=True)
            sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"tesseract_async.cli.{module}"), name)
        for option in command.params:
            # named after the flag that people know, not after the argument: --experts is TESSERACT_SERVE_EXPERTS
            if isinstance(option, click.Option) and option.envvar is None:
                flag = max(option.opts, key=len).lstrip("-").replace("-", "_")
                option.envvar = f"TESSERACT_{cmd_name}_{flag}".upper()
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(COMMANDS))}"
            ctx.fail(f"No such command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # from the table: asking each command for its sentence would import them all
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup, context_settings=CONTEXT)
@click.version_option(tesseract_async.__version__, prog_name="tesseract")
def main() -> None:
    """Train one large mixture-of-experts model on computers that volunteers lend.

    Try `tesseract demo` first. With an invite to a run, `tesseract join INVITE` is all it takes. To train across
    machines, run `tesseract dht` on one that all others can reach, and `tesseract serve` on each that is to host
    experts; `tesseract top` shows the swarm at work.

    Every option may also be given as an environment variable, such as TESSERACT_SERVE_DEVICE=cuda.
    """
    _open_standard_files()


def _open_standard_files() -> None:
    """Open those of the three that are closed (``<&-``), or a socket would take their number, which aborts libuv."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):  # where the encoding lacks letters, a "?" is better than an error
        if isinstance(stream, io.TextIOWrapper) and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")
