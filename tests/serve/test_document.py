"""The OpenAPI document, and what shows it."""

import json
import re

from tests.serve.conftest import client_of


def posted(document, path):
    return document["paths"][path]["post"]


def test_the_forms_are_documented(client):
    document = client.get("/openapi.json").json()
    schema = posted(document, "/rerank")["requestBody"]["content"]["application/json"]["schema"]
    assert ["documents" in form["properties"] for form in schema["anyOf"]] == [True, False]
    assert "$ref" not in json.dumps(schema)
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
