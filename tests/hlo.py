"""Counts the loops and collectives of a compiled program, from its HLO text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^  (?:ROOT )?%\S+ = (?P<shape>.+?) (?P<opcode>[a-z][\w-]*)\((?P<arguments>[^)]*)\)(?P<attributes>.*)"
)
_ARRAY = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|to_apply|branch_computations|true_computation|false_computation)=\{?((?:%[\w.-]+[, ]*)+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Operation(NamedTuple):
    """A loop or a collective of a program, as each device runs it.

    Attributes:
      kind: "while", or one of `COLLECTIVES`.
      n_bytes: of its result, once.
      trips: how often each loop around it runs, outermost first; None where that depends on data.
      name: where JAX made it, named scopes included.
    """

    kind: str
    n_bytes: int
    trips: tuple[int | None, ...]
    name: str


def operations(compiled: jax.stages.Compiled) -> list[Operation]:
    """All loops and collectives of a program, those in the bodies of loops once."""
    return list(_operations_of(compiled.as_text()))


def count(found: list[Operation], kind: str) -> int:
    """How often one run of the program does this; loops must have known numbers of trips."""
    return sum(math.prod(each.trips) for each in found if each.kind == kind)


def bytes_of(found: list[Operation], kind: str) -> int:
    """Bytes of the results of all collectives of this kind in one run of the program."""
    return sum(math.prod(each.trips) * each.n_bytes for each in found if each.kind == kind)


def _operations_of(text: str) -> Iterator[Operation]:
    computations: dict[str, list[re.Match]] = {}
    for line in text.splitlines():
        if heading := _COMPUTATION.match(line):
            body = computations[heading["name"]] = []
            if heading["entry"]:
                entry = heading["name"]
        elif instruction := _INSTRUCTION.match(line):
            body.append(instruction)

    def walk(computation: str, trips: tuple[int | None, ...]) -> Iterator[Operation]:
        for instruction in computations[computation]:
            kind, attributes = instruction["opcode"].removesuffix("-start"), instruction["attributes"]
            if kind in ("while", *COLLECTIVES):
                name = re.search(r'op_name="([^"]*)"', attributes)
                yield Operation(kind, _n_bytes(instruction["shape"]), trips, name[1] if name else "")
            inner = trips
            if kind == "while":
                known = _TRIPS.search(attributes)
                inner = (*trips, int(known[1]) if known else None)
            if kind in ("while", "call", "conditional"):
                for called in re.findall(r"%([\w.-]+)", " ".join(_CALLED.findall(attributes))):
                    yield from walk(called, inner)

    yield from walk(entry, ())


def _n_bytes(shape: str) -> int:
    """Of an array, or of all arrays of a tuple."""
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0]) if re.search(r"\d", kind) else 0
        total += bits * math.prod(int(size) for size in sizes.split(",") if size) // 8
    return total
