"""What ONNX Runtime's waiting threads cost PyTorch: ``python -m benchmarks.beside_torch``.

An application encodes a picture in ONNX Runtime and hands its tokens to a LLM in PyTorch, in one
process: in turn, and both at the same time from two threads. Each library has a pool of threads
that wait for their next work by spinning, which takes the cores that the other works on. What is
compared is how ONNX Runtime's wait, how many each library has, and OpenMP's ``OMP_WAIT_POLICY``,
by which PyTorch's wait. Under six minutes on two cores that do nothing else.

The encoder is a trained tower's, the LLM's shape is Llama's, four layers of width 1024 with random
weights; it reads the tokens and 64 words and says 8. Writes
benchmarks/results/beside_torch.json and .md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks import small_costs
from benchmarks.harness import results
from benchmarks.real.pictures import HELD_APART, pictures
from benchmarks.real.towers import checkpoint
from vzip.export import export
from vzip.export.bench.others import IDLE, UNSTEADY, Moment, wait_until_idle
from vzip.export.pages import markdown
from vzip.runtime.backends.onnxruntime import session_options
from vzip.runtime.backends.packages import import_onnxruntime
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.console import say
from vzip.runtime.machine.process import cores
from vzip.runtime.machine.record import machine, state
from vzip.runtime.machine.timing import summary
from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.preprocess import tower_image

WHAT: Final = "An encoder in ONNX Runtime and a LLM in PyTorch, in one process; milliseconds"
TOWER, DEMO = "clip-b16-224", "demo"
WORDS, SAID = 64, 8
POLICIES: Final = (None, "PASSIVE")
"""Values of OMP_WAIT_POLICY; None where it is not set."""
SPINS, STOPS, SLEEPS = "spins", "stops", "sleeps"
WAITS: Final[Mapping[str, Mapping[str, str]]] = {
    SPINS: {"session.intra_op.allow_spinning": "1", "session.force_spinning_stop": "0"},
    "spins 100 µs": {
        "session.intra_op.allow_spinning": "1",
        "session.intra_op.spin_duration_us": "100",
        "session.force_spinning_stop": "0",
    },
    STOPS: {"session.intra_op.allow_spinning": "1", "session.force_spinning_stop": "1"},
    SLEEPS: {"session.intra_op.allow_spinning": "0", "session.force_spinning_stop": "0"},
}
"""How ONNX Runtime's threads wait: as they come; for a tenth of a millisecond; only as long as a
call runs; not at all."""
ROUNDS, TIMED, ALONE_S, TOGETHER_S = 5, 3, 0.3, 1.3
TRIES, WAIT_S = 3, 10.0
"""Of a turn that others disturb: the one in which they took least counts."""

Row = dict[str, Any]
Array = NDArray[Any]
Parts = dict[str, list[float]]


@dataclass(frozen=True)
class Setting:
    """One way to run both.

    Attributes:
        wait: Of `WAITS`.
        threads: Of ONNX Runtime.
        torch_threads: Of PyTorch.
        together: Both at the same time, instead of in turn.
        llm: Whether there is a LLM.
        tower: Of the encoder.
    """

    wait: str
    threads: int
    torch_threads: int
    together: bool = False
    llm: bool = True
    tower: str = TOWER


def settings(number: int) -> list[Setting]:
    """Return what is measured on a machine of so many cores."""
    every = [
        Setting(wait, number, number, llm=False, tower=name)
        for name in (DEMO, TOWER)
        for wait in WAITS
    ]
    every += [Setting(wait, number, number) for wait in WAITS]
    every += [Setting(SPINS, number, 1), Setting(STOPS, number, 1), Setting(SPINS, 1, number)]
    every += [Setting(wait, number, number, together=True) for wait in WAITS]
    half = max(1, number // 2)
    every += [Setting(wait, half, half, together=True) for wait in (SPINS, STOPS)]
    return every


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = results.parser(__doc__)
    parser.add_argument("--bundle", type=Path, help=f"of {TOWER}, instead of a new one")
    parser.add_argument("--job", help="for this command's own use")
    options = parser.parse_args(arguments)
    if options.job is not None:
        places = json.loads(options.job)
        found = measured({name: read_bundle(Path(at), verify=False) for name, at in places.items()})
        print(json.dumps(found))
        return 0
    with small_costs.exported(*small_costs.DEMO) as demo, tempfile.TemporaryDirectory() as folder:
        path = options.bundle
        if path is None:
            path = Path(folder) / "bundle"
            export(checkpoint(TOWER), path, say=lambda _: None)
        places = {TOWER: path, DEMO: demo}
        found = {
            "what": WHAT,
            "command": "python -m benchmarks.beside_torch",
            "environment": machine(),
            "tokens": read_bundle(path, verify=False).manifest.selection.tokens,
            "policies": [_of_policy(places, policy) for policy in POLICIES],
            "after": state(),
        }
    results.write(options.output, "beside_torch", found, page)
    return 0


def _of_policy(places: Mapping[str, Path], policy: str | None) -> Row:
    """Measure in a process of its own: OpenMP reads its settings when it is loaded."""
    say(f"OMP_WAIT_POLICY {policy or 'not set'}")
    place = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    if policy is not None:
        place["OMP_WAIT_POLICY"] = policy
    job = json.dumps({name: str(path.resolve()) for name, path in places.items()})
    command = [sys.executable, "-m", "benchmarks.beside_torch", "--job", job]
    done = subprocess.run(command, check=True, env=place, stdout=subprocess.PIPE, text=True)
    return {"policy": policy, **json.loads(done.stdout)}


def measured(bundles: Mapping[str, Bundle]) -> Row:
    """Measure every setting in this process, in turns of some iterations."""
    import torch

    every = settings(cores())
    feeds = {name: _feeds(bundle) for name, bundle in bundles.items()}
    sessions = {
        key: _session(bundles[key[0]], *key[1:])
        for key in sorted({(each.tower, each.wait, each.threads) for each in every})
    }
    llm = Llm(bundles[TOWER].manifest.llm.hidden_size)
    taken: dict[Setting, list[Parts]] = {each: [] for each in every}
    with torch.inference_mode():
        for number in range(-1, ROUNDS):  # one that doesn't count
            start = max(0, number) * 3 % len(every)
            for each in every[start:] + every[:start]:
                torch.set_num_threads(each.torch_threads)
                session = sessions[each.tower, each.wait, each.threads]
                encode = partial(_encode, session, feeds[each.tower])
                take = _together if each.together else _in_turn
                turn = _undisturbed(partial(take, encode, llm if each.llm else None))
                if number >= 0:
                    taken[each].append(turn)
    burnt = {wait: _burnt(sessions[TOWER, wait, cores()], feeds[TOWER]) for wait in WAITS}
    rows = [
        {
            **asdict(each),
            "others_cores": round(max(turn.pop("others_cores")[0] for turn in turns), 3),
            **{part: summary([turn[part] for turn in turns]) for part in turns[0]},
        }
        for each, turns in taken.items()
    ]
    return {"burnt_ms": burnt, "rows": rows}


class Llm:
    """A LLM of random weights in FP32.

    Args:
        width: Of its embeddings.
    """

    def __init__(self, width: int) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(7)
        self._torch = torch
        self._model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=4,
                num_attention_heads=width // 64, vocab_size=32000,
            )
        ).eval()  # fmt: skip
        self._words = torch.randn(1, WORDS, width)
        self._said: Any = None

    def read(self, tokens: Array) -> None:
        """Read the tokens of a picture [1, K, width] and the words."""
        embeds = self._torch.cat([self._torch.from_numpy(tokens), self._words], dim=1)
        self._said = self._model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)

    def say(self) -> None:
        """Say so many words, the likeliest each time."""
        for _ in range(SAID):
            word = self._said.logits[:, -1:].argmax(-1)
            self._said = self._model(word, past_key_values=self._said.past_key_values)


def _feeds(bundle: Bundle) -> dict[str, Array]:
    image = tower_image(load_image(pictures(HELD_APART)[0]), bundle.manifest.preprocessing)
    return {bundle.manifest.input.name: np.ascontiguousarray(image[None])}


def _encode(session: Any, feeds: Mapping[str, Array]) -> Array:
    return np.asarray(session.run(None, feeds)[0], np.float32)


def _session(bundle: Bundle, wait: str, threads: int) -> Any:
    onnxruntime = import_onnxruntime("this benchmark", "cpu")
    options = session_options(onnxruntime, threads)
    for name, value in WAITS[wait].items():
        options.add_session_config_entry(name, value)
    path = str(bundle.path / bundle.graph_file)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _undisturbed(take: Callable[[], Parts]) -> Parts:
    """Return what a turn gives, and how many cores others kept busy during it."""
    found: list[tuple[float, Parts]] = []
    for _ in range(TRIES):
        before = Moment.now(os.getpid())
        parts = take()
        others = Moment.now(os.getpid()).others_since(before) or 0.0
        found.append((others, {**parts, "others_cores": [others]}))
        if others <= IDLE * cores():
            break
        wait_until_idle(WAIT_S, say=say)
    return min(found, key=lambda each: each[0])[1]


def _in_turn(encode: Callable[[], Array], llm: Llm | None) -> Parts:
    """Return milliseconds of the encoder, of the LLM's reading and saying, and of all of them."""
    taken: Parts = {}
    start, number = time.perf_counter(), -1  # one that doesn't count
    while number < TIMED or (llm is None and time.perf_counter() - start < ALONE_S):
        number += 1
        times = [time.perf_counter()]
        tokens = encode()
        times.append(time.perf_counter())
        if llm is not None:
            llm.read(tokens)
            times.append(time.perf_counter())
            llm.say()
            times.append(time.perf_counter())
        if number > 0:
            names = ("encoder", "reading", "saying")
            for name, begin, end in zip(names, times, times[1:], strict=False):
                taken.setdefault(name, []).append(1000 * (end - begin))
            taken.setdefault("all", []).append(1000 * (times[-1] - times[0]))
    return taken


