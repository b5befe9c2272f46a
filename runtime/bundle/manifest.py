"""The manifest of a bundle: frozen records, checked when they are made.

`docs/bundle.md` specifies the form; this module is its one home in code. Whoever holds a `Manifest`
holds one whose types, ranges and cross-relations (K = dominant + contextual = the width of
``image_embeds``, tokens = grid + CLS, …) are right, wherever it came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from vzip.runtime.bundle.engine_record import NAME, EngineRecord, Size
from vzip.runtime.bundle.origin import Model
from vzip.runtime.bundle.precision_record import (
    QUANTISED,
    QUANTISED_FILES,
    PrecisionRecord,
    Quantised,
    data_file,
    files_of,
)
from vzip.runtime.errors import BundleError
from vzip.runtime.files import codec
from vzip.runtime.files.codec import (
    OPTIONAL,
    Count,
    Index,
    Must,
    Record,
    Scalar,
    Sha256,
    Text,
    one_of,
    within,
)
from vzip.runtime.guard import door
from vzip.runtime.pictures.preprocess import Preprocessing

FORMAT: Final = "vzip-bundle"
SCHEMA_VERSION: Final = 2
"""Since 2 the graph says which patch each token stands for (``token_positions``)."""
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

MOST_PIXELS: Final = 2**30
"""Of a call of a graph with a static batch, which runs a whole one for a single picture."""

EMBEDS: Final = "image_embeds"
KEPT: Final = "kept_indices"
POSITIONS: Final = "token_positions"
RANK: Final = "rank"
"""int64 [B, K]: at which step a greedy selection chose each row's token. The rows whose rank is
below K′ are exactly the selection of budget K′."""
TOKEN_WEIGHTS: Final = "token_weights"  # noqa: S105 - no password
"""A value inside the graph, float32 [B, K, S]: weight of tower token s in output token k."""


def graph_outputs(*, ranked: bool) -> tuple[str, ...]:
    """Return the names of the outputs that an export gives a graph, in order.

    Args:
        ranked: `Selection.ranked`.
    """
    return (EMBEDS, KEPT, POSITIONS, *((RANK,) if ranked else ()))


Dimension = Count | Literal["batch"]
Media = Literal["image", "video"]


@dataclass(frozen=True)
class Selection(Record):
    """How tower tokens become `tokens` output tokens.

    Attributes:
        method: ``visionzip``, or the name of another selection that the exporter has.
        dominant: Number of tower tokens kept as they are, CLS included where it is kept.
        contextual: Number of tokens merged from the rest.
        merge: ``average`` (the paper) or ``sum`` (the published code).
        cls_token: Whether CLS is kept, as one of `dominant`.
        span: How many tokens the uncompressed model hands on of an image, a tile or a frame: the
            patches, and CLS where it keeps that. None where the graph doesn't say which patches its
            tokens stand for.
        ranked: Whether the graph has the output ``rank``.
        options: Name → value of what the selection was made with, of methods that have options.
    """

    method: Text
    dominant: Count
    contextual: Index
    merge: Literal["average", "sum"]
    cls_token: bool
    span: Count | None = field(default=None, metadata=OPTIONAL)
    ranked: bool = field(default=False, metadata=OPTIONAL)
    options: Mapping[Text, float | Text] = field(default_factory=dict, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranked and self.contextual:
            expected = "0 where every token has a rank: merged ones have none"
            raise self.misfit("contextual", expected)
        if self.ranked and self.cls_token:
            expected = "false where every token has a rank: CLS has none"
            raise self.misfit("cls_token", expected)

    @property
    def tokens(self) -> int:
        """K, the number of tokens that leave the graph."""
        return self.dominant + self.contextual


@dataclass(frozen=True)
class Tower(Record):
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

    tokens: Count
    grid: tuple[Count, Count]
    cls_token: bool
    image_size: Size
    patch_size: Size
    pool: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size > self.image_size:
            raise self.misfit("patch_size", f"at most the image_size {self.image_size}")
        if self.cls_token and self.pool == 2:
            raise self.misfit("pool", "1, since the tower has a CLS token")
        # 384 / 14 leaves a margin that no patch sees; pooling rounds up.
        side = -(-(self.image_size // self.patch_size) // self.pool)
        if self.grid != (side, side):
            raise self.misfit("grid", f"{[side, side]} = image_size/patch_size/pool")
        if self.tokens != side * side + self.cls_token:
            raise self.misfit("tokens", f"{side * side + self.cls_token}, as the grid has with CLS")


@dataclass(frozen=True)
class Tiling(Record):
    """How a large image is cut into tiles, each of which the graph takes as an image.

    Attributes:
        pinpoints: The resolutions that tiles may make up, as (height, width) in pixels, in the
            checkpoint's order (the first of equally good ones is taken).
        order: ``reference``: the published code's order, without newlines, padding included.
            ``newline``: rows of patches end with the LLM's newline embedding, as it was trained,
            and patches of the padding are left out. See `vzip.runtime.pictures.tiles`.
        only_alone: Whether an image is cut only where it is the only one of its prompt, as the LLM
            was trained (LLaVA-OneVision). Of several, each is one tile, padded to a square.
        max_tiles: More tiles' worth of patches, by a tenth in each direction, are shrunk to so many
            by the uncompressed model; None where it never does. With ``newline``, kept patches
            stand in the rows that are left.
    """

    pinpoints: Annotated[
        tuple[tuple[Size, Size], ...], Must(bool, "a list of at least one [height, width]")
    ]
    order: Literal["reference", "newline"] = "reference"
    only_alone: bool = field(default=False, metadata=OPTIONAL)
    max_tiles: Count | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Tensor(Record):
    """Name, dtype and shape of an input or output of the graph.

    Attributes:
        name: Name of the value in the graph.
        dtype: numpy's name of the element type.
        shape: Extent of each axis; ``batch`` stands for 1 … `Batch.max`.
    """

    name: Text
    dtype: Literal["uint8", "float32", "float16", "int64"]
    shape: Annotated[
        tuple[Dimension, ...],
        Must(
            lambda shape: shape and "batch" not in shape[1:],
            "extents, of which the first alone may be 'batch'",
        ),
    ]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Batch(Record):
    """How many images one call of the graph takes.

    Attributes:
        max: The largest number of images.
        dynamic: Whether fewer are taken too; otherwise exactly `max`.
    """

    max: Size
    dynamic: bool


@dataclass(frozen=True)
class Llm(Record):
    """What the language model that takes the tokens looks like.

    Attributes:
        hidden_size: L, width of its embeddings.
        image_token_id: Id of the placeholder that image tokens replace in the prompt.
        video_token_id: Id of the placeholder of a video; None where the model has none of its own.
    """

    hidden_size: Count
    # Original LLaVA's placeholder is -200: no entry of any vocabulary.
    image_token_id: Annotated[int, within(-(2**31))]
    video_token_id: Index | None = None


@dataclass(frozen=True)
class FileEntry(Record):
    """Digest and size of one file of the bundle.

    Attributes:
        sha256: Digest, 64 lower-case hexadecimal digits.
        bytes: Size of the file.
    """

    sha256: Sha256
    bytes: Count


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """Everything that a reader must know to run a bundle's graph; see `docs/bundle.md`.

    Attributes:
        model: Where the weights came from.
        selection: Budgets and options of VisionZip.
        tower: The vision tower before compression.
        token_order: `TOKEN_ORDER`.
        inputs: The one input: ``image`` uint8 [B, H, W, 3] RGB, or ``pixel_values`` float32
            [B, 3, H, W] normalised.
        outputs: ``image_embeds`` [B, K, L], ``kept_indices`` int64 [B, dominant] and
            ``token_positions`` int64 [B, K], in this order; the last not in schema 1. ``rank``
            int64 [B, K] follows where `Selection.ranked`.
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

    # In the order of the file.
    model: Model
    selection: Selection
    tower: Tower
    token_order: Annotated[str, one_of((TOKEN_ORDER,))] = TOKEN_ORDER
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batch: Batch
    preprocessing: Preprocessing
    tiling: Tiling | None = None
    media: tuple[Media, ...] = ("image", "video")
    llm: Llm
    precision: Literal["fp32", "fp16"]
    opset: Literal[17, 18]
    precisions: Mapping[Quantised, PrecisionRecord] = field(default_factory=dict, metadata=OPTIONAL)
    files: Mapping[Annotated[str, one_of((*FILES, *QUANTISED_FILES))], FileEntry] = field(
        default_factory=dict
    )
    engines: Mapping[Annotated[str, NAME], EngineRecord] = field(default_factory=dict)
    parity: Mapping[Text, Scalar] | None = None
    versions: Mapping[Text, Text]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_budget(self)
        _check_tensors(self)
        _check_media(self)
        _check_precisions(self)
        if self.parity is not None and type(self.parity.get("passed")) is not bool:
            raise self.misfit("parity", "null, or the verdict 'passed' among its values")

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

    @property
    def span(self) -> int | None:
        """Places of an image, tile or frame in the uncompressed sequence; None if not known."""
        return self.selection.span

    @property
    def has_positions(self) -> bool:
        """Whether the graph has the output ``token_positions``."""
        return len(self.outputs) >= 3

    @property
    def has_rank(self) -> bool:
        """Whether the graph has the output ``rank``."""
        return self.selection.ranked

    @property
    def schema_version(self) -> int:
        """Number of the form that the manifest is written in."""
        return SCHEMA_VERSION if self.has_positions else 1

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values, in the order of `docs/bundle.md`."""
        return {"format": FORMAT, "schema_version": self.schema_version, **codec.write(self)}

    def to_bytes(self) -> bytes:
        """Return the text of manifest.json, UTF-8 with a newline at the end."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    @door(
        BundleError, "manifest.json can't be understood", cure="copy it again, or export it again"
    )
    def from_json(cls, value: Any) -> Manifest:
        """Return the manifest that `value`, parsed JSON, describes.

        Raises:
            BundleError: Another format or schema version, an unknown or missing key, a wrong type,
                a value out of range or in contradiction to another.
        """
        _check_version(value)
        fields = {name: each for name, each in value.items() if name not in _VERSION_KEYS}
        with codec.reading(MANIFEST_FILE):
            manifest = codec.read(cls, fields)
            if value["schema_version"] != manifest.schema_version:
                wanted = f"{POSITIONS} among them in schema 2, and not in schema 1"
                raise manifest.misfit("outputs", wanted, _named(manifest.outputs))
            return manifest

    @classmethod
    @door(
        BundleError, "manifest.json can't be understood", cure="copy it again, or export it again"
    )
    def from_bytes(cls, data: bytes) -> Manifest:
        """Return the manifest that manifest.json's bytes describe.

        Raises:
            BundleError: The bytes are no strict JSON (duplicate keys, NaN and infinities are
                refused), or as for `from_json`.
        """
        try:
            value = codec.parse(data)
        except ValueError as error:
            raise BundleError(
                f"manifest.json is malformed ({error})",
                expected="strict JSON in UTF-8",
                cause="the file was truncated or edited",
                cure="export the bundle again",
            ) from error
        return cls.from_json(value)


