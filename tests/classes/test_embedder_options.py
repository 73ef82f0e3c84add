"""Embedder's options, which checkpoints it opens, its progress bar, its first use in a process."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from embedder_cases import WORDS, assert_same, text, tiny  # noqa: F401

import modernbert_lite as ml
from modernbert_lite import CheckpointError, Embedder

TINY = Path(__file__).parents[2] / "modernbert_lite" / "tiny"


@pytest.fixture
def unlike_tiny(tmp_path):
    """make(config={...}, sentence={...}): the bundled model's folder with some keys of its files changed."""

    def make(pooling=None, **files):
        folder = tmp_path / "changed"
        shutil.copytree(TINY, folder)
        for name, changes in files.items():
            path = folder / f"{name}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        if pooling is not None:
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        return folder

    return make


def test_prompts_are_put_before_every_text(unlike_tiny):
    model = Embedder.from_pretrained(
        unlike_tiny(config_sentence_transformers={"prompts": {"query": "find: ", "document": "text: "}})
    )
    texts = ["one", "two of them"]
    query, document = (model.encode([p + t for t in texts]) for p in ("find: ", "text: "))
    assert_same(model.encode(texts, prompt="find: "), query)
    assert_same(model.encode(texts, prompt_name="query"), query)
    assert_same(model.encode_query(texts), query)
    assert_same(model.encode_document(texts), document)
    assert_same(model.encode_query(texts, prompt="text: "), document)
    assert_same(model.encode_query(texts, prompt_name="document"), document)
    assert_same(model.encode("one", prompt_name="query"), query[0])
    assert np.abs(model.encode(texts) - query).max() > 1e-3


def test_the_default_prompt_is_used_and_can_be_left_out(unlike_tiny):
    model = Embedder.from_pretrained(
        unlike_tiny(config_sentence_transformers={"prompts": {"q": "find: "}, "default_prompt_name": "q"})
    )
    assert_same(model.encode("one"), model.encode("one", prompt="find: "))
    assert_same(model.encode("find: one", prompt=""), model.encode("one"))


def test_an_unknown_prompt_name_is_refused_with_the_known_ones(tiny):
    with pytest.raises(ValueError, match=r"prompt_name is 'queri'; this model has \['document', 'query'\]"):
        tiny.encode("one", prompt_name="queri")


@pytest.mark.parametrize("bad", [7, b"query: ", ["query: "]])
def test_a_prompt_that_is_no_string_is_refused(tiny, bad):
    with pytest.raises(TypeError, match=type(bad).__name__):
        tiny.encode("one", prompt=bad)


def test_truncate_dim_cuts_then_normalises(tiny):
    whole = tiny.encode(["one", "two words"])
    expected = whole[:, :96] / np.linalg.norm(whole[:, :96], axis=1, keepdims=True)
    assert_same(tiny.encode(["one", "two words"], truncate_dim=96), expected)
    assert_same(tiny.encode(["one", "two words"], truncate_dim=384), whole)
    always = Embedder.from_pretrained("tiny", truncate_dim=96)
    assert_same(always.encode(["one", "two words"]), expected)
    assert always.encode("one", truncate_dim=7).shape == (7,)
    assert always.encode([]).shape == (0, 96)


@pytest.mark.parametrize("dim", [0, -1, 385])
def test_truncate_dim_outside_the_width_is_refused(tiny, dim):
    with pytest.raises(ValueError, match=f"truncate_dim is {dim}; it must be from 1 to 384"):
        tiny.encode("one", truncate_dim=dim)
    with pytest.raises(ValueError, match=f"truncate_dim is {dim}"):
        Embedder.from_pretrained("tiny", truncate_dim=dim)


