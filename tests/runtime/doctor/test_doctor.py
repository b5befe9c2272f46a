"""`vzip doctor`: what it asks, how it survives the answers, what it concludes.

The record of a machine that nobody here has is made from its documented files and from answers as
its packages would give them; what is concluded from it is a pure function.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export import fake_tensorrt
from tests.places import GOLDEN
from tests.runtime import fake_gpu
from vzip.runtime.backends import BACKENDS
from vzip.runtime.backends.tensorrt import cuda
from vzip.runtime.cli import doctor
from vzip.runtime.doctor import environment, probes, showing, verdicts
from vzip.runtime.doctor.environment import environment as look
from vzip.runtime.machine import commands, sensors
from vzip.runtime.machine.record import machine

STEADY = ("processor", "cores", "instructions", "memory_mib", "system", "python", "jetson")

TREES = json.loads((GOLDEN / "jetson_trees.json").read_text())
ORIN_NANO, THOR = TREES["orin_nano"], TREES["thor"]


def grow(root: Path, files: dict[str, str]) -> Path:
    """Write a Jetson's files below `root` and return it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


NO_DRIVER = {"error": "no NVIDIA driver (no libcuda.so.1)"}


def record(**changes):
    """A workstation with ONNX Runtime on the CPU and nothing else."""
    return {
        "python": "3.10.12",
        "interpreter": {
            "executable": "python3",
            "virtual_environment": True,
            "system_site_packages": False,
        },
        "system": "Linux 5.15 x86_64",
        "distribution": "Ubuntu 22.04.5 LTS",
        "architecture": "x86_64",
        "processor": "x86_64",
        "cores": 6,
        "packages": {"numpy": "1.26.4", "pillow": "12.0"},
        "jetson": None,
        "jetpack": None,
        "power_mode": None,
        "memory": dataclasses.asdict(sensors.Memory(32000, 30000, 0, 0, 0, None, None, 0)),
        "disk": {"folder": "/data", "free_gb": 100.0},
        "driver": NO_DRIVER,
        "cudart": {"error": "libcudart.so is not there"},
        "tensorrt": None,
        "tensorrt_rtx": None,
        "onnxruntime": {"version": "1.23.2", "providers": ["CPUExecutionProvider"]},
        "torch": None,
        "state": {
            "power_w": {},
            "temperature_c": {},
            "gpu_clocks": [],
            "nvidia_smi": None,
            "memory_available_mib": 30000,
            "load": 0.1,
        },
        **changes,
    }


def jetson(root: Path, tree: dict[str, str], **changes):
    """The record of a Jetson; what is in files is read from them."""
    grow(root, tree)
    memory, found = sensors.memory(root), machine(root=root)
    assert memory is not None
    return record(
        **{name: found[name] for name in ("jetson", "power_mode", "state")},
        jetpack=environment._jetpack(root),
        architecture="aarch64",
        memory=dataclasses.asdict(memory),
        **changes,
    )


ORIN_GPU = {"cuda": "12.6", "gpus": [{"name": "Orin", "sm": "87", "memory_mib": 7619}]}
CUDART = {"version": "12.6", "file": "libcudart.so.12"}


def verdict(name, found):
    every = verdicts.backends(found) + verdicts.commands(found)
    return next(each for each in every if each.name == name)


def needs(name, found):
    return [(need.what, need.cure) for need in verdict(name, found).needs]


# --- judging ---------------------------------------------------------------------------------


def test_every_backend_has_a_judge():
    assert list(verdicts.JUDGES) == list(BACKENDS)
    assert [each.name for each in verdicts.backends(record())] == list(BACKENDS)


