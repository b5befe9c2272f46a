"""Compressed tokens into the LLaVAs of transformers, each with the class of its family.

The tokens go in by ``inputs_embeds`` (any version of transformers): the prompt's token embeddings,
with the rows of as many placeholders overwritten. The prompt is never expanded by the family's
processor, which always writes one placeholder per patch. A conversation keeps the KV cache, so that
a later question costs neither vision nor a prefill of what came before it.

An image has one placeholder in the chat template. A video has one of its own where the LLM knows
videos; where it doesn't, its frames are images that follow each other, each with its placeholder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from vzip.runtime.errors import (
    BackendError,
    CheckpointError,
    InvalidInputError,
    missing,
)
from vzip.runtime.handoff import (
    DEFAULT_MAX_NEW_TOKENS,
    ImageTokens,
    check_context,
    check_embeds,
    check_max_new_tokens,
    check_placeholders,
    check_question,
)
from vzip.runtime.models import locate

if TYPE_CHECKING:
    import torch

    from vzip.runtime.handoff import Embeds

NAME = "transformers"

CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "llava": "LlavaForConditionalGeneration",
        "vipllava": "VipLlavaForConditionalGeneration",
        "llava_next": "LlavaNextForConditionalGeneration",
        "video_llava": "VideoLlavaForConditionalGeneration",
        "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    }
)
"""A configuration's ``model_type`` → the class of transformers that runs it."""

# Families, and their LLMs, that were trained with LLaVA-1.5's words; others need a chat template.
_LLAVA_15_WORDS = {"llava": ("llama", "mistral"), "video_llava": ("llama",)}

# Modules that are the bundle's business, and may be absent.
_VISION = ("vision_tower", "image_tower", "video_tower", "multi_modal_projector", "image_newline")

_Kind = Literal["image", "video"]

# Stands for an answer while the chat template is asked what follows one.
_ANSWER_MARK = "(the answer)"

_MISTYPED_EOS = "<\\s>"


