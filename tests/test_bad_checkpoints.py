"""Damaged and hostile checkpoints: a clear error and nothing else. And what the package's code must never do."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modernbert_lite as ml
from modernbert_lite import CheckpointError
from modernbert_lite.checkpoint.sentence import read_sentence_config
from modernbert_lite.checkpoint.weights import load_weights, open_safetensors, read_modules, weight_files
from modernbert_lite.embedder import Embedder
from modernbert_lite.fill_mask import FillMask
from modernbert_lite.models.modernbert import ModernBert
from modernbert_lite.models.registry import read_config
from modernbert_lite.pipeline.tokenizer import Tokenizer
from modernbert_lite.reading import inside, read_json

PACKAGE = Path(ml.__file__).parent
ST = "sentence_transformers.models."
INDEX = "model.safetensors.index.json"


MADE: dict[str, Path] = {}  # sound folders, made once


@pytest.fixture
def folder(make_checkpoint, tmp_path_factory):
    """A small sound embedding model: 32 wide, a vocabulary of 31, a tokenizer of three words."""
    if "folder" not in MADE:
        made, _ = make_checkpoint(
            hidden_size=32,
            num_attention_heads=1,
            intermediate_size=9,
            num_hidden_layers=2,
            vocab_size=31,
            pad_token_id=3,
        )
        write(made / "tokenizer.json", tokenizer_with())
        write_modules(made)
        (made / "1_Pooling").mkdir()
        write(made / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, "pooling_mode_cls_token": True})
        MADE["folder"] = tmp_path_factory.mktemp("made") / "folder"
        shutil.move(made, MADE["folder"])
    return shutil.copytree(MADE["folder"], tmp_path_factory.mktemp("test") / "folder")


def write(path, value):
    path.write_text(json.dumps(value))


def write_modules(folder, *more, pooling="1_Pooling"):
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": ST + "Transformer"},
        {"idx": 1, "name": "1", "path": pooling, "type": ST + "Pooling"},
        *more,
    ]
    write(folder / "modules.json", modules)


def tokenizer_with(**parts):
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1, "[MASK]": 2}, "unk_token": "[UNK]"},
        **parts,
    }


def with_header(folder, header, data=b"", claimed=None):
    """A model.safetensors with this header: an object, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if claimed is None else claimed
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + text + data)


def test_a_sound_folder_opens(folder):
    assert Embedder.from_pretrained(folder).encode("a").shape == (32,)


# --- config.json


def test_a_folder_without_config_json_is_refused(folder, tmp_path):
    (folder / "config.json").unlink()
    for opens in (ml.load_model, ml.read_config, Embedder.from_pretrained, ml.Reranker.from_pretrained):
        with pytest.raises(CheckpointError, match=r"no config\.json in .*checkpoint"):
            opens(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"model_type": "modernbert"',
        b"{'model_type': 'modernbert'}",
        b"\xff\xfe\x00junk",
        b'{"model_type": "\x80"}',
        b"[]",
        b"null",
        b'"modernbert"',
        b"5",
        b"[" * 100_000,
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        b'{"vocab_size": ' + b"9" * 5_000 + b"}",
        b" " * ((1 << 20) + 1),
    ],
    ids=range(14),
)
def test_a_config_that_is_no_json_object_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ml.load_model(folder)


def test_json_nested_to_any_depth_is_refused_or_read(tmp_path):
    """Just below the depth at which the parser gives up, printing the value in an error message must work, too."""
    for depth in (*range(100, 900, 100), *range(900, 1010)):
        for key in ("hidden_size", "layer_types", "rope_parameters", "architectures"):
            (tmp_path / "config.json").write_text(
                f'{{"model_type": "modernbert", "{key}": {"[" * depth}1{"]" * depth}}}'
            )
            with pytest.raises(CheckpointError):
                read_config(tmp_path)


def test_the_message_about_a_huge_value_is_short(tmp_path):
    write(tmp_path / "config.json", {"model_type": "modernbert", "hidden_activation": "x" * 900_000})
    with pytest.raises(CheckpointError, match="hidden_activation") as error:
        read_config(tmp_path)
    assert len(str(error.value)) < 2_000


