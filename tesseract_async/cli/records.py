"""`tesseract get` and `tesseract put`: look at the network's records, and write some."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from tesseract_async.cli.options import join, joining_options, visiting_node
from tesseract_async.cli.running import run, set_up_logging
from tesseract_async.cli.units import Number, counted


@click.command("get")
@click.argument("key")
@joining_options
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per entry.")
def get(key: str, initial_peers: tuple[str, ...], identity: str | None, verbose: bool, as_json: bool) -> None:
    """Show every entry that the network holds under KEY: whose it is, until when it holds, and what it says.

    The servers of a grid are under experts/PREFIX. The exit status is 1 where nothing is held.
    """
    set_up_logging(verbose=verbose)

    async def main() -> int:
        async with visiting_node(initial_peers, identity) as node:
            await join(node)
            entries = await node.network.get_entries(key)
        for entry in entries:
            left = entry.expiration - time.time()
            shown = _readable(key, entry.value)
            if as_json:
                facts = {"subkey": entry.subkey, "owner": str(entry.owner), "sequence": entry.sequence}
                click.echo(json.dumps({**facts, "expires_in": round(left, 3), "value": shown}))
            else:
                subkey = "" if entry.subkey is None else f" [{entry.subkey}]"
                click.echo(f"{entry.owner.short}{subkey}, for {left:.0f} s: {json.dumps(shown, ensure_ascii=False)}")
        if not entries:
            click.echo(f"nothing is held under {key!r}", err=True)
        return 0 if entries else 1

    run(main)


@click.command("put")
@click.argument("key")
@click.argument("value")
@joining_options
@click.option("--subkey", help="One owner may hold several entries under a key, told apart by this.")
@click.option(
    "--ttl", default=300.0, show_default=True, type=Number(1, 86400 * 365), help="Seconds for which it holds."
)
def put(
    key: str,
    value: str,
    initial_peers: tuple[str, ...],
    identity: str | None,
    verbose: bool,
    subkey: str | None,
    ttl: float,
) -> None:
    """Store VALUE under KEY: JSON where it is JSON, else as text. It stays for `--ttl` seconds, unless renewed.

    The entry belongs to `--identity`: without one, nobody can change it later.
    """
    set_up_logging(verbose=verbose)

    async def main() -> int:
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        async with visiting_node(initial_peers, identity) as node:
            await join(node)
            holders = await node.network.store(key, parsed, ttl=ttl, subkey=subkey)
        click.echo(f"held by {counted(holders, 'node')} for {ttl:.0f} s", err=holders == 0)
        return 0 if holders else 1

    run(main)


def _readable(key: str, value: Any) -> Any:
    """A value as JSON can show it; a manifest as what it says."""
    from tesseract_async.errors import ProtocolError
    from tesseract_async.experts.manifest import decode_manifest

    if key.startswith("experts/"):
        try:
            manifest = decode_manifest(value)
        except ProtocolError as error:
            return f"not a manifest: {error}"
        return {
            "addresses": list(manifest.addresses),
            "rendezvous": list(manifest.rendezvous),
            "experts": manifest.coords.tolist(),
            "primary": manifest.primary.tolist(),
        }
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    try:
        json.dumps(value)
    except TypeError:
        return repr(value)
    return value
