"""Checkpoints by hub id, against a small hub on this machine: what is asked for, what is kept, what needs no network.

huggingface_hub reads its environment when it is imported, so the client is another process: one that has imported torch
(slow) and forks for each job, which sets its environment and only then imports huggingface_hub.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hub_cases import EMBED, FIND, LOAD, REPO, WEIGHTS, client, embedding_model, encoder, failure, good, hub, run  # noqa: F401

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the client forks")


def test_only_the_needed_files_are_downloaded(hub, run, embedding_model, tmp_path):
    needed = sorted(p.relative_to(embedding_model).as_posix() for p in embedding_model.rglob("*") if p.is_file())
    junk = [
        "README.md",
        ".gitattributes",
        "pytorch_model.bin",
        "training_args.bin",
        "model.safetensors.bak",
        "tf_model.h5",
        "onnx/model.onnx",
        "onnx/config.json",
        "onnx/model.safetensors",
        "openvino/openvino_model.xml",
        "2_Dense/pytorch_model.bin",
        "checkpoint-500/model.safetensors",
        "checkpoint-500/trainer_state.json",
        "vocab.json",
    ]
    files = {name: (embedding_model / name).read_bytes() for name in needed}
    hub.add({**files, **dict.fromkeys(junk, b"x" * 64)})
    result = good(run(EMBED, options={}))
    assert result[:3] == [["cls"], True, 77]
    assert hub.downloaded() == needed
    asked = {path for _, path, _ in hub.requests}
    assert not [path for path in asked for name in junk if path.endswith("/" + name)]

    import modernbert_lite

    expected = modernbert_lite.Embedder.from_pretrained(embedding_model, device="cpu").encode("a few words").tolist()
    assert result[3] == pytest.approx(expected, abs=1e-6)


def test_dense_modules_come_with_their_weights(hub, run, embedding_model):
    import torch
    from safetensors.torch import save_file

    modules = json.loads((embedding_model / "modules.json").read_text())
    modules[2] = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (embedding_model / "modules.json").write_text(json.dumps(modules))
    (embedding_model / "2_Dense").mkdir()
    dense = {
        "in_features": 32,
        "out_features": 5,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    (embedding_model / "2_Dense" / "config.json").write_text(json.dumps(dense))
    save_file({"linear.weight": torch.ones(5, 32)}, embedding_model / "2_Dense" / WEIGHTS)
    hub.add(embedding_model)
    assert len(good(run(EMBED, options={}))[3]) == 5
    assert {"2_Dense/config.json", "2_Dense/model.safetensors"} <= set(hub.downloaded())
    hub.stop()
    answer = run(EMBED, options={}, no_sockets=True)
    assert len(good(answer)[3]) == 5
    assert answer["attempts"] == []


def test_the_second_open_makes_no_request(hub, run, embedding_model):
    hub.add(embedding_model)
    first = good(run(EMBED, options={}))
    asked = len(hub.requests)
    assert asked
    assert good(run(EMBED, options={})) == first
    assert len(hub.requests) == asked
    hub.stop()
    answer = run(EMBED, options={}, no_sockets=True)
    assert good(answer) == first
    assert answer["attempts"] == []
    assert answer["warnings"] == []


def test_the_second_open_of_a_bare_encoder_makes_no_request(hub, run, encoder):
    hub.add(encoder)
    first = good(run(LOAD, options={}))
    asked = len(hub.requests)
    assert good(run(LOAD, options={})) == first
    assert good(run(LOAD, options={"revision": "main"})) == first
    assert len(hub.requests) == asked
    answer = run(LOAD, options={}, no_sockets=True)
    assert good(answer) == first
    assert answer["attempts"] == []


def test_the_second_open_of_a_repository_without_any_tokenizer_makes_no_request(hub, run, encoder):
    hub.add({name: (encoder / name).read_bytes() for name in ("config.json", WEIGHTS)})
    good(run(LOAD, options={}))
    answer = run(LOAD, options={}, no_sockets=True)
    good(answer)
    assert answer["attempts"] == []


def test_the_second_open_of_the_oldest_layout_makes_no_request(hub, run, embedding_model):
    """0_Transformer/ holds the network's files, the root only modules.json."""
    inner = embedding_model / "0_Transformer"
    inner.mkdir()
    for path in list(embedding_model.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(path, inner / path.name)
    modules = (embedding_model / "modules.json").read_text()
    (embedding_model / "modules.json").write_text(modules.replace('"path": ""', '"path": "0_Transformer"'))
    hub.add(embedding_model)
    first = good(run(EMBED, options={}))
    assert first[2] == 77
    asked = len(hub.requests)
    assert good(run(EMBED, options={})) == first
    assert len(hub.requests) == asked


def test_sharded_weights_come_by_their_index(hub, run, make_checkpoint):
    folder, reference = make_checkpoint(vocab_size=331, pad_token_id=3)
    whole = float(reference.embeddings.tok_embeddings.weight.detach().sum())
    (folder / WEIGHTS).unlink()
    reference.save_pretrained(folder, max_shard_size="150kB")
    shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    hub.add(folder)
    name, total = good(run(LOAD, options={}))
    assert name == "ModernBert"
    assert total == pytest.approx(whole, abs=1e-3)
    assert set(shards) <= set(hub.downloaded())
    hub.stop()
    answer = run(LOAD, options={}, no_sockets=True)
    assert good(answer)[1] == pytest.approx(whole, abs=1e-3)
    assert answer["attempts"] == []


def test_a_cache_with_a_shard_missing_is_completed(hub, run, make_checkpoint):
    folder, reference = make_checkpoint(vocab_size=331, pad_token_id=3)
    (folder / WEIGHTS).unlink()
    reference.save_pretrained(folder, max_shard_size="150kB")
    hub.add(folder)
    found = Path(good(run(FIND, options={})))
    lost = sorted(found.glob("model-*-of-*.safetensors"))[1]
    lost.resolve().unlink()
    lost.unlink()
    message = failure(run(FIND, options={"local_files_only": True}))
    assert REPO in message
    hub.requests.clear()
    good(run(LOAD, options={}))
    assert hub.downloaded() == [lost.name]


def test_snapshots_of_links_to_blobs_are_read(hub, run, embedding_model):
    hub.add(embedding_model)
    found = Path(good(run(FIND, options={})))
    for name in ("config.json", WEIGHTS, "modules.json", "1_Pooling/config.json"):
        assert (found / name).is_symlink()
        assert "blobs" in (found / name).resolve().parts
    good(run(EMBED, options={}))


@pytest.mark.parametrize("place", ["HF_HUB_CACHE", "HF_HOME"])
def test_the_normal_cache_is_used(hub, run, encoder, tmp_path, place):
    hub.add(encoder)
    env = {"HF_HUB_CACHE": None, "HF_HOME": None, place: str(tmp_path / "elsewhere")}
    found = Path(good(run(FIND, options={}, env=env)))
    root = tmp_path / "elsewhere" if place == "HF_HUB_CACHE" else tmp_path / "elsewhere" / "hub"
    assert found.parent == root / "models--someone--some-model" / "snapshots"


def test_a_revision_is_asked_for_and_kept_apart(hub, run, make_checkpoint):
    commits, sums = {}, {}
    for seed, branch in enumerate(("main", "v2")):
        folder, model = make_checkpoint(vocab_size=331, pad_token_id=3, num_hidden_layers=2, seed=seed, name=branch)
        commits[branch] = hub.add(folder, branch=branch)
        sums[branch] = float(model.embeddings.tok_embeddings.weight.detach().sum())
    assert abs(sums["main"] - sums["v2"]) > 1e-2
    assert good(run(LOAD, options={}))[1] == pytest.approx(sums["main"], abs=1e-3)
    assert good(run(LOAD, options={"revision": "v2"}))[1] == pytest.approx(sums["v2"], abs=1e-3)
    assert f"/api/models/{REPO}/revision/v2" in [path for _, path, _ in hub.requests]
    asked = len(hub.requests)
    for revision in ("main", "v2", *commits.values()):
        branch = {commits[name]: name for name in commits}.get(revision, revision)
        assert good(run(LOAD, options={"revision": revision}))[1] == pytest.approx(sums[branch], abs=1e-3)
    assert len(hub.requests) == asked


def test_a_commit_is_a_revision(hub, run, encoder):
    commit = hub.add(encoder)
    assert Path(good(run(FIND, options={"revision": commit}))).name == commit


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_token_is_sent_with_every_request(hub, run, encoder, by):
    hub.add(encoder)
    hub.token = "hf_of_this_test"
    message = failure(run(FIND, options={}))
    assert REPO in message
    hub.requests.clear()
    if by == "argument":
        good(run(LOAD, options={"token": hub.token}))
    else:
        good(run(LOAD, options={}, env={"HF_TOKEN": hub.token}))
    assert hub.requests
    assert {authorization for _, _, authorization in hub.requests} == {f"Bearer {hub.token}"}


def test_no_token_is_sent_on_request(hub, run, encoder):
    hub.add(encoder)
    good(run(LOAD, options={"token": False}, env={"HF_TOKEN": "hf_of_this_test"}))
    assert hub.requests
    assert {authorization for _, _, authorization in hub.requests} == {None}
