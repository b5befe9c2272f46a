"""Damaged graphs, each checked and, where the check lets it in, run: a process of its own.

    PYTHON fuzz_graphs.py FOLDER FILE FIRST LAST

FILE is a graph of the bundle in FOLDER. Prints a line for each number from FIRST on, before it is
tried (so that whoever reads knows which one ended the process) and after: ``refused``, ``ran``, or
``failed`` where ONNX Runtime said no in words. Numbers are seeds.
"""

from __future__ import annotations

import math
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vzip.runtime.backends.packages import import_onnxruntime
from vzip.runtime.bundle import graph_check, graph_limits, graph_rules
from vzip.runtime.console import emit
from vzip.runtime.errors import BundleError

LIMIT_S = 20  # of one graph
_INTEGERS = (6, 7)
_NUMBERS = (-(2**63), -(2**31), -100, -2, -1, 0, 1, 2, 3, 7, 10, 16, 2**31 - 1, 2**40, 2**63 - 1)
_EXTREMES = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0xFE, 0x08, 0x10)


def damaged(whole: bytes, seed: int) -> bytes:
    """Return a graph with one or a few faults: bits, bytes, numbers of any size, parts moved."""
    draw = random.Random(seed)
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 1, 1, 2, 3))):
        place = draw.randrange(len(data))
        kind = draw.randrange(8)
        if kind <= 3:
            data[place] ^= 1 << draw.randrange(8)
        elif kind <= 5:
            data[place] = draw.choice(_EXTREMES)
        elif kind == 6:
            other, length = draw.randrange(len(data)), draw.randrange(1, 9)
            data[place : place + length] = data[other : other + length]
        else:
            # Numbers of a raw int64 constant are eight bytes, mostly small.
            data[place : place + 8] = draw.choice((-1, -(2**63), 2**62, 2**31, 5)).to_bytes(
                8, "little", signed=True
            )[: len(data) - place]
    return bytes(data)


def rearranged(whole: bytes, seed: int) -> bytes:
    """Return a graph in which parts that mean something were changed: it parses, mostly."""
    draw = random.Random(seed)
    model = onnx.load_model_from_string(whole)
    graph = model.graph
    names = [name for node in graph.node for name in (*node.input, *node.output)]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        node = draw.choice(graph.node)
        kind = draw.randrange(7)
        numbers = [each for each in graph.initializer if each.data_type in _INTEGERS]
        if kind == 0 and node.attribute:
            attribute = draw.choice(node.attribute)
            if attribute.ints:
                attribute.ints[draw.randrange(len(attribute.ints))] = draw.choice(_NUMBERS)
            else:
                attribute.i = draw.choice(_NUMBERS)
        elif kind == 1:
            name = draw.choice(sorted(graph_rules.RULES))
            node.domain, _, node.op_type = name.rpartition("::")
            if node.domain and len(model.opset_import) == 1:
                model.opset_import.add(domain="com.microsoft", version=1)
        elif kind == 2 and node.input:
            node.input[draw.randrange(len(node.input))] = draw.choice(names)
        elif kind in {3, 4} and numbers:
            tensor = draw.choice(numbers)
            if tensor.data_location == 0 and len(tensor.raw_data) == 8 * math.prod(tensor.dims):
                array = numpy_helper.to_array(tensor).copy()
                if array.size:
                    array.flat[draw.randrange(array.size)] = np.int64(draw.choice(_NUMBERS)).astype(
                        array.dtype
                    )
                    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        elif kind == 5:
            tensor = draw.choice(graph.initializer)
            if len(tensor.dims) > 1:
                dims = [*tensor.dims]
                draw.shuffle(dims)
                tensor.dims[:] = dims
            tensor.data_type = draw.choice([tensor.data_type, 1, 6, 7])
        elif kind == 6:
            name = draw.choice(("axis", "to", "keepdims", "group", "largest", "allowzero"))
            node.attribute.append(helper.make_attribute(name, draw.choice(_NUMBERS)))
    data: bytes = model.SerializeToString()
    return data


class Trial:
    """A graph of a bundle, and what is tried with it."""

    def __init__(self, folder: Path, file: str) -> None:
        self.whole = (folder / file).read_bytes()
        self.folder, self.file, self.data = folder, file, folder / f"{file}.data"
        self.onnxruntime = import_onnxruntime("a test", "cpu")
        self.llm = file == "llm.onnx"

    def read(self, tensor: graph_check.ExternalTensor) -> bytes:
        """Return bytes of the weights."""
        with self.data.open("rb") as file:
            file.seek(tensor.offset)
            return file.read(tensor.length)

    def check(self, model: bytes) -> None:
        """Do what a bundle's reader does before anything runs."""
        size = self.data.stat().st_size
        graph_check.check_graph(
            model,
            file=self.file,
            data_file=self.data.name,
            data_bytes=size,
            operators=graph_check.LLM
            if self.llm
            else graph_check.CPU_ENGINE | graph_check.QUANTISED,
        )
        if self.llm:
            graph_limits.check_decoder(model, self.read, file=self.file)
        else:
            graph_limits.check_encoder(model, self.read, file=self.file, batch=3)

    def session(self, model: bytes) -> Any:
        """Return a session of ONNX Runtime."""
        options = self.onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.folder)
        )
        if "fp8" in self.file:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        providers = ["CPUExecutionProvider"]
        return self.onnxruntime.InferenceSession(model, options, providers=providers)

    def run(self, model: bytes) -> None:
        """Make a session and run it, on as many pictures or tokens as are tried by the check."""
        session = self.session(model)
        for chosen in ((2, 0), (1, 5)) if self.llm else ((1,), (3,)):
            session.run(None, _feeds(session, chosen))

    def outputs(self, model: bytes, batch: int) -> dict[str, Any]:
        """Return what a graph gives, by name."""
        session = self.session(model)
        names = [each.name for each in session.get_outputs()]
        return dict(zip(names, session.run(None, _feeds(session, (batch,))), strict=True))

    def judge(self, seed: int) -> str:
        """Return what became of a damaged graph."""
        change = damaged if seed % 2 else rearranged
        model = change(self.whole, seed) if seed else self.whole
        try:
            self.check(model)
        except BundleError as error:
            return f"refused {error.got[:150]!r}"
        signal.alarm(LIMIT_S)
        try:
            self.run(model)
        except Exception as error:  # noqa: BLE001  ONNX Runtime's errors have no base class
            return f"failed {type(error).__name__} {str(error)[:150]!r}"
        finally:
            signal.alarm(0)
        return "ran"


def _feeds(session: Any, chosen: tuple[int, ...]) -> dict[str, Any]:
    """Return numbers for every input, whose open extents get those chosen, in their order."""
    names: dict[str, int] = {}
    feeds = {}
    for each in session.get_inputs():
        for extent in each.shape:
            if not isinstance(extent, int) and extent not in names:
                names[extent] = chosen[min(len(names), len(chosen) - 1)]
        shape = [extent if isinstance(extent, int) else names[extent] for extent in each.shape]
        feeds[each.name] = _numbers(each.type, shape)
    return feeds


def _numbers(kind: str, shape: list[int]) -> Any:
    dtype = {"float": "float32", "float16": "float16", "double": "float64"}.get(
        kind[7:-1], kind[7:-1]
    )
    return (np.arange(math.prod(shape)).reshape(shape) % 251).astype(dtype)


if __name__ == "__main__":
    trial = Trial(Path(sys.argv[1]), sys.argv[2])
    for number in range(int(sys.argv[3]), int(sys.argv[4])):
        emit(str(number))
        emit(trial.judge(number))
