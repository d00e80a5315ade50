"""ReplicaKeeper: has a server's experts follow their primaries elsewhere, take over from them and be handed over."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from tesseract_async.errors import TesseractError, describe
from tesseract_async.experts.manifest import split_uid
from tesseract_async.identity import PeerID
from tesseract_async.server.bare_names import BareNames
from tesseract_async.server.hosted import Succession
from tesseract_async.server.other_replicas import DEFAULT_SETTINGS, NUM_AT_ONCE, ReplicaSettings
from tesseract_async.server.server import TesseractServer
from tesseract_async.server.state_transfer import REUSE_SECONDS
from tesseract_async.server.tenures import Tenures
from tesseract_async.tasks import end
from tesseract_async.wire import messages

logger = logging.getLogger(__name__)


def boottime() -> float:
    """Return the seconds of a clock that is never set, and runs through suspend where there is such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class ReplicaKeeper(Succession):
    """Looks after the roles of one server's experts. Use it as an async context manager inside the server's.

    Entering takes one look, so that followers are in step. From then on other servers get states and answers, and
    trainers the name of the primary. `Tenures` decide for experts of runs, `BareNames` for the others.
    """

    def __init__(
        self,
        server: TesseractServer,
        *,
        settings: ReplicaSettings = DEFAULT_SETTINGS,
        reuse: float = REUSE_SECONDS,
        elapsed: Callable[[], float] = boottime,
        adopted: Mapping[str, PeerID | None] | None = None,
    ) -> None:
        """`reuse`: seconds for which a copy of a state counts as the newest. `elapsed`: a clock such as `boottime`.
        `adopted`: what `adopt_states` returned: those states are not fetched again before they are due.
        """
        self.settings = settings
        self._server, self._node = server, server.node
        self._source = server.states
        self._source.max_bytes, self._source.reuse = settings.max_copies_bytes, reuse
        found = {uid: server.node.trust.authority(split_uid(uid)[0]) for uid in server.experts}
        self._authorities = {uid: authority for uid, authority in found.items() if authority is not None}
        self.tenures = Tenures(server, call_timeout=settings.call_timeout, elapsed=elapsed)
        bare = [uid for uid in found if uid not in self._authorities]
        self.bare = BareNames(server, bare, self._source, settings=settings, elapsed=elapsed, adopted=adopted or {})
        self._moving: dict[str, asyncio.Future[None]] = {}  # being handed over
        self._looking = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "ReplicaKeeper":
        self._server.succession = self
        self._server.handle(messages.TAKE_OVER, self.bare.take_over)
        self._server.handle(messages.TENURE, lambda hosted, call: self.tenures.answer(hosted.uid, call))
        self._server.restoring.lay_aside = self.tenures.files.lay_aside
        self._source.find_sealed, self.tenures.source = self.tenures.files.find, self._source
        await self.tenures.start(self._authorities)
        await self._act_and_log(self.look)
        pause = partial(asyncio.sleep, self.settings.check_every)
        rounds = (pause, self._settle), (self.bare.wait_due, self.bare.pull)
        self._tasks = [asyncio.create_task(self._keep(*one), name="server: replicas") for one in rounds]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop looking. States are still sent, and trainers sent elsewhere, until the server closes."""
        await end(*self._tasks)
        await self.tenures.aclose()

    def may_step(self, uid: str) -> bool:
        """Return whether a primary may take a step at this moment: always where names are bare."""
        return not self.tenures.has(uid) or self.tenures.may_step(uid)

    def primary(self, uid: str) -> PeerID | None:
        """Return the other server that trains the expert, as far as it is known."""
        return self._of(uid).primary(uid)

    @property
    def sync_seconds(self) -> float:
        return self.tenures.sync_seconds

    async def find_primary(self, uid: str) -> tuple[PeerID | None, float]:
        """Return `primary`, once a handover that is under way has ended, and the seconds until to ask again."""
        if uid in self._moving:
            await asyncio.shield(self._moving[uid])
        if self.tenures.has(uid):
            return await self.tenures.find_primary(uid)
        return self.primary(uid), self.settings.check_every

    def _of(self, uid: str) -> Tenures | BareNames:
        return self.tenures if self.tenures.has(uid) else self.bare

    async def look(self, *, even_paused: bool = False) -> None:
        """Settle the roles of experts with bare names, and pull the states that are due.

        Nothing is done while the server pauses, unless `even_paused`. Raises: TimeoutError if the network does not
        answer.
        """
        if even_paused or not self._server.is_paused:
            await self._settle()
            await self.bare.pull()

    async def _settle(self) -> None:
        async with self._looking:
            if await self._node.network.wait_joined(self.settings.check_every):
                await self.bare.settle()
            # else alone for the moment: that nobody is seen says nothing

    async def hand_over(self) -> int:
        """Have a follower take over each expert that has one, before this server leaves. Returns how many moved.

        From the moment that an expert is handed over, its backwards wait, and then go to the new primary: none is lost
        and none is applied twice. What cannot be handed over stays. An expert that was on its way when this is
        cancelled takes no more backwards here: nobody knows whether the follower has taken over.

        Raises: TimeoutError if the network does not tell who follows.
        """
        if not await self._node.network.wait_joined(0.0):
            return 0  # there is nobody
        async with self._looking:
            mine = [uid for uid in self._server.experts if self._server.is_primary(uid)]
            for room in (self.bare, self.tenures):
                if some := [uid for uid in mine if self._of(uid) is room]:
                    await room.read(some)
            gate = asyncio.Semaphore(NUM_AT_ONCE)

            async def move(uid: str) -> bool:
                async with gate:
                    return await self._hand_over(uid, self._of(uid).hand_over)

            num_moved = sum(await asyncio.gather(*map(move, mine)))
            if num_moved:
                await self._server.announce()
            return num_moved

    async def hand_over_one(self, uid: str, *, to: PeerID) -> bool:
        """Have that server take over an expert of a run. Returns whether it did."""
        async with self._looking:
            moved = self._server.is_primary(uid) and await self._hand_over(
                uid, lambda uid: self.tenures.hand_over(uid, to)
            )
        if moved:
            await self._server.announce()
        return moved

    async def _hand_over(self, uid: str, give: Callable[[str], Awaitable[bool]]) -> bool:
        moved = self._moving[uid] = asyncio.get_running_loop().create_future()
        try:
            return await give(uid)
        finally:
            del self._moving[uid]
            moved.set_result(None)

    async def _keep(self, wait: Callable[[], Awaitable[None]], act: Callable[[], Awaitable[None]]) -> None:
        while True:
            await wait()
            if not self._server.is_paused:
                await self._act_and_log(act)

    async def _act_and_log(self, act: Callable[[], Awaitable[None]]) -> None:
        try:
            await act()
        except (TesseractError, TimeoutError, OSError) as error:
            logger.warning("could not look after the replicas: %s", describe(error))
