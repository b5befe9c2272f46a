"""`vzip firstcontact`: all steps, one after another, whatever becomes of any of them.

No step runs in this process. Each has one of its own, a time limit, and a bound on what it says.
What they found goes into one archive, without a path of this machine or its user's name.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vzip.export.contact import telling
from vzip.export.contact.anonymous import Anonymous
from vzip.export.contact.engine_steps import INSPECTOR
from vzip.export.contact.preparing import CUMSUM, DEMOS
from vzip.runtime import __version__, console
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import outputs
from vzip.runtime.guard import door
from vzip.runtime.machine.children import Ended, run_child

MOST_BYTES: Final = 3 * 10**6
"""Of the archive, which is to fit into an issue or a mail."""

_CHILD: Final = "from vzip.export.contact.child import main; main()"
_LARGEST: Final = 32 * 2**20  # of a step's result
_KEPT: Final = 8 * 2**20  # of the beginning of what TensorRT says, and of the end
_DEEPEST: Final = 50
_SHORTEST: Final = 2**12  # a text isn't cut below this
_LONGEST: Final = 500  # characters of a line that a reason holds


@dataclass(frozen=True)
class Step:
    """A step.

    Attributes:
        name: Its name in the archive.
        does: Which of `child.STEPS` it is.
        limit_s: Seconds after which it is ended.
        arguments: What it is given.
        lacks: Why it isn't begun; empty for a step that is.
    """

    name: str
    does: str
    limit_s: float
    arguments: Mapping[str, Any] = field(default_factory=dict)
    lacks: str = ""


@dataclass(frozen=True)
class Contact:
    """What first contact found.

    Attributes:
        archive: The file.
        results: Step → its ``status`` (``ok``, ``failed``, ``not here``), ``why``, ``took_s`` and
            what it noted.
        summary: At most fifteen lines to paste.
    """

    archive: Path
    results: Mapping[str, Mapping[str, Any]]
    summary: tuple[str, ...]

    @property
    def failed(self) -> int:
        """How many steps failed."""
        return sum(each["status"] == "failed" for each in self.results.values())


def steps(work: Path, demo: Path | None, bundle: Path | None) -> list[Step]:
    """Return what is done.

    Args:
        work: A folder for engines and copies.
        demo: The folder that `prepare` made.
        bundle: A bundle of true size.
    """
    found = [
        Step("doctor", "doctor", 900),
        Step("system", "system", 300),
        *(Step(f"names-{each}", "names", 180, {"module": each}) for each in _MODULES),
        Step("cuda", "cuda", 180),
    ]
    lacks = "" if demo is not None else NO_DEMO
    root = Path() if demo is None else demo
    for name, (folder, precision) in DEMOS.items():
        given = {"bundle": str(root / folder), "precision": precision}
        found.append(Step(f"cpu-{name}", "cpu", 300, given, lacks))
        for level in (None, 0) if name == "fp16" else (None,):
            found += _engine(f"{name}-level{level}" if level is not None else name, work, given,
                             level=level, lacks=lacks)  # fmt: skip
    given = {"bundle": str(root / DEMOS["fp16"][0]), "precision": None}
    found += _engine("cumsum", work, given, graph=str(root / CUMSUM / "model.onnx"), lacks=lacks)
    if bundle is not None:
        large = {"bundle": str(bundle), "precision": None}
        found.append(Step("cpu-bundle", "cpu", 900, large))
        found += _engine("bundle", work, large, limit_s=5400, long=True)
    first = {"bundle": given["bundle"]}
    found += [
        Step("command", "command", 1200, {**first, "folder": str(work / "command")}, lacks),
        Step("killed", "killed", 1200, {**first, "folder": str(work / "killed")}, lacks),
        Step("reopened", "reopened", 900, {**given, "folder": str(work / "fp16")}, lacks),
    ]
    return found


_MODULES: Final = ("tensorrt", "tensorrt_rtx")

NO_DEMO: Final = (
    "no demo bundles were given: make them on a machine with PyTorch (vzip firstcontact --prepare "
    "FOLDER) and give them with --demo FOLDER"
)


def _engine(
    name: str,
    work: Path,
    given: Mapping[str, Any],
    *,
    level: int | None = None,
    graph: str | None = None,
    lacks: str = "",
    limit_s: float = 900,
    long: bool = False,
) -> list[Step]:
    """Return the steps that build an engine and run it."""
    there = {**given, "folder": str(work / name)}
    run = {**there, "long": True} if long else there
    return [
        Step(f"build-{name}", "build", limit_s, {**there, "level": level, "graph": graph}, lacks),
        Step(f"run-{name}", "run", limit_s, run, lacks),
    ]


@door(InvalidInputError, "first contact can't be written to '{output}'", reads=False)
def firstcontact(
    output: str | os.PathLike[str],
    *,
    demo: str | os.PathLike[str] | None = None,
    bundle: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = console.say,
) -> Contact:
    """Try everything that vzip does on a GPU, and write what came of it into one archive.

    It needs neither PyTorch nor a network. A step that fails, hangs or crashes stops nothing; one
    that this machine can't take is said to be not here, with the reason. No bundle is changed.

    Args:
        output: The archive, a file name that ends with ``.zip``; below 3 MB.
        demo: The folder that `prepare` made on a machine with PyTorch; None leaves out its steps.
        bundle: A bundle of true size to build and time too.
        say: Told, in lines, what goes on.

    Returns:
        What was found.

    Raises:
        InvalidInputError: The archive can't be written.
        BundleError: `bundle` is no bundle, or damaged.
    """
    archive = outputs.check_file(output, ".zip")
    large = None if bundle is None else read_bundle(bundle).path.absolute()
    prepared = None if demo is None else Path(demo).absolute()
    if prepared is not None:
        for folder, _ in DEMOS.values():
            read_bundle(prepared / folder)
    start, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    results: dict[str, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    with tempfile.TemporaryDirectory(
        dir=archive.parent.absolute(), prefix=".vzip-first-", ignore_cleanup_errors=True
    ) as name:
        work = Path(name)
        anonymous = Anonymous(folders=[work, Path(sys.prefix), Path.cwd(), Path.home()])
        try:
            for step in steps(work, prepared, large):
                results[step.name], told = _taken(step, work)
                texts |= told
                say(telling.line(step.name, anonymous.record(results[step.name])))
        except KeyboardInterrupt:
            say("interrupted; what was found so far is written")
    record = {
        "what": "first contact of vzip with a machine",
        "vzip": __version__,
        "started": started,
        "seconds": round(time.monotonic() - start, 1),
        "steps": results,
    }
    clean = anonymous.record(record)
    files = {"result.json": json.dumps(clean, indent=1) + "\n"}
    files |= {name: anonymous.text(text) for name, text in texts.items() if text.strip()}
    data = packed(files)
    contact = Contact(
        archive, clean["steps"], tuple(telling.summary(clean, archive.name, len(data)))
    )
    try:
        outputs.write_file(archive, data)
    except InvalidInputError:
        for line in contact.summary:  # at least this much of what was waited for
            say(line)
        raise
    return contact


def _taken(step: Step, work: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Take a step; return what it found, and texts for the archive."""
    if step.lacks:
        return {"status": "not here", "why": step.lacks}, {}
    result = work / f"{step.name}.json"
    ended = run_child(
        [sys.executable, "-c", _CHILD, str(result), step.does, json.dumps(dict(step.arguments))],
        step.limit_s,
        environment={
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONFAULTHANDLER": "1",
            "HF_HUB_OFFLINE": "1",
        },
        folder=work,
        kept=_KEPT,
    )
    found = _read(result)
    if ended.how or found.get("status") not in ("ok", "failed", "not here"):
        found.update(status="failed", why=_why(found, ended))
    texts = {f"{step.name}.log": ended.output}
    if "folder" in step.arguments and (step.does != "build" or found["status"] != "ok"):
        place = Path(step.arguments["folder"])
        with contextlib.suppress(OSError):
            texts[f"{step.name}.{INSPECTOR}"] = (place / INSPECTOR).read_text(errors="replace")
        if step.name != "run-fp16":  # which is opened again later; disks of modules are small
            shutil.rmtree(place, ignore_errors=True)
    return {**found, "took_s": ended.seconds}, texts


