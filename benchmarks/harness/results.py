"""Where results go, and the form they have there: JSON, and the page that is made of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from vzip.runtime.files import outputs

RESULTS: Final = Path(__file__).parents[1] / "results"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a benchmark's parser, with ``-o``; its description is the first line of `doc`."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="FOLDER")
    return made


def text(result: Mapping[str, Any]) -> str:
    """Return a result as it is stored."""
    return json.dumps(result, indent=1, allow_nan=False) + "\n"


def write(
    folder: Path,
    name: str,
    result: dict[str, Any],
    page: Callable[[dict[str, Any]], str],
    **more: bytes,
) -> None:
    """Write a result and its page, and print the page.

    Args:
        folder: Made where it isn't there.
        name: Of the files, without a suffix.
        result: What was measured.
        page: Makes Markdown of it.
        more: Suffix → a further file's bytes.
    """
    made = page(result)
    files = {"json": text(result).encode(), "md": made.encode(), **more}
    outputs.write_folder(folder, {f"{name}.{suffix}": data for suffix, data in files.items()})
    print(made)
