"""The offer of a lease, and the requests and answers on the seed's port.

A request is one frame to the lease's token (`sockets.port`), which is in the offer: a header (its number), then ranges
(region, offset, nbytes). Its answer begins with a frame (number, status); with the status `OK`, a second one has the
bytes of all ranges. The first request on a connection is a greeting: number `GREETING`, and no ranges; the seed answers
it with `OK` and no bytes. It answers a request for bytes that it has not published with `OUT_OF_BOUNDS` alone, and one
for memory that is not there any more with `MOVED` alone. Behind each answer with bytes comes a message of one empty
frame, which the fork ignores: it tells the seed what has been sent (`sockets.zero_copy`).

A token that the port does not know is answered with `sockets.port.NOBODY`, once a connection: it may be that of a fork
whose connections do not all reach the same seed, or of a lease that has ended.
"""

import struct

OFFER = struct.Struct("<16sII")
"""The token, the bytes of one answer at most, and the bytes from which on a range should be requested by itself, since
it is lent then; 0 if nothing is."""
REQUEST_HEADER = struct.Struct("<Q")
RANGE = struct.Struct("<QQQ")
ANSWER_HEADER = struct.Struct("<QB")
OK, OUT_OF_BOUNDS, MOVED = 0, 1, 2
GREETING = 0
"""The number of a greeting; requests for bytes are counted from 1."""

FRAME = 2 << 20
"""Bytes of one answer at most. Smaller ones cost more switches between threads, larger ones leave the cache."""
LENT = 256 << 10
"""Bytes of a range from which on it is better lent than copied with others into one answer."""
WINDOW = 16
"""Requests in flight of one fork, over all its connections; but at least `LEAST_WINDOW` on each."""
LEAST_WINDOW = 2
MAX_CONNECTIONS = 16
"""Connections that a fork makes for one lease, at most."""
MAX_RANGES = 64
"""Ranges in one request."""
MAX_REQUEST = REQUEST_HEADER.size + MAX_RANGES * RANGE.size
"""Bytes of one request at most."""
