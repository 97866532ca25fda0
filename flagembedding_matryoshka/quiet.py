"""What other packages say at every start, and is not about the user's data, is not said: imported before they are."""

import logging
import warnings

SAID_ANYWAY = {
    # bitsandbytes looks for a faster kernel on CPUs whenever it is imported, which peft does.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # It calls bfloat16 "16-bits training: False", and says nothing that the arguments below it do not.
    "FlagEmbedding.abc.finetune.reranker.AbsRunner": "Process rank: ",
}


def _leave_out(name: str, beginning: str) -> None:
    logging.getLogger(name).addFilter(lambda record: not str(record.msg).startswith(beginning))


for name, beginning in SAID_ANYWAY.items():
    _leave_out(name, beginning)
# peft asks transformers by a name that transformers has given up.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
