"""Keywords of other libraries. The error names what they are called here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ..reading import shown

Result = TypeVar("Result")
Args = ParamSpec("Args")

# What users of other libraries try.
_HINTS = {
    "trust_remote_code": "leave it out, no code of a repository is ever run",
    "torch_dtype": "it is dtype here",
    "model_kwargs": "dtype and device are options of their own here",
    "cache_folder": "set HF_HUB_CACHE, or give a folder",
    "max_length": "it is max_seq_length here",
    "document_length": "it is max_seq_length here",
    "batch_size": "batch size is counted in tokens here: batch_tokens",
}
# The same for what is called after loading.
_CALL_HINTS = {
    "batch_size": "batch size is counted in tokens here: batch_tokens, of from_pretrained or of the model",
    "convert_to_tensor": "results are numpy arrays here: torch.from_numpy makes a tensor of one",
    "convert_to_numpy": "leave it out, results are numpy arrays here",
    "device": "it is an option of from_pretrained here",
    "max_length": "set max_seq_length, of from_pretrained or of the model",
    "max_seq_length": "set it on the model, or give it to from_pretrained",
    "truncation": "texts over max_seq_length are cut; on_long='error' of from_pretrained refuses them",
    "padding": "leave it out, nothing is padded here",
    "normalize": "it is normalize_embeddings here",
    "dimensions": "it is truncate_dim here",
    "activation_fct": "it is activation_fn here",
    "instruction": "it is prompt here",
    "is_query": "queries and documents have methods of their own here: encode_queries, encode_documents",
    **dict.fromkeys(
        ("pool", "chunk_size", "num_workers"), "one process computes here; open the model in each of several"
    ),
}


def refuse_attribute(owner: Any, name: str) -> None:
    """Raises AttributeError for a setting that has another name here, or is fixed after loading."""
    if name in ("max_length", "document_length", "batch_size", "dtype") and not hasattr(type(owner), name):
        hint = _HINTS.get(name, "it is an option of from_pretrained")
        raise AttributeError(f"{type(owner).__name__} has no {name}: {hint}")
    if name == "dimension" and hasattr(owner, name):
        raise AttributeError("dimension is the checkpoint's, and can't be set: truncate_dim gives fewer numbers")


def keyworded(method: Callable[Args, Result]) -> Callable[Args, Result]:
    """Makes a method answer another library's keyword with its name here. Raises TypeError for such a keyword."""
    known, loads = inspect.signature(method).parameters, method.__name__ == "from_pretrained"

    @functools.wraps(method)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        for name in kwargs:
            if name not in known:
                owner: Any = args[0]
                where = owner.__name__ if loads else type(owner).__name__
                raise _unknown(f"{where}.{method.__name__}", name, _HINTS if loads else _CALL_HINTS)
        return method(*args, **kwargs)

    return call


def _unknown(where: str, name: str, hints: dict[str, str]) -> TypeError:
    return TypeError(f"{where} has no option {shown(name)}" + (f": {hints[name]}" if name in hints else ""))
