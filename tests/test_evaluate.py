import json

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

pytestmark = pytest.mark.usefixtures("restored_mapping")
pytest.importorskip("faiss", reason="FlagEmbedding's evaluation needs faiss")
PASSAGES = {"p0": "air flows over a wing", "p1": "the flux of heat", "p2": "a cone", "p3": "heat of a wing"}
QUERIES = {"q0": "how does a wing lift", "q1": "heat"}


@pytest.fixture
def embedder(tmp_path):
    """A dense retriever of random weights."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(PASSAGES.values()).split()))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path / "embedder")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "embedder")
    return tmp_path / "embedder"


@pytest.fixture
def data(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    contents = {
        "corpus.jsonl": [{"id": name, "text": text} for name, text in PASSAGES.items()],
        "test_queries.jsonl": [{"id": name, "text": text} for name, text in QUERIES.items()],
        "test_qrels.jsonl": [
            {"qid": "q0", "docid": "p0", "relevance": 1},
            {"qid": "q1", "docid": "p1", "relevance": 1},
        ],
    }
    for name, rows in contents.items():
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_flag_embeddings_evaluation_runs_with_our_re_ranker_and_options_of_a_file(
    embedder, data, tiny_layerwise_path, tmp_path
):
    from flagembedding_matryoshka.evaluate import main

    reranker = tmp_path / "output"
    reranker.symlink_to(tiny_layerwise_path)
    config = tmp_path / "run.yaml"
    config.write_text(
        "search_top_k: 1\nrerank_top_k: 4\noverwrite: true\nk_values: [1, 4]\n"
        "eval_output_method: json\neval_metrics: [ndcg_at_4, recall_at_4]\n"
    )
    main(
        [
            *("--eval_name", "mine", "--dataset_dir", str(data), "--splits", "test"),
            *("--corpus_embd_save_dir", str(tmp_path / "embeddings"), "--output_dir", str(tmp_path / "results")),
            *("--config", str(config), "--cache_path", str(tmp_path / "cache")),
            *("--eval_output_path", str(tmp_path / "metrics.json"), "--search_top_k", "4"),
            *("--embedder_name_or_path", str(embedder), "--embedder_model_class", "encoder-only-base"),
            *("--reranker_name_or_path", str(reranker), "--cutoff_layers", "3", "--devices", "cpu"),
            *("--use_fp16", "False", "--reranker_max_length", "64"),
        ]
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    found = next(iter(next(iter(metrics.values()))["output"].values()))
    assert found["recall_at_4"] == 1.0
