from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vzip.export import families
from vzip.export.checkpoint.reader import vision_config
from vzip.export.cli import models as models_cli
from vzip.runtime import demo
from vzip.runtime.cli.main import main
from vzip.runtime.models import ALIASES


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["models"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def test_every_alias_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys)
    assert lines[0].split("  ")[0] == "model"
    assert lines[0].endswith("status")
    assert [line.split()[0] for line in lines[2 : 2 + len(ALIASES)]] == list(ALIASES)
    text = [" ".join(line.split()) for line in lines]
    for line in (
        "llava-1.5-7b llava CLIP/14-336 576 an image 54+10, 108+20, 162+30 random",
        "bakllava llava CLIP/14-336 576 an image random",
        "vip-llava-13b vip-llava CLIP/14-336 576 an image random",
        "llava-next-mistral-7b llava-next CLIP/14-336 576 a tile 27+5, 54+10, 108+20 random",
        "video-llava-7b video-llava CLIP/14-224 256 a frame 17, split not given random",
        "llava-onevision-0.5b llava-onevision SigLIP/14-384 729 a tile random",
        "llava-interleave-7b llava SigLIP/14-384 729 an image random",
        "bakllava llava-hf/bakLlava-v1-hf",
        "video-llava-7b LanguageBind/Video-LLaVA-7B-hf",
        "--media video (256 a frame) or image (256 an image)",
        "--media image (729 a tile) or video (196 a frame)",
    ):
        assert line in text


def test_it_fits_a_terminal_and_its_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys)
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() for line in lines)
    rule = lines[1]
    starts = [i for i in range(len(rule)) if rule[i] == "-" and (i == 0 or rule[i - 1] == " ")]
    assert len(starts) == 6
    for line in (lines[0], *lines[2 : 2 + len(ALIASES)]):
        padded = line.ljust(len(rule))
        assert all(padded[start - 2 : start] == "  " for start in starts[1:])


def test_every_word_of_the_status_column_is_in_the_legend(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = printed(capsys)
    legend = " ".join(lines[lines.index("", lines.index("") + 1) :])
    statuses = {row.status for row in models_cli.rows()}
    assert statuses == {"random", "weights"}
    for word in ("status random: ", "weights: ", "published weights not tried here"):
        assert word in legend


@pytest.mark.parametrize("row", models_cli.rows(), ids=lambda row: row.alias)
def test_what_is_printed_is_what_an_export_takes(row: models_cli.ModelRow) -> None:
    """The table is made without transformers; its numbers are those of the architecture."""
    default = vision_config(row.alias)
    assert next(iter(row.media)) == default.media
    for media, tokens in row.media.items():
        config = vision_config(row.alias, media=media)  # type: ignore[arg-type]
        rows, columns = config.grid
        assert tokens.split()[0] == str(rows * columns)
        assert (tokens.split()[-1] == "tile") == (config.tiling is not None)
        assert (tokens.split()[-1] == "frame") == (config.media == "video")
        assert row.family == config.family
        kind = {"clip": "CLIP", "siglip": "SigLIP"}[config.tower.kind]
        assert row.tower == f"{kind}/{config.tower.patch_size}-{config.tower.image_size}"


def test_the_demo_is_read_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((demo.checkpoint() / "config.json").read_text())
    config["vision_config"] |= {"image_size": 64, "patch_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(demo, "checkpoint", lambda: tmp_path)
    row = next(row for row in models_cli.rows() if row.alias == "demo")
    assert (row.tower, row.media) == ("CLIP/16-64", {"image": "16 an image"})


def test_neither_torch_nor_transformers_is_loaded() -> None:
    code = (
        "import sys; from vzip.runtime.cli.main import main; status = main(['models']); "
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)), status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_every_published_repository_is_printed() -> None:
    places = {row.place for row in models_cli.rows()}
    assert {hub_id for each in families.families().values() for hub_id in each.published} < places


def test_a_repository_without_an_alias_is_printed_by_its_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub_id = ALIASES["vip-llava-13b"]
    fewer = {alias: place for alias, place in ALIASES.items() if place != hub_id}
    monkeypatch.setattr(models_cli, "ALIASES", fewer)
    rows = models_cli.rows()
    assert [row.alias for row in rows] == [*fewer, hub_id]
    assert (rows[-1].place, rows[-1].family) == (hub_id, "vip-llava")
    assert hub_id in models_cli.table()
