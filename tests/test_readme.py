"""README and docs/: every block runs as it stands, what it shows comes out, and what is linked is there.

Blocks run on small random checkpoints under the names that they use; only "tiny" is itself.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}
PAGES |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
README = PAGES["README.md"]
GOLDEN = json.loads((ROOT / "tests" / "data" / "golden.json").read_text(encoding="utf-8"))["entries"]
NUMBER = r"-?\d+\.\d+(?:e-?\d+)?"
# What a shown number may differ by beyond its digits: other processors add up in another order; a GPU has 16 bits.
SLACK = 2e-2 if torch.cuda.is_available() else 5e-6


# ---- what a page has ------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    language: str
    code: str
    command: str  # the name of a command that .ci/run runs, or ""
    output: str | None = None  # what the page shows as its output
    published: str = ""  # the entry of golden.json that the output comes from


def blocks(text: str) -> list[Block]:
    """Fenced blocks in their order; one of text belongs to the block before it."""
    found: list[Block] = []
    end = 0
    fence = r"(?:^<!-- (command|output): (.*?) -->\n)?^```(\w*)\n(.*?)^```$\n?"
    for match in re.finditer(fence, text, flags=re.DOTALL | re.MULTILINE):
        kind, mark, language, code = match.groups()
        if language == "text":
            assert not text[end : match.start()].strip(), f"an output without the block that made it: {code}"
            assert found[-1].output is None
            assert kind != "command"
            published = (mark or "").removeprefix("published ")
            found[-1] = found[-1]._replace(output=code, published=published)
        else:
            assert language in ("python", "sh"), f"no test runs a block of {language!r}: {code}"
            assert kind != "output"
            found.append(Block(language, code, mark or ""))
        end = match.end()
    assert len(found) + sum(b.output is not None for b in found) == text.count("```") / 2
    return found


def to_run(page: str, language: str) -> list[Block]:
    """The page's blocks, but for the commands: .ci/run runs those."""
    return [block for block in blocks(PAGES[page]) if block.language == language and not block.command]


def pages_with(language: str) -> list[str]:
    return sorted(page for page in PAGES if to_run(page, language))


def same(shown: str, got: str, slack: float = SLACK) -> bool:
    """Whether an output is the shown one: its words, and its numbers to the shown digits."""

    def words(text: str) -> list[str]:
        return re.sub(NUMBER, " # ", text).split()

    numbers = [re.findall(NUMBER, text) for text in (shown, got)]
    return words(shown) == words(got) and all(near(*pair, slack) for pair in zip(*numbers, strict=True))


def near(shown: str, got: str | float, slack: float) -> bool:
    digits = len(shown.partition(".")[2])
    return abs(float(shown) - float(got)) <= 0.5 * 10**-digits + slack


def test_outputs_are_compared():
    assert same("[0.433 0.055] a.txt 3\n", "[0.43317446  0.05502683] a.txt 3\n")
    assert same('{"x": -0.5}', '{"x": -0.5}')
    for got in ("[0.4346 0.055] a.txt 3", "[0.433 0.055] b.txt 3", "[0.433 0.055] a.txt 4", "[0.433] a.txt 3"):
        assert not same("[0.433 0.055] a.txt 3", got, 5e-6), got


# ---- checkpoints under the names of real ones -----------------------------------------------------------------------


def cached(cache: Path, repo: str, folder: Path) -> None:
    """Puts a checkpoint in a hub cache, as downloading it would."""
    commit = "0" * 40
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    (home / "refs" / "main").write_text(commit)
    folder.rename(home / "snapshots" / commit)


def write_modules(folder: Path, *modules: tuple[str, str]) -> None:
    listed = [{"path": path, "type": kind} for path, kind in modules]
    (folder / "modules.json").write_text(json.dumps(listed))


