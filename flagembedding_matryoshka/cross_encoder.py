"""The name under which checkpoints and users find the sentence-transformers CrossEncoder."""

from flagembedding_matryoshka.integrations.cross_encoder import MatryoshkaCrossEncoder, load_cross_encoder
from flagembedding_matryoshka.integrations.sentence_transformers import MatryoshkaModule

__all__ = ["MatryoshkaCrossEncoder", "MatryoshkaModule", "load_cross_encoder"]
