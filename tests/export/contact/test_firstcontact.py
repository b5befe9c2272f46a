"""`vzip firstcontact`: every step is taken or says why not, and none stops the rest."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.references import with_reference
from tests.refusals import refused
from vzip.export import firstcontact
from vzip.export.contact import telling, visit
from vzip.export.contact.child import STEPS
from vzip.export.contact.visit import Step, packed
from vzip.runtime.cli.main import main
from vzip.runtime.errors import BundleError, InvalidInputError
from vzip.runtime.files import outputs

GPU = ("cuda", "run-fp16", "run-fp16-level0", "run-cumsum")

# What a step may do instead of its work: by its name.
BADLY = """
import json, os, sys, time
from pathlib import Path
result, name = Path(sys.argv[1]), sys.argv[2]
def note(**found):
    result.write_text(json.dumps(found))
note(status="running", before="a crash")
if name == "hangs":
    os.fork() and time.sleep(60)
    time.sleep(60)
elif name == "crashes":
    os.kill(os.getpid(), 11)
elif name == "garbage":
    sys.stdout.buffer.write(b"\\xff\\x00\\x1b]0;x" * 1000)
    result.write_bytes(b"\\x00\\xff not JSON")
elif name == "list":
    result.write_text("[1, 2]")
elif name == "silent":
    result.unlink()
elif name == "huge":
    with result.open("wb") as file:
        file.truncate(40 * 2**20)
elif name == "early":
    pass
elif name == "status":
    note(status="excellent")
elif name == "full":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    from vzip.export.contact.child import main
    sys.argv[2] = "system"
    main()
elif name == "talks":
    print("/home/kowalski/secret/file.txt and kowalski@werk17, USER=kowalski", flush=True)
    note(status="failed", why="no /home/kowalski/a b", **{"/home/kowalski/x": ["/srv/kowalski/y"]})
elif name == "deep":
    deep = []
    for _ in range(400):
        deep = [deep]
    note(status="ok", deep=deep)
elif name == "odd":
    note(status=["ok"], why={"a": 1})
elif name == "fine":
    note(status="ok", number=float("inf"))
"""
DOES = ("hangs", "crashes", "garbage", "list", "silent", "huge", "early", "status", "full", "talks",
        "deep", "odd", "fine")  # fmt: skip


@pytest.fixture
def demo(tiny_bundle: Path, golden: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> Path:
    """Demo bundles, as `prepare` makes them, of the golden bundle."""
    folder = tmp_path / "demo"
    folder.mkdir()
    with_reference(tiny_bundle, golden)
    tiny_bundle.rename(folder / "fp16")
    (folder / "cumsum").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (folder / "cumsum" / name).write_bytes((folder / "fp16" / name).read_bytes())
    monkeypatch.setattr(visit, "DEMOS", {"fp16": ("fp16", None)})
    return folder


def archived(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode() for name in archive.namelist()}


@pytest.mark.slow
def test_a_dry_run_takes_what_can_be_taken_and_says_why_the_rest_is_not(
    demo: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    found = firstcontact(tmp_path / "out.zip", demo=demo, say=said.append)
    by_name = {name: each["status"] for name, each in found.results.items()}
    assert by_name.pop("names-tensorrt") == "not here"
    for name in GPU:
        assert by_name.pop(name) == "not here", name
        assert "libcuda" in found.results[name]["why"]
    assert set(by_name.values()) == {"ok"}, found.summary
    assert found.failed == 0
    built = found.results["build-fp16"]
    assert bytes.fromhex(built["header"])[:4] == b"vtrt"
    assert len(bytes.fromhex(built["header"])) == 64
    (result, *_) = found.results["cpu-fp16"]["tokens"]
    assert len(result["token"]) == len(result["error"]) == len(result["cosine"])
    assert max(result["error"]) < 1e-4
    assert found.results["command"]["status_of_encode"] == 0
    assert found.results["killed"]["killed_while_running"] is True
    assert len(found.results["reopened"]["memory"]) == 50
    files = archived(tmp_path / "out.zip")
    assert (tmp_path / "out.zip").stat().st_size < 3 * 10**6
    assert json.loads(files["result.json"])["steps"] == found.results
    assert "VERBOSE" in files["build-fp16.log"]  # the whole of what TensorRT says
    assert len(files["build-fp16.log"].splitlines()) > 100
    everything = "".join(files.values())
    for folder in (str(tmp_path), str(Path.home()), str(Path(sys.prefix))):
        assert f"{folder}/" not in everything
    assert len(said) == len(found.results)
    assert len(found.summary) <= 15
    assert sorted(each.name for each in tmp_path.iterdir()) == ["demo", "out.zip"]


def test_every_step_is_one_that_a_child_can_take(tmp_path: Path) -> None:
    all_of_them = visit.steps(tmp_path, tmp_path, tmp_path)
    assert {step.does for step in all_of_them} == set(STEPS)
    names = [step.name for step in all_of_them]
    assert len(set(names)) == len(names)
    assert all(step.limit_s <= 5400 for step in all_of_them)


@pytest.fixture
def badly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that go wrong in every way, and one that is fine behind them."""
    monkeypatch.setenv("USER", "kowalski")
    monkeypatch.setattr("platform.node", lambda: "werk17.example.org")
    monkeypatch.setattr(visit, "_CHILD", BADLY)
    steps = [Step(name, name, 1.5 if name == "hangs" else 30) for name in DOES]
    monkeypatch.setattr(visit, "steps", lambda *_: steps)


