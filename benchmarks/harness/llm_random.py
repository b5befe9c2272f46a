"""LLMs of true shape and random weights, in the local LLMs' runners; quickly, one copy each.

How long a matrix multiplication takes doesn't depend on the values. What these LLMs say means
nothing; but as every runner is given the same numbers (`draw`), their answers can be compared.
Configuration and tokenizer are the demo model's with other sizes: the tokenizer is not timed.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness.llm_shapes import Llm
from vzip.export.checkpoint.folders import LocalFolder
from vzip.export.llm import gguf
from vzip.export.llm import onnx_decoder as llm
from vzip.export.llm.gguf_tensors import Sizes, Stored
from vzip.export.llm.gguf_vocab import read_vocabulary
from vzip.runtime.bundle.manifest import FILES, MANIFEST_FILE
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.bundle.writer import bundle_writer
from vzip.runtime.cli.main import main as vzip
from vzip.runtime.llm.local.transformers import TransformersLLM
from vzip.runtime.llm.text_side import TextCheckpoint
from vzip.runtime.models import locate

_DECODER = "model.language_model."  # transformers' name of what is canonically `decoder.`

_BLOCK = torch.randn(1_000_003, generator=torch.Generator().manual_seed(7)) * 0.02


def draw(name: str, shape: tuple[int, ...], out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a tensor's values: ones for a norm, else one block of N(0, 0.02²) over and over.

    The block's length is a prime, so that no rows of a matrix are equal, and it is too long for any
    cache that keeps a layer; where it begins depends on the name.

    Args:
        name: Canonical, as `vzip.export.llm.gguf_tensors` has it.
        shape: Its shape.
        out: Where to; else a new tensor in BF16. Its values are BF16's in any dtype.
    """
    made = torch.empty(shape, dtype=torch.bfloat16) if out is None else out
    if "norm" in name:
        return made.fill_(1)
    block = torch.roll(_BLOCK, zlib.crc32(name.encode()) % len(_BLOCK))
    block = block.to(torch.bfloat16).to(made.dtype)
    flat = made.view(-1)
    whole = len(flat) // len(block) * len(block)
    flat[:whole].view(-1, len(block))[:] = block
    flat[whole:] = block[: len(flat) - whole]
    return made


def checkpoint(size: Llm, folder: Path) -> Path:
    """Write a checkpoint without weights: configuration and tokenizer."""
    folder.mkdir(parents=True)
    source = locate("demo").folder
    assert source is not None
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(size.config()))
    return folder


def transformers_llm(size: Llm, folder: Path, dtype: torch.dtype) -> TransformersLLM:
    """Return the LLM in transformers; its weights are written where they stay.

    Args:
        size: Its sizes.
        folder: What `checkpoint` wrote.
        dtype: Of weights, activations and cache.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    # Never run, and with weights that nobody wrote.
    del model.model.vision_tower, model.model.multi_modal_projector
    model = model.to(dtype).to_empty(device="cpu")
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config)  # its tables are computed
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            canonical = name.replace(_DECODER, "decoder.")
            draw(canonical, tuple(parameter.shape), parameter)
    template = (folder / "chat_template.jinja").read_text()
    made = TransformersLLM(model, tokenizer, template=template)
    assert made.text.hidden_size == size.hidden_size
    return made


class _Drawn(Stored):
    """Tensors that no file has."""

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield them, each made when it is asked for."""
        for name, shape in self.sizes.shapes().items():
            yield name, draw(name, shape)


def write_gguf(folder: Path, path: Path) -> None:
    """Write the LLM as a GGUF in BF16, as ``vzip convert`` writes one, tensor by tensor.

    Args:
        folder: What `checkpoint` wrote.
        path: The file.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    sizes = Sizes.of(config)
    names = dict.fromkeys(sizes.shapes(), "")
    stored = _Drawn(LocalFolder(folder), sizes, names, names, "random weights")
    vocabulary = read_vocabulary(tokenizer, sizes.rows)
    gguf.write(path, TextCheckpoint.open("gguf", folder), vocabulary, stored, name=folder.name)


def write_bundle(size: Llm, folder: Path, path: Path) -> None:
    """Write the LLM into the demo's bundle in FP32, as ``vzip export --with-llm`` writes one.

    Args:
        size: Its sizes.
        folder: What `checkpoint` wrote.
        path: The bundle.
    """
    tower = path.with_name(path.name + "-tower")
    quiet = ["--tokens", "43", "--no-check"]
    assert vzip(["export", "--model", "demo", *quiet, "-o", str(tower)]) == 0
    manifest = read_bundle(tower).manifest
    with bundle_writer(path) as writer:
        for name in {*FILES} & {file.name for file in tower.iterdir()} - {MANIFEST_FILE}:
            shutil.copyfile(tower / name, writer.folder / name)
        llm.write(transformers_llm(size, folder, torch.float32), writer.folder, precision="fp32")
        writer.publish(manifest)
    shutil.rmtree(tower)
