import pytest
import torch
from sentence_transformers import SentenceTransformer

from flagembedding_matryoshka.evaluation.baselines import as_given, at_random, by_bi_encoder
from flagembedding_matryoshka.evaluation.comparison import compare
from flagembedding_matryoshka.evaluation.measure import sort_by_width
from flagembedding_matryoshka.evaluation.report.tables import settings_table
from flagembedding_matryoshka.evaluation.results import Result
from flagembedding_matryoshka.evaluation.runs import per_query
from flagembedding_matryoshka.setting import Setting
from tests.encoders import save_bi_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
FULL, HALF = Setting(6), Setting(3)


def result(setting, flops, *values):
    measures = {name: list(values) for name in ("nDCG@10", "MRR@10", "Recall@10")}
    return Result(setting, flops, 100.0, None, measures)


def test_the_candidates_own_order(candidates):
    baseline = as_given(candidates, 10)
    assert baseline.name == "BM25's first 6, as given"
    first = {query: ids[:1] for query, ids in candidates.passages.items()}
    found = [ids[0] in candidates.collection.relevant[query] if ids else False for query, ids in first.items()]
    assert [value == 1 for value in baseline.per_query["MRR@10"]] == found
    assert baseline.flops_per_pair is None


def test_a_random_order_is_always_the_same_and_another(candidates):
    baseline = at_random(candidates, 10)
    assert baseline == at_random(candidates, 10)
    assert baseline.per_query["Recall@10"] == as_given(candidates, 10).per_query["Recall@10"]
    assert baseline.per_query["nDCG@10"] != as_given(candidates, 10).per_query["nDCG@10"]


def test_a_bi_encoder_ranks_by_cosine(candidates, tmp_path):
    path = str(save_bi_encoder(tmp_path / "encoder"))
    baseline = by_bi_encoder(candidates, "tiny", path, timed_pairs=4, recall_at=10, device="cpu", dtype=torch.float32)
    model = SentenceTransformer(path, device="cpu")
    run = {}
    for query, ids in candidates.passages.items():
        texts = [candidates.collection.queries[query], *candidates.texts(query)]
        vectors = torch.nn.functional.normalize(torch.tensor(model.encode(texts)), dim=-1)
        run[query] = dict(zip(ids, (vectors[1:] @ vectors[0]).tolist(), strict=True))
    assert baseline.per_query == per_query(candidates, run, 10)
    assert baseline.flops_per_pair > 0 and baseline.pairs_per_second > 0


def test_baselines_are_compared_with_the_full_network(candidates):
    results = [result(HALF, 5e8, 0.0, 0.0, 1.0), result(FULL, 1e9, 1.0, 1.0, 1.0)]
    baselines = [as_given(candidates, 10), at_random(candidates, 10)]
    compared, beside = compare(results, FULL, baselines)
    assert [item.p_value is None for item in compared] == [False, True]
    for item, baseline in zip(beside, baselines, strict=True):
        values = baseline.per_query["nDCG@10"]
        assert item.change == pytest.approx(sum(values) / len(values) - 1)
        assert 0 < item.p_value <= 1 and item.flops_share is None
    # Three are tested together: no p-value is below three times the smallest that three queries allow.
    alone, _ = compare(results, FULL)
    assert compared[0].p_value >= alone[0].p_value

    text = settings_table(compared, beside, {0.5: HALF, 0.6: HALF, 1.0: FULL})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert [row[0] for row in rows[2:]] == ["BM25's first 6, as given", "random order", "3 layers", "6 layers"]
    assert rows[0][-1] == "budget" and [row[-1] for row in rows[2:]] == ["", "", "0.5, 0.6", "1"]
    assert "budget" not in settings_table(compared, beside)


def test_settings_of_a_width_stand_beside_each_other():
    narrow = Setting(3, (2,), 2)
    cascade = Setting(6, cascade=((3, 0.5),))
    assert sort_by_width([HALF, FULL, narrow, cascade, HALF]) == [HALF, FULL, cascade, narrow]
