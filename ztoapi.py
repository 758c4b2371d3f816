#!/usr/bin/env python3
"""ZtoApi: the APIs of OpenAI and Anthropic for Z.ai's GLM models.

One file, on the standard library alone:

    ZAI_API_KEY=your-z.ai-key python3 ztoapi.py

Then point any OpenAI client at http://localhost:9090/v1, any Anthropic client at
http://localhost:9090, with the key sk-your-key.

    python3 ztoapi.py            serve
    python3 ztoapi.py --check    find out what is wrong before any client is involved
    python3 ztoapi.py --help     this text
    DEMO_MODE=true python3 ztoapi.py    no key, no network: answers come from a stand-in

All configuration comes from the environment. Durations are seconds; booleans are
true/false, 1/0, yes/no, on/off. A dash stands for a variable that is not set.

    PORT              9090                          port to listen on
    HOST              127.0.0.1                     address to listen on; beyond loopback only with
                                                    a DEFAULT_KEY of your own
    DEFAULT_KEY       sk-your-key                   the keys clients may send, comma-separated
    ZAI_API_KEY       -                             your Z.ai key; several, comma-separated
    ZAI_BASE_URL      https://api.z.ai/api/paas/v4  Z.ai's API, its Coding Plan's, or the mainland's
    DEFAULT_STREAM    true                          what a chat request without "stream" gets
    ENABLE_THINKING   -                             for requests that do not say; else the model
                                                    decides
    REASONING_FORMAT  parsed                        chat's thinking: reasoning_content (parsed),
                                                    <think> in the text (raw), or hidden
    MODEL_ALIASES     -                             gpt-4o=glm-4.6,o3=glm-5.2; * for all unknown ids
    VISION_MODEL      -                             answers where a picture is shown to a model
                                                    that sees none, as glm-5.3-flash could
    MODEL_FALLBACKS   -                             glm-5.3=glm-5.2,...: answers for a model that is
                                                    overloaded, out of quota, or does not exist
    MAX_CONCURRENCY   0                             requests in flight per key and model; 0: learned
    QUEUE_TIMEOUT     120                           longest wait for a free slot, then 429
    MAX_RETRIES       2                             further tries while nothing of the answer came
    HEARTBEAT         10                            a sign of life to a stream that waits; 0: none
    UPSTREAM_TIMEOUT  300                           longest silence of Z.ai
    CLIENT_TIMEOUT    60                            longest pause in sending a request or taking
                                                    an answer
    MAX_BODY_MB       64                            largest request body
    MAX_CONNECTIONS   1024                          clients connected at once
    CORS_ORIGIN       *                             web origins that may call, comma-separated;
                                                    empty: none, as always with the well-known key
    DEBUG_MODE        false                         detailed log lines, never texts or keys
    DEMO_MODE         false                         answer from a stand-in for Z.ai inside this file
"""  # noqa: W505

# The way of a request. The file has the pure parts of it first (errors, models, bytes,
# the requests to Z.ai, its answers, the fronts), then those that do I/O (gates, pump,
# upstream, metrics, handler, server), then the demo, the check and the page.
#
#           dict              Request               Z.ai dict
# client --> Handler --> front.read() --> to_zai_request() --> Upstream --> Z.ai
#               ^                                    (gate, pool, retry)
#   SSE bytes   |              steps          steps               | bytes
#   or JSON  <--+-- front.tell() <---- Pump <---- Answer.feed() <-+
#                   front.whole(fold)   (a JSON answer is the fold of a streamed one)

from __future__ import annotations

import base64
import bisect
import collections
import contextlib
import dataclasses
import datetime
import difflib
import email.utils
import functools
import hashlib
import hmac
import http
import http.server
import itertools
import json
import logging
import os
import random
import re
import select
import selectors
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
import urllib.parse
import urllib.request
from typing import NamedTuple

if sys.version_info < (3, 8):  # noqa: UP036
    sys.exit("ztoapi: Python 3.8 or later is needed; this is %d.%d" % sys.version_info[:2])
try:
    import ssl
except ImportError:
    class ssl:
        """Stands in where Python was built without: the demo needs none."""

        class SSLError(Exception):
            """Never raised."""

        SSLSocket = SSLCertVerificationError = SSLWantReadError = SSLWantWriteError = SSLError
        OPENSSL_VERSION = ""

__version__ = "1.0.0"

log = logging.getLogger("ztoapi")


# Settings #############################################################################
#
# One frozen dataclass, one field a variable: the field's name in capitals is the
# variable's. To add a setting, add a line, and one to the table above.

# These keys stand, or once stood, in the README, so that every port scanner knows them.
WELL_KNOWN_KEYS = ("sk-your-key", "a-long-secret-of-your-own")
REASONING_FORMATS = ("parsed", "raw", "hidden")
BOOLEANS = {
    "true": True, "1": True, "yes": True, "on": True,
    "false": False, "0": False, "no": False, "off": False,
}
# People copy what a table of defaults shows. These words are no key and no alias.
NO_VALUE = ("", "-", "none", "unset")


def escaped(text):
    """Somebody else's text as ASCII that can be printed."""
    return ascii(text)[1:-1]


class SettingsError(ValueError):
    """A variable cannot be used. One line: the variable, its value, what is allowed."""


def parse_word(words):
    """`words`: {word: its value}."""
    return lambda text: words[text.lower()]


def parse_number(number, low, high=10**6):
    def parse(text):
        # int() and float() alone would also take signs, underscores, "1e3" and "nan".
        if not re.fullmatch("[0-9.]{1,12}", text) or not low <= number(text) <= high:
            raise ValueError(text)
        return number(text)
    return parse


def parse_items(text):
    return tuple(item.strip() for item in text.split(",") if item.strip())


def parse_keys(text):
    keys = parse_items(text)
    for key in keys:
        # Keys travel in a header, which takes printable ASCII only.
        if key.lower() in NO_VALUE or not re.fullmatch("[!-~]+", key):
            raise ValueError(text)
    return keys


def parse_base_url(text):
    url = re.sub("/+chat/completions$", "", text.rstrip("/")).rstrip("/")
    # Reading the port and encoding the name raise ValueError where they are impossible.
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or "").encode("idna")
    # Z.ai's key is the only login there is. A password in the URL would be printed.
    if not re.fullmatch("https?://[!-~]+", url) or re.search("[?#@]", url):
        raise ValueError(text)
    if not host or parts.port == 0:
        raise ValueError(text)
    return url


def parse_aliases(text):
    pairs = {}
    for item in parse_items(text):
        alias, _, target = item.partition("=")
        pairs[alias.strip()] = target.strip()
    if "" in (*pairs, *pairs.values()):
        raise ValueError(text)
    return pairs


def is_loopback(host):
    """Whether `host` names this computer only."""
    address = re.fullmatch(r"127(\.\d{1,3}){3}", host)
    return address is not None or host.lower() in ("localhost", "::1")


def setting(default, parse, allowed, secret=False, unset=("",)):
    """A dataclass field that knows how its variable is read.

    `allowed` completes the sentence "allowed is ..."; a value among `unset` counts as
    none; the value of a `secret` shows neither in repr() nor in complaints.
    """
    facts = {"parse": parse, "allowed": allowed, "secret": secret, "unset": unset}
    # A factory, as a dataclass takes no dict for a default.
    return dataclasses.field(
        default_factory=lambda: default, repr=not secret, metadata=facts)


KEYS = "one or more keys of printable ASCII"
FLAG = "true/false, yes/no, on/off or 1/0"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment says. Durations in seconds."""

    port: int = setting(9090, parse_number(int, 0, 65535), "a port from 0 to 65535")
    host: str = setting("127.0.0.1", str, "an address of this machine")
    # An empty DEFAULT_KEY is a mistake, and must not quietly become the well-known key.
    default_key: tuple[str, ...] = setting(
        WELL_KNOWN_KEYS[:1], parse_keys, KEYS, secret=True, unset=())
    zai_api_key: tuple[str, ...] = setting(
        (), parse_keys, KEYS, secret=True, unset=NO_VALUE)
    zai_base_url: str = setting(
        "https://api.z.ai/api/paas/v4", parse_base_url,
        "an http or https URL without user, password or query")
    default_stream: bool = setting(True, parse_word(BOOLEANS), FLAG)
    # None: the model decides.
    enable_thinking: bool | None = setting(None, parse_word(BOOLEANS), FLAG, unset=NO_VALUE)
    reasoning_format: str = setting(
        "parsed", parse_word({word: word for word in REASONING_FORMATS}), "parsed, raw or hidden")
    model_aliases: dict[str, str] = setting(
        {}, parse_aliases, "pairs like gpt-4o=glm-4.6", unset=NO_VALUE)
    vision_model: str = setting("", str, "the name of a model that sees", unset=NO_VALUE)
    model_fallbacks: dict[str, str] = setting(
        {}, parse_aliases, "pairs like glm-5.3=glm-5.2", unset=NO_VALUE)
    max_concurrency: int = setting(0, parse_number(int, 0), "a whole number")
    queue_timeout: float = setting(120.0, parse_number(float, 0), "seconds")
    max_retries: int = setting(2, parse_number(int, 0, 100), "a whole number up to 100")
    # Browsers, proxies and SDKs give up from 30 s of silence on.
    heartbeat: float = setting(10.0, parse_number(float, 0), "seconds")
    # Models have been seen thinking for minutes without a word.
    upstream_timeout: float = setting(300.0, parse_number(float, 0.001), "seconds above 0")
    client_timeout: float = setting(60.0, parse_number(float, 0.001), "seconds above 0")
    # Some twelve of the largest images that Z.ai takes.
    max_body_mb: int = setting(64, parse_number(int, 1, 2048), "a whole number from 1 to 2048")
    max_connections: int = setting(
        1024, parse_number(int, 1, 100000), "a whole number from 1 to 100000")
    # An empty CORS_ORIGIN has a meaning: no web page may call.
    cors_origin: tuple[str, ...] = setting(
        ("*",), parse_items, "* or a list of origins", unset=())
    debug_mode: bool = setting(False, parse_word(BOOLEANS), FLAG)
    demo_mode: bool = setting(False, parse_word(BOOLEANS), FLAG)

    def __post_init__(self):
        if not self.default_key:
            raise SettingsError("DEFAULT_KEY=: allowed is " + KEYS)
        if self.well_known and not is_loopback(self.host):
            raise SettingsError(
                f"HOST={escaped(self.host)}: beyond this computer the well-known"
                " DEFAULT_KEY is not allowed; set a key of your own")

    @classmethod
    def from_environ(cls, environ):
        """The settings in a mapping like os.environ. May raise SettingsError."""
        values = {}
        for field in dataclasses.fields(cls):
            variable = field.name.upper()
            text = environ.get(variable, "").strip()
            facts = field.metadata
            if variable not in environ or text.lower() in facts["unset"]:
                continue
            try:
                values[field.name] = facts["parse"](text)
            except (ValueError, KeyError):
                # What holds an "@" may be a URL with a password.
                secret = facts["secret"] or "@" in text
                shown = "..." if secret else escaped(text)
                line = f"{variable}={shown}: allowed is {facts['allowed']}"
                raise SettingsError(line) from None
        return cls(**values)

    @property
    def well_known(self):
        """A key that works here and that each reader of the README knows, or ""."""
        return next((key for key in self.default_key if key in WELL_KNOWN_KEYS), "")

    @functools.cached_property
    def secrets(self):
        """The texts to redact: {their first eight characters: [what may follow]}, the
        longest first, as one may begin like another."""
        keys = [key for key in self.default_key if len(key) >= 8 and key not in WELL_KNOWN_KEYS]
        keys += self.zai_api_key
        # A Z.ai key is "id.secret", and Z.ai may quote either half alone.
        keys += [half for key in keys for half in key.split(".") if len(half) >= 8]
        # Error messages show values through ascii(), which may spell a key differently,
        # and so does JSON. Names of models are told in lower case, others by name_of().
        spellings = (escaped, str.lower, name_of, lambda key: quote(key)[1:-1])
        keys += [spelt(key) for key in keys for spelt in spellings]
        secrets = collections.defaultdict(list)
        for key in sorted(keys, key=len, reverse=True):
            secrets[key[:8]].append(key[8:])
        return secrets

    def redact(self, text):
        """`text` without any key, and without what a cut has left of one. Whatever is
        logged or quoted passes through here."""
        for start, rests in self.secrets.items():
            text, *pieces = text.split(start)
            for piece in pieces:
                found = max(len(os.path.commonprefix([piece, rest])) for rest in rests)
                text += "[redacted]" + piece[found:]
        return text


def mask(key):
    """A key as a log may show it: its last four characters, and none of a short one."""
    return "..." + key[-4:] if len(key) >= 12 else "..."


NOT_PRINTABLE = re.compile("[^!-~]")


def plain(text, longest=200):
    """Somebody else's text as one word of a log line or of a header."""
    return NOT_PRINTABLE.sub("?", text[:longest])


# Errors ###############################################################################
#
# A few classes, split by whose fault it is. Each error knows its HTTP status; the API
# in front writes it down. Z.ai tells in business codes what went wrong: its HTTP status
# says little (429 is also "no money"), and one code may stand for several things. So
# there is a table of codes, and behind it a table of words.

class ClientGone(Exception):
    """The client has left; there is nobody to answer."""


class ApiError(Exception):
    """An answer that is an error.

    `retry_after`: seconds until a further try makes sense, or None. `retryable`: False
    tells OpenAI's and Anthropic's SDKs not to try again by themselves. `allowed`: of a
    405, the methods that are.
    """

    status = 500
    type = "server_error"
    code = "internal_error"
    retry_after = None
    retryable = None
    allowed = ()

    def __init__(self, message, param=None, **facts):
        """`facts`: attributes such as the six above, where this error differs."""
        super().__init__(message)
        self.message = message
        self.param = param
        vars(self).update(facts)

    def headers(self):
        """What the response's head says beyond the status, as a dict."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, int(self.retry_after + 0.999)))
        if self.retryable is False:
            # Without this header the SDKs repeat every 429 and 5xx twice.
            headers["x-should-retry"] = "false"
        if self.allowed:
            headers["Allow"] = ", ".join(self.allowed)
        return headers


class RequestError(ApiError):
    """The client asked for something that cannot be. Nothing was sent to Z.ai."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"
    retryable = False


# The verdicts: what to do after a failure, while nothing of the answer has come.
GIVE_UP = "give up"          # it cannot heal
TRY_AGAIN = "try again"      # after a backoff, MAX_RETRIES times
TRY_ONCE = "try once"        # one more time only: Z.ai was silent for UPSTREAM_TIMEOUT
TOO_MANY = "too many"        # too many requests in flight: queue again, allow fewer
TOO_FAST = "too fast"        # queue again, allow as many as before
OVERLOAD = "overload"        # Z.ai is full, or there are too many of ours in flight
KEY_RESTS = "key rests"      # Z.ai refuses this key, or it is exhausted: next key
MODEL_RESTS = "model rests"  # this key does not serve this model (now): next key
QUEUE_AGAIN = (TOO_MANY, TOO_FAST, OVERLOAD)
NEXT_KEY = (KEY_RESTS, MODEL_RESTS)


class UpstreamError(ApiError):
    """Z.ai, or the road to it, failed.

    `verdict`: one of the eight above; `zai_code`: Z.ai's own code, "" without one;
    `pause_s`: what Z.ai itself asked to wait, 0 if nothing; `stage`: how far the way
    to Z.ai went (proxy, DNS, TCP or TLS), "" if Z.ai was reached.
    """

    status = 502
    type = "upstream_error"
    code = "upstream_error"

    zai_code = ""
    pause_s = 0.0
    stage = ""

    def __init__(self, message, verdict=TRY_AGAIN, **facts):
        super().__init__(message, verdict=verdict, **facts)


class ErrorRow(NamedTuple):
    """What an error of Z.ai becomes. `retry_after` (s) counts if Z.ai names no time."""
    status: int
    type: str
    code: str
    verdict: str
    advice: str = ""
    retry_after: float | None = None


# Agents repeat a 429 or a 502 for minutes before they show a word of it. So what cannot
# heal has a status of its own: 402 without money or plan, 403 for the proxy's own key.
QUOTA = ErrorRow(402, "insufficient_quota", "insufficient_quota", KEY_RESTS)
NO_MONEY = QUOTA._replace(verdict=MODEL_RESTS, advice=(
    "Recharge, or use a free model, such as GLM-4.7-Flash. Or perhaps this is a Coding Plan"
    " key on the pay-as-you-go ZAI_BASE_URL, or the reverse: --check tells."))
RATE = ErrorRow(
    429, "rate_limit_error", "rate_limit_exceeded", TOO_FAST,
    "Z.ai limits the requests in flight for each model.", 5)
OVERLOADED = ErrorRow(
    503, "server_error", "overloaded", OVERLOAD, "Another model may have room.", 10)
INVALID = ErrorRow(400, "invalid_request_error", "invalid_value", GIVE_UP)
TOO_LARGE = INVALID._replace(status=413)
# Clients that shorten a conversation by themselves look for the first words.
TOO_LONG = INVALID._replace(code="context_length_exceeded", advice=(
    "This model's maximum context length is exceeded (context_length_exceeded):"
    " shorten the conversation, or use a model with a longer one."))
NO_MODEL = ErrorRow(404, "invalid_request_error", "model_not_found", GIVE_UP)
FORBIDDEN = ErrorRow(403, "permission_error", "permission_denied", GIVE_UP)
NOT_IN_PLAN = FORBIDDEN._replace(
    type=QUOTA.type, verdict=MODEL_RESTS, advice="Your plan does not include this model.")
UNFAIR = FORBIDDEN._replace(advice=(
    "Z.ai objects to how this plan is used:"
    " the Coding Plan is for its supported tools only."))
OUR_KEY = ErrorRow(
    403, "upstream_error", "upstream_auth_error", KEY_RESTS,
    "Check ZAI_API_KEY: Z.ai refused the proxy's key, not yours.")
BROKEN = ErrorRow(502, "upstream_error", "upstream_error", TRY_AGAIN)
INTERNAL = ErrorRow(500, "server_error", "server_error", TRY_AGAIN)
WRONG_PATH = BROKEN._replace(
    verdict=GIVE_UP, advice="Check ZAI_BASE_URL: this does not look like Z.ai's API.")

ZAI_CODES = {
    "1113": NO_MONEY,
    "1304 1308 1309 1310 1314 1316 1317 1318 1319 1320 1321": QUOTA,
    "1302": RATE._replace(verdict=TOO_MANY),
    "1303": RATE,
    "1305 1312": OVERLOADED,
    "1120": OVERLOADED._replace(verdict=TRY_AGAIN, advice=""),
    "1210 1212 1213 1214 1215 1231": INVALID,
    "1211 1221 1222": NO_MODEL,
    "1261": TOO_LONG,
    "1301": INVALID._replace(code="content_filter"),
    "1100 1220 1300": FORBIDDEN,
    "1311": NOT_IN_PLAN,
    "1313": UNFAIR,
    "401 1000 1001 1002 1003 1004 1005 1110 1111 1112 1121 1315": OUR_KEY,
    "404": WRONG_PATH,
    "500 1200 1230 1234": BROKEN,
    "-1": INTERNAL,
}
ZAI_ERRORS = {code: row for codes, row in ZAI_CODES.items() for code in codes.split()}
# A limit that ends while a request may wait for it.
SHORT_LIMIT = RATE._replace(verdict=KEY_RESTS, advice="")
# Codes that Z.ai has not told us of go by the HTTP status. Of those that are not here,
# 4xx mean WRONG_PATH and 5xx BROKEN.
HTTP_ERRORS = {
    200: BROKEN,
    400: INVALID,
    401: OUR_KEY,
    402: QUOTA,
    403: FORBIDDEN,
    408: BROKEN,
    413: TOO_LARGE,
    422: INVALID,
    429: RATE,
    434: FORBIDDEN,
    435: TOO_LARGE,
}
# Answers with neither a code nor words were written by a CDN or a proxy on the road.
# With these statuses they mean the same as Z.ai's.
BARE_STATUSES = (200, 401, 408, 413, 429)


# Z.ai's words #########################################################################
#
# The appendix to the codes. One code of Z.ai's stands for several things, and what a
# gateway on its road says has no code of Z.ai's at all: then the words decide. Only
# words that were really seen are here, each with its source.

# They stay texts, as `re` compiles a pattern when it is first used. The first one here
# was seen under 1210 (anomalyco/opencode#27629), those in Chinese are in the list of
# NousResearch/hermes-agent, the third is said of GLM elsewhere.
LONG_WORDS = (
    "more than max tokens allowed|exceeds max length|context (length|window)"
    "|上下文长度|超过最大长度")
# Under 1214 as well as 1211 (Z.ai); and from gateways.
MODEL_WORDS = (
    "model ?code.{0,3}(不存在|does not exist)|unknown model|模型不存在|model_not_found")
# With status 200 or 500, for a path that is not there (Z.ai).
PATH_WORDS = "404 not.found"
# Those of 1113, 1308 and 1310, without the code (continuedev/continue#10297).
LIMIT_WORDS = "usage limit|limit exhausted|insufficient.(balance|quota)|余额不足|使用上限"
# Those of 1305, without the code (Z.ai's Messages API).
BUSY_WORDS = "overloaded|访问量过大"
# What one of these rows becomes, as the third column says, if code and message hold
# these words.
ZAI_WORDS = (
    ((INVALID, BROKEN), LONG_WORDS, TOO_LONG),
    ((INVALID, WRONG_PATH), MODEL_WORDS, NO_MODEL),
    ((BROKEN,), PATH_WORDS, WRONG_PATH),
    ((RATE, BROKEN), LIMIT_WORDS, QUOTA),
    ((RATE, BROKEN), BUSY_WORDS, OVERLOADED),
)


def as_dict(value):
    """`value` if it is a dict, else an empty one: an object without any field."""
    return value if isinstance(value, dict) else {}


def without_nulls(value):
    return {name: inner for name, inner in value.items() if inner is not None}


# Z.ai's Messages API, and gateways, put the code into the text: "[1302][text][id]",
# '... {"code":"1302"'.
CODE_IN_TEXT = re.compile(
    r"(?:^|\s)\[(-?\d{1,5})\]|\bcode\W{1,6}(\d{4})\b", re.IGNORECASE)


def parse_code(value):
    if isinstance(value, str):
        return plain(value.strip(), 40)
    # A number of any size may come; str() takes quadratic time for large ones.
    if value and isinstance(value, (int, float)) and abs(value) < 10**9:
        return str(int(value))
    return ""


def parse_zai_error(value):
    """(code, message) of any error shape of Z.ai, both texts, "" for what is not there.

    {"error": {"code", "message"}}; {"code", "msg", "success"}; and, from paths that are
    not there, {"status", "error": "Not Found", "path"}. What gateways wrap around these
    counts less than what is inside.
    """
    code = message = ""
    # From the outside in: what comes later replaces what came before.
    for _ in range(5):
        if value and isinstance(value, list):
            value = value[0]
        if isinstance(value, str):
            value = {"message": value}
        shell = as_dict(value)
        code = parse_code(shell.get("code")) or parse_code(shell.get("status")) or code
        for text in (shell.get("msg"), shell.get("message")):
            if isinstance(text, str):
                message = text[:2000] or message
        value = shell.get("error") or shell.get("errors") or shell.get("detail")
    found = CODE_IN_TEXT.search(message)
    if found and code not in ZAI_ERRORS:
        code = found[1] or found[2]
    return code, message


def seconds_to_wait(text):
    """The seconds that a Retry-After header asks for; None without one, and for a date.
    Z.ai itself sends none, and the gateways on its road send seconds."""
    return float(text) if re.fullmatch("[0-9]{1,6}", text) else None


# "Your limit will reset at 2026-09-09 05:38:28", and the same in Chinese. That is
# Beijing's time. One with a zone is not Z.ai's, and a wrong time is worse than none.
RESET = (r"(?:reset at |将在 ?)(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)"
         r"(?!\.\d| ?[A-Z(+-])")


def seconds_until_reset(message, now):
    """Seconds from `now` (Unix) to the time at which a limit ends, at least 1. None
    without one."""
    found = re.search(RESET, message, re.IGNORECASE)
    if not found:
        return None
    try:
        reset = datetime.datetime.strptime(found[1] + "+0800", "%Y-%m-%d %H:%M:%S%z")
    except ValueError:
        return None
    wait_s = reset.timestamp() - now
    # One that is long over is the time of something else, and no limit lasts a year.
    return max(1.0, wait_s) if -3600 <= wait_s < 366 * 86400 else None


def duration(seconds):
    """Seconds in words: "45 s", "60 min", "5 h", "3 days"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{round(seconds / size)} {unit}"
    return f"{round(seconds)} s"


def error_row(code, message, status):
    """The ErrorRow of an error: by its code, else by its status; then by its words."""
    row = BROKEN if status >= 500 else WRONG_PATH
    if code or message or status in BARE_STATUSES:
        row = ZAI_ERRORS.get(code) or HTTP_ERRORS.get(status, row)
    for vague, words, precise in ZAI_WORDS:
        if row in vague and re.search(words, f"{code} {message}", re.IGNORECASE):
            return precise
    return row


def zai_error(
    value, status=200, *, now=0.0, model="", max_tokens=None, patience_s=0.0,
    retry_after=None,
):
    """The UpstreamError for an error of Z.ai.

    `value`: the parsed body, None if it was no JSON; `status`: its HTTP status; `now`:
    Unix seconds; `model`, `max_tokens`: what was asked for, for advice; `patience_s`:
    the longest limit worth waiting for, for an SDK too; `retry_after`: seconds, from
    Z.ai's own header.
    Never raises, whatever `value` holds.
    """
    code, message = parse_zai_error(value)
    row = error_row(code, message, status)
    words = "Z.ai: " + (message or f"HTTP status {status} without a reason")
    reset_s = seconds_until_reset(message, now)
    if reset_s:
        words += f" (in {duration(reset_s)})"
    words += f" (code {code}). " if code else ". "
    words += model_advice(model) if row is NO_MODEL else row.advice
    if row is TOO_LONG and max_tokens is not None:
        words += (" Prompt and max_tokens must fit together:"
                  f" a lower max_tokens may do, it was {max_tokens}.")
    # "Now" says nothing about a limit.
    pause_s = reset_s or retry_after or 0.0
    if row is QUOTA and 0 < pause_s <= patience_s:
        row = SHORT_LIMIT
    hopeless = row.verdict in (GIVE_UP, *NEXT_KEY) and row is not SHORT_LIMIT
    return UpstreamError(
        words.rstrip(), row.verdict,
        status=row.status, type=row.type, code=row.code,
        zai_code=code, pause_s=pause_s,
        retry_after=pause_s or row.retry_after,
        retryable=False if hopeless or pause_s > patience_s else None)


GET_KEY = "Get a key (free models need one too) at https://z.ai/manage-apikey/apikey-list."
NO_KEY = "ZAI_API_KEY is not set where the proxy runs. " + GET_KEY


def not_the_api():
    """The error of a page with status 200 where the API should be."""
    return UpstreamError(
        "What answered is not JSON. " + WRONG_PATH.advice, GIVE_UP, retryable=False)


def missing_key():
    """The error of a proxy that was started without ZAI_API_KEY."""
    return UpstreamError(
        NO_KEY, GIVE_UP, status=OUR_KEY.status, code=OUR_KEY.code, retryable=False)


# Models ###############################################################################
#
# Z.ai's catalogue as measured in October 2026. Ids that are not here go through all the
# same: Z.ai may know a model before this file does. To add a model, add a row.

# How a model's thinking is controlled.
NO_THINKING = "no"   # it does not think, or nobody can tell it to
SWITCH = "switch"    # on or off
GRADED = "graded"    # on or off, and how much
ALWAYS = "always"    # how much


class Model(NamedTuple):
    """One row. None stands for what nobody has published or measured."""
    name: str            # the brand's spelling, which clients see
    created: int         # Unix seconds, from Z.ai's list, else day of release or sighting
    context: int | None  # tokens of prompt and answer together
    max_tokens: int      # Z.ai refuses a request for more
    sees: bool           # takes images
    thinking: str
    tool_stream: bool    # streams a call's arguments, which other models send at once
    free: bool

    @property
    def id(self):
        return self.name.lower()


def parse_model(row):
    """A Model from a row of the table below."""
    name, created, context, max_tokens, thinking, abilities = row.split()
    sees, tool_stream, free = (word in abilities for word in ("sees", "tool_stream", "free"))
    numbers = int(created), int(context) or None, int(max_tokens)
    return Model(name, *numbers, sees, thinking, tool_stream, free)


# For the 4.5 series 96K tokens of answer are documented; one measurement says 131072.
MODELS = {model.id: model for model in map(parse_model, """\
GLM-5.3                   1786924800  1048576  131072  always  tool_stream
GLM-5.3-Flash             1786924800  1048576  131072  always  sees+tool_stream
GLM-5.3-FlashX            1786924800  1048576  131072  always  sees+tool_stream
GLM-5.2                   1781625600  1048576  131072  graded  tool_stream
GLM-5.1                   1774620000   204800  131072  switch  tool_stream
GLM-5-Turbo               1773504000   204800  131072  switch  tool_stream
GLM-5V-Turbo              1775001600   204800  131072  switch  sees
GLM-5                     1770739200   204800  131072  switch  tool_stream
GLM-4.7                   1766332800   204800  131072  switch  tool_stream
GLM-4.7-Flash             1768780800   204800  131072  switch  tool_stream+free
GLM-4.7-FlashX            1768780800   204800  131072  switch  tool_stream
GLM-4.6                   1759276800   204800  131072  switch  tool_stream
GLM-4.6V                  1765152000   131072   32768  switch  sees
GLM-4.6V-Flash            1765152000   131072   32768  switch  sees+free
GLM-4.6V-FlashX           1765152000   131072   32768  switch  sees
GLM-4.5                   1753632000   131072   98304  switch  -
GLM-4.5-X                 1753632000   131072   98304  switch  -
GLM-4.5-Air               1753632000   131072   98304  switch  -
GLM-4.5-AirX              1753632000   131072   98304  switch  -
GLM-4.5-Flash             1753632000   131072   98304  switch  free
GLM-4.5V                  1754870400    65536   16384  switch  sees
GLM-4.1V-Thinking-Flash   1751414400    65536   16384  no      sees+free
GLM-4.1V-Thinking-FlashX  1751414400    65536   16384  no      sees
GLM-4-Flash-250414        1744588800   131072   16384  no      free
GLM-4-FlashX-250414       1744588800   131072   16384  no      -
GLM-4-32B-0414-128K       1744588800   131072   16384  no      -
GLM-4V-Flash              1733702400        0    1024  no      sees+free
GLM-4-Long                1722384000  1000000    4095  no      -
AutoGLM-Phone-Multilingual 1765238400       0    4096  no      sees
""".splitlines())}
# Advice names current models only. Those without control of thinking are the oldest.
SEEING = ", ".join(
    model.name for model in MODELS.values() if model.sees and model.thinking != NO_THINKING)


def find_model(id):
    """The row of Z.ai's id, or None. A "-highspeed" model is the same one, faster."""
    return MODELS.get(re.sub("-highspeed$", "", id))


def canonical_id(name):
    """Z.ai's spelling of an id: lower case, without what clients hang on to it."""
    # Claude Code appends "[1m]" to ask for the long context.
    id = re.sub(r"\[[^\]]*\]?", "", name).strip().lower()
    # OpenRouter, litellm and aider write the provider in front: "z-ai/glm-4.6".
    tail = id.rpartition("/")[2]
    return tail if find_model(tail) else id


# Z.ai's own Messages entrance maps Claude's models, too: those with a word in their
# names, and all others.
CLAUDE = re.compile("(^|/)claude-")
CLAUDE_MODELS = {"haiku": "glm-4.5-air", "": "glm-5.3"}


def zai_model_id(name, model_aliases, claude=False):
    """Z.ai's id for the model that a client names.

    `model_aliases` come first, then the alias "*" for ids that the table does not know.
    With `claude` the names of Claude's models stand for some of Z.ai's.
    """
    aliases = {canonical_id(alias): target for alias, target in model_aliases.items()}
    id = canonical_id(name)
    target = aliases.get(id)
    if target is None and find_model(id) is None:
        target = aliases.get("*")
    if target is None and claude and CLAUDE.search(id):
        target = next(model for word, model in CLAUDE_MODELS.items() if word in id)
    return id if target is None else canonical_id(target)


def fallbacks_of(id, settings):
    """Z.ai's ids of the models that may answer instead of this one, each once, in the
    order in which MODEL_FALLBACKS leads to them."""
    aliases = settings.model_aliases
    pairs = {
        zai_model_id(name, aliases): zai_model_id(other, aliases)
        for name, other in settings.model_fallbacks.items()}
    chain = [id]
    while pairs.get(chain[-1], id) not in chain:
        chain.append(pairs[chain[-1]])
    return chain[1:]


FOREIGN_MODEL = re.compile(
    r"(^|[/.:])(gpt|chatgpt|o\d|codex|claude|gemini|gemma|deepseek|qwen|llama|mi[sx]tral|kimi|grok"
    r"|text-|phi|command|minimax|doubao|ernie|hunyuan)")


def model_advice(id):
    """Advice for a client that asked for a model which Z.ai does not have."""
    close = difflib.get_close_matches(id[:100], MODELS, 3, 0.5)
    names = ", ".join(MODELS[id].name for id in close)
    advice = "GET /v1/models lists the known ones"
    if names:
        advice = f"Known models near it: {names}"
    if FOREIGN_MODEL.search(id):
        advice += f", or set MODEL_ALIASES={plain(id)}=glm-4.6"
    return advice + "."


# OpenAI's SDKs require `created`, so it is 0 where nothing is known.
UNKNOWN_MODEL = Model("", 0, None, None, None, NO_THINKING, False, False)


MODALITIES = {True: ["text", "image"], False: ["text"]}


def model_entry(name, model):
    """An entry for clients of OpenAI, Anthropic, vLLM; without what is unknown."""
    date = datetime.datetime.fromtimestamp(model.created, datetime.timezone.utc)
    entry = {
        "id": name, "object": "model", "created": model.created, "owned_by": "z.ai",
        "type": "model", "display_name": name, "created_at": f"{date:%Y-%m-%dT%H:%M:%SZ}",
        "context_length": model.context, "max_model_len": model.context,
        "max_output_tokens": model.max_tokens,
        "input_modalities": MODALITIES.get(model.sees), "free": model.free or None,
    }
    return without_nulls(entry)


