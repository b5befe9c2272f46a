"""What a machine can run and what is missing for the rest, judged from its record.

`environment` asks; this judges, and `showing` prints. The judgement is a pure function of the
record, so that tests can show it machines that nobody here has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from vzip.runtime.backends.tensorrt.bindings import misfit

Record = Mapping[str, Any]

SMALLEST_CMA: Final = 64  # MiB; [E]
SMALLEST_SM: Final = 75  # TensorRT 10's and PyTorch's oldest in common: Turing

# What `vzip export` needs beyond torch and onnxruntime.
EXPORT_PACKAGES: Final = ("transformers", "onnx", "onnxscript", "safetensors")
# What `vzip build --cpu` needs beyond onnxruntime.
CPU_BUILD_PACKAGES: Final = ("onnx", "onnx-ir")


@dataclass(frozen=True)
class Need:
    """Something that is missing.

    Attributes:
        what: What it is.
        cure: The command that brings it, or what to do where no command does.
    """

    what: str
    cure: str


@dataclass(frozen=True)
class Verdict:
    """Whether one thing can be done here.

    Attributes:
        name: Of the backend or command.
        detail: What it would run on, where nothing is missing.
        needs: What is missing; none if it is ready.
    """

    name: str
    detail: str
    needs: tuple[Need, ...]

    @property
    def ready(self) -> bool:
        """Whether nothing is missing."""
        return not self.needs


# Judging


def backends(record: Record) -> list[Verdict]:
    """Return a verdict on every backend, in the order in which ``auto`` tries them."""
    return [judge(record) for judge in JUDGES.values()]


def commands(record: Record) -> list[Verdict]:
    """Return a verdict on every command that needs more than a backend."""
    return [_build(record), _build_cpu(record), _build_rtx(record), _export(record), _ask(record)]


def _tensorrt(record: Record) -> Verdict:
    """TensorRT, or TensorRT-RTX where only that is installed."""
    title, found, needs = "TensorRT", record["tensorrt"], _tensorrt_needs(record)
    if found is None and record["tensorrt_rtx"] is not None:
        title, found, needs = "TensorRT-RTX", record["tensorrt_rtx"], _rtx_here_needs(record)
    version = (found or {}).get("version", "")
    return Verdict(
        "tensorrt",
        f"{title} {version} on {_gpu_name(record)}",
        (*_gpu_needs(record), *_cudart_needs(record), *needs),
    )


def _onnxruntime(record: Record) -> Verdict:
    needs = _package_needs(record, "onnxruntime", "pip install 'vzip[cpu]'")
    version = (record["onnxruntime"] or {}).get("version", "")
    return Verdict("onnxruntime", f"ONNX Runtime {version} on the CPU", tuple(needs))


def _openvino(record: Record) -> Verdict:
    version = record["packages"].get("openvino")
    needs = () if version else (Need("the package openvino", "pip install 'vzip[openvino]'"),)
    return Verdict("openvino", f"OpenVINO {version} on the CPU", needs)


def _onnxruntime_cuda(record: Record) -> Verdict:
    found = record["onnxruntime"]
    needs = _gpu_needs(record)
    if found is None or "CUDAExecutionProvider" not in found.get("providers", ()):
        what = "onnxruntime with CUDA"
        if found is not None:
            what += f" (what is installed has {', '.join(found.get('providers', ())) or 'nothing'})"
        needs.append(Need(what, _onnxruntime_cuda_cure(record, installed=found is not None)))
    version = (found or {}).get("version", "")
    return Verdict(
        "onnxruntime-cuda", f"ONNX Runtime {version} on {_gpu_name(record)}", tuple(needs)
    )


def _onnxruntime_cuda_cure(record: Record, *, installed: bool) -> str:
    minor = ".".join(record["python"].split(".")[:2])
    if record["architecture"] == "aarch64" and minor != "3.12":
        return f"none: PyPI has aarch64 wheels for Python 3.12 alone, this is {minor}; use tensorrt"
    remove = "pip uninstall onnxruntime && " if installed else ""
    return f"{remove}pip install 'vzip[gpu]'"


def _pytorch(record: Record) -> Verdict:
    needs = _package_needs(record, "torch", "pip install torch")
    if "onnx" not in record["packages"]:
        needs.append(Need("the package onnx", "pip install onnx"))
    found = record["torch"] or {}
    where = found.get("gpu") or "the CPU"
    return Verdict(
        "pytorch",
        f"PyTorch {found.get('version', '')} on {where}, with the module that the export traces",
        tuple(needs),
    )


def _build(record: Record) -> Verdict:
    judged = _tensorrt(record)
    return Verdict("vzip build", judged.detail, judged.needs)


def _build_cpu(record: Record) -> Verdict:
    cure = "pip install 'vzip[cpu-build]'"
    needs = _package_needs(record, "onnxruntime", cure)
    if absent := [name for name in CPU_BUILD_PACKAGES if name not in record["packages"]]:
        needs.append(Need(f"the packages {', '.join(absent)}", cure))
    version = (record["onnxruntime"] or {}).get("version", "")
    return Verdict("vzip build --cpu", f"ONNX Runtime {version}", tuple(needs))


def _build_rtx(record: Record) -> Verdict:
    version = (record["tensorrt_rtx"] or {}).get("version", "")
    detail = f"TensorRT-RTX {version}, ahead of time, without a GPU"
    return Verdict("vzip build --rtx", detail, tuple(_rtx_needs(record)))


def _export(record: Record) -> Verdict:
    cure = "pip install 'vzip[export]'"
    needs = [
        *_package_needs(record, "torch", cure),
        *_package_needs(record, "onnxruntime", cure),
    ]
    absent = [name for name in EXPORT_PACKAGES if name not in record["packages"]]
    if absent:
        needs.append(Need(f"the packages {', '.join(absent)}", cure))
    return Verdict("vzip export", "with the parity check", tuple(needs))


def _ask(record: Record) -> Verdict:
    needs = _package_needs(record, "torch", "pip install torch")
    if "transformers" not in record["packages"]:
        needs.append(Need("the package transformers", "pip install 'transformers>=5'"))
    return Verdict("vzip ask, chat", "the language model runs in transformers", tuple(needs))


JUDGES: Final[Mapping[str, Callable[[Record], Verdict]]] = MappingProxyType(
    {
        "tensorrt": _tensorrt,
        "onnxruntime-cuda": _onnxruntime_cuda,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
        "pytorch": _pytorch,
    }
)


# Facts that are shown too


def dotted(sm: str) -> str:
    """Return ``87`` as ``8.7`` and ``120`` as ``12.0``."""
    return f"{sm[:-1]}.{sm[-1]}"


def _gpu_name(record: Record) -> str:
    gpus = record["driver"].get("gpus")
    return str(gpus[0]["name"]) if gpus else "no GPU"


def jetpack_version(record: Record) -> str | None:
    """Return a Jetson's JetPack: what the package says, else what its Jetson Linux came with."""
    software = record["jetpack"]
    version: str | None = software["package"] or software["jetpack"]
    return version


