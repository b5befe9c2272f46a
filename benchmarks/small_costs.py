"""What surrounds the encoder: import, open, a call's checks, and a large JPEG's way to the tower.

    python -m benchmarks.small_costs [--bundle FOLDER] [-o benchmarks/results]

Compared calls are timed in turn. The pictures are drawn (`benchmarks.harness.photographs`), 12
megapixels each; what preprocessing gives is asserted to be transformers', bit for bit, before it is
timed. The bundle to open is a full-size one of random weights, exported for it, unless one is
named. Writes small_costs.json and .md. What an export and a build cost is
`benchmarks.export_cost`'s question.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import results
from benchmarks.harness.photographs import HEIGHT, WIDTH, jpeg, photograph
from vzip.calibration.demo import scenes
from vzip.export.pages import markdown
from vzip.runtime import VisionEncoder
from vzip.runtime.agreement import compare
from vzip.runtime.backends.packages import import_onnxruntime
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, MODEL_FILE, POSITIONS
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.machine.process import peak_bytes
from vzip.runtime.machine.record import machine
from vzip.runtime.machine.timing import Timing, interleaved
from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.preprocess import Preprocessing, pixel_values, tower_image

WHAT = "Costs around the encoder: import, open, host time of a call, a 12-megapixel JPEG to pixels"
AIM_MS = 5.0  # of preprocessing
FULL_SIZE = ("--model", "llava-1.5-7b", "--weights", "random", "--dtype", "fp16", "--no-check")
DEMO = ("--model", "demo", "--tokens", "43")
PICTURES = (("smooth", 75), ("textured", 85), ("noisy", 95))
DRAFT = 2  # decoded to at least so many times the tower's edge
SCENES, SCENE_SIDE = 8, 3000  # of the demo model, and in pixels

CLIP = Preprocessing(
    image_size=336,
    mode="resize_crop",
    shortest_edge=336,
    resample="bicubic",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    rescale_factor=1 / 255,
)

IMPORTS = {
    "python": "pass",
    "numpy and Pillow": "import numpy, PIL.Image",
    "VisionEncoder": "from vzip.runtime import VisionEncoder",
    "vzip -h": "import sys; from vzip.runtime.cli.main import main; sys.exit(main(['-h']))",
}

Row = dict[str, Any]
Calls = Mapping[str, Callable[[], object]]


def preprocessing(data: bytes, *, seconds: float | None = None) -> dict[str, Timing]:
    """Time a JPEG's ways to the tower's input, after asserting that the exact one is exact.

    Args:
        data: The JPEG.
        seconds: As for `interleaved`.

    Returns:
        Way → its times. ``transformers``, ``exact`` and ``draft`` give float32 pixel values;
        ``Pillow, one call each`` stops at the resized picture, ``coefficients`` at the smallest
        that the decoder makes: that is hardly more than reading what the file holds.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": CLIP.shortest_edge},
        crop_size={"height": CLIP.image_size, "width": CLIP.image_size},
    )
    calls: Calls = {
        "transformers": lambda: processor(Image.open(io.BytesIO(data)))["pixel_values"][0],
        "Pillow, one call each": lambda: Image.open(io.BytesIO(data)).resize(
            (WIDTH * 336 // HEIGHT, 336), Image.Resampling.BICUBIC
        ),
        "exact": lambda: exact(data),
        "decode": lambda: load_image(data),
        "draft": lambda: pixel_values(drafted(data, CLIP)[None], CLIP)[0],
        "coefficients": lambda: load_image(data, draft=1),
    }
    assert np.array_equal(np.asarray(calls["transformers"]()), exact(data))
    return interleaved(calls, seconds=seconds)


def exact(data: bytes) -> np.ndarray[Any, Any]:
    """Return what the processor gives, float32 [3, 336, 336]."""
    return pixel_values(tower_image(load_image(data), CLIP)[None], CLIP)[0]


def drafted(data: bytes, prep: Preprocessing) -> np.ndarray[Any, Any]:
    """Return the tower's picture by way of a draft, uint8 [side, side, 3]."""
    return tower_image(load_image(data, draft=DRAFT * prep.shortest_edge), prep)


def draft_difference(data: bytes, prep: Preprocessing) -> tuple[float, int]:
    """Return how far a draft's pixels are from the exact ones, of 255: mean and largest."""
    full = tower_image(load_image(data), prep).astype(np.int16)
    away = np.abs(full - drafted(data, prep))
    return round(float(away.mean()), 3), int(away.max())


def draft_agreement(encoder: VisionEncoder, count: int = SCENES) -> Row:
    """Compare the demo model's tokens of drafts with those of the exact pixels.

    Args:
        encoder: The demo model.
        count: Held-out scenes, painted at `SCENE_SIDE` pixels.

    Returns:
        `vzip.runtime.agreement.Agreement` as JSON has it, and ``side``.
    """
    rng = np.random.default_rng(4711)
    prep = encoder.manifest.preprocessing
    found: tuple[list[Any], list[Any]] = ([], [])
    for _ in range(count):
        scene = scenes.paint(scenes.draw_scene(rng, "test"), SCENE_SIDE)
        data = jpeg(Image.fromarray(scene), 90)
        for pixels, batches in zip(
            (tower_image(load_image(data), prep), drafted(data, prep)), found, strict=True
        ):
            tokens = encoder.encode([pixels])
            batches.append({EMBEDS: tokens.embeds, KEPT: tokens.kept})
    return {"side": SCENE_SIDE, **compare(*found, encoder.manifest).to_json()}


def imports(*, seconds: float | None = None) -> dict[str, Timing]:
    """Time fresh Pythons that import something and end."""
    calls = {name: _python(code) for name, code in IMPORTS.items()}
    return interleaved(calls, seconds=seconds)


def _python(code: str) -> Callable[[], object]:
    command = [sys.executable, "-c", code]
    return lambda: subprocess.run(command, check=True, capture_output=True)


def opening(bundle: Bundle, *, seconds: float | None = None) -> dict[str, Timing]:
    """Time how a bundle is opened by ONNX Runtime, and what of it is our own checks."""
    onnxruntime = import_onnxruntime("the benchmark", "cpu")

    def opened() -> None:
        VisionEncoder.open(bundle.path, backend="onnxruntime").close()

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return interleaved(
        {
            "ONNX Runtime alone": lambda: onnxruntime.InferenceSession(
                str(bundle.path / MODEL_FILE), options, providers=["CPUExecutionProvider"]
            ),
            "VisionEncoder.open": opened,
            "manifest": lambda: read_bundle(bundle.path, verify=False),
            "SHA-256 of every file": lambda: read_bundle(bundle.path, verify=True),
        },
        seconds=seconds,
    )


class Nothing:
    """A backend that takes no time: a call of an encoder around it is the host's part alone."""

    engine, device = None, "nothing"

    def __init__(self, bundle: Bundle) -> None:
        manifest, rng = bundle.manifest, np.random.default_rng(0)
        first = int(manifest.tower.cls_token and not manifest.selection.cls_token)
        kept = np.arange(first, first + manifest.selection.dominant, dtype=np.int64)
        count = _batch(bundle)
        self.outputs: dict[str, Any] = {KEPT: kept[None].repeat(count, axis=0)}
        (embeds,) = (output for output in manifest.outputs if output.name == EMBEDS)
        shape = (count, *map(int, embeds.shape[1:]))
        self.outputs[EMBEDS] = rng.standard_normal(shape).astype(embeds.dtype)
        if manifest.has_positions:
            own = np.maximum(kept - int(manifest.tower.cls_token), 0)
            merged = np.arange(manifest.selection.contextual, dtype=np.int64)
            self.outputs[POSITIONS] = np.append(own, merged)[None].repeat(count, axis=0)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """See `vzip.runtime.backends.Backend`."""
        assert len(feeds) == 1
        return dict(self.outputs)

    def close(self) -> None:
        """See `vzip.runtime.backends.Backend`."""


def _batch(bundle: Bundle) -> int:
    """Return the fewest images that the graph takes."""
    batch = bundle.manifest.batch
    return 1 if batch.dynamic else batch.max


def host(bundle: Bundle, *, seconds: float | None = None) -> dict[str, Timing]:
    """Time a call without what the backend does: checks of the input and of the tokens."""
    encoder = VisionEncoder(bundle, "nothing", Nothing(bundle))
    manifest = bundle.manifest
    pixels = np.zeros(
        tuple(map(int, (_batch(bundle), *manifest.input.shape[1:]))), manifest.input.dtype
    )
    side = manifest.preprocessing.image_size
    picture = Image.new("RGB", (side, side))
    return interleaved(
        {
            "run, of the tower's pixels": lambda: encoder.run(pixels),
            "encode, of a PIL image of the tower's size": lambda: encoder.encode(picture),
        },
        seconds=seconds,
    )


@contextlib.contextmanager
def exported(*arguments: str) -> Iterator[Path]:
    """Give a bundle that is exported for it, and is gone afterwards."""
    code = "import sys; from vzip.export.cli.export import vzip_export; sys.exit(vzip_export())"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        command = [sys.executable, "-c", code, *arguments, "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True)
        yield path


def measure(bundle: Path) -> Row:
    """Measure everything.

    Args:
        bundle: What is opened.

    Returns:
        What `table` takes.
    """
    result: Row = {
        "what": WHAT,
        "command": "python -m benchmarks.small_costs",
        "environment": machine(),
        "aim_ms": AIM_MS,
        "draft": DRAFT,
        "preprocessing": [],
        "empty": [
            {
                "cell": "preprocessing, open and host time on a Jetson or beside a GPU",
                "why": "no such machine could be reached",
            }
        ],
    }
    for kind, quality in PICTURES:
        data = jpeg(photograph(kind), quality)
        mean, largest = draft_difference(data, CLIP)
        row = {
            "picture": kind,
            "quality": quality,
            "megabytes": round(len(data) / 1e6, 2),
            "ms": _json(preprocessing(data)),
            "draft_mean_difference": mean,
            "draft_largest_difference": largest,
        }
        result["preprocessing"].append(row)
        print(json.dumps(row))
    with exported(*DEMO) as path:
        with VisionEncoder.open(path, backend="onnxruntime") as encoder:
            result["draft_agreement"] = draft_agreement(encoder)
        result["open"] = [_opened("demo model, FP32", path)]
    result["import"] = _json(imports())
    read = read_bundle(bundle, verify=False)
    name = f"{read.manifest.model.id}, {read.manifest.precision.upper()}"
    result["open"].append(_opened(name, bundle))
    result["host"] = {"bundle": name, "ms": _json(host(read, seconds=1.0))}
    result["peak_mib"] = peak_bytes() // 2**20
    return result


def _opened(name: str, path: Path) -> Row:
    bundle = read_bundle(path, verify=False)
    size = sum(entry.bytes for entry in bundle.manifest.files.values())
    return {"bundle": name, "megabytes": round(size / 1e6, 1), "ms": _json(opening(bundle))}


def _json(times: Mapping[str, Timing]) -> Row:
    return {name: timing.to_json() for name, timing in times.items()}


def table(result: Row) -> str:
    """Return the result as Markdown."""
    where = result["environment"]
    lines = [
        (
            f"`{result['command']}`; medians on {where['cores']} cores, {where['processor']}, "
            f"Pillow {where['packages']['pillow']}."
        ),
        "",
        "## A JPEG of 12 megapixels to pixel values of 3×336×336",
        "",
    ]
    columns = (
        "picture", "MB", "transformers", "exact", "of that decoding", "draft",
        "coefficients alone", "a draft is away by (of 255)",
    )  # fmt: skip
    ways = ("transformers", "exact", "decode", "draft", "coefficients")
    rows = [
        (
            f"{row['picture']}, quality {row['quality']}",
            f"{row['megabytes']:.1f}",
            *(f"{row['ms'][way]['median_ms']:.0f} ms" for way in ways),
            (
                f"{row['draft_mean_difference']:.2f} on average, "
                f"{row['draft_largest_difference']} at most"
            ),
        )
        for row in result["preprocessing"]
    ]
    lines += markdown.table(columns, rows)
    lines += ["", _verdict(result), "", _drafts(result["draft_agreement"])]
    lines += [
        "",
        "## Import: a Python that starts, imports and ends",
        "",
        *markdown.table(
            ("what", "ms"),
            [(name, f"{each['median_ms']:.0f}") for name, each in result["import"].items()],
        ),
    ]
    names = list(result["open"][0]["ms"])
    lines += [
        "",
        "## Open, ONNX Runtime on the CPU",
        "",
        *markdown.table(
            ("bundle", "MB", *names),
            [
                (
                    row["bundle"],
                    f"{row['megabytes']:.1f}",
                    *(f"{row['ms'][name]['median_ms']:.0f} ms" for name in names),
                )
                for row in result["open"]
            ],
        ),
        "",
        f"## Host time of a call, {result['host']['bundle']}",
        "",
        *markdown.table(
            ("what", "µs"),
            [
                (name, f"{1000 * each['median_ms']:.0f}")
                for name, each in result["host"]["ms"].items()
            ],
        ),
    ]
    lines += ["", *(f"Empty: {each['cell']}: {each['why']}." for each in result["empty"])]
    return "\n".join(lines) + "\n"


def _verdict(result: Row) -> str:
    """Return what became of the aim."""
    aim = result["aim_ms"]
    floor = [row["ms"]["coefficients"]["median_ms"] for row in result["preprocessing"]]
    draft = [row["ms"]["draft"]["median_ms"] for row in result["preprocessing"]]
    exact_ms = [row["ms"]["exact"]["median_ms"] for row in result["preprocessing"]]
    reached = sum(value <= aim for value in draft)
    return (
        f"The aim, {aim:.0f} ms, is reached for {reached} of {len(draft)} pictures with a draft "
        f"and for {sum(value <= aim for value in exact_ms)} without. Reading the coefficients "
        "alone, which no decoder of the whole picture can leave out and which one core does, "
        f"takes {min(floor):.0f} to {max(floor):.0f} ms here."
    )


def _drafts(agreement: Row) -> str:
    """Return what a draft does to tokens."""
    return (
        f"Tokens of drafts beside those of the exact pixels, demo model, {agreement['images']} "
        f"scenes of {agreement['side']}×{agreement['side']}: {agreement['mean_overlap']:.1%} of "
        f"the kept tokens are the same ({agreement['min_overlap']:.1%} at least), cosine "
        f"{agreement['mean_cosine']:.4f} on average, {agreement['min_cosine']:.4f} at least."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = results.parser(__doc__)
    parser.add_argument("--bundle", type=Path, help="to open, instead of a full-size one")
    options = parser.parse_args(arguments)
    given = contextlib.nullcontext(options.bundle) if options.bundle else exported(*FULL_SIZE)
    with given as bundle:
        result = measure(bundle)
    results.write(options.output, "small_costs", result, table)


if __name__ == "__main__":
    main()
