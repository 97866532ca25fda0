import json

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.cli.export import main


def test_what_is_exported_scores_as_the_whole(tiny_layerwise_path, reranker, tmp_path, capsys):
    main(["--model", str(tiny_layerwise_path), "--cutoff_layers", "3", "4", "--output", str(tmp_path / "part")])
    part = MatryoshkaReranker(str(tmp_path / "part"), dtype="float32", devices="cpu")
    assert part.config.exit_layers == [3, 4] and part.config.dtype == torch.float32
    pair = ("wing", "a wing and a lift")
    assert part.compute_score(pair, cutoff_layers=[3, 4]) == reranker.compute_score(pair, cutoff_layers=[3, 4])
    assert "Wrote" in capsys.readouterr().out


def test_instruction_and_lengths_are_written(tiny_layerwise_path, tmp_path):
    words = ["--template", "mxbai-v2", "--instruction", "Is it?", "--max_length", "40", "--query_max_length", "9"]
    main(["--model", str(tiny_layerwise_path), "--output", str(tmp_path / "part"), *words])
    part = MatryoshkaReranker(str(tmp_path / "part"), devices="cpu")
    assert (part.description.instruction.value, part.max_length, part.query_max_length) == ("Is it?", 40, 9)


def test_a_directory_that_holds_something_is_left_alone(tiny_layerwise_path, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path, tmp_path / "file"):
        with pytest.raises(SystemExit):
            main(["--model", str(tiny_layerwise_path), "--output", str(output)])
        assert f"--output {output} exists and is not an empty directory" in capsys.readouterr().err


def test_a_format_is_written_for_each_exit(tiny_layerwise_path, reranker, tmp_path):
    options = ["--cutoff_layers", "3", "4", "--format", "transformers", "--output", str(tmp_path / "cut")]
    main(["--model", str(tiny_layerwise_path), *options])
    for layer in (3, 4):
        part = MatryoshkaReranker(str(tmp_path / "cut" / f"exit-{layer}"), dtype="float32", devices="cpu")
        pair = ("wing", "a wing and a lift")
        assert part.compute_score(pair) == pytest.approx(reranker.compute_score(pair, cutoff_layers=layer), abs=1e-5)


def test_a_precision_belongs_to_its_format(tiny_layerwise_path, tmp_path):
    options = ["--format", "transformers", "--precision", "q8_0", "--output", str(tmp_path / "cut")]
    with pytest.raises(ValueError, match="precision='q8_0', but format='transformers' takes none"):
        main(["--model", str(tiny_layerwise_path), *options])


def test_the_pairs_of_a_sample_are_read_and_belong_to_int8(tiny_layerwise_path, tmp_path):
    rows = [{"query": f"wing {number}", "passage": "a wing and a lift"} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--format", "openvino", "--precision", "bf16", "--sample", str(tmp_path / "rows.jsonl")]
    with pytest.raises(ValueError, match="sample=3 pairs, but precision='bf16': only 'int8'"):
        main(["--model", str(tiny_layerwise_path), *options, "--output", str(tmp_path / "cut")])
