"""The record of a machine and the verdicts on it, as one reads them."""

from __future__ import annotations

import textwrap
from typing import Final

from vzip.runtime.doctor.verdicts import (
    Record,
    Verdict,
    backends,
    commands,
    dotted,
    hints,
    jetpack_version,
)
from vzip.runtime.wording import counted

WIDTH: Final = 100


def report(record: Record) -> str:
    """Return the record and the verdicts as one reads them, at most `WIDTH` columns wide."""
    facts = [fact for fact in _facts(record) if fact[1]]
    label = max(len(name) for name, _ in facts) + 2
    lines = ["This machine"]
    for name, text in facts:
        lines += _hang(f"  {name:<{label}}", text)
    judged = {"Backends": backends(record), "Commands": commands(record)}
    width = max(len(each.name) for group in judged.values() for each in group) + 2
    for title, verdicts in judged.items():
        lines += ["", title]
        for verdict in verdicts:
            lines += _shown(verdict, width)
    if advice := hints(record):
        lines += ["", "Mind"]
        for hint in advice:
            lines += _hang("  - ", hint)
    return "\n".join(lines)


def _shown(verdict: Verdict, width: int) -> list[str]:
    head = f"  {verdict.name:<{width}}"
    if verdict.ready:
        return _hang(f"{head}ready    ", verdict.detail)
    lines = []
    for number, need in enumerate(verdict.needs):
        first = f"{head}missing  " if number == 0 else " " * (len(head) + 9)
        lines += _hang(first, need.what)
        if need.cure not in {later.cure for later in verdict.needs[number + 1 :]}:  # once is enough
            lines += _hang(" " * (len(head) + 9) + "-> ", need.cure)
    return lines


def _hang(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _facts(record: Record) -> list[tuple[str, str]]:
    python = record["interpreter"]
    kind = "system Python"
    if python["virtual_environment"]:
        sees = "sees" if python["system_site_packages"] else "without"
        kind = f"virtual environment, {sees} system packages"
    packages = [
        f"{name} {version}"
        for name, version in record["packages"].items()
        if name not in record  # what the import of these says stands below
    ]
    return [
        ("system", _joined(record["distribution"], record["system"])),
        ("processor", _joined(record["processor"], f"{counted(record['cores'], 'core')}")),
        *_threads_fact(record),
        ("Python", f"{record['python']} ({kind}): {python['executable']}"),
        ("packages", ", ".join(packages)),
        *((name, _found(record[name])) for name in ("onnxruntime", "torch")),
        ("TensorRT", _found(record["tensorrt"])),
        ("TensorRT-RTX", _found(record["tensorrt_rtx"])),
        ("Jetson", _jetson_fact(record)),
        ("GPU", _gpu_fact(record)),
        ("CUDA runtime", _found(record["cudart"])),
        ("memory", _memory_fact(record["memory"])),
        ("disk", _disk_fact(record["disk"])),
        *_state_facts(record["state"]),
    ]


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _found(answer: Record | None) -> str:
    """Return what a probe found, as one reads it."""
    if answer is None:
        return "not installed"
    if "error" in answer:
        return str(answer["error"])
    more = [
        *answer.get("providers", ()),
        *(f"{key.upper()} {answer[key]}" for key in ("cuda", "gpu") if answer.get(key)),
        *([answer["file"]] if "file" in answer else []),
    ]
    return f"{answer['version']}" + (f" ({', '.join(more)})" if more else "")


def _gpu_fact(record: Record) -> str:
    driver = record["driver"]
    if "error" in driver:
        return str(driver["error"])
    smi = record["state"]["nvidia_smi"]
    version = f", driver {smi[0]['driver_version']}" if smi else ""
    gpus = [
        f"{gpu['name']}, SM {dotted(gpu['sm'])}, {gpu['memory_mib']} MiB" for gpu in driver["gpus"]
    ]
    return f"{'; '.join(gpus) or 'none'}{version}, serves CUDA up to {driver['cuda']}"


def _threads_fact(record: Record) -> list[tuple[str, str]]:
    """Return how many threads a graph gets, where control groups bound them."""
    if (quota := record.get("cpu_quota")) is None:
        return []
    said = f"{record['graph_threads']}, as control groups allow {quota:g} cores' time"
    return [("threads of a graph", said)]


def _jetson_fact(record: Record) -> str:
    if record["jetson"] is None:
        return ""
    jetpack, linux = jetpack_version(record), record["jetpack"]["l4t"]
    return _joined(
        record["jetson"],
        f"JetPack {jetpack}" if jetpack else "JetPack unknown",
        f"Jetson Linux {linux}" if linux else None,
        f"power mode {record['power_mode'] or 'unknown'}",
    )


def _memory_fact(memory: Record | None) -> str:
    if memory is None:
        return ""
    swap = f"swap {memory['swap_total']} MiB"
    if memory["zram"]:
        swap += f" ({memory['zram']} of it zram)"
    cma = memory["cma_total"]
    return _joined(
        f"{memory['available']} of {memory['total']} MiB available",
        swap,
        f"contiguous {memory['cma_free']} of {cma} MiB free" if cma else None,
    )


def _disk_fact(disk: Record | None) -> str:
    return "" if disk is None else f"{disk['free_gb']} GB free in {disk['folder']}"


def _state_facts(state: Record) -> list[tuple[str, str]]:
    clocks = [
        f"{clock['name']} {clock['mhz']:.0f} MHz "
        f"({clock['lowest_mhz']:.0f} to {clock['highest_mhz']:.0f})"
        + ("" if clock["load"] is None else f", load {clock['load']:.0%}")
        for clock in state["gpu_clocks"]
    ]
    power = [f"{rail} {watts:.2f} W" for rail, watts in state["power_w"].items()]
    heat = [f"{zone} {celsius:.0f} °C" for zone, celsius in state["temperature_c"].items()]
    facts = [("GPU clock", "; ".join(clocks)), ("power", ", ".join(power))]
    facts.append(("temperature", ", ".join(heat)))
    if state["nvidia_smi"]:
        first = state["nvidia_smi"][0]
        names = ("power.draw", "temperature.gpu", "utilization.gpu", "clocks.sm", "memory.used")
        facts.append(("nvidia-smi", ", ".join(f"{name} {first[name]}" for name in names)))
    return facts