def test_a_workstation_without_a_gpu():
    found = record()
    assert verdict("onnxruntime", found).ready
    assert needs("onnxruntime-cuda", found) == [
        (
            "a GPU: no NVIDIA driver (no libcuda.so.1)",
            "install NVIDIA's driver; in a container, start it with --gpus all",
        ),
        (
            "onnxruntime with CUDA (what is installed has CPUExecutionProvider)",
            "pip uninstall onnxruntime && pip install 'vzip[gpu]'",
        ),
    ]
    assert needs("pytorch", found) == [
        ("the package torch", "pip install torch"),
        ("the package onnx", "pip install onnx"),
    ]
    assert ("the package tensorrt_rtx", "pip install 'vzip[rtx]'") in needs(
        "vzip build --rtx", found
    )
    assert needs("vzip build --cpu", found) == [
        ("the packages onnx, onnx-ir", "pip install 'vzip[cpu-build]'")
    ]
    assert needs("vzip export", found) == [
        ("the package torch", "pip install 'vzip[export]'"),
        (
            "the packages transformers, onnx, onnxscript, safetensors",
            "pip install 'vzip[export]'",
        ),
    ]
    assert needs("vzip ask, chat", found)[-1] == (
        "the package transformers",
        "pip install 'transformers>=5'",
    )
    assert needs("tensorrt", found)[1:] == [
        ("the CUDA runtime: libcudart.so is not there", "pip install nvidia-cuda-runtime"),
        (
            "the package tensorrt",
            "pip install 'vzip[tensorrt]' (fetches the libraries from NVIDIA's own index)",
        ),
    ]


def test_a_workstation_with_tensorrt_rtx_alone():
    gpu = {"cuda": "13.0", "gpus": [{"name": "RTX 4090", "sm": "89", "memory_mib": 24000}]}
    found = record(driver=gpu, cudart=CUDART, tensorrt_rtx={"version": "1.7.1.116"})
    for name in ("tensorrt", "vzip build"):
        assert verdict(name, found).ready
        assert verdict(name, found).detail == "TensorRT-RTX 1.7.1.116 on RTX 4090"


def test_an_orin_that_is_ready(tmp_path):
    found = jetson(
        tmp_path, ORIN_NANO, driver=ORIN_GPU, cudart=CUDART, tensorrt={"version": "10.3.0"}
    )
    for name in ("tensorrt", "vzip build"):
        assert verdict(name, found).ready
        assert verdict(name, found).detail == "TensorRT 10.3.0 on Orin"
    assert needs("onnxruntime-cuda", found)[0][1] == (
        "none: PyPI has aarch64 wheels for Python 3.12 alone, this is 3.10; use tensorrt"
    )
    assert needs("vzip build --rtx", found) == [
        ("TensorRT-RTX", "none: it has no aarch64 wheels; build on an x86-64 machine")
    ]


def test_an_orin_whose_environment_does_not_see_jetpack(tmp_path):
    found = jetson(tmp_path, ORIN_NANO, driver=ORIN_GPU, cudart=CUDART)
    assert needs("tensorrt", found) == [
        (
            "the package tensorrt",
            "/usr/bin/python3.10 -m venv --system-site-packages vzip-env, and install vzip there",
        )
    ]


def test_a_jetson_without_jetpack(tmp_path):
    tree = {name: text for name, text in THOR.items() if "dist-packages" not in name}
    found = jetson(tmp_path, tree)
    assert [cure for _, cure in needs("tensorrt", found)] == [
        "flash the module with JetPack; in a container, start it with --runtime nvidia",
        "sudo apt install nvidia-jetpack",
        "sudo apt update && sudo apt install nvidia-jetpack",
    ]


def test_tensorrt_that_dies_of_numpy_2(tmp_path):
    error = "ImportError: numpy.core.multiarray failed to import"
    found = jetson(
        tmp_path,
        ORIN_NANO,
        driver=ORIN_GPU,
        cudart=CUDART,
        tensorrt={"error": error},
        packages=record()["packages"] | {"numpy": "2.2.0"},
    )
    assert needs("tensorrt", found) == [
        (
            f"a tensorrt that can be imported: {error}",
            "pip install 'numpy<2'",
        )
    ]
    assert any("numpy 2.2.0 with JetPack 6.2" in hint for hint in verdicts.hints(found))


L4_OF_CUDA_12 = {"cuda": "12.4", "gpus": [{"name": "L4", "sm": "89", "memory_mib": 23034}]}
NEWEST = {"version": "11.4.0.106", "distribution": "tensorrt-cu13"}