def _read(path: Path) -> dict[str, Any]:
    """Return what a step wrote, as far as it is what it should be."""
    try:
        if path.stat().st_size > _LARGEST:
            return {"unread": f"a result of {path.stat().st_size} bytes"}
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    except (OSError, ValueError, RecursionError) as error:
        return {"unread": f"{type(error).__name__}: {error}"}
    if not isinstance(found, dict):
        return {"unread": "no record"}
    return found if _shallow(found) else {"unread": f"a record deeper than {_DEEPEST}"}


def _shallow(value: Any) -> bool:
    """Say whether a record is nested no deeper than what goes through it can follow."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return True
    return False


def _why(found: Mapping[str, Any], ended: Ended) -> str:
    """Return why a step failed that didn't say so itself; with the last line that it said."""
    lines = [line for line in ended.output.splitlines() if line.strip()]
    last = f" ({lines[-1][:_LONGEST]})" if lines else ""
    nothing = f"it left no result: {found.get('unread', 'it ended early')}"
    return f"{ended.how or nothing}{last}"


def packed(files: Mapping[str, str], most: int = MOST_BYTES) -> bytes:
    """Return an archive of some texts that is below a size.

    Where it would be larger, the longest texts lose their middle until it isn't. `result.json` is
    cut last, in what its lists hold.
    """
    texts = dict(files)
    while len(data := _zipped(texts)) >= most:
        logs = [name for name in texts if name != "result.json" and len(texts[name]) > _SHORTEST]
        if logs:
            longest = max(logs, key=lambda name: len(texts[name]))
            texts[longest] = _halved(texts[longest])
        elif len(texts["result.json"]) > _SHORTEST:
            texts["result.json"] = _halved(texts["result.json"])
        else:
            texts.pop(max((each for each in texts if each != "result.json"), key=str))
    return data


def _halved(text: str) -> str:
    quarter = len(text) // 4
    return f"{text[:quarter]}\n… {len(text) - 2 * quarter} characters left out …\n{text[-quarter:]}"


def _zipped(files: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, text in files.items():
            archive.writestr(name, text.encode(errors="backslashreplace"))
    return buffer.getvalue()
