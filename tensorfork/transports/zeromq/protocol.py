"""The offer of a lease, and the requests and answers on its port.

A request is one frame: a header (token, number), then ranges (region, offset, nbytes). Its answer begins with a frame
(number, status); with the status `OK`, a second one has the bytes of all ranges. The token is the lease's, from the
offer. The first request on a connection is a greeting: number `GREETING`, and no ranges; the seed answers it with `OK`
and no bytes. It answers a request for bytes that it has not published with `OUT_OF_BOUNDS` alone, and one for memory
that is not there any more with `MOVED` alone. Behind each of these answers comes a message of one empty frame, which
the fork ignores: it tells the seed what has been sent (`sockets.zero_copy`).

A request with another token is answered with `NOT_THIS_SEED` alone, once a connection: it may be that of a fork whose
connections do not all reach the same seed.
"""

import struct

OFFER = struct.Struct("<16sIII")
"""The token, the port on which the seed listens for this lease, the bytes of one answer at most, and the bytes from
which on a range should be requested by itself, because the seed lends it then; 0 if it lends nothing."""
REQUEST_HEADER = struct.Struct("<16sQ")
RANGE = struct.Struct("<QQQ")
ANSWER_HEADER = struct.Struct("<QB")
OK, OUT_OF_BOUNDS, MOVED, NOT_THIS_SEED = 0, 1, 2, 3
GREETING = 0
"""The number of a greeting; requests for bytes are counted from 1."""

FRAME = 2 << 20
"""Bytes of one answer at most. Smaller ones cost more switches between threads, larger ones leave the cache."""
LENT = 256 << 10
"""Bytes of a range from which on it is better lent than copied with others into one answer."""
WINDOW = 16
"""Requests in flight on a connection."""
MAX_RANGES = 64
"""Ranges in one request."""
MAX_REQUEST = REQUEST_HEADER.size + MAX_RANGES * RANGE.size
"""Bytes of one request at most."""
