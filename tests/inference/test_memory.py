import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.memory import PATIENCE, OutOfMemory, TokenLimit, computed
from tests.batches import close, out_of_memory_above, tokenized_pair

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("a wing", f"passage {number}") for number in range(4)]


def pair(tokens):
    return tokenized_pair(list(range(tokens)), 1, 1)


def more_than_there_is():
    return torch.empty(2**58)


def test_a_shortage_of_a_cpu_is_one_too_and_nothing_else_is():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        more_than_there_is()
    with pytest.raises(OutOfMemory, match="can't allocate memory"):
        computed(more_than_there_is)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        computed(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    assert computed(lambda: 5) == 5


def test_what_was_short_once_is_tried_again_and_ever_later_where_it_stays_short():
    limit = TokenLimit()
    for _ in range(5):  # several halvings of one shortage
        limit.halve([pair(20), pair(20)], 0, OutOfMemory())
    first = limit.tokens
    tried = []
    for batch in range(20 * PATIENCE):
        limit.fitted()
        if limit.tokens > first:
            tried.append(batch)
            limit.halve([pair(20), pair(20)], 0, OutOfMemory())
    waits = [later - earlier for earlier, later in pairwise(tried)]
    assert tried[0] == PATIENCE - 1 and waits == [PATIENCE * 2 ** (1 + n) for n in range(len(waits))] and len(waits) > 1


def test_a_first_shortage_after_many_batches_without_a_limit_waits_no_longer():
    limit = TokenLimit()
    for _ in range(PATIENCE):
        limit.fitted()
    limit.halve([pair(20), pair(20)], 0, OutOfMemory())
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
    limit.halve([pair(20), pair(20)], 0, OutOfMemory())
    first, limit._fitted = limit.tokens, SlowCount()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: limit.fitted(), range(PATIENCE - 1)))
    assert limit.tokens == first
    limit.fitted()
    assert limit.tokens == 2 * first


def test_batches_grow_back_when_memory_is_free_again(tiny_layerwise_path, monkeypatch):
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")
    expected = reranker.compute_score(PAIRS)
    model = reranker.model.model
    with monkeypatch.context() as short:
        short.setattr(model, "embed", out_of_memory_above(model, 1))
        close(reranker.compute_score(PAIRS), expected)
    sizes = []
    embed = model.embed

    def noting(ids, packed, setting):
        sizes.append(len(packed.sequences))
        return embed(ids, packed, setting)

    monkeypatch.setattr(model, "embed", noting)
    for _ in range(PATIENCE):
        close(reranker.compute_score(PAIRS), expected)
    assert sizes[0] == 1 and sizes[-1] == 4
