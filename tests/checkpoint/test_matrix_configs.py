"""Every checkpoint of data/checkpoints.json: its real config gives a network of the published size, and small random
weights with its settings, files and names give transformers' numbers, through the class that it loads with.

What a row's `unverified` names, and what it leaves out, was not read from the real files: a test shows that this
package is right about those settings, not that the repository has them.
"""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from checkpoints_cases import ENTRIES, encoder, every_entry, hub_config, is_gte, new_form, old_form, reference_config

import modernbert_lite as ml
from modernbert_lite.models.registry import network_class


def parameters(network) -> int:
    """One that is in two places counts once."""
    return sum(p.numel() for p in network.parameters())


@every_entry
def test_the_real_config_gives_a_network_of_the_published_size(entry):
    raw = hub_config(entry)
    config = (ml.GteConfig if is_gte(entry) else ml.ModernBertConfig).from_dict(raw)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        assert getattr(config, key) == raw.get(key, 50368)
    with torch.device("meta"):
        ours = network_class(config.architecture)(config)
        theirs = getattr(transformers, re.sub("^New", "Gte", entry["architectures"][0]))(reference_config(raw))
    # A decoder without a weight of its own in the file: loading ties it.
    tied = ours.get_parameter(ours.TIED[0]).numel() if "ForMaskedLM" in config.architecture else 0
    count = parameters(ours) - tied
    assert count == parameters(theirs)
    if "parameters" in entry:
        assert parameters(encoder(ours)) == entry["parameters"]
    if "parameters_with_head" in entry:
        assert count == entry["parameters_with_head"]


@pytest.mark.parametrize("entry", [e for e in ENTRIES if not is_gte(e)], ids=lambda entry: entry["id"])
def test_both_forms_of_a_config_are_read_alike(entry):
    raw = old_form(entry)
    config = ml.ModernBertConfig.from_dict(raw)
    assert config == ml.ModernBertConfig.from_dict(new_form(raw))
    scaled = "rope_scaling" in raw
    assert (config.full_rope.type, config.sliding_rope.type) == (("yarn",) * 2 if scaled else ("default",) * 2)
    assert (config.full_rope.theta, config.sliding_rope.theta) == (raw["global_rope_theta"], raw["local_rope_theta"])


# --- b. small random checkpoints
