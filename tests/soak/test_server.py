"""A server for a long time, with clients that go away, and with bad requests in between: nothing is left of them."""

import contextlib
import gc
import http.client
import json
import os
import random
import threading
import time

import pytest
from serving_model import Running, post, run_server

pytestmark = pytest.mark.soak
N_REQUESTS, N_CLIENTS = 2_000, 16
PATHS = ("chat/completions", "completions")
BAD = [b"", b"{", b"[]", b"null", b"\xff", json.dumps({"prompt": 3}).encode(), json.dumps({"messages": []}).encode()]


def resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def body(draws: random.Random) -> tuple[str, bytes]:
    """A path and a body for it: one in five is bad."""
    is_chat = draws.random() < 0.5
    if draws.random() < 0.2:
        return PATHS[1 - is_chat], draws.choice(BAD)
    text = "".join(draws.choices("abc de", k=draws.randint(1, 80))) + "a"
    fields = {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}
    fields |= {"stream": draws.random() < 0.7, "n": draws.randint(1, 3), "max_tokens": draws.randint(1, 150)}
    fields |= {"temperature": draws.choice([0, 1]), "stop": draws.choice([None, "ab", ["a", "xyz"]])}
    if draws.random() < 0.3:
        fields |= {"logprobs": True, "top_logprobs": 3} if is_chat else {"logprobs": 2, "echo": True}
    return PATHS[1 - is_chat], json.dumps(fields).encode()


def ask(server: Running, draws: random.Random, statuses: set[int]) -> None:
    """Sends a request, and reads all of the response, a part or nothing."""
    path, content = body(draws)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    patience = draws.choice(["nothing", "some", "all", "all"])
    with contextlib.closing(connection):
        connection.request("POST", f"/v1/{path}", content, {"Content-Type": "application/json"})
        if patience == "nothing":
            time.sleep(draws.random() * 0.05)
            return
        response = connection.getresponse()
        statuses.add(response.status)
        response.read(draws.randint(1, 300) if patience == "some" else None)


def load(server: Running, n: int, seed: int) -> set[int]:
    """The statuses of `n` requests, of several clients at once."""
    statuses: set[int] = set()

    def client(number: int) -> None:
        draws = random.Random(f"{seed}/{number}")
        for _ in range(n // N_CLIENTS):
            ask(server, draws, statuses)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(N_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def settle(server: Running) -> tuple[int, int]:
    """Waits until nothing is going on; the numbers of open files and of tasks."""
    deadline = time.monotonic() + 30
    while server.engine.n_active or server.engine.n_waiting or server.server.server_state.connections:
        assert time.monotonic() < deadline, "a slot or a connection is still in use"
        time.sleep(0.05)
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(server.server.server_state.tasks)


def test_nothing_is_left_of_two_thousand_requests(figures):
    question = {"prompt": "tell me", "max_tokens": 50, "temperature": 0}
    with run_server(n_slots=4, queue=60) as server:
        answer = json.loads(post(server, "completions", question).body)["choices"]
        load(server, N_REQUESTS // 4, seed=0)
        files, tasks = settle(server)
        before = resident_mb()
        statuses = load(server, N_REQUESTS, seed=1)
        assert settle(server) == (files, tasks) and tasks == 0
        grown = resident_mb() - before
        assert json.loads(post(server, "completions", question).body)["choices"] == answer
        assert server.engine._n_unfinished == 0
    figures(requests=N_REQUESTS, statuses=sorted(statuses), open_files=files, grown_mb=round(grown, 1))
    assert statuses <= {200, 400, 429} and {200, 400} <= statuses
    assert grown < 30
