"""Clients of `benchmarks/serving.py`, in a process of their own: a thread and a connection each.

Reads `{"port", "clients", "stream", "requests": [body, …]}` from standard input; writes, for each request, its seconds
to the first text and to the end, its tokens, and the seconds of each piece of text.
"""

import http.client
import json
import queue
import sys
import threading
import time


def main() -> None:
    task = json.load(sys.stdin)
    waiting, results = queue.SimpleQueue(), [None] * len(task["requests"])
    for number, body in enumerate(task["requests"]):
        waiting.put((number, json.dumps(body | {"stream": task["stream"]})))

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", task["port"], timeout=600)
        while True:
            try:
                number, body = waiting.get_nowait()
            except queue.Empty:
                return
            results[number] = ask(connection, body, task["stream"])

    start = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(task["clients"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump({"seconds": time.perf_counter() - start, "results": results}, sys.stdout)


def ask(connection: http.client.HTTPConnection, body: str, streams: bool) -> dict:
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(response.read().decode())
    if not streams:
        answer = json.loads(response.read())
        return {"seconds": time.perf_counter() - start, "tokens": answer["usage"]["completion_tokens"]}
    times, n_tokens = [], 0
    while line := response.readline():
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if event["choices"]:
                times.append(time.perf_counter())
            else:
                n_tokens = event["usage"]["completion_tokens"]
    return {"seconds": times[-1] - start, "first": times[0] - start, "tokens": n_tokens, "times": times}


if __name__ == "__main__":
    main()
