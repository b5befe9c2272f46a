"""Write the README's tables from benchmarks/results: ``python -m benchmarks.readme``.

`tests/test_readme.py` fails when a table is not what its result file gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def demo_accuracy(result: dict[str, Any]) -> str:
    """Return the demo model's table in short: one line a budget."""
    rows = {(row["name"], row["tokens"]): row for row in result["rows"]}
    full = rows["all tokens", result["patches"]]
    wrong = rows["all tokens of another picture", result["patches"]]
    budgets = sorted({row["tokens"] for row in result["rows"]} - {result["patches"]}, reverse=True)
    columns = (
        "VisionZip, average, with CLS",
        "VisionZip, sum, with CLS",
        "uniform grid",
        "random",
    )
    heading = (
        f"Held-out accuracy with all {result['patches']} tokens: {full['accuracy']:.1%} of "
        f"{sum(result['questions'].values())} questions (with another picture's tokens: "
        f"{wrong['accuracy']:.1%}). What is left of it with fewer:"
    )
    lines = [
        heading,
        "",
        "| tokens | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for tokens in budgets:
        kept = (f"{rows[column, tokens]['kept']:.1%}" for column in columns)
        lines.append(f"| {tokens} ({tokens / result['patches']:.0%}) | " + " | ".join(kept) + " |")
    return "\n".join(lines)


def export_cost(result: dict[str, Any]) -> str:
    """Return one sentence about what an export at full size costs."""
    checked, plain = result["median"]["with parity check"], result["median"]["without"]
    runs, where = result["runs"]["without"], result["environment"]
    return (
        f"`{result['command']}`: {checked['wall_s']:.0f} s and {checked['peak_gb']:.1f} GB at its "
        f"peak with the parity check, {plain['wall_s']:.0f} s and {plain['peak_gb']:.1f} GB "
        f"without (medians of {len(runs)} on {where['cores']} cores, {where['processor']}). "
        "No 7B model is ever built."
    )


def handoff(result: dict[str, Any]) -> str:
    """Return the table of the LLM engines that ran on this machine."""
    from benchmarks.handoff import table

    return table(result).rstrip("\n")


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo_accuracy": demo_accuracy,
    "export_cost": export_cost,
    "handoff": handoff,
}


def with_tables(readme: str) -> str:
    """Return the README's text with every table as its result file gives it."""
    for name, render in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = readme.split(begin)
        _, tail = rest.split(end)
        table = render(json.loads((RESULTS / f"{name}.json").read_text()))
        readme = f"{head}{begin}{table}\n{end}{tail}"
    return readme


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
