"""A result that is not finite is an error that names the text, in every class."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modernbert_lite import Embedder, FillMask, LateInteraction, Reranker, quantize_embeddings
from modernbert_lite.cli import commands as cli
from modernbert_lite.ops.linear import narrower

TEXTS = ["a river", "two stones", "the green house", "", "seven"]


def spoil(module, text_token, value):
    """Sequences that hold the token get `value` for all that the network gives of them."""

    def hook(_, arguments, out):
        batch = arguments[0]
        owners = torch.arange(len(batch.seqlens)).repeat_interleave(torch.tensor(batch.seqlens))
        bad = owners[batch.input_ids == text_token].unique()
        out = out.clone()
        out[torch.isin(owners, bad) if len(out) == len(owners) else bad] = value
        return out

    return module.register_forward_hook(hook)


def spoilt(model, module, value):
    token = next(i for i in model.tokenizer.encode(["a green"])[0][0] if model.tokenizer.decode(i).strip() == "green")
    spoil(module, token, value)
    return model


BAD = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("value", BAD)
def test_every_class_names_the_text(small_folders, value):
    message = r"^the result of text 2, .*green house.*, is not finite in float32; the checkpoint's weights are damaged"
    load = {"device": "cpu"}
    for name in ("tiny", small_folders["dense"]):
        dense = Embedder.from_pretrained(name, **load)
        if name == "tiny" or value != value:  # a Dense with Tanh makes numbers of infinities
            spoilt(dense, dense.network, value)
            with pytest.raises(ValueError, match=message):
                dense.encode(TEXTS)
    late = LateInteraction.from_pretrained(small_folders["late"], **load)
    spoilt(late, late.network, value)
    for encode in (late.encode_queries, late.encode_documents):
        with pytest.raises(ValueError, match=message):
            encode(TEXTS)
    masked = FillMask.from_pretrained(small_folders["masked"], **load)
    spoilt(masked, masked.encoder, value)
    with pytest.raises(ValueError, match=message):
        masked.predict([f"[MASK] {text}" for text in TEXTS])
    reranker = Reranker.from_pretrained(small_folders["reranker"], **load)
    spoilt(reranker, reranker.network, value)
    for activation in (None, "sigmoid", "identity"):  # a sigmoid makes numbers of infinities
        with pytest.raises(ValueError, match=message):
            reranker.predict([("q", text) for text in TEXTS], activation_fn=activation)
    with pytest.raises(ValueError, match=message):
        reranker.rank("q", TEXTS)
    assert len(reranker.predict([("q", "a"), ("q", "b")])) == 2


def test_what_was_finished_is_kept(monkeypatch):
    from modernbert_lite.pipeline import feed as pipeline

    monkeypatch.setattr(pipeline, "_WINDOW_TEXTS", 2)
    model = Embedder.from_pretrained("tiny", device="cpu")
    expected = model.encode(TEXTS[:2])
    spoilt(model, model.network, float("nan"))
    with pytest.raises(
        ValueError, match=r"text 2, .* \(2 rows were finished: this error has them as .finished"
    ) as caught:
        model.encode(TEXTS)
    assert np.array_equal(caught.value.finished, expected)


def changed(folder, to, **factors):
    """The folder with some of its tensors multiplied."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    for name, factor in factors.items():
        (key,) = [key for key in tensors if key.endswith(name.replace("__", "."))]
        tensors[key] = (tensors[key].double() * factor).clamp(-3e38, 3e38).float()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_absurd_but_finite_weights_are_told(small_folders, tmp_path):
    for cls, name, call in (
        (Embedder, "dense", lambda model: model.encode(TEXTS)),
        (LateInteraction, "late", lambda model: model.encode_documents(TEXTS)),
        (Reranker, "reranker", lambda model: model.rank("q", TEXTS)),
        (FillMask, "masked", lambda model: model.predict("[MASK] a")),
    ):
        folder = changed(small_folders[name], tmp_path / name, mlp__Wi__weight=1e25)
        model = cls.from_pretrained(folder, device="cpu")
        with pytest.raises(ValueError, match=r"^the result of text \d, .*, is not finite in float32; the checkpoint's"):
            call(model)


