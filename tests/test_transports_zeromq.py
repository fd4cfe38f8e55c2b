import tensorfork
from tensorfork.testing import TransportSuite
from tensorfork.transports.zeromq import ZeroMQ


class TestZeroMQ(TransportSuite):
    def make(self) -> tensorfork.Transport:
        return ZeroMQ()
