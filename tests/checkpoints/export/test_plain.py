"""An exit as a sequence classifier that transformers and sentence-transformers load without this package."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from flagembedding_matryoshka.checkpoints.adapters import token_adapter_ratios
from flagembedding_matryoshka.checkpoints.export import plain
from flagembedding_matryoshka.inference.plan import PLAN_NAME
from tests.backbones import BACKBONES
from tests.batches import close
from tests.checkpoints.export.stock import score
from tests.exports import CAPPED, CLASSIFIERS, EXITS, SHORT, load, mixed_pairs, uncapped, write_reranker
from tests.leftovers import OWN, files, leave
from tests.pages import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
FIRST = ("mistral",)  # with a window
BACKBONE = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in CLASSIFIERS]
)
PAIRS = mixed_pairs()
TASK = "Judge the Document"
SIGMOID = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}


@dataclass(frozen=True)
class Case:
    """A re-ranker whose exits are exported and scored by stock.py.

    Attributes:
        exits: those that stock.py scores. All of `EXITS` are exported.
        settings: its config_sentence_transformers.json.
        options: it is loaded with.
    """

    backbone: str = "qwen3"
    template: Any = "mxbai-v2"
    pairs: Sequence[tuple[str, str]] = tuple(PAIRS)
    instructions: Sequence[str | None] = (None,)
    exits: Sequence[int] = (3,)
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


WORDS = {
    "seams": Case(
        template="cost_wise",  # its tokenizer joins "?" and a line break
        pairs=[("what is it?", "it is.\n"), ("a\n", "\n\nb"), ("x ", "  y\n"), ("", "")],
    ),
    "instruction": Case(instructions=(None, "", "no"), options={"instruction": TASK}),
    "long": Case(pairs=[("a wing", "lift air " * 40), ("heat", "air")], options={"max_length": 40}),
    "sigmoid": Case(template="zerank", settings=SIGMOID),
}
EACH = {name: Case(name, SHORT, instructions=(None, TASK), exits=EXITS) for name in CLASSIFIERS}
QUICK = {name: case for name, case in EACH.items() if name in FIRST} | WORDS
SLOW = {name: case for name, case in EACH.items() if name not in FIRST}


def run_stock(packages, jobs, scores):
    """stock.py in a process of its own, with `packages` as its site-packages."""
    arguments = [Path(__file__).with_name("stock.py"), packages, jobs, scores]
    return subprocess.run([sys.executable, "-I", "-S", *map(str, arguments)], capture_output=True, text=True)


def scores_alone(jobs, folder):
    """What stock.py finds in a process that cannot import this package."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run = run_stock(Path(transformers.__file__).parents[1], folder / "jobs.json", folder / "scores.json")
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "scores.json").read_text())


def export(name, case, root):
    """The re-ranker of a case, and its jobs for stock.py."""
    path = write_reranker(case.backbone, root / name, case.template)
    if case.settings:
        (path / "config_sentence_transformers.json").write_text(json.dumps(case.settings))
    reranker = load(path, **case.options)
    reranker.export(str(root / name / "out"), list(EXITS), format="transformers", allow_uncapped=name in CAPPED)
    directories = [str(root / name / "out" / f"exit-{layer}") for layer in case.exits]
    return reranker, [[directory, case.pairs, case.instructions] for directory in directories]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """For the name of a case: its folder of exits, its re-ranker, and the scores of stock libraries.

    A quick case is scored here. All cases are scored in a process without this package when a slow one is asked for.
    """
    root, found, jobs = tmp_path_factory.mktemp("exported"), {}, {}

    def of(name):
        for one, case in (EACH | WORDS if name in SLOW else {name: QUICK[name]}).items():
            if one not in found:
                reranker, jobs[one] = export(one, case, root)
                stock = {} if one in SLOW else {key: scores for job in jobs[one] for key, scores in score(*job).items()}
                found[one] = (root / one / "out", reranker, stock)
        if name in SLOW and not found[name][2]:
            alone = scores_alone([job for each in jobs.values() for job in each], root)
            for one in SLOW:
                found[one][2].update(alone)
        return found[name]

    return of


