"""The running part of scripts/demo: a server and an agent that dials it, until Ctrl-C or until either ends."""

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
DEFAULT_PORT = 8420
START_SECONDS = 60.0  # a small machine's first start, with migrations
STOP_SECONDS = 10.0
POLL_SECONDS = 0.2
LOG_LINES = 15
ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".demo"


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


class CallError(Exception):
    """The server refused a call, or did not answer (status 0)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Part:
    """One of the two processes."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"


def say(text: str) -> None:
    print(f"scripts/demo: {text}", flush=True)


def read_port(environment: Mapping[str, str]) -> int:
    text = environment.get("FLEETWIRE_DEMO_PORT", str(DEFAULT_PORT))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise DemoError(f"FLEETWIRE_DEMO_PORT must be a port from 1 to 65535, got {text!r}")
    return int(text)


def check_port_is_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: an ended demo is no obstacle
        try:
            probe.bind((HOST, port))
        except OSError as err:
            raise DemoError(
                f"cannot listen on {HOST}:{port}: {err.strerror}. Stop what listens there (another demo?), "
                f"or choose another port: FLEETWIRE_DEMO_PORT={port + 1 if port < 65535 else DEFAULT_PORT} scripts/demo"
            ) from err


def write_secret(path: Path, text: str) -> None:
    """Replace `path`; nobody but its owner can read it, at no time."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
    temporary.replace(path)


def read_or_make_password() -> str:
    path = HOME / "admin-password"
    if not path.exists():
        write_secret(path, secrets.token_urlsafe(15))
    return path.read_text().strip()


def call(method: str, url: str, *, token: str | None = None, body: object = None) -> Any:
    """Return the JSON answer. Raises CallError."""
    request = urllib.request.Request(url, method=method)
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    if body is not None:
        request.add_header("Content-Type", "application/json")
        request.data = json.dumps(body).encode()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this loopback
    try:
        with direct.open(request, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as err:
        with err:
            raise CallError(err.code, err.read().decode(errors="replace").strip()) from err
    except (OSError, ValueError) as err:
        raise CallError(0, str(err)) from err


@asynccontextmanager
async def running(name: str, arguments: list[str], environment: Mapping[str, str]) -> AsyncIterator[Part]:
    """Start a part, and stop it at the end, by force when it does not stop by itself."""
    log = HOME / f"{name}.log"
    # Ctrl-C reaches a whole session: in one of its own the part is stopped by us alone, in order. Killed by force,
    # we could stop nothing: then the kernel does.
    die_with_us = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *die_with_us,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        yield Part(name, process, log)
    finally:
        await stop(name, process)


async def stop(name: str, process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
        say(f"{name} stopped")
    except TimeoutError:
        process.kill()
        await process.wait()
        say(f"{name} did not stop within {STOP_SECONDS:.0f} s and was killed")


async def wait_until(is_true: Callable[[], Awaitable[bool]], what: str, *parts: Part) -> None:
    """Raises DemoError: it took too long, or a part ended meanwhile."""
    try:
        async with asyncio.timeout(START_SECONDS):
            while not await is_true():
                for part in parts:
                    if part.process.returncode is not None:
                        raise ended(part)
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError as err:
        tails = "\n".join(f"{part.name} said last ({part.log}):\n{part.log_tail()}" for part in parts)
        raise DemoError(f"{what} did not happen within {START_SECONDS:.0f} s.\n{tails}") from err


def ended(part: Part) -> DemoError:
    status = part.process.returncode
    return DemoError(
        f"the {part.name} ended by itself with status {status}. Its last lines ({part.log}):\n{part.log_tail()}"
    )


async def is_healthy(url: str) -> bool:
    try:
        await asyncio.to_thread(call, "GET", f"{url}/api/health")
    except CallError:
        return False
    return True


async def is_online(agent_url: str, token: str) -> bool:
    agent = await asyncio.to_thread(call, "GET", agent_url, token=token)
    return agent["status"] == "online" and agent["metrics"] is not None


async def log_in(url: str, password: str) -> str:
    body = {"username": "admin", "password": password}
    try:
        answer = await asyncio.to_thread(call, "POST", f"{url}/api/login", body=body)
    except CallError as err:
        raise DemoError(
            f"could not log in with the password of {HOME / 'admin-password'}: {err}\n"
            f"If it was changed meanwhile, remove {HOME} to start afresh."
        ) from err
    return str(answer["token"])


async def read_or_enrol_agent(url: str, token: str) -> str:
    """Return the agent's id; its key is in .demo/agent.key afterwards."""
    path = HOME / "agent.key"
    if path.exists():
        agent_id = "agent_" + path.read_text().split("_")[1]
        try:
            await asyncio.to_thread(call, "GET", f"{url}/api/agents/{agent_id}", token=token)
        except CallError as err:
            if err.status != 404:
                raise
        else:
            return agent_id
    label = socket.gethostname()
    say(f"enrolling this machine as {label}")
    body = {"label": label, "tags": ["demo"]}
    answer = await asyncio.to_thread(call, "POST", f"{url}/api/agents", token=token, body=body)
    write_secret(path, answer["key"])
    return str(answer["agent_id"])


