"""What each linear layer costs when it alone is quantised, and which are to stay as they are.

The graph runs in pieces, so a layer is judged from the stored input of its own piece on: what lies
before it is never computed again, and only one piece is opened in another form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vzip.calibration.quantization.pieces import Chain, LinearGroup, PieceSession
from vzip.calibration.quantization.qdq import Setting, quantised
from vzip.calibration.quantization.recipe import QuantPrecision, Recipe
from vzip.runtime.agreement import Agreement, Gate, Limits, compare
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, Manifest
from vzip.runtime.console import progress

Array = NDArray[Any]


@dataclass(frozen=True)
class Effect:
    """Of one linear layer, when it alone is quantised.

    Attributes:
        kept_overlap: Mean share of the kept tokens that stay.
        cosine: Mean cosine of the tokens that can be compared.
        lost: What the median of them lacks to 1: some tokens are a hair away from becoming sinks,
            and lose much to anything.
        score_error: Root mean square change of a patch's score, relative to the deviation of the
            scores: it tells layers apart where hardly a token changes places. 0 where the selection
            has no scores.
    """

    kept_overlap: float
    cosine: float
    lost: float
    score_error: float

    def to_json(self) -> dict[str, float]:
        """Return the fields as values that `json` writes."""
        return asdict(self)


def scores_name(model: ir.Model) -> str | None:
    """Return the value that the kept tokens are chosen by, float32 [B, N]; None for none."""
    ranked = next((node.inputs[0] for node in model.graph if node.op_type == "TopK"), None)
    return None if ranked is None or ranked.producer() is None else ranked.name


class Judge:
    """Runs parts of a graph quantised on some images, and compares with the graph as it was.

    Args:
        chain: Of the bundle's graph, with the scores among what it observes.
        stored: For each batch what lies between the pieces: `stored[b][p]` is what piece p and
            those behind it read.
        counts: Images of each batch that count; the others fill it up.
        scores: From `scores_name`.
        manifest: Of the bundle.
    """

    def __init__(
        self,
        chain: Chain,
        stored: Sequence[Sequence[Mapping[str, Array]]],
        counts: Sequence[int],
        scores: str | None,
        manifest: Manifest,
    ) -> None:
        self._chain, self._stored, self._counts = chain, stored, counts
        self._scores, self._manifest = scores, manifest
        self._wanted = [EMBEDS, KEPT, *([scores] if scores else [])]
        self._expected = self._run(len(chain) - 1, {})

    def compare(self, start: int, sessions: Mapping[int, PieceSession]) -> tuple[Agreement, float]:
        """Run with some pieces in another form.

        Args:
            start: The first of these.
            sessions: Number of a piece → its other form.

        Returns:
            The agreement, and `Effect.score_error`.
        """
        got = self._run(start, sessions)
        error = 0.0
        if self._scores is not None:
            old, new = (np.concatenate([b[self._scores] for b in x]) for x in (self._expected, got))
            error = float(np.sqrt(np.mean((new - old) ** 2)) / max(float(old.std()), 1e-30))
        return compare(self._expected, got, self._manifest), error

    def _run(self, start: int, sessions: Mapping[int, PieceSession]) -> list[dict[str, Array]]:
        return [
            {
                name: value[:count]
                for name, value in self._run_batch(pieces[start], start, sessions).items()
            }
            for pieces, count in zip(self._stored, self._counts, strict=True)
        ]

    def _run_batch(
        self, inputs: Mapping[str, Array], start: int, sessions: Mapping[int, PieceSession]
    ) -> dict[str, Array]:
        values = dict(inputs)
        for place in range(start, len(self._chain)):
            session = sessions.get(place) or self._chain.session(place)
            needed = self._chain.outputs[place]
            extra = [x for x in self._wanted if x in session.names and x not in needed]
            made = session.run(values, [*needed, *extra])
            values = {**self._chain.live(values, place + 1), **made}
        return {name: values[name] for name in self._wanted}


class Layers:
    """The pieces of a graph with any of their linear layers quantised.

    Args:
        chain: Of the bundle's graph.
        settings: Name of every linear layer → how it is quantised.
        precision: Of the quantised ones.
        opset: Of the quantised graph.
        scores: From `scores_name`.
    """

    def __init__(
        self,
        chain: Chain,
        settings: Mapping[str, Setting],
        precision: QuantPrecision,
        opset: int,
        scores: str | None,
    ) -> None:
        self._chain, self._settings = chain, settings
        self._precision, self._opset, self._scores = precision, opset, scores
        self._opened: dict[int, tuple[frozenset[str], PieceSession]] = {}

    def one(self, place: int, names: frozenset[str]) -> PieceSession:
        """Open piece `place` with these of its linear layers quantised."""
        piece = self._chain.pieces[place]
        chosen = {name: self._settings[name] for name in names}
        extra = [name for name in self._chain.made(place) if name == self._scores]
        return PieceSession(quantised(piece, chosen, self._precision, self._opset), extra)

    def all(self, linears: Sequence[LinearGroup], high: frozenset[str]) -> dict[int, PieceSession]:
        """Open every piece with all linear layers quantised but those in `high`.

        Pieces that are as they were at the last call are not opened again.
        """
        wanted: dict[int, set[str]] = {}
        for linear in linears:
            if linear.name not in high:
                wanted.setdefault(self._chain.place(linear), set()).add(linear.name)
        kept = {
            place: opened
            for place, opened in self._opened.items()
            if wanted.get(place) == set(opened[0])
        }
        self._opened = kept
        for place, names in wanted.items():
            if place not in kept:
                chosen = frozenset(names)
                kept[place] = (chosen, self.one(place, chosen))
        return {place: session for place, (_, session) in kept.items()}


def effects(
    judge: Judge, chain: Chain, layers: Layers, linears: Sequence[LinearGroup]
) -> dict[str, Effect]:
    """Measure every linear layer's effect, by its name."""
    found = {}
    for linear in progress(linears, desc="sensitivity", unit="layer"):
        place = chain.place(linear)
        session = layers.one(place, frozenset({linear.name}))
        agreement, error = judge.compare(place, {place: session})
        cosines = agreement.every.cosines
        lost = float(np.median(1 - cosines)) if len(cosines) else 1.0
        found[linear.name] = Effect(agreement.mean_overlap, agreement.every.mean, lost, error)
    return found


