import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

SCORE = """
import json, resource, sys, threading
import torch
from flagembedding_matryoshka import MatryoshkaReranker

torch.set_num_threads(1)
reranker = MatryoshkaReranker(
    sys.argv[1], start_layer=2, max_layer=2, dtype="float32", devices="cpu", max_length=512, batch_size=16
)
pairs = [("a wing", "air flows over a wing " * 100)] * 8


def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    reranker.compute_score(pairs, show_progress_bar=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults = []
for run in range(8):
    thread = threading.Thread(target=lambda: faults.append(count()))  # as in the server
    thread.start()
    thread.join()
print(json.dumps(faults))
"""


def count_faults(path, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCORE, str(path)],
        env=environment | variables,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_pass_on_a_cpu_faults_no_memory_in_that_an_earlier_pass_had(tiny_raw_model_path, tiny_tokenizer, tmp_path):
    torch.manual_seed(0)
    wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 2048, "num_hidden_layers": 2}
    config = MistralConfig.from_pretrained(tiny_raw_model_path, max_position_embeddings=1024, **wide)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    kept = count_faults(tmp_path)
    left_alone = count_faults(tmp_path, MALLOC_TRIM_THRESHOLD_="131072")
    assert min(left_alone) > 10_000
    assert min(kept) < 8 * 50 and sum(kept) < sum(left_alone) / 4  # some passes enlarge the heap, ever fewer of them
