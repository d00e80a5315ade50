"""`tesseract run`: what the owner of a training run does: starts it, lets others in and out, looks after it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tesseract_async.cli.options import LOG_OPTIONS, host_towards, join, peers
from tesseract_async.cli.running import run, say, set_up_logging
from tesseract_async.cli.start_run import create
from tesseract_async.cli.units import Number, counted

if TYPE_CHECKING:
    from tesseract_async.experts.authority import Authority
    from tesseract_async.experts.grants import Grant
    from tesseract_async.experts.run_directory import RunKeeper
    from tesseract_async.identity import Identity, PeerID
    from tesseract_async.node import TesseractNode

Command = TypeVar("Command", bound=Callable[..., Any])

ROLES = ("host", "train", "share")
DAY = 86400


@click.group("run")
def command() -> None:
    """Start a training run, and say who takes part in it: as its owner, or as a delegate of the owner's."""


command.add_command(create)


def _owner_options(wrapped: Command) -> Command:
    """Whose word it is, and in which swarm it is said."""
    options = [
        click.argument("name", metavar="NAME[@PEER_ID]"),
        click.option(
            "--identity",
            required=True,
            type=click.Path(dir_okay=False, exists=True, path_type=Path),
            help="The key of the run's owner, or of a delegate.",
        ),
        click.option(
            "--initial-peers",
            "-p",
            multiple=True,
            required=True,
            metavar="HOST:PORT[/PEER_ID]",
            help="A node of the swarm; may be given several times, or as one list with commas.",
        ),
        click.option(
            "--join-as",
            type=click.Path(dir_okay=False),
            help="The key of a member to join the swarm as, where it is closed by a list; else it is nobody's.",
        ),
        *LOG_OPTIONS,
    ]
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


@contextlib.asynccontextmanager
async def _opened(
    values: dict[str, Any], *, signs: bool = True
) -> AsyncIterator[tuple[TesseractNode, Identity, RunKeeper, Authority]]:
    """A node in the swarm, the identity, and the run as the network and this computer know it.

    Raises: click.ClickException if the identity is to sign (`signs`) and has no say there.
    """
    from tesseract_async.experts.run import split_run_name
    from tesseract_async.experts.run_directory import enter_run
    from tesseract_async.identity import Identity
    from tesseract_async.node import TesseractNode

    split_run_name(values["name"])  # a malformed one is said so at once
    identity = Identity.load(values["identity"])
    seeds = peers(values["initial_peers"])
    # not as the owner, whose own node may be running
    async with TesseractNode(host_towards(seeds), initial_peers=seeds, identity=values["join_as"]) as node:
        await join(node)
        keeper = await enter_run(
            node.network, node.trust, values["name"], identity=identity, identity_file=values["identity"]
        )
        authority = keeper.authority
        assert authority is not None
        if signs and not authority.rules(identity.peer_id):
            raise click.ClickException(
                f"{identity.peer_id} has no say in {authority.run.full_name}: only its owner and the delegates have"
            )
        yield node, identity, keeper, authority


def _peer_ids(texts: tuple[str, ...]) -> list[PeerID]:
    from tesseract_async.identity import PeerID

    try:
        return [PeerID.parse(text) for text in texts]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@command.command("grant")
