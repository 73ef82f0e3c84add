"""MaskedLM, SequenceClassifier and TokenClassifier against transformers' own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

import modernbert_lite as ml
from modernbert_lite.models.registry import architectures, network_class
from modernbert_lite.ops.linear import narrower

VOCAB = 997
LENGTHS = [65, 1, 130, 66, 66, 2, 31]
MASKED_LM = "ModernBertForMaskedLM"
SEQUENCE = "ModernBertForSequenceClassification"
TOKEN = "ModernBertForTokenClassification"


@pytest.fixture
def make(make_checkpoint):
    """make_checkpoint with a small vocabulary, whose padding is token 0."""

    def small(architecture, **config):
        ids = {"pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
        return make_checkpoint(architecture, **{"vocab_size": VOCAB, **ids, **config})

    return small


def sequences(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]


def padded(rows):
    """(B, S) ids, 0 where padded on the right, and their mask."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


def assert_equal(got, expected):
    # The promise is 2e-5 on values of order 1-10. Logits are sums of a whole row of such values times weights of order
    # 1, so they can be larger, and rounding grows with them: only beyond 10 is the bound relative to the largest.
    assert got.shape == expected.shape
    largest = expected.abs().max().item()
    bound = 2e-5 if largest <= 10 else 2e-5 * largest
    assert largest > 0.1
    assert (got.double() - expected.double()).abs().max().item() <= bound


def logits(reference, ids, mask):
    with torch.inference_mode():
        return reference(input_ids=ids, attention_mask=mask).logits


def assert_matches_per_token(folder, reference):
    """(T, ..) of a packed ragged batch, and of each sequence alone."""
    rows = sequences()
    ids, mask = padded(rows)
    model = ml.load_model(folder)
    expected = logits(reference, ids, mask)[mask.bool()]
    assert_equal(model(ml.from_padded(ids, mask)), expected)
    for row, right in zip(rows, expected.split(LENGTHS), strict=True):
        assert_equal(model(ml.pack([row])), right)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": False},
        {"decoder_bias": False},
        {"decoder_bias": False, "tie_word_embeddings": False},
        {"classifier_bias": True, "norm_bias": True},
        {"classifier_activation": "silu"},
        {"norm_eps": 0.05},
    ],
    ids=str,
)
def test_masked_lm_logits_equal_transformers(make, config, attn):
    folder, reference = make(MASKED_LM, attn=attn, **config)
    assert_matches_per_token(folder, reference)


def test_masked_lm_ties_the_decoder_only_where_the_config_says_so(make):
    for tied in (True, False):
        folder, reference = make(MASKED_LM, name=f"tied-{tied}", tie_word_embeddings=tied)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert ("decoder.weight" in file.keys()) is not tied  # noqa: SIM118  not a dict
        model = ml.load_model(folder)
        assert (model.decoder.weight is model.model.embeddings.tok_embeddings.weight) is tied
        assert torch.equal(model.decoder.weight, reference.decoder.weight)


def test_masked_lm_positions_gives_those_rows_of_all_logits(make):
    folder, reference = make(MASKED_LM)
    model = ml.load_model(folder)
    rows = sequences()
    batch = ml.pack(rows)
    positions = torch.tensor([0, 64, 65, 66, 195, 3, 3, batch.cu_seqlens[-1] - 1])
    ids, mask = padded(rows)
    assert_equal(model(batch, positions), logits(reference, ids, mask)[mask.bool()][positions])
    assert model(batch, positions[:0]).shape == (0, VOCAB)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    "config", [{}, {"classifier_bias": True, "norm_bias": True}, {"classifier_activation": "silu"}], ids=str
)
def test_sequence_classifier_equals_transformers(make, pooling, labels, config, attn):
    folder, reference = make(SEQUENCE, attn=attn, classifier_pooling=pooling, num_labels=labels, **config)
    rows = sequences()
    ids, mask = padded(rows)
    model = ml.load_model(folder)
    expected = logits(reference, ids, mask)
    assert expected.shape == (len(rows), labels)
    assert_equal(model(ml.pack(rows)), expected)
    alone = torch.cat([model(ml.pack([row])) for row in rows])
    assert_equal(alone, expected)


