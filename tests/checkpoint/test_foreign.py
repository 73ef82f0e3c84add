"""What lies beside the weights or in their place: adapters, pickles, other formats. The errors name it and help."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import modernbert_lite as ml
from modernbert_lite import CheckpointError, Embedder, FillMask, LateInteraction, Reranker

FEW = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 48}
OPENERS = [ml.load_model, *(c.from_pretrained for c in (Embedder, Reranker, FillMask, LateInteraction))]


IDENTITY = "torch.nn.modules.linear.Identity"


@pytest.fixture
def folder(make_checkpoint):
    """A small sound embedding model, as sentence-transformers saves it."""
    made, _ = make_checkpoint(**FEW)
    (made / "modules.json").write_text('[{"path": "", "type": "sentence_transformers.models.Transformer"}]')
    add_module(made, "1_Pooling", word_embedding_dimension=32, pooling_mode_cls_token=True)
    return made


def add_module(folder, path, **config):
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"path": path, "type": f"sentence_transformers.models.{path.partition('_')[2]}"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / path).mkdir()
    (folder / path / "config.json").write_text(json.dumps(config))


def command(error):
    return re.search(r'python -c "(.*?)"', str(error.value)).group(1)


def assert_short(error):
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 2_000


# --- adapters


def adapted(peft, model, folder, **settings):
    """Trains nothing, but an adapter that changes much, saved in the folder. Returns the merged model's tensors."""
    torch.manual_seed(1)
    wanted = {"r": 4, "lora_alpha": 32, "target_modules": ["Wqkv", "Wo"], "init_lora_weights": False}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**wanted, **settings)).eval()
    tuned.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in tuned.merge_and_unload().state_dict().items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("ModernBertModel", None),
        ("ModernBertModel", "FEATURE_EXTRACTION"),
        ("ModernBertForMaskedLM", None),
        ("ModernBertForSequenceClassification", "SEQ_CLS"),
    ],
)
def test_an_adapter_beside_its_base_is_refused_with_the_line_that_merges_it(
    make_checkpoint, monkeypatch, architecture, task
):
    peft = pytest.importorskip("peft")
    folder, _ = make_checkpoint(architecture, vocab_size=331, pad_token_id=3, **FEW)
    plain = ml.load_model(folder).state_dict()
    base = getattr(transformers, architecture).from_pretrained(folder)
    merged = adapted(peft, base, folder, **({"task_type": task} if task else {}))
    for opens in OPENERS:
        with pytest.raises(CheckpointError, match=r"holds a PEFT adapter \(adapter_config\.json\)") as error:
            opens(folder)
    assert_short(error)
    monkeypatch.chdir(folder)
    exec(command(error), {})
    got = ml.load_model(folder).state_dict()
    assert any(not torch.equal(got[name], plain[name]) for name in got)
    for name, tensor in got.items():
        assert torch.allclose(tensor, merged[name], atol=1e-6), name


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_an_adapter_alone_names_its_base_and_the_line_that_merges_them(make_checkpoint, monkeypatch):
    peft = pytest.importorskip("peft")
    base, _ = make_checkpoint(vocab_size=331, pad_token_id=3, name="base", **FEW)
    folder = base.parent / "adapter only"
    merged = adapted(peft, transformers.AutoModel.from_pretrained(base), folder)
    assert not (folder / "config.json").exists()
    for opens in OPENERS:
        with pytest.raises(CheckpointError, match=r"no weights of a whole model") as error:
            opens(folder)
    assert f"for {str(base)!r}" in str(error.value)
    monkeypatch.chdir(folder)
    exec(command(error), {})
    got = ml.load_model(folder).state_dict()
    assert all(torch.allclose(tensor, merged[name], atol=1e-6) for name, tensor in got.items())


@pytest.mark.parametrize("where", ["", "0_Transformer"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_s_file_is_seen_in_every_layout(folder, name, where):
    if where:
        (folder / where).mkdir()
        for path in [p for p in folder.iterdir() if p.is_file() and p.name != "modules.json"]:
            path.rename(folder / where / path.name)
        modules = (folder / "modules.json").read_text()
        (folder / "modules.json").write_text(modules.replace('"path": ""', f'"path": "{where}"'))
    Embedder.from_pretrained(folder)
    for place in {folder, folder / where}:
        (place / name).write_text("{}")
        for opens in (ml.load_model, Embedder.from_pretrained):
            with pytest.raises(CheckpointError, match=f"holds a PEFT adapter \\({name}\\)"):
                opens(folder)
        (place / name).unlink()


@pytest.mark.parametrize(
    "settings",
    [
        {"base_model_name_or_path": "x'); import os; print('"},
        {"base_model_name_or_path": "a\n\x1b[31m" + "b" * 5_000},
        {"base_model_name_or_path": ["x"]},
        {"auto_mapping": {"base_model_class": "os.system"}, "task_type": {}},
        {"auto_mapping": "x', os.system('"},
    ],
)
def test_the_line_that_merges_holds_nothing_that_a_file_has_made_up(tmp_path, settings):
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError) as error:
        ml.load_model(tmp_path)
    assert_short(error)
    assert "AutoModel.from_pretrained('BASE')" in command(error)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_malformed_adapter_config_is_an_error_that_names_it(folder, content):
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        Embedder.from_pretrained(folder)


def test_an_adapter_of_a_folder_below_is_not_this_model_s(folder):
    """As transformers has it: a training run leaves its checkpoints there."""
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "adapter_config.json").write_text("{}")
    Embedder.from_pretrained(folder)


# --- other weights

