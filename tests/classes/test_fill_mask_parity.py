"""FillMask beside transformers' logits and its pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import modernbert_lite as ml


def by_hand(reference, folder, text, top_k):
    """(ids, probabilities) of every [MASK], from transformers' tokenizer and logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        logits = reference(inputs["input_ids"], inputs["attention_mask"]).logits[0]
    masks = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
    best = logits[masks].softmax(-1).topk(top_k)
    return best.indices.tolist(), best.values.tolist(), tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_fill_mask_equals_transformers_logits(make_checkpoint, tied):
    folder, reference = make_checkpoint("ModernBertForMaskedLM", tie_word_embeddings=tied)
    fill = ml.FillMask.from_pretrained(folder)
    texts = [
        "The capital of France is [MASK].",
        "[MASK] and [MASK] went up the hill; [MASK][MASK] fell down.",
        "图书馆 [MASK] 🙂",
        "[MASK]",
        "The tide came in over the flats. " * 40 + "Nobody looked [MASK].",
    ]
    for top_k in (1, 5, 12):
        got = fill.predict(texts, top_k=top_k)
        assert [len(masks) for masks in got] == [1, 4, 1, 1, 1]
        for text, masks in zip(texts, got, strict=True):
            ids, probabilities, tokenizer = by_hand(reference, folder, text, top_k)
            assert [[p["token_id"] for p in mask] for mask in masks] == ids
            assert [[p["token"] for p in mask] for mask in masks] == [
                [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in row] for row in ids
            ]
            np.testing.assert_allclose([[p["score"] for p in mask] for mask in masks], probabilities, atol=2e-5)
    assert fill(texts[0]) == fill.predict(texts[:1])[0]


def test_fill_mask_equals_the_pipeline_of_transformers(make_checkpoint):
    folder, reference = make_checkpoint("ModernBertForMaskedLM")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.pipeline("fill-mask", model=reference, tokenizer=tokenizer, device="cpu", top_k=3)
    text = "She tuned the old [MASK] before the concert."
    got = ml.FillMask.from_pretrained(folder).predict(text, top_k=3)[0]
    expected = theirs(text)
    assert [p["token_id"] for p in got] == [p["token"] for p in expected]
    assert [p["score"] for p in got] == pytest.approx([p["score"] for p in expected], abs=2e-5)