def embedder(make: Any, folder: Path) -> Path:
    made = make(name=folder.name)[0]
    write_modules(
        made, ("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")
    )
    (made / "1_Pooling").mkdir()
    (made / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return made


def sparse_gte(make: Any, folder: Path) -> Path:
    """gte-multilingual-base's form, with ModernBERT's tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.GteConfig(vocab_size=50368, pad_token_id=50283, num_labels=1, initializer_range=0.1, **sizes)
    transformers.GteForTokenClassification(config).save_pretrained(folder)
    for path in (Path(__file__).parent / "data" / "modernbert-tokenizer").iterdir():
        if path.name != "config.json":
            shutil.copy(path, folder)
    write_modules(
        folder, ("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return folder


def reranker(make: Any, folder: Path) -> Path:
    config = {"id2label": {0: "LABEL_0"}, "classifier_pooling": "mean"}
    return make("ModernBertForSequenceClassification", name=folder.name, **config)[0]


def entailment(make: Any, folder: Path) -> Path:
    labels = {"entailment": 0, "not_entailment": 1}
    config = {"num_labels": 2, "label2id": labels, "id2label": {i: label for label, i in labels.items()}}
    return make("ModernBertForSequenceClassification", name=folder.name, **config)[0]


def masked(make: Any, folder: Path) -> Path:
    return make("ModernBertForMaskedLM", name=folder.name)[0]


def late(make: Any, folder: Path) -> Path:
    """GTE-ModernColBERT's form and width of vectors."""
    made = make(name=folder.name)[0]
    (made / "1_Dense").mkdir()
    save_file({"linear.weight": torch.eye(128, 96)}, made / "1_Dense" / "model.safetensors")
    identity = {"activation_function": "torch.nn.modules.linear.Identity"}
    (made / "1_Dense" / "config.json").write_text(
        json.dumps({"in_features": 96, "out_features": 128, "bias": False, **identity})
    )
    write_modules(made, ("", "sentence_transformers.models.Transformer"), ("1_Dense", "pylate.models.Dense.Dense"))
    prefixes = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 32, "document_length": 300}
    (made / "config_sentence_transformers.json").write_text(json.dumps(prefixes))
    return made


CHECKPOINTS = {
    "Alibaba-NLP/gte-modernbert-base": embedder,
    "Alibaba-NLP/gte-multilingual-base": sparse_gte,
    "Alibaba-NLP/gte-reranker-modernbert-base": reranker,
    "MoritzLaurer/ModernBERT-base-zeroshot-v2.0": entailment,
    "answerdotai/ModernBERT-base": masked,
    "lightonai/GTE-ModernColBERT-v1": late,
}


@pytest.fixture
def run(make_checkpoint, tmp_path):
    """run(blocks) -> what each of them prints, in one process in an empty folder. Only checkpoints that the blocks name
    are made."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONWARNINGS": "error", "HF_HUB_CACHE": str(tmp_path / "hub")}
    work = tmp_path / "work"
    work.mkdir()

    def run(some: list[Block]) -> list[str]:
        for repo, make in CHECKPOINTS.items():
            if any(repo in block.code for block in some):
                cached(tmp_path / "hub", repo, make(make_checkpoint, tmp_path / make.__name__))
        return outputs(some, environment, work)

    run.folder = work
    return run


def outputs(some: list[Block], environment: dict[str, str], folder: Path) -> list[str]:
    between = "---- the next block ----\n"
    if some[0].language == "python":
        code = f"print({between!r}, end='', flush=True)\n".join(block.code for block in some)
        command = [sys.executable, "-c", code]
    else:
        code = f"printf %s '{between}'\n".join(block.code for block in some)
        command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(between)


# ---- blocks run, and what they show comes out -----------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_print_what_is_shown(run, page):
    some = to_run(page, "python")
    check(some, run(some))


@pytest.mark.parametrize("page", pages_with("sh"))
def test_shell_blocks_print_what_is_shown(run, page):
    some = to_run(page, "sh")
    got = run(some)
    check(some, got)
    if page == "docs/running.md":
        assert "self-check passed" in got[0]
        assert (run.folder / "vectors.jsonl").read_text().startswith('{"id": 7, "body": "a text", "embedding": [')
        assert (run.folder / "vectors.npy").stat().st_size == 128 + 2 * 384 * 4


def check(some: list[Block], got: list[str]) -> None:
    for block, out in zip(some, got, strict=True):
        if block.published:
            assert is_published(block)
            assert form(out) == form(block.output or ""), out
        elif block.output is not None:
            assert same(block.output, out), f"{block.code}\nprints\n{out}"


def form(output: str) -> Any:
    """What of an output doesn't depend on the weights."""
    if output.startswith("['"):
        return len(ast.literal_eval(output))
    return sorted(" ".join(re.sub(NUMBER, " # ", line).split()) for line in output.splitlines())


