import torch

from flagembedding_matryoshka.models.packing import PackedBatch
from flagembedding_matryoshka.models.query_sharing import share_queries


def packed_of(queries, passages, prompts):
    lengths = (torch.tensor(part) for part in (queries, passages, prompts))
    return PackedBatch(*lengths, torch.device("cpu"))


def test_neighbours_with_one_query_share_it():
    #                     a b x p | a b y z p | c x p
    token_ids = torch.tensor([[1, 2, 7, 9, 1, 2, 8, 7, 9, 3, 7, 9]])
    shared_ids, shared = share_queries(token_ids, packed_of([2, 2, 1], [1, 2, 1], [1, 1, 1]))
    assert shared_ids.tolist() == [[1, 2, 7, 9, 8, 7, 9, 3, 7, 9]]
    assert shared.cu_seqlens.tolist() == [0, 2, 4, 7, 10]
    assert shared.prefixes.tolist() == [-1, 0, 0, -1]
    assert shared.sequence_lengths.tolist() == [4, 5, 3]
    assert shared.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 2]]


def test_queries_apart_or_different_are_left_alone():
    token_ids = torch.tensor([[1, 7, 9, 2, 7, 9, 1, 8, 9]])
    packed = packed_of([1, 1, 1], [1, 1, 1], [1, 1, 1])
    assert share_queries(token_ids, packed) == (token_ids, packed)


def test_sequences_that_are_all_query_are_left_alone():
    token_ids = torch.tensor([[1, 2, 1, 2]])
    packed = packed_of([2, 2], [0, 0], [0, 0])
    assert share_queries(token_ids, packed) == (token_ids, packed)
