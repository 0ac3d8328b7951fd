"""Serves a model to many at once, as OpenAI's API does, with a page to talk to it."""

import ipaddress
import os
import re
import socket
from argparse import Namespace

from tinysft_jax import console
from tinysft_jax.console import UserError, explained, import_extra

KEY_VARIABLE = "TINYSFT_API_KEY"


def main() -> None:
    flags = _parse()
    for module in ("starlette", "uvicorn", "prometheus_client"):
        import_extra(module, "serve", "serve.py")
    from tinysft_jax import accelerator, distributed
    from tinysft_jax.checkpoints import open_model
    from tinysft_jax.serving.server import make_app, serve

    with explained(f"can't listen on {flags.host}, port {flags.port}", causes=(OSError, OverflowError)):
        family = socket.AF_INET6 if ":" in flags.host else socket.AF_INET
        listener = socket.create_server((flags.host, flags.port), family=family, backlog=1024)
    distributed.check_devices()
    accelerator.keep_compiled()
    model, name = open_model(flags.checkpoint), os.path.basename(os.path.abspath(flags.checkpoint))
    name = name.encode(errors="replace").decode()  # a directory's need not be Unicode
    access = {"api_key": flags.api_key, "loopback_only": _is_loopback(flags.host)}
    app, engine = make_app(model, name, flags.slots, flags.queue, flags.max_length, **access)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    size = f"a cache of {engine.cache_bytes / 1e9:,.2f} GB (by --slots and --max_length)"
    print(f"compiling {name}, with {size}; the page is at {address}", flush=True)
    serve(app, engine, listener, f"ready: {address}/v1 answers {flags.slots} requests at a time; Ctrl-C stops")


def _parse(arguments: list[str] | None = None) -> Namespace:
    parser = console.Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        help="a work directory, model directory, .pt or .gguf file or Hugging Face folder",
    )
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine's")
    add("--port", type=int, default=8000, help="0: any free one")
    add("--slots", type=int, default=16, help="requests that are answered at a time; memory grows with it")
    add("--queue", type=int, default=64, help="requests that wait for a slot, at most")
    add("--max_length", type=int, help="tokens of question and answer, at most (default: the model's trained length)")
    add(
        "--api_key",
        metavar="KEY",
        help=f"needed in requests; ${KEY_VARIABLE} hides it from other users of this machine",
    )
    add("--no_auth", action="store_true", help="with another host, answer everyone without a key")
    flags = parser.parse_args(arguments)
    for name, least in (("slots", 1), ("queue", 0)):
        if (value := getattr(flags, name)) < least:
            raise UserError(f"--{name} is {value}; it must be {least} or more")
    if flags.api_key is None:
        flags.api_key = os.environ.get(KEY_VARIABLE)
    if flags.api_key is not None and flags.no_auth:
        raise UserError(f"--no_auth and a key ({KEY_VARIABLE}) exclude each other")
    if flags.api_key is not None and not re.fullmatch("[!-~]+", flags.api_key):
        raise UserError("the key must be one or more ASCII characters without spaces")
    if not (_is_loopback(flags.host) or flags.api_key or flags.no_auth):
        raise UserError(
            f"--host {flags.host} lets other machines in: give a key in {KEY_VARIABLE} or --api_key, or say --no_auth"
        )
    return flags


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    console.run(main)
