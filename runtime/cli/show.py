"""`vzip show`: which patches of an image a bundle keeps, drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from vzip.runtime.cli.asking import tell_if_animated
from vzip.runtime.cli.options import (
    Parser,
    add_bundle,
    add_encoder,
    add_output,
    add_tokens,
    refuse_swapped,
)
from vzip.runtime.console import emit, say
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import outputs


def main(argv: Sequence[str], *, prog: str) -> int:
    """Run ``vzip show``: draw which patches of an image a bundle keeps, and print the path."""
    parser = Parser(
        prog,
        "Draw which patches of an image are kept (clear), merged (tinted by group) and dimmed; "
        "of a nested selection, also the order in which they were chosen.",
    )
    add_bundle(parser)
    parser.add_argument("image", metavar="IMAGE", type=Path, help="an image file")
    add_encoder(parser)
    add_tokens(parser)
    add_output(parser, "FILE.png", "the picture to write")
    arguments = parser.read(argv)
    outputs.check_file(arguments.output, ".png")
    refuse_swapped(arguments.bundle, [arguments.image])

    from vzip.runtime.encoder import VisionEncoder
    from vzip.runtime.pictures.images import load_image
    from vzip.runtime.pictures.overlay import overlay
    from vzip.runtime.pictures.video import is_video

    if is_video(arguments.image):
        raise InvalidInputError(
            f"show: '{arguments.image}' is a video or a folder, but one image is drawn",
            cure="take a frame out of it",
        )
    image = load_image(arguments.image)
    tell_if_animated(arguments.image)
    with VisionEncoder.open(
        arguments.bundle, arguments.backend, arguments.engine, arguments.precision
    ) as encoder:
        manifest = encoder.manifest
        if manifest.tiling is not None:
            say("show: this bundle cuts tiles; the base tile is drawn")
        tokens = encoder.encode([image], tokens=arguments.tokens)
        groups = None
        if manifest.selection.contextual == 0:
            pass  # nothing is merged
        elif encoder.backend == "tensorrt":
            # An engine has no output for them; asking for groups there is an error.
            say(
                "show: a TensorRT engine can't tell which tokens were merged, so none are tinted; "
                "--backend onnxruntime tints them"
            )
        else:
            groups = tokens.groups[0]
        picture = overlay(
            image,
            tokens.kept[0],
            grid=manifest.tower.grid,
            cls_token=manifest.tower.cls_token,
            prep=manifest.preprocessing,
            groups=groups,
            rank=None if tokens.rank is None else tokens.rank[0],
        )
    data = io.BytesIO()
    picture.save(data, format="PNG")
    outputs.write_file(arguments.output, data.getvalue())
    emit(str(arguments.output))
    return 0