@pytest.mark.parametrize(
    "runtime", [None, {"started": True}, {"error": "CUDA initialization failure with error: 35"}]
)
def test_a_tensorrt_for_a_newer_cuda_than_the_driver_serves(runtime):
    found = record(driver=L4_OF_CUDA_12, cudart=CUDART, tensorrt=NEWEST, tensorrt_runtime=runtime)
    for name in ("tensorrt", "vzip build"):
        ((what, cure),) = needs(name, found)
        assert "tensorrt-cu13 is made for CUDA 13" in what
        assert "up to 12.4" in what
        assert "pip uninstall -y tensorrt tensorrt-cu13 tensorrt-cu13-bindings" in cure
        assert "pip install 'vzip[tensorrt-cu12]'" in cure
    ready = record(driver=ORIN_GPU | {"cuda": "13.0"}, cudart=CUDART, tensorrt=NEWEST)
    assert verdict("tensorrt", ready).ready
    older = {"version": "10.13.3.9", "distribution": "tensorrt-cu12"}
    assert verdict("tensorrt", record(driver=L4_OF_CUDA_12, cudart=CUDART, tensorrt=older)).ready


def test_a_tensorrt_that_does_not_start_is_not_ready():
    said = "CUDA initialization failure with error: 35"
    found = record(
        driver=L4_OF_CUDA_12,
        cudart=CUDART,
        tensorrt={"version": "10.13.3.9"},
        tensorrt_runtime={"error": said},
    )
    ((what, cure),) = needs("vzip build", found)
    assert said in what
    assert "driver" in cure


def test_what_to_install_follows_the_driver():
    for served, extra in (("12.4", "tensorrt-cu12"), ("13.0", "tensorrt")):
        found = record(driver=L4_OF_CUDA_12 | {"cuda": served}, cudart=CUDART)
        assert f"'vzip[{extra}]'" in needs("tensorrt", found)[0][1]


def test_rtx_alone_on_a_gpu_that_it_does_not_know():
    h100 = {"cuda": "13.0", "gpus": [{"name": "H100", "sm": "90", "memory_mib": 81000}]}
    rtx = {"version": "1.7.1.116", "sm": ["75", "86", "89", "120"]}
    found = record(driver=h100, cudart=CUDART, tensorrt_rtx=rtx)
    for name in ("tensorrt", "vzip build"):
        ((what, cure),) = needs(name, found)
        assert "SM 9.0" in what
        assert "7.5, 8.6, 8.9, 12.0" in what
        assert "vzip[tensorrt]" in cure
    assert verdict("vzip build --rtx", found).ready  # for other GPUs than the one here
    known = record(driver=L4_OF_CUDA_12, cudart=CUDART, tensorrt_rtx=rtx)
    assert verdict("vzip build", known).ready


def test_a_libcudart_that_finds_no_gpu_is_not_ready():
    spoilt = {"version": "13.0", "file": "libcudart.so.13", "error": "CUDA 13.0 finds no GPU"}
    found = record(driver=L4_OF_CUDA_12, cudart=spoilt, tensorrt={"version": "10.13.3.9"})
    assert needs("tensorrt", found) == [
        ("the CUDA runtime: CUDA 13.0 finds no GPU", "pip install nvidia-cuda-runtime-cu12")
    ]
    # Without a GPU at all, that is what is missing.
    (gpu,) = needs("tensorrt", record(cudart=spoilt, tensorrt={"version": "10.13.3.9"}))
    assert gpu[0].startswith("a GPU")


def test_a_gpu_that_is_too_old():
    gpu = {"cuda": "12.6", "gpus": [{"name": "GTX 1080", "sm": "61", "memory_mib": 8000}]}
    assert needs("onnxruntime-cuda", record(driver=gpu))[0] == (
        "a GPU of SM 7.5 or newer: GTX 1080 is SM 6.1",
        "none: use the backend onnxruntime",
    )


def test_a_driver_of_cuda_12_gets_the_runtime_of_cuda_12():
    assert needs("tensorrt", record(driver=ORIN_GPU))[0][1] == (
        "pip install nvidia-cuda-runtime-cu12"
    )


def test_hints_of_a_small_orin(tmp_path):
    found = jetson(tmp_path, ORIN_NANO, disk={"folder": "/data", "free_gb": 2.5})
    found["power_mode"] = "15W"
    text = "\n".join(verdicts.hints(found))
    assert "less than 4 GB of swap on disk" in text  # zram is not swap on disk
    assert "2000 MiB of memory available" in text
    assert "--low-memory" in text
    assert "power mode 15W" in text
    assert "sudo jetson_clocks" in text
    assert "2.5 GB free" in text
    # The kernel sets 256 MiB aside, and 40 of them are left.
    assert "40 of 256 MiB of contiguous memory free: if an allocation on the GPU fails with" in text
    assert "cma=512M" in text
    found["memory"]["cma_free"] = 100
    assert "contiguous" not in "\n".join(verdicts.hints(found))