@dataclass(frozen=True)
class Goal:
    """What the quantised graph must reach.

    Attributes:
        overlap: Mean share of kept tokens that stay; None for no limit.
        cosine: Mean cosine of the tokens; None for no limit.
    """

    overlap: float | None
    cosine: float | None

    @classmethod
    def of(cls, recipe: Recipe) -> Goal:
        """Return what a recipe asks for."""
        return cls(recipe.keep_agreement, recipe.keep_cosine)

    def met(self, agreement: Agreement) -> bool:
        """Whether both limits hold."""
        return not Gate(overlap=self.overlap, every=Limits(mean=self.cosine)).judge(agreement)

    def nearer(self, share: float) -> Goal:
        """Return a stricter goal, by a share of what is left up to 1."""
        return replace(
            self,
            overlap=None if self.overlap is None else self.overlap + share * (1 - self.overlap),
            cosine=None if self.cosine is None else self.cosine + share * (1 - self.cosine),
        )


def ranking(
    effects: Mapping[str, Effect], goal: Goal, first: Agreement, sizes: Mapping[str, int]
) -> list[str]:
    """Order the layers by what they cost for what they save, the worst first.

    Args:
        effects: From `effects`.
        goal: What is to be reached.
        first: With all layers quantised: only what falls short of the goal counts, unless nothing
            does.
        sizes: How many multiplications each layer has.

    Returns:
        Their names.
    """
    short_overlap = goal.overlap is not None and first.mean_overlap < goal.overlap
    short_cosine = goal.cosine is not None and first.every.mean < goal.cosine
    # Errors of different layers add up as squares.
    by_score = {name: each.score_error**2 for name, each in effects.items()}
    by_cosine = {name: max(0.0, each.lost) for name, each in effects.items()}
    parts = []
    if short_overlap or not short_cosine:
        parts.append(by_score)
    if short_cosine or not short_overlap:
        parts.append(by_cosine)
    costs = dict.fromkeys(effects, 0.0)
    for part in parts:
        total = max(sum(part.values()), 1e-30)
        for name, cost in part.items():
            costs[name] = max(costs[name], cost / total)
    return sorted(costs, key=lambda name: -costs[name] / sizes[name])


def fewest(
    ordered: Sequence[str], reached: Callable[[frozenset[str]], bool], least: int = 0
) -> int:
    """Return how many of the first layers must stay in high precision, by bisection.

    Args:
        ordered: From `ranking`.
        reached: Whether the goal is met with these in high precision.
        least: Fewer are not tried.

    Returns:
        From `least` to all of them.
    """
    low, high = least, len(ordered)  # with all in high precision nothing is changed at all
    while low < high:
        middle = (low + high) // 2
        if reached(frozenset(ordered[:middle])):
            high = middle
        else:
            low = middle + 1
    return low
