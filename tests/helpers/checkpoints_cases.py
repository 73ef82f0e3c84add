"""Shared by tests/checkpoint: test_matrix_configs, test_matrix, test_matrix_classes."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

ROOT = Path(__file__).parents[2]


DATA = ROOT / "tests" / "data"


ENTRIES = json.loads((DATA / "checkpoints.json").read_text(encoding="utf-8"))["checkpoints"]


FULL, SLIDING = "full_attention", "sliding_attention"


every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["id"])


# --- config.json, as the repository's own generation writes it


# What the files of a generation share; the row's own keys come on top. Both were copied from published files.
HUB: dict[str, dict[str, Any]] = {
    "4.48": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "classifier_activation": "gelu",
        "classifier_bias": False,
        "classifier_dropout": 0.0,
        "classifier_pooling": "cls",
        "decoder_bias": True,
        "deterministic_flash_attn": False,
        "embedding_dropout": 0.0,
        "global_attn_every_n_layers": 3,
        "hidden_activation": "gelu",
        "initializer_cutoff_factor": 2.0,
        "initializer_range": 0.02,
        "local_attention": 128,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "model_type": "modernbert",
        "norm_bias": False,
        "norm_eps": 1e-05,
        "sparse_pred_ignore_index": -100,
        "sparse_prediction": False,
        "transformers_version": "4.48.0",
    },
    "new": {
        "attention_probs_dropout_prob": 0.0,
        "auto_map": {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"},
        "classifier_dropout": None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "layer_norm_type": "layer_norm",
        "logn_attention_clip1": False,
        "logn_attention_scale": False,
        "model_type": "new",
        "pack_qkv": True,
        "position_embedding_type": "rope",
        "transformers_version": "4.39.1",
        "unpad_inputs": False,
        "use_memory_efficient_attention": False,
    },
    "gte": {
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "layer_norm_eps": 1e-12,
        "model_type": "gte",
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
    },
}
HUB["gte-old"] = {**HUB["new"], "model_type": "gte"}


def is_gte(entry) -> bool:
    return entry["generation"] in ("new", "gte-old", "gte")


def stored_dtype(entry) -> torch.dtype:
    known = {"16 bits": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return known.get(entry["stored"], torch.float32)


def old_form(entry, **changes) -> dict[str, Any]:
    """A row's config.json, a ModernBERT's with the keys of transformers 4.48."""
    generation = entry["generation"] if is_gte(entry) else "4.48"
    dtype = str(stored_dtype(entry)).removeprefix("torch.")
    key = "dtype" if generation == "gte" else "torch_dtype"
    return {**HUB[generation], "architectures": entry["architectures"], key: dtype, **entry["config"], **changes}


def new_form(raw) -> dict[str, Any]:
    """The same as transformers 5 writes it."""
    raw = dict(raw)
    every = raw.pop("global_attn_every_n_layers")
    scaling = raw.pop("rope_scaling", {"rope_type": "default"})
    thetas = {FULL: raw.pop("global_rope_theta"), SLIDING: raw.pop("local_rope_theta")}
    raw["layer_types"] = [FULL if i % every == 0 else SLIDING for i in range(raw["num_hidden_layers"])]
    raw["rope_parameters"] = {kind: {**scaling, "rope_theta": theta} for kind, theta in thetas.items()}
    raw["dtype"] = raw.pop("torch_dtype")
    return raw


def hub_config(entry, **changes) -> dict[str, Any]:
    """In the row's own generation; rows of unknown generation are of transformers 5's time."""
    raw = old_form(entry, **changes)
    return raw if entry["generation"] else new_form(raw)


def reference_config(raw) -> Any:
    """transformers' config of the same network; GTE's `ntk` is its `linear` (reference, section 2.1)."""
    shared = ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map")
    if raw["model_type"] == "modernbert":
        values = raw if "rope_parameters" in raw else new_form(raw)
        ids = {"pad_token_id": None}  # its default is ModernBERT's own, which a small vocabulary doesn't have
        return transformers.ModernBertConfig(**ids | {k: v for k, v in values.items() if k not in shared})
    if "rope_parameters" not in raw:
        theta, scaling = raw["rope_theta"], raw["rope_scaling"]
        rope = {"rope_type": "default", "rope_theta": theta}
        if scaling:
            factor, d = scaling["factor"], raw["hidden_size"] // raw["num_attention_heads"]
            rope = {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / d)}
        raw = {**raw, "rope_parameters": rope}
    known = {*transformers.GteConfig.__dataclass_fields__, "id2label", "num_labels"}
    return transformers.GteConfig(**{k: v for k, v in raw.items() if k in known - set(shared)})


def reference_class(entry) -> Any:
    """Of a file with several architectures, the last one's has them all (gte-multilingual-base)."""
    return getattr(transformers, re.sub("^New", "Gte", entry["architectures"][-1]))


