import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.evaluation.results import Result, Store, conditions
from flagembedding_matryoshka.evaluation.runs import in_order
from flagembedding_matryoshka.inference.fingerprint import model_fingerprint
from flagembedding_matryoshka.setting import Setting

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_is_read_as_it_was_written(tmp_path):
    store, run = Store(tmp_path, {}), in_order({"q": ["b", "a"]}) | {"r": {"c": 0.1234567890123}}
    with pytest.raises(FileNotFoundError):
        store.run(Setting(4))
    store.save(Result(Setting(4), 1.0, 1.0, None, {}), run)
    assert store.run(Setting(4)) == {"q": {"b": -1.0, "a": -2.0}, "r": {"c": 0.123456789}}


def test_conditions_tell_what_results_depend_on(reranker, candidates):
    assert conditions(reranker, candidates, 4, 10) == conditions(reranker, candidates, 4, 10)
    assert conditions(reranker, candidates, 4, 10) != conditions(reranker, candidates, 5, 10)


def test_the_fingerprint_knows_weights_in_eight_bits(reranker, tiny_layerwise_path):
    def eight_bits():
        return MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu", batch_size=5, quantization="int8")

    assert model_fingerprint(eight_bits()) == model_fingerprint(eight_bits()) != model_fingerprint(reranker)