# --- safetensors


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.5, -1])
def test_truncated_weights_are_refused(folder, kept):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read as safetensors .*cut short"):
        ml.load_model(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"not safetensors at all" * 100,
        b"\0" * 64,
        b"\x80\x04\x95pickle",
        b"PK\x03\x04zip",
        b"<html>404</html>",
        b"\xff" * 64,
    ],
    ids=["text", "zeros", "pickle", "zip", "html", "ones"],
)
def test_weights_that_are_something_else_are_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ml.load_model(folder)


def test_a_file_pointer_that_was_never_resolved_is_refused(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 298041696\n"
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ml.load_model(folder)


def test_a_header_that_claims_more_than_the_file_is_refused(folder):
    with_header(folder, {}, claimed=1_000_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        ml.load_model(folder)


@pytest.mark.parametrize("claimed", [(16 << 20) + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_of_more_than_16_mib_is_not_even_read(folder, claimed):
    with_header(folder, {}, claimed=claimed)
    with pytest.raises(CheckpointError, match=rf"header claims {claimed} bytes, more than {16 << 20}"):
        ml.load_model(folder)


def test_tensors_that_claim_more_than_the_file_are_refused(folder):
    size = 1 << 40
    with_header(
        folder, {"final_norm.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, b"\0" * 64
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        ml.load_model(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}}",
        b"null",
        b'{"a": 5}',
        b"\xff\xfe",
        b"[" * 10_000,
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"__metadata__": {"format": 5}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
    ids=range(13),
)
def test_a_malformed_header_is_refused(folder, header):
    with_header(folder, header, b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ml.load_model(folder)


def test_an_empty_header_is_named(folder):
    with_header(folder, {})
    with pytest.raises(CheckpointError, match=r"doesn't fit its config\.json: it has no tensor at all"):
        ml.load_model(folder)


def rewritten_header(folder, change):
    """Changes model.safetensors' header and leaves its data."""
    raw = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    with_header(folder, header, raw[8 + size :])


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2", "F4", "F8_E8M0", "C64", "U64"])
def test_types_that_torch_may_not_know_are_refused_by_name(folder, dtype):
    bits = {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "F8_E8M0": 8, "C64": 64, "U64": 64}[dtype]
    tensors = load_file(folder / "model.safetensors")
    del tensors["final_norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    size = 32 * bits // 8
    raw = (folder / "model.safetensors").read_bytes()
    at = len(raw) - 8 - struct.unpack("<Q", raw[:8])[0]

    def change(header):
        header["final_norm.weight"] = {"dtype": dtype, "shape": [32], "data_offsets": [at, at + size]}

    rewritten_header(folder, change)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0" * size)
    with pytest.raises(CheckpointError, match=r"final_norm\.weight"):
        ml.load_model(folder)


def test_a_directory_in_the_place_of_the_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ml.load_model(folder)


# --- paths that a checkpoint's files name

LEAVING = {
    "up": "../outside",
    "up twice": "../../outside",
    "up inside": "1_Pooling/../../outside",
    "up and back": "1_Pooling/../1_Pooling",
    "only up": "..",
    "absolute": "/etc",
    "two slashes": "//etc",
    "backslash": "..\\outside",
    "any backslash": "1_Pooling\\config",
    "drive": "C:\\outside",
    "NUL": "1_Pooling\0/../../outside",
    "number": 5,
    "null": None,
    "list": ["1_Pooling"],
    "object": {},
    "bool": True,
}


@pytest.mark.parametrize("case", LEAVING)
def test_a_path_in_modules_json_that_leaves_the_folder_is_refused(folder, case):
    outside = folder.parent / "outside"
    outside.mkdir()
    write(outside / "config.json", {"pooling_mode": "max"})
    write_modules(folder, pooling=LEAVING[case])
    with pytest.raises(CheckpointError, match=r"modules\.json: path .*leaves the model's folder"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["Transformer", "Pooling", "Dense", "Normalize"])
def test_paths_of_modules_of_every_kind_are_checked(folder, kind):
    write(folder / "modules.json", [{"idx": 0, "name": "0", "path": "../outside", "type": ST + kind}])
    with pytest.raises(CheckpointError, match=r"modules\.json: path '../outside' leaves"):
        read_sentence_config(folder)


@pytest.mark.parametrize("case", [name for name in LEAVING if isinstance(LEAVING[name], str)])
def test_a_path_in_the_index_that_leaves_the_folder_is_refused(folder, case):
    shutil.move(folder / "model.safetensors", folder.parent / "outside")
    tensors = load_file(folder.parent / "outside")
    write(folder / INDEX, {"weight_map": dict.fromkeys(tensors, LEAVING[case])})
    with pytest.raises(CheckpointError, match=r"index\.json: path .*leaves the model's folder"):
        ml.load_model(folder)


@pytest.mark.parametrize(
    "content", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, {"weight_map": {"a": 5}}]
)
def test_an_index_without_a_map_of_files_is_refused(folder, content):
    (folder / "model.safetensors").unlink()
    write(folder / INDEX, content)
    with pytest.raises(CheckpointError):
        ml.load_model(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000])
def test_an_index_that_is_no_json_is_refused(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=INDEX):
        ml.load_model(folder)


def test_an_index_may_name_a_file_in_a_subfolder(folder):
    (folder / "parts").mkdir()
    shutil.move(folder / "model.safetensors", folder / "parts" / "one.safetensors")
    write(folder / INDEX, {"weight_map": {"final_norm.weight": "parts/one.safetensors"}})
    assert weight_files(folder) == [folder / "parts" / "one.safetensors"]
    ml.load_model(folder)


@pytest.mark.parametrize("what", ["folder", "file", "chain"])
def test_a_shard_may_be_a_link_to_anywhere_and_its_folder_may_not(folder, what):
    """As model.safetensors may: a folder of links to weights that lie elsewhere is what people make."""
    expected = ml.load_model(folder).state_dict()
    outside = folder.parent / "outside"
    outside.mkdir()
    shutil.move(folder / "model.safetensors", outside / "one.safetensors")
    if what == "folder":
        (folder / "linked").symlink_to(outside)
    else:
        (folder / "linked").mkdir()
        target = outside / "one.safetensors"
        if what == "chain":
            (folder / "linked" / "first").symlink_to(target)
            target = Path("first")
        (folder / "linked" / "one.safetensors").symlink_to(target)
    write(folder / INDEX, {"weight_map": {"final_norm.weight": "linked/one.safetensors"}})
    if what == "folder":
        with pytest.raises(CheckpointError, match="link that leaves the model's folder: copy"):
            ml.load_model(folder)
    else:
        got = ml.load_model(folder).state_dict()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_single_file_may_be_a_link_to_anywhere(folder):
    expected = ml.load_model(folder).state_dict()
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "outside.safetensors")
    got = ml.load_model(folder).state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_linked_pooling_folder_that_leaves_is_refused(folder):
    shutil.move(folder / "1_Pooling", folder.parent / "outside")
    (folder / "1_Pooling").symlink_to(folder.parent / "outside")
    with pytest.raises(CheckpointError, match="link that leaves the model's folder"):
        Embedder.from_pretrained(folder)


def test_a_link_that_leads_to_itself_is_refused(folder):
    (folder / "loop").symlink_to(folder / "loop")
    write_modules(folder, pooling="loop")
    with pytest.raises(CheckpointError):
        read_sentence_config(folder)


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 5_000, "\ud800", "1_Pooling/config.json"])
def test_a_path_that_can_be_none_is_refused_or_has_no_file(folder, path):
    write_modules(folder, pooling=path)
    with contextlib.suppress(CheckpointError):
        assert read_sentence_config(folder).pooling is not None


def test_links_within_the_folder_are_fine(folder):
    shutil.move(folder / "model.safetensors", folder / "real")
    (folder / "linked.safetensors").symlink_to("real")
    write(folder / INDEX, {"weight_map": {"final_norm.weight": "linked.safetensors"}})
    ml.load_model(folder)


@pytest.fixture
def hub_cache(folder, tmp_path):
    """The folder's files as the hub's cache keeps them: snapshots/COMMIT/file -> ../../blobs/HASH."""
    model = tmp_path / "hub" / "models--someone--some-model"
    snapshot = model / "snapshots" / ("0" * 40)
    (model / "blobs").mkdir(parents=True)
    for i, path in enumerate(p for p in sorted(folder.rglob("*")) if p.is_file()):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, model / "blobs" / str(i))
        link.symlink_to(os.path.relpath(model / "blobs" / str(i), link.parent))
    return snapshot