def _together(encode: Callable[[], Array], llm: Llm | None) -> Parts:
    """Return milliseconds of the encoder and of the LLM's answer, from a thread each."""
    assert llm is not None
    tokens = encode()
    ends = time.perf_counter() + TOGETHER_S
    taken: Parts = {"encoder": [], "answer": []}

    def answer() -> None:
        with llm._torch.inference_mode():  # of each thread
            llm.read(tokens)
            llm.say()

    def repeat(name: str, call: Callable[[], object]) -> None:
        while (begin := time.perf_counter()) < ends:
            call()
            taken[name].append(1000 * (time.perf_counter() - begin))

    other = threading.Thread(target=repeat, args=("answer", answer))
    other.start()
    repeat("encoder", encode)
    other.join()
    return taken


def _burnt(session: Any, feeds: Mapping[str, Array]) -> float:
    """Return the processor's milliseconds that are used while nothing is done after a call."""
    found = []
    for _ in range(7):
        session.run(None, feeds)
        start = time.process_time()
        time.sleep(0.2)
        found.append(1000 * (time.process_time() - start))
    return round(statistics.median(found), 3)


def page(found: Row) -> str:
    """Return the tables."""
    parts = ("encoder", "reading", "saying", "all", "answer")
    heads = (
        "when", "ONNX Runtime's threads", "PyTorch's threads", *parts, "spread", "others' cores",
    )  # fmt: skip
    said = (
        f"{found['what']}. Medians; the LLM reads {found['tokens']} tokens of {TOWER} and {WORDS} "
        f"words and says {SAID}. All: encoder, reading and saying in turn. Answer: reading and "
        "saying, while another thread encodes. Spread: the largest distance of quartiles in the "
        "row, as a share of its median; unsteady from a third on: something disturbed it, and its "
        "times say little. Others' cores: kept busy by other programs, in the worst "
        "turn."
    )
    lines = [said, ""]
    for policy in found["policies"]:
        rows = [
            (
                _when(row),
                f"{row['threads']}, {row['wait']}",
                str(row["torch_threads"]) if row["llm"] else "–",
                *(f"{row[each]['median_ms']:.1f}" if each in row else "" for each in parts),
                _spread(row, parts),
                f"{row['others_cores']:.2f}" if "others_cores" in row else "not counted",
            )
            for row in policy["rows"]
        ]
        burnt = ", ".join(f"{wait} {each:.2f} ms" for wait, each in policy["burnt_ms"].items())
        lines += [
            f"### OMP_WAIT_POLICY {policy['policy'] or 'not set'}",
            "",
            *markdown.table(heads, rows),
            "",
            f"Processor time used after a call of the encoder, while nothing is done: {burnt}.",
            "",
        ]
    place = found["environment"]
    load = f"{place['state']['load']} before, {found['after']['load']} after"
    versions = ", ".join(f"{name} {each}" for name, each in place["packages"].items())
    lines += [
        f"* processor: {place['processor']}, {place['cores']} cores",
        f"* load: {load}",
        f"* packages: {versions}",
    ]
    return "\n".join(lines) + "\n"


def _when(row: Row) -> str:
    if not row["llm"]:
        return f"{row['tower']} alone"
    return "at the same time" if row["together"] else "in turn"


def _spread(row: Row, parts: Sequence[str]) -> str:
    """Return the largest spread of a row; of one that says little, that it does."""
    spread = max(row[each]["iqr_ms"] / row[each]["median_ms"] for each in parts if each in row)
    return f"{spread:.0%}, unsteady" if spread > UNSTEADY else f"{spread:.0%}"


if __name__ == "__main__":
    sys.exit(main())
