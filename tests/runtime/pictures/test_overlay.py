"""The overlay: kept patches exactly as they are, everything else where and how it should be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.refusals import refused
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.overlay import MIN_SIDE, overlay
from vzip.runtime.pictures.preprocess import Preprocessing, tower_image

Array = np.ndarray[Any, Any]


def preprocessing(image_size: int) -> Preprocessing:
    return Preprocessing(
        image_size, "resize_crop", image_size, "bicubic", (0.5,) * 3, (0.5,) * 3, 1 / 255
    )


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(60, 256, (height, width, 3), np.uint8))


def indices(*values: int) -> Array:
    return np.array(values, np.int64)


def patches(picture: Image.Image, grid: tuple[int, int], cell: int) -> Array:
    """Return the picture cut into patches: [rows · cols, cell, cell, 3]."""
    rows, cols = grid
    array = np.asarray(picture)[: rows * cell, : cols * cell]
    array = array.reshape(rows, cell, cols, cell, 3).transpose(0, 2, 1, 3, 4)
    return array.reshape(rows * cols, cell, cell, 3)


def drawn(
    kept: Array, groups: Array | None = None, *, cls_token: bool, grey: bool = False
) -> Array:
    """Draw on a 4 × 4 grid of a 32-pixel tower; returns [16, 168, 168, 3]."""
    image = Image.new("RGB", (32, 32), (180, 180, 180)) if grey else noise(40, 32)
    picture = overlay(
        image, kept, grid=(4, 4), cls_token=cls_token, prep=preprocessing(32), groups=groups
    )
    assert picture.mode == "RGB"
    assert picture.width == MIN_SIDE
    assert MIN_SIDE < picture.height <= MIN_SIDE + 60
    return patches(picture, (4, 4), 168)


def seen() -> Array:
    """Return what the tower sees of the same image, enlarged and cut in the same way."""
    view = Image.fromarray(tower_image(noise(40, 32), preprocessing(32)))
    return patches(view.resize((672, 672), Image.Resampling.BICUBIC), (4, 4), 168)


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("with_cls", [True, False])
def test_kept_patches_are_clear_and_all_others_dim(cls_token: bool, with_cls: bool) -> None:
    kept_patches = [0, 5, 6, 15]
    kept = indices(*([0] * (cls_token and with_cls)), *(p + cls_token for p in kept_patches))
    result, view = drawn(kept, cls_token=cls_token), seen()
    for patch in range(16):
        if patch in kept_patches:
            assert np.array_equal(result[patch], view[patch])
        else:
            inner = result[patch][2:-2, 2:-2].astype(int)
            assert inner.mean() < 0.5 * view[patch].mean()
            # Nearly grey: colours would look like those of a group.
            assert np.ptp(inner, axis=2).mean() < 0.3 * np.ptp(view[patch], axis=2).mean()


def test_a_white_line_runs_around_what_is_kept_and_never_through_it() -> None:
    result = drawn(indices(5, 6), cls_token=False)
    white = (result == 255).all(axis=3)
    assert white[4, :, -2:].all()  # left of patch 5
    assert white[7, :, :2].all()  # right of patch 6
    assert white[1, -2:].all()  # above both
    assert white[2, -2:].all()
    assert white[9, :2].all()  # below
    assert white[0, -2:, -2:].all()  # the corner
    assert not white[4, :, :-2].any()
    assert not white[12].any()
    assert np.array_equal(result[5:7], seen()[5:7])


def groups_of_sixteen() -> tuple[Array, Array]:
    """Patches 0, 5 kept, CLS kept; 14 in the rest, 3 groups: targets are the rest's 0, 4, 8."""
    groups = np.full(17, -1, np.int64)
    rest = [token for token in range(1, 17) if token not in (1, 6)]
    groups[rest] = [0, 2, 1, 0, 1, 1, 2, 2, 2, 0, 0, 1, 2, 0]
    return indices(0, 1, 6), groups


def test_groups_have_one_colour_each() -> None:
    kept, groups = groups_of_sixteen()
    result = drawn(kept, groups, cls_token=True, grey=True)
    colours: dict[int, tuple[int, ...]] = {}
    for patch in range(16):
        group = int(groups[patch + 1])
        if group < 0:
            assert (result[patch] == 180).all()
            continue
        inner = result[patch][4:30, 4:-4].reshape(-1, 3)  # above its number, where it has one
        assert (inner == inner[0]).all()
        assert np.ptp(inner[0].astype(int)) > 30  # a colour, not grey
        assert inner.mean() < 0.7 * 180  # and darker than what was kept
        assert colours.setdefault(group, tuple(inner[0])) == tuple(inner[0])
    assert len(set(colours.values())) == 3