# --- a. the real config


def encoder(network) -> Any:
    return getattr(network, "model", network)


VOCABULARY = 700


OPEN, CLOSE, PAD, MASK, UNKNOWN = "open", "close", "pad", "mask", "unk"


NAMES = {
    "bytelevel": {OPEN: "[CLS]", CLOSE: "[SEP]", PAD: "[PAD]", MASK: "[MASK]", UNKNOWN: "[UNK]"},
    "wordpiece": {OPEN: "[CLS]", CLOSE: "[SEP]", PAD: "[PAD]", MASK: "[MASK]", UNKNOWN: "[UNK]"},
    "gemma": {OPEN: "<bos>", CLOSE: "<eos>", PAD: "<pad>", MASK: "<mask>", UNKNOWN: "<unk>"},
    "unigram": {OPEN: "<s>", CLOSE: "</s>", PAD: "<pad>", MASK: "<mask>", UNKNOWN: "<unk>"},
}


# Where the row doesn't say: BERT's, XLM-R's and Gemma's own.
USUAL = {
    "bytelevel": {PAD: 0, OPEN: 1, CLOSE: 2, UNKNOWN: 3, MASK: 4},
    "wordpiece": {PAD: 0, UNKNOWN: 100, OPEN: 101, CLOSE: 102, MASK: 103},
    "gemma": {PAD: 0, CLOSE: 1, OPEN: 2, UNKNOWN: 3, MASK: 4},
    "unigram": {OPEN: 0, PAD: 1, CLOSE: 2, UNKNOWN: 5, MASK: 7},
}


CHARACTERS = string.ascii_letters + string.digits + ".,:;?!_-'" + "検索クエリ文書トピック"


def fold(token_id: int, vocabulary: int) -> int:
    """A real id in the small vocabulary: low ones as they are, high ones as far from the end."""
    return token_id if token_id < 128 else VOCABULARY - (vocabulary - token_id)


def small_settings(entry) -> dict[str, Any]:
    """Of the row's head size, with an odd GLU, two global layers, and its special ids."""
    config = entry["config"]
    vocabulary = config.get("vocab_size", 50368)
    ids = {key: fold(i, vocabulary) for key, i in config.items() if key.endswith("_token_id") and i is not None}
    return {
        "hidden_size": 3 * (config["hidden_size"] // config["num_attention_heads"]),
        "num_attention_heads": 3,
        "num_hidden_layers": 2 if is_gte(entry) else 4,
        "intermediate_size": 133,
        "vocab_size": VOCABULARY,
        **ids,
    }


def random_network(entry, raw, seed=0) -> Any:
    """transformers' network, whose weights are exact in the dtype that the row stores."""
    torch.manual_seed(seed)
    config = reference_config(raw)
    config.initializer_range, config.initializer_cutoff_factor = 0.1, 3.0  # attention that is sharp, and differs
    network = reference_class(entry)(config)
    for name, parameter in network.named_parameters():
        if "norm" in name.lower() or name.endswith("bias"):
            parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    for parameter in network.parameters():  # these alone: the frequencies of RoPE are buffers
        parameter.data = parameter.data.to(stored_dtype(entry)).float()
    return network.eval()


def stored_names(entry, network) -> dict[str, torch.Tensor]:
    """The tensors of a row's file, under the names that it has."""
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("decoder.weight")}
    if not is_gte(entry):
        heads = ("head.", "decoder.", "classifier.")
        bare = {k if k.startswith(heads) else k.removeprefix("model."): v for k, v in state.items()}
        return {k if k.startswith(heads) else entry["prefix"] + k: v for k, v in bare.items()}
    state = {k.removeprefix("gte."): v for k, v in state.items()}
    for i in range(network.config.num_hidden_layers):
        layer, new = f"layers.{i}.", f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{layer}self_attn.{p}_proj.{kind}") for p in "qkv"]
            state[f"{new}attention.qkv_proj.{kind}"] = torch.cat(parts)
            state[f"{new}attention.o_proj.{kind}"] = state.pop(f"{layer}self_attn.o_proj.{kind}")
            state[f"{new}attn_ln.{kind}"] = state.pop(f"{layer}post_attention_layernorm.{kind}")
            state[f"{new}mlp_ln.{kind}"] = state.pop(f"{layer}post_mlp_layernorm.{kind}")
            state[f"{new}mlp.down_proj.{kind}"] = state.pop(f"{layer}mlp.down_proj.{kind}")
        halves = [state.pop(f"{layer}mlp.{half}_proj.weight") for half in ("up", "gate")]
        state[f"{new}mlp.up_gate_proj.weight"] = torch.cat(halves)
    state = {k.replace("lm_head.layer_norm", "lm_head.norm"): v for k, v in state.items()}
    heads = ("classifier.", "lm_head.")
    return {k if k.startswith(heads) else entry["prefix"] + k: v for k, v in state.items()}


