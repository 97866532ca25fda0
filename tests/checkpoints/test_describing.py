"""A checkpoint that sentence-transformers saved scores as its CrossEncoder does, whatever its folder is called."""

import json
import shutil
import warnings

import pytest
import torch
from sentence_transformers import CrossEncoder
from torch import nn

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.cross_encoder import load_cross_encoder
from flagembedding_matryoshka.text.templates import TEMPLATES
from tests.backbones import write_raw
from tests.batches import close
from tests.chat_templates import JUDGE, KINDS, PASSING_ROLES_ON, READ, SYSTEM_IS_QUERY, write_cross_encoder
from tests.qwen import write_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [
    ("how does a wing lift?", "air flows faster over the upper side of a wing."),
    ("how does a wing lift?", "  two spaces, 3 numbers 1234\n\nand lines\n"),
    ("Why (really)?\n", "(because) of <Query>: no"),
    (" heat ", "HEAT! " * 30),
    ("what is heat", ""),
]
TASK = "Find what answers it."


def score(path, **options):
    return MatryoshkaReranker(str(path), dtype="float32", devices="cpu", **options)


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "models--a--b" / "snapshots" / "0f3c"
    folder.parent.mkdir(parents=True)
    return write_cross_encoder(folder, KINDS[request.param], false_token=request.param != "structured")