def test_no_hints_for_a_big_locked_thor(tmp_path):
    found = jetson(tmp_path, THOR)
    found["power_mode"] = "MAXN"
    assert verdicts.hints(found) == []


def test_jetpack_5_is_named(tmp_path):
    tree = {**ORIN_NANO, "etc/nv_tegra_release": "# R35 (release), REVISION: 6.0, GCID: 1"}
    assert any(
        "JetPack 5 has TensorRT 8.5" in hint for hint in verdicts.hints(jetson(tmp_path, tree))
    )


# --- asking ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_record_of_this_machine(tmp_path):
    found = look(folder=tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert set(probes.PROBES) <= set(found)
    assert found["packages"]["numpy"]
    assert found == {**found, **{k: v for k, v in machine().items() if k in STEADY}}
    assert found["disk"]["folder"] == str(tmp_path)
    assert "error" in found["driver"] or found["driver"]["gpus"]


def plant(tmp_path, monkeypatch, name: str, code: str) -> None:
    """Make `import name` run `code` in every child."""
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("__version__ = '10.3.0'; print('noise')", {"version": "10.3.0"}),
        (
            "raise ImportError('libnvinfer.so.10: cannot open shared object file')",
            {"error": "ImportError: libnvinfer.so.10: cannot open shared object file"},
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            {"error": "importing it crashes the interpreter (SIGSEGV)"},
        ),
        ("raise SystemExit(3)", {"error": "SystemExit: 3"}),
        (
            "import os, sys; print('bad luck', file=sys.stderr, flush=True); os._exit(4)",
            {"error": "importing it ends the interpreter with status 4 (bad luck)"},
        ),
        ("pass", {"error": "AttributeError: module 'tensorrt' has no attribute '__version__'"}),
    ],
)
def test_whatever_an_import_does_is_an_answer(tmp_path, monkeypatch, code, answer):
    plant(tmp_path, monkeypatch, "tensorrt", code)
    assert environment._probe("tensorrt") == answer


@pytest.mark.slow
def test_an_import_that_hangs_is_given_up(tmp_path, monkeypatch):
    plant(tmp_path, monkeypatch, "tensorrt", "import time; time.sleep(60)")
    assert environment._probe("tensorrt", limit_s=2) == {"error": "no answer within 2 s"}


@pytest.mark.parametrize("version", ["8.6", "11.4"])
def test_a_runtime_is_started_where_there_is_a_gpu(version, monkeypatch):
    monkeypatch.setattr(probes, "driver", lambda: L4_OF_CUDA_12)
    answers = {}
    for gpu in (True, False):
        fake_tensorrt.install(monkeypatch, fake_tensorrt.make(version, gpu=gpu))
        answers[gpu] = probes.tensorrt_runtime()
    assert answers == {
        True: {"started": True},
        False: {"error": "CUDA initialization failure with error: 35"},
    }
    monkeypatch.setattr(probes, "driver", lambda: NO_DRIVER)
    assert probes.tensorrt_runtime() == {"absent": True}


def test_a_runtime_that_would_crash_leaves_the_version(tmp_path, monkeypatch):
    code = "import os, signal; __version__ = '8.6.0'\ndef __getattr__(name): "
    plant(tmp_path, monkeypatch, "tensorrt", code + "os.kill(os.getpid(), signal.SIGSEGV)")
    assert environment._probe("tensorrt") == {"version": "8.6.0"}


def test_a_libcudart_that_finds_no_gpu_is_an_error(cudart, monkeypatch):
    lib = fake_gpu.library(cudart)
    monkeypatch.setattr(cuda, "candidates", lambda: iter([str(cudart)]))
    assert probes.cudart() == {"version": "12.6", "file": str(cudart)}
    lib.fake_device(0, 8, 7)
    found = probes.cudart()
    assert (found["version"], found["file"]) == ("12.6", str(cudart))
    assert "finds no GPU" in found["error"]


