from flagembedding_matryoshka.mining.digests import digest_model, digest_texts


def test_the_digest_of_a_model_ignores_checkpoints_of_its_training(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"a")
    before = digest_model(str(tmp_path))
    (tmp_path / "checkpoint-1" / "optimizer.bin").write_bytes(b"a")
    assert digest_model(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"b")
    assert digest_model(str(tmp_path)) != before
    assert digest_model("BAAI/some-name") is None


def test_digests_depend_on_the_ends_of_texts():
    assert digest_texts(["ab", "c"]) == digest_texts(iter(["ab", "c"])) != digest_texts(["a", "bc"])
