"""One exit as a sequence classifier of transformers, which sentence-transformers and vLLM load, too."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from flagembedding_matryoshka.checkpoints.adapters import token_adapter_ratios
from flagembedding_matryoshka.checkpoints.describing import EXPORT_FILE, MODULES_FILE
from flagembedding_matryoshka.checkpoints.export.card import CARD_FILE, card, is_own_card
from flagembedding_matryoshka.checkpoints.export.chat_template import SEAM, chat_tokenizer, probes
from flagembedding_matryoshka.checkpoints.export.layerwise import (
    ACTIVATIONS,
    SENTENCE_TRANSFORMERS_FILE,
    remove_written,
)
from flagembedding_matryoshka.models.backbones import BACKBONES
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.text.pairs import PairTokenizer
from flagembedding_matryoshka.text.templates import Template

TRANSFORMER_FILE = "sentence_bert_config.json"
HEAD = "score.weight"
FORWARD = {"method": "forward", "method_output_name": "logits"}


@dataclass(frozen=True)
class Exit:
    """One exit of a re-ranker, with the facts that its exported checkpoint states.

    Attributes:
        model: the re-ranker's model, with its adapters merged.
        layer: the exit.
        tokenizer: the re-ranker's tokenizer.
        template: words around query and passage, with the default instruction.
        activation: function that CrossEncoder and vLLM apply to raw scores, as in `Description`.
        max_length: tokens of query and passage, at most.
        source: name of the re-ranker.
        fingerprint: fingerprint of the re-ranker's weights.
        calibration: map from scores of this exit to probabilities of relevance, as JSON; None if there is none.
    """

    model: CostWiseForCausalLM
    layer: int
    tokenizer: PreTrainedTokenizerBase
    template: Template
    activation: str
    max_length: int
    source: str
    fingerprint: str
    calibration: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Classifier:
    """An exit as a sequence classifier of transformers.

    Attributes:
        model: model of transformers, on the CPU, with `num_labels` 1.
        tokenizer: tokenizer with the chat template. It adds no tokens.
        max_length: tokens of a whole sequence, at most.
        temperature: raw scores are divided by it before the sigmoid.
        exit: the exit.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    max_length: int
    temperature: float
    exit: Exit

    @property
    def has_seams(self) -> bool:
        """Whether the chat template has seams, at which the tokenizer splits the text."""
        return f"\\u{ord(SEAM):04x}" in str(self.tokenizer.chat_template)


def classifier_of(exit: Exit, allow_uncapped: bool = False) -> Classifier:
    """Make a sequence classifier of an exit.

    If the activation is the sigmoid, the head is divided by the template's temperature. The sigmoid of the classifier's
    score is then the re-ranker's normalised score.

    Args:
        allow_uncapped: leave out a cap on scores, which no classifier of transformers has.

    Raises:
        ValueError: if transformers has no sequence classifier of the backbone, scores are capped, token adapters are
            attached, or the template cannot be written as a chat template.
    """
    model, layer, template = exit.model, exit.layer, exit.template
    if ratios := token_adapter_ratios(model):
        raise ValueError(
            f"token adapters for the ratios {sorted(ratios)} are attached, but a sequence classifier does not compress "
            "passages: export the model without them."
        )
    config_class = _stock_config_class(model.config)
    model_class: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(config_class, None)
    if model_class is None:
        raise ValueError(
            f"transformers has no {config_class.model_type} for sequence classification: an exit of "
            f"{exit.source} can be exported with format='layerwise' alone. Formats of other runtimes are for "
            f"{', '.join(exportable_backbones())}."
        )
    scale = _scale(exit, allow_uncapped)
    is_sigmoid = exit.activation == "sigmoid"
    temperature = 1.0 if is_sigmoid else template.temperature
    config = _stock_config(exit, config_class)
    config.architectures = [model_class.__name__]
    tokenizer = chat_tokenizer(exit.tokenizer, template, config)
    words = template.with_instruction(None)
    (empty,) = PairTokenizer(exit.tokenizer, words).build([("", "")], 10**6, 10**6, 3 * 10**6)
    max_length = exit.max_length + len(empty)
    tokenizer.model_max_length = max_length
    with no_init_weights():  # not on the meta device: the constructor computes buffers that no checkpoint holds
        classifier = model_class(config)
    wanted = classifier.state_dict().keys()
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items() if name in wanted}
    head = model.lm_head[model.config.exit_layers.index(layer)].linear_head.weight.detach().cpu()
    weights[HEAD] = head * (scale / (template.temperature if is_sigmoid else 1.0))
    classifier.load_state_dict(weights, assign=True)
    return Classifier(classifier.eval(), tokenizer, max_length, temperature, exit)


def exportable_backbones() -> list[str]:
    """Return the model types of `BACKBONES` for which transformers has a sequence classifier."""
    configs = {_stock_config_class(backbone.config_class) for backbone in BACKBONES}
    return sorted(config.model_type for config in configs if config in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)


