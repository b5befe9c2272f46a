"""`vzip convert`: the language model of a LLaVA as a file that llama.cpp runs."""

from __future__ import annotations

from collections.abc import Sequence

from vzip.export.cli.options import add_model
from vzip.runtime.cli.options import Parser, add_output
from vzip.runtime.console import emit, say
from vzip.runtime.errors import InvalidInputError, require
from vzip.runtime.files import outputs
from vzip.runtime.models import locate

RENAMED = {
    "--gguf": "--model MODEL --to gguf -o FILE.gguf",
}
"""Old name of an option → its name today."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write a GGUF."""
    arguments = _parser(prog).read(argv)
    outputs.check_file(arguments.output, ".gguf")
    if arguments.output.exists() and not arguments.replace:
        raise InvalidInputError(
            f"the output '{arguments.output}' is there already and would be lost",
            cure="choose another name with -o, or say --replace",
        )
    locate(arguments.model)
    needed = ("torch", "transformers", "safetensors", "gguf", "tokenizers", "jinja2")
    require(*needed, needed_for=f"'{prog}'", extra="export")
    from vzip.export.llm.gguf import convert

    convert(
        arguments.model,
        arguments.output,
        revision=arguments.revision,
        positions=arguments.positions,
        step=lambda name: say(f"{name} …"),
    )
    emit(str(arguments.output))
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Write the language model of a LLaVA as a GGUF, in the checkpoint's precision, "
        "for 'vzip ask --llm llama.cpp:FILE.gguf'. To make it smaller, use llama.cpp's "
        "llama-quantize.",
        renamed=RENAMED,
    )
    add_model(parser)
    parser.add_argument(
        "--to", choices=("gguf",), required=True, help="the format: gguf, which llama.cpp reads"
    )
    add_output(parser, "FILE.gguf", "the file to write")
    parser.add_argument(
        "--positions",
        action="store_true",
        help="a file in which compressed tokens keep their original positions, which llama.cpp "
        "takes of this form alone (docs/positions.md)",
    )
    parser.add_argument("--replace", action="store_true", help="replace a file of that name")
    return parser
