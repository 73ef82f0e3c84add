"""Damaged tokenizer files are errors that name the file."""

from __future__ import annotations

import json

import pytest
from bad_checkpoints_cases import folder, tokenizer_with, write  # noqa: F401

from modernbert_lite import CheckpointError
from modernbert_lite.embedder import Embedder
from modernbert_lite.fill_mask import FillMask
from modernbert_lite.pipeline.tokenizer import Tokenizer


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{}",
        b"[]",
        b"null",
        b"5",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        json.dumps(tokenizer_with())[:-20].encode(),
        json.dumps(tokenizer_with(model=5)).encode(),
        json.dumps(tokenizer_with(model={"type": "Nonsense"})).encode(),
        json.dumps(tokenizer_with(version="9.0")).encode(),
        json.dumps(tokenizer_with(added_tokens={"a": 1})).encode(),
        json.dumps(tokenizer_with(normalizer="NFC")).encode(),
        json.dumps(tokenizer_with(model={"type": "BPE", "vocab": {}, "merges": [["a", "b"]]})).encode(),
        json.dumps(tokenizer_with(model={"type": "BPE", "vocab": {"a": "b"}, "merges": []})).encode(),
    ],
    ids=range(16),
)
def test_a_malformed_tokenizer_is_refused(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read"):
        Embedder.from_pretrained(folder)


def test_a_missing_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Embedder.from_pretrained(folder)
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Embedder.from_pretrained(folder)


def template(single, pair=()):
    return {"type": "TemplateProcessing", "single": single, "pair": list(pair), "special_tokens": {}}


SEQUENCE_A, SEQUENCE_B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")


# Files that are read, or nearly, and make the Rust side panic: as they are opened, or at the first text.
PANICS = {
    "charsmap cut short": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "charsmap empty": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "charsmap of one word": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAEAAAA="}},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "template of unknown tokens": {
        "post_processor": template([{"SpecialToken": {"id": "[NONE]", "type_id": 0}}, SEQUENCE_A])
    },
    "template of a second text": {"post_processor": template([SEQUENCE_B], [SEQUENCE_A])},
}


@pytest.mark.parametrize("case", PANICS)
def test_a_panic_of_the_tokenizer_is_an_ordinary_error(tmp_path, case):
    write(tmp_path / "tokenizer.json", tokenizer_with(**PANICS[case]))
    with pytest.raises((CheckpointError, ValueError)):
        Tokenizer(tmp_path, 16).encode(["a a a"])


@pytest.mark.parametrize("case", PANICS)
def test_a_panic_at_a_prompt_is_an_ordinary_error(tmp_path, case):
    write(tmp_path / "tokenizer.json", tokenizer_with(**PANICS[case]))
    with pytest.raises((CheckpointError, ValueError)):
        Tokenizer(tmp_path, 16).prompt_length("a a")


@pytest.mark.parametrize("case", PANICS)
def test_a_panic_at_a_text_that_is_clipped_is_an_ordinary_error(tmp_path, case):
    write(tmp_path / "tokenizer.json", tokenizer_with(**PANICS[case]))
    with pytest.raises((CheckpointError, ValueError)):
        Tokenizer(tmp_path, 16).encode(["a " * 10_000])


def test_a_panic_while_decoding_is_an_ordinary_error(tmp_path):
    strip = {"type": "Strip", "content": "a", "start": 100, "stop": 100}
    write(tmp_path / "tokenizer.json", tokenizer_with(decoder=strip))
    with pytest.raises(CheckpointError):
        Tokenizer(tmp_path, 16).decode(0)


def test_a_tokenizer_that_knows_no_letter_is_refused(tmp_path):
    model = {"type": "WordPiece", "vocab": {}, "unk_token": "[UNK]"}
    model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    write(tmp_path / "tokenizer.json", tokenizer_with(model=model))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read.*UNK"):
        Tokenizer(tmp_path, 16)


@pytest.mark.parametrize("side", ["up", 5, ["left"]])
def test_an_unknown_truncation_side_is_refused(folder, side):
    write(folder / "tokenizer_config.json", {"truncation_side": side})
    with pytest.raises(ValueError, match=r"direction|truncation_side|tokenizer"):
        Tokenizer(folder, 16)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 100_000])
def test_malformed_settings_of_the_tokenizer_are_refused(folder, name, content):
    (folder / name).write_bytes(content)
    (folder / ("tokenizer_config.json" if "map" in name else "special_tokens_map.json")).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Tokenizer(folder, 16)


@pytest.mark.parametrize("token", ["", None])
def test_a_mask_token_that_is_none_is_passed_over(folder, token):
    write(folder / "tokenizer_config.json", {"mask_token": token})
    (folder / "special_tokens_map.json").unlink()
    tokenizer = Tokenizer(folder, 16)
    assert tokenizer.mask_token == "[MASK]"


@pytest.mark.parametrize("token", [5, [], {}, {"content": 5}, True])
def test_a_mask_token_that_is_no_token_is_refused(folder, token):
    """As transformers does."""
    write(folder / "tokenizer_config.json", {"mask_token": token})
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(CheckpointError, match=r"mask_token is .*; it must be a token or its name"):
        Tokenizer(folder, 16)


def test_a_mask_token_that_is_new_is_added(folder):
    """As transformers does: the network refuses its id where a text has it."""
    write(folder / "tokenizer_config.json", {})
    (folder / "special_tokens_map.json").unlink()
    size = Tokenizer(folder, 16)._rust.get_vocab_size()
    write(folder / "tokenizer_config.json", {"mask_token": "no such token"})
    tokenizer = Tokenizer(folder, 16)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("no such token", size)


def test_settings_as_long_as_gemma_s_are_read(folder):
    """Gemma 3's tokenizer_config.json, which some multilingual encoders have, lists 6,415 tokens in 1.16 MB."""
    tokens = {str(i): {"content": f"<unused{i}>", "lstrip": False, "normalized": False} for i in range(6_415)}
    settings = {
        "added_tokens_decoder": tokens,
        "mask_token": "[MASK]",
        "model_max_length": 99,
        "padding": " " * 700_000,
    }
    write(folder / "tokenizer_config.json", settings)
    size = (folder / "tokenizer_config.json").stat().st_size
    assert 1_150_000 < size < 1_250_000, size
    assert Embedder.from_pretrained(folder).max_seq_length == 99


# --- sentence-transformers' files


def test_fill_mask_refuses_a_tokenizer_without_a_mask(make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForMaskedLM", num_hidden_layers=1)
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    write(folder / "tokenizer.json", tokenizer_with(model=model))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # one that they name would be added
        (folder / name).unlink()
    with pytest.raises(ValueError, match="mask"):
        list(FillMask.from_pretrained(folder)("a [MASK]"))
