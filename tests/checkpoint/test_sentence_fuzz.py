"""Random sets of sentence-transformers' files, against sentence-transformers: equal, refused by name, or one of its
faults. MODERNBERT_LITE_FUZZ=N tries N sets instead of a few."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

import modernbert_lite as ml

WIDTH = 32
TEXTS = ["The ferry leaves at nine.", "", "Find: a ferry [SEP]", "tide " * 30, "Wozu? [MASK]", " ", "naïve 図書館 CAFÉ"]
OLD = ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
PROMPTS = [
    "Find: ",
    "query",
    "",
    None,
    "Wozu? [SEP]",
    "[CLS]",
    "A long prompt of many words, to be cut. " * 3,
    "図書館",
]
ACTIVATIONS = [
    "linear.Identity",
    *(f"activation.{name}" for name in ("Tanh", "ReLU", "GELU", "Mish", "ELU", "Hardswish")),
]


@pytest.fixture(scope="module")
def bases(small_checkpoint):
    """Two folders; the second one's texts end without a special token."""
    return [small_checkpoint(ends=ends) for ends in (True, False)]


class Draw:
    """One set of files in `folder`, and how it is called."""

    def __init__(self, seed, folder):
        self.rng, self.folder = random.Random(seed), folder
        for path in [*folder.glob("[0-9]_*"), folder / "modules.json", *folder.glob("*sentence_*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        kept = folder.with_name(f"{folder.name} kept")  # a Dense in the folder itself is saved over the network
        if not kept.exists():
            shutil.copytree(folder, kept)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(kept / name, folder)
        self.files = {}
        self.modules()
        self.settings()
        self.texts()

    def some(self, options, chance=0.25):
        return {key: self.rng.choice(values) for key, values in options.items() if self.rng.random() < chance}

    def write(self, name, value):
        self.files[name] = value
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value))

    def modules(self):
        new = self.rng.random() < 0.5
        place = {"Pooling": "sentence_transformer.modules.pooling", "Dropout": "sentence_transformer.modules.dropout"}
        place["LayerNorm"] = "sentence_transformer.modules.layer_norm"
        listed, width = [], WIDTH
        kinds = ["Transformer", *self.rng.choices(["Normalize", "Dense"], k=self.rng.choice([0, 0, 0, 1])), "Pooling"]
        kinds += self.rng.choices(
            ["Dense", "Normalize", "LayerNorm", "Dropout", "Pooling"],
            [4, 4, 2, 2, 0.3],
            k=self.rng.choice([0, 1, 1, 2, 3]),
        )
        if self.rng.random() < 0.05:
            kinds.remove(self.rng.choice(kinds))
        for i, kind in enumerate(kinds):
            path = f"{i}_{kind}" if i else ""
            dotted = place.get(kind, f"base.modules.{kind.lower()}") if new else "models"
            listed.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{dotted}.{kind}"})
            (self.folder / path).mkdir(exist_ok=True)
            inner = "Pooling" in kinds[i:] and i > 0
            name = {"module_input_name": "token_embeddings"} if inner else {}
            if self.rng.random() < 0.1:
                name = self.some(
                    {
                        "module_input_name": ["token_embeddings", "sentence_embedding", "x"],
                        "module_output_name": ["x", "sentence_embedding", None],
                    },
                    0.6,
                )
            if kind == "Pooling":
                width *= self.pooling(path)
            elif kind == "Normalize" and (name or self.rng.random() < 0.5):
                self.write(f"{path}/config.json", name)
            elif kind == "Dropout":
                self.write(f"{path}/config.json", {"dropout": 0.5})
            elif kind == "LayerNorm":
                self.write(f"{path}/config.json", {"dimension": width})
                save_file(
                    {"norm.weight": torch.randn(width), "norm.bias": torch.randn(width)},
                    self.folder / path / "model.safetensors",
                )
            elif kind == "Dense":
                out = self.rng.choice([width, 20, 40])
                config = {
                    "in_features": width,
                    "out_features": out,
                    **self.some(
                        {
                            "bias": [True, False],
                            "activation_function": [f"torch.nn.modules.{a}" for a in ACTIVATIONS]
                            + ["relu", "torch.nn.ReLU", "my.Act"],
                            "use_residual": [True, False],
                        },
                        0.6,
                    ),
                    **name,
                }
                tensors = {"linear.weight": torch.randn(out, width) / 4}
                if config.get("bias", True):
                    tensors["linear.bias"] = torch.randn(out)
                if config.get("use_residual") and out != width:
                    tensors["residual.weight"] = torch.randn(out, width) / 4
                save_file(tensors, self.folder / path / "model.safetensors")
                self.write(f"{path}/config.json", config)
                if (
                    name.get("module_output_name", "sentence_embedding") == "sentence_embedding"
                    and name.get("module_input_name") != "x"
                ):
                    width = out
        if self.rng.random() < 0.04:
            self.rng.choice(listed)["type"] = "my_modules.Pooling"
        self.write("modules.json", listed)

    def pooling(self, path):
        config = {
            self.rng.choice(["word_embedding_dimension", "embedding_dimension"]): self.rng.choice([WIDTH, WIDTH, 768])
        }
        if self.rng.random() < 0.5:
            modes = self.rng.sample(MODES, self.rng.choice([1, 1, 2, 3]))
            config["pooling_mode"] = modes[0] if len(modes) == 1 and self.rng.random() < 0.5 else modes
            count = len(modes)
        else:
            flags = {f"pooling_mode_{key}": self.rng.random() < 0.3 for key in OLD}
            config |= flags
            count = max(1, sum(flags.values()))
        config |= self.some({"include_prompt": [False, False, True, None, 0]}, 0.6)
        self.write(f"{path}/config.json", config)
        return count

    def settings(self):
        tokenizer = {
            "truncation_side": ["left", "right"],
            "model_max_length": [9, 24, 1e30],
            "padding_side": ["left"],
            "do_lower_case": [True],
            "cache_dir": ["/tmp"],
            "odd": [1],
        }
        config = {
            "local_attention": [4, 8],
            "norm_eps": [0.1],
            "hidden_activation": ["silu"],
            "num_hidden_layers": [1],
            "attention_dropout": [0.5],
            "trust_remote_code": [True],
        }
        call = {
            "text": [{"max_length": 11}, {"truncation": True}, {"truncation": False}, {"padding": True}],
            "common": [{"max_length": 13}, {}],
            "image": [{"a": 1}],
        }
        text = {"method": "forward", "method_output_name": "last_hidden_state"}
        options = {
            "max_seq_length": [None, 12, 40, 12],
            "do_lower_case": [True, False],
            "tokenizer_args": [self.some(tokenizer)],
            "processor_kwargs": [self.some(tokenizer)],
            "config_args": [self.some(config, 0.15)],
            "config_kwargs": [self.some(config, 0.15)],
            "model_args": [self.some({"attn_implementation": ["eager", "sdpa"], "low_cpu_mem_usage": [True]})],
            "processing_kwargs": [self.some(call, 0.3)],
            "transformer_task": ["feature-extraction", "feature-extraction", "fill-mask"],
            "unpad_inputs": [True, False],
            "query_length": [None, 8],
        }
        chosen = self.some(options, 0.2)
        if self.rng.random() < 0.15:
            chosen |= {
                "modality_config": {"text": text},
                "module_output_name": self.rng.choice(["token_embeddings", "token_embeddings", "x"]),
            }
        if self.rng.random() < 0.8:
            other = self.rng.choice(["bert", "bert", "bert", "roberta", "xlnet", "albert"])
            self.write(f"sentence_{other}_config.json", chosen)
            if self.rng.random() < 0.3:
                self.write(
                    f"sentence_{self.rng.choice(['bert', 'albert', 'camembert'])}_config.json", {"max_seq_length": 15}
                )

    def texts(self):
        names = self.rng.sample(["query", "document", "passage", "other"], self.rng.choice([0, 1, 2, 4]))
        options = {
            "default_prompt_name": [None, None, "query", "other", "document", *names],
            "similarity_fn_name": ["cosine", "dot", "euclidean", "manhattan", None, "maxsim"],
            "truncate_dim": [None, 16, 700],
            "model_type": ["SentenceTransformer"],
            "__version__": [{"sentence_transformers": "3.0.1"}],
            "requirements": [{"torch": ">=1.0"}],
        }
        if self.rng.random() < 0.85:
            prompts = {name: self.rng.choice(PROMPTS) for name in names}
            self.write("config_sentence_transformers.json", {"prompts": prompts, **self.some(options, 0.4)})
        calls = [
            {},
            {"prompt_name": self.rng.choice(["query", "document", "passage", *names])},
            {"prompt": self.rng.choice(PROMPTS)},
        ]
        self.calls = self.rng.sample(calls, 2)
        self.role = self.rng.choice(["encode", "encode", "encode_query"])


