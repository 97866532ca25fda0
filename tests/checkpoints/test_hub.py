"""Names on the hub: the revision that was asked for, with the token that was given, or what the cache has."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from flagembedding_matryoshka import CostWiseMistralForCausalLM, MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint, load_model, load_tokenizer
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan
from flagembedding_matryoshka.setting import Setting
from tests.chat_templates import DOCUMENT_FIRST, JUDGE, write_cross_encoder
from tests.qwen import write_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("how does a wing lift", "air flows over the upper side"), ("heat", "a wing")]


def scores(path, **arguments):
    return MatryoshkaReranker(path, dtype="float32", devices="cpu", **arguments).compute_score(PAIRS)


@pytest.fixture(scope="module")
def versions(tiny_layerwise_path, tmp_path_factory):
    """Three checkpoints whose scores differ, each as large as the other."""
    found = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        model = CostWiseMistralForCausalLM.from_pretrained(tiny_layerwise_path)
        with torch.no_grad():
            for head in model.lm_head:
                head.linear_head.weight += torch.randn_like(head.linear_head.weight)
        path = shutil.copytree(tiny_layerwise_path, tmp_path_factory.mktemp("version") / str(seed))
        model.save_pretrained(path)
        found.append(path)
    return found


@pytest.fixture(scope="module")
def adapter(versions, tmp_path_factory):
    """Trained on the second revision of somebody/base."""
    torch.manual_seed(4)
    path = str(versions[1])
    model = load_model(inspect_checkpoint(path), load_tokenizer(path), torch.float32)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = "somebody/base"
    adapted.peft_config["default"].revision = "v2"
    written = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(written, save_embedding_layers=False)
    return written


def cached(cache, name, revisions):
    """Lays directories out as huggingface_hub does: a snapshot per commit, a file per name of one."""
    folder = cache / f"models--{name.replace('/', '--')}"
    for number, (revision, directory) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        shutil.copytree(directory, folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)


@pytest.fixture
def offline(hub):
    """The hub hears of no model."""
    yield
    assert not [path for path, _ in hub.asked if "somebody" in path]


@pytest.mark.usefixtures("offline")
def test_the_revision_asked_for_is_what_the_cache_gives(versions, tmp_path):
    cached(tmp_path, "somebody/reranker", {"main": versions[0], "v1": versions[1], "v2": versions[2]})
    local = {"cache_dir": str(tmp_path), "local_files_only": True}
    assert scores("somebody/reranker", **local) == scores(versions[0])
    assert scores("somebody/reranker", revision="v1", **local) == scores(versions[1])
    assert scores("somebody/reranker", revision=f"{2:040x}", **local) == scores(versions[2])
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at somebody/reranker"):
        scores("somebody/reranker", revision="v3", **local)


@pytest.mark.usefixtures("offline")
def test_a_revision_is_of_the_adapter_and_not_of_its_base(versions, adapter, tmp_path):
    cached(tmp_path, "somebody/base", {"main": versions[0], "v2": versions[1]})
    cached(tmp_path, "somebody/adapter", {"main": versions[0], "stage1": with_config(adapter, versions[1], tmp_path)})
    local = {"cache_dir": str(tmp_path), "local_files_only": True}
    expected = scores(versions[1], peft_path=adapter)
    assert expected != pytest.approx(scores(versions[1]), abs=1e-4)
    assert scores("somebody/adapter", revision="stage1", **local) == expected


@pytest.mark.usefixtures("offline")
def test_an_adapter_without_a_configuration_is_read_with_that_of_its_bases_revision(versions, adapter, tmp_path):
    assert not (adapter / "config.json").exists()
    cached(tmp_path, "somebody/base", {"v2": versions[1]})
    cached(tmp_path, "somebody/adapter", {"stage1": adapter})
    local = {"cache_dir": str(tmp_path), "local_files_only": True}
    assert scores("somebody/adapter", revision="stage1", **local) == scores(versions[1], peft_path=adapter)


def with_config(adapter, base, tmp_path):
    """As fine-tuning leaves it: the model's configuration beside the adapter."""
    path = shutil.copytree(adapter, tmp_path / "with_config")
    shutil.copy(base / "config.json", path)
    return path


