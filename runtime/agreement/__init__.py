"""Do two runs of an encoder agree? Said in one place, judged by one table of gates.

An encoder that rounds otherwise keeps other tokens where scores are close. So two things are judged
apart, and kept and merged tokens apart from each other:

* Which tokens are kept. A kept token that the reference doesn't keep is counted with the distance
  of its score from the last one kept: within a gate's margin it is a swap by rounding, beyond it a
  disagreement. Where merged tokens tell what went into them, their groups are judged likewise.
* What the tokens hold, row by row: those that both keep, and each merged token whose target is the
  same in both. Which tokens were merged into it can still differ by rounding.

A bundle's `reference.npz` holds what the untouched model says of a few pictures, so that an engine
is judged with numpy alone, where it was built.
"""

from __future__ import annotations

from vzip.runtime.agreement.found import (
    SCORES,
    Agreement,
    Choices,
    Outputs,
    Values,
    compare,
    kept_choices,
)
from vzip.runtime.agreement.gates import (
    CALIBRATED,
    COARSER_PEER,
    CPU_FORM,
    CPU_FORM_VARIED,
    ENGINE,
    GRAPH,
    LLM_LOGITS,
    UNCOMPRESSED_PEER,
    Gate,
    Limits,
    missed_limits,
    missed_shown,
)
from vzip.runtime.agreement.proof import Proof, Run, prove
from vzip.runtime.agreement.reference_file import Reference, load_reference, read_reference

__all__ = [
    "CALIBRATED",
    "COARSER_PEER",
    "CPU_FORM",
    "CPU_FORM_VARIED",
    "ENGINE",
    "GRAPH",
    "LLM_LOGITS",
    "SCORES",
    "UNCOMPRESSED_PEER",
    "Agreement",
    "Choices",
    "Gate",
    "Limits",
    "Outputs",
    "Proof",
    "Reference",
    "Run",
    "Values",
    "compare",
    "kept_choices",
    "load_reference",
    "missed_limits",
    "missed_shown",
    "prove",
    "read_reference",
]
