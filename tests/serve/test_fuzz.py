"""Whatever fits the OpenAPI document, or nearly does, is answered as it says."""

import pytest
from hypothesis import HealthCheck, given, settings


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *((path, mode) for path in ("/rerank", "/score") for mode in ("POSITIVE", "NEGATIVE")),
        *((path, "POSITIVE") for path in ("/v1/models", "/v1/models/{model_id}", "/info", "/live", "/ready")),
    ],
)
def test_answers_are_those_of_the_document(client, path, mode):
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as of_documents

    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    operation = next(iter(schema[path].values()))
    asked = [
        checks.not_a_server_error,
        of_documents.status_code_conformance,
        of_documents.content_type_conformance,
        of_documents.response_schema_conformance,
    ]
    strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=strategy)
    def check(case):
        case.call_and_validate(checks=asked)

    check()
