"""What ``--llm`` can name, and opening it: ``NAME:WHERE``, or a checkpoint alone.

The module of an LLM has a function ``open_for(where: str, bundle: Bundle) -> LLM``, and is imported
when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from vzip.runtime.bundle.manifest import LLM_FILE
from vzip.runtime.errors import CheckpointError, InvalidInputError
from vzip.runtime.guard import door
from vzip.runtime.machine import process
from vzip.runtime.models import locate

if TYPE_CHECKING:
    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.llm.contract import LLM

TRANSFORMERS: Final = "transformers"
ONNXRUNTIME: Final = "onnxruntime"


@dataclass(frozen=True)
class Runner:
    """One entry of the table.

    Attributes:
        module: Where its `open_for` is.
        where: What stands behind the colon.
        server: Whether that is the URL of an LLM server; else the LLM is local.
    """

    module: str
    where: str
    server: bool = False


RUNNERS: Mapping[str, Runner] = MappingProxyType(
    {
        TRANSFORMERS: Runner("vzip.runtime.llm.local.transformers", "MODEL"),
        "llama.cpp": Runner("vzip.runtime.llm.local.llama_cpp", "FILE.gguf"),
        ONNXRUNTIME: Runner("vzip.runtime.llm.local.onnx_decoder", "FOLDER"),
        "vllm": Runner("vzip.runtime.llm.server.vllm", "URL", server=True),
        "sglang": Runner("vzip.runtime.llm.experimental.sglang", "URL", server=True),
        "trtllm": Runner("vzip.runtime.llm.experimental.tensorrt_llm", "URL", server=True),
    }
)
"""Name → local LLM or LLM server."""


@dataclass(frozen=True)
class LlmChoice:
    """A local LLM or an LLM server, and what it is to open.

    Attributes:
        name: A name in `RUNNERS`.
        where: What its `open_for` takes.
        revision: Commit on the hub, for the checkpoint that a bundle names.
    """

    name: str
    where: str
    revision: str | None = None

    @door(CheckpointError, "the LLM '{self.name}:{self.where}' can't be opened")
    def open(self, bundle: Bundle, *, threads: int | None = None) -> LLM:
        """Open it for a bundle's tokens.

        Args:
            bundle: The bundle.
            threads: As for `open_llm`.

        Raises:
            VzipError: It can't be opened, or the tokens are not made for it.
        """
        runner = RUNNERS[self.name]
        extra: dict[str, Any] = {} if self.revision is None else {"revision": self.revision}
        if threads is not None:
            extra["threads"] = process.check_threads(threads)
            if runner.server:
                raise InvalidInputError(
                    f"got threads={threads} for the LLM server '{self.name}'",
                    expected="a local LLM, which threads of this process run",
                    cure="leave it out, and start the server with its own option",
                )
        module = importlib.import_module(runner.module)
        llm: LLM = module.open_for(self.where, bundle, **extra)
        return llm


@door(CheckpointError, "the LLM '{llm}' can't be opened")
def open_llm(
    bundle: Bundle | str | Path, llm: str | None = None, *, threads: int | None = None
) -> LLM:
    """Open an LLM for a bundle's tokens.

    Args:
        bundle: The bundle that makes the tokens, or its folder.
        llm: What ``--llm`` takes: a checkpoint's alias, folder or hub id, which transformers runs;
            or ``NAME:WHERE`` for another local LLM or an LLM server, such as
            ``llama.cpp:FILE.gguf`` or ``vllm:URL``. ``None`` is the bundle's own LLM, or that of
            the checkpoint that it was exported from.
        threads: How many threads of the CPU run a local LLM; None for as many as this process may
            use cores. PyTorch, which runs a checkpoint, has one number for the whole process.

    Raises:
        VzipError: It can't be opened, or the tokens are not made for it.
    """
    from vzip.runtime.bundle.reader import Bundle, read_bundle

    choice = None if llm is None else parse(llm)
    opened = bundle if isinstance(bundle, Bundle) else read_bundle(Path(bundle), verify=False)
    return (choice or own(opened)).open(opened, threads=threads)


@door(InvalidInputError, "--llm: '{text}' can't be understood", cure="check the spelling")
def parse(text: str) -> LlmChoice:
    """Return what ``--llm`` names; what can be checked before any work is checked.

    Args:
        text: ``NAME:WHERE``; or a checkpoint's alias, hub id or folder.

    Raises:
        InvalidInputError: There is nothing behind the colon, or no URL where one must be.
        CheckpointError: There is no such checkpoint.
    """
    name, colon, where = text.partition(":")
    if not colon or name not in RUNNERS:
        if colon and "/" not in name and not Path(text).exists():
            known = ", ".join(f"{each}:{runner.where}" for each, runner in RUNNERS.items())
            raise InvalidInputError(
                f"--llm: {name!r} of {text!r} is neither a local LLM nor an LLM server",
                expected=f"one of {known}, or a checkpoint's alias, folder or hub id",
                cure="check the spelling",
            )
        name, where = TRANSFORMERS, text
    runner = RUNNERS[name]
    if not where.strip():
        raise InvalidInputError(
            f"--llm: got {text!r}",
            expected=f"{name}:{runner.where}",
            cure="say what it is to open",
        )
    if runner.server and not where.startswith(("http://", "https://")):
        raise InvalidInputError(
            f"--llm: got {text!r}",
            expected=f"{name}:{runner.where}, such as {name}:http://127.0.0.1:8000",
            cure="give the LLM server's address",
        )
    if name == TRANSFORMERS:
        locate(where)
    return LlmChoice(name, where)


def own(bundle: Bundle) -> LlmChoice:
    """Return the LLM that is in the bundle; or else that of the checkpoint it was exported from.

    Raises:
        CheckpointError: The checkpoint is not there any more.
    """
    if LLM_FILE in bundle.manifest.files:
        return LlmChoice(ONNXRUNTIME, str(bundle.path))
    model = bundle.manifest.model
    try:
        locate(model.id)
    except CheckpointError as error:
        raise CheckpointError(
            f"the bundle was exported from {model.id!r}, which is not here any more ({error.got})",
            cure="say where its LLM is with --llm",
        ) from error
    return LlmChoice(TRANSFORMERS, model.id, model.revision)
