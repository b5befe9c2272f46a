"""Ray Serve for real: two replicas, one killed under load, no request without an answer."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load

from tests.llms import needed
from tests.places import GOLDEN, ROOT
from tests.refusals import refused
from tests.runtime.service.serving import SCENES, data_url
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.service.adapters import ray as adapter

PORT = 18765
URL = f"http://127.0.0.1:{PORT}"


def test_the_config_file_names_what_there_is() -> None:
    config = yaml.safe_load((ROOT / "containers" / "ray" / "vzip.yaml").read_text())
    (application,) = config["applications"]
    module, _, function = application["import_path"].partition(":")
    assert module == adapter.__name__
    assert callable(getattr(adapter, function))
    assert adapter.ray_settings(application["args"]).max_replicas == 8


@pytest.mark.parametrize(
    ("given", "word"),
    [({}, "bundle"), ({"bundle": "b", "replicas": 2}, "replicas"),
     ({"bundle": "b", "min_replicas": 3}, "max_replicas"), ({"bundle": "b", "gpus": -1}, "gpus")],
)  # fmt: skip
def test_arguments_that_make_no_sense(given: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidInputError) as raised:
        adapter.ray_settings(given)
    assert word in str(raised.value)


@pytest.fixture(scope="module")
def encoder() -> Iterator[Any]:
    """Two replicas of half a core, and their handle."""
    needed("ray")
    import ray
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    bundle = str(GOLDEN / "tiny_bundle")
    made = adapter.app({"bundle": bundle, "min_replicas": "2", "max_replicas": "2", "cpus": "0.5"})
    serve.run(made, name="vzip", route_prefix="/")
    yield serve.get_deployment_handle("Encoder", "vzip")
    serve.shutdown()
    ray.shutdown()


def ask(body: bytes, kind: str = "application/octet-stream") -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(f"{URL}/v1/encode", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Return whether tokens are the same: sets equal, numbers as far as batches let them be."""
    assert one.keys() == other.keys()
    return all(np.allclose(one[name], other[name], rtol=0, atol=1e-5) for name in one)


@pytest.mark.full
def test_a_replica_is_killed_under_load_and_nothing_is_lost(encoder: Any) -> None:
    files = [each.read_bytes() for each in SCENES]
    wanted = [load(ask(each)[2]) for each in files]
    status, _, answer = ask(b"no picture")
    assert (status, json.loads(answer)["error"]["type"]) == (400, "invalid_request_error")
    several = json.dumps({"images": [data_url(each) for each in files]}).encode()
    assert ask(several, "application/json")[0] == 200

    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            at = number % len(files)
            for _ in range(60):
                status, headers, data = ask(files[at])
                outcomes[str(status)] += 1
                if status == 200:
                    outcomes["wrong"] += not equal(load(data), wanted[at])
                    break
                time.sleep(min(0.2, float(headers["Retry-After"])))
            else:
                outcomes["never answered"] += 1
            number += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for each in threads:
        each.start()
    processes = {encoder.process.remote().result() for _ in range(40)}
    assert len(processes) == 2
    killed = processes.pop()
    before = outcomes["200"]
    os.kill(killed, signal.SIGKILL)
    end = time.monotonic() + 90
    while True:  # until there are two again, and both answer
        try:
            there = {encoder.process.remote().result(timeout_s=10) for _ in range(20)}
        except Exception:  # noqa: BLE001 - the handle meets the dead replica too
            there = set()
        if len(there) == 2 and killed not in there:
            break
        assert time.monotonic() < end
        time.sleep(0.2)
    stop.set()
    for each in threads:
        each.join(90)
        assert not each.is_alive()
    assert outcomes["200"] > before
    assert not outcomes["never answered"]
    assert not outcomes["wrong"]
    assert {name for name, count in outcomes.items() if count} <= {"200", "503"}, outcomes


def test_an_unknown_argument_is_one_error() -> None:
    needed("ray")
    with refused(InvalidInputError, got="replicas"):
        adapter.app({"bundle": "b", "replicas": "2"})
