"""Bearer tokens, and who may ask what."""

import os

import pytest

from flagembedding_matryoshka.serve import create_app
from flagembedding_matryoshka.serve.keys import Keys, read_keys
from tests.serve.conftest import client_of

BODY = {"query": "q", "texts": ["t"]}


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def write(path, text, version):
    """Write a file whose time differs from that of other versions."""
    path.write_bytes(text)
    os.utime(path, (version, version))


def test_lines_are_names_and_keys():
    assert read_keys(b"secret\n", "here") == {"key": b"secret"}
    text = "ann  one\n\n bob clé-voilà \r\nthree\n".encode()
    assert read_keys(text, "here") == {"ann": b"one", "bob": "clé-voilà".encode(), "key": b"three"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"ann one two", "line 1 of here has 3 words, but must be NAME KEY"),
        (b"ann one\nann two", "line 2 of here: two keys are named 'ann'"),
        (b"one\ntwo", "line 2 of here: two keys are named 'key'. Write NAME KEY"),
        (b" \n", "the API key in here is empty"),
    ],
)
def test_files_that_are_wrong_are_explained(text, message):
    with pytest.raises(ValueError, match=message):
        read_keys(text, "here")


def test_a_file_is_read_again_when_it_changes(tmp_path, caplog):
    path = tmp_path / "keys"
    write(path, b"ann one\nbob two", 1)
    keys = Keys.of_file(path)
    assert [keys.name_of(key) for key in (b"one", b"two", b"three", b"")] == ["ann", "bob", None, None]
    write(path, b"ann three\nbob two", 2)
    assert [keys.name_of(key) for key in (b"one", b"two", b"three")] == [None, "bob", "ann"]
    for text in (b"", None):
        path.unlink() if text is None else write(path, text, 3)
        assert [keys.name_of(key) for key in (b"two", b"three", b"two")] == ["bob", "ann", "bob"]
    assert caplog.text.count("the keys stay as they were") == 2
    write(path, b"eve four", 4)
    assert [keys.name_of(key) for key in (b"two", b"four")] == [None, "eve"]


def test_the_log_names_the_key_and_does_not_tell_it(reranker, tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text("ann one\nbob two\n")
    with client_of(reranker, api_key=Keys.of_file(path)) as client, caplog.at_level("INFO", "flagembedding_matryoshka"):
        for key, status in (("one", 200), ("two", 200), ("three", 401)):
            assert client.post("/rerank", json=BODY, headers=bearer(key)).status_code == status
    records = [record for record in caplog.records if hasattr(record, "path")]
    assert [getattr(record, "key", None) for record in records] == ["ann", "bob", None]
    assert records[0].getMessage().endswith("key ann")
    assert not any(key in caplog.text for key in ("one", "two", "three"))


@pytest.mark.parametrize("protect_all", [True, False])
def test_which_paths_ask_for_the_key(reranker, protect_all):
    with client_of(reranker, api_key="secret", protect_all=protect_all) as client:
        for path in ("/info", "/v1/models", "/v1/models/tiny", "/metrics"):
            answer = client.get(path)
            assert answer.status_code == (401 if protect_all else 200), path
            assert client.get(path, headers=bearer("secret")).status_code == 200
        for path in ("/live", "/ready", "/health", "/", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        responses = client.get("/openapi.json").json()["paths"]["/info"]["get"]["responses"]
        assert ("401" in responses) is protect_all


def test_all_cannot_be_protected_without_a_key(reranker):
    with pytest.raises(ValueError, match="protect_all needs an API key"):
        create_app(reranker, "tiny", protect_all=True)


def test_pages_of_allowed_origins_may_ask(reranker):
    page = "https://example.com"
    asked = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with client_of(reranker, api_key="secret", allow_origins=[page]) as client:
        allowed = client.options("/rerank", headers=asked)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == page
        answer = client.post("/rerank", json=BODY, headers=bearer("secret") | {"Origin": page})
        assert answer.headers["access-control-allow-origin"] == page
        assert client.options("/rerank", headers=asked | {"Origin": "https://example.org"}).status_code == 400
    with client_of(reranker) as client:
        assert "access-control-allow-origin" not in client.post("/rerank", json=BODY, headers={"Origin": page}).headers


def test_other_hosts_are_refused(reranker):
    with client_of(reranker, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "::1"]) as client:
        for host, status in (("localhost:80", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("example.com", 400)):
            assert client.post("/rerank", json=BODY, headers={"Host": host}).status_code == status, host
