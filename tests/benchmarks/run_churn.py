"""A run on real nodes in one process, of which one is killed for good every 10 seconds, and another comes.

    python -m tests.benchmarks.run_churn [servers] [experts of each] [seconds]

By default 12 servers with 4 experts each, for 20 minutes, and a lease of 5 seconds. It wants two cores to itself: where
the process stands still for longer than a moment, a lease ends that should not.
"""

import asyncio
import sys

from tests.benchmarks.figures import emit
from tests.faults.test_dying_volunteers import SYNC_EVERY, TRANSFER, churn

LEASE = 5.0
KILL_EVERY = 10.0


def main() -> None:
    """Prints for how long experts were led by nobody, and what was lost."""
    arguments = [int(word) for word in sys.argv[1:]]
    num_servers, per_server, seconds = arguments + [12, 4, 1200][len(arguments) :]
    watch = asyncio.run(churn(num_servers, per_server, float(seconds), lease=LEASE, kill_every=KILL_EVERY))
    gaps = sorted(watch.gaps)
    details = {"servers": num_servers, "experts": num_servers * per_server, "seconds": seconds, "gaps": gaps[-20:]}
    num_lost = num_servers * per_server - len(watch.epochs)
    emit("experts lost", num_lost, "", "<= 0", **details)
    emit("longest that an expert was led by nobody", watch.longest, "s", f"<= {2 * LEASE:.0f}")
    emit("the same, median of those led by another", gaps[len(gaps) // 2][0] if gaps else 0.0, "s")
    emit("steps that were acknowledged and lost", watch.furthest_back, "s", f"<= {SYNC_EVERY + TRANSFER:.0f}")
    emit("looks at which two led an expert", watch.doubles, "", "<= 0")
    emit("longest that the process stood still", watch.stood_still, "s")
    emit("steps taken", watch.num_steps, "")


if __name__ == "__main__":
    main()
