"""`vzip convert`: what is in the GGUF, and what is refused; llama.cpp itself isn't needed."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import TokenType
from safetensors.torch import load_file, save_file

from tests.refusals import refused
from tests.runtime.llm.tiny_checkpoints import (
    BYTES,
    CHAT_ML,
    MARK,
    all_merges,
    pieces,
    qwen2,
    save_checkpoint,
    sentencepiece,
)
from vzip.export.llm.gguf import convert
from vzip.export.llm.gguf_tensors import Sizes
from vzip.export.llm.gguf_vocab import read_vocabulary
from vzip.runtime import demo
from vzip.runtime.cli.main import main
from vzip.runtime.errors import CheckpointError, InvalidInputError
from vzip.runtime.files import atomic, codec
from vzip.runtime.llm.prompts import Words, llava_15_words


def read(path: Path) -> tuple[dict, dict[str, np.ndarray], dict[str, object]]:
    """Values, tensors and their types, as the package gguf reads them."""
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    return values, tensors, {t.name: t.tensor_type for t in reader.tensors}


def unpaired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo the order of llama.cpp's rotary pairs, row by row."""
    size = len(weight) // heads
    back = np.empty_like(weight)
    for head in range(heads):
        for i in range(size // 2):
            back[head * size + i] = weight[head * size + 2 * i]
            back[head * size + size // 2 + i] = weight[head * size + 2 * i + 1]
    return back


@pytest.fixture(scope="module")
def of_demo(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    convert("demo", path)
    return path, *read(path)


def test_the_demo_says_what_it_is(of_demo):
    _, values, _, _ = of_demo
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "demo",
        "general.file_type": 1,
        "llama.vocab_size": 431,
        "llama.context_length": 1024,
        "llama.embedding_length": 128,
        "llama.block_count": 4,
        "llama.feed_forward_length": 352,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "vzip.image_token_id": 4,
        "vzip.eos_token_ids": "[2]",
    }
    assert {key: values.get(key) for key in expected} == expected
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "vzip.video_token_id" not in values
    assert codec.read(Words, json.loads(values["vzip.words"])) == llava_15_words()


def test_the_demo_has_its_tokens(of_demo):
    _, values, _, _ = of_demo
    stored = json.loads((demo.checkpoint() / "tokenizer.json").read_text())
    vocabulary = {i: text for text, i in stored["model"]["vocab"].items()}
    assert values["tokenizer.ggml.tokens"] == [vocabulary[i] for i in range(431)]
    types = values["tokenizer.ggml.token_type"]
    assert types == [TokenType.CONTROL] * 5 + [TokenType.NORMAL] * 426
    merges = [" ".join(m) for m in stored["model"]["merges"]]
    assert values["tokenizer.ggml.merges"] == merges
    assert len(merges) > 100


def test_the_demo_has_its_tensors(of_demo):
    _, _, tensors, types = of_demo
    stored = load_file(demo.checkpoint() / "model.safetensors")
    llm = {k: v.numpy() for k, v in stored.items() if k.startswith("language_model.")}
    names = {
        "token_embd": "language_model.model.embed_tokens",
        "output_norm": "language_model.model.norm",
        "output": "language_model.lm_head",
    }
    for layer in range(4):
        names |= {
            f"blk.{layer}.{new}": f"language_model.model.layers.{layer}.{old}"
            for new, old in {
                "attn_norm": "input_layernorm",
                "attn_q": "self_attn.q_proj",
                "attn_k": "self_attn.k_proj",
                "attn_v": "self_attn.v_proj",
                "attn_output": "self_attn.o_proj",
                "ffn_norm": "post_attention_layernorm",
                "ffn_gate": "mlp.gate_proj",
                "ffn_up": "mlp.up_proj",
                "ffn_down": "mlp.down_proj",
            }.items()
        }
    assert {name.removesuffix(".weight") for name in tensors} == set(names)
    assert len(names) == len(llm)
    for new, old in names.items():
        got = tensors[f"{new}.weight"]
        if new.endswith(("attn_q", "attn_k")):
            got = unpaired(got, 4)
        expected = llm[f"{old}.weight"]
        kind = "F32" if expected.ndim == 1 else "F16"
        assert types[f"{new}.weight"].name == kind, new
        np.testing.assert_array_equal(got, expected.astype(got.dtype), err_msg=new)


def test_float32_stays_and_gqa_is_paired_by_its_own_heads(tmp_path):
    model = save_checkpoint(tmp_path / "llava", sentencepiece())
    values, tensors, types = converted(tmp_path / "llava")
    assert values["general.file_type"] == 0
    assert {kind.name for kind in types.values()} == {"F32"}
    assert values["llama.attention.head_count_kv"] == 2
    assert values["llama.rope.freq_base"] == 5000.0
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-5)
    attention = model.model.language_model.layers[1].self_attn
    for name, heads in (("q", 4), ("k", 2)):
        expected = getattr(attention, f"{name}_proj").weight.detach().numpy()
        got = unpaired(tensors[f"blk.1.attn_{name}.weight"], heads)
        np.testing.assert_array_equal(got, expected)


def test_bfloat16_stays(tmp_path):
    model = save_checkpoint(tmp_path / "llava", sentencepiece(), dtype=torch.bfloat16)
    values, tensors, types = converted(tmp_path / "llava")
    assert values["general.file_type"] == 32
    assert types["blk.0.ffn_up.weight"].name == "BF16"
    assert types["blk.0.ffn_norm.weight"].name == "F32"
    layer = model.model.language_model.layers[0]
    expected = layer.mlp.up_proj.weight.detach().view(torch.uint16).numpy()
    np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight"].view(np.uint16), expected)
    np.testing.assert_array_equal(
        tensors["blk.0.ffn_norm.weight"],
        layer.post_attention_layernorm.weight.detach().float().numpy(),
    )


def test_qwen2_with_tied_embeddings_and_padded_rows(tmp_path):
    tokenizer = qwen2()
    model = save_checkpoint(
        tmp_path / "llava", tokenizer, "qwen2", template=CHAT_ML, padding=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    values, tensors, _ = converted(tmp_path / "llava")
    assert values["general.architecture"] == "qwen2"
    assert values["tokenizer.ggml.pre"] == "qwen2"
    assert values["vzip.normalizer"] == "NFC"
    assert "output.weight" not in tensors
    bias = model.model.language_model.layers[0].self_attn.k_proj.bias.detach().numpy()
    np.testing.assert_array_equal(tensors["blk.0.attn_k.bias"], bias)
    rows = len(tokenizer) + 3
    assert tensors["token_embd.weight"].shape[0] == rows == values["qwen2.vocab_size"]
    assert values["tokenizer.ggml.tokens"][-3:] == [f"[PAD{i}]" for i in range(rows - 3, rows)]
    assert values["tokenizer.ggml.token_type"][-4:] == [TokenType.CONTROL] + 3 * [TokenType.UNUSED]
    ids = {kind: tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in ("image", "video")}
    assert {kind: values[f"vzip.{kind}_token_id"] for kind in ids} == ids
    words = codec.read(Words, json.loads(values["vzip.words"]))
    assert words.first["video"].before == "<|im_start|>user "
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id


def test_within_a_sliding_window_it_needs_none(tmp_path):
    save_checkpoint(tmp_path / "llava", sentencepiece(), "mistral", sliding_window=300)
    values, _, _ = converted(tmp_path / "llava")
    assert values["general.architecture"] == "llama"
    assert values["llama.context_length"] == 300


@pytest.mark.parametrize(
    ("form", "prefix", "adds"), [("prepend", "each", True), ("always", "missing", True),
                                 ("first", "first", False), ("never", "none", False)],
)  # fmt: skip
def test_sentencepiece(form, prefix, adds, tmp_path):
    tokenizer = sentencepiece(form)
    save_checkpoint(tmp_path / "llava", tokenizer)
    values, _, _ = converted(tmp_path / "llava")
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["vzip.space_prefix"] == prefix
    assert values["tokenizer.ggml.add_space_prefix"] is adds
    texts = values["tokenizer.ggml.tokens"]
    types = dict(zip(texts, values["tokenizer.ggml.token_type"], strict=True))
    assert [types[t] for t in ("<unk>", "<s>", "<image>", "<0x0A>", MARK)] == [
        TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE, TokenType.NORMAL,
    ]  # fmt: skip
    scores = dict(zip(texts, values["tokenizer.ggml.scores"], strict=True))
    made = [text for text in pieces() if len(text) > 1]
    assert sorted(made, key=scores.__getitem__, reverse=True) == made
    assert len({scores[text] for text in made}) == len(made)
    assert max(scores[t] for t in (MARK, "a", "</s>")) < min(scores[text] for text in made)


def test_the_merge_of_two_spaces_may_be_lacking():
    spaces = (MARK, MARK)
    merges = [pair for pair in all_merges(pieces()) if pair != spaces]
    tokenizer = sentencepiece(merges=merges)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    best = max(range(len(tokenizer)), key=vocabulary.scores.__getitem__)
    assert vocabulary.tokens[best] == MARK * 2


def test_merges_that_are_not_sentencepieces_are_refused():
    merges = all_merges(pieces())
    dropped = next(pair for pair in merges if set("".join(pair)) != {MARK})
    merges.remove(dropped)
    tokenizer = sentencepiece(merges=merges)
    with refused(CheckpointError, got="merges that leave out", cure="convert_hf_to_gguf.py"):
        read_vocabulary(tokenizer, len(tokenizer))


def edited(tokenizer, change):
    """The tokenizer with another pipeline."""
    import tokenizers

    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    change(pipeline)
    tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(pipeline))
    return tokenizer


def drop_byte(pipeline):
    del pipeline["model"]["vocab"][BYTES[200]]
    pipeline["model"]["vocab"]["filler"] = 203


S, Q = sentencepiece, qwen2
BOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}
DIGITS = {"pattern": {"Regex": r"\p{N}{1,3}"}}


