"""Compressed tokens into a language model that ONNX Runtime runs on the CPU.

The decoder comes with the bundle (``vzip export --with-llm``). It takes embeddings, so that tokens
go in like words do: a row of the table for a word, a row of the image for a placeholder. Neither
torch nor transformers is needed, but onnxruntime, tokenizers and numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vzip.runtime.backends.onnxruntime import open_session
from vzip.runtime.backends.packages import import_onnxruntime
from vzip.runtime.bundle.manifest import LLM_DATA_FILE
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import BackendError, BundleError, InvalidInputError, first_line
from vzip.runtime.guard import door
from vzip.runtime.llm.conversation import GreedyLLM
from vzip.runtime.llm.json_tokenizer import JsonTokenizer
from vzip.runtime.llm.llm_files import (
    INPUT,
    LOGITS,
    POSITIONS,
    Settings,
    cache_names,
    map_embeddings,
    read_tokenizer,
)
from vzip.runtime.llm.prompts import Prompts
from vzip.runtime.llm.shown import TokenSpec
from vzip.runtime.llm.text_side import TextSide
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.llm.shown import Embeds

NAME = "onnxruntime"
EXTRA = "llm-cpu"

_NEEDED_FOR = "the local LLM 'onnxruntime'"
_PROVIDERS = ("CPUExecutionProvider",)


class OnnxRuntimeLLM(GreedyLLM):
    """The language model of a bundle.

    Attributes:
        settings: What the bundle says about it.
    """

    name = NAME

    @door(BackendError, "the LLM of the bundle '{bundle.path}' can't be opened")
    def __init__(
        self, bundle: Bundle, *, tokens: TokenSpec | None = None, threads: int | None = None
    ) -> None:
        """Open the language model of a bundle that was exported with it.

        Args:
            bundle: The bundle.
            tokens: What the bundle that makes the tokens says about them; ``None`` to take any
                number.
            threads: As for `vzip.runtime.llm.open_llm`.

        Raises:
            MissingDependencyError: onnxruntime or tokenizers is not installed.
            BundleError: The bundle has no language model; or a file of it is missing, damaged, or
                of another version.
            CheckpointError: The tokenizer can't be read, or lacks a placeholder.
            InvalidInputError: The tokens are not made for this LLM.
            BackendError: ONNX Runtime can't take the graph.
        """
        onnxruntime = import_onnxruntime(_NEEDED_FOR, EXTRA)
        settings = Settings.of(bundle)
        if tokens is not None:
            tokens.check_llm(
                NAME,
                model=str(bundle.path),
                hidden_size=settings.hidden_size,
                placeholders=settings.placeholders,
            )
        self.settings = settings
        self.largest = float(np.finfo(settings.dtype).max)
        self.trained = settings.context
        if settings.positions:
            self.unable = None
        else:
            self.unable = "the bundle's LLM was exported by an older version of vzip"
        tokenizer = JsonTokenizer(
            read_tokenizer(bundle),
            bos=settings.bos,
            eos=settings.eos,
            needed_for=_NEEDED_FOR,
            extra=EXTRA,
        )
        self.text = TextSide(
            name=NAME,
            prompts=Prompts(NAME, tokenizer, settings.words, settings.placeholders),
            eos_ids=frozenset(settings.eos_ids),
            hidden_size=settings.hidden_size,
            context=settings.context,
            tokens=tokens,
        )
        self._table = map_embeddings(bundle, settings)
        self._onnxruntime = onnxruntime
        self._session: Any = open_session(
            onnxruntime,
            bundle.read_llm,
            bundle.path,
            name=NAME,
            providers=_PROVIDERS,
            extra=EXTRA,
            threads=threads,
            held=lambda: bundle.held_weights(LLM_DATA_FILE),
        )
        names = cache_names(settings.layers)
        self._past = [f"past_{name}" for name in names]
        self._inputs = [INPUT, *([POSITIONS] if settings.positions else []), *self._past]
        self._outputs = [LOGITS, *(f"present_{name}" for name in names)]
        self._check_graph(bundle)

    def new_cache(self) -> list[Any]:
        """Return an empty KV cache: `OrtValue`s [1, heads, 0, head size], keys and values."""
        shape = (1, self.settings.kv_heads, 0, self.settings.head_size)
        empty = np.zeros(shape, self.settings.dtype)
        value = self._onnxruntime.OrtValue.ortvalue_from_numpy(empty)
        return [value] * (2 * self.settings.layers)

    def step(
        self,
        ids: list[int],
        cache: list[Any],
        rows: Embeds | None,
        positions: NDArray[np.int64] | None = None,
    ) -> int:
        """Run the LLM over new tokens; see `GreedyLLM.step`."""
        logits = self.logits(ids, cache, rows, positions)
        best = int(logits.argmax())  # the first of equals; and NaN, if there is one
        if not np.isfinite(logits[best]):
            raise BackendError(
                f"{NAME}: the LLM's output is not finite in {self.settings.dtype}",
                cure=(
                    "export the bundle with --dtype fp32, and run 'vzip check' on it if it repeats"
                ),
            )
        return best

    def logits(
        self,
        ids: list[int],
        cache: list[Any],
        rows: Embeds | None,
        positions: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Run the LLM over new tokens; `step` says which arguments.

        Returns:
            float32 [vocabulary of the LLM's output], what is to come after the last of them.

        Raises:
            BackendError: The graph failed.
        """
        binding = self._session.io_binding()
        embeds = self._embeddings(ids, rows)  # [1, n, L]
        try:
            binding.bind_cpu_input(INPUT, embeds)
            if self.settings.positions:
                if positions is None:
                    length = cache[0].shape()[2]
                    positions = np.arange(length, length + len(ids))
                binding.bind_cpu_input(POSITIONS, positions.astype(np.int64)[None])
            for name, value in zip(self._past, cache, strict=True):
                binding.bind_ortvalue_input(name, value)
            for name in self._outputs:
                binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            logits, *present = binding.get_outputs()
        except Exception as error:  # ONNX Runtime's errors have no base class of their own
            raise BackendError(
                f"{NAME}: the LLM failed at {counted(len(ids), 'new token')} ({first_line(error)})",
                cause="memory may be short",
                cure="begin a new conversation, or use a bundle with fewer tokens per image",
            ) from error
        # The next call reads what this one wrote: the cache never becomes a numpy array.
        cache[:] = present
        made: NDArray[np.float32] = logits.numpy()[0]
        return made

    def _embeddings(self, ids: list[int], rows: Embeds | None) -> NDArray[Any]:
        """Return [1, n, L] of ids [n], in which the placeholders' are `rows`."""
        new = np.array(ids, np.int64)
        places = np.zeros(new.shape, bool)
        if rows is not None:
            places = np.isin(new, list(self.text.prompts.placeholders.values()))
            new[places] = 0  # a placeholder need not have a row of its own in the table
        if new.max() >= len(self._table):
            raise InvalidInputError(
                f"{NAME}: the prompt has a token of id {new.max()}",
                expected=f"ids below {len(self._table)}, of which the LLM has embeddings",
                cure="ask without it",
            )
        made = self._table[new]  # a copy, [n, L]
        if rows is not None:
            made[places] = rows
        return made[None]

    def _check_graph(self, bundle: Bundle) -> None:
        """Refuse a graph that is not the one that the settings describe."""
        settings = self.settings
        kind = {"float32": "tensor(float)", "float16": "tensor(float16)"}[settings.dtype]
        part = (1, settings.kv_heads, None, settings.head_size)
        expected: dict[str, tuple[str, tuple[int | None, ...]]]
        expected = dict.fromkeys(self._inputs, (kind, part))
        expected[INPUT] = (kind, (1, None, settings.hidden_size))
        if settings.positions:
            expected[POSITIONS] = ("tensor(int64)", (1, None))
        found = {
            each.name: (each.type, tuple(n if isinstance(n, int) else None for n in each.shape))
            for each in self._session.get_inputs()
        }
        outputs = [each.name for each in self._session.get_outputs()]
        if found != expected or outputs != self._outputs:
            wrong = [name for name in self._inputs if found.get(name) != expected[name]]
            wrong = wrong or sorted({*found} ^ {*expected}) or outputs
            raise BundleError(
                f"{NAME}: {wrong[0]!r} of the LLM's graph in {bundle.path} is "
                f"{found.get(wrong[0])}",
                expected=f"{expected.get(wrong[0])}, as llm.json describes it",
                cause="the files are of different models",
                cure="export the bundle again",
            )


def open_for(where: str, bundle: Bundle, *, threads: int | None = None) -> OnnxRuntimeLLM:
    """Open the language model of a bundle; see `vzip.runtime.llm.opening`.

    Args:
        where: The folder of a bundle that was exported with its LLM: the one that makes the
            tokens, or another of the same checkpoint.
        bundle: The one that makes the tokens.
        threads: As for `vzip.runtime.llm.open_llm`.

    Raises:
        VzipError: As for `OnnxRuntimeLLM`.
    """
    folder = Path(where)
    own = folder.exists() and folder.absolute() == bundle.path
    return OnnxRuntimeLLM(
        bundle if own else read_bundle(folder, verify=False),
        tokens=TokenSpec.of(bundle.manifest),
        threads=threads,
    )