_VERSION_KEYS: Final = ("format", "schema_version")


def _check_version(value: object) -> None:
    """Refuse other formats and versions before anything else, since their keys differ too."""
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise BundleError(
            "manifest.json is no manifest of a vzip bundle",
            expected=f"an object with 'format': '{FORMAT}'",
            cure="give the folder that `vzip export -o` wrote",
        )
    version = value.get("schema_version")
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise BundleError(
            f"manifest.json: 'schema_version' is {version!r}",
            expected=f"1 to {SCHEMA_VERSION}",
            cause="the bundle was made by another version of vzip",
            cure="export it again, or install that version",
        )


def _check_precisions(manifest: Manifest) -> None:
    """Refuse quantised graphs without record or without all of their files, and the reverse."""
    for precision in QUANTISED:
        needed = set(files_of(precision)) - {data_file(precision)}
        listed = {*files_of(precision)} & set(manifest.files)
        there = precision in manifest.precisions
        if there and not needed <= listed:
            raise manifest.misfit("files", f"also {sorted(needed - listed)}", sorted(listed))
        if listed and not there:
            raise manifest.misfit("precisions", f"also {precision!r}", sorted(manifest.precisions))


def _check_media(manifest: Manifest) -> None:
    """Refuse unknown media, and pooling or a tiling that doesn't go with tower and media."""
    media, tiling = manifest.media, manifest.tiling
    if media not in (("image",), ("video",), ("image", "video")):
        raise manifest.misfit("media", "['image'], ['video'] or ['image', 'video']")
    if manifest.tower.pool == 2 and media != ("video",):
        raise manifest.misfit("media", "['video'], since tower.pool is 2")
    if tiling is None:
        return
    if "image" not in media:
        raise manifest.misfit("tiling", "null, since the bundle takes no image", tiling.order)
    side = manifest.tower.image_size
    for pair in tiling.pinpoints:
        if pair[0] % side or pair[1] % side:
            expected = f"multiples of the tower's image_size {side}"
            raise manifest.misfit("tiling.pinpoints", expected, pair)