def test_whatever_a_step_does_the_others_are_taken(badly: None, tmp_path: Path) -> None:
    found = firstcontact(tmp_path / "out.zip", say=lambda _: None)
    why = {name: each.get("why", "") for name, each in found.results.items()}
    assert list(found.results) == list(DOES)
    assert found.failed == len(DOES) - 1
    assert found.results["fine"]["status"] == "ok"
    assert "longer than 2 s" in why["hangs"]
    assert "SIGSEGV" in why["crashes"]
    assert found.results["crashes"]["before"] == "a crash"
    for name in ("garbage", "silent", "list", "huge", "early", "status", "deep", "odd"):
        assert "left no result" in why[name], name
    assert f"{40 * 2**20} bytes" in why["huge"]
    assert "File too large" in found.results["full"]["why"]
    files = archived(tmp_path / "out.zip")
    assert set(files) >= {"result.json", "garbage.log", "talks.log"}
    everything = "".join(files.values()) + "".join(found.summary)
    assert "kowalski" not in everything
    assert "werk17" not in everything
    assert "\0" not in everything
    assert "USER@HOST" in files["talks.log"]
    steps = json.loads(files["result.json"], parse_constant=pytest.fail)["steps"]
    assert steps["fine"]["number"] == "Infinity"


def test_the_exit_status_is_the_number_of_failed_steps(
    badly: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["firstcontact", "-o", str(tmp_path / "out.zip"), "-q"]) == len(DOES) - 1
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert len(lines) <= 15
    assert f"1 ok, {len(DOES) - 1} failed, 0 not here" in lines[0]
    assert "out.zip" in lines[-1]


def test_a_disk_that_is_full_in_the_end_leaves_the_summary(
    badly: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: bytes) -> None:
        raise InvalidInputError(f"the output '{path}' can't be written (No space left on device)")

    monkeypatch.setattr(visit, "steps", lambda *_: [Step("fine", "fine", 20)])
    monkeypatch.setattr(outputs, "write_file", full)
    said: list[str] = []
    with refused(InvalidInputError, got="No space left"):
        firstcontact(tmp_path / "out.zip", say=said.append)
    assert any("1 ok, 0 failed" in line for line in said)


