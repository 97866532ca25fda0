"""Fine-tuning on FlagEmbedding's runner: `torchrun --nproc_per_node N -m flagembedding_matryoshka.finetune …`."""

from flagembedding_matryoshka.finetune.data_arguments import MatryoshkaDataArguments
from flagembedding_matryoshka.finetune.model_arguments import MatryoshkaModelArguments
from flagembedding_matryoshka.finetune.modeling import MatryoshkaRerankerModel
from flagembedding_matryoshka.finetune.runner import MatryoshkaRunner
from flagembedding_matryoshka.finetune.trainer import MatryoshkaTrainer
from flagembedding_matryoshka.finetune.training_arguments import MatryoshkaTrainingArguments

__all__ = [
    "MatryoshkaDataArguments",
    "MatryoshkaModelArguments",
    "MatryoshkaRerankerModel",
    "MatryoshkaRunner",
    "MatryoshkaTrainer",
    "MatryoshkaTrainingArguments",
]
