"""Scenes of the demo model: handwritten digits and coloured shapes, and questions about them.

A scene is a description in units of the picture's side, so that it can be drawn at any size
and is the same picture at each. Everything follows from the random generator handed in.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Distances = npt.NDArray[Any]  # of either precision

Split = Literal["train", "test"]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 230, 40),
    "green": (35, 165, 55),
    "cyan": (40, 215, 225),
    "blue": (35, 70, 225),
    "purple": (130, 45, 175),
    "pink": (250, 130, 195),
}
"""Colour name to its central RGB value; every object's colour varies a little around it."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "moon")
DIGITS = tuple(str(value) for value in range(10))
NAMES = DIGITS + SHAPES
"""All object names; their order is that of the labels in :func:`patch_labels`."""

CORNERS = ("top left", "top right", "bottom left", "bottom right")
KINDS = ("digit", "digit_color", "shape_color", "shape", "count", "presence", "where")
"""Question kinds; :func:`ask` makes one question of each."""

# Each kind of question in several wordings, so that the model does not learn one string.
WORDINGS: dict[str, tuple[str, ...]] = {
    "the_digit": (
        "What digit is in the picture?",
        "Which digit is there?",
        "What number is shown?",
    ),
    "colored_digit": (
        "What digit is {color}?",
        "Which digit is {color}?",
        "What is the {color} digit?",
    ),
    "the_digit_color": ("What color is the digit?", "Which color is the digit?"),
    "color": (
        "What color is the {name}?",
        "Which color is the {name}?",
        "What is the color of the {name}?",
    ),
    "shape": (
        "What shape is {color}?",
        "Which shape is {color}?",
        "What is the {color} shape?",
    ),
    "objects": (
        "How many objects are there?",
        "How many objects are in the picture?",
    ),
    "shapes": (
        "How many shapes are there?",
        "How many shapes are in the picture?",
    ),
    "presence": ("Is there a {what}?", "Is there a {what} in the picture?"),
    "where": ("Where is the {name}?", "In which corner is the {name}?"),
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        name: Its entry of :data:`NAMES`.
        color: Its entry of :data:`COLORS`.
        rgb: The exact colour, 0 to 255.
        x: Centre from the left, in units of the picture's side.
        y: Centre from the top, in the same units.
        size: Width of the box it is drawn in, in the same units.
        angle: Rotation in radians.
        bitmap: float32 [66, 66] coverage for a digit, None for a shape.
    """

    name: str
    color: str
    rgb: tuple[float, float, float]
    x: float
    y: float
    size: float
    angle: float
    bitmap: Floats | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def is_digit(self) -> bool:
        """Whether this is a handwritten digit rather than a shape."""
        return self.name in DIGITS


@dataclasses.dataclass(frozen=True)
class Background:
    """A textured background: a base colour, clouds, stripes and noise, all muted.

    Attributes:
        rgb: float32 [3], the base colour, 0 to 255.
        clouds: float32 [7, 7, 3], added after smooth enlargement.
        stripes: Wave numbers in x and y (radians per side), phase and amplitude.
        noise: float32 [112, 112], added after enlargement.
    """

    rgb: Floats
    clouds: Floats
    stripes: tuple[float, float, float, float]
    noise: Floats


@dataclasses.dataclass(frozen=True)
class Scene:
    """Some objects of different names and different colours on a background."""

    things: tuple[Thing, ...]
    background: Background


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a scene and its one right answer."""

    kind: str
    text: str
    answer: str


@functools.cache
def digit_bitmaps(split: Split) -> dict[str, Floats]:
    """The handwritten digits of scikit-learn's ``load_digits``, enlarged.

    A fixed fifth of the images of the data set is the test split; no image is in both.

    Args:
        split: Which part of the data set.

    Returns:
        For each digit float32 [count, 66, 66], ink coverage from 0 to 1.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(20240517).permutation(len(data.images))
    fifth = len(order) // 5
    chosen = order[:fifth] if split == "test" else order[fifth:]
    bitmaps: dict[str, Floats] = {}
    for digit in range(10):
        images = data.images[chosen[data.target[chosen] == digit]] / 16.0
        bitmaps[str(digit)] = np.stack([_enlarge(image.astype(np.float32)) for image in images])
    return bitmaps


def draw_scene(
    rng: np.random.Generator, split: Split, scale: tuple[float, float] = (1.0, 1.0)
) -> Scene:
    """Draw the description of a scene.

    Two to four objects, one or two of them digits, in different colours and well apart.

    Args:
        rng: Source of all randomness; the same state gives the same scene.
        split: Which handwritten digits may occur.
        scale: The range of a factor on the size of all objects of the scene.
    """
    factor = float(rng.uniform(*scale)) if scale[0] < scale[1] else scale[0]
    count = int(rng.integers(2, 5))
    digits = 1 if count == 2 else int(rng.integers(1, 3))
    names = [str(name) for name in rng.choice(DIGITS, digits, replace=False)]
    names += [str(name) for name in rng.choice(SHAPES, count - digits, replace=False)]
    colors = [str(color) for color in rng.choice(list(COLORS), count, replace=False)]
    background = _draw_background(rng)
    things = []
    for name, color, (x, y) in zip(names, colors, _places(rng, count, 0.3 * factor), strict=True):
        bitmap = None
        if name in DIGITS:
            bitmaps = digit_bitmaps(split)[name]
            bitmap = bitmaps[rng.integers(len(bitmaps))]
        low, high = (0.26, 0.32) if name in DIGITS else (0.19, 0.25)
        rgb = np.clip(np.array(COLORS[color]) + rng.normal(0, 9, 3), 0, 255)
        things.append(
            Thing(
                name=name,
                color=color,
                rgb=(float(rgb[0]), float(rgb[1]), float(rgb[2])),
                x=x,
                y=y,
                size=float(rng.uniform(low, high)) * factor,
                angle=float(rng.uniform(-0.22, 0.22)),
                bitmap=bitmap,
            )
        )
    return Scene(tuple(things), background)


def paint(scene: Scene, size: int) -> npt.NDArray[np.uint8]:
    """Paint a scene.

    Args:
        scene: What to paint.
        size: Side of the picture in pixels.

    Returns:
        uint8 [size, size, 3], RGB.
    """
    picture = _paint_background(scene.background, size)
    for thing in scene.things:
        rows, columns, coverage = _coverage(thing, size)
        patch = picture[rows, columns]
        patch += coverage[..., None] * (np.array(thing.rgb, np.float32) - patch)
    return (np.clip(picture, 0, 255) + 0.5).astype(np.uint8)


def patch_labels(scene: Scene, grid: int) -> npt.NDArray[np.int64]:
    """Which object each patch of the picture shows.

    Args:
        scene: The scene.
        grid: Patches per side.

    Returns:
        int64 [grid * grid], raster order: the index in ``scene.things``, or -1 for background.
        A patch belongs to an object that covers at least a tenth of it.
    """
    cells = 4  # samples per side of a patch
    labels = np.full((grid, grid), -1, np.int64)
    best = np.full((grid, grid), 0.1, np.float32)
    for index, thing in enumerate(scene.things):
        whole = np.zeros((grid * cells, grid * cells), np.float32)
        rows, columns, coverage = _coverage(thing, grid * cells)
        whole[rows, columns] = coverage
        share = whole.reshape(grid, cells, grid, cells).mean(axis=(1, 3))  # [grid, grid]
        wins = share > best
        labels[wins] = index
        best[wins] = share[wins]
    return labels.reshape(-1)


def ask(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """Ask one question of each kind about a scene, in random order.

    ``where`` is left out where no object is clearly in a corner.
    """
    makers = (_ask_digit, _ask_digit_color, _ask_shape_color, _ask_shape, _ask_count)
    questions = [maker(rng, scene) for maker in makers]
    questions.append(_ask_presence(rng, scene))
    where = _ask_where(rng, scene)
    if where is not None:
        questions.append(where)
    return [questions[index] for index in rng.permutation(len(questions))]


def corner(thing: Thing) -> str | None:
    """The corner of the picture an object is in, or None near a middle line."""
    if min(abs(thing.x - 0.5), abs(thing.y - 0.5)) < 0.07:
        return None
    return CORNERS[2 * (thing.y > 0.5) + (thing.x > 0.5)]


def _word(rng: np.random.Generator, key: str, **words: str) -> str:
    wordings = WORDINGS[key]
    return wordings[rng.integers(len(wordings))].format(**words)


def _pick(rng: np.random.Generator, things: list[Thing]) -> Thing:
    return things[rng.integers(len(things))]


def _ask_digit(rng: np.random.Generator, scene: Scene) -> Question:
    digits = [thing for thing in scene.things if thing.is_digit]
    thing = _pick(rng, digits)
    if len(digits) == 1 and rng.random() < 0.5:
        return Question("digit", _word(rng, "the_digit"), thing.name)
    return Question("digit", _word(rng, "colored_digit", color=thing.color), thing.name)


def _ask_digit_color(rng: np.random.Generator, scene: Scene) -> Question:
    digits = [thing for thing in scene.things if thing.is_digit]
    thing = _pick(rng, digits)
    if len(digits) == 1 and rng.random() < 0.5:
        return Question("digit_color", _word(rng, "the_digit_color"), thing.color)
    return Question("digit_color", _word(rng, "color", name=thing.name), thing.color)


def _ask_shape_color(rng: np.random.Generator, scene: Scene) -> Question:
    thing = _pick(rng, [thing for thing in scene.things if not thing.is_digit])
    return Question("shape_color", _word(rng, "color", name=thing.name), thing.color)


def _ask_shape(rng: np.random.Generator, scene: Scene) -> Question:
    thing = _pick(rng, [thing for thing in scene.things if not thing.is_digit])
    return Question("shape", _word(rng, "shape", color=thing.color), thing.name)


def _ask_count(rng: np.random.Generator, scene: Scene) -> Question:
    if rng.random() < 0.5:
        return Question("count", _word(rng, "objects"), str(len(scene.things)))
    shapes = sum(not thing.is_digit for thing in scene.things)
    return Question("count", _word(rng, "shapes"), str(shapes))


def _ask_presence(rng: np.random.Generator, scene: Scene) -> Question:
    thing = _pick(rng, list(scene.things))
    present_names = {thing.name for thing in scene.things}
    present_colors = {thing.color for thing in scene.things}
    yes = bool(rng.random() < 0.5)
    if rng.random() < 0.5:  # a name alone
        family = DIGITS if thing.is_digit else SHAPES
        absent = [name for name in family if name not in present_names]
        what = thing.name if yes else absent[rng.integers(len(absent))]
    elif yes:
        what = f"{thing.color} {thing.name}"
    else:  # a near miss: the right name in a wrong colour; half of them present elsewhere
        others = [color for color in COLORS if color != thing.color]
        nearby = [color for color in others if color in present_colors]
        pool = nearby if rng.random() < 0.5 else others
        what = f"{pool[rng.integers(len(pool))]} {thing.name}"
    return Question("presence", _word(rng, "presence", what=what), "yes" if yes else "no")


def _ask_where(rng: np.random.Generator, scene: Scene) -> Question | None:
    clear = [thing for thing in scene.things if corner(thing) is not None]
    if not clear:
        return None
    thing = _pick(rng, clear)
    place = corner(thing)
    assert place is not None  # clear holds only such things
    return Question("where", _word(rng, "where", name=thing.name), place)


def _places(rng: np.random.Generator, count: int, gap: float) -> list[tuple[float, float]]:
    """Centres at least ``gap`` sides apart, so that no two objects touch."""
    while True:
        places: list[tuple[float, float]] = []
        for x, y in rng.uniform(0.15, 0.85, (20, 2)).tolist():
            if all((x - left) ** 2 + (y - top) ** 2 > gap**2 for left, top in places):
                places.append((x, y))
                if len(places) == count:
                    return places


def _draw_background(rng: np.random.Generator) -> Background:
    grey = rng.uniform(35, 220)
    frequency, direction = rng.uniform(15, 80), rng.uniform(0, np.pi)
    return Background(
        rgb=(grey + rng.normal(0, 10, 3)).astype(np.float32),
        clouds=rng.normal(0, rng.uniform(4, 18), (7, 7, 1)).astype(np.float32)
        + rng.normal(0, 5, (7, 7, 3)).astype(np.float32),
        stripes=(
            float(frequency * np.cos(direction)),
            float(frequency * np.sin(direction)),
            float(rng.uniform(0, 2 * np.pi)),
            float(rng.uniform(0, 14)),
        ),
        noise=rng.standard_normal((112, 112), dtype=np.float32) * np.float32(rng.uniform(3, 14)),
    )


def _paint_background(background: Background, size: int) -> Floats:
    """float32 [size, size, 3]."""
    picture = np.empty((size, size, 3), np.float32)
    for channel in range(3):
        picture[..., channel] = _resize(background.clouds[..., channel], size)
    noise = background.noise
    if len(noise) != size:
        noise = _resize(noise, size)
    across, down, phase, amplitude = background.stripes
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    waves = np.sin(
        np.float32(across) * axis[None, :] + np.float32(down) * axis[:, None] + np.float32(phase)
    )
    picture += background.rgb
    picture += (noise + waves * np.float32(amplitude))[..., None]
    return picture


def _resize(field: Floats, size: int) -> Floats:
    image = Image.fromarray(np.ascontiguousarray(field))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _enlarge(bitmap: Floats) -> Floats:
    """A digit's 8×8 grey levels, with a margin, to 66×66 with a firmer edge and a border of 0."""
    ink = np.clip((_resize(np.pad(bitmap, 1), 64) - 0.15) / 0.5, 0.0, 1.0)
    return np.pad(ink.astype(np.float32), 1)


def _coverage(thing: Thing, size: int) -> tuple[slice, slice, Floats]:
    """Rows and columns of an object's box, clipped to the picture, and the share of each pixel."""
    half = thing.size / 2
    reach = half * 1.35  # the corners of the box, rotated
    left, right = _span(thing.x, reach, size)
    top, bottom = _span(thing.y, reach, size)
    across = ((np.arange(left, right, dtype=np.float32) + 0.5) / size - thing.x) / half
    down = ((np.arange(top, bottom, dtype=np.float32) + 0.5) / size - thing.y) / half
    cos, sin = np.float32(np.cos(thing.angle)), np.float32(np.sin(thing.angle))
    u = cos * across[None, :] + sin * down[:, None]  # [rows, columns], box is -1 … 1
    v = cos * down[:, None] - sin * across[None, :]
    if thing.bitmap is not None:
        coverage = _sample(thing.bitmap, u, v)
    else:
        # One pixel of anti-aliasing, whatever the size of the picture.
        coverage = np.clip(0.5 - _distance(thing.name, u, v) * (half * size), 0, 1)
    return slice(top, bottom), slice(left, right), coverage.astype(np.float32)


def _span(centre: float, reach: float, size: int) -> tuple[int, int]:
    low, high = (centre - reach) * size, (centre + reach) * size
    return max(0, int(np.floor(low))), min(size, int(np.ceil(high)))


def _sample(bitmap: Floats, u: Floats, v: Floats) -> Floats:
    """Bilinear look-up of a bitmap with a border of zeros at box coordinates, 0 outside."""
    side = bitmap.shape[0] - 2
    last = np.float32(side + 0.999)  # past the last pixel's centre, in the border of zeros
    x = np.clip((u + 1) * (side / 2) + 0.5, 0, last)
    y = np.clip((v + 1) * (side / 2) + 0.5, 0, last)
    column, row = x.astype(np.int64), y.astype(np.int64)
    x, y = x - column, y - row
    above = bitmap[row, column] * (1 - x) + bitmap[row, column + 1] * x
    below = bitmap[row + 1, column] * (1 - x) + bitmap[row + 1, column + 1] * x
    result: Floats = above * (1 - y) + below * y
    return result


def _distance(shape: str, u: Floats, v: Floats) -> Distances:
    """Signed distance (negative inside) to a shape's edge in box coordinates, v downwards."""
    return _DISTANCES[shape](u, v)


def _circle(u: Floats, v: Floats) -> Distances:
    distance: Distances = np.hypot(u, v) - 0.85
    return distance


def _ring(u: Floats, v: Floats) -> Distances:
    distance: Distances = np.abs(np.hypot(u, v) - 0.68) - 0.22
    return distance


def _square(u: Floats, v: Floats) -> Distances:
    distance: Distances = np.maximum(np.abs(u), np.abs(v)) - 0.75
    return distance


def _diamond(u: Floats, v: Floats) -> Distances:
    distance: Distances = (np.abs(u) + np.abs(v) - 1.0) / np.float32(np.sqrt(2))
    return distance


def _triangle(u: Floats, v: Floats) -> Distances:
    slope = np.float32(1 / np.sqrt(1.25))
    distance: Distances = np.maximum((2 * np.abs(u) - (v + 0.95)) * slope * 0.5, v - 0.75)
    return distance


def _cross(u: Floats, v: Floats) -> Distances:
    long, short = 0.9, 0.3
    upright = np.maximum(np.abs(u) - short, np.abs(v) - long)
    level = np.maximum(np.abs(u) - long, np.abs(v) - short)
    distance: Distances = np.minimum(upright, level)
    return distance


def _moon(u: Floats, v: Floats) -> Distances:
    distance: Distances = np.maximum(np.hypot(u, v) - 0.9, 0.75 - np.hypot(u - 0.45, v))
    return distance


def _star(u: Floats, v: Floats) -> Distances:
    """A five-pointed star, by folding the plane into half a point."""
    radius, inner = 1.0, 0.45
    sector = 2 * np.pi / 5
    angle = np.arctan2(u, -v)
    angle = np.abs((angle + sector / 2) % sector - sector / 2)
    distance = np.hypot(u, v)
    x, y = distance * np.cos(angle), distance * np.sin(angle)
    # The edge runs from the tip (radius, 0) to the notch at half a sector.
    edge = np.array([inner * np.cos(sector / 2) - radius, inner * np.sin(sector / 2)])
    edge /= np.linalg.norm(edge)
    result: Distances = (x - radius) * edge[1] - y * edge[0]
    return result


_DISTANCES: dict[str, Callable[[Floats, Floats], Distances]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "diamond": _diamond,
    "moon": _moon,
}
