"""Every checkpoint of data/checkpoints.json: its real config gives a network of the published size, and small random
weights with its settings, files and names give transformers' numbers, through the class that it loads with.

What a row's `unverified` names, and what it leaves out, was not read from the real files: a test shows that this
package is right about those settings, not that the repository has them.
"""

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
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from torch.nn import functional as F

import modernbert_lite as ml
from modernbert_lite.models.registry import network_class

ROOT = Path(__file__).parents[1]
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


def parameters(network) -> int:
    """One that is in two places counts once."""
    return sum(p.numel() for p in network.parameters())


@every_entry
def test_the_real_config_gives_a_network_of_the_published_size(entry):
    raw = hub_config(entry)
    config = (ml.GteConfig if is_gte(entry) else ml.ModernBertConfig).from_dict(raw)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        assert getattr(config, key) == raw.get(key, 50368)
    with torch.device("meta"):
        ours = network_class(config.architecture)(config)
        theirs = getattr(transformers, re.sub("^New", "Gte", entry["architectures"][0]))(reference_config(raw))
    # A decoder without a weight of its own in the file: loading ties it.
    tied = ours.get_parameter(ours.TIED[0]).numel() if "ForMaskedLM" in config.architecture else 0
    count = parameters(ours) - tied
    assert count == parameters(theirs)
    if "parameters" in entry:
        assert parameters(encoder(ours)) == entry["parameters"]
    if "parameters_with_head" in entry:
        assert count == entry["parameters_with_head"]


def encoder(network) -> Any:
    return getattr(network, "model", network)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if not is_gte(e)], ids=lambda entry: entry["id"])
def test_both_forms_of_a_config_are_read_alike(entry):
    raw = old_form(entry)
    config = ml.ModernBertConfig.from_dict(raw)
    assert config == ml.ModernBertConfig.from_dict(new_form(raw))
    scaled = "rope_scaling" in raw
    assert (config.full_rope.type, config.sliding_rope.type) == (("yarn",) * 2 if scaled else ("default",) * 2)
    assert (config.full_rope.theta, config.sliding_rope.theta) == (raw["global_rope_theta"], raw["local_rope_theta"])


# --- b. small random checkpoints

VOCABULARY = 700
LENGTHS = (1, 66, 200, 2, 129, 131)  # a local layer sees 64 tokens on either side
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
TEXTS = [
    "a short one",
    "the tide came in over the flats while the boats lay on their sides and nobody looked up " * 2,
    "x",
    "rain, then: more rain",
]


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


@every_entry
def test_small_random_weights_give_transformers_numbers(small, entry):
    folder, reference, raw = small(entry)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]
    types = None
    if is_gte(entry) and raw["type_vocab_size"] == 2:
        types = [torch.randint(0, 2, (n,), generator=generator).tolist() for n in LENGTHS]
    model = ml.load_model(folder)
    batch = ml.pack(rows) if types is None else ml.pack(rows, token_type_ids=types)

    output, mask = their_rows(base(reference), rows, types)
    expected = output.last_hidden_state[mask]
    assert 1 < expected.abs().max() < 20  # so that the bound means something
    bound = 2e-5 if expected.abs().max() <= 10 else 2e-6 * float(expected.abs().max())
    assert difference(encoder(model)(batch), expected) <= bound

    if encoder(model) is not model:
        output, _ = their_rows(reference, rows, types)
        logits = output.logits[mask] if "ForMaskedLM" in entry["architectures"][0] else output.logits
        assert logits.std() > 1e-3
        assert difference(model(batch), logits) <= 2e-5


# --- the class that it loads with


def token_ids(folder, text, pair=None) -> tuple[list[int], list[int]]:
    encoding = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, pair)
    return encoding.ids, encoding.type_ids


def their_hidden(folder, network, text) -> torch.Tensor:
    """(tokens, C) of one text alone."""
    output, _ = their_rows(base(network), [token_ids(folder, text)[0]])
    return output.last_hidden_state[0]


