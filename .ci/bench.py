#!/usr/bin/env python3
"""bench.py [ROUNDS]: what the proxy costs beside no proxy, both measured in the same run.

A fake Z.ai, the proxy and the load are a process each. The same load goes to the fake itself
and through the proxy; the table shows the medians of three rounds. The proxy's own CPU time
is the figure to trust on a busy machine. It and the memory are read from /proc; on systems
without that they are shown as nan. Needs what the tests need (pytest).
"""

import asyncio
import collections
import contextlib
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from test_ztoapi import DONE, END, FINISH, HEAD, KEY, ZAI_KEY, chat_body, chunked, raw_chat, say

PROXY = os.path.join(ROOT, "ztoapi.py")
DIRECT_PATH = b"/api/paas/v4/"
PROXY_PATH = b"/v1/"


class Scene(NamedTuple):
    """A load: so many connections at once, each with so many requests, one after the other."""

    connections: int
    requests: int
    chunks: int
    pause_ms: int = 0
    streamed: bool = True


FIRST_TOKEN = Scene(connections=1, requests=150, chunks=3)
FLOOD = Scene(connections=16, requests=5, chunks=500)
PACED = Scene(connections=200, requests=1, chunks=60, pause_ms=50)
JSON_ANSWERS = Scene(connections=8, requests=60, chunks=3, streamed=False)


# The fake Z.ai

async def serve_connection(reader, writer):
    """Answer requests for the model "bench-CHUNKS-MS": so many chunks, so far apart.

    Each chunk says at which moment, in nanoseconds of the monotonic clock, it was sent.
    """
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head).group(1)
            body = await reader.readexactly(int(length))
            chunks, pause_ms = map(int, re.search(rb"bench-(\d+)-(\d+)", body).groups())
            writer.write(HEAD)
            # Without a pause twenty at a time: the fake should not be what is measured.
            batch = 1 if pause_ms else 20
            for done in range(0, chunks, batch):
                count = min(batch, chunks - done)
                data = [chunked(say(f"{time.monotonic_ns()} ")) for _ in range(count)]
                writer.write(b"".join(data))
                await writer.drain()
                if pause_ms:
                    await asyncio.sleep(pause_ms / 1000)
            writer.write(chunked(FINISH) + chunked(DONE) + END)
    writer.close()


async def serve_fake(port):
    server = await asyncio.start_server(serve_connection, "127.0.0.1", port, backlog=512)
    await server.serve_forever()


# The load

