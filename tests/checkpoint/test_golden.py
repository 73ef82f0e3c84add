"""Published numbers of real checkpoints, from data/golden.json.

They run where the weights are: in the hub cache, or in the folder that MODERNBERT_LITE_TEST_MODELS names, as
FOLDER/org/name or FOLDER/name. The tokenizer's cases always run, and so do the checks' own tests, on random weights
with transformers' numbers in the place of the published ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import modernbert_lite as ml
from modernbert_lite.checkpoint.hub import find_checkpoint
from modernbert_lite.models.modernbert import MaskedLM
from modernbert_lite.ops import pooling
from modernbert_lite.pipeline.tokenizer import Tokenizer
from modernbert_lite.reading import CheckpointError

DATA = Path(__file__).parents[1] / "data"
GOLDEN = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))
MODELS = "MODERNBERT_LITE_TEST_MODELS"


# --- finding the weights


def find_model(name: str) -> Path | None:
    """The checkpoint's folder: under MODERNBERT_LITE_TEST_MODELS, else in the hub cache; None if it is in neither.
    "one/name (= another/name weights)" is found under either."""
    if " " in name:
        return next(filter(None, map(find_model, re.findall(r"[\w.-]+/[\w.-]+", name))), None)
    root = os.environ.get(MODELS)
    if root:
        for path in (Path(root) / name, Path(root) / name.rpartition("/")[2]):
            if (path / "config.json").is_file():
                return path
    try:
        folder = find_checkpoint(name, local_files_only=True).root
    except CheckpointError:
        return None
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def unsupported(entry: dict[str, Any]) -> str | None:
    """Why this package can't run an entry, whatever weights there are."""
    if "MultipleChoice" in entry["model"]:
        return "multiple choice is not an architecture of this package"
    return None


# --- what an entry's `kind` means, and how near is near enough


def low_level(folder: Path, texts: list[Any]) -> tuple[Any, Any]:
    """The network, and the texts or pairs as one packed batch."""
    model = ml.load_model(folder, device="cpu", dtype="float32")
    pairs = [tuple(text) if isinstance(text, list) else text for text in texts]
    ids, _ = Tokenizer(folder, model.config.max_position_embeddings).encode(pairs)
    return model, ml.pack(ids)


def encoder(model: Any) -> Any:
    """The encoder itself, of a checkpoint that may hold a head too."""
    return getattr(model, "model", model)


def per_sequence(rows: torch.Tensor, batch: Any) -> list[torch.Tensor]:
    return ml.unpack(rows, batch.cu_seqlens)


def computed(entry: dict[str, Any], folder: Path) -> Any:
    """What this package gives for an entry: an array in the shape of its values, or a list of tokens."""
    kind, texts = entry["kind"], entry["inputs"]
    if kind.startswith("top-"):
        count, position = (int(number) for number in re.fullmatch(r"top-(\d+) tokens at position (\d+)", kind).groups())
        fill = ml.FillMask.from_pretrained(folder, device="cpu", dtype="float32")
        ids = fill.tokenizer.encode(texts)[0][0]
        assert ids[position] == fill.tokenizer.mask_token_id
        return [prediction["token"].strip() for prediction in fill.predict(texts[0], top_k=count)[0]]
    if kind.endswith("cosine(first, each of the rest)"):
        vectors = ml.Embedder.from_pretrained(folder, device="cpu", dtype="float32").encode(
            texts, normalize_embeddings=True
        )
        return (100 if kind.startswith("100 * ") else 1) * (vectors[1:] @ vectors[0])
    model, batch = low_level(folder, texts)
    if kind == "embedding":
        vectors = pooling.pool(encoder(model)(batch), batch, [entry["pooling"]])
        return (pooling.normalize(vectors) if entry["normalize"] else vectors).numpy()
    if kind == "last_hidden_state (per token)":
        assert batch.input_ids.tolist() == entry["input_ids"]
        return encoder(model)(batch).numpy()
    part = re.fullmatch(r"(last_hidden_state|mlm logits)\[:, (\d*):(\d+), (\d*):(\d+)\]", kind)
    if part:
        rows, columns = (slice(int(part[i] or 0), int(part[i + 1])) for i in (2, 4))
        network = model if part[1] == "mlm logits" else encoder(model)
        return np.stack([x[rows, columns].numpy() for x in per_sequence(network(batch), batch)])
    if kind in ("logit of a text pair", "pair logits", "logits", "logits (two single sentences, not pairs)"):
        logits = model(batch)
        if len(logits) == len(batch.input_ids) != len(texts):  # a row a token: TokenClassifier
            logits = torch.stack(per_sequence(logits, batch))
        return logits[:, 0].numpy() if kind == "pair logits" else logits.numpy()
    raise AssertionError(f"golden.json has a kind that this test doesn't know: {kind!r}")


