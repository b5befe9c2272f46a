"""A tokenizer of transformers as the vocabulary of a GGUF: byte-level BPE or SentencePiece.

What is read is the pipeline that transformers runs, not the checkpoint's files: transformers builds
some tokenizers anew, whatever their ``tokenizer.json`` says. llama.cpp has the pipelines built in,
so one that it would run differently is refused. Which form it takes, and how it runs it, is from
llama.cpp's ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from vzip.runtime.errors import CheckpointError
from vzip.runtime.llm.local.gguf_model import SpacePrefix

if TYPE_CHECKING:
    from gguf import SpecialVocab

_MARK: Final = "\u2581"  # SentencePiece's sign for a space
_PROBE: Final = "a b"

# Regular expressions that split text into words → llama.cpp's name for them.
_QWEN2: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: Final[Mapping[str, str]] = {_QWEN2: "qwen2"}
_GPT2: Final = "gpt-2"  # that of ByteLevel(use_regex=True)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says about a tokenizer.

    Attributes:
        model: ``gpt2`` for byte-level BPE, ``llama`` for SentencePiece.
        pre: llama.cpp's name of how text is split into words.
        tokens: Text of every id; as many as the embeddings have rows.
        types: gguf's `TokenType` of every id.
        scores: SentencePiece alone: pieces of a higher score are made first.
        special: gguf's record of bos, eos, unk and pad, of whether a sequence begins with bos, and
            of byte-level BPE's merges.
        space_prefix: SentencePiece: which texts get a space in front.
        nfc: Whether text is brought into Unicode's form NFC first.
    """

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    special: SpecialVocab
    space_prefix: SpacePrefix
    nfc: bool


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Return a tokenizer as a vocabulary.

    Ids without a token, which embeddings that were padded have, get a name that no text matches.
    Tokens beyond the embeddings are left out; LLaVAs have placeholders there.

    Args:
        tokenizer: A tokenizer of transformers.
        rows: How many rows the LLM's embeddings have.

    Raises:
        CheckpointError: llama.cpp would make other ids of some text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(f"a {type(tokenizer).__name__}, which is no fast tokenizer")
    pipeline = json.loads(backend.to_str())
    model = pipeline["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("ignore_merges"):
        raise _unknown(f"a model of type {model['type']}, or with dropout or ignored merges")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _unknown("word pieces with a prefix or a suffix")
    merges = [_pair(merge) for merge in model["merges"]]
    added = {entry["id"]: entry for entry in pipeline["added_tokens"]}
    table: dict[int, str] = {token_id: text for text, token_id in model["vocab"].items()}
    table |= {token_id: entry["content"] for token_id, entry in added.items()}
    learned = {text: i for text, i in model["vocab"].items() if i not in added}
    parts = _ByteLevel.of(pipeline) or _SentencePiece.of(pipeline, learned)
    if parts is None:
        raise _unknown(_described(pipeline))
    parts.check(learned, merges)
    _check_added(tokenizer, added)
    unk = model["vocab"].get(model.get("unk_token"))
    tokens = [table.get(i, f"[PAD{i}]") for i in range(rows)]
    return Vocabulary(
        model=parts.model,
        pre=parts.pre,
        tokens=tokens,
        types=[_type(i, table, added, parts, unk) for i in range(rows)],
        scores=_scores(tokens, merges) if parts.model == "llama" else [],
        special=_special(tokenizer, pipeline, rows, merges=parts.model == "gpt2"),
        space_prefix=parts.space_prefix,
        nfc=parts.nfc,
    )


@dataclass(frozen=True)
class _ByteLevel:
    """Byte-level BPE: each byte is a letter, and words are made of letters by merges."""

    pre: str
    nfc: bool
    model: Literal["gpt2"] = "gpt2"
    space_prefix: SpacePrefix = "none"

    @classmethod
    def of(cls, pipeline: Mapping[str, Any]) -> _ByteLevel | None:
        """Recognise it; None where it is another."""
        if (pipeline["decoder"] or {}).get("type") != "ByteLevel":
            return None
        normalizers = [each["type"] for each in _parts(pipeline["normalizer"], "normalizers")]
        steps = _parts(pipeline["pre_tokenizer"], "pretokenizers")
        *splits, last = steps or [{"type": None}]
        if (
            last["type"] != "ByteLevel"
            or last["add_prefix_space"]
            or normalizers not in ([], ["NFC"])
        ):
            return None
        nfc = normalizers == ["NFC"]
        if not splits:
            return cls(_GPT2, nfc) if last["use_regex"] else None
        only, *more = splits
        if more or only["type"] != "Split" or last["use_regex"]:
            return None
        isolated = only["behavior"] == "Isolated" and not only["invert"]
        pre = _SPLITS.get(only["pattern"].get("Regex", ""))
        return cls(pre, nfc) if isolated and pre is not None else None

    def check(self, learned: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        """Refuse a vocabulary in which a byte is missing: llama.cpp drops it without a word."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        absent = [letter for letter in bytes_to_unicode().values() if letter not in learned]
        if absent:
            raise _unknown(f"byte-level BPE without {len(absent)} of the 256 bytes")
        if not merges:
            raise _unknown("byte-level BPE without merges")


@dataclass(frozen=True)
class _SentencePiece:
    """Llama's SentencePiece as BPE: of two neighbours that make a piece, the best piece is made."""

    space_prefix: SpacePrefix
    model: Literal["llama"] = "llama"
    pre: str = "default"
    nfc: bool = False

    @classmethod
    def of(cls, pipeline: Mapping[str, Any], learned: Iterable[str]) -> _SentencePiece | None:
        """Recognise one of its two forms; None where it is another."""
        normalizers = _parts(pipeline["normalizer"], "normalizers")
        steps = _parts(pipeline["pre_tokenizer"], "pretokenizers")
        if not pipeline["model"].get("byte_fallback"):
            return None
        # Splitting at spaces changes nothing where no piece goes on behind one.
        if any(_MARK in piece[1:] for piece in learned) and any(map(_divides, steps)):
            return None
        space = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
        prepend = {"type": "Prepend", "prepend": _MARK}
        kinds = [step["type"] for step in steps]
        if normalizers == [prepend, space] and all(map(_divides, steps)):
            return cls("each")
        if normalizers == [space] and not steps:
            return cls("none")
        if not normalizers and kinds == ["Metaspace"] and steps[0]["replacement"] == _MARK:
            schemes: dict[str, SpacePrefix] = {
                "always": "missing", "first": "first", "never": "none",
            }  # fmt: skip
            return cls(schemes[steps[0]["prepend_scheme"]])
        return None

    def check(self, learned: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        """Refuse merges that aren't all those of SentencePiece, and a missing byte.

        llama.cpp joins any two neighbours that make a token; it knows no merges.
        """
        absent = [text for text in map(_byte, range(256)) if text not in learned]
        if absent:
            raise _unknown(f"SentencePiece without {len(absent)} of the 256 bytes")
        listed = set(merges)
        spaces = _MARK + _MARK  # its score is 0, which old converters took for none
        for text in learned:
            for place in range(1, len(text)):
                pair = text[:place], text[place:]
                if pair not in listed and pair[0] in learned and pair[1] in learned:
                    if text == spaces:
                        continue
                    raise _unknown(f"merges that leave out {' + '.join(pair)!r}")


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Return scores that order SentencePiece's pieces as its merges do; never made ones are last.

    A merge of two spaces may be lacking; it is the first of Llama's.
    """
    ranks: dict[str, int] = {_MARK + _MARK: 0}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank + 1)
    return [-float(ranks.get(text, len(merges) + 1)) for text in tokens]


def _type(
    token_id: int,
    table: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    parts: _ByteLevel | _SentencePiece,
    unk: int | None,
) -> int:
    """Return gguf's `TokenType` of an id."""
    from gguf import TokenType

    if token_id not in table:
        return int(TokenType.UNUSED)
    if parts.model == "llama":
        if token_id == unk:
            return int(TokenType.UNKNOWN)
        if token_id not in added and table[token_id] in _BYTES:
            return int(TokenType.BYTE)
    if token_id in added:
        return int(TokenType.CONTROL if added[token_id]["special"] else TokenType.USER_DEFINED)
    return int(TokenType.NORMAL)


def _check_added(tokenizer: Any, added: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse added tokens that are more than their text, wherever it stands."""
    for token_id, entry in added.items():
        text = entry["content"]
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if entry[flag]]
        if flags or tokenizer(text, add_special_tokens=False).input_ids != [token_id]:
            raise _unknown(f"the added token {text!r} ({' and '.join(flags) or 'normalized'})")


def _special(
    tokenizer: Any, pipeline: Mapping[str, Any], rows: int, *, merges: bool
) -> SpecialVocab:
    """Return gguf's record of the special tokens, and of the merges if they are wanted."""
    import gguf

    add_bos = _adds_bos(tokenizer)
    kinds = ("bos", "eos", "unk", "pad")
    # gguf reads files alone, and warns of a post-processor that it only guesses at.
    files = {
        "tokenizer.json": {**pipeline, "post_processor": None},
        "tokenizer_config.json": {
            f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in kinds
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_text(json.dumps(content), encoding="utf-8")
        special = gguf.SpecialVocab(folder, load_merges=merges, special_token_types=kinds)
    ids = special.special_token_ids
    special.special_token_ids = {name: each for name, each in ids.items() if each < rows}
    special.add_special_token = {"bos": add_bos, "eos": False}
    special.chat_template = None  # `vzip.words` says it to those who have no Jinja
    return special


def _adds_bos(tokenizer: Any) -> bool:
    """Return whether a sequence begins with bos.

    Raises:
        CheckpointError: Something else is put around it.
    """
    plain, full = (
        tokenizer(_PROBE, add_special_tokens=special).input_ids for special in (False, True)
    )
    if full == plain:
        return False
    if full != [tokenizer.bos_token_id, *plain]:
        raise _unknown("special tokens around a text that are not one bos in front")
    return True


def _parts(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Return the steps of a part of a pipeline."""
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _divides(step: Mapping[str, Any]) -> bool:
    """Return whether a step divides text at spaces, each going with what follows it."""
    if step["type"] == "Metaspace":
        return bool(step["split"])
    if step["type"] != "Split":
        return False
    return (step["pattern"], step["behavior"]) == ({"String": _MARK}, "MergedWithNext")


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _byte(value: int) -> str:
    return f"<0x{value:02X}>"


_BYTES: Final = frozenset(map(_byte, range(256)))


def _described(pipeline: Mapping[str, Any]) -> str:
    names = {
        part: [step["type"] for step in _parts(pipeline[part], key)]
        for part, key in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))
    }
    return f"normalizer {names['normalizer']} and pre-tokenizer {names['pre_tokenizer']}"


def _unknown(what: str) -> CheckpointError:
    return CheckpointError(
        f"convert: the tokenizer has {what}",
        expected="Llama's SentencePiece, or byte-level BPE with GPT-2's or Qwen2's words",
        cause="llama.cpp would make other tokens of a text",
        cure="make the GGUF with llama.cpp's own convert_hf_to_gguf.py, if that knows it",
    )
