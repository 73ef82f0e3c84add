"""Keys of sentence-transformers' files, one by one: the same vectors as there, or a refusal that names the key."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from sentence_settings_cases import TEXTS, assert_same, folder, ours, prepared, set_modules, theirs, write  # noqa: F401
from sentence_transformers.util.similarity import SimilarityFunction

import modernbert_lite as ml
from modernbert_lite.checkpoint.open import Checkpoint

MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


def edit(path, **keys):
    write(path, {**json.loads(path.read_text()), **keys})


def cut_texts():
    return pytest.warns(UserWarning, match="and were cut")


def far(a, b):
    return np.abs(a - b).max()


# --- sentence_bert_config.json


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"tokenizer_args": {"truncation_side": "left"}, "max_seq_length": 12}, 12),
        ({"tokenizer_args": {"model_max_length": 12}, "max_seq_length": None}, 12),
        ({"processor_kwargs": {"model_max_length": 12}, "max_seq_length": 30}, 12),
        ({"tokenizer_args": {"model_max_length": 12}, "processor_kwargs": {"model_max_length": 30}}, 12),
        ({"processing_kwargs": {"text": {"max_length": 12}}, "max_seq_length": 30}, 12),
        ({"processing_kwargs": {"text": {"max_length": 30}, "common": {"max_length": 12}}}, 12),
        ({"processing_kwargs": {"text": {"max_length": 13, "padding": True, "truncation": True}}}, 13),
    ],
    ids=str,
)
def test_lengths_and_sides_of_the_networks_file_equal_sentence_transformers(folder, settings, length):
    write(folder / "sentence_bert_config.json", settings)
    model = ours(folder)
    assert model.max_seq_length == length
    with cut_texts():
        got = model.encode(TEXTS)
    assert_same(got, theirs(folder).encode(TEXTS))


@pytest.mark.parametrize(
    "settings",
    [
        {"config_args": {"local_attention": 4}},
        {"config_kwargs": {"norm_eps": 0.3, "use_cache": False}},
        {"config_kwargs": {"hidden_activation": "silu"}},
        {"do_lower_case": True},
        {"tokenizer_args": {"split_special_tokens": True}},
    ],
    ids=str,
)
def test_settings_that_change_vectors_equal_sentence_transformers(folder, settings):
    plain = ours(folder).encode(TEXTS[:3])
    write(folder / "sentence_bert_config.json", {"max_seq_length": 128, **settings})
    got = ours(folder).encode(TEXTS)
    assert_same(got, theirs(folder).encode(TEXTS))
    assert far(got[:3], plain) > 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"model_args": {"attn_implementation": "eager", "low_cpu_mem_usage": True, "trust_remote_code": True}},
        {"tokenizer_args": {"cache_dir": "/nowhere", "use_fast": True, "padding_side": "left"}, "unpad_inputs": False},
        {"config_args": {"attention_dropout": 0.5, "output_attentions": False, "revision": "main"}},
        {"processing_kwargs": {"text": {"padding": True, "pad_to_multiple_of": 8}, "image": {"do_resize": True}}},
        {
            "query_length": None,
            "document_length": None,
            "query_expansion": None,
            "transformer_task": "feature-extraction",
        },
        {
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
        {"module_output_name": "scores"},  # without a modality_config it is passed over
    ],
    ids=str,
)
def test_settings_that_change_nothing_open_the_same(folder, settings):
    plain = ours(folder, max_seq_length=128).encode(TEXTS)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 128, **settings})
    np.testing.assert_array_equal(ours(folder).encode(TEXTS), plain)
    assert_same(plain, theirs(folder).encode(TEXTS))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"config_args": {"num_hidden_layers": 1}}, r"config_kwargs \(config_args\) sets \['num_hidden_layers'\]"),
        ({"config_kwargs": {"rope_theta": 5}}, "rope_theta"),
        ({"config_kwargs": {"norm_eps": None}}, r"sets \['norm_eps'\] to null"),
        ({"config_kwargs": {"norm_eps": "small"}}, "norm_eps is 'small'"),  # it is config.json's reader that finds it
        ({"config_kwargs": 5}, "config_kwargs is 5; it must be an object or null"),
        ({"model_args": {"load_in_8bit": True}}, r"model_kwargs \(model_args\) sets \['load_in_8bit'\]"),
        ({"tokenizer_args": {"tokenizer_class": "Mine"}}, "tokenizer_class"),
        ({"tokenizer_args": {"model_max_length": 0}}, "model_max_length is 0"),
        ({"tokenizer_args": {"model_max_length": "12"}}, "model_max_length is '12'"),
        ({"processing_kwargs": {"text": {"truncation": False}}}, "truncation to False"),
        ({"processing_kwargs": {"common": {"add_special_tokens": False}}}, "add_special_tokens"),
        ({"processing_kwargs": {"text": {"max_length": -1}}}, "max_length of processing_kwargs is -1"),
        ({"transformer_task": "text-generation"}, "transformer_task is 'text-generation'"),
        ({"transformer_task": "fill-mask"}, "Pooling .* works on 'token_embeddings'"),
        ({"transformer_task": "sequence-classification"}, "Pooling .* works on 'token_embeddings'"),
        ({"modality_config": {"image": {}}, "module_output_name": "token_embeddings"}, "modality_config"),
        (
            {"modality_config": {"text": {"method": "forward", "method_output_name": ["hidden_states", -2]}}},
            "whose method_output_name is 'last_hidden_state'",
        ),
        (
            {"modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}},
            "module_output",
        ),
        ({"tokenizer_name_or_path": "bert-base-uncased"}, "tokenizer_name_or_path is 'bert-base-uncased'"),
        ({"query_length": 8}, "query_length, .* late-interaction models only"),
        ({"layers_to_drop": 2}, r"\['layers_to_drop'\] is not known"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_honoured_is_refused_by_name(folder, settings, said):
    write(folder / "sentence_bert_config.json", settings)
    with pytest.raises(ml.CheckpointError, match=f"(sentence_bert_config|modules).json: .*{said}"):
        Checkpoint.find(folder)


def test_of_several_names_the_first_file_that_is_not_empty_counts(folder):
    write(folder / "sentence_albert_config.json", {"max_seq_length": 11})
    write(folder / "sentence_roberta_config.json", {"max_seq_length": 12})
    write(folder / "sentence_odd_config.json", {"max_seq_length": 13})
    for name, length in (("bert", 40), ("roberta", 12), ("albert", 11), ("odd", 512)):
        assert ours(folder).max_seq_length == theirs(folder).max_seq_length == length
        write(folder / f"sentence_{name}_config.json", {})


def test_a_length_of_the_tokenizer_counts_where_no_file_has_one(folder):
    write(folder / "sentence_bert_config.json", {"max_seq_length": None})
    edit(folder / "tokenizer_config.json", model_max_length=17)
    assert ours(folder).max_seq_length == theirs(folder).max_seq_length == 17


# --- config_sentence_transformers.json


def test_a_stored_truncate_dim_is_the_default(folder):
    write(folder / "config_sentence_transformers.json", {"truncate_dim": 7})
    model = ours(folder)
    got = model.encode(TEXTS[:3])
    assert (model.truncate_dim, got.shape) == (7, (3, 7))
    assert_same(got, theirs(folder).encode(TEXTS[:3]))
    assert model.encode(TEXTS[:3], truncate_dim=32).shape == (3, 32)
    assert ours(folder, truncate_dim=9).encode("a").shape == (9,)


def test_a_stored_truncate_dim_over_the_width_cuts_nothing(folder):
    write(folder / "config_sentence_transformers.json", {"truncate_dim": 700})
    assert_same(ours(folder).encode(TEXTS[:3]), theirs(folder).encode(TEXTS[:3]))


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"truncate_dim": 0}, "truncate_dim is 0; it must be null or a whole number from 1"),
        ({"truncate_dim": "16"}, "truncate_dim is '16'"),
        ({"truncate_dim": True}, "truncate_dim is True"),
        ({"model_type": "Clip"}, "model_type is 'Clip'; known: SentenceTransformer, CrossEncoder"),
        ({"model_type": ["SentenceTransformer"]}, "model_type is"),
        ({"default_prompt_name": ""}, "default_prompt_name '' is not among the prompts"),
        ({"similarity_fn_name": "jaccard"}, "similarity_fn_name is 'jaccard'; known: cosine, dot"),
    ],
    ids=str,
)
def test_a_bad_value_in_config_sentence_transformers_is_refused(folder, texts, said):
    write(folder / "config_sentence_transformers.json", texts)
    with pytest.raises(ml.CheckpointError, match=f"config_sentence_transformers.json: {said}"):
        Checkpoint.find(folder)


def test_similarities_that_do_not_suit_a_vector_are_the_cosine_as_there(folder):
    write(folder / "config_sentence_transformers.json", {"similarity_fn_name": "maxsim", "prompts": {"query": None}})
    assert ours(folder).similarity_fn_name == theirs(folder).similarity_fn_name == "cosine"
    assert ours(folder).prompts == {"query": ""}


def test_every_encoder_has_an_empty_query_and_document_prompt(folder):
    for texts in (
        {},
        {"default_prompt_name": "query"},
        {"prompts": {"other": "Find: "}, "default_prompt_name": "other"},
    ):
        write(folder / "config_sentence_transformers.json", texts)
        model, reference = ours(folder), theirs(folder)
        for call in ({"prompt_name": "query"}, {"prompt_name": "document"}, {}):
            assert_same(model.encode(TEXTS[:3], **call), reference.encode(TEXTS[:3], **call))
        assert_same(model.encode_query(TEXTS[:3]), reference.encode_query(TEXTS[:3]))
        assert_same(model.encode_document(TEXTS[:3]), reference.encode_document(TEXTS[:3]))
        for name in ("passage", "Query", ["query"]):
            with pytest.raises(ml.OptionError, match="prompt_name is"):
                model.encode(TEXTS[:3], prompt_name=name)
        with pytest.raises(ValueError, match="Prompt name 'passage' not found"):
            reference.encode(TEXTS[:3], prompt_name="passage")


# --- after loading


def test_similarity_fn_name_set_after_loading_takes_effect_and_is_checked(folder):
    model = ours(folder)
    a, b = np.float32([[3, 4], [1, 0]]), np.float32([[0, 2]])
    expected = {
        "cosine": [[0.8], [0]],
        "dot": [[8], [0]],
        "manhattan": [[-5], [-3]],
        "euclidean": [[-(13**0.5)], [-(5**0.5)]],
    }
    names = {
        "cos_sim": "cosine",
        "dot_score": "dot",
        "manhattan_sim": "manhattan",
        SimilarityFunction.EUCLIDEAN: "euclidean",
    }
    names |= {None: "cosine", SimilarityFunction.DOT_PRODUCT: "dot", "euclidean": "euclidean"}
    for given, name in names.items():
        model.similarity_fn_name = given
        assert model.similarity_fn_name == name
        np.testing.assert_allclose(model.similarity(a, b), expected[name], atol=1e-6)
    for bad in ("cos", "maxsim", SimilarityFunction.MAXSIM, 5, ["cosine"]):
        with pytest.raises(ml.OptionError, match="known: cosine, dot, euclidean, manhattan"):
            model.similarity_fn_name = bad
    assert model.similarity_fn_name == "euclidean"


def test_prompts_set_after_loading_take_effect_and_are_checked(folder):
    model, text = ours(folder), "a ferry"
    plain, found = model.encode(text), model.encode("Find: a ferry")
    model.prompts = {"find": "Find: "}
    np.testing.assert_allclose(model.encode(text, prompt_name="find"), found, atol=1e-6)
    model.default_prompt_name = "find"
    np.testing.assert_allclose(model.encode(text), found, atol=1e-6)
    model.default_prompt_name = "query"
    np.testing.assert_allclose(model.encode(text), plain, atol=1e-6)
    for bad in ({"a": 5}, {5: "a"}, ["a"], "find"):
        with pytest.raises(ml.OptionError, match=r"prompts is .*; it must map names to strings"):
            model.prompts = bad
    with pytest.raises(ml.OptionError, match=r"default_prompt_name is 'lost'; this model has \['find'\]"):
        model.default_prompt_name = "lost"
    assert (model.prompts, model.default_prompt_name) == ({"find": "Find: "}, "query")
    model.default_prompt_name = "find"
    model.prompts = {}
    with pytest.raises(ml.OptionError, match=r"^default_prompt_name is 'find'; this model has no prompts"):
        model.encode(text)
    model.default_prompt_name = None
    np.testing.assert_allclose(model.encode(text), plain, atol=1e-6)


def test_truncate_dim_set_after_loading_takes_effect_and_is_checked(folder):
    model = ours(folder)
    whole = model.encode(TEXTS[:2])
    model.truncate_dim = 5
    np.testing.assert_array_equal(model.encode(TEXTS[:2]), whole[:, :5])
    model.truncate_dim = None
    np.testing.assert_array_equal(model.encode(TEXTS[:2]), whole)
    for bad in (0, 33, "5", 5.0):
        with pytest.raises(ml.OptionError, match=r"truncate_dim is .*; it must be from 1 to 32"):
            model.truncate_dim = bad


# --- prompts that are not pooled


PROMPTS = ["Find: ", "Find", "Find this [SEP]", "[SEP]", "[CLS]", "Wozu? [MASK]", "a long prompt, to be cut. " * 9, " "]


@pytest.mark.parametrize("mode", [*MODES, ["lasttoken", "cls", "mean"]], ids=str)
@pytest.mark.parametrize("ends", [True, False])
def test_prompts_without_pooling_equal_sentence_transformers(small_checkpoint, mode, ends):
    """Also where the prompt is the whole text, ends in a special token, is cut, or a text's template has no end."""
    folder = prepared(small_checkpoint(ends=ends))
    write(folder / "sentence_bert_config.json", {"max_seq_length": 24})
    set_modules(folder, ("Pooling", {"pooling_mode": mode, "include_prompt": False, "embedding_dimension": 32}))
    model, reference = ours(folder), theirs(folder)
    texts = ["ferry", "Find: ferry", "", "tide and boats " * 12]
    for prompt in PROMPTS:
        expected = reference.encode(texts, prompt=prompt)
        finite = np.isfinite(expected).all(1)  # the maximum of no token is minus infinity there, and an error here
        if finite.any():
            with cut_texts():
                got = model.encode([text for text, fine in zip(texts, finite, strict=True) if fine], prompt=prompt)
            np.testing.assert_allclose(got, expected[finite], atol=1e-5, rtol=1e-5)
        for i in np.flatnonzero(~finite):
            assert mode == "max"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some are cut, too
                with pytest.raises(ValueError, match=r"text 0, .*; or the text has no token beside its prompt"):
                    model.encode(texts[i], prompt=prompt)


@pytest.mark.parametrize("flag", [None, 0, False, True, "false"])
def test_include_prompt_is_taken_as_python_takes_it(folder, flag):
    pooling = {"pooling_mode": "mean", "include_prompt": flag, "word_embedding_dimension": 32}
    set_modules(folder, ("Pooling", pooling))
    expected = theirs(folder).encode(TEXTS[:3], prompt="Find: ")
    assert_same(ours(folder).encode(TEXTS[:3], prompt="Find: "), expected)


# --- modules


def test_without_modules_json_the_other_files_do_not_count_as_there(folder):
    write(folder / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": True})
    write(
        folder / "config_sentence_transformers.json",
        {"prompts": {"q": "Find: "}, "default_prompt_name": "q", "truncate_dim": 8},
    )
    (folder / "modules.json").unlink()
    with pytest.warns(UserWarning, match="has no (modules.json: what .* says doesn't count|pooling files)"):
        model = ours(folder)
    assert_same(model.encode(TEXTS), theirs(folder).encode(TEXTS))
    assert (model.prompts, model.truncate_dim) == ({}, None)