def is_published(block: Block) -> bool:
    """Whether a shown output is that of the entry of golden.json that it names, and the block is about its texts."""
    (entry,) = [entry for entry in GOLDEN if entry["id"] == block.published]
    inputs, values = entry["inputs"], entry["values"]
    assert entry["model"] in CHECKPOINTS
    if entry["kind"].startswith("top-5"):
        return inputs[0] in block.code and ast.literal_eval(block.output or "") == values
    if "sigmoid" in entry:
        known = list(zip(inputs, entry["sigmoid"], strict=True))
    else:
        assert entry["kind"].startswith("100 * cosine")
        known = [((inputs[0], text), value / 100) for text, value in zip(inputs[1:], values, strict=True)]
    for line in (block.output or "").splitlines():
        for number in re.findall(NUMBER, line):
            ((one, other),) = [texts for texts, value in known if near(number, value, 1e-9)]
            said = line.replace(number, "").strip()  # a line of one number may also say its text
            if one not in block.code or other not in block.code or not (said.startswith("[") or said == other):
                return False
    return True


PUBLISHED = [(page, b.published) for page in sorted(PAGES) for b in to_run(page, "python") if b.published]


def test_published_outputs_are_checked():
    block = next(b for b in to_run("README.md", "python") if b.published == "card_gte_reranker_modernbert")
    assert is_published(block)
    with pytest.raises(ValueError, match="not enough values"):
        is_published(block._replace(output=(block.output or "").replace("0.921", "0.922")))
    assert not is_published(block._replace(output="0.921  The weather is nice today\n"))
    assert not is_published(block._replace(code=block.code.replace("Introduction", "Introductions")))


@pytest.mark.weights
@pytest.mark.parametrize(("page", "entry"), PUBLISHED)
def test_published_outputs_come_out_of_the_real_weights(page, entry, tmp_path):
    """In MODERNBERT_LITE_TEST_MODELS, a hub id is a path."""
    some = to_run(page, "python")
    end = next(i for i, block in enumerate(some) if block.published == entry) + 1
    model = next(row["model"] for row in GOLDEN if row["id"] == entry)
    start = next(i for i, block in enumerate(some[:end]) if model in block.code)
    try:
        got = outputs(some[start:end], dict(os.environ), Path(os.environ.get("MODERNBERT_LITE_TEST_MODELS", tmp_path)))
    except AssertionError as error:
        if "not in the hub cache" in str(error):
            pytest.skip(f"{model} is not here")
        raise
    assert same(some[end - 1].output or "", got[-1], max(SLACK, 2e-3))


def test_commands_are_one_line_each_and_all_of_them_run():
    marked = [block for page in ("README.md", "CONTRIBUTING.md") for block in blocks(PAGES[page]) if block.command]
    assert [block.command for block in marked] == ["set-up", "test", "tools", "style", "types", "docs", "slow"]
    assert all(block.code.count("\n") == 1 and block.output is None for block in marked)
    assert not [page for page in PAGES if page.startswith("docs/") for block in blocks(PAGES[page]) if block.command]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^run ([\w-]+)", script, flags=re.MULTILINE)) == sorted(b.command for b in marked)
    assert script.rstrip().endswith("run test")


# ---- README: short, and its claims are true -------------------------------------------------------------------------