def test_normalize_embeddings_where_the_repository_does_not(make_checkpoint):
    folder, _ = make_checkpoint(num_hidden_layers=1)
    with pytest.warns(UserWarning, match="not an embedding model"):
        model = Embedder.from_pretrained(folder)
    raw, unit = model.encode("some words"), model.encode("some words", normalize_embeddings=True)
    assert abs(np.linalg.norm(raw) - 1) > 0.1
    assert_same(unit, raw / np.linalg.norm(raw))


@pytest.mark.parametrize(
    ("precision", "dtype", "width"),
    [
        ("float32", "float32", 384),
        ("float16", "float16", 384),
        ("int8", "int8", 384),
        ("uint8", "uint8", 384),
        ("binary", "int8", 48),
        ("ubinary", "uint8", 48),
    ],
)
def test_precisions(tiny, precision, dtype, width):
    vectors = tiny.encode(WORDS, precision=precision)
    assert (vectors.shape, vectors.dtype) == ((len(WORDS), width), np.dtype(dtype))


def test_unknown_or_impossible_precisions_are_refused(tiny):
    with pytest.raises(ValueError, match="precision is 'int4'; it must be one of float32, float16, int8"):
        tiny.encode(["one", "two"], precision="int4")
    with pytest.raises(ValueError, match="one embedding has no range to cut into int8"):
        tiny.encode("one", precision="int8")
    with pytest.raises(ValueError, match=r"ranges has shape \(2, 5\); it must be \(2, 384\)"):
        tiny.encode(["one", "two"], precision="uint8", ranges=np.zeros((2, 5)))


def test_an_unknown_precision_is_refused_before_the_work(tiny):
    with pytest.raises(ValueError, match="precision is 'int4'"):
        tiny.encode((pytest.fail("a text was read") for _ in range(1)), precision="int4")


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_ranges_and_their_lack_are_refused_before_the_work(tiny, monkeypatch, precision):
    monkeypatch.setattr(type(tiny), "run", lambda *_: pytest.fail("a text was computed"))
    unread = (pytest.fail("a text was read") for _ in range(1))
    with pytest.raises(ml.OptionError, match=r"^ranges has shape \(2, 384\); it must be \(2, 96\)"):
        tiny.encode(unread, precision=precision, ranges=np.zeros((2, 384)), truncate_dim=96)
    with pytest.raises(ml.OptionError, match=r"^ranges has a number that is not finite"):
        tiny.encode(unread, precision=precision, ranges=np.full((2, 384), np.nan))
    with pytest.raises(ValueError, match=r"^ranges can't be read as numbers"):
        tiny.encode(unread, precision=precision, ranges="wide")
    for one in ("one", ["one"], ("one",), np.array(["one"])):
        with pytest.raises(ml.OptionError, match=f"^one embedding has no range to cut into {precision}"):
            tiny.encode(one, precision=precision)


def test_an_error_of_quantising_has_the_finished_rows_in_float32(tiny, monkeypatch):
    vectors = np.array([[1.0, 2.0], [3.0, 70_000.0]], np.float32)
    monkeypatch.setattr(type(tiny), "stream", lambda *_, **__: iter([vectors]))
    with pytest.raises(ValueError, match=r"^embedding 1 is not finite in float16 \(2 rows were finished") as caught:
        tiny.encode(["a", "b"], precision="float16", truncate_dim=2)
    assert caught.value.finished.dtype == np.float32
    assert np.array_equal(caught.value.finished, vectors)


