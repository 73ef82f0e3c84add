"""Randomly changed files load, or are refused by the right exception."""

from __future__ import annotations

import copy
import json
import random
import struct

import pytest
import torch
from bad_checkpoints_cases import ST, folder, with_header, write, write_modules  # noqa: F401

import modernbert_lite as ml
from modernbert_lite import CheckpointError
from modernbert_lite.checkpoint.folder import Folder, open_safetensors
from modernbert_lite.checkpoint.sentence import read_sentence_config
from modernbert_lite.checkpoint.weights import load_weights
from modernbert_lite.models.modernbert import ModernBert
from modernbert_lite.models.registry import read_config
from modernbert_lite.reading import read_json


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
            load_weights(ModernBert, config, Folder(plain), device=torch.device("cpu"), dtype=torch.float32)
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
            read_sentence_config(Folder(folder))
        except ValueError:
            pass
        except BaseException as error:
            pytest.fail(f"{type(error).__name__}: {error} for {(folder / name).read_text()!r}")


def test_read_json_and_open_safetensors_name_a_missing_file(tmp_path):
    for reads in (read_json, open_safetensors):
        with pytest.raises(CheckpointError, match="gone"):
            reads(tmp_path / "gone")


# --- the code itself
