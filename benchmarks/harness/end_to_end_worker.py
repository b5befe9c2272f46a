"""One configuration of `benchmarks.end_to_end`, in a process of its own.

    python -m benchmarks.harness.end_to_end_worker JOB

JOB is JSON: ``{"do": "encode" | "prepare" | "speak", …}`` with the arguments of the function of
that name. The last line on standard output is ``{"ok": …}`` or ``{"error": "…"}``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from benchmarks.harness.llm_shapes import IMAGE, LLMS, WORD, Llm
from vzip.runtime.bundle.manifest import Selection
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import BackendError, VzipError
from vzip.runtime.llm.conversation import GreedyLLM
from vzip.runtime.llm.local.llama_cpp import LlamaCppLLM
from vzip.runtime.llm.local.onnx_decoder import OnnxRuntimeLLM
from vzip.runtime.machine import sensors, timing
from vzip.runtime.machine.process import peak_bytes

if TYPE_CHECKING:
    import torch

# torch and what needs it are imported where they are used: llama.cpp and ONNX Runtime run without,
# and their memory is what is measured.

Answer = dict[str, Any]

TOWER = "llava-1.5-7b"  # LLaVA-NeXT's is the same, once a tile
PATCHES = 576
SPLITS = {192: (162, 30), 128: (108, 20), 64: (54, 10), 32: (27, 5)}  # the paper's, per tile

NEW_TOKENS = 5  # timed after the first
LEAST, MOST = 2, 7  # rounds
WEIGHTS = {"transformers": "bfloat16", "llama.cpp": "bfloat16", "onnxruntime": "float32"}
"""Runner → dtype of its weights here: what it is quick with on a CPU."""
CACHES = {"transformers": "bfloat16", "llama.cpp": "float16", "onnxruntime": "float32"}
"""Runner → dtype of its KV cache here."""

_BITS = {"bfloat16": 16, "float32": 32}
_ROOM = 2**30  # for the process and what a prefill needs besides weights and cache
_MERGE = "average"


def encode(*, llm: str, tiles: int, budgets: list[int], seconds: float) -> Answer:
    """Time tower, VisionZip and projector; PyTorch with SDPA and no dead layer, BF16.

    Args:
        llm: A name in `LLMS`, whose width the projector has.
        tiles: Images of the tower.
        budgets: Tokens of all tiles together; 576 a tile is LLaVA without VisionZip.
        seconds: For all rounds; see `_rounds`. Proving each form's tokens warms it up.

    Returns:
        ``ms``: budget → `timing.Timing`; ``agreement``: budget → cosine of the kept tokens with
        those of the uncompressed encoder.
    """
    import torch

    from vzip.export.algorithm.budget import Budget
    from vzip.export.bench.peers.torch_forms import Sdpa, Uncompressed
    from vzip.export.checkpoint.random_weights import random_vision
    from vzip.export.checkpoint.reader import vision_config

    config = vision_config(TOWER)
    width = LLMS[llm].hidden_size
    projector = replace(config.projector, out_features=width, hidden_features=width)
    weights = random_vision(replace(config, projector=projector), 0)
    first, *_ = SPLITS.values()
    selection = Selection("visionzip", *first, _MERGE, cls_token=True)
    everything = Uncompressed(weights, SimpleNamespace(selection=selection), torch.bfloat16)
    forms: dict[int, torch.nn.Module] = {}
    for tokens in budgets:
        form: Any = everything
        if tokens != tiles * PATCHES:
            form = Sdpa(weights, SimpleNamespace(selection=selection), torch.bfloat16)
            form.budget = Budget(*SPLITS[tokens // tiles], merge=_MERGE)
        form.tower, form.projector = everything.tower, everything.projector
        forms[tokens] = form.eval()
    for part in (everything.tower, everything.projector):
        part.to(torch.bfloat16)
    side = config.tower.image_size
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (tiles, side, side, 3), dtype=torch.uint8, generator=noise)
    with torch.no_grad():
        full, _ = everything(images)  # [tiles, 576, L]
        agreement = {}
        for tokens, form in forms.items():
            embeds, kept = form(images)
            assert embeds.shape == (tiles, tokens // tiles, width), embeds.shape
            if form is not everything:
                places = kept[:, 1:, None].expand(-1, -1, width) - 1  # without CLS
                expected = full.gather(1, places).float()
                got = embeds[:, 1 : kept.shape[1]].float()
                cosine = torch.cosine_similarity(got, expected, dim=-1).min()
                agreement[tokens] = round(float(cosine), 5)
        if min(agreement.values(), default=1.0) < 0.99:
            raise BackendError(f"the kept tokens are not the uncompressed encoder's: {agreement}")
        times: dict[int, list[float]] = {tokens: [] for tokens in budgets}
        for order in _rounds(budgets, seconds):
            for tokens in order:
                start = time.perf_counter()
                forms[tokens](images)
                times[tokens].append((time.perf_counter() - start) * 1000)
    return {
        "ms": {str(tokens): timing.Timing.of(each).to_json() for tokens, each in times.items()},
        "agreement": agreement,
    }


def _rounds(budgets: list[int], seconds: float) -> Iterator[list[int]]:
    """Yield the budgets in ascending order, in descending order and so on.

    Until there are `LEAST` rounds and the time is up, or `MOST`.
    """
    begun, ordered = time.perf_counter(), sorted(budgets)
    for number in range(MOST):
        if number >= LEAST and time.perf_counter() - begun >= seconds:
            break
        yield ordered if number % 2 == 0 else ordered[::-1]


def prepare(*, llm: str, runner: str, checkpoint: str, file: str) -> Answer:
    """Write what a runner opens; of transformers the text side alone, which draws its weights.

    Args:
        llm: A name in `LLMS`.
        runner: Of `WEIGHTS`.
        checkpoint: Folder to write, without weights; see `llm_random.checkpoint`.
        file: What is written.
    """
    from benchmarks.harness.llm_random import checkpoint as write_checkpoint
    from benchmarks.harness.llm_random import write_bundle, write_gguf

    size = LLMS[llm]
    check_fits(size, runner, tokens=0)
    write_checkpoint(size, Path(checkpoint))
    if runner == "llama.cpp":
        write_gguf(Path(checkpoint), Path(file))
    elif runner == "onnxruntime":
        write_bundle(size, Path(checkpoint), Path(file))
    return {}


def check_fits(size: Llm, runner: str, tokens: int) -> None:
    """Refuse what this machine has no memory for, before minutes of swapping.

    Raises:
        BackendError: Weights and the cache of so many tokens are above what is available.
    """
    memory = sensors.memory()
    bits = _BITS[WEIGHTS[runner]]
    needed = (
        size.parameters * bits // 8 + size.shape(CACHES[runner]).kv_bytes(max(1, tokens)) + _ROOM
    )
    if memory is not None and needed > memory.available * 2**20:
        raise BackendError(
            f"takes {needed / 1e9:.1f} GB with its weights in {bits} bits",
            expected=f"at most the {memory.available * 2**20 / 1e9:.1f} GB that are available",
        )


class Opened(Protocol):
    """An LLM in a runner, which was opened so many times."""

    openings: int

    def at(self, context: int) -> GreedyLLM:
        """Return it, ready for so many tokens."""
        ...

    def kv_bytes(self, cache: Any) -> int:
        """Return what a conversation's cache takes, measured."""
        ...