def welcome(url: str, password: str, token: str, agent_id: str) -> str:
    authorization = f"-H 'Authorization: Bearer {token}'"
    command = '{"type": "shell", "params": {"command": "df -h", "timeout": 30}}'
    return f"""
Fleetwire runs: {url}
Login:          admin
Password:       {password}
API reference:  {url}/api/docs
Logs:           {HOME}/server.log, {HOME}/agent.log

List the agents:
curl -s {authorization} {url}/api/agents

Run a command:
curl -s {authorization} -H 'Content-Type: application/json' -d '{command}' {url}/api/agents/{agent_id}/commands

Follow the metrics:
curl -sN '{url}/api/agents/{agent_id}/stream/metrics?token={token}'

Ctrl-C stops both.
"""


async def run_demo() -> None:
    """Run until cancelled. Raises DemoError."""
    port = read_port(os.environ)
    check_port_is_free(port)
    HOME.mkdir(mode=0o700, exist_ok=True)
    password = read_or_make_password()
    url = f"http://{HOST}:{port}"
    scripts = Path(sys.prefix) / "bin"
    serve = [
        str(scripts / "fleetwire-server"),
        "serve",
        "--listen",
        f"{HOST}:{port}",
        "--data-dir",
        str(HOME / "server"),
    ]
    say(f"starting the server on {url}")
    async with running("server", serve, os.environ | {"FLEETWIRE_ADMIN_PASSWORD": password}) as server:
        await wait_until(lambda: is_healthy(url), "the server's answer", server)
        token = await log_in(url, password)
        agent_id = await read_or_enrol_agent(url, token)
        run = [str(scripts / "fleetwire-agent"), "run", "--server", url, "--key-file", str(HOME / "agent.key")]
        say("starting the agent")
        async with running("agent", [*run, "--state-dir", str(HOME / "agent")], os.environ) as agent:
            agent_url = f"{url}/api/agents/{agent_id}"
            await wait_until(lambda: is_online(agent_url, token), "the agent's coming online", server, agent)
            print(welcome(url, password, token, agent_id), flush=True)
            raise await first_to_end(server, agent)


async def first_to_end(*parts: Part) -> DemoError:
    """Wait until one part ends, and return what to say about it."""
    while True:
        for part in parts:
            if part.process.returncode is not None:
                return ended(part)
        await asyncio.sleep(POLL_SECONDS)


async def run_until_signalled() -> int:
    """Return the exit status. The signals that stop a program are an orderly end; a second one changes nothing."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    is_stopping = False

    def stop_once() -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            say("stopping")
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop_once)
    try:
        await run_demo()
    except asyncio.CancelledError:
        say("both are stopped")
    except (DemoError, CallError) as err:
        say(str(err))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(run_until_signalled()))
