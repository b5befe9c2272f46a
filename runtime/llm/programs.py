"""What ``--llm`` can name: ``ENGINE:WHERE``, or a checkpoint alone, which transformers runs.

A module of an engine has a function ``open_llm(where: str, bundle: Bundle) -> LLM``, and is
imported only when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from vzip.runtime.bundle.manifest import LLM_FILE
from vzip.runtime.errors import CheckpointError, InvalidInputError
from vzip.runtime.models import locate

if TYPE_CHECKING:
    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.llm import LLM

TRANSFORMERS: Final = "transformers"
ONNXRUNTIME: Final = "onnxruntime"


@dataclass(frozen=True)
class Engine:
    """One entry of the table.

    Attributes:
        module: Where its `open_llm` is.
        where: What stands behind the colon.
        server: Whether that is the URL of a server.
    """

    module: str
    where: str
    server: bool = False


ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        TRANSFORMERS: Engine("vzip.runtime.llm.local.transformers", "MODEL"),
        "llama.cpp": Engine("vzip.runtime.llm.local.llama_cpp", "FILE.gguf"),
        ONNXRUNTIME: Engine("vzip.runtime.llm.local.onnx_decoder", "FOLDER"),
        "vllm": Engine("vzip.runtime.llm.server.vllm", "URL", server=True),
        "sglang": Engine("vzip.runtime.llm.experimental.sglang", "URL", server=True),
        "trtllm": Engine("vzip.runtime.llm.experimental.tensorrt_llm", "URL", server=True),
    }
)
"""Name → engine."""


@dataclass(frozen=True)
class Choice:
    """An engine and what it is to open.

    Attributes:
        engine: A name in `ENGINES`.
        where: What its `open_llm` takes.
        revision: Commit on the hub, for the checkpoint that a bundle names.
    """

    engine: str
    where: str
    revision: str | None = None

    def open(self, bundle: Bundle) -> LLM:
        """Open it for a bundle's tokens.

        Raises:
            VzipError: It can't be opened, or the tokens are not made for it.
        """
        module = importlib.import_module(ENGINES[self.engine].module)
        extra = {} if self.revision is None else {"revision": self.revision}
        llm: LLM = module.open_llm(self.where, bundle, **extra)
        return llm


def parse(text: str) -> Choice:
    """Return the engine that ``--llm`` names; what can be checked before any work is checked.

    Args:
        text: ``ENGINE:WHERE``; or a checkpoint's alias, hub id or folder.

    Raises:
        InvalidInputError: There is nothing behind the colon, or no URL where one must be.
        CheckpointError: There is no such checkpoint.
    """
    name, colon, where = text.partition(":")
    if not colon or name not in ENGINES:
        if colon and "/" not in name and not Path(text).exists():
            raise InvalidInputError(
                f"--llm: got {text!r}, whose {name!r} is no engine",
                expected=(
                    "one of "
                    f"{', '.join((f'{each}:{engine.where}' for each, engine in ENGINES.items()))}, "
                    "or a checkpoint's alias, folder or hub id"
                ),
                cure="check the spelling",
            )
        name, where = TRANSFORMERS, text
    engine = ENGINES[name]
    if not where.strip():
        raise InvalidInputError(
            f"--llm: got {text!r}",
            expected=f"{name}:{engine.where}",
            cure="say what it is to open",
        )
    if engine.server and not where.startswith(("http://", "https://")):
        raise InvalidInputError(
            f"--llm: got {text!r}",
            expected=f"{name}:{engine.where}, such as {name}:http://127.0.0.1:8000",
            cure="give the server's address",
        )
    if name == TRANSFORMERS:
        locate(where)
    return Choice(name, where)


def own(bundle: Bundle) -> Choice:
    """Return the LLM that is in the bundle; or else that of the checkpoint it was exported from.

    Raises:
        CheckpointError: The checkpoint is not there any more.
    """
    if LLM_FILE in bundle.manifest.files:
        return Choice(ONNXRUNTIME, str(bundle.path))
    model = bundle.manifest.model
    try:
        locate(model.id)
    except CheckpointError as error:
        raise CheckpointError(
            f"the bundle was exported from {model.id!r}, which is not here any more ({error})",
            cure="say where its LLM is with --llm",
        ) from error
    return Choice(TRANSFORMERS, model.id, model.revision)
