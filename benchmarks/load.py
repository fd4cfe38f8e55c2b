"""What a seed on a CPU bears: many forks at once, idle connections, peers that do not read, and floods."""

import math
import time
from typing import Any

from benchmarks.bench import START_TIMEOUT, Bench
from benchmarks.measure import Outcome
from benchmarks.process import Worker

MEMORY_GOAL = 64.0
"""MiB that a seed's process may have more at any moment, whatever peers do."""
THREADS_GOAL = 2.0
"""Threads of the seed's for each lease over ZeroMQ."""
IDLE_CPU_GOAL = 100.0
"""Milliseconds of the seed's processor in a second, while all that are connected are idle."""
PINGS = 5.0
"""Seconds in which the seed pings every connection once: a third of `publish(stall=)`."""
STALL = 2.0
"""Seconds after which the seed ends what does not read, in the case of readers."""
KINDS = (
    "parts of 255 bytes",
    "parts of no bytes",
    "parts of 1 MiB",
    "requests whose answers are not read",
    "frames of 2^40 bytes",
)
FLOOD = 3.0
"""Seconds of each flood, at least."""
TCP_CHUNK = 1 << 20
DESCRIPTORS = 4096


class _Stage:
    """A seed that has served a fork, and the process whose children fork from it."""

    def __init__(self, bench: Bench, shape: str, *, descriptors: int = DESCRIPTORS, stall: float = 15.0) -> None:
        self.bench = bench
        self.seed = bench.start("seed", "cpu")
        self.herd = bench.start("herd", "cpu")
        bench.ask(self.seed, "usage.limit_descriptors", timeout=START_TIMEOUT, soft=descriptors)
        bench.ask(self.seed, "models.build", shape=bench.shape(shape), placement="placed", fill=True)
        bench.ask(self.herd, "models.build", timeout=START_TIMEOUT, shape=bench.shape(shape), placement="meta")
        published = bench.ask(self.seed, "api.publish", transports=["zeromq"], stall=stall)
        self.address: str = published["address"]
        self.forks(1)

    def crowd(self) -> Worker:
        """A process for other peers."""
        return self.bench.start("crowd", "cpu")

    def forks(self, count: int) -> dict[str, Any]:
        """So many forks at once; see `herd.fork_at_once`."""
        seconds = self.bench.timeout / 2
        done = self.bench.ask(self.herd, "herd.fork_at_once", address=self.address, count=count, seconds=seconds)
        found: dict[str, Any] = done
        return found

    def several(self, rounds: int, seconds: float = 0.0) -> tuple[list[float], list[str]]:
        """The seconds of forks, one after another, so many and for so long at least; the errors of those that fail."""
        until, done = time.monotonic() + seconds, list[dict[str, Any]]()
        while len(done) < rounds or time.monotonic() < until:
            done.append(self.forks(1))
        return [second for one in done for second in one["seconds"]], [why for one in done for why in one["errors"]]

    def watch(self) -> None:
        """See `usage.watch`."""
        self.bench.ask(self.seed, "usage.watch")

    def watched(self) -> dict[str, float]:
        """See `usage.watched`."""
        found: dict[str, float] = self.bench.ask(self.seed, "usage.watched")
        return found


def forks_case(bench: Bench, outcome: Outcome, *, shape: str, count: int) -> None:
    """Many forks at once from one seed, each in a process of its own, beside one fork at a time and plain TCP."""
    count = _count(bench, count)
    stage = _Stage(bench, shape)
    tcp = bench.start("tcp", "cpu")
    size = bench.ask(
        tcp, "models.build", timeout=START_TIMEOUT, shape=bench.shape(shape), placement="placed", fill=True
    )
    port = bench.ask(stage.seed, "limits.tcp_serve")
    plain = [bench.ask(tcp, "limits.tcp_read", port=port, chunk=TCP_CHUNK) for _ in range(1 + bench.rounds)][1:]
    one, errors = stage.several(bench.rounds)
    stage.watch()
    done = stage.forks(count)
    used = stage.watched()
    errors += done["errors"]
    outcome.detail |= {"used": used, "seconds": done["seconds"], "errors": errors}
    last = [max(done["seconds"])] if done["seconds"] else []
    speed = [len(done["seconds"]) * size["nbytes"] / last[0] / 1e9] if last else []
    outcome.add("one fork, verified", one, "s")
    outcome.add(
        f"{count} at once, until the last is done",
        last,
        "s",
        limit=f"{count} x one",
        against=[count * seconds for seconds in one],
    )
    outcome.add(f"{count} at once, bytes of all", speed, "GB/s", limit="plain TCP", against=plain)
    outcome.add("leases at once", [used["leases"]], "")
    _add_memory(outcome, used)
    threads = used["threads"] / max(1.0, used["leases"])
    outcome.add("threads of the seed's a lease", [threads], "", goal=THREADS_GOAL, less=True)
    outcome.add("descriptors of the seed's a lease", [used["descriptors"] / max(1.0, used["leases"])], "")
    outcome.add("forks that failed", [len(errors)], "", goal=0, less=True)


