"""Questions that a sentence answers, by rules that come out grammatical most of the time."""

import re
from collections.abc import Callable

DETERMINERS = "the|an?|each|every|most|some|all|many"
NOUNS = rf"(?:(?i:{DETERMINERS}) )?[\w'\"-]+(?: (?:of (?:the |an? )?)?[\w'\"-]+){{0,4}}?"
BE = "is|are|was|were"
AUXILIARY = f"{BE}|can|could|must|should|will|may|might|cannot"
NO_SUBJECT = re.compile(
    r"""\b(?:it|its|this|that|these|those|there|they|their|them|he|him|his|she|her|we|our|you|your|i|one|which|who|what|
    where|when|if|while|because|so|such|thus|then|also|but|and|or|not|as|for|in|on|at|to|by|with|from|here|note|however|
    first|second|only|is|are|was|were|be|been|being|has|have|had|do|does|did|can|will|would|could|should|must|may|might|
    since|although|how|why|use|see|both|another|others?|former|latter|let|please|currently|usually|instead|after|before|
    example|following|above|below)\b""",
    re.IGNORECASE | re.VERBOSE,
)
POINTING = re.compile(r"\b(?:this|that|it|its|these|those|them|they|their|which|such)\b")
PERSON = re.compile(
    r"\b(?:philosopher|king|queen|writer|poet|author|leader|scientist|engineer|president|person|painter|composer)\b"
)
IRREGULAR = dict(
    written="wrote", made="made", built="built", given="gave", taken="took", chosen="chose", found="found",
    begun="began", drawn="drew", led="led", held="held", brought="brought", put="put", known="knew",
    sent="sent", shown="showed", read="read", set="set",
)  # fmt: skip
TRANSITIVE = dict(
    contains="contain", means="mean", includes="include", returns="return", provides="provide", requires="require",
    uses="use", supports="support", represents="represent", describes="describe", specifies="specify", causes="cause",
    affects="affect", produces="produce", defines="define", controls="control", computes="compute", creates="create",
    allows="allow", implies="imply", determines="determine", indicates="indicate",
) | {"depends on": "depend on", "consists of": "consist of", "refers to": "refer to"}  # fmt: skip
VERB = re.compile(
    r"""(?:[a-z]+(?:ate|ize|ise|ify|ect|ide|ove|ind|ead|end|ort|ose|ace|ore|ave|all|ild|ange|are|art|ure|eck|ess|elp)|
    add|build|change|check|copy|create|delete|edit|find|get|install|make|open|print|run|see|send|set|show|stop|use|view|
    write)$""",
    re.VERBOSE,
)


def subject(text: str, verb: str = "") -> str | None:
    """A noun phrase as it stands inside a question, or None where it would need the text around it.

    The first word loses its capital where it is an article or the noun a plural: other words may be names.
    """
    if NO_SUBJECT.search(text) or not re.search("[a-z]{3}|[A-Z]{2}", text):
        return None
    first, space, rest = text.partition(" ")
    article = rest and re.fullmatch(DETERMINERS, first, re.IGNORECASE)
    plural = re.fullmatch("[A-Z][a-z]+", first) and (verb in ("are", "were") or rest.endswith("s"))
    return first.lower() + space + rest if article or plural else text


def define(match: re.Match[str]) -> str | None:
    """Of "X is a Y": what X is, or who."""
    if (what := subject(match["x"], match["be"])) is None:
        return None
    return f"{'Who' if PERSON.search(match['rest']) and match['x'].istitle() else 'What'} {match['be']} {what}?"


def passive(match: re.Match[str]) -> str | None:
    """Of "X is made by Y": what makes X."""
    what, participle = subject(match["x"], match["be"]), match["verb"]
    past = IRREGULAR.get(participle) or (participle if participle.endswith("ed") else None)
    if what is None or past is None:
        return None
    if match["be"] in ("is", "are"):
        return f"What {match['be']} {what} {participle} by?"
    return f"{'Who' if match['by'][0].isupper() else 'What'} {past} {what}?"


def transitive(match: re.Match[str]) -> str | None:
    """Of "X contains Y": what X contains."""
    what = subject(match["x"])
    return what and f"What does {what} {TRANSITIVE[match['verb']]}?"


