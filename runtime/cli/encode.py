"""The command `vzip encode`: images in, a file of compressed tokens out."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vzip.runtime.cli.options import Parser, add_bundle, add_encoder, add_output, refuse_swapped
from vzip.runtime.console import complain, emit, progress, say
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import outputs
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from vzip.runtime.tokens.job import Found

LEFT_OUT = 1  # the exit status where some files were not encoded
_SUFFIXES = (".safetensors", ".npy")


def main(argv: Sequence[str], *, prog: str) -> int:
    """Run ``vzip encode``: write tokens, and print the path of each file that holds them."""
    parser = Parser(
        prog,
        "Write the compressed tokens of images to a file. After an interruption, the "
        "same command goes on where it stopped.",
        epilog="Damaged images, and files that were named and are no images, are left out and "
        "named on standard error; the exit status is 1 then. A folder's other files are passed "
        "over.",
    )
    add_bundle(parser)
    parser.add_argument(
        "images",
        metavar="IMAGES",
        type=Path,
        nargs="+",
        help="image files, and folders, which are searched with all folders below them",
    )
    add_output(parser, "FILE", "the file to write: .safetensors; or .npy, the tokens alone")
    parser.add_argument(
        "--shard-size",
        type=int,
        metavar="N",
        help="write files of N images each, FILE-00001-of-….safetensors (default: one file)",
    )
    parser.add_argument(
        "--several",
        action="store_true",
        help="tokens for prompts that hold several images: LLaVA-OneVision cuts none of them into "
        "tiles then",
    )
    add_encoder(parser)
    arguments = parser.read(argv)
    _check_options(arguments.output, arguments.shard_size)
    refuse_swapped(arguments.bundle, arguments.images)
    return _encode(arguments)


def _encode(arguments: argparse.Namespace) -> int:
    """Find the images, encode them, and say what was left out."""
    from vzip.runtime.bundle.reader import read_bundle
    from vzip.runtime.encoder import VisionEncoder
    from vzip.runtime.tokens.cache import encoder_origin
    from vzip.runtime.tokens.job import (
        EncodeJob,
        check_origin,
        find_images,
        outputs_of,
        work_store,
    )

    output: Path = arguments.output
    found = find_images(arguments.images, output)
    # The encoder verifies what it runs.
    bundle = read_bundle(arguments.bundle, verify=False).to_run(arguments.precision)
    if "image" not in bundle.manifest.media:
        raise InvalidInputError(
            "encode: got images, but this bundle takes video alone",
            cure="make another with 'vzip export --media image'",
        )
    files = outputs_of(found.images, output, arguments.shard_size)
    with contextlib.ExitStack() as stack:
        encoder = stack.enter_context(
            VisionEncoder.open(bundle, arguments.backend, arguments.engine)
        )
        # A CPU engine's tokens are others than the graph's.
        origin = encoder_origin(encoder, several=arguments.several)
        check_origin(files, origin)
        store = stack.enter_context(work_store(output, origin))
        job = EncodeJob(encoder, origin, store, files, several=arguments.several)
        images = progress(found.images, desc="encoding", total=len(found.images), unit="image")
        job.run(images)
        left_out = [*found.left_out, *job.left_out]
        _tell(left_out, found)
        if left_out and output.suffix == ".npy":
            raise InvalidInputError(
                f"encode: nothing was written, since {output} would not say which images its "
                "rows are",
                cure=(
                    "mend or remove those left out and start again, which goes on from here, or "
                    "write a .safetensors"
                ),
            )
    for path in job.written:
        emit(str(path))
    return LEFT_OUT if left_out else 0


def _tell(left_out: Sequence[tuple[str, str]], found: Found) -> None:
    """Say what was not encoded: images, which is why the exit status is not 0, and other files."""
    if found.others:
        count = len(found.others)
        what = "1 file that is no image" if count == 1 else f"{count} files that are no images"
        say(f"encode: passed over {what}, such as {found.others[0]!r}")
    for name, why in left_out:
        complain(f"encode: left out {name!r}: {why}")
    if left_out:
        hidden = f" ({found.hidden} hidden passed over)" if found.hidden else ""
        count = len(found.images) + len(found.left_out)
        complain(f"encode: left out {len(left_out)} of {counted(count, 'image')}{hidden}")


def _check_options(output: Path, shard_size: int | None) -> None:
    """Refuse what makes no sense, before any work is done.

    Raises:
        InvalidInputError: An output that can't be written, a size below 1, or shards of a format
            that can't name its images.
    """
    outputs.check_file(output, *_SUFFIXES, exact=True)
    if shard_size is not None and shard_size < 1:
        raise InvalidInputError(
            f"encode: got --shard-size {shard_size}",
            expected="1 or more images a file",
        )
    if shard_size is not None and output.suffix == ".npy":
        raise InvalidInputError(
            "encode: got --shard-size with a .npy file, which can't say which images its rows are",
            cure="write shards as .safetensors",
        )
