#!/usr/bin/env python3
"""soak.py [SECONDS]: every kind of fault at once, for two minutes unless told otherwise.

Four proxies in processes of their own, 32 clients, and fakes of Z.ai half of whose answers
are faulty. At the end it prints what became of the requests, and threads, descriptors and
memory before and after. The exit status is 1 if anything grew or went wrong, else 0.
Needs what the tests need (pytest).
"""

import collections
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import test_ztoapi as t

CLIENTS = 32
# So much of the time comes before the first figures.
WARM_UP = 0.4
SEED = 1
KEYS = (t.KEY, "sk-of-another-client", "sk-of-a-third-client")
ZAI_KEYS = ("0123456789abcdef.SecretSecret1", "1123456789abcdef.SecretSecret2")
ENVIRON = {
    "PORT": "0",
    "DEFAULT_KEY": ",".join(KEYS),
    "MODEL_FALLBACKS": "glm-5.3=glm-5.2,glm-5.2=glm-4.6",
    "VISION_MODEL": "glm-4.6v",
    "ZAI_API_KEY": ",".join(ZAI_KEYS),
    "UPSTREAM_TIMEOUT": "1",
    "HEARTBEAT": "0.3",
    "QUEUE_TIMEOUT": "5",
    "CLIENT_TIMEOUT": "2",
    # glibc would keep what has been freed, by chance much or little of it.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_MMAP_THRESHOLD_": "131072",
}

# Idle connections to Z.ai are closed after a second: what is open afterwards was leaked.
PROGRAM = "import os, sys, ztoapi; ztoapi.KEEP_IDLE_S = 1.0; sys.exit(ztoapi.main(os.environ))"


# The fake Z.ai

# The fake takes two requests at a time for this model.
LIMITED = "glm-4.5-flash"
# It refuses these for most of the time, for what another model may not have.
REFUSED = {"glm-5.3": ("1211", "1311", "1113", "1305"), "glm-5.2": ("1311", "1113")}

WHOLE = t.stream(*t.HEALTHY)
START = [t.HEAD, t.chunked(t.say("Hel"))]
HUGE_EVENT = t.chunked(t.say("x" * (17 << 20)))
LARGE_ANSWER = [t.HEAD, *[t.chunked(t.say("Q" * 65536))] * 48, t.chunked(t.FINISH), t.END]
BYTE_BY_BYTE = [bytes([byte]) for byte in b"".join(WHOLE)]
GZIP_HEAD = t.HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")