def test_readme_is_a_landing_page():
    assert README.count("\n") <= 130
    assert README.partition("```python")[0].count("\n") < 20
    first, *others = to_run("README.md", "python")
    assert len([line for line in first.code.splitlines() if line]) <= 6
    assert all(block.output for block in [first, *others, *to_run("README.md", "sh")])
    assert "Not measured yet" not in README
    assert "<!-- table:" not in README


def test_the_four_claims_are_measured():
    entries = json.loads((ROOT / "tests" / "data" / "checkpoints.json").read_text(encoding="utf-8"))["checkpoints"]
    assert "within 2e-5 of" in README
    assert "<= 2e-5" in (ROOT / "tests" / "checkpoint" / "test_matrix.py").read_text(encoding="utf-8")
    assert f"[{len(entries)} checkpoints]" in README
    with (ROOT / "bench" / "results" / "encode_cpu.csv").open(newline="") as file:
        ratios = [float(row["ratio"]) for row in csv.DictReader(file) if row["provider"] == "modernbert-lite"]
    assert f"[{min(ratios)} to {max(ratios)} times]" in README
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"{len(project['dependencies'])} dependencies" in README
    assert "[under 206 kB]" in README
    alarms = re.findall(r"< (\d+_000)\n", (ROOT / "tests" / "test_package.py").read_text(encoding="utf-8"))
    assert sum(map(int, alarms)) < 206_000
    (lines,) = re.findall(r"one file of \[under (\d+) lines\]", README)
    families = [path.read_text(encoding="utf-8") for path in (ROOT / "modernbert_lite" / "models").glob("*.py")]
    assert max(text.count("\n") for text in families) < int(lines)


# ---- tables, plots, links -------------------------------------------------------------------------------------------


def test_tables_and_plots_come_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import tables

    for page, text in PAGES.items():
        assert tables.fill(text) == text, f"{page}: python -m bench.tables"
    shown = "".join(PAGES.values())
    for name in (*tables.TABLES, "checkpoints"):
        assert shown.count(f"<!-- table: {name} -->") == 1
    for name, svg in tables.plots().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == svg, f"{name}: python -m bench.tables"


@pytest.mark.parametrize("path", [*ROOT.glob("docs/*.svg"), ROOT / "bench/results/cpu.svg"], ids=lambda path: path.stem)
def test_pictures_are_svg_and_shown(path):
    assert xml.etree.ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert any(f"{path.name})" in text for text in PAGES.values())


def anchors(text: str) -> set[str]:
    """Of headings, as code hosts and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        target, _, anchor = link.partition("#")
        path = (folder / target).resolve() if target else ROOT / page
        assert path.is_file(), f"{link}: links to folders and to other sites don't work everywhere"
        assert path.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", sorted(PAGES))
def test_paths_that_are_named_are_there(page):
    """`ops/cpu.py` stands for modernbert_lite/ops/cpu.py. Names in capitals are for a reader to fill in."""
    for name in re.findall(r"`((?:[a-z_.][\w.]*/)+[\w.]*|\w+\.py)`", PAGES[page]):
        if not re.search(r"NAME|[A-Z]{3}/|^/tmp", name):
            assert any((start / name).exists() for start in (ROOT, ROOT / "modernbert_lite")), name


def test_messages_that_are_quoted_are_those_of_the_source():
    """In bold and quotes; ".." stands for what differs."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "modernbert_lite").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)  # strings over more than one line
    quoted = re.findall(r'\*\*"(.*?)"', PAGES["docs/troubleshooting.md"])
    assert len(quoted) >= 8
    for message in quoted:
        for part in filter(None, (part.strip() for part in message.split(".."))):
            assert part in source, message


def test_every_page_is_listed():
    listed = PAGES["docs/index.md"]
    for page in PAGES:
        name = page.removeprefix("docs/") if page.startswith("docs/") else f"../{page}"
        assert page == "docs/index.md" or f"]({name}" in listed, page
    site = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f": {page}\n" in site for page in PAGES)
