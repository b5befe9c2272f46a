"""The folder of a run of tuning: its lock, its checkpoints, and the projector in the end.

Beside the output ``projector.safetensors`` a run has the folder ``projector.safetensors.work``:

| file | content |
|---|---|
| `run.json` | what is tuned, how and on what; a run that resumes must be the same |
| `state.pt` | projector, optimiser and losses after some step; replaced whole |
| `features/` | the tower's features, unless another folder was named |

The process that works in it holds a lock, which the kernel drops with the process.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from vzip.calibration.tuning.workers import Workers
from vzip.runtime.errors import InvalidInputError, VzipError
from vzip.runtime.files import atomic, locks, outputs
from vzip.runtime.files.plain import open_plain, read_text
from vzip.runtime.guard import door

PREFIX: Final = "multi_modal_projector."
"""What stands before the names of the tensors that are written, as llava-hf publishes them."""

WORK: Final = ".work"
REPORT: Final = ".json"
FEATURES: Final = "features"

_RUN, _STATE, _LOCK = "run.json", "state.pt", "lock"


class Session:
    """The folder of a run, locked.

    Args:
        output: The projector to write, ``….safetensors``.
        run: What is tuned, how and on what, as JSON has it.
        resume: Whether an earlier run is continued.
        workers: The processes; the first of them locks and writes.

    Raises:
        InvalidInputError: The output is there already, or can't be written; a run is there and
            `resume` is false, or the other way round; it is another one, or still running.
    """

    @door(InvalidInputError, "the run of '{output}' can't be begun", cure="choose another -o")
    def __init__(
        self, output: Path, run: Mapping[str, Any], *, resume: bool, workers: Workers
    ) -> None:
        self.output = output
        self.folder = output.with_name(output.name + WORK)
        self._lock: locks.Lock | None = None
        if workers.first:
            self._begin(run, resume)
        workers.gathered(None)  # the others wait until the folder is there

    def _begin(self, run: Mapping[str, Any], resume: bool) -> None:
        check_begun(self.output, resume=resume)
        file = self.folder / _RUN
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = _locked(self.folder / _LOCK)
            try:
                if resume:
                    self._compare(json.loads(read_text(file)), run)
                else:
                    atomic.replace_file(file, json.dumps(run, indent=1).encode())
            except BaseException:
                self._unlock()
                raise
        except OSError as error:
            raise InvalidInputError(
                f"{self.folder} can't be written ({error.strerror})",
                expected="a folder for the run's checkpoints",
                cure="choose another -o",
            ) from error

    def _compare(self, earlier: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(run))  # tuples are lists there
        differing = [key for key in {**earlier, **now} if earlier.get(key) != now.get(key)]
        if differing:
            key = differing[0]
            raise InvalidInputError(
                f"the run in {self.folder} has {key} {earlier.get(key)!r} and this one "
                f"{now.get(key)!r}",
                expected=f"the same in {', '.join(differing)}",
                cure="give the options that it was begun with, or delete the folder to begin anew",
            )

    @door(InvalidInputError, "the run in '{self.folder}' can't be resumed", cure="delete it")
    def load(self, records: str, device: torch.device) -> dict[str, Any] | None:
        """Return the last state that was saved, None before the first.

        Args:
            records: SHA-256 of the records and images that are tuned on.
            device: Where its tensors go.

        Raises:
            InvalidInputError: It is of other records, or damaged.
        """
        file = self.folder / _STATE
        if not file.exists():
            return None
        try:
            with open_plain(file) as opened:
                state: dict[str, Any] = torch.load(opened, map_location=device, weights_only=True)
            found = state["records"]
        except Exception as error:  # a damaged file can end in any of them
            raise InvalidInputError(
                f"{file} is damaged ({type(error).__name__})",
                expected="a state of this run",
                cure=f"delete {self.folder} to begin anew",
            ) from error
        if found != records:
            raise InvalidInputError(
                f"the run in {self.folder} was begun on other records or images (SHA-256 "
                f"{found[:12]}…, now {records[:12]}…)",
                cure="restore the data, or delete the folder to begin anew",
            )
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the saved state; killed at any moment, one of the two is there and whole."""
        file = io.BytesIO()
        torch.save(dict(state), file)
        self._write(self.folder / _STATE, file.getbuffer())

    def check(self, report: Mapping[str, Any]) -> None:
        """Refuse what `finish` couldn't write, while nothing is lost yet.

        Raises:
            InvalidInputError: The report can't be written here.
        """
        _as_text(report)
        for path in (self.output, self._report):
            outputs.check_file(path, path.suffix.lower())

    def finish(self, tensors: Mapping[str, torch.Tensor], report: Mapping[str, Any]) -> None:
        """Write the projector and its report; then the run is over and its state goes."""
        import safetensors.torch

        data = safetensors.torch.save(
            {PREFIX + name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
            metadata={"format": "pt"},
        )
        self._write(self.output, data)
        self._write(self._report, _as_text(report))
        for name in (_RUN, _STATE):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def _report(self) -> Path:
        return self.output.with_name(self.output.name + REPORT)

    def __enter__(self) -> Session:  # noqa: PYI034 - typing.Self is new in Python 3.11
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Drop the lock; a run that failed by what it was given, before a state, is forgotten."""
        if self._lock is None:
            return
        ours = failure is not None and issubclass(failure, VzipError)
        if ours and not (self.folder / _STATE).exists():
            (self.folder / _RUN).unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        """Drop the lock; a folder with nothing more in it goes."""
        if self._lock is not None:
            if {path.name for path in self.folder.iterdir()} <= {_LOCK}:
                (self.folder / _LOCK).unlink()
                self.folder.rmdir()
            self._lock.close()
            self._lock = None

    def _write(self, path: Path, data: bytes | memoryview) -> None:
        try:
            atomic.replace_file(path, data)
        except OSError as error:
            raise InvalidInputError(
                f"{path} can't be written ({error.strerror})",
                cure="free some space and continue with --resume",
            ) from error


def check_begun(output: Path, *, resume: bool) -> None:
    """Refuse to begin what was begun, and to resume what was not; nothing is read for it.

    Raises:
        InvalidInputError: As `Session`.
    """
    folder = output.with_name(output.name + WORK)
    there = (folder / _RUN).exists()
    if resume and not there:
        raise InvalidInputError(
            f"there is no run in {folder} to resume",
            expected=f"its {_RUN}",
            cure="leave out --resume to begin one, or check -o",
        )
    if not resume and there:
        raise InvalidInputError(
            f"{folder} holds a run that was not finished",
            cure="continue it with --resume, or delete that folder to begin anew",
        )
    if not resume and output.exists():
        raise InvalidInputError(
            f"{output} is there already",
            expected="a new file",
            cure="delete it or choose another -o",
        )


def _as_text(report: Mapping[str, Any]) -> bytes:
    """Return a report as JSON; half a character of a record's id stands there as its escape."""
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def _locked(path: Path) -> locks.Lock:
    """Lock a file without waiting."""
    lock = locks.on_file(path)
    if lock.taken:
        return lock
    lock.close()
    if lock.taken is None:
        raise InvalidInputError(
            f"{path.parent} lies on a file system without locks",
            cause="two processes could spoil each other's work",
            cure="choose another -o",
        )
    raise InvalidInputError(
        f"{path.parent} is in use by another process",
        expected="one at a time",
        cure="wait for it, or choose another -o",
    )