# What is missing


def _gpu_needs(record: Record) -> list[Need]:
    gpus = record["driver"].get("gpus")
    jetson = record["jetson"] is not None
    if not gpus:
        reason = record["driver"].get("error", "the driver lists none")
        cure = (
            "flash the module with JetPack; in a container, start it with --runtime nvidia"
            if jetson
            else "install NVIDIA's driver; in a container, start it with --gpus all"
        )
        return [Need(f"a GPU: {reason}", cure)]
    if int(gpus[0]["sm"]) < SMALLEST_SM:
        return [
            Need(
                f"a GPU of SM 7.5 or newer: {gpus[0]['name']} is SM {dotted(gpus[0]['sm'])}",
                "none: use the backend onnxruntime",
            )
        ]
    return []


def _cudart_needs(record: Record) -> list[Need]:
    found = record["cudart"]
    error = found.get("error")
    if error is None or ("version" in found and not record["driver"].get("gpus")):
        return []  # one that is there can find no GPU where there is none
    if record["jetson"] is not None:
        return [Need(f"the CUDA runtime: {error}", "sudo apt install nvidia-jetpack")]
    newest = str(record["driver"].get("cuda", "13.0"))
    major = int(newest.partition(".")[0])
    package = f"nvidia-cuda-runtime-cu{major}" if major < 13 else "nvidia-cuda-runtime"
    return [Need(f"the CUDA runtime: {error}", f"pip install {package}")]


def _tensorrt_needs(record: Record) -> list[Need]:
    found, jetpack = record["tensorrt"], record["jetpack"]
    if found is None:
        return [Need("the package tensorrt", _tensorrt_cure(record))]
    if "error" not in found:
        return _start_needs(record, "tensorrt")
    numpy = record["packages"].get("numpy", "")
    cure = _tensorrt_cure(record)
    if jetpack is not None and "numpy" in found["error"].lower() and not numpy.startswith("1."):
        cure = "pip install 'numpy<2'"
    return [Need(f"a tensorrt that can be imported: {found['error']}", cure)]