# To add a fault, add a row: the script of an answer.
FAULTS = [
    [3],
    [t.HEAD, 3],
    [t.RESET],
    [t.CLOSE],
    [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", t.CLOSE],
    [t.HEAD[:60], t.CLOSE],
    [t.HEAD, 0.02, t.RESET],
    [t.HEAD, t.CLOSE],
    [t.HEAD, b"zz\r\n", t.CLOSE],
    [GZIP_HEAD, t.chunked(b"\x1f\x8b" + b"x" * 500), t.END],
    t.stream(),
    t.stream(t.DONE),
    t.stream(b"data: oops\n\n", b"\x00\xff\xfe"),
    t.stream(t.error_event("1234"), t.DONE),
    t.stream(t.event(finish="network_error"), t.DONE),
    t.answer(200, b""),
    t.answer(502, b"<html><h1>502 Bad Gateway</h1></html>"),
    t.answer(503, b""),
    t.refusal(400, "1210"),
    t.refusal(400, "1301"),
    t.refusal(500, "1234"),
    START + [3],
    START + [0.02, t.RESET],
    START + [t.CLOSE],
    START + [t.END],
    START + [t.chunked(t.DONE), t.END],
    START + [t.chunked(t.say("lo")[:40]), 0.02, t.RESET],
    START + [b"ff\r\ndata: {", 0.02, t.RESET],
    START + [t.chunked(t.error_event("1234")), t.chunked(t.DONE), t.END],
    START + [t.chunked(t.event(finish="network_error")), t.chunked(t.DONE), t.END],
    START + [t.chunked(b"data: oops\n\n"), t.END],
]


# After these the proxy waits, or gives a key a rest: if they came often, little else would.
RARE_FAULTS = [
    t.refusal(429, "1113"),
    t.refusal(401, "401"),
    t.refusal(429, "1308"),
    t.refusal(429, "1305"),
    START + [t.chunked(t.error_event("1302")), t.END],
]


class SoakZai(t.FakeZai):
    """Half of its answers are good; the others have a fault."""

    def __init__(self, chance, tls=None):
        self.chance = chance
        self.huge = threading.Lock()
        self.limited = 0
        super().__init__(tls)
        self.default = self.any_script
        # First of all some of the largest, so that memory has been as high as it gets.
        self.scripts.extend([self.huge_script() for _ in range(6)])

    def any_script(self, request):
        if request["body"] is None or request["body"]["model"] == LIMITED:
            return self.limited_script()
        codes = REFUSED.get(request["body"]["model"])
        if codes and self.chance.random() < 0.8:
            return t.refusal(429, self.chance.choice(codes))
        dice = self.chance.random()
        if dice < 0.003:
            return self.huge_script()
        if dice < 0.02:
            return LARGE_ANSWER
        if dice < 0.04:
            return BYTE_BY_BYTE
        if dice < 0.05:
            return self.chance.choice(RARE_FAULTS)
        if dice < 0.5:
            return self.chance.choice(FAULTS)
        if dice < 0.8:
            return WHOLE
        pause_s = self.chance.random() * 0.5
        return t.stream(t.think("The"), pause_s, t.say("Hel"), 0.05, t.say("lo"), t.FINISH, t.DONE)

    def huge_script(self):
        """An event above any bound, one at a time: the fake's memory is not what is tried."""
        def acquire(*_):
            self.huge.acquire()

        def release(*_):
            self.huge.release()
        return [t.HEAD, acquire, HUGE_EVENT, release, t.chunked(t.FINISH), t.END]

    def limited_script(self):
        with self.lock:
            self.limited += 1
            over = self.limited > 2

        def end(*_):
            with self.lock:
                self.limited -= 1
        if over and self.chance.random() < 0.5:
            return [end, *t.refusal(429, "1302")]
        if over:
            return [end, *t.stream(t.error_event("1302"))]
        rest = [t.chunked(t.say("lo")), t.chunked(t.FINISH), t.chunked(t.DONE), t.END]
        return [*START, lambda *_: time.sleep(0.05), end, *rest]


# The proxies

class SoakProxy:
    """A proxy in a process of its own."""

    def __init__(self, name, **environ):
        self.name = name
        self.log = tempfile.TemporaryFile()
        clean = {name: value for name, value in os.environ.items() if not inherited(name)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=dict(clean, **ENVIRON, **environ), cwd=ROOT,
            stdout=subprocess.PIPE, stderr=self.log)
        line = self.process.stdout.readline()
        self.port = int(line.split(b"/v1")[0].rpartition(b":")[2])
        time.sleep(1)  # it starts its threads after it has said where it listens
        self.idle_threads = self.use()[0]

    def use(self):
        """(threads, descriptors, resident MB); zeros where the system does not tell."""
        directory = f"/proc/{self.process.pid}"
        try:
            with open(f"{directory}/status") as file:
                status = dict(line.split(":", 1) for line in file)
            descriptors = len(os.listdir(f"{directory}/fd"))
        except OSError:
            return 0, 0, 0.0
        return int(status["Threads"]), descriptors, int(status["VmRSS"].split()[0]) / 1024

    def settled(self):
        """use(), once all that ends by itself has ended."""
        time.sleep(2)  # longer than PROGRAM keeps idle connections
        t.eventually(lambda: self.use()[0] <= self.idle_threads, 10)
        return self.use()

    def stop(self):
        """(the exit status, True if the log tells of a bug)"""
        self.process.terminate()
        status = self.process.wait(40)
        self.process.stdout.close()
        self.log.seek(0)
        text = self.log.read().decode("utf-8", "replace")
        self.log.close()
        return status, "Traceback" in text or "this is a bug" in text


def inherited(name):
    """Variables that would lead the proxies another way."""
    return name.upper().endswith("_PROXY") or name == "SSL_CERT_FILE"


# The clients

RESPONSES_BODY = {"model": "glm-4.6", "input": "Hi"}
MESSAGES_BODY = {"model": "glm-4.6", "max_tokens": 99, "messages": [{"role": "user", "content": "Hi"}]}

# What a few requests hold, seldom many megabytes.
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
LONG_WORDS = ("Hi " * 1000, "Hi " * 100_000, "Hi \u4f60" * 1_000_000)


def fill(proxy):
    """Some of the largest bodies, so that memory has been as high as it gets."""
    data = t.raw_chat(t.chat_body(stream=True, messages=[t.user(LONG_WORDS[-1])]))
    for _ in range(4):
        with t.connect(proxy, data) as sock:
            t.read_stream(sock)


def messages(chance):
    """A user's message, with a picture or a long text now and then."""
    dice = chance.random()
    content = "Hi"
    if dice < 0.05:
        content = [PICTURE, {"type": "text", "text": "Hi"}]
    elif dice < 0.1:
        content = chance.choices(LONG_WORDS, (70, 25, 5))[0]
    return [{"role": "user", "content": content}]


# The other two APIs: a path, a request, and with what its streams end, well or badly.
OTHER_APIS = [
    ("/v1/responses", RESPONSES_BODY, (b"response.completed", b"response.failed")),
    ("/v1/messages", MESSAGES_BODY, (b"message_stop", b"event: error")),
]
WRONG = (OSError, ValueError, AssertionError, IndexError, AttributeError)


def run_client(proxies, chance, until, outcomes):
    """Requests of every kind, one after the other, until then."""
    while time.monotonic() < until:
        proxy = chance.choices(proxies, (75, 20, 3, 3))[0]
        try:
            outcome = request(proxy.port, chance)
        except WRONG as error:
            outcome = f"WRONG: {error!r}"
        outcomes.append(f"{proxy.name}: {outcome}")
        time.sleep(chance.random() * 0.05)


def request(port, chance):
    """What became of one request."""
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        dice = chance.random()
        streamed = chance.random() < 0.7
        if dice < 0.2:
            return other_api(sock, chance, streamed)
        model = chance.choices(("glm-4.6", LIMITED, "glm-5.3"), (80, 10, 10))[0]
        body = t.chat_body(stream=streamed, model=model, messages=messages(chance))
        data = t.raw_chat(body, auth=chance.choice(KEYS))
        if dice < 0.21:
            data = t.raw_chat({"model": "glm-4.6"})
        elif dice < 0.22:
            data = t.raw_chat(t.chat_body(), auth="wrong")
        elif dice > 0.97:
            sock.sendall(data[:int(len(data) * chance.random())])
            return "left before all was sent"
        sock.sendall(data)
        if dice > 0.8:
            return leave(sock, chance, reset=dice > 0.9)
        if dice > 0.75:
            time.sleep(chance.random() * 1.5)  # a slow reader
        return chat_outcome(streamed, *t.read_stream(sock))


def leave(sock, chance, reset):
    time.sleep(chance.random() ** 2)
    if reset:
        t.make_reset(sock)
    return "left"


def chat_outcome(streamed, status, headers, events, clean):
    error = next((event["error"] for event in events if "error" in event), None)
    if error:
        assert status != 500
        assert error["message"]
        assert isinstance(error["code"], str)
        kind = "in-stream error" if status == 200 else f"HTTP {status}"
        return f"{kind} {error['code']}"
    assert status == 200
    by = "" if headers["x-ztoapi-model"] in ("glm-4.6", LIMITED, "glm-5.3") else " of another model"
    if not streamed:
        assert set(events[0]["choices"][0]["message"]["content"]) <= set("HeloQ")
        return "JSON answer" + by
    assert clean
    assert events[-1] == "[DONE]"
    assert len(t.finish_of(events)) == 1
    assert t.said(events) == "Hello" or set(t.said(events)) == {"Q"}
    return "streamed answer" + by


def other_api(sock, chance, streamed):
    path, body, ends = chance.choice(OTHER_APIS)
    body = dict(body, stream=streamed, model=chance.choice(("glm-4.6", "glm-5.3")))
    data = json.dumps(body).encode()
    sock.sendall(t.raw_request("POST", path, body=data, auth=chance.choice(KEYS)))
    with sock.makefile("rb") as file:
        reply = t.read_reply(file)
    assert reply.status != 500
    if reply.status == 200 and streamed:
        assert any(end in reply.body for end in ends), reply.body[-300:]
        return f"{path}: streamed answer or error"
    reply.json()
    return f"{path}: HTTP {reply.status}"


# The soak

def soak_for(seconds, proxies, outcomes):
    """What each proxy uses after so many seconds of all clients."""
    until = time.monotonic() + seconds
    threads = []
    for number in range(CLIENTS):
        arguments = (proxies, random.Random(SEED + number), until, outcomes)
        threads.append(threading.Thread(target=run_client, args=arguments, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
    return [proxy.settled() for proxy in proxies]


def report(seconds, outcomes, names, before, after, ends):
    """Print all of it. The exit status."""
    print(f"{len(outcomes)} requests in {seconds:g} s, {CLIENTS} clients; what became of them:")
    for outcome, count in sorted(collections.Counter(outcomes).items()):
        print(f"{count:8}  {outcome}")
    print("threads, descriptors and resident MB before and after:")
    grew = []
    for name, old, new in zip(names, before, after):
        figures = ", ".join(f"{then:.0f} -> {now:.0f}" for then, now in zip(old, new))
        print(f"{name:>20}  {figures}")
        if new[0] > old[0] or new[1] > old[1] or new[2] > old[2] * 1.2 + 8:
            grew.append(name)
    wrong = sum("WRONG" in outcome for outcome in outcomes)
    bad_ends = [end for end in ends if end != (0, False)]
    print(f"grew: {grew or 'nothing'}; wrong: {wrong}; ended badly: {bad_ends or 'none'}")
    return 1 if grew or wrong or bad_ends else 0


def soak(seconds):
    chance = random.Random(SEED)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as closing:
        # Certificate, key and store at once.
        path = os.path.join(folder, "zai.pem")
        with open(path, "w") as file:
            file.write(t.PEM)
        zai = SoakZai(chance)
        tls_zai = SoakZai(chance, path)
        tunnel = t.HttpProxy()
        for part in (zai, tls_zai, tunnel):
            closing.callback(part.close)
        # Nobody listens there, nor can anybody else.
        closed = closing.enter_context(socket.socket())
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        tls = {"ZAI_BASE_URL": tls_zai.url}
        proxies = [
            SoakProxy("plain", ZAI_BASE_URL=zai.url),
            SoakProxy("TLS by CONNECT", HTTPS_PROXY=tunnel.url, SSL_CERT_FILE=path, **tls),
            SoakProxy("unknown certificate", **tls),
            SoakProxy("refused", ZAI_BASE_URL=nobody),
        ]
        # The first figures count once memory has been as high as it gets.
        for proxy in proxies:
            fill(proxy)
        before = soak_for(WARM_UP * seconds, proxies, outcomes)
        outcomes.clear()
        after = soak_for((1 - WARM_UP) * seconds, proxies, outcomes)
        ends = [proxy.stop() for proxy in proxies]
    return report((1 - WARM_UP) * seconds, outcomes, [proxy.name for proxy in proxies], before, after, ends)


if __name__ == "__main__":
    sys.exit(soak(float(sys.argv[1]) if sys.argv[1:] else 120))
