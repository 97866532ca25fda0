"""Scores exported directories with vLLM on the CPU, in an environment that has it.

python -I vllm_scores.py JOBS.json SCORES.json

A job is a directory and its pairs.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main():
    from vllm import LLM

    given, output = sys.argv[1:]
    found = []
    for directory, pairs in json.loads(Path(given).read_text()):
        model = LLM(directory, runner="pooling", dtype="float32", max_model_len=512, enforce_eager=True)
        template = Path(directory, "chat_template.jinja").read_text()
        queries, documents = map(list, zip(*pairs, strict=True))
        answers = model.score(queries, documents, chat_template=template, use_tqdm=False)
        found.append([answer.outputs.score for answer in answers])
        del model
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