class _Transformers:
    openings = 1

    def __init__(self, size: Llm, checkpoint: Path, _file: Path) -> None:
        import torch

        from benchmarks.harness.llm_random import transformers_llm

        self._llm = transformers_llm(size, checkpoint, torch.bfloat16)

    def at(self, _context: int) -> GreedyLLM:
        return self._llm

    def kv_bytes(self, cache: Any) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class _LlamaCpp:
    """Its cache is reserved when it is opened, so that a larger one takes a new opening."""

    def __init__(self, _size: Llm, _checkpoint: Path, file: Path) -> None:
        self._file = file
        self._llm: LlamaCppLLM | None = None
        self._context = self.openings = 0

    def at(self, context: int) -> GreedyLLM:
        if self._llm is None or self._context < context:
            self._llm = None  # freed before the next
            self._llm = LlamaCppLLM(self._file, tokens=None, context=context)
            self._context = context
            self.openings += 1
        return self._llm

    def kv_bytes(self, cache: Any) -> int:
        assert self._llm is not None
        pool = self._llm._pool
        library = pool._model.library
        return int(library.llama_state_seq_get_size(pool._context, cache.sequence))


class _OnnxRuntime:
    openings = 1

    def __init__(self, _size: Llm, _checkpoint: Path, file: Path) -> None:
        self._llm = OnnxRuntimeLLM(read_bundle(file, verify=False))

    def at(self, _context: int) -> GreedyLLM:
        return self._llm

    def kv_bytes(self, cache: Any) -> int:
        return sum(4 * int(np.prod(value.shape())) for value in cache)


