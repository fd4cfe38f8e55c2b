"""For authors of a transport, and of code that must survive a faulty one.

`TransportSuite` is the suite that every transport must pass. Inherit it in a test module, and define `make`:

    class TestPigeon(TransportSuite):
        def make(self) -> tensorfork.Transport:
            return Pigeon()

`FaultyTransport` wraps another transport and corrupts what it transfers, by one of the `faults`:

    with pytest.raises(tensorfork.VerificationFailed):
        tensorfork.fork_into(model, seed.address, transport=FaultyTransport(Pigeon(), faults.Flip()))

It needs pytest. Of `tensorfork` it uses the public names alone.
"""

import pytest

pytest.register_assert_rewrite(
    "tensorfork.testing.harness",
    "tensorfork.testing.lease_under_test",
    "tensorfork.testing.seed_memory",
    "tensorfork.testing.suite",
)

from tensorfork.testing import faults  # noqa: E402
from tensorfork.testing.faults import Fault, FaultyTransport  # noqa: E402
from tensorfork.testing.suite import TransportSuite  # noqa: E402

__all__ = ["Fault", "FaultyTransport", "TransportSuite", "faults"]
