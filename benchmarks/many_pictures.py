"""Many photographs from files to tokens: one at a time, together, and together as drafts.

    python -m benchmarks.many_pictures [--untimed] [-o benchmarks/results]

`VisionEncoder.encode` of 32 files. The towers are the demo model's and a trained one
(`benchmarks.real`), exported for it with batches of up to 8, in ONNX Runtime's FP32. Photographs
are those of `benchmarks.real`, as they are and enlarged to 12 megapixels as JPEGs. That one at a
time and together give the same tokens is asserted before they are timed, in turns. What drafts cost
in tokens, and what other decoders of JPEGs take, is measured too. Writes many_pictures.json, .md.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from benchmarks.harness import results
from benchmarks.harness.photographs import jpeg
from benchmarks.real.pictures import pictures
from benchmarks.real.towers import checkpoint
from benchmarks.small_costs import exported
from vzip.export.bench.others import wait_until_idle
from vzip.export.pages import markdown
from vzip.runtime import VisionEncoder
from vzip.runtime.agreement import compare
from vzip.runtime.bundle.manifest import EMBEDS, KEPT
from vzip.runtime.console import say
from vzip.runtime.machine.record import machine
from vzip.runtime.machine.timing import Timing, interleaved, turn
from vzip.runtime.pictures.images import load_image

WHAT: Final = "32 photographs from files to tokens, VisionEncoder.encode"
COUNT: Final = 32
PIXELS: Final = 12e6
AIM: Final = 1.6
DRAFT: Final = 2  # decoded to at least so many times the tower's edge
WAIT_S: Final = 120.0
ROUNDS: Final = 5
TOWERS: Final = {
    "demo": ("--model", "demo", "--tokens", "43"),
    "clip-b16-224": ("--tokens", "22"),
}
"""Tower → options of ``vzip export``; real ones' model is their folder."""
TOGETHER: Final = "together"
DRAFTS: Final = "together, drafts"
ONE: Final = "one at a time"

Row = dict[str, Any]
Files = Sequence[Path]


def enlarged(files: Files, folder: Path) -> list[Path]:
    """Write photographs of 12 megapixels, as JPEGs of quality 90, and return their paths."""
    made = []
    for file in files:
        image = load_image(file)
        factor = (PIXELS / (image.width * image.height)) ** 0.5
        size = (round(image.width * factor), round(image.height * factor))
        made.append(folder / f"{file.stem}.jpg")
        made[-1].write_bytes(jpeg(image.resize(size, Image.Resampling.BICUBIC), 90))
    return made


def cycled(files: Files) -> list[Path]:
    """Return `COUNT` files; the first ones stand there again."""
    return [files[number % len(files)] for number in range(COUNT)]


def ways(encoder: VisionEncoder, files: Files) -> dict[str, Callable[[], object]]:
    """Return what is timed, after asserting that the tokens are the same.

    A graph's products differ in their last bits from batch to batch, and so does a near-tie.
    """
    singly, together = [encoder.encode(each) for each in files], encoder.encode(list(files))
    one = [{EMBEDS: each.embeds, KEPT: each.kept} for each in singly]
    other = [
        {EMBEDS: embeds[None], KEPT: kept[None]}
        for embeds, kept in zip(together.embeds, together.kept, strict=True)
    ]
    agreement = compare(one, other, encoder.manifest)
    assert agreement.mean_overlap > 0.995
    assert agreement.kept.mean > 0.99999
    edge = encoder.manifest.preprocessing.shortest_edge
    found: dict[str, Callable[[], object]] = {
        ONE: lambda: [encoder.encode(each) for each in files],
        TOGETHER: lambda: encoder.encode(list(files)),
        DRAFTS: lambda: encoder.encode(list(files), draft=DRAFT * edge),
    }
    found[DRAFTS]()
    return found


def drafts_agree(encoder: VisionEncoder, files: Files) -> Row:
    """Compare tokens of drafts with those of all pixels, as JSON has `Agreement`."""
    edge = encoder.manifest.preprocessing.shortest_edge
    found: list[list[Row]] = []
    for draft in (None, DRAFT * edge):
        tokens = encoder.encode(list(files), draft=draft)
        found.append([{EMBEDS: tokens.embeds, KEPT: tokens.kept}])
    return {"draft": DRAFT * edge, **compare(*found, encoder.manifest).to_json()}