class Prompts:
    r"""Questions as token ids, in the words that the LLM was trained with.

    They come from the checkpoint's chat template; without one they are LLaVA-1.5's
    ``USER: <image>\n{question} ASSISTANT:`` and, for later turns, ``USER: {question} ASSISTANT:``.

    Args:
        tokenizer: The checkpoint's tokenizer.
        image_token_id: Id of an image's placeholder.
        template: The chat template, in Jinja, or ``None``.
        video_token_id: Id of a video's placeholder; ``None`` if the LLM has none.

    Raises:
        CheckpointError: The tokenizer has no such placeholder or no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_token_id: int,
        template: str | None,
        video_token_id: int | None = None,
    ) -> None:
        # Kind → (text, id) of its placeholder.
        self._placeholders: dict[_Kind, tuple[str, int]] = {}
        for kind, token_id in _kinds(image_token_id, video_token_id):
            token = tokenizer.convert_ids_to_tokens(token_id)
            if token is None or tokenizer.eos_token is None:
                lacks = "end-of-sequence token" if token else f"token of id {token_id}"
                raise CheckpointError(
                    f"{NAME}: the LLM's tokenizer has no {lacks}, which a LLaVA checkpoint has; "
                    "the tokenizer's files are another model's or incomplete: fetch the checkpoint "
                    "again"
                )
            self._placeholders[kind] = token, token_id
        self.eos_id = int(tokenizer.eos_token_id)
        self._tokenizer = tokenizer
        self._template = template

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Ids of all placeholders."""
        return tuple(token_id for _, token_id in self._placeholders.values())

    def places(self, frames: int | None) -> tuple[int, int]:
        """Return the placeholder's id, and how many of them the first turn has.

        Args:
            frames: Frames of the video; ``None`` for an image.
        """
        kind, count = self._media(frames)
        return self._placeholders[kind][1], count

    def first(self, question: str, frames: int | None = None) -> list[int]:
        """Return the first turn's ids, with the placeholders that `places` counts.

        Raises:
            InvalidInputError: The prompt has more or fewer placeholders.
        """
        kind, count = self._media(frames)
        if self._template is None:
            places = count * (self._placeholders[kind][0] + "\n")
            text = f"USER: {places}{question} ASSISTANT:"
        else:
            text = self._render([_user(question, count * [kind])])
        bos = self._tokenizer.bos_token
        # A template may write the beginning-of-sequence token itself; once is right.
        written = bos is not None and text.startswith(bos)
        return self._checked(self._encode(text, special=not written), {kind: count})

    def later(self, question: str, frames: int | None = None) -> list[int]:
        """Return the ids of a later turn, which follow the end-of-sequence token of the answer.

        Raises:
            InvalidInputError: The question contains a placeholder.
        """
        eos: str = self._tokenizer.eos_token
        if self._template is None:
            text = f"USER: {question} ASSISTANT:"
        else:
            kind, count = self._media(frames)
            turns = [
                _user("(the question)", count * [kind]),
                {"role": "assistant", "content": [{"type": "text", "text": _ANSWER_MARK}]},
                _user(question, []),
            ]
            _, mark, text = self._render(turns).partition(_ANSWER_MARK)
            if not mark:
                raise CheckpointError(
                    f"{NAME}: the LLM's chat template drops the assistant's turns, so it serves "
                    "one question only; use 'vzip ask', or repair chat_template.jinja"
                )
            # The answer ends with eos, whether the template writes it (then what follows it is
            # meant, white space included), mistypes it (llava-hf's LLaVA-NeXT with Mistral) or
            # leaves it out (published LLaVA-1.5: a blank in its place).
            text = text.lstrip()
            text = text.removeprefix(eos if text.startswith(eos) else _MISTYPED_EOS)
        # Encoded as it stands in the whole conversation: a word after a special token can be
        # another id than the same word at the beginning of a text.
        ids = self._encode(eos + text, special=False)
        return self._checked(ids[1:], {})

    def decode(self, ids: list[int]) -> str:
        """Return an answer's text, without special tokens and white space around it."""
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.strip()

    def _render(self, messages: list[dict[str, Any]]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        return text

    def _encode(self, text: str, *, special: bool) -> list[int]:
        # verbose=False: no warning beyond model_max_length, since we check the context ourselves
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        return ids

    def _media(self, frames: int | None) -> tuple[_Kind, int]:
        """Return what stands in the first turn, and how often."""
        if frames is None:
            return "image", 1
        return ("video", 1) if "video" in self._placeholders else ("image", frames)

    def _checked(self, ids: list[int], expected: Mapping[_Kind, int]) -> list[int]:
        for kind, (token, token_id) in self._placeholders.items():
            check_placeholders(
                NAME,
                ids,
                kind=kind,
                token=token,
                token_id=token_id,
                expected=expected.get(kind, 0),
            )
        return ids


def _kinds(image_token_id: int, video_token_id: int | None) -> list[tuple[_Kind, int]]:
    """Return the kinds of placeholders that an LLM has, and their ids."""
    kinds: list[tuple[_Kind, int]] = [("image", image_token_id)]
    return kinds if video_token_id is None else [*kinds, ("video", video_token_id)]


def _user(question: str, media: Sequence[_Kind]) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": kind} for kind in media]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


class TransformersConversation:
    """Questions about one image or video; the KV cache of all turns is kept between them.

    Decoding is greedy: the most probable token each time, until an end-of-sequence token or
    `max_new_tokens`. An answer cut short by that limit, or by the caller who stops reading it, is
    closed by an end-of-sequence token before the next question, as in LLaVA's training.

    Made by `TransformersLLM.conversation`.
    """

    def __init__(self, llm: TransformersLLM, image: torch.Tensor, frames: int | None) -> None:
        from transformers import DynamicCache

        self._llm = llm
        self._image = image  # [n, L], the LLM's dtype
        self._frames = frames
        self._cache: Any = DynamicCache()
        self._ids: list[int] = []  # what the cache holds
        self._next: int | None = None  # predicted, and not in the cache yet
        self._turn = 0
        self._intact = True

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of all tokens in the KV cache, among them a placeholder for each row."""
        return tuple(self._ids)

    def ask(self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS) -> str:
        """Return the answer to the next question; see `stream`."""
        return "".join(self.stream(question, max_new_tokens=max_new_tokens))

    def stream(
        self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    ) -> Iterator[str]:
        """Ask the next question.

        The checks are made by this call; the LLM runs as the pieces are taken.

        Args:
            question: The question, without any prompt around it.
            max_new_tokens: Longest answer, in tokens.

        Returns:
            The pieces of the answer, none of which splits a character; without white space
            around the whole.

        Raises:
            InvalidInputError: The question is empty, contains a placeholder, or does not fit into
                the LLM's context with the turns before it.
            BackendError: The conversation was broken by a call that failed; or (from the
                iterator) the LLM failed.
        """
        check_question(NAME, question)
        check_max_new_tokens(NAME, max_new_tokens)
        if not self._intact:
            raise BackendError(
                f"{NAME}: an earlier call of this conversation failed halfway, so its KV cache "
                "can't be continued; begin a new conversation"
            )
        prompts, ids = self._llm.prompts, list[int]()
        if self._ids:
            if self._next is not None:
                ids.append(self._next)
            if self._next not in self._llm.eos_ids:
                ids.append(prompts.eos_id)
            ids += prompts.later(question.strip(), self._frames)
        else:
            placeholder, places = prompts.places(self._frames)
            for token in prompts.first(question.strip(), self._frames):
                ids += [token] * (len(self._image) // places if token == placeholder else 1)
        check_context(
            NAME,
            cached=len(self._ids),
            new=len(ids),
            max_new_tokens=max_new_tokens,
            context=self._llm.context,
        )
        self._turn += 1
        return self._pieces(ids, max_new_tokens, self._turn)

    def _pieces(self, ids: list[int], max_new_tokens: int, turn: int) -> Iterator[str]:
        """Feed a prompt, then its answer token by token, and yield the answer's text."""
        answer: list[int] = []
        shown = ""
        while len(answer) < max_new_tokens:
            if turn != self._turn:
                raise InvalidInputError(
                    f"{NAME}: this answer was left behind by a later question of the same "
                    "conversation; read an answer to its end before asking on"
                )
            token = self._feed(ids)
            if token in self._llm.eos_ids:
                break
            answer.append(token)
            ids = [token]
            text = self._llm.prompts.decode(answer)
            # U+FFFD at the end is the beginning of a character whose other bytes follow.
            if text.startswith(shown) and len(text) > len(shown) and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        text = self._llm.prompts.decode(answer)
        if len(text) > len(shown):
            yield text[len(shown) :]

    def _feed(self, ids: list[int]) -> int:
        """Put tokens into the cache and return the most probable next one."""
        # Only the first prompt has places for it: a placeholder that the LLM says is a mere word.
        image = None if self._ids else self._image
        self._intact = False  # until the cache is whole again
        self._next = None
        self._next = self._llm.step(ids, self._cache, image)
        self._ids += ids
        self._intact = True
        return self._next


class TransformersLLM:
    """A LLaVA of transformers that answers questions about compressed tokens.

    Attributes:
        name: ``transformers``.
        prompts: Its prompts.
        eos_ids: Ids that end an answer.
        hidden_size: L, the width of a token.
        context: Longest sequence in tokens; ``None`` when the configuration states none.
    """

    name = NAME

    def __init__(
        self, model: Any, tokenizer: Any, *, template: str | None, tokens: ImageTokens | None = None
    ) -> None:
        """Take a model that is already in memory; `open` is for those that are not.

        Args:
            model: A model of one of `CLASSES`.
            tokenizer: Its tokenizer.
            template: Its chat template, or ``None`` for LLaVA-1.5's prompt.
            tokens: What the bundle says about its tokens; ``None`` to take any number.

        Raises:
            InvalidInputError: The bundle's tokens are not made for this LLM.
            CheckpointError: The tokenizer does not belong to a LLaVA.
        """
        config = model.config
        text = config.get_text_config()
        if tokens is not None:
            _check_config(config, tokens, str(config.name_or_path or "given"))
        self._model = model.eval()
        self._tokens = tokens
        image, video = _placeholder_ids(config)
        self.prompts = Prompts(tokenizer, image, template, video)
        ends = model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.eos_ids = frozenset({self.prompts.eos_id, *map(int, listed)})
        self.hidden_size = int(text.hidden_size)
        context = getattr(text, "max_position_embeddings", None)
        self.context = None if context is None else int(context)

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        tokens: ImageTokens | None = None,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> TransformersLLM:
        """Load the LLM of a checkpoint.

        Configuration and tokenizer are read and compared with the bundle before any weight is.

        Args:
            model: An alias (``demo``), a hub id or a local folder, as for ``vzip export --model``.
            tokens: What the bundle says about its tokens, from `ImageTokens.of`.
            revision: Commit on the hub.
            device: torch's name of a device; ``auto`` is CUDA where there is a GPU, else the CPU.
            dtype: torch's name of a dtype; ``auto`` is the checkpoint's, except that float16
                becomes float32 on a CPU, where half precision is slow and rounds more.

        Raises:
            MissingDependencyError: torch or transformers is not installed.
            CheckpointError: The checkpoint was not found, is incomplete, is no LLaVA of
                transformers, or lacks the chat template that its family needs.
            InvalidInputError: The bundle's tokens are not made for this LLM.
        """
        try:
            import torch
            import transformers
        except ImportError as error:
            package = error.name or "transformers"
            raise missing(package, needed_for="answering questions", extra="export") from error
        folder = _fetch(model, revision, ("*.json", "*.jinja", "*.model"))
        with _reading(model):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            processor, _ = transformers.LlavaProcessor.get_processor_dict(
                folder, local_files_only=True
            )
        _check_architecture(config, str(model))
        template = processor.get("chat_template") or tokenizer.chat_template
        if isinstance(template, dict):
            template = template["default"]
        if template is None:
            _check_words(config, str(model))
        if tokens is not None:
            _check_config(config, tokens, str(model))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = _fetch(model, revision, ("*.json", "*.jinja", "*.model", "*.safetensors"))
        with _reading(model):
            llava, report = getattr(transformers, CLASSES[config.model_type]).from_pretrained(
                folder,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        # Tower and projector are the bundle's business; a hole in the LLM would be filled with
        # random numbers.
        lost = sorted(
            key for key in report["missing_keys"] if not any(part in key for part in _VISION)
        )
        if lost:
            raise CheckpointError(
                f"{NAME}: the checkpoint {str(model)!r} lacks {len(lost)} tensors of its LLM, "
                f"such as {lost[0]}; shards are missing or it is of another layout: give a whole "
                "llava-hf checkpoint (--llm)"
            )
        if dtype == "auto" and device == "cpu" and llava.dtype == torch.float16:
            llava = llava.float()
        return cls(llava.to(device), tokenizer, template=template, tokens=tokens)

    def conversation(
        self, embeds: Embeds, *, frames: int | None = None
    ) -> TransformersConversation:
        """Begin a conversation about one image or video.

        Args:
            embeds: Its tokens, float32 or float16 [n, L], in the bundle's order: what
                `VisionEncoder.image_embeds` or `video_embeds` returned.
            frames: How many frames the video has; ``None`` for an image.

        Raises:
            InvalidInputError: They are of another shape or dtype, not finite, or don't divide into
                frames where the LLM takes those as images.
        """
        import torch

        dtype = self._model.get_input_embeddings().weight.dtype
        check_embeds(
            NAME,
            embeds,
            hidden_size=self.hidden_size,
            count=None if self._tokens is None else self._tokens.rows(frames),
            frames=frames,
            largest=torch.finfo(dtype).max,
        )
        _, places = self.prompts.places(frames)
        if len(embeds) % places:
            raise InvalidInputError(
                f"{NAME}: got {len(embeds)} tokens of {places} frames, each of which is an image "
                "to this LLM; it takes as many of every frame, without a closing token"
            )
        # A copy, in the LLM's dtype: assigning to the embeddings would cast without saying so.
        image = torch.tensor(embeds).to(self._model.device, dtype)
        return TransformersConversation(self, image, frames)

    def stream(
        self,
        embeds: Embeds,
        question: str,
        *,
        frames: int | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> Iterator[str]:
        """Answer one question piece by piece; see `conversation` and its `stream`."""
        conversation = self.conversation(embeds, frames=frames)
        return conversation.stream(question, max_new_tokens=max_new_tokens)

    def ask(
        self,
        embeds: Embeds,
        question: str,
        *,
        frames: int | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> str:
        """Answer one question; see `conversation` and its `stream`."""
        conversation = self.conversation(embeds, frames=frames)
        return conversation.ask(question, max_new_tokens=max_new_tokens)

    def step(self, ids: list[int], cache: Any, image: torch.Tensor | None) -> int:
        """Run the LLM over new tokens.

        Args:
            ids: Their ids, [m]; at a placeholder stands a row of `image`, in order.
            cache: The KV cache of the tokens before them, which grows by m.
            image: Tokens of the image or video [n, L]; ``None`` where nothing is to be replaced.

        Returns:
            The most probable next id; the lower one of equals.

        Raises:
            BackendError: Out of memory, or a result that is not finite.
        """
        import torch

        with torch.inference_mode():
            new = torch.tensor([ids], device=self._model.device)  # [1, m]
            if image is None:
                embeds = self._model.get_input_embeddings()(new)  # [1, m, L]
            else:
                places = torch.isin(new, new.new_tensor(self.prompts.placeholder_ids))
                # A placeholder need not have a row of its own in the LLM's embeddings.
                embeds = self._model.get_input_embeddings()(new.masked_fill(places, 0))
                embeds[places] = image
            try:
                result = self._model(
                    inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            except torch.OutOfMemoryError as error:
                raise BackendError(
                    f"{NAME}: out of memory on {self._model.device} at "
                    f"{cache.get_seq_length() + len(ids)} tokens; begin a new conversation, free "
                    "memory, or use a bundle with fewer tokens per image"
                ) from error
            best, token = result.logits[0, -1].float().max(dim=-1)
            if not best.isfinite():  # NaN anywhere in the row is what max returns
                raise BackendError(
                    f"{NAME}: the LLM's output is not finite in {embeds.dtype}; open it with "
                    "dtype='float32'"
                )
        return int(token)


def _check_config(config: Any, tokens: ImageTokens, model: str) -> None:
    """Compare an LLM's configuration with what the bundle says."""
    image, video = _placeholder_ids(config)
    tokens.check_llm(
        NAME,
        model=model,
        hidden_size=int(config.get_text_config().hidden_size),
        image_token_id=image,
        video_token_id=video,
    )


def _placeholder_ids(config: Any) -> tuple[int, int | None]:
    """Return the ids of an image's and a video's placeholder; None if there is none of a video."""
    video = getattr(config, "video_token_index", None)
    return int(config.image_token_index), None if video is None else int(video)


def _check_architecture(config: Any, model: str) -> None:
    """Refuse what is not a LLaVA in transformers' layout."""
    architectures = config.architectures or []
    if CLASSES.get(config.model_type) not in architectures:
        raise CheckpointError(
            f"{NAME}: {model!r} is a {config.model_type!r} model ({', '.join(architectures)}), "
            f"but this engine takes a {', '.join(CLASSES.values())}; for a checkpoint in the "
            "original LLaVA layout give its llava-hf twin, such as --llm llava-1.5-7b"
        )


def _check_words(config: Any, model: str) -> None:
    """Refuse an LLM without a chat template that was not trained with LLaVA-1.5's words."""
    text = config.get_text_config().model_type
    if text not in _LLAVA_15_WORDS.get(config.model_type, ()):
        raise CheckpointError(
            f"{NAME}: {model!r} has no chat template, which a {config.model_type!r} model with a "
            f"{text!r} LLM needs; without it the LLM would be asked in words that it was not "
            "trained with: fetch chat_template.json or chat_template.jinja of the published "
            "checkpoint"
        )


def _fetch(model: str | Path, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Return the local folder of a checkpoint, downloading what of it is not there yet.

    Raises:
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
        folder = snapshot_download(
            location.hub_id, revision=revision, allow_patterns=list(patterns)
        )
    except Exception as error:  # its HTTP library's classes change between versions
        wanted = location.hub_id if revision is None else f"{location.hub_id} at {revision}"
        raise CheckpointError(
            f"{NAME}: the LLM {wanted} is neither in the local cache nor to be had from the hub "
            f"({_first_line(error)}); connect to the network, or give a local folder (--llm)"
        ) from error
    return Path(folder)


@contextlib.contextmanager
def _reading(model: str | Path) -> Iterator[None]:
    """Turn the libraries' errors about a checkpoint's files into one of ours."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{NAME}: the LLM {str(model)!r} can't be loaded ({_first_line(error)}); give a whole "
            "llava-hf checkpoint with its tokenizer (--llm)"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
