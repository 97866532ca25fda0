"""The first name of [`~flagembedding_matryoshka.integrations.adapter`]."""

from flagembedding_matryoshka.integrations.adapter import RankingAdapter as Ranking

__all__ = ["Ranking"]
