"""Filters for messages that other packages log at every start. They do not concern the user. Import this first."""

import logging
import warnings

MESSAGES = {
    # bitsandbytes looks for a faster CPU kernel at each import, and peft imports it.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # It calls bfloat16 "16-bits training: False". The arguments, which it logs next, are right.
    "FlagEmbedding.abc.finetune.reranker.AbsRunner": "Process rank: ",
}


def _leave_out(name: str, beginning: str) -> None:
    logging.getLogger(name).addFilter(lambda record: not str(record.msg).startswith(beginning))


for name, beginning in MESSAGES.items():
    _leave_out(name, beginning)
# peft uses a name that transformers has deprecated.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
