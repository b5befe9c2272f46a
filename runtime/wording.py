"""Words in messages that depend on a number."""

from __future__ import annotations


def counted(number: int, what: str, many: str = "") -> str:
    """Return a number and what it counts: ``1 image``, ``2 images``.

    Args:
        number: How many.
        what: The word for one.
        many: The word for several, where it isn't `what` and an s.
    """
    return f"{number} {what if number == 1 else many or what + 's'}"


def are(number: int) -> str:
    """Return the verb that goes with a number: ``is`` or ``are``."""
    return "is" if number == 1 else "are"
