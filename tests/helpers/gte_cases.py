"""Shared by tests/models: test_gte, test_gte_files, test_gte_alone, test_gte_refusals, test_gte_classes."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from modernbert_lite.models.gte import Gte, GteMaskedLM, GteSequenceClassifier, GteTokenClassifier

VOCAB = 997


LENGTHS = [65, 1, 130, 66, 66, 2, 31]


BASE, MASKED_LM = "GteModel", "GteForMaskedLM"


SEQUENCE, TOKEN = "GteForSequenceClassification", "GteForTokenClassification"


CLASSES = {BASE: Gte, MASKED_LM: GteMaskedLM, SEQUENCE: GteSequenceClassifier, TOKEN: GteTokenClassifier}


# Nothing is square by accident; wide weights, so that attention is sharp and a mistake shows.
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 72,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "num_labels": 3,
}


MADE = {}


@pytest.fixture
def make(tmp_path, tmp_path_factory):
    """make(GteForMaskedLM, hidden_size=...) -> (folder, transformers' model saved in it), fixed random weights. The
    model is shared between tests. name: of the folder, for more than one in a test."""

    def make(architecture=BASE, *, name="checkpoint", **config):
        key = json.dumps([architecture, config], sort_keys=True)
        if key not in MADE:
            torch.manual_seed(0)
            model = getattr(transformers, architecture)(transformers.GteConfig(**{**SMALL, **config})).eval()
            generator = torch.Generator().manual_seed(0)
            for part, parameter in model.named_parameters():
                if "norm" in part.lower() or part.endswith("bias"):  # away from 1 and 0: one left out shows
                    parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            folder = tmp_path_factory.mktemp("made")
            model.save_pretrained(folder)
            MADE[key] = model.requires_grad_(False), config_of(folder), load_file(folder / "model.safetensors")
        model, raw, state = MADE[key]
        return write(tmp_path / name, raw, state), model

    return make


def write(folder, raw, *states):
    """A folder with a config and tensors, in as many files as there are states."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    states = [{name: tensor.clone() for name, tensor in state.items()} for state in states]  # none shares memory
    if len(states) == 1:
        save_file(states[0], folder / "model.safetensors")
        return folder
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {}
    for i, state in enumerate(states, 1):
        name = f"model-{i:05}-of-{len(states):05}.safetensors"
        save_file(state, folder / name)
        weight_map.update(dict.fromkeys(state, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def state_of(folder):
    return load_file(folder / "model.safetensors")


def as_new(folder, theta, scaling=None, **keys):
    """The config in Alibaba's own dialect, with the tensors as they are."""
    raw = config_of(folder)
    raw.pop("rope_parameters", None)
    names = [name.replace("Gte", "New") for name in raw["architectures"]]
    new = {"model_type": "new", "architectures": names, "rope_theta": theta, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps({**raw, **new, **keys}))
    return folder


def ntk(theta, factor, head_dim):
    """NTK as transformers' class has it."""
    return {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / head_dim)}


def sequences(lengths=LENGTHS, seed=5, high=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(min(1, high - 1), high, (length,), generator=generator) for length in lengths]


def types_of(rows, types=2):
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(0, types, (len(row),), generator=generator) for row in rows]


def padded(rows):
    """(B, S), 0 where padded on the right, and the mask."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


def expected_of(reference, rows, types=None):
    """transformers' result of a padded batch: hidden states or logits of the real tokens, or (B, labels)."""
    ids, mask = padded(rows)
    token_type_ids = None if types is None else padded(types)[0]
    with torch.inference_mode():
        out = reference(input_ids=ids, attention_mask=mask, token_type_ids=token_type_ids)
    values = out.last_hidden_state if type(reference).__name__ == BASE else out.logits
    return values if type(reference).__name__ == SEQUENCE else values[mask.bool()]


def difference(a, b):
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


def assert_equal(got, expected):
    # 2e-5 on values of order 1-10; logits are sums of a whole row of such values, and rounding grows with them: only
    # beyond 10 is the bound relative to the largest.
    largest = expected.abs().max().item()
    assert largest > 0.1
    assert difference(got, expected) <= (2e-5 if largest <= 10 else 2e-5 * largest)


# --- equal to transformers


def split(state):
    """Packed projections in their parts."""
    parts = {}
    for name, tensor in state.items():
        if ".qkv_proj." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                parts[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif ".up_gate_proj." in name:
            up, gate = tensor.chunk(2)
            parts[name.replace("up_gate_proj", "up_proj")] = up
            parts[name.replace("up_gate_proj", "gate_proj")] = gate
        else:
            parts[name] = tensor
    return parts


NATIVE = (
    ("encoder.layer.", "layers."),
    (".attention.", ".self_attn."),
    ("attn_ln", "post_attention_layernorm"),
    ("mlp_ln", "post_mlp_layernorm"),
    ("lm_head.norm", "lm_head.layer_norm"),
)


def native(state):
    """The names of the modules of transformers' class."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in NATIVE:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def prefixed(state, prefix, head=""):
    """From any prefix to this one; head: that of what stands on the encoder."""
    bare = {name.removeprefix("gte."): tensor for name, tensor in state.items()}
    return {(head if name.startswith(HEADS) else prefix) + name: tensor for name, tensor in bare.items()}


HEADS = ("lm_head.", "classifier.")


FORMS = {"packed": lambda state: state, "split": split, "native": lambda state: native(split(state))}


def plain(raw, weights, ids, types=None):
    """The encoder, one sequence, in float64: (S,) ids -> (S, C). weights: float64, packed, without a prefix."""
    C, heads, eps = raw["hidden_size"], raw["num_attention_heads"], raw.get("layer_norm_eps", 1e-12)
    S, D = len(ids), C // heads

    def linear(x, name):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(x, name):
        if raw.get("layer_norm_type") == "rms_norm":
            return weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def inverse_frequencies():
        theta, scaling = raw.get("rope_theta", 10000.0), raw.get("rope_scaling") or {}
        j = torch.arange(D // 2, dtype=torch.float64)
        if not scaling:
            return theta ** (-2 * j / D)
        factor = scaling["factor"]
        return (theta * factor) ** (-2 * j / D) / factor ** (2 / D)

    x = weights["embeddings.word_embeddings.weight"][ids]
    if raw.get("type_vocab_size", 1):
        x = x + weights["embeddings.token_type_embeddings.weight"][0 if types is None else types]
    absolute = raw.get("position_embedding_type") == "absolute"
    if absolute:
        x = x + weights["embeddings.position_embeddings.weight"][:S]
    x = F.layer_norm(x, (C,), weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"], eps)
    angles = torch.arange(S, dtype=torch.float64)[:, None] * inverse_frequencies()
    turn = torch.polar(torch.ones_like(angles), angles)
    act = {"gelu": F.gelu, "silu": F.silu}[raw["hidden_act"]]

    for i in range(raw["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = linear(x, f"{layer}.attention.qkv_proj").view(S, 3, heads, D).permute(1, 2, 0, 3)  # (H, S, D) each
        if not absolute:  # pair j is (j, j + D / 2), a complex number
            q, k = (torch.complex(y[..., : D // 2], y[..., D // 2 :]) * turn for y in (q, k))
            q, k = (torch.cat([y.real, y.imag], -1) for y in (q, k))
        weight = (q @ k.mT / math.sqrt(D)).softmax(-1)
        seen = (weight @ v).transpose(0, 1).reshape(S, C)
        x = norm(x + linear(seen, f"{layer}.attention.o_proj"), f"{layer}.attn_ln")
        up, gate = linear(x, f"{layer}.mlp.up_gate_proj").chunk(2, -1)
        x = norm(x + linear(act(gate) * up, f"{layer}.mlp.down_proj"), f"{layer}.mlp_ln")
    return x


def vary(folder, variant, **keys):
    """The same weights in a variant that only Alibaba's code has."""
    state, raw = state_of(folder), {}
    if variant == "rms_norm":
        raw = {"layer_norm_type": "rms_norm"}
        state = {name: tensor for name, tensor in state.items() if not name.endswith("_ln.bias")}
    elif variant == "absolute":
        raw = {"position_embedding_type": "absolute", "max_position_embeddings": 200}
        generator = torch.Generator().manual_seed(4)
        width = config_of(folder)["hidden_size"]
        state["embeddings.position_embeddings.weight"] = torch.randn(200, width, generator=generator) * 0.1
    write(folder, config_of(folder), state)
    return as_new(folder, 20000, **{**raw, **keys})
