#!/usr/bin/env python3
"""ZtoApi: an OpenAI-compatible API for Z.ai's GLM models, in one file, on the standard library alone.

    ZAI_API_KEY=your-z.ai-key python3 ztoapi.py

Then point any OpenAI client at http://localhost:9090/v1 with the key sk-your-key.

    python3 ztoapi.py            serve
    python3 ztoapi.py --check    find out what is wrong before any client is involved
    python3 ztoapi.py --help     this text
    DEMO_MODE=true python3 ztoapi.py    no key, no network: answers come from a stand-in

The way of a request, which is also the order of this file:

              dict                     dict                        bytes
    client --> Handler --> to_zai_request() --> Upstream (gate, pool, retry) --> Z.ai
                  ^                                 | recv()
    SSE or JSON   |  ChunkTranslator <--event-- SSEDecoder <-- Dechunker
          bytes <-+-- collect_completion()     (a JSON answer is the fold of a streamed one)

All configuration comes from the environment. Durations are seconds; booleans are true/false, 1/0, yes/no, on/off.

    PORT              9090                          port to listen on
    HOST              127.0.0.1                     address to listen on; beyond loopback only with a DEFAULT_KEY of your own
    DEFAULT_KEY       sk-your-key                   the key clients must send; several, comma-separated
    ZAI_API_KEY       none                          your Z.ai key; several, comma-separated
    ZAI_BASE_URL      https://api.z.ai/api/paas/v4  Z.ai's API; the Coding Plan's and the mainland's bases work too
    DEFAULT_STREAM    true                          what a request without "stream" gets
    ENABLE_THINKING   unset                         true or false for requests that do not say; unset leaves it to the model
    REASONING_FORMAT  parsed                        thinking as reasoning_content (parsed), as <think> text (raw), or not at all (hidden)
    MODEL_ALIASES     none                          gpt-4o=glm-4.6,gpt-4o-mini=glm-4.5-air; *=glm-4.6 catches every unknown id
    MAX_CONCURRENCY   0                             requests in flight per Z.ai key and model; 0: learned from Z.ai's refusals
    QUEUE_TIMEOUT     120                           longest wait for a free slot, then 429
    MAX_RETRIES       2                             further attempts after a failure that may heal, while nothing has been sent
    HEARTBEAT         10                            an empty chunk after that long without a byte to a streaming client; 0: none
    UPSTREAM_TIMEOUT  300                           longest silence of Z.ai
    CLIENT_TIMEOUT    60                            longest a client may take to send a request or to take one write
    MAX_BODY_MB       64                            largest request body
    MAX_CONNECTIONS   1024                          clients connected at once
    CORS_ORIGIN       *                             web origins that may call, comma-separated; empty: none (always none with the well-known key)
    DEBUG_MODE        false                         detailed log lines, never texts or keys
    DEMO_MODE         false                         answer from a stand-in for Z.ai inside this file
"""

from __future__ import annotations

import base64
import bisect
import collections
import contextlib
import dataclasses
import datetime
import difflib
import email.utils
import errno
import functools
import hashlib
import hmac
import http.client
import http.server
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
import socketserver
import ssl
import sys
import threading
import time
import urllib.parse
import urllib.request
import zlib
from http import HTTPStatus
from typing import Callable, NamedTuple

__version__ = "1.0.0"

log = logging.getLogger("ztoapi")


# Configuration ########################################################################################################
#
# One frozen dataclass, one field a variable: its name in capitals is the variable's. To add a setting, add a line.

WELL_KNOWN_KEY = "sk-your-key"  # in the README, hence in every port scanner's list
REASONING_FORMATS = ("parsed", "raw", "hidden")


class SettingsError(ValueError):
    """A variable has a value that cannot be used. The text is one line: the variable, the value, what is allowed."""


def boolean(text):
    return {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}[text.lower()]


def whole(low, high=10**9):
    def parse(text):
        if not (re.fullmatch("[0-9]{1,12}", text) and low <= int(text) <= high):
            raise ValueError(text)
        return int(text)
    return parse


def seconds(low):
    def parse(text):
        value = float(text)
        if not low <= value <= 10**6:  # also refuses nan
            raise ValueError(text)
        return value
    return parse


def one_of(*words):
    return lambda text: words[words.index(text.lower())]


def items(text):
    return tuple(item.strip() for item in text.split(",") if item.strip())


def keys(text):
    if not all(re.fullmatch("[!-~]+", key) for key in items(text)):  # they travel in a header
        raise ValueError(text)
    return items(text)


def base_url(text):
    url = re.sub(r"(/+chat/completions)?/*$", "", text)
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not re.fullmatch("[!-~]+", url) or re.search("[?#]", url):
        raise ValueError(text)
    if parts.port == 0 or not parts.hostname.encode("idna"):  # both raise ValueError themselves
        raise ValueError(text)
    return url


def aliases(text):
    pairs = dict(map(str.strip, item.split("=", 1)) for item in items(text))
    if not all(pairs) or not all(pairs.values()):
        raise ValueError(text)
    return pairs


def setting(default, parse, allowed, secret=False):
    """A dataclass field that knows how its variable is read; `allowed` completes "allowed is ..."."""
    kind = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(repr=not secret, metadata={"parse": parse, "allowed": allowed, "secret": secret}, **kind)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment says. Durations are in seconds. Keys never show in repr()."""

    port: int = setting(9090, whole(0, 65535), "a port from 0 to 65535")
    host: str = setting("127.0.0.1", str, "an address of this machine")
    default_key: tuple[str, ...] = setting((WELL_KNOWN_KEY,), keys, "one or more keys of printable ASCII", secret=True)
    zai_api_key: tuple[str, ...] = setting((), keys, "one or more keys of printable ASCII", secret=True)
    zai_base_url: str = setting("https://api.z.ai/api/paas/v4", base_url, "an http or https URL")
    default_stream: bool = setting(True, boolean, "true or false")
    enable_thinking: bool | None = setting(None, boolean, "true or false")  # None: the model decides
    reasoning_format: str = setting("parsed", one_of(*REASONING_FORMATS), "parsed, raw or hidden")
    model_aliases: dict[str, str] = setting(dict, aliases, "pairs like gpt-4o=glm-4.6")
    max_concurrency: int = setting(0, whole(0), "a whole number")
    queue_timeout: float = setting(120.0, seconds(0), "seconds")
    max_retries: int = setting(2, whole(0, 100), "a whole number up to 100")
    heartbeat: float = setting(10.0, seconds(0), "seconds")  # browsers, proxies and SDKs give up from 30 s of silence on
    upstream_timeout: float = setting(300.0, seconds(0.001), "seconds above 0")  # models have been seen thinking for minutes
    client_timeout: float = setting(60.0, seconds(0.001), "seconds above 0")
    max_body_mb: int = setting(64, whole(1, 2048), "a whole number from 1 to 2048")  # some twelve of Z.ai's largest images
    max_connections: int = setting(1024, whole(1, 100000), "a whole number from 1 to 100000")
    cors_origin: tuple[str, ...] = setting(("*",), items, "* or a list of origins")
    debug_mode: bool = setting(False, boolean, "true or false")
    demo_mode: bool = setting(False, boolean, "true or false")

    def __post_init__(self):
        if not self.default_key:
            raise SettingsError("DEFAULT_KEY=: allowed is one or more keys of printable ASCII")
        if self.well_known and not is_loopback(self.host):
            raise SettingsError(f"HOST={ascii(self.host)[1:-1]}: beyond this computer the well-known DEFAULT_KEY is not allowed; set a key of your own")

    @classmethod
    def from_environ(cls, environ):
        """The settings that `environ`, a mapping like os.environ, asks for; SettingsError for a value that cannot be used."""
        values = {}
        for field in dataclasses.fields(cls):
            variable = field.name.upper()
            text = environ.get(variable, "").strip()
            if not text and not (variable in environ and variable in ("DEFAULT_KEY", "CORS_ORIGIN")):
                continue
            try:
                values[field.name] = field.metadata["parse"](text)
            except (ValueError, KeyError):
                shown = "..." if field.metadata["secret"] else ascii(text)[1:-1]
                raise SettingsError(f"{variable}={shown}: allowed is {field.metadata['allowed']}") from None
        return cls(**values)

    @property
    def well_known(self):
        """True while anybody who has read the README knows a key that works here."""
        return WELL_KNOWN_KEY in self.default_key

    @functools.cached_property
    def secrets(self):
        """The keys, and the halves of a Z.ai key (id.secret), which Z.ai may quote on their own."""
        keys = self.zai_api_key + tuple(key for key in self.default_key if len(key) >= 8 and key != WELL_KNOWN_KEY)
        parts = [part for key in keys for part in [key, *(half for half in key.split(".") if len(half) >= 8)]]
        parts += [ascii(part)[1:-1] for part in parts]  # as a message quotes it
        return tuple(sorted(set(parts), key=len, reverse=True))  # the longest first: one may begin like another

    def redact(self, text):
        """`text` without any secret: what is logged, and what Z.ai said, passes through here."""
        for secret in self.secrets:
            text = text.replace(secret, "[redacted]")
        return text


def is_loopback(host):
    return host.lower() in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def mask(key):
    """A key as a log may show it: its last four characters, and none of a short one."""
    return "..." + key[-4:] if len(key) >= 12 else "..."


def plain(text, longest=200, replace=re.compile("[^!-~]").sub):
    """Somebody else's text as one word of a log line or of a header."""
    return replace("?", text[:longest])


# Errors ###############################################################################################################
#
# Few, and split by whose fault it is. Each knows the HTTP status and the OpenAI error object it becomes. What Z.ai's
# business codes mean is a table: its HTTP status says little (429 is also "no money").

class ClientGone(Exception):
    """The client has left; there is nobody to tell."""


class ApiError(Exception):
    """An answer that is an error. `retry_after` is in seconds; `heals` False tells OpenAI's SDKs not to try again."""

    status, type, code = 500, "server_error", "internal_error"

    def __init__(self, message, param=None, status=None, type=None, code=None, retry_after=None, heals=None):
        super().__init__(message)
        self.message, self.param, self.retry_after, self.heals = message, param, retry_after, heals
        self.status, self.type, self.code = status or self.status, type or self.type, code or self.code

    def body(self):
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self):
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, int(self.retry_after + 0.999)))
        if self.heals is False:
            headers["x-should-retry"] = "false"  # the SDKs would retry any 429 and 5xx twice
        return headers


class RequestError(ApiError):
    """The client asked for something that cannot be. Nothing has left the house."""

    status, type, code = 400, "invalid_request_error", "invalid_value"


# What to do after a failure, while nothing of the answer has come.
GIVE_UP = "give up"        # it cannot heal
TRY_AGAIN = "try again"    # after a backoff, MAX_RETRIES times
SLOW_DOWN = "slow down"    # back to the head of the queue, as often as QUEUE_TIMEOUT allows
NEXT_KEY = "next key"      # this Z.ai key is refused or exhausted


class UpstreamError(ApiError):
    """Z.ai, or the road to it, failed.

    `verdict` is one of the four above; `learn`: the gate's ceiling is to be lowered; `silence`: UPSTREAM_TIMEOUT is over;
    `pause`: the seconds Z.ai itself asked to wait.
    """

    status, type, code = 502, "upstream_error", "upstream_error"

    def __init__(self, message, verdict=TRY_AGAIN, zai_code="", learn=False, silence=False, pause=None, **kwargs):
        super().__init__(message, **kwargs)
        self.verdict, self.zai_code, self.learn, self.silence, self.pause = verdict, zai_code, learn, silence, pause


class ErrorRow(NamedTuple):
    status: int
    type: str
    code: str
    verdict: str
    advice: str = ""
    retry_after: float | None = None  # seconds, for the client, unless Z.ai says better


QUOTA = ErrorRow(429, "insufficient_quota", "insufficient_quota", NEXT_KEY)
RATE = ErrorRow(429, "rate_limit_error", "rate_limit_exceeded", SLOW_DOWN, "Z.ai limits the requests in flight for each model.", 5)
OVERLOADED = ErrorRow(503, "server_error", "overloaded", TRY_AGAIN, "Another model may have room.", 10)
INVALID = ErrorRow(400, "invalid_request_error", "invalid_value", GIVE_UP)
NO_MODEL = ErrorRow(404, "invalid_request_error", "model_not_found", GIVE_UP)
FORBIDDEN = ErrorRow(403, "permission_error", "permission_denied", GIVE_UP)
OUR_KEY = ErrorRow(502, "upstream_error", "upstream_auth_error", NEXT_KEY, "Check ZAI_API_KEY: Z.ai refused the proxy's key, not yours.")
BROKEN = ErrorRow(502, "upstream_error", "upstream_error", TRY_AGAIN)
WRONG_PATH = ErrorRow(502, "upstream_error", "upstream_error", GIVE_UP, "Check ZAI_BASE_URL: this does not look like Z.ai's API.")

ZAI_ERRORS = {
    code: row for codes, row in (
        ("1113", QUOTA._replace(advice="Recharge, or perhaps this is a Coding Plan key on the pay-as-you-go ZAI_BASE_URL (or the reverse).")),
        ("1304 1308 1309 1310 1314 1315 1316 1317 1318 1319 1320 1321", QUOTA),
        ("1302 1303", RATE),
        ("1305 1312", OVERLOADED),
        ("1120", OVERLOADED._replace(advice="")),
        ("1210 1212 1213 1214 1215 1231", INVALID),
        ("1211 1221 1222", NO_MODEL),
        ("1261", INVALID._replace(code="context_length_exceeded", advice=  # clients that shorten by themselves look for these words
            "This model's maximum context length is exceeded (context_length_exceeded): shorten the conversation, or use a model with a longer one.")),
        ("1301", INVALID._replace(code="content_filter")),
        ("1100 1220 1300", FORBIDDEN),
        ("1311", FORBIDDEN._replace(advice="Your plan does not include this model.")),
        ("1313", FORBIDDEN._replace(advice="Z.ai objects to how this plan is used: the Coding Plan is for its supported tools only.")),
        ("401 1000 1001 1002 1003 1004 1110 1111 1112 1121", OUR_KEY),
        ("500 1200 1230 1234", BROKEN),
        ("-1", BROKEN._replace(status=500, type="server_error", code="server_error")),
    ) for code in codes.split()
}
HTTP_ERRORS = {  # for codes Z.ai has not told us of, and for answers without a code
    200: BROKEN, 400: INVALID, 401: OUR_KEY, 403: FORBIDDEN, 404: WRONG_PATH, 405: WRONG_PATH, 408: BROKEN, 413: INVALID._replace(status=413),
    422: INVALID, 429: RATE, 434: FORBIDDEN, 435: INVALID._replace(status=413),
}
BARE_HTTP_ERRORS = {200: BROKEN, 401: OUR_KEY, 408: BROKEN, 429: RATE}  # for pages of whoever stands in between


def zai_error(value, status=200, now=None, model="", retry_after=None):
    """The UpstreamError for an error body of Z.ai.

    `value`: the parsed body, None if it was no JSON; `status`: its HTTP status; `now`: Unix seconds, to compute how long
    a quota stays exhausted; `model`: the id asked for, for advice; `retry_after`: the seconds that Z.ai asked to wait.
    """
    code, message = zai_code_and_message(value)
    by_status = HTTP_ERRORS if code or message else BARE_HTTP_ERRORS
    row = WRONG_PATH if code == "404" else ZAI_ERRORS.get(code) or by_status.get(status) or (BROKEN if status >= 500 else WRONG_PATH)
    advice = row.advice
    if row is NO_MODEL:
        close = difflib.get_close_matches(model, MODELS, 3, 0.5)
        names = ", ".join(MODELS[id].name for id in close)
        advice = f"Known models near it: {names}." if names else "GET /v1/models lists the known ones."
    words = "Z.ai: " + (message[:2000] or f"HTTP status {status} without a reason")
    reset = seconds_until_reset(message, now) if now is not None else None
    return UpstreamError(
        " ".join(filter(None, (words + (f" (code {code})." if code else "."), advice))), row.verdict, zai_code=code, learn=code == "1302", pause=retry_after,
        status=row.status, type=row.type, code=row.code, heals=False if row.verdict in (GIVE_UP, NEXT_KEY) else None,
        retry_after=next((s for s in (reset, retry_after, row.retry_after) if s is not None), None))


def zai_code_and_message(value):
    """(code, message) of Z.ai's error shapes; ("404", ...) for the answers, some with HTTP status 200, of paths that are not there."""
    value = value if isinstance(value, dict) else {}
    error = value.get("error")
    if isinstance(error, dict):
        return str(error.get("code") or ""), str(error.get("message") or "")
    if isinstance(error, str):  # {"timestamp":...,"status":404,"error":"Not Found","path":...}
        return str(value.get("status") or ""), error
    if "code" in value:  # {"code":500,"msg":"404 NOT_FOUND","success":false}
        message = str(value.get("msg") or value.get("message") or "")
        return "404" if str(value["code"]) == "500" else str(value["code"]), message
    return "", ""


