"""The manifest of a bundle: frozen records, checked when they are made.

`docs/bundle.md` specifies the form; this module is its one home in code. Whoever holds a `Manifest`
holds one whose types, ranges and cross-relations (K = dominant + contextual = the width of
``image_embeds``, tokens = grid + CLS, …) are right, wherever it came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from vzip.runtime.bundle import checks
from vzip.runtime.bundle.engine_record import EngineRecord as EngineRecord  # noqa: PLC0414 - re-export
from vzip.runtime.bundle.engine_record import check_name
from vzip.runtime.bundle.precision_record import (
    QUANTISED,
    QUANTISED_FILES,
    PrecisionRecord,
    Quantised,
    data_file,
    files_of,
)
from vzip.runtime.errors import BundleError, InvalidInputError
from vzip.runtime.pictures.preprocess import Preprocessing

FORMAT: Final = "vzip-bundle"
SCHEMA_VERSION: Final = 1
MANIFEST_FILE: Final = "manifest.json"
MODEL_FILE: Final = "model.onnx"
DATA_FILE: Final = "model.onnx.data"
REFERENCE_FILE: Final = "reference.npz"
NEWLINE_FILE: Final = "image_newline.npy"
LLM_FILE: Final = "llm.onnx"
LLM_DATA_FILE: Final = "llm.onnx.data"
LLM_EMBEDDINGS_FILE: Final = "llm_embeddings.npy"
LLM_TOKENIZER_FILE: Final = "llm_tokenizer.json"
LLM_SETTINGS_FILE: Final = "llm.json"
LLM_FILES: Final = (
    LLM_FILE,
    LLM_DATA_FILE,
    LLM_EMBEDDINGS_FILE,
    LLM_TOKENIZER_FILE,
    LLM_SETTINGS_FILE,
)
"""The language model, in bundles that were exported with it."""

FILES: Final = (MODEL_FILE, DATA_FILE, REFERENCE_FILE, NEWLINE_FILE, *LLM_FILES)
"""What an export writes; `QUANTISED_FILES` are added later, by `vzip calibrate`."""

TOKEN_ORDER: Final = "dominant ascending, contextual in target order"  # noqa: S105 - no password
"""The one order of `image_embeds` in schema 1: kept tower tokens by ascending index (CLS, where it
is kept, is index 0 and so comes first), then one token per contextual target, by ascending target.
"""

EMBEDS: Final = "image_embeds"
KEPT: Final = "kept_indices"
TOKEN_WEIGHTS: Final = "token_weights"  # noqa: S105 - no password
"""A value inside the graph, float32 [B, K, S]: weight of tower token s in output token k."""

Dimension = int | Literal["batch"]
Media = Literal["image", "video"]
Scalar = checks.Scalar

_OBJECT_DEPTH_ERROR = "nested more deeply than any manifest"


@dataclass(frozen=True)
class Model:
    """Where the weights came from.

    Attributes:
        id: ``demo``, a hub id, or the absolute path of a local folder.
        revision: Commit hash on the hub; None for a local folder or random weights.
        family: Name of the checkpoint family that read it, such as ``llava``.
        weights: ``checkpoint``, or ``random`` for an architecture without its weights.
        seed: Seed of random weights; None for those of a checkpoint.
        projector: SHA-256 of the file with a tuned projector; None for the model's own.
    """

    id: str
    revision: str | None
    family: str
    weights: Literal["checkpoint", "random"]
    seed: int | None
    projector: str | None = None

    def __post_init__(self) -> None:
        checks.text("model.id", self.id)
        if self.revision is not None:
            checks.text("model.revision", self.revision)
        checks.text("model.family", self.family)
        checks.choice("model.weights", self.weights, ("checkpoint", "random"))
        if self.weights == "random":
            checks.integer("model.seed", self.seed, low=0)
        elif self.seed is not None:
            raise checks.refuse("model.seed", self.seed, "null, since the weights aren't random")
        if self.projector is not None:
            checks.digest("model.projector", self.projector)


@dataclass(frozen=True)
class Selection:
    """How tower tokens become `tokens` output tokens.

    Attributes:
        method: ``visionzip``, or the name of another selection in
        `vzip.export.algorithm.selections`. dominant: Number of tower tokens kept as they are, CLS
        included where it is kept. contextual: Number of tokens merged from the rest. merge:
        ``average`` (the paper) or ``sum`` (the published code). cls_token: Whether CLS is kept, as
        one of `dominant`.
    """

    method: str
    dominant: int
    contextual: int
    merge: Literal["average", "sum"]
    cls_token: bool

    def __post_init__(self) -> None:
        checks.text("selection.method", self.method)
        checks.integer("selection.dominant", self.dominant, low=1)
        checks.integer("selection.contextual", self.contextual, low=1)
        checks.choice("selection.merge", self.merge, ("average", "sum"))
        checks.boolean("selection.cls_token", self.cls_token)

    @property
    def tokens(self) -> int:
        """K, the number of tokens that leave the graph."""
        return self.dominant + self.contextual


@dataclass(frozen=True)
class Tower:
    """The vision tower before compression.

    Attributes:
        tokens: S, the tokens that are selected from, CLS included.
        grid: Rows and columns of the tokens that are selected from: patches, or with `pool` 2
            pooled ones.
        cls_token: Whether token 0 is a CLS token.
        image_size: Side of the square input image, in pixels.
        patch_size: Side of a patch, in pixels.
        pool: 2 where the language model gets tokens that are pooled 2×2 (LLaVA-OneVision's video
            frames), else 1.
    """

    tokens: int
    grid: tuple[int, int]
    cls_token: bool
    image_size: int
    patch_size: int
    pool: int = 1

    def __post_init__(self) -> None:
        checks.integer("tower.image_size", self.image_size, low=1, high=2**16)
        checks.integer("tower.patch_size", self.patch_size, low=1, high=self.image_size)
        checks.boolean("tower.cls_token", self.cls_token)
        checks.integer("tower.pool", self.pool, low=1, high=1 if self.cls_token else 2)
        # 384 / 14 leaves a margin that no patch sees; pooling rounds up.
        side = -(-(self.image_size // self.patch_size) // self.pool)
        if not isinstance(self.grid, tuple) or self.grid != (side, side):
            raise checks.refuse(
                "tower.grid", self.grid, f"{[side, side]} = image_size/patch_size/pool"
            )
        tokens = side * side + self.cls_token
        checks.integer("tower.tokens", self.tokens, low=tokens, high=tokens)


@dataclass(frozen=True)
class Tiling:
    """How a large image is cut into tiles, each of which the graph takes as an image.

    Attributes:
        pinpoints: The resolutions that tiles may make up, as (height, width) in pixels, in the
            checkpoint's order (the first of equally good ones is taken).
        order: ``reference``: the published code's order, without newlines, padding included.
            ``newline``: rows of patches end with the LLM's newline embedding, as it was trained,
            and patches of the padding are left out. See `vzip.runtime.pictures.tiles`.
    """

    pinpoints: tuple[tuple[int, int], ...]
    order: Literal["reference", "newline"] = "reference"

    def __post_init__(self) -> None:
        checks.choice("tiling.order", self.order, ("reference", "newline"))
        if not isinstance(self.pinpoints, tuple) or not self.pinpoints:
            raise checks.refuse("tiling.pinpoints", self.pinpoints, "a list of [height, width]")
        for pair in self.pinpoints:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise checks.refuse("tiling.pinpoints", pair, "[height, width]")
            for side in pair:
                checks.integer("tiling.pinpoints", side, low=1, high=2**16)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"pinpoints": [list(pair) for pair in self.pinpoints], "order": self.order}


@dataclass(frozen=True)
class Tensor:
    """Name, dtype and shape of an input or output of the graph.

    Attributes:
        name: Name of the value in the graph.
        dtype: numpy's name of the element type.
        shape: Extent of each axis; ``batch`` stands for 1 … `Batch.max`.
    """

    name: str
    dtype: Literal["uint8", "float32", "float16", "int64"]
    shape: tuple[Dimension, ...]

    def __post_init__(self) -> None:
        checks.text("inputs/outputs.name", self.name)
        checks.choice(f"{self.name}.dtype", self.dtype, ("uint8", "float32", "float16", "int64"))
        if not isinstance(self.shape, tuple) or not self.shape:
            raise checks.refuse(f"{self.name}.shape", self.shape, "a list of extents")
        for axis, extent in enumerate(self.shape):
            if not (axis == 0 and type(extent) is str and extent == "batch"):
                checks.integer(f"{self.name}.shape[{axis}]", extent, low=1)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Batch:
    """How many images one call of the graph takes.

    Attributes:
        max: The largest number of images.
        dynamic: Whether fewer are taken too; otherwise exactly `max`.
    """

    max: int
    dynamic: bool

    def __post_init__(self) -> None:
        checks.integer("batch.max", self.max, low=1, high=2**16)
        checks.boolean("batch.dynamic", self.dynamic)


@dataclass(frozen=True)
class Llm:
    """What the language model that takes the tokens looks like.

    Attributes:
        hidden_size: L, width of its embeddings.
        image_token_id: Id of the placeholder that image tokens replace in the prompt.
        video_token_id: Id of the placeholder of a video; None where the model has none of its own.
    """

    hidden_size: int
    image_token_id: int
    video_token_id: int | None = None

    def __post_init__(self) -> None:
        checks.integer("llm.hidden_size", self.hidden_size, low=1)
        # Original LLaVA's placeholder is -200: no entry of any vocabulary.
        checks.integer("llm.image_token_id", self.image_token_id, low=-(2**31))
        if self.video_token_id is not None:
            checks.integer("llm.video_token_id", self.video_token_id, low=0)


@dataclass(frozen=True)
class FileEntry:
    """Digest and size of one file of the bundle.

    Attributes:
        sha256: Digest, 64 lower-case hexadecimal digits.
        bytes: Size of the file.
    """

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        checks.digest("files.sha256", self.sha256)
        checks.integer("files.bytes", self.bytes, low=1)


@dataclass(frozen=True)
class Manifest:
    """Everything that a reader must know to run a bundle's graph; see `docs/bundle.md`.

    Attributes:
        model: Where the weights came from.
        selection: Budgets and options of VisionZip.
        tower: The vision tower before compression.
        token_order: `TOKEN_ORDER`.
        inputs: The one input: ``image`` uint8 [B, H, W, 3] RGB, or ``pixel_values`` float32
            [B, 3, H, W] normalised.
        outputs: ``image_embeds`` [B, K, L] and ``kept_indices`` int64 [B, dominant], in this order.
        batch: How many images one call takes.
        preprocessing: From a picture to the tower's input.
        tiling: How large images are cut into tiles; None where they are not.
        media: What the bundle takes: ``image``, ``video`` (frames, each an image to the graph), or
            both.
        llm: The language model that the projector projects to.
        precision: Precision of the tower's weights and activations, in the bundle's own graph.
        opset: ONNX opset of the graph.
        precisions: Precision → record of the quantised graph of that precision;
            `vzip.runtime.bundle.precision_writer` adds one.
        versions: Package → version the bundle was made with.
        files: File name → digest. Empty until `BundleWriter` has hashed the files.
        engines: Name → record of ``engines/NAME.plan``; `vzip.runtime.bundle.writer.add_engine`
            adds one.
        parity: Numbers of `vzip check` and its verdict ``passed``; None before it ran.
    """

    model: Model
    selection: Selection
    tower: Tower
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batch: Batch
    preprocessing: Preprocessing
    llm: Llm
    precision: Literal["fp32", "fp16"]
    opset: Literal[17, 18]
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    engines: Mapping[str, EngineRecord] = field(default_factory=dict)
    parity: Mapping[str, Scalar] | None = None
    token_order: str = TOKEN_ORDER
    tiling: Tiling | None = None
    media: tuple[Media, ...] = ("image", "video")
    precisions: Mapping[Quantised, PrecisionRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_records(self)
        _check_budget(self.selection, self.tower)
        checks.choice("token_order", self.token_order, (TOKEN_ORDER,))
        checks.choice("precision", self.precision, ("fp32", "fp16"))
        checks.integer("opset", self.opset, low=17, high=18)
        _check_tensors(self)
        _check_media(self)
        for package, version in self.versions.items():
            checks.text(f"versions.{package}", version)
        for name, entry in self.files.items():
            checks.choice("files", name, (*FILES, *QUANTISED_FILES))
            if not isinstance(entry, FileEntry):
                raise checks.refuse(f"files.{name}", entry, "a FileEntry")
        _check_precisions(self)
        for name, engine in self.engines.items():
            check_name(name)
            if not isinstance(engine, EngineRecord):
                raise checks.refuse(f"engines.{name}", engine, "an EngineRecord")
        if self.parity is not None:
            if not isinstance(self.parity, Mapping) or type(self.parity.get("passed")) is not bool:
                raise checks.refuse("parity", self.parity, "null, or numbers and 'passed'")
            for name, value in self.parity.items():
                checks.scalar(f"parity.{name}", value)

    @property
    def input(self) -> Tensor:
        """The graph's one input."""
        return self.inputs[0]

    @property
    def embeds(self) -> Tensor:
        """The output ``image_embeds`` [B, K, L]."""
        return self.outputs[0]

    @property
    def kept(self) -> Tensor:
        """The output ``kept_indices`` int64 [B, dominant]."""
        return self.outputs[1]

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values, in the order of `docs/bundle.md`."""
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "model": dict(vars(self.model)),
            "selection": dict(vars(self.selection)),
            "tower": {**vars(self.tower), "grid": list(self.tower.grid)},
            "token_order": self.token_order,
            "inputs": [{**vars(each), "shape": list(each.shape)} for each in self.inputs],
            "outputs": [{**vars(each), "shape": list(each.shape)} for each in self.outputs],
            "batch": dict(vars(self.batch)),
            "preprocessing": self.preprocessing.to_json(),
            "tiling": None if self.tiling is None else self.tiling.to_json(),
            "media": list(self.media),
            "llm": dict(vars(self.llm)),
            "precision": self.precision,
            "opset": self.opset,
            **self._precisions_to_json(),
            "files": {name: dict(vars(entry)) for name, entry in self.files.items()},
            "engines": {name: engine.to_json() for name, engine in self.engines.items()},
            "parity": None if self.parity is None else dict(self.parity),
            "versions": dict(self.versions),
        }

    def _precisions_to_json(self) -> dict[str, Any]:
        """Return the key `precisions`, which stands there only where there are any."""
        if not self.precisions:
            return {}
        return {"precisions": {name: each.to_json() for name, each in self.precisions.items()}}

    def to_bytes(self) -> bytes:
        """Return the text of manifest.json, UTF-8 with a newline at the end."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def from_json(cls, value: object) -> Manifest:
        """Return the manifest that `value`, parsed JSON, describes.

        Raises:
            BundleError: Another format or schema version, an unknown or missing key, a wrong type,
                a value out of range or in contradiction to another.
        """
        _check_version(value)
        top = checks.mapping("manifest", value, _top_keys(value))
        tower = dict(checks.mapping("tower", top["tower"], _keys(Tower)))
        tower["grid"] = _as_tuple(tower["grid"])
        files, engines = top["files"], top["engines"]
        precisions = top.get("precisions", {})
        if not isinstance(files, Mapping):
            raise checks.refuse("files", files, "an object")
        if not isinstance(engines, Mapping):
            raise checks.refuse("engines", engines, "an object")
        if not isinstance(precisions, Mapping):
            raise checks.refuse("precisions", precisions, "an object")
        entries: dict[str, Any] = {
            name: FileEntry(**_record(f"files.{name}", entry, FileEntry))
            for name, entry in files.items()
        }
        quantised: Any = {
            name: PrecisionRecord.from_json(f"precisions.{name}", each)
            for name, each in precisions.items()
        }
        versions: Any = top["versions"]
        parity: Any = top["parity"]
        precision: Any = top["precision"]
        opset: Any = top["opset"]
        token_order: Any = top["token_order"]
        return cls(
            model=Model(**_record("model", top["model"], Model)),
            selection=Selection(**_record("selection", top["selection"], Selection)),
            tower=Tower(**_any(tower)),
            token_order=token_order,
            inputs=_tensors("inputs", top["inputs"]),
            outputs=_tensors("outputs", top["outputs"]),
            batch=Batch(**_record("batch", top["batch"], Batch)),
            preprocessing=_preprocessing(top["preprocessing"]),
            tiling=_tiling(top["tiling"]),
            media=_any({"media": _as_tuple(top["media"])})["media"],
            llm=Llm(**_record("llm", top["llm"], Llm)),
            precision=precision,
            opset=opset,
            files=entries,
            engines={
                name: EngineRecord.from_json(f"engines.{name}", engine)
                for name, engine in engines.items()
            },
            parity=parity,
            versions=versions,
            precisions=quantised,
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Return the manifest that manifest.json's bytes describe.

        Raises:
            BundleError: The bytes are no strict JSON (duplicate keys, NaN and infinities are
                refused), or as for `from_json`.
        """
        try:
            value = json.loads(
                data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
            )
        except (ValueError, RecursionError) as error:
            cause = _OBJECT_DEPTH_ERROR if isinstance(error, RecursionError) else str(error)
            raise BundleError(
                f"manifest.json is malformed ({cause})",
                expected="strict JSON in UTF-8",
                cause="the file was truncated or edited",
                cure="export the bundle again",
            ) from error
        return cls.from_json(value)


_TOP_KEYS = (
    *("format", "schema_version", "model", "selection", "tower", "token_order", "inputs"),
    *("outputs", "batch", "preprocessing", "tiling", "media", "llm", "precision", "opset"),
    *("files", "engines", "parity", "versions"),
)


def _top_keys(value: object) -> tuple[str, ...]:
    """Return the keys that a manifest must have; a bundle as exported has no `precisions`."""
    added = isinstance(value, Mapping) and "precisions" in value
    return (*_TOP_KEYS, "precisions") if added else _TOP_KEYS


def _keys(record: type) -> tuple[str, ...]:
    """Return the keys of a record in JSON, which are its fields."""
    return tuple(record.__dataclass_fields__)  # type: ignore[attr-defined]


def _any(values: Mapping[str, object]) -> dict[str, Any]:
    """Return values whose types the record's own checks are about to establish."""
    return dict(values)


def _record(where: str, value: object, record: type) -> dict[str, Any]:
    """Return the keyword arguments of `record` from a JSON object with exactly its keys."""
    return _any(checks.mapping(where, value, _keys(record)))


def _as_tuple(value: object) -> object:
    """Return a JSON list as a tuple, anything else as it is, for the record to refuse."""
    return tuple(value) if isinstance(value, list) else value


def _tensors(where: str, value: object) -> tuple[Tensor, ...]:
    """Return the tensors that a JSON list describes."""
    if not isinstance(value, list):
        raise checks.refuse(where, value, "a list")
    records = [_record(f"{where}[{place}]", each, Tensor) for place, each in enumerate(value)]
    return tuple(Tensor(**{**each, "shape": _as_tuple(each["shape"])}) for each in records)


def _preprocessing(value: object) -> Preprocessing:
    """Return the preprocessing that a JSON object describes."""
    if not isinstance(value, dict):
        raise checks.refuse("preprocessing", value, "an object")
    try:
        return Preprocessing.from_json(value)
    except InvalidInputError as error:
        raise BundleError(f"manifest.json: 'preprocessing': {error}") from error


def _tiling(value: object) -> Tiling | None:
    """Return the tiling that a JSON value describes."""
    if value is None:
        return None
    record = _record("tiling", value, Tiling)
    pinpoints = _as_tuple(record["pinpoints"])
    if isinstance(pinpoints, tuple):
        pinpoints = tuple(_as_tuple(pair) for pair in pinpoints)
    return Tiling(**{**record, "pinpoints": pinpoints})


def _check_version(value: object) -> None:
    """Refuse other formats and versions before anything else, since their keys differ too."""
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise BundleError(
            "manifest.json is not the manifest of a vzip bundle: expected an object with "
            f"'format': '{FORMAT}'",
            cure="give the folder that `vzip export -o` wrote",
        )
    version = value.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"manifest.json: 'schema_version' is {version!r}",
            expected=f"{SCHEMA_VERSION}",
            cause="the bundle was made by another version of vzip",
            cure="export it again, or install that version",
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return JSON pairs as a dict; two readers could disagree about a key that stands twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} stands twice in an object")
    return result


