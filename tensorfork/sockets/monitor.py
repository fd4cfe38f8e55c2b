"""Events of a socket's connections, read from its libzmq monitor.

`zmq.utils.monitor` reads them too, but imports `zmq.asyncio`, which takes longer to import than the rest of pyzmq.
The frames have libzmq's format (`zmq_socket_monitor(3)`): first a 16-bit event and a 32-bit value, then the endpoint.
"""

import struct

import zmq

_EVENT = struct.Struct("=HI")


def recv_connection_event(monitor: "zmq.Socket[bytes]") -> tuple[zmq.Event, int]:
    """The next event of a monitor, and its value: of most events the number of the connection's file descriptor.

    Raises `zmq.Again` when there is no event, and `ValueError` for frames of another format.
    """
    frames = monitor.recv_multipart(zmq.NOBLOCK)
    if len(frames) != 2 or len(frames[0]) != _EVENT.size:
        raise ValueError(f"a monitor's event has 2 frames, the first of {_EVENT.size} bytes; {len(frames)} came")
    number, value = _EVENT.unpack(frames[0])
    return zmq.Event(number), value
