"""The one text side of an LLM: the words around questions, the places of images, the tokens.

`TextSide` is what every LLM has of it, wherever it was read: a GGUF, a bundle, or the checkpoint of
a LLaVA in transformers' layout. `TextFiles` reads the last; neither torch nor a weight is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vzip.runtime.config_numbers import check_numbers
from vzip.runtime.errors import CheckpointError, first_line, missing
from vzip.runtime.files.plain import check_folder_of_plain, read_text
from vzip.runtime.guard import door
from vzip.runtime.llm.chat_template import make_prompts
from vzip.runtime.llm.prompts import KINDS, TURN_TOKENS, Kind, Prompts
from vzip.runtime.llm.shown import NO_POSITIONS, Shown, TokenSpec, check_shown
from vzip.runtime.models import locate

if TYPE_CHECKING:
    from vzip.runtime.llm.shown import Given
    from vzip.runtime.tokens.positions import Positions

# What transformers reads of a checkpoint for its configuration, tokenizer and chat template.
TEXT_FILES: Final = ("*.json", "*.jinja", "*.model")

# Families, and their LLMs, that were trained with LLaVA-1.5's words; others need a chat template.
_LLAVA_15_WORDS: Final = {"llava": ("llama", "mistral"), "video_llava": ("llama",)}

_GIVE_WHOLE: Final = "give a whole llava-hf checkpoint with its tokenizer"
_LARGEST_FILE: Final = 2**28  # bytes; the largest tokenizers have 2**25

LARGEST: Final = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}
"""dtype → largest magnitude."""


@dataclass(frozen=True)
class TextSide:
    """What a prompt for an LLM is made of, and what ends its answers.

    Attributes:
        name: The LLM's name, for messages.
        prompts: Its prompts.
        eos_ids: Ids that end an answer.
        hidden_size: L, the width of a token.
        context: Longest sequence in tokens; None when the LLM states none.
        tokens: What the bundle says about its tokens; None to take any number.
    """

    name: str
    prompts: Prompts
    eos_ids: frozenset[int]
    hidden_size: int
    context: int | None
    tokens: TokenSpec | None

    def shown(
        self,
        embeds: Given | Sequence[Given],
        frames: int | None = None,
        *,
        largest: float,
        takes_videos: bool = True,
        where: str | None = None,
        positions: Positions | None = None,
        unable: str | None = NO_POSITIONS,
    ) -> Shown:
        """Check what the first turn shows; see `vzip.runtime.llm.shown.check_shown`.

        Args:
            embeds: The tokens of an image, several, or a video.
            frames: The video's frames; ``None`` for images.
            largest: Largest magnitude that the LLM's dtype can hold.
            takes_videos: Whether a video can stand at the LLM's placeholder for videos.
            where: What messages begin with; None for the LLM's name.
            positions: As for `check_shown`.
            unable: As for `check_shown`.
        """
        return check_shown(
            where or self.name,
            embeds,
            frames=frames,
            tokens=self.tokens,
            hidden_size=self.hidden_size,
            takes_videos=takes_videos and "video" in self.prompts.placeholders,
            largest=largest,
            positions=positions,
            unable=unable,
        )

    def first(self, shown: Shown, question: str, *, expands: bool = True) -> list[int]:
        """Return the first turn's ids.

        Args:
            shown: What it shows.
            question: The question, checked.
            expands: Whether there is a placeholder for each row; else for each image or video.

        Raises:
            CheckpointError: The LLM's words have no place for what is shown.
            InvalidInputError: The question contains a placeholder.
        """
        ids = self.prompts.first(question.strip(), shown.kind, len(shown.parts))
        if not expands:
            return ids
        placeholder, parts = self.prompts.placeholders[shown.kind], iter(shown.parts)
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (len(next(parts)) if token == placeholder else 1)
        return expanded

    def unseen_rows(self, shown: Shown) -> int:
        """Return how many rows have no id of their own where each image has one placeholder."""
        return sum(len(part) - 1 for part in shown.parts)

    def spoken(self, ids: Sequence[int]) -> list[int]:
        """Return an answer's ids up to the one that ends it."""
        ends = (place for place, token in enumerate(ids) if token in self.eos_ids)
        return list(ids[: next(ends, len(ids))])