def seconds_to_wait(text, now):
    """Seconds from `now` (Unix) that a Retry-After header asks for, as a number or as a date; None if it is neither."""
    if re.fullmatch("[0-9]{1,6}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (TypeError, ValueError, IndexError):
        return None


BEIJING = datetime.timezone(datetime.timedelta(hours=8))


def seconds_until_reset(message, now):
    """Seconds from `now` (Unix) to the Beijing time in "Your limit will reset at 2026-09-09 05:38:28"; None without one."""
    found = re.search(r"reset at (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)", message)
    try:
        reset = datetime.datetime.strptime(found.group(1), "%Y-%m-%d %H:%M:%S") if found else None
    except ValueError:
        return None
    return max(1.0, reset.replace(tzinfo=BEIJING).timestamp() - now) if reset else None


# Models ###############################################################################################################
#
# Z.ai's catalogue as measured in October 2026; ids that are not here go through all the same. To add a model, add a row.

NO_THINKING, SWITCH, GRADED, ALWAYS = "none", "on or off", "graded", "always"  # how a model's thinking is controlled


class Model(NamedTuple):
    name: str            # the brand's spelling, which clients see; Z.ai takes it in lower case
    created: int         # Unix seconds, from Z.ai's own list; for models it does not list, the day of release or first sighting
    max_tokens: int | None  # more is a 400 there
    sees: bool           # takes images
    thinking: str
    tool_stream: bool    # streams the arguments of tool calls; without, a long call is a long silence

    @property
    def id(self):
        return self.name.lower()


MODELS = {
    model.id: model for model in (
        Model("GLM-5.3", 1786924800, 131072, False, ALWAYS, True),
        Model("GLM-5.3-Flash", 1786924800, 131072, True, ALWAYS, True),
        Model("GLM-5.3-FlashX", 1786924800, 131072, True, ALWAYS, True),
        Model("GLM-5.2", 1781625600, 131072, False, GRADED, True),
        Model("GLM-5.1", 1774620000, 131072, False, SWITCH, True),
        Model("GLM-5-Turbo", 1773504000, 131072, False, SWITCH, True),
        Model("GLM-5V-Turbo", 1775001600, 131072, True, SWITCH, False),
        Model("GLM-5", 1770739200, 131072, False, SWITCH, True),
        Model("GLM-4.7", 1766332800, 131072, False, SWITCH, True),
        Model("GLM-4.7-Flash", 1768780800, 131072, False, SWITCH, True),
        Model("GLM-4.7-FlashX", 1768780800, 131072, False, SWITCH, True),
        Model("GLM-4.6", 1759276800, 131072, False, SWITCH, True),
        Model("GLM-4.6V", 1765152000, 32768, True, SWITCH, False),
        Model("GLM-4.6V-Flash", 1765152000, 32768, True, SWITCH, False),
        Model("GLM-4.6V-FlashX", 1765152000, 32768, True, SWITCH, False),
        Model("GLM-4.5", 1753632000, 98304, False, SWITCH, False),  # documented 96K; one measurement says 131072
        Model("GLM-4.5-X", 1753632000, 98304, False, SWITCH, False),
        Model("GLM-4.5-Air", 1753632000, 98304, False, SWITCH, False),
        Model("GLM-4.5-AirX", 1753632000, 98304, False, SWITCH, False),
        Model("GLM-4.5-Flash", 1753632000, 98304, False, SWITCH, False),
        Model("GLM-4.5V", 1754870400, 16384, True, SWITCH, False),
        Model("GLM-4.1V-Thinking-Flash", 1751414400, 16384, True, NO_THINKING, False),
        Model("GLM-4.1V-Thinking-FlashX", 1751414400, 16384, True, NO_THINKING, False),
        Model("GLM-4-Flash-250414", 1744588800, 16384, False, NO_THINKING, False),
        Model("GLM-4-FlashX-250414", 1744588800, 16384, False, NO_THINKING, False),
        Model("GLM-4-32B-0414-128K", 1744588800, 16384, False, NO_THINKING, False),
        Model("GLM-4V-Flash", 1733702400, 1024, True, NO_THINKING, False),
        Model("GLM-4-Long", 1722384000, 4095, False, NO_THINKING, False),
        Model("AutoGLM-Phone-Multilingual", 1765238400, None, True, NO_THINKING, False),
    )
}
SEEING = ", ".join(model.name for model in MODELS.values() if model.sees and model.thinking != NO_THINKING)


def listed_models(settings):
    """What GET /v1/models lists: name -> created. The table, then the aliases."""
    names = {model.name: model.created for model in MODELS.values()}
    for alias, target in settings.model_aliases.items():
        if alias != "*":
            known = MODELS.get(target.lower())
            names.setdefault(alias, known.created if known else 0)
    return names


def zai_model_id(name, model_aliases):
    """Z.ai's id for the model a client names: aliases first, then `*` for ids the table does not know; "[1m]" suffixes go."""
    folded = {alias.lower(): target for alias, target in model_aliases.items()}

    def bare(text):
        return text.partition("[")[0].strip().lower()
    id = bare(name)
    if id in folded:
        return bare(folded[id])
    return bare(folded["*"]) if "*" in folded and id not in MODELS else id


# OpenAI request -> Z.ai request #######################################################################################
#
# Validation happens here, at the door, and only here: what passes is trusted below. The ranges refused are OpenAI's own;
# what is inside them and outside Z.ai's is clamped. null in an optional field counts as absent.

NUMBER = (int, float)
KINDS = {bool: "true or false", str: "a string", dict: "an object", list: "an array", int: "a whole number", NUMBER: "a number",
         (str, list): "a string or an array", (str, dict): "a string or an object"}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Field(NamedTuple):
    """One optional field of a request: its type, its range or its words."""
    kind: object
    low: object = None
    high: object = None
    words: tuple = ()


PASSED = {  # as they are; so is every field that is in none of these tables
    "seed": Field(int), "user_id": Field(str), "request_id": Field(str), "do_sample": Field(bool), "tool_stream": Field(bool),
}
TRANSLATED = {
    "stream": Field(bool), "stream_options": Field(dict), "n": Field(int, 1, 1),
    "temperature": Field(NUMBER, 0, 2), "top_p": Field(NUMBER, 0, 1), "stop": Field((str, list)), "user": Field(str),
    "max_tokens": Field(int, 1), "max_completion_tokens": Field(int, 1), "response_format": Field(dict),
    "tools": Field(list), "tool_choice": Field((str, dict)), "parallel_tool_calls": Field(bool),
    "reasoning_effort": Field(str, words=EFFORTS), "thinking": Field(dict), "enable_thinking": Field(bool),
    "reasoning_format": Field(str, words=REASONING_FORMATS),
}
DROPPED = {  # Z.ai has no use for them
    "presence_penalty": Field(NUMBER, -2, 2), "frequency_penalty": Field(NUMBER, -2, 2), "logit_bias": Field(dict),
    "logprobs": Field(bool), "top_logprobs": Field(int, 0, 20),
    "metadata": Field(dict), "store": Field(bool), "service_tier": Field(str), "modalities": Field(list), "audio": Field(dict),
    "prediction": Field(dict), "verbosity": Field(str), "web_search_options": Field(dict), "safety_identifier": Field(str),
    "prompt_cache_key": Field(str), "prompt_cache_retention": Field(str), "prompt_cache_options": Field(dict), "moderation": Field(dict),
}
FIELDS = {**PASSED, **TRANSLATED, **DROPPED}


def no_number(text):
    raise ValueError(f"{text:.20} is no JSON number")


def whole_number(text):
    return int(text) if len(text) <= 100 else no_number(text)  # int() takes quadratic time before Python 3.11


def decimal_number(text):
    value = finite(text)
    return no_number(text) if value is None else value


def finite(text):
    """The number, unless it is too large to be one: JSON has no word for infinity."""
    value = float(text)
    return None if abs(value) == float("inf") else value


_decode_strictly = json.JSONDecoder(parse_constant=no_number, parse_int=whole_number, parse_float=decimal_number).decode


def read_json_object(data):
    """The dict in a request body (bytes). RequestError for anything else, and for numbers no JSON reader agrees on."""
    try:
        value = _decode_strictly(data.decode("utf-8-sig"))
    except RecursionError:
        raise RequestError("The body is nested too deeply.") from None
    except UnicodeDecodeError:
        raise RequestError("The body is not UTF-8 text.") from None
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.")
    return value


def wants_stream(request, accept, user_agent, default):
    """Whether to stream: what the request says; else JSON for clients whose own default it is; else `default`."""
    if request.get("stream") is not None:
        return request["stream"]
    if "application/json" in accept.lower() or "ai-sdk/" in user_agent or "async-openai" in user_agent:
        return False
    return default


def to_zai_request(request, settings):
    """(zai_request, changed) for an OpenAI chat request: Z.ai's body, and short names of what was altered or dropped.

    RequestError for what OpenAI would refuse too, and for images sent to a model that sees none. Sources: Z.ai's OpenAPI
    file, and what its servers were seen to accept and to refuse.
    """
    request = {name: value for name, value in request.items() if value is not None}
    check_fields(request)
    changed = []
    id = zai_model_id(request["model"], settings.model_aliases)
    if not id:
        raise RequestError("'model' must not be empty.", "model")
    model = MODELS.get(id)
    zai_request = {name: value for name, value in request.items() if name not in TRANSLATED and name not in DROPPED}
    zai_request.update(model=id, stream=True, messages=to_zai_messages(request["messages"], model, changed))
    zai_request.update(to_zai_sampling(request, model, changed))
    instructions = []  # what Z.ai has no field for, as system lines
    zai_request.update(to_zai_tools(request, instructions, changed))
    zai_request.update(to_zai_thinking(request, model, settings.enable_thinking, changed))
    zai_request.update(to_zai_format(request, instructions, changed))
    if instructions:
        insert_instructions(zai_request["messages"], instructions)
    if request.get("stream", settings.default_stream) and zai_request.get("tools") and model and model.tool_stream:
        zai_request.setdefault("tool_stream", True)
    changed += [name for name in request if name in DROPPED]
    return zai_request, tuple(dict.fromkeys(changed))


def check_fields(request):
    for name in ("model", "messages"):
        if name not in request:
            raise RequestError(f"Missing required parameter: '{name}'.", name, code="missing_required_parameter")
    expect(request["model"], str, "model")
    for name, value in request.items():
        field = FIELDS.get(name)
        if field is None:
            continue
        expect(value, field.kind, name)
        if field.low is not None and value < field.low or field.high is not None and value > field.high:
            span = f"at least {field.low}" if field.high is None else field.low if field.low == field.high else f"from {field.low} to {field.high}"
            raise RequestError(f"'{name}' must be {span}.", name)
        if field.words and value not in field.words:
            raise RequestError(f"'{name}' must be one of {', '.join(field.words)}.", name)
    for name in ("functions", "function_call"):
        if name in request:
            raise RequestError(f"'{name}' is no longer supported: use 'tools' and 'tool_choice'.", name)
    include_usage = request.get("stream_options", {}).get("include_usage")
    if include_usage is not None:
        expect(include_usage, bool, "stream_options.include_usage")


def expect(value, kind, param):
    """`value`, if it is of that kind (a type or a tuple of them); true and false are no numbers."""
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise RequestError(f"'{param}' must be {KINDS[kind]}.", param, code="invalid_type")
    return value


# Messages

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
TEXT_PARTS = ("text", "refusal")
MEDIA_PARTS = ("image_url", "video_url", "file_url")  # what Z.ai's seeing models take
DROPPED_MESSAGE_KEYS = {"name", "refusal", "audio", "annotations", "function_call"}  # OpenAI's; Z.ai has no use for them
MESSAGE_KEYS = {"role", "content", "tool_calls", "tool_call_id", "reasoning_content"}


def to_zai_messages(messages, model, changed):
    """Z.ai's messages. There is always a user among them: Z.ai refuses a request without one."""
    expect(messages, list, "messages")
    if not messages:
        raise RequestError("'messages' must not be empty.", "messages")
    result = [to_zai_message(message, f"messages[{i}]", model, changed) for i, message in enumerate(messages)]
    if not any(message["role"] == "user" for message in result):
        result.append({"role": "user", "content": "."})
        changed.append("user_message")
    return result


def to_zai_message(message, param, model, changed):
    message = {name: value for name, value in expect(message, dict, param).items() if value is not None}
    role = expect(message.get("role", ""), str, param + ".role")
    if role not in ROLES:
        raise RequestError(f"'{param}.role' must be one of {', '.join(ROLES)}.", param + ".role")
    if role == "developer":
        changed.append("developer")
    changed += [name if name in DROPPED_MESSAGE_KEYS else "message_fields" for name in message if name not in MESSAGE_KEYS]
    result = {"role": ROLES[role], "content": to_zai_content(message, role, param + ".content", model, changed)}
    if role == "assistant":
        if "reasoning_content" in message:
            result["reasoning_content"] = expect(message["reasoning_content"], str, param + ".reasoning_content")
        if message.get("tool_calls"):
            calls = expect(message["tool_calls"], list, param + ".tool_calls")
            result["tool_calls"] = [to_zai_call(call, f"{param}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if role == "tool":
        result["tool_call_id"] = expect(message.get("tool_call_id"), str, param + ".tool_call_id")
    return result


def to_zai_content(message, role, param, model, changed):
    """A string, or an array of parts where something is to be seen. Z.ai refuses empty user texts and empty parts."""
    content = message.get("content", "" if role == "assistant" else None)
    if content is None:
        raise RequestError(f"'{param}' is missing.", param, code="missing_required_parameter")
    if isinstance(content, list):
        parts = [part for part in (to_zai_part(part, role, f"{param}[{i}]", model) for i, part in enumerate(content)) if part]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        if len(texts) < len(parts):
            return parts if texts else parts + [{"type": "text", "text": "."}]  # "cannot be empty": it wants a text beside an image
        content = "\n".join(texts)
    expect(content, str, param)
    if role == "user" and not content:
        changed.append("empty_message")
        return "."
    return content


def to_zai_part(part, role, param, model):
    """One content part; None for an empty text."""
    kind = expect(expect(part, dict, param).get("type"), str, param + ".type")
    if kind in TEXT_PARTS:
        text = expect(part.get(kind), str, f"{param}.{kind}")
        return {"type": "text", "text": text} if text else None
    if role != "user":
        raise RequestError(f"'{param}': a {role} message takes text only.", param)
    if kind not in MEDIA_PARTS:
        raise RequestError(f"'{param}.type' must be one of text, {', '.join(MEDIA_PARTS)}.", param + ".type")
    if model and not model.sees:
        raise RequestError(f"{model.name} takes text only; models that see: {SEEING}.", param)
    place = expect(part.get(kind), (str, dict), f"{param}.{kind}")
    if isinstance(place, dict):
        expect(place.get("url"), str, f"{param}.{kind}.url")
    return {"type": kind, kind: place if isinstance(place, dict) else {"url": place}}


def to_zai_call(call, param):
    """A tool call of an earlier answer, sent back; an object as its arguments becomes the string it should be."""
    function = expect(expect(call, dict, param).get("function"), dict, param + ".function")
    arguments = function.get("arguments")
    arguments = expect("" if arguments is None else arguments, (str, dict), param + ".function.arguments")
    return {"id": expect(call.get("id"), str, param + ".id"), "type": "function",
            "function": {"name": expect(function.get("name"), str, param + ".function.name"),
                         "arguments": arguments if isinstance(arguments, str) else encode_json(arguments).decode()}}


def insert_instructions(messages, instructions):
    """Put system lines of ours behind the client's own, so that what Z.ai caches of those stays cached."""
    place = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    messages[place:place] = [{"role": "system", "content": text} for text in instructions]


# Everything beside the messages: each function gives the fields of zai_request that it is about.

def to_zai_sampling(request, model, changed):
    fields = {}
    if "temperature" in request:
        fields["temperature"] = round(min(request["temperature"], 1), 2)
    if "top_p" in request:
        fields["top_p"] = round(max(request["top_p"], 0.01), 2)
    changed += [name for name, value in fields.items() if value != request[name]]
    if fields.get("top_p") == 1:
        del fields["top_p"]  # Z.ai's interval was an open one for years; 1 is no restriction anyway
    limit = request.get("max_completion_tokens", request.get("max_tokens"))
    if limit is not None:
        fields["max_tokens"] = min(limit, model and model.max_tokens or limit)
        if fields["max_tokens"] != limit:
            changed.append("max_tokens")
    if "stop" in request:
        stop = request["stop"] if isinstance(request["stop"], list) else [request["stop"]]
        if len(stop) > 4:
            raise RequestError("'stop' must have at most 4 items.", "stop")
        stop = [word for i, word in enumerate(stop) if expect(word, str, f"stop[{i}]")]
        if stop:
            fields["stop"] = stop
    if "user" in request and "user_id" not in request:
        if 6 <= len(request["user"]) <= 128:
            fields["user_id"] = request["user"]
        else:
            changed.append("user")
    return fields


def to_zai_tools(request, instructions, changed):
    """Tools with the fields Z.ai requires. It knows tool_choice "auto" only, and hangs on others: they become a system line."""
    if len(request.get("tools", ())) > 128:
        raise RequestError("'tools' must have at most 128 items.", "tools")
    tools = [to_zai_tool(tool, f"tools[{i}]", changed) for i, tool in enumerate(request.get("tools", ()))]
    wanted, must = read_tool_choice(request.get("tool_choice", "auto"), {tool["function"]["name"] for tool in tools if tool["type"] == "function"})
    if request.get("tool_choice", "auto") != "auto":
        changed.append("tool_choice")
    if wanted is not None:
        tools = [tool for tool in tools if tool["type"] == "function" and tool["function"]["name"] in wanted]
    if not tools:
        return {}
    names = [tool["function"]["name"] for tool in tools if tool["type"] == "function"]
    if must and names:
        wish = "the tool " + names[0] if len(names) == 1 else "one or more of the tools"
        instructions.append(f"You must answer by calling {wish}. Do not answer in text.")
    return {"tools": tools, "tool_choice": "auto"}


def to_zai_tool(tool, param, changed):
    kind = expect(expect(tool, dict, param).get("type"), str, param + ".type")
    if kind != "function":
        return tool  # web_search, retrieval and others of Z.ai's own
    function = {name: value for name, value in expect(tool.get("function"), dict, param + ".function").items() if value is not None}
    name = expect(function.get("name"), str, param + ".function.name")
    if not re.fullmatch("[a-zA-Z0-9_-]{1,64}", name):
        raise RequestError(f"'{param}.function.name' must be 1 to 64 letters, digits, _ or -.", param + ".function.name")
    if "strict" in function:
        changed.append("strict")
    return {"type": "function", "function": {
        "name": name, "description": expect(function.get("description", name), str, param + ".function.description") or name,
        "parameters": expect(function.get("parameters", {}), dict, param + ".function.parameters") or {"type": "object", "properties": {}}}}


def read_tool_choice(choice, names):
    """(wanted, must): the names of the tools that may be called, None for all; and whether one must be."""
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise RequestError("'tool_choice' must be none, auto, required or an object.", "tool_choice")
        return (() if choice == "none" else None), choice == "required"
    allowed = choice.get("allowed_tools") if choice.get("type") == "allowed_tools" else {"mode": "required", "tools": [choice]}
    tools = expect(expect(allowed, dict, "tool_choice.allowed_tools").get("tools"), list, "tool_choice.allowed_tools.tools")
    wanted = [expect(expect(expect(tool, dict, "tool_choice").get("function"), dict, "tool_choice.function").get("name"), str,
                     "tool_choice.function.name") for tool in tools]
    for name in wanted:
        if name not in names:
            raise RequestError(f"'tool_choice' names the tool {name!a}, which is not in 'tools'.", "tool_choice")
    return wanted, allowed.get("mode") == "required"


# What OpenAI's efforts become where Z.ai grades thinking.
GRADES = {"none": "low", "minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "max", "max": "max"}


def to_zai_thinking(request, model, default, changed):
    """thinking and reasoning_effort as the model's family takes them; an id the table does not know gets what was sent."""
    thinking = {name: value for name, value in request.get("thinking", {}).items() if value is not None}
    kind = expect(thinking.get("type", ""), str, "thinking.type")
    if kind and kind not in ("enabled", "disabled"):
        raise RequestError("'thinking.type' must be enabled or disabled.", "thinking.type")
    effort, wish, asked = request.get("reasoning_effort"), default, "thinking"
    if kind:
        wish = kind == "enabled"
    elif "enable_thinking" in request:
        wish, asked = request["enable_thinking"], "enable_thinking"
    elif effort:
        wish, asked = effort not in ("none", "minimal"), "reasoning_effort"
    if wish is not None:
        thinking["type"] = "enabled" if wish else "disabled"
    fields = {"thinking": thinking} if thinking else {}
    if model is None:
        return dict(fields, reasoning_effort=effort) if effort else fields
    if model.thinking == NO_THINKING:
        changed += [name for name in ("thinking", "enable_thinking", "reasoning_effort") if name in request]
        return {}
    if model.thinking == ALWAYS and wish is False:  # disabled is a 400 there; the least it takes is low
        changed.append(asked)
        thinking["type"], effort = "enabled", "low"
    if model.thinking in (GRADED, ALWAYS) and effort and thinking["type"] == "enabled":
        fields["reasoning_effort"] = GRADES[effort]
    if fields.get("reasoning_effort") != request.get("reasoning_effort") and "reasoning_effort" in request:
        changed.append("reasoning_effort")
    return fields


def to_zai_format(request, instructions, changed):
    """Z.ai ignores a json_schema: it becomes json_object, with the schema in a system line."""
    form = request.get("response_format", {"type": "text"})
    kind = expect(form.get("type"), str, "response_format.type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if kind != "json_schema":
        raise RequestError("'response_format.type' must be text, json_object or json_schema.", "response_format.type")
    schema = expect(form.get("json_schema"), dict, "response_format.json_schema").get("schema")
    expect({} if schema is None else schema, dict, "response_format.json_schema.schema")
    changed.append("response_format")
    instructions.append("Answer with one JSON value that matches this JSON Schema, and nothing else:\n" + encode_json(schema or {}).decode())
    return {"response_format": {"type": "json_object"}}


def encode_request(zai_request):
    """Its bytes. What was not too deep to be read may be too deep to be written."""
    try:
        return encode_json(zai_request)
    except RecursionError:
        raise RequestError("The body is nested too deeply.") from None


# Bytes ################################################################################################################
#
# Push parsers: feed() takes what has arrived and gives what is complete. Every buffer has a bound.

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode  # made once: json.dumps costs twice that
_quote = json.encoder.encode_basestring
_decoder = json.JSONDecoder(parse_constant=lambda name: None, parse_float=finite)  # NaN and 1e999 can be read and not be written
_scan = _decoder.scan_once  # the C function itself: StopIteration where there is no value


def new_id(prefix, rand=random.getrandbits):
    """An id as OpenAI's look. Not os.urandom's: it is no secret, and a system call gives the interpreter away."""
    return f"{prefix}{rand(96):024x}"


def encode_json(value):
    """UTF-8 bytes; a lone surrogate, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    return _encode(value).encode("utf-8", "replace")


def encode_event(value):
    """One server-sent event. The value's first key stays first: some clients look for {"error" at the start."""
    return b"data: " + encode_json(value) + b"\n\n"


# Heads of HTTP, as text in latin-1, with the line ends they came with. No folding, and no CR but the line's own. A method has at most 20
# letters: it is logged and quoted before any key is checked.
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rf"(?=[^ ]{{1,20}} )({TOKEN}) ([!-~\x80-\xff]+) (HTTP/[1-9]\.[0-9])\r?\n")
STATUS_LINE = re.compile(r"(HTTP/1\.[0-9]) ([1-9][0-9][0-9])(?: [^\r\n]*)?\r?\n")
FIELD_LINE = re.compile(rf"^({TOKEN}):([^\0\r\n]*)\r?\n", re.MULTILINE)
TRAILER = re.compile(rf"{TOKEN}:[^\0\r\n]*".encode())  # a field line behind a chunked body, without its end
LENGTH = re.compile("[0-9]{1,15}")
LONGEST_HEAD = 65536  # bytes
HEAD_END = re.compile(rb"\r?\n\r?\n")
ONCE = ("host", "content-length", "transfer-encoding")  # fields of which two readers could take different ones


def join_fields(pairs):
    """{name in lower case: value} of FIELD_LINE's matches; of a name that comes twice the values are joined (RFC 9110, 5.3)."""
    fields = {}
    for name, value in pairs:
        name, value = name.lower(), value.strip(" \t")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def parse_request_fields(text):
    """The fields of a request's head, whose lines `text` has behind the first, taken to the letter; RequestError if one is none."""
    pairs = FIELD_LINE.findall(text)
    if len(pairs) < text.count("\n"):
        raise RequestError("Malformed header line.")
    fields = join_fields(pairs)
    if len(fields) < len(pairs) and any(sum(name.lower() == once for name, _ in pairs) > 1 for once in ONCE):
        raise RequestError("More than one Host, Content-Length or Transfer-Encoding header.")
    return fields


def parse_response_head(head):
    """(version, status, fields) of a response's head in bytes; lines that are no fields are passed over. ValueError if it is no head."""
    text = head.decode("latin-1")
    found = STATUS_LINE.match(text)
    if not found:
        raise ValueError(f"{text[:60]!a} is no status line")
    return found.group(1), int(found.group(2)), join_fields(FIELD_LINE.findall(text, found.end()))


@functools.lru_cache(maxsize=1024)  # the sizes repeat
def chunk_size(line):
    """The size in a chunk's first line (without its CRLF). int() alone would take signs, blanks and underscores."""
    found = re.fullmatch(rb"([0-9a-fA-F]{1,15})(?:[ \t]*;[\t -~\x80-\xff]*)?", line)
    if not found:
        raise ValueError("broken chunk size")
    return int(found.group(1), 16)


class Dechunker:
    """HTTP's chunked coding, taken strictly. feed(data) -> body bytes; afterwards `done` and `rest`, the bytes behind the end.

    ValueError for a broken coding; OverflowError as soon as the body passes `limit` bytes or announces a chunk that would.
    """

    LONGEST_LINE = 4096  # a chunk's extension or a trailer; nobody is known to send any

    def __init__(self, limit=float("inf")):
        self.limit, self.total, self.rest, self.done = limit, 0, b"", False
        self.left = 0           # of a chunk that has not come whole, and the CRLF behind it
        self.trailers = None    # bytes of them, once the last chunk is there

    def feed(self, data):
        data = self.rest + data if self.rest else data
        body, at, end = [], 0, len(data)
        while at < end:
            if self.left:
                if self.left > 2:
                    piece = data[at:at + self.left - 2]
                    body.append(piece)
                    at, self.left = at + len(piece), self.left - len(piece)
                elif end - at < 2:
                    break
                elif data[at:at + 2] == b"\r\n":
                    at, self.left = at + 2, 0
                else:
                    raise ValueError("chunk longer than announced")
                continue
            line_end = data.find(b"\r\n", at, at + self.LONGEST_LINE)
            if line_end < 0:
                if end - at >= self.LONGEST_LINE or b"\n" in data[at:]:
                    raise ValueError("chunk line without an end")
                break
            line, at = data[at:line_end], line_end + 2
            if self.trailers is not None:
                self.trailers += len(line)
                if self.trailers > 65536 or line and not TRAILER.fullmatch(line):
                    raise ValueError("broken trailers")
                self.done = not line
                if self.done:
                    break
                continue
            size = chunk_size(line)
            stop = at + size
            self.total += size
            if self.total > self.limit:
                raise OverflowError("body too large")
            if size == 0:
                self.trailers = 0
            elif data[stop:stop + 2] == b"\r\n":  # nearly always
                body.append(data[at:stop])
                at = stop + 2
            else:
                self.left = size + 2
        self.rest = data[at:]
        return body[0] if len(body) == 1 else b"".join(body)


class Counted:
    """The same interface for a body of known length."""

    def __init__(self, length):
        self.left, self.done, self.rest = length, length == 0, b""

    def feed(self, data):
        body, self.rest = data[:self.left], data[self.left:]
        self.left -= len(body)
        self.done = not self.left
        return body


class SSEDecoder:
    """Server-sent events. feed(data) -> the data of each complete event, as text; close() -> what a missing blank line held back.

    Lines end at CR, LF or both and nowhere else (https://html.spec.whatwg.org/multipage/server-sent-events.html), so U+2028 in a
    text survives. Names, ids and comments are dropped. Beyond the standard, a line that starts with "{" is an event too:
    Z.ai was seen to end a broken answer with a bare line {"error":...}.
    """

    def __init__(self, limit=16 << 20):  # bytes of one event
        self.limit, self.parts, self.size = limit, [], 0

    def feed(self, data):
        if b"\n" not in data and b"\r" not in data:  # the inside of a long event
            self._hold(data)
            return []
        if self.parts:
            data = b"".join(self.parts) + data
            self.parts, self.size = [], 0
        held = b"\r" if data.endswith(b"\r") else b""  # an LF may follow
        if b"\r" in data:
            data = data[:len(data) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        end = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
        if held or end < len(data):
            self._hold(data[end:] + held)
        blocks = data[:end].decode("utf-8", "replace").split("\n\n")
        if len(data) > self.limit and max(map(len, blocks)) > self.limit:
            raise self._too_large()
        events = []
        for block in blocks:
            if block.startswith("data: ") and "\n" not in block:  # nearly always
                events.append(block[6:])
            elif block:
                events += self._event(block)
        return events

    def close(self):
        return self.feed(b"\n\n\n")

    @staticmethod
    def _event(block):
        """The events in the lines between two blank ones: one of `data` lines, and each bare JSON line."""
        lines = block.lstrip("\ufeff").split("\n")
        data = [line[6:] if line.startswith("data: ") else line[5:] for line in lines if line.startswith("data:") or line == "data"]
        return (["\n".join(data)] if data else []) + [line for line in lines if line.startswith("{")]

    def _hold(self, data):
        """Keep what is not yet an event, in the pieces it came in: one growing buffer leaves holes in the heap that stay for good."""
        self.size += len(data)
        if self.size > self.limit:
            raise self._too_large()
        if self.parts and len(self.parts[-1]) < 4096:
            data = self.parts.pop() + data
        self.parts.append(data)

    def _too_large(self):
        return UpstreamError(f"Z.ai sent an event of more than {self.limit} bytes.", GIVE_UP)


# Z.ai response -> OpenAI response #####################################################################################
#
# Every chunk is rebuilt. A Chunk is what varies from one chat.completion.chunk to the next; the Envelope is what does
# not, and puts both together. Nothing of Z.ai's own bytes reaches a client.

class Chunk(NamedTuple):
    """One step of an answer: a delta; or, last and once, the finish reason with the usage, if Z.ai gave any.

    `delta` None, which only a JSON answer meets, means that Z.ai has started afresh: what came before is void.
    """
    delta: dict | None
    finish_reason: str | None = None
    usage: dict | None = None


FINISHES = {"stop": "stop", "tool_calls": "tool_calls", "length": "length", "function_call": "tool_calls", "sensitive": "content_filter",
            "content_filter": "content_filter", "model_context_window_exceeded": "length"}
LONGEST_ANSWER = 64 << 20  # bytes, of one that is held as a whole
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|begin_of_box|>", "<|end_of_box|>")


class TagSplitter:
    """Cuts a text that comes in pieces at TAGS: feed(text) -> tags and texts between them; what may become a tag is held back."""

    PATTERN = re.compile(f"({'|'.join(map(re.escape, TAGS))})")

    def __init__(self):
        self.held = ""

    def feed(self, text):
        pieces = self.PATTERN.split(self.held + text)
        last = pieces.pop()
        start = last.rfind("<")
        self.held = last[start:] if start >= 0 and any(tag.startswith(last[start:]) for tag in TAGS) else ""
        pieces.append(last[:len(last) - len(self.held)])
        return [piece for piece in pieces if piece]

    def close(self):
        held, self.held = self.held, ""
        return [held] if held else []


class FenceStripper:
    """Takes a Markdown code fence off a text that comes in pieces; a text without one passes unchanged."""

    def __init__(self):
        self.state, self.held = "start", ""

    def feed(self, text):
        text, self.held = self.held + text, ""
        if self.state == "start":
            text = text.lstrip()
            if text.startswith("```") and "\n" in text:
                self.state, text = "fenced", text.split("\n", 1)[1]
            elif text.startswith("```"[:len(text)]):
                self.held = text
                return ""
            else:
                self.state = "plain"
        if self.state == "fenced":
            body, fence, _ = text.partition("\n```")  # cannot be inside JSON, whose strings have no raw line ends
            if fence:
                self.state = "done"
                return body
            kept = text.rstrip().rstrip("`").rstrip()
            self.held = text[len(kept):]
            return kept
        return text if self.state == "plain" else ""

    def close(self):
        held, self.held = self.held, ""
        if self.state == "start":  # a fence on the same line as the text
            return re.sub(r"^```\w*\s*|\s*```\s*$", "", held)
        return "" if "```" in held else held


class ToolCall:
    """One tool call under way. `index` is ours, given when the client is told of it; `zai_index` and `zai_id` are Z.ai's, if any."""

    def __init__(self, id, zai_id, zai_index):
        self.id, self.zai_id, self.zai_index, self.index, self.name, self.arguments = id, zai_id, zai_index, None, "", ""


class ChunkTranslator:
    """Z.ai's events in, OpenAI chunks out. feed(event) -> chunks; close() -> the last of them.

    `event` is the text of one SSE event, or a whole JSON answer. UpstreamError where Z.ai sent an error, and from close()
    where no finish was seen: an answer that just ends is none.

    reasoning: parsed, raw or hidden. tools: name -> parameter schema of the tools sent, to read calls that leak into the
    text. one_call: only the first tool call passes. unfence: take a Markdown fence off the text. restartable: nothing
    reaches the client before the end, so a stream that starts afresh does no harm. describe(value) makes the error of an
    error event. new_id() names calls that have no id.
    """

    def __init__(self, reasoning="parsed", tools=None, one_call=False, unfence=False, restartable=False, describe=zai_error,
                 new_id=lambda: new_id("call_")):
        self.reasoning, self.tools, self.one_call, self.unfence, self.restartable = reasoning, tools or {}, one_call, unfence, restartable
        self.describe = describe
        self.new_id = new_id
        self.complete = False   # the last chunk has been given
        self.repaired = 0       # events skipped or mended
        self._start()

    def _start(self):
        self.finish, self.usage, self.calls, self.leaked = None, None, [], []
        self.thinking = False   # between <think> and </think>
        self.raw_open = False   # a <think> of ours is open
        self.begun = set()      # which of content, reasoning and tool calls have come
        self.spoken = False     # answer text or a tool call has been given
        self.announced = 0      # tool calls given
        self.splitters = {"content": TagSplitter(), "reasoning": TagSplitter()}
        self.leak = None        # the text of a leaking <tool_call>, and where it leaks
        self.fence = FenceStripper() if self.unfence else None
        self.plain = None       # the field whose text passes as it is, while nothing is held back and nothing is open

    # What comes in

    def feed(self, event):
        if self.complete:
            return ()
        try:
            value, end = _scan(event, 0)
            if end != len(event) and event[end:].strip():
                raise ValueError
        except (ValueError, RecursionError, StopIteration):
            return self._torn(event)
        try:
            choice = value["choices"][0]
            delta = choice["delta"]
            text = delta[self.plain]
            if (type(text) is str and text and "<" not in text and "finish_reason" not in choice and "usage" not in value
                    and (len(delta) == 1 or len(delta) == 2 and "role" in delta)):
                return (Chunk({self.plain: text}),)  # nine of ten events
        except (KeyError, IndexError, TypeError):
            pass
        if not isinstance(value, dict):
            self.repaired += 1
            return ()
        return self._event(value)

    def feed_all(self, events, end=False):
        """(chunks, failure): the chunks of all events, and of close() if that is the end, up to the UpstreamError there may be."""
        chunks = []
        try:
            for event in events:
                chunks += self.feed(event)
            if end:
                chunks += self.close()
        except UpstreamError as failure:
            return chunks, failure  # what came before it in the same read is not lost
        return chunks, None

    def _torn(self, event):
        """What is no JSON: the end mark, garbage, or a frame cut short with a new one inside, whose answer starts afresh."""
        if event.startswith("[DONE]"):
            return self._complete() if self.finish else ()
        if event[:1].isspace():
            return self.feed(event.strip())
        self.repaired += 1
        value, inner = None, event.rfind("data: ")
        while value is None and inner >= 0:  # the last that parses: the text of the new frame may hold the mark as well
            with contextlib.suppress(ValueError, RecursionError):
                value = _decoder.raw_decode(event, inner + len("data: "))[0]
                value = value if isinstance(value, dict) and ("choices" in value or "error" in value) else None
            inner = event.rfind("data: ", 0, inner)
        if value is None:
            return ()
        if self.spoken and not self.restartable and "error" not in value:
            raise UpstreamError("Z.ai lost its place and started the answer again after part of it had been sent.", GIVE_UP,
                                code="upstream_stream_restarted")
        chunks = self._close_raw()
        self._start()
        return chunks + ([Chunk(None)] if self.restartable else []) + list(self._event(value))

    def _event(self, value):
        choices = value.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            if value.get("error") or "code" in value and "choices" not in value:
                raise self.describe(value)
            self.usage = to_openai_usage(value.get("usage")) or self.usage
            self.repaired += choices is None and "usage" not in value
            return ()
        choice = choices[0]
        delta = choice.get("delta") or choice.get("message")
        chunks = self._delta(delta) if isinstance(delta, dict) else []
        if "usage" in value:
            self.usage = to_openai_usage(value["usage"]) or self.usage
        reason = choice.get("finish_reason")
        if reason:
            if "error" in str(reason):
                raise UpstreamError(f"Z.ai broke off the answer: {reason}.")
            self.finish = FINISHES.get(str(reason), "stop")
        if self.finish and self.usage:
            chunks += self._complete()
        return chunks

    def _delta(self, delta):
        chunks, self.plain = [], None
        for name, lane, other in (("reasoning_content", "reasoning", "content"), ("content", "content", "reasoning")):
            text = delta.get(name)
            if text and isinstance(text, str):
                self.plain = name if lane in self.begun and (lane == "content" or self.reasoning == "parsed") else None
                chunks += self._flush(other) + self._text(lane, self.splitters[lane].feed(text))
        calls = delta.get("tool_calls")
        if isinstance(calls, list) and calls:
            chunks += self._flush("reasoning") + self._flush("content")
            touched = set()
            for call in calls:
                if isinstance(call, dict):
                    chunks += self._call(call, touched)
        held = self.splitters["content"].held or self.splitters["reasoning"].held
        if held or self.thinking or self.raw_open or self.fence or self.leak is not None:
            self.plain = None
        return chunks

    def close(self):
        if self.complete:
            return []
        if not self.finish:
            raise UpstreamError("Z.ai's answer ended before it was finished." if self.begun or self.calls else "Z.ai sent an empty answer.")
        return self._complete()

    def _complete(self):
        self.complete = True
        chunks = self._flush("reasoning") + self._flush("content")
        if not self.calls:
            for name, arguments in self.leaked:
                chunks += self._call({"function": {"name": name, "arguments": arguments}}, set())
        if self.fence:
            chunks += self._emit("content", self.fence.close())
        chunks += self._close_raw()
        for call in self.calls:
            if call.index is not None and not call.arguments.strip():
                chunks.append(self._call_chunk(call, "{}"))
        finish = self.finish
        if finish in ("stop", "tool_calls"):
            finish = "tool_calls" if self.announced else "stop"
        chunks.append(Chunk({}, finish, self.usage))
        return chunks

    # Text

    def _flush(self, lane):
        """What is held back in a lane, once the answer goes on elsewhere."""
        if not self.splitters[lane].held and self.leak is None:
            return []
        chunks = self._text(lane, self.splitters[lane].close())
        return chunks + self._end_leak("") if self.leak is not None and self.leak[0] == lane else chunks

    def _text(self, lane, pieces):
        """Chunks for texts and tags of one lane: boxes go, <think> text is reasoning, a leaking tool call is collected."""
        chunks = []
        for piece in pieces:
            if self.leak is not None:
                chunks += self._end_leak("</tool_call>") if piece == "</tool_call>" else []
                if self.leak is not None:
                    self.leak[1].append(piece)
            elif piece in ("<|begin_of_box|>", "<|end_of_box|>"):
                pass
            elif piece == "<think>" and lane == "content" and "content" not in self.begun:
                self.thinking = True
            elif piece == "</think>" and self.thinking:
                self.thinking = False
            elif piece == "<tool_call>" and self.tools:
                self.leak = (lane, [])
            else:
                chunks += self._shown("reasoning" if self.thinking else lane, piece)
        return chunks

    def _shown(self, lane, text):
        if lane not in self.begun:
            text = text.lstrip("\r\n")  # GLM 4.5 to 4.7 open with line ends
            if not text:
                return []
            self.begun.add(lane)
        if lane == "content" and self.fence:
            text = self.fence.feed(text)
        return self._emit(lane, text)

    def _emit(self, lane, text):
        if not text:
            return []
        if lane == "content":
            self.spoken = True
            return self._close_raw() + [Chunk({"content": text})]
        if self.reasoning == "hidden":
            return []
        if self.reasoning == "parsed":
            return [Chunk({"reasoning_content": text})]
        opening = [] if self.raw_open else [Chunk({"content": "<think>"})]  # the tags come in chunks of their own: NextChat
        self.raw_open = True
        return opening + [Chunk({"content": text})]

    def _close_raw(self):
        closing = [Chunk({"content": "</think>"})] if self.raw_open else []
        self.raw_open = False
        return closing

    # Tool calls

    def _call(self, delta, touched):
        """Chunks for one item of delta.tool_calls, a fragment or a whole call; `touched`: calls seen in this same delta."""
        function = delta.get("function") if isinstance(delta.get("function"), dict) else {}
        name, arguments = function.get("name"), function.get("arguments")
        name = name if isinstance(name, str) else ""
        arguments = arguments if isinstance(arguments, str) else "" if arguments is None else encode_json(arguments).decode()
        if "<arg_key>" in name:  # the name with the arguments in XML behind it
            name, leaked = parse_leaked_call(name, self.tools)
            arguments = arguments if arguments.strip() not in ("", "{}") else leaked
        call = self._find_call(delta, name, touched)
        touched.add(call)
        call.name = call.name or name
        if call.index is not None:
            return [self._call_chunk(call, arguments)] if arguments else []
        if not call.name or self.one_call and self.announced:
            call.arguments += arguments
            return []
        arguments, call.arguments = call.arguments + arguments, ""
        return self._close_raw() + [self._call_chunk(call, arguments)]

    def _find_call(self, delta, name, touched):
        """The call an item belongs to. Z.ai's index may be -1, 0 for all, or missing; its id a number, missing, or repeated."""
        index, id = delta.get("index"), delta.get("id")
        index = index if type(index) is int and index >= 0 else None
        zai_id = "" if id in (None, "") else str(id)
        if zai_id:
            known = [call for call in self.calls if call.zai_id == zai_id and call not in touched]
        elif not name:
            known = [call for call in self.calls if index in (None, call.zai_index)][-1:]
        else:  # a name again: the same call as long as its arguments are not whole
            known = [call for call in self.calls if index is not None and index == call.zai_index and call not in touched
                     and call.name in ("", name) and not is_json(call.arguments)]
        if known:
            return known[0]
        taken = any(call.id == zai_id for call in self.calls)
        self.calls.append(ToolCall(self.new_id() if taken or not zai_id else zai_id, zai_id, index))
        return self.calls[-1]

    def _call_chunk(self, call, arguments):
        call.arguments += arguments
        if call.index is not None:
            return Chunk({"tool_calls": [{"index": call.index, "function": {"arguments": arguments}}]})
        call.index, self.announced, self.spoken = self.announced, self.announced + 1, True
        self.begun.add("tool_calls")
        return Chunk({"tool_calls": [{"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}]})

    def _end_leak(self, closing):
        """A <tool_call> in the text has ended: kept as a call if it names a tool that was sent, else shown as the text it was."""
        (lane, pieces), self.leak = self.leak, None
        name, arguments = parse_leaked_call("".join(pieces), self.tools)
        if name in self.tools:
            self.repaired += 1
            self.leaked.append((name, arguments))
            return []
        return self._shown(lane, "<tool_call>" + "".join(pieces) + closing)


def is_json(text):
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def parse_leaked_call(text, tools):
    """(name, arguments as JSON) of GLM's native form: name<arg_key>k</arg_key><arg_value>v</arg_value>..., strings without quotes."""
    name = text.split("<arg_key>", 1)[0].strip()
    properties = (tools.get(name) or {}).get("properties") or {}
    arguments = {}
    for key, value in re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|\Z)", text, re.DOTALL):
        key, typed = key.strip(), None
        schema = properties.get(key)
        if not isinstance(schema, dict) or schema.get("type") != "string":
            with contextlib.suppress(ValueError, RecursionError):
                typed = _decoder.decode(value.strip())
        arguments[key] = value if typed is None else typed
    return name, encode_json(arguments).decode()


def to_openai_usage(usage):
    """OpenAI's usage object, integers only; None where Z.ai gave none. The details differ by model and may be missing."""
    if not isinstance(usage, dict):
        return None

    def count(place, name):
        value = place.get(name)
        return value if type(value) is int else 0
    result = {name: count(usage, name) for name in ("prompt_tokens", "completion_tokens")}
    result["total_tokens"] = count(usage, "total_tokens") or sum(result.values())
    for name, detail in (("prompt_tokens_details", "cached_tokens"), ("completion_tokens_details", "reasoning_tokens")):
        if isinstance(usage.get(name), dict):
            result[name] = {detail: count(usage[name], detail)}
    return result


class Envelope:
    """What all chunks of one answer share: id, creation time in Unix seconds, and the model as the client named it."""

    def __init__(self, id, created, model, include_usage=False):
        self.id, self.created, self.model, self.include_usage = id, created, model, include_usage
        # Templates: encoding the constant part anew would double the cost of a chunk.
        self._head = f'{{"id":{_encode(id)},"object":"chat.completion.chunk","created":{created},"model":{_encode(model)},"choices":['
        self._tail = '],"usage":null}' if include_usage else "]}"

    def opening(self):
        """The chunk before all others; it also serves as the first sign of life."""
        return self._text('{"role":"assistant","content":""}')

    def heartbeat(self):
        """An empty delta. SSE comments would break clients that parse each line as JSON."""
        return self._text("{}")

    def encode(self, chunks):
        """The SSE text of `chunks`; the chunk with the finish reason brings the usage, if it was asked for, and the end mark along."""
        texts = []
        for delta, finish_reason, usage in chunks:
            if finish_reason:  # its delta is empty
                texts.append(self._text("{}", '"' + finish_reason + '"'))
                if self.include_usage and usage:
                    texts.append("data: " + self._head + '],"usage":' + _encode(usage) + "}\n\n")
                texts.append("data: [DONE]\n\n")
            else:
                (name, text), = delta.items()  # a string alone is quoted much faster than an object is encoded
                texts.append(self._text('{"' + name + '":' + _quote(text) + "}" if type(text) is str else _encode(delta)))
        return "".join(texts)

    def _text(self, delta, finish_reason="null"):
        return "data: " + self._head + '{"index":0,"delta":' + delta + ',"logprobs":null,"finish_reason":' + finish_reason + "}" + self._tail + "\n\n"

    def completion(self, message, finish_reason, usage):
        """The JSON answer, a chat.completion."""
        answer = {"id": self.id, "object": "chat.completion", "created": self.created, "model": self.model,
                  "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}]}
        return dict(answer, usage=usage) if usage else answer


def collect_completion(chunks, limit=LONGEST_ANSWER):
    """(message, finish_reason, usage): the fold of an answer's chunks. UpstreamError beyond `limit` bytes of text."""
    texts, calls, size, finish_reason, usage = {}, {}, 0, None, None
    for chunk in chunks:
        if chunk.delta is None:
            texts, calls, size = {}, {}, 0
            continue
        for name in ("reasoning_content", "content"):
            if name in chunk.delta:
                texts.setdefault(name, []).append(chunk.delta[name])
                size += len(chunk.delta[name].encode("utf-8", "replace"))
        for item in chunk.delta.get("tool_calls", ()):
            call = calls.setdefault(item["index"], {"id": item.get("id"), "type": "function",
                                                    "function": {"name": item["function"].get("name"), "arguments": []}})
            call["function"]["arguments"].append(item["function"]["arguments"])
            size += len(item["function"]["arguments"])
        if size > limit:
            raise UpstreamError(f"The answer is longer than {limit} bytes.", GIVE_UP)
        finish_reason, usage = chunk.finish_reason or finish_reason, chunk.usage or usage
    for call in calls.values():
        call["function"]["arguments"] = "".join(call["function"]["arguments"])
    message = {"role": "assistant", "content": "".join(texts.get("content", ())) if "content" in texts or not calls else None, "refusal": None}
    if "reasoning_content" in texts:
        message["reasoning_content"] = "".join(texts["reasoning_content"])
    if calls:
        message["tool_calls"] = list(calls.values())
    return message, finish_reason, usage


# ---- I/O starts here -------------------------------------------------------------------------------------------------
#
# Clients ##############################################################################################################
#
# A handler thread waits in plain blocking calls: a time-out on a socket would cost a second system call, and a hand-over
# of the interpreter, for every chunk. Instead one watch looks at all clients some times a second. It notices who has
# left, who is silent for too long and who is due a heartbeat; and it wakes a blocked thread by shutting its socket down.

WATCH_INTERVAL = 0.25  # seconds; a client's leaving must be noticed within one


def polled(socks, events):
    """Those of `socks` on which one of `events`, or an error, has happened; without waiting. Any number, any descriptor."""
    poll, by_fileno = select.poll(), {}
    for sock in socks:
        fileno = sock.fileno()  # -1 once closed, which a handler thread may do at any time
        if fileno >= 0:
            by_fileno[fileno] = sock
            poll.register(fileno, events)
    return [by_fileno[fileno] for fileno, _ in poll.poll(0)]


def readable(socks):
    """Those of `socks` that have bytes to read or have ended."""
    if hasattr(select, "poll"):
        return polled(socks, select.POLLIN)
    socks = [sock for sock in socks if sock.fileno() >= 0]
    return [sock for i in range(0, len(socks), 500) for sock in select.select(socks[i:i + 500], [], [], 0)[0]]  # Windows takes 512


def writable(sock):
    """Whether the socket takes some bytes at once."""
    return bool(polled([sock], select.POLLOUT) if hasattr(select, "poll") else select.select([], [sock], [], 0)[1])


def ended(socks):
    """Those of `socks` whose other side has closed. TCP cannot tell a client that only stopped sending from one that left, before
    something is written to it; clients do not half-close, so an end means gone (nginx holds the same)."""
    if hasattr(select, "POLLRDHUP"):
        return polled(socks, select.POLLRDHUP)
    return [sock for sock in readable(socks) if at_end(sock)]


def at_end(sock):
    """Whether the next thing to read is the end. Elsewhere than on Linux bytes sent ahead hide it."""
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        return True


def shut(sock):
    """Wake whoever is blocked on the socket. Not SSLSocket's own shutdown(), which would pull the TLS state from under a reader."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class EventSink:
    """The streamed answer to one client: its head along with the first bytes, then events, each batch in one call.

    `head()` gives the bytes of the response's head; `envelope` has the opening chunk and the heartbeat, which goes out after
    `heartbeat_s` seconds without a byte (0: never); `chunked`: HTTP/1.1's coding is used.
    """

    def __init__(self, connection, head, envelope, chunked=True, heartbeat_s=0.0, clock=time.monotonic):
        self.connection, self.head, self.envelope, self.chunked, self.clock = connection, head, envelope, chunked, clock
        self.heartbeat_s = heartbeat_s or float("inf")
        self.lock = threading.Lock()  # held while bytes go out
        self.started = False          # the head is out: no status is left to give
        self.owed = b""               # what was left of a heartbeat when the socket was full
        self.wrote_at = clock()
        self.writing_since = None

    def write(self, text, last=False):
        """Send SSE text, with everything that must come before it. OSError if the client does not take it."""
        with self.lock:
            if last or self.owed or not (self.started and self.chunked):
                data = self._bytes(text, last)
            else:
                data = text.encode("utf-8", "replace")
                data = b"%x\r\n%b\r\n" % (len(data), data)
            self.wrote_at = self.writing_since = self.clock()
            self.connection.sendall(data)
            self.writing_since = None

    def _bytes(self, text, last=False):
        """The bytes of `text`, with what must come before and behind it."""
        head, opening = b"", ""
        if not self.started:
            self.started, head, opening = True, self.head(), self.envelope.opening()
        owed, self.owed = self.owed, b""
        return owed + head + self._frame((opening + text).encode("utf-8", "replace")) + (b"0\r\n\r\n" if last and self.chunked else b"")

    def _frame(self, data):
        return b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data

    def beat(self, now):
        """Send a heartbeat if one is due, unless that would have to wait: then bytes are still on their way to the client anyway."""
        if now - self.wrote_at < self.heartbeat_s or not self.lock.acquire(False):
            return
        try:
            if now - self.wrote_at >= self.heartbeat_s:
                data = self.owed or self._bytes(self.envelope.heartbeat() if self.started else "")
                self.owed, self.wrote_at = data, now
                self.owed = data[self._send_now(data):]
        finally:
            self.lock.release()

    def _send_now(self, data):
        """How many bytes of `data` the socket took without waiting."""
        if sys.platform == "darwin" or not hasattr(socket, "MSG_DONTWAIT"):  # macOS heeds it when receiving only, Windows has none
            return self.connection.send(data[:2048]) if writable(self.connection) else 0
        try:
            return self.connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def hush(self):
        """No heartbeat from now on."""
        with self.lock:
            self.heartbeat_s = float("inf")


class Client:
    """Whoever waits for one answer, streamed into `sink` or not: is it still there, and what is to be cut when it is not."""

    def __init__(self, connection, settings, sink=None, clock=time.monotonic):
        self.connection, self.settings, self.sink, self.clock = connection, settings, sink, clock
        self.gone = False
        self.alarm = threading.Lock()   # held; who releases it ends a wait. An Event costs forty times as much to make
        self.alarm.acquire()
        self.lock = threading.Lock()    # guards `upstream`
        self.upstream = None            # the socket to Z.ai, while there is one
        self.silent = False             # the watch has cut it for being silent
        self.silent_since = None        # when the current wait for Z.ai's bytes began

    def wait(self, seconds):
        """Sleep that long, or until somebody calls wake(). ClientGone as soon as the client has left."""
        self.alarm.acquire(timeout=max(0.0, min(seconds, threading.TIMEOUT_MAX)))
        if self.gone or ended([self.connection]):  # a slot that one leaves must not go to the next that has left, before the watch looks
            raise ClientGone

    def wake(self):
        with contextlib.suppress(RuntimeError):  # has been woken already
            self.alarm.release()

    def attach(self, sock):
        """From here on `sock` is the one to shut when the client leaves or Z.ai is silent."""
        with self.lock:
            self.upstream, self.silent = sock, False
        if self.gone:
            raise ClientGone

    def detach(self):
        with self.lock:
            self.upstream, self.silent_since = None, None

    def _cut(self):
        with self.lock:
            if self.upstream is not None:
                shut(self.upstream)

    def hang_up(self):
        """The client has left: whatever is done for it ends now."""
        self.gone = True
        self.wake()
        self._cut()

    def look(self, now):
        """What the watch does for this client."""
        silent_since, writing_since = self.silent_since, self.sink and self.sink.writing_since
        if self.gone:
            self.hang_up()
        elif writing_since is not None and now - writing_since > self.settings.client_timeout:
            self.hang_up()
            shut(self.connection)
        elif silent_since is not None and now - silent_since > self.settings.upstream_timeout:
            self.silent = True
            self._cut()
        elif self.sink:
            try:
                self.sink.beat(now)
            except OSError:
                self.hang_up()


class Watch:
    """All clients that are waiting for an answer. tick() is called by whoever has a loop of its own: the accept loop."""

    def __init__(self, clock=time.monotonic):
        self.clock, self.lock, self.clients = clock, threading.Lock(), set()

    @contextlib.contextmanager
    def over(self, client):
        with self.lock:
            self.clients.add(client)
        try:
            yield client
        finally:
            with self.lock:
                self.clients.discard(client)
            if client.sink:
                client.sink.hush()

    def tick(self):
        now = self.clock()
        with self.lock:
            clients = list(self.clients)
        left = set(ended([client.connection for client in clients])) if clients else ()
        for client in clients:  # all of them before any is acted on: a slot that one frees must not go to another that has left
            client.gone = client.gone or client.connection in left
        for client in clients:
            client.look(now)


# Gates ################################################################################################################
#
# Z.ai limits the requests in flight for each key and model, does not say to how many, and changes it. So the gate learns
# from refusals. The shared state is: the gates, the keys' times aside, and one queue for each model; all under one lock.

def backoff(attempt):
    """0.5 s doubling to 8 s; attempt counts from 0."""
    return min(8.0, 0.5 * 2 ** min(attempt, 10))


class ZaiKey:
    def __init__(self, position, text):
        self.text, self.name, self.aside_until = text, f"#{position} ({mask(text)})", 0.0


class Gate:
    """What one Z.ai key has in flight for one model, and how much it may have."""

    PROBE = 60.0  # seconds without a refusal, then one more is tried

    def __init__(self, key, limit):
        self.key, self.limit, self.ceiling = key, limit, limit  # the ceiling is below the limit once learned
        self.in_flight, self.closed_until, self.quiet_since = 0, 0.0, 0.0

    def room(self, now):
        return 0 if now < self.closed_until else self.ceiling - self.in_flight

    def opens_at(self, now):
        """When there may be room though nothing ends."""
        if now < self.closed_until:
            return self.closed_until
        return self.quiet_since + self.PROBE if self.ceiling < self.limit else float("inf")

    def probe(self, now):
        """Raise a learned ceiling that has been reached by one, if the time for it has come."""
        if self.ceiling <= self.in_flight and now >= self.opens_at(now):
            self.ceiling, self.quiet_since = self.ceiling + 1, now

    def refuse(self, now, pause, learn):
        """Z.ai has refused a request, already taken out of `in_flight`. The pause keeps the queue's head, and all behind it, waiting."""
        self.closed_until, self.quiet_since = max(self.closed_until, now + pause), now
        if learn:
            self.ceiling = max(1, min(self.ceiling, self.in_flight))


class Ticket:
    """One request's place in the queue of its model. It keeps its number when it has to queue again, hence goes to the head."""

    numbers = itertools.count()

    def __init__(self, model, client):
        self.model, self.client, self.number = model, client, next(self.numbers)
        self.gate, self.despite = None, False  # admitted though the key was set aside: an answer then clears it
        self.waited, self.refusals, self.refusal, self.spent = 0.0, 0, None, set()

    def __lt__(self, other):
        return self.number < other.number


class Gates:
    """Who may go to Z.ai now, and with which key: first come, first served for each model."""

    ASIDE = 600.0  # seconds that a refused key rests

    def __init__(self, keys, max_concurrency, queue_timeout, clock=time.monotonic, rand=random.random):
        self.keys = [ZaiKey(i, text) for i, text in enumerate(keys, 1)]
        self.limit, self.queue_timeout, self.clock, self.rand = max_concurrency or float("inf"), queue_timeout, clock, rand
        self.lock, self.gates, self.lines = threading.Lock(), {}, {}

    def enter(self, ticket):
        """Wait for a slot; then ticket.gate is it. ClientGone, or a 429 once the ticket has waited QUEUE_TIMEOUT in all."""
        began = self.clock()
        deadline = began + self.queue_timeout - ticket.waited
        with self.lock:
            bisect.insort(self.lines.setdefault(ticket.model, []), ticket)
        try:
            while True:
                with self.lock:
                    now = self.clock()
                    self._admit(ticket.model, now)
                    if ticket.gate:
                        break
                    wake_at = min(self._next_chance(ticket, now), deadline)
                if now >= deadline:
                    raise self._timeout(ticket)
                ticket.client.wait(wake_at - now)
            if ticket.client.gone:
                raise ClientGone
        except BaseException:
            self.leave(ticket)
            raise
        finally:
            ticket.waited += self.clock() - began

    def leave(self, ticket, error=None, served=False):
        """Give the slot, or the place in the queue, back. `error`: the UpstreamError it ended with; `served`: an answer came."""
        with self.lock:
            now, gate, line = self.clock(), ticket.gate, self.lines.get(ticket.model, [])
            if gate:
                ticket.gate = None
                gate.in_flight -= 1
                if served:
                    gate.key.aside_until = 0.0 if ticket.despite else gate.key.aside_until
                elif error and error.verdict == SLOW_DOWN:
                    pause = max(min(8.0, backoff(ticket.refusals) * (1 + 0.5 * self.rand())), error.pause or 0)
                    ticket.refusals, ticket.refusal = ticket.refusals + 1, error
                    gate.refuse(now, pause, error.learn)
                elif error and error.verdict == NEXT_KEY:
                    gate.key.aside_until = now + (error.retry_after or self.ASIDE)
                    ticket.spent.add(gate.key)
            elif ticket in line:
                line.remove(ticket)
            self._admit(ticket.model, now)
            if line:
                line[0].client.wake()  # whoever is the head now keeps the time
            else:
                self.lines.pop(ticket.model, None)
                for key in self.keys:  # model names come from clients: keep only gates that know something
                    gate = self.gates.get((key, ticket.model))
                    if gate and not gate.in_flight and gate.ceiling == gate.limit and now >= gate.closed_until:
                        del self.gates[key, ticket.model]

    def all_spent(self, ticket):
        return len(ticket.spent) == len(self.keys)

    def state(self):
        """For the page and the metrics: (key's position, model, ceiling or None, in flight) of each gate; and the queued, by model."""
        with self.lock:
            gates = [(self.keys.index(key) + 1, model, gate.ceiling if gate.ceiling < float("inf") else None, gate.in_flight)
                     for (key, model), gate in self.gates.items()]
            return gates, {model: len(line) for model, line in self.lines.items() if line}

    def _admit(self, model, now):
        """Let the head of the queue go while it can. Call with the lock held."""
        line = self.lines.get(model, [])
        while line:
            gates = self._usable(line[0], now)
            for gate in gates:
                gate.probe(now)
            gate = max(gates, key=lambda gate: (gate.room(now), -gate.in_flight))
            if gate.room(now) <= 0:
                break
            ticket = line.pop(0)
            ticket.gate = gate
            gate.in_flight += 1
            ticket.despite = gate.key.aside_until > now
            ticket.client.wake()
            if line:
                line[0].client.wake()

    def _usable(self, ticket, now):
        """The gates the ticket may use: of keys not set aside, else of the one whose turn comes first, rather than failing unasked."""
        keys = [key for key in self.keys if key not in ticket.spent]
        keys = [key for key in keys if key.aside_until <= now] or [min(keys, key=lambda key: key.aside_until)]
        return [self.gates.setdefault((key, ticket.model), Gate(key, self.limit)) for key in keys]

    def _next_chance(self, ticket, now):
        """When the ticket may get a slot though nobody leaves one."""
        if self.lines[ticket.model][0] is not ticket:
            return float("inf")
        return min([gate.opens_at(now) for gate in self._usable(ticket, now)]
                   + [key.aside_until for key in self.keys if key not in ticket.spent and key.aside_until > now])

    def _timeout(self, ticket):
        words = f"No slot at Z.ai came free within QUEUE_TIMEOUT ({self.queue_timeout:g} s)."
        if ticket.refusal:
            words += " Its last word: " + ticket.refusal.message
        return ApiError(words, status=429, type=RATE.type, code=RATE.code, retry_after=RATE.retry_after)


# Upstream #############################################################################################################
#
# urllib.request with connections that stay open, and the one rule of retrying: as long as nothing of the answer has come,
# and only for what can heal.

NO_KEY = "ZAI_API_KEY is not set where the proxy runs. Get a key (free models need one too) at https://z.ai/manage-apikey/apikey-list."
CONNECT_TIMEOUT = 10.0  # seconds, for all addresses of a host together
KEEP_IDLE = 60.0        # seconds; the usual keep-alive of a front end is 60 to 75
AT_ONCE = 1.0           # seconds; a used connection that ends later than that was not dead: Z.ai has worked on the request
WBITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # codings, as zlib numbers them


class Pool:
    """Idle connections to Z.ai, the last used first. A connection is here only when its last answer was read to the end."""

    def __init__(self, clock=time.monotonic):
        self.clock, self.lock, self.idle = clock, threading.Lock(), collections.defaultdict(list)

    def take(self, key):
        """An idle connection that is still alive, or None."""
        while True:
            with self.lock:
                if not self.idle.get(key):
                    return None
                sock, since = self.idle[key].pop()
            if self.clock() - since < KEEP_IDLE and not readable([sock]):  # it has nothing to say: what it says is goodbye
                return sock
            sock.close()

    def put(self, key, sock):
        with self.lock:
            self.idle[key].append((sock, self.clock()))

    def expire(self, keep=None):
        """Close what has been idle for `keep` seconds, by default KEEP_IDLE."""
        with self.lock:
            limit = self.clock() - (KEEP_IDLE if keep is None else keep)
            old = [sock for socks in self.idle.values() for sock, since in socks if since <= limit]
            self.idle = collections.defaultdict(list, {
                key: [pair for pair in socks if pair[1] > limit] for key, socks in self.idle.items() if socks and socks[-1][1] > limit})
        for sock in old:
            sock.close()


class ZaiRequest(urllib.request.Request):
    """A request that knows its client, and whether it went over a connection that had been used before."""

    HEAD = ("Accept: text/event-stream, application/json", "Accept-Encoding: identity", "Accept-Language: en-US,en",  # English errors
            "Content-Type: application/json", "User-Agent: ztoapi/" + __version__, "Connection: keep-alive")

    def __init__(self, url, data, key, client):
        super().__init__(url, data, {"Authorization": "Bearer " + key})
        self.add_header("Host", self.host)  # before a proxy takes the place of it
        self.client, self.reused = client, False


class KeepAliveConnection(http.client.HTTPConnection):
    """A connection that comes from the pool if it can, and that leaves its socket to the response."""

    def __init__(self, host, timeout, request, pool, context):
        self.default_port = 443 if context else 80
        super().__init__(host, timeout=timeout)
        self.zai_request, self.pool, self.context = request, pool, context

    def _dial(self, address, timeout, source_address):
        """socket.create_connection, with the time shared out, as a dead IPv6 route must not use up IPv4's; and with the socket
        shown to the watch before it blocks."""
        addresses = socket.getaddrinfo(address[0], address[1], 0, socket.SOCK_STREAM)
        for left, (family, kind, proto, _, place) in zip(range(len(addresses) - 1, -1, -1), addresses):
            sock = socket.socket(family, kind, proto)
            try:
                sock.settimeout(timeout / len(addresses))
                self.zai_request.client.attach(sock)
                sock.connect(place)
                sock.settimeout(timeout)
                return sock
            except BaseException as failure:
                sock.close()
                if not left or self.zai_request.client.gone or not isinstance(failure, OSError):
                    raise
        raise OSError("no address for " + address[0])

    def connect(self):
        client = self.zai_request.client
        self.pool_key = (bool(self.context), self.host, self.port, self._tunnel_host, self._tunnel_port)
        self.sock = self.pool.take(self.pool_key)
        self.zai_request.reused = self.sock is not None
        if self.sock is None:
            self._create_connection = self._dial
            try:
                super().connect()  # TCP, and a proxy's CONNECT
            finally:
                del self._create_connection  # a reference to itself would keep the request until the garbage collector comes
            if self.context:
                self.sock = self.context.wrap_socket(self.sock, server_hostname=self._tunnel_host or self.host, do_handshake_on_connect=False)
                client.attach(self.sock)
                self.sock.do_handshake()
            self.sock.settimeout(None)  # from here on the watch keeps the time
        client.attach(self.sock)
        client.silent_since = client.clock()

    def request(self, method, url, body=None, headers=None, **kwargs):
        """Head and body in one call. No value can break out of its line: they are ours, urllib's, and the settings', which hold printable ASCII."""
        self.connect()
        del headers["Connection"]  # urllib says close
        lines = [f"{method} {url} HTTP/1.1", *ZaiRequest.HEAD, *(f"{name}: {value}" for name, value in headers.items())]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        try:
            self.sock.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b""))
        except ConnectionError:
            pass  # it may have answered before it closed: whoever reads finds out

    def getresponse(self):
        response = Response(self.sock, self.zai_request.client, self.pool, self.pool_key)
        self.sock = None  # do_open() would close it
        return response


class KeepAliveHandler(urllib.request.AbstractHTTPHandler):
    """http and https for an OpenerDirector."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    @functools.cached_property
    def tls(self):
        """Made when first needed: loading the system's certificates takes longer than all the rest of the start."""
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return context

    def http_open(self, request):
        return self.do_open(functools.partial(KeepAliveConnection, request=request, pool=self.pool, context=None), request)

    def https_open(self, request):
        return self.do_open(functools.partial(KeepAliveConnection, request=request, pool=self.pool, context=self.tls), request)


class Response:
    """One response of Z.ai: `status` and `fields`, for which the constructor waits; then read() -> bytes of its body, b"" at the end.

    Not http.client's own, which takes a connection cut between two chunks for an end, gives one chunk a call, and has its head read
    by an email parser. Here recv() brings all that has arrived. Raises what http.client would for a head that is none, and
    UpstreamError where the body is cut or broken.
    """

    reason = ""  # urllib wants one
    LONG, SHORT = 65536, 2048  # bytes to ask for, after a read that was as long as SHORT, and else: a buffer is held while waiting

    def __init__(self, sock, client, pool, pool_key):
        self.sock, self.client, self.pool, self.pool_key = sock, client, pool, pool_key
        self.received, self.status = b"", 100  # received: and not yet read
        while self.status < 200:  # 100 and 103 come before the real one
            version, self.status, self.fields = parse_response_head(self._read_head())
        fields = self.fields
        self.kind = fields.get("content-type", "").lower()
        self.coding = fields.get("content-encoding", "").lower() or "identity"
        self.inflater = zlib.decompressobj(WBITS[self.coding]) if self.coding in WBITS else None  # sent all the same by some gateways
        self.lasting = version != "HTTP/1.0" and "close" not in fields.get("connection", "").lower()
        self.framing = self._framing()
        self.packed, self.size = b"", self.LONG

    def _framing(self):
        """What finds the end of the body; None if that is the connection's."""
        if self.status in (204, 304):  # whatever their fields say
            return Counted(0)
        if "chunked" in self.fields.get("transfer-encoding", "").lower():
            return Dechunker()
        length = LENGTH.match(self.fields.get("content-length", ""))
        return Counted(int(length.group())) if length else None

    def _read_head(self):
        """The bytes of a head; what came behind it is in `received`."""
        data, seen = self.received, 0
        while True:
            end = HEAD_END.search(data, max(0, seen - 3))
            if end:
                self.received = data[end.end():]
                return data[:end.end()]
            if not b"HTTP/".startswith(data[:5]) or len(data) > LONGEST_HEAD:
                raise ValueError(f"{data[:60]!a} is no status line")
            seen, more = len(data), self.sock.recv(8192)
            if not more:
                raise http.client.RemoteDisconnected("closed without an answer") if not data else ValueError("cut in the middle of its head")
            data += more

    def read(self):
        if self.inflater is None:
            if self.coding != "identity":
                raise UpstreamError(f"Z.ai's answer is compressed with {self.coding!a}, which cannot be read here.", GIVE_UP)
            return self._read()
        while True:
            packed = self.packed or self._read()
            try:
                data = self.inflater.decompress(packed, self.LONG)
            except zlib.error as error:
                raise UpstreamError(f"Z.ai's answer is broken: {error}.") from None
            self.packed = self.inflater.unconsumed_tail
            if self.inflater.eof:  # a text may come in several packets
                self.packed, self.inflater = self.inflater.unused_data, zlib.decompressobj(WBITS[self.coding])
            if data or not packed:
                return data

    def _read(self):
        client, framing = self.client, self.framing
        while not (framing and framing.done):
            data, self.received = self.received, b""
            if not data:
                client.silent_since = client.clock()
                try:
                    data = self.sock.recv(self.size)
                except OSError as error:
                    raise road_failure(error, client) from None
                client.silent_since = None
                self.size = self.LONG if len(data) >= self.SHORT else self.SHORT
            if not data:
                if framing or client.gone or client.silent:
                    raise road_failure(None, client)
                return b""
            try:
                data = framing.feed(data) if framing else data
            except ValueError as error:
                raise UpstreamError(f"Z.ai's answer is broken: {error}.") from None
            if data:
                return data
        return b""

    def read_all(self, limit):
        parts, size = [], 0
        for data in iter(self.read, b""):
            parts.append(data)
            size += len(data)
            if size > limit:
                raise UpstreamError(f"Z.ai's answer is larger than {limit} bytes.", GIVE_UP)
        return b"".join(parts)

    def read_json(self):
        """The value that the rest of the body is; None if it is no JSON."""
        text = self.read_all(1 << 20).decode("utf-8", "replace")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return None

    def drain(self, patience=0.1):
        """The answer is complete: wait a moment for the end of the body, as only then the connection can serve again."""
        if not self.framing or self.framing.done:
            return
        deadline = time.monotonic() + patience
        with contextlib.suppress(OSError, ValueError):
            self.sock.settimeout(patience)
            while not self.framing.done and time.monotonic() < deadline:
                data = self.sock.recv(self.LONG)
                if not data:
                    break
                self.framing.feed(data)
            self.sock.settimeout(None)

    def close(self):
        self.client.detach()
        complete = self.framing and self.framing.done
        unread = self.received or complete and self.framing.rest or isinstance(self.sock, ssl.SSLSocket) and self.sock.pending()
        if self.lasting and complete and not unread:
            self.pool.put(self.pool_key, self.sock)
        else:
            self.sock.close()


def road_failure(error, client):
    """The exception for a failed connection to Z.ai: who was it?"""
    if client.gone:
        return ClientGone()
    if client.silent:
        return UpstreamError(f"Z.ai was silent for {client.settings.upstream_timeout:g} s (UPSTREAM_TIMEOUT).", silence=True)
    reason = getattr(error, "reason", error)  # URLError wraps what happened before the head
    if isinstance(reason, (http.client.InvalidURL, UnicodeError)):  # whose text may hold a password
        return UpstreamError("The address of the proxy to use (HTTPS_PROXY, HTTP_PROXY) is none.", GIVE_UP)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return UpstreamError(f"Z.ai's TLS certificate could not be verified: {reason.verify_message}. Set SSL_CERT_FILE to a file with the certificates to trust, "
                             "or check the clock.", GIVE_UP)
    if isinstance(reason, ssl.SSLError):
        return UpstreamError("TLS with Z.ai failed: %s. A proxy or firewall may be in between; SSL_CERT_FILE names the certificates to trust."
                             % (reason.reason or reason))
    if isinstance(reason, socket.gaierror):
        return UpstreamError(f"Z.ai's address could not be found: {reason.strerror}.")
    if isinstance(reason, socket.timeout):
        return UpstreamError(f"No connection to Z.ai within {CONNECT_TIMEOUT:g} s.")
    return UpstreamError("The connection to Z.ai failed: %s." % (getattr(reason, "strerror", None) or reason or "cut in the middle of an answer"))


class Job(NamedTuple):
    """One answer to get: Z.ai's request body as bytes, its model id, and a maker of fresh translators, one for each attempt."""
    data: bytes
    model: str
    translator: Callable


class Upstream:
    """The road to Z.ai. relay() is all a handler needs; it hides the queue, the keys, the connections and the retries."""

    def __init__(self, settings, clock=time.monotonic, now=time.time, rand=random.random, proxies=None):
        self.settings, self.now, self.rand = settings, now, rand
        self.pool = Pool(clock)
        self.gates = Gates(settings.zai_api_key, settings.max_concurrency, settings.queue_timeout, clock, rand)
        self.opener = urllib.request.OpenerDirector()  # by hand: the default one follows redirects, with the key, and opens files
        for handler in (urllib.request.ProxyHandler(proxies), KeepAliveHandler(self.pool)):
            self.opener.add_handler(handler)

    def relay(self, job, client, record):
        """Yield the answer's chunks, in lists, as they come; the last list ends with the finish.

        Closing the generator gives slot and connection back. ApiError or ClientGone if there is no answer, or no rest of it.
        `record` is told what happened on the way.
        """
        ticket, tries, silences = Ticket(job.model, client), 0, 0
        while True:
            try:
                self.gates.enter(ticket)
            finally:
                record.queued_s = ticket.waited
            error = None
            try:
                yield from self._attempt(job, ticket.gate.key, client, record)
                return
            except UpstreamError as failure:
                error = failure.with_traceback(None)  # which holds this frame, which holds the error
                log.debug("%s attempt failed with key %s: %s", record.id, ticket.gate.key.name, self.settings.redact(error.message))
            finally:
                self.gates.leave(ticket, error, record.ttft_s is not None)
            pause = self._pause(error, ticket, tries, silences)
            if pause is None or record.ttft_s is not None:
                try:
                    raise error
                finally:
                    del error
            record.retries += 1
            tries += error.verdict == TRY_AGAIN
            silences += error.silence
            ticket.waited += pause
            record.queued_s = ticket.waited
            self._sleep(client, pause)

    def _pause(self, error, ticket, tries, silences):
        """Seconds to wait before the next attempt; None if there is to be none."""
        if error.verdict == SLOW_DOWN:
            return 0  # it waits at the gate
        if error.verdict == NEXT_KEY:
            return None if self.gates.all_spent(ticket) else 0
        if error.verdict == GIVE_UP or tries >= self.settings.max_retries or error.silence and silences:
            return None
        pause = max(backoff(tries) * self.rand(), error.pause or 0)  # full jitter
        return pause if ticket.waited + pause <= self.settings.queue_timeout else None

    def _sleep(self, client, pause):
        deadline = client.clock() + pause
        while client.clock() < deadline:
            client.wait(deadline - client.clock())

    def _attempt(self, job, key, client, record):
        """Yield the chunks of one attempt."""
        translator, decoder = job.translator(), SSEDecoder()
        with contextlib.closing(self._open(job, key, client, record)) as response:
            try:
                while not translator.complete:
                    data = self._read_on(response, translator)
                    if "json" in response.kind and data.lstrip().startswith(b"{"):  # one JSON body where a stream was asked for is one event
                        events, data = [(data + response.read_all(LONGEST_ANSWER)).decode("utf-8", "replace")], b""
                    else:
                        events = decoder.feed(data) if data else decoder.close()
                    chunks, failure = translator.feed_all(events, end=not data)
                    if record.ttft_s is None and (translator.begun or translator.complete):  # hidden thinking has been paid for, too
                        record.ttft_s = client.clock() - record.started
                    if chunks:
                        yield chunks
                    if failure:
                        raise failure
                response.drain()
            finally:
                record.repaired += translator.repaired

    @staticmethod
    def _read_on(response, translator):
        """What comes next; b"" at the end, and at a cut behind the finish: the answer is whole then."""
        try:
            return response.read()
        except UpstreamError:
            if translator.finish:
                return b""
            raise

    def _open(self, job, key, client, record):
        """The Response, if its status is 200; UpstreamError otherwise."""
        response = self._send("/chat/completions", key, client, job.data)
        record.zai_log_id = plain(self.settings.redact(response.fields.get("x-log-id", "")), 64)
        log.debug("%s Z.ai answered %d, log id %s", record.id, response.status, record.zai_log_id)
        if response.status == 200 and "html" not in response.kind:
            return response
        with contextlib.closing(response):
            raise self._refusal(response, job.model)

    def _refusal(self, response, model):
        status = 404 if response.status == 200 else response.status  # 200: a page where the API should be
        now = self.now()
        return zai_error(response.read_json(), status, now, model, seconds_to_wait(response.fields.get("retry-after", ""), now))

    def _send(self, path, key, client, data=None):
        """The response to one request, its head read. A used connection that turns out dead is replaced unseen."""
        while True:
            request = ZaiRequest(self.settings.zai_base_url + path, data, key.text, client)
            try:
                response = self.opener.open(request, timeout=CONNECT_TIMEOUT)
                client.silent_since = None
                return response
            except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a head or a proxy's name that is none
                began = client.silent_since
                client.detach()
                died = isinstance(getattr(error, "reason", error), (ConnectionError, ssl.SSLEOFError)) and not client.gone and not client.silent
                if not (request.reused and died and client.clock() - began < AT_ONCE):
                    raise road_failure(error, client) from None

    def check_key(self, key, client):
        """GET {base}/models with one key: None if it was accepted, else the UpstreamError."""
        try:
            with contextlib.closing(self._send("/models", key, client)) as response:
                if response.status != 200:
                    return self._refusal(response, "")
                value = response.read_json()
                return None if isinstance(value, dict) and "data" in value else zai_error(value, 404)
        except UpstreamError as error:
            return error

    def close(self):
        self.pool.expire(0)


# Metrics ##############################################################################################################
#
# One record a request, told to one set of counters under one lock. Nothing of a prompt, an answer or a key is kept.

@dataclasses.dataclass
class Record:
    """What happened to one request. Durations are in seconds."""

    id: str
    client: str
    began: float               # Unix
    started: float = 0.0       # the same moment on the clock that durations are measured with
    method: str = "-"
    path: str = "-"
    status: int = 0            # 499: the client left
    chat: bool = False
    model: str = ""            # as the client named it
    model_id: str = ""         # as Z.ai does
    stream: bool = False
    ttft_s: float | None = None  # None as long as nothing of an answer has come
    total_s: float = 0.0
    queued_s: float = 0.0
    usage: dict | None = None
    retries: int = 0
    repaired: int = 0
    changed: tuple[str, ...] = ()
    zai_log_id: str = ""
    error: str = ""

    def tokens(self, kind):
        return self.usage[kind + "_tokens"] if self.usage else None

    def line(self):
        """The log line: one line of printable ASCII, and no blanks but its own, whatever the client sent."""
        words = [self.id, self.client, self.method, plain(self.path), str(self.status)]
        if self.chat:
            facts = {"model": plain(self.model), "stream": "true" if self.stream else "false", "ttft": self.ttft_s, "total": self.total_s,
                     "queue": self.queued_s, "in": self.tokens("prompt"), "out": self.tokens("completion"), "retries": self.retries,
                     "changed": plain(",".join(self.changed)), "repaired": self.repaired or None, "zai": self.zai_log_id}
            words += [f"{name}={value:.3f}" if type(value) is float else f"{name}={value}" for name, value in facts.items() if value not in (None, "")]
        if self.error:
            words.append("error=" + ascii(self.error[:300]))
        return " ".join(words)


class Histogram:
    BOUNDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)  # seconds: from a cached first token to the longest thinking

    def __init__(self):
        self.counts, self.sum = [0] * (len(self.BOUNDS) + 1), 0.0

    def add(self, value):
        self.counts[bisect.bisect_left(self.BOUNDS, value)] += 1
        self.sum += value

    def samples(self):
        """(suffix, labels, value) of each line of a Prometheus histogram."""
        cumulative = list(itertools.accumulate(self.counts))
        bounds = [*map(str, self.BOUNDS), "+Inf"]
        return [("_bucket", {"le": bound}, count) for bound, count in zip(bounds, cumulative)] + [
            ("_sum", {}, round(self.sum, 6)), ("_count", {}, cumulative[-1])]


def label(model):
    """A model id as a metric's label, of which there must not be endlessly many."""
    return model if model in MODELS else "other"


class Metrics:
    """All that /metrics and /stats tell, from one source."""

    BUCKET, BUCKETS = 10, 60  # seconds, and how many: ten minutes for the page's chart

    def __init__(self, now=time.time):
        self.now, self.lock, self.started = now, threading.Lock(), now()
        self.in_flight = self.served = self.failed = self.cancelled = self.retries = self.repaired = 0
        self.requests, self.tokens = collections.Counter(), collections.Counter()
        self.ttft, self.duration = Histogram(), Histogram()
        self.history = collections.deque(maxlen=self.BUCKETS)  # [start, requests, tokens]
        self.recent = collections.deque(maxlen=20)
        self.ttfts = collections.deque(maxlen=200)

    def begin(self):
        with self.lock:
            self.in_flight += 1

    def finish(self, record):
        model, out = label(record.model_id), record.tokens("completion") or 0
        with self.lock:
            self.in_flight -= 1
            self.cancelled += record.status == 499
            self.failed += record.status >= 400 and record.status != 499
            self.served += record.status < 400
            self.retries += record.retries
            self.repaired += record.repaired
            self.requests[model, record.status] += 1
            self.tokens[model, "prompt"] += record.tokens("prompt") or 0
            self.tokens[model, "completion"] += out
            self.duration.add(record.total_s)
            if record.ttft_s is not None:
                self.ttft.add(record.ttft_s)
                self.ttfts.append(record.ttft_s)
            start = int(self.now()) // self.BUCKET * self.BUCKET
            if not self.history or self.history[-1][0] != start:
                self.history.append([start, 0, 0])
            self.history[-1][1] += 1
            self.history[-1][2] += out
            self.recent.appendleft(record)

    def stats(self, gates, queued, demo):
        """The page's JSON. `gates`, `queued`: Gates.state()."""
        with self.lock:
            last = int(self.now()) // self.BUCKET * self.BUCKET
            history = {start: (requests, tokens) for start, requests, tokens in self.history}
            buckets = [(start,) + history.get(start, (0, 0)) for start in range(last - (self.BUCKETS - 1) * self.BUCKET, last + 1, self.BUCKET)]
            ttfts = sorted(self.ttfts)
            return {
                "version": __version__, "demo": demo, "uptime_s": round(self.now() - self.started, 1),
                "in_flight": self.in_flight, "queued": sum(queued.values()), "served": self.served, "failed": self.failed, "cancelled": self.cancelled,
                "tokens_per_s": round(sum(tokens for _, _, tokens in buckets[-6:]) / (6 * self.BUCKET), 1),
                "ttft_p50_ms": round(ttfts[len(ttfts) // 2] * 1000, 1) if ttfts else None,
                "ceilings": [{"model": model, "key": key, "ceiling": ceiling, "in_flight": in_flight, "queued": queued.get(model, 0)}
                             for key, model, ceiling, in_flight in gates],
                "history": [{"t": start, "requests": requests, "tokens": tokens} for start, requests, tokens in buckets],
                "recent": [{"time": record.began, "model": record.model, "status": record.status, "stream": record.stream,
                            "ttft_ms": record.ttft_s and round(record.ttft_s * 1000, 1), "total_ms": round(record.total_s * 1000, 1),
                            "tokens_in": record.tokens("prompt"), "tokens_out": record.tokens("completion"), "error": record.error or None}
                           for record in self.recent]}

    def prometheus(self, gates, queued):
        """Prometheus's text format 0.0.4. `gates`, `queued`: Gates.state()."""
        ceilings, waiting = {}, collections.Counter({"other": 0})
        for key, model, ceiling, _ in gates:
            if ceiling is not None:
                ceilings[key, label(model)] = min(ceiling, ceilings.get((key, label(model)), ceiling))
        for model, count in queued.items():
            waiting[label(model)] += count
        with self.lock:
            families = (
                ("requests_total", "counter", "Chat requests answered, by model and HTTP status; 499: the client left.",
                 [("", {"model": model, "status": status}, count) for (model, status), count in self.requests.items()]),
                ("tokens_total", "counter", "Tokens as Z.ai counts them.",
                 [("", {"model": model, "kind": kind}, count) for (model, kind), count in self.tokens.items()]),
                ("time_to_first_token_seconds", "histogram", "From the request to the first delta.", self.ttft.samples()),
                ("request_duration_seconds", "histogram", "From the request to the end of the answer.", self.duration.samples()),
                ("requests_in_flight", "gauge", "Chat requests being answered.", [("", {}, self.in_flight)]),
                ("requests_queued", "gauge", "Requests waiting for a slot at Z.ai.", [("", {"model": model}, count) for model, count in waiting.items()]),
                ("concurrency_ceiling", "gauge", "Requests in flight that Z.ai allows, as set or learned.",
                 [("", {"key": key, "model": model}, ceiling) for (key, model), ceiling in ceilings.items()]),
                ("retries_total", "counter", "Further attempts at Z.ai.", [("", {}, self.retries)]),
                ("repaired_frames_total", "counter", "Events of Z.ai that were skipped or mended.", [("", {}, self.repaired)]),
                ("cancelled_total", "counter", "Requests whose client left.", [("", {}, self.cancelled)]),
                ("process_start_time_seconds", "gauge", "Start of the process, Unix time.", [("", {}, round(self.started, 3))]),
            )
        lines = []
        for name, kind, text, samples in families:
            lines += [f"# HELP ztoapi_{name} {text}", f"# TYPE ztoapi_{name} {kind}"]
            for suffix, labels, value in samples:
                pairs = ",".join(f'{name}="{value}"' for name, value in labels.items())
                lines.append(f"ztoapi_{name}{suffix}{'{%s}' % pairs if pairs else ''} {value}")
        return "\n".join(lines) + "\n"


# Page #################################################################################################################

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ZtoApi</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --text: #1c222e; --quiet: #566073; --line: #dfe3ea; --edge: #848d9e;
  --accent: #2355c5; --second: #0e7c6b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #13161c; --card: #1b1f27; --text: #e5e9f0; --quiet: #a0aabb; --line: #303744;
  --edge: #737e92; --accent: #8fb3ff; --second: #5cc9b5; --bad: #ff9086; } }
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
section { margin: 1rem 0; padding: 1.25rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
h1, h2 { margin: 0 0 .75rem; font-size: 1.25rem; line-height: 1.2; }
p, dl, figure, details { margin: 0 0 .75rem; }
.quiet, dt, th, figcaption { color: var(--quiet); font-size: .875rem; font-weight: normal; }
button, input, select, textarea { max-width: 100%; margin: 0 .35rem .35rem 0; padding: .3rem .7rem; border: 1px solid var(--edge);
  border-radius: .4rem; background: var(--card); color: var(--text); font: inherit; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--card); }
button:disabled { opacity: .5; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
textarea { display: block; width: 100%; resize: vertical; }
pre, .box { margin: .5rem 0; padding: .75rem; background: var(--page); border-radius: .4rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre, code, #models button { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .875rem; overflow-wrap: anywhere; }
.box:empty { padding: 0; }
details:has(.box:empty) { display: none; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; }
dd { margin: 0; font-size: 1.5rem; }
svg { width: 100%; height: 7rem; fill: currentColor; border-bottom: 1px solid var(--line); }
.tokens { color: var(--accent); }
.requests { color: var(--second); }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { width: 100%; border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: 1rem; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td { max-width: 14rem; overflow: hidden; text-overflow: ellipsis; }
td:nth-child(7) { min-width: 18rem; white-space: normal; overflow-wrap: anywhere; }
td:nth-child(7), .bad { color: var(--bad); }
#demo { padding: 0 .6rem; border: 1px solid; border-radius: 1rem; }
#notice { position: fixed; bottom: 0; background: var(--text); color: var(--page); border-radius: .4rem; }
#notice:not(:empty) { padding: .4rem .9rem; }
</style>
</head>
<body>
<header>
  <h1>ZtoApi <span class="quiet" id="version"></span> <span class="requests quiet" id="demo" hidden>demo</span></h1>
  <form id="key-form">
    <label>API key <input id="key" type="password" autocomplete="off" required pattern="[!-~]+" title="The key, without spaces"></label>
    <button class="main">Use key</button> <span class="bad" id="key-note" role="alert"></span>
    <p class="quiet">For the models, the numbers and the chat below; kept in this browser tab only.</p>
  </form>
</header>
<main>
  <section aria-labelledby="connect">
    <h2 id="connect">Connect</h2>
    <p>Base URL <code id="base">BASE_URL</code> <button data-copy="base" aria-label="Copy the base URL">Copy</button></p>
    <p>Models <span class="quiet">(click one to copy its name)</span></p>
    <p id="models"></p>
    <details open><summary>curl</summary><pre id="curl">
curl BASE_URL/chat/completions \
  -H "Authorization: Bearer sk-your-key" -H "Content-Type: application/json" \
  -d '{"model": "GLM-4.6", "messages": [{"role": "user", "content": "Hello"}]}'</pre><button data-copy="curl">Copy</button></details>
    <details><summary>Python</summary><pre id="python">
from openai import OpenAI
client = OpenAI(base_url="BASE_URL", api_key="sk-your-key")
answer = client.chat.completions.create(model="GLM-4.6", messages=[{"role": "user", "content": "Hello"}])
print(answer.choices[0].message.content)</pre><button data-copy="python">Copy</button></details>
    <details><summary>JavaScript</summary><pre id="javascript">
import OpenAI from "openai";
const client = new OpenAI({ baseURL: "BASE_URL", apiKey: "sk-your-key" });
const answer = await client.chat.completions.create({ model: "GLM-4.6", messages: [{ role: "user", content: "Hello" }] });
console.log(answer.choices[0].message.content);</pre><button data-copy="javascript">Copy</button></details>
  </section>
  <section aria-labelledby="now">
    <h2 id="now">Now</h2>
    <p id="state" role="status"></p>
    <div id="numbers" hidden>
      <dl id="totals"></dl>
      <figure>
        <figcaption id="legend"></figcaption>
        <svg viewBox="0 0 600 100" preserveAspectRatio="none" role="img" aria-labelledby="legend">
          <path class="tokens" id="token-bars"/><path class="requests" id="request-bars"/></svg>
      </figure>
      <div class="scroll" id="ceilings" tabindex="0" role="region" aria-label="Ceilings learned"></div>
      <div class="scroll" id="recent" tabindex="0" role="region" aria-label="Last requests"></div>
    </div>
  </section>
  <section aria-labelledby="try">
    <h2 id="try">Try it</h2>
    <form id="chat">
      <p><label>Model <select id="model"></select></label> <label><input id="thinking" type="checkbox" checked> Thinking</label></p>
      <label>Message <textarea id="message" rows="3" required placeholder="Enter sends, Shift+Enter makes a new line"></textarea></label>
      <p><button class="main" id="send">Send</button> <button id="stop" type="button" disabled>Stop</button>
        <span id="outcome" role="status"></span></p>
    </form>
    <details><summary>Thinking</summary><div class="box quiet" id="thoughts"></div></details>
    <div class="box" id="answer" aria-live="polite"></div>
  </section>
  <p id="notice" role="status"></p>
</main>
<script>
const $ = id => document.getElementById(id);
const none = "\u2013";
const seconds = ms => ms === null ? none : (ms / 1000).toFixed(2) + " s";
let key, running;  // running: the AbortController of the latest chat

function element(tag, children, className = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

// What has not changed stays, and with it the reader's selection and focus.
function fill(place, children) {
  const fresh = place.cloneNode();
  fresh.append(...children);
  if (!fresh.isEqualNode(place)) place.replaceChildren(...children);
}

function table(caption, heads, rows) {
  const row = (tag, cells) => element("tr", cells.map(cell => element(tag, [cell ?? none])));
  const body = rows.length ? rows : [["nothing yet"]];
  return element("table", [element("caption", [caption]), row("th", heads), ...body.map(cells => row("td", cells))]);
}

function serverError(error, status) {
  const marks = [status, error?.code].filter(Boolean).join(", ");
  return new Error((error?.message ?? "The server gave no reason.") + (marks && ` (${marks})`));
}

function reason(error) {
  if (error.name === "AbortError") return "Stopped.";
  return error.name === "Error" ? error.message : `The connection to the server failed. (${error.message})`;
}

async function ask(path, options) {
  const used = key;
  const headers = { "Authorization": "Bearer " + used, "Content-Type": "application/json" };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401 && used === key) setKey("", "The server did not accept the key.");
  const body = await response.json().catch(() => null);
  throw serverError(body?.error, response.status);
}

function setKey(value, note = "") {
  key = value;
  sessionStorage.setItem("ztoapi-key", key);
  $("key").value = "";
  $("key-note").textContent = note;
  $("key-form").hidden = key !== "";
  $("numbers").hidden = true;
  fill($("state"), [key ? "" : "The numbers need the key."]);
  showModels([]);
  refresh();
}

function showModels(names) {
  $("models").replaceChildren(...names.map(name => element("button", [name])));
  $("model").replaceChildren(...names.map(name => new Option(name)));
}

async function refresh() {
  if (!key || document.hidden) return;
  const signal = AbortSignal.timeout(5000);
  try {
    if (!$("model").length) showModels((await (await ask("/v1/models", { signal })).json()).data.map(model => model.id));
    showStats(await (await ask("/stats", { signal })).json());
    fill($("state"), []);
  } catch (error) {
    fill($("state"), [reason(error)]);
  }
}

function showStats(stats) {
  const totals = { "In flight": stats.in_flight, "Queued": stats.queued, "Served": stats.served, "Failed": stats.failed,
    "Tokens per second": stats.tokens_per_s.toFixed(1), "Median first token": seconds(stats.ttft_p50_ms) };
  fill($("totals"), Object.entries(totals).map(([name, value]) => element("div", [element("dt", [name]), element("dd", [value])])));
  fill($("ceilings"), [table("Ceilings learned", ["Model", "Key", "At most at once", "In flight", "Queued"],
    stats.ceilings.map(limit => [limit.model, limit.key, limit.ceiling ?? "none yet", limit.in_flight, limit.queued]))]);
  fill($("recent"), [table("Last requests", ["Time", "Model", "Status", "First token", "Total", "Tokens in / out", "What went wrong"],
    stats.recent.map(requestCells))]);
  showHistory(stats.history.map(bucket => bucket.tokens / 10), stats.history.map(bucket => bucket.requests));
  $("version").textContent = stats.version;
  $("demo").hidden = !stats.demo;
  $("numbers").hidden = !key;
}

function requestCells({ time, model, status, ttft_ms, total_ms, tokens_in, tokens_out, error }) {
  const clock = new Date(time * 1000).toLocaleTimeString();
  return [clock, model, status, seconds(ttft_ms), seconds(total_ms), `${tokens_in ?? none} / ${tokens_out ?? none}`, error ?? ""];
}

function showHistory(tokens, requests) {
  fill($("legend"), ["The last ten minutes: ", element("span", [`tokens per second, at most ${Math.max(...tokens)}`], "tokens"),
    "; ", element("span", [`requests in 10 s, at most ${Math.max(...requests)}`], "requests")]);
  $("token-bars").setAttribute("d", bars(tokens, 66, 64));
  $("request-bars").setAttribute("d", bars(requests, 100, 26));
}

// An SVG path with a bar for each value, all standing on y = floor, the highest as tall as height.
function bars(values, floor, height) {
  const scale = height / Math.max(...values, 1);
  return values.map((value, place) => `M${place * 10 + 1} ${floor}v${-value * scale}h8V${floor}z`).join("");
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (buffer + part.value).split(/\r?\n\r?\n/);
    buffer = blocks.pop();
    for (const block of blocks) {
      const data = block.match(/^data: ?(.*)$/m);
      if (data) yield data[1];
    }
  }
}

async function showAnswer(response) {
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw serverError(chunk.error);
    const delta = chunk.choices?.[0]?.delta;
    $("thoughts").append(delta?.reasoning_content ?? "");
    $("answer").append(delta?.content ?? "");
  }
  throw new Error("The answer was cut off: its stream ended too early.");
}

function setRunning(isRunning, outcome, failed = false) {
  $("send").disabled = isRunning;
  $("stop").disabled = !isRunning;
  $("outcome").textContent = outcome;
  $("outcome").classList.toggle("bad", failed);
}

async function chat(event) {
  event.preventDefault();
  if (!key) return $("key-form").reportValidity();
  const messages = [{ role: "user", content: $("message").value }];
  const body = JSON.stringify({ model: $("model").value, messages, stream: true, enable_thinking: $("thinking").checked });
  running = new AbortController();
  $("thoughts").textContent = $("answer").textContent = "";
  setRunning(true, "Answering");
  try {
    await showAnswer(await ask("/v1/chat/completions", { method: "POST", body, signal: running.signal }));
    setRunning(false, "Done.");
  } catch (error) {
    running.abort();  // An error inside the stream leaves the connection open.
    setRunning(false, reason(error), error.name !== "AbortError");
  }
}

// Not by navigator.clipboard, which browsers withhold from plain http anywhere but on localhost.
function copy(text) {
  $("notice").textContent = "Copied";
  getSelection().selectAllChildren($("notice"));  // Safari copies nothing unless something is selected.
  document.oncopy = event => {
    event.clipboardData.setData("text/plain", text);
    event.preventDefault();
  };
  document.execCommand("copy");
  document.oncopy = null;
  setTimeout(() => $("notice").textContent = "", 2000);
}

for (const place of document.querySelectorAll("pre, #base")) {
  place.textContent = place.textContent.replace("BASE_URL", location.origin + "/v1");
}
document.onclick = ({ target }) => {
  if (target.dataset.copy) copy($(target.dataset.copy).textContent);
  if (target.parentElement === $("models")) copy(target.textContent);
};
document.onvisibilitychange = refresh;
$("key-form").onsubmit = event => {
  event.preventDefault();
  setKey($("key").value);
};
$("chat").onsubmit = chat;
$("message").onkeydown = event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("send").click();
};
$("stop").onclick = () => running.abort();
setKey(sessionStorage.getItem("ztoapi-key") ?? "");
setInterval(refresh, 2000);
</script>
</body>
</html>
"""


def page_policy():
    """The Content-Security-Policy that lets the page's own script and style run, and nothing else."""
    def source(tag):
        text = PAGE.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    return (f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


# HTTP handler #########################################################################################################
#
# http.server's own, made strict. One table of routes, one place where an exception becomes an answer.

KEEP_ALIVE = 75.0     # seconds an idle connection is kept
LINGER = 1.0          # seconds a client gets to read an answer that came before all of its request was taken
MOST_FIELDS = 100     # in a request's head, as http.client has it

TARGET = re.compile("(?:https?://[^/?#]*)?([^?#]*)", re.IGNORECASE)  # a proxy's absolute form has the host in it


class Route(NamedTuple):
    pattern: re.Pattern
    methods: dict[str, str]  # HTTP method -> Handler's
    needs_key: bool = True


ROUTES = (
    Route(re.compile("(?:/v1)?/chat/completions"), {"POST": "post_chat"}),
    Route(re.compile("(?:/v1)?/models"), {"GET": "get_models"}),
    Route(re.compile("(?:/v1)?/models/(?P<id>.+)"), {"GET": "get_model"}),
    Route(re.compile("/metrics"), {"GET": "get_metrics"}),
    Route(re.compile("/stats"), {"GET": "get_stats"}),
    Route(re.compile("/health"), {"GET": "get_health"}, needs_key=False),
    Route(re.compile("/(?:docs|dashboard)?"), {"GET": "get_page"}, needs_key=False),
)


@functools.lru_cache(maxsize=2)
def http_date(timestamp):
    return email.utils.formatdate(timestamp, usegmt=True)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. What is to be sent is collected in `wfile` and goes out in one call."""

    protocol_version = "HTTP/1.1"

    def version_string(self):
        return "ztoapi"

    def date_time_string(self):
        return http_date(int(time.time()))

    # Life of a connection

    disable_nagle_algorithm = True  # else a kept-alive request takes 44 ms
    rbufsize = 2048                 # kept as long as the connection is; a longer body is read past it

    def setup(self):
        super().setup()
        self.wfile = io.BytesIO()
        self.settings = self.server.settings

    def handle_one_request(self):
        first = self.rfile.peek(1)
        blank = self.rfile.read(2) if first.startswith(b"\r") else b""
        if blank == b"\r\n":  # left behind by an old client: no request has begun yet
            first = self.rfile.peek(1)
        if not first or self.server.draining:
            self.close_connection = True
            return
        self.set_deadline(self.settings.client_timeout)
        self.fields, self.sink, self.body_size = {}, None, 0
        self.request_version, self.command = "HTTP/1.0", None  # not 0.9: even the answer to garbage has a head
        self.record = Record(new_id("req_"), self.client_address[0], time.time(), time.monotonic())
        try:
            if first.startswith(b"\x16"):
                raise RequestError("This port speaks HTTP, not HTTPS.")
            if blank not in (b"", b"\r\n"):
                raise RequestError("Malformed request line.")
            super().handle_one_request()
        except ApiError as error:
            self.refuse(error)
        except ClientGone:
            self.close_connection = True
        self.set_deadline(KEEP_ALIVE)

    def set_deadline(self, seconds):
        """The connection is shut unless it gets on within so many seconds; None: the watch looks after it as a Client."""
        self.server.deadlines[self.connection] = time.monotonic() + seconds if seconds else float("inf")

    def parse_request(self):
        """The head, to the letter. The base class's email parser would take a bare CR for a line's end, a folded line for a value, and all
        behind a line that it does not understand for the body."""
        found = REQUEST_LINE.fullmatch(self.raw_requestline.decode("latin-1"))
        if not found:
            raise RequestError("Malformed request line.")
        self.command, self.path, self.request_version = found.groups()
        self.record.method, self.record.path = self.command, self.settings.redact(self.path.partition("?")[0])  # before it is cut
        if not self.request_version.startswith("HTTP/1."):
            raise RequestError("The only HTTP versions spoken here are 1.0 and 1.1.", status=505, code="http_version_not_supported")
        self.fields = parse_request_fields(self.read_field_lines())
        self.body_size = self.framing()
        options = [option.strip(" \t") for option in self.fields.get("connection", "").lower().split(",")]
        self.close_connection = "close" in options or self.request_version == "HTTP/1.0"
        return True

    def read_field_lines(self):
        lines, left = [], LONGEST_HEAD
        while True:
            line = self.rfile.readline(left)
            left -= len(line)
            if not left or len(lines) > MOST_FIELDS:
                raise RequestError("The request's head is too large.", status=431, code="request_header_fields_too_large")
            if not line.endswith(b"\n"):
                raise ClientGone
            if line in (b"\r\n", b"\n"):
                return b"".join(lines).decode("latin-1")
            lines.append(line)

    def framing(self):
        """The body's size in bytes: None if it is chunked. Whatever two readers might understand differently is refused."""
        length, coding, old = self.fields.get("content-length"), self.fields.get("transfer-encoding"), self.request_version == "HTTP/1.0"
        if "host" not in self.fields and not old:
            raise RequestError("A Host header is needed.")
        if coding is not None and (length is not None or old):
            raise RequestError("Ambiguous length of the body.")
        if coding is not None and coding.lower() != "chunked":
            raise RequestError("The only Transfer-Encoding understood is chunked.", status=501)
        if length is not None and not LENGTH.fullmatch(length):
            raise RequestError("Malformed Content-Length.")
        return None if coding else int(length or 0)

    # One request

    def dispatch(self):
        """Find the route, call it, and turn what it raises into an answer."""
        record = self.record
        self.server.busy.add(self.connection)
        try:
            getattr(self, self.find_route())()
        except ApiError as error:
            self.answer_error(error)
        except (ClientGone, OSError):
            record.status, record.error, self.close_connection = 499, "the client left", True
        except Exception:
            log.exception("%s failed; this is a bug", record.id)
            self.answer_error(ApiError(f"Internal error; the log says more under the id {record.id}."))
        finally:
            record.total_s, self.sink = time.monotonic() - record.started, None
            log.info("%s", self.settings.redact(record.line()))
            if record.chat:
                self.server.metrics.finish(record)
            self.server.busy.discard(self.connection)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = dispatch

    def find_route(self):
        """The name of the method that answers; the key is checked on the way."""
        self.check_host()
        if self.command == "OPTIONS":
            return "answer_options"
        path = "/" + urllib.parse.unquote(TARGET.match(self.path).group(1), errors="replace").strip("/")
        matches = ((route, route.pattern.fullmatch(path)) for route in ROUTES)
        self.route, self.match = next((pair for pair in matches if pair[1]), (None, None))
        if self.route is None or self.route.needs_key:
            self.check_key()
        if self.route is None:
            raise RequestError(f"There is nothing at {path!a}: ZtoApi speaks /v1/chat/completions (not the Responses API) and /v1/models.",
                               status=404, code="not_found")
        method = "GET" if self.command == "HEAD" else self.command
        if method not in self.route.methods:
            raise RequestError(f"{self.command} is not a method of {path!a}.", status=405, code="method_not_allowed")
        return self.route.methods[method]

    def check_host(self):
        """With the well-known key only pages of this computer may reach us: the name in Host tells DNS rebinding."""
        if self.settings.well_known and "host" in self.fields:
            try:
                host = urllib.parse.urlsplit("//" + self.fields["host"]).hostname or ""
            except ValueError:
                host = ""
            if not is_loopback(host):
                raise RequestError("With the well-known DEFAULT_KEY only this computer is served; set a key of your own.", status=403, code="host_not_allowed")

    def check_key(self):
        scheme, _, bearer = self.fields.get("authorization", "").partition(" ")
        given = [bearer.strip(" \t") if scheme.lower() == "bearer" else "", self.fields.get("x-api-key", ""), self.fields.get("api-key", "")]
        matches = [hmac.compare_digest(key.encode(), text.encode("utf-8", "replace")) for key in self.settings.default_key for text in given]
        if not any(matches):
            raise RequestError("Incorrect API key: send the proxy's DEFAULT_KEY as Authorization: Bearer KEY." if any(given) else
                               "No API key: send the proxy's DEFAULT_KEY as Authorization: Bearer KEY.", status=401, code="invalid_api_key")

    def read_body(self):
        kind = self.fields.get("content-type", "").lower()
        if "x-www-form-urlencoded" in kind or kind.startswith("multipart/"):
            raise RequestError("The body must be JSON: send Content-Type: application/json.", status=415, code="unsupported_media_type")
        if self.fields.get("content-encoding", "identity").lower() != "identity":
            raise RequestError("Compressed bodies are not understood.", status=415, code="unsupported_media_type")
        limit = self.settings.max_body_mb << 20
        too_large = RequestError(f"The body is larger than MAX_BODY_MB ({self.settings.max_body_mb}).", status=413, code="request_too_large")
        if self.body_size is not None and self.body_size > limit:
            raise too_large
        if self.body_size != 0 and self.fields.get("expect", "").lower() == "100-continue" and self.request_version != "HTTP/1.0":
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
            self.push()
        if self.body_size is None:
            body = self.read_chunked(limit, too_large)
        else:
            body = self.rfile.read(self.body_size)
            if len(body) < self.body_size:
                raise ClientGone
        self.body_size = 0
        return body

    def read_chunked(self, limit, too_large):
        dechunker, body = Dechunker(limit), []
        try:
            while not dechunker.done:
                data = self.rfile.peek(1)
                if not data:
                    raise ClientGone
                body.append(dechunker.feed(data))
                self.rfile.read(len(data) - (len(dechunker.rest) if dechunker.done else 0))
        except OverflowError:
            raise too_large from None
        except ValueError as error:
            raise RequestError(f"Malformed chunked body: {error}.") from None
        return b"".join(body)

    # Answers

    def answer(self, status, body, kind="application/json", headers=()):
        """A whole answer. One given before the body was read ends the connection: the body must not become the next request."""
        self.record.status = status
        self.close_connection = self.close_connection or self.body_size != 0 or self.server.draining
        self.send_response(status)
        self.send_common_headers(kind, headers)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.push()
        if self.body_size != 0:
            self.linger()

    def answer_json(self, value, headers=()):
        self.answer(200, encode_json(value), headers=headers)

    def answer_error(self, error):
        """An error in the regime that is left: a status, or, once a stream has begun, an event that ends it without its end marks."""
        error.message = self.settings.redact(error.message)
        body, self.record.error = error.body(), error.message
        try:
            if self.sink and self.sink.started:
                self.record.status, self.close_connection = error.status, True
                self.set_deadline(self.settings.client_timeout)  # the watch has let go of the client
                # No closing chunk, so that the end shows as the cut it is; but browsers, which send an Origin, and the AI SDK lose what
                # they have not yet read over a cut, and with it the error.
                self.sink.write(encode_event(body).decode(), last="origin" in self.fields or "ai-sdk/" in self.fields.get("user-agent", ""))
            else:
                headers = dict(error.headers(), **self.outcome_headers())
                if error.status == 405:
                    headers["Allow"] = ", ".join(["OPTIONS", *self.route.methods, *(["HEAD"] if "GET" in self.route.methods else [])])
                self.answer(error.status, encode_json(body), headers=headers.items())
        except (ClientGone, OSError):
            self.record.status, self.close_connection = 499, True

    def refuse(self, error):
        """The answer to what is no request that could be dispatched."""
        self.close_connection = True
        self.body_size = None  # whatever follows is not to be understood
        self.answer_error(error)
        log.info("%s", self.settings.redact(self.record.line()))

    def send_error(self, code, message=None, explain=None):
        """The base class's complaints, as JSON."""
        status = HTTPStatus(code)
        name = "uri_too_long" if code == 414 else status.name.lower()  # which Python 3.13 has renamed
        self.refuse(RequestError(message or name.replace("_", " ").capitalize() + ".", status=code, code=name))

    def send_common_headers(self, kind, headers):
        for name, value in itertools.chain((("Content-Type", kind), ("x-request-id", self.record.id), ("X-Content-Type-Options", "nosniff")),
                                           self.cors_headers(), headers):
            self.send_header(name, value)

    def cors_headers(self):
        """None with the well-known key: then no web page may read what we answer."""
        origins, origin = self.settings.cors_origin, self.fields.get("origin")
        if self.settings.well_known or not origins:
            return []
        headers = [("Access-Control-Expose-Headers", "x-request-id, retry-after, x-should-retry, x-ztoapi-changed, x-ztoapi-queue-ms, x-zai-log-id")]
        if "*" in origins:
            return headers + [("Access-Control-Allow-Origin", "*")]
        return headers + [("Vary", "Origin")] + ([("Access-Control-Allow-Origin", origin)] if origin in origins else [])

    def outcome_headers(self):
        """What happened to a chat request, for whoever wants to know."""
        if not self.record.chat:
            return {}
        headers = {"x-ztoapi-queue-ms": str(int(self.record.queued_s * 1000)), "x-ztoapi-changed": ",".join(self.record.changed),
                   "x-zai-log-id": self.record.zai_log_id}
        return {name: value for name, value in headers.items() if value}

    def push(self):
        """Send what has been collected, in one call."""
        self.set_deadline(self.settings.client_timeout)
        self.connection.sendall(self.collected())

    def collected(self):
        data, self.wfile = self.wfile.getvalue(), io.BytesIO()
        return data

    def linger(self):
        """Take what the client is still sending, for a moment: closing on it would reset the connection before the answer is read."""
        self.connection.shutdown(socket.SHUT_WR)
        self.set_deadline(LINGER)
        with contextlib.suppress(OSError):
            for _ in range(256):  # 16 MiB
                if not self.rfile.read1(65536):
                    break

    def log_request(self, code="-", size="-"):
        pass  # dispatch() writes one line a request

    def log_error(self, format, *args):
        log.debug("%s: " + format, self.client_address[0], *args)

    # Routes

    def answer_options(self):
        """CORS preflight, which comes without a key."""
        headers = [("Allow", "GET, HEAD, POST, OPTIONS")]
        if self.cors_headers():
            headers += [("Access-Control-Allow-Methods", "GET, POST, OPTIONS"), ("Access-Control-Max-Age", "86400"),
                        ("Access-Control-Allow-Headers", self.fields.get("access-control-request-headers", "authorization, content-type")),
                        ("Vary", "Access-Control-Request-Headers")]  # echoed: SDKs send x-stainless-*, and * does not cover Authorization
        self.answer(204, b"", headers=headers)

    def get_page(self):
        self.answer(200, PAGE.encode(), "text/html; charset=utf-8", (
            ("Content-Security-Policy", self.server.page_policy), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-cache")))

    def get_health(self):
        self.answer_json({"status": "ok"})

    def get_models(self):
        self.answer_json({"object": "list", "data": [self.model(name, created) for name, created in listed_models(self.settings).items()]})

    def get_model(self):
        for name, created in listed_models(self.settings).items():
            if name.lower() == self.match.group("id").lower():
                return self.answer_json(self.model(name, created))
        raise RequestError(f"The model {self.match.group('id')[:100]!a} is not listed; GET /v1/models lists the known ones.", "model",
                           status=404, code="model_not_found")

    @staticmethod
    def model(name, created):
        return {"id": name, "object": "model", "created": created, "owned_by": "z.ai"}

    def get_metrics(self):
        text = self.server.metrics.prometheus(*self.server.upstream.gates.state())
        self.answer(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def get_stats(self):
        self.answer_json(self.server.metrics.stats(*self.server.upstream.gates.state(), self.settings.demo_mode), (("Cache-Control", "no-store"),))

    def post_chat(self):
        settings, record = self.settings, self.record
        record.chat = True
        self.server.metrics.begin()
        request = read_json_object(self.read_body())
        request["stream"] = wants_stream(request, self.fields.get("accept", ""), self.fields.get("user-agent", ""), settings.default_stream)
        record.model = settings.redact(str(request.get("model", "")))[:100]
        zai_request, record.changed = to_zai_request(request, settings)
        record.model_id, record.stream = zai_request["model"], request["stream"]
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s to Z.ai: %s", record.id, settings.redact(shape(zai_request)))
        if not settings.zai_api_key:
            raise UpstreamError(NO_KEY, code="upstream_auth_error", heals=False)
        include_usage = (request.get("stream_options") or {}).get("include_usage", False)
        envelope = Envelope(new_id("chatcmpl-"), int(record.began), request["model"], include_usage)
        job = Job(encode_request(zai_request), record.model_id, functools.partial(self.translator, request, zai_request))
        self.set_deadline(None)
        if record.stream:
            self.sink = EventSink(self.connection, self.stream_head, envelope, self.request_version != "HTTP/1.0", settings.heartbeat)
        client = Client(self.connection, settings, self.sink)
        with self.server.watch.over(client), contextlib.closing(self.server.upstream.relay(job, client, record)) as answer:
            if record.stream:
                return self.stream(answer, envelope)
            message, finish_reason, record.usage = collect_completion(itertools.chain.from_iterable(answer))
        self.answer_json(envelope.completion(message, finish_reason, record.usage), self.outcome_headers().items())

    def translator(self, request, zai_request):
        tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in zai_request.get("tools", ()) if tool["type"] == "function"}
        return ChunkTranslator(
            reasoning=request.get("reasoning_format") or self.settings.reasoning_format, tools=tools, one_call=request.get("parallel_tool_calls") is False,
            unfence="response_format" in zai_request, restartable=not self.record.stream,
            describe=lambda value: zai_error(value, 200, time.time(), zai_request["model"]))

    def stream(self, answer, envelope):
        write, encode, record = self.sink.write, envelope.encode, self.record
        record.status = 200
        for chunks in answer:
            last = chunks[-1]
            write(encode(chunks), last.finish_reason is not None)  # never an empty text, which would be the chunked coding's end
        record.usage = last.usage

    def stream_head(self):
        """The head of a streamed answer; asked for when the first bytes go out, so that it can tell how it came about."""
        self.send_response(200)
        self.send_common_headers("text/event-stream; charset=utf-8", (
            ("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no"), *self.outcome_headers().items()))
        if self.request_version == "HTTP/1.0":
            self.send_header("Connection", "close")
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        return self.collected()


def shape(zai_request):
    """A request as a log may show it: roles and lengths, never texts."""
    messages = " ".join(f"{message['role']}:{len(message['content'])}" for message in zai_request["messages"])
    return f"{zai_request['model']!a} messages=[{messages}] tools={len(zai_request.get('tools', ()))} fields={','.join(sorted(map(ascii, zai_request)))}"


# Server ###############################################################################################################

class Server(http.server.ThreadingHTTPServer):
    """The proxy: Server(settings).serve_forever(), and stop() from another thread. It owns all its parts."""

    request_queue_size = 1024  # the base class's 5 refuses bursts
    daemon_threads, block_on_close = True, False  # stop() counts what runs; joining would hang on one idle client
    allow_reuse_address = os.name != "nt"  # there it would let a second process take a port in use

    GRACE = 30.0        # seconds for running answers to finish
    MOST_REFUSED = 128  # connections kept for a moment beyond MAX_CONNECTIONS, until their 503 has been read

    def __init__(self, settings):
        self.demo = DemoZai() if settings.demo_mode else None
        if self.demo:
            settings = dataclasses.replace(settings, zai_api_key=("demo",), zai_base_url=self.demo.base_url)
        self.settings, self.metrics, self.watch = settings, Metrics(), Watch()
        self.upstream = Upstream(settings, proxies={} if self.demo else None)
        self.page_policy = page_policy()
        self.lock, self.served, self.draining, self.next_service = threading.Lock(), False, False, 0.0
        self.deadlines, self.busy = {}, set()   # of all connections; those of them with a request under way
        self.refused = collections.deque()      # (until, socket) of those beyond MAX_CONNECTIONS
        host = settings.host.strip("[]")
        self.address_family, _, _, _, address = socket.getaddrinfo(host, settings.port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)[0]
        try:
            super().__init__(address, Handler)
        except BaseException:
            self.close_parts()
            raise

    def server_bind(self):
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.address_family == socket.AF_INET6 and self.server_address[0] == "::":
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)  # not HTTPServer's, whose getfqdn() can hang on DNS
        self.server_name, self.server_port = self.settings.host, self.server_address[1]

    @property
    def url(self):
        host = self.server_address[0]
        host = "localhost" if is_loopback(host) or host in ("0.0.0.0", "::") else host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    # The accept loop

    def serve_forever(self, poll_interval=WATCH_INTERVAL):
        self.served = True
        super().serve_forever(poll_interval)

    def service_actions(self):
        """Called by the accept loop all the time: the watch needs no thread of its own."""
        now = time.monotonic()
        if now < self.next_service:
            return
        self.next_service = now + WATCH_INTERVAL
        try:
            self.watch.tick()
        except Exception:
            log.exception("The watch failed; this is a bug")  # but no reason for the accept loop to end
        with self.lock:
            late = [sock for sock, deadline in self.deadlines.items() if deadline < now]
        for sock in late:
            shut(sock)
        self.upstream.pool.expire()
        while self.refused and self.refused[0][0] < now:
            self.refused.popleft()[1].close()

    def get_request(self):
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(0.05)  # the connection stays in the backlog, and the accept loop must not spin on it
            raise

    def verify_request(self, request, client_address):
        """Take the connection, or refuse it cheaply: a 503 from here, no thread."""
        with self.lock:
            if len(self.deadlines) < self.settings.max_connections:
                self.deadlines[request] = time.monotonic() + self.settings.client_timeout
                return True
        body = encode_json(ApiError("Too many connections.", code="too_many_connections").body())
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\nConnection: close\r\n"
                         b"x-request-id: %b\r\nContent-Length: %d\r\n\r\n%b" % (new_id("req_").encode(), len(body), body))
            request.shutdown(socket.SHUT_WR)
            self.refused.append((time.monotonic() + LINGER, socket.socket(fileno=request.detach())))
            if len(self.refused) > self.MOST_REFUSED:
                self.refused.popleft()[1].close()
        return False

    def shutdown_request(self, request):
        with self.lock:
            self.deadlines.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (OSError, ClientGone)):  # a hang-up is none
            log.exception("The connection of %s failed; this is a bug", client_address[0])

    # The end

    def stop(self, grace=GRACE):
        """Stop accepting, let running answers finish for `grace` seconds, close everything."""
        self.draining = True
        if self.served:
            self.shutdown()  # would wait for ever for a loop that never ran
        return self.drain(grace)

    def drain(self, grace=GRACE):
        """What stop() does once serve_forever() has ended. True if nothing was cut."""
        self.draining = True
        self.socket.close()
        deadline = time.monotonic() + grace
        while True:
            with self.lock:
                idle, busy = set(self.deadlines) - self.busy, bool(self.busy)
            for sock in idle:
                shut(sock)
            if not busy or time.monotonic() > deadline:
                break
            self.service_actions()
            time.sleep(0.02)
        with self.lock:
            late = list(self.deadlines)
        for sock in late:
            shut(sock)
        self.watch.tick()  # sees that they have ended, and cuts what runs for them at Z.ai
        self.server_close()
        self.close_parts()
        return not busy

    def close_parts(self):
        self.upstream.close()
        if self.demo:
            self.demo.close()


# Demo #################################################################################################################
#
# A small stand-in for Z.ai with its real dialect, so that the whole road can be tried without a key.

class DemoHandler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    PACE = 0.02  # seconds between events

    def do_GET(self):
        body = b'{"object":"list","data":[{"id":"glm-4.6","object":"model","created":1759276800,"owned_by":"z-ai"}]}'
        self._head({"Content-Type": "application/json", "Content-Length": len(body)})
        self.wfile.write(body)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode())
        id = time.strftime("%Y%m%d%H%M%S", time.gmtime(time.time() + 8 * 3600)) + new_id("")[:16]
        self._head({"Content-Type": "text/event-stream;charset=UTF-8", "Transfer-Encoding": "chunked", "X-Log-Id": id})
        base = {"id": id, "created": int(time.time()), "object": "chat.completion.chunk", "model": request["model"]}
        for count, delta in enumerate(self.deltas(request), 1):
            self._chunk(encode_event(dict(base, choices=[{"index": 0, "delta": delta}])))
            time.sleep(self.PACE)
        words = len(encode_json(request["messages"]).split())
        finish = "tool_calls" if "tool_calls" in delta else "stop"
        self._chunk(encode_event(dict(base, choices=[{"index": 0, "finish_reason": finish, "delta": {"role": "assistant", "content": ""}}], usage={
            "prompt_tokens": words, "completion_tokens": count, "total_tokens": words + count, "prompt_tokens_details": {"cached_tokens": 0}})))
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def deltas(self, request):
        """Thinking, then an echo; a call of the first tool instead, unless its result is already there."""
        last = request["messages"][-1]
        text = last["content"] if isinstance(last["content"], str) else " ".join(part.get("text", "") for part in last["content"])
        functions = [tool["function"] for tool in request.get("tools", ()) if tool["type"] == "function"]
        if request.get("thinking", {}).get("type") != "disabled":
            for word in ("This", "is", "a", "demo,", "so", "there", "is", "nothing", "to", "think", "about."):
                yield {"role": "assistant", "reasoning_content": word + " "}
        if functions and last["role"] != "tool":
            arguments = self.example(dict(functions[0]["parameters"], type="object"), functions[0]["parameters"], text)
            yield {"tool_calls": [{"id": new_id("call_"), "index": 0, "type": "function", "function": {
                "name": functions[0]["name"], "arguments": encode_json(arguments).decode()}}]}
        elif request.get("response_format", {}).get("type") == "json_object":
            schemas = [message["content"].partition("JSON Schema")[2].partition("\n")[2] for message in request["messages"] if message["role"] == "system"]
            schema = next((json.loads(schema) for schema in schemas if schema), {})
            yield {"role": "assistant", "content": encode_json(self.example(schema, schema, text) if schema else {"demo": True, "echo": text}).decode()}
        else:
            for word in re.findall(r"\S+\s*|\s+", "Demo of ZtoApi. You said: " + text):
                yield {"role": "assistant", "content": word}

    def example(self, schema, root, text, depth=0):
        """A value that fits a JSON schema, with `text` for its strings."""
        schema = schema if isinstance(schema, dict) else {}
        if "$ref" in schema:
            schema = root.get("$defs", {}).get(str(schema["$ref"]).rsplit("/", 1)[-1], {})
        for choice in ("anyOf", "oneOf", "allOf"):
            if schema.get(choice):
                return self.example(schema[choice][0], root, text, depth + 1)
        if "const" in schema or schema.get("enum"):
            return schema["const"] if "const" in schema else schema["enum"][0]
        kind = schema.get("type")
        kind = kind[0] if isinstance(kind, list) else kind
        if depth > 8 or kind not in ("object", "array"):
            return {"integer": 1, "number": 1, "boolean": True, "null": None, "object": {}, "array": []}.get(kind, text[:40])
        if kind == "array":
            return [self.example(schema.get("items"), root, text, depth + 1)]
        return {name: self.example(part, root, text, depth + 1) for name, part in schema.get("properties", {}).items()}

    def _head(self, fields):
        self.send_response(200)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()

    def _chunk(self, data):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, format, *args):
        pass


class DemoZai(socketserver.ThreadingTCPServer):
    """The stand-in, in a thread of its own on a free loopback port."""

    daemon_threads, block_on_close = True, False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), DemoHandler)
        self.base_url = f"http://127.0.0.1:{self.server_address[1]}/api/paas/v4"
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # the proxy hangs up on us whenever its own client does

    def close(self):
        self.shutdown()
        self.server_close()


# Check ################################################################################################################

CHECK_MODELS = {True: ("glm-4.7", "glm-4.5-air"), False: ("glm-4.7-flash", "glm-4.6")}  # of the Coding Plan, or not; the free one first


def check(settings):
    """Try the road to Z.ai step by step, telling of each step. True if a chat would work."""
    print(f"Python {sys.version.split()[0]} on {sys.platform}, {ssl.OPENSSL_VERSION}, ztoapi {__version__}")
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != getattr(Settings(), field.name):
            print(f"  {field.name.upper()}={', '.join(map(mask, value)) if field.metadata['secret'] else value}")
    with Server(dataclasses.replace(settings, port=0, host="127.0.0.1")) as server:  # never reached: it brings the demo and the watch
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ours, theirs = socket.socketpair()
        with ours, theirs, server.watch.over(Client(ours, settings)) as client:
            try:
                return all(step(server, client) for step in (check_network, check_keys, check_chat))
            finally:
                server.stop(0)


def check_network(server, client):
    """DNS, TCP and TLS on the way to ZAI_BASE_URL, or to the proxy that is in force for it."""
    base = urllib.parse.urlsplit(server.settings.zai_base_url)
    host, port, proxy = base.hostname, base.port or (443 if base.scheme == "https" else 80), None
    if not server.demo and not urllib.request.proxy_bypass(host):
        proxy = urllib.request.getproxies().get(base.scheme)
    if proxy:
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else "//" + proxy)
        host, port = parts.hostname, parts.port or 80
        print(f"ok    proxy for {base.scheme}: {host}:{port} (NO_PROXY={base.hostname} goes around it)")
    step, advice = "DNS", "check the name, the network and the resolver"
    try:
        addresses = sorted({info[4][0] for info in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)})
        print(f"ok    DNS: {host} is {', '.join(addresses)}")
        step, advice = "TCP", "a firewall may be in between; if there is a proxy to use, set HTTPS_PROXY"
        with socket.create_connection((host, port), CONNECT_TIMEOUT) as sock:
            print(f"ok    TCP: connected to port {port}")
            if base.scheme == "https" and not proxy:
                step, advice = "TLS", "set SSL_CERT_FILE to the certificates to trust, or check the clock"
                with KeepAliveHandler(server.upstream.pool).tls.wrap_socket(sock, server_hostname=host) as tls:
                    print(f"ok    TLS: certificate verified, {tls.version()}")
        return True
    except OSError as error:
        print(f"FAIL  {step}: {error}: {advice}")
        return False


def check_keys(server, client):
    """Each key against GET {base}/models. True if there is one that Z.ai takes."""
    keys = server.upstream.gates.keys
    if not keys:
        print("FAIL  key: " + NO_KEY)
    errors = [server.upstream.check_key(key, client) for key in keys]
    for key, error in zip(keys, errors):
        print(f"FAIL  key {key.name}: {server.settings.redact(error.message)}" if error else f"ok    key {key.name}: accepted")
    return None in errors


def check_chat(server, client):
    """One tiny streamed completion."""
    for model in CHECK_MODELS["/coding/" in server.settings.zai_base_url]:
        request = {"model": model, "messages": [{"role": "user", "content": "Say OK."}], "max_tokens": 16, "stream": True, "enable_thinking": False}
        job, began = Job(encode_json(to_zai_request(request, server.settings)[0]), model, ChunkTranslator), time.monotonic()
        try:
            with contextlib.closing(server.upstream.relay(job, client, Record("check", "", time.time(), began))) as answer:
                next(answer)
                ttft_s = time.monotonic() - began
                collections.deque(answer, 0)
            print(f"ok    chat: {model} answered, first token after {ttft_s * 1000:.0f} ms")
            return True
        except ApiError as error:
            print(f"FAIL  chat with {model}: {server.settings.redact(error.message)}")
    return False


# Main #################################################################################################################

def raise_descriptor_limit(connections):
    """How many of `connections` the descriptor limit allows, once raised as far as it goes: two each, and some to spare."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return connections
    need = 2 * connections + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, (soft - 64) // 2))


def announce(server):
    """Three lines: where it listens, what it speaks to, where the page is."""
    settings = server.settings
    keys = WELL_KNOWN_KEY if settings.well_known else ", ".join(map(mask, settings.default_key))
    print(f"ZtoApi {__version__} listens on {server.url}/v1 (HOST={settings.host}), key {keys}")
    if server.demo:
        print("DEMO: answers come from a stand-in inside this program, not from Z.ai")
    elif not settings.zai_api_key:
        print("WARNING: ZAI_API_KEY is not set, so chat will answer 502; get a key at https://z.ai/manage-apikey/apikey-list")
    else:
        zai_keys = ", ".join(key.name for key in server.upstream.gates.keys)
        print(f"Z.ai: {settings.zai_base_url}, key {zai_keys}, {len(listed_models(settings))} models")
    print(f"Page: {server.url}/   Ctrl-C stops", flush=True)


def serve(settings):
    """Serve until a signal comes. The exit status."""
    allowed = raise_descriptor_limit(settings.max_connections)
    if allowed < settings.max_connections:
        log.warning("the descriptor limit allows %d connections, not MAX_CONNECTIONS=%d", allowed, settings.max_connections)
        settings = dataclasses.replace(settings, max_connections=allowed)
    try:
        server = Server(settings)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"Cannot listen on HOST={ascii(settings.host)[1:-1]} PORT={settings.port}: {reason}", file=sys.stderr)
        return 1
    with contextlib.suppress(ValueError):  # not the main thread: then somebody else minds the signals
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
    try:
        announce(server)
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    try:
        return 0 if server.drain() else 1
    except KeyboardInterrupt:  # a second signal ends at once
        return 1


def main(environ=os.environ, argv=()):
    """Run the program; the exit status: 0, 1 for what the machine refuses, 2 for what was asked wrongly."""
    argv = list(argv)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # None without a console, or somebody's own
            stream.reconfigure(errors="backslashreplace")  # Z.ai's words may be Chinese, and the console may not be
    if argv in (["--help"], ["-h"]):
        print(__doc__.strip())
        return 0
    if argv == ["--version"]:
        print("ztoapi " + __version__)
        return 0
    if argv not in ([], ["--check"]):
        print(f"ztoapi: unknown argument {argv[0]!a}; --help tells what there is", file=sys.stderr)
        return 2
    try:
        settings = Settings.from_environ(environ)
    except SettingsError as error:
        print(f"ztoapi: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.DEBUG if settings.debug_mode else logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging._srcfile, logging.logThreads, logging.logProcesses, logging.logMultiprocessing = None, False, False, False  # as logging's HOWTO advises
    if argv:
        return 0 if check(settings) else 1
    return serve(settings)


if __name__ == "__main__":
    sys.exit(main(os.environ, sys.argv[1:]))