@pytest.mark.parametrize(
    ("make", "change", "got"),
    [
        (S, drop_byte, "SentencePiece without 1 of the 256 bytes"),
        (S, lambda p: p["post_processor"]["single"].append(BOS), "not one bos in front"),
        (S, lambda p: p["added_tokens"][-1].update(lstrip=True), "'<pad>' (lstrip)"),
        (S, lambda p: p.update(normalizer={"type": "NFKC"}), "['NFKC']"),
        (S, lambda p: p["model"].update(byte_fallback=False), "['Prepend', 'Replace"),
        (S, lambda p: p["model"].update(dropout=0.1), "dropout"),
        (Q, lambda p: p["pre_tokenizer"]["pretokenizers"][0].update(DIGITS), "['Split', 'ByteL"),
        (Q, lambda p: p["model"].update(merges=[]), "without merges"),
        (Q, lambda p: p["model"].update(end_of_word_suffix="@"), "suffix"),
    ],
)
def test_a_tokenizer_that_llama_cpp_runs_differently_is_refused(make, change, got):
    tokenizer = edited(make(), change)
    with refused(CheckpointError, got=got):
        read_vocabulary(tokenizer, len(tokenizer))


def test_tokens_beyond_the_embeddings_are_left_out():
    tokenizer = sentencepiece()
    vocabulary = read_vocabulary(tokenizer, len(tokenizer) - 1)
    assert len(vocabulary.tokens) == len(vocabulary.types) == len(tokenizer) - 1
    assert "pad" not in vocabulary.special.special_token_ids


