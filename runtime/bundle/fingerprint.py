"""The fingerprint of a bundle: equal where the same picture becomes the same tokens.

Tokens that were written down are of use only together with the bundle that made them. The
fingerprint is what they are compared by: a digest over everything in the manifest that decides what
the numbers are, and over nothing else. So it survives `vzip check`, `vzip build` and moving the
folder, and changes with the weights, the selection, the preprocessing, the tiles or the precision.
"""

from __future__ import annotations

import hashlib
import json
from typing import Final

from vzip.runtime.bundle.manifest import DATA_FILE, MODEL_FILE, NEWLINE_FILE, Manifest
from vzip.runtime.bundle.precision_record import Quantised, data_file, graph_file

VERSION: Final = 1
"""Goes up when the runtime itself makes other tokens from the same bundle: another resampling, say.
"""

_KEYS = ("selection", "tower", "token_order", "inputs", "outputs", "preprocessing", "tiling")


def fingerprint(
    manifest: Manifest,
    quantised: Quantised | None = None,
    *,
    cpu_engine: bool = False,
    several: bool = False,
) -> str:
    """Return the fingerprint of the bundle that has this manifest.

    It says nothing about which backend or GPU's engine ran the graph: those agree within what `vzip
    check` and `vzip build` allow, not bit for bit.

    Args:
        manifest: The manifest; its digests are believed, `VisionEncoder.open` compares them.
        quantised: Which of its quantised graphs makes the tokens, as `Bundle.quantised` says.
        cpu_engine: Whether a CPU engine does, which may compute in 8 bits; those of two machines
            differ, within what `docs/fastest.md` allows.
        several: Whether the tokens are those of an image that stands with others in its prompt.

    Returns:
        SHA-256, 64 lower-case hexadecimal digits.
    """
    value = manifest.to_json()
    own = (MODEL_FILE, DATA_FILE)
    graph = own if quantised is None else (graph_file(quantised), data_file(quantised))
    names = (*graph, NEWLINE_FILE)  # reference.npz only judges
    parts = {
        "version": VERSION,
        "files": {name: manifest.files[name].sha256 for name in names if name in manifest.files},
        **{key: value[key] for key in _KEYS},
        **({"fastest": True} if cpu_engine else {}),
        **({"several": True} if several and cuts_only_alone(manifest) else {}),
    }
    # Python writes the shortest text that gives a float back, on every platform.
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def cuts_only_alone(manifest: Manifest) -> bool:
    """Return whether an image has other tokens where it stands with others in its prompt."""
    return manifest.tiling is not None and manifest.tiling.only_alone
