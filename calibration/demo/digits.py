"""The demo's handwritten digits, which scikit-learn brings."""

from __future__ import annotations

from vzip.runtime.errors import MissingDependencyError, missing


def lacking(needed_for: str) -> MissingDependencyError | None:
    """Return what is missing for scenes with digits; None if they can be painted.

    Args:
        needed_for: As for `vzip.runtime.errors.missing`.
    """
    try:
        import sklearn.datasets  # noqa: F401 - with all that it needs, scipy above all
    except ImportError as error:
        return missing(error.name or "sklearn", needed_for=needed_for, extra="demo")
    return None


def require_digits(needed_for: str) -> None:
    """Say in one line what is missing for scenes with digits.

    Raises:
        MissingDependencyError: scikit-learn is not installed, or not whole.
    """
    if (error := lacking(needed_for)) is not None:
        raise error
