"""A tiny collection in BEIR layout."""

import json

WORDS = ["wing", "lift", "drag", "flow", "heat", "shock", "layer", "plate", "cone", "nozzle"]
# The rank of "wing …" passages for the query "wing" is their number: the longer, the worse.
CORPUS = [{"_id": f"p{i}", "title": "wing", "text": " ".join(WORDS[1 : i + 1])} for i in range(8)]
QUERIES = [{"_id": "q1", "text": "wing"}, {"_id": "q2", "text": "a nozzle?"}, {"_id": "q3", "text": "the heat"}]
HEADER = "query-id\tcorpus-id\tscore"


def lines(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def write_collection(
    directory, corpus=CORPUS, queries=QUERIES, judgements=(("q1", "p2", 1),), header=HEADER, split="train"
):
    """Write a collection, of which parts can be told, and return its directory."""
    (directory / "qrels").mkdir(parents=True, exist_ok=True)
    (directory / "corpus.jsonl").write_text(lines(corpus))
    (directory / "queries.jsonl").write_text(lines(queries))
    rows = ["\t".join(map(str, judgement)) for judgement in judgements]
    (directory / "qrels" / f"{split}.tsv").write_text(lines([header, *rows]))
    return directory
