"""Ten minutes of everybody at once, good and bad: ``python -m benchmarks.soak --bundle FOLDER``.

Starts ``vzip serve`` on a bundle with an LLM in it and lets clients of many kinds ask it together:
those that want answers, tokens or streams; those that leave amid a stream or an upload, read
slowly, send slowly, too much, or nonsense. Every request must be answered or refused in its
protocol's form, memory must stay flat, and SIGTERM amid all of it must end in a clean drain. Writes
``benchmarks/results/soak.json``.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import results
from vzip.calibration.demo import accuracy
from vzip.runtime.machine.record import machine

WHAT = "A service under ten minutes of mixed load, with clients that leave, dawdle and lie"
REFUSALS = {400, 404, 408, 413, 429, 503, 504}
FLAT = 1.10  # of the last quarter's memory, beside the second's
Outcome = tuple[str, float]


class Load:
    """Clients of one service.

    Args:
        port: Where it is.
        pictures: Encoded pictures, and a question about each.
    """

    def __init__(self, port: int, pictures: list[tuple[bytes, str]]) -> None:
        self.port, self.pictures = port, pictures
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.seconds: list[float] = []
        self.stop = threading.Event()
        self.draining = threading.Event()
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        """Ask until it is over."""
        rng = random.Random(seed)
        kinds: list[Callable[[random.Random], str]] = [
            *[self.answer] * 5, *[self.stream] * 4, *[self.tokens] * 4, *[self.infer] * 5,
            self.leaves, self.half, self.oversize, self.nonsense, self.slow_reader, self.metrics,
        ]  # fmt: skip
        while not self.stop.is_set():
            kind = rng.choice(kinds)
            begun = time.monotonic()
            try:
                outcome = kind(rng)
            except (OSError, http.client.HTTPException, ValueError) as error:
                # While it drains, new connections are refused: that is an answer too.
                outcome = f"fault: {type(error).__name__}: {error}"
                if self.draining.is_set():
                    outcome = "refused: connection, while draining"
            with self._lock:
                self.counts[f"{kind.__name__}: {outcome}"] += 1
                if outcome == "answered":
                    self.seconds.append(time.monotonic() - begun)
                if outcome.startswith("fault"):
                    self.faults.append(f"{kind.__name__}: {outcome}")
            if outcome.startswith(("refused: 429", "refused: connection")):
                time.sleep(0.05)

    def _ask(self, method: str, path: str, body: bytes | None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        with contextlib.closing(connection):
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, given)
            response = connection.getresponse()
            data = response.read()
            if response.status in (429, 503) and not response.headers["Retry-After"]:
                raise ValueError(f"a {response.status} without Retry-After")
        return response.status, data

    def _outcome(self, status: int, data: bytes, *, good: bool = True) -> str:
        if status == 200 and good:
            return "answered"
        if status in REFUSALS and "error" in json.loads(data):
            return f"refused: {status}"
        raise ValueError(f"status {status}: {data[:200]!r}")

    def _chat(self, rng: random.Random, **more: Any) -> bytes:
        picture, question = rng.choice(self.pictures)
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        return json.dumps({"model": "served", "messages": [message], **more}).encode()

    def answer(self, rng: random.Random) -> str:
        """Ask, and read the whole answer."""
        return self._outcome(*self._ask("POST", "/v1/chat/completions", self._chat(rng)))

    def stream(self, rng: random.Random) -> str:
        """Ask, and read a stream to its end."""
        body = self._chat(rng, stream=True)
        status, data = self._ask("POST", "/v1/chat/completions", body)
        if status == 200 and not data.endswith(b"data: [DONE]\n\n"):
            raise ValueError(f"a stream ends with {data[-80:]!r}")
        return self._outcome(status, data)

    def tokens(self, rng: random.Random) -> str:
        """Send a picture that nobody sent before, for its tokens."""
        side = rng.randint(32, 400)
        noise = np.random.default_rng(rng.getrandbits(32)).integers(
            0, 256, (side, side, 3), np.uint8
        )
        data = io.BytesIO()
        Image.fromarray(noise).save(data, "JPEG")
        return self._outcome(*self._ask("POST", "/v1/encode", data.getvalue()))

    def infer(self, rng: random.Random) -> str:
        """Send arrays of one picture or several."""
        count = rng.randint(1, 4)
        one = {"name": "image", "datatype": "UINT8", "shape": [count, 112, 112, 3],
               "parameters": {"binary_data_size": count * 112 * 112 * 3}}  # fmt: skip
        head = json.dumps({"inputs": [one], "parameters": {"binary_data_output": True}}).encode()
        body = head + rng.randbytes(count * 112 * 112 * 3)
        path, length = "/v2/models/served/infer", str(len(head))
        return self._outcome(*self._ask("POST", path, body, Inference_Header_Content_Length=length))

    def leaves(self, rng: random.Random) -> str:
        """Ask, and leave before the answer or amid it."""
        body = self._chat(rng, stream=True)
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as wire:
            wire.sendall(_head("/v1/chat/completions", len(body)) + body)
            if rng.random() < 0.5:
                wire.recv(64)
        return "left"

    def half(self, rng: random.Random) -> str:
        """Send half of a question, and leave."""
        body = self._chat(rng)
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as wire:
            wire.sendall(_head("/v1/chat/completions", len(body)) + body[: len(body) // 2])
            time.sleep(rng.random())
        return "left"

    def oversize(self, rng: random.Random) -> str:
        """Announce more than is taken."""
        size = rng.choice((2**23, 2**34))
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as wire:
            wire.sendall(_head("/v1/encode", size))
            with contextlib.suppress(OSError):
                wire.sendall(bytes(2**16))
            answer = wire.recv(4096)
        if (
            b" 413 " not in answer.partition(b"\r\n")[0]
            and b" 429 " not in answer
            and not (self.draining.is_set() and (not answer or b" 503 " in answer))
        ):
            raise ValueError(f"an oversize upload got {answer[:80]!r}")
        return "refused: 413"

    def nonsense(self, rng: random.Random) -> str:
        """Send what is no request."""
        body = rng.choice((b"{", b"[]", b"\xff", rng.randbytes(3000), b'{"images": ["data:,"]}'))
        path = rng.choice(("/v1/chat/completions", "/v1/encode", "/v2/models/served/infer", "/x"))
        kind = {"Content_Type": "application/json"}
        return self._outcome(*self._ask("POST", path, body, **kind), good=False)

    def slow_reader(self, rng: random.Random) -> str:
        """Read a stream a few bytes at a time."""
        body = self._chat(rng, stream=True)
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as wire:
            wire.sendall(_head("/v1/chat/completions", len(body)) + body)
            data = bytearray()
            while not self.stop.is_set() and not data.endswith(b"0\r\n\r\n"):
                piece = wire.recv(32)
                if not piece:
                    break
                data += piece
                time.sleep(0.005)
        return "left" if self.stop.is_set() else f"read: {bytes(data[9:12]).decode()}"

    def metrics(self, rng: random.Random) -> str:  # noqa: ARG002
        """Read the counters."""
        status, data = self._ask("GET", "/metrics", None)
        if status != 200 or b"vzip_requests_total" not in data:
            raise ValueError(f"metrics: {status}")
        return "answered"


def _head(path: str, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


def slow_senders(load: Load) -> None:
    """Keep an upload open that comes byte by byte, until it is refused."""
    while not load.stop.is_set():
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", load.port), timeout=60) as wire,
        ):
            wire.sendall(_head("/v1/encode", 10000))
            wire.settimeout(0.5)
            while not load.stop.is_set():
                wire.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    answer = wire.recv(4096)
                    status = answer[9:12].decode() or "closed"
                    load.counts[f"slow_sender: refused: {status}"] += 1
                    break


def resident(pid: int) -> int:
    """Return the bytes of memory that a process has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    """Return how many files and sockets a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def held_out(count: int) -> list[tuple[bytes, str]]:
    """Return pictures that training never saw, each with a question."""
    scenes = accuracy.held_out(31337, count)
    found = []
    for picture, questions in zip(scenes.pictures, scenes.questions, strict=True):
        data = io.BytesIO()
        Image.fromarray(np.asarray(picture)).save(data, "PNG")
        found.append((data.getvalue(), questions[0].text))
    return found


def start(bundle: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    """Start ``vzip serve``; return its process and port."""
    code = "import sys; from vzip.runtime.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", str(bundle), "--port", "0", "--name", "served"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving"):
            return process, int(line.rpartition(":")[2])
    raise SystemExit(f"vzip serve ended with {process.wait()}")


def soak(bundle: Path, seconds: float, clients: int) -> dict[str, Any]:
    """Run the load, and return what was seen."""
    pictures = held_out(40)
    options = ("--threads", "1", "--max-body-mb", "4", "--upload-timeout", "5", "--queue", "32",
               "--per-client", "32", "--cache-mb", "4")  # fmt: skip
    process, port = start(bundle, *options)
    load = Load(port, pictures)
    threads = [threading.Thread(target=load.client, args=(seed,)) for seed in range(clients)]
    threads += [threading.Thread(target=slow_senders, args=(load,)) for _ in range(2)]
    memory: list[tuple[float, int, int]] = []
    begun = time.monotonic()
    for each in threads:
        each.start()
    while (now := time.monotonic() - begun) < seconds:
        memory.append((round(now, 1), resident(process.pid), descriptors(process.pid)))
        time.sleep(min(5.0, seconds / 20))
    load.draining.set()
    process.send_signal(signal.SIGTERM)  # amid the load
    term = time.monotonic()
    status = process.wait(60)
    drain = time.monotonic() - term
    load.stop.set()
    for each in threads:
        each.join(100)
    assert process.stderr is not None
    last = process.stderr.read().strip().splitlines()[-3:]
    quarter = max(1, len(memory) // 4)
    second = statistics.median(each[1] for each in memory[quarter : 2 * quarter])
    fourth = statistics.median(each[1] for each in memory[-quarter:])
    taken = sorted(load.seconds)
    return {
        "seconds": seconds,
        "clients": clients,
        "outcomes": dict(sorted(load.counts.items())),
        "answered": len(taken),
        "p50_ms": round(1e3 * taken[len(taken) // 2], 1),
        "p99_ms": round(1e3 * taken[int(len(taken) * 0.99)], 1),
        "faults": load.faults[:20],
        "memory_mib": [[at, round(size / 2**20, 1), files] for at, size, files in memory],
        "memory_second_quarter_mib": round(second / 2**20, 1),
        "memory_last_quarter_mib": round(fourth / 2**20, 1),
        "memory_flat": fourth <= FLAT * second,
        "drain_seconds": round(drain, 2),
        "exit_status": status,
        "last_words": last,
    }


def main() -> int:
    """Run the soak, write it, and say whether it went well."""
    parser = results.parser(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=24)
    arguments = parser.parse_args()
    found = soak(arguments.bundle, arguments.seconds, arguments.clients)
    found = {"what": WHAT, "machine": machine(), **found}
    (arguments.output / "soak.json").write_text(results.text(found), encoding="utf-8")
    print(results.text({key: value for key, value in found.items() if key != "memory_mib"}))
    good = not found["faults"] and found["memory_flat"] and found["exit_status"] == 0
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
