import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers import MistralConfig, MistralForCausalLM

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.memory import PATIENCE, TokenLimit, as_shortage
from flagembedding_matryoshka.text.pairs import count_tokens
from tests.batches import close, out_of_memory_above, tokenized_pair, tokenized_pairs

ONE_QUERY = [("a wing", f"passage {number}") for number in range(4)]

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


def pair(tokens):
    return tokenized_pair(list(range(tokens)), 1, 1)


def more_than_there_is():
    return torch.empty(2**58)


def error_of(batch):
    try:
        return batch()
    except RuntimeError as error:
        return error


@given(tokenized_pairs(min_size=1), st.integers(1, 40))
def test_the_first_pairs_that_fit_are_taken(pairs, most):
    limit = TokenLimit()
    assert limit.take(pairs) is pairs
    limit.tokens = most
    taken = limit.take(pairs)
    assert list(taken) == pairs[: len(taken)] and len(taken) >= 1
    assert len(taken) == 1 or count_tokens(taken) <= most
    assert len(taken) == len(pairs) or count_tokens(pairs[: len(taken) + 1]) > most


def test_a_shortage_of_a_cpu_is_one_too_and_nothing_else_is():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        more_than_there_is()
    shortage = as_shortage(error_of(more_than_there_is))
    assert "can't allocate memory" in shortage
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        as_shortage(error_of(lambda: torch.ones(2, 3) @ torch.ones(2, 3)))


def test_what_was_short_once_is_tried_again_and_ever_later_where_it_stays_short():
    limit = TokenLimit()
    for _ in range(5):  # several halvings of one shortage
        limit.halve([pair(20), pair(20)], 0, "no room")
    first = limit.tokens
    tried = []
    for batch in range(20 * PATIENCE):
        limit.fitted()
        if limit.tokens > first:
            tried.append(batch)
            limit.halve([pair(20), pair(20)], 0, "no room")
    waits = [later - earlier for earlier, later in pairwise(tried)]
    assert tried[0] == PATIENCE - 1 and waits == [PATIENCE * 2 ** (1 + n) for n in range(len(waits))] and len(waits) > 1


def test_a_first_shortage_after_many_batches_without_a_limit_waits_no_longer():
    limit = TokenLimit()
    for _ in range(PATIENCE):
        limit.fitted()
    limit.halve([pair(20), pair(20)], 0, "no room")
    first = limit.tokens
    for _ in range(PATIENCE):
        limit.fitted()
    assert limit.tokens == 2 * first


class SlowCount(int):
    """A number to which another thread could add while this one adds."""

    def __add__(self, other):
        time.sleep(0.001)
        return SlowCount(int(self) + other)


def test_no_batch_of_another_thread_is_lost_in_the_count():
    limit = TokenLimit()
    limit.halve([pair(20), pair(20)], 0, "no room")
    first, limit._fitted = limit.tokens, SlowCount()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: limit.fitted(), range(PATIENCE - 1)))
    assert limit.tokens == first
    limit.fitted()
    assert limit.tokens == 2 * first


@pytest.mark.usefixtures("one_thread")
def test_batches_grow_back_when_memory_is_free_again(tiny_layerwise_path, monkeypatch):
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")
    expected = reranker.compute_score(ONE_QUERY)
    model = reranker.model.model
    with monkeypatch.context() as short:
        short.setattr(model, "embed", out_of_memory_above(model, 1))
        close(reranker.compute_score(ONE_QUERY), expected)
    sizes = []
    embed = model.embed

    def noting(ids, packed, *others):
        sizes.append(len(packed.sequences))
        return embed(ids, packed, *others)

    monkeypatch.setattr(model, "embed", noting)
    for _ in range(PATIENCE):
        close(reranker.compute_score(ONE_QUERY), expected)
    assert sizes[0] == 1 and sizes[-1] == 4