def write_tokenizer(entry, folder, raw) -> None:
    """A small tokenizer of the row's kind: single characters, and its special tokens at their (folded) ids."""
    kind = entry["tokenizer"]["kind"]
    names = dict(NAMES[kind])
    opening = "bos_token_id" if kind == "gemma" else "cls_token_id"
    closing = "eos_token_id" if kind == "gemma" else "sep_token_id"
    given = {OPEN: raw.get(opening), CLOSE: raw.get(closing), PAD: raw.get("pad_token_id")}
    if "mask_token_id" in entry["tokenizer"]:
        given[MASK] = fold(entry["tokenizer"]["mask_token_id"], entry["config"]["vocab_size"])
    ids = {**USUAL[kind], **{role: i for role, i in given.items() if i is not None}}
    for role in (UNKNOWN, MASK):  # one that the row doesn't know may lie on one that it does
        while ids[role] in [i for other, i in ids.items() if other != role]:
            ids[role] += 1
    slots: list[str | None] = [None] * VOCABULARY
    for role, name in names.items():
        slots[ids[role]] = name
    if "multi_vector" in entry:
        markers = entry["multi_vector"]["query_prefix"], entry["multi_vector"]["document_prefix"]
        slots[-2:] = markers
    symbols = {
        "bytelevel": sorted(pre_tokenizers.ByteLevel.alphabet()),
        "wordpiece": [*CHARACTERS.lower(), *(f"##{c}" for c in CHARACTERS.lower())],
        "gemma": [*(f"<0x{i:02X}>" for i in range(256)), "▁", *CHARACTERS],
        "unigram": ["▁", *CHARACTERS],
    }[kind]
    fresh = iter([*dict.fromkeys(symbols), *(f"[unused{i}]" for i in range(VOCABULARY))])
    tokens = [token if token is not None else next(fresh) for token in slots]
    vocab = {token: i for i, token in enumerate(tokens)}
    assert len(vocab) == VOCABULARY

    if kind == "bytelevel":
        tokenizer = tokenizers.Tokenizer(tokenizer_models.BPE(vocab, []))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "wordpiece":
        tokenizer = tokenizers.Tokenizer(tokenizer_models.WordPiece(vocab, unk_token=names[UNKNOWN]))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
    elif kind == "gemma":
        model = tokenizer_models.BPE(vocab, [], unk_token=names[UNKNOWN], byte_fallback=True, fuse_unk=True)
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        scores = [(token, -float(i)) for i, token in enumerate(tokens)]
        tokenizer = tokenizers.Tokenizer(tokenizer_models.Unigram(scores, unk_id=ids[UNKNOWN]))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    first, last = names[OPEN], names[CLOSE]
    pairs = {
        "wordpiece": f"{first} $A {last} $B:1 {last}:1",
        "unigram": f"{first} $A {last} {last} $B {last}",
    }
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=pairs.get(kind, f"{first} $A {last} $B {last}"),
        special_tokens=[(first, ids[OPEN]), (last, ids[CLOSE])],
    )
    tokenizer.add_special_tokens(list(names.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"cls_token": OPEN, "sep_token": CLOSE, "pad_token": PAD, "mask_token": MASK, "unk_token": UNKNOWN}
    settings = {key: names[role] for key, role in roles.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_module(folder, number, kind, config, seed) -> dict[str, Any]:
    """A Dense or a LayerNorm of sentence-transformers: its config and random weights -> its place in modules.json."""
    generator = torch.Generator().manual_seed(seed)
    path = folder / f"{number}_{kind}"
    path.mkdir()
    if kind == "LayerNorm":
        sizes: dict[str, Any] = {"norm.weight": (config["dimension"],), "norm.bias": (config["dimension"],)}
    else:
        shape = config["out_features"], config["in_features"]
        sizes = {"linear.weight": shape}
        if config.get("bias"):
            sizes["linear.bias"] = shape[:1]
        if config.get("use_residual") and shape[0] != shape[1]:
            sizes["residual.weight"] = shape
    (path / "config.json").write_text(json.dumps(config))
    save_file({k: torch.randn(s, generator=generator) * 0.2 for k, s in sizes.items()}, path / "model.safetensors")
    return {"idx": number, "name": str(number), "path": path.name, "type": f"sentence_transformers.models.{kind}"}


def write_sentence_files(entry, folder, width) -> None:
    """modules.json and what it names, in the old form."""
    (folder / "config_sentence_transformers.json").write_text("{}")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    texts: dict[str, Any] = {"prompts": {}, "default_prompt_name": None}
    if "sentence" in entry:
        sentence = entry["sentence"]
        (folder / "1_Pooling").mkdir()
        modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", None: "pooling_mode_mean_tokens"}
        pooled = {"word_embedding_dimension": width, modes[sentence["pooling"]]: True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooled))
        modules.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
        if sentence["normalize"]:
            kind = "sentence_transformers.models.Normalize"
            modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": kind})
        texts |= {"prompts": sentence["prompts"], "similarity_fn_name": "cosine"}
        if "max_seq_length" in sentence:
            lengths = {"max_seq_length": sentence["max_seq_length"], "do_lower_case": False}
            (folder / "sentence_bert_config.json").write_text(json.dumps(lengths))
    real = entry["config"]["hidden_size"]

    def scaled(n: int) -> int:
        """Widths that are the encoder's, or multiples of it, in the small one."""
        return n // real * width if n % real == 0 else n

    if "head_modules" in entry:
        texts |= {"model_type": "CrossEncoder", "__version__": {"sentence_transformers": "5.4.0"}}
    for part in entry.get("head_modules", []):
        ((kind, config),) = part.items()
        config = {k: scaled(v) if type(v) is int else v for k, v in config.items()}
        modules.append(write_module(folder, len(modules), kind, config, len(modules)))
    if "multi_vector" in entry:
        many = entry["multi_vector"]
        for dense in many["dense"]:
            config = {**dense, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
            config |= {key: scaled(dense[key]) for key in ("in_features", "out_features")}
            module = write_module(folder, len(modules), "Dense", config, len(modules))
            modules.append({**module, "type": "pylate.models.Dense.Dense"})
        keys = ("query_prefix", "document_prefix", "query_length", "document_length")
        texts |= {key: many[key] for key in keys if many[key] is not None}
        texts |= {"attend_to_expansion_tokens": False, "skiplist_words": list(string.punctuation)}
        texts |= {"do_query_expansion": bool(many["query_expansion"]), "similarity_fn_name": "MaxSim"}
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(texts))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """small(entry) -> (folder, transformers' network, the config in it), made once."""
    made: dict[str, tuple[Path, Any, dict[str, Any]]] = {}

    def make(entry):
        if entry["id"] not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            raw = hub_config(entry, **small_settings(entry))
            network = random_network(entry, raw)
            tensors = {k: v.to(stored_dtype(entry)).contiguous() for k, v in stored_names(entry, network).items()}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(raw))
            write_tokenizer(entry, folder, raw)
            if {"sentence", "multi_vector"} & set(entry):
                write_sentence_files(entry, folder, raw["hidden_size"])
            made[entry["id"]] = folder, network, raw
        return made[entry["id"]]

    return make


def difference(a, b) -> float:
    a, b = torch.as_tensor(np.asarray(a)), torch.as_tensor(np.asarray(b))
    assert a.shape == b.shape
    return float((a - b).abs().max())


@torch.inference_mode()
def their_rows(network, rows, types=None, **options) -> Any:
    """transformers' output for ragged rows, padded on the right, and the mask."""
    longest = max(map(len, rows))
    ids, mask, kinds = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        if types is not None:
            kinds[i, : len(row)] = torch.tensor(types[i])
    extra = {} if types is None else {"token_type_ids": kinds}
    return network(ids, mask, **extra, **options), mask.bool()


def base(network) -> Any:
    """The encoder of transformers' network."""
    return getattr(network, network.base_model_prefix, network)
