"""Containers, Compose, Kubernetes, KServe and systemd start a server that there is, and can end it.

None of them was run: what they say is held to the command line and to each other.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.places import ROOT
from vzip.runtime.cli import serve

CONTAINERS = ROOT / "containers"
DOCKERFILES = sorted(CONTAINERS.glob("Dockerfile.*"))
KEY = {"VZIP_API_KEY": "a-key-of-some-length"}


def starts(arguments: list[str], monkeypatch: pytest.MonkeyPatch, key: bool = True) -> Any:
    """Return the options of a command that begins with ``serve``; they must be good ones."""
    assert arguments[0] == "serve"
    for name, value in KEY.items() if key else ():
        monkeypatch.setenv(name, value)
    options = serve._parser("vzip serve").read(arguments[1:])
    serve._check_address(options, serve._key(options))
    serve._settings(options)
    return options


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda each: each.suffix)
def test_an_image_serves_as_a_user_without_rights(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = path.read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    said = {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in lines if line[:1].isupper()}
    assert said["USER"] == "10001"
    assert said["ENTRYPOINT"] == '["vzip"]'
    options = starts(json.loads(said["CMD"]), monkeypatch)
    assert options.host == "0.0.0.0"
    probe = said["HEALTHCHECK"]
    assert f":{options.port}/health" in probe
    assert said["EXPOSE"] == str(options.port)
    assert "serve" in text.partition("pip install")[2] or "[export,serve]" in text
    # The user comes last: nothing is installed by it.
    order = [line.split(" ")[0] for line in lines if line.startswith(("RUN", "USER", "CMD"))]
    assert order[-2:] == ["USER", "CMD"]


def test_what_images_are_built_of_is_not_ignored() -> None:
    kept = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    ]
    copied = set()
    for path in DOCKERFILES:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("COPY "):
                copied |= set(line.split()[1:-1])
    assert copied == set(kept)
    for each in kept:
        assert (ROOT / each).exists()


def test_compose(monkeypatch: pytest.MonkeyPatch) -> None:
    (service,) = yaml.safe_load((CONTAINERS / "compose.yaml").read_text())["services"].values()
    options = starts(service["command"], monkeypatch)
    assert service["ports"] == [f"127.0.0.1:{options.port}:{options.port}"]
    assert (CONTAINERS / Path(service["build"]["dockerfile"]).name).exists()
    assert float(service["stop_grace_period"].rstrip("s")) > options.drain
    assert "VZIP_API_KEY" in service["environment"]


def test_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = yaml.safe_load_all((CONTAINERS / "kubernetes" / "vzip.yaml").read_text())
    deployment, front = documents
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = starts(container["args"], monkeypatch)
    assert container["ports"][0]["containerPort"] == options.port
    for name, path in (("startup", "/ready"), ("readiness", "/ready"), ("liveness", "/health")):
        assert container[f"{name}Probe"]["httpGet"]["path"] == path
    wait = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > wait + options.drain
    assert pod["securityContext"]["runAsNonRoot"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert front["spec"]["selector"] == labels == deployment["spec"]["selector"]["matchLabels"]


def test_kserve(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CONTAINERS / "kubernetes" / "kserve.yaml").read_text()
    (container,) = yaml.safe_load(text)["spec"]["predictor"]["containers"]
    options = starts(container["args"], monkeypatch, key=False)
    assert options.insecure
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == options.port


def test_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=")
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(CONTAINERS / "systemd" / "vzip.service")
    program, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("/vzip")
    options = starts(arguments, monkeypatch, key=False)
    assert options.host == "127.0.0.1"
    assert float(unit["Service"]["TimeoutStopSec"]) > options.drain
    assert options.cache.startswith(f"/var/cache/{unit['Service']['CacheDirectory']}/")