def tolerance(entry: dict[str, Any]) -> float:
    """The stated one, in absolute terms. Where an entry states none, transformers' own test has 1e-4, and a card's
    cosine times 100 is as exact as the other card's, which says 1e-2."""
    stated = entry.get("tolerance", "1e-2" if entry["kind"].startswith("100 * ") else "1e-4")
    if stated.startswith("TEI itself"):  # "... use cosine > 0.99999 and abs 5e-3 (fp16: 1e-2)"
        return 5e-3 if entry.get("dtype") == "float32" else 1e-2
    return float(re.search(r"\d+(\.\d+)?e-\d+", stated)[0])


def check(entry: dict[str, Any], folder: Path) -> None:
    got, expected = computed(entry, folder), entry["values"]
    if isinstance(expected[0], str):
        assert got == expected
        return
    expected = np.array(expected, np.float64)
    assert got.shape == expected.shape
    # The values of transformers' tests have four decimals; its comparison adds the same tolerance relatively.
    relative = tolerance(entry) if entry["id"].startswith("hf_") else 0.0
    np.testing.assert_allclose(got, expected, atol=tolerance(entry), rtol=relative)
    if entry["kind"] in ("embedding", "last_hidden_state (per token)"):
        norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(expected, axis=-1)
        assert (np.sum(got * expected, axis=-1) / norms > 0.99999).all()
    if "sigmoid" in entry:
        got = ml.Reranker.from_pretrained(folder, device="cpu", dtype="float32").predict(entry["inputs"])
        np.testing.assert_allclose(got, entry["sigmoid"], atol=tolerance(entry))


@pytest.mark.weights
@pytest.mark.parametrize("entry", GOLDEN["entries"], ids=lambda entry: entry["id"])
def test_a_real_checkpoint_gives_its_published_numbers(entry):
    reason = unsupported(entry)
    if reason:
        pytest.skip(reason)
    folder = find_model(entry["model"])
    if folder is None:
        pytest.skip(
            f"no weights of {entry['model']}: download it into the hub cache (hf download {entry['model']}), or set "
            f"{MODELS} to a folder that has it as {entry['model']}/ or {entry['model'].rpartition('/')[2]}/"
        )
    check(entry, folder)


# --- the tokenizer, always


@pytest.mark.parametrize("case", GOLDEN["tokenizer_modernbert"]["cases"], ids=ascii)
def test_the_real_tokenizer_gives_the_published_ids(case):
    tokenizer = Tokenizer(DATA / "modernbert-tokenizer", 8192)
    text = tuple(case["pair"]) if "pair" in case else case["text"]
    assert tokenizer.encode([text]) == ([case["ids"]], 0)