def decoders(data: bytes, least: int) -> dict[str, Callable[[], object]]:
    """Return ways to decode a JPEG in one thread, in full and so that an edge is `least` or more.

    Those of OpenCV and simplejpeg, where they are installed; nothing of vzip uses them.
    """
    found: dict[str, Callable[[], object]] = {
        "Pillow": lambda: load_image(data),
        "Pillow, draft": lambda: load_image(data, draft=least),
    }
    with contextlib.suppress(ImportError):
        cv2 = importlib.import_module("cv2")
        cv2.setNumThreads(1)
        array, shortest = np.frombuffer(data, np.uint8), min(load_image(data).size)
        scale = max(each for each in (1, 2, 4, 8) if each == 1 or shortest // each >= least)
        reduced = {1: cv2.IMREAD_COLOR}
        reduced |= {each: getattr(cv2, f"IMREAD_REDUCED_COLOR_{each}") for each in (2, 4, 8)}
        found["OpenCV"] = lambda: cv2.imdecode(array, cv2.IMREAD_COLOR)
        found["OpenCV, reduced"] = lambda: cv2.imdecode(array, reduced[scale])
    with contextlib.suppress(ImportError):
        fast = importlib.import_module("simplejpeg")
        found["simplejpeg"] = lambda: fast.decode_jpeg(data)
        small = {"min_height": least, "min_width": least, "min_factor": 1}
        quick = {"fastdct": True, "fastupsample": True}
        found["simplejpeg, scaled"] = lambda: fast.decode_jpeg(data, **small)
        found["simplejpeg, scaled, fast DCT"] = lambda: fast.decode_jpeg(data, **small, **quick)
    return found


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time calls of several seconds, each once a round; they were warmed up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken[name] += turn(calls[name], calls=1, settle=0)
    return {name: Timing.of(times) for name, times in taken.items()}


def measure(*, rounds: int = ROUNDS) -> Row:
    """Measure everything, each way `rounds` times; 0 for what drafts cost in tokens alone."""
    result: Row = {
        "what": WHAT,
        "command": f"python -m benchmarks.many_pictures{'' if rounds else ' --untimed'}",
        "environment": machine("opencv-python-headless", "simplejpeg"),
        "aim": AIM,
        "encode": [],
        "drafts": [],
        "decoders": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        small = pictures()
        large = enlarged(small, Path(folder))
        kinds = {"as they are": small, "12 megapixels": large}
        bundles = contextlib.ExitStack()
        with bundles:
            encoders = {}
            for name, options in TOWERS.items():
                model = () if "--model" in options else ("--model", str(checkpoint(name)))
                more = (*model, *options, "--max-batch", "8", "--no-check")
                path = bundles.enter_context(exported(*more))
                opened = VisionEncoder.open(path, "onnxruntime")
                encoders[name] = bundles.enter_context(opened)
            result["before"] = wait_until_idle(WAIT_S if rounds else 0.0, say=say)
            for name, encoder in encoders.items():
                for kind, files in kinds.items() if rounds else ():
                    times = in_turns(ways(encoder, cycled(files)), rounds)
                    row = {"tower": name, "pictures": kind, "threads": encoder.threads}
                    result["encode"].append({**row, "ms": _json(times)})
                    say(f"{name}, {kind}: {ratio(result['encode'][-1], TOGETHER):.2f}")
                result["drafts"].append({"tower": name, **drafts_agree(encoder, large)})
        for file in large[:3] if rounds else ():
            data = file.read_bytes()
            times = interleaved(decoders(data, 448), seconds=2.0)
            row = {"picture": file.stem, "megabytes": round(len(data) / 1e6, 2)}
            result["decoders"].append({**row, "ms": _json(times)})
    return result


def ratio(row: Row, way: str) -> float:
    """Return how many times as fast as one at a time a way is, by medians."""
    return float(row["ms"][ONE]["median_ms"] / row["ms"][way]["median_ms"])


def _json(times: Mapping[str, Timing]) -> Row:
    return {name: timing.to_json() for name, timing in times.items()}


def table(result: Row) -> str:
    """Return the result as Markdown."""
    where, before = result["environment"], result["before"]
    used = before["others_cores"]
    lines = [
        (
            f"`{result['command']}`; medians on {where['cores']} cores, {where['processor']}, "
            f"Pillow {where['packages']['pillow']}"
            f"{'' if used is None else f'; others used {used} cores before'}."
        ),
        "",
        *(_times(result) if result["encode"] else ("Times: not measured yet.", "")),
        "## Drafts of photographs of 12 megapixels, beside all pixels",
        "",
    ]
    lines += [
        f"* {row['tower']}, decoded to {row['draft']} pixels or more: "
        f"{row['mean_overlap']:.1%} of the kept tokens are the same ({row['min_overlap']:.1%} at "
        f"least), cosine {row['mean_cosine']:.4f} on average, {row['min_cosine']:.4f} at least."
        for row in result["drafts"]
    ]
    if not result["decoders"]:
        return "\n".join(lines) + "\n"
    names = dict.fromkeys(name for row in result["decoders"] for name in row["ms"])
    shown = [
        (
            f"{row['picture']}, {row['megabytes']} MB",
            *(f"{row['ms'][name]['median_ms']:.1f}" for name in names),
        )
        for row in result["decoders"]
    ]
    lines += ["", "## Decoders of a JPEG of 12 megapixels, one thread, ms", ""]
    return "\n".join([*lines, *markdown.table(("picture", *names), shown)]) + "\n"


def _times(result: Row) -> list[str]:
    """Return the section of times."""
    rows = [
        (
            row["tower"],
            row["pictures"],
            *(f"{row['ms'][way]['median_ms'] / COUNT:.1f}" for way in (ONE, TOGETHER)),
            f"{ratio(row, TOGETHER):.2f}×",
            f"{row['ms'][DRAFTS]['median_ms'] / COUNT:.1f}",
            f"{ratio(row, DRAFTS):.2f}×",
            f"{max(each['iqr_ms'] / each['median_ms'] for each in row['ms'].values()):.0%}",
        )
        for row in result["encode"]
    ]
    columns = ("tower", "photographs", ONE, TOGETHER, "", DRAFTS, "", "largest spread")
    reached = [row for row in result["encode"] if ratio(row, TOGETHER) >= result["aim"]]
    return [
        f"## {COUNT} photographs from files to tokens, ms a photograph",
        "",
        *markdown.table(columns, rows),
        "",
        (
            f"The aim, {result['aim']} times one at a time, is reached in {len(reached)} of "
            f"{len(result['encode'])} rows. Decoding is what runs at the same time; an encoder "
            "that keeps all cores busy by itself gains nothing, so the share of decoding decides."
        ),
        "",
    ]


def main() -> None:
    """Command line."""
    parser = results.parser(__doc__)
    parser.add_argument("--untimed", action="store_true", help="what drafts cost in tokens alone")
    options = parser.parse_args()
    result = measure(rounds=0 if options.untimed else ROUNDS)
    results.write(options.output, "many_pictures", result, table)


if __name__ == "__main__":
    main()