def converted(folder: Path) -> tuple[dict, dict[str, np.ndarray], dict[str, object]]:
    convert(folder, folder.parent / "out.gguf")
    return read(folder.parent / "out.gguf")


def refuses(folder: Path, expectation: AbstractContextManager) -> None:
    """Nothing is written where `convert` fails."""
    target = folder.parent / "out.gguf"
    target.write_bytes(b"as it was")
    with expectation:
        convert(folder, target)
    assert target.read_bytes() == b"as it was"
    assert not list(folder.parent.glob(".out*"))


@pytest.fixture
def llava(tmp_path):
    folder = tmp_path / "llava"
    save_checkpoint(folder, sentencepiece())
    return folder


def test_only_shards_with_llm_tensors_are_read(tmp_path):
    folder = tmp_path / "llava"
    save_checkpoint(folder, sentencepiece())
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {
        "a.safetensors": {k: v for k, v in state.items() if not k.startswith("language_model")},
        "b.safetensors": {k: v for k, v in state.items() if "layers.0" in k and "language" in k},
    }
    parts["c.safetensors"] = {
        k: v for k, v in state.items() if not any(k in part for part in parts.values())
    }
    for name, part in parts.items():
        save_file(part, folder / name)
    (folder / "a.safetensors").write_bytes(b"damaged")
    weight_map = {k: name for name, part in parts.items() for k in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _, tensors, _ = converted(folder)
    up = state["language_model.model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight"], up.numpy())
    (folder / "b.safetensors").unlink()
    refuses(folder, refused(CheckpointError, got="b.safetensors"))


