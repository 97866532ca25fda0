"""How many of the package's functions and files lie on the way of a score, over all threads."""

import sys
import threading
from pathlib import Path

import pytest

import flagembedding_matryoshka
from flagembedding_matryoshka import MatryoshkaReranker

PACKAGE = Path(flagembedding_matryoshka.__file__).parent
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
QUERY = "how does a wing lift"
DOCUMENTS = ["air flows faster over the upper side", "heat and flux"]


def own_functions(call):
    """(file, qualified name) of each function of the package that `call` enters, comprehensions left out."""
    found = set()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_name not in COMPREHENSIONS and PACKAGE in Path(code.co_filename).parents:
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has none
            found.add((Path(code.co_filename).relative_to(PACKAGE).as_posix(), name))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


@pytest.mark.parametrize(
    ("arguments", "functions", "files"),
    [
        pytest.param({}, 60, 14, id="compute_score"),
        pytest.param({"cascade": {3: 0.5}}, 80, 16, id="rank with a cascade"),
    ],
)
def test_few_functions_in_few_files_lie_on_the_way_of_a_score(tiny_layerwise_path, arguments, functions, files):
    reranker = MatryoshkaReranker(tiny_layerwise_path, dtype="float32", devices="cpu")

    def call():
        if arguments:
            reranker.rank(QUERY, DOCUMENTS, **arguments)
        else:
            reranker.compute_score([(QUERY, document) for document in DOCUMENTS])

    call()
    found = own_functions(call)
    by_file = {file: sorted(name for of, name in found if of == file) for file, _ in sorted(found)}
    for file, names in by_file.items():
        print(f"{file}: {', '.join(names)}")
    print(f"{len(found)} functions in {len(by_file)} files")
    assert len(found) <= functions and len(by_file) <= files
