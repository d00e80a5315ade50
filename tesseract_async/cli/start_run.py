"""`tesseract run`: signs the manifest of a training run and keeps it known."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from tesseract_async.cli.config_file import config_option
from tesseract_async.cli.options import find_code_here, join, node_options, outside_help, peers
from tesseract_async.cli.running import run, say, set_up_logging, until_told_to_leave
from tesseract_async.cli.units import LEARNING_RATE, MANY, counted
from tesseract_async.cli.waiting import sign

JOIN_TIMEOUT = 10.0


Command = TypeVar("Command", bound=Callable[..., Any])


def _options_option(name: str, help_text: str) -> Callable[[Command], Command]:
    return click.option(f"--{name}", name.replace("-", "_"), multiple=True, metavar="NAME=VALUE", help=help_text)


@click.command("run")
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
@click.option("--once", is_flag=True, help="Store the manifest and end; it must find servers within the hour.")
@node_options
@config_option
def command(name: str, **values: Any) -> None:
    """Start a training run: sign what it consists of, so that volunteers join by its name alone.

    Prints the run's full name, NAME@PEER_ID, in one line of JSON. Then stays and keeps the manifest known until Ctrl-C;
    as soon as servers take part, they keep it known themselves. --identity is the run's author: keep that file.
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
    identity = Path(values["identity"]).expanduser()
    if ":" in values["expert_class"]:
        find_code_here()

    async def main() -> int:
        from tesseract_async.experts.run import RunManifest, sign_run
        from tesseract_async.experts.run_directory import RunKeeper, publish_run
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
            signed = sign_run(node.identity, manifest)
            if values["once"]:
                await join(node)  # nobody else would keep the manifest
            with sign("joining the network"):
                await node.network.wait_joined(JOIN_TIMEOUT)
                holders = await publish_run(node.network, signed)
            address = str(node.peer_address)
            click.echo(f"the run is {signed.full_name}, known to {counted(holders, 'node')}", err=True)
            say("run", run=signed.full_name, address=address, holders=holders, manifest=manifest.fields())
            if values["once"]:
                return 0 if holders else 1
            keeper = RunKeeper(node.network, signed)
            keeper.start()
            try:
                await until_told_to_leave(watch_stdin=values["leave_with_parent"])
            finally:
                await keeper.aclose()
        return 0

    run(main)


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