@pytest.mark.usefixtures("offline")
def test_a_revision_is_of_the_model_and_not_of_adapters_on_top(versions, adapter, tmp_path):
    cached(tmp_path, "somebody/base", {"main": versions[0], "v2": versions[1]})
    cached(tmp_path, "somebody/adapter", {"main": adapter})
    found = scores(
        "somebody/base", peft_path="somebody/adapter", revision="v2", cache_dir=str(tmp_path), local_files_only=True
    )
    assert found == scores(versions[1], peft_path=adapter)


@pytest.mark.usefixtures("offline")
def test_the_plan_is_that_of_the_revision(versions, tmp_path):
    directories = {}
    for layer in (3, 4):
        directories[f"v{layer}"] = shutil.copytree(versions[0], tmp_path / f"v{layer}")
        measured = (Measurement(Setting((layer,)), 0.5, 1.0),)
        Plan((2, 3, 4, 5, 6), (), "data", 1, "bm25", measured).write(directories[f"v{layer}"] / PLAN_NAME)
    cached(tmp_path, "somebody/reranker", directories)
    for layer in (3, 4):
        reranker = MatryoshkaReranker(
            "somebody/reranker", revision=f"v{layer}", cache_dir=str(tmp_path), local_files_only=True, budget=1.0
        )
        assert reranker.planned.cutoff_layers == (layer,)


def test_a_revision_of_a_path_is_refused(versions):
    with pytest.raises(ValueError, match=r"revision='v1', but .* is a path: only names on the hub have one"):
        MatryoshkaReranker(versions[0], revision="v1")


def test_every_file_is_asked_for_with_the_token(hub, versions, adapter, tmp_path):
    hub.add("somebody/base", "v2", versions[1])
    hub.add("somebody/adapter", "stage1", with_config(adapter, versions[1], tmp_path))
    assert scores("somebody/adapter", token="hf_secret", revision="stage1") == scores(versions[1], peft_path=adapter)
    # transformers and huggingface_hub ask for some more, without a token.
    of_files = {path: token for path, token in hub.asked if "/resolve/" in path}
    for wanted in ("adapter_model.safetensors", "model.safetensors", "tokenizer.json", "config.json"):
        assert any(path.endswith(wanted) for path in of_files), wanted
    assert set(of_files.values()) == {"Bearer hf_secret"}
    hub.asked.clear()
    assert scores("somebody/base", token=False, revision="v2") == scores(versions[1])
    assert {token for _, token in hub.asked} == {None}


def test_pickled_weights_of_a_name_are_refused_without_being_fetched(hub, versions, tmp_path):
    path = shutil.copytree(versions[0], tmp_path / "pickled")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    hub.add("somebody/pickled", "main", path)
    with pytest.raises(ValueError, match=r"the weights of somebody/pickled are pickled \(pytorch_model.bin\)"):
        scores("somebody/pickled")
    assert list((tmp_path / "hub").rglob("config.json")) and not list((tmp_path / "hub").rglob("pytorch_model.bin"))


def test_a_description_is_of_the_files_of_its_revision(hub, tmp_path):
    prompts = {"task": "Find it."}
    for revision, template in (("v1", JUDGE), ("v2", DOCUMENT_FIRST)):
        path = write_cross_encoder(tmp_path / revision, template, prompts=prompts, default_prompt_name="task")
        hub.add("somebody/reranker", revision, path)
        reranker = MatryoshkaReranker("somebody/reranker", revision=revision, dtype="float32", devices="cpu")
        assert reranker.description.instruction.value == "Find it."
        assert reranker.description.template.value.passage_first == (template is DOCUMENT_FIRST)
        assert reranker.compute_score(PAIRS) == pytest.approx(scores(path), abs=1e-6)


@pytest.mark.usefixtures("offline")
def test_a_cached_checkpoint_is_described_without_the_hub(tmp_path):
    path = write_cross_encoder(tmp_path / "files", JUDGE)
    plain = write_causal_lm(tmp_path / "plain")
    cached(tmp_path, "somebody/reranker", {"main": path})
    cached(tmp_path, "somebody/mxbai-rerank-base-v2", {"main": plain})
    local = {"cache_dir": str(tmp_path), "local_files_only": True}
    assert inspect_checkpoint("somebody/reranker", **local).description.template.source == "chat_template.jinja"
    assert inspect_checkpoint("somebody/mxbai-rerank-base-v2", **local).description.is_assumed  # a Qwen3, not a Qwen2
