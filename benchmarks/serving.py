"""A service beside the engine alone: ``python -m benchmarks.serving --bundle FOLDER``.

Starts ``vzip serve`` and asks in one run, in turns with the same work in this process: pictures one
after the other (what a program without the service does), whole batches (the most that the engine
gives), and the service under 1, 8 and 64 clients. What the host costs a request is the difference
of a request's median and that of the engine's call, client included. With a bundle that has an LLM,
200 held-out questions are asked through OpenAI's client and compared with ``vzip ask``'s answers.
Writes ``benchmarks/results/serving.json`` and a table of it.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import tritonclient.http as triton
from PIL import Image

from benchmarks.harness import results
from benchmarks.soak import start
from vzip.calibration.demo import accuracy
from vzip.export.pages import markdown
from vzip.runtime import VisionEncoder, open_llm
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.machine.record import machine

WHAT = "vzip serve beside the engine alone, in one run"
QUESTIONS = 200
CLIENTS = (1, 8, 64)
TOLERANCE = 1e-5

Row = dict[str, Any]


@contextlib.contextmanager
def service(bundle: Path, *options: str) -> Iterator[int]:
    """Serve a bundle in a process of its own; yield its port."""
    process, port = start(bundle, *options)
    try:
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def request(array: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """Return a request for the tokens of an array, and its headers."""
    one = {"name": "image", "datatype": "UINT8", "shape": list(array.shape),
           "parameters": {"binary_data_size": array.nbytes}}  # fmt: skip
    head = json.dumps({"inputs": [one], "parameters": {"binary_data_output": True}}).encode()
    return head + array.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


class Client:
    """A connection that stays open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

    def infer(self, body: bytes, headers: dict[str, str]) -> None:
        """Ask for tokens, again where the service is full."""
        while True:
            self._connection.request("POST", "/v2/models/served/infer", body, headers)
            response = self._connection.getresponse()
            data = response.read()
            if response.status == 200:
                return
            assert response.status == 429, data
            time.sleep(0.05)


def served_rate(port: int, clients: int, arrays: list[np.ndarray]) -> Row:
    """Ask for the tokens of arrays, from several clients at once."""
    made = [request(each) for each in arrays]
    left, lock, taken = iter(made), threading.Lock(), []

    def client(_: int) -> None:
        own = Client(port)
        while True:
            with lock:
                mine = next(left, None)
            if mine is None:
                return
            begun = time.perf_counter()
            own.infer(*mine)
            taken.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return _row(f"service, {clients} clients", arrays, time.perf_counter() - begun, taken)


def alone(encoder: VisionEncoder, arrays: list[np.ndarray], batch: int) -> Row:
    """Run the engine in this process, on batches of a size."""
    together = np.concatenate(arrays)
    taken = []
    begun = time.perf_counter()
    for first in range(0, len(together), batch):
        one = time.perf_counter()
        encoder.run(together[first : first + batch])
        taken.append(time.perf_counter() - one)
    name = "sequential" if batch == 1 else f"engine, batches of {batch}"
    return _row(name, arrays, time.perf_counter() - begun, taken)


def _row(name: str, arrays: list[np.ndarray], seconds: float, taken: list[float]) -> Row:
    taken = sorted(taken)
    return {
        "what": name,
        "pictures_per_second": round(sum(map(len, arrays)) / seconds, 2),
        "p50_ms": round(1e3 * statistics.median(taken), 3),
        "p99_ms": round(1e3 * taken[min(len(taken) - 1, int(len(taken) * 0.99))], 3),
    }


def throughput(bundle: Path, count: int, rounds: int, threads: int) -> dict[str, Any]:
    """Time the service and the engine in turns; rates are of each one's best round."""
    manifest = read_bundle(bundle, verify=False).manifest
    rng = np.random.default_rng(7)
    shape = tuple(map(int, manifest.input.shape[1:]))
    arrays = [rng.integers(0, 256, (1, *shape), np.uint8) for _ in range(count)]
    found: dict[str, list[Row]] = {}
    options = ("--llm", "none", "--threads", str(threads), "--per-client", "128")
    with service(bundle, *options) as port, VisionEncoder.open(bundle, threads=threads) as encoder:
        batch = manifest.batch.max
        encoder.run(arrays[0])
        served_rate(port, 1, arrays[:2])
        for _ in range(rounds):
            for row in (
                alone(encoder, arrays, 1),
                alone(encoder, arrays, batch),
                *(served_rate(port, clients, arrays) for clients in CLIENTS),
            ):
                found.setdefault(row["what"], []).append(row)
        host = round(min(host_ms(port, arrays) for _ in range(rounds)), 3)
    rows = [max(each, key=lambda row: row["pictures_per_second"]) for each in found.values()]
    best = max(row["pictures_per_second"] for row in rows[:2])
    most = max(row["pictures_per_second"] for row in rows[2:])
    return {
        "model": manifest.model.id,
        "batch": batch,
        "threads": threads,
        "pictures": count,
        "rounds": rounds,
        "rows": rows,
        "service_of_engine": round(most / best, 4),
        "host_ms": host,
    }


def host_ms(port: int, arrays: list[np.ndarray]) -> float:
    """Return the milliseconds that a request of one client takes beside the engine's call."""
    before = counters(port)
    served_rate(port, 1, arrays)
    after = counters(port)
    total, requests, engine = (now - then for now, then in zip(after, before, strict=True))
    assert requests == len(arrays)
    return 1e3 * (total - engine) / requests


