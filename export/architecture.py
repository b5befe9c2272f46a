"""What a vision side looks like: frozen sizes, checked where they are made.

The numbers come from a checkpoint's own ``config.json`` (`vzip.export.families`), never from here.
Canonical tensor names are ``tower.`` + the key of transformers' ``CLIPVisionModel`` or
``SiglipVisionModel``, ``projector.`` + the key of its ``LlavaMultiModalProjector`` (or ViP-LLaVA's)
and ``image_newline``; `tensor_shapes` lists them all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from vzip.runtime.bundle.manifest import Tiling
from vzip.runtime.errors import CheckpointError
from vzip.runtime.pictures.preprocess import Preprocessing
from vzip.runtime.wording import counted

TowerKind = Literal["clip", "siglip"]
TowerActivation = Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]
ProjectorActivation = Literal["gelu"]
FeatureStrategy = Literal["default", "full"]
Media = Literal["image", "video"]
Shape = tuple[int, ...]

MAX_LAYERS, MAX_PATCHES, MAX_PARAMETERS = 1000, 2**16, 2**35
"""What is believed of a tower, several times the largest there are: all of it is allocated."""

NEWLINE = "image_newline"
"""Canonical name of the embedding that ends a row of a tiled image."""


@dataclass(frozen=True)
class TowerConfig:
    """A vision transformer.

    Attributes:
        kind: "clip" has a CLS token before the patches and a LayerNorm before the first layer;
            "siglip" has neither, and a bias in its patch embedding.
        image_size: Side of its square input in pixels.
        patch_size: Side of a patch in pixels. Where it doesn't divide `image_size`, no patch sees
            the pixels that are left over at the right and at the bottom.
        hidden_size: Width D; a multiple of `num_heads`.
        intermediate_size: Width of the feed-forward part.
        num_heads: Attention heads.
        num_layers: Encoder layers in the checkpoint, those that the features never use included.
        activation: Of the feed-forward part.
        layer_norm_eps: Added to the variance.
    """

    kind: TowerKind
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    activation: TowerActivation
    layer_norm_eps: float

    def __post_init__(self) -> None:
        _choice("tower kind", self.kind, get_args(TowerKind))
        sizes = ("image_size", "patch_size", "hidden_size", "intermediate_size")
        for name in (*sizes, "num_heads", "num_layers"):
            _positive(f"tower {name}", getattr(self, name))
        if self.image_size < self.patch_size:
            raise _wrong(
                "tower image_size", self.image_size, f"at least patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise _wrong(
                "tower hidden_size", self.hidden_size, f"a multiple of num_heads {self.num_heads}"
            )
        for name, most in (
            ("num_layers", MAX_LAYERS),
            ("patches", MAX_PATCHES),
            ("parameters", MAX_PARAMETERS),
        ):
            if getattr(self, name) > most:
                raise _wrong(f"tower {name}", getattr(self, name), f"at most {most}")
        _choice("tower activation", self.activation, get_args(TowerActivation))
        eps = self.layer_norm_eps
        if not isinstance(eps, float) or not math.isfinite(eps) or eps <= 0:
            raise _wrong("tower layer_norm_eps", eps, "a number above 0")

    @property
    def parameters(self) -> int:
        """Numbers in its weights, nearly: norms and biases are left out."""
        layer = self.hidden_size * (4 * self.hidden_size + 2 * self.intermediate_size)
        return self.num_layers * layer + (3 * self.patch_size**2 + self.tokens) * self.hidden_size

    @property
    def cls_token(self) -> bool:
        """Whether a CLS token stands before the patches."""
        return self.kind == "clip"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def patches(self) -> int:
        """N: patches of an image."""
        rows, columns = self.grid
        return rows * columns

    @property
    def tokens(self) -> int:
        """S: tokens of the tower, CLS included where it has one."""
        return self.patches + self.cls_token


@dataclass(frozen=True)
class ProjectorConfig:
    """(LayerNorm,) Linear, activation, Linear: from the tower's width to the LLM's.

    Attributes:
        in_features: Width of the features: the tower's, times the number of feature layers.
        hidden_features: Width between the two linear layers.
        out_features: L, the LLM's hidden size.
        activation: Between the two; GELU by the error function.
        bias: Whether the linear layers have one.
        norm_eps: Of the LayerNorm in front (ViP-LLaVA's ``projector_layernorm``); None without.
    """

    in_features: int
    hidden_features: int
    out_features: int
    activation: ProjectorActivation
    bias: bool
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for name in ("in_features", "hidden_features", "out_features"):
            _positive(f"projector {name}", getattr(self, name))
        _choice("projector activation", self.activation, get_args(ProjectorActivation))
        _truth("projector bias", self.bias)
        eps = self.norm_eps
        if eps is not None and (not isinstance(eps, float) or not math.isfinite(eps) or eps <= 0):
            raise _wrong("projector norm_eps", eps, "a number above 0, or none")


@dataclass(frozen=True)
class VisionConfig:
    """Tower, projector and what lies between pixels and the one and tokens and the other.

    Attributes:
        family: Name in `vzip.export.families`.
        tower: The vision transformer.
        projector: What maps its features to the LLM.
        feature_layers: Indices into transformers' ``hidden_states``, as the checkpoint's
            configuration has them and in its order: entry 0 is what enters the first layer, -1 what
            leaves the last. The features of several layers are concatenated; scores and keys come
            from the deepest.
        image_token_id: The token that stands for an image in the LLM's vocabulary; original LLaVA's
            is -200, which is no entry of any vocabulary.
        preprocessing: From an image (with `tiling`, from the base tile) to what the tower takes.
        feature_strategy: What the uncompressed model hands to the LLM: "default" drops the CLS
            token, "full" keeps it. VisionZip chooses for itself (its `cls_token`).
        media: What the graph is made for: "image" or "video".
        takes: What can be handed to it: frames of a clip are images to most towers.
        tower_module: Name of the tower's module in the checkpoint.
        video_token_id: The token that stands for a video; None where the LLM has none.
        pool: 2 where the LLM gets 2×2-pooled tokens (LLaVA-OneVision's frames), else 1. VisionZip
            then chooses among the pooled tokens.
        tiling: How large images are cut; None where they are not.
        newline: Whether the LLM has an embedding ``image_newline`` that ends rows.

    Raises:
        CheckpointError: Values that contradict each other.
    """

    family: str
    tower: TowerConfig
    projector: ProjectorConfig
    feature_layers: tuple[int, ...]
    image_token_id: int
    preprocessing: Preprocessing
    feature_strategy: FeatureStrategy = "default"
    media: Media = "image"
    takes: tuple[Media, ...] = ("image", "video")
    tower_module: str = "vision_tower"
    video_token_id: int | None = None
    pool: Literal[1, 2] = 1
    tiling: Tiling | None = None
    newline: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.family, str) or not self.family:
            raise _wrong("family", self.family, "a name")
        self._check_features()
        if type(self.image_token_id) is not int:
            raise _wrong("image_token_id", self.image_token_id, "one integer")
        if self.preprocessing.image_size != self.tower.image_size:
            raise _wrong(
                "preprocessing image_size",
                self.preprocessing.image_size,
                f"the tower's image_size {self.tower.image_size}",
            )
        _choice("feature_strategy", self.feature_strategy, get_args(FeatureStrategy))
        _choice("media", self.media, self.takes)
        assert self.pool == 1 or not self.tower.cls_token, "pooling is defined for patches alone"

    def _check_features(self) -> None:
        layers = self.feature_layers
        if not isinstance(layers, tuple) or not layers or any(type(n) is not int for n in layers):
            raise _wrong("feature_layer", layers, "one integer or several")
        states = self.tower.num_layers + 1
        for layer in layers:
            if not -states <= layer < states or layer % states == 0:
                raise _wrong(
                    "feature_layer",
                    layer,
                    f"the output of one of the tower's {self.tower.num_layers} layers: "
                    f"1 to {states - 1}, or -1 to {1 - states}",
                )
        width = len(layers) * self.tower.hidden_size
        if self.projector.in_features != width:
            raise _wrong(
                "projector in_features",
                self.projector.in_features,
                f"{width}, the tower's hidden_size times {counted(len(layers), 'feature layer')}",
            )

    def with_tile_order(self, order: Literal["reference", "newline"]) -> VisionConfig:
        """Return the architecture with another order of a tiled image's tokens; see `Tiling`."""
        if self.tiling is None:
            return self
        return dataclasses.replace(self, tiling=dataclasses.replace(self.tiling, order=order))

    @property
    def llm_hidden_size(self) -> int:
        """L: width of the tokens that the LLM takes."""
        return self.projector.out_features

    @property
    def states(self) -> tuple[int, ...]:
        """`feature_layers` counted from the front: 1 is what leaves the first layer."""
        return tuple(layer % (self.tower.num_layers + 1) for layer in self.feature_layers)

    @property
    def layers_run(self) -> int:
        """Encoder layers that the features need; those after them are dead code."""
        return max(self.states)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens that are selected from."""
        rows, columns = self.tower.grid
        return -(-rows // self.pool), -(-columns // self.pool)

    @property
    def tokens(self) -> int:
        """S: tokens that are selected from, CLS included where the tower has one."""
        rows, columns = self.grid
        return rows * columns + self.tower.cls_token

    @property
    def span(self) -> int:
        """Tokens that the uncompressed model hands on of an image, a tile or a frame."""
        rows, columns = self.grid
        return rows * columns + (self.tower.cls_token and self.feature_strategy == "full")


def tensor_shapes(config: VisionConfig) -> dict[str, Shape]:
    """Return canonical name → shape of every tensor of the vision side, in the order of the graph.

    The tower's unused last layers and post-LayerNorm are among them: see `needed_tensors`.
    """
    shapes = {f"tower.{name}": shape for name, shape in _tower_shapes(config.tower).items()}
    projector = {f"projector.{name}": s for name, s in projector_shapes(config.projector).items()}
    newline = {NEWLINE: (config.llm_hidden_size,)} if config.newline else {}
    return shapes | projector | newline


def needed_tensors(config: VisionConfig) -> frozenset[str]:
    """Return the canonical names that the graph can't do without: nothing of the dead end."""
    dead = tuple(
        f"tower.encoder.layers.{index}."
        for index in range(config.layers_run, config.tower.num_layers)
    )
    return frozenset(
        name
        for name in tensor_shapes(config)
        if not name.startswith((*dead, "tower.post_layernorm."))
    )


def projector_shapes(config: ProjectorConfig) -> dict[str, Shape]:
    """Return name → shape of the projector's tensors, names as in ``LlavaMultiModalProjector``."""
    shapes: dict[str, Shape] = {}
    if config.norm_eps is not None:
        shapes |= _norm("projector_layernorm", config.in_features)
    shapes |= _linear("linear_1", config.in_features, config.hidden_features, bias=config.bias)
    shapes |= _linear("linear_2", config.hidden_features, config.out_features, bias=config.bias)
    return shapes


def _tower_shapes(tower: TowerConfig) -> Mapping[str, Shape]:
    """Name → shape, names as in transformers 5's ``CLIPVisionModel`` and ``SiglipVisionModel``."""
    width, patch = tower.hidden_size, tower.patch_size
    shapes: dict[str, Shape] = {}
    clip = tower.kind == "clip"
    if clip:
        shapes["embeddings.class_embedding"] = (width,)
    shapes["embeddings.patch_embedding.weight"] = (width, 3, patch, patch)
    if not clip:
        shapes["embeddings.patch_embedding.bias"] = (width,)
    shapes["embeddings.position_embedding.weight"] = (tower.tokens, width)
    if clip:
        shapes |= _norm("pre_layrnorm", width)  # the published spelling
    for index in range(tower.num_layers):
        layer = f"encoder.layers.{index}"
        shapes |= _norm(f"{layer}.layer_norm1", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", width, width, bias=True)
        shapes |= _norm(f"{layer}.layer_norm2", width)
        shapes |= _linear(f"{layer}.mlp.fc1", width, tower.intermediate_size, bias=True)
        shapes |= _linear(f"{layer}.mlp.fc2", tower.intermediate_size, width, bias=True)
    shapes |= _norm("post_layernorm", width)
    return shapes


def _linear(name: str, in_features: int, out_features: int, *, bias: bool) -> dict[str, Shape]:
    weight = {f"{name}.weight": (out_features, in_features)}
    return {**weight, f"{name}.bias": (out_features,)} if bias else {**weight}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _wrong(what: str, got: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{what} is {got!r}",
        expected=f"{expected}",
        cause=(
            "the checkpoint's config.json or preprocessor_config.json is damaged or describes a "
            "model that vzip doesn't know"
        ),
        cure="compare it with the published one",
    )


def _positive(what: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise _wrong(what, value, "an integer above 0")


def _truth(what: str, value: object) -> None:
    if type(value) is not bool:
        raise _wrong(what, value, "true or false")


def _choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise _wrong(what, value, "one of " + ", ".join(choices))
