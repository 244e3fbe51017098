"""What is measured. Each measure returns the rows it gives."""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scripts.lib.bench.fleet import BenchError, Fleet, Part

MIB = 1024 * 1024
LINE_BYTES = 110  # with its newline: a usual line of an access log
SENDERS = 8  # of many commands: as `xargs -P 8 curl` sends them


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    value: float
    unit: str
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything."""

    settle_seconds: float
    idle_seconds: float
    echoes: int
    commands: int
    file_bytes: int
    log_lines: int
    output_bytes: int


FULL = Sizes(
    settle_seconds=10,
    idle_seconds=30,
    echoes=200,
    commands=1000,
    file_bytes=1024 * MIB,
    log_lines=200_000,
    output_bytes=100_000_000,
)
QUICK = Sizes(
    settle_seconds=2,
    idle_seconds=5,
    echoes=20,
    commands=100,
    file_bytes=64 * MIB,
    log_lines=20_000,
    output_bytes=10_000_000,
)


def measure_start(fleet: Fleet, _: Sizes) -> list[Row]:
    return [
        Row("server: first start to answering", fleet.first_start_seconds, "s", "empty directory, to /api/health 200"),
        Row("server: start to answering", fleet.start_seconds, "s", "with a database, to /api/health 200"),
        Row("agent: start to online", fleet.online_seconds, "s", "to `online` in the API"),
    ]


def measure_idle(fleet: Fleet, sizes: Sizes) -> list[Row]:
    time.sleep(sizes.settle_seconds)
    parts = (fleet.server, fleet.agent)
    before = [part.cpu_seconds() for part in parts]
    started = time.monotonic()
    time.sleep(sizes.idle_seconds)
    seconds = time.monotonic() - started
    rows = []
    for part, cpu_before in zip(parts, before, strict=True):
        memory = part.memory()
        cpu_percent = 100 * (part.cpu_seconds() - cpu_before) / seconds
        rows += [
            Row(f"{part.name}: resident memory, idle", memory.rss_bytes / MIB, "MiB", "Rss of smaps_rollup"),
            Row(f"{part.name}: private memory, idle", memory.private_bytes / MIB, "MiB", "Private_* of smaps_rollup"),
            Row(f"{part.name}: CPU, idle", cpu_percent, "% of a core", f"over {seconds:.0f} s, metrics every 5 s"),
        ]
    return rows


def measure_echo(fleet: Fleet, sizes: Sizes) -> list[Row]:
    for _ in range(3):
        _run(fleet, "echo warm")
    seconds = [_timed(lambda: _run(fleet, "echo hello")) for _ in range(sizes.echoes)]
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    how = f"POST of `echo` to `end` on its stream, {sizes.echoes} in a row"
    return [Row("command: p50", cuts[49] * 1000, "ms", how), Row("command: p95", cuts[94] * 1000, "ms", how)]


def measure_many_commands(fleet: Fleet, sizes: Sizes) -> list[Row]:
    count = sizes.commands
    cpu_before = _read_cpu(fleet)
    alone_seconds = _timed(lambda: _run_many(fleet, count))
    cpu = [after - before for after, before in zip(_read_cpu(fleet), cpu_before, strict=True)]
    stuck = fleet.client.submit(fleet.agent_path, "sleep 3600", timeout=3600)
    try:
        beside_seconds = _timed(lambda: _run_many(fleet, count))
    finally:  # it would outlive its agent
        _expect(fleet.client.cancel(fleet.agent_path, stuck), "cancelled", "was the end of what hung")
    how = f"{count:,} of `echo` from {SENDERS} senders, first POST to last result stored"
    children = "its shell and runner; where systemd runs, of the runner only its launch"
    return [
        Row(f"{count:,} commands", alone_seconds, "s", how),
        Row(f"{count:,} commands", count / alone_seconds, "commands/s", how),
        Row(f"{count:,} commands beside one that hangs", beside_seconds, "s", how),
        Row(
            "command of many: server's CPU", 1000 * cpu[0] / count, "ms", "with the POST, and one viewer of all events"
        ),
        Row("command of many: agent's CPU", 1000 * cpu[1] / count, "ms", "without what it started"),
        Row("command of many: its own CPU", 1000 * cpu[2] / count, "ms", children),
    ]


def _run_many(fleet: Fleet, count: int) -> None:
    with fleet.client.watching_ends() as wait, ThreadPoolExecutor(SENDERS) as senders:
        sent = [senders.submit(fleet.client.submit, fleet.agent_path, f"echo {number}") for number in range(count)]
        wait(count)
        for each in sent:
            each.result()


def _read_cpu(fleet: Fleet) -> tuple[float, float, float]:
    return fleet.server.cpu_seconds(), fleet.agent.cpu_seconds(), fleet.agent.children_cpu_seconds()


def measure_files(fleet: Fleet, sizes: Sizes) -> list[Row]:
    source, dest = fleet.directory / "source", fleet.directory / "dest"
    _write_random(source, sizes.file_bytes)
    try:
        return [
            *_transfer(fleet, "download", sizes, lambda: fleet.client.download(fleet.agent_path, source)),
            *_transfer(fleet, "upload", sizes, lambda: fleet.client.upload(fleet.agent_path, source, dest)),
        ]
    finally:
        source.unlink()
        dest.unlink(missing_ok=True)


def _transfer(fleet: Fleet, name: str, sizes: Sizes, move: Callable[[], int]) -> list[Row]:
    moved: list[int] = []
    with fleet.server.watching_peak() as server_peak, fleet.agent.watching_peak() as agent_peak:
        seconds = _timed(lambda: moved.append(move()))
        peaks = {"server": server_peak(), "agent": agent_peak()}
    if moved != [sizes.file_bytes]:
        raise BenchError(f"{name}: {moved} bytes moved, not {sizes.file_bytes}")
    how = f"{sizes.file_bytes // MIB} MiB, digest checked" + (", synced to disk" if name == "upload" else "")
    rows = [Row(f"file {name}", sizes.file_bytes / seconds / 1e6, "MB/s", how)]
    for part, peak_bytes in peaks.items():
        rows.append(Row(f"file {name}: {part}'s peak", peak_bytes / MIB, "MiB", "VmHWM above VmRSS before it"))
    return rows


def measure_log(fleet: Fleet, sizes: Sizes) -> list[Row]:
    log = fleet.directory / "bench.log"
    _write_lines(log, sizes.log_lines + 1)
    status = log.stat()
    after = f"{status.st_dev}:{status.st_ino}:0"  # the first line, which is not sent again
    seconds = _timed(
        lambda: _expect(
            fleet.client.count_lines(fleet.agent_path, log, after, sizes.log_lines), sizes.log_lines, "lines"
        )
    )
    log.unlink()
    how = f"{sizes.log_lines} lines of {LINE_BYTES} bytes in a file, one viewer"
    return [Row("log stream", sizes.log_lines / seconds, "lines/s", how)]


def measure_output(fleet: Fleet, sizes: Sizes) -> list[Row]:
    line = "x" * (LINE_BYTES - 1)
    command = f"yes {line} | head -c {sizes.output_bytes}"
    seconds = _timed(lambda: _run(fleet, command, timeout=600))
    how = f"{sizes.output_bytes // 10**6} MB, POST to `end` on its stream"
    return [Row("command output", sizes.output_bytes / seconds / 1e6, "MB/s", how)]


MEASURES: tuple[Callable[[Fleet, Sizes], list[Row]], ...] = (
    measure_start,
    measure_idle,
    measure_echo,
    measure_many_commands,
    measure_files,
    measure_log,
    measure_output,
)


def check_parts(parts: Iterable[Part]) -> None:
    for part in parts:
        part.check()


def _run(fleet: Fleet, command: str, timeout: int = 30) -> None:
    _expect(fleet.client.run(fleet.agent_path, command, timeout), "succeeded", "was the command's end")


def _expect(value: object, wanted: object, what: str) -> None:
    if value != wanted:
        raise BenchError(f"{value} {what}, not {wanted}")


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _write_random(path: Path, size_bytes: int) -> None:
    block = os.urandom(16 * MIB)
    with path.open("wb") as file:
        for _ in range(size_bytes // len(block)):
            file.write(block)
        os.fsync(file.fileno())


def _write_lines(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number in range(count):
            file.write(f"{number:09d} ".ljust(LINE_BYTES - 1, "x") + "\n")
