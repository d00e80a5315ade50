"""The queues of a runtime's experts: so many as are needed, and of sizes that vary no more than are kept."""

from tesseract_async.runtime.batcher import Batcher, QueuedRequest
from tesseract_async.runtime.queues import MAX_SIZES, ExpertQueues
from tests.test_varying_sizes import make_backend


def test_queues_of_sizes_are_kept_while_something_waits_in_them() -> None:
    batcher = Batcher()
    queues, backend = ExpertQueues(batcher, groups_experts=True), make_backend()
    kinds = [(backend, False, False, False, False, ((length, 4), None)) for length in range(3 * MAX_SIZES)]
    for number, kind in enumerate(kinds):
        queue = queues.add(kind)
        if number == 5:
            batcher.add(QueuedRequest(queue, 7, 100), 0.0)
        assert len(queues.known) <= MAX_SIZES
    assert kinds[5] in queues.known and queues.num_waiting_rows(backend) == 7
    queues.forget(backend)
    assert not queues.known
