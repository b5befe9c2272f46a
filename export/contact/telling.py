"""What first contact found, in lines: one a step, and fifteen to paste."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from vzip.runtime.wording import counted

MOST_LINES: Final = 15
_WIDEST: Final = 160

Found = Mapping[str, Any]


def line(name: str, found: Found) -> str:
    """Return what came of a step."""
    why = f": {found['why']}" if found.get("why") else ""
    return _short(f"{name}: {found['status']}{why}")


def summary(record: Found, archive: str, size: int) -> list[str]:
    """Return at most fifteen lines to paste into an issue.

    Args:
        record: What is in the archive.
        archive: Its name.
        size: Its bytes.
    """
    steps: Mapping[str, Found] = record["steps"]
    counts = {
        status: sum(each["status"] == status for each in steps.values())
        for status in ("ok", "failed", "not here")
    }
    head = (
        f"vzip {record['vzip']}, first contact, {record['started']}: {counts['ok']} ok, "
        f"{counts['failed']} failed, {counts['not here']} not here, {record['seconds']:.0f} s"
    )
    lines = [head, _told(_machine, steps, "machine: ?"), _told(_stacks, steps, "stacks: ?")]
    last = [f"{archive}: {size / 1000:.0f} kB, to be attached to an issue of vzip"]
    failed = [line(name, each) for name, each in steps.items() if each["status"] == "failed"]
    absent = ", ".join(name for name, each in steps.items() if each["status"] == "not here")
    others = [
        each
        for name in steps
        if (each := _told(lambda all_, name=name: _engine(name, all_), steps, f"{name}: ?"))
    ]
    if absent:
        last.insert(0, f"not here: {absent}")
    room = MOST_LINES - len(lines) - len(last)
    if len(failed) + len(others) > room:  # failures first; the archive has the rest
        shown = (failed + others)[: room - 1]
        shown.append(
            f"… {counted(len(failed) + len(others) - room + 1, 'more line')} in the archive"
        )
    else:
        shown = failed + others
    return [_short(each) for each in (*lines, *shown, *last)]


def _told(make: Callable[..., str], steps: Mapping[str, Found], otherwise: str) -> str:
    """Return a line of what steps noted, which may be of any form where one went wrong."""
    try:
        return make(steps)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return otherwise


def _machine(steps: Mapping[str, Found]) -> str:
    here = steps.get("doctor", {}).get("environment") or {}
    driver = here.get("driver") or {}
    gpus = [f"{each['name']} SM {each['sm']}" for each in driver.get("gpus") or ()]
    jetpack = (here.get("jetpack") or {}).get("jetpack")
    parts = [
        here.get("jetson") or here.get("processor"),
        jetpack and f"JetPack {jetpack}",
        here.get("power_mode"),
        ", ".join(gpus) or driver.get("error"),
        driver.get("cuda") and f"driver's CUDA {driver['cuda']}",
        f"Python {here.get('python')}",
    ]
    return "machine: " + ", ".join(str(each) for each in parts if each)


def _stacks(steps: Mapping[str, Found]) -> str:
    here = steps.get("doctor", {}).get("environment") or {}
    found = []
    for name in ("tensorrt", "tensorrt_rtx", "cudart", "onnxruntime"):
        one = here.get(name) or {}
        found.append(f"{name} {one.get('version') or one.get('error') or '–'}")
    return "stacks: " + ", ".join(found)


def _engine(name: str, steps: Mapping[str, Found]) -> str:
    """Return the line of an engine that was built; nothing for other steps."""
    found = steps[name]
    kind, _, which = name.partition("-")
    if kind != "build" or found["status"] != "ok":
        return ""
    parts = [f"built in {found['seconds']} s, {found['bytes'] / 2**20:.1f} MiB"]
    ran = steps.get(f"run-{which}", {})
    parts += list(_ran(ran))
    return f"{which}: {'; '.join(parts)}"


def _ran(ran: Found) -> Iterator[str]:
    if ran.get("status") == "not here":
        yield "not run"
    if "fused_attention" in ran:
        yield f"fused {ran['fused_attention']}"
    if proof := ran.get("proof"):
        verdict = "passed" if proof["passed"] else "FAILED"
        kept, cosine = proof["kept_overlap"], proof["mean_cosine"]
        yield f"proof {verdict}, kept {kept:.3f}, cosine {cosine:.5f}"
    if captured := ran.get("captured"):
        yield f"graph {'captured' if all(captured.values()) else 'not captured'}"
    if times := ran.get("median_ms"):
        yield f"{times['graph']:.3f} ms (plain {times['plain']:.3f})"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"
