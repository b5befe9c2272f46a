"""What the frozen tower makes of images: compressed tokens before the projector, kept on disk.

The tower never changes while its projector is tuned, so every image goes through it once,
whatever the number of epochs. Entries are named after the image's SHA-256, in a folder named after
everything else that decides what the numbers are. Any number of processes may use one folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn

from vzip.export.architecture import needed_tensors
from vzip.export.graph.traced import Encoder
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import codec
from vzip.runtime.files.plain import read_plain
from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.preprocess import tower_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.export.algorithm.budget import Budget
    from vzip.export.architecture import VisionConfig
    from vzip.export.checkpoint.weights import VisionWeights

VERSION: Final = 1
"""Goes up when the same tower and budget give other features, or entries another form."""

_CHECKSUM = 4  # bytes of CRC-32 in front of the numbers


def check_tunable(config: VisionConfig, model: str) -> None:
    """Refuse a model whose images reach the LLM as more than one row of K tokens.

    Raises:
        InvalidInputError: It cuts images into tiles, or its graph is made for video.
    """
    if config.tiling is not None or config.media != "image":
        what = "cuts images into tiles" if config.tiling is not None else "is made for video here"
        raise InvalidInputError(
            f"'{model}' {what}, and tuning takes models that see an image as a whole "
            "(LLaVA-1.5, BakLLaVA, ViP-LLaVA, LLaVA-interleave)",
            cure="choose one of these",
        )


class FrozenTower:
    """The graph that an export traces, up to where its projector begins.

    It runs in FP32, one image at a time: what is stored for an image then never depends on which
    others were encoded beside it, so that a run that was interrupted finds the same numbers.

    Attributes:
        shape: K and F, of one image's features.
        fingerprint: SHA-256 over the tower's weights, the preprocessing, the selection and the
            budget; the projector is no part of it.

    Args:
        weights: Of the model.
        budget: Which tokens leave the graph.
        device: Where it runs.
    """

    def __init__(self, weights: VisionWeights, budget: Budget, device: torch.device) -> None:
        config = weights.config
        self.shape = (budget.tokens, config.projector.in_features)
        self.fingerprint = _fingerprint(weights, budget)
        self._preprocessing = config.preprocessing
        self._device = device
        encoder = Encoder(
            config,
            weights.tensors,
            budget=budget,
            graph_input="image",
            dtype=torch.float32,
        )
        # What comes out is then what would go into it.
        encoder.register_module("projector", nn.Identity())
        self._encoder = encoder.to(device).eval()

    @torch.inference_mode()
    def encode(self, image: bytes | NDArray[np.uint8]) -> NDArray[np.float16]:
        """Return an image's features.

        Args:
            image: As `vzip.runtime.pictures.images.load_image` takes it.

        Returns:
            float16 [K, F]; dominant tokens in spatial order, then contextual ones.

        Raises:
            InvalidInputError: It can't be decoded, or its features don't fit into FP16.
        """
        pixels = tower_image(load_image(image), self._preprocessing)
        features = self._encoder(torch.from_numpy(pixels).unsqueeze(0).to(self._device))[0][0]
        half: NDArray[np.float16] = features.to(torch.float16).cpu().numpy()
        if not np.isfinite(half).all():
            raise InvalidInputError(
                f"the tower's features of an image reach {float(features.abs().max()):.3g}",
                expected="at most 65504, FP16's limit",
                cause="the checkpoint is damaged",
            )
        return half

    def leave_device(self) -> None:
        """Give the device's memory to others; nothing is encoded after that."""
        self._encoder.cpu()


class FeatureStore:
    """Features of images on disk.

    Args:
        folder: Where; a folder for the fingerprint is made inside.
        tower: The tower that they are of.

    Raises:
        InvalidInputError: The folder can't be made.
    """

    def __init__(self, folder: Path, tower: FrozenTower) -> None:
        self._folder = folder / tower.fingerprint[:32]
        self._shape = tower.shape
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error

    def get(self, digest: str) -> NDArray[np.float16] | None:
        """Return the features [K, F] of an image, or None if they aren't there or damaged."""
        try:
            data = read_plain(self._path(digest), _CHECKSUM + 2 * self._shape[0] * self._shape[1])
        except OSError:
            return None
        rows, columns = self._shape
        body = memoryview(data)[_CHECKSUM:]
        if len(body) != 2 * rows * columns:
            return None
        if zlib.crc32(body) != int.from_bytes(data[:_CHECKSUM], "little"):
            return None
        return np.frombuffer(body, np.dtype("<f2")).reshape(rows, columns)

    def put(self, digest: str, features: NDArray[np.float16]) -> None:
        """Store the features of an image; they appear whole.

        Nothing is flushed to the disk: an entry that a power cut spoils fails its checksum, and is
        made again.

        Raises:
            InvalidInputError: They can't be written.
        """
        assert features.shape == self._shape, features.shape
        body = features.astype("<f2").tobytes()
        path = self._path(digest)
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
        try:
            path.parent.mkdir(exist_ok=True)
            try:
                temporary.write_bytes(zlib.crc32(body).to_bytes(_CHECKSUM, "little") + body)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise _unwritable(self._folder, error) from error

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / f"{digest}.f16"


def _unwritable(folder: Path, error: OSError) -> InvalidInputError:
    return InvalidInputError(
        f"features can't be written to {folder} ({error.strerror})",
        expected="a folder with room for them",
        cure="free some space, or name another with --features",
    )


def _fingerprint(weights: VisionWeights, budget: Budget) -> str:
    config = weights.config
    digest = hashlib.sha256()
    for name in sorted(needed_tensors(config)):
        if name.startswith("tower."):
            tensor = weights.tensors[name].contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    decides: dict[str, Any] = {
        "version": VERSION,
        "weights": digest.hexdigest(),
        "tower": dataclasses.asdict(config.tower),
        "feature_layers": config.feature_layers,
        "pool": config.pool,
        "preprocessing": codec.write(config.preprocessing),
        "budget": codec.write(budget),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
