"""The form of JSON: which keys an object has, and of what kind their values are."""

from collections.abc import Callable
from typing import Any

from tinysft_jax.errors import UserError, shown

# What a value must be, in words, and whether it is that.
Kind = tuple[str, Callable[[Any], bool]]
# Objects hold at least these keys; there may be others.
Schema = dict[str, "Kind | Schema"]

TEXT: Kind = ("text", lambda value: isinstance(value, str))
TEXT_OR_NULL: Kind = ("text or null", lambda value: isinstance(value, str | None))
NUMBER: Kind = ("a whole number", lambda value: type(value) is int)
REAL_OR_NULL: Kind = ("a number or null", lambda value: type(value) in (int, float, type(None)))
COUNT: Kind = ("a whole number from 0 to 2^63 - 1", lambda value: type(value) is int and 0 <= value < 2**63)
SIZE: Kind = ("a whole number from 0 to 2^31 - 1", lambda value: type(value) is int and 0 <= value < 2**31)


def check(value: Any, wanted: Schema | Kind, name: str = "") -> None:
    """Compares a value with the form that it must have.

    Args:
      value: JSON.
      wanted: its form.
      name: where the value stands, as keys with dots between; empty for the whole.

    Raises:
      UserError: naming a key that is missing or whose value is of another kind.
    """
    if isinstance(wanted, tuple):
        kind, is_kind = wanted
        if not is_kind(value):
            raise UserError(f"{name} is {shown(value)}; it must be {kind}")
        return
    if not isinstance(value, dict):
        raise UserError(f"{name or 'it'} is {shown(value)}; it must be an object")
    for key, inner in wanted.items():
        path = f"{name}.{key}" if name else key
        if key not in value:
            raise UserError(f"it lacks {path!r}")
        check(value[key], inner, path)
