"""`vzip bench`: how fast bundles run here, beside peers; nothing heavy is imported for `-h`."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vzip.export.pages import figures, rendering
from vzip.runtime.cli.options import Parser, add_output, add_threads, names
from vzip.runtime.console import emit, emit_json, say
from vzip.runtime.errors import InvalidInputError, require
from vzip.runtime.files import outputs

NOTHING_RAN = 1
WAIT_S = 30.0  # for a machine that nobody else uses

PLOT, PAGE = "the plot of a benchmark", "the page of a benchmark"


def main(argv: Sequence[str], *, prog: str) -> int:
    """Measure bundles, print the table, and write what ``-o`` asks for.

    Returns:
        0; 1 if no encoder could be timed.
    """
    arguments = _parser(prog).read(argv)
    folder: Path | None = arguments.output
    if folder is not None:
        outputs.check_folder(folder)
        _tell_lacking()
    if arguments.rounds < 1:
        raise InvalidInputError(
            f"--rounds is {arguments.rounds}",
            expected="at least 1",
        )
    bundles = _bundles(arguments.bundles)
    if arguments.peers:
        require("torch", "transformers", "onnxruntime", needed_for="--peers", extra="export")
    from vzip.export.bench.measure import Wanted, bench
    from vzip.export.bench.output import table, without_paths
    from vzip.runtime.doctor.environment import gpus

    wanted = Wanted(
        peers=arguments.peers,
        only=arguments.only,
        batches=arguments.batches,
        rounds=arguments.rounds,
        device="cpu" if isinstance(gpus(), str) else "cuda",
        wait_s=arguments.wait,
    )
    command = shlex.join([*prog.split(), *argv])
    result = without_paths(bench(bundles, wanted, command=command, say=say))
    for each in result.get("warnings", ()):
        say(f"warning: {each}")
    paths: list[Path] = []
    try:
        if folder is not None:
            paths = write(result, folder)
    finally:  # what was measured is told, wherever it can be
        if arguments.json:
            emit_json(result)
        else:
            emit(table(result), end="")
    for path in paths:
        (say if arguments.json else emit)(str(path))
    ran = any(row["kind"] in ("ours", "peer") for row in result["rows"])
    return 0 if ran else NOTHING_RAN


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a result and its table, then plots and a page as far as they can be made here.

    Each file is there whole or not at all.

    Raises:
        InvalidInputError: The folder can't be written.
    """
    from vzip.export.bench.output import plot, table
    from vzip.export.bench.page import page

    written = outputs.write_folder(
        folder,
        {
            "result.json": json.dumps(result, indent=1, allow_nan=False) + "\n",
            "result.md": table(result),
        },
    )
    svg = None
    if any(row["kind"] != "phase" for row in result["rows"]) and figures.lacking(PLOT) is None:
        svg = plot(result, "svg")
        files = {"result.svg": svg, "result.png": plot(result, "png")}
        written += outputs.write_folder(folder, files)
    if rendering.lacking(PAGE) is None:
        written += outputs.write_folder(folder, {"result.html": page(result, svg)})
    return written


def _tell_lacking() -> None:
    """Say which files will not be written, before anything is measured."""
    for kind, error in (("plot", figures.lacking(PLOT)), ("page", rendering.lacking(PAGE))):
        if error is not None:
            say(f"warning: no {kind} will be written: {error}")


def _bundles(folders: Sequence[Path]) -> Mapping[str, Any]:
    """Return the bundles by the names of their folders."""
    from vzip.runtime.bundle.reader import read_bundle

    found = {}
    for folder in folders:
        name = folder.resolve().name
        if name in found:
            raise InvalidInputError(
                f"got two bundles whose folders are called '{name}', by which the result tells "
                "them apart",
                cure="rename one",
            )
        found[name] = read_bundle(folder, verify=False)  # what runs is verified when it is opened
    return found


def _batches(text: str) -> tuple[int, ...]:
    """Return the numbers of a list with commas, the smallest first."""
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts) or len({*parts}) < len(parts):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected different numbers from 1 on, such as 1,8,32"
        )
    return tuple(sorted(map(int, parts)))


def _seconds(text: str) -> float:
    """Return how long to wait, a number of seconds from 0 on."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds, 0 for not at all")
    return seconds


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Time every backend, engine and precision of bundles on this machine, each in a process "
        "of its own, in turns. Tokens are compared with the bundle's reference first. The "
        "matrix multiplications alone are timed too, and peers with --peers. The result warns of "
        "a machine in use. Exit status 1 if nothing could be timed.",
        table=True,
    )
    parser.add_argument(
        "bundles", metavar="BUNDLE", nargs="+", type=Path, help="folder of a bundle"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also PyTorch as published and at its best, ONNX Runtime and OpenVINO as they come "
        "(torch.compile with --only torch-compile alone)",
    )
    parser.add_argument(
        "--only",
        type=names(),
        default=(),
        metavar="NAME,NAME,…",
        help="these alone, by their names in the table: onnxruntime, openvino:bf16, …",
    )
    parser.add_argument(
        "--batches",
        type=_batches,
        default=(),
        metavar="N,N,…",
        help="images in a call (default: 1, or a static bundle's own batch)",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="turns of each (default: %(default)s)"
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=WAIT_S,
        metavar="S",
        help="seconds to wait, at most, until other programs leave the machine alone; 0 takes it "
        "as it is (default: %(default)g)",
    )
    add_output(parser, "FOLDER", "where result.json, .md, .svg, .png and .html go", required=False)
    add_threads(parser)
    return parser
