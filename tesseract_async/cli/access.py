"""Options about who may ask what of a node, and how much."""

import os
from typing import Final

import click
from click.core import ParameterSource

from tesseract_async.admission import Policy, Quota
from tesseract_async.cli.options import grouped, several_option, with_options
from tesseract_async.cli.types import PEER_FILE, PEERS, SECONDS, SIZE, counted
from tesseract_async.identity import PeerID

LISTS: Final = ("allow", "allow_file", "allow_training")


def make_policy(
    *,
    allow: tuple[frozenset[PeerID], ...],
    allow_file: frozenset[PeerID] | None,
    allow_training: tuple[frozenset[PeerID], ...] = (),
    peer_calls: int | None,
    peer_bytes: int | None,
    peer_concurrent: int | None,
    peer_period: float,
) -> Policy | None:
    """Return the policy that the lists and quotas make; None if there are none: everybody may do everything.

    A list that was given but names nobody is refused, wherever it came from: it would let everybody in.

    Raises: click.UsageError; ValueError.
    """
    _refuse_empty_lists()
    members = frozenset().union(*allow, allow_file or ()) if allow or allow_file is not None else None
    trainers = frozenset().union(*allow_training) if allow_training else None
    if members is not None and trainers is not None and not trainers <= members:
        names = ", ".join(sorted(peer_id.short for peer_id in trainers - members))
        raise click.UsageError(f"--allow-training names peers that --allow leaves out: {names}. Give them to both")
    quota = None
    if any(limit is not None for limit in (peer_calls, peer_bytes, peer_concurrent)):
        quota = Quota(calls=peer_calls, num_bytes=peer_bytes, concurrent=peer_concurrent, period=peer_period)
    if members is None and trainers is None and quota is None:
        return None
    return Policy(callers=members, hosts=members, trainers=members if trainers is None else trainers, quota=quota)


access_options = grouped(
    "policy",
    make_policy,
    "Limits",
    several_option(
        "--allow", type=PEERS, metavar="PEER_ID", help="Let only this peer call, train and store here, not everybody."
    ),
    click.option(
        "--allow-file",
        type=PEER_FILE,
        help="Let only the peers in this file call, train and store here, one id a line.",
    ),
    click.option(
        "--peer-calls", type=click.IntRange(1), help="Answer at most this many calls of each peer in --peer-period."
    ),
    click.option(
        "--peer-bytes", type=SIZE, help="Exchange at most this much with each peer in --peer-period, such as '1 GiB'."
    ),
    click.option(
        "--peer-concurrent", type=click.IntRange(1), help="Work on at most this many calls of each peer at once."
    ),
    click.option(
        "--peer-period", type=SECONDS, default=60.0, help="Count --peer-calls and --peer-bytes over this time."
    ),
)
"""For commands that answer strangers: a policy, or None, as the argument `policy`."""

training_option = with_options(
    "Limits",
    several_option(
        "--allow-training",
        type=PEERS,
        metavar="PEER_ID",
        help="Let only this peer change weights here; others may still ask for forward passes.",
    ),
)


def describe_policy(policy: Policy) -> list[str]:
    """Return one line for each thing that is not open to all, for the person who starts the node."""
    lines = []
    if policy.callers is not None:
        lines.append(f"only {counted(len(policy.callers), 'peer')} may call, train and store here")
    if policy.trainers is not None and policy.trainers != policy.callers:
        lines.append(f"only {counted(len(policy.trainers), 'peer')} may change weights here")
    if policy.quota is not None:
        lines.append("what each peer may ask for is limited")
    return lines


def _refuse_empty_lists() -> None:
    """Refuse lists without a member: to click, a variable that is set to nothing is not set at all."""
    context = click.get_current_context()
    for option in context.command.params:
        if option.name not in LISTS:
            continue
        if isinstance(option.envvar, str) and os.environ.get(option.envvar) == "":
            raise click.UsageError(f"{option.envvar} lists nobody; unset it to let everybody in")
        source = context.get_parameter_source(option.name)
        if context.params[option.name] == () and source not in (None, ParameterSource.DEFAULT):
            raise click.UsageError(f"{option.opts[0]} lists nobody; leave it out to let everybody in")
