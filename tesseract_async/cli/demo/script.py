"""The demo's course: start everything, kill a server on the way, start it again, wait for the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from tesseract_async.cli.demo import plan
from tesseract_async.cli.demo.children import Child, ChildFailed, children
from tesseract_async.cli.demo.progress import Progress
from tesseract_async.cli.units import counted

START_TIMEOUT = 180.0
VICTIM = 1
"""Number of the server that is killed, where there is more than one."""


class Script:
    """Runs the demo once; `progress` holds what is known of it at any moment."""

    def __init__(self, settings: plan.DemoSettings, folder: Path) -> None:
        """`folder` takes logs, identities and checkpoints."""
        self.settings = settings
        self.progress = Progress(settings)
        self._folder = folder
        self._go_on = folder.absolute() / "go-on"
        self._changed = asyncio.Event()
        self._started_at: float | None = None

    def now(self) -> float:
        """Seconds since training began; 0 before."""
        return 0.0 if self._started_at is None else asyncio.get_running_loop().time() - self._started_at

    async def run(self) -> None:
        """Returns when all trainers took all steps; leaves no process behind, whatever happens.

        Raises: ChildFailed if a process ended that should not have.
        """
        self._go_on.unlink(missing_ok=True)
        async with children() as family:
            self._note("starting a bootstrap node")
            bootstrap = self._child("bootstrap node", ["-m", "tesseract_async.cli", "dht", "--leave-with-parent"])
            family.append(bootstrap)
            await bootstrap.start()
            self._address: str = (await bootstrap.ready(timeout=START_TIMEOUT))["address"]
            self.progress.address = self._address.partition("/")[0]

            self._note(f"starting {counted(self.settings.num_servers, 'server')} with {len(plan.all_uids())} experts")
            servers = [self._server(number) for number in range(self.settings.num_servers)]
            family.extend(servers)
            await asyncio.gather(*(self._bring_up(server) for server in servers))

            self._note(f"starting {plan.NUM_TRAINERS} trainers")
            trainers = [self._trainer(number) for number in range(plan.NUM_TRAINERS)]
            family.extend(trainers)
            await asyncio.gather(*(trainer.start() for trainer in trainers))
            await asyncio.gather(*(trainer.ready(timeout=START_TIMEOUT) for trainer in trainers))
            self._started_at = asyncio.get_running_loop().time()
            self._note("training")
            await self._train(family, servers, trainers)

    async def _train(self, family: list[Child], servers: list[Child], trainers: list[Child]) -> None:
        """Raises the first failure of any process; returns when the trainers are done."""
        try:
            async with asyncio.TaskGroup() as group:
                guards = [group.create_task(child.wait()) for child in (*family[:1], *servers)]
                accident = group.create_task(self._kill_and_return(family, servers, group))
                for trainer in [group.create_task(trainer.wait()) for trainer in trainers]:
                    await trainer
                self._note("all steps are taken")
                accident.cancel()
                for guard in guards:
                    guard.cancel()
        except* ChildFailed as failures:
            raise failures.exceptions[0] from None

    async def _kill_and_return(self, family: list[Child], servers: list[Child], group: asyncio.TaskGroup) -> None:
        if len(servers) <= VICTIM:
            self._go_on.touch()
            return
        name = plan.server_name(VICTIM)
        state = self.progress.servers[name]
        await self._until(lambda: self.progress.share >= self.settings.kill_at)
        await servers[VICTIM].kill()
        state.alive = False
        self.progress.killed_at = self.now()
        self._note(f"{name} was killed with SIGKILL: {len(state.uids)} experts are gone")
        await self._until(lambda: self.progress.share >= self.settings.return_at)
        self._note(f"{name} is started again")
        again = self._server(VICTIM)
        family.append(again)
        await self._bring_up(again)
        self.progress.returned_at = self.now()
        self._go_on.touch()
        state.versions_at_return = dict(state.versions)
        self._note(f"{name} is back with its weights ({state.num_steps} steps of its experts)")
        await again.wait()

    async def _bring_up(self, server: Child) -> None:
        await server.start()
        await server.ready(timeout=START_TIMEOUT)
        self.progress.servers[server.name].alive = True

    def _server(self, number: int) -> Child:
        settings, folder = self.settings, self._folder / f"server-{number + 1}"
        arguments = {
            "--initial-peers": self._address,
            "--identity": str(folder / "identity.pem"),
            "--checkpoint-dir": str(folder / "checkpoints"),
            "--checkpoint-period": str(settings.checkpoint_period),
            "--ttl": str(settings.ttl),
            "--report-period": "0.5",
            "--expert-class": "ffn",
            "--optimizer": "none" if settings.freeze_experts else "adam",
            "--learning-rate": str(settings.expert_learning_rate),
            "--seed": str(settings.seed),
        }
        words = ["-m", "tesseract_async.cli", "serve", "--leave-with-parent"]
        words += [word for pair in arguments.items() for word in pair]
        words += [word for name, size in plan.sizes(settings).items() for word in ("--size", f"{name}={size}")]
        words += [word for uid in plan.assign(settings.num_servers)[number] for word in ("--experts", uid)]
        return self._child(plan.server_name(number), words)

    def _trainer(self, number: int) -> Child:
        task = plan.TrainerTask(
            initial_peers=[self._address],
            number=number,
            seed=self.settings.seed,
            steps=self.settings.steps,
            rows=self.settings.rows,
            noise=self.settings.noise,
            k_best=self.settings.k_best,
            gate_learning_rate=self.settings.gate_learning_rate,
            wait_at=max(1, round(self.settings.wait_at * self.settings.steps)),
            validate_every=self.settings.validate_every,
            go_on=str(self._go_on),
            refresh_period=self.settings.refresh_period,
        )
        return self._child(plan.trainer_name(number), ["-m", "tesseract_async.cli.demo.trainer", task.encode()])

    def _child(self, name: str, arguments: list[str]) -> Child:
        self.progress.num_processes += 1
        return Child(name, arguments, log=self._folder / f"{name.replace(' ', '-')}.log", on_event=self._heard)

    def _heard(self, name: str, facts: dict[str, object]) -> None:
        self.progress.take(name, facts, self.now())
        self._changed.set()

    def _note(self, sentence: str) -> None:
        self.progress.note(self.now(), sentence)

    async def _until(self, predicate: Callable[[], bool]) -> None:
        while not predicate():
            self._changed.clear()
            await self._changed.wait()
