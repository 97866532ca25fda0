"""The path under which users and saved checkpoints import the sentence-transformers CrossEncoder."""

from flagembedding_matryoshka.integrations.sentence_transformers import (
    MatryoshkaCrossEncoder,
    MatryoshkaModule,
    load_cross_encoder,
)

__all__ = ["MatryoshkaCrossEncoder", "MatryoshkaModule", "load_cross_encoder"]