def test_stock_libraries_are_not_asked_where_our_package_can_be_imported(tmp_path):
    run = run_stock(ROOT, tmp_path / "jobs.json", tmp_path / "scores.json")
    assert run.returncode == 1
    assert f"flagembedding_matryoshka can be imported from {ROOT / 'flagembedding_matryoshka'}" in run.stderr


@pytest.mark.slow
def test_quick_cases_need_no_package_of_ours(exported):
    _, _, alone = exported(next(iter(SLOW)))
    for name in QUICK:
        _, _, stock = exported(name)
        for key, scores in stock.items():
            for library, values in scores.items():
                close(torch.tensor(alone[key][library]), torch.tensor(values), 1e-5)


@BACKBONE
def test_stock_libraries_give_the_scores_of_the_exit(name, exported):
    root, reranker, stock = exported(name)
    for layer in EXITS:
        for instruction in (None, TASK):
            scores = reranker.compute_score(PAIRS, cutoff_layers=layer, instruction=instruction)
            expected = uncapped(name, scores)
            assert expected.std() > 1e-2
            for found in stock[f"{root / f'exit-{layer}'} {instruction}"].values():
                close(torch.tensor(found), expected, 1e-5)


@BACKBONE
def test_an_exported_exit_loads_here_with_equal_scores(name, exported):
    root, reranker, _ = exported(name)
    back = load(root / "exit-3")
    assert back.config.exit_layers == [3] and back.description.architecture.value == "sequence classification"
    for instruction in (None, TASK):
        expected = uncapped(name, reranker.compute_score(PAIRS, cutoff_layers=3, instruction=instruction))
        close(torch.tensor(back.compute_score(PAIRS, instruction=instruction)), expected, 1e-5)