def _tensorrt_cure(record: Record) -> str:
    jetpack = record["jetpack"]
    if jetpack is None:
        served = str(record["driver"].get("cuda", ""))
        extra = "tensorrt-cu12" if served.startswith("12.") else "tensorrt"
        return f"pip install 'vzip[{extra}]' (fetches the libraries from NVIDIA's own index)"
    if not jetpack["system_tensorrt"]:
        return "sudo apt update && sudo apt install nvidia-jetpack"
    # JetPack's bindings are for one Python, and a plain virtual environment doesn't see them.
    theirs = jetpack["system_tensorrt"][0].split("/")[-3]
    return f"/usr/bin/{theirs} -m venv --system-site-packages vzip-env, and install vzip there"


def _start_needs(record: Record, name: str) -> list[Need]:
    """Return what keeps a TensorRT that can be imported from working with this driver."""
    served = record["driver"].get("cuda")
    wrong = misfit(record[name].get("distribution"), served)
    if wrong is not None:
        return [Need(f"a {name} for this driver: {wrong.what}", wrong.cure)]
    started = record.get(f"{name}_runtime") or {}
    if "error" in started:
        cure = "update the NVIDIA driver, or install an older TensorRT"
        return [Need(f"a {name} that starts: {started['error']}", cure)]
    return []


def _rtx_here_needs(record: Record) -> list[Need]:
    """Return what keeps TensorRT-RTX from building for, and running on, the GPU here."""
    if needs := _rtx_needs(record):
        return needs
    gpus, known = record["driver"].get("gpus"), record["tensorrt_rtx"].get("sm")
    if gpus and known and gpus[0]["sm"] not in known:
        names = ", ".join(map(dotted, known))
        what = f"SM {dotted(gpus[0]['sm'])} in TensorRT-RTX, which knows {names}"
        return [Need(f"a TensorRT for this GPU: no {what}", _tensorrt_cure(record))]
    return _start_needs(record, "tensorrt_rtx")


def _rtx_needs(record: Record) -> list[Need]:
    if record["architecture"] == "aarch64":
        return [Need("TensorRT-RTX", "none: it has no aarch64 wheels; build on an x86-64 machine")]
    return _package_needs(record, "tensorrt_rtx", "pip install 'vzip[rtx]'")


def _package_needs(record: Record, name: str, cure: str) -> list[Need]:
    """Return what is missing of a package that a probe imported."""
    found = record[name]
    if found is None:
        return [Need(f"the package {name}", cure)]
    if "error" in found:
        return [Need(f"a {name} that can be imported: {found['error']}", cure)]
    return []


# Advice


def hints(record: Record) -> list[str]:
    """Return what isn't missing but will be in the way."""
    found = []
    memory, disk = record["memory"], record["disk"]
    if record["jetson"] is not None:
        found += _jetson_hints(record)
    if memory is not None and memory["total"] < 9000:
        if memory["swap_total"] - memory["zram"] < 4000:
            found.append(
                "less than 4 GB of swap on disk: a build may be killed; docs/jetson.md says how to "
                "add it"
            )
        if memory["available"] < 2500:
            found.append(
                f"{memory['available']} MiB of memory available: close the desktop (sudo systemctl "
                "isolate multi-user.target) before a build, and build with --low-memory"
            )
    if disk is not None and disk["free_gb"] < 5:
        found.append(f"{disk['free_gb']} GB free here; a bundle with its engine takes up to 2 GB")
    return found


def _jetson_hints(record: Record) -> list[str]:
    found = []
    jetpack = jetpack_version(record) or ""
    if jetpack.startswith("5."):
        found.append(
            "JetPack 5 has TensorRT 8.5, without LayerNormalization and fused attention: flash "
            "JetPack 6.2 or newer"
        )
    numpy = record["packages"].get("numpy", "")
    if jetpack.startswith("6.") and not numpy.startswith("1."):
        found.append(
            f"numpy {numpy} with JetPack {jetpack}: if 'import tensorrt' fails there, pip install "
            "'numpy<2'"
        )
    memory = record["memory"]
    if memory is not None and memory["cma_total"] and memory["cma_free"] < SMALLEST_CMA:
        found.append(
            f"{memory['cma_free']} of {memory['cma_total']} MiB of contiguous memory free: if an "
            "allocation on the GPU fails with NvMapMemAlloc error 12, close what uses GPU or "
            "camera, or add cma=512M to the APPEND line of /boot/extlinux/extlinux.conf and restart"
        )
    mode = record["power_mode"]
    if mode is not None and not mode.startswith("MAXN"):
        found.append(f"power mode {mode}: numbers are those of this mode (docs/jetson.md)")
    clocks = record["state"]["gpu_clocks"]
    if any(clock["lowest_mhz"] < clock["highest_mhz"] for clock in clocks):
        found.append("the GPU's clock is not locked: sudo jetson_clocks before measuring")
    return found