RUNNERS: dict[str, Callable[[Llm, Path, Path], Opened]] = {
    "transformers": _Transformers,
    "llama.cpp": _LlamaCpp,
    "onnxruntime": _OnnxRuntime,
}


def speak(
    *,
    llm: str,
    runner: str,
    checkpoint: str,
    file: str,
    budgets: list[int],
    text: int,
    seconds: float,
) -> Answer:
    """Time an LLM's first token and the tokens after it, with several numbers of image tokens.

    The first round goes from few tokens to many, so that the process's peak after each is what
    that many need.

    Args:
        llm: A name in `LLMS`.
        runner: Of `RUNNERS`.
        checkpoint: As for `prepare`.
        file: As for `prepare`.
        budgets: Numbers of image tokens.
        text: Tokens of text around them.
        seconds: For all rounds; see `_rounds`.

    Returns:
        ``open_s`` and ``open_peak_bytes`` when it was ready; ``budgets``: tokens → ``first_token``
        and ``decode`` (`timing.Timing`), ``token`` (id of the first), ``kv_bytes`` behind it,
        ``peak_bytes`` of the process.

    Raises:
        BackendError: Memory is short; or the cache is not as large as these tokens make it, or the
            first token differs between rounds: then something else was timed.
    """
    size = LLMS[llm]
    shape = size.shape(CACHES[runner])
    longest = max(budgets) + text + NEW_TOKENS
    if runner == "transformers":  # what `prepare` wrote may be in memory already
        check_fits(size, runner, tokens=longest)
    rows = np.random.default_rng(0).standard_normal((max(budgets), size.hidden_size), np.float32)
    rows *= 0.02
    begun = time.perf_counter()
    opened = RUNNERS[runner](size, Path(checkpoint), Path(file))
    opened.at(text + NEW_TOKENS)
    open_s, ready = time.perf_counter() - begun, 0
    open_peak = peak_bytes()
    found: dict[int, Answer] = {n: {"first": [], "decode": []} for n in sorted(budgets)}
    for order in _rounds(budgets, seconds):
        for tokens in order:
            one = found[tokens]
            model = opened.at(tokens + text + NEW_TOKENS)
            if opened.openings != ready:  # opened, or opened anew with room for more
                _turn(model, rows[:1], text)
                ready = opened.openings
            first, decode, token, cache = _turn(model, rows[:tokens], text)
            one["first"].append(first)
            one["decode"] += decode
            if one.setdefault("token", token) != token:
                raise BackendError(
                    f"{tokens} tokens give {token} first",
                    expected=f"{one['token']}, as in the round before",
                )
            held = tokens + text + NEW_TOKENS
            expected, got = shape.kv_bytes(held), opened.kv_bytes(cache)
            # llama.cpp's has a position and a sequence beside each token.
            if not expected <= got <= expected + 64 * held + 4096:
                raise BackendError(
                    f"the cache of {held} tokens has {got} bytes", expected=str(expected)
                )
            one.setdefault("kv_bytes", shape.kv_bytes(tokens + text))
            one.setdefault("peak_bytes", peak_bytes())
            del cache, model
            gc.collect()
    return {
        "open_s": round(open_s, 2),
        "open_peak_bytes": open_peak,
        "budgets": {
            str(tokens): {
                **{name: one[name] for name in ("token", "kv_bytes", "peak_bytes")},
                "first_token": timing.Timing.of(one["first"]).to_json(),
                "decode": timing.Timing.of(one["decode"]).to_json(),
            }
            for tokens, one in found.items()
        },
    }


def _turn(llm: GreedyLLM, rows: Any, text: int) -> tuple[float, list[float], int, Any]:
    """Return milliseconds to the first token and of each later one, the first, and the cache."""
    before = text // 2
    ids = [WORD] * before + [IMAGE] * len(rows) + [WORD] * (text - before)
    cache = llm.new_cache()
    start = time.perf_counter()
    token = llm.step(ids, cache, rows)
    first = (time.perf_counter() - start) * 1000
    decode = []
    for _ in range(NEW_TOKENS):
        start = time.perf_counter()
        llm.step([WORD], cache, None)
        decode.append((time.perf_counter() - start) * 1000)
    return first, decode, token, cache


JOBS: dict[str, Callable[..., Answer]] = {"encode": encode, "prepare": prepare, "speak": speak}


def main() -> None:
    """Do the job of the command line."""
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        answer: Answer = {"ok": JOBS[job.pop("do")](**job)}
    except VzipError as error:
        answer = {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - it becomes an empty cell that says why
        text = (str(error).strip().splitlines() or [""])[0]
        answer = {"error": f"{type(error).__name__}: {text}"}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
