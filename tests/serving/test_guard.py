"""What is refused before a model is asked: without a key, from other sites, too much, too slowly."""

import base64
import contextlib
import hashlib
import http.client
import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving_model import Response, Running, post, run_server, send

from tinysft_jax.sampling.engine import Closed, News, Request
from tinysft_jax.serving import app

KEY = "sec-ret"
WITH_KEY = {"authorization": f"Bearer {KEY}"}
CHAT = {"messages": [{"role": "user", "content": "why"}], "max_tokens": 2}
PROTECTED = [
    *(("GET", path) for path in ("/v1/models", "/metrics", "/v1/none", "/none", "/health/", "//health")),
    *(("POST", path) for path in ("/v1/chat/completions", "/v1/completions")),
]


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    """Asks for a key, and serves other machines; its engine never becomes ready."""
    with run_server(starts_engine=False, n_slots=1, queue=1, api_key=KEY, loopback_only=False) as running:
        yield running


@pytest.fixture
def idle() -> Iterator[Running]:
    """Has room for two requests, which it never answers."""
    with run_server(starts_engine=False, n_slots=1, queue=1) as running:
        yield running


def assert_openai_form(response: Response) -> None:
    assert response.headers["content-type"] == "application/json" and set(json.loads(response.body)) == {"error"}
    assert set(response.error) == {"message", "type", "param", "code"}
    assert response.error["message"] and response.error["type"] in ("invalid_request_error", "server_error")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        *(
            {"authorization": value}
            for value in ("", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, f"Basic {KEY}")
        ),
        {"authorization": f"Bearer {KEY.upper()}"},
        {"authorization": f"Bearer {KEY} {KEY}"},
        {"authorization": "Bearer \xff"},
        {"api-key": KEY},
        # `Request.url` of an older Starlette has the path "/health" then.
        {"host": "localhost/health?"},
        {"host": "localhost/?"},
        {"host": "localhost/health#"},
    ],
    ids=str,
)
def test_without_the_key_nothing_is_answered(locked, headers):
    for method, path in PROTECTED:
        response = send(locked, method, path, {} if method == "POST" else None, headers)
        assert response.status == 401, path
        assert_openai_form(response)
        assert response.error["code"] == "invalid_api_key" and response.headers["www-authenticate"] == "Bearer"


def test_with_the_key_all_is_answered(locked):
    for authorization in (f"Bearer {KEY}", f"bearer  {KEY} "):
        headers = {"authorization": authorization}
        found = [send(locked, method, path, {}, headers).status for method, path in PROTECTED[:3] + PROTECTED[-2:]]
        assert found == [200, 200, 404, 400, 400]


def test_the_page_and_the_health_need_no_key(locked, server):
    assert send(locked, "GET", "/").status == 200
    assert send(locked, "GET", "/health").status == 503
    assert send(server, "GET", "/v1/models", headers={"authorization": "Bearer any"}).status == 200, "where none is set"


def test_health_says_whether_the_model_is_ready(idle, server):
    response = send(idle, "GET", "/health")
    assert (response.status, json.loads(response.body)) == (503, {"status": "starting"})
    response = send(server, "GET", "/health")
    assert (response.status, json.loads(response.body)) == (200, {"status": "ready"})


FOREIGN_HOSTS = [
    *("evil.com", "evil.com:PORT", "localhost.evil.com", "evil.com:80@x", "localhost@evil.com", "", "[", "[::2]"),
    *("127.0.0.2", "0.0.0.0", "localhost,evil.com", "evil.com/localhost", "evil.com?localhost", "evil.com#localhost"),
]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_requests_for_another_host_are_refused(server, host):
    """A page of evil.com could let that name point here, and would then be of the same site."""
    for method, path in (("GET", "/"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
        response = send(server, method, path, CHAT, {"host": host.replace("PORT", str(server.port))})
        assert response.status == 403
        assert_openai_form(response)


@pytest.mark.parametrize("host", ["localhost", "LocalHost", "127.0.0.1", "[::1]"])
def test_requests_for_this_machine_are_answered(server, host):
    for port in ("", ":80", f":{server.port}"):
        assert send(server, "GET", "/v1/models", headers={"host": host + port}).status == 200


def test_requests_without_a_host_are_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(
    "origin",
    [
        *(
            "http://evil.com",
            "https://evil.com:PORT",
            "null",
            "",
            "http://localhost:1",
            "http://localhost.evil.com:PORT",
        ),
        *("http://localhost:PORT.evil.com", "file://", "localhost:PORT", "http://a@localhost:PORT", "http://127.0.0.1"),
        *("http://[", "http://[::1", "//", "http://"),
    ],
)
def test_requests_from_other_sites_are_refused(server, origin):
    headers = {"host": f"localhost:{server.port}", "origin": origin.replace("PORT", str(server.port))}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("OPTIONS", "/v1/completions")):
        response = send(server, method, path, CHAT, headers)
        assert response.status == 403
        assert_openai_form(response)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]"])
