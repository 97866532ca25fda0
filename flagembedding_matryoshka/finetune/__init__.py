"""Fine-tuning on FlagEmbedding's runner: `torchrun --nproc_per_node N -m flagembedding_matryoshka.finetune …`."""

from flagembedding_matryoshka.finetune.arguments import (
    MatryoshkaDataArguments,
    MatryoshkaModelArguments,
    MatryoshkaTrainingArguments,
)
from flagembedding_matryoshka.finetune.modeling import MatryoshkaRerankerModel
from flagembedding_matryoshka.finetune.runner import MatryoshkaRunner
from flagembedding_matryoshka.finetune.trainer import MatryoshkaTrainer

__all__ = [
    "MatryoshkaDataArguments",
    "MatryoshkaModelArguments",
    "MatryoshkaRerankerModel",
    "MatryoshkaRunner",
    "MatryoshkaTrainer",
    "MatryoshkaTrainingArguments",
]
