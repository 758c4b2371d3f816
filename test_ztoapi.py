"""Tests of ztoapi: `python -m pytest`. `.ci/` holds the benchmark, the soak test and the page in a browser.

First come the fakes, the raw client and the proxy under test, then a section for each of
ztoapi.py's. The pure parts are tested by tables; the rest through real sockets, against a
fake Z.ai whose every answer is a script: a list of what it sends, sleeps and does. Z.ai's
bytes are as they were captured (see each case). The comment above a table says what its rows
hold: to add a case, add a row.
"""

import ast
import base64
import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import gzip
import hashlib
import http.client
import io
import itertools
import json
import logging
import os
import random
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.parse
import urllib.request
import weakref
from pathlib import Path
from typing import NamedTuple

import pytest

import ztoapi
from ztoapi import ApiError, RequestError, Settings, SSEDecoder, Step, UpstreamError, zai_error

GIVE_UP, KEY_RESTS, MODEL_RESTS = ztoapi.GIVE_UP, ztoapi.KEY_RESTS, ztoapi.MODEL_RESTS
OVERLOAD, TOO_FAST, TOO_MANY, TRY_AGAIN = ztoapi.OVERLOAD, ztoapi.TOO_FAST, ztoapi.TOO_MANY, ztoapi.TRY_AGAIN
HERE = Path(__file__).resolve().parent
PROGRAM = Path(ztoapi.__file__).read_text("utf-8")
README = (HERE / "README.md").read_text("utf-8")
KEY = "sk-Test-9876543210"
ZAI_KEY = "0123456789abcdef0123.ZaiSecretZaiSecret"
CHAT = "/v1/chat/completions"
LONG_S = 120  # Nothing takes that long on a machine however slow and busy: who waits to the end of it hangs.


# The fake Z.ai ########################################################################
#
# A script is a list: bytes are sent, numbers are seconds slept, threading's Events are waited for, callables are called
# with the fake and the request, and two words end the connection. What must have happened before a step is waited for,
# not slept for: any thread may stand still at any time.

RESET, CLOSE = "reset", "close"
def counts(prompt, completion, total, cached=0, reasoning=0):
    """A usage object."""
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning}}


USAGE = counts(28, 185, 213, 0, 182)
LOG_ID = "20260711073209851e7f8c12c44579"


def sse(*values):
    """Values as events; bytes are passed as they are."""
    texts = [value if isinstance(value, bytes) else b"data: %b\n\n" % json.dumps(value).encode() for value in values]
    return b"".join(texts)


def event(delta=None, finish=None, usage=None, id="202607311536357f405a2f5c6b495d", **more):
    """One SSE event in Z.ai's dialect: no finish_reason until the end, no object key order of OpenAI's."""
    choice = {"index": 0, "delta": delta}
    if finish:
        last = {"role": "assistant", "content": ""} if delta is None else delta
        choice = {"index": 0, "finish_reason": finish, "delta": last}
    value = {"id": id, "created": 1785483395, "object": "chat.completion.chunk", "model": "glm-5.2"}
    value.update({"choices": [choice]}, **more)
    if usage:
        value["usage"] = usage
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def say(text):
    return event({"role": "assistant", "content": text})

def think(text):
    return event({"role": "assistant", "reasoning_content": text})

def call(name="get_weather", arguments='{"city":"Paris"}', id="call_438b313737df40b7b2972a81", index=0):
    function = {"name": name, "arguments": arguments}
    return event({"tool_calls": [{"id": id, "index": index, "type": "function", "function": function}]})


FINISH = event(finish="stop", usage=USAGE)
DONE = b"data: [DONE]\n\n"
HEALTHY = (think("The"), think(" user"), say("Hel"), say("lo"), FINISH, DONE)
HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream;charset=UTF-8\r\nX-Log-Id: %b\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" % LOG_ID.encode())
END = b"0\r\n\r\n"


def chunked(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def stream(*events, end=True):
    """A script: a streamed answer, an event a chunk, as Z.ai sends it."""
    steps = [chunked(step) if isinstance(step, bytes) else step for step in events]
    return [HEAD, *steps] + ([END] if end else [])


def answer(status, value, *headers):
    """A script: a whole answer."""
    body = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
    kind = "text/html" if body.startswith(b"<") else "application/json; charset=UTF-8"
    lines = (f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(body)}", f"X-Log-Id: {LOG_ID}")
    return [("\r\n".join([*lines, *headers]) + "\r\n\r\n").encode() + body]


def complaint(code, message="no", **more):
    """The JSON of Z.ai's errors."""
    return {"error": {"code": code, "message": message}, **more}

def refusal(status, code, message="no", *headers):
    return answer(status, complaint(code, message), *headers)

def error_event(code, message="no", **more):
    return sse(complaint(code, message, **more))


LIMITED = complaint("1302", "Rate limit reached for requests")
NETWORK = complaint("1234", "Network error")


def make_reset(sock):
    """Whatever closes the socket next resets the connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

def reset(sock):
    make_reset(sock)
    sock.close()

def shut_down(sock):
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)

def readable(sock, within_s=0):
    return bool(select.select([sock], [], [], within_s)[0])


class Listener:
    """A server at `port`: serve() is called with each connection, in a thread of its own."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.serve, args=self.socket.accept()[:1], daemon=True).start()

    def close(self):
        shut_down(self.socket)  # wakes accept()
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class FakeZai(Listener):
    """Plays `scripts`, one a request, then `default` for ever. `limit`: more requests in flight get a 1302."""

    def __init__(self, pem=None):
        self.tls = pem and ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if pem:
            self.tls.load_cert_chain(pem)
        self.scripts = collections.deque()
        self.default = stream(*HEALTHY)
        self.limit = None
        self.lock = threading.Lock()
        self.requests = []
        self.connections = self.cut_by_client = self.in_flight = 0
        self.open = set()
        super().__init__()
        origin = f"https://localhost:{self.port}" if pem else f"http://127.0.0.1:{self.port}"
        self.url = origin + "/api/paas/v4"

    def serve(self, sock):
        self.connections += 1
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
            self.open.add(sock)
            with sock, sock.makefile("rb") as file:
                while self.one(sock, file):
                    pass
        self.open.discard(sock)

    def one(self, sock, file):
        """Answer one request; true if another may come."""
        line = file.readline()
        headers = http.client.parse_headers(file)
        size = int(headers.get("Content-Length", 0))
        body = file.read(size)
        if not line or len(body) < size:
            return False
        method, path, _ = line.decode().split()
        request = {"method": method, "path": path, "headers": headers, "body": json.loads(body) if body else None}
        with self.lock:
            self.requests.append(request)
            self.in_flight += 1
            script = self.scripts.popleft() if self.scripts else self.default
            if self.limit is not None and self.in_flight > self.limit:
                script = answer(429, LIMITED)
        try:
            return self.play(sock, script(request) if callable(script) else script, request)
        finally:
            with self.lock:
                self.in_flight -= 1

    def play(self, sock, script, request):
        for step in script:
            if step == RESET:
                make_reset(sock)
                return False
            if step == CLOSE:
                return False
            if callable(step):
                step(self, request)
            elif isinstance(step, threading.Event):
                step.wait(LONG_S)
            elif isinstance(step, bytes):
                try:
                    sock.sendall(step)
                except OSError:
                    self.cut_by_client += 1
                    raise
            elif readable(sock, step):
                self.cut_by_client += 1  # as no request comes before its answer
                return False
        return True

    def close(self):
        super().close()
        for sock in list(self.open):
            shut_down(sock)


@pytest.fixture
def zai():
    with FakeZai() as fake:
        yield fake


@pytest.fixture
def go(zai):
    """Z.ai says "Hel", and "lo" once this is set."""
    event = threading.Event()
    zai.default = stream(say("Hel"), event, say("lo"), FINISH, DONE)
    return event


@contextlib.contextmanager
def stuck_listener():
    """The port of a listener whose backlog is full: connecting to it takes for ever."""
    with socket.socket() as listener, contextlib.ExitStack() as filling:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            sock = filling.enter_context(socket.socket())
            sock.settimeout(0.2)
            try:
                sock.connect(listener.getsockname())
            except OSError:
                break
        else:
            pytest.skip("this system's backlog does not fill")
        yield listener.getsockname()[1]


class MuteListener(Listener):
    """Takes connections, says `words` once something has come, and nothing else. `heard`, `ended`: what happened."""

    def __init__(self, words=b""):
        self.words = words
        self.heard = threading.Event()
        self.ended = threading.Event()
        super().__init__()

    def serve(self, sock):
        with sock, contextlib.suppress(ConnectionError):
            while sock.recv(65536):
                self.heard.set()
                sock.sendall(self.words)
        self.ended.set()


# Of nobody but these tests: "localhost", until 2120.
PEM = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg+b686Zt74WM/8gbS
kV/HJGf//29GodU3LUl+ciTg9O6hRANCAAQ5w+XOmVw88pJipFzjdFEWbofTLbgr
AoTh9LNTykRggRZkqrEBSo/1OLA/wSOM4PeLQOT/+7QZqCkZTuURPYjq
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBcTCCARegAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABDnD5c6ZXDzykmKk
XON0URZuh9MtuCsChOH0s1PKRGCBFmSqsQFKj/U4sD/BI4zg94tA5P/7tBmoKRlO
5RE9iOqjWDBWMBQGA1UdEQQNMAuCCWxvY2FsaG9zdDAPBgNVHRMBAf8EBTADAQH/
MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4EFgQU+swHuFhZz2sSVKo4ybaB3QEWvC4w
CgYIKoZIzj0EAwIDSAAwRQIgH8ZcK3zBu34C2IgxX4q+HHMp6GO3ZxWX3MQVddbc
OAkCIQCFRQOQ04IE+Ld+SfS+Ln+mC5ggbJA3uOySyvYj47SiwQ==
-----END CERTIFICATE-----
"""


class HttpProxy(Listener):
    """An HTTP proxy: CONNECT, and plain requests passed on. `heads`: the first head of each connection."""

    def __init__(self, reply=b"HTTP/1.1 200 Connection established\r\n\r\n"):
        self.heads = []
        self.reply = reply
        super().__init__()
        self.url = f"http://127.0.0.1:{self.port}"

    def serve(self, client):
        with client, contextlib.suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                more = client.recv(65536)
                if not more:
                    return
                data += more
            head = data.partition(b"\r\n\r\n")[0].decode()
            self.heads.append(head)
            method, target, _ = head.split("\r\n")[0].split()
            place = urllib.parse.urlsplit(target if method != "CONNECT" else f"//{target}")
            if method == "CONNECT":
                client.sendall(self.reply)
                data = b""
            if b" 200 " in self.reply:
                self.pass_on(client, place, data)

    def pass_on(self, client, place, data):
        with socket.create_connection((place.hostname, place.port)) as server:
            server.sendall(data)
            back = threading.Thread(target=self.copy, args=(server, client), daemon=True)
            back.start()
            self.copy(client, server)
            back.join(LONG_S)

    @staticmethod
    def copy(source, sink):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                sink.sendall(data)
        shut_down(source)
        shut_down(sink)


@pytest.fixture
def http_proxy():
    with HttpProxy() as proxy:
        yield proxy


@pytest.fixture
def trusted(monkeypatch, tmp_path):
    """A fake Z.ai with TLS, whose certificate SSL_CERT_FILE vouches for."""
    pem = tmp_path / "zai.pem"  # certificate, key and store at once
    pem.write_text(PEM)
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    with FakeZai(pem) as fake:
        yield fake


@pytest.fixture
def untrusted(trusted, monkeypatch):
    """The same, but nobody vouches for it."""
    monkeypatch.delenv("SSL_CERT_FILE")
    return trusted


def through(monkeypatch, scheme, proxy, no_proxy=""):
    """Set the environment's proxy for a scheme, and no other."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, False)
        monkeypatch.delenv(name.lower(), False)
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", no_proxy)


@pytest.fixture
def closed_port():
    """Nobody listens there, nor can anybody else."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


# The raw client #######################################################################
#
# Bytes in, replies out. exchange() sends one request more behind what it is given, the sentinel: a good request must
# leave it to be answered, a broken one must never let it be.

SENTINEL = b"GET /health?last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
LAST = "Connection: close"


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes
    clean: bool = True  # the body came to its end

    def json(self):
        return json.loads(self.body.decode())

    def error(self):
        return self.json()["error"]


def raw_request(method, path, *lines, body=b"", auth=True, version="HTTP/1.1"):
    """The bytes of a request. `lines` are further header lines; one that tells the host or the body's length replaces
    ours. `auth`: True, another key, or False."""
    head = [f"{method} {path} {version}"]
    names = [line.partition(":")[0].lower() for line in lines]
    if "host" not in names:
        head.append("Host: localhost")
    if auth:
        head.append(f"Authorization: Bearer {KEY if auth is True else auth}")
    if body and not {"content-length", "transfer-encoding"} & set(names):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, *lines, "", ""]).encode("latin-1") + body


def raw_chat(body, *lines, **more):
    """The same of a chat; its body is JSON, or bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return raw_request("POST", CHAT, *lines, body=data, **more)


def raw_chunks(*pieces):
    """The same of a chat whose body is said to be chunked."""
    return raw_chat(b"".join(pieces), "Transfer-Encoding: chunked")


def read_reply(file, to_head=False):
    """One response from a file, None at its end. `to_head`: it answers a HEAD request, so it has no body."""
    line = file.readline()
    if not line:
        return None
    assert line.startswith(b"HTTP/1.1 "), line
    status = int(line.split()[1])
    headers = http.client.parse_headers(file)
    if to_head or status in (100, 204):
        return Reply(status, headers, b"")
    if headers.get("Transfer-Encoding") == "chunked":
        return Reply(status, headers, *read_chunked(file))
    size = int(headers.get("Content-Length", -1))
    body = file.read(size)
    return Reply(status, headers, body, size in (-1, len(body)))


def read_chunked(file):
    """(body, whether its end came)."""
    decoder = ztoapi.Dechunker()
    body = b""
    with contextlib.suppress(OSError):
        while not decoder.done:
            data = file.readline()
            if not data:
                break
            body += decoder.feed(data)
    return body, decoder.done


def next_reply(sock):
    with sock.makefile("rb") as file:
        return read_reply(file)

def see(sock, pattern):
    """Wait until what has come, none of which is taken, matches."""
    assert eventually(lambda: re.search(pattern, sock.recv(1 << 16, socket.MSG_PEEK), re.DOTALL))

def read_to_end(sock):
    """All bytes until the other side closes. A socket.timeout is a hang and fails the test, as does a reset."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def replies_in(data, *heads):
    """All responses in `data`; `heads`: the positions of those that answer HEAD requests."""
    file, found = io.BytesIO(data), []
    for reply in iter(lambda: read_reply(file, len(found) in heads), None):
        found.append(reply)
    return found


def connect(server, data=b""):
    """A connection to what listens on `server.port`, over which `data` has been sent."""
    sock = socket.create_connection(("127.0.0.1", server.port), LONG_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(data)
    return sock


def talk(server, data):
    """All bytes that come back for `data`."""
    with connect(server, data) as sock:
        return read_to_end(sock)


def exchange(proxy, data, *heads):
    """The replies to `data` and to the sentinel behind it."""
    return replies_in(talk(proxy, data + SENTINEL), *heads)

def statuses(proxy, data, *heads):
    return [reply.status for reply in exchange(proxy, data, *heads)]


def read_stream(sock):
    """(status, headers, events, clean) of the answer on a raw socket, which may be an error with a JSON body."""
    reply = next_reply(sock)
    events = events_in(reply.body) if "event-stream" in reply.headers["Content-Type"] else [reply.json()]
    return reply.status, reply.headers, events, reply.clean


def events_in(body):
    """The events of a chat stream, parsed, "[DONE]" and all."""
    blocks = [block for block in body.decode().split("\n\n") if block]
    assert [block for block in blocks if not block.startswith("data: ") or "\n" in block] == []
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


def choices_of(events):
    return [event["choices"][0] for event in events if isinstance(event, dict) and event.get("choices")]

def said(events, field="content"):
    """The text of a stream's deltas."""
    return "".join(choice["delta"].get(field) or "" for choice in choices_of(events))

def finish_of(events):
    return [choice["finish_reason"] for choice in choices_of(events) if choice["finish_reason"]]


# The proxy under test #################################################################

def user(content):
    return {"role": "user", "content": content}

def chat_body(**fields):
    return {"model": "GLM-4.6", "messages": [user("Hi")], **fields}

def json_chat(**fields):
    return json.dumps(chat_body(**{"stream": False, **fields})).encode()


JSON_CHAT = json_chat()


def eventually(condition, seconds=LONG_S):
    pause_s, deadline = 0.0005, time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(0.01, 2 * pause_s)
    return True


def together(*calls):
    """Run the calls in threads of their own; their results, in order."""
    results = [None] * len(calls)

    def run(i):
        results[i] = calls[i]()
    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LONG_S)
    return results


MESSAGES_BODY = {"model": "GLM-4.6", "max_tokens": 100, "messages": [user("Hi")]}
# To add an API, add a row: its name -> its path, a request.
APIS = {
    "chat": (CHAT, chat_body()), "messages": ("/v1/messages", MESSAGES_BODY),
    "responses": ("/v1/responses", {"model": "GLM-4.6", "input": "Hi"}),
}
each_api = pytest.mark.parametrize("api", ("messages", "responses"))


def api_request(api, streamed, *lines, auth=True, **fields):
    path, body = APIS[api]
    data = json.dumps(dict(body, stream=streamed, **fields)).encode()
    return raw_request("POST", path, *lines, body=data, auth=auth)


class Proxy:
    """A ztoapi.Server in a thread, and the calls tests make to it."""

    def __init__(self, environ):
        self.settings = Settings.from_environ(environ)
        self.server = ztoapi.Server(self.settings)
        self.server.SETTLE_S = 0  # what was sent before the end has a test of its own
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.005,), daemon=True)
        self.thread.start()
        assert eventually(self.server.pump.thread.is_alive), "threads are counted from here on"

    def call(self, method, path, body=None, lines=(), key=KEY):
        """(status, headers, parsed JSON or text) over a connection of its own. `lines` are header lines, as in
        raw_request()."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
        with connect(self, raw_request(method, path, *lines, body=data, auth=key or False)) as sock:
            reply = next_reply(sock)
        assert reply.clean
        is_json = "json" in reply.headers.get("Content-Type", "") and reply.body
        return reply.status, reply.headers, reply.json() if is_json else reply.body.decode()

    def chat(self, lines=(), **fields):
        """A JSON answer: (status, headers, body)."""
        return self.call("POST", CHAT, chat_body(**{"stream": False, **fields}), lines)

    def open_stream(self, lines=(), **fields):
        """A raw socket with a streamed request sent; read it with read_stream() or recv()."""
        return connect(self, raw_chat(chat_body(stream=True, **fields), *lines))

    def stream(self, lines=(), **fields):
        """A whole streamed answer: (status, headers, events, clean). clean: the last chunk came."""
        with self.open_stream(lines, **fields) as sock:
            return read_stream(sock)

    def idle(self):
        """Nothing is in use any more: waits for it, as handler threads end a moment after their answers."""
        return eventually(self.is_idle) or pytest.fail("still in use")

    def is_idle(self):
        """No request, no queue, nothing in flight at Z.ai."""
        busy = ztoapi.BUSY in list(self.server.connections.values())
        return not (busy or self.server.pump.clients or self.server.pump.relays or slots(self) or self.queued())

    def tune(self, **settings):
        """Have the pump go by these settings from now on, and else by those of the start."""
        self.server.pump.settings = dataclasses.replace(self.settings, **settings)

    def gates(self):
        """A row for each gate: (key, model, ceiling, requests in flight)."""
        return self.server.upstream.gates.state()[0]

    def queued(self):
        return sum(self.server.upstream.gates.state()[1].values())

    def close_idle(self):
        """Close the idle connections to Z.ai."""
        self.server.upstream.pool.expire(float("inf"))

    def quiet(self):
        """No connection is left: the line of a request that could not be read comes after its answer has ended, and
        must not come into the next test."""
        return eventually(lambda: not self.server.connections) or pytest.fail("a connection is left")

    def stop(self):
        self.server.stop(2)
        self.thread.join(LONG_S)
        self.quiet()


@contextlib.contextmanager
def proxying(zai=None, **environ):
    """A proxy in front of `zai`; afterwards it must be idle. Environment variables as keywords."""
    url = zai.url if zai else "http://127.0.0.1:9/api/paas/v4"
    base = {"PORT": "0", "DEFAULT_KEY": KEY, "ZAI_API_KEY": ZAI_KEY, "ZAI_BASE_URL": url}
    proxy = Proxy({**base, **environ})
    try:
        yield proxy
        proxy.idle()
    finally:
        proxy.stop()


@pytest.fixture
def log_lines(caplog):
    """log_lines(): the messages of the log so far; with a level, only those of it."""
    caplog.set_level(logging.INFO, "ztoapi")
    caplog.clear()

    def lines(level=None):
        ours = [record for record in caplog.records if record.name == "ztoapi"]
        return [record.getMessage() for record in ours if level in (None, record.levelno)]
    return lines


def descriptors():
    """What is open, where the system tells."""
    found = set()
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def footprint(proxy):
    """Threads and descriptors; idle connections to Z.ai are closed here."""
    proxy.close_idle()
    return {*threading.enumerate(), *descriptors()}


@contextlib.contextmanager
def strict_proxy(zai=None, **environ):
    """A proxy that must leak no slots, descriptors or threads. Chance is out of it: retries wait no time, refused
    requests the shortest."""
    with proxying(zai, **environ) as proxy:
        proxy.server.upstream.gates.rand = lambda: 0.0
        before = footprint(proxy)
        yield proxy
        proxy.idle()
        assert eventually(lambda: footprint(proxy) <= before), footprint(proxy) - before


@pytest.fixture
def proxy(zai):
    with strict_proxy(zai) as proxy:
        yield proxy

@pytest.fixture
def brisk(monkeypatch):
    """The pump looks often, for tests of the times it keeps."""
    assert ztoapi.TICK_S <= 0.25
    monkeypatch.setattr(ztoapi, "TICK_S", 0.02)

@pytest.fixture
def soon_again(monkeypatch):
    """Who was refused tries again soon; for how long it should wait, the tests by the clock tell."""
    monkeypatch.setattr(ztoapi, "backoff_s", lambda *_: 0.05)


@pytest.fixture
def leap(monkeypatch):
    """leap(seconds): so much time passes at once for all that look at the clock, but not for who waits at a socket."""
    leaps = [0.0]
    clock = types.SimpleNamespace(**vars(time))
    clock.monotonic = lambda: time.monotonic() + sum(leaps)
    monkeypatch.setattr(ztoapi, "time", clock)
    return leaps.append


@pytest.fixture
def unhurried(monkeypatch):
    """The pump does not mind how late a body ends, for tests of connections that serve again."""
    monkeypatch.setattr(ztoapi.Relay, "END_S", LONG_S)


MIB = 1 << 20
WELL = (200, "Hello", None, True)  # what ask() gives for HEALTHY
ZAI_KEYS = tuple(f"{i}123456789abcdef.SecretSecret{i}" for i in (1, 2, 3))
both = pytest.mark.parametrize("streamed", (True, False), ids=("stream", "json"))
posix_only = pytest.mark.skipif(os.name == "nt", reason="signals")


def cases(names, rows):
    """Parametrize by the values of a dict, whose keys name them, or by rows whose first item does."""
    if isinstance(rows, dict):
        return pytest.mark.parametrize(names, list(rows.values()), ids=list(rows))
    return pytest.mark.parametrize(names, [pytest.param(*row[1:], id=row[0][:60]) for row in rows])


def ask(proxy, streamed, **fields):
    """(status, text, error or None, whether it ended as it should) of a chat, either way."""
    if not streamed:
        status, _, body = proxy.chat(**fields)
        error = body.get("error")
        text = "" if error else body["choices"][0]["message"]["content"]
        return status, text, error, error is None
    status, _, events, clean = proxy.stream(**fields)
    error = next((event["error"] for event in events if "error" in event), None)
    whole = clean and not error
    assert ("[DONE]" in events[-1:]) == whole, events
    return status, said(events), error, whole and finish_of(events) != []


def check_502(proxy, words, streamed=True):
    """A chat fails before its answer begins, and its error says so in these words."""
    status, _, error, _ = ask(proxy, streamed)
    assert status == 502
    assert words in error["message"]


def failed_stream(proxy, **fields):
    """The events of a stream that began and failed, once all is checked that holds for each."""
    return check_failed(*proxy.stream(**fields))


def check_whole(status, headers, events, clean):
    """The events of a stream that ended as it should."""
    assert (status, clean, events[-1]) == (200, True, "[DONE]")
    assert finish_of(events) != []
    return events


def check_failed(status, headers, events, clean):
    assert (status, clean, finish_of(events), list(events[-1])) == (200, False, [], ["error"])
    assert "[DONE]" not in events
    assert isinstance(events[-1]["error"]["code"], str)
    assert [event for event in events[:-1] if "error" in event] == []
    return events


def is_beat(event):
    """Whether an event is a heartbeat: an empty delta that ends nothing."""
    return [(choice["delta"], choice["finish_reason"]) for choice in choices_of([event])] == [({}, None)]


def figures(proxy):
    """What the metrics count: (retries, failed, cancelled)."""
    proxy.idle()
    metrics = proxy.server.metrics
    stats = metrics.stats()
    return metrics.counts["retries"], stats["failed"], stats["cancelled"]


def slots(proxy):
    """How many requests the gates think are in flight."""
    return sum(gate.in_flight for gate in proxy.server.upstream.gates.gates.values())


def check_well(proxy, times, streamed=True):
    """So many answers, one after the other, are as they should be."""
    for _ in range(times):
        assert ask(proxy, streamed) == WELL
        proxy.idle()


def keys_at(zai):
    """The keys that arrived at Z.ai, in order."""
    return [request["headers"]["Authorization"].split()[1] for request in zai.requests]


@pytest.fixture(scope="module")
def shared_proxy():
    with FakeZai() as fake, proxying(fake, MAX_BODY_MB="1", DEFAULT_KEY=KEY + ", key-one, key-two ,,") as proxy:
        proxy.zai = fake
        yield proxy


@pytest.fixture
def shared(shared_proxy, caplog):
    """The proxy of the tables; no row may be a bug."""
    shared_proxy.zai.requests.clear()
    yield shared_proxy
    shared_proxy.quiet()
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


@pytest.fixture(scope="module")
def well_known():
    """A proxy with the well-known key."""
    with FakeZai() as fake, proxying(fake, DEFAULT_KEY="own-key,sk-your-key") as proxy:
        yield proxy


def boom(*args, error=RuntimeError, **kwargs):
    raise error("boom")


def check_error(reply):
    """OpenAI's four fields, and an id to find it by."""
    error = reply.error()
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"] and error["type"] and isinstance(error["code"], str)
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["x-request-id"].startswith("req_")


def check_refused(replies, status):
    """One error, and nothing behind it was answered."""
    assert [reply.status for reply in replies] == [status]
    check_error(replies[0])
    assert replies[0].headers["Connection"] == "close"


def hold(proxy, data):
    """A connection over which one request has been answered, and that is kept, and idle."""
    sock = connect(proxy, data)
    assert next_reply(sock).status == 200
    # Its idleness counts from then on, which may be after its answer has been read.
    proxy.idle()
    return sock


# Tables, and what is told of both files ###############################################

# What no field holds, anywhere in a request or an answer. To add an oddity, add a value.
ODDITIES = (
    None, True, False, 0, -1, 1.5, 10**40, -1e308, "", "x", "none", "auto", "system", "\ud800\0",
    [], ["x"], [None], [[]], {}, {"x": None}, {"type": "text"}, {"type": "function", "function": {}},
    [{"type": "image_url"}], "<tool_call>", "get_time<arg_key>",
)


def mutated(value, rng):
    """A deep copy in which one place holds something odd, or nothing."""
    value = copy.deepcopy(value)
    place = value
    steps = rng.randrange(1, 8)
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        steps -= 1
        if not steps or not isinstance(place[key], (dict, list)) or not place[key]:
            break
        place = place[key]
    if rng.random() < 0.1:
        del place[key]
    else:
        place[key] = copy.deepcopy(rng.choice(ODDITIES))
    return value


def table(names, rows):
    """Parametrize by rows, which may be very long, so that their names are cut."""
    return pytest.mark.parametrize(names, rows, ids=lambda value: ascii(value)[:50])


@pytest.fixture(scope="session", autouse=True)
def tables_are_no_garbage():
    """The collector would look through all rows of all tables each time, which takes longer than most tests."""
    gc.collect()
    gc.freeze()


def plain_work():
    """How much of this process's time plain work takes: about a tenth of a second."""
    began = time.process_time()
    for _ in range(15):
        assert len(json.loads(json.dumps([str(i) for i in range(20000)]))) == 20000
    return time.process_time() - began


@contextlib.contextmanager
def linear_time():
    """What is in it takes no more of this process's time than fifteen times some plain work, which on a slow or a busy
    machine takes longer too: a fifth of that if all is well."""
    began = time.process_time()
    yield
    took = time.process_time() - began
    assert took < 0.5 or took < 15 * plain_work()


def pieces_of(data, most=10000):
    """The ways to feed it: whole, byte by byte (or in 2,000 pieces), and cut in two at every place, or at most that
    lie apart."""
    stride = len(data) // most + 1
    size = len(data) // 2000 + 1
    yield [data]
    yield [data[i:i + size] for i in range(0, len(data), size)]
    # The places move with the length.
    for i in range(len(data) % stride + 1, len(data), stride):
        yield [data[:i], data[i:]]


def blocks_of(data, size=65536):
    """As a socket gives it."""
    return [data[i:i + size] for i in range(0, len(data), size)]


@pytest.mark.parametrize("path", [ztoapi.__file__, __file__])
def test_no_name_is_bound_twice(path):
    """In files of this length a second table, or test, of the same name would quietly replace the first."""
    parts = ast.parse(Path(path).read_text("utf-8")).body
    names = [part.name for part in parts if isinstance(part, (ast.FunctionDef, ast.ClassDef))]
    targets = [target for part in parts if isinstance(part, ast.Assign) for target in part.targets]
    names += [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    assert [name for name, count in collections.Counter(names).items() if count > 1] == []


def test_what_stands_above_the_line_is_pure():
    """No socket, no clock, no environment, no logging before "I/O starts here"."""
    parts = ast.parse(PROGRAM.split("I/O starts here")[0]).body
    pure = [part for part in parts if isinstance(part, (ast.FunctionDef, ast.ClassDef))]
    nodes = [node for part in pure for node in ast.walk(part)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{node.value.id}.{node.attr}")
    assert {"random.getrandbits", "re.fullmatch"} <= names, "the walk does see what is used"
    impure = {"socket", "select", "ssl", "time", "datetime.datetime.now", "os.environ", "os.getenv", "sys", "signal",
              "threading.Thread", "log", "logging", "open", "print"}
    assert not names & impure


def test_the_standard_library_is_all_that_is_imported():
    nodes = list(ast.walk(ast.parse(PROGRAM)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names}
    assert len(packages) > 10
    assert packages <= set(getattr(sys, "stdlib_module_names", packages))


UNWRITABLE = "/proc" if os.path.isdir("/proc/self") else "/"  # nothing can be written there, not even by root


def start(*argv, **environ):
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-I", "-S", "-B", *argv], env=environ, cwd=UNWRITABLE, **pipes)


def run(*argv, **environ):
    """(exit status, stdout, stderr) of a program that ends by itself."""
    process = start(*argv, **environ)
    out, err = process.communicate(timeout=LONG_S)
    return process.returncode, out, err


IMPORTING = """
import logging, signal, sys, threading
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], list(sys.path)
seen = []
def hook(event, args):
    harmless = event in ("os.listdir", "os.scandir", "os.putenv")
    if event.startswith(("socket.", "subprocess", "os.", "tempfile", "urllib")) and not harmless:
        seen.append((event, args))
    if event == "open" and isinstance(args[2], int) and args[2] & 3:
        seen.append((event, args))
sys.addaudithook(hook)
sys.path.insert(0, sys.argv[1])
import ztoapi
del sys.path[0]
assert before == ([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], list(sys.path))
assert not seen, seen
assert threading.active_count() == 1
assert not logging.getLogger().handlers
assert not logging.getLogger("ztoapi").handlers
print("clean")
"""


def test_importing_has_no_side_effect():
    assert run("-c", IMPORTING, os.path.dirname(os.path.abspath(ztoapi.__file__))) == (0, "clean\n", "")


# Settings #############################################################################

DEFAULTS = {
    "PORT": 9090, "HOST": "127.0.0.1", "DEFAULT_KEY": ("sk-your-key",), "ZAI_API_KEY": (),
    "ZAI_BASE_URL": "https://api.z.ai/api/paas/v4", "DEFAULT_STREAM": True, "ENABLE_THINKING": None,
    "REASONING_FORMAT": "parsed", "MODEL_ALIASES": {}, "VISION_MODEL": "", "MODEL_FALLBACKS": {},
    "MAX_CONCURRENCY": 0, "QUEUE_TIMEOUT": 120, "MAX_RETRIES": 2, "HEARTBEAT": 10, "UPSTREAM_TIMEOUT": 300,
    "CLIENT_TIMEOUT": 60, "MAX_BODY_MB": 64, "MAX_CONNECTIONS": 1024,
    "CORS_ORIGIN": ("*",), "DEBUG_MODE": False, "DEMO_MODE": False,
}
FLAGS = ("DEFAULT_STREAM", "ENABLE_THINKING", "DEBUG_MODE", "DEMO_MODE")
COUNTS = ("MAX_CONCURRENCY", "MAX_RETRIES", "MAX_BODY_MB", "MAX_CONNECTIONS")
DURATIONS = ("QUEUE_TIMEOUT", "HEARTBEAT", "UPSTREAM_TIMEOUT", "CLIENT_TIMEOUT")
TRUE = ("true", "TRUE", "True", "1", "yes", "Yes", "on", "ON", " true ")
FALSE = ("false", "FALSE", "0", "no", "No", "off", "Off")
PAAS = "https://api.z.ai/api/paas/v4"
CODING = "https://api.z.ai/api/coding/paas/v4"
BIG = "https://open.bigmodel.cn/api/paas/v4"
BASES = (PAAS, CODING, BIG, "http://127.0.0.1:8000", "http://[::1]:8000/v4")
BASE_ENDS = ("", "/", "//", "/chat/completions", "/chat/completions/", " ")
# Rows: variable, text, what it means.
GOOD_SETTINGS = [
    *((variable, text, True) for variable in FLAGS for text in TRUE),
    *((variable, text, False) for variable in FLAGS for text in FALSE),
    *((variable, text, float(text)) for variable in DURATIONS for text in ("0.5", "7", " 2.5 ")),
    *(("ZAI_BASE_URL", base + end, base) for base in BASES for end in BASE_ENDS),
    *(("REASONING_FORMAT", text, text.lower()) for text in ("parsed", "raw", "hidden", "Raw", "HIDDEN")),
    *(("ZAI_API_KEY", text, ()) for text in ("", "-", "none", "unset", "None", " - ")),
    *(("ENABLE_THINKING", text, None) for text in ("", "-", "unset", "none")),
    *((variable, text, {}) for variable in ("MODEL_ALIASES", "MODEL_FALLBACKS") for text in ("", "-", "none", "UNSET")),
    *(("VISION_MODEL", text, model) for text, model in (("-", ""), ("", ""), (" GLM-4.6V ", "GLM-4.6V"))),
    *(("PORT", text, int(text)) for text in ("0", "65535", " 8080 ")),
    *(("HOST", text, text) for text in ("0.0.0.0", "::", "localhost", "192.168.1.2")),
    *((variable, text, int(text)) for variable in ("MAX_CONCURRENCY", "MAX_RETRIES") for text in ("0", "7")),
    *((variable, "1", 1) for variable in ("MAX_BODY_MB", "MAX_CONNECTIONS")),
    *((variable, "0", 0) for variable in ("QUEUE_TIMEOUT", "HEARTBEAT")),
    *(("DEFAULT_KEY", text, keys) for text, keys in (("a", ("a",)), (" a , ,b,", ("a", "b")))),
    *(("ZAI_API_KEY", text, keys) for text, keys in (
        ("id.secret", ("id.secret",)), ("nonesuch-key", ("nonesuch-key",)),
        ("id1.s1, id2.s2 ,", ("id1.s1", "id2.s2")))),
    ("MODEL_ALIASES", "gpt-4o=glm-4.6,gpt-4o-mini=glm-4.5-air", {"gpt-4o": "glm-4.6", "gpt-4o-mini": "glm-4.5-air"}),
    ("MODEL_ALIASES", " a = glm-4.6 , , *=GLM-4.5,", {"a": "glm-4.6", "*": "GLM-4.5"}),
    *(("CORS_ORIGIN", text, origins) for text, origins in (
        ("*", ("*",)), ("", ()),
        ("https://a.example, ,http://b.example:8080", ("https://a.example", "http://b.example:8080")))),
]
# Rows: variable, a text that is refused.
BAD_SETTINGS = [
    *((variable, text) for variable in FLAGS for text in ("maybe", "2", "truely", "-1")),
    *((variable, text) for variable in COUNTS for text in ("x", "-1", "1.5", "1e3", "+1")),
    *((variable, text) for variable in DURATIONS for text in ("x", "-1", "nan", "inf", "10s", "1,5", "1e400")),
    *(("PORT", text) for text in (
        "x", "-1", "65536", "80.0", "0x50", "8_0", "9 0", "9\n9", "\u0661", "\u0668\u0660", "0" * 9 + "999999",
        "90\r\n90", "1" * 5000)),
    *(("MODEL_ALIASES", text) for text in ("gpt-4o", "gpt-4o=", "=glm-4.6", "a=b,c")),
    *(("ZAI_BASE_URL", text) for text in (
        "api.z.ai", "ftp://api.z.ai", "file:///etc/passwd", "https://", "https:///v4", "https://api.z.ai:port",
        "https://api.z.ai:99999", "https://api.z.ai:0", "https://[::1", "https://a b", "https://api..z.ai",
        "https://api.z.ai/v4?x=1", "https://api.z.ai/v4#x", "https://api.z.ai/v4?", "https://api.z.ai/v4#",
        "https://api.z.ai/\u00e9", "https://api.z.ai/v4\nX: y", "http://", "http://x y/", "http://[")),
    *((variable, "0") for variable in ("MAX_BODY_MB", "MAX_CONNECTIONS", "UPSTREAM_TIMEOUT", "CLIENT_TIMEOUT")),
    *(("REASONING_FORMAT", text) for text in ("think", "parsed,raw", "none", "ra\x1b[31mw")),
    ("HOST", "0.0.0.0\nPORT=1"),
]


@pytest.mark.parametrize("variable, text, value", GOOD_SETTINGS)
def test_a_variable_means_what_the_table_says(variable, text, value):
    settings = Settings.from_environ({"DEFAULT_KEY": KEY, variable: text})
    assert getattr(settings, variable.lower()) == value


def test_every_variable_has_its_default():
    settings = Settings.from_environ({"UNHEARD_OF": "x", "PATH": "/bin"})
    found = dataclasses.asdict(settings)
    assert {name.upper(): value for name, value in found.items()} == DEFAULTS
    assert {row[0] for row in GOOD_SETTINGS} == set(DEFAULTS)


@pytest.mark.parametrize("variable", sorted(set(DEFAULTS) - {"DEFAULT_KEY", "CORS_ORIGIN"}))
@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_variable_counts_as_unset(variable, text):
    assert Settings.from_environ({variable: text}) == Settings()


@pytest.mark.parametrize("variable", sorted(DEFAULTS))
def test_the_help_text_has_a_row_for_each_variable_and_its_default_can_be_copied(variable):
    row = re.search(rf"^    {variable} +(\S+)  ", ztoapi.__doc__, re.MULTILINE)
    settings = Settings.from_environ({variable: row.group(1)})
    assert getattr(settings, variable.lower()) == DEFAULTS[variable]


@pytest.mark.parametrize("variable, text", BAD_SETTINGS)
def test_a_bad_value_gives_one_line_with_the_variable_the_value_and_what_is_allowed(variable, text):
    with pytest.raises(ztoapi.SettingsError) as caught:
        Settings.from_environ({variable: text})
    line = str(caught.value)
    assert line.startswith(f"{variable}={ascii(text)[1:-1]}: ")
    assert "allowed" in line
    assert line.isprintable()


@pytest.mark.parametrize("text", ["", " ", ",", " , ,", "-", "none", "a,unset"])
def test_an_empty_default_key_is_refused(text):
    with pytest.raises(ztoapi.SettingsError, match="^DEFAULT_KEY.*allowed"):
        Settings.from_environ({"DEFAULT_KEY": text})


# What somebody may copy; a shell's variable or command is none.
README_KEYS = re.findall(r"DEFAULT_KEY=([\w.-]+)", README)

FAR_HOSTS = ("0.0.0.0", "::", "192.168.1.2", "example.org", "127.0.0.1.example.org", "localhost.example.org",
             "1127.0.0.1", "1.127.0.0")


@pytest.mark.parametrize("host", FAR_HOSTS)
@pytest.mark.parametrize("keys", [{}, *({"DEFAULT_KEY": key} for key in (
    "sk-your-key", "my-own-key,sk-your-key", "a-long-secret-of-your-own", *README_KEYS))])
def test_the_well_known_key_stays_on_this_computer(host, keys):
    with pytest.raises(ztoapi.SettingsError, match="^HOST=.*DEFAULT_KEY"):
        Settings.from_environ({"HOST": host, **keys})
    with pytest.raises(ztoapi.SettingsError):
        Settings(host=host)  # as a program of one's own may


@pytest.mark.parametrize("host", FAR_HOSTS)
def test_a_key_of_ones_own_may_go_anywhere(host):
    assert Settings.from_environ({"HOST": host, "DEFAULT_KEY": "my-own-key"}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "127.3.2.1", "localhost", "LocalHost", "::1"])
@pytest.mark.parametrize("keys, well_known", [
    ({}, "sk-your-key"), ({"DEFAULT_KEY": "mine,a-long-secret-of-your-own"}, "a-long-secret-of-your-own"),
    ({"DEFAULT_KEY": "mine"}, ""),
])
def test_loopback_takes_the_well_known_key(host, keys, well_known):
    assert Settings.from_environ({"HOST": host, **keys}).well_known == well_known


SECRET = "Geheim1234567890"


@pytest.mark.parametrize("environ", [
    {"DEFAULT_KEY": SECRET + "\u00e9"}, {"ZAI_API_KEY": f"id.{SECRET}\x01"}, {"ZAI_API_KEY": SECRET + " " + SECRET},
    {"ZAI_API_KEY": SECRET, "PORT": "x"}, {"DEFAULT_KEY": "sk-your-key," + SECRET, "HOST": "0.0.0.0"},
    *({"ZAI_BASE_URL": url} for url in (
        f"https://user:{SECRET}@api.z.ai/v4", f"https://{SECRET}@api.z.ai", f"https:/user:{SECRET}@api.z.ai")),
])
def test_secrets_do_not_show_in_complaints(environ):
    with pytest.raises(ztoapi.SettingsError) as caught:
        Settings.from_environ(environ)
    assert SECRET not in str(caught.value) + repr(caught.value)
    assert caught.value.__cause__ is None


def test_keys_do_not_show_in_repr():
    settings = Settings.from_environ({"DEFAULT_KEY": "sk-" + SECRET, "ZAI_API_KEY": f"id.{SECRET},id2.{SECRET}"})
    assert SECRET not in repr(settings) + str(settings)


DOTTED_KEY = "0123456789abcdef.SecretSecret"
ODD_KEYS = ("abcdefgh", "abcdefghijklmnop", "abc\\def'ghi\\jkl")


# Rows: Z.ai's keys, the clients', a text, what is left of it.
@pytest.mark.parametrize("zai_keys, client_keys, text, clean", [
    *(((DOTTED_KEY,), ("k",), text, clean) for text, clean in (
        (f"key {DOTTED_KEY} no", "key [redacted] no"), ("id 0123456789abcdef no", "id [redacted] no"),
        ("SecretSecretSecretSecret", "[redacted][redacted]"))),
    ((), ("plain-key-without-a-dot",), "plain-key-without-a-dot", "[redacted]"),
    ((), ("sk-your-key",), "sk-your-key", "sk-your-key"),
    ((), ("sk-Prod-AAAA", "sk-Prod-BBBB"), "sk-Prod-BBBBsk-Prod-AAAA sk-prod-bbbb sk-Prod-BB",
     "[redacted][redacted] [redacted] [redacted]"),
    *(((), ODD_KEYS, text, clean) for text, clean in (
        ("abcdefghijklmnop abcdefgh", "[redacted] [redacted]"), (ODD_KEYS[2], "[redacted]"),
        (ascii(ODD_KEYS[2]), '"[redacted]"'), (json.dumps(ODD_KEYS[2]), '"[redacted]"'),
        (ztoapi.name_of(ODD_KEYS[2]), "[redacted]"), ("nothing to hide", "nothing to hide"))),
])
def test_no_key_survives_redaction(zai_keys, client_keys, text, clean):
    assert Settings(zai_api_key=zai_keys, default_key=client_keys).redact(text) == clean


@pytest.mark.parametrize("key, shown", [(DOTTED_KEY, "...cret"), ("short", "..."), ("", "...")])
def test_a_masked_key_shows_its_end_if_it_is_long(key, shown):
    assert ztoapi.mask(key) == shown


# Errors ###############################################################################

# To add a code of Z.ai's, add it to a row: codes, the status and code of ours, the verdict.
CODES = [
    ("1113", 402, "insufficient_quota", MODEL_RESTS),
    ("1304 1308 1309 1310 1314 1316 1317 1318 1319 1320 1321", 402, "insufficient_quota", KEY_RESTS),
    ("1302", 429, "rate_limit_exceeded", TOO_MANY), ("1303", 429, "rate_limit_exceeded", TOO_FAST),
    ("1305 1312", 503, "overloaded", OVERLOAD), ("1120", 503, "overloaded", TRY_AGAIN),
    ("1210 1212 1213 1214 1215 1231", 400, "invalid_value", GIVE_UP),
    ("1211 1221 1222", 404, "model_not_found", GIVE_UP), ("1261", 400, "context_length_exceeded", GIVE_UP),
    ("1301", 400, "content_filter", GIVE_UP), ("1220 1313 1100 1300", 403, "permission_denied", GIVE_UP),
    ("1311", 403, "permission_denied", MODEL_RESTS),
    ("401 1000 1001 1002 1003 1004 1005 1110 1111 1112 1121 1315", 403, "upstream_auth_error", KEY_RESTS),
    ("500 1200 1230 1234", 502, "upstream_error", TRY_AGAIN), ("404", 502, "upstream_error", GIVE_UP),
    ("-1", 500, "server_error", TRY_AGAIN),
]
CODE_ROWS = [(code, *rest) for codes, *rest in CODES for code in codes.split()]


def test_every_code_of_the_sheet_has_a_row():
    assert set(ztoapi.ZAI_ERRORS) == {row[0] for row in CODE_ROWS}


@pytest.mark.parametrize("code, status, our_code, verdict", CODE_ROWS)
@pytest.mark.parametrize("shape", [
    lambda code: {"error": {"code": code, "message": "Z.ai's words."}},
    lambda code: {"error": {"code": int(code), "message": "Z.ai's words."}},
    lambda code: {"code": int(code), "msg": "Z.ai's words.", "success": False},
    lambda code: {"type": "error", "error": {"type": "api_error", "message": f"[{code}][Z.ai's words.][2026]"}},
])
def test_the_business_code_decides_and_not_the_http_status(code, status, our_code, verdict, shape):
    for http_status in (200, 400, 401, 403, 429, 500, 503):
        error = zai_error(shape(code), http_status, now=0)
        assert (error.status, error.code, error.verdict, error.zai_code) == (status, our_code, verdict, code)
        assert "Z.ai's words." in error.message
        assert code in error.message


@pytest.mark.parametrize("code, status, our_code, verdict", CODE_ROWS)
def test_the_head_tells_sdks_whether_to_try_again(code, status, our_code, verdict):
    headers = zai_error({"error": {"code": code, "message": "x"}}, 429, now=0).headers()
    heals = verdict in (TOO_MANY, TOO_FAST, OVERLOAD, TRY_AGAIN)
    assert headers.get("x-should-retry") == (None if heals else "false")
    assert our_code not in ("rate_limit_exceeded", "overloaded") or int(headers["Retry-After"]) >= 1


AUTH, BROKEN, BAD_REQUEST = (403, "upstream_auth_error"), (502, "upstream_error"), (400, "invalid_value")
NO_MONEY, NO_MODEL, NO_ROOM = (402, "insufficient_quota"), (404, "model_not_found"), (429, "rate_limit_exceeded")
TOO_LONG, DENIED = (400, "context_length_exceeded"), (403, "permission_denied")
FULL, FILTERED = (503, "overloaded"), (400, "content_filter")
# To add an answer of Z.ai's, add a row: HTTP status, body, the status and code of ours, words that help.
CAPTURED = [
    *((401, complaint("401", words), AUTH, "ZAI_API_KEY")
      for words in ("令牌已过期或验证不正确", "token expired or incorrect")),
    (429, complaint("1113", "Insufficient balance or no resource package. Please recharge."), NO_MONEY, "Coding Plan"),
    *((400, complaint(code, words), NO_MODEL, "GLM-4.6") for code, words in (
        ("1211", "Unknown Model, please check the model code."), ("1211", "模型不存在，请检查模型代码。"),
        ("1214", "modelCode：不存在"), ("1214", "modelCode: does not exist"), ("1999", "Unknown model"))),
    (404, complaint("model_not_found", "The model `glm-4.66` does not exist"), NO_MODEL, "GLM-4.6"),
    (400, complaint("1210", "max_tokens参数非法：限制数值范围[1,131072]"), BAD_REQUEST, "[1,131072]"),
    *((400, complaint(code, words), BAD_REQUEST, "") for code, words in (
        ("1210", "Invalid API parameter, please check the documentation."),
        ("1210", "max_tokens exceeds the maximum of 131072"),
        ("1210", "The temperature parameter is illegal.：限制数值范围[0,1]"),
        ("1210", "该模型始终思考，不支持关闭思考；请使用 low、high 或 max。"),
        ("1210", "messages.content.type 参数非法，取值范围 ['text']"),
        ("1210", "The input image exceeds the limit of 5 MB"), ("1213", "未正常接收到prompt参数。"),
        ("1214", "Incorrect role information"), ("1214", "messages 参数非法。请检查文档。"))),
    # What is too long, under Z.ai's own code, under others, and of GLM elsewhere
    *((status, complaint(code, words), TOO_LONG, "maximum context length") for words in (
        "Prompt exceeds max length", "tokens in request more than max tokens allowed",
        "This model's maximum context length is 131072 tokens", "输入内容超过最大长度",
        "The input (150000 tokens) is longer than the model's context length (131072 tokens).", "超出模型上下文长度",
    ) for status, code in ((400, "1261"), (400, "1210"), (400, "1999"), (500, "500"))),
    *((400, complaint("1210", words), BAD_REQUEST, "") for words in (
        "输入参数 temperature 超出范围", "输入文件大小超过限制", "Number of images in request exceeds the limit of 50",
        "The request has more than 128 tools, the limit is 128", "request_id 超过长度限制",
        "Tokens per minute exceeded the limit", "The tool `model_search` was not found", "该模型不支持图片")),
    *((500, complaint("500", words), BROKEN, "") for words in (
        "The request exceeded the time limit", "Request rate exceeds the limit", "模型输入处理超时")),
    (400, complaint("1301", "unsafe or sensitive content", contentFilter=[{"level": 1, "role": "user"}]), FILTERED, ""),
    *((429, complaint("1302", words), NO_ROOM, "") for words in (
        "High concurrency usage of this API, please reduce concurrency", "Rate limit reached for requests")),
    (429, complaint("1305", "该模型当前访问量过大，请您稍后再试"), FULL, ""),
    *((429, complaint(code, words), NO_MONEY, "") for code, words in (
        ("1308", "Usage limit reached for 5 hour. Your limit will reset at 2026-09-09 05:38:28"),
        ("1310", "Weekly/Monthly Limit Exhausted. Your limit will reset at 2026-05-11 21:02:26"),
        ("1309", "Your GLM Coding Plan package has expired"))),
    (429, complaint("1311", "当前订阅套餐暂未开放GLM-5.2-Highspeed权限"), DENIED, "plan"),
    (429, complaint("1313", "fair use"), DENIED, "Coding Plan"),
    (429, complaint("1315", "This key is for the enterprise plan only"), AUTH, "ZAI_API_KEY"),
    (401, complaint("1005", "Two-factor authentication required"), AUTH, "ZAI_API_KEY"),
    (429, complaint("1999", "Usage limit reached. Your limit will reset at 2027-01-01 00:00:00"), NO_MONEY, "1999"),
    (429, complaint("1999", "余额不足"), NO_MONEY, "1999"), (429, complaint("insufficient_quota", "No."), NO_MONEY, ""),
    (429, complaint(None, "余额不足或无可用资源包,请充值。"), NO_MONEY, ""),
    (429, complaint("1999", "已达到 5 小时的使用上限。您的限额将在 2026-08-25 07:41:44 重置。"), NO_MONEY, "1999"),
    (200, {"msg": "余额不足", "success": False}, NO_MONEY, ""),
    *((500, complaint("1234", words), BROKEN, "") for words in (
        "网络错误，错误id：202602261029392bc0093d0e944297，请联系客服。", "网络连接被重置",
        "Connection reset at the other side")),
    *((status, complaint("1999", words), FULL, "") for status in (429, 500, 503) for words in (
        "The service may be temporarily overloaded, please try again later", "该模型当前访问量过大，请您稍后再试")),
    # The code in the text: Z.ai's Messages API, and gateways
    (400, complaint("1211", "[1211][模型不存在，请检查模型代码。][20261009015533c889cd]"), NO_MODEL, ""),
    (429, {"error": {"message": "[1302][Rate limit reached for requests][2026]"}}, NO_ROOM, "1302"),
    (529, {"error": {"code": "", "message": "529 [1305][The service may be overloaded][2026]"}}, FULL, "1305"),
    (403, {"type": "error", "error": {"type": "api_error", "message": "[1311][no GLM-5.3-FlashX][2026]"}}, DENIED,
     "1311"),
    *((status, value, NO_MONEY, "1113") for status in (200, 400, 429, 500) for value in (
        complaint(None, "error code: 1113, please recharge"),
        complaint("429", 'RateLimitError: OpenAIException - {"error":{"code":"1113","message":"x"}}'),
        [complaint("1113")], {"detail": {"code": "1113"}}, {"error": complaint("1113")}, {"errors": [{"code": 1113}]},
        {"error": '{"code":"1113"}'})),
    # Paths that are not there
    *((status, body, BROKEN, "ZAI_BASE_URL") for status, body in (
        (200, {"status": 404, "message": "no such thing"}), (200, {"code": 404, "msg": "no such thing"}),
        (404, {"timestamp": "2026-08-13T04:35:22.960+00:00", "status": 404, "error": "Not Found", "path": "/v4/v1"}),
        (200, {"code": 500, "msg": "404 NOT_FOUND", "success": False}), (500, complaint("500", "404 NOT_FOUND")),
        (500, {"error": {"message": "404 Not Found"}}), (500, {"message": "404 NOT_FOUND"}))),
    # A plain 500 is quoted as it is
    (200, {"code": 500, "msg": "Internal Server Error"}, BROKEN, "(code 500)"),
    (500, {"status": 500, "error": "Internal Server Error", "path": "/v4/chat"}, BROKEN, "(code 500)"),
    # Keys refused in HTTP 200
    *((200, {"code": code, "msg": words, "success": False}, AUTH, "ZAI_API_KEY") for code, words in (
        (1000, "身份验证失败。"), (1001, "Header中未收到Authorization参数，无法进行身份验证。"),
        (401, "token expired or incorrect"))),
    # No JSON at all: an HTML page, a redirect
    *((status, None, BROKEN, str(status)) for status in (
        301, 302, 307, 308, 400, 403, 404, 405, 500, 502, 503, 504, 529)),
    *((status, None, BROKEN, "ZAI_BASE_URL") for status in (301, 302, 404, 405)),
    (401, None, AUTH, "ZAI_API_KEY"), (413, None, (413, "invalid_value"), "413"),
    # Unknown codes go by HTTP status
    *((status, complaint("1999"), expected, "1999") for status, expected in (
        (400, BAD_REQUEST), (401, AUTH), (402, NO_MONEY), (403, DENIED), (434, DENIED), (429, NO_ROOM), (500, BROKEN),
        (200, BROKEN))),
    # Unknown shapes
    *((200, value, BROKEN, "") for value in (
        [], "x", 5, {}, {"detail": "x"}, {"error": None}, {"error": []}, {"error": {}}, complaint(None, None),
        complaint([1], {"a": 1}), complaint(float("nan"), 5), complaint(10**5000), complaint(True),
        {"error": {"code": {}}})),
]


@pytest.mark.parametrize("status, body, expected, help", CAPTURED)
def test_what_zai_answered_becomes(status, body, expected, help):
    error = zai_error(body, status, now=1.7e9, model="glm-4.66")
    assert (error.status, error.code) == expected, error.message
    assert help in error.message


@pytest.mark.parametrize("status, body, expected, help", [row for row in CAPTURED if isinstance(row[1], dict)])
def test_zais_own_words_are_quoted(status, body, expected, help):
    error = body["error"] if isinstance(body.get("error"), dict) else body
    words = error.get("message", error.get("msg", error.get("error")))
    assert not isinstance(words, str) or words in zai_error(body, status, now=1.7e9).message


@pytest.mark.parametrize("status, body, verdict", [
    (200, {"code": 500, "msg": "404 NOT_FOUND", "success": False}, GIVE_UP),
    (500, complaint("500", "404 NOT_FOUND"), GIVE_UP), (404, {"status": 404, "error": "Not Found"}, GIVE_UP),
    *((status, None, GIVE_UP) for status in (301, 404, 405)),
    (200, {"code": 500, "msg": "Internal Server Error"}, TRY_AGAIN),
    *((status, None, TRY_AGAIN) for status in (500, 502, 503, 504)),
    (429, None, TOO_FAST), (429, complaint("1999"), TOO_FAST), (500, complaint("9999"), TRY_AGAIN),
])
def test_the_verdict_on(status, body, verdict):
    assert zai_error(body, status).verdict == verdict


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = {"error": value, "code": [value], "message": {"a": value}}
    return value


def test_an_error_however_deep_or_long_is_quoted_with_a_bound():
    assert zai_error(nested(5000), 500).code == "upstream_error"
    assert zai_error({"error": {"code": nested(5000), "message": nested(5000)}}, 429).code == "rate_limit_exceeded"
    error = zai_error({"error": {"code": "9" * 10**6, "message": "x" * 10**7}}, 400)
    assert len(error.message) < 3000
    assert len(error.zai_code) <= 200


def test_too_long_a_prompt_names_the_max_tokens_that_may_be_to_blame():
    too_long = complaint("1261", "Prompt exceeds max length")
    assert "max_tokens" not in zai_error(too_long, 400).message
    assert re.search("max_tokens.*98304", zai_error(too_long, 400, max_tokens=98304).message)


@pytest.mark.parametrize("model, help, absent", [
    ("glm-4.66", "GLM-4.6", "MODEL_ALIASES"),
    *((model, f"or set MODEL_ALIASES={model}=glm-4.6", "?") for model in (
        "gpt-4o", "claude-sonnet-4-5", "o3", "google/gemini-3-pro", "us.anthropic.claude-3", "mixtral-8x7b")),
    ("zzz", "/v1/models", "MODEL_ALIASES"), ("x" * 10**7, "/v1/models", "xx"),
])
def test_an_unknown_model_gets_advice(model, help, absent):
    message = zai_error(complaint("1211", "Unknown Model"), 400, model=model).message
    assert help in message
    assert absent not in message


RESET_AT = 1788903508  # 2026-09-09 05:38:28 in Beijing, 2026-09-08 21:38:28 in UTC


# To add a spelling of the time, add a row. Each means RESET_AT.
@pytest.mark.parametrize("message", [
    "Usage limit reached for 5 hour. Your limit will reset at 2026-09-09 05:38:28",
    "Weekly/Monthly Limit Exhausted. Your limit will reset at 2026-09-09 05:38:28. It is 2026-09-09 04:38:28.",
    "[1308][Usage limit reached for 5 hour. Your limit will reset at 2026-09-09 05:38:28][202609090438]",
    "已达到 5 小时的使用上限。您的限额将在 2026-09-09 05:38:28 重置。", "您的限额将在2026-09-09 05:38:28重置",
])
def test_the_time_of_a_reset_is_read(message):
    error = zai_error(complaint("1308", message), 429, now=RESET_AT - 3600)
    assert error.headers() == {"Retry-After": "3600", "x-should-retry": "false"}
    assert error.pause_s == 3600
    assert "(in 60 min)" in error.message


@pytest.mark.parametrize("words", [
    "reset at ", "将在 ", "2026-09-09 ", "model code", "context ", "limit ", "404 ", "[1", "code ", "insufficient",
])
@pytest.mark.parametrize("message", ["please wait {} 5", "resets at 2026-09-09 {}x", "{}"])
def test_no_words_of_an_error_take_more_than_linear_time(words, message):
    text = message.format(words * (2000 // len(words)))
    with linear_time():
        assert zai_error(complaint("1210", text), 400, now=RESET_AT).status in (400, 404)


# Rows: Z.ai's words, seconds behind RESET_AT, Z.ai's Retry-After, ours.
@pytest.mark.parametrize("message, late, asked, expected", [
    ("Your limit will reset at 2026-09-09 05:38:28", -99.5, 7, "100"),
    ("Your limit will reset at 2026-09-09 05:38:28", 5, None, "1"),
    ("Your limit will reset at 2026-13-45 05:38:28", 0, None, None),
    ("Your limit will reset at 2026-13-45 05:38:28", 0, 7, "7"),
    ("Your limit will reset at 0000-01-01 00:00:00", 0, 7, "7"),
    ("Your plan expired at 2026-09-09 05:38:28", -100, None, None),
    ("Usage limit reached", 0, None, None), ("Usage limit reached", 0, 0.0, None),
    ("Failed at 2026-09-09 05:38:28, please try again later", -100, None, None),
    # One that is not plain is none.
    *((f"Your limit will reset at {time}", -3600, None, None) for time in (
        "2026-09-09 05:38:28 EST", "2026-09-09 05:38:28Z", "2026-09-09 05:38:28.5", "2026-09-09 05:38:28+02:00",
        "2026-09-09 05:38:28 (Asia/Tokyo)", "2026-09-09T05:38:28", "2026-09-09 23:59:60", "9999-12-31 23:59:59",
        "0001-01-01 00:00:00", "2020-01-01 00:00:00", "05:38:28", "5 o'clock")),
])
def test_retry_after_comes_from_the_reset_or_else_from_zai(message, late, asked, expected):
    error = zai_error(complaint("1310", message), 429, now=RESET_AT + late, retry_after=asked)
    assert error.headers().get("Retry-After") == expected


# Rows: seconds to the reset, QUEUE_TIMEOUT, the status and code of ours, whether it heals.
@pytest.mark.parametrize("seconds, patience, expected, retryable", [
    (120, 120, NO_ROOM, None), (121, 120, NO_MONEY, False), (100, 0, NO_MONEY, False),
])
def test_a_limit_that_ends_soon_is_a_429(seconds, patience, expected, retryable):
    body = complaint("1308", "Your limit will reset at 2026-09-09 05:38:28")
    error = zai_error(body, 429, now=RESET_AT - seconds, patience_s=patience)
    assert (error.status, error.code) == expected
    assert error.retryable is retryable
    assert (error.verdict, error.retry_after) == (KEY_RESTS, seconds)


def test_no_money_does_not_heal_however_patient_one_is():
    assert zai_error(complaint("1113", "no"), 429, now=0, patience_s=1e9).status == 402
    assert zai_error(complaint("1308", "no"), 429, now=0, patience_s=1e9).status == 402


@pytest.mark.parametrize("seconds, words", [
    (1, "1 s"), (119, "119 s"), (120, "2 min"), (3600, "60 min"), (7200, "2 h"), (18000, "5 h"), (604800, "7 days"),
])
def test_a_duration_in_words(seconds, words):
    assert ztoapi.duration(seconds) == words


# Rows: a Retry-After, the seconds it means.
@pytest.mark.parametrize("text, seconds", [
    ("7", 7.0), ("0", 0.0),
    ("", None), ("soon", None), ("-1", None), ("1.5", None), ("9999999", None), ("5, 7", None), ("\u0667", None),
    ("Wed, 09 Sep 2026 05:38:28 GMT", None),
])
def test_retry_after_counts_if_it_is_a_number(text, seconds):
    assert ztoapi.seconds_to_wait(text) == seconds


def test_zais_own_retry_after_is_passed_on():
    error = zai_error(complaint("1302", "x"), 429, now=0, retry_after=17)
    assert error.headers()["Retry-After"] == "17"
    assert error.pause_s == 17


def test_an_error_knows_what_a_front_has_to_tell():
    error = ztoapi.RequestError("No.", "messages[0].role")
    assert (error.status, error.type, error.code) == (400, "invalid_request_error", "invalid_value")
    assert (error.message, error.param) == ("No.", "messages[0].role")
    assert error.headers() == {"x-should-retry": "false"}
    error = ztoapi.missing_key()
    assert (error.status, error.code, error.retryable) == (403, "upstream_auth_error", False)
    assert "https://z.ai/" in error.message


# Models ###############################################################################

# To add a model, add it to a row: ids, context, max_tokens, abilities (sees, tools: streams arguments, free).
CATALOGUE = {id: row for ids, *row in (
    ("glm-5.3 glm-5.2", 1048576, 131072, "tools"), ("glm-5.3-flash glm-5.3-flashx", 1048576, 131072, "sees tools"),
    ("glm-5.1 glm-5 glm-5-turbo glm-4.7 glm-4.7-flashx glm-4.6", 204800, 131072, "tools"),
    ("glm-5v-turbo", 204800, 131072, "sees"), ("glm-4.7-flash", 204800, 131072, "tools free"),
    ("glm-4.5 glm-4.5-x glm-4.5-air glm-4.5-airx", 131072, 98304, ""), ("glm-4.5-flash", 131072, 98304, "free"),
    ("glm-4.6v glm-4.6v-flashx", 131072, 32768, "sees"), ("glm-4.6v-flash", 131072, 32768, "sees free"),
    ("glm-4.5v glm-4.1v-thinking-flashx", 65536, 16384, "sees"),
    ("glm-4.1v-thinking-flash", 65536, 16384, "sees free"),
    ("glm-4-flashx-250414 glm-4-32b-0414-128k", 131072, 16384, ""), ("glm-4-flash-250414", 131072, 16384, "free"),
    ("glm-4v-flash", None, 1024, "sees free"), ("glm-4-long", 1000000, 4095, ""),
    ("autoglm-phone-multilingual", None, 4096, "sees"),
) for id in ids.split()}


@pytest.mark.parametrize("id", sorted({*ztoapi.MODELS, *CATALOGUE}))
def test_the_model_table_says_what_the_catalogue_says(id):
    model = ztoapi.MODELS[id]
    context, max_tokens, abilities = CATALOGUE[id]
    assert (model.id, model.context, model.max_tokens) == (id, context, max_tokens)
    assert [model.sees, model.tool_stream, model.free] == [word in abilities for word in ("sees", "tools", "free")]
    assert model.thinking in ztoapi.FAMILIES
    assert model.created > 1.7e9


@pytest.mark.parametrize("name", ["GLM-4.6", "GLM-4.5-Air", "GLM-4.5V", "GLM-5.3-FlashX", "GLM-4.1V-Thinking-Flash"])
def test_models_are_spelled_as_the_brand_does(name):
    assert ztoapi.MODELS[name.lower()].name == name


ALIASES = {"gpt-4o": "zai/glm-4.6v-flash", "mine": "glm-9", "*": "glm-4.6"}
LISTED = ztoapi.listed_models(Settings(model_aliases=ALIASES))


@pytest.mark.parametrize("name, created, day, more", [
    ("GLM-4.6", 1759276800, "2025-10-01", {
        "context_length": 204800, "max_model_len": 204800, "max_output_tokens": 131072, "input_modalities": ["text"]}),
    ("gpt-4o", 1765152000, "2025-12-08", {
        "context_length": 131072, "max_model_len": 131072, "max_output_tokens": 32768,
        "input_modalities": ["text", "image"], "free": True}),
    ("mine", 0, "1970-01-01", {}),
])
def test_a_listed_model_says_what_is_known_of_it(name, created, day, more):
    assert LISTED[name] == {
        "id": name, "object": "model", "created": created, "owned_by": "z.ai", "type": "model", "display_name": name,
        "created_at": day + "T00:00:00Z", **more}


@pytest.mark.parametrize("name, aliases, id", [
    *((name, "", id) for name, id in (
        ("GLM-4.6", "glm-4.6"), ("glm-4.6", "glm-4.6"), ("gLm-5.2[1m]", "glm-5.2"), (" GLM-4.5-Air ", "glm-4.5-air"),
        ("GLM-9-New", "glm-9-new"), ("GLM-5.3-Highspeed", "glm-5.3-highspeed"),
        ("glm-5.2-highspeed[1m]", "glm-5.2-highspeed"), ("zai/glm-4.6", "glm-4.6"),
        ("z-ai/GLM-5.1-highspeed", "glm-5.1-highspeed"), ("openrouter/z-ai/glm-4.6", "glm-4.6"),
        ("somebody/glm-9", "somebody/glm-9"))),
    *((name, "gpt-4o=glm-4.6", id) for name, id in (("GPT-4o", "glm-4.6"), ("gpt-4", "gpt-4"))),
    *(("gpt-4o", aliases, "glm-4.6") for aliases in ("gpt-4o=GLM-4.6", "GPT-4O=glm-4.6", "gpt-4o=z-ai/glm-4.6")),
    ("openai/gpt-4o", "openai/gpt-4o=glm-4.6", "glm-4.6"), ("gpt-4o[1m]", "gpt-4o=glm-5.2[1m]", "glm-5.2"),
    ("glm-4.6", "glm-4.6=glm-5.2", "glm-5.2"),
    *((name, "*=glm-4.6", id) for name, id in (
        ("GLM-4.5", "glm-4.5"), ("glm-5.2-highspeed", "glm-5.2-highspeed"), ("openai/glm-4.5", "glm-4.5"),
        ("glm-9", "glm-4.6"))),
    ("o1", "*=GLM-4.6", "glm-4.6"), ("gpt-4o", "*=glm-4.6,gpt-4o=glm-4.5", "glm-4.5"),
])
def test_a_models_name_becomes_zais_id(name, aliases, id):
    settings = Settings.from_environ({"MODEL_ALIASES": aliases})
    assert ztoapi.zai_model_id(name, settings.model_aliases) == id
    assert to_zai(chat_body(model=name), MODEL_ALIASES=aliases)[0]["model"] == id


def test_a_highspeed_model_has_the_row_of_its_model():
    assert to_zai(chat_body(model="glm-5.3-highspeed", max_tokens=10**6))[0]["max_tokens"] == 131072


# Bytes ################################################################################

@table("text, expected", [
    ('{"a":[1,-2.5e3,"\\u00e9"]}', {"a": [1, -2500.0, "\u00e9"]}), ("null", None), (" 1\n", 1),
    ("9" * 100, int("9" * 100)), ("[1e999,-1e999]", [None, None]),
    *((text, ValueError) for text in (
        "", "nul", "{", '{"a":1}x', "NaN", "Infinity", "-Infinity",
        "9" * 101, "01", "1.", ".5", "0x1", "'a'", '"\n"')),
])
def test_the_json_of_clients_is_taken_strictly(text, expected):
    if expected is ValueError:
        with pytest.raises(ValueError):
            ztoapi.decode_strictly(text)
    else:
        assert ztoapi.decode_strictly(text) == expected


@table("text, expected", [
    ('{"a":1}', {"a": 1}), ('{"a":NaN,"b":-Infinity}', {"a": None, "b": None}), ('{"a":1e999}', {"a": None}),
    ("9" * 400, int("9" * 400)), ("9" * 5000, None), ("", None), ("nul", None), ('{"a":1}x', None),
    ("[" * 100000, None), ('"a\t\n\0b"', "a\t\n\0b"),
])
def test_the_json_of_others_is_taken_kindly(text, expected):
    assert ztoapi.decode_or_none(text) == expected


LIGHT = ztoapi.LIGHT_BYTES


@cases("text, value", {
    "many values": ("[" + '{"a":[1,-2.5e3,true,null,"\\u00e9"]},' * 60000 + "1]",
                    [{"a": [1, -2500.0, True, None, "\u00e9"]}] * 60000 + [1]),
    "few values": ('["' + "x" * LIGHT + '"]', ["x" * LIGHT]), "too many brackets": ("[" + "[]," * 600000 + "1]", None),
    "too many commas": ("[" + "1," * 1100000 + "1]", None), "too many escapes": ('"' + "\\n" * 8100000 + '"', None),
    "too many keys": ("{" + ",".join(f'"{i}":1' for i in range(101000)) + "}", None),
    "a text of 25 MiB": ('"' + "x" * (25 << 20) + '"', None),
    "an image of 17 MiB": ('"' + "x" * (17 << 20) + '"', "x" * (17 << 20)),
    "no JSON": ("[" + "1," * LIGHT + "]", None), "no number": ("[" + "1," * LIGHT + "9" * 101 + "]", None),
    "too deep": ("[" * LIGHT + "]" * LIGHT, None),
})
def test_large_json_is_the_same_as_any_other_or_refused(text, value):
    assert ztoapi.decode_or_none(text, ztoapi.decode_strictly) == value


@pytest.mark.parametrize("work,value", [
    (ztoapi.decode_strictly, "[" + '{"a":1},' * 60000 + "1]"), (ztoapi.decode_or_none, "[" + '{"a":1},' * 60000 + "1]"),
    (ztoapi.encode_json, {"a": [{"b": 1.5}] * 60000}), (ztoapi.encode_json, ["\n\"x" * (1 << 18)] * 60),
])
def test_while_large_json_is_read_or_written_others_get_their_turn(work, value):
    """JSON's usual decoder and encoder are one step of the interpreter."""
    turns = []
    working = threading.Thread(target=work, args=(value,), daemon=True)
    working.start()
    while working.is_alive():
        turns.append(time.sleep(0.001))
    assert len(turns) >= 5


@pytest.mark.parametrize("value", ([1.5, None] * 30000, {"a": [{"b": "\u597d"}] * 60000}, ["\n\"x" * (1 << 20)] * 3,
                                   {"x" * (9 << 20): 1}))
def test_large_json_is_written_as_any_other(value):
    assert ztoapi.encode_json(value) == ztoapi.encode_text(value).encode()
    with pytest.raises(RequestError, match="24 MiB"):
        ztoapi.encode_json([value, {"a": "x" * (25 << 20)}])


def test_what_we_write_is_utf_8_and_an_event_is_one_line():
    assert ztoapi.encode_json({"a": "\u597d \ud800"}) == '{"a":"\u597d ?"}'.encode()
    ztoapi.encode_event({"a": "\ud800 \udfff"}).encode("utf-8", "replace")
    value = {"error": {"message": "\u597d\u2028\n"}, "b": 1}
    assert ztoapi.encode_event(value) == 'data: {"error":{"message":"\u597d\u2028\\n"},"b":1}\n\n'


def test_ids_look_like_openais():
    assert re.fullmatch("call_[0-9a-f]{24}", ztoapi.new_id("call_"))
    assert ztoapi.new_id("req_", lambda bits: 5) == "req_000000000000000000000005"
    assert ztoapi.new_id("") != ztoapi.new_id("")


# JSON objects and arrays that come in pieces. Rows: the text, what of it belongs to the value, whether that has ended.
@pytest.mark.parametrize("text, belongs, ended", [
    *((text, text[:end], True) for text, end in (
        ("{}", 2), ("{} x", 2), ("[]]", 2), ('{"a":"}"}}', 9), ('{"a":"\\"}"} {', 11), ('{"a":"\\\\"}"', 10),
        ('[1,[2],"]"]]', 11), ("\n {\"a\":1}\n", 9), ('"{" {}', 6))),
    *((text, text, False) for text in ("", "{", '{"a":"}', '{"a":[{}]', '{"a":"b\\n')),
    # What a backslash escapes may still come.
    ('{"a":"\\', '{"a":"', False),
    # Control characters in strings are escaped, also behind a backslash.
    ('{"a":"b\n\tc\0\x1f","d":["\r\n"]}', '{"a":"b\\n\\tc\\u0000\\u001f","d":["\\r\\n"]}', True),
    ('{"a":"b\\\nc\\\\\n"}', '{"a":"b\\nc\\\\\\n"}', True), ('{\n"a":\t1\r\n}', '{\n"a":\t1\r\n}', True),
])
def test_a_json_value_is_followed_however_it_arrives(text, belongs, ended):
    for pieces in pieces_of(text):
        progress = ztoapi.JsonProgress()
        assert "".join(map(progress.feed, pieces)) == belongs, pieces[:3]
        assert progress.ended is ended, pieces[:3]


def request_head(pieces):
    """The RequestHead of what came, or the status of the refusal."""
    head = ztoapi.RequestHead()
    try:
        for i, piece in enumerate(pieces):
            if head.feed(piece):
                assert head.rest + b"".join(pieces[i + 1:]) == b"rest"
                return head
    except RequestError as error:
        return error.status
    return None


# Request lines: the line; method and path, or the status of the refusal (None: it goes on).
@table("line, expected", [
    ("GET /health HTTP/1.1", ("GET", "/health")), ("POST /v1//x/?y#z HTTP/1.0", ("POST", "/v1/x")),
    ("\r\nGET / HTTP/1.1", ("GET", "/")), ("get * HTTP/1.1", ("get", "/*")), ("-1 x HTTP/1.9", ("-1", "/x")),
    ("GET HTTP://u:p@x:99999/%76%31/%ff HTTP/1.1", ("GET", "/v1/\ufffd")), ("G /\xff%0d HTTP/1.1", ("G", "/\xff\r")),
    ("GET http://[/a/ HTTP/1.1", ("GET", "/a")), ("GET http:/a HTTP/1.1", ("GET", "/http:/a")),
    ("A" * 20 + " / HTTP/1.1", ("A" * 20, "/")), ("GET /" + "a" * 60000 + " HTTP/1.1", ("GET", "/" + "a" * 60000)),
    *((line, 400) for line in (
        "GET  /health HTTP/1.1", "GET /health  HTTP/1.1", "GET /health HTTP/1.1 ", " GET /health HTTP/1.1",
        "GET\t/health\tHTTP/1.1", "GET /health", "GET", "GET /health HTTP/1.1 x", "GET /a b HTTP/1.1",
        "GET /health http/1.1", "GET /health HTTP/1.10", "GET /health HTTP/01.1", "GET /health HTTP/1,1",
        "GET /health HTTP/1.", "GET /health HTTQ/1.1", "GET /health HTTP/0.9", "GET /health\x00 HTTP/1.1",
        "GET /health\x0b HTTP/1.1", "GET /hea\rlth HTTP/1.1", "G(ET /health HTTP/1.1", "\r\n\r\nGET / HTTP/1.1",
        "G\xc3\x84T /health HTTP/1.1", "A" * 21 + " /health HTTP/1.1", "", "\x80\x2e\x01\x03\x01", "\x05\x01\x00",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "SSH-2.0-OpenSSH_9.6", '{"model":"GLM-4.6"}')),
    ("GET /health HTTP/2.0", 505), ("PRI * HTTP/2.0", 505),
    ("GET /" + "a" * 70000 + " HTTP/1.1", 431), ("a" * 70000, 431),
])
def test_a_request_line_is_taken_to_the_letter(line, expected):
    head = request_head(blocks_of(f"{line}\r\nHost: a\r\n\r\nrest".encode("latin-1"), 2048))
    assert (head if isinstance(head, int) else (head.method, head.path)) == expected


# Header lines behind a Host. Rows: the lines; the fields, or the status of the refusal.
@table("lines, expected", [
    ("", {}), ("A: b\nX-Y_z:\t b c \t\r\n", {"a": "b", "x-y_z": "b c"}), ("X:\r\n", {"x": ""}),
    ("X: \xff\x01\r\n", {"x": "\xff\x01"}), ("X: a: b\r\n", {"x": "a: b"}), ("X:y\r\n", {"x": "y"}),
    ("X: 1\r\nY: 2\r\nx: 3\r\nX: 4\r\n", {"x": "1, 3, 4", "y": "2"}),
    ("X: " + "y" * 60000 + "\r\n", {"x": "y" * 60000}),
    ("".join(f"X{i}: y\r\n" for i in range(99)), {f"x{i}": "y" for i in range(99)}),
    *((lines, 400) for lines in (
        "X\r\n", "X : y\r\n", ": y\r\n", " X: y\r\n", "X: a\r\n b\r\n", "X: a\r\n\tb: c\r\n", "X: a\rb\r\n",
        "X: a\r\r\n", "X: a\0\r\n", "X\0: a\r\n", "X(: y\r\n", "X\xc4: y\r\n", "X: a\rContent-Length: 5\r\n",
        "Host: a\r\n", "X: y\r\nHOST: b\r\n", "Content-Length: 5\r\ncontent-length: 5\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n")),
    ("X: " + "y" * 70000, 431), ("y" * 70000, 431), ("".join(f"X{i}: y\r\n" for i in range(100)), 431),
])
def test_the_fields_of_a_request_are_taken_to_the_letter(lines, expected):
    head = request_head(blocks_of(f"GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\nrest".encode("latin-1"), 2048))
    assert (head if isinstance(head, int) else head.fields) == (
        expected if isinstance(expected, int) else {"host": "a", **expected})


# Where the body ends, and whether another request may follow. Rows: the version, header lines; length (None: chunked)
# and the latter, or the status of the refusal.
@table("version, lines, expected", [
    ("1.1", "Host: a", (0, True)), ("1.1", "Host: a\r\nContent-Length: 5", (5, True)),
    ("1.1", "Host: a\r\nTransfer-Encoding: Chunked", (None, True)), ("1.0", "X: y", (0, False)),
    ("1.0", "Connection: keep-alive\r\nContent-Length: 007", (7, False)), ("1.1", "X: y", 400),
    *(("1.1", "Host: a\r\nConnection: " + line, (0, False)) for line in (
        "close", "Close", "close, TE\r\nTE: trailers", "TE\r\nConnection: close", "closed")),
    *(("1.1", "Host: a\r\nConnection: " + line, (0, True)) for line in (
        "keep-alive", "Upgrade, HTTP2-Settings\r\nUpgrade: h2c", "Upgrade\r\nUpgrade: websocket")),
    *(("1.1", "Host: a\r\nContent-Length: " + size, 400) for size in (
        "5, 5", "5,6", "+5", "-5", "-0", "1_0", "0x5", "5 5", "5.0", "5;", "1e1", "\xb2", "\xd9\xa5", "5\x0b", "\xa05",
        "five", "9" * 40, "0" * 400 + "5", "")),
    *(("1.1", "Host: a\r\nTransfer-Encoding: " + coding, 501) for coding in (
        "gzip", "gzip, chunked", "chunked, gzip", "identity", "chunked, chunked", "chunked;q=1", "xchunked",
        "'chunked'", "\x0bchunked", "")),
    *(("1.1", "Host: a\r\n" + lines, 400) for lines in (
        "Content-Length: 5\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 0",
        "Content-Length : 5", "Content-Length\t: 5", "X: y\r\n Content-Length: 5", "Content-Length: 5\r\n 5",
        "Transfer-Encoding: chunked\x00", "Transfer-Encoding: chunk\red", "X: y\r\n Transfer-Encoding: chunked",
        "Transfer-Encoding:\r\n chunked", "\x00Transfer-Encoding: chunked")),
    ("1.0", "Transfer-Encoding: chunked", 400),
])
def test_the_end_of_a_request_is_never_ambiguous_however_it_arrives(version, lines, expected):
    data = f"POST / HTTP/{version}\r\n{lines}\r\n\r\nrest".encode("latin-1")
    for pieces in pieces_of(data):
        head = request_head(pieces)
        if not isinstance(head, int):
            is_chunked = isinstance(head.framing, ztoapi.Dechunker)
            head = (None if is_chunked else head.framing.left, head.keeps_alive)
        assert head == expected, pieces[:3]


# The head of a response. Rows: the head, what it says or ValueError.
@pytest.mark.parametrize("head, expected", [
    ("HTTP/1.1 200 OK\r\n\r\n", ("HTTP/1.1", 200, {})),
    ("HTTP/1.1 200\r\nA: b\r\n\r\n", ("HTTP/1.1", 200, {"a": "b"})),
    ("HTTP/1.0 404 Not \xe4 Found\nA: b\nB:c\n\n", ("HTTP/1.0", 404, {"a": "b", "b": "c"})),
    ("HTTP/1.1 200 OK\r\nA: 1\r\nno field\r\n folded: line\r\nA: 2\r\n\r\n", ("HTTP/1.1", 200, {"a": "1, 2"})),
    *((head, ValueError) for head in (
        "\r\n\r\n", "HTTP/2 200 OK\r\n\r\n", "HTTP/1.1 20 OK\r\n\r\n", "HTTP/1.1 200OK\r\n\r\n",
        "HTTP/1.1  200 OK\r\n\r\n", "SSH-2.0-OpenSSH_9.2\r\n\r\n", " HTTP/1.1 200 OK\r\n\r\n",
        "HTTP/1.1 000 OK\r\n\r\n")),
])
def test_the_head_of_a_response_is_read_kindly(head, expected):
    try:
        assert ztoapi.parse_response_head(head) == expected
    except ValueError as error:
        assert type(error) is expected


# Where a head ends. Rows: the bytes, the head (None if it goes on), what is behind it.
@pytest.mark.parametrize("data, head, rest", [
    (b"GET / HTTP/1.1\r\nA: b\r\n\r\nrest", "GET / HTTP/1.1\r\nA: b\r\n\r\n", b"rest"),
    (b"GET / HTTP/1.1\nA: b\n\nrest", "GET / HTTP/1.1\nA: b\n\n", b"rest"),
    (b"GET / HTTP/1.1\r\nA: b\n\r\n\r\n", "GET / HTTP/1.1\r\nA: b\n\r\n", b"\r\n"),
    (b"A\xff\r\n\r\n", "A\xff\r\n\r\n", b""), (b"GET / HTTP/1.1\r\nA: b\r\n", None, b""),
])
def test_a_head_ends_at_its_blank_line_however_it_arrives(data, head, rest):
    for pieces in pieces_of(data):
        reader = ztoapi.HeadReader()
        found = None
        while pieces and found is None:
            found = reader.feed(pieces.pop(0))
        assert found == head
        assert reader.rest + b"".join(pieces) == rest


def dechunk(decoder, pieces):
    """(body, done, rest), or the exception's class."""
    body = b""
    try:
        for i, piece in enumerate(pieces):
            body += decoder.feed(piece)
            if decoder.done:
                return body, True, decoder.rest + b"".join(pieces[i + 1:])
    except ValueError as error:
        return type(error)
    return body, decoder.done, decoder.rest if decoder.done else None


# Chunked bodies. Rows: the bytes; (body, whether it ended, what is behind), or the error.
@table("data, expected", [
    (b"0\r\n\r\n", (b"", True, b"")), (b"5\r\nhello\r\n0\r\n\r\n", (b"hello", True, b"")),
    (b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\nGET /", (b"hello world", True, b"GET /")),
    (b"A\r\n0123456789\r\n00a\r\n\r\n\r\n\r\n\r\nab\r\n0000\r\n\r\n", (b"0123456789\r\n\r\n\r\n\r\nab", True, b"")),
    (b"5;name=value\r\nhello\r\n5 ; a=\"b\"\r\nworld\r\n0;x\r\n\r\n", (b"helloworld", True, b"")),
    (b"5\r\nhel", (b"hel", False, None)), (b"5\r\nhello\r\n", (b"hello", False, None)),
    (b"5\r\nhello\r\n0\r\n", (b"hello", False, None)),
    (b"14\r\n01234567890123456789\r\n0\r\n\r\n", (b"01234567890123456789", True, b"")),
    *((data, ValueError) for data in (
        b"\r\n", b"x\r\n", b"-5\r\n", b"+5\r\n", b"0x5\r\n", b"5_0\r\n", b" 5\r\n", b"5 5\r\n", b"\xd9\xa5\r\n",
        b"5\n", b"5\nhello\r\n", b"5\r\nhelloX\r\n", b"5\r\nhello0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhello\rX\r\n", b"fffffffffffffffff\r\n", b"5;a\x00b\r\nhello\r\n", b"5;a\nb\r\nhello\r\n",
        b"5\rhello\r\n", b"\xb2\r\n", b"5=x\r\n", b"5;a\rb\r\nhello\r\n", b"5\r\nhello\r\n\r\n0\r\n\r\n",
        b"0\n\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"0\r\n\n\r\n", b"5;" + b"x" * 5000 + b"\r\nhello\r\n0\r\n\r\n")),
])
def test_chunked_coding_is_taken_strictly_however_it_arrives(data, expected):
    for pieces in pieces_of(data):
        assert dechunk(ztoapi.Dechunker(), pieces) == expected, pieces[:3]


def test_what_stands_before_a_broken_chunk_is_not_lost():
    decoder = ztoapi.Dechunker()
    with pytest.raises(ValueError):
        decoder.feed(b"5\r\nhello\r\n1\r\n!\r\nzz\r\n")
    assert decoder.take() == b"hello!"


# Rows: the length, the bytes; (body, whether it ended, what is behind).
@pytest.mark.parametrize("length, data, expected", [
    (0, b"", (b"", True, b"")), (5, b"hello", (b"hello", True, b"")), (5, b"helloGET /", (b"hello", True, b"GET /")),
    (5, b"hel", (b"hel", False, None)),
])
def test_a_body_of_known_length_ends_there(length, data, expected):
    for pieces in pieces_of(data):
        assert dechunk(ztoapi.Counted(length), pieces) == expected


def decode_events(pieces):
    """The events, or the class of the error."""
    decoder = SSEDecoder()
    try:
        return [event for piece in pieces for event in decoder.feed(piece)] + decoder.close()
    except UpstreamError as error:
        return type(error)


# Server-sent events, here of at most 100 bytes. Rows: the bytes; the events, or the error.
@table("data, events", [
    (b"", []), (b"\n\n\n", []), (b"data: a\n\n", ["a"]), (b"data: a\n\ndata: b\n\n", ["a", "b"]),
    # The standard's own examples
    (b"data: YHOO\ndata: +2\ndata: 10\n\n", ["YHOO\n+2\n10"]),
    (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
     ["first event", "second event", " third event"]),
    (b"data\n\ndata\ndata\n\n", ["", "\n"]), (b"data:test\n\ndata: test\n\n", ["test", "test"]),
    # Line ends of all kinds, and those that are none
    (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]), (b"data: a\n\r\ndata: b\r\n\ndata: c\r\n\n", ["a", "b", "c"]),
    (b"data: a\r\ndata: b\ndata: c\n", ["a\nb\nc"]),
    ("data: a\u2028b\u2029c\u0085d\x0b\x0c\x1c\x1de\n\n".encode(), ["a\u2028b\u2029c\u0085d\x0b\x0c\x1c\x1de"]),
    # A last event without its blank line
    *((data, ["a", "b"]) for data in (
        b"data: a\n\ndata: b", b"data: a\n\ndata: b\n", b"data: a\r\n\r\ndata: b\r\n", b"data: a\r\n\r\ndata: b\r")),
    # Names, ids, comments and unknown fields are dropped
    *((data, ["a"]) for data in (
        b"event: error\ndata: a\n\n", b"id: 5\nretry: 10\ndata: a\nfoo: bar\n\n", b": ping\n\n:\n\ndata: a\n\n: b")),
    *((data, []) for data in (b"event: ping\n\n", b"datax: a\n\ndat: b\n\n data: c\n\n")),
    # A byte order mark at the start
    (b"\xef\xbb\xbfdata: a\n\n", ["a"]), (b"\xef\xbb\xbfdata:  a\n\n", [" a"]),
    # A bare line that is JSON
    *((b'data: a\n\n{"error":{"code":"500"}}' + end, ["a", '{"error":{"code":"500"}}']) for end in (b"", b"\n")),
    (b'data: a\n{"error":1}\n\n', ["a", '{"error":1}']),
    (b'{"error":1}\r\n\r\n', ['{"error":1}']), (b"<html>\n<body>502</body>\n", []),
    # Text is UTF-8; what is not becomes U+FFFD
    ("data: \u597d\U0001f600\u00e9\n\n".encode(), ["\u597d\U0001f600\u00e9"]),
    (b"data: a\xffb\n\n", ["a\ufffdb"]),
    # The bound
    (b"data: " + b"x" * 90 + b"\n\n", ["x" * 90]),
    (b"data: " + b"x" * 90 + b"\n\ndata: " + b"y" * 90 + b"\n\n", ["x" * 90, "y" * 90]),
    *((data, UpstreamError) for data in (
        b"data: " + b"x" * 200, b"data: 123456789\n" * 20, b": " + b"x" * 200, b"{" + b"x" * 200 + b"\n")),
])
def test_events_are_the_same_however_they_arrive(monkeypatch, data, events):
    monkeypatch.setattr(SSEDecoder, "LIMIT_BYTES", 100)
    for pieces in pieces_of(data):
        assert decode_events(pieces) == events, pieces[:3]


@cases("data, is_event", {
    "two megabytes": (b"data: " + b"x" * (2 << 20) + b"\n\n", True), "more": (b"data: " + b"x" * (3 << 20), False),
    "as many values as 128K tokens": (b"data: [" + b"1," * 99990 + b"1]\n\n", True),
    "more values": (b"data: [" + b"1," * 100000 + b"1]\n\n", False),
    "more brackets": (b"data: [" + b"[]," * 60000 + b"1]\n\n", False),
    "many lines": (b"data: x\n" * 1000 + b"\n", True), "more lines": (b"data: x\n" * 1002 + b"\n", False),
    "bare lines": (b"{}\n" * 1002 + b"\n", False),
})
def test_an_event_has_bounds(data, is_event):
    events = decode_events(blocks_of(data))
    assert (len(events) if is_event else events) == (1 if is_event else UpstreamError)


# Bytes that could take more than linear time.
@cases("reader, pieces", [
    ("events", SSEDecoder, [b"data: x\n\n" * 10] * 10000),
    ("lines of data without a blank line", SSEDecoder, [b"data: x\n" * 256] * 900),
    ("comments", SSEDecoder, [b":\n"] * 100000),
    ("one line in tiny pieces", SSEDecoder, [b"data: "] + [b"x" * 8] * 100000),
    ("blank lines", SSEDecoder, [b"\n" * 65536] * 30),
    ("chunks of a byte", ztoapi.Dechunker, [b"1\r\nx\r\n" * 10000] * 8),
    ("chunks of a byte, byte by byte", ztoapi.Dechunker, [b"1", b"\r", b"\n", b"x", b"\r", b"\n"] * 20000),
    ("a long chunk in tiny pieces", ztoapi.Dechunker, [b"fffffff\r\n"] + [b"x" * 8] * 100000),
    ("a chunk's line in single bytes", ztoapi.Dechunker, [b"5;"] + [b"x"] * 4000),
    ("a head in single bytes", ztoapi.HeadReader, [b"X"] * 60000),
    ("a JSON value in single characters", ztoapi.JsonProgress, ["["] * 100000),
    ("a JSON string of backslashes", ztoapi.JsonProgress, ['["'] + ["\\"] * 100000),
])
def test_bytes_take_linear_time(reader, pieces):
    decoder = reader()
    with linear_time():
        for piece in pieces:
            decoder.feed(piece)


# To Z.ai ##############################################################################

TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
TOOL2 = {"type": "function", "function": {
    "name": "get_time", "description": "Time", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\":\"Paris\"}"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
TEXT = {"type": "text", "text": "What is it?"}
NO_TEXT = {"type": "text", "text": ""}
FILE = {"type": "file", "file": {"file_id": "f1", "filename": "a.pdf"}}
FILE_URL = {"type": "file", "file": {"file_url": "https://a.example/a.pdf"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


def check_history(messages):
    """Z.ai takes these messages: none is empty, and each call has its output behind it."""
    waiting = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            assert message["tool_call_id"] == waiting.pop(0)
        assert role == "tool" or not waiting
        assert role in ("system", "user", "assistant", "tool")
        assert message.keys() <= {"role", "content", "tool_calls", "tool_call_id", "reasoning_content"}
        assert isinstance(content, str) or role == "user"
        calls = message.get("tool_calls", [])
        assert calls or (content.strip() if isinstance(content, str) else content)
        for call in calls:
            assert re.fullmatch("[a-zA-Z0-9_-]{1,64}", call["function"]["name"])
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
        waiting = [*waiting, *(call["id"] for call in calls)]
        assert all(isinstance(id, str) and id for id in waiting)
        assert len(set(waiting)) == len(waiting)
    assert not waiting


DOORS = {"chat": ztoapi.Chat, "responses": ztoapi.Responses, "messages": ztoapi.Messages}
each_door = pytest.mark.parametrize("door", DOORS)


def caller(key="k", memory=None):
    return ztoapi.Caller({}, key, 1000.5, memory or ztoapi.Memory())


def by_door(door, body, by=None, **environ):
    """What becomes of a body that comes through an API's front: (front, Asked). The body is left as it was, and what
    becomes of it can be sent."""
    settings = Settings.from_environ(environ)
    before = json.dumps(body)
    front, request = DOORS[door].read(body, by or caller(), settings)
    result = ztoapi.to_zai_request(request, settings)
    assert json.dumps(body) == before
    assert result.data == ztoapi.encode_json(result.body)
    assert result.body["stream"] is True
    assert all(re.fullmatch("[a-zA-Z0-9_.-]+", name) for name in result.changed)
    assert len(set(result.changed)) == len(result.changed)
    check_history(result.body["messages"])
    front.asked = result
    return front, result


def to_zai(request, **environ):
    """(Z.ai's body, the set of what was changed) of a chat request."""
    _, result = by_door("chat", request, **environ)
    return result.body, set(result.changed)


def messages_to_zai(**fields):
    """(Z.ai's messages, the set of what was changed) of a chat."""
    body, changed = to_zai(chat_body(**fields))
    return body["messages"], changed


def asking(content):
    return {"messages": [user(content)]}

def said_by(role, **fields):
    return {"messages": [{"role": role, **fields}, user("Hi")]}

def said_last_by(role, **fields):
    return {"messages": [{"role": role, **fields}]}

def function(**fields):
    return {"tools": [{"type": "function", "function": fields}]}

def named(name):
    return {"type": "function", "function": {"name": name}}

def schema(value):
    return {"response_format": {"type": "json_schema", "json_schema": value}}

def system(content):
    return {"role": "system", "content": content}


def assistant(content="", calls=(), thinking=None):
    message = {"role": "assistant", "content": content}
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": text}} for id, name, text in calls]
    return message


def output(id, content="20"):
    return {"role": "tool", "content": content, "tool_call_id": id}


S, U, A, DOT = system("S"), user("U"), assistant("A"), user(".")


# To add a request that is refused, add a row: the fields that are wrong, the param of the 400. First what is refused at
# each door.
BAD_ANYWHERE = [
    *(({"model": value}, "model") for value in (None, "", "  ", 5, ["glm-4.6"], {}, True, "[1m]", "x" * 257)),
    *(({name: value}, name) for name, values in (
        ("stream", ("true", 1, 0, [], {})), ("temperature", ("1", True, [], {}, -0.1, 2.01)),
        ("top_p", ("1", True, [], {}, -0.01, 1.01))) for value in values),
    *(({"tools": value}, f"tools{place}") for value, place in (
        ("x", ""), ({}, ""), (5, ""), ([{"type": "function", "name": f"f{i}"} for i in range(129)], ""),
        *(([value], "[0]") for value in ("x", None, 5)), *(([value], "[0].name") for value in (
            {}, {"type": "custom"}, {"name": 5})), ([{"type": 5}], "[0].type"),
        ([TOOL, {"type": "function"}], "[1].name"), *(([{"name": "f", name: value}], "[0]." + name) for name, value in (
            ("parameters", 5), ("input_schema", 5), ("description", 5), ("description", []))),
        *((function(name=value)["tools"], "[0].function.name") for value in (None, 5)),
        (function(name="f", description=5)["tools"], "[0].function.description"),
        (function(name="f", parameters="x")["tools"], "[0].function.parameters"),
        ([{"type": "namespace", "name": "n", "tools": 5}], "[0].tools"),
        ([{"type": "namespace", "name": "n", "tools": [TOOL, {"name": []}]}], "[0].tools[1].name"))),
    *(({"tools": [TOOL], "tool_choice": value}, f"tool_choice{place}") for value, place in (
        *((value, "") for value in ("sometimes", "get_weather", 5, True, [])),
        *((named(name), "") for name in ("other", "x" * 10**6)), (named(5), ".function.name"), ({"type": 5}, ".type"),
        *(({"type": kind}, ".name") for kind in ("function", "tool")),
        *(({"type": kind, "name": "g"}, "") for kind in ("function", "tool")),
        ({"type": "allowed_tools", "tools": 5}, ".tools"),
        ({"type": "allowed_tools", "tools": [{"type": "function"}]}, ".tools[0].name"))),
]
BAD_REQUESTS = [
    *(({"messages": value}, "messages") for value in (None, [], "Hi", {}, 5)),
    *(({"messages": [value]}, "messages[0]") for value in (None, "Hi", 5, [])),
    *(({"messages": [{"role": value, "content": "x"}]}, "messages[0].role")
      for value in (None, "", 5, "robot", "function", "User", ["user"])),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    *((said_last_by(role, content=value), "messages[0].content")
      for role in ("user", "system", "developer") for value in (None, 5, True)),
    *((said_last_by(role), "messages[0].content") for role in ("user", "system")),
    (said_last_by("assistant", content=5), "messages[0].content"),
    (said_last_by("user", content={}), "messages[0].content.type"),
    (said_last_by("assistant", content=["x"]), "messages[0].content[0]"),
    *((asking([part]), "messages[0].content[0]") for part in (None, "x", 5, [])),
    *((asking([TEXT, part]), "messages[0].content[1].type") for part in ({}, {"type": None}, {"type": 5})),
    *((asking([TEXT, part]), "messages[0].content[1]") for part in (AUDIO, {"type": "x"}, PICTURE, FILE)),
    *((asking([{"type": "text", "text": value}]), "messages[0].content[0].text") for value in (None, 5, [])),
    (asking([{"type": "text"}]), "messages[0].content[0].text"),
    *(({"model": "glm-4.5v", **asking([TEXT, {"type": "image_url", "image_url": value}])}, "messages[0].content[1]")
      for value in (None, 5, [], {}, {"url": 5})),
    ({**asking([PICTURE]), "model": "glm-5.2"}, "messages[0].content[0]"),
    ({"messages": [user([PICTURE]), {"role": "system", "content": "S"}]}, "messages[0].content[0]"),
    ({"model": "glm-4.5v", **asking([FILE])}, "messages[0].content[0]"),
    (said_last_by("assistant", tool_calls=5), "messages[0].tool_calls"),
    (said_last_by("assistant", tool_calls=["x"]), "messages[0].tool_calls[0]"),
    *((said_last_by("assistant", tool_calls=[CALL, {**CALL, "function": value}]), f"messages[0].tool_calls[1].{field}")
      for value, field in ((None, "name"), ("f", "function"))),
    (said_last_by("assistant", tool_calls=[{**CALL, "function": {"arguments": "{}"}}]),
     "messages[0].tool_calls[0].function.name"),
    *(({name: value}, name) for name, values in (
        ("parallel_tool_calls", ("true", 1, 0, [], {})), ("user", (5, True, [], {})), ("n", (0, 2, 128)),
        ("stream_options", ("x", 5, True, [])), ("response_format", ("x", 5, True, [])), ("stop", (5, {})),
        ("max_tokens", (0, -5)), ("max_completion_tokens", (0,)), ("reasoning_format", ("", "think", 5)),
        ("reasoning_effort", ("", "very", 5, True, "High")),
        *((name, ("1", True, 1.5, [], {})) for name in ("n", "max_tokens", "max_completion_tokens")))
      for value in values),
    *(({head: {field: "much"}}, f"{head}.{field}") for head, field in (
        ("reasoning", "effort"), ("thinking", "type"), ("output_config", "effort"))),
    *(({"stop": ["a", value]}, "stop[1]") for value in (5, None)), ({"think": "hard"}, "think"),
    *(({"response_format": {"type": value}}, "response_format.type") for value in ("xml", 5, None)),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (schema("x"), "response_format.json_schema"),
    (schema({"name": "a", "schema": []}), "response_format.json_schema.schema"), ({"tools": [TOOL] * 129}, "tools"),
    ({"extra_body": {"temperature": 5}}, "temperature"),
]


BAD_RESPONSES = [
    *(({"input": value}, "input") for value in (None, 5, {}, [])),
    *(({"input": [U, item]}, f"input[1]{place}") for item, place in (
        (5, ""), ("x", ""), ({"type": 5}, ".type"), ({"role": "user"}, ".content"), ({"content": "a"}, ".role"),
        ({"role": "judge", "content": "a"}, ".role"), (user(5), ".content"), (user([5]), ".content[0]"),
        (user([TEXT, {"type": "input_text"}]), ".content[1].text"), (user([{"text": "x"}]), ".content[0].type"),
        (user([{"type": "input_image", "file_id": "f"}]), ".content[0]"),
        ({"type": "function_call", "call_id": "1", "name": 5}, ".name"),
        ({"type": "function_call", "call_id": "1", "name": "f", "namespace": 5}, ".namespace"),
        ({"type": "item_reference"}, ".id"), ({"type": "compaction"}, ".encrypted_content"),
        ({"type": "additional_tools", "tools": 5}, ".tools"),
        ({"type": "additional_tools", "tools": [{"name": 5}]}, ".tools[0].name"))),
    *(({"text": value}, f"text{place}") for value, place in (
        (5, ""), ({"format": 5}, ".format"), ({"format": {}}, ".format.type"),
        ({"format": {"type": "x"}}, ".format.type"), ({"format": {"type": "json_schema"}}, ".format.schema"),
        ({"format": {"type": "json_schema", "schema": 5}}, ".format.schema"))),
    *(({name: value}, name) for name, value in (
        ("conversation", "conv_1"), ("prompt", {"id": "p"}), ("background", True), ("include", 5), ("reasoning", 5),
        ("max_output_tokens", 0), ("max_output_tokens", "x"), ("metadata", 7), ("truncation", 5), ("store", "no"),
        ("user", 5), ("instructions", 5), ("previous_response_id", 5), ("previous_response_id", "resp_1"),
        ("max_tool_calls", "x"), ("parallel_tool_calls", 1))),
    ({"instructions": [5]}, "instructions[0]"), ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
]
BAD_MESSAGES = [
    *(({"messages": value}, "messages") for value in (None, 5, [])),
    *(({"messages": [U, turn]}, f"messages[1]{place}") for turn, place in (
        (5, ""), ({"role": 5, "content": "a"}, ".role"), ({"role": "judge", "content": "a"}, ".role"),
        ({"role": "user"}, ".content"), (user([5]), ".content[0]"), (user([{"type": []}]), ".content[0].type"),
        (user([TEXT, {"type": "text"}]), ".content[1].text"),
        (user([{"type": "image", "source": {"type": "file", "file_id": "f"}}]), ".content[0]"),
        (assistant([{"type": "tool_use", "id": "1", "name": 5}]), ".content[0].name"),
        (assistant([{"type": "text"}]), ".content[0].text"))),
    *(({"output_config": value}, f"output_config{place}") for value, place in (
        ({"effort": "much"}, ".effort"), ({"format": 5}, ".format"), ({"format": {"type": "x"}}, ".format.type"),
        ({"format": {"type": "json_schema"}}, ".format.schema"),
        ({"format": {"type": "json_schema", "schema": 5}}, ".format.schema"))),
    *(({"thinking": {"type": value}}, "thinking.type") for value in ("perhaps", "", "High")),
    ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
    *(({"system": value}, f"system{place}") for value, place in (
        (5, ""), ([5], "[0]"), ([TEXT, {"type": "text"}], "[1].text"))),
    *(({"stop_sequences": value}, f"stop_sequences{place}") for value, place in (
        (5, ""), (["a", 5], "[1]"), (["a", "x" * 257], "[1]"))),
    *(({"max_tokens": value}, "max_tokens") for value in (0, "5")), ({"thread": {"type": "create"}}, "thread"),
    ({"metadata": {"user_id": 5}}, "metadata.user_id"),
]


@pytest.mark.parametrize("door, body, param", [
    *(("chat", chat_body(**fields), param) for fields, param in BAD_ANYWHERE + BAD_REQUESTS),
    *(("responses", {**APIS["responses"][1], **fields}, param) for fields, param in BAD_ANYWHERE + BAD_RESPONSES),
    *(("messages", {**MESSAGES_BODY, **fields}, param) for fields, param in BAD_ANYWHERE + BAD_MESSAGES)])
def test_a_bad_request_is_a_400_that_names_the_field_in_the_clients_words(door, body, param):
    with pytest.raises(ztoapi.RequestError) as caught:
        by_door(door, body)
    error = caught.value
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", param), error.message
    assert isinstance(error.code, str)
    assert 0 < len(error.message) < 500
    assert param in error.message or door == "chat" or param in ("thread", "previous_response_id")
    assert DOORS[door].status(error) == 400


@pytest.mark.parametrize("fields, param, words", [
    ({"input": "Hi"}, "messages", "/v1/responses"), ({"messages": [U], "functions": []}, "functions", "use 'tools'")])
def test_chat_tells_where_to_go_instead(fields, param, words):
    with pytest.raises(ztoapi.RequestError, match=words) as caught:
        by_door("chat", {"model": "glm-4.6", **fields})
    assert caught.value.param == param


@pytest.mark.parametrize("model", ["glm-4.6", "glm-4.5v"])
@pytest.mark.parametrize("message", [
    fields["messages"][0] for fields, _ in BAD_REQUESTS if fields.get("messages") not in (None, [], {}, "Hi", 5)])
def test_what_is_refused_in_the_last_message_is_told_if_it_stands_before_it(model, message):
    body, changed = to_zai(chat_body(model=model, messages=[message, user("Hi")]))
    assert body["messages"][-1] == user("Hi")
    assert changed or "image_url" in json.dumps(body)


@pytest.mark.parametrize("model, part, words", [
    ("GLM-4.6", PICTURE, r"GLM-4\.6 takes text only.*GLM-4\.6V.*VISION_MODEL"),
    ("GLM-4.6", FILE, r"GLM-4\.6 takes text only.*GLM-4\.6V.*VISION_MODEL"),
    ("glm-4.5v", FILE, r"GLM-4\.5V takes no .*file.*GLM-5\.3-Flash"), ("glm-4.5v", AUDIO, r"takes no input_audio"),
])
def test_media_that_a_model_does_not_take_are_refused_with_the_names_of_models_that_do(model, part, words):
    with pytest.raises(ztoapi.RequestError, match=words):
        to_zai(chat_body(model=model, **asking([TEXT, part])))


@pytest.mark.parametrize("name", sorted({*ztoapi.READ_FIELDS, "top_k"} - {"model", "messages"}))
def test_null_in_an_optional_field_counts_as_absent(name):
    assert to_zai(chat_body(**{name: None})) == to_zai(chat_body())


@pytest.mark.parametrize("fields, same", [
    (function(name="f", strict=None, description=None, parameters=None), function(name="f")),
    ({"stream_options": {"include_usage": None}}, {}), ({"thinking": {"type": None}}, {}),
    (schema({"name": "a", "schema": None}), schema({"name": "a"})),
    (said_by("assistant", content="x", tool_calls=None, reasoning_content=None, name=None, audio=None),
     said_by("assistant", content="x")),
    (function(name="f", parameters={"a": 1}, input_schema=None), function(name="f", parameters={"a": 1})),
    (said_by("assistant", content=[{**TEXT, "refusal": None}]), said_by("assistant", content=[TEXT])),
    (said_by("assistant", tool_calls=[{**CALL, "call_id": None}]), said_by("assistant", tool_calls=[CALL])),
    (said_by("tool", content="x", output=None), said_by("tool", content="x")),
    ({"temperature": None, "extra_body": {"temperature": 0.5}}, {"extra_body": {"temperature": 0.5}}),
])
def test_null_inside_a_field_counts_as_absent(fields, same):
    assert to_zai(chat_body(**fields)) == to_zai(chat_body(**same))


@pytest.mark.parametrize("data, expected", [
    (b'{"a": 1}', {"a": 1}), (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
    (b' \r\n{"a":"\\u0000\\ud800\xe2\x80\xa8"}\n', {"a": "\0\ud800\u2028"}),
    (b'{"a": [1.5, -2e3, 12345678901234567890]}', {"a": [1.5, -2000.0, 12345678901234567890]}),
])
def test_a_body_is_a_json_object(data, expected):
    assert ztoapi.read_json_object(data) == expected


@table("data", [
    b"", b" ", b"null", b"[]", b"5", b'"x"', b"true", b"{", b"{'a': 1}", b'{"a": 1} x', b'{"a": 1}{"a": 1}',
    b'{"a": 01}', b"\xff\xfe{\0}\0", '{"a": "é"}'.encode("latin-1"), b'{"a": "\xed\xa0\x80"}', b"\x1f\x8b\x08\0",
    b"model=glm-4.6", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}',
    b'{"a": ' + b"1" * 5000 + b"}", b'{"a": -' + b"1" * 5000 + b"}", b'{"a": ' + b"9" * 1000000 + b"}",
    b'{"a": ' + b"[" * 200000 + b"]" * 200000 + b"}", b'{"a":' * 200000 + b"1" + b"}" * 200000, b"[" * 200000,
    b'{"a": [' + b"[]," * 1000001 + b"[]]}", b'{"a": [' + b"{}," * 1000001 + b"{}]}",
    b'{"a": [' + b'"b",' * 2000001 + b'"b"]}',
])
def test_a_body_that_is_none_is_a_400(data):
    with pytest.raises(ztoapi.RequestError) as caught:
        ztoapi.read_json_object(data)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300


def test_a_schema_too_deep_to_be_written_is_a_400():
    deep = {}
    for _ in range(100000):
        deep = {"a": deep}
    with pytest.raises(ztoapi.RequestError):
        ztoapi.to_zai_request(ztoapi.Request(chat_body(**schema({"schema": deep})), {}), Settings())
    while deep:  # or the interpreter itself recurses when it frees it
        deep = deep.pop("a")


RESULT = output("c1")
PARTS = [{"type": "text", "text": "a"}, NO_TEXT, {"type": "text", "text": "b"}]


def calling(arguments='{"city":"Paris"}'):
    return assistant("", [("c1", "get_weather", arguments)])

def calls_of(*ids, **fields):
    return {"role": "assistant", "content": "", "tool_calls": [
        {**CALL, "id": id, "function": {"name": "f", "arguments": "{}"}, **fields} for id in ids]}

def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


NAMELESS = {"role": "tool", "content": "20"}
TOLD = user("Output of the tool call c1:\n20")
# Rows: OpenAI's messages behind a first one, Z.ai's, what was changed.
@pytest.mark.parametrize("messages, expected, changed", [
    *(([calls_of(id), output(other)], [calls_of("call_3_0"), output("call_3_0")], {"tool_call_id"})
      for id in (None, "", [], True, 0) for other in (None, "", [], "c9")),
    ([calls_of(5), output(5)], [calls_of("5"), output("5")], set()),
    ([{**calls_of(), "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, NAMELESS],
     [calls_of("call_3_0"), output("call_3_0")], {"tool_call_id"}),
    ([calls_of(None, None), NAMELESS, {**NAMELESS, "content": "30"}],
     [calls_of("call_3_0", "call_3_1"), output("call_3_0"), output("call_3_1", "30")], {"tool_call_id"}),
    ([calls_of("c1", None), {**NAMELESS, "content": "30"}, output("c1")],
     [calls_of("c1", "call_3_1"), output("c1"), output("call_3_1", "30")], {"tool_call_id"}),
    ([assistant("A", [("c1", "f", "{}"), ("c1", "g", "{}")]), output("c1"), output("c1", "30")],
     [assistant("A", [("c1", "f", "{}"), ("call_3_1", "g", "{}")]), output("c1"), output("call_3_1", "30")],
     {"tool_call_id"}),
    ([calls_of("c1", "c1"), output("c1"), output("c1", "30")], [calls_of("c1"), output("c1"), user(
        "Output of the tool call c1:\n30")], {"tool_call_id"}),
    ([calls_of("c1"), output("c1"), calls_of("c1"), output("c1", "30")],
     [calls_of("c1"), output("c1"), calls_of("c1"), output("c1", "30")], set()),
    ([calls_of("c1"), U, calls_of("c1"), output("c1")],
     [calls_of("c1"), output("c1", "(no output)"), U, calls_of("c1"), output("c1")], set()),
    ([calls_of("c1", "c2"), output("c2")], [calls_of("c1", "c2"), output("c1", "(no output)"), output("c2")], set()),
    ([calls_of("c1")], [calls_of("c1"), output("c1", "(no output)")], set()),
    ([calls_of("c1"), S, output("c1")], [calls_of("c1"), output("c1"), S], set()),
    ([calls_of("c1"), A, output("c1")], [{**calls_of("c1"), "content": "A"}, output("c1")], set()),
    ([calls_of("c1", "c2"), output("c2"), output("c1", "30")],
     [calls_of("c1", "c2"), output("c1", "30"), output("c2")], set()),
    ([output("c1"), calls_of("c1")], [TOLD, calls_of("c1"), output("c1", "(no output)")], {"tool_call_id"}),
    ([output("c1")], [TOLD], {"tool_call_id"}),
    ([calls_of("c1"), output("c1", "10"), output("c1")], [calls_of("c1"), output("c1", "10"), TOLD], {"tool_call_id"}),
    *(([calls_of("c1", function={"name": name, "arguments": "{}"}), output("c1")],
       [calls_of("c1", function={"name": start + digest(name), "arguments": "{}"}), output("c1")], set())
      for name, start in (("mcp.a b", "mcp_a_b_"), ("", "_"), ("x" * 65, "x" * 55 + "_"))),
    ([calls_of("c1", function="f"), output("c1")], [TOLD], {"unreadable", "tool_call_id"}),
])
def test_each_call_has_its_output_behind_it(messages, expected, changed):
    assert messages_to_zai(messages=[S, U, *messages]) == ([S, U, *expected], changed)
    # What follows changes nothing, or Z.ai's cache would be lost.
    assert messages_to_zai(messages=[S, U, *messages, U])[0] == [S, U, *expected, U]


# Rows: OpenAI's messages, Z.ai's, what was changed.
@pytest.mark.parametrize("messages, expected, changed", [
    ([S, U], [S, U], set()), ([{**S, "role": "developer"}, U], [S, U], set()), ([user(PARTS)], [user("a\nb")], set()),
    *(([{"role": role, "content": PARTS}, U], [{"role": role, "content": "a\nb"}, U], set())
      for role in ("system", "assistant")),
    ([calling(), output("c1", PARTS), U], [calling(), output("c1", "a\nb"), U], set()),
    ([user([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}])], [user("a\nb")], set()),
    *(([user(content)], [DOT], set()) for content in ("", [], [NO_TEXT], " \n")),
    *(([{"role": "assistant", "tool_calls": [CALL], **content}, RESULT, U], [calling(), RESULT, U], set())
      for content in ({}, {"content": None}, {"content": ""}, {"content": []})),
    *(([{**A, **thinking}, U], [{**A, "reasoning_content": "yes"}, U], set()) for thinking in (
        {"reasoning_content": "yes"}, {"reasoning": "yes"}, {"reasoning": "no", "reasoning_content": "yes"})),
    ([{**A, "reasoning": {"a": 1}, "reasoning_details": [{"type": "x"}]}, U], [A, U], set()),
    ([{**A, "tool_calls": []}, U], [A, U], set()),
    ([calling({"city": "Paris"}), RESULT, U], [calling(), RESULT, U], set()),
    ([{"role": "assistant", "tool_calls": [
        {"id": "c1", "type": "custom", "custom": {"name": "get_weather", "input": "x"}}]}, RESULT, U],
     [calling('{"input":"x"}'), RESULT, U], set()),
    ([assistant([{"type": "refusal", "refusal": "No."}]), U], [assistant("No."), U], set()),
    ([{**U, "name": "bob", "cache_control": {"a": 1}}], [U], set()),
    ([{"role": "assistant", "content": None, "refusal": "No."}, U], [assistant("No."), U], set()),
    ([U, A, A, U], [U, assistant("A\n\nA"), U], set()),
    *(([message], [message, DOT], set()) for message in (S, A)),
    ([U, system("late"), system("later")], [U, system("late"), system("later")], set()),
    ([user("a\u2028b\0\U0001f600")], [user("a\u2028b\0\U0001f600")], set()),
    # What is empty
    *(([calling(), output("c1", content)], [calling(), output("c1", "(no output)"), DOT],
       set()) for content in (
           "", None, [], [NO_TEXT, NO_TEXT], "\n", [{"type": "text", "text": " "}])),
    *(([U, {"role": "assistant", **fields}, U], [U, U], set()) for fields in (
        {}, {"content": None}, {"content": ""}, {"content": [NO_TEXT]}, {"content": "\n"}, {"tool_calls": []})),
    ([U, {"role": "assistant", "reasoning_content": "hm"}, U], [U, U], {"reasoning_content"}),
    ([system(""), U], [U], set()),
    # What cannot be read
    ([None, U], [user("null"), U], {"unreadable"}),
    ([{"role": "model", "content": "A"}, U], [user('{"role":"model","content":"A"}'), U], {"unreadable"}),
    ([user(["a", *PARTS]), U], [user('"a"\na\nb'), U], {"unreadable"}),
    ([assistant([5, *PARTS]), U], [assistant("a\nb"), U], {"unreadable"}),
    ([{**A, "tool_calls": [5]}, U], [A, U], {"unreadable"}),
])
def test_messages_become(messages, expected, changed):
    assert messages_to_zai(messages=messages) == (expected, changed)


# Rows: the arguments of an earlier call, the text Z.ai gets; None: as they are.
@table("arguments, expected", [
    *((text, None) for text in ('{"path": "a"}', ' {"path": "a"}\n', "{}", '{"a": "{}{}"}')),
    *((text, "{}") for text in ("", " \n", None)),
    ('"{\\"path\\": \\"a\\"}"', '{"path": "a"}'),
    *((text, json.dumps({"arguments": text}, separators=(",", ":"))) for text in (
        '{"path": "a', "{}{}", '{"a": 1}{"b": 2}', "aa", "[1]", "5", '"x"', '{"a": NaN}', "[" * 100000)),
    (5, '{"arguments":"5"}'), ([1], '{"arguments":"[1]"}'),
])
def test_arguments_are_mended(arguments, expected):
    body, changed = to_zai(chat_body(messages=[U, calling(arguments), RESULT, U]))
    text = body["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert text == (arguments if expected is None else expected)
    assert isinstance(json.loads(text), dict)
    assert changed == (set() if expected is None else {"arguments"})


FROM_TOOLS = {"type": "text", "text": "From the tool results:"}
NO_PICTURE = "[image left out: GLM-4.6 takes text only]"
TWO_CALLS = calls_of("c1", "c2")


@pytest.mark.parametrize("model", ["GLM-4.5V", "glm-5.3-flash", "glm-unheard-of"])
@pytest.mark.parametrize("messages, expected", [
    ([user([TEXT, PICTURE])], [user([TEXT, PICTURE])]),
    ([user([PICTURE])], [user([PICTURE, {"type": "text", "text": "."}])]),
    ([user([PICTURE, NO_TEXT])], [user([PICTURE, {"type": "text", "text": "."}])]),
    ([user([TEXT, PICTURE]), A, U], [user([TEXT, PICTURE]), A, U]),
    ([calling(), output("c1", [TEXT, PICTURE]), U],
     [calling(), output("c1", TEXT["text"]), user([FROM_TOOLS, PICTURE]), U]),
    ([calling(), output("c1", [PICTURE])], [calling(), output("c1", "(an image)"), user([FROM_TOOLS, PICTURE])]),
    ([TWO_CALLS, output("c1", [PICTURE]), output("c2", [PICTURE]), A, U, calling(), output("c1", [PICTURE]), U],
     [TWO_CALLS, output("c1", "(an image)"), output("c2", "(an image)"), user([FROM_TOOLS, PICTURE, PICTURE]), A, U,
      calling(), output("c1", "(an image)"), user([FROM_TOOLS, PICTURE]), U]),
])
def test_a_model_that_sees_gets_the_pictures(model, messages, expected):
    assert messages_to_zai(model=model, messages=messages) == (expected, set())


# Rows: OpenAI's messages, Z.ai's, for GLM-4.6, which sees nothing.
@pytest.mark.parametrize("messages, expected", [
    ([user([TEXT, PICTURE]), A, U], [user("What is it?\n" + NO_PICTURE), A, U]),
    ([user([PICTURE]), calling(), RESULT], [user(NO_PICTURE), calling(), RESULT]),
    ([U, calling(), output("c1", [TEXT, PICTURE])], [U, calling(), output("c1", "What is it?\n" + NO_PICTURE)]),
])
def test_a_model_that_sees_nothing_gets_a_word_for_pictures_of_the_past(messages, expected):
    assert messages_to_zai(messages=messages) == (expected, {"image"})


@pytest.mark.parametrize("model", ["glm-4.6", "glm-4.5v", "glm-unheard-of"])
@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
@pytest.mark.parametrize("part", [PICTURE, FILE, AUDIO])
def test_who_is_no_user_shows_nothing(model, role, part):
    (shown, _), changed = messages_to_zai(model=model, **said_by(role, content=[TEXT, part]))
    # Nothing is put into the assistant's mouth.
    pattern = r"What is it\?" if role == "assistant" else r"What is it\?\n\[\w+ left out: .*\]"
    assert re.fullmatch(pattern, shown["content"])
    assert len(changed) == 1


@pytest.mark.parametrize("model", ["glm-4.6", "glm-4.5v"])
@pytest.mark.parametrize("part", [FILE, AUDIO, {"type": "x,y\r\n"}, {"type": "image_url", "image_url": 5}])
@pytest.mark.parametrize("before", [
    lambda part: [user([TEXT, part]), A], lambda part: [calling(), output("c1", [TEXT, part])]])
def test_what_stands_in_the_past_is_never_refused(model, part, before):
    said = json.dumps(messages_to_zai(model=model, messages=[*before(part), U])[0])
    assert "left out" in said or json.dumps(json.dumps(part, separators=(",", ":")))[1:-1] in said


@pytest.mark.parametrize("model, part", [
    *((model, part) for model in ("glm-5.3-flash", "GLM-5.3-FlashX", "glm-9") for part in (FILE, FILE_URL)),
    *((model, FILE_URL) for model in ("glm-4.6v", "glm-4.5v", "glm-5v-turbo")),
])
def test_a_file_goes_to_models_that_take_files(model, part):
    assert messages_to_zai(model=model, **asking([TEXT, part]))[0] == [user([TEXT, part])]


ABSENT = "absent"
ON, OFF = {"type": "enabled"}, {"type": "disabled"}
SEARCH = {"type": "web_search", "web_search": {"enable": True}}
RETRIEVAL = {"type": "retrieval", "retrieval": {"knowledge_id": "1"}}
BARE_TOOL = {"type": "function", "function": {
    "name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}}
FOREIGN_TOOLS = [
    {"type": "web_search"}, {"type": "web_search", "web_search": None}, {"type": "mcp", "server_url": "x"},
    {"type": "local_shell"}, {"type": "retrieval"},
]
# Rows: OpenAI's fields, Z.ai's, what was changed.
CHANGES = [
    # Passed
    *(({name: value}, {name: value}, set()) for name, value in (
        ("temperature", 0), ("temperature", 1), ("temperature", 0.7), ("top_p", 0.95), ("max_tokens", 1),
        ("max_tokens", 131072), ("stop", ["a"]), ("do_sample", False), ("request_id", "req-12345"),
        ("user_id", "user-1"), ("seed", 5), ("thinking", {**ON, "clear_thinking": False}),
        ("thinking", {"clear_thinking": False}), ("tool_stream", False), ("a_field_of_tomorrow", [1, {"a": None}]))),
    *(({"model": model, "thinking": {"clear_thinking": False}, **more}, {"thinking": {**on, "clear_thinking": False}},
       changed) for model, more, on, changed in (
           ("glm-4.6", {}, {}, set()), ("glm-4.6", {"reasoning_effort": "high"}, ON, {"reasoning_effort"}),
           ("glm-5.2", {"reasoning_effort": "none"}, OFF, {"reasoning_effort"}),
           ("glm-4.7", {"enable_thinking": True}, ON, set()))),
    # Rounded, or brought into Z.ai's range
    *(({name: value}, {name: ours}, {name}) for name, value, ours in (
        ("temperature", 1.01, 1), ("temperature", 2, 1), ("temperature", 0.333, 0.33), ("top_p", 0, 0.01),
        ("top_p", 0.005, 0.01), ("top_p", 0.999, ABSENT), ("top_p", 0.123, 0.12), ("max_tokens", 131073, 131072),
        ("max_tokens", 10**30, 131072))),
    *(({"model": model, "max_tokens": value}, {"max_tokens": ours}, {"max_tokens"}) for model, value, ours in (
        ("glm-4.5-air", 131072, 98304), ("glm-4v-flash", 2000, 1024), ("autoglm-phone-multilingual", 5000, 4096))),
    ({"model": "glm-unheard-of", "max_tokens": 500000}, {"max_tokens": 500000}, set()),
    # Called otherwise, or ours alone
    ({"max_completion_tokens": 100}, {"max_tokens": 100, "max_completion_tokens": ABSENT}, set()),
    ({"max_completion_tokens": 100, "max_tokens": 200}, {"max_tokens": 100}, set()),
    ({"max_completion_tokens": 200000}, {"max_tokens": 131072}, {"max_tokens"}),
    *(({"stop": words}, {"stop": ours}, set()) for words, ours in (
        ("a", ["a"]), (["", "b", "c", "d"], ["b"]), ([], ABSENT), ("", ABSENT))),
    ({"user": "user-1"}, {"user_id": "user-1", "user": ABSENT}, set()),
    ({"user": "x" * 128}, {"user_id": "x" * 128}, set()),
    ({"user": "user-1", "user_id": "user-2"}, {"user_id": "user-2", "user": ABSENT}, set()),
    *(({"user": user}, {"user_id": hashlib.sha256(user.encode()).hexdigest(), "user": ABSENT}, set())
      for user in ("bob", "x" * 129)),
    *(({name: value}, {name: ABSENT}, set()) for name, value in (
        ("top_p", 1), ("n", 1), ("stream_options", {"include_usage": True}), ("reasoning_format", "raw"),
        ("parallel_tool_calls", False), ("response_format", {"type": "text"}))),
    # Dropped, by name if they ask for something
    *(({name: value}, {name: ABSENT}, {name}) for name in sorted(ztoapi.DROPPED - {"think", "thinking_budget"})
      for value in (1, "x", [1], {"a": "b"})),
    *(({name: value}, {name: ABSENT}, set()) for name in sorted(ztoapi.DROPPED - {"think", "thinking_budget"})
      for value in (0, False, "", [], {}, None)),
    ({"service_tier": "auto", "modalities": ["text"]}, {"service_tier": ABSENT, "modalities": ABSENT}, set()),
    ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}, set()),
    ({"tools": []}, {"tools": ABSENT, "tool_choice": ABSENT}, set()), ({"tools": [TOOL]}, {"tools": [TOOL]}, set()),
    ({"tools": [TOOL, TOOL2], "tool_choice": "auto"}, {"tools": [TOOL, TOOL2], "tool_choice": "auto"}, set()),
    ({"tools": [TOOL], "tool_choice": "none"}, {"tools": ABSENT, "tool_choice": ABSENT}, {"tool_choice"}),
    *((function(name="f", **more), {"tools": [BARE_TOOL]}, set())
      for more in ({}, {"description": "", "parameters": {}})),
    (function(strict=True, **TOOL["function"]), {"tools": [TOOL]}, {"strict"}),
    ({"tools": [SEARCH, RETRIEVAL, TOOL]}, {"tools": [SEARCH, RETRIEVAL, TOOL]}, set()),
    *(({"tools": [TOOL, tool]}, {"tools": [TOOL]}, {tool["type"]}) for tool in FOREIGN_TOOLS),
    *(({"tools": [tool]}, {"tools": ABSENT, "tool_choice": ABSENT}, {tool["type"]}) for tool in FOREIGN_TOOLS),
    ({"tools": [{"type": "a,b\r\n" + "x" * 1000}]}, {"tools": ABSENT}, {"a_b__" + "x" * 35}),
    *(({"tools": [TOOL], "stream": True, **more}, {"tool_stream": ours}, set()) for more, ours in (
        ({}, True), ({"tool_stream": False}, False), ({"model": "glm-4.5"}, ABSENT), ({"stream": False}, ABSENT),
        ({"tools": None}, ABSENT))),
    ({"tools": [TOOL], "stream": True, "tool_choice": "none"}, {"tool_stream": ABSENT}, {"tool_choice"}),
    # What users of OpenAI's SDK wrap by mistake
    ({"extra_body": {"temperature": 0.5}}, {"temperature": 0.5, "extra_body": ABSENT}, {"extra_body"}),
    ({"extra_body": {"temperature": 0.5}, "temperature": 0.2}, {"temperature": 0.2}, {"extra_body"}),
    ({"extra_body": {"a_field_of_tomorrow": 1, "extra_body": {"b": 1}}}, {"a_field_of_tomorrow": 1, "b": ABSENT},
     {"extra_body"}),
    ({"extra_body": "x"}, {"extra_body": ABSENT}, {"extra_body"}),
    ({"extra_body": {"thinking": OFF}}, {"thinking": OFF}, {"extra_body"}),
]


@pytest.mark.parametrize("fields, expected, changed", CHANGES)
def test_fields_become(fields, expected, changed):
    body, really = to_zai(chat_body(**fields))
    assert ({name: body.get(name, ABSENT) for name in expected}, really) == (expected, changed)


def test_nothing_of_openais_that_zai_does_not_know_goes_out():
    everything = chat_body()
    for fields, _, _ in CHANGES:
        everything.update(fields)
    everything.update(tools=[TOOL], tool_choice="auto", extra_body={})
    del everything["a_field_of_tomorrow"]
    assert set(to_zai(everything)[0]) <= {
        "model", "messages", "stream", "thinking", "reasoning_effort", "do_sample", "temperature", "top_p",
        "max_tokens", "tool_stream", "tools", "tool_choice", "stop", "response_format", "request_id", "user_id", "seed"}


@pytest.mark.parametrize("fields, facts", [
    ({}, {"tools": {}, "one_call": False, "json": False, "stop": ()}),
    ({"stop": ["a", "", "b"]}, {"stop": ("a", "b")}), ({"stop": "a"}, {"stop": ("a",)}),
    ({"tools": [TOOL, SEARCH, {"type": "mcp"}]}, {"tools": {"get_weather": {"city": {"string"}}}}),
    ({"tools": [TOOL], "tool_choice": "none"}, {"tools": {}}),
    ({"tools": [TOOL, TOOL2], "tool_choice": {"type": "function", "function": {"name": "get_time"}}},
     {"tools": {"get_time": {}}}),
    ({"parallel_tool_calls": False}, {"one_call": True}), ({"parallel_tool_calls": True}, {"one_call": False}),
    ({"response_format": {"type": "json_object"}}, {"json": True}), (schema({"schema": {}}), {"json": True}),
    ({"response_format": {"type": "text"}}, {"json": False}),
    ({}, {"no_thinking": False}), ({"enable_thinking": False}, {"no_thinking": True}),
    # It cannot stop.
    ({"enable_thinking": False, "model": "glm-5.3"}, {"no_thinking": False}),
])
def test_what_reading_the_answer_needs_to_know(fields, facts):
    _, result = by_door("chat", chat_body(**fields))
    assert {name: getattr(result, name) for name in facts} == facts


def allowed(mode, *names):
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(map(named, names))}}


# Rows: tool_choice, the tools that are left, whether the model is told to call one.
@pytest.mark.parametrize("choice, left, told", [
    ("required", [TOOL, TOOL2], True), (named("get_time"), [TOOL2], True),
    (allowed("auto", "get_time"), [TOOL2], False), (allowed("required", "get_weather"), [TOOL], True),
    ({"type": "web_search"}, [TOOL, TOOL2], False),
    ("any", [TOOL, TOOL2], True), ({"type": "tool", "name": "get_time"}, [TOOL2], True),
    ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]}, [TOOL2], True),
])
def test_a_forced_tool_choice_becomes_auto_with_fewer_tools_and_a_system_line(choice, left, told):
    messages = [S, U, {"role": "system", "content": "late"}]
    body, changed = to_zai(chat_body(messages=messages, tools=[TOOL, TOOL2], tool_choice=choice))
    added = [message for message in body["messages"] if message not in messages]
    assert (body["tools"], body["tool_choice"], changed) == (left, "auto", {"tool_choice"})
    assert [message["role"] for message in added] == ["system"] * told
    assert [message for message in body["messages"] if message in messages] == messages
    if told and len(left) == 1:
        assert left[0]["function"]["name"] in added[0]["content"]
    # The client's own prefix stays the prefix, for Z.ai's cache.
    assert body["messages"][0] == messages[0]


def test_zais_own_tools_stay_where_a_choice_allows_them():
    choice = allowed("auto", "get_time")
    tools = [TOOL, TOOL2, SEARCH]
    assert to_zai(chat_body(tools=tools, tool_choice=choice))[0]["tools"] == [TOOL2]
    choice["allowed_tools"]["tools"].append({"type": "web_search"})
    assert to_zai(chat_body(tools=tools, tool_choice=choice))[0]["tools"] == [TOOL2, SEARCH]


# Rows: a choice that names the tool "gone", which was left out; the tools that are left.
@pytest.mark.parametrize("choice, left", [
    (named("gone"), [TOOL]), (allowed("required", "gone"), [TOOL]),
    (allowed("required", "gone", "get_weather"), [TOOL]), (allowed("auto", "gone"), ABSENT),
    ({"type": "custom", "custom": {"name": "gone"}}, [TOOL]), ({"type": "tool", "name": "gone"}, [TOOL]),
])
def test_a_choice_of_a_tool_that_was_left_out_fails_nothing(choice, left):
    tools = [TOOL, {"type": "mcp", "name": "gone"}]
    body, changed = to_zai(chat_body(tools=tools, tool_choice=choice))
    assert (body.get("tools", ABSENT), changed) == (left, {"mcp", "tool_choice"})


def test_a_json_schema_becomes_json_object_with_the_schema_in_a_system_line():
    wanted = {"type": "object", "properties": {"größe": {"type": "number"}}, "required": ["größe"]}
    body, changed = to_zai(chat_body(**schema({"name": "a", "strict": True, "schema": wanted})))
    line, *rest = body["messages"]
    assert (body["response_format"], changed) == ({"type": "json_object"}, {"response_format"})
    assert (line["role"], rest) == ("system", [user("Hi")])
    assert json.loads(line["content"][line["content"].index("{"):]) == wanted
    assert "größe" in line["content"]


ALL_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
GRADES = dict(zip(ALL_EFFORTS, ("low", "low", "low", "high", "high", "max", "max")))
SWITCHED = (
    "glm-5.1", "glm-5", "glm-5-turbo", "glm-4.7-flash", "glm-4.6", "glm-4.5", "glm-4.5-air", "glm-4.5v", "glm-4.6v",
    "glm-5v-turbo", "glm-5.1-highspeed")
# To add a family, add a row: its models, and what (on or off, effort) becomes: thinking, reasoning_effort.
FAMILIES = {
    "always": (("glm-5.3", "glm-5.3-flash", "GLM-5.3-FlashX", "glm-5.3-highspeed"), lambda on, effort: (
        ON, GRADES.get(effort) if on else "low")),
    "graded": (("glm-5.2", "glm-5.2[1m]"), lambda on, effort: (ON, GRADES.get(effort)) if on else (OFF, None)),
    "switch": (SWITCHED, lambda on, effort: (ON if on else OFF, None)),
    "none": (("glm-4-flash-250414", "glm-4.1v-thinking-flash"), lambda on, effort: (None, None)),
    "unknown": (("glm-9",), lambda on, effort: (ON, effort) if on else (OFF, None)),
}
# To add a wish, add a row: the fields, ENABLE_THINKING, the wish that wins (None: there
# is none), the effort that counts.
WISHES = [
    ({}, "", None, None), ({}, "true", True, None), ({}, "false", False, None),
    *(({"reasoning_effort": effort}, default, effort not in ("none", "minimal"), effort)
      for effort in ALL_EFFORTS for default in ("", "true", "false")),
    *(({"thinking": ON if on else OFF}, default, on, None) for on, default in ((True, "false"), (False, "true"))),
    *(({"enable_thinking": on}, default, on, None) for on, default in ((True, "false"), (False, "true"))),
    *(({**wish, "reasoning_effort": effort}, "", on, effort) for wish, effort, on in (
        ({"thinking": OFF}, "high", False), ({"thinking": ON}, "max", True), ({"enable_thinking": False}, "max", False),
        ({"enable_thinking": True}, "low", True))),
    *(({"thinking": thinking, "enable_thinking": not on}, "", on, None) for thinking, on in ((ON, True), (OFF, False))),
]
WISH_CASES = [(family, model, *wish) for family in FAMILIES for model in FAMILIES[family][0] for wish in WISHES]


@pytest.mark.parametrize("family, model, fields, default, on, effort", WISH_CASES)
def test_thinking_is_asked_for_as_each_family_takes_it(family, model, fields, default, on, effort):
    body, changed = to_zai(chat_body(model=model, **fields), ENABLE_THINKING=default)
    thinking, grade = (None, None) if on is None else FAMILIES[family][1](on, effort)
    assert (body.get("thinking"), body.get("reasoning_effort")) == (thinking, grade)
    assert "enable_thinking" not in body
    # A wish that is not met is listed.
    is_met = on == (thinking == ON) or on is None or family == "none" and not on
    unmet = {"thinking": not is_met, "reasoning_effort": effort not in (None, grade)}
    assert changed == {name for name in unmet if unmet[name]}


# To add a place or a word, add a row: the fields, the same in ours.
@pytest.mark.parametrize("fields, ours", [
    # OpenRouter, vLLM, Ollama, Qwen, Google, Anthropic
    ({"reasoning": {"effort": "high"}}, {"reasoning_effort": "high"}),
    ({"reasoning": {"effort": "none"}}, {"reasoning_effort": "none"}),
    ({"reasoning": {"enabled": True, "exclude": True}}, {"enable_thinking": True}),
    ({"reasoning": {"enabled": False, "effort": "low"}}, {"enable_thinking": False, "reasoning_effort": "low"}),
    *((fields, ours) for budget, ours in (
        (0, {"enable_thinking": False}), (-1, {}), (1024, {"reasoning_effort": "low"}),
        (2000, {"reasoning_effort": "medium"}), (20000, {"reasoning_effort": "high"}),
        (200000, {"reasoning_effort": "max"}))
      for fields in ({"reasoning": {"max_tokens": budget}}, {"thinking_budget": budget},
                     {"thinking_config": {"thinking_budget": budget, "include_thoughts": True}},
                     {"thinking": {"budget_tokens": budget}})),
    *(({"chat_template_kwargs": wish}, ours) for wish, ours in (
        ({"enable_thinking": False}, {"enable_thinking": False}), ({"thinking": True}, {"enable_thinking": True}),
        ({"reasoning_effort": "max"}, {"reasoning_effort": "max"}))),
    *(({"think": value}, ours) for value, ours in (
        (True, {"thinking": ON}), (False, {"enable_thinking": False}), ("high", {"reasoning_effort": "high"}))),
    ({"thinking_config": {"thinking_level": "high"}}, {"reasoning_effort": "high"}),
    ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
    # Our own fields in other words
    *(({"thinking": value}, {"thinking": ON}) for value in (True, "enabled", "adaptive", {"type": "adaptive"})),
    *(({"thinking": value}, {"thinking": OFF}) for value in (False, "disabled", {"type": "disabled"})),
    *(({"enable_thinking": value}, {"enable_thinking": on}) for value, on in (("true", True), ("false", False))),
    ({"thinking": {**ON, "budget_tokens": 20000}}, {"thinking": ON, "reasoning_effort": "high"}),
    *(({"reasoning_effort": value}, ours) for value, ours in (
        ("auto", {}), ("default", {}), ("ultra", {"reasoning_effort": "max"}))),
    # Of two that say the same the first counts, and whether to think before how much
    ({"thinking": OFF, "enable_thinking": True, "reasoning": {"effort": "high"}},
     {"thinking": OFF, "reasoning_effort": "high"}),
    ({"thinking": {**ON, "budget_tokens": 20000}, "reasoning_effort": "low"},
     {"thinking": ON, "reasoning_effort": "low"}),
    ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, {"enable_thinking": False}),
    # What is no wish
    *((wish, {}) for wish in (
        {"include_reasoning": False}, {"thinking": {"type": "auto"}}, {"thinking": []}, {"enable_thinking": {}},
        {"reasoning": []}, {"reasoning": "x"}, {"reasoning": {"effort": ["high"]}}, {"reasoning": {"exclude": True}},
        {"chat_template_kwargs": {"enable_thinking": []}}, {"chat_template_kwargs": {"thinking": ON}})),
])
@pytest.mark.parametrize("model", ["glm-4.6", "glm-5.2", "glm-5.3", "glm-9"])
def test_a_wish_for_thinking_means_the_same_in_other_words(model, fields, ours):
    body, changed = to_zai(chat_body(model=model, **fields))
    assert body == to_zai(chat_body(model=model, **ours))[0]
    dropped = {name for name in fields if name in ztoapi.DROPPED or name == "extra_body"}
    assert changed >= {name for name in dropped if fields[name] not in ztoapi.NOTHING}


# All that a request may hold.
FULL_CHAT = chat_body(
    model="glm-4.5v", stream=True, stream_options={"include_usage": True}, user="somebody", stop=["a"], temperature=1,
    max_tokens=5, thinking={"type": "enabled"}, reasoning_effort="high", reasoning={"effort": "low"},
    chat_template_kwargs={"thinking": True}, extra_body={"top_p": 0.5}, tools=[TOOL, SEARCH, {"type": "mcp"}],
    tool_choice=allowed("required", "get_weather"), **schema({"schema": {"a": 1}}),
    messages=[
        system([TEXT]), user([TEXT, PICTURE, FILE_URL]),
        {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [CALL]}, output("c1", [TEXT, PICTURE]),
        assistant("x", thinking="r"), user([PICTURE]),
    ])


@each_door
def test_no_request_is_odd_enough_for_anything_but_a_400(door):
    rng = random.Random(5)
    passed = 0
    for _ in range(1000):
        request = mutated(FULL_CHAT, rng)
        if door == "responses":
            request["input"] = request.pop("messages", None)
        try:
            by_door(door, request)
            passed += 1
        except ztoapi.RequestError as error:
            assert error.param, request
        except Exception as error:
            raise AssertionError(request) from error
    assert 100 < passed < 995


# From Z.ai ############################################################################
#
# Z.ai's bytes go through an Answer, its steps through a Chat, streamed and folded: both
# must say the same, and every rule of the wire is checked on the way.

WEATHER = {
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}}},
    "get_time": {"type": "object", "properties": {}},
}
NEW_CHAT = {"id": "chatcmpl-1", "created": 1790000000, "model": "GLM-4.6"}


def describe(value, status=200, retry_after=""):
    return zai_error(value, status)


@functools.lru_cache(None)
def types_of(schema):
    return ztoapi.argument_types(json.loads(schema))


def asking_for(tools=(), **fields):
    """An Asked with these fields; the tools are name -> schema."""
    types = {name: types_of(json.dumps(schema)) for name, schema in dict(tools).items()}
    return ztoapi.Asked(**{"body": {}, "data": b"", "changed": (), "tools": types, "owners": {}, **fields})


def new_translator(restartable=False, make_id=lambda: "call_new", **fields):
    return ztoapi.Translator(asking_for(**fields), describe, restartable, make_id)


def new_answer(**options):
    """An Answer whose calls without an id get "call_new1", "call_new2" and so on."""
    numbers = itertools.count(1)
    return ztoapi.Answer(new_translator(make_id=lambda: f"call_new{next(numbers)}", **options))


def feed_answer(this, pieces):
    """(steps, failure): what the pump would tell of an Answer that these bytes come to."""
    steps = []
    for piece in pieces:
        if this.complete:
            break
        new, failure = this.feed(piece)
        steps += new
        if failure:
            assert this.complete
            return steps, failure
    return steps, None


def words_in(steps):
    return [(step.kind, step.text) for step in steps]


def joined(steps):
    """The same steps; pieces of one kind that came together are one."""
    runs = []
    for step in steps:
        ztoapi.extend(runs, step)
    return ztoapi.joined(runs)


def receive(pieces, **options):
    """(steps, failure) of these bytes; behind them the connection ends."""
    this = new_answer(**options)
    steps, failure = feed_answer(this, [*pieces, b""])
    assert this.complete
    return joined(steps), failure


def wire(data):
    """The bytes of the whole response for a body: of one JSON value, or of events, each in a chunk of its own."""
    if data.startswith(b"{"):
        return answer(200, data)[0]
    chunks = re.findall(rb"(?s).+?\n\n|.+", data)
    return b"".join(stream(*chunks))


def translated(data, **options):
    """The steps of an answer whose body this is; it must be a good one, the same however it arrives."""
    response = wire(data)
    steps, failure = receive([response], **options)
    if failure:
        raise failure
    for pieces in pieces_of(response, 20):
        assert receive(pieces, **options) == (steps, None), pieces[:3]
    return steps


def folded_stream(steps, reasoning="parsed"):
    """What a client makes of a stream; on the way every rule of the wire is checked."""
    chat = ztoapi.Chat(**NEW_CHAT, include_usage=True, reasoning=reasoning)
    blocks = (chat.opening() + chat.heartbeat() + chat.tell(steps)).split("\n\n")
    assert [blocks.pop(), blocks.pop()] == ["", "data: [DONE]"]
    values = [parse_chunk(block) for block in blocks]
    usage = values.pop()["usage"] if values[-1]["choices"] == [] else None
    assert [value["usage"] for value in values] == [None] * len(values)
    choices = [value["choices"][0] for value in values]
    assert [sorted(choice) for choice in choices] == [["delta", "finish_reason", "index", "logprobs"]] * len(choices)
    assert [choice["index"] for choice in choices] == [0] * len(choices)
    *before, finish = [choice["finish_reason"] for choice in choices]
    assert finish in ("stop", "length", "tool_calls", "content_filter")
    assert before == [None] * len(before)
    first, *deltas, last = [choice["delta"] for choice in choices]
    assert (first, last) == ({"role": "assistant", "content": ""}, {})
    return *fold_deltas(deltas), finish, usage


def parse_chunk(block):
    assert block.startswith("data: {")
    assert "\n" not in block
    value = json.loads(block[6:])
    envelope = {name: value[name] for name in ("id", "object", "created", "model")}
    assert envelope == dict(NEW_CHAT, object="chat.completion.chunk")
    assert len(value["choices"]) <= 1
    return value


def fold_deltas(deltas):
    texts = {"content": "", "reasoning_content": ""}
    calls = []
    for delta in deltas:
        assert set(delta) in ({"content"}, {"reasoning_content"}, {"tool_calls"}, set())
        for name in set(texts) & set(delta):
            assert delta[name] != ""
            texts[name] += delta[name]
        for piece in delta.get("tool_calls", ()):
            fold_call(calls, piece)
    return texts["content"], texts["reasoning_content"], calls


def fold_call(calls, piece):
    function = piece["function"]
    assert isinstance(function["arguments"], str)
    if piece["index"] == len(calls):
        assert (list(piece), piece["type"]) == (["index", "id", "type", "function"], "function")
        assert all(text and isinstance(text, str) for text in (piece["id"], function["name"]))
        calls.append({"id": piece["id"], "name": function["name"], "arguments": ""})
    else:
        assert (list(piece), list(function)) == (["index", "function"], ["arguments"])
        assert 0 <= piece["index"] < len(calls)
    calls[piece["index"]]["arguments"] += function["arguments"]


def folded_json(steps, reasoning="parsed"):
    """The same of the JSON answer, whose shape is checked to the letter."""
    fold = ztoapi.Fold()
    for step in steps:
        fold.add([step])
    chat = ztoapi.Chat(**NEW_CHAT, stream=False, reasoning=reasoning)
    whole = json.loads(ztoapi.encode_json(chat.whole(fold)).decode("utf-8"))
    (choice,) = whole.pop("choices")
    usage = whole.pop("usage", None)
    assert whole == dict(NEW_CHAT, object="chat.completion")
    message = choice["message"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert (choice["index"], choice["logprobs"]) == (0, None)
    assert (message.pop("role"), message.pop("refusal")) == ("assistant", None)
    assert set(message) <= {"content", "reasoning_content", "tool_calls"}
    calls = message.get("tool_calls", [])
    assert isinstance(message["content"], str) or calls
    assert [set(call) for call in calls] == [{"id", "type", "function"}] * len(calls)
    assert [call["type"] for call in calls] == ["function"] * len(calls)
    assert [set(call["function"]) for call in calls] == [{"name", "arguments"}] * len(calls)
    calls = [dict(id=call["id"], **call["function"]) for call in calls]
    return message["content"] or "", message.get("reasoning_content", ""), calls, choice["finish_reason"], usage


def without_surrogates(folded):
    """As it reaches a client: what UTF-8 cannot spell is a question mark."""
    return json.loads(ztoapi.encode_json(list(folded)).decode("utf-8"))

def says(content="", reasoning="", calls=(), finish="stop", usage=USAGE):
    """What an answer must come to."""
    return {"content": content, "reasoning": reasoning, "calls": list(calls), "finish": finish, "usage": usage}

def asks(*calls, finish="tool_calls", **more):
    """The same of an answer that asks for these calls."""
    return says(calls=calls, finish=finish, **more)


def check_answer(data, expected, reasoning="parsed", **options):
    """The answer is as expected, and the streamed and the JSON one agree; gives its calls."""
    folded = folded_stream(translated(data, **options), reasoning)
    steps, failure = receive([wire(data)], restartable=True, **options)
    assert (failure, list(folded_json(steps, reasoning))) == (None, without_surrogates(folded))
    content, thinking, calls, finish, usage = folded
    assert len({call["id"] for call in calls}) == len(calls)
    pairs = [(call["name"], call["arguments"]) for call in calls]
    assert says(content, thinking, pairs, finish, usage) == expected
    return calls


def calls_in(*items, finish=None, **delta):
    """An event with these items as its tool calls."""
    return event(dict(delta, tool_calls=list(items)), finish)

def item(name=None, arguments=None, **more):
    function = {"name": name, "arguments": arguments}
    return dict(more, function={key: value for key, value in function.items() if value is not None})

def finished(finish, usage=USAGE):
    return event(finish=finish, usage=usage) + DONE


ENDED = finished("stop")
TOOLS_END = finished("tool_calls")
PARIS = '{"city":"Paris"}'
RAIN = ("get_weather", PARIS)
TIME = ("get_time", "{}")
CITY = "<arg_key>city</arg_key><arg_value>Paris</arg_value>"  # PARIS as GLM itself writes it
WISH = f"<tool_call>get_weather{CITY}</tool_call>"


def leak(text):
    return f"<tool_call>{text}</tool_call>"

def frames(head, *rests):
    """The frames of a stream, which begin alike."""
    return b"".join(b"data: " + head + rest + b"\n\n" for rest in rests) + DONE


# Verbatim from the dialect sheet, sections 1 and 2.
GLM_52_TOOLS = frames(
    rb'{"id":"20260813125025af371d7f88184d47","created":1786596625,"object":"chat.completion.chunk","model":"glm-5.2",',
    rb'"choices":[{"index":0,"delta":{"role":"assistant","reasoning_content":"The"}}]}',
    rb'"choices":[{"index":0,"delta":{"role":"assistant","reasoning_content":" user"}}]}',
    rb'"choices":[{"index":0,"delta":{"tool_calls":[{"id":"call_438b313737df40b7b2972a81","index":0,"type":"function",'
    rb'"function":{"name":"get_weather","arguments":"{\"city\":\"Paris\"}"}}]}}]}',
    rb'"choices":[{"index":0,"finish_reason":"tool_calls","delta":{"role":"assistant","content":""}}],'
    rb'"usage":{"prompt_tokens":178,"completion_tokens":37,"total_tokens":215,"prompt_tokens_details":'
    rb'{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":25}}}')
GLM_45_TOOLS = frames(
    rb'{"id":"2025091420174501de064dedfa4b68","created":1757852265,"model":"glm-4.5-flash","choices":[{"index":0,',
    rb'"delta":{"role":"assistant","content":"\n"}}]}',
    rb'"finish_reason":"tool_calls","delta":{"tool_calls":[{"id":"call_4BgN84hpTbmswCBFSC9ggw","index":-1,'
    rb'"type":"function","function":{"name":"add","arguments":"{\"a\": 365, \"b\": 96}"}}]}}]}',
    rb'"finish_reason":"tool_calls","delta":{"role":"assistant","content":""}}],"usage":{"prompt_tokens":170,'
    rb'"completion_tokens":72,"total_tokens":242,"prompt_tokens_details":{"cached_tokens":43}}}')
GLM_46_JSON = r"""{"choices":[{"finish_reason":"stop","index":0,"message":{"content":"\n您好！",
"reasoning_content":"\n用户","role":"assistant"}}],"created":1770631146,"id":"2026020917585695a7e8be40254c7c",
"model":"glm-4.6","object":"chat.completion","request_id":"2026020917585695a7e8be40254c7c",
"usage":{"completion_tokens":329,"completion_tokens_details":{"reasoning_tokens":253},"prompt_tokens":9,
"prompt_tokens_details":{"cached_tokens":4},"total_tokens":338}}""".replace("\n", "").encode()
GLM_52_JSON = r"""{"choices":[{"finish_reason":"tool_calls","index":0,"message":{"content":"好的",
"reasoning_content":"The user wants","role":"assistant","tool_calls":[
{"function":{"arguments":"{\"city\":\"北京\"}","name":"get_weather"},"id":"call_-7391102189101383143","index":0,
"type":"function"},{"function":{"arguments":"{\"city\":\"上海\"}","name":"get_time"},"id":"call_-7391102189101383142","index":1,
"type":"function"}]}}],"id":"1"}""".replace("\n", "").encode()
MINIMAL = {"id": "", "object": "", "created": 0, "model": "", "system_fingerprint": None}

# Good answers.
@cases("data, expected", [
    ("glm-5.2, tools", GLM_52_TOOLS, asks(RAIN, reasoning="The user", usage=counts(178, 37, 215, 0, 25))),
    ("glm-4.5, index -1, double finish", GLM_45_TOOLS,
     asks(("add", '{"a": 365, "b": 96}'), usage=counts(170, 72, 242, 43))),
    ("glm-4.5, max_tokens 1", think("\n") + finished("length"), says(finish="length")),
    ("glm-4.6, one JSON body", GLM_46_JSON, says("您好！", "用户", usage=counts(9, 329, 338, 4, 253))),
    ("glm-5.2, one JSON body, parallel calls", GLM_52_JSON,
     asks(("get_weather", '{"city":"北京"}'), ("get_time", '{"city":"上海"}'), content="好的",
            reasoning="The user wants", usage=None)),
    # Events of many kinds
    ("OpenAI's own chunks",
     sse({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}],
          "usage": None},
         {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": USAGE}) + DONE,
     says("a")),
    *(("no " + what, say("a") + end, says("a")) for what, end in (
        ("[DONE]", FINISH), ("last blank line", FINISH.rstrip(b"\n")),
        ("[DONE], usage behind the finish", event(finish="stop") + sse({"usage": USAGE})))),
    ("no [DONE], no usage", say("a") + event(finish="stop"), says("a", usage=None)),
    ("CRLF, comments, names and ids",
     b": hi\r\n\r\nevent: message\r\nid: 1\r\n" + (say("a") + ENDED).replace(b"\n", b"\r\n"), says("a")),
    ("choices null, or of other kinds",
     sse(dict(MINIMAL, choices=None, usage=None)) + say("a")
     + sse(*({"choices": choices} for choices in (None, [], [None], {}, "x", [{}], [{"delta": None}])), {})
     + say("b") + ENDED, says("ab")),
    ("events that are no objects, and lines that are no JSON",
     say("a") + b'data: 42\n\ndata: [1]\n\ndata: null\n\ndata: "x"\n\ndata: true\n\n'
     + b'data: garbage\n\ndata: "id\n\ndata:\n\n' + say("b") + b"junk\n" + ENDED, says("ab")),
    ("blanks around the JSON",
     say("a").replace(b"data: ", b"data:   \t").replace(b"\n\n", b"  \n\n") + ENDED, says("a")),
    ("another model, another id",
     event({"content": "a"}, model="glm-5.3") + event({"content": "b"}, id="x", created=1) + ENDED, says("ab")),
    ("fields of the wrong kind",
     sse({"choices": [{"delta": {"content": [], "reasoning_content": {}, "tool_calls": ""}}]},
               {"choices": [{"delta": {"tool_calls": []}}]}) + say("a") + ENDED, says("a")),
    ("text after the finish", say("a") + FINISH + say("b") + ENDED, says("a")),
    ("an error after the finish", say("a") + FINISH + sse({"error": {"code": "500", "message": "x"}}), says("a")),
    ("content and reasoning in one event",
     say("a") + event({"reasoning_content": "r", "content": "b"}) + event({"content": "c", "reasoning_content": "s"})
     + ENDED, says("abc", "rs")),
    ("nothing but a finish, but tokens", ENDED, says()), ("nothing but thinking", think("hm") + ENDED, says("", "hm")),
    ("nothing but thinking, cut", think("hm") + finished("length"), says("", "hm", finish="length")),
    ("nothing but a filter", finished("sensitive", None), says(finish="content_filter", usage=None)),
    ("line ends first",
     think("\n") + think("\r\n\n hm\n") + say("\n\n") + say("\na\n") + say("\n") + ENDED, says("a\n\n", " hm\n")),
    # Finish reasons
    *((f"finish {given}", say("a") + finished(given), says("a", finish=ours)) for given, ours in (
        ("stop", "stop"), ("length", "length"), ("sensitive", "content_filter"), ("content_filter", "content_filter"),
        ("model_context_window_exceeded", "length"))),
    ("finish function_call, as gateways say", call() + finished("function_call"), asks(RAIN)),
    ("finish sensitive, as documented",
     say("a") + event(user(""), "sensitive", USAGE, content_filter=[{"role": "user", "level": 0}]) + DONE,
     says("a", finish="content_filter")),
    *((f"finish {first}, then {second}", say("a") + event(finish=first) + finished(second), says("a", finish=ours))
      for first, second, ours in (
        ("length", "stop", "length"), ("stop", "length", "length"), ("sensitive", "stop", "content_filter"))),
    ("finish empty, then real", sse({"choices": [{"delta": {"content": "a"}, "finish_reason": ""}]}) + ENDED,
     says("a")),
    ("stop after a call", call() + ENDED, asks(RAIN)),
    *((f"length within a call, behind {cut!r}", call("get_weather", cut) + finished("length"),
       asks(("get_weather", cut), finish="length")) for cut in ("", '{"ci', "{}")),
    # Usage
    *((f"usage of {usage}", say("a") + finished("stop", usage), says("a", usage=usage)) for usage in (
        counts(1, 2, 3), counts(1, 2, 3, 4), counts(1, 10**12 - 1, 10**12))),
    ("usage with holes",
     say("a") + finished("stop", dict(counts(1, None, None), prompt_tokens_details=None, completion_tokens_details={})),
     says("a", usage=counts(1, 0, 1, reasoning=0))),
    ("usage on every event", event({"content": "a"}, usage=counts(1, 1, 2)) + ENDED, says("a")),
    ("usage before the finish only", event({"content": "a"}, usage=USAGE) + event(finish="stop") + DONE, says("a")),
    ("usage null", say("a") + sse({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": None}) + DONE,
     says("a", usage=None)),
    *((f"usage of {str(odd):.12}", say("a") + finished("stop", counts(1, odd, 5)), says("a", usage=counts(1, 0, 1)))
      for odd in (-1, 10**12, 10**400, 1.5, "7", True, None, [7], float("nan"), float("inf"))),
    # Tool calls, whole
    ("two calls, one id on the first",
     calls_in(item(*RAIN, id="c", index=0, type="function"), item(*TIME, index=1, type="function")) + TOOLS_END,
     asks(RAIN, TIME)),
    *((f"two calls, an event each, the same id, {where}",
       call(*RAIN, "c") + calls_in(item(name, '{"a":2}', id="c", **where)) + TOOLS_END,
       asks(RAIN, (name, '{"a":2}'))) for name, where in (
           ("get_time", {"index": 1}), ("get_time", {"index": 0}), ("get_time", {}), ("get_weather", {"index": 1}))),
    *((f"two calls of one tool, no id, {where}",
       calls_in(item("get_time", '{"a":1}', **where), item("get_time", '{"a":2}', **where)) + TOOLS_END,
       asks(("get_time", '{"a":1}'), ("get_time", '{"a":2}'))) for where in ({"index": 0}, {"index": -1}, {})),
    *((f"two calls, an event each, no id, {where}",
       calls_in(item(*TIME, **where)) + calls_in(item(*TIME, **where)) + TOOLS_END,
       asks(TIME, TIME)) for where in ({"index": 0}, {"index": -1}, {})),
    ("numeric, empty and null ids",
     calls_in(item(*RAIN, id=-73911021), item(*TIME, id=""), item(*TIME, id=None), item(*TIME, id=0)) + TOOLS_END,
     asks(RAIN, TIME, TIME, TIME)),
    ("arguments an object", call("get_weather", {"city": "北京"}) + TOOLS_END,
     asks(("get_weather", '{"city":"北京"}'))),
    *((f"arguments an object with {number}",
       b'data: {"choices":[{"delta":{"tool_calls":[{"id":"c","function":{"name":"f","arguments":{"a":%b}}}]}}]}\n\n'
       % number.encode() + TOOLS_END,
       asks(("f", '{"a":null}'))) for number in ("NaN", "-Infinity", "1e999")),
    *((f"arguments {arguments}",
       calls_in({"id": "c", "function": {"name": "get_time", "arguments": arguments}}) + TOOLS_END, asks(TIME))
      for arguments in ("", "{}", None, {})),
    ("arguments missing", calls_in(item("get_time", id="c")) + TOOLS_END, asks(TIME)),
    *((f"arguments {first!r}, then real ones",
       call("get_weather", first) + calls_in(item(None, '{"city":', index=0))
       + calls_in(item(None, '"Paris"}', index=0)) + TOOLS_END, asks(RAIN)) for first in ("{}", "null", " ")),
    ("arguments '{}' and real ones in one", call("get_weather", "{} " + PARIS) + TOOLS_END, asks(RAIN)),
    *((f"arguments '{{}}', then {behind!r}",
       call("get_time", "{}") + calls_in(item(None, behind, index=0)) + TOOLS_END,
       asks(TIME)) for behind in ("}", "</tool_call>", "{}")),
    *((f"behind the arguments {behind!r}", call("get_weather", PARIS + behind) + TOOLS_END,
       asks(RAIN)) for behind in (PARIS, "\n" + PARIS, '{"b":1}', "}", "\n</tool_call>")),
    *((f"arguments twice, {where}",
       call("get_weather", '{"city":', "c") + calls_in(item(None, '"Paris"}', index=0))
       + calls_in(item(name, PARIS, **where)) + TOOLS_END, asks(RAIN))
      for name, where in ((None, {"index": 0}), ("get_weather", {"id": "c", "index": 0}))),
    ("arguments missing, then blanks", calls_in(item("get_time", id="c", index=0)) + calls_in(item(None, " ", index=0))
     + TOOLS_END, asks(TIME)),
    ("content, reasoning and a call in one event",
     say("a") + calls_in(item(*RAIN, id="c"), content="b", reasoning_content="r") + TOOLS_END,
     asks(RAIN, content="ab", reasoning="r")),
    ("a call between texts", say("a") + call() + say("b") + ENDED, asks(RAIN, content="ab")),
    ("a call and its finish in one event", calls_in(item(*RAIN, id="c"), finish="tool_calls") + DONE,
     asks(RAIN, usage=None)),
    # Tool calls in fragments
    *((f"fragments, {kind}",
       calls_in(dict(item("get_weather", '{"', **first), type="function"))
       + b"".join(calls_in(item(name, part, **later)) for part in ('city":', "", '"Paris', '"}')) + TOOLS_END,
       asks(RAIN)) for kind, first, name, later in (
          ("id and name once", {"id": "call_1", "index": 0}, None, {"index": 0, "type": "function"}),
          ("nothing but the index", {"id": "call_1", "index": 0}, None, {"index": 0}),
          ("nothing at all", {"id": "call_1"}, None, {}),
          ("index -1", {"id": "call_1", "index": -1}, None, {"index": -1}),
          ("everything repeated", {"id": "call_1", "index": 0}, "get_weather",
           {"id": "call_1", "index": 0, "type": "function"}),
          ("id repeated", {"id": "call_1", "index": 0}, None, {"id": "call_1", "index": 0}),
          ("id empty afterwards", {"id": "call_1", "index": 0}, "", {"id": "", "index": 0}),
          ("no id, name repeated", {"index": 0}, "get_weather", {"index": 0}))),
    *((f"fragments of two calls in turn, from index {first}",
       calls_in(item("get_weather", '{"city"', id="a", index=first))
       + calls_in(item("get_time", "{", id="b", index=first + 1))
       + calls_in(item(None, ':"Paris"', index=first))
       + calls_in(item(None, "}", index=first + 1), item(None, "}", index=first)) + TOOLS_END,
       asks(RAIN, TIME)) for first in (0, 1)),
    ("fragments that begin with nothing",
     call("get_weather", "") + calls_in(item(index=0))
     + calls_in(item(None, PARIS, index=0)) + TOOLS_END, asks(RAIN)),
    # Markup in names and keys
    *((f"the name {name!r}", call(name, PARIS) + TOOLS_END, asks(RAIN)) for name in (
        " get_weather", "get_weather\n", "get_weather</arg_value>", "get_weather</tool_call>",
        "get_weather <arg_key>")),
    *((f"the name {name!r} is no tool's", call(name, PARIS) + TOOLS_END, asks((name, PARIS)))
      for name in ("x</arg_value>", "get_weather<arg_key>city</arg_key>")),
    *((f"the key {key!r}", call("get_weather", {key: "Paris"}) + TOOLS_END, asks(RAIN))
      for key in (
        "city</arg_key>", "city<arg_key>", "city</arg_value>", "city </arg_key>\n<arg_value>", "city</tool_call>",
        "city<tool_call>")),
    *((f"markup in a key, in pieces of {size}", calls_in(
        item("get_weather", "", id="c", index=0),
        *(item(None, text[at:at + size], index=0) for at in range(0, len(text), size))) + TOOLS_END,
       asks(("get_weather", '{"city":"</arg_key>", "a<b":1}')))
      for text in ['{"city</arg_key>":"</arg_key>", "a<b":1}', '{"city</tool_call>":"</arg_key>", "a<b":1}']
      for size in (1, 3, 8)),
    ("markup in a value is a text", call("get_time", {"a": "x</arg_key>"}) + TOOLS_END,
     asks(("get_time", '{"a":"x</arg_key>"}'))),
    *((f"arguments in the name, {arguments}",
       calls_in(item("get_weather" + CITY, arguments, id="c", index=0)) + TOOLS_END, asks(RAIN))
      for arguments in ("", "{}", " {} ", None, {}, '{"b":1}')),
    # Leaks into the wrong field
    ("thinking in the content", say("<think>Got it\n") + say("</think>\n\nYes") + ENDED, says("Yes", "Got it\n")),
    ("thinking in the content, never closed", say("<think>Got it") + finished("length"),
     says("", "Got it", finish="length")),
    ("boxes", think("<|begin_of_box|>a<|end_of_box|>") + say("It is <|begin_of_box|>42<|end_of_box|>.") + ENDED,
     says("It is 42.", "a")),
    ("a call in the content",
     say("Let me see. <tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>")
     + ENDED, asks(RAIN, content="Let me see. ")),
    ("a call in the reasoning", think("I call " + leak("get_weather" + CITY)) + ENDED,
     asks(RAIN, reasoning="I call ")),
    ("a call in thinking in the content", say("<think>I call " + leak("get_weather" + CITY) + "</think>") + ENDED,
     asks(RAIN, reasoning="I call ")),
    ("two calls in the content",
     say(leak("get_time") + leak("get_time<arg_key>n</arg_key><arg_value>5</arg_value><arg_key>o</arg_key>"
                                 '<arg_value>{"a":1}</arg_value>')) + ENDED,
     asks(TIME, ("get_time", '{"n":5,"o":{"a":1}}'))),
    ("strings and what is no JSON in a call in the content",
     say(leak("get_weather<arg_key>city</arg_key><arg_value>5</arg_value>"
              "<arg_key>a</arg_key><arg_value>5 apples</arg_value>")) + ENDED,
     asks(("get_weather", '{"city":"5","a":"5 apples"}'))),
    ("a call in the content with NaN", say(leak("get_time<arg_key>n</arg_key><arg_value>NaN</arg_value>")) + ENDED,
     asks(("get_time", '{"n":"NaN"}'))),
    ("a call in the content that names no tool", say(f"Write {leak('name')} so.") + ENDED,
     says(f"Write {leak('name')} so.")),
    ("a call in the content and the real one", say(leak("get_time")) + call() + TOOLS_END, asks(RAIN)),
    ("a call in the content, cut behind its arguments", say("<tool_call>get_weather" + CITY) + ENDED, asks(RAIN)),
    ("a call in the content, cut by length", say("<tool_call>get_weather" + CITY) + finished("length"),
     says("<tool_call>get_weather" + CITY, finish="length")),
    ("a call in the content, whole before length", say(leak("get_weather" + CITY)) + finished("length"),
     asks(RAIN, finish="length")),
    ("a call in the content, cut in the next tag", say("<tool_call>get_weather" + CITY + "</tool_") + ENDED,
     says("<tool_call>get_weather" + CITY + "</tool_")),
    ("a tool's name behind the tag, at the end", say("So <tool_call>get_time") + ENDED, says("So <tool_call>get_time")),
    # A tag of a leaked call doubled does no harm; one that is missing may have taken an argument with it
    *((f"a leaked call, {text}", say(leak(text)) + ENDED, asks(RAIN)) for text in (
        "get_weather" + CITY + "</arg_value>", " get_weather\n" + CITY, "get_weather</arg_value>" + CITY,
        "get_weather<arg_key>city</arg_key></arg_key><arg_value>Paris</arg_value>",
        "get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></arg_value>",
        "get_weather<arg_key>city<arg_value>Paris</arg_value>",
        "get_weather<arg_key>city</arg_key><arg_value><arg_value>Paris</arg_value>",
        "get_weather" + CITY + "</tool_call>", "get_weather<arg_key> city </arg_key>\n<arg_value>Paris</arg_value>\n",
        "get_weather<arg_key>city</arg_key>Paris</arg_value>", "get_weather<arg_key>city</arg_key><arg_value>Paris",
        "get_weather<arg_key><arg_key>city</arg_key><arg_value>Paris</arg_value>",
        "get_weather<arg_key>city</arg_value>Paris</arg_value>", "get_weather<arg_key>city<arg_key>Paris</arg_key>",
        "<tool_call>get_weather" + CITY, "\n<tool_call>\nget_weather" + CITY)),
    *((f"a leaked call without a city, {text}", say(leak("get_weather" + text)) + ENDED,
       asks(("get_weather", '{"city":""}'))) for text in (
        "<arg_key>city</arg_key><arg_value></arg_value>", "<arg_key>city</arg_key></arg_value>",
        "<arg_key>city<arg_value></arg_value>", "<arg_key>city</arg_key>\n<arg_value>")),
    *((f"two arguments leaked, {text}", say(leak("get_time" + text)) + ENDED,
       asks(("get_time", '{"a":"x","b":""}'))) for text in (
        "<arg_key>a</arg_key><arg_value>x<arg_key>b</arg_key><arg_value></arg_value>",
        "<arg_key>a</arg_key>x</arg_value>b</arg_key><arg_value></arg_value>",
        "<arg_key>a</arg_key><arg_value>x</arg_value><arg_key>b<arg_value>")),
    ("two calls leaked, the end of the first is missing",
     say("<tool_call>get_weather" + CITY + "\n" + leak("get_time")) + ENDED, asks(RAIN, TIME)),
    *((f"no call, {text}", say(leak(text)) + ENDED, says(leak(text))) for text in (
        "get_weather city</arg_key><arg_value>Paris</arg_value>", "get_weather<arg_key>city</arg_key>",
        "get_weather<arg_key></arg_key><arg_value>Paris</arg_value>", 'get_weather{"city": "Paris"}',
        "get_weather" + CITY + CITY.replace("Paris", "Rome"), "get_weather<arg_value>Paris</arg_value>", CITY, "",
        "get_weather" + CITY + "and so on", "get_time<arg_key>a</arg_key><arg_value>use <arg_key> tags</arg_value>",
        "get_time<arg_key>a</arg_key><arg_value>x</arg_value>y<arg_key>b</arg_key><arg_value>z</arg_value>w")),
    # A call that was only thought of is none
    *((f"a call thought of, then {what}", think("I could ") + think(WISH) + rest + ENDED, says(content, reasoning))
      for what, rest, content, reasoning in (
          ("text", think(" but it is forbidden.") + say("No."), "No.", f"I could {WISH} but it is forbidden."),
          ("text at once", say("No."), "No.", f"I could {WISH}"),
          ("thinking alone", think("\nNo."), "", f"I could {WISH}\nNo."))),
    *((f"a call in the reasoning, then {what}", think("So ") + think(WISH) + rest, asks(RAIN, reasoning="So "))
      for what, rest in (
          ("line ends", say("\n") + ENDED), ("blanks", think(" \n") + ENDED),
          ("a tag", think("<|observation|>") + ENDED), ("the same call", call() + TOOLS_END))),
    ("a call thought of, and another one", think(WISH + "No. ") + think(leak("get_time")) + ENDED,
     asks(TIME, reasoning=WISH + "No. ")),
    ("a call thought of in <think>", say(f"<think>{WISH} No.</think>\nNo.") + ENDED, says("No.", f"{WISH} No.")),
    ("a call in <think>, and another in the text", say(f"<think>{WISH}</think>" + leak("get_time")) + ENDED,
     asks(TIME, reasoning=WISH)),
    # Tags of the template at the ends of texts
    *((f"tags around {text!r}", say(f"<|assistant|>{first}{text}<|user|>{last}<|endoftext|>\n") + ENDED, says(text))
      for first, text, last in (("", "a", ""), ("\n", "a <|user|> b", "\n"), ("</think>\n", "a", "<|observation|>"))),
    ("tags of the template in thinking", think("<|assistant|>a<|user|>") + think(" b<|user|>") + say("c") + ENDED,
     says("c", "a<|user|> b")),
    ("a tag of the template that is cut", say("a<|use") + ENDED, says("a<|use")),
    ("usage that is torn", say("a") + finished("stop", None) + b'data: {"us\n\n' + DONE, says("a", usage=None)),
    ("nothing but tags of the template", say("<|user|>") + ENDED, says()),
    # One call at a time
    ("calls that interleave, and a text between them",
     calls_in(item("get_weather", '{"city":', id="a", index=0), item("get_time", '{"b"', id="b", index=1)) + say("c")
     + calls_in(item(None, ":2}", index=1), item(None, '"Paris"}', index=0)) + TOOLS_END,
     asks(RAIN, ("get_time", '{"b":2}'), content="c")),
    ("a text behind a call without arguments", call("get_time", "") + say("a") + ENDED, asks(TIME, content="a")),
    *((f"fragments of one event, the name {name}", calls_in(
        item("get_weather", '{"city":', id="a", index=0), item(name, '"Paris', id="a", index=0),
        item(name, '"}', index=0)) + TOOLS_END, asks(RAIN)) for name in (None, "get_weather")),
    # Ids that change
    *((f"another id for each piece, {where}", calls_in(item("get_weather", '{"ci', id="a", index=0))
       + calls_in(item(name, 'ty":"P', id="b", index=0)) + calls_in(item(name, 'aris"}', id="c", index=0)) + TOOLS_END,
       asks(RAIN))
      for where, name in (("no name", None), ("the name again", "get_weather"))),
    ("another id for each piece of two calls",
     calls_in(item("get_weather", '{"city"', id="a", index=0), item("get_time", '{"b"', id="b", index=1))
     + calls_in(item(None, ":2}", id="c", index=1), item(None, ':"Paris"}', id="d", index=0)) + TOOLS_END,
     asks(RAIN, ("get_time", '{"b":2}'))),
    # Texts that must arrive as they are
    ("U+2028, NUL and astral", say("a\u2028b\u2029\u0085\0") + say("\U0001f600 \"\\\n") + ENDED,
     says("a\u2028b\u2029\u0085\0\U0001f600 \"\\\n")),
    ("lone surrogates", sse(b'data: {"choices":[{"delta":{"content":"\\ud83d \\udfff"}}]}\n\n') + ENDED,
     says("\ud83d \udfff")),
    ("a tab that is not escaped", say("a\\tb").replace(b"\\\\t", b"\t") + ENDED, says("a\tb")),
    ("data: in the text", say("the line\ndata: {\"a\":1}\n\ndata: [DONE]\n\n") + say(" data: x") + ENDED,
     says("the line\ndata: {\"a\":1}\n\ndata: [DONE]\n\n data: x")),
])
def test_an_answer_is_understood_and_streamed_and_json_agree(data, expected):
    check_answer(data, expected, tools=WEATHER)


STRING, ARRAY = {"type": "string"}, {"type": "array"}
TASK = {"edit": {
    "$defs": {
        "Row": {"type": "object"}, "Rows": {"anyOf": [ARRAY, {"type": "null"}]}, "Loop": {"$ref": "#/$defs/Loop"}},
    "properties": {
        "text": STRING, "rows": ARRAY, "row": {"$ref": "#/$defs/Row"}, "many": {"$ref": "#/$defs/Rows"},
        "all": {"allOf": [{"$ref": "#/$defs/Rows"}]}, "count": {"type": "integer"}, "share": {"type": "number"},
        "yes": {"type": ["boolean", "null"]}, "one": {"enum": [1, 2]}, "two": {"const": 2}, "any": {}, "odd": True,
        "maybe": {"anyOf": [STRING, {"type": "null"}]}, "word": {"enum": ["1", 2]},
        "either": {"oneOf": [STRING, ARRAY]}, "loop": {"$ref": "#/$defs/Loop"}, "lost": {"$ref": "#/$defs/None"},
        "wrong": {"type": 5}, "union": {"anyOf": [ARRAY, {}]}}}}


def told_arguments(arguments, name="edit"):
    """What becomes of the arguments of a call, the same in pieces of every size."""
    told = set()
    for size in (1, 2, 3, 7, 10**6):
        pieces = [arguments[at:at + size] for at in range(0, len(arguments), size)]
        rest = b"".join(calls_in(item(None, piece, index=0)) for piece in pieces)
        data = calls_in(item(name, "", id="a", index=0)) + rest + TOOLS_END
        steps, failure = receive([wire(data)], tools=TASK)
        assert failure is None
        told.add(steps[0].text)
    (text,) = told
    return text


# Arguments whose values are texts with JSON. Rows: the name, the text, the value.
@pytest.mark.parametrize("name, text, value", [
    ("rows", '[{"q": "a"}]', [{"q": "a"}]), ("row", '{"a": "\\"]"}', {"a": '"]'}), ("many", "[1,\n2]", [1, 2]),
    ("all", "[]", []), ("count", "5", 5), ("share", "0.5", 0.5), ("share", "5", 5), ("yes", "true", True),
    ("yes", "null", None), ("one", "2", 2), ("two", " 2 ", 2), ("rows", '["好\\ud83d\\ude00"]', ["好\U0001f600"]),
    # A text may be meant, or says something else
    *((name, text, text) for name, text in (
        ("text", "[1]"), ("any", "[1]"), ("odd", "5"), ("maybe", "null"), ("either", "[1]"), ("word", "2"),
        ("loop", "5"), ("lost", "5"), ("wrong", "5"), ("union", "[1]"), ("new", "[1]"), ("rows", "{}"), ("rows", "[1"),
        ("rows", ""), ("count", "5.5"), ("count", "true"), ("yes", "1"), ("row", "[]"))),
])
def test_an_argument_has_the_type_that_its_schema_says(name, text, value):
    before, behind = {"text": "a \"[1]\" b", "new": {"rows": "[1]"}}, {"count": "7"}
    told = json.loads(told_arguments(json.dumps({**before, name: text, **behind})))
    assert told == {**before, name: value, "count": 7} if name != "count" else {**before, "count": 7}


def test_a_text_goes_on_beside_a_value_that_is_held_back():
    this = new_answer(tools=TASK)
    this.feed(HEAD + chunked(calls_in(item("edit", "", index=0))))
    for piece, text in (('{"rows": "[1,', '{"rows": '), ('2]", "te', "[1,2], "), ('xt": "long', '"text": "long')):
        steps, _ = this.feed(chunked(calls_in(item(None, piece, index=0))))
        assert [step.text for step in steps] == [text]


def test_what_is_held_back_of_arguments_has_a_bound():
    text = json.dumps({"rows": "[" + "1" * (3 << 20) + "]"})
    this = new_answer(tools=TASK)
    steps, _ = feed_answer(this, [HEAD, chunked(call("edit", text[:-10]))])
    assert len(steps[0].text) > 2 << 20
    steps, failure = receive([wire(call("edit", text) + TOOLS_END)], tools=TASK)
    assert (failure, steps[0].text) == (None, text)


# Arguments that clients could not read.
@pytest.mark.parametrize("arguments, told", [
    # Encoded twice
    *((json.dumps(json.dumps(value)), json.dumps(value)) for value in (
        {}, {"path": "a"}, {"text": "a\n\"b\"", "n": [1]})),
    (' "{\\"text\\": 1}" ', '{"text": 1}'), (json.dumps(json.dumps({"rows": "[1]"})), '{"rows": [1]}'),
    *((text, text) for text in ('"{"', '"a patch"', '"[1]"')),
    # With control characters
    ('{"text": "a\nb\tc\0d\r"}', '{"text": "a\\nb\\tc\\u0000d\\r"}'),
    ('{"text": ["a\n"],\n"a\n": 1}', '{"text": ["a\\n"],\n"a\\n": 1}'), ('{"rows": "[\n1]"}', '{"rows": [1]}'),
])
def test_arguments_can_be_parsed(arguments, told):
    assert told_arguments(arguments) == told


# Leaked arguments, which have no quotes. Rows: the name, the text, the value.
@pytest.mark.parametrize("name, text, value", [
    *((name, text, text) for name, text in (
        ("text", "123"), ("maybe", "123"), ("either", "[1]"), ("word", "1"), ("count", "1.5"), ("rows", "[1"),
        ("yes", "no"), ("any", "null"))),
    ("maybe", "null", None), ("count", "1", 1), ("rows", " [1]\n", [1]), ("yes", "true", True), ("yes", "null", None),
    ("any", "5", 5), ("any", '"5"', "5"), ("new", "[1]", [1]),
])
def test_a_leaked_argument_has_the_type_that_its_schema_says(name, text, value):
    data = say(leak(f"edit<arg_key>{name}</arg_key><arg_value>{text}</arg_value>")) + ENDED
    (step, _), failure = receive([wire(data)], tools=TASK)
    assert (failure, json.loads(step.text)) == (None, {name: value})


# Letters that come in two halves, each in an event of its own. Rows: the halves with what is around them, options, what
# they say.
@pytest.mark.parametrize("field, pieces, options, expected", [
    ("content", ("a\\ud83d", "\\ude00b"), {}, says("a\U0001f600b")),
    ("reasoning_content", ("\\ud83d", "\\ude00"), {}, says("", "\U0001f600")),
    ("content", ("a\\ud83d", "\\ude00b"), {"stop": ("\U0001f600",)}, says("a")),
    ("content", ('{\\"a\\":\\"\\ud83d', '\\ude00\\"} x'), {"json": True}, says('{"a":"\U0001f600"}')),
    ("content", ("a\\ud83d", "b"), {}, says("a\ud83db")), ("content", ("a", "\\ude00"), {}, says("a\ude00")),
    ("content", ("a<\\ud83d", "\\ude00<", "/b\\ud83d"), {}, says("a<\U0001f600</b\ud83d")),
])
def test_a_letter_may_come_in_two_halves(field, pieces, options, expected):
    events = [b'data: {"choices":[{"delta":{"%b":"%b"}}]}\n\n' % (field.encode(), piece.encode()) for piece in pieces]
    steps = translated(b"".join(events) + ENDED, **options)
    assert folded_stream(steps)[:2] == (expected["content"], expected["reasoning"])


# Thinking that was turned off cannot have come: it is the text, if there is no other. Rows: the bytes, what they say,
# options.
@cases("data, expected, options", [
    ("it is the text", think("The ") + think("answer") + ENDED, says("The answer"), {}),
    ("it is the text beside line ends", think("a") + say("\n") + ENDED, says("a"), {}),
    ("it may hold a call", think("So " + WISH) + ENDED, asks(RAIN, content="So "), {"tools": WEATHER}),
    ("a stop word ends it", think("a stop") + ENDED, says("a ", usage=USAGE), {"stop": ("stop",)}),
    ("JSON comes alone", think('So: {"a":1}!') + ENDED, says('{"a":1}'), {"json": True}),
    ("beside a text it goes", think("hm") + say("a") + think("hm") + ENDED, says("a"), {}),
    ("beside a call it goes", think("hm") + call() + TOOLS_END, asks(RAIN), {}),
    ("in <think> it is thinking", say("<think>hm</think>a") + ENDED, says("a", "hm"), {}),
])
def test_thinking_that_was_turned_off(data, expected, options):
    check_answer(data, expected, no_thinking=True, **options)


def test_pieces_of_one_kind_that_came_together_are_one_step():
    pieces = [think("a"), think("b"), say("c<"), say("d"), *[say("<think>" * 1000)] * 100,
              call("get_weather", '{"a":'), calls_in(item(None, "1", index=0)), calls_in(item(None, "}", index=0))]
    steps, _ = new_answer().feed(HEAD + b"".join(map(chunked, pieces)))
    assert [(step.kind, step.text[:6]) for step in steps] == [
        ("thinking", "ab"), ("text", "c<d<th"), ("call", '{"a":1')]


def test_tool_ids_are_zais_own_where_they_are_usable():
    expected = asks(RAIN, reasoning="The user", usage=counts(178, 37, 215, 0, 25))
    calls = check_answer(GLM_52_TOOLS, expected)
    assert [call["id"] for call in calls] == ["call_438b313737df40b7b2972a81"]
    odd = calls_in(item(*RAIN, id=-73911021), item(*TIME, id=""), item(*TIME, id=None), item(*TIME, id=7)) + TOOLS_END
    calls = check_answer(odd, asks(RAIN, TIME, TIME, TIME))
    assert [call["id"] for call in calls] == ["-73911021", "call_new1", "call_new2", "7"]
    ids = [ztoapi.Translator(asking_for(), describe).make_id() for _ in range(2)]
    assert ids[0] != ids[1]


# Failures

def broken(response, **options):
    """(failure, steps before it) of a response, the same however it arrives."""
    steps, failure = receive([response], **options)
    assert failure is not None
    assert [step for step in steps if step.kind == ztoapi.FINISH] == []
    for pieces in pieces_of(response, 20):
        again, other = receive(pieces, **options)
        assert (again, other.message, other.verdict) == (steps, failure.message, failure.verdict), pieces[:3]
    return failure, steps


NETWORK_ERROR = finished("network_error", None)
ABORT = event({"role": "assistant", "content": ""}, "abort", counts(12, 7, 19)) + DONE
PLAN_AT_ITS_LIMIT = event({"role": "assistant", "content": None}, "stop", counts(0, 0, 0)) + DONE
RATE_LIMITED = b"event: error\n" + error_event(
    "1302", "High concurrency usage of this API, please reduce concurrency or contact customer service to increase "
    "limits", request_id="2026012315301053eda1059a6e4f85") + DONE
BARE_LINE = '{"error":{"code":"500","message":"内部错误"}}'.encode()


# Failures in an answer with status 200. Rows: what is wrong, what Z.ai sends, the code of the error, what is to be done
# while nothing has been sent.
@cases("data, code, verdict", [
    *((what, data, "upstream_error", TRY_AGAIN) for what, data in (
        ("network_error", NETWORK_ERROR),
        ("network_error in mid-stream", say("a") + finished("network_error")),
        ("network_error after a call", call() + finished("network_error", None)),
        ("abort at once", ABORT),
        ("abort after half a text", say("a") + ABORT),
        *((f"finish {str(reason):.20}", say("a") + finished(reason)) for reason in (
            "unheard_of", "STOP", " stop", "error", "end_turn", ["stop"], {"stop": 1}, 1, True, "x" * 5000)),
        ("a plan at its limit", PLAN_AT_ITS_LIMIT),
        ("stop, no usage", event(finish="stop") + DONE),
        ("nothing but line ends", say("\n") + think("\n") + PLAN_AT_ITS_LIMIT),
        ("an empty JSON answer", sse({"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]})[6:-2]),
        ("tool_calls without a call", say("a") + TOOLS_END),
        ("tool_calls without a call at all", TOOLS_END),
        *((f"arguments cut in the middle, {finish}",
           call("get_weather", text) + finished(finish))
          for finish in ("stop", "tool_calls") for text in ('{"ci', '{"city":"Par', '{"a":[1', '"{\\"ci')),
        *((f"a call with the name {name}", calls_in(item(name, "{}", id="a", index=0), item(*RAIN, id="b", index=1))
           + TOOLS_END) for name in (None, True, ["f"])),
        ("a call without a name", calls_in(item(None, PARIS, id="a", index=0)) + TOOLS_END),
        ("arguments before the name", calls_in(item(None, '{"city":', index=0))
         + calls_in(item("get_weather", '"Paris"}', index=0)) + TOOLS_END),
        ("a call without a name beside a good one", call() + calls_in(item(None, PARIS, id="a", index=1)) + TOOLS_END),
        ("a fragment without a home", call() + calls_in(item(None, "x", index=7)) + TOOLS_END),
        ("an error in mid-stream", say("a") + error_event("1234") + ENDED),
        *((f"{field} {str(value):.20}", sse({"choices": [{"delta": {field: value}}]}) + ENDED) for field, value in (
            ("content", 5), ("content", ["b"]), ("content", [{"type": "text", "text": "b"}]), ("content", {"b": 1}),
            ("reasoning_content", ["b"]), ("tool_calls", "x"), ("tool_calls", item(*TIME)))),
        *((f"the call {odd}", calls_in(odd) + ENDED) for odd in (5, None, {"id": "c", "name": "get_time"})),
        *((f"events in one, {between!r}", say("a")[:-2] + between + say("b")[6:] + ENDED)
          for between in (b"", b"\ndata: ", b"data: ")),
        *((f"the event {torn!r}", say("a") + b"data: " + torn + b"\n\n" + say("b") + ENDED) for torn in (
            b'{"id', b'{"choices":[{"delta":{"content":"b', b'{"iddata: ["choices"]', b'{"iddata: 5')),
        ("a bare error line", think("a") + say("b") + BARE_LINE),
        ("a bare error line first", b"\n" + BARE_LINE + b"\n"),
        ("an error as a JSON body", BARE_LINE), ("no finish", think("a") + say("b")),
        ("no finish but [DONE]", say("b") + DONE), ("no finish after a call", call() + DONE),
        ("no finish but usage", say("a") + sse({"choices": [], "usage": USAGE}) + DONE),
        ("cut in the finish", say("b") + FINISH[:-30]),
        ("nothing", b""), ("nothing but [DONE]", DONE),
        ("nothing but comments", b": hi\n\n: hi\n\n"),
        ("nothing but an empty delta", event({"role": "assistant", "content": ""})),
        ("garbage to the end", say("a") + b"data: \xff\xfe\n\n\0\0\0" * 50),
        ("HTML in a stream", b"<html>\n<h1>502 Bad Gateway</h1>\n</html>\n"),
        ("an empty object", b"{}"), ("JSON cut short", GLM_46_JSON[:-30]),
        ("JSON without a finish", b'{"choices":[{"message":{"content":"a"}}]}'))),
    ("more calls than there can be tools", calls_in(*[item(*TIME)] * 129) + TOOLS_END, "upstream_error", GIVE_UP),
    ("a wrong path", b'{"code":500,"msg":"404 NOT_FOUND","success":false}', "upstream_error", GIVE_UP),
    *((f"an error {where}", data, "rate_limit_exceeded", TOO_MANY) for where, data in (
        ("event", RATE_LIMITED), ("without an event's name", RATE_LIMITED[len("event: error\n"):]),
        ("beside a choice", say("a") + error_event("1302", choices=[{"delta": {}, "finish_reason": "error"}])),
        *((place, say("a") + sse(value) + ENDED) for place, value in (
            ("beside a finish",
             dict(LIMITED, choices=[{"delta": {"content": "b"}, "finish_reason": "stop"}], usage=USAGE)),
            ("beside a text", dict(LIMITED, choices=[{"delta": {"content": "b"}}])))))),
    *((f"an error {where}", data, "overloaded", OVERLOAD) for where, data in (
        ("with choices null", say("a") + error_event("1305", choices=None)),
        ("with choices empty", say("a") + error_event("1305", choices=[])),
        ("without a code", sse({"msg": "the service is overloaded", "success": False})))),
    ("no money", error_event(1113), "insufficient_quota", MODEL_RESTS),
    ("an exhausted key", error_event("1308"), "insufficient_quota", KEY_RESTS),
    ("an error in detail", sse({"detail": {"code": "1308"}}), "insufficient_quota", KEY_RESTS),
    ("a refused key", '{"code":1000,"msg":"身份验证失败。","success":false}'.encode(),
     "upstream_auth_error", KEY_RESTS),
])
def test_a_failure_is_an_error_and_never_an_answer(data, code, verdict):
    for options in ({}, {"restartable": True}, {"json": True}, {"stop": ("never",)}):
        error, _ = broken(wire(data), tools=WEATHER, **options)
        assert (error.code, error.verdict) == (code, verdict)
        assert error.status >= 400
        assert len(error.message) < 400


def test_what_is_no_event_is_counted():
    translator = new_translator()
    odd = ("42", "[]", "null", '"x"', "garbage", '"id', 'iddata: ["choices"]', "iddata: 5")
    assert (translator.feed(odd), translator.frames.repaired) == (([], None), 8)
    assert translator.feed(decode_events([say("a") + DONE + error_event("1305")]))[1].zai_code == "1305"
    assert translator.frames.repaired == 8


# Responses as a whole: heads, framings, kinds, codings. Behind the bytes the connection ends.

HELLO = b"".join(HEALTHY)
UNFINISHED = chunked(say("Hello")) + chunked(event(finish="stop"))  # no usage, no end mark


def with_fields(*lines):
    return HEAD[:-2] + b"".join(line + b"\r\n" for line in lines) + b"\r\n"

def with_kind(kind):
    return HEAD.replace(b"text/event-stream;charset=UTF-8", kind)


OK = b"HTTP/1.1 200 OK\r\n"
BODY = b"".join(chunked(piece) for piece in HEALTHY) + END
JSON_ANSWER = json.dumps({"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}).encode()

# Responses that say "Hello".
@cases("data", [
    ("as usual", HEAD + BODY), ("one chunk", HEAD + chunked(HELLO) + END),
    ("chunks that end anywhere", HEAD + b"".join(chunked(HELLO[i:i + 7]) for i in range(0, len(HELLO), 7)) + END),
    ("103 first", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nContent-Length: 7\r\n\r\n" + HEAD + BODY),
    ("many first", b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + HEAD + BODY),
    ("bare line feeds", HEAD.replace(b"\r\n", b"\n") + BODY),
    ("lines that are none", with_fields(b"no field", b" folded", b"Content-Length: 7") + BODY),
    ("capitals", HEAD.replace(b"Transfer-Encoding: chunked", b"TRANSFER-ENCODING: CHUNKED") + BODY),
    ("fields twice",
     with_fields(b"Set-Cookie: acw_tc=1;path=/", b"Set-Cookie: b=2", b"Vary: Origin", b"Vary: X") + BODY),
    ("an empty coding", with_fields(b"Content-Encoding:") + BODY),
    ("the coding identity", with_fields(b"Content-Encoding: Identity") + BODY),
    *((f"a stream called {kind.decode()}", with_kind(kind) + BODY) for kind in (
        b"application/json", b"application/json;charset=UTF-8", b"application/x-ndjson", b"text/plain", b"")),
    ("a stream called JSON that begins late", with_kind(b"application/json") + chunked(b"\n\n ") + BODY),
    ("a JSON body", answer(200, JSON_ANSWER)[0]),
    ("a JSON body between line ends", answer(200, b"\r\n" + JSON_ANSWER + b"\n")[0]),
    ("a JSON body, chunked", with_kind(b"application/json") + chunked(JSON_ANSWER) + END),
    ("a JSON body called a stream", HEAD + chunked(JSON_ANSWER) + END),
    ("a JSON body without length", OK + b"Content-Type: application/json\r\n\r\n" + JSON_ANSWER),
    ("no length", OK + b"Content-Type: text/event-stream\r\nConnection: close\r\n\r\n" + HELLO),
    ("a length", OK + b"Content-Length: %d\r\n\r\n" % len(HELLO) + HELLO),
    ("a length twice", OK + b"Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % ((len(HELLO),) * 2) + HELLO),
    ("HTTP/1.0", b"HTTP/1.0 200 OK\r\n\r\n" + HELLO), ("no last chunk", HEAD + BODY[:-len(END)]),
    ("a cut behind the finish", HEAD + UNFINISHED),
    ("a broken chunk behind the finish", HEAD + UNFINISHED + b"zz\r\n"),
    ("a chunk cut behind the finish", HEAD + UNFINISHED + b"f\r\ndata: "),
    ("garbage behind the end", HEAD + BODY + b"\0\xff" * 20),
    ("too many lines behind the finish", HEAD + chunked(HELLO + b"x\n" * 1500) + END),
])
def test_a_response_is_understood_however_it_arrives(data):
    for pieces in pieces_of(data, 150):
        steps, failure = receive(pieces)
        assert failure is None, pieces[:3]
        assert text_in(steps) == "Hello"
        assert steps[-1].kind == ztoapi.FINISH


# Responses that fail before a word. Rows: what is wrong, the bytes, the status and code of the error, what is to be
# done.
@cases("data, expected, verdict", [
    *((what, data, BROKEN, TRY_AGAIN) for what, data in (
        ("nothing", b""), ("SSH for a head", b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
        ("SMTP for a head", b"220 mail.example.com ESMTP\r\n"), ("TLS for a head", b"\x15\x03\x01\x00\x02\x02\x46"),
        ("HTTP/2 for a head", b"HTTP/2 200 OK\r\n\r\n"), ("a head cut", HEAD[:60]),
        ("a head cut behind a 100", b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD[:60]), ("cut behind the head", HEAD),
        ("cut in an event", HEAD + chunked(say("Hel")[:40])), ("cut in a chunk", HEAD + b"ff\r\ndata: {"),
        ("a broken chunk", HEAD + b"zz\r\n"), ("an empty stream", HEAD + END), ("an empty body", answer(200, b"")[0]),
        ("an empty body without a length", OK + b"Connection: close\r\n\r\n"),
        ("a JSON body cut", answer(200, JSON_ANSWER)[0][:-20]),
        ("a cut behind the finish, before its call", HEAD + chunked(event(finish="tool_calls"))),
        ("HTML 502", answer(502, b"<html><h1>502 Bad Gateway</h1></html>")[0]),
        ("503 without a word", answer(503, b"")[0]), ("1234 as 400", refusal(400, "1234")[0]))),
    *((what, data, BROKEN, GIVE_UP) for what, data in (
        ("a page with braces", answer(403, b"<style>body {margin: 0}</style>")[0]),
        *((f"status {status}", b"HTTP/1.1 %d X\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n" % status)
          for status in (301, 302, 303, 307, 308)),
        ("HTML 404", answer(404, b"<html>404</html>")[0]),
        ("HTML 200", answer(200, b"<html>hello</html>")[0]),
        ("Spring 404", answer(404, {"status": 404, "error": "Not Found", "path": "/v4/v1"})[0]))),
    ("a refusal as an event", answer(429, error_event("1113") + DONE)[0], NO_MONEY, MODEL_RESTS),
    ("429 without a word", answer(429, b"")[0], NO_ROOM, TOO_FAST), ("1305", refusal(429, "1305")[0], FULL, OVERLOAD),
    ("a refusal without a length", b"HTTP/1.0 400 X\r\n\r\n" + json.dumps(complaint("1261")).encode(),
     TOO_LONG, GIVE_UP),
    # An error of Z.ai's counts more than the cut behind it
    *((what, data, NO_ROOM, TOO_MANY) for what, data in (
        ("1302", refusal(429, "1302")[0]),
        ("a refusal behind words", answer(500, b'upstream said {"code": 1302}.')[0]),
        ("1302, then a cut", HEAD + chunked(error_event("1302"))),
        ("1302, then a broken chunk", HEAD + chunked(error_event("1302")) + b"zz\r\n"),
        ("1302 as a bare line, then a cut", HEAD + chunked(b'{"error":{"code":"1302"}}')))),
    # A body that cannot be read is no body, but the status still counts
    *((what, data, AUTH, KEY_RESTS) for what, data in (
        ("401, its body cut", refusal(401, "1113")[0][:-20]),
        ("401, its chunks broken", b"HTTP/1.1 401 X\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        ("401, no body at all", b"HTTP/1.1 401 X\r\nContent-Length: 5\r\n\r\n"),
        ("401, nested too deeply", answer(401, b"[" * 100000)[0]))),
])
def test_a_response_that_is_none_is_an_error_however_it_arrives(data, expected, verdict):
    for pieces in pieces_of(data, 150 if len(data) < 2000 else 50):
        steps, error = receive(pieces)
        assert steps == []
        assert (error.status, error.code) == expected, pieces[:3]
        assert error.verdict == verdict


def test_a_head_without_end_is_refused():
    this = new_answer()
    _, failure = feed_answer(this, [OK] + [b"X: y\r\n" * 1000] * 12)
    assert failure.verdict == TRY_AGAIN


def test_retry_after_reaches_who_describes_an_error():
    seen = []
    translator = ztoapi.Translator(asking_for(), describe=lambda *facts: seen.append(facts) or UpstreamError("no"))
    this = ztoapi.Answer(translator)
    this.feed(answer(429, b"null", "Retry-After: 7")[0])
    assert seen == [(None, 429, "7")]


# Faults behind a first step.
@pytest.mark.parametrize("first", (say("Hel"), think("Hel"), call()), ids=("text", "thinking", "call"))
@cases("rest", [
    ("the connection ends", b""), ("the body ends", END), ("the end mark", chunked(DONE) + END),
    ("the connection ends in an event", chunked(say("lo")[:40])),
    ("the connection ends in a chunk", b"ff\r\ndata: {"), ("a broken chunk", b"zz\r\n"),
    ("the body ends in an event", chunked(say("lo")[:40]) + END),
    ("an error event", chunked(error_event("1234")) + chunked(DONE) + END),
    ("1302", chunked(error_event("1302")) + END), ("an error as a bare line", chunked(BARE_LINE + b"\n") + END),
    ("an error as a bare line without an end", chunked(BARE_LINE)),
    ("network_error", chunked(NETWORK_ERROR) + END), ("abort", chunked(ABORT) + END),
    ("garbage", chunked(b"data: oops\n\n") + END),
])
def test_a_fault_behind_the_first_step_leaves_it_told(first, rest):
    this = new_answer()
    steps, failure = feed_answer(this, [HEAD + chunked(first) + rest, b""])
    assert len(steps) == 1
    assert failure is not None
    assert this.begun  # so that no further attempt is made
    broken(HEAD + chunked(first) + rest)


# Whether a connection serves again.
@cases("data, expected", [
    ("a stream read to its end", HEAD + BODY, True), ("an answer of known length", answer(200, JSON_ANSWER)[0], True),
    ("a refusal", refusal(400, "1210")[0], True),
    ("Connection: keep-alive", with_fields(b"Connection: keep-alive") + BODY, True),
    ("no last chunk", HEAD + BODY[:-len(END)], False),
    ("bytes behind the end", HEAD + BODY + b"HTTP/1.1 200 OK\r\n", False),
    ("bytes behind the length", answer(200, JSON_ANSWER)[0] + b"x", False),
    ("Connection: close", with_fields(b"Connection: Close") + BODY, False),
    ("Connection: close among others", with_fields(b"Connection: x", b"Connection: TE, close") + BODY, False),
    ("HTTP/1.0", HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + BODY, False),
    ("a length that lies", answer(200, JSON_ANSWER + b" " * 9)[0][:-9], False),
    ("a body without a length", OK + b"\r\n" + HELLO, False),
    ("a broken chunk", HEAD + chunked(HELLO) + b"zz\r\n", False), ("nothing", b"", False),
])
def test_a_connection_serves_again_only_if_its_answer_was_read_to_the_end(data, expected):
    for pieces in pieces_of(data, 150):
        reply = ztoapi.Reply()
        with contextlib.suppress(UpstreamError):
            for piece in pieces:
                reply.feed(piece)
        assert reply.reusable is expected, pieces[:3]
    # One that has ended serves nobody.
    with contextlib.suppress(UpstreamError):
        reply.feed(b"")
    assert not reply.reusable


# The end of an answer

def test_nobody_waits_for_the_end_mark():
    """The finish with its usage completes an answer."""
    this = new_answer()
    steps, failure = feed_answer(this, [HEAD, chunked(say("a")), chunked(FINISH)])
    assert (this.complete, failure, steps[-1].kind) == (True, None, ztoapi.FINISH)
    assert [this.feed(chunked(DONE)), this.feed(END)] == [([], None)] * 2
    assert this.reply.reusable


def test_after_a_finish_without_usage_silence_ends_the_answer_or_what_was_none():
    this, that = new_answer(), new_answer()
    assert not this.is_ending
    feed_answer(this, [HEAD, chunked(say("a <")), chunked(event(finish="stop")), chunked(b": hi\n\n")])
    feed_answer(that, [HEAD, chunked(event(finish="stop"))])
    assert (this.is_ending, that.is_ending, this.complete) == (True, True, False)
    steps, failure = this.feed(b"")
    assert (failure, words_in(steps)) == (None, [("text", "<"), ("finish", "stop")])
    assert (this.complete, this.reply.reusable) == (True, False)
    steps, failure = that.feed(b"")
    assert (steps, failure.verdict) == ([], TRY_AGAIN)


def test_an_answer_has_begun_once_tokens_have_come():
    nothing = (say("\n"), b"data: x\n\n", event({"role": "assistant", "content": ""}))
    fresh_start = think("old") + splice("{", '"content":""')
    tokens = (think("a"), say("a"), call(), calls_in(item(None, "", index=0)), ENDED, fresh_start)
    for data in nothing + tokens:
        this = new_answer()
        feed_answer(this, [HEAD])
        assert not this.begun
        feed_answer(this, [chunked(data)])
        assert this.begun == (data in tokens), data


# Spliced frames: a frame cut short, and in the same data line the first one of a new answer

INNER = ('{"id":"2026043020420635c6abc56a2741ac","created":1777552926,"object":"chat.completion.chunk",'
         '"model":"glm-5.1","choices":[{"index":0,"delta":{"role":"assistant",%s}}]}')
TORN_HEADS = (
    '{"id":"20260430204055297b97348c8e426c","created":1777552855,"object":"chat.c', '{"id":"2026051004',
    '{"id":', "{", "",
    '{"id":"20260430204055297b97348c8e426c","choices":[{"index":0,"delta":{"role',
    '{"choices":[{"index":0,"delta":{"content":"', '{"choices":[{"index":0,"delta":{"content":"data: data: ')


def splice(head, inner='"content":"11"'):
    return f"data: {head}data: {INNER % inner}\n\n".encode()


@pytest.mark.parametrize("head", TORN_HEADS)
def test_a_spliced_frame_starts_the_answer_afresh_unless_text_or_a_call_went_out(head):
    torn = splice(head) + say("22") + ENDED
    for before, thought in ((b"", ""), (think("old"), "old"), (b"data: [1]\n\n", "")):
        assert folded_stream(translated(before + torn)) == ("1122", thought, [], "stop", USAGE)
    gone_out = (say("old"), call(), think("old") + say("old <th") + call())
    for before in (think("old"), *gone_out, gone_out[-1] + calls_in(item("get_time", "{", id="x"))):
        assert folded_json(translated(before + torn, restartable=True)) == ("1122", "", [], "stop", USAGE)
    for before in gone_out:
        error, steps = broken(wire(before + torn))
        assert (error.code, error.status, error.verdict) == ("upstream_stream_restarted", 502, GIVE_UP)
        assert "11" not in "".join(step.text for step in steps)


# Rows: what the delta of the inner frame holds, (content, reasoning, calls).
@pytest.mark.parametrize("inner, expected", [
    ('"reasoning_content":"Now"', ("22", "Now", [])),
    ('"tool_calls":[{"id":"c","index":0,"function":{"name":"f","arguments":"{}"}}]',
     ("22", "", [{"id": "c", "name": "f", "arguments": "{}"}])),
    ('"content":"the line data: {\\"a\\":1} and data: x "', ('the line data: {"a":1} and data: x 22', "", [])),
])
@pytest.mark.parametrize("head", TORN_HEADS[:3])
def test_a_spliced_frame_may_hold_anything_an_event_may(head, inner, expected):
    assert folded_stream(translated(splice(head, inner) + say("22") + ENDED))[:3] == expected


@pytest.mark.parametrize("size", range(1, 7))
def test_a_frame_may_be_torn_in_its_first_letters(size):
    torn = b"data: "[:size] + splice("{")[7:] + say("22") + ENDED
    assert folded_stream(translated(think("old") + torn)) == ("1122", "old", [], "stop", USAGE)
    assert broken(wire(say("old") + torn))[0].code == "upstream_stream_restarted"


def test_an_error_in_a_spliced_frame_is_told_as_such():
    for before in (b"", say("old")):
        assert broken(wire(before + b'data: {"id":"2026' + error_event("1305") + say("a")))[0].code == "overloaded"


def test_a_spliced_frame_is_counted_and_thinking_that_was_shown_is_closed():
    this = new_answer()
    steps, _ = feed_answer(this, [wire(think("old") + splice("{") + ENDED)])
    assert this.translator.frames.repaired == 1
    assert [step.kind for step in steps] == ["thinking", "restart", "text", "finish"]
    assert folded_stream(steps, "raw")[0] == "<think>old</think>11"


def test_what_was_only_held_back_does_not_forbid_a_fresh_start():
    for held in ("```js", "<thi", "\n", "<tool_call>get_w", "Observ"):
        data = say(held) + splice("{", '"content":"{}"') + ENDED
        options = {"json": True, "tools": WEATHER} if held != "Observ" else {"stop": ("Observation",)}
        assert folded_stream(translated(data, **options))[0] == "{}", held


# Texts, cut anywhere


def in_parts(parts, speak=say):
    return b"".join(map(speak, parts)) + ENDED

def said_in(parts):
    """The bytes of a text that comes in these parts, an event each, and does not end."""
    return [HEAD, *(chunked(say(part)) for part in parts if part)]


def fold_parts(parts, speak=say, **options):
    """What a client makes of a text in these parts, without all the ways that bytes can arrive."""
    steps, failure = receive([wire(in_parts(parts, speak))], **options)
    assert failure is None
    return folded_stream(steps)


# Tags
@pytest.mark.parametrize("text, content, reasoning", [
    ("<think>Got it</think>\n\nYes", "Yes", "Got it"),
    ("\n<think>\na</think>b<think>c</think>", "b<think>c</think>", "a"),
    ("<|begin_of_box|>42<|end_of_box|>", "42", ""),
    ("<think>x</think><|begin_of_box|>4<|end_of_box|> < 5", "4 < 5", "x"), ("<think></think>b", "b", ""),
    *((text, text, "") for text in ("<<think>>", "a<|begin_of_b|>", "a</think>b", "<t<think>a</think>")),
])
def test_tags_are_found_wherever_the_text_is_cut(text, content, reasoning):
    for parts in pieces_of(text):
        assert fold_parts(parts)[:2] == (content, reasoning), parts


@pytest.mark.parametrize("text", ("get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>",
                                  " get_weather</arg_value><arg_key>city<arg_value>Paris</arg_value></arg_value>"))
def test_a_leaking_call_is_found_wherever_the_text_is_cut(text):
    text = "Well. " + leak(text)
    for parts in pieces_of(text):
        content, _, calls, finish, _ = fold_parts(parts, tools=WEATHER)
        pairs = [(call["name"], call["arguments"]) for call in calls]
        assert (content, pairs, finish) == ("Well. ", [RAIN], "tool_calls")
        _, reasoning, calls, _, _ = fold_parts(parts, think, tools=WEATHER)
        assert (reasoning, len(calls)) == ("Well. ", 1)
        assert fold_parts(parts)[0] == text  # no tools were sent


# What is shown of a text at once, with tools sent. Rows: the text, what of it is held back.
@pytest.mark.parametrize("text, held", [
    *((text, "") for text in (
        "GLM writes calls as <tool_call> followed by a name", "<tool_call>get_weather<b>", "<tool_call>get_weathers",
        "<tool_call>get_weather is a tool")),
    *((text, text) for text in (
        "<tool_call>", "<tool_call>get_weather", "<tool_call>\n get_w", "<tool_call>get_weather ",
        "<tool_call>get_weather<arg_k")),
    ("Well <tool_c", "<tool_c"), ("a <", "<"), ("a <b", "<b"), ("a < b", ""),
])
def test_a_text_is_held_back_only_while_it_can_still_be_a_call(text, held):
    for parts in pieces_of(text):
        steps, _ = feed_answer(new_answer(tools=WEATHER), said_in(parts))
        assert "".join(step.text for step in steps) == text[:len(text) - len(held)], parts


# Fences around JSON that was asked for. Rows: a text, what is left of it.
@pytest.mark.parametrize("text, left", [
    ('```json\n{"a":"b"}\n```', '{"a":"b"}'), ('\n```json\n{"a":"b"}\n```\n', '{"a":"b"}'),
    ('```\n{"a":"b"}```', '{"a":"b"}'), ('```JSON\r\n{"a":"b"}\n```', '{"a":"b"}'),
    ('```json {"a":"b"} ```', '{"a":"b"}'),
    ('```{"a":"b"}```', '{"a":"b"}'), ("```json\n[1,\n 2]\n```", "[1,\n 2]"),
    ('```json\n{"a":"`b` ```x"}\n```', '{"a":"`b` ```x"}'), ('```json\n{"a":"b', '{"a":"b'), ('{"a":"b"}', '{"a":"b"}'),
    ('{"a":"```x```"}', '{"a":"```x```"}'), ('{"a":1}\n', '{"a":1}'), ("5", "5"), ("``", "``"), ("", ""),
    ("```json", "```json"), ("```" + "x" * 200 + '{"a":1}', '{"a":1}'),
    # Words around it, with brackets of their own
    ('Here is the JSON:\n```json\n{"a": 1}\n```\nI hope it helps {you}.', '{"a": 1}'),
    ('{"a":1} and {"b":2}', '{"a":1}'),
    ('Of {a, b} [1] I make\n[{"a": 1}]', '[{"a": 1}]'), ("The list: [1, 2]", "[1, 2]"), ("It is [true]", "[true]"),
    ("No JSON [1] {a}", "No JSON [1] {a}"), ("[5]", "[5]"), ('"a"', '"a"'), ("So: {\n}", "{\n}"),
    # What can be parsed
    ('{"a": "b\nc\t\0",\n"d": 1}', '{"a": "b\\nc\\t\\u0000",\n"d": 1}'),
])
def test_a_json_answer_comes_without_its_fence_wherever_it_is_cut(text, left):
    for parts in pieces_of(text, most=100):
        content, _, _, finish, _ = fold_parts(parts, json=True)
        assert (content.strip(), finish) == (left, "stop"), parts[:3]
        assert fold_parts(parts)[0] == text.lstrip("\r\n")


# Stop words. Rows: the words, a text, what is left of it, whether one was met (in which case nothing more is waited
# for).
@pytest.mark.parametrize("words, text, left, met", [
    *((("Observation",), text, left, met) for text, left, met in (
        ("a = 1\nObservation: 5", "a = 1\n", True), ("Observation", "", True), ("Obser", "", False),
        ("Obs", "Obs", False), ("Obser, Observatio", "Obser, ", False))),  # Z.ai stops with most of it in the text
    (("x", "Observation"), "Observatio", "", False),
    *((("</code>",), text, left, met) for text, left, met in (
        ("if a < b: print(1)\n", "if a < b: print(1)\n", False), ("a</code", "a", False), ("a</co<", "a</co<", False),
        ("a<</code>b", "a<", True), ("a</c", "a</c", False))),  # three letters are too few
    (("<|user|>",), "a<|user|>b", "a", True), (("\U0001f600",), "a\U0001f600b", "a", True),
    (tuple("abcdefgh"), "xyzh", "xyz", True),
    # The first to end counts, as it would letter by letter
    (("b", "a"), "xaby", "x", True), (("cd", "abc"), "xabcd", "x", True), (("abc", "b"), "xab", "xa", True),
    (("abcd", "b"), "xabcd", "xa", True), (("bcd", "abcd"), "xabcd", "x", True), (("aab",), "aaaab", "aa", True),
    (("STOP", "END", "HALT", "QUIT"), "so we HALT here, STOP", "so we ", True),
    # Any letters
    (("\n\n",), "a\nb\n\nc", "a\nb", True), (("\n",), "a", "a", False), ((".*",), "a.b.*c", "a.b", True),
    (("好了",), "你好好了吗", "你好", True),
    (("<think>",), "a<think>b", "a", True), (("Human<",), "aHuman< b", "a", True),
])
def test_the_text_ends_before_the_first_stop_word_wherever_it_is_cut(words, text, left, met):
    for parts in pieces_of(text):
        this = new_answer(stop=words, body={"stop": words[:1]})
        steps, failure = feed_answer(this, said_in(parts))
        assert this.complete is met, parts
        if not met:
            more, failure = feed_answer(this, [chunked(FINISH)])
            steps += more
        assert failure is None
        assert folded_stream(steps)[0] == left, parts
        assert steps[-1][:2] == ("finish", "stop")
        assert (steps[-1].name in words) is met


def test_a_stop_word_ends_the_answer_before_zai_does_and_what_only_begins_one_waits():
    this = new_answer(stop=("b",))
    steps, failure = feed_answer(this, [HEAD, chunked(say("abc"))])
    assert words_in(steps) == [("text", "a"), ("finish", "stop")]
    # Z.ai goes on talking: the connection is closed.
    assert (this.complete, this.translator.stop_word, this.reply.reusable) == (True, "b", False)
    this = new_answer(stop=("stop",))
    this.feed(HEAD)
    assert [step.text for step in this.feed(chunked(say("a st")))[0]] == ["a "]
    assert [step.text for step in this.feed(chunked(say("ill")))[0]] == ["still"]


# Behind a stop word Z.ai's counts are not waited for, so that they are estimated.
def estimated(count):
    return counts(7, count, 7 + count)


# Answers in which "stop" is a stop word, read with more options.
@cases("data, expected, options", [
    ("in thinking it is none", think("a stop b") + say("c stop d") + ENDED,
     says("c ", "a stop b", usage=estimated(4)), {}),
    ("in thinking in the content it is none", say("<think>a stop b</think>c") + ENDED, says("c", "a stop b"), {}),
    ("in arguments it is none", say("a") + call("f", '{"a":"stop"}') + TOOLS_END,
     asks(("f", '{"a":"stop"}'), content="a"), {}),
    ("a call behind it is none", calls_in(item(*RAIN, id="c"), content="a stop") + TOOLS_END,
     says("a ", usage=estimated(1)), {}),
    ("a call before it stays one", call() + say("a stop") + ENDED, asks(RAIN, content="a ", usage=estimated(6)), {}),
    ("a call without arguments before it has some",
     call("get_time", "") + say("a stop") + ENDED,
     asks(TIME, content="a ", usage=estimated(2)), {}),
    ("a leaked call before it is made and one behind it is not",
     say(leak("get_weather" + CITY) + "a stop" + leak("get_time")) + ENDED,
     asks(RAIN, content="a ", usage=estimated(6)), {"tools": WEATHER}),
    ("at the very end it leaves nothing of itself", say("a sto<") + ENDED, says("a "), {"stop": ("sto<",)}),
    ("usage that came with it counts", event({"content": "a stop"}, "stop", USAGE), says("a "), {}),
    ("it works behind a fence", say('```json\n{"a":1,') + say('"stop":2}\n```') + ENDED,
     says('{"a":1,"', usage=estimated(3)), {"json": True}),
])
def test_a_stop_word(data, expected, options):
    stop = options.get("stop", ("stop",))
    check_answer(data, expected, **{"stop": stop, "body": {"stop": stop}, "tokens": 7, **options})


@pytest.mark.parametrize("name", ("get_weather", None))
def test_half_a_call_before_a_stop_word_is_a_failure(name):
    data = calls_in(item(name, '{"ci', id="c", index=0)) + say("a stop") + ENDED
    assert broken(wire(data), stop=("stop",))[0].verdict == TRY_AGAIN


def test_what_is_held_back_is_not_overtaken():
    """A "<" that may become a tag waits in its lane; text of the other lane comes behind it."""
    steps = translated(think("a") + say("b") + think("c<") + say("d") + FINISH)
    assert words_in(steps[:-1]) == [("thinking", "a"), ("text", "b"), ("thinking", "c<"), ("text", "d")]
    both = event({"reasoning_content": "r", "content": "c<"})
    steps = translated(think("a") + say("b") + both + think("s") + FINISH)
    assert [step.text for step in steps[:-1]] == ["a", "b", "r", "c<", "s"]


# Bounds

@cases("steps", [
    ("bytes, not letters", [Step(ztoapi.THINKING, "\u597d" * (1 << 21))]),
    ("tiny steps, more than their text", [Step(ztoapi.TEXT, "x")] * 200000),
    ("items, more than their text", [Step(ztoapi.TEXT, "x"), Step(ztoapi.THINKING, "y")] * 1100),
])
def test_a_json_answer_has_a_bound(steps):
    fold = ztoapi.Fold()
    # What stood before a fresh start does not count.
    for _ in range(3):
        fold.add([*steps[:len(steps) // 2], ztoapi.Step(ztoapi.RESTART)])
    assert fold.items == []
    with pytest.raises(UpstreamError) as caught:
        fold.add(steps)
    assert caught.value.verdict == GIVE_UP


def test_an_event_of_almost_16_mib_passes():
    text = "x" * (15 << 20)
    steps, failure = receive([HEAD + chunked(say(text)) + chunked(FINISH) + END])
    assert (failure, steps[0].text) == (None, text)


@pytest.mark.parametrize("body", (chunked(say("x" * (17 << 20))) + END, chunked(b"x" * (17 << 20)) + END),
                         ids=("an event", "a line without an end"))
def test_an_event_of_more_than_16_mib_is_an_error_whatever_came_before(body):
    for before in (b"", chunked(say("Hel"))):
        data = HEAD + before + body
        steps, failure = receive(blocks_of(data))
        assert (failure.code, failure.verdict) == ("upstream_error", GIVE_UP)
        assert len(steps) == bool(before)


def test_a_json_body_has_the_bound_of_an_event_and_that_of_an_error_ends_where_its_status_counts():
    this = new_answer()
    this.feed(with_kind(b"application/json") + chunked(b"{"))
    piece = chunked(b" " * (1 << 20))
    assert feed_answer(this, [piece] * 70)[1].verdict == GIVE_UP
    this = new_answer()
    this.feed(b"HTTP/1.1 401 X\r\nTransfer-Encoding: chunked\r\n\r\n")
    feed_answer(this, [piece] * 25)
    assert len(this.refusal) < 2 << 20
    assert this.feed(END)[1].code == "upstream_auth_error"


KEYS = "<arg_key>" * 50000


# What a model may be told to write, and a gateway may send.
@cases("options, events", [
    *((f"text, {ascii(text):.40}", {}, [say(text), ENDED]) for text in (
        "<tool_call>get_time" + KEYS, "<tool_call>get_time" + "<arg_key>a</arg_key><arg_value>b</arg_value>" * 10000,
        "<tool_call>" * 50000, "<tool_call></tool_call>" * 20000, "<tool_call>get_time</tool_call>" * 20000,
        "<tool_call>" + " " * 200000, "<" * 500000, "<tool_cal" * 50000, "<think>" * 50000,
        "<|begin_of_box|>" * 50000, leak("get_time<arg_key>a</arg_key><arg_value>" + "9" * 100000 + "</arg_value>"),
        leak("get_time<arg_key>a</arg_key><arg_value>" + "[" * 100000 + "</arg_value>"))),
    *((f"text in pieces, {ascii(head + piece):.40}", {}, [say(head)] + [say(piece)] * count + [ENDED])
      for head, piece, count in (
        ("<tool_call>get_time", "<arg_key>" * 100, 500), ("", "<tool_call>", 10000), ("", "<", 10000),
        ("", "<tool_call>get_time", 10000), ("<tool_call>", " ", 10000), ("<tool_call>get_time", " ", 10000),
        ("", "\n", 10000))),
    *((f"JSON, {ascii(text):.40}", {"json": True}, [say(text), ENDED]) for text in (
        "```json" + " " * 500000, "```json\n{" * 50000, "```" + "[" * 500000)),
    *((f"JSON in pieces, {ascii(head + piece)}", {"json": True}, [say(head)] + [say(piece)] * 10000 + [ENDED])
      for head, piece in (("```", " "), ("", " "), ("```", "["))),
    *((f"arguments, {ascii(text):.40}", {}, [call("get_time", text), TOOLS_END]) for text in (
        KEYS, '{"a</arg_key>":' * 50000, "</arg_key" * 50000, '{"a":"' + "<" * 200000 + '"}', "{} " * 200000 + "x",
        " " * 500000 + "x", ("</arg_key>" + " " * 20) * 20000, '{"a":"' + "x\\" * 300000 + '"}')),
    *((f"arguments in pieces, {ascii(head + piece)}", {},
       [call("get_time", head)] + [calls_in(item(None, piece, index=0))] * 10000 + [TOOLS_END])
      for head, piece in (('{"a":"', "<"), ("{}", "{}"), ("{", "["))),
    ("<arg_key> without end in a name", {}, [call("get_time" + KEYS, ""), TOOLS_END]),
    ("a name of a megabyte", {}, [call("x" * (1 << 20), "{}"), TOOLS_END]),
    ("ids of a megabyte", {}, [call("f", "{}", "x" * (1 << 20) + str(i)) for i in range(20)] + [TOOLS_END]),
    ("beginnings of a stop word", {"stop": ("a" * 1000 + "b",)}, [say("a" * 200000), ENDED]),
    ("beginnings of a stop word, one by one", {"stop": ("a" * 1000 + "b",)}, [say("a")] * 5000 + [ENDED]),
    ("beginnings of many stop words", {"stop": tuple("ab" * 200 + c for c in "cdef")}, [say("ab" * 50000), ENDED]),
    ("20,000 calls in one event", {}, [calls_in(*[item("get_time", "{}")] * 20000), TOOLS_END]),
    ("20,000 fragments in one event", {},
     [call("get_time", "{")] + [calls_in(*[item(None, " ", index=0)] * 20000), TOOLS_END]),
    ("50,000 fragments of the last of many calls", {},
     [calls_in(*[item("get_time", "{", index=i) for i in range(128)]),
      calls_in(*[item(None, " ", index=0)] * 50000), TOOLS_END]),
    ("20,000 calls without a name", {}, [calls_in(*[item(None, "", id=f"c{i}") for i in range(20000)]), TOOLS_END]),
    ("data: in a torn frame", {}, [b"data: {" + b"data: " * 100000 + b"\n\n", ENDED]),
    ("frames in a torn frame", {}, [b"data: {" + b'data: {"a":' * 50000 + b"\n\n", ENDED]),
    ("torn frames", {}, [b'data: {"id":data: {"a":1}\n\n'] * 10000 + [ENDED]),
    ("restarts", {}, [splice("{", '"reasoning_content":"a"')] * 5000 + [ENDED]),
    ("data: lines without a blank line", {}, [b"data: x\n" * 100000, ENDED]),
    ("blanks before an event", {}, [b"data: " + b" " * 500000 + b"x\n\n", ENDED]),
    ("deep lists", {}, [b"data: " + b"[" * 500000 + b"\n\n", ENDED]),
    ("deep objects", {}, [b"data: " + b'{"a":' * 100000 + b"\n\n", ENDED]),
    ("deep arguments", {}, [b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":"f","arguments":'
                            + b"[" * 900 + b"]" * 900 + b"}}]}}]}\n\n", TOOLS_END]),
    ("numbers of 100,000 digits", {},
     [say("a"), b'data: {"choices":[],"usage":{"prompt_tokens":' + b"9" * 100000 + b"}}\n\n", ENDED]),
    ("bare lines", {}, [b"{\n" * 2000000 + b"\n", ENDED]),
    ("a stop word and almost another", {"stop": ("a" * 255 + "b", "c")}, [say("a" * 8000000), ENDED]),
    ("a finish of a megabyte", {}, [say("a"), finished("x" * (1 << 20))]),
    ("a finish of many digits", {}, [say("a"), event({}, 10**90)]),
])
def test_no_answer_takes_more_than_linear_time(options, events):
    blocks = blocks_of(b"".join(stream(*events)))
    with linear_time():
        steps, failure = receive(blocks, tools=WEATHER, **options)
    assert failure or steps[-1].kind == ztoapi.FINISH
    if failure:
        assert len(failure.message) < 400
    with linear_time():
        folded_json(steps if not failure else steps + [ztoapi.Step(ztoapi.FINISH, "stop")])


@pytest.mark.parametrize("value", (
    '{"choices":[{"delta":{"tool_calls":[{"function":{"name":"get_time","arguments":%s}}]}}]}',
    '{"choices":[{"delta":{"tool_calls":[{"id":%s,"function":{"name":"get_time"}}]}}]}',
    '{"choices":[{"delta":{},"finish_reason":%s}]}',
    '{"choices":[{"delta":{"content":"<tool_call>get_time<arg_key>a</arg_key><arg_value>%s</arg_value>"}}]}',
    '{"choices":[{"delta":{"tool_calls":[{"function":{"name":"edit","arguments":"{\\"rows\\":\\"%s\\"}"}}]}}]}',
    '{"error":{"code":%s}}'), ids=("arguments", "id", "finish", "leak", "value", "error"))
def test_nesting_around_the_recursion_limit_is_an_answer_or_an_error(value):
    """What was not too deep to be read may be too deep to be written."""
    for depth in [*range(100, 900, 20), *range(900, 1100, 2), *range(1200, 10000, 800)]:
        translator = new_translator(tools={**WEATHER, **TASK})
        translator.feed([value % ("[" * depth + "]" * depth)], end=True)


def test_a_page_with_status_200_is_not_told_as_a_404():
    steps, failure = receive([answer(200, b"<html>portal</html>")[0]])
    assert (steps, failure.verdict) == ([], GIVE_UP)
    assert "ZAI_BASE_URL" in failure.message and "404" not in failure.message


def test_a_leak_that_is_never_closed_is_held_within_a_bound():
    this = new_answer(tools=WEATHER)
    this.feed(HEAD + chunked(say("<tool_call>get_time<arg_key>a</arg_key><arg_value>")))
    piece = chunked(say("x" * 65536))
    told = 0
    for count in range(64):
        steps, _ = this.feed(piece)
        told += sum(len(step.text) for step in steps)
        assert count * 65536 - told < 2 << 20


def test_leaked_calls_and_the_names_of_calls_have_a_bound():
    _, failure = receive([wire(say(leak("get_time") * 200) + ENDED)], tools=WEATHER)
    assert failure.verdict == GIVE_UP
    _, failure = new_answer(tools=WEATHER).feed(HEAD + chunked(say(leak("get_time") * 200)))
    assert failure.verdict == GIVE_UP, "before the answer ends"
    for name in ("x" * 10**6, "<" * 10**6):
        steps, _ = receive([wire(call(name, "{}") + TOOLS_END)], tools=WEATHER)
        assert len(steps[0].name) <= 256


# The rooms alone

# An event, what it says (an error's code, or None).
@pytest.mark.parametrize("text, said", [
    ('{"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}', ztoapi.Frame([("text", "a")], None, "stop")),
    (' {"choices":[{"message":{"content":"a"}}]} ', ztoapi.Frame([("text", "a")])),
    ('{"choices":[]}', ztoapi.Frame([])),
    ('{"iddata: {"choices":[{"delta":{"content":"a"}}]}', ztoapi.Frame([("text", "a")], afresh=True)),
    ('{"usage":{}}', ztoapi.Frame([], usage=counts(0, 0, 0))),
    ("[DONE]", None), ("junk", None), ("5", None), ("", None), ('{"id', "upstream_error"),
    ('{"a":1}{"a":1}', "upstream_error"), ('{"error":{"code":"1305"}}', "overloaded"),
])
def test_frames_tell_what_an_event_says(text, said):
    frames_room = ztoapi.Frames(describe)
    try:
        assert frames_room.feed(text) == said
    except UpstreamError as error:
        assert error.code == said


def test_texts_say_the_same_wherever_they_are_cut():
    rng = random.Random(3)
    words = [*ztoapi.TAGS, "<|begin_of_box|>", leak("get_time"), WISH, *"a \n<", '{"a":"', '"}', "stop", "\U0001f600"]
    for _ in range(200):
        options = {"stop": rng.choice(((), ("stop",))), "json": rng.random() < 0.3, "tools": WEATHER}
        lanes = [(kind, "".join(rng.choices(words, k=rng.randrange(1, 8)))) for kind in ("text", "thinking", "text")]
        told = set()
        for size in (1, 2, 5, 1000):
            room = ztoapi.Texts(asking_for(**options))
            steps = []
            for kind, text in lanes:
                for at in range(0, len(text), size):
                    steps += room.feed(kind, text[at:at + size])
            steps = joined(steps + room.close(is_cut=False))
            told.add(str((words_in(steps), room.leaked)))
        assert len(told) == 1, lanes


def test_calls_come_one_after_the_other_whatever_order_their_pieces_have():
    rng = random.Random(5)
    for _ in range(150):
        room = ztoapi.Calls({}, lambda: "call_new")
        texts = [json.dumps({"a": "}{" * rng.randrange(4), "b": i}) for i in range(3)]
        pieces = {i: [text[at:at + 3] for at in range(0, len(text), 3)] for i, text in enumerate(texts)}
        steps = [step for i in range(3) for step in room.feed([item("f", "", id=f"c{i}", index=i)])]
        while any(pieces.values()):
            i = rng.choice([i for i in pieces if pieces[i]])
            steps += room.feed([item(None, pieces[i].pop(0), index=i, id=rng.choice(("", "odd", f"c{i}")))])
            steps += room.put([Step("text", "x")])
        steps += room.close(is_cut=False)
        calls = joined([step for step in steps if step.kind != "text"])
        assert [(call.index, call.id, call.text) for call in calls] == [(i, f"c{i}", texts[i]) for i in range(3)]
        held = text_in(steps)
        assert len(held) == sum(-(-len(text) // 3) for text in texts)


# Any event that is odd

def test_no_event_is_odd_enough_to_break_the_wire():
    """Whatever Z.ai may send: an error of ours, or an answer that keeps every rule."""
    rng = random.Random(7)
    answers = 0
    samples = GLM_52_TOOLS + call("get_time", "", 5, -1) + error_event("1")
    samples += think("a") + say("b") + say(leak("get_weather" + CITY)) + say("```json\n{") + say("st")
    good = [json.loads(text) for text in decode_events([samples]) if text != "[DONE]"]
    for _ in range(1500):
        values = [mutated(value, rng) if rng.random() < 0.5 else value for value in rng.sample(good, 6)]
        data = sse(*values) + (ENDED if rng.random() < 0.8 else b"")
        options = rng.choice(({}, {"json": True}, {"one_call": True}, {"stop": ("stop", "x")}))
        try:
            steps, failure = receive([wire(data)], tools=WEATHER, **options)
            if failure:
                continue
            folded = folded_stream(steps)
            steps, failure = receive([wire(data)], tools=WEATHER, restartable=True, **options)
            assert failure is None
            assert list(folded_json(steps)) == without_surrogates(folded)
        except Exception as error:
            raise AssertionError(data) from error
        answers += 1
    assert answers > 150


def test_no_byte_is_odd_enough_to_break_the_wire():
    """The same of bytes: some are changed, lost or doubled anywhere in a response."""
    rng = random.Random(11)
    failures = 0
    for _ in range(750):
        data = bytearray(HEAD + BODY)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            odd = rng.choice((b"", b"\n", b"\r\n", b"\0", b"9", b"\xff", b"{", b"data: ", b"<"))
            data[at:at + rng.randrange(2)] = odd
        cut = rng.randrange(1, len(data))
        steps, failure = receive([bytes(data)])
        assert receive([bytes(data[:cut]), bytes(data[cut:])])[0] == steps, data
        failures += failure is not None
        if failure is None:
            folded_stream(steps)
    assert 150 < failures < 700


# Fronts ###############################################################################
#
# What read() makes of a client's request, and what tell() and whole() make of steps. The rules of both wires are
# checked event by event, for each answer in ANSWERS, told as a whole and step by step.

# Chat

@pytest.mark.parametrize("data", [
    in_parts(["<think>hm so</think>Yes!"]), in_parts(["<thi", "nk>hm", " so</thi", "nk>\nYes!"]),
    think("hm ") + think("so") + in_parts(["Yes", "!"])])
def test_thinking_is_parsed_raw_or_hidden(data):
    check_answer(data, says("Yes!", "hm so"), reasoning="parsed")
    check_answer(data, says("Yes!"), reasoning="hidden")
    check_answer(data, says("<think>hm so</think>Yes!"), reasoning="raw")


@pytest.mark.parametrize("rest, expected", [
    (ENDED, says("<think>hm</think>")), (finished("length"), says("<think>hm</think>", finish="length")),
    (call() + TOOLS_END, asks(RAIN, content="<think>hm</think>")),
    (say("a") + think("hm") + say("b") + ENDED, says("<think>hm</think>a<think>hm</think>b")),
])
def test_raw_thinking_is_closed_whatever_follows(rest, expected):
    check_answer(think("hm") + rest, expected, reasoning="raw")


def test_the_tags_of_raw_thinking_have_chunks_of_their_own():
    chat = ztoapi.Chat(**NEW_CHAT, reasoning="raw")
    text = chat.tell(translated(think("hm") + think("so") + say("a") + ENDED))
    events = [json.loads(block[6:]) for block in text.split("\n\n")[:-2]]
    assert [choice["delta"].get("content") for choice in choices_of(events)] == [
        "<think>", "hmso", "</think>", "a", None]


@pytest.mark.parametrize("data", [
    call() + call("get_time", "{}", "c2", 1), calls_in(item(*RAIN, id="a", index=0), item(*TIME, id="b", index=1)),
    calls_in(item("get_weather", '{"city":', id="a", index=0)) + calls_in(item("get_time", "{", id="b", index=1))
    + calls_in(item(None, '"Paris"}', index=0), item(None, "}", index=1)),
    say(leak("get_weather" + CITY) + leak("get_time")),
])
def test_without_parallel_calls_only_the_first_goes_out(data):
    check_answer(data + TOOLS_END, asks(RAIN), one_call=True, tools=WEATHER)


def test_usage_comes_only_if_it_was_asked_for():
    steps = translated(say("a") + ENDED)
    chat = ztoapi.Chat("chatcmpl-1", 5, "x")
    text = chat.opening() + chat.tell(steps)
    assert "usage" not in text
    assert '"choices":[]' not in text
    assert text.endswith("\n\ndata: [DONE]\n\n")
    asked = ztoapi.Chat("chatcmpl-1", 5, "x", include_usage=True)
    last = json.loads(asked.tell(steps).split("\n\n")[-3][6:])
    assert (last["choices"], last["usage"]) == ([], USAGE)
    # Z.ai gave none.
    assert '"choices":[]' not in asked.tell(translated(say("a") + event(finish="stop")))


def test_the_model_is_as_the_client_named_it():
    name = 'gpt-\u2028"4o'
    chat = ztoapi.Chat("chatcmpl-1", 5, name)
    blocks = (chat.opening() + chat.tell(translated(say("a") + ENDED))).split("\n\n")
    assert [json.loads(block[6:])["model"] for block in blocks[:-2]] == [name] * 3
    assert chat.whole(ztoapi.Fold())["model"] == name


def test_a_heartbeat_is_a_chunk_with_an_empty_delta():
    chat = ztoapi.Chat(**NEW_CHAT)
    texts = [chat.opening(), chat.heartbeat()]
    assert [text[-3:] for text in texts] == ["}\n\n"] * 2
    choices = [parse_chunk(text[:-2])["choices"][0] for text in texts]
    assert [choice["delta"] for choice in choices] == [{"role": "assistant", "content": ""}, {}]
    assert [choice["finish_reason"] for choice in choices] == [None, None]


def test_the_error_of_a_stream_is_openais_with_error_first():
    text = ztoapi.Chat(**NEW_CHAT).failure(UpstreamError("no\n", param="x"))
    assert text == 'data: {"error":{"message":"no\\n","type":"upstream_error","param":"x","code":"upstream_error"}}\n\n'


UNSAID = "unsaid"
def read_chat(body, headers, **environ):
    settings = Settings.from_environ(environ)
    return ztoapi.Chat.read(body, ztoapi.Caller(headers, "k", 1790000000.7, ztoapi.Memory()), settings)


# Who gets a stream. Rows: the request's stream, Accept, User-Agent, DEFAULT_STREAM; whether.
@pytest.mark.parametrize("asked, accept, agent, default, expected", [
    (True, "application/json", "ai-sdk/6", "false", True), (False, "text/event-stream", "curl/8", "true", False),
    (UNSAID, "*/*", "curl/8.5.0", "true", True), (UNSAID, "*/*", "curl/8.5.0", "false", False),
    (UNSAID, "", "", "true", True), (UNSAID, "application/json", "OpenAI/Python 3.54.0", "true", False),
    (UNSAID, "Application/JSON", "OpenAI/JS 6.49.0", "true", False),
    (UNSAID, "application/json, text/plain, */*", "axios/1.7", "true", False),
    (UNSAID, "text/event-stream", "x", "false", False),
    (UNSAID, "*/*", "ai/6.0.0 ai-sdk/provider-utils/4.0.0 runtime/node.js/22", "true", False),
    (UNSAID, "*/*", "async-openai", "true", False), (None, "*/*", "curl/8", "true", True),
    (None, "application/json", "x", "true", False), (None, "*/*", "curl/8", "false", False),
    *((UNSAID, "*/*", agent, "true", False) for agent in (
        "node", "undici", "Go-http-client/1.1", "langchaingo/0.1", "Java/17", "Java-http-client/21.0.2", "okhttp/4.9",
        "Apache-HttpClient/5", "lm15", "ai-sdk/openai/2.0 runtime/node.js", "litellm/1.110.0",
        "ai/7.0.173 ai-sdk-provider-utils/5.0.81 node.js/v20")),
    *((UNSAID, "*/*", agent, "true", True) for agent in ("node-fetch/1.0", "python-requests/2.31")),
])
def test_who_gets_a_stream(asked, accept, agent, default, expected):
    body = {} if asked == UNSAID else {"stream": asked}
    front, request = read_chat(body, {"accept": accept, "user-agent": agent}, DEFAULT_STREAM=default)
    assert (front.stream, request.fields["stream"]) == (expected, expected)
    assert body == ({} if asked == UNSAID else {"stream": asked})  # the client's own stays as it is


# Who reads an error only if no cut follows it. Rows: the header fields, whether a failed stream is cut.
@pytest.mark.parametrize("headers, expected", [
    ({}, True), ({"user-agent": "OpenAI/Python 3.57"}, True), ({"origin": "https://app.example"}, False),
    ({"user-agent": "ai/6.0 ai-sdk/openai/3.0"}, False), ({"user-agent": "ai/7.0 ai-sdk-provider-utils/5.0"}, False),
    ({"user-agent": "Python/3.11 aiohttp/3.9"}, False), ({"sec-fetch-mode": "cors"}, False),
])
def test_a_failed_stream_is_cut_unless_the_error_would_be_lost_over_it(headers, expected):
    assert read_chat({}, headers)[0].cuts_failures is expected


def test_a_chat_request_is_read():
    body = {"model": "GLM-4.6", "reasoning_format": "raw", "stream_options": {"include_usage": 1}}
    front, request = read_chat(body, {})
    assert request.fields["model"] == front.model == "GLM-4.6"
    assert (front.created, front.reasoning, front.include_usage) == (1790000000, "raw", True)
    assert front.id.startswith("chatcmpl-")
    assert read_chat({"model": 5}, {}, REASONING_FORMAT="hidden")[0].reasoning == "hidden"


# Messages and Responses

TOLD_USAGE = counts(50, 4, 54, 20, 2)
PNG_URL = "data:image/png;base64,AAAA"
ANY_TOOLS = [{"type": "function", "name": "f", "parameters": {}}, {"type": "custom", "name": "patch"},
             {"type": "namespace", "name": "mcp__tiny", "tools": [{"type": "function", "name": "g"}]}]


def read_messages(**body):
    return by_door("messages", {"model": "glm-4.6v", "messages": [user("Hi")], **body})

def read_responses(by=None, **body):
    return by_door("responses", {"model": "glm-4.6v", "input": "Hi", **body}, by)

def called(index, id, name, text=""):
    return Step("call", text, index, id, name)

def arguments(index, text):
    return Step("arguments", text, index)

def finish(reason, usage=TOLD_USAGE):
    return Step("finish", reason, usage=usage)


def events_of(text):
    """The values of SSE text whose events carry their names twice."""
    values = []
    for block in filter(None, text.split("\n\n")):
        name, data = block.split("\n")
        values.append(json.loads(data[len("data: "):]))
        assert name == "event: " + values[-1]["type"]
    return values


# Rows: a name, and the steps of an answer.
ANSWERS = {
    "text": [Step("text", "Hel"), Step("text", "lo"), finish("stop")],
    "no usage": [Step("text", "Hello"), finish("stop", None)], "nothing": [finish("length")],
    "thinking and text": [Step("thinking", "Hm"), Step("thinking", "."), Step("text", "Hello"), finish("stop")],
    "text between thinking": [Step("thinking", "A"), Step("text", "B"), Step("thinking", "C"), finish("stop")],
    "started afresh": [Step("thinking", "A"), Step("restart"), Step("thinking", "B"), Step("text", "C"),
                       finish("stop")],
    "two calls": [Step("thinking", "A"), Step("text", "B"), called(0, "call_0", "f", '{"a":'), arguments(0, "1}"),
                  called(1, "call_1", "f", "{}"), finish("tool_calls")],
    "a brace in a string": [called(0, "call_0", "f", '{"a":"}'), arguments(0, '\\"}"}'), finish("tool_calls")],
    "a custom tool": [called(0, "call_0", "patch", '{"inp'), arguments(0, 'ut":"x"}'), finish("tool_calls")],
    "cut by length": [Step("text", "Hel"), finish("length")],
    "a call cut by length": [Step("text", "A"), called(0, "call_0", "f", '{"a":'), finish("length")],
    "filtered": [Step("text", "Hel"), finish("content_filter")],
    "context is full": [Step("text", "Hel"), finish("context_window")],
}


def told(read, steps, at_once):
    front, _ = read()
    if at_once:
        # The opening is made behind the first steps.
        text = front.tell(steps)
        return events_of(front.opening() + text)
    return events_of(front.opening() + "".join([front.tell([step]) for step in steps]))


def folded(read, steps):
    fold = ztoapi.Fold()
    fold.add(steps)
    front, _ = read()
    return front.whole(fold)


# Messages, the request

# Rows: fields of a request for a model that is not known, Z.ai's.
@pytest.mark.parametrize("fields, expected", [
    *((fields, fields) for fields in (
        {"max_tokens": 5, "temperature": 1, "top_p": 0.5}, {"seed": 5}, {"user_id": "user-2"})),
    ({"stop_sequences": ["a", "b", "c", "d", "e"]}, {"stop": ABSENT}),
    ({}, {"thinking": OFF, "tools": ABSENT}), ({"thinking": OFF}, {"thinking": OFF}),
    *(({"thinking": {**ON, "budget_tokens": budget}}, {"thinking": ON, "reasoning_effort": effort})
      for budget, effort in ((1024, "low"), (8192, "medium"), (24576, "high"), (32000, "max"))),
    ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}},
     {"thinking": ON, "reasoning_effort": "high"}),
    ({"thinking": {"type": "adaptive"}}, {"thinking": ON, "reasoning_effort": ABSENT}),
    *(({"thinking": {"type": kind}, "context_management": {
        "edits": [{"type": "clear_thinking_20251015", "keep": keep}]}}, {"thinking": {**thinking, **more}})
      for kind, thinking in (("adaptive", ON), ("disabled", OFF))
      for keep, more in (("all", {"clear_thinking": False}), ({"type": "thinking_turns", "value": 1}, {}))),
    *(({"tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}, **more}]},
       function(name="f", description="d", parameters={"type": "object"}))
      for more in ({"cache_control": {}}, {"type": "custom"})),
    *(({"output_config": {"format": form}, **more}, {"response_format": {"type": "json_object"}}) for form, more in (
        ({"type": "json_schema", "schema": {"type": "object"}}, {}),
        (None, {"output_format": {"type": "json_schema", "schema": {"type": "object"}}}))),
    ({"metadata": {"user_id": "user-1"}}, {"user_id": "user-1"}),
    ({"metadata": {"user_id": "u" * 150}}, {"user_id": hashlib.sha256(b"u" * 150).hexdigest()}),
])
def test_messages_fields_become_those_of_zai(fields, expected):
    _, result = read_messages(model="glm-9", **fields)
    assert {name: result.body.get(name, ABSENT) for name in expected} == expected
    assert result.stop == tuple(fields.get("stop_sequences", ()))


# Rows: fields of a request, what x-ztoapi-changed says of them.
@pytest.mark.parametrize("fields, expected", [
    ({"top_k": 3, "container": "c", "mcp_servers": [5], "service_tier": "standard_only", "inference_geo": "eu"},
     {"top_k", "container", "mcp_servers", "service_tier", "inference_geo"}),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}, "invented": 1},
     {"context_management", "invented"}),
    ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}, set()),
    # What asks for nothing
    ({"cache_control": {"type": "ephemeral"}, "metadata": {}, "output_config": {}, "mcp_servers": [], "top_k": None,
      "service_tier": "auto", "context_management": {}}, set()),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, {"bash_20250124"}),
    (asking([{"type": "container_upload", "file_id": "f"}]), {"container_upload"}),
    ({"messages": [user("a"), assistant([{"type": "server_tool_use"}, {"type": "text", "text": "b"}]), user("c")]},
     {"server_tool_use"}),
])
def test_messages_drops_by_name_what_zai_does_not_have(fields, expected):
    _, result = read_messages(**fields)
    assert {*result.changed} == expected
    assert not {"top_k", "container", "invented", "context_management"} & set(result.body)


@pytest.mark.parametrize("model, aliases, expected", [
    ("claude-opus-5-20260901", "", "glm-5.3"), ("claude-sonnet-4.5[1m]", "", "glm-5.3"),
    ("anthropic/claude-3-5-haiku-latest", "", "glm-4.5-air"),
    ("claude-opus-5", "claude-opus-5=glm-4.6", "glm-4.6"), ("claude-opus-5", "*=glm-4.7", "glm-4.7"),
    ("glm-4.6", "*=glm-4.7", "glm-4.6"), ("my-claude", "", "my-claude"),
])
def test_messages_maps_the_names_of_claudes_models(model, aliases, expected):
    front, result = by_door("messages", {"model": model, "messages": [user("Hi")]}, MODEL_ALIASES=aliases)
    assert (result.body["model"], front.model) == (expected, model)
    if not aliases and "claude-" in model:
        assert to_zai(chat_body(model=model))[0]["model"] == re.sub(r"\[.*", "", model)


# Short names for what the cases below are made of.
def image(url=PNG_URL):
    return {"type": "image_url", "image_url": {"url": url}}

def text(words):
    return {"type": "text", "text": words}

def use(id, name="f", input=None):
    return {"type": "tool_use", "id": id, "name": name, "input": input or {}}

def using(*blocks):
    return assistant(list(blocks))

def tool_result(id, *content, **more):
    return {"type": "tool_result", "tool_use_id": id, "content": content[0] if content else None, **more}

def source(kind, **source):
    return {"type": kind, "source": source}


PNG = source("image", type="base64", media_type="image/png", data="AAAA")
BILLED = text("x-anthropic-billing-header: cc_version=2.1")
CALL_1, CALL_2, CALL_3 = ("1", "f", "{}"), ("2", "f", "{}"), ("3", "f", "{}")
ONE_CALL, TWO_CALLS_MADE = assistant("", [CALL_1]), assistant("", [CALL_1, CALL_2])


@pytest.mark.parametrize("messages, expected", [
    # Claude Code's order.
    ([user([text("a")]), system("s"), user("b")], [user("a"), system("s"), user("b")]),
    ([user([source("document", type="url", url="http://x/y.pdf"), text("a")])],
     [user([{"type": "file_url", "file_url": {"url": "http://x/y.pdf"}}, text("a")])]),
    # GLM-4.6V takes no such file; the conversation goes on all the same.
    ([user([source("document", type="base64", media_type="application/pdf", data="AA"), text("a")])],
     [user("[file left out: GLM-4.6V takes no such file]\na")]),
    ([user([dict(source("document", type="text", data="D"), title="t", context="c")])], [user("t\nc\nD")]),
    # What cannot be read, before the last message.
    *(([user(content), U], [user(json.dumps(inner, separators=(",", ":"))), U])
      for content, inner in ((5, 5), (["x"], "x"), ([{"text": "x"}], {"text": "x"}))),
    # Behind a user's message.
    *(([U, *messages], [U, *expected]) for messages, expected in (
        ([using({"type": "thinking", "thinking": "T", "signature": ""}, {"type": "redacted_thinking", "data": "x"},
                text("b"), use("1", input={"q": 1}), use("2")),
          user([tool_result("1", "one"), tool_result("2", [text("two"), PNG]), text("c")])],
         [assistant("b", [("1", "f", '{"q":1}'), CALL_2], "T"), output("1", "one"), output("2", "two"),
          user([FROM_TOOLS, image()]), user("c")]),
        # Results in the wrong order, one that is missing, one that is nobody's.
        ([using(use("1"), use("2"), use("3")),
          user([tool_result("3", "three"), tool_result("1"), tool_result("9", "nine")])],
         [assistant("", [CALL_1, CALL_2, CALL_3]), output("1", "(no output)"), output("2", "(no output)"),
          output("3", "three"), user("Output of the tool call 9:\nnine")]),
        *(([using(use("1")), user([tool_result("1", words, is_error=True)])], [ONE_CALL, output("1", told)])
          for words, told in (("No.", "Error:\nNo."), ("An error!", "An error!"))),
        ([using(text("b"), dict(use("1"), name=None)), user([tool_result("1", "one")])],
         [assistant("b"), user("Output of the tool call 1:\none")]),
        # The beginning of an answer.
        ([assistant("b")], [assistant("b")]))),
])
def test_a_conversation_of_messages_becomes_zais(messages, expected):
    assert read_messages(messages=messages)[1].body["messages"] == expected


@pytest.mark.parametrize("prompt", [
    "Be brief.", [BILLED, dict(text("Be brief."), cache_control={})], BILLED["text"] + ";\nBe brief.",
    [text(BILLED["text"] + "\nBe brief.")]])
def test_the_system_prompt_of_messages_comes_first(prompt):
    _, result = read_messages(system=prompt)
    assert result.body["messages"] == [system("Be brief."), user("Hi")]
    assert not result.changed


@pytest.mark.parametrize("door", ["messages", "responses"])
def test_a_picture_never_ends_an_agents_conversation(door):
    turns = [user([text("a"), PNG]), A_USE, tool_result("1", [PNG]), user([PNG])]
    _, result = by_door(door, {"model": "glm-4.6", FIELD_OF_TURNS[door]: turns})
    assert [message["content"] for message in result.body["messages"]] == [
        "a\n" + NO_PICTURE, "", NO_PICTURE, NO_PICTURE]
    assert result.changed == ("image",)


# Messages, the answer

def read_thinker():
    tools = [{"name": name, "input_schema": {}} for name in ("f", "patch", "mcp__tiny__g")]
    return read_messages(tools=tools, thinking={"type": "adaptive"})


# Of each type of block: how it begins, what its deltas are called, where their text is.
BLOCKS = {
    "text": ({"text": ""}, "text_delta", "text"),
    "thinking": ({"thinking": "", "signature": ""}, "thinking_delta", "thinking"),
    "tool_use": ({"input": {}}, "input_json_delta", "partial_json"),
}


def check_messages_stream(events):
    """The rules of Anthropic's wire; gives the content that the events add up to."""
    kinds = [event["type"] for event in events]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert 20 < start["usage"]["input_tokens"] < 200, "an estimate"
    content, rest = [], collections.deque(events[1:-2])
    while rest:
        content.append(check_block(rest, len(content)))
    return content


def check_block(rest, index):
    """Take the events of one block, first to last, off the rest of a stream; gives the block."""
    first = rest.popleft()
    assert (first["type"], first["index"]) == ("content_block_start", index)
    block = first["content_block"]
    empty, kind, field = BLOCKS[block["type"]]
    assert {name: block[name] for name in empty} == empty
    text = ""
    for event in iter(rest.popleft, {"type": "content_block_stop", "index": index}):
        told = (event["type"], event["index"], event["delta"]["type"])
        assert told == ("content_block_delta", index, kind)
        assert event["delta"][field] != ""
        text += event["delta"][field]
    return dict(block, **{"input" if block["type"] == "tool_use" else field: text})


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("name", ANSWERS)
def test_messages_streams_by_the_rules_what_the_json_answer_says(name, at_once):
    steps = ANSWERS[name]
    events = told(read_thinker, steps, at_once)
    content = check_messages_stream(events)
    whole = folded(read_thinker, steps)
    end = events[-2]
    assert end["delta"] == {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    assert end["usage"] == whole["usage"]
    if "cut" not in name and name != "started afresh":
        for block in content:
            if block["type"] == "tool_use":
                block["input"] = json.loads(block["input"])
        assert content == whole["content"]


def test_a_json_answer_of_messages():
    assert folded(read_thinker, ANSWERS["two calls"]) == {
        "id": ANY_ID("msg_"), "type": "message", "role": "assistant", "model": "glm-4.6v",
        "content": [
            {"type": "thinking", "thinking": "A", "signature": ""}, {"type": "text", "text": "B"},
            {"type": "tool_use", "id": "call_0", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "call_1", "name": "f", "input": {}}],
        "stop_reason": "tool_use", "stop_sequence": None,
        "usage": {"input_tokens": 30, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 20,
                  "output_tokens": 4}}


class ANY_ID(str):
    """Equal to every id that begins so."""

    def __eq__(self, other):
        return isinstance(other, str) and re.fullmatch(re.escape(self) + "[0-9a-f]{24}", other) is not None

    __hash__ = str.__hash__


@pytest.mark.parametrize("broken", ['{"a":', "abc", '"{}"', "[1]", "1"])
def test_messages_never_makes_empty_input_of_broken_arguments(broken):
    steps = [called(0, "call_0", "f", broken), finish("tool_calls")]
    with pytest.raises(UpstreamError):
        folded(read_thinker, steps)
    with pytest.raises(UpstreamError):
        told(read_thinker, steps, True)


@pytest.mark.parametrize("settings,fields", [
    ({}, {}), ({}, {"thinking": {"type": "disabled"}}),
    ({"REASONING_FORMAT": "hidden"}, {"thinking": {"type": "adaptive"}}),
])
def test_messages_hides_thinking_that_was_not_asked_for(settings, fields):
    def read():
        return by_door("messages", {**MESSAGES_BODY, **fields}, **settings)

    steps = ANSWERS["thinking and text"]
    assert [block["type"] for block in folded(read, steps)["content"]] == ["text"]
    assert [block["type"] for block in check_messages_stream(told(read, steps, False))] == ["text"]


def test_messages_names_the_stop_word():
    steps = [Step("text", "a"), finish("stop")._replace(name="END")]
    for message in (folded(read_thinker, steps), told(read_thinker, steps, False)[-2]["delta"]):
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")


def test_messages_beats_with_a_ping():
    front, _ = read_messages()
    assert front.heartbeat() == 'event: ping\ndata: {"type":"ping"}\n\n'


# Errors. Rows: status, code, whether it can heal; the status and type in Messages; the status before a stream and the
# code in one in Responses.
FRONT_ERRORS = [
    (400, "invalid_value", False, 400, "invalid_request_error", 400, "invalid_prompt"),
    (401, "invalid_api_key", False, 401, "authentication_error", 401, "invalid_prompt"),
    (402, "insufficient_quota", False, 402, "billing_error", 400, "insufficient_quota"),
    (403, "upstream_auth_error", False, 400, "invalid_request_error", 400, "invalid_prompt"),
    (403, "host_not_allowed", False, 400, "invalid_request_error", 400, "invalid_prompt"),
    (404, "model_not_found", False, 400, "invalid_request_error", 400, "invalid_prompt"),
    (404, "not_found", False, 404, "not_found_error", 404, "invalid_prompt"),
    (405, "method_not_allowed", False, 405, "invalid_request_error", 405, "invalid_prompt"),
    (413, "request_too_large", False, 413, "request_too_large", 400, "invalid_prompt"),
    (426, "upgrade_not_supported", False, 400, "invalid_request_error", 426, "invalid_prompt"),
    (429, "rate_limit_exceeded", None, 429, "rate_limit_error", 429, "rate_limit_exceeded"),
    (429, "rate_limit_exceeded", False, 429, "rate_limit_error", 429, "rate_limit_exceeded"),
    (500, "internal_error", None, 500, "api_error", 500, "server_error"),
    (502, "upstream_error", None, 502, "api_error", 502, "server_error"),
    (502, "upstream_error", False, 400, "invalid_request_error", 400, "invalid_prompt"),
    (503, "overloaded", None, 503, "overloaded_error", 503, "server_error"),
    (503, "overloaded", False, 503, "overloaded_error", 503, "server_error"),
]


@pytest.mark.parametrize("status, code, retryable, told_status, kind", [row[:5] for row in FRONT_ERRORS])
def test_messages_has_errors_of_anthropics_shape(status, code, retryable, told_status, kind):
    error = ApiError("No.", status=status, code=code, retryable=retryable)
    assert ztoapi.Messages.status(error) == told_status
    body = {"type": "error", "error": {"type": kind, "message": "No."}, "request_id": "req_1"}
    assert ztoapi.Messages.error(error, "req_1") == body
    front, _ = read_messages()
    assert events_of(front.failure(error)) == [dict(body, request_id=None)]


def test_messages_says_in_anthropics_words_what_its_clients_look_for():
    error = zai_error(complaint("1261", "Prompt too long"), 400)
    assert ztoapi.Messages.status(error) == 400
    assert ztoapi.Messages.error(error)["error"]["message"].startswith("prompt is too long: ")
    with pytest.raises(RequestError) as caught:
        read_messages(thread={"type": "create"})  # the SDK then sends everything
    assert ztoapi.Messages.error(caught.value)["error"]["details"] == {"error_code": "thread_unsupported_request"}


# Responses, the request

# Rows: fields of a request for a model that is not known, Z.ai's.
@pytest.mark.parametrize("fields, expected", [
    *((fields, fields) for fields in (
        {"temperature": 1, "top_p": 0.5, "user_id": "user-1", "seed": 1}, {"thinking": ON})),
    ({"enable_thinking": False}, {"thinking": OFF}), ({"stop": ["a"]}, {"stop": ABSENT}),
    ({"max_output_tokens": 5}, {"max_tokens": 5}),
    ({}, {"tools": ABSENT, "tool_choice": ABSENT, "response_format": ABSENT, "thinking": ABSENT}),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}}},
     {"response_format": {"type": "json_object"}}),
    *(({"text": {"format": {"type": kind}}}, {"response_format": ours}) for kind, ours in (
        ("json_object", {"type": "json_object"}), ("text", ABSENT))),
    *(({"reasoning": wish}, {"thinking": thinking, "reasoning_effort": effort}) for wish, thinking, effort in (
        ({"effort": "xhigh", "summary": "auto"}, ON, "xhigh"), ({"effort": "ultra"}, ON, "max"),
        ({"effort": "none", "summary": "auto"}, OFF, ABSENT), ({"effort": None, "summary": "auto"}, ON, ABSENT),
        ({"summary": "off"}, ABSENT, ABSENT), ({"summary": "none"}, ABSENT, ABSENT))),
    ({"reasoning": {"summary": "auto"}, "enable_thinking": False}, {"thinking": OFF}),
])
def test_responses_fields_become_those_of_zai(fields, expected):
    _, result = read_responses(model="glm-9", **fields)
    assert {name: result.body.get(name, ABSENT) for name in expected} == expected


@pytest.mark.parametrize("value, thinking", [("true", ON), ("false", OFF)])
def test_a_summary_turns_no_thinking_on_where_enable_thinking_is_set(value, thinking):
    body = {**APIS["responses"][1], "reasoning": {"summary": "auto"}}
    assert by_door("responses", body, ENABLE_THINKING=value)[1].body["thinking"] == thinking


# Rows: fields of a request, what x-ztoapi-changed says of them.
@pytest.mark.parametrize("fields,expected", [
    ({"metadata": {"a": "b"}, "prompt_cache_key": "k", "truncation": "auto", "service_tier": "flex", "invented": 1},
     {"metadata", "prompt_cache_key", "truncation", "service_tier", "invented"}),
    # What asks for nothing
    ({"client_metadata": {"a": 1}, "include": [], "store": False, "stream_options": {}, "background": False}, set()),
    ({"previous_response_id": None, "conversation": None, "prompt": None, "reasoning": None}, set()),
    ({"metadata": {}, "truncation": "disabled", "service_tier": "auto", "top_logprobs": 0, "presence_penalty": 0},
     set()),
    ({"text": {"verbosity": "low"}}, {"verbosity"}),
    ({"tools": [{"type": "web_search", "external_web_access": False}, {"type": "local_shell"}]},
     {"web_search", "local_shell"}),
    ({"tools": [{"type": "function", "name": "f", "description": None, "strict": False}]}, set()),
    ({"tools": [{"type": "function", "name": "f", "strict": True}]}, {"strict"}),
    ({"input": [user("a"), {"type": "web_search_call", "id": "ws_1"}, {"type": "invented"}, {"type": "a b"}]},
     {"web_search_call", "invented", "a_b"}),
])
def test_responses_drops_by_name_what_zai_does_not_have(fields, expected):
    _, result = read_responses(**fields)
    assert {*result.changed} == expected
    assert "invented" not in result.body
    assert not result.body.get("tools", [{}])[0].get("external_web_access")


def message(role, *parts):
    return {"type": "message", "role": role, "content": list(parts)}

def output_message(words):
    return message("assistant", {"type": "output_text", "text": words, "annotations": []})

def thought(words, **more):
    return {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": words}], **more}

def function_call(id, name="f", text="{}", **more):
    return {"type": "function_call", "id": "fc_1", "call_id": id, "name": name, "arguments": text, **more}


def nested_tools(depth, tool):
    tools = []
    for _ in range(depth):
        tools = [{**tool, "tools": tools}]
    return tools


def gave(id, content, kind="function_call_output"):
    return {"type": kind, "call_id": id, "output": content}


INPUT_IMAGE = {"type": "input_image", "image_url": PNG_URL, "detail": "high"}
@pytest.mark.parametrize("items, expected", [
    ("a", [user("a")]), ([user("a")], [user("a")]),
    ([message("user", {"type": "input_file", "file_url": "http://x/y.pdf"}, {"type": "input_text", "text": "a"})],
     [user([{"type": "file_url", "file_url": {"url": "http://x/y.pdf"}}, text("a")])]),
    ([message("user", {"type": "input_file", "filename": "f.pdf", "file_data": "AA"})],
     [user("[file left out: GLM-4.6V takes no such file]")]),
    ([{"type": "compaction", "encrypted_content": "So far."}, U], [user("So far."), U]),
    *(([{**more, "id": "rs_unknown"}, U], [U]) for more in ({"type": "item_reference"}, {"type": None}, {})),
    ([5, U], [user("5"), U]),
    # Files of another provider.
    ([message("user", text("a"), {"type": "input_image", "file_id": "f"}), U],
     [user('a\n{"type":"input_image","file_id":"f"}'), U]),
    # Behind a user's message.
    *(([U, *items], [U, *expected]) for items, expected in (
        # Codex's second turn.
        ([thought("T"), output_message("b"), function_call("1"), function_call("2"),
          gave("1", "one"), gave("2", "two")],
         [assistant("b", [CALL_1, CALL_2], "T"), output("1", "one"), output("2", "two")]),
        *(([thought("T", **more), output_message("b"), U], [assistant("b", thinking=words), U]) for more, words in (
            ({"encrypted_content": "ztoapi:whole T"}, "whole T"), ({"encrypted_content": "gAAAA"}, "T"),
            ({"content": [{"type": "reasoning_text", "text": "U"}]}, "U"))),
        ([thought("T"), thought("U"), output_message("b"), output_message("c"), U],
         [assistant("b\n\nc", thinking="T\n\nU"), U]),
        ([thought("T"), user("b")], [user("b")]),
        # An output finds its call when the turn is over, too.
        ([function_call("1"), message("developer", text("d")), function_call("2"), gave("1", "one"), gave("2", "two")],
         [ONE_CALL, output("1", "one"), system("d"), assistant("", [CALL_2]), output("2", "two")]),
        ([function_call("1"), function_call("2"), gave("1", "one"), output_message("b"), gave("2", "two")],
         [TWO_CALLS_MADE, output("1", "one"), output("2", "two"), assistant("b")]),
        # What a call may be.
        ([function_call("1", "g", namespace="mcp__tiny"), gave("1", "one")],
         [assistant("", [("1", "mcp__tiny__g", "{}")]), output("1", "one")]),
        ([function_call("1", namespace="functions"), gave("1", "one")], [ONE_CALL, output("1", "one")]),
        *(([message("assistant", *parts), U], [assistant(words), U]) for parts, words in (
            ([{"type": "refusal", "refusal": "No."}], "No."),
            ([text("b"), INPUT_IMAGE, {"type": "refusal", "refusal": "No."}], "b\n\nNo."))))),
])
def test_the_input_of_responses_becomes_zais_conversation(items, expected):
    assert read_responses(input=items)[1].body["messages"] == expected
    _, result = read_responses(input=items, instructions="Be brief.")
    assert result.body["messages"] == [system("Be brief."), *expected]


def test_a_file_keeps_its_name():
    file = {"filename": "f.pdf", "file_data": "AA"}
    _, result = read_responses(model="glm-5.3-flash", input=[message("user", {"type": "input_file", **file})])
    assert {"type": "file", "file": file} in result.body["messages"][0]["content"]


@pytest.mark.parametrize("name,expected", [
    ("f", {"type": "function_call", "name": "f"}),
    ("mcp__tiny__g", {"type": "function_call", "name": "g", "namespace": "mcp__tiny"}),
    ("g", {"type": "function_call", "name": "g", "namespace": "mcp__tiny"}),
    ("patch", {"type": "custom_tool_call", "name": "patch"}),
    ("unknown", {"type": "function_call", "name": "unknown"}),
])
def test_a_called_tool_has_the_name_that_the_client_gave_it(name, expected):
    steps = [called(0, "call_0", name, "{}"), finish("tool_calls")]
    item = folded(lambda: read_responses(tools=ANY_TOOLS), steps)["output"][0]
    assert {key: item.get(key) for key in ("type", "name", "namespace")} == {"namespace": None, **expected}


# Rows: the arguments that Z.ai sends, the text that the custom tool gets.
@pytest.mark.parametrize("words,expected", [
    ('{"input":"x"}', "x"), ('{"patch":"x"}', "x"), ('{"input":"x","other":"y"}', "x"), ('"x"', "x"), ("x y", "x y"),
    ('{"a":"x","b":"y"}', '{"a":"x","b":"y"}'), ("{}", "{}"), ('{"input":', '{"input":'), ("[1]", "[1]"),
])
def test_a_custom_tool_gets_its_text(words, expected):
    steps = [called(0, "call_0", "patch", words), finish("tool_calls")]
    item = folded(lambda: read_responses(tools=ANY_TOOLS), steps)["output"][0]
    assert item == {"type": "custom_tool_call", "id": ANY_ID("ctc_"), "status": "completed", "call_id": "call_0",
                    "name": "patch", "input": expected}


PATCH = "*** Begin Patch\n*** Update File: a.py\n@@\n-a\n+b ***\n*** End Patch"
STARRED = "*** Begin Patch ***\n*** Update File: a.py ***\n@@\n-a\n+b ***\n*** End Patch ***"


# What the model has written; what Codex's apply_patch gets is a bare patch.
@pytest.mark.parametrize("words", [
    *({field: PATCH} for field in ("input", "patch", "command", "any")), PATCH, {"input": STARRED},
    {"input": PATCH + "\n"},
    {"command": ["apply_patch", PATCH]}, {"input": ["apply_patch", STARRED]}, {"arguments": {"patch": PATCH}},
    {"command": ["bash", "-lc", f"apply_patch <<'EOF'\n{PATCH}\nEOF\n"]}, {"input": f"```diff\n{PATCH}\n```"},
    {"input": PATCH, "explanation": "I change a."}, [PATCH], f"Here it is:\n{PATCH}\nDone.",
])
def test_apply_patch_gets_a_bare_patch(words):
    text = json.dumps(words)
    steps = [called(0, "call_0", "apply_patch", text), called(1, "call_1", "patch", text), finish("tool_calls")]
    tools = [{"type": "custom", "name": name} for name in ("apply_patch", "patch")]
    first, second = folded(lambda: read_responses(tools=tools), steps)["output"]
    assert first["input"] == PATCH
    assert second["input"] == ztoapi.unwrap_input(text, "patch")


@pytest.mark.parametrize("words", ["*** Begin Patch\nno end", "no patch", "*** End Patch *** Begin Patch"])
def test_what_is_no_patch_stays_as_it_is(words):
    assert ztoapi.unwrap_input(json.dumps({"input": words}), "apply_patch") == words


# Responses, the answer

def read_user_of_tools():
    return read_responses(tools=ANY_TOOLS, include=["reasoning.encrypted_content"])


# The events between an item's first and last, of which the middle one comes any number of times.
LIVES = {
    "reasoning": ("reasoning_summary_part.added", "reasoning_summary_text.delta", "reasoning_summary_text.done",
                  "reasoning_summary_part.done"),
    "message": ("content_part.added", "output_text.delta", "output_text.done", "content_part.done"),
    "function_call": (None, "function_call_arguments.delta", "function_call_arguments.done", None),
    "custom_tool_call": (None, "custom_tool_call_input.delta", "custom_tool_call_input.done", None),
}
ID_PREFIXES = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_", "custom_tool_call": "ctc_"}


def whole_text(item):
    """The text of a finished item, and how its `done` event calls it."""
    fields = {"reasoning": "summary", "message": "content", "function_call": "arguments"}
    field = fields.get(item["type"], "input")
    return ("text", item[field][0]["text"]) if isinstance(item[field], list) else (field, item[field])


def check_item(events, index):
    """The rules for the events of one item, first to last; gives the item."""
    first, last = events[0], events[-1]
    item = last["item"]
    assert (first["type"], last["type"]) == ("response.output_item.added", "response.output_item.done")
    assert all(event["output_index"] == index for event in events)
    assert item["id"] == ANY_ID(ID_PREFIXES[item["type"]])
    assert (first["item"]["id"], first["item"]["status"]) == (item["id"], "in_progress")
    assert item["status"] in ("completed", "incomplete")
    fields = ("summary", "content", "arguments", "input")
    assert [first["item"][field] for field in fields if field in first["item"]] in ([[]], [""])
    inner = events[1:-1]
    assert all(event["item_id"] == item["id"] for event in inner)
    begin, delta, done, end = LIVES[item["type"]]
    kinds = [event["type"][len("response."):] for event in inner]
    pieces = [event for event, kind in zip(inner, kinds) if kind == delta]
    assert kinds == [kind for kind in (begin, *[delta] * len(pieces), done, end) if kind]
    field, words = whole_text(item)
    assert "".join(event["delta"] for event in pieces) == words
    assert inner[kinds.index(done)][field] == words
    if begin:
        place = "summary_index" if item["type"] == "reasoning" else "content_index"
        assert all(event[place] == 0 for event in inner)
        parts = item.get("summary") or item["content"]
        assert (inner[0]["part"]["text"], inner[-1]["part"]) == ("", parts[0])
    if item["type"] == "message":
        assert all(event["logprobs"] == [] for event in inner if "text" in event or "delta" in event)
    if item["type"] == "function_call":
        assert inner[-1]["name"] == item["name"]
    return item


def check_responses_stream(events):
    """The rules of the wire; gives the last event's response."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    for event in events[:2]:
        assert (event["response"]["output"], event["response"]["status"]) == ([], "in_progress")
    items, started = [], None
    for place, event in enumerate(events[2:-1], 2):
        if event["type"] == "response.output_item.added":
            assert started is None
            started = place
        assert started is not None
        if event["type"] == "response.output_item.done":
            items.append(check_item(events[started:place + 1], len(items)))
            started = None
    assert started is None
    response = events[-1]["response"]
    assert (events[-1]["type"], response["output"]) == ("response." + response["status"], items)
    assert events[0]["response"]["id"] == response["id"] == ANY_ID("resp_")
    return response


def without_ids(value):
    if isinstance(value, list):
        return [without_ids(inner) for inner in value]
    return {key: inner for key, inner in value.items() if key != "id"}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("name", ANSWERS)
def test_responses_streams_by_the_rules_what_the_json_answer_says(name, at_once):
    steps = ANSWERS[name]
    response = check_responses_stream(told(read_user_of_tools, steps, at_once))
    whole = folded(read_user_of_tools, steps)
    if name != "started afresh":
        assert without_ids(whole.pop("output")) == without_ids(response.pop("output"))
        assert without_ids(whole) == without_ids(response)


# Rows: a name in ANSWERS; the types of its blocks and the reason for its end in Messages; the types of its items, its
# status and the reason for being incomplete in Responses.
@pytest.mark.parametrize("name, blocks, stop_reason, items, status, reason", [
    ("text", ["text"], "end_turn", ["message"], "completed", None),
    ("nothing", [], "max_tokens", [], "incomplete", "max_output_tokens"),
    ("thinking and text", ["thinking", "text"], "end_turn", ["reasoning", "message"], "completed", None),
    ("text between thinking", ["thinking", "text", "thinking"], "end_turn",
     ["reasoning", "message", "reasoning"], "completed", None),
    ("two calls", ["thinking", "text", "tool_use", "tool_use"], "tool_use",
     ["reasoning", "message", "function_call", "function_call"], "completed", None),
    ("a custom tool", ["tool_use"], "tool_use", ["custom_tool_call"], "completed", None),
    ("cut by length", ["text"], "max_tokens", ["message"], "incomplete", "max_output_tokens"),
    ("a call cut by length", ["text"], "max_tokens", ["message", "function_call"], "incomplete", "max_output_tokens"),
    ("filtered", ["text"], "refusal", ["message"], "incomplete", "content_filter"),
    ("context is full", ["text"], "model_context_window_exceeded", ["message"], "incomplete", "max_output_tokens"),
])
def test_each_thing_said_is_a_block_or_an_item(name, blocks, stop_reason, items, status, reason):
    whole = folded(read_thinker, ANSWERS[name])
    assert ([block["type"] for block in whole["content"]], whole["stop_reason"]) == (blocks, stop_reason)
    whole = folded(read_user_of_tools, ANSWERS[name])
    assert ([item["type"] for item in whole["output"]], whole["status"]) == (items, status)
    assert (whole["error"], whole["incomplete_details"]) == (None, reason and {"reason": reason})
    # Only what was open at the end is incomplete.
    statuses = [item["status"] for item in whole["output"]]
    assert statuses == ["completed"] * (len(statuses) - 1) + [status] * bool(statuses)


def test_a_json_answer_of_responses():
    echoed = {"metadata": {"a": "b"}, "temperature": 0.5, "tool_choice": "auto", "truncation": "auto",
              "max_output_tokens": 9, "store": False, "user": "user-1", "presence_penalty": 0.5}
    asks = {"text": {"verbosity": "low"}, "reasoning": {"effort": "low", "summary": "off"}}
    assert folded(lambda: read_responses(**echoed, **asks), ANSWERS["thinking and text"]) == {
        "id": ANY_ID("resp_"), "object": "response", "created_at": 1000, "status": "completed", "background": False,
        "completed_at": None, "error": None, "incomplete_details": None, "instructions": None, "max_tool_calls": None,
        "model": "glm-4.6v", "parallel_tool_calls": True, "previous_response_id": None, "prompt_cache_key": None,
        "safety_identifier": None, "service_tier": "default", "tools": [], "top_logprobs": 0, "top_p": 1.0,
        "frequency_penalty": 0, "text": {"format": {"type": "text"}, "verbosity": "low"},
        # OpenAI has no such word for a summary.
        "reasoning": {"effort": "low", "summary": None}, **echoed,
        "output": [
            {"type": "reasoning", "id": ANY_ID("rs_"), "summary": [{"type": "summary_text", "text": "Hm."}],
             "status": "completed"},
            {"type": "message", "id": ANY_ID("msg_"), "status": "completed", "role": "assistant", "content": [
                {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]}],
        "usage": {"input_tokens": 50, "input_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 0},
                  "output_tokens": 4, "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 54}}
    assert folded(read_responses, ANSWERS["no usage"])["usage"] is None


def test_thinking_is_kept_by_the_client_only_if_it_asks():
    item = folded(read_user_of_tools, ANSWERS["thinking and text"])["output"][0]
    assert item["encrypted_content"] == "ztoapi:Hm."
    output = folded(lambda: by_door("responses", APIS["responses"][1], REASONING_FORMAT="hidden"),
                    ANSWERS["thinking and text"])["output"]
    assert [item["type"] for item in output] == ["message"]


def test_responses_beats_without_harm():
    front, _ = read_user_of_tools()
    beats = [front.opening(), front.heartbeat()]
    calls = [called(0, "call_0", "f", "{"), arguments(0, "}"), called(1, "call_1", "patch", "{")]
    for step in (Step("thinking", "A"), Step("text", "B"), *calls):
        beats += [front.tell([step]), front.heartbeat()]
    beats.append(front.tell([arguments(1, "}"), finish("tool_calls")]))
    events = events_of("".join(beats))
    assert events[2]["type"] == "response.in_progress"
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(len(events)))
    del events[2]
    for number, event in enumerate(events):
        event["sequence_number"] = number
    check_responses_stream(events)
    empty = [event["type"] for event in events if event.get("delta") == ""]
    assert empty == ["response.reasoning_summary_text.delta", "response.output_text.delta",
                     "response.function_call_arguments.delta", "response.function_call_arguments.delta",
                     "response.custom_tool_call_input.delta"]


@pytest.mark.parametrize("status, code, retryable, told_status, told_code", [
    *((*row[:3], *row[5:]) for row in FRONT_ERRORS),
    (400, "context_length_exceeded", False, 400, "context_length_exceeded"),
])
def test_an_error_of_responses(status, code, retryable, told_status, told_code):
    error = ApiError("No.", status=status, code=code, retryable=retryable, retry_after=7.0)
    inner = {"message": "No.", "type": "server_error", "param": None, "code": code}
    assert ztoapi.Responses.status(error) == told_status
    # Codex waits it out at this code, but gives up at it in a stream.
    code_outside = "server_is_overloaded" if code == "overloaded" else code
    assert ztoapi.Responses.error(error, "req_1") == {"error": {**inner, "code": code_outside}}
    front, _ = read_responses()
    begin = front.opening() + front.tell([Step("thinking", "A"), Step("text", "B")])
    events = events_of(begin + front.failure(error))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    flat, failed = events[-2:]
    assert [flat[name] for name in ("type", "error", "code", "message", "param")] == ["error", inner, code, "No.", None]
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == {"code": told_code, "message": "No. Please try again in 7s."}
    # What was whole, and no more.
    assert [item["type"] for item in failed["response"]["output"]] == ["reasoning"]
    assert not front.cuts_failures


# Responses, the memory

def test_the_ai_sdk_refers_to_items_of_an_answer():
    memory = ztoapi.Memory()
    answer = folded(lambda: read_responses(caller(memory=memory)), ANSWERS["two calls"])["output"]
    items = [user("a"), *({"type": "item_reference", "id": item["id"]} for item in answer),
             gave("call_0", "one"), gave("call_1", "two")]
    _, result = read_responses(caller(memory=memory), input=items)
    assert result.body["messages"] == [
        user("a"), assistant("B", [("call_0", "f", '{"a":1}'), ("call_1", "f", "{}")], "A"),
        output("call_0", "one"), output("call_1", "two")]
    # The id is no secret, so the key counts.
    with pytest.raises(RequestError) as caught:
        read_responses(caller("other", memory), input=items)
    assert (ztoapi.Responses.status(caught.value), caught.value.param) == (404, "input[2].id")
    assert "not found" in caught.value.message


def test_an_item_is_put_in_for_a_reference_once():
    memory = ztoapi.Memory()
    (item,) = folded(lambda: read_responses(caller(memory=memory)), ANSWERS["text"])["output"]
    items = [user("a"), *[{"id": item["id"]}] * 3, user("b")]
    _, result = read_responses(caller(memory=memory), input=items)
    assert result.body["messages"] == [user("a"), assistant("Hello"), user("b")]
    assert result.changed == ("item_reference",)


def answered(memory, name="text", key="k", **body):
    """The response to a request, all of it told."""
    return folded(lambda: read_responses(caller(key, memory), **body), ANSWERS[name])


def test_an_earlier_response_stands_in_front():
    memory = ztoapi.Memory()
    first = answered(memory, "two calls", input="a", instructions="Only now.", tools=ANY_TOOLS)
    assert (first["store"], first["previous_response_id"]) == (True, None)
    more = {"input": [user("a"), gave("call_0", "one"), gave("call_1", "two")], "tools": ANY_TOOLS}
    second = answered(memory, previous_response_id=first["id"], **more)
    assert second["previous_response_id"] == first["id"]
    _, result = read_responses(
        caller(memory=memory), previous_response_id=second["id"], input="a", instructions="Be brief.")
    assert result.body["messages"] == [
        system("Be brief."), user("a"), assistant("B", [("call_0", "f", '{"a":1}'), ("call_1", "f", "{}")], "A"),
        output("call_0", "one"), output("call_1", "two"), assistant("Hello"), user("a")]


@pytest.mark.parametrize("key, fields, is_over", [("other", {}, True), ("k", {"store": False}, True), ("k", {}, False)])
def test_an_earlier_response_that_is_not_kept_is_a_400_of_exactly_this_code(key, fields, is_over):
    memory = ztoapi.Memory()
    if is_over:
        id = answered(memory, **fields)["id"]
    else:
        id = read_responses(caller(memory=memory))[0].id
    with pytest.raises(RequestError) as caught:
        read_responses(caller(key, memory), previous_response_id=id)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "previous_response_not_found", "previous_response_id")


def test_a_chain_of_responses_takes_linear_memory_and_store_false_none():
    memory = ztoapi.Memory()
    sizes = [0]
    previous = None
    for _ in range(40):
        previous = answered(memory, input="x" * 1000, previous_response_id=previous)["id"]
        sizes.append(sum(memory.sizes.values()))
    steps = [later - earlier for earlier, later in zip(sizes[1:], sizes[2:])]
    assert max(steps) == min(steps) < 5000
    answered(memory, input="x" * 1000, previous_response_id=previous, store=False)
    assert sum(memory.sizes.values()) == sizes[-1]


def test_the_memory_is_bounded_by_bytes_and_the_largest_holder_loses_its_oldest():
    memory = ztoapi.Memory()
    memory.put("small", "0", "kept")
    for i in range(2000):
        memory.put("large", str(i), "\u20ac" + "x" * 20000)
        # What is used stays.
        memory.get("large", "0")
    held = sum(len(data) for values in memory.values.values() for data in values.values())
    assert held <= sum(memory.sizes.values()) <= memory.LIMIT_BYTES
    assert (memory.get("small", "0"), memory.get("large", "1")) == ("kept", None)
    assert memory.get("large", "0") == memory.get("large", "1999") == "\u20ac" + "x" * 20000


TRIGGER = {"type": "compaction_trigger"}


@pytest.mark.parametrize("at_once", [True, False])
def test_a_conversation_is_compacted_into_one_item(at_once):
    steps = [Step("thinking", "Hm"), Step("text", "So "), Step("text", "far."), finish("stop")]
    items = [message("developer", text("d")), user("a"), function_call("1"), gave("1", "one"), TRIGGER]

    def read():
        return read_responses(input=items, tools=ANY_TOOLS, text={"format": {"type": "json_object"}})
    _, result = read()
    assert result.body["messages"][:-1] == [system("d"), user("a"), ONE_CALL, output("1", "one")]
    assert "Sum up" in result.body["messages"][-1]["content"]
    assert not result.body.keys() & {"tools", "response_format"}
    assert result.body["thinking"] == OFF
    events = told(read, steps, at_once)
    assert [event["type"].partition(".")[2] for event in events] == [
        "created", "in_progress", "output_item.added", "output_item.done", "completed"]
    assert events[-1]["response"]["output"] == [
        {"type": "compaction", "id": ANY_ID("cmp_"), "encrypted_content": "So far.", "status": "completed"}]
    # Where it stands elsewhere it asks for nothing.
    assert read_responses(input=[TRIGGER, U])[1].body["messages"] == [U]


@pytest.mark.parametrize("input", ["a", [user("a")], None])
def test_the_compaction_endpoint(input):
    body = {"model": "glm-4.6", "input": input, "instructions": "d", "stream": True}
    front, request = ztoapi.Compaction.read(body, caller(), Settings())
    result = ztoapi.to_zai_request(request, Settings())
    assert result.body["messages"][:-1] == [system("d"), user("a")][:2 if input else 1]
    assert front.stream is False
    assert folded(lambda: (front, None), [Step("text", "So far."), finish("stop", None)]) == {
        "id": ANY_ID("resp_"), "object": "response.compaction", "created_at": 1000,
        "output": [{"type": "compaction", "id": ANY_ID("cmp_"), "encrypted_content": "So far.", "status": "completed"}],
        "usage": {"input_tokens": 0, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                  "output_tokens": 0, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 0}}


# All three: what one API knows is understood through the doors of the others

FIELD_OF_TURNS = {"chat": "messages", "responses": "input", "messages": "messages"}


def become(door, *turns, model="glm-4.5v", **fields):
    """(Z.ai's messages, the set of what was changed) of turns that stand behind and before a user's."""
    body = {"model": model, FIELD_OF_TURNS[door]: [U, *turns, U], **fields}
    result = by_door(door, body)[1]
    assert (result.body["messages"][0], result.body["messages"][-1]) == (U, U)
    return result.body["messages"][1:-1], set(result.changed)


A_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
A_USE = use("1", input={"a": 1})
MADE = assistant("", [("1", "f", '{"a":1}')])
# To add a form of a call, or of its output, add a row.
CALLS = {
    "chat": {"role": "assistant", "tool_calls": [A_CALL]},
    "chat, without a type": {"role": "assistant", "content": None, "tool_calls": [{**A_CALL, "type": None}]},
    "an item": function_call("1", text='{"a":1}'), "a block": using(A_USE), "a block alone": A_USE,
    "an item in a message": using(function_call("1", text='{"a":1}')), "chat's as a part": using(A_CALL),
    "LangChain's part": using({"type": "tool_call", "id": "1", "name": "f", "args": {"a": 1}}),
    "a part and chat's": {**using(A_USE), "tool_calls": [A_CALL]},
    "a block among chat's": {"role": "assistant", "content": "", "tool_calls": [A_USE]},
}
OUTPUTS = {
    "chat": output("1", "one"),
    "chat, in parts": output("1", [{"type": "output_text", "text": "one"}]),
    "an item": gave("1", "one"),
    "a custom item": gave("1", [{"type": "input_text", "text": "one"}], "custom_tool_call_output"),
    "a block": user([tool_result("1", "one")]), "a block of blocks": user([tool_result("1", [text("one")])]),
    "a block alone": tool_result("1", {"type": "text", "text": "one"}),
}


@each_door
@pytest.mark.parametrize("call", CALLS)
def test_a_call_and_its_output_in_any_form(door, call):
    found = {name: become(door, CALLS[call], turn) for name, turn in OUTPUTS.items()}
    assert found == dict.fromkeys(OUTPUTS, ([MADE, output("1", "one")], set()))


@each_door
def test_calls_that_differ_are_two_though_they_have_one_id(door):
    other = {**A_CALL, "function": {"name": "f", "arguments": '{"a":2}'}}
    messages, changed = become(door, {**using(A_USE), "tool_calls": [other]})
    assert [call["id"] for call in messages[0]["tool_calls"]] == ["1", "call_2_1"]
    assert changed == {"tool_call_id"}


@each_door
@pytest.mark.parametrize("value", [
    {"a": 1}, [{"a": 1}, {"b": [2]}], [1, "x"], ["x"], 5, 0, 1.5, True, {"type": "x", "text": "y"}])
def test_an_output_that_is_no_text_is_told_as_json(door, value):
    told = json.dumps(value, separators=(",", ":"))
    for turn in (output("1", value), gave("1", value), user([tool_result("1", value)])):
        assert become(door, CALLS["chat"], turn) == ([MADE, output("1", told)], set())


SOURCE = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
@each_door
@pytest.mark.parametrize("part", [
    image(), {"type": "image_url", "image_url": PNG_URL}, {"type": "input_image", "image_url": PNG_URL, "detail": "x"},
    {"type": "image", "source": SOURCE}, {"type": "image", "source": {"type": "url", "url": PNG_URL}},
    {"type": "image", "data": "AAAA", "mimeType": "image/png"},
    {"type": "image", "base64": "AAAA", "mime_type": "image/png"}, {"type": "image", "url": PNG_URL},
])
def test_a_picture_in_any_form(door, part):
    seen = image() if part.get("type") != "image_url" or isinstance(part["image_url"], str) else part
    assert become(door, user([text("a"), part])) == ([user([text("a"), seen])], set())
    for turn in (output("1", [part]), gave("1", [part]), user([tool_result("1", [part])]), tool_result("1", part)):
        expected = [MADE, output("1", "(an image)"), user([FROM_TOOLS, seen])]
        assert become(door, CALLS["chat"], turn) == (expected, set())


# To add a part that has words, add a row: the part, its words.
@each_door
@pytest.mark.parametrize("part, words", [
    *(({"type": kind, "text": "w"}, "w") for kind in ("text", "input_text", "output_text")),
    (source("document", type="text", data="w"), "w"), (source("document", type="content", content=[text("w")]), "w"),
    ({"type": "search_result", "source": "s", "title": "t", "content": [text("w")]}, "t\nw"),
    ({"type": "tool_reference", "tool_name": "Read"}, "Read"),
    ({"type": "resource", "resource": {"uri": "file:///a", "mimeType": "text/plain", "text": "w"}}, "w"),
    ({"type": "resource_link", "name": "n", "uri": "file:///a"}, "n\nfile:///a"),
])
def test_words_in_any_form(door, part, words):
    assert become(door, user([part])) == ([user(words)], set())
    assert become(door, system([part])) == ([system(words)], set())
    for turn in (output("1", [part]), gave("1", [part]), user([tool_result("1", [part])])):
        assert become(door, CALLS["chat"], turn) == ([MADE, output("1", words)], set())


@each_door
@pytest.mark.parametrize("turns", [
    [{**A, "reasoning_content": "T"}], [{**A, "reasoning": "T"}],
    [using({"type": "thinking", "thinking": "T"}, text("A"))],
    [using({"type": "reasoning", "reasoning": "T"}, text("A"))], [thought("T"), A],
    [using(thought("T"), text("A"))], [{"type": "thinking", "thinking": "T", "signature": ""}, A],
    [{"type": "reasoning", "encrypted_content": "ztoapi:T", "summary": []}, output_message("A")],
])
def test_thinking_in_any_form(door, turns):
    assert become(door, *turns) == ([assistant("A", thinking="T")], set())


# To add a piece of no known type, add a row: the piece, its words from a user.
@each_door
@pytest.mark.parametrize("piece, words", [
    ({"type": "x", "text": "w"}, "w"), ({"type": "x", "content": [text("w"), "v"], "title": "t"}, "t\nw\nv"),
    ({"type": "x", "name": "n", "url": "http://a"}, "n\nhttp://a"), ({"type": "x", "x": {"text": "w"}}, "w"),
    ({"type": "x", "a": 1}, "[x left out: Z.ai takes no x]"), ({"type": "x"}, "[x left out: Z.ai takes no x]"),
])
def test_what_is_of_no_known_type_is_said_in_words_but_not_by_the_assistant(door, piece, words):
    assert become(door, user([text("a"), piece])) == ([user("a\n" + words)], {"x"})
    assert become(door, system([piece])) == ([system(words)], {"x"})
    assert become(door, using(text("a"), piece)) == ([assistant("a")], {"x"})
    assert become(door, piece) == ([], {"x"})
    told = json.dumps(piece, separators=(",", ":"))
    turns = (CALLS["chat"], output("1", [text("a"), piece]))
    assert become(door, *turns) == ([MADE, output("1", "a\n" + told)], set())


@each_door
def test_what_nests_for_ever_has_an_end(door):
    deep = text("w")
    for kind in ("x", "tool_result", "message", "thinking") * 112:
        deep = {"type": kind, "content": [deep], "role": "user"}
    messages, _ = become(door, user([text("a"), deep]), using(deep), deep)
    assert len(json.dumps(messages)) < 100000


CHOICE_FORMS = [
    named("f"), {"type": "function", "name": "f"}, {"type": "tool", "name": "f"}, allowed("required", "f"),
    {"type": "allowed_tools", "mode": "required", "tools": [{"name": "f"}]}, {"function": {"name": "f"}},
]


# Of the same tool, and of the same choice. To add a form, add a row.
@each_door
@pytest.mark.parametrize("tool", [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},
    {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False},
    {"name": "f", "description": "d", "input_schema": {"type": "object"}},
    {"name": "f", "description": "d", "parameters": {"type": "object"}},
    {"type": "custom", "name": "f", "description": "d", "input_schema": {"type": "object"}, "cache_control": {}},
    {"type": "namespace", "name": "functions", "tools": [{"type": "function", "name": "f", "description": "d",
                                                          "parameters": {"type": "object"}}]},
])
def test_a_tool_and_its_choice_in_any_form(door, tool):
    for choice in CHOICE_FORMS:
        body = {"model": "glm-4.6", FIELD_OF_TURNS[door]: [U], "tools": [TOOL2, tool], "tool_choice": choice}
        front, result = by_door(door, body)
        assert result.body["tools"] == function(name="f", description="d", parameters={"type": "object"})["tools"]
        assert "calling the tool f" in result.body["messages"][0]["content"]
        assert front.find_tool("f")["name"] == "f"
    # An item may bring tools, too.
    turns = [{"type": "additional_tools", "tools": [tool]}, U]
    result = by_door(door, {"model": "glm-4.6", FIELD_OF_TURNS[door]: turns})[1]
    assert [tool["function"]["name"] for tool in result.body["tools"]] == ["f"]


@each_door
def test_a_custom_tool_gets_a_text(door):
    grammar = {"syntax": "lark", "definition": "start: x"}
    for tool in ({"type": "custom", "name": "p", "description": "d", "format": {"type": "grammar", **grammar}},
                 {"type": "custom", "custom": {"name": "p", "description": "d", "format": {"grammar": grammar}}}):
        turns = [U, {"type": "custom_tool_call", "call_id": "1", "name": "p", "input": "x"}, output("1")]
        result = by_door(door, {"model": "glm-4.6", FIELD_OF_TURNS[door]: turns, "tools": [tool]})[1]
        (ours,) = result.body["tools"]
        assert ours["function"]["description"] == "d\nlark\nstart: x"
        assert ours["function"]["parameters"]["required"] == ["input"]
        assert result.body["messages"][1]["tool_calls"][0]["function"] == {"name": "p", "arguments": '{"input":"x"}'}


@each_door
def test_no_two_tools_have_one_name(door):
    tools = [
        {"type": "namespace", "name": "a", "tools": [{"name": "b__c"}]}, {"name": "a__b__c"},
        {"type": "namespace", "name": "a__b", "tools": [{"name": "c"}]},
        *({"name": name} for name in ("a.b", "a_b", "a/b", "y" * 70, "y" * 71, "wetter in K\u00f6ln"))]
    owners = [("b__c", "a"), ("a__b__c", None), ("c", "a__b"), *((tool["name"], None) for tool in tools[3:])]
    calls = [function_call(str(i), name, namespace=space) for i, (name, space) in enumerate(owners)]
    front, result = by_door(door, {"model": "glm-4.6", FIELD_OF_TURNS[door]: [U, *calls, U], "tools": tools})
    names = [tool["function"]["name"] for tool in result.body["tools"]]
    assert (names[0], names[4]) == ("a__b__c", "a_b")
    assert all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", name) for name in names)
    assert len(set(names)) == len(names)
    found = [front.find_tool(name) for name in names]
    assert [(tool["name"], tool.get("namespace")) for tool in found] == owners
    assert [call["function"]["name"] for call in result.body["messages"][1]["tool_calls"]] == names


def test_chat_restores_the_names_of_tools():
    front, result = by_door("chat", chat_body(tools=[{"name": "read.file"}], stream=True))
    (name,) = result.tools
    steps = [called(0, "call_0", name, "{}"), finish("tool_calls")]
    assert '"name":"read.file"' in front.tell(steps)
    fold = ztoapi.Fold()
    fold.add(steps)
    assert front.whole(fold)["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "read.file"


@each_door
def test_tools_are_counted_as_they_are_sent(door):
    tools = [{"name": f"f{i}"} for i in range(128)]
    body = {"model": "glm-4.6", FIELD_OF_TURNS[door]: [U], "tools": [*tools, {"type": "web_search_preview"}]}
    assert len(by_door(door, body)[1].body["tools"]) == 128
    with pytest.raises(RequestError, match="128"):
        by_door(door, {**body, "tools": [*tools, {"name": "g"}]})


# A picture that the asked model does not see, where VISION_MODEL is set. Rows: turns, whether that one answers.
SHOWN = user([text("a"), PICTURE])
@each_door
@pytest.mark.parametrize("turns, sees", [
    ([SHOWN], True), ([U, A, SHOWN], True), ([SHOWN, system("s")], True), ([SHOWN, A, U], False), ([SHOWN, U], True),
    ([U, CALLS["chat"], output("1", [PICTURE])], True), ([U, CALLS["chat"], gave("1", [INPUT_IMAGE])], True),
    ([U, A_USE, user([tool_result("1", [PNG])])], True), ([U, A_USE, tool_result("1", [PNG]), U], True),
    ([SHOWN, CALLS["chat"], output("1", "one")], True), ([U, CALLS["chat"], output("1", [PICTURE]), A, U], False),
    ([U, CALLS["chat"], output("1", [PICTURE]), CALLS["chat"], output("1", "one")], False),
])
def test_vision_model_answers_where_this_turn_shows_a_picture(door, turns, sees):
    body = {"model": "GLM-4.6", FIELD_OF_TURNS[door]: turns}
    front, result = by_door(door, body, VISION_MODEL="GLM-5.3-Flash")
    assert result.body["model"] == ("glm-5.3-flash" if sees else "glm-4.6")
    assert front.model == "GLM-4.6"
    said = json.dumps(result.body["messages"])
    assert ("image_url" in said) == sees
    # A model that sees answers itself, and so does one that has to.
    assert by_door(door, {**body, "model": "glm-4.6v"}, VISION_MODEL="glm-5.3-flash")[1].body["model"] == "glm-4.6v"
    _, request = DOORS[door].read(body, caller(), Settings())
    again = ztoapi.to_zai_request(request, Settings(vision_model="glm-5.3-flash"), model="glm-4.6v").body
    assert (again["model"], "image_url" in json.dumps(again)) == ("glm-4.6v", "PNG" in said or "image" in said)


# Estimates of tokens
@pytest.mark.parametrize("words, least, most", [
    ("The quick brown fox jumps over the lazy dog. " * 100, 1125, 1300), ("", 0, 1),
    ("\u4f60\u597d\u4e16\u754c" * 250, 769, 800)])
def test_tokens_are_estimated(words, least, most):
    assert least <= ztoapi.estimate_tokens(words) <= most
    _, result = read_messages(messages=[user(words)])
    assert least <= result.tokens <= most + 50


def test_an_estimate_counts_all_but_the_bytes_of_pictures():
    big = {"type": "image", "source": {**SOURCE, "data": "A" * 10**6}}
    bare, shown = (read_messages(messages=[user([text("a"), *more])])[1].tokens for more in ([], [big]))
    assert 500 < shown - bare < 3000
    tools = [{"name": "f", "input_schema": {"type": "object", "description": "word " * 1000}}]
    assert read_messages(system="word " * 1000, tools=tools)[1].tokens - bare > 2500


# Schemas in plain words, for a further try. To add one, add a row: the schema, the plainer one; None: it is plain.
ANY = {"description": "Any JSON value."}
@pytest.mark.parametrize("properties, plainer", [
    ({"a": {"type": "string", "enum": ["x"], "default": {}}, "b": {"type": ["string", "null"]}}, None), ({}, None),
    ({"const": {"type": "string", "description": "$ref anyOf"}}, None),
    ({"a": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "d"}},
     {"a": {"type": "string", "description": "d"}}),
    ({"a": {"oneOf": [{"type": "integer"}, {"type": "string"}]}}, {"a": {"type": "string"}}),
    ({"a": {"anyOf": [{"type": "array", "items": {"const": 1}}, {"type": "null"}]}},
     {"a": {"type": "array", "items": {"enum": [1]}}}),
    ({"a": {"oneOf": [{"const": "x"}, {"const": "y"}, {"enum": ["z"]}]}}, {"a": {"enum": ["x", "y", "z"]}}),
    ({"a": True, "b": {}, "c": False}, {"a": ANY, "b": ANY, "c": ANY}),
    ({"a": {"$ref": "#/$defs/Panel", "description": "mine"}},
     {"a": {"type": "object", "description": "mine", "properties": {"title": {"type": "string"}}}}),
    ({"a": {"allOf": [{"$ref": "#/$defs/a~1b"}, {"description": "d"}]}}, {"a": {"type": "number"}}),
    ({"a": {"$ref": "#/nowhere"}, "b": {"$ref": "http://a/b.json"}, "c": {"anyOf": 5}}, {"a": ANY, "b": ANY, "c": ANY}),
])
def test_hard_schemas_become_plain(properties, plainer):
    defs = {"a/b": {"type": "number"}, "Panel": {"type": "object", "properties": {"title": {"type": "string"}}}}
    schema = {"type": "object", "properties": properties}
    if "$ref" in json.dumps(list(properties.values())) and plainer:
        schema["$defs"] = defs
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}
    body = {"model": "m", "messages": [U], "tools": [SEARCH, TOOL, tool]}
    before = copy.deepcopy(body)
    simpler = ztoapi.simpler_schemas(body)
    assert body == before
    if plainer is None:
        assert simpler is None
        return
    assert simpler["tools"][:2] == [SEARCH, TOOL]
    found = simpler["tools"][2]["function"]
    assert (found["name"], found["description"]) == ("f", "d")
    assert not re.search("[$]ref|[$]defs|anyOf|oneOf|allOf|const", json.dumps(found))
    assert found["parameters"] == {"type": "object", "properties": plainer}


# Rows: Z.ai's answers, which of the requests had plain schemas, the status.
@cases("answers, plain, status", [
    ("1210", [refusal(400, "1210")], [False, True], 200), ("1214", [refusal(400, "1214")], [False, True], 200),
    ("empty", [stream(DONE)] * 2, [False, False, True], 200),
    ("network", [refusal(400, "1234")] * 2, [False, False, True], 200),
    ("500", [answer(500, complaint("500"))] * 2, [False, False, True], 200),
    ("once", [refusal(400, "1210")] * 2, [False, True], 400),
    ("another fault", [refusal(400, "1261")], [False], 400), ("heals", [refusal(400, "1234")], [False, False], 200),
    ("words", [refusal(400, "1210", "Prompt exceeds max length")], [False], 400),
    ("later", [refusal(400, "1210"), refusal(429, "1302")], [False, True, True], 200),
    ("no tries anew", [refusal(400, "1234")] * 3, [False, False, True], 502),
    ("no money", [refusal(400, "1210"), refusal(429, "1113")], [False, True], 402),
    ("breaks", [refusal(400, "1210"), stream(say("a"), error_event("1234"))], [False, True], 502),
    ("too late", [stream(say("a"), error_event("1210"))], [False], 400),
])
def test_schemas_that_zai_may_have_refused_are_said_in_plain_words_once(zai, answers, plain, status):
    zai.scripts.extend(answers)
    with proxying(zai, MAX_RETRIES="1") as proxy:
        hard = {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}
        found, headers, _ = proxy.chat(**function(name="f", parameters={"type": "object", "properties": hard}))
        retries, _, _ = figures(proxy)
    assert (found, retries) == (status, len(plain) - 1)
    assert ["anyOf" not in json.dumps(request["body"]) for request in zai.requests] == plain
    assert headers.get("x-ztoapi-changed") == ("schemas" if plain[-1] else None)


@cases("schema", [
    ("one that refers to itself", {"$ref": "#/$defs/0", "$defs": {
        str(i): {"anyOf": [{"$ref": f"#/$defs/{j}"} for j in range(20)]} for i in range(20)}}),
    ("many wide unions", {"$defs": {"wide": {"anyOf": [ANY] * 1000}}, "properties": {
        f"p{i}": {"$ref": "#/$defs/wide"} for i in range(1000)}}),
    ("a long word beside a wide union", {"description": "x" * 10**6, "anyOf": [ANY] * 1000}),
])
def test_plain_words_have_an_end(schema):
    body = {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}
    with linear_time():
        assert len(json.dumps(ztoapi.simpler_schemas(body))) < 2 * 10**6
    assert ztoapi.simpler_schemas({"messages": []}) is None


# What a tool's argument may be.
@cases("schema", [
    ("unions of unions", {"anyOf": [{"$ref": "#/$defs/wide"}] * 400}),
    ("words beside a union", {**{f"x-{i}": i for i in range(20000)}, "anyOf": [{"type": "string"}] * 1000}),
    ("long members", {"anyOf": [{"$ref": "#/$defs/long"}] * 400}),
    ("members inside of members", {"$ref": "#/$defs/0"}),
])
def test_no_schema_takes_more_than_linear_time(schema):
    defs = {str(i): {"$ref": f"#/$defs/{i + 1}", **{f"x-{i}-{k}": k for k in range(90)}} for i in range(999)}
    defs["wide"] = {"anyOf": [{"type": "string"}] * 10000}
    defs["long"] = {"type": "string", **{f"x-{i}": i for i in range(20000)}}
    with linear_time():
        types = ztoapi.argument_types({"properties": {"a": schema}, "$defs": defs})
        assert types.get("a", {"string"}) == {"string"}


# Both, bounds

# What a client may send: the fields of a Responses request.
@cases("fields", [
    ("an assistant that never stops", {"input": [assistant("x" * 1000)] * 8000}),
    ("calls without outputs", {"input": [function_call(str(i)) for i in range(10000)]}),
    ("calls with their outputs",
     {"input": [item for i in range(5000) for item in (function_call(str(i)), gave(str(i), "x"))]}),
    ("calls without ids", {"input": [function_call(None)] * 8000 + [gave(None, "x")] * 8000}),
    ("calls of one id", {"input": [function_call("1")] * 8000 + [gave("1", "x")] * 8000}),
    ("a long call, and others of its id",
     {"input": [{**function_call("1"), "arguments": json.dumps(["x" * 10**6])}]
      + [{**function_call("1"), "arguments": str(i)} for i in range(1000)]}),
    ("outputs of nothing", {"input": [function_call("1")] * 5000 + [gave(str(i), "x") for i in range(10000)]}),
    ("what cannot be read", {"input": [[]] * 6000}),
    ("calls before their outputs",
     {"input": [function_call(str(i)) for i in range(10000)] + [gave(str(i), "x") for i in range(10000)]}),
    ("thinking", {"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "x" * 1000}]}] * 8000}),
    ("fields", {f"field{i}": i for i in range(100000)}),
    ("kinds of items", {"input": [{"type": f"kind{i}"} for i in range(10000)]}),
    ("nested words", {"input": [{"role": "user", "content": [functools.reduce(
        lambda inner, _: {"type": "content", "content": inner}, range(8), [""] * 50000)]}]}),
    ("a tool's name", {"tools": [{"type": "function", "name": "x" * 10**7}]}),
    ("namespaces", {"tools": [{"type": "namespace", "name": "n", "tools": []}] * 20000}),
    ("deep namespaces", {"tools": nested_tools(5000, {"type": "namespace", "name": "n"})}),
    ("deep choices", {"tool_choice": nested_tools(5000, {"type": "allowed_tools"})[0]}),
    ("a model's name", {"model": "[" * 10**7}),
])
def test_no_request_takes_more_than_linear_time(fields):
    body = {"model": "glm-4.6v", "input": "Hi", **fields}
    with linear_time(), contextlib.suppress(RequestError):
        _, request = ztoapi.Responses.read(body, caller(), Settings())
        result = ztoapi.to_zai_request(request, Settings())
        assert len(result.changed) <= 100
        assert max(map(len, result.changed), default=0) <= 40


def test_what_responses_echoes_has_a_bound():
    front, _ = read_responses(metadata={"a": "x" * 10**6}, user="x" * 10**6, tool_choice="none")
    assert len(front.opening()) < 5000
    assert '"tool_choice":"none"' in front.opening()
    deep = []
    for _ in range(100000):
        deep = [deep]
    with pytest.raises(RequestError):
        ztoapi.Responses.read({"input": "a", "metadata": {"a": deep}}, caller(), Settings())
    with pytest.raises(RequestError):  # what is kept
        ztoapi.Responses.read({"input": [{"a": deep}]}, caller(), Settings())


# Answers that are kept for their end.
@pytest.mark.parametrize("read", (read_responses, read_messages))
@cases("steps", [
    ("texts", [Step("text", "x" * (1 << 20))] * 100),
    ("arguments", [called(0, "call_0", "f", "{")] + [arguments(0, "1" * (1 << 20))] * 100),
])
def test_what_is_kept_for_the_end_has_a_bound(read, steps):
    front, _ = read()
    with linear_time(), pytest.raises(UpstreamError) as caught:
        for step in steps:
            front.tell([step])
    assert caught.value.verdict == GIVE_UP


# Gates ################################################################################
#
# By a clock that passes only while somebody waits. What must be seen at Z.ai goes through real sockets.

class FakeClock:
    """Time that passes only when somebody waits. at(): what is to happen meanwhile. `chores` are called as the pump
    calls its own: some times a second."""

    STEP_S = 1 / 16

    def __init__(self):
        self.now = 1024.0
        self.plan = []
        self.chores = []

    def __call__(self):
        return self.now

    def at(self, when, what):
        self.plan = sorted([*self.plan, (when, what)], key=lambda pair: pair[0])

    def wait(self, seconds):
        """Let time pass, that long or less."""
        until = self.now + min(seconds, self.STEP_S)
        if self.plan and self.plan[0][0] <= until:
            self.now, what = self.plan.pop(0)
            what()
        else:
            self.now = max(self.now, until)
        for chore in self.chores:
            chore(self.now)


class FakeClient(ztoapi.Client):
    """A client that waits by a clock; without one, in a thread of its own, until it is woken."""

    def __init__(self, clock=None, key="", connection=None, outbox=None):
        super().__init__(connection, outbox, key)
        self.clock = clock

    def wait(self, seconds):
        if self.clock:
            self.clock.wait(seconds)
        else:
            self.alarm.acquire(timeout=LONG_S)
        if self.gone:
            raise ztoapi.ClientGone


def text_in(steps):
    return "".join(step.text for step in steps if step.kind == ztoapi.TEXT)


class Timed:
    """An Upstream on that clock, tickets for its gates, and requests over it to a fake Z.ai on a real socket, which
    gives `answers`, then `script` for ever. `times`: when each request arrived there."""

    NOW = 1780000000  # Unix time when the clock says 0

    def __init__(self, zai, rand=0.0, keys=1, limit=0, **environ):
        self.clock = FakeClock()
        self.times = []
        self.answers = collections.deque()
        self.script = stream(*HEALTHY)
        self.admitted = []
        self.threads = []
        # The clock leaps: that is no silence of Z.ai.
        usual = {"ZAI_API_KEY": ",".join(ZAI_KEYS[:keys]), "MAX_CONCURRENCY": str(limit), "UPSTREAM_TIMEOUT": "1000000"}
        self.settings = Settings.from_environ(dict(usual, ZAI_BASE_URL=zai.url, **environ))
        self.pump = ztoapi.Pump(self.settings, self.clock)
        self.upstream = ztoapi.Upstream(self.settings, self.pump, self.unix_now, lambda: rand, proxies={})
        self.gates = self.upstream.gates
        self.clock.chores.append(self.gates.tick)
        self.pump.start()
        zai.default = self.arrived

    def unix_now(self):
        return self.NOW + self.clock.now

    def close(self):
        self.pump.close()
        self.upstream.close()

    # Tickets

    def ticket(self, model="glm-4.6", **client):
        return ztoapi.Ticket(model, FakeClient(**client))

    def enter(self, ticket=None, model="glm-4.6"):
        """A ticket that got a slot, waiting by the clock if it must."""
        ticket = ticket or self.ticket(model, clock=self.clock)
        self.gates.enter(ticket)
        return ticket

    def seconds_to_enter(self, ticket=None):
        began = self.clock.now
        self.enter(ticket)
        return self.clock.now - began

    def queue(self, key=""):
        """A ticket that waits in the queue, in a thread."""
        ticket = self.ticket(key=key)
        before = self.queued()

        def wait():
            with contextlib.suppress(ztoapi.ClientGone):
                self.gates.enter(ticket)
                self.admitted.append(ticket)
        self.threads.append(threading.Thread(target=wait, daemon=True))
        self.threads[-1].start()
        assert eventually(lambda: self.queued() == before + 1)
        return ticket

    def queued(self):
        return sum(self.gates.state()[1].values())

    def ceilings(self):
        return [None if gate.ceiling == ztoapi.INFINITY else gate.ceiling for gate in self.gates.gates.values()]

    def serve_all(self, ticket):
        """Let the ticket end, then each that is admitted thereby; in which order they came."""
        for i in range(len(self.threads) + 1):
            self.gates.leave(ticket, served=True)
            if i < len(self.threads):
                assert eventually(lambda i=i: len(self.admitted) > i)
                ticket = self.admitted[i]
        return self.admitted

    # Requests

    def arrived(self, request):
        self.times.append(self.clock.now)
        return self.answers.popleft() if self.answers else self.script

    def job(self, model="glm-4.6"):
        def write(model=""):
            return ztoapi.Job(ztoapi.to_zai_request(request, self.settings, model))
        request = ztoapi.Request(chat_body(model=model, stream=True), {})
        job = write()
        job.write = write
        return job

    def ask(self, model="glm-4.6"):
        """(text, error, record)"""
        record = ztoapi.Record("req_1", "127.0.0.1", 0.0)
        fold = ztoapi.Fold()
        error = None
        try:
            self.upstream.answer(self.job(model), FakeClient(self.clock), record, fold.add)
        except ApiError as failure:
            error = failure
        return text_in(fold.items), error, record

    def gaps(self):
        return [after - before for before, after in zip(self.times, self.times[1:])]

    def reset_words(self, seconds):
        """Z.ai's words for a limit that ends after so long."""
        reset = time.gmtime(self.unix_now() + 8 * 3600 + seconds)
        return time.strftime("Your limit will reset at %Y-%m-%d %H:%M:%S", reset)  # Beijing time


@pytest.fixture
def make_timed(zai):
    """Makes such Upstreams to the fake Z.ai."""
    with contextlib.ExitStack() as closing:
        yield lambda *args, **more: closing.enter_context(contextlib.closing(Timed(zai, *args, **more)))

@pytest.fixture
def timed(make_timed):
    return make_timed()


def error_of(code, **more):
    return zai_error(complaint(code), 429, **more)


REFUSED = error_of("1302")


# Rows: the client keys of those who queue, and who of them go in which order.
@pytest.mark.parametrize("keys,order", (("aaaaaa", [0, 1, 2, 3, 4, 5]), ("aaabb", [0, 3, 1, 4, 2])))
def test_client_keys_take_turns_and_first_come_is_first_served(make_timed, keys, order):
    timed = make_timed(limit=1)
    first = timed.enter()
    tickets = [timed.queue(key) for key in keys]
    assert (timed.serve_all(first), timed.gates.state()[1]) == ([tickets[i] for i in order], {})


def test_models_have_queues_of_their_own(make_timed):
    timed = make_timed(limit=1)
    first = timed.enter(model="glm-4.6")
    behind = timed.queue()
    assert timed.enter(model="glm-4.5").gate
    assert timed.serve_all(first) == [behind]


@pytest.mark.parametrize("limit", (1, 5))
def test_max_concurrency_is_a_fixed_ceiling(make_timed, limit):
    timed = make_timed(limit=limit)
    tickets = [timed.enter() for _ in range(limit)]
    began = timed.clock.now
    with pytest.raises(ApiError) as caught:
        timed.enter()
    assert timed.clock.now - began == 120, "nothing is probed above it"
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.headers() == {"Retry-After": "5", "x-should-retry": "false"}
    timed.clock.at(timed.clock.now + 7, lambda: timed.gates.leave(tickets[0]))
    assert timed.seconds_to_enter() == 7


# Rows: code, how many others are in flight, the ceiling then, seconds until it goes again.
@pytest.mark.parametrize("code,others,ceiling,seconds", [
    ("1302", 1, 1, 60),  # one is in flight, one is allowed: until the probing
    ("1302", 0, None, 0.5),  # it was alone, so that it was not for too many
    ("1303", 1, None, 0.5), ("1305", 1, 1, 60), ("1305", 2, 2, 60), ("1305", 0, None, 1), ("1312", 1, None, 1),
    ("1312", 0, None, 1),
])
def test_what_a_refusal_teaches(timed, code, others, ceiling, seconds):
    for _ in range(others):
        timed.enter()
    refused = timed.enter()
    timed.gates.leave(refused, error_of(code))
    assert (timed.ceilings(), timed.seconds_to_enter(refused)) == ([ceiling], seconds)


# Rows: MAX_CONCURRENCY, how many are in flight, how many of them are refused, the ceiling then and after each further
# minute in which all of it is used.
@pytest.mark.parametrize("limit,in_flight,refused,ceilings", [
    (0, 3, 1, [2, 3, 4, 5]), (0, 12, 11, [1, 6, 9, 10, 11, 12, 13]),
    (0, 30, 30, [15, 22, 26, 28, 29, 30, 31]),  # all of them: a glitch
    (3, 3, 2, [1, 2, 3, 3]),
])
def test_a_ceiling_is_lowered_at_once_and_raised_by_the_minute(make_timed, limit, in_flight, refused, ceilings):
    timed = make_timed(limit=limit)
    tickets = [timed.enter() for _ in range(in_flight)]
    for _ in range(refused):
        timed.gates.leave(tickets.pop(), REFUSED)
    began = timed.clock.now
    for minutes, ceiling in enumerate(ceilings):
        timed.clock.now = began + 60 * minutes
        with contextlib.suppress(ApiError):
            while True:
                timed.gates.queue_timeout_s = 1
                tickets.append(timed.enter())
        assert (timed.ceilings(), len(tickets)) == ([ceiling], ceiling)


def test_a_ceiling_is_halved_again_until_something_is_served(timed):
    tickets = [timed.enter() for _ in range(30)]
    for ceiling in (15, 7, 3, 1, 1):
        for ticket in tickets:
            timed.gates.leave(ticket, REFUSED)
        assert timed.ceilings() == [ceiling]
        tickets = [timed.enter(ticket) for ticket in tickets[:ceiling]]


def test_looking_for_room_changes_nothing(timed):
    """The metrics, the queue and other models may look as often as they like."""
    gate = timed.enter().gate
    timed.gates.leave(timed.enter(), REFUSED)
    timed.clock.now += 1000
    assert [gate.room(timed.clock.now) for _ in range(2)] == [0, 0]
    for _ in range(2):
        gate.probe(timed.clock.now)
    assert gate.room(timed.clock.now) == 1


@pytest.mark.parametrize("slot_frees_after,goes_after", ((0.25, 0.5), (0.5, 0.5), (5, 5)))
def test_a_refused_request_goes_when_a_slot_frees_but_not_before_its_backoff(timed, slot_frees_after, goes_after):
    other = timed.enter()
    refused = timed.enter()
    timed.gates.leave(refused, REFUSED)
    timed.clock.at(timed.clock.now + slot_frees_after, lambda: timed.gates.leave(other, served=True))
    assert timed.seconds_to_enter(refused) == goes_after


def test_a_refused_request_goes_back_to_the_head_of_the_queue(make_timed):
    timed = make_timed(limit=1)
    refused = timed.enter()
    behind = [timed.queue(), timed.queue()]
    timed.gates.leave(refused, REFUSED)
    assert timed.queued() == 2, "nobody overtakes while the gate is closed"
    assert timed.seconds_to_enter(refused) == 0.5
    assert timed.serve_all(refused) == behind


def test_the_next_in_the_queue_goes_on_when_the_head_leaves_it(timed):
    timed.gates.leave(timed.enter(), error_of("1302", retry_after=30.0))
    head = timed.queue()
    behind = timed.queue()
    head.client.leave()
    assert eventually(lambda: timed.queued() == 1)
    timed.clock.now += 30
    timed.gates.tick(timed.clock.now)
    assert eventually(lambda: timed.admitted == [behind])


def test_one_who_has_left_keeps_no_slot(make_timed):
    timed = make_timed(limit=1)
    left = timed.ticket(clock=timed.clock)
    left.client.gone = True
    with pytest.raises(ztoapi.ClientGone):
        timed.enter(left)
    assert timed.seconds_to_enter() == 0


def test_gates_of_models_that_taught_nothing_are_forgotten(timed):
    for i in range(100):
        timed.gates.leave(timed.enter(model=f"model-{i}"), served=True)
    assert (timed.gates.state(), timed.gates.queue) == (([], {}), [])


def test_names_that_clients_make_up_fill_no_gates(zai, monkeypatch):
    assert ztoapi.Gates.MOST_GATES == 100
    monkeypatch.setattr(ztoapi.Gates, "MOST_GATES", 10)
    with proxying(zai, QUEUE_TIMEOUT="0", MAX_RETRIES="0") as proxy:
        for code in ("1113", "1302"):
            zai.default = refusal(429, code)
            for i in range(12):
                proxy.chat(model=f"model-{code}-{i}")
        assert len(proxy.server.upstream.gates.gates) <= 10


# How Z.ai refuses -> what too many requests get.
@cases("refused", {
    "1302": refusal(429, "1302"), "1305": refusal(429, "1305"), "1302 as first event": stream(sse(LIMITED), DONE),
})
def test_a_burst_of_10_against_a_limit_of_3_succeeds_and_teaches(zai, soon_again, proxy, refused):
    running = threading.BoundedSemaphore(3)
    all_are_there = threading.Event()

    def until_the_others_queue(*_):
        assert eventually(lambda: all_are_there.is_set() or proxy.queued() == 7)
        all_are_there.set()

    def limited(request):
        if not running.acquire(blocking=False):
            return refused
        return stream(say("a"), until_the_others_queue, lambda *_: running.release(), say("b"), FINISH, DONE)
    zai.default = limited
    results = together(*[lambda i=i: ask(proxy, i % 3) for i in range(10)])
    assert results == [(200, "ab", None, True)] * 10
    (_, _, ceiling), = proxy.gates()
    assert ceiling in (1, 2, 3)


def test_max_concurrency_bounds_what_is_in_flight_at_zai(zai):
    counts = []
    three = threading.Barrier(3)

    def begin(*_):
        counts.append(1)
        three.wait(LONG_S)

    def end(*_):
        counts.append(-1)
    zai.default = stream(begin, say("a"), end, FINISH, DONE)
    with strict_proxy(zai, MAX_CONCURRENCY="3") as proxy:
        results = together(*[lambda i=i: ask(proxy, i % 2) for i in range(12)])
        assert [whole for *_, whole in results] == [True] * 12
        assert max(itertools.accumulate(counts)) == 3


def test_queue_timeout_is_a_429_that_sdks_do_not_repeat(zai, go):
    with strict_proxy(zai, MAX_CONCURRENCY="1", QUEUE_TIMEOUT="0.1") as proxy, proxy.open_stream() as occupant:
        assert eventually(lambda: zai.in_flight == 1)
        status, headers, body = proxy.chat()
        told = (status, body["error"]["code"], headers["x-should-retry"])
        assert told == (429, "rate_limit_exceeded", "false")
        assert int(headers["Retry-After"]) >= 1
        assert int(headers["x-ztoapi-queue-ms"]) >= 100
        go.set()
        assert read_stream(occupant)[3]
        assert len(zai.requests) == 1


@both
def test_queue_ms_tells_how_long_a_request_waited(zai, go, streamed):
    with strict_proxy(zai, MAX_CONCURRENCY="1") as proxy:
        clock = proxy.server.upstream.gates.clock = FakeClock()
        with proxy.open_stream() as occupant:
            assert eventually(lambda: zai.in_flight == 1)
            with connect(proxy, raw_chat(chat_body(stream=streamed))) as sock:
                assert eventually(lambda: proxy.queued() == 1)
                clock.now += 7
                go.set()
                assert read_stream(sock)[1]["x-ztoapi-queue-ms"] == "7000"
            assert "x-ztoapi-queue-ms" not in read_stream(occupant)[1]


# Bodies

def test_a_client_key_holds_no_more_than_it_leaves_free():
    bodies = ztoapi.Bodies(120)
    first, second, other, third = [FakeClient(key=key) for key in ("a", "a", "b", "c")]

    def fill(client):
        """How many bytes more find room; one was too many."""
        for size in itertools.count():
            try:
                bodies.add(client, b"x")
            except ApiError as error:
                assert (error.status, error.code, error.retry_after) == (503, "overloaded", 5)
                bodies.held[client].pop()
                return size
    bodies.add(first, b"x" * 40)
    assert (fill(second), fill(first), fill(other)) == (20, 0, 30)
    assert fill(third) == 15, "there is room for whoever comes next"
    bodies.drop(first)
    bodies.drop(first)
    assert fill(second) == 17


def large_chat(size, **fields):
    return chat_body(messages=[user("x" * size)], **fields)


def test_bodies_count_from_their_first_byte_until_zai_begins_to_answer(zai, go):
    """In the queue, too. Beyond the bound there is a 503, and no other key is held up."""
    with strict_proxy(zai, MAX_CONCURRENCY="1", DEFAULT_KEY=f"{KEY},sk-other") as proxy:
        bodies = proxy.server.upstream.bodies
        bodies.total_bytes = 1 << 20
        with proxy.open_stream() as occupant, contextlib.ExitStack() as closing:
            assert eventually(lambda: readable(occupant))
            assert not bodies.held, "its answer has begun"
            half = raw_chat(large_chat(200000))[:100000]
            queued = [closing.enter_context(connect(proxy, raw_chat(large_chat(200000)))) for _ in range(2)]
            queued.append(closing.enter_context(connect(proxy, half)))
            assert eventually(lambda: sum(map(len, list(bodies.held.values()))) > 480000)
            status, headers, body = proxy.call("POST", CHAT, large_chat(200000))
            assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "overloaded", "5")
            zai.scripts.append(stream(*HEALTHY))
            assert proxy.call("POST", CHAT, large_chat(200000, model="glm-4.5", stream=False), key="sk-other")[0] == 200
            queued.pop().close()
            go.set()
            assert [read_stream(sock)[3] for sock in [occupant, *queued]] == [True] * 3
        proxy.idle()
        assert bodies.held == {}


def test_a_body_whose_bytes_do_not_come_holds_up_nobody(shared):
    with contextlib.ExitStack() as closing:
        for _ in range(8):
            closing.enter_context(connect(shared, raw_chunks(b"1\r\n{\r\n")))
        for _ in range(2):
            assert statuses(shared, raw_chat(JSON_CHAT.ljust(1 << 20))) == [200, 200]
            assert statuses(shared, raw_chunks(chunked(JSON_CHAT.ljust(1 << 19)), END)) == [200, 200]


def test_large_requests_are_read_one_at_a_time_and_who_leaves_is_noticed(zai, brisk, caplog):
    with strict_proxy(zai) as proxy:
        another = ztoapi.Ticket("", FakeClient())
        proxy.server.upstream.turns.enter(another)
        with leaving(proxy, caplog, raw_chat(large_chat(2 << 20))):
            assert eventually(lambda: proxy.server.pump.clients)
        assert not zai.requests
        proxy.server.upstream.turns.leave(another)
        assert proxy.call("POST", CHAT, large_chat(2 << 20, stream=False))[0] == 200


# Several keys

@pytest.mark.parametrize("limit", (0, 2))
def test_the_key_with_the_most_room_serves(make_timed, limit):
    timed = make_timed(keys=2, limit=limit)
    tickets = [timed.enter() for _ in range(4)]
    assert [gate.in_flight for gate in timed.gates.gates.values()] == [2, 2]
    freed = tickets[1].gate
    timed.gates.leave(tickets[1], served=True)
    assert timed.enter().gate is freed


def test_a_key_that_learned_a_low_ceiling_gets_less(make_timed):
    timed = make_timed(keys=2)
    refused, *_ = [timed.enter() for _ in range(4)]
    timed.gates.leave(refused, REFUSED)
    timed.clock.now += 1
    positions = [timed.enter().gate.key.position for _ in range(3)]
    assert positions == [2, 2, 2]


# Rows: codes, their HTTP status, after how many seconds Z.ai says that the limit ends, for how many the key rests, and
# whether it rests as a whole or only for that model.
@pytest.mark.parametrize("code,status,ends_after,rest_s,whole_key", [(code, *rest) for codes, *rest in (
    ("401 1000 1001 1002 1003 1004 1005 1315", 401, None, 600, True),
    ("1110 1111 1112 1304 1308 1309 1310", 429, None, 600, True), ("1113 1311", 429, None, 600, False),
    ("1308 1310", 429, 5000, 5000, True), ("1310", 429, 3 * 86400, 6 * 3600, True),  # somebody may recharge before
) for code in codes.split()])
def test_a_refused_key_rests_and_the_next_one_serves(zai, make_timed, code, status, ends_after, rest_s, whole_key):
    timed = make_timed(keys=2)
    first, second = ZAI_KEYS[:2]
    words = timed.reset_words(ends_after) if ends_after else "no"
    timed.answers.append(refusal(status, code, words))
    text, error, record = timed.ask()
    assert (text, error, record.retries, timed.gaps()) == ("Hello", None, 1, [0])
    assert [timed.ask(model)[0] for model in ("glm-4.6", "glm-4.5")] == ["Hello"] * 2
    assert keys_at(zai) == [first, second, second, second if whole_key else first]
    for seconds in (rest_s - 1, 2):
        timed.clock.now += seconds
        assert timed.ask()[0] == "Hello"
    assert keys_at(zai)[4:] == [second, first]


@pytest.mark.parametrize("code", ("401", "1113", "1304", "1311"))
def test_a_lone_key_is_asked_again_all_the_same(timed, code):
    timed.answers.append(refusal(429, code))
    assert timed.ask()[1].zai_code == code
    assert timed.ask()[0] == "Hello"


def test_with_all_keys_resting_the_one_whose_turn_comes_first_is_tried(zai, make_timed):
    timed = make_timed(keys=3)
    for seconds in (7000, 5000, 6000):
        timed.answers.append(refusal(429, "1308", timed.reset_words(seconds)))
    _, error, record = timed.ask()
    assert (error.status, error.code, record.retries) == (402, "insufficient_quota", 2)
    assert error.headers() == {"Retry-After": "6000", "x-should-retry": "false"}
    timed.clock.now += 10
    assert (timed.ask()[0], keys_at(zai)) == ("Hello", [*ZAI_KEYS, ZAI_KEYS[1]])


def test_an_answer_ends_the_rest_of_the_key_that_was_tried_all_the_same(make_timed):
    timed = make_timed(keys=2)
    timed.gates.leave(timed.enter(), UpstreamError("exhausted", KEY_RESTS, retry_after=5000.0))
    ticket = timed.enter()
    timed.gates.leave(ticket, error_of("401"))
    timed.enter(ticket)
    assert ticket.gate.key.position == 1, "it has been refused with the other"
    timed.gates.leave(ticket, served=True)
    assert timed.enter().gate.key.position == 1


def test_a_key_goes_on_resting_though_an_earlier_answer_with_it_ends_well(make_timed):
    timed = make_timed(keys=2)
    running, second, refused = [timed.enter() for _ in range(3)]
    assert running.gate is refused.gate
    timed.gates.leave(refused, error_of("1308"))
    timed.gates.leave(running, served=True)
    timed.gates.leave(second, served=True)
    assert timed.enter().gate.key.position == 2


def test_the_head_of_the_queue_goes_when_a_key_comes_back(make_timed):
    timed = make_timed(keys=2, limit=1)
    busy = timed.enter()
    timed.gates.leave(timed.enter(), UpstreamError("exhausted", KEY_RESTS, retry_after=10.0))
    ticket = timed.ticket(clock=timed.clock)
    assert timed.seconds_to_enter(ticket) == 10
    assert ticket.gate.key is not busy.gate.key


@pytest.mark.parametrize("code", ("1302", "1303", "1305"))
def test_who_is_to_wait_with_one_key_goes_with_the_other(zai, make_timed, code):
    timed = make_timed(keys=2)
    timed.answers.append(refusal(429, code, "no", "Retry-After: 10"))
    assert (timed.ask()[0], timed.gaps()[0] < 1, keys_at(zai)) == ("Hello", True, list(ZAI_KEYS[:2]))


def test_who_may_use_a_full_key_only_holds_nobody_up(make_timed):
    timed = make_timed(keys=2, limit=1)
    first, second = timed.enter(), timed.enter()
    picky = timed.ticket()
    picky.refused_by.add(second.gate.key)
    timed.gates.queue.append(picky)
    timed.gates.leave(second, served=True)
    assert timed.enter().gate.key is not first.gate.key
    timed.gates.leave(first, served=True)
    assert picky.gate.key is timed.gates.keys[0]


@both
def test_the_client_sees_nothing_of_a_key_that_fails(zai, streamed):
    zai.scripts.extend([refusal(401, "401"), stream(error_event("1311"))])
    with strict_proxy(zai, ZAI_API_KEY=",".join(ZAI_KEYS), MAX_RETRIES="0") as proxy:
        assert (ask(proxy, streamed), keys_at(zai)) == (WELL, list(ZAI_KEYS))


def test_an_empty_purse_at_every_key_is_told_with_no_second_try(zai):
    zai.default = refusal(429, "1113")
    with strict_proxy(zai, ZAI_API_KEY=",".join(ZAI_KEYS)) as proxy:
        status, headers, body = proxy.chat()
        assert (status, body["error"]["code"]) == (402, "insufficient_quota")
        assert (headers["x-should-retry"], keys_at(zai)) == ("false", list(ZAI_KEYS))


@cases("script_for", {
    "401": lambda key: refusal(401, "401", f"token {key} expired"),
    "halves": lambda key: refusal(500, "1234", "{} and {}".format(*key.split("."))),
    "400": lambda key: refusal(400, "1210", f"key {key}"),
    "first event": lambda key: stream(error_event("1234", f"Bearer {key}")),
    "later event": lambda key: stream(say("a"), error_event("1234", f"Bearer {key}")),
    "log id": lambda key: [OK + f"X-Log-Id: {key}\r\n\r\n".encode(), CLOSE],
    "head": lambda key: [b"HTTP/1.1 %b\r\n\r\n" % key.encode(), CLOSE],
})
@both
def test_no_key_is_seen_in_answers_or_logs(zai, caplog, script_for, streamed):
    caplog.set_level(logging.DEBUG, "ztoapi")
    zai.default = lambda request: script_for(request["headers"]["Authorization"].split()[1])
    with strict_proxy(zai, ZAI_API_KEY=",".join(ZAI_KEYS[:2]), DEBUG_MODE="true") as proxy:
        seen = talk(proxy, raw_chat(chat_body(stream=streamed), "Connection: close")).decode()
        proxy.idle()
    assert "error" in seen
    assert "key #1" in caplog.text
    parts = [part for key in ZAI_KEYS[:2] for part in key.split(".")]
    assert [part for part in parts if part in seen + caplog.text] == []


# Pump #################################################################################

def test_two_hundred_streams_at_once_are_relayed_whole(zai, proxy):
    def script(request):
        word = request["body"]["messages"][0]["content"]
        pieces = [step for i in range(10) for step in (say(f"{word}.{i} "), 0.02)]
        return stream(*pieces, FINISH, DONE)
    zai.default = script
    with contextlib.ExitStack() as closing:
        socks = [closing.enter_context(proxy.open_stream(messages=[user(f"n{i}")])) for i in range(200)]
        for i, sock in enumerate(socks):
            events = check_whole(*read_stream(sock))
            assert said(events).split() == [f"n{i}.{j}" for j in range(10)]


def test_a_bug_in_a_chore_does_not_end_the_pump(brisk, caplog, proxy):
    def buggy(now):
        proxy.server.pump.chores.remove(buggy)
        raise ZeroDivisionError
    proxy.server.pump.chores.append(buggy)
    assert eventually(lambda: "The pump failed" in caplog.text)
    assert ask(proxy, True) == WELL


# The client's leaving

@contextlib.contextmanager
def leaving(proxy, caplog, request, how="close"):
    """A request whose client leaves, which is noticed within a second, without an error in the log. The pump's ticks
    are counted for that, as a busy machine is slow."""
    caplog.set_level(logging.INFO, "ztoapi")
    caplog.clear()
    sock = connect(proxy, request)
    yield
    if how == "reset":
        make_reset(sock)
    if how == "end of file":
        sock.shutdown(socket.SHUT_WR)
    else:
        sock.close()
    pump = proxy.server.pump
    noticed = []
    pump.chores.append(lambda now: noticed.append(all(client.gone for client in list(pump.clients))))
    proxy.idle()
    # The first tick may have begun before.
    assert all(noticed[1:])
    sock.close()
    assert figures(proxy)[1:] == (0, 1)
    assert " 499 " in caplog.text
    assert max(record.levelno for record in caplog.records) == logging.INFO


def is_connecting(proxy):
    return any(client.blocked_on for client in list(proxy.server.pump.clients))


PAUSE = "Retry-After: 60"
# A phase -> what Z.ai does, how many requests are in flight and connections to Z.ai open in it.
PHASES = {
    "before the head": ([LONG_S], 1), "before the first token": ([HEAD, LONG_S], 1),
    "behind the first token": (stream(say("Hel"), LONG_S), 1),
    "in a backoff": (answer(500, NETWORK, PAUSE), 0), "refused, in the queue": (answer(429, LIMITED, PAUSE), 0),
}


@pytest.mark.parametrize("phase", PHASES)
@both
def test_the_clients_leaving_is_noticed(zai, brisk, caplog, proxy, phase, streamed):
    zai.default, open_ones = PHASES[phase]
    with leaving(proxy, caplog, raw_chat(chat_body(stream=streamed))):
        assert eventually(lambda: len(zai.requests) == 1 and zai.in_flight == slots(proxy) == open_ones)
    assert eventually(lambda: zai.cut_by_client == open_ones)
    assert len(zai.requests) == 1


@table("request_bytes,how", [
    (raw_chat(chat_body(stream=True)), "reset"), (raw_chat(JSON_CHAT), "end of file"),
    *((api_request(api, streamed), "close") for api in APIS for streamed in (True, False)),
])
def test_every_way_of_leaving_is_noticed(zai, brisk, caplog, proxy, request_bytes, how):
    zai.default = stream(say("Hel"), LONG_S)
    with leaving(proxy, caplog, request_bytes, how):
        assert eventually(lambda: zai.in_flight == 1)
    assert eventually(lambda: zai.cut_by_client == 1)


@both
def test_the_clients_leaving_the_queue_is_noticed(zai, brisk, caplog, streamed):
    zai.default = stream(say("Hel"), LONG_S)
    with strict_proxy(zai, MAX_CONCURRENCY="1") as proxy, proxy.open_stream() as occupant:
        assert eventually(lambda: zai.in_flight == 1)
        with connect(proxy, raw_chat(chat_body(stream=streamed))):
            assert eventually(lambda: proxy.queued() == 1)
        assert eventually(lambda: proxy.queued() == 0)
        occupant.close()
        assert (figures(proxy), len(zai.requests)) == ((0, 0, 2), 1)
        assert [record for record in caplog.records if record.levelno > logging.INFO] == []


def test_a_slot_never_goes_to_one_who_has_left(zai):
    """Not even when a write that fails frees it, before the pump looks."""
    zai.default = stream(*[say("Hel"), 0.01] * 5000)
    with strict_proxy(zai, MAX_CONCURRENCY="1") as proxy:
        socks = [proxy.open_stream()]
        assert eventually(lambda: zai.in_flight == 1)
        socks += [proxy.open_stream() for _ in range(5)]
        assert eventually(lambda: proxy.queued() == 5)
        for sock in reversed(socks):
            sock.close()
        proxy.idle()
        assert len(zai.requests) == 1


@both
def test_the_clients_leaving_while_connecting_is_noticed(brisk, caplog, streamed):
    with stuck_listener() as port, strict_proxy(ZAI_BASE_URL=f"http://127.0.0.1:{port}") as proxy:
        with leaving(proxy, caplog, raw_chat(chat_body(stream=streamed))):
            assert eventually(lambda: is_connecting(proxy))


@pytest.mark.parametrize("kind", ("https", "tunnel"))
def test_the_clients_leaving_in_a_handshake_is_noticed(brisk, caplog, monkeypatch, kind):
    with MuteListener() as mute:
        url = f"https://127.0.0.1:{mute.port}/api"
        if kind == "tunnel":
            through(monkeypatch, "https", f"http://127.0.0.1:{mute.port}")
            url = "https://api.z.ai/api"
        with strict_proxy(ZAI_BASE_URL=url) as proxy:
            with leaving(proxy, caplog, raw_chat(chat_body(stream=True))):
                assert mute.heard.wait(LONG_S)
            assert mute.ended.wait(LONG_S)


@pytest.mark.skipif(not hasattr(select, "POLLRDHUP"), reason="bytes that were sent ahead hide the end")
def test_the_leaving_of_a_client_that_had_sent_more_is_noticed(zai, brisk, proxy):
    zai.default = stream(say("Hel"), LONG_S)
    with connect(proxy, raw_chat(chat_body(stream=True))) as sock:
        assert eventually(lambda: zai.in_flight == 1)
        sock.sendall(raw_chat(chat_body(stream=True)))  # pipelined
    assert eventually(lambda: zai.cut_by_client == 1)


@pytest.mark.parametrize("rdhup", (True, False))
def test_a_socket_has_ended_once_its_other_side_is_closed(monkeypatch, rdhup):
    if not rdhup:
        monkeypatch.delattr(select, "POLLRDHUP", raising=False)
    ours, theirs = socket.socketpair()
    gone, left = socket.socketpair()
    left.close()
    with ours, theirs, gone:
        for sock in (ours, gone):
            sock.setblocking(False)
        assert ztoapi.ended([ours, gone]) == [gone]


# Heartbeats

# Rows: of how many steps of an answer's a heartbeat comes behind, what the client has got by then.
@cases("count,pattern", {
    "nothing": (0, rb'^HTTP/1.1 200.*"delta":\{\}'), "the head": (1, rb'^HTTP/1.1 200.*"delta":\{\}'),
    "text": (4, rb'"Hel".*"delta":\{\}'),
})
def test_a_heartbeat_is_a_valid_empty_chunk_and_the_opening_one_comes_first(zai, brisk, count, pattern):
    go = threading.Event()
    steps = stream(*HEALTHY)
    zai.default = [*steps[:count], go, *steps[count:]]
    with strict_proxy(zai, HEARTBEAT="0.04") as proxy, proxy.open_stream() as sock:
        see(sock, pattern)
        go.set()
        events = check_whole(*read_stream(sock))
        assert said(events) == "Hello"
        deltas = [choice["delta"] for choice in choices_of(events)]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert ["role" in delta for delta in deltas].count(True) == 1
        assert any(map(is_beat, events))
        for name in ("id", "created", "model", "object"):
            assert len({event[name] for event in events[:-1]}) == 1


@pytest.mark.parametrize("heartbeat, streamed", (("10", True), ("0", True), ("0.03", False)))
def test_before_its_time_or_at_0_or_in_json_no_heartbeat_comes(zai, brisk, heartbeat, streamed):
    """So that a refusal keeps its status."""
    zai.scripts.append([0.1, *refusal(400, "1210")])
    zai.default = [0.1, *stream(*HEALTHY)]
    with strict_proxy(zai, HEARTBEAT=heartbeat) as proxy:
        assert (ask(proxy, streamed)[0], ask(proxy, streamed)) == (400, WELL)
        assert not streamed or not any(map(is_beat, proxy.stream()[2]))


@cases("script", {
    "the end mark": stream(say("Hello"), FINISH, 0.2, DONE),
    "the end of the body": stream(say("Hello"), FINISH, DONE, 0.2),
    "the finish": stream(say("Hello"), 0.2, FINISH, DONE),
    "the usage": stream(say("Hello"), event(finish="stop"), 0.2, FINISH, DONE),
    "nothing, after a large write": [b"".join(stream(*[say("Hello" * (1 << 16))] * 16, FINISH, DONE))],
})
def test_a_heartbeat_never_follows_the_end_of_an_answer(zai, brisk, script):
    zai.default = script
    with strict_proxy(zai, HEARTBEAT="0.05") as proxy, proxy.open_stream() as sock:
        time.sleep(0.15)  # the large write stands still meanwhile
        assert said(check_whole(*read_stream(sock))).replace("Hello", "") == ""
        sock.settimeout(0.15)
        with pytest.raises(socket.timeout):
            sock.recv(1)


def test_a_heartbeat_that_fails_ends_one_answer_and_no_other(go, zai, monkeypatch, log_lines):
    monkeypatch.setattr(ztoapi.Messages, "heartbeat", boom)
    with proxying(zai, HEARTBEAT="0.05") as proxy:
        with connect(proxy, api_request("messages", True)) as sock, proxy.open_stream() as other:
            assert b"message_stop" not in read_to_end(sock)
            go.set()
            assert said(read_stream(other)[2]) == "Hello"
    assert len(log_lines(logging.ERROR)) == 1


def test_retrying_goes_on_after_a_heartbeat(zai, brisk):
    zai.scripts.extend([[0.3, *refusal(500, "1234")], [HEAD, 0.3, CLOSE]])
    with strict_proxy(zai, HEARTBEAT="0.03") as proxy:
        events = check_whole(*proxy.stream())
        assert (said(events), len(zai.requests)) == ("Hello", 3)
        assert ["role" in choice["delta"] for choice in choices_of(events)].count(True) == 1


def test_queueing_goes_on_after_a_heartbeat(zai, brisk):
    go = threading.Event()
    zai.default = stream(go, *HEALTHY)
    with strict_proxy(zai, HEARTBEAT="0.03", MAX_CONCURRENCY="1") as proxy, proxy.open_stream() as first:
        assert eventually(lambda: zai.in_flight == 1)
        with proxy.open_stream() as second:
            see(second, b"HTTP/1.1 200")
            assert proxy.queued() == 1
            go.set()
            for stream_read in together(lambda: read_stream(first), lambda: read_stream(second)):
                assert said(check_whole(*stream_read)) == "Hello"


@cases("script,code", {
    "400": (refusal(400, "1210"), "invalid_value"), "429": (refusal(429, "1113"), "insufficient_quota"),
    "reset": ([RESET], "upstream_error"), "event": (stream(sse(NETWORK)), "upstream_error"),
})
def test_a_failure_after_a_heartbeat_is_the_in_stream_error(zai, brisk, script, code):
    go = threading.Event()
    zai.default = [go, *script]
    with strict_proxy(zai, HEARTBEAT="0.03", MAX_RETRIES="0") as proxy, proxy.open_stream() as sock:
        see(sock, b"HTTP/1.1 200")
        go.set()
        events = check_failed(*read_stream(sock))
        assert (events[0]["choices"][0]["delta"]["role"], events[-1]["error"]["code"]) == ("assistant", code)


def test_queue_timeout_after_a_heartbeat_is_the_in_stream_error(zai, brisk):
    zai.default = stream(say("Hel"), LONG_S)
    with strict_proxy(zai, HEARTBEAT="0.03", MAX_CONCURRENCY="1", QUEUE_TIMEOUT="60") as proxy:
        clock = proxy.server.upstream.gates.clock = FakeClock()
        with proxy.open_stream():
            assert eventually(lambda: zai.in_flight == 1)
            with proxy.open_stream() as sock:
                see(sock, b"HTTP/1.1 200")
                clock.now += 61
                for client in list(proxy.server.pump.clients):
                    client.wake()
                assert check_failed(*read_stream(sock))[-1]["error"]["code"] == "rate_limit_exceeded"


def test_who_takes_a_client_back_from_the_pump_finds_no_heartbeat_under_way(monkeypatch):
    """An error must see whether a stream has begun; else it would answer a second time."""
    monkeypatch.setattr(ztoapi, "TICK_S", 0.01)
    beating = threading.Event()

    def slow_head():
        beating.set()
        time.sleep(0.1)
        return b"HEAD"
    pump = ztoapi.Pump(Settings(heartbeat=0.01))
    pump.start()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outbox = ztoapi.Outbox(ours, slow_head, ztoapi.Chat("chatcmpl-1", 1, "glm-4.6"))
        with pump.minding(FakeClient(connection=ours, outbox=outbox)):
            assert beating.wait(LONG_S)
        assert outbox.started
        theirs.setblocking(False)
        assert theirs.recv(4) == b"HEAD"
    pump.close()


class FakeSocket:
    """A client's socket that takes so many bytes at a time."""

    room, taken = 0, b""

    def send(self, data):
        if not self.room:
            raise BlockingIOError
        self.taken += bytes(data[:self.room])
        return min(self.room, len(data))


@pytest.fixture
def fake_stream(monkeypatch):
    """A FakeClient with a stream, whose socket takes nothing at first."""
    clock = FakeClock()
    monkeypatch.setattr(ztoapi, "time", types.SimpleNamespace(monotonic=clock))
    sock = FakeSocket()
    outbox = ztoapi.Outbox(sock, bytes, ztoapi.Chat("chatcmpl-1", 1, "glm-4.6"))
    return FakeClient(clock, connection=sock, outbox=outbox)


def test_a_heartbeat_comes_behind_nothing_that_waits_and_not_behind_the_end(fake_stream):
    outbox, clock = fake_stream.outbox, fake_stream.clock

    def beats(room, seconds):
        fake_stream.connection.room = room
        for _ in range(3):
            clock.now += seconds
            outbox.look(clock.now, Settings(heartbeat=10))
        return fake_stream.connection.taken.count(b'"delta":{}')
    assert beats(0, 11) == 0
    assert beats(1 << 16, 4) == 0, "what waited is out"
    assert beats(1 << 16, 11) == 3
    outbox.put("the end", last=True)
    assert beats(1 << 16, 11) == 3
    assert fake_stream.connection.taken.endswith(b"the end\r\n" + END)


def test_a_client_to_whom_no_heartbeat_can_be_sent_has_left():
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, contextlib.closing(ztoapi.Pump(Settings())) as pump:
        client = FakeClient(connection=ours, outbox=ztoapi.Outbox(ours, bytes, ztoapi.Chat("chatcmpl-1", 1, "glm-4.6")))
        pump._look(client, ztoapi.INFINITY)
    assert client.gone == "the client left"


# Slow readers and large answers

def test_nothing_is_read_from_zai_while_its_client_is_behind(fake_stream):
    fake_stream.outbox.put("text")
    received = []
    connection = types.SimpleNamespace(receive=received.append)
    relay = ztoapi.Relay(connection, new_answer(), fake_stream, None)
    assert not relay.step(1, bytearray(10))
    assert received == []


def count_text(sock, letter):
    """How often `letter`, which is nowhere else, comes in a streamed answer; and whether that ends as it should."""
    count, tail = 0, b""
    while not tail.endswith(b"data: [DONE]\n\n\r\n" + END):
        data = sock.recv(1 << 20)
        if not data:
            return count, False
        count += data.count(letter)
        tail = (tail + data)[-64:]
    return count, True


def rss():
    """Resident bytes of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


class Torrent:
    """A script of `count` equal events of `size` letters; `sent` counts them."""

    def __init__(self, count, size):
        self.sent = 0
        self.script = [HEAD, *[chunked(say("Q" * size)), self.count] * count, chunked(FINISH), END]

    def count(self, fake, request):
        self.sent += 1

    def stand_still(self, proxy):
        """Wait until it is held up, as the client is behind; how much was sent by then."""
        sent = None
        while sent != self.sent or not any(client.outbox.unsent for client in list(proxy.server.pump.clients)):
            sent = self.sent
            time.sleep(0.15)
        return sent


def test_a_slow_reader_slows_zai_down_and_costs_no_memory(zai, proxy):
    torrent = Torrent(600, 1 << 16)
    zai.default = torrent.script
    with proxy.open_stream() as sock:
        before = rss()
        assert torrent.stand_still(proxy) < 500
        assert rss() - before < 16 << 20
        assert count_text(sock, b"Q") == (600 << 16, True)


def test_a_client_that_is_behind_is_no_silence_of_zai(zai, brisk, proxy):
    torrent = Torrent(300, 1 << 16)
    zai.default = torrent.script
    with proxy.open_stream() as sock:
        torrent.stand_still(proxy)
        proxy.tune(upstream_timeout=0.1)
        time.sleep(0.4)
        proxy.tune()
        assert count_text(sock, b"Q") == (300 << 16, True)


def test_an_error_that_comes_while_the_client_is_behind_comes_last_and_whole(zai, brisk, proxy):
    zai.default = [HEAD, chunked(say("Q" * (1 << 20))) * 4 + chunked(sse(NETWORK)), CLOSE]
    with proxy.open_stream() as sock:
        time.sleep(0.2)
        _, _, events, clean = read_stream(sock)
        assert len(said(events)) == 4 << 20
        assert "Network error" in events[-1]["error"]["message"]
        assert not clean


def test_a_slow_reader_does_not_hold_up_the_others(zai, proxy):
    zai.scripts.append(Torrent(600, 1 << 16).script)
    with proxy.open_stream():
        assert eventually(lambda: any(relay.is_behind for relay in list(proxy.server.pump.relays)))
        assert ask(proxy, True) == WELL


def test_a_client_that_takes_no_write_within_client_timeout_is_dropped(zai, brisk, proxy, log_lines):
    zai.default = Torrent(1000, 1 << 16).script
    proxy.tune(client_timeout=0.2)
    with proxy.open_stream():
        assert eventually(lambda: zai.cut_by_client == 1)
        proxy.idle()
    assert figures(proxy) == (0, 0, 1)
    assert "error='the client took nothing for CLIENT_TIMEOUT (0.2 s)'" in log_lines()[-1]


# Rows: how many bytes the client takes each 50 seconds, after how many seconds it is dropped (None: it is not).
@pytest.mark.parametrize("room, dropped_after", [(0, 100), (1, 650), (1000, None)])
def test_client_timeout_is_between_two_writes_with_a_bound_for_all(fake_stream, room, dropped_after):
    clock = fake_stream.clock
    fake_stream.outbox.put("x" * 5000)
    fake_stream.connection.room = room
    dropped = None
    try:
        while fake_stream.outbox.unsent:
            clock.now += 50
            fake_stream.outbox.look(clock.now, Settings(client_timeout=60))
    except ztoapi.ClientGone as gone:
        assert "CLIENT_TIMEOUT (60 s)" in str(gone)
        dropped = clock.now - 1024
    assert dropped == dropped_after


def test_who_reads_a_json_answer_slowly_but_steadily_gets_all(zai, leap):
    zai.default = stream(*[say("Q" * MIB)] * 3, FINISH, DONE)
    with strict_proxy(zai, CLIENT_TIMEOUT="60") as proxy, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.connect(("127.0.0.1", proxy.port))
        sock.sendall(raw_chat(JSON_CHAT, LAST))
        count = 0
        for data in iter(lambda: sock.recv(1 << 17), b""):
            count += data.count(b"Q")
            leap(590 * len(data) / (4 * MIB))
        assert count == 3 * MIB


def litter_of(proxy, make_request):
    """The kinds of things of one request that are still there after it, with the garbage collector off."""
    def left():
        return {id(thing): type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, PER_REQUEST)}
    gc.collect()
    before = left()
    gc.disable()
    try:
        make_request()
        proxy.idle()
        eventually(lambda: left().keys() <= before.keys())
        return [kind for key, kind in left().items() if key not in before]
    finally:
        gc.enable()


# What is made for one request, and must go with it.
PER_REQUEST = (
    ztoapi.Handler, ztoapi.Client, ztoapi.Outbox, ztoapi.Relay, ztoapi.Connection, ztoapi.Answer, ztoapi.Reply,
    ztoapi.SSEDecoder, ztoapi.Translator, ztoapi.Job, ztoapi.Ticket, ztoapi.Fold, ztoapi.Chat, urllib.request.Request)

# Rows: what happens -> what Z.ai does (None: it is not there), streamed or not.
@cases("script,streamed", {
    "well": (stream(*HEALTHY), True), "well, json": (stream(*HEALTHY), False), "reset": ([RESET], True),
    "first event, json": (stream(sse(NETWORK), DONE), False), "not there": (None, True),
    "HTML 502": (answer(502, b"<html><h1>502 Bad Gateway</h1></html>"), True),
    "cut": ([HEAD, chunked(say("Hel")), CLOSE], True), "silence": ([HEAD, LONG_S], True),
    "a limit that lasts": (answer(429, LIMITED, "Retry-After: 86400"), True),
})
def test_a_request_leaves_nothing_for_the_garbage_collector(zai, brisk, script, streamed):
    """What it leaves, it leaves with its body and its buffers, for as long as the collector likes."""
    zai.default = script
    if script is None:
        zai.close()
    with strict_proxy(zai, MAX_RETRIES="1", UPSTREAM_TIMEOUT="0.1") as proxy:
        assert litter_of(proxy, lambda: ask(proxy, streamed)) == []


@both
def test_a_client_that_leaves_an_answer_leaves_nothing_either(zai, brisk, proxy, streamed):
    zai.default = stream(say("Hel"), LONG_S)

    def make_request():
        with connect(proxy, raw_chat(chat_body(stream=streamed))):
            assert eventually(lambda: zai.in_flight == 1)
    assert litter_of(proxy, make_request) == []


def test_a_client_that_leaves_while_connecting_leaves_nothing_either(brisk):
    def make_request():
        with proxy.open_stream():
            assert eventually(lambda: is_connecting(proxy))
    with stuck_listener() as port, strict_proxy(ZAI_BASE_URL=f"http://127.0.0.1:{port}") as proxy:
        assert litter_of(proxy, make_request) == []


@pytest.mark.parametrize("script", (stream(*HEALTHY), refusal(400, "1210")), ids=("answer", "refusal"))
def test_the_log_id_of_zai_is_in_the_answer_and_in_the_log(zai, caplog, proxy, script):
    caplog.set_level(logging.INFO, "ztoapi")
    zai.default = script
    for get in (proxy.stream, proxy.chat):
        caplog.clear()
        assert get()[1]["x-zai-log-id"] == LOG_ID
        assert eventually(lambda: LOG_ID in caplog.text)


# Upstream #############################################################################
#
# Through real sockets wherever bytes matter, and by the clock wherever time does.

# Faults: each heals if it comes before the first delta, and ends the answer if it comes later

# One of each kind; which answers are faults at all is told by the tables of From Z.ai. Rows: a fault -> what Z.ai does.
EARLY = {
    "reset before the head": [RESET], "closed before the head": [CLOSE], "reset behind the head": [HEAD, 0.02, RESET],
    "closed behind the head": [HEAD, CLOSE], "reset in an event": [HEAD, chunked(say("Hel")[:40]), 0.02, RESET],
    "broken chunk size": [HEAD, b"zz\r\n", CLOSE], "empty 200": stream(),
    "cut behind an empty delta": stream(event({"role": "assistant", "content": ""}), CLOSE, end=False),
    "an error as first event": stream(sse(NETWORK), DONE), "an error as JSON in a 200": answer(200, NETWORK),
    "network_error": stream(event(finish="network_error"), DONE),
    "HTML 502": answer(502, b"<html><h1>502 Bad Gateway</h1></html>"),
    "1120": refusal(429, "1120"), "1234": refusal(500, "1234"),
}

# Rows: a fault -> what Z.ai does behind the first delta.
LATE = {
    "reset": [0.02, RESET], "clean end between chunks": [CLOSE], "clean end of the body without a finish": [END],
    "end mark without a finish": [chunked(DONE), END], "reset in an event": [chunked(say("lo")[:40]), 0.02, RESET],
    "reset in a chunk": [b"ff\r\ndata: {", 0.02, RESET], "broken chunk size": [0.02, b"zz\r\n", CLOSE],
    "an error as an event": [chunked(sse(NETWORK)), chunked(DONE), END],
    "1302 as an event": [chunked(sse(LIMITED)), END], "garbage to the end": [chunked(b"data: oops\n\n"), END],
    "network_error": [chunked(event(finish="network_error")), chunked(DONE), END],
}


@pytest.mark.parametrize("fault", EARLY)
def test_a_fault_before_the_first_delta_is_tried_again_unseen(zai, fault):
    with strict_proxy(zai, MAX_RETRIES="2") as proxy:
        for streamed in (True, False):
            zai.scripts.extend([EARLY[fault], EARLY[fault]])
            assert ask(proxy, streamed) == WELL
            proxy.idle()
            proxy.close_idle()  # a dead pooled connection would be no retry
        assert (len(zai.requests), figures(proxy)) == (6, (4, 0, 0))


@pytest.mark.parametrize("fault", EARLY)
def test_a_fault_that_does_not_heal_is_an_error_after_max_retries(zai, fault):
    zai.default = EARLY[fault]
    with strict_proxy(zai, MAX_RETRIES="1") as proxy:
        for streamed in (True, False):
            status, text, error, _ = ask(proxy, streamed)
            assert (status, text) == (503 if fault == "1120" else 502, "")
            assert error["type"] in ("upstream_error", "server_error")
        assert (len(zai.requests), figures(proxy)) == (4, (2, 2, 0))


# Each fault behind text; behind thinking and behind a call some of them.
LATE_CASES = [("text", fault) for fault in LATE]
LATE_CASES += itertools.product(("thinking", "call"), ("reset", "network_error", "1302 as an event"))
FIRST_DELTAS = {"text": say("Hel"), "thinking": think("Hel"), "call": call()}


@pytest.mark.parametrize("first,fault", LATE_CASES)
def test_nothing_is_tried_again_after_the_first_delta(zai, proxy, first, fault):
    zai.default = [HEAD, chunked(FIRST_DELTAS[first]), *LATE[fault]]
    events = failed_stream(proxy)
    shown = said(events) + said(events, "reasoning_content")
    assert shown == ("" if first == "call" else "Hel")
    assert any("tool_calls" in choice["delta"] for choice in choices_of(events)) == (first == "call")
    status, _, error, _ = ask(proxy, False)
    assert status == (429 if "1302" in fault else 502)
    assert error["message"]
    assert (len(zai.requests), figures(proxy)[0]) == (2, 0)


@pytest.mark.parametrize("fault", ("reset", "clean end of the body without a finish", "network_error"))
@both
def test_hidden_thinking_is_not_paid_for_twice(zai, fault, streamed):
    zai.default = [HEAD, chunked(think("Hm")), *LATE[fault]]
    with strict_proxy(zai, REASONING_FORMAT="hidden") as proxy:
        status, text, error, _ = ask(proxy, streamed)
        assert (text, error["code"], len(zai.requests)) == ("", "upstream_error", 1)


# A frame cut short, with the first frame of a new answer inside.
TORN = b'data: {"id":"2026data: {"id":"2027","created":1,"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'


def test_thinking_that_was_void_is_not_paid_for_twice(zai, proxy):
    """Z.ai starts its answer afresh, which takes the thinking back, and then ends it."""
    zai.default = stream(think("Hm"), TORN, 0.02, CLOSE, end=False)
    failed_stream(proxy)
    assert (ask(proxy, False)[0], len(zai.requests)) == (502, 2)


@both
def test_starting_afresh_before_anything_came_is_no_beginning(zai, proxy, streamed):
    zai.scripts.append(stream(TORN, 0.02, CLOSE, end=False))
    assert ask(proxy, streamed) == WELL
    assert [request["body"]["model"] for request in zai.requests] == ["glm-4.6", "glm-4.6"]


@pytest.mark.parametrize("fault", ("an error as an event", "reset", "network_error"))
def test_who_loses_an_error_over_a_cut_gets_the_closing_chunk_behind_it(zai, proxy, fault):
    zai.default = [HEAD, chunked(say("Hel")), *LATE[fault]]
    for line, closed in (("Origin: https://app.example", True), ("User-Agent: ai/6.0 ai-sdk/openai/3.0", True),
                         ("Sec-Fetch-Mode: cors", True), ("User-Agent: OpenAI/Python 3.57", False)):
        with proxy.open_stream([line]) as sock:
            _, _, events, clean = read_stream(sock)
            assert (list(events[-1]), finish_of(events), clean) == (["error"], [], closed)
            # Behind a clean end the connection serves again.
            if closed:
                sock.sendall(raw_request("GET", "/v1/models"))
                assert next_reply(sock).status == 200


HOPELESS = ("1100 1110 1111 1112 1113 1121 1210 1211 1212 1213 1214 1215 1220 1221 1222 1231 1261 1300 1301 1304 1308"
            " 1309 1310 1311 1313 1314 1321 401 1000 1001 1002 1003 1004 1005 1315").split()


def test_codes_that_cannot_heal_are_never_tried_again(zai, proxy):
    for code in HOPELESS:
        for script in (refusal(429, code), stream(error_event(code))):
            zai.scripts.append(script)
            assert ask(proxy, True)[0] >= 400
    assert (len(zai.requests), figures(proxy)[0]) == (2 * len(HOPELESS), 0)


# What a second try would not heal -> the script, the status, words of the error.
@cases("script, status, words", {
    "a wrong path": (answer(404, b"<html>404</html>"), 502, "ZAI_BASE_URL"),
    "a refusal of plain tools": (refusal(400, "1210", "Bad"), 400, "Bad"),
    "a JSON answer of more than 4 MiB, whatever the count of characters": (
        [HEAD, *[chunked(say("\u4e2d" * (MIB // 3)))] * 5, chunked(FINISH), END], 502, ""),
})
def test_what_would_not_heal_is_never_tried_again(zai, proxy, script, status, words):
    zai.default = script
    found, _, answer = proxy.chat(tools=[TOOL])
    assert (found, words in answer["error"]["message"], len(zai.requests)) == (status, True, 1)


@pytest.mark.parametrize("status", (301, 307))
def test_redirects_are_not_followed(zai, status):
    with FakeZai() as elsewhere, strict_proxy(zai) as proxy:
        zai.default = answer(status, b"", f"Location: {elsewhere.url}/chat/completions")
        assert (ask(proxy, True)[0], len(zai.requests), elsewhere.connections) == (502, 1, 0)


@both
def test_bytes_that_come_one_at_a_time_are_an_answer_like_any_other(zai, unhurried, proxy, streamed):
    whole = b"".join(stream(*HEALTHY))
    zai.default = [whole[i:i + 1] for i in range(len(whole))]
    check_well(proxy, 2, streamed)
    assert zai.connections == 1


@cases("script", {
    "with its connection": [OK + b"Connection: close\r\n\r\n", *HEALTHY, CLOSE],
    "cut behind the finish": stream(say("Hello"), event(finish="stop"), CLOSE),
    "reset behind the finish": stream(say("Hello"), event(finish="stop"), 0.02, RESET),
})
@both
def test_an_answer_may_end_with_its_connection(zai, proxy, script, streamed):
    zai.default = script
    assert (ask(proxy, streamed), len(zai.requests)) == (WELL, 1)


def test_an_answer_that_comes_before_all_was_sent_is_read():
    """A front end that refuses a large body closes without reading it."""
    refusing = b"".join(refusal(413, "1210", "too long for me"))

    def refuse():
        with listener.accept()[0] as sock:
            sock.recv(1024)
            sock.sendall(refusing)
            sock.shutdown(socket.SHUT_WR)
            time.sleep(0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=refuse, daemon=True).start()
        with strict_proxy(ZAI_BASE_URL=f"http://127.0.0.1:{listener.getsockname()[1]}/api") as proxy:
            _, _, error, _ = ask(proxy, True, messages=[user("x" * (8 << 20))])
            assert "too long for me" in error["message"]
            assert figures(proxy)[0] == 0


def test_a_request_that_zai_does_not_take_is_tried_once_more():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/api"
        with strict_proxy(ZAI_BASE_URL=url, UPSTREAM_TIMEOUT="0.1", MAX_RETRIES="5") as proxy:
            status, _, error, _ = ask(proxy, True, messages=[user("x" * (16 << 20))])
            assert (status, "took no data for 0.1 s" in error["message"]) == (502, True)
            assert figures(proxy) == (1, 1, 0)


# Silence, and other times

@cases("script", {
    "before the head": [LONG_S], "behind the head": [HEAD, LONG_S],
    "behind an empty delta": stream(event({"role": "assistant", "content": ""}), LONG_S),
    "behind interim answers": [b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.02] * 5000,
    "a head that drips": [HEAD[:20], *[b"x", 0.02] * 5000],
})
@both
def test_a_silence_is_tried_again_once(zai, brisk, script, streamed):
    zai.default = script
    with strict_proxy(zai, UPSTREAM_TIMEOUT="0.05", MAX_RETRIES="5") as proxy:
        check_502(proxy, "UPSTREAM_TIMEOUT", streamed)
        assert eventually(lambda: zai.cut_by_client == 2)
        assert len(zai.requests) == 2

        def take_time():
            """Chance is asked between the attempts; the second may take as long as it likes."""
            proxy.tune(upstream_timeout=300)
            return 0.0
        proxy.server.upstream.gates.rand = take_time
        zai.scripts.append(script)
        zai.default = stream(*HEALTHY)
        assert ask(proxy, streamed) == WELL


def impatience(proxy, since):
    """A step: from then on UPSTREAM_TIMEOUT is short. `since`: begun or is_ending, what the answer must be first."""
    def step(*_):
        assert eventually(lambda: any(getattr(relay.answer, since) for relay in list(proxy.server.pump.relays)))
        proxy.tune(upstream_timeout=0.1)
    return step


@both
def test_a_silence_behind_the_first_delta_ends_the_answer(zai, brisk, proxy, streamed):
    zai.default = stream(say("Hel"), impatience(proxy, "begun"), LONG_S)
    if streamed:
        assert "UPSTREAM_TIMEOUT" in failed_stream(proxy)[-1]["error"]["message"]
    else:
        assert ask(proxy, False)[0] == 502
    assert eventually(lambda: zai.cut_by_client == 1)
    assert len(zai.requests) == 1


def test_upstream_timeout_is_of_silence_and_never_of_the_whole():
    pieces = [HEAD, *[chunked(say("a"))] * 6]
    connection = types.SimpleNamespace(pending=bool)
    fold = ztoapi.Fold()
    answer_to_come = new_answer()
    relay = ztoapi.Relay(connection, answer_to_come, ztoapi.Client(None), fold.add)
    for i, piece in enumerate(pieces):
        connection.receive = lambda buffer: piece
        assert not relay.step(i * 300, None)
        assert not relay.look(i * 300 + 300, 300)
    assert text_in(fold.items) == "aaaaaa"
    with pytest.raises(UpstreamError, match="UPSTREAM_TIMEOUT"):
        relay.look(i * 300 + 301, 300)


# Rows: what Z.ai does behind a finish, or behind the end mark -> the script. Neither a second more, nor 64 KB more are
# read.
ENDLESS = {
    "silence": [LONG_S], "comments": [chunked(b": keep-alive\n\n"), 0.02] * 5000,
    "a flood": [chunked(b": keep-alive\n\n" * 20000), LONG_S],
}


@cases("steps", ENDLESS)
@pytest.mark.parametrize("end", ((event(finish="stop"),), (FINISH, DONE)), ids=("finish", "end mark"))
@both
def test_what_has_ended_has_ended(zai, brisk, monkeypatch, proxy, steps, end, streamed):
    assert ztoapi.Relay.END_S == 1
    monkeypatch.setattr(ztoapi.Relay, "END_S", LONG_S if steps is ENDLESS["a flood"] else 0.1)
    zai.default = [HEAD, chunked(say("Hello")), *map(chunked, end), *steps]
    assert ask(proxy, streamed) == WELL
    assert eventually(lambda: zai.cut_by_client == 1)
    assert len(zai.requests) == 1


@both
def test_a_finish_without_an_answer_is_tried_again(zai, brisk, monkeypatch, proxy, streamed):
    monkeypatch.setattr(ztoapi.Relay, "END_S", 0.1)
    zai.scripts.append([HEAD, chunked(event(finish="stop")), LONG_S])
    assert (ask(proxy, streamed), len(zai.requests)) == (WELL, 2)


@pytest.mark.parametrize("late", (FINISH, DONE), ids=("usage", "end mark"))
def test_what_comes_late_behind_a_finish_is_waited_for(zai, brisk, unhurried, proxy, late):
    zai.default = stream(say("Hello"), event(finish="stop"), impatience(proxy, "is_ending"), 0.15, late)
    events = check_whole(*proxy.stream(stream_options={"include_usage": True}))
    assert finish_of(events) == ["stop"]
    assert any(event.get("usage") for event in events[:-1]) == (late is FINISH)


def test_a_stop_word_hangs_up_on_zai(zai, brisk, proxy):
    ended = threading.Event()
    zai.default = stream(say("Hello STOP"), *[say(" more"), 0.02] * 5000, lambda *_: ended.set())
    _, text, _, whole = ask(proxy, True, stop="STOP")
    assert (text, whole) == ("Hello ", True)
    assert eventually(lambda: zai.cut_by_client == 1)
    assert not ended.is_set()


# Retries, by the clock

@pytest.mark.parametrize("rand,gaps", ((1.0, [0.5, 1, 2, 4, 8, 8]), (0.5, [0.25, 0.5, 1, 2, 4, 4]), (0.0, [0] * 6)))
def test_backoff_between_retries_doubles_with_full_jitter(make_timed, rand, gaps):
    timed = make_timed(rand, MAX_RETRIES="6")
    timed.script = refusal(500, "1234")
    _, error, record = timed.ask()
    assert (timed.gaps(), error.status, record.retries) == (gaps, 502, 6)
    assert record.queued_s == sum(gaps)


# Rows: code, Z.ai's Retry-After header, seconds until the next attempt.
@pytest.mark.parametrize("code,header,seconds", [
    ("1234", "7", 7), ("1234", "0", 0), ("1302", "7", 7), ("1302", "20", 20), ("1305", "7", 7),
    ("1305", "0", 1),  # our own backoff is the least
])
def test_retry_after_of_zai_is_honoured(timed, code, header, seconds):
    timed.answers.append(refusal(429, code, "no", f"Retry-After: {header}"))
    text, error, _ = timed.ask()
    assert (text, error) == ("Hello", None)
    assert seconds <= timed.gaps()[0] <= seconds + 1


@pytest.mark.parametrize("code", ("1234", "1302", "1305"))
def test_a_retry_after_beyond_queue_timeout_is_told_at_once_with_the_true_time(make_timed, code):
    timed = make_timed(QUEUE_TIMEOUT="60")
    timed.script = refusal(429, code, "no", "Retry-After: 90")
    _, error, _ = timed.ask()
    assert error.headers() == {"Retry-After": "90", "x-should-retry": "false"}
    assert (len(timed.times), timed.clock.now) == (1, 1024)


def test_an_absurd_retry_after_closes_the_gate_for_a_minute_at_most(timed):
    timed.answers.append(answer(429, LIMITED, "Retry-After: 86400"))
    _, error, _ = timed.ask()
    assert (error.status, error.headers()["Retry-After"], timed.clock.now) == (429, "86400", 1024)
    assert (timed.ask()[0], timed.gaps()) == ("Hello", [60])


@pytest.mark.parametrize("code, expected", [("1305", FULL), ("1302", NO_ROOM)])
def test_a_gate_that_opens_too_late_is_not_waited_for_and_who_closed_it_is_told(make_timed, code, expected):
    timed = make_timed(QUEUE_TIMEOUT="30")
    timed.answers.append(refusal(429, code, "No room.", "Retry-After: 86400"))
    assert timed.ask()[1] is not None
    _, error, _ = timed.ask()
    assert error.headers() == {"Retry-After": "60", "x-should-retry": "false"}
    assert (timed.clock.now, len(timed.times), (error.status, error.code)) == (1024, 1, expected)
    assert "No room." in error.message
    timed.clock.now += 60
    assert timed.ask()[0] == "Hello"
    timed.answers.append(refusal(429, "1302", "Slow.", "Retry-After: 60"))
    assert timed.ask()[1] is not None
    assert "Slow." in timed.ask()[1].message


@pytest.mark.parametrize("rand", (0.0, 0.5, 1.0))
def test_a_refused_request_goes_again_after_a_backoff_that_doubles_to_8_seconds(make_timed, rand):
    timed = make_timed(rand)
    timed.script = refusal(429, "1302")
    _, error, record = timed.ask()
    for gap, nominal in zip(timed.gaps(), (0.5, 1, 2, 4, 8, 8, 8, 8)):
        assert nominal <= gap <= nominal * (1 + 0.5 * rand) + FakeClock.STEP_S
    assert len(timed.times) > 10, "besides MAX_RETRIES"
    assert (record.retries, error.status, error.code) == (len(timed.times), 429, "rate_limit_exceeded")


def test_an_overload_is_waited_out_within_queue_timeout(make_timed):
    timed = make_timed(QUEUE_TIMEOUT="50")
    timed.script = refusal(429, "1305", "The service may be temporarily overloaded")
    _, error, _ = timed.ask()
    assert timed.gaps() == [1, 2, 4, 8, 15, 15]
    assert timed.clock.now == 1024 + 45, "the next pause would be too long"
    assert (error.status, error.code, error.retryable) == (503, "overloaded", False)
    assert "temporarily overloaded" in error.message
    timed.script = stream(*HEALTHY)
    assert timed.ask()[0] == "Hello"


def test_an_overload_is_waited_out_if_no_other_model_answers(make_timed, zai):
    timed = make_timed(MODEL_FALLBACKS="glm-5.3=glm-5.2")

    def answered(request):
        if request["body"]["model"] == "glm-5.2":
            return refusal(429, "1113")
        return refusal(429, "1305") if timed.clock.now < 1024 + 20 else stream(*HEALTHY)
    zai.default = answered
    assert timed.ask("glm-5.3")[:2] == ("Hello", None)


def test_an_overload_is_waited_out_for_5_seconds_if_another_model_may_answer(make_timed, zai):
    timed = make_timed(MODEL_FALLBACKS="glm-5.3=glm-5.2")

    def answered(request):
        timed.times.append(timed.clock.now - 1024)
        return overloaded if request["body"]["model"] == "glm-5.3" else stream(*HEALTHY)
    overloaded = refusal(429, "1305")
    zai.default = answered

    def seconds():
        began = timed.clock.now
        assert timed.ask("glm-5.3")[:2] == ("Hello", None)
        return timed.clock.now - began
    assert seconds() == 5
    assert timed.times == [0, 1, 3, 5]
    assert seconds() == 0, "nobody waits once more"
    timed.clock.now += 3
    assert seconds() == 0
    assert timed.times[4:] == [5, 8, 8], "one tries whether it has room again"
    timed.clock.now += 61
    assert seconds() == 5, "that was another overload"
    overloaded = stream(*HEALTHY)
    timed.clock.now += 15
    assert seconds() == 0
    overloaded = [*refusal(429, "1302")]
    timed.clock.at(timed.clock.now + 20, lambda: overloaded.clear() or overloaded.extend(stream(*HEALTHY)))
    assert 20 <= seconds() < 30, "too many at once are queued"


def test_whoever_queues_for_an_overloaded_model_does_not_wait_either(make_timed):
    timed = make_timed(limit=1)
    first = timed.enter()
    second = timed.ticket(clock=timed.clock)
    second.is_replaceable = True

    def refuse():
        timed.gates.leave(first, error_of("1305", retry_after=60))
    timed.clock.at(timed.clock.now + 10, refuse)
    with pytest.raises(ApiError) as caught:
        timed.enter(second)
    assert (caught.value.code, timed.clock.now) == ("overloaded", 1024 + 15)


@pytest.mark.parametrize("timeout", (20, 120))
def test_queue_timeout_bounds_the_waiting_and_not_the_time_with_zai(make_timed, timeout):
    timed = make_timed(QUEUE_TIMEOUT=str(timeout))

    def with_zai(fake, request):
        timed.clock.now += 100
    timed.script = [with_zai, *refusal(429, "1302", "Slow down, please")]
    _, error, record = timed.ask()
    waited = timed.clock.now - 1024 - 100 * len(timed.times)
    assert timeout - 8 <= waited <= timeout
    assert record.queued_s == pytest.approx(waited)
    assert "Slow down, please" in error.message
    assert error.headers()["x-should-retry"] == "false"
    assert int(error.headers()["Retry-After"]) >= 1


def test_retries_and_queueing_again_are_counted_apart(make_timed):
    timed = make_timed(MAX_RETRIES="1")
    refusals = [refusal(429, "1302"), refusal(500, "1234"), stream(sse(LIMITED), DONE), refusal(429, "1303")]
    timed.answers.extend(refusals)
    text, error, record = timed.ask()
    assert (text, error, record.retries) == ("Hello", None, 4)


def test_a_job_keeps_nothing_of_the_conversation():
    class Conversation(list):
        """A list that can be watched."""

    result = ztoapi.to_zai_request(ztoapi.Request(chat_body(tools=[TOOL]), {}), Settings())
    result.body["messages"] = Conversation(result.body["messages"])
    alive = weakref.ref(result.body["messages"])
    job = ztoapi.Job(result)
    del result
    assert alive() is None
    assert b"messages" in job.data


def test_the_requests_bytes_are_let_go_of_with_the_first_step(zai, go, make_timed):
    script = zai.default
    timed = make_timed()
    timed.answers.append(refusal(500, "1234"))
    timed.script = script
    job = timed.job()
    data = job.data
    holders = []

    def take(steps):
        holders.append(sys.getrefcount(data))
        go.set()
    timed.upstream.answer(job, FakeClient(timed.clock), ztoapi.Record("req_1", "127.0.0.1", 0.0), take)
    assert job.data is None
    assert len(holders) >= 2
    assert set(holders) == {sys.getrefcount(data)}


# Connecting

def test_connect_refused_is_an_error_after_max_retries(closed_port):
    with strict_proxy(ZAI_BASE_URL=f"http://127.0.0.1:{closed_port}/api") as proxy:
        for streamed in (True, False):
            status, _, error, _ = ask(proxy, streamed)
            assert (status, error["code"]) == (502, "upstream_error")
            assert "refused" in error["message"].lower()
        assert figures(proxy)[0] == 4


def test_connect_refused_then_a_listener_is_an_answer(zai, free_port):
    def open_up():
        """Chance is asked when the first refusal is to be waited out."""
        zai.socket = socket.create_server(("127.0.0.1", free_port))
        threading.Thread(target=zai.accept, daemon=True).start()
        return 0.0
    shut_down(zai.socket)
    with proxying(zai, ZAI_BASE_URL=f"http://127.0.0.1:{free_port}/api") as proxy:
        proxy.server.upstream.gates.rand = open_up
        assert (ask(proxy, True), figures(proxy)[0]) == (WELL, 1)


def test_a_name_that_is_not_found_is_told(monkeypatch):
    find = socket.getaddrinfo

    def find_all_but_one(host, *args):
        if host == "nowhere.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return find(host, *args)
    monkeypatch.setattr(socket, "getaddrinfo", find_all_but_one)
    with strict_proxy(ZAI_BASE_URL="http://nowhere.example/api", MAX_RETRIES="1") as proxy:
        _, _, error, _ = ask(proxy, True)
        assert error["message"] == "Z.ai's address could not be found: Name or service not known."
        assert figures(proxy) == (1, 1, 0)


def test_connecting_and_a_handshake_take_ten_seconds_at_most(monkeypatch):
    assert ztoapi.CONNECT_TIMEOUT_S == 10
    monkeypatch.setattr(ztoapi, "CONNECT_TIMEOUT_S", 0.1)
    with MuteListener() as mute, strict_proxy(ZAI_BASE_URL=f"https://127.0.0.1:{mute.port}", MAX_RETRIES="0") as proxy:
        assert ask(proxy, True)[0] == 502
        assert mute.ended.wait(LONG_S)
    with stuck_listener() as port, strict_proxy(ZAI_BASE_URL=f"http://127.0.0.1:{port}", MAX_RETRIES="1") as proxy:
        check_502(proxy, "within 0.1 s")
        assert figures(proxy)[0] == 1


def test_a_dead_address_does_not_use_up_the_time_of_the_next(zai, monkeypatch):
    """Nor does one of a kind that this system does not have."""
    with stuck_listener() as port:
        places = [("127.0.0.1", port), ("127.0.0.1", zai.port)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", place) for place in places]
        found.insert(0, (9999, socket.SOCK_STREAM, 0, "", places[0]))
        tried = []
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", lambda *_: found)
            sock = ztoapi.dial("three.example", 80, types.SimpleNamespace(block_on=tried.append), 0.9)
        assert [other.gettimeout() for other in tried] == [pytest.approx(0.3), 0.9]
        assert sock.getpeername() == places[1]
        sock.close()


# The pool

@contextlib.contextmanager
def pooled(count):
    """(pool, its clock, `count` sockets in it, their other ends)."""
    clock = FakeClock()
    pool = ztoapi.Pool(ztoapi.KEEP_IDLE_S, clock)
    ours, theirs = zip(*[socket.socketpair() for _ in range(count)])
    for sock in ours:
        sock.setblocking(False)
        pool.put(sock)
    yield pool, clock, ours, theirs
    for sock in ours + theirs:
        sock.close()


def test_the_pool_gives_the_last_used_first():
    with pooled(3) as (pool, _, ours, _):
        assert [pool.take() for _ in range(4)] == [*ours[::-1], None]


@pytest.mark.parametrize("last_word", (b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"), ids=("end", "a word"))
def test_the_pool_drops_a_connection_that_has_something_to_say(last_word):
    with pooled(2) as (pool, _, ours, theirs):
        theirs[1].sendall(last_word)
        theirs[1].close()
        assert pool.take() is ours[0]
        assert ours[1].fileno() == -1


def test_the_pool_closes_what_was_idle_for_60_seconds():
    with pooled(2) as (pool, clock, ours, _):
        clock.now += 30
        pool.put(pool.take())
        clock.now += 29
        pool.expire(clock.now)
        assert [sock.fileno() >= 0 for sock in ours] == [True, True]
        clock.now += 1
        pool.expire(clock.now)
        assert [sock.fileno() >= 0 for sock in ours] == [False, True]
        clock.now += 30
        pool.expire(clock.now)
        assert pool.take() is None


@cases("script,again", {
    "a stream read to its end": (stream(*HEALTHY), True), "a refusal": (refusal(400, "1210"), True),
    "no last chunk": (stream(*HEALTHY, end=False) + [LONG_S], False),
    "Connection: close": ([HEAD[:-2] + b"Connection: close\r\n\r\n", *stream(*HEALTHY)[1:]], False),
    "a cut": (stream(say("Hel"), CLOSE, end=False), False),
})
@both
def test_a_connection_serves_again_once_its_answer_was_read(zai, brisk, monkeypatch, proxy, script, again, streamed):
    monkeypatch.setattr(ztoapi.Relay, "END_S", LONG_S if again else 0.2)
    zai.scripts.append(script)
    ask(proxy, streamed)
    proxy.idle()
    assert (ask(proxy, streamed), zai.connections) == (WELL, 1 if again else 2)


def test_a_pooled_connection_found_dead_is_replaced_unseen(zai):
    zai.scripts.append(stream(*HEALTHY) + [CLOSE])
    with strict_proxy(zai, MAX_RETRIES="0") as proxy:
        assert ask(proxy, True) == WELL
        proxy.idle()
        assert eventually(lambda: not zai.open)
        assert (ask(proxy, True), len(zai.requests), figures(proxy)[0]) == (WELL, 2, 0)


@contextlib.contextmanager
def three_pooled(zai):
    """A proxy with three idle connections to Z.ai."""
    three = threading.Barrier(3)
    zai.scripts.extend([stream(say("Hello"), lambda *_: three.wait(LONG_S), FINISH, DONE)] * 3)
    with strict_proxy(zai, MAX_RETRIES="0") as proxy:
        assert together(*[lambda: ask(proxy, True)] * 3) == [WELL] * 3
        proxy.idle()
        assert zai.connections == 3
        yield proxy


@pytest.mark.parametrize("death", ([RESET], [CLOSE]), ids=("reset", "end"))
def test_pooled_connections_that_die_when_used_are_replaced_unseen(zai, unhurried, monkeypatch, death):
    assert ztoapi.STALE_WITHIN_S == 1
    monkeypatch.setattr(ztoapi, "STALE_WITHIN_S", LONG_S)
    with three_pooled(zai) as proxy:
        zai.scripts.extend([death] * 3)
        assert ask(proxy, True) == WELL
        assert (len(zai.requests), zai.connections, figures(proxy)[0]) == (7, 4, 0)


def test_a_pooled_connection_that_ends_after_a_while_was_not_dead(zai, unhurried, monkeypatch):
    """Z.ai has worked on the request, which is billed: it is tried again MAX_RETRIES times, and counted."""
    monkeypatch.setattr(ztoapi, "STALE_WITHIN_S", 0.05)
    with three_pooled(zai) as proxy:
        zai.default = [0.2, CLOSE]
        assert (ask(proxy, True)[0], len(zai.requests)) == (502, 4)


# Through proxies, and over TLS

@both
def test_plain_requests_go_through_http_proxy_over_one_connection(zai, unhurried, http_proxy, monkeypatch, streamed):
    through(monkeypatch, "http", http_proxy.url)
    with strict_proxy(zai) as proxy:
        check_well(proxy, 3, streamed)
        assert [head.split()[1] for head in http_proxy.heads] == [f"{zai.url}/chat/completions"]
        assert len(zai.requests) == 3


@both
def test_tls_goes_through_https_proxy_over_one_connection(trusted, unhurried, http_proxy, monkeypatch, streamed):
    through(monkeypatch, "https", http_proxy.url)
    with strict_proxy(trusted) as proxy:
        check_well(proxy, 3, streamed)
        assert [head.split()[:2] for head in http_proxy.heads] == [["CONNECT", f"localhost:{trusted.port}"]]
        assert "uthorization" not in http_proxy.heads[0]
        assert [request["path"] for request in trusted.requests] == ["/api/paas/v4/chat/completions"] * 3


@pytest.mark.parametrize("no_proxy", ("localhost", "example.com,localhost", "*"))
def test_no_proxy_goes_around_the_proxy(trusted, http_proxy, monkeypatch, no_proxy):
    through(monkeypatch, "https", http_proxy.url, no_proxy)
    with strict_proxy(trusted) as proxy:
        assert (ask(proxy, True), http_proxy.heads) == (WELL, [])


def test_a_proxys_password_reaches_the_proxy_alone(trusted, unhurried, http_proxy, monkeypatch):
    through(monkeypatch, "https", http_proxy.url.replace("//", "//user:pass-word@"))
    with strict_proxy(trusted) as proxy:
        check_well(proxy, 2)
        assert "proxy-authorization: basic dXNlcjpwYXNzLXdvcmQ=".lower() in http_proxy.heads[0].lower()
        assert [request["headers"].get("Proxy-Authorization") for request in trusted.requests] == [None, None]


@table("reply", [b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", b"what?\r\n\r\n", b"", b"X: y\r\n" * 20000])
def test_a_proxy_that_refuses_is_a_502(trusted, monkeypatch, reply):
    with HttpProxy(reply) as refusing:
        through(monkeypatch, "https", refusing.url)
        with strict_proxy(trusted, MAX_RETRIES="1") as proxy:
            assert (ask(proxy, True)[0], trusted.connections, len(refusing.heads)) == (502, 0, 2)


@pytest.mark.parametrize("url,words", [
    *((url, "proxy") for url in (
        "http://a..b:80", "http://" + "a" * 64 + ".example:80", "http://user:secretpassword",
        "http://user:secretpassword@")),
    ("http://user:secretpassword@127.0.0.1:99999999", ""),
    *((url, "SOCKS") for url in (
        "socks5://user:secretpassword@127.0.0.1:1080", "socks5h://127.0.0.1:1080", "SOCKS4://127.0.0.1:1080")),
])
def test_a_proxy_that_cannot_be_used_is_refused_in_words_without_its_password(monkeypatch, caplog, url, words):
    through(monkeypatch, "https", url)
    with strict_proxy(ZAI_BASE_URL="https://localhost/api") as proxy:
        status, _, error, _ = ask(proxy, True)
        assert (status, error["code"], words in error["message"]) == (502, "upstream_error", True)
        assert "secretpassword" not in error["message"] + caplog.text


def test_a_certificate_that_does_not_fit_cannot_heal(untrusted, monkeypatch, tmp_path):
    with strict_proxy(untrusted) as proxy:
        check_502(proxy, "SSL_CERT_FILE")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "zai.pem"))
    with strict_proxy(untrusted, ZAI_BASE_URL=untrusted.url.replace("localhost", "127.0.0.1")) as proxy:
        check_502(proxy, "TLS")
    assert (untrusted.connections, untrusted.requests) == (2, [])


def test_https_to_a_plain_port_is_a_502():
    with MuteListener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as plain:
        with strict_proxy(ZAI_BASE_URL=f"https://localhost:{plain.port}", MAX_RETRIES="0") as proxy:
            check_502(proxy, "TLS")


@both
def test_tls_with_ssl_cert_file_answers_over_one_connection(trusted, unhurried, streamed):
    with strict_proxy(trusted) as proxy:
        check_well(proxy, 3, streamed)
        assert trusted.connections == 1


@pytest.mark.parametrize("fault", ("reset before the head", "closed behind the head", "broken chunk size", "1234"))
def test_faults_heal_over_tls_too(trusted, fault):
    with strict_proxy(trusted) as proxy:
        for _ in range(2):  # the second time on a used connection
            trusted.scripts.append(EARLY[fault])
            assert ask(proxy, True) == WELL
            proxy.idle()
        assert len(trusted.requests) == 4


@pytest.mark.parametrize("fault", ("reset", "clean end between chunks", "reset in a chunk"))
def test_cuts_over_tls_are_cuts(trusted, fault):
    trusted.default = [HEAD, chunked(say("Hel")), *LATE[fault]]
    with strict_proxy(trusted) as proxy:
        assert (said(failed_stream(proxy)), ask(proxy, False)[0]) == ("Hel", 502)
        assert len(trusted.requests) == 2


@pytest.mark.parametrize("size", (8192, 16384, 65536))
def test_what_stands_behind_an_answer_over_tls_never_becomes_the_next(trusted, unhurried, size):
    """Bytes that TLS has decrypted and nobody has read are seen by no poll(). The answer is padded to end where a read
    does."""
    good, other = [b"".join((say(text), FINISH, DONE)) for text in ("Hello", "somebody else's")]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\nX: %b\r\n\r\n"
    padding = b"a" * (size - len(head % (len(good), b"") + good))
    both_answers = head % (len(good), padding) + good + head % (len(other), b"") + other
    trusted.scripts.append([both_answers])
    with strict_proxy(trusted) as proxy:
        for _ in range(3):
            assert ask(proxy, False) == WELL
            proxy.idle()
            assert eventually(lambda: not trusted.in_flight), "all of it has been sent"
        assert trusted.connections == 2


@pytest.mark.parametrize("phase", ("before the head", "before the first token", "behind the first token"))
def test_the_clients_leaving_is_noticed_over_tls(trusted, brisk, caplog, phase):
    trusted.default = PHASES[phase][0]
    with strict_proxy(trusted) as proxy:
        with leaving(proxy, caplog, raw_chat(chat_body(stream=True))):
            assert eventually(lambda: trusted.in_flight == 1)
        assert eventually(lambda: trusted.cut_by_client == 1)


def test_a_slow_reader_over_tls_gets_all(trusted, brisk):
    trusted.default = Torrent(200, 1 << 16).script
    with strict_proxy(trusted) as proxy, proxy.open_stream() as sock:
        time.sleep(0.3)
        assert count_text(sock, b"Q") == (200 << 16, True)


# Metrics ##############################################################################

def record(**fields):
    return ztoapi.Record(**dict({"id": "req_1", "client": "127.0.0.1", "began": 1000.0}, **fields))


def counted(**fields):
    """A request that was answered as it should be."""
    usual = {"counted": True, "status": 200, "model": "GLM-4.6", "model_id": "glm-4.6", "key": "#1", "path": CHAT,
             "ttft_s": 0.2, "total_s": 1.5, "usage": {"prompt_tokens": 3, "completion_tokens": 7}}
    return record(**dict(usual, **fields))


# The log line

# Rows: fields of a Record, words its line holds, words it does not hold.
@pytest.mark.parametrize("fields,present,absent", [
    ({"method": "GET", "path": "/health", "status": 200}, ["req_1 127.0.0.1 GET /health 200"], ["model=", "key="]),
    ({"key": "#2"}, ["key=#2"], []), ({"client_request_id": "run-17"}, ["rid=run-17"], []),
    ({"client_request_id": "a b\r\n" + "x" * 500}, ["rid=a?b??xxx"], ["x" * 201]),
    *(({"counted": True, "stream": stream}, [words], []) for stream, words in (
        (True, "stream=true"), (False, "stream=false"))),
    ({"counted": True, "model": "m out=7\u202e"}, ["model=m?out=7?"], []),
    ({"counted": True, "model": "m" * 5000}, ["model=mmm"], ["m" * 101]),
    ({"counted": True, "ttft_s": 0.1234, "total_s": 2.0}, ["ttft=0.123 total=2.0 queue=0.0"], ["in=", "out="]),
    ({"counted": True, "usage": {"prompt_tokens": 0, "completion_tokens": 7}}, ["in=0 out=7"], []),
    ({"counted": True, "changed": ("store", "a b")}, ["changed=store,a?b"], ["repaired="]),
    ({"counted": True, "retries": 2, "repaired": 1}, ["retries=2 repaired=1"], ["changed="]),
    ({"error": "no\n\u6c34" + "e" * 5000}, [r"error='no\n\u6c34eee"], ["e" * 301]),
])
def test_a_record_is_one_line_of_printable_ascii(fields, present, absent):
    line = record(**fields).line()
    assert re.fullmatch("[ -~]+", line)
    assert [words for words in present if words not in line] + [words for words in absent if words in line] == []


# The counters

def metrics_of(*records, now=lambda: 1000.0):
    """Metrics that these requests were told to."""
    metrics = ztoapi.Metrics(now)
    for each in records:
        metrics.count("in_flight")
        metrics.finish(each)
    return metrics


def test_stats_tell_served_failed_and_cancelled_apart():
    records = [counted(status=status) for status in (200, 429, 499, 502)]
    stats = metrics_of(*records).stats()
    assert (stats["served"], stats["failed"], stats["cancelled"], stats["in_flight"]) == (1, 2, 1, 0)


def test_the_counters_tell_the_client_keys_apart():
    text = metrics_of(counted(), counted(key="#2"), counted(key="#2")).prometheus([], {})
    assert 'ztoapi_requests_total{model="glm-4.6",status="200",key="#1"} 1\n' in text
    assert 'ztoapi_requests_total{model="glm-4.6",status="200",key="#2"} 2\n' in text
    assert 'ztoapi_tokens_total{model="glm-4.6",kind="completion",key="#2"} 14\n' in text


def test_models_that_the_table_does_not_know_make_no_labels():
    gates = [(1, "new-1", 5), (1, "glm-4.6", 3)]
    records = [counted(model_id=f"new-{i}") for i in range(9)]
    text = metrics_of(*records).prometheus(gates, {"new-1": 2, "glm-4.6": 1})
    assert 'ztoapi_requests_total{model="other",status="200",key="#1"} 9\n' in text
    assert "ztoapi_requests_queued 3\n" in text
    assert 'ztoapi_concurrency_ceiling{key="1",model="glm-4.6"} 3\n' in text
    assert "new-" not in text


def test_a_histogram_counts_up_to_its_bounds():
    records = [counted(ttft_s=ttft_s) for ttft_s in (0.1, 0.11, 1000.0, None)]
    text = metrics_of(*records).prometheus([], {})
    name = "ztoapi_time_to_first_token_seconds"
    assert f'{name}_bucket{{le="0.1"}} 1\n{name}_bucket{{le="0.25"}} 2\n' in text
    assert f'{name}_bucket{{le="300"}} 2\n{name}_bucket{{le="+Inf"}} 3\n' in text
    assert f"{name}_sum 1000.210000\n{name}_count 3\n" in text


def test_long_texts_do_not_stay():
    record = counted(model="m" * 10**6, error="e" * 10**6, path="/" * 10**5)
    metrics = metrics_of(*[record] * 30)
    assert len(json.dumps(metrics.stats())) < 30000


def test_the_history_is_ten_minutes_without_gaps():
    clock = [1000.0]
    metrics = metrics_of(counted(), now=lambda: clock[0])
    for now, history in ((1009.0, [0] * 59 + [14]), (1040.0, [0] * 55 + [14, 0, 0, 0, 7]),
                         (990.0, [0] * 55 + [14, 0, 0, 0, 14]), (1.8e9, [0] * 59 + [7])):
        clock[0] = now
        metrics.count("in_flight")
        metrics.finish(counted())
        assert metrics.stats()["history"] == history


def test_stats_tell_tokens_gates_and_queues_by_model():
    metrics = metrics_of(*[counted()] * 3)
    stats = metrics.stats(queued={"glm-4.6": 4})
    assert stats["history"][-1] == 21
    assert stats["tokens"] == {"glm-4.6": {"prompt": 9, "completion": 21}}
    assert stats["queued"] == {"glm-4.6": 4}


# Handler ##############################################################################
#
# Raw bytes in, raw bytes out. One proxy serves all rows of the tables here.


# Where a request ends

# One of each kind; the tables of RequestHead have them all.
@table("data,status,words", [
    (raw_request("POST", CHAT, "Content-Length: 5, 5") + END, 400, ""),
    (raw_request("GET", "/health", "X : y"), 400, ""),
    (raw_request("POST", CHAT, "Transfer-Encoding: gzip") + END, 501, ""),
    *((raw_request("GET", path, *lines), 431, "") for path, *lines in (
        ("/" + "a" * 70000,), ("/health", "X: " + "y" * 70000))),
    (raw_request("GET", "/health", version="HTTP/2.0"), 505, ""),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "HTTPS"),
    *((raw_chunks(body), 400, "chunked") for body in (
        b"g\r\n", b"2\r\n{}xx\r\n0\r\n\r\n", b"2\r\n{}\r\n0\r\nGET /health HTTP/1.1\r\n\r\n")),
])
def test_what_is_refused_is_the_last_of_its_connection(shared, data, status, words):
    replies = exchange(shared, data)
    check_refused(replies, status)
    assert words in replies[0].error()["message"]


@table("method", ["get", "BREW", "TRACE", "__class__", "-1", "A" * 20])
def test_an_unknown_method_is_not_a_method_of_the_path(shared, method):
    replies = exchange(shared, raw_request(method, "/health"))
    assert [reply.status for reply in replies] == [405, 200]
    assert replies[0].headers["Allow"] == "OPTIONS, GET, HEAD"
    check_error(replies[0])


@table("pause_s", [0, 0.05])
def test_a_blank_line_between_requests_is_none_however_it_is_cut(shared, pause_s):
    """Old clients leave one behind a body; no request begins with it."""
    with hold(shared, raw_chat(JSON_CHAT)) as sock, sock.makefile("rb") as file:
        sock.sendall(b"\r")
        time.sleep(pause_s)
        sock.sendall(b"\n")
        time.sleep(pause_s)
        assert shared.idle()
        sock.sendall(raw_chat(JSON_CHAT))
        assert read_reply(file).status == 200


def test_a_blank_line_at_the_end_is_no_request(proxy, log_lines):
    with hold(proxy, raw_chat(JSON_CHAT)) as sock:
        sock.sendall(b"\r\n")
    time.sleep(0.05)
    proxy.idle()
    assert len(log_lines()) == 1


def test_pipelined_requests_are_answered_in_order(shared):
    data = (raw_request("GET", "/health") + raw_chat(JSON_CHAT) + raw_request("GET", "/v1/models/nope")
            + raw_chat(json_chat(stream=True)) + raw_chat(b"{}") + raw_chunks(chunked(JSON_CHAT), END)
            + raw_request("HEAD", "/v1/models/GLM-4.6") + raw_request("GET", "/metrics", "Connection: close"))
    replies = exchange(shared, data, 6)
    assert [reply.status for reply in replies] == [200, 200, 404, 200, 400, 200, 200, 200]
    assert replies[1].json()["object"] == "chat.completion"
    assert replies[3].body.endswith(b"data: [DONE]\n\n")
    assert replies[7].body.startswith(b"# HELP")
    assert len({reply.headers["x-request-id"] for reply in replies}) == 8


@table("lines", [[], ["Connection: keep-alive"]])
def test_http_1_0_gets_closing_unchunked_answers(shared, lines):
    old = {"version": "HTTP/1.0"}
    models = raw_request("GET", "/v1/models", *lines, **old)
    for data in (models, raw_chat(JSON_CHAT, *lines, **old)):
        reply, = exchange(shared, data)
        assert (reply.status, reply.headers["Connection"]) == (200, "close")
        assert int(reply.headers["Content-Length"]) == len(reply.body)
    reply, = exchange(shared, raw_chat(json_chat(stream=True), *lines, **old))
    assert (reply.headers["Transfer-Encoding"], reply.headers["Connection"]) == (None, "close")
    assert re.fullmatch(b"data: {.*}\n\ndata: \\[DONE\\]\n\n", reply.body, re.DOTALL)


@table("path", ["/", "/docs", "/dashboard", "/health", "/v1/models", "/models/glm-4.6", "/v1/models/nope", "/metrics",
                "/nowhere"])
def test_head_works_where_get_does_and_has_no_body(shared, path):
    head, get, last = exchange(shared, raw_request("HEAD", path) + raw_request("GET", path), 0)
    assert (head.status, head.headers["Content-Type"]) == (get.status, get.headers["Content-Type"])
    assert head.headers["Content-Length"] == str(len(get.body))


def test_head_of_the_chat_is_no_method_of_it(shared):
    head, _ = exchange(shared, raw_request("HEAD", CHAT), 0)
    assert (head.status, head.headers["Allow"]) == (405, "OPTIONS, POST")


# Bodies

JSON_LENGTH = f"Content-Length: {len(JSON_CHAT)}"

# Rows: header lines of a POST that expects 100-continue, whether its key is right, the statuses it gets.
@table("lines,key_is_right,expected", [
    ([JSON_LENGTH], True, [100, 200]), (["Transfer-Encoding: chunked"], True, [100, 200]),
    ([JSON_LENGTH], False, [401]), (["Transfer-Encoding: chunked"], False, [401]),
    (["Content-Length: 1048577"], True, [413]), ([JSON_LENGTH, "Content-Encoding: gzip"], True, [415]),
    (["Content-Length: 5, 5"], True, [400]), (["Content-Length: 0"], True, [100, 400]),
])
def test_100_continue_is_only_said_once_nothing_else_can_be(shared, lines, key_is_right, expected):
    """The body is sent after a 100 only."""
    body = chunked(JSON_CHAT) + END if "chunked" in lines[0] else JSON_CHAT
    request = raw_request("POST", CHAT, "Expect: 100-continue", *lines, auth=key_is_right)
    with connect(shared, request) as sock, sock.makefile("rb") as file:
        found = [read_reply(file).status]
        if found == [100]:
            sock.sendall(b"" if lines == ["Content-Length: 0"] else body)
            found.append(read_reply(file).status)
    assert found == expected


def test_a_client_need_not_wait_for_100_continue(shared):
    assert statuses(shared, raw_chat(JSON_CHAT, "Expect: 100-Continue")) == [100, 200, 200]
    assert statuses(shared, raw_request("GET", "/health", "Expect: 100-continue")) == [200, 200], "no body, no 100"


# Rows: the header line of a POST, what comes of its body, the status. 413 does not wait for a body beyond
# MAX_BODY_MB=1.
@table("line,body,status", [
    *((f"Content-Length: {size}", b"", 413) for size in (MIB + 1, 999999999999)),
    *(("Transfer-Encoding: chunked", body, 413) for body in (
        b"100001\r\n", b"fffffffffff\r\n", chunked(b" " * 600000) + b"70000\r\n")),
    (f"Content-Length: {MIB}", b" " * MIB, 400), (f"Content-Length: {MIB}", JSON_CHAT.ljust(MIB), 200),
    ("Transfer-Encoding: chunked", chunked(b" " * (MIB - 2)) + chunked(b"{}") + END, 400),
    ("Transfer-Encoding: chunked", chunked(JSON_CHAT.ljust(MIB)) + END, 200),
])
def test_the_body_limit_holds_before_the_body_is_there(shared, line, body, status):
    with connect(shared, raw_request("POST", CHAT, line) + body) as sock:
        reply = next_reply(sock)
    assert (reply.status, reply.headers["Connection"]) == (status, "close" if status == 413 else None)


# Rows: a request whose body nobody reads (method, path, further header lines, whether its key is right), the status.
@table("method,path,lines,key_is_right,status", [
    ("POST", CHAT, [], False, 401), ("POST", "/nowhere", [], True, 404), ("PUT", "/v1/models", [], True, 405),
    ("GET", "/v1/models", [], True, 200), ("GET", "/", [], False, 200), ("OPTIONS", CHAT, [], False, 200),
    ("DELETE", "/health", [], True, 405), ("POST", CHAT, ["Content-Encoding: br"], True, 415),
    ("BREW", "/health", [], True, 405),
])
def test_a_body_nobody_read_never_becomes_the_next_request(shared, method, path, lines, key_is_right, status):
    body = raw_request("GET", "/health") * 3
    for data in (raw_request(method, path, *lines, body=body, auth=key_is_right),
                 raw_request(method, path, "Transfer-Encoding: chunked", *lines, auth=key_is_right)
                 + chunked(body) + END):
        (reply,) = exchange(shared, data)
        assert (reply.status, reply.headers["Connection"]) == (status, "close")


# Rows: what is answered before all of it was read, the status. The server must not close on the rest, as that would
# reset the connection.
@table("data,status", [
    (raw_request("POST", CHAT, "Content-Length: 8000000", auth=False) + b" " * 4000000, 401),
    (b"nonsense\r\n\r\n" + b"x" * 100000, 400), (raw_request("GET", "/health", "X : y") + b"x" * 100000, 400),
    (raw_request("GET", "/health", "X: " + "y" * 1000000), 431),
])
def test_an_answer_can_be_read_while_more_is_still_being_sent(shared, data, status):
    with connect(shared, data) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert [reply.status for reply in replies_in(read_to_end(sock))] == [status]


def test_what_stands_behind_the_last_request_does_not_reset_the_connection(shared):
    with connect(shared, raw_request("GET", "/health", "Connection: close") + b"x" * 10000) as sock:
        assert eventually(lambda: readable(sock))
        time.sleep(0.05)
        sock.shutdown(socket.SHUT_WR)  # an error after a reset
        assert [reply.status for reply in replies_in(read_to_end(sock))] == [200]


# A form is what curl -d says it sends. A page of somebody else could send one unasked, but not with the key.
@table("kind", ["", "application/json", "application/json; charset=utf-8", "text/plain;charset=UTF-8", "nonsense",
                "application/octet-stream", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_the_content_type_does_not_matter(shared, kind):
    assert statuses(shared, raw_chat(JSON_CHAT, "Content-Type: " + kind)) == [200, 200]
    assert statuses(shared, raw_chat(JSON_CHAT, "Content-Type: " + kind, auth=False)) == [401]


def with_field(text):
    """The chat with one field more, as JSON text."""
    return JSON_CHAT.replace(b'"stream"', text + b',"stream"')


# What JSON is, and which fields are bad, is told by STRICT_JSON and BAD_REQUESTS. Rows: a body, the status it gets.
@table("body,status", [
    *((body, 400) for body in (
        b"", b"[]", b"{}", b"\xff\xfe\x00", JSON_CHAT + b"x", JSON_CHAT.decode().encode("utf-16"),
        gzip.compress(JSON_CHAT), JSON_CHAT.replace(b"Hi", b"\xff"), JSON_CHAT.replace(b"Hi", b"\xed\xa0\x80"),
        JSON_CHAT.replace(b"Hi", b"a\0b"), with_field(b'"temperature":NaN'), with_field(b'"temperature":1e99'),
        with_field(b'"x":' + b"[" * 100000), with_field(b'"temperature":' + b"9" * 1000000),
        with_field(b'"x":' + b'{"a":' * 50000 + b"1" + b"}" * 50000), with_field(b'"x":[' + b"[]," * 600000 + b"1]"),
        json_chat(messages=[None]), json_chat(stream="yes"))),
    *((body, 200) for body in (
        JSON_CHAT + b" \r\n\t", b"\xef\xbb\xbf" + JSON_CHAT, JSON_CHAT.replace(b"Hi", b"a\\u0000b"),
        JSON_CHAT.replace(b"Hi", b"\\udc00\\ud800"), JSON_CHAT.replace(b"GLM-4.6", b"\\ud800"),
        JSON_CHAT.replace(b'"Hi"', b'"Hi","\\ud800":1'), with_field(b'"model":"GLM-4.5"'),
        *map(with_field, (b'"\\r\\nX: y":"z"', b'"seed":' + b"9" * 100, b'"max_tokens":' + b"9" * 90)))),
])
def test_odd_bodies_have_a_defined_answer(proxy, zai, body, status):
    replies = exchange(proxy, raw_chat(body))
    assert [reply.status for reply in replies] == [status, 200]
    assert bool(zai.requests) == (status == 200)
    if status != 200:
        check_error(replies[0])


@table("field", [b'"x":%b', b'"tools":[{"type":"function","function":{"name":"f","parameters":{"a":%b}}}]'])
def test_nesting_around_the_recursion_limit_is_an_answer_or_a_400(shared, field):
    """Reading, writing and translating recurse at different depths; no depth may fall between two of them."""
    limit = sys.getrecursionlimit()
    for depth in (10, 500, *range(limit - 60, limit + 5), 3000, 9000, 20000):
        deep = b"[" * depth + b"]" * depth
        assert statuses(shared, raw_chat(with_field(field % deep)))[0] in (200, 400), depth


# Paths

# Rows: a target, by the status it gets.
@table("target,status", [
    *((target, 200) for target in (
        "/v1/models", "/models", "///models", "/v1//models//glm-4.6", "/v1/models/", "/v1/models?limit=2&x=%zz",
        "/%76%31/models", "http://localhost/v1/models", "/v1/models/GLM-4.5-Air", "?", "health", "http://", "http://]/")),
    *((target, 404) for target in (
        "/v1/models/nope", "/v1/models/%00%0d%0a", "/v1/models/%ff%fe", "/v1/models/a/b", "*", "/v1", "/v2/models",
        "/V1/MODELS", "/v1/models%", "/\xff\xfe", "/%2e%2e/%2e%2e/etc/passwd", "/\\", "/[", "ftp://x/health",
        "localhost:443", "/" + "a" * 60000, "/v1/models/" + "%41" * 20000)),
])
def test_every_target_has_a_defined_answer(shared, target, status):
    replies = exchange(shared, raw_request("GET", target))
    assert [reply.status for reply in replies] == [status, 200]
    if status != 200:
        check_error(replies[0])
        assert len(replies[0].body) < 1000


# To add a path, add a row. Those with /api are Z.ai's own.
@table("path", [
    CHAT, "/chat/completions", "/v1//chat/completions", "//v1/chat//completions/",
    "/api/paas/v4/chat/completions", "/api/coding/paas/v4/chat/completions",
])
def test_the_chat_is_found_however_the_base_url_was_joined(shared, path):
    assert statuses(shared, raw_request("POST", path, body=JSON_CHAT)) == [200, 200]


@table("path", ["/v1/models", "/models", "/v1/v1/models", "/api/paas/v4/models", "/api/coding/paas/v4/models",
                "/api/anthropic/v1/models"])
def test_the_models_are_found_where_a_program_looks(shared, path):
    assert [len(shared.call("GET", path + end)[2].get("data", "x")) for end in ("", "/GLM-4.6")] == [29, 1]


# Rows: a path, patterns of what its 404 says; {base} is the proxy's base URL, {root} the same without /v1, and {zai}
# that of Z.ai.
@table("path,words", [
    ("/nowhere", ["/nowhere", "base URL to {base}"]), ("/v1/embeddings", ["{zai}/embeddings", "balance"]),
    *((path, ["base URL to {base}"]) for path in (
        "/api/tags", "/api/paas/v4/responses", "/api/v1/chat/completions", "/api/v1/models")),
    *((f"{path}{name}", [f"{{zai}}/{name}"]) for path, name in (
        ("/v1/", "images/generations"), ("/v1/", "audio/transcriptions"), ("/", "embeddings"),
        ("/api/coding/paas/v4/", "embeddings"))),
    *((path, ["{base}/chat/completions"]) for path in ("/api/paas/v4/completions", "/v1/completions")),
    *((path, ["doubled", "base URL to {base}"]) for path in (
        "/v1/v1/chat/completions", "/v1/v1/embeddings", CHAT + "/chat/completions", CHAT + CHAT)),
    ("/v1/embeddings/%7Bzai%7D%0a", ["{zai}/embeddings"]),
    *((f"/v1/{name}", ["chat only", f"{{zai}}/{name}"]) for name in (
        "moderations", "batches", "fine_tuning/jobs", "assistants", "threads", "vector_stores/x", "realtime")),
    *((path, ["base URL to {root}, without /v1"]) for path in (
        "/openai/v1/messages", CHAT + "/v1/messages", "/openai/anthropic/v1/messages", "/anthropic")),
])
def test_a_404_says_where_to_go(shared, path, words):
    status, headers, body = shared.call("POST", path, {})
    assert (status, body["error"]["code"]) == (404, "not_found")
    for word in words:
        root = f"http://localhost:{shared.port}"
        assert word.format(root=root, base=root + "/v1", zai=shared.zai.url) in body["error"]["message"]


@table("path,right", [
    *((path, "GET") for path in ("/v1/models", "/models/GLM-4.6", "/metrics", "/stats", "/health", "/")),
    (CHAT, "POST"), ("/chat/completions", "POST"),
])
@table("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_every_route_takes_its_methods_and_names_them(shared, path, right, method):
    question = chat_body(stream=False) if right == method == "POST" else None
    status, headers, body = shared.call(method, path, question)
    if method == right:
        assert status == 200
        return
    assert (status, body["error"]["code"]) == (405, "method_not_allowed")
    assert set(headers["Allow"].split(", ")) == {"OPTIONS", right} | ({"HEAD"} if right == "GET" else set())


def test_models_are_listed_as_openai_lists_them(zai):
    with proxying(zai, MODEL_ALIASES="gpt-4o=glm-4.6,*=glm-4.5") as proxy:
        _, _, listing = proxy.call("GET", "/v1/models")
        assert listing["object"] == "list"
        entries = {model["id"]: model for model in listing["data"]}
        assert set(entries) == {"gpt-4o", *(model.name for model in ztoapi.MODELS.values())}, "not the catch-all"
        for id, model in entries.items():
            assert (model["object"], model["owned_by"], type(model["created"])) == ("model", "z.ai", int)
            assert proxy.call("GET", "/v1/models/" + id)[2] == model


@pytest.mark.parametrize("name, like", [
    ("glm-4.6", "GLM-4.6"), ("z-ai/glm-4.6", "GLM-4.6"), ("z-ai%2FGLM-4.5-air", "GLM-4.5-Air"),
    ("glm-5.2-highspeed", "GLM-5.2"), ("GLM-5.2[1m]", "GLM-5.2"), ("GPT-4O", "mine"), ("mine", "mine"), ("gpt-9", None),
    ("glm-4.66", None),
])
def test_a_model_is_found_by_any_name_that_chat_takes(zai, name, like):
    with proxying(zai, MODEL_ALIASES="gpt-4o=glm-9,mine=mine") as proxy:
        status, _, body = proxy.call("GET", "/v1/models/" + name)
        if like:
            asked = urllib.parse.unquote(name)
            entry = proxy.call("GET", "/v1/models/" + like)[2]
            assert body == dict(entry, id=asked, display_name=asked)
            return
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
    assert name in body["error"]["message"]


# Keys

# Rows: header lines, whether they hold the key.
@table("lines,right", [
    *(([line], True) for line in (
        "Authorization: Bearer key-one", "authorization: BEARER key-two", "Authorization: bearer  key-one ",
        "x-api-key: key-two", "X-Api-Key: key-one", "api-key: key-one", "Authorization: key-one")),
    (["Authorization: Bearer wrong", "api-key: key-one"], True), ([], False),
    *(([line], False) for line in (
        "Authorization: Bearer", "Authorization: Bearer ", "Authorization:", "x-api-key:",
        "Authorization: Bearer key-on", "Authorization: Bearer key-onee", "Authorization: Bearer KEY-ONE",
        "Authorization: Bearer key-one,key-two", "Authorization: Bearer key-one key-tw",
        "Authorization: Bearer k\xe4y-one", "Authorization: Bearer " + "x" * 60000, "Cookie: key=key-one")),
])
def test_a_key_is_taken_in_three_headers_and_nowhere_else(shared, lines, right):
    reply, _ = exchange(shared, raw_request("GET", "/v1/models?key=key-one", *lines, auth=False))
    assert reply.status == (200 if right else 401)
    if not right:
        check_error(reply)
        assert (reply.error()["code"], reply.headers["x-should-retry"]) == ("invalid_api_key", "false")
        assert b"key-one" not in reply.body


@pytest.mark.parametrize("auth", (False, ZAI_KEY))
def test_a_401_says_which_key_to_send(shared, well_known, auth):
    for proxy in (shared, well_known):
        reply, _ = exchange(proxy, raw_request("GET", "/v1/models", auth=auth))
        assert "DEFAULT_KEY (sk-your-key unless it was set), not the Z.ai key" in reply.error()["message"]
        assert reply.status == 401


# Rows: a path that needs the key. It is tried in spellings that a careless router could take for one that does not.
@table("path", ["/v1/models", "/metrics", "/stats", CHAT, "/nowhere"])
def test_no_spelling_of_a_path_opens_a_locked_door(shared, path):
    hexed = f"/%{ord(path[1]):02x}{path[2:]}"
    spellings = [
        path, "/" + path, path + "/", path + "?x", path + "#",
        "http://localhost" + path, "/health/.." + path, "/docs/%2e%2e" + path, "/health%2f..%2f" + path[1:],
        path + "%00", path + "/health", path + ";/health", "/v1" + path, path + "%2f", "/." + path,
        path.upper(), hexed, path[1:], path.replace("/", "//"),
    ]
    for target in spellings:
        for method in ("GET", "HEAD", "POST", "PUT"):
            data = talk(shared, raw_request(method, target, auth=False) + SENTINEL)
            assert data.startswith(b"HTTP/1.1 401 "), (method, target)


@table("method,path,status", [("GET", "/health", 200), ("GET", "/", 200), ("GET", "/docs", 200),
                              ("GET", "/dashboard/", 200), ("OPTIONS", "/v1/models", 200), ("OPTIONS", "*", 200)])
def test_what_needs_no_key(shared, method, path, status):
    assert shared.call(method, path, key=None)[0] == status


def test_without_a_key_for_zai_models_are_served_and_chat_says_what_to_do(zai):
    with proxying(zai, ZAI_API_KEY="") as proxy:
        assert proxy.call("GET", "/v1/models")[0] == 200
        status, headers, body = proxy.chat()
    assert (status, body["error"]["code"], headers["x-should-retry"]) == (403, "upstream_auth_error", "false")
    assert re.search("ZAI_API_KEY.*https://z.ai/", body["error"]["message"])


# Secure by default

# Rows: what Host says, by whether it names this computer.
@table("host,ours", [
    *((host, True) for host in (
        "localhost", "LocalHost:9090", "127.0.0.1", "127.0.0.1:9090", "127.8.9.10:1", "[::1]:9090", "[::1]")),
    *((host, False) for host in (
        "evil.example", "evil.example:9090", "localhost.evil.example", "127.0.0.1.nip.io", "", "0.0.0.0", "[",
        "[::1", "localhost@evil.example", "localhost:80@evil.example", "127.0.0.1evil", "192.168.1.7",
        "::ffff:1", "[::ffff:192.168.1.7]", "1270.0.1", "evil.example/127.0.0.1", "evil.example#localhost")),
])
def test_with_the_well_known_key_only_this_computer_is_served(well_known, host, ours):
    for method, path in (("GET", "/v1/models"), ("GET", "/"), ("GET", "/health"), ("OPTIONS", "/v1/models"),
                         ("GET", "/nowhere"), ("POST", CHAT)):
        data = raw_request(method, path, f"Host: {host}", f"Origin: http://{host}", auth="sk-your-key")
        reply = exchange(well_known, data)[0]
        assert (reply.status != 403) == ours, (method, path)
        assert [name for name in reply.headers if name.lower().startswith("access-control")] == []
        if not ours:
            check_error(reply)


PAGE, OTHER = "https://app.example", "https://evil.example"

# CORS_ORIGIN, the Origin of a page, what Access-Control-Allow-Origin says.
ASKED_HEADERS = "authorization,x-stainless-os, content-type"
PREFLIGHT = ["Access-Control-Request-Method: POST", f"Access-Control-Request-Headers: {ASKED_HEADERS}"]


def words_of(headers, name):
    return [word.strip() for line in headers.get_all(name, []) for word in line.split(",")]


@table("setting,origin,allowed", [
    ("*", PAGE, "*"), ("*", None, "*"), (PAGE, PAGE, PAGE), ("https://a.example, " + PAGE, PAGE, PAGE),
    (PAGE, OTHER, None), (PAGE, None, None), (PAGE, PAGE + ".evil.example", None), (PAGE, "null", None),
    (PAGE, PAGE.upper(), None), ("", PAGE, None),
])
def test_cors_follows_cors_origin(zai, setting, origin, allowed):
    lines = [f"Origin: {origin}"] if origin else []
    with proxying(zai, CORS_ORIGIN=setting) as proxy:
        answers = [
            proxy.call("GET", "/v1/models", None, lines), proxy.call("GET", "/v1/nope", None, lines),
            proxy.call("POST", CHAT, {}, lines, key=None), proxy.call("POST", CHAT, chat_body(stream=True), lines),
            proxy.call("OPTIONS", CHAT, None, lines + PREFLIGHT, key=None),
        ]
    assert [status for status, _, _ in answers] == [200, 404, 401, 200, 200]
    for _, got, _ in answers:
        assert got["Access-Control-Allow-Origin"] == allowed
        assert "Access-Control-Allow-Credentials" not in got
        assert ("Origin" in words_of(got, "Vary")) == (setting not in ("*", ""))
        if allowed:
            assert {"x-request-id", "retry-after"} <= set(words_of(got, "Access-Control-Expose-Headers"))
    preflight = answers[-1][1]
    if allowed:
        assert preflight["Access-Control-Allow-Headers"] == ASKED_HEADERS
        assert {"GET", "POST"} <= set(words_of(preflight, "Access-Control-Allow-Methods"))
        assert "Access-Control-Request-Headers" in words_of(preflight, "Vary")
    if not setting:
        assert [name for name in preflight if name.lower().startswith("access-control")] == []


KEY_ID, KEY_SECRET = ZAI_KEY.split(".")

def test_secrets_are_redacted_wherever_they_could_surface(zai, log_lines, caplog):
    caplog.set_level(logging.DEBUG, "ztoapi")
    quoted = []
    with proxying(zai, DEBUG_MODE="true", MAX_RETRIES="0") as proxy:
        zai.scripts.append(refusal(401, "1000", "bad key " + ZAI_KEY))
        quoted.append(proxy.chat())
        shown = [proxy.call("GET", path) for path in ("/stats", "/metrics", "/v1/models", "/")]
        for fields in ({"model": KEY}, {KEY: 1}, {"tool_choice": KEY}, {"stop": [KEY]}):
            proxy.chat(**fields)
        proxy.call("POST", CHAT, chat_body(stream=KEY))
        zai.scripts.append(refusal(429, "1302"))
        answer = proxy.chat(model=KEY)
        shown.append(str(answer[1].items()))
        assert answer[0] == 200
        for path in (f"/v1/models?key={KEY}", f"/{KEY}", f"/v1/models/{KEY}", f"{CHAT}/{KEY}"):
            proxy.call("GET", path)
        quoted.append(proxy.call(KEY, "/health"))
        shown.append(str(proxy.call("OPTIONS", "/", None, [f"Access-Control-Request-Headers: {KEY}"])[1].items()))
        shown += [repr(proxy.settings), repr(proxy.server), proxy.call("GET", "/stats")]
    text = str([quoted, shown, log_lines()])
    assert [secret for secret in (ZAI_KEY, KEY_ID, KEY_SECRET, KEY) if secret.lower() in text.lower()] == []
    assert [answer for answer in quoted if "[redacted]" not in str(answer)] == []


# Streamed or not

# Who gets a stream is a table of Chat's; this is what of it must work on the wire. Rows: fields of the request, header
# lines, whether the answer is streamed where DEFAULT_STREAM is true. Where it is false it is for who asks for it.
@table("fields,lines,streamed", [
    ({}, [], True), ({"stream": None}, [], True), ({"stream": True}, ["Accept: application/json"], True),
    ({"stream": False}, [], False), ({}, ["Accept: Application/JSON, */*"], False),
    ({}, ["User-Agent: node", "Accept: */*"], False), ({}, ["User-Agent: node-fetch/1.0"], True),
])
def test_who_does_not_say_stream_gets_what_its_kind_expects(shared, fields, lines, streamed):
    with proxying(shared.zai, DEFAULT_STREAM="false") as other:
        for proxy, wanted in ((shared, streamed), (other, fields.get("stream") is True)):
            status, headers, _ = proxy.call("POST", CHAT, chat_body(**fields), lines)
            assert (status, headers["Content-Type"].startswith("text/event-stream")) == (200, wanted)


# The other two APIs

def ask_api(proxy, api, streamed, **more):
    """(reply, events) or (reply, JSON)."""
    reply, = replies_in(talk(proxy, api_request(api, streamed, "Connection: close", **more)))
    is_stream = reply.headers["Content-Type"].startswith("text/event-stream")
    return reply, events_of(reply.body.decode()) if is_stream else reply.json()


def whole_of(api, events):
    """The JSON answer that the events of a good stream add up to."""
    return {"content": check_messages_stream(events)} if api == "messages" else check_responses_stream(events)


def text_of(api, answer):
    parts = answer["content"] if api == "messages" else [
        part for item in answer["output"] for part in item.get("content", [])]
    return "".join(part.get("text", "") for part in parts)


# Whether the key is right, the status, the type (Messages) or the code (Responses) of the error.
@table("method,path,key_is_right,status,kind", [
    ("POST", "/v1/messages/count_tokens", True, 400, "invalid_request_error"),
    ("GET", "/messages/count_tokens", True, 405, "invalid_request_error"),
    ("GET", "/v1/messages/batches/abc", True, 404, "not_found_error"),
    ("GET", "/v1/messages", True, 405, "invalid_request_error"),
    *(("POST", path, True, 400, "invalid_request_error") for path in (
        "/v1/messages", "/v1/v1/messages", "/api/anthropic/v1/messages", "/api/anthropic/v1/v1/messages")),
    *(("POST", path, False, 401, "authentication_error") for path in ("/v1/messages", "/v1/messages/count_tokens")),
    ("GET", "/v1/responses", True, 426, "upgrade_not_supported"),
    *((method, "/v1/responses/" + rest, True, 404, "not_found") for method, rest in (
        ("GET", "abc"), ("DELETE", "abc"), ("POST", "abc/cancel"), ("POST", "input_tokens"))),
    ("DELETE", "/v1/responses", True, 405, "method_not_allowed"),
    *(("POST", path, True, 400, "missing_required_parameter") for path in (
        "/v1/responses", "/api/v1/responses", "/v1/responses/compact")),
    *((method, "/v1/responses", False, 401, "invalid_api_key") for method in ("GET", "POST")),
])
def test_an_api_says_in_its_own_shape_what_it_does_not_serve(shared, method, path, key_is_right, status, kind):
    data = raw_request(method, path, body=b"{}", auth=key_is_right or "sk-wrong")
    reply = exchange(shared, data)[0]
    assert reply.status == status
    if "messages" in path:
        assert list(reply.json()) == ["type", "error", "request_id"]
        assert (reply.json()["type"], reply.json()["request_id"]) == ("error", reply.headers["request-id"])
    else:
        check_error(reply)
    assert reply.error()["type" if "messages" in path else "code"] == kind
    assert path != "/v1/responses/abc" or "previous_response_id" in reply.error()["message"]
    assert reply.headers["x-should-retry"] == "false"
    assert not shared.zai.requests


@pytest.mark.parametrize("path", ["/v1/messages/count_tokens", "/messages/count_tokens?beta=true"])
def test_tokens_are_counted_without_asking_zai(shared, path):
    reply = exchange(shared, raw_request("POST", path, body=json.dumps(MESSAGES_BODY).encode()))[0]
    assert (reply.status, list(reply.json())) == (200, ["input_tokens"])
    assert 20 < reply.json()["input_tokens"] < 200
    assert not shared.zai.requests


def test_a_conversation_is_compacted_by_post(proxy, zai):
    status, _, answer = proxy.call("POST", "/v1/responses/compact", {"model": "glm-4.6", "input": [user("a"), A]})
    assert (status, answer["object"]) == (200, "response.compaction")
    assert [(item["type"], item["encrypted_content"]) for item in answer["output"]] == [("compaction", "Hello")]
    status, _, answer = proxy.call("POST", "/v1/responses", {"model": "glm-4.6", "input": [*answer["output"], U]})
    assert (status, zai.requests[-1]["body"]["messages"]) == (200, [user("Hello"), U])


def test_a_response_goes_on_from_an_earlier_one(proxy, zai):
    body = {"model": "glm-4.6", "input": "a"}
    first = proxy.call("POST", "/v1/responses", body)[2]
    status, _, second = proxy.call("POST", "/v1/responses", {**body, "previous_response_id": first["id"]})
    assert (status, second["previous_response_id"]) == (200, first["id"])
    assert zai.requests[-1]["body"]["messages"] == [user("a"), assistant("Hello", thinking="The user"), user("a")]


@each_door
def test_the_model_that_answers_is_told(zai, door):
    turn = user([{"type": "text", "text": "a"}, PICTURE])
    path, body = APIS[door]
    body = {**body, "input" if door == "responses" else "messages": [turn], "model": "GLM-4.6", "stream": False}
    with proxying(zai, VISION_MODEL="glm-5.3-flash") as proxy:
        status, headers, answer = proxy.call("POST", path, body)
        assert (status, headers["x-ztoapi-model"], answer["model"]) == (200, "glm-5.3-flash", "GLM-4.6")
        proxy.idle()
        assert 'model="glm-5.3-flash"' in proxy.server.metrics.prometheus([], {})
        assert proxy.chat()[1]["x-ztoapi-model"] == "glm-4.6"


def refusing(**codes):
    """A fake Z.ai's answers: what of a model's name follows the dash (5_3) is refused with that code."""
    def answered(request):
        code = codes.get(request["body"]["model"].rpartition("-")[2].replace(".", "_"))
        return refusal(429, code) if code else stream(*HEALTHY)
    return answered


@cases("refusals, model", [
    ("no money", {"5_3": "1113"}, "glm-5.2"), ("limit reached", {"5_3": "1308", "5_2": "1310"}, "glm-4.7"),
    ("not in the plan", {"5_3": "1311"}, "glm-5.2"), ("not there", {"5_3": "1211", "5_2": "1113"}, "glm-4.7"),
    ("down", {"5_3": "1120"}, "glm-5.2"),
    # No other model heals these. Of who fails all the way, the first tells.
    ("invalid", {"5_3": "1210"}, "1210"), ("our key", {"5_3": "1001"}, "1001"), ("unfair", {"5_3": "1313"}, "1313"),
    ("all the way", {"5_3": "1113", "5_2": "1211", "4_7": "1311"}, "1113"),
])
@each_door
def test_another_model_answers_for_one_that_cannot(zai, log_lines, door, refusals, model):
    zai.default = refusing(**refusals)
    path, body = APIS[door]
    fallbacks = "GLM-5.3=5.2,5.2=glm-4.7,glm-4.7=glm-5.3"
    with proxying(zai, MODEL_FALLBACKS=fallbacks, MODEL_ALIASES="5.2=GLM-5.2", MAX_RETRIES="0") as proxy:
        status, headers, answer = proxy.call("POST", path, {**body, "model": "glm-5.3", "stream": False})
        proxy.idle()
        row = proxy.call("GET", "/stats")[2]["recent"][0]
    asked = [request["body"]["model"] for request in zai.requests]
    assert asked == ["glm-5.3", "glm-5.2", "glm-4.7"][:len(asked)], "each model once"
    if model.isdigit():
        assert status >= 400
        assert f"(code {model})" in json.dumps(answer)
        assert len(asked) == (3 if len(refusals) == 3 else 1)
    else:
        assert (status, headers["x-ztoapi-model"], answer["model"], asked[-1]) == (200, model, "glm-5.3", model)
        assert (row["model"], row["by"]) == ("glm-5.3", model)
        assert f" model=glm-5.3 by={model} " in log_lines()[0]
        assert f'model="{model}"' in proxy.server.metrics.prometheus([], {})


def test_every_key_is_tried_before_another_model_is(zai):
    def answered(request):
        is_refused = KEYS[0] in request["headers"]["Authorization"] or request["body"]["model"] == "glm-5.3"
        return refusal(429, "1113") if is_refused else stream(*HEALTHY)
    KEYS = ZAI_KEYS[:2]
    zai.default = answered
    with proxying(zai, MODEL_FALLBACKS="glm-5.3=glm-4.7", ZAI_API_KEY=",".join(KEYS)) as proxy:
        assert proxy.chat(model="glm-5.3")[0] == 200
    assert [request["body"]["model"] for request in zai.requests[:3]] == ["glm-5.3", "glm-5.3", "glm-4.7"]


def test_another_model_is_asked_in_its_own_way(zai):
    zai.default = refusing(**{"5_3": "1113"})
    turn = user([{"type": "text", "text": "a"}, PICTURE])
    fallbacks = "glm-5.3-flash=glm-4.7,glm-4.7=glm-4.5v,glm-5.3=glm-4.5"
    with proxying(zai, MODEL_FALLBACKS=fallbacks) as proxy:
        assert proxy.chat(model="glm-5.3", max_tokens=130000, reasoning_effort="low")[0] == 200
        first, second = (request["body"] for request in zai.requests)
        assert (first["max_tokens"], second["max_tokens"]) == (130000, 98304)
        assert ("reasoning_effort" in first, "reasoning_effort" in second) == (True, False)
        zai.default = refusing(flash="1113")
        # GLM-4.7 sees no pictures.
        assert proxy.chat(model="glm-5.3-flash", messages=[turn])[1]["x-ztoapi-model"] == "glm-4.5v"


def test_after_the_first_token_no_other_model_answers(zai):
    zai.default = stream(say("Hel"), error_event("1113"))
    with proxying(zai, MODEL_FALLBACKS="glm-5.3=glm-4.7") as proxy:
        assert ask(proxy, True, model="glm-5.3")[1] == "Hel"
    assert len(zai.requests) == 1


@each_api
def test_each_api_streams_and_answers_in_json(proxy, api):
    reply, events = ask_api(proxy, api, True)
    assert (reply.status, reply.clean, text_of(api, whole_of(api, events))) == (200, True, "Hello")
    reply, answer = ask_api(proxy, api, False)
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json")
    assert (text_of(api, answer), answer["usage"]["output_tokens"]) == ("Hello", USAGE["completion_tokens"])


# With a status that makes agents show it rather than try again and say nothing. Rows: HTTP status and code of Z.ai, our
# code, the status of chat, the status and the type of Messages; that of Responses is 400.
@pytest.mark.parametrize("refused,code,chat,status,kind", [
    *(((429, zai_code), "insufficient_quota", 402, 402, "billing_error") for zai_code in ("1113", "1309", "1310")),
    ((429, "1311"), "permission_denied", 403, 402, "billing_error"),
    ((429, "1313"), "permission_denied", 403, 400, "invalid_request_error"),
    *(((401, zai_code), "upstream_auth_error", 403, 400, "invalid_request_error") for zai_code in ("401", "1000")),
    ((400, "1211"), "model_not_found", 404, 400, "invalid_request_error"),
])
@each_door
@both
def test_an_error_that_does_not_heal_is_shown_at_once(zai, proxy, door, refused, code, chat, status, kind, streamed):
    zai.default = refusal(*refused)
    reply, value = ask_api(proxy, door, streamed)
    told = (reply.status, value["error"]["type" if door == "messages" else "code"])
    assert told == {"chat": (chat, code), "messages": (status, kind), "responses": (400, code)}[door]
    assert (reply.headers["x-should-retry"], len(zai.requests)) == ("false", 1)


@each_api
def test_a_failure_in_mid_stream_is_the_last_event_of_each_api(zai, proxy, api):
    zai.default = stream(say("Hel"), error_event("1234"))
    reply, events = ask_api(proxy, api, True)
    assert (reply.status, "Hel" in reply.body.decode()) == (200, True)
    assert reply.clean, "nobody overlooks the event"
    last = {"messages": "error", "responses": "response.failed"}[api]
    assert [event["type"] for event in events].index(last) == len(events) - 1
    reply, value = ask_api(proxy, api, False)
    assert (reply.status, value["error"]["message"] != "", len(zai.requests)) == (502, True, 2)


# To add an API, add a row: its name, its heartbeats before the answer and in it.
@pytest.mark.parametrize("api, before, within", [
    ("messages", rb"event: ping", rb"Hel.*event: ping"),
    ("responses", rb"(event: response.in_progress.*){2}", rb'Hel.*"delta":""'),
])
def test_each_api_has_heartbeats_of_its_own(zai, brisk, api, before, within):
    first, second = threading.Event(), threading.Event()
    zai.default = [first, *stream(say("Hel"), second, say("lo"), FINISH, DONE)]
    request = api_request(api, True, "Connection: close")
    with proxying(zai, HEARTBEAT="0.04") as proxy, connect(proxy, request) as sock:
        for pattern, go in ((before, first), (within, second)):
            see(sock, pattern)
            go.set()
        reply, = replies_in(read_to_end(sock))
    events = events_of(reply.body.decode())
    kinds = [event["type"] for event in events]
    assert reply.clean
    if api == "messages":
        assert kinds[:2] == ["message_start", "ping"]
        assert "ping" in kinds[kinds.index("content_block_start"):]
        assert text_of(api, whole_of(api, [event for event in events if event["type"] != "ping"])) == "Hello"
    else:
        assert kinds[:3] == ["response.created", "response.in_progress", "response.in_progress"]
        assert "" in [event.get("delta") for event in events]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert text_of(api, events[-1]["response"]) == "Hello"


def test_an_item_is_remembered_for_the_key_that_got_it_and_for_no_other(zai):
    with proxying(zai, DEFAULT_KEY=f"{KEY},sk-other") as proxy:
        _, answer = ask_api(proxy, "responses", False)
        items = [{"type": "item_reference", "id": item["id"]} for item in answer["output"]]
        items.append(user("And?"))
        reply, _ = ask_api(proxy, "responses", False, input=items)
        told = [(message["role"], message["content"]) for message in zai.requests[-1]["body"]["messages"]]
        assert (reply.status, told) == (200, [("assistant", "Hello"), ("user", "And?")])
        reply, value = ask_api(proxy, "responses", False, auth="sk-other", input=items)
        assert (reply.status, "not found" in value["error"]["message"], len(zai.requests)) == (404, True, 2)


# What the log tells

# Rows: a request, how its line goes on behind its id and the client's address.
@table("data,words", [
    *((raw_request(method, path, LAST), words) for method, path, words in (
        ("GET", "/health", "GET /health 200"), ("GET", "/v1/models", "GET /v1/models 200"),
        ("POST", "/nope?secret", "POST /nope 404"), ("PUT", "/health", "PUT /health 405"),
        ("OPTIONS", "/", "OPTIONS / 200"), ("BREW", "/health", "BREW /health 405"))),
    (raw_chat({}, LAST), f"POST {CHAT} 400"), (raw_chat(JSON_CHAT, LAST), f"POST {CHAT} 200"),
    (raw_chat(chat_body(stream=True), LAST), f"POST {CHAT} 200"), (b"nonsense\r\n\r\n", "- - 400"),
    (raw_request("GET", "/health", "Content-Length: x"), "GET /health 400"),
])
def test_a_request_is_one_line(proxy, log_lines, data, words):
    reply, = replies_in(talk(proxy, data))
    assert eventually(log_lines)
    line, = log_lines()
    assert line.startswith(f"{reply.headers['x-request-id']} 127.0.0.1 {words}")
    assert not log_lines(logging.ERROR)


@pytest.mark.parametrize("path", ("/api/tags", "/api/v1/models", "/props", "/version"))
@pytest.mark.parametrize("auth, status", ((True, 404), (False, 401)))
def test_who_looks_for_another_server_is_no_news(proxy, caplog, path, auth, status):
    caplog.set_level(logging.DEBUG, "ztoapi")
    assert replies_in(talk(proxy, raw_request("GET", path, LAST, auth=auth)))[0].status == status
    proxy.quiet()
    line, = [record for record in caplog.records if path in record.getMessage()]
    assert (line.levelno, proxy.server.metrics.counts["unauthorized"]) == (logging.DEBUG, 0)


def test_the_line_of_a_chat_tells_what_happened(zai, log_lines):
    zai.scripts.extend([refusal(500, "1234"), refusal(429, "1120")])
    with strict_proxy(zai, DEFAULT_KEY="sk-other-0123456789," + KEY) as proxy:
        proxy.chat(["X-Client-Request-Id: run 17"], store=True)
        assert eventually(log_lines)
        assert "ztoapi_retries_total 2" in proxy.call("GET", "/metrics")[2]
    words = log_lines()[0].split()
    assert {"key=#2", "rid=run?17", "model=GLM-4.6", "stream=false", "in=28", "out=185", "retries=2", "changed=store",
            "zai=20260711073209851e7f8c12c44579"} <= set(words)
    assert re.search(r" ttft=\d+\.\d+ total=\d+\.\d+ queue=\d+\.\d+ ", log_lines()[0])


def test_a_key_is_taken_out_before_a_word_is_cut(zai, log_lines):
    key = "sk-prod-A1b2C3d4E5f6G7h8I9j0KLMN"
    with proxying(zai, DEFAULT_KEY=key) as proxy:
        proxy.call("GET", "/" + "a" * 170 + key, key=key)
        proxy.call("POST", CHAT, chat_body(stream=False, model="m" * 75 + key), key=key)
        proxy.idle()
        text = json.dumps(proxy.call("GET", "/stats", key=key)[2]) + "".join(log_lines())
    assert ("A1b2C3" in text, "[redacted]" in text) == (False, True)


def test_no_log_line_holds_a_text_even_in_debug_mode(zai, log_lines, caplog):
    caplog.set_level(logging.DEBUG, "ztoapi")
    zai.default = stream(think("THOUGHT"), say("ANSWER"), call("secretive", '{"a":"ARGUMENT"}'), FINISH, DONE)
    parameters = {"type": "object", "properties": {"PROPERTY": {}}}
    secretive = function(name="secretive", description="DESCRIPTION", parameters=parameters)
    secretive.update(stop="STOP-WORD", user="USER-NAME", messages=[
        system("SYSTEM"), user([{"type": "text", "text": "PROMPT"}]),
        assistant(None, [("call_1", "secretive", '{"b":"OLD"}')]), output("call_1", "RESULT")])
    with proxying(zai, DEBUG_MODE="true") as proxy:
        for streamed in (True, False):
            assert proxy.call("POST", CHAT, chat_body(stream=streamed, **secretive))[0] == 200
        proxy.call("POST", CHAT, {"model": "GLM-4.6", "messages": [{"role": "BADROLE", "content": "PROMPT"}]})
    text = "\n".join(log_lines())
    secrets = ("THOUGHT", "ANSWER", "ARGUMENT", "DESCRIPTION", "PROPERTY", "STOP-WORD", "USER-NAME", "SYSTEM", "PROMPT",
               "OLD", "RESULT", KEY, ZAI_KEY)
    assert [word for word in secrets if word in text] == []
    assert len(log_lines()) > 3, "DEBUG_MODE does say more"


def test_nothing_a_client_sends_can_shape_the_log(zai, log_lines, caplog):
    caplog.set_level(logging.DEBUG, "ztoapi")
    evil = "x\r\n2026-01-01 INFO forged\x1b[2J\x00\x7f\x85\u2028\u202e\ud800 status=200 out=7 error=''"
    messages = [{"role": "user", "content": "Hi", evil: 1}]
    bodies = [
        *(chat_body(model=evil, **{evil: 1}, **more) for more in ({}, {"n": 7})),
        {"model": evil, "messages": [{"role": evil, "content": evil}]},
        {"model": evil, "messages": messages, "tools": [{"type": evil, evil: evil}], "response_format": {"type": evil}},
        {"model": "x", "messages": messages},
    ]
    targets = ["/\x1b[31m", "/\x9b2J\xff", "/%0d%0aforged", "/a%20out=7", "/v1/models/%1b%5b2J%e2%80%a8"]
    with proxying(zai, DEBUG_MODE="true") as proxy:
        for body in bodies:
            exchange(proxy, raw_chat(body))
        for target in targets:
            exchange(proxy, raw_request("GET", target))
        exchange(proxy, b"\x1b[2J / HTTP/1.1\r\n\r\n")
        exchange(proxy, raw_request("GET", "/health", "X-Request-Id: \x1b[2J out=7"))
    lines = log_lines()
    assert len(lines) >= 10
    assert [line for line in lines if not re.fullmatch("[ -~]+", line)] == []
    requests = [line.split(" error=")[0] for line in lines if line.startswith("req_")]
    assert [line for line in requests if line.count(" out=") > 1] == [], "a model's name is one word of the line"


# What the numbers tell

METRICS = {"ztoapi_" + name: kind for kind, names in {
    "counter": "requests_total tokens_total unauthorized_total retries_total repaired_frames_total",
    "histogram": "time_to_first_token_seconds request_duration_seconds",
    "gauge": "requests_in_flight requests_queued concurrency_ceiling process_start_time_seconds",
}.items() for name in names.split()}
SAMPLE = r'([a-z_]+)(?:\{((?:[a-z_]+="[^"\\\n]*",?)+)\})? (-?[0-9.e+]+)'


def read_metrics(text):
    """({name: type}, {name: {labels: value}}) of Prometheus text, checked against the grammar of format 0.0.4."""
    samples, types, family = {}, {}, None
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        comment = re.fullmatch(r"# (HELP|TYPE) ([a-z_]+) (.+)", line)
        if comment:
            word, family, rest = comment.groups()
            if word == "TYPE":
                assert family not in types, "each family once"
                types[family] = rest
            continue
        name, labels, value = re.fullmatch(SAMPLE, line).groups()
        suffixes = ("_bucket", "_sum", "_count") if types[family] == "histogram" else ("",)
        assert name in [family + suffix for suffix in suffixes]
        labels = tuple(sorted(re.findall(r'([a-z_]+)="([^"]*)"', labels or "")))
        assert labels not in samples.setdefault(name, {}), "each sample once"
        samples[name][labels] = float(value)
    return types, samples


def test_the_metrics_are_prometheus_text_with_the_promised_names(zai):
    zai.scripts.extend([refusal(500, "1234"), stream(*HEALTHY)])
    zai.scripts.extend([refusal(400, "1210"), stream(b"data: garbage\n\n", *HEALTHY)])
    with strict_proxy(zai, MAX_CONCURRENCY="4", MAX_RETRIES="1") as proxy:
        assert proxy.call("GET", "/metrics", key=None)[0] == 401
        for get in (proxy.chat, proxy.chat, proxy.stream):
            get()
        proxy.idle()  # a handler tells the counters after its answer is out
        zai.default = stream(say("Hi"), LONG_S)
        held = proxy.open_stream()
        assert eventually(lambda: readable(held))
        _, headers, text = proxy.call("GET", "/metrics")
        held.close()
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    types, samples = read_metrics(text)
    assert types == METRICS
    requests = samples["ztoapi_requests_total"]
    assert requests[("key", "#1"), ("model", "glm-4.6"), ("status", "200")] == 2
    assert requests[("key", "#1"), ("model", "glm-4.6"), ("status", "400")] == 1
    tokens = samples["ztoapi_tokens_total"]
    assert tokens[("key", "#1"), ("kind", "completion"), ("model", "glm-4.6")] == 2 * 185
    for name in ("unauthorized_total", "retries_total", "repaired_frames_total", "requests_in_flight"):
        assert samples["ztoapi_" + name] == {(): 1}
    assert samples["ztoapi_concurrency_ceiling"] == {(("key", "1"), ("model", "glm-4.6")): 4}
    assert 0 < samples["ztoapi_process_start_time_seconds"][()] <= time.time()


def test_stats_begin_empty(proxy):
    assert proxy.call("GET", "/stats", key=None)[0] == 401
    stats = proxy.call("GET", "/stats")[2]
    assert [stats[name] for name in ("in_flight", "served", "failed", "cancelled")] == [0] * 4
    assert (stats["queued"], stats["gates"], stats["tokens"], stats["trouble"]) == ({}, [], {}, [""])
    assert (stats["unauthorized"], stats["history"], stats["recent"], stats["demo"]) == (1, [0] * 60, [], False)


def test_stats_tell_the_page_what_is_going_on(zai):
    with proxying(zai, MAX_RETRIES="0") as proxy:
        for i in range(23):
            assert proxy.chat(model=f"m{i}", messages=[user("PROMPT")])[0] == 200
            proxy.idle()
        zai.scripts.append(refusal(400, "1210", "no such"))
        assert proxy.chat()[0] == 400
        proxy.idle()
        _, headers, stats = proxy.call("GET", "/stats")
    assert (headers["Cache-Control"], stats["version"]) == ("no-store", ztoapi.__version__)
    assert (stats["served"], stats["failed"], sum(stats["history"])) == (23, 1, 23 * 185)
    assert not re.search("PROMPT|Hello|The user", json.dumps(stats))
    assert len(stats["recent"]) == 20
    failed, served = stats["recent"][:2]
    assert set(failed) == {"time", "path", "key", "status", "error", "model", "by", "stream", "ttft", "total", "queue",
                           "in", "out", "retries", "changed", "repaired", "zai"}
    assert (failed["status"], "1210" in failed["error"]) == (400, True)
    assert [served[name] for name in ("path", "key", "model", "out", "error")] == [CHAT, "#1", "m22", 185, ""]


def test_a_learned_ceiling_shows(zai, soon_again, proxy):
    learned = proxy.server.upstream.gates.state
    zai.limit, zai.default = 2, stream(say("a"), lambda *_: eventually(lambda: learned()[0]), FINISH, DONE)
    together(*[proxy.chat] * 4)
    (key, model, ceiling), = proxy.call("GET", "/stats")[2]["gates"]
    text = proxy.call("GET", "/metrics")[2]
    assert (key, model, 1 <= ceiling <= 3) == (1, "glm-4.6", True)
    assert f'ztoapi_concurrency_ceiling{{key="1",model="glm-4.6"}} {ceiling}\n' in text


def test_stats_tell_what_is_wrong_with_each_of_our_keys_until_it_serves(zai):
    def trouble():
        return proxy.call("GET", "/stats")[2]["trouble"]

    with proxying(zai, ZAI_API_KEY="") as proxy:
        assert trouble() == [ztoapi.NO_KEY]
    with proxying(zai, ZAI_API_KEY="a-first-key,a-second-key") as proxy:
        for refused in (1, 2):
            zai.scripts.append(refusal(401, "1000", "Authentication Failed"))
            assert proxy.chat()[0] == 200
            words = f"Key #{refused}: Z.ai: Authentication Failed (code 1000). {ztoapi.OUR_KEY.advice}"
            assert trouble()[refused - 1] == words
        assert trouble()[0] == "", "it has served since"


# The page: the key is in it only if everybody knows it.

@table("environ,key,model", [
    ({"DEFAULT_KEY": "sk-your-key"}, "sk-your-key", "glm-4.7-flash"), ({}, "", "glm-4.7-flash"),
    ({"ZAI_BASE_URL": CODING}, "", "glm-4.7"),
])
def test_the_page_tells_its_key_and_model_and_runs_nothing_but_its_own(environ, key, model):
    with proxying(**environ) as proxy:
        reply = exchange(proxy, raw_request("GET", "/", auth=None))[0]
    page = reply.body.decode()
    assert f'<body data-key="{key}" data-model="{model}">' in page
    policy = reply.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        text, = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy


# Bugs of our own

@pytest.mark.parametrize("place,name,method,path,body", [
    (ztoapi, "listed_models", "GET", "/v1/models", None), (ztoapi.Metrics, "stats", "GET", "/stats", None),
    (ztoapi, "to_zai_request", "POST", CHAT, chat_body()), (ztoapi.Answer, "feed", "POST", CHAT, chat_body()),
])
# An OSError of our own must not pass for that of a client that left.
@pytest.mark.parametrize("bug", [boom, lambda *args, **kwargs: boom(error=OSError)])
def test_a_bug_is_one_500_and_one_traceback(proxy, monkeypatch, caplog, bug, place, name, method, path, body):
    with monkeypatch.context() as patch:
        patch.setattr(place, name, bug)
        status, headers, answer = proxy.call(method, path, body)
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert headers["x-request-id"] in answer["error"]["message"]
    assert "boom" not in str(answer)
    record, = [record for record in caplog.records if record.exc_info]
    assert headers["x-request-id"] in record.getMessage()
    assert proxy.call(method, path, body)[0] == 200, "it lives on"


def test_a_bug_during_a_stream_is_the_in_stream_error(zai, proxy, monkeypatch, caplog):
    tell, calls = ztoapi.Chat.tell, []

    def third_time(self, steps):
        calls.append(steps)
        return boom() if len(calls) == 3 else tell(self, steps)
    monkeypatch.setattr(ztoapi.Chat, "tell", third_time)
    told = [lambda *_, count=count: eventually(lambda: len(calls) >= count) for count in (1, 2)]
    zai.default = stream(say("ab"), told[0], say("cd"), told[1], say("ef"), FINISH, DONE)
    status, headers, events, clean = proxy.stream()
    check_failed(status, headers, events, clean)
    assert (said(events), events[-1]["error"]["code"]) == ("abcd", "internal_error")
    assert headers["x-request-id"] in events[-1]["error"]["message"]
    assert sum(bool(record.exc_info) for record in caplog.records) == 1
    monkeypatch.undo()
    assert proxy.chat()[0] == 200


# Server ###############################################################################

def test_stop_cuts_what_still_runs_after_the_grace(zai, brisk, proxy):
    zai.default = stream(say("Hel"), LONG_S)
    with proxy.open_stream() as sock:
        assert eventually(lambda: readable(sock))
        began = time.monotonic()
        proxy.server.stop(0.3)
        assert time.monotonic() - began >= 0.3
        _, _, events, clean = read_stream(sock)
        assert (said(events), clean) == ("Hel", False)
        assert eventually(lambda: zai.cut_by_client == 1)


def test_client_timeout_holds_while_the_server_drains(zai):
    with proxying(zai, CLIENT_TIMEOUT="0.3") as proxy, connect(proxy, raw_chat(JSON_CHAT)[:-5]):
        time.sleep(0.1)
        began = time.monotonic()
        proxy.server.stop(2 * LONG_S)
        assert time.monotonic() - began < LONG_S


def test_it_can_be_embedded_twice_in_one_process(zai):
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    threads = threading.active_count()
    common = {"port": 0, "default_key": (KEY,)}
    servers = [ztoapi.Server(ztoapi.Settings(zai_api_key=(ZAI_KEY,), zai_base_url=zai.url, **common)),
               ztoapi.Server(ztoapi.Settings(demo_mode=True, **common))]
    for server in servers:
        server.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    for server, text in zip(servers, (b"Hello", b"Demo")):
        reply = exchange(server, raw_chat(JSON_CHAT))[0]
        assert (reply.status, text in reply.body) == (200, True)
    for server in servers:
        server.stop()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port), 1)
    assert eventually(lambda: threading.active_count() <= threads + 1)
    assert handlers == [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]


@contextlib.contextmanager
def no_descriptor_left():
    """Nor one that only the garbage collector would close."""
    gc.collect()
    gc.disable()
    before = descriptors()
    try:
        yield
        assert len(descriptors()) <= len(before)
    finally:
        gc.enable()


# Rows: what happens to a server -> its steps; a number is slept.
@cases("steps", {
    "it never serves": ["stop"], "it is stopped before it serves": ["stop", "serve", "join"],
    "it is stopped while it begins": ["serve", "stop", "join"], "twice": ["serve", "stop", "stop", "join"],
    "and a moment later": ["serve", 0.001, "stop", "join"], "by two at once": ["serve", "both", "join"],
})
def test_a_server_can_be_stopped_at_any_time(steps, monkeypatch):
    failures = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    with no_descriptor_left():
        for _ in range(3):
            server = ztoapi.Server(ztoapi.Settings(port=0))
            server.SETTLE_S = 0
            thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            verbs = {"stop": lambda: server.stop(1), "serve": thread.start, "join": lambda: thread.join(LONG_S),
                     "both": lambda: together(*[lambda: server.stop(1)] * 2)}
            for step in steps:
                verbs[step]() if step in verbs else time.sleep(step)
            assert not thread.is_alive()
    assert failures == []


@pytest.mark.parametrize("host", ("no-such-host.invalid", "203.0.113.77", "a..b"))
def test_a_server_that_cannot_be_made_leaves_nothing_open(host):
    with no_descriptor_left(), pytest.raises((OSError, UnicodeError)):
        ztoapi.Server(ztoapi.Settings(port=0, host=host, default_key=(KEY,)))


@table("host", ["::", "[::]"])
def test_host_double_colon_serves_both_ip_versions(zai, host):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with proxying(zai, HOST=host) as proxy:
        for place in ("127.0.0.1", "::1"):
            with socket.create_connection((place, proxy.port), LONG_S) as sock:
                sock.sendall(SENTINEL)
                assert read_to_end(sock).startswith(b"HTTP/1.1 200"), place


# Bounds

def test_a_full_house_makes_room_for_a_newcomer_by_closing_who_has_idled_longest(zai):
    with proxying(zai, MAX_CONNECTIONS="3") as proxy:
        first, second, third = [hold(proxy, raw_request("GET", "/health")) for _ in range(3)]
        with first, second, third:
            first.sendall(raw_request("GET", "/health"))
            assert next_reply(first).status == 200
            proxy.idle()
            assert (proxy.chat()[0], read_to_end(second)) == (200, b"")
            assert not readable(first) and not readable(third)


def test_who_has_just_come_has_not_idled_longest(zai):
    with proxying(zai, MAX_CONNECTIONS="2") as proxy:
        with hold(proxy, raw_request("GET", "/health")) as idle, connect(proxy) as silent:
            assert (proxy.call("GET", "/health")[0], read_to_end(idle)) == (200, b"")
            assert not readable(silent)


def test_where_all_are_busy_a_503_can_be_read_and_the_rest_goes_on(zai, go, log_lines):
    with proxying(zai, MAX_CONNECTIONS="3") as proxy:
        busy = [proxy.open_stream() for _ in range(3)]
        assert eventually(lambda: all(map(readable, busy)))
        threads = threading.active_count()
        for _ in range(3):
            status, headers, body = proxy.chat()
            told = (status, body["error"]["code"], headers["Retry-After"], headers["Connection"])
            assert told == (503, "too_many_connections", "5", "close")
            assert headers["x-request-id"]
        assert threading.active_count() <= threads, "a refusal needs no thread"
        assert len(zai.requests) == 3
        go.set()
        for sock in busy:
            assert said(read_stream(sock)[2]) == "Hello"
        proxy.idle()
        assert proxy.chat()[0] == 200
        for sock in busy:
            sock.close()
    assert (len(log_lines(logging.WARNING)), log_lines(logging.ERROR)) == (3, [])


def test_where_no_thread_can_be_started_there_is_a_503(monkeypatch, log_lines, proxy):
    start = threading.Thread.start
    monkeypatch.setattr(ztoapi, "LINGER_S", 0.1)

    def fail(thread):
        if "process_request_thread" in str(getattr(thread, "_target", "")):
            raise RuntimeError("can't start new thread")
        start(thread)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        for _ in range(3):
            reply, = exchange(proxy, raw_request("GET", "/health"))
            assert (reply.status, reply.headers["Retry-After"]) == (503, "5")
    assert proxy.chat()[0] == 200
    assert (len(log_lines(logging.WARNING)), log_lines(logging.ERROR)) == (3, [])


def is_cut(proxy, first, drip, pause_s=0.05):
    """Whether a connection comes to an end that sends `first`, and then for ever `drip`."""
    until = time.monotonic() + LONG_S
    with connect(proxy, first) as sock, contextlib.suppress(ConnectionError):
        sock.settimeout(1)
        while time.monotonic() < until:
            try:
                sock.sendall(drip)
            except socket.timeout:
                # Behind a full window a client may not hear that it has been cut.
                if not proxy.server.connections:
                    return True
            if readable(sock) and not sock.recv(1):
                return True
            time.sleep(pause_s)
        return False
    return True


LONG_POST = raw_request("POST", CHAT, "Content-Length: 2000000000")

# Rows: where it drips -> what is sent first, what then drips, the seconds in between. A 413 would end the fast body,
# hence the large limit.
DRIPS = {
    "request line": (b"GET /", b"a"), "headers": (b"GET /health HTTP/1.1\r\n", b"X: y\r\n"),
    "one header": (b"GET /health HTTP/1.1\r\nX: ", b"y"), "body": (LONG_POST, b" "),
    "chunked body": (raw_chunks(), b"1\r\n \r\n"), "one chunk": (raw_chunks(b"fffff\r\n"), b" "),
    "chunk extension": (raw_chunks(b"1;"), b"x"), "nothing at all": (b"", b""),
    "a TLS hello": (b"\x16\x03\x01", b"\0"), "blank lines": (b"\r\n", b"\r\n"),
    "a body without pause": (LONG_POST, b" " * 1000, 0.0005),
    "a refused body": (raw_request("POST", CHAT, "Content-Length: 2000000000", auth=False), b" " * 65536, 0.0005),
}


def test_no_request_may_come_slowly_for_ever(zai, monkeypatch, log_lines):
    """Slowloris, in every part of a request, slow and fast."""
    for name, value in (("KEEP_ALIVE_S", 0.4), ("LINGER_S", 0.2), ("PATIENCE", 2)):
        monkeypatch.setattr(ztoapi, name, value)
    with proxying(zai, CLIENT_TIMEOUT="0.4", MAX_BODY_MB="2048") as proxy:
        before = threading.active_count()
        cut = together(*[lambda drip=drip: is_cut(proxy, *drip) for drip in DRIPS.values()])
        assert eventually(lambda: threading.active_count() <= before)
        assert eventually(lambda: served(proxy.port))
    assert [name for name, is_cut in zip(DRIPS, cut) if not is_cut] == []
    assert (zai.requests, log_lines(logging.ERROR)) == ([], [])


# Rows: a request of which a part comes late -> what comes before.
@cases("request_bytes, size", {
    "a head": (raw_request("GET", "/health"), 10), "a body": (raw_chat(JSON_CHAT), -10),
    "a chunked body": (raw_chunks(chunked(JSON_CHAT), END), -10),
})
def test_client_timeout_is_told_to_who_is_too_slow(zai, log_lines, request_bytes, size):
    with proxying(zai, CLIENT_TIMEOUT="0.2") as proxy:
        reply, = replies_in(talk(proxy, request_bytes[:size]))
        assert (reply.status, reply.headers["Connection"]) == (408, "close")
        assert "CLIENT_TIMEOUT (0.2 s)" in reply.error()["message"]
    assert re.search(r" 408 .*CLIENT_TIMEOUT \(0\.2 s\)", log_lines()[-1])


@pytest.mark.parametrize("seconds, status", ((590, 200), (610, 408)))
def test_a_body_may_take_ten_times_client_timeout_if_it_comes_steadily(zai, leap, seconds, status):
    with proxying(zai, CLIENT_TIMEOUT="60") as proxy, connect(proxy, raw_chat(JSON_CHAT)[:-10]) as sock:
        assert eventually(lambda: any(proxy.server.upstream.bodies.held.values()))
        leap(seconds)
        sock.sendall(JSON_CHAT[-10:-5])
        if status == 200:
            sock.sendall(JSON_CHAT[-5:])
        assert next_reply(sock).status == status


def test_who_goes_on_sending_what_was_refused_is_reset(zai, monkeypatch):
    """Behind a full window a client may not hear of a mere end."""
    monkeypatch.setattr(ztoapi, "LINGER_S", 0.1)
    with proxying(zai) as proxy, connect(proxy) as sock:
        with pytest.raises(ConnectionError):
            sock.sendall(raw_request("POST", CHAT, "Content-Length: 2000000000", auth=False))
            while True:
                sock.sendall(b" " * 65536)
        assert proxy.quiet()


def test_an_idle_connection_is_kept_for_keep_alive_seconds(zai, monkeypatch):
    with proxying(zai, CLIENT_TIMEOUT="1") as proxy:
        with hold(proxy, raw_request("GET", "/health")) as sock, sock.makefile("rb") as file:
            time.sleep(1.4)  # longer than a request may take, shorter than keep-alive
            monkeypatch.setattr(ztoapi, "KEEP_ALIVE_S", 0.2)
            sock.sendall(raw_request("GET", "/health"))
            assert (read_reply(file).status, file.read()) == (200, b"")


def test_a_full_descriptor_table_does_not_spin_and_heals(monkeypatch, proxy):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    accepts = []
    get_request = ztoapi.Server.get_request
    monkeypatch.setattr(ztoapi.Server, "get_request", lambda self: accepts.append(1) or get_request(self))
    with socket.socket() as sock:
        sock.settimeout(LONG_S)
        spare = [os.dup(0)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 20, limits[1]))
            with contextlib.suppress(OSError):
                while True:
                    spare.append(os.dup(0))
            sock.connect(("127.0.0.1", proxy.port))
            assert eventually(lambda: accepts)
            time.sleep(0.25)
            tries = len(accepts)
        finally:
            for fileno in spare:
                os.close(fileno)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert 0 < tries < 50
        sock.sendall(SENTINEL)
        assert read_to_end(sock).startswith(b"HTTP/1.1 200"), "who waited is served"


def test_quotes_of_a_client_are_bounded(log_lines, proxy):
    """An error names what was wrong, and the last twenty are kept; they must not keep megabytes."""
    choice = {"type": "function", "function": {"name": "n" * (4 << 20)}}
    body = json_chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice=choice)
    for _ in range(20):
        status, headers, answer = proxy.call("POST", CHAT, body)
        assert (status, len(str(answer)) < 2000) == (400, True)
    proxy.idle()
    assert len(str(proxy.call("GET", "/stats")[2])) < 20000
    assert max(map(len, log_lines())) < 2000


# The end

def test_requests_sent_before_the_end_are_answered(zai, monkeypatch, proxy):
    """Kept connections, new ones, and those in the backlog that nobody has accepted yet."""
    setup, settling = ztoapi.Handler.setup, threading.Event()

    def set_up_late(handler):
        settling.wait(LONG_S)
        setup(handler)

    def settle(server):
        """Instead of a tenth of a second: until all have been read."""
        settling.set()
        assert eventually(lambda: len(zai.requests) == 50)
        return 0
    kept = [hold(proxy, raw_request("GET", "/health")) for _ in range(10)]
    monkeypatch.setattr(ztoapi.Handler, "setup", set_up_late)
    new = [connect(proxy) for _ in range(40)]
    for sock in kept + new:
        sock.sendall(raw_chat(chat_body(stream=False)))
    assert ztoapi.Server.SETTLE_S == 0.1
    monkeypatch.setattr(ztoapi.Server, "SETTLE_S", property(settle))
    proxy.server.stop(30)
    for sock in kept + new:
        with sock:
            reply, = replies_in(read_to_end(sock))
        assert reply.status == 200
        assert reply.headers["Connection"] in ("close", None)


def test_stop_does_not_wait_for_idle_connections(proxy):
    with connect(proxy) as silent, hold(proxy, raw_request("GET", "/health")) as idle:
        idle.sendall(b"\r\n")
        began = time.monotonic()
        assert proxy.server.stop(2 * LONG_S)
        assert time.monotonic() - began < LONG_S
        assert read_to_end(silent) == b""


# Attacks ##############################################################################
#
# More of them stand where they belong: locked doors, nesting, drips, what shapes the log.

def test_attack_resets_at_every_byte_leave_nothing_behind(zai, log_lines, proxy):
    data = raw_chat(chat_body(stream=True))
    threads = threading.active_count()
    for i in [*range(0, len(data), 3), *[len(data)] * 20]:
        reset(connect(proxy, data[:i]))
    assert proxy.idle()
    zai.close()  # a thread of the fake waits at the other end of each kept connection
    assert eventually(lambda: threading.active_count() <= threads)
    assert not log_lines(logging.ERROR)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors")
def test_attack_a_flood_of_connections_beyond_the_limit_costs_no_threads_and_few_descriptors(zai, monkeypatch):
    monkeypatch.setattr(ztoapi, "LINGER_S", 0.2)
    zai.default = stream(say("Hel"), LONG_S)
    with proxying(zai, MAX_CONNECTIONS="1") as proxy:
        with proxy.open_stream() as busy:
            assert eventually(lambda: readable(busy))
            threads, before, most, socks = threading.active_count(), len(descriptors()), 0, []
            for _ in range(1000):
                socks.append(connect(proxy))
                most = max(most, len(os.listdir("/proc/self/fd")) - before - len(socks))
                if len(socks) > 100:
                    reset(socks.pop(0))
            assert threading.active_count() <= threads
            assert most <= 300
            assert len(zai.requests) == 1
        for sock in socks:
            sock.close()
        assert eventually(lambda: proxy.call("GET", "/health")[0] == 200)
        assert eventually(lambda: len(descriptors()) <= before + 2)


def test_attack_a_deaf_client_that_pipelines_is_dropped(zai):
    """It sends requests for ever and reads nothing: the answers fill the buffers, and then CLIENT_TIMEOUT is over."""
    with proxying(zai, CLIENT_TIMEOUT="0.2") as proxy, connect(proxy) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        until = time.monotonic() + LONG_S
        with pytest.raises(OSError):
            while time.monotonic() < until:
                sock.sendall(raw_request("GET", "/") * 50)
        assert proxy.idle()


WHOLE_REQUEST = raw_request("GET", "/v1/models").decode()
ONE_LINE = WHOLE_REQUEST.replace("\r\n", " ")


@table("data", [
    raw_chat(json_chat(messages=[user(WHOLE_REQUEST)])), raw_request("GET", "/health", "X: " + ONE_LINE),
    raw_request("GET", "/health?" + ONE_LINE.replace(" ", "%20")),
    raw_chunks(b"%x;%b\r\n%b\r\n" % (len(JSON_CHAT), ONE_LINE.encode(), JSON_CHAT), END),
])
def test_attack_a_request_inside_a_request_is_text(shared, data):
    assert statuses(shared, data) == [200, 200]


EVIL = "x\r\nX-Evil: 1\r\n\r\nHTTP/1.1 200 OK\r\n"


# Rows: what a client could split an answer's head with, the status it gets.
@table("data,status", [
    (raw_chat(json_chat(model=EVIL, store=True, user=EVIL, **{EVIL: 1})), 200),
    (raw_chat(json_chat(stream=True, model=EVIL)), 200),
    (raw_chat(json_chat(messages=[{"role": "user", "content": "Hi", EVIL: 1, "\u6f22\ud800": 1}])), 200),
    (raw_request("GET", "/v1/models/%0d%0aX-Evil:%201"), 404),
    (raw_request("GET", "/v1/models", "x-request-id: mine", "Origin: https://x\xff\x1b", "X-Evil: 1"), 200),
    (raw_request("OPTIONS", "/", "Access-Control-Request-Headers: a\xff\x1b, X-Evil"), 200),
])
def test_attack_a_client_cannot_write_our_headers(shared, data, status):
    evil_head = HEAD.replace(b"X-Log-Id: 2026", b"X-Log-Id: \x1b\xff<evil>\x85 2026")
    shared.zai.scripts.append([evil_head, *stream(*HEALTHY)[1:]])
    reply = exchange(shared, data)[0]
    shared.zai.scripts.clear()
    assert reply.status == status
    assert "X-Evil" not in reply.headers
    assert re.fullmatch("req_[0-9a-f]+", reply.headers["x-request-id"])
    fields = [(name, value) for name, value in reply.headers.items() if name != "Access-Control-Allow-Headers"]
    assert [(name, value) for name, value in fields if not re.fullmatch("[ -~]*", value)] == []


def test_attack_two_clients_never_see_each_others_answers(zai, proxy):
    """Many connections at once, kept alive and pipelined, each with a text of its own: the echo must match."""
    zai.default = lambda request: stream(say(request["body"]["messages"][0]["content"]), FINISH, DONE)
    seen = {}

    def client(number):
        for i in range(5):
            texts = [f"<{number}-{i}-{j}>" for j in range(3)]
            data = b"".join(raw_chat(json_chat(stream=text.endswith("1>"), messages=[user(text)])) for text in texts)
            for text, reply in zip(texts, exchange(proxy, data)):
                seen[text] = re.findall("<.*?>", reply.body.decode())
    together(*[lambda number=number: client(number) for number in range(8)])
    assert len(seen) == len(zai.requests) == 120
    assert {text: found for text, found in seen.items() if found != [text]} == {}


def test_a_path_of_64_kb_takes_no_time(proxy):
    with linear_time():
        for _ in range(6):
            assert proxy.call("GET", "/completions" * 5000 + "/x")[0] == 404


def test_attack_names_that_clients_make_up_are_not_kept(proxy):
    """A thousand different models and paths leave nothing behind that grows."""
    data = b""
    for i in range(200):
        data += raw_request("GET", f"/v1/models/m{i}") + raw_chat(json_chat(model=f"m{i}", n=2))
    assert statuses(proxy, data) == [404, 400] * 200 + [200]
    for i in range(30):
        assert proxy.chat(model=f"unknown-{i}")[0] == 200
    proxy.idle()
    assert len(str(proxy.call("GET", "/stats")[2])) < 20000
    assert "unknown-" not in proxy.call("GET", "/metrics")[2]
    assert proxy.gates() == []


# The fuzzer

PIECES = [b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\xff", b"%00", b"//", b"\r\n\r\n", END, b"HTTP/1.0", b"[",
          b"{", b'"', b"1e999", b"\\ud800"]
LINES = [
    b"Content-Length: 3", b"Content-Length: -1", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip",
    b"Expect: 100-continue", b"Connection: close", b"Host: evil", b"X: \xff\x1b", b" fold", b"X", b"Origin: x",
    b"Content-Type: multipart/mixed", b"Content-Encoding: gzip", b"Connection: upgrade", b"Upgrade: websocket",
    b"Range: bytes=0-1", b"Accept: application/json",
]
PLAIN_REQUESTS = [
    raw_request("GET", "/v1/models"), raw_request("HEAD", "/stats"), raw_request("GET", "/"),
    raw_request("GET", "/v1/models/GLM-4.6?x=%20", "Origin: https://x"),
    raw_request("GET", "/health", "Connection: close"),
    raw_request("OPTIONS", CHAT, "Origin: x", "Access-Control-Request-Headers: a"),
    raw_request("GET", "http://x/metrics", version="HTTP/1.0"), raw_chat(JSON_CHAT, "Expect: 100-continue"),
]


def scramble_bytes(rand, data):
    at = rand.randrange(len(data) + 1)
    size = rand.choice((1, 1, 2, 5, 30))
    before, piece, after = data[:at], data[at:at + size], data[at + size:]
    byte = bytes([rand.randrange(256)])
    return rand.choice((
        before, before + after, before + byte + piece[1:] + after, before + piece * rand.choice((2, 3, 101)) + after,
        before + rand.choice(PIECES) + piece + after,
    ))


def scramble_lines(rand, data):
    lines = data.split(b"\r\n")
    at = rand.randrange(len(lines))
    before, line, after = lines[:at], lines[at:at + 1], lines[at + 1:]
    return b"\r\n".join(rand.choice((
        [*before, rand.choice(lines), *line, *after], before + after, [*before, *line, rand.choice(LINES), *after],
        rand.sample(lines, len(lines)),
    )))


def odd_request(rand):
    """A good request, some of whose JSON is replaced."""
    body = dict(FULL_CHAT, stream=rand.random() < 0.5)
    for _ in range(rand.randrange(3)):
        body = mutated(body, rand)
    data = json.dumps(body).encode()
    if rand.random() < 0.5:
        return raw_chat(data)
    return raw_chunks(chunked(data[:40]), chunked(data[40:]), END)


def test_a_thousand_broken_requests_meet_no_hang_no_500_and_a_living_server(proxy, zai, log_lines):
    rand = random.Random(4)
    for case in range(1000):
        data = rand.choice(PLAIN_REQUESTS) if rand.random() < 0.6 else odd_request(rand)
        for _ in range(rand.choice((0, 1, 1, 2, 5))):
            scramble = scramble_bytes if rand.random() < 0.55 else scramble_lines
            data = scramble(rand, data)
        try:
            with connect(proxy, data + rand.choice((b"", b"", SENTINEL))) as sock:
                with contextlib.suppress(OSError):  # a refused request may be over by now
                    sock.shutdown(socket.SHUT_WR)  # one cut short must not wait for its rest
                got = read_to_end(sock)
        except socket.timeout:
            pytest.fail(f"case {case} hangs: {data!r}")
        assert got[:9] in (b"", b"HTTP/1.1 "), (case, data)
        assert not re.search(rb"HTTP/1\.1 500|internal_error", got), (case, data)
    assert not log_lines(logging.ERROR)
    assert len(zai.requests) > 50
    assert proxy.chat()[0] == 200


# Demo #################################################################################

def demo(text="Hi", **fields):
    """(deltas, thinking, text) of the demo's answer."""
    deltas = list(ztoapi.demo_deltas({"model": "glm-4.6", "messages": [user(text)], **fields}))
    return deltas, *["".join(delta.get(name, "") for delta in deltas) for name in ("reasoning_content", "content")]


DEMO_TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "required": ["city"]}}}
              for name in ("run_command", "get_weather")]


def test_the_demo_thinks_and_repeats_or_answers_in_json():
    _, thinking, text = demo("Hi there")
    assert "nothing to think" in thinking
    assert text.endswith("said: Hi there")
    _, thinking, text = demo("Hi\nthere", response_format={"type": "json_object"}, thinking={"type": "disabled"})
    assert (thinking, json.loads(text)) == ("", {"demo": True, "echo": "Hi\nthere"})


def test_the_demo_calls_only_the_tool_it_is_told_to_call_and_ends_a_loop():
    asked = demo("Please call get_weather", tools=DEMO_TOOLS)[0][-1]
    assert asked["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city":"demo"}'}
    messages = [user("call get_weather"), {"role": "tool", "content": "call get_weather: sunny"}]
    deltas, _, text = demo(messages=messages, tools=DEMO_TOOLS)
    assert "sunny" in text
    assert not any("tool_calls" in delta for delta in demo("rm -rf /", tools=DEMO_TOOLS)[0] + deltas)


def test_the_demo_is_a_whole_answer_to_a_client():
    with proxying(None, DEMO_MODE="true") as proxy:
        events = check_whole(*proxy.stream(stream_options={"include_usage": True}))
        assert said(events).endswith("said: Hi")
        assert finish_of(events) == ["stop"]
        assert events[-2]["usage"]["completion_tokens"] > 0
        _, _, answer = proxy.chat(tools=DEMO_TOOLS, messages=[user("call get_weather")])
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


# Check ################################################################################

OTHER_KEY = "fedcba9876543210.OtherOtherOther"


def check(capsys, **environ):
    """(exit status, stdout) of --check, which must come to an end by itself."""
    found, = together(lambda: run_main(capsys, "--check", **environ))
    assert found, "--check hangs"
    status, out, err = found
    assert "Traceback" not in err
    return status, out


def failures(out):
    return [line for line in out.splitlines() if line.startswith("FAIL")]


def failures_of(capsys, **environ):
    """What a --check says that must fail, and show no secret."""
    status, out = check(capsys, ZAI_API_KEY=ZAI_KEY, **environ)
    assert (status, [secret for secret in ("ZaiSecret", "hidden") if secret in out]) == (1, [])
    return failures(out)


def test_the_check_passes_in_the_demo(capsys):
    status, out = check(capsys, DEMO_MODE="true")
    assert (status, failures(out)) == (0, [])
    assert "DEMO_MODE=True" in out


def test_the_check_passes_where_one_key_of_two_is_good(zai, capsys):
    zai.scripts.extend([refusal(401, "1000"), stream(*HEALTHY)])
    other = {"DEFAULT_STREAM": "false", "HEARTBEAT": "0", "CORS_ORIGIN": "", "MODEL_ALIASES": "gpt-4o=glm-4.6"}
    status, out = check(capsys, ZAI_API_KEY=f"{ZAI_KEY},{OTHER_KEY}", ZAI_BASE_URL=zai.url, DEFAULT_KEY=KEY, **other)
    assert status == 0
    version = "Python %d.%d" % sys.version_info[:2]
    words = (version, "OpenSSL", "FAIL  key: ", "ok    chat: ", "first token", "Key #1 ...cret", *other)
    assert [word for word in words if word not in out] == []
    assert [secret for secret in (ZAI_KEY, KEY, "ZaiSecret", "OtherOther", "fedcba") if secret in out] == []
    assert keys_at(zai) == [ZAI_KEY, OTHER_KEY]


def test_the_check_names_a_short_key_by_its_position(zai, capsys):
    status, out = check(capsys, ZAI_API_KEY="short", ZAI_BASE_URL=zai.url)
    assert (status, "Key #1 ...\n" in out) == (0, True)


# What Z.ai does, a pattern of what the first FAIL says, UPSTREAM_TIMEOUT, which is short where Z.ai falls silent.
@cases("scripts,advice,patience", [
    *((*row, "300") for row in (
        ("bad key", [refusal(401, "1000", "Authentication failed " + ZAI_KEY)], "ZAI_API_KEY"),
        ("HTML", [answer(200, b"<html>portal</html>")] * 9, "ZAI_BASE_URL"),
        ("HTML 502", [answer(502, b"<html>Bad gateway</html>")] * 3, "502"),
        ("wrong path", [answer(200, {"code": 500, "msg": "404 NOT_FOUND", "success": False})] * 9, "ZAI_BASE_URL"),
        ("no money", [refusal(429, "1113", "Insufficient balance")] * 9, "Recharge|Coding Plan"),
        ("no model", [refusal(400, "1211", "Unknown Model")] * 9, "model"),
        ("no room", [refusal(429, "1302")] * 9, "chat with .*QUEUE_TIMEOUT"),
        ("cut", [stream(think("x"), CLOSE)] * 9, "cut|ended"))),
    ("silence", [[20]] * 3, "silent", "0.1"),
    ("silence in the answer", [stream(think("x"), LONG_S)] * 9, "silent|UPSTREAM_TIMEOUT", "0.5"),
])
def test_the_check_fails_with_one_sentence_on_what_to_do(zai, capsys, scripts, advice, patience):
    zai.scripts.extend(scripts)
    bounds = {"MAX_RETRIES": "0", "QUEUE_TIMEOUT": "0.1", "UPSTREAM_TIMEOUT": patience}
    assert re.search(advice, failures_of(capsys, ZAI_BASE_URL=zai.url, **bounds)[0])


# What the APIs of both places say of a key for the Coding Plan, the last line of the check.
@cases("refused,told", {
    "no balance": (refusal(429, "1113"), "fits ZAI_BASE_URL={coding}."),
    "refused": (refusal(401, "401"), "fits ZAI_BASE_URL={coding}."),
    "fits nowhere": (refusal(429, "1113"), "fits none of Z.ai's"),
})
def test_the_check_finds_the_base_url_that_a_key_fits(zai, capsys, monkeypatch, refused, told):
    def reply(request):
        return stream(*HEALTHY) if "coding" in request["path"] and "none" not in told else refused
    zai.default = reply
    bases = [zai.url, zai.url.replace("/api", "/mainland"), zai.url.replace("/paas", "/coding/paas")]
    monkeypatch.setattr(ztoapi, "ZAI_BASE_URLS", bases)
    status, out = check(capsys, ZAI_API_KEY=ZAI_KEY, ZAI_BASE_URL=zai.url)
    assert (status, ZAI_KEY in out) == (1, False)
    assert told.format(coding=bases[2]) in out.splitlines()[-1]


def test_the_check_shows_a_key_to_no_server_that_is_not_named(zai, capsys):
    zai.default = refusal(401, "401")
    assert (len(failures_of(capsys, ZAI_BASE_URL=zai.url)), len(zai.requests)) == (1, 1)


@pytest.mark.parametrize("script", (
    [HEAD, *[b"x", 0.1] * 300], [b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.1] * 300, stream(*[b": ping\n\n", 0.1] * 300),
), ids=("a drip", "interim answers", "comments"))
def test_the_check_ends_whatever_answers(zai, brisk, capsys, monkeypatch, script):
    monkeypatch.setattr(ztoapi, "CHECK_S", 0.2)
    zai.default = script
    assert failures_of(capsys, ZAI_BASE_URL=zai.url)


def test_the_check_tells_of_a_closed_port_and_first_of_a_missing_key(capsys, closed_port):
    url = f"http://127.0.0.1:{closed_port}"
    road, = failures_of(capsys, ZAI_BASE_URL=url)
    assert re.match("FAIL  TCP: .*HTTPS_PROXY", road)
    key, again = failures(check(capsys, ZAI_BASE_URL=url)[1])
    assert re.search("ZAI_API_KEY.*https://z.ai/", key)
    assert again == road


@pytest.mark.parametrize("text", [
    "http://127.0.0.1:abc", "127.0.0.1:99999", "http://[::1", "http:/me:hidden@host", "http://:80",
])
def test_an_address_of_a_proxy_that_is_not_valid_is_a_failure_of_the_check(capsys, monkeypatch, text):
    through(monkeypatch, "https", text)
    assert failures_of(capsys, ZAI_BASE_URL="https://127.0.0.2/api")[0].startswith("FAIL  proxy: ")


def test_the_check_says_where_certificates_come_from(untrusted, capsys, monkeypatch):
    assert re.match("FAIL  TLS: .*SSL_CERT_FILE", failures_of(capsys, ZAI_BASE_URL=untrusted.url)[0])
    monkeypatch.setenv("SSL_CERT_FILE", str(HERE / "no-such-file.pem"))
    assert re.match("FAIL  TLS: .*SSL_CERT_FILE", failures_of(capsys, ZAI_BASE_URL=untrusted.url)[0])


def test_the_check_can_be_told_on_a_console_that_knows_only_ascii(zai):
    zai.scripts.append(refusal(401, "1000", "\u8eab\u4efd\u9a8c\u8bc1\u5931\u8d25"))
    environ = dict(os.environ, PYTHONIOENCODING="ascii", ZAI_API_KEY=ZAI_KEY, ZAI_BASE_URL=zai.url)
    done = subprocess.run([sys.executable, "-S", "-B", ztoapi.__file__, "--check"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=LONG_S, env=environ)
    assert (done.returncode, b"FAIL" in done.stdout, done.stderr) == (1, True, b"")


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "no-such-host.invalid"])
def test_a_host_that_is_no_host_is_no_traceback(capsys, host):
    status, out, err = run_main(capsys, "--check", ZAI_API_KEY=ZAI_KEY, ZAI_BASE_URL=f"http://{host}/api")
    assert status in (1, 2)
    assert err.count("\n") == (status == 2)
    assert bool(failures(out)) == (status == 1)
    status, out, err = run_main(capsys, HOST=host, DEFAULT_KEY=KEY, PORT="0")
    assert (status in (1, 2), err.count("\n"), host in err) == (True, 1, True)


# Main #################################################################################

# Arguments and variables

def run_main(capsys, *argv, **environ):
    """(exit status, stdout, stderr) of main() in this process."""
    capsys.readouterr()
    status = ztoapi.main(environ, argv)
    return (status, *capsys.readouterr())


# One bad value of each variable's; BAD_SETTINGS has them all. Keys are refused too, but never shown.
@pytest.mark.parametrize("argv", [(), ("--check",)])
@pytest.mark.parametrize("variable,value", [
    *dict(BAD_SETTINGS).items(),
    ("PORT", "\udcff"),
    *(("DEFAULT_KEY", text) for text in ("", "two words", "schl\xfcssel", "a\nb")),
    *(("ZAI_API_KEY", text) for text in ("secret secret", "sec\r\nret")),
])
def test_a_bad_variable_is_one_line_and_exit_status_2(capsys, variable, value, argv):
    status, out, err = run_main(capsys, *argv, **{variable: value})
    assert (status, out, err.count("\n"), err[-1], variable in err) == (2, "", 1, "\n", True)
    if value.strip(" ,"):
        assert (ascii(value)[1:-1] in err) != variable.endswith("_KEY"), "a key is not shown, all else is"


@pytest.mark.parametrize("argument, told", [
    *((argument, ztoapi.__doc__.strip() + "\n") for argument in ("--help", "-h")),
    ("--version", f"ztoapi {ztoapi.__version__}\n")])
def test_help_is_the_docstring_and_the_version_one_line(capsys, argument, told):
    assert run_main(capsys, argument, PORT="bad", DEFAULT_KEY="") == (0, told, "")
    assert told.isascii()
    assert max(map(len, told.splitlines())) <= 120, "a screen"


@pytest.mark.parametrize("argv", [
    ["--nope"], ["serve"], ["--check", "--check"], ["--help", "x"], [""], ["--port", "80"], ["--version", "--help"],
    ["\udcff\n"],
])
def test_any_other_argument_is_one_line_and_exit_status_2(capsys, argv):
    status, out, err = run_main(capsys, *argv)
    assert (status, out, err.count("\n")) == (2, "", 1)


# Its life, in processes of its own

@contextlib.contextmanager
def program(*argv, **environ):
    """ztoapi as a process, with these variables alone. `.port`, `.lines`: what it said first; `.out`, `.err`: then."""
    process = start(*(argv or [ztoapi.__file__]), **dict({"PORT": "0"}, **environ))
    try:
        process.lines = [process.stdout.readline() for _ in range(3)]
        process.port = int(re.search(r"http://localhost:(\d+)/v1", process.lines[0]).group(1))
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.out, process.err = process.communicate(timeout=LONG_S)


def end(process, *signals):
    """The exit status after these signals, which must come soon."""
    for number in signals:
        process.send_signal(number)
    return process.wait(LONG_S)


RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
AUDITED = """
import os, sys
def hook(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    starts = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess")
    changes = ("os.mkdir", "os.remove", "os.rename", "tempfile")
    if writes and args[0] != os.devnull or event.startswith(starts + changes):
        print("AUDIT", event, args, file=sys.stderr, flush=True)
sys.addaudithook(hook)
""" + RUN


@posix_only
def test_it_serves_from_a_bare_environment_and_writes_and_starts_nothing():
    """python -I -S -B, no variables but two, a directory nobody can write to; an idle client is no reason to stay."""
    with program("-c", AUDITED, ztoapi.__file__, DEMO_MODE="1") as process:
        with connect(process, raw_request("GET", "/health")) as idle:
            assert eventually(lambda: readable(idle))
            replies = exchange(process, raw_chat(JSON_CHAT, auth="sk-your-key") + raw_request("GET", "/"))
            for reply, words in zip(replies, (b"Hi", b"<html")):
                assert (reply.status, words in reply.body) == (200, True)
            assert end(process, signal.SIGTERM) == 0
    assert process.lines[0].startswith("ZtoApi " + ztoapi.__version__)
    assert "DEMO" in process.lines[1]
    assert f"http://localhost:{process.port}/" in process.lines[2]
    assert process.out == "Stopped.\n"
    lines = process.err.splitlines()
    assert len(lines) >= 3
    assert [line for line in lines if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO req_", line)] == []


@posix_only
def test_the_start_lines_mask_keys_and_sigint_ends_it(zai):
    with program(ZAI_API_KEY=ZAI_KEY + ",short7", ZAI_BASE_URL=zai.url, DEFAULT_KEY=KEY) as process:
        with connect(process, raw_chat(JSON_CHAT)[:50]):  # half a request is nothing that runs
            assert exchange(process, raw_request("GET", "/health"))[0].status == 200
            assert end(process, signal.SIGINT) == 0
    text = "".join(process.lines)
    assert ("Traceback" in process.err, text.count("\n")) == (False, 3)
    assert [word for word in (zai.url, "models", ZAI_KEY[-4:], KEY[-4:]) if word not in text] == []
    assert [secret for secret in (ZAI_KEY, KEY, "short", "ZaiSecret") if secret in text] == []


@posix_only
@pytest.mark.parametrize("key, words", [
    ("", "403"), ("your-z.ai-key", "placeholder"), ("0123456789abcdef.SecretSecret1,<your-key>", "placeholder"),
])
def test_without_a_key_the_start_lines_warn(key, words):
    with program(ZAI_API_KEY=key) as process:
        assert end(process, signal.SIGTERM) == 0
    warning = process.lines[1]
    assert warning.startswith("WARNING")
    assert all(word in warning for word in (words, "ZAI_API_KEY", "https://z.ai/manage-apikey"))


def refused(port):
    try:
        socket.create_connection(("127.0.0.1", port), LONG_S).close()
    except OSError:
        return True
    return False


def served(port):
    """Whether it answers. That it listens alone does not mean that it minds signals yet."""
    with contextlib.suppress(OSError):
        return talk(types.SimpleNamespace(port=port), SENTINEL).startswith(b"HTTP/1.1 200 ")
    return False


@posix_only
def test_sigterm_lets_a_running_answer_finish_and_takes_no_new_one(zai, go):
    with program(ZAI_API_KEY=ZAI_KEY, ZAI_BASE_URL=zai.url, DEFAULT_KEY=KEY) as process:
        with connect(process, raw_chat(chat_body(stream=True))) as sock:
            assert eventually(lambda: readable(sock))
            process.send_signal(signal.SIGTERM)
            assert eventually(lambda: refused(process.port))
            assert process.poll() is None
            go.set()
            assert said(check_whole(*read_stream(sock))) == "Hello"
        assert end(process) == 0


@posix_only
def test_a_second_signal_ends_at_once(zai):
    zai.default = stream(say("Hel"), LONG_S)
    with program(ZAI_API_KEY=ZAI_KEY, ZAI_BASE_URL=zai.url, DEFAULT_KEY=KEY) as process:
        with connect(process, raw_chat(chat_body(stream=True))) as sock:
            assert eventually(lambda: readable(sock))
            process.send_signal(signal.SIGINT)
            assert eventually(lambda: refused(process.port))
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
            assert end(process, signal.SIGTERM) == 1
    assert ("Traceback" in process.err, process.out) == (False, "Stopped.\n")


@posix_only
@pytest.mark.parametrize("environ", [{"HOST": "203.0.113.77"}, {"HOST": "256.1.1.1"}, {"PORT": "taken"}])
def test_what_the_machine_refuses_is_one_line_and_exit_status_1(environ):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1]) if "PORT" in environ else "0"
        status, out, err = run(ztoapi.__file__, **dict(environ, PORT=port, DEFAULT_KEY=KEY))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert environ.get("HOST", port) in err
    assert "PORT" not in environ or re.search("in use.*set PORT= or HOST= to another", err)


@posix_only
def test_ctrl_c_ends_the_check_without_a_traceback():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it would be ignored
    with MuteListener() as mute:
        process = start(ztoapi.__file__, "--check", ZAI_API_KEY=ZAI_KEY, ZAI_BASE_URL=f"http://127.0.0.1:{mute.port}")
        assert mute.heard.wait(LONG_S)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LONG_S)
    assert (process.returncode, err) == (1, "")


def test_an_older_python_gets_one_line():
    ast.parse(PROGRAM, feature_version=(3, 7))
    _, *told = run("-c", "import sys; sys.version_info = (3, 7, 17)" + RUN, ztoapi.__file__)
    assert told == ["", "ztoapi: Python 3.8 or later is needed; this is 3.7\n"]


# Some Pythons are built without ssl.
WITHOUT_SSL = """
import sys
sys.modules["ssl"] = None
""" + RUN


def test_without_ssl_there_is_one_line_and_the_demo(closed_port):
    status, out, err = run("-c", WITHOUT_SSL, ztoapi.__file__, ZAI_API_KEY=ZAI_KEY)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "ssl" in err
    for words, environ in (("ok    chat", {"DEMO_MODE": "1"}), (
            "refused", {"ZAI_API_KEY": ZAI_KEY, "ZAI_BASE_URL": f"http://127.0.0.1:{closed_port}"})):
        assert words in run("-c", WITHOUT_SSL, ztoapi.__file__, "--check", **environ)[1]


def test_help_without_docstrings_is_one_line():
    status, out, err = run("-OO", ztoapi.__file__, "--help")
    assert (status, err, out.startswith("usage: ")) == (0, "", True)


@posix_only
def test_an_output_that_nobody_reads_ends_no_server(free_port):
    reader, writer = os.pipe()
    os.close(reader)
    environ = {"PORT": str(free_port), "DEMO_MODE": "1"}
    process = subprocess.Popen([sys.executable, "-I", "-B", ztoapi.__file__], env=environ, stdout=writer,
                               stderr=subprocess.PIPE, text=True)
    os.close(writer)
    try:
        assert eventually(lambda: served(free_port))
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG_S) == 0
    finally:
        process.kill()
        _, err = process.communicate(timeout=LONG_S)
    assert [line for line in err.splitlines() if " INFO req_" not in line] == []


LOW_LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (84, 84))
""" + RUN


@posix_only
def test_a_low_descriptor_limit_lowers_the_ceiling_and_is_said():
    pytest.importorskip("resource")
    with program("-c", LOW_LIMIT, ztoapi.__file__, MAX_CONNECTIONS="500") as process:
        # More than it has descriptors.
        held = [connect(process) for _ in range(150)]
        for sock in held:
            sock.close()
        assert eventually(lambda: served(process.port))
        assert end(process, signal.SIGTERM) == 0
    assert re.search(r"\b\d\d connections.*MAX_CONNECTIONS=500", process.err.splitlines()[0])
    assert "Traceback" not in process.err


def test_the_descriptor_limit_is_raised_as_far_as_it_goes(monkeypatch):
    resource = pytest.importorskip("resource")
    for limits, connections, allowed, raised in [
        ((256, 4096), 1000, 1000, (2064, 4096)), ((256, 1024), 1000, 480, (1024, 1024)),
        ((256, resource.RLIM_INFINITY), 1000, 1000, (2064, resource.RLIM_INFINITY)),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 1000, 1000, None),
        ((4096, 4096), 100, 100, None), ((10, 10), 100, 1, None),
    ]:
        asked = []
        monkeypatch.setattr(resource, "getrlimit", lambda which, limits=limits: limits)
        monkeypatch.setattr(resource, "setrlimit", lambda which, limits, asked=asked: asked.append(limits))
        assert ztoapi.raise_descriptor_limit(connections) == allowed
        assert asked == ([raised] if raised else [])


def test_windows_serves_at_most_500_connections(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert [ztoapi.raise_descriptor_limit(count) for count in (1024, 100)] == [500, 100]


# README ###############################################################################

ROW_OF_A_VARIABLE = re.compile(r"^\| `([A-Z_]+)` \| `([^`]*)` \|", re.MULTILINE)
ROW_OF_THE_DOCSTRING = re.compile(r"^ {4}([A-Z_]+) +(\S+)", re.MULTILINE)


def test_the_table_of_variables_in_readme_is_that_of_the_docstring():
    documented = dict(ROW_OF_THE_DOCSTRING.findall(ztoapi.__doc__))
    assert dict(ROW_OF_A_VARIABLE.findall(README)) == documented
    assert set(documented) == {field.name.upper() for field in dataclasses.fields(Settings)}


def test_the_defaults_that_are_documented_are_the_defaults():
    written = {name: text for name, text in ROW_OF_A_VARIABLE.findall(README) if text != "-"}
    assert Settings.from_environ(written) == Settings()


def test_readme_names_every_code_of_an_error():
    codes = {row.code for row in (*ztoapi.ZAI_ERRORS.values(), *ztoapi.HTTP_ERRORS.values())}
    assert [code for code in codes if f"`{code}`" not in README] == []


def test_the_models_in_readme_are_those_of_the_table():
    words = {"low, high, max": "always", "off, low, high, max": "graded", "off, on": "switch", "no switch": "no"}
    vision = re.split("[:,.] ", re.findall("^Vision: .*", README, re.MULTILINE)[0])
    told = [(name, words[thinking], bool(free), "V" in name or name in vision)
            for thinking, names in re.findall(r"^\| ([a-z, ]+) \| (GLM-.+) \|$", README, re.MULTILINE)
            for name, free in re.findall(r"([\w.-]+)(?: \((free)\))?", names)]
    assert sorted(told) == sorted((row.name, row.thinking, row.free, row.sees) for row in ztoapi.MODELS.values())
