"""`--with-llm`: the language model of a checkpoint goes into the bundle, for ONNX Runtime.

It is for small models, on machines that have no torch. What is written is opened and run as an edge
box will run it, and compared with the untouched model, before the bundle is published.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vzip.export.checkpoint.reader import Checkpoint
from vzip.export.checkpoint.schemes import read_scheme
from vzip.export.graph.trace import save
from vzip.export.llm.decoder_graph import Decoder, trace
from vzip.runtime.agreement import LLM_LOGITS
from vzip.runtime.bundle import manifest as form
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.bundle.writer import BundleWriter
from vzip.runtime.config_numbers import check_numbers
from vzip.runtime.console import watched
from vzip.runtime.errors import CheckpointError, ExportError, ParityError
from vzip.runtime.llm.chat_template import warn_of_date
from vzip.runtime.llm.llm_files import Settings
from vzip.runtime.llm.local.onnx_decoder import OnnxRuntimeLLM
from vzip.runtime.llm.local.transformers import CLASSES, TransformersLLM, cache_argument
from vzip.runtime.llm.prompts import Prompts
from vzip.runtime.llm.shown import TokenSpec
from vzip.runtime.machine import sensors
from vzip.runtime.tokens.positions import Places, along, left_out
from vzip.runtime.wording import counted

LLMS: Final = ("llama", "mistral", "qwen2")
"""``model_type`` of the language models whose graphs are tested."""

_WHOLE: Final = "fp8"  # transformers makes these weights whole itself, where there is no GPU

# Rotary embeddings that are the same at every length; "dynamic" and "longrope" are not.
_ROPE: Final = ("default", "linear", "llama3", "yarn")

"""Largest difference of a logit that is allowed, relative to the largest magnitude."""

BYTES_PER_PARAMETER: Final = 6
"""Memory at the export's peak: the untouched model in FP32, and a half more for weights that are
laid out anew and for the checkpoint's mapped files. Measured with 0.5 billion parameters: 4.7 bytes
in FP32 and 5.7 in FP16, without mapped files, which the kernel may drop.
"""

_GIB = 2**30
_QUESTIONS = ("What is shown? Größe, 大きさ?", "And then?")
_ROWS = 8  # of the trial's image
_PLACES = Places(np.arange(_ROWS) * 2, 3 * _ROWS)  # with gaps inside and behind
_STEPS = 4  # single tokens between its turns


@dataclass(frozen=True)
class Size:
    """How large a language model is.

    Attributes:
        parameters: Numbers in its weights, embeddings included.
    """

    parameters: int

    def check_fits(self) -> None:
        """Refuse what this machine has no memory for, before minutes of swapping.

        Raises:
            ExportError: The estimate is above what is available.
        """
        memory = sensors.memory()
        needed = self.parameters * BYTES_PER_PARAMETER / _GIB
        if memory is not None and needed > memory.available / 1024:
            raise ExportError(
                f"--with-llm: the LLM has {self.parameters / 1000000000.0:.2f} billion "
                f"parameters, and its export takes about {needed:.1f} GiB of memory (estimate: "
                f"one and a half times its weights in FP32), but {memory.available / 1024:.1f} "
                "GiB are available",
                cure=(
                    "export on a larger machine, or leave out --with-llm and run the LLM in "
                    "another way, such as quantised by llama.cpp"
                ),
            )

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.1f} million parameters"


def plan(model: str, revision: str | None) -> Size:
    """Check what can be checked before any weight is read.

    Args:
        model: An alias, a hub id or a local folder.
        revision: Commit, branch or tag of a hub repository.

    Returns:
        The language model's size.

    Raises:
        CheckpointError: It is no LLaVA of transformers, or has an LLM that is not in `LLMS`.
        ExportError: This machine has not enough memory.
    """
    import transformers

    config = Checkpoint.open(model, revision=revision).config
    if not set(config.get("architectures") or ()) & set(CLASSES.values()):
        raise CheckpointError(
            f"--with-llm: '{model}' is a {config.get('model_type')!r} model "
            f"({config.get('architectures')}), but the LLM is taken from a "
            f"{', '.join(CLASSES.values())}",
            cure="export the llava-hf twin of the checkpoint",
        )
    check_numbers(config)
    scheme = read_scheme(config).name
    if scheme and scheme != _WHOLE:
        raise CheckpointError(
            f"--with-llm: '{model}' is quantised by {scheme}",
            expected="weights of 16 bits or more, or fine-grained fp8",
            cause="the LLM's graph is made of whole weights",
            cure=(
                "leave out --with-llm and run the LLM in another way ('vzip ask --llm'), or export "
                "the checkpoint as it was before it was quantised"
            ),
        )
    kind = config["model_type"]
    rest = {key: value for key, value in config.items() if key != "model_type"}
    text = transformers.AutoConfig.for_model(kind, **rest).get_text_config()
    if text.model_type not in LLMS:
        raise CheckpointError(
            f"--with-llm: the LLM of '{model}' is a {text.model_type!r}",
            expected=f"one of {', '.join(LLMS)}",
            cure="leave out --with-llm and run it in another way ('vzip ask --llm')",
        )
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE:
        raise CheckpointError(
            f"--with-llm: the LLM of '{model}' has rotary embeddings of the type {rope!r}, "
            "which change with the length of a text",
            expected=f"one of {', '.join(_ROPE)}",
            cure="leave out --with-llm and run it in another way ('vzip ask --llm')",
        )
    with torch.device("meta"):
        shell = transformers.AutoModelForCausalLM.from_config(
            text, attn_implementation="eager", trust_remote_code=False
        )
    size = Size(sum(parameter.numel() for parameter in shell.parameters()))
    size.check_fits()
    return size


def add_llm(
    writer: BundleWriter,
    manifest: form.Manifest,
    *,
    model: str,
    revision: str | None,
    step: Callable[[str], None],
) -> None:
    """Put a checkpoint's language model into a bundle in the making, and check it there.

    Args:
        writer: The bundle; the vision graph is in its folder.
        manifest: What the bundle says about its tokens; its precision is the LLM's too.
        model: As for `plan`.
        revision: As for `plan`.
        step: Told what begins.

    Raises:
        VzipError: The checkpoint can't be read, or its LLM is not made for these tokens;
            `ParityError` if the graph differs from the untouched model.
    """
    tokens = TokenSpec.of(manifest)
    step("reading the LLM")
    _quiet()
    llm = TransformersLLM.open(
        model, tokens=tokens, revision=revision, device="cpu", dtype="float32"
    )
    warn_of_date("--with-llm", llm.template)
    step("running the untouched LLM")
    trial = Trial(llm)
    step("tracing the LLM")
    write(llm, writer.folder, precision=manifest.precision)
    del llm
    step("comparing the LLM's graph with it")
    trial.compare(writer.stage(manifest))


def write(llm: TransformersLLM, folder: Path, *, precision: Literal["fp32", "fp16"]) -> None:
    """Write a language model's files into a folder.

    Args:
        llm: In FP32, on the CPU. It is of no use afterwards: its attention and perhaps its
            precision are changed.
        folder: Where to.
        precision: Of weights, activations and cache.

    Raises:
        CheckpointError: The tokenizer has no form that the package tokenizers reads.
        ExportError: It can't be traced, or FP16 can't hold its weights.
    """
    tokenizer, settings = _tokenizer(llm), _settings(llm, precision)
    (folder / form.LLM_TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")
    (folder / form.LLM_SETTINGS_FILE).write_bytes(settings.to_bytes())
    if precision == "fp16":
        _halve(llm.model)
    table = llm.model.get_input_embeddings().weight.detach().numpy()
    np.save(folder / form.LLM_EMBEDDINGS_FILE, table, allow_pickle=False)
    graph = trace(Decoder(llm.model))
    save(graph, folder, graph=form.LLM_FILE, weights=form.LLM_DATA_FILE)


class Trial:
    """A conversation with the untouched model: a prompt, single tokens, and a later turn.

    Args:
        llm: The untouched model.
    """

    def __init__(self, llm: TransformersLLM) -> None:
        self._texts = _texts(llm.text.prompts)
        places = set(llm.text.prompts.placeholders.values())
        first: list[int] = []
        for token in self._texts[0]:
            first += [token] * (_ROWS if token in places else 1)
        later = [token for token in self._texts[-1] if token not in places]
        table = llm.model.get_input_embeddings().weight
        noise = np.random.default_rng(0).standard_normal((_ROWS, llm.text.hidden_size))
        self._rows = (noise * float(table.detach().std())).astype(np.float32)
        self._calls: list[list[int]] = []
        self._positions: list[NDArray[np.int64]] = []
        placeholder, length = llm.text.prompts.placeholders["image"], 0
        positions = along(first, placeholder, [_PLACES])
        self._logits: list[NDArray[np.float32]] = []
        cache = llm.new_cache()
        ids = first
        for call in range(_STEPS + 2):
            rows = None if call else self._rows
            logits = _untouched(llm, ids, cache, rows, positions)
            self._calls.append(ids)
            self._positions.append(positions)
            self._logits.append(logits)
            length += len(ids)
            ids = later if call == _STEPS else [int(logits.argmax())]
            positions = np.arange(len(ids)) + (length + left_out([_PLACES]))

    def compare(self, bundle: Bundle) -> None:
        """Run the same with the language model of a bundle.

        Raises:
            ParityError: Other ids of a text, other logits, or another choice of a token where that
                is no rounding.
        """
        llm = OnnxRuntimeLLM(bundle)
        if (texts := _texts(llm.text.prompts)) != self._texts:
            raise ParityError(
                f"the LLM's tokenizer gives {texts} where the checkpoint's gives {self._texts}",
                cause=(
                    "nothing was written. Please report this with the model's name and the "
                    "installed versions of transformers and tokenizers"
                ),
            )
        gate = LLM_LOGITS[bundle.manifest.precision].error
        assert gate is not None
        cache = llm.new_cache()
        calls = zip(self._calls, self._positions, self._logits, strict=True)
        for call, (ids, positions, expected) in enumerate(calls):
            logits = llm.logits(ids, cache, None if call else self._rows, positions)
            scale = float(np.abs(expected).max())
            error = float(np.abs(logits - expected).max()) / scale
            lost = float(expected.max() - expected[logits.argmax()]) / scale
            if not max(error, lost) <= gate or not math.isfinite(error):
                raise ParityError(
                    f"the LLM's graph differs from the untouched model at call {call} of "
                    f"{len(self._calls)} ({counted(len(ids), 'token')}): largest error {error:.1e}",
                    expected=f"at most {gate:.0e} of the largest logit",
                    cause=(
                        "nothing was written. Please report this with the model's name and the "
                        "installed versions of torch and onnxruntime"
                    ),
                )


def _quiet() -> None:
    """Silence transformers' progress bar unless someone is watching."""
    from transformers.utils import logging

    if not watched():
        logging.disable_progress_bar()


