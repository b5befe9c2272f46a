"""What makes a hostile input of a sound one; all is drawn from the generator that is given."""

from __future__ import annotations

import copy
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Raw:
    """Text that stands in JSON as it is: what `json.dumps` would not write."""

    text: str


SURROGATE = "\ud800"
JSON_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**7, 10**18, 0.5, -0.0, 1e308,
    5e-324, Raw("1" + "0" * 400), Raw("9" * 5000), Raw("1e400"), Raw("-1e400"), Raw("NaN"),
    Raw("Infinity"), Raw("[" * 2000 + "]" * 2000), Raw("[" * 100_000 + "]" * 100_000),
    Raw('{"a":' * 3000 + "1" + "}" * 3000), "", " ", "1", "nan", SURROGATE, f"a{SURROGATE}b", "\0",
    "a\0b", "\x1b[2J\x07", "\n", "../../../etc/passwd", "/dev/zero", "\u202e\u2028", "x" * 100_000,
    "{", "{{", "%s", "{0}", [], {}, [None], [[]], [{}], {"": None}, {SURROGATE: 1}, [1] * 1000,
    ["a"], [-1], [0, 0], [2**63], [0.5], {"0": 0},
)  # fmt: skip
TEXTS: tuple[str, ...] = (
    "", " ", "\0", "a\0b", SURROGATE, f"a{SURROGATE}", "\x1b[31mred\x1b[0m", "\r\n", "\u2028",
    "a" * 300, "a" * 5000, "/".join("a" * 3000), "..", ".", "/", "~", "~nobody/x", "-", "--", "{}",
    "{path}", "%", "%s%n", "\u202egnp.exe", "\ufeff", "é\u0301", "1" * 5000, "nan", "inf", "-inf",
    "1e400", "-1", "0", "00", "9" * 20, "1" + "0" * 400, "2147483648", "1e308", "1e-400", "1_000",
    "٣", "0x10", "1.0", "true", "None", "[]", "C:\\x", "file:///x",
    "http://", "http://[", "http://h:x", "//", "/dev/null", "/dev/zero", "/proc/self/mem", "/etc",
)  # fmt: skip


def hostile(rng: random.Random) -> Any:
    """Return one of `JSON_VALUES` that may be changed."""
    return copy.deepcopy(rng.choice(JSON_VALUES))


def json_value(rng: random.Random, value: Any) -> bytes:
    """Return JSON with one to three of its values replaced, removed, doubled or moved."""
    made = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        made = _change(rng, made)
    return dump(made)


