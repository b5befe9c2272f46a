"""What a TensorRT can do is read off its names; these are held to the real wheels' names."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx

from tests.export import fake_tensorrt
from tests.golden import make_trt_names
from tests.places import GOLDEN
from tests.refusals import refused
from vzip.export.engines.tensorrt.api import capabilities_of, installed_bindings, load_bindings
from vzip.runtime.errors import BackendError, InvalidInputError, MissingDependencyError

FILE = GOLDEN / "trt_names.json"
NAMES: dict[str, dict[str, list[str]]] = json.loads(FILE.read_text())
# Instances of the fake hold these, as the real ones do; the rest of its attributes are notes.
SET_BY_VZIP = {
    "IBuilderConfig": {"builder_optimization_level", "profiling_verbosity"},
    "ILayer": {"precision", "set_output_type", "get_input", "get_output", "type", "num_inputs"},
}


def names_of(owner: Any) -> set[str]:
    """Return the public names of a class or the members of an enumeration."""
    members = getattr(owner, "__members__", None)
    if members is not None:
        return set(members)
    return {name for name in dir(owner) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("version", "wheel"),
    [("8.6", "8.6.0"), ("10.3", "10.3.0"), ("10.13", "10.13.3.9"), ("11.4", "11.4.0.106")],
)
def test_a_fake_has_no_name_that_the_real_bindings_lack(version: Any, wheel: str) -> None:
    real, fake = NAMES[f"tensorrt {wheel}"], fake_tensorrt.make(version)
    classes = [name for name, value in vars(fake).items() if isinstance(value, type)]
    assert set(classes) <= set(real)
    for name in classes:
        assert names_of(getattr(fake, name)) <= set(real[name]), name
    assert names_of(fake.ILogger.Severity) <= set(real["ILogger.Severity"])
    for name, used in SET_BY_VZIP.items():
        weak = version != "11.4"  # 11 holds no layer to a precision
        assert used - ({"precision", "set_output_type"} if not weak else set()) <= set(real[name])
    assert ("IProgressMonitor" in real) == (version != "8.6")
    assert "ComputeCapability" not in real


def test_a_fake_lacks_no_ability_of_the_real_bindings() -> None:
    """Names that `abilities` looks for: what is there is in the fake too."""
    for version, wheel in (("10.3", "10.3.0"), ("10.13", "10.13.3.9"), ("11.4", "11.4.0.106")):
        real, fake = NAMES[f"tensorrt {wheel}"], fake_tensorrt.make(version)  # type: ignore[arg-type]
        for owner, name in (
            ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
            ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"),
            ("BuilderFlag", "FP16"),
            ("BuilderFlag", "INT8"),
            ("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS"),
            ("BuilderFlag", "EDITABLE_TIMING_CACHE"),
            ("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
            ("PreviewFeature", "PROFILE_SHARING_0806"),
            ("TacticSource", "CUBLAS"),
            ("TacticSource", "CUDNN"),
            ("IBuilderConfig", "create_timing_cache"),
        ):
            has = name in names_of(getattr(fake, owner, None))
            assert has == (name in real.get(owner, [])), (version, owner, name)


# What the runtime calls, and the class that must have it; 8.6 has older names for some.
CALLED = {
    "Runtime": {"deserialize_cuda_engine", "engine_host_code_allowed"},
    "ICudaEngine": {
        "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_shape",
        "get_tensor_dtype", "get_tensor_location", "get_tensor_format", "get_tensor_format_desc",
        "create_execution_context", "device_memory_size_v2", "create_engine_inspector",
    },
    "IExecutionContext": {
        "set_device_memory", "active_optimization_profile", "set_optimization_profile_async",
        "set_input_shape", "set_tensor_address", "execute_async_v3", "profiler",
    },
    "EngineInspector": {"get_engine_information"},
    "INetworkDefinition": {"add_cast", "get_layer", "num_layers"},
    "ILayer": {"set_input", "get_input", "get_output", "type", "num_inputs"},
}  # fmt: skip
RTX_CALLED = {
    "IRuntimeConfig": {
        "set_execution_context_allocation_strategy", "create_runtime_cache", "set_runtime_cache",
        "dynamic_shapes_kernel_specialization_strategy",
    },
    "IRuntimeCache": {"serialize", "deserialize"},
    "IExecutionContext": {"is_stream_capturable"},
}  # fmt: skip


def test_what_the_runtime_calls_is_there() -> None:
    for title, real in NAMES.items():
        if title != "tensorrt 8.6.0":
            for owner, names in CALLED.items():
                assert names <= set(real[owner]), (title, owner)
    (rtx,) = (names for title, names in NAMES.items() if title.startswith("tensorrt_rtx"))
    for owner, names in RTX_CALLED.items():
        assert names <= set(rtx[owner]), owner


def test_the_names_of_10_and_11_are_those_of_pinned_wheels() -> None:
    versions = {f"tensorrt {version}" for version in make_trt_names.WHEELS}
    others = {"tensorrt 8.6.0", f"tensorrt_rtx {tensorrt_rtx.__version__}"}
    assert versions == NAMES.keys() - others
    assert FILE.read_text(encoding="utf-8") == make_trt_names.written(NAMES)


def test_the_list_of_rtx_is_the_installed_packages() -> None:
    (listed,) = (names for bindings, names in NAMES.items() if bindings.startswith("tensorrt_rtx"))
    for name, expected in listed.items():
        owner: Any = tensorrt_rtx
        for part in name.split("."):
            owner = getattr(owner, part)
        assert set(expected) <= names_of(owner), name


def test_what_each_version_can(monkeypatch: pytest.MonkeyPatch) -> None:
    can = {}
    for version in ("8.6", "10.3", "10.13", "11.4"):
        fake_tensorrt.install(monkeypatch, fake_tensorrt.make(version))  # type: ignore[arg-type]
        can[version] = load_bindings("tensorrt").can
    assert [each.strongly_typed for each in can.values()] == [False, True, True, True]
    assert [each.strongly_typed_flag for each in can.values()] == [False, True, True, True]
    assert [each.weakly_typed for each in can.values()] == [True, True, True, False]
    assert [each.progress_monitor for each in can.values()] == [False, True, True, True]
    assert [each.editable_timing_cache for each in can.values()] == [False, False, True, True]
    assert [each.explicit_batch_flag for each in can.values()] == [True, True, True, False]
    assert can["8.6"].external_tactics == ("CUBLAS", "CUBLAS_LT", "CUDNN")
    assert can["11.4"].external_tactics == ()
    assert not any(each.ahead_of_time for each in can.values())
    assert [each.profile_sharing for each in can.values()] == [True, False, False, False]
    assert not any(each.user_allocation for each in can.values())
    assert all(each.timing_cache for each in can.values())


def test_the_real_rtx() -> None:
    bindings = load_bindings("tensorrt_rtx")
    assert str(bindings) == f"TensorRT-RTX {tensorrt_rtx.__version__}"
    assert bindings.can.strongly_typed
    assert not bindings.can.weakly_typed
    assert not bindings.can.timing_cache  # its timing cache does nothing
    assert bindings.can.progress_monitor
    assert bindings.can.user_allocation
    assert not bindings.can.profile_sharing  # its contexts share profiles anyway
    assert {"75", "80", "86", "89", "120"} <= set(bindings.can.ahead_of_time)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sm86", ("86",)),
        ("sm89,sm86", ("86", "89")),
        ("8.9, SM_8.6 ,86", ("86", "89")),
        ("sm120,7.5", ("75", "120")),
        ("12.1", ("121",)),
    ],
)
def test_names_of_gpus(text: str, expected: tuple[str, ...]) -> None:
    assert capabilities_of(text, load_bindings("tensorrt_rtx")) == expected


@pytest.mark.parametrize("text", ["", "sm86,", "ampere", "8.6.1", "sm", "rtx3090", "8,6", "sm86;"])
def test_names_that_are_none(text: str) -> None:
    with refused(InvalidInputError, got="--rtx", expected="sm86,sm89"):
        capabilities_of(text, load_bindings("tensorrt_rtx"))


@pytest.mark.parametrize("text", ["sm87", "9.0", "sm86,sm110", "10.0"])
def test_gpus_that_need_their_own_machine(text: str) -> None:
    with refused(InvalidInputError, got="--rtx", expected=("sm75", "sm80")):
        capabilities_of(text, load_bindings("tensorrt_rtx"))


def test_tensorrt_cant_build_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.install(monkeypatch, fake_tensorrt.make("10.3"))
    with refused(InvalidInputError, got="10.3.0.30", cure="vzip[rtx]"):
        capabilities_of("sm86", load_bindings("tensorrt"))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that comes first on the path, and no TensorRT imported."""
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("tensorrt", "tensorrt_rtx"):
        sys.modules.pop(name, None)


