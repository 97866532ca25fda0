"""Scores exported directories with transformers and sentence-transformers alone.

python stock.py PAIRS.json SCORES.json DIRECTORY…
"""

import json
import sys

sys.modules["flagembedding_matryoshka"] = None  # an import of it raises


def main():
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(1)
    given, output, *directories = sys.argv[1:]
    with open(given) as file:
        read = json.load(file)
    pairs, instructions = read["pairs"], read["instructions"]
    found = {}
    for directory in directories:
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
    with open(output, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
