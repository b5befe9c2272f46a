"""Frames of videos: which are taken, from what, upright, and what bad files are told."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from tests import refusals
from tests.refusals import Said
from vzip.runtime.errors import InvalidInputError, MissingDependencyError
from vzip.runtime.pictures import frames as frames_module
from vzip.runtime.pictures import video, video_opencv, video_pyav
from vzip.runtime.pictures.containers import is_whole, joined_avis
from vzip.runtime.pictures.frames import frame_positions
from vzip.runtime.pictures.video import is_video, sample_frames

# Container, codec, B-frames: what cameras, phones, browsers, broadcasters and old programs write.
CLIPS = {
    "b-frames.mp4": ("libx264", 2),
    "plain.mp4": ("mpeg4", 0),
    "camera.mov": ("mjpeg", None),
    "browser.webm": ("libvpx-vp9", None),
    "hidden-frames.webm": ("libvpx", None),
    "b-frames.mkv": ("libx264", 2),
    "plain.avi": ("mpeg4", 0),
    "b-frames.avi": ("libx264", 2),
    "broadcast.ts": ("libx264", 2),
    "dvd.mpg": ("mpeg2video", 2),
    "stream.flv": ("libx264", 2),
    "windows.wmv": ("wmv2", 0),
}
LENGTH = 50


def pictures(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Frames that can be told apart: each a little brighter, with a bar that moves."""
    made = []
    for index in range(count):
        frame = np.full((height, width, 3), 20 + index * 200 // max(count, 1), np.uint8)
        frame[:, index * width // count :][:, :6] = (250, 30, 120)
        frame[: height // 3, : width // 4] = (10, 240, 30)  # tells up from down, left from right
        made.append(frame)
    return made


def write_clip(
    path: Path,
    frames: list[np.ndarray],
    codec: str = "libx264",
    *,
    b_frames: int | None = None,
    options: dict[str, str] | None = None,
    pixels: str = "yuv420p",
    group: int = 12,
) -> Path:
    """Write a clip of ten frames a second."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else pixels
        stream.gop_size = group
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return path


def write_lossless(path: Path, frames: list[np.ndarray], **kwargs) -> Path:
    return write_clip(path, frames, "ffv1", pixels="bgr0", **kwargs)


def all_frames(path: Path) -> list[np.ndarray]:
    """Every frame, decoded from the beginning to the end."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def refused(source: object, got: Said = (), *, count: int = 8, **said: Said) -> None:
    """Expect that a source is refused, by an error whose fields say this."""
    with refusals.refused(InvalidInputError, got=got, **said):
        sample_frames(source, count)  # type: ignore[arg-type]


@pytest.fixture(params=["av", "cv2"])
def library(request, monkeypatch) -> str:
    """What reads files; both are installed where these tests run."""
    reader = {"av": video_pyav, "cv2": video_opencv}[request.param]
    monkeypatch.setattr(video, "_reader", lambda: reader.read)
    return request.param


# --- which frames ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (100, 8, [0, 14, 28, 42, 56, 70, 84, 99]),
        (9, 8, [0, 1, 2, 3, 4, 5, 6, 8]),
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, 8, [0, 1, 2]),
        (1, 8, [0]),
        (100, 2, [0, 99]),
        (100, 1, [0]),
        (10**6, 3, [0, 499999, 999999]),
    ],
)
def test_frames_are_evenly_spaced_from_first_to_last(total, count, expected):
    assert frame_positions(total, count) == expected


def test_positions_are_video_llavas():
    """Which are numpy's linspace, rounded down, wherever it has enough frames to choose from."""
    for total in range(8, 400):
        published = np.linspace(0, total - 1, 8, dtype=int).tolist()
        assert frame_positions(total, 8) == published
        assert len(set(published)) == 8


# --- from files ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_of_a_complete_decode(name, library, tmp_path):
    codec, b_frames = CLIPS[name]
    path = write_clip(tmp_path / name, pictures(LENGTH), codec, b_frames=b_frames)
    everything = all_frames(path)
    assert len(everything) == LENGTH
    assert len(np.unique([frame.mean() for frame in everything])) == LENGTH
    assert is_video(path)
    for count in (1, 3, 8, 17):
        taken = sample_frames(path, count)
        assert len(taken) == count
        for image, position in zip(taken, frame_positions(LENGTH, count), strict=True):
            assert image.mode == "RGB"
            # OpenCV converts the same decoded picture by another path: a rounding apart.
            difference = np.abs(np.asarray(image).astype(int) - everything[position])
            assert difference.max() <= (0 if library == "av" else 2)