@_owner_options
@click.argument("members", nargs=-1, metavar="PEER_ID...")
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice(ROLES),
    default=ROLES,
    show_default=True,
    help="What they may do.",
)
@click.option("--experts", "pattern", help="The uids for which it holds, such as 'ffn.[0:4].[0:16]'; else all.")
@click.option("--days", default=90.0, show_default=True, type=Number(0.01, 36500), help="How long it is good for.")
@click.option("--invite", is_flag=True, help="Make an invite: whoever has its text may take part, until it is revoked.")
@click.option("--renew", is_flag=True, help="Sign anew what ends within 60 days, for those who take part already.")
def grant(members: tuple[str, ...], **values: Any) -> None:
    """Let peers take part: sign a grant for each PEER_ID, or one invite for many.

    A peer id is what `tesseract keygen FILE` prints. Each grant is printed in one line, for the peer's --grant; it also
    waits in the network for a day, where the peer finds it by itself.
    """
    set_up_logging(verbose=values["verbose"])
    if bool(members) + values["invite"] + values["renew"] != 1:
        raise click.UsageError("say whom to let in: PEER_IDs, or --invite, or --renew")

    async def main() -> int:
        from tesseract_async.experts.grants import grant_text, sign_grant
        from tesseract_async.experts.pattern import ExpertPattern
        from tesseract_async.experts.run_directory import publish_grant
        from tesseract_async.identity import Identity

        whom = _peer_ids(members)
        pattern = None if values["pattern"] is None else ExpertPattern.parse(values["pattern"])
        async with _opened(values) as (node, identity, keeper, authority):
            if values["renew"]:
                renewed = await keeper.renew_grants()
                keeper.save()
                click.echo(f"{counted(len(renewed), 'grant')} renewed", err=True)
                return 0
            via = authority.delegates.get(identity.peer_id)
            if values["invite"] and via is not None:
                raise click.ClickException("only the run's owner makes invites: a delegate grants one by one")
            invite = Identity.generate() if values["invite"] else None
            now = time.time()
            last = int(now + values["days"] * DAY)
            for peer_id in whom if invite is None else [invite.peer_id]:
                signed = sign_grant(
                    *(identity, authority.run_id, peer_id, [*values["roles"], *(["admit"] if invite else [])]),
                    serial=authority.next_serial(peer_id, now),
                    not_after=last if via is None else min(last, via.not_after),
                    pattern=pattern,
                    via=via,
                )
                authority.learn_grant(signed.blob)
                if invite is None:
                    await publish_grant(node.network, signed)
                click.echo(f"{'the invite' if invite else 'a grant'} of {peer_id}, {_said(signed, now)}", err=True)
                click.echo(grant_text(signed, invite=invite))
            keeper.save()
        return 0

    run(main)


@command.command("revoke")
@_owner_options
@click.argument("members", nargs=-1, metavar="PEER_ID...")
@click.option(
    "--invite", "invites", multiple=True, metavar="PEER_ID", help="An invite: whoever came by it is out, too."
)
def revoke(members: tuple[str, ...], invites: tuple[str, ...], **values: Any) -> None:
    """Take PEER_IDs' grants away. Members learn of it within half a minute, where the network reaches them."""
    set_up_logging(verbose=values["verbose"])
    if not members and not invites:
        raise click.UsageError("say whom to revoke: PEER_IDs, or --invite PEER_ID")

    async def main() -> int:
        from tesseract_async.experts.grants import sign_revocations

        whom, which = _peer_ids(members), _peer_ids(invites)
        async with _opened(values) as (_, identity, keeper, authority):
            safe = {authority.owner} if identity.peer_id == authority.owner else {authority.owner, *authority.delegates}
            if kept := safe & set(whom):
                raise click.ClickException(
                    f"{kept.pop()} stays: nobody revokes the owner, and only the owner revokes delegates"
                )
            if authority.delegates.keys() & set(whom):
                click.echo("with a delegate goes whom it let in, and what it revoked counts no longer", err=True)
            since = max(authority.next_serial(peer_id, time.time()) for peer_id in [*whom, *which])
            for part in sign_revocations(
                *(identity, authority.run_id),
                number=authority.next_number(identity.peer_id),
                since=since,
                peers=whom,
                invites=which,
            ):
                authority.learn_revocations(part)
            await keeper.learn_once()  # which spreads what is known
        say("revoked", run=authority.run.full_name, peers=list(map(str, whom)), invites=list(map(str, which)))
        return 0

    run(main)


@command.command("appoint")
@_owner_options
@click.argument("experts", metavar="PATTERN")
@click.argument("member", metavar="PEER_ID|free")
@click.option("--seal", help="The digest, 64 hexadecimal digits, of the sealed state to go on from; else the latest.")
def appoint(experts: str, member: str, seal: str | None, **values: Any) -> None:
    """Say who leads the experts of PATTERN, such as 'ffn.[0:4].7'.

    That is a peer that may host them, or (free) again whom their servers agree on. It outranks what they settled among
    themselves.
    """
    set_up_logging(verbose=values["verbose"])

    async def main() -> int:
        from tesseract_async.experts.grants import sign_appointment
        from tesseract_async.experts.pattern import ExpertPattern

        (peer_id,) = [None] if member == "free" else _peer_ids((member,))
        pattern = ExpertPattern.parse(experts)
        async with _opened(values) as (_, identity, keeper, authority):
            serial = max([int(time.time()), *(one.serial + 1 for one in authority.appointments())])
            root = None if seal is None else bytes.fromhex(seal)
            signed = sign_appointment(identity, authority.run_id, pattern, serial=serial, peer=peer_id, seal=root)
            if not authority.learn_appointment(signed) or authority.appointment(next(iter(pattern))) != signed:
                raise click.ClickException(f"{pattern} is more than this identity may appoint for")
            if peer_id is not None and not authority.may(peer_id, "host", next(iter(pattern)), now=time.time()):
                click.echo(f"{member} may not host them yet: it leads once it has a grant", err=True)
            await keeper.learn_once()
        say("appointed", run=authority.run.full_name, experts=str(pattern), peer=member, serial=serial)
        return 0

    run(main)


