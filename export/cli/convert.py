"""`vzip convert`: the language model of a LLaVA as a file of another engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vzip.runtime.cli.options import Parser
from vzip.runtime.console import emit, say
from vzip.runtime.errors import require
from vzip.runtime.files import outputs
from vzip.runtime.models import ALIASES, locate


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write a GGUF.

    Args:
        argv: The arguments.
        prog: The command's name, for its help.

    Returns:
        The exit status.
    """
    arguments = _parser(prog).read(argv)
    outputs.check_file(arguments.gguf, ".gguf")
    locate(arguments.model)
    require("torch", "transformers", "safetensors", "gguf", needed_for=f"'{prog}'", extra="export")
    from vzip.export.llm.gguf import convert

    convert(
        arguments.model,
        arguments.gguf,
        revision=arguments.revision,
        step=lambda name: say(f"{name} …"),
    )
    emit(str(arguments.gguf))
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Write the language model of a LLaVA as a GGUF, in the checkpoint's precision, "
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