@pytest.mark.parametrize("name", sorted(set(BACKBONES) - set(CLASSIFIERS)))
def test_a_backbone_without_a_classifier_is_refused_by_name(name, tmp_path):
    reranker = load(write_reranker(name, tmp_path, "mxbai-v2"))
    with pytest.raises(ValueError, match=f"transformers has no {name} for sequence classification.*mistral.*qwen3"):
        reranker.export(str(tmp_path / "out"), 3, format="transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CAPPED)
def test_a_cap_is_refused(name, tmp_path):
    reranker = load(write_reranker(name, tmp_path, "mxbai-v2"))
    with pytest.raises(ValueError, match=r"caps its scores \(final_logit_softcapping=3.0\).*allow_uncapped"):
        reranker.export(str(tmp_path / "out"), 3, format="transformers")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A layer-wise re-ranker whose template needs seams: its tokenizer joins "?" and a line break."""
    return write_reranker("qwen3", tmp_path_factory.mktemp("qwen3"), "cost_wise")


def test_the_base_chat_template_and_our_fields_do_not_travel(qwen3, tmp_path):
    reranker = load(qwen3)
    reranker.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    reranker.export(str(tmp_path), 3, format="transformers")
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"layer_wise", "template", "exits", "start_layer", "head_token_id", "compress_weights"} & config.keys()
    assert config["architectures"] == ["Qwen3ForSequenceClassification"] and config["num_hidden_layers"] == 3
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == (tmp_path / "chat_template.jinja").read_text()
    assert "m.content" not in (tmp_path / "chat_template.jinja").read_text()


def test_texts_that_a_tokenizer_would_join_with_the_words_keep_their_scores(exported):
    root, reranker, stock = exported("seams")
    assert "ue010" in (root / "exit-3" / "chat_template.jinja").read_text()
    expected = torch.tensor(reranker.compute_score(WORDS["seams"].pairs, cutoff_layers=3))
    for scores in stock[f"{root / 'exit-3'} None"].values():
        close(torch.tensor(scores), expected, 1e-5)


def test_a_tokenizer_that_transformers_builds_anew_cannot_have_seams(tmp_path):
    reranker = load(write_reranker("qwen2", tmp_path, "cost_wise"))
    with pytest.raises(ValueError, match="chat template of a qwen2, whose tokenizer is a Qwen2Tokenizer: of the query"):
        reranker.export(str(tmp_path / "out"), 3, format="transformers")


@pytest.mark.parametrize("parity", ["parity", "parity_gemma2", "parity_minicpm"])
def test_a_begin_of_sequence_token_is_written_by_the_template_alone(parity, shared, tmp_path):
    source = load(shared(parity) / "layerwise_model", template="cost_wise")
    if parity == "parity_minicpm":
        with pytest.raises(ValueError, match="transformers has no granite"):
            source.export(str(tmp_path / "out"), format="transformers")
        return
    source.export(str(tmp_path / "out"), format="transformers", allow_uncapped=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "query", "content": "a wing?"}, {"role": "document", "content": "it\n"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    (built,) = source.tokenize([("a wing?", "it\n")])
    assert tokenizer(rendered)["input_ids"] == built.input_ids.tolist()
    assert built.input_ids[0] == source.tokenizer.bos_token_id


@pytest.mark.slow
def test_an_instruction_of_the_checkpoint_is_the_default_of_both_libraries(exported):
    root, reranker, stock = exported("instruction")
    back = load(root / "exit-3")
    for instruction in (None, "", "no"):
        expected = torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=3, instruction=instruction))
        close(torch.tensor(stock[f"{root / 'exit-3'} {instruction}"]["CrossEncoder"]), expected, 1e-5)
        close(torch.tensor(back.compute_score(PAIRS, instruction=instruction)), expected, 1e-5)
    assert back.description.instruction.value == TASK
    expected = torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=3))
    close(torch.tensor(stock[f"{root / 'exit-3'} None"]["transformers"]), expected, 1e-5)


def test_long_documents_are_cut_where_this_package_cuts_them(exported):
    root, reranker, stock = exported("long")
    expected = torch.tensor(reranker.compute_score(WORDS["long"].pairs, cutoff_layers=3))
    close(torch.tensor(stock[f"{root / 'exit-3'} None"]["CrossEncoder"]), expected, 1e-5)
    assert load(root / "exit-3").max_length == 40


def test_a_sigmoid_divides_by_the_temperature(exported):
    root, reranker, stock = exported("sigmoid")
    expected = torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=3, normalize=True))
    close(torch.tensor(stock[f"{root / 'exit-3'} None"]["CrossEncoder"]), expected, 1e-5)
    config = json.loads((root / "exit-3" / "config.json").read_text())
    assert config["sentence_transformers"] == SIGMOID
    back = load(root / "exit-3")
    assert back.temperature == 1
    close(torch.tensor(back.compute_score(PAIRS, normalize=True)), expected, 1e-5)


def test_without_an_activation_the_temperature_is_kept(tmp_path):
    reranker = load(write_reranker("qwen3", tmp_path, "zerank"))
    reranker.export(str(tmp_path / "out"), 3, format="transformers")
    back = load(tmp_path / "out")
    expected = torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=3, normalize=True))
    close(torch.tensor(back.compute_score(PAIRS, normalize=True)), expected, 1e-5)
    assert back.temperature == 5


def calibrations(folder):
    files = [folder / f"exit-{layer}" / "matryoshka_export.json" for layer in EXITS]
    return [json.loads(file.read_text())["calibration"] for file in files]


def test_the_calibration_and_the_fingerprint_of_the_source_are_written(qwen3, tmp_path):
    reranker = load(qwen3)
    reranker.export(str(tmp_path), 3, format="transformers")
    written = json.loads((tmp_path / "matryoshka_export.json").read_text())
    assert (written["cutoff_layer"], written["format"], written["calibration"]) == (3, "transformers", None)
    assert len(written["fingerprint"]) == 64 and written["source"] == str(qwen3)
    setting = {"cutoff_layers": [3], "compress_layers": [], "compress_ratio": 1, "cascade": []}
    platt = {"method": "platt", "slope": 2.0, "intercept": 0.5}
    plan = {
        "exit_layers": reranker.config.exit_layers,
        "adapters": [],
        "data": "wings",
        "queries": 9,
        "candidates": "bm25",
        "settings": [{"setting": setting, "flops_share": 0.5, "ndcg_share": 0.9, "calibration": platt}],
        "scored_with": {"dtype": "float32"},
        "weights": written["fingerprint"],
    }
    beside = shutil.copytree(qwen3, tmp_path / "planned")
    (beside / PLAN_NAME).write_text(json.dumps(plan))
    load(beside).export(str(tmp_path), [3, 6], format="transformers")
    assert calibrations(tmp_path) == [platt | {"data": "wings", "scored_with": {"dtype": "float32"}}, None]
    (beside / PLAN_NAME).write_text(json.dumps(plan | {"weights": "0" * 64}))
    with pytest.warns(UserWarning, match="the export has no calibration: .* was measured with other weights"):
        load(beside).export(str(tmp_path), [3, 6], format="transformers")
    assert calibrations(tmp_path) == [None, None]


def test_it_replaces_an_earlier_checkpoint_but_not_a_card_of_the_user(
    qwen3, tmp_path, tiny_layerwise_path, tiny_raw_model_path
):
    reranker = load(qwen3)
    reranker.export(str(tmp_path / "fresh"), 3, format="transformers")
    used = leave(tmp_path / "used", tiny_layerwise_path, tiny_raw_model_path)
    (used / "README.md").write_text("mine")
    reranker.export(str(used), 3, format="transformers")
    assert files(used) - set(OWN) == files(tmp_path / "fresh") - set(OWN)
    assert (used / "README.md").read_text() == "mine"
    card = (tmp_path / "fresh" / "README.md").read_text()
    assert "layers 1 to 3" in card and "vllm serve" in card
    reranker.export(str(tmp_path / "fresh"), 6, format="transformers")
    assert "layers 1 to 6" in (tmp_path / "fresh" / "README.md").read_text()
    reranker.export(str(tmp_path / "fresh"), [3, 6])
    assert load(tmp_path / "fresh").config.exit_layers == [3, 6]
    assert not (tmp_path / "fresh" / "sentence_bert_config.json").exists()


def test_token_adapters_are_refused(qwen3, tmp_path, monkeypatch):
    assert token_adapter_ratios(load(qwen3).model) == set()
    monkeypatch.setattr(plain, "token_adapter_ratios", lambda model: {2})
    with pytest.raises(ValueError, match=r"token adapters for the ratios \[2\] are attached"):
        load(qwen3).export(str(tmp_path / "out"), 3, format="transformers")


def test_formats_and_precisions_are_named(qwen3, tmp_path):
    reranker = load(qwen3)
    with pytest.raises(ValueError, match="format is 'onyx', but must be one of layerwise, transformers"):
        reranker.export(str(tmp_path / "out"), format="onyx")
    with pytest.raises(ValueError, match="precision='q8_0', but format='transformers' takes none"):
        reranker.export(str(tmp_path / "out"), format="transformers", precision="q8_0")
    with pytest.raises(ValueError, match="precision='q4_0', but format='gguf' takes f32, f16, q8_0"):
        reranker.export(str(tmp_path / "out"), format="gguf", precision="q4_0")
    for given in ({"precision": "f32"}, {"sample": [("a", "b")]}, {"allow_uncapped": True}):
        with pytest.raises(ValueError, match=f"{next(iter(given))}=.* given, but format='layerwise' takes none of"):
            reranker.export(str(tmp_path / "out"), **given)
    with pytest.raises(ValueError, match="sample=1 pairs, but precision='bf16': only 'int8' measures ranges"):
        reranker.export(str(tmp_path / "out"), format="openvino", precision="bf16", sample=[("a", "b")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("format", "precision", "package"),
    [
        ("onnx", None, "onnxscript"),
        ("openvino", "f32", "openvino"),
        ("openvino", "int8", "nncf"),
        ("gguf", None, "gguf"),
    ],
)
def test_a_package_that_is_missing_is_named(format, precision, package, qwen3, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"format='{format}' needs the package {package}: pip install 'flagembedding_matryoshka\[{format}\]'"
    with pytest.raises(ImportError, match=message):
        load(qwen3).export(str(tmp_path / "out"), 3, format=format, precision=precision)
    assert not (tmp_path / "out").exists()


def test_a_model_in_bfloat16_keeps_its_format_and_a_float32_head(qwen3, tmp_path):
    from safetensors.torch import load_file

    from flagembedding_matryoshka import MatryoshkaReranker

    MatryoshkaReranker(str(qwen3), dtype="bfloat16", devices="cpu").export(str(tmp_path), 3, format="transformers")
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["score.weight"].dtype == torch.float32 and weights["model.norm.weight"].dtype == torch.bfloat16
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).dtype == torch.bfloat16