def json_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return a JSON file whose values, or now and then bytes, are not what they should be."""
    if rng.random() < 0.2:
        return damaged(rng, data)
    return json_value(rng, json.loads(data))


_RAWS = 10  # that a text holds: one may have 200,000 characters, and be there a thousand times


def dump(value: Any) -> bytes:
    """Return JSON in which `Raw` stands as it is."""
    raws: list[str] = []

    def plain(each: Any) -> Any:
        if isinstance(each, Raw):
            raws.append(each.text if len(raws) < _RAWS else "0")
            return f"@raw{len(raws) - 1}@"
        if isinstance(each, dict):
            return {key: plain(inner) for key, inner in each.items()}
        if isinstance(each, (list, tuple)):
            return [plain(inner) for inner in each]
        return each

    text = json.dumps(plain(value))
    return re.sub('"@raw([0-9]+)@"', lambda found: raws[int(found[1])], text).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container and key in a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        each = waiting.pop()
        keys: list[Any] = []
        if isinstance(each, dict):
            keys = list(each)
        elif isinstance(each, list):
            keys = list(range(min(len(each), 20)))
        found += [(each, key) for key in keys]
        waiting += [each[key] for key in keys]
    return found


def _change(rng: random.Random, value: Any) -> Any:
    places = _places(value)
    if not places or rng.random() < 0.03:
        return hostile(rng)
    # A deep list of numbers has most places: every depth is as likely.
    holder, key = rng.choice(places if rng.random() < 0.5 else places[: max(1, len(places) // 4)])
    kind = rng.random()
    if kind < 0.65:
        holder[key] = hostile(rng)
    elif kind < 0.75:
        del holder[key]
    elif kind < 0.85:
        other, place = rng.choice(places)
        holder[key] = copy.deepcopy(other[place]) if _there(other, place) else None
    elif isinstance(holder, dict):
        holder[rng.choice((*TEXTS[:8], "more", f"{key}.", str(key).upper()))] = holder[key]
    else:
        holder.extend([holder[key]] * rng.choice((1, 2, 1000)))
    return value


def _there(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with a few bits, bytes or pieces changed."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = len(made)
        if not size:
            return bytes(made) or rng.randbytes(rng.choice((0, 1, 100)))
        at = rng.randrange(size if rng.random() < 0.5 else min(size, 200))
        kind = rng.randrange(9)
        if kind == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del made[at:]
        elif kind == 3:
            del made[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            made[at:at] = made[at : at + rng.randrange(1, 256)]
        elif kind == 5:
            made[at:at] = rng.randbytes(rng.randrange(1, 32))
        elif kind == 6:
            extreme = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1))
            made[at : at + 4] = struct.pack(rng.choice("<>") + "I", extreme)
        elif kind == 7:
            made[at : at + 8] = struct.pack("<Q", rng.choice((0, 2**31, 2**62, 2**63, 2**64 - 1)))
        else:
            made[at : at + 32] = bytes(len(made[at : at + 32]))
    return bytes(made)


def safetensors(rng: random.Random, data: bytes) -> bytes:
    """Return a safetensors file whose header, length or body is not what it should be."""
    kind = rng.random()
    if kind < 0.2:
        return damaged(rng, data)
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    made = json_bytes(rng, header)
    if kind < 0.8:
        made += b" " * (-len(made) % 8)
        return len(made).to_bytes(8, "little") + made + body
    if kind < 0.9:
        stated = rng.choice((0, 1, length - 1, length + 1, len(data), 2**27, 2**62, 2**64 - 1))
        return stated.to_bytes(8, "little") + header + body
    return data[: 8 + length] + body[: rng.randrange(len(body) + 1)]


def npy(rng: random.Random, data: bytes) -> bytes:
    """Return a .npy file of version 1 with another header."""
    if rng.random() < 0.3:
        return damaged(rng, data)
    length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + length].decode("latin-1")
    made = header
    for old, new in rng.sample(_NPY_CHANGES, 2):
        made = made.replace(old, new)
    encoded = made.encode("latin-1")[: 2**16 - 1]
    return data[:8] + struct.pack("<H", len(encoded)) + encoded + data[10 + length :]


_NPY_CHANGES = [
    ("<f4", "|O"), ("<f4", "<f8"), ("<f4", "<c16"), ("<f4", "|V8"), ("<f4", "<U9"), ("<i8", "|O"),
    ("(", "(-"), ("(", "(9" + "9" * 20 + ", "), ("(", "(" + "9" * 1000 + ", "), ("(", "(" * 300),
    (")", ")" * 3), ("False", "True"), ("False", "1/0"), ("shape", "shapes"), ("{", "{'x': 1, "),
    ("}", ""), (",", ",,"), ("'", '"'), ("|u1", "|S0"), ("(", "(0, "), ("(", "(1e9, "),
    ("descr", ""),
]  # fmt: skip


def npz(rng: random.Random, data: bytes) -> bytes:
    """Return an archive of arrays of which some are damaged, missing or come twice."""
    if rng.random() < 0.3:
        return damaged(rng, data)
    made = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(made, "w", method) as target:
        names = source.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = source.read(name)
            if name != chosen:
                target.writestr(name, content)
                continue
            kind = rng.randrange(5)
            if kind == 0:
                continue
            if kind == 1:
                target.writestr(f"../{name}", content)
            if kind == 2:
                target.writestr(name, b"\0" * 2**21)
            else:
                target.writestr(name, npy(rng, content))
    whole = made.getvalue()
    return damaged(rng, whole) if rng.random() < 0.2 else whole


def png(rng: random.Random, data: bytes) -> bytes:
    """Return a PNG with a changed, moved or new chunk whose checksum is right."""
    if rng.random() < 0.4:
        return damaged(rng, data)
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    place = rng.randrange(len(chunks))
    kind, content = chunks[place]
    new = rng.choice((b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", kind))
    made = damaged(rng, content) if rng.random() < 0.7 else rng.randbytes(rng.randrange(40))
    if rng.random() < 0.6:
        chunks[place] = (kind, made)
    else:
        chunks.insert(place, (new, made))
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + kind + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )  # fmt: skip


Mutator = Callable[[random.Random, bytes], bytes]


def of_name(name: str) -> Mutator:
    """Return the mutator for a file of some name."""
    endings: dict[str, Mutator] = {
        ".json": json_bytes, ".safetensors": safetensors, ".npy": npy, ".npz": npz, ".png": png,
    }  # fmt: skip
    return next((each for end, each in endings.items() if name.endswith(end)), damaged)