def idle_case(bench: Bench, outcome: Outcome, *, shape: str, count: int) -> None:
    """One fork beside idle connections, all of which have said hello and answer pings, and what those cost the seed."""
    count = _count(bench, count)
    stage = _Stage(bench, shape)
    alone, errors = stage.several(bench.rounds)
    before = bench.ask(stage.seed, "usage.cpu", seconds=1.0)
    stage.watch()
    connected = bench.ask(stage.crowd(), "crowd.connect_idle", address=stage.address, count=count, shake_hands=True)
    used = stage.watched()
    bench.ask(stage.seed, "usage.cpu", seconds=1.0)  # what they cost when they come is another matter
    cpu = [bench.ask(stage.seed, "usage.cpu", seconds=PINGS)]
    beside, more = stage.several(bench.rounds)
    outcome.detail |= {"used": used, "errors": errors + more}
    outcome.add("idle connections", [connected], "", goal=count)
    outcome.add("one fork beside them", beside, "s", limit="alone", against=alone, goal=1.2, less=True)
    outcome.add("processor while all are idle", cpu, "ms/s", goal=IDLE_CPU_GOAL, less=True)
    outcome.add("the same before they came", [before], "ms/s")
    _add_memory(outcome, used)
    outcome.add("forks that failed", [len(errors + more)], "", goal=0, less=True)


def exhausted_case(bench: Bench, outcome: Outcome, *, shape: str, count: int, descriptors: int) -> None:
    """More idle connections than the seed has descriptors: what they cost it, and a fork once they have gone."""
    stage = _Stage(bench, shape, descriptors=descriptors)
    crowd = stage.crowd()
    stage.watch()
    bench.ask(crowd, "crowd.connect_idle", address=stage.address, count=count, shake_hands=False)
    cpu = [bench.ask(stage.seed, "usage.cpu", seconds=1.0) for _ in range(bench.rounds)]
    bench.ask(crowd, "crowd.let_go")
    after, errors = stage.several(1)
    used = stage.watched()  # not before: it takes a descriptor
    outcome.detail |= {"used": used, "errors": errors}
    what = f"processor beside {count} connections with {descriptors} descriptors"
    outcome.add(what, cpu, "ms/s", goal=IDLE_CPU_GOAL, less=True)
    _add_memory(outcome, used)
    outcome.add("one fork once they have gone", after, "s")
    outcome.add("forks that failed", [len(errors)], "", goal=0, less=True)


def readers_case(bench: Bench, outcome: Outcome, *, shape: str, count: int, trickle: bool) -> None:
    """Leases whose answers nobody reads, or at a byte a second: when they are cut off, and a fork beside them."""
    count = _count(bench, count)
    stage = _Stage(bench, shape, stall=STALL)
    alone, errors = stage.several(bench.rounds)
    crowd = stage.crowd()
    stage.watch()
    bench.ask(crowd, "crowd.hold_leases", address=stage.address, count=count, trickle=trickle)
    beside, more = stage.several(1)
    left = math.ceil(count / 4)
    seconds = bench.ask(stage.seed, "usage.wait_for_connections", most=left, patience=10 * STALL)
    used = stage.watched()
    bench.ask(crowd, "crowd.let_go")
    outcome.detail |= {"used": used, "errors": errors + more}
    outcome.add("leases that are not read", [min(used["leases"], count)], "", goal=count)
    outcome.add("one fork beside them", beside, "s", limit="alone", against=alone)
    outcome.add("until all are cut off", [seconds], "s", limit="stall", against=[STALL], goal=2.0, less=True)
    _add_memory(outcome, used)
    outcome.add("forks that failed", [len(errors + more)], "", goal=0, less=True)


def floods_case(bench: Bench, outcome: Outcome, *, shape: str, peers: int) -> None:
    """Forks beside connections that send without end, as fast as they can; each that is cut off comes again."""
    stage = _Stage(bench, shape)
    alone, errors = stage.several(bench.rounds)
    crowd = stage.crowd()
    for kind in KINDS:
        stage.watch()
        bench.ask(crowd, "crowd.flood", address=stage.address, kind=kind, peers=peers)
        beside, more = stage.several(bench.rounds, FLOOD)
        ended = bench.ask(crowd, "crowd.flood_end")
        used = stage.watched()
        errors += more
        outcome.detail[kind] = {"used": used, "sent": ended, "errors": more}
        outcome.add(f"{kind}: one fork beside them", beside, "s", limit="alone", against=alone)
        outcome.add(f"{kind}: sent to the seed", [ended["sent"]], "MiB")
        outcome.add(f"{kind}: connections cut off", [ended["ended"]], "")
        _add_memory(outcome, used, f"{kind}: ")
    outcome.add("forks that failed", [len(errors)], "", goal=0, less=True)


def _add_memory(outcome: Outcome, used: dict[str, float], prefix: str = "") -> None:
    outcome.add(f"{prefix}memory added to the seed", [used["memory"]], "MiB", goal=MEMORY_GOAL, less=True)


def _count(bench: Bench, count: int) -> int:
    """As many, or fewer where all is made smaller."""
    return count if bench.scale == 1 else max(4, round(count * bench.scale))