def their_dense(folder, x) -> torch.Tensor:
    """What the Dense and LayerNorm modules make of vectors."""
    for module in json.loads((folder / "modules.json").read_text()):
        path = folder / module["path"]
        if module["type"].endswith(".LayerNorm"):
            tensors = load_file(path / "model.safetensors")
            x = F.layer_norm(x, x.shape[-1:], tensors["norm.weight"], tensors["norm.bias"])
        if module["type"].endswith(".Dense"):
            tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
            y = F.linear(x, tensors["linear.weight"], tensors.get("linear.bias"))
            y = F.gelu(y) if config["activation_function"].endswith("GELU") else y
            if config.get("use_residual"):
                y = y + (F.linear(x, tensors["residual.weight"]) if "residual.weight" in tensors else x)
            x = y
    return x


def of_use(use) -> Any:
    entries = [entry for entry in ENTRIES if entry["use"] == use]
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry["id"])


@of_use("Embedder")
def test_embedders_pool_and_prompt_as_the_repository_says(small, entry):
    folder, network, _ = small(entry)
    sentence = entry["sentence"]
    model = ml.Embedder.from_pretrained(folder)
    longest = sentence.get("max_seq_length", entry["config"]["max_position_embeddings"])
    assert model.max_seq_length == longest

    def expected(prompt):
        hidden = [their_hidden(folder, network, prompt + text) for text in TEXTS]
        pooled = torch.stack([x[0] if sentence["pooling"] == "cls" else x.mean(0) for x in hidden])
        return F.normalize(pooled, dim=-1) if sentence["normalize"] else pooled

    if not is_gte(entry):  # sentence-transformers opens these without a repository's code
        theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
        assert difference(theirs.encode(TEXTS), expected("")) <= 2e-5
    assert difference(model.encode(TEXTS), expected("")) <= 2e-5
    assert model.prompts == sentence["prompts"]
    for name, prompt in sentence["prompts"].items():
        assert difference(model.encode(TEXTS, prompt_name=name), expected(prompt)) <= 2e-5
    for role, encode in (("query", model.encode_query), ("document", model.encode_document)):
        assert difference(encode(TEXTS), expected(sentence["prompts"].get(role, ""))) <= 2e-5
    narrow = F.normalize(expected("")[:, :20], dim=-1)
    assert difference(model.encode(TEXTS, truncate_dim=20, normalize_embeddings=True), narrow) <= 2e-5


def test_only_gte_multilingual_base_has_sparse_weights(small):
    for entry in (e for e in ENTRIES if e["use"] == "Embedder"):
        folder, network, _ = small(entry)
        model = ml.Embedder.from_pretrained(folder)
        assert model.sparse == (len(entry["architectures"]) == 2)
        if not model.sparse:
            continue
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = {tokenizer.token_to_id(name) for name in NAMES["unigram"].values()}
        for text, got in zip(TEXTS, model.encode_sparse(TEXTS), strict=True):
            ids, _ = token_ids(folder, text)
            weights = their_rows(network, [ids])[0].logits[0, :, 0].relu()
            expected: dict[str, float] = {}
            for i, weight in zip(ids, weights.tolist(), strict=True):
                if i not in special and weight > 0:
                    key = tokenizer.decode([i])
                    expected[key] = max(expected.get(key, 0.0), weight)
            assert {key for key, weight in got.items() if weight > 0} == set(expected)
            assert all(abs(got[key] - weight) <= 2e-5 for key, weight in expected.items())


