"""sentence-transformers: a CrossEncoder of a Matryoshka re-ranker, its module and its model card."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import InputModule
from sentence_transformers.cross_encoder import CrossEncoderModelCardData
from sentence_transformers.util import import_from_string
from sentence_transformers.util.decorators import cross_encoder_predict_rank_args_decorator, deprecated_kwargs
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.checkpoints.adapters import token_adapter_ratio
from flagembedding_matryoshka.checkpoints.export import SENTENCE_TRANSFORMERS_FILE, remove_written
from flagembedding_matryoshka.checkpoints.gguf import locate, resolve
from flagembedding_matryoshka.checkpoints.loading import hub_options, inspect_checkpoint, load_model, load_tokenizer
from flagembedding_matryoshka.inference.device import resolve_dtype
from flagembedding_matryoshka.inference.fusion import AUTO, as_weight, best_first, fuse, read_first_stage
from flagembedding_matryoshka.inference.inputs import as_count, as_lists, as_pairs, excerpt
from flagembedding_matryoshka.models.batch import pack_pairs
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.private import find_file
from flagembedding_matryoshka.setting import COMPRESS_RATIOS, Layers, Setting
from flagembedding_matryoshka.text.pairs import PairTokenizer, TokenizedPair
from flagembedding_matryoshka.text.templates import Template

HUB = ("token", "cache_folder", "revision", "local_files_only", "trust_remote_code")
KWARGS = ("model_kwargs", "processor_kwargs", "config_kwargs")
FIRST_NAMES = {
    "automodel_args": "model_kwargs",
    "tokenizer_args": "processor_kwargs",
    "tokenizer_kwargs": "processor_kwargs",
    "config_args": "config_kwargs",
    "cache_dir": "cache_folder",
}
"""Old names of CrossEncoder's arguments, which are accepted too."""
FUSION_ARGUMENTS = ("first_stage_scores", "first_stage", "fusion")


