"""Tests of ztoapi: `python -m pytest`. Also `python3 test_ztoapi.py bench` and `python3 test_ztoapi.py soak 120`.

The pure parts are tested by tables; the rest through real sockets, against a fake Z.ai whose every answer is a script: a list
of what it sends, sleeps and does. Z.ai's bytes are as they were captured (see each case).
"""

import ast
import asyncio
import collections
import contextlib
import copy
import dataclasses
import email.utils
import gc
import gzip
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
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zlib

import pytest

import ztoapi
from ztoapi import GIVE_UP, NEXT_KEY, SLOW_DOWN, TRY_AGAIN, ChunkTranslator, Settings, SSEDecoder, UpstreamError, zai_error

HERE = os.path.dirname(os.path.abspath(__file__))
KEY = "sk-test-0123456789"
ZAI_KEY = "0123456789abcdef0123.ZaiSecretZaiSecret"


# The fake Z.ai ########################################################################################################

RESET, CLOSE = "reset", "close"  # script steps; bytes are sent, numbers slept, callables called with the fake and the request
USAGE = {"prompt_tokens": 28, "completion_tokens": 185, "total_tokens": 213, "prompt_tokens_details": {"cached_tokens": 0},
         "completion_tokens_details": {"reasoning_tokens": 182}}


def event(delta=None, finish=None, usage=None, id="202607311536357f405a2f5c6b495d", **more):
    """One SSE event in Z.ai's dialect: no finish_reason until the end, no object key order of OpenAI's."""
    choice = {"index": 0, "delta": delta}
    if finish:
        choice = {"index": 0, "finish_reason": finish, "delta": delta if delta is not None else {"role": "assistant", "content": ""}}
    value = dict({"id": id, "created": 1785483395, "object": "chat.completion.chunk", "model": "glm-5.2", "choices": [choice]}, **more)
    if usage:
        value["usage"] = usage
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def say(text):
    return event({"role": "assistant", "content": text})


def think(text):
    return event({"role": "assistant", "reasoning_content": text})


def call(name="get_weather", arguments='{"city":"Paris"}', id="call_438b313737df40b7b2972a81", index=0):
    return event({"tool_calls": [{"id": id, "index": index, "type": "function", "function": {"name": name, "arguments": arguments}}]})


FINISH = event(finish="stop", usage=USAGE)
DONE = b"data: [DONE]\n\n"
HEALTHY = (think("The"), think(" user"), say("Hel"), say("lo"), FINISH, DONE)
HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream;charset=UTF-8\r\nX-Log-Id: 20260711073209851e7f8c12c44579\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n")
END = b"0\r\n\r\n"


