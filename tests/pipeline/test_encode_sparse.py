"""Sparse token weights beside the dense vectors, of a checkpoint made like gte-multilingual-base."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

import modernbert_lite as ml
from modernbert_lite import CheckpointError, Embedder
from modernbert_lite.cli.about import describe

WORDS = ["the", "a", "cat", "sat", "on", "mat", "dog", "runs", "in", "park", "capital", "of", "france", "is", "paris"]
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
TEXTS = [
    "the capital of france is paris",
    "cat cat cat sat on the cat",
    "",
    "a xa dog",  # two tokens that are "a", with and without a space before them
    "the dog runs in the park, the cat sat on the mat",
    "paris",
    "unknown 猫 signs ?!",
    "a <mask> cat",
    "</s> <s> the cat <pad> <unk>",  # special tokens spelled out in the text
]
# gte-multilingual-base's config, but small: eight-fold NTK, and two architectures of which the second is the weights'.
CONFIG = {
    "architectures": ["NewModel", "NewForTokenClassification"],
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 56,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "max_position_embeddings": 512,
    "model_type": "new",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_labels": 1,
    "pack_qkv": True,
    "pad_token_id": 1,
    "position_embedding_type": "rope",
    "rope_scaling": {"factor": 8.0, "type": "ntk"},
    "rope_theta": 20000,
    "torch_dtype": "float16",
    "type_vocab_size": 1,
    "vocab_size": 60,
}


def write_json(path, value):
    path.write_text(json.dumps(value))


def write_tokenizer(folder):
    """XLM-R's kind: Unigram, <s> and </s> around a text."""
    made = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(PIECES)], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    made.save(str(folder / "tokenizer.json"))
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    settings = {f"{name}_token": token for name, token in names.items()}
    settings.update(tokenizer_class="PreTrainedTokenizerFast", model_max_length=512)
    write_json(folder / "tokenizer_config.json", settings)


def write_sentence_files(folder):
    st = "sentence_transformers.models."
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [{"idx": i, "name": str(i), "path": path, "type": st + kind} for i, (path, kind) in enumerate(modules)]
    write_json(folder / "modules.json", listed)
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 64, "pooling_mode_cls_token": True})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, transformers' model with the very weights that are in it, its tokenizer)."""
    rope = {"rope_type": "linear", "rope_theta": 20000.0 * 8, "factor": 8.0 ** (2 / 32)}  # the same NTK
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_labels", "vocab_size")
    sizes = {key: CONFIG[key] for key in keys}
    torch.manual_seed(1)
    config = transformers.GteConfig(**sizes, initializer_range=0.1, rope_parameters=rope, max_position_embeddings=512)
    model = transformers.GteForTokenClassification(config).eval().requires_grad_(False)
    model.classifier.bias.fill_(0.5)
    table = model.gte.embeddings.word_embeddings.weight
    table[len(PIECES)] = table[PIECES.index("▁cat")]  # <mask>, so that it weighs something, too
    for parameter in model.parameters():
        parameter.data = parameter.half().float()
    folder = tmp_path_factory.mktemp("sparse")
    model.save_pretrained(folder)
    state = {name.replace("gte.", "new."): x.half() for name, x in load_file(folder / "model.safetensors").items()}
    assert state["classifier.weight"].shape == (1, 64)
    assert "new.encoder.layer.0.attention.qkv_proj.weight" in state
    save_file(state, folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG)
    write_tokenizer(folder)
    write_sentence_files(folder)
    return folder, model, transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def embedder(made):
    return Embedder.from_pretrained(made[0], device="cpu")


