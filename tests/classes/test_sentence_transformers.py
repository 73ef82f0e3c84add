"""Embedder, Reranker and FillMask, end to end on real text, against sentence-transformers and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from sentence_transformers.util import quantize_embeddings
from sentence_transformers.util.similarity import SimilarityFunction
from sentence_transformers_cases import DOCUMENTS, LONG, QUERY, assert_same

import modernbert_lite as ml

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


TEXTS = [
    "The lighthouse keeper wrote down the weather every evening.",
    "",
    " ",
    "\n\t  \n",
    "   two spaces before, three after   ",
    "Crème brûlée, naïve coöperation, and a re\u0301sume\u0301 in two forms.",
    "我们明天早上去图书馆还书。",
    "明日の朝、図書館に本を返しに行きます。",
    "내일 아침 도서관에 책을 반납하러 갑니다.",
    "Завтра утром мы вернём книги в библиотеку.",
    "سنعيد الكتب إلى المكتبة صباح الغد",
    "🙂🙃 thumbs 👍🏽 and a family 👩‍👩‍👧‍👦 on a flag 🏴‍☠️",
    "def area(r):\n    return 3.14159 * r ** 2  # of a circle\n",
    "e = mc², ∑ᵢ xᵢ ≤ ∫ f(x) dx, 10⁻⁹ Ω",
    "a",
    "antidisestablishmentarianism-" * 6,
    "[CLS] a text that [SEP] spells [MASK] out special [PAD] tokens <|endoftext|>",
    "nul\0 byte, zero\u200bwidth, soft\u00adhyphen, \ufeff mark",
    "12345678901234567890 0x1F 1e-9 +49 30 1234567",
    "one sentence of middling length, with commas, that turns a corner and comes back to where it began; " * 3,
]


def embedder(folder, **options):
    return ml.Embedder.from_pretrained(folder, **options)


def sentence_transformer(folder, **options):
    return SentenceTransformer(str(folder), device="cpu", **options)


@pytest.fixture
def make_embedder(make_checkpoint):
    """A random checkpoint with sentence-transformers' files around it, in their old form: make(**of modules) -> folder.

    pooling: of 1_Pooling/config.json. dense: settings of Dense modules after it."""

    def make(
        *,
        pooling=None,
        dense=(),
        normalize=False,
        max_seq_length=128,
        prompts=None,
        whole_tokenizer=False,
        name="checkpoint",
        **texts,
    ):
        folder, _ = make_checkpoint(name=name, whole_tokenizer=whole_tokenizer)
        types = ["Transformer", "Pooling", *("Dense" for _ in dense), *(["Normalize"] if normalize else [])]
        paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(types) if i)]
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(zip(types, paths, strict=True))
        ]
        for path in paths[1:]:
            (folder / path).mkdir()
        (folder / "modules.json").write_text(json.dumps(modules))
        pooled = {"word_embedding_dimension": 96, **(pooling or {"pooling_mode_mean_tokens": True})}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooled))
        generator = torch.manual_seed(7)
        for path, (width, settings) in zip(paths[2:], dense, strict=False):
            layer = Dense(width, **settings)
            torch.nn.init.normal_(layer.linear.weight, std=0.3, generator=generator)
            layer.save(str(folder / path))
        settings = {"max_seq_length": max_seq_length, "do_lower_case": False}
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
        sentence = {"prompts": prompts or {}, "default_prompt_name": None, "similarity_fn_name": "cosine", **texts}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(sentence))
        return folder

    return make


# --- Embedder: the bundled model


@pytest.fixture(scope="module")
def tiny():
    folder = Path(ml.__file__).parent / "tiny"
    return embedder("tiny"), sentence_transformer(folder)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_tiny_equals_sentence_transformers_on_one_text(tiny, text):
    ours, theirs = tiny
    assert_same(ours.encode(text), theirs.encode(text))


def test_tiny_equals_sentence_transformers_on_all_texts_at_once(tiny):
    ours, theirs = tiny
    expected = theirs.encode(TEXTS)
    assert_same(ours.encode(TEXTS), expected)
    assert_same(ours.encode(text for text in TEXTS), expected)
    assert_same(ours.encode(TEXTS[::-1]), expected[::-1])
    assert np.abs(ours.encode(TEXTS) - np.stack([ours.encode(text) for text in TEXTS])).max() <= 1e-5


def test_tiny_equals_sentence_transformers_on_texts_that_are_cut(tiny):
    ours, theirs = tiny
    cjk = "潮が満ちる浜辺で、誰も顔を上げなかった。" * 200
    with pytest.warns(UserWarning, match="3 of 5 texts were longer than 512 tokens and were cut"):
        got = ours.encode(["short", LONG, "also short", LONG * 9, cjk])
    assert_same(got, theirs.encode(["short", LONG, "also short", LONG * 9, cjk]))


def test_tiny_equals_sentence_transformers_at_the_limit(tiny):
    """510 one-token words and the two special tokens are 512: not cut, and one more is."""
    ours, theirs = tiny
    assert len(ours.tokenizer.encode(["the " * 510])[0][0]) == 512
    full = "the " * 509 + "the"
    assert_same(ours.encode(full), theirs.encode(full))  # a warning would be an error
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        assert_same(ours.encode(full + " sea"), theirs.encode(full + " sea"))


def test_tiny_options_equal_sentence_transformers(tiny):
    ours, theirs = tiny
    for options in (
        {"normalize_embeddings": True},
        {"truncate_dim": 100, "normalize_embeddings": True},
        {"prompt": "A note on: "},
        {"prompt_name": "query"},
    ):
        assert_same(ours.encode(TEXTS, **options), theirs.encode(TEXTS, **options))
    assert_same(ours.encode_query(TEXTS), theirs.encode_query(TEXTS))
    assert_same(ours.encode_document(TEXTS), theirs.encode_document(TEXTS))
    assert ours.dimension == theirs.get_embedding_dimension()
    assert ours.max_seq_length == theirs.max_seq_length


def test_tiny_vectors_that_are_cut_keep_unit_length(tiny):
    """sentence-transformers cuts after the repository's Normalize and leaves them shorter; same direction."""
    ours, theirs = tiny
    expected = theirs.encode(TEXTS, truncate_dim=100)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert_same(ours.encode(TEXTS, truncate_dim=100), expected)


