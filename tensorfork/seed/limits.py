"""What a seed grants its forks: the limits that `tensorfork.publish` is told."""

from typing import Any

from attrs import field, frozen

from tensorfork.validators import bytes_a_second, positive_number, stall_seconds


def _leases(given: Any) -> int:
    return positive_number("leases", given)


def _leases_per_connection(given: Any) -> int:
    return positive_number("leases_per_connection", given)


def _stall(given: Any) -> float:
    return stall_seconds("stall", given)


def _rate_limit(given: Any) -> float | None:
    return None if given is None else bytes_a_second("rate_limit", given)


@frozen
class Limits:
    """What a seed grants. `tensorfork.publish` describes each; raises its `TypeError` and `ValueError`.

    A lease counts from its request on, until its threads have ended.

    Attributes:
        leases: at once, of all connections together.
        leases_per_connection: at once, of one connection; a fork has one connection, and one lease.
        stall: seconds without a sign of life after which a connection is ended, with its leases.
        rate_limit: bytes a second of all leases together; None for no limit.
    """

    leases: int = field(default=64, converter=_leases)
    leases_per_connection: int = field(default=4, converter=_leases_per_connection)
    stall: float = field(default=15.0, converter=_stall)
    rate_limit: float | None = field(default=None, converter=_rate_limit)

    def reason_against(self, in_all: int, of_connection: int) -> str | None:
        """Why no further lease is granted where there are so many; None if one is."""
        if of_connection >= self.leases_per_connection:
            return (
                f"this connection has {of_connection} leases already, as many as one may have "
                f"(publish(leases_per_connection={self.leases_per_connection}) at the seed); give one back"
            )
        if in_all >= self.leases:
            return (
                f"the seed has {in_all} leases already, as many as it grants at once "
                f"(publish(leases={self.leases}) at the seed); try again, or fork from another"
            )
        return None
