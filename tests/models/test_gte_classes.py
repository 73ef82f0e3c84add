"""GTE checkpoints in the classes that people call."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
import transformers
from gte_cases import (  # noqa: F401
    CLASSES,
    MASKED_LM,
    SEQUENCE,
    TOKEN,
    as_new,
    config_of,
    make,
    ntk,
    prefixed,
    sequences,
    state_of,
    vary,
    write,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import modernbert_lite as ml
from modernbert_lite import CheckpointError, OptionError
from modernbert_lite.models.gte import GteSequenceClassifier

WORDS = ["the", "a", "cat", "sat", "on", "mat", "dog", "runs", "in", "park", "is", "what", "small", "animal", "?"]
WORDS += ["capital", "of", "france", "paris", "berlin"]


def word_piece(folder):
    """A BERT tokenizer, uncased, with the pair's second text of type 1."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), *WORDS]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return save_tokenizer(folder, made, names)


def unigram(folder):
    """An XLM-R tokenizer: Unigram, two separators between the texts of a pair, all types 0."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>", "bos": "<s>", "eos": "</s>"}
    return save_tokenizer(folder, made, names)


def save_tokenizer(folder, made, names):
    made.save(str(folder / "tokenizer.json"))
    settings = {f"{name}_token": token for name, token in names.items()}
    settings.update(tokenizer_class="PreTrainedTokenizerFast", model_max_length=512)
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


TOKENIZERS = {"WordPiece": word_piece, "Unigram": unigram}


PAIRS = [
    ("what is a cat?", "a cat is a small animal"),
    ("the capital of france", "paris " * 30),
    ("dog", ""),
    ("", "dog runs"),
    ("the park " * 40, "in the park " * 40),
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("types", [0, 1, 2])
@pytest.mark.parametrize("labels", [1, 3])
def test_a_reranker_equals_transformers(make, kind, types, labels):
    """Of a pair's token types those are used that the model has rows for; with one or none they are dropped."""
    folder, reference = make(SEQUENCE, type_vocab_size=types, num_labels=labels)
    theirs = TOKENIZERS[kind](folder)
    inputs = theirs(
        *map(list, zip(*PAIRS, strict=True)), padding=True, truncation=True, max_length=100, return_tensors="pt"
    )
    assert inputs["token_type_ids"].any() == (kind == "WordPiece")
    if types < 2:
        del inputs["token_type_ids"]
    with torch.inference_mode():
        expected = reference(**inputs).logits
    expected = expected.sigmoid().squeeze(-1) if labels == 1 else expected
    with pytest.warns(UserWarning, match="1 of 5 texts were longer than 100 tokens"):
        scores = ml.Reranker.from_pretrained(folder, max_seq_length=100).predict(PAIRS)
    assert np.abs(scores - expected.numpy()).max() <= 2e-5


def test_token_types_change_a_reranker_s_scores(make):
    """So that the test above means something."""
    folder, _ = make(SEQUENCE, type_vocab_size=2, num_labels=1)
    word_piece(folder)
    scores = ml.Reranker.from_pretrained(folder).predict(PAIRS, activation_fn="identity")
    state = state_of(folder)
    state["gte.embeddings.token_type_embeddings.weight"][1] = state["gte.embeddings.token_type_embeddings.weight"][0]
    write(folder, config_of(folder), state)
    assert np.abs(ml.Reranker.from_pretrained(folder).predict(PAIRS, activation_fn="identity") - scores).max() > 0.01


def test_a_reranker_of_alibaba_s_file_ranks(make):
    folder, _ = make(SEQUENCE, num_labels=1, type_vocab_size=1, rope_parameters=ntk(20_000.0, 8.0, 32))
    unigram(folder)
    pairs = [("what is a cat?", text) for text in ("a cat is a small animal", "the park", "dog runs in the park")]
    scores = ml.Reranker.from_pretrained(folder).predict(pairs)
    raw = {**config_of(folder), "num_labels": 1}
    write(folder, raw, {name: tensor.half() for name, tensor in prefixed(state_of(folder), "new.").items()})
    as_new(folder, 20000, {"type": "ntk", "factor": 8.0})
    model = ml.Reranker.from_pretrained(folder)
    assert type(model.network) is GteSequenceClassifier
    assert np.abs(model.predict(pairs) - scores).max() <= 5e-3
    best = model.rank("what is a cat?", [pair[1] for pair in pairs], return_documents=True)
    assert [row["corpus_id"] for row in best] == np.argsort(-model.predict(pairs)).tolist()


@pytest.mark.parametrize(("kind", "mask"), [("WordPiece", "[MASK]"), ("Unigram", "<mask>")])
def test_fill_mask_equals_transformers(make, kind, mask):
    folder, reference = make(MASKED_LM)
    theirs = TOKENIZERS[kind](folder)
    as_new(folder, 160000)
    texts = [f"the capital of France is {mask}", f"{mask} {mask} cat sat", f"a dog {mask} in the park"]
    model = ml.FillMask.from_pretrained(folder)
    assert model.mask_token == mask
    found = model.predict(texts, top_k=4)
    for text, masks in zip(texts, found, strict=True):
        inputs = theirs(text, return_tensors="pt")
        del inputs["token_type_ids"]
        with torch.inference_mode():
            logits = reference(**inputs).logits[0]
        where = (inputs["input_ids"][0] == theirs.mask_token_id).nonzero().flatten()
        assert len(masks) == len(where) == text.count(mask)
        for predictions, row in zip(masks, logits[where].softmax(-1), strict=True):
            best = row.topk(4)
            assert [p["token_id"] for p in predictions] == best.indices.tolist()
            assert [p["score"] for p in predictions] == pytest.approx(best.values.tolist(), rel=1e-4)
            assert [p["token"] for p in predictions] == [theirs.decode([i]) for i in best.indices.tolist()]