def chunked(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def stream(*events, end=True):
    """A script: a streamed answer, an event a chunk, as Z.ai sends it."""
    return [HEAD] + [chunked(e) if isinstance(e, bytes) else e for e in events] + ([END] if end else [])


def answer(status, value, *headers):
    """A script: a whole answer."""
    body = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
    kind = "text/html" if body.startswith(b"<") else "application/json; charset=UTF-8"
    lines = ["HTTP/1.1 %d X" % status, "Content-Type: " + kind, "Content-Length: %d" % len(body), "X-Log-Id: 20260711073209851e7f8c12c44579", *headers]
    return [("\r\n".join(lines) + "\r\n\r\n").encode() + body]


def refusal(status, code, message="no"):
    return answer(status, {"error": {"code": code, "message": message}})


class FakeZai:
    """Plays `scripts`, one a request, then `default` for ever. `limit`: more requests in flight get a 1302."""

    def __init__(self, tls=None):
        self.scripts, self.default = collections.deque(), stream(*HEALTHY)
        self.requests, self.connections, self.cut_by_client, self.limit, self.refused = [], 0, 0, None, 0
        self.in_flight, self.most_in_flight, self.lock, self.tls = 0, 0, threading.Lock(), tls
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.socket.getsockname()[1]
        self.url = "http%s://%s:%d/api/paas/v4" % ("s" if tls else "", "localhost" if tls else "127.0.0.1", self.port)
        self.open = set()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                sock, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

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
        line = file.readline()
        if not line:
            return False
        headers = http.client.parse_headers(file)
        body = file.read(int(headers.get("Content-Length", 0)))
        method, path, _ = line.decode().split()
        request = {"method": method, "path": path, "headers": headers, "body": json.loads(body) if body else None}
        with self.lock:
            self.requests.append(request)
            self.in_flight += 1
            over = self.limit is not None and self.in_flight > self.limit
            self.refused += over
            if not over:
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
            script = refusal(429, "1302", "Rate limit reached for requests") if over else self.scripts.popleft() if self.scripts else self.default
        try:
            return self.play(sock, script(request) if callable(script) else script, request)
        finally:
            with self.lock:
                self.in_flight -= 1

    def play(self, sock, script, request):
        for step in script:
            if step == RESET:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            if step == CLOSE:
                return False
            if callable(step):
                step(self, request)
            elif isinstance(step, bytes):
                try:
                    sock.sendall(step)
                except OSError:
                    self.cut_by_client += 1
                    raise
            elif self.wait_for_cut(sock, step):
                self.cut_by_client += 1
                return False
        return True

    @staticmethod
    def wait_for_cut(sock, seconds):
        """Sleep; True as soon as the other side has closed."""
        sock.settimeout(seconds)
        try:
            return sock.recv(1) == b""
        except (socket.timeout, OSError) as error:
            return not isinstance(error, socket.timeout)
        finally:
            sock.settimeout(None)

    def close(self):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self.socket.close()
        for sock in list(self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def zai():
    fake = FakeZai()
    yield fake
    fake.close()


# The proxy under test #################################################################################################

class Proxy:
    """A ztoapi.Server in a thread, and the calls tests make to it."""

    def __init__(self, environ):
        self.settings = ztoapi.Settings.from_environ(environ)
        self.server = ztoapi.Server(self.settings)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def connect(self, timeout=10):
        sock = socket.create_connection(("127.0.0.1", self.port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def call(self, method, path, body=None, headers=(), key=KEY):
        """(status, headers, parsed JSON or text) over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = dict({"Authorization": "Bearer " + key} if key else {}, **dict(headers))
        data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        return response.status, response.headers, json.loads(text) if "json" in response.headers.get("Content-Type", "") and text else text

    def chat(self, headers=(), **fields):
        """A JSON answer: (status, headers, body)."""
        return self.call("POST", "/v1/chat/completions", chat_body(stream=False, **fields), headers)

    def open_stream(self, headers=(), **fields):
        """A raw socket with a streamed request sent; read it with read_stream() or recv()."""
        sock = self.connect()
        sock.sendall(raw_chat(dict(chat_body(stream=True, **fields)), headers))
        return sock

    def stream(self, headers=(), **fields):
        """A whole streamed answer: (status, headers, events, clean). Events are parsed, "[DONE]" and all; clean: the last chunk came."""
        with self.open_stream(headers, **fields) as sock:
            return read_stream(sock)

    def idle(self):
        """Nothing is in use any more: waits for it, as handler threads end a moment after their answers."""
        def busy():
            gates, queued = self.server.upstream.gates.state()
            return [gate for gate in gates if gate[3]], queued, self.server.watch.clients, self.server.busy, self.server.metrics.in_flight
        return eventually(lambda: not any(busy())) or pytest.fail("still in use: %r" % (busy(),))

    def stop(self):
        self.server.stop(2)
        self.thread.join(5)


def eventually(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def chat_body(**fields):
    return dict({"model": "GLM-4.6", "messages": [{"role": "user", "content": "Hi"}]}, **fields)


def raw_chat(body, headers=(), key=KEY):
    data = json.dumps(body).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Authorization: Bearer " + key, "Content-Type: application/json",
             "Content-Length: %d" % len(data), *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


def read_stream(sock):
    """(status, headers, events, clean) of the answer on a raw socket, which may be an error with a JSON body."""
    with sock.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = http.client.parse_headers(file)
        if headers.get("Transfer-Encoding") != "chunked":
            return status, headers, [json.loads(file.read(int(headers["Content-Length"])))], True
        decoder, text, clean = ztoapi.Dechunker(), b"", False
        while not clean:
            try:
                data = file.read1(65536)
            except OSError:
                break
            if not data:
                break
            text += decoder.feed(data)
            clean = decoder.done
    blocks = [block for block in text.decode().split("\n\n") if block]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks), blocks
    return status, headers, [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks], clean


def said(events, field="content"):
    """The text of a stream's deltas."""
    return "".join(e["choices"][0]["delta"].get(field) or "" for e in events if isinstance(e, dict) and e.get("choices"))


def finish_of(events):
    return [e["choices"][0]["finish_reason"] for e in events if isinstance(e, dict) and e.get("choices") and e["choices"][0]["finish_reason"]]


@contextlib.contextmanager
def proxying(zai=None, **environ):
    """A proxy in front of `zai`; afterwards it must be idle. Environment variables as keywords."""
    base = {"PORT": "0", "DEFAULT_KEY": KEY, "ZAI_API_KEY": ZAI_KEY, "ZAI_BASE_URL": zai.url if zai else "http://127.0.0.1:9/api/paas/v4"}
    proxy = Proxy(dict(base, **environ))
    try:
        yield proxy
        proxy.idle()
    finally:
        proxy.stop()


@pytest.fixture
def proxy(zai):
    with proxying(zai) as proxy:
        yield proxy


def test_what_stands_above_the_line_is_pure():
    """No socket, no clock, no environment, no logging before "I/O starts here"."""
    with open(ztoapi.__file__, encoding="utf-8") as file:
        source = file.read()
    pure = [node for node in ast.parse(source.split("I/O starts here")[0]).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    nodes = [node for part in pure for node in ast.walk(part)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.value.id + "." + node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    assert {"json", "json.loads", "re.fullmatch"} <= names  # the walk does see what is used
    assert not names & {"socket", "select", "ssl", "time", "datetime.datetime.now", "os.environ", "os.getenv", "sys", "threading", "signal",
                        "log", "logging", "open", "print"}


# Settings #############################################################################################################

DEFAULTS = {"PORT": 9090, "HOST": "127.0.0.1", "DEFAULT_KEY": ("sk-your-key",), "ZAI_API_KEY": (), "ZAI_BASE_URL": "https://api.z.ai/api/paas/v4",
            "DEFAULT_STREAM": True, "ENABLE_THINKING": None, "REASONING_FORMAT": "parsed", "MODEL_ALIASES": {}, "MAX_CONCURRENCY": 0,
            "QUEUE_TIMEOUT": 120, "MAX_RETRIES": 2, "HEARTBEAT": 10, "UPSTREAM_TIMEOUT": 300, "CLIENT_TIMEOUT": 60, "MAX_BODY_MB": 64,
            "MAX_CONNECTIONS": 1024, "CORS_ORIGIN": ("*",), "DEBUG_MODE": False, "DEMO_MODE": False}
BOOLEANS = ([(word, True) for word in ("true", "TRUE", "True", "1", "yes", "Yes", "on", "ON", " true ")]
            + [(word, False) for word in ("false", "FALSE", "0", "no", "No", "off", "Off")])
PAAS, CODING, BIG = "https://api.z.ai/api/paas/v4", "https://api.z.ai/api/coding/paas/v4", "https://open.bigmodel.cn/api/paas/v4"
GOOD_SETTINGS = [  # variable, text, what it means
    *((variable, text, value) for variable in ("DEFAULT_STREAM", "ENABLE_THINKING", "DEBUG_MODE", "DEMO_MODE") for text, value in BOOLEANS),
    ("PORT", "0", 0), ("PORT", "65535", 65535), ("PORT", " 8080 ", 8080),
    ("HOST", "0.0.0.0", "0.0.0.0"), ("HOST", "::", "::"), ("HOST", "localhost", "localhost"), ("HOST", "192.168.1.2", "192.168.1.2"),
    ("DEFAULT_KEY", "a", ("a",)), ("DEFAULT_KEY", " a , ,b,", ("a", "b")),
    ("ZAI_API_KEY", "id.secret", ("id.secret",)), ("ZAI_API_KEY", "id1.s1, id2.s2 ,", ("id1.s1", "id2.s2")),
    *(("ZAI_BASE_URL", base + end, base) for base in (PAAS, CODING, BIG, "http://127.0.0.1:8000", "http://[::1]:8000/v4")
      for end in ("", "/", "//", "/chat/completions", "/chat/completions/", " ")),
    *(("REASONING_FORMAT", text, text.lower()) for text in ("parsed", "raw", "hidden", "Raw", "HIDDEN")),
    ("MODEL_ALIASES", "gpt-4o=glm-4.6,gpt-4o-mini=glm-4.5-air", {"gpt-4o": "glm-4.6", "gpt-4o-mini": "glm-4.5-air"}),
    ("MODEL_ALIASES", " a = glm-4.6 , , *=GLM-4.5,", {"a": "glm-4.6", "*": "GLM-4.5"}),
    ("MAX_CONCURRENCY", "0", 0), ("MAX_CONCURRENCY", "7", 7), ("MAX_RETRIES", "0", 0), ("MAX_RETRIES", "5", 5),
    ("MAX_BODY_MB", "1", 1), ("MAX_CONNECTIONS", "1", 1),
    *((variable, text, value) for variable in ("QUEUE_TIMEOUT", "HEARTBEAT", "UPSTREAM_TIMEOUT", "CLIENT_TIMEOUT")
      for text, value in (("0.5", 0.5), ("7", 7), (" 2.5 ", 2.5))),
    ("QUEUE_TIMEOUT", "0", 0), ("HEARTBEAT", "0", 0),
    ("CORS_ORIGIN", "*", ("*",)), ("CORS_ORIGIN", "https://a.example, ,http://b.example:8080", ("https://a.example", "http://b.example:8080")),
]
BAD_SETTINGS = [
    *((variable, text) for variable in ("DEFAULT_STREAM", "ENABLE_THINKING", "DEBUG_MODE", "DEMO_MODE") for text in ("maybe", "2", "truely", "-1")),
    *(("PORT", text) for text in ("x", "-1", "65536", "80.0", "0x50", "8_0", "\u0668\u0660", "000000000000999999", "1" * 5000)),
    *((variable, text) for variable in ("MAX_CONCURRENCY", "MAX_RETRIES", "MAX_BODY_MB", "MAX_CONNECTIONS")
      for text in ("x", "-1", "1.5", "1e3", "+1")),
    ("MAX_BODY_MB", "0"), ("MAX_CONNECTIONS", "0"),
    *((variable, text) for variable in ("QUEUE_TIMEOUT", "HEARTBEAT", "UPSTREAM_TIMEOUT", "CLIENT_TIMEOUT")
      for text in ("x", "-1", "nan", "inf", "10s", "1,5", "1e400")),
    ("UPSTREAM_TIMEOUT", "0"), ("CLIENT_TIMEOUT", "0"),
    ("REASONING_FORMAT", "think"), ("REASONING_FORMAT", "parsed,raw"),
    *(("MODEL_ALIASES", text) for text in ("gpt-4o", "gpt-4o=", "=glm-4.6", "a=b,c")),
    *(("ZAI_BASE_URL", text) for text in ("api.z.ai", "ftp://api.z.ai", "file:///etc/passwd", "https://", "https:///v4", "https://api.z.ai:port",
                                          "https://api.z.ai:99999", "https://api.z.ai:0", "https://[::1", "https://a b", "https://api..z.ai",
                                          "https://api.z.ai/v4?x=1", "https://api.z.ai/v4#x",
                                          "https://api.z.ai/v4?", "https://api.z.ai/v4#", "https://api.z.ai/\u00e9",
                                          "https://api.z.ai/v4\nX: y")),
    ("HOST", "0.0.0.0\nPORT=1"), ("PORT", "90\r\n90"), ("REASONING_FORMAT", "ra\x1b[31mw"),
]


@pytest.mark.parametrize("variable, text, value", GOOD_SETTINGS)
def test_a_variable_means_what_the_table_says(variable, text, value):
    settings = Settings.from_environ(dict({"DEFAULT_KEY": KEY}, **{variable: text}))
    assert getattr(settings, variable.lower()) == value


def test_every_variable_has_its_default_and_an_empty_one_counts_as_unset():
    assert dataclasses.asdict(Settings.from_environ({})) == {variable.lower(): value for variable, value in DEFAULTS.items()}
    assert {row[0] for row in GOOD_SETTINGS} == set(DEFAULTS)
    for variable in set(DEFAULTS) - {"DEFAULT_KEY", "CORS_ORIGIN"}:
        for text in ("", "  "):
            assert Settings.from_environ({variable: text}) == Settings(), variable
    assert Settings.from_environ({"CORS_ORIGIN": ""}).cors_origin == ()
    assert Settings.from_environ({"UNHEARD_OF": "x", "PATH": "/bin"}) == Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1


@pytest.mark.parametrize("variable, text", BAD_SETTINGS)
def test_a_bad_value_gives_one_line_with_the_variable_the_value_and_what_is_allowed(variable, text):
    with pytest.raises(ztoapi.SettingsError) as caught:
        Settings.from_environ({variable: text})
    line = str(caught.value)
    assert line.startswith(variable) and ascii(text)[1:-1] in line and "allowed" in line and line.isprintable(), line


@pytest.mark.parametrize("text", ["", " ", ",", " , ,"])
def test_an_empty_default_key_is_refused(text):
    with pytest.raises(ztoapi.SettingsError, match="^DEFAULT_KEY.*allowed"):
        Settings.from_environ({"DEFAULT_KEY": text})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "127.0.0.1.example.org", "localhost.example.org", "1127.0.0.1"])
def test_the_well_known_key_stays_on_this_computer(host):
    for key in (None, "sk-your-key", "my-own-key,sk-your-key"):
        with pytest.raises(ztoapi.SettingsError, match="^HOST=.*DEFAULT_KEY"):
            Settings.from_environ(dict({"HOST": host}, **({"DEFAULT_KEY": key} if key else {})))
    assert Settings.from_environ({"HOST": host, "DEFAULT_KEY": "my-own-key"}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "LocalHost", "::1"])
def test_loopback_takes_the_well_known_key(host):
    assert Settings.from_environ({"HOST": host}).well_known


def test_keys_show_neither_in_repr_nor_in_complaints():
    secret = "Geheim1234567890"
    settings = Settings.from_environ({"DEFAULT_KEY": "sk-" + secret, "ZAI_API_KEY": "id.%s,id2.%s" % (secret, secret)})
    assert secret not in repr(settings) + str(settings)
    for environ in ({"DEFAULT_KEY": secret + "\u00e9"}, {"ZAI_API_KEY": "id.%s\x01" % secret}, {"ZAI_API_KEY": secret + " " + secret},
                    {"ZAI_API_KEY": secret, "PORT": "x"}, {"DEFAULT_KEY": "sk-your-key," + secret, "HOST": "0.0.0.0"}):
        with pytest.raises(ztoapi.SettingsError) as caught:
            Settings.from_environ(environ)
        assert secret not in str(caught.value) + repr(caught.value) and caught.value.__cause__ is None


# Errors ###############################################################################################################

CODES = [  # Z.ai's codes, the status and code of ours, what is done about it; issue 2's list first, the dialect sheet's table for the rest
    ("1113 1304 1308 1309 1310", 429, "insufficient_quota", {NEXT_KEY}),
    ("1314 1315 1316 1317 1318 1319 1320 1321", 429, "insufficient_quota", {NEXT_KEY, GIVE_UP}),
    ("1302", 429, "rate_limit_exceeded", {SLOW_DOWN}),
    ("1303", 429, "rate_limit_exceeded", {SLOW_DOWN, TRY_AGAIN}),
    ("1305 1312", 503, "overloaded", {TRY_AGAIN}),
    ("1120", 503, None, {TRY_AGAIN, GIVE_UP}),
    ("1210 1212 1213 1214 1215 1231", 400, None, {GIVE_UP}),
    ("1211 1221 1222", 404, "model_not_found", {GIVE_UP}),
    ("1261", 400, "context_length_exceeded", {GIVE_UP}),
    ("1301", 400, "content_filter", {GIVE_UP}),
    ("1220 1311 1313 1100 1300", 403, None, {GIVE_UP}),
    ("401 1000 1001 1002 1003 1004 1110 1111 1112 1121", 502, "upstream_auth_error", {NEXT_KEY}),
    ("500 1200 1230 1234", 502, "upstream_error", {TRY_AGAIN}),
    ("-1", 500, None, {TRY_AGAIN}),
]
CODE_ROWS = [(code, *rest) for codes, *rest in CODES for code in codes.split()]


def test_every_code_of_the_sheet_has_a_row():
    assert set(ztoapi.ZAI_ERRORS) == {row[0] for row in CODE_ROWS}


@pytest.mark.parametrize("code, status, our_code, verdicts", CODE_ROWS)
def test_the_business_code_decides_and_not_the_http_status(code, status, our_code, verdicts):
    for http_status, shown in itertools.product((200, 400, 401, 403, 429, 500, 503), (code, int(code))):
        error = zai_error({"error": {"code": shown, "message": "Z.ai's words."}}, http_status, now=0)
        assert (error.status, error.code if our_code else None) == (status, our_code) and error.verdict in verdicts
        assert "Z.ai's words." in error.message and code in error.message and error.zai_code == code
        assert isinstance(error.type, str) and isinstance(error.code, str) and set(error.body()["error"]) == {"message", "type", "param", "code"}
        headers = error.headers()
        if our_code in ("rate_limit_exceeded", "overloaded"):
            assert int(headers["Retry-After"]) >= 1 and "x-should-retry" not in headers
        if our_code == "insufficient_quota":
            assert headers["x-should-retry"] == "false"
        assert error.learn == (code == "1302")


def complaint(code, message="new", **more):
    return dict({"error": {"code": code, "message": message}}, **more)


AUTH, BROKEN, BAD_REQUEST = (502, "upstream_auth_error"), (502, "upstream_error"), (400, "invalid_value")
NO_MONEY, NO_MODEL, NO_ROOM = (429, "insufficient_quota"), (404, "model_not_found"), (429, "rate_limit_exceeded")
CAPTURED = [  # dialect 3.2: HTTP status, body, the status and code of ours, words that help
    (401, complaint("401", "令牌已过期或验证不正确"), AUTH, "ZAI_API_KEY"),
    (401, complaint("401", "token expired or incorrect"), AUTH, "ZAI_API_KEY"),
    (429, complaint("1113", "Insufficient balance or no resource package. Please recharge."), NO_MONEY, "Coding Plan"),
    (400, complaint("1211", "Unknown Model, please check the model code."), NO_MODEL, "GLM-4.6"),
    (400, complaint("1211", "模型不存在，请检查模型代码。"), NO_MODEL, "GLM-4.6"),
    (400, complaint("1214", "modelCode：不存在"), (400, None), ""),
    (400, complaint("1210", "Invalid API parameter, please check the documentation."), BAD_REQUEST, ""),
    (400, complaint("1210", "max_tokens参数非法：限制数值范围[1,131072]"), BAD_REQUEST, "[1,131072]"),
    (400, complaint("1210", "The temperature parameter is illegal.：限制数值范围[0,1]"), BAD_REQUEST, ""),
    (400, complaint("1210", "该模型始终思考，不支持关闭思考；请使用 low、high 或 max。"), BAD_REQUEST, ""),
    (400, complaint("1210", "messages.content.type 参数非法，取值范围 ['text']"), BAD_REQUEST, ""),
    (400, complaint("1213", "未正常接收到prompt参数。"), BAD_REQUEST, ""),
    (400, complaint("1214", "Incorrect role information"), BAD_REQUEST, ""),
    (400, complaint("1214", "messages 参数非法。请检查文档。"), BAD_REQUEST, ""),
    (400, complaint("1261", "Prompt exceeds max length"), (400, "context_length_exceeded"), ""),
    (400, complaint("1301", "System detected potentially unsafe or sensitive content", contentFilter=[{"level": 1, "role": "user"}]),
     (400, "content_filter"), ""),
    (429, complaint("1302", "High concurrency usage of this API, please reduce concurrency or contact customer service to increase limits"),
     NO_ROOM, ""),
    (429, complaint("1302", "Rate limit reached for requests", request_id="20260212064144579f5b8f457f4e06"), NO_ROOM, ""),
    (429, complaint("1305", "该模型当前访问量过大，请您稍后再试"), (503, "overloaded"), ""),
    (429, complaint("1308", "Usage limit reached for 5 hour. Your limit will reset at 2026-09-09 05:38:28"), NO_MONEY, ""),
    (429, complaint("1310", "Weekly/Monthly Limit Exhausted. Your limit will reset at 2026-05-11 21:02:26"), NO_MONEY, ""),
    (429, complaint("1311", "当前订阅套餐暂未开放GLM-5.2-Highspeed权限"), (403, None), ""),
    (500, complaint("1234", "网络错误，错误id：202602261029392bc0093d0e944297，请联系客服。"), BROKEN, ""),
    # Section 8, the Anthropic path's brackets
    (400, complaint("1211", "[1211][模型不存在，请检查模型代码。][20261009015533c889cdea19ff404c]"), NO_MODEL, ""),
    # Paths that are not there, and keys refused in HTTP 200
    (404, {"timestamp": "2026-08-13T04:35:22.960+00:00", "status": 404, "error": "Not Found", "path": "/v4/v1/chat/completions"},
     BROKEN, "ZAI_BASE_URL"),
    (200, {"code": 500, "msg": "404 NOT_FOUND", "success": False}, BROKEN, "ZAI_BASE_URL"),
    (200, {"code": 1000, "msg": "身份验证失败。", "success": False}, AUTH, "ZAI_API_KEY"),
    (200, {"code": 1001, "msg": "Header中未收到Authorization参数，无法进行身份验证。", "success": False}, AUTH, "ZAI_API_KEY"),
    (200, {"code": 401, "msg": "token expired or incorrect", "success": False}, AUTH, "ZAI_API_KEY"),
    # No JSON at all: an HTML page, a redirect
    *((status, None, BROKEN, str(status)) for status in (301, 302, 307, 308, 400, 403, 404, 405, 500, 502, 503, 504, 529)),
    *((status, None, BROKEN, "ZAI_BASE_URL") for status in (301, 302, 404, 405)),
    (401, None, AUTH, "ZAI_API_KEY"),
    # Unknown codes go by HTTP status
    *((status, complaint("1999"), expected, "1999") for status, expected in (
        (400, (400, None)), (401, AUTH), (403, (403, None)), (434, (403, None)), (429, NO_ROOM), (500, BROKEN), (200, BROKEN))),
    # Unknown shapes
    *((200, value, BROKEN, "") for value in ([], "x", 5, {}, {"detail": "x"}, {"error": None}, {"error": []}, {"error": {}},
                                             complaint(None, None), complaint([1], {"a": 1}))),
]


@pytest.mark.parametrize("status, body, expected, help", CAPTURED)
def test_what_zai_answered_becomes(status, body, expected, help):
    error = zai_error(body, status, now=1.7e9, model="glm-4.66")
    assert (error.status, error.code if expected[1] else None) == expected and help in error.message, error.message
    if isinstance(body, dict) and isinstance(body.get("error"), dict) and isinstance(body["error"].get("message"), str):
        assert body["error"]["message"] in error.message and body["error"]["code"] in error.message


def test_a_wrong_path_is_never_tried_again():
    for status, body in ((200, {"code": 500, "msg": "404 NOT_FOUND", "success": False}), (404, {"status": 404, "error": "Not Found"}), (404, None),
                         (301, None)):
        assert zai_error(body, status).verdict == GIVE_UP
    for status in (500, 502, 503, 504):
        assert zai_error(None, status).verdict == TRY_AGAIN


RESET_AT = 1788903508  # 2026-09-09 05:38:28 in Beijing


@pytest.mark.parametrize("message, now, asked, expected", [
    ("Usage limit reached for 5 hour. Your limit will reset at 2026-09-09 05:38:28", RESET_AT - 100, None, "100"),
    ("Usage limit reached for 5 hour. Your limit will reset at 2026-09-09 05:38:28", RESET_AT - 99.5, 7, "100"),
    ("Weekly/Monthly Limit Exhausted. Your limit will reset at 2026-09-09 05:38:28", RESET_AT + 5, None, "1"),
    ("Your limit will reset at 2026-13-45 05:38:28", RESET_AT, None, None),
    ("Your limit will reset at 2026-13-45 05:38:28", RESET_AT, 7, "7"),
    ("Usage limit reached", RESET_AT, None, None),
])
def test_retry_after_is_computed_from_the_reset_time_which_is_beijings(message, now, asked, expected):
    for code in ("1308", "1310"):
        error = zai_error({"error": {"code": code, "message": message}}, 429, now=now, retry_after=asked)
        assert error.headers().get("Retry-After") == expected and error.headers()["x-should-retry"] == "false"


@pytest.mark.parametrize("text, seconds", [
    ("7", 7.0), ("0", 0.0), ("Wed, 09 Sep 2026 05:38:28 GMT", 28800.0), ("Tue, 08 Sep 2026 21:38:28 GMT", 0.0), ("Mon, 07 Sep 2026 21:38:28 GMT", 0.0),
    ("", None), ("soon", None), ("-1", None), ("1.5", None), ("9999999", None), ("Wed, 99 Sep 2026 05:38:28 GMT", None), ("\u0667", None),
])
def test_retry_after_is_a_number_or_a_date(text, seconds):
    assert ztoapi.seconds_to_wait(text, RESET_AT) == seconds


def test_zais_own_retry_after_is_passed_on():
    error = zai_error({"error": {"code": "1302", "message": "x"}}, 429, now=0, retry_after=17)
    assert error.headers()["Retry-After"] == "17" and error.pause == 17


def test_an_error_is_openais_object():
    error = ztoapi.RequestError("No.", "messages[0].role")
    assert error.status == 400 and error.headers() == {}
    assert error.body() == {"error": {"message": "No.", "type": "invalid_request_error", "param": "messages[0].role", "code": "invalid_value"}}
    assert UpstreamError("x").body()["error"] == {"message": "x", "type": "upstream_error", "param": None, "code": "upstream_error"}


def test_no_key_survives_redaction():
    keys = ("0123456789abcdef.SecretSecret", "plain-key-without-a-dot")
    redact = ztoapi.Settings(zai_api_key=keys[:1], default_key=keys[1:]).redact
    for text in ("key 0123456789abcdef.SecretSecret refused", "id 0123456789abcdef", "secret SecretSecret",
                 "plain-key-without-a-dotplain-key-without-a-dot"):
        clean = redact(text)
        assert not any(part in clean for part in ("0123456789abcdef", "SecretSecret", "plain-key")), clean
    assert redact("nothing to hide") == "nothing to hide"
    odd = ("abcdefgh", "abcdefghijklmnop", "abc\\def'ghi\\jkl")
    redact = ztoapi.Settings(default_key=odd).redact
    assert redact("abcdefghijklmnop abcdefgh %s %a" % (odd[2], odd[2])) == '[redacted] [redacted] [redacted] "[redacted]"'
    assert ztoapi.mask(keys[0])[-4:] == "cret" and keys[0][:-4] not in ztoapi.mask(keys[0]) and "hor" not in ztoapi.mask("short")


# Models ###############################################################################################################

CATALOGUE = {  # dialect 6.2: id -> caps that are right, sees
    "glm-5.3": ({131072}, False), "glm-5.3-flash": ({131072}, True), "glm-5.3-flashx": ({131072}, True), "glm-5.2": ({131072}, False),
    "glm-5.1": ({131072}, False), "glm-5": ({131072}, False), "glm-5-turbo": ({131072}, False), "glm-5v-turbo": ({131072}, True),
    "glm-4.7": ({131072}, False), "glm-4.7-flashx": ({131072}, False), "glm-4.7-flash": ({131072}, False), "glm-4.6": ({131072}, False),
    "glm-4.5": ({98304, 131072}, False), "glm-4.5-x": ({98304, 131072}, False), "glm-4.5-air": ({98304}, False), "glm-4.5-airx": ({98304}, False),
    "glm-4.5-flash": ({98304}, False), "glm-4.6v": ({32768}, True), "glm-4.6v-flashx": ({32768}, True), "glm-4.6v-flash": ({32768}, True),
    "glm-4.5v": ({16384}, True), "glm-4.1v-thinking-flash": ({16384}, True), "glm-4.1v-thinking-flashx": ({16384}, True),
    "glm-4-flash-250414": ({16384}, False), "glm-4-flashx-250414": ({16384}, False), "glm-4v-flash": ({1024}, True), "glm-4-long": ({4095}, False),
    "glm-4-32b-0414-128k": ({16384}, False), "autoglm-phone-multilingual": ({None}, True),
}
STREAMS_TOOLS = {"glm-4.6", "glm-4.7", "glm-4.7-flash", "glm-4.7-flashx", "glm-5", "glm-5-turbo", "glm-5.1", "glm-5.2", "glm-5.3", "glm-5.3-flash",
                 "glm-5.3-flashx"}


def test_the_model_table_is_the_catalogue():
    assert set(ztoapi.MODELS) == set(CATALOGUE)
    for id, (caps, sees) in CATALOGUE.items():
        model = ztoapi.MODELS[id]
        assert model.id == id and model.max_tokens in caps and model.sees == sees and type(model.created) is int and model.created > 1.7e9, id
        assert model.tool_stream == (id in STREAMS_TOOLS), id
    for name in ("GLM-4.6", "GLM-4.5", "GLM-4.5-Air", "GLM-4.5V", "GLM-5.3-FlashX", "GLM-4.1V-Thinking-Flash"):
        assert ztoapi.MODELS[name.lower()].name == name


def test_aliases_are_listed_and_the_catch_all_is_not():
    listed = ztoapi.listed_models(Settings.from_environ({"MODEL_ALIASES": "gpt-4o=glm-4.6,mine=glm-9,*=glm-4.6"}))
    assert set(listed) == {model.name for model in ztoapi.MODELS.values()} | {"gpt-4o", "mine"}
    assert all(type(created) is int for created in listed.values())


@pytest.mark.parametrize("name, aliases, id", [
    ("GLM-4.6", "", "glm-4.6"), ("glm-4.6", "", "glm-4.6"), ("gLm-5.2[1m]", "", "glm-5.2"), (" GLM-4.5-Air ", "", "glm-4.5-air"),
    ("GLM-9-New", "", "glm-9-new"),
    ("gpt-4o", "gpt-4o=GLM-4.6", "glm-4.6"), ("GPT-4o", "gpt-4o=glm-4.6", "glm-4.6"), ("gpt-4o", "GPT-4O=glm-4.6", "glm-4.6"),
    ("gpt-4o[1m]", "gpt-4o=glm-5.2[1m]", "glm-5.2"), ("gpt-4", "gpt-4o=glm-4.6", "gpt-4"), ("glm-4.6", "glm-4.6=glm-5.2", "glm-5.2"),
    ("o1", "*=GLM-4.6", "glm-4.6"), ("GLM-4.5", "*=glm-4.6", "glm-4.5"), ("gpt-4o", "*=glm-4.6,gpt-4o=glm-4.5", "glm-4.5"),
    ("glm-9", "*=glm-4.6", "glm-4.6"),
])
def test_a_models_name_becomes_zais_id(name, aliases, id):
    settings = Settings.from_environ({"MODEL_ALIASES": aliases})
    assert ztoapi.zai_model_id(name, settings.model_aliases) == id
    assert ztoapi.to_zai_request(chat_body(model=name), settings)[0]["model"] == id


# OpenAI request -> Z.ai request #######################################################################################

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city",
                                         "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
TOOL2 = {"type": "function", "function": {"name": "get_time", "description": "Time", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\":\"Paris\"}"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
TEXT = {"type": "text", "text": "What is it?"}


def to_zai(request, **environ):
    """(zai_request, changed), where the request is left as it was and the answer can be sent."""
    before = copy.deepcopy(request)
    zai_request, changed = ztoapi.to_zai_request(request, Settings.from_environ(environ))
    assert request == before and json.loads(ztoapi.encode_json(zai_request)) == zai_request
    assert zai_request["stream"] is True and all(isinstance(name, str) and "," not in name for name in changed) and len(set(changed)) == len(changed)
    return zai_request, set(changed)


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


def said_by(role, **fields):
    return {"messages": [dict({"role": role}, **fields), {"role": "user", "content": "Hi"}]}


BAD_REQUESTS = [  # the fields that are wrong, the param of the 400
    *(({"model": value}, "model") for value in (None, "", "  ", 5, ["glm-4.6"], {}, True, "[1m]")),
    *(({"messages": value}, "messages") for value in (None, [], "Hi", {}, 5)),
    *(({"messages": [value]}, "messages[0]") for value in (None, "Hi", 5, [])),
    *(({"messages": [{"role": value, "content": "x"}]}, "messages[0].role") for value in (None, "", 5, "robot", "function", "User", ["user"])),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    *((said_by(role, content=value), "messages[0].content") for role in ("user", "system", "developer") for value in (None, 5, {}, True)),
    (said_by("tool", content=None, tool_call_id="c1"), "messages[0].content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"), ({"messages": [{"role": "system"}]}, "messages[0].content"),
    (said_by("assistant", content=5), "messages[0].content"), (said_by("assistant", reasoning_content=5), "messages[0].reasoning_content"),
    (said_by("tool", content="x"), "messages[0].tool_call_id"), (said_by("tool", content="x", tool_call_id=5), "messages[0].tool_call_id"),
    *((user([part]), "messages[0].content[0]") for part in (None, "x", 5, [])),
    *((user([TEXT, part]), "messages[0].content[1].type") for part in ({}, {"type": None}, {"type": 5}, {"type": "input_audio"}, {"type": "file"})),
    *((user([{"type": "text", "text": value}]), "messages[0].content[0].text") for value in (None, 5, [])),
    (user([{"type": "text"}]), "messages[0].content[0].text"),
    *((dict(user([TEXT, {"type": "image_url", "image_url": value}]), model="glm-4.5v"), "messages[0].content[1].image_url")
      for value in (None, 5, [])),
    *((dict(user([TEXT, {"type": "image_url", "image_url": value}]), model="glm-4.5v"), "messages[0].content[1].image_url.url")
      for value in ({}, {"url": 5})),
    (dict(said_by("system", content=[PICTURE]), model="glm-4.5v"), "messages[0].content[0]"),
    (user([TEXT, PICTURE]), "messages[0].content[1]"), (dict(user([PICTURE]), model="glm-5.2"), "messages[0].content[0]"),
    *((said_by("assistant", tool_calls=value), "messages[0].tool_calls") for value in ("x", {"a": 1}, 5)),
    (said_by("assistant", tool_calls=["x"]), "messages[0].tool_calls[0]"),
    (said_by("assistant", tool_calls=[dict(CALL, id=None)]), "messages[0].tool_calls[0].id"),
    (said_by("assistant", tool_calls=[CALL, dict(CALL, function=None)]), "messages[0].tool_calls[1].function"),
    (said_by("assistant", tool_calls=[dict(CALL, function={"arguments": "{}"})]), "messages[0].tool_calls[0].function.name"),
    (said_by("assistant", tool_calls=[dict(CALL, function={"name": "f", "arguments": 5})]), "messages[0].tool_calls[0].function.arguments"),
    *(({name: value}, name) for name in ("stream", "logprobs", "parallel_tool_calls", "enable_thinking", "do_sample", "tool_stream", "store")
      for value in ("true", 1, 0, [], {})),
    *(({name: value}, name) for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty") for value in ("1", True, [], {})),
    *(({name: value}, name) for name in ("n", "max_tokens", "max_completion_tokens", "top_logprobs", "seed") for value in ("1", True, 1.5, [], {})),
    *(({name: value}, name) for name in ("user", "user_id", "request_id") for value in (5, True, [], {})),
    *(({name: value}, name) for name in ("stream_options", "logit_bias", "response_format", "thinking", "metadata") for value in ("x", 5, True, [])),
    ({"n": 0}, "n"), ({"n": 2}, "n"), ({"n": 128}, "n"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": 2.01}, "temperature"), ({"top_p": -0.01}, "top_p"), ({"top_p": 1.01}, "top_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"), ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"top_logprobs": 21}, "top_logprobs"), ({"top_logprobs": -1}, "top_logprobs"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -5}, "max_tokens"), ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"stop": 5}, "stop"), ({"stop": {}}, "stop"), ({"stop": ["a", 5]}, "stop[1]"), ({"stop": ["a", None]}, "stop[1]"),
    ({"stop": list("abcde")}, "stop"),
    ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    *(({"reasoning_effort": value}, "reasoning_effort") for value in ("", "very", 5, True, "High")),
    *(({"reasoning_format": value}, "reasoning_format") for value in ("", "think", 5)),
    *(({"thinking": {"type": value}}, "thinking.type") for value in ("on", 5, True)),
    *(({"response_format": {"type": value}}, "response_format.type") for value in ("xml", 5, None)),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": "x"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}}, "response_format.json_schema.schema"),
    *(({"tools": value}, "tools") for value in ("x", {}, 5, [TOOL] * 129)),
    *(({"tools": [value]}, "tools[0]") for value in ("x", None, 5)),
    ({"tools": [{}]}, "tools[0].type"), ({"tools": [{"type": 5}]}, "tools[0].type"), ({"tools": [TOOL, {"type": "function"}]}, "tools[1].function"),
    *(({"tools": [{"type": "function", "function": {"name": value}}]}, "tools[0].function.name")
      for value in (None, "", 5, "get weather", "x" * 65, "wetter_für")),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": 5}}]}, "tools[0].function.description"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "tools[0].function.parameters"),
    *(({"tools": [TOOL], "tool_choice": value}, "tool_choice") for value in ("sometimes", "get_weather", 5, True, [])),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": 5}}}, "tool_choice.function.name"),
    ({"functions": [{"name": "f"}]}, "functions"),
]


@pytest.mark.parametrize("fields, param", BAD_REQUESTS)
def test_a_bad_request_is_a_400_that_names_the_parameter(fields, param):
    with pytest.raises(ztoapi.ApiError) as caught:
        to_zai(chat_body(**fields))
    error = caught.value
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", param), error.message
    assert isinstance(error.code, str) and error.message and len(error.message) < 500


def test_images_to_a_model_that_sees_none_are_refused_with_the_names_of_models_that_do():
    with pytest.raises(ztoapi.RequestError, match=r"GLM-4\.6 .*GLM-4\.6V"):
        to_zai(chat_body(**user([TEXT, PICTURE])))


def test_null_in_an_optional_field_counts_as_absent():
    plain = to_zai(chat_body())
    for name in list(ztoapi.FIELDS) + ["functions", "top_k", "web_search"]:
        assert to_zai(chat_body(**{name: None})) == plain, name
    nothing = {"tools": [dict(TOOL, function=dict(TOOL["function"], strict=None))], "stream_options": {"include_usage": None},
               "thinking": {"type": None}}
    assert to_zai(chat_body(**nothing)) == to_zai(chat_body(tools=[TOOL]))
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": None}}
    assert to_zai(chat_body(response_format=form))[0]["response_format"] == {"type": "json_object"}
    nothing = dict.fromkeys(("tool_calls", "reasoning_content", "name", "refusal", "audio", "function_call"))
    assert to_zai(chat_body(**said_by("assistant", content="x", **nothing))) == to_zai(chat_body(**said_by("assistant", content="x")))
    made = {"id": "c1", "type": None, "function": {"name": "get_weather", "arguments": None}}
    message = to_zai(chat_body(**said_by("assistant", tool_calls=[made])))[0]["messages"][0]
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ""}


@pytest.mark.parametrize("data, expected", [
    (b'{"a": 1}', {"a": 1}), (b'\xef\xbb\xbf{"a": 1}', {"a": 1}), (b' \r\n{"a":"\\u0000\\ud800\xe2\x80\xa8"}\n', {"a": "\0\ud800\u2028"}),
    (b'{"a": [1.5, -2e3, 12345678901234567890]}', {"a": [1.5, -2000.0, 12345678901234567890]}),
    *((data, ztoapi.RequestError) for data in (
        b"", b" ", b"null", b"[]", b"5", b'"x"', b"true", b"{", b"{'a': 1}", b'{"a": 1} x', b'{"a": 1}{"a": 1}', b'{"a": 01}', b"\xff\xfe{\0}\0",
        '{"a": "é"}'.encode("latin-1"), b'{"a": "\xed\xa0\x80"}', b"\x1f\x8b\x08\0", b"model=glm-4.6", b'{"a": NaN}', b'{"a": Infinity}',
        b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": -1e999}', b'{"a": ' + b"1" * 5000 + b"}", b'{"a": -' + b"1" * 5000 + b"}",
        b'{"a": ' + b"9" * 1000000 + b"}",
        b'{"a": ' + b"[" * 200000 + b"]" * 200000 + b"}", b'{"a":' * 200000 + b"1" + b"}" * 200000, b"[" * 200000)),
])
def test_a_body_is_a_json_object_or_a_400(data, expected):
    if isinstance(expected, dict):
        assert ztoapi.read_json_object(data) == expected
    else:
        with pytest.raises(expected) as caught:
            ztoapi.read_json_object(data)
        assert caught.value.status == 400 and caught.value.type == "invalid_request_error" and len(caught.value.message) < 300


@pytest.mark.parametrize("request_stream, accept, agent, default, expected", [
    (True, "application/json", "ai-sdk/6", False, True), (False, "text/event-stream", "curl/8", True, False),
    ("absent", "*/*", "curl/8.5.0", True, True), ("absent", "*/*", "curl/8.5.0", False, False), ("absent", "", "", True, True),
    ("absent", "application/json", "OpenAI/Python 3.54.0", True, False), ("absent", "Application/JSON", "OpenAI/JS 6.49.0", True, False),
    ("absent", "application/json, text/plain, */*", "axios/1.7", True, False), ("absent", "text/event-stream", "x", False, False),
    ("absent", "*/*", "ai/6.0.0 ai-sdk/provider-utils/4.0.0 runtime/node.js/22", True, False), ("absent", "*/*", "async-openai", True, False),
    (None, "*/*", "curl/8", True, True), (None, "application/json", "x", True, False), (None, "*/*", "curl/8", False, False),
])
def test_who_gets_a_stream(request_stream, accept, agent, default, expected):
    request = {} if request_stream == "absent" else {"stream": request_stream}
    assert ztoapi.wants_stream(request, accept, agent, default) is expected


S, U, DOT = {"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "user", "content": "."}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "20"}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
MESSAGES = [  # OpenAI's messages, Z.ai's, what was changed
    ([S, U], [S, U], set()),
    ([{"role": "developer", "content": "S"}, U], [S, U], {"developer"}),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}]}],
     [{"role": "user", "content": "a\nb"}], set()),
    *(([{"role": role, "content": PARTS, "tool_call_id": "c1"}, U],
       [dict({"role": role, "content": "a\nb"}, **({"tool_call_id": "c1"} if role == "tool" else {})), U], set())
      for role in ("system", "assistant", "tool")),
    *(([{"role": "user", "content": content}], [DOT], {"empty_message"})
      for content in ("", [], [{"type": "text", "text": ""}])),
    *(([dict({"role": "assistant", "tool_calls": [CALL]}, **content), RESULT, U],
       [{"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, U], set())
      for content in ({}, {"content": None}, {"content": ""}, {"content": []})),
    ([{"role": "assistant", "content": "a", "reasoning_content": "because"}, U],
     [{"role": "assistant", "content": "a", "reasoning_content": "because"}, U], set()),
    ([{"role": "assistant", "content": "a", "tool_calls": []}, U],
     [{"role": "assistant", "content": "a"}, U], set()),
    ([{"role": "assistant", "tool_calls": [dict(CALL, function={"name": "get_weather", "arguments": {"city": "Paris"}})]}, U],
     [{"role": "assistant", "content": "", "tool_calls": [CALL]}, U], set()),
    ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, U],
     [{"role": "assistant", "content": "No."}, U], set()),
    ([{"role": "user", "content": "U", "name": "bob"}], [U], {"name"}),
    ([S], [S, DOT], {"user_message"}),
    ([{"role": "assistant", "content": "A"}], [{"role": "assistant", "content": "A"}, DOT], {"user_message"}),
    ([U, {"role": "system", "content": "late"}, {"role": "system", "content": "later"}],
     [U, {"role": "system", "content": "late"}, {"role": "system", "content": "later"}], set()),
    ([{"role": "user", "content": "a\u2028b\0\U0001f600"}], [{"role": "user", "content": "a\u2028b\0\U0001f600"}], set()),
]


@pytest.mark.parametrize("messages, expected, changed", MESSAGES)
def test_messages_become(messages, expected, changed):
    zai_request, really = to_zai(chat_body(messages=messages))
    assert zai_request["messages"] == expected and really == changed


def test_images_reach_a_model_that_sees_and_always_with_a_text_beside_them():
    for model in ("GLM-4.5V", "glm-5.3-flash", "glm-unheard-of"):
        assert to_zai(dict(chat_body(model=model), **user([TEXT, PICTURE])))[0]["messages"] == [{"role": "user", "content": [TEXT, PICTURE]}]
        for parts in ([PICTURE], [PICTURE, {"type": "text", "text": ""}]):
            content = to_zai(dict(chat_body(model=model), **user(parts)))[0]["messages"][0]["content"]
            assert PICTURE in content and [part["text"] != "" for part in content if part["type"] == "text"] == [True]


def test_what_a_message_loses_is_listed():
    for name, value in (("refusal", "No."), ("audio", {"id": "a"}), ("function_call", {"name": "f", "arguments": "{}"})):
        zai_request, changed = to_zai(chat_body(**said_by("assistant", content="x", **{name: value})))
        assert name not in zai_request["messages"][0] and name in changed


ABSENT = "absent"
CHANGES = [  # OpenAI's fields, Z.ai's, what was changed
    ({"temperature": 0}, {"temperature": 0}, set()), ({"temperature": 1}, {"temperature": 1}, set()),
    ({"temperature": 0.7}, {"temperature": 0.7}, set()),
    ({"temperature": 1.01}, {"temperature": 1}, {"temperature"}), ({"temperature": 2}, {"temperature": 1}, {"temperature"}),
    ({"temperature": 0.333}, {"temperature": 0.33}, {"temperature"}),
    ({"top_p": 0.95}, {"top_p": 0.95}, set()), ({"top_p": 0}, {"top_p": 0.01}, {"top_p"}), ({"top_p": 0.005}, {"top_p": 0.01}, {"top_p"}),
    ({"top_p": 1}, {"top_p": ABSENT}, set()), ({"top_p": 0.999}, {"top_p": ABSENT}, {"top_p"}), ({"top_p": 0.123}, {"top_p": 0.12}, {"top_p"}),
    ({"max_tokens": 1}, {"max_tokens": 1}, set()), ({"max_tokens": 131072}, {"max_tokens": 131072}, set()),
    ({"max_tokens": 131073}, {"max_tokens": 131072}, {"max_tokens"}), ({"max_tokens": 10**30}, {"max_tokens": 131072}, {"max_tokens"}),
    ({"model": "glm-4.5-air", "max_tokens": 131072}, {"max_tokens": 98304}, {"max_tokens"}),
    ({"model": "glm-4v-flash", "max_tokens": 2000}, {"max_tokens": 1024}, {"max_tokens"}),
    ({"model": "glm-unheard-of", "max_tokens": 500000}, {"max_tokens": 500000}, set()),
    ({"max_completion_tokens": 100}, {"max_tokens": 100, "max_completion_tokens": ABSENT}, set()),
    ({"max_completion_tokens": 200000}, {"max_tokens": 131072}, {"max_tokens"}),
    ({"stop": "a"}, {"stop": ["a"]}, set()), ({"stop": ["a"]}, {"stop": ["a"]}, set()), ({"stop": list("abcd")}, {"stop": list("abcd")}, set()),
    ({"stop": []}, {"stop": ABSENT}, set()), ({"stop": ""}, {"stop": ABSENT}, set()),
    ({"user": "user-1"}, {"user_id": "user-1", "user": ABSENT}, set()), ({"user": "x" * 128}, {"user_id": "x" * 128}, set()),
    ({"user": "bob"}, {"user_id": ABSENT, "user": ABSENT}, {"user"}), ({"user": "x" * 129}, {"user_id": ABSENT, "user": ABSENT}, {"user"}),
    ({"n": 1}, {"n": ABSENT}, set()), ({"stream_options": {"include_usage": True}}, {"stream_options": ABSENT}, set()),
    ({"reasoning_format": "raw"}, {"reasoning_format": ABSENT}, set()), ({"parallel_tool_calls": False}, {"parallel_tool_calls": ABSENT}, set()),
    *(({name: value}, {name: ABSENT}, {name}) for name, value in (
        ("presence_penalty", 1), ("frequency_penalty", 0.5), ("logit_bias", {"1": 5}), ("logprobs", True), ("top_logprobs", 0),
        ("metadata", {"a": "b"}), ("store", True), ("service_tier", "auto"), ("prompt_cache_key", "x"), ("prompt_cache_retention", "24h"),
        ("safety_identifier", "x"),
        ("verbosity", "low"), ("prediction", {"type": "content", "content": "x"}), ("modalities", ["text"]))),
    *(({name: value}, {name: value}, set()) for name, value in (
        ("do_sample", False), ("request_id", "req-12345"), ("user_id", "user-1"), ("thinking", {"type": "enabled", "clear_thinking": False}),
        ("thinking", {"clear_thinking": False}), ("tool_stream", False), ("a_field_of_tomorrow", [1, {"a": None}]))),
    ({"response_format": {"type": "text"}}, {"response_format": ABSENT}, set()),
    ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}, set()),
    ({"tools": []}, {"tools": ABSENT, "tool_choice": ABSENT}, set()),
    ({"tools": [TOOL]}, {"tools": [TOOL]}, set()),
    ({"tools": [TOOL, TOOL2], "tool_choice": "auto"}, {"tools": [TOOL, TOOL2], "tool_choice": "auto"}, set()),
    ({"tools": [TOOL], "tool_choice": "none"}, {"tools": ABSENT, "tool_choice": ABSENT}, {"tool_choice"}),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]},
     {"tools": [{"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}}]}, set()),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": None, "parameters": None}}]},
     {"tools": [{"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}}]}, set()),
    ({"tools": [dict(TOOL, function=dict(TOOL["function"], strict=True))]}, {"tools": [TOOL]}, {"strict"}),
    ({"tools": [{"type": "web_search", "web_search": {"enable": True}}]}, {"tools": [{"type": "web_search", "web_search": {"enable": True}}]}, set()),
    ({"tools": [TOOL], "stream": True}, {"tool_stream": True}, set()),
    ({"tools": [TOOL], "stream": True, "tool_stream": False}, {"tool_stream": False}, set()),
    ({"tools": [TOOL], "stream": True, "model": "glm-4.5"}, {"tool_stream": ABSENT}, set()), ({"stream": True}, {"tool_stream": ABSENT}, set()),
    ({"tools": [TOOL], "stream": True, "tool_choice": "none"}, {"tool_stream": ABSENT}, {"tool_choice"}),
    ({"tools": [TOOL], "stream": False}, {"tool_stream": ABSENT}, set()),
]


@pytest.mark.parametrize("fields, expected, changed", CHANGES)
def test_fields_become(fields, expected, changed):
    zai_request, really = to_zai(chat_body(**fields))
    assert {name: zai_request.get(name, ABSENT) for name in expected} == expected and really == changed


def test_nothing_of_openais_that_zai_does_not_know_goes_out():
    everything = dict(chat_body(), **{name: value for fields, _, _ in CHANGES for name, value in fields.items() if name != "a_field_of_tomorrow"})
    assert set(to_zai(dict(everything, tools=[TOOL], tool_choice="auto"))[0]) <= {
        "model", "messages", "stream", "thinking", "reasoning_effort", "do_sample", "temperature", "top_p", "max_tokens", "tool_stream", "tools",
        "tool_choice", "stop", "response_format", "request_id", "user_id", "seed"}


@pytest.mark.parametrize("choice, left, told", [
    ("required", [TOOL, TOOL2], True), ({"type": "function", "function": {"name": "get_time"}}, [TOOL2], True),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_time"}}]}}, [TOOL2], False),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}}, [TOOL],
     True),
])
def test_a_forced_tool_choice_becomes_auto_with_fewer_tools_and_a_system_line(choice, left, told):
    messages = [S, U, {"role": "system", "content": "late"}]
    zai_request, changed = to_zai(chat_body(messages=messages, tools=[TOOL, TOOL2], tool_choice=choice))
    assert zai_request["tools"] == left and zai_request["tool_choice"] == "auto" and changed == {"tool_choice"}
    added = [message for message in zai_request["messages"] if message not in messages]
    assert [message["role"] for message in added] == ["system"] * told
    assert [message for message in zai_request["messages"] if message in messages] == messages
    assert not told or len(left) > 1 or left[0]["function"]["name"] in added[0]["content"]
    assert zai_request["messages"][0] == messages[0]  # the client's own prefix stays the prefix, for Z.ai's cache


def test_a_json_schema_becomes_json_object_with_the_schema_in_a_system_line():
    schema = {"type": "object", "properties": {"größe": {"type": "number"}}, "required": ["größe"]}
    zai_request, changed = to_zai(chat_body(response_format={"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}))
    assert zai_request["response_format"] == {"type": "json_object"} and changed == {"response_format"}
    line = zai_request["messages"][0]
    assert line["role"] == "system" and json.loads(line["content"][line["content"].index("{"):]) == schema and "größe" in line["content"]
    assert zai_request["messages"][1:] == [{"role": "user", "content": "Hi"}]


ALL_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
ON, OFF = {"type": "enabled"}, {"type": "disabled"}
GRADES = dict(zip(ALL_EFFORTS, ("low", "low", "low", "high", "high", "max", "max")))
FAMILIES = {  # models, what becomes of (on or off, effort): thinking, reasoning_effort
    "always": (["glm-5.3", "glm-5.3-flash", "GLM-5.3-FlashX"], lambda on, effort: (ON, GRADES.get(effort) if on else "low")),
    "graded": (["glm-5.2", "glm-5.2[1m]"], lambda on, effort: (ON, GRADES.get(effort)) if on else (OFF, None)),
    "switch": (["glm-5.1", "glm-5", "glm-5-turbo", "glm-4.7-flash", "glm-4.6", "glm-4.5", "glm-4.5-air", "glm-4.5v", "glm-4.6v", "glm-5v-turbo"],
               lambda on, effort: (ON if on else OFF, None)),
    "none": (["glm-4-flash-250414", "glm-4.1v-thinking-flash"], lambda on, effort: (None, None)),
}
WISHES = [  # what the request says, ENABLE_THINKING, the wish that wins (None: none was uttered), the effort that counts
    ({}, "", None, None), ({}, "true", True, None), ({}, "false", False, None),
    *(({"reasoning_effort": effort}, default, effort not in ("none", "minimal"), effort) for effort in ALL_EFFORTS
      for default in ("", "true", "false")),
    ({"thinking": ON}, "false", True, None), ({"thinking": OFF}, "true", False, None),
    ({"enable_thinking": True}, "false", True, None), ({"enable_thinking": False}, "true", False, None),
    ({"thinking": OFF, "reasoning_effort": "high"}, "", False, "high"), ({"thinking": ON, "reasoning_effort": "max"}, "", True, "max"),
    ({"enable_thinking": False, "reasoning_effort": "max"}, "", False, "max"),
    ({"enable_thinking": True, "reasoning_effort": "low"}, "", True, "low"),
    ({"thinking": ON, "enable_thinking": False}, "", True, None), ({"thinking": OFF, "enable_thinking": True}, "", False, None),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_thinking_is_asked_for_as_each_family_takes_it(family):
    models, rule = FAMILIES[family]
    for model, (fields, default, on, effort) in itertools.product(models, WISHES):
        zai_request, changed = to_zai(chat_body(model=model, **fields), ENABLE_THINKING=default)
        thinking, grade = rule(on, effort) if on is not None else (None, None)
        case = model, fields, default, zai_request, changed
        assert zai_request.get("thinking") == thinking and zai_request.get("reasoning_effort") == grade and "enable_thinking" not in zai_request, case
        if family == "always" and on is False:
            assert changed and changed <= (set(fields) or {"thinking"}), case  # it thinks all the same: somebody should know
        elif not fields or family == "graded" and set(fields) == {"reasoning_effort"} and GRADES[effort] == effort and on:
            assert not changed, case
        elif family == "none":
            assert changed == set(fields), case
        elif family == "switch" and on and effort:
            assert "reasoning_effort" in changed, case


def test_an_unknown_model_gets_the_thinking_that_was_asked_for():
    assert to_zai(chat_body(model="glm-9", thinking=OFF))[0]["thinking"] == OFF
    zai_request, changed = to_zai(chat_body(model="glm-9", reasoning_effort="medium"))
    assert (zai_request["thinking"], zai_request["reasoning_effort"], changed) == (ON, "medium", set())
    assert "thinking" not in to_zai(chat_body(model="glm-9"))[0] and to_zai(chat_body(model="glm-9"), ENABLE_THINKING="false")[0]["thinking"] == OFF


def test_clear_thinking_survives_whatever_else_is_said_about_thinking():
    for model, fields, expected in (("glm-4.6", {}, {}), ("glm-4.6", {"reasoning_effort": "high"}, ON),
                                    ("glm-5.2", {"reasoning_effort": "none"}, OFF), ("glm-4.7", {"enable_thinking": True}, ON)):
        zai_request, _ = to_zai(chat_body(model=model, thinking={"clear_thinking": False}, **fields))
        assert zai_request["thinking"] == dict(expected, clear_thinking=False)


ODD = (None, True, False, 0, -1, 1.5, 10**40, "", "x", "none", "\ud800\0", [], ["x"], [None], [[]], {}, {"type": "text"}, {"x": None})


def mutated(value, rng):
    """A deep copy in which one place holds something odd, or nothing."""
    value = copy.deepcopy(value)
    place, steps = value, rng.randrange(1, 8)
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        steps -= 1
        if not steps or not isinstance(place[key], (dict, list)) or not place[key]:
            break
        place = place[key]
    if rng.random() < 0.1:
        del place[key]
    else:
        place[key] = rng.choice(ODD)
    return value


def test_no_request_is_odd_enough_for_anything_but_a_400():
    rng = random.Random(5)
    whole = dict(chat_body(model="glm-4.5v"), tools=[TOOL, {"type": "web_search", "web_search": {}}],
                 tool_choice={"type": "function", "function": {"name": "get_weather"}},
                 response_format={"type": "json_schema", "json_schema": {"schema": {"a": 1}}}, thinking={"type": "enabled"}, reasoning_effort="high",
                 stop=["a"], user="somebody", stream_options={"include_usage": True}, temperature=1, top_p=0.5, max_tokens=5, stream=True, messages=[
                     {"role": "system", "content": [TEXT]}, {"role": "user", "content": [TEXT, PICTURE]},
                     {"role": "tool", "tool_call_id": "c1", "content": "x"},
                     {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [CALL]}])
    passed = 0
    for _ in range(3000):
        request = mutated(whole, rng)
        try:
            ztoapi.encode_json(ztoapi.to_zai_request(request, Settings())[0])
            passed += 1
        except ztoapi.ApiError as error:
            assert error.status == 400 and error.param, request
        except Exception as error:
            raise AssertionError(request) from error
    assert 300 < passed < 2700


# Bytes ################################################################################################################

def pieces_of(data):
    """Three ways to feed it: whole, byte by byte, and cut in two at every place."""
    yield [data]
    yield [data[i:i + 1] for i in range(len(data))]
    for i in range(1, len(data)):
        yield [data[:i], data[i:]]


@pytest.mark.parametrize("text, expected", [
    ("", {}), ("Host: a\r\n", {"host": "a"}), ("HOST:a\nX-Y_z:\t b c \t\r\n", {"host": "a", "x-y_z": "b c"}), ("X:\r\n", {"x": ""}),
    ("X: \xff\x01\r\n", {"x": "\xff\x01"}), ("X: a: b\r\n", {"x": "a: b"}),
    ("X: 1\r\nY: 2\r\nx: 3\r\nX: 4\r\n", {"x": "1, 3, 4", "y": "2"}), ("Connection: TE\r\nConnection: close\r\n", {"connection": "TE, close"}),
    *((text, 400) for text in (
        "X\r\n", "X : y\r\n", ": y\r\n", " X: y\r\n", "X: a\r\n b\r\n", "X: a\r\n\tb: c\r\n", "X: a\rb\r\n", "X: a\r\r\n", "X: a\0\r\n", "X(: y\r\n",
        "X\xc4: y\r\n", "\r\n", "X: a\r\n\r\nY: b\r\n", "Host: a\r\nHost: a\r\n", "host: a\r\nX: y\r\nHOST: b\r\n",
        "Content-Length: 5\r\ncontent-length: 5\r\n", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n")),
])
def test_the_fields_of_a_request_are_taken_to_the_letter(text, expected):
    try:
        assert ztoapi.parse_request_fields(text) == expected
    except ztoapi.RequestError as error:
        assert error.status == expected


@pytest.mark.parametrize("head, expected", [
    (b"HTTP/1.1 200 OK\r\n\r\n", ("HTTP/1.1", 200, {})), (b"HTTP/1.1 200\r\nA: b\r\n\r\n", ("HTTP/1.1", 200, {"a": "b"})),
    (b"HTTP/1.0 404 Not \xe4 Found\nA: b\nB:c\n\n", ("HTTP/1.0", 404, {"a": "b", "b": "c"})),
    (b"HTTP/1.1 200 OK\r\nA: 1\r\nno field\r\n folded: line\r\nA: 2\r\n\r\n", ("HTTP/1.1", 200, {"a": "1, 2"})),
    *((head, ValueError) for head in (b"\r\n\r\n", b"HTTP/2 200 OK\r\n\r\n", b"HTTP/1.1 20 OK\r\n\r\n", b"HTTP/1.1 200OK\r\n\r\n", b"HTTP/1.1  200 OK\r\n\r\n",
                                      b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b" HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 000 OK\r\n\r\n")),
])
def test_the_head_of_a_response_is_read_kindly(head, expected):
    try:
        assert ztoapi.parse_response_head(head) == expected
    except ValueError as error:
        assert type(error) is expected


def dechunk(decoder, pieces):
    """(body, done, rest), or the exception's class."""
    body = b""
    try:
        for i, piece in enumerate(pieces):
            body += decoder.feed(piece)
            if decoder.done:
                return body, True, decoder.rest + b"".join(pieces[i + 1:])
    except (ValueError, OverflowError) as error:
        return type(error)
    return body, decoder.done, decoder.rest if decoder.done else None


@pytest.mark.parametrize("data, expected", [
    (b"0\r\n\r\n", (b"", True, b"")),
    (b"5\r\nhello\r\n0\r\n\r\n", (b"hello", True, b"")),
    (b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\nGET /", (b"hello world", True, b"GET /")),
    (b"A\r\n0123456789\r\n00a\r\n\r\n\r\n\r\n\r\nab\r\n0000\r\n\r\n", (b"0123456789\r\n\r\n\r\n\r\nab", True, b"")),
    (b"5;name=value\r\nhello\r\n5 ; a=\"b\"\r\nworld\r\n0;x\r\n\r\n", (b"helloworld", True, b"")),
    (b"5\r\nhello\r\n0\r\nX-A: b\r\nX-C: d\r\n\r\nrest", (b"hello", True, b"rest")),
    (b"5\r\nhel", (b"hel", False, None)), (b"5\r\nhello\r\n", (b"hello", False, None)), (b"5\r\nhello\r\n0\r\n", (b"hello", False, None)),
    (b"14\r\n01234567890123456789\r\n0\r\n\r\n", (b"01234567890123456789", True, b"")),
    (b"15\r\n012345678901234567890\r\n0\r\n\r\n", OverflowError), (b"a\r\n0123456789\r\nb\r\n", OverflowError),
    (b"fffffffffffffff\r\n", OverflowError),
    *((data, ValueError) for data in (
        b"\r\n", b"x\r\n", b"-5\r\n", b"+5\r\n", b"0x5\r\n", b"5_0\r\n", b" 5\r\n", b"5 5\r\n", b"\xd9\xa5\r\n", b"5\n", b"5\nhello\r\n",
        b"5\r\nhelloX\r\n",
        b"5\r\nhello0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n", b"fffffffffffffffff\r\n", b"5;a\x00b\r\nhello\r\n", b"5;a\nb\r\nhello\r\n", b"5\rhello\r\n",
        b"0\r\nX: a\nb\r\n\r\n", b"0\r\nno field\r\n\r\n", b"0\r\n X: y\r\n\r\n", b"5;" + b"x" * 5000 + b"\r\nhello\r\n0\r\n\r\n")),
])
def test_chunked_coding_is_taken_strictly_however_it_arrives(data, expected):
    for pieces in pieces_of(data):
        assert dechunk(ztoapi.Dechunker(limit=20), pieces) == expected, pieces[:3]


def test_trailers_without_end_are_refused():
    decoder = ztoapi.Dechunker()
    decoder.feed(b"0\r\n")
    with pytest.raises(ValueError):
        for _ in range(1000):
            decoder.feed(b"X-Trailer: " + b"y" * 1000 + b"\r\n")


@pytest.mark.parametrize("length, data, expected", [
    (0, b"", (b"", True, b"")), (5, b"hello", (b"hello", True, b"")), (5, b"helloGET /", (b"hello", True, b"GET /")),
    (5, b"hel", (b"hel", False, None))])
def test_a_body_of_known_length_ends_there(length, data, expected):
    for pieces in pieces_of(data):
        assert dechunk(ztoapi.Counted(length), pieces) == expected


def decode_events(pieces, **options):
    """The events, or the class of the error."""
    decoder = SSEDecoder(**options)
    try:
        return [event for piece in pieces for event in decoder.feed(piece)] + decoder.close()
    except UpstreamError as error:
        return type(error)


SSE = [  # bytes, events
    (b"", []), (b"\n\n\n", []), (b"data: a\n\n", ["a"]), (b"data: a\n\ndata: b\n\n", ["a", "b"]),
    # The standard's own examples
    (b"data: YHOO\ndata: +2\ndata: 10\n\n", ["YHOO\n+2\n10"]),
    (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
     ["first event", "second event", " third event"]),
    (b"data\n\ndata\ndata\n\n", ["", "\n"]),
    (b"data:test\n\ndata: test\n\n", ["test", "test"]),
    # Line ends of all kinds, and those that are none
    (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]), (b"data: a\r\rdata: b\r\r", ["a", "b"]),
    (b"data: a\n\r\ndata: b\r\n\rdata: c\r\n\n", ["a", "b", "c"]),
    (b"data: a\r\ndata: b\rdata: c\n\r", ["a\nb\nc"]),
    ("data: a\u2028b\u2029c\u0085d\x0b\x0c\x1c\x1de\n\n".encode(), ["a\u2028b\u2029c\u0085d\x0b\x0c\x1c\x1de"]),
    # A last event without its blank line
    (b"data: a\n\ndata: b", ["a", "b"]), (b"data: a\n\ndata: b\n", ["a", "b"]), (b"data: a\r\n\r\ndata: b\r\n", ["a", "b"]),
    (b"data: a\r\rdata: b\r", ["a", "b"]),
    (b"data: a\n\ndata: [DONE]", ["a", "[DONE]"]),
    # Names, ids, comments and unknown fields are dropped
    (b"event: error\ndata: a\n\n", ["a"]), (b"id: 5\nretry: 10\ndata: a\nfoo: bar\n\n", ["a"]), (b": ping\n\n:\n\ndata: a\n\n: b", ["a"]),
    (b"event: ping\n\n", []),
    (b"datax: a\n\ndat: b\n\n data: c\n\n", []),
    # A byte order mark at the start
    (b"\xef\xbb\xbfdata: a\n\n", ["a"]), (b"\xef\xbb\xbfdata:  a\n\n", [" a"]),
    # A bare line that is JSON
    (b'data: a\n\n{"error":{"code":"500"}}\n', ["a", '{"error":{"code":"500"}}']),
    (b'data: a\n\n{"error":{"code":"500"}}', ["a", '{"error":{"code":"500"}}']),
    (b'{"error":1}\r\n\r\n', ['{"error":1}']), (b"<html>\n<body>502</body>\n", []),
    # Text is UTF-8; what is not becomes U+FFFD
    ("data: 好\U0001f600é\n\n".encode(), ["好\U0001f600é"]), (b"data: a\xffb\n\n", ["a\ufffdb"]),
    # Bounds: here 100 bytes
    (b"data: " + b"x" * 90 + b"\n\n", ["x" * 90]), (b"data: " + b"x" * 200 + b"\n\n", UpstreamError), (b"data: " + b"x" * 200, UpstreamError),
    (b"data: 123456789\n" * 20 + b"\n", UpstreamError), (b": " + b"x" * 200, UpstreamError),
    (b"data: " + b"x" * 90 + b"\n\ndata: " + b"y" * 90 + b"\n\n", ["x" * 90, "y" * 90]),
    (b"{" + b"x" * 200 + b"\n", UpstreamError),
]


@pytest.mark.parametrize("data, events", SSE)
def test_events_are_the_same_however_they_arrive(data, events):
    for pieces in pieces_of(data):
        assert decode_events(pieces, limit=100) == events, pieces[:3]


def test_an_event_may_have_16_mib():
    text = b"x" * (1 << 20)
    assert decode_events([b"data: "] + [text] * 15 + [b"\n\n"]) == ["x" * (15 << 20)]
    decoder = SSEDecoder()
    with pytest.raises(UpstreamError):  # as soon as it is known, not at its end
        for piece in [b"data: "] + [text] * 17:
            decoder.feed(piece)


def test_events_are_encoded_as_one_line_of_utf_8():
    assert ztoapi.encode_event({"error": {"message": "好\u2028\n"}, "b": 1}) == 'data: {"error":{"message":"好\u2028\\n"},"b":1}\n\n'.encode()
    ztoapi.encode_event({"a": "\ud800 \udfff"}).decode("utf-8")  # a lone surrogate must not break the stream


# Z.ai response -> OpenAI response #####################################################################################

WEATHER = {"get_weather": TOOL["function"]["parameters"], "get_time": {"type": "object", "properties": {}}}
DETAILS = {"prompt_tokens": 28, "completion_tokens": 185, "total_tokens": 213, "prompt_tokens_details": {"cached_tokens": 0},
           "completion_tokens_details": {"reasoning_tokens": 182}}


def says(content="", reasoning="", calls=(), finish="stop", usage=DETAILS):
    return {"content": content, "reasoning": reasoning, "calls": [(name, arguments) for name, arguments in calls], "finish": finish, "usage": usage}


def translator(**options):
    counter = itertools.count(1)
    return ChunkTranslator(new_id=lambda: "call_new%d" % next(counter), **options)


def events_of(data):
    """The events in an answer's bytes; a whole JSON body counts as one, as it does for the proxy."""
    return [data.decode()] if data.startswith(b'{"c') or data == b"{}" else decode_events([data])


def translated(data, **options):
    """The chunks of an answer that came as these bytes."""
    this = translator(**options)
    return [chunk for text in events_of(data) for chunk in this.feed(text)] + list(this.close())


def folded_stream(chunks):
    """What a client makes of the SSE text of these chunks; on the way every rule of the wire is checked."""
    envelope = ztoapi.Envelope("chatcmpl-1", 1790000000, "GLM-4.6", include_usage=True)
    blocks = (envelope.opening() + envelope.heartbeat() + envelope.encode(chunks)).split("\n\n")
    assert blocks.pop() == "" and blocks.pop() == "data: [DONE]" and all(block.startswith("data: ") and "\n" not in block for block in blocks)
    values = [json.loads(block[6:]) for block in blocks]
    assert {(v["id"], v["created"], v["model"], v["object"]) for v in values} == {("chatcmpl-1", 1790000000, "GLM-4.6", "chat.completion.chunk")}
    usage = values.pop()["usage"] if values[-1]["choices"] == [] else None
    assert all(v["usage"] is None and len(v["choices"]) == 1 and v["choices"][0]["index"] == 0 for v in values)
    finishes = [v["choices"][0]["finish_reason"] for v in values]
    assert finishes[-1] in ("stop", "length", "tool_calls",
                            "content_filter") and not any(finishes[:-1]) and "finish_reason" in values[0]["choices"][0]
    deltas = [v["choices"][0]["delta"] for v in values]
    assert deltas[0] == {"role": "assistant", "content": ""} and not any("role" in delta for delta in deltas[1:]) and deltas[-1] == {}
    texts, calls = {"content": "", "reasoning_content": ""}, []
    for delta in deltas:
        assert set(delta) <= {"role", "content", "reasoning_content", "tool_calls"} and len(delta) == 1 or delta in (deltas[0], {}), delta
        for name in texts:
            texts[name] += delta.get(name, "")
        for item in delta.get("tool_calls", ()):
            function = item["function"]
            assert isinstance(function["arguments"], str)
            if item["index"] == len(calls):
                assert set(item) == {"index", "id", "type", "function"} and set(function) == {"name", "arguments"} and item["type"] == "function"
                assert isinstance(item["id"], str) and item["id"] and isinstance(function["name"], str) and function["name"]
                calls.append({"id": item["id"], "name": function["name"], "arguments": ""})
            else:
                assert set(item) == {"index", "function"} and set(function) == {"arguments"} and 0 <= item["index"] < len(calls)
            calls[item["index"]]["arguments"] += function["arguments"]
    return texts["content"], texts["reasoning_content"], calls, finishes[-1], usage


def folded_json(chunks):
    """The same of the JSON answer, whose shape is checked to the letter."""
    answer = ztoapi.Envelope("chatcmpl-1", 1790000000, "GLM-4.6").completion(*ztoapi.collect_completion(chunks))
    assert {name: answer[name] for name in ("id", "object", "created", "model")} == {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1790000000, "model": "GLM-4.6"} and set(answer) <= {"id", "object", "created",
                                                                                                                        "model", "choices", "usage"}
    (choice,) = answer["choices"]
    message = choice["message"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"} and choice["index"] == 0 and choice["logprobs"] is None
    assert message["role"] == "assistant" and message["refusal"] is None and set(message) <= {"role", "content", "refusal", "reasoning_content",
                                                                                              "tool_calls"}
    assert isinstance(message["content"], str) or message["tool_calls"]
    calls = message.get("tool_calls", [])
    assert all(set(call) == {"id", "type", "function"} and call["type"] == "function" and set(call["function"]) == {"name", "arguments"}
               for call in calls)
    return (message["content"] or "", message.get("reasoning_content", ""), [dict(id=call["id"], **call["function"]) for call in calls],
            choice["finish_reason"], answer.get("usage"))


def check_answer(data, expected, **options):
    """The answer is as expected, and the streamed and the JSON one agree; gives its calls."""
    content, reasoning, calls, finish, usage = folded = folded_stream(translated(data, **options))
    assert folded_json(translated(data, restartable=True, **options)) == folded
    assert len({call["id"] for call in calls}) == len(calls)
    assert says(content, reasoning, [(call["name"], call["arguments"]) for call in calls], finish, usage) == expected
    return calls


def as_events(*values):
    return b"".join(value if isinstance(value, bytes) else b"data: " + json.dumps(value).encode() + b"\n\n" for value in values)


def calls_in(*items, finish=None, **delta):
    """An event with these items as its tool calls."""
    return event(dict(delta, tool_calls=list(items)), finish)


def item(name=None, arguments=None, **more):
    function = dict({} if name is None else {"name": name}, **({} if arguments is None else {"arguments": arguments}))
    return dict(more, function=function)


def finished(finish, usage=USAGE):
    return event(finish=finish, usage=usage) + DONE


def called(*calls, **more):
    return says(**dict({"calls": calls, "finish": "tool_calls"}, **more))


def counts(prompt, completion, total, cached=None, reasoning=None):
    """A usage object."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}
    usage.update({} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}})
    return dict(usage, **({} if reasoning is None else {"completion_tokens_details": {"reasoning_tokens": reasoning}}))


ENDED, TOOLS_END = finished("stop"), finished("tool_calls")
PARIS = '{"city":"Paris"}'
WHOLE, TIME = ("get_weather", PARIS), ("get_time", "{}")

# Verbatim from the dialect sheet, sections 1 and 2
GLM_52_TOOLS = rb"""data: {"id":"20260813125025af371d7f88184d47","created":1786596625,"object":"chat.completion.chunk","model":"glm-5.2",
"choices":[{"index":0,"delta":{"role":"assistant","reasoning_content":"The"}}]}

data: {"id":"20260813125025af371d7f88184d47","created":1786596625,"object":"chat.completion.chunk","model":"glm-5.2","choices":[{"index":0,
"delta":{"role":"assistant","reasoning_content":" user"}}]}

data: {"id":"20260813125025af371d7f88184d47","created":1786596625,"object":"chat.completion.chunk","model":"glm-5.2","choices":[{"index":0,
"delta":{"tool_calls":[{"id":"call_438b313737df40b7b2972a81","index":0,"type":"function","function":{"name":"get_weather",
"arguments":"{\"city\":\"Paris\"}"}}]}}]}

data: {"id":"20260813125025af371d7f88184d47","created":1786596625,"object":"chat.completion.chunk","model":"glm-5.2","choices":[{"index":0,
"finish_reason":"tool_calls","delta":{"role":"assistant","content":""}}],"usage":{"prompt_tokens":178,"completion_tokens":37,"total_tokens":215,
"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":25}}}

data: [DONE]

""".replace(b',\n', b',')  # only the line ends inside an event are ours
GLM_45_TOOLS = rb"""data: {"id":"2025091420174501de064dedfa4b68","created":1757852265,"model":"glm-4.5-flash","choices":[{"index":0,
"delta":{"role":"assistant","content":"\n"}}]}

data: {"id":"2025091420174501de064dedfa4b68","created":1757852265,"model":"glm-4.5-flash","choices":[{"index":0,"finish_reason":"tool_calls",
"delta":{"tool_calls":[{"id":"call_4BgN84hpTbmswCBFSC9ggw","index":-1,"type":"function","function":{"name":"add",
"arguments":"{\"a\": 365, \"b\": 96}"}}]}}]}

data: {"id":"2025091420174501de064dedfa4b68","created":1757852265,"model":"glm-4.5-flash","choices":[{"index":0,"finish_reason":"tool_calls",
"delta":{"role":"assistant","content":""}}],"usage":{"prompt_tokens":170,"completion_tokens":72,"total_tokens":242,
"prompt_tokens_details":{"cached_tokens":43}}}

data: [DONE]

""".replace(b',\n', b',')
GLM_46_JSON = r"""{"choices":[{"finish_reason":"stop","index":0,"message":{"content":"\n您好！","reasoning_content":"\n用户","role":"assistant"}}],
"created":1770631146,"id":"2026020917585695a7e8be40254c7c","model":"glm-4.6","object":"chat.completion","request_id":"2026020917585695a7e8be40254c7c",
"usage":{"completion_tokens":329,"completion_tokens_details":{"reasoning_tokens":253},"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":4},
"total_tokens":338}}""".encode()
GLM_52_JSON = r"""{"choices":[{"finish_reason":"tool_calls","index":0,"message":{"content":"好的","reasoning_content":"The user wants",
"role":"assistant","tool_calls":[
{"function":{"arguments":"{\"city\":\"北京\"}","name":"get_weather"},"id":"call_-7391102189101383143","index":0,"type":"function"},
{"function":{"arguments":"{\"city\":\"上海\"}","name":"get_time"},"id":"call_-7391102189101383142","index":1,"type":"function"}]}}],
"id":"1"}""".encode()

ANSWERS = [  # what is special, what Z.ai sent, what it says
    ("glm-5.2, tools", GLM_52_TOOLS, called(WHOLE, reasoning="The user", usage=counts(178, 37, 215, 0, 25))),
    ("glm-5.2, text", think(" 好") + say("好") + ENDED, says("好", " 好")),
    ("glm-4.5, index -1, double finish", GLM_45_TOOLS, called(("add", '{"a": 365, "b": 96}'), usage=counts(170, 72, 242, 43))),
    ("glm-4.5, max_tokens 1", think("\n") + finished("length"), says(finish="length")),
    ("glm-4.6, one JSON body", GLM_46_JSON, says("您好！", "用户", usage=counts(9, 329, 338, 4, 253))),
    ("glm-5.2, one JSON body, parallel calls", GLM_52_JSON,
     called(("get_weather", '{"city":"北京"}'), ("get_time", '{"city":"上海"}'), content="好的", reasoning="The user wants", usage=None)),
    # Events of many kinds
    ("OpenAI's own chunks", as_events({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}],
                                       "usage": None},
                                {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": USAGE}) + DONE,
     says("a")),
    ("no [DONE]", say("a") + FINISH, says("a")),
    ("no [DONE], no usage", say("a") + event(finish="stop"), says("a", usage=None)),
    ("no last blank line", say("a") + FINISH.rstrip(b"\n"), says("a")),
    ("CRLF, comments, names and ids", b": hi\r\n\r\nevent: message\r\nid: 1\r\n" + (say("a") + ENDED).replace(b"\n", b"\r\n"), says("a")),
    ("choices null", as_events({"id": "", "object": "", "created": 0, "model": "", "system_fingerprint": None, "choices": None, "usage": None})
     + say("a") + as_events({"choices": None}) + say("b") + ENDED, says("ab")),
    ("choices of other kinds", say("a") + as_events(*({"choices": choices} for choices in ([], [None], {}, "x", [{}], [{"delta": None}])), {})
     + say("b")
     + ENDED, says("ab")),
    ("events that are no objects", say("a") + b'data: 42\n\ndata: [1]\n\ndata: null\n\ndata: "x"\n\ndata: true\n\n' + say("b") + ENDED, says("ab")),
    ("lines that are no JSON", say("a") + b'data: garbage\n\ndata: {"id\n\ndata:\n\n' + say("b") + b"junk\n" + ENDED, says("ab")),
    ("another model, another id", event({"content": "a"}, model="glm-5.3") + event({"content": "b"}, id="x", created=1) + ENDED, says("ab")),
    ("fields of the wrong kind", as_events({"choices": [{"delta": {"content": 5, "reasoning_content": {}, "tool_calls": "x"}}]},
                                     {"choices": [{"delta": {"tool_calls": [5, None]}}]}) + say("a")
     + as_events({"choices": [{"delta": {"content": ["b"]}}]}, {"choices": [{"delta": {"content": {"b": 1}}}]}) + ENDED, says("a")),
    ("text after the finish", say("a") + FINISH + say("b") + ENDED, says("a")),
    ("an error after the finish", say("a") + FINISH + as_events({"error": {"code": "500", "message": "x"}}), says("a")),
    ("content and reasoning in turn", say("a") + think("r") + say("b") + think("s") + ENDED, says("ab", "rs")),
    ("content and reasoning in one event", say("a") + event({"reasoning_content": "r", "content": "b"})
     + event({"content": "c", "reasoning_content": "s"}) + ENDED, says("abc", "rs")),
    ("an empty answer that is finished", ENDED, says()),
    ("nothing but thinking", think("hm") + finished("length"), says("", "hm", finish="length")),
    ("line ends first", think("\n") + think("\r\n\n hm\n") + say("\n\n") + say("\na\n") + say("\n") + ENDED, says("a\n\n", " hm\n")),
    # Finish reasons
    *(("finish " + given, say("a") + finished(given), says("a", finish=ours)) for given, ours in (
        ("stop", "stop"), ("length", "length"), ("sensitive", "content_filter"), ("content_filter", "content_filter"),
        ("model_context_window_exceeded", "length"), ("unheard_of", "stop"))),
    ("finish sensitive, as documented",
     say("a") + event({"role": "user", "content": ""}, "sensitive", USAGE, content_filter=[{"role": "user", "level": 0}]) + DONE,
     says("a", finish="content_filter")),
    ("a finish that is no string", say("a") + as_events({"choices": [{"delta": {}, "finish_reason": ["stop"]}], "usage": USAGE}) + DONE, says("a")),
    ("stop after a call", call() + ENDED, called(WHOLE)),
    ("length within a call", calls_in(item("get_weather", '{"ci', id="c", index=0)) + finished("length"),
     called(("get_weather", '{"ci'), finish="length")),
    # Usage
    ("usage without details", say("a") + finished("stop", counts(1, 2, 3)), says("a", usage=counts(1, 2, 3))),
    ("usage with one detail", say("a") + finished("stop", counts(1, 2, 3, 4)), says("a", usage=counts(1, 2, 3, 4))),
    ("usage with holes", say("a") + finished("stop", dict(counts(1, None, None), prompt_tokens_details=None, completion_tokens_details={})),
     says("a", usage=counts(1, 0, 1, reasoning=0))),
    ("usage on every event", event({"content": "a"}, usage=counts(1, 1, 2)) + ENDED, says("a")),
    ("usage null", say("a") + as_events({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": None}) + DONE, says("a", usage=None)),
    # Tool calls, whole
    ("two calls, one id on the first", calls_in(item(*WHOLE, id="c", index=0, type="function"), item(*TIME, index=1, type="function")) + TOOLS_END,
     called(WHOLE, TIME)),
    ("two calls, the same id", calls_in(item(*WHOLE, id="c", index=0), item(*TIME, id="c", index=1)) + TOOLS_END, called(WHOLE, TIME)),
    *(("two calls of one tool, no id, %r" % (where,),
       calls_in(item("get_time", '{"a":1}', **where), item("get_time", '{"a":2}', **where)) + TOOLS_END,
       called(("get_time", '{"a":1}'), ("get_time", '{"a":2}'))) for where in ({"index": 0}, {"index": -1}, {})),
    *(("two calls, an event each, no id, %r" % (where,), calls_in(item(*TIME, **where)) + calls_in(item(*TIME, **where)) + TOOLS_END,
       called(TIME, TIME)) for where in ({"index": 0}, {"index": -1}, {})),
    ("numeric, empty and null ids", calls_in(item(*WHOLE, id=-73911021), item(*TIME, id=""), item(*TIME, id=None), item(*TIME, id=0)) + TOOLS_END,
     called(WHOLE, TIME, TIME, TIME)),
    ("arguments an object", calls_in(item("get_weather", {"city": "北京"}, id="c", index=0)) + TOOLS_END, called(("get_weather", '{"city":"北京"}'))),
    ("arguments an object with NaN",
     as_events(b'data: {"choices":[{"delta":{"tool_calls":[{"id":"c","function":{"name":"f","arguments":{"a":NaN}}}]}}]}\n\n') + TOOLS_END,
     called(("f", '{"a":null}'))),
    *(("arguments %r" % (arguments,), calls_in({"id": "c", "function": {"name": "get_time", "arguments": arguments}}) + TOOLS_END, called(TIME))
      for arguments in ("", "{}", None, {})),
    ("arguments missing", calls_in(item("get_time", id="c")) + TOOLS_END, called(TIME)),
    ("content, reasoning and a call in one event",
     say("a") + calls_in(item(*WHOLE, id="c"), content="b", reasoning_content="r") + TOOLS_END, called(WHOLE, content="ab", reasoning="r")),
    ("content and a call in one event", say("a") + calls_in(item(*WHOLE, id="c"), content="b") + TOOLS_END, called(WHOLE, content="ab")),
    ("a call between texts", say("a") + call() + say("b") + ENDED, called(WHOLE, content="ab")),
    ("a call and its finish in one event", calls_in(item(*WHOLE, id="c"), finish="tool_calls") + DONE, called(WHOLE, usage=None)),
    # Tool calls in fragments
    *(("fragments, " + kind, calls_in(dict(item("get_weather", '{"', **first), type="function"))
       + b"".join(calls_in(item(name, part, **later)) for part in ('city":', "", '"Paris', '"}')) + TOOLS_END, called(WHOLE))
      for kind, first, name, later in (
          ("id and name once", {"id": "call_1", "index": 0}, None, {"index": 0, "type": "function"}),
          ("nothing but the index", {"id": "call_1", "index": 0}, None, {"index": 0}),
          ("nothing at all", {"id": "call_1"}, None, {}),
          ("index -1", {"id": "call_1", "index": -1}, None, {"index": -1}),
          ("everything repeated", {"id": "call_1", "index": 0}, "get_weather", {"id": "call_1", "index": 0, "type": "function"}),
          ("id repeated", {"id": "call_1", "index": 0}, None, {"id": "call_1", "index": 0}),
          ("id empty afterwards", {"id": "call_1", "index": 0}, "", {"id": "", "index": 0}),
          ("no id, name repeated", {"index": 0}, "get_weather", {"index": 0}))),
    *(("fragments of two calls in turn, from index %d" % first,
       calls_in(item("get_weather", '{"city"', id="a", index=first)) + calls_in(item("get_time", "{", id="b", index=first + 1))
       + calls_in(item(None, ':"Paris"', index=first)) + calls_in(item(None, "}", index=first + 1), item(None, "}", index=first)) + TOOLS_END,
       called(WHOLE, TIME)) for first in (0, 1)),
    ("fragments that begin with nothing", calls_in(item("get_weather", "", id="a", index=0)) + calls_in(item(index=0))
     + calls_in(item(None, PARIS, index=0)) + TOOLS_END, called(WHOLE)),
    ("arguments before the name", calls_in(item(None, '{"city":', id="a", index=0)) + calls_in(item("get_weather", '"Paris"}', index=0)) + TOOLS_END,
     called(WHOLE)),
    ("a call without a name", calls_in(item(None, "{}", id="a", index=0)) + calls_in(item(*WHOLE, id="b", index=1)) + TOOLS_END, called(WHOLE)),
    ("a name that is no string",
     calls_in(item(True, "{}", id="a", index=0), item(["f"], "{}", id="b", index=1), item(*WHOLE, id="c", index=2)) + TOOLS_END, called(WHOLE)),
    # Leaks into the wrong field
    ("thinking in the content", say("<think>Got it\n") + say("</think>\n\nYes") + ENDED, says("Yes", "Got it\n")),
    ("thinking in the content, never closed", say("<think>Got it") + finished("length"), says("", "Got it", finish="length")),
    ("thinking in the content, after a line end", say("\n") + say("<think>") + say("a") + say("</think>") + say("b") + ENDED, says("b", "a")),
    ("boxes", think("<|begin_of_box|>a<|end_of_box|>") + say("It is <|begin_of_box|>42<|end_of_box|>.") + ENDED, says("It is 42.", "a")),
    ("what only looks like a tag", say("a < b, <th") + say("in>, <|begin_of") + say("_bag|> <") + ENDED, says("a < b, <thin>, <|begin_of_bag|> <")),
    ("a call in the content",
     say("Let me see. <tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>") + ENDED,
     called(WHOLE, content="Let me see. ")),
    ("a call in the reasoning", think("I call <tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>") + ENDED,
     called(WHOLE, reasoning="I call ")),
    ("two calls in the content",
     say("<tool_call>get_time</tool_call><tool_call>get_time<arg_key>n</arg_key><arg_value>5</arg_value>"
         '<arg_key>o</arg_key><arg_value>{"a":1}</arg_value></tool_call>') + ENDED, called(TIME, ("get_time", '{"n":5,"o":{"a":1}}'))),
    ("strings and what is no JSON in a call in the content",
     say("<tool_call>get_weather<arg_key>city</arg_key><arg_value>5</arg_value><arg_key>a</arg_key><arg_value>5 apples</arg_value></tool_call>")
     + ENDED,
     called(("get_weather", '{"city":"5","a":"5 apples"}'))),
    ("a call in the content with NaN", say("<tool_call>get_time<arg_key>n</arg_key><arg_value>NaN</arg_value></tool_call>") + ENDED,
     called(("get_time", '{"n":"NaN"}'))),
    ("a call in the content that names no tool", say("Write <tool_call>name</tool_call> so.") + ENDED, says("Write <tool_call>name</tool_call> so.")),
    ("a call in the content and the real one", say("<tool_call>get_time</tool_call>") + call() + TOOLS_END, called(WHOLE)),
    ("arguments in the name",
     calls_in(item("get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value>", "{}", id="c", index=0)) + TOOLS_END, called(WHOLE)),
    # Texts that must arrive as they are
    ("U+2028, NUL and astral", say("a\u2028b\u2029\u0085\0") + say("\U0001f600 \"\\\n") + ENDED, says("a\u2028b\u2029\u0085\0\U0001f600 \"\\\n")),
    ("lone surrogates", as_events(b'data: {"choices":[{"delta":{"content":"\\ud83d \\udfff"}}]}\n\n') + ENDED, says("\ud83d \udfff")),
    ("data: in the text", say("the line\ndata: {\"a\":1}\n\ndata: [DONE]\n\n") + say(" data: x") + ENDED,
     says("the line\ndata: {\"a\":1}\n\ndata: [DONE]\n\n data: x")),
]


@pytest.mark.parametrize("data, expected", [pytest.param(*row[1:], id=row[0]) for row in ANSWERS])
def test_an_answer_is_understood_and_streamed_and_json_agree(data, expected):
    check_answer(data, expected, tools=WEATHER)
    if data.startswith(b"data:"):
        assert decode_events([data[i:i + 1] for i in range(len(data))]) == decode_events([data])


def test_tool_ids_are_zais_own_where_they_are_usable():
    assert [call["id"] for call in check_answer(GLM_52_TOOLS, called(WHOLE, reasoning="The user", usage=counts(178, 37, 215, 0, 25)))] == [
        "call_438b313737df40b7b2972a81"]
    odd = calls_in(item(*WHOLE, id=-73911021), item(*TIME, id=""), item(*TIME, id=None), item(*TIME, id=0)) + TOOLS_END
    assert [call["id"] for call in check_answer(odd, called(WHOLE, TIME, TIME, TIME))] == ["-73911021", "call_new1", "call_new2", "0"]
    assert ChunkTranslator().new_id() != ChunkTranslator().new_id()


def broken(data, **options):
    """The UpstreamError this ends with, and the content before it, which must not hold a finish."""
    this, chunks = translator(**options), []
    with pytest.raises(UpstreamError) as caught:
        for text in events_of(data):
            chunks += this.feed(text)
        chunks += this.close()
    assert not any(chunk.finish_reason for chunk in chunks)
    return caught.value, "".join((chunk.delta or {}).get("content", "") for chunk in chunks)


NETWORK_ERROR = rb"""data: {"id":"202603151451299c7a89c25180405d","created":1773557520,"model":"glm-5","choices":[{"index":0,
"finish_reason":"network_error","delta":{"role":"assistant","content":""}}]}

data: [DONE]

""".replace(b',\n', b',')
RATE_LIMITED = rb"""event: error
data: {"error":{"code":"1302",
"message":"High concurrency usage of this API, please reduce concurrency or contact customer service to increase limits"},
"request_id":"2026012315301053eda1059a6e4f85"}

data: [DONE]

""".replace(b',\n', b',')
BARE_LINE = '{"error":{"code":"500","message":"内部错误"}}'.encode()
WRONG_PATH = b'{"code":500,"msg":"404 NOT_FOUND","success":false}'
KEY_REFUSED = '{"code":1000,"msg":"身份验证失败。","success":false}'.encode()


def failure(code, **more):
    return as_events(complaint(code, **more))


FAILURES = [  # what is wrong, what Z.ai sent, the code of the error, what is to be done (while nothing has been sent)
    ("network_error", NETWORK_ERROR, "upstream_error", TRY_AGAIN),
    ("network_error in mid-stream", say("a") + finished("network_error"), "upstream_error", TRY_AGAIN),
    ("network_error after a call", call() + finished("network_error", None), "upstream_error", TRY_AGAIN),
    ("an error event", RATE_LIMITED, "rate_limit_exceeded", SLOW_DOWN),
    ("an error without an event's name", RATE_LIMITED[len("event: error\n"):], "rate_limit_exceeded", SLOW_DOWN),
    ("an error in mid-stream", say("a") + failure("1234") + ENDED, "upstream_error", TRY_AGAIN),
    ("an error with choices null", say("a") + failure("1305", choices=None), "overloaded", TRY_AGAIN),
    ("a bare error line", think("a") + say("b") + BARE_LINE, "upstream_error", TRY_AGAIN),
    ("a bare error line first", BARE_LINE + b"\n", "upstream_error", TRY_AGAIN),
    ("no money, in HTTP 200", failure(1113), "insufficient_quota", NEXT_KEY),
    ("a wrong path, in HTTP 200", WRONG_PATH, "upstream_error", GIVE_UP),
    ("a refused key, in HTTP 200", KEY_REFUSED, "upstream_auth_error", NEXT_KEY),
    ("no finish", think("a") + say("b"), "upstream_error", TRY_AGAIN),
    ("no finish but [DONE]", say("b") + DONE, "upstream_error", TRY_AGAIN),
    ("no finish after a call", call() + DONE, "upstream_error", TRY_AGAIN),
    ("no finish but usage", say("a") + as_events({"choices": [], "usage": USAGE}) + DONE, "upstream_error", TRY_AGAIN),
    ("cut in the finish", say("b") + FINISH[:-30], "upstream_error", TRY_AGAIN),
    ("nothing", b"", "upstream_error", TRY_AGAIN), ("nothing but [DONE]", DONE, "upstream_error", TRY_AGAIN),
    ("nothing but comments", b": hi\n\n: hi\n\n", "upstream_error", TRY_AGAIN),
    ("garbage to the end", say("a") + b"data: \xff\xfe\n\n\0\0\0" * 50, "upstream_error", TRY_AGAIN),
    ("HTML", b"<html>\n<h1>502 Bad Gateway</h1>\n</html>\n", "upstream_error", TRY_AGAIN),
    ("an empty object", b"{}", "upstream_error", TRY_AGAIN), ("JSON cut short", GLM_46_JSON[:-30], "upstream_error", TRY_AGAIN),
    ("JSON without a finish", b'{"choices":[{"message":{"content":"a"}}]}', "upstream_error", TRY_AGAIN),
    ("absurd depth", b"data: " + b"[" * 100000 + b"\n\n", "upstream_error", TRY_AGAIN),
]


@pytest.mark.parametrize("data, code, verdict", [pytest.param(*row[1:], id=row[0]) for row in FAILURES])
def test_a_failure_is_an_error_and_never_an_answer(data, code, verdict):
    for options in ({}, {"restartable": True}, {"unfence": True}, {"reasoning": "raw"}):
        error, _ = broken(data, **options)
        assert error.code == code and error.status >= 400 and error.verdict == verdict and error.learn == (code == "rate_limit_exceeded")


def test_what_is_no_event_is_counted():
    this = translator()
    for text in ("42", "[]", "null", '"x"', "garbage", '{"id', '{"iddata: ["choices"]', '{"iddata: 5'):
        assert list(this.feed(text)) == []
    assert this.repaired == 8
    for text in events_of(say("a") + ENDED):
        this.feed(text)
    assert this.repaired == 8


def test_no_event_is_odd_enough_to_break_the_wire():
    """Whatever Z.ai may send: an error of ours, or an answer that keeps every rule."""
    rng, answers = random.Random(7), 0
    good = [json.loads(text) for text in events_of(GLM_52_TOOLS + call("get_time", "", 5, -1) + think("a") + say("b") + failure("1"))
            if text != "[DONE]"]
    for _ in range(3000):
        data = as_events(*(mutated(value, rng) if rng.random() < 0.5 else value for value in rng.sample(good, 6))) + (ENDED
                                                                                                                      if rng.random() < 0.8 else b"")
        try:
            folded = folded_stream(translated(data, tools=WEATHER))
            answers += 1
        except UpstreamError:
            continue
        except Exception as error:
            raise AssertionError(data) from error
        assert folded_json(translated(data, tools=WEATHER, restartable=True)) == folded, data
    assert answers > 300


# Spliced frames: a frame cut short, and in the same data line the first one of a new answer

INNER = ('{"id":"2026043020420635c6abc56a2741ac","created":1777552926,"object":"chat.completion.chunk","model":"glm-5.1",'
         '"choices":[{"index":0,"delta":{"role":"assistant",%s}}]}')
HEADS = ('{"id":"20260430204055297b97348c8e426c","created":1777552855,"object":"chat.c', '{"id":"2026051004', '{"id":', '{', '',
         '{"id":"20260430204055297b97348c8e426c","choices":[{"index":0,"delta":{"role', '{"choices":[{"index":0,"delta":{"content":"',
         '{"choices":[{"index":0,"delta":{"content":"data: data: ')


def splice(head, inner='"content":"11"'):
    return ("data: " + head + "data: " + INNER % inner + "\n\n").encode()


@pytest.mark.parametrize("head", HEADS)
def test_a_spliced_frame_starts_the_answer_afresh(head):
    torn = splice(head) + say("22") + ENDED
    for before, thought in ((b"", ""), (think("old"), "old"), (b"data: [1]\n\n", "")):
        assert folded_stream(translated(before + torn)) == ("1122", thought, [], "stop", DETAILS)
    for before in (think("old"), say("old"), call(), think("old") + say("old <th") + call() + calls_in(item("get_time", "{", id="x"))):
        assert folded_json(translated(before + torn, restartable=True)) == ("1122", "", [], "stop", DETAILS)


@pytest.mark.parametrize("head", HEADS)
def test_a_spliced_frame_after_text_or_a_call_went_out_is_an_error(head):
    for before in (say("old"), call(), think("old") + say("old <th") + call()):
        error, content = broken(before + splice(head) + say("22") + ENDED)
        assert (error.code, error.status, error.verdict) == ("upstream_stream_restarted", 502, GIVE_UP) and "11" not in content


def test_a_spliced_frame_may_hold_anything_an_event_may():
    call_made = {"id": "c", "name": "f", "arguments": "{}"}
    for inner, expected in (('"reasoning_content":"Now"', ("22", "Now", [])),
                            ('"tool_calls":[{"id":"c","index":0,"function":{"name":"f","arguments":"{}"}}]', ("22", "", [call_made])),
                            ('"content":"the line data: {\\"a\\":1} and data: x "', ('the line data: {"a":1} and data: x 22', "", []))):
        for head in HEADS[:3]:
            assert folded_stream(translated(splice(head, inner) + say("22") + ENDED))[:3] == expected, (head, inner)
    assert broken(b'data: {"id":"2026' + failure("1305") + say("a") + ENDED)[0].code == "overloaded"


def test_a_spliced_frame_is_counted_and_thinking_that_was_shown_is_closed():
    this = translator(reasoning="raw")
    chunks = [chunk for text in events_of(think("old") + splice("{") + ENDED) for chunk in this.feed(text)]
    assert this.repaired == 1 and "".join((chunk.delta or {}).get("content", "") for chunk in chunks) == "<think>old</think>11"


def test_what_was_only_held_back_does_not_forbid_a_fresh_start():
    for held in ("```js", "<thi", "\n"):
        assert folded_stream(translated(say(held) + splice("{", '"content":"{}"') + ENDED, unfence=True))[0] == "{}", held


# Texts, cut anywhere

def cuts(text):
    """Every way to cut a text in two, and the one that cuts everywhere."""
    return [[text[:i], text[i:]] for i in range(len(text))] + [list(text)]


def spoken(parts, speak=say):
    return b"".join(map(speak, parts)) + ENDED


@pytest.mark.parametrize("text, content, reasoning", [
    ("<think>Got it</think>\n\nYes", "Yes", "Got it"), ("\n<think>\na</think>b<think>c</think>", "b<think>c</think>", "a"),
    ("<|begin_of_box|>42<|end_of_box|>", "42", ""), ("<think>x</think><|begin_of_box|>4<|end_of_box|> < 5", "4 < 5", "x"),
    ("<<think>>", "<<think>>", ""), ("a<|begin_of_b|>", "a<|begin_of_b|>", ""), ("<think></think>b", "b", ""),
])
def test_tags_are_found_wherever_the_text_is_cut(text, content, reasoning):
    for parts in cuts(text):
        check_answer(spoken(parts), says(content, reasoning))


def test_a_leaking_call_is_found_wherever_the_text_is_cut():
    text = "Well. <tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value></tool_call>"
    for parts in cuts(text):
        check_answer(spoken(parts), called(WHOLE, content="Well. "), tools=WEATHER)
        check_answer(spoken(parts, think), called(WHOLE, reasoning="Well. "), tools=WEATHER)
        check_answer(spoken(parts), says(text), tools={})


@pytest.mark.parametrize("text, left", [
    ('```json\n{"a":"b"}\n```', '{"a":"b"}'), ('\n```json\n{"a":"b"}\n```\n', '{"a":"b"}'), ('```\n{"a":"b"}```', '{"a":"b"}'),
    ('```JSON\r\n{"a":"b"}\n```', '{"a":"b"}'), ('```json {"a":"b"} ```', '{"a":"b"}'), ('```{"a":"b"}```', '{"a":"b"}'),
    ('```json\n[1,\n 2]\n```', "[1,\n 2]"), ('```json\n{"a":"`b` ```x"}\n```', '{"a":"`b` ```x"}'), ('```json\n{"a":"b', '{"a":"b'),
    ('{"a":"b"}', '{"a":"b"}'), ('{"a":"```x```"}', '{"a":"```x```"}'), ('{"a":1}\n', '{"a":1}'), ("5", "5"), ("``", "``"), ("", ""),
])
def test_a_json_answer_comes_without_its_fence_wherever_it_is_cut(text, left):
    for parts in cuts(text):
        content, _, _, finish, _ = folded_stream(translated(spoken(parts), unfence=True))
        assert content.strip() == left and finish == "stop", parts
        assert folded_json(translated(think("r") + spoken(parts), unfence=True, restartable=True))[0] == content
        check_answer(spoken(parts), says(text.lstrip("\r\n")))


# The choices a client has

@pytest.mark.parametrize("data", [spoken(["<think>hm so</think>Yes!"]), spoken(["<thi", "nk>hm", " so</thi", "nk>\nYes!"]),
                                  think("hm ") + think("so") + spoken(["Yes", "!"])])
def test_thinking_is_parsed_raw_or_hidden(data):
    check_answer(data, says("Yes!", "hm so"), reasoning="parsed")
    check_answer(data, says("Yes!"), reasoning="hidden")
    check_answer(data, says("<think>hm so</think>Yes!"), reasoning="raw")
    contents = [chunk.delta["content"] for chunk in translated(data, reasoning="raw") if chunk.delta]
    assert contents[0] == "<think>" and contents.count("</think>") == 1  # in chunks of their own


@pytest.mark.parametrize("rest, expected", [
    (finished("length"), says("<think>hm</think>", finish="length")),
    (call() + TOOLS_END, called(WHOLE, content="<think>hm</think>")),
    (say("a") + think("hm") + say("b") + ENDED, says("<think>hm</think>a<think>hm</think>b")),
])
def test_raw_thinking_is_closed_whatever_follows(rest, expected):
    check_answer(think("hm") + rest, expected, reasoning="raw")


@pytest.mark.parametrize("data", [
    call() + call("get_time", "{}", "c2", 1), calls_in(item(*WHOLE, id="a", index=0), item(*TIME, id="b", index=1)),
    calls_in(item("get_weather", '{"city":', id="a", index=0)) + calls_in(item("get_time", "{", id="b", index=1))
    + calls_in(item(None, '"Paris"}', index=0), item(None, "}", index=1)),
    say("<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call><tool_call>get_time</tool_call>"),
])
def test_without_parallel_calls_only_the_first_goes_out(data):
    check_answer(data + TOOLS_END, called(WHOLE), one_call=True, tools=WEATHER)


def test_usage_comes_only_if_it_was_asked_for_and_the_model_is_as_the_client_named_it():
    name, chunks = "gpt-\u2028\"4o", translated(say("a") + ENDED)
    plain = ztoapi.Envelope("chatcmpl-1", 5, name)
    blocks = (plain.opening() + plain.encode(chunks)).split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""] and [json.loads(block[6:])["model"] for block in blocks[:-2]] == [name] * 3
    assert not any("usage" in block or '"choices":[]' in block for block in blocks)
    asked = ztoapi.Envelope("chatcmpl-1", 5, "x", include_usage=True)
    last = json.loads(asked.encode(chunks).split("\n\n")[-3][6:])
    assert last["choices"] == [] and last["usage"] == DETAILS
    assert '"choices":[]' not in asked.encode(translated(say("a") + event(finish="stop")))  # Z.ai gave none


def test_a_heartbeat_is_a_chunk_with_an_empty_delta():
    envelope = ztoapi.Envelope("chatcmpl-1", 5, "x")
    for text, delta in ((envelope.opening(), {"role": "assistant", "content": ""}), (envelope.heartbeat(), {})):
        value = json.loads(text[len("data: "):])
        assert text.startswith("data: {") and text.endswith("}\n\n") and value["object"] == "chat.completion.chunk"
        assert value["choices"][0]["delta"] == delta and value["choices"][0]["finish_reason"] is None


def test_a_json_answer_has_a_bound():
    chunks = [ztoapi.Chunk({"content": "x" * 600}), ztoapi.Chunk({"reasoning_content": "x" * 600}), ztoapi.Chunk({}, "stop")]
    with pytest.raises(UpstreamError):
        ztoapi.collect_completion(chunks, limit=1000)
    assert ztoapi.collect_completion([chunks[0], ztoapi.Chunk(None)] + chunks[1:], limit=1000)[0]["content"] == ""


def test_what_is_held_back_is_not_overtaken():
    """A "<" that may become a tag waits in its lane; text of the other lane comes behind it."""
    chunks = translated(b"".join((think("a"), say("b"), think("c<"), say("d"), FINISH)))
    assert [chunk.delta for chunk in chunks if chunk.delta] == [
        {"reasoning_content": "a"}, {"content": "b"}, {"reasoning_content": "c"}, {"reasoning_content": "<"}, {"content": "d"}]


def test_usage_counts_wherever_it_comes():
    data = b"".join((say("a"), event({"content": "b"}, usage=USAGE), event(finish="stop"), DONE))
    assert translated(data)[-1].usage == translated(b"".join((say("ab"), FINISH)))[-1].usage


def test_a_number_that_is_too_large_for_json_is_null():
    arguments = '{"n":1e999}'
    value = {"choices": [{"delta": {"tool_calls": [{"id": "c", "index": 0, "function": {"name": "f", "arguments": {"n": "INF"}}}]}, "finish_reason": "tool_calls"}]}
    data = b"data: " + json.dumps(value).replace('"INF"', "1e999").encode() + b"\n\n"
    call, = translated(data)[0].delta["tool_calls"]
    assert call["function"]["arguments"] == arguments.replace("1e999", "null")


def test_nobody_waits_for_the_end_mark():
    """The finish with its usage completes an answer."""
    this = translator()
    chunks = [chunk for text in events_of(say("a") + FINISH) for chunk in this.feed(text)]
    assert this.complete and chunks[-1].finish_reason == "stop" and list(this.feed("[DONE]")) == [] and list(this.close()) == []


# The road to Z.ai #####################################################################################################

BOTH = pytest.mark.parametrize("streamed", (True, False), ids=("stream", "json"))
ERROR_1234 = {"error": {"code": "1234", "message": "Network error"}}
ERROR_1302 = {"error": {"code": "1302", "message": "Rate limit reached for requests"}}


def sse(value):
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def footprint(proxy):
    """Threads, and open descriptors where the system tells, apart from idle connections to Z.ai, which are closed here."""
    proxy.server.upstream.pool.expire(0)
    use = set(threading.enumerate())
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            use.add((number, os.readlink("/proc/self/fd/" + number)))
    return use


@contextlib.contextmanager
def nothing_leaks(proxy):
    """Afterwards slots, descriptors and threads are back where they were."""
    before = footprint(proxy)
    yield
    proxy.idle()
    assert eventually(lambda: not footprint(proxy) - before), footprint(proxy) - before


@contextlib.contextmanager
def road(zai=None, **environ):
    """A proxy that must not leak. Chance is out of it: retries wait no time, refused requests the shortest."""
    with proxying(zai, **environ) as proxy:
        proxy.server.upstream.rand = proxy.server.upstream.gates.rand = lambda: 0.0
        with nothing_leaks(proxy):
            yield proxy


@pytest.fixture
def brisk(monkeypatch):
    """The watch looks often, for tests of the times it keeps."""
    monkeypatch.setattr(ztoapi, "WATCH_INTERVAL", 0.02)


def ask(proxy, streamed, **fields):
    """(status, text, error or None, whole) of a chat, either way."""
    if streamed:
        status, _, events, clean = proxy.stream(**fields)
        error = next((e["error"] for e in events if "error" in e), None)
        assert events[-1] == "[DONE]" if clean and not error else "[DONE]" not in events, events
        return status, said(events), error, clean and not error and finish_of(events) != []
    status, _, body = proxy.chat(**fields)
    error = body.get("error")
    return status, "" if error else body["choices"][0]["message"]["content"], error, error is None


def assert_in_stream_error(proxy, **fields):
    """The error of a stream that began and failed, in its right form: `error` first, no end mark, no finish, no last chunk."""
    status, _, events, clean = proxy.stream(**fields)
    assert status == 200 and not clean and "[DONE]" not in events and finish_of(events) == [], events
    assert list(events[-1]) == ["error"] and isinstance(events[-1]["error"]["code"], str) and not any("error" in e for e in events[:-1]), events
    return events


def together(*calls, patience=30):
    """Run the calls in threads of their own; their results, in order."""
    results = [None] * len(calls)

    def run(i, call):
        results[i] = call()
    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience)
    return results


# Faults: each heals if it comes before the first delta, and ends the answer if it comes later

def raw_head(*lines):
    return ("\r\n".join(("HTTP/1.1 200 OK", "Content-Type: text/event-stream") + lines) + "\r\n\r\n").encode()


EARLY = {
    "reset before headers": [RESET],
    "closed before headers": [CLOSE],
    "garbage for a head": [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", CLOSE],
    "a greeting for a head": [b"220 mail.example.com ESMTP\r\n", 30],
    "a head without an end": [b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 12000, 30],
    "cut in its head": [HEAD[:60], CLOSE],
    "reset in its head": [HEAD[:60], 0.02, RESET],
    "reset after headers": [HEAD, 0.02, RESET],
    "closed after headers": [HEAD, CLOSE],
    "reset mid-event": [HEAD, chunked(say("Hel")[:40]), 0.02, RESET],
    "reset mid-chunk": [HEAD, b"ff\r\ndata: {", 0.02, RESET],
    "broken chunk size": [HEAD, b"zz\r\n", CLOSE],
    "cut after an empty delta": stream(event({"role": "assistant", "content": ""}), CLOSE, end=False),
    "empty 200": stream(),
    "empty 200 with a length": answer(200, b""),
    "empty 200 without a length": [raw_head("Connection: close"), CLOSE],
    "end mark alone": stream(DONE),
    "garbage to the end": stream(b"data: oops\n\n", b"\x00\xff\xfe"),
    "error as first event": stream(sse(ERROR_1234), DONE),
    "error event with a name": stream(b"event: error\n" + sse(ERROR_1234), DONE),
    "error as a raw line": stream(json.dumps(ERROR_1234).encode() + b"\n"),
    "error as JSON in a 200": answer(200, ERROR_1234),
    "network_error": stream(event(finish="network_error"), DONE),
    "HTML 502": answer(502, b"<html><h1>502 Bad Gateway</h1></html>"),
    "503 without a word": answer(503, b""),
    "1120": refusal(429, "1120"),
    "1200": refusal(500, "1200"),
    "1230": refusal(500, "1230"),
    "1234": refusal(500, "1234"),
    "1234 as 400": refusal(400, "1234"),
    "500": refusal(500, "500"),
    "an unknown code": refusal(500, "9999"),
    "1305": refusal(429, "1305"),
    "1305 as first event": stream(sse({"error": {"code": "1305", "message": "overloaded"}})),
    "1312": refusal(429, "1312"),
}

LATE = {
    "reset": [0.02, RESET],
    "clean end between chunks": [CLOSE],
    "clean end of the body without a finish": [END],
    "end mark without a finish": [chunked(DONE), END],
    "reset mid-event": [chunked(say("lo")[:40]), 0.02, RESET],
    "reset mid-chunk": [b"ff\r\ndata: {", 0.02, RESET],
    "end mid-event": [chunked(say("lo")[:40]), END],
    "broken chunk size": [0.02, b"zz\r\n", CLOSE],
    "error event": [chunked(sse(ERROR_1234)), chunked(DONE), END],
    "1302 event": [chunked(sse(ERROR_1302)), END],
    "error as a raw line": [chunked(json.dumps(ERROR_1234).encode() + b"\n"), END],
    "network_error": [chunked(event(finish="network_error")), chunked(DONE), END],
    "garbage to the end": [chunked(b"data: oops\n\n"), END],
}


@pytest.mark.parametrize("fault", EARLY)
def test_a_fault_before_the_first_delta_is_tried_again_unseen_and_an_error_after_max_retries(zai, fault):
    with road(zai, MAX_RETRIES="2") as proxy:
        for streamed in (True, False):
            zai.scripts.extend([EARLY[fault], EARLY[fault]])
            assert ask(proxy, streamed) == (200, "Hello", None, True)
            proxy.idle()
            proxy.server.upstream.pool.expire(0)  # a dead pooled connection would be no retry
        assert len(zai.requests) == 6 and proxy.server.metrics.retries == 4 and proxy.server.metrics.failed == 0
        zai.default = EARLY[fault]
        for streamed in (True, False):
            status, text, error, _ = ask(proxy, streamed)
            assert status == (503 if fault.startswith(("1305", "1312", "1120")) else 502) and not text
            assert error["type"] in ("upstream_error", "server_error")
        proxy.idle()
        assert len(zai.requests) == 12 and proxy.server.metrics.retries == 8 and proxy.server.metrics.failed == 2


@pytest.mark.parametrize("first, fault", [(say("Hel"), fault) for fault in LATE] + [
    (first, fault) for first in (think("Hel"), call()) for fault in ("clean end between chunks", "network_error", "1302 event")],
    ids=lambda value: {say("Hel"): "text", think("Hel"): "thinking", call(): "call"}.get(value, value))
def test_nothing_is_tried_again_after_the_first_delta(zai, fault, first):
    zai.default = [HEAD, chunked(first), *LATE[fault]]
    with road(zai) as proxy:
        events = assert_in_stream_error(proxy)
        assert any(e.get("choices") and set(e["choices"][0]["delta"]) & {"reasoning_content", "tool_calls", "content"} for e in events[:-1])
        assert said(events) + said(events, "reasoning_content") == ("" if first == call() else "Hel")
        status, _, error, _ = ask(proxy, False)
        assert status in ((429, 502) if "1302" in fault else (502,)) and error["message"]
        proxy.idle()
        assert len(zai.requests) == 2 and proxy.server.metrics.retries == 0


@pytest.mark.parametrize("fault", LATE)
@BOTH
def test_thinking_that_is_hidden_is_not_paid_for_twice(zai, fault, streamed):
    zai.default = [HEAD, chunked(think("Hm")), *LATE[fault]]
    with road(zai, REASONING_FORMAT="hidden") as proxy:
        status, text, error, _ = ask(proxy, streamed)
        assert status >= 429 and not text and error["code"] and len(zai.requests) == 1


def test_connect_refused_is_an_error_after_max_retries():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = "http://127.0.0.1:%d/api" % closed.getsockname()[1]
    with road(ZAI_BASE_URL=url) as proxy:
        for streamed in (True, False):
            status, _, error, _ = ask(proxy, streamed)
            assert status == 502 and error["code"] == "upstream_error" and "refused" in error["message"].lower()
        proxy.idle()
        assert proxy.server.metrics.retries == 4


@pytest.mark.parametrize("name", ("a..b:80", "a" * 64 + ".example:80", "user:secretpassword"), ids=("empty label", "long label", "no host"))
def test_a_proxy_of_an_impossible_name_is_a_502(monkeypatch, name):
    through(monkeypatch, "https", "http://" + name)
    with road(ZAI_BASE_URL="https://localhost/api", MAX_RETRIES="0") as proxy:
        status, _, error, _ = ask(proxy, True)
        assert status == 502 and error["code"] == "upstream_error"


@pytest.mark.parametrize("fault", ("error event", "reset", "network_error"))
def test_who_loses_an_error_over_a_cut_gets_the_closing_chunk_behind_it(zai, fault):
    zai.default = [HEAD, chunked(say("Hel"))] + LATE[fault]
    with road(zai) as proxy:
        for name, value, closed in (("Origin", "https://app.example", True), ("User-Agent", "ai/6.0 ai-sdk/openai/3.0", True),
                                    ("User-Agent", "OpenAI/Python 3.57", False)):
            status, _, events, clean = proxy.stream([name + ": " + value])
            assert (status, said(events), list(events[-1]), clean) == (200, "Hel", ["error"], closed) and finish_of(events) == []


def test_connect_refused_then_a_listener_is_an_answer(zai):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        place = closed.getsockname()

    def open_up():
        """Chance is asked when the first refusal is to be waited out."""
        zai.socket = socket.create_server(place)
        threading.Thread(target=zai.accept, daemon=True).start()
        return 0.0
    shut_down(zai.socket)
    with proxying(zai, ZAI_BASE_URL="http://127.0.0.1:%d/api" % place[1]) as proxy:
        proxy.server.upstream.rand = open_up
        assert ask(proxy, True) == (200, "Hello", None, True)
        proxy.idle()
        assert proxy.server.metrics.retries == 1


NEVER = "1100 1110 1111 1112 1113 1121 1210 1211 1212 1213 1214 1215 1220 1221 1222 1231 1261 1300 1301 1304 1308 1309 1310 1311 1313 1314 1321 " \
    "401 1000 1001 1002 1003 1004".split()


def test_codes_that_cannot_heal_are_never_tried_again(zai):
    with road(zai) as proxy:
        for code in NEVER:
            for script in (refusal(429, code), stream(sse({"error": {"code": code, "message": "no"}}))):
                zai.scripts.append(script)
                before = len(zai.requests)
                status, _, error, _ = ask(proxy, True)
                assert status >= 400 and error["message"] and len(zai.requests) == before + 1, code
        proxy.idle()
        assert proxy.server.metrics.retries == 0


@pytest.mark.parametrize("script", (
    answer(404, b"<html>404</html>"), answer(200, b"<html>hello</html>"), answer(200, {"code": 500, "msg": "404 NOT_FOUND", "success": False}),
    answer(404, {"timestamp": "2026-08-13T04:35:22.960+00:00", "status": 404, "error": "Not Found", "path": "/v4/v1"})),
    ids=("html 404", "html 200", "code 500 in a 200", "spring 404"))
def test_a_wrong_path_is_never_tried_again_and_names_the_base_url(zai, script):
    zai.default = script
    with road(zai) as proxy:
        status, _, error, _ = ask(proxy, True)
        assert status == 502 and error["code"] == "upstream_error" and "ZAI_BASE_URL" in error["message"] and len(zai.requests) == 1


@pytest.mark.parametrize("status", (301, 302, 303, 307, 308))
def test_redirects_are_not_followed(zai, status):
    elsewhere = FakeZai()
    zai.default = answer(status, b"", "Location: %s/chat/completions" % elsewhere.url)
    with road(zai) as proxy:
        got, _, error, _ = ask(proxy, True)
        assert got == 502 and error["code"] == "upstream_error" and len(zai.requests) == 1 and elsewhere.connections == 0
    elsewhere.close()


@BOTH
def test_bytes_that_come_one_at_a_time_are_an_answer_like_any_other(zai, streamed):
    whole = b"".join(stream(*HEALTHY))
    zai.default = [whole[i:i + 1] for i in range(len(whole))]
    with road(zai) as proxy:
        assert ask(proxy, streamed) == (200, "Hello", None, True)
        proxy.idle()
        assert ask(proxy, streamed) == (200, "Hello", None, True) and zai.connections == 1


@pytest.mark.parametrize("head", (
    b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD, b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nContent-Length: 7\r\n\r\n" + HEAD, HEAD.replace(b"\r\n", b"\n"),
    HEAD.replace(b"\r\n\r\n", b"\r\nno field\r\n folded\r\nContent-Length: 7\r\n\r\n"), HEAD.replace(b"Transfer-Encoding", b"TRANSFER-ENCODING"),
    HEAD.replace(b"\r\n\r\n", b"\r\nSet-Cookie: acw_tc=1;path=/\r\nSet-Cookie: b=2\r\nVary: Origin\r\nVary: X\r\n\r\n")),
                         ids=("100", "103", "bare line feeds", "lines that are none", "capitals", "fields twice"))
@BOTH
def test_odd_heads_are_understood(zai, head, streamed):
    zai.default = [head] + stream(*HEALTHY)[1:]
    with road(zai) as proxy:
        for _ in range(2):
            assert ask(proxy, streamed) == (200, "Hello", None, True)
            proxy.idle()
        assert zai.connections == 1


@pytest.mark.parametrize("kind", (b"application/json", b"application/json;charset=UTF-8", b"application/x-ndjson", b"text/plain"))
@BOTH
def test_a_stream_is_one_whatever_it_is_called(zai, kind, streamed):
    zai.default = [HEAD.replace(b"text/event-stream;charset=UTF-8", kind)] + stream(*HEALTHY)[1:]
    with road(zai) as proxy:
        assert ask(proxy, streamed) == (200, "Hello", None, True)


@pytest.mark.parametrize("end", ([CLOSE], [0.02, RESET], [0.02, b"zz\r\n", CLOSE], [b"f\r\ndata: ", CLOSE]), ids=("end", "reset", "broken chunk", "mid-chunk"))
@BOTH
def test_a_cut_behind_the_finish_is_no_failure(zai, end, streamed):
    zai.default = [HEAD, chunked(say("Hello")), chunked(event(finish="stop"))] + end
    with road(zai) as proxy:
        assert ask(proxy, streamed) == (200, "Hello", None, True) and len(zai.requests) == 1


@pytest.mark.parametrize("status", (204, 304))
@pytest.mark.parametrize("line", ("Content-Length: 5", "Transfer-Encoding: chunked", "X: y"))
def test_an_answer_that_has_no_body_is_not_waited_for(zai, status, line):
    zai.default = [("HTTP/1.1 %d X\r\n%s\r\n\r\n" % (status, line)).encode(), 30]
    with road(zai, MAX_RETRIES="0") as proxy:
        assert ask(proxy, True)[0] == 502


@BOTH
def test_an_answer_that_comes_before_all_was_sent_is_read(zai, streamed):
    """A front end that refuses a large body closes without reading it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def refuse():
            for _ in range(2):
                with listener.accept()[0] as sock:
                    sock.recv(1024)
                    sock.sendall(b"".join(answer(413, {"error": {"code": "1210", "message": "too long for me"}})))
                    sock.shutdown(socket.SHUT_WR)
                    time.sleep(0.05)
        threading.Thread(target=refuse, daemon=True).start()
        with road(ZAI_BASE_URL="http://127.0.0.1:%d/api" % listener.getsockname()[1]) as proxy:
            _, _, error, _ = ask(proxy, streamed, messages=[{"role": "user", "content": "x" * (8 << 20)}])
            assert "too long for me" in error["message"]
            proxy.idle()
            assert proxy.server.metrics.retries == 0


@BOTH
def test_a_body_without_a_length_ends_with_its_connection(zai, streamed):
    zai.default = [raw_head("Connection: close"), *HEALTHY, CLOSE]
    with road(zai) as proxy:
        assert ask(proxy, streamed) == (200, "Hello", None, True)


# Silence, and other times

@pytest.mark.parametrize("script, streamed", (
    ([30], True), ([30], False), ([HEAD, 30], True), (stream(event({"role": "assistant", "content": ""}), 30), False)),
                         ids=("before headers", "before headers, json", "before the first event", "before the first delta, json"))
def test_a_silence_is_tried_again_once(zai, brisk, script, streamed):
    zai.default = script
    with road(zai, UPSTREAM_TIMEOUT="0.1", MAX_RETRIES="5") as proxy:
        status, _, error, _ = ask(proxy, streamed)
        assert status == 502 and "UPSTREAM_TIMEOUT" in error["message"] and len(zai.requests) == 2
        assert eventually(lambda: zai.cut_by_client == 2)
        zai.scripts.append(script)
        zai.default = stream(*HEALTHY)
        assert ask(proxy, streamed) == (200, "Hello", None, True)


def test_a_silence_mid_stream_ends_the_answer(zai, brisk):
    zai.default = stream(say("Hel"), 30)
    with road(zai, UPSTREAM_TIMEOUT="0.1") as proxy:
        assert "UPSTREAM_TIMEOUT" in assert_in_stream_error(proxy)[-1]["error"]["message"]
        assert ask(proxy, False)[0] == 502 and len(zai.requests) == 2
        assert eventually(lambda: zai.cut_by_client == 2)


@BOTH
def test_upstream_timeout_is_of_silence_and_never_of_the_whole(zai, brisk, streamed):
    zai.default = stream(*[step for _ in range(6) for step in (say("a"), 0.06)], FINISH, DONE)
    with road(zai, UPSTREAM_TIMEOUT="0.25") as proxy:
        assert ask(proxy, streamed) == (200, "aaaaaa", None, True)


@contextlib.contextmanager
def stuck_listener():
    """The port of a listener whose backlog is full: connecting to it takes for ever."""
    with socket.socket() as listener, contextlib.ExitStack() as filling:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            sock = filling.enter_context(socket.socket())
            sock.settimeout(0.05)
            try:
                sock.connect(listener.getsockname())
            except OSError:
                break
        else:
            pytest.skip("this system's backlog does not fill")
        yield listener.getsockname()[1]


class MuteListener:
    """A server that takes connections, says `words` once something has come, and nothing else. `heard`, `ended`: what came to pass."""

    def __init__(self, words=b""):
        self.words, self.heard, self.ended = words, threading.Event(), threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError), self.socket:
            while True:
                with self.socket.accept()[0] as sock, contextlib.suppress(ConnectionError):
                    while sock.recv(65536):
                        self.heard.set()
                        sock.sendall(self.words)
                self.ended.set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shut_down(self.socket)


def shut_down(sock):
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def test_connecting_takes_ten_seconds_at_most(monkeypatch):
    assert ztoapi.CONNECT_TIMEOUT == 10
    monkeypatch.setattr(ztoapi, "CONNECT_TIMEOUT", 0.1)
    with stuck_listener() as port, road(ZAI_BASE_URL="http://127.0.0.1:%d" % port, MAX_RETRIES="1") as proxy:
        status, _, error, _ = ask(proxy, True)
        proxy.idle()
        assert status == 502 and error["code"] == "upstream_error" and proxy.server.metrics.retries == 1


def test_a_tls_handshake_that_never_comes_takes_ten_seconds_at_most(monkeypatch):
    monkeypatch.setattr(ztoapi, "CONNECT_TIMEOUT", 0.1)
    with MuteListener() as mute, road(ZAI_BASE_URL="https://127.0.0.1:%d" % mute.port, MAX_RETRIES="0") as proxy:
        assert ask(proxy, True)[0] == 502 and mute.ended.wait(5)


def test_a_json_answer_does_not_wait_for_the_end_of_the_connection(zai):
    answered, in_time = threading.Event(), []
    zai.default = stream(*HEALTHY, lambda *_: in_time.append(answered.wait(0.8)))
    with road(zai) as proxy:
        assert ask(proxy, False)[3]
        answered.set()
        assert eventually(lambda: in_time) and in_time == [True]


@BOTH
def test_a_trickle_behind_the_finish_does_not_hold_the_slot(zai, streamed):
    trickled = threading.Event()
    zai.default = stream(*HEALTHY, *[b":\n", 0.2] * 15, lambda *_: trickled.set())
    with road(zai) as proxy, proxy.connect() as sock:
        sock.sendall(raw_chat(chat_body(stream=streamed)))
        assert read_stream(sock)[3] and eventually(lambda: vacant(proxy)) and not trickled.is_set()


# The pool

def pooled(pool, count):
    """`count` connections in the pool, in order; and their other ends."""
    pairs = [socket.socketpair() for _ in range(count)]
    for ours, _ in pairs:
        pool.put("key", ours)
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def test_the_pool_gives_the_last_used_first():
    pool = ztoapi.Pool(RoadClock())
    ours, theirs = pooled(pool, 3)
    assert [pool.take("key") for _ in range(4)] == ours[::-1] + [None] and pool.take("other key") is None
    for sock in ours + theirs:
        sock.close()


@pytest.mark.parametrize("last_word", (b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"), ids=("end", "a word"))
def test_the_pool_drops_a_connection_that_has_something_to_say(last_word):
    pool = ztoapi.Pool(RoadClock())
    ours, theirs = pooled(pool, 3)
    theirs[2].sendall(last_word)
    theirs[2].close()
    assert pool.take("key") is ours[1] and ours[2].fileno() == -1
    for sock in ours + theirs:
        sock.close()


def test_the_pool_closes_what_was_idle_for_60_seconds():
    clock = RoadClock()
    pool = ztoapi.Pool(clock)
    old, others = pooled(pool, 2)
    clock.now += 30
    young, more = pooled(pool, 1)
    clock.now += 29
    pool.expire()
    assert all(sock.fileno() >= 0 for sock in old + young)
    clock.now += 1
    pool.expire()
    assert all(sock.fileno() == -1 for sock in old) and pool.take("key") is young[0] and pool.take("key") is None
    assert [sock.recv(1) for sock in others] == [b"", b""]
    for sock in young + others + more:
        sock.close()


REUSE = {  # answer -> whether its connection serves again
    "a stream read to its end": (stream(*HEALTHY), True),
    "a stream in one go": ([b"".join(stream(*HEALTHY))], True),
    "an answer of known length": (answer(200, {"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}), True),
    "a refusal": (refusal(400, "1210"), True),
    "no last chunk": (stream(*HEALTHY, end=False) + [30], False),
    "bytes behind the end": (stream(*HEALTHY) + [b"HTTP/1.1 200 OK\r\n"], False),
    "Connection: close": ([HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")] + stream(*HEALTHY)[1:], False),
    "HTTP/1.0": ([HEAD.replace(b"1.1", b"1.0").replace(b"Transfer-Encoding: chunked\r\n", b""), *HEALTHY, CLOSE], False),
    "a cut": (stream(say("Hel"), CLOSE, end=False), False),
}


@pytest.mark.parametrize("case", REUSE)
@BOTH
def test_a_connection_serves_again_only_if_its_answer_was_read_to_the_end(zai, case, streamed):
    script, again = REUSE[case]
    zai.scripts.append(script)
    with road(zai) as proxy:
        ask(proxy, streamed)
        proxy.idle()
        assert ask(proxy, streamed) == (200, "Hello", None, True)
        assert zai.connections == (1 if again else 2), "reused" if zai.connections == 1 else "not reused"


def test_requests_in_turn_share_one_connection(zai):
    with road(zai) as proxy:
        for i in range(10):
            assert ask(proxy, i % 2)[3]
            proxy.idle()
        assert zai.connections == 1 and len(zai.requests) == 10


def test_a_pooled_connection_found_dead_is_replaced_unseen(zai):
    zai.scripts.append(stream(*HEALTHY) + [CLOSE])
    with road(zai, MAX_RETRIES="0") as proxy:
        assert ask(proxy, True)[3]
        proxy.idle()
        assert eventually(lambda: not zai.open)
        assert ask(proxy, True)[3] and len(zai.requests) == 2
        proxy.idle()
        assert proxy.server.metrics.retries == 0


@pytest.mark.parametrize("death", ([RESET], [CLOSE]), ids=("reset", "end"))
def test_a_pooled_connection_that_dies_when_used_is_replaced_unseen(zai, death):
    zai.default = stream(say("Hello"), 0.1, FINISH, DONE)
    with road(zai, MAX_RETRIES="0") as proxy:
        assert all(whole for *_, whole in together(*[lambda: ask(proxy, True)] * 3)) and zai.connections == 3
        proxy.idle()
        zai.scripts.extend([death] * 3)
        assert ask(proxy, True) == (200, "Hello", None, True) and len(zai.requests) == 7 and zai.connections == 4
        proxy.idle()
        assert proxy.server.metrics.retries == 0


def test_a_pooled_connection_that_ends_after_a_while_was_not_dead(zai, monkeypatch):
    """Z.ai has worked on the request, which is billed: it is tried again MAX_RETRIES times, and counted."""
    monkeypatch.setattr(ztoapi, "AT_ONCE", 0.05)
    zai.default = stream(say("Hello"), 0.1, FINISH, DONE)
    with road(zai, MAX_RETRIES="0") as proxy:
        assert all(whole for *_, whole in together(*[lambda: ask(proxy, True)] * 3)) and zai.connections == 3
        proxy.idle()
        zai.default = [0.2, CLOSE]
        assert ask(proxy, True)[0] == 502 and len(zai.requests) == 4


# Time that takes no time

class RoadClock:
    """Time that passes only when somebody waits. at(): what is to happen meanwhile."""

    def __init__(self):
        self.now, self.plan = 1024.0, []

    def __call__(self):
        return self.now

    def at(self, when, what):
        self.plan = sorted(self.plan + [(when, what)], key=lambda pair: pair[0])

    def wait(self, seconds):
        until, what = self.now + seconds, None
        if self.plan and self.plan[0][0] <= until:
            until, what = self.plan.pop(0)
        self.now = max(self.now, until)
        if what:
            what()


class RoadClient(ztoapi.Client):
    """A client that waits by that clock."""

    def __init__(self, clock):
        super().__init__(None, ztoapi.Settings(), clock=clock)

    def wait(self, seconds):
        self.clock.wait(seconds)
        if self.gone:
            raise ztoapi.ClientGone


class Road:
    """An Upstream on that clock, and requests over it to a fake Z.ai on a real socket, which gives `answers`, then `script` for ever.
    `times`: when each request arrived there."""

    def __init__(self, zai, rand=0.0, **environ):
        self.zai, self.clock, self.times, self.answers, self.script = zai, RoadClock(), [], collections.deque(), stream(*HEALTHY)
        settings = ztoapi.Settings.from_environ(dict({"ZAI_API_KEY": ZAI_KEY, "ZAI_BASE_URL": zai.url}, **environ))
        self.upstream = ztoapi.Upstream(settings, clock=self.clock, now=lambda: 1780000000 + self.clock.now, rand=lambda: rand, proxies={})
        zai.default = self.arrived

    def arrived(self, request):
        self.times.append(self.clock.now)
        return self.answers.popleft() if self.answers else self.script

    def ask(self, model="glm-4.6"):
        """(text, error, record)"""
        record, text = ztoapi.Record("req_1", "127.0.0.1", 0.0), ""
        job = ztoapi.Job(b'{"model":"%b"}' % model.encode(), model, ztoapi.ChunkTranslator)
        try:
            for chunks in self.upstream.relay(job, RoadClient(self.clock), record):
                text += "".join(chunk.delta.get("content", "") for chunk in chunks)
        except ztoapi.ApiError as error:
            return text, error, record
        finally:
            self.upstream.pool.expire(0)
        return text, None, record

    def gaps(self):
        return [b - a for a, b in zip(self.times, self.times[1:])]

    def keys(self):
        """The keys that arrived at Z.ai, in order."""
        return [request["headers"]["Authorization"].split()[1] for request in self.zai.requests]


@pytest.mark.parametrize("rand, gaps", ((1.0, [0.5, 1, 2, 4, 8, 8]), (0.5, [0.25, 0.5, 1, 2, 4, 4]), (0.0, [0] * 6)))
def test_backoff_between_retries_doubles_with_full_jitter(zai, rand, gaps):
    road = Road(zai, rand, MAX_RETRIES="6")
    road.script = refusal(500, "1234")
    _, error, record = road.ask()
    assert road.gaps() == gaps and error.status == 502 and record.retries == 6


@pytest.mark.parametrize("code, header, seconds", (
    ("1305", "Retry-After: 7", 7), ("1234", "Retry-After: 7", 7), ("1302", "Retry-After: 7", 7), ("1302", "retry-after: 20", 20),
    ("1305", "Retry-After: 0", 0), ("1305", "Retry-After: " + email.utils.formatdate(1780001024 + 7, usegmt=True), 7)))
def test_retry_after_of_zai_is_honoured(zai, code, header, seconds):
    road = Road(zai)
    road.answers.append(answer(429, {"error": {"code": code, "message": "no"}}, header))
    text, error, _ = road.ask()
    assert text == "Hello" and error is None and seconds <= road.gaps()[0] <= seconds + 1


def test_retry_after_longer_than_queue_timeout_is_told_and_not_waited_for(zai):
    road = Road(zai, QUEUE_TIMEOUT="60")
    road.script = answer(429, {"error": {"code": "1305", "message": "no"}}, "Retry-After: 90")
    began = road.clock.now
    _, error, _ = road.ask()
    assert error.status in (429, 503) and error.headers()["Retry-After"] and len(road.times) == 1 and road.clock.now - began <= 60


@pytest.mark.parametrize("rand", (0.0, 0.5, 1.0))
def test_a_refused_request_goes_again_after_a_backoff_that_doubles_to_8_seconds(zai, rand):
    road = Road(zai, rand)
    road.script = refusal(429, "1302")
    _, error, record = road.ask()
    assert (error.status, error.code) == (429, "rate_limit_exceeded") and error.headers()["Retry-After"]
    for gap, nominal in zip(road.gaps(), (0.5, 1, 2, 4, 8, 8, 8, 8)):
        assert nominal <= gap <= min(8, 1.5 * nominal), road.gaps()
    assert len(road.times) > 14 and record.retries >= 14  # besides MAX_RETRIES


def test_jitter_spreads_refused_requests(zai):
    gaps = []
    for rand in (0.0, 1.0):
        road = Road(zai, rand)
        road.answers.append(refusal(429, "1302"))
        assert road.ask()[0] == "Hello"
        gaps += road.gaps()
    assert gaps[0] < gaps[1]


@pytest.mark.parametrize("timeout", (20, 120))
def test_queue_timeout_bounds_the_waiting_and_not_the_time_with_zai(zai, timeout):
    road = Road(zai, QUEUE_TIMEOUT=str(timeout))

    def with_zai(fake, request):
        road.clock.now += 100
    road.script = [with_zai] + refusal(429, "1302", "Slow down, please")
    began = road.clock.now
    _, error, record = road.ask()
    waited = road.clock.now - began - 100 * len(road.times)
    assert timeout - 8 <= waited <= timeout and record.queued_s == pytest.approx(waited)
    assert (error.status, error.code) == (429, "rate_limit_exceeded") and "Slow down, please" in error.message and error.headers()["Retry-After"]


def test_retries_and_requeuing_are_counted_apart(zai):
    road = Road(zai, MAX_RETRIES="1")
    road.answers.extend([refusal(429, "1302"), refusal(500, "1234"), stream(sse(ERROR_1302), DONE), refusal(429, "1303")])
    text, error, record = road.ask()
    assert (text, error, record.retries, len(zai.requests)) == ("Hello", None, 4, 5)


# Gates

REFUSED = ztoapi.zai_error(ERROR_1302, 429)
NOBODY = socket.socket()  # a connection that never ends
NOBODY.close()


class Line:
    """Gates on that clock. Tickets that are to wait in the queue do so in threads, until their alarm goes."""

    def __init__(self, keys=1, limit=0, timeout=120.0, rand=0.0):
        self.clock, self.admitted, self.threads = RoadClock(), [], []
        self.gates = ztoapi.Gates(["key-number-%d" % i for i in range(1, keys + 1)], limit, timeout, self.clock, lambda: rand)

    def enter(self, ticket=None, model="glm-4.6"):
        """A ticket that got a slot, waiting by the clock if it must."""
        ticket = ticket or ztoapi.Ticket(model, RoadClient(self.clock))
        self.gates.enter(ticket)
        return ticket

    def queue(self, client=None, model="glm-4.6"):
        """A ticket that waits in the queue, in its thread."""
        ticket, queued = ztoapi.Ticket(model, client or ztoapi.Client(NOBODY, ztoapi.Settings(), clock=self.clock)), self.queued(model)

        def wait():
            with contextlib.suppress(ztoapi.ClientGone):
                self.gates.enter(ticket)
                self.admitted.append(ticket)
        self.threads.append(threading.Thread(target=wait, daemon=True))
        self.threads[-1].start()
        assert eventually(lambda: self.queued(model) == queued + 1)
        return ticket

    def queued(self, model="glm-4.6"):
        return self.gates.state()[1].get(model, 0)

    def ceiling(self):
        return [ceiling for _, _, ceiling, _ in self.gates.state()[0]]

    def join(self):
        for thread in self.threads:
            thread.join(5)
            assert not thread.is_alive()


def test_first_come_is_first_served():
    line = Line(limit=1)
    first = line.enter()
    tickets = [line.queue() for _ in range(6)]
    for i, ticket in enumerate([first] + tickets):
        line.gates.leave(ticket, served=True)
        assert eventually(lambda: len(line.admitted) == min(i + 1, 6))
    assert line.admitted == tickets and line.gates.state()[1] == {}
    line.join()


def test_models_have_queues_of_their_own():
    line = Line(limit=1)
    first = line.enter(model="glm-4.6")
    second = line.queue(model="glm-4.6")
    line.gates.leave(line.enter(model="glm-4.5"))
    line.gates.leave(first)
    line.join()
    line.gates.leave(second)


@pytest.mark.parametrize("limit", (1, 2, 5))
def test_max_concurrency_is_a_fixed_ceiling(limit):
    line = Line(limit=limit, timeout=120)
    tickets = [line.enter() for _ in range(limit)]
    began = line.clock.now
    with pytest.raises(ztoapi.ApiError) as caught:
        line.enter()
    assert line.clock.now - began == 120  # nothing is probed above it
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded") and "Retry-After" in caught.value.headers()
    line.clock.at(line.clock.now + 7, lambda: line.gates.leave(tickets[0]))
    began = line.clock.now
    line.enter()
    assert line.clock.now - began == 7


def test_the_ceiling_becomes_what_is_in_flight_without_the_refused_one_and_at_least_one():
    line = Line()
    tickets = [line.enter() for _ in range(12)]
    for left in (11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1):
        line.gates.leave(tickets.pop(), REFUSED)
        assert line.ceiling() == [left]


def test_the_ceiling_is_probed_up_to_max_concurrency_and_no_further():
    line = Line(limit=3)
    tickets = [line.enter() for _ in range(3)]
    for ticket in tickets[1:]:
        line.gates.leave(ticket, REFUSED)
    assert line.ceiling() == [1]
    began = line.clock.now
    line.enter()
    line.enter()
    assert line.clock.now - began == 120 and line.ceiling() == [3]
    with pytest.raises(ztoapi.ApiError):
        line.enter()
    assert line.clock.now - began == 240 and line.ceiling() == [3]


def test_looking_for_room_changes_nothing():
    """The metrics, the queue and other models may look as often as they like."""
    line = Line()
    ticket = line.enter()
    line.gates.leave(line.enter(), REFUSED)
    gate = ticket.gate
    line.clock.now += 1000
    assert [gate.room(line.clock.now), gate.room(line.clock.now), gate.ceiling] == [0, 0, 1]
    gate.probe(line.clock.now)
    gate.probe(line.clock.now)
    assert [gate.room(line.clock.now), gate.ceiling] == [1, 2]


@pytest.mark.parametrize("slot_frees_after, goes_after", ((0.25, 0.5), (0.5, 0.5), (5, 5)))
def test_a_refused_request_goes_when_a_slot_frees_but_not_before_its_backoff(slot_frees_after, goes_after):
    line = Line()
    other, refused = line.enter(), line.enter()
    line.gates.leave(refused, REFUSED)
    assert line.ceiling() == [1]
    began = line.clock.now
    line.clock.at(began + slot_frees_after, lambda: line.gates.leave(other, served=True))
    line.enter(refused)
    assert line.clock.now - began == goes_after


def test_a_refused_request_goes_back_to_the_head_of_the_queue():
    line = Line(limit=2)
    tickets = [line.enter(), line.enter()]
    behind = [line.queue(), line.queue()]
    line.gates.leave(tickets[1], REFUSED)
    line.gates.leave(tickets[0], REFUSED)
    assert line.queued() == 2 and not line.admitted  # nobody overtakes while the refused ones wait
    line.enter(tickets[0])
    line.clock.at(line.clock.now + 1, lambda: line.gates.leave(tickets[0], served=True))
    line.enter(tickets[1])
    assert not line.admitted
    for ticket, next_one in zip((tickets[1], behind[0]), behind):
        line.gates.leave(ticket, served=True)
        assert eventually(lambda: line.admitted and line.admitted[-1] is next_one)
    assert line.admitted == behind
    line.join()


def test_the_ceiling_is_probed_upward_by_one_after_60_seconds_without_a_refusal():
    line = Line()
    tickets = [line.enter() for _ in range(3)]
    line.gates.leave(tickets.pop(), REFUSED)
    began = line.clock.now
    line.enter()
    assert line.clock.now - began == 60 and line.ceiling() == [3]
    refused = line.enter()
    assert line.clock.now - began == 120 and line.ceiling() == [4]
    line.clock.now += 30
    line.gates.leave(refused, REFUSED)
    assert line.ceiling() == [3]
    line.enter(refused)
    assert line.clock.now - began == 210  # 60 s after the last refusal


def test_the_head_of_the_queue_goes_when_a_key_comes_back():
    line = Line(keys=2, limit=1)
    busy, other = line.enter(), line.enter()
    line.gates.leave(other, ztoapi.UpstreamError("exhausted", ztoapi.NEXT_KEY, retry_after=10.0))
    began = line.clock.now
    ticket = line.enter()
    assert line.clock.now - began == 10 and ticket.gate.key is other_key(line, busy)


def other_key(line, ticket):
    return next(key for key in line.gates.keys if key is not ticket.gate.key)


def test_the_next_in_the_queue_goes_on_when_the_head_leaves_it():
    class Noting(ztoapi.Client):
        waits = ()

        def wait(self, seconds):
            self.waits += (seconds,)
            super().wait(seconds)
    line = Line()
    refused = line.enter()
    line.gates.leave(refused, ztoapi.zai_error(ERROR_1302, 429, retry_after=30.0))
    head, behind = (Noting(NOBODY, ztoapi.Settings(), clock=line.clock) for _ in range(2))
    line.queue(head)
    line.queue(behind)
    head.hang_up()
    assert eventually(lambda: behind.waits[-1] <= 30, 2), "still waits for QUEUE_TIMEOUT: %s" % (behind.waits,)
    behind.hang_up()
    line.join()


def test_gates_of_models_that_taught_nothing_are_forgotten():
    line = Line()
    for i in range(100):
        line.gates.leave(line.enter(model="model-%d" % i), served=True)
    assert line.gates.state() == ([], {}) and not line.gates.gates and not line.gates.lines


@pytest.mark.parametrize("how", ("429", "first event in a 200"))
def test_a_burst_of_12_against_a_limit_of_2_succeeds_and_teaches(zai, how):
    body = stream(say("a"), 0.04, say("b"), FINISH, DONE)
    refused = []

    def limited(request):
        if zai.in_flight <= 2:
            return body
        refused.append(request)
        return stream(sse(ERROR_1302), DONE)
    if how == "429":
        zai.limit, zai.default = 2, body
    else:
        zai.default = limited
    with road(zai) as proxy:
        counts = []
        for _ in range(2 if how == "429" else 1):
            before = zai.refused + len(refused)
            results = together(*[lambda i=i: ask(proxy, i % 3) for i in range(12)])
            assert results == [(200, "ab", None, True)] * 12
            counts.append(zai.refused + len(refused) - before)
        assert counts[0] > 0 and sum(counts[1:]) <= 3, counts
        assert all(ceiling in (1, 2, 3) for _, _, ceiling, _ in proxy.server.upstream.gates.state()[0])


def test_max_concurrency_bounds_what_is_in_flight_at_zai(zai):
    zai.default = stream(say("a"), 0.03, FINISH, DONE)
    with road(zai, MAX_CONCURRENCY="3") as proxy:
        assert all(whole for *_, whole in together(*[lambda i=i: ask(proxy, i % 2) for i in range(12)])) and zai.most_in_flight == 3


def test_queue_timeout_is_a_429_and_the_waiting_is_told(zai):
    zai.default = stream(say("a"), 0.3, FINISH, DONE)
    with road(zai, MAX_CONCURRENCY="1", QUEUE_TIMEOUT="0.1") as proxy:
        with proxy.open_stream() as occupant:
            assert eventually(lambda: zai.in_flight == 1)
            status, headers, body = proxy.chat()
            assert status == 429 and body["error"]["code"] == "rate_limit_exceeded" and body["error"]["type"] and int(headers["Retry-After"]) >= 1
            assert int(headers["x-ztoapi-queue-ms"]) >= 100
            assert read_stream(occupant)[3] and len(zai.requests) == 1


@BOTH
def test_queue_ms_tells_how_long_a_request_waited(zai, streamed):
    zai.default = stream(say("a"), 0.1, FINISH, DONE)
    with road(zai, MAX_CONCURRENCY="1") as proxy, proxy.open_stream() as occupant:
        assert eventually(lambda: zai.in_flight == 1)
        headers = (proxy.stream() if streamed else proxy.chat())[1]
        assert 20 <= int(headers["x-ztoapi-queue-ms"]) <= 5000
        assert int(read_stream(occupant)[1]["x-ztoapi-queue-ms"]) < 50


# Several keys

KEYS = ["%d123456789abcdef.SecretSecret%d" % (i, i) for i in (1, 2, 3)]


def error_of(code, message="no", status=429, **more):
    return ztoapi.zai_error({"error": {"code": code, "message": message}}, status, **more)


def test_the_key_with_the_most_room_serves():
    for limit in (0, 2):
        line = Line(keys=2, limit=limit)
        first, second, third, fourth = [line.enter() for _ in range(4)]
        assert sorted(gate[3] for gate in line.gates.state()[0]) == [2, 2]
        freed = second.gate
        line.gates.leave(second, served=True)
        assert line.enter().gate is freed


def test_a_key_that_learned_a_low_ceiling_gets_less():
    line = Line(keys=2)
    first = line.enter()
    line.enter()
    line.gates.leave(first, REFUSED)
    line.clock.now += 1
    assert [line.enter().gate.key.name[:2] for _ in range(3)].count("#1") <= 1


@pytest.mark.parametrize("code, status", [(code, 401) for code in "401 1000 1001 1002 1003 1004".split()] + [
    (code, 429) for code in "1110 1111 1112 1113 1304 1308 1309 1310".split()])
def test_a_refused_or_exhausted_key_is_set_aside_for_ten_minutes_and_the_next_one_serves(zai, code, status):
    road = Road(zai, ZAI_API_KEY=",".join(KEYS[:2]))
    road.answers.append(refusal(status, code))
    text, error, record = road.ask()
    assert (text, error, road.keys(), road.gaps()) == ("Hello", None, [KEYS[0], KEYS[1]], [0]) and record.retries == 1
    assert road.ask()[0] == "Hello" and road.ask("glm-4.5")[0] == "Hello" and road.keys()[2:] == [KEYS[1]] * 2
    road.clock.now += 599
    assert road.ask()[0] == "Hello" and road.keys()[4:] == [KEYS[1]]
    road.clock.now += 2
    assert road.ask()[0] == "Hello" and road.keys()[5:] == [KEYS[0]]


@pytest.mark.parametrize("code", ("1308", "1310"))
def test_an_exhausted_key_is_set_aside_until_its_reset(zai, code):
    road = Road(zai, ZAI_API_KEY=",".join(KEYS[:2]))
    now = 1780000000 + road.clock.now
    reset = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now + 8 * 3600 + 5000))  # Beijing time
    road.answers.append(refusal(429, code, "Usage limit reached for 5 hour. Your limit will reset at " + reset))
    assert road.ask()[0] == "Hello" and road.keys() == KEYS[:2]
    road.clock.now += 4990
    assert road.ask()[0] == "Hello" and road.keys()[2:] == [KEYS[1]]
    road.clock.now += 20
    assert road.ask()[0] == "Hello" and road.keys()[3:] == [KEYS[0]]


def test_a_key_stays_aside_though_an_earlier_answer_with_it_ends_well():
    line = Line(keys=2)
    running, second, refused = line.enter(), line.enter(), line.enter()
    assert running.gate is refused.gate
    line.gates.leave(refused, error_of("1308"))
    line.gates.leave(running, served=True)
    line.gates.leave(second, served=True)
    assert line.enter().gate.key.name[:2] == "#2"


def test_a_lone_key_is_never_set_aside(zai):
    road = Road(zai)
    for code in ("1113", "401", "1304"):
        road.answers.append(refusal(429, code))
        assert road.ask()[1] is not None
        assert road.ask()[0] == "Hello"
    assert len(road.keys()) == 6


def test_with_all_keys_aside_the_one_whose_turn_comes_first_is_tried(zai):
    road = Road(zai, ZAI_API_KEY=",".join(KEYS))
    now = 1780000000 + road.clock.now
    for seconds in (7000, 5000, 6000):
        reset = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now + 8 * 3600 + seconds))
        road.answers.append(refusal(429, "1308", "Your limit will reset at " + reset))
    _, error, record = road.ask()
    assert (error.status, error.code, record.retries) == (429, "insufficient_quota", 2) and road.keys() == KEYS and "Retry-After" in error.headers()
    road.clock.now += 10
    text, error, _ = road.ask()
    assert (text, error) == ("Hello", None) and road.keys()[3:] == [KEYS[1]]


@BOTH
def test_the_client_sees_nothing_of_a_key_that_fails(zai, streamed):
    zai.scripts.extend([refusal(401, "401"), stream(sse({"error": {"code": "1113", "message": "no"}}))])
    with road(zai, ZAI_API_KEY=",".join(KEYS), MAX_RETRIES="0") as proxy:
        assert ask(proxy, streamed) == (200, "Hello", None, True)
        assert [request["headers"]["Authorization"].split()[1] for request in zai.requests] == KEYS


def test_an_empty_purse_at_every_key_is_told_with_no_second_try(zai):
    zai.default = refusal(429, "1113")
    with road(zai, ZAI_API_KEY=",".join(KEYS)) as proxy:
        status, headers, body = proxy.chat()
        assert (status, body["error"]["code"], headers["x-should-retry"]) == (429, "insufficient_quota", "false") and len(zai.requests) == 3


@pytest.mark.parametrize("script", (
    lambda key: refusal(401, "401", "token %s expired" % key), lambda key: refusal(500, "1234", "%s and %s" % tuple(key.split("."))),
    lambda key: refusal(400, "1210", "key " + key), lambda key: stream(sse({"error": {"code": "1234", "message": "Bearer " + key}})),
    lambda key: stream(say("a"), sse({"error": {"code": "1234", "message": "Bearer " + key}})),
    lambda key: [("HTTP/1.1 200 OK\r\nX-Log-Id: %s\r\nContent-Type: text/event-stream\r\n\r\n" % key).encode(), CLOSE],
    lambda key: [b"HTTP/1.1 %b\r\n\r\n" % key.encode(), CLOSE]),
    ids=("401", "halves", "400", "first event", "later event", "log id", "head"))
@BOTH
def test_no_key_is_seen_in_answers_or_logs(zai, caplog, script, streamed):
    caplog.set_level(logging.DEBUG, "ztoapi")
    zai.default = lambda request: script(request["headers"]["Authorization"].split()[1])
    with road(zai, ZAI_API_KEY=",".join(KEYS[:2]), DEBUG_MODE="true") as proxy:
        with proxy.connect() as sock:
            sock.sendall(raw_chat(chat_body(stream=streamed), ["Connection: close"]))
            seen = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
        proxy.idle()
    assert "error" in seen and "key #1" in caplog.text
    for key in KEYS[:2]:
        for part in [key] + key.split("."):
            assert part not in seen and part not in caplog.text


# The client's leaving

def vacant(proxy):
    gates, queued = proxy.server.upstream.gates.state()
    return not any(gate[3] for gate in gates) and not queued and not proxy.server.watch.clients


def connecting(proxy, zai):
    return any(client.upstream for client in list(proxy.server.watch.clients))


def arrived(proxy, zai):
    return zai.in_flight == 1


def backing_off(proxy, zai):
    gates, _ = proxy.server.upstream.gates.state()
    return len(zai.requests) == 1 and not zai.in_flight and not any(gate[3] for gate in gates)


BUSY = "Retry-After: 60"
PHASES = {  # what Z.ai does; when the phase is reached; whether a connection to Z.ai is then open
    "before headers": ([30], arrived, True),
    "before the first token": ([HEAD, 30], arrived, True),
    "mid-stream": (stream(say("Hel"), 30), arrived, True),
    "in a backoff": (answer(500, ERROR_1234, BUSY), backing_off, False),
    "refused, in the queue": (answer(429, ERROR_1302, BUSY), backing_off, False),
}


@contextlib.contextmanager
def leaving(proxy, caplog, streamed, how="close"):
    """A chat whose client leaves, and is gone within a second, without an error in the log."""
    caplog.set_level(logging.INFO, "ztoapi")
    caplog.clear()
    sock = proxy.connect()
    sock.sendall(raw_chat(chat_body(stream=streamed)))
    yield
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how == "end of file":
        sock.shutdown(socket.SHUT_WR)
    else:
        sock.close()
    left = time.monotonic()
    assert eventually(lambda: vacant(proxy), 3) and time.monotonic() - left < 1
    proxy.idle()
    sock.close()
    assert proxy.server.metrics.cancelled == 1 and proxy.server.metrics.failed == 0 and " 499 " in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize("phase", PHASES)
@BOTH
def test_the_clients_leaving_is_noticed(zai, brisk, caplog, phase, streamed):
    zai.default, reached, connected = PHASES[phase]
    with road(zai) as proxy:
        with leaving(proxy, caplog, streamed):
            assert eventually(lambda: reached(proxy, zai))
        assert eventually(lambda: zai.cut_by_client == connected, 1) and len(zai.requests) == 1


@pytest.mark.parametrize("how, streamed", (("reset", True), ("end of file", False)))
def test_every_way_of_leaving_is_noticed(zai, caplog, how, streamed):
    zai.default = stream(say("Hel"), 30)
    with road(zai) as proxy:
        with leaving(proxy, caplog, streamed, how):
            assert eventually(lambda: arrived(proxy, zai))
        assert eventually(lambda: zai.cut_by_client == 1, 1)


@BOTH
def test_the_clients_leaving_the_queue_is_noticed(zai, brisk, caplog, streamed):
    zai.default = stream(say("Hel"), 30)
    with road(zai, MAX_CONCURRENCY="1") as proxy, proxy.open_stream() as occupant:
        assert eventually(lambda: zai.in_flight == 1)
        with contextlib.closing(proxy.connect()) as sock:
            sock.sendall(raw_chat(chat_body(stream=streamed)))
            assert eventually(lambda: proxy.server.upstream.gates.state()[1] == {"glm-4.6": 1})
        assert eventually(lambda: proxy.server.upstream.gates.state()[1] == {}, 1) and eventually(lambda: proxy.server.metrics.cancelled == 1)
        occupant.close()
        proxy.idle()
        assert len(zai.requests) == 1 and proxy.server.metrics.cancelled == 2 and not [r for r in caplog.records if r.levelno > logging.INFO]


def test_a_slot_never_goes_to_one_who_has_left(zai):
    """Not even when a write that fails leaves it, before the watch looks."""
    zai.default = stream(*[say("Hel"), 0.01] * 500)
    with road(zai, MAX_CONCURRENCY="1") as proxy:
        socks = [proxy.open_stream() for _ in range(6)]
        assert eventually(lambda: zai.in_flight == 1 and proxy.server.upstream.gates.state()[1] == {"glm-4.6": 5})
        for sock in socks:
            sock.close()
        assert eventually(lambda: vacant(proxy)) and len(zai.requests) == 1


@BOTH
def test_the_clients_leaving_while_connecting_is_noticed(zai, brisk, caplog, streamed):
    with stuck_listener() as port, road(ZAI_BASE_URL="http://127.0.0.1:%d" % port) as proxy, leaving(proxy, caplog, streamed):
        assert eventually(lambda: connecting(proxy, zai))


@pytest.mark.parametrize("scheme", ("https", "tunnel"))
def test_the_clients_leaving_in_a_handshake_is_noticed(brisk, caplog, monkeypatch, scheme):
    with MuteListener() as mute:
        if scheme == "tunnel":
            through(monkeypatch, "https", "http://127.0.0.1:%d" % mute.port)
        with road(ZAI_BASE_URL="https://api.z.ai/api" if scheme == "tunnel" else "https://127.0.0.1:%d/api" % mute.port) as proxy:
            with leaving(proxy, caplog, True):
                assert mute.heard.wait(5)
            assert mute.ended.wait(1)


def test_the_leaving_of_a_client_that_had_sent_more_is_noticed(zai, brisk):
    zai.default = stream(say("Hel"), 30)
    with road(zai) as proxy:
        with contextlib.closing(proxy.connect()) as sock:
            sock.sendall(raw_chat(chat_body(stream=True)))
            assert eventually(lambda: zai.in_flight == 1)
            sock.sendall(raw_chat(chat_body(stream=True)))  # pipelined
        assert eventually(lambda: zai.cut_by_client == 1, 1)


def test_nothing_is_sent_to_a_client_that_has_its_answer():
    """A heartbeat that comes due while an error is being answered must not begin a stream behind it."""
    ours, theirs = socket.socketpair()
    looking, go_on = threading.Event(), threading.Event()

    class Slow:
        """A socket that keeps the watch busy."""

        def fileno(self):
            looking.set()
            go_on.wait(5)
            return -1

    def answer_it():
        with watch.over(ztoapi.Client(Slow(), ztoapi.Settings())):
            with watch.over(client):
                ticking.start()
                assert looking.wait(5)
            return sink.started

    def release():
        looking.wait(5)
        time.sleep(0.05)  # answer_it() is through by then, or waits for the watch
        go_on.set()
        ticking.join(5)
    watch = ztoapi.Watch(lambda: time.monotonic() + 60)
    sink = ztoapi.EventSink(ours, lambda: b"HEAD", ztoapi.Envelope("id", 0, "model"), heartbeat_s=10.0)
    client = ztoapi.Client(ours, ztoapi.Settings(), sink)
    ticking = threading.Thread(target=watch.tick)
    started, _ = together(answer_it, release)
    assert sink.started == started
    ours.close()
    theirs.close()


# Heartbeats

@pytest.mark.parametrize("begin", ([0.15], [HEAD, 0.15]), ids=("before headers", "before the first token"))
def test_a_heartbeat_is_a_valid_empty_chunk_and_the_opening_one_comes_first(zai, brisk, begin):
    zai.default = begin + stream(*HEALTHY)[len(begin) - 1:]
    with road(zai, HEARTBEAT="0.04") as proxy, proxy.open_stream() as sock:
        assert sock.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200" and zai.in_flight == 1  # committed before Z.ai has said anything
        _, _, events, clean = read_stream(sock)
        chunks = [event for event in events if isinstance(event, dict)]
        assert clean and said(events) == "Hello" and finish_of(events) == ["stop"] and events[-1] == "[DONE]"
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        beats = [chunk for chunk in chunks if chunk["choices"][0]["delta"] == {} and chunk["choices"][0]["finish_reason"] is None]
        assert beats and len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
        assert sum("role" in chunk["choices"][0]["delta"] for chunk in chunks) == 1


def test_a_heartbeat_comes_mid_stream_too(zai, brisk):
    zai.default = stream(say("Hel"), 0.15, say("lo"), FINISH, DONE)
    with road(zai, HEARTBEAT="0.04") as proxy:
        _, _, events, clean = proxy.stream()
        deltas = [e["choices"][0]["delta"] for e in events[:-1]]
        assert clean and said(events) == "Hello" and {} in deltas[deltas.index({"content": "Hel"}):deltas.index({"content": "lo"})]


def test_no_heartbeat_comes_before_its_time_or_at_0(zai, brisk):
    zai.default = stream(0.1, *HEALTHY)
    for beat in ("10", "0"):
        with road(zai, HEARTBEAT=beat) as proxy:
            events = proxy.stream()[2]
            assert not [e for e in events[:-1] if e["choices"][0]["delta"] == {} and not e["choices"][0]["finish_reason"]]


def test_a_quick_refusal_keeps_its_status_with_heartbeats_on(zai, brisk):
    zai.default = refusal(400, "1210")
    with road(zai, HEARTBEAT="0.2") as proxy:
        assert ask(proxy, True)[0] == 400


def test_a_json_answer_has_no_heartbeats_and_keeps_its_status(zai, brisk):
    zai.scripts.append([0.15] + refusal(400, "1210"))
    zai.default = [0.15] + stream(*HEALTHY)
    with road(zai, HEARTBEAT="0.03") as proxy:
        assert ask(proxy, False)[0] == 400 and ask(proxy, False) == (200, "Hello", None, True)


def test_retrying_goes_on_after_a_heartbeat(zai, brisk):
    zai.scripts.extend([[0.1] + refusal(500, "1234"), [HEAD, 0.1, CLOSE]])
    with road(zai, HEARTBEAT="0.03") as proxy:
        status, _, events, clean = proxy.stream()
        assert clean and said(events) == "Hello" and len(zai.requests) == 3
        assert sum("role" in e["choices"][0]["delta"] for e in events if isinstance(e, dict)) == 1


def test_queueing_goes_on_after_a_heartbeat(zai, brisk):
    zai.default = stream(0.2, *HEALTHY)
    with road(zai, HEARTBEAT="0.03", MAX_CONCURRENCY="1") as proxy, proxy.open_stream() as first:
        assert eventually(lambda: zai.in_flight == 1)
        with proxy.open_stream() as second:
            second.settimeout(5)
            assert second.recv(1, socket.MSG_PEEK) and proxy.server.upstream.gates.state()[1] == {"glm-4.6": 1}
            for _, _, events, clean in together(lambda: read_stream(first), lambda: read_stream(second)):
                assert (said(events), clean) == ("Hello", True)


@pytest.mark.parametrize("script, code", (
    ([0.1] + refusal(400, "1210"), "invalid_value"), ([0.1] + refusal(429, "1113"), "insufficient_quota"), ([0.1, RESET], "upstream_error"),
    ([0.1] + stream(sse(ERROR_1234)), "upstream_error")), ids=("400", "429", "reset", "event"))
def test_a_failure_after_a_heartbeat_is_the_in_stream_error(zai, brisk, script, code):
    zai.default = script
    with road(zai, HEARTBEAT="0.03", MAX_RETRIES="0") as proxy:
        events = assert_in_stream_error(proxy)
        assert events[0]["choices"][0]["delta"]["role"] == "assistant" and events[-1]["error"]["code"] == code


def test_queue_timeout_after_a_heartbeat_is_the_in_stream_error(zai, brisk):
    zai.default = stream(say("Hel"), 30)
    with road(zai, HEARTBEAT="0.03", MAX_CONCURRENCY="1", QUEUE_TIMEOUT="0.1") as proxy, proxy.open_stream():
        assert eventually(lambda: zai.in_flight == 1)
        assert assert_in_stream_error(proxy)[-1]["error"]["code"] == "rate_limit_exceeded"


# Slow readers and large answers

def count_text(sock, letter):
    """How often `letter`, which is nowhere else, comes in a streamed answer; and whether that ends as it should."""
    count, tail = 0, b""
    while not tail.endswith(b"data: [DONE]\n\n\r\n" + END):
        data = sock.recv(1 << 20)
        if not data:
            return count, False
        count, tail = count + data.count(letter), (tail + data)[-64:]
    return count, True


def rss():
    """Resident bytes of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


class Torrent:
    """A script of `count` equal events; `sent` counts them."""

    def __init__(self, count, size):
        self.event, self.sent = chunked(say("Q" * size)), 0
        self.script = [HEAD] + [self.event, self.count] * count + [chunked(FINISH), END]

    def count(self, fake, request):
        self.sent += 1


def test_a_slow_reader_slows_zai_down_and_costs_no_memory(zai):
    torrent = Torrent(600, 1 << 16)
    zai.default = torrent.script
    with road(zai) as proxy, proxy.open_stream() as sock:
        before, sent = rss(), -1
        while sent != torrent.sent:  # until Z.ai is held up
            sent = torrent.sent
            time.sleep(0.2)
        assert sent < 500 and rss() - before < 16 << 20
        assert count_text(sock, b"Q") == (600 << 16, True) and torrent.sent == 600


def test_a_client_that_takes_no_write_within_client_timeout_is_dropped(zai, brisk):
    zai.default = Torrent(1000, 1 << 16).script
    with road(zai, CLIENT_TIMEOUT="0.2") as proxy, proxy.open_stream():
        assert eventually(lambda: zai.cut_by_client == 1) and eventually(lambda: vacant(proxy))
        proxy.idle()
        assert proxy.server.metrics.cancelled == 1


def test_a_slow_reader_is_no_dropped_one(zai, brisk):
    zai.default = Torrent(300, 1 << 16).script
    with road(zai, CLIENT_TIMEOUT="0.3") as proxy, proxy.open_stream() as sock:
        for _ in range(5):
            time.sleep(0.08)
            sock.recv(1 << 20)
        assert count_text(sock, b"Q")[1]


def test_heartbeats_into_a_full_window_wait_for_room_and_come_whole():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        theirs.connect(listener.getsockname())
        with listener.accept()[0] as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            clock = RoadClock()
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            sink = ztoapi.EventSink(ours, lambda: head, ztoapi.Envelope("id", 0, "model"), heartbeat_s=1.0, clock=clock)
            client = ztoapi.Client(ours, ztoapi.Settings(), sink, clock)
            watch = ztoapi.Watch(clock)
            with watch.over(client):
                for _ in range(2000):
                    clock.now += 1
                    watch.tick()
            last = ztoapi.Chunk({}, "stop")
            (_, _, events, clean), _ = together(lambda: read_stream(theirs), lambda: sink.write(sink.envelope.encode([last]), last=True))
            deltas = [e["choices"][0]["delta"] for e in events[:-1]]
            assert clean and events[-1] == "[DONE]" and deltas[0]["role"] == "assistant" and 5 < len(deltas) < 1000 and not any(deltas[1:])


@pytest.mark.parametrize("script, streamed", (
    (stream(*HEALTHY), True), (stream(*HEALTHY), False), (EARLY["reset before headers"], True), (EARLY["error as first event"], False),
    (EARLY["HTML 502"], True), ([HEAD, chunked(say("Hel")), CLOSE], True), (None, True)),
                         ids=("well", "well, json", "reset", "first event, json", "HTML 502", "cut", "refused"))
def test_a_request_leaves_nothing_for_the_garbage_collector(zai, script, streamed):
    """What it leaves, it leaves with its body and its buffers, for as long as the collector likes."""
    kinds = (ztoapi.Handler, ztoapi.Client, ztoapi.EventSink, ztoapi.ZaiRequest, ztoapi.KeepAliveConnection, ztoapi.Response, ztoapi.SSEDecoder, ztoapi.ChunkTranslator)

    def left():
        return {id(thing): type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, kinds)}
    zai.default = script
    if script is None:
        zai.close()
    gc.collect()
    before = left()
    gc.disable()
    try:
        with road(zai, MAX_RETRIES="1") as proxy:
            ask(proxy, streamed)
            proxy.idle()
            assert eventually(lambda: left().keys() <= before.keys(), 1), [kind for key, kind in left().items() if key not in before]
    finally:
        gc.enable()


@pytest.mark.parametrize("script", (
    [HEAD, chunked(say("x" * (17 << 20))), chunked(FINISH), END], [HEAD, b"1100000\r\n" + b"x" * (17 << 20), b"\r\n" + END]),
                         ids=("an event", "a line without an end"))
def test_an_event_of_more_than_16_mib_is_an_error(zai, script):
    zai.default = script
    with road(zai) as proxy:
        status, text, error, _ = ask(proxy, True)
        assert status == 502 and not text and error["code"] == "upstream_error" and len(zai.requests) == 1


def test_an_event_of_more_than_16_mib_mid_stream_is_the_in_stream_error(zai):
    zai.default = [HEAD, chunked(say("Hel")), chunked(say("x" * (17 << 20))), chunked(FINISH), END]
    with road(zai) as proxy:
        assert said(assert_in_stream_error(proxy)) == "Hel" and len(zai.requests) == 1


def test_an_event_of_almost_16_mib_passes(zai):
    zai.default = stream(say("x" * (15 << 20)), FINISH, DONE)
    with road(zai) as proxy:
        assert len(ask(proxy, True)[1]) == 15 << 20


def test_a_json_answer_of_more_than_64_mib_is_an_error(zai):
    one = chunked(say("\u4e2d" * ((1 << 20) // 3)))  # a mebibyte, whatever the count of characters
    zai.default = [HEAD] + [one] * 66 + [chunked(FINISH), END]
    with road(zai) as proxy:
        status, _, error, _ = ask(proxy, False)
        assert status == 502 and error["code"] == "upstream_error" and len(zai.requests) == 1


# Codings, log id

GZIP_HEAD = HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")


def packed(wbits, *pieces):
    packer = zlib.compressobj(wbits=wbits)
    return [packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in pieces] + [packer.flush()]


@pytest.mark.parametrize("coding, wbits", (("gzip", 31), ("GZIP", 31), ("x-gzip", 31), ("deflate", 15)))
@BOTH
def test_compressed_answers_are_understood_all_the_same(zai, coding, wbits, streamed):
    head = HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: %b\r\n\r\n" % coding.encode())
    zai.default = [head] + [chunked(piece) for piece in packed(wbits, *HEALTHY) if piece] + [END]
    body = b"".join(packed(wbits, json.dumps({"error": {"code": "1211", "message": "Unknown Model"}}).encode()))
    with road(zai) as proxy:
        assert ask(proxy, streamed) == (200, "Hello", None, True)
        zai.scripts.append(answer(400, body, "Content-Encoding: " + coding))
        assert ask(proxy, streamed)[2]["code"] == "model_not_found"
        assert zai.requests[0]["headers"]["Accept-Encoding"] == "identity"


@BOTH
def test_a_text_may_be_packed_in_several_packets(zai, streamed):
    zai.default = [GZIP_HEAD] + [chunked(b"".join(packed(31, piece))) for piece in HEALTHY] + [END]
    with road(zai) as proxy:
        assert ask(proxy, streamed) == (200, "Hello", None, True)
        zai.scripts.append([GZIP_HEAD.replace(b"gzip", b""), *stream(*HEALTHY)[1:]])
        assert ask(proxy, streamed) == (200, "Hello", None, True)


def test_compressed_events_pass_as_they_come(zai, brisk):
    pieces = [chunked(piece) for piece in packed(31, *HEALTHY)]
    zai.default = [GZIP_HEAD] + pieces[:3] + [30]
    with road(zai) as proxy, proxy.open_stream() as sock, sock.makefile("rb") as file:
        assert any(b'"Hel"' in line for line in iter(file.readline, b""))


def test_a_compressed_answer_is_unpacked_a_piece_at_a_time():
    """A thousandth of its size comes over the wire: unpacked at once, one read would be 64 MiB."""
    packer = zlib.compressobj(wbits=31)
    data = b"".join(packer.compress(b"x" * (1 << 20)) for _ in range(100)) + packer.flush()

    class Wire(io.BytesIO):
        recv = io.BytesIO.read
    wire = Wire(GZIP_HEAD + chunked(data) + END)
    response = ztoapi.Response(wire, ztoapi.Client(None, ztoapi.Settings()), ztoapi.Pool(), "key")
    sizes = [len(piece) for piece in iter(response.read, b"")]
    assert sum(sizes) == 100 << 20 and max(sizes) <= 1 << 16


def test_a_compressed_event_has_the_same_bound_as_any(zai):
    zai.default = [GZIP_HEAD] + [chunked(piece) for piece in packed(31, say("x" * (17 << 20)), FINISH) if piece] + [END]
    with road(zai) as proxy:
        status, text, error, _ = ask(proxy, True)
        assert status == 502 and not text and error["code"] == "upstream_error" and len(zai.requests) == 1


@pytest.mark.parametrize("coding", ("br", "zstd"))
@pytest.mark.parametrize("status", (200, 400))
@BOTH
def test_a_coding_that_cannot_be_read_is_a_clear_502(zai, coding, status, streamed):
    zai.default = answer(status, b"\x8b\x00\x80hello\x03", "Content-Encoding: " + coding)
    with road(zai) as proxy:
        got, _, error, _ = ask(proxy, streamed)
        assert got == 502 and coding in error["message"] and len(zai.requests) == 1


@pytest.mark.parametrize("data", (b"no gzip at all", b"".join(packed(31, *HEALTHY))[:60]), ids=("broken", "cut"))
def test_broken_gzip_is_an_error(zai, data):
    zai.default = [GZIP_HEAD, chunked(data), END]
    with road(zai) as proxy:
        assert ask(proxy, False)[0] == 502


def test_the_log_id_of_zai_is_in_the_answer_and_in_the_log(zai, caplog):
    caplog.set_level(logging.INFO, "ztoapi")
    with road(zai) as proxy:
        zai.scripts.extend([stream(*HEALTHY), stream(*HEALTHY), refusal(400, "1210")])
        for get in (proxy.stream, proxy.chat, proxy.chat):
            caplog.clear()
            assert get()[1]["x-zai-log-id"] == "20260711073209851e7f8c12c44579"
            assert eventually(lambda: "20260711073209851e7f8c12c44579" in caplog.text)


def test_retries_are_counted_in_log_and_metrics(zai, caplog):
    caplog.set_level(logging.INFO, "ztoapi")
    zai.scripts.extend([refusal(500, "1234"), refusal(429, "1305")])
    with road(zai) as proxy:
        assert ask(proxy, True)[3]
        proxy.idle()
        assert "retries=2" in caplog.text and "ztoapi_retries_total 2" in proxy.call("GET", "/metrics")[2]


# Roads through proxies, and TLS

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
"""  # of nobody but these tests: "localhost", until 2120


@contextlib.contextmanager
def pem_file():
    """The path of a file with PEM in it, which serves as certificate, key and store at once."""
    handle, path = tempfile.mkstemp(".pem")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(PEM)
        yield path
    finally:
        os.unlink(path)


def tls_context(path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


class HttpProxy:
    """An HTTP proxy: CONNECT, and plain requests passed on. `heads`: the first head of each connection."""

    def __init__(self, reply=b"HTTP/1.1 200 Connection established\r\n\r\n"):
        self.heads, self.reply, self.socket = [], reply, socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = "http://127.0.0.1:%d" % self.socket.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.serve, args=self.socket.accept()[:1], daemon=True).start()

    def serve(self, client):
        with client, contextlib.suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                more = client.recv(65536)
                if not more:
                    return
                data += more
            head, _, _ = data.partition(b"\r\n\r\n")
            self.heads.append(head.decode())
            method, target, _ = head.split(b"\r\n")[0].decode().split()
            place = urllib.parse.urlsplit(target if method != "CONNECT" else "//" + target)
            if method == "CONNECT":
                client.sendall(self.reply)
                data = b""
            if b" 200 " not in self.reply:
                return
            with socket.create_connection((place.hostname, place.port)) as server:
                server.sendall(data)
                back = threading.Thread(target=self.pump, args=(server, client), daemon=True)
                back.start()
                self.pump(client, server)
                back.join(10)

    @staticmethod
    def pump(source, sink):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                sink.sendall(data)
        for sock in (source, sink):
            shut_down(sock)

    def close(self):
        shut_down(self.socket)
        self.socket.close()


@pytest.fixture
def http_proxy():
    proxy = HttpProxy()
    yield proxy
    proxy.close()


@pytest.fixture
def trusted(monkeypatch):
    """A fake Z.ai with TLS, whose certificate SSL_CERT_FILE vouches for."""
    with pem_file() as path:
        monkeypatch.setenv("SSL_CERT_FILE", path)
        fake = FakeZai(tls_context(path))
        yield fake
        fake.close()


def through(monkeypatch, scheme, proxy, no_proxy=""):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, False)
    monkeypatch.setenv(scheme.upper() + "_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", no_proxy)


@BOTH
def test_plain_requests_go_through_http_proxy_over_one_connection(zai, http_proxy, monkeypatch, streamed):
    through(monkeypatch, "http", http_proxy.url)
    with road(zai) as proxy:
        for _ in range(3):
            assert ask(proxy, streamed) == (200, "Hello", None, True)
            proxy.idle()
        assert len(http_proxy.heads) == 1 and http_proxy.heads[0].startswith("POST %s/chat/completions " % zai.url) and len(zai.requests) == 3


@BOTH
def test_tls_goes_through_https_proxy_by_connect_over_one_connection(trusted, http_proxy, monkeypatch, streamed):
    through(monkeypatch, "https", http_proxy.url)
    with road(trusted) as proxy:
        for _ in range(3):
            assert ask(proxy, streamed) == (200, "Hello", None, True)
            proxy.idle()
        assert len(http_proxy.heads) == 1 and http_proxy.heads[0].startswith("CONNECT localhost:%d " % trusted.port) and len(trusted.requests) == 3
        assert "uthorization" not in http_proxy.heads[0] and trusted.requests[0]["path"] == "/api/paas/v4/chat/completions"


@pytest.mark.parametrize("no_proxy", ("localhost", "example.com,localhost", "*"))
def test_no_proxy_goes_around_the_proxy(trusted, http_proxy, monkeypatch, no_proxy):
    through(monkeypatch, "https", http_proxy.url, no_proxy)
    with road(trusted) as proxy:
        assert ask(proxy, True)[3] and not http_proxy.heads


def test_a_proxys_password_reaches_the_proxy_alone(trusted, http_proxy, monkeypatch):
    through(monkeypatch, "https", http_proxy.url.replace("//", "//user:pass-word@"))
    with road(trusted) as proxy:
        assert ask(proxy, True)[3]
        assert "Proxy-Authorization: Basic dXNlcjpwYXNzLXdvcmQ=" in http_proxy.heads[0].replace("Proxy-authorization", "Proxy-Authorization")
        assert "Proxy-Authorization" not in trusted.requests[0]["headers"]


@pytest.mark.parametrize("reply", (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", b"HTTP/1.1 403 Forbidden\r\n\r\n", b"what?\r\n\r\n", b""))
def test_a_proxy_that_refuses_is_a_502(trusted, monkeypatch, reply):
    refusing = HttpProxy(reply)
    through(monkeypatch, "https", refusing.url)
    with road(trusted, MAX_RETRIES="1") as proxy:
        status, _, error, _ = ask(proxy, True)
        assert status == 502 and error["code"] == "upstream_error" and trusted.connections == 0 and refusing.heads
    refusing.close()


def test_tls_with_a_certificate_the_store_does_not_know_is_a_502_that_names_ssl_cert_file(monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", False)
    with pem_file() as path:
        fake = FakeZai(tls_context(path))
        with road(fake) as proxy:
            for streamed in (True, False):
                status, _, error, _ = ask(proxy, streamed)
                assert status == 502 and error["code"] == "upstream_error" and "SSL_CERT_FILE" in error["message"]
            assert fake.requests == [] and fake.connections == 2  # it cannot heal
        fake.close()


def test_a_certificate_of_another_name_is_a_502(trusted):
    with road(trusted, ZAI_BASE_URL=trusted.url.replace("localhost", "127.0.0.1")) as proxy:
        status, _, error, _ = ask(proxy, True)
        assert status == 502 and error["code"] == "upstream_error" and trusted.requests == [] and trusted.connections == 1


def test_https_to_a_plain_port_is_a_502():
    with MuteListener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as plain, road(ZAI_BASE_URL="https://localhost:%d" % plain.port, MAX_RETRIES="0") as proxy:
        status, _, error, _ = ask(proxy, True)
        assert status == 502 and "TLS" in error["message"]


@BOTH
def test_tls_with_ssl_cert_file_answers_over_one_connection(trusted, streamed):
    with road(trusted) as proxy:
        for _ in range(3):
            assert ask(proxy, streamed) == (200, "Hello", None, True)
            proxy.idle()
        assert trusted.connections == 1


@pytest.mark.parametrize("fault", (
    "reset before headers", "closed before headers", "reset after headers", "closed after headers", "reset mid-chunk", "1305"))
def test_faults_heal_over_tls_too(trusted, fault):
    with road(trusted) as proxy:
        trusted.scripts.append(EARLY[fault])
        assert ask(proxy, True) == (200, "Hello", None, True) and len(trusted.requests) == 2
        trusted.scripts.append(EARLY[fault])  # on a used connection now
        assert ask(proxy, True) == (200, "Hello", None, True) and len(trusted.requests) == 4


@pytest.mark.parametrize("fault", ("reset", "clean end between chunks", "reset mid-chunk"))
def test_cuts_over_tls_are_cuts(trusted, fault):
    trusted.default = [HEAD, chunked(say("Hel")), *LATE[fault]]
    with road(trusted) as proxy:
        assert said(assert_in_stream_error(proxy)) == "Hel" and ask(proxy, False)[0] == 502 and len(trusted.requests) == 2


def test_what_stands_behind_an_answer_over_tls_never_becomes_the_next(trusted):
    """Bytes that TLS has decrypted and nobody has read are seen by no poll()."""
    good, other = (b"".join((say(text), FINISH, DONE)) for text in ("Hello", "somebody else's"))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\nX: %b\r\n\r\n"
    pad = b"a" * (8192 - len(head % (len(good), b"") + good))  # the answer ends where the first read does
    trusted.scripts.append([head % (len(good), pad) + good + head % (len(other), b"") + other])
    with road(trusted) as proxy:
        for _ in range(3):
            assert ask(proxy, False) == (200, "Hello", None, True)
            proxy.idle()
        assert trusted.connections == 2


def test_a_dead_pooled_tls_connection_is_replaced_unseen(trusted):
    trusted.scripts.append(stream(*HEALTHY) + [CLOSE])
    with road(trusted, MAX_RETRIES="0") as proxy:
        assert ask(proxy, True)[3]
        proxy.idle()
        assert eventually(lambda: not trusted.open)
        assert ask(proxy, True)[3]
        proxy.idle()
        assert proxy.server.metrics.retries == 0


@pytest.mark.parametrize("script", ([30], [HEAD, 30], stream(say("Hel"), 30)), ids=("before headers", "before the first token", "mid-stream"))
def test_the_clients_leaving_is_noticed_over_tls(trusted, brisk, caplog, script):
    trusted.default = script
    with road(trusted) as proxy:
        with leaving(proxy, caplog, True):
            assert eventually(lambda: arrived(proxy, trusted))
        assert eventually(lambda: trusted.cut_by_client == 1, 1)


def test_a_silence_over_tls_is_tried_again_once(trusted, brisk):
    trusted.default = [HEAD, 30]
    with road(trusted, UPSTREAM_TIMEOUT="0.1") as proxy:
        assert ask(proxy, True)[0] == 502 and len(trusted.requests) == 2


def test_a_large_answer_over_tls_is_whole(trusted):
    trusted.default = [b"".join(stream(*[say("x" * 100000)] * 20, FINISH, DONE))]
    with road(trusted) as proxy:
        assert len(ask(proxy, True)[1]) == 2000000 and ask(proxy, False)[3]


# Soak: python3 test_ztoapi.py soak 120

SOAK_ENVIRON = {"DEFAULT_KEY": KEY, "ZAI_API_KEY": ",".join(KEYS[:2]), "UPSTREAM_TIMEOUT": "1", "HEARTBEAT": "0.3", "QUEUE_TIMEOUT": "5",
                "CLIENT_TIMEOUT": "2", "PORT": "0"}
# Idle connections to Z.ai are closed after a second, so that what is open afterwards was leaked.
SOAK_PROGRAM = "import os, sys, ztoapi; ztoapi.Pool.expire.__defaults__ = (1.0,); sys.exit(ztoapi.main(os.environ))"
LIMITED = "glm-4.5-flash"  # the model of which the fake takes two requests at a time
HUGE = chunked(say("x" * (17 << 20)))


class SoakProxy:
    """A proxy in a process of its own."""

    def __init__(self, name, **environ):
        self.name, self.log = name, tempfile.TemporaryFile()
        clean = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY") and key != "SSL_CERT_FILE"}
        self.process = subprocess.Popen([sys.executable, "-c", SOAK_PROGRAM], env=dict(clean, **SOAK_ENVIRON, **environ), stderr=self.log,
                                        stdout=subprocess.PIPE, cwd=os.path.dirname(os.path.abspath(ztoapi.__file__)))
        self.port = int(self.process.stdout.readline().split(b"/v1")[0].rpartition(b":")[2])

    def use(self):
        """(threads, descriptors, resident MB); zeros where the system does not tell."""
        try:
            with open("/proc/%d/status" % self.process.pid) as file:
                status = dict(line.split(":", 1) for line in file)
            return int(status["Threads"]), len(os.listdir("/proc/%d/fd" % self.process.pid)), int(status["VmRSS"].split()[0]) / 1024
        except OSError:
            return 0, 0, 0.0

    def settled(self):
        """use(), once all that ends by itself has ended."""
        time.sleep(2)  # longer than SOAK_PROGRAM keeps idle connections
        eventually(lambda: self.use()[0] == 1, 10)
        return self.use()

    def stop(self):
        """The exit status, and whether the log tells of a bug."""
        self.process.terminate()
        status = self.process.wait(40)
        self.process.stdout.close()
        self.log.seek(0)
        text = self.log.read().decode("utf-8", "replace")
        self.log.close()
        return status, "Traceback" in text or "bug" in text


class SoakZai(FakeZai):
    """Half of its answers are well; the others have every fault there is."""

    def __init__(self, chance, tls=None):
        self.chance, self.huge, self.limited = chance, threading.Lock(), 0
        super().__init__(tls)
        self.default = self.any_script

    def any_script(self, request):
        dice = self.chance.random()
        if request["body"]["model"] == LIMITED:
            return self.limited_script()
        if dice < 0.003:
            return [HEAD, lambda *_: self.huge.acquire(), HUGE, lambda *_: self.huge.release(), chunked(FINISH), END]
        if dice < 0.02:
            return Torrent(64, 1 << 16).script
        if dice < 0.04:
            whole = b"".join(stream(*HEALTHY))
            return [whole[i:i + 1] for i in range(len(whole))]
        if dice < 0.06:
            return self.chance.choice(([3], [HEAD, 3], stream(say("Hel"), 3)))  # silent
        if dice < 0.08:
            return [GZIP_HEAD] + [chunked(piece) for piece in packed(31, *HEALTHY) if piece] + [END]
        if dice < 0.09:
            return refusal(*self.chance.choice(((429, "1113"), (401, "401"), (429, "1308"), (400, "1210"), (400, "1301"))))
        if dice < 0.3:
            return EARLY[self.chance.choice(list(EARLY))]
        if dice < 0.4:
            return [HEAD, chunked(say("Hel")), *LATE[self.chance.choice(list(LATE))]]
        return stream(*HEALTHY) if dice < 0.8 else stream(think("The"), self.chance.random() * 0.5, say("Hel"), 0.05, say("lo"), FINISH, DONE)

    def limited_script(self):
        with self.lock:
            self.limited += 1
            over = self.limited > 2

        def end(*_):
            with self.lock:
                self.limited -= 1
        if over:
            return [end] + (refusal(429, "1302") if self.chance.random() < 0.5 else stream(sse(ERROR_1302)))
        return [HEAD, chunked(say("Hel")), lambda *_: time.sleep(0.05), end, chunked(say("lo")), chunked(FINISH), chunked(DONE), END]


def test_a_restart_that_says_nothing_yet_does_not_end_the_stream(zai):
    torn = b'data: {"id":"2026data: {"id":"2027","created":1,"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'
    zai.default = stream(think("x"), 0.05, torn, 0.05, say("y"), FINISH, DONE)
    with proxying(zai) as proxy:
        status, headers, events, clean = proxy.stream()
        assert clean and events[-1] == "[DONE]" and said(events) == "y" and finish_of(events) == ["stop"]
        assert proxy.chat()[2]["choices"][0]["message"]["content"] == "y"


def soak_client(proxies, chance, until, outcomes):
    """One client after the other, of every kind, until then."""
    while time.monotonic() < until:
        proxy = chance.choices(proxies, (75, 20, 3, 3))[0]
        try:
            outcome = soak_request(proxy.port, chance)
        except (OSError, ValueError, AssertionError, IndexError) as error:
            outcome = "WRONG: %r" % error
        outcomes.append("%s: %s" % (proxy.name, outcome))
        time.sleep(chance.random() * 0.05)


def soak_request(port, chance):
    """What became of one request."""
    streamed, dice = chance.random() < 0.7, chance.random()
    body = chat_body(stream=streamed, model=LIMITED if chance.random() < 0.1 else "glm-4.6")
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        data = raw_chat(body) if dice > 0.02 else raw_chat({"model": "glm-4.6"}) if dice > 0.01 else raw_chat(body, key="wrong")
        if dice > 0.97:
            sock.sendall(data[:int(len(data) * chance.random())])
            return "left before all was sent"
        sock.sendall(data)
        if dice > 0.8:
            time.sleep(chance.random() ** 2)
            if dice > 0.9:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return "left"
        if dice > 0.75:
            time.sleep(chance.random() * 1.5)  # a slow reader
        status, _, events, clean = read_stream(sock)
    error = next((event["error"] for event in events if "error" in event), None)
    if error:
        assert status != 500 and error["message"] and isinstance(error["code"], str)
        return "%s %s" % ("in-stream error" if status == 200 else "HTTP %d" % status, error["code"])
    if not streamed:
        assert status == 200 and set(events[0]["choices"][0]["message"]["content"]) <= set("HeloQ")
        return "JSON answer"
    assert clean and events[-1] == "[DONE]" and len(finish_of(events)) == 1 and (said(events) == "Hello" or set(said(events)) == {"Q"}), events[-3:]
    return "streamed answer"


def soak(seconds, clients=32, seed=1):
    """All the faults at once for that long; 1 if anything grew or went wrong, else 0."""
    chance, outcomes = random.Random(seed), []
    with pem_file() as path, contextlib.ExitStack() as closing, socket.create_server(("127.0.0.1", 0)) as closed:
        zai, tls_zai, connect = SoakZai(chance), SoakZai(chance, tls_context(path)), HttpProxy()
        for part in (zai, tls_zai, connect):
            closing.callback(part.close)
        nobody = "http://127.0.0.1:%d" % closed.getsockname()[1]
        closed.close()
        proxies = [SoakProxy("plain", ZAI_BASE_URL=zai.url),
                   SoakProxy("TLS by CONNECT", ZAI_BASE_URL=tls_zai.url, HTTPS_PROXY=connect.url, SSL_CERT_FILE=path),
                   SoakProxy("unknown certificate", ZAI_BASE_URL=tls_zai.url), SoakProxy("refused", ZAI_BASE_URL=nobody)]

        def run(duration):
            until = time.monotonic() + duration
            together(*[lambda i=i: soak_client(proxies, random.Random(seed + i), until, outcomes) for i in range(clients)], patience=duration + 60)
            return [proxy.settled() for proxy in proxies]
        before = run(min(30, seconds))  # until every buffer has been as large as it gets
        outcomes.clear()
        after = run(seconds)
        ends = [proxy.stop() for proxy in proxies]
    print("%d requests in %d s, %d clients; what became of them:" % (len(outcomes), seconds, clients))
    for outcome, count in sorted(collections.Counter(outcomes).items()):
        print("%8d  %s" % (count, outcome))
    print("threads, descriptors and resident MB before and after:")
    for proxy, old, new in zip(proxies, before, after):
        print("%20s  %d -> %d, %d -> %d, %.1f -> %.1f" % (proxy.name, old[0], new[0], old[1], new[1], old[2], new[2]))
    grew = [proxy.name for proxy, old, new in zip(proxies, before, after)
            if new[0] > old[0] or new[1] > old[1] or new[2] > old[2] * 1.2 + 8]
    wrong = [outcome for outcome in outcomes if "WRONG" in outcome]
    print("grew: %s; wrong: %d; ended badly: %s" % (grew or "nothing", len(wrong), [end for end in ends if end != (0, False)] or "none"))
    return 1 if grew or wrong or any(end != (0, False) for end in ends) else 0


# The front door #######################################################################################################
#
# Raw bytes in, raw bytes out. Behind all that door_talk() sends comes one more request, LAST: a good request must leave it to be
# answered, a broken one must never let it be.

DOOR_AUTH = "Host: localhost\r\nAuthorization: Bearer %s\r\n" % KEY
LAST = b"GET /health?last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
DOOR_CHAT = json.dumps(chat_body(stream=False)).encode()
Reply = collections.namedtuple("Reply", "status headers body")


def door_get(path="/v1/models", *lines, method="GET", version="HTTP/1.1", auth=DOOR_AUTH):
    return ("%s %s %s\r\n%s%s\r\n" % (method, path, version, auth, "".join(line + "\r\n" for line in lines))).encode("latin-1")


def door_post(body, *lines, length=True, **more):
    lines += ("Content-Length: %d" % len(body),) if length else ()
    return door_get("/v1/chat/completions", *lines, method="POST", **more) + body


def door_chunked(*pieces):
    return door_post(b"".join(pieces), "Transfer-Encoding: chunked", length=False)


def door_rest(sock):
    """All that comes until the other side closes; a socket.timeout is a hang and fails the test, as does a reset."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def door_talk(port, data, last=LAST):
    with socket.create_connection(("127.0.0.1", getattr(port, "port", port)), 5) as sock:
        sock.sendall(data + last)
        return door_rest(sock)


def door_readable(socks):
    return select.select(socks, [], [], 0)[0]


def door_read(file, head=False):
    """One response from a file, None at its end."""
    line = file.readline()
    if not line:
        return None
    assert line.startswith(b"HTTP/1.1 "), line
    status, headers = int(line.split()[1]), http.client.parse_headers(file)
    if head or status in (100, 204):
        return Reply(status, headers, b"")
    if headers.get("Transfer-Encoding") == "chunked":
        decoder, body = ztoapi.Dechunker(), b""
        while not decoder.done:
            data = file.readline()
            assert data, "cut in the middle of a chunked answer"
            body += decoder.feed(data)
        return Reply(status, headers, body)
    return Reply(status, headers, file.read(int(headers["Content-Length"])) if "Content-Length" in headers else file.read())


def door_replies(data, *heads):
    """All responses in `data`; `heads`: the positions of those to HEAD requests, which have no body."""
    file, found = io.BytesIO(data), []
    for reply in iter(lambda: door_read(file, len(found) in heads), None):
        found.append(reply)
    return found


def door_exchange(proxy, data, *heads):
    return door_replies(door_talk(proxy, data), *heads)


def door_statuses(proxy, data):
    return [reply.status for reply in door_exchange(proxy, data)]


def is_openai_error(reply):
    """The four fields, a request id, and JSON."""
    error = json.loads(reply.body.decode())["error"]
    return (list(error) == ["message", "type", "param", "code"] and error["message"] and error["type"] and isinstance(error["code"], str)
            and reply.headers["Content-Type"] == "application/json" and reply.headers["x-request-id"].startswith("req_"))


@pytest.fixture
def door_log(caplog):
    """The messages of the log from here on."""
    caplog.set_level(logging.INFO, "ztoapi")
    caplog.clear()
    return lambda level=None: [record.getMessage() for record in caplog.records if record.name == "ztoapi" and level in (None, record.levelno)]


# Framing

# Header lines of a POST, and the status they get.
BROKEN_LENGTHS = [("Content-Length: 5\r\nTransfer-Encoding: chunked", 400), ("Transfer-Encoding: chunked\r\nContent-Length: 5", 400),
                  ("Transfer-Encoding: chunked\r\nContent-Length: 0", 400), ("Content-Length: 5\r\nContent-Length: 5", 400),
                  ("Content-Length: 5\r\nContent-Length: 6", 400), ("Content-Length: 5, 5", 400), ("Content-Length: 5,6", 400),
                  ("Content-Length: +5", 400), ("Content-Length: -5", 400), ("Content-Length: -0", 400), ("Content-Length: 1_0", 400),
                  ("Content-Length: 0x5", 400), ("Content-Length: 5 5", 400), ("Content-Length:", 400), ("Content-Length: 5.0", 400),
                  ("Content-Length: 5;", 400), ("Content-Length: 1e1", 400), ("Content-Length: \xb2", 400), ("Content-Length: \xd9\xa5", 400),
                  ("Content-Length: 5\x0b", 400), ("Content-Length: \xa05", 400), ("Content-Length: five", 400), ("Content-Length: " + "9" * 40, 400),
                  ("Content-Length: " + "0" * 400 + "5", 400), ("Content-Length : 5", 400), ("Content-Length\t: 5", 400),
                  ("X: y\r\n Content-Length: 5", 400), ("Content-Length: 5\r\n 5", 400), ("Content-Length:\r\n 5", 400),
                  ("Transfer-Encoding: gzip", 501), ("Transfer-Encoding: gzip, chunked", 501), ("Transfer-Encoding: chunked, gzip", 501),
                  ("Transfer-Encoding: identity", 501), ("Transfer-Encoding: chunked, chunked", 501), ("Transfer-Encoding: chunked;q=1", 501),
                  ("Transfer-Encoding: xchunked", 501), ("Transfer-Encoding: 'chunked'", 501), ("Transfer-Encoding: \x0bchunked", 501),
                  ("Transfer-Encoding: chunked\x00", 400), ("Transfer-Encoding: chunk\red", 400), ("Transfer-Encoding : chunked", 400),
                  ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400), ("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
                      400), ("X: y\r\n Transfer-Encoding: chunked", 400), ("Transfer-Encoding:\r\n chunked", 400),
                  ("\x00Transfer-Encoding: chunked", 400)]
BROKEN_CHUNKS = [b"\r\n{}\r\n0\r\n\r\n", b"g\r\n", b"0x2\r\n{}\r\n0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n", b"+2\r\n{}\r\n0\r\n\r\n",
                 b" 2\r\n{}\r\n0\r\n\r\n", b"2 2\r\n{}\r\n0\r\n\r\n", b"0_2\r\n{}\r\n0\r\n\r\n", b"2\n{}\n0\n\n", b"2\r{}\r0\r\r",
                 b"2\r\n{}0\r\n\r\n", b"2\r\n{}xx\r\n0\r\n\r\n", b"2\r\n{}\n0\r\n\r\n", b"2;" + b"x" * 5000 + b"\r\n{}\r\n0\r\n\r\n",
                 b"2;a\nb\r\n{}\r\n0\r\n\r\n", b"2;a\rb\r\n{}\r\n0\r\n\r\n", b"2;\0\r\n{}\r\n0\r\n\r\n", b"2=x\r\n{}\r\n0\r\n\r\n",
                 b"2\r\n{}\r\n0\r\nX: y\nZ: w\r\n\r\n", b"2\r\n{}\r\n0\n\r\n\r\n", b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 20000,
                 b"\xb2\r\n{}\r\n0\r\n\r\n", b"2\r\n{}\r\n\r\n0\r\n\r\n",
                 *(b"2\r\n{}\r\n0\r\n" + line + b"\r\n\r\n" for line in (b"GET /health HTTP/1.1", b"nocolon", b"X: a\rb", b"X: \0", b" fold", b"X : y", b": y"))]


def test_an_ambiguous_length_is_refused_and_nothing_behind_it_is_answered(proxy, zai):
    for lines, status in BROKEN_LENGTHS:
        data = door_get("/v1/chat/completions", lines, method="POST") + b"0\r\n\r\n"
        replies = door_exchange(proxy, data)
        assert [reply.status for reply in replies] == [status], lines
        assert replies[0].headers["Connection"] == "close" and is_openai_error(replies[0]), lines
    assert not zai.requests


def test_a_broken_chunked_body_is_refused_and_nothing_behind_it_is_answered(proxy, zai):
    for body in BROKEN_CHUNKS:
        replies = door_exchange(proxy, door_chunked(body))
        assert [reply.status for reply in replies] == [400] and replies[0].headers["Connection"] == "close", body[:60]
        assert "chunked" in json.loads(replies[0].body.decode())["error"]["message"], body[:60]
    assert not zai.requests


def test_a_chunked_body_is_read_however_it_is_cut(proxy, zai):
    half, size = len(DOOR_CHAT) // 2, len(DOOR_CHAT)
    for pieces in ([chunked(DOOR_CHAT), END], [chunked(DOOR_CHAT[:half]), chunked(DOOR_CHAT[half:]), END],
                   [chunked(DOOR_CHAT[i:i + 1]) for i in range(size)] + [END], [b"%X;name=value;x=\"y z\"\r\n%b\r\n" % (size, DOOR_CHAT), END],
                   [b"000%x \t;x\r\n%b\r\n" % (size, DOOR_CHAT), b"000\r\n\r\n"],
                   [chunked(DOOR_CHAT), b"0\r\nX-Trailer: y\r\nContent-Length: 7\r\nTransfer-Encoding: gzip\r\n\r\n"]):
        assert door_statuses(proxy, door_chunked(*pieces)) == [200, 200], pieces
    assert {request["body"]["messages"][0]["content"] for request in zai.requests} == {"Hi"}


def test_a_request_may_come_byte_by_byte(proxy):
    data = door_chunked(chunked(DOOR_CHAT), END) + door_post(DOOR_CHAT, "Connection: close")
    with proxy.connect() as sock:
        for i in range(len(data)):
            sock.sendall(data[i:i + 1])
        assert [reply.status for reply in door_replies(door_rest(sock))] == [200, 200]


REQUEST_LINES = [(b"GET /health HTTP/1.1", 200), (b"GET /health HTTP/1.0", 200), (b"GET  /health HTTP/1.1", 400), (b"GET /health  HTTP/1.1", 400),
                 (b"GET /health HTTP/1.1 ", 400), (b" GET /health HTTP/1.1", 400), (b"GET\t/health\tHTTP/1.1", 400), (b"GET /health", 400),
                 (b"GET", 400), (b"GET /health HTTP/1.1 x", 400), (b"GET /a b HTTP/1.1", 400), (b"GET /health http/1.1", 400),
                 (b"GET /health HTTP/1.10", 400), (b"GET /health HTTP/01.1", 400), (b"GET /health HTTP/1,1", 400), (b"GET /health HTTP/1.", 400),
                 (b"GET /health HTTQ/1.1", 400), (b"GET /health HTTP/2.0", 505), (b"GET /health HTTP/0.9", 400), (b"PRI * HTTP/2.0", 505),
                 (b"GET /health\x00 HTTP/1.1", 400), (b"GET /health\x0b HTTP/1.1", 400), (b"GET /hea\rlth HTTP/1.1", 400),
                 (b"G(ET /health HTTP/1.1", 400), (b"G\xc3\x84T /health HTTP/1.1", 400), (b"get /health HTTP/1.1", 501),
                 (b"BREW /health HTTP/1.1", 501), (b"TRACE /health HTTP/1.1", 501), (b"CONNECT localhost:443 HTTP/1.1", 501),
                 (b"__class__ /health HTTP/1.1", 501), (b"A" * 20 + b" /health HTTP/1.1", 501), (b"A" * 21 + b" /health HTTP/1.1", 400), (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200, 256)), 400),
                 (b"\x80\x2e\x01\x03\x01", 400), (b"\x05\x01\x00", 400), (b"SSH-2.0-OpenSSH_9.6", 400), (b"GET /" + b"a" * 70000 + b" HTTP/1.1", 414),
                 (b"a" * 70000, 414), (b"{\"model\":\"GLM-4.6\"}", 400), (b"-1 / HTTP/1.1", 501)]


def test_a_request_line_is_taken_to_the_letter(proxy):
    for line, status in REQUEST_LINES:
        replies = door_exchange(proxy, line + b"\r\n" + DOOR_AUTH.encode() + b"\r\n")
        allowed = (501, 405) if status == 501 else (400, 505) if b"HTTP/" in line and status in (400, 505) else (status,)
        assert len(replies) == (1 + (status == 200 and line.endswith(b"1.1"))) and replies[0].status in allowed, (line[:80], replies)
        assert status == 200 or is_openai_error(replies[0]) and replies[0].headers["Connection"] == "close", line[:80]


HEADER_LINES = [("X: y", 200), ("X:y", 200), ("X:", 200), ("X: \xff\xfe\x01\x1b[31m", 200), ("x-request-id: mine", 200), ("X_Y: z", 200),
                ("X: " + "y" * 60000, 200), ("X: a: b", 200), ("X : y", 400), ("X", 400), (": y", 400), (" X: y", 400), ("\tX: y", 400),
                ("X: a\r\n b", 400), ("X: a\r\n\tb", 400), ("X: a\rb", 400), ("X: a\rContent-Length: 5", 400), ("X: a\0b", 400), ("X\0: a", 400),
                ("X(: y", 400), ("X\xc4: y", 400), ("Host: localhost", 400), ("Host: other", 400), ("X: " + "y" * 70000, 431), ("y" * 70000, 431),
                ("\r\n".join("X%d: y" % i for i in range(90)), 200), ("\r\n".join("X%d: y" % i for i in range(110)), 431)]


def test_a_header_line_is_taken_to_the_letter(proxy):
    for line, status in HEADER_LINES:
        replies = door_exchange(proxy, door_get("/health", line))
        assert [reply.status for reply in replies] == ([200, 200] if status == 200 else [status]), line[:80]
        assert status == 200 or is_openai_error(replies[0]) and replies[0].headers["Connection"] == "close", line[:80]
    assert door_statuses(proxy, b"GET /health HTTP/1.1\r\nX: y\r\n\r\n") == [400], "no Host"
    assert door_statuses(proxy, b"GET /health HTTP/1.0\r\n\r\n") == [200], "HTTP/1.0 had none"


def test_a_request_line_that_is_too_long_has_one_name_in_every_python(proxy):
    reply, = door_exchange(proxy, b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n")
    error = json.loads(reply.body.decode())["error"]
    assert (reply.status, error["code"], error["message"]) == (414, "uri_too_long", "Uri too long.")


def test_a_blank_line_between_requests_is_none_however_it_is_cut(zai):
    """Old clients leave one behind a body; no request begins with it."""
    with proxying(zai, CLIENT_TIMEOUT="0.3") as proxy:
        for pause in (0, 0.02, 0.6):
            with proxy.connect(5) as sock, sock.makefile("rb") as file:
                sock.sendall(door_post(DOOR_CHAT))
                assert door_read(file).status == 200
                sock.sendall(b"\r")
                time.sleep(pause)
                sock.sendall(b"\n")
                time.sleep(pause)
                sock.sendall(door_post(DOOR_CHAT))
                assert door_read(file).status == 200, pause
        for size in range(2040, 2056):  # the buffer has 2,048 bytes
            plain = door_get("/health")
            padded = door_get("/health", "X: " + "y" * (size - len(plain) - len("X: \r\n")))
            assert len(padded) == size and door_statuses(proxy, padded + b"\r\n" + plain) == [200, 200, 200]


def test_connection_headers_are_obeyed(proxy):
    for lines, count in ((["Connection: close"], 1), (["Connection: Close"], 1), (["Connection: close, TE", "TE: trailers"], 1),
                         (["Connection: TE", "Connection: close"], 1), (["Connection: keep-alive"], 2), (["Connection: closed"], 2), ([], 2)):
        replies = door_exchange(proxy, door_get("/health", *lines))
        assert [reply.status for reply in replies] == [200] * count, lines


def test_pipelined_requests_are_answered_in_order(proxy):
    stream_body = json.dumps(chat_body(stream=True)).encode()
    data = (door_get("/health") + door_post(DOOR_CHAT) + door_get("/v1/models/nope") + door_post(stream_body) + door_post(b"{}")
            + door_chunked(chunked(DOOR_CHAT), END) + door_get("/v1/models/GLM-4.6", method="HEAD") + door_get("/metrics", "Connection: close"))
    replies = door_exchange(proxy, data, 6)
    assert [reply.status for reply in replies] == [200, 200, 404, 200, 400, 200, 200, 200]
    assert json.loads(replies[1].body.decode())["object"] == "chat.completion" and replies[3].body.endswith(b"data: [DONE]\n\n")
    assert replies[7].body.startswith(b"# HELP") and len({reply.headers["x-request-id"] for reply in replies}) == 8


def test_http_1_0_gets_closing_unchunked_answers(proxy):
    for keep in ("", "Connection: keep-alive"):
        lines = [keep] if keep else []
        for data in (door_get("/v1/models", *lines, version="HTTP/1.0"), door_post(DOOR_CHAT, *lines, version="HTTP/1.0")):
            reply, = door_exchange(proxy, data)
            assert reply.status == 200 and reply.headers["Connection"] == "close" and int(reply.headers["Content-Length"]) == len(reply.body)
        reply, = door_exchange(proxy, door_post(json.dumps(chat_body(stream=True)).encode(), *lines, version="HTTP/1.0"))
        assert "Transfer-Encoding" not in reply.headers and reply.headers["Connection"] == "close"
        assert reply.body.startswith(b"data: {") and reply.body.endswith(b"}\n\ndata: [DONE]\n\n")
    assert door_statuses(proxy, door_post(chunked(DOOR_CHAT) + END, "Transfer-Encoding: chunked", length=False, version="HTTP/1.0")) == [400]


def test_head_works_where_get_does_and_has_no_body(proxy):
    for path in ("/", "/docs", "/dashboard", "/health", "/v1/models", "/models/glm-4.6", "/v1/models/nope", "/metrics", "/stats", "/nowhere"):
        replies = door_exchange(proxy, door_get(path, method="HEAD") + door_get(path), 0)
        assert (len(replies) == 3 and replies[0].status == replies[1].status
                and replies[0].headers["Content-Type"] == replies[1].headers["Content-Type"]), path
        assert path == "/stats" or replies[0].headers["Content-Length"] == replies[1].headers["Content-Length"] == str(len(replies[1].body)), path
    reply, follow = door_exchange(proxy, door_get("/v1/chat/completions", method="HEAD"), 0)
    assert (reply.status, follow.status) == (405, 200) and "POST" in reply.headers["Allow"]


# Bodies

def door_expect(proxy, lines, auth=DOOR_AUTH):
    """The statuses that come before a byte of the body has been sent; the body follows only a 100."""
    with proxy.connect(5) as sock, sock.makefile("rb") as file:
        sock.sendall(door_get("/v1/chat/completions", "Expect: 100-continue", *lines, method="POST", auth=auth))
        statuses = [door_read(file).status]
        if statuses == [100]:
            sock.sendall((chunked(DOOR_CHAT) + END) if "chunked" in lines[0] else DOOR_CHAT)
            statuses.append(door_read(file).status)
        return statuses


def test_100_continue_is_only_said_once_nothing_else_can_be(zai):
    length = "Content-Length: %d" % len(DOOR_CHAT)
    with proxying(zai, MAX_BODY_MB="1") as proxy:
        for lines, auth, statuses in (([length], DOOR_AUTH, [100, 200]), (["Transfer-Encoding: chunked"], DOOR_AUTH, [100, 200]),
                                      ([length], "Host: localhost\r\n", [401]), (["Transfer-Encoding: chunked"], "Host: localhost\r\n", [401]),
                                      (["Content-Length: 1048577"], DOOR_AUTH, [413]),
                                      ([length, "Content-Type: multipart/form-data; boundary=x"], DOOR_AUTH, [415]),
                                      ([length, "Content-Encoding: gzip"], DOOR_AUTH, [415]), (["Content-Length: 5, 5"], DOOR_AUTH, [400]),
                                      (["Content-Length: 0"], DOOR_AUTH, [400])):
            assert door_expect(proxy, lines, auth) == statuses, (lines, statuses)
        replies = door_exchange(proxy, door_post(DOOR_CHAT, "Expect: 100-Continue"))  # a client that does not wait for it
        assert [reply.status for reply in replies] == [100, 200, 200]
        assert door_statuses(proxy, door_get("/health", "Expect: 100-continue")) == [200, 200], "no body, no 100"


def test_the_body_limit_holds_before_the_body_is_there(zai):
    mib = 1 << 20
    with proxying(zai, MAX_BODY_MB="1") as proxy:
        for head, body, status in ((["Content-Length: %d" % (mib + 1)], b"", 413), (["Content-Length: 999999999999"], b"", 413),
                                   (["Transfer-Encoding: chunked"], b"100001\r\n", 413), (["Transfer-Encoding: chunked"], b"fffffffffff\r\n", 413),
                                   (["Transfer-Encoding: chunked"], chunked(b" " * 600000) + b"70000\r\n", 413),
                                   (["Content-Length: %d" % mib], b" " * mib, 400),
                                   (["Transfer-Encoding: chunked"], chunked(b" " * (mib - 2)) + chunked(b"{}") + END, 400)):
            with proxy.connect(5) as sock, sock.makefile("rb") as file:
                sock.sendall(door_get("/v1/chat/completions", *head, method="POST") + body)
                reply = door_read(file)
                assert reply.status == status and is_openai_error(reply), head
                assert (reply.headers["Connection"] == "close") == (status == 413), head
        padded = DOOR_CHAT + b" " * (mib - len(DOOR_CHAT))
        assert door_statuses(proxy, door_post(padded) + door_chunked(chunked(padded), END)) == [200, 200, 200]
    assert len(zai.requests) == 2


def test_a_body_nobody_read_never_becomes_the_next_request(proxy, zai):
    body = door_get("/health") * 3
    for method, path, auth, lines, status in (("POST", "/v1/chat/completions", "Host: localhost\r\n", [], 401),
                                              ("POST", "/nowhere", DOOR_AUTH, [], 404), ("PUT", "/v1/models", DOOR_AUTH, [], 405),
                                              ("GET", "/v1/models", DOOR_AUTH, [], 200), ("GET", "/", "Host: localhost\r\n", [], 200),
                                              ("OPTIONS", "/v1/chat/completions", "Host: localhost\r\n", [], 204),
                                              ("DELETE", "/health", DOOR_AUTH, [], 405),
                                              ("POST", "/v1/chat/completions", DOOR_AUTH, ["Content-Type: application/x-www-form-urlencoded"], 415),
                                              ("POST", "/v1/chat/completions", DOOR_AUTH, ["Content-Encoding: br"], 415),
                                              ("BREW", "/health", DOOR_AUTH, [], 501)):
        for framing in ("Content-Length: %d" % len(body), "Transfer-Encoding: chunked"):
            framed = body if "Length" in framing else chunked(body) + END
            replies = door_exchange(proxy, door_get(path, framing, *lines, method=method, auth=auth) + framed)
            assert replies[0].status in (status, 405 if status == 501 else status) and len(replies) == 1, (method, path, framing)
            assert replies[0].headers["Connection"] == "close", (method, path, framing)
    assert not zai.requests


def test_a_refusal_can_be_read_while_a_large_body_is_still_being_sent(proxy):
    with proxy.connect(5) as sock:
        sock.sendall(door_get("/v1/chat/completions", "Content-Length: 8000000", method="POST", auth="Host: localhost\r\n"))
        with contextlib.suppress(OSError):
            sock.sendall(b" " * 4000000)
        assert door_read(sock.makefile("rb")).status == 401


def test_the_content_type_is_refused_only_if_it_cannot_be_json(proxy):
    for kind, status in ((None, 200), ("", 200), ("application/json", 200), ("application/json; charset=utf-8", 200),
                         ("text/plain;charset=UTF-8", 200), ("nonsense", 200), ("application/octet-stream", 200),
                         ("application/vnd.platform+json", 200), ("application/json; profile=form", 200), ("application/x-www-form-urlencoded", 415),
                         ("Application/X-WWW-Form-Urlencoded; charset=utf-8", 415), ("multipart/form-data; boundary=x", 415),
                         ("Multipart/Mixed", 415)):
        lines = [] if kind is None else ["Content-Type: " + kind]
        assert door_statuses(proxy, door_post(DOOR_CHAT, *lines)) == ([200, 200] if status == 200 else [415]), kind


def door_json(**fields):
    return json.dumps(chat_body(**dict({"stream": False}, **fields))).encode()


ODD_BODIES = [(b"", 400), (b" ", 400), (b"nul", 400), (b"null", 400), (b"[]", 400), (b'"x"', 400), (b"1", 400), (b"{", 400), (b"{}", 400),
              (b"{}{}", 400), (b"\0", 400), (b"\xff\xfe\x00", 400), (DOOR_CHAT + b"x", 400), (DOOR_CHAT + b" \r\n\t", 200),
              (b"\xef\xbb\xbf" + DOOR_CHAT, 200), (DOOR_CHAT.decode().encode("utf-16"), 400), (gzip.compress(DOOR_CHAT), 400),
              (DOOR_CHAT.replace(b"Hi", b"\xff"), 400), (DOOR_CHAT.replace(b"Hi", b"\xed\xa0\x80"), 400), (DOOR_CHAT.replace(b"Hi", b"a\0b"), 400),
              (DOOR_CHAT.replace(b"Hi", b"a\\u0000b"), 200), (DOOR_CHAT.replace(b"Hi", b"\\ud83d"), 200),
              (DOOR_CHAT.replace(b"Hi", b"\\udc00\\ud800"), 200), (DOOR_CHAT.replace(b"GLM-4.6", b"\\ud800"), 200),
              (DOOR_CHAT.replace(b'"Hi"', b'"Hi","\\ud800":1'), 200), (DOOR_CHAT.replace(b"false", b"false,\"\\udfff\":\"\\udfff\""), 200),
              (b'{"model":NaN}', 400),
              *((DOOR_CHAT.replace(b"false", b'false,"temperature":' + number), 400) for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999",
                  b"-1e999", b"01", b"1.", b".5", b"0x1", b"9" * 5000, b"9" * 1000000, b"1" + b"0" * 101, b"1e99")),
              (DOOR_CHAT.replace(b"false", b'false,"seed":' + b"9" * 100), 200), (DOOR_CHAT.replace(b"false", b'false,"max_tokens":' + b"9" * 90),
                  200), (DOOR_CHAT.replace(b"false", b'false,"x":' + b"[" * 100000), 400),
              (DOOR_CHAT.replace(b"false", b'false,"x":' + b"[" * 100000 + b"]" * 100000), 400),
              (DOOR_CHAT.replace(b"false", b'false,"x":' + b'{"a":' * 50000 + b"1" + b"}" * 50000), 400), (b"[" * 1000000, 400),
              (DOOR_CHAT.replace(b"false", b'false,"model":"GLM-4.5"'), 200), (door_json(x={"a": [1, None, True]}), 200),
              (door_json(model="a" * 100000), 200), (door_json(model=""), 400), (door_json(model=["x"]), 400), (door_json(messages={}), 400),
              (door_json(messages=[None]), 400), (door_json(stream="yes"), 400), (door_json(**{"\r\nX: y": "z"}), 200)]
ODD_BODIES += [  # tools that are no functions, but look a little like one
    (door_json(tools=[{"type": "x", "function": function}], tool_choice=choice), (200, 400)) for function in ({}, 5, "f", [], None, {"name": []})
    for choice in ("auto", "required", {"type": "function", "function": {"name": "f"}})]


def test_odd_bodies_have_a_defined_answer(proxy, zai, door_log):
    for body, status in ODD_BODIES:
        replies = door_exchange(proxy, door_post(body))
        passed = replies[0].status == 200
        assert replies[0].status == status or isinstance(status, tuple) and replies[0].status in status, body[:200]
        assert len(replies) == 2 and (passed or is_openai_error(replies[0])), body[:200]
        assert bool(zai.requests) == passed, body[:200]
        zai.requests.clear()
    assert not door_log(logging.ERROR)


def test_nesting_around_the_recursion_limit_is_an_answer_or_a_400(proxy, door_log):
    """Reading, writing and translating recurse at different depths; no depth may fall between two of them."""
    for depth in list(range(sys.getrecursionlimit() - 60, sys.getrecursionlimit() + 5)) + [10, 500, 3000, 9000, 20000]:
        deep = b"[" * depth + b"]" * depth
        for place in (b'"x":%b' % deep, b'"tools":[{"type":"function","function":{"name":"f","parameters":{"a":%b}}}]' % deep):
            assert door_statuses(proxy, door_post(DOOR_CHAT.replace(b'"stream"', place + b',"stream"')))[0] in (200, 400), depth
    assert not door_log(logging.ERROR)


# Endpoints, keys, errors

TARGETS = [("/v1/models", 200), ("/models", 200), ("//v1/models", 200), ("///models", 200), ("/v1/models/", 200), ("/v1/models?limit=2&x=%zz", 200),
           ("/v1/models#x", None), ("/%76%31/models", 200), ("/v1/%6Dodels/glm-4.6", 200), ("http://localhost/v1/models", 200),
           ("HTTPS://api.example/v1/models?x", 200), ("http://u:p@x:99999/health", 200), ("/v1/models/GLM-4.5-Air", 200),
           ("/v1/models/glm-4.5-air", 200), ("/v1/models/nope", 404), ("/v1/models/%00%0d%0a", 404), ("/v1/models/%ff%fe", 404),
           ("/v1/models/a/b", 404), ("*", 404), ("health", 200), ("/v1", 404), ("/v1/", 404), ("/v2/models", 404), ("/v1/v1/models", 404),
           ("/V1/MODELS", 404), ("/v1/models%", 404), ("/\xff\xfe", 404), ("/favicon.ico", 404), ("/v1/embeddings", 404), ("/../etc/passwd", 404),
           ("/%2e%2e/%2e%2e/etc/passwd", 404), ("/\\", 404), ("/[", 404), ("/?", 200), ("?", 200), ("/;", 404), ("http://[/v1/models", None),
           ("http://[::1]/v1/models", None), ("http://]/", None), ("http://", None), ("http:///health", None), ("ftp://x/health", 404),
           ("http:/health", 404), ("http://x\xbd/health", None), ("http://\xff:x/health", None), ("/" + "a" * 60000, 404),
           ("/v1/models/" + "%41" * 20000, 404)]


def test_every_target_has_a_defined_answer(proxy, door_log):
    for target, status in TARGETS:
        replies = door_exchange(proxy, door_get(target))
        assert replies[0].status == status or status is None and replies[0].status in (200, 400, 404), target[:80]
        assert replies[0].status == 200 or is_openai_error(replies[0]), target[:80]
        assert len(replies) == 2, target[:80]
    assert not door_log(logging.ERROR)


def test_every_route_takes_its_methods_and_names_them(proxy):
    for path, methods in (("/v1/models", "GET"), ("/models/GLM-4.6", "GET"), ("/v1/chat/completions", "POST"), ("/chat/completions", "POST"),
                          ("/metrics", "GET"), ("/stats", "GET"), ("/health", "GET"), ("/", "GET")):
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            status, headers, body = proxy.call(method, path, chat_body(stream=False) if method == methods == "POST" else None)
            assert status == (200 if method == methods else 405), (method, path)
            if status == 405:
                assert methods in headers["Allow"].split(", ") and method not in headers["Allow"].split(", ") and body["error"]["code"], (method,
                        path)
                assert ("HEAD" in headers["Allow"]) == (methods == "GET")


def test_models_are_listed_as_openai_lists_them(zai):
    with proxying(zai, MODEL_ALIASES="gpt-4o=glm-4.6,*=glm-4.5") as proxy:
        _, _, listing = proxy.call("GET", "/v1/models")
        ids = [model["id"] for model in listing["data"]]
        assert listing["object"] == "list" and {"GLM-4.6", "GLM-4.5", "GLM-4.5-Air", "GLM-4.5V", "GLM-5.3", "gpt-4o"} <= set(ids) and "*" not in ids
        for model in listing["data"]:
            assert sorted(model) == ["created", "id", "object", "owned_by"] and (model["object"], model["owned_by"]) == ("model",
                    "z.ai") and type(model["created"]) is int
            assert proxy.call("GET", "/v1/models/" + model["id"].upper())[2] == model
        status, _, body = proxy.call("GET", "/v1/models/gpt-9")
        assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model") and "gpt-9" in body["error"]["message"]


def test_a_key_is_taken_in_three_headers_and_nowhere_else(zai):
    with proxying(zai, DEFAULT_KEY="key-one, key-two ,,") as proxy:
        for lines, ok in ((["Authorization: Bearer key-one"], True), (["authorization: BEARER key-two"], True),
                          (["Authorization: bearer  key-one "], True), (["x-api-key: key-two"], True), (["X-Api-Key: key-one"], True),
                          (["api-key: key-one"], True), (["Authorization: Bearer wrong", "api-key: key-one"], True), ([], False),
                          (["Authorization: key-one"], False), (["Authorization: Basic key-one"], False), (["Authorization: Bearer"], False),
                          (["Authorization: Bearer "], False), (["Authorization:"], False), (["x-api-key:"], False),
                          (["Authorization: Bearer key-on"], False), (["Authorization: Bearer key-onee"], False),
                          (["Authorization: Bearer KEY-ONE"], False), (["Authorization: Bearer key-one,key-two"], False),
                          (["Authorization: Bearer key-one key-two"], False), (["Authorization: Bearer k\xe4y-one"], False),
                          (["Authorization: Bearer " + "x" * 60000], False), (["Cookie: key=key-one"], False)):
            reply, _ = door_exchange(proxy, door_get("/v1/models?key=key-one", *lines, auth="Host: x\r\n"))
            assert reply.status == (200 if ok else 401), lines
            assert (ok or is_openai_error(reply) and json.loads(reply.body.decode())["error"]["code"] == "invalid_api_key"
                    and b"key-one" not in reply.body), lines


def test_no_spelling_of_a_path_opens_a_locked_door(proxy):
    """Without a key: only the page, /health and OPTIONS; whatever the router makes of the path."""
    for path in ("/v1/models", "/metrics", "/stats", "/v1/chat/completions", "/nowhere"):
        spellings = [path, "/" + path, path + "/", path + "?x", path + "#", "http://localhost" + path, "/health/.." + path, "/docs/%2e%2e" + path,
                     "/health%2f..%2f" + path[1:], path + "%00", path + "/health", path + ";/health", "/v1" + path, path + "%2f", "/." + path,
                     path.upper(), "/%" + "%02x" % ord(path[1]) + path[2:], path[1:]]
        for target in spellings:
            for method in ("GET", "HEAD", "POST", "PUT"):
                assert door_talk(proxy, door_get(target, method=method, auth="Host: localhost\r\n")).startswith(b"HTTP/1.1 401 "), (method, target)
    for method, path, status in (("GET", "/health", 200), ("GET", "/", 200), ("GET", "/docs", 200), ("GET", "/dashboard/", 200),
                                 ("OPTIONS", "/v1/models", 204), ("OPTIONS", "*", 204)):
        assert proxy.call(method, path, key=None)[0] == status, path


def test_who_does_not_say_stream_gets_what_its_kind_expects(zai):
    for default in ("true", "false"):
        with proxying(zai, DEFAULT_STREAM=default) as proxy:
            for fields, headers, streams in (({}, {}, default == "true"), ({"stream": None}, {}, default == "true"),
                                             ({"stream": True}, {"Accept": "application/json"}, True), ({"stream": False}, {}, False),
                                             ({}, {"Accept": "application/json"}, False), ({}, {"Accept": "Application/JSON, */*"}, False),
                                             ({}, {"Accept": "*/*", "User-Agent": "curl/8"}, default == "true"),
                                             ({}, {"User-Agent": "ai-sdk/openai/2.0 runtime/node.js"}, False),
                                             ({}, {"User-Agent": "async-openai/0.29"}, False)):
                status, answer_headers, _ = proxy.call("POST", "/v1/chat/completions", chat_body(**fields), headers)
                assert status == 200 and answer_headers["Content-Type"].startswith("text/event-stream" if streams else "application/json"), (fields,
                        headers)


def test_without_a_key_for_zai_models_are_served_and_chat_says_what_to_do(zai):
    with proxying(zai, ZAI_API_KEY="") as proxy:
        assert proxy.call("GET", "/v1/models")[0] == 200
        status, headers, body = proxy.chat()
        assert (status == 502 and "ZAI_API_KEY" in body["error"]["message"] and "https://z.ai/" in body["error"]["message"]
                and headers["x-should-retry"] == "false")


# Secure by default

def test_with_the_well_known_key_only_this_computer_is_served(zai):
    with proxying(zai, DEFAULT_KEY="own-key,sk-your-key") as proxy:
        port = proxy.port
        for host, ok in (("localhost", True), ("LocalHost:%d" % port, True), ("127.0.0.1", True), ("127.0.0.1:%d" % port, True),
                         ("127.8.9.10:1", True), ("[::1]:%d" % port, True), ("[::1]", True), ("evil.example", False),
                         ("evil.example:%d" % port, False), ("localhost.evil.example", False), ("127.0.0.1.nip.io", False), ("", False),
                         ("0.0.0.0", False), ("[", False), ("[::1", False), ("localhost@evil.example", False), ("localhost:80@evil.example", False),
                         ("127.0.0.1evil", False), ("192.168.1.7", False), ("::ffff:1", False), ("[::ffff:192.168.1.7]", False), ("1270.0.1", False),
                         ("evil.example/127.0.0.1", False), ("evil.example#localhost", False)):
            for method, path in (("GET", "/v1/models"), ("GET", "/"), ("GET", "/health"), ("OPTIONS", "/v1/models"), ("GET", "/nowhere"),
                                 ("POST", "/v1/chat/completions")):
                data = door_get(path, "Origin: http://" + host, method=method, auth="Host: %s\r\nAuthorization: Bearer sk-your-key\r\n" % host)
                reply = door_exchange(proxy, data)[0]
                assert (reply.status != 403) == ok, (host, method, path)
                assert not any(name.lower().startswith("access-control") for name in reply.headers), (host, method, path)
                assert ok or is_openai_error(reply)
    assert not zai.requests


def test_beyond_loopback_the_well_known_key_is_refused_at_start():
    for host in ("0.0.0.0", "::", "", "192.168.1.7", "example.com", "127.0.0.1.example.com", "localhost.example.com", "1.127.0.0"):
        if host:
            for key in (None, "sk-your-key", "own-key, sk-your-key"):
                with pytest.raises(ztoapi.SettingsError, match="HOST"):
                    ztoapi.Settings.from_environ(dict({"HOST": host}, **({"DEFAULT_KEY": key} if key else {})))
        assert ztoapi.Settings.from_environ({"HOST": host, "DEFAULT_KEY": "own-key"}).host == (host or "127.0.0.1")
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        assert ztoapi.Settings.from_environ({"HOST": host}).host == host


def test_cors_follows_cors_origin(zai):
    page, other = "https://app.example", "https://evil.example"
    for origins, origin, allowed in (("*", page, "*"), ("*", None, "*"), (page, page, page), ("https://a.example, " + page, page, page),
                                     (page, other, None), (page, None, None), (page, page + ".evil.example", None), (page, "null", None),
                                     (page, page.upper(), None), ("", page, None)):
        with proxying(zai, CORS_ORIGIN=origins) as proxy:
            headers = {"Origin": origin} if origin else {}
            preflight = dict(headers,
                             **{"Access-Control-Request-Method": "POST",
                                "Access-Control-Request-Headers": "authorization,x-stainless-os, content-type"})
            answers = [proxy.call("GET", "/v1/models", None, headers), proxy.call("GET", "/v1/nope", None, headers),
                       proxy.call("POST", "/v1/chat/completions", {}, headers, key=None),
                       proxy.call("POST", "/v1/chat/completions", chat_body(stream=True), headers),
                       proxy.call("OPTIONS", "/v1/chat/completions", None, preflight, key=None)]
            assert [status for status, _, _ in answers] == [200, 404, 401, 200, 204]
            for _, got, _ in answers:
                vary = [item.strip() for line in got.get_all("Vary", []) for item in line.split(",")]
                assert got["Access-Control-Allow-Origin"] == allowed and "Access-Control-Allow-Credentials" not in got, (origins, origin)
                assert ("Origin" in vary) == (origins not in ("*", "")), (origins, origin)
                assert not allowed or {"x-request-id", "retry-after"} <= set(got["Access-Control-Expose-Headers"].lower().split(", "))
            got = answers[-1][1]
            if allowed:
                assert (got["Access-Control-Allow-Headers"] == preflight["Access-Control-Request-Headers"]
                        and "Access-Control-Request-Headers" in ", ".join(got.get_all("Vary")))
                assert {"GET", "POST"} <= set(got["Access-Control-Allow-Methods"].split(", "))
            elif not origins:
                assert not any(name.lower().startswith("access-control") for name in got)


def test_host_double_colon_serves_both_ip_versions(zai):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    for host in ("::", "[::]"):
        with proxying(zai, HOST=host) as proxy:
            for place in ("127.0.0.1", "::1"):
                with socket.create_connection((place, proxy.port), 5) as sock:
                    sock.sendall(door_get("/health", "Connection: close"))
                    assert door_rest(sock).startswith(b"HTTP/1.1 200"), (host, place)


def test_secrets_are_redacted_wherever_they_could_surface(zai, door_log, caplog):
    caplog.set_level(logging.DEBUG, "ztoapi")
    id, secret = ZAI_KEY.split(".")
    shown = []
    with proxying(zai, DEBUG_MODE="true", MAX_RETRIES="0") as proxy:
        for script in (refusal(401, "1000", "bad key " + ZAI_KEY), refusal(400, "1210", "id %s, secret %s" % (id, secret)),
                       refusal(500, "1234", "Bearer " + ZAI_KEY),
                       stream(say("Hi"), b'data: {"error":{"code":"500","message":"key %b"}}\n\n' % ZAI_KEY.encode())):
            zai.scripts.extend([script, script])
            shown += [proxy.chat(), proxy.stream()[:3]]
        shown += [proxy.call("GET", path) for path in ("/stats", "/metrics", "/v1/models", "/")]
        shown += [proxy.call("POST", "/v1/chat/completions", chat_body(stream=False, **{field: value})) for field, value in (("model", KEY), (KEY, 1),
                ("tool_choice", KEY), ("stop", [KEY]))]
        shown += [proxy.call("GET", path % KEY) for path in ("/v1/models?key=%s", "/%s", "/v1/models/%s", "/v1/chat/completions/%s")]
        shown += [proxy.settings, proxy.server]
    text = "\n".join(str(x) for answer in shown[:12] for x in answer) + repr(shown[-2:]) + "\n".join(door_log())
    found = [part for part in (ZAI_KEY, id, secret, KEY) if part in text]
    assert not found
    assert len(shown) == 22 and "[redacted]" in text


# Bounds

def test_above_max_connections_a_503_can_be_read_and_the_rest_goes_on(zai, door_log):
    with proxying(zai, MAX_CONNECTIONS="3") as proxy:
        held = [proxy.connect() for _ in range(3)]
        for sock in held:
            sock.sendall(door_get("/health"))
            assert door_read(sock.makefile("rb")).status == 200
        threads = threading.active_count()
        for _ in range(3):
            status, headers, body = proxy.call("POST", "/v1/chat/completions", chat_body(stream=False))
            assert (status == 503 and int(headers["Retry-After"]) > 0 and headers["Connection"] == "close" and headers["x-request-id"]
                    and body["error"]["code"])
        assert threading.active_count() == threads, "a refusal needs no thread"
        held[0].sendall(door_get("/health"))
        assert door_read(held[0].makefile("rb")).status == 200
        held.pop().close()
        assert eventually(lambda: proxy.call("GET", "/health")[0] == 200)
        for sock in held:
            sock.close()
    assert not door_log(logging.ERROR) and not zai.requests


def door_drips(proxy, first, drip, pause, seconds=3.0):
    """How long a connection lives that sends `first`, and then for ever `drip`."""
    began = time.monotonic()
    with proxy.connect(seconds) as sock, contextlib.suppress(OSError):
        sock.sendall(first)
        while time.monotonic() - began < seconds:
            sock.sendall(drip)
            if pause and door_readable([sock]) and not sock.recv(1):
                break
            time.sleep(pause)
    return time.monotonic() - began


def test_a_request_must_come_within_client_timeout_as_a_whole(zai, door_log):
    """Slowloris, in every part of a request, slow and fast; a 413 would end the fast body, hence the large limit."""
    post = door_get("/v1/chat/completions", "Content-Length: 2000000000", method="POST")
    drips = {"request line": (b"GET /", b"a", 0.05), "headers": (b"GET /health HTTP/1.1\r\n", b"X: y\r\n", 0.05),
             "one header": (b"GET /health HTTP/1.1\r\nX: ", b"y", 0.05), "body": (post, b" ", 0.05),
             "chunked body": (door_chunked(), b"1\r\n \r\n", 0.05), "one chunk": (door_chunked(b"fffff\r\n"), b" ", 0.05),
             "chunk extension": (door_chunked(b"1;"), b"x", 0.05), "trailers": (door_chunked(b"0\r\n"), b"X: y\r\n", 0.05),
             "nothing at all": (b"", b"", 0.05), "a TLS hello": (b"\x16\x03\x01", b"\0", 0.05), "blank lines": (b"\r\n", b"\r\n", 0.05),
             "a body without pause": (post, b" ", 0), "a refused body": (post.replace(b"Bearer", b"Bear"), b" " * 65536, 0)}
    lives = {}
    with proxying(zai, CLIENT_TIMEOUT="0.4", MAX_BODY_MB="2048") as proxy:
        before = threading.active_count()
        threads = [threading.Thread(target=lambda name=name, drip=drip: lives.update({name: door_drips(proxy, *drip)}))
                   for name, drip in drips.items()]
        for thread in threads:
            thread.start()
        assert proxy.call("GET", "/health")[0] == 200
        for thread in threads:
            thread.join()
        assert eventually(lambda: threading.active_count() <= before)
    assert len(lives) == len(drips) and all(life < 2.5 for life in lives.values()), lives
    assert not zai.requests and not door_log(logging.ERROR)


def test_an_idle_connection_is_kept_for_keep_alive_seconds(zai, monkeypatch):
    with proxying(zai, CLIENT_TIMEOUT="0.3") as proxy:
        with proxy.connect(5) as sock, sock.makefile("rb") as file:
            sock.sendall(door_get("/health"))
            assert door_read(file).status == 200
            time.sleep(0.7)  # longer than a request may take, shorter than keep-alive
            monkeypatch.setattr(ztoapi, "KEEP_ALIVE", 0.2)
            sock.sendall(door_get("/health"))
            assert door_read(file).status == 200 and file.read() == b""
    assert ztoapi.Server.request_queue_size >= 1024


def test_a_full_descriptor_table_does_not_spin_and_heals(zai, monkeypatch):
    resource = pytest.importorskip("resource")
    accepts, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)
    original = ztoapi.Server.get_request
    monkeypatch.setattr(ztoapi.Server, "get_request", lambda self: accepts.append(1) or original(self))
    with proxying(zai) as proxy:
        sock = socket.socket()
        spare = [os.dup(0)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 20, limits[1]))
            with contextlib.suppress(OSError):
                while True:
                    spare.append(os.dup(0))
            sock.settimeout(5)
            sock.connect(("127.0.0.1", proxy.port))
            assert eventually(lambda: accepts, 2)
            time.sleep(0.25)
            tries = len(accepts)
        finally:
            for fileno in spare:
                os.close(fileno)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert 0 < tries < 50
        with sock:
            sock.sendall(door_get("/health", "Connection: close"))
            assert door_rest(sock).startswith(b"HTTP/1.1 200"), "who waited is served"


# The log

def test_a_request_is_one_line_with_what_happened(proxy, zai, door_log):
    for method, path, body, status in (("GET", "/health", None, 200), ("GET", "/v1/models", None, 200), ("GET", "/nope?secret", None, 404),
                                       ("PUT", "/health", None, 405), ("OPTIONS", "/", None, 204), ("POST", "/v1/chat/completions", {}, 400),
                                       ("POST", "/v1/chat/completions", chat_body(stream=False), 200),
                                       ("POST", "/v1/chat/completions", chat_body(stream=True, store=True), 200)):
        before = len(door_log())
        got, headers, _ = proxy.call(method, path, body)
        assert got == status and eventually(lambda: len(door_log()) > before), path
        line, = door_log()[before:]
        assert line.startswith(headers["x-request-id"] + " 127.0.0.1 %s %s %d" % (method, path.split("?")[0], status)), line
    line = door_log()[-1]
    for field in ("model=GLM-4.6", "stream=true", "in=28", "out=185", "retries=0", "changed=store", "zai=20260711073209851e7f8c12c44579"):
        assert field in line.split(), (field, line)
    assert re.search(r" ttft=\d+\.\d{3} total=\d+\.\d{3} queue=\d+\.\d{3} ", line)
    before = len(door_log())
    for data in (b"nonsense\r\n\r\n", door_get("/health", method="BREW"), door_get("/health", "Content-Length: x")):
        door_talk(proxy, data)
    assert eventually(lambda: len(door_log()) == before + 3) and not door_log(logging.ERROR), "what is refused is logged too"


def test_a_key_is_taken_out_before_a_word_is_cut(zai, door_log):
    key = "sk-prod-A1b2C3d4E5f6G7h8I9j0KLMN"
    with proxying(zai, DEFAULT_KEY=key) as proxy:
        proxy.call("GET", "/" + "a" * 170 + key, key=key)
        proxy.call("POST", "/v1/chat/completions", chat_body(stream=False, model="m" * 75 + key), key=key)
        proxy.idle()
        stats = json.dumps(proxy.call("GET", "/stats", key=key)[2])
        assert "A1b2C3" not in "".join(door_log()) + stats and "[redacted]" in stats


def test_no_log_line_holds_a_text_even_in_debug_mode(zai, door_log, caplog):
    caplog.set_level(logging.DEBUG, "ztoapi")
    with proxying(zai, DEBUG_MODE="true") as proxy:
        door_log_of_texts(proxy, zai)
    text = "\n".join(door_log())
    for word in ("THOUGHT", "ANSWER", "ARGUMENT", "DESCRIPTION", "PROPERTY", "STOP-WORD", "USER-NAME", "SYSTEM", "PROMPT", "OLD", "RESULT", KEY,
                 ZAI_KEY):
        assert word not in text, word
    assert "system:6" in text and "tool:6" in text and "Z.ai answered 200" in text, "DEBUG_MODE shows roles and lengths, and Z.ai's status"


def door_log_of_texts(proxy, zai):
    zai.default = stream(think("THOUGHT"), say("ANSWER"), call("secretive", '{"a":"ARGUMENT"}'), FINISH, DONE)
    tools = [{"type": "function", "function": {"name": "secretive", "description": "DESCRIPTION",
                                               "parameters": {"type": "object", "properties": {"PROPERTY": {}}}}}]
    for streamed in (True, False):
        fields = chat_body(stream=streamed, tools=tools, stop="STOP-WORD", user="USER-NAME",
                           messages=[{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": [{"type": "text", "text": "PROMPT"}]},
                                     {"role": "assistant", "content": None,
                                      "tool_calls": [{"id": "call_1", "type": "function",
                                          "function": {"name": "secretive", "arguments": "{\"b\":\"OLD\"}"}}]},
                                     {"role": "tool", "tool_call_id": "call_1", "content": "RESULT"}])
        assert proxy.call("POST", "/v1/chat/completions", fields)[0] == 200
    proxy.call("POST", "/v1/chat/completions", {"model": "GLM-4.6", "messages": [{"role": "BADROLE", "content": "PROMPT"}]})


def test_nothing_a_client_sends_can_shape_the_log(zai, door_log, caplog):
    caplog.set_level(logging.DEBUG, "ztoapi")
    evil = "x\r\n2026-01-01 INFO forged\x1b[2J\x00\x7f\x85\u2028\u202e\ud800 status=200 out=7 error=''"
    messages = [{"role": "user", "content": "Hi", evil: 1}]
    with proxying(zai, DEBUG_MODE="true") as proxy:
        for body in (chat_body(model=evil, **{evil: 1, "n": 7}), chat_body(model=evil, **{evil: 1}),
                     {"model": evil, "messages": [{"role": evil, "content": evil}]},
                     {"model": evil, "messages": messages, "tools": [{"type": evil, evil: evil}], "response_format": {"type": evil}},
                     {"model": "x", "messages": messages}):
            door_talk(proxy, door_post(json.dumps(body).encode()))
        for target in ("/\x1b[31m", "/\x9b2J\xff", "/%0d%0aforged", "/a%20out=7", "/v1/models/%1b%5b2J%e2%80%a8"):
            door_talk(proxy, door_get(target))
        door_talk(proxy, b"\x1b[2J / HTTP/1.1\r\n\r\n")
    lines = door_log()
    assert len(lines) >= 9 and all(re.fullmatch("[ -~]+", line) for line in lines), [line for line in lines if not re.fullmatch("[ -~]+", line)]
    assert all(line.split(" error=")[0].count(" out=") <= 1 for line in lines if line.startswith("req_")), "a model's name is one word of the line"


# Bugs of our own

def test_a_bug_is_one_500_and_one_traceback_and_the_server_lives_on(proxy, zai, door_log, monkeypatch, caplog):
    def boom(*args, **kwargs):
        raise RuntimeError("boom")
    for place, name, method, path, body in ((ztoapi, "listed_models", "GET", "/v1/models", None), (ztoapi.Metrics, "stats", "GET", "/stats", None),
                                            (ztoapi, "to_zai_request", "POST", "/v1/chat/completions", chat_body()),
                                            (ztoapi.ChunkTranslator, "feed", "POST", "/v1/chat/completions", chat_body())):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(place, name, boom)
            status, headers, answer = proxy.call(method, path, body)
        assert (status == 500 and answer["error"]["code"] == "internal_error" and headers["x-request-id"] in answer["error"]["message"]
                and "boom" not in str(answer)), name
        bugs = [record for record in caplog.records if record.exc_info]
        assert len(bugs) == 1 and headers["x-request-id"] in bugs[0].getMessage(), name
        assert proxy.call(method, path, body)[0] == 200, name
    assert proxy.call("GET", "/stats")[2]["failed"] == 2


def test_a_bug_during_a_stream_is_the_in_stream_error(zai, proxy, door_log, monkeypatch, caplog):
    encode, calls = ztoapi.Envelope.encode, []

    def boom(self, chunks):
        calls.append(chunks)
        if len(calls) == 3:
            raise RuntimeError("boom")
        return encode(self, chunks)
    monkeypatch.setattr(ztoapi.Envelope, "encode", boom)
    zai.default = stream(say("ab"), 0.05, say("cd"), 0.05, say("ef"), FINISH, DONE)
    status, headers, events, clean = proxy.stream()
    assert status == 200 and said(events) == "abcd" and not clean and "[DONE]" not in events and not finish_of(events)
    assert (list(events[-1]) == ["error"] and events[-1]["error"]["code"] == "internal_error"
            and headers["x-request-id"] in events[-1]["error"]["message"])
    assert sum(bool(record.exc_info) for record in caplog.records) == 1
    monkeypatch.undo()
    assert proxy.chat()[0] == 200


def test_a_bug_in_the_watch_does_not_end_the_accept_loop(zai, monkeypatch, caplog):
    ticks = []

    def tick(self):
        ticks.append(1)
        raise RuntimeError("boom")
    monkeypatch.setattr(ztoapi.Watch, "tick", tick)
    with proxying(zai) as proxy:
        assert eventually(lambda: len(ticks) > 1, 3) and proxy.thread.is_alive()
        assert proxy.call("GET", "/health")[0] == 200
        monkeypatch.undo()
    assert any(record.exc_info for record in caplog.records)


# The numbers

METRICS = {"ztoapi_requests_total": "counter", "ztoapi_tokens_total": "counter", "ztoapi_time_to_first_token_seconds": "histogram",
           "ztoapi_request_duration_seconds": "histogram", "ztoapi_requests_in_flight": "gauge", "ztoapi_requests_queued": "gauge",
           "ztoapi_concurrency_ceiling": "gauge", "ztoapi_retries_total": "counter", "ztoapi_repaired_frames_total": "counter",
           "ztoapi_cancelled_total": "counter", "ztoapi_process_start_time_seconds": "gauge"}


def door_samples(text):
    """{name: {labels: value}} of Prometheus text, checked against the grammar of format 0.0.4."""
    samples, types, family = {}, {}, None
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        found = re.fullmatch(r"# (HELP|TYPE) ([a-z_]+) (.+)", line)
        if found:
            kind, family, rest = found.groups()
            if kind == "TYPE":
                assert family not in types and rest in ("counter", "gauge", "histogram"), line
                types[family] = rest
            continue
        found = re.fullmatch(r'([a-z_]+)(?:\{((?:[a-z_]+="[^"\\\n]*",?)+)\})? (-?[0-9.e+]+)', line)
        assert found and found.group(1) in ((family,) if types[family] != "histogram" else (family + "_bucket", family + "_sum",
                family + "_count")), line
        labels = tuple(sorted(re.findall(r'([a-z_]+)="([^"]*)"', found.group(2) or "")))
        assert labels not in samples.setdefault(found.group(1), {}), "twice: " + line
        samples[found.group(1)][labels] = float(found.group(3))
    return types, samples


def test_the_metrics_are_prometheus_text_with_the_promised_names(zai):
    with proxying(zai, MAX_CONCURRENCY="4", MAX_RETRIES="1") as proxy:
        assert proxy.call("GET", "/metrics", key=None)[0] == 401
        assert {name: kind for name, kind in door_samples(proxy.call("GET", "/metrics")[2])[0].items() if METRICS.get(name) != kind} == {}
        zai.scripts.extend([refusal(500, "1234"), stream(*HEALTHY), refusal(400, "1210"), stream(b"data: garbage\n\n", *HEALTHY)])
        proxy.chat()
        proxy.chat()
        proxy.stream()
        for i in range(20):
            proxy.chat(model='new-%d"\\\n' % i)
        held = proxy.open_stream()
        zai.default = stream(say("Hi"), 30)
        other = proxy.open_stream(model="GLM-5")
        assert eventually(lambda: len(zai.requests) == 26)
        _, headers, text = proxy.call("GET", "/metrics")
        held.close()
        other.close()
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    types, samples = door_samples(text)
    assert types == METRICS
    requests = samples["ztoapi_requests_total"]
    assert requests[("model", "glm-4.6"), ("status", "200")] >= 2 and requests[("model", "glm-4.6"), ("status", "400")] == 1
    assert requests[("model", "other"), ("status", "200")] == 20, "models the table does not know are one label"
    assert samples["ztoapi_tokens_total"][("kind", "completion"), ("model", "other")] == 20 * 185 and samples["ztoapi_tokens_total"][("kind",
            "prompt"), ("model", "other")] == 20 * 28
    assert (samples["ztoapi_retries_total"][()] == 1 and samples["ztoapi_repaired_frames_total"][()] == 1
            and samples["ztoapi_requests_in_flight"][()] >= 1)
    assert 0 < samples["ztoapi_process_start_time_seconds"][()] <= time.time()
    assert all(value == 4 for value in samples["ztoapi_concurrency_ceiling"].values()) and samples["ztoapi_concurrency_ceiling"]
    for name in ("ztoapi_time_to_first_token_seconds", "ztoapi_request_duration_seconds"):
        buckets = list(samples[name + "_bucket"].items())
        assert buckets[-1] == ((("le", "+Inf"),), samples[name + "_count"][()]) and [value for _, value in buckets] == sorted(value
                for _, value in buckets)
    try:
        from prometheus_client import parser
    except ImportError:  # the grammar above has to do
        return
    families = {family.name for family in parser.text_string_to_metric_families(text)}
    assert families == {name[:-6] if name.endswith("_total") else name for name in METRICS}


def test_stats_tell_the_page_what_is_going_on(zai):
    with proxying(zai, MAX_RETRIES="0") as proxy:
        assert proxy.call("GET", "/stats", key=None)[0] == 401
        first = proxy.call("GET", "/stats")[2]
        assert (first["in_flight"], first["queued"], first["served"], first["failed"], first["ttft_p50_ms"], first["recent"], first["demo"]) == (0, 0,
                0, 0, None, [], False)
        for i in range(23):
            assert proxy.chat(model="m%d" % i, messages=[{"role": "user", "content": "PROMPT"}])[0] == 200
        proxy.idle()  # a handler tells the counters after its answer is out
        zai.scripts.append(refusal(400, "1210", "no such"))
        assert proxy.chat()[0] == 400
        proxy.idle()
        _, headers, stats = proxy.call("GET", "/stats")
    assert headers["Cache-Control"] == "no-store" and stats["version"] == ztoapi.__version__
    assert (stats["in_flight"], stats["queued"], stats["served"], stats["failed"]) == (0, 0, 23,
            1) and stats["ttft_p50_ms"] >= 0 and stats["tokens_per_s"] > 0
    assert len(stats["recent"]) == 20 and stats["recent"][0]["status"] == 400 and stats["recent"][1]["model"] == "m22"
    assert set(stats["recent"][0]) >= {"time", "model", "status", "stream", "ttft_ms", "total_ms", "tokens_in", "tokens_out", "error"}
    assert "1210" in stats["recent"][0]["error"] and stats["recent"][1]["error"] is None and stats["recent"][1]["tokens_out"] == 185
    assert len(stats["history"]) == 60 and sum(bucket["requests"] for bucket in stats["history"]) == 24 and sum(bucket["tokens"]
            for bucket in stats["history"]) == 23 * 185
    assert [b["t"] - a["t"] for a, b in zip(stats["history"], stats["history"][1:])] == [10] * 59, "ten minutes"
    assert not re.search("PROMPT|Hello|The user", json.dumps(stats))


def test_a_learned_ceiling_shows(zai):
    zai.limit, zai.default = 2, stream(say("a"), 0.1, FINISH, DONE)
    with proxying(zai) as proxy:
        threads = [threading.Thread(target=proxy.chat) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        row, = proxy.call("GET", "/stats")[2]["ceilings"]
        assert row["model"] == "glm-4.6" and 1 <= row["ceiling"] <= 3 and set(row) >= {"key", "in_flight", "queued"}
        assert 'model="glm-4.6"} %d\n' % row["ceiling"] in proxy.call("GET", "/metrics")[2].split("# TYPE ztoapi_concurrency_ceiling")[1]


# The program: arguments, variables, the check

def door_main(capsys, *argv, **environ):
    """(exit status, stdout, stderr) of main() in this process."""
    capsys.readouterr()
    status = ztoapi.main(environ, argv)
    return (status, *capsys.readouterr())


BAD_VARIABLES = [("PORT", "abc"), ("PORT", "-1"), ("PORT", "65536"), ("PORT", "9 0"), ("PORT", "1.5"), ("PORT", "\u0661"), ("PORT", "9\n9"),
                 ("HOST", "0.0.0.0"), ("HOST", "a\nb"), ("DEFAULT_KEY", ""), ("DEFAULT_KEY", " , "), ("DEFAULT_KEY", "two words"),
                 ("DEFAULT_KEY", "schl\xfcssel"), ("DEFAULT_KEY", "a\nb"), ("ZAI_API_KEY", "secret secret"), ("ZAI_API_KEY", "sec\r\nret"),
                 ("ZAI_BASE_URL", "ftp://api.z.ai/"), ("ZAI_BASE_URL", "api.z.ai"), ("ZAI_BASE_URL", "http://"), ("ZAI_BASE_URL", "http://x:99999/"),
                 ("ZAI_BASE_URL", "http://x y/"), ("ZAI_BASE_URL", "https://x/?a=b"), ("ZAI_BASE_URL", "file:///etc/passwd"),
                 ("ZAI_BASE_URL", "http://["), ("DEFAULT_STREAM", "maybe"), ("ENABLE_THINKING", "2"), ("REASONING_FORMAT", "xml"),
                 ("MODEL_ALIASES", "gpt-4o"), ("MODEL_ALIASES", "=glm-4.6"), ("MODEL_ALIASES", "a="), ("MAX_CONCURRENCY", "-1"),
                 ("MAX_CONCURRENCY", "1.5"), ("QUEUE_TIMEOUT", "-1"), ("QUEUE_TIMEOUT", "nan"), ("QUEUE_TIMEOUT", "inf"), ("QUEUE_TIMEOUT", "2m"),
                 ("MAX_RETRIES", "many"), ("HEARTBEAT", "-0.1"), ("UPSTREAM_TIMEOUT", "0"), ("CLIENT_TIMEOUT", "0"), ("MAX_BODY_MB", "0"),
                 ("MAX_BODY_MB", "1e3"), ("MAX_CONNECTIONS", "0"), ("DEBUG_MODE", "verbose"), ("DEMO_MODE", "y e s"), ("PORT", "\udcff")]


def test_a_bad_variable_is_one_line_and_exit_status_2(capsys):
    for variable, value in BAD_VARIABLES:
        for argv in ((), ("--check",)):
            status, out, err = door_main(capsys, *argv, **{variable: value})
            assert status == 2 and not out and err.count("\n") == 1 and err.endswith("\n") and variable in err and len(err) > 20, (variable, value,
                    err)
            if value.strip(" ,"):
                assert (ascii(value)[1:-1] in err) != variable.endswith("_KEY"), (variable, value, err)


def test_every_variable_of_the_docstring_is_read(capsys):
    names = {field for field in re.findall(r"^    ([A-Z_]+) {2,}", ztoapi.__doc__, re.MULTILINE)}
    assert {name.lower() for name in names} == {field.name for field in ztoapi.dataclasses.fields(ztoapi.Settings)}


def test_arguments_are_three_and_no_others(capsys):
    for argv in (["--help"], ["-h"]):
        status, out, err = door_main(capsys, *argv, PORT="bad")
        assert (status, err) == (0, "") and out.strip() == ztoapi.__doc__.strip() and out.isascii()
    status, out, err = door_main(capsys, "--version", DEFAULT_KEY="")
    assert status == 0 and ztoapi.__version__ in out and out.count("\n") == 1
    for argv in (["--nope"], ["serve"], ["--check", "--check"], ["--help", "x"], [""], ["--port", "80"], ["--version", "--help"], ["\udcff\n"]):
        status, out, err = door_main(capsys, *argv)
        assert status == 2 and not out and err.count("\n") == 1, argv


def door_check(capsys, **environ):
    """(exit status, stdout) of --check, which must come to an end by itself."""
    found = []
    thread = threading.Thread(target=lambda: found.append(door_main(capsys, "--check", **environ)), daemon=True)
    thread.start()
    thread.join(8)
    assert found, "--check hangs"
    assert "Traceback" not in found[0][2]
    return found[0][:2]


DOOR_LISTING = answer(200, {"object": "list", "data": []})


def test_the_check_passes_where_a_chat_would_work(zai, capsys):
    status, out = door_check(capsys, DEMO_MODE="true")
    assert status == 0 and "DEMO_MODE" in out and "FAIL" not in out
    zai.scripts.extend([DOOR_LISTING, refusal(401, "1000"), stream(*HEALTHY)])  # of two keys one is good
    status, out = door_check(capsys, ZAI_API_KEY=ZAI_KEY + ",fedcba9876543210.OtherOtherOther", ZAI_BASE_URL=zai.url, DEFAULT_KEY=KEY,
                             DEFAULT_STREAM="false", HEARTBEAT="0", CORS_ORIGIN="", MODEL_ALIASES="gpt-4o=glm-4.6")
    assert status == 0 and ("Python %d.%d" % sys.version_info[:2]) in out and "OpenSSL" in out, out
    for word in ("DNS", "TCP", "chat", "first token", "DEFAULT_STREAM", "HEARTBEAT", "CORS_ORIGIN", "MODEL_ALIASES", "...cret"):
        assert word in out, (word, out)
    assert not any(secret in out for secret in (ZAI_KEY, KEY, "ZaiSecret", "OtherOther", "fedcba")), "masked"
    assert [request["path"].rsplit("v4", 1)[1] for request in zai.requests] == ["/models", "/models", "/chat/completions"]


def door_refused_url():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return "http://127.0.0.1:%d/api/paas/v4" % sock.getsockname()[1]


@pytest.mark.parametrize("name,scripts,advice",
                         [("refused port", None, "firewall|HTTPS_PROXY"), ("bad key", [refusal(401, "1000", "Authentication failed " + ZAI_KEY)],
                             "ZAI_API_KEY"), ("HTML", [answer(200, b"<html>portal</html>")], "ZAI_BASE_URL"),
                          ("HTML 502", [answer(502, b"<html>Bad gateway</html>")] * 3, "502"),
                          ("wrong path", [answer(200, {"code": 500, "msg": "404 NOT_FOUND", "success": False})], "ZAI_BASE_URL"),
                          ("no money", [DOOR_LISTING] + [refusal(429, "1113", "Insufficient balance")] * 9, "Recharge|Coding Plan"),
                          ("no model", [DOOR_LISTING] + [refusal(400, "1211", "Unknown Model")] * 9, "model"),
                          ("silence", [[20]] * 3, "silent|UPSTREAM_TIMEOUT"), ("silence in the answer", [DOOR_LISTING] + [stream(think("x"), 20)] * 9,
                              "silent|UPSTREAM_TIMEOUT"), ("cut", [DOOR_LISTING] + [stream(think("x"), CLOSE)] * 9, "cut|ended"),])
def test_the_check_fails_with_one_sentence_on_what_to_do(zai, capsys, name, scripts, advice):
    zai.scripts.extend(scripts or [])
    status, out = door_check(capsys, ZAI_API_KEY=ZAI_KEY, ZAI_BASE_URL=zai.url if scripts else door_refused_url(), MAX_RETRIES="0",
                             UPSTREAM_TIMEOUT="0.1")
    failures = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert status == 1 and failures and re.search(advice, failures[0]) and "ZaiSecret" not in out, out


def test_the_check_can_be_told_on_a_console_that_knows_only_ascii(zai):
    zai.scripts.append(refusal(401, "1000", "\u8eab\u4efd\u9a8c\u8bc1\u5931\u8d25"))
    run = subprocess.run([sys.executable, "-S", "-B", ztoapi.__file__, "--check"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=10,
                         env=dict(os.environ, PYTHONIOENCODING="ascii", ZAI_API_KEY=ZAI_KEY, ZAI_BASE_URL=zai.url))
    assert run.returncode == 1 and b"FAIL" in run.stdout and b"Traceback" not in run.stderr, run.stderr


def test_the_check_without_a_key_says_where_one_is_had(zai, capsys):
    status, out = door_check(capsys, ZAI_BASE_URL=zai.url)
    assert status == 1 and "ZAI_API_KEY" in out and "https://z.ai/" in out


def test_a_host_that_is_no_host_is_no_traceback(zai, capsys):
    for host in ("a..b", "x" * 70, "no-such-host.invalid"):
        status, out, err = door_main(capsys, "--check", ZAI_API_KEY=ZAI_KEY, ZAI_BASE_URL="http://%s/api" % host)
        assert status == 2 and err.count("\n") == 1 or status == 1 and "FAIL" in out, host
        if status == 1:
            with proxying(None, ZAI_BASE_URL="http://%s/api" % host, MAX_RETRIES="0") as proxy:
                assert proxy.chat()[0] == 502, host
        status, out, err = door_main(capsys, HOST=host, DEFAULT_KEY=KEY, PORT="0")
        assert status in (1, 2) and err.count("\n") == 1 and host in err, host


# The program: its life, in processes of its own

posix_only = pytest.mark.skipif(os.name == "nt", reason="signals")
DOOR_DIRECTORY = "/proc" if os.path.isdir("/proc/self") else "/"  # nothing can be written here, not even by root


def door_popen(*argv, **environ):
    return subprocess.Popen([sys.executable, "-I", "-S", "-B", *argv], env=environ, cwd=DOOR_DIRECTORY, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def door_program(*argv, **environ):
    """ztoapi as a process, in an environment of these variables alone; `.port` and `.lines` are what it said at start."""
    process = door_popen(*(argv or [ztoapi.__file__]), **dict({"PORT": "0"}, **environ))
    try:
        process.lines = [process.stdout.readline() for _ in range(3)]
        process.port = int(re.search(r"http://localhost:(\d+)/v1", process.lines[0]).group(1))
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.out, process.err = process.communicate(timeout=5)


def door_end(process, signals, seconds=1.5):
    """(exit status, stderr) after a signal; it must end within that time."""
    for number in signals:
        process.send_signal(number)
    began = time.monotonic()
    status = process.wait(5)
    assert time.monotonic() - began < seconds
    return status, process.stderr.read()


AUDITED = """
import os, runpy, sys
def hook(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and args[0] != os.devnull
    if writes or event.startswith(("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess", "os.mkdir",
                                   "os.remove", "os.rename", "tempfile")):
        print("AUDIT", event, args, file=sys.stderr, flush=True)
sys.addaudithook(hook)
sys.argv = [sys.argv[1]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@posix_only
def test_it_serves_from_a_bare_environment_and_writes_and_starts_nothing():
    """python -I -S -B, no variables but two, a directory nobody can write to; SIGTERM ends it with an idle client still there."""
    with door_program("-c", AUDITED, ztoapi.__file__, DEMO_MODE="1") as process:
        assert ("DEMO" in process.lines[1] and "http://localhost:%d/" % process.port in process.lines[2]
                and process.lines[0].startswith("ZtoApi " + ztoapi.__version__))
        with socket.create_connection(("127.0.0.1", process.port), 5) as idle:
            idle.sendall(door_get("/health"))
            assert door_read(idle.makefile("rb")).body == b'{"status":"ok"}'
            body = json.dumps(chat_body(stream=False, thinking={"type": "disabled"})).encode()
            chat, page, _ = door_exchange(process.port, door_post(body, auth=DOOR_AUTH.replace(KEY, "sk-your-key")) + door_get("/"))
            assert chat.status == page.status == 200 and b"demo" in chat.body.lower() and b"Hi" in chat.body and b"<html" in page.body
            status, err = door_end(process, [signal.SIGTERM])
            assert (status, "AUDIT" in err, "Traceback" in err) == (0, False, False), err
            lines = err.strip().splitlines()
            assert len(lines) == 4 and all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO req_", line)
                                           for line in lines), "one line a request, with the time"


@posix_only
def test_the_start_lines_mask_keys_and_sigint_ends_it(zai):
    with door_program(ZAI_API_KEY=ZAI_KEY + ",short", ZAI_BASE_URL=zai.url, DEFAULT_KEY=KEY) as process:
        text = "".join(process.lines)
        assert text.count("\n") == 3 and zai.url in text and "models" in text and ZAI_KEY[-4:] in text and KEY[-4:] in text
        assert not any(secret in text for secret in (ZAI_KEY, KEY, "short", "ZaiSecret"))
        with socket.create_connection(("127.0.0.1", process.port), 5) as half:
            half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: lo")  # half a request is nothing that runs
            assert door_exchange(process.port, b"")[0].status == 200
            status, err = door_end(process, [signal.SIGINT])
            assert status == 0 and "Traceback" not in err, err


@posix_only
def test_sigterm_lets_a_running_answer_finish_and_takes_no_new_one(zai):
    go = threading.Event()
    zai.default = stream(say("Hel"), lambda fake, request: go.wait(10), say("lo"), FINISH, DONE)
    with door_program(ZAI_API_KEY=ZAI_KEY, ZAI_BASE_URL=zai.url, DEFAULT_KEY=KEY) as process:
        with socket.create_connection(("127.0.0.1", process.port), 5) as sock:
            sock.sendall(raw_chat(chat_body(stream=True)))
            assert eventually(lambda: door_readable([sock]))
            process.send_signal(signal.SIGTERM)

            def refused():
                try:
                    socket.create_connection(("127.0.0.1", process.port), 5).close()
                except OSError:
                    return True
            assert eventually(refused) and process.poll() is None
            go.set()
            status, headers, events, clean = read_stream(sock)
            assert said(events) == "Hello" and clean and events[-1] == "[DONE]"
        assert door_end(process, [])[0] == 0


@posix_only
def test_a_second_signal_ends_at_once(zai):
    zai.default = stream(say("Hel"), 30)
    with door_program(ZAI_API_KEY=ZAI_KEY, ZAI_BASE_URL=zai.url, DEFAULT_KEY=KEY) as process:
        with socket.create_connection(("127.0.0.1", process.port), 5) as sock:
            sock.sendall(raw_chat(chat_body(stream=True)))
            assert eventually(lambda: door_readable([sock]))
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
            status, err = door_end(process, [signal.SIGTERM])
            assert "Traceback" not in err, err


def test_stop_cuts_what_still_runs_after_the_grace(zai):
    zai.default = stream(say("Hel"), 30)
    with proxying(zai) as proxy:
        with proxy.open_stream() as sock:
            assert eventually(lambda: door_readable([sock]))
            began = time.monotonic()
            proxy.server.stop(0.3)
            assert 0.3 <= time.monotonic() - began < 2
            status, headers, events, clean = read_stream(sock)
            assert said(events) == "Hel" and not clean and eventually(lambda: zai.cut_by_client == 1)


def test_client_timeout_holds_while_the_server_drains(zai):
    with proxying(zai, CLIENT_TIMEOUT="0.3") as proxy, proxy.connect() as sock:
        sock.sendall(door_post(DOOR_CHAT)[:-5])
        assert eventually(lambda: proxy.server.busy)
        began = time.monotonic()
        proxy.server.stop(4)
        assert time.monotonic() - began < 2.5


@posix_only
def test_what_the_machine_refuses_is_one_line_and_exit_status_1(zai):
    taken = socket.create_server(("127.0.0.1", 0))
    with taken:
        for environ in ({"PORT": str(taken.getsockname()[1])}, {"PORT": "0", "HOST": "203.0.113.77", "DEFAULT_KEY": KEY},
                        {"PORT": "0", "HOST": "256.1.1.1", "DEFAULT_KEY": KEY}):
            process = door_popen(ztoapi.__file__, **environ)
            out, err = process.communicate(timeout=10)
            assert process.returncode == 1 and not out and err.count("\n") == 1 and list(environ.values())[-1 if len(environ) == 1 else 1] in err, err
    process = door_popen(ztoapi.__file__, PORT="many")
    assert process.communicate(timeout=10)[1].count("\n") == 1 and process.returncode == 2


@posix_only
def test_a_low_descriptor_limit_lowers_the_ceiling_and_is_said(zai):
    pytest.importorskip("resource")
    lower = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (84, 84))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    with door_program("-c", lower, ztoapi.__file__, MAX_CONNECTIONS="500") as process:
        held = [socket.create_connection(("127.0.0.1", process.port), 5) for _ in range(150)]  # more than there are descriptors
        try:
            assert eventually(lambda: len(door_readable(held)) > 30)
            refused = door_read(door_readable(held)[0].makefile("rb"))
            assert refused.status == 503 and refused.headers["Retry-After"]
        finally:
            for sock in held:
                sock.close()
        assert eventually(lambda: door_exchange(process.port, b"")[0].status == 200)
        status, err = door_end(process, [signal.SIGTERM])
        assert status == 0 and re.search(r"\b\d\d connections.*MAX_CONNECTIONS", err.splitlines()[0]) and "Traceback" not in err, err


def test_importing_has_no_side_effect_and_needs_the_standard_library_alone():
    code = """
import logging, signal, sys, threading
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], list(sys.path)
seen = []
def hook(event, args):
    if event.startswith(("socket.", "subprocess", "os.", "tempfile", "urllib")) and event not in ("os.listdir", "os.scandir", "os.putenv"):
        seen.append((event, args))
    if event == "open" and isinstance(args[2], int) and args[2] & 3:
        seen.append((event, args))
sys.addaudithook(hook)
sys.path.insert(0, sys.argv[1])
del sys.path[0]
assert before == ([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], list(sys.path))
assert not seen, seen
assert threading.active_count() == 1 and not logging.getLogger().handlers and not logging.getLogger("ztoapi").handlers
print("clean")
"""
    process = door_popen("-c", code, os.path.dirname(ztoapi.__file__))
    assert process.communicate(timeout=10) == ("clean\n", "") and process.returncode == 0
    with open(ztoapi.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    names = {name.split(".")[0] for node in ast.walk(tree)
             for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom)
                          else [])}
    assert len(names) > 10 and names <= set(getattr(sys, "stdlib_module_names", names))


def test_it_can_be_embedded_twice_in_one_process(zai):
    handlers, threads = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)], threading.active_count()
    servers = [ztoapi.Server(ztoapi.Settings(port=0, default_key=(KEY,), zai_api_key=(ZAI_KEY,), zai_base_url=zai.url)),
               ztoapi.Server(ztoapi.Settings(port=0, demo_mode=True, default_key=(KEY,)))]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    for server, text in zip(servers, ("Hello", "Demo")):
        reply, _ = door_exchange(server.server_port, door_post(DOOR_CHAT))
        assert reply.status == 200 and text in reply.body.decode()
    for server in servers:
        server.stop()
        server.stop()  # twice does no harm
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.server_port), 1)
    assert eventually(lambda: threading.active_count() <= threads + 1) and handlers == [signal.getsignal(signal.SIGINT),
            signal.getsignal(signal.SIGTERM)]
    with pytest.raises(ztoapi.SettingsError):
        ztoapi.Settings(host="0.0.0.0")


def test_a_server_that_never_served_can_be_stopped():
    server = ztoapi.Server(ztoapi.Settings(port=0))
    thread = threading.Thread(target=server.stop, args=(1,), daemon=True)
    thread.start()
    thread.join(3)
    assert not thread.is_alive()


# The fuzzer

def door_scramble(rand, data):
    """One mutation of raw bytes."""
    at = rand.randrange(len(data) + 1)
    end = min(len(data), at + rand.choice((1, 1, 2, 5, 30)))
    lines = data.split(b"\r\n")
    kind = rand.randrange(9)
    if kind == 0:
        return data[:at] + bytes([rand.randrange(256)]) + data[at + 1:]
    if kind == 1:
        return data[:at] + data[end:]
    if kind == 2:
        return data[:end] + data[at:end] * rand.choice((1, 2, 100)) + data[end:]
    if kind == 3:
        return data[:at] + rand.choice((b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\xff", b"%00", b"//", b"\r\n\r\n", b"0\r\n\r\n",
                                        b"HTTP/1.0", b"[", b"{", b'"', b"1e999", b"\\ud800")) + data[at:]
    if kind == 4:
        return data[:at]
    if kind == 5:
        i = rand.randrange(len(lines))
        lines.insert(rand.randrange(len(lines)), lines[i])
    elif kind == 6:
        lines.pop(rand.randrange(len(lines)))
    elif kind == 7:
        lines.insert(rand.randrange(1, len(lines) + 1),
                     rand.choice((b"Content-Length: 3", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Expect: 100-continue",
                                  b"Connection: close", b"Host: evil", b"X: \xff\x1b", b" fold", b"X", b"Origin: x", b"Content-Type: multipart/mixed",
                                  b"Content-Encoding: gzip", b"Connection: upgrade", b"Upgrade: websocket", b"Range: bytes=0-1",
                                  b"Accept: application/json", b"Content-Length: -1")))
    else:
        rand.shuffle(lines)
    return b"\r\n".join(lines)


ODD_VALUES = [None, True, 0, -1, 1.5, 10 ** 90, "", "x", "\ud800", "\0", [], {}, [[]], [None], {"type": "text"}, {"type": "function", "function": {}},
              [{"type": "image_url"}], "none", "auto", "system", -1e308]


def door_odd_request(rand):
    """A good request with some of its JSON replaced, and then perhaps its bytes scrambled."""
    body = chat_body(stream=rand.random() < 0.5, temperature=1, stop=["a"],
                     tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], tool_choice="auto",
                     response_format={"type": "json_object"}, thinking={"type": "enabled"}, stream_options={"include_usage": True})
    body["messages"] = body["messages"] + [{"role": "assistant", "content": None,
                                            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                                           {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "x"}]}]
    for _ in range(rand.randrange(3)):
        place = body
        while True:
            key = rand.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key] or rand.random() < 0.4:
                break
            place = place[key]
        place[key] = json.loads(json.dumps(rand.choice(ODD_VALUES)))  # a copy: the next may go inside it
    data = json.dumps(body).encode()
    return door_post(data) if rand.random() < 0.5 else door_chunked(chunked(data[:40]), chunked(data[40:]), END)


def test_two_thousand_broken_requests_meet_no_hang_no_500_and_a_living_server(proxy, zai, door_log):
    rand = random.Random(4)
    plain = [door_get("/v1/models"), door_get("/v1/models/GLM-4.6?x=%20", "Origin: https://x"), door_get("/health", "Connection: close"),
             door_get("/stats", method="HEAD"), door_get("/"), door_get("/v1/chat/completions", "Origin: x", "Access-Control-Request-Headers: a",
                 method="OPTIONS"), door_get("http://x/metrics", version="HTTP/1.0"), door_post(DOOR_CHAT, "Expect: 100-continue")]
    for case in range(2000):
        data = rand.choice(plain) if rand.random() < 0.6 else door_odd_request(rand)
        for _ in range(rand.choice((0, 1, 1, 2, 5))):
            data = door_scramble(rand, data)
        try:
            with proxy.connect(5) as sock:
                sock.sendall(data + rand.choice((b"", b"", LAST)))
                sock.shutdown(socket.SHUT_WR)  # a request cut short must not wait for its rest
                got = door_rest(sock)
        except socket.timeout:
            pytest.fail("case %d hangs: %r" % (case, data))
        assert not re.search(rb"HTTP/1\.1 500|internal_error", got) and got[:9] in (b"", b"HTTP/1.1 "), (case, data, got)
        if case % 100 == 0:
            assert proxy.call("GET", "/health")[0] == 200, (case, data)
    assert not door_log(logging.ERROR) and len(zai.requests) > 100
    assert proxy.chat()[0] == 200


# Attacks of our own. More of them stand where they belong: a locked door's spellings, nesting around the recursion limit, forged
# fields of the log, blank lines and drips without a pause, half a request at a signal, a silent Z.ai under --check.

def door_reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_attack_resets_at_every_byte_leave_nothing_behind(zai, door_log):
    with proxying(zai) as proxy:
        threads, data = threading.active_count(), raw_chat(chat_body(stream=True))
        for i in list(range(0, len(data), 3)) + [len(data)] * 20:
            sock = proxy.connect()
            sock.sendall(data[:i])
            door_reset(sock)
        pool = proxy.server.upstream.pool  # a thread of the fake waits at the other end of each connection in it
        assert eventually(lambda: pool.expire(0) or threading.active_count() <= threads) and proxy.idle()
        assert proxy.chat()[0] == 200
    assert not door_log(logging.ERROR)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors")
def test_attack_a_flood_of_connections_beyond_the_limit_costs_no_threads_and_few_descriptors(zai, monkeypatch):
    monkeypatch.setattr(ztoapi, "LINGER", 0.2)
    with proxying(zai, MAX_CONNECTIONS="1") as proxy:
        with proxy.connect() as held:
            held.sendall(door_get("/health"))
            assert door_read(held.makefile("rb")).status == 200
            threads, descriptors, most, socks = threading.active_count(), len(os.listdir("/proc/self/fd")), 0, []
            for _ in range(1000):
                socks.append(proxy.connect())
                most = max(most, len(os.listdir("/proc/self/fd")) - descriptors - len(socks))
                if len(socks) > 100:
                    door_reset(socks.pop(0))
            assert threading.active_count() <= threads and most <= 300, most
            held.sendall(door_get("/health"))
            assert door_read(held.makefile("rb")).status == 200, "who is in is served"
        for sock in socks:
            sock.close()
        assert eventually(lambda: proxy.call("GET", "/health")[0] == 200)
        assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 2, 3)


def test_attack_a_deaf_client_that_pipelines_is_dropped(zai):
    """It sends requests for ever and reads nothing: the answers fill the buffers, and then CLIENT_TIMEOUT is over."""
    with proxying(zai, CLIENT_TIMEOUT="0.2") as proxy, proxy.connect(5) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        began, data = time.monotonic(), door_get("/") * 50
        with pytest.raises(OSError):
            while time.monotonic() - began < 8:
                sock.sendall(data)
        assert time.monotonic() - began < 6 and proxy.idle()


def test_attack_a_large_error_does_not_keep_the_thread_of_a_deaf_client(zai):
    """The error of a stream that has begun is a write like any other: CLIENT_TIMEOUT bounds it."""
    zai.default = stream(say("Hi"), 0.1, b'data: {"error":{"code":"1234","message":"%b"}}\n\n' % (b"x" * 12000000))
    with proxying(zai, CLIENT_TIMEOUT="0.2") as proxy, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", proxy.port))
        sock.sendall(raw_chat(chat_body(stream=True)))
        assert eventually(lambda: zai.requests) and proxy.server.busy
        assert eventually(lambda: not proxy.server.busy and not proxy.server.metrics.in_flight, 4)


def test_attack_a_continue_that_is_never_followed_is_dropped(zai):
    with proxying(zai, CLIENT_TIMEOUT="0.1") as proxy, proxy.connect(5) as sock:
        sock.sendall(door_get("/v1/chat/completions", "Content-Length: 5", "Expect: 100-continue", method="POST"))
        assert door_rest(sock) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert not zai.requests


def test_attack_a_request_inside_a_request_is_text(proxy, zai):
    """A body, a chunk extension, a trailer and a header value that hold a whole request: one answer each."""
    inner = door_get("/v1/models").decode()
    one_line = inner.replace("\r\n", " ")
    for data in (door_post(json.dumps(chat_body(stream=False, messages=[{"role": "user", "content": inner}])).encode()),
                 door_get("/health", "X: " + one_line), door_chunked(b"%x;%b\r\n%b\r\n" % (len(DOOR_CHAT), one_line.encode(), DOOR_CHAT), END),
                 door_chunked(chunked(DOOR_CHAT), b"0\r\nX: " + one_line.encode() + b"\r\n\r\n"), door_get("/health?" + one_line.replace(" ", "%20")),
                 door_get("/health", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk"),
                 door_get("/health", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13")):
        assert door_statuses(proxy, data) == [200, 200], data[:200]


def test_attack_a_client_cannot_write_our_headers(proxy, zai):
    """No header of an answer repeats what a client could use to split it, or to pass for another request."""
    evil = "x\r\nX-Evil: 1\r\n\r\nHTTP/1.1 200 OK\r\n"
    zai.scripts.append([HEAD.replace(b"X-Log-Id: 2026", b"X-Log-Id: \x1b\xff<evil>\x85 2026")] + stream(*HEALTHY)[1:])
    replies = [door_exchange(proxy, data)[0]
               for data in (door_post(json.dumps(chat_body(stream=False, model=evil, store=True, user=evil, **{evil: 1})).encode()),
                            door_post(json.dumps(chat_body(stream=True, model=evil)).encode()),
                            door_post(json.dumps({"model": "x", "stream": False,
                                                  "messages": [{"role": "user", "content": "Hi", evil: 1, "\u6f22\ud800": 1}]}).encode()),
                            door_get("/v1/models/%0d%0aX-Evil:%201"), door_get("/v1/models", "x-request-id: mine", "Origin: https://x\xff\x1b",
                                "X-Evil: 1"), door_get("/", "Access-Control-Request-Headers: a\xff\x1b, X-Evil",
                                    "Access-Control-Request-Method: POST", method="OPTIONS"))]
    assert [reply.status for reply in replies] == [200, 200, 200, 404, 200, 204]
    for reply in replies:
        assert "X-Evil" not in reply.headers and re.fullmatch("req_[0-9a-f]+", reply.headers["x-request-id"])
        assert all(re.fullmatch("[ -~]*", value) for name, value in reply.headers.items()
                   if name != "Access-Control-Allow-Headers"), reply.headers.items()


def test_attack_two_clients_never_see_each_others_answers(zai):
    """Many connections at once, kept alive and pipelined, each with a text of its own: the echo must match."""
    zai.default = lambda request: stream(say(request["body"]["messages"][0]["content"]), FINISH, DONE)
    wrong = []

    def client(number):
        for i in range(5):
            texts = ["%d-%d-%d" % (number, i, j) for j in range(3)]
            data = b"".join(door_post(json.dumps(chat_body(stream=j == 1, messages=[{"role": "user", "content": text}])).encode())
                            for j, text in enumerate(texts))
            replies = door_exchange(proxy, data)
            wrong.extend(texts if len(replies) != 4 else [text for text, reply in zip(texts, replies) if text.encode() not in reply.body
                    or reply.body.count(b"-%d-" % i) != 1])
    with proxying(zai) as proxy:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and len(zai.requests) == 120


def test_attack_a_closing_socket_does_not_end_the_accept_loop():
    """Between two looks at its number another thread may close it."""
    class Closing:
        numbers = [0, 0, -1, -1, -1]

        def fileno(self):
            return self.numbers.pop(0)
    for first in range(3):
        Closing.numbers = [0] * first + [-1] * 5
        ztoapi.readable([Closing()])


def test_attack_a_header_flood_before_the_key_is_bounded(proxy):
    """A hundred headers of 60 kB are the most one connection can make us hold; then it is refused."""
    with proxy.connect(5) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            for i in range(200):
                sock.sendall(b"X%d: %b\r\n" % (i, b"y" * 60000))
        assert door_read(sock.makefile("rb")).status == 431


def test_attack_an_answer_that_is_a_request_error_is_not_stored(zai, door_log):
    """A thousand different wrong models and paths leave nothing behind that grows."""
    with proxying(zai) as proxy:
        data = b"".join(door_get("/v1/models/m%d" % i) + door_post(json.dumps(chat_body(stream=False, model="m%d" % i, n=2)).encode())
                        for i in range(200))
        assert door_statuses(proxy, data) == [404, 400] * 200 + [200]
        for i in range(30):
            assert proxy.chat(model="unknown-%d" % i)[0] == 200
        assert proxy.chat(model="m" * 1000000)[0] == 200
        assert len(json.dumps(proxy.call("GET", "/stats")[2])) < 100000, "a name is cut where it is kept"
        proxy.idle()
        metrics, gates = proxy.server.metrics, proxy.server.upstream.gates
        assert len(metrics.requests) <= 3 and len(metrics.recent) == 20 and not gates.gates and not gates.lines


def test_attack_a_date_and_a_length_are_always_there(proxy):
    """What a cache or a proxy in front would otherwise guess."""
    for path in ("/", "/health", "/v1/models", "/nope", "/metrics"):
        reply, _ = door_exchange(proxy, door_get(path))
        assert (email.utils.parsedate(reply.headers["Date"]) and int(reply.headers["Content-Length"]) == len(reply.body)
                and reply.headers["X-Content-Type-Options"] == "nosniff")
        assert "Python" not in reply.headers["Server"] and "Set-Cookie" not in reply.headers


# README ###############################################################################################################

def test_the_table_of_variables_in_readme_is_true():
    """Names, order and defaults as in the program's own docstring, and no variable that is not read."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        readme = re.findall(r"^\| `([A-Z_]+)` \| `?([^|`]*)`? \|", file.read(), re.MULTILINE)
    docstring = re.findall(r"^    ([A-Z_]+) {2,}(\S+) {2,}\S", ztoapi.__doc__, re.MULTILINE)
    assert len(docstring) > 15 and readme[:len(docstring)] == docstring
    assert {name.lower() for name, _ in docstring} == set(ztoapi.Settings.__dataclass_fields__)
    for name, default in docstring:
        if default not in ("none", "unset"):
            assert getattr(ztoapi.Settings.from_environ({name: default}), name.lower()) == getattr(ztoapi.Settings(), name.lower()), name


# Bench ################################################################################################################
#
# python3 test_ztoapi.py bench: what the proxy costs beside no proxy, both in the same run. The fake Z.ai, the proxy and the load are
# a process each. CPU is the proxy's own, the figure to trust on a busy machine; it and RSS are read from /proc, elsewhere left out.

BENCH_FLOOD, BENCH_PACED = (16, 500, 0), (200, 60, 50)  # streams, chunks each, milliseconds between chunks


async def bench_zai(reader, writer):
    """One connection of the fake: model "bench-CHUNKS-MS" asks for so many chunks so far apart; each says when it was sent."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head).group(1)))
            count, pause = map(int, re.search(rb"bench-(\d+)-(\d+)", body).groups())
            writer.write(HEAD)
            for done in range(0, count, 1 if pause else 20):
                writer.write(b"".join(chunked(say("%d " % time.monotonic_ns())) for _ in range(1 if pause else min(20, count - done))))
                await writer.drain()
                if pause:
                    await asyncio.sleep(pause / 1000)
            writer.write(chunked(FINISH) + chunked(DONE) + END)
    writer.close()


async def bench_requests(port, path, times, chunks, pause, streamed=True):
    """`times` requests over one connection: seconds to the first token, seconds of delay of each chunk."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    first, delays, request = [], [], raw_chat(chat_body(model="bench-%d-%d" % (chunks, pause), stream=streamed))
    for _ in range(times):
        began, text = time.monotonic(), b""
        writer.write(request.replace(b"/v1/", path))
        while b"[DONE]" not in text[-40:] and not (not streamed and text.endswith(b"}")):
            data = await reader.read(65536)
            now = time.monotonic_ns()
            assert data, text[-300:]
            delays += [(now - int(stamp)) / 1e9 for stamp in re.findall(rb'"content":"(\d+) ', data)] if pause else ()
            if not first or len(first) < _ + 1:
                first += [time.monotonic() - began] if b'"content":"' in data.replace(b'"content":""', b"") else ()
            text = text[-4096:] + data
        while streamed and not text.endswith(END):
            text = text[-64:] + await reader.read(65536)
    writer.close()
    return first, delays


def bench_scene(port, path, streams, times, chunks, pause, streamed=True):
    """(first tokens, delays, seconds it took) of `streams` connections at once."""
    async def run():
        return await asyncio.gather(*[bench_requests(port, path, times, chunks, pause, streamed) for _ in range(streams)])
    began = time.monotonic()
    results = asyncio.run(run())
    return [s for first, _ in results for s in first], [s for _, delays in results for s in delays], time.monotonic() - began


def bench_use(process):
    """(CPU seconds, peak resident MB) of a process so far."""
    try:
        with open("/proc/%d/stat" % process.pid) as stat, open("/proc/%d/status" % process.pid) as status:
            fields = stat.read().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(re.search(r"VmHWM:\s+(\d+)", status.read()).group(1)) / 1024
    except OSError:
        return float("nan"), float("nan")


def percentile(values, percent):
    return sorted(values)[int((len(values) - 1) * percent / 100)]


def bench(rounds=3):
    """Print the table; medians of so many rounds."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            ports.append(sock.getsockname()[1])
    environ = dict(os.environ, PORT=str(ports[1]), HOST="127.0.0.1", DEFAULT_KEY=KEY, ZAI_API_KEY=ZAI_KEY, ZAI_BASE_URL="http://127.0.0.1:%d/api/paas/v4" % ports[0])

    def until_it_listens(port, process):
        began = time.monotonic()
        while process.poll() is None and time.monotonic() < began + 20:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return time.monotonic() - began
            time.sleep(0.002)
        sys.exit("nobody listens on port %d" % port)
    zai = subprocess.Popen([sys.executable, __file__, "bench-zai", str(ports[0])])
    proxy = None
    try:
        until_it_listens(ports[0], zai)
        proxy = subprocess.Popen([sys.executable, ztoapi.__file__], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = until_it_listens(ports[1], proxy)
        rows, paths = collections.defaultdict(list), (b"/api/paas/v4/", b"/v1/")
        for _ in range(rounds):
            (direct, _, _), (ours, _, _) = (bench_scene(port, path, 1, 150, 3, 0) for port, path in zip(ports, paths))
            rows["time to first token, added: p50, ms"].append((statistics.median(ours) - statistics.median(direct)) * 1e3)
            rows["time to first token, added: p95, ms"].append((percentile(ours, 95) - percentile(direct, 95)) * 1e3)
            for name, (streams, chunks, pause) in (("flood", BENCH_FLOOD), ("paced", BENCH_PACED)):
                times = 1 if pause else 5
                (_, delays, direct_s), before = bench_scene(ports[0], paths[0], streams, times, chunks, pause), bench_use(proxy)
                (_, ours, seconds), after = bench_scene(ports[1], paths[1], streams, times, chunks, pause), bench_use(proxy)
                total = streams * times * chunks
                rows[name + ", %d streams: CPU us a chunk" % streams].append((after[0] - before[0]) / total * 1e6)
                if pause:
                    rows[name + ": p99 of added delay, ms"].append((percentile(ours, 99) - percentile(delays, 99)) * 1e3)
                    rows[name + ": peak RSS, MB"].append(after[1])
                else:
                    rows[name + ": chunks/s through the proxy"].append(total / seconds)
                    rows[name + ": chunks/s without it"].append(total / direct_s)
            before = bench_use(proxy)
            _, _, seconds = bench_scene(ports[1], paths[1], 8, 60, 3, 0, streamed=False)
            rows["JSON answers, 8 clients: requests/s"].append(480 / seconds)
            rows["JSON answers: CPU ms each"].append((bench_use(proxy)[0] - before[0]) / 480 * 1e3)
    finally:
        for process in filter(None, (proxy, zai)):
            process.terminate()
            process.wait(10)
    for name, values in rows.items():
        print("%-48s %10.2f" % (name, statistics.median(values)))
    print("%-48s %10.2f" % ("start to first connection, s", started))


def main(argv):
    if argv[:1] == ["bench-zai"]:
        async def run():
            server = await asyncio.start_server(bench_zai, "127.0.0.1", int(argv[1]))
            await server.serve_forever()
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        return asyncio.run(run())
    if argv[:1] == ["bench"]:
        return bench()
    if argv[:1] == ["soak"]:
        return soak(float(argv[1]) if argv[1:] else 120)
    return pytest.main([__file__, *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
