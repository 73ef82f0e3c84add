"""What a narrower dtype costs in quality: vectors beside float32's, and scores on evaluation sets that you have.

    python -m bench.accuracy --model tiny --pairs stsb/pairs.tsv.gz --retrieval scifact --dtype int8 bfloat16

--pairs: lines of score, text, text, tab-separated. --retrieval: folders in BEIR's form (corpus.jsonl.gz,
queries.jsonl.gz, qrels.tsv.gz), of which every judged document and others up to --documents, and --queries, are taken.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from modernbert_lite import Embedder


def spearman(model: Embedder, path: Path) -> tuple[float, list[np.ndarray]]:
    """100 x the rank correlation of cosines with the scores, and the vectors."""
    from scipy.stats import spearmanr

    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    rows = [row for row in rows if row[0][:1].isdigit()]
    left, right = (model.encode([row[i] for row in rows], normalize_embeddings=True) for i in (1, 2))
    return 100 * float(spearmanr([float(row[0]) for row in rows], (left * right).sum(1))[0]), [left, right]


def ndcg(model: Embedder, folder: Path, queries: int, documents: int, k: int = 10) -> tuple[float, list[np.ndarray]]:
    """100 x nDCG@10, gains 2^relevance - 1, and the vectors."""
    corpus, asked = ({r["_id"]: r for r in _records(folder / f"{name}.jsonl.gz")} for name in ("corpus", "queries"))
    relevant: dict[str, dict[str, int]] = defaultdict(dict)
    with gzip.open(folder / "qrels.tsv.gz", "rt", encoding="utf-8") as file:
        for line in file:
            query, *_, document, grade = line.split()
            if grade.lstrip("-").isdigit() and int(grade) > 0:
                relevant[query][document] = int(grade)
    picked = [query for query in asked if query in relevant][:queries]
    judged = dict.fromkeys(document for query in picked for document in relevant[query] if document in corpus)
    ids = list(dict.fromkeys([*judged, *corpus]))[: max(documents, len(judged))]
    texts = [f"{corpus[i].get('title') or ''} {corpus[i]['text']}".strip() for i in ids]
    vectors = model.encode_document(texts, normalize_embeddings=True)
    questions = model.encode_query([asked[query]["text"] for query in picked], normalize_embeddings=True)
    scores = []
    for query, row in zip(picked, questions @ vectors.T, strict=True):
        gains = [2 ** relevant[query].get(ids[i], 0) - 1 for i in np.argsort(-row)[:k]]
        ideal = sorted((2**grade - 1 for grade in relevant[query].values()), reverse=True)[:k]
        scores.append(_discounted(gains) / _discounted(ideal))
    return 100 * float(np.mean(scores)), [vectors, questions]


def _discounted(gains: list[int]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))


def _records(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", nargs="+", default=["int8", "bfloat16"])
    parser.add_argument("--pairs", type=Path, nargs="*", default=[])
    parser.add_argument("--retrieval", type=Path, nargs="*", default=[])
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--documents", type=int, default=2000)
    args = parser.parse_args(argv)
    if not args.pairs and not args.retrieval:
        print("bench.accuracy: give --pairs or --retrieval something to measure on", file=sys.stderr)
        return 2
    exact: np.ndarray | None = None
    for dtype in ("float32", *args.dtype):
        model = Embedder.from_pretrained(args.model, device="cpu", dtype=dtype)
        results, vectors = [], []
        for path in args.pairs:
            score, new = spearman(model, path)
            results.append(f"{path.parent.name} Spearman {score:.2f}")
            vectors += new
        for folder in args.retrieval:
            score, new = ndcg(model, folder, args.queries, args.documents)
            results.append(f"{folder.name} nDCG@10 {score:.2f}")
            vectors += new
        every = np.concatenate(vectors)
        exact = every if exact is None else exact
        cosines = (every * exact).sum(1)
        print(f"{dtype}: {', '.join(results)}; cosine {cosines.mean():.5f}, at worst {cosines.min():.5f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