def test_tiny_in_half_precision_points_the_same_way(tiny):
    ours, _ = tiny
    expected = ours.encode(TEXTS)
    for dtype in ("bfloat16", "float16"):
        got = embedder("tiny", dtype=dtype).encode(TEXTS)
        assert got.dtype == np.float32
        assert (np.sum(got * expected, axis=1) / np.linalg.norm(got, axis=1) >= 0.999).all()


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_precisions_equal_sentence_transformers(tiny, precision):
    ours, theirs = tiny
    vectors = ours.encode(TEXTS)
    np.testing.assert_array_equal(
        ours.encode(TEXTS, precision=precision), quantize_embeddings(vectors, precision=precision)
    )
    np.testing.assert_array_equal(
        ml.quantize_embeddings(vectors[:, :99], precision), quantize_embeddings(vectors[:, :99], precision=precision)
    )
    # End to end, where rounding may move a number over a step's or a sign's edge: one step, and rarely.
    expected = theirs.encode(TEXTS, precision=precision)
    got = ours.encode(TEXTS, precision=precision)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if precision != "float32":
        assert (got != expected).mean() <= 0.002


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_ranges_of_a_calibration_set_equal_sentence_transformers(tiny, precision):
    ours, _ = tiny
    calibration = ours.encode([*DOCUMENTS, QUERY])
    ranges = np.stack([calibration.min(0), calibration.max(0)])
    ranges[1, 5] = ranges[0, 5]  # a dimension that never changes
    vectors = ours.encode(TEXTS)
    got = ours.encode(TEXTS, precision=precision, ranges=ranges)
    np.testing.assert_array_equal(got, quantize_embeddings(vectors, precision=precision, ranges=ranges))
    assert got.min() == np.iinfo(precision).min  # outside of the ranges: clipped
    assert got.max() == np.iinfo(precision).max
    one = ours.encode(TEXTS[:1], precision=precision, ranges=ranges)
    np.testing.assert_array_equal(one, got[:1])


def test_float16_precision_is_the_rounded_vector(tiny):
    ours, _ = tiny
    got = ours.encode(TEXTS, precision="float16")
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, ours.encode(TEXTS).astype(np.float16))


