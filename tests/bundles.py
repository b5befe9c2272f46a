"""Bundles made of another's files: changed, under another manifest, or with an engine."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from vzip.runtime.bundle.engine_record import EngineBatch, EngineRecord
from vzip.runtime.bundle.manifest import Manifest, Tiling
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import bundle_writer

GRAPH = ("model.onnx", "model.onnx.data")
OWN = ["manifest.json", *GRAPH]
NEWLINE = np.linspace(-3, 3, 6, dtype=np.float32)
PINPOINTS = ((16, 32), (32, 16), (32, 32), (48, 16), (16, 48))

Change = Callable[[Manifest], Manifest]


def names(folder: Path) -> list[str]:
    """Return all that is in a folder and below."""
    return sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*"))


def copy_files(source: Path, folder: Path, files: Iterable[str] = GRAPH) -> None:
    for name in files:
        shutil.copyfile(source / name, folder / name)


def put_in_the_place_of(path: Path, kind: str) -> None:
    """Put something that is no plain file where one lies, which goes aside."""
    aside = path.parent / f"{path.name} aside"
    path.rename(aside)
    if kind == "symlink":
        path.symlink_to(aside)
    elif kind == "hard link":
        path.hardlink_to(aside)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            cwd = Path.cwd()
            os.chdir(path.parent)  # paths of sockets are short
            listener.bind(path.name)
            os.chdir(cwd)
    else:
        assert kind == "device"
        path.symlink_to("/dev/zero")


def with_newline(
    target: Path, source: Path, change: Change = lambda it: it, newline: Any = NEWLINE
) -> Path:
    """Publish a bundle under another manifest, with a newline embedding."""
    bundle = read_bundle(source)
    with bundle_writer(target) as writer:
        copy_files(source, writer.folder, bundle.manifest.files)
        np.save(writer.folder / "image_newline.npy", newline, allow_pickle=False)
        writer.publish(change(dataclasses.replace(bundle.manifest, files={})))
    return target


def as_it_is(manifest: Manifest) -> Manifest:
    return manifest


def patches_alone(manifest: Manifest) -> Manifest:
    """Return the manifest of a tower without CLS: 16 patches, 4 + 3 of them."""
    return dataclasses.replace(
        manifest,
        tower=dataclasses.replace(manifest.tower, tokens=16, cls_token=False),
        selection=dataclasses.replace(manifest.selection, cls_token=False),
    )


def pooled(manifest: Manifest) -> Manifest:
    """Return the manifest of a tower whose 16 patches are pooled to 4 tokens: 2 + 1 of them."""
    embeds, kept = manifest.outputs
    extent = embeds.shape[0]
    tower = dataclasses.replace(manifest.tower, tokens=4, grid=(2, 2), cls_token=False, pool=2)
    selection = dataclasses.replace(manifest.selection, dominant=2, contextual=1, cls_token=False)
    outputs = (
        dataclasses.replace(embeds, shape=(extent, 3, 6)),
        dataclasses.replace(kept, shape=(extent, 2)),
    )
    return dataclasses.replace(
        manifest, tower=tower, selection=selection, media=("video",), outputs=outputs
    )


def tiled(order: Any, *, only_alone: bool = False) -> Change:
    """Return how a manifest becomes that of a bundle with tiles."""
    return lambda manifest: dataclasses.replace(
        manifest,
        preprocessing=dataclasses.replace(manifest.preprocessing, mode="stretch"),
        tiling=Tiling(PINPOINTS, order, only_alone),
    )


def engine_record(bundle: Bundle, plan: bytes = b"x", **changes: Any) -> EngineRecord:
    """Return the record of an engine for an Orin, built from a bundle's graph."""
    values: dict[str, Any] = {
        "sha256": sha256(plan).hexdigest(),
        "bytes": len(plan),
        "stack": "tensorrt",
        "version": "10.3.0.30",
        "gpu": "Orin",
        "sm": ("87",),
        "jetpack": "6.2",
        "precision": bundle.precision,
        "batch": EngineBatch(1, 1, 1),
        "model_sha256": bundle.manifest.files[bundle.graph_file].sha256,
        "settings": {"workspace_mib": 1024},
        "seconds": 1.5,
        "fused_attention": None,
        "proof": {"passed": True},
    }
    return EngineRecord(**{**values, **changes})