@dataclass(frozen=True)
class TextFiles:
    """What transformers reads of a checkpoint's text side.

    Attributes:
        name: The LLM's name, for messages.
        model: What was opened.
        folder: Where it is on this machine.
        revision: Commit on the hub; None for the newest, or a local folder.
        config: transformers' configuration.
        tokenizer: transformers' tokenizer.
        template: The chat template, in Jinja; None where LLaVA-1.5's words are meant.
        template_home: The file that it stands in, for messages; empty without one.
        ends: Ids that generation_config.json says end an answer, or config.json without it.
    """

    name: str
    model: str
    folder: Path
    revision: str | None
    config: Any
    tokenizer: Any
    template: str | None
    template_home: str
    ends: tuple[int, ...]

    @classmethod
    @door(
        CheckpointError,
        "{name}: the text side of '{model}' can't be read",
        cure=_GIVE_WHOLE,
    )
    def read(cls, name: str, model: str | Path, revision: str | None = None) -> TextFiles:
        """Read a checkpoint's configuration and tokenizer.

        Args:
            name: The LLM's name, for messages.
            model: An alias (``demo``), a hub id or a local folder.
            revision: Commit on the hub.

        Raises:
            MissingDependencyError: transformers is not installed.
            CheckpointError: The checkpoint was not found, or is incomplete or damaged.
        """
        try:
            import transformers
        except ImportError as error:
            package = error.name or "transformers"
            raise missing(package, needed_for=f"{name}: tokenizing", extra="export") from error
        folder = fetch(name, model, revision, TEXT_FILES)
        _check_files(name, folder)
        _check_numbers(name, folder)
        try:
            check_folder_of_plain(folder)
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            processor, _ = transformers.LlavaProcessor.get_processor_dict(
                folder, local_files_only=True, trust_remote_code=False
            )
            # A damaged configuration fails here, and not in the middle of something.
            placeholder_ids(config), int(config.get_text_config().hidden_size)
            ends = _ends(folder, config)
        except Exception as error:  # of a damaged file the libraries raise anything
            # Of an LLM that it doesn't know, transformers lists the 500 that it does.
            reason = first_line(error).partition(" Should contain one of")[0]
            raise CheckpointError(
                f"{name}: the text side of {str(model)!r} can't be read ({reason})",
                cure=_GIVE_WHOLE,
            ) from error
        _check_attention(name, str(model), config)
        template, home = _template(name, folder, processor, tokenizer)
        if home:
            home = f"{home} of {str(model)!r}"
        return cls(name, str(model), folder, revision, config, tokenizer, template, home, ends)

    @door(
        CheckpointError,
        "{self.name}: the words of '{self.model}' can't be read",
        cure=_GIVE_WHOLE,
    )
    def side(self, tokens: TokenSpec | None) -> TextSide:
        """Return the text side.

        Args:
            tokens: What the bundle says about its tokens; None to take any number.

        Raises:
            CheckpointError: It is no LLaVA of transformers, or lacks the chat template that its
                family needs, or a placeholder.
            InvalidInputError: The bundle's tokens are not made for this LLM.
        """
        self.check(tokens)
        return side_of(
            self.name,
            self.config,
            self.tokenizer,
            template=self.template,
            template_home=self.template_home,
            ends=self.ends,
            tokens=tokens,
        )

    def check(self, tokens: TokenSpec | None) -> None:
        """Check what is known before tokenizer and template are run; see `side`."""
        kind, llm = self.config.model_type, self.config.get_text_config().model_type
        placeholders = placeholder_ids(self.config)
        if "image" not in placeholders:
            raise CheckpointError(
                f"{self.name}: {self.model!r} is a {kind!r} model with a {llm!r} LLM and no image "
                "token",
                expected="a LLaVA of transformers",
                cure="give a whole llava-hf checkpoint",
            )
        added = map(str, self.tokenizer.added_tokens_decoder.values())
        own = ", ".join(sorted(TURN_TOKENS.intersection(added)))
        if self.template is None and (own or llm not in _LLAVA_15_WORDS.get(kind, ())):
            raise CheckpointError(
                f"{self.name}: {self.model!r} has no chat template, which a {kind!r} model with "
                f"a {llm!r} LLM{f' and the tokens {own}' if own else ''} needs",
                cause="without it the LLM would be asked in words that it was not trained with",
                cure="fetch chat_template.json or chat_template.jinja of the published checkpoint",
            )
        if tokens is not None:
            tokens.check_llm(
                self.name,
                model=self.model,
                hidden_size=int(self.config.get_text_config().hidden_size),
                placeholders=placeholders,
            )