def test_a_single_text_may_be_quantised_by_given_ranges(tiny):
    ranges = np.stack([np.full(384, -0.2), np.full(384, 0.2)])
    vector = tiny.encode("one", precision="int8", ranges=ranges)
    assert (vector.shape, vector.dtype) == ((384,), np.int8)
    assert_same(vector, tiny.encode(["one", "two"], precision="int8", ranges=ranges)[0], 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_weights(tiny, dtype):
    texts = [text(i, n) for i, n in enumerate([1, 5, 64, 150])]
    vectors = Embedder.from_pretrained("tiny", dtype=dtype).encode(texts)
    assert vectors.dtype == np.float32
    assert (vectors * tiny.encode(texts)).sum(1).min() >= 0.999


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="on_long is 'warn'; it must be one of truncate, error"):
        Embedder.from_pretrained("tiny", on_long="warn")
    with pytest.raises(ValueError, match="batch_tokens is 0; it must be at least 1"):
        Embedder.from_pretrained("tiny", batch_tokens=0)
    with pytest.raises(ValueError, match="max_seq_length is 2; it must be over 3"):
        Embedder.from_pretrained("tiny", max_seq_length=2)
    with pytest.raises(ValueError, match="dtype is 'float4'; it must be one of float32, float16, bfloat16"):
        Embedder.from_pretrained("tiny", dtype="float4")
    with pytest.raises(ValueError, match="device 'gpu' can't be used"):
        Embedder.from_pretrained("tiny", device="gpu")
    with pytest.raises(TypeError, match="batch_size"):
        Embedder.from_pretrained("tiny", batch_size=32)


def test_similarity(tiny):
    a, b, c = tiny.encode(["A man plays the guitar.", "Someone is playing an instrument.", "Stocks fell on Monday."])
    table = tiny.similarity(np.stack([a, b]), np.stack([a, b, c]))
    assert table.shape == (2, 3)
    assert table[0, 0] == pytest.approx(1, abs=1e-6)
    assert table[0, 1] > table[0, 2] + 0.2
    assert tiny.similarity(a, b).shape == (1, 1)
    assert tiny.similarity(a, torch.from_numpy(b))[0, 0] == pytest.approx(float(a @ b), abs=1e-6)
    assert tiny.similarity(tiny.encode([]), np.stack([a])).shape == (0, 1)
    with pytest.raises(ValueError, match="embeddings have 384 and 96 dimensions"):
        tiny.similarity(a, b[:96])


# ---- which checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "right"),
    [
        ("ModernBertForSequenceClassification", "Classifier or Reranker"),
        ("ModernBertForTokenClassification", "TokenClassifier"),
    ],
)
def test_a_classifier_is_refused_with_the_right_class(make_checkpoint, architecture, right):
    folder, _ = make_checkpoint(architecture, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=f"holds a {architecture}, no embedding model: use {right}"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ["ModernBertModel", "ModernBertForMaskedLM"])
def test_a_base_without_pooling_files_is_no_embedding_model(make_checkpoint, architecture):
    folder, _ = make_checkpoint(architecture, num_hidden_layers=1)
    with pytest.warns(UserWarning, match="has no pooling files: it is not an embedding model") as caught:
        model = Embedder.from_pretrained(folder)
    assert len(caught) == 1
    hidden = ml.load_model(folder)
    ids = model.tokenizer.encode(["some words"])[0]
    if architecture == "ModernBertModel":
        assert_same(model.encode("some words"), hidden(ml.pack(ids)).mean(0).numpy())


def test_the_default_model_is_named_on_stderr(capsys):
    model = Embedder.from_pretrained()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "'tiny'" in captured.err
    assert "Alibaba-NLP/gte-modernbert-base" in captured.err
    assert len(captured.err.splitlines()) == 1
    assert model.dimension == 384
    Embedder.from_pretrained("tiny")
    assert capsys.readouterr().err == ""


# ---- progress bar --------------------------------------------------------------------------------------------------


