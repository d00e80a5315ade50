"""Options that say who may use a node, for what, and how much."""

import os
from dataclasses import dataclass
from typing import Annotated, Final

import click
from click.core import ParameterSource

from tesseract_async.admission import Policy, Quota
from tesseract_async.cli.flags import NO_FLAG, Flag, grouped
from tesseract_async.cli.types import PEER_FILE, PEERS, SECONDS, SIZE, counted
from tesseract_async.identity import PeerID

LISTS: Final = ("allow", "allow_file", "allow_training")


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessOptions:
    """The peers that may ask, and how much each of them may ask for."""

    allow: Annotated[tuple[frozenset[PeerID], ...], PEERS, Flag(metavar="PEER_ID")] = ()
    """Let only this peer call, train and store here, not everybody."""
    allow_file: Annotated[frozenset[PeerID] | None, PEER_FILE] = None
    """Let only the peers in this file call, train and store here, one id a line."""
    peer_calls: Annotated[int | None, click.IntRange(1)] = None
    """Answer at most this many calls of each peer in --peer-period."""
    peer_bytes: Annotated[int | None, SIZE] = None
    """Send and receive at most this much with each peer in --peer-period, such as '1 GiB'."""
    peer_concurrent: Annotated[int | None, click.IntRange(1)] = None
    """Work on at most this many calls of each peer at once."""
    peer_period: Annotated[float, SECONDS] = 60.0
    """Count --peer-calls and --peer-bytes over this time."""
    allow_training: Annotated[tuple[frozenset[PeerID], ...], NO_FLAG] = ()

    def policy(self) -> Policy | None:
        """Return the policy that the lists and quotas make; None if there are none: everybody may do everything.

        A list that was given but names nobody is refused, wherever it came from: it would let everybody in.

        Raises: click.UsageError; ValueError.
        """
        _refuse_empty_lists()
        members = (
            frozenset().union(*self.allow, self.allow_file or ()) if self.allow or self.allow_file is not None else None
        )
        trainers = frozenset().union(*self.allow_training) if self.allow_training else None
        if members is not None and trainers is not None and not trainers <= members:
            names = ", ".join(sorted(peer_id.short for peer_id in trainers - members))
            raise click.UsageError(f"--allow-training names peers that --allow leaves out: {names}. Give them to both")
        quota = None
        if any(limit is not None for limit in (self.peer_calls, self.peer_bytes, self.peer_concurrent)):
            quota = Quota(
                calls=self.peer_calls,
                num_bytes=self.peer_bytes,
                concurrent=self.peer_concurrent,
                period=self.peer_period,
            )
        if members is None and trainers is None and quota is None:
            return None
        return Policy(callers=members, hosts=members, trainers=members if trainers is None else trainers, quota=quota)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAccessOptions(AccessOptions):
    """The same for a node that hosts experts, and who may train them."""

    allow_training: Annotated[tuple[frozenset[PeerID], ...], PEERS, Flag(metavar="PEER_ID")] = ()
    """Let only this peer change weights here; others may still ask for forward passes."""


access_options = grouped("policy", AccessOptions, made=AccessOptions.policy, sections={"allow": "Limits"})
"""Options of commands that answer strangers: a policy, or None, as the argument `policy`."""
server_access_options = grouped("policy", ServerAccessOptions, made=AccessOptions.policy, sections={"allow": "Limits"})
"""Options of commands that host experts: a policy, or None, as the argument `policy`."""


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
