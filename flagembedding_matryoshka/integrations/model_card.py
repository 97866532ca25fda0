"""The model card that sentence-transformers writes beside a CrossEncoder of ours, and pushes to the hub with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderModelCardData

from flagembedding_matryoshka.setting import COMPRESS_RATIOS

INSTALL = """It needs this package, too, which brings the model's code:

```bash
pip install flagembedding_matryoshka
```

`load_cross_encoder` needs no remote code; `CrossEncoder("{name}", trust_remote_code=True)` loads the same.
"""

DEPTH_AND_WIDTH = """
### Depth and width

This is a re-ranker whose depth and width are chosen when it scores
([arXiv 2501.16302](https://arxiv.org/abs/2501.16302)): a `{decoder}` decoder of
{layers} layers, {width} wide, with a scoring head at each of its exits.

| what | can be | default |
|---|---|---|
| depth: `cutoff_layers` | {exits} | {deepest} |
| width: `compress_layers`, after which the passage is shortened | layers from 1 to {layers}, below the exit | none |
| width: `compress_ratio`, tokens of the passage that become one there | {ratios} | 1, which is off |

```python
model.predict(pairs, cutoff_layers=[{exit}], compress_layers=[{compressed}], compress_ratio=2)
model.max_seq_length  # {max_length}: tokens of query and passage; set it to cut elsewhere

from flagembedding_matryoshka import MatryoshkaReranker

reranker = MatryoshkaReranker("{name}")  # the same scores, in larger batches, with cascades over the exits
```
"""


class MatryoshkaModelCardData(CrossEncoderModelCardData):
    """What sentence-transformers puts into a card, with how this model is loaded, its exits and its widths."""

    def get_default_model_name(self) -> str:
        return f"Matryoshka re-ranker based on {self.base_model}" if self.base_model else "Matryoshka re-ranker"

    def generate_usage_snippet(self) -> str:
        assert self.model is not None
        module: Any = self.model[0]
        config = module.model.config
        name = self.model_id or "cross_encoder_model_id"
        exits = config.exit_layers
        shallow = exits[len(exits) // 2]
        usage = super().generate_usage_snippet().replace('CrossEncoder("', 'load_cross_encoder("', 1)
        usage = usage.replace(
            "from sentence_transformers import CrossEncoder",
            "from flagembedding_matryoshka.cross_encoder import load_cross_encoder",
        )
        return "\n".join(
            (
                INSTALL.format(name=name),
                usage,
                DEPTH_AND_WIDTH.format(
                    name=name,
                    decoder=config.model_type.removeprefix("cost_wise_"),
                    layers=config.num_hidden_layers,
                    width=config.hidden_size,
                    exits=", ".join(map(str, exits)),
                    deepest=exits[-1],
                    exit=shallow,
                    compressed=max(1, shallow // 2),
                    ratios=", ".join(map(str, COMPRESS_RATIOS)),
                    max_length=module.max_seq_length,
                ),
            )
        )


def use_our_card(model: CrossEncoder, base: str | None) -> None:
    """Let a CrossEncoder of our module write our card, with whatever its user said of language, license and so on.

    Args:
        base: what the weights were loaded from; a name on the hub is put into the card.
    """
    card: Any = model.model_card_data
    if type(card) is CrossEncoderModelCardData:
        card.__class__ = MatryoshkaModelCardData
    card.add_tags("matryoshka")
    if card.base_model is None and base is not None and base.count("/") == 1 and not Path(base).exists():
        card.base_model = base