def _no_constant(name: str) -> object:
    """Refuse NaN and infinities, which Python's json takes and JSON has not."""
    raise ValueError(f"{name} is not JSON")


def _check_records(manifest: Manifest) -> None:
    """Refuse fields of another class, which only a caller in Python can pass."""
    for name, record in (
        ("model", Model),
        ("selection", Selection),
        ("tower", Tower),
        ("batch", Batch),
        ("preprocessing", Preprocessing),
        ("llm", Llm),
        ("files", Mapping),
        ("engines", Mapping),
        ("versions", Mapping),
        ("precisions", Mapping),
        ("inputs", tuple),
        ("outputs", tuple),
    ):
        value = getattr(manifest, name)
        if not isinstance(value, record):
            raise checks.refuse(name, value, f"a {record.__name__}")


def _check_precisions(manifest: Manifest) -> None:
    """Refuse quantised graphs without record or without all of their files, and the reverse."""
    for name, record in manifest.precisions.items():
        checks.choice("precisions", name, QUANTISED)
        if not isinstance(record, PrecisionRecord):
            raise checks.refuse(f"precisions.{name}", record, "a PrecisionRecord")
    for precision in QUANTISED:
        needed = set(files_of(precision)) - {data_file(precision)}
        listed = {*files_of(precision)} & set(manifest.files)
        there = precision in manifest.precisions
        if there and not needed <= listed:
            raise checks.refuse("files", sorted(listed), f"also {sorted(needed - listed)}")
        if listed and not there:
            raise checks.refuse("precisions", sorted(manifest.precisions), f"also {precision!r}")