@of_use("Reranker")
def test_rerankers_score_pairs(small, entry):
    folder, network, raw = small(entry)
    model = ml.Reranker.from_pretrained(folder)
    pairs = [(TEXTS[3], text) for text in TEXTS]
    encoded = [token_ids(folder, *pair) for pair in pairs]
    many = is_gte(entry) and raw["type_vocab_size"] > 1
    rows, types = [ids for ids, _ in encoded], [kinds for _, kinds in encoded] if many else None
    output, _ = their_rows(network, rows, types)
    modular = "head_modules" in entry
    logits = their_dense(folder, output.last_hidden_state[:, 0]) if modular else output.logits
    expected = logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits
    assert expected.std() > 1e-3
    if not is_gte(entry):  # sentence-transformers opens these without a repository's code
        theirs = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
        assert difference(theirs.predict(pairs), expected) <= 2e-5
    assert difference(model.predict(pairs), expected) <= 2e-5
    assert difference(model.predict(pairs, activation_fn="identity"), logits.squeeze(-1)) <= 2e-5


@of_use("FillMask")
def test_masked_language_models_fill_masks(small, entry):
    folder, network, _ = small(entry)
    model = ml.FillMask.from_pretrained(folder)
    mask = NAMES[entry["tokenizer"]["kind"]][MASK]
    assert model.mask_token == mask
    text = f"the {mask} came in over the {mask} and nobody looked up"
    ids, _ = token_ids(folder, text)
    places = [i for i, token in enumerate(ids) if token == model.tokenizer.mask_token_id]
    assert len(places) == 2
    probabilities = their_rows(network, [ids])[0].logits[0, places].softmax(-1)
    for got, row in zip(model.predict(text, top_k=VOCABULARY), probabilities, strict=True):
        scores = torch.zeros(VOCABULARY)
        for prediction in got:
            scores[prediction["token_id"]] = prediction["score"]
        assert difference(scores, row) <= 2e-5
        assert got[0]["token_id"] == int(row.argmax())


@of_use("LateInteraction")
def test_late_interaction_models_give_a_vector_a_token(small, entry):
    folder, network, _ = small(entry)
    model = ml.LateInteraction.from_pretrained(folder)
    # No punctuation, which is skipped, and nothing to cut, where the row doesn't say how long a document may be.
    texts = [text.translate(str.maketrans("", "", string.punctuation))[:150] for text in TEXTS]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    many = entry["multi_vector"]

    def expected(text, marker, length):
        first, *rest = tokenizer.encode(text).ids
        ids = [first, tokenizer.token_to_id(marker), *rest]
        assert length is None or len(ids) <= length
        hidden = their_rows(base(network), [ids])[0].last_hidden_state[0]
        return F.normalize(their_dense(folder, hidden), dim=-1)

    for text, got in zip(texts, model.encode_documents(texts), strict=True):
        assert difference(got, expected(text, many["document_prefix"], many["document_length"])) <= 2e-5
    short = [text for text in texts if len(text) < 25]
    for text, got in zip(short, model.encode_queries(short), strict=True):
        right = expected(text, many["query_prefix"], many["query_length"])
        assert got.shape[1] == right.shape[1] == many["dense"][-1]["out_features"]
        assert difference(got[: len(right)], right) <= 2e-5


# --- c. what is refused

