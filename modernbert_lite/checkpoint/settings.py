"""sentence_bert_config.json: what sentence-transformers' Transformer module says about the network and its tokenizer.

Each key is honoured, or changes nothing (the lists below say which), or is refused by name. sentence-transformers
itself opens no file with a key that it doesn't know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..reading import CheckpointError, Reader, shown
from .folder import Folder

# sentence-transformers' order; the first that is there and not empty is read.
NAMES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_LONGEST = (1 << 31) - 1
_LATE = ("query_length", "document_length", "query_expansion")
_KEYS = {
    *("max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"),
    *("processing_kwargs", "model_kwargs", "processor_kwargs", "config_kwargs", "tokenizer_name_or_path"),
    *_LATE,
    *("unpad_inputs", "backend", "cache_dir"),  # change nothing: how the same numbers are computed and found
}
_OLDER = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs", "config_args": "config_kwargs"}
# What a task's network puts out, and the name that this has for the modules after it.
_TASKS = {
    "feature-extraction": ("last_hidden_state", "token_embeddings"),
    "sequence-classification": ("logits", "scores"),
    "fill-mask": ("logits", "token logits"),  # "token_embeddings" there, which dense encoders' modules can't use
}
# Keys that change no vector, each in its place. Of loading (where from, how, in which dtype: that is an option here) ..
_LOADING = {
    *("cache_dir", "token", "use_auth_token", "revision", "code_revision", "local_files_only", "trust_remote_code"),
    *("subfolder", "force_download", "resume_download", "proxies", "dtype", "torch_dtype", "attn_implementation"),
    *("device_map", "low_cpu_mem_usage", "use_safetensors", "max_memory", "offload_folder", "offload_state_dict"),
}
# .. of the config, where nothing is trained and the backend is our own ..
_IDLE = {
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "unpad_inputs", "reference_compile"),
    *("use_memory_efficient_attention", "deterministic_flash_attn", "initializer_range", "name_or_path"),
    *("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout", "hidden_dropout_prob"),
    *("attention_probs_dropout_prob", "gradient_checkpointing"),
}
# .. of the tokenizer's files, where nothing is decoded or padded ..
_TOKENIZER_IDLE = {
    *("use_fast", "padding", "pad_to_multiple_of", "clean_up_tokenization_spaces", "verbose"),
    *("chat_template", "name_or_path", "legacy", "max_length", "truncation"),
}
# .. and of a call of it.
_CALL_IDLE = {"padding", "padding_side", "pad_to_multiple_of", "return_tensors", "verbose", "logits_to_keep"}
# transformers sets these on the parsed config, where they count as in the file itself. Of others one may be read
# before that (`num_hidden_layers`, by the layers' types), so that neither the old nor the new value is right.
_CONFIG = {
    *("local_attention", "norm_eps", "layer_norm_eps", "hidden_activation", "hidden_act"),
    *("classifier_pooling", "classifier_activation"),
}
_TOKENIZER = {
    *("truncation_side", "padding_side", "model_input_names", "do_lower_case", "strip_accents"),
    *("tokenize_chinese_chars", "split_special_tokens", "add_prefix_space", "add_bos_token", "add_eos_token"),
    *("additional_special_tokens", "extra_special_tokens"),
    *(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
}


@dataclass(frozen=True)
class Settings:
    max_seq_length: int | None = None
    lower_case: bool = False
    output: str = "token_embeddings"  # what the modules after the network know its output as
    tokenizer: Mapping[str, Any] = field(default_factory=dict)  # win over tokenizer_config.json
    config: Mapping[str, Any] = field(default_factory=dict)  # win over config.json
    late: Mapping[str, Any] = field(default_factory=dict)  # lengths and expansion, of late interaction only


def read_settings(folder: Folder, late: bool) -> Settings:
    """late: whether the model is a late-interaction model. Raises CheckpointError for a key or a value that can't be
    honoured, naming it and the file."""
    path, raw = own_settings(folder)
    try:
        return _read(raw, late)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def own_settings(folder: Folder) -> tuple[Path, dict[str, Any]]:
    """The file's path and content, beside the network. The content is empty if there is no such file."""
    for path in (folder.network / name for name in NAMES):
        raw = folder.optional_json(path)
        if raw:
            return path, raw
    return folder.network / NAMES[0], {}


