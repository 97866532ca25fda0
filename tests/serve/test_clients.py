"""The real clients of other makers' servers, each against ours."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from tests.qwen import write_causal_lm
from tests.serve.conftest import client_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
QUERY = "how does a wing lift"
COHERE5 = Path(__file__).parents[2] / ".venv-cohere5" / "bin" / "python"
NODE = Path(__file__).with_name("node")
DOCUMENTS = ["the flow of energy", "air flows faster over the upper side of a wing.", "", "what is a heat flux? " * 9]


@pytest.fixture(scope="module")
def address(reranker):
    with client_of(reranker, api_key="key") as client:
        yield str(client.base_url).rstrip("/")


@pytest.fixture(scope="module")
def expected(reranker):
    """(index, relevance) of the best two, by the re-ranker itself."""
    ranked = reranker.rank(QUERY, DOCUMENTS, normalize=True)
    return [(hit["corpus_id"], pytest.approx(hit["score"], abs=1e-6)) for hit in ranked[:2]]


@pytest.fixture(scope="module")
def expected_texts(expected):
    return [(DOCUMENTS[index], score) for index, score in expected]


def test_cohere(address, expected):
    cohere = pytest.importorskip("cohere")
    for client in (cohere.ClientV2("key", base_url=address), cohere.Client("key", base_url=address)):
        answer = client.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS, top_n=2)
        assert [(result.index, result.relevance_score) for result in answer.results] == expected
        with pytest.raises(cohere.UnprocessableEntityError, match="top_n"):
            client.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS, top_n=0)
    with pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2("other", base_url=address).rerank(model="m", query="q", documents=["d"])


def test_rank_fields_of_cohere(address, reranker):
    cohere = pytest.importorskip("cohere")
    client = cohere.Client("key", base_url=address)
    documents = [{"text": "no", "title": "lift"}, {"text": "no", "title": "heat"}]
    answer = client.rerank(query=QUERY, documents=documents, rank_fields=["title"], return_documents=True)
    ranked = reranker.rank(QUERY, ["lift", "heat"], normalize=True)
    assert [(result.index, result.relevance_score) for result in answer.results] == [
        (hit["corpus_id"], pytest.approx(hit["score"], abs=1e-6)) for hit in ranked
    ]
    with pytest.raises(cohere.UnprocessableEntityError, match="author"):
        client.rerank(query=QUERY, documents=documents, rank_fields=["author"])


PROVIDERS = {
    "cohere": "/v2/rerank",
    "hosted_vllm": "",
    "huggingface": "",
    "infinity": "/infinity",
    "jina_ai": "",
    "voyage": "",
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_litellm(address, expected, provider, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    answer = litellm.rerank(
        model=f"{provider}/tiny",
        query=QUERY,
        documents=DOCUMENTS,
        top_n=2,
        return_documents=False,
        api_base=address + PROVIDERS[provider],
        api_key="key",
    )
    assert [(result["index"], result["relevance_score"]) for result in answer.results] == expected


def test_infinity_in_litellm_has_documents_by_default(address, expected_texts, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    call = {"query": QUERY, "documents": DOCUMENTS, "top_n": 2, "api_key": "key"}
    answer = litellm.rerank(model="infinity/tiny", api_base=f"{address}/infinity", **call)
    # LiteLLM leaves an empty text out.
    texts = [result.get("document", {"text": ""})["text"] for result in answer.results]
    assert list(zip(texts, (result["relevance_score"] for result in answer.results), strict=True)) == expected_texts
    assert any(texts)


def test_voyage(address, expected_texts):
    voyageai = pytest.importorskip("voyageai")
    client = voyageai.Client("key", base_url=f"{address}/v1")
    answer = client.rerank(QUERY, DOCUMENTS, model="rerank-2", top_k=2)
    assert [(result.document, result.relevance_score) for result in answer.results] == expected_texts
    assert len(client.rerank(QUERY, DOCUMENTS, model="rerank-2").results) == 4


def test_xinference(reranker, expected):
    xinference = pytest.importorskip("xinference_client")
    with client_of(reranker) as client:
        model = xinference.RESTfulClient(str(client.base_url).rstrip("/")).get_model("tiny")
        answer = model.rerank(DOCUMENTS, QUERY, top_n=2, return_documents=True, return_len=True)
    assert [(result["index"], result["relevance_score"]) for result in answer["results"]] == expected
    assert answer["results"][0]["document"]["text"] == DOCUMENTS[expected[0][0]]


def found_by(address, *command):
    """What each client of a script has found, in an environment that `make test-slow` makes."""
    given = json.dumps([address, QUERY, DOCUMENTS])
    return json.loads(subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def found_with_cohere5(address):
    if not COHERE5.exists():
        pytest.skip("needs .venv-cohere5, which make test-slow makes")
    return found_by(address, COHERE5, Path(__file__).with_name("cohere5.py"))


@pytest.fixture(scope="module")
def found_in_node(address):
    if shutil.which("node") is None or not (NODE / "node_modules" / ".installed").exists():
        pytest.skip("needs Node.js and tests/serve/node/node_modules, which make test-slow makes where there is npm")
    return found_by(address, "node", NODE / "rank.mjs")


@pytest.mark.parametrize("client", ["cohere", "cohere_v2", "langchain", "llama_index"])
def test_clients_that_need_an_older_cohere(found_with_cohere5, expected_texts, client):
    assert [tuple(hit) for hit in found_with_cohere5[client]] == expected_texts


@pytest.mark.parametrize("client", ["cohere", "cohere_v2", "langchain"])
def test_clients_in_javascript(found_in_node, expected_texts, client):
    assert [tuple(hit) for hit in found_in_node[client]] == expected_texts


def _llama_index(ranker):
    schema = pytest.importorskip("llama_index.core.schema")
    nodes = [schema.NodeWithScore(node=schema.TextNode(text=text)) for text in DOCUMENTS]
    found = ranker.postprocess_nodes(nodes, query_str=QUERY)
    return [(node.node.text, node.score) for node in found]


def test_llama_index_jina(address, expected_texts):
    module = pytest.importorskip("llama_index.postprocessor.jinaai_rerank")
    assert _llama_index(module.JinaRerank(api_key="key", base_url=f"{address}/v1", top_n=2)) == expected_texts


def test_llama_index_tei(address, expected_texts):
    module = pytest.importorskip("llama_index.postprocessor.tei_rerank")
    ranker = module.TextEmbeddingInference(base_url=address, auth_token="Bearer key", top_n=2)
    assert _llama_index(ranker) == expected_texts


def test_llama_index_xinference(reranker, expected_texts):
    module = pytest.importorskip("llama_index.postprocessor.xinference_rerank")
    with client_of(reranker) as client:
        ranker = module.XinferenceRerank(base_url=str(client.base_url).rstrip("/"), model="tiny", top_n=2)
        assert _llama_index(ranker) == expected_texts


def _haystack(ranker):
    haystack = pytest.importorskip("haystack")
    found = ranker.run(query=QUERY, documents=[haystack.Document(content=text) for text in DOCUMENTS])["documents"]
    return [(document.content, document.score) for document in found]


def test_haystack_cohere(address, expected_texts):
    module = pytest.importorskip("haystack_integrations.components.rankers.cohere")
    from haystack.utils import Secret

    ranker = module.CohereRanker(api_key=Secret.from_token("key"), api_base_url=address, top_k=2)
    assert _haystack(ranker) == expected_texts


def test_haystack_jina(address, expected_texts):
    module = pytest.importorskip("haystack_integrations.components.rankers.jina")
    from haystack.utils import Secret

    ranker = module.JinaRanker(api_key=Secret.from_token("key"), base_url=f"{address}/v1/rerank", top_k=2)
    assert _haystack(ranker) == expected_texts


def test_rerankers(address, expected_texts):
    module = pytest.importorskip("rerankers.models.api_rankers")
    for provider in ("cohere", "jina"):
        ranker = module.APIRanker("m", "key", provider, url=f"{address}/v1/rerank")
        found = ranker.rank(QUERY, DOCUMENTS).results[:2]
        assert [(result.document.text, result.score) for result in found] == expected_texts


TASK = "judge by the topic"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = write_causal_lm(tmp_path_factory.mktemp("models") / "Qwen3-Reranker-tiny", initializer_range=0.1)
    return MatryoshkaReranker(str(path), dtype="float32", devices="cpu")


@pytest.fixture(scope="module")
def address_of_qwen(qwen):
    with client_of(qwen) as client:
        yield str(client.base_url).rstrip("/")


@pytest.fixture(scope="module")
def instructed(qwen):
    """(index, relevance) of the best two with an instruction."""
    plain, own = (qwen.rank(QUERY, DOCUMENTS, 2, normalize=True, instruction=one) for one in (None, TASK))
    assert [hit["score"] for hit in plain] != [hit["score"] for hit in own]
    return [(hit["corpus_id"], pytest.approx(hit["score"], abs=1e-6)) for hit in own]


def test_an_instruction_of_litellm(address_of_qwen, instructed, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    given = {"query": QUERY, "documents": DOCUMENTS, "top_n": 2, "api_base": address_of_qwen, "api_key": "key"}
    answer = litellm.rerank(model="hosted_vllm/tiny", instruction=TASK, **given)
    assert [(result["index"], result["relevance_score"]) for result in answer.results] == instructed


def test_an_instruction_of_xinference(address_of_qwen, instructed):
    xinference = pytest.importorskip("xinference_client")
    model = xinference.RESTfulClient(address_of_qwen).get_model("tiny")
    answer = model.rerank(DOCUMENTS, QUERY, top_n=2, instruction=TASK)
    assert [(result["index"], result["relevance_score"]) for result in answer["results"]] == instructed


def test_first_stage_scores_of_clients(address, reranker):
    cohere = pytest.importorskip("cohere")
    first = {"first_stage_scores": [3, None, 8.5, 1], "fusion": 2}
    expected = reranker.rank(QUERY, DOCUMENTS, **first)
    assert [hit["corpus_id"] for hit in expected] != [hit["corpus_id"] for hit in reranker.rank(QUERY, DOCUMENTS)]
    client = cohere.ClientV2("key", base_url=address)
    options = {"additional_body_parameters": first}
    results = client.rerank(model="m", query=QUERY, documents=DOCUMENTS, request_options=options).results
    assert [result.index for result in results] == [hit["corpus_id"] for hit in expected]
    assert results == sorted(results, key=lambda result: -result.relevance_score)


@pytest.mark.parametrize("name", ["instruction", "instruct"])
def test_an_instruction_of_cohere(address_of_qwen, instructed, name):
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2("key", base_url=address_of_qwen)
    options = {"additional_body_parameters": {name: TASK}}
    answer = client.rerank(model="m", query=QUERY, documents=DOCUMENTS, top_n=2, request_options=options)
    assert [(result.index, result.relevance_score) for result in answer.results] == instructed
