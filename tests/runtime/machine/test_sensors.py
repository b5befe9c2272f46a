"""Sensors, read from trees laid out as the kernel and NVIDIA document them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.places import GOLDEN
from vzip.runtime.machine import sensors

TREES = json.loads((GOLDEN / "jetson_trees.json").read_text())
ORIN_NANO, THOR = TREES["orin_nano"], TREES["thor"]


def grow(root: Path, files: dict[str, str]) -> Path:
    """Write a Jetson's files below `root` and return it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    return grow(tmp_path, ORIN_NANO)


@pytest.fixture
def thor(tmp_path: Path) -> Path:
    return grow(tmp_path, THOR)


def test_orin_nano(orin):
    assert sensors.jetson(orin) == sensors.Jetson(
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "36.4.3", "6.2"
    )
    assert sensors.memory(orin) == sensors.Memory(7619, 2000, 3809, 3712, 3809, 256, 40, 0)
    # mV · mA; the shunt voltages and the sums are no rails, nor is the drive's voltage.
    assert sensors.power(orin) == {"VDD_IN": 6.077, "VDD_CPU_GPU_CV": 1.537, "VDD_SOC": 1.577}
    assert sensors.temperatures(orin) == {
        "cpu-thermal": 48.125,
        "gpu-thermal": 46.343,
        "tj-thermal": 48.125,
    }
    assert sensors.gpu_clocks(orin) == [sensors.Clock("17000000.gpu", 306, 306, 1020, 0.437)]
    assert sensors.cpu_clocks(orin) == [sensors.Clock("cpu0", 729.6, 729.6, 1728, None)]


def test_swap_on_a_disk_is_told_from_zram(tmp_path):
    tree = dict(ORIN_NANO)
    tree["proc/swaps"] += "/swapfile file 8388604 1048576 -2\n"
    memory = sensors.memory(grow(tmp_path, tree))
    assert memory is not None
    assert (memory.zram, memory.disk_swap_free) == (3809, (8388604 - 1048576) // 1024)


def test_thor(thor):
    assert sensors.jetson(thor) == sensors.Jetson(
        "NVIDIA Jetson AGX Thor Developer Kit", "39.2.0", "7.2"
    )
    assert sensors.power(thor) == {"ina238": 41.9, "VDD_GPU": 7.984, "VDD_CPU_SOC_MSS": 9.98}
    clocks = sensors.gpu_clocks(thor)
    assert [clock.name for clock in clocks] == ["gpu-gpc-0", "gpu-nvd-0"]
    assert all(clock.load is None for clock in clocks)
    memory = sensors.memory(thor)
    assert memory is not None
    assert (memory.swap_total, memory.zram, memory.cma_total) == (0, 0, None)


def test_a_machine_that_is_no_jetson(tmp_path):
    assert sensors.jetson(tmp_path) is None
    assert sensors.memory(tmp_path) is None
    assert sensors.power(tmp_path) == {}
    assert sensors.temperatures(tmp_path) == {}
    assert sensors.gpu_clocks(tmp_path) == []
    assert sensors.cpu_clocks(tmp_path) == []
    assert sensors.processor(tmp_path) is None


@pytest.mark.parametrize(
    "seen",
    [
        {"proc/sys/kernel/osrelease": "5.15.148-tegra\n"},
        {"sys/class/devfreq/17000000.gpu/cur_freq": "306000000"},
        {"sys/class/devfreq/gpu-gpc-0/cur_freq": "306000000"},
    ],
)
def test_a_container_on_a_jetson_is_known_by_the_kernel(tmp_path, seen):
    """It has neither /etc/nv_tegra_release nor /proc/device-tree, unless they are mounted."""
    assert sensors.jetson(grow(tmp_path, seen)) == sensors.Jetson("unknown", None, None)
    release = {"etc/nv_tegra_release": ORIN_NANO["etc/nv_tegra_release"]}
    mounted = sensors.jetson(grow(tmp_path, release))
    assert mounted is not None
    assert mounted.jetpack == "6.2"


@pytest.mark.parametrize(
    "seen",
    [
        {"proc/sys/kernel/osrelease": "6.1.75-rockchip\n"},
        {"sys/class/devfreq/fb000000.gpu/cur_freq": "300000000"},
        {"proc/sys/kernel/osrelease": "5.15.0-1043-aws\n"},
    ],
)
def test_other_boards_are_no_jetsons(tmp_path, seen):
    assert sensors.jetson(grow(tmp_path, seen)) is None


def test_nonsense_in_a_file_is_left_out(orin):
    (orin / "sys/class/hwmon/hwmon1/curr2_input").write_bytes(b"\xff\xfe")
    (orin / "sys/class/thermal/thermal_zone1/temp").write_text("")
    (orin / "sys/class/devfreq/17000000.gpu/cur_freq").unlink()
    (orin / "etc/nv_tegra_release").write_text("rubbish")
    assert set(sensors.power(orin)) == {"VDD_IN", "VDD_SOC"}
    assert "gpu-thermal" not in sensors.temperatures(orin)
    assert sensors.gpu_clocks(orin) == []
    found = sensors.jetson(orin)
    assert found is not None
    assert (found.l4t, found.jetpack) == (None, None)


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        ("35.6.0", "5.1"),
        ("36.3.0", "6.0"),
        ("36.4.0", "6.1"),
        ("36.4.3", "6.2"),
        ("36.4.7", "6.2"),
        ("36.5.0", "6.2.2"),
        ("38.2.1", "7.0"),
        ("38.4.0", "7.1"),
        ("39.2.0", "7.2"),
        ("36.40.0", None),
        ("41.0.0", None),
    ],
)
def test_jetpack_of_a_release(l4t, jetpack):
    assert sensors.jetpack(l4t) == jetpack


def test_this_machine():
    memory = sensors.memory()
    assert memory is not None
    assert 0 < memory.available <= memory.total