def _read(raw: dict[str, Any], late: bool) -> Settings:
    raw = {**raw, **{new: raw[old] for old, new in _OLDER.items() if old in raw}}
    unknown = raw.keys() - _KEYS - _OLDER.keys()
    if unknown:
        raise CheckpointError(f"{shown(sorted(unknown))} is not known; known: {', '.join(sorted(_KEYS))}")
    if raw.get("tokenizer_name_or_path") is not None:
        other = shown(raw["tokenizer_name_or_path"])
        raise CheckpointError(
            f"tokenizer_name_or_path is {other}; it must be null: the tokenizer lies beside the network"
        )
    if not late and any(raw.get(key) is not None for key in _LATE):
        raise CheckpointError(f"{', '.join(_LATE)} are supported in late-interaction models only; they must be null")
    get = Reader(raw)
    _all_idle("model_kwargs", get.mapping("model_kwargs"), _LOADING | _IDLE | {"add_pooling_layer"})
    config = _honoured("config_kwargs", get.mapping("config_kwargs"), _CONFIG, _LOADING | _IDLE)
    given = get.mapping("processor_kwargs")
    if "local_attention" in config:
        config["sliding_window"] = None  # the file's own, which means the same, doesn't win
    tokenizer = _honoured("processor_kwargs", given, _TOKENIZER | {"model_max_length"}, _LOADING | _TOKENIZER_IDLE)
    length = _whole("max_seq_length", raw.get("max_seq_length"))
    if "model_max_length" in tokenizer:
        length = _whole("model_max_length", tokenizer.pop("model_max_length"), huge=True)
    called = _call(get.mapping("processing_kwargs"))
    if called is not None and late:
        raise CheckpointError("processing_kwargs has a max_length; late-interaction models have lengths of their own")
    return Settings(
        max_seq_length=length if called is None else called,
        lower_case=bool(raw.get("do_lower_case")),
        output=_output(get),
        tokenizer=tokenizer,
        config=config,
        late={key: raw[key] for key in _LATE if key in raw},
    )


def _all_idle(name: str, given: Mapping[str, Any], idle: set[str]) -> None:
    _honoured(name, given, set(), idle)


def _honoured(name: str, given: Mapping[str, Any], honoured: set[str], idle: set[str]) -> dict[str, Any]:
    """The keys of a mapping that count. Raises CheckpointError for keys that would count, but are not supported."""
    other = given.keys() - honoured - idle
    if other:
        instead = f"; supported: {', '.join(sorted(honoured))}" if honoured else ""
        older = next(old for old, new in _OLDER.items() if new == name)
        raise CheckpointError(f"{name} ({older}) sets {shown(sorted(other))}, which is not supported{instead}")
    null = sorted(key for key in honoured if key in given and given[key] is None)
    if null:
        raise CheckpointError(f"{name} sets {shown(null)} to null; leave the key out for the usual value")
    return {key: value for key, value in given.items() if key in honoured}


def _whole(key: str, value: Any, huge: bool = False) -> int | None:
    """huge: also takes a number as large as 1e30, which transformers writes for "no limit"."""
    if huge and isinstance(value, float) and value >= 1:
        value = int(min(value, _LONGEST))
    if huge and type(value) is int:
        value = min(value, _LONGEST)
    if value is not None and (type(value) is not int or not 0 < value <= _LONGEST):
        raise CheckpointError(f"{key} is {shown(value)}; it must be null or from 1 to 2^31 - 1")
    return value


def _call(given: Mapping[str, Any]) -> int | None:
    """processing_kwargs, with which the tokenizer is called -> the most tokens, if they say so."""
    get = Reader(given)
    of_text = {**get.mapping("text"), **get.mapping("common")}
    if of_text.get("truncation", True) not in (True, "longest_first"):
        raise CheckpointError(
            f"processing_kwargs sets truncation to {shown(of_text['truncation'])}; it must be true or 'longest_first'"
        )
    other = of_text.keys() - _CALL_IDLE - {"max_length", "truncation"}
    if other:
        raise CheckpointError(f"processing_kwargs sets {shown(sorted(other))}, which is not supported; max_length is")
    return _whole("max_length of processing_kwargs", of_text.get("max_length"))


def _output(get: Reader) -> str:
    output, name = _TASKS[get.choice("transformer_task", "feature-extraction", tuple(_TASKS))]
    if "modality_config" not in get.raw:
        return name  # sentence-transformers then passes over module_output_name
    modalities = get.mapping("modality_config")
    text = Reader(modalities).mapping("text")
    if (
        "message" in modalities
        or text.get("method") != "forward"
        or text.get("method_output_name") not in (output, [output])
    ):
        raise CheckpointError(
            f"modality_config is {shown(dict(modalities))}; it must have texts, without a chat template, whose "
            f"method is 'forward' and whose method_output_name is {output!r}"
        )
    given = get.raw.get("module_output_name")
    if name == "token logits":
        return name
    if not isinstance(given, str):
        raise CheckpointError(f"module_output_name is {shown(given)}; beside modality_config it must be a string")
    return given