@pytest.fixture
def copied(made, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(made[0], tmp_path / "copy")


def token_weights(made, text):
    """(token's id, relu of its logit), of each token, by transformers."""
    _, model, tokenizer = made
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return list(zip(ids[0].tolist(), model(input_ids=ids).logits[0, :, 0].relu().tolist(), strict=True))


def by_hand(made, text):
    tokenizer = made[2]
    special = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    weights = {}
    for i, weight in token_weights(made, text):
        token = tokenizer.decode([i])
        if i not in special and weight > weights.get(token, 0.0):
            weights[token] = weight
    return weights


def assert_near(got, expected, bound=2e-5):
    assert set(got) == set(expected)
    assert all(isinstance(token, str) and type(weight) is float for token, weight in got.items())
    assert max((abs(got[token] - expected[token]) for token in expected), default=0.0) <= bound


def test_weights_equal_transformers_token_classifier(made, embedder):
    assert embedder.sparse is True
    found = embedder.encode_sparse(TEXTS)
    assert len(found) == len(TEXTS)
    for text, weights in zip(TEXTS, found, strict=True):
        assert_near(weights, by_hand(made, text))
    assert sum(map(len, found)) > 20
    assert max(weight for weights in found for weight in weights.values()) > 0.1


def test_one_string_gives_one_dict(made, embedder):
    weights = embedder.encode_sparse(TEXTS[0])
    assert isinstance(weights, dict)
    assert_near(weights, by_hand(made, TEXTS[0]))
    assert embedder.encode_sparse([TEXTS[0]]) == [weights]


def test_special_tokens_have_no_weight(made, embedder):
    text = "</s> <s> the cat <pad> <unk> 猫"
    positive = {made[2].decode([i]) for i, weight in token_weights(made, text) if weight > 0}
    assert positive & {"<s>", "</s>", "<pad>", "<unk>"}  # it would have shown
    assert not set(embedder.encode_sparse(text)) & {"<s>", "</s>", "<pad>", "<unk>"}
    assert embedder.encode_sparse("") == {}


def test_the_template_s_tokens_have_no_weight_where_the_tokenizer_does_not_name_them(made, embedder, copied):
    write_json(copied / "tokenizer_config.json", {"model_max_length": 512})
    nameless = Embedder.from_pretrained(copied, device="cpu")
    assert nameless.encode_sparse(TEXTS) == embedder.encode_sparse(TEXTS)
    assert any(i in (0, 2) and weight > 0 for text in TEXTS for i, weight in token_weights(made, text))


def test_a_mask_in_a_text_is_a_token_like_any_other(made, embedder):
    found = [word for word in WORDS if "<mask>" in embedder.encode_sparse(f"{word} <mask> cat")]
    assert found == [word for word in WORDS if "<mask>" in by_hand(made, f"{word} <mask> cat")]
    assert found  # else the weights would show nothing


@pytest.mark.parametrize("text", ["cat cat cat sat on the cat", "the dog, the park, the cat, the capital, the mat"])
def test_a_repeated_token_takes_its_largest_weight(made, embedder, text):
    token = text.split()[0]
    several = [weight for i, weight in token_weights(made, text) if made[2].decode([i]) == token]
    assert len(several) >= 4
    assert max(several) > np.mean(several) + 1e-3  # they differ, so that another choice would show
    assert embedder.encode_sparse(text)[token] == pytest.approx(max(several), abs=2e-5)


def test_tokens_of_weight_zero_are_left_out(made, embedder):
    left_out = 0
    for text in TEXTS:
        weights = embedder.encode_sparse(text)
        assert all(weight > 0 for weight in weights.values())
        tokens = {made[2].decode([i]) for i, _ in token_weights(made, text)} - {"<s>", "</s>", "<pad>", "<unk>"}
        left_out += len(tokens - set(weights))
    assert left_out > 3


@pytest.mark.parametrize("batch_tokens", [8, 64])
def test_texts_keep_their_order_whatever_the_batches(made, embedder, batch_tokens):
    texts = [f"{word} " * n + "cat" for n in (7, 1, 30, 3) for word in WORDS]
    small = Embedder.from_pretrained(made[0], device="cpu", batch_tokens=batch_tokens)
    for weights, text in zip(small.encode_sparse(texts), texts, strict=True):
        assert_near(weights, embedder.encode_sparse(text), 1e-5)


def test_any_iterable_of_texts_is_taken(embedder):
    expected = embedder.encode_sparse(TEXTS)
    for weights, right in zip(embedder.encode_sparse(text for text in TEXTS), expected, strict=True):
        assert_near(weights, right, 1e-5)
    assert embedder.encode_sparse([]) == []
    assert embedder.encode_sparse(iter(())) == []


@pytest.mark.parametrize("bad", [["cat", None], ["cat", b"dog"], ["cat", ["dog"]]])
def test_an_item_that_is_no_text_is_refused_by_its_number(embedder, bad):
    with pytest.raises(TypeError, match=r"text 1 is (NoneType|bytes|list)"):
        embedder.encode_sparse(bad)


def test_dense_vectors_are_the_same_with_and_without_the_weights(made, embedder, copied):
    _, model, tokenizer = made
    before = embedder.encode(TEXTS)
    embedder.encode_sparse(TEXTS)
    assert np.array_equal(embedder.encode(TEXTS), before)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    hidden = model.gte(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    expected = torch.nn.functional.normalize(hidden[:, 0]).numpy()
    assert before.shape == (len(TEXTS), 64)
    assert np.abs(before - expected).max() <= 2e-5

    write_json(copied / "config.json", {**CONFIG, "architectures": ["NewModel"]})
    plain = Embedder.from_pretrained(copied, device="cpu")
    assert plain.sparse is False
    assert np.abs(plain.encode(TEXTS) - before).max() <= 1e-6


def test_a_file_of_transformers_own_has_them_too(made, copied):
    _, model, _ = made
    model.save_pretrained(copied)
    assert json.loads((copied / "config.json").read_text())["architectures"] == ["GteForTokenClassification"]
    embedder = Embedder.from_pretrained(copied, device="cpu")
    assert embedder.sparse is True
    for text, weights in zip(TEXTS, embedder.encode_sparse(TEXTS), strict=True):
        assert_near(weights, by_hand(made, text))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_other_dtypes_give_nearly_the_same_weights(made, dtype):
    embedder = Embedder.from_pretrained(made[0], device="cpu", dtype=dtype)
    got, expected = embedder.encode_sparse(TEXTS), [by_hand(made, text) for text in TEXTS]
    keys = [(i, token) for i, weights in enumerate(expected) for token in weights]
    keys += [(i, token) for i, weights in enumerate(got) for token in weights if token not in expected[i]]
    a, b = (np.array([found[i].get(token, 0.0) for i, token in keys]) for found in (got, expected))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.99


@pytest.mark.parametrize("architectures", [["NewModel"], ["NewModel", "NewForSequenceClassification"]])
def test_a_checkpoint_without_such_weights_says_so(copied, architectures):
    write_json(copied / "config.json", {**CONFIG, "architectures": architectures})
    embedder = Embedder.from_pretrained(copied, device="cpu")
    assert embedder.sparse is False
    with pytest.raises(CheckpointError, match=r"NewModel has no sparse token weights.*one label"):
        embedder.encode_sparse("a cat")
    assert embedder.encode("a cat").shape == (64,)


def test_a_token_classifier_of_several_labels_has_no_weights(copied):
    state = load_file(copied / "model.safetensors")
    state["classifier.weight"], state["classifier.bias"] = torch.ones(3, 64), torch.ones(3)
    save_file(state, copied / "model.safetensors")
    write_json(copied / "config.json", {**CONFIG, "num_labels": 3})
    embedder = Embedder.from_pretrained(copied, device="cpu")
    assert embedder.sparse is False
    with pytest.raises(CheckpointError, match="no sparse token weights"):
        embedder.encode_sparse(["a cat"])


def test_the_bundled_model_has_no_weights():
    embedder = Embedder.from_pretrained("tiny", device="cpu")
    assert embedder.sparse is False
    with pytest.raises(CheckpointError, match="no sparse token weights"):
        embedder.encode_sparse("a cat")


def test_a_config_that_promises_weights_that_the_file_lacks(copied):
    state = load_file(copied / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, copied / "model.safetensors")
    embedder = Embedder.from_pretrained(copied, device="cpu")
    assert embedder.sparse is False
    assert embedder.encode("a cat").shape == (embedder.dimension,)
    assert describe(str(copied))["use"] == "Embedder"
    with pytest.raises(CheckpointError, match="no sparse token weights"):
        embedder.encode_sparse("a cat")
    assert ml.load_model(copied)  # the encoder alone, which `architectures` names first


def test_long_texts_are_cut_with_one_warning(made, embedder):
    long = "dog" + " dog" * 50
    short = Embedder.from_pretrained(made[0], device="cpu", max_seq_length=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = short.encode_sparse(["the cat sat on the mat in paris", "paris", long, "cat" + " cat" * 20])
    (warning,) = caught
    assert "3 of 4 texts were longer than 8 tokens" in str(warning.message)
    assert warning.filename == __file__
    expected = embedder.encode_sparse(["the cat sat on the mat", "paris", "dog" + " dog" * 5, "cat" + " cat" * 5])
    for weights, right in zip(found, expected, strict=True):
        assert_near(weights, right, 1e-5)
    strict = Embedder.from_pretrained(made[0], device="cpu", max_seq_length=8, on_long="error")
    with pytest.raises(ValueError, match="text 1 is longer than 8 tokens"):
        strict.encode_sparse(["cat", long])


@pytest.mark.parametrize(
    ("bad", "message"), [(["a cat"] * 5_000 + [3], "text 5000 is int"), ({"text": "a"}, "sentences is dict")]
)
def test_what_is_no_text_is_refused_before_any_work(embedder, monkeypatch, bad, message):
    """Also where it stands beyond the first texts that are read together."""
    monkeypatch.setattr(embedder.tokenizer, "encode_typed", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(TypeError, match=message):
        embedder.encode_sparse(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_told_with_the_text(made, value):
    """A NaN is not over 0, and what is under 0 counts as 0: both would be left out in silence."""
    model = Embedder.from_pretrained(made[0], device="cpu")

    def hook(_, arguments, out):
        out = out.clone()
        first = max(range(len(arguments[0].seqlens)), key=arguments[0].seqlens.__getitem__)
        out[int(arguments[0].cu_seqlens[first]) + 1] = value
        return out

    model.network.register_forward_hook(hook)
    with pytest.raises(ValueError, match=r"^the result of text 1, .*'one of many words'.* is not finite in float32"):
        model.encode_sparse(["a", "one of many words", "b"])
