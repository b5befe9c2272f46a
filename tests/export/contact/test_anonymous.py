"""No folder of this machine and no name of its user leaves it, whatever stands around them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vzip.export.contact.anonymous import GENERIC, Anonymous

WHO = Anonymous(users=["kowalski", "al"], hosts=["werk17"], folders=[Path("/data/my models")])


@pytest.mark.parametrize(
    "text",
    [
        "/home/kowalski/x.onnx",
        "PATH=/usr/bin:/home/kowalski/bin:/opt/kowalski",
        "file:///home/kowalski/a",
        "~kowalski/a and ~/kowalski",
        "kowalski@werk17:~$ ls",
        "scp kowalski_models werk17.local:/x",
        "USER=kowalski",
        "user 'Kowalski', (KOWALSKI)",
        "C++ at /data/my models/kowalski/a b.onnx:12",
        "\x1b[31m/home/kowalski\x1b[0m",
        'Traceback: File "/home/kowalski/vzip/a.py", line 3',
        "[/home/kowalski/a]",
        "a=/home/kowalski/a,b=/home/kowalski/b;c=/Users/Kowalski/c",
    ],
)
def test_neither_a_path_nor_a_name_is_left(text: str) -> None:
    found = WHO.text(text)
    for part in ("kowalski", "werk17", "/home/k", "/opt/", "/data/"):
        assert part not in found.lower(), found


def test_what_names_nobody_stays() -> None:
    text = "also alpha: al-gebra 12/34 ms, 5 MiB/s, libnvinfer.so.10, [ONNX Layer: a/b/c]"
    assert WHO.text(text) == text.replace("al-gebra", "USER-gebra")
    assert Anonymous(users=GENERIC, hosts=["ubuntu"], folders=[]).text("NVIDIA Orin, root") == (
        "NVIDIA Orin, root"
    )
    assert Anonymous(users=["", "x"], hosts=[""], folders=[Path("/")]).text("x y") == "x y"


def test_records_are_cleaned_in_keys_and_values_and_numbers_stay() -> None:
    record = {
        "/home/kowalski/a": [1, 2.5, None, True, ("kowalski", {"x": "/home/kowalski/b"})],
    }
    assert WHO.record(record) == {"a": [1, 2.5, None, True, ["USER", {"x": "b"}]]}


def test_this_process_s_user_and_machine_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "nowak")
    monkeypatch.setenv("SUDO_USER", "wisniewski")
    monkeypatch.setattr("platform.node", lambda: "line4.example.org")
    found = Anonymous().text("nowak, wisniewski, line4.example.org, line4")
    assert found == "USER, USER, HOST, HOST"
