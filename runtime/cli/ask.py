"""The commands of `vzip` that run a bundle: ask, chat and show."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vzip.runtime.cli.options import add_encoder
from vzip.runtime.console import emit
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.llm import (
    DEFAULT_MAX_NEW_TOKENS,
    ImageTokens,
    check_max_new_tokens,
    check_question,
)
from vzip.runtime.llm.programs import ENGINES, own, parse
from vzip.runtime.pictures.frames import DEFAULT_FRAMES

if TYPE_CHECKING:
    from PIL import Image

    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.encoder import VisionEncoder
    from vzip.runtime.llm import Conversation, Embeds


_SHOWN = "an image file or several, a video file, or a folder with a video's frames as images"


def ask(argv: Sequence[str], *, prog: str) -> int:
    """Run ``vzip ask``: print the answer to one question, and nothing else, on stdout."""
    parser = _parser(prog, "Answer one question about images or a video.", _SHOWN, "+")
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    _add_llm(parser)
    # Several images, an option and the question: plain parse_args takes the last image for it.
    arguments = parser.parse_intermixed_args(argv)
    check_question("ask", arguments.question)
    _check_llm_options("ask", arguments)
    conversation = _conversation(arguments)
    emit(conversation.ask(arguments.question, max_new_tokens=arguments.max_new_tokens))
    return 0


def chat(argv: Sequence[str], *, prog: str) -> int:
    """Run ``vzip chat``: a question per line of stdin, its answer on stdout as it is made."""
    parser = _parser(
        prog,
        "Answer questions about images or a video, one per line of standard input, until it "
        "ends. They are encoded once, and every question sees the ones before it.",
        _SHOWN,
        "+",
    )
    _add_llm(parser)
    arguments = parser.parse_intermixed_args(argv)
    _check_llm_options("chat", arguments)
    if sys.stdin is None:
        raise InvalidInputError(
            "chat: standard input is closed, so there are no questions",
            cure="start it without '<&-'",
        )
    conversation = _conversation(arguments)
    for question in _questions():
        _answer(conversation, question, arguments.max_new_tokens)
    return 0


def show(argv: Sequence[str], *, prog: str) -> int:
    """Run ``vzip show``: draw which patches of an image a bundle keeps, and print the path."""
    parser = _parser(
        prog,
        "Draw which patches of an image are kept (clear), merged (tinted by group) and dimmed.",
        "an image file",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE.png", type=Path, required=True, help="the picture to write"
    )
    arguments = parser.parse_args(argv)
    _check_output(arguments.output)

    from vzip.runtime.encoder import VisionEncoder
    from vzip.runtime.files import atomic
    from vzip.runtime.pictures.images import load_image
    from vzip.runtime.pictures.overlay import overlay
    from vzip.runtime.pictures.video import is_video

    if is_video(arguments.image):
        raise InvalidInputError(
            f"show: '{arguments.image}' is a video or a folder, but one image is drawn",
            cure="take a frame out of it",
        )
    image = load_image(arguments.image)
    _tell_if_animated(arguments.image)
    with VisionEncoder.open(
        arguments.bundle, arguments.backend, arguments.engine, arguments.precision
    ) as encoder:
        manifest = encoder.manifest
        if manifest.tiling is not None:
            _tell("show: this bundle cuts tiles; the base tile is drawn\n")
        tokens = encoder.encode([image])
        groups = None
        if encoder.backend == "tensorrt":
            # An engine has no output for them; asking for groups there is an error.
            print(  # noqa: T201
                "show: a TensorRT engine can't tell which tokens were merged, so none are tinted; "
                "--backend onnxruntime tints them",
                file=sys.stderr,
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
        )
    data = io.BytesIO()
    picture.save(data, format="PNG")
    try:
        atomic.replace_file(arguments.output, data.getvalue())
    except OSError as error:
        raise InvalidInputError(
            f"show: '{arguments.output}' can't be written ({error.strerror})",
            cure="give a file in a folder that you may write to, on a disk with room",
        ) from error
    emit(str(arguments.output))
    return 0


def _parser(
    prog: str, description: str, shown: str, count: str | None = None
) -> argparse.ArgumentParser:
    """Return a parser with what all three commands take; `count` is argparse's ``nargs``."""
    # No abbreviations: a new option would change what an old script says.
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument(
        "bundle", metavar="BUNDLE", type=Path, help="the folder that 'vzip export' wrote"
    )
    name = "image" if count is None else "images"
    parser.add_argument(name, metavar="IMAGE", type=Path, help=shown, nargs=count)
    add_encoder(parser)
    return parser


