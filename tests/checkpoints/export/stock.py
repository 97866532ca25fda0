"""Scores exported directories with transformers and sentence-transformers alone.

python -I -S stock.py SITE_PACKAGES JOBS.json SCORES.json

A job is a directory, its pairs and its instructions.

With -I Python leaves out the working directory and PYTHONPATH, with -S site-packages. SITE_PACKAGES is then added to
sys.path. Python runs .pth files only of directories that `site` adds, and an editable install is importable by its .pth
file alone. So our package cannot be imported here, which is asserted before and after scoring. An install that copies
our package into site-packages fails the assertion.
"""

import importlib.util
import json
import sys
from pathlib import Path


def score(directory, pairs, instructions):
    """Scores of both libraries for each instruction, under the name of the directory and the instruction."""
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = {}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    cross_encoder = CrossEncoder(directory, device="cpu")
    for instruction in instructions:
        system = [] if instruction is None else [{"role": "system", "content": instruction}]
        messages = [
            [*system, {"role": "query", "content": query}, {"role": "document", "content": document}]
            for query, document in pairs
        ]
        batch = tokenizer.apply_chat_template(messages, padding=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            plain = model(**batch).logits[:, 0].tolist()
        prompt = {} if instruction is None else {"prompt": instruction}
        stock = cross_encoder.predict(pairs, batch_size=16, show_progress_bar=False, **prompt).tolist()
        found[f"{directory} {instruction}"] = {"transformers": plain, "CrossEncoder": stock}
    return found


def assert_alone():
    spec = importlib.util.find_spec("flagembedding_matryoshka")
    assert spec is None, f"flagembedding_matryoshka can be imported from {spec.origin}"


def main():
    site_packages, given, output = sys.argv[1:]
    sys.path.append(site_packages)
    assert_alone()

    import torch

    torch.set_num_threads(1)
    found = {}
    for job in json.loads(Path(given).read_text()):
        found |= score(*job)
    assert_alone()
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