def test_the_first_that_is_installed(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # This environment has TensorRT-RTX and no TensorRT.
    assert installed_bindings(ahead_of_time=False).name == "tensorrt_rtx"
    fake_tensorrt.install(monkeypatch, fake_tensorrt.make("10.3"))
    assert installed_bindings(ahead_of_time=False).name == "tensorrt"
    assert installed_bindings(ahead_of_time=True).name == "tensorrt_rtx"


def test_neither_is_installed(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(packages)])
    with refused(MissingDependencyError, got="'tensorrt_rtx'", cure="JetPack") as caught:
        installed_bindings(ahead_of_time=False)
    assert "\n" not in str(caught.value)
    with refused(MissingDependencyError, got="'tensorrt_rtx'", cure="vzip[rtx]"):
        installed_bindings(ahead_of_time=True)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise ImportError('libcudnn.so.8: cannot open shared object file')", "libcudnn.so.8 is"),
        ("raise OSError('libnvinfer.so.10: cannot open')", "libnvinfer.so.10 is"),
        ("import tensorrt_libs", "No module named 'tensorrt_libs'"),
    ],
)
def test_one_that_is_installed_and_broken_is_not_passed_over(
    packages: Path, code: str, expected: str
) -> None:
    (packages / "tensorrt.py").write_text(code)
    with refused(MissingDependencyError, got=expected):
        installed_bindings(ahead_of_time=False)


def test_something_else_of_that_name(packages: Path) -> None:
    (packages / "tensorrt").mkdir()
    with refused(BackendError, got="None", expected="10.3.0.30"):
        load_bindings("tensorrt")


def test_a_lean_runtime_cant_build(packages: Path) -> None:
    (packages / "tensorrt.py").write_text("__version__ = '10.3.0'\nclass Runtime: pass\n")
    with refused(BackendError, got=("10.3.0", "Builder")):
        load_bindings("tensorrt")
