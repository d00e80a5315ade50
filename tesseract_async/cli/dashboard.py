"""`tesseract dashboard`: the swarm as a web page."""

from __future__ import annotations

import click

from tesseract_async.cli.options import enter, join, joining_options, patterns_argument, run_option, visiting_node
from tesseract_async.cli.running import run, say, set_up_logging, until_told_to_leave
from tesseract_async.cli.units import Number


@click.command("dashboard")
@patterns_argument
@joining_options
@run_option
@click.option("--bind", default="127.0.0.1", show_default=True, help="Address that the page is served on.")
@click.option("--bind-port", default=8787, show_default=True, type=click.IntRange(0, 65535))
@click.option("--token", help="What visitors must know; made up if the page is not on loopback and none is given.")
@click.option("--period", default=2.0, show_default=True, type=Number(0.1, 86400), help="Seconds between two looks.")
@click.option("--leave-with-parent", is_flag=True, hidden=True)
def command(
    patterns: tuple[str, ...],
    initial_peers: tuple[str, ...],
    identity: str | None,
    verbose: bool,
    run_name: str | None,
    bind: str,
    bind_port: int,
    token: str | None,
    period: float,
    leave_with_parent: bool,
) -> None:
    """Serve a web page that shows the swarm: experts on their grids, servers, throughput, what happened.

    PATTERNS say which grids to show, such as 'ffn.[0:16].[0:16]'; without any, what the servers nearby host is shown.
    The page binds to loopback; on any other address it asks for a token. Metrics for Prometheus are under /metrics.
    """
    set_up_logging(verbose=verbose)

    async def main() -> int:
        try:
            from tesseract_async.monitoring.dashboard import Dashboard
        except ImportError as error:
            raise click.ClickException(
                f"the dashboard needs {error.name}: pip install -e '.[dashboard]' in the clone"
            ) from None
        from tesseract_async.experts import ExpertPattern
        from tesseract_async.monitoring import SwarmObserver

        node = visiting_node(initial_peers, identity, refresh_period=period)
        chosen = [ExpertPattern.parse(text) for text in patterns]
        async with node:
            await join(node)
            grid = await enter(node, run_name)
            async with (
                SwarmObserver(node, patterns=chosen or grid, period=period) as observer,
                Dashboard(observer, host=bind, port=bind_port, token=token) as page,
            ):
                click.echo(f"The dashboard is at {page.url}", err=True)
                await until_told_to_leave(watch_stdin=leave_with_parent, tell_ready=lambda: say("ready", url=page.url))
        return 0

    run(main)
