"""A module that looks like TensorRT's Python bindings, for what only a GPU can run.

It has the names that the real ones have, and no others: `tests/golden/trt_names.json` was made from
the wheels of 8.6.0, 10.3.0, 10.13.3 and 11.4.0, and `test_api.py` holds this file to it.

What it builds is a "plan" that says how it was built.
"""

from __future__ import annotations

import enum
import json
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vzip.runtime.bundle.reader import read_bundle

Version = Literal["8.6", "10.3", "10.13", "11.4"]

_VERSIONS = {"8.6": "8.6.2", "10.3": "10.3.0.30", "10.13": "10.13.3.9", "11.4": "11.4.1.5"}


@dataclass
class Tensor:
    name: str
    dtype: Any
    shape: tuple[int, ...]


@dataclass
class Layer:
    """A layer of a parsed network; records what it was held to."""

    name: str
    type: Any
    inputs: list[Any]
    outputs: list[Any]
    precision: Any = None
    output_types: dict[int, Any] = field(default_factory=dict)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def get_output(self, index: int) -> Any:
        return self.outputs[index]

    def set_input(self, index: int, tensor: Any) -> None:
        self.inputs[index] = tensor

    def set_output_type(self, index: int, dtype: Any) -> None:
        self.output_types[index] = dtype


