"""Who may ask what of a node, and how much, as options of a command."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.core import ParameterSource

from tesseract_async.cli.units import SECONDS, SIZE

if TYPE_CHECKING:
    from tesseract_async.admission import Policy
    from tesseract_async.identity import PeerID

Command = TypeVar("Command", bound=Callable[..., Any])

OPTIONS = {
    "allow": click.option(
        "--allow",
        multiple=True,
        metavar="PEER_ID",
        help="Only this peer may call, train and store here; may be given several times. Without one, everybody may.",
    ),
    "allow_file": click.option(
        "--allow-file",
        type=click.Path(path_type=Path),
        help="The same for every peer id of this file, one a line; # begins a remark.",
    ),
    "peer_calls": click.option(
        "--peer-calls", type=click.IntRange(1), help="Calls that one peer may make in --peer-period."
    ),
    "peer_bytes": click.option(
        "--peer-bytes", type=SIZE, help="Bytes, such as '1 GiB', that one peer may send and be sent in --peer-period."
    ),
    "peer_concurrent": click.option(
        "--peer-concurrent", type=click.IntRange(1), help="Calls that one peer may have under way at once."
    ),
    "peer_period": click.option(
        "--peer-period", type=SECONDS, default=60.0, show_default=True, help="Of --peer-calls and --peer-bytes."
    ),
}
TRAINING: Final = click.option(
    "--allow-training",
    multiple=True,
    metavar="PEER_ID",
    help="Only this peer may change weights; may be given several times. Others that may call may still ask forwards.",
)

LISTS: Final = ("allow", "allow_file", "allow_training")


def access_options(command: Command) -> Command:
    """Adds the lists and quotas as flags; `policy_of` makes the policy of their values."""
    for option in reversed(OPTIONS.values()):
        command = option(command)
    return command


def policy_of(values: dict[str, Any]) -> Policy | None:
    """Takes the lists and quotas out of a command's `values`; None if there are none: everybody may do everything.

    A list that was given but names nobody is refused, wherever it came from: it would let everybody in.

    Raises: click.UsageError.
    """
    from tesseract_async.admission import Policy, Quota

    _refuse_empty_variables()
    found = {name: values.pop(name) for name in (*OPTIONS, "allow_training") if name in values}
    members = _listed("allow", found["allow"])
    if found["allow_file"] is not None:
        members = (members or frozenset()) | read_list(found["allow_file"])
    trainers = _listed("allow_training", found.get("allow_training", ()))
    if members is not None and trainers is not None and not trainers <= members:
        names = ", ".join(sorted(peer_id.short for peer_id in trainers - members))
        raise click.UsageError(f"--allow-training names peers that --allow leaves out: {names}. Give them to both")
    limits = {"calls": found["peer_calls"], "num_bytes": found["peer_bytes"], "concurrent": found["peer_concurrent"]}
    quota = None
    try:
        if any(limit is not None for limit in limits.values()):
            quota = Quota(**limits, period=found["peer_period"])
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if members is None and trainers is None and quota is None:
        return None
    return Policy(callers=members, storers=members, trainers=members if trainers is None else trainers, quota=quota)


def describe_policy(policy: Policy) -> list[str]:
    """One line for each thing that is not open to all, for the person who starts the node."""
    lines = []
    if policy.callers is not None:
        lines.append(f"only {_peers(len(policy.callers))} may call, train and store here")
    if policy.trainers is not None and policy.trainers != policy.callers:
        lines.append(f"only {_peers(len(policy.trainers))} may change weights here")
    if policy.quota is not None:
        lines.append("what each peer may ask for is limited")
    return lines


def _peers(count: int) -> str:
    return "one peer" if count == 1 else f"{count} peers"


def _refuse_empty_variables() -> None:
    """To click, an environment variable that is set to nothing is not set: a list that was forgotten would open all."""
    for option in click.get_current_context().command.params:
        variable = option.envvar
        if option.name in LISTS and isinstance(variable, str) and os.environ.get(variable) == "":
            raise click.UsageError(f"{variable} lists nobody; unset it to let everybody in")


def _listed(name: str, texts: tuple[str, ...]) -> frozenset[PeerID] | None:
    flag = f"--{name.replace('_', '-')}"
    if not texts:
        source = click.get_current_context().get_parameter_source(name)
        if source is not None and source is not ParameterSource.DEFAULT:
            raise click.UsageError(f"{flag} lists nobody; leave it out to let everybody in")
        return None
    return _parse((part.strip() for text in texts for part in str(text).split(",")), flag)


def read_list(path: Path) -> frozenset[PeerID]:
    """The peer ids of a file, one a line. Raises: click.BadParameter, click.UsageError where it names nobody."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise click.BadParameter(f"{path} cannot be read ({reason})", param_hint="--allow-file") from None
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return _parse((line for line in lines if line), f"--allow-file {path}")


def _parse(texts: Iterable[str], where: str) -> frozenset[PeerID]:
    from tesseract_async.identity import PeerID

    try:
        peers = frozenset(PeerID.parse(text) for text in texts)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=where) from None
    if not peers:
        raise click.UsageError(f"{where} lists nobody; leave it out to let everybody in")
    return peers
