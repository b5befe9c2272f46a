"""What rounding costs each token of real towers: the untouched model, and vzip's graphs.

    python -m benchmarks.token_errors [--towers NAME …] [--pictures N] [-o FOLDER]

Each tower is exported in FP32 and FP16 and compared on photographs, all at 64 tokens. "own" is the
untouched model that computes in a precision, beside itself in FP64 (FP32 and BF16) or FP32 (FP16):
the floors that a bundle's reference.npz holds. "graph" is vzip's graph; FP16 and BF16 in true half
precision, one rounding behind every operator, and FP16 once more as ONNX Runtime's CPU computes it,
which is in FP32. Ran on a CPU; no GPU is in it. Writes benchmarks/results/token_errors.{json,md}.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks.harness import results
from benchmarks.real.pictures import pictures
from benchmarks.real.towers import checkpoint
from vzip.export import export
from vzip.export.parity.rounded import open_rounded
from vzip.runtime.agreement import Values, compare, load_reference
from vzip.runtime.backends import open_backend
from vzip.runtime.backends.protocol import Backend
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.machine.record import machine

TOWERS = ("clip-b16-224", "clip-b16-384", "dinov2-s14-336")
TOKENS = 64
Row = dict[str, Any]


def numbers(errors: NDArray[Any], cosines: NDArray[Any]) -> dict[str, float]:
    """Return quantiles of tokens' errors, and the mean and lowest of their cosines."""
    found = {
        name: float(np.quantile(errors, share))
        for name, share in (("median", 0.5), ("p95", 0.95), ("p99", 0.99), ("worst", 1.0))
    }
    return {**found, "mean_cosine": float(cosines.mean()), "lowest_cosine": float(cosines.min())}


def rows(tower: str, photographs: list[Path], folder: Path) -> list[Row]:
    """Measure a tower."""
    found: list[Row] = []

    def add(precision: str, what: str, values: dict[str, float]) -> None:
        found.append({"tower": tower, "precision": precision, "what": what, **values})

    for dtype in ("fp32", "fp16"):
        path = folder / f"{tower}-{dtype}"
        export(
            checkpoint(tower), path, dtype=dtype, tokens=TOKENS, check_images=photographs,
            say=lambda _: None,
        )  # fmt: skip
        bundle = read_bundle(path)
        for precision, floor in load_reference(bundle).floors.items():
            if dtype == "fp32" or precision == "fp16":
                flat = floor.reshape(-1, 2).astype(np.float64)
                add(precision, "own", numbers(flat[:, 0], 1 - flat[:, 1]))
        for precision, what, opened in _runs(bundle, dtype):
            every = _compared(bundle, opened)
            add(precision, what, numbers(every.errors, every.cosines))
    return found


def _runs(bundle: Bundle, dtype: str) -> list[tuple[str, str, Callable[[], Backend]]]:
    def plain() -> Backend:
        return open_backend("onnxruntime", bundle)[1]

    if dtype == "fp32":
        return [
            ("fp32", "graph", plain),
            ("bf16", "graph", lambda: open_rounded(bundle, narrow=ir.DataType.BFLOAT16)),
        ]
    return [
        ("fp16", "graph", lambda: open_rounded(bundle)),
        ("fp16", "graph, ONNX Runtime's CPU", plain),
    ]


def _compared(bundle: Bundle, opened: Callable[[], Backend]) -> Values:
    """Compare the tokens that both keep, and merged ones of the same target."""
    reference, manifest, backend = load_reference(bundle), bundle.manifest, opened()
    name, count = manifest.input.name, len(reference.input)
    try:
        made = [backend.run({name: reference.input[[each]]}) for each in range(count)]
    finally:
        backend.close()
    return compare([reference.outputs([each]) for each in range(count)], made, manifest).kept


def page(result: dict[str, Any]) -> str:
    """Return a result as Markdown."""
    lines = [
        "# Errors per token",
        "",
        f"Written by `{result['command']}`, on {len(result['photographs'])} photographs, on a CPU.",
        "Largest difference of a token's numbers, relative to the largest in the picture's tokens.",
        "`own`: the untouched model in this precision, all tokens; `graph`: kept tokens.",
        "",
        "| tower | precision | what | median | 95 % | 99 % | worst | mean cosine | lowest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        errors = " | ".join(f"{row[name]:.1e}" for name in ("median", "p95", "p99", "worst"))
        lines.append(
            f"| {row['tower']} | {row['precision'].upper()} | {row['what']} | {errors} | "
            f"{row['mean_cosine']:.7f} | {row['lowest_cosine']:.5f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = results.parser(__doc__)
    parser.add_argument("--towers", nargs="+", default=TOWERS, metavar="NAME")
    parser.add_argument("--pictures", type=int, default=18, metavar="N")
    options = parser.parse_args()
    photographs = pictures()[: options.pictures]
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for tower in options.towers:
            found += rows(tower, photographs, Path(folder))
            result = {
                "command": f"python -m benchmarks.token_errors --pictures {options.pictures}",
                "environment": machine(),
                "tokens": TOKENS,
                "photographs": [each.name for each in photographs],
                "rows": found,
            }
            results.write(options.output, "token_errors", result, page)


if __name__ == "__main__":
    main()
