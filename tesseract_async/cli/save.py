"""`tesseract save` and `tesseract restore`: a model's states as a folder that loads without the swarm, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import click

from tesseract_async.cli.flags import Flag, grouped
from tesseract_async.cli.options import Visit, visit_options
from tesseract_async.cli.running import asynchronous, progress_bar, say
from tesseract_async.cli.types import EXISTING_FILE, FOLDER, counted
from tesseract_async.errors import CheckpointError, ExpertNotFound, sentence_of
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run_directory import find_run
from tesseract_async.experts.trust import SHARED
from tesseract_async.identity import Identity

MAX_TOLD: Final = 8
"""The most experts that are named to people when something went wrong with them; the line for programs names all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """The experts to save, and the folder."""

    run_name: Annotated[str | None, Flag("--run", metavar="NAME[@PEER_ID]")] = None
    """Save the experts of this training run."""
    patterns: Annotated[tuple[ExpertPattern, ...], Flag("--experts", metavar="PATTERN")] = ()
    """Save these experts, which belong to no run, such as 'ffn.[0:4].[0:16]'."""
    shared_names: Annotated[tuple[str, ...], Flag("--shared", metavar="NAME")] = ()
    """Save the parameters that trainers share under this name, too; a run's own are saved anyway."""
    out: Annotated[Path, FOLDER]
    """Write the model into this folder, made if missing."""
    optimizers: bool = False
    """Save the experts' optimizers, too, so that `tesseract restore` can go back to this point."""


@click.command("save")
@grouped("options", SaveOptions)
@visit_options
@asynchronous
async def save(*, options: SaveOptions, visit: Visit) -> int:
    """Write a model into a folder: every expert that somebody has, all as of one moment, and the shared parameters.

    Experts come from their primaries or, where there is none, from a server that follows it or holds its state.

    The folder loads anywhere: `tesseract_async.saving.folder.SavedExperts(FOLDER)["ffn.3.7"]` is an ordinary module.
    Run the command again to download only what has changed. The exit status is 1 if an expert could not be downloaded.
    """
    if options.run_name is None and not options.patterns and not options.shared_names:
        raise click.UsageError("say what to save: --run, --experts or --shared")

    from tesseract_async.saving.folder import open_folder_or_make
    from tesseract_async.saving.saver import Origin, SavePoint, find_origins, find_pieces, take_trunk
    from tesseract_async.shared_pieces import SharedPieces

    store = open_folder_or_make(options.out)
    async with visit.node() as joined:
        origins: dict[str, list[Origin]] = {}
        shared = {name + SHARED: True for name in options.shared_names}
        if options.run_name is not None:
            signed = await find_run(joined.network, options.run_name, trust=joined.trust)
            await joined.join_run(signed)
            shared[signed.manifest.prefix + SHARED] = False
            store.add_run(signed)
            origins |= await find_origins(joined, signed.manifest.prefix, signed.manifest.grid_size)
        for pattern in options.patterns:
            found = await find_origins(joined, pattern.prefix, pattern.grid_size)
            origins |= {uid: some for uid, some in found.items() if uid in pattern}
        trunks: list[list[str]] = []
        for prefix, is_bare in shared.items():
            try:
                found = await find_pieces(joined, SharedPieces(joined, prefix, is_bare=is_bare))
            except ExpertNotFound:
                if is_bare:
                    raise
                continue  # a run whose trainers share nothing
            trunks.append([*found])
            origins |= found
        # all at one moment: the pieces belong to the experts that were trained with them
        point = SavePoint(joined, origins, is_whole=options.optimizers)
        await point.mark()
        with progress_bar("experts", total=len(origins)) as advance:
            report = await point.fetch(store, progress=lambda uid: advance(1))
    told = {
        role: [f"{uid} (version {report.taken[uid]})" for uid in sorted(report.origins) if report.origins[uid] == role]
        for role in ("follower", "holder")
    }
    parts = [take_trunk(store, uids, report, keeps=options.optimizers) for uids in trunks]
    tensors = {name: one for part in parts for name, one in part.items()}
    if len(tensors) < sum(map(len, parts)):
        raise click.UsageError("two of the shared models have tensors of the same name: save each by itself")
    if tensors:
        store.put_tensors(tensors)
    num_shared = sum(one.numel() for one in tensors.values())
    store.write_index()
    for role, some in told.items():
        if some:
            more = f" and {len(some) - MAX_TOLD} more" if len(some) > MAX_TOLD else ""
            click.echo(f"from a {role}, for want of a primary: {', '.join(some[:MAX_TOLD])}{more}", err=True)
    for uid, error in sorted(report.failed.items())[:MAX_TOLD]:
        click.echo(f"{uid}: {sentence_of(error)}", err=True)
    click.echo(
        f"{counted(len(report.taken), 'expert')} written, {len(report.kept)} were up to date, "
        f"{len(report.failed)} failed; {num_shared} shared parameters",
        err=True,
    )
    say(
        "saved",
        folder=str(options.out),
        taken=report.taken,
        origins=report.origins,
        kept=report.kept,
        failed=sorted(report.failed),
        shared=num_shared,
    )
    return 1 if report.failed or not (origins or num_shared) else 0


@click.command("restore")
@click.argument("folder", type=FOLDER)
@click.option(
    "--owner", type=EXISTING_FILE, help="Sign with this key file of the run's owner, if the experts belong to a run."
)
@visit_options
@asynchronous
async def restore(*, folder: Path, owner: Path | None, visit: Visit) -> int:
    """Take the experts back to a save point: every server goes on from the states in FOLDER.

    FOLDER was written by `tesseract save --optimizers`, or by `ta.save_model(..., optimizers=True)`. What the servers
    have learned since is kept as a file of its own, if they keep checkpoints. Stop the trainers before.
    """
    from tesseract_async.saving.folder import open_folder
    from tesseract_async.saving.restorer import enter_owned, restore_experts

    saved = open_folder(folder)
    async with visit.node() as joined:
        owners = {} if owner is None else await enter_owned(joined, saved, Identity.load(owner))
        try:
            versions = await restore_experts(joined, saved, owners=owners)
        except CheckpointError as error:
            click.echo(str(error), err=True)
            return 1
    click.echo(f"{counted(len(versions), 'expert')} restored", err=True)
    say("restored", folder=str(folder), versions=versions)
    return 0
