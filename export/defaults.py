"""What an export takes where the user says nothing and the model decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vzip.export.architecture import VisionConfig

IMAGE_TOKENS = 64  # the paper's smallest budget for LLaVA-1.5: 54 + 10 of 576
FRAME_TOKENS = 17  # the paper's for Video-LLaVA: 136 for 8 frames
FRAMES = 8
# OneVision cuts a picture into up to 36 tiles; more than these are run in several calls.
MOST_TILES = 10


class ImagesPerCall(NamedTuple):
    """How many images a call takes: exactly `size`, or 1 to `size` where it is dynamic."""

    size: int
    dynamic: bool


def tokens(config: VisionConfig) -> int:
    """Return K, the tokens of an image, a tile or a frame."""
    return FRAME_TOKENS if config.media == "video" else IMAGE_TOKENS


def batch(config: VisionConfig) -> ImagesPerCall:
    """Return the batch: all tiles (up to `MOST_TILES`) or frames of one input, or one image."""
    if config.media == "video":
        return ImagesPerCall(FRAMES, dynamic=True)
    if config.tiling is None:
        return ImagesPerCall(1, dynamic=False)
    side = config.tower.image_size
    tiles = max(height * width // side**2 for height, width in config.tiling.pinpoints)
    return ImagesPerCall(min(1 + tiles, MOST_TILES), dynamic=True)
