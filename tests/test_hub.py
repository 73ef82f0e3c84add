"""Checkpoints by hub id, against a small hub on this machine: what is asked for, what is kept, what needs no network.

huggingface_hub reads its environment when it is imported, so the client is another process: one that has imported torch
(slow) and forks for each job, which sets its environment and only then imports huggingface_hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from modernbert_lite.checkpoint import hub as hub_files
from modernbert_lite.checkpoint.folder import Folder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the client forks")

REPO = "someone/some-model"
WEIGHTS = "model.safetensors"
CLIENT = """
import contextlib, importlib, json, os, signal, socket, sys, traceback, warnings
import torch, modernbert_lite.embedder
for name in ("httpx2", "httpx", "requests", "yaml", "tqdm.auto", "tqdm.contrib.concurrent", "fsspec"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
torch.set_num_threads(1)  # threads don't live through a fork
modernbert_lite.load_model("tiny", device="cpu")  # brings in what torch loads late
assert "huggingface_hub" not in sys.modules

def run(job):
    signal.alarm(job["seconds"])
    for name in [n for n in os.environ if n.startswith(("HF_", "HUGGING"))]:
        del os.environ[name]
    os.environ.update(job["env"])
    attempts = []
    if job["no_sockets"]:
        def refuse(*args, **kwargs):
            attempts.append(repr(args))
            raise OSError("the network was used")
        socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
    answer = {"result": None, "error": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = dict(job["names"])
        try:
            exec(job["code"], names)
            answer["result"] = names.get("result")
        except BaseException as error:
            answer["error"] = [type(error).__name__, str(error)]
            traceback.print_exc()
    answer["warnings"] = [str(w.message) for w in caught]
    answer["attempts"] = attempts
    return json.dumps(answer)

for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, run(json.loads(line)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        print(pipe.read() or '{"error": ["Crash", "or no answer in time"]}', flush=True)
    os.waitpid(child, 0)
"""


class Hub:
    """The parts of the hub's interface that a download uses."""

    def __init__(self):
        self.repos = {}  # id -> {commit: {path: bytes}}
        self.refs = {}  # id -> {branch or tag: commit}
        self.token = None  # what every request must carry
        self.status = None  # what every request gets instead
        self.message = "out of order"
        self.requests = []  # (method, path, authorization)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self)

            do_GET = do_HEAD

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def add(self, files, repo=REPO, branch="main"):
        """files: path -> bytes, or a folder. Returns the commit."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        text = repr([(path, hashlib.sha1(files[path]).hexdigest()) for path in sorted(files)])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = dict(files)
        self.refs.setdefault(repo, {})[branch] = commit
        return commit

    def answer(self, handler):
        path = unquote(urlsplit(handler.path).path)
        self.requests.append((handler.command, path, handler.headers.get("Authorization")))
        status, headers, body = self.find(path, handler.headers.get("Authorization"))
        if isinstance(body, (dict, list)):
            headers["Content-Type"], body = "application/json", json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def find(self, path, authorization):
        if self.status is not None:
            return self.status, {}, {"error": self.message}
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "GatedRepo"}, {"error": "a token is needed"}
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        parts += ["revision", "main"][len(parts) - 2 :] if len(parts) < 4 else []
        repo, what, revision, rest = "/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:])
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "no such repository"}
        commit = self.refs[repo].get(revision, revision)
        if commit not in self.repos[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "no such revision"}
        files = self.repos[repo][commit]
        if api and what == "revision":
            siblings = [{"rfilename": name} for name in sorted(files)]
            return 200, {}, {"id": repo, "modelId": repo, "sha": commit, "private": False, "siblings": siblings}
        if api and what == "tree":
            return 200, {}, [{"type": "file", "path": p, "size": len(b), "oid": self.etag(b)} for p, b in files.items()]
        if what == "resolve" and rest in files:
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{self.etag(files[rest])}"'}, files[rest]
        return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, {"error": "no such file"}

    @staticmethod
    def etag(body):
        return hashlib.sha1(body).hexdigest()

    def downloaded(self):
        """Files whose content was asked for."""
        return sorted(
            p.split("/resolve/")[1].split("/", 1)[1] for method, p, _ in self.requests if self._is_file(method, p)
        )

    @staticmethod
    def _is_file(method, path):
        return method == "GET" and "/resolve/" in path


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def client():
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    yield process
    process.stdin.close()
    process.wait()
    process.stdout.close()


@pytest.fixture
def run(client, hub, tmp_path):
    """run(code, env=.., **names) in a process of its own -> {"result", "error", "warnings", "attempts"}."""

    def run(code, *, env=None, no_sockets=False, seconds=60, **names):
        home = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        env = {name: value for name, value in {**home, **(env or {})}.items() if value is not None}
        names = {"repo": REPO, **names}
        job = {"code": code, "env": env, "names": names, "no_sockets": no_sockets, "seconds": seconds}
        client.stdin.write(json.dumps(job) + "\n")
        client.stdin.flush()
        return json.loads(client.stdout.readline())

    return run


FIND = "from modernbert_lite.checkpoint.hub import find_checkpoint; result = str(find_checkpoint(repo, **options).root)"
LOAD = """
import modernbert_lite
model = modernbert_lite.load_model(repo, **options)
result = [type(model).__name__, float(next(model.parameters()).sum())]
"""
EMBED = """
import modernbert_lite
model = modernbert_lite.Embedder.from_pretrained(repo, **options)
result = [list(model.pooling.modes), model.normalizes, model.max_seq_length, model.encode("a few words").tolist()]
"""


def good(answer):
    assert answer["error"] is None, answer["error"]
    return answer["result"]


def failure(answer):
    """The message of a CheckpointError: one line."""
    assert answer["error"] is not None, f"no error, but {answer['result']}"
    kind, message = answer["error"]
    assert kind == "CheckpointError", answer["error"]
    assert "\n" not in message, f"more than one line: {message}"
    return message


def sentence_files(folder, **more):
    st = "sentence_transformers.models."
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": st + "Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": st + "Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": st + "Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 32, "pooling_mode_cls_token": true}'
    )
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 77, "do_lower_case": false}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {}, "similarity_fn_name": "cosine"}')


@pytest.fixture
def embedding_model(make_checkpoint):
    """A folder as an embedding model's repository has it."""
    folder, _ = make_checkpoint(hidden_size=32, num_attention_heads=1, intermediate_size=40, num_hidden_layers=2)
    sentence_files(folder)
    return folder


@pytest.fixture
def encoder(make_checkpoint):
    """A small encoder without a tokenizer that fits, or sentence-transformers files: for what only loads weights."""
    folder, _ = make_checkpoint(vocab_size=331, pad_token_id=3, num_hidden_layers=3)
    return folder


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
