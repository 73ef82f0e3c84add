"""The hub's cache: made by other tools, offline, incomplete."""

from __future__ import annotations

import os

import pytest
from hub_cases import EMBED, LOAD, REPO, WEIGHTS, client, embedding_model, encoder, failure, good, hub, run  # noqa: F401

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the client forks")


# What another library leaves in the cache: the files that it needed, and no list of what the repository has.
OTHER_TOOL = """
import huggingface_hub, shutil
for name in files:
    path = huggingface_hub.hf_hub_download(repo, name)
shutil.rmtree(path.split("/snapshots/")[0] + "/trees", ignore_errors=True)
"""


def test_a_cache_of_another_tool_is_looked_up_once(hub, run, embedding_model):
    hub.add(embedding_model)
    good(run(OTHER_TOOL, files=["config.json", "tokenizer.json", WEIGHTS]))
    hub.requests.clear()
    result = good(run(EMBED, options={}))
    assert result[:3] == [["cls"], True, 77]
    assert "modules.json" in hub.downloaded()
    assert WEIGHTS not in hub.downloaded()
    asked = len(hub.requests)
    assert good(run(EMBED, options={})) == result
    assert len(hub.requests) == asked


def test_a_cache_of_another_tool_without_its_pooling_is_completed(hub, run, embedding_model):
    hub.add(embedding_model)
    files = [p.name for p in embedding_model.iterdir() if p.is_file()]
    good(run(OTHER_TOOL, files=files))
    hub.requests.clear()
    assert good(run(EMBED, options={}))[0] == ["cls"]
    assert hub.downloaded() == ["1_Pooling/config.json"]


def test_a_cache_of_another_tool_is_used_with_a_warning_when_the_hub_is_away(hub, run, embedding_model):
    hub.add(embedding_model)
    good(run(OTHER_TOOL, files=["config.json", "tokenizer.json", WEIGHTS]))
    hub.stop()
    answer = run(LOAD, options={}, seconds=15)  # and not after minutes of retries
    assert good(answer)[0] == "ModernBert"
    assert any(REPO in warning and "could not be reached" in warning for warning in answer["warnings"])


def test_a_repository_without_optional_files_is_looked_up_once_only(hub, run, encoder):
    hub.add({name: (encoder / name).read_bytes() for name in ("config.json", WEIGHTS, "tokenizer.json")})
    good(run(OTHER_TOOL, files=["config.json", "tokenizer.json", WEIGHTS]))
    hub.requests.clear()
    good(run(LOAD, options={}))
    assert hub.requests
    hub.requests.clear()
    good(run(LOAD, options={}))
    assert hub.requests == []


OFFLINE = {  # by what: options, environment
    "argument": ({"local_files_only": True}, {}),
    "environment": ({}, {"HF_HUB_OFFLINE": "1"}),
    "both": ({"local_files_only": True}, {"HF_HUB_OFFLINE": "1"}),
}


@pytest.mark.parametrize("by", OFFLINE)
def test_offline_never_touches_the_network(hub, run, embedding_model, by):
    options, env = OFFLINE[by]
    hub.add(embedding_model)
    answer = run(LOAD, options=options, env=env, no_sockets=True)
    message = failure(answer)
    assert REPO in message
    assert "not in the hub cache" in message
    assert "offline" in message
    assert answer["attempts"] == []

    first = good(run(EMBED, options={}))
    hub.requests.clear()
    answer = run(EMBED, options=options, env=env, no_sockets=True)
    assert good(answer) == first
    assert answer["attempts"] == []
    assert hub.requests == []


@pytest.mark.parametrize("by", OFFLINE)
def test_offline_a_cache_of_another_tool_is_used_as_it_is(hub, run, encoder, by):
    options, env = OFFLINE[by]
    hub.add(encoder)
    good(run(OTHER_TOOL, files=["config.json", WEIGHTS]))
    answer = run(LOAD, options=options, env=env, no_sockets=True)
    assert good(answer)[0] == "ModernBert"
    assert answer["attempts"] == []
