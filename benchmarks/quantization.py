"""What INT8 and FP8 cost: ``python -m benchmarks.quantization demo``, ``… outliers``, ``… real``.

``demo``: accuracy of the demo model on held-out questions, at each budget, with its tower and
projector in FP32 and quantised; and how many of the kept tokens stay.

``outliers``: a LLaVA-1.5 tower at full size with seeded random weights and activation outliers,
which are put in without changing what it computes: some channels of every LayerNorm are multiplied
and the matching inputs of the linear layers divided. Plain minmax, SmoothQuant, and SmoothQuant
with the most sensitive layers left as they are; agreement on images held apart, time and memory.

``real``: trained towers (`benchmarks.real`), calibrated on crops of ten photographs and judged on
eight others: all layers in one form, each step of the search left out, and ``vzip calibrate`` with
limits. Its results go to quantization_real.json and quantization_real.md.

Each full-size measurement runs in a process of its own. Results go to
benchmarks/results/quantization.json, each part beside the other, and as tables to quantization.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
import transformers

from benchmarks.harness.results import RESULTS
from benchmarks.real.pictures import HELD_APART, LEARNT_FROM, crops, pictures
from benchmarks.real.towers import TOWERS
from vzip.calibration.demo import accuracy, dialogue
from vzip.calibration.quantization import search
from vzip.calibration.quantization.pieces import PieceSession, own_graph
from vzip.calibration.quantization.quantize import quantize
from vzip.calibration.quantization.recipe import Recipe
from vzip.calibration.samples import Samples
from vzip.export.algorithm.budget import Budget, split_tokens
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.graph.trace import GraphOptions
from vzip.export.pages import markdown
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime import demo
from vzip.runtime.agreement import compare
from vzip.runtime.bundle.manifest import EMBEDS, KEPT
from vzip.runtime.bundle.origin import Model
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.machine.record import machine

FILE = RESULTS / "quantization.json"
SHARES = (33, 22, 11, 6)  # budgets of the demo in percent of its patches
BATCH = 8

# Of the full-size part. Real towers have a handful of channels some tens of times above the rest.
OUTLIERS, TIMES = 6, 64.0
PLAIN: dict[str, Any] = {
    "method": "minmax",
    "smoothing": None,
    "keep_agreement": None,
    "keep_cosine": None,
}
FULL_SIZE: dict[str, tuple[bool, Recipe]] = {
    "no outliers, minmax": (False, Recipe(**PLAIN)),
    "outliers, minmax": (True, Recipe(**PLAIN)),
    "outliers, SmoothQuant": (True, Recipe(**{**PLAIN, "smoothing": 0.5})),
    "outliers, SmoothQuant + sensitivity": (True, Recipe(method="minmax")),
}

REAL_FILE = RESULTS / "quantization_real.json"
ALL = Recipe(keep_agreement=None, keep_cosine=None)
# What is measured of real towers: a name → the recipe, and what of the search is left out.
REAL: dict[str, tuple[Recipe, str | None]] = {
    "per tensor, minmax": (Recipe(**PLAIN), None),
    "per tensor, SmoothQuant": (Recipe(**{**PLAIN, "smoothing": 0.5}), None),
    "per tensor, range by mean square": (Recipe(**{**PLAIN, "method": "mse"}), None),
    "searched": (ALL, None),
    "searched, nothing apart": (ALL, "apart"),
    "searched, nothing rotated": (ALL, "rotation"),
    "searched, nothing centred": (ALL, "centring"),
    "searched, within limits": (Recipe(keep_agreement=0.97, keep_cosine=0.995), None),
    "SmoothQuant, within limits": (Recipe(method="minmax"), None),
}


@dataclasses.dataclass(frozen=True)
class WithOutliers(WeightSource):
    """Random weights with outliers that change nothing about what they compute."""

    def load(self) -> tuple[VisionWeights, Model]:
        """Draw the weights, then move some channels' size from the linear layers to the norms."""
        weights, model = super().load()
        tensors = dict(weights.tensors)
        tower = weights.config.tower
        rng = np.random.default_rng(self.seed)
        for index in range(tower.num_layers):
            layer = f"tower.encoder.layers.{index}"
            for norm, linears in (
                ("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("layer_norm2", ("mlp.fc1",)),
            ):
                chosen = torch.from_numpy(rng.choice(tower.hidden_size, OUTLIERS, replace=False))
                for name in (f"{layer}.{norm}.weight", f"{layer}.{norm}.bias"):
                    tensors[name] = tensors[name].clone()
                    tensors[name][chosen] *= TIMES  # a power of two: nothing is rounded
                for linear in linears:
                    name = f"{layer}.{linear}.weight"
                    tensors[name] = tensors[name].float()
                    tensors[name][:, chosen] /= TIMES
        return dataclasses.replace(weights, tensors=tensors), model


def export(folder: Path, source: WeightSource, budget: Budget, batch: int) -> Bundle:
    """Export an FP32 bundle; its parity is what `vzip-export` tests, so it isn't checked again."""
    return export_bundle(
        source,
        folder,
        budget=budget,
        precision="fp32",
        options=GraphOptions(batch=batch, dynamic_batch=batch > 1),
        check_images=(),
        step=lambda _: None,
    )


def outputs(
    graph: ir.Model, pictures: np.ndarray[Any, Any]
) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Run a graph on uint8 [n, H, W, 3], `BATCH` at a time."""
    session = PieceSession(graph)
    return [
        session.run({"image": pictures[first : first + BATCH]}, [EMBEDS, KEPT])
        for first in range(0, len(pictures), BATCH)
    ]


def measure_demo(scenes: int, seed: int, calibrated: int) -> list[dict[str, Any]]:
    """Measure the demo model at every budget, in every precision."""
    side, patches = 112, 196
    test = accuracy.held_out(seed, scenes, side)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        demo.checkpoint(), dtype=torch.float32, trust_remote_code=False
    ).eval()
    model.model.multi_modal_projector = torch.nn.Identity()  # the graph holds it
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        demo.checkpoint(), trust_remote_code=False
    )
    rows = []
    for share in SHARES:
        tokens = round(share / 100 * patches)
        packer = dialogue.Packer(tokenizer, model.config.image_token_id, tokens)

        def answered(batches: Sequence[dict[str, Any]], packer: Any = packer) -> float:
            embeds = torch.from_numpy(np.concatenate([batch[EMBEDS] for batch in batches]))
            right = accuracy.right_answers(model, packer, embeds, test.questions)
            return accuracy.by_kind(test.questions, right)["all"]

        with tempfile.TemporaryDirectory() as folder:
            bundle = export(
                Path(folder) / "bundle", WeightSource("demo"), Budget(*split_tokens(tokens)), BATCH
            )
            samples = Samples.open("demo", count=calibrated)
            expected = outputs(own_graph(bundle), test.pictures)
            full = answered(expected)
            for recipe in (Recipe(**PLAIN), Recipe(), Recipe("fp8")):
                done = quantize(bundle, samples, recipe, step=lambda _: None)
                got = outputs(done.graph, test.pictures)
                rows.append(
                    {
                        "tokens": tokens,
                        "recipe": recipe.to_json(),
                        "fp32": full,
                        "accuracy": answered(got),
                        "questions": sum(len(asked) for asked in test.questions),
                        "agreement": compare(expected, got, bundle.manifest).to_json(),
                        "left_high": [x.name for x in done.report.layers if not x.quantised],
                        "report_agreement": done.report.agreement.to_json(),
                    }
                )
                print(tokens, recipe.precision, recipe.smoothing, full, rows[-1]["accuracy"],
                      rows[-1]["agreement"]["mean_overlap"], flush=True)  # fmt: skip
    return rows


def measure_full_size(name: str, bundle: Path, count: int) -> dict[str, Any]:
    """Quantise a full-size bundle in this process and return its report."""
    _, recipe = FULL_SIZE[name]
    samples = Samples.open("demo", count=count)
    done = quantize(read_bundle(bundle), samples, recipe, step=lambda text: print(text, flush=True))
    with tempfile.TemporaryDirectory() as folder:
        done.save(Path(folder))
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {
        "name": name,
        "bytes": size,
        "environment": machine("onnx"),
        "report": done.report.to_json(),
    }


def measure_apart(name: str, count: int, work: Path) -> dict[str, Any]:
    """Measure a full-size tower in a process of its own: its peak memory is then its own."""
    outliers, _ = FULL_SIZE[name]
    folder = work / ("outliers" if outliers else "plain")
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        kind = WithOutliers if outliers else WeightSource
        export(folder, kind("llava-1.5-7b", seed=0), Budget(54, 10), 1)
    output = work / f"{'-'.join(name.split())}.json"
    command = [sys.executable, "-m", "benchmarks.quantization", "--one", name, "-o", output]
    subprocess.run([*command, "--bundle", folder, "--images", str(count)], check=True)
    return json.loads(output.read_text())  # type: ignore[no-any-return]


@contextmanager
def without(step: str | None) -> Iterator[None]:
    """Leave a step of the search out."""
    changes = {
        "apart": ("_apart", lambda *_: 0),
        "rotation": ("_turned", lambda *_: ()),
        "centring": ("_centred", lambda *called: called[-1]),
    }
    if step is None:
        yield
        return
    name, replaced = changes[step]
    with mock.patch.object(search.FormSearch, name, replaced):
        yield


def measure_real(tower: str, name: str, count: int) -> dict[str, Any]:
    """Quantise a real tower in one way and judge it on photographs that nothing was chosen by."""
    recipe, left_out = REAL[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = export(
            folder / "bundle", WeightSource(str(TOWERS[tower].checkpoint())), Budget(54, 10), 1
        )
        (folder / "crops").mkdir()
        samples = Samples.open(str(crops(folder / "crops", pictures(LEARNT_FROM), 4)), count=count)
        judging = folder / "judging.txt"
        judging.write_text("\n".join(map(str, pictures(HELD_APART))))
        apart = Samples.open(str(judging), count=None, shuffled=False)
        batch = np.concatenate(list(apart.batches(bundle.manifest, 1)))
        with without(left_out):
            done = quantize(bundle, samples, recipe, step=lambda text: print(text, flush=True))
        own, got = (
            [PieceSession(graph).run({"image": image[None]}, [EMBEDS, KEPT]) for image in batch]
            for graph in (own_graph(bundle), done.graph)
        )
    found = compare(own, got, bundle.manifest)
    return {
        "tower": tower,
        "name": name,
        "images": count,
        "eight_bits": done.report.eight_bits,
        "left_high": [x.name for x in done.report.layers if not x.quantised],
        "agreement": {
            **found.to_json(),
            "first_percentile": float(np.percentile(found.every.cosines, 1)),
            "merged_share": len(found.merged.cosines) / (10 * len(batch)),
        },
        "report": {**done.report.to_json(), "samples": None},
        "environment": machine("onnx"),
    }


def real_table(rows: list[dict[str, Any]]) -> str:
    """Return what was measured of real towers as Markdown."""
    columns = (
        "tower", "INT8", "in 8 bits", "kept overlap, mean (lowest)",
        "cosine, mean (1st percentile, lowest)", "merged cosine (share compared)", "seconds",
    )  # fmt: skip
    cells = []
    for row in rows:
        found = row["agreement"]
        merged = "–" if found["merged_cosine"] is None else f"{found['merged_cosine']:.4f}"
        cells.append(
            (
                row["tower"],
                row["name"],
                f"{row['eight_bits']:.1%}",
                f"{found['mean_overlap']:.3f} ({found['min_overlap']:.3f})",
                "{mean_cosine:.4f} ({first_percentile:.3f}, {min_cosine:.3f})".format(**found),
                f"{merged} ({found['merged_share']:.0%})",
                f"{row['report']['seconds']:.0f} (load {row['environment']['state']['load']:.0f})",
            )
        )
    intro = (
        "Static INT8, one scale a tensor for activations, as TensorRT runs it; on ONNX Runtime's "
        "CPU. Tokens are the bundle's own in FP32 and the quantised graph's, 54 + 10 of them, on "
        f"{len(HELD_APART)} photographs that nothing was chosen by. The weights of towers without "
        "“noise” lie on an INT8 grid, so their rows tell of activations alone, until a rotation or "
        "a channel apart takes the weights off it. Merged tokens are compared where their target "
        "is the same."
    )
    places = dict.fromkeys(_where(row["environment"]) for row in rows)
    return "\n".join([intro, "", *markdown.table(columns, cells), "", *places, ""])


def write_real(row: dict[str, Any]) -> str:
    """Add or replace a row of real towers' results, and return them as Markdown."""
    stored = json.loads(REAL_FILE.read_text())["rows"] if REAL_FILE.exists() else []
    rows = {(each["tower"], each["name"]): each for each in [*stored, row]}
    ordered = [rows[key] for key in ((t, n) for t in TOWERS for n in REAL) if key in rows]
    REAL_FILE.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")
    table = real_table(ordered)
    REAL_FILE.with_suffix(".md").write_text(table, encoding="utf-8")
    return table


def tables(result: dict[str, Any]) -> str:
    """Return all parts as Markdown."""
    lines: list[str] = []
    if "demo" in result:
        lines += _demo_table(result["demo"])
    if "outliers" in result:
        lines += _full_size_table(result["outliers"]["rows"])
    return "\n".join(lines)


def _demo_table(part: dict[str, Any]) -> list[str]:
    rows, seed, images = part["rows"], part["seed"], part["images"]
    intro = (
        f"Demo model, {rows[0]['questions']} held-out questions (seed {seed}): accuracy in "
        "percent, and agreement of the quantised graph with the FP32 one on the same pictures. "
        f"Calibration saw {images} other scenes, with the digits of the training."
    )
    columns = (
        "tokens", "precision", "SmoothQuant and limits", "FP32", "quantised", "points",
        "kept overlap, mean (lowest)", "cosine, mean (lowest)", "left in FP32",
    )  # fmt: skip
    cells = []
    for row in rows:
        recipe = row["recipe"]
        cells.append(
            (
                row["tokens"],
                recipe["precision"].upper(),
                "none" if recipe["smoothing"] is None else "default",
                f"{100 * row['fp32']:.1f}",
                f"{100 * row['accuracy']:.1f}",
                f"{100 * (row['accuracy'] - row['fp32']):+.2f}",
                *_agreement(row["agreement"]),
                ", ".join(row["left_high"]) or "none",
            )
        )
    return [intro, "", *markdown.table(columns, cells), ""]


def _full_size_table(rows: list[dict[str, Any]]) -> list[str]:
    intro = (
        "LLaVA-1.5 tower and projector at full size (CLIP ViT-L/14-336, 54 + 10 tokens), seeded "
        f"random weights. With outliers {OUTLIERS} channels of every LayerNorm are {TIMES:.0f} "
        "times as large, and what it computes is the same. INT8, minmax. Agreement with the "
        "bundle's own FP32 graph on images held apart."
    )
    columns = (
        "tower, recipe", "images calibrated on, apart", "kept overlap, mean (lowest)",
        "cosine, mean (lowest)", "linear layers left in FP32", "seconds", "peak GB", "graph GB",
    )  # fmt: skip
    cells = []
    for row in rows:
        report = row["report"]
        high = [each for each in report["layers"] if not each["quantised"]]
        cells.append(
            (
                row["name"],
                f"{report['calibrated']}, {report['held_apart']}",
                *_agreement(report["agreement"]),
                f"{len(high)} of {len(report['layers'])}",
                f"{report['seconds']:.0f} (load {row['environment']['state']['load']:.0f})",
                f"{report['peak_bytes'] / 1e9:.1f}",
                f"{row['bytes'] / 1e9:.2f}",
            )
        )
    places = dict.fromkeys(_where(row["environment"]) for row in rows)
    return [intro, "", *markdown.table(columns, cells), "", *places, ""]


def _agreement(agreement: dict[str, float]) -> tuple[str, str]:
    return (
        f"{agreement['mean_overlap']:.3f} ({agreement['min_overlap']:.3f})",
        f"{agreement['mean_cosine']:.4f} ({agreement['min_cosine']:.3f})",
    )


def _where(environment: dict[str, Any]) -> str:
    machine = f"{environment['processor']}, {environment['cores']} cores"
    return f"{machine}; ONNX Runtime {environment['packages']['onnxruntime']}."


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("demo", "outliers", "real"))
    parser.add_argument("--scenes", type=int, default=600, help="held-out scenes of the demo")
    parser.add_argument("--seed", type=int, default=90210, help="of these")
    parser.add_argument("--images", type=int, default=80, help="one in five is held apart")
    parser.add_argument(
        "--only", action="append", choices=(*FULL_SIZE, *REAL), help="of the full-size, or the real"
    )
    parser.add_argument("--tower", action="append", choices=tuple(TOWERS), help="of the real")
    parser.add_argument("--work", type=Path, help="keep full-size bundles here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        row = measure_full_size(options.one, options.bundle, options.images)
        options.output.write_text(json.dumps(row))
        return
    if options.part is None:
        parser.error("say which part: demo, outliers or real")
    if options.part == "real":
        for tower in options.tower or TOWERS:
            for name in options.only or REAL:
                print(write_real(measure_real(tower, name, min(options.images, 60))), flush=True)
        return
    if options.part == "demo":
        rows = measure_demo(options.scenes, options.seed, options.images)
        where = machine("onnx")
        write(
            "demo",
            {"images": options.images, "seed": options.seed, "environment": where, "rows": rows},
        )
    else:
        with tempfile.TemporaryDirectory() as temporary:
            work = options.work or Path(temporary)
            for name in options.only or FULL_SIZE:
                write("outliers", {"rows": with_row(measure_apart(name, options.images, work))})
    print(tables(json.loads(FILE.read_text())))


def with_row(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the stored full-size rows with one of them added or replaced, in order."""
    stored = json.loads(FILE.read_text()) if FILE.exists() else {}
    rows = {each["name"]: each for each in stored.get("outliers", {}).get("rows", [])}
    rows[row["name"]] = row
    return [rows[name] for name in FULL_SIZE if name in rows]


def write(part: str, content: dict[str, Any]) -> None:
    """Write one part of the results, and all of them as tables."""
    result = json.loads(FILE.read_text()) if FILE.exists() else {}
    result[part] = content
    FILE.write_text(json.dumps(result, indent=1) + "\n")
    FILE.with_suffix(".md").write_text(tables(result), encoding="utf-8")


if __name__ == "__main__":
    main()
