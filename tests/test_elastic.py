"""The commands of docs/elastic.md, word for word but for --use_cpu, on a tiny model and collection."""

import re
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from flagembedding_matryoshka import MatryoshkaReranker
from tests.collection import WORDS, write_collection
from tests.pages import run_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TEXT = (Path(__file__).parents[1] / "docs" / "elastic.md").read_text(encoding="utf-8")
COMMANDS = [block.replace("\\\n", " ").strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)]


def test_from_queries_to_a_small_model(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    raw = MistralForCausalLM(MistralConfig(vocab_size=len(tiny_tokenizer), num_hidden_layers=18, **shape))
    raw.save_pretrained("raw")
    tiny_tokenizer.save_pretrained("raw")
    MatryoshkaReranker("raw", dtype="float32", devices="cpu").export("MODEL", cutoff_layers=[18])
    topics, others = WORDS[:6], WORDS[6:]
    write_collection(
        tmp_path / "DIR",
        corpus=[{"_id": f"{topic}-{other}", "text": f"{topic} {other}"} for topic in topics for other in others],
        queries=[{"_id": topic, "text": f"what is {topic}"} for topic in topics],
        judgements=[(topic, f"{topic}-{others[0]}", 1) for topic in topics[:2]],
        split="test",
    )

    lists, training, evaluation = COMMANDS
    for command in (lists, f"{training} --use_cpu", evaluation):
        run_command(command)

    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(compile(block, "elastic.md", "exec"), names)
    assert names["reranker"].planned.depth < 18
    assert MatryoshkaReranker("small", devices="cpu").config.num_hidden_layers == 12
