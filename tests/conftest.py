"""Tiny random models and their tokenizer, and the golden numbers where the checkout has them."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from FlagEmbedding.inference.reranker.model_mapping import AUTO_RERANKER_MAPPING
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flagembedding_matryoshka import CostWiseMistralConfig, CostWiseMistralForCausalLM
from flagembedding_matryoshka.text.pairs import find_head_token_id
from flagembedding_matryoshka.text.templates import Template
from tests.backbones import let_heads_differ
from tests.collection import write_collection
from tests.hub import running

# The first example of a test may load or compile; how long it takes says nothing.
settings.register_profile("quick", max_examples=30, deadline=None)
settings.load_profile("quick")

SHARED = Path(__file__).parents[2] / "shared"
SENTENCES = [
    *("Yes", "how does a wing lift", "air flows faster over the upper side of a wing.", "A: ", "B: \n"),
    Template().prompt,
]


def _shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"this checkout has no shared/{name}")
    return SHARED / name


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Finds a directory of shared/, or skips the test."""
    return _shared


@pytest.fixture(scope="session")
def shared_parity() -> Path:
    return _shared("parity")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return _shared("data")


@pytest.fixture(scope="module")
def one_thread():
    """For tiny tensors: a second thread gains nothing, and waiting for it on a busy machine takes most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_raw_model_path(tiny_tokenizer, tmp_path_factory) -> Path:
    """A plain Mistral of 6 layers, 32 wide, with its tokenizer."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
    )
    path = tmp_path_factory.mktemp("raw_model")
    MistralForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_layerwise_path(tiny_raw_model_path, tiny_tokenizer, tmp_path_factory) -> Path:
    """The same with exits from layer 2 on, whose heads differ."""
    config = CostWiseMistralConfig.from_pretrained(tiny_raw_model_path)
    config.layer_wise, config.start_layer, config.layer_sep = True, 2, 1
    config.head_token_id = find_head_token_id(tiny_tokenizer)
    model = CostWiseMistralForCausalLM.from_pretrained(tiny_raw_model_path, config=config)
    let_heads_differ(model)
    path = tmp_path_factory.mktemp("layerwise_model")
    model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def plain_model(tiny_raw_model_path) -> MistralForCausalLM:
    """transformers' own model of the decoder that all tiny models share. Tests leave it as it is."""
    return MistralForCausalLM.from_pretrained(tiny_raw_model_path, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def layerwise_model(tiny_layerwise_path) -> CostWiseMistralForCausalLM:
    """Tests leave it as it is."""
    return CostWiseMistralForCausalLM.from_pretrained(tiny_layerwise_path).eval()


@pytest.fixture(scope="session")
def training_file(tmp_path_factory) -> Path:
    """Eight rows with teacher scores, whose positives share words with their queries."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    words = ["wing", "lift", "air", "side", "upper", "flow", "heat", "flux"]
    rows = [
        {
            "query": f"what about the {word}",
            "pos": [f"this text is about a {word} and the {word} alone"],
            "neg": [f"this text is about a {other}" for other in words if other != word],
            "pos_scores": [3.0],
            "neg_scores": [0.5] * 7,
        }
        for word in words
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tokenized_texts(monkeypatch) -> list[str]:
    """All users' texts that reach a tokenizer from here on; a template's words come one by one."""
    seen = []
    call = PreTrainedTokenizerBase.__call__

    def noting(self, text, *arguments, **options):
        if not isinstance(text, str):
            seen.extend(text)
        return call(self, text, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", noting)
    return seen


@pytest.fixture
def collection(tmp_path):
    """Writes a collection in BEIR layout, of which parts can be told, and returns its directory."""
    return partial(write_collection, tmp_path / "beir")


@pytest.fixture
def restored_mapping():
    """FlagEmbedding's list of models is as before when the test ends."""
    before = AUTO_RERANKER_MAPPING.copy()
    yield
    AUTO_RERANKER_MAPPING.clear()
    AUTO_RERANKER_MAPPING.update(before)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, the only one that is asked; what it is asked for is cached beside the test."""
    with running() as found:
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", found.url)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # what is made at the first call knows the endpoint
        yield found


@pytest.fixture(scope="session")
def ray_cluster():
    """Four CPUs of this machine as a Ray cluster, whose workers find the examples."""
    ray = pytest.importorskip("ray", reason="needs ray[data,serve]")
    root = Path(__file__).parents[1]
    environment = {"env_vars": {"PYTHONPATH": f"{root / 'examples'}{os.pathsep}{root}"}}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_worker_register_timeout_seconds", "600")  # a busy machine starts processes slowly
        # Without an address Ray would connect to the cluster of another test process.
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
        yield ray
        ray.shutdown()
