"""A bundle as a model repository of Triton Inference Server, or of what reads the same (KServe).

Three models: ``NAME-encoder`` runs the graph or an engine, with Triton's own dynamic batcher;
``NAME-prepare`` makes the tower's input of a picture's file, in Python; ``NAME`` is the ensemble of
both. https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vzip.runtime.bundle.engine_record import EngineRecord
from vzip.runtime.bundle.manifest import DATA_FILE
from vzip.runtime.bundle.precision_record import data_file
from vzip.runtime.bundle.reader import Bundle, open_engine, read_bundle
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.guard import door

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vzip.runtime.bundle.manifest import Manifest, Tensor

PICTURE: Final = "picture"
_TYPES: Final[Mapping[str, str]] = {
    "uint8": "TYPE_UINT8", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "int64": "TYPE_INT64",
}  # fmt: skip
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
DELAY_US: Final = 2000

PREPARE: Final = '''\
"""Triton's Python backend: a picture's file becomes what the encoder takes."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.errors import VzipError
from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.preprocess import pixel_values, tower_image


class TritonPythonModel:
    """Prepares pictures; one that can't be read is the error of its own request alone."""

    def initialize(self, args):
        """Read the bundle's manifest, which lies beside this file."""
        self.manifest = Manifest.from_bytes((Path(__file__).parent / "manifest.json").read_bytes())

    def execute(self, requests):
        """Return a response for each request."""
        return [self._response(request) for request in requests]

    def _response(self, request):
        given = pb_utils.get_input_tensor_by_name(request, "picture").as_numpy()
        preprocessing = self.manifest.preprocessing
        try:
            pictures = np.stack(
                [tower_image(load_image(bytes(each)), preprocessing) for each in given.ravel()]
            )
            if self.manifest.input.name != "image":
                pictures = pixel_values(pictures, preprocessing)
        except VzipError as error:
            failed = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=failed)
        return pb_utils.InferenceResponse([pb_utils.Tensor(self.manifest.input.name, pictures)])
