"""A run on real nodes in one process, of which one is killed for good every 10 seconds, and another comes.

    python -m tests.benchmarks.run_churn --seconds 1200

By default 12 servers with 4 experts each, for 20 minutes, and a lease of 5 seconds; ends with 1 where a figure misses
what is asked. It wants two cores to itself: where the process stands still for longer than a moment, a lease ends that
should not.
"""

import argparse
import asyncio

from tests.benchmarks.figures import emit
from tests.faults.test_dying_volunteers import TRANSFER, churn


def main() -> int:
    """Prints what was lost, for how long experts were led by nobody, and for how long a trainer's steps stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=4, help="of each server")
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--lease", type=float, default=5.0, help="seconds")
    parser.add_argument("--kill-every", type=float, default=10.0, help="seconds")
    asked = parser.parse_args()
    watch = asyncio.run(
        churn(asked.servers, asked.experts, asked.seconds, lease=asked.lease, kill_every=asked.kill_every)
    )
    gaps, stops, limit = sorted(watch.gaps), sorted(watch.stops), f"<= {2 * asked.lease:g}"
    figures = [
        emit("experts lost", len(watch.lost), "", "<= 0", uids=sorted(watch.lost), **vars(asked)),
        emit(
            "furthest that an expert fell back",
            watch.furthest_back,
            "s",
            f"<= {watch.period + TRANSFER:g}",
            published_period=watch.period,
            transfer=TRANSFER,
        ),
        emit("longest that a trainer's steps with an expert stopped", watch.longest_stop, "s", limit, all=stops),
        emit("the same, median of all deaths", stops[len(stops) // 2][0] if stops else 0.0, "s"),
        emit("longest that an expert was led by nobody", watch.longest, "s", limit, all=gaps),
        emit("looks at which two led an expert", watch.doubles, "", "<= 0"),
        emit("longest that the process stood still", watch.stood_still, "s"),
        emit("steps taken", watch.num_steps, ""),
    ]
    return int(any(figure.met is False for figure in figures))


if __name__ == "__main__":
    raise SystemExit(main())
