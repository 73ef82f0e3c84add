"""Paths and links in a checkpoint's files: what leaves the folder is refused."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from bad_checkpoints_cases import ST, folder, write, write_modules  # noqa: F401
from safetensors.torch import load_file

import modernbert_lite as ml
from modernbert_lite import CheckpointError
from modernbert_lite.checkpoint.folder import Folder
from modernbert_lite.checkpoint.sentence import read_sentence_config
from modernbert_lite.embedder import Embedder
from modernbert_lite.reading import inside

INDEX = "model.safetensors.index.json"


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
        read_sentence_config(Folder(folder))


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
    assert Folder(folder).weight_files(folder) == [folder / "parts" / "one.safetensors"]
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
        read_sentence_config(Folder(folder))


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 5_000, "\ud800", "1_Pooling/config.json"])
def test_a_path_that_can_be_none_is_refused_or_has_no_file(folder, path):
    write_modules(folder, pooling=path)
    with contextlib.suppress(CheckpointError):
        assert read_sentence_config(Folder(folder)).pooling is not None


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
        read_sentence_config(Folder(hub_cache))


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
        read_sentence_config(Folder(mine))


def test_inside_gives_the_path_itself(tmp_path):
    assert inside(tmp_path, "", "x") == tmp_path
    assert inside(tmp_path, "a/b", "x") == tmp_path / "a" / "b"
    assert inside(tmp_path, "./a", "x") == tmp_path / "a"
    assert inside(tmp_path, "a..b/..c", "x") == tmp_path / "a..b" / "..c"


# --- tokenizer.json
