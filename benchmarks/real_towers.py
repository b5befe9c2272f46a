"""Tower × precision × stack: ``python -m benchmarks.real_towers --bundles FOLDER``.

Real trained towers (`benchmarks.real`), and LLaVA-1.5's at true size with random weights, with and
without outliers as bad as real ones. Each stack is timed beside the published PyTorch form, in the
same turns, and judged on photographs that nothing was learnt from or chosen by; one that computes
something else is timed too, and its row says so. `vzip.export.bench` measures; bundles are kept in
the folder (`benchmarks.harness.bundles`).

Writes benchmarks/results/real_towers.json and .md after every group of turns: what a run that is
ended early has measured stays, and a run of some towers leaves the others' results as they are.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.encoder import WAIT_S, add_wait, joined
from benchmarks.harness import bundles
from benchmarks.harness.results import RESULTS, text
from benchmarks.real.pictures import HELD_APART, LEARNT_FROM, pictures
from benchmarks.real.towers import TOWERS as REAL
from benchmarks.real.towers import checkpoint
from vzip.export.bench.measure import Wanted, bench
from vzip.export.bench.output import without_paths
from vzip.export.pages import markdown
from vzip.runtime.bundle.origin import Weights
from vzip.runtime.console import say
from vzip.runtime.errors import VzipError
from vzip.runtime.files import atomic

FILE: Final = RESULTS / "real_towers.json"
TOKENS: Final = 64
BASELINE: Final = "torch-published:fp32"

STACKS: Final[Mapping[str, str]] = {
    BASELINE: "FP32",
    "torch-sdpa:fp32": "FP32",
    "onnxruntime:fp32": "FP32",
    "openvino:fp32": "FP32",
    "torch-published:fp16": "FP16, true half",
    "torch-sdpa:fp16": "FP16, true half",
    "torch-published:bf16": "BF16",
    "torch-sdpa:bf16": "BF16",
    "openvino:bf16": "BF16",
    "onnxruntime-dynamic:int8": "INT8 per tensor, all layers",
    "onnxruntime:int8": "INT8 per tensor, vzip calibrate",
    "openvino-f32:int8": "INT8 per tensor, vzip calibrate",
    "onnxruntime-form:tokens": "INT8 per token, all layers",
    "onnxruntime:fastest": "engine of vzip build --cpu",
    "openvino:fastest": "engine of vzip build --cpu",
}
"""Stack → its precision. ONNX Runtime computes FP16 graphs in FP32 on a CPU: half is PyTorch's."""
_HALF: Final = tuple(name for name in STACKS if name.endswith(":fp16"))
_SLOW: Final = ("torch-sdpa:fp32", "openvino:fp32", "openvino:bf16", "openvino-f32:int8",
                "torch-published:bf16")  # fmt: skip
_MAIN: Final = tuple(name for name in STACKS if name not in _HALF)
# Stacks, and their turns. What takes a PyTorch without kernels for halves is timed for the record.
RUNS: Final[tuple[tuple[tuple[str, ...], int], ...]] = ((_MAIN, 5), ((BASELINE, *_HALF), 2))
# At ViT-L's size: minutes, and half precision is judged on real towers.
RUNS_OF_LARGE: Final = ((tuple(name for name in _MAIN if name not in _SLOW), 3),)


@dataclass(frozen=True)
class Tower:
    """A row of the table's first axis.

    Attributes:
        about: What it is.
        real: Whether its weights are trained.
        model: Returns what ``vzip export`` takes; what must be fetched is fetched then.
        weights: As ``vzip export`` takes it.
        runs: Stacks that are timed together, and their most turns.
    """

    about: str
    real: bool
    model: Callable[[], str]
    weights: Weights
    runs: tuple[tuple[tuple[str, ...], int], ...]

    def recipe(self, name: str) -> bundles.Recipe:
        """Return how its bundle is made. Fetches what isn't there."""
        return bundles.Recipe(
            name, self.model(), self.weights, TOKENS, tuple(pictures(LEARNT_FROM)),
            tuple(pictures(HELD_APART)), all_layers=not self.real,
        )  # fmt: skip


def _real(name: str) -> Tower:
    return Tower(REAL[name].about, True, lambda: str(checkpoint(name)), "checkpoint", RUNS)


