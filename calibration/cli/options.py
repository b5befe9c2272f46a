"""Options that the commands of calibration share."""

from __future__ import annotations

import argparse


def add_images(
    parser: argparse.ArgumentParser, *, default: str = "", required: bool = False
) -> None:
    """Add ``--images``, images like those that will be asked about.

    Args:
        parser: Of the command.
        default: What the help says of images that are not given.
        required: Whether they must be given.
    """
    parser.add_argument(
        "--images",
        required=required,
        metavar="FOLDER|LIST|demo",
        help="images like those that will be asked about: a folder, a text file with one path a "
        f"line, or the demo's generator{default}",
    )