def outcome(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return error


def ours_of(draw):
    model = ml.Embedder.from_pretrained(draw.folder)
    got = [outcome(getattr(model, draw.role), TEXTS, **call) for call in draw.calls]
    return [*got, model.similarity_fn_name, model.normalizes]


def theirs_of(draw):
    model = SentenceTransformer(str(draw.folder), device="cpu")
    got = [outcome(getattr(model, draw.role), TEXTS, **call) for call in draw.calls]
    return [*got, model.similarity_fn_name]


def compare(draw):
    """ "equal", "refused" or "theirs fails"; raises AssertionError for a silent difference."""
    ours, theirs = outcome(ours_of, draw), outcome(theirs_of, draw)
    if isinstance(ours, Exception):
        assert isinstance(ours, ml.CheckpointError), repr(ours)
        return "refused" if not isinstance(theirs, Exception) else "both fail"
    if isinstance(theirs, Exception):
        return "theirs fails"
    assert ours[2] == theirs[2]
    kinds = set()
    for call, a, b in zip(draw.calls, ours, theirs, strict=False):
        if isinstance(a, Exception):
            assert isinstance(a, (ml.CheckpointError, ml.OptionError, ValueError, TypeError)), repr(a)
            assert isinstance(b, Exception) or not np.isfinite(b).all(), f"{call}: {a!r}"
            kinds.add("both fail")
        elif isinstance(b, Exception):
            kinds.add("theirs fails")
        else:
            if "left" in json.dumps(draw.files):
                # In a batch it gives a text without a token beside its prompt the vector of a padding token.
                alone = SentenceTransformer(str(draw.folder), device="cpu")
                b[1] = getattr(alone, draw.role)(TEXTS[1], **call)
            if (
                ours[3]
                and a.shape[1] < 700
                and draw.files.get("config_sentence_transformers.json", {}).get("truncate_dim") == 16
            ):
                b = b / np.linalg.norm(b, axis=1, keepdims=True).clip(1e-12)  # it cuts after Normalize; we before
            assert a.shape == b.shape, f"{call}: {a.shape} {b.shape}"
            good = np.isfinite(b)
            assert (np.isfinite(a) == good).all(), call
            far = np.abs(a - b)[good]
            assert far.size == 0 or far.max() <= 1e-5 * max(1, np.abs(b[good]).max()), f"{call}: {far.max()}"
            kinds.add("equal")
    return "equal" if "equal" in kinds else kinds.pop()


def test_random_files_give_sentence_transformers_vectors_or_are_refused(bases):
    tries = int(os.environ.get("MODERNBERT_LITE_FUZZ", "24"))
    first = int(os.environ.get("MODERNBERT_LITE_FUZZ_FIRST", "0"))
    seen, wrong = {}, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(first, first + tries):
            draw = Draw(seed, bases[seed % 2])
            try:
                kind = compare(draw)
            except AssertionError as error:
                wrong.append(f"{seed}: {str(error)[:300]} {draw.role} {draw.calls} {json.dumps(draw.files)}")
                kind = "wrong"
            seen[kind] = seen.get(kind, 0) + 1
    assert not wrong, "\n".join([str(seen), *wrong])
    assert seen.get("equal", 0) >= tries // 3, seen
