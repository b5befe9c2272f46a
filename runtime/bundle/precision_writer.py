"""A quantised graph is put into a bundle that exists, whole or not at all.

The manifest is what decides: until it is replaced, in one step, the bundle is what it was; from
then on it has the new graph. That holds across SIGKILL at any moment, since the new files wait in
a folder of their own, under the names that they will have, until the manifest speaks of them; and
a reader looks there first. Let one writer at a time work on a bundle
(that of `vzip build`); one that didn't wait is refused.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vzip.runtime.bundle.manifest import MANIFEST_FILE, Manifest
from vzip.runtime.bundle.precision_record import (
    PrecisionRecord,
    Quantised,
    data_file,
    files_of,
)
from vzip.runtime.bundle.reader import LARGEST_MANIFEST, WAITING_SUFFIX, Bundle, waiting_folder
from vzip.runtime.bundle.writer import check_unchanged, explaining, file_entry
from vzip.runtime.errors import BundleError
from vzip.runtime.files import atomic
from vzip.runtime.files.plain import read_plain


class PrecisionWriter:
    """A quantised graph in the making, in a hidden folder that nobody reads.

    Attributes:
        folder: Where the files that `precision_record.files_of` names are to be put; that of the
            weights may be left out.
        published: The bundle with the graph; None before `publish`.
    """

    def __init__(self, bundle: Bundle, precision: Quantised, staged: atomic.StagedFolder) -> None:
        self._bundle = bundle
        self._precision = precision
        self._staged = staged
        self.folder = staged.path
        self.published: Bundle | None = None

    def stage(self, record: PrecisionRecord) -> Bundle:
        """Return the bundle as it will be, for `Bundle.read_model` and backends alone.

        So the graph can be opened and run before anybody else sees it.

        Raises:
            BundleError: Files are missing, are there too many, or are not as a reader demands.
        """
        found = sorted(entry.name for entry in self.folder.iterdir())
        names = files_of(self._precision)
        needed = set(names) - {data_file(self._precision)}
        if not needed <= set(found) <= set(names):
            raise BundleError(
                f"{self._bundle.path}: for {self._precision} there is {found}",
                expected=f"{sorted(needed)} and perhaps {data_file(self._precision)}",
                cause=(
                    "the quantiser left other files or wrote none: this is a defect of the "
                    "quantiser"
                ),
            )
        others = {
            name: entry for name, entry in self._bundle.manifest.files.items() if name not in names
        }
        manifest = dataclasses.replace(
            self._bundle.manifest,
            files={**others, **{name: file_entry(self.folder / name) for name in found}},
            precisions={**self._bundle.manifest.precisions, self._precision: record},
        )
        staged = Bundle(self.folder, manifest, self._precision)
        staged.read_model(verify=False)  # the digests were made just now
        return staged

    def publish(self, record: PrecisionRecord) -> Bundle:
        """Stage the graph, flush it to the disk and let the bundle's manifest speak of it.

        Args:
            record: How it was made.

        Returns:
            The bundle with the graph, at its precision. A graph of the same precision that was
            there before is gone; engines that were built from it are there still, and refused.

        Raises:
            BundleError: As for `stage`; the bundle was replaced meanwhile, or can't be written.
                The bundle is as it was.
        """
        bundle, precision, manifest = self._bundle, self._precision, self.stage(record).manifest
        path = bundle.path / MANIFEST_FILE
        waiting = waiting_folder(bundle.path, manifest, precision)
        check_unchanged(bundle)
        with explaining(bundle.path):
            try:
                if manifest.files != bundle.manifest.files:  # else they lie where they belong
                    self._staged.target = waiting
                    self._staged.commit()
                check_unchanged(bundle)
                atomic.replace_file(path, manifest.to_bytes())
            except BaseException:
                # Flushing the folder may fail after the manifest took its place.
                if read_plain(path, LARGEST_MANIFEST) != manifest.to_bytes():
                    shutil.rmtree(waiting, ignore_errors=True)
                raise
            settle(bundle.path, manifest, precision)
        self.published = Bundle(bundle.path, manifest, precision)
        return self.published


@contextmanager
def precision_writer(bundle: Bundle, precision: Quantised) -> Iterator[PrecisionWriter]:
    """Put a quantised graph into a bundle, or in the place of the one of the same precision.

    Put the files into ``writer.folder`` and call ``writer.publish(record)``. When the block is left
    without that, nothing is left behind and the bundle is as it was.

    Args:
        bundle: The bundle; what lies on the disk must still be it.
        precision: Of the new graph.

    Raises:
        BundleError: The bundle can't be written, or the disk is full.
    """
    with explaining(bundle.path):
        # Hidden under the precision's name, so a later writer of it removes what a dead one left.
        staged = atomic.StagedFolder(bundle.path / precision)
    try:
        with explaining(bundle.path):
            writer = PrecisionWriter(bundle, precision, staged)
            yield writer
        if writer.published is None:
            raise BundleError(
                f"{bundle.path}: a graph in {precision} was written but never published",
                expected="a call of publish()",
                cause="this is a defect of the quantiser",
            )
    finally:
        staged.close()


def settle(folder: Path, manifest: Manifest, precision: Quantised) -> None:
    """Let files that wait take their place, and remove what the manifest doesn't speak of.

    Args:
        folder: The bundle.
        manifest: What its manifest.json says.
        precision: Whose files.
    """
    waiting = waiting_folder(folder, manifest, precision)
    if precision in manifest.precisions and waiting.is_dir() and not waiting.is_symlink():
        for entry in list(waiting.iterdir()):
            atomic.rename_file(entry, folder / entry.name)
        waiting.rmdir()
    for name in files_of(precision):
        if name not in manifest.files and os.path.lexists(folder / name):
            (folder / name).unlink()
    for left in folder.glob(f".{precision}.*{WAITING_SUFFIX}"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