# --- Embedder: every form of the files, on random weights


@pytest.mark.parametrize("mode", MODES)
def test_every_pooling_mode_equals_sentence_transformers_in_the_old_form(make_embedder, mode):
    keys = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "weightedmean": "weightedmean_tokens"}
    key = f"pooling_mode_{keys.get(mode, mode)}"
    others = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
    folder = make_embedder(pooling={**others, key: True})
    assert embedder(folder).pooling.modes == (mode,)
    assert_same(embedder(folder).encode(TEXTS), sentence_transformer(folder).encode(TEXTS))


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode": "cls"},
        {"pooling_mode": "weightedmean"},
        {"pooling_mode": ["mean", "cls"]},
        {"pooling_mode": ["lasttoken", "max", "mean_sqrt_len_tokens"]},
        {"pooling_mode": list(MODES)},
        # The booleans have an order of their own, whatever the file's.
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode_lasttoken": True, "pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False},
    ],
    ids=str,
)
def test_combined_and_new_pooling_modes_equal_sentence_transformers(make_embedder, pooling):
    folder = make_embedder(pooling=pooling)
    ours, theirs = embedder(folder), sentence_transformer(folder)
    assert_same(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert ours.dimension == theirs.get_embedding_dimension()


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_that_is_not_pooled_equals_sentence_transformers(make_embedder, mode):
    folder = make_embedder(
        pooling={"pooling_mode": mode, "include_prompt": False},
        prompts={"topic": "Represent the topic of this note: ", "plain": ""},
        whole_tokenizer=True,
    )
    ours, theirs = embedder(folder), sentence_transformer(folder)
    for options in ({"prompt_name": "topic"}, {"prompt": "Find: "}, {"prompt_name": "plain"}, {}):
        assert_same(ours.encode(TEXTS, **options), theirs.encode(TEXTS, **options))


def test_prompts_equal_sentence_transformers(make_embedder):
    prompts = {"query": "search_query: ", "document": "search_document: ", "other": "Wozu? "}
    folder = make_embedder(prompts=prompts)
    ours, theirs = embedder(folder), sentence_transformer(folder)
    for name in prompts:
        assert_same(ours.encode(TEXTS, prompt_name=name), theirs.encode(TEXTS, prompt_name=name))
    assert_same(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert_same(ours.encode(TEXTS, prompt="Why: "), theirs.encode(TEXTS, prompt="Why: "))
    assert_same(ours.encode_query(TEXTS), theirs.encode_query(TEXTS))
    assert_same(ours.encode_document(TEXTS), theirs.encode_document(TEXTS))
    assert np.abs(ours.encode_query(TEXTS) - ours.encode_document(TEXTS)).max() > 0.01


@pytest.mark.parametrize("name", ["passage", "corpus"])
def test_a_document_prompt_may_have_another_name(make_embedder, name):
    """As sentence-transformers documents it. (6.2 itself adds an empty "document" to every model's prompts, finds that
    first, and so never gets to these: asked by name it gives the same vectors.)"""
    folder = make_embedder(prompts={name: "passage: ", "query": "query: "})
    expected = sentence_transformer(folder).encode(TEXTS, prompt_name=name)
    assert_same(embedder(folder).encode_document(TEXTS), expected)


def test_a_default_prompt_equals_sentence_transformers(make_embedder):
    folder = make_embedder(prompts={"always": "Note: ", "query": "Q: "}, default_prompt_name="always")
    ours, theirs = embedder(folder), sentence_transformer(folder)
    assert_same(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert_same(ours.encode(TEXTS, prompt_name="query"), theirs.encode(TEXTS, prompt_name="query"))
    assert_same(ours.encode_query(TEXTS), theirs.encode_query(TEXTS))
    assert_same(ours.encode_document(TEXTS), theirs.encode_document(TEXTS))
    assert np.abs(ours.encode(TEXTS) - ours.encode(TEXTS, prompt="")).max() > 0.01


@pytest.mark.parametrize(
    "dense",
    [
        [(96, {"out_features": 40})],  # with a bias and tanh, the defaults
        [(96, {"out_features": 40, "bias": False, "activation_function": torch.nn.Identity()})],
        [(96, {"out_features": 120, "activation_function": torch.nn.GELU()})],
        [(96, {"out_features": 40, "activation_function": torch.nn.ReLU()})],
        [(96, {"out_features": 40, "activation_function": torch.nn.Sigmoid()})],
        [(96, {"out_features": 40, "activation_function": torch.nn.SiLU(), "use_residual": True})],
        [(96, {"out_features": 96, "activation_function": torch.nn.Identity(), "use_residual": True})],
        [(96, {"out_features": 64}), (64, {"out_features": 17, "bias": False})],
    ],
    ids=str,
)
@pytest.mark.parametrize("normalize", [True, False])
def test_dense_modules_equal_sentence_transformers(make_embedder, dense, normalize):
    folder = make_embedder(dense=dense, normalize=normalize)
    ours, theirs = embedder(folder), sentence_transformer(folder)
    assert_same(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert ours.dimension == theirs.get_embedding_dimension()


@pytest.mark.parametrize("normalize", [True, False])
def test_truncate_dim_equals_sentence_transformers(make_embedder, normalize):
    folder = make_embedder(normalize=normalize)
    theirs = sentence_transformer(folder)
    for options in ({"truncate_dim": 33}, {"truncate_dim": 96}):
        for unit in (True, False) if not normalize else (True,):
            expected = theirs.encode(TEXTS, **options, normalize_embeddings=unit)
            assert_same(embedder(folder).encode(TEXTS, **options, normalize_embeddings=unit), expected)
            assert_same(embedder(folder, **options).encode(TEXTS, normalize_embeddings=unit), expected)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_functions_equal_sentence_transformers(make_embedder, name):
    folder = make_embedder(similarity_fn_name=name)
    ours, theirs = embedder(folder), sentence_transformer(folder)
    assert ours.similarity_fn_name == theirs.similarity_fn_name == name
    a, b = theirs.encode(TEXTS), theirs.encode(DOCUMENTS)
    expected = theirs.similarity(a, b).numpy()
    got = ours.similarity(a, b)
    assert got.shape == (len(TEXTS), len(DOCUMENTS))
    assert np.abs(got - expected).max() <= 2e-6 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(ours.similarity(torch.from_numpy(a), b), got)
    np.testing.assert_allclose(ours.similarity(a[0], b), got[:1], atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(got, SimilarityFunction.to_similarity_fn(name)(a, b).numpy(), atol=1e-4, rtol=1e-6)


def test_retrieval_equals_sentence_transformers(tiny):
    ours, theirs = tiny
    scores = ours.similarity(ours.encode_query(QUERY), ours.encode_document(DOCUMENTS))[0]
    expected = util.semantic_search(theirs.encode_query(QUERY), theirs.encode_document(DOCUMENTS))[0]
    assert np.argsort(-scores).tolist() == [hit["corpus_id"] for hit in expected]
    np.testing.assert_allclose(np.sort(scores)[::-1], [hit["score"] for hit in expected], atol=1e-5)


def test_texts_longer_than_the_repositorys_limit_are_cut_as_there(make_embedder):
    folder = make_embedder(max_seq_length=23)
    with pytest.warns(UserWarning, match=r"\d+ of 21 texts were longer than 23 tokens"):
        got = embedder(folder).encode([*TEXTS, LONG])
    assert_same(got, sentence_transformer(folder).encode([*TEXTS, LONG]))


def test_a_length_that_no_file_gives_equals_sentence_transformers(make_embedder):
    """The tokenizer's 1e30 isn't a limit: the model's own is."""
    folder = make_embedder(max_seq_length=None)
    (folder / "sentence_bert_config.json").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 300}))
    ours, theirs = embedder(folder), sentence_transformer(folder)
    assert ours.max_seq_length == theirs.max_seq_length == 300
    with pytest.warns(UserWarning, match="1 of 1 texts were longer than 300 tokens"):
        assert_same(ours.encode([LONG]), theirs.encode([LONG]))


@pytest.mark.parametrize(("mode", "include_prompt"), [("cls", True), (("cls", "mean"), True), ("mean", False)])
def test_a_model_that_sentence_transformers_saved_opens_the_same(make_checkpoint, tmp_path, mode, include_prompt):
    """The files of version 6: other class names, the length in tokenizer_config.json, Dense and Normalize with their
    names."""
    source, _ = make_checkpoint()
    transformer = Transformer(str(source), max_seq_length=200)
    pooling = Pooling(96, pooling_mode=mode, include_prompt=include_prompt)
    width = pooling.get_embedding_dimension()
    modules = [transformer, pooling, Dense(width, 24, bias=False, activation_function=None), Normalize()]
    prompts = {"query": "search_query: ", "document": "search_document: "}
    theirs = SentenceTransformer(modules=modules, device="cpu", prompts=prompts, similarity_fn_name="dot")
    theirs.save_pretrained(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "modules.json").read_text())
    assert saved[0]["type"].startswith("sentence_transformers.base.")  # the new form, which this test is about

    ours = embedder(tmp_path / "saved")
    assert (ours.max_seq_length, ours.similarity_fn_name, ours.prompts) == (200, "dot", prompts)
    assert_same(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert_same(ours.encode_query(TEXTS), theirs.encode_query(TEXTS))
    assert_same(ours.encode_document(TEXTS), theirs.encode_document(TEXTS))
    with pytest.warns(UserWarning, match="longer than 200 tokens"):
        assert_same(ours.encode(LONG), theirs.encode(LONG))


def test_tiny_saved_by_sentence_transformers_opens_the_same(tiny, tmp_path):
    ours, theirs = tiny
    theirs.save_pretrained(str(tmp_path / "saved"))
    again = embedder(tmp_path / "saved")
    assert (again.max_seq_length, again.normalizes) == (512, True)
    np.testing.assert_array_equal(again.encode(TEXTS), ours.encode(TEXTS))


def test_a_repository_without_pooling_files_is_averaged_as_there(make_checkpoint):
    folder, _ = make_checkpoint("ModernBertForMaskedLM")
    with pytest.warns(UserWarning, match="no pooling files: it is not an embedding model"):
        ours = embedder(folder)
    assert_same(ours.encode(TEXTS), sentence_transformer(folder).encode(TEXTS))


def test_do_lower_case_equals_sentence_transformers(make_embedder):
    """The tokenizer keeps case; special tokens that a text spells out keep theirs."""
    folder = make_embedder()
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128, "do_lower_case": True}))
    ours, theirs = embedder(folder), sentence_transformer(folder)
    plain = [text for text in TEXTS if "[CLS]" not in text]
    assert_same(ours.encode(plain), theirs.encode(plain))
    assert np.abs(ours.encode("A Capital") - ours.encode("a capital")).max() <= 1e-6
    assert_same(ours.encode(["A [MASK] and a [SEP]", "ΟΔΥΣΣΕΥΣ"]), theirs.encode(["A [MASK] and a [SEP]", "ΟΔΥΣΣΕΥΣ"]))


