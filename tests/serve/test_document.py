"""The OpenAPI document, and what shows it."""

import json
import re

from flagembedding_matryoshka.serve.document import BODIES_OF_RERANK, BODIES_OF_SCORE, INFINITY_OPERATION
from tests.serve.conftest import client_of


def posted(document, path):
    return document["paths"][path]["post"]


def test_the_forms_are_documented(client):
    document = client.get("/openapi.json").json()
    schema = posted(document, "/rerank")["requestBody"]["content"]["application/json"]["schema"]
    assert ["documents" in form["properties"] for form in schema["anyOf"]] == [True, False, False]
    assert "$ref" not in json.dumps(schema)
    assert schema["anyOf"][2]["properties"]["queries"]["items"]["required"] == ["query", "documents"]
    cascade = schema["anyOf"][0]["properties"]["cascade"]["anyOf"][0]
    assert re.match(cascade["propertyNames"]["pattern"], "3") and cascade["additionalProperties"]["maximum"] == 1


def test_errors_and_the_token_are_documented(client, reranker):
    for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"):
        described = posted(client.get("/openapi.json").json(), path)
        assert set(described["responses"]) == {"200", "408", "413", "415", "422", "429", "500", "503"}
        assert "security" not in described
    with client_of(reranker, api_key="key") as secured:
        document = secured.get("/openapi.json").json()
        (scheme,) = posted(document, "/rerank")["security"]
        assert document["components"]["securitySchemes"][next(iter(scheme))]["scheme"] == "bearer"
        assert "401" in posted(document, "/rerank")["responses"]


def test_the_page_of_documentation_loads_nothing_from_elsewhere(client):
    page = client.get("/docs").text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert loaded and all(address.startswith("/") for address in loaded)
    assert all(client.get(address).status_code == 200 for address in loaded)


def operations(client):
    """(path, method, description) of every call."""
    paths = client.get("/openapi.json").json()["paths"]
    return [(path, method, described) for path, methods in paths.items() for method, described in methods.items()]


def test_every_call_has_a_summary_and_a_tag(client):
    found = operations(client)
    assert len(found) == 13
    assert all(described["summary"] and len(described["tags"]) == 1 for _, _, described in found)


def test_examples_of_bodies_are_answered(client):
    answered = 0
    for path, method, described in operations(client):
        if method == "post":
            content = described["requestBody"]["content"]["application/json"]
            for name, example in content["examples"].items():
                body = example["value"] | ({"cascade": {"3": 0.5}} if "cascade" in example["value"] else {})
                assert client.post(path, json=body).status_code == 200, (path, name)
                answered += 1
    assert answered == 3 * len(BODIES_OF_RERANK) + 1 + 2 * len(BODIES_OF_SCORE)


def keys(value):
    """The names of fields, in lists those of the first item."""
    if isinstance(value, dict):
        return {name: keys(item) for name, item in value.items()}
    return [keys(value[0])] if isinstance(value, list) and value else None


def test_examples_of_answers_have_the_fields_of_answers(client):
    for path, method, described in operations(client):
        content = described["responses"]["200"]["content"]
        if "application/json" not in content:
            assert path == "/metrics"
            continue
        own = {"/score": BODIES_OF_SCORE, "/v1/score": BODIES_OF_SCORE, "/infinity/rerank": INFINITY_OPERATION.bodies}
        body = next(iter(own.get(path, BODIES_OF_RERANK).values()))
        answer = client.request(method, path.replace("{model_id}", "tiny"), json=body if method == "post" else None)
        example, found = content["application/json"]["example"], answer.json()
        if path == "/info":
            assert set(example.pop("checkpoint")) < set(found.pop("checkpoint"))
        assert keys(example) == keys(found), path
