"""A ZeroMQ context for one side of one lease."""

import zmq

from tensorfork.errors import TransportUnavailable
from tensorfork.sockets.zeromq import new_context


def new_lease_context(io_threads: int) -> "zmq.Context[zmq.Socket[bytes]]":
    """A context with that many I/O threads. Raises `TransportUnavailable` where the process can open no more files."""
    try:
        return new_context(io_threads)
    except OSError as error:
        raise TransportUnavailable(f"zeromq: {error.strerror}") from error
