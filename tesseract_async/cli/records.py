"""`tesseract get` and `tesseract put`: look at the network's records, and write some."""

import json
import time

import click

from tesseract_async.cli.options import Visit, json_option, visit_options
from tesseract_async.cli.running import asynchronous
from tesseract_async.cli.types import counted, seconds
from tesseract_async.errors import ProtocolError, printable
from tesseract_async.experts.manifest import decode_manifest


@click.command("get")
@click.argument("key")
@visit_options
@json_option
@asynchronous
async def get(*, key: str, visit: Visit, as_json: bool) -> int:
    """Show every entry that the network holds under KEY: who owns it, how long it is kept, and its value.

    The servers of a grid are under experts/PREFIX. The exit status is 1 if there is no entry.
    """
    async with visit.node() as node:
        entries = await node.network.get_entries(key)
    for entry in entries:
        left = entry.expiration - time.time()
        shown = _readable(key, entry.value)
        if as_json:
            facts = {"subkey": entry.subkey, "owner": str(entry.owner), "sequence": entry.sequence}
            click.echo(json.dumps({**facts, "expires_in": round(left, 3), "value": shown}))
        else:
            subkey = "" if entry.subkey is None else f" [{entry.subkey}]"
            said = f"{entry.owner.short}{subkey}, for {left:.0f} s: {json.dumps(shown, ensure_ascii=False)}"
            click.echo(printable(said))
    if not entries:
        click.echo(f"nothing is held under {key!r}", err=True)
    return 0 if entries else 1


@click.command("put")
@click.argument("key")
@click.argument("value")
@visit_options
@click.option("--subkey", help="Store the entry under this name within KEY, so that an owner can have several there.")
@click.option("--ttl", default=300.0, type=seconds(1, 365 * 86400), help="Keep the entry for this long, such as '1 h'.")
@asynchronous
async def put(*, key: str, value: str, visit: Visit, subkey: str | None, ttl: float) -> int:
    """Store VALUE under KEY, as JSON if it is JSON, else as text.

    The entry belongs to --identity; without one, nobody can change it later.
    """
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    async with visit.node() as node:
        holders = await node.network.store(key, parsed, ttl=ttl, subkey=subkey)
    click.echo(f"held by {counted(holders, 'node')} for {ttl:.0f} s", err=holders == 0)
    return 0 if holders else 1


def _readable(key: str, value: object) -> object:
    """Return what JSON can show of a value; of a manifest, its fields."""
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
