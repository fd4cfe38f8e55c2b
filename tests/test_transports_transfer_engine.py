import pytest

import tensorfork
from tensorfork.testing import TransportSuite
from tensorfork.transports.transfer_engine import TransferEngine, library


def _why_no_mooncake() -> str | None:
    try:
        library.wheel()
        library.load()
    except tensorfork.TransportUnavailable as error:
        return str(error)
    return None


_without = _why_no_mooncake()
needs_mooncake = pytest.mark.skipif(_without is not None, reason=f"needs Mooncake: {_without}")


@needs_mooncake
class TestOverTcp(TransportSuite):
    one_sided = True

    def make(self) -> tensorfork.Transport:
        return TransferEngine(fabric="tcp")
