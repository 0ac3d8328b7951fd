"""Counts what a compiled program does, from its HLO text: matrix products, memory traffic, communication.

XLA's own cost analysis counts a loop's body once; here it counts as often as the loop turns.

Conventions, all for one device:

- `flops`: 2 · M · N · K of each matrix product. Nothing else is counted: the rest of a transformer is under 1 % of it.
- `bytes`: operands and results of each instruction, where a fusion is one instruction: what would go through memory
  if no result stayed in a cache. A slice (also as the first step of a fusion) reads only what it takes; an update in
  place reads and writes only the part that changes.
- each kind of collective, by its name: bytes that a device sends in a ring, where n devices hold the operands S:
  all-reduce 2 (n-1)/n · S; all-gather (n-1) · S; reduce-scatter and all-to-all (n-1)/n · S; collective-permute S.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping

COLLECTIVES = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}

# Names for what lies elsewhere, or instructions whose work is counted inside the computations they call.
NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
CALLS = {"while", "conditional", "call"}
RELABELS = {"bitcast", "convert", "copy", "reshape", "transpose"}  # what may stand between a fusion's edge and a slice
UNCOUNTED = {"convolution", "ragged-dot"}  # products that this project's programs have no use for
SLICES = {"slice", "dynamic-slice", "gather"}

HEADING = re.compile(r"^(?:ENTRY )?%(?P<name>\S+) \(.*\{$")
INSTRUCTION = re.compile(
    r"^  (?P<root>ROOT )?%(?P<name>\S+) = (?P<shape>.+?) (?P<opcode>[a-z][\w-]*)"
    r"\((?P<arguments>[^)]*)\)(?P<attributes>.*)"
)
ARRAY = re.compile(r"([a-z]+\d*)[a-z0-9]*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: str
    arguments: str  # what stands in the parentheses: the operands, a parameter's number, a constant's value
    attributes: str
    root: str | None  # "ROOT " if it is its computation's result

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names."""
        found = re.findall(rf"(?:{attribute})=\{{?((?:%[\w.-]+(?:, )?)+)", self.attributes)
        return re.findall(r"%([\w.-]+)", " ".join(found))

    def numbers(self, attribute: str) -> list[int]:
        found = re.search(rf"{attribute}=\{{([\d,]*)\}}", self.attributes)
        return [int(number) for number in found[1].split(",") if number] if found else []


def count(text: str, turns: Mapping[str, float] | None = None) -> Counter[str]:
    """What one run of a program does on each device.

    Args:
      text: the HLO module, as `compiled.as_text()` gives it.
      turns: of loops whose number of turns depends on data, by the `jax.named_scope` they stand in.

    Returns:
      flops, bytes, and the bytes sent by each kind of collective that occurs; see the module's conventions.

    Raises:
      ValueError: if a loop's turns are unknown and not given, or a matrix product is of a kind that can't be counted.
    """
    return _Program(text, turns or {}).total