def test_the_links_of_a_hub_cache_are_fine(hub_cache):
    assert Embedder.from_pretrained(hub_cache).encode("a").shape == (32,)
    (hub_cache / "model.safetensors").rename(hub_cache / "shard.safetensors")
    write(hub_cache / INDEX, {"weight_map": {"final_norm.weight": "shard.safetensors"}})
    ml.load_model(hub_cache)


def test_a_hub_cache_that_was_moved_behind_a_link_is_fine(hub_cache, tmp_path):
    (tmp_path / "link").symlink_to(hub_cache.parents[2])
    moved = tmp_path / "link" / hub_cache.relative_to(hub_cache.parents[2])
    assert Embedder.from_pretrained(moved).encode("a").shape == (32,)


def test_a_link_from_a_hub_cache_to_another_model_is_refused(hub_cache):
    other = hub_cache.parents[2] / "models--else--where"
    other.mkdir()
    shutil.copytree(hub_cache / "1_Pooling", other / "1_Pooling")
    (hub_cache / "other").symlink_to(other / "1_Pooling")
    write_modules_into(hub_cache, "other")
    with pytest.raises(CheckpointError, match="link that leaves"):
        read_sentence_config(hub_cache)


def write_modules_into(snapshot, pooling):
    (snapshot / "modules.json").unlink()
    write_modules(snapshot, pooling=pooling)


