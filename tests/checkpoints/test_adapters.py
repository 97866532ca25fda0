"""Adapters that other trainers make for language models and sequence classifiers, against transformers and peft."""

import json
import shutil
import warnings
from importlib.metadata import version

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from flagembedding_matryoshka import MatryoshkaReranker
from tests.backbones import LAYERS, write_raw
from tests.batches import random_sequences

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:nothing in .* says which template"),
]
IDS = torch.tensor([[*random_sequences([(3, 12, 4)])[0].ids, 5]])
YES = 17
"""A token whose embedding adapters train."""
STOCK = {"num_labels": 1, "pad_token_id": 3, "attn_implementation": "eager"}
NEEDS_PEFT_20 = pytest.mark.skipif(version("peft") < "0.20", reason="transformers' add_adapter needs peft 0.20")
PAIRS = [("how does a wing lift", "air flows faster over the upper side of a wing."), ("Yes", "no")]


@pytest.fixture(scope="module")
def bases(tiny_tokenizer, tmp_path_factory):
    """Raw checkpoints whose vocabulary head is their embedding ("tied", and "capped", a Gemma-2) and one of its own."""
    path = tmp_path_factory.mktemp("bases")
    return {
        "own head": write_raw("mistral", tiny_tokenizer, path / "mistral"),
        "tied": write_raw("llama", tiny_tokenizer, path / "llama"),
        "capped": write_raw("gemma2", tiny_tokenizer, path / "gemma2"),
        "fused": write_raw("phi3", tiny_tokenizer, path / "phi3"),
    }


@pytest.fixture(scope="module")
def classifiers(bases, tiny_tokenizer, tmp_path_factory):
    """The same decoders with one label."""
    paths = {}
    for name, base in bases.items():
        torch.manual_seed(3)
        paths[name] = tmp_path_factory.mktemp("classifier")
        model = AutoModelForSequenceClassification.from_pretrained(base, **STOCK)
        model.save_pretrained(paths[name])
        tiny_tokenizer.save_pretrained(paths[name])
    return paths


def train(model, config, path, seed=5):
    """What a training leaves behind: every weight that learns has moved."""
    adapted = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(path)
    return path


def train_language_model(base, config, path, rows=None, seed=5):
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return train(model, config, path, seed)


