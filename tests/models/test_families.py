"""A family is a file and a row: this one is as long as it needs to be, and opens as any other."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modernbert_lite as ml

# ---- the file ------------------------------------------------------------------------------------------------------
from modernbert_lite.batch import check_batch
from modernbert_lite.models import registry
from modernbert_lite.models.fields import Config, Family, Names, check_type
from modernbert_lite.models.layers import LayerNorm, Network, attend, table
from modernbert_lite.ops.linear import Linear
from modernbert_lite.ops.rope import Rope, rotation
from modernbert_lite.reading import Reader


class Toy(Network):
    """One layer of attention, of which each token sees itself and those before it."""

    def __init__(self, config):
        super().__init__()
        C, self.config = config.hidden_size, config
        self.words = table(config.vocab_size, C)
        self.Wqkv, self.Wo = Linear(C, 3 * C, bias=False), Linear(C, C, bias=True)
        self.norm = LayerNorm(C, 1e-5, bias=True)

    def forward(self, batch, rows=None):
        check_batch(batch, self.config, rows)
        x = self.words(batch.input_ids)
        turn = rotation(Rope(10_000.0), self.config.head_dim, batch)
        x = self.Wo(attend(x, self.Wqkv, self.config.num_attention_heads, batch, turn, (-1, 0)), x)
        return self.norm(x if rows is None else x[rows])


@dataclass(frozen=True)
class ToyConfig(Config):
    MODEL_TYPES = ("toy",)
    num_hidden_layers: int = 1

    @classmethod
    def from_dict(cls, raw):
        check_type(raw, cls)
        get = Reader(raw)
        sizes = {"vocab_size": get.whole("vocab_size", 10), "hidden_size": get.whole("hidden_size", 8)}
        return cls(architecture="ToyModel", num_attention_heads=get.whole("num_attention_heads", 2), **sizes)

    def facts(self):
        return {"toy": "yes"}


FAMILY = Family(
    config=ToyConfig,
    architectures=("Toy",),
    encoder=Toy,
    heads={},
    names=Names(table="words.weight", prefixes=("",), parts=("words", "Wqkv", "Wo", "norm")),
)
# ---- its end -------------------------------------------------------------------------------------------------------


TYPES = "sentence_transformers.models"
POOLING = {"type": f"{TYPES}.Pooling", "path": "1_Pooling"}


@pytest.fixture
def folder(make_checkpoint, monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", [*registry.FAMILIES, FAMILY])
    folder, _ = make_checkpoint(num_hidden_layers=1)  # for its tokenizer
    raw = {"model_type": "toy", "vocab_size": 50368, "hidden_size": 32, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "modules.json").write_text(json.dumps([{"type": f"{TYPES}.Transformer", "path": ""}, POOLING]))
    (folder / POOLING["path"]).mkdir()
    (folder / POOLING["path"] / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    torch.manual_seed(0)
    state = {name: torch.randn_like(p) for name, p in Toy(ToyConfig.from_dict(raw)).named_parameters()}
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_new_family_embeds_and_no_other_file_changes(folder, dtype):
    model = ml.Embedder.from_pretrained(folder, device="cpu", dtype=dtype)
    texts = ["a river", "", "a green house on a hill"]
    vectors = model.encode(texts)
    assert vectors.shape == (3, 32)
    assert isinstance(model.config, ToyConfig)
    assert np.allclose(vectors, [model.encode(text) for text in texts], atol=1e-5)

    # The same by torch's own layers.
    state = {key: value.double() for key, value in ml.load_model(folder, packed=False).state_dict().items()}
    ids = model.tokenizer.encode(texts[:1])[0][0]
    x = state["words.weight"][ids]
    q, k, v = (x @ state["Wqkv.weight"].T).view(len(ids), 3, 4, 8).permute(1, 2, 0, 3)
    angle = torch.arange(len(ids))[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k = (torch.complex(*y.chunk(2, -1)) * turn for y in (q, k))
    q, k = (torch.cat([y.real, y.imag], -1) for y in (q, k))
    seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
    x = x + seen @ state["Wo.weight"].T + state["Wo.bias"]
    expected = nn.functional.layer_norm(x, (32,), state["norm.weight"], state["norm.bias"])[-1].numpy()
    assert np.abs(vectors[0] - expected).max() <= (2e-5 if dtype == "float32" else 0.2)


def test_what_is_known_of_a_family_is_told_by_its_file(folder):
    from modernbert_lite.cli.about import describe

    facts = describe(str(folder))
    assert facts["toy"] == "yes"
    assert facts["use"] == "Embedder"
    assert facts["layers"] == "1 (1 global)"
    (folder / "config.json").write_text(json.dumps({"model_type": "toys"}))
    with pytest.raises(ml.CheckpointError, match="'toys' is not supported; known: 'modernbert', 'new', 'gte', 'toy'"):
        ml.read_config(folder)


def test_a_file_of_a_family_is_short():
    text = Path(__file__).read_text(encoding="utf-8")
    assert len(text.partition("# ---- the file")[2].partition("# ---- its end")[0].splitlines()) < 60


def test_no_name_of_a_family_stands_outside_of_models():
    """But for the public names, and what messages say."""
    package = Path(ml.__file__).parent
    names = {"Gte", "GteConfig", "ModernBert", "ModernBertConfig", "gte", "modernbert"}
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] in ("models", "kernels", "__init__.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = {node.id} if isinstance(node, ast.Name) else set()
            named |= {node.attr} if isinstance(node, ast.Attribute) else set()
            named |= {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            assert not named & names, f"{path}:{node.lineno}"