@pytest.mark.parametrize("backend", ["torch", "onednn"])
def test_backends_equal_sentence_transformers(tiny, monkeypatch, backend):
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", backend)
    ours, theirs = tiny
    assert_same(ours.encode(TEXTS), theirs.encode(TEXTS))


def test_batch_size_and_company_do_not_change_a_vector(tiny):
    ours, _ = tiny
    expected = ours.encode(TEXTS)
    for batch_tokens in (1, 40, 300):
        assert np.abs(embedder("tiny", batch_tokens=batch_tokens).encode(TEXTS) - expected).max() <= 1e-5


# --- Reranker


def test_a_gte_modernbert_folder_as_on_the_hub_equals_sentence_transformers(make_checkpoint, tmp_path):
    """The layout of gte-modernbert-base: fp16 weights, old keys, cls pooling though classifier_pooling says mean."""
    source, reference = make_checkpoint(classifier_pooling="mean")
    folder = tmp_path / "hub"
    shutil.copytree(source, folder)
    reference.half().save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if key not in ("layer_types", "rope_parameters", "dtype")}
    raw |= {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3}
    raw |= {"torch_dtype": "float16", "layer_norm_eps": 1e-05, "position_embedding_type": "absolute"}
    (folder / "config.json").write_text(json.dumps(raw))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 96, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))

    ours = embedder(folder)
    assert ours.max_seq_length == 8192
    theirs = sentence_transformer(folder, model_kwargs={"dtype": torch.float32})
    assert_same(ours.encode([*TEXTS, LONG]), theirs.encode([*TEXTS, LONG]))