@pytest.mark.parametrize("format", ["jsonl", "npy", "npz"])
def test_the_shell_writes_no_such_vector(small_folders, tmp_path, capsys, format):
    folder = changed(small_folders["dense"], tmp_path / "dense", mlp__Wi__weight=1e25)
    out = tmp_path / f"v.{format}"
    assert cli.main(["embed", "a river", "-m", str(folder), "--device", "cpu", "-o", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the result of text 0, str ('a river'), is not finite in float32" in line
    assert not out.exists()


def test_overflow_of_float16_is_told_with_the_dtypes_that_hold_it(small_folders, tmp_path, monkeypatch):
    folder = changed(small_folders["dense"], tmp_path / "dense", final_norm__weight=35_000)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))  # without the Dense
    first = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}  # a mean is smaller
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(first))
    with monkeypatch.context() as patch:
        patch.setenv("MODERNBERT_LITE_BACKEND", "torch")  # computes in float16 on every CPU
        model = Embedder.from_pretrained(folder, device="cpu", dtype="float16")
        with pytest.raises(ValueError, match=r"is not finite in float16; .* dtype='float32' or 'bfloat16'"):
            model.encode(TEXTS)
    stored = ["float16"] if narrower(torch.device("cpu"), torch.float16) else []  # the CPU computes in float32
    for dtype in ("float32", "bfloat16", *stored):
        model = Embedder.from_pretrained(folder, device="cpu", dtype=dtype)
        vectors = model.encode(TEXTS)
        assert np.isfinite(vectors).all()
        assert np.abs(vectors).max() > 65_504
        with pytest.raises(ValueError, match=r"embedding \d is not finite in float16"):
            model.encode(TEXTS, precision="float16")


@pytest.mark.parametrize("precision", ["float16", "int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("value", BAD)
def test_embeddings_that_are_not_finite_are_not_quantised(precision, value):
    vectors = np.random.default_rng(0).standard_normal((5_000, 8), dtype=np.float32)
    vectors[4_321, 3] = value
    with pytest.raises(ValueError, match=f"^embedding 4321 is not finite in {precision}"):
        quantize_embeddings(vectors, precision)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_damaged_weight_is_an_error_that_names_the_text_and_the_cause(small_folders, tmp_path, dtype):
    folder = shutil.copytree(small_folders["dense"], tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("layers.0.mlp.Wo.weight"))
    tensors[name][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = Embedder.from_pretrained(folder, device="cpu", dtype=dtype)
    with pytest.raises(ValueError, match=r"^the result of text 2, .*green house.*, is not finite in \w+; .*damaged"):
        model.encode(TEXTS)


def test_a_weight_too_large_for_fp16_is_an_error_that_says_which_dtype_to_take(small_folders, tmp_path, monkeypatch):
    folder = shutil.copytree(small_folders["dense"], tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("layers.0.mlp.Wo.weight"))
    tensors[name][3, 3] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert np.isfinite(Embedder.from_pretrained(folder, device="cpu").encode(TEXTS)).all()
    if narrower(torch.device("cpu"), torch.float16):  # the CPU only stores 16 bits, and takes bfloat16 for this weight
        assert np.isfinite(Embedder.from_pretrained(folder, device="cpu", dtype="float16").encode(TEXTS)).all()
    monkeypatch.setenv("MODERNBERT_LITE_BACKEND", "torch")
    model = Embedder.from_pretrained(folder, device="cpu", dtype="float16")
    with pytest.raises(ValueError, match=r"is not finite in float16; .*65504.*dtype='float32' or 'bfloat16'"):
        model.encode(TEXTS)
