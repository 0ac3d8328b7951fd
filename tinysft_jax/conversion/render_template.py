"""Renders a chat template, in a process of its own: it is a program that somebody else wrote.

Reads the arguments of `render` from stdin as JSON, and writes its result, or `{"error": ...}`. Jinja's sandbox keeps
the template from everything but what transformers gives it; limits of the process keep it from all memory and time.
"""

import contextlib
import datetime
import functools
import json
import re
import resource
import sys

SECONDS, MEMORY = 10, 2 << 30
LONGEST = 1 << 14  # characters of a rendered conversation


def _raise(message: object) -> None:
    raise ValueError(message)


def render(template: str, variables: dict, renders: list[dict], now: str) -> list[dict[str, str]]:
    """The rendered conversations: of each `{"text": ...}` or `{"error": ...}`.

    `renders` are the variables of each: messages, add_generation_prompt, …; `now` is the time that it shows.
    """
    from jinja2.ext import loopcontrols  # an extra
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    sandbox.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    strftime = datetime.datetime.fromisoformat(now).strftime
    sandbox.globals |= {"raise_exception": _raise, "strftime_now": strftime}
    # transformers' mark of what is supervised becomes a comment, which keeps how it strips white space.
    template = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", template)
    compiled, results = sandbox.from_string(template), []
    for each in renders:
        try:
            text = compiled.render(**variables, **each)
            text.encode()
            results.append({"text": text} if len(text) <= LONGEST else {"error": "it is too long"})
        except Exception as error:  # a template can raise anything
            results.append({"error": f"{type(error).__name__}: {error}"[:300]})
    return results


def main() -> None:
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS)):
        with contextlib.suppress(ValueError, OSError):  # macOS limits no memory
            resource.setrlimit(kind, (limit, limit))
    try:
        result: object = render(**json.load(sys.stdin))
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"[:300]}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