def test_a_folder_that_only_looks_like_a_snapshot_is_held_to_its_own_files(folder, tmp_path):
    """snapshots/NAME of someone's own making is no hub cache: what lies beside it isn't the model's."""
    mine = tmp_path / "data" / "snapshots" / "mine"
    shutil.copytree(folder, mine)
    shutil.move(mine / "1_Pooling", tmp_path / "data" / "private")
    (mine / "1_Pooling").symlink_to(tmp_path / "data" / "private")
    with pytest.raises(CheckpointError, match="link that leaves"):
        read_sentence_config(mine)


def test_inside_gives_the_path_itself(tmp_path):
    assert inside(tmp_path, "", "x") == tmp_path
    assert inside(tmp_path, "a/b", "x") == tmp_path / "a" / "b"
    assert inside(tmp_path, "./a", "x") == tmp_path / "a"
    assert inside(tmp_path, "a..b/..c", "x") == tmp_path / "a..b" / "..c"


# --- tokenizer.json


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


@pytest.mark.parametrize(
    "content",
    [b"", b"[", b"{}", b"null", b"5", b'["Transformer"]', b"[[]]", b"[null]", b"[" * 100_000, b"\xff"],
    ids=range(10),
)
def test_a_malformed_modules_json_is_refused(folder, content):
    (folder / "modules.json").write_bytes(content)
    for reads in (read_modules, read_sentence_config, Embedder.from_pretrained):
        with pytest.raises(CheckpointError, match=r"modules\.json"):
            reads(folder)


