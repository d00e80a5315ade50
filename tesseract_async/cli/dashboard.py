"""`tesseract dashboard`: the swarm as a web page."""

import click

from tesseract_async.cli.options import (
    Visit,
    enter,
    leave_with_parent_option,
    patterns_argument,
    run_option,
    visit_options,
)
from tesseract_async.cli.running import asynchronous, importing_dashboard, say, until_told_to_leave
from tesseract_async.cli.types import PORT, seconds
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.monitoring import SwarmObserver


@click.command("dashboard")
@patterns_argument
@visit_options
@run_option
@click.option("--bind", default="127.0.0.1", help="Serve the page on this address.")
@click.option("--bind-port", default=8787, type=PORT, help="Serve the page on this port.")
@click.option(
    "--token", help="Show the page only to visitors who know this token; off loopback, one is made up if none is given."
)
@click.option("--period", default=2.0, type=seconds(0.1, 86400), help="Look at the swarm this often.")
@leave_with_parent_option
@asynchronous
async def command(
    *,
    patterns: tuple[ExpertPattern, ...],
    visit: Visit,
    run_name: str | None,
    bind: str,
    bind_port: int,
    token: str | None,
    period: float,
) -> int:
    """Serve a web page that shows the swarm: experts on their grids, servers, throughput, and recent events.

    PATTERNS name the grids to show, such as 'ffn.[0:16].[0:16]'; without any, the page shows what nearby servers host.
    On any address but loopback the page asks for a token. Metrics for Prometheus are under /metrics.
    """
    with importing_dashboard("the dashboard"):
        from tesseract_async.monitoring.dashboard import Dashboard
    async with visit.node(refresh_period=period) as node:
        grid = await enter(node, run_name)
        async with (
            SwarmObserver(node, patterns=list(patterns) or grid, period=period) as observer,
            Dashboard(observer, host=bind, port=bind_port, token=token) as page,
        ):
            click.echo(f"The dashboard is at {page.url}", err=True)
            await until_told_to_leave(tell_ready=lambda: say("ready", url=page.url))
    return 0
