"""Measure the teacher, 20 × cosine + weight × BM25, on the dev queries of each kind.

    python examples/smollm2/recipe/weigh.py DIR

Prints nDCG@10 of BM25's first 50 passages for each collection that collect.py wrote to DIR: in the order of BM25, and
in the order of the teacher with several weights. teach.sh has the chosen weights.
"""

import argparse
from pathlib import Path

import numpy as np
from bi_encoder import path as bi_encoder_path

from flagembedding_matryoshka.metrics import ndcg, rank_grades
from flagembedding_matryoshka.mining.bm25 import BM25
from flagembedding_matryoshka.mining.retrievers import BiEncoder
from flagembedding_matryoshka.text.collections import read_collection

CANDIDATES, SCALE = 50, 20.0
WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5)


def measure(directory: Path, encoder: BiEncoder) -> tuple[int, list[float]]:
    """Return the number of dev queries of a collection, and nDCG@10 of BM25 and of the teacher with each weight.

    Args:
        directory: the collection.
        encoder: the bi-encoder whose cosines the teacher uses.
    """
    collection = read_collection(directory, "dev")
    names, texts = list(collection.passages), list(collection.passages.values())
    bm25 = BM25(texts)
    vectors = encoder.queries([collection.queries[query] for query in collection.relevant]).cpu().numpy()
    rows = []
    for vector, (query, grades) in zip(vectors, collection.relevant.items(), strict=True):
        scores = bm25.scores(collection.queries[query])
        places = np.argsort(-scores, kind="stable")[:CANDIDATES]
        lexical = scores[places]
        cosines = encoder.passages([texts[place] for place in places]).cpu().numpy() @ vector
        relevance = [grades.get(names[place], 0) for place in places]
        teachers = np.stack([lexical, *(SCALE * cosines + weight * lexical for weight in WEIGHTS)])
        rows.append(ndcg(rank_grades(teachers, relevance), 10, list(grades.values())))
    return len(rows), np.mean(rows, axis=0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    encoder = BiEncoder(bi_encoder_path(), max_length=256)
    print("kind", "queries", "BM25", *(f"+{weight}" for weight in WEIGHTS), sep="\t")
    for qrels in sorted(parser.parse_args().directory.glob("*/qrels/dev.tsv")):
        kind = qrels.parents[1]
        queries, means = measure(kind, encoder)
        print(kind.name, queries, *(f"{mean:.3f}" for mean in means), sep="\t", flush=True)


if __name__ == "__main__":
    main()