def listed_models(settings):
    """What GET /v1/models lists, name -> entry: the table, then the aliases but "*"."""
    listed = {model.name: model for model in MODELS.values()}
    for alias, target in settings.model_aliases.items():
        listed.setdefault(alias, find_model(canonical_id(target)) or UNKNOWN_MODEL)
    listed.pop("*", None)
    return {name: model_entry(name, model) for name, model in listed.items()}


# Bytes ################################################################################
#
# JSON, and push parsers for HTTP and for server-sent events: feed() takes what has
# arrived and gives what is complete. Each has a bound on what it holds and takes linear
# time.

# While JSON's scanner or encoder in C is at work, Python lets no other thread run, and
# each value takes it up to a microsecond. In a text, values are counted by the mark
# before them: a bracket or a comma.
LIGHT_BYTES = 1 << 17
LIGHT_MARKS = 20_000
LARGE_BYTES = 1 << 20
# To make a text is one step as well.
LONGEST_TEXT = 24 * LARGE_BYTES
# A request of a million tokens has fewer. Each may stand for a Python object.
MOST_MARKS = 1_000_000
INFINITY = float("inf")

# An encoder made once costs half of what json.dumps does, which makes one a call.
encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
encode_text = encoder.encode
# One string alone, as JSON.
quote = json.encoder.encode_basestring


def is_small(value):
    """Whether the JSON of a value may be made in one step. RequestError if a text in it
    is longer than LONGEST_TEXT, as several that were joined may be."""
    values = [value]
    size = 0
    # They become more while they are gone through.
    for inner in values:
        if isinstance(inner, str):
            size += len(inner)
            if len(inner) > LONGEST_TEXT:
                raise RequestError(
                    "A text is longer than 24 MiB.", status=413, code="request_too_large")
        elif isinstance(inner, dict):
            values += [*inner, *inner.values()]
        elif isinstance(inner, list):
            values += inner
    return size <= 8 * LARGE_BYTES and len(values) <= MOST_MARKS // 10


def encode_json(value):
    """UTF-8 bytes. A lone surrogate, which UTF-8 cannot spell, becomes "?"."""
    # The encoder in Python is several times as slow, and other threads get their turn.
    text = encode_text(value) if is_small(value) else "".join(encoder.iterencode(value))
    return text.encode("utf-8", "replace")


def no_number(text):
    raise ValueError(f"{text:.20} is no JSON number")


def whole_number(text):
    # int() takes quadratic time before Python 3.11, and refuses 4,300 digits since.
    if len(text) > 100:
        no_number(text)
    return int(text)


def finite_or_null(text):
    """Python reads 1e999 as infinity, which JSON cannot spell."""
    value = float(text)
    return None if abs(value) == INFINITY else value


def count_marks(text):
    return sum(map(text.count, "[{," if isinstance(text, str) else b"[{,"))


def is_light(text):
    """Whether a JSON text, or its bytes, may be read in one step."""
    if len(text) <= LIGHT_BYTES:
        return True
    return len(text) <= LARGE_BYTES and count_marks(text) <= LIGHT_MARKS


# To make a dict, or a text, is one step of Python's, so these have bounds of their own.
def small_object(pairs):
    if len(pairs) > 100_000:
        raise ValueError("an object has more than 100,000 keys")
    return dict(pairs)


def small_text(text, start, strict):
    value, end = json.decoder.scanstring(text, start, strict)
    if len(value) > LONGEST_TEXT:
        raise ValueError("a text is longer than 24 MiB")
    return value, end


class Decoder(json.JSONDecoder):
    """JSON's decoder, which takes the scanner in C for light texts, and for others that
    in Python: it is ten times as slow, and other threads get their turn in it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scan_fast = self.scan_once
        self.parse_string = small_text
        self.object_pairs_hook = small_object
        self.scan_patiently = json.scanner.py_make_scanner(self)
        self.scan_once = self.scan

    def scan(self, text, at):
        """(value, where it ends), or StopIteration where there is no value."""
        if is_light(text):
            return self.scan_fast(text, at)
        if count_marks(text) > MOST_MARKS or text.count("\\") > 8 * MOST_MARKS:
            raise ValueError("it has too many brackets, commas or escapes")
        return self.scan_patiently(text, at)


# For clients, whose mistakes they are told.
decode_strictly = Decoder(
    parse_constant=no_number, parse_int=whole_number, parse_float=finite_or_null).decode
# For Z.ai: NaN and infinity are read as null, and texts may hold what JSON escapes.
# Whole numbers are left to int(), which refuses those of more than 4,300 digits; a
# function of ours would be called three times an event.
lenient = Decoder(
    parse_constant=lambda name: None, parse_float=finite_or_null, strict=False)
# In C, as events are bounded: (value, where it ends), or StopIteration where there is
# no value.
scan_json = lenient.scan_fast
# The same of a string, from behind its first quote.
scan_string = json.decoder.scanstring


# What the decoders raise.
NO_JSON = (ValueError, RecursionError, StopIteration)


def decode_or_none(text, decode=lenient.decode):
    """The value of a JSON text; None if the text is not JSON."""
    try:
        return decode(text)
    except NO_JSON:
        return None


def decode_first(text):
    """The value of the JSON that a text begins with; None if it begins with none."""
    return decode_or_none(text, lambda text: scan_json(text, 0)[0])


class JsonProgress:
    """Follows an object or an array that comes in pieces: feed(text) -> what of the
    text belongs to it. `ended`: it is whole, and `rest` is what stands behind it.

    Control characters in strings, which clients do not take, are escaped.
    """

    # A backslash and what it escapes count as one mark.
    MARK = re.compile(r'\\.|["{}\[\]\0-\x1f]', re.DOTALL)

    depth = 0
    in_string = False
    held = ""  # a backslash at the end, whose character is still to come
    ended = False
    rest = ""

    def feed(self, text):
        return "".join([piece for piece, _ in self.pieces(text)])

    def pieces(self, text):
        """(piece, whether it is a string's) of what feed() gives; inner strings do not
        count."""
        if self.ended:
            self.rest = text
            return
        text = self.held + text
        self.held = ""
        at = end = 0
        for found in self.MARK.finditer(text):
            # What the last string said may have been all.
            if self.ended:
                break
            mark = found.group()
            start, end = found.span()
            if mark[-1] < " ":
                if self.in_string:
                    yield text[at:start] + quote(mark[-1])[1:-1], self.depth < 2
                    at = end
            elif mark == '"':
                self.in_string = not self.in_string
                if self.depth < 2:
                    cut = start if self.in_string else end
                    yield text[at:cut], not self.in_string
                    at = cut
            elif self.in_string or len(mark) > 1:
                continue
            elif mark in "{[":
                self.depth += 1
            else:
                self.depth -= 1
                self.ended = self.depth <= 0
                if self.ended:
                    break
        if self.ended:
            self.rest = text[end:]
            text = text[:end]
        elif end < len(text) and text.endswith("\\"):
            self.held = "\\"
        yield text[at:len(text) - len(self.held)], self.in_string and self.depth < 2


def new_id(prefix, rand=random.getrandbits):
    """An id as OpenAI's look. It is no secret, so that cheap randomness will do."""
    return f"{prefix}{rand(96):024x}"


new_call_id = functools.partial(new_id, "call_")


# Heads of HTTP, as text in latin-1 with the line ends they came with. There is no
# folding and no CR but the line's own. A method has at most 20 letters, because it is
# logged and quoted before any key is checked.
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# Old clients send a blank line behind a body, which is before the next request.
REQUEST_LINE = re.compile(
    rf"(?:\r\n)?(?=[^ ]{{1,20}} )({TOKEN}) ([!-~\x80-\xff]+) (HTTP/[1-9]\.[0-9])\r?\n")
# A proxy's absolute form of the target has the host in it.
TARGET = re.compile("(?:https?://[^/?#]*)?([^?#]*)", re.IGNORECASE)
STATUS_LINE = re.compile(r"(HTTP/1\.[0-9]) ([1-9][0-9][0-9])(?: [^\r\n]*)?\r?\n")
FIELD_LINE = re.compile(rf"^({TOKEN}):([^\0\r\n]*)\r?\n", re.MULTILINE)
# No body has a length of more digits.
LENGTH = re.compile("[0-9]{1,15}")
HEAD_END = re.compile(rb"\r?\n\r?\n")
LONGEST_HEAD_BYTES = 65536
# http.client allows as many.
MOST_FIELDS = 100

# Two readers that take different ones of a repeated field disagree on where a request
# ends, which lets an attacker hide a second request in a first one (smuggling).
NEVER_TWICE = ("host", "content-length", "transfer-encoding")


class HeadReader:
    """Collects the head of a request or of a response.

    feed(data) -> the head as text once its blank line has come, else None; then `rest`
    is what came behind it. OverflowError beyond LONGEST_HEAD_BYTES.
    """

    rest = b""

    def __init__(self):
        self.data = bytearray()

    def feed(self, data):
        # The blank line may have begun in what came before, with all but its last byte.
        searched = max(0, len(self.data) - 3)
        self.data += data
        end = HEAD_END.search(self.data, searched)
        if end:
            self.rest = bytes(self.data[end.end():])
            return self.data[:end.end()].decode("latin-1")
        if len(self.data) > LONGEST_HEAD_BYTES:
            raise OverflowError("the head is too large")
        return None


def join_fields(pairs):
    """{name in lower case: value}; of a repeated name the values are joined (RFC 9110,
    5.3)."""
    fields = {}
    for name, value in pairs:
        name = name.lower()
        value = value.strip(" \t")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


class RequestHead(HeadReader):
    """Reads the head of a request, to the letter: feed(data) -> whether it is whole.

    What two readers might take differently is a RequestError, as a proxy in front might
    take it for something else. What was read before the fault is there for the log.
    """

    method = "-"
    # Decoded, without the query, and with one slash where there were several.
    path = "-"
    # The client may send another request behind this one.
    keeps_alive = False
    # The version is not known before it is read, and 1.0 is the safe one.
    is_1_0 = True

    def __init__(self):
        super().__init__()
        self.fields = {}
        # What reads the body.
        self.framing = Unframed()

    def feed(self, data):
        # So begins TLS.
        if not self.data and data.startswith(b"\x16"):
            raise RequestError("This port speaks HTTP, not HTTPS.")
        try:
            head = super().feed(data)
            if head is not None:
                self._parse(head)
        except OverflowError:
            raise RequestError("The request's head is too large.", status=431,
                               code="request_header_fields_too_large") from None
        return head is not None

    def _parse(self, head):
        line = REQUEST_LINE.match(head)
        if not line:
            raise RequestError("Malformed request line.")
        self.method, target, version = line.groups()
        path = urllib.parse.unquote(TARGET.match(target).group(1), errors="replace")
        self.path = "/" + re.sub("/+", "/", path).strip("/")
        if not version.startswith("HTTP/1."):
            raise RequestError("The only HTTP versions spoken here are 1.0 and 1.1.",
                               status=505, code="http_version_not_supported")
        self.is_1_0 = version == "HTTP/1.0"
        self._parse_fields(head[line.end():])
        self.framing = self._find_framing()
        options = self.fields.get("connection", "").lower()
        self.keeps_alive = not self.is_1_0 and "close" not in options

    def _parse_fields(self, lines):
        """Each line but the blank one at the end must be a field."""
        count = lines.count("\n") - 1
        if count > MOST_FIELDS:
            raise OverflowError
        pairs = FIELD_LINE.findall(lines)
        if len(pairs) < count:
            raise RequestError("Malformed header line.")
        names = [name.lower() for name, _ in pairs]
        if any(names.count(name) > 1 for name in NEVER_TWICE):
            raise RequestError("More than one Host, Content-Length or Transfer-Encoding header.")
        self.fields.update(join_fields(pairs))
        if "host" not in self.fields and not self.is_1_0:
            raise RequestError("A Host header is needed.")

    def _find_framing(self):
        length = self.fields.get("content-length", "0")
        coding = self.fields.get("transfer-encoding")
        if coding is not None:
            if "content-length" in self.fields or self.is_1_0:
                raise RequestError("Ambiguous length of the body.")
            if coding.lower() != "chunked":
                raise RequestError(
                    "The only Transfer-Encoding understood is chunked.", status=501)
            return Dechunker()
        if not LENGTH.fullmatch(length):
            raise RequestError("Malformed Content-Length.")
        return Counted(int(length))


def parse_response_head(head):
    """(version, status, fields). Lines that are not fields are passed over. ValueError
    without a status line."""
    found = STATUS_LINE.match(head)
    if not found:
        raise ValueError(f"{head[:60]!a} is no status line")
    version, status = found.groups()
    fields = join_fields(FIELD_LINE.findall(head, found.end()))
    return version, int(status), fields


# The sizes of chunks repeat.
@functools.lru_cache(maxsize=1024)
def chunk_size(line):
    """The size that a chunk's first line tells. int() alone would take signs and
    blanks."""
    found = re.fullmatch(rb"([0-9a-fA-F]{1,15})(?:[ \t]*;[\t -~\x80-\xff]*)?", line)
    if not found:
        raise ValueError("broken chunk size")
    return int(found.group(1), 16)


class Unframed:
    """A body that ends with its connection: feed(data) -> bytes of the body. Then
    `done` tells whether it has ended, `rest` is what came behind it, and `left` how
    much is known to come; take() gives what was read before feed() failed."""

    done = False
    rest = b""
    left = 0

    def feed(self, data):
        return data

    def take(self):
        return b""


class Counted(Unframed):
    """A body of known length."""

    def __init__(self, length):
        self.left = length
        self.done = length == 0

    def feed(self, data):
        body = data[:self.left]
        self.rest = data[self.left:]
        self.left -= len(body)
        self.done = self.left == 0
        return body


class Dechunker(Unframed):
    """A body in HTTP's chunked coding, taken strictly. ValueError if it is broken."""

    # Nobody is known to send chunk extensions. Trailers are not taken.
    LONGEST_LINE_BYTES = 4096

    # The size of the chunk that is being read, None between two; `left` of it has not
    # come. An empty line ends a chunk, and so that of size 0, the last.
    size = None

    def __init__(self):
        self.body = []

    def feed(self, data):
        data = self.rest + data
        at = 0
        while not self.done:
            if self.left:
                piece = data[at:at + self.left]
                self.body.append(piece)
                self.left -= len(piece)
                at += len(piece)
            end = -1 if self.left else data.find(b"\r\n", at, at + self.LONGEST_LINE_BYTES)
            if end < 0:
                break
            line = data[at:end]
            at = end + 2
            if self.size is None:
                self.size = self.left = chunk_size(line)
            elif line:
                raise ValueError("chunk longer than announced, or trailers")
            else:
                self.done = self.size == 0
                self.size = None
        self.rest = data[at:]
        is_long = len(self.rest) >= self.LONGEST_LINE_BYTES or b"\n" in self.rest
        if is_long and not self.done:
            raise ValueError("chunk line without an end")
        return self.take()

    def take(self):
        body = self.body
        self.body = []
        return body[0] if len(body) == 1 else b"".join(body)


class SSEDecoder:
    """Server-sent events: feed(data) -> the data of each complete event, as text;
    close() -> what a missing blank line held back. UpstreamError for an event beyond
    LIMIT_BYTES.

    Lines end at LF or CRLF, and nowhere else, so that U+2028 in a text survives
    (https://html.spec.whatwg.org/multipage/server-sent-events.html). Names, ids and
    comments are dropped. Beyond the standard, a line that starts with "{" is an event
    too: Z.ai was seen to end a broken answer with a bare line {"error":...}.
    """

    # The pump reads an event in one go, and an answer may have 128K tokens. No real one
    # has as many lines, brackets and commas.
    LIMIT_BYTES = 2 << 20
    MOST_LINES = 1000
    MOST_MARKS = 100_000
    # How a bare line begins. The others are frames that were torn in their first
    # letters and have a new one inside.
    BARE_STARTS = ("{", "ddata: ", "dadata: ", "datdata: ", "datadata: ")

    def __init__(self):
        # The beginning of an event. One bytes object that grows would take quadratic
        # time.
        self.held = bytearray()

    def feed(self, data):
        # Nobody was seen to end a line by CR alone, and JSON's texts hold none.
        data = data.replace(b"\r", b"")
        self.held += data
        # The last blank line may have begun in what came before.
        end = self.held.rfind(b"\n\n", -1 - len(data))
        blocks = []
        if end >= 0:
            blocks = self.held[:end].decode("utf-8", "replace").split("\n\n")
            del self.held[:end + 2]
        if len(self.held) > self.LIMIT_BYTES:
            raise UpstreamError("Z.ai sent an event that is too large.", GIVE_UP)
        events = []
        for block in blocks:
            if len(block) > LIGHT_BYTES and count_marks(block) > self.MOST_MARKS:
                raise UpstreamError("Z.ai sent an event with too many values.", GIVE_UP)
            # Nearly all blocks are one line of data.
            if block.startswith("data: ") and "\n" not in block:
                events.append(block[6:])
            elif block:
                events += self._parse_block(block)
        return events

    def close(self):
        return self.feed(b"\n\n")

    @staticmethod
    def _parse_block(block):
        """The events in the lines between two blank ones: that of all its `data` lines,
        and each bare JSON line."""
        if block.count("\n") > SSEDecoder.MOST_LINES:
            raise UpstreamError("Z.ai sent an event with too many lines.", GIVE_UP)
        lines = block.lstrip("\ufeff").split("\n")
        data = [line[5:] for line in lines if line.startswith("data:") or line == "data"]
        bare = [line for line in lines if line.startswith(SSEDecoder.BARE_STARTS)]
        if not data:
            return bare
        # One blank behind the colon belongs to the format.
        data = [line[line.startswith(" "):] for line in data]
        return ["\n".join(data), *bare]


def encode_event(value):
    """The SSE text of a value. Its first key stays first, as some clients look for
    {"error" at the start."""
    return "data: " + encode_text(value) + "\n\n"


# To Z.ai ##############################################################################
#
# The one reader, and the one door to Z.ai: to_zai_request(), last in this section. A
# front says where things are in its API's body, and nothing about what they mean: the
# Reader understands the messages, items, blocks, parts, tools, choices and wishes of
# all three APIs, whichever they came through, and writes Z.ai's own form at once. All
# checks are made here: what has passed is trusted below. The ranges refused are
# OpenAI's own; what is inside them and outside Z.ai's is clamped. null counts as
# absent.
#
# What a client once let into its history comes again with every turn. So only what
# stands last can be refused. What stands before it is mended, said in words, or left
# out and named; otherwise the conversation could never go on.

NUMBER = (int, float)
TYPES = {
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list: "an array",
    int: "a whole number",
    NUMBER: "a number",
    (str, list): "a string or an array",
    (str, dict): "a string or an object",
}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Characters of a model's name. It comes again in every chunk and in error messages.
LONGEST_NAME = 256
# OpenAI's bound and Z.ai's.
MOST_TOOLS = 128
# Each piece of an answer is compared with as much of the text before it.
LONGEST_STOP_WORD = 256


def by_word(kinds):
    """{word: kind} for {kind: "word word"}."""
    return {word: kind for kind, words in kinds.items() for word in words.split()}


# What the proxy reads itself. Fields of chat that are in no table go to Z.ai as they
# are.
FIELDS = by_word({
    str: "model user reasoning_effort reasoning_format",
    bool: "stream parallel_tool_calls",
    int: "n max_tokens max_completion_tokens",
    NUMBER: "temperature top_p",
    list: "messages tools",
    dict: "stream_options response_format",
    (str, list): "stop",
    (str, dict): "tool_choice",
})
# Bounds of a number, or of the length of a string or an array.
RANGES = by_word({
    (1, LONGEST_NAME): "model",
    (1, INFINITY): "messages max_tokens max_completion_tokens",
    (1, 1): "n",
    (0, 2): "temperature",
    (0, 1): "top_p",
})
UNITS = {str: " characters long", list: " items long"}
# Fields of OpenAI's and of others that Z.ai has no use for. What the last line wishes
# for thinking is kept.
DROPPED = frozenset("""
    audio extra_body frequency_penalty function_call include_reasoning
    logit_bias logprobs metadata modalities moderation prediction presence_penalty
    prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier
    service_tier store top_logprobs verbosity web_search_options
    chat_template_kwargs output_config reasoning think thinking_budget thinking_config
""".split())
# What asks for nothing, so that nothing is lost with it.
NOTHING = (None, False, 0, "", [], {})
DEFAULTS = {
    "service_tier": "auto",
    "truncation": "disabled",
    "modalities": ["text"],
}

# Where clients say whether to think, or how much: Z.ai's own places, then those of
# OpenAI, Anthropic, OpenRouter, vLLM, Ollama, Qwen and Google. Of two that say the same
# thing the first counts.
WISHES = """
    thinking.type thinking enable_thinking reasoning.enabled
    chat_template_kwargs.enable_thinking chat_template_kwargs.thinking think
    reasoning_effort output_config.effort thinking.budget_tokens thinking_budget
    reasoning.effort reasoning.max_tokens chat_template_kwargs.reasoning_effort
    thinking_config.thinking_level thinking_config.thinking_budget
""".split()
# All that does not go to Z.ai as the client has sent it.
READ_FIELDS = DROPPED.union(FIELDS, ("thinking", "enable_thinking"))
# The words for on, off, no wish and the efforts.
WISH_WORDS = {
    **by_word({True: "enabled adaptive true", False: "disabled false", None: "auto default"}),
    **dict(zip(EFFORTS, EFFORTS)),
    "ultra": "max",
}
# The efforts that are nearest to a number of tokens.
BUDGETS = {
    0: False,
    1024: "low",
    8192: "medium",
    24576: "high",
    INFINITY: "max",
}
# What OpenAI's efforts become where Z.ai grades thinking.
GRADES = dict(zip(EFFORTS, "low low low high high max max".split()))
# thinking.type for the wishes off and on. Where thinking cannot be turned off,
# "disabled" is a 400.
SWITCHED = {False: "disabled", True: "enabled"}
NEVER_OFF = {False: "enabled", True: "enabled"}
# A family of models: its types, and its words of effort.
FAMILIES = {
    NO_THINKING: ({}, {}),
    SWITCH: (SWITCHED, {}),
    GRADED: (SWITCHED, GRADES),
    ALWAYS: (NEVER_OFF, GRADES),
    # A model that the table does not know gets the words that were sent.
    None: (SWITCHED, WISH_WORDS),
}


class Request(NamedTuple):
    """What a client asks, and how its API says it."""
    fields: dict  # by chat's names; their values in any API's form
    names: dict  # chat's name of a field -> the client's, where that is another
    changed: tuple = ()  # short names of what the front left out
    # The clients are agents, which keep what they once sent: a picture that was refused
    # would come again with each turn.
    agents: bool = False
    claude: bool = False  # Claude's models stand for some of Z.ai's
    prompt: object = None  # the system's words, outside of the messages
    earlier: tuple = ()  # turns that stand before the messages
    recall: object = None  # gives the item of an earlier answer for its id, or None


class Asked(NamedTuple):
    """What Z.ai is asked, and what reading its answer needs to know."""
    body: dict  # Z.ai's request
    data: bytes  # the same as JSON
    changed: tuple  # short names of what was altered or dropped
    tools: dict  # name -> argument_types(), of the function tools sent
    owners: dict  # a tool's name at Z.ai -> the client's type, name and namespace
    one_call: bool = False  # parallel_tool_calls is false: only the first call passes
    json: bool = False  # JSON alone was asked for
    no_thinking: bool = False  # thinking was turned off
    stop: tuple = ()  # the words before which the proxy itself cuts the text
    tokens: int = 0  # an estimate of the prompt's


def read_json_object(data):
    """The dict in a request body (bytes). RequestError for anything else."""
    try:
        value = decode_strictly(data.decode("utf-8-sig"))
    except RecursionError:
        raise RequestError("The body is nested too deeply.") from None
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.")
    return value


def encode_request(value):
    """UTF-8 JSON. The encoder recurses deeper than the decoder, and may fail alone."""
    try:
        return encode_json(value)
    except RecursionError:
        raise RequestError("The body is nested too deeply.") from None


# The checks. A `path` is a value's place in the client's request: a text, or the path
# to what is around it and the key or the number in there, "" if it is all of that.
# Errors alone spell it out.

def spelled(path):
    """A path as text: "messages[0].content"."""
    if isinstance(path, str):
        return path
    outer, key = path
    inner = f"[{key}]" if isinstance(key, int) else f".{key}"
    return (spelled(outer) + inner).strip(".")


def wrong(path, words, **facts):
    """The error of a value that `words` tell of."""
    param = spelled(path)
    return RequestError(f"'{param}' {words}.", param, **facts)


def expect(value, type, path):
    """`value`, if it is of that type, one of TYPES."""
    # In Python, true and false are numbers too.
    if isinstance(value, type) and (type is bool or not isinstance(value, bool)):
        return value
    if value is None:
        param = spelled(path)
        raise RequestError(
            f"Missing required parameter: '{param}'.", param, code="missing_required_parameter")
    raise wrong(path, f"must be {TYPES[type]}", code="invalid_type")


def need_word(value, words, path):
    if value not in words:
        raise wrong(path, f"must be one of {', '.join(words)}")


def need_within(value, bounds, path):
    low, high = bounds
    unit = UNITS.get(type(value), "")
    size = len(value) if unit else value
    if not low <= size <= high:
        bound = f"at least {low}" if size < low else f"at most {high}"
        raise wrong(path, f"must be {bound}{unit}")


def as_list(value):
    """`value` if it is a list, else one of it alone."""
    return value if isinstance(value, list) else [value]


def dig(value, path):
    """What stands at a path such as "text.format"; None if nothing does."""
    for key in path.split("."):
        value = as_dict(value).get(key)
    return value


def asks(name, value):
    """Whether a field of that name asks for something."""
    return value not in NOTHING and value != DEFAULTS.get(name)


# What others wrote is made harmless by redact() and mask() where it may hold a key, by
# escaped() in a text, by plain() as a word of the log or of a header, and by these two
# as an item of the header x-ztoapi-changed, and as all of its items.

def name_of(word):
    return re.sub("[^a-zA-Z0-9_.-]", "_", word[:40]) or "_"


def some_of(names):
    """Each once, and no more than a header takes."""
    return tuple(dict.fromkeys(names))[:100]


def lines(*texts):
    """What there is of some texts, one below the other."""
    return "\n".join([text for text in texts if text and isinstance(text, str)])


def digest(text):
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


# A picture is that many tokens at most, whatever its bytes.
PICTURE_TOKENS = 1600


def estimate_tokens(text, pictures=()):
    """How many tokens a text has, or JSON in UTF-8; rather too many than too few.
    `pictures`: the lengths of the pictures in it.

    English has some four letters a token. Chinese has 1.3, of three bytes each, so that
    both have about as many bytes.
    """
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text
    size_bytes = len(data) - sum(pictures)
    return int(size_bytes / 3.9 + 0.99) + PICTURE_TOKENS * len(pictures)


# A conversation is made of pieces: messages and items, which are its turns, the parts
# or blocks of a message, and calls. Each is a dict with a type, or with a role.

ROLES = ("system", "developer", "user", "assistant", "tool")
# The media that Z.ai takes, as the text in their place calls them.
MEDIA = by_word({
    "image": "image_url input_image image",
    "video": "video_url video",
    "file": "file_url input_file file document",
})
# Who reads a piece, by its type: a method of the Reader. To teach it a type, add it
# here. A part shows something, in a message or in the output of a tool.
PARTS = by_word({
    "read_text": "text input_text output_text refusal compaction",
    "read_media": " ".join(MEDIA),
    "read_words": "input_audio audio search_result tool_reference resource resource_link",
})
# An item stands among the turns, or inside a message.
ITEMS = by_word({
    "read_message": "message",
    "read_thinking": "thinking reasoning",
    "read_call": "function function_call custom custom_tool_call tool_use tool_call",
    "read_output": "function_call_output custom_tool_call_output tool_result",
    "read_reference": "item_reference",
    "read_tools": "additional_tools",
})
# Names of one meaning: the first that holds something counts.
THOUGHT_FIELDS = ("thinking", "reasoning", "content", "summary")
CHAT_THOUGHT_FIELDS = ("reasoning_content", "reasoning")
ARGUMENT_FIELDS = ("arguments", "input", "args")
OUTPUT_IDS = ("call_id", "tool_use_id", "tool_call_id")
TEXT_FIELDS = {"refusal": "refusal", "compaction": "encrypted_content"}
WORD_FIELDS = ("text", "refusal", "content")
HEAD_FIELDS = ("title", "name", "tool_name", "context")
URL_FIELDS = ("url", "uri", "image_url", "video_url", "file_url")
ADDRESS_FIELDS = (*URL_FIELDS, "source")
DATA_FIELDS = ("data", "base64")
FORMAT_FIELDS = ("media_type", "mimeType", "mime_type")
NO_CONTENT = (None, "", [])
# A piece is searched for words that deep.
DEEPEST_WORDS = 8
# Stands before the thinking that clients keep for us in `encrypted_content`. It is not
# encrypted.
MARK = "ztoapi:"
# A line of Claude Code's prompt that changes with each release, and would spoil Z.ai's
# cache.
BILLING = re.compile("^x-anthropic-billing-header:.*\n?", re.MULTILINE)

# The models that take OpenAI's own "file" part. One with a URL goes to all that see.
FILE_MODELS = ("GLM-5.3-Flash", "GLM-5.3-FlashX")
# Z.ai refuses empty messages. The first stands for a user who says nothing, the other
# for a tool that has brought nothing.
NO_WORDS = "."
NO_OUTPUT = "(no output)"
ZAI_TOOLS = ("web_search", "retrieval")
NO_PARAMETERS = {"type": "object", "properties": {}}
CUSTOM_SCHEMA = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}
# The types of choices of one tool, and of those that demand a call.
CHOICES = ("function", "custom", "tool")
DEMANDS = (*CHOICES, "required", "any")
# Where Codex's own tools may be said to be, or not.
NO_NAMESPACE = "functions"


def first(value, names):
    """What is in the first of some fields that holds something; None without one."""
    for name in names:
        found = value.get(name)
        if found not in NO_CONTENT:
            return found
    return None


class Piece(dict):
    """A dict of the client's that knows its type, or the one given for those that have
    none, and its place: the path to it, the role whose message it is in, and the number
    of its turn."""

    __slots__ = ("kind", "path", "role", "turn")

    def __init__(self, value, path, kind=None, role="", turn=0):
        # Most need no check, nor the path for it.
        if not isinstance(value, dict):
            expect(value, dict, path)
        dict.__init__(self, value)
        self.path = path
        self.role = role
        self.turn = turn
        self.kind = expect(self.get("type") or kind, str, (path, "type"))

    def need(self, key, type, default=None):
        """self[key], or else the default, if it is of that type."""
        value = self.get(key)
        if isinstance(value, type):
            return value
        return expect(default if value is None else value, type, (self.path, key))

    def tools(self):
        """The Pieces in the list of tools, which may be absent."""
        tools = enumerate(self.need("tools", list, []))
        return [Piece(tool, ((self.path, "tools"), i), "function") for i, tool in tools]

    def unfold(self):
        """Make chat's nesting, {"type": X, X: {...}}, as flat as the others have it."""
        inner = self.pop(self.kind, None)
        if inner is not None:
            self.path = (self.path, self.kind)
            self.update(expect(inner, dict, self.path))
        return self


def json_text(value):
    return encode_request(value).decode()


def function_object(**fields):
    """What Z.ai and chat have for a tool, and for a call of it."""
    return {"type": "function", "function": fields}


def words_in(value, depth=0):
    """The words of a piece of any type: its title and name, its text or else its
    address."""
    if isinstance(value, str):
        return value
    if depth > DEEPEST_WORDS or not isinstance(value, (list, dict)):
        return ""
    depth += 1
    if isinstance(value, list):
        return lines(*[words_in(inner, depth) for inner in value])
    kind = str(value.get("type"))
    # Nothing is searched twice: in what is nested, that would multiply.
    value = dict(value)
    heads = [value.get(field) for field in HEAD_FIELDS]
    texts = [words_in(value.pop(field, None), depth) for field in WORD_FIELDS]
    # The data of another type is a picture's, say, and no words.
    if kind == "text":
        texts.append(value.get("data"))
    text = lines(*texts) or words_in(first(value, (kind, *ADDRESS_FIELDS)), depth)
    return lines(*heads, text)


def media_part(value, noun):
    """A picture, a video or a file in Z.ai's form; None if there is nothing of it."""
    source = as_dict(value.get("source")) or value
    url = first(source, URL_FIELDS)
    data = first(source, DATA_FIELDS)
    if source.get("type") == "text":
        return None
    if data:
        url = f"data:{first(source, FORMAT_FIELDS)};base64,{data}"
    if noun == "file":
        file = value.get("file")
        data = value.get("file_data") or data and url
        if data:
            file = {"filename": value.get("filename") or "file", "file_data": data}
        if isinstance(file, dict):
            return {"type": noun, noun: file}
    form = noun + "_url"
    url = url if isinstance(url, dict) else {"url": url}
    return {"type": form, form: url} if isinstance(url.get("url"), str) else None


UNIONS = ("anyOf", "oneOf", "allOf")
# What branches() leaves out of a schema.
STRUCTURE = (*UNIONS, "$ref", "$defs", "definitions")
# So many members of unions are read. They may be spelt by references, many to one.
MOST_BRANCHES = 300
# JSON's words for the types of Python.
TYPE_NAMES = {
    str: "string", bool: "boolean", int: "integer", float: "number", list: "array",
    dict: "object", type(None): "null",
}


def schema_at(reference, root):
    """The schema at "#/$defs/Panel"; an empty one if there is none."""
    for key in str(reference).split("/")[1:]:
        root = as_dict(root).get(key.replace("~1", "/").replace("~0", "~"))
    return as_dict(root)


def as_schema(value):
    """`value` if it can be a schema, of which none has so many words, else an empty
    one."""
    return value if isinstance(value, dict) and len(value) < 100 else {}


