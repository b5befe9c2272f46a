"""Whether some images can tell anything: flat ones, and the same one again and again, can't.

A quantised graph that keeps the tokens of black pictures proves nothing. What is looked at is the
pictures themselves, as small as they need to be, and not what a tower makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from vzip.export.pictures.glance import Glance
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.wording import are, counted

if TYPE_CHECKING:
    from vzip.calibration.samples import Samples

ADVISED: Final = 20
"""Images with fewer than which calibration warns: four of them are held apart."""


def check_variety(
    calibrated: Samples, apart: Samples, say: Callable[[str], None], *, advised: int = ADVISED
) -> None:
    """Warn of images that can't tell anything, and refuse them if none can.

    Args:
        calibrated: Images that ranges and layers are chosen by.
        apart: Those to judge by.
        say: Told, in lines, what is doubtful.
        advised: How many images are to be had at the least.

    Raises:
        InvalidInputError: All images are flat, or all show the same.
    """
    images = [*calibrated, *apart]
    glances = [each.glance for each in images]
    source = calibrated.source
    seen: list[Glance] = []
    like: dict[int, int] = {}  # place of an image → place of the first that shows the same
    first: list[int] = []
    for place, glance in enumerate(glances):
        if (same := glance.like(seen)) is not None:
            like[place] = first[same]
        else:
            seen.append(glance)
            first.append(place)
    what = "all over one colour" if glances[0].flat else "the same picture"
    if all(glance.flat for glance in glances) or len(seen) == 1:
        raise InvalidInputError(
            f"all {len(images)} images of {source!r} show {what}",
            expected="different pictures like those that will be asked about",
            cause="what keeps the tokens of such images may lose those of any other",
            cure="check that these are the right images",
        )
    if len(images) < advised:
        say(
            f"warning: {counted(len(calibrated), 'image')} to calibrate on and {len(apart)} to "
            f"judge by: give at least {advised}; 80 are mostly enough"
        )
    _say_flat(calibrated, apart, say)
    if like:
        again, once = (images[place].name for place in next(iter(like.items())))
        say(
            f"warning: {len(like)} of {len(images)} images show nearly the same as another, such "
            f"as {again} and {once}: they count as one picture"
        )
    places = range(len(calibrated), len(images))
    if all(like.get(place, place) < len(calibrated) for place in places):
        say(
            "warning: every image to judge by shows nearly the same as one to calibrate on: the "
            "agreement is that of known pictures; give others"
        )


def _say_flat(calibrated: Samples, apart: Samples, say: Callable[[str], None]) -> None:
    """Warn of flat images, and of a verdict that stands on them alone."""
    flat = [[each for each in part if each.glance.flat] for part in (calibrated, apart)]
    count = sum(map(len, flat))
    if not count:
        return
    name = (flat[0] or flat[1])[0].name
    say(
        f"warning: {count} of {len(calibrated) + len(apart)} images {are(count)} flat, one colour "
        f"all over, such as {name}: {len(flat[0])} of {len(calibrated)} to calibrate on and "
        f"{len(flat[1])} of {len(apart)} to judge by"
    )
    for found, part, loss in (
        (flat[0], calibrated, "ranges are chosen by flat images alone"),
        (flat[1], apart, "the agreement is that of flat images alone, and says nothing of others"),
    ):
        if len(found) == len(part):
            say(f"warning: {loss}")
