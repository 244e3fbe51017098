"""Transfer rates of network interfaces."""

from collections.abc import Callable

import psutil

from fleetwire_agent.deltas import Counters, rates
from fleetwire_shared.messages import NetworkRates


class NetworkCollector:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._before = _read_network_counters(clock())

    def collect(self) -> dict[str, tuple[NetworkRates, ...]]:
        """Rates since the last call; none when no time has passed. Source: psutil.net_io_counters(pernic=True)."""
        before, self._before = self._before, _read_network_counters(self._clock())
        if self._before.read_at <= before.read_at:
            return {}
        return {
            "networks": tuple(
                NetworkRates(
                    interface=interface,
                    received_bytes_per_second=round(received_bytes, 1),
                    sent_bytes_per_second=round(sent_bytes, 1),
                    received_packets_per_second=round(received_packets, 2),
                    sent_packets_per_second=round(sent_packets, 2),
                    errors_per_second=round(errors, 3),
                )
                for interface, (received_bytes, sent_bytes, received_packets, sent_packets, errors) in rates(
                    before, self._before
                ).items()
            )
        }


def _read_network_counters(read_at: float) -> Counters:
    """The loopback is left out, and veth: a container host has hundreds, and their bridge counts the same bytes."""
    return Counters(
        read_at=read_at,
        totals={
            interface: (
                network.bytes_recv,
                network.bytes_sent,
                network.packets_recv,
                network.packets_sent,
                network.errin + network.errout + network.dropin + network.dropout,
            )
            for interface, network in psutil.net_io_counters(pernic=True, nowrap=False).items()
            if interface != "lo" and not interface.startswith("veth")
        },
    )
