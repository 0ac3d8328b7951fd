"""What `/metrics` tells, in Prometheus' text form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from tinysft_jax.sampling.engine import Engine
from tinysft_jax.serving.choices import Piece

RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)


class Metrics:
    def __init__(self, engine: Engine, n_slots: int):
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        for name, text, function in (
            ("slots", "Requests that can be answered at a time.", lambda: n_slots),
            ("slots_in_use", "Requests that are being answered.", lambda: engine.n_active),
            ("queue", "Requests that wait for a slot.", lambda: engine.n_waiting),
        ):
            Gauge(f"tinysft_{name}", text, registry=registry).set_function(function)
        self.responses = Counter("tinysft_responses", "Responses.", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("tinysft_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._generated = Counter("tinysft_generated_tokens", "Tokens of answers.", registry=registry)
        self._first = Histogram("tinysft_first_token_seconds", "From request to first token.", registry=registry)
        self._rate = Histogram("tinysft_tokens_per_second", "Of an answer.", buckets=RATES, registry=registry)

    def ended(self, piece: Piece, seconds: float) -> None:
        """Notes the last piece of an answer, whose request came `seconds` ago; its rate is after the first token."""
        self._generated.inc(piece.n_generated)
        self._first.observe(piece.seconds)
        if piece.n_generated > 1:
            self._rate.observe((piece.n_generated - 1) / max(seconds - piece.seconds, 1e-9))

    def text(self) -> bytes:
        return generate_latest(self._registry)