TOWERS: Final[Mapping[str, Tower]] = {
    "clip-b16-384": _real("clip-b16-384"),
    "clip-b16-224": _real("clip-b16-224"),
    "dinov2-s14-336": _real("dinov2-s14-336"),
    "llava-outliers": Tower(
        "LLaVA-1.5's CLIP ViT-L/14 at 336 px, random weights with planted outliers", False,
        lambda: "llava-1.5-7b", "random-outliers", RUNS_OF_LARGE,
    ),
    "llava-random": Tower(
        "LLaVA-1.5's CLIP ViT-L/14 at 336 px, random weights", False,
        lambda: "llava-1.5-7b", "random", RUNS_OF_LARGE,
    ),
}  # fmt: skip
"""Those with real weights first."""
PARTS: Final = {
    "real": tuple(name for name, tower in TOWERS.items() if tower.real),
    "random": tuple(name for name, tower in TOWERS.items() if not tower.real),
}


def measure(
    name: str,
    folder: Path,
    *,
    rounds: int,
    only: tuple[str, ...],
    command: str,
    wait_s: float = WAIT_S,
) -> Iterator[dict[str, Any]]:
    """Measure a tower, and yield what is known of it after each group of turns.

    Args:
        name: Of `TOWERS`.
        folder: Where bundles are kept.
        rounds: Most turns.
        only: Stacks; empty for all.
        command: As it stands in the result.
        wait_s: How long to wait for an idle machine before each group, at most.

    Yields:
        As `vzip.export.bench.output` describes it, and ``about``, ``real``, ``outliers`` (see
        `benchmarks.harness.outliers`) and ``key``, of what the bundle was made by.
    """
    tower = TOWERS[name]
    recipe = tower.recipe(name)
    made = bundles.made(folder, recipe)
    found: list[dict[str, Any]] = []
    for stacks, most in tower.runs:
        chosen = tuple(each for each in stacks if not only or each in (*only, BASELINE))
        # What isn't in the bundle can't be named.
        chosen = bundles.with_cpu_engine(chosen, made.bundle)
        chosen = tuple(each for each in chosen if each not in made.lacking)
        wanted = Wanted(
            only=chosen, rounds=min(rounds, most), judge=made.judge, beside=False, wait_s=wait_s
        )
        if only and set(chosen) == {BASELINE} and BASELINE not in only:
            continue
        found.append(bench({name: made.bundle}, wanted, command=command, say=say))
        result = joined(found, command)
        result["empty"] = [
            *({"cell": f"{name}, {cell}", "why": why} for cell, why in made.lacking.items()),
            *result["empty"],
        ]
        about = {"about": tower.about, "real": tower.real, "outliers": made.outliers}
        yield without_paths({**result, **about, "key": recipe.key})