def _add_llm(parser: argparse.ArgumentParser) -> None:
    """Add what ask and chat take beyond that."""
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
        help="keep the images' tokens there, and take them from there: a picture that was seen "
        "before is not encoded again",
    )
    parser.add_argument(
        "--llm",
        metavar="LLM",
        help="the LLM: a checkpoint's alias, folder or hub id, which transformers runs; or one of "
        + ", ".join(f"{name}:{engine.where}" for name, engine in ENGINES.items())
        + " (default: the bundle's own, or that of the checkpoint it was exported from)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=DEFAULT_MAX_NEW_TOKENS,
        metavar="N",
        help="longest answer, in the LLM's tokens (default: %(default)s)",
    )


def _check_llm_options(command: str, arguments: argparse.Namespace) -> None:
    """Refuse numbers that make no sense, before any work is done."""
    check_max_new_tokens(command, arguments.max_new_tokens)
    if arguments.frames is not None and arguments.frames < 1:
        raise InvalidInputError(
            f"{command}: got --frames {arguments.frames}",
            cause="it takes 1 or more frames of a video",
        )


def _conversation(arguments: argparse.Namespace) -> Conversation:
    """Encode the images or the video and open the LLM; what fails fast comes first."""
    from vzip.runtime.bundle.reader import read_bundle
    from vzip.runtime.encoder import VisionEncoder
    from vzip.runtime.pictures.video import is_video, sample_frames

    choice = None if arguments.llm is None else parse(arguments.llm)
    paths: list[Path] = arguments.images
    video = any(is_video(path) for path in paths)
    frames: list[Image.Image] = []
    files: list[tuple[Path, bytes]] = []
    if video and arguments.cache is not None:
        raise InvalidInputError(
            "got --cache and a video",
            expected="images, whose tokens are what a cache holds",
            cure="leave --cache out",
        )
    if video or arguments.frames is not None:  # frames of anything else: it says what is wrong
        if len(paths) > 1:
            raise InvalidInputError(
                f"got {len(paths)} files and folders",
                expected="one video or any number of images",
                cure="ask about one video at a time, or put its frames into one folder",
            )
        frames = sample_frames(paths[0], arguments.frames or DEFAULT_FRAMES)
    else:
        files = [(path, _read(path)) for path in paths]
    # Backends verify what they run.
    bundle = read_bundle(arguments.bundle, verify=False).to_run(arguments.precision)
    images = _Images(files, bundle, arguments.cache)
    with contextlib.ExitStack() as stack:
        encoder = None
        if video or images.missing:
            opened = VisionEncoder.open(bundle, arguments.backend, arguments.engine)
            encoder = stack.enter_context(opened)
        ImageTokens.of(bundle.manifest)
        choice = choice or own(bundle)
        embeds: Embeds | list[Embeds]
        if encoder is not None and video:
            embeds = encoder.video_embeds(frames)
        else:
            embeds = images.embeds(encoder)
    # The vision encoder is closed by now: its memory is the LLM's.
    _quiet()
    return choice.open(bundle).conversation(embeds, frames=len(frames) if video else None)


class _Images:
    """The images of a command line, and what a cache holds of them already.

    Attributes:
        missing: SHA-256 → image, of those that must be encoded.
    """

    def __init__(
        self, files: Sequence[tuple[Path, bytes]], bundle: Bundle, folder: Path | None
    ) -> None:
        """Look the images up, and decode those that are in no cache.

        Args:
            files: Path and content of each.
            bundle: The bundle whose tokens are wanted.
            folder: That of the cache; None for none.
        """
        from vzip.runtime.tokens.cache import TokenCache, image_digest, origin_of

        self.missing: dict[str, Image.Image] = {}
        self._origin = origin_of(bundle.manifest, bundle.quantised, fastest=bundle.fastest)
        self._cache = None if folder is None else TokenCache(folder)
        self._digests = [image_digest(data) for _, data in files]
        self._tokens: dict[str, Embeds] = {}
        for digest, (path, data) in zip(self._digests, files, strict=True):
            found = None
            if self._cache is not None:
                found = self._cache.get(digest, self._origin.fingerprint)
            if found is not None:
                self._tokens[digest] = found.tokens
            elif digest not in self.missing:
                self.missing[digest] = _decoded(path, data)
            _tell_if_animated(path, "; give a folder of frames or a video for more")

    def embeds(self, encoder: VisionEncoder | None) -> list[Embeds]:
        """Return the tokens of all images in order; None will do if none is missing."""
        from vzip.runtime.tokens.file import ImageTokens as Entry

        for digest, image in self.missing.items():
            assert encoder is not None
            encoded = encoder.image_tokens(image)
            self._tokens[digest] = encoded.embeds
            if self._cache is not None:
                self._cache.put(self._origin, Entry(digest, digest, *encoded))
        return [self._tokens[digest] for digest in self._digests]