def test_requests_from_the_page_itself_are_answered(server, name):
    headers = {"host": f"{name}:{server.port}", "origin": f"http://{name}:{server.port}"}
    assert send(server, "POST", "/v1/chat/completions", CHAT, headers).status == 200


def test_a_server_of_all_hosts_still_refuses_other_sites(locked):
    for host, origin, status in (
        ("box:80", None, 200),
        ("box:80", "http://box:80", 200),
        ("box", "https://box", 200),
        ("box:80", "http://evil.com", 403),
        ("box:80", "http://box", 403),
        ("box:80", "null", 403),
    ):
        headers = {"host": host} | ({"origin": origin} if origin is not None else {})
        assert send(locked, "GET", "/v1/models", headers=headers | WITH_KEY).status == status
    assert send(locked, "GET", "/v1/models", headers={"host": "box", "origin": "http://box"}).status == 401


def test_no_other_site_is_ever_let_in(server):
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    for origin in ("http://evil.com", f"http://127.0.0.1:{server.port}"):
        for method, path in (("OPTIONS", "/v1/chat/completions"), ("GET", "/"), ("GET", "/v1/models"), ("GET", "/x")):
            response = send(server, method, path, headers=asks | {"origin": origin})
            assert not any(name.startswith("access-control") for name in response.headers)
    for streams in (False, True):
        response = post(server, "chat/completions", CHAT | {"stream": streams})
        assert response.status == 200 and not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "text/json", "", "json"])
def test_a_body_of_another_type_is_refused(server, kind):
    """That is what a page of another site can send without asking first."""
    for path in ("chat/completions", "completions"):
        response = post(server, path, CHAT, **{"content-type": kind})
        assert response.status == 415
        assert_openai_form(response)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/json;"])
