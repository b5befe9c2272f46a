"""Web pages that need nothing else: no script, no network, no other file.

Jinja2 escapes all that a template prints, so that a file's name or a text of a bundle stays text.
`Markup` alone is taken as HTML, and only `code`, `bar` and `missed` make some. The content security
policy in `base.jinja` forbids the browser to load anything, whatever slips through.
"""

from __future__ import annotations

import base64
import os
import re
from typing import TYPE_CHECKING, Any, Literal

from vzip.runtime.errors import MissingDependencyError, missing

if TYPE_CHECKING:
    from markupsafe import Markup

# Not a part of a web address, of a fraction or of a relative path.
_PATH = re.compile(r"(?<![\w:/.~])/(?:[^\s/'\"<>:;,()]+/)*([^\s/'\"<>:;,()]+)/?")

Kind = Literal["image/jpeg", "image/svg+xml"]


def lacking(needed_for: str) -> MissingDependencyError | None:
    """Return what is missing for a page; None if one can be made."""
    try:
        import jinja2  # noqa: F401 - with markupsafe
    except ImportError:
        return missing("jinja2", needed_for=needed_for, extra="report")
    return None


def render(package: str, template: str, **values: Any) -> str:
    """Return a page, UTF-8 text.

    Args:
        package: Whose folder the template lies in.
        template: File name; it extends ``base.jinja`` of this package.
        values: What it prints. A name that isn't given is an error, never an empty text.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
    """
    if (error := lacking("a web page")) is not None:
        raise error
    import jinja2

    loaders = [jinja2.PackageLoader(each, "") for each in (package, __package__)]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        digits=digits, size=size, code=code, bar=bar, data=data, missed=missed
    )
    environment.tests["numeric"] = is_numeric
    return environment.get_template(template).render(**values)


def mailable(text: str, *folders: str) -> str:
    """Return text without the folders of this machine, for a page that goes to others.

    Args:
        text: May hold the names of files, as a message of an error does.
        folders: Names that become their last part wherever they stand, blanks and all; what else
            looks like an absolute path becomes its last part too.
    """
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder, os.path.basename(folder.rstrip("/")))  # noqa: PTH119
    return _PATH.sub(r"\1", text)


def missed(text: object) -> Markup:
    """Return text that says what misses a limit, in red."""
    from markupsafe import Markup

    return Markup('<span class="miss">{}</span>').format(text)


def code(text: object) -> Markup:
    """Return text as code."""
    from markupsafe import Markup

    return Markup("<code>{}</code>").format(text)


def bar(share: float, width: float = 8, kind: str = "") -> Markup:
    """Return a bar.

    Args:
        share: Of the whole width; below 0 is 0, above 1 is 1.
        width: In rem.
        kind: A class, for its colour.
    """
    from markupsafe import Markup

    length = width * min(1.0, max(0.0, share))
    return Markup('<span class="bar {}" style="width:{}rem"></span>').format(kind, f"{length:.2f}")


def data(content: bytes, kind: Kind) -> str:
    """Return an image as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def digits(value: float | None, count: int) -> str:
    """Return a number with that many digits after its point; – for what isn't known."""
    return "–" if value is None else f"{value:.{count}f}"


def is_numeric(value: object) -> bool:
    """Say whether a cell is set to the right: its text begins as a number does."""
    return not hasattr(value, "__html__") and str(value)[:1] in set("0123456789–−")


def byte_unit(count: int) -> tuple[int, str]:
    """Return the unit in which one reads a number of bytes: how many bytes it has, and its name."""
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= scale:
            return scale, unit
    return 2**10, "KiB"


def size(count: int) -> str:
    """Return a number of bytes as one reads it."""
    scale, unit = byte_unit(count)
    return f"{count / scale:.1f} {unit}"