def _check_media(manifest: Manifest) -> None:
    """Refuse unknown media, and pooling or a tiling that doesn't go with tower and media."""
    media, tiling = manifest.media, manifest.tiling
    if media not in (("image",), ("video",), ("image", "video")):
        raise checks.refuse("media", media, "['image'], ['video'] or ['image', 'video']")
    if manifest.tower.pool == 2 and media != ("video",):
        raise checks.refuse("media", media, "['video'], since tower.pool is 2")
    if tiling is None:
        return
    if not isinstance(tiling, Tiling):
        raise checks.refuse("tiling", tiling, "a Tiling")
    if "image" not in media:
        raise checks.refuse("tiling", tiling.order, "null, since the bundle takes no image")
    side = manifest.tower.image_size
    for height, width in tiling.pinpoints:
        if height % side or width % side:
            raise checks.refuse(
                "tiling.pinpoints", [height, width], f"multiples of the tower's image_size {side}"
            )


def _check_budget(selection: Selection, tower: Tower) -> None:
    """Refuse a budget that the tower's tokens can't fill (`visionzip.md`, last paragraph)."""
    if selection.cls_token and not tower.cls_token:
        raise checks.refuse("selection.cls_token", True, "false, since the tower has no CLS token")
    patches = tower.grid[0] * tower.grid[1]
    available = patches + selection.cls_token  # a CLS that isn't kept is not merged either
    if selection.tokens >= available:
        raise checks.refuse(
            "selection",
            f"{selection.dominant}+{selection.contextual}",
            f"dominant+contextual below the {available} tokens that can be selected",
        )