class MatryoshkaCrossEncoder(CrossEncoder):
    """A CrossEncoder whose `predict` and `rank` take depth and width. `rank` also takes the first stage's scores.

    Arguments that sentence-transformers has deprecated, such as `sentences`, are accepted with its warnings.
    """

    @deprecated_kwargs(sentences="inputs")
    def predict(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Score any iterable of pairs, as `CrossEncoder.predict`.

        Raises:
            TypeError: as `CrossEncoder.predict`, and if an argument of fusion is given, which only `rank` takes.
        """
        for name in FUSION_ARGUMENTS:
            if kwargs.pop(name, None) is not None:
                raise TypeError(
                    f"{name} is an argument of rank, which fuses the scores of one query's documents with those of the "
                    "first stage: leave it out here."
                )
        return super().predict(list(inputs) if isinstance(inputs, Iterator) else inputs, *args, **kwargs)

    @cross_encoder_predict_rank_args_decorator
    def rank(  # type: ignore[override]
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable | None = None,
        device: str | list[str | torch.device] | None = None,
        pool: dict[str, Any] | None = None,
        chunk_size: int | None = None,
        first_stage_scores: Iterable[float | None] | None = None,
        first_stage: Literal["order"] | None = None,
        fusion: float | None = None,
        **depth_and_width: Any,
    ) -> list[dict[str, int | float | str]]:
        """Rank documents as `CrossEncoder.rank`, by the scores before the activation, which can round them to equal
        scores.

        Args:
            first_stage_scores, first_stage, fusion: as in `MatryoshkaReranker.rank`; None, the default, is no fusion.
                Documents then rank by z(score before the activation) + fusion · z(first-stage score). `fusion` must be
                a number: a CrossEncoder has no plan for "auto".
            depth_and_width: `cutoff_layers`, `compress_layers` and `compress_ratio`.

        Returns:
            As `CrossEncoder.rank`; with first-stage scores also "first_stage_score" and "fused_score" of each document.

        Raises:
            TypeError: if `documents` is not a list of strings, an argument is unknown, or a first-stage score or
                `fusion` is not a number.
            ValueError: if `top_k` is less than 1; if the number of first-stage scores is not that of documents, or one
                is not finite; if both `first_stage_scores` and `first_stage` are given; if one of them is given without
                `fusion`, or `fusion` without them; or if `fusion` is negative, not finite or "auto".
        """
        if top_k is not None:
            top_k = as_count("top_k", top_k, ", or None for all documents")
        (query,), (documents,) = as_lists([query], [documents])
        of_query = None if first_stage_scores is None else [first_stage_scores]
        ((_, _, first),) = read_first_stage([(query, documents)], of_query, first_stage)
        weight = _weight(fusion, has_first_stage=first is not None)
        if not documents:
            return []
        raw = self.predict(
            [(query, document) for document in documents],
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            activation_fn=nn.Identity(),
            convert_to_tensor=True,
            device=device,
            pool=pool,
            chunk_size=chunk_size,
            **depth_and_width,
        )
        raw = raw.float().cpu()
        scores = (activation_fn or self.activation_fn or nn.Identity())(raw).tolist()
        hits: list[dict[str, int | float | str]] = [
            {"corpus_id": index, "score": score} for index, score in enumerate(scores)
        ]
        order = raw.argsort(descending=True, stable=True)
        if first is not None and weight is not None:
            fused = fuse(raw, torch.tensor(first, dtype=torch.float64), weight)
            order = best_first(fused, raw)
            for hit, of_first_stage, of_both in zip(hits, first, fused.tolist(), strict=True):
                hit |= {"first_stage_score": of_first_stage, "fused_score": of_both}
        return [
            hits[index] | ({"text": documents[index]} if return_documents else {}) for index in order[:top_k].tolist()
        ]


def _weight(fusion: Any, has_first_stage: bool) -> float | None:
    """Check `fusion` and return the weight of the first stage's scores; None without such scores.

    Raises:
        TypeError: if `fusion` is not a number.
        ValueError: if there are scores without a weight or a weight without scores, or the weight is "auto", negative
            or not finite.
    """
    if fusion is None and not has_first_stage:
        return None
    if fusion is None:
        raise ValueError("first_stage_scores and first_stage need a weight: give fusion=, a number of at least 0.")
    if not has_first_stage:
        raise ValueError(
            f"fusion={excerpt(fusion)} needs the first stage's scores: give first_stage_scores, or first_stage='order' "
            "for documents in its order."
        )
    if isinstance(fusion, str) and fusion == AUTO:
        raise ValueError(
            f"fusion={AUTO!r}: a CrossEncoder has no plan. Give a number, such as MatryoshkaReranker's plan.fusion."
        )
    return as_weight(fusion)


def load_cross_encoder(
    path: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    num_labels: int | None = None,
    backend: str = "torch",
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    activation_fn: Callable | None = None,
    **kwargs: Any,
) -> MatryoshkaCrossEncoder:
    """Load a CrossEncoder of "smollm2" or of any checkpoint.

    Its `predict` returns the raw scores of `compute_score`, unless the checkpoint was saved by sentence-transformers
    with an activation function.

    `CrossEncoder(path, trust_remote_code=True)` loads the checkpoints of `export` and fine-tuning too. It needs the
    argument because sentence-transformers does not import modules of other packages otherwise.

    Args:
        path: name or path of the checkpoint.
        max_length: as in `MatryoshkaReranker`; None is the length that the checkpoint was saved with, or 512.
        num_labels: 1 or None.
        backend: "torch".
        prompts, default_prompt_name: instructions by name, in addition to those saved with the checkpoint.
        activation_fn: function of the scores; None is the one that the checkpoint was saved with, or none.
        kwargs: other arguments of CrossEncoder, such as `device`, `model_kwargs={"dtype": …}`, `revision` and `token`.

    Raises:
        TypeError: if CrossEncoder has no such argument, it has no effect here, or it is given twice.
        ValueError: as `MatryoshkaModule.load`.
    """
    kwargs = _renamed(kwargs)
    if refused := sorted({"modules", "classifier_dropout", "keep_in_fp32_modules"} & kwargs.keys()):
        raise TypeError(f"{refused} have no effect here, because the checkpoint has its own modules: leave them out.")
    of_loading = {name: kwargs.pop(name) for name in (*HUB, *KWARGS) if kwargs.get(name) is not None}
    of_loading.setdefault("cache_folder", os.getenv("SENTENCE_TRANSFORMERS_HOME"))
    for name, value, place, inner in (
        ("max_length", max_length, "processor_kwargs", "model_max_length"),
        ("num_labels", num_labels, "config_kwargs", "num_labels"),
    ):
        if value is not None:
            if inner in (others := of_loading.get(place, {})):
                raise TypeError(f"{name}={value} and {place}'s {inner}={others[inner]!r}: give one of them.")
            of_loading[place] = {**others, inner: value}
    module = MatryoshkaModule.load(str(path), backend=backend, **of_loading)
    saved = _saved_config(str(path), of_loading)
    return MatryoshkaCrossEncoder(
        modules=[module],
        activation_fn=activation_fn or _activation(module.activation),
        prompts={**saved.get("prompts", {}), **(prompts or {})},
        default_prompt_name=default_prompt_name or saved.get("default_prompt_name"),
        local_files_only=of_loading.get("local_files_only", False),
        trust_remote_code=of_loading.get("trust_remote_code", False),
        **kwargs,
    )


def _activation(name: str) -> Callable:
    """Return the activation function that a checkpoint names, a class of torch."""
    known = {"identity": nn.Identity, "sigmoid": nn.Sigmoid}
    return known[name]() if name in known else import_from_string(name)()


def _renamed(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments under their new names; old names with the value None are dropped.

    Raises:
        TypeError: if an argument is given under two names.
    """
    found = {name: value for name, value in given.items() if name not in FIRST_NAMES}
    names = {name: name for name, value in found.items() if value is not None}
    for first, name in FIRST_NAMES.items():
        if given.get(first) is None:
            continue
        if name in names:
            raise TypeError(f"{first} and {names[name]} are one argument with two names: give one of them.")
        found[name], names[name] = given[first], first
    return found


def _saved_config(path: str, of_loading: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that sentence-transformers saved with a CrossEncoder; empty if there is none."""
    given = {name: of_loading.get(name) for name in ("token", "revision", "local_files_only")}
    hub = hub_options(of_loading["cache_folder"], **given)  # type: ignore[arg-type]
    place = resolve(locate(path), of_loading["cache_folder"])
    name = "config_sentence_transformers.json"
    file = find_file(place, name, **hub)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


class MatryoshkaModule(InputModule):
    """Tokenise pairs, pack them without padding and score them.

    `CrossEncoder.predict` takes `cutoff_layers` (one), `compress_layers` and `compress_ratio` per call.
    """

    config_file_name = "matryoshka_config.json"
    config_keys = ["query_instruction", "passage_instruction", "prompt", "query_max_length", "max_length"]
    forward_kwargs = {"cutoff_layers", "compress_layers", "compress_ratio"}
    save_in_root = True

    def __init__(
        self,
        model: CostWiseForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        query_instruction: str | None = None,
        passage_instruction: str | None = None,
        prompt: str | None = None,
        query_max_length: int | None = None,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        self.model = model
        template = Template.load(model.config.template).replaced(
            query_instruction=query_instruction, passage_instruction=passage_instruction, prompt=prompt
        )
        self.pair_tokenizer = PairTokenizer(tokenizer, template)
        self.query_instruction = template.query_instruction
        self.passage_instruction = template.passage_instruction
        self.prompt = template.prompt
        self.query_max_length = query_max_length
        self.max_length = max_length
        self.base: str | None = None
        self.activation = "identity"

    def on_model_ready(self, model: Any) -> None:
        """Set the model card. sentence-transformers calls this at the end of the construction."""
        use_our_card(model, self.base)

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        """sentence-transformers' name for `tokenizer`."""
        return self.tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of texts. It can be replaced."""
        return self.pair_tokenizer.tokenizer

    @tokenizer.setter
    def tokenizer(self, value: PreTrainedTokenizerBase) -> None:
        self.pair_tokenizer = PairTokenizer(value, self.pair_tokenizer.template)

    @property
    def max_seq_length(self) -> int:
        """Most tokens of query and passage. `CrossEncoder.max_length` reads and sets it."""
        return self.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.max_length = value

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Tokenise pairs of strings: {"pairs": a list of TokenizedPair}.

        Args:
            prompt: the instruction, under sentence-transformers' name; None is the checkpoint's own, "" is none.

        Raises:
            TypeError: if an argument is unknown to `forward`, or an input is not a pair of strings.
            ValueError: if the model's template has no place for an instruction.
        """
        if any(isinstance(text, str) for text in inputs):
            # The trainer's model card counts the characters of single columns, which cannot be scored.
            return {"texts": inputs}
        unknown = sorted(
            name for name, value in kwargs.items() if name not in self.forward_kwargs and value is not None
        )
        if unknown:
            raise TypeError(
                f"unknown arguments {unknown}: allowed are CrossEncoder's and {sorted(self.forward_kwargs)}. "
                "CrossEncoder's name of an instruction is prompt."
            )
        template = replace(
            self.pair_tokenizer.template,
            query_instruction=self.query_instruction,
            passage_instruction=self.passage_instruction,
            prompt=self.prompt,
        ).with_instruction(prompt)
        pairs: Any = as_pairs(inputs)
        if pairs and isinstance(pairs[0], TokenizedPair):
            raise TypeError("a CrossEncoder tokenises texts itself: give it pairs of strings.")
        lengths = self.pair_tokenizer.lengths_within(self.query_max_length, self.max_length, template)
        return {"pairs": self.pair_tokenizer.build(pairs, *lengths, template)}

    def forward(  # type: ignore[override]
        self,
        features: dict[str, Any],
        cutoff_layers: Layers = None,
        compress_layers: Layers = None,
        compress_ratio: int = 1,
    ) -> dict[str, Tensor | Any]:
        """Add "scores", (pairs, 1) float32.

        Raises:
            TypeError: if the inputs are not pairs.
            ValueError: if the options do not fit the model, or several cutoff layers are given.
        """
        if "pairs" not in features:
            raise TypeError("a CrossEncoder scores pairs of query and passage, got single texts.")
        setting = Setting.resolve(self.model.config, cutoff_layers, compress_layers, compress_ratio)
        if len(setting.cutoff_layers) != 1:
            layers = list(setting.cutoff_layers)
            raise ValueError(f"a CrossEncoder has one score for a pair: give one layer, got cutoff_layers={layers}.")
        states = self.model.model.embed(*pack_pairs(features["pairs"], self.model.device), setting)
        features["scores"] = self.model.scores(states, setting).T
        return features

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        backend: str = "torch",
        **kwargs: Any,
    ) -> MatryoshkaModule:
        """Load a layer-wise checkpoint or a directory that fine-tuning wrote, in float32. Adapters are merged.

        Args:
            trust_remote_code: as in transformers, for the tokenizer only.
            backend: "torch".
            kwargs: arguments that CrossEncoder gives to all modules: in `model_kwargs` "dtype" (or "torch_dtype";
                "auto" is the checkpoint's) and "use_safetensors" (False reads pickled weights if there are no
                safetensors), in `processor_kwargs` "model_max_length", CrossEncoder's `max_length`, and
                in `config_kwargs` "num_labels".

        Raises:
            ValueError: if other arguments are given, or the directory is an adapter for a single compression ratio,
                which cannot be merged.
        """
        if backend != "torch":
            raise ValueError(f"backend={backend!r}, but a MatryoshkaModule has the backend 'torch' only.")
        given = {name: kwargs.get(name) for name in KWARGS}
        dtype, max_length, allow_pickle = _options_of_loading(subfolder, **given)
        hub = hub_options(cache_folder, token, revision, local_files_only)
        checkpoint = inspect_checkpoint(
            model_name_or_path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, **hub
        )
        checkpoint.description.check_scoring()
        for adapter in checkpoint.adapters:
            ratio = token_adapter_ratio(adapter, **checkpoint.hub_of(adapter, hub))
            if ratio is not None:
                raise ValueError(
                    f"{adapter} is an adapter for compress_ratio={ratio} only and cannot be merged: score with "
                    "MatryoshkaReranker."
                )
        tokenizer = load_tokenizer(model_name_or_path, trust_remote_code, **hub)
        stored: Any = checkpoint.config.dtype or torch.float32
        model = load_model(checkpoint, tokenizer, dtype or stored, **hub)
        model.config.raw_peft = []
        config = cls.load_config(
            resolve(locate(model_name_or_path), cache_folder),
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        length = checkpoint.description.max_length.value if max_length is None else max_length
        if length is not None:
            config["max_length"] = length
        module = cls(model, tokenizer, **config)
        module.base = checkpoint.base
        module.activation = checkpoint.description.activation.value
        return module

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write a checkpoint, which `MatryoshkaReranker` loads too. It replaces a checkpoint in the directory.

        Raises:
            ValueError: if `safe_serialization` is False.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: weights are written in safetensors only.")
        remove_written(output_path, kept=[SENTENCE_TRANSFORMERS_FILE])  # CrossEncoder has written it already
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        self.save_config(output_path)


def _options_of_loading(
    subfolder: str,
    model_kwargs: dict[str, Any] | None,
    processor_kwargs: dict[str, Any] | None,
    config_kwargs: dict[str, Any] | None,
) -> tuple[torch.dtype | None, int | None, bool]:
    """Return dtype, None for the checkpoint's, maximal length and `allow_pickle` from CrossEncoder's arguments.

    Raises:
        ValueError: if another argument is given.
    """
    model, processor, config = dict(model_kwargs or {}), dict(processor_kwargs or {}), dict(config_kwargs or {})
    dtype = model.pop("dtype", None) or model.pop("torch_dtype", None) or torch.float32
    allow_pickle = model.pop("use_safetensors", None) is False
    max_length, labels = processor.pop("model_max_length", None), config.pop("num_labels", 1)
    if labels != 1:
        raise ValueError(f"num_labels={labels}, but a re-ranker has one score for a pair.")
    if subfolder or model or processor or config:
        raise ValueError(
            f"subfolder={subfolder!r}, model_kwargs={model}, processor_kwargs={processor}, config_kwargs={config} have "
            "no effect here: a MatryoshkaModule takes dtype, use_safetensors, model_max_length and num_labels=1."
        )
    if dtype == "auto":
        return None, max_length, allow_pickle
    return resolve_dtype(dtype, use_fp16=False, use_bf16=False, device="cpu"), max_length, allow_pickle


INSTALL = """The model's code is in this package:

```bash
pip install flagembedding_matryoshka
```

`load_cross_encoder` needs no remote code; `CrossEncoder("{name}", trust_remote_code=True)` loads the same.
"""
DEPTH_AND_WIDTH = """
### Depth and width

Depth and width of this re-ranker can be chosen for each call
([arXiv 2501.16302](https://arxiv.org/abs/2501.16302)). It is a `{decoder}` decoder with
{layers} layers and a hidden size of {width}, with a scoring head at each of its exits.

| what | can be | default |
|---|---|---|
| depth: `cutoff_layers` | {exits} | {deepest} |
| width: `compress_layers`, after which the passage is shortened | layers from 1 to {layers}, below the exit | none |
| width: `compress_ratio`, tokens of the passage that become one there | {ratios} | 1, which is off |

```python
model.predict(pairs, cutoff_layers=[{exit}], compress_layers=[{compressed}], compress_ratio=2)
model.max_seq_length  # {max_length}: tokens of query and passage; it can be set

from flagembedding_matryoshka import MatryoshkaReranker

reranker = MatryoshkaReranker("{name}")  # the same scores, in larger batches, with cascades over the exits
```
"""


class MatryoshkaModelCardData(CrossEncoderModelCardData):
    """sentence-transformers' model card, with the way to load the model, its exits and its widths."""

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
    """Make a CrossEncoder write a `MatryoshkaModelCardData`, with the user's own values of language, license and so on.

    Args:
        base: path of the base model; a name on the hub is written into the card.
    """
    card: Any = model.model_card_data
    if type(card) is CrossEncoderModelCardData:
        card.__class__ = MatryoshkaModelCardData
    card.add_tags("matryoshka")
    if card.base_model is None and base is not None and base.count("/") == 1 and not Path(base).exists():
        card.base_model = base
