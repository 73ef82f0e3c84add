"""Every known checkpoint's network on small random weights, beside transformers' and sentence-transformers'."""

from __future__ import annotations

import torch
from checkpoints_cases import VOCABULARY, base, difference, encoder, every_entry, is_gte, small, their_rows  # noqa: F401

import modernbert_lite as ml

LENGTHS = (1, 66, 200, 2, 129, 131)  # a local layer sees 64 tokens on either side


@every_entry
def test_small_random_weights_give_transformers_numbers(small, entry):
    folder, reference, raw = small(entry)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]
    types = None
    if is_gte(entry) and raw["type_vocab_size"] == 2:
        types = [torch.randint(0, 2, (n,), generator=generator).tolist() for n in LENGTHS]
    model = ml.load_model(folder)
    batch = ml.pack(rows) if types is None else ml.pack(rows, token_type_ids=types)

    output, mask = their_rows(base(reference), rows, types)
    expected = output.last_hidden_state[mask]
    assert 1 < expected.abs().max() < 20  # so that the bound means something
    bound = 2e-5 if expected.abs().max() <= 10 else 2e-6 * float(expected.abs().max())
    assert difference(encoder(model)(batch), expected) <= bound

    if encoder(model) is not model:
        output, _ = their_rows(reference, rows, types)
        logits = output.logits[mask] if "ForMaskedLM" in entry["architectures"][0] else output.logits
        assert logits.std() > 1e-3
        assert difference(model(batch), logits) <= 2e-5


# --- the class that it loads with