def _check_tensors(manifest: Manifest) -> None:
    """Refuse inputs and outputs that contradict budgets, tower, batch or language model."""
    side = manifest.tower.image_size
    if manifest.preprocessing.image_size != side:
        raise checks.refuse(
            "preprocessing.image_size", manifest.preprocessing.image_size, f"the tower's {side}"
        )
    batch: Dimension = "batch" if manifest.batch.dynamic else manifest.batch.max
    tokens, width = manifest.selection.tokens, manifest.llm.hidden_size
    image = Tensor("image", "uint8", (batch, side, side, 3))
    pixel_values = Tensor("pixel_values", "float32", (batch, 3, side, side))
    if manifest.inputs not in ((image,), (pixel_values,)):
        raise checks.refuse("inputs", _named(manifest.inputs), f"{image} or {pixel_values}")
    kept = Tensor(KEPT, "int64", (batch, manifest.selection.dominant))
    dtypes: tuple[Literal["float32", "float16"], ...] = (
        ("float32",) if manifest.precision == "fp32" else ("float32", "float16")
    )
    allowed = [(Tensor(EMBEDS, dtype, (batch, tokens, width)), kept) for dtype in dtypes]
    if manifest.outputs not in allowed:
        expected = " or ".join(_named(pair) for pair in allowed)
        raise checks.refuse("outputs", _named(manifest.outputs), expected)


def _named(tensors: tuple[Tensor, ...]) -> str:
    """Return tensors as they stand in messages."""
    return " and ".join(map(str, tensors))
