"""The command line of scripts/bench."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from scripts.lib.bench.client import CallError
from scripts.lib.bench.fleet import BenchError, running_fleet
from scripts.lib.bench.measures import FULL, MEASURES, QUICK, Row, Sizes, check_parts


def main() -> int:
    arguments = _parse_arguments()
    signal.signal(signal.SIGTERM, _stop)
    sizes = QUICK if arguments.quick else FULL
    environment = read_environment()
    say("measuring " + ", ".join(f"{name} {value}" for name, value in environment.items()))
    try:
        rows = measure_all(sizes)
    except (BenchError, CallError, OSError) as err:
        say(str(err))
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130
    print_table(rows)
    if arguments.json is not None:
        document = {"measured_at": time.time(), "quick": arguments.quick, "environment": environment}
        arguments.json.write_text(json.dumps(document | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")
        say(f"written: {arguments.json}")
    return 0


def measure_all(sizes: Sizes) -> list[Row]:
    """Return all rows. Whatever was started and written for them is gone afterwards."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fleetwire-bench-") as name:
        directory = Path(name)
        needed_bytes = 3 * sizes.file_bytes  # a file, its copy, and room for a database
        if shutil.disk_usage(directory).free < needed_bytes:
            raise BenchError(f"{directory.parent} needs {needed_bytes >> 20} MiB free; TMPDIR names another place")
        with running_fleet(directory) as fleet:
            for measure in MEASURES:
                say(measure.__name__.replace("_", " "))
                rows += measure(fleet, sizes)
                check_parts((fleet.server, fleet.agent))
    return rows


def read_environment() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("fleetwire", "aiohttp", "websockets")}
    return {
        "commit": _read_commit(),
        "python": platform.python_version(),
        **versions,
        "sqlite": sqlite3.sqlite_version,
        "kernel": platform.release(),
        "cpu": f"{os.cpu_count()} x {_read_cpu_model()}",
        "load": f"{os.getloadavg()[0]:.2f}",  # what else the machine did
    }


def _read_commit() -> str:
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def _read_cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def print_table(rows: Sequence[Row]) -> None:
    """Print with rich where it is installed and a person reads it, else as aligned text."""
    cells = [(row.what, _format(row.value), row.unit, row.how) for row in rows]
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table("what", "value", "unit", "how")
            table.columns[1].justify = "right"
            for cell in cells:
                table.add_row(*cell)
            Console().print(table)
            return
    widths: Mapping[int, int] = {index: max(len(cell[index]) for cell in cells) for index in range(3)}
    for what, value, unit, how in cells:
        print(f"{what:<{widths[0]}}  {value:>{widths[1]}} {unit:<{widths[2]}}  {how}")


def _format(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def say(text: str) -> None:
    print(f"scripts/bench: {text}", file=sys.stderr, flush=True)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure a server and an agent on this machine.")
    parser.add_argument("--quick", action="store_true", help="less of everything: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