def test_a_json_body_may_be_called_so_in_other_ways(server, kind):
    assert post(server, "chat/completions", CHAT, **{"content-type": kind}).status == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(server, is_chunked):
    def ask(n_bytes: int) -> Response:
        body = json.dumps(CHAT).encode().ljust(n_bytes)
        parts = iter([body[: n_bytes // 2], body[n_bytes // 2 :]])
        return post(server, "chat/completions", body if not is_chunked else parts)

    assert ask(app.MAX_BODY_BYTES).status == 200
    response = ask(app.MAX_BODY_BYTES + 1)
    assert response.status == 413
    assert_openai_form(response)


def test_too_many_messages_are_refused(server):
    for n, status in ((1001, 413), (1000, 400)):
        response = post(server, "chat/completions", {"messages": n * CHAT["messages"]})
        assert response.status == status
        assert_openai_form(response)


def head(n_bytes: int) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {n_bytes}", "", ""]).encode()


@pytest.mark.parametrize("part", [b"", b'{"messages"'])
def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch, part):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head(100) + part)
        response = http.client.HTTPResponse(connection, method="POST")
        response.begin()
        assert response.status == 408 and "did not come within 0.2 s" in response.read().decode()


def test_a_client_that_goes_before_its_body_has_come_harms_no_one(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head(100) + b"{")
    assert post(server, "chat/completions", CHAT).status == 200


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def submitted(idle, monkeypatch) -> list[Request]:
    """What the idle engine was asked for."""
    requests, submit = [], idle.engine.submit
    monkeypatch.setattr(idle.engine, "submit", lambda new: (submit(new), requests.extend(new)))
    return requests


@contextlib.contextmanager
def asking(running: Running, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    """A request that is waiting, and its response, which has not begun; the client goes at the end."""
    content, n_before = json.dumps(body).encode(), running.engine.n_waiting
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
        connection.sendall(head(len(content)) + content)
        until(lambda: running.engine.n_waiting > n_before)
        yield http.client.HTTPResponse(connection, method="POST")


@pytest.mark.parametrize("streams", [False, True])
def test_when_too_many_wait_a_request_is_sent_away(idle, streams):
    with asking(idle, CHAT), asking(idle, CHAT | {"stream": True}):
        response = post(idle, "chat/completions", CHAT | {"stream": streams})
        assert response.status == 429 and int(response.headers["retry-after"]) > 0
        assert_openai_form(response)
        assert response.error["code"] == "overloaded"
        assert post(idle, "completions", {"prompt": "a"}).status == 429
        assert send(idle, "GET", "/v1/models").status == 200


def test_several_answers_are_taken_all_or_not_at_all(idle):
    with asking(idle, CHAT):
        assert post(idle, "chat/completions", CHAT | {"n": 2}).status == 429
        with asking(idle, CHAT):
            assert idle.engine.n_waiting == 2


def test_more_answers_than_there_is_ever_room_for_are_refused(idle):
    for path, body in (
        ("chat/completions", CHAT | {"n": 3}),
        ("completions", {"prompt": "a", "n": 3}),
        ("completions", {"prompt": ["a", "b"], "n": 2}),
        ("completions", {"prompt": ["a", "b", "c"]}),
        ("completions", {"prompt": [[1], [2], [3]]}),
    ):
        response = post(idle, path, body)
        assert response.status == 400 and "at most 2" in response.error["message"]
        assert_openai_form(response)
    assert idle.engine.n_waiting == 0


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_that_takes_too_long_is_given_up(idle, submitted, monkeypatch, streams):
    monkeypatch.setattr(app, "ANSWER_SECONDS", 0.2)
    response = post(idle, "chat/completions", CHAT | {"stream": streams})
    assert response.status == 408 and "within 0.2 s" in response.error["message"]
    assert_openai_form(response)
    until(lambda: submitted[0].is_cancelled)


def test_what_a_client_that_has_gone_wanted_is_given_up(idle, submitted):
    with asking(idle, CHAT | {"n": 2}):
        assert len(submitted) == 2 and not any(request.is_cancelled for request in submitted)
    until(lambda: all(request.is_cancelled for request in submitted))


def test_a_stream_that_is_given_up_says_so(idle, submitted, monkeypatch):
    """Its status has been sent, so the error is an event; and it is not "done"."""
    monkeypatch.setattr(app, "ANSWER_SECONDS", 0.5)
    with asking(idle, CHAT | {"stream": True}) as response:
        submitted[0].receive(News([5], None, None))
        response.begin()
        first, error, end = response.read().decode().split("\n\n")
    assert response.status == 200 and json.loads(first.removeprefix("data: "))["choices"] and end == ""
    assert "within 0.5 s" in json.loads(error.removeprefix("data: "))["error"]["message"]


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What the web server says of failures."""
    handler, records = logging.Handler(), []
    handler.emit = records.append
    logging.getLogger("uvicorn.error").addHandler(handler)
    yield records
    logging.getLogger("uvicorn.error").removeHandler(handler)


def test_a_client_that_goes_in_the_middle_of_a_stream_is_no_failure(idle, submitted, logged):
    with asking(idle, CHAT | {"stream": True}) as response:
        assert submitted[0].receive(News([5], None, None))
        response.begin()
        assert response.readline().startswith(b"data: ")
        response.close()
    until(lambda: submitted[0].is_cancelled)
    submitted[0].receive(News([], None, "cancelled"))
    assert send(idle, "GET", "/v1/models").status == 200 and not logged


@pytest.mark.parametrize("streams", [False, True])
def test_what_the_engine_gives_up_is_an_error(idle, submitted, streams):
    """As when the server is told to stop."""
    with asking(idle, CHAT | {"stream": streams}) as response:
        submitted[0].receive(News([], None, "cancelled"))
        response.begin()
        assert response.status == 503 and b"shutting down" in response.read()


UNKNOWN_PATHS = [
    *("/none", "/v1", "/v1/", "/v1/chat", "/v1/models/letters", "/page.html", "/serve.py", "/%00", "/%ff", "/v1/x?a=b"),
    *("/../serve.py", "/%2e%2e/serve.py", "/..%2fserve.py", "/v1/../../serve.py", "/%2e%2e/", "//etc/passwd", "/./"),
    *("/..\\serve.py", "/page.html/..", "/static/../page.html", "/health/../../etc/passwd", "/index.html"),
]


@pytest.mark.parametrize("path", UNKNOWN_PATHS)
def test_there_is_nothing_at_other_paths(server, path):
    for method in ("GET", "POST"):
        response = send(server, method, path)
        assert response.status == 404
        assert_openai_form(response)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", f"/v1/{path}") for path in ("chat/completions", "completions")),
        *(("POST", path) for path in ("/", "/health", "/metrics", "/v1/models")),
        *((method, "/v1/chat/completions") for method in ("PUT", "DELETE", "OPTIONS", "TRACE", "NONE")),
    ],
)
def test_other_methods_are_refused(server, method, path):
    response = send(server, method, path)
    assert response.status == 405 and response.headers["allow"]
    assert_openai_form(response)


def test_a_failure_tells_nothing_of_the_inside(server, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("tinysft_jax.serving.calls.Reader.read", fail)
    response = post(server, "chat/completions", CHAT)
    assert response.status == 500 and b"secret" not in response.body and b"Traceback" not in response.body
    assert_openai_form(response)
    assert response.error["type"] == "server_error"


def test_the_page_may_run_its_own_script_alone(server):
    response = send(server, "GET", "/")
    assert response.status == 200 and response.headers["content-type"].startswith("text/html")
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    scripts = re.findall(rb"<script>(.*?)</script>", response.body, re.DOTALL)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts]
    assert hashes and policy["script-src"].split() == hashes
    none = ("default-src", "base-uri", "form-action", "frame-ancestors")
    assert [policy[name] for name in none] == ["'none'"] * 4 and policy["connect-src"] == "'self'"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert send(server, "HEAD", "/").headers["content-security-policy"] == response.headers["content-security-policy"]


def test_the_metrics_count_responses_by_known_paths_alone(server):
    def counts() -> dict[str, float]:
        lines = send(server, "GET", "/metrics").body.decode().splitlines()
        return {name: float(number) for name, _, number in (line.rpartition(" ") for line in lines) if name[0] != "#"}

    before = counts()
    response = post(server, "completions", {"prompt": "abc", "max_tokens": 9, "seed": 1, "n": 2})
    for path in ("/none/1", "/none/2"):
        send(server, "GET", path)
    send(server, "GET", "/v1/models", headers={"host": "evil.com"})
    after = counts()
    new = {name: after[name] - before.get(name, 0) for name in after if "tinysft" in name and "created" not in name}
    assert new['tinysft_responses_total{path="/v1/completions",status="200"}'] == 1
    assert new['tinysft_responses_total{path="other",status="404"}'] == 2
    assert new['tinysft_responses_total{path="other",status="403"}'] == 1
    assert new["tinysft_prompt_tokens_total"] == 3 and new["tinysft_first_token_seconds_count"] == 2
    n_generated = json.loads(response.body)["usage"]["completion_tokens"]
    assert new["tinysft_generated_tokens_total"] == n_generated > 0
    assert not any("none" in name or "evil" in name for name in after)
    assert after["tinysft_slots"] == 4 and after["tinysft_slots_in_use"] == after["tinysft_queue"] == 0


def test_a_server_that_is_told_to_stop_takes_no_more_requests(idle):
    def is_closed() -> bool:
        try:
            idle.engine.submit([])
        except Closed:
            return True
        return False

    assert not is_closed()
    idle.server.should_exit = True
    until(is_closed)