@pytest.mark.parametrize(
    "kind", ["sentence_transformers.models.CNN", "os.system", "my_module.Custom", "", None, 5, ["Pooling"]]
)
def test_an_unknown_module_is_refused_by_name(folder, kind):
    write_modules(folder, {"idx": 2, "name": "2", "path": "", "type": kind})
    with pytest.raises(CheckpointError) as error:
        Embedder.from_pretrained(folder)
    for part in (repr(kind), "Transformer", "Pooling", "Dense", "Normalize"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"pooling_mode": "median"}',
        b'{"pooling_mode": []}',
        b'{"pooling_mode": 5}',
        b'{"pooling_mode": {"cls": true}}',
        b'{"pooling_mode": ["cls", "median"]}',
        b'{"pooling_mode": [["cls"]]}',
        b'{"pooling_mode": [{}]}',
        b'{"pooling_mode": [null]}',
    ],
    ids=range(12),
)
def test_a_malformed_pooling_config_is_refused(folder, content):
    (folder / "1_Pooling" / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="1_Pooling"):
        Embedder.from_pretrained(folder)


def test_a_pooling_module_without_its_config_is_refused(folder):
    """A copy that lost its subfolders would otherwise be pooled in some way that nobody chose."""
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="1_Pooling"):
        Embedder.from_pretrained(folder)
    (folder / "1_Pooling").rmdir()
    with pytest.raises(CheckpointError, match="1_Pooling"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"prompts": ["query: "]}',
        b'{"prompts": {"query": 5}}',
        b'{"default_prompt_name": "queri"}',
        b'{"default_prompt_name": 5}',
        b'{"default_prompt_name": []}',
        b'{"default_prompt_name": {}}',
        b'{"similarity_fn_name": "cos"}',
        b'{"similarity_fn_name": ["cosine"]}',
        b'{"similarity_fn_name": 5}',
    ],
    ids=range(13),
)
def test_a_malformed_sentence_transformers_config_is_refused(folder, content):
    (folder / "config_sentence_transformers.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config_sentence_transformers\.json"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, -1, "512", 1.5, [], {}, True, 10**30])
def test_a_malformed_max_seq_length_is_refused(folder, length):
    write(folder / "sentence_bert_config.json", {"max_seq_length": length})
    with pytest.raises(CheckpointError, match="max_seq_length"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json"])
def test_a_malformed_length_file_is_refused(folder, name):
    (folder / name).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Embedder.from_pretrained(folder)


def add_dense(folder, config, tensors=None):
    write_modules(folder, {"idx": 2, "name": "2", "path": "2_Dense", "type": ST + "Dense"})
    (folder / "2_Dense").mkdir()
    if config is not None:
        write(folder / "2_Dense" / "config.json", config)
    if tensors is not None:
        save_file(tensors, folder / "2_Dense" / "model.safetensors")


DENSE = {"in_features": 32, "out_features": 3, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}


def test_a_dense_module_is_read(folder):
    add_dense(folder, DENSE, {"linear.weight": torch.ones(3, 32)})
    assert Embedder.from_pretrained(folder).encode("a").shape == (3,)


def test_a_dense_module_of_a_pickle_is_refused_with_how_to_convert_it(folder):
    add_dense(folder, DENSE)
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    with pytest.raises(CheckpointError, match=r"2_Dense.*pytorch_model\.bin.*never read.*Convert"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_function": "os.system"}, "os.system"),
        ({"activation_function": "my.Tanh"}, "my.Tanh"),
        ({"activation_function": "torch.load"}, "torch.load"),
        ({"activation_function": 5}, "5"),
        ({"activation_function": ["torch.nn.Tanh"]}, "torch.nn.Tanh"),
        ({"in_features": 31}, "31"),
        ({"out_features": "3"}, "'3'"),
        ({"in_features": None}, "None"),
        ({"bias": True}, "linear.bias"),
        ({"use_residual": True}, "residual.weight"),
        ({"module_input_name": "pixels"}, "pixels"),
    ],
)
def test_a_dense_module_that_cannot_be_honoured_is_refused(folder, change, said):
    add_dense(folder, {**DENSE, **change}, {"linear.weight": torch.ones(3, 32)})
    with pytest.raises(CheckpointError) as error:
        Embedder.from_pretrained(folder)
    assert "2_Dense" in str(error.value) or "activation" in str(error.value)
    assert said in str(error.value)