OTHERS = (
    "onnx/model.onnx model.onnx model-q8_0.gguf model.fp16.safetensors pytorch_model.safetensors tf_model.h5 "
    "openvino/openvino_model.xml flax_model.msgpack model.tflite consolidated.safetensors weights.npz rust_model.ot "
    "checkpoint-500/model.safetensors model-00001-of-00002.safetensors diffusion_pytorch_model.safetensors"
)


@pytest.mark.parametrize("name", OTHERS.split(" "))
def test_other_weights_are_named_and_nothing_is_told_to_be_converted(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"no model.safetensors in .*: it has only {re.escape(name)}; ") as error:
        ml.load_model(folder)
    assert ("give it that name" in str(error.value)) == name.endswith(".safetensors")
    for word in ("Convert", "pickle", "pytorch_model.bin"):
        assert word not in str(error.value)


def test_a_folder_without_any_weights_says_so(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="it has no weights at all; was the checkpoint copied"):
        ml.load_model(folder)


def test_pickles_of_a_training_run_are_named_and_no_weights(folder):
    (folder / "model.safetensors").unlink()
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"\x80\x04")
    with pytest.raises(
        CheckpointError, match=r"only optimizer\.pt, rng_state\.pth, training_args\.bin; only safe"
    ) as e:
        ml.load_model(folder)
    assert "Convert" not in str(e.value)


def test_thousands_of_other_files_are_one_short_line(folder):
    (folder / "model.safetensors").unlink()
    for i in range(1_000):
        (folder / f"{i}\n\x1b[31m{'x' * 200}.bin").touch()
    with pytest.raises(CheckpointError, match=r"and 992 more; .*glob\.glob\('FILE'\)") as error:
        ml.load_model(folder)
    assert_short(error)


@pytest.mark.parametrize("kind", ["shards", "lightning", "Dense"])
def test_the_conversion_works_for_each_kind_of_pickle(folder, monkeypatch, kind):
    if kind == "Dense":
        add_module(folder, "2_Dense", in_features=32, out_features=3, bias=False, activation_function=IDENTITY)
        save_file({"linear.weight": torch.randn(3, 32)}, folder / "2_Dense" / "model.safetensors")
    expected = Embedder.from_pretrained(folder).encode("a guitar")
    place = folder / "2_Dense" if kind == "Dense" else folder
    tensors = {name: tensor.clone() for name, tensor in load_file(place / "model.safetensors").items()}
    (place / "model.safetensors").unlink()
    if kind == "shards":
        for i in range(2):
            part = {name: tensor for j, (name, tensor) in enumerate(tensors.items()) if j % 2 == i}
            torch.save(part, place / f"pytorch_model-0000{i + 1}-of-00002.bin")
    elif kind == "lightning":
        torch.save({"state_dict": tensors, "epoch": 3}, place / "last.ckpt")
    else:
        torch.save(tensors, place / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        Embedder.from_pretrained(folder)
    monkeypatch.chdir(place)
    exec(command(error), {})
    assert (Embedder.from_pretrained(folder).encode("a guitar") == expected).all()


# --- names and paths in messages

NASTY = "new\nline \x1b[31mred\u202e" + "\udcff" * (os.name == "posix")


@pytest.fixture
def nasty(folder):
    """In a folder of a name that no message may repeat as it is."""
    return folder.rename(folder.with_name(NASTY))


SPOILS = {
    "config.json": lambda f: (f / "config.json").unlink(),
    "config": lambda f: (f / "config.json").write_text("{"),
    "weights": lambda f: (f / "model.safetensors").write_bytes(b"x"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "modules": lambda f: (f / "modules.json").write_text(
        json.dumps([{"type": "\n\x1b[31m\ud800.Transformer", "path": "\n"}])
    ),
    "tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer settings": lambda f: (f / "tokenizer_config.json").write_text('{"truncation_side": "\\n\\ud800"}'),
    "adapter": lambda f: (f / "adapter_config.json").write_text("{}"),
    "link": lambda f: (
        (f / "special_tokens_map.json").unlink() or (f / "special_tokens_map.json").symlink_to("\n\x1b[0m" + "x" * 200)
    ),
    "architecture": lambda f: edit(f, architectures=["\n" * 5_000]),
    "many": lambda f: edit(f, architectures=["x" * 3_000] * 100),
    "layer types": lambda f: edit(f, layer_types=["\x1b" * 50] * 2),
    "type": lambda f: edit(f, model_type="\ud800\n" * 900),
    "number": lambda f: edit(f, hidden_size="\x7f\n" * 900),
    "rope": lambda f: edit(f, rope_scaling={"rope_type": "\n" * 900}, rope_parameters=None),
}


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("spoil", SPOILS)
def test_every_message_is_one_short_printable_line(nasty, spoil):
    SPOILS[spoil](nasty)
    with pytest.raises(CheckpointError) as error:
        Embedder.from_pretrained(nasty)
    assert_short(error)
    str(error.value).encode()  # no half of a surrogate pair


def test_a_folder_of_any_name_opens(folder):
    """Of any that is UTF-8: safetensors opens no other."""
    odd = folder.rename(folder.with_name(NASTY.removesuffix("\udcff")))
    assert Embedder.from_pretrained(odd).encode("a guitar").shape == (32,)


@pytest.mark.parametrize("name", ["~nosuchuser-x/model", "a" * 5_000, "\0", "a\nb/c", "\ud800/x", "x/" + "y" * 500])
def test_a_name_that_can_be_no_model_s_is_a_short_line(name):
    with pytest.raises(CheckpointError) as error:
        ml.load_model(name)
    assert_short(error)
    str(error.value).encode()
