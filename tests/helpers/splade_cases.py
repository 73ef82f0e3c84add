"""Shared by tests/pipeline: test_splade, test_splade_files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from modernbert_lite import Embedder

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a cat sat on mat dog ##s run ##ning in park capital of france is paris ? ,"


VOCABULARY = {word: i for i, word in enumerate(WORDS.split())}


SIZE = 40  # of the network's vocabulary, as in doc-v3-gte larger than the tokenizer's


TEXTS = [
    "the cat sat on the mat",
    "",
    "dogs running in the park, the cat sat",
    "paris",
    "a dog a cat a park a capital of france is paris ? the cat",
    "[MASK] of [SEP] france",
    "cat",
    "unseen",
]


def read(path):
    return json.loads(path.read_text())


def write(path, value):
    path.write_text(json.dumps(value))


def edit(file, /, **keys):
    write(file, {**read(file), **keys})


def word_pieces(folder: Path, longest: int = 64) -> None:
    """A tokenizer of BERT's kind, as opensearch's sparse encoders have."""
    made = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(folder / "tokenizer.json"))
    names = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest, "mask_token": "[MASK]"}
    write(folder / "tokenizer_config.json", settings | names)


def network(folder: Path, kind: str) -> Path:
    """A random masked language model in transformers' own files."""
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": SIZE,
        "initializer_range": 0.3,
    }
    if kind == "gte":
        config = transformers.GteConfig(**sizes, intermediate_size=40, max_position_embeddings=64, type_vocab_size=2)
        model = transformers.GteForMaskedLM(config)
    else:
        rest = {
            "intermediate_size": 40,
            "initializer_cutoff_factor": 3.0,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        }
        model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes, **rest))
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() or name.endswith("bias"):
            parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    model.get_output_embeddings().bias.data.sub_(0.2 if kind == "gte" else 2)  # so that some weights are 0
    model.save_pretrained(folder)
    word_pieces(folder)
    return folder


def idf(folder: Path, tokenizer) -> SparseStaticEmbedding:
    """Weights of tokens; one is 0, one below it."""
    weight = torch.linspace(0.5, 4, len(VOCABULARY))
    weight[VOCABULARY["cat"]], weight[VOCABULARY["of"]] = 0, -1.25
    return SparseStaticEmbedding(tokenizer=tokenizer, weight=weight, frozen=True)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return {kind: network(tmp_path_factory.mktemp(kind), kind) for kind in ("modernbert", "gte")}


@pytest.fixture
def save(networks, tmp_path):
    """save(kind, routed=.., **pooling) -> a folder that SparseEncoder wrote."""

    def made(kind="modernbert", routed=False, name="sparse", strategy="max", activation="relu", **options) -> Path:
        net = Transformer(str(networks[kind]), transformer_task="fill-mask")
        pooling = SpladePooling(strategy, activation)
        modules = [net, pooling]
        if routed:
            modules = [Router.for_query_document([idf(networks[kind], net.tokenizer)], modules)]
        SparseEncoder(modules=modules, device="cpu", **options).save_pretrained(
            str(tmp_path / name), create_model_card=False
        )
        return tmp_path / name

    return made


def weights(tensor):
    """SparseEncoder's tensor as dicts {id: weight}."""
    rows = tensor.to_dense()
    return [{int(i): float(row[i]) for i in row.nonzero().flatten()} for row in rows]


def assert_near(got, expected, bound=2e-5):
    assert len(got) == len(expected)
    for mine, right in zip(got, expected, strict=True):
        assert all(weight != 0 for weight in mine.values())
        # A logit of about 0 may be on either side of it.
        assert max((abs(mine.get(i, 0) - right.get(i, 0)) for i in mine | right), default=0) <= bound


def both(folder, **options):
    return Embedder.from_pretrained(folder, device="cpu", **options), SparseEncoder(str(folder), device="cpu")


# ---- documents ----
