"""The model card beside an exported exit: how each runtime loads or serves it."""

from __future__ import annotations

CARD_FILE = "README.md"
METADATA = """---
library_name: {library}
pipeline_tag: text-ranking
tags:
- cross-encoder
- reranker
- matryoshka-export
---
"""
HEAD = """
# {source}, layers 1 to {layer}

A re-ranker: exit {layer} of a layer-wise model of {layers} layers, written by
`flagembedding-matryoshka export --format {format}`. The score of a query and a document is one number.
Scores are {scores}. `matryoshka_export.json` has the fingerprint of the source and the calibration of this exit.
"""
PLAIN = """
## sentence-transformers

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{name}")
scores = model.predict([("how does a wing lift", "air flows faster over the upper side")]){prompt}
```

## transformers

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}")
messages = [{{"role": "query", "content": "how does a wing lift"}}, {{"role": "document", "content": "air flows"}}]
batch = tokenizer.apply_chat_template([messages], padding=True, return_tensors="pt", return_dict=True)
scores = model(**batch).logits[:, 0]
```

## vLLM

```bash
vllm serve {name} --runner pooling --chat-template {name}/chat_template.jinja
curl localhost:8000/rerank -H "Content-Type: application/json" \\
  -d '{{"model": "{name}", "query": "how does a wing lift", "documents": ["air flows"]}}'
```

vLLM applies the activation of `config.json`. Keep `--chat-template`: older versions join the texts without it, and a
model with a default instruction does not start. Texts that are too long are refused; `truncate_prompt_tokens` would cut
the words behind the document.

## infinity

infinity joins query and document without the chat template. Send it the rendered text as the query and an empty
document:

```python
query = tokenizer.apply_chat_template(messages, tokenize=False)
```

## llama.cpp

The converter of llama.cpp takes every Qwen3 classifier for Qwen3-Reranker and makes another head. Use
`flagembedding-matryoshka export --format gguf` instead.
"""
ONNX = """
## onnxruntime

```python
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
session = onnxruntime.InferenceSession("{name}/onnx/model.onnx")
messages = [{{"role": "query", "content": "how does a wing lift"}}, {{"role": "document", "content": "air flows"}}]
batch = tokenizer.apply_chat_template([messages], padding=True, return_tensors="np", return_dict=True)
(scores,) = session.run(["logits"], {{name: batch[name] for name in ("input_ids", "attention_mask")}})
```

sentence-transformers' `backend="onnx"` needs a version of optimum-onnx for the transformers that is installed.
"""
OPENVINO = """
## OpenVINO

```python
import openvino
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = openvino.compile_model("{name}/openvino/openvino_model.xml", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
messages = [{{"role": "query", "content": "how does a wing lift"}}, {{"role": "document", "content": "air flows"}}]
batch = tokenizer.apply_chat_template([messages], padding=True, return_tensors="np", return_dict=True)
scores = model({{name: batch[name] for name in ("input_ids", "attention_mask")}})["logits"]
```

With "bf16" a CPU that multiplies bfloat16 computes in it, and scores differ. Without the hint such a CPU does so, too.
sentence-transformers' `backend="openvino"` needs a version of optimum-intel for the transformers that is installed.
"""
GGUF = """
## llama.cpp

```bash
llama-server --model {name}/{file} --reranking
curl localhost:8080/v1/rerank -d '{{"query": "how does a wing lift", "documents": ["air flows"]}}'
```

llama.cpp answers with the sigmoid of the score. It reads control tokens in a text as control tokens, and replaces
`{{document}}` inside a query.
"""
USES = {"transformers": PLAIN, "onnx": ONNX, "openvino": OPENVINO, "gguf": GGUF}
PROMPT = '  # or prompt="…", an instruction'


def card(
    source: str, layer: int, layers: int, activation: str, format: str, has_instruction: bool, file: str = ""
) -> str:
    """Return the text of a model card.

    Args:
        source: name of the re-ranker.
        layer: the exit.
        layers: number of layers of the re-ranker.
        activation: function that is applied to raw scores, as in `Description`.
        format: as in `MatryoshkaReranker.export`.
        has_instruction: whether the template has a default instruction.
        file: name of the GGUF file.
    """
    scores = (
        "raw logits" if activation == "identity" else f"{activation} of the logit in sentence-transformers and vLLM"
    )
    values = {
        "library": "sentence-transformers" if format == "transformers" else format,
        "source": source.rstrip("/").rpartition("/")[2],
        "layer": layer,
        "layers": layers,
        "format": format,
        "scores": scores,
        "name": "DIR",
        "prompt": PROMPT if has_instruction else "",
        "file": file,
    }
    return (METADATA + HEAD + USES[format]).format(**values)


def is_own_card(text: str) -> bool:
    """Return whether an earlier export wrote a model card. The next export replaces it."""
    return "\n- matryoshka-export\n" in text
