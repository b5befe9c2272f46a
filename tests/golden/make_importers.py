"""Make `importers.json`: what TensorRT's ONNX parser makes of each operator.

    python tests/golden/make_importers.py CHECKOUT

CHECKOUT is a clone of onnx/onnx-tensorrt with its release branches. The parser has a function for
each operator; an operator whose function adds a loop, a branch or a layer with a data-dependent
shape to the network is named apart, since no CUDA graph can be captured of those. 10.2 to 10.7 have
10.1's CumSum: the changelog of TensorRT 10.8 is the first that names a layer for it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = {
    "8.6": ("release/8.6-GA", "builtin_op_importers.cpp"),
    "10.1": ("10.1-GA", "onnxOpImporters.cpp"),
}
UNWANTED = r"->addLoop\(|->addIfConditional\(|->addNonZero\("


def importers(source: str) -> dict[str, list[str]]:
    """Return the operators of a parser's source, apart where one has what a CUDA graph can't."""
    _, *parts = re.split(r"(?m)^DEFINE_BUILTIN_OP_IMPORTER\((\w+)\)", source)
    functions = dict(zip(parts[::2], parts[1::2], strict=True))
    loops = {name for name, code in functions.items() if re.search(UNWANTED, code)}
    return {"loop": sorted(loops), "plain": sorted(functions.keys() - loops)}


if __name__ == "__main__":
    found = {}
    for version, (branch, file) in SOURCES.items():
        source = subprocess.run(
            ["git", "-C", sys.argv[1], "show", f"{branch}:{file}"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        found[version] = importers(source)
    text = json.dumps(found, indent=1) + "\n"
    (HERE / "importers.json").write_text(text, encoding="utf-8")
