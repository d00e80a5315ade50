"""`tesseract run`: what the owner of a training run does: starts it, lets others in and out, looks after it."""

import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click

from tesseract_async.cli.flags import NO_FLAG, Flag, chain, grouped, several_option
from tesseract_async.cli.options import host_towards, initial_peers_option, join, json_option, log_options
from tesseract_async.cli.running import asynchronous, say
from tesseract_async.cli.start_run import create
from tesseract_async.cli.swarm_picture import safety
from tesseract_async.cli.types import EXISTING_FILE, FILE, PATTERN, PEER, Number, Parsed, counted
from tesseract_async.experts.grants import Grant, Invite, Role, grant_text
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.ownership import MEMBER, RunOwner
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.places import Standing, Survey
from tesseract_async.experts.progress import NUM_HOURS
from tesseract_async.experts.run import split_run_name
from tesseract_async.experts.run_directory import RunKeeper, enter_run
from tesseract_async.identity import Identity, PeerID
from tesseract_async.monitoring.observer import HOURS_PER_LOOK, SwarmObserver
from tesseract_async.node import TesseractNode

DAY = 86400
FREE = "free"


def _digest(text: str) -> bytes:
    if len(text) != 64 or not all(one in "0123456789abcdef" for one in text.lower()):
        raise ValueError(f"not a digest (64 hexadecimal digits): {text!r}")
    return bytes.fromhex(text)