class _Program:
    def __init__(self, text: str, turns: Mapping[str, float]):
        self.turns = turns
        self.computations: dict[str, dict[str, Instruction]] = {}
        for line in text.splitlines():
            if heading := HEADING.match(line):
                body = self.computations[heading["name"]] = {}
                if line.startswith("ENTRY"):
                    self.entry = heading["name"]
            elif found := INSTRUCTION.match(line):
                body[found["name"]] = Instruction(**found.groupdict())
        devices = re.search(r"num_partitions=(\d+)", text) or re.search(r"replica_count=(\d+)", text)
        self.devices = int(devices[1]) if devices else 1

    @property
    def total(self) -> Counter[str]:
        return self.cost(self.entry)

    @functools.cache  # noqa: B019 - lives as long as the count
    def cost(self, computation: str, in_fusion: bool = False) -> Counter[str]:
        total: Counter[str] = Counter()
        for instruction in self.computations[computation].values():
            self.add(total, computation, instruction, in_fusion)
        return total

    def add(self, total: Counter[str], computation: str, instruction: Instruction, in_fusion: bool) -> None:
        """Adds an instruction, and the computations that it runs."""
        opcode = instruction.opcode
        kind = opcode.removesuffix("-start")
        if opcode == "while":
            self.add_times(total, *instruction.called("body"), self.loop_turns(instruction))
        elif opcode == "conditional":
            branches = instruction.called("branch_computations|true_computation|false_computation")
            for branch in branches:  # each as likely
                self.add_times(total, branch, 1 / len(branches))
        elif opcode == "call":
            self.add_times(total, *instruction.called("to_apply"), 1)
        elif opcode == "fusion":
            self.add_times(total, *instruction.called("calls"), 1, in_fusion=True)
        elif opcode == "dot":
            total["flops"] += self.dot_flops(computation, instruction)
        elif opcode in UNCOUNTED or re.search(r'custom_call_target="\S*(dot|gemm|matmul)', instruction.attributes):
            raise ValueError(f"can't count the matrix product {instruction.name} ({opcode})")
        elif kind in COLLECTIVES:
            factor = COLLECTIVES[kind](self.group_size(instruction))
            total[kind] += factor * sum(self.operand_bytes(computation, instruction))
        if not in_fusion and opcode not in NO_TRAFFIC | CALLS and not opcode.endswith("-done"):
            total["bytes"] += self.traffic(computation, instruction)

    def add_times(self, total: Counter[str], computation: str, times: float, in_fusion: bool = False) -> None:
        for key, value in self.cost(computation, in_fusion).items():
            total[key] += times * value

    def loop_turns(self, loop: Instruction) -> float:
        """As XLA found out; else what the counter of a `scan` is compared with; else as the caller says."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        condition = self.computations[loop.called("condition")[0]]
        (root,) = (instruction for instruction in condition.values() if instruction.root)
        limit = condition[root.operands[-1]]
        while limit.opcode in RELABELS:
            limit = condition[limit.operands[0]]
        if root.opcode == "compare" and "direction=LT" in root.attributes and limit.opcode == "constant":
            return int(limit.arguments)
        place = re.search(r'op_name="([^"]*)"', loop.attributes)
        scopes = [scope for scope in self.turns if place and scope in re.split(r"[/()]", place[1])]
        if not scopes:
            raise ValueError(f"how often the loop {loop.name} turns depends on data: say how often")
        return self.turns[scopes[0]]

    def dot_flops(self, computation: str, dot: Instruction) -> float:
        left = _dimensions(self.computations[computation][dot.operands[0]].shape)
        contracted = math.prod(left[axis] for axis in dot.numbers("lhs_contracting_dims"))
        return 2 * math.prod(_dimensions(dot.shape)) * contracted

    def group_size(self, collective: Instruction) -> int:
        """Devices that take part in one exchange."""
        attributes = collective.attributes
        if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
            return int(groups[1])
        if groups := re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
            axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[2])  # an axis, or a part of one: 'a':(1)2
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        groups = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
        return len(groups[1].split(",")) if groups else self.devices

    def operand_bytes(self, computation: str, instruction: Instruction) -> list[float]:
        return [_size(self.computations[computation][name].shape) for name in instruction.operands]

    def traffic(self, computation: str, instruction: Instruction) -> float:
        """Bytes read and written."""
        if instruction.opcode in SLICES:
            return 2 * _size(instruction.shape)
        operands = self.operand_bytes(computation, instruction)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * operands[1]
        if instruction.opcode == "scatter":  # reads the updates, reads and writes their places
            return 3 * operands[-1]
        if instruction.opcode != "fusion":
            return sum(operands) + _size(instruction.shape)
        (fused,) = instruction.called("calls")
        return sum(self.fusion_reads(fused)) + self.fusion_writes(fused)

    def fusion_reads(self, fused: str):
        body = self.computations[fused]
        users: dict[str, list[Instruction]] = {name: [] for name in body}
        for instruction in body.values():
            for operand in instruction.operands:
                users[operand].append(instruction)

        def read(value: Instruction) -> float:
            total = 0.0
            for user in users[value.name]:
                if user.opcode in SLICES and user.operands[0] == value.name:
                    total += _size(user.shape)
                elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == value.name:
                    total += _size(body[user.operands[-1]].shape) if user.opcode == "scatter" else 0
                elif user.opcode in RELABELS and not user.root:
                    total += read(user)
                else:
                    return _size(value.shape)
            return min(total, _size(value.shape))

        return [read(instruction) for instruction in body.values() if instruction.opcode == "parameter"]

    def fusion_writes(self, fused: str) -> float:
        body = self.computations[fused]

        def written(value: Instruction) -> float:
            if value.opcode == "tuple":
                return sum(written(body[name]) for name in value.operands)
            source = value
            while source.opcode in RELABELS:
                source = body[source.operands[0]]
            if source.opcode == "dynamic-update-slice":
                return _size(body[source.operands[1]].shape)
            if source.opcode == "scatter":
                return _size(body[source.operands[-1]].shape)
            return _size(value.shape)

        return sum(written(instruction) for instruction in body.values() if instruction.root)


def _dimensions(shape: str) -> list[int]:
    return [int(size) for size in ARRAY.search(shape)[2].split(",") if size]


def _size(shape: str) -> float:
    """Bytes of an array, or of all arrays of a tuple."""
    return sum(_bytes(kind) * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in ARRAY.findall(shape))


def _bytes(kind: str) -> float:
    if kind == "pred":
        return 1
    bits = re.search(r"\d+", kind)
    return int(bits[0]) / 8 if bits else 0  # a token is nothing