def sentence_files(folder, normalize=False):
    """sentence-transformers' files of an embedding model that takes the first token."""
    st = "sentence_transformers.models."
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 2 + normalize]
    listed = [{"idx": i, "name": str(i), "path": path, "type": st + kind} for i, (path, kind) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    width = config_of(folder)["hidden_size"]
    pooling = {"word_embedding_dimension": width, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("types", [0, 1, 2])
def test_an_embedder_takes_the_first_token(make, kind, types):
    folder, reference = make(type_vocab_size=types, rope_parameters=ntk(500_000.0, 2.0, 32))
    theirs = TOKENIZERS[kind](folder)
    sentence_files(folder)
    as_new(folder, 500000, {"type": "ntk", "factor": 2.0})
    texts = ["the capital of France", "", "a cat sat on the mat " * 20, "Berlin?", "the capital of France"]
    inputs = theirs(texts, padding=True, return_tensors="pt")
    del inputs["token_type_ids"]
    with torch.inference_mode():
        expected = reference(**inputs).last_hidden_state[:, 0].numpy()
    model = ml.Embedder.from_pretrained(folder)
    assert (model.dimension, model.max_seq_length) == (96, 512)
    got = model.encode(texts)
    assert np.abs(got - expected).max() <= 2e-5
    assert np.abs(np.stack([model.encode(text) for text in texts]) - got).max() <= 1e-5
    sentence_files(folder, normalize=True)
    unit = ml.Embedder.from_pretrained(folder).encode(texts)
    assert np.abs(unit - expected / np.linalg.norm(expected, axis=1, keepdims=True)).max() <= 2e-5


@pytest.mark.parametrize("architecture", [MASKED_LM, SEQUENCE, TOKEN])
def test_an_embedder_opens_a_head_s_file(make, architecture):
    folder, reference = make(architecture)
    theirs = word_piece(folder)
    sentence_files(folder)
    inputs = theirs("the capital of France", return_tensors="pt")
    with torch.inference_mode():
        expected = reference.gte(input_ids=inputs["input_ids"]).last_hidden_state[0, 0].numpy()
    assert np.abs(ml.Embedder.from_pretrained(folder).encode("the capital of France") - expected).max() <= 2e-5


def test_each_class_refuses_another_class_s_checkpoint_by_name(make):
    base, sequence = make(name="base")[0], make(SEQUENCE, name="sequence")[0]
    mlm = make(MASKED_LM, name="mlm")[0]
    for folder in (base, sequence, mlm):
        word_piece(folder)
    with pytest.raises(CheckpointError, match="GteModel, no reranker: use Embedder"):
        ml.Reranker.from_pretrained(base)
    with pytest.raises(CheckpointError, match="GteForMaskedLM, no reranker: use FillMask"):
        ml.Reranker.from_pretrained(mlm)
    with pytest.raises(CheckpointError, match="GteModel, no masked language model: use Embedder"):
        ml.FillMask.from_pretrained(base)
    with pytest.raises(
        CheckpointError, match=r"GteForSequenceClassification, no embedding model: use Classifier or Reranker"
    ):
        ml.Embedder.from_pretrained(sequence)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ml.Embedder.from_pretrained(base)
    assert ["no pooling files" in str(warning.message) for warning in caught] == [True]


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_compiled_whole_it_takes_batches_of_any_shape(make, dynamic):
    """On the CPU, of plain weights; ModernBERT's network shares what is traced."""
    network = ml.load_model(make()[0], packed=False).eval()
    torch.compiler.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=dynamic)
    for lengths in ([3, 70], [4, 66], [5, 5, 5]):
        batch = ml.pack(sequences(lengths))
        with torch.no_grad():
            assert (compiled(batch) - network(batch)).abs().max() <= 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize("architecture", CLASSES)
def test_what_is_no_batch_is_a_type_error(make, architecture):
    network = ml.load_model(make(architecture)[0])
    with pytest.raises(TypeError, match="the network takes a PackedBatch, not Tensor"):
        network(torch.zeros(3, dtype=torch.int64))


def test_max_seq_length_ends_where_the_table_of_positions_ends(make):
    """As an option and set on the model; without a table it may be larger than what the model was trained on."""
    folder = vary(make()[0], "absolute")
    word_piece(folder)
    sentence_files(folder)
    message = "max_seq_length is 201; it must be no more than 200, what the model has positions for"
    with pytest.raises(OptionError, match=message):
        ml.Embedder.from_pretrained(folder, max_seq_length=201)
    model = ml.Embedder.from_pretrained(folder, max_seq_length=200)
    with pytest.raises(OptionError, match=message):
        model.max_seq_length = 201
    assert model.max_seq_length == 200
    for wrong in ("200", 3.5, True):
        with pytest.raises(OptionError, match=r"max_seq_length is .* a whole number"):
            model.max_seq_length = wrong
    turned = make(name="turned")[0]
    word_piece(turned)
    sentence_files(turned)
    assert ml.Embedder.from_pretrained(turned, max_seq_length=4_000).max_seq_length == 4_000