def test_a_dense_module_without_config_or_of_another_width_is_refused(folder):
    add_dense(folder, None, {"linear.weight": torch.ones(3, 32)})
    with pytest.raises(CheckpointError, match=r"2_Dense"):
        Embedder.from_pretrained(folder)
    write(folder / "2_Dense" / "config.json", {**DENSE, "in_features": 64})
    save_file({"linear.weight": torch.ones(3, 64)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2_Dense|in_features|64"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize("name", [5, ["torch.nn.Sigmoid"], "os.system", "evil.Sigmoid"])
def test_a_cross_encoder_s_activation_that_is_not_known_is_refused(make_checkpoint, name):
    folder, _ = make_checkpoint("ModernBertForSequenceClassification", num_hidden_layers=1, num_labels=1)
    write(folder / "config_sentence_transformers.json", {"activation_fn": name})
    with pytest.raises(CheckpointError, match="activation"):
        ml.Reranker.from_pretrained(folder)


# --- anything at all


def mutate(rng, value):
    """One random place of a JSON value changed to something random."""
    junk = [
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3.5,
        1e308,
        10**30,
        10**400,
        "",
        "x",
        "\ud800",
        "../x",
        [],
        {},
        [[]],
        [{}],
        {"a": []},
    ]
    junk += [float("nan"), float("inf"), "yarn", "full_attention", {"full_attention": {}}, ["full_attention"] * 2]
    value = copy.deepcopy(value)
    at = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return value
        key = rng.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.6:
            at = at[key]
            continue
        kind = rng.random()
        if kind < 0.15:
            del at[key]
        elif kind < 0.25 and isinstance(at, dict):
            at[str(rng.choice(keys)) + "_"] = at.pop(key)
        else:
            at[key] = copy.deepcopy(rng.choice(junk))
        return value


def damage(rng, raw):
    """Some bytes of a file changed, cut out or put in."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw))
        what = rng.random()
        if what < 0.6:
            raw[at] = rng.randrange(256)
        elif what < 0.8:
            del raw[at : at + rng.randint(1, 9)]
        else:
            raw[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
    return bytes(raw)


@pytest.fixture
def plain(make_checkpoint):
    folder, _ = make_checkpoint(
        hidden_size=16,
        num_attention_heads=1,
        intermediate_size=9,
        num_hidden_layers=2,
        vocab_size=31,
        pad_token_id=3,
        rope_parameters={
            "full_attention": {"rope_type": "yarn", "rope_theta": 160000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )
    return folder


def test_a_randomly_changed_config_loads_or_is_refused(plain):
    rng = random.Random(20260)
    whole = json.loads((plain / "config.json").read_text())
    whole |= {"global_rope_theta": 160000.0, "local_rope_theta": 1e4}
    whole |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    outcomes = {True: 0, False: 0}
    for round_ in range(200):
        changed = mutate(rng, whole)
        if rng.random() < 0.3:
            changed = mutate(rng, changed)
        raw = json.dumps(changed).encode()
        (plain / "config.json").write_bytes(damage(rng, raw) if round_ % 5 == 0 else raw)
        try:
            ml.load_model(plain)
            outcomes[True] += 1
        except ValueError:
            outcomes[False] += 1
        except BaseException as error:
            pytest.fail(f"{type(error).__name__}: {error} for {(plain / 'config.json').read_bytes()!r}")
    assert min(outcomes.values()) > 20, outcomes


def test_a_randomly_changed_safetensors_header_loads_or_is_refused(plain):
    rng = random.Random(20261)
    raw = (plain / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    junk = ["F16", "BF16", "F64", "I8", "F8_E4M3", "F6_E2M3", "F4", "nonsense"]
    config = read_config(plain)
    refused = 0
    for round_ in range(220):
        if round_ % 3 == 0:  # bytes, of the length too
            with_data = damage(rng, raw[: 8 + size]) + raw[8 + size :]
            (plain / "model.safetensors").write_bytes(with_data)
        else:
            changed = mutate(rng, header)
            if rng.random() < 0.4:
                entry = changed[rng.choice(list(changed))]
                if isinstance(entry, dict):
                    entry["dtype"] = rng.choice(junk)
            with_header(plain, changed, raw[8 + size :])
        try:
            load_weights(ModernBert, config, plain, device="cpu")
        except ValueError:
            refused += 1
        except BaseException as error:
            pytest.fail(
                f"{type(error).__name__}: {error} for {(plain / 'model.safetensors').read_bytes()[: size + 8]!r}"
            )
    assert refused > 100


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"])
def test_randomly_changed_sentence_files_are_read_or_refused(folder, name):
    rng = random.Random(name)
    write_modules(folder, {"idx": 2, "name": "2", "path": "2_Normalize", "type": ST + "Normalize"})
    write(folder / "1_Pooling" / "config.json", {"pooling_mode": ["cls", "mean"], "include_prompt": True})
    prompts = {"query": "q: ", "document": "d: "}
    texts = {"prompts": prompts, "default_prompt_name": "query", "similarity_fn_name": "dot", "activation_fn": None}
    write(folder / "config_sentence_transformers.json", texts)
    whole = json.loads((folder / name).read_text())
    for _ in range(200):
        write(folder / name, mutate(rng, whole))
        try:
            read_sentence_config(folder)
        except ValueError:
            pass
        except BaseException as error:
            pytest.fail(f"{type(error).__name__}: {error} for {(folder / name).read_text()!r}")


def test_read_json_and_open_safetensors_name_a_missing_file(tmp_path):
    for reads in (read_json, open_safetensors):
        with pytest.raises(CheckpointError, match="gone"):
            reads(tmp_path / "gone")


# --- the code itself


def sources():
    """Every module of the package and every kernel: its name -> its syntax tree."""
    paths = [p for p in sorted(PACKAGE.rglob("*.py")) if "kernels" not in p.relative_to(PACKAGE).parts]
    trees = {p.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(p.read_text()) for p in paths}
    for path in sorted((PACKAGE / "kernels").glob("*.py")):
        trees[f"kernels/{path.stem}"] = ast.parse(path.read_text())
    return trees


SOURCES = sources()
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


@pytest.mark.parametrize("module", SOURCES)
def test_no_code_or_pickle_is_ever_run_from_data(module):
    for node in ast.walk(SOURCES[module]):
        where = f"{module}, line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.Import):
            assert not {name.name.partition(".")[0] for name in node.names} & UNPICKLERS, where
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in UNPICKLERS, where
            for name in node.names:
                assert (node.module, name.name) != ("torch", "load"), where
                if (node.module, name.name) == ("importlib", "import_module"):
                    assert module == "__init__", where
        if isinstance(node, ast.Name):
            assert node.id not in RUNS_CODE, where
            if node.id == "import_module":
                assert module == "__init__", where
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            banned = (
                "torch.load",
                "importlib.import_module",
                "builtins.eval",
                "builtins.exec",
                "numpy.load",
                "np.load",
            )
            assert name not in banned, where
            assert not name.endswith((".import_module", ".exec_module", ".load_module", ".__import__")), where
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            assert isinstance(node.value, ast.Constant), where
            assert node.value.value is False, where


def test_the_lazy_init_imports_only_names_of_its_own_table():
    calls = [
        node
        for node in ast.walk(SOURCES["__init__"])
        if isinstance(node, ast.Call) and dotted(node.func) == "import_module"
    ]
    assert len(calls) == 1
    assert ast.unparse(calls[0]) == "import_module(f'.{_HOME[name]}', __name__)"
    assert all(part.isidentifier() for home in ml._HOME.values() for part in home.split("."))


def test_fill_mask_refuses_a_tokenizer_without_a_mask(make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForMaskedLM", num_hidden_layers=1)
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    write(folder / "tokenizer.json", tokenizer_with(model=model))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # one that they name would be added
        (folder / name).unlink()
    with pytest.raises(ValueError, match="mask"):
        list(FillMask.from_pretrained(folder)("a [MASK]"))
