"""`vzip convert`: the language model of a LLaVA as a file of another engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vzip.runtime.console import emit
from vzip.runtime.errors import InvalidInputError, require
from vzip.runtime.models import ALIASES, locate


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write a GGUF.

    Args:
        argv: The arguments.
        prog: The command's name, for its help.

    Returns:
        The exit status.
    """
    arguments = _parser(prog).parse_args(argv)
    _check_output(arguments.gguf)
    locate(arguments.model)
    require("torch", "transformers", "safetensors", "gguf", needed_for=f"'{prog}'", extra="export")
    from vzip.export.llm.gguf import convert

    convert(
        arguments.model,
        arguments.gguf,
        revision=arguments.revision,
        step=lambda name: print(f"{name} …", file=sys.stderr),  # noqa: T201 - a command line's
    )
    emit(str(arguments.gguf))
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,  # a new option would change what an old script says
        description="Write the language model of a LLaVA as a GGUF, in the checkpoint's precision, "
        "for 'vzip ask --llm llama.cpp:FILE.gguf'. To make it smaller, use llama.cpp's "
        "llama-quantize.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help=f"an alias ({', '.join(ALIASES)}), a hub id, or a folder"
    )
    parser.add_argument(
        "--gguf", metavar="FILE.gguf", type=Path, required=True, help="the file to write"
    )
    parser.add_argument("--revision", help="commit, branch or tag of a hub id")
    return parser


def _check_output(path: Path) -> None:
    """Refuse an output file that can't be written, before any work is done.

    Raises:
        InvalidInputError: Another extension than .gguf, a folder, or in a folder that is not there.
    """
    if path.suffix.lower() != ".gguf":
        raise InvalidInputError(
            f"convert: --gguf is '{path}'",
            expected="a file name that ends with .gguf",
            cure="give one",
        )
    if path.is_dir():
        raise InvalidInputError(
            f"convert: --gguf is '{path}', which is a folder",
            cure="give a file in it",
        )
    if not path.parent.is_dir():
        raise InvalidInputError(
            f"convert: --gguf is '{path}', but the folder '{path.parent}' does not exist",
            cure="create it first",
        )
