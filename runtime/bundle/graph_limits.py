"""What a graph computes is bounded before anything native sees it.

ONNX Runtime believes constants: a TopK with a negative K ends the process (a failed assertion of
1.31's shape inference, seen in a Slice behind it), what it divides by is for it to check, and
nothing stops a graph of a few bytes from asking for all memory or for a day. So each operator of
our own list has a rule, in `vzip.runtime.bundle.graph_rules`. It refuses attributes and constants
out of range, and says which shape and type comes out; sizes, and with them memory and work, are
bounded here for the whole graph.

Extents are numbers throughout: those that a caller chooses, such as the batch, are tried at the
values that bound them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from vzip.runtime.bundle.graph_call import Call, UnfitError, Value
from vzip.runtime.bundle.graph_check import MalformedError, shown
from vzip.runtime.bundle.graph_parts import ELEMENT_BYTES, Node, Parts, Read
from vzip.runtime.bundle.graph_rules import RULES
from vzip.runtime.errors import BundleError

_A_PROMPT_S_TOKENS = 256
# New tokens, and those before. What grows with the cube of a prompt shows in the last.
_PROMPTS: Final = ((2, 0), (1, 255), (256, 256), (4096, 0))
_THE_END = 2**31 - 1  # a number behind every node's


@dataclass(frozen=True)
class GraphLimits:
    """What a graph may take at the most.

    Attributes:
        value: Elements of one value.
        values: Elements of all values together.
        alive: Elements of the values that are needed at the same time, in the file's order.
        products: Multiplications of matrix products and convolutions.
    """

    value: int
    values: int
    alive: int
    products: int

    def times(self, count: int) -> GraphLimits:
        """Return the limits of a graph that takes several pictures."""
        return GraphLimits(*(count * each for each in (self.value, self.values, self.alive,
                                                  self.products)))  # fmt: skip


A_PICTURE: Final = GraphLimits(value=2**27, values=2**34, alive=2**29, products=2**43)
"""Of each picture of a call. LLaVA-1.5's tower, CLIP ViT-L/14 at 336 pixels, has 2**23, 2**30,
2**24 and 2**38; SigLIP so400m at 384 has about twice as much."""

A_PROMPT: Final = GraphLimits(value=2**28, values=2**36, alive=2**31, products=2**46)
"""Of a decoder that is given 256 tokens after 256 others, and so for each 256; one of 70 billion
weights has about 2**34 elements in all and 2**44 products."""


def check_encoder(model: bytes, read: Read, *, file: str, batch: int) -> None:
    """Refuse a graph of pictures with an operator that can't be run, or that takes too much.

    Args:
        model: A serialised ModelProto.
        read: Gives bytes of the file of weights.
        file: Where it comes from, for messages.
        batch: The most pictures of a call.

    Raises:
        BundleError: There is such an operator, it takes more than `A_PICTURE`, or it is malformed
            otherwise.
    """
    with _naming_node(file) as place:
        parts = Parts(model)
        names = {extent for each in parts.inputs for extent in each.shape if type(extent) is str}
        sizes = sorted({1, batch}) if names else [batch]
        uses = _last_uses(parts)
        for size in sizes:
            choice = dict.fromkeys(names, size)
            _Walk(parts, read, choice, A_PICTURE.times(size), uses=uses, place=place).run()


def check_decoder(model: bytes, read: Read, *, file: str) -> None:
    """Refuse the graph of a language model as `check_encoder` does that of pictures.

    Its inputs have two extents that a caller chooses, in this order: new tokens, and those before.

    Args:
        model: A serialised ModelProto.
        read: Gives bytes of the file of weights.
        file: Where it comes from, for messages.

    Raises:
        BundleError: As for `check_encoder`, with `A_PROMPT`.
    """
    with _naming_node(file) as place:
        parts = Parts(model)
        extents = [extent for each in parts.inputs for extent in each.shape]
        names = list(dict.fromkeys(each for each in extents if isinstance(each, str)))
        if len(names) > len(_PROMPTS[0]):
            raise UnfitError(f"takes the extents {shown(names)}", "two that a caller chooses")
        uses = _last_uses(parts)
        for prompt in _PROMPTS:
            choice = dict(zip(names, prompt, strict=False))
            limits = A_PROMPT.times(max(1, prompt[0] // _A_PROMPT_S_TOKENS))
            _Walk(parts, read, choice, limits, uses=uses, place=place).run()


@contextmanager
def _naming_node(file: str) -> Iterator[list[str]]:
    """Turn what is wrong into the one error, which names the node that is being looked at."""
    place: list[str] = []
    try:
        yield place
    except UnfitError as error:
        got, expected = f"{file}: {''.join(place)}{error.got}", error.expected
        cause = "it was edited, or made by another tool or version"
        raise BundleError(got, expected=expected, cause=cause,
                          cure="export the bundle again") from None  # fmt: skip
    except MalformedError as error:
        raise BundleError(
            f"{file} is malformed: {error.got}",
            expected=error.expected,
            cause="the file is truncated, or was edited or made by another tool",
            cure="export the bundle again",
        ) from None


def _last_uses(parts: Parts) -> dict[str, int]:
    """Return the number of the last node that takes a value; outputs are taken at the end."""
    uses: dict[str, int] = {}
    for number, node in enumerate(parts.nodes()):
        operator = RULES.get(node.operator)
        if operator is None:
            raise UnfitError(f"holds the operator {shown(node.operator)}", "one of docs/bundle.md")
        for name in node.inputs:
            uses[name] = number
    uses.update(dict.fromkeys(parts.outputs, _THE_END))
    return uses


class _Walk:
    """One pass through the nodes."""

    def __init__(
        self,
        parts: Parts,
        read: Read,
        choice: Mapping[str, int],
        limits: GraphLimits,
        *,
        uses: Mapping[str, int],
        place: list[str],
    ) -> None:
        self.parts, self.limits, self.uses, self.place = parts, limits, uses, place
        self.empty = 0 in choice.values()
        self.values: dict[str, Value] = {}
        self.made: set[str] = set()
        self.total = self.alive = self.products = 0
        for constant in parts.constants.values():
            self._add(constant.name, Value.of(constant, read), held=True)
        for each in parts.inputs:
            if unknown := [n for n in each.shape if isinstance(n, str) and n not in choice]:
                raise UnfitError(f"has an input of the extent {shown(unknown[0])}", "known ones")
            shape = tuple(choice[n] if isinstance(n, str) else n for n in each.shape)
            self._add(each.name, Value(each.dtype, shape))

    def run(self) -> None:
        """Look at every node."""
        for number, node in enumerate(self.parts.nodes()):
            self.place[:] = [f"{shown(node.operator)}, node {number}, "]
            self._node(number, node)
        self.place.clear()
        for name in self.parts.outputs:
            if name not in self.values:
                raise UnfitError(f"has no value {shown(name)}, its output", "one")

    def _node(self, number: int, node: Node) -> None:
        operator = RULES[node.operator]
        least, most = operator.inputs
        if not least <= len(node.inputs) <= most:
            raise UnfitError(f"has {len(node.inputs)} inputs", f"{least} to {most}")
        for name, value in node.attributes.items():
            kind = operator.attributes.get(name)
            if not isinstance(value, kind or ()):
                raise UnfitError(f"has the attribute {shown(name)} {shown(value)}",
                                 kind.__name__ if kind else "no such one")  # fmt: skip
        call = Call(node, [self._taken(name) for name in node.inputs])
        made = operator.rule(call)
        if not 1 <= len(node.outputs) <= len(made) or not node.outputs[0]:
            raise UnfitError(f"has {len(node.outputs)} outputs", f"1 to {len(made)}")
        self.products += call.products
        if self.products > self.limits.products:
            raise UnfitError(f"makes {self.products} products", f"at most {self.limits.products}")
        self._count(call.scratch)
        self.alive -= call.scratch
        for name, value in zip(node.outputs, made, strict=False):
            if name:
                self._add(name, value)
                if name not in self.uses:
                    self._drop(name)
        for name in {*node.inputs}:
            if name and self.uses[name] == number:
                self._drop(name)

    def _taken(self, name: str) -> Value | None:
        if not name:
            return None
        if (found := self.values.get(name)) is None:
            raise UnfitError(f"takes {shown(name)}", "a value that is there by then")
        return found

    def _add(self, name: str, value: Value, *, held: bool = False) -> None:
        if not name or name in self.made:
            raise UnfitError(f"gives {shown(name)} again", "each value once")
        self.made.add(name)
        self.values[name] = value
        if value.dtype not in ELEMENT_BYTES:
            raise UnfitError(f"gives the data type {value.dtype}", "a number's")
        if held:
            return
        if value.count == 0 and not self.empty:
            raise UnfitError(f"gives {list(value.shape)}", "no extent of 0")
        self._count(value.count)

    def _count(self, count: int) -> None:
        """Count the elements of something that is made."""
        self.total += count
        self.alive += count
        for got, most, what in (
            (count, self.limits.value, "elements in one value"),
            (self.total, self.limits.values, "elements in all values"),
            (self.alive, self.limits.alive, "elements in values of one moment"),
        ):
            if got > most:
                raise UnfitError(f"makes {got} {what}", f"at most {most}")

    def _drop(self, name: str) -> None:
        found = self.values.pop(name, None)
        if found is not None and not found.constant:
            self.alive -= found.count