def test_ctrl_c_keeps_what_was_found(
    badly: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = visit._taken

    def interrupted(step: Step, work: Path) -> Any:
        if step.name == "second":
            raise KeyboardInterrupt
        return taken(step, work)

    monkeypatch.setattr(visit, "_taken", interrupted)
    steps = [Step("first", "fine", 20), Step("second", "fine", 20)]
    monkeypatch.setattr(visit, "steps", lambda *_: steps)
    found = firstcontact(tmp_path / "out.zip", say=lambda _: None)
    assert list(found.results) == ["first"]
    assert list(json.loads(archived(tmp_path / "out.zip")["result.json"])["steps"]) == ["first"]


def test_without_demo_bundles_their_steps_say_what_to_do(tmp_path: Path) -> None:
    missing = [step for step in visit.steps(tmp_path, None, None) if step.lacks]
    assert {step.name for step in missing} >= {"build-fp16", "run-int8", "run-cumsum", "killed"}
    for step in missing:
        found, texts = visit._taken(step, tmp_path)
        assert found["status"] == "not here"
        assert "--prepare" in found["why"]
        assert not texts


def test_what_can_t_be_is_refused_before_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(visit, "_taken", None)
    with refused(InvalidInputError, got="out.tar", expected=".zip"):
        firstcontact(tmp_path / "out.tar")
    with refused(BundleError, got=str(tmp_path / "nowhere")):
        firstcontact(tmp_path / "out.zip", bundle=tmp_path / "nowhere")
    with refused(BundleError, got=str(tmp_path / "fp16")):
        firstcontact(tmp_path / "out.zip", demo=tmp_path)
    both = ["firstcontact", "--prepare", str(tmp_path / "x"), "--demo", str(tmp_path)]
    assert main(both) == 2
    assert "--demo" in capsys.readouterr().err
    assert main(["firstcontact"]) == 2
    assert "--prepare" in capsys.readouterr().err


def test_an_archive_is_below_its_size_whatever_was_said() -> None:
    rng = random.Random(0)
    noise = {f"{k}.log": rng.randbytes(400_000).hex() for k in range(6)}
    files = {"result.json": '{"a": 1}\n', "short.log": "begin … end", **noise}
    assert len(packed(files, 10**9)) > 10**6
    data = packed(files, 10**6)
    assert len(data) < 10**6
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.read("result.json").decode() == files["result.json"]
        assert archive.read("short.log").decode() == files["short.log"]
        longest = archive.read("0.log").decode()
    assert longest.startswith(noise["0.log"][:100])
    assert longest.endswith(noise["0.log"][-100:])
    assert "characters left out" in longest
    # Nothing else helps where the result itself is too long.
    assert len(packed({"result.json": rng.randbytes(10**6).hex()}, 10**5)) < 10**5


def test_a_summary_has_fifteen_lines_at_most_and_failures_first() -> None:
    steps = {
        **{f"run-{k}": {"status": "failed", "why": "x" * 300} for k in range(20)},
        "build-a": {"status": "ok", "seconds": 1.0, "bytes": 2**20},
        "cuda": {"status": "not here", "why": "no"},
    }
    record = {"vzip": "1", "started": "now", "seconds": 3.0, "steps": steps}
    lines = telling.summary(record, "a.zip", 1000)
    assert len(lines) == 15
    assert all(len(line) <= 160 for line in lines)
    assert lines[3].startswith("run-0: failed")
    assert "12 more lines" in lines[-3]
    assert "cuda" in lines[-2]


@pytest.mark.parametrize("odd", [None, 1, "x", [], {"a": []}, {"version": {}}])
def test_a_summary_takes_whatever_steps_noted(odd: Any) -> None:
    steps = {
        "doctor": {"status": "ok", "environment": odd},
        "build-a": {"status": "ok", "seconds": odd, "bytes": odd},
        "build-b": {"status": "ok", "seconds": 1, "bytes": 1},
        "run-b": {"status": "ok", "proof": odd, "captured": odd, "median_ms": odd},
        "build-c": {"status": "ok", "seconds": 1, "bytes": 2**20},
    }
    record = {"vzip": "1", "started": "now", "seconds": 3.0, "steps": steps}
    lines = telling.summary(record, "a.zip", 1000)
    assert "5 ok" in lines[0]
    assert "c: built in 1 s, 1.0 MiB" in lines
    assert len(lines) <= 15


def test_first_contact_needs_neither_torch_nor_onnx() -> None:
    code = (
        "import sys; import vzip.export.contact.visit, vzip.export.contact.child\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'jinja2', 'markupsafe'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_tokens_are_told_apart_one_by_one(demo: Path, golden: dict[str, np.ndarray]) -> None:
    from vzip.export.contact.engine_steps import tokens_apart
    from vzip.runtime.agreement.reference_file import load_reference
    from vzip.runtime.bundle.reader import read_bundle

    bundle = read_bundle(demo / "fp16")
    reference = load_reference(bundle)
    embeds = reference.embeds.astype(np.float64)
    embeds[0, 2] *= -1
    embeds[1, -1] = np.nan
    kept = reference.kept.copy()
    foreign = next(k for k in range(1, 16) if k not in kept[2])
    kept[2, -1] = foreign
    first, second, third, *_ = tokens_apart(
        reference, {"kept_indices": kept, "image_embeds": embeds}, bundle.manifest
    )
    assert first["token"].tolist() == reference.kept[0].tolist()
    assert [cosine < 0 for cosine in first["cosine"]] == [False, False, True, False]
    assert first["error"][2] > 0
    assert [first["error"][k] for k in (0, 1, 3)] == [0, 0, 0]
    assert second["merged_cosine"][-1] == -1
    assert third["foreign"].tolist() == [foreign]
    assert len(third["token"]) == 3
    assert third["merged_cosine"] is None
