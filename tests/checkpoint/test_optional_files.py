"""A name that a checkpoint's file has and that is no readable file is an error, for every file that is read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
from pathlib import Path

import pytest

import modernbert_lite as ml
from modernbert_lite import CheckpointError, Embedder
from modernbert_lite import reading as reads
from modernbert_lite.reading import is_there, optional_json, read_bytes, read_json

TINY = Path(ml.__file__).parent / "tiny"
READ = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "sentence_xlm-roberta_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "1_Pooling/config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
]
KINDS = ["a link to nothing", "a link to itself", "a folder", "a pipe", "a socket", "a device", "a link to a pipe"]


@pytest.fixture
def folder(tmp_path):
    """A sound embedding model, with every optional file that is read; nothing in it is a link but the weights."""
    folder = shutil.copytree(TINY, tmp_path / "folder", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(TINY / "model.safetensors")
    texts = json.loads((folder / "config_sentence_transformers.json").read_text())
    (folder / "config_sentence_transformers.json").write_text(json.dumps({**texts, "prompts": {"query": "find: "}}))
    return folder


@pytest.fixture(autouse=True)
def no_hang():
    """A pipe that is opened, or a device that is read to its end, would hang for ever."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(30)
    yield
    signal.alarm(0)


def put(path: Path, kind: str) -> None:
    if path.exists():
        path.unlink()
    if kind == "a link to nothing":
        path.symlink_to("nothing")
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to a pipe":
        os.mkfifo(path.with_name(f"pipe-{path.name}"))
        path.symlink_to(f"pipe-{path.name}")
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:  # a socket's path may have 108 bytes
        here = os.getcwd()
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
        os.chdir(here)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READ)
def test_what_has_a_file_s_name_and_is_none_is_an_error_that_names_it(folder, name, kind):
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()  # with it the index isn't read
    if name == "sentence_xlm-roberta_config.json":
        (folder / "sentence_bert_config.json").unlink()
    put(folder / name, kind)
    with pytest.raises(CheckpointError) as error:
        Embedder.from_pretrained(folder)
    assert Path(name).name in str(error.value)
    what = {"a link to nothing": "nothing, which is not there", "a link to itself": "symbolic link"}
    assert what.get(kind, kind.removeprefix("a link to ")) in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_is_no_file_is_an_error(folder, kind):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    )
    put(folder / "two.safetensors", kind)
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        ml.load_model(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_module_s_files_are_files(folder, kind):
    modules = json.loads((folder / "modules.json").read_text())
    modules.insert(2, {"idx": 2, "name": "dense", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").unlink()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    settings = {"in_features": 384, "out_features": 3, "activation_function": "torch.nn.modules.linear.Identity"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
    put(folder / "2_Dense" / "model.safetensors", kind)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Embedder.from_pretrained(folder)
    put(folder / "2_Dense" / "config.json", kind)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Embedder.from_pretrained(folder)


def test_a_file_that_may_not_be_read_is_an_error(folder):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (folder / "config_sentence_transformers.json").chmod(0)
    with pytest.raises(CheckpointError, match=r"config_sentence_transformers\.json can't be read"):
        Embedder.from_pretrained(folder)


def test_a_link_to_a_file_is_that_file(folder):
    want = Embedder.from_pretrained(folder).encode("a guitar", prompt_name="query")
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        elsewhere = folder.parent / f"elsewhere-{path.name}-{path.parent.name}"
        shutil.move(path, elsewhere)
        path.symlink_to(elsewhere)
    assert (Embedder.from_pretrained(folder).encode("a guitar", prompt_name="query") == want).all()


def test_no_more_than_the_limit_is_read_of_a_file_that_lies_about_its_size(tmp_path, monkeypatch):
    """Files in /proc have the size 0; others grow while they are read."""
    path = tmp_path / "config.json"
    path.write_bytes(b" " * 5_000)
    real = Path.stat

    def stat(self, **keywords):
        found = list(real(self, **keywords))
        found[6] = 0
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", stat)
    assert read_bytes(path, 5_000) == b" " * 5_000
    with pytest.raises(CheckpointError, match=r"config\.json has more than 4999 bytes"):
        read_bytes(path, 4_999)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux only")
def test_a_file_of_proc_is_read_to_the_limit(folder):
    put(folder / "tokenizer_config.json", "a link to nothing")
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to("/proc/self/maps")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json can't be read as JSON"):
        Embedder.from_pretrained(folder)


def test_a_tokenizer_of_any_size_is_not_read(folder, monkeypatch):
    (folder / "tokenizer.json").unlink()
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has more than 268435456 bytes"):
        Embedder.from_pretrained(folder)


def test_weights_of_any_size_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2) + b"{}")
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ml.load_model(folder)


def test_what_is_missing_is_passed_over(tmp_path):
    assert not is_there(tmp_path / "x.json")
    assert not is_there(tmp_path / "no" / "x.json")
    (tmp_path / "file").touch()
    assert not is_there(tmp_path / "file" / "x.json")
    assert optional_json(tmp_path / "x.json") == {}
    with pytest.raises(CheckpointError, match="is missing"):
        read_json(tmp_path / "x.json")


def test_each_optional_file_is_asked_for_in_one_way():
    """`is_file()` and `exists()` pass over a link to nothing, a folder and a pipe."""
    core = Path(reads.__file__).parent
    wings = ("models", "checkpoint", "pipeline")
    for path in [*core.glob("*.py"), *(path for wing in wings for path in (core / wing).glob("*.py"))]:
        if path != Path(reads.__file__):
            for line in path.read_text(encoding="utf-8").splitlines():
                assert ".is_file()" not in line, f"{path.name}: {line.strip()}"
