import random

import pytest
from sources.prose import prose_pairs
from sources.questions import questions
from sources.surface import bare, mistyped, typed
from sources.texts import cut, is_english, sentences

QUESTIONS = [
    ("The kernel is a program that manages memory.", "What is the kernel?"),
    ("Ada Lovelace was an English writer and mathematician.", "Who was Ada Lovelace?"),
    ("The engine was built by Charles Babbage in London.", "Who built the engine?"),
    ("The value is computed by the driver.", "What is the value computed by?"),
    ("The archive contains three files.", "What does the archive contain?"),
    ("The bridge was opened in 1889 after two years.", "When was the bridge opened?"),
    ("In 1789, the old prison was stormed by a crowd.", "When was the old prison stormed by a crowd?"),
    ("The driver is slow because it waits for the disk.", "Why is the driver slow?"),
    ("To remove a package from the system, run the command.", "How to remove a package from the system"),
    ("This lets you edit the page.", "How can I edit the page?"),
    ("There are three kinds of lock in the kernel.", "How many kinds of lock are there in the kernel?"),
    ("If the disk is full, the program stops.", "What happens if the disk is full?"),
    ("Indexes are used to find rows.", "What are indexes used for?"),
    ("Raster maps can be exported to images by the tool.", "How can raster maps be exported to images?"),
]


@pytest.mark.parametrize(("sentence", "question"), QUESTIONS)
def test_questions_that_a_sentence_answers(sentence, question):
    assert questions(sentence) == [question]


@pytest.mark.parametrize(
    "sentence", ["It is a program.", "This was built by them.", "Run it.", "And the page is a page."]
)
def test_what_needs_the_text_around_it_is_not_asked(sentence):
    assert questions(sentence) == []


def test_sentences_do_not_end_at_abbreviations():
    assert sentences("See e.g. Smith et al. The rest follows. It ends (here.) Yes!") == [
        "See e.g. Smith et al. The rest follows.",
        "It ends (here.)",
        "Yes!",
    ]


def test_passages_are_cut_after_a_sentence():
    text = " ".join(f"This is sentence number {number} of them." for number in range(60))
    lengths = {len(cut(text, random.Random(seed)).split()) for seed in range(200)}
    assert min(lengths) >= 28 and 120 < max(lengths) <= 200 and all(length % 7 == 0 for length in lengths)
    assert cut(text, random.Random(1), 20).endswith("of them.")


def test_what_is_english():
    assert is_english("The words of this sentence are those of a language that is spoken by many of the people in it.")
    assert not is_english("Сортировка по случаю будет вставлять еще один уровень")
    assert not is_english(
        "Les mots de cette phrase sont ceux de la langue que nous parlons ici depuis toujours sans doute"
    )
    assert not is_english("x = {1: [2, 3]}; y = x[1][0] ** 2") and not is_english("")


def test_queries_are_typed_in_many_ways():
    query = "What does the Parser return, then?"
    ways = [typed(query, random.Random(seed)) for seed in range(1000)]
    assert 40 < ways.count(query.upper()) < 120
    assert 100 < ways.count("what does the parser return then") < 200
    assert 150 < ways.count(query.rstrip("?")) < 250
    assert ways.count(query) > 450
    assert bare("Read (a) C-like file's name: x.y!") == "read a c-like file's name x.y"


def test_a_slip_of_the_finger_is_one_letter():
    slips = {mistyped("a parser", random.Random(seed)) for seed in range(50)}
    assert "a praser" in slips and "a prser" in slips
    assert all(slip.startswith("a p") and len(slip) in (7, 8) for slip in slips)
    assert mistyped("a few", random.Random(1)) == "a few"


def test_paragraphs_get_queries_of_their_own_words_and_the_same_each_time():
    def paragraph(i):
        return (
            f"The gadget{i} is a device that turns water into steam{i} for the people of the town. "
            f"In the valley{i} of the river it was used for years, and the owners of the mill{i} were proud of it. "
            f"A visitor to the museum{i} can still see how the lever{i} of it was made to work by the smith. "
            "All of this is told in a book that was written by one of the engineers."
        )

    pairs = list(prose_pairs(1, map(paragraph, range(200))))
    assert len(pairs) > 120 and pairs == list(prose_pairs(1, map(paragraph, range(200))))
    assert sum(pair.query.startswith("What is the gadget") for pair in pairs) > 30
    assert any(pair.query not in pair.passage and pair.query.startswith("A visitor") for pair in pairs)
