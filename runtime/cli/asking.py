"""What `vzip ask` and `vzip chat` share: their options, and the conversation about the images."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, get_args

from vzip.runtime.cli.options import Parser, add_bundle, add_encoder, add_tokens, refuse_swapped
from vzip.runtime.console import say, watched
from vzip.runtime.errors import InvalidInputError, printable
from vzip.runtime.llm import DEFAULT_MAX_NEW_TOKENS, TokenSpec, check_max_new_tokens
from vzip.runtime.llm.opening import RUNNERS, own, parse
from vzip.runtime.llm.shown import unplaced_bundle
from vzip.runtime.pictures.frames import DEFAULT_FRAMES
from vzip.runtime.tokens.positions import EncodedImage, Positions

if TYPE_CHECKING:
    from PIL import Image

    from vzip.runtime.llm import Conversation


BOTH: Final = "both"


def parser_of(prog: str, description: str) -> Parser:
    """Return a parser with what both commands take."""
    parser = Parser(prog, description)
    add_bundle(parser)
    parser.add_argument(
        "images",
        metavar="IMAGE",
        type=Path,
        nargs="+",
        help="an image file or several, a video file, or a folder with a video's frames as images",
    )
    add_encoder(parser)
    add_tokens(parser)
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help=f"most frames of a video, evenly spaced (default: {DEFAULT_FRAMES})",
    )
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        type=Path,
        help="keep the images' tokens there, and take them from there: an image that was seen "
        "before is not encoded again",
    )
    parser.add_argument(
        "--llm",
        metavar="LLM",
        help="the LLM: a checkpoint's alias, folder or hub id, which transformers runs; or one of "
        + ", ".join(f"{name}:{runner.where}" for name, runner in RUNNERS.items())
        + " (default: the bundle's own, or that of the checkpoint it was exported from)",
    )
    parser.add_argument(
        "--positions",
        choices=(*get_args(Positions), BOTH),
        help="original: tokens keep the positions of their patches in the LLM; consecutive: they "
        "are numbered one after the other, as published; both: answer with either (default: "
        "original for LLaVA-1.5 and what is built like it, else consecutive)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=DEFAULT_MAX_NEW_TOKENS,
        metavar="N",
        help="longest answer, in the LLM's tokens (default: %(default)s)",
    )
    return parser


def check_numbers(command: str, arguments: argparse.Namespace) -> None:
    """Refuse numbers that make no sense, before any work is done."""
    check_max_new_tokens(command, arguments.max_new_tokens)
    if arguments.frames is not None and arguments.frames < 1:
        raise InvalidInputError(
            f"{command}: got --frames {arguments.frames}", expected="1 or more frames of a video"
        )


def conversations(arguments: argparse.Namespace) -> list[Conversation]:
    """Encode the images or the video and open the LLM; what fails fast comes first.

    Returns:
        One conversation, or two with ``--positions both``.
    """
    from vzip.runtime.backends import AUTO, CPU_ENGINES
    from vzip.runtime.bundle.reader import read_bundle
    from vzip.runtime.encoder import VisionEncoder
    from vzip.runtime.pictures.video import is_video, sample_frames
    from vzip.runtime.tokens.cached import CachedImages

    choice = None if arguments.llm is None else parse(arguments.llm)
    paths: list[Path] = arguments.images
    refuse_swapped(arguments.bundle, paths)
    video = any(is_video(path) for path in paths)
    frames: list[Image.Image] = []
    if video and arguments.cache is not None:
        raise InvalidInputError(
            "got --cache and a video",
            expected="images, whose tokens are what a cache holds",
            cure="leave --cache out",
        )
    framed = video or arguments.frames is not None  # frames of anything else: it says what is wrong
    if framed:
        if len(paths) > 1:
            raise InvalidInputError(
                f"got {len(paths)} files and folders",
                expected="one video or any number of images",
                cure="ask about one video at a time, or put its frames into one folder",
            )
        frames = sample_frames(paths[0], arguments.frames or DEFAULT_FRAMES)
    # Backends verify what they run.
    bundle = read_bundle(arguments.bundle, verify=False).to_run(arguments.precision)
    asked: Positions | Literal["both"] | None = arguments.positions
    if asked in ("original", BOTH) and bundle.manifest.span is None:
        raise unplaced_bundle(f"--positions {asked}")
    # Other backends run no CPU engines, whose tokens the cache then doesn't give either.
    wanted = bundle if arguments.backend in {AUTO, *CPU_ENGINES} else bundle.at(bundle.precision)
    budget: int | None = arguments.tokens
    images = CachedImages([] if framed else paths, wanted, arguments.cache, tokens=budget)
    for path in [] if framed else paths:
        tell_if_animated(path, "; give a folder of frames or a video for more")
    with contextlib.ExitStack() as stack:
        encoder = None
        if video or images.missing:
            opened = VisionEncoder.open(bundle, arguments.backend, arguments.engine)
            encoder = stack.enter_context(opened)
        TokenSpec.of(bundle.manifest)
        choice = choice or own(bundle)
        encoded: EncodedImage | list[EncodedImage]
        if encoder is not None and video:
            encoded = encoder.video_tokens(frames, tokens=budget)
        else:
            encoded = images.encoded(encoder)
    # The vision encoder is closed by now: its memory is the LLM's.
    _quiet()
    llm = choice.open(bundle)
    kinds = get_args(Positions) if asked == BOTH else (asked,)
    count = len(frames) if video else None
    return [
        llm.conversation(encoded, frames=count, **({} if each is None else {"positions": each}))
        for each in kinds
    ]


def label(conversation: Conversation, arguments: argparse.Namespace) -> str:
    """Return what an answer begins with, so that two are told apart."""
    return f"{conversation.positions}: " if arguments.positions == BOTH else ""


def tell_if_animated(path: Path, more: str = "") -> None:
    """Say that an image has more frames than the one that is taken, and `more` about it."""
    from vzip.runtime.pictures.images import is_animated

    if is_animated(path):
        say(f"{printable(path.name)} is animated: its first frame is taken{more}")


def _quiet() -> None:
    """Silence the libraries' warnings, and their progress bars unless someone is watching."""
    try:
        from huggingface_hub.utils.tqdm import disable_progress_bars
        from transformers.utils import logging
    except ImportError:
        return  # opening the LLM says what is missing
    logging.set_verbosity_error()
    if not watched():
        logging.disable_progress_bar()
        disable_progress_bars()