@dataclass(frozen=True)
class TextCheckpoint(TextSide):
    """The text side of a checkpoint whose LLM something else runs.

    Attributes:
        files: What was read of it.
        dtype: The checkpoint's, of `LARGEST`.
    """

    files: TextFiles
    dtype: str

    @classmethod
    @door(
        CheckpointError,
        "{name}: the text side of '{model}' can't be read",
        cure=_GIVE_WHOLE,
    )
    def open(
        cls,
        name: str,
        model: str | Path,
        *,
        tokens: TokenSpec | None = None,
        revision: str | None = None,
    ) -> TextCheckpoint:
        """Read a checkpoint's configuration and tokenizer.

        Args:
            name: The LLM's name, for messages.
            model: An alias (``demo``), a hub id or a local folder.
            tokens: What the bundle says about its tokens, from `TokenSpec.of`.
            revision: Commit on the hub.

        Raises:
            MissingDependencyError: transformers is not installed.
            CheckpointError: As for `TextFiles.read` and `TextFiles.side`.
            InvalidInputError: The bundle's tokens are not made for this LLM.
        """
        files = TextFiles.read(name, model, revision)
        side = files.side(tokens)
        # As text: transformers gives torch's dtype where torch is, else the name.
        dtype = str(files.config.dtype).removeprefix("torch.")
        if dtype not in LARGEST:
            raise CheckpointError(
                f"{name}: the dtype of {str(model)!r} is {dtype!r}",
                expected=f"one of {', '.join(LARGEST)}",
                cure="repair its config.json",
            )
        return cls(**vars(side), files=files, dtype=dtype)


def side_of(
    name: str,
    config: Any,
    tokenizer: Any,
    *,
    template: str | None,
    template_home: str = "",
    ends: Sequence[int],
    tokens: TokenSpec | None,
) -> TextSide:
    """Return the text side of transformers' own objects.

    Args:
        name: The LLM's name, for messages.
        config: A LLaVA's configuration.
        tokenizer: Its tokenizer.
        template: Its chat template, or ``None`` for LLaVA-1.5's words.
        template_home: The file that it stands in, for messages.
        ends: Ids that end an answer, beside the tokenizer's own.
        tokens: What the bundle says about its tokens; None to take any number.

    Raises:
        CheckpointError: The tokenizer does not belong to a LLaVA, or the template is not one's.
    """
    prompts = make_prompts(name, tokenizer, placeholder_ids(config), template, home=template_home)
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    return TextSide(
        name=name,
        prompts=prompts,
        eos_ids=prompts.ends | frozenset(ends),
        hidden_size=int(text.hidden_size),
        context=None if context is None else int(context),
        tokens=tokens,
    )


def placeholder_ids(config: Any) -> dict[Kind, int]:
    """Return the id of the placeholder of an image; and of a video, if there is one."""
    ids = {kind: getattr(config, f"{kind}_token_index", None) for kind in KINDS}
    return {kind: int(token_id) for kind, token_id in ids.items() if token_id is not None}