@pytest.mark.parametrize("prompt", [None, TASK])
def test_scores_are_those_of_cross_encoder(saved, prompt, tmp_path):
    oracle = CrossEncoder(str(saved), device="cpu", activation_fn=nn.Identity())
    expected = torch.tensor(oracle.predict(PAIRS, prompt=prompt))
    assert expected.std() > 1e-2
    shutil.copytree(saved, tmp_path / "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for path in (saved, tmp_path / "x"):
            close(torch.tensor(score(path).compute_score(PAIRS, instruction=prompt)), expected, 1e-5)
    ours = load_cross_encoder(str(saved), device="cpu")
    shown = torch.tensor(CrossEncoder(str(saved), device="cpu").predict(PAIRS, prompt=prompt))
    close(torch.tensor(ours.predict(PAIRS, prompt=prompt)), shown, 1e-5)


def test_the_default_prompt_is_the_instruction(tmp_path):
    prompts = {"task": TASK, "other": "Something else"}
    path = write_cross_encoder(tmp_path / "x", JUDGE, prompts=prompts, default_prompt_name="task")
    oracle = CrossEncoder(str(path), device="cpu", activation_fn=nn.Identity())
    reranker = score(path)
    expected = torch.tensor(oracle.predict(PAIRS))
    close(torch.tensor(reranker.compute_score(PAIRS)), expected, 1e-5)
    without = torch.tensor(oracle.predict(PAIRS, prompt=""))
    assert (without - expected).abs().max() > 1e-3
    close(torch.tensor(reranker.compute_score(PAIRS, instruction="")), without, 1e-5)
    found = reranker.description
    assert found.instruction.value == TASK
    assert found.instruction.source == "prompt 'task' in config_sentence_transformers.json"
    assert found.template.source == "chat_template.jinja"


def test_texts_that_are_cut_score_as_those_of_cross_encoder(tmp_path):
    path = write_cross_encoder(tmp_path / "x", JUDGE)
    oracle = CrossEncoder(str(path), device="cpu", activation_fn=nn.Identity(), max_length=120)
    reranker = score(path)
    beside = len(reranker.tokenize([("", "")])[0])
    pairs = [("how does a wing lift?", "air flows over a wing " * count) for count in (1, 20, 90)]
    cut = reranker.tokenize(pairs, max_length=120 - beside)
    assert [pair.is_cut for pair in cut] == [False, True, True] and len(cut[2]) == 120
    expected = torch.tensor(oracle.predict(pairs))
    close(torch.tensor(reranker.compute_score(pairs, max_length=120 - beside)), expected, 1e-5)


@pytest.mark.parametrize("chat_template", [JUDGE, SYSTEM_IS_QUERY, None])
def test_a_sequence_classifier_is_an_exit_at_the_end(chat_template, tmp_path):
    path = write_cross_encoder(tmp_path / "x", chat_template, classifier=True, activation_fn=nn.Identity())
    reranker = score(path)
    assert reranker.config.exit_layers == [6]
    expected = torch.tensor(CrossEncoder(str(path), device="cpu").predict(PAIRS))
    assert expected.std() > 1e-2
    close(torch.tensor(reranker.compute_score(PAIRS)), expected, 1e-5)
    close(torch.tensor(load_cross_encoder(str(path), device="cpu").predict(PAIRS)), expected, 1e-5)
    assert reranker.description.architecture.value == "sequence classification"


@pytest.mark.parametrize(
    ("name", "expected"),
    [(None, "sigmoid"), (nn.Identity(), "identity"), (nn.Tanh(), "torch.nn.modules.activation.Tanh")],
)
def test_the_activation_is_the_one_that_was_saved(name, expected, tmp_path):
    path = write_cross_encoder(tmp_path / "x", JUDGE, activation_fn=name)
    assert inspect_checkpoint(str(path)).description.activation.value == expected
    shown = torch.tensor(CrossEncoder(str(path), device="cpu").predict(PAIRS))
    close(torch.tensor(load_cross_encoder(str(path), device="cpu").predict(PAIRS)), shown, 1e-5)


CHANGED = {
    "drops the document": (
        JUDGE.replace("{{ ns.d }}", ""),
        r"leaves out the text of the role 'document'.*it renders '<\|im_start\|>system",
    ),
    "repeats the query": (JUDGE.replace("{{ ns.d }}", "{{ ns.d }}{{ ns.q }}"), "repeats 2 times the text .* 'query'"),
    "changes case": (JUDGE.replace("{{ ns.q }}", "{{ ns.q|upper }}"), "changes its texts"),
    "shortens": (JUDGE.replace("{{ ns.q }}", "{{ ns.q[:20] }}"), "changes its texts"),
    "escapes": (JUDGE.replace("{{ ns.d }}", "{{ ns.d|tojson }}"), "changes"),
    "raises": (JUDGE + "{{ raise_exception('no roles') }}", "cannot be rendered .*no roles"),
    "apart": (
        JUDGE.replace("{{ ns.i or 'Find it' }}", ".").replace("\n<Doc", "<|im_end|>{{ ns.i }}<|im_end|><Doc"),
        "apart",
    ),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_chat_template_that_cannot_be_cut_is_refused_with_its_text(what, tmp_path):
    chat_template, message = CHANGED[what]
    path = write_cross_encoder(tmp_path / "x", JUDGE)
    (path / "chat_template.jinja").write_text(chat_template)
    with pytest.raises(ValueError, match=message):
        inspect_checkpoint(str(path))
    assert inspect_checkpoint(str(path), template="zerank").description.template.source == "the caller"


def edit(path, name, **changes):
    stored = json.loads((path / name).read_text())
    stored.update(changes)
    (path / name).write_text(json.dumps(stored))


def test_pooling_and_labels_are_refused_by_name(tmp_path):
    path = write_cross_encoder(tmp_path / "x", JUDGE, classifier=True)
    edit(path, "config.json", pooling="avg")
    with pytest.raises(
        ValueError, match="Qwen3ForSequenceClassification with pooling='avg': a score is read at the last"
    ):
        inspect_checkpoint(str(path))
    edit(path, "config.json", pooling=None, id2label={"0": "no", "1": "yes"})
    with pytest.raises(ValueError, match="Qwen3ForSequenceClassification with 2 labels"):
        inspect_checkpoint(str(path))
    path = write_cross_encoder(tmp_path / "y", JUDGE)
    modules = json.loads((path / "modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"has the modules \['Transformer', 'Pooling'\].*without pooling"):
        inspect_checkpoint(str(path))


def test_a_bias_is_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    path = write_cross_encoder(tmp_path / "x", JUDGE, classifier=True)
    weights = load_file(path / "model.safetensors")
    save_file(weights | {"score.bias": torch.ones(1)}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds weights that .* has no place for: .*bias"):
        score(path)


def test_the_first_source_that_knows_wins(tmp_path):
    path = write_causal_lm(tmp_path / "x")
    described = lambda **options: inspect_checkpoint(str(path), **options).description  # noqa: E731
    assert described().is_assumed and described().template_name.value == "cost_wise"
    assert "--template" in described().assumption and "qwen3-reranker, zerank" in described().assumption
    (path / "README.md").write_text("---\nlicense: mit\nbase_model:\n- Qwen/Qwen3-Reranker-0.6B\n---\n# A model\n")
    assert described().template_name.value == "qwen3-reranker"
    assert described().template.source == "base_model of README.md: Qwen/Qwen3-Reranker-0.6B"
    edit(path, "config.json", _name_or_path="zeroentropy/zerank-1")
    assert described().template.source == "_name_or_path in config.json: zeroentropy/zerank-1"
    # Qwen3's vocabulary and an ordinary chat template are no hint.
    (path / "chat_template.jinja").write_text(PASSING_ROLES_ON)
    assert described().template_name.value == "zerank"
    given = described(template="minicpm")
    assert (given.template_name.value, given.template.source) == ("minicpm", "the caller")


def test_an_ordinary_chat_template_does_not_make_a_re_ranker(tmp_path):
    path = write_causal_lm(tmp_path / "x")
    (path / "chat_template.jinja").write_text(PASSING_ROLES_ON)
    with pytest.warns(UserWarning, match="'cost_wise' is assumed"):
        score(path)


def test_a_name_counts_for_its_own_backbones_alone(tmp_path):
    path = write_causal_lm(tmp_path / "zerank-experiments", "mistral")
    assert inspect_checkpoint(str(path)).description.is_assumed


def test_a_chat_template_with_the_roles_needs_to_know_its_head(tmp_path):
    path = write_causal_lm(tmp_path / "x")
    (path / "chat_template.jinja").write_text(JUDGE)
    with pytest.raises(ValueError, match="nothing says which token's logit is the score"):
        inspect_checkpoint(str(path))
    named = tmp_path / "qwen3-reranker-mine"
    path.rename(named)
    found = inspect_checkpoint(str(named)).description
    assert found.template.source == "chat_template.jinja" and found.head_tokens.value == ("yes", "no")


def test_a_classifier_of_unknown_words_is_refused(tmp_path):
    path = write_cross_encoder(tmp_path / "x", JUDGE, classifier=True)
    for name in ("modules.json", "chat_template.jinja"):
        (path / name).unlink()
    with pytest.raises(ValueError, match=r"nothing says which words it was trained with.*--template.*qwen3-reranker"):
        inspect_checkpoint(str(path))
    assert MatryoshkaReranker(str(path), template="qwen3-reranker", dtype="float32", devices="cpu").compute_score(PAIRS)


def test_a_windows_path_is_parted_at_its_backslashes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_causal_lm(tmp_path / "C:\\models\\Qwen3-Reranker-0.6B\\model")
    found = inspect_checkpoint("C:\\models\\Qwen3-Reranker-0.6B\\model").description
    assert found.template.source == "the name: Qwen3-Reranker-0.6B"


def test_what_is_exported_says_itself_what_it_was_trained_with(tmp_path):
    path = write_cross_encoder(tmp_path / "x", SYSTEM_IS_QUERY, prompts={"t": TASK}, default_prompt_name="t")
    reranker = score(path)
    reranker.export(str(tmp_path / "part"), [6])
    again = score(tmp_path / "part")
    close(torch.tensor(again.compute_score(PAIRS)), torch.tensor(reranker.compute_score(PAIRS)), 1e-6)
    oracle = torch.tensor(CrossEncoder(str(path), device="cpu").predict(PAIRS))  # a sigmoid
    for exported in (
        load_cross_encoder(str(tmp_path / "part"), device="cpu"),
        CrossEncoder(str(tmp_path / "part"), device="cpu", trust_remote_code=True),
    ):
        close(torch.tensor(exported.predict(PAIRS)), oracle, 1e-5)
    assert again.description.template.value == reranker.description.template.value
    assert again.description.instruction.value == TASK


def test_rows_and_json_name_every_fact_with_its_source(tmp_path):
    path = write_causal_lm(tmp_path / "Qwen3-Reranker-0.6B")
    found = inspect_checkpoint(str(path)).description
    rows = {name: (value, source) for name, value, source in found.rows()}
    assert rows["template"] == ("qwen3-reranker", "the name: Qwen3-Reranker-0.6B")
    assert rows["head tokens"][0] == "'yes' − 'no'" and rows["backbone"][0] == "qwen3"
    assert rows["stored dtype"] == ("float32", "config.json")
    assert rows["max length"] == ("512", "default")
    stored = json.loads(json.dumps(found.to_json()))
    assert stored["template"]["value"] == TEMPLATES["qwen3-reranker"].to_json()
    assert all(fact["source"] for fact in stored.values())


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>\n<|endoftext|><|endoftext|>"])
def test_a_classifier_is_read_before_the_pad_tokens_that_its_template_ends_with(end, tmp_path):
    template = READ + "query: {{ ns.q }} document: {{ ns.d }}" + end
    path = write_cross_encoder(tmp_path / "x", template, classifier=True)
    expected = torch.tensor(CrossEncoder(str(path), device="cpu", activation_fn=nn.Identity()).predict(PAIRS))
    assert expected.std() > 1e-2
    close(torch.tensor(score(path).compute_score(PAIRS)), expected, 1e-5)
    with pytest.raises(ValueError, match=r"last token that is not the pad token '<\|endoftext\|>', but its template"):
        score(path, template={"passage_format": "{}{}<|endoftext|>", "behind": ["", "", "<|endoftext|>"], "prompt": ""})


def test_the_difference_of_two_capped_logits_is_refused(tiny_tokenizer, tmp_path):
    path = write_raw("gemma2", tiny_tokenizer, tmp_path / "bge")
    two = {"head_tokens": ["Yes", "A"]}
    with pytest.raises(ValueError, match=r"caps its logits .* difference of two: 'Yes' − 'A'"):
        score(path, template=two)
    assert inspect_checkpoint(str(path), template=two).description.obstacle  # for fine-tuning it is no obstacle
    assert score(path, template={"head_tokens": ["Yes"]}).compute_score(PAIRS)
    write_raw("gemma2", tiny_tokenizer, path, final_logit_softcapping=None)
    assert score(path, template=two).compute_score(PAIRS)


def test_a_published_re_ranker_keeps_its_temperature_beside_files_of_its_own(tmp_path):
    path = write_cross_encoder(tmp_path / "zerank-2", SYSTEM_IS_QUERY, false_token=False)
    reranker = score(path)
    assert reranker.description.template.source == "chat_template.jinja" and reranker.temperature == 5
    raw, shown = (torch.tensor(reranker.compute_score(PAIRS, normalize=value)) for value in (False, True))
    close(shown, (raw / 5).sigmoid(), 1e-6)


@pytest.mark.parametrize("kind", ["LogitScore", "Transformer"])
def test_modules_of_other_packages_are_refused_by_name(kind, tmp_path):
    path = write_cross_encoder(tmp_path / "x", JUDGE)
    modules = json.loads((path / "modules.json").read_text())
    modules[kind == "LogitScore"]["type"] = f"mine.{kind}"
    (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=rf"has the modules .*'mine\.{kind}'.*no remote code runs"):
        inspect_checkpoint(str(path))


@pytest.mark.parametrize("chat_template", [JUDGE, None])
def test_the_length_is_the_one_that_was_saved(chat_template, tmp_path):
    path = write_cross_encoder(tmp_path / "x", chat_template)
    edit(path, "tokenizer_config.json", model_max_length=120)
    pairs = [("how does a wing lift?", "air flows over a wing " * count) for count in (1, 20, 90)]
    oracle = CrossEncoder(str(path), device="cpu", activation_fn=nn.Identity())
    assert oracle.max_seq_length == 120
    if chat_template is None:
        pairs = pairs[:1]  # the tokenizer cuts the longer text of a pair, and not the passage
    reranker = score(path)
    close(torch.tensor(reranker.compute_score(pairs)), torch.tensor(oracle.predict(pairs)), 1e-5)
    assert max(map(len, reranker.tokenize(pairs))) <= 120
    shown = CrossEncoder(str(path), device="cpu").predict(pairs)
    close(torch.tensor(load_cross_encoder(str(path), device="cpu").predict(pairs)), torch.tensor(shown), 1e-5)
    assert reranker.description.max_length.source.startswith("model_max_length in tokenizer_config.json")
    edit(path, "sentence_bert_config.json", max_seq_length=90)
    assert score(path).max_length == reranker.max_length - 30
    edit(path, "tokenizer_config.json", model_max_length=10**30)
    edit(path, "sentence_bert_config.json", max_seq_length=None)
    assert score(path).max_length == 512


def test_a_long_instruction_leaves_the_query_its_room(tmp_path):
    path = write_causal_lm(tmp_path / "Qwen3-Reranker-0.6B")
    reranker = score(path)
    task = "Find the passage that answers. " * 30
    scores = [
        reranker.compute_score([(query, "air")], instruction=task, max_length=64)[0] for query in ("wing", "heat")
    ]
    assert abs(scores[0] - scores[1]) > 1e-3
    (pair,) = reranker.tokenize([("what is a wing", "air")], instruction=task, max_length=64)
    assert not pair.is_cut and "<Query>: what is a wing\n" in reranker.tokenizer.decode(pair.input_ids)


REFUSED = {
    "lower case": ({"do_lower_case": True}, "do_lower_case=True"),
    "no special tokens": ({"processing_kwargs": {"text": {"add_special_tokens": False}}}, "processing_kwargs"),
    "another length": ({"processing_kwargs": {"common": {"max_length": 9}}}, "processing_kwargs"),
    "cut": ({"processing_kwargs": {"chat_template": {"max_length": 9}}}, "processing_kwargs"),
    "no suffix": ({"processing_kwargs": {"chat_template": {"restore_suffix": False}}}, "processing_kwargs"),
    "tokens": ({"processing_kwargs": {"chat_template": {"tokenize": True}}}, "processing_kwargs"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_changes_texts_in_another_way_is_refused(what, tmp_path):
    changes, message = REFUSED[what]
    path = write_cross_encoder(tmp_path / "x", JUDGE)
    edit(path, "sentence_bert_config.json", **changes)
    with pytest.raises(ValueError, match=rf"sentence_bert_config\.json .*{message}"):
        inspect_checkpoint(str(path))


def test_without_modalities_a_cross_encoder_takes_pairs(tmp_path):
    path = write_cross_encoder(tmp_path / "x", JUDGE)
    stored = json.loads((path / "sentence_bert_config.json").read_text())
    del stored["modality_config"]
    (path / "sentence_bert_config.json").write_text(json.dumps(stored))
    oracle = CrossEncoder(str(path), device="cpu", activation_fn=nn.Identity())
    close(torch.tensor(score(path).compute_score(PAIRS)), torch.tensor(oracle.predict(PAIRS)), 1e-5)


@pytest.mark.parametrize("filter", ["[:2000]", "|truncate(700)", "[:500]"])
def test_a_template_that_shortens_long_texts_is_refused(filter, tmp_path):
    path = write_cross_encoder(tmp_path / "x", JUDGE)
    (path / "chat_template.jinja").write_text(JUDGE.replace("{{ ns.d }}", f"{{{{ ns.d{filter} }}}}"))
    with pytest.raises(ValueError, match="changes its texts"):
        inspect_checkpoint(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": {"a": "<|im_start|>query: "}}, r"with the control token '<\|im_start\|>'"),
        ({"prompts": {"a": 5}}, r"prompts\['a'\] is 5: it must be a text"),
        ({"prompts": {"b": "x"}}, r"prompts\['a'\] is None"),
    ],
)
def test_default_prompts_that_cannot_be_instructions_are_refused(changes, message, tmp_path):
    path = write_cross_encoder(tmp_path / "x", None)
    edit(path, "config_sentence_transformers.json", default_prompt_name="a", **changes)
    with pytest.raises(ValueError, match=message):
        inspect_checkpoint(str(path))


@pytest.mark.parametrize("place", ["sentence_transformers", "sbert_ce_default_activation_function"])
def test_an_activation_of_the_configuration_alone_is_applied(place, tmp_path):
    path = write_cross_encoder(tmp_path / "x", JUDGE, classifier=True)
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (path / name).unlink()
    sigmoid = "torch.nn.modules.activation.Sigmoid"
    edit(path, "config.json", **{place: {"activation_fn": sigmoid} if place == "sentence_transformers" else sigmoid})
    assert inspect_checkpoint(str(path)).description.activation.value == "sigmoid"
    scores = load_cross_encoder(str(path), device="cpu").predict(PAIRS)
    close(torch.tensor(scores), torch.tensor(score(path).compute_score(PAIRS)).sigmoid(), 1e-5)


def test_an_instruction_of_white_space_is_none_where_the_template_strips_it(tmp_path):
    path = write_cross_encoder(tmp_path / "x", JUDGE.replace("ns.i = m.content", "ns.i = m.content|trim"))
    oracle = CrossEncoder(str(path), device="cpu", activation_fn=nn.Identity())
    reranker = score(path)
    assert reranker.words.strip == ("instruction",)
    for prompt in (" ", "\n", "x "):
        expected = torch.tensor(oracle.predict(PAIRS, prompt=prompt))
        close(torch.tensor(reranker.compute_score(PAIRS, instruction=prompt)), expected, 1e-5)


def test_a_backslash_in_a_template_is_text(tmp_path):
    path = write_cross_encoder(tmp_path / "x", JUDGE.replace("<Document>:", "\\nabla <Document>:"))
    oracle = CrossEncoder(str(path), device="cpu", activation_fn=nn.Identity())
    reranker = score(path)
    assert "\\nabla" in reranker.words.words
    close(torch.tensor(reranker.compute_score(PAIRS)), torch.tensor(oracle.predict(PAIRS)), 1e-5)


@pytest.mark.parametrize(
    ("metadata", "is_known"),
    [
        ("base_model: Qwen/Qwen3-Reranker-0.6B", True),
        ("base_model:\n# a comment\n\n- Qwen/Qwen3-Reranker-4B", True),
        ("base_model: >-\n  Qwen/Qwen3-Reranker-4B", True),
        ('base_model: ["a/b", "Qwen/Qwen3-Reranker-4B"]', True),
        ("base_model: Qwen/Qwen3-0.6B # not Qwen3-Reranker", False),
        ("base_model: [", False),
        ("license: mit", False),
    ],
)
def test_the_base_of_a_model_card_is_read_as_yaml(metadata, is_known, tmp_path):
    path = write_causal_lm(tmp_path / "x")
    (path / "README.md").write_text(f"\ufeff---\n{metadata}\n---\n# Qwen3-Reranker\n", encoding="utf-8")
    assert inspect_checkpoint(str(path)).description.is_assumed != is_known
