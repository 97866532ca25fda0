"""Filters for messages of other packages that this package causes and that do not concern the user. Import this first.

The same messages stay if other code causes them.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

MESSAGES = {
    # bitsandbytes looks for a faster CPU kernel at each import, and peft imports it.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # It calls bfloat16 "16-bits training: False". The arguments, which it logs next, are right.
    "FlagEmbedding.abc.finetune.reranker.AbsRunner": "Process rank: ",
}
PACKAGE = __name__.partition(".")[0]


def _leave_out(name: str, beginning: str) -> None:
    def concerns_user(record: logging.LogRecord) -> bool:
        return not (str(record.msg).startswith(beginning) and _is_called_by_us())

    logging.getLogger(name).addFilter(concerns_user)


def _is_called_by_us() -> bool:
    """Return whether code of this package, apart from this file, is on the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        if module != __name__ and module.partition(".")[0] == PACKAGE:
            return True
        frame = frame.f_back
    return False


@contextmanager
def without_deprecation() -> Iterator[None]:
    """Silence peft's use of a name that transformers has deprecated, in each PeftModel that is made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


for name, beginning in MESSAGES.items():
    _leave_out(name, beginning)
