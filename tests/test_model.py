"""Hidden states against transformers, and packing."""

import pytest
import torch

import modernbert_lite as ml


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 66, 127, 128, 129, 130, 257])
def test_hidden_states_equal_transformers(make_checkpoint, length):
    folder, reference = make_checkpoint()
    ids = torch.randint(5, 50000, (1, length), generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        expected = reference(ids).last_hidden_state[0]
    got = ml.load_model(folder)(ml.pack([ids[0]]))
    assert (got - expected).abs().max() <= 2e-5