def counters(port: int) -> tuple[float, float, float]:
    """Return the seconds of all requests for tokens, their number, and the engine's seconds."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    route = '{route="POST /v2/models/{model}/infer"}'
    names = (f"vzip_request_seconds_sum{route}", f"vzip_request_seconds_count{route}",
             "vzip_engine_seconds_sum")  # fmt: skip
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
    total, requests, engine = (float(values[name]) for name in names)
    return total, requests, engine


def held_out(count: int) -> list[tuple[bytes, str]]:
    """Return questions about pictures that training never saw."""
    scenes = accuracy.held_out(61803, count // 4, painted=112)
    found = []
    for picture, questions in zip(scenes.pictures, scenes.questions, strict=True):
        data = io.BytesIO()
        Image.fromarray(np.asarray(picture)).save(data, "PNG")
        found += [(data.getvalue(), question.text) for question in questions]
    assert len(found) >= count
    return found[:count]


def answers(bundle: Path) -> dict[str, Any]:
    """Compare answers and tokens of the service with those of this process."""
    asked = held_out(QUESTIONS)
    llm = open_llm(bundle, threads=1)
    pictures = list(dict.fromkeys(picture for picture, _ in asked))
    with VisionEncoder.open(bundle, threads=1) as encoder:
        tokens = {each: encoder.image_tokens(each) for each in pictures}
        wanted = [llm.ask([_given(tokens[picture])], question) for picture, question in asked]
        options = ("--threads", "1", "--per-client", "128", "--cache-mb", "0")
        with service(bundle, *options) as port:
            given = _asked(port, asked)
            exact, kept, error = _inferred(port, encoder, pictures)
    return {
        "questions": len(asked),
        "equal_answers": sum(map(str.__eq__, wanted, given)),
        "clients": 64,
        "pictures": len(pictures),
        "bit_equal_alone": exact,
        "kept_equal": kept,
        "largest_error": error,
        "within_tolerance": error <= TOLERANCE,
    }


def _given(encoded: Any) -> Any:
    """Return what `LLM.ask` takes of an encoded picture."""
    import inspect

    from vzip.runtime.llm.contract import LLM

    takes_places = "positions" in inspect.signature(LLM.ask).parameters
    return encoded if takes_places else encoded.embeds


def _asked(port: int, asked: list[tuple[bytes, str]]) -> list[str]:
    """Return the service's answers, through OpenAI's client, from 64 threads at once."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=9)

    def ask(one: tuple[bytes, str]) -> str:
        picture, question = one
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        parts: Any = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": question},
        ]
        given = client.chat.completions.create(
            model="served", messages=[{"role": "user", "content": parts}]
        )
        return str(given.choices[0].message.content)

    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(ask, asked))


def _inferred(port: int, encoder: VisionEncoder, files: list[bytes]) -> tuple[int, int, float]:
    """Compare tokens through Triton's client: alone bit for bit, among 64 clients by numbers."""
    arrays = [np.asarray(Image.open(io.BytesIO(each)))[None] for each in files]
    wanted = [encoder.run(each) for each in arrays]

    def infer(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with triton.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=300) as client:
            given = triton.InferInput("image", list(array.shape), "UINT8")
            given.set_data_from_numpy(array)
            result = client.infer("served", [given])
            return result.as_numpy("image_embeds"), result.as_numpy("kept_indices")

    exact = sum(
        int(np.array_equal(infer(array)[0], each.embeds))
        for array, each in zip(arrays, wanted, strict=True)
    )
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(infer, arrays))
    kept = sum(
        int(np.array_equal(got[1], each.kept)) for got, each in zip(together, wanted, strict=True)
    )
    pairs = zip(together, wanted, strict=True)
    error = max(float(np.abs(got[0] - each.embeds).max()) for got, each in pairs)
    return exact, kept, error


def page(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [f"# {WHAT}", ""]
    for name, found in result["throughput"].items():
        rows = [
            [row["what"], *(f"{row[key]:g}" for key in ("pictures_per_second", "p50_ms", "p99_ms"))]
            for row in found["rows"]
        ]
        host = f"Host's own cost a request: {found['host_ms']:g} ms."
        lines += [f"## {name}: batches up to {found['batch']}, threads {found['threads']}", ""]
        lines += markdown.table(["", "pictures/s", "p50 ms", "p99 ms"], rows)
        lines += ["", f"Service ÷ engine: {found['service_of_engine']:g}. {host}", ""]
    if found := result.get("answers"):
        text = (
            f"{found['equal_answers']} of {found['questions']} answers through OpenAI's client are "
            f"`vzip ask`'s, asked from {found['clients']} threads at once. Tokens through Triton's "
            f"client: {found['bit_equal_alone']} of {found['pictures']} bit for bit alone; among "
            f"64 clients {found['kept_equal']} kept sets are equal, and numbers differ by at most "
            f"{found['largest_error']:.1e}."
        )
        lines += ["## Answers", "", text, ""]
    return "\n".join(lines)


def main() -> int:
    """Measure, and write what was found."""
    parser = results.parser(__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="the demo's, with its LLM")
    parser.add_argument("--full", type=Path, help="one of full size")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"what": WHAT, "machine": machine()}
    found["throughput"] = {"demo": throughput(arguments.bundle, 256, 3, arguments.threads)}
    if arguments.full:
        found["throughput"]["full size"] = throughput(arguments.full, 8, 1, arguments.threads)
    found["answers"] = answers(arguments.bundle)
    results.write(arguments.output, "serving", found, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
