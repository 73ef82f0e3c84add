"""Shared by tests/checkpoint: test_hub, test_hub_caches, test_hub_errors."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

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
