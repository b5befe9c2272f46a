"""Make `trt_names.json` anew: the names of TensorRT's real bindings, which the fakes are held to.

    python tests/golden/make_trt_names.py

The wheels of NVIDIA's bindings are small and on PyPI; they import on a machine without TensorRT if
eleven C functions are there, which a stub gives that is never called. They are for the Python
named here. 8.6.0, whose whole wheel imports with Python 3.10, and what is installed of TensorRT-RTX
were listed in the same way.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILE = HERE / "trt_names.json"
PYTHON = (3, 11)
WHEELS = {  # version → distribution, and the digest of its wheel for `PYTHON` on x86-64
    "10.3.0": (
        "tensorrt_cu12_bindings",
        "59ace22d7f2ca1e9dcde2cb0cb5916912cb3cd5a9d72dd7852be0160d9b3a0ee",
    ),
    "10.13.3.9": (
        "tensorrt_cu12_bindings",
        "33aa9d104c04b008871645a97bd8a1a02279cf498d251df5e767d9d5183e0646",
    ),
    "11.4.0.106": (
        "tensorrt_cu13_bindings",
        "d072ac2a095e2be749fefc847adfb25d5ebe70303401df62ede8fe67a59f27fc",
    ),
}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins", "getInferLibVersion", "getLogger",
)  # fmt: skip

# Classes and enumerations that vzip names; those that a version lacks are left out of its list.
OWNERS = (
    "NetworkDefinitionCreationFlag", "PreviewFeature", "BuilderFlag", "TacticSource",
    "MemoryPoolType", "LayerInformationFormat", "ProfilingVerbosity", "DataType", "LayerType",
    "DynamicShapesKernelSpecializationStrategy", "ExecutionContextAllocationStrategy",
    "ComputeCapability", "TensorIOMode", "TensorLocation", "TensorFormat", "Builder",
    "IBuilderConfig", "OnnxParser", "ParserError", "EngineInspector", "ICudaEngine",
    "IExecutionContext", "IRuntimeConfig", "IRuntimeCache", "INetworkDefinition", "ILayer",
    "ITensor", "IProgressMonitor", "IProfiler", "Runtime", "ILogger", "Logger",
    "IOptimizationProfile", "ITimingCache", "IHostMemory", "ILogger.Severity",
)  # fmt: skip

_LIST = """
import importlib, json, sys
module, owners = importlib.import_module(sys.argv[1]), sys.argv[2:]
found = {}
for name in owners:
    owner = module
    for part in name.split("."):
        owner = getattr(owner, part, None)
    if owner is not None:
        members = getattr(owner, "__members__", None)
        found[name] = sorted(members if members is not None else
                             [each for each in dir(owner) if not each.startswith("_")])
print(json.dumps(found))
"""


def listed(module: str, path: str = "", libraries: str = "") -> dict[str, list[str]]:
    """Return the names of `OWNERS`, asked in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": libraries}
    done = subprocess.run(
        [sys.executable, "-c", _LIST, module, *OWNERS],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{module} of {path or 'this environment'}: {done.stderr.strip()}")
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def names_of_wheel(version: str, folder: Path) -> dict[str, list[str]]:
    """Return the names of a version's bindings, from the wheel that is downloaded into `folder`."""
    distribution, digest = WHEELS[version]
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*pip, f"{distribution}=={version}"], check=True)
    (wheel,) = folder.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != digest:
        raise SystemExit(f"{wheel.name} has another digest than the one that is pinned")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    major = version.partition(".")[0]
    for library in LIBRARIES:
        output = folder / f"lib{library}.so.{major}"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", output, source], check=True)
    return listed("tensorrt_bindings", str(folder), str(folder))


def written(names: Mapping[str, Mapping[str, list[str]]]) -> str:
    """Return the file's text: a line or a few for each class."""
    bindings = []
    for title, owners in names.items():
        lines = []
        for owner, members in owners.items():
            text = ", ".join(json.dumps(each) for each in members)
            wrapped = textwrap.fill(text, 98, initial_indent="   ", subsequent_indent="   ")
            lines.append(f"  {json.dumps(owner)}: [\n{wrapped}\n  ]")
        bindings.append(f" {json.dumps(title)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(bindings) + "\n}\n"


def main() -> None:
    """Write the file anew."""
    if sys.version_info[:2] != PYTHON:
        raise SystemExit(f"the pinned wheels are for Python {PYTHON[0]}.{PYTHON[1]}")
    import tensorrt_rtx

    before: Any = json.loads(FILE.read_text(encoding="utf-8"))
    names = {"tensorrt 8.6.0": before["tensorrt 8.6.0"]}
    with tempfile.TemporaryDirectory() as folder:
        for version in WHEELS:
            names[f"tensorrt {version}"] = names_of_wheel(version, Path(folder) / version)
    names[f"tensorrt_rtx {tensorrt_rtx.__version__}"] = listed(
        "tensorrt_rtx", os.environ.get("PYTHONPATH", "")
    )
    FILE.write_text(written(names), encoding="utf-8")


if __name__ == "__main__":
    main()