def asked_with(word: str) -> Callable[[re.Match[str]], str | None]:
    """What turns "X is Y because Z" into "Why is X Y?": the auxiliary goes before the subject."""

    def ask(match: re.Match[str]) -> str | None:
        what, auxiliary = subject(match["x"], match["aux"]), match["aux"]
        if (
            what is None
            or len(match["y"].split()) > 9
            or re.search(r"[,;:]|\b(?:that|which|it|this|they)\b", match["y"])
        ):
            return None
        auxiliary, negation = ("can", " not") if auxiliary == "cannot" else (auxiliary, "")
        return f"{word} {auxiliary} {what}{negation} {match['y']}?"

    return ask


def how_to(match: re.Match[str]) -> str | None:
    """Of "To do X, ...", "you can do X": how that is done."""
    goal = match["goal"]
    if not VERB.match(goal.split()[0]) or not 3 <= len(goal.split()) <= 12 or POINTING.search(goal):
        return None
    return f"How {('do I', 'can I', 'to')[len(goal) % 3]} {goal}" + ("" if len(goal) % 3 == 2 else "?")


def used_for(match: re.Match[str]) -> str | None:
    """Of "X is used to Y": what X is for."""
    what = subject(match["x"], match["be"])
    return what and f"What {match['be']} {what} used for?"


def how_many(match: re.Match[str]) -> str | None:
    """Of "There are three X": how many there are."""
    if len(match["what"].split()) > 4:
        return None
    return f"How many {match['what']} are there{match['where'] or ''}?"


def conditional(match: re.Match[str]) -> str | None:
    """Of "If X, Y": what happens then."""
    clause = match["clause"]
    if not re.match(r"(?:an?|the|you|two|some|any|no) ", clause) or not 4 <= len(clause.split()) <= 10:
        return None
    return f"What {'happens ' if len(clause) % 3 else 'should I do '}{match['word'].lower()} {clause}?"


COUNT = r"(?:two|three|four|five|six|seven|eight|nine|ten|twelve|\d+)"
RULES = [
    (rf"^(?P<x>{NOUNS}) (?P<aux>{AUXILIARY}) (?P<y>[^.]{{3,80}}?),? (?:because|since) [a-z]", asked_with("Why")),
    (rf"^(?P<x>{NOUNS}) (?P<aux>was|were) (?P<y>[^.]{{3,60}}?) in (?:the year )?\d{{4}}\b", asked_with("When")),
    (rf"^In \d{{4}},? (?P<x>{NOUNS}) (?P<aux>was|were) (?P<y>[^.,;]{{3,60}})[.,;]", asked_with("When")),
    (
        rf"^There are (?:\w+ )?{COUNT} (?P<what>[a-z][\w -]+?)(?P<where> (?:in|to|for) [^.,:;]{{3,40}})?[.,:;]",
        how_many,
    ),
    (rf"^(?P<x>{NOUNS}) (?P<be>is|are) used (?:to|for|by|as) [a-z]", used_for),
    (
        rf"^(?P<x>{NOUNS}) (?P<aux>can|may|must|should|could) (?P<y>be \w+ed[^.,;]{{0,50}}?) (?:by|using|through) ",
        asked_with("How"),
    ),
    (
        rf"^(?P<x>{NOUNS}) (?P<be>{BE}) (?:\w+ly )?(?P<verb>\w+(?:ed|en|de|lt|wn|un|ght|und|ut)) by (?P<by>[\w\"'])",
        passive,
    ),
    (rf"^(?P<x>{NOUNS}) (?P<be>{BE}) (?:an?|the|one of the|any) (?P<rest>.+)", define),
    (rf"^(?P<x>{NOUNS}) (?P<verb>{'|'.join(TRANSITIVE)}) (?!that)[a-z]", transitive),
    (r"^(?:In order to|To|(?:If|When) you (?:want|wish|need) to) (?P<goal>[a-z][^.,;:()]+),", how_to),
    (r"\b(?:allows|lets|enables) (?:you|users|the user) (?:to )?(?P<goal>[a-z][^.,;:()]+)[.,]", how_to),
    (r"\b(?:you|users) can (?P<goal>[a-z][^.,;:()]+?)(?: by| using| with|[.,])", how_to),
    (r"^(?P<word>When|If) (?P<clause>[a-zA-Z][^.,;:()]+), ", conditional),
]


def questions(sentence: str) -> list[str]:
    """The questions whose answer the sentence is, one a rule at most, the most telling first."""
    found = []
    for pattern, ask in RULES:
        match = re.search(pattern, sentence)
        question = match and ask(match)
        if question and 3 <= len(question.split()) <= 20 and question.count('"') % 2 == 0:
            found.append(question)
    return found