REFUSED = {
    "modernbert-decoder": "'modernbert-decoder' is not supported: a causal decoder",
    "bert": "'bert' is not supported",
    "nomic_bert": "'nomic_bert' is not supported",
    "xlm-roberta": "'xlm-roberta' is not supported",
    None: "None is not supported",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_decoders_and_unknown_types_are_refused_by_name(small, tmp_path, capsys, model_type):
    from modernbert_lite.cli.commands import main

    folder, _, raw = small(ENTRIES[2])
    raw = {key: value for key, value in raw.items() if key != "model_type"}
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_bytes((folder / "1_Pooling" / "config.json").read_bytes())
    changed = raw if model_type is None else {**raw, "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    classes = (ml.Embedder, ml.Reranker, ml.Classifier, ml.TokenClassifier, ml.FillMask, ml.LateInteraction)
    for function in (ml.load_model, *(each.from_pretrained for each in classes)):
        with pytest.raises(ml.CheckpointError, match=re.escape(REFUSED[model_type])):
            function(tmp_path)
    assert main(["info", str(tmp_path)]) == 1
    assert REFUSED[model_type] in capsys.readouterr().err


@every_entry
def test_info_names_what_a_checkpoint_loads_with(small, entry):
    from modernbert_lite.cli.about import describe

    folder, _, raw = small(entry)
    facts = describe(str(folder))
    use = {"load_model": "FillMask"}.get(entry["use"], entry["use"])
    assert use in facts["use"].split(" (")[0].split(" or ")
    assert ("encode_sparse" in facts["use"]) == (len(entry["architectures"]) == 2)
    assert facts["architecture"] == raw["architectures"][0]
    assert facts["heads"] == f"3 x {raw['hidden_size'] // 3}"


# --- d. the table itself


def test_the_table_has_every_checkpoint_of_the_specification():
    """Their names, as published; families member by member."""
    ids = [entry["id"] for entry in ENTRIES]
    assert len(ids) == len(set(ids)) == 63
    sizes = ("17m", "32m", "68m", "150m", "400m", "1b")
    wanted = [f"jhu-clsp/ettin-encoder-{size}" for size in sizes]
    wanted += [f"cross-encoder/ettin-reranker-{size}-v1" for size in sizes]
    japanese = ("30m", "70m", "130m", "310m")
    wanted += [f"sbintuitions/modernbert-ja-{size}" for size in japanese]
    wanted += [f"cl-nagoya/ruri-v3-{size}" for size in japanese]
    wanted += [
        "Alibaba-NLP/gte-base-en-v1.5",
        "Alibaba-NLP/gte-en-mlm-base",
        "Alibaba-NLP/gte-en-mlm-large",
        "Alibaba-NLP/gte-large-en-v1.5",
        "Alibaba-NLP/gte-modernbert-base",
        "Alibaba-NLP/gte-multilingual-base",
        "Alibaba-NLP/gte-multilingual-mlm-base",
        "Alibaba-NLP/gte-multilingual-reranker-base",
        "Alibaba-NLP/gte-reranker-modernbert-base",
        "Snowflake/snowflake-arctic-embed-m-v2.0",
        "answerdotai/ModernBERT-base",
        "answerdotai/ModernBERT-large",
        "lightonai/GTE-ModernColBERT-v1",
        "tomaarsen/reranker-ModernBERT-large-gooaq-bce",
    ]
    assert set(wanted) <= set(ids)


def test_entries_say_what_is_not_known():
    for entry in ENTRIES:
        known = {*entry, *entry["config"], *entry.get("sentence", {}), *entry.get("multi_vector", {})}
        missing = set(entry["unverified"]) - known if "unverified" in entry else set()
        # A key may be unverified because it is absent.
        assert missing <= {"vocab_size", "classifier_pooling"}, entry["id"]
        classes = ("Embedder", "Reranker", "Classifier", "TokenClassifier", "FillMask", "LateInteraction", "load_model")
        assert entry["use"] in classes
        assert entry["generation"] in (None, "4.48", "5", "new", "gte-old", "gte")
        if "family" in entry:
            before, after = entry["family"].split("{}")
            assert entry["id"].startswith(before)
            assert entry["id"].endswith(after)


def test_the_page_shows_the_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.tables import checkpoints

    golden = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))["entries"]
    made = checkpoints(ENTRIES, golden)
    assert f"<!-- table: checkpoints -->\n{made}\n<!-- end -->" in (ROOT / "docs" / "checkpoints.md").read_text(
        encoding="utf-8"
    )
    lines = made.splitlines()[2:]
    for entry in ENTRIES:
        (line,) = [
            line
            for line in lines
            if line.startswith(f"| {entry.get('family', entry['id']).split('{}')[0]}")
            and (entry.get("family") or f"| {entry['id']} |" in line)
        ]
        assert f"| `{entry['use']}`" in line
        published = any(entry["id"] in row["model"].split() for row in golden)
        assert ("| known |" if published else "| not known |") in line