def branches(schema, root):
    """The schemas that a value may follow, without unions and references at their top;
    `root` is the whole schema. What stands beside a union holds for its members."""
    found = [(schema, {})]
    plain = []
    # They become more while they are gone through. References may go in a circle.
    for given, beside in found:
        branch = as_schema({**as_schema(given), **beside})
        bare = {word: inner for word, inner in branch.items() if word not in STRUCTURE}
        if "const" in bare:
            bare["enum"] = [bare.pop("const")]
        members = first(branch, UNIONS)
        if "$ref" in branch:
            members = [schema_at(branch["$ref"], root)]
        if isinstance(members, list):
            room = MOST_BRANCHES - len(found)
            found += [(member, bare) for member in members[:room]]
        else:
            plain.append(bare)
    return plain or [{}]


def allowed_types(schema, root):
    """The JSON types that a schema allows, empty if it does not say."""
    allowed = set()
    for branch in branches(schema, root):
        if "type" in branch:
            allowed.update(map(str, as_list(branch["type"])))
        elif "enum" in branch:
            allowed.update(TYPE_NAMES[type(value)] for value in as_list(branch["enum"]))
        else:
            return set()
    return allowed


def argument_types(schema):
    """What reading a call needs of its tool's schema, {argument: allowed_types()},
    where they are known. The whole would stay as long as the answer lasts."""
    properties = as_dict(schema.get("properties"))
    types = {name: allowed_types(inner, schema) for name, inner in properties.items()}
    return {name: allowed for name, allowed in types.items() if allowed}


def mend_arguments(arguments):
    """The text of a JSON object, whatever a model or a cut has left as `arguments`.

    What is whole stays as it is; what was encoded twice is decoded once; any other text
    becomes the one value of an object.
    """
    given = arguments if isinstance(arguments, str) else json_text(arguments)
    if isinstance(arguments, dict):
        return given
    if given.strip() in ("", "null"):
        return "{}"
    value = decode_or_none(given, decode_strictly)
    inner = decode_or_none(value, decode_strictly) if isinstance(value, str) else value
    if not isinstance(inner, dict):
        return json_text({"arguments": given})
    return given if inner is value else value


def call_id(id):
    """The id of a call as text, None without one. Z.ai itself has sent numbers."""
    return str(id) if id and type(id) in (str, int) else None


def meaning_of(call):
    function = call["function"]
    return function["name"], decode_or_none(function["arguments"])


def read_wish(value, path):
    """True or False for whether to think, an effort for how much; all else is no
    wish."""
    if isinstance(value, str):
        need_word(value, WISH_WORDS, path)
        return WISH_WORDS[value]
    if type(value) is int and value >= 0:
        return next(effort for most, effort in BUDGETS.items() if value <= most)
    return value


class Unseen(Exception):
    """This turn shows a picture to a model that sees none, and VISION_MODEL may."""


class Turn(NamedTuple):
    """What the assistant says in a row."""
    texts: list
    thoughts: list
    calls: list


class History:
    """Puts Z.ai's messages together, whatever the order they come in: what the
    assistant says in a row is one message, and each call has one output, right behind
    it. close() gives them all."""

    def __init__(self, changed):
        self.changed = changed
        self.messages = []
        # What the assistant's next words belong to.
        self.turn = Turn([], [], [])
        # Images of tool results, which come behind the last of these.
        self.images = []
        # The tool messages whose output may come yet: by the ids of their calls, and
        # those of the last turn's calls that had no id of their own.
        self.waiting = {}
        self.nameless = iter(())

    def end_turn(self):
        texts, thoughts, calls = turn = self.turn
        if not any(turn):
            return
        self.turn = Turn([], [], [])
        content = "\n\n".join(texts)
        if calls or content.strip():
            self.add("assistant", content)
            message = self.messages[-1]
            if thoughts:
                message["reasoning_content"] = "\n\n".join(thoughts)
            if calls:
                message["tool_calls"] = self.add_calls(calls)
        elif thoughts:
            # Z.ai takes no thinking alone.
            self.changed.append("reasoning_content")

    def add_calls(self, calls):
        """The calls of a turn, each of them once. Behind it stands a tool message for
        each, as Z.ai wants, which output() fills.

        A call without an id, or with that of another one, gets one by its place: what
        is sent again must stay the same, or Z.ai's cache is lost.
        """
        place = len(self.messages)
        kept = []
        latest = {}  # by the ids that the client has given
        nameless = []
        for i, call in enumerate(calls):
            id = call["id"]
            twin = latest.get(id)
            # LangChain sends each call as a part, too. As parsing takes time, only
            # neighbours of one id are compared.
            if twin and meaning_of(twin) == meaning_of(call):
                continue
            output = {"role": "tool", "content": NO_OUTPUT}
            if twin or not id:
                call["id"] = f"call_{place}_{i}"
                nameless.append(output)
                self.changed.append("tool_call_id")
            else:
                self.waiting[id] = output
            latest[id] = id and call
            kept.append(call)
            output["tool_call_id"] = call["id"]
            self.messages.append(output)
        self.nameless = iter(nameless)
        return kept

    def add(self, role, content):
        """A message behind all that was said."""
        self.end_turn()
        self.place_images()
        self.messages.append({"role": role, "content": content})

    def output(self, id, text, images):
        """Give a tool's output to its call, however late it comes. Without a call it
        can only be told as a user's words."""
        self.end_turn()
        found = self.waiting.pop(id, None) or next(self.nameless, None)
        if found:
            found["content"] = text
        else:
            self.changed.append("tool_call_id")
            self.add("user", f"Output of the tool call {id}:\n{text}")
        self.images += images

    def place_images(self):
        """Z.ai takes images from users only. Parallel calls have several outputs, which
        must stand side by side."""
        images = self.images
        if images:
            self.images = []
            self.add("user", [{"type": "text", "text": "From the tool results:"}, *images])

    def close(self):
        self.end_turn()
        self.place_images()
        # Z.ai refuses a request without a user.
        if not any(message["role"] == "user" for message in self.messages):
            self.add("user", NO_WORDS)
        return self.messages


class Reader:
    """One request on its way to one model of Z.ai.

    What reads a Piece gives a part for the message around it: a text, or the dict of a
    picture, a video or a file. None: the piece went into the history by itself, or was
    left out.
    """

    def __init__(self, request, settings, model):
        """`model`: Z.ai's id of the one that answers, "" for the one that is asked."""
        self.request = request
        self.fields = request.fields
        self.check_fields()
        self.settings = settings
        self.id = model or zai_model_id(
            self.fields["model"], settings.model_aliases, request.claude)
        if not self.id:
            raise wrong("model", "must not be empty")
        # Whether another model may answer where this one sees nothing.
        self.may_change = settings.vision_model and not model
        # None for an id that the table does not know.
        self.model = find_model(self.id)
        # Short names of what was altered or dropped.
        self.changed = list(request.changed)
        # What Z.ai has no field for, as system lines.
        self.instructions = []
        self.history = History(self.changed)
        self.tools = []  # in Z.ai's form
        self.some_left_out = False
        self.names = {}  # (namespace, name) of a tool -> its name at Z.ai
        self.owners = {}  # and back
        self.referred = set()  # the ids of items that were put in for a reference
        self.pictures = []  # their lengths
        # The numbers of the user's, the assistant's and the tools' last turns.
        self.heard = self.spoke = self.brought = -INFINITY
        # The turns whose pictures the model does not see.
        self.unseen = []
        # (turn, error) of what cannot be read, and of what a user shows in vain.
        self.errors = []

    def path(self, name):
        """What the client calls a field of chat."""
        return self.request.names.get(name, name)

    def check_fields(self):
        fields = {"model": None, "messages": None, **self.fields}
        for name, type in FIELDS.items():
            if name in fields:
                path = self.path(name)
                value = expect(fields[name], type, path)
                if name in RANGES:
                    need_within(value, RANGES[name], path)

    def result(self):
        fields = self.fields
        body = {name: value for name, value in fields.items() if name not in READ_FIELDS}
        stop = self.stop_words()
        if stop and not self.request.agents:
            # Messages tells which word it was, so there Z.ai must not take it off.
            body["stop"] = [stop[0]]
        # First, as calls in the history are named after the tools.
        self.read_tools(Piece(fields, "", "request"))
        messages = self.read_conversation()
        body.update(
            model=self.id, stream=True, messages=messages, **self.sampling(),
            **self.choose(), **self.thinking(), **self.format())
        # They stand behind the client's own: what Z.ai caches stays cached.
        place = [message["role"] == "system" for message in messages].index(False)
        messages[place:place] = [
            {"role": "system", "content": text} for text in self.instructions]
        functions = [tool["function"] for tool in self.tools if "function" in tool]
        if functions and fields.get("stream") and self.model and self.model.tool_stream:
            body.setdefault("tool_stream", True)
        data = encode_request(body)
        return Asked(
            body,
            data,
            changed=some_of(self.changed),
            tools={tool["name"]: argument_types(tool["parameters"]) for tool in functions},
            owners=self.owners,
            one_call=fields.get("parallel_tool_calls") is False
            or dig(fields, "tool_choice.disable_parallel_tool_use") is True,
            json="response_format" in body,
            no_thinking=dig(body, "thinking.type") == "disabled",
            stop=stop,
            tokens=estimate_tokens(data, self.pictures),
        )

    # Turns

    def read_conversation(self):
        """Z.ai's messages."""
        request = self.request
        messages = self.fields["messages"]
        last = len(messages) - 1
        name = self.path("prompt")
        around = Piece({name: request.prompt}, "", "request", "system", last)
        for part in self.content(around, name):
            self.show("system", [part])
        around.role = ""
        path = self.path("messages")
        for i, turn in enumerate([*request.earlier, *messages], -len(request.earlier)):
            around.turn = i
            part = self.read(turn, (path, i), around, "message")
            # What stands in no message is the user's.
            if part:
                self.show("user", [part])
        self.refuse(last)
        return self.history.close()

    def refuse(self, last):
        """Raise what is wrong with the last turn or with the prompt, and with what this
        turn shows.

        In chat it is the user's last message that may be refused, though one of the
        system stands behind it. Agents would send it again for ever.
        """
        if self.may_change and any(
                turn == self.heard or turn > self.spoke for turn in self.unseen):
            raise Unseen
        refusable = [last]
        if self.heard > max(self.spoke, self.brought) and not self.request.agents:
            refusable.append(self.heard)
        for turn, error in self.errors:
            if turn in refusable:
                raise error

    def read(self, value, path, around, kind=None):
        """A piece of any kind, inside of another one. What cannot be read is told as
        JSON, but not by the assistant."""
        role = around.role
        try:
            piece = Piece(value, path, kind, role, around.turn)
            method = PARTS.get(piece.kind)
            # An output has parts alone, so that nothing nests for ever.
            if not method and role != "tool":
                method = ITEMS.get(piece.kind) or "role" in piece and "read_message"
            return getattr(self, method or "read_words")(piece)
        except RequestError as error:
            if error.status != 400:
                raise
            if role != "tool":
                self.errors.append((around.turn, error))
        self.changed.append("unreadable")
        return None if role == "assistant" else json_text(value)

    def content(self, piece, field, kind=None):
        """The parts that a field shows: a text, a piece, or many."""
        value = piece.get(field)
        if value is None:
            return []
        if isinstance(value, str):
            return [value]
        path = (piece.path, field)
        values = enumerate(value) if isinstance(value, list) else [("", value)]
        parts = [self.read(inner, (path, key), piece, kind) for key, inner in values]
        return [part for part in parts if part is not None]

    def read_message(self, piece):
        role = piece.get("role")
        if self.request.recall and "id" in piece and piece.keys() <= {"id", "type"}:
            return self.read_reference(piece)
        need_word(role, ROLES, (piece.path, "role"))
        if piece.role:
            return self.read_words(piece)
        if role == "tool":
            return self.read_output(piece)
        piece.role = role
        if role == "assistant":
            thought = words_in(first(piece, CHAT_THOUGHT_FIELDS))
            if thought:
                self.turn(piece).thoughts.append(thought)
            for field in ("content", "refusal", "tool_calls"):
                if piece.get(field):
                    # The entries of tool_calls may have no type.
                    texts = self.content(piece, field, "function")
                    # A message of chat is one text.
                    if not self.request.agents:
                        texts = [lines(*texts)]
                    self.turn(piece).texts.extend(filter(None, texts))
            return None
        if piece.get("content") is None:
            # Refused as any field is that is absent.
            expect(None, str, (piece.path, "content"))
        parts = self.content(piece, "content")
        # Of outputs alone, which were told by themselves, nothing is left.
        if parts or not piece["content"]:
            if role == "user":
                self.heard = piece.turn
            self.show(role, parts)
        return None

    def show(self, role, parts):
        """Parts of the user or the system."""
        text = lines(*parts)
        if role != "user":
            role = "system"
            text = BILLING.sub("", text)
            if not text.strip():
                return
        elif not text.strip():
            # "cannot be empty": Z.ai wants a text beside an image, too.
            text = NO_WORDS
            parts = [*parts, text]
        if dict in map(type, parts):
            text = [
                {"type": "text", "text": part} if isinstance(part, str) else part
                for part in parts if part]
        self.history.add(role, text)

    def turn(self, piece):
        """The Turn that the assistant's piece belongs to."""
        self.spoke = piece.turn
        return self.history.turn

    # Items

    def read_thinking(self, piece):
        kept = str(piece.get("encrypted_content")).partition(MARK)[2]
        thought = kept or words_in(first(piece, THOUGHT_FIELDS))
        if thought:
            self.turn(piece).thoughts.append(thought)

    def read_call(self, piece):
        """A call of an earlier answer, sent back."""
        # An item has an id of its own beside that of its call.
        id = first(piece, ("call_id", "id"))
        call = piece.unfold()
        name = self.name_at_zai(call)
        arguments = first(call, ARGUMENT_FIELDS)
        if call.kind.startswith("custom"):
            arguments = {"input": call.get("input")}
        mended = mend_arguments(arguments)
        if mended != arguments and not isinstance(arguments, dict):
            self.changed.append("arguments")
        self.turn(piece).calls.append(
            {"id": call_id(id), **function_object(name=name, arguments=mended)})

    def read_output(self, piece):
        """What a tool has brought: a text, parts, or another value, told as JSON."""
        piece.role = "tool"
        self.brought = piece.turn
        field = "content" if piece.get("output") is None else "output"
        content = piece.get(field)
        text = "" if content in NO_CONTENT else content
        media = []
        if not isinstance(text, str):
            kinds = [str(dig(inner, "type")) for inner in as_list(content)]
            has_parts = PARTS.keys() & kinds
            parts = self.content(piece, field) if has_parts else [json_text(content)]
            text = lines(*parts)
            media = [part for part in parts if isinstance(part, dict)]
        # A field of Messages.
        if piece.get("is_error") and "error" not in text.lower():
            text = lines("Error:", text)
        if not text.strip():
            text = "(an image)" if media else NO_OUTPUT
        self.history.output(call_id(first(piece, OUTPUT_IDS)), text, media)

    def read_reference(self, piece):
        if not self.request.recall:
            return self.read_words(piece)
        id = piece.need("id", str)
        if id in self.referred:
            # A short reference to a long item, many times, would fill the memory.
            self.changed.append("item_reference")
            return None
        self.referred.add(id)
        found = self.request.recall(id)
        if found:
            return self.read(found, piece.path, piece)
        # Thinking can be missing; what was said or called cannot.
        if not id.startswith("rs_"):
            raise wrong(
                (piece.path, "id"), "is the id of an item that is not found. Items are kept"
                " for a while only, and not at all with 'store' false: send the item itself",
                status=404, code="not_found")
        return None

    # Parts

    def read_text(self, piece):
        return piece.need(TEXT_FIELDS.get(piece.kind, "text"), str)

    def read_words(self, piece):
        noun = name_of(piece.kind)
        if piece.kind not in PARTS:
            if piece.role == "tool":
                return json_text(piece)
            self.changed.append(noun)
        # The words of a search, say, would be put into the assistant's mouth.
        text = "" if piece.role in ("", "assistant") else words_in(piece)
        if text:
            return text
        if piece.kind in MEDIA:
            raise wrong(piece.path, "has neither an address nor data: no files are kept here")
        return self.leave_out(piece, noun, f"Z.ai takes no {noun}")

    def read_media(self, piece):
        noun = MEDIA[piece.kind]
        part = media_part(piece, noun)
        if not part:
            return self.read_words(piece)
        model = self.model
        if piece.role not in ("user", "tool"):
            reason = f"a message of the {piece.role} takes text only"
            advice = ""
        elif model and not model.sees:
            self.unseen.append(piece.turn)
            reason = f"{model.name} takes text only"
            advice = f"; models that see: {SEEING}; VISION_MODEL may be one to answer here"
        elif (model and "file" in part and "file_url" not in part["file"]
              and model.name not in FILE_MODELS):
            reason = f"{model.name} takes no such file"
            advice = f"; models that do: {', '.join(FILE_MODELS)}"
        else:
            self.pictures.append(len(lines(*part[part["type"]].values())))
            return part
        return self.leave_out(piece, noun, reason, advice)

    def leave_out(self, piece, noun, reason, advice=""):
        """A text in the place of what is shown."""
        # What stands behind a tool's output was brought by the tool, though the user
        # sends it. Agents' pictures would come again with each turn.
        if piece.role == "user" and self.spoke >= self.brought and not self.request.agents:
            self.errors.append(
                (piece.turn, RequestError(f"{reason}{advice}.", spelled(piece.path))))
        self.changed.append(noun)
        return None if piece.role in ("", "assistant") else f"[{noun} left out: {reason}]"

    # Tools

    def name_at_zai(self, tool):
        """Z.ai's name for a tool of the client's: 1 to 64 letters, digits, _ and -. No
        two tools get the same."""
        name = tool.need("name", str)
        space = tool.need("namespace", str, NO_NAMESPACE)
        if (space, name) in self.names:
            return self.names[space, name]
        owner = {"type": "function", "name": name}
        full = name
        if space != NO_NAMESPACE:
            owner["namespace"] = space
            full = f"{space}__{name}"
        short = full
        while short in self.owners or not re.fullmatch("[a-zA-Z0-9_-]{1,64}", short):
            letters = re.sub("[^a-zA-Z0-9_-]", "_", full[:55])
            short = f"{letters}_{digest(full)[:8]}"
            # If that is taken, too.
            full += "'"
        self.names[space, name] = short
        self.owners[short] = owner
        return short

    def read_tools(self, holder, namespace=None):
        for tool in holder.tools():
            # Anthropic's have no type, or "custom", which elsewhere is another thing.
            if tool.get("input_schema") is not None:
                tool.kind = "function"
            if namespace is not None:
                tool["namespace"] = namespace
            # No namespace is in another one.
            if tool.kind == "namespace" and namespace is None:
                self.read_tools(tool, tool.need("name", str))
            elif tool.kind in CHOICES:
                self.read_function(tool.unfold())
            elif tool.kind in ZAI_TOOLS and tool.get(tool.kind):
                self.tools.append(tool)
            else:
                # For one unknown tool Z.ai refuses the whole request.
                self.changed.append(name_of(tool.kind))
                self.some_left_out = True

    def read_function(self, tool):
        """A tool with the fields that Z.ai requires."""
        name = self.name_at_zai(tool)
        self.owners[name]["type"] = tool.kind
        text = tool.need("description", str, "")
        field = "parameters" if tool.get("input_schema") is None else "input_schema"
        schema = tool.need(field, dict, {}) or NO_PARAMETERS
        if tool.kind == "custom":
            schema = CUSTOM_SCHEMA
            form = as_dict(tool.get("format"))
            form = {**form, **as_dict(form.get("grammar"))}
            text = lines(text, form.get("syntax"), form.get("definition"))
        # Codex says of each tool that it is not.
        if tool.get("strict"):
            self.changed.append("strict")
        self.tools.append(
            function_object(name=name, description=text or name, parameters=schema))

    def choose(self):
        """The tools that tool_choice leaves. Z.ai knows "auto" only; a system line
        tells of any other."""
        path = self.path("tool_choice")
        choice = self.fields.get("tool_choice", "auto")
        if isinstance(choice, str):
            need_word(choice, ("none", "auto", "required", "any"), path)
            choice = {"type": choice}
        choice = Piece(choice, path, "function").unfold()
        if choice.kind != "auto":
            self.changed.append("tool_choice")
            self.keep_tools(choice)
        need_within(self.tools, (0, MOST_TOOLS), self.path("tools"))
        return {"tools": self.tools, "tool_choice": "auto"} if self.tools else {}

    def keep_tools(self, choice):
        must = choice.kind in DEMANDS or choice.get("mode") == "required"
        # Z.ai's own tools have no name.
        names = [tool.get("function", {}).get("name") for tool in self.tools]
        wanted = set(names)
        if choice.kind in CHOICES:
            wanted = {self.chosen(choice)}
        # "none" names no tools.
        elif choice.kind in ("allowed_tools", "none"):
            wanted = set(map(self.chosen, choice.tools()))
        functions = wanted.intersection(names) - {None}
        if must and not functions:
            # What was left out, and Z.ai's own tools, cannot be demanded.
            if choice.kind in CHOICES and not self.some_left_out:
                raise wrong(self.path("tool_choice"), "names a tool that is not in 'tools'")
            return
        self.tools = [tool for name, tool in zip(names, self.tools) if name in wanted]
        if must:
            name = min(functions)
            wish = "the tool " + name if functions == {name} else "one or more of the tools"
            self.instructions.append(
                f"You must answer by calling {wish}. Do not answer in text.")

    def chosen(self, tool):
        """The name at Z.ai of a tool that is chosen, None for one of Z.ai's own."""
        return self.name_at_zai(tool.unfold()) if tool.kind in CHOICES else None

    # Everything else

    def sampling(self):
        request = self.fields
        wishes = {
            **request,
            "max_tokens": request.get("max_completion_tokens", request.get("max_tokens")),
        }
        most = self.model and self.model.max_tokens or INFINITY
        # Z.ai takes two decimals, in ranges narrower than OpenAI's.
        ranges = {"temperature": (0, 1), "top_p": (0.01, 1), "max_tokens": (1, most)}
        fields = {}
        for name, (low, high) in ranges.items():
            wish = wishes.get(name)
            if wish is not None:
                fields[name] = round(min(max(wish, low), high), 2)
                if fields[name] != wish:
                    self.changed.append(name)
        # Z.ai refused a top_p of 1 for years. It means the same as no top_p.
        if fields.get("top_p") == 1:
            del fields["top_p"]
        user = request.get("user")
        if user:
            # Z.ai's name of it, and Z.ai's bounds. Claude Code's has 150 characters.
            user = user if 6 <= len(user) <= 128 else digest(user)
            fields["user_id"] = request.get("user_id", user)
        return fields

    def stop_words(self):
        """The proxy itself looks for all of them, as Z.ai takes one."""
        words = as_list(self.fields.get("stop", []))
        for i, word in enumerate(words):
            path = (self.path("stop"), i)
            need_within(expect(word, str, path), (0, LONGEST_STOP_WORD), path)
        return tuple(filter(None, words))

    def thinking(self):
        """thinking and reasoning_effort as the model's family takes them."""
        wishes = [read_wish(dig(self.fields, path), path) for path in WISHES]
        on = next((wish for wish in wishes if isinstance(wish, bool)), None)
        effort = next((wish for wish in wishes if isinstance(wish, str)), None)
        if on is None and effort:
            on = effort not in ("none", "minimal")
        if on is None:
            on = self.settings.enable_thinking
        types, grades = FAMILIES[self.model and self.model.thinking]
        is_on = types.get(on) == "enabled"
        # What cannot stop thinks as little as it can.
        grade = grades.get(effort if on else "low")
        if on not in (None, is_on):
            self.changed.append("thinking")
        if effort and effort != grade:
            self.changed.append("reasoning_effort")
        thinking = without_nulls({
            "type": types.get(on),
            "clear_thinking": dig(self.fields, "thinking.clear_thinking"),
        })
        return without_nulls({
            "thinking": types and thinking or None,
            "reasoning_effort": grade if is_on else None,
        })

    def format(self):
        """Z.ai ignores a json_schema, so the schema goes into a system line."""
        path = self.path("response_format")
        form = Piece(self.fields.get("response_format", {"type": "text"}), path)
        need_word(form.kind, ("text", "json_object", "json_schema"), (path, "type"))
        if form.kind == "json_schema":
            form = form.unfold()
            # OpenAI's chat takes one without.
            if form.get("schema") is None and form.path is path:
                expect(None, dict, (path, "schema" if self.request.agents else form.kind))
            text = json_text(form.need("schema", dict, {}))
            self.changed.append("response_format")
            self.instructions.append(
                "Answer with one JSON value that matches this JSON Schema,"
                f" and nothing else:\n{text}")
        return {} if form.kind == "text" else {"response_format": {"type": "json_object"}}


def to_zai_request(request, settings, model=""):
    """An Asked for a Request, which stays as it is and may be written again for another
    `model`, an id of Z.ai's.

    RequestError for what the client's API would refuse too, and, in chat, for pictures
    in the last message to a model that sees none. Sources: Z.ai's OpenAPI file, and
    what its servers were seen to take and to refuse.
    """
    try:
        return Reader(request, settings, model).result()
    except Unseen:
        vision = zai_model_id(settings.vision_model, settings.model_aliases)
        return Reader(request, settings, vision).result()


# Schemas ##############################################################################
#
# Z.ai takes most JSON Schemas of tools, and refuses whole requests for a few. So they
# go as they are, and simpler_schemas() is for a further try.

# Types, from the one that says least. One that is not named may be any.
WIDTHS = ("null", None, "boolean", "integer", "number", "string", "array", "object")
ANY_VALUE = {"description": "Any JSON value."}
# A schema that refers to itself has no end.
DEEPEST_SCHEMA = 12
MOST_SCHEMAS = 2000


def width_of(schema):
    kind = schema.get("type")
    width = WIDTHS.index(kind) if kind in WIDTHS else 0
    return width, len(as_dict(schema.get("properties")))


def plain_schema(schema, root, left, depth=0):
    """A JSON Schema in plain words. Of a union the member that allows most stands for
    all; of values, all stay. `left` bounds how many schemas are read."""
    if depth > DEEPEST_SCHEMA or next(left, None) is None:
        return ANY_VALUE
    member, *others = branches(schema, root)
    members = [member, *(other for other, _ in zip(others, left))]
    schema = max(members, key=width_of)
    choices = [member.get("enum") for member in members]
    if all(isinstance(choice, list) for choice in choices):
        schema = {**members[0], "enum": list(itertools.chain(*choices))}
    depth += 1
    if isinstance(schema.get("properties"), dict):
        schema["properties"] = {
            name: plain_schema(inner, root, left, depth)
            for name, inner in schema["properties"].items()}
    for word in ("items", "additionalProperties"):
        if isinstance(schema.get(word), dict):
            schema[word] = plain_schema(schema[word], root, left, depth)
    return schema or ANY_VALUE


def simpler_tool(tool):
    if "function" not in tool:
        return tool
    schema = tool["function"]["parameters"]
    plain = plain_schema(schema, schema, iter(range(MOST_SCHEMAS)))
    return function_object(**{**tool["function"], "parameters": plain})


def simpler_schemas(body):
    """Z.ai's request (a dict) with plain words in the schemas of its tools, for a
    further try where Z.ai may have refused them; None if they have no other."""
    tools = body.get("tools", [])
    simpler = list(map(simpler_tool, tools))
    return None if simpler == tools else {**body, "tools": simpler}


# From Z.ai ############################################################################
#
# Z.ai's bytes in, steps out. An Answer reads head, framing, and server-sent events or
# one JSON body. Its Translator leads the events through three rooms: Frames finds out
# what an event says, Texts what stands in text and thinking, Calls what belongs to
# which call. A step says one thing that happened, in no API's own words: the fronts, in
# the next section, put it into words. What is not known never passes as an answer, and
# what the API in front promises is kept here, not hoped for from Z.ai.
#
# Z.ai's event is a chunk of OpenAI's chat completions: its `delta` holds what is new,
# text in `content`, thinking in `reasoning_content`, and pieces of calls in
# `tool_calls`.

TEXT, THINKING, CALL, ARGUMENTS = "text", "thinking", "call", "arguments"
FINISH, RESTART = "finish", "restart"


class Step(NamedTuple):
    """One thing that happened in an answer.

    TEXT and THINKING bring `text`. CALL begins the tool call number `index` (from 0):
    `id`, `name`, and in `text` the first piece of its arguments, which may be empty.
    ARGUMENTS brings the next piece; no other call comes between. FINISH comes last and
    once: `text` is one of the values of FINISHES, below; `name` is the stop word that
    ended the text, if one did; `usage` is OpenAI's object, None if Z.ai gave none.
    RESTART: Z.ai began the answer again, so that what came before is void.
    """

    kind: str
    text: str = ""
    index: int | None = None
    id: str | None = None
    name: str | None = None
    usage: dict | None = None


def extend(runs, step):
    """Put a step behind others, which are a list of (first step, texts): pieces of one
    kind that came together are one. Each would become an event for the client, with ten
    times its bytes. True if it begins another."""
    first = runs[-1][0] if runs else Step("")
    begins = step.index != first.index or step.kind not in (first.kind, ARGUMENTS)
    if begins:
        runs.append((step, []))
    runs[-1][1].append(step.text)
    return begins


def joined(runs):
    """The steps of such a list."""
    return [Step(first.kind, "".join(texts), *first[2:]) for first, texts in runs]


# The ends that Z.ai documents, and two that gateways in front of it use. Any other
# reason, such as network_error, means that the answer was broken off.
FINISHES = {
    "stop": "stop",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "length": "length",
    "sensitive": "content_filter",
    "content_filter": "content_filter",
    "model_context_window_exceeded": "context_window",
}
# With these an answer is whole, or may become so; with the others it was cut.
WHOLE = (None, "stop", "tool_calls")
# An answer that is held as a whole takes that many bytes of memory at most.
LONGEST_ANSWER_BYTES = 4 << 20
# So many characters may wait until it is clear what they are.
LONGEST_HELD = 1 << 20
# So many characters of words may come before the JSON that was asked for.
LONGEST_EARLY = 1 << 16
# No tool has a longer name.
LONGEST_TOOL_NAME = 200
# There may be as many tools, and a model calls each of them once at most.
MOST_CALLS = 128
# A count of tokens beyond this is garbage, and read as 0.
MOST_TOKENS = 10 ** 12


# The first room: events

# The fields of a delta with the kind of step they are.
KIND_OF_FIELD = {"reasoning_content": THINKING, "content": TEXT}
# What they hold. In another form they cannot be told.
FORMS = {"reasoning_content": str, "content": str, "tool_calls": list}
# The fields of an error that is not under "error".
ERROR_FIELDS = {"code", "msg", "message", "detail"}
TORN = "Z.ai sent an event that cannot be read."

USAGE_DETAILS = {
    "prompt_tokens_details": "cached_tokens",
    "completion_tokens_details": "reasoning_tokens",
}


def token_count(usage, name):
    value = usage.get(name)
    return value if type(value) is int and 0 <= value < MOST_TOKENS else 0


def to_openai_usage(usage):
    """OpenAI's usage object; None if `usage` is not an object. A count that is missing
    or garbage is 0: the details differ by model, and VS Code reads them unasked."""
    if not isinstance(usage, dict):
        return None
    result = {name: token_count(usage, name) for name in ("prompt_tokens", "completion_tokens")}
    result["total_tokens"] = sum(result.values())
    for name, detail in USAGE_DETAILS.items():
        result[name] = {detail: token_count(as_dict(usage.get(name)), detail)}
    return result


class Frame(NamedTuple):
    """What one event says."""
    texts: list                 # (kind of step, text)
    items: list | None = None   # of `tool_calls`
    reason: object = None       # Z.ai's finish reason
    usage: dict | None = None   # OpenAI's object
    afresh: bool = False        # the answer begins again with it


# A frame inside of a torn one: the last that begins so, as the quote would be escaped
# in a text.
INNER_FRAME = re.compile(r'.*data: (\{".*)', re.DOTALL)
# What begins a tag, and the first half of a letter.
SPECIAL = re.compile("<|[\ud800-\udbff]\\Z")


class Alike(NamedTuple):
    """An event that was a text and nothing else. Nine of ten differ from the one before
    in their text alone: read(event) -> that text; None if it is another event, or if
    there is more to be done with the text."""
    kind: str
    before: str
    behind: str

    def read(self, event):
        if not event.startswith(self.before):
            return None
        try:
            text, end = scan_string(event, len(self.before), False)
        except ValueError:
            return None
        is_alike = event[end:] == self.behind and not SPECIAL.search(text)
        return text if is_alike else None


def find_alike(event, frame):
    """The Alike of an event that says this, if it was one."""
    if len(frame.texts) != 1 or any(frame[1:]):
        return None
    kind, text = frame.texts[0]
    before, *behind = event.split(quote(text))
    return Alike(kind, before + '"', *behind) if len(behind) == 1 else None


class Frames:
    """Texts of events in, what they say out: feed(event, finished) -> a Frame, or None
    if it says nothing. An event is that of a stream, or a whole JSON answer; with
    `finished`, a reason to finish came before it. UpstreamError for an error of Z.ai's,
    for what has an unknown form, and for a frame that is lost. describe(value) makes
    the error of an event."""

    # How many events were skipped or mended.
    repaired = 0

    def __init__(self, describe):
        self.describe = describe

    def feed(self, event, finished=False):
        event = event.strip()
        try:
            value, end = scan_json(event, 0)
        except NO_JSON:
            value, end = None, 0
        if isinstance(value, dict) and end == len(event):
            return self._read(value)
        self.repaired += not event.startswith("[DONE]")
        # Behind a whole frame it is not known what belongs to which.
        inner = None if end else INNER_FRAME.match(event)
        value = as_dict(inner and decode_first(inner.group(1)))
        if "choices" in value or "error" in value:
            # Z.ai's gateway loses its backend in the middle of a frame, and begins
            # again with another one, in the same stream.
            return self._read(value)._replace(afresh=True)
        # What it said is lost. Behind the finish that is the usage at most.
        if event.startswith("{") and not finished:
            raise UpstreamError(TORN)
        return None

    def _read(self, value):
        choices = value.get("choices")
        # Errors come in a response of status 200 as well.
        if value.get("error") or choices is None and ERROR_FIELDS & value.keys():
            raise self.describe(value)
        choice = as_dict(choices[0] if choices and isinstance(choices, list) else None)
        delta = as_dict(choice.get("delta") or choice.get("message"))
        for field, form in FORMS.items():
            if delta.get(field) and not isinstance(delta[field], form):
                raise UpstreamError(f"Z.ai sent {field} in an unknown form.")
        texts = [
            (kind, delta[field]) for field, kind in KIND_OF_FIELD.items() if delta.get(field)]
        return Frame(
            texts, delta.get("tool_calls"), choice.get("finish_reason"),
            to_openai_usage(value.get("usage")))


