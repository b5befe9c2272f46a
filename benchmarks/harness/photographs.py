"""Drawn stand-ins for photographs of 12 megapixels: no picture of that size may be shipped here.

How long a JPEG takes to decode depends on how many coefficients it has. Natural pictures have a
spectrum that falls with the frequency; how fast, and how much a sensor's noise adds, is what the
kinds below differ in. As JPEGs they have 0.6 to 5 MB, what cameras write.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 4000, 3000
KINDS = {"smooth": (1.6, 0.0), "textured": (1.0, 0.0), "noisy": (1.0, 6.0)}
"""Kind → exponent with which amplitudes fall with the frequency; deviation of the noise."""


def photograph(kind: str, seed: int = 7) -> Image.Image:
    """Return a picture of 4000×3000: shading and texture, forty flat shapes with hard edges, noise.

    Args:
        kind: One of `KINDS`.
        seed: Of all that is drawn.
    """
    exponent, noise = KINDS[kind]
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf  # no mean
    white = rng.standard_normal((HEIGHT, WIDTH), np.float32)
    field = np.fft.irfft2(np.fft.rfft2(white) / frequency**exponent, s=(HEIGHT, WIDTH))
    field = (field / field.std()).astype(np.float32)
    # Mostly grey, as pictures are: the same field elsewhere is what the channels differ in.
    hues = [np.roll(field, (997 * channel, 1409 * channel), (0, 1)) for channel in (1, 2, 3)]
    picture = np.stack([128 + 48 * (field + 0.25 * hue) for hue in hues], axis=-1)
    y, x = np.ogrid[:HEIGHT, :WIDTH]
    for _ in range(40):
        left, top = rng.integers(WIDTH), rng.integers(HEIGHT)
        size = rng.integers(WIDTH // 66, WIDTH // 8)
        if rng.random() < 0.5:
            inside = (x - left) ** 2 + (y - top) ** 2 < size**2
        else:
            inside = (abs(x - left) < size) & (abs(y - top) < 0.6 * size)
        picture[inside] = 0.3 * picture[inside] + 0.7 * rng.integers(0, 255, 3)
    if noise:
        picture += noise * rng.standard_normal((HEIGHT, WIDTH, 1), np.float32)
        picture += noise / 3 * rng.standard_normal((HEIGHT, WIDTH, 3), np.float32)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def jpeg(picture: Image.Image, quality: int) -> bytes:
    """Return a picture as JPEG with halved colour resolution, as cameras write it."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()
