"""Runs the Python snippets of a documentation page, so that none of them rots."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tests.places import DOCS


def run_snippets(page: str, replaced: Mapping[str, str]) -> dict[str, Any]:
    """Run all ```python blocks of a page, one after the other in one namespace.

    Args:
        page: The page's path below docs/.
        replaced: Text of the blocks, such as a folder's name → what stands there in the test; each
            must occur.

    Returns:
        The names that the snippets leave.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert blocks, f"{page} has no python block"
    code = "\n".join(blocks)
    for name, value in replaced.items():
        assert name in code, f"{page} does not mention {name!r}"
        code = code.replace(name, value)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, page, "exec"), names)
    return names