# The second room: texts

# Marks of GLM's own template that were seen in texts: thinking in the content of 4.1V,
# boxes around the answers of 4.5V, and tool calls in texts and thinking of 4.5 to 4.7.
THINK, THINK_END = "<think>", "</think>"
BOXES = re.compile(r"<\|(?:begin|end)_of_box\|>")
LEAK, LEAK_END = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
# Who speaks next, seen at the ends of texts of 4.6V.
TURNS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
ARGUMENT_TAGS = (KEY, KEY_END, VALUE, VALUE_END)
TAGS = (THINK, THINK_END, LEAK, LEAK_END, *ARGUMENT_TAGS, *TURNS)
LONGEST_TAG = 16


class TagSplitter:
    """Cuts a text that comes in pieces at TAGS: feed(text) -> tags, and texts between
    them, without BOXES. What may become a tag is held back, and so is half a letter:
    JSON spells some in two (surrogates), and Z.ai was seen to cut there."""

    PATTERN = re.compile(f"({'|'.join(map(re.escape, TAGS))})")
    # What is held back at the end of a text.
    BEGINNING = re.compile("(?:<[a-z_/|]*|[\ud800-\udbff])?\\Z")

    held = ""

    def feed(self, text):
        if self.held:
            text = self.held + text
            # Two halves become one letter.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        *pieces, last = self.PATTERN.split(BOXES.sub("", text))
        self.held = self.BEGINNING.search(last[-LONGEST_TAG:]).group()
        pieces.append(last[:len(last) - len(self.held)])
        return list(filter(None, pieces))

    def close(self):
        held = self.held
        self.held = ""
        return [held] if held else []


class JsonAlone:
    """Takes all words and fences off the JSON in a text that comes in pieces. A text
    without any stays as it is.

    Models explain and fence their JSON though it was asked for alone, and clients
    cannot parse it then.
    """

    # Words have brackets, too: a set {a, b}, a note [1].
    START = re.compile(r'''
        \{ \s{0,99} ["}]
        | \[ \s{0,99} (?: ["{}\[\]] | -?[\d.]{1,20} \s{0,9} , | true | false | null )
        ''', re.VERBOSE)
    LONGEST_START = 200

    held = ""
    # What the rest goes through, once the JSON has begun; str if there will be none.
    follow = None

    def feed(self, text):
        if not self.follow:
            searched = max(0, len(self.held) - self.LONGEST_START)
            text = self.held + text
            self.held = ""
            start = self.START.search(text, searched)
            if start:
                self.follow = JsonProgress().feed
                text = text[start.start():]
            elif len(text) > LONGEST_EARLY:
                self.follow = str
            else:
                self.held = text
                return ""
        return self.follow(text)

    def close(self):
        return self.held


class StopCutter:
    """Ends a text that comes in pieces before the first of some words. Then `hit` is
    that word."""

    held = ""
    hit = None

    def __init__(self, words):
        self.words = words

    def feed(self, text):
        if self.hit:
            return ""
        text = self.held + text
        self.held = ""
        # A pattern of all words would compare each of them at each place. The first to
        # end counts, as more of the text might not have come yet.
        found = [
            (text.find(word) + len(word), word)
            for word in self.words if word in text]
        if found:
            end, self.hit = min(found)
            return text[:end - len(self.hit)]
        # The end of the text may be the beginning of a word.
        for size in range(max(map(len, self.words)) - 1, 0, -1):
            if text.endswith(tuple([word[:size] for word in self.words])):
                self.held = text[-size:]
                break
        return text[:len(text) - len(self.held)]

    def close(self):
        """The rest of the text. Z.ai was seen to stop at a word with all but its last
        letters in the text: those go. Fewer than four may as well be meant."""
        return self.held if len(self.held) < 4 else ""


# GLM's own form of a call,
# <tool_call>name<arg_key>k</arg_key><arg_value>v</arg_value>... </tool_call>, was seen
# in texts, with tags of it missing or doubled, and in names.
MARKUP = re.compile("|".join((LEAK, LEAK_END, *ARGUMENT_TAGS)))
ARGUMENT_TAG = re.compile(f"({'|'.join(ARGUMENT_TAGS)})")


def typed(text, types):
    """A text as the value that it says, if it may be of one of these `types`, and no
    text; without types, of any."""
    value = decode_or_none(text)
    if value is None:
        # What is no JSON is None, and so is JSON's null.
        return None if "null" in types and text.strip() == "null" else text
    name = TYPE_NAMES[type(value)]
    fits = not types or name in types or name == "integer" and "number" in types
    return value if fits and "string" not in types else text


def parse_leaked_call(text, tools):
    """A call in GLM's own form as an item of `tool_calls`; None if it names no tool of
    `tools`, or if its keys and values cannot be told apart.

    Any tag separates, as they were seen missing and doubled. Cut by hand, as a regular
    expression for all of it would take quadratic time.
    """
    head, *parts = ARGUMENT_TAG.split(text.partition(LEAK_END)[0])
    name = head.replace(LEAK, "").strip()
    if name not in tools:
        return None
    arguments = {}
    key = None
    next_tags = [*parts[2::2], LEAK_END]
    for tag, value, next_tag in zip(parts[::2], parts[1::2], next_tags):
        word = value.strip()
        if key is None:
            if word and tag != KEY and next_tag != KEY_END or word in arguments:
                return None
            key = word or None
        # An empty value is one, too.
        elif word or tag == VALUE != next_tag or next_tag == VALUE_END:
            arguments[key] = typed(value, tools[name].get(key, set()))
            key = None
    return None if key else function_object(name=name, arguments=encode_text(arguments))


class Leak:
    """A <tool_call> in a text or in thinking: feed(piece) -> whether more of it may
    come. It is held back only while it can still be a call of a tool that was sent, as
    models write about the tag as well."""

    held = 0  # characters in the pieces
    # What stands before the first tag of an argument, and whether that has come.
    name = ""
    is_named = False
    is_closed = False  # the call, or its last value, has ended

    def __init__(self, tools):
        self.tools = tools
        self.pieces = [LEAK]

    def feed(self, piece):
        self.pieces.append(piece)
        self.held += len(piece)
        self.is_closed = piece in (VALUE_END, LEAK_END) or self.is_closed and piece.isspace()
        if piece in ARGUMENT_TAGS:
            self.is_named = True
        # The first tag may be doubled, and blanks were seen around the name.
        elif not self.is_named and piece != LEAK:
            self.name += piece.strip()
        fits = self.name in self.tools if self.is_named else any(
            tool.startswith(self.name) for tool in self.tools)
        return fits and piece != LEAK_END and self.held <= LONGEST_HELD


class Texts:
    """Text and thinking in, what can be told of them out: feed(kind, text) -> steps;
    flush() -> what waits until it is clear what it is; close(is_cut) -> the rest.

    A text passes through `filters`, one behind the other; thinking does not. Calls that
    leak into either are collected in `leaked`.
    """

    # What feed() has brought last, and what it is: between <think> and </think> a text
    # is thinking.
    source = kind = TEXT
    # The Leak that is coming, if one is.
    leak = None

    def __init__(self, asked):
        self.tools = asked.tools
        self.cutter = StopCutter(asked.stop)
        self.filters = [self.cutter] if asked.stop else []
        if asked.json:
            self.filters.append(JsonAlone())
        self.splitter = TagSplitter()
        # TEXT and THINKING, once something of it has come.
        self.opened = set()
        self.leaked = []
        # (kind, text, call) of what goes if nothing follows: tags of the template, and
        # calls in thinking. If something does, those were only thought of.
        self.tail = []

    def passes(self, kind):
        """Whether a text of this kind just goes on."""
        is_busy = self.splitter.held or self.leak or self.tail or self.filters
        return kind == self.kind and kind in self.opened and not is_busy

    def feed(self, kind, text):
        self.steps = []
        if kind != self.source:
            self.flush()
            self.source = self.kind = kind
        self._sort(self.splitter.feed(text))
        return self.steps

    def flush(self, is_cut=False):
        self.steps = []
        self._sort(self.splitter.close())
        if self.leak:
            self._end_leak(is_cut)
        return self.steps

    def close(self, is_cut):
        steps = self.flush(is_cut)
        self.leaked += [call for _, _, call in self.tail if call]
        text = ""
        for text_filter in self.filters:
            text = text_filter.feed(text) + text_filter.close()
        return [*steps, Step(TEXT, text)] if text else steps

    def _sort(self, pieces):
        for piece in pieces:
            kind = self.kind
            if self.leak and self.leak.is_closed and piece == LEAK:
                # The end of the one is missing before the next.
                self._end_leak()
            if self.cutter.hit:
                break
            elif self.leak:
                if not self.leak.feed(piece):
                    self._end_leak()
            # The end of a call may be doubled.
            elif piece == LEAK_END and (self.leaked or self.tail):
                continue
            # Later in a text, somebody writes about <think>.
            elif piece in (THINK, THINK_END) and (
                    kind != self.source or kind not in self.opened):
                self.kind = THINKING if piece == THINK else self.source
            elif piece == LEAK and self.tools:
                self.leak = Leak(self.tools)
            elif piece in TURNS and kind in self.opened or self.tail and piece.isspace():
                # A model may go on so until its limit.
                self.tail = [*self.tail[:MOST_CALLS], (kind, piece, None)]
            elif piece not in TURNS:
                self._show(kind, piece)

    def _end_leak(self, is_cut=False):
        """A leak has ended, as a call if it is whole and can be read, or as a text."""
        leak = self.leak
        self.leak = None
        text = "".join(leak.pieces)
        call = parse_leaked_call(text, self.tools) if leak.is_closed and not is_cut else None
        if call and self.kind == THINKING:
            self.tail.append((THINKING, text, call))
        elif call:
            self._show(TEXT, "")
            self.leaked.append(call)
        else:
            self._show(self.kind, text)
        check_number(self.leaked + self.tail)

    def _show(self, kind, text):
        # A tag that ended a stretch of thinking goes, though a text follows.
        runs = [(lane, words) for lane, words, call in self.tail if call or lane == kind]
        self.tail = []
        for lane, words in [*runs, (kind, text)]:
            if lane not in self.opened:
                # GLM 4.5 to 4.7 open with line ends.
                words = words.lstrip("\r\n")
            if words:
                self.opened.add(lane)
            if lane == TEXT:
                for text_filter in self.filters:
                    words = text_filter.feed(words)
            if words:
                self.steps.append(Step(lane, words))


# The third room: calls

# Empty arguments, alone or before the real ones.
NO_ARGUMENTS = re.compile(r'\A(?:\{\}\s*)+(?=["{]|\Z)')
BROKEN_CALL = "Z.ai sent a tool call with broken arguments."


def check_number(calls):
    """The bound of calls, and of their pieces in one event."""
    if len(calls) > MOST_CALLS:
        raise UpstreamError(f"Z.ai made more than {MOST_CALLS} tool calls.", GIVE_UP)


class ToolCall(JsonProgress):
    """One tool call under way: feed(text) takes the next piece of its arguments, and
    take() gives what the client can be told of the call by now.

    Empty arguments go if real ones follow, and so does what stands behind the whole:
    Z.ai was seen to write arguments twice. What was encoded twice is decoded, markup
    goes from names, and where no text may be, the value that it says stands in its
    place. What is held back is one name, or one value of those kinds; texts go on.
    """

    untold = ""  # arguments that can be told
    waiting = ""  # those that are held back: "{}" as long as there are no others
    begun = False  # real ones have come
    # The sign before a name or a value, and the name that a value belongs to.
    sign = ""
    key = None

    def __init__(self, step, types):
        self.step = step  # the next one, without its text
        self.types = types  # argument_types() of the tool

    def feed(self, text):
        if not self.begun:
            given = self.waiting + text.lstrip()
            text = NO_ARGUMENTS.sub("", given)
            self.begun = bool(text)
            self.waiting = "{}" if given and not text else ""
        self.untold += self._read(text)
        # Real arguments behind empty ones would be lost.
        if self.key is None and '"' in self.rest:
            raise UpstreamError(BROKEN_CALL)

    def close(self, is_cut):
        """No more will come."""
        if not is_cut and (self.depth > 0 or self.in_string):
            raise UpstreamError(BROKEN_CALL)
        self.untold += self.waiting if self.begun or is_cut else "{}"
        self.waiting = ""

    def take(self):
        step = self.step._replace(text=self.untold)
        self.untold = ""
        self.step = step._replace(kind=ARGUMENTS)
        return [step] if step.text or step.kind == CALL else []

    def _read(self, text):
        told = []
        for piece, is_string in self.pieces(text):
            types = self.types.get(self.key, ("string",))
            if not is_string:
                self.sign = (self.sign + piece).rstrip()[-1:]
            elif self.sign != ":" or "string" not in types:
                piece = self.waiting + piece
                self.waiting = ""
                if not self.in_string:
                    piece = self._mend(piece)
                elif len(piece) <= LONGEST_HELD:
                    self.waiting = piece
                    continue
            told.append(piece)
        return "".join(told)

    def _mend(self, text):
        value = decode_or_none(text)
        if value is None:
            return text
        if self.depth == 0:
            is_encoded_twice = isinstance(decode_or_none(value), dict)
            return self._read(value) if is_encoded_twice else text
        if self.sign == ":":
            mended = typed(value, self.types[self.key])
        else:
            mended = self.key = MARKUP.sub("", value).strip() if "<" in value else value
        return text if mended is value else encode_text(mended)


class Calls:
    """Items of `tool_calls` in, whole calls or pieces of them, and steps of calls out:
    feed(items), and close(is_cut) for the rest. If no arguments at all have come, that
    was meant, unless the answer was cut.

    Clients join the pieces of calls by their order, so one call comes after the other:
    while the arguments of one are not whole, what comes behind it waits. put(steps)
    gives those of other steps that need not.
    """

    def __init__(self, tools, make_id):
        self.tools = tools
        self.make_id = make_id
        self.calls = {}  # by their ids
        self.latest = {}  # the last one at each index of Z.ai's
        # The first that is not whole and those behind it; behind them, other steps.
        self.queue = collections.deque()
        self.held = Fold()

    def feed(self, items):
        check_number(items)
        for item in map(as_dict, items):
            name, arguments = self._read_function(as_dict(item.get("function")))
            call = self._find_call(item, name)
            call.feed(arguments)
            yield from self.close()
            if len(call.untold) > LONGEST_HELD:
                raise UpstreamError("Z.ai sent too much of a tool call too early.")

    def put(self, steps):
        if not self.queue:
            return steps
        self.held.add(steps)
        return ()

    def _read_function(self, function):
        """(name, arguments) as texts. Names were seen with markup in them, and with all
        the arguments behind."""
        name = function.get("name")
        name = name.strip() if isinstance(name, str) else ""
        arguments = function.get("arguments")
        if arguments in (None, "null"):
            arguments = ""
        elif not isinstance(arguments, str):
            arguments = encode_text(arguments)
        leaked = parse_leaked_call(name, self.tools) if "<" in name else None
        if leaked:
            name, behind = leaked["function"].values()
            arguments = behind if behind != "{}" else arguments
        # A name that no tool has is for the client to refuse.
        return name[:LONGEST_TOOL_NAME], arguments

    def _find_call(self, item, name):
        """The call an item belongs to: the last one at its index, which Z.ai may leave
        out, or have -1 or 0 for all. Its id may be a number, missing, repeated, or
        another for each piece."""
        index = str(item.get("index"))
        id = str(item.get("id") or "")[:200]
        call = self.latest.get(index)
        is_whole = call and (call.ended or call.waiting == "{}")
        # A name again is the same call as long as its arguments are not whole.
        is_same = call and name == call.step.name and (id == call.step.id or not is_whole)
        if is_same or call and not name:
            return call
        if not name:
            raise UpstreamError("Z.ai sent a piece of a tool call that belongs to none.")
        # Clients take two calls with one id for one.
        if not id or id in self.calls:
            id = self.make_id()
        step = Step(CALL, "", len(self.calls), id, name)
        call = ToolCall(step, self.tools.get(name, {}))
        self.calls[id] = self.latest[index] = call
        self.queue.append(call)
        check_number(self.calls)
        return call

    def close(self, is_cut=None):
        """The steps of all that waits; without `is_cut`, of what need not any more."""
        while self.queue:
            call = self.queue[0]
            if is_cut is not None:
                call.close(is_cut)
            yield from call.take()
            if is_cut is None and not call.ended:
                return
            self.queue.popleft()
        yield from self.held.items
        self.held = Fold()


EMPTY = "Z.ai sent an empty answer."
UNFINISHED = "Z.ai's answer ended before it was finished."


class Translator:
    """Z.ai's events in, steps out: feed(events) -> (steps, failure).

    An event is a text for Frames; with `end`, no more will come. `failure` is the
    UpstreamError that ended the answer, or None. An answer fails if Z.ai sends an
    error, or what cannot be told in steps, or ends without a finish; behind the last
    step nothing fails. What came before the failure is told all the same. `asked`: what
    Z.ai was asked; describe(value, status, retry_after) makes the error of an error
    event, which has a `value` alone, or of a body, whose value is None if it cannot be
    read; `restartable`: the client sees nothing before the end, so that a new start
    does no harm; make_id() names calls without an id.
    """

    # The Alike that the next event may be.
    alike = None
    # Tokens have come, which Z.ai bills.
    begun = False
    # The last step has been given.
    complete = False

    def __init__(self, asked, describe, restartable=False, make_id=new_call_id):
        self.asked = asked
        self.restartable = restartable
        self.make_id = make_id
        self.frames = Frames(describe)
        self._start()

    def _start(self):
        """All that a new start of the answer makes void."""
        self.finish = None
        self.usage = None
        # Text or a call has been given. Thinking alone can be taken back.
        self.told = False
        # With stop words, the tokens of what was told.
        self.tokens = 0
        # Thinking that was turned off. If nothing else comes, it is the text.
        self.unasked = Fold()
        self.texts = Texts(self.asked)
        self.calls = Calls(self.asked.tools, self.make_id)

    @property
    def stop_word(self):
        """The stop word that has ended the text, if one has."""
        return self.texts.cutter.hit

    def feed(self, events, end=False):
        # All methods below put their steps there, so that nothing is lost when one of
        # them raises.
        self.runs = []
        try:
            for event in events:
                if not self.complete:
                    self._feed(event)
            if end and not self.complete:
                self._end()
        except UpstreamError as failure:
            # A variable of this frame, which the error's traceback holds, must not hold
            # the error: such a circle is freed late.
            return joined(self.runs), None if self.complete else failure
        return joined(self.runs), None

    def _feed(self, event):
        text = self.alike and self.alike.read(event)
        if text:
            extend(self.runs, Step(self.alike.kind, text))
            return
        self.alike = None
        frame = self.frames.feed(event, bool(self.finish))
        if frame:
            self._read(frame)
            alike = find_alike(event, frame)
            if alike and self.texts.passes(alike.kind) and not self.calls.queue:
                self.alike = alike
        # Nothing comes behind finish and usage but the end mark, late or never. Without
        # a finish the answer is not whole, whatever the mark says. And Z.ai would go on
        # behind a stop word.
        if self.finish and self.usage or self.stop_word:
            self._end()

    def _read(self, frame):
        if frame.afresh:
            if self.told and not self.restartable:
                raise UpstreamError(
                    "Z.ai lost its place and started the answer again after part of it"
                    " had been sent.", GIVE_UP, code="upstream_stream_restarted")
            self._start()
            extend(self.runs, Step(RESTART))
        for kind, text in frame.texts:
            if text.strip("\r\n"):
                self.begun = True
            if kind == THINKING and self.asked.no_thinking:
                self.unasked.put(Step(kind, text))
            else:
                self._put(self.texts.feed(kind, text))
        if frame.items and not self.stop_word:
            self.begun = True
            # What is held back came first.
            self._put(self.texts.flush())
            self._add(self.calls.feed(frame.items))
        self.usage = frame.usage or self.usage
        if frame.reason:
            finish = FINISHES.get(str(frame.reason))
            if finish is None:
                raise UpstreamError(f"Z.ai broke off the answer: {str(frame.reason)[:60]!a}.")
            # It may come twice. What was cut does not get whole again.
            if self.finish in WHOLE:
                self.finish = finish

    def _put(self, steps):
        """What comes behind a call that is not whole has to wait."""
        self._add(self.calls.put(steps))

    def _add(self, steps):
        for step in steps:
            # Further calls came unasked.
            if not (step.index and self.asked.one_call):
                self.told = self.told or step.kind != THINKING
                extend(self.runs, step)
                if self.asked.stop:
                    self.tokens += estimate_tokens(step.text)

    def _end(self):
        # A finish alone makes no answer: Z.ai at its limits was seen to send one with
        # nothing before it.
        has_tokens = self.begun or dig(self.usage, "completion_tokens")
        if not has_tokens and self.finish in (None, "stop"):
            raise UpstreamError(EMPTY)
        if not self.finish and not self.stop_word:
            raise UpstreamError(UNFINISHED)
        is_cut = self.finish not in WHOLE
        calls = self.calls.calls
        if not self.texts.opened and not calls:
            for item in self.unasked.items:
                self._put(self.texts.feed(TEXT, item.text))
        self._put(self.texts.close(is_cut))
        # Where calls came as they should, the leaked ones are the same once more.
        if not calls:
            self._add(self.calls.feed(self.texts.leaked))
        if self.finish == "tool_calls" and not calls and not self.stop_word:
            raise UpstreamError("Z.ai announced a tool call and sent none.")
        self._add(self.calls.close(is_cut))
        if self.stop_word and not self.usage:
            # Z.ai's counts come at its own end. Programs that send stop words, such as
            # smolagents, read the usage unasked.
            self.usage = to_openai_usage(
                {"prompt_tokens": self.asked.tokens, "completion_tokens": self.tokens})
        reason = self.finish
        # Clients look at the finish to learn whether there are calls to make.
        if reason in WHOLE:
            reason = "tool_calls" if calls else "stop"
        self.complete = True
        stop_word = self.stop_word if reason == "stop" else None
        extend(self.runs, Step(FINISH, reason, name=stop_word, usage=self.usage))


class Reply:
    """One HTTP response of Z.ai: feed(data) -> bytes of its body; b"" means that the
    connection has ended.

    `status` is None until the head is there. `complete`: the body has ended.
    UpstreamError if that is not HTTP, if the coding is broken, and for a cut.
    """

    status = None
    keeps_alive = False
    complete = False

    def __init__(self):
        self.head = HeadReader()
        self.fields = {}
        self.framing = Unframed()

    def feed(self, data):
        ended = not data
        try:
            while self.status is None:
                head = self.head.feed(data)
                if head is None:
                    if ended:
                        raise UpstreamError(
                            "The connection to Z.ai was closed before its answer.")
                    return b""
                data = self.head.rest
                self._read_head(head)
            body = self.framing.feed(data)
        except (ValueError, OverflowError) as error:
            raise UpstreamError(f"Z.ai's answer is broken: {error}.") from None
        self.complete = self.framing.done or ended and type(self.framing) is Unframed
        self.keeps_alive = self.keeps_alive and not ended
        if ended and not self.complete:
            raise UpstreamError("The connection to Z.ai was cut in the middle of an answer.")
        return body

    def _read_head(self, head):
        version, status, fields = parse_response_head(head)
        # 100 and 103 come before the real one.
        if status < 200:
            self.head = HeadReader()
            return
        self.status = status
        self.fields = fields
        options = fields.get("connection", "").lower()
        self.keeps_alive = version != "HTTP/1.0" and "close" not in options
        # A length that was sent twice has been joined by a comma.
        length = LENGTH.match(fields.get("content-length", ""))
        if "chunked" in fields.get("transfer-encoding", "").lower():
            self.framing = Dechunker()
        elif length:
            self.framing = Counted(int(length.group()))

    @property
    def reusable(self):
        """Whether the connection may serve another request: nothing stands behind the
        end."""
        return self.complete and self.keeps_alive and not self.framing.rest


def only_event(data):
    """The event in these bytes, if they are one chunk with one event in it, as mostly;
    else None. It is all there is to be read then."""
    event = data.partition(b"data: ")[2][:-4]
    is_all = data == b"%x\r\ndata: %b\n\n\r\n" % (len(event) + 8, event)
    return event.decode("utf-8", "replace") if is_all and event.splitlines() == [event] else None


class Answer:
    """Z.ai's answer to one chat request: feed(data) -> (steps, failure); b"" means that
    the connection has ended.

    `complete`: the last step has been given, or a failure. `begun`: tokens have come,
    so that another attempt would be paid twice.
    """

    LONGEST_ERROR_BYTES = 1 << 18

    complete = False

    def __init__(self, translator):
        self.translator = translator
        self.reply = Reply()
        self.decoder = SSEDecoder()
        self.refusal = bytearray()

    @property
    def begun(self):
        return self.translator.begun or self.translator.complete

    @property
    def is_ending(self):
        """Whether the finish has come, and only the usage, the end mark or the end of
        the body is waited for."""
        return self.complete or bool(self.translator.finish)

    def feed(self, data):
        framing = self.reply.framing
        # Nothing of the next event has come.
        is_between = not (framing.left or framing.rest or self.decoder.held)
        event = is_between and self.reply.status == 200 and only_event(data)
        steps, failure = self.translator.feed([event]) if event else self._feed(data)
        self.complete = self.translator.complete or failure is not None
        return steps, failure

    def _feed(self, data):
        cut = None
        try:
            body = self.reply.feed(data)
        except UpstreamError as error:
            cut = error
            # What was whole before it.
            body = self.reply.framing.take()
        if self.reply.status is None:
            return [], cut
        ended = self.reply.complete or cut
        steps, failure = self.translator.feed(self._read(body, ended), ended)
        # A cut explains a missing end better; behind the finish it does no harm.
        if cut and failure and failure.message in (EMPTY, UNFINISHED, TORN):
            failure = cut
        return steps, failure

    def _read(self, body, ended):
        """The events in a piece of the body. One JSON body, on one line, is an event,
        too."""
        reply = self.reply
        if reply.status != 200:
            # No events, but an error at the end. Gateways write something before it,
            # such as "data: ", and behind it.
            self.refusal += body[:self.LONGEST_ERROR_BYTES - len(self.refusal)]
            if ended:
                text = self.refusal.decode("utf-8", "replace")
                value = decode_first(text[text.find("{"):])
                retry_after = reply.fields.get("retry-after", "")
                raise self.translator.frames.describe(value, reply.status, retry_after)
        elif "html" in reply.fields.get("content-type", "").lower():
            raise not_the_api()
        else:
            yield from self.decoder.feed(body)
            yield from self.decoder.close() if ended else ()


class Fold:
    """What a JSON answer is made of: all steps of an answer, but the last as `items`,
    and that as `end`. UpstreamError beyond LONGEST_ANSWER_BYTES."""

    # A Python object stands behind each piece, and several behind an item.
    STEP_BYTES = 20
    ITEM_BYTES = 2000

    def __init__(self):
        self.end = Step(FINISH)
        self._start()

    def _start(self):
        self.runs = []
        self.size_bytes = 0

    def add(self, steps):
        for step in steps:
            if step.kind == RESTART:
                self._start()
            elif step.kind == FINISH:
                self.end = step
            else:
                self.put(step)

    def put(self, step):
        """The same of one step; True if it begins an item."""
        begins = extend(self.runs, step)
        text_bytes = len(step.text.encode("utf-8", "replace"))
        self.size_bytes += text_bytes + self.STEP_BYTES + begins * self.ITEM_BYTES
        if self.size_bytes > LONGEST_ANSWER_BYTES:
            raise UpstreamError(
                f"The answer is longer than {LONGEST_ANSWER_BYTES} bytes.", GIVE_UP)
        return begins

    @property
    def items(self):
        """A step for each text, stretch of thinking and call."""
        return joined(self.runs)


# Fronts ###############################################################################
#
# The APIs that clients speak, a class each, an object a request: read() says where
# things are in what the client sent, tell() and whole() give the answer in the
# client's terms. To add an API, add a section behind this one and a row to ROUTES.

class Memory:
    """What fronts remember from one request to the next, within a bound of bytes:
    Responses' items and turns, as some clients refer to them by ids. Each client key
    finds its own values alone. Of the key that holds most the oldest go first. Nothing
    is written to disk."""

    LIMIT_BYTES = 16 << 20
    # What Python needs for a value beside its JSON.
    ENTRY_BYTES = 500

    def __init__(self):
        self.lock = threading.Lock()
        self.values = {}  # client key -> its values' JSON by their ids, the latest last
        self.sizes = collections.Counter()  # client key -> bytes

    def put(self, key, id, value):
        """`id` is a new one."""
        data = encode_request(value)
        with self.lock:
            self.values.setdefault(key, collections.OrderedDict())[id] = data
            self.sizes[key] += len(data) + self.ENTRY_BYTES
            while sum(self.sizes.values()) > self.LIMIT_BYTES:
                largest = max(self.sizes, key=self.sizes.get)
                _, data = self.values[largest].popitem(last=False)
                self.sizes[largest] -= len(data) + self.ENTRY_BYTES

    def get(self, key, id):
        """The value, which stays for as long as a new one; None without one."""
        with self.lock:
            values = self.values.get(key, {})
            if id not in values:
                return None
            values.move_to_end(id)
            data = values[id]
        return decode_strictly(data.decode())


class Caller(NamedTuple):
    """Who asks: the request's header fields, the client key that matched, the time in
    Unix seconds, and the server's Memory."""

    headers: dict
    key: str
    now: float
    memory: Memory

    def keep(self, id, value):
        self.memory.put(self.key, id, value)

    def recall(self, id):
        return self.memory.get(self.key, id)


class Front:
    """One API in front of Z.ai's. An object is one request, and what its answer must
    repeat. A class has, beside what stands here,

    read(body, caller, settings): a class method: (front, Request) for a client's JSON;
        RequestError in the client's terms.
    opening(): the SSE text before all steps; it is also the first sign of life.
    heartbeat(): SSE text that is harmless to every client of this API.
    _tell(step): the SSE text of a step, "" if there is nothing to say yet.
    whole(fold): the JSON answer, a dict.
    """

    # Whether a stream that fails ends without the last chunk of its coding, so that a
    # client that overlooks the error takes no half of an answer for the whole.
    cuts_failures = False
    # What became of the request, without its body.
    asked = Asked({}, b"", (), {}, {})

    def __init__(self, model, stream):
        self.model = model  # as the client named it
        self.stream = stream

    def find_tool(self, name):
        """The client's terms for what the model called. It may leave out a
        namespace."""
        owners = self.asked.owners
        if name in owners:
            return owners[name]
        bare = [tool for tool in owners.values() if tool["name"] == name]
        return bare[0] if len(bare) == 1 else {"name": name}

    def tell(self, steps):
        """The SSE text of some steps."""
        return "".join(map(self._tell, steps))

    def failure(self, error):
        """The SSE text that ends a stream badly."""
        return encode_event(self.error(error))

    @staticmethod
    def error(error, request_id=""):
        """The JSON of an error, a dict: OpenAI's shape."""
        names = ("message", "type", "param", "code")
        return {"error": {name: getattr(error, name) for name in names}}

    @staticmethod
    def status(error):
        """The HTTP status of an error."""
        return error.status


# Chat #################################################################################
#
# Every chunk is built anew: nothing of Z.ai's own bytes reaches a client.

# What tells of programs that read one JSON answer unless they ask for a stream
# themselves, as OpenAI's API does: their User-Agents, or what they accept. To add one,
# add a row.
EXPECTS_JSON = re.compile(r"""
    ai-sdk[/-]  # ai-sdk-provider-utils/5, too
    | async-openai  # Rust
    | lm15  # dspy
    | ^(?:node|undici)$  # fetch in Node, promptfoo
    | go-http-client | langchaingo
    | litellm/
    | ^java | okhttp | apache-httpclient
    | application/json  # as what is accepted
    """, re.IGNORECASE | re.VERBOSE | re.MULTILINE)

# Programs that lose what they have not yet read over a cut, and with it the error
# itself. So do browsers and Node, which send the headers.
LOSES_ERROR_OVER_CUT = re.compile("ai-sdk[/-]|aiohttp", re.IGNORECASE)
LOSING_HEADERS = {"origin", "sec-fetch-mode"}


# What a step's reason is called here, where it is not the same word.
CHAT_FINISHES = {"context_window": "length"}


