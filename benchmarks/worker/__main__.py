"""A worker: reads calls, one JSON object a line, from the socket that it inherits, and replies to each.

python -m benchmarks.worker FD NAME DEVICE
"""

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any


def main() -> None:
    """Serve calls until the other end closes the socket."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a worker dies with the process that started it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    connection = socket.socket(fileno=int(sys.argv[1]))
    state = None
    with connection.makefile("rb") as lines:
        for line in lines:
            if state is None:
                from benchmarks.worker.state import WorkerState

                state = WorkerState(sys.argv[2], sys.argv[3])
            connection.sendall(json.dumps(_reply(state, json.loads(line))).encode() + b"\n")
    if state is not None and state.seed is not None:
        state.seed.close()
    sys.stdout.flush()
    os._exit(0)  # destructors of libraries and running threads are not measured


def _reply(state: Any, request: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.worker.state import Skip

    module, _, function = request["call"].partition(".")
    try:
        call = getattr(importlib.import_module(f"benchmarks.worker.{module}"), function)
        return {"value": call(state, **request["arguments"])}
    except Skip as error:
        return {"skipped": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{request['call']}: {type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