def test_the_tokenizer_file_is_the_published_one():
    content = (DATA / "modernbert-tokenizer" / "tokenizer.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == GOLDEN["tokenizer_modernbert"]["sha256"]


# --- the checks themselves: golden entries with transformers' numbers for a random checkpoint


def test_every_entry_has_a_meaning_and_a_tolerance():
    assert len(GOLDEN["entries"]) == 32
    for entry in GOLDEN["entries"]:
        assert 1e-4 <= tolerance(entry) <= 1e-2
    runnable = {entry["id"] for entry in GOLDEN["entries"] if unsupported(entry) is None}
    assert len(runnable) == 31
    assert {"card_gte_large_en_x100", "hf_gte_multilingual_mlm", "card_gte_multilingual_reranker"} <= runnable
    assert {"tei_modernbert_mean_single", "card_gte_modernbert_x100", "card_gte_reranker_modernbert"} <= runnable


def entries_of(model: str) -> list[dict[str, Any]]:
    return [entry for entry in GOLDEN["entries"] if entry["model"] == model]


def transformers_values(entry: dict[str, Any], folder: Path, reference: Any) -> Any:
    """The entry's values for this checkpoint, from transformers: each text alone, as if nothing were ever batched."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    hidden, logits = [], []
    for text in entry["inputs"]:
        inputs = tokenizer(*(text if isinstance(text, list) else [text]), return_tensors="pt")
        with torch.inference_mode():
            output = reference(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True)
        hidden.append(output.hidden_states[-1][0])  # in this version after final_norm
        logits.append(output.logits[0] if "logits" in output else None)
    kind = entry["kind"]
    if kind == "embedding":
        return torch.stack([x[0] if entry["pooling"] == "cls" else x.mean(0) for x in hidden]).tolist()
    if kind == "last_hidden_state (per token)":
        return hidden[0].tolist()
    first = {"[:, :3, :3]": 0, "[:, 1:4, 1:4]": 1}.get(kind[kind.find("[") :])
    if first is not None:
        part = slice(first, first + 3)
        return [x[part, part].tolist() for x in (logits if kind.startswith("mlm") else hidden)]
    if kind == "top-5 tokens at position 6":
        return [tokenizer.decode([i]).strip() for i in logits[0][6].topk(5).indices.tolist()]
    if kind == "pair logits":
        return [x.item() for x in logits]
    if kind.endswith("cosine(first, each of the rest)"):
        vectors = torch.nn.functional.normalize(torch.stack([x[0] for x in hidden]), dim=-1)
        return ((100 if kind.startswith("100") else 1) * vectors[1:] @ vectors[0]).tolist()
    return torch.stack(logits).tolist()


def gte_checkpoint(folder: Path, architecture: str, labels: dict[str, int]) -> tuple[Path, Any]:
    """As conftest's make_checkpoint: transformers' own class, with ModernBERT's tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.GteConfig(vocab_size=50368, pad_token_id=50283, initializer_range=0.1, **sizes, **labels)
    model = getattr(transformers, architecture)(config).eval()
    model.save_pretrained(folder)
    for path in (DATA / "modernbert-tokenizer").iterdir():
        if path.name != "config.json":
            shutil.copy(path, folder)
    return folder, model


def moved(values: Any, by: float) -> Any:
    """The values, all of them a little off (or in another order, where they are tokens)."""
    if isinstance(values[0], str):
        return values[::-1]
    return (np.array(values) + by).tolist()


@pytest.mark.parametrize(
    ("model", "architecture"),
    [
        ("answerdotai/ModernBERT-base", "ModernBertForMaskedLM"),
        ("Alibaba-NLP/gte-modernbert-base", "ModernBertModel"),
        ("Alibaba-NLP/gte-reranker-modernbert-base", "ModernBertForSequenceClassification"),
        ("tomaarsen/reranker-ModernBERT-large-gooaq-bce", "ModernBertForSequenceClassification"),
        ("hf-internal-testing/tiny-random-ModernBertForTokenClassification", "ModernBertForTokenClassification"),
        ("hf-internal-testing/tiny-random-ModernBertForSequenceClassification", "ModernBertForSequenceClassification"),
        ("Alibaba-NLP/gte-base-en-v1.5", "GteModel"),
        ("Alibaba-NLP/gte-large-en-v1.5", "GteModel"),
        ("Alibaba-NLP/gte-multilingual-base", "GteModel"),
        ("Snowflake/snowflake-arctic-embed-m-v2.0", "GteModel"),
        ("Alibaba-NLP/gte-multilingual-mlm-base", "GteForMaskedLM"),
        ("Alibaba-NLP/gte-multilingual-reranker-base", "GteForSequenceClassification"),
        ("alibaba-nlp-community/gte-multilingual-base (= Alibaba-NLP/gte-multilingual-base weights)", "GteModel"),
    ],
)
def test_the_checks_pass_transformers_numbers_and_no_others(make_checkpoint, tmp_path, model, architecture):
    labels = {"num_labels": 1} if "reranker" in model else {}
    if architecture.startswith("Gte"):
        folder, reference = gte_checkpoint(tmp_path / "gte", architecture, labels)
    else:
        folder, reference = make_checkpoint(
            architecture, whole_tokenizer=True, **labels, **({"classifier_pooling": "mean"} if labels else {})
        )
    if any("cosine" in entry["kind"] for entry in entries_of(model)):
        kinds = {"Transformer": "", "Pooling": "1_Pooling"}
        modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert entries_of(model)
    for published in entries_of(model):
        values = transformers_values(published, folder, reference)
        assert np.shape(values)[:-1] == np.shape(published["values"])[:-1]
        entry = {**published, "values": values}
        if "sigmoid" in entry:
            entry["sigmoid"] = torch.tensor(values).sigmoid().tolist()
        check(entry, folder)
        with pytest.raises(AssertionError):
            check({**entry, "values": moved(values, 3 * tolerance(entry))}, folder)
        if "sigmoid" in entry:
            with pytest.raises(AssertionError):
                check({**entry, "sigmoid": moved(entry["sigmoid"], 3 * tolerance(entry))}, folder)


@pytest.mark.parametrize("layout", ["answerdotai/ModernBERT-base", "ModernBERT-base"])
def test_weights_are_found_in_the_named_folder(make_checkpoint, monkeypatch, tmp_path, layout):
    folder, _ = make_checkpoint("ModernBertForMaskedLM")
    there = tmp_path / "models" / layout
    there.parent.mkdir(parents=True)
    folder.rename(there)
    monkeypatch.setenv(MODELS, str(tmp_path / "models"))
    assert find_model("answerdotai/ModernBERT-base") == there
    assert isinstance(ml.load_model(find_model("answerdotai/ModernBERT-base")), MaskedLM)
    assert find_model("nobody/has-this-one") is None
    assert find_model("nobody/has-this-one (= answerdotai/ModernBERT-base weights)") == there


def test_without_weights_the_reason_says_how_to_provide_them(monkeypatch, tmp_path):
    monkeypatch.setenv(MODELS, str(tmp_path))
    entry = {**entries_of("answerdotai/ModernBERT-base")[0], "model": "nobody/has-this-one"}
    with pytest.raises(pytest.skip.Exception, match=r"hf download nobody/has-this-one.*MODERNBERT_LITE_TEST_MODELS"):
        test_a_real_checkpoint_gives_its_published_numbers(entry)
    choices = next(entry for entry in GOLDEN["entries"] if "MultipleChoice" in entry["model"])
    with pytest.raises(pytest.skip.Exception, match="multiple choice is not an architecture of this package"):
        test_a_real_checkpoint_gives_its_published_numbers(choices)
