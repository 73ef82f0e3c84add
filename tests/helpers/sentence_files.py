"""sentence-transformers' files, around a checkpoint."""

import json
from pathlib import Path
from typing import Any


def write_sentence_files(
    folder: Path,
    *,
    pooling: dict[str, Any] | None = None,
    normalize: bool = False,
    prompts: dict[str, str] | None = None,
    max_seq_length: int | None = 512,
    **texts: Any,
) -> Path:
    """sentence-transformers' files in their old form, around a checkpoint. pooling: of 1_Pooling/config.json."""
    st = "sentence_transformers.models."
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": st + "Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": st + "Pooling"},
    ]
    if normalize:
        modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": st + "Normalize"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    pooled = {"word_embedding_dimension": width, **(pooling or {"pooling_mode_cls_token": True})}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooled))
    if max_seq_length is not None:
        settings = {"max_seq_length": max_seq_length, "do_lower_case": False}
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    sentence = {"prompts": prompts or {}, "default_prompt_name": None, "similarity_fn_name": "cosine", **texts}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(sentence))
    return folder