def _untouched(
    llm: TransformersLLM,
    ids: list[int],
    cache: Any,
    rows: NDArray[np.float32] | None,
    positions: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Return the untouched model's logits behind new tokens, float32 [V]."""
    embed = llm.model.get_input_embeddings()
    new = torch.tensor([ids])
    places = torch.isin(new, torch.tensor(list(llm.text.prompts.placeholders.values())))
    with torch.inference_mode():
        embeds = embed(new.masked_fill(places, 0) if rows is not None else new)  # [1, n, L]
        if rows is not None:
            embeds[places] = torch.from_numpy(rows)
        result = llm.model(
            inputs_embeds=embeds,
            **{cache_argument(llm.model): cache},
            attention_mask=torch.ones(1, cache.get_seq_length() + len(ids), dtype=torch.int64),
            position_ids=torch.from_numpy(positions)[None],
            use_cache=True,
            logits_to_keep=1,
        )
    logits: NDArray[np.float32] = result.logits[0, -1].float().numpy()
    return logits


def _texts(prompts: Prompts) -> tuple[list[int], ...]:
    """Return the ids of a first and, where there can be one, a later turn; nothing is shown."""
    first = prompts.first(_QUESTIONS[0])
    if prompts.words.later is None:
        return first, prompts.first(_QUESTIONS[1])
    return first, [*prompts.closing, *prompts.later(_QUESTIONS[1])]


def _settings(llm: TransformersLLM, precision: str) -> Settings:
    """Return what is needed to run a model's graph."""
    text: Any = llm.model.config.get_text_config()
    attention = llm.model.get_decoder().layers[0].self_attn
    # Within its window, attention that slides is attention to everything.
    window = getattr(text, "sliding_window", None)
    limits = [int(limit) for limit in (llm.text.context, window) if limit is not None]
    return Settings(
        words=llm.text.prompts.words,
        placeholders=dict(llm.text.prompts.placeholders),
        bos=llm.tokenizer.bos_token,
        eos=llm.tokenizer.eos_token,
        eos_id=llm.text.prompts.eos_id,
        eos_ids=tuple(sorted(llm.text.eos_ids)),
        context=min(limits) if limits else None,
        hidden_size=llm.text.hidden_size,
        vocabulary=int(llm.model.get_input_embeddings().weight.shape[0]),
        layers=int(text.num_hidden_layers),
        kv_heads=attention.k_proj.out_features // attention.head_dim,
        head_size=int(attention.head_dim),
        dtype="float32" if precision == "fp32" else "float16",
        positions=True,
    )


def _tokenizer(llm: TransformersLLM) -> str:
    """Return the text of a ``tokenizer.json`` that does what the loaded tokenizer does.

    It is taken from memory: transformers changes what it reads from the file, and has made one of a
    checkpoint that holds SentencePiece's alone.
    """
    from tokenizers import Tokenizer

    loaded = getattr(llm.tokenizer, "backend_tokenizer", None)
    if not isinstance(loaded, Tokenizer):
        raise CheckpointError(
            f"--with-llm: the LLM's tokenizer is a {type(llm.tokenizer).__name__}, which has "
            "no form that the package tokenizers reads",
            expected="one with a tokenizer.json",
            cure="leave out --with-llm and run the LLM in another way ('vzip ask --llm')",
        )
    copy = Tokenizer.from_str(loaded.to_str())
    copy.no_truncation()
    copy.no_padding()
    text: str = copy.to_str()
    return text


def _halve(model: Any) -> None:
    """Turn a model's parameters into FP16; its rotary frequencies, which are none, stay FP32."""
    largest = torch.finfo(torch.float16).max
    for name, parameter in model.named_parameters():
        if float(parameter.detach().abs().max()) > largest:
            raise ExportError(
                f"--with-llm: the LLM's {name} has numbers up to "
                f"{float(parameter.detach().abs().max()):.4g}, but FP16 holds at most "
                f"{largest:.6g}",
                cure="export with --dtype fp32",
            )
        parameter.data = parameter.data.half()