def listed_ids(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return what a configuration says of ids, which is a list, one, or nothing."""
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(map(int, ids))


def fetch(name: str, model: str | Path, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Return the local folder of a checkpoint, downloading what of it is not there yet.

    Args:
        name: The LLM's name, for messages.
        model: An alias, a hub id or a local folder.
        revision: Commit on the hub.
        patterns: Of the files that are needed.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        CheckpointError: There is no such checkpoint, or the hub can't be reached and the cache
            does not hold it.
    """
    location = locate(str(model))
    if location.folder is not None:
        return location.folder
    assert location.hub_id is not None
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise missing("huggingface_hub", needed_for="a hub model", extra="export") from error
    try:
        return Path(
            snapshot_download(location.hub_id, revision=revision, allow_patterns=list(patterns))
        )
    except Exception as error:  # its HTTP library's classes change between versions
        wanted = location.hub_id if revision is None else f"{location.hub_id} at {revision}"
        raise CheckpointError(
            f"{name}: the LLM {wanted} is neither in the local cache nor to be had from the hub "
            f"({first_line(error)})",
            cure="connect to the network, or give a local folder (--llm)",
        ) from error


def _check_attention(name: str, model: str, config: Any) -> None:
    """Refuse an attention of the hub, which transformers downloads and runs as code."""
    for part in (config, config.get_text_config(), getattr(config, "vision_config", None)):
        attention = getattr(part, "_attn_implementation", None)
        if "/" in str(attention):
            raise CheckpointError(
                f"{name}: config.json of {model!r} names the attention {attention!r}",
                expected="one that transformers has, or none",
                cause="it is code of the hub, which vzip never runs",
                cure="take 'attn_implementation' out of config.json",
            )


def _check_files(name: str, folder: Path) -> None:
    """Refuse a file that transformers would read into all memory."""
    for path in sorted({path for pattern in TEXT_FILES for path in folder.glob(pattern)}):
        if path.is_file() and path.stat().st_size > _LARGEST_FILE:
            raise CheckpointError(
                f"{name}: '{path}' has {path.stat().st_size} bytes",
                expected=f"at most {_LARGEST_FILE}",
                cause="no configuration or tokenizer is that large",
                cure="give a whole llava-hf checkpoint",
            )


def _check_numbers(name: str, folder: Path) -> None:
    """Refuse sizes that no model has, before transformers loops over them."""
    try:
        config = json.loads(read_text(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong with it
    if isinstance(config, dict):
        try:
            check_numbers(config)
        except CheckpointError as error:
            raise CheckpointError(
                f"{name}: '{folder}': {error.got}",
                expected=error.expected,
                cause=error.cause,
                cure=error.cure,
            ) from error


def _template(
    name: str, folder: Path, processor: Mapping[str, Any], tokenizer: Any
) -> tuple[str | None, str]:
    """Return the chat template and its file, of which transformers prefers the processor's.

    Raises:
        CheckpointError: There are several by names, and none that is the default; or it is no text.
    """
    raw, old = "chat_template.jinja", "chat_template.json"
    old = old if (folder / old).is_file() else "processor_config.json"
    named: list[str] = []
    for found, file in (
        (processor.get("chat_template"), old),
        (tokenizer.chat_template, "tokenizer_config.json"),
    ):
        home = raw if (folder / raw).is_file() else file
        template = found.get("default") if isinstance(found, dict) else found
        if isinstance(template, str):
            return template or None, home if template else ""
        if template is not None:
            raise CheckpointError(
                f"{name}: the LLM's chat template in {home} of '{folder}' is a "
                f"{type(template).__name__}",
                expected="a text, in Jinja",
                cure=f"repair {home}",
            )
        named += map(str, found or ())
    if named:
        raise CheckpointError(
            f"{name}: the LLM in '{folder}' has the chat templates {', '.join(sorted(set(named)))}",
            expected="one that is called 'default'",
            cure="write the one that is meant as chat_template.jinja",
        )
    return None, ""


def _ends(folder: Path, config: Any) -> tuple[int, ...]:
    """Return the ids that generation_config.json says end an answer; without it, config.json."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return listed_ids(getattr(config.get_text_config(), "eos_token_id", None))
    return listed_ids(json.loads(read_text(path)).get("eos_token_id"))
