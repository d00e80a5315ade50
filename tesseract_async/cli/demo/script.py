"""The course of the demo: it starts everything, kills a server on the way, starts it again, and waits for the end."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from tesseract_async.cli.demo import plan
from tesseract_async.cli.demo.children import Child, ChildFailed, children
from tesseract_async.cli.demo.progress import DemoProgress
from tesseract_async.cli.types import counted

START_TIMEOUT = 180.0
VICTIM = 1
"""Number of the server that is killed, where there is more than one."""


class Script:
    """One run of the demo; `progress` holds its present state."""

    def __init__(self, options: plan.DemoOptions, folder: Path) -> None:
        """Use `folder` for logs, identities and checkpoints."""
        self.options = options
        self.progress = DemoProgress(options)
        self._folder = folder
        self._go_on = folder.absolute() / "go-on"
        self._changed = asyncio.Event()
        self._started_at: float | None = None

    def now(self) -> float:
        """Return the seconds since training began; 0 before."""
        return 0.0 if self._started_at is None else asyncio.get_running_loop().time() - self._started_at

    async def run(self) -> None:
        """Run until all trainers took all steps; leave no process behind, whatever happens.

        Raises: ChildFailed if a process ended that should not have.
        """
        self._go_on.unlink(missing_ok=True)
        async with children() as family:
            self._note("starting a bootstrap node")
            words = ["-m", "tesseract_async", "dht", "--leave-with-parent"]
            bootstrap = await self._start(family, "bootstrap node", words)
            self._address: str = (await bootstrap.ready(timeout=START_TIMEOUT))["address"]
            self.progress.address = self._address.partition("/")[0]

            self._note(f"starting {counted(self.options.num_servers, 'server')} with {len(plan.UIDS)} experts")
            numbers = range(self.options.num_servers)
            servers = await asyncio.gather(*(self._bring_up(family, number) for number in numbers))

            self._note(f"starting {plan.NUM_TRAINERS} trainers")
            trainers = [await self._trainer(family, number) for number in range(plan.NUM_TRAINERS)]
            await asyncio.gather(*(trainer.ready(timeout=START_TIMEOUT) for trainer in trainers))
            self._started_at = asyncio.get_running_loop().time()
            self._note("training")
            await self._train(family, servers, trainers)

    async def _train(self, family: list[Child], servers: list[Child], trainers: list[Child]) -> None:
        """Wait for the trainers. Raises: ChildFailed for the first process that fails."""
        try:
            async with asyncio.TaskGroup() as group:
                guards = [group.create_task(child.wait()) for child in (*family[:1], *servers, *trainers)]
                accident = group.create_task(self._kill_and_return(family, servers))
                await self._until(lambda: self.progress.is_done)
                self._note("all steps are taken")
                accident.cancel()
                for guard in guards:
                    guard.cancel()
        except* ChildFailed as failures:
            raise failures.exceptions[0] from None

    async def _kill_and_return(self, family: list[Child], servers: list[Child]) -> None:
        if len(servers) <= VICTIM:
            self._go_on.touch()
            return
        name = f"server {VICTIM + 1}"
        state = self.progress.servers[name]
        await self._until(lambda: self.progress.share >= plan.KILL_AT)
        await servers[VICTIM].kill()
        state.alive = False
        self.progress.killed_at = self.now()
        self._note(f"{name} was killed with SIGKILL: {len(state.uids)} experts are gone")
        await self._until(lambda: self.progress.share >= plan.RETURN_AT)
        self._note(f"{name} is started again")
        again = await self._bring_up(family, VICTIM)
        self.progress.returned_at = self.now()
        self._go_on.touch()
        state.versions_at_return = dict(state.versions)
        self._note(f"{name} is back with its weights ({state.num_steps} steps of its experts)")
        await again.wait()

    async def _bring_up(self, family: list[Child], number: int) -> Child:
        folder = self._folder / f"server-{number + 1}"
        words = ["-m", "tesseract_async", "serve", "--leave-with-parent", *plan.expert_arguments(self.options)]
        flags = {
            "--initial-peers": self._address,
            "--identity": folder / "identity.pem",
            "--checkpoint-dir": folder / "checkpoints",
            "--checkpoint-period": plan.CHECKPOINT_PERIOD,
            "--ttl": plan.TTL,
            "--report-period": 0.5,
            "--seed": self.options.seed,
            "--name": f"server {number + 1}",
        }
        words += [str(word) for pair in flags.items() for word in pair]
        words += [word for uid in plan.assign(self.options.num_servers)[number] for word in ("--experts", uid)]
        server = await self._start(family, f"server {number + 1}", words)
        await server.ready(timeout=START_TIMEOUT)
        self.progress.servers[server.name].alive = True
        return server

    async def _trainer(self, family: list[Child], number: int) -> Child:
        task = {
            "initial_peers": [self._address],
            "number": number,
            "seed": self.options.seed,
            "steps": self.options.steps,
            "go_on": str(self._go_on),
        }
        words = ["-m", "tesseract_async.cli.demo.trainer", json.dumps(task)]
        return await self._start(family, f"trainer {number + 1}", words)

    async def _start(self, family: list[Child], name: str, words: list[str]) -> Child:
        self.progress.num_processes += 1
        log = self._folder / f"{name.replace(' ', '-')}.log"
        child = await Child.start(name, words, log=log, on_event=self._heard)
        family.append(child)
        return child

    def _heard(self, name: str, facts: dict[str, object]) -> None:
        self.progress.take(name, facts, self.now())
        self._changed.set()

    def _note(self, sentence: str) -> None:
        self.progress.note(self.now(), sentence)

    async def _until(self, predicate: Callable[[], bool]) -> None:
        while not predicate():
            self._changed.clear()
            await self._changed.wait()