def test_shapes_stay_visible_under_the_tint() -> None:
    kept, groups = groups_of_sixteen()
    result, view = drawn(kept, groups, cls_token=True), seen()
    light, tinted = (array[2][4:-4, 4:-4].max(axis=2).ravel() for array in (view, result))
    assert np.corrcoef(light, tinted)[0, 1] > 0.6  # of an image that is all noise


def test_targets_alone_have_a_frame() -> None:
    kept, groups = groups_of_sixteen()
    result = drawn(kept, groups, cls_token=True, grey=True)
    targets = {1, 6, 10}  # patches: the rest's 0, 4 and 8, although 1 is merged before its target
    brights = set()
    for patch in set(range(16)) - {0, 5}:
        edge = result[patch][1, 8:-8].reshape(-1, 3)
        inner = result[patch][20, 80]
        if patch in targets:
            assert (edge == edge[0]).all()
            assert edge[0].max() == 255
            brights.add(tuple(edge[0]))
            for line in (result[patch][:3], result[patch][-3:]):
                assert (line == edge[0]).all()
            for line in (result[patch][:, :3], result[patch][:, -3:]):
                assert (line == edge[0]).all()
            assert int(np.argmax(edge[0])) == int(np.argmax(inner))  # its group's own colour
        else:
            beside_kept = patch in {4}  # below patch 0, whose white line it has
            assert beside_kept or (edge == inner).all() or (edge == 255).all()
    assert len(brights) == 3


