"""The offer that a seed sends: packed and unpacked."""

import pytest

from tensorfork import TransportUnavailable
from tensorfork.transports.transfer_engine.export import Offer, OfferedRegion


def test_an_offer_is_unpacked_as_it_was_packed() -> None:
    offer = Offer("rdma", b"n" * 8, b"s" * 8, 15000, {7: OfferedRegion(1 << 40, (1, 2**33)), 1: OfferedRegion(5, ())})
    assert Offer.unpack(offer.pack()) == offer


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_an_offer_that_was_cut_short_is_refused(cut: int) -> None:
    packed = Offer("tcp", b"n" * 8, b"s" * 8, 15000, {7: OfferedRegion(1 << 40, (1, 2))}).pack()
    with pytest.raises(TransportUnavailable):
        Offer.unpack(packed[: min(cut, len(packed) - 1)])


def test_an_offer_of_an_unknown_fabric_is_refused() -> None:
    with pytest.raises(TransportUnavailable):
        Offer.unpack(b"tfTE1\xff" + Offer("tcp", b"n" * 8, b"s" * 8, 1, {}).pack()[6:])
