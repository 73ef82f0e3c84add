"""What a type checker and an editor know of the public classes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modernbert_lite as ml

pytest.importorskip("mypy")
PROGRAM = """
import modernbert_lite as ml

embedder = ml.Embedder.from_pretrained("tiny", truncate_dim=64)
reveal_type(embedder.encode("a"))
reveal_type(embedder.encode(["a"], normalize_embeddings=True))
reveal_type(embedder.encode("a", output_value="token_embeddings"))
reveal_type(embedder.encode(["a"], output_value="token_embeddings"))
reveal_type(embedder.encode("a", output_value=None)["input_ids"])
reveal_type(embedder.encode_query("a", truncate_dim=8))
reveal_type(embedder.token_ids("a"))
reveal_type(embedder.token_ids(["a"]))
reveal_type(embedder.encode_ids([[1, 2]]))
reveal_type(embedder.encode_sparse("a"))
reveal_type(embedder.encode_sparse(["a"], keys="ids"))
late = ml.LateInteraction.from_pretrained("x", query_length=32)
reveal_type(late.encode_queries("a"))
reveal_type(late.encode_documents(["a"]))
masked = ml.FillMask.from_pretrained("x")
reveal_type(masked.predict("a"))
reveal_type(masked.predict(["a"])[0][0][0]["token"])
reveal_type(ml.Classifier.from_pretrained("x").predict("a"))
reveal_type(ml.Classifier.from_pretrained("x").zero_shot(["a"], ["b"])[0]["scores"])
reveal_type(ml.TokenClassifier.from_pretrained("x").predict("a")[0]["word"])
reranker = ml.Reranker.from_pretrained("x", dtype="int8")
reveal_type(reranker.predict([("a", "b")]))
reveal_type(reranker.rank("a", ["b"])[0]["score"])
"""
ARRAY = "numpy.ndarray"
EXPECTED = [
    *(ARRAY, ARRAY, ARRAY, f"list[{ARRAY}", ARRAY, ARRAY, "list[int]", "list[list[int]]", ARRAY),
    *("dict[str, float]", "list[dict[int, float]]", ARRAY, f"list[{ARRAY}", "list[list[TypedDict(Prediction", "str"),
    *("list[TypedDict(Score", "list[float]", "str", ARRAY, "float"),
]


def checked(tmp_path: Path, program: str) -> list[str]:
    (tmp_path / "user.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--follow-imports=silent", "user.py"]
    path = {**os.environ, "MYPYPATH": str(Path(ml.__file__).parents[1])}  # where it lies, however it is installed
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True, timeout=300)
    return done.stdout.splitlines()


def test_a_user_s_file_is_typed(tmp_path):
    lines = checked(tmp_path, PROGRAM)
    assert lines[-1].startswith("Success"), lines
    shown = [re.search(r'Revealed type is "(.*)"', line)[1] for line in lines if "Revealed type" in line]
    plain = [re.sub(r"(builtins|modernbert_lite\.\w+|TypedDict)\.(?=\w)", "", text) for text in shown]
    assert len(plain) == len(EXPECTED), plain
    for got, expected in zip(plain, EXPECTED, strict=True):
        assert got.startswith(expected), (got, expected)
    assert not any("Any" in re.sub(r"ndarray\[.*?\]\]?\]", "ndarray", text) for text in plain), plain


def test_an_option_that_is_not_there_is_an_error(tmp_path):
    program = 'import modernbert_lite as ml\nml.Embedder.from_pretrained("tiny", batch_size=3)\n'
    assert any('Unexpected keyword argument "batch_size"' in line for line in checked(tmp_path, program))