def make(
    version: Version,
    *,
    gpu: bool = True,
    parse: Callable[[Any, bytes, str], list[str]] = lambda network, model, path: [],
    inputs: list[tuple[str, str, tuple[int, ...]]] | None = None,
    outputs: list[tuple[str, str, tuple[int, ...]]] | None = None,
    layers: Callable[[Any], list[Layer]] = lambda trt: [],
    cache: bytes = b"the GPU's timings",
    build: Callable[[Any, Any], str | None] = lambda network, config: None,
    header: Callable[[bytes], bytes] = lambda header: header,
    talk: Sequence[tuple[str, str]] = (),
) -> Any:
    """Return a module.

    Args:
        version: Whose names it has.
        gpu: Whether a builder can be made.
        parse: Given the network, the model and its path; returns the parser's errors.
        inputs: Of every parsed network: name, name of the DataType, shape.
        outputs: Likewise.
        layers: Of every parsed network.
        cache: The timing cache of this GPU, and of no other.
        build: Called by a build; returns why it fails, or None.
        header: Given the header of a built engine; returns another.
        talk: What every builder says: name of a severity, and a message.
    """
    major = int(version.split(".")[0])
    minor = int(version.split(".")[1])
    trt: Any = types.ModuleType("tensorrt")
    trt.__version__ = _VERSIONS[version]
    trt.made = types.SimpleNamespace(configs=[], networks=[], caches=[], loggers=[])

    def enumeration(name: str, members: list[str]) -> Any:
        # Other numbers in every generation, as the real ones have.
        return enum.IntEnum(name, {each: place for place, each in enumerate(members)})

    weak, strong = major < 11, major >= 10
    trt.NetworkDefinitionCreationFlag = enumeration(
        "NetworkDefinitionCreationFlag",
        ["EXPLICIT_BATCH"] * weak + ["STRONGLY_TYPED"] * strong,  # in 11 it does nothing
    )
    trt.BuilderFlag = enumeration(
        "BuilderFlag",
        ["TF32", "REFIT"]
        + ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"] * weak
        + ["EDITABLE_TIMING_CACHE"] * ((major, minor) >= (10, 8)),
    )
    trt.TacticSource = enumeration(
        "TacticSource",
        ["CUBLAS", "CUBLAS_LT", "CUDNN"] * (major < 11)
        + ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"],
    )
    trt.MemoryPoolType = enumeration("MemoryPoolType", ["WORKSPACE", "TACTIC_DRAM"])
    trt.ProfilingVerbosity = enumeration(
        "ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED", "NONE"]
    )
    trt.LayerInformationFormat = enumeration("LayerInformationFormat", ["ONELINE", "JSON"])
    trt.DataType = enumeration(
        "DataType", ["FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8"] + ["INT64"] * strong
    )
    trt.LayerType = enumeration(
        "LayerType",
        ["CONSTANT", "SHAPE", "CAST", "IDENTITY", "MATRIX_MULTIPLY", "SOFTMAX", "NORMALIZATION",
         "REDUCE", "TOPK", "ELEMENTWISE", "SHUFFLE"],
    )  # fmt: skip

    class ILogger:
        Severity = enumeration(
            "Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"]
        )

    class Logger(ILogger):
        def __init__(self, min_severity: Any = None) -> None:
            self.min_severity = min_severity

    class ParserError:
        def __init__(self, text: str) -> None:
            self._text = text

        def desc(self) -> str:
            return self._text

    class INetworkDefinition:
        def __init__(self, flags: int) -> None:
            self.created_with = flags
            self.inputs: list[Tensor] = []
            self.outputs: list[Tensor] = []
            self.layers: list[Layer] = []

        num_inputs = property(lambda self: len(self.inputs))
        num_outputs = property(lambda self: len(self.outputs))
        num_layers = property(lambda self: len(self.layers))

        def get_input(self, index: int) -> Tensor:
            return self.inputs[index]

        def get_output(self, index: int) -> Tensor:
            return self.outputs[index]

        def get_layer(self, index: int) -> Layer:
            return self.layers[index]

        def add_cast(self, tensor: Any, to_type: Any) -> Layer:
            cast = Layer("", trt.LayerType.CAST, [tensor], [])
            cast.outputs = [Tensor(f"cast {len(self.layers)}", to_type, tensor.shape)]
            self.layers.append(cast)
            return cast

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._network, self._logger, self._errors = network, logger, list[str]()

        def parse(self, model: bytes, path: str | None = None) -> bool:
            assert path is not None  # else external data isn't found
            self._errors = parse(self._network, model, path)
            for error in self._errors:
                self._logger.log(ILogger.Severity.ERROR, error)

            def tensors(specified: Any) -> list[Tensor]:
                return [Tensor(n, getattr(trt.DataType, d), s) for n, d, s in specified or []]

            self._network.inputs, self._network.outputs = tensors(inputs), tensors(outputs)
            self._network.layers = layers(trt)
            return not self._errors

        num_errors = property(lambda self: len(self._errors))

        def get_error(self, index: int) -> ParserError:
            return ParserError(self._errors[index])

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> memoryview:
            return memoryview(self.content or cache)

    class IOptimizationProfile:
        def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
            self.shapes = (name, low, opt, high)

    class IBuilderConfig:
        def __init__(self) -> None:
            self.flags = {trt.BuilderFlag.TF32}
            self.pools: dict[Any, int] = {}
            self.builder_optimization_level = 3
            self.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
            self.sources = (1 << len(trt.TacticSource)) - 1
            self.profiles: list[Any] = []
            self.timing_cache: ITimingCache | None = None
            self.previews: dict[Any, bool] = {}

        def set_flag(self, flag: Any) -> None:
            self.flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            self.flags.discard(flag)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self.pools[pool] = size

        def get_tactic_sources(self) -> int:
            return self.sources

        def set_tactic_sources(self, tactic_sources: int) -> bool:
            self.sources = tactic_sources
            return True

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles.append(profile)
            return len(self.profiles) - 1

        def create_timing_cache(self, content: bytes) -> ITimingCache | None:
            made = ITimingCache(content)
            trt.made.caches.append(content)
            if content.startswith(b"damaged"):  # as the real one: an empty cache, and a line
                trt.logger.log(ILogger.Severity.WARNING, "Failed to deserialize timing cache.")
                made.content = b""
            return None if content.startswith(b"none") else made

        def set_timing_cache(self, cache_: ITimingCache, ignore_mismatch: bool) -> bool:
            if not ignore_mismatch and cache_.content not in (b"", cache):
                return False
            self.timing_cache = cache_
            return True

        def get_timing_cache(self) -> ITimingCache | None:
            return self.timing_cache

    class Builder:
        def __init__(self, logger: Any) -> None:
            if not gpu:
                logger.log(ILogger.Severity.WARNING, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            trt.logger = logger
            trt.made.loggers.append(logger)
            for severity, message in talk:
                logger.log(ILogger.Severity[severity], message)

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            network = INetworkDefinition(flags)
            trt.made.networks.append(network)
            return network

        def create_builder_config(self) -> IBuilderConfig:
            config = IBuilderConfig()
            trt.made.configs.append(config)
            return config

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> memoryview | None:
            failure = build(network, config)
            monitor = getattr(config, "progress_monitor", None)
            if monitor is not None:
                monitor.phase_start("Building engine", None, 2)
                for step in range(2):
                    if not monitor.step_complete("Building engine", step):
                        failure = "Build canceled by user"
                monitor.phase_finish("Building engine")
            if failure is not None:
                trt.logger.log(ILogger.Severity.ERROR, failure)
                return None
            said = {"flags": sorted(flag.name for flag in config.flags), "of": trt.__version__}
            numbers = bytes(int(part) & 0xFF for part in f"{trt.__version__}.0".split(".")[:4])
            made = header(b"ftrt" + bytes(20) + numbers)
            return memoryview(made + json.dumps(said).encode())

    class EngineInspector:
        def get_engine_information(self, form: Any) -> str:
            assert form == trt.LayerInformationFormat.JSON
            names = ["conv", "_gemm_mha_v2 of layer 0", "_gemm_mha_v2 of layer 1", "topk"]
            return json.dumps({
                "Layers": [
                    {
                        "Name": name,
                        "LayerType": "kgen",
                        "Outputs": [{"Name": "x", "Format/Datatype": "Half"}],
                    }
                    for name in names
                ],
                "Bindings": ["image", "image_embeds", "kept_indices"],
            })  # fmt: skip

    class ICudaEngine:
        def create_engine_inspector(self) -> EngineInspector:
            return EngineInspector()

    class Runtime:
        def __init__(self, logger: Any) -> None:
            trt.made.loggers.append(logger)
            if not gpu:
                logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize_cuda_engine(self, plan: Any) -> ICudaEngine | None:
            return ICudaEngine() if bytes(plan[:4]) == b"ftrt" else None

    size = "device_memory_size" if major == 8 else "device_memory_size_v2"
    setattr(ICudaEngine, size, 2**20)
    if major == 8:
        trt.PreviewFeature = enumeration("PreviewFeature", ["PROFILE_SHARING_0806"])

        def set_preview_feature(self: Any, feature: Any, enable: bool) -> None:
            self.previews[feature] = enable

        IBuilderConfig.set_preview_feature = set_preview_feature  # type: ignore[attr-defined]
    if major == 10:  # always on; asking for it is an error in the log
        trt.PreviewFeature = enumeration(
            "PreviewFeature", ["PROFILE_SHARING_0806", "ALIASED_PLUGIN_IO_10_03"]
        )
    if strong:

        class IProgressMonitor:
            pass

        trt.IProgressMonitor = IProgressMonitor
    for each in (ILogger, Logger, ParserError, INetworkDefinition, OnnxParser, ITimingCache,
                 IOptimizationProfile, IBuilderConfig, Builder, EngineInspector, ICudaEngine,
                 Runtime):  # fmt: skip
        setattr(trt, each.__name__, each)
    return trt


def install(monkeypatch: Any, module: Any) -> Any:
    """Let `import tensorrt` give a fake module."""
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def install_for(path: Path, monkeypatch: Any, version: Version, **options: Any) -> Any:
    """Install a fake whose parsed networks have the tensors of a bundle; `options` as of `make`."""
    names = {"uint8": "UINT8", "float32": "FLOAT", "float16": "HALF"}
    names["int64"] = "INT32" if version == "8.6" else "INT64"
    manifest = read_bundle(path).manifest
    inputs, outputs = (
        [
            (each.name, names[each.dtype], tuple(-1 if d == "batch" else d for d in each.shape))
            for each in tensors
        ]
        for tensors in (manifest.inputs, manifest.outputs)
    )
    return install(monkeypatch, make(version, inputs=inputs, outputs=outputs, **options))