@contextmanager
def package_of(format: str) -> Iterator[None]:
    """Add the line that installs the packages of a format to an ImportError inside."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"format={format!r} needs the package {error.name}: pip install 'flagembedding_matryoshka[{format}]'"
        ) from error


def export_transformers(exit: Exit, directory: str | Path, allow_uncapped: bool = False) -> None:
    """Write an exit as a sequence classifier of transformers.

    It replaces a checkpoint in the directory, see `WRITTEN`.

    Args:
        allow_uncapped: as in `classifier_of`.

    Raises:
        ValueError: as `classifier_of`.
    """
    classifier = classifier_of(exit, allow_uncapped)
    remove_written(directory)
    classifier.model.save_pretrained(directory)
    write_files(classifier, directory, "transformers")


def write_files(classifier: Classifier, directory: str | Path, format: str) -> None:
    """Write all files but the weights.

    These are configuration, tokenizer, files of sentence-transformers, model card and `EXPORT_FILE`.

    Args:
        format: as in `MatryoshkaReranker.export`.
    """
    exit, directory = classifier.exit, Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    classifier.model.config.save_pretrained(directory)
    classifier.tokenizer.save_pretrained(directory)
    instruction = exit.template.instruction
    transformer: dict[str, Any] = {
        "transformer_task": "sequence-classification",
        "modality_config": {"text": FORWARD, "message": {**FORWARD, "format": "flat"}},
        "module_output_name": "scores",
    }
    if instruction:
        # sentence-transformers sends no system message for an empty prompt, and the variable says that this means no
        # instruction. vLLM (0.33.0) never sends one, and would blank the default instruction. With `tools` among the
        # variables it refuses to start without --chat-template. None is the default of sentence-transformers.
        transformer["processing_kwargs"] = {"chat_template": {"instruction": "", "tools": None}}
    contents: dict[str, Any] = {
        MODULES_FILE: [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
        ],
        TRANSFORMER_FILE: transformer,
        SENTENCE_TRANSFORMERS_FILE: {
            "model_type": "CrossEncoder",
            "activation_fn": _activation(exit),
            "prompts": {"default": instruction} if instruction else {},
            "default_prompt_name": "default" if instruction else None,
        },
        EXPORT_FILE: {
            "source": exit.source,
            "fingerprint": exit.fingerprint,
            "cutoff_layer": exit.layer,
            "format": format,
            "temperature": classifier.temperature,
            "calibration": exit.calibration,
        },
    }
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_card(exit, directory, format)


def write_card(exit: Exit, directory: str | Path, format: str, file: str = "") -> None:
    """Write a model card, unless the directory has a README.md that no export wrote.

    Args:
        format: as in `MatryoshkaReranker.export`.
        file: name of the GGUF file.
    """
    path = Path(directory, CARD_FILE)
    if not path.exists() or is_own_card(path.read_text(encoding="utf-8")):
        layers, has_instruction = exit.model.config.num_hidden_layers, bool(exit.template.instruction)
        text = card(exit.source, exit.layer, layers, exit.activation, format, has_instruction, file)
        path.write_text(text, encoding="utf-8")


def _activation(exit: Exit) -> str:
    return ACTIVATIONS.get(exit.activation, exit.activation)


def _stock_config_class(config: Any) -> type[PreTrainedConfig]:
    """Return the class of transformers from which a configuration of this package inherits."""
    own = config if isinstance(config, type) else type(config)
    return next(
        base for base in own.__mro__ if issubclass(base, PreTrainedConfig) and not issubclass(base, CostWiseConfig)
    )


def _stock_config(exit: Exit, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return the configuration of the classifier, without the fields of `CostWiseConfig`."""
    config = copy.deepcopy(exit.model.config)
    config.cut(exit.layer)
    values = config.to_dict()
    ours = {field.name for field in fields(CostWiseConfig)}
    for name in (*ours, "model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"):
        values.pop(name, None)
    if "final_logit_softcapping" in values:
        values["final_logit_softcapping"] = None
    defaults = {field.name: field.default for field in fields(config_class)}
    return config_class(
        **values
        | {
            "num_labels": 1,
            "id2label": {0: "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "pad_token_id": _pad_token_id(exit),
            "tie_word_embeddings": defaults["tie_word_embeddings"],  # vLLM asks for it of Gemma-2
            "dtype": exit.model.dtype,
            "sentence_transformers": {"activation_fn": _activation(exit)},
        }
    )


def _scale(exit: Exit, allow_uncapped: bool) -> float:
    """Return the factor by which the decoder multiplies scores; 1 if it caps them and `allow_uncapped` is True.

    Raises:
        ValueError: if it caps them and `allow_uncapped` is False.
    """
    probe = torch.tensor([0.5, 1.0, -4.0], device=exit.model.device)
    ratios: Tensor = exit.model.finish(probe) / probe
    if torch.allclose(ratios, ratios[:1]):
        return float(ratios[0])
    if allow_uncapped:
        return 1.0
    raise ValueError(
        f"{exit.source} caps its scores (final_logit_softcapping={exit.model.config.final_logit_softcapping}), which "
        "no sequence classifier of transformers does. Without the cap the order of passages stays and the values do "
        "not: allow_uncapped=True, on the command line --allow_uncapped, writes it so."
    )


def _pad_token_id(exit: Exit) -> int:
    """Return a padding token that ends no sequence.

    Classifiers of transformers read the score at the last token that is not the padding token.

    Raises:
        ValueError: if all candidates end a sequence or have no embedding.
    """
    words = exit.template.with_instruction(None)
    built = PairTokenizer(exit.tokenizer, words).build(list(probes()), 10**6, 10**6, 3 * 10**6)
    last = {int(pair.input_ids[-1]) for pair in built if len(pair)}
    original = exit.tokenizer
    candidates = (original.pad_token_id, original.unk_token_id, original.eos_token_id, original.bos_token_id)
    for token in candidates:
        if token is not None and token not in last and token < exit.model.config.vocab_size:
            return token
    raise ValueError(
        f"the tokenizer of {exit.source} has no token for padding: sequences end with "
        f"{original.decode(sorted(last))!r}, and the candidates pad, unk, eos and bos are {candidates}."
    )
