"""The tier of real trained towers: each is exported once a session, for all of its processes.

A test here is `real`, which `make test-real` runs and `make test` doesn't. One that is marked
`real_slice` is in `make test` too; it takes the tower and photographs of the slice alone (tier.py).
All are `slow`. A wheel that can't be had is an error of the test that asks for it, never a skip.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.real.pictures import LEARNT_FROM, pictures
from benchmarks.real.towers import checkpoint
from tests.real import untouched
from tests.real.tier import HERE, Exported, Saw
from vzip.export import export
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.files import locks


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("slow")
            if not item.get_closest_marker("real_slice"):
                item.add_marker("real")


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    """All 18, those held apart first."""
    return pictures()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session that all of its processes have."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if own.name.startswith("popen-") else own) / "real"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def exported(shared_folder: Path) -> Exported:
    """Return a function that gives a tower's bundle, which no test may change.

    `exported(TOWER, **options)` takes the options of `vzip.export.export` and compares the graph
    with the untouched model on vzip's own pictures, unless `check_images` says on which.
    """

    def bundle(tower: str, **options: Any) -> Bundle:
        told = [f"{key}={value}" for key, value in sorted(options.items())]
        path = shared_folder / "-".join([tower, *told]).replace("/", "_")[:200]
        with locks.on_file(path.with_name(f"{path.name}.lock"), lambda: None):
            if not path.exists():
                export(checkpoint(tower), path, say=lambda _: None, **options)
        return read_bundle(path)

    return bundle


@pytest.fixture(scope="session")
def saw(shared_folder: Path, photographs: list[Path]) -> Saw:
    """Return a function that gives what the untouched tower says of photographs."""

    def seen(tower: str, count: int) -> list[untouched.Seen]:
        path = shared_folder / f"{tower}-{count}.seen"
        with locks.on_file(path.with_suffix(".lock"), lambda: None):
            if not path.exists():
                found = untouched.see(checkpoint(tower), photographs[:count])
                path.write_bytes(pickle.dumps(found))
        return cast("list[untouched.Seen]", pickle.loads(path.read_bytes()))

    return seen


@pytest.fixture(scope="session")
def learnt_from(shared_folder: Path) -> Path:
    """A folder with the photographs that nothing is judged by."""
    folder = shared_folder / "learnt-from"
    with locks.on_file(shared_folder / "learnt-from.lock", lambda: None):
        if not folder.exists():
            staged = shared_folder / "learnt-from.part"
            staged.mkdir()
            for path in pictures(LEARNT_FROM):
                shutil.copyfile(path, staged / path.name)
            staged.rename(folder)
    return folder
