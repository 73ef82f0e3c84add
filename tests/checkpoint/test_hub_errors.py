"""Hubs, repositories and caches that fail: one clear error each."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hub_cases import EMBED, FIND, LOAD, REPO, WEIGHTS, client, embedding_model, encoder, failure, good, hub, run  # noqa: F401

from modernbert_lite.checkpoint import hub as hub_files
from modernbert_lite.checkpoint.folder import Folder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the client forks")


def test_a_revision_that_is_not_cached_is_not_replaced_by_another(hub, run, encoder):
    hub.add(encoder)
    good(run(FIND, options={}))
    message = failure(run(FIND, options={"revision": "v2", "local_files_only": True}))
    assert REPO in message


def test_an_unreachable_hub_is_one_clear_error(hub, run, encoder):
    hub.stop()
    message = failure(run(LOAD, options={}))
    assert message.startswith(f"{REPO} could not be downloaded")


def test_a_hub_that_fails_is_one_clear_error(hub, run, encoder):
    hub.add(encoder)
    hub.status = 501
    message = failure(run(LOAD, options={}))
    assert message.startswith(f"{REPO} could not be downloaded")
    assert "501" in message


def test_an_unknown_repository_is_one_clear_error(hub, run):
    message = failure(run(LOAD, options={}))
    assert message.startswith(f"{REPO} could not be downloaded")


def test_an_unknown_revision_is_one_clear_error(hub, run, encoder):
    hub.add(encoder)
    message = failure(run(LOAD, options={"revision": "no-such-branch"}))
    assert message.startswith(f"{REPO} could not be downloaded")
    assert "evision" in message


@pytest.mark.parametrize("name", ["two words/model", "-x/model", "a--b", "some/model.git", "some/mödel", "x" * 200])
def test_what_can_be_no_hub_id_is_refused_without_asking(hub, run, name):
    answer = run("repo = name\n" + LOAD, name=name, options={}, no_sockets=True)
    message = failure(answer)
    assert name in message
    assert "hub id" in message
    assert answer["attempts"] == []


def test_a_repository_of_pickles_gets_the_conversion_advice_and_no_pickle(hub, run, encoder):
    files = {p.name: p.read_bytes() for p in encoder.iterdir() if p.name != WEIGHTS}
    hub.add({**files, "pytorch_model.bin": b"\x80\x04never read"})
    message = failure(run(LOAD, options={}))
    for part in ("no model.safetensors", "Convert", "weights_only=True"):
        assert part in message
    assert "pytorch_model.bin" not in hub.downloaded()


def test_weights_that_are_cut_short_are_not_taken_for_a_whole_file(hub, run, encoder):
    hub.add(encoder)
    found = Path(good(run(FIND, options={})))
    blob = (found / WEIGHTS).resolve()
    blob.write_bytes(blob.read_bytes()[:-100])
    message = failure(run(LOAD, options={}, no_sockets=True))
    assert WEIGHTS in message
    assert "cut short" in message


@pytest.mark.parametrize("kind", ["Pooling", "Dense", "LayerNorm", "MultiVectorMask"])
def test_a_snapshot_without_a_module_s_settings_is_not_complete(make_checkpoint, monkeypatch, kind):
    folder, _ = make_checkpoint(num_hidden_layers=1)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: object())  # known not to be there
    modules = [("", "sentence_transformers.models.Transformer"), ("1_Part", f"sentence_transformers.models.{kind}")]
    (folder / "modules.json").write_text(json.dumps([{"path": path, "type": name} for path, name in modules]))
    assert not hub_files._is_complete(Folder(folder), "some/model")
    (folder / "1_Part").mkdir()
    (folder / "1_Part" / "config.json").write_text("{}")
    assert hub_files._is_complete(Folder(folder), "some/model")


# --- adapters and other weights in a repository


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_in_a_repository_is_refused_and_the_second_time_without_a_request(hub, run, encoder, whole):
    (encoder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    (encoder / "adapter_model.safetensors").write_bytes(b"never asked for")
    if not whole:
        (encoder / WEIGHTS).unlink()
        (encoder / "config.json").unlink()
    hub.add(encoder)
    for options in ({"options": {}}, {"options": {}, "no_sockets": True}):
        message = failure(run(LOAD, **options))
        for part in (
            "holds a PEFT adapter",
            "'someone/base'",
            f"hf download {REPO} --local-dir FOLDER",
            "merge_and_unload",
        ):
            assert part in message
        assert ("no weights of a whole model" in message) != whole
    assert "adapter_model.safetensors" not in hub.downloaded()


def test_an_adapter_is_looked_for_in_a_cache_of_an_older_version(hub, run, encoder):
    """It was made when adapter_config.json wasn't asked for: whether there is one is not known."""
    files = {p.name: p.read_bytes() for p in encoder.iterdir()}
    commit = hub.add(files)
    found = Path(good(run(FIND, options={})))
    (found.parents[1] / ".no_exist" / commit / "adapter_config.json").unlink()
    hub.repos[REPO][commit]["adapter_config.json"] = b"{}"
    assert "holds a PEFT adapter" in failure(run(LOAD, options={}))