async def load_connection(port, path, scene):
    """(seconds to each request's first token, seconds of delay of each chunk)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    model = f"bench-{scene.chunks}-{scene.pause_ms}"
    request = raw_chat(chat_body(model=model, stream=scene.streamed)).replace(b"/v1/", path)
    end = END if scene.streamed else b"}"
    firsts = []
    delays = []
    for number in range(scene.requests):
        began = time.monotonic_ns()
        writer.write(request)
        tail = b""
        while not tail.endswith(end):
            data = await reader.read(65536)
            now = time.monotonic_ns()
            if not data:
                raise ConnectionError(f"the answer was cut behind {tail!r}")
            stamps = re.findall(rb"(\d{12,}) ", data)
            if stamps and len(firsts) == number:
                firsts.append((now - began) / 1e9)
            delays += [(now - int(stamp)) / 1e9 for stamp in stamps]
            tail = (tail + data)[-100:]
    writer.close()
    return firsts, delays


async def load_all(port, path, scene):
    calls = [load_connection(port, path, scene) for _ in range(scene.connections)]
    return await asyncio.gather(*calls)


class Result(NamedTuple):
    firsts: list
    delays: list
    seconds: float


def run(port, path, scene):
    began = time.monotonic()
    results = asyncio.run(load_all(port, path, scene))
    seconds = time.monotonic() - began
    firsts = [first for firsts, _ in results for first in firsts]
    delays = [delay for _, delays in results for delay in delays]
    return Result(firsts, delays, seconds)


# The figures

def cpu_seconds(process):
    try:
        with open(f"/proc/{process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mb(process):
    try:
        with open(f"/proc/{process.pid}/status") as file:
            return int(re.search(r"VmHWM:\s+(\d+)", file.read()).group(1)) / 1024
    except OSError:
        return float("nan")


def percentile(values, percent):
    return sorted(values)[int((len(values) - 1) * percent / 100)]


def added_ms(ours, direct, percent):
    return (percentile(ours, percent) - percentile(direct, percent)) * 1000


def measure(zai_port, proxy_port, process):
    """One round: (name, value) of each row of the table."""
    direct = run(zai_port, DIRECT_PATH, FIRST_TOKEN)
    ours = run(proxy_port, PROXY_PATH, FIRST_TOKEN)
    yield "time to first token, added: p50, ms", added_ms(ours.firsts, direct.firsts, 50)
    yield "time to first token, added: p95, ms", added_ms(ours.firsts, direct.firsts, 95)
    for name, scene in (("flood", FLOOD), ("paced", PACED)):
        chunks = scene.connections * scene.requests * scene.chunks
        direct = run(zai_port, DIRECT_PATH, scene)
        before = cpu_seconds(process)
        ours = run(proxy_port, PROXY_PATH, scene)
        each_us = (cpu_seconds(process) - before) / chunks * 1e6
        yield f"{name}, {scene.connections} streams: CPU us a chunk", each_us
        if scene.pause_ms:
            yield f"{name}: p99 of added delay, ms", added_ms(ours.delays, direct.delays, 99)
            yield f"{name}: peak RSS, MB", peak_mb(process)
        else:
            yield f"{name}: chunks/s through the proxy", chunks / ours.seconds
            yield f"{name}: chunks/s without it", chunks / direct.seconds
    answers = JSON_ANSWERS.connections * JSON_ANSWERS.requests
    before = cpu_seconds(process)
    ours = run(proxy_port, PROXY_PATH, JSON_ANSWERS)
    each_ms = (cpu_seconds(process) - before) / answers * 1000
    yield f"JSON answers, {JSON_ANSWERS.connections} clients: requests/s", answers / ours.seconds
    yield "JSON answers: CPU ms each", each_ms


# The processes

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def wait_until_it_listens(port, process):
    """The seconds it took."""
    began = time.monotonic()
    while process.poll() is None and time.monotonic() < began + 20:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return time.monotonic() - began
        time.sleep(0.002)
    raise SystemExit(f"nobody listens on port {port}")


@contextlib.contextmanager
def running(port, *argv, **environ):
    """(process, seconds until it listened)"""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *argv], env=dict(os.environ, **environ), **quiet)
    try:
        yield process, wait_until_it_listens(port, process)
    finally:
        process.terminate()
        process.wait(10)


def bench(rounds):
    zai_port = free_port()
    proxy_port = free_port()
    environ = {
        "PORT": str(proxy_port),
        "HOST": "127.0.0.1",
        "DEFAULT_KEY": KEY,
        "ZAI_API_KEY": ZAI_KEY,
        "ZAI_BASE_URL": f"http://127.0.0.1:{zai_port}/api/paas/v4",
        "NO_PROXY": "127.0.0.1",
    }
    rows = collections.defaultdict(list)
    with running(zai_port, __file__, "zai", str(zai_port)):
        with running(proxy_port, PROXY, **environ) as (process, start_s):
            for _ in range(rounds):
                for name, value in measure(zai_port, proxy_port, process):
                    rows[name].append(value)
    for name, values in rows.items():
        print(f"{name:48} {statistics.median(values):10.2f}")
    print(f"{'start to first connection, s':48} {start_s:10.2f}")


def main(argv):
    if argv[:1] == ["zai"]:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        asyncio.run(serve_fake(int(argv[1])))
    else:
        bench(int(argv[0]) if argv else 3)


if __name__ == "__main__":
    main(sys.argv[1:])