def in_groups(count: int, shade: str = "grey") -> Image.Image:
    """Draw 24 × 24 patches, none kept, in so many groups of neighbours."""
    tokens = 24 * 24
    groups = np.arange(tokens, dtype=np.int64) * count // tokens
    groups[np.arange(tokens)[:: tokens // count][:count]] = np.arange(count)
    return overlay(
        Image.new("RGB", (48, 48), shade),
        indices(),
        grid=(24, 24),
        cls_token=False,
        prep=preprocessing(48),
        groups=groups,
    )


@pytest.mark.parametrize("count", [10, 20, 30, 50])
def test_many_groups_look_different(count: int) -> None:
    found = patches(in_groups(count), (24, 24), 28)
    # Behind the frames and numbers of targets; stripes go on from patch to patch.
    for group in range(count):
        members = [p for p in range(576) if p * count // 576 == group and p % (576 // count) > 0]
        others = {p for p in range(576) if p * count // 576 not in (group,)}
        assert members
        alike = [p for p in others if np.array_equal(found[p], found[members[0]])]
        assert not alike, (group, alike[:3])


# Linear RGB as it is seen with full colour vision, protanopia, deuteranopia and tritanopia:
# Machado, Oliveira and Fernandes 2009, severity 1.
SEEN_WITH = {
    "all": np.eye(3),
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def differences(colours: Array, eyes: str) -> Array:
    """Return the CIE Lab differences (ΔE 1976) of each pair of colours, uint8 [n, 3]."""
    c = colours / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    linear = (linear @ np.array(SEEN_WITH[eyes]).T).clip(0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175]]
    to_xyz.append([0.0193339, 0.119192, 0.9503041])
    xyz = linear @ np.array(to_xyz).T / (0.95047, 1, 1.08883)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[:, 0], f[:, 1], f[:, 2]
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    found = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    return found[np.triu_indices(len(colours), 1)]


@pytest.mark.parametrize("eyes", list(SEEN_WITH))
def test_ten_groups_can_be_told_apart(eyes: str) -> None:
    """Where the picture is light and where it is dark, in the frames and in the legend."""
    for shade, least in (("#e0e0e0", 12), ("#808080", 10), ("#303030", 8)):
        picture = in_groups(10, shade)
        cells = patches(picture, (24, 24), 28)
        tinted = np.array([cells[group * 576 // 10 + 30][14, 14] for group in range(10)])
        assert differences(tinted, eyes).min() > least, shade
        framed = np.array([cells[57 * group][1, 14] for group in range(10)])
        assert differences(framed, eyes).min() > 19
        legend = np.asarray(picture)[MIN_SIDE + 34 :].reshape(-1, 3)
        for colour in framed:
            assert (legend == colour).all(axis=1).sum() >= 100


@pytest.mark.parametrize(
    ("image_size", "grid", "size"),
    [
        (336, (24, 24), 672),
        (224, (16, 16), 672),
        (112, (14, 14), 672),
        (384, (27, 27), 756),  # SigLIP: 6 pixels that no patch covers are left out
        (700, (50, 50), 700),
    ],
)
def test_sizes(image_size: int, grid: tuple[int, int], size: int) -> None:
    prep = preprocessing(image_size)
    image = noise(image_size, image_size)
    last = grid[0] * grid[1] - 1
    picture = overlay(image, indices(last), grid=grid, cls_token=False, prep=prep, groups=None)
    assert picture.width == size
    cell = size // grid[0]
    patch = image_size // grid[0]
    covered = patch * grid[0]
    view = Image.fromarray(np.asarray(image)[:covered, :covered])
    expected = np.asarray(view.resize((size, size), Image.Resampling.BICUBIC))[-cell:, -cell:]
    assert np.array_equal(patches(picture, grid, cell)[-1], expected)


@pytest.mark.parametrize(
    ("kept", "with_groups", "expected"),
    [
        (
            indices(0, 1, 6),
            True,
            ["K = 6 of 17 tokens", "3 kept (CLS + 2 patches)", "3 contextual (merged from 14)"],
        ),
        (indices(0, 1, 6), False, ["3 of 17 tokens kept (CLS + 2 patches)"]),
        (indices(1, 6), False, ["2 of 17 tokens kept (2 patches)"]),
    ],
)
def test_legend(
    kept: Array, with_groups: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def listen(self: ImageDraw.ImageDraw, place: Any, text: str, *args: Any, **kwargs: Any) -> None:
        texts.append(text)
        draw_text(self, place, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", listen)
    groups = groups_of_sixteen()[1] if with_groups else None
    picture = overlay(
        noise(32, 32), kept, grid=(4, 4), cls_token=True, prep=preprocessing(32), groups=groups
    )
    assert texts[0].split("   ·   ") == expected
    # The tokens of each group, in the legend; then its number, in its target's patch.
    assert texts[1:] == (["0: 5", "1: 4", "2: 5", "0", "1", "2"] if with_groups else [])
    legend = np.asarray(picture)[MIN_SIDE:]
    assert legend.max() > 180  # it can be read
    assert legend[:, -20:].max() < 40  # and is not cut off


ROWS = groups_of_sixteen()[1]


CLS_TARGET = [0] * 5 + [1] + [0] * 4 + [2] + [0] * 6


def with_value(token: int, value: int) -> dict[str, Any]:
    """The change that a token stands in another group."""
    groups = ROWS.copy()
    groups[token] = value
    return {"groups": groups}


@pytest.mark.parametrize(
    ("change", "got", "expected"),
    [
        ({"grid": (0, 4)}, "0×4", "1 to 32"),
        ({"grid": (4, 0)}, "4×0", "1 to 32"),
        ({"grid": (33, 4)}, "33×4", "1 to 32"),
        ({"grid": (-1, 4)}, "-1×4", "1 to 32"),
        ({"kept": np.array([0, 1], np.int32)}, "int32 and shape [2]", "int64 [dominant]"),
        ({"kept": np.array([[0, 1]])}, "int64 and shape [1, 2]", "int64 [dominant]"),
        ({"kept": indices(0, 17)}, "from 0 to 17", "from 0 to 16"),
        ({"kept": indices(-1, 3)}, "from -1 to 3", "ascending"),
        ({"kept": indices(3, 1)}, "from 1 to 3", "ascending"),
        ({"kept": indices(3, 3)}, "from 3 to 3", "ascending"),
        ({"groups": ROWS.astype(np.int32)}, "int32 and shape [17]", "int64 [17]"),
        ({"groups": ROWS[1:]}, "int64 and shape [16]", "int64 [17]"),
        (with_value(6, 0), "groups from", "−1 for kept tokens"),  # a kept token in a group
        (with_value(0, 0), "groups from", "CLS"),  # CLS in a group
        (with_value(2, -2), "groups from -2", "−1"),
        (with_value(7, 2), "groups from", "target"),  # a target in another group
        (with_value(3, 3), "groups from -1 to 3", "target"),  # a group without a target
        (with_value(3, 2**40), f"to {2**40}", "target"),  # more groups than tokens
        # The last token was merged, so it can't have been kept.
        ({"kept": indices(0, 1, 6, 16)}, "groups from", "−1 for kept tokens"),
        # CLS is no patch: it can't be a target.
        ({"kept": indices(), "groups": np.array(CLS_TARGET)}, "groups from 0 to 2", "CLS"),
    ],
)
def test_what_does_not_fit_together(change: dict[str, Any], got: str, expected: str) -> None:
    kept, groups = groups_of_sixteen()
    right = {
        "kept": kept,
        "grid": (4, 4),
        "cls_token": True,
        "prep": preprocessing(32),
        "groups": groups,
    }
    with refused(InvalidInputError, got=got, expected=expected):
        overlay(noise(32, 32), **(right | change))