def test_a_bar_is_drawn_on_stderr_only_when_asked(tiny, capsys):
    tiny.encode(["one"] * 5)
    tiny.encode(["one"] * 5, show_progress_bar=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    tiny.encode(["one"] * 5, show_progress_bar=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "5/5" in captured.err


def test_a_terminal_gets_a_bar_unless_it_is_turned_off(tiny, capsys, monkeypatch):
    import tqdm

    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(kwargs)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    tiny.encode(["one"])
    assert bars[-1]["delay"] >= 0.5  # short work draws nothing
    assert bars[-1]["file"].stream is sys.stderr
    tiny.encode(["one"], show_progress_bar=False)
    assert len(bars) == 1
    assert capsys.readouterr().err == ""


# ---- the first use of torch in a process ---------------------------------------------------------------------------


def test_an_embedder_needs_no_network_and_no_transformers():
    program = """
import socket, sys
socket.socket.connect = lambda *_: sys.exit("tried to reach the network")
sys.modules["transformers"] = sys.modules["sentence_transformers"] = None
from modernbert_lite import Embedder
print(Embedder.from_pretrained("tiny").encode(["hello"]).shape)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip() == "(1, 384)"
    assert done.stderr == ""


def test_no_warning_comes_from_ordinary_use(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.encode(["one", "two words", ""], precision="int8")


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_vectors_are_held_once(precision, monkeypatch):
    """Beside the float vectors there is only what is asked for, and blocks."""
    import tracemalloc

    model = ml.Embedder.from_pretrained("tiny")
    block = np.random.default_rng(0).standard_normal((4096, 384), dtype=np.float32)
    monkeypatch.setattr(model, "stream", lambda *_, **__: (block for _ in range(16)))
    tracemalloc.start()
    vectors = model.encode((t for t in ()), precision=precision)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert vectors.shape == (16 * 4096, 384)
    floats = 16 * block.nbytes
    assert peak <= 1.1 * (floats + (vectors.nbytes if precision == "int8" else 0)) + 8 * block.nbytes


def test_loading_and_encoding_leave_torch_s_compiler_alone():
    """Importing it takes longer than everything else that a first embedding needs."""
    program = (
        "import sys, modernbert_lite as ml; ml.Embedder.from_pretrained('tiny').encode(['x']); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("sentences", [b"bytes", None, 5])
def test_what_is_neither_a_text_nor_texts_is_refused(sentences):
    with pytest.raises(TypeError, match=f"sentences is {type(sentences).__name__}"):
        ml.Embedder.from_pretrained("tiny").encode(sentences)


def test_a_name_in_the_constructor_s_place_is_told_where_to_go():
    with pytest.raises(TypeError, match=r"Embedder\.from_pretrained\('tiny'\)"):
        ml.Embedder("tiny")


def test_a_warning_points_at_the_caller():
    with pytest.warns(UserWarning, match="were cut") as warned:
        ml.Embedder.from_pretrained("tiny", max_seq_length=8).encode(
            ["a text of many more words than eight tokens hold"]
        )
    assert warned[0].filename == __file__


@pytest.mark.parametrize("bad", [{"text": "a row"}, b"bytes", 3, None])
def test_what_is_no_text_is_refused(bad):
    model = Embedder.from_pretrained("tiny", device="cpu")
    with pytest.raises(TypeError, match=f"sentences is {type(bad).__name__}; it must be a str or an iterable of str"):
        model.encode(bad)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("trust_remote_code", "leave it out, no code of a repository is ever run"),
        ("torch_dtype", "it is dtype here"),
        ("batch_size", "batch size is counted in tokens here: batch_tokens"),
    ],
)
def test_options_of_other_libraries_are_answered_with_ours(option, hint):
    with pytest.raises(TypeError, match=f"Embedder.from_pretrained has no option '{option}': {hint}"):
        Embedder.from_pretrained("tiny", **{option: 1})
    with pytest.raises(TypeError, match=r"Reranker.from_pretrained has no option 'truncate_dim'$"):
        ml.Reranker.from_pretrained("tiny", truncate_dim=3)


def test_bad_options_are_option_errors():
    for options in ({"on_long": "cut"}, {"batch_tokens": 0}, {"dtype": "float4"}, {"truncate_dim": 0}):
        with pytest.raises(ml.OptionError):
            Embedder.from_pretrained("tiny", device="cpu", **options)
    with pytest.raises(ml.OptionError, match="precision is 'int4'"):
        Embedder.from_pretrained("tiny", device="cpu").encode("a", precision="int4")