'''


@door(InvalidInputError, "a model repository of '{bundle}' can't be written")
def write_repository(
    bundle: Bundle | str | Path,
    folder: Path,
    *,
    name: str | None = None,
    engine: str | None = None,
    precision: str | None = None,
    instances: int = 1,
) -> list[str]:
    """Write a model repository; each model appears whole, or not at all, the ensemble last.

    Args:
        bundle: The bundle or its folder.
        folder: The repository; it may hold other models.
        name: Of the ensemble; None for the bundle folder's.
        engine: Name of a TensorRT engine of the bundle, built with the TensorRT of Triton's
            container; None for the graph, which ONNX Runtime runs.
        precision: Of the graph; None for the bundle's own.
        instances: How many of the encoder run side by side on each GPU, or on the CPU.

    Returns:
        The names of the models.

    Raises:
        InvalidInputError: The name or the number can't be, or there is such a model; there is no
            such engine or graph; the bundle takes tiles, whose number Triton can't know, or several
            pictures in a static batch.
        BundleError: The bundle is damaged.
    """
    opened = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    opened = opened.at(precision)
    manifest = opened.manifest
    called = name or opened.path.resolve().name
    _check(called, manifest, instances)
    encoder, prepare = f"{called}-encoder", f"{called}-prepare"
    record = None if engine is None else _engine(opened, engine)
    most = _most(manifest, record)
    texts = {
        f"{prepare}/config.pbtxt": _prepare_config(prepare, manifest, most),
        f"{prepare}/1/model.py": PREPARE.encode(),
        f"{prepare}/1/manifest.json": manifest.to_bytes(),
        f"{encoder}/config.pbtxt": _encoder_config(encoder, manifest, record, most, instances),
        f"{called}/config.pbtxt": _ensemble_config(called, encoder, prepare, manifest, most),
        f"{called}/1/README": b"An ensemble has no file of its own; Triton wants its folder.\n",
    }
    names = [prepare, encoder, called]
    for each in names:
        if (folder / each).exists():
            raise InvalidInputError(
                f"{folder} has a model '{each}'",
                expected="none of that name",
                cure="remove it, or give another name with --name",
            )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".vzip-", dir=folder) as made:
        for file, data in texts.items():
            path = Path(made, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        version = Path(made, encoder, "1")
        version.mkdir(exist_ok=True)
        _copy_weights(opened, engine, version)
        for each in names:
            (Path(made) / each).rename(folder / each)
    return names[::-1]


def _check(name: str, manifest: Manifest, instances: int) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"got the name {name!r} for a model",
            expected="letters, digits, '_', '.' and '-'",
            cure="give another with --name",
        )
    if not 1 <= instances <= 64:
        raise InvalidInputError(f"got {instances} instances", expected="1 to 64")
    if manifest.tiling is not None:
        raise InvalidInputError(
            "the bundle cuts pictures into tiles, whose number an ensemble can't know",
            expected="a bundle that cuts none",
            cure="serve it with 'vzip serve', which speaks the same protocol",
        )
    if not manifest.batch.dynamic and manifest.batch.max > 1:
        raise InvalidInputError(
            f"the bundle has a static batch of {manifest.batch.max}",
            expected="an open batch, which Triton's batcher fills, or one of 1",
            cure="export another with 'vzip export --max-batch'",
        )


def _engine(bundle: Bundle, engine: str) -> EngineRecord:
    engines = {
        name: each for name, each in bundle.manifest.engines.items() if each.stack == "tensorrt"
    }
    if engine not in engines:
        raise InvalidInputError(
            f"{bundle.path} has no TensorRT engine {engine!r}",
            expected=f"one of {', '.join(sorted(engines))}" if engines else "one in it",
            cure="leave --engine out, and ONNX Runtime runs the graph",
        )
    return engines[engine]


def _copy_weights(bundle: Bundle, engine: str | None, folder: Path) -> None:
    """Copy what runs, under Triton's names; external data keeps the name that the graph has."""
    if engine is not None:
        with open_engine(bundle, engine) as file, (folder / "model.plan").open("wb") as copy:
            shutil.copyfileobj(file, copy)
        return
    (folder / "model.onnx").write_bytes(bundle.read_model())
    data = DATA_FILE if bundle.quantised is None else data_file(bundle.quantised)
    if data in bundle.manifest.files:
        with bundle.open_file(data) as file, (folder / data).open("wb") as copy:
            shutil.copyfileobj(file, copy)


def _most(manifest: Manifest, record: EngineRecord | None) -> int:
    """Return Triton's ``max_batch_size``: 0 where the batch is part of the shapes."""
    if not manifest.batch.dynamic:
        return 0
    return manifest.batch.max if record is None else record.batch.max


def _encoder_config(
    name: str, manifest: Manifest, record: EngineRecord | None, most: int, instances: int
) -> bytes:
    platform = "onnxruntime_onnx" if record is None else "tensorrt_plan"
    kind = "KIND_AUTO" if record is None else "KIND_GPU"
    lines = [
        f'name: "{name}"',
        f'platform: "{platform}"',
        f"max_batch_size: {most}",
        *_tensors("input", manifest.inputs, most),
        *_tensors("output", manifest.outputs, most, old=_indices_are_int32(record)),
        f"instance_group [ {{ count: {instances} kind: {kind} }} ]",
    ]
    if most:
        sizes = ", ".join(map(str, sorted({most, *((record.batch.opt,) if record else ())})))
        lines.append(
            f"dynamic_batching {{ preferred_batch_size: [ {sizes} ] "
            f"max_queue_delay_microseconds: {DELAY_US} }}"
        )
    spec = manifest.input
    lines += [
        "response_cache { enable: true }",
        "model_warmup [ {",
        '  name: "zeros"',
        f"  batch_size: {1 if most else 0}",
        (
            f'  inputs {{ key: "{spec.name}" value: {{ data_type: {_TYPES[spec.dtype]} '
            f"dims: {_dims(spec, most)} zero_data: true }} }}"
        ),
        "} ]",
    ]
    return _text(lines)


def _indices_are_int32(record: EngineRecord | None) -> bool:
    """Return whether an engine gives int32 where the graph gives int64: TensorRT before 10."""
    return record is not None and record.version.split(".")[0] == "8"


def _prepare_config(name: str, manifest: Manifest, most: int) -> bytes:
    lines = [
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {most}",
        f'input [ {{ name: "{PICTURE}" data_type: TYPE_STRING dims: [ 1 ] }} ]',
        *_tensors("output", manifest.inputs, most),
        "instance_group [ { count: 2 kind: KIND_CPU } ]",
    ]
    return _text(lines)


def _ensemble_config(name: str, encoder: str, prepare: str, manifest: Manifest, most: int) -> bytes:
    between = manifest.input.name
    outputs_ = " ".join(
        f'output_map {{ key: "{each.name}" value: "{each.name}" }}' for each in manifest.outputs
    )
    lines = [
        f'name: "{name}"',
        'platform: "ensemble"',
        f"max_batch_size: {most}",
        f'input [ {{ name: "{PICTURE}" data_type: TYPE_STRING dims: [ 1 ] }} ]',
        *_tensors("output", manifest.outputs, most),
        "ensemble_scheduling {",
        "  step [",
        (
            f'    {{ model_name: "{prepare}" model_version: -1 '
            f'input_map {{ key: "{PICTURE}" value: "{PICTURE}" }} '
            f'output_map {{ key: "{between}" value: "{between}" }} }},'
        ),
        (
            f'    {{ model_name: "{encoder}" model_version: -1 '
            f'input_map {{ key: "{between}" value: "{between}" }} {outputs_} }}'
        ),
        "  ]",
        "}",
    ]
    return _text(lines)


def _tensors(what: str, tensors: Sequence[Tensor], most: int, *, old: bool = False) -> list[str]:
    """Return an ``input`` or ``output`` field; ``old`` for engines that give indices in int32."""
    types = {**_TYPES, "int64": "TYPE_INT32"} if old else _TYPES
    inner = ",\n".join(
        f'  {{ name: "{each.name}" data_type: {types[each.dtype]} dims: {_dims(each, most)} }}'
        for each in tensors
    )
    return [f"{what} [", inner, "]"]


def _dims(tensor: Tensor, most: int) -> str:
    """Return a tensor's extents, without the batch where that is Triton's business."""
    extents = tensor.shape[1:] if most else tensor.shape
    return f"[ {', '.join(map(str, extents))} ]"


def _text(lines: Sequence[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()
