"""The command line `vzip`: a table of commands, each imported only when it is called.

A command is a function ``main(argv: Sequence[str], *, prog: str) -> int`` that returns its exit
status; `vzip.runtime.console` says which there are. Nothing but the standard library is imported
here, so that ``vzip -h`` is quick and works wherever vzip is installed, and the runtime names
``vzip.export`` without importing it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from vzip.runtime.console import FAILED, run_command
from vzip.runtime.errors import VzipError

PROG = "vzip"


@dataclass(frozen=True)
class Command:
    """One entry of the table.

    Attributes:
        target: Where the function is, as ``module:function``.
        help: What the command does, in one line.
    """

    target: str
    help: str


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "export": Command("vzip.export.cli:main", "make a bundle from a checkpoint"),
        "check": Command(
            "vzip.export.cli:check_main", "compare a bundle with the untouched PyTorch model"
        ),
        "convert": Command(
            "vzip.export.convert_cli:main", "write a checkpoint's language model as a GGUF"
        ),
        "models": Command("vzip.export.models_cli:models_main", "list the models that have a name"),
        "targets": Command(
            "vzip.export.targets:targets_main", "list the machines that an export can be made for"
        ),
        "plan": Command(
            "vzip.export.plan_cli:main", "predict what budgets of a model cost on a device"
        ),
        "doctor": Command(
            "vzip.runtime.doctor:main", "say what this machine can run and what is missing"
        ),
        "calibrate": Command(
            "vzip.calibration.quantization.cli:main", "quantise a bundle to int8 or fp8 by images"
        ),
        "build": Command(
            "vzip.export.build_cli:build_main", "build a TensorRT engine from a bundle and prove it"
        ),
        "inspect": Command(
            "vzip.export.build_cli:inspect_main", "print what a graph or an engine consists of"
        ),
        "tune": Command(
            "vzip.calibration.tuning.cli:main", "train a projector on compressed tokens"
        ),
        "sweep": Command(
            "vzip.calibration.sweep.cli:main", "measure budgets side by side and recommend one"
        ),
        "report": Command("vzip.calibration.report.cli:main", "write a web page about a bundle"),
        "bench": Command(
            "vzip.runtime.bench.cli:main", "time a bundle on this machine, beside its peers"
        ),
        "ask": Command("vzip.runtime.commands:ask", "answer one question about an image or a clip"),
        "chat": Command("vzip.runtime.commands:chat", "answer questions until end of input"),
        "encode": Command("vzip.runtime.encode_cli:main", "write the tokens of images to a file"),
        "show": Command("vzip.runtime.commands:show", "draw which patches of an image are kept"),
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; ``None`` for those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _main(arguments), prog=PROG)


def _main(argv: list[str]) -> int:
    """Answer the options of `vzip` itself, or call the command."""
    if not argv:
        print(_usage(), file=sys.stderr)  # noqa: T201  what a command line is for
        return FAILED
    name, rest = argv[0], argv[1:]
    if name in ("-h", "--help"):
        print(_usage())  # noqa: T201
        return 0
    if name == "--version":
        print(f"{PROG} {_version()}")  # noqa: T201
        return 0
    if name not in COMMANDS:
        raise VzipError(_unknown(name))
    return _load(COMMANDS[name])(rest, prog=f"{PROG} {name}")


def _load(command: Command) -> Callable[..., int]:
    """Import a command's function."""
    module, _, function = command.target.partition(":")
    loaded: Callable[..., int] = getattr(importlib.import_module(module), function)
    return loaded


def _usage() -> str:
    """Return the text of ``vzip -h``."""
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            f"usage: {PROG} COMMAND ...",
            "",
            "An image as K tokens instead of hundreds, and an LLM that answers questions about it.",
            "",
            "commands:",
            *(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()),
            "",
            "options:",
            "  -h, --help  show this text",
            "  --version   show the version",
            "",
            f"'{PROG} COMMAND -h' describes one command.",
        ]
    )


def _unknown(name: str) -> str:
    """Return the message about a word that is no command."""
    import difflib

    kind = "option" if name.startswith("-") else "command"
    known = [*COMMANDS, "--help", "--version"]
    close = difflib.get_close_matches(name, known, n=1)
    cure = f"did you mean '{close[0]}'?" if close else f"'{PROG} -h' lists what there is"
    return f"unknown {kind} '{name}'; {cure}"


def _version() -> str:
    """Return the version of the installed distribution."""
    from importlib import metadata

    try:
        return metadata.version("vzip")
    except metadata.PackageNotFoundError as error:
        raise VzipError(
            "vzip has no version here, because it runs from a folder that was never installed; "
            "install it with: pip install -e ."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