def fastest(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the row of the fastest of vzip's own stacks that agrees; None where none does."""
    own = [row for row in result["rows"] if row["kind"] == "ours" and agrees(row)]
    return min(own, key=lambda row: float(row["median_ms"]), default=None)


def agrees(row: Mapping[str, Any]) -> bool:
    """Say whether a row's tokens are as near to the untouched model's as an engine's must be."""
    return row["agreement"]["disagrees"] == ""


COLUMNS: Final = (
    "tower", "precision", "stack", "kept overlap", "cosine, mean", "1st percentile", "worst",
    "groups", "merged cosine", "of merged", "ms", "× published", "agrees",
)  # fmt: skip


def rows(name: str, result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield a tower's lines of the table, by precision and then by time."""
    order = list(STACKS)
    best = fastest(result)
    seen: set[str] = set()
    for row in sorted(result["rows"], key=lambda row: order.index(row["stack"])):
        if row["stack"] in seen:  # the baseline of a further group
            continue
        seen.add(row["stack"])
        found = row["agreement"]
        stack = f"`{row['stack']}`" + (f" ({row['chosen']})" if row.get("chosen") else "")
        groups = found["group_agreement"]
        yield (
            name if result["real"] else f"{name} ({result['bundles'][0]['weights']} weights)",
            STACKS[row["stack"]],
            f"**{stack}**" if row is best else stack,
            f"{found['kept_overlap']:.3f}",
            f"{found['mean_cosine']:.5f}",
            f"{found['first_percentile_cosine']:.4f}",
            f"{found['min_cosine']:.4f}",
            "–" if groups is None else f"{groups:.4f}",
            f"{found['contextual_cosine']:.4f}",
            f"{found['contextual_share']:.0%}",
            f"{row['median_ms']:.0f}",
            f"{row['times_baseline']:.2f}" + (" (unsteady)" if row.get("ratio_unsteady") else ""),
            "yes" if agrees(row) else f"no: {found['disagrees']}",
        )


def page(whole: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    towers = whole["towers"]
    cells = [line for name, result in towers.items() for line in rows(name, result)]
    lines = [
        "# Tower × precision × stack",
        "",
        (
            f"{TOKENS} tokens, one picture a call. Tokens are judged beside the untouched model on "
            f"{len(HELD_APART)} photographs that nothing was learnt from or chosen by; checks, "
            f"calibration (on crops of them) and the choice of engines had {len(LEARNT_FROM)} "
            "others. Cosines are of the tokens that both keep; groups: merged-away tokens that "
            "went where the untouched model's keys say, given what was kept; merged cosine: of "
            "merged tokens with the same target, and their share. × published: how many times as "
            f"fast as `{BASELINE}`, the median of the ratios of turns. Agrees: as `vzip build "
            "--cpu` "
            "demands of a form. Bold: the fastest of vzip's own that agrees. ONNX Runtime's CPU "
            "computes FP16 graphs in FP32; true half is PyTorch's, on a CPU without fast kernels "
            "for it."
        ),
        "",
        *markdown.table(COLUMNS, cells),
    ]
    measured = [
        (name, *(f"{result['outliers'][key]:.3g}" for key in _OUTLIERS))
        for name, result in towers.items()
        if result["outliers"] is not None
    ]
    if measured:
        lines += [
            "",
            (
                "What outliers and sinks the towers have (`benchmarks.harness.outliers`, medians "
                "of the first four photographs):"
            ),
            "",
            *markdown.table(("tower", *_OUTLIERS.values()), measured),
        ]
    empty = [(each["cell"], each["why"]) for result in towers.values() for each in result["empty"]]
    if empty:
        lines += ["", *markdown.table(("not run", "why"), empty)]
    lines += ["", *(f"* {name}: {_place(result)}" for name, result in towers.items())]
    return "\n".join(lines) + "\n"


_OUTLIERS: Final = {
    "stream": "residual stream, max/rms",
    "fc2": "worst fc2 input, max/rms",
    "entropy": "entropy of CLS's attention / log N",
    "top5": "share of the 5 most attended",
    "sinks": "sinks",
    "share": "their share of CLS's attention",
    "norm": "largest norm / median",
}


def _place(result: Mapping[str, Any]) -> str:
    """Return where and when a tower was measured, and how busy the machine was."""
    where = result["environment"]
    loads = [state["load"] for state in result["states"] if state["load"] is not None]
    busy = f", then {min(loads)} to {max(loads)}" if loads else ""
    return (
        f"{result['started']}, {where['cores']} cores, {where['processor']}; load before "
        f"{where['state']['load']}{busy}; bundle {result['key']}; `{result['command']}`"
    )


def main() -> int:
    """Command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--bundles", type=Path, required=True, help="where bundles are kept")
    known = ", ".join((*PARTS, *TOWERS))
    parser.add_argument("--towers", default="real,random", help=f"some of {known} (default: all)")
    parser.add_argument("--only", default="", help="stacks beside the baseline (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="most turns of each (default: 5)")
    add_wait(parser)
    parser.add_argument("-o", "--output", type=Path, default=FILE, metavar="FILE.json")
    options = parser.parse_args()
    asked = [
        name for part in options.towers.split(",") for name in PARTS.get(part, (part,))
    ]  # fmt: skip
    if unknown := [name for name in asked if name not in TOWERS]:
        parser.error(f"--towers has {', '.join(unknown)}, expected some of {known}")
    only = tuple(filter(None, options.only.split(",")))
    if unknown := [name for name in only if name not in STACKS]:
        parser.error(f"--only has {', '.join(unknown)}, expected some of {', '.join(STACKS)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)  # before an hour's work
    arguments = shlex.join(without_paths(sys.argv[1:]))
    command = f"python -m benchmarks.real_towers {arguments}"

    def measured(name: str) -> bool:
        """Measure a tower and write what comes of it; an error is no reason to leave out others."""
        try:
            for result in measure(
                name,
                options.bundles,
                rounds=options.rounds,
                only=only,
                command=command,
                wait_s=options.wait,
            ):
                write(options.output, name, result)
        except VzipError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return False
        return True

    done = [measured(name) for name in dict.fromkeys(asked)]
    if options.output.exists():
        print(page(json.loads(options.output.read_text(encoding="utf-8"))))
    return 0 if all(done) else 1


def write(path: Path, name: str, result: Mapping[str, Any]) -> None:
    """Put a tower's result into the file, beside those of others, and write the page."""
    towers: dict[str, Any] = {}
    if path.exists():
        towers = json.loads(path.read_text(encoding="utf-8"))["towers"]
    towers[name] = result
    whole = {"tokens": TOKENS, "towers": {each: towers[each] for each in TOWERS if each in towers}}
    atomic.replace_file(path, text(whole).encode())
    atomic.replace_file(path.with_suffix(".md"), page(whole).encode())


if __name__ == "__main__":
    sys.exit(main())