@command.command("status")
@_owner_options
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def status(as_json: bool, **values: Any) -> None:
    """Show who takes part in the run.

    That is: grants and when they end, delegates, who was revoked, appointments, and how many experts are alive.
    """
    set_up_logging(verbose=values["verbose"])

    async def main() -> int:
        from tesseract_async.cli.export import live_replicas

        now = time.time()
        async with _opened(values, signs=False) as (node, _, keeper, authority):
            live = await live_replicas(node, authority.run.manifest)  # whose manifests show grants
            keeper.save()
        hosts: dict[str, int] = {}
        for replicas in live.values():
            for replica in replicas:
                hosts[str(replica.peer.peer_id)] = hosts.get(str(replica.peer.peer_id), 0) + 1
        members = sorted(authority.grants(), key=lambda one: one.not_after)
        if as_json:
            say(
                "status",
                run=authority.run.full_name,
                mode=authority.mode,
                live=len(live),
                hosts=hosts,
                members=[_facts(one) for one in members],
                delegates=list(map(str, authority.delegates)),
                revoked=list(map(str, authority.revoked())),
                appointments=[[str(one.pattern), str(one.peer or "free")] for one in authority.appointments()],
            )
            return 0
        size = len(authority.run.manifest.pattern)
        click.echo(f"{authority.run.full_name}, {authority.mode}: {len(live)} of {counted(size, 'expert')} live")
        for one in members:
            hosted = f", hosts {counted(hosts[str(one.peer)], 'expert')}" if str(one.peer) in hosts else ""
            kind = "delegate " if one.peer in authority.delegates else "invite " if "admit" in one.role_names else ""
            click.echo(f"{kind}{one.peer}: {_said(one, now)}{hosted}")
        for peer_id in authority.revoked():
            click.echo(f"{peer_id}: revoked")
        for appointment in authority.appointments():
            click.echo(f"{appointment.pattern}: led by {appointment.peer or 'whom its servers agree on'}")
        return 0

    run(main)


@command.command("backup-key")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--identity", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The key of the run's owner."
)
@click.option("--restore", is_flag=True, help="The other way: make the --identity file from the backup in FILE.")
@click.password_option("--passphrase", confirmation_prompt=True, help="Encrypts the backup; asked for if not given.")
def backup_key(file: Path, identity: Path, restore: bool, passphrase: str) -> None:
    """Copy the owner's key to FILE, encrypted with a passphrase.

    Whoever loses the key loses the run. OpenSSL reads the copy, too: openssl pkey -in FILE.
    """
    from tesseract_async.identity import Identity

    secret = passphrase.encode()
    try:
        if restore:
            found = Identity.from_pem(file.read_bytes(), passphrase=secret)
            found.save(identity)
        else:
            found = Identity.load(identity)
            found.save(file, passphrase=secret)
    except FileExistsError as error:
        raise click.ClickException(f"{error.filename} exists: it is not overwritten") from None
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise click.ClickException(f"{file if restore else identity} holds no Ed25519 key that this opens") from None
    click.echo(str(found.peer_id))


def _facts(one: Grant) -> dict[str, Any]:
    pattern = None if one.pattern is None else str(one.pattern)
    return {"peer": str(one.peer), "roles": one.role_names, "experts": pattern, "not_after": one.not_after}


def _said(one: Grant, now: float) -> str:
    roles = ", ".join(role for role in one.role_names if role != "admit")
    where = "" if one.pattern is None else f" {one.pattern}"
    days = (one.not_after - now) / DAY
    return f"may {roles}{where}; {f'for {days:.0f} more days' if days > 0 else 'expired'}"