def test_sequence_classifier_pools_as_its_config_says(make):
    """Published trap: cls pooling where the config says mean gives plausible, wrong scores."""
    folder, _ = make(SEQUENCE, classifier_pooling="mean", num_labels=1)
    batch = ml.pack(sequences())
    mean = ml.load_model(folder)(batch)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classifier_pooling": "cls"}))
    assert (ml.load_model(folder)(batch) - mean).abs().max() > 0.01


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("labels", [1, 5])
@pytest.mark.parametrize("config", [{}, {"classifier_bias": True, "norm_bias": True}], ids=str)
def test_token_classifier_equals_transformers(make, labels, config, attn):
    folder, reference = make(TOKEN, attn=attn, num_labels=labels, **config)
    assert_matches_per_token(folder, reference)


def test_classifiers_biases_are_not_mixed_up(make):
    """classifier_bias is head.dense's; the classifier always has one."""
    for bias in (True, False):
        model = ml.load_model(make(TOKEN, name=f"bias-{bias}", classifier_bias=bias, num_labels=2)[0])
        assert (model.head.dense.bias is not None) is bias
        assert model.classifier.bias.shape == (2,)


@pytest.mark.parametrize("architecture", [MASKED_LM, SEQUENCE, TOKEN])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [True, False])
def test_heads_in_half_precision_are_as_near_to_fp32_as_transformers(make, architecture, dtype, packed):
    folder, reference = make(architecture, classifier_pooling="mean")
    rows = sequences()
    ids, mask = padded(rows)
    real = mask.bool() if architecture != SEQUENCE else slice(None)
    exact = logits(reference, ids, mask)[real]
    theirs = logits(reference.to(dtype), ids, mask)[real].float()
    got = ml.load_model(folder, dtype=dtype, packed=packed)(ml.pack(rows))
    assert got.dtype == (torch.float32 if packed and narrower(got.device, dtype) else dtype)  # see test_half.py
    assert (got.float() - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6


@pytest.mark.parametrize("backend", ["torch", "onednn", "auto"])
def test_heads_equal_transformers_on_every_cpu_backend(make, monkeypatch, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    assert_matches_per_token(*make(MASKED_LM, name="mlm", classifier_bias=True))
    folder, reference = make(SEQUENCE, name="sequence", classifier_pooling="mean", num_labels=3)
    ids, mask = padded(sequences())
    assert_equal(ml.load_model(folder)(ml.from_padded(ids, mask)), logits(reference, ids, mask))


def test_the_network_is_the_one_that_architectures_names(make):
    for architecture in ("ModernBertModel", MASKED_LM, SEQUENCE, TOKEN):
        model = ml.load_model(make(architecture, name=architecture)[0])
        assert type(model) is architectures()[architecture] is network_class(architecture)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_unknown_architecture_is_refused_by_name():
    with pytest.raises(ml.CheckpointError, match=r"'ModernBertForJokes' is not supported; known: ModernBertModel"):
        network_class("ModernBertForJokes")


def test_real_size_mlm_head_and_classifier_equal_transformers(make):
    wide = {"hidden_size": 768, "intermediate_size": 1152, "num_attention_heads": 12, "num_hidden_layers": 2}
    usual = {"initializer_range": 0.02, "initializer_cutoff_factor": 2.0}
    assert_matches_per_token(*make(MASKED_LM, name="mlm", **wide, **usual))
    folder, reference = make(SEQUENCE, name="sequence", classifier_pooling="mean", num_labels=1, **wide, **usual)
    ids, mask = padded(sequences())
    assert_equal(ml.load_model(folder)(ml.from_padded(ids, mask)), logits(reference, ids, mask))
