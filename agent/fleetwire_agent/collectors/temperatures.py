"""Temperature sensors."""

import math

import psutil

from fleetwire_shared.messages import Temperature


def collect_temperatures() -> dict[str, tuple[Temperature, ...]]:
    """One entry for each sensor that has a reading; none in most containers and virtual machines.

    Source: psutil.sensors_temperatures(), which is /sys/class/hwmon and /sys/class/thermal."""
    return {
        "temperatures": tuple(
            Temperature(sensor=sensor, label=reading.label, celsius=round(reading.current, 1))
            for sensor, readings in psutil.sensors_temperatures().items()
            for reading in readings
            if math.isfinite(reading.current)
        )
    }