def _read(path: Path) -> bytes:
    """Return an image file's bytes: those that are hashed are those that are encoded."""
    from vzip.runtime.tokens.cache import read_image

    return read_image(path)


def _decoded(path: Path, data: bytes) -> Image.Image:
    """Return the image of a file's bytes; where a video would have done as well, say so."""
    from vzip.runtime.pictures.images import load_image
    from vzip.runtime.pictures.video import CONTAINERS

    try:
        try:
            return load_image(data)
        except InvalidInputError:
            load_image(path)  # says what is wrong, and of which file
            raise
    except InvalidInputError as error:
        if "is not in a format read here" not in str(error):
            raise
        raise InvalidInputError(
            f"{error}, or, for a video, one of {', '.join(CONTAINERS)}"
        ) from error


def _tell_if_animated(path: Path, more: str = "") -> None:
    """Say that an image has more frames than the one that is taken, and `more` about it."""
    if _is_animated(path):
        _tell(f"{path.name} is animated: its first frame is taken{more}\n")


def _is_animated(path: Path) -> bool:
    """Return whether an image that `load_image` took has more frames than the one it gives."""
    from PIL import Image, WebPImagePlugin  # noqa: F401  Pillow registers WebP when it is imported

    # A phone's multi-picture JPEG has several pictures too, of which the first is the photo.
    kinds = ("GIF", "PNG", "WEBP")
    # On hostile bytes behind the first frame a decoder may raise anything.
    with contextlib.suppress(Exception), Image.open(path) as picture:
        return picture.format in kinds and getattr(picture, "is_animated", False)
    return False


def _answer(conversation: Conversation, question: str, max_new_tokens: int) -> None:
    """Print an answer as it is made."""
    try:
        for piece in conversation.stream(question, max_new_tokens=max_new_tokens):
            emit(piece, end="")
        emit("")
    except InvalidInputError as error:
        # At a terminal there is somebody to ask again; in a pipe a lost answer would shift all
        # that follow.
        if not sys.stdin.isatty():
            raise
        _tell(f"vzip: error: {error}\n")


def _quiet() -> None:
    """Silence the libraries' warnings, and their progress bars unless someone is watching."""
    try:
        from huggingface_hub.utils.tqdm import disable_progress_bars
        from transformers.utils import logging
    except ImportError:
        return  # opening the LLM says what is missing
    logging.set_verbosity_error()
    if sys.stderr is None or not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bars()


def _questions() -> Iterator[str]:
    """Yield the lines of standard input that are not blank, with a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            _tell("> ")
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise InvalidInputError(
                f"chat: standard input is not UTF-8 text ({error.reason})",
                cure="convert the questions to UTF-8",
            ) from error
        if not line:
            if sys.stdin.isatty():
                _tell("\n")
            return
        if line.strip():
            yield line


def _tell(text: str) -> None:
    """Write to the person at the terminal, beside the answers."""
    if sys.stderr is not None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _check_output(path: Path) -> None:
    """Refuse an output file that can't be written, before any work is done.

    Raises:
        InvalidInputError: Another extension than .png, a folder, or a folder that is not there.
    """
    if path.suffix.lower() != ".png":
        raise InvalidInputError(
            f"show: -o is '{path}', but the picture is a PNG",
            cure="give a file name that ends with .png",
        )
    if path.is_dir():
        raise InvalidInputError(
            f"show: -o is '{path}', which is a folder",
            cure="give a file name in it",
        )
    if not path.parent.is_dir():
        raise InvalidInputError(
            f"show: -o is '{path}', but the folder '{path.parent}' does not exist",
            cure="create it first",
        )
