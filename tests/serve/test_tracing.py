"""Spans of OpenTelemetry."""

import logging

import pytest

pytest.importorskip("opentelemetry.instrumentation.asgi", reason="needs the extra otel")
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flagembedding_matryoshka.serve.tracing import WithTraceparent
from tests.serve.conftest import client_of

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"query": "q", "texts": ["a wing", "air"]}


@pytest.fixture
def spans(monkeypatch):
    """Finished spans, by the provider of the process, which can be set only once."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter.get_finished_spans


def test_spans_of_a_request_are_children_of_the_clients(reranker, spans, caplog):
    caplog.handler.addFilter(WithTraceparent())
    with client_of(reranker) as client, caplog.at_level(logging.INFO, "flagembedding_matryoshka"):
        client.get("/ready")
        header = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert client.post("/rerank", json=BODY, headers=header).status_code == 200
    found = {span.name: span for span in spans()}
    assert set(found) == {"POST /rerank", "parse", "tokenise", "compute", "queue"}
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE}
    request = found["POST /rerank"]
    assert f"{request.parent.span_id:016x}" == PARENT
    for name, parent in (("parse", request), ("tokenise", request), ("compute", request), ("queue", found["compute"])):
        assert found[name].parent.span_id == parent.context.span_id, name
    assert found["compute"].attributes["documents"] == 2
    assert found["compute"].start_time <= found["queue"].start_time <= found["queue"].end_time
    assert found["queue"].end_time <= found["compute"].end_time
    (record,) = [record for record in caplog.records if hasattr(record, "path")]
    assert record.traceparent == f"00-{TRACE}-{request.context.span_id:016x}-01"


def test_records_without_a_span_have_none():
    record = logging.makeLogRecord({})
    assert WithTraceparent().filter(record) and record.traceparent is None


def test_who_leaves_the_queue_ends_its_span(spans):
    from flagembedding_matryoshka.serve.tracing import queue_span

    with pytest.raises(ValueError), queue_span() as started:
        raise ValueError
    (span,) = spans()
    assert span.name == "queue" and span.end_time is not None
    with queue_span() as started:
        started()
    assert len(spans()) == 2