def stock_scores(base, adapter, token=YES, rows=None):
    """(exits,) the token's logit behind each layer from the second on, of the language model with its adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        outputs = adapted(input_ids=IDS, output_hidden_states=True)
        inside = adapted.get_base_model()
        inner = [inside.lm_head(inside.model.norm(states[:, -1]))[0, token] for states in outputs.hidden_states[2:-1]]
        cap = getattr(model.config, "final_logit_softcapping", None)
        inner = [score if cap is None else torch.tanh(score / cap) * cap for score in inner]
    return torch.stack([*inner, outputs.logits[0, -1, token]])


def template(tmp_path, token=YES):
    """A template whose score is the logit of a token that adapters train."""
    path = tmp_path / "template.json"
    path.write_text(json.dumps({"head_tokens": [token]}))
    return path


def load(path, tmp_path, token=YES, **options):
    options = {"start_layer": 2, "template": template(tmp_path, token)} | options
    return MatryoshkaReranker(path, dtype="float32", devices="cpu", **options)


def scores(reranker):
    with torch.no_grad():
        return torch.stack(reranker.model(IDS, cutoff_layers=reranker.config.exit_layers).logits)[:, 0]


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


ATTENTION = ["q_proj", "v_proj", "down_proj"]


def lora(*target_modules, **options):
    return LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=list(target_modules) or ATTENTION, **options)


ADAPTERS = {
    "attention and MLP": lambda: lora(),
    "all-linear": lambda: LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear"),
    "regex": lambda: LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=r".*layers\.[135]\..*(q|o)_proj"),
    "some layers": lambda: lora(layers_to_transform=[1, 4]),
    "head": lambda: lora(*ATTENTION, "lm_head"),
    "head alone": lambda: lora("lm_head"),
    "embeddings": lambda: lora(*ATTENTION, "embed_tokens"),
    "embeddings and head": lambda: lora("embed_tokens", "lm_head"),
    "head in full": lambda: lora(modules_to_save=["lm_head"]),
    "embeddings in full": lambda: lora(modules_to_save=["embed_tokens"]),
    "embeddings and head in full": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "norms in full": lambda: lora(modules_to_save=["norm", "input_layernorm"]),
    "tokens": lambda: lora(trainable_token_indices=[5, YES]),
    "tokens of both": lambda: lora(trainable_token_indices={"embed_tokens": [5, YES], "lm_head": [YES]}),
    "rslora": lambda: lora(*ATTENTION, "lm_head", use_rslora=True),
    "dora": lambda: lora(*ATTENTION, "lm_head", use_dora=True),
    "rank pattern": lambda: lora(*ATTENTION, "lm_head", rank_pattern={"q_proj": 2, "lm_head": 3}),
    "alpha pattern": lambda: lora(*ATTENTION, "lm_head", alpha_pattern={"q_proj": 2, "lm_head": 3}),
    "biases": lambda: lora("q_proj", "lm_head", bias="lora_only"),
    "tied": lambda: lora(*ATTENTION, "embed_tokens", ensure_weight_tying=True),
    "tied in full": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "layer norms": lambda: LNTuningConfig(task_type=TaskType.CAUSAL_LM, target_modules=["norm", "input_layernorm"]),
    "tokens alone": lambda: TrainableTokensConfig(task_type=TaskType.CAUSAL_LM, token_indices=[5, YES]),
    "IA3": lambda: IA3Config(
        task_type=TaskType.CAUSAL_LM, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LoHa": lambda: LoHaConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=[*ATTENTION, "lm_head"]),
    "LoKr": lambda: LoKrConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=[*ATTENTION, "lm_head"]),
    "OFT": lambda: OFTConfig(task_type=TaskType.CAUSAL_LM, r=0, oft_block_size=4, target_modules=["q_proj", "lm_head"]),
    "AdaLoRA": lambda: AdaLoraConfig(
        task_type=TaskType.CAUSAL_LM, init_r=4, total_step=10, target_modules=[*ATTENTION, "lm_head"]
    ),
}


OF_HEADS = ("head", "embeddings in full", "tokens", "dora")
"""Kinds that are tried with a cap and with a scaled embedding, too."""


@pytest.mark.parametrize(
    ("kind", "base"),
    [(kind, base) for kind in ADAPTERS for base in ("own head", "tied")] + [(kind, "capped") for kind in OF_HEADS],
)
def test_an_adapter_scores_as_in_transformers(kind, base, bases, tmp_path):
    if (kind, base) == ("tokens of both", "tied") and version("peft") < "0.20":
        pytest.skip("peft cannot compute it")
    adapter = train_language_model(bases[base], ADAPTERS[kind](), tmp_path / "adapter")
    expected = stock_scores(bases[base], adapter)
    assert (expected[-1] - scores(load(bases[base], tmp_path))[-1]).abs() > 1e-3
    close(scores(load(adapter, tmp_path)), expected)
    close(scores(load(bases[base], tmp_path, peft_path=adapter)), expected)


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_a_directory_of_an_adapter_alone_is_a_model(has_tokenizer, bases, tiny_tokenizer, tmp_path):
    adapter = train_language_model(bases["tied"], ADAPTERS["head"](), tmp_path / "adapter")
    if has_tokenizer:
        tiny_tokenizer.save_pretrained(adapter)
    else:
        assert {file.name for file in adapter.iterdir()} == {
            *("README.md", "adapter_config.json", "adapter_model.safetensors")
        }
    alone = MatryoshkaReranker(adapter, dtype="float32", devices="cpu")
    on_top = MatryoshkaReranker(bases["tied"], peft_path=adapter, dtype="float32", devices="cpu")
    plain = MatryoshkaReranker(bases["tied"], dtype="float32", devices="cpu")
    assert alone.config.exit_layers == [4, 5, 6]
    assert alone.compute_score(PAIRS) == on_top.compute_score(PAIRS) != plain.compute_score(PAIRS)


def test_an_adapter_in_half_precision(bases, tmp_path):
    adapter = train_language_model(bases["tied"], ADAPTERS["embeddings in full"](), tmp_path / "adapter")
    half = MatryoshkaReranker(adapter, dtype="bfloat16", devices="cpu", start_layer=2, template=template(tmp_path))
    assert {weight.dtype for weight in half.model.model.parameters()} == {torch.bfloat16}
    close(scores(half), stock_scores(bases["tied"], adapter), atol=0.3)


def test_an_adapter_on_fewer_layers(bases, tmp_path):
    adapter = train_language_model(bases["tied"], ADAPTERS["head"](), tmp_path / "adapter")
    close(scores(load(adapter, tmp_path, max_layer=4)), stock_scores(bases["tied"], adapter)[:3])


def test_the_next_adapter_begins_where_the_last_one_ended(bases, tmp_path):
    base = bases["tied"]
    first = train_language_model(base, ADAPTERS["tokens"](), tmp_path / "first")
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), first
    ).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    second = train_language_model(
        tmp_path / "merged", lora(trainable_token_indices=[5, YES]), tmp_path / "second", None, 6
    )
    expected = stock_scores(tmp_path / "merged", second)
    close(scores(load(base, tmp_path, peft_path=[first, second])), expected)
    assert (expected - scores(load(base, tmp_path, peft_path=[first]))).abs().max() > 1e-3


GROWN = {"attention and MLP", "embeddings", "embeddings in full", "head", "tokens"}


@pytest.mark.parametrize(("kind", "base"), [(kind, base) for kind in sorted(GROWN) for base in ("own head", "tied")])
def test_a_vocabulary_that_grew(kind, base, bases, tiny_tokenizer, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bases[base])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    rows = len(tokenizer)
    adapter = train_language_model(bases[base], ADAPTERS[kind](), tmp_path / "adapter", rows)
    tokenizer.save_pretrained(adapter)
    reranker = load(adapter, tmp_path)
    close(scores(reranker), stock_scores(bases[base], adapter, YES, rows))
    assert reranker.model.config.vocab_size == len(reranker.model.get_input_embeddings().weight) == rows
    assert len(reranker.compute_score(PAIRS)) == 2
    # where the file holds the new row of the head, it can be the score
    if (kind, base) == ("embeddings", "own head"):
        with pytest.raises(ValueError, match=rf"the logit of the tokens \[{rows - 1}\], but .* has {rows - 1} rows"):
            load(adapter, tmp_path, rows - 1)
    else:
        expected = stock_scores(bases[base], adapter, rows - 1, rows)
        close(scores(load(adapter, tmp_path, rows - 1)), expected)
    # and so for the new row of the embedding, which texts need
    tokenizer = AutoTokenizer.from_pretrained(bases[base])
    tokenizer.add_tokens(["wings"])
    tokenizer.save_pretrained(adapter)
    if (kind, base) == ("head", "own head"):
        with pytest.raises(ValueError, match=rf"has embeddings of {rows - 1}: 1 tokens that texts become have none"):
            load(adapter, tmp_path)
    else:
        assert len(load(adapter, tmp_path).compute_score([("wings", "wings")] * 2)) == 2


class TestClassifiers:
    SCORE = {"task_type": TaskType.SEQ_CLS, "r": 4, "target_modules": ATTENTION}

    @staticmethod
    def stock_score(base, adapter):
        model = AutoModelForSequenceClassification.from_pretrained(base, **STOCK)
        with torch.no_grad():
            return PeftModel.from_pretrained(model, adapter).eval()(input_ids=IDS).logits[0]

    @staticmethod
    def train(base, config, path, labels=1):
        options = STOCK | {"num_labels": labels}
        return train(AutoModelForSequenceClassification.from_pretrained(base, **options), config, path)

    @pytest.mark.parametrize("base", ["own head", "capped"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"modules_to_save": ["embed_tokens", "norm"]},
            {"modules_to_save": []},
            {"target_modules": ["q_proj", "score"]},
            {"use_dora": True},
        ],
        ids=str,
    )
    def test_an_adapter_of_a_classifier(self, base, options, classifiers, tmp_path):
        adapter = self.train(classifiers[base], LoraConfig(**self.SCORE | options), tmp_path / "adapter")
        expected = self.stock_score(classifiers[base], adapter)
        for path, options in ((adapter, {}), (classifiers[base], {"peft_path": adapter})):
            reranker = load(path, tmp_path, start_layer=None, **options)
            assert reranker.config.exit_layers == [LAYERS]
            close(scores(reranker), expected)
        assert (expected - scores(load(classifiers[base], tmp_path, start_layer=None))).abs() > 1e-3

    @pytest.mark.parametrize("base", ["own head", "tied"])
    @pytest.mark.parametrize("is_noted", [True, False])
    def test_an_adapter_that_brings_the_head(self, base, is_noted, bases, tmp_path):
        adapter = self.train(bases[base], LoraConfig(**self.SCORE), tmp_path / "adapter")
        if not is_noted:  # as older releases of peft
            note = json.loads((adapter / "adapter_config.json").read_text())
            (adapter / "adapter_config.json").write_text(json.dumps(note | {"modules_to_save": None}))
        reranker = load(adapter, tmp_path, start_layer=None)
        assert reranker.config.exit_layers == [LAYERS]
        note = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(note | {"modules_to_save": ["score"]}))
        close(scores(reranker), self.stock_score(bases[base], adapter))
        with pytest.raises(
            ValueError, match=r"adapter brings the head of a sequence classifier, but .* is loaded as a"
        ):
            load(bases[base], tmp_path, peft_path=adapter)

    def test_several_labels_are_refused(self, bases, tmp_path):
        adapter = self.train(bases["tied"], LoraConfig(**self.SCORE), tmp_path / "adapter", labels=2)
        with pytest.raises(ValueError, match=r"adapter has score\.weight of shape \(2, 32\), but a .* takes \(1, 32\)"):
            load(adapter, tmp_path, start_layer=None)


@NEEDS_PEFT_20
class TestCrossEncoders:
    """Adapters of `CrossEncoder.add_adapter`, as its `save_pretrained` writes them."""

    @staticmethod
    def save(model, config, path):
        model.add_adapter(config)
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and ("lora" in name or "modules_to_save" in name):
                    parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(str(path))
        assert not (path / "config.json").exists()

    @staticmethod
    def compare(path, base):
        expected = CrossEncoder(str(path), device="cpu").predict(PAIRS, activation_fn=torch.nn.Identity())
        plain = CrossEncoder(str(base), device="cpu").predict(PAIRS, activation_fn=torch.nn.Identity())
        assert abs(expected - plain).max() > 1e-3
        reranker = MatryoshkaReranker(path, dtype="float32", devices="cpu")
        found = reranker.compute_score(PAIRS)
        close(torch.tensor(found), torch.tensor(expected))

    @pytest.mark.parametrize("modules_to_save", [None, ["score"]])
    @pytest.mark.parametrize("is_cross_encoder", [False, True])
    def test_of_a_classifier(self, is_cross_encoder, modules_to_save, classifiers, tmp_path):
        base = classifiers["own head"]
        if is_cross_encoder:
            CrossEncoder(str(base), device="cpu").save_pretrained(str(tmp_path / "base"))
            base = tmp_path / "base"
        config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=ATTENTION, modules_to_save=modules_to_save)
        self.save(CrossEncoder(str(base), device="cpu"), config, tmp_path / "adapter")
        self.compare(tmp_path / "adapter", base)

    @pytest.mark.parametrize("target_modules", [ATTENTION, [*ATTENTION, "lm_head"]], ids=["layers", "head"])
    @pytest.mark.parametrize("base", ["own head", "tied"])
    @pytest.mark.parametrize("is_cross_encoder", [False, True])
    def test_of_a_language_model(self, is_cross_encoder, base, target_modules, bases, tmp_path):
        transformer = Transformer(str(bases[base]), transformer_task="text-generation")
        model = CrossEncoder(modules=[transformer, LogitScore(YES)], device="cpu")
        model.save_pretrained(str(tmp_path / "base"))
        if is_cross_encoder:
            model = CrossEncoder(str(tmp_path / "base"), device="cpu")
        self.save(model, lora(*target_modules), tmp_path / "adapter")
        noted = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert noted == str(tmp_path / "base" if is_cross_encoder else bases[base])
        self.compare(tmp_path / "adapter", tmp_path / "base")


class TestRefused:
    def test_a_kind_that_cannot_be_merged(self, bases, tmp_path):
        kinds = {
            "PREFIX_TUNING": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
            "PROMPT_TUNING": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
            "VERA": VeraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"]),
        }
        for kind, config in kinds.items():
            adapter = train_language_model(bases["tied"], config, tmp_path / kind)
            for path, options in ((adapter, {}), (bases["tied"], {"peft_path": adapter})):
                with pytest.raises(ValueError, match=rf"the adapter .*{kind} has the type {kind} .* cannot be merged"):
                    load(path, tmp_path, **options)

    def test_a_kind_that_peft_does_not_know_and_a_base_that_is_not_noted(self, bases, tmp_path):
        adapter = train_language_model(bases["tied"], lora(), tmp_path / "adapter")
        note = json.loads((adapter / "adapter_config.json").read_text())
        for change, message in (
            ({"peft_type": "NEWEST"}, r"has the type NEWEST .* which cannot be merged"),
            ({"base_model_name_or_path": None}, r"has base_model_name_or_path=None\. .*peft_path="),
        ):
            (adapter / "adapter_config.json").write_text(json.dumps(note | change))
            with pytest.raises(ValueError, match=message):
                load(adapter, tmp_path)

    def test_an_adapter_that_acts_from_some_tokens_on(self, bases, tmp_path):
        config = lora("q_proj", alora_invocation_tokens=[5])
        adapter = train_language_model(bases["tied"], config, tmp_path / "adapter")
        with pytest.raises(ValueError, match=r"has alora_invocation_tokens=\[5\] .* which cannot be merged"):
            load(adapter, tmp_path)

    @pytest.mark.parametrize("change", ["unused", "missing", "shape", "nothing fits"])
    def test_weights_that_do_not_fit(self, change, bases, tmp_path):
        adapter = train_language_model(bases["tied"], lora("q_proj"), tmp_path / "adapter")
        file = adapter / "adapter_model.safetensors"
        weights = load_file(file)
        name = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
        if change == "unused":
            weights[name.replace("q_proj", "qkv_proj")] = weights[name].clone()
            message = (
                r"has weights that no module of a CostWiseLlamaForCausalLM takes: model\.layers\.3\.self_attn\.qkv"
            )
        elif change == "missing":
            del weights[name]
            message = (
                r"lacks weights for a CostWiseLlamaForCausalLM: model\.layers\.3\.self_attn\.q_proj\.lora_A\.weight\."
            )
        elif change == "shape":
            weights[name] = weights[name][:, :16].contiguous()
            message = r"has model\.layers\.3\..*lora_A\.weight of shape \(4, 16\), but .* takes \(4, 32\)"
        else:
            adapter = train_language_model(bases["fused"], lora("qkv_proj"), tmp_path / "other")
            message = r"the adapter .*other does not fit a CostWiseLlamaForCausalLM: .*qkv_proj"
        save_file(weights, file, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load(bases["tied"], tmp_path, peft_path=adapter)

    def test_an_adapter_of_a_deeper_model(self, bases, tiny_tokenizer, tmp_path):
        base = write_raw("llama", tiny_tokenizer, tmp_path / "deeper", num_hidden_layers=LAYERS + 1)
        adapter = train_language_model(base, lora("q_proj"), tmp_path / "adapter")
        with pytest.raises(ValueError, match=r"no module of a .* takes: model\.layers\.6\.self_attn\.q_proj"):
            load(bases["tied"], tmp_path, peft_path=adapter)

    @pytest.mark.parametrize("kind", ["head", "head in full"])
    def test_a_layer_wise_base_has_no_vocabulary_head(self, kind, tiny_layerwise_path, tiny_raw_model_path, tmp_path):
        adapter = train_language_model(tiny_raw_model_path, ADAPTERS[kind](), tmp_path / "adapter")
        with pytest.raises(ValueError, match=r"changes lm_head\..*, but .* has a scoring head for each exit instead"):
            MatryoshkaReranker(tiny_layerwise_path, peft_path=adapter, dtype="float32", devices="cpu")

    def test_an_adapter_of_the_language_model_comes_first(self, bases, tmp_path):
        adapter = train_language_model(bases["own head"], ADAPTERS["head"](), tmp_path / "adapter")
        model = load(bases["own head"], tmp_path).model
        ours = train(model, LoraConfig(r=2, target_modules=["q_proj", "linear_head"]), tmp_path / "ours")
        both = scores(load(bases["own head"], tmp_path, peft_path=[adapter, ours]))
        assert (both - scores(load(bases["own head"], tmp_path, peft_path=[adapter]))).abs().max() > 1e-3
        with pytest.raises(ValueError, match=r"changes lm_head\..* but comes after .*ours, .* List it first"):
            load(bases["own head"], tmp_path, peft_path=[ours, adapter])

    def test_a_base_that_is_gone(self, bases, tmp_path):
        base = shutil.copytree(bases["tied"], tmp_path / "base")
        adapter = train_language_model(base, lora(), tmp_path / "adapter")
        shutil.rmtree(base)
        with pytest.raises(FileNotFoundError, match=r"adapter was trained on .*base, which is not there.*peft_path="):
            load(adapter, tmp_path)