def test_modules_of_the_runtime_do_not_stand_in_for_others(tmp_path, monkeypatch):
    plant(tmp_path, monkeypatch, "tensorrt", "import errors, images; __version__ = '1'")
    assert environment._probe("tensorrt") == {
        "error": "ModuleNotFoundError: No module named 'errors'"
    }


def test_a_package_that_is_not_installed_is_absent(monkeypatch):
    monkeypatch.setitem(probes.PROBES, "nothing", ("no_such_package", dict))
    assert probes.answer("nothing") == {"absent": True}


def test_a_command_that_is_absent_fails_or_hangs_is_none():
    assert commands.ask("no-such-command") is None
    assert commands.ask("false") is None
    assert commands.ask("sleep", "30", limit_s=0.2) is None
    assert commands.ask("echo", "yes") == "yes\n"


def test_nvidia_smi_as_on_a_card_and_on_an_orin(monkeypatch):
    row = "NVIDIA L4, 570.86, 23034 MiB, 3 MiB, 16.1 W, 41, 0 %, 210 MHz, 405 MHz, Enabled, 72.00 W"
    monkeypatch.setattr(commands, "ask", lambda *command: row + "\n")
    found = commands.nvidia_smi()
    assert found is not None
    assert found[0]["name"] == "NVIDIA L4"
    assert found[0]["clocks.sm"] == "210 MHz"
    monkeypatch.setattr(commands, "ask", lambda *command: "an error\n")
    assert commands.nvidia_smi() == []


def test_power_mode_and_package(tmp_path, monkeypatch):
    answers = {"dpkg-query": "6.2+b77", "nvpmodel": "NV Power Mode: MAXN_SUPER\n2\n"}
    monkeypatch.setattr(commands, "ask", lambda *command: answers.get(command[0]))
    found = jetson(tmp_path, ORIN_NANO)
    assert found["power_mode"] == "MAXN_SUPER"
    assert found["jetpack"]["package"] == "6.2+b77"
    assert showing._jetson_fact(found).endswith(
        "JetPack 6.2+b77, Jetson Linux 36.4.3, power mode MAXN_SUPER"
    )


# --- showing ---------------------------------------------------------------------------------


def test_the_report_of_an_orin(tmp_path):
    found = jetson(
        tmp_path, ORIN_NANO, driver=ORIN_GPU, cudart=CUDART, tensorrt={"version": "10.3.0"}
    )
    text = showing.report(found)
    lines = text.splitlines()
    assert max(map(len, lines)) <= showing.WIDTH
    assert lines[0] == "This machine"
    for part in (
        "Orin, SM 8.7, 7619 MiB, serves CUDA up to 12.6",
        "VDD_IN 6.08 W",
        "17000000.gpu 306 MHz (306 to 1020), load 44%",
        "2000 of 7619 MiB available, swap 3809 MiB (3809 of it zram), contiguous 40 of 256 MiB",
        "onnxruntime ready",
    ):
        assert part in " ".join(text.split())
    assert "power mode unknown" in " ".join(text.split())


@pytest.mark.parametrize(("provider", "status"), [("CPUExecutionProvider", 0), (None, 1)])
def test_exit_status(monkeypatch, capsys, provider, status):
    found = record() if provider else record(onnxruntime=None)
    monkeypatch.setattr(environment, "environment", lambda: found)
    assert doctor.main([], prog="vzip doctor") == status
    assert ("onnxruntime       ready" in capsys.readouterr().out) == (status == 0)


def test_json_is_the_record(monkeypatch, capsys):
    monkeypatch.setattr(environment, "environment", record)
    doctor.main(["--json"], prog="vzip doctor")
    assert json.loads(capsys.readouterr().out) == record()


@pytest.mark.slow
def test_it_runs_here():
    command = [sys.executable, "-m", "vzip.runtime.cli.main", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # the tests' environments all have ONNX Runtime
    assert done.stderr == ""
    assert "Backends" in done.stdout


@pytest.mark.gpu
def test_on_a_gpu_machine_the_engine_s_backend_is_ready():
    found = look()
    assert int(found["driver"]["gpus"][0]["sm"]) >= verdicts.SMALLEST_SM
    assert verdict("tensorrt", found).ready, needs("tensorrt", found)
    assert verdict("vzip build", found).ready
