"""`tesseract keygen`: makes an identity."""

from pathlib import Path

import click

from tesseract_async.cli.types import FILE
from tesseract_async.identity import Identity


@click.command("keygen")
@click.argument("file", type=FILE)
@click.option("--show", is_flag=True, help="Print the peer id of the key that is in FILE already.")
def command(*, file: Path, show: bool) -> None:
    """Make an identity: a new key in FILE, readable by you only. Prints its peer id.

    A node with an identity has the same peer id after a restart: give FILE as --identity to `serve` or `dht`.
    """
    try:
        if show:
            identity = Identity.load(file)
        else:
            identity = Identity.generate()
            identity.save(file)
    except FileExistsError:
        raise click.ClickException(f"{file} exists, and is not overwritten. --show prints its peer id") from None
    except FileNotFoundError:
        sentence = f"there is no file {file}" if show else f"{file} cannot be written: choose another folder"
        raise click.ClickException(sentence) from None
    except OSError as error:
        verb = "read" if show else "written"
        raise click.ClickException(f"{file} cannot be {verb} ({error.strerror}): choose another file") from None
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(str(identity.peer_id))
