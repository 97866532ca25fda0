"""Teachers behind an endpoint that speaks OpenAI's chat completions: vLLM, llama.cpp, Ollama, or a provider."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, TypeVar

import numpy as np

Answer = Literal["yes_no", "order"]
"""What is asked: whether one passage answers the query, or the order of a query's passages."""
T = TypeVar("T")
R = TypeVar("R")
TIMEOUT = 600.0
"""Seconds until a request without an answer is sent again."""
TOP_LOGPROBS = 20
"""Number of tokens whose log-probabilities are asked for, the most that the interface allows."""
WINDOW, STEP = 20, 10
"""Passages in a listwise request, and the distance of two windows, as in RankGPT."""
JUDGE = 'Judge whether the passage answers the query. Reply with one word, "Yes" or "No".'
RANK = (
    "Rank the passages by their relevance to the query. Reply only with the numbers of all passages, the most relevant "
    "first, such as [2] > [3] > [1]."
)


class Endpoint:
    """A scorer by a chat model behind an OpenAI-compatible endpoint.

    Args:
        model: name of the model at the endpoint.
        url: its base URL, such as http://127.0.0.1:8000/v1; None is the environment's OPENAI_BASE_URL, or OpenAI. The
            key is the environment's OPENAI_API_KEY.
        answer: "yes_no" scores each pair by the log-probability of Yes minus that of No as the first token of the
            answer (Nogueira et al., EMNLP Findings 2020). "order" asks for the order of a query's passages, in windows
            from the last to the first (RankGPT: Sun et al., EMNLP 2023); the score is minus the rank, from 0.
        concurrency: number of requests at a time.
        retries: number of times that a request is repeated after a rate limit, an error of the server or of the
            network. The waits grow, or are the server's `Retry-After`.
        scale: factor of the scores.

    Raises:
        ImportError: if openai is not installed.
        ValueError: if there is no key.
    """

    def __init__(
        self,
        model: str,
        url: str | None = None,
        answer: Answer = "yes_no",
        concurrency: int = 8,
        retries: int = 5,
        scale: float = 1.0,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError("--backend openai needs openai: pip install flagembedding_matryoshka[openai]") from error
        try:
            self.client = openai.OpenAI(base_url=url, max_retries=retries, timeout=TIMEOUT)
        except openai.OpenAIError as error:
            raise ValueError(
                "--backend openai needs the variable OPENAI_API_KEY in the environment. A server without keys accepts "
                "any value"
            ) from error
        self.model, self.answer, self.concurrency, self.scale = model, answer, concurrency, scale

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return the scores of pairs, (pairs,) float64.

        With "order", neighbouring pairs of one query are one list.

        Raises:
            openai.OpenAIError: if a request fails after all retries.
            ValueError: if an answer has neither Yes nor No, or no number of a passage.
        """
        if self.answer == "yes_no":
            return self.scale * np.array(self._map(self._judge, pairs))
        lists = [(query, [text for _, text in run]) for query, run in groupby(pairs, key=itemgetter(0))]
        return self.scale * np.concatenate(self._map(self._rank, lists))

    def _map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return the results of all items. After an error no further request is sent."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                return list(pool.map(function, items))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _complete(self, instruction: str, text: str, **options: Any) -> Any:
        messages: Any = [{"role": "system", "content": instruction}, {"role": "user", "content": text}]
        answer = self.client.chat.completions.create(model=self.model, messages=messages, temperature=0, **options)
        return answer.choices[0]

    def _judge(self, pair: tuple[str, str]) -> float:
        """Return the log-probability of Yes minus that of No.

        A word that is not among the first `TOP_LOGPROBS` tokens counts with the lowest log-probability among them,
        which is an upper bound of its own.
        """
        query, passage = pair
        text = f"Query: {query}\n\nPassage: {passage}"
        choice = self._complete(JUDGE, text, max_tokens=1, logprobs=True, top_logprobs=TOP_LOGPROBS)
        tokens = choice.logprobs.content[0].top_logprobs if choice.logprobs and choice.logprobs.content else []
        words = {"yes": -math.inf, "no": -math.inf}
        for token in tokens:
            word = token.token.strip().lower()
            if word in words:
                words[word] = float(np.logaddexp(words[word], token.logprob))
        if max(words.values()) == -math.inf:
            found = ", ".join(repr(token.token) for token in tokens) or "no log-probabilities"
            raise ValueError(f"{self.model} answers neither Yes nor No for {pair!r:.200}, but {found:.200}")
        least = min(token.logprob for token in tokens)
        yes, no = (least if value == -math.inf else value for value in words.values())
        return yes - no

    def _rank(self, item: tuple[str, list[str]]) -> np.ndarray:
        """Return minus the rank of each passage of a list, from 0, (passages,) float64.

        The passages are shuffled first, because their order in a training row tells which are relevant.
        """
        query, passages = item
        order = list(range(len(passages)))
        random.Random(query).shuffle(order)
        for end in _window_ends(len(order)):
            start = max(0, end - WINDOW)
            order[start:end] = self._sorted(query, passages, order[start:end])
        ranks = np.empty(len(order))
        ranks[order] = -np.arange(len(order))
        return ranks

    def _sorted(self, query: str, passages: Sequence[str], places: Sequence[int]) -> list[int]:
        """Return the places of some passages in the order of the model.

        Passages that the answer does not name come after the others, in the order given.
        """
        if len(places) == 1:
            return list(places)
        texts = "\n\n".join(f"[{number}] {passages[place]}" for number, place in enumerate(places, start=1))
        content = self._complete(RANK, f"Query: {query}\n\n{texts}").message.content or ""
        numbers = [int(number) - 1 for number in re.findall(r"\[(\d+)\]", content)]
        named = dict.fromkeys(places[number] for number in numbers if 0 <= number < len(places))
        if not named:
            raise ValueError(f"{self.model} names no passage such as [1] for {query!r:.100}, but {content!r:.200}")
        return list(dict.fromkeys([*named, *places]))


def _window_ends(count: int) -> list[int]:
    """Return the ends of the windows over a list, from its last passages to its first."""
    if count <= WINDOW:
        return [count]
    return [*range(count, WINDOW, -STEP), WINDOW]
