"""`tesseract run create`: signs the manifest of a training run and keeps it known."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tesseract_async.cli.config_file import config_option
from tesseract_async.cli.options import find_code_here, join, node_options, outside_help, peers
from tesseract_async.cli.running import run, say, set_up_logging, until_told_to_leave
from tesseract_async.cli.units import LEARNING_RATE, MANY, Number, counted
from tesseract_async.cli.waiting import sign

if TYPE_CHECKING:
    from tesseract_async.experts import ExpertReplica
    from tesseract_async.experts.authority import Authority
    from tesseract_async.experts.run import RunManifest
    from tesseract_async.identity import Identity
    from tesseract_async.node import TesseractNode

JOIN_TIMEOUT = 10.0


Command = TypeVar("Command", bound=Callable[..., Any])


def _options_option(name: str, help_text: str) -> Callable[[Command], Command]:
    return click.option(f"--{name}", name.replace("-", "_"), multiple=True, metavar="NAME=VALUE", help=help_text)


@click.command("create")
@click.argument("name")
@click.option("--prefix", default="ffn", show_default=True, help="Of the experts' uids.")
@click.option("--grid", required=True, metavar="32x32", help="How many experts there are in each dimension.")
@click.option("--expert-class", default="ffn", show_default=True, help="Name of a ready-made class, or module:builder.")
@_options_option("size", "A size that the class takes, such as in_features=1024.")
@click.option(
    "--optimizer",
    default="adam",
    show_default=True,
    type=click.Choice(["adam", "adamw", "sgd", "none"]),
    help="For all.",
)
@click.option("--learning-rate", default=1e-3, show_default=True, type=LEARNING_RATE)
@_options_option("optimizer-option", "Another argument of the optimizer, such as weight_decay=0.01 or beta1=0.")
@click.option("--schedule", type=click.Choice(["linear", "cosine"]), help="Of the learning rate; constant without one.")
@_options_option("schedule-option", "Such as num_warmup_steps=100 or num_steps=10000.")
@click.option(
    "--max-batch-size", default=4096, show_default=True, type=click.IntRange(1, MANY), help="Rows computed at once."
)
@_options_option("training", "How steps are taken, such as clip_gradient_norm=1 or merge_backward=false.")
@_options_option("codec", "Of a direction: inputs, outputs or gradients, such as inputs=bf16.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Of the experts' first weights."
)
@click.option("--open", "is_open", is_flag=True, help="Everybody may host and train; else who has a grant of yours.")
@click.option(
    "--delegate", "delegates", multiple=True, metavar="PEER_ID", help="Who may grant, revoke and appoint beside you."
)
@click.option("--replicas", default=3, show_default=True, type=click.IntRange(1, 16), help="Servers of each expert.")
@click.option("--lease", default=30.0, show_default=True, type=Number(1, 86400), help="Seconds until another leads.")
@click.option("--sync-every", default=30.0, show_default=True, type=Number(1, 86400), help="Seconds between copies.")
@click.option(
    "--adopt",
    is_flag=True,
    help="Take over the experts that servers host under the bare prefix now: each gets a grant, and stays who leads.",
)
@click.option("--once", is_flag=True, help="Store the manifest and end; it must find servers within the hour.")
@node_options
@config_option
def create(name: str, **values: Any) -> None:
    """Start a training run: sign what all of it consists of.

    Volunteers then join by its name alone. Prints the run's full name, NAME@PEER_ID, in one line of JSON. Then stays
    until Ctrl-C, keeps the manifest known and renews grants before they end; as soon as servers take part, they keep it
    known themselves. --identity is the run's owner: keep that file, and a copy (tesseract run backup-key). Who takes
    part is said by tesseract run grant.
    """
    set_up_logging(verbose=values["verbose"])
    if values["identity"] is None:
        raise click.UsageError("say --identity FILE: the run belongs to whoever has that key")
    if values["once"] and not values["initial_peers"]:
        raise click.UsageError("--once needs --initial-peers: with this node, the manifest would end at once")
    grid = _grid(values["grid"])
    options = {
        key: parse_options(values[key], f"--{key.replace('_', '-')}")
        for key in ("size", "optimizer_option", "schedule_option", "training", "codec")
    }
    if values["adopt"] and not values["initial_peers"]:
        raise click.UsageError("--adopt needs --initial-peers: where are the servers?")
    identity = Path(values["identity"]).expanduser()
    if ":" in values["expert_class"]:
        find_code_here()

    async def main() -> int:
        from tesseract_async.experts.run import RunManifest, sign_run
        from tesseract_async.experts.run_directory import publish_run
        from tesseract_async.node import TesseractNode
        from tesseract_async.server.run_experts import complete

        manifest = RunManifest(
            name=name,
            prefix=values["prefix"],
            grid_size=grid,
            expert=values["expert_class"],
            sizes=options["size"],
            optimizer=None if values["optimizer"] == "none" else values["optimizer"],
            optimizer_options={"learning_rate": values["learning_rate"]} | options["optimizer_option"],
            schedule=values["schedule"],
            schedule_options=options["schedule_option"],
            training={"max_batch_size": values["max_batch_size"]} | options["training"],
            codecs={key: "none" if value is None else value for key, value in options["codec"].items()},
            seed=values["seed"],
            created=int(time.time() * 1000),
            mode="open" if values["is_open"] else "granted",
            num_replicas=values["replicas"],
            lease=values["lease"],
            sync_every=values["sync_every"],
        )
        # the author's own code may run here
        manifest = complete(manifest, allowed_modules=[manifest.expert.partition(":")[0]])
        node = TesseractNode(
            values["host"],
            values["port"],
            initial_peers=peers(values["initial_peers"]),
            announce=values["announce"],
            public=values["public"],
            **outside_help(values),
            identity=identity,
        )
        async with node:
            signed = sign_run(node.identity, _with_delegates(manifest, node.identity, values["delegates"]))
            if values["once"]:
                await join(node)  # nobody else would keep the manifest
            with sign("joining the network"):
                await node.network.wait_joined(JOIN_TIMEOUT)
                hosting = await _bare_replicas(node, manifest) if values["adopt"] else {}
                holders = await publish_run(node.network, signed)
                authority = await node.join_run(signed)
            adopted = await _adopt(node, authority, hosting)
            address = str(node.peer_address)
            click.echo(f"the run is {signed.full_name}, known to {counted(holders, 'node')}", err=True)
            fields = manifest.fields() | {"delegates": values["delegates"]}
            say("run", run=signed.full_name, address=address, holders=holders, manifest=fields, adopted=adopted)
            if values["once"]:
                return 0 if holders else 1
            await until_told_to_leave(watch_stdin=values["leave_with_parent"])
        return 0

    run(main)


def _with_delegates(manifest: RunManifest, identity: Identity, delegates: tuple[str, ...]) -> RunManifest:
    """The manifest that names them, each with the grant by which it may grant."""
    from tesseract_async.experts.grants import GRANT_SECONDS, sign_grant
    from tesseract_async.experts.manifest import RunTag
    from tesseract_async.identity import PeerID

    run_id = RunTag(identity.peer_id, manifest.name, manifest.mode).run_id(manifest.prefix)
    now = int(time.time())
    grants = [
        sign_grant(
            *(identity, run_id, PeerID.parse(text), ("host", "train", "share", "admit")),
            serial=now,
            # as long as the manifest stands, which is signed anew to be rid of one
            not_after=now + 40 * GRANT_SECONDS,
        )
        for text in delegates
    ]
    return dataclasses.replace(manifest, delegates=[one.blob for one in grants])


async def _bare_replicas(node: TesseractNode, manifest: RunManifest) -> dict[str, list[ExpertReplica]]:
    """uid -> its servers under the bare prefix, the primary first."""
    from tesseract_async.cli.export import live_replicas

    found = await live_replicas(node, manifest)
    if not found:
        raise click.ClickException(f"no server hosts experts of the bare prefix {manifest.prefix!r} now")
    return found


async def _adopt(node: TesseractNode, authority: Authority, hosting: dict[str, list[ExpertReplica]]) -> list[str]:
    """Grants each of these servers its part in the run, and appoints who leads where there are several. Returns their
    peer ids."""
    from tesseract_async.experts.grants import GRANT_SECONDS, sign_appointment, sign_grant
    from tesseract_async.experts.pattern import ExpertPattern
    from tesseract_async.experts.run_directory import publish_grant, publish_record

    now = int(time.time())
    servers = {one.peer.peer_id for replicas in hosting.values() for one in replicas if one.peer.peer_id is not None}
    for peer_id in servers:
        grant = sign_grant(
            *(node.identity, authority.run_id, peer_id, ("host", "train", "share")),
            serial=now,
            not_after=now + GRANT_SECONDS,
        )
        authority.learn_grant(grant.blob)
        await publish_grant(node.network, grant)
    for uid, replicas in hosting.items():
        if len(replicas) > 1:
            first = replicas[0].peer.peer_id
            pattern = ExpertPattern.parse(uid)
            authority.learn_appointment(
                sign_appointment(node.identity, authority.run_id, pattern, serial=now, peer=first)
            )
    for record in authority.records():
        await publish_record(node.network, authority, record)
    for peer_id in servers:
        click.echo(f"{peer_id} may go on: start it again with --run {authority.run.full_name}", err=True)
    return sorted(map(str, servers))


def parse_options(values: tuple[str, ...], flag: str) -> dict[str, Any]:
    """``NAME=VALUE`` pairs: numbers, true, false, none, else text. Raises: click.BadParameter."""
    found: dict[str, Any] = {}
    for value in values:
        name, separator, text = value.partition("=")
        if not separator or not name.isidentifier():
            raise click.BadParameter(f"{value!r} is not like name=value", param_hint=flag)
        found[name] = _value(text)
    return found


def _value(text: str) -> str | int | float | bool | None:
    words: dict[str, bool | None] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _grid(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8}){0,7}", text):
        raise click.BadParameter(f"{text!r} is not like 32x32", param_hint="--grid")
    return tuple(map(int, text.split("x")))