class Chat(Front):
    """OpenAI's chat completions: POST /v1/chat/completions.

    Thinking is told as `reasoning` says: parsed (reasoning_content), raw (<think> in
    the text), or hidden.
    """

    # A <think> of ours is open.
    in_think = False

    def __init__(
        self, id, created, model, stream=True, include_usage=False, reasoning="parsed",
    ):
        super().__init__(model, stream)
        self.id = id
        self.created = created
        self.include_usage = include_usage
        self.reasoning = reasoning
        # Encoding the constant part anew would double the cost of a chunk.
        self.head = (f'data: {{"id":{encode_text(id)},"object":"chat.completion.chunk",'
                     f'"created":{created},"model":{encode_text(model)},"choices":[')
        self.tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    @classmethod
    def read(cls, body, caller, settings):
        request = without_nulls(body)
        # A parameter of OpenAI's SDK that users copy into JSON, where it means nothing.
        request = {**without_nulls(as_dict(request.get("extra_body"))), **request}
        changed = [name for name in request if name in DROPPED and asks(name, request[name])]
        if "input" in request and "messages" not in request:
            raise wrong("messages", "is missing: a request with 'input' goes to /v1/responses")
        if "functions" in request:
            raise wrong("functions", "is no longer supported: use 'tools'")
        client = lines(caller.headers.get("user-agent"), caller.headers.get("accept"))
        if "stream" not in request:
            request["stream"] = settings.default_stream and not EXPECTS_JSON.search(client)
        front = cls(
            id=new_id("chatcmpl-"),
            created=int(caller.now),
            model=str(request.get("model")),
            stream=request["stream"],
            include_usage=bool(dig(request, "stream_options.include_usage")),
            reasoning=request.get("reasoning_format", settings.reasoning_format))
        need_word(front.reasoning, REASONING_FORMATS, "reasoning_format")
        front.cuts_failures = not (
            LOSES_ERROR_OVER_CUT.search(client) or LOSING_HEADERS & caller.headers.keys())
        return front, Request(request, {}, changed)

    def opening(self):
        return self._chunk('{"role":"assistant","content":""}')

    def heartbeat(self):
        """An empty delta. An SSE comment would break clients that parse each line as
        JSON."""
        return self._chunk("{}")

    def _tell(self, step):
        # A string alone is quoted much faster than an object is encoded.
        text = "".join([
            self._chunk(f'{{"{field}":{quote(words)}}}') for field, words in self._words(step)])
        # Of a call, or of its arguments.
        if step.index is not None:
            call = {"function": {"arguments": step.text}}
            if step.kind == CALL:
                call = self._whole_call(step)
            call = encode_text({"index": step.index, **call})
            text += self._chunk('{"tool_calls":[' + call + "]}")
        return text + self._finish(step) if step.kind == FINISH else text

    def _words(self, step):
        """(field, text) of what a step says in words."""
        words = []
        is_thinking = step.kind == THINKING
        # NextChat knows thinking by chunks that begin and end with the tags.
        if self.reasoning == "raw" and is_thinking != self.in_think:
            self.in_think = is_thinking
            words.append(("content", THINK if is_thinking else THINK_END))
        if step.kind == TEXT or is_thinking and self.reasoning == "raw":
            words.append(("content", step.text))
        elif is_thinking and self.reasoning == "parsed":
            words.append(("reasoning_content", step.text))
        return words

    def _chunk(self, delta, finish_reason="null"):
        choice = f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish_reason}}}'
        return self.head + choice + self.tail

    def _finish(self, step):
        reason = CHAT_FINISHES.get(step.text, step.text)
        text = self._chunk("{}", quote(reason))
        if self.include_usage and step.usage:
            text += f'{self.head}],"usage":{encode_text(step.usage)}}}\n\n'
        return text + "data: [DONE]\n\n"

    def whole(self, fold):
        words = [pair for item in [*fold.items, fold.end] for pair in self._words(item)]
        content, thinking = [
            "".join([text for field, text in words if field == name])
            for name in ("content", "reasoning_content")]
        calls = [self._whole_call(item) for item in fold.items if item.kind == CALL]
        message = {"role": "assistant", "content": content, "refusal": None}
        if thinking:
            message["reasoning_content"] = thinking
        if calls:
            message.update(content=content or None, tool_calls=calls)
        answer = {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [{
                "index": 0,
                "message": message,
                "logprobs": None,
                "finish_reason": CHAT_FINISHES.get(fold.end.text, fold.end.text),
            }],
        }
        if fold.end.usage:
            answer["usage"] = fold.end.usage
        return answer

    def _whole_call(self, item):
        """The object of a tool call, from a Step."""
        name = self.find_tool(item.name)["name"]
        return {"id": item.id, **function_object(name=name, arguments=item.text)}


# What Messages and Responses share ####################################################
#
# Both call the fields of a request otherwise than chat, and tell an answer as a row of
# items, of which one is open: a text, a stretch of thinking, or a call.

def typed_event(type, **fields):
    """The SSE text of a value whose type is also the event's name."""
    text = encode_text({"type": type, **fields})
    return f"event: {type}\ndata: {text}\n\n"


def parse_names(text):
    """The client's paths to fields by chat's names of them: a word is "name=path", or
    one for both."""
    return {
        name: path or name
        for name, _, path in [word.partition("=") for word in text.split()]}


def chat_fields(body, names, others):
    """(fields, changed) of a Request. `others`: fields that are read one by one, and
    those that ask for nothing. What is not known is dropped by name: there are new ones
    each month."""
    fields = without_nulls({name: dig(body, path) for name, path in names.items()})
    heads = [path.partition(".")[0] for path in names.values()]
    known = {*others, *heads}
    changed = [
        name_of(name) for name, value in body.items()
        if name not in known and asks(name, value)]
    # These APIs take an absent "stream" for false, whatever DEFAULT_STREAM says.
    return {"stream": False, **fields}, changed


class Itemized(Front):
    """A front that tells an answer as a row of items, one of them open at any time.

    A class has `id_prefix`, with which an answer's id begins; `kept_statuses`, those of
    errors that go out as they are, though they cannot heal; _begin(item), _piece(text)
    and _end(item), which give the SSE text of an item's stages; and _finish(step),
    which sets `answer`, the JSON answer. _end() puts the item into `items`.
    """

    # Why the answer ended, and its JSON.
    finish = None
    answer = None

    def __init__(self, fields, hidden):
        super().__init__(fields.get("model", ""), fields["stream"])
        self.id = new_id(self.id_prefix)
        self.hidden = hidden  # thinking is not told
        self.open = Fold()  # the item that is open, if one is
        self.items = []  # the finished ones, in the client's terms

    def _tell(self, step):
        kind = step.kind
        # After a RESTART the thinking just goes on: nothing else has been told by then.
        if kind == RESTART or kind == THINKING and self.hidden:
            return ""
        if kind == FINISH:
            self.finish = step.text
            return self._close() + self._finish(step)
        text = ""
        if self.open.put(step):
            began = self.open.runs.pop()
            text = self._close() + self._begin(step)
            self.open.runs.append(began)
        return text + self._piece(step.text) if step.text else text

    def _close(self):
        ended = self.open.items
        self.open.runs.clear()
        return "".join(map(self._end, ended))

    def whole(self, fold):
        """The answer that the same steps give as a stream."""
        self.tell([*fold.items, fold.end])
        return self.answer

    @classmethod
    def status(cls, error):
        """What cannot heal is a 400 where nothing else is meant: agents show that at
        once, with our words alone, and repeat a 5xx up to 30 times."""
        if error.status in cls.kept_statuses and error.code != NO_MODEL.code:
            return error.status
        hopeless = error.retryable is False or error.status < 500
        return INVALID.status if hopeless else error.status


# For an answer without usage.
NO_USAGE = to_openai_usage({})


# Messages #############################################################################
#
# Anthropic's API, which Claude Code speaks. Its items are called blocks.

MESSAGES_NAMES = parse_names("""
    model messages tools tool_choice max_tokens temperature top_p stream user_id seed
    thinking output_config prompt=system stop=stop_sequences user=metadata.user_id
    response_format=output_config.format
""")
# How Claude Code asks Z.ai to keep the thinking of earlier turns.
KEEP_THINKING = {"type": "clear_thinking_20251015", "keep": "all"}
STOP_REASONS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "content_filter": "refusal",
    "context_window": "model_context_window_exceeded",
}
# How a block begins, its delta, and the delta's field that holds the text.
BLOCKS = {
    TEXT: ({"type": "text", "text": ""}, "text_delta", "text"),
    THINKING: (
        {"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta", "thinking"),
    CALL: ({"type": "tool_use", "input": {}}, "input_json_delta", "partial_json"),
}
ANTHROPIC_ERRORS = {
    401: "authentication_error",
    402: "billing_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    502: "api_error",
    503: "overloaded_error",
}
NO_THREADS = "thread_unsupported_request"


class Messages(Itemized):
    """Anthropic's Messages API: POST /v1/messages."""

    id_prefix = "msg_"
    # In front of a 403 Claude Code puts "Please run /login". At a 404 for a model it
    # tells of its own settings, and our words are lost.
    kept_statuses = (401, 402, 404, 405, 408, 413, 429, 503)

    @classmethod
    def read(cls, body, caller, settings):
        body = without_nulls(body)
        if "thread" in body:
            # Anthropic's SDK then sends the whole conversation.
            raise RequestError(
                "Threads are not kept here: send all messages.", "thread", code=NO_THREADS)
        names = MESSAGES_NAMES
        others = ["cache_control"]
        if "output_format" in body:
            names = {**names, "response_format": "output_format"}
        # Not to ask for thinking is to want none.
        thinking = {"type": "disabled", **as_dict(body.get("thinking"))}
        edits = dig(body, "context_management.edits")
        if isinstance(edits, list) and KEEP_THINKING in edits:
            thinking["clear_thinking"] = False
            others.append("context_management")
        fields, changed = chat_fields({**body, "thinking": thinking}, names, others)
        # A client that did not ask for thinking reads content[0] as the text.
        hidden = thinking["type"] == "disabled" or settings.reasoning_format == "hidden"
        return cls(fields, hidden), Request(
            fields, names, changed, agents=True, claude=True, prompt=fields.pop("prompt", None))

    def opening(self):
        usage = {**NO_USAGE, "prompt_tokens": self.asked.tokens}
        return typed_event("message_start", message=self._message(usage))

    def heartbeat(self):
        return typed_event("ping")

    def failure(self, error):
        return typed_event(**self.error(error))

    def _begin(self, item):
        block, self.delta_type, self.field = BLOCKS[item.kind]
        self.block = dict(block)
        if item.kind == CALL:
            self.block.update(id=item.id, name=self.find_tool(item.name)["name"])
        return self._event("start", content_block=self.block)

    def _piece(self, text):
        return self._event("delta", delta={"type": self.delta_type, self.field: text})

    def _end(self, item):
        text = self._event("stop")
        block = self.block
        if item.kind == CALL:
            block["input"] = decode_or_none(item.text)
        else:
            block[item.kind] = item.text
        if isinstance(block.get("input", {}), dict):
            self.items.append(block)
        # A call that was cut short is left out. Empty input would be a lie.
        elif self.finish in WHOLE:
            raise UpstreamError(BROKEN_CALL)
        return text

    def _finish(self, step):
        reason = "stop_sequence" if step.name else STOP_REASONS[step.text]
        delta = {"stop_reason": reason, "stop_sequence": step.name}
        self.answer = self._message(step.usage or NO_USAGE, content=self.items, **delta)
        end = typed_event("message_delta", delta=delta, usage=self.answer["usage"])
        return end + typed_event("message_stop")

    def _event(self, name, **fields):
        return typed_event(f"content_block_{name}", index=len(self.items), **fields)

    def _message(self, usage, **end):
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        # Anthropic counts the cached tokens apart.
        counts = {
            "input_tokens": max(0, usage["prompt_tokens"] - cached),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": counts,
            **end,
        }

    @staticmethod
    def error(error, request_id=""):
        error_type = ANTHROPIC_ERRORS.get(Messages.status(error), "invalid_request_error")
        told = {"type": error_type, "message": error.message}
        if error.code == "context_length_exceeded":
            # Claude Code shortens the conversation if it reads these words first.
            told["message"] = f"prompt is too long: {error.message}"
        if error.code == NO_THREADS:
            told["details"] = {"error_code": error.code}
        return {"type": "error", "error": told, "request_id": request_id or None}

    @classmethod
    def status(cls, error):
        """What money or a plan would heal is told as such."""
        return QUOTA.status if error.type == QUOTA.type else super().status(error)


# Responses ############################################################################
#
# OpenAI's other API, which Codex and the AI SDK speak. It refers to what was said
# before, so that some of it is kept in memory.

RESPONSES_NAMES = parse_names("""
    model temperature top_p user user_id stop seed stream parallel_tool_calls thinking
    enable_thinking reasoning tools tool_choice messages=input prompt=instructions
    max_completion_tokens=max_output_tokens response_format=text.format
""")
RESPONSES_OTHERS = """
    include store stream_options client_metadata background previous_response_id
""".split()
# What would need more than a memory.
STATEFUL = ("prompt", "conversation", "background")
# What a response repeats of its request: the type, the value if it was left out, names.
ECHO = (
    (NUMBER, 0, "frequency_penalty presence_penalty"),
    (NUMBER, 1.0, "temperature top_p"),
    (int, None, "max_output_tokens max_tool_calls"),
    (bool, True, "parallel_tool_calls store"),
    (str, None, "previous_response_id prompt_cache_key safety_identifier user"),
    (str, "disabled", "truncation"),
    ((str, dict), "auto", "tool_choice"),
    (dict, {}, "metadata"),
    (dict, {"effort": None, "summary": None}, "reasoning"),
    (dict, {"format": {"type": "text"}}, "text"),
)
LONGEST_ECHO_BYTES = 1 << 14
# The words for a summary that OpenAI has. VS Code says "off".
SUMMARIES = ("auto", "concise", "detailed")
# What a response has beside ECHO, at its beginning. The request's tools are not
# repeated: those of Codex have 40 KB, and nobody misses them.
RESPONSE = {
    "object": "response",
    "background": False,
    "service_tier": "default",
    "tools": [],
    "top_logprobs": 0,
    **dict.fromkeys(("completed_at", "error", "incomplete_details", "instructions", "usage")),
}
# What Codex sends last to have a conversation summed up that has become too long, and
# what the model is told then.
COMPACTION_TRIGGER = {"type": "compaction_trigger"}
COMPACT = (
    "Sum up this conversation for a model that will go on with it and sees nothing else of"
    " it: the task and every wish of the user, what was decided and done, names, paths,"
    " values and results that are still needed, what is open, and the next step. Write the"
    " summary alone.")
# Why an answer is not whole, by the finish of its steps.
INCOMPLETE = {
    "length": "max_output_tokens", "context_window": "max_output_tokens",
    "content_filter": "content_filter",
}
# The codes of a failure that mean something to Codex.
FAILURES = ("insufficient_quota", "context_length_exceeded", "rate_limit_exceeded")
# A 503 with this code Codex waits out.
OVERLOAD_CODE = "server_is_overloaded"


class Shape(NamedTuple):
    """How an item of one kind is told."""
    id: str           # what its id begins with
    item: dict        # its beginning
    field: str        # the one of its fields where its text is in the end
    place: dict       # what the events that bring it have beside
    events: str = ""  # what they are called, if there are any
    # The part that stands around some texts, and its events.
    part: dict | None = None
    part_events: str = ""


SHAPES = {
    THINKING: Shape(
        "rs_",
        {"type": "reasoning", "summary": []},
        "summary",
        {"summary_index": 0},
        "reasoning_summary_text",
        {"type": "summary_text"},
        "reasoning_summary_part",
    ),
    TEXT: Shape(
        "msg_",
        {"type": "message", "role": "assistant", "content": []},
        "content",
        {"content_index": 0, "logprobs": []},
        "output_text",
        {"type": "output_text", "annotations": [], "logprobs": []},
        "content_part",
    ),
    CALL: Shape(
        "fc_",
        {"type": "function_call", "arguments": ""},
        "arguments",
        {},
        "function_call_arguments",
    ),
    "custom": Shape(
        "ctc_",
        {"type": "custom_tool_call", "input": ""},
        "input",
        {},
        "custom_tool_call_input",
    ),
    "compaction": Shape("cmp_", {"type": "compaction"}, "encrypted_content", {}),
}


# Models write *** behind a patch's own lines as well.
PATCH_LINE = re.compile(
    r"^(\*\*\* (?:Begin Patch|End Patch|End of File|.{1,20}: .*?))[ \t]*\*\*\*[ \t]*$",
    re.MULTILINE)


def unwrap_input(arguments, name):
    """The text for the custom tool of that name. Models give its field other names, or
    leave out the JSON. Codex's apply_patch takes a bare patch, and they write it into a
    command, or a fence or a script around it."""
    value = decode_or_none(arguments)
    inner = [arguments if value is None else value]
    # They become more while they are gone through.
    for part in inner:
        if isinstance(part, dict):
            inner += part.values()
        elif isinstance(part, list):
            inner += part
    texts = [part for part in inner if isinstance(part, str)]
    if name == "apply_patch":
        for text in texts:
            _, begin, rest = text.partition("*** Begin Patch")
            patch, end, _ = rest.rpartition("*** End Patch")
            if end:
                return PATCH_LINE.sub(r"\1", begin + patch + end)
    text = dig(value, "input")
    if isinstance(text, str):
        return text
    return texts[0] if len(texts) == 1 else arguments


def to_responses_usage(usage):
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }


OUTPUT_TYPES = ("function_call_output", "custom_tool_call_output")


def turns_of(body):
    """What the client says; a text is the user's."""
    turns = expect(body.get("input", []), (str, list), "input")
    return [{"role": "user", "content": turns}] if isinstance(turns, str) else turns


def earlier_turns(caller, id):
    """The turns up to the end of an earlier response. VS Code sends them all at exactly
    this code."""
    chain = []
    while id:
        asked = caller.recall(id)
        ids = caller.recall(id + "/output")
        items = list(map(caller.recall, ids or ()))
        if asked is None or ids is None or None in items:
            raise RequestError(
                f"The response {id[:100]!a} is not kept, or not any more: send the whole input.",
                "previous_response_id", code="previous_response_not_found")
        chain.append([*asked["turns"], *items])
        id = asked["previous"]
    return tuple(itertools.chain(*reversed(chain)))


def turns_after(earlier, turns):
    """The turns that are new. With the outputs of tools Semantic Kernel sends all again
    that led to them."""
    if not earlier or not any(dig(turn, "type") in OUTPUT_TYPES for turn in turns):
        return turns
    said = set(map(encode_request, earlier))
    return [turn for turn in turns if encode_request(turn) not in said]


class Responses(Itemized):
    """OpenAI's Responses API: POST /v1/responses."""

    id_prefix = "resp_"
    # A 401 makes clients ask for a key, and the others Codex takes as they are meant.
    kept_statuses = (401, 404, 405, 408, 426, 429, 503)
    # The conversation is summed up.
    compacts = False

    def __init__(self, body, fields, hidden, caller):
        super().__init__(fields, hidden)
        # opening() has the numbers 0 and 1; it may be made behind the first steps.
        self.numbers = itertools.count(2)
        self.caller = caller
        include = expect(body.get("include", []), list, "include")
        self.keeps_thinking = "reasoning.encrypted_content" in include
        self.base = {
            **RESPONSE, "id": self.id, "created_at": int(caller.now), "model": self.model}
        for type, default, names in ECHO:
            for name in names.split():
                value = expect(body[name], type, name) if name in body else default
                # It is told three times, and kept until then.
                if len(encode_request(value)) > LONGEST_ECHO_BYTES:
                    value = default
                self.base[name] = {**default, **value} if type is dict else value

    @classmethod
    def read(cls, body, caller, settings):
        body = without_nulls(body)
        for name in STATEFUL:
            if body.get(name):
                raise wrong(name, "is not served", code="unsupported_parameter")
        fields, changed = chat_fields(body, RESPONSES_NAMES, RESPONSES_OTHERS)
        front = cls(body, fields, settings.reasoning_format == "hidden", caller)
        previous = front.base["previous_response_id"]
        earlier = earlier_turns(caller, previous)
        fields["messages"] = turns = turns_after(earlier, turns_of(body))
        if front.base["store"]:
            caller.keep(front.id, {"previous": previous, "turns": turns})
        if turns[-1:] == [COMPACTION_TRIGGER]:
            # GLM sums the conversation up, in one item.
            front.compacts = front.hidden = True
            turns = [*turns[:-1], {"role": "user", "content": COMPACT}]
            fields.update(messages=turns, tool_choice="none", thinking={"type": "disabled"})
            fields.pop("response_format", None)
        reasoning = front.base["reasoning"]
        if reasoning["summary"] not in SUMMARIES:
            reasoning["summary"] = None
        elif not reasoning["effort"] and settings.enable_thinking is None:
            # That is how Codex asks for thinking if it does not know the model.
            fields.setdefault("enable_thinking", True)
        if dig(body, "text.verbosity"):
            changed.append("verbosity")
        return front, Request(
            fields, RESPONSES_NAMES, changed, agents=True, prompt=fields.pop("prompt", None),
            earlier=earlier, recall=caller.recall)

    def opening(self):
        response = self._response("in_progress", output=[])
        return (
            typed_event("response.created", sequence_number=0, response=response)
            + typed_event("response.in_progress", sequence_number=1, response=response))

    def heartbeat(self):
        """Behind the first item some clients take response.in_progress for a new
        start."""
        return self.open.runs and self._delta("") or self._response_event("in_progress")

    def failure(self, error):
        """Two events: some clients overlook the one, some the other."""
        code = error.code
        if code not in FAILURES:
            code = "invalid_prompt" if self.status(error) < 500 else "server_error"
        message = error.message
        wait_s = error.headers().get("Retry-After")
        if wait_s:
            # Codex reads the time out of the text.
            message += f" Please try again in {wait_s}s."
        # Codex gives up at OVERLOAD_CODE here.
        text = self._event(
            "error", code=error.code, message=error.message, param=error.param,
            **Front.error(error))
        failure = {"code": code, "message": message}
        return text + self._response_event("failed", error=failure)

    def _begin(self, item):
        tool = {}
        if item.kind == CALL:
            tool = {**self.find_tool(item.name), "call_id": item.id}
        # Custom tools alone have a shape by their type.
        kind = "compaction" if self.compacts else tool.get("type")
        shape = self.shape = SHAPES.get(kind, SHAPES[item.kind])
        self.item = {
            **tool,
            **shape.item,
            "id": new_id(shape.id),
            "status": "in_progress",
        }
        # What each event of this item has.
        self.place = {
            "item_id": self.item["id"], "output_index": len(self.items), **shape.place}
        return self._item_event("added") + self._part_event("added", "")

    def _piece(self, text):
        # A custom tool gets what stands inside the JSON, in the end.
        return "" if self.shape.field == "input" else self._delta(text)

    def _end(self, item):
        text = item.text
        events = ""
        shape = self.shape
        if shape.field == "input":
            text = unwrap_input(text, self.item["name"])
            events = self._delta(text)
        if shape.part:
            told = {"text": text}
            self.item[shape.field] = [{**shape.part, **told}]
        else:
            told = {shape.field: text, "name": self.item.get("name")}
            self.item[shape.field] = text
        events += self._inner_event(shape.events, "done", **told)
        events += self._part_event("done", text)
        if item.kind == THINKING and self.keeps_thinking:
            self.item["encrypted_content"] = MARK + text
        self.item["status"] = self._end_status()
        events += self._item_event("done")
        self.items.append(self.item)
        # The AI SDK refers to items by their ids, in place of sending them.
        if self.base["store"]:
            self.caller.keep(self.item["id"], self.item)
        return events

    def _finish(self, step):
        reason = INCOMPLETE.get(step.text)
        if self.base["store"]:
            self.caller.keep(self.id + "/output", [item["id"] for item in self.items])
        return self._response_event(
            self._end_status(),
            incomplete_details=reason and {"reason": reason},
            usage=step.usage and to_responses_usage(step.usage))

    def _end_status(self):
        return "incomplete" if self.finish in INCOMPLETE else "completed"

    def _response_event(self, status, **fields):
        self.answer = self._response(status, **fields)
        return self._event(f"response.{status}", response=self.answer)

    def _response(self, status, **fields):
        return {**self.base, "status": status, "output": self.items, **fields}

    def _event(self, event_type, **fields):
        return typed_event(event_type, sequence_number=next(self.numbers), **fields)

    def _item_event(self, stage):
        return self._event(
            f"response.output_item.{stage}", output_index=len(self.items), item=self.item)

    def _part_event(self, stage, text):
        shape = self.shape
        part = shape.part and {**shape.part, "text": text}
        return self._inner_event(shape.part_events, stage, part=part)

    def _delta(self, text):
        return self._inner_event(self.shape.events, "delta", delta=text)

    def _inner_event(self, events, stage, **fields):
        return events and self._event(f"response.{events}.{stage}", **self.place, **fields)

    @staticmethod
    def get_error():
        """Codex asks for a WebSocket first, by GET. At a 426, and only then, it POSTs
        at once."""
        return RequestError("Responses are served by POST, not over a WebSocket.",
                            status=426, code="upgrade_not_supported")

    @staticmethod
    def error(error, request_id=""):
        value = Front.error(error)
        if error.code == OVERLOADED.code:
            value["error"]["code"] = OVERLOAD_CODE
        return value


class Compaction(Responses):
    """POST /v1/responses/compact: the same as COMPACTION_TRIGGER, as a JSON answer."""

    @classmethod
    def read(cls, body, caller, settings):
        turns = [*turns_of(without_nulls(body)), COMPACTION_TRIGGER]
        body = {**body, "input": turns, "stream": False, "store": False}
        return super().read(body, caller, settings)

    def whole(self, fold):
        answer = super().whole(fold)
        return {
            **{name: answer[name] for name in ("id", "created_at", "output")},
            "object": "response.compaction",
            "usage": answer["usage"] or to_responses_usage(NO_USAGE),
        }


# ---- I/O starts here -----------------------------------------------------------------
#
# Gates ################################################################################
#
# Z.ai limits the requests in flight for each key and model, does not say to how many,
# and changes it. So a gate learns its ceiling from refusals, and tries one more now and
# then. Who finds no room queues: one queue a model, in which the client keys take
# turns, each in the order its requests came. All of it stands under one lock; nobody
# waits while holding it. Who leaves wakes who may go next. The pump, in the next
# section, calls tick(), for gates that open without anybody leaving. What the waiting
# hold is counted by Bodies, at the end of this section.

def backoff_s(attempt, first_s=0.5, longest_s=8.0):
    """Seconds that double from attempt to attempt; `attempt` counts from 0."""
    return min(longest_s, first_s * 2 ** min(attempt, 10))


class ZaiKey:
    resting_until = 0.0
    # Why, until something is served again; for the page.
    refusal = ""

    def __init__(self, position, text):
        # Its place in ZAI_API_KEY, from 1.
        self.position = position
        self.text = text
        self.name = f"#{position} {mask(text)}"


