"""Memory: 100,000 texts take their vectors' bytes and no more; written to a file as they come, not even those."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("resource", reason="peak memory is measured by POSIX getrusage")

TINY = Path(__file__).parents[2] / "modernbert_lite" / "tiny"
# The first windows of texts warm up: the C library's heap reaches its working size after four (16,384 texts), and was
# measured to stay there to 200,000. From then on only the vectors may grow.
FEW, MANY, WIDTH = 20_000, 100_000, 384
VECTORS = MANY * WIDTH * 4

PEAK = """
import resource, sys
from modernbert_lite import Embedder
from modernbert_lite.cli import commands as cli
def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
"""
ENCODE = """
model = Embedder.from_pretrained(sys.argv[1])
for count, path in zip((20_000, 100_000), sys.argv[2:]):
    with open(path) as file:
        vectors = model.encode(line.rstrip("\\n") for line in file)
    assert vectors.shape == (count, 384), vectors.shape
    del vectors
    print(peak())
"""
SHELL = """
for path in sys.argv[2:]:
    assert cli.main(["embed", "--model", sys.argv[1], "--input", path, "--output", path + ".npy"]) == 0
    print(peak())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The bundled model cut down to its first layer: the same tokenizer and width, a quarter of the time."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("model") / "one-layer"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    config = {**json.loads((folder / "config.json").read_text()), "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(TINY / "model.safetensors")
    kept = {k: v.to(torch.float32) for k, v in tensors.items() if "layers." not in k or "layers.0." in k}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """texts(n): a file of n lines of two to four words."""
    words = ["river", "stone", "quick", "green", "house", "never", "apple", "walk", "under", "seven", "music"]
    folder = tmp_path_factory.mktemp("texts")

    def write(count: int) -> Path:
        path = folder / f"{count}.txt"
        with path.open("w") as file:
            for i in range(count):
                file.write(" ".join(words[(i * 7 + j * i) % len(words)] for j in range(2 + i % 3)) + "\n")
        return path

    return write


def growth(program: str, *arguments: object) -> int:
    """How much higher the peak of the larger file is than that of the smaller one, in one process."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK + program, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-1_000:]
    few, many = map(int, done.stdout.split())
    return many - few


@pytest.mark.slow
def test_a_hundred_thousand_texts_take_no_more_than_their_vectors(model, texts):
    grown = growth(ENCODE, model, texts(FEW), texts(MANY))
    assert grown <= VECTORS, f"grew by {grown / VECTORS:.2f} of the vectors"


@pytest.mark.slow
def test_the_shell_writes_vectors_as_they_come(model, texts):
    grown = growth(SHELL, model, texts(FEW), texts(MANY))
    assert Path(f"{texts(MANY)}.npy").stat().st_size == 128 + VECTORS
    assert grown <= VECTORS / 4, f"grew by {grown / 1e6:.0f} MB"
