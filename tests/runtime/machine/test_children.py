"""A child is ended in time, with its own children, and what it says is bounded."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from vzip.runtime.machine.children import Ended, run_child


def run(code: str, limit_s: float = 20.0, **options: object) -> Ended:
    return run_child([sys.executable, "-c", code], limit_s, **options)  # type: ignore[arg-type]


def test_what_went_well_says_nothing_of_how(tmp_path: Path) -> None:
    ended = run(
        "import os, sys; print(os.getcwd(), os.environ['MINE'], sys.stdin.read()); "
        "print('there', file=sys.stderr)",
        environment={"MINE": "yes"},
        folder=tmp_path,
    )
    assert (ended.status, ended.how) == (0, "")
    assert sorted(ended.output.splitlines()) == [f"{tmp_path} yes ", "there"]


def test_a_status_a_signal_and_an_absent_program_are_told_apart() -> None:
    assert (run("raise SystemExit(3)").status, run("raise SystemExit(3)").how) == (
        3, "ended with status 3",
    )  # fmt: skip
    killed = run("import os; os.kill(os.getpid(), 11)")
    assert (killed.status, killed.how) == (-11, "was ended by SIGSEGV")
    absent = run_child(["./nothing-of-the-kind"], 5)
    assert absent.status is None
    assert "No such file" in absent.how


def test_one_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path('pid').write_text(str(child.pid)); print('begun', flush=True)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    ended = run(code, 1.5, folder=tmp_path)
    assert time.monotonic() - start < 20
    assert ended.status is None
    assert "2 s" in ended.how
    assert ended.output == "begun\n"
    number = int((tmp_path / "pid").read_text())
    for _ in range(100):  # the kernel takes a moment
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.02)
    else:
        os.kill(number, 9)
        raise AssertionError("the child's child lives")


def test_what_is_said_without_end_is_kept_at_both_ends_and_is_text() -> None:
    code = (
        "import sys; out = sys.stdout.buffer\n"
        "out.write(b'first\\n' + b'\\xff\\0' * 2**20 + b'last'); out.flush()"
    )
    ended = run(code)
    assert ended.how == ""
    assert ended.output.startswith("first\n")
    assert ended.output.endswith("last")
    assert f"{2**21 + 10 - 2**19} bytes left out" in ended.output
    assert len(ended.output) < 2**19 + 100
    assert "\0" not in ended.output