def test_transformers_5_names_are_read(llava):
    state = load_file(llava / "model.safetensors")
    new = {
        k.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        ): v
        for k, v in state.items()
    }
    assert not set(new) & {k for k in state if "language_model" in k}
    save_file(new, llava / "model.safetensors", metadata={"format": "pt"})
    assert len(converted(llava)[1]) == 2 * 9 + 3


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("text", "got", "expected"),
    [
        ({"model_type": "gemma"}, "'gemma'", "llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'", "'silu'"),
        ({"attention_bias": True}, "attention_bias is True", "False"),
        ({"rope_parameters": LINEAR}, "rope_type is 'linear'", "'default'"),
        ({"intermediate_size": 80}, ("mlp.", "72"), "80"),
    ],
)
def test_an_llm_that_llama_cpp_runs_differently_is_refused(llava, text, got, expected):
    if "model_type" in text:  # transformers needs the words to get that far
        (llava / "chat_template.jinja").write_text(CHAT_ML)
    config = json.loads((llava / "config.json").read_text())
    config["text_config"].update(text)
    (llava / "config.json").write_text(json.dumps(config))
    refuses(llava, refused(CheckpointError, got=got, expected=expected))


def test_a_tensor_that_is_not_there_or_quantised_is_refused(llava):
    name = "layers.1.mlp.up_proj.weight"
    state = load_file(llava / "model.safetensors")
    tensor = state.pop(f"language_model.model.{name}")
    save_file(state, llava / "model.safetensors", metadata={"format": "pt"})
    refuses(llava, refused(CheckpointError, got=f"decoder.{name}"))
    state[f"language_model.model.{name}"] = tensor.to(torch.float8_e4m3fn)
    save_file(state, llava / "model.safetensors", metadata={"format": "pt"})
    wanted = {
        "got": (name, "float8_e4m3fn"),
        "expected": "16 bits",
        "cure": "before it was quantised",
    }
    refuses(llava, refused(CheckpointError, **wanted))


ORIGINAL = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "mm_vision_tower": "openai/clip",
    "mm_projector_type": "mlp2x_gelu",
}


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (ORIGINAL, {"got": "original LLaVA", "cure": "llava-hf"}),
        ({"model_type": "llama"}, {"got": "'llama'"}),
    ],
)
def test_a_model_of_another_kind_is_refused(llava, config, fields):
    (llava / "config.json").write_text(json.dumps(config))
    refuses(llava, refused(CheckpointError, **fields))


Q = "language_model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("drop", "name", "said"),
    [
        ("", Q + "bias", {"cause": "computes more"}),
        ("", "language_model.model.layers.0.self_attn.q_norm.weight", {"cause": "more"}),
        ("", "language_model.model.layers.7.input_layernorm.weight", {"cause": "more"}),
        ("", Q + "lora_A.default.weight", {"cure": "merge_and_unload"}),
        ("", Q + "weight_scale", {"cause": "quantised"}),
        (Q + "weight", Q + "qweight", {"cause": "AWQ", "cure": "llama-quantize"}),
        (Q + "weight", Q + "weight_packed", {"cause": "compressed-tensors"}),
    ],
)
def test_what_nothing_is_made_of_is_refused(llava, drop, name, said):
    file = llava / "model.safetensors"
    state = load_file(file)
    state.pop(drop, None)
    save_file(state | {name: torch.ones(1)}, file)
    refuses(llava, refused(CheckpointError, got=(str(file), f"'{name}'"), **said))