def test_a_repository_of_other_weights_is_told_by_what_it_has(hub, run, encoder):
    files = {p.name: p.read_bytes() for p in encoder.iterdir() if p.name != WEIGHTS}
    hub.add({**files, "onnx/model.onnx": b"x", "model-q8.gguf": b"x"})
    message = failure(run(LOAD, options={}))
    assert f"no model.safetensors in {REPO}: it has only model-q8.gguf, onnx/model.onnx; only safetensors" in message
    assert hub.downloaded() == sorted(set(files) & set(hub.downloaded()))


# --- a damaged cache


DAMAGED = ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json"]


@pytest.mark.parametrize(("name", "left"), [*zip(DAMAGED, (20, 0, 50, 0, 20, 0), strict=True)])
def test_a_damaged_file_of_the_cache_is_told_with_the_blob_to_delete(hub, run, embedding_model, name, left):
    hub.add(embedding_model)
    expected = good(run(EMBED, options={}))
    [snapshot] = [p.parent for p in Path(good(run(FIND, options={}))).glob("config.json")]
    blob = (snapshot / name).resolve()
    blob.write_bytes(blob.read_bytes()[:left])
    message = failure(run(EMBED, options={}))
    assert f". Delete {blob}, and open the model again where the hub can be reached" in message
    assert Path(name).name in message
    blob.unlink()  # as told
    assert good(run(EMBED, options={})) == expected


@pytest.mark.parametrize("name", DAMAGED[::2])
def test_a_link_of_the_cache_to_a_blob_that_is_gone_is_mended_or_told(hub, run, embedding_model, name):
    hub.add(embedding_model)
    expected = good(run(EMBED, options={}))
    blob = (Path(good(run(FIND, options={}))) / name).resolve()
    blob.unlink()
    message = failure(run(EMBED, options={}, env={"HF_HUB_OFFLINE": "1"}))
    assert Path(name).name in message
    assert "is not whole in the hub cache" in message
    assert good(run(EMBED, options={})) == expected


@pytest.mark.parametrize("ref", ["", "f" * 40, "../../..", "\n\x1b", None])
def test_a_ref_to_no_snapshot_is_mended_or_told(hub, run, encoder, ref):
    hub.add(encoder)
    found = Path(good(run(FIND, options={})))
    path = found.parents[1] / "refs" / "main"
    if ref is None:
        path.write_bytes(b"\xff\xfe")
    else:
        path.write_text(ref)
    message = failure(run(LOAD, options={}, env={"HF_HUB_OFFLINE": "1"}))
    assert f"delete {path}, and open the model once where the hub can be reached" in message
    assert message.isprintable()
    assert len(message) <= 2_000
    if ref is None:
        assert f"delete {path}" in failure(run(FIND, options={}))
        path.unlink()
    assert Path(good(run(FIND, options={}))) == found


def test_a_ref_that_is_a_folder_is_told(hub, run, encoder):
    hub.add(encoder)
    found = Path(good(run(FIND, options={})))
    (found.parents[1] / "refs" / "main").unlink()
    (found.parents[1] / "refs" / "main").mkdir()
    assert "delete" in failure(run(LOAD, options={}, env={"HF_HUB_OFFLINE": "1"}))


def test_what_the_hub_says_is_one_short_line(hub, run, encoder):
    hub.status = 500
    hub.message = "\n\x1b[31m" + "x" * 9_000
    message = failure(run(FIND, options={}))
    assert message.isprintable()
    assert len(message) <= 2_000