def _check_budget(manifest: Manifest) -> None:
    """Refuse a budget that the tower's tokens can't fill (`visionzip.md`, last paragraph)."""
    selection, tower = manifest.selection, manifest.tower
    if selection.cls_token and not tower.cls_token:
        expected = "false, since the tower has no CLS token"
        raise manifest.misfit("selection.cls_token", expected, True)
    patches = tower.grid[0] * tower.grid[1]
    if selection.span is not None and not manifest.has_positions:
        raise manifest.misfit("selection.span", f"null without {POSITIONS}", selection.span)
    if selection.span not in (None, patches, patches + tower.cls_token):
        expected = f"{patches}, the patches" + (", or one more for CLS" if tower.cls_token else "")
        raise manifest.misfit("selection.span", expected, selection.span)
    available = patches + selection.cls_token  # a CLS that isn't kept is not merged either
    # All patches as they are is no compression, and right all the same.
    whole = not (selection.contextual or selection.cls_token)
    if selection.tokens >= available + whole:
        limit = "at most" if whole else "below"
        raise manifest.misfit(
            "selection",
            f"dominant+contextual {limit} the {available} tokens that can be selected",
            f"{selection.dominant}+{selection.contextual}",
        )


def _check_tensors(manifest: Manifest) -> None:
    """Refuse inputs and outputs that contradict budgets, tower, batch or language model."""
    side = manifest.tower.image_size
    if manifest.preprocessing.image_size != side:
        found = manifest.preprocessing.image_size
        raise manifest.misfit("preprocessing.image_size", f"the tower's {side}", found)
    if not manifest.batch.dynamic and manifest.batch.max * side * side > MOST_PIXELS:
        most = MOST_PIXELS // (side * side)
        raise manifest.misfit("batch.max", f"at most {most} of {side} pixels", manifest.batch.max)
    batch: Dimension = "batch" if manifest.batch.dynamic else manifest.batch.max
    tokens, width = manifest.selection.tokens, manifest.llm.hidden_size
    image = Tensor("image", "uint8", (batch, side, side, 3))
    pixel_values = Tensor("pixel_values", "float32", (batch, 3, side, side))
    if manifest.inputs not in ((image,), (pixel_values,)):
        raise manifest.misfit("inputs", f"{image} or {pixel_values}", _named(manifest.inputs))
    kept = Tensor(KEPT, "int64", (batch, manifest.selection.dominant))
    dtypes: tuple[Literal["float32", "float16"], ...] = (
        ("float32",) if manifest.precision == "fp32" else ("float32", "float16")
    )
    positions = Tensor(POSITIONS, "int64", (batch, tokens))
    rank = (Tensor(RANK, "int64", (batch, tokens)),) if manifest.selection.ranked else ()
    allowed = [
        (Tensor(EMBEDS, dtype, (batch, tokens, width)), kept, positions, *rank) for dtype in dtypes
    ]
    # In schema 1, which knows no ranks.
    allowed_before = [] if rank else [outputs[:2] for outputs in allowed]
    if manifest.outputs not in (*allowed, *allowed_before):
        expected = " or ".join(_named(pair) for pair in allowed)
        raise manifest.misfit("outputs", expected, _named(manifest.outputs))


def _named(tensors: tuple[Tensor, ...]) -> str:
    """Return tensors as they stand in messages."""
    return " and ".join(map(str, tensors))