DIGEST = Parsed("digest", _digest)
PEER_OR_FREE = Parsed("peer", lambda text: text if text == FREE else PeerID.parse(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerOptions:
    """The run that a command is about, the owner who gives the command, and the swarm."""

    name: Annotated[str, NO_FLAG]
    identity: Annotated[Path, EXISTING_FILE]
    """Sign with this key file, of the owner or a delegate."""
    initial_peers: Annotated[tuple[str, ...], NO_FLAG]
    join_as: Annotated[Path | None, FILE] = None
    """Join with the key in this file, if only listed members may join."""

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[tuple[TesseractNode, RunKeeper]]:
        """Enter with a node in the swarm, and the run as the network and this computer know it."""
        split_run_name(self.name)  # reports a malformed one before joining
        identity = Identity.load(self.identity)
        # not as the owner, whose own node may be running
        host = host_towards(self.initial_peers)
        async with TesseractNode(host, initial_peers=self.initial_peers, identity=self.join_as) as node:
            await join(node)
            yield (
                node,
                await enter_run(node.network, node.trust, self.name, identity=identity, identity_file=self.identity),
            )

    @contextlib.asynccontextmanager
    async def acting(self) -> AsyncIterator[RunOwner]:
        """Enter with what the identity may do. Raises: ValueError if it has no say in the run."""
        async with self.opened() as (node, keeper):
            yield RunOwner(node.network, Identity.load(self.identity), keeper)


_owner_name = click.argument("name", metavar="NAME[@PEER_ID]")
owner_options = chain(grouped("owner", OwnerOptions, _owner_name, initial_peers_option(required=True)), log_options)
"""Options of what the owner of a run or a delegate does: an `OwnerOptions` as the argument `owner`."""


@click.group("run")
def command() -> None:
    """Start a training run, and manage who takes part in it, as its owner or a delegate."""


command.add_command(create)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantOptions:
    """The roles that a grant gives, the experts, and the time."""

    roles: Annotated[tuple[Role, ...], click.Choice(MEMBER), Flag("--role")] = MEMBER
    """Let them host experts, train them, or share parameters."""
    pattern: Annotated[ExpertPattern | None, Flag("--experts", metavar="PATTERN")] = None
    """Let them host or train these experts only, such as 'ffn.[0:4].[0:16]'; sharing covers the whole model."""
    days: Annotated[float, Number(0.01, 36500)] = 90.0
    """Let the grant end after this many days."""
    invite: bool = False
    """Make an invite instead, whose text lets anybody take part until it is revoked."""
    renew: bool = False
    """Renew every grant that ends within 60 days, instead of making new ones."""


@command.command("grant")
@owner_options
@click.argument("members", nargs=-1, type=PEER, metavar="PEER_ID...")
@grouped("options", GrantOptions)
@asynchronous
async def grant(*, members: tuple[PeerID, ...], options: GrantOptions, owner: OwnerOptions) -> int:
    """Let peers take part: sign a grant for each PEER_ID, or one invite for many.

    A peer id is what `tesseract keygen FILE` prints. Each grant is printed in one line, for the peer's --grant; it also
    waits in the network for a day, where the peer finds it by itself.
    """
    if bool(members) + options.invite + options.renew != 1:
        raise click.UsageError("say whom to let in: PEER_IDs, or --invite, or --renew")
    async with owner.acting() as acting:
        if options.renew:
            click.echo(f"{counted(len(await acting.renew()), 'grant')} renewed", err=True)
        elif options.invite:
            made, text = acting.invite(options.roles, seconds=options.days * DAY, pattern=options.pattern)
            click.echo(f"the invite of {made.peer}, {_said(made)}, for `tesseract join`", err=True)
            click.echo(Invite(acting.authority.run.full_name, owner.initial_peers, text).text())
        else:
            for made in await acting.grant(members, options.roles, seconds=options.days * DAY, pattern=options.pattern):
                click.echo(f"a grant of {made.peer}, {_said(made)}", err=True)
                click.echo(grant_text(made))
    return 0


@command.command("revoke")
@owner_options
@click.argument("members", nargs=-1, type=PEER, metavar="PEER_ID...")
@several_option(
    "--invite",
    "invites",
    type=PEER,
    metavar="PEER_ID",
    help="Revoke this invite, and with it everybody who came by it.",
)
@asynchronous
async def revoke(*, members: tuple[PeerID, ...], invites: tuple[PeerID, ...], owner: OwnerOptions) -> int:
    """Take the grants of PEER_IDs away.

    Members learn of it within half a minute, where the network reaches them.
    """
    if not members and not invites:
        raise click.UsageError("say whom to revoke: PEER_IDs, or --invite PEER_ID")
    async with owner.acting() as acting:
        if acting.authority.delegates.keys() & set(members):
            click.echo(
                "revoking a delegate removes the peers that it let in, and undoes its own revocations",
                err=True,
            )
        await acting.revoke(members, invites)
        run = acting.authority.run.full_name
    if members:
        click.echo(f"{counted(len(members), 'peer')} may no longer take part in {run}", err=True)
    if invites:
        said = f"{counted(len(invites), 'invite')} of {run} revoked: everybody who came by one may no longer take part"
        click.echo(said, err=True)
    say("revoked", run=run, peers=list(map(str, members)), invites=list(map(str, invites)))
    return 0


@command.command("appoint")
@owner_options
@click.argument("experts", type=PATTERN, metavar="PATTERN")
@click.argument("member", type=PEER_OR_FREE, metavar="PEER_ID|free")
@click.option(
    "--state",
    "root",
    type=DIGEST,
    metavar="ROOT",
    help="Go on from the state with this root, which PEER_ID keeps, instead of its latest.",
)
@asynchronous
async def appoint(*, experts: ExpertPattern, member: PeerID | str, root: bytes | None, owner: OwnerOptions) -> int:
    """Choose the server that trains the experts of PATTERN, such as 'ffn.[0:4].7'.

    PEER_ID, a peer that may host them, becomes their primary; `free` leaves the choice to their servers again. An
    appointment outranks what the servers settled among themselves. With --state, an expert goes back to an older state,
    or to one that a server has put aside; its log names the root.
    """
    if root is not None and (experts.num_uids != 1 or isinstance(member, str)):
        raise click.UsageError(
            "--state needs one expert instead of a pattern of several, and the PEER_ID that keeps this state"
        )
    primary = None if isinstance(member, str) else member
    async with owner.acting() as acting:
        signed = await acting.appoint(experts, primary, root=root)
        authority = acting.authority
        if primary is not None and not authority.may(primary, "host", next(iter(experts)), now=time.time()):
            click.echo(f"{member} may not host them yet: it becomes primary once it has a grant", err=True)
    who = "chosen by their servers" if primary is None else str(primary)
    click.echo(f"the primary of {experts} in {authority.run.full_name} is {who} from now on", err=True)
    say("appointed", run=authority.run.full_name, experts=str(experts), peer=str(member), serial=signed.serial)
    return 0


@command.command("status")
@owner_options
@json_option
@asynchronous
async def status(*, as_json: bool, owner: OwnerOptions) -> int:
    """Show who takes part in the run.

    It shows how many experts are alive and how safe they are, contributors of the last day, grants and when they end,
    delegates, revoked peers, and appointments.
    """
    async with owner.opened() as (node, keeper):
        authority = keeper.authority
        manifest = authority.run.manifest
        observer = SwarmObserver(node, patterns=[manifest.pattern])
        await observer.look()  # whose manifests show grants
        for _ in range(NUM_HOURS // HOURS_PER_LOOK):
            await observer.read_thanks()
        keeper.save()
    hosts = {str(peer_id): len(peer.uids) for peer_id, peer in observer.peers.items() if peer.uids}
    num_live = len(set().union(*(peer.uids for peer in observer.peers.values())))
    contributors = observer.contributors()
    members = sorted(authority.grants(), key=lambda one: one.not_after)
    survey = observer.surveys[manifest.prefix]
    standings = {uid: survey.standing(uid) for uid in sorted(survey.named, key=split_uid)}
    num_copies = manifest.num_replicas
    if as_json:
        say(
            "status",
            on_terminal=True,
            run=authority.run.full_name,
            mode=authority.tag.mode,
            live=num_live,
            experts={uid: _standing(one) for uid, one in standings.items()},
            hosts=hosts,
            contributors=contributors,
            members=[_facts(one) for one in members],
            delegates=list(map(str, authority.delegates)),
            revoked=list(map(str, authority.revoked())),
            appointments=[[str(one.pattern), str(one.peer or FREE)] for one in authority.appointments()],
        )
        return 0
    size = len(manifest.pattern)
    click.echo(f"{authority.run.full_name}, {authority.tag.mode}: {num_live} of {counted(size, 'expert')} live")
    for line in _safety(standings, survey, num_copies):
        click.echo(line)
    for line in thanks(contributors):
        click.echo(line)
    for one in members:
        hosted = f", hosts {counted(hosts[str(one.peer)], 'expert')}" if str(one.peer) in hosts else ""
        kind = "delegate " if one.peer in authority.delegates else "invite " if "admit" in one.role_names else ""
        click.echo(f"{kind}{one.peer}: {_said(one)}{hosted}")
    for peer_id in authority.revoked():
        click.echo(f"{peer_id}: revoked")
    for appointment in authority.appointments():
        click.echo(f"{appointment.pattern}: led by {appointment.peer or 'the choice of their servers'}")
    return 0


@command.command("backup-key")
@click.argument("file", type=FILE)
@click.option("--identity", required=True, type=FILE, help="Copy the key in this file, which owns the run.")
@click.option("--restore", is_flag=True, help="Make the --identity file from the backup in FILE instead.")
@click.password_option(
    "--passphrase", confirmation_prompt=True, help="Encrypt the backup with this passphrase; asked for if not given."
)
def backup_key(*, file: Path, identity: Path, restore: bool, passphrase: str) -> None:
    """Copy the owner's key to FILE, encrypted with a passphrase.

    If you lose the key, you lose the run. OpenSSL reads the copy, too: openssl pkey -in FILE.
    """
    secret = passphrase.encode()
    try:
        if restore:
            found = Identity.from_pem(file.read_bytes(), passphrase=secret)
            found.save(identity)
        else:
            found = Identity.load(identity)
            found.save(file, passphrase=secret)
    except FileExistsError as error:
        raise click.ClickException(f"{error.filename} exists, and is not overwritten") from None
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise click.ClickException(
            f"{file if restore else identity} holds no Ed25519 key, or the passphrase is wrong"
        ) from None
    click.echo(str(found.peer_id))


def _standing(one: Standing) -> dict[str, object]:
    return {
        "led_by": None if one.primary is None else str(one.primary),
        "followed_by": list(map(str, one.followers)),
        "held_by": list(map(str, one.holders)),
        "version": one.version,
        "losses": one.losses,
        "state": one.word,
    }


def _safety(standings: Mapping[str, Standing], survey: Survey, num_copies: int) -> list[str]:
    """Return sentences: how many more losses the run survives, and each expert that is in danger."""
    if not standings:
        return []
    losses = min(one.losses for one in standings.values())
    lines = [f"the run {safety(losses)}"]
    if why := survey.shortage(num_copies):
        lines.append(why)
    for uid, one in standings.items():
        if one.word != "safe":
            primary = "nobody" if one.primary is None else one.primary.short
            lines.append(f"{uid} is {one.word}: led by {primary}, version {one.version}")
    return lines


def thanks(contributors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each contributor of the last day, by what trainers have signed."""
    return [
        f"thanks to {one['name'] or one['short']}: {counted(one['rows'], 'row')} and {counted(one['steps'], 'step')} "
        f"in {counted(one['hours'], 'hour')} of the last day, by the word of {counted(one['trainers'], 'trainer')}"
        for one in contributors
    ]


def _facts(one: Grant) -> dict[str, object]:
    pattern = None if one.pattern is None else str(one.pattern)
    return {"peer": str(one.peer), "roles": one.role_names, "experts": pattern, "not_after": one.not_after}


def _said(one: Grant) -> str:
    roles = ", ".join(role for role in one.role_names if role != "admit")
    where = "" if one.pattern is None else f" {one.pattern}"
    days = (one.not_after - time.time()) / DAY
    return f"may {roles}{where}; {f'for {days:.0f} more days' if days > 0 else 'expired'}"
