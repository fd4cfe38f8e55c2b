"""For whoever writes a transport, or code that must survive a bad one.

`TransportSuite` is what every transport must pass. Inherit it in a test module of yours, and say how yours is made:

    class TestPigeon(TransportSuite):
        def make(self) -> tensorfork.Transport:
            return Pigeon()

`FaultyTransport` wraps another transport and spoils what it brings, in one of the ways that `faults` has:

    with pytest.raises(tensorfork.VerificationFailed):
        tensorfork.fork_into(model, seed.address, transport=FaultyTransport(Pigeon(), faults.Flip()))

Needs pytest, and `tensorfork` itself; nothing else of this package is imported from outside of it.
"""

import pytest

pytest.register_assert_rewrite("tensorfork.testing.lab", "tensorfork.testing.suite")

from tensorfork.testing import faults
from tensorfork.testing.faults import Fault, FaultyTransport
from tensorfork.testing.suite import TransportSuite

__all__ = ["Fault", "FaultyTransport", "TransportSuite", "faults"]
