"""The offer of a lease, and the requests and answers on its port.

A request is one frame: a header (token, number), then ranges (region, offset, nbytes). Its answer begins with a frame
(number, status); with the status `OK`, one frame for each range follows. The token is the lease's, from the offer. The
seed ignores a request with another token, and answers one for bytes outside the regions with `OUT_OF_BOUNDS` alone.
"""

import struct

OFFER = struct.Struct("<16sI")
"""The token, and the port on which the seed listens for this lease."""
REQUEST_HEADER = struct.Struct("<16sQ")
RANGE = struct.Struct("<QQQ")
ANSWER_HEADER = struct.Struct("<QB")
OK, OUT_OF_BOUNDS = 0, 1

FRAME = 2 << 20
"""Bytes of one answer at most. Smaller ones cost more switches between threads, larger ones leave the cache."""
WINDOW = 16
"""Requests in flight on a connection."""
MAX_RANGES = 64
"""Ranges in one request."""
MAX_REQUEST = REQUEST_HEADER.size + MAX_RANGES * RANGE.size
"""Bytes of one request at most."""