def test_frequencies_that_older_transformers_saved_are_left_out(llava):
    file = llava / "model.safetensors"
    more = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(file) | more, file)
    converted(llava)


def test_an_interrupted_write_leaves_what_was_there(llava, monkeypatch):
    calls = []
    write = gguf.GGUFWriter.write_tensor_data

    def interrupted(self, tensor, **options):
        calls.append(list(llava.parent.glob(".out.gguf.*")))
        if len(calls) == 9:
            raise KeyboardInterrupt
        write(self, tensor, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", interrupted)
    refuses(llava, pytest.raises(KeyboardInterrupt))
    assert len(calls) == 9
    assert len(calls[-1]) == 1, "it is written beside its target"


def test_a_full_disk_is_one_line(llava, monkeypatch):
    def full(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "rename_file", full)
    refuses(llava, refused(InvalidInputError, got=("out.gguf'", "No space left on device")))


def test_it_is_on_the_disk_before_it_takes_its_name(llava, monkeypatch):
    import os

    events: list[tuple[str, int]] = []
    fsync, rename = os.fsync, atomic.rename_file

    def synced(descriptor):
        events.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def renamed(path, target):
        events.append(("rename", path.stat().st_size))
        rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(atomic, "rename_file", renamed)
    convert(llava, llava.parent / "out.gguf")
    size = (llava.parent / "out.gguf").stat().st_size
    assert events[:2] == [("fsync", size), ("rename", size)]


def test_tensors_are_written_one_at_a_time(llava, monkeypatch):
    import vzip.export.llm.gguf_tensors as module

    alive: list[int] = []
    read_tensors = module.read_tensors

    def one(path, names):
        alive.append(len(names))
        return read_tensors(path, names)

    monkeypatch.setattr(module, "read_tensors", one)
    convert(llava, llava.parent / "out.gguf")
    assert set(alive) == {1}
    assert len(alive) == 2 * (2 * 9 + 3), "once for the header, once for the values"


def test_the_command_writes_a_file(llava, tmp_path, capsys):
    target = tmp_path / "out.gguf"
    assert main(["convert", "--model", str(llava), "--to", "gguf", "-o", str(target)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{target}\n"
    assert err.splitlines() == [
        "reading the configuration and the tokenizer …",
        "writing out.gguf …",
    ]
    assert target.read_bytes()[:4] == b"GGUF"
    assert target.stat().st_mode & 0o777 == (llava / "config.json").stat().st_mode & 0o777
    target.write_bytes(b"quantised")
    again = ["convert", "--model", str(llava), "--to", "gguf", "-o", str(target)]
    assert main(again) == 2
    err = capsys.readouterr().err
    assert str(target) in err
    assert "--replace" in err
    assert target.read_bytes() == b"quantised"
    assert main([*again, "--replace"]) == 0
    assert target.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("model", "name", "said"),
    [
        ("demo", "out.bin", "out.bin"),
        ("demo", "none/out.gguf", "/none'"),
        ("demo", "folder.gguf", "folder.gguf"),
        ("demmo", "a.gguf", "'demmo'"),
    ],
)
def test_a_bad_target_or_model_is_refused_before_any_work(tmp_path, capsys, model, name, said):
    (tmp_path / "folder.gguf").mkdir()
    assert main(["convert", "--model", model, "--to", "gguf", "-o", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_package_is_one_line(tmp_path, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    assert main(["convert", "--model", "demo", "--to", "gguf", "-o", str(tmp_path / "a.gguf")]) == 2
    assert "'vzip convert' needs the package 'gguf'" in capsys.readouterr().err


def test_sizes_of_the_demo_are_its_checkpoints(tmp_path):
    import transformers

    shutil.copy(demo.checkpoint() / "config.json", tmp_path)
    sizes = Sizes.of(transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=False))
    stored = load_file(demo.checkpoint() / "model.safetensors")
    shapes = sorted(tuple(v.shape) for k, v in stored.items() if k.startswith("language_model."))
    assert sorted(sizes.shapes().values()) == shapes