class Gate:
    """What one Z.ai key has in flight for one model, and how much it may have."""

    # After so many seconds without a refusal one request more is tried.
    PROBE_S = 60.0

    in_flight = 0
    # Nobody may pass until then, after a refusal.
    closed_until = 0.0
    # The key does not serve this model until then.
    resting_until = 0.0
    # The last refusal, or the last change of the ceiling.
    quiet_since = 0.0
    # (verdict, words) of the last refusal, until something is served again.
    refusal = None
    # Z.ai has had no room since then, though nothing of ours was in flight.
    overloaded_since = INFINITY
    # How many were in flight when Z.ai last began to refuse, and half of that, or less.
    refused_at = 0
    halved = 0

    def __init__(self, key, limit):
        self.key = key
        self.limit = limit
        # The ceiling is below the limit once it has been learned.
        self.ceiling = limit

    def room(self, now):
        if now < self.closed_until:
            return 0
        return self.ceiling - self.in_flight

    def rests_until(self):
        return max(self.resting_until, self.key.resting_until)

    def probe(self, now):
        """Raise a learned ceiling that is reached, if it is time to: half of the way to
        where it was refused, and then one by one."""
        quiet = now >= self.quiet_since + self.PROBE_S
        if quiet and self.ceiling <= self.in_flight and self.ceiling < self.limit:
            self.ceiling += max(1, (self.refused_at - self.ceiling) // 2)
            self.quiet_since = now

    def lower_ceiling(self):
        """Lower the ceiling to what is in flight beside the request that was refused.
        All being refused says nothing about how many may be: then it is halved."""
        # Something has been served since the last refusal.
        if not self.refusal:
            self.refused_at = self.halved = self.in_flight + 1
        if self.in_flight:
            self.ceiling = min(self.ceiling, self.in_flight)
        elif self.halved > 1:
            self.halved //= 2
            self.ceiling = self.halved


class Ticket:
    """One request's place in the queue of its model. It keeps its number when it has to
    queue again, hence is the first of its client key. `client` is the Client of the
    next section, of which are used here: `key`, wait(), wake() and `gone`."""

    numbers = itertools.count(1)

    # The gate through which it may go, once it may.
    gate = None
    # It waits until then at least, before a further attempt.
    goes_at = 0.0
    # Its key rests, and an answer would end the rest.
    probes_rest = False
    waited_s = 0.0
    # How many times Z.ai had no room for it, and how many times it failed otherwise.
    refusals = 0
    failures = 0
    # Another model may answer instead.
    is_replaceable = False

    def __init__(self, model, client):
        self.model = model
        self.client = client
        self.number = next(self.numbers)
        self.refused_by = set()  # keys


class Gates:
    """Who may go to Z.ai now, and with which key; and, after a failure, once more."""

    # A key that was refused rests that long, if Z.ai does not say how long.
    REST_S = 600.0
    LONGEST_REST_S = 6 * 3600.0
    # Where another model may answer, one that is overloaded is waited for so long.
    OVERLOAD_S = 5.0
    # For each key. Names of models come from clients.
    MOST_GATES = 100

    def __init__(self, keys, max_concurrency, queue_timeout_s, max_retries=0,
                 clock=time.monotonic, rand=random.random):
        self.keys = [ZaiKey(i, text) for i, text in enumerate(keys, 1)]
        self.limit = max_concurrency or INFINITY
        self.queue_timeout_s = queue_timeout_s
        self.max_retries = max_retries
        self.clock = clock
        self.rand = rand
        self.lock = threading.Lock()
        # (key, model) -> Gate
        self.gates = {}
        # The tickets that wait, for any model.
        self.queue = []
        # client key -> a number that grows with each admission
        self.turns = collections.Counter()

    def enter(self, ticket):
        """Wait for a slot; then ticket.gate is it. ClientGone, or an ApiError once the
        ticket has waited QUEUE_TIMEOUT in all, or no slot can come free before, or
        another model is to answer."""
        began = self.clock()
        deadline = began + self.queue_timeout_s - ticket.waited_s
        with self.lock:
            self.queue.append(ticket)
            self._admit(ticket.model, began)
        try:
            while not ticket.gate:
                now = self.clock()
                self._check(ticket, now, deadline)
                # An overload wakes nobody, so that it is looked for.
                look_s = 1.0 if ticket.is_replaceable else INFINITY
                ticket.client.wait(min(deadline - now, look_s))
            if ticket.client.gone:
                raise ClientGone
        except BaseException:
            self.leave(ticket)
            raise
        finally:
            ticket.waited_s += self.clock() - began

    def _check(self, ticket, now, deadline):
        """An ApiError if the ticket is to wait no longer."""
        with self.lock:
            gates = self._usable(ticket, now)
        first = min(gates, key=lambda gate: gate.closed_until)
        ends_at = deadline
        if ticket.is_replaceable:
            overloaded_since = max(gate.overloaded_since for gate in gates)
            ends_at = min(deadline, overloaded_since + self.OVERLOAD_S)
        if now < ends_at and first.closed_until <= deadline:
            return
        words = f"No slot at Z.ai came free in time (QUEUE_TIMEOUT: {self.queue_timeout_s:g} s)."
        row = RATE
        if first.refusal:
            verdict, message = first.refusal
            words += " Its last word: " + message
            row = OVERLOADED if verdict == OVERLOAD else RATE
        # Clients would queue as long again, unseen, each time they try again by
        # themselves.
        raise UpstreamError(
            words, GIVE_UP, status=row.status, type=row.type, code=row.code,
            retry_after=max(row.retry_after, first.closed_until - now), retryable=False)

    def leave(self, ticket, error=None, served=False):
        """Give the slot, or the place in the queue, back. `error`: the UpstreamError
        that it ended with; `served`: something of an answer came. True if it may enter
        once more."""
        with self.lock:
            now = self.clock()
            may_enter = False
            if ticket.gate:
                may_enter = self._settle(ticket, error, served, now)
            elif ticket in self.queue:
                self.queue.remove(ticket)
            self._admit(ticket.model, now)
            self._forget()
        return may_enter

    def tick(self, now):
        """Let those go whose gate opens, or whose time has come, though nobody leaves.
        The pump calls it."""
        with self.lock:
            for model in self._queued():
                self._admit(model, now)

    def state(self):
        """For the page and the metrics: a list of (key's position, model, ceiling), and
        {model: how many queue}."""
        with self.lock:
            ceilings = [(key.position, model, gate.ceiling)
                        for (key, model), gate in self.gates.items()
                        if gate.ceiling < INFINITY]
            return ceilings, dict(self._queued())

    # The methods below are called with the lock held.

    def _queued(self):
        """{model: how many queue for it}"""
        return collections.Counter(ticket.model for ticket in self.queue)

    def _settle(self, ticket, error, served, now):
        """What an attempt teaches, and when the ticket may go once more, if it may."""
        gate = ticket.gate
        ticket.gate = None
        gate.in_flight -= 1
        if served:
            gate.refusal = None
            gate.overloaded_since = INFINITY
            gate.key.refusal = ""
            if ticket.probes_rest:
                gate.key.resting_until = gate.resting_until = 0.0
        if served or not error:
            return False
        # For QUEUE_AGAIN the gate is closed as long. That of another key may be open.
        pause_s = error.pause_s
        if error.verdict in NEXT_KEY:
            rest_s = min(error.retry_after or self.REST_S, self.LONGEST_REST_S)
            resting = gate
            if error.verdict == KEY_RESTS:
                resting = gate.key
                resting.refusal = f"Key #{resting.position}: {error.message}"
            resting.resting_until = now + rest_s
            ticket.refused_by.add(gate.key)
            may_enter = len(ticket.refused_by) < len(self.keys)
            pause_s = 0.0
        elif error.verdict in QUEUE_AGAIN:
            self._refuse(gate, ticket, error, now)
            may_enter = True
        else:
            most = {GIVE_UP: 0, TRY_ONCE: 1}.get(error.verdict, INFINITY)
            may_enter = ticket.failures < min(most, self.max_retries)
            # Full jitter, so that all who failed together do not come again together.
            pause_s = max(pause_s, backoff_s(ticket.failures) * self.rand())
            ticket.failures += 1
            if may_enter:
                ticket.goes_at = now + pause_s
        return may_enter and pause_s <= self.queue_timeout_s - ticket.waited_s

    def _refuse(self, gate, ticket, error, now):
        # The Coding Plan says 1305 for too many at once, too.
        too_many = error.verdict == TOO_MANY or error.zai_code == "1305" and gate.in_flight
        # A model that is overloaded was seen to be so for minutes.
        is_full = error.verdict == OVERLOAD and not too_many
        first_s, longest_s = (1.0, 15.0) if is_full else (0.5, 8.0)
        pause_s = backoff_s(ticket.refusals, first_s, longest_s) * (1 + 0.5 * self.rand())
        ticket.refusals += 1
        # A refusal long after the last one begins another overload.
        goes_on = is_full and now < gate.quiet_since + gate.PROBE_S
        since = min(gate.overloaded_since, now) if goes_on else now
        gate.overloaded_since = since if is_full else INFINITY
        # Z.ai's own wish may be absurd, hence the bound; because of it probe() need not
        # look at `closed_until`.
        pause_s = min(max(pause_s, error.pause_s), gate.PROBE_S)
        gate.closed_until = max(gate.closed_until, now + pause_s)
        gate.quiet_since = now
        if too_many:
            gate.lower_ceiling()
        # Not the error, whose traceback may hold the ticket.
        gate.refusal = (error.verdict, error.message)

    def _admit(self, model, now):
        """Let the first in the model's queue go, as long as there is room. Who finds
        none, as not all keys serve it, does not hold up the others."""
        full = []  # the keys that refused, of tickets without room
        while True:
            queue = [
                ticket for ticket in self.queue if ticket.model == model
                and ticket.goes_at <= now and ticket.refused_by not in full]
            if not queue:
                return
            ticket = min(queue, key=lambda waiting: (
                self.turns[waiting.client.key], waiting.number))
            gates = self._usable(ticket, now)
            for gate in gates:
                gate.probe(now)
            gate = max(gates, key=lambda gate: (gate.room(now), -gate.in_flight))
            if gate.room(now) <= 0:
                full.append(ticket.refused_by)
                continue
            self.queue.remove(ticket)
            self.turns[ticket.client.key] = next(Ticket.numbers)
            ticket.gate = gate
            ticket.probes_rest = gate.rests_until() > now
            gate.in_flight += 1
            ticket.client.wake()

    def _usable(self, ticket, now):
        """The gates the ticket may use: of keys that do not rest; if all do, that whose
        rest ends first, rather than failing unasked."""
        gates = [
            self.gates.setdefault((key, ticket.model), Gate(key, self.limit))
            for key in self.keys if key not in ticket.refused_by]
        awake = [gate for gate in gates if gate.rests_until() <= now]
        return awake or [min(gates, key=Gate.rests_until)]

    def _forget(self):
        """Of too many gates keep those in use: names of models come from clients."""
        if len(self.gates) > self.MOST_GATES * len(self.keys):
            queued = self._queued()
            self.gates = {
                place: gate for place, gate in self.gates.items()
                if gate.in_flight or place[1] in queued}


class Bodies:
    """The bodies of requests, from the first byte that has come until Z.ai has begun to
    answer. No client key may hold more bytes than it leaves free, so that there is room
    for whoever comes next."""

    def __init__(self, total_bytes):
        self.total_bytes = total_bytes
        self.lock = threading.Lock()
        # Client -> its body, as it came and then as it goes to Z.ai.
        self.held = collections.defaultdict(bytearray)

    def add(self, client, data):
        """Put what has come to the client's body. ApiError if that finds no room."""
        with self.lock:
            self.held[client] += data
            mine = [body for other, body in self.held.items() if other.key == client.key]
            counted = [*mine, *self.held.values()]
            if sum(map(len, counted)) > self.total_bytes:
                raise ApiError("Too many large requests at once.",
                               status=503, code="overloaded", retry_after=5)

    def drop(self, client):
        """The client's body is not needed any more."""
        with self.lock:
            self.held.pop(client, None)


# Pump #################################################################################
#
# One thread relays all running answers, and keeps the time for all who wait. A thread
# for each stream would be simpler, but from some hundred streams on the handing over of
# the interpreter's lock costs more than the work.
#
# One rule makes it safe: inside `with pump.minding(client)` the client's socket is the
# pump's, outside it is the handler's. The handler's thread queues, connects, sends the
# request to Z.ai and then sleeps, until the pump has told the whole answer.

# A client's leaving must be noticed within one second.
TICK_S = 0.25
# CLIENT_TIMEOUT is for one read or write. All of a request, or of an answer that is
# ready, may take so many times as long.
PATIENCE = 10


def peek(sock):
    """The next byte of a socket that does not block: b"" at its end, None if there is
    none yet. Of a TLS connection it is the raw one."""
    try:
        return socket.socket.recv(sock, 1, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def ended(socks):
    """Those of the sockets, which must not block, whose other side has closed. TCP
    cannot tell a client that only stopped sending from one that left; clients do not
    half-close, so an end means gone (nginx holds the same)."""
    if not hasattr(select, "POLLRDHUP"):
        # Elsewhere than on Linux bytes that were sent ahead hide the end.
        return [sock for sock in socks if peek(sock) == b""]
    # All in one call: each call lets other threads run first.
    poll = select.poll()
    by_fileno = {sock.fileno(): sock for sock in socks}
    for fileno in by_fileno:
        poll.register(fileno, select.POLLRDHUP)
    return [by_fileno[fileno] for fileno, _ in poll.poll(0)]


def shut(sock):
    """Wake the thread that is blocked on the socket. SSLSocket's own shutdown() would
    pull the TLS state from under a reader."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def deaf(settings):
    patience_s = settings.client_timeout
    return ClientGone(f"the client took nothing for CLIENT_TIMEOUT ({patience_s:g} s)")


class Outbox:
    """The stream to one client: put() never waits. What the socket does not take is in
    `unsent`, and the pump reads no more from Z.ai until it is out.

    `make_head()` gives the bytes of the response's head, which goes out with the first
    bytes. `chunked`: HTTP/1.1's coding is used.
    """

    # The head is out, so that there is no status left to give.
    started = False
    # Nothing may follow the last byte.
    finished = False
    unsent = memoryview(b"")

    def __init__(self, connection, make_head, front, chunked=True):
        self.connection = connection
        self.make_head = make_head
        self.front = front
        self.chunked = chunked
        # When it was last given something to send, which it is not while something is
        # unsent; and when the client last took some.
        self.put_at = self.sent_at = time.monotonic()

    def tell(self, steps):
        """Send what the front says of some steps. ClientGone if the client has left."""
        text = self.front.tell(steps)
        if text:
            self.put(text, last=steps[-1].kind == FINISH)

    def put(self, text, last=False):
        """Send SSE text, and before it what must come first."""
        data = self.frame(text, last)
        self.finished = last
        self.put_at = self.sent_at = time.monotonic()
        self.unsent = memoryview(bytes(self.unsent) + data)
        self.flush()

    def frame(self, text, last):
        """The bytes for `text`; `last`: with the end of the coding behind it."""
        head = b""
        if not self.started:
            self.started = True
            head = self.make_head()
            text = self.front.opening() + text
        data = text.encode("utf-8", "replace")
        if self.chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self.chunked and last:
            data += b"0\r\n\r\n"
        return head + data

    def flush(self):
        try:
            sent = self.connection.send(self.unsent)
        except BlockingIOError:
            return
        except OSError:
            raise ClientGone from None
        self.unsent = self.unsent[sent:]
        self.sent_at = time.monotonic()

    def look(self, now, settings):
        """Send what is due: what is unsent, or a heartbeat. ClientGone if the client
        has not taken the former for too long."""
        if self.unsent:
            self.flush()
            waited_s = max(now - self.sent_at, (now - self.put_at) / PATIENCE)
            if self.unsent and waited_s > settings.client_timeout:
                raise deaf(settings)
        elif now - self.sent_at >= settings.heartbeat > 0 and not self.finished:
            # Before anything else, the opening is a sign of life.
            self.put(self.front.heartbeat() if self.started else "")


class Client:
    """Who waits for one answer, streamed into `outbox` or not. `key` is the client key
    that it used. wait() and block_on() are called by the handler's thread, leave() by
    the pump's, wake() by any."""

    # How the client left, once it has: the pump sets it.
    gone = ""
    # The socket to Z.ai that the handler's thread may be blocked on.
    blocked_on = None

    def __init__(self, connection, outbox=None, key=""):
        self.connection = connection
        self.outbox = outbox
        self.key = key
        # A lock that is held and released once: an Event costs 40 times as much to
        # make.
        self.alarm = threading.Lock()
        self.alarm.acquire()

    def wait(self, seconds):
        """Sleep that long, or until wake(). ClientGone if the client has left: the pump
        may not have looked yet, and a slot must not go to one who is gone."""
        self.alarm.acquire(timeout=seconds)
        if self.gone or ended([self.connection]):
            raise ClientGone(self.gone)

    def wake(self):
        # A client that has been woken already stays awake.
        with contextlib.suppress(RuntimeError):
            self.alarm.release()

    def block_on(self, sock):
        """From here on `sock` is the one to shut if the client leaves."""
        self.blocked_on = sock
        if self.gone:
            raise ClientGone(self.gone)

    def leave(self, how=""):
        """Whatever is done for it ends now."""
        self.gone = how or "the client left"
        self.wake()
        # Read once, as the handler's thread sets it to None.
        sock = self.blocked_on
        if sock:
            shut(sock)


class Relay:
    """One attempt at an answer: what comes over `connection`, section Upstream's, goes
    through `answer`, and its steps to take(steps). All of it happens in the pump's
    thread."""

    # What may come behind the finish, or behind the end of the answer: the usage, the
    # end mark and the end of the coding.
    END_S = 1.0
    END_BYTES = 65536

    # The socket that the pump waits for: the client's while it is behind, else Z.ai's.
    watched = None
    # When something came that counts: neither an interim answer nor what stands behind
    # the finish.
    heard_at = None
    surplus_bytes = 0
    # Nothing more is to be read.
    is_read = False
    # The handler's thread has been woken, and the client's socket is its own again.
    woken = False

    def __init__(self, connection, answer, client, take):
        self.connection = connection
        self.answer = answer
        self.client = client
        self.take = take
        # What ended it, at most one. run() raises it straight off this list: a variable
        # would hold the error, and the error's traceback the variable's frame. Such a
        # circle is freed late.
        self.errors = []

    def step(self, now, buffer):
        """Read what there is and tell it. True once all is read and out."""
        answer = self.answer
        if self.is_behind:
            self.client.outbox.flush()
        while not self.is_read and not self.is_behind:
            data = self.connection.receive(buffer)
            if data is None:
                break
            if answer.is_ending:
                self.surplus_bytes += len(data)
            self.tell(*answer.feed(data))
            if answer.reply.status and not self.surplus_bytes:
                self.heard_at = now
            # Only at the end of its body a connection can serve again. Behind a stop
            # word, Z.ai may still be generating what is not wanted.
            if answer.complete:
                is_cut = answer.translator.stop_word
                self.is_read = bool(answer.reply.complete or is_cut or not data)
            if self.surplus_bytes > self.END_BYTES:
                self.end()
            # TLS may hold more than its socket shows.
            if not self.connection.pending():
                break
        # The handler need not wait for the end of a body that is told already.
        if answer.complete and not self.is_behind:
            self.wake()
        return self.is_read and not self.is_behind

    def tell(self, steps, failure):
        """What Answer gave. take() gets at least one step."""
        if steps:
            self.take(steps)
        if failure:
            raise failure

    def end(self):
        """What has come is all there will be."""
        if not self.answer.complete:
            self.tell(*self.answer.feed(b""))
        self.is_read = True

    @property
    def is_behind(self):
        """Whether the client has not taken all it was told."""
        outbox = self.client.outbox
        return bool(outbox and outbox.unsent) and not self.woken

    def wake(self):
        if not self.woken:
            self.woken = True
            self.client.wake()

    def look(self, now, silence_s):
        """What the time says. True once all is read and out."""
        if self.client.gone and not self.woken:
            raise ClientGone(self.client.gone)
        if self.is_behind:
            self.heard_at = now
        silent_s = now - self.heard_at
        if self.answer.is_ending:
            if silent_s > self.END_S:
                self.end()
        elif silent_s > silence_s:
            raise UpstreamError(
                f"Z.ai was silent for {silence_s:g} s (UPSTREAM_TIMEOUT).", TRY_ONCE)
        return self.is_read and not self.is_behind


class Pump:
    """The one thread. start() and close(); minding() and run() are for the handlers.

    `chores` are called as chore(now) some times a second.
    """

    closed = False
    next_tick = 0.0

    def __init__(self, settings, clock=time.monotonic):
        self.settings = settings
        self.clock = clock
        self.chores = []
        # It guards `clients`, and is held while heartbeats go out: a handler's thread
        # that leaves minding() knows that none follows.
        self.lock = threading.Lock()
        self.clients = set()
        # Relays that the pump has not taken in yet, and those it has.
        self.inbox = collections.deque()
        self.relays = set()
        # select() on some systems takes no new socket while it waits; so a byte wakes
        # it.
        self.ear, self.mouth = socket.socketpair()
        self.selector = selectors.DefaultSelector()
        self.ear.setblocking(False)
        self.mouth.setblocking(False)
        self.selector.register(self.ear, selectors.EVENT_READ)
        self.buffer = memoryview(bytearray(65536))
        self.thread = threading.Thread(target=self.serve, name="pump", daemon=True)

    def start(self):
        self.thread.start()

    def close(self):
        self.closed = True
        self._wake()
        if self.thread.ident:
            self.thread.join()
        for relay in [*self.relays, *self.inbox]:
            relay.errors.append(ClientGone())
            self._end(relay)
        self.selector.close()
        self.ear.close()
        self.mouth.close()

    # For the handlers

    @contextlib.contextmanager
    def minding(self, client):
        """Inside, the client's socket belongs to the pump."""
        client.connection.setblocking(False)
        with self.lock:
            self.clients.add(client)
        try:
            yield client
        finally:
            with self.lock:
                self.clients.discard(client)
            client.connection.settimeout(self.settings.client_timeout)

    def run(self, relay):
        """Sleep until the answer is told; raises what ended it otherwise."""
        self.inbox.append(relay)
        self._wake()
        # The alarm rings for a client that leaves, too: of that the pump tells in
        # `errors`.
        while not relay.woken:
            relay.client.alarm.acquire()
        if relay.errors:
            raise relay.errors.pop()

    def _wake(self):
        # A full socket means that the pump has been woken.
        with contextlib.suppress(OSError):
            self.mouth.send(b"!")

    # The loop. A bug in a step ends one answer, and is told by its handler; the loop
    # goes on.

    def serve(self):
        while not self.closed:
            try:
                self._turn()
            except Exception:
                log.exception("The pump failed; this is a bug")
                time.sleep(TICK_S)

    def _turn(self):
        ready = self.selector.select(max(0.0, self.next_tick - self.clock()))
        now = self.clock()
        for key, _ in ready:
            if key.data:
                self._guard(key.data, key.data.step, now, self.buffer)
            else:
                self.ear.recv(4096)
        while self.inbox:
            relay = self.inbox.popleft()
            relay.heard_at = now
            self.relays.add(relay)
            self._watch(relay)
        if now >= self.next_tick:
            self.next_tick = now + TICK_S
            self._tick(now)

    def _watch(self, relay):
        """Wait for the client to take what is unsent, or else for Z.ai."""
        sock, event = relay.connection.sock, selectors.EVENT_READ
        if relay.is_behind:
            sock, event = relay.client.connection, selectors.EVENT_WRITE
        if sock is relay.watched:
            return
        self._unwatch(relay)
        self.selector.register(sock, event, relay)
        relay.watched = sock

    def _unwatch(self, relay):
        if relay.watched:
            self.selector.unregister(relay.watched)
            relay.watched = None

    def _guard(self, relay, method, *args):
        """Call a method of the relay, and end it when that says so, or fails."""
        try:
            is_over = method(*args)
        except Exception as error:
            # Behind an answer that has been told nothing can fail any more.
            if not relay.woken:
                relay.errors.append(error)
            is_over = True
        if is_over:
            self._end(relay)
        else:
            self._watch(relay)

    def _end(self, relay):
        self._unwatch(relay)
        relay.connection.release(relay.answer.reply.reusable)
        self.relays.discard(relay)
        relay.wake()

    # Some times a second

    def _tick(self, now):
        with self.lock:
            gone = ended([client.connection for client in self.clients])
            for client in self.clients:
                if client.connection in gone:
                    client.leave()
                elif client.outbox:
                    self._look(client, now)
        for relay in list(self.relays):
            self._guard(relay, relay.look, now, self.settings.upstream_timeout)
        for chore in self.chores:
            chore(now)

    def _look(self, client, now):
        try:
            client.outbox.look(now, self.settings)
        except Exception as error:
            if not isinstance(error, ClientGone):
                log.exception("A heartbeat failed; this is a bug")
            client.leave(str(error))
            shut(client.connection)


# Upstream #############################################################################
#
# The road to Z.ai: urllib.request finds the proxy and opens a connection, which stays
# open for further requests. The one rule of retrying: as long as nothing of the answer
# has come, and only for what can heal. Thinking counts, shown or hidden, as it has been
# paid for.

# For all addresses of a host together.
CONNECT_TIMEOUT_S = 10.0
# Front ends usually keep an idle connection for 60 to 75 s.
KEEP_IDLE_S = 60.0

# A used connection that ends within that time was dead before: the request is sent
# again. Later Z.ai may have worked on it, and another attempt counts as one.
STALE_WITHIN_S = 1.0


class Pool:
    """Sockets that are kept for `keep_s` seconds; of more than `most` the oldest is
    dropped, which closes it. An Upstream's holds the idle connections to Z.ai: their
    last answer was read to its end, and none of them blocks."""

    def __init__(self, keep_s, clock=time.monotonic, most=None):
        self.clock = clock
        self.keep_s = keep_s
        # It guards `idle`: (socket, since when), the oldest first.
        self.lock = threading.Lock()
        self.idle = collections.deque(maxlen=most)

    def take(self):
        """An idle socket that is still alive, or None."""
        while True:
            with self.lock:
                if not self.idle:
                    return None
                sock, _ = self.idle.pop()
            # What an idle server says is that it has closed.
            if peek(sock) is None:
                return sock
            sock.close()

    def put(self, sock):
        with self.lock:
            self.idle.append((sock, self.clock()))

    def expire(self, now):
        """Close what has been kept for long enough."""
        with self.lock:
            while self.idle and now - self.idle[0][1] >= self.keep_s:
                self.idle.popleft()[0].close()


# Z.ai's errors shall come in English. Compressed event streams have caused trouble.
ZAI_HEAD = (
    "Accept: text/event-stream, application/json",
    "Accept-Encoding: identity",
    "Accept-Language: en-US,en",
    "Content-Type: application/json",
    "User-Agent: ztoapi/" + __version__,
    "Connection: keep-alive",
)


def request_bytes(request):
    """The bytes to send for a urllib.request.Request. No value can break out of its
    line: they are ours, urllib's, and the settings', which hold printable ASCII."""
    fields = [f"{name}: {value}" for name, value in request.header_items()]
    fields.append(f"Content-Length: {len(request.data)}")
    lines = [f"POST {request.selector} HTTP/1.1", *ZAI_HEAD, *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1") + request.data


class Connection:
    """A socket to Z.ai that does not block, with a request on its way. `reused`: it
    comes from the pool."""

    def __init__(self, sock, pool, reused=False):
        self.sock = sock
        self.pool = pool
        self.reused = reused

    def receive(self, buffer):
        """The bytes that have come; None if there are none yet, b"" at the end."""
        try:
            size = self.sock.recv_into(buffer)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except OSError:
            return b""
        return bytes(buffer[:size])

    def pending(self):
        """Whether there are bytes that the socket does not show."""
        return isinstance(self.sock, ssl.SSLSocket) and self.sock.pending() > 0

    def release(self, reusable):
        """The request is over."""
        # What waits inside of TLS would be taken for the next answer: Pool.take() does
        # not see it.
        if reusable and not self.pending():
            self.pool.put(self.sock)
        else:
            self.sock.close()


def dial(host, port, client, timeout_s):
    """socket.create_connection(), but with the time shared out among the addresses, as
    a dead IPv6 route must not use up IPv4's, and with the socket shown to the pump."""
    addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    share_s = timeout_s / len(addresses)
    while True:
        *kind, _, address = addresses.pop(0)
        sock = None
        try:
            # A system without IPv6 makes no socket for it.
            sock = socket.socket(*kind)
            client.block_on(sock)
            sock.settimeout(share_s)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(timeout_s)
            return sock
        except BaseException as error:
            if sock:
                sock.close()
            if not (addresses and isinstance(error, OSError)):
                raise


def open_tunnel(sock, request):
    """Ask a proxy for a tunnel to the request's host (RFC 9110, 9.3.6)."""
    target = request._tunnel_host
    if urllib.parse.urlsplit("//" + target).port is None:
        target += ":443"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    credentials = request.headers.get("Proxy-authorization")
    if credentials:
        lines.append(f"Proxy-Authorization: {credentials}")
    sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
    reply = Reply()
    try:
        while reply.status is None:
            reply.feed(sock.recv(4096))
    except UpstreamError:
        raise OSError("the proxy hung up, or does not speak HTTP") from None
    if not 200 <= reply.status < 300:
        raise OSError(f"the proxy refused the tunnel with status {reply.status}")


class KeepAliveHandler(urllib.request.BaseHandler):
    """http and https for an OpenerDirector. What it opens is a Connection, for a
    request that knows its Client."""

    def __init__(self, pool, send_timeout_s):
        self.pool = pool
        self.send_timeout_s = send_timeout_s

    @functools.cached_property
    def tls(self):
        """Made when first needed: loading the certificates, the system's or
        SSL_CERT_FILE's, takes longer than all the rest of the start."""
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return context

    def send_request(self, request):
        pooled = self.pool.take()
        sock = pooled or self._dial(request)
        request.client.block_on(sock)
        # Inside of a tunnel, a new one or one from the pool, the request goes to Z.ai,
        # for whom the proxy's password is not.
        if request._tunnel_host:
            request.headers.pop("Proxy-authorization", None)
        timeout_s = self.send_timeout_s
        sock.settimeout(timeout_s)
        try:
            sock.sendall(request_bytes(request))
        except socket.timeout:
            raise UpstreamError(
                f"Z.ai took no data for {timeout_s:g} s (UPSTREAM_TIMEOUT).", TRY_ONCE) from None
        except OSError:
            # Z.ai may have answered before it closed. Reading tells.
            pass
        sock.setblocking(False)
        return Connection(sock, self.pool, sock is pooled)

    # The names that OpenerDirector looks for.
    http_open = send_request
    https_open = send_request

    def _dial(self, request):
        place = urllib.parse.urlsplit("//" + request.host)
        if not place.hostname:
            raise ValueError("no host")
        is_tls = request.type == "https"
        port = place.port or (443 if is_tls else 80)
        sock = dial(place.hostname, port, request.client, request.timeout)
        try:
            if request._tunnel_host:
                open_tunnel(sock, request)
            if is_tls:
                zai = urllib.parse.urlsplit("//" + request.headers["Host"])
                sock = self.tls.wrap_socket(
                    sock, server_hostname=zai.hostname, do_handshake_on_connect=False)
                request.client.block_on(sock)
                sock.do_handshake()
            return sock
        except BaseException:
            sock.close()
            raise


# What making a connection may raise, the likeliest cause of each, and what to tell. To
# add a case, add a row above those of which it is a kind.
CONNECTION_ERRORS = (
    (ssl.SSLCertVerificationError, "TLS", GIVE_UP,
     "Z.ai's TLS certificate is not trusted: {reason}. Check the clock and SSL_CERT_FILE."),
    (ssl.SSLError, "TLS", TRY_AGAIN,
     "TLS with Z.ai failed: {reason}. SSL_CERT_FILE names the certificates to trust."),
    (socket.gaierror, "DNS", TRY_AGAIN, "Z.ai's address could not be found: {reason}."),
    (socket.timeout, "TCP", TRY_AGAIN, "No answer of Z.ai within {seconds:g} s."),
    (ValueError, "proxy", GIVE_UP,
     "The address of the proxy is not a valid one. Check HTTPS_PROXY and HTTP_PROXY."),
    (OSError, "TCP", TRY_AGAIN,
     "The connection to Z.ai failed: {reason}. HTTPS_PROXY names a proxy for it, not a SOCKS one."),
)


def connection_error(error):
    """The UpstreamError for a connection that could not be made. It quotes no address:
    one of a proxy may hold a password."""
    _, stage, verdict, words = next(
        row for row in CONNECTION_ERRORS if isinstance(error, row[0]))
    text = getattr(error, "verify_message", None) or getattr(error, "strerror", None)
    words = words.format(reason=text or error, seconds=CONNECT_TIMEOUT_S)
    return UpstreamError(words, verdict, stage=stage)


# Z.ai gives one of these, or an empty answer, for schemas that it does not take.
SCHEMA_CODES = ("1210", "1213", "1214", "1234", "500")


class Job:
    """One answer to get: the Asked and, in `data`, its bytes for Z.ai. What holds the
    conversation is let go of once Z.ai has begun to answer."""

    # write(model) gives the Job for another model.
    write = None

    def __init__(self, asked, streamed=True):
        self.data = asked.data
        self.model = asked.body["model"]
        self.max_tokens = asked.body.get("max_tokens")
        self.asked = asked._replace(body={}, data=b"")
        self.streamed = streamed


class Upstream:
    """The road to Z.ai. answer() is all a handler needs: it hides the queue, the keys,
    the connections and the retries."""

    def __init__(self, settings, pump,
                 now=time.time, rand=random.random, proxies=None):
        self.settings = settings
        self.pump = pump
        self.clock = pump.clock
        self.now = now
        self.pool = Pool(KEEP_IDLE_S, self.clock)
        keys = ("demo",) if settings.demo_mode else settings.zai_api_key
        self.gates = Gates(keys, settings.max_concurrency, settings.queue_timeout,
                           settings.max_retries, self.clock, rand)
        # A key that is alone can have two of the largest.
        self.bodies = Bodies(4 * max(64, settings.max_body_mb) << 20)
        # For what is read at one time: see turn().
        self.turns = Gates(("",), 1, settings.queue_timeout, clock=self.clock)
        pump.chores += [self.gates.tick, self.pool.expire]
        # The usual opener follows redirects, with the key, and opens files.
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(urllib.request.ProxyHandler(proxies))
        self.opener.add_handler(KeepAliveHandler(self.pool, settings.upstream_timeout))

    @contextlib.contextmanager
    def turn(self, client, data):
        """Inside, a request is read or written. Of large ones one at a time is, so that
        those who serve the others get at the interpreter; client keys take turns."""
        if is_light(data):
            yield
            return
        ticket = Ticket("", client)
        self.turns.enter(ticket)
        try:
            yield
        finally:
            self.turns.leave(ticket)

    def answer(self, job, client, record, take):
        """Get one answer: take(steps) is called, in the pump's thread, with all that
        comes. ApiError or ClientGone if there is no answer, or no rest of it. `record`,
        of section Metrics, is told what happened on the way. MODEL_FALLBACKS may have
        another model answer; if none does, the first one's error is raised."""
        first = None
        others = fallbacks_of(job.model, self.settings) if job.write else []
        try:
            while job:
                self.bodies.held[client] = job.data
                if not others:
                    job.write = None
                ticket = Ticket(self.settings.redact(job.model), client)
                ticket.waited_s = record.queued_s
                ticket.is_replaceable = bool(others)
                try:
                    while self._attempt(job, ticket, record, take):
                        record.retries += 1
                    return
                except UpstreamError as error:
                    # An overload passes: if no other model answers, it is waited out.
                    if not first and error.code == OVERLOADED.code and others:
                        others.append(job.model)
                    first = first or error
                    job = self._other_job(job, others, client, error)
                    record.retries += bool(job)
            raise first
        finally:
            # The error's traceback holds this frame: such a circle is freed late.
            first = None

    def _other_job(self, job, others, client, error):
        """The Job for the next of the models, after an error that it may not have, or
        None."""
        is_models = error.type == QUOTA.type or error.code in (NO_MODEL.code, OVERLOADED.code)
        while is_models and job.data and others:
            # One that sees no pictures is no other for a request with one.
            with self.turn(client, job.data), contextlib.suppress(RequestError):
                other = job.write(others.pop(0))
                other.write = job.write
                return other
        return None

    def _simplify(self, job, client, record, error):
        """Whether a further try makes sense, with plain words in the schemas of the
        job's tools. There is one, after an error that may be theirs."""
        is_theirs = error.zai_code in SCHEMA_CODES or error.message == EMPTY
        was_tried = "schemas" in record.changed
        if not is_theirs or error.code == TOO_LONG.code or not job.data or was_tried:
            return False
        with self.turn(client, job.data):
            body = simpler_schemas(decode_or_none(job.data.decode()))
            if body:
                job.data = self.bodies.held[client] = encode_json(body)
                record.changed = (*record.changed, "schemas")
        return body is not None

    def _make_answer(self, job):
        """A fresh Answer, for one attempt."""
        def describe(value, status=200, retry_after=""):
            now = self.now()
            return zai_error(
                value, status, now=now, model=job.model,
                max_tokens=job.max_tokens,
                patience_s=self.settings.queue_timeout,
                retry_after=seconds_to_wait(retry_after))

        return Answer(Translator(job.asked, describe, restartable=not job.streamed))

    def _attempt(self, job, ticket, record, take):
        """One attempt, with a slot of its own. True if there is to be another."""
        try:
            self.gates.enter(ticket)
        finally:
            record.queued_s = ticket.waited_s
        key = ticket.gate.key
        client = ticket.client
        stale = True
        try:
            while stale:
                answer = self._make_answer(job)
                stale = self._relay(job, key, client, record, answer, take)
        except UpstreamError as error:
            error.message = self.settings.redact(error.message)
            log.debug("%s attempt with key %s failed: %s", record.id, key.name, error.message)
            # Its context and its traceback hold frames of the pump that hold the error:
            # such a circle is freed late.
            error.__context__ = error.__traceback__ = None
            may_enter = self.gates.leave(ticket, error, answer.begun)
            if may_enter or self._simplify(job, client, record, error):
                return True
            raise error from None
        finally:
            self._note(record, answer)
            record.repaired += answer.translator.frames.repaired
            # Whoever has left already does not leave again.
            self.gates.leave(ticket, None, answer.begun)
        return False

    def _relay(self, job, key, client, record, answer, take):
        """Send the request and let the pump tell the answer. True if the connection was
        an old one that had died before."""
        def told(steps):
            if record.ttft_s is None and answer.begun:
                record.ttft_s = self.clock() - record.started
                self._note(record, answer)
                job.data = job.write = None
                self.bodies.drop(client)
            record.usage = steps[-1].usage
            take(steps)

        connection = self.open(key, client, job.data)
        sent_at = self.clock()
        try:
            self.pump.run(Relay(connection, answer, client, told))
        except UpstreamError:
            untouched = connection.reused and not answer.reply.head.data
            if untouched and self.clock() - sent_at < STALE_WITHIN_S:
                return True
            raise
        return False

    def _note(self, record, answer):
        fields = answer.reply.fields
        record.zai_log_id = plain(self.settings.redact(fields.get("x-log-id", "")), 64)

    def open(self, key, client, data):
        """The Connection with a request on its way to Z.ai."""
        if self.settings.demo_mode:
            # Section Demo has a stand-in for Z.ai.
            return Connection(demo_socket(data), self.pool)
        url = self.settings.zai_base_url + "/chat/completions"
        try:
            request = urllib.request.Request(url, data, {"Authorization": "Bearer " + key.text})
            # A proxy's name takes the place of `host` later.
            request.add_header("Host", request.host)
            request.client = client
            return self.opener.open(request, timeout=CONNECT_TIMEOUT_S)
        except (OSError, ValueError) as error:
            if client.gone:
                raise ClientGone(client.gone) from None
            raise connection_error(error) from None
        finally:
            client.blocked_on = None

    def close(self):
        self.pool.expire(INFINITY)


# Metrics ##############################################################################
#
# Each request fills in one Record. When it is over, the record becomes one line of the
# log and is added to one set of counters, from which /metrics and /stats are told.
# Nothing of a prompt, an answer or a key is kept. Texts have been through
# Settings.redact() before they come here: here they are cut, and what the cut leaves of
# a key could not be found any more.

LONGEST_WORD = 100   # characters of a model's name and of a path
LONGEST_ERROR = 300  # characters of an error's message

# The page's chart: ten minutes, in buckets of ten seconds.
BUCKETS = 60
BUCKET_S = 10


@dataclasses.dataclass
class Record:
    """What happened to one request. Durations (_s) are in seconds."""

    id: str
    client: str     # its address
    began: float    # Unix time
    # The same moment on the monotonic clock.
    started: float = 0.0
    method: str = ""
    path: str = ""
    # "#2" is the second of DEFAULT_KEY; "" before the key is known.
    key: str = ""
    # The client's own X-Client-Request-Id or X-Request-Id.
    client_request_id: str = ""
    # 499: the client left.
    status: int = 0
    # True for requests that ask for an answer, which are what Metrics counts.
    counted: bool = False
    # As the client named it, and as Z.ai does.
    model: str = ""
    model_id: str = ""
    # The latter where it is another model.
    by: str = ""
    stream: bool = False
    # Time to first token; None while nothing has come.
    ttft_s: float | None = None
    total_s: float = 0.0
    queued_s: float = 0.0
    usage: dict | None = None
    retries: int = 0
    # Events of Z.ai that were skipped or mended.
    repaired: int = 0
    changed: tuple = ()
    zai_log_id: str = ""
    error: str = ""

    def tokens(self, kind):
        return self.usage[f"{kind}_tokens"] if self.usage else None

    def outcome(self):
        if self.status == 499:
            return "cancelled"
        return "failed" if self.status >= 400 else "served"

    def line(self):
        """The log line: printable ASCII, and no blanks but its own, whatever came."""
        line = f"{self.id} {self.client} {self.method} {plain(self.path)} {self.status}"
        facts = {"key": self.key, "rid": self.client_request_id}
        if self.counted:
            facts.update(self.facts())
        for name, value in facts.items():
            if value not in ("", None):
                line += f" {name}={plain(str(value))}"
        if self.error:
            line += f" error={self.error[:LONGEST_ERROR]!a}"
        return line

    def facts(self):
        """What the log and the page tell of an answer."""
        return {
            "model": self.model[:LONGEST_WORD],
            "by": self.by,
            "stream": str(self.stream).lower(),
            "ttft": self.ttft_s and round(self.ttft_s, 3),
            "total": round(self.total_s, 3),
            "queue": round(self.queued_s, 3),
            "in": self.tokens("prompt"),
            "out": self.tokens("completion"),
            "retries": self.retries,
            "changed": ",".join(self.changed)[:2 * LONGEST_WORD],
            "repaired": self.repaired or None,
            "zai": self.zai_log_id,
        }

    def row(self):
        """The request in the page's list of the last ones."""
        return {
            "time": self.began,
            "path": self.path[:LONGEST_WORD],
            "key": self.key,
            "status": self.status,
            "error": self.error[:LONGEST_ERROR],
            **self.facts(),
        }


# Prometheus's text format, 0.0.4. A sample is what follows a metric's name in a line of
# its own: `{model="glm-4.6"} 3`. No label's value needs escapes: see model_label().

def model_label(model_id):
    """A model id as a label. Labels must be few, so unknown models share one."""
    return model_id if model_id in MODELS else "other"


def samples(names, counts):
    """`counts`: {values of the labels `names`: value}."""
    for values, count in counts.items():
        labels = ",".join(f'{name}="{value}"' for name, value in zip(names, values))
        yield f"{{{labels}}} {count}"


class Histogram:
    """A series of durations in seconds."""

    # From a cached first token to the longest thinking.
    BOUNDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)

    def __init__(self):
        self.counts = [0] * (len(self.BOUNDS) + 1)
        self.sum = 0.0

    def add(self, value):
        self.counts[bisect.bisect_left(self.BOUNDS, value)] += 1
        self.sum += value

    def samples(self):
        total = 0
        for bound, count in zip((*self.BOUNDS, "+Inf"), self.counts):
            total += count
            yield f'_bucket{{le="{bound}"}} {total}'
        yield f"_sum {self.sum:.6f}"
        yield f"_count {total}"


class Metrics:
    """All that /metrics and /stats tell. The threads of all requests report here."""

    def __init__(self, now=time.time):
        self.now = now
        self.began = now()
        # It guards all below.
        self.lock = threading.Lock()
        self.counts = collections.Counter(
            in_flight=0, served=0, failed=0, cancelled=0, unauthorized=0)
        # Their keys: (model, status, key) and (model, kind, key).
        self.requests = collections.Counter()
        self.tokens = collections.Counter()
        self.ttft = Histogram()
        self.duration = Histogram()
        # The tokens told in each bucket, and the number of the last one since 1970.
        self.history = collections.deque([0] * BUCKETS, BUCKETS)
        self.bucket = 0
        self.recent = collections.deque(maxlen=20)

    def count(self, name):
        """One more "in_flight", for a request that asks for an answer, or one more
        "unauthorized", for one without a valid key."""
        with self.lock:
            self.counts[name] += 1

    def finish(self, record):
        """A request that was counted as in flight is over."""
        model = model_label(record.model_id)
        with self.lock:
            self.counts["in_flight"] -= 1
            self.counts["retries"] += record.retries
            self.counts["repaired"] += record.repaired
            self.counts[record.outcome()] += 1
            self.requests[model, record.status, record.key] += 1
            for kind in ("prompt", "completion"):
                self.tokens[model, kind, record.key] += record.tokens(kind) or 0
            self.duration.add(record.total_s)
            if record.ttft_s is not None:
                self.ttft.add(record.ttft_s)
            self.move_history()
            self.history[-1] += record.tokens("completion") or 0
            # The record itself might fill the memory with long texts.
            self.recent.appendleft(record.row())

    def move_history(self):
        """Bring it up to date, so that its last entry is the present bucket's."""
        bucket = int(self.now()) // BUCKET_S
        self.history.extend([0] * min(bucket - self.bucket, BUCKETS))
        self.bucket = bucket

    def stats(self, **facts):
        """The page's JSON, with what others know: `facts`."""
        tokens = collections.defaultdict(collections.Counter)
        with self.lock:
            self.move_history()
            for (model, kind, _), count in self.tokens.items():
                tokens[model][kind] += count
            return {
                "version": __version__,
                **facts,
                **self.counts,
                "tokens": tokens,
                "history": list(self.history),
                "recent": list(self.recent),
            }

    def prometheus(self, gates, queued):
        """Prometheus's text. `gates`, `queued`: Gates.state()."""
        lines = []
        with self.lock:
            for name, metric_type, text, values in self.families(gates, queued):
                lines.append(f"# HELP ztoapi_{name} {text}")
                lines.append(f"# TYPE ztoapi_{name} {metric_type}")
                lines += [f"ztoapi_{name}{sample}" for sample in values]
        return "\n".join(lines) + "\n"

    def families(self, gates, queued):
        """(name, type, help, samples) of each metric. To add a metric, add a row."""
        counts = self.counts
        ceilings = {
            (key, model): ceiling for key, model, ceiling in gates if model in MODELS}
        return (
            ("requests_total", "counter", "Requests, by status; 499: the client left.",
             samples(("model", "status", "key"), self.requests)),
            ("tokens_total", "counter", "Tokens as Z.ai counts them.",
             samples(("model", "kind", "key"), self.tokens)),
            ("time_to_first_token_seconds", "histogram", "Until the first token.",
             self.ttft.samples()),
            ("request_duration_seconds", "histogram", "Until an answer's end.",
             self.duration.samples()),
            ("requests_queued", "gauge", "Requests waiting for a slot.",
             [f" {sum(queued.values())}"]),
            ("concurrency_ceiling", "gauge", "Slots of known models, set or learned.",
             samples(("key", "model"), ceilings)),
            ("unauthorized_total", "counter", "Requests without a valid key.",
             [f" {counts['unauthorized']}"]),
            ("requests_in_flight", "gauge", "Requests being answered.",
             [f" {counts['in_flight']}"]),
            ("retries_total", "counter", "Further attempts at Z.ai.",
             [f" {counts['retries']}"]),
            ("repaired_frames_total", "counter", "Z.ai's events skipped or mended.",
             [f" {counts['repaired']}"]),
            ("process_start_time_seconds", "gauge", "Start, Unix time.",
             [f" {self.began:.3f}"]),
        )


# Handler ##############################################################################
#
# http.server's own, made strict: the base class brings the life of a connection, and
# calls handle_one_request() as long as it lasts. There is one table of routes, and one
# place where an exception becomes an answer.

# An idle connection is kept that long. Front ends usually keep theirs for 60 to 75 s.
KEEP_ALIVE_S = 75.0
# A client gets that long to read an answer that came before all of its request was
# taken.
LINGER_S = 1.0


class Route(NamedTuple):
    """A path, and the names of the Handler's methods that answer GET and POST there.
    refuse_get is for a front with a get_error(), which says why not."""

    pattern: str
    get: str = ""
    post: str = ""
    needs_key: bool = True
    # The API of this path, in whose shape its errors are told.
    front: type = Chat


# What may stand before a path of an API. Z.ai's own are there, so that a program which
# works with Z.ai works here once its host is replaced. Clients of Anthropic add /v1 to
# whatever they were given.
V4 = "(?:/v1|/api/(?:coding/)?paas/v4)?"
V1 = "(?:/api)?(?:/v1)?"
ANTHROPIC = "(?:/api/anthropic)?(?:/v1)*"

# To add a path, add a row. A row without methods lets an API say in its own shape that
# there is nothing. The last row fits every path.
ROUTES = (
    Route(V4 + "/chat/completions", post="post_answer"),
    Route(V1 + "/responses", "refuse_get", "post_answer", front=Responses),
    Route(V1 + "/responses/compact", post="post_answer", front=Compaction),
    Route(V1 + "/responses/.+", front=Responses),
    Route(ANTHROPIC + "/messages", post="post_answer", front=Messages),
    Route(ANTHROPIC + "/messages/count_tokens", post="post_count", front=Messages),
    Route(ANTHROPIC + "/messages/.+", front=Messages),
    Route(f"(?:{V4}|{ANTHROPIC})/models", "get_models"),
    Route(f"(?:{V4}|{ANTHROPIC})/models/.+", "get_model"),
    Route("/metrics", "get_metrics"),
    Route("/stats", "get_stats"),
    Route("/health", "get_health", needs_key=False),
    Route("/(?:docs|dashboard)?", "get_page", needs_key=False),
    Route("(?s).*"),
)

# What clients look for here in vain, and what to tell them. To add a path, add a row
# above the last, which fits every path.
ELSEWHERE = (
    (".+/v1/messages|.*/anthropic", "Set the client's base URL to {root}, without /v1."),
    ("/v1/v1(?:/|$)|.*/(?:completions|responses|messages)/.*completions$",
     "The path is doubled: set the client's base URL to {root}/v1."),
    (V4 + "/completions$",
     "The legacy completions API is not served: use {root}/v1/chat/completions."),
    ((V4 + "/(?:embeddings|images|audio|rerank|files|videos|moderations|batches|realtime"
      "|fine_tuning|uploads|web_search|tokenizer|assistants|threads|vector_stores)(?:/|$)"),
     "ZtoApi serves chat only. What Z.ai has of this is at {there}, billed to the balance."),
    (V1 + "/responses/.",
     "Responses are kept for previous_response_id alone: there is nothing to get or to cancel."),
    ("", "There is nothing at {path!a}. Set the client's base URL to {root}/v1."),
)


def response_head(status, fields):
    """The bytes of a response's head. `fields`: (name, value) pairs."""
    reason = http.HTTPStatus(status).phrase
    lines = [f"HTTP/1.1 {status} {reason}", "Server: ztoapi"]
    lines.append("Date: " + email.utils.formatdate(usegmt=True))
    lines += [f"{name}: {value}" for name, value in fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


# The headers that web pages may read.
EXPOSED = ("x-request-id, retry-after, x-should-retry, x-ztoapi-changed, x-ztoapi-model, "
           "x-ztoapi-queue-ms, x-zai-log-id")


def page_policy():
    """The Content-Security-Policy that lets the script and the style of PAGE, which is
    last in this file, run, and nothing else."""
    def source(tag):
        text = PAGE.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"
    return (f"default-src 'none'; script-src {source('script')}; "
            f"style-src {source('style')}; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def request_outline(zai_request):
    """A request as a log may show it: roles and lengths, never texts."""
    messages = [f"{message['role']}:{len(message['content'])}"
                for message in zai_request["messages"]]
    return f"messages={messages} fields={','.join(sorted(map(ascii, zai_request)))}"


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. The base class's part is setup(), handle() and finish(); reading
    a head and sending an answer are ours, as its email parser takes things that are no
    headers for some, and each of its writes would be a packet of its own. `server` is
    the Server of the next section, which owns all that requests share."""

    # With Nagle's algorithm a request over a kept connection takes 44 ms.
    disable_nagle_algorithm = True
    # What is read goes straight to our parsers, which tell what they leave.
    rbufsize = 0
    unread = b""

    # One request

    def handle_one_request(self):
        """Called by the base class until self.close_connection is true."""
        self.settings = self.server.settings
        self.close_connection = True
        self.connection.settimeout(KEEP_ALIVE_S)
        # recv() allocates before it waits, hence little at a time.
        self.unread = self.unread or self.connection.recv(2048)
        if not self.unread or self.server.draining:
            return
        self.connection.settimeout(self.settings.client_timeout)
        self.head = RequestHead()
        self.fields = self.head.fields
        self.front = Chat
        self.outbox = None
        self.log_level = logging.INFO
        self.record = Record(
            new_id("req_"), self.client_address[0], time.time(), time.monotonic())
        try:
            self.dispatch()
        finally:
            # The outbox holds this handler: such a circle is freed late.
            self.outbox = None
            self.server.connections[self.connection] = time.monotonic()

    def dispatch(self):
        """Answer one request, or note that its client left, and tell the log and the
        metrics."""
        record = self.record
        try:
            self.answer_request()
        except ClientGone as gone:
            # Without a whole head there was no request.
            if record.method == "-":
                return
            self.close_connection = True
            record.status = 499
            record.error = str(gone) or "the client left"
        record.total_s = time.monotonic() - record.started
        log.log(self.log_level, "%s", record.line())
        if record.counted:
            self.server.metrics.finish(record)

    def answer_request(self):
        """Read the head, find the route, call it, and turn what it raises into an
        answer."""
        try:
            self.read_head()
            self.server.connections[self.connection] = BUSY
            getattr(self, self.find_route())()
        except ClientGone:
            raise
        except ApiError as error:
            self.answer_error(error)
        except Exception:
            log.exception("%s failed; this is a bug", self.record.id)
            words = f"Internal error; the log says more under the id {self.record.id}."
            self.answer_error(ApiError(words))

    # Reading

    def receive(self):
        """What has come of the request, at least one byte."""
        data = self.unread
        self.unread = b""
        patience_s = self.settings.client_timeout
        try:
            if time.monotonic() > self.record.started + PATIENCE * patience_s:
                raise socket.timeout
            data = data or self.connection.recv(65536)
        except socket.timeout:
            words = f"The request did not come within CLIENT_TIMEOUT ({patience_s:g} s)."
            raise RequestError(words, status=408, code="request_timeout") from None
        except OSError:
            pass
        if not data:
            raise ClientGone
        return data

    def read_head(self):
        """Take the head off the connection."""
        head = self.head
        record = self.record
        try:
            while not head.feed(self.receive()):
                pass
        finally:
            # A key is taken out before a cut leaves a part of it that is not found.
            record.method = self.settings.redact(head.method)
            record.path = self.settings.redact(head.path)
        self.unread = head.rest
        self.close_connection = not head.keeps_alive
        given = self.fields.get("x-client-request-id") or self.fields.get("x-request-id", "")
        record.client_request_id = self.settings.redact(given)

    def read_body(self, client):
        """Read the client's body, once it is clear that it is wanted."""
        limit = self.settings.max_body_mb << 20
        if self.fields.get("content-encoding", "identity").lower() != "identity":
            raise RequestError("Compressed bodies are not understood.",
                               status=415, code="unsupported_media_type")
        framing = self.head.framing
        bodies = self.server.upstream.bodies
        bodies.add(client, b"")
        is_asked = self.fields.get("expect", "").lower() == "100-continue"
        while True:
            if len(bodies.held[client]) + framing.left > limit:
                raise RequestError(
                    f"The body is larger than MAX_BODY_MB ({self.settings.max_body_mb}).",
                    status=413, code="request_too_large")
            if is_asked and not self.head.is_1_0:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                is_asked = False
            if framing.done:
                break
            try:
                data = framing.feed(self.receive())
            except ValueError as error:
                raise RequestError(f"Malformed chunked body: {error}.") from None
            bodies.add(client, data)
        self.unread = framing.rest or self.unread

    # Finding the route

    def find_route(self):
        """The name of the method that answers; the key is checked on the way."""
        method = self.record.method
        path = self.record.path
        row = next(row for row in ROUTES if re.fullmatch(row.pattern, path))
        self.front = row.front
        methods = {"GET": row.get, "HEAD": row.get, "POST": row.post}
        allowed = [verb for verb, name in methods.items() if name]
        # So programs look for servers of other kinds.
        if method == "GET" and not allowed:
            self.log_level = logging.DEBUG
        self.check_host()
        if method == "OPTIONS":
            return "answer_options"
        if row.needs_key:
            self.check_key()
        if not allowed:
            raise self.not_found(path[:200])
        if method not in allowed:
            raise RequestError(
                f"{method} is not a method of {path[:200]!a}.",
                status=405, code="method_not_allowed", allowed=["OPTIONS", *allowed])
        return methods[method]

    def not_found(self, path):
        words = next(words for pattern, words in ELSEWHERE if re.match(pattern, path))
        tail = escaped(re.sub(V4, "", path, count=1))
        there = self.settings.zai_base_url + tail
        words = words.format(root=self.server.url, path=path, there=there)
        return RequestError(words, status=404, code="not_found")

    def check_host(self):
        """With the well-known key only pages of this computer may reach us: the name in
        Host tells DNS rebinding."""
        host = self.fields.get("host", "localhost")
        name = re.sub(r":\d*$", "", host).strip("[]")
        if self.settings.well_known and not is_loopback(name):
            raise RequestError(
                "With the well-known DEFAULT_KEY only this computer is served; set a key of "
                "your own.", status=403, code="host_not_allowed")

    def check_key(self):
        """Find the key that the client sent. Each comparison takes the same time, as
        the time of an early end would tell how much of a guess is right."""
        # A word such as Bearer may stand before it.
        words = [
            self.fields.get(name, "").rpartition(" ")[2].encode()
            for name in ("authorization", "x-api-key", "api-key")]
        for position, key in enumerate(self.settings.default_key, 1):
            if any(hmac.compare_digest(key.encode(), word) for word in words):
                self.record.key = f"#{position}"
                return
        if self.log_level == logging.INFO:
            self.server.metrics.count("unauthorized")
        raise RequestError(
            f"No API key, or an incorrect one: send the proxy's DEFAULT_KEY ({WELL_KNOWN_KEYS[0]}"
            " unless it was set), not the Z.ai key, as Authorization: Bearer KEY.",
            status=401, code="invalid_api_key")

    # Answering

    def send(self, data):
        """ClientGone unless the client takes it."""
        data = memoryview(data)
        late_at = time.monotonic() + PATIENCE * self.settings.client_timeout
        try:
            while data and time.monotonic() < late_at:
                data = data[self.connection.send(data):]
        except socket.timeout:
            pass
        except OSError:
            raise ClientGone from None
        if data:
            raise deaf(self.settings)

    def answer(self, status, body, content_type="application/json", fields=()):
        """Send a whole answer. One given before the body was read ends the connection,
        as the body must not become the next request."""
        if not self.head.framing.done or self.server.draining:
            self.close_connection = True
        head = self.make_head(
            status, content_type, *fields, ("Content-Length", str(len(body))),
            ("Connection", "close" if self.close_connection else ""))
        self.send(head if self.record.method == "HEAD" else head + body)

    def answer_json(self, value, status=200, fields=()):
        self.answer(status, encode_json(value), fields=fields)

    def answer_error(self, error):
        """Tell of an error: by an HTTP status before a stream has begun, by an event
        after."""
        error.message = self.settings.redact(error.message)
        self.record.error = error.message
        outbox = self.outbox
        if not (outbox and outbox.started):
            value = self.front.error(error, self.record.id)
            self.answer_json(value, self.front.status(error), error.headers().items())
            return
        self.record.status = error.status
        # Without its last chunk a stream that failed shows as the cut it is.
        last = not self.front.cuts_failures
        self.close_connection |= not last
        end = outbox.frame(self.front.failure(error), last)
        self.send(bytes(outbox.unsent) + end)

    def make_head(self, status, content_type, *more):
        """The bytes of a response's head, without those fields that are empty. It tells
        what happened to a request for an answer, too."""
        record = self.record
        record.status = status
        fields = [
            ("Content-Type", content_type),
            ("x-request-id", record.id),
            ("request-id", record.id),
            ("X-Content-Type-Options", "nosniff"),
            *self.cors_fields(),
            ("x-ztoapi-queue-ms", int(record.queued_s * 1000)),
            ("x-ztoapi-changed", plain(",".join(record.changed), 1000)),
            ("x-ztoapi-model", plain(record.model_id)),
            ("x-zai-log-id", record.zai_log_id),
            *more,
        ]
        return response_head(status, [field for field in fields if field[1]])

    def cors_fields(self):
        """None with the well-known key: then no web page may read what we answer."""
        origins = self.settings.cors_origin
        if self.settings.well_known or not origins:
            return []
        origin = self.fields.get("origin", "")
        if "*" in origins:
            origin = "*"
        return [
            ("Access-Control-Expose-Headers", EXPOSED),
            ("Access-Control-Allow-Origin", origin if origin in origins else ""),
            ("Vary", "Origin" if origin != "*" else ""),
        ]

    # Routes

    def answer_options(self):
        """CORS preflight, which comes without a key. The headers asked for are echoed:
        SDKs send x-stainless-*, and * does not cover Authorization."""
        fields = [("Allow", "GET, HEAD, POST, OPTIONS")]
        if self.cors_fields():
            asked = self.settings.redact(self.fields.get("access-control-request-headers", ""))
            fields += [
                ("Access-Control-Allow-Methods", "GET, POST, OPTIONS"),
                ("Access-Control-Allow-Headers", asked),
                ("Access-Control-Max-Age", "86400"),
                ("Vary", "Access-Control-Request-Headers"),
            ]
        self.answer(200, b"", fields=fields)

    def get_page(self):
        model = CHECK_MODELS["/coding/" in self.settings.zai_base_url][0]
        page = PAGE.replace('data-key="" data-model=""',
                            f'data-key="{self.settings.well_known}" data-model="{model}"')
        self.answer(200, page.encode(), "text/html; charset=utf-8", [
            ("Content-Security-Policy", page_policy()),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-cache"),
        ])

    def get_health(self):
        self.answer_json({"status": "ok"})

    def get_models(self):
        entries = list(listed_models(self.settings).values())
        self.answer_json({
            "object": "list",
            "data": entries,
            # What Anthropic's libraries and Codex look for.
            "has_more": False,
            "first_id": entries[0]["id"],
            "last_id": entries[-1]["id"],
            "models": [],
        })

    def get_model(self):
        name = self.record.path.split("/models/", 1)[1]
        aliases = self.settings.model_aliases
        id = zai_model_id(name, aliases)
        model = find_model(id)
        if model is None and name not in aliases and id == canonical_id(name):
            words = f"The model {name[:100]!a} is not known; GET /v1/models lists those that are."
            raise RequestError(words, "model", status=404, code="model_not_found")
        self.answer_json(model_entry(name, model or UNKNOWN_MODEL))

    def get_metrics(self):
        text = self.server.metrics.prometheus(*self.server.upstream.gates.state())
        self.answer(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def get_stats(self):
        gates = self.server.upstream.gates
        ceilings, queued = gates.state()
        trouble = [key.refusal for key in gates.keys] or [NO_KEY]
        stats = self.server.metrics.stats(
            demo=self.settings.demo_mode, gates=ceilings, queued=queued, trouble=trouble)
        self.answer_json(stats, fields=[("Cache-Control", "no-store")])

    def refuse_get(self):
        raise self.front.get_error()

    # Answers of Z.ai

    def post_answer(self):
        """Any front's request for an answer."""
        self.record.counted = True
        self.server.metrics.count("in_flight")
        with self.reading() as client:
            job = self.read_request(client)
            front = self.front
            if not self.server.upstream.gates.keys:
                raise missing_key()
            if front.stream:
                self.outbox = client.outbox = Outbox(
                    self.connection, self.stream_head, front, chunked=not self.head.is_1_0)
                take = self.outbox.tell
            else:
                fold = Fold()
                take = fold.add
            self.server.upstream.answer(job, client, self.record, take)
        if not front.stream:
            self.answer_json(front.whole(fold))

    @contextlib.contextmanager
    def reading(self):
        """Inside, the Client has a body, and the pump looks after it."""
        client = Client(self.connection, key=self.record.key)
        try:
            self.read_body(client)
            with self.server.pump.minding(client):
                yield client
        finally:
            self.server.upstream.bodies.drop(client)

    def read_request(self, client):
        """The Job. What the client sent is let go of here: an answer may take minutes,
        and a conversation many megabytes."""
        record = self.record
        upstream = self.server.upstream
        data = upstream.bodies.held[client]

        def write(model=""):
            asked = to_zai_request(request, self.settings, model)
            job = Job(asked, front.stream)
            front.asked = job.asked
            record.changed = tuple(map(self.settings.redact, asked.changed))
            record.model_id = self.settings.redact(job.model)
            record.by = "" if job.model == canonical_id(front.model) else record.model_id
            if log.isEnabledFor(logging.DEBUG):
                words = self.settings.redact(request_outline(asked.body))[:2000]
                log.debug("%s to Z.ai: %s", record.id, words)
            return job

        with upstream.turn(client, data):
            body = read_json_object(data)
            caller = Caller(self.fields, record.key, record.began, self.server.memory)
            record.model = self.settings.redact(str(body.get("model", "")))
            front, request = self.front.read(body, caller, self.settings)
            self.front = front
            # Whatever was sent as such: it is checked later.
            record.stream = bool(front.stream)
            job = write()
            # Not in write() itself, which would hold itself then.
            job.write = write
            return job

    def post_count(self):
        """How many tokens a request to Messages has, without asking Z.ai."""
        with self.reading() as client:
            self.read_request(client)
        self.answer_json({"input_tokens": self.front.asked.tokens})

    def stream_head(self):
        """The head of a streamed answer. It is made when the first bytes go out, so
        that it can tell how they came about."""
        is_1_0 = self.head.is_1_0
        return self.make_head(
            200, "text/event-stream; charset=utf-8",
            ("Cache-Control", "no-cache"),
            ("X-Accel-Buffering", "no"),
            ("Connection", "close" if is_1_0 else ""),
            ("Transfer-Encoding", "" if is_1_0 else "chunked"))


# Server ###############################################################################
#
# What all requests share, and the bounds of it; accepting connections, and the end.

# In place of the time since when a connection has idled: a request is under way.
BUSY = INFINITY


class Server(http.server.ThreadingHTTPServer):
    """The proxy: Server(settings).serve_forever(), and stop() from another thread. It
    owns all its parts.

    get_request(), process_request(), handle_error() and shutdown_request() are hooks of
    the base class: they are called in this order for each connection, the first two in
    the thread of serve_forever(), the third if there is an error.
    """

    # The base class's 5 refuses bursts.
    request_queue_size = 1024
    # stop() counts what runs; joining threads would hang on one idle client.
    daemon_threads = True
    block_on_close = False
    # On Windows SO_REUSEADDR lets a second process take a port in use.
    allow_reuse_address = os.name != "nt"

    # Running answers get that long to finish.
    GRACE_S = 30.0
    # Requests that were sent before the end need a moment to be read.
    SETTLE_S = 0.1

    # serve_forever() does not begin any more.
    stopped = False
    draining = False

    def __init__(self, settings):
        self.settings = settings
        self.metrics = Metrics()
        self.memory = Memory()
        # It guards which connections `connections` has: connection -> since when it has
        # idled, or BUSY. Each handler moves its own, for which dicts need no lock.
        self.lock = threading.Lock()
        self.connections = {}
        # stop() may be called by several threads.
        self.stopping = threading.Lock()
        # Connections that were too many and are being told so.
        self.refused = Pool(LINGER_S, most=128)
        host = settings.host.strip("[]")
        found = socket.getaddrinfo(
            host, settings.port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
        self.address_family = found[0][0]
        self.pump = Pump(settings)
        try:
            self.upstream = Upstream(settings, self.pump)
            super().__init__(found[0][4], Handler)
        except BaseException:
            self.pump.close()
            raise
        self.pump.chores.append(self.refused.expire)

    def server_bind(self):
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.address_family == socket.AF_INET6 and self.server_address[0] == "::":
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # HTTPServer's own asks for the computer's full name, which can hang on DNS.
        socketserver.TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    @property
    def url(self):
        host = self.server_address[0]
        if is_loopback(host) or host in ("0.0.0.0", "::"):
            host = "localhost"
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{self.server_port}"

    # The accept loop

    def serve_forever(self, poll_interval=0.5):
        with self.lock:
            if self.stopped:
                return
            self.pump.start()
        super().serve_forever(poll_interval)

    def get_request(self):
        """Take a connection, in place of an idle one if need be, or refuse it. OSError
        means that there is none."""
        try:
            request, address = super().get_request()
        except OSError as error:
            # Without a free descriptor the connection stays in the backlog, and the
            # loop must not spin on it. Of one that was aborted nothing stays.
            if not isinstance(error, ConnectionError):
                time.sleep(0.05)
            raise
        with self.lock:
            is_full = len(self.connections) >= self.settings.max_connections
            too_many = is_full and not self.shut_idle()
            self.connections[request] = time.monotonic()
        if too_many:
            self.refuse(request)
            raise ConnectionError
        return request, address

    def process_request(self, request, client_address):
        try:
            super().process_request(request, client_address)
        # The system has no more threads.
        except RuntimeError:
            self.refuse(request)

    def shutdown_request(self, request):
        """Take what the client is still sending, for a moment: closing on it would
        reset the connection before the answer is read. Who goes on is reset then, as
        behind a full window it might never hear of a mere end."""
        until = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(LINGER_S)
            while request.recv(65536):
                if time.monotonic() >= until:
                    # The closing resets it.
                    request.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
        with self.lock:
            self.connections.pop(request, None)
        self.close_request(request)

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        # A client that hangs up is no bug.
        if not isinstance(error, OSError):
            log.exception("The connection of %s failed; this is a bug", client_address[0])

    def refuse(self, request):
        """A 503 without a thread. The socket is kept for a moment, until it has been
        read."""
        with self.lock:
            del self.connections[request]
        error = ApiError("Too many connections.", status=503, code="too_many_connections")
        id = new_id("req_")
        body = encode_json(Chat.error(error))
        head = response_head(error.status, [
            ("Content-Type", "application/json"),
            ("Content-Length", len(body)),
            ("Retry-After", 5),
            ("Connection", "close"),
            ("x-request-id", id),
        ])
        log.warning("%s 503: more than MAX_CONNECTIONS=%d, or no more threads",
                    id, self.settings.max_connections)
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(head + body)
            request.shutdown(socket.SHUT_WR)
        self.refused.put(request)

    def shut_idle(self):
        """Shut the connection that has idled longest, if one has; called with the lock
        held."""
        # A handler may put its connection back at any time, hence the list.
        sock = min(list(self.connections), key=self.connections.get)
        is_idle = self.connections[sock] != BUSY
        if is_idle:
            del self.connections[sock]
            shut(sock)
        return is_idle

    # The end

    def stop(self, grace_s=GRACE_S):
        """Stop accepting, let running answers finish, close everything. True if nothing
        was cut."""
        with self.lock:
            self.stopped = True
        with self.stopping:
            return self._stop(grace_s)

    def _stop(self, grace_s):
        # shutdown() would wait for ever for a loop that never begins.
        if self.pump.thread.ident and not self.draining:
            self.shutdown()
            # Accept what has connected: each call takes one, or finds none at once.
            self.timeout = 0
            for _ in range(self.request_queue_size):
                self.handle_request()
        # At once, as closing resets all that have connected since.
        self.socket.close()
        time.sleep(self.SETTLE_S)
        self.draining = True
        deadline = time.monotonic() + grace_s
        while True:
            with self.lock:
                connections = dict(self.connections)
            whole = BUSY not in connections.values()
            is_over = whole or time.monotonic() > deadline
            for sock, since in connections.items():
                if is_over or since != BUSY:
                    shut(sock)
            if is_over:
                break
            time.sleep(0.02)
        if not whole:
            # The pump sees that they have ended, and hangs up on Z.ai.
            time.sleep(2 * TICK_S)
        self.pump.close()
        self.upstream.close()
        return whole


# Demo #################################################################################
#
# A small stand-in for Z.ai that speaks its dialect, so that everything can be tried
# without a key. It thinks a little and repeats what was said, a word at a time. Only
# where the last message says "call NAME" it calls the tool of that name: coding agents
# bring tools that run commands, and a demo should not run any unasked.

DEMO_PACE_S = 0.02
DEMO_THOUGHT = "This is a demo, so there is nothing to think about."
DEMO_ECHO = 500  # characters: coding agents send whole files


def demo_call(tools, text):
    """The delta that calls the tool for which `text` asks, or None."""
    for tool in tools:
        function = tool.get("function", {})
        if f"call {function.get('name')}" in text:
            required = dig(function, "parameters.required") or ()
            arguments = encode_text(dict.fromkeys(required, "demo"))
            called = {"name": function["name"], "arguments": arguments}
            return {"tool_calls": [{"id": new_id("call_"), "index": 0, "function": called}]}
    return None


def demo_deltas(request):
    """The deltas that answer a request in Z.ai's dialect."""
    # Claude Code puts a system message behind the user's.
    last = [message for message in request["messages"] if message["role"] != "system"][-1]
    text = last.get("content") or ""
    if isinstance(text, list):
        text = " ".join(part.get("text", "") for part in text)
    if dig(request, "thinking.type") != "disabled":
        for word in DEMO_THOUGHT.split():
            yield {"reasoning_content": f"{word} "}
    # The result of a tool asks for no further call.
    call = demo_call(request.get("tools", ()), text) if last["role"] == "user" else None
    if call:
        yield call
        return
    echo = text[-DEMO_ECHO:]
    answer = f"Demo of ZtoApi. The {last['role']} said: {echo}"
    if dig(request, "response_format.type") == "json_object":
        answer = encode_text({"demo": True, "echo": echo})
    for word in re.findall(r"\S+\s*", answer):
        yield {"content": word}


def demo_events(request):
    """The answer's SSE events. The last but one finishes it and holds the usage."""
    deltas = list(demo_deltas(request))
    event = {"id": new_id("demo"), "model": request["model"]}
    for delta in deltas:
        yield encode_event({**event, "choices": [{"index": 0, "delta": delta}]})
        time.sleep(DEMO_PACE_S)
    count = len(deltas)
    words = len(encode_text(request["messages"]).split())
    usage = {
        "prompt_tokens": words, "completion_tokens": count, "total_tokens": words + count}
    reason = "tool_calls" if "tool_calls" in delta else "stop"
    last = {"index": 0, "finish_reason": reason, "delta": {"content": ""}}
    yield encode_event({**event, "choices": [last], "usage": usage})
    yield "data: [DONE]\n\n"


# It ends with its connection, hence the old version.
DEMO_HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def demo_answer(sock, data):
    # The proxy hangs up whenever its own client does.
    with sock, contextlib.suppress(OSError):
        sock.sendall(DEMO_HEAD)
        for event in demo_events(json.loads(data)):
            sock.sendall(event.encode("utf-8", "replace"))


def demo_socket(data):
    """A socket that answers as Z.ai's would. `data`: the chat request."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    threading.Thread(target=demo_answer, args=(theirs, data), daemon=True).start()
    return ours


# Check ################################################################################
#
# `--check` tries a chat with each key, over the same road as the proxy's requests, so
# that what is wrong is found before any client is involved. It prints a line for each
# try: "ok", or "FAIL", where it failed (proxy, DNS, TCP, TLS, key, chat) and what to
# do.

# The models to try, the cheapest first. The Coding Plan (True) serves others.
CHECK_MODELS = {True: ("glm-4.7", "glm-4.5-air"), False: ("glm-4.7-flash", "glm-4.6")}
# A key fits one of these, or two. No other server is shown a key unasked.
ZAI_BASE_URLS = (
    "https://api.z.ai/api/paas/v4",
    "https://api.z.ai/api/coding/paas/v4",
    "https://open.bigmodel.cn/api/paas/v4",
    "https://open.bigmodel.cn/api/coding/paas/v4",
)

# Whatever answers, and however slowly.
CHECK_S = 60.0

CHECK_REQUEST = {
    "messages": [{"role": "user", "content": "Say OK."}],
    "max_tokens": 16,
    "thinking": {"type": "disabled"},
    "stream": True,
}


def say(text, stream="stdout"):
    """print(), for an output that nobody may read any more: that ends no server."""
    try:
        print(text, file=getattr(sys, stream), flush=True)
    except OSError:
        # What is left in its buffer would fail again, and loudly, when Python ends.
        setattr(sys, stream, None)


def try_chats(settings, pump, client, tell=say):
    """Ask one model after the other for a tiny answer, until one gives it. None then,
    else the last error."""
    with contextlib.closing(Upstream(settings, pump)) as upstream:
        for model in CHECK_MODELS["/coding/" in settings.zai_base_url]:
            request = Request({**CHECK_REQUEST, "model": model}, {})
            job = Job(to_zai_request(request, settings))
            record = Record("check", "", time.time(), time.monotonic())
            try:
                upstream.answer(job, client, record, take=lambda steps: None)
                tell(f"ok    chat: {model} answered, first token after {record.ttft_s:.3f} s")
                return None
            except UpstreamError as failure:
                error = failure
            place = "key" if error.verdict == KEY_RESTS else error.stage
            tell(f"FAIL  {place or 'chat with ' + model}: {settings.redact(error.message)}")
            # Another model heals neither a key nor the road.
            if place:
                break
    return error


def check_key(settings, pump, client):
    """Try the one key of these settings; None if it serves."""
    error = try_chats(settings, pump, client)
    # Z.ai refuses the key, or has no money or plan for it here.
    if error and error.verdict in NEXT_KEY and settings.zai_base_url in ZAI_BASE_URLS:
        for base in ZAI_BASE_URLS:
            other = dataclasses.replace(settings, zai_base_url=base, queue_timeout=5.0)
            if not try_chats(other, pump, client, tell=lambda line: None):
                say(f"      The key fits ZAI_BASE_URL={base}.")
                return error
        say("      The key fits none of Z.ai's base URLs.")
    return error


def check(settings):
    """Print what was found. True if a chat would work."""
    say(f"Python {sys.version.split()[0]} on {sys.platform}, {ssl.OPENSSL_VERSION}")
    say(f"ztoapi {__version__}; settings that are not the defaults:")
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != getattr(Settings(), field.name):
            shown = ", ".join(map(mask, value)) if field.metadata["secret"] else value
            say(f"      {field.name.upper()}={shown}")
    # The client who asks is one end of a socket pair. It leaves in the end.
    ours, theirs = socket.socketpair()
    client = Client(ours)
    pump = Pump(settings)
    until = time.monotonic() + CHECK_S
    pump.chores.append(lambda now: now > until and client.leave())
    pump.start()
    keys = ("demo",) if settings.demo_mode else settings.zai_api_key
    if not keys:
        say(f"FAIL  key: {NO_KEY}")
    errors = []
    try:
        with ours, theirs, pump.minding(client):
            # Asking without a key tells at least whether Z.ai can be reached.
            for position, key in enumerate(keys or ["no-key"], 1):
                if settings.zai_api_key:
                    say(f"Key #{position} {mask(key)}")
                one = dataclasses.replace(settings, zai_api_key=(key,))
                errors.append(check_key(one, pump, client))
        return None in errors and bool(keys)
    except ClientGone:
        say(f"FAIL  that was not over after {CHECK_S:g} s")
        return False
    finally:
        pump.close()


# Main #################################################################################
#
# The command line, what is printed, and the signals that end the program.

# For `python -OO`, which drops docstrings.
USAGE = "usage: python3 ztoapi.py [--check | --help | --version]; README.md tells the rest"


def raise_descriptor_limit(connections):
    """How many of `connections` the system allows, its limit raised if need be."""
    try:
        import resource
    except ImportError:
        # Windows, where select() takes 512 sockets.
        return min(connections, 500)
    # One for each client, one for its connection to Z.ai, and some to spare.
    need = 2 * connections + 64
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (need if n == resource.RLIM_INFINITY else n for n in limits)
    wanted = min(need, hard)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
            soft = wanted
    return max(1, min(connections, (soft - 64) // 2))


def give_memory_back():
    """Once a large body has been freed, glibc would keep what such bodies hold."""
    # No ctypes, no glibc.
    with contextlib.suppress(ImportError, AttributeError, TypeError, OSError):
        import ctypes
        # M_MMAP_THRESHOLD: from 128 KB on memory goes back at once, for good.
        ctypes.CDLL(None).mallopt(-3, 1 << 17)


def announce(server):
    """Three lines: where it listens, what it speaks to, where the page is."""
    settings = server.settings
    keys = settings.well_known or ", ".join(map(mask, settings.default_key))
    say(f"ZtoApi {__version__} listens on {server.url}/v1 (HOST={settings.host}), key {keys}")
    if settings.demo_mode:
        say("DEMO: answers come from a stand-in inside this program, not from Z.ai")
    elif not settings.zai_api_key:
        say(f"WARNING: chat will answer 403. {NO_KEY}")
    elif not all(re.search("[0-9]", key) for key in settings.zai_api_key):
        say(f"WARNING: ZAI_API_KEY looks like a placeholder, as it has no digit. {GET_KEY}")
    else:
        zai_keys = ", ".join(key.name for key in server.upstream.gates.keys)
        models = len(listed_models(settings))
        say(f"Z.ai: {settings.zai_base_url}, key {zai_keys}, {models} models")
    say(f"Page: {server.url}/   Ctrl-C stops")


def serve(settings):
    """Serve until a signal comes. The exit status."""
    give_memory_back()
    allowed = raise_descriptor_limit(settings.max_connections)
    if allowed < settings.max_connections:
        asked = settings.max_connections
        log.warning("the system allows %d connections, not MAX_CONNECTIONS=%d", allowed, asked)
        settings = dataclasses.replace(settings, max_connections=allowed)
    try:
        server = Server(settings)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        host = escaped(settings.host)
        say(f"Cannot listen on HOST={host} PORT={settings.port}: {reason};"
            " set PORT= or HOST= to another", "stderr")
        return 1
    # In a thread of its own: a signal comes to the main thread, and while that starts a
    # thread for a connection, it would be lost.
    accepting = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    accepting.start()
    # Outside of the main thread, ValueError: then somebody else minds the signals.
    with contextlib.suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        announce(server)
        # On Windows no signal wakes who waits for a thread.
        while accepting.is_alive():
            time.sleep(0.5)
    # A second signal ends the draining at once.
    whole = False
    with contextlib.suppress(KeyboardInterrupt):
        whole = server.stop()
    say("Stopped.")
    return 0 if whole else 1


def set_up_logging(settings):
    level = logging.DEBUG if settings.debug_mode else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    # As logging's HOWTO advises for speed: nothing looks for what no line shows.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def main(environ=os.environ, argv=()):
    """Run the program.

    The exit status is 0, 1 for what the machine refuses, or 2 for what was asked
    wrongly.
    """
    argv = list(argv)
    for stream in (sys.stdout, sys.stderr):
        # Z.ai's words may be Chinese, and the console may not know how to show them.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    if argv in (["--help"], ["-h"]):
        say((__doc__ or USAGE).strip())
        return 0
    if argv == ["--version"]:
        say(f"ztoapi {__version__}")
        return 0
    if argv not in ([], ["--check"]):
        say(f"ztoapi: unknown argument {argv[0]!a}; --help tells what there is", "stderr")
        return 2
    try:
        settings = Settings.from_environ(environ)
    except SettingsError as error:
        say(f"ztoapi: {error}", "stderr")
        return 2
    if not (ssl.OPENSSL_VERSION or settings.demo_mode) and "https:" in settings.zai_base_url:
        say("ztoapi: this Python has no ssl module, which ZAI_BASE_URL needs; DEMO_MODE=true"
            " needs none", "stderr")
        return 1
    set_up_logging(settings)
    try:
        if argv:
            return 0 if check(settings) else 1
        return serve(settings)
    except KeyboardInterrupt:
        return 1


# Page #################################################################################
#
# Data, read at run time only. Foreign text becomes text nodes in it, never HTML.

PAGE = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>ZtoApi</title>
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'%3E%3Crect rx='2'
 width='8' height='8' fill='%234338ca'/%3E%3Cpath d='M2 2h4L2 6h4' fill='none' stroke='white'/%3E%3C/svg%3E">
<style>
:root { color-scheme: light dark; --page: #f5f6fa; --card: #fff; --text: #1c222e; --quiet: #566073;
  --line: #dfe3ea; --edge: #848d9e; --accent: #4338ca; --tint: #eeeffc; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #12141b; --card: #1a1e27; --text: #e5e9f0;
  --quiet: #a0aabb; --line: #303744; --edge: #737e92; --accent: #a5b0ff; --tint: #262b44;
  --bad: #ff9086; } } * { box-sizing: border-box; } a { color: var(--accent); }
[hidden], #log:empty, #model:empty, .scroll:empty { display: none !important; }
body { margin: auto; max-width: 62rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; } .bad { color: var(--bad); }
section { margin: 1rem 0; padding: 1rem; border: 1px solid var(--line); border-radius: 1rem;
  background: var(--card); } h1, h2, h3, p, pre, figure { margin: 0 0 .75rem; }
section > :last-child, header * { margin: 0; } h1, h2 { font-size: 1.25rem; } h3 { font-size: 1rem; }
h1::before { content: "Z" / ""; margin-right: .5rem; padding: 0 .5rem; border-radius: .4rem; }
h1::before, .main { border-color: var(--accent); background: var(--accent); color: var(--card); }
header, form { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem .75rem; }
header p, textarea { flex: 1 0 100%; } textarea { resize: vertical; }
.quiet, .link, figcaption, summary, .thoughts, .code button, th, td, caption, ::placeholder {
  font-size: .875rem; } button:disabled { opacity: .6; } th, span { font-weight: 400; }
.quiet, figcaption, summary, .thoughts, .code button, th, ::placeholder { color: var(--quiet); }
button, input, select, textarea { max-width: 100%; padding: .3rem .7rem; border: 1px solid
  var(--edge); border-radius: .5rem; background: var(--card); color: var(--text); font: inherit;
  accent-color: var(--accent); } #model { flex: 1 1 8rem; min-width: 0; max-width: min(20rem, 100%); }
.link { padding: 0; border: 0; text-decoration: underline dotted; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
pre, code { font: .875rem/1.5 ui-monospace, Menlo, monospace; white-space: pre-wrap; }
pre { min-height: 2.6rem; padding: .6rem 4rem .6rem .75rem; background: var(--page);
  border-radius: .5rem; } .code { position: relative; } .user, .thoughts { white-space: pre-wrap; }
.code button { position: absolute; top: .4rem; right: .4rem; padding: 0 .5rem; user-select: none; }
#log { max-height: max(10rem, 100vh - 22.5rem); margin-bottom: .75rem; overflow: auto; }
#chat { position: sticky; bottom: 0; margin-bottom: -1rem; padding: .25rem 0 1rem;
  background: var(--card); } .text .gap { margin-top: .6rem; } .text :is(ul, ol) { padding-left: 1.6rem; }
.user { width: fit-content; max-width: 85%; margin: .5rem 0 1rem auto; padding: .5rem .9rem;
  background: var(--tint); border-radius: .75rem; } .text :is(.code, .scroll, hr) { margin: .6rem 0; }
figure pre, .text :is(h3, p, ul, ol, blockquote, pre) { margin: 0; } hr { border: 0; border-top: 1px
  solid var(--edge); } .thoughts, blockquote { padding-left: .75rem; border-left: 3px solid var(--line); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr));
  gap: .5rem 1rem; } caption, .text th { font-weight: bold; }
svg { border-bottom: 1px solid var(--edge); fill: var(--accent); } summary { padding: .2rem 0; }
.scroll { max-height: 22rem; margin-bottom: 1rem; overflow: auto; } table { width: 100%;
  border-spacing: 0; } td { border-top: 1px solid var(--line); } th, td, caption { text-align: left;
  padding: .35rem .9rem .35rem 0; vertical-align: top; } label, th, td { white-space: nowrap; }
.text :is(th, td), #recent td:last-child { min-width: 5rem; white-space: normal; }
#recent td:last-child { min-width: 14rem; }
</style></head><body data-key="" data-model=""><header>
  <h1>ZtoApi <span class="quiet" id="version"></span></h1>
  <form id="key-form" hidden><label>API key <input id="key" type="password" autocomplete="off" required
      pattern=" *[!-~]+ *" title="The key, without spaces"></label> <button class="main">Use key</button>
    <p class="quiet">The key of this server (its DEFAULT_KEY), for chat and numbers; kept in this tab only.</p></form>
  <p class="bad" id="state" role="alert"></p></header><main>
<section aria-labelledby="talk"><h2 id="talk">Chat <span class="quiet">kept in this tab only</span></h2>
  <div id="log" role="log" tabindex="0" aria-label="Conversation"></div>
  <form id="chat"><textarea id="message" rows="3" required aria-label="Message"
      placeholder="Enter sends, Shift+Enter starts a new line"></textarea>
    <button class="main" id="send" formnovalidate>Send</button> <select id="model" aria-label="Model"></select>
    <label><input id="thinking" type="checkbox" checked> Thinking</label>
    <button id="new" type="button">New chat</button> <span class="quiet" id="outcome" role="status"></span>
  </form></section>
<section aria-labelledby="connect" id="connecting"><h2 id="connect">Connect</h2>
  <div class="columns">
    <figure><figcaption>Base URL of OpenAI's APIs</figcaption><div class="code"><pre>{origin}/v1</pre></div></figure>
    <figure><figcaption>Base URL of Anthropic's API</figcaption><div class="code"><pre>{origin}</pre></div></figure>
    <figure><figcaption>Key <button class="link" id="change" type="button">Change it</button></figcaption>
      <div class="code"><pre>{key}</pre></div></figure></div>
  <details name="example" open><summary>curl</summary><div class="code"><pre>curl {origin}/v1/chat/completions \
  -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \
  -d '{"model": "{model}", "stream": false,
       "messages": [{"role": "user", "content": "Hello"}]}'</pre></div></details>
  <details name="example"><summary>Python</summary><div class="code"><pre>from openai import OpenAI
client = OpenAI(base_url="{origin}/v1", api_key="{key}")
answer = client.chat.completions.create(model="{model}", messages=[{"role": "user", "content": "Hello"}])
print(answer.choices[0].message.content)</pre></div></details>
  <details name="example"><summary>JavaScript</summary><div class="code"><pre>import OpenAI from "openai";
const client = new OpenAI({ baseURL: "{origin}/v1", apiKey: "{key}" });
const body = { model: "{model}", messages: [{ role: "user", content: "Hello" }] };
console.log((await client.chat.completions.create(body)).choices[0].message.content);</pre></div></details>
  <details name="example"><summary>Codex</summary><div class="code"><pre>codex -m {model} -c model_provider=z \
  -c model_providers.z.name=ZtoApi -c model_providers.z.base_url={origin}/v1 -c model_providers.z.wire_api=responses \
  -c 'model_providers.z.experimental_bearer_token="{key}"'</pre></div></details>
  <details name="example"><summary>Claude Code</summary><div class="code"><pre>ANTHROPIC_BASE_URL={origin} \
  ANTHROPIC_AUTH_TOKEN={key} claude</pre></div></details>
  <p class="quiet">ZtoApi itself needs a key of Z.ai, for free models too; it is
    <a href="https://z.ai/manage-apikey/apikey-list" target="_blank" rel="noreferrer">made there</a>.</p></section>
<section aria-labelledby="now" id="numbers" hidden><h2 id="now">Numbers</h2><p id="totals"></p>
  <figure id="chart"><figcaption></figcaption><svg viewBox="0 0 600 60" aria-hidden="true"><path/></svg></figure>
  <div class="scroll" id="tokens" tabindex="0" role="region" aria-label="Models"></div>
  <div class="scroll" id="recent" tabindex="0" role="region" aria-label="Last requests"></div></section></main>
<script>
const $ = id => document.getElementById(id);
const NONE = "\u2013", join = texts => texts.filter(Boolean).join(" \u00b7 ");
const time = ms => ms == null ? NONE : ms < 1000 ? ms.toFixed() + " ms" : (ms / 1000).toFixed(1) + " s";
const local = value => value.toLocaleString("en");
const size = tokens => tokens && (tokens < 1e6 ? (tokens / (tokens % 1024 ? 1000 : 1024)).toFixed() + "K" : "1M");
const clock = unix => new Date(unix * 1000).toLocaleTimeString([], { hourCycle: "h23" });
const serverError = (error, status) => new Error(join([error?.message ?? "No reason was given.", status, error?.code]));
const reason = error => (error.name === "Error" ? "" : "The connection to the server failed: ") + error.message;
const button = (text, onclick, className = "") => element("button", [text], { type: "button", onclick, className });
// The key that everybody knows, if it is valid here; the model to begin with.
const { key: knownKey, model: firstModel } = document.body.dataset;
// The key in use; what stops the answer under way; the conversation; what is copied in place of what is seen.
let key = "", running = null, turns = [], copying;

function element(tag, children = [], properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
function fill(place, ...children) {
  const fresh = place.cloneNode();
  fresh.append(...children);
  // What has not changed stays, and with it the reader's selection and focus.
  if (!fresh.isEqualNode(place)) place.replaceChildren(...children);
}
function fillTable(place, caption, heads, rows) {
  const row = (tag, cells) => element("tr", cells.map(cell => element(tag, [cell ?? NONE])));
  const lines = () => [element("caption", [caption]), row("th", heads), ...rows.map(cells => row("td", cells))];
  fill(place, ...rows.length ? [element("table", lines())] : []);
}
// A browser may forbid storage, or have no room for more: then nothing is kept.
function storage(work) {
  try { return work(); } catch { return ""; }
}
async function ask(path, options) {
  const used = key;
  const headers = { "Authorization": "Bearer " + used, "Content-Type": "application/json" };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401 && used === key) setKey("");
  throw serverError((await response.json().catch(() => null))?.error, response.status);
}
function setKey(value) {
  key = value;
  storage(() => { sessionStorage["ztoapi-key"] = key === knownKey ? "" : key; });
  if (!key) $("key-form").hidden = !($("numbers").hidden = true);
  showExamples();
}
async function tryKey(event) {
  event.preventDefault();
  setKey($("key").value.trim());
  await refresh();
  if (!key) return $("key").select();
  $("key").value = "";
  $("key-form").hidden = true;
  $("message").focus();
}
// A key of one's own is hidden on the screen, and whole in what is copied.
function shownKey() {
  if (!key || key === knownKey) return key || "your-key";
  return "\u2022".repeat(8) + (key.length < 12 ? "" : key.slice(-4));
}
const examples = [...document.querySelectorAll("#connecting pre")].map(node => [node, node.textContent]);
function showExamples() {
  const values = { "{origin}": location.origin, "{key}": shownKey(), "{model}": $("model").value || firstModel };
  examples.forEach(([node, text]) => node.textContent = text.replace(/{(origin|key|model)}/g, name => values[name]));
}
async function refresh() {
  if (!key || document.hidden) return;
  const get = async path => (await ask(path, { signal: AbortSignal.timeout(5000) })).json();
  try {
    if (!$("model").length) showModels((await get("/v1/models")).data);
    showStats(await get("/stats"));
  } catch (error) {
    fill($("state"), reason(error));
  }
}
function showModels(models) {
  const vision = model => model.input_modalities?.includes("image");
  const rank = model => model.free ? 0 : vision(model) ? 1 : 2;
  const words = model => join([model.id, model.free && "free", vision(model) && "vision", size(model.context_length)]);
  const find = name => models.find(({ id }) => id.toLowerCase() === name?.toLowerCase())?.id;
  models.sort((one, other) => rank(one) - rank(other));
  $("model").replaceChildren(...models.map(model => new Option(words(model), model.id)));
  $("model").value = find(storage(() => localStorage["ztoapi-model"])) ?? find(firstModel) ?? models[0].id;
  showExamples();
}
function showStats({ history, recent, gates, queued, tokens, trouble, ...stats }) {
  fill($("state"), ...inline(trouble.filter(Boolean).join(" ")));
  $("version").textContent = join([stats.version, stats.demo && "demo"]);
  $("numbers").hidden = !recent.length && !stats.in_flight;
  const waiting = Object.values(queued).reduce((sum, some) => sum + some, 0);
  const told = (number, words) => number && `${local(number)} ${words}`;
  const perSecond = Math.round(history.slice(-6).reduce((sum, some) => sum + some, 0) / 6) / 10;
  const firsts = recent.map(({ ttft }) => ttft).filter(Boolean).sort((one, other) => one - other);
  $("totals").textContent = join([told(stats.in_flight, "running"), told(waiting, "waiting"),
    told(stats.served, "answered"), told(stats.failed, "failed"), told(perSecond, "tokens/s"),
    firsts.length && "first word after " + time(1000 * firsts[firsts.length >> 1]),
    ...gates.map(([, model, limit]) => `${model} at most ${limit} at once`)]);
  showChart(history.map(tokens => tokens / 10));
  const used = Object.entries(tokens).filter(([, { prompt, completion }]) => prompt || completion);
  fillTable($("tokens"), "Tokens since the start", ["Model", "In", "Out"],
    used.map(([model, { prompt, completion }]) => [model, local(prompt), local(completion)]));
  const answering = row => row.by ? `${row.model} (${row.by})` : row.model;
  fillTable($("recent"), "Last requests", ["Time", "Model", "Status", "First word", "Total", "Tokens in / out", "API",
    "Key", "What went wrong"], recent.map(row => [clock(row.time), answering(row), row.status,
    time(row.ttft && 1000 * row.ttft), time(1000 * row.total), `${row.in ?? NONE} / ${row.out ?? NONE}`,
    row.path.replace("/v1/", ""), row.key, row.status === 499 ? "stopped by the client" : row.error]));
}
function showChart(values) {
  const most = Math.max(...values);
  const bars = values.map((value, place) => `M${10 * place} 60v${-60 * value / most}h9V60z`);
  $("chart").hidden = !most;
  $("chart").querySelector("figcaption").textContent = `Tokens per second, the last 10 minutes, at most ${most}`;
  if (most) $("chart").querySelector("path").setAttribute("d", bars.join(""));
}
// A question with its answer. What is said of it must have a name in KEPT to outlast a reload.
const KEPT = ["question", "model", "content", "thought", "first", "total", "tokens", "outcome"];
const keepChat = () => storage(() => { sessionStorage["ztoapi-chat"] = JSON.stringify(turns, KEPT); });
function addTurn(facts) {
  const [thoughts, text, foot] = ["thoughts", "text", "quiet"].map(className => element("div", [], { className }));
  const thinking = element("details", [element("summary", ["Thinking"]), thoughts], { hidden: !facts.thought });
  thoughts.append(facts.thought ?? "");
  const turn = { content: "", thought: "", ...facts, drawn: 0, depth: 0, quote: text, lists: [] };
  turns.push(Object.assign(turn, { thinking, thoughts, text, foot }));
  $("log").append(element("article", [turn.question], { className: "user", ariaLabel: "You" }),
    element("article", [thinking, text, foot], { ariaLabel: "Answer" }));
  $("log").scrollTop = $("log").scrollHeight;
  return turn;
}
function endTurn(turn) {
  cancelAnimationFrame(turn.frame);
  showFacts(turn);
  if (turn.content) turn.foot.append(" ", copyButton("Copy answer", turn.text, turn.content, "link"));
  draw(turn, true);
}
function showChat(chat, nodes) {
  turns = chat;
  $("log").replaceChildren(...nodes);
  showRunning("");
  keepChat();
  $("message").focus();
}
// A finished line stays as an element: a long answer costs no more a line than a short one.
function draw(turn, isEnd) {
  const follows = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 150;
  const lines = turn.content.slice(turn.drawn).split("\n"), last = lines.pop();
  turn.loose?.remove();
  lines.forEach(line => addLine(turn, line));
  turn.drawn = turn.content.length - last.length;
  // What may become a fence, a rule or a row of dashes waits. The rest is drawn, and taken back with the next piece.
  turn.loose = isEnd || !/^[\s>]*(`{1,3}[^`]*|~+|[-*_+|:\s]*)$/.test(last) ? addLine({ ...turn }, last) : null;
  turn.frame = null;
  if (follows) $("log").scrollTop = $("log").scrollHeight;
}

// Appends a line of Markdown and gives the outermost new element. `turn` knows what is open: quotes, lists, a fence, a
// table, a line that may be the head of one. These are replaced, never changed, as draw() tries a line on a copy.
function addLine(turn, line) {
  if (turn.fence) return addCode(turn, line);
  const made = [], put = (place, node) => (made.push(node), place.appendChild(node));
  const [, marks, body] = line.match(/^((?: {0,3}> ?){0,9})(.*)/s), depth = marks.split(">").length - 1;
  const quote = () => Array(depth).fill().reduce(place => put(place, element("blockquote")), turn.text);
  if (depth !== turn.depth) Object.assign(turn, { depth, quote: quote(), lists: [], table: null });
  if (body.trim()) addBlock(turn, body, put);
  else Object.assign(turn, { table: null, head: null });
  if (turn.gap) made[0]?.classList.add("gap");
  turn.gap = !body.trim();
  return made[0];
}
function addBlock(turn, body, put) {
  const isRule = /^ {0,3}([-*_])( *\1){2,} *$/.test(body), { table, head } = turn;
  const [, space, mark, words] = body.match(/^(\s*)(?:([-*+]|\d{1,9}[.)])(?:\s+|$))?(.*)/s);
  const indent = space.replaceAll("\t", "    ").length;
  // The lists that it is indented under, and the one that it is level with.
  const outer = turn.lists.filter(list => indent >= list.indent + 2), level = turn.lists[outer.length];
  const place = outer.at(-1)?.list.lastChild ?? turn.quote;
  const cells = (tag, row) => element("tr", row.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/)
    .map(cell => element(tag, inline(cell.trim().replaceAll("\\|", "|")))));
  turn.head = null;
  if (table && body.includes("|")) return put(table, cells("td", body));
  turn.table = null;
  if (head && /^[\s:|-]+$/.test(body) && body.includes("-") && body.includes("|")) {
    turn.table = element("table", [cells("th", head.body)]);
    return head.node.replaceWith(element("div", [turn.table], { className: "scroll " + head.node.className }));
  }
  if (mark && !isRule) {
    const [tag, facts] = mark.length > 1 ? ["ol", { start: parseInt(mark) }] : ["ul"];
    const list = level?.list.localName === tag ? level.list : put(place, element(tag, [], facts));
    turn.lists = [...outer, { list, indent: Math.min(indent, level?.indent ?? indent) }];
    return put(list, element("li", inline(words)));
  }
  turn.lists = outer;
  const [, fence] = body.match(/^\s*(~{3,}|`{3,}(?=[^`]*$))/) ?? [], [, title] = body.match(/^\s*#{1,6}\s+(.*)/s) ?? [];
  if (fence) {
    const pre = element("pre"), margin = new RegExp(`^(?: {0,3}> ?){0,${turn.depth}} {0,${indent}}`);
    turn.fence = { pre, margin, end: new RegExp(`^ {0,3}${fence}${fence[0]}*\\s*$`) };
    return put(place, element("div", [pre, copyButton("Copy", pre)], { className: "code" }));
  }
  if (isRule) return put(place, element("hr"));
  const node = put(place, element(title ? "h3" : "p", inline(title ?? words)));
  if (body.includes("|")) turn.head = { node, body };
}
function addCode(turn, line) {
  const code = line.replace(turn.fence.margin, "");
  if (!turn.fence.end.test(code)) return turn.fence.pre.appendChild(new Text(code + "\n"));
  turn.fence = null;
}
// What stands within a line. An address is one of the web; no end of a sentence is its last sign.
const INLINE = new RegExp("(" + [
  /\\[!-/:-@[-`{-~]|``.+?``(?!`)|`[^`]+`|\*\*(?=\S).+?\*\*(?!\*)|~~(?=\S).+?~~/,
  /\*[^\s*](?:[^*]*[^\s*])?\*|\b_[^\s_](?:[^_]*[^\s_])?_\b/,
  /!?\[(?:[^[\]]|\[[^[\]]*\])+\]\(https?:\/\/(?:[^\s()]|\([^\s()]*\))+\)/,
  /https?:\/\/(?:\([^\s()]*\)|(?![.,;:!?]+(?:[\s)]|$))[^\s()[\]<>"'`*|\u3000-\u303f\uff00-\uffef])+/,
].map(part => part.source).join("|") + ")", "gis");
const TAGS = { "`": "code", "``": "code", "**": "strong", "~~": "del", "*": "em", "_": "em" };
function inline(text) {
  // In a line of that length no reader looks for emphasis, and the search would take long.
  if (text.length > 5000) return [text];
  return text.split(INLINE).map((piece, place) => place % 2 ? inlinePiece(piece) : piece);
}
function inlinePiece(piece) {
  if (piece[0] === "\\") return piece[1];
  const [, mark] = piece.match(/^(`{1,2}|\*{1,2}|~~|_)/) ?? [], inner = mark && piece.slice(mark.length, -mark.length);
  if (mark) return element(TAGS[mark], TAGS[mark] === "code" ? [inner] : inline(inner));
  const [, words, href] = piece.match(/^!?\[(.*)\]\((.*)\)$/s) ?? [, piece, piece];
  return element("a", words.includes("://") ? [words] : inline(words), { href, target: "_blank", rel: "noreferrer" });
}
async function readAnswer(turn, response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part; !(part = await reader.read()).done;) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const data of lines.filter(line => line.startsWith("data:")).map(line => line.slice(5).trim())) {
      if (data === "[DONE]") return "Done";
      addEvent(turn, JSON.parse(data));
    }
  }
  throw new Error("The answer was cut off: its stream ended too early.");
}
function addEvent(turn, { error, usage, choices: [choice] = [] }) {
  if (error) throw serverError(error);
  const thought = choice?.delta?.reasoning_content ?? "", text = choice?.delta?.content ?? "";
  if (thought || text) turn.first ??= performance.now() - turn.began;
  if (thought && turn.thinking.hidden) turn.thinking.hidden = !(turn.thinking.open = true);
  if (text && !turn.content) turn.thinking.open = false;
  turn.tokens = usage?.completion_tokens ?? turn.tokens;
  turn.content += text;
  turn.thought += thought;
  turn.thoughts.append(thought);
  turn.frame ??= requestAnimationFrame(() => draw(turn));
}
function showFacts(turn) {
  if (turn.began) turn.total = performance.now() - turn.began;
  const { model, first, total, tokens, outcome = "" } = turn;
  turn.foot.className = outcome.startsWith("Failed") ? "bad" : "quiet";
  turn.foot.textContent =
    join([model, first && "first word " + time(first), "total " + time(total), tokens && tokens + " tokens", outcome]);
}
async function answer(turn, { signal }) {
  const said = turns.filter(other => other.content || other === turn).flatMap(({ question, content }) =>
    [{ role: "user", content: question }, { role: "assistant", content }]);
  const body = JSON.stringify({ model: turn.model, messages: said.slice(0, -1), enable_thinking: $("thinking").checked,
    stream: true, stream_options: { include_usage: true } });
  return readAnswer(turn, await ask("/v1/chat/completions", { method: "POST", body, signal }));
}
async function send(event) {
  event.preventDefault();
  if (running && event.type === "submit") return running.abort();  // its button says Stop
  if (!key) return $("key-form").reportValidity();
  if (running || !$("chat").reportValidity()) return;
  const turn = addTurn({ question: $("message").value, model: $("model").value, began: performance.now() });
  const ticking = setInterval(showFacts, 1000, turn);
  $("message").value = "";
  running = new AbortController();
  showRunning("Answering");
  turn.outcome = await answer(turn, running).catch(error => {
    const outcome = running.signal.aborted ? "Stopped" : "Failed: " + reason(error);
    running.abort();  // An error inside the stream leaves the connection open.
    return outcome;
  });
  running = null;
  clearInterval(ticking);
  endTurn(turn);
  if (!turn.content) $("message").value ||= turn.question;  // nothing came: it can be sent again
  showRunning(turn.outcome.split(":")[0]);
  keepChat();
}
function showRunning(outcome) {
  $("log").ariaBusy = running !== null;  // an answer is read out when it is complete
  $("send").textContent = running ? "Stop" : "Send";
  $("new").disabled = running !== null || !turns.length;
  $("outcome").textContent = outcome;
  // On a phone that would open the keyboard.
  if (document.activeElement === $("send") && !matchMedia("(pointer: coarse)").matches) $("message").focus();
}
// Not by navigator.clipboard, which browsers withhold from plain http anywhere but on localhost.
function copyButton(name, node, text, className) {
  return button(name, ({ target }) => {
    getSelection().selectAllChildren(node);
    copying = text;
    target.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    copying = undefined;
    setTimeout(() => { target.textContent = name; }, 2000);
  }, className);
}
document.oncopy = event => {
  const seen = String(getSelection()), isExample = $("connecting").contains(getSelection().anchorNode);
  const meant = copying ?? (key && isExample ? seen.replaceAll(shownKey(), key) : seen);
  if (meant === seen) return;
  event.clipboardData.setData("text/plain", meant);
  event.preventDefault();
};
document.querySelectorAll("pre").forEach(pre => pre.after(copyButton("Copy", pre)));
window.onbeforeunload = window.onpagehide = () => { running?.abort(); keepChat(); };
$("key-form").onsubmit = event => { tryKey(event); };
$("change").onclick = () => { $("key-form").hidden = false; $("key").focus(); };
$("chat").onsubmit = event => { send(event); };
// In braces, as a handler that returns false cancels what the key would do.
$("message").onkeydown = event => {
  // 229: in Safari that alone tells the Enter which ends the input of a Chinese word.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) send(event);
};
$("model").onchange = () => { storage(() => { localStorage["ztoapi-model"] = $("model").value; }); showExamples(); };
$("new").onclick = () => {
  const before = turns, nodes = [...$("log").childNodes];
  showChat([], []);
  $("outcome").append(button("Back to the old chat", () => { showChat(before, nodes); }, "link"));
};
const before = JSON.parse(storage(() => sessionStorage["ztoapi-chat"]) || "[]");
before.forEach(facts => endTurn(addTurn({ outcome: "Stopped", ...facts })));
showRunning("");
setKey(knownKey || storage(() => sessionStorage["ztoapi-key"]) || "");
$("change").hidden = knownKey !== "";
$(key ? "message" : "key").focus();
refresh();
setInterval(refresh, 2000);
</script></body></html>
"""  # noqa: E501


if __name__ == "__main__":
    sys.exit(main(os.environ, sys.argv[1:]))