def test_pixels_are_exact_where_the_codec_is(library, tmp_path):
    frames = list(np.random.default_rng(3).integers(0, 256, (20, 30, 46, 3), np.uint8))
    path = write_lossless(tmp_path / "noise.mkv", frames)
    for image, position in zip(sample_frames(path), frame_positions(20, 8), strict=True):
        assert np.array_equal(np.asarray(image), frames[position])


@pytest.mark.parametrize("count", [1, 3])
def test_a_short_clip_gives_all_its_frames_once(count, library, tmp_path):
    frames = pictures(count)
    path = write_lossless(tmp_path / "short.mkv", frames)
    taken = sample_frames(str(path))
    assert [np.array_equal(a, b) for a, b in zip(taken, frames, strict=True)] == [True] * count


def test_a_name_is_no_protocol_and_no_pattern(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mp4", "clip-%03d.mp4", "clip 7 #?.mp4", "no-extension"):
        made = write_clip(tmp_path / "made.mp4", pictures(9))
        made.rename(tmp_path / name)
        assert len(sample_frames(name)) == 8
        assert len(sample_frames(Path(name))) == 8


def test_a_video_under_an_images_name_is_a_video(tmp_path):
    path = write_clip(tmp_path / "made.mp4", pictures(9)).rename(tmp_path / "photo.jpg")
    assert is_video(path)
    assert len(sample_frames(path)) == 8


def test_what_no_wanted_frame_needs_is_not_decoded(tmp_path):
    path = write_clip(
        tmp_path / "long.mkv", pictures(240), options={"cluster_time_limit": "1000"}, b_frames=0
    )
    expected = [np.asarray(image) for image in sample_frames(path, 2)]
    with av.open(str(path)) as container:
        middle = [packet for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    spoilt = 0
    for packet in middle[100:140]:
        start = data.find(bytes(packet))
        assert start > 0
        data[start + 4 : start + packet.size] = b"\xff" * (packet.size - 4)
        spoilt += 1
    path.write_bytes(data)
    assert spoilt == 40
    taken = [np.asarray(image) for image in sample_frames(path, 2)]
    assert all(np.array_equal(a, b) for a, b in zip(taken, expected, strict=True))
    refused(path, "decoded", count=3)  # the frame in the middle needs them


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says its peak there")
@pytest.mark.parametrize("reader", ["video_pyav", "video_opencv"])
def test_a_long_video_is_never_in_memory(reader, tmp_path):
    frames = [np.full((480, 640, 3), index, np.uint8) for index in range(2)] * 500
    path = write_clip(tmp_path / "long.mkv", frames, "mpeg4", b_frames=0)
    code = (
        "import re, sys; from pathlib import Path\n"
        f"from vzip.runtime.pictures import {reader} as reader\n"
        "def peak():\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(re.search(r'VmHWM:\\s*([0-9]+) kB', status)[1])\n"
        "def read():\n"
        "    return len(reader.read(Path(sys.argv[1]), 'it', lambda n: [0, n // 2, n - 1]))\n"
        "assert read() == 3; before = peak(); assert read() == 3; print(peak(), peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    peak, growth = (int(number) * 1024 for number in done.stdout.split())
    assert peak < len(frames) * 480 * 640 * 3 // 2, "all frames at once, as YUV 4:2:0"
    assert growth < 20 * 480 * 640 * 3, "a second reading frees what the first took"


# --- stamps ----------------------------------------------------------------------------------


def write_stamped(
    path: Path,
    frames: list[np.ndarray],
    codec: str = "libx264",
    *,
    stamps: list[int] | None = None,
    late: float = 0,
    form: str | None = None,
    options: dict[str, str] | None = None,
    encoder: dict[str, str] | None = None,
    group: int = 12,
) -> Path:
    """Write a clip with these stamps, in hundredths of a second, that begins `late`, in seconds."""
    with av.open(str(path), "w", format=form, options=options or {}) as container:
        quick = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx" else {}
        stream = container.add_stream(codec, rate=10, options=encoder or quick)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size, stream.bit_rate = group, 8_000_000
        # Of a fixed rate unless stamps are given: that's all that MPEG-2 and an AVI know.
        base = Fraction(1, 10) if stamps is None else Fraction(1, 100)
        stream.codec_context.time_base = base
        if codec in ("libx264", "mpeg2video"):
            stream.codec_context.max_b_frames = 2

        def mux(packets: list[av.Packet]) -> None:
            for packet in packets:
                assert packet.pts is not None
                assert packet.dts is not None
                packet.pts += int(late / packet.time_base)
                packet.dts += int(late / packet.time_base)
                container.mux(packet)

        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts = index if stamps is None else stamps[index]
            frame.time_base = base
            mux(stream.encode(frame))
        mux(stream.encode())
    return path


SHOWN = pictures(40, 48, 32)
CODECS = {".mpg": "mpeg2video", ".vob": "mpeg2video", ".avi": "mjpeg", ".mov": "mjpeg",
          ".webm": "libvpx", ".ogv": "libvpx", ".wmv": "wmv2"}  # fmt: skip


def which(images: list[Image.Image]) -> list[int]:
    """Say which of `SHOWN` each frame is."""
    shown = np.array(SHOWN, np.int16)
    return [
        int(np.abs(shown - np.asarray(image, np.int16)).mean(axis=(1, 2, 3)).argmin())
        for image in images
    ]


def gives(path: Path, total: int = len(SHOWN)) -> None:
    """Expect that a file gives the frames of `SHOWN`, in order, whatever is asked for."""
    for count in (1, 3, total):
        assert which(sample_frames(path, count)) == frame_positions(total, count), count


def join(path: Path, *, late: float = 0, backwards: bool = False) -> Path:
    """Write the two halves of `SHOWN` as recordings of their own, one behind the other."""
    codec, form = CODECS.get(path.suffix, "libx264"), "ogg" if path.suffix == ".ogv" else None
    first = write_stamped(path, SHOWN[:20], codec, form=form, late=late if backwards else 0)
    data = first.read_bytes()
    second = write_stamped(path, SHOWN[20:], codec, form=form, late=0 if backwards else late)
    path.write_bytes(data + second.read_bytes())
    return path


@pytest.mark.parametrize("name", ["ts", "mpg", "vob", "mkv", "webm", "avi", "ogv"])
def test_joined_recordings_give_the_frames_of_all(name, library, tmp_path):
    path = join(tmp_path / f"joined.{name}")
    if name == "avi" and library == "cv2" and cv2.__version__ < "5":
        refused(path, "2 recordings", cause=f"OpenCV {cv2.__version__}", cure="vzip[video]")
        return
    gives(path)


def test_an_old_opencv_is_not_asked_for_joined_avis(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_reader", lambda: video_opencv.read)
    path = join(tmp_path / "joined.avi")
    assert joined_avis(path) == 2
    monkeypatch.setattr(cv2, "__version__", "4.10.0")
    refused(path, "2 recordings", cause="OpenCV 4.10.0", cure="vzip[video]")
    assert joined_avis(write_stamped(path, SHOWN, "mjpeg")) == 1
    gives(path)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("late", [1.05, 2.0, 7200.0, 95442.0])
def test_time_may_jump_overlap_and_wrap_at_a_joint(late, backwards, library, tmp_path):
    gives(join(tmp_path / "joined.ts", late=late, backwards=backwards))


@pytest.mark.parametrize("name", ["mp4", "flv", "wmv"])
def test_joined_files_of_which_readers_see_the_first_are_refused(name, library, tmp_path):
    path = join(tmp_path / f"joined.{name}")
    refused(path, f"joined.{name}' is 2 recordings", expected="one", cure="concat")


def test_fragments_are_no_recordings_of_their_own(library, tmp_path):
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    gives(write_stamped(tmp_path / "clip.mp4", SHOWN, options=options))


@pytest.mark.parametrize(
    ("name", "late"),
    [
        *((name, 3600.0) for name in ("ts", "mkv", "mpg", "flv", "webm", "mp4", "mov")),
        *((name, -1.0) for name in ("ts", "mkv", "mpg", "flv", "webm")),
        *((name, 95442.0) for name in ("ts", "mpg")),  # 33 bits end within
        ("webm", -5.0),
        ("avi", 5.0),  # whose time begins at zero: the writer puts empty frames ahead
    ],
)
def test_time_may_begin_late_or_before_zero(name, late, library, tmp_path):
    path = tmp_path / f"late.{name}"
    codec, options = CODECS.get(path.suffix, "libx264"), {"avoid_negative_ts": "disabled"}
    gives(write_stamped(path, SHOWN, codec, late=late, options=options))


@pytest.mark.parametrize("name", ["mkv", "mp4", "ts", "flv", "avi"])
def test_time_may_have_holes(name, library, tmp_path):
    path, gaps = tmp_path / f"holes.{name}", [1, 3, 2, 50, 1, 1, 7, 200] * 5
    codec = "mpeg4" if name == "avi" else "libx264"
    gives(write_stamped(path, SHOWN, codec, stamps=np.cumsum(gaps).tolist()))


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_packets_may_have_no_stamps(kept, library, tmp_path):
    path = join(tmp_path / "joined.ts")
    data = bytearray(path.read_bytes())
    headers = [found.start() for found in re.finditer(rb"\x00\x00\x01\xe0", data)]
    assert len(headers) == 40
    for number, start in enumerate(headers):
        if number % 3 >= kept:
            data[start + 7] &= 0x3F  # neither PTS nor DTS: what stands there is stuffing
    path.write_bytes(data)
    gives(path)


@pytest.mark.parametrize("name", ["mkv", "mp4", "ts"])
def test_groups_may_be_open(name, library, tmp_path):
    options = {"x264-params": "open-gop=1:bframes=3:keyint=10:b-pyramid=normal"}
    gives(write_stamped(tmp_path / f"clip.{name}", SHOWN, encoder=options))


@pytest.mark.parametrize(
    ("name", "codec"), [("clip.webm", "libvpx"), ("clip.mkv", "mpeg4"), ("clip.mp4", "mpeg4")]
)
def test_packets_may_show_nothing(name, codec, library, tmp_path):
    """VP8's hidden frames, and MPEG-4's that say that the last one stays: none is a frame."""
    source = write_stamped(tmp_path / f"all.{name}", SHOWN, codec, group=1)
    with av.open(str(source)) as given, av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size == 0:
                continue
            data, stamp, base = bytearray(packet), packet.pts, packet.time_base
            packet.stream = stream
            container.mux(packet)
            if stamp * base >= Fraction(1, 2):  # none of the frames that are taken is one of them
                continue
            if codec == "libvpx":
                data[0] &= ~0x10  # show_frame
            else:
                # A P-VOP in the same second, its time in four bits, a marker, and not coded.
                data = bytearray(b"\x00\x00\x01\xb6\x50\x9f")
            more = av.Packet(bytes(data))
            more.stream, more.time_base = stream, base
            more.pts = more.dts = stamp + int(Fraction(1, 20) / base)
            container.mux(more)
    with av.open(str(tmp_path / name)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 45
    assert len(all_frames(tmp_path / name)) == 40
    gives(tmp_path / name)


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([(1.0, 0.2)], range(10)),
        ([(0.5, 1.2), (0.5, 0.2)], [*range(10, 15), *range(5)]),
        ([(1.0, 0.2), (1.0, 0.2)], [*range(10), *range(10)]),
        ([(3.0, -1), (1.0, 0.7)], range(5, 15)),
    ],
    ids=["cut", "exchanged", "twice", "late"],
)
def test_edit_lists_say_what_is_shown(edits, expected, library, tmp_path):
    """Time is counted from the decoder's start, 0.2 s ahead of the first frame's."""
    path = write_stamped(tmp_path / "clip.mp4", SHOWN[:30])
    data = path.read_bytes()
    place = data.index(b"mdhd") + 16
    scale = int.from_bytes(data[place : place + 4], "big")
    set_box(path, b"elst", b"".join(
        struct.pack(">IiI", int(1000 * length), int(start * scale) if start >= 0 else -1, 1 << 16)
        for length, start in edits
    ), len(edits))  # fmt: skip
    expected = [*expected]
    for count in (1, 4, len(expected)):
        taken = which(sample_frames(path, count))
        assert taken == [expected[each] for each in frame_positions(len(expected), count)]


def set_box(path: Path, kind: bytes, table: bytes, entries: int) -> None:
    """Replace a table of an MP4 whose header is at its end."""
    data = bytearray(path.read_bytes())
    assert data.index(b"moov") > data.index(b"mdat")
    start = data.index(kind) - 4
    end = start + int.from_bytes(data[start : start + 4], "big")
    box = struct.pack(">I4sII", 16 + len(table), kind, 0, entries) + table
    for parent in (b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl"):
        place = data.index(parent) - 4
        length = int.from_bytes(data[place : place + 4], "big")
        if place < start < place + length:
            data[place : place + 4] = struct.pack(">I", length + len(box) - end + start)
    data[start:end] = box
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["mkv", "webm", "mp4", "ts", "avi"])
def test_every_file_of_a_recorder_that_begins_new_ones_is_whole(name, library, tmp_path):
    """ffmpeg's segment muxer goes on counting time from file to file."""
    forms = {"mkv": "matroska", "ts": "mpegts"}
    codec = {"webm": "libvpx", "avi": "mpeg4"}.get(name, "libx264")
    options = {"segment_time": "1.2", "segment_format": forms.get(name, name)}
    write_stamped(tmp_path / f"part%d.{name}", SHOWN, codec, form="segment", options=options)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 2
    found = [which(sample_frames(part, 100)) for part in parts]
    assert [index for part in found for index in part] == [*range(40)]
    for part, indices in zip(parts, found, strict=True):
        assert which(sample_frames(part, 3)) == [
            indices[each] for each in frame_positions(len(indices), 3)
        ]


@pytest.mark.parametrize("late", [0, 3600])
@pytest.mark.parametrize("name", ["mkv", "webm"])
def test_a_live_recording_has_no_table_of_key_frames(name, late, library, tmp_path):
    path = tmp_path / f"live.{name}"
    codec = CODECS.get(path.suffix, "libx264")
    gives(write_stamped(path, SHOWN, codec, late=late, options={"live": "1"}))


@pytest.mark.parametrize(
    ("name", "late"),
    [("mkv", 0), ("mkv", 5), ("mkv", 3600), ("webm", 3600), ("mp4", 3600), ("avi", 0), ("avi", 5)],
)
def test_what_begins_late_and_is_cut_off_is_refused(name, late, library, tmp_path):
    path = tmp_path / f"late.{name}"
    options = {"mp4": {"movflags": "+faststart"}}.get(name, {"cluster_time_limit": "500"})
    codec = {"avi": "mpeg4"}.get(name, CODECS.get(path.suffix, "libx264"))
    write_stamped(path, SHOWN, codec, late=late, options=options)
    data = path.read_bytes()
    for part in (0.5, 0.7):
        path.write_bytes(data[: int(len(data) * part)])
        refused(path, f"late.{name}", cause="cut off")


def test_what_is_missing_behind_the_last_frame_is_no_loss(library, tmp_path):
    """The table of key frames and the tags stand at the end."""
    path = write_stamped(tmp_path / "clip.mkv", SHOWN, late=3600)
    data = path.read_bytes()
    cut = data[: data.rindex(b"\x1c\x53\xbb\x6b") + 3]  # in the middle of Cues
    path.write_bytes(cut)
    assert is_whole(path) is False
    if library == "av":
        gives(path)
    else:
        refused(path, "states", cause="cut off")  # it can't tell when time began


def test_a_duration_that_lies_is_not_believed(library, tmp_path):
    path = write_stamped(tmp_path / "clip.mkv", SHOWN)
    data = path.read_bytes()
    start = data.index(b"\x44\x89\x88") + 3
    path.write_bytes(data[:start] + struct.pack(">d", 1e9) + data[start + 8 :])
    gives(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("clip.mkv", True), ("clip.mp4", True), ("clip.avi", True), ("clip.ts", None)],
)
def test_boxes_say_whether_a_file_is_whole(name, expected, tmp_path):
    path = write_stamped(tmp_path / name, SHOWN, CODECS.get(Path(name).suffix, "libx264"))
    assert is_whole(path) is expected
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert is_whole(path) is (False if expected else None)
    for behind in (data, b"\xff\xfe\xfd\xfc\xfb\xfa" * 9, b"x"):
        path.write_bytes(data + behind)
        assert is_whole(path) is expected
    path.write_bytes(data + data[:-1])
    assert is_whole(path) is (False if expected else None)


# --- what never ends -------------------------------------------------------------------------


def claiming(path: Path, samples: int) -> Path:
    """Write an MP4 of 20 frames that states so many, of a byte each."""
    write_stamped(path, SHOWN[:20])
    set_box(path, b"stts", struct.pack(">II", samples, 1), 1)
    set_box(path, b"stsc", struct.pack(">III", 1, samples, 1), 1)
    data = path.read_bytes()
    start = data.index(b"stsz") + 8
    path.write_bytes(data[:start] + struct.pack(">II", 1, samples) + data[start + 8 :])
    return path


def test_an_mp4_that_states_more_frames_than_it_can_hold_is_not_opened(tmp_path, monkeypatch):
    """FFmpeg takes 24 bytes for each when it opens it: 2 GB for this file of 3 KB."""

    def refuse() -> None:
        raise AssertionError("a reader was asked")

    monkeypatch.setattr(video, "_reader", refuse)
    path = claiming(tmp_path / "clip.mp4", 30_000_000)
    said = ("30000000 frames", f"{path.stat().st_size} bytes")
    refused(path, said, expected="each byte", cause="damaged")
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    path = write_stamped(tmp_path / "fragments.mp4", SHOWN, options=fragments)
    data = bytearray(path.read_bytes())
    start = data.index(b"trun") + 4
    data[start : start + 8] = struct.pack(">II", 0, 10_000_000)  # sizes as said once for all
    path.write_bytes(data)
    refused(path, "states 100000", expected="each byte")
    path = write_stamped(tmp_path / "edits.mp4", SHOWN)
    edit = struct.pack(">IiI", 4000, 2560, 1 << 16)
    set_box(path, b"elst", edit * 5000, 5000)
    refused(path, "states 5000 edits")


def test_boxes_in_boxes_are_no_recursion(tmp_path):
    head = b"\0\0\0\x10ftypisom\0\0\0\0"
    nested = b"".join(struct.pack(">I4s", 8 * (20_000 - depth), b"moov") for depth in range(20_000))
    (tmp_path / "clip.mp4").write_bytes(head + nested)
    refused(tmp_path / "clip.mp4", "decoded")


def test_a_packed_header_is_read_as_far_as_any_is(tmp_path, monkeypatch):
    boxes = struct.pack(">I4sIII", 20, b"stsz", 0, 1, 10**9)
    for header, got in ((boxes, "1000000000 frames"), (bytes(2**26 + 1), "67108864 bytes")):
        content = struct.pack(">I", len(header)) + zlib.compress(header)
        packed = struct.pack(">I4s", 8 + len(content), b"cmvd") + content
        packed = struct.pack(">I4s", 8 + len(packed), b"cmov") + packed
        packed = struct.pack(">I4s", 8 + len(packed), b"moov") + packed
        (tmp_path / "clip.mov").write_bytes(b"\0\0\0\x08wide" + packed)
        refused(tmp_path / "clip.mov", got)


@pytest.mark.parametrize("name", ["clip.mkv", "joined.ts"])
def test_frames_are_counted_as_they_come(name, library, tmp_path, monkeypatch):
    path = tmp_path / name
    join(path) if name == "joined.ts" else write_stamped(path, SHOWN)
    monkeypatch.setattr(frames_module, "MAX_FRAMES", 40)
    gives(path)
    monkeypatch.setattr(frames_module, "MAX_FRAMES", 39)
    refused(path, "more than 39 frames", expected="at most 39")


def test_frames_that_grow_behind_the_header_are_not_allocated(tmp_path, monkeypatch):
    small = write_stamped(tmp_path / "small.ts", SHOWN[:20]).read_bytes()
    large = write_stamped(tmp_path / "large.ts", pictures(20, 640, 480)).read_bytes()
    (tmp_path / "joined.ts").write_bytes(small + large)
    assert {each.size for each in sample_frames(tmp_path / "joined.ts")} == {(48, 32), (640, 480)}
    monkeypatch.setattr(video_pyav, "MAX_PIXELS", 640 * 480 - 1)
    assert {each.size for each in sample_frames(tmp_path / "joined.ts")} == {(48, 32)}


# --- upright ---------------------------------------------------------------------------------


def set_matrix(path: Path, a: float, b: float, c: float, d: float) -> None:
    """Write the matrix of an MP4's track header; x' = ax + cy, y' = bx + dy."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version 0
    assert np.frombuffer(data[start : start + 36], ">i4").tolist()[::4] == [65536, 65536, 1 << 30]
    numbers = [a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 1 << 30]
    data[start : start + 36] = np.array(numbers, ">i4").tobytes()
    path.write_bytes(data)


def shown(picture: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """A picture as a matrix asks for it, pixel by pixel."""
    height, width = picture.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    x, y = a * columns + c * rows, b * columns + d * rows
    x, y = x - x.min(), y - y.min()
    result = np.empty((y.max() + 1, x.max() + 1, 3), np.uint8)
    result[y, x] = picture
    return result


ROTATIONS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
MIRRORS = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("matrix", ROTATIONS + MIRRORS, ids=str)
def test_frames_are_upright(matrix, tmp_path):
    path = write_clip(tmp_path / "phone.mp4", pictures(9))
    lying = all_frames(path)
    set_matrix(path, *matrix)
    for image, position in zip(sample_frames(path), frame_positions(9, 8), strict=True):
        assert np.array_equal(np.asarray(image), shown(lying[position], *matrix))


@pytest.mark.parametrize("matrix", ROTATIONS, ids=str)
def test_opencv_rotates(matrix, tmp_path):
    path = write_clip(tmp_path / "phone.mp4", pictures(9))
    lying = all_frames(path)[0]
    set_matrix(path, *matrix)
    (image,) = video_opencv.read(path, "the clip", lambda _: [0])
    difference = np.abs(np.asarray(image).astype(int) - shown(lying, *matrix))
    assert difference.max() <= 2


def test_a_rotation_that_is_no_quarter_turn_is_refused(tmp_path):
    path = write_clip(tmp_path / "phone.mp4", pictures(9))
    set_matrix(path, 0.8, 0.6, -0.6, 0.8)
    refused(path, "[[0.79998", expected="quarter turns", cure="ffmpeg -i IN OUT.mp4")


# --- bad files -------------------------------------------------------------------------------


def write_sound(path: Path, codec: str, *, cover: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        sound = container.add_stream(codec, rate=48000, layout="mono")
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic.value
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.sample_rate = 48000
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
        if cover:
            still = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
            container.mux(picture.encode(still))
            container.mux(picture.encode())
    return path


@pytest.mark.parametrize("name", ["sound.mp4", "sound.mkv"])
def test_sound_alone_is_refused(name, library, tmp_path):
    refused(write_sound(tmp_path / name, "aac"), (name, "no moving picture"))


def test_cover_art_is_no_video(tmp_path):
    path = write_sound(tmp_path / "song.mp4", "aac", cover=True)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    refused(path, "no moving picture", cause="sound")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.mp4", {}),
        ("stream.mp4", {"movflags": "+faststart"}),
        ("clip.mkv", {"cluster_time_limit": "500"}),
        ("clip.webm", {"cluster_time_limit": "500"}),
        ("clip.avi", {}),
    ],
)
def test_a_video_that_is_cut_off_is_refused(name, options, tmp_path, capfd):
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    path = write_clip(tmp_path / name, pictures(LENGTH), codec, options=options)
    data = path.read_bytes()
    capfd.readouterr()  # what the encoder says
    for part in (0.3, 0.6, 0.8):
        path.write_bytes(data[: int(len(data) * part)])
        # Where the container's beginning says how long it is, so does the error.
        stated = () if name in ("clip.mp4", "clip.avi") else ("states 5.0 s",)
        refused(path, (name, *stated), cause="cut off")
    assert capfd.readouterr() == ("", ""), "libavformat keeps quiet"


def test_a_last_frame_that_is_cut_off_is_noticed(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", pictures(LENGTH), options={"movflags": "+faststart"})
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    refused(path, "holds 5.0 s, but its header states 5.0 s", count=1)


def test_opencv_refuses_what_is_cut_off(tmp_path):
    path = write_clip(
        tmp_path / "clip.mkv", pictures(LENGTH), options={"cluster_time_limit": "500"}
    )
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    with refusals.refused(InvalidInputError, got="states 50 frames", cause="cut off"):
        video_opencv.read(path, "the clip", lambda _: [0])


def test_a_recording_without_its_beginning_and_its_end_serves(tmp_path):
    path = write_clip(tmp_path / "broadcast.ts", pictures(LENGTH), b_frames=2)
    data = path.read_bytes()
    packets = len(data) // 188
    path.write_bytes(data[packets // 4 * 188 : packets * 3 // 4 * 188])
    taken = sample_frames(path)
    assert len(taken) == 8
    brightness = [np.asarray(image)[-1, -1].mean() for image in taken]
    assert brightness == sorted(brightness)


def test_a_stream_that_stops_in_a_frame_gives_the_frames_before_it(tmp_path):
    path = write_clip(tmp_path / "stream.flv", pictures(LENGTH), b_frames=0)
    everything = all_frames(path)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    cut = packets[20]
    data = path.read_bytes()
    start = data.index(bytes(cut))
    path.write_bytes(data[: start + cut.size // 2])
    taken = sample_frames(path)
    for image, position in zip(taken, frame_positions(20, 8), strict=True):
        assert np.array_equal(np.asarray(image), everything[position])


def test_a_video_with_a_hole_is_refused(library, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", pictures(LENGTH), options={"movflags": "+faststart"})
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    path.write_bytes(data)
    refused(path, "decoded" if library == "av" else ("0 frames", "states 50"))


@pytest.mark.parametrize(
    ("name", "data", "known"),
    [
        ("clip.mp4", b"", False),
        ("clip.mp4", b"hello, world " * 50, False),
        ("clip.mp4", b"\x89PNG\r\n\x1a\n" + b"0" * 900, False),
        ("list.m3u8", b"#EXTM3U\n/etc/passwd\n", False),
        ("clip.mp4", b"\0\0\0\x18ftypisom" + b"x" * 3000, True),
        ("clip.mkv", b"\x1a\x45\xdf\xa3" + b"\xff" * 3000, True),
    ],
)
def test_what_is_no_video_is_refused(name, data, known, library, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    refused(path, (name, "decoded") if known else name, expected="" if known else "MP4, MOV, MKV")


def test_frames_that_are_too_large_are_refused(library, tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", pictures(9))
    monkeypatch.setattr(frames_module, "MAX_PIXELS", 64 * 48 - 1)
    refused(path, "64×48 = 3072", expected="3071")
    monkeypatch.setattr(frames_module, "MAX_PIXELS", 64 * 48)
    assert len(sample_frames(path)) == 8


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are Unix's")
def test_a_pipe_is_refused_and_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert not is_video(tmp_path / "pipe")
    refused(tmp_path / "pipe", "device, pipe or socket")


@pytest.mark.parametrize(
    ("source", "count", "said"),
    [
        ("absent.mp4", 8, {"got": ("'absent.mp4'", os.sep + "absent.mp4")}),
        ("a\0b.mp4", 8, {"got": "null"}),
        ("https://host/clip.mp4", 8, {"got": "URL 'https://host/clip.mp4'"}),
        (Path("https://host/clip.mp4"), 8, {"got": "URL 'https:/host/clip.mp4'"}),
        ([], 8, {"got": "empty list"}),
        (b"bytes", 8, {"got": "bytes", "expected": "path of a video"}),
        (np.zeros((4, 8, 8, 3), np.uint8), 8, {"got": "ndarray", "expected": "list(array)"}),
        (["x"], 0, {"got": "0 frames", "expected": "1 or more"}),
        (["x"], True, {"got": "True frames"}),
        (["x"], 2.0, {"got": "2.0 frames"}),
    ],
)
def test_what_can_not_be_asked_for_is_refused(source, count, said):
    refused(source, count=count, **said)


def test_without_a_decoder_the_extra_is_named(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", pictures(9))
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with refusals.refused(MissingDependencyError, got="'av'", cure="pip install 'vzip[video]'"):
        sample_frames(path)


def test_pyav_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(video_pyav, "read", lambda *_: ["PyAV's"])
    monkeypatch.setattr(video_opencv, "read", lambda *_: ["OpenCV's"])
    path = write_clip(tmp_path / "clip.mp4", pictures(9))
    assert sample_frames(path) == ["PyAV's"]
    monkeypatch.setitem(sys.modules, "av", None)
    assert sample_frames(path) == ["OpenCV's"]


# --- what is a video -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\0\0\0\x20ftypmp42", True),
        (b"\0\0\0\x14ftypqt  ", True),
        (b"\0\0\0\x08wide\0\0\0\0mdat", True),
        (b"\0\0\0\x1cftypavif", False),
        (b"\0\0\0\x18ftypheic", False),
        (b"RIFF\0\0\0\0AVI LIST", True),
        (b"RIFF\0\0\0\0WEBPVP8 ", False),
        (b"RIFF\0\0\0\0WAVEfmt ", False),
        ((b"G" + bytes(187)) * 5, True),
        ((bytes(4) + b"G" + bytes(187)) * 5, True),
        ((b"GIF89a" + bytes(182) + b"G" + bytes(187)) * 5, False),
        ((b"GIF89a" + bytes(182)) + (b"G" + bytes(187)) * 5, False),
        (b"G" + bytes(187) + b"G", False),
        (b"\x89PNG\r\n\x1a\n", False),
        (b"\xff\xd8\xff\xe0", False),
        (b"", False),
    ],
)
def test_a_video_is_known_by_its_first_bytes(head, expected, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(head)
    assert is_video(path) is expected
    assert is_video(str(path)) is expected


def test_other_paths(tmp_path):
    assert is_video(tmp_path), "a folder of frames"
    assert not is_video(tmp_path / "absent.mp4")
    assert not is_video("https://host/clip.mp4")
    assert not is_video("a\0b")


# --- from images -----------------------------------------------------------------------------


def test_a_list_of_frames_is_sampled_and_only_what_is_taken_is_read():
    frames: list = [Image.new("L", (4, 4), index) for index in range(100)]
    frames[49] = "absent.png"
    taken = sample_frames(frames)
    assert [image.getpixel((0, 0)) for image in taken] == [
        (index,) * 3 for index in (0, 14, 28, 42, 56, 70, 84, 99)
    ]
    assert [image.mode for image in taken] == ["RGB"] * 8
    refused(frames, "absent.png", count=3)
    assert len(sample_frames(tuple(frames[:5]))) == 5


def test_frames_of_opencv_are_blue_first(tmp_path):
    frames = pictures(20)
    blue_first = [frame[..., ::-1] for frame in frames]
    for image, position in zip(
        sample_frames(blue_first, channels="bgr"), frame_positions(20, 8), strict=True
    ):
        assert np.array_equal(np.asarray(image), frames[position])
    for source in (write_clip(tmp_path / "clip.mp4", pictures(9)), tmp_path, [tmp_path / "1.png"]):
        with refusals.refused(InvalidInputError, got="channels='bgr'", expected="array"):
            sample_frames(source, channels="bgr")
    with refusals.refused(InvalidInputError, got="'BGR'", expected="'bgr'"):
        sample_frames(frames, channels="BGR")


def test_a_folder_is_its_images_in_the_order_of_their_numbers(tmp_path):
    for index in (1, 2, 9, 10, 11, 100):
        Image.new("L", (4, 4), index).save(tmp_path / f"Frame{index}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / ".hidden.png").write_text("no frame")
    (tmp_path / "sub").mkdir()
    shades = [image.getpixel((0, 0))[0] for image in sample_frames(tmp_path)]
    assert shades == [1, 2, 9, 10, 11, 100]
    (tmp_path / "Frame5.jpg").write_text("spoilt")
    refused(tmp_path, "Frame5.jpg")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no frame")
    refused(tmp_path, "without images", expected="*.jpg, *.jpeg, *.png")
