import json

import pytest

from flagembedding_matryoshka.text.pairs import PairTokenizer
from flagembedding_matryoshka.text.templates import TEMPLATES, Template

EVERY = pytest.mark.parametrize("name", TEMPLATES)
LONG = "air flows faster over the upper side of a wing. " * 30


@EVERY
def test_a_template_is_found_by_name_and_survives_json(name, tmp_path):
    template = Template.load(name)
    assert Template.load(json.loads(json.dumps(template.to_json()))) == template
    (tmp_path / "template.json").write_text(json.dumps(template.to_json()))
    assert Template.load(tmp_path / "template.json") == Template.load(str(tmp_path / "template.json")) == template
    assert Template.load(template) is template


def test_a_file_says_what_differs(tmp_path):
    (tmp_path / "own.json").write_text('{"prompt": "Is B about A?", "head_tokens": ["Yes", "No"]}')
    assert Template.load(tmp_path / "own.json") == Template(prompt="Is B about A?", head_tokens=("Yes", "No"))


@EVERY
@pytest.mark.parametrize("lengths", [(40, 40), (40, 400), (400, 40)])
def test_truncation_leaves_all_of_the_templates_words(name, lengths, tiny_tokenizer):
    template = TEMPLATES[name]
    tokenizer = PairTokenizer(tiny_tokenizer, template)
    bos = tokenizer.bos_ids.tolist()
    ends = {end: tokenizer.plain(end).tolist() for end in (template.query_end, template.passage_end)}
    before, between, behind, prompt = (
        tokenizer.fixed(text).tolist() for text in (template.before, template.between, template.behind, template.prompt)
    )
    for query, passage in [(LONG, LONG), ("a wing", LONG), (LONG, "a wing"), ("", LONG), ("a", "")]:
        room = len(bos + before + between) + sum(lengths) + 10
        (pair,) = tokenizer.build([(query, passage)], *lengths, room)
        ids, passage_ids, last = pair.input_ids.tolist(), pair.passage_ids.tolist(), len(behind + prompt)
        assert ids[: len(bos + before)] == bos + before
        assert ids[len(ids) - last :] == behind + prompt
        if pair.passage_is_cut:
            assert passage_ids[len(passage_ids) - len(ends[template.passage_end]) :] == ends[template.passage_end]
        if template.passage_first:
            assert pair.lead.ids.tolist() == bos + before
            own = pair.prompt_ids.tolist()[len(between) : pair.prompt_length - last]
            assert pair.prompt_ids.tolist()[: len(between)] == between
        else:
            assert pair.prompt_length == last
            own = pair.lead.ids.tolist()[len(bos + before) : pair.query_length - len(between)]
            assert pair.lead.ids.tolist()[pair.query_length - len(between) :] == between
        if pair.query_is_cut:
            assert own[len(own) - len(ends[template.query_end]) :] == ends[template.query_end]
        assert len(own) <= lengths[0] and pair.passage_length <= lengths[1]


def test_words_around_the_texts():
    template = Template(query_instruction="task", query_format="{}\\nquestion: {}\\nanswer:", passage_instruction="")
    assert template.query("what?") == "task\nquestion: what?\nanswer:"
    assert (template.query_end, template.passage_end) == ("\nanswer:", "")
    assert template.passage("text with {} in it") == "text with {} in it"


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"query_format": "{}"}, ValueError, r"query_format must have a {} for the instruction .* got '{}'"),
        ({"passage_format": "{} {} {}"}, ValueError, "passage_format must have"),
        ({"query_format": "{{}} {}"}, ValueError, "query_format must have"),
        ({"query_format": "{} {x} {}"}, ValueError, "query_format must have"),
        ({"query_format": "{} {} {"}, ValueError, "query_format must have"),
        ({"head_tokens": 3}, ValueError, "head_tokens must be one word or two"),
        ({"head_tokens": [""]}, ValueError, "head_tokens must be one word or two"),
        ({3: "x", "sufix": "x"}, ValueError, r"a template has no \[3, 'sufix'\]"),
        ({"prompt": None}, TypeError, "a template's prompt must be text, got None"),
        ({"head_tokens": "yes"}, ValueError, "head_tokens must be one word or two, or token ids, in a list, got 'yes'"),
        ({"head_tokens": []}, ValueError, "head_tokens must be one word or two"),
        ({"sufix": "x"}, ValueError, r"a template has no \['sufix'\]; it has \['before', "),
    ],
)
def test_what_is_no_template_is_refused(values, error, message):
    with pytest.raises(error, match=message):
        Template.load(values)


def test_braces_that_are_text_are_text():
    template = Template(query_format="{{x}} {}{} {{y}}", passage_format="{}{}", query_instruction="task: ")
    assert template.query("wing") == "{x} task: wing {y}"
    assert (template.query_end, template.passage_end) == (" {y}", "")


@pytest.mark.parametrize("name", ["wing " * 700, "~nobody/x", "\0", "\ud83d"])
def test_what_can_be_no_path_is_not_there(name):
    with pytest.raises(FileNotFoundError, match="there is no template"):
        Template.load(name)


def test_what_is_no_name_is_no_template():
    with pytest.raises(TypeError, match=r"a template must be a name, a JSON file or .*, got 3"):
        Template.load(3)


def test_what_is_not_there_or_no_json_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no template 'qwen4': name a JSON file or one of \['cost_wise', "):
        Template.load("qwen4")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"the template .*broken.json is no JSON"):
        Template.load(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must be a JSON object, got list"):
        Template.load(tmp_path / "list.json")
