"""Ranking of one query's documents, or of the documents of many queries."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property, partial
from os import PathLike
from typing import Any, Literal

from flagembedding_matryoshka.checkpoints.adapters import token_adapter_ratios
from flagembedding_matryoshka.inference.calibration import Normalizer
from flagembedding_matryoshka.inference.chunking import Candidates, Chunking, CutDocument
from flagembedding_matryoshka.inference.deadline import Deadline
from flagembedding_matryoshka.inference.engine import Engine
from flagembedding_matryoshka.inference.fusion import read_first_stage
from flagembedding_matryoshka.inference.identity import model_fingerprint
from flagembedding_matryoshka.inference.inputs import (
    Pairs,
    as_lists,
    as_tokenized,
    excerpt,
    read_lists,
    read_passages,
)
from flagembedding_matryoshka.inference.options import (
    Call,
    RankingOptions,
    as_chunks,
    ranking_weight,
    refuse_beside_tokens,
    refuse_beyond_positions,
    resolve_call,
)
from flagembedding_matryoshka.inference.pool.pool import WorkerPool
from flagembedding_matryoshka.inference.scoring import (
    Hit,
    ReadAhead,
    rank_lists,
    refuse_min_score,
    refuse_too_short,
    score_lists,
)
from flagembedding_matryoshka.inference.store import Conditions, PassageStore, StoredPair, refuse_other_states
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.split import StateQuantization
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.pairs import PairTokenizer, TokenizedPair


class RankingMixin:
    """Rankings of documents by the scores of a re-ranker, which the class beside this one brings.

    Attributes:
        config: configuration of the model.
        model: the model.
        target_devices: the devices that tasks run on.
    """

    config: CostWiseConfig
    target_devices: list[str]
    model: CostWiseForCausalLM
    _engine: Engine | WorkerPool
    _normalizer: Callable[..., Normalizer]
    _pair_tokenizer: PairTokenizer
    _clock: Callable[[], float] = staticmethod(time.monotonic)

    def rank(
        self,
        query: str,
        documents: Iterable[str | None] | None = None,
        top_k: int | None = None,
        return_documents: bool = False,
        cascade: Mapping[int, float] | None = None,
        chunk: bool = False,
        max_chunks_per_doc: int | None = None,
        overlap: int = 0,
        deadline_ms: float | None = None,
        min_score: float | None = None,
        first_stage_scores: Iterable[float | None] | None = None,
        first_stage: Literal["order"] | None = None,
        ids: Iterable[str | None] | None = None,
        store: str | PathLike[str] | PassageStore | None = None,
        **overrides: Any,
    ) -> list[Hit]:
        """Order documents by relevance to a query, as sentence-transformers' `CrossEncoder.rank`.

        Args:
            documents: the texts. With `ids` and `store` None, or a text or None for each id.
            top_k: number of hits to return at most; None is all.
            return_documents: also return each document's text.
            cascade: {exit: fraction of all documents that go deeper}. `{8: 0.5, 16: 0.2}` keeps the best half after
                exit 8 and a fifth of all after exit 16. Dropped documents rank after the documents of deeper exits. A
                cascade is one pass, with the states of a query's documents in memory. None is the cascade that `budget`
                or `quality` chose, if any; if it keeps fewer than `top_k`, dropped documents fill up.
            chunk: cut documents that are too long into chunks that each fit beside the query, and take the best chunk
                of each document. With a cascade its fractions are of all chunks of a query, and a document comes as far
                as its furthest chunk. If fewer than `top_k` documents come to the end, dropped documents fill up.
            max_chunks_per_doc: chunks of a document at most, from its beginning; None is no limit.
            overlap: tokens that a chunk has in common with the previous chunk, at most half of its capacity.
            deadline_ms: milliseconds from the call to the ranking; None is no deadline. All documents are scored at the
                model's first exit, however long that takes. Then the most promising documents go deeper, as far as time
                allows by the measured time of earlier steps, at most to the cutoff layer. A cascade, also one that
                `budget` or `quality` chose, limits their number. Hits rank as in a cascade. Each of several queries has
                this time from the start of its computation, on one device.
            min_score: hits with a lower score are left out and do not count in `top_k`. It is compared with the score
                that is returned: raw, its sigmoid or the calibrated probability, as `normalize` says. None leaves out
                none.
            first_stage_scores: for each document the score of the first stage, such as BM25; None is no fusion.
                Documents then rank by z(score) + fusion · z(first-stage score). z is the standard score among the
                query's documents, by the population's standard deviation (Montague and Aslam, CIKM 2001); z of equal
                scores is 0. None in the list: the first stage did not find the document, which gets the lowest score
                of the query. A cascade drops candidates by the fused scores of those that still run; a deadline ranks
                the candidates that wait at an exit by their fused scores. A chunk has the score of its document.
            first_stage: "order" if the documents are in the first stage's order, without scores: rank r, from 1, gets
                the score 1 / (60 + r) (Cormack, Clarke and Büttcher, SIGIR 2009). None is no order.
            ids: the id, or None, of each passage, beside its text or instead of it. Passages that the store has are
                read from it, and the states of the others are computed from their texts. Hits also have the "id".
            store: the store: the path of a directory that `store` wrote, or the result of `open_store`, which reads its
                index once for several calls. Its store layer and ratio are the call's.
            overrides: as in `compute_score`, with one cutoff layer; also `fusion`, the weight of the first stage's
                scores: at least 0, "auto" for the plan's, or None for the default of the constructor. Also
                `between_batches`, a callable without arguments that is called before each batch of a cascade, or of a
                ranking until a deadline. Its exception ends the call. While it runs, the model may compute other calls.

        Returns:
            A dict with "corpus_id" (index into `documents`), "score" and, if asked for, "text" for each document,
            best first; ties keep the order given. With first-stage scores also "first_stage_score" and "fused_score",
            by which documents rank; z is taken over all documents, in a cascade over the candidates that ran up to the
            exit where this one stopped, with a deadline over the candidates that stopped there. With a cascade or a
            deadline also "cutoff_layer", the exit where the score was read. If the query or the document was cut, also
            "is_truncated", which is True. With `chunk` also "chunk", a dict with "start" and "end": the best chunk is
            `document[start:end]`. Between chunks is at most white space.

        Raises:
            FileNotFoundError: if `fusion` is "auto", and the model has no plan.
            TypeError, ValueError: as in `compute_score`, and if several cutoff layers are given, `top_k` is below 1,
                `deadline_ms` is not a number above 0, `min_score` is not a number or would be compared with scores of
                several exits that are not calibrated, or the cascade does not fit the model or keeps fewer than
                `top_k`.
                Chunks: if their arguments are given without `chunk` or are too small, the overlap is too large, or the
                tokenizer has no offsets.
                Fusion: if the number of first-stage scores is not the number of documents, a score is not finite, both
                `first_stage_scores` and `first_stage` are given, one of them is given without a weight, or the weight
                is given without them, is negative, not finite, or "auto" while the plan has no weight.
                Stores: if ids are given without a store or the reverse; if another model, setting or words made the
                store; if it lacks an id without a text, or has another text with an id; if it meets `chunk` or several
                devices, or `return_documents` an id without a text.
        """
        (ranking,) = self.rank_batch(
            [query],
            None if documents is None else [documents],
            top_k,
            return_documents,
            cascade,
            chunk,
            max_chunks_per_doc,
            overlap,
            deadline_ms,
            min_score,
            None if first_stage_scores is None else [first_stage_scores],
            first_stage,
            None if ids is None else [ids],
            store,
            **overrides,
        )
        return ranking

    def rank_batch(
        self,
        queries: Iterable[str],
        candidates: Iterable[Iterable[str | None]] | None = None,
        top_k: int | None = None,
        return_documents: bool = False,
        cascade: Mapping[int, float] | None = None,
        chunk: bool = False,
        max_chunks_per_doc: int | None = None,
        overlap: int = 0,
        deadline_ms: float | None = None,
        min_score: float | None = None,
        first_stage_scores: Iterable[Iterable[float | None]] | None = None,
        first_stage: Literal["order"] | None = None,
        ids: Iterable[Iterable[str | None]] | None = None,
        store: str | PathLike[str] | PassageStore | None = None,
        **overrides: Any,
    ) -> list[list[Hit]]:
        """`rank` for many queries, in common batches; `candidates` and `ids` have a list for each query.

        `instruction` may also be a list with an instruction, or None, for each query.
        `first_stage_scores` has a list of scores for each query.

        Returns, raises: as `rank`, a list for each query; ValueError if the number of lists, instructions or lists of
            first-stage scores is not the number of queries.
        """
        options = RankingOptions.of(locals(), self._clock)
        opened = None if ids is None and store is None else self._store_of(ids, store)
        lists: list[tuple[str, list[Any]]]
        if ids is not None:
            lists = list(read_passages(queries, candidates, ids, return_documents))
        elif candidates is not None:
            lists = list(zip(*as_lists(queries, candidates), strict=True))
        else:
            raise ValueError("a ranking needs the documents of each query, or ids and a store.")
        if options.deadline is not None and len(lists) == 1:
            options = replace(options, deadline=options.deadline.start())
        rows: list[tuple[str, list[Any], list[float] | None]]
        rows = [(query, documents, None) for query, documents in lists]
        if options.has_first_stage:
            rows = list(read_first_stage(lists, first_stage_scores, first_stage))
        return list(self._rank(rows, sum(len(documents) for _, documents in lists), options, opened))

    def _store_of(self, ids: Any, store: str | PathLike[str] | PassageStore | None) -> PassageStore:
        """Return the open store of a ranking. Raises ValueError unless ids and store are given."""
        if ids is None or store is None:
            raise ValueError(f"ids are {excerpt(ids)} and store is {excerpt(store)}: give both of them or neither.")
        return self.open_store(store)

    def open_store(self, store: str | PathLike[str] | PassageStore) -> PassageStore:
        """Open a store for rankings with this re-ranker. A store that is open stays as it is.

        Raises:
            FileNotFoundError: if there is no store.
            ValueError: if another model wrote it, or the re-ranker has several devices.
        """
        self._engine_of_store()
        store = store if isinstance(store, PassageStore) else PassageStore(store)
        store.check(replace(store.conditions, model=self._model_fingerprint))
        return store

    def store(
        self,
        passages: Mapping[str, str] | Iterable[tuple[str, str]],
        path: str | PathLike[str],
        store_layer: int | None = None,
        compress_ratio: int | None = None,
        state_quantization: StateQuantization | None = None,
        **overrides: Any,
    ) -> PassageStore:
        """Compute the states of passages after a store layer, and write them to a directory.

        Passages that the store has already are not computed again: a run that was interrupted goes on, and a later one
        appends. One process may write a store at a time.

        Args:
            passages: {id: text}, or an iterable of (id, text).
            path: the directory.
            store_layer: number of layers that run; None is the re-ranker's own.
            compress_ratio: number of neighbouring tokens that become one after this layer; None is the re-ranker's own.
            state_quantization: "int8" writes states in 8 bits, with a scale for every 32 channels; None writes them in
                the model's dtype.
            overrides: as in `compute_score`. Passages are cut to the length that fits beside the longest query, by
                `max_length` and `query_max_length`.

        Returns:
            the store, which knows its `bytes_per_passage`.

        Raises:
            TypeError: if an id or a text is not a string.
            ValueError: if the store was made with another model, setting, format of states or other words, has another
                text with an id, or the re-ranker has several devices; also as in `compute_score`.
        """
        engine = self._engine_of_store()
        given = {**overrides, "store_layer": store_layer, "compress_ratio": compress_ratio}
        call = Call(self._pair_tokenizer, *resolve_call(self, given))
        found = PassageStore.create(path, self._conditions(call, state_quantization))
        found.add(passages, call, partial(engine.passage_states, setting=call.setting))
        return found

    def stored_pairs(
        self, query: str, ids: Iterable[str], store: str | PathLike[str] | PassageStore, **overrides: Any
    ) -> list[StoredPair]:
        """Return the pairs of a query and stored passages, for `score_lists` and `compute_score` at the store's layer
        and ratio.

        Args:
            ids: ids of passages in the store.
            store: the store.
            overrides: as in `tokenize`.

        Raises:
            FileNotFoundError: if there is no store.
            TypeError: if an id is not a string.
            ValueError: if the store was made with another model, setting or other words, or lacks an id; also as in
                `tokenize`.
        """
        opened = self.open_store(store)
        call = Call(self._pair_tokenizer, *resolve_call(self, opened.completed(overrides)))
        opened.check(self._conditions(call, opened.conditions.state_quantization))
        ((_, passages),) = read_passages([query], None, [ids], needs_texts=False)
        return opened.pairs(
            query, passages, call, partial(self._engine_of_store().passage_states, setting=call.setting)
        )

    def _engine_of_store(self) -> Engine:
        if not isinstance(self._engine, Engine):
            raise ValueError(f"a store works on one device, and this re-ranker has {self.target_devices}.")
        return self._engine

    def _conditions(self, call: Call, state_quantization: StateQuantization | None) -> Conditions:
        return Conditions.of(self._model_fingerprint, call, token_adapter_ratios(self.model), state_quantization)

    @cached_property
    def _model_fingerprint(self) -> str:
        return model_fingerprint(self)

    def rank_iter(
        self,
        queries: Iterable[str] | Iterable[tuple[str, Iterable[str]]],
        candidates: Iterable[Iterable[str]] | None = None,
        top_k: int | None = None,
        return_documents: bool = False,
        cascade: Mapping[int, float] | None = None,
        chunk: bool = False,
        max_chunks_per_doc: int | None = None,
        overlap: int = 0,
        deadline_ms: float | None = None,
        min_score: float | None = None,
        first_stage_scores: Iterable[Iterable[float | None]] | None = None,
        first_stage: Literal["order"] | None = None,
        ids: Iterable[Iterable[str | None]] | None = None,
        store: str | PathLike[str] | PassageStore | None = None,
        **overrides: Any,
    ) -> Generator[list[Hit], None, None]:
        """Rank lists that need not fit into memory: the rankings of `rank_batch`, in the same order, as soon as known.

        The input is read ahead of the computation by some thousand pairs, the content of
        [`~flagembedding_matryoshka.inference.scoring.BATCHES_TOKENIZED_AHEAD`] batches on each device, or by one query.
        A thread reads it, and another one tokenises it. If the input has nothing for
        [`~flagembedding_matryoshka.inference.scoring.SECONDS_WITHOUT_INPUT`], the queries read so far are ranked, so it
        may wait for their rankings.

        Args:
            queries: the queries, or without `candidates` and `ids` tuples of a query and its documents.
            ids: an iterable with a list of ids for each query; it is read together with the queries.
            first_stage_scores: an iterable with a list of scores for each query; it is read together with the queries.

        Yields:
            the result of `rank` for each query.

        Raises:
            TypeError, ValueError: as `rank_batch`; errors of a list are raised when the list is read.
        """
        options = RankingOptions.of(locals(), self._clock)
        opened = None if ids is None and store is None else self._store_of(ids, store)
        read: Iterable[tuple[str, list[Any]]]
        if ids is None:
            read = read_lists(queries, candidates)
        else:
            read = read_passages(queries, candidates, ids, return_documents)
        lists = ReadAhead(read_first_stage(read, first_stage_scores, first_stage))
        rankings = self._rank(lists, None, options, opened)

        def until_closed() -> Generator[list[Hit], None, None]:
            with closing(rankings):
                try:
                    yield from rankings
                finally:
                    lists.stop()

        return until_closed()

    def _rank(
        self,
        lists: Iterable[tuple[str, Sequence[Any], Sequence[float] | None] | None],
        total: int | None,
        options: RankingOptions,
        store: PassageStore | None = None,
    ) -> Generator[list[Hit], None, None]:
        """Rank lists. Wrong options raise at once.

        Args:
            lists: each query with its documents, texts or with a store `Passage`s, and their first-stage scores, or
                None without such scores. None instead of a list: there is no other list yet.
            total: number of pairs of all lists; None if unknown.
            store: the open store; None without one.
        """
        top_k = options.top_k
        instructions, overrides = options.instructions, options.overrides
        if store is not None:
            if options.chunk:
                raise ValueError("chunk needs the texts of all documents, and a store has none.")
            overrides = store.completed(overrides)
        call = self._call(options.cascade, options.deadline, overrides)
        if options.has_first_stage or overrides.get("fusion") is not None:
            call = replace(call, fusion=ranking_weight(call.options, overrides, options.has_first_stage))
        if options.min_score is not None:
            refuse_min_score(options.min_score, call)
        normalize = self._normalizer_of(call) if call.options.normalize else None
        if store is not None:
            store.check(self._conditions(call, store.conditions.state_quantization))
        own: list[Call] | None = None
        if instructions is not None:
            if isinstance(lists, Sequence) and len(instructions) != len(lists):
                raise ValueError(f"{len(instructions)} instructions need as many queries, got {len(lists)}.")
            of_text = {
                text: call if text is None else replace(call, options=replace(call.options, instruction=text))
                for text in instructions
            }
            if normalize is not None:
                for one in of_text.values():
                    self._normalizer_of(one)  # refuses an instruction that the calibration was not measured with
            own = [of_text[text] for text in instructions]
        chunking = Chunking(call, options.max_chunks_per_doc, options.overlap) if options.chunk else None
        must_keep = 0 if top_k is None or options.cascade is None else top_k
        if must_keep and chunking is None and isinstance(lists, Sequence):
            for number, (_, documents, _) in enumerate(filter(None, lists)):  # before the first pair is computed
                refuse_too_short(call.setting, number, len(documents), min(must_keep, len(documents)))

        def checked() -> Generator[Candidates | None, None, None]:
            number = -1
            for row in lists:
                if row is None:
                    yield None
                    continue
                number += 1
                query, documents, of_first_stage = row
                if own is not None and number >= len(own):
                    raise ValueError(f"{len(own)} instructions need as many queries, but there is a query {number}.")
                cut: Sequence[CutDocument] | None = None
                ids: list[str | None] = []
                pairs: Pairs
                if store is not None:
                    compute = partial(self._engine_of_store().passage_states, setting=call.setting)
                    pairs = store.pairs(query, documents, call if own is None else own[number], compute)
                    ids = [passage.id for passage in documents]
                    documents = [passage.text or "" for passage in documents]
                elif chunking is None:
                    texts = [(query, document) for document in documents]
                    pairs = texts if own is None else own[number].tokenize(texts)
                else:
                    cut = (chunking if own is None else replace(chunking, call=own[number])).cut(query, documents)
                    pairs = [chunk.pair for document in cut for chunk in document.chunks]
                if must_keep:
                    refuse_too_short(call.setting, number, len(pairs), min(must_keep, len(documents)))
                yield Candidates(documents, pairs, cut, of_first_stage, ids)
            if own is not None and number + 1 < len(own):
                raise ValueError(f"{len(own)} instructions need as many queries, got {number + 1}.")

        run = partial(self._engine.run, between_batches=overrides.get("between_batches"))
        total = total if chunking is None else None
        return rank_lists(run, checked(), call, options, normalize, total, overrides.get("show_progress_bar"))

    def cut_chunks(
        self,
        query: str,
        documents: Sequence[str],
        max_chunks_per_doc: int | None = None,
        overlap: int = 0,
        **overrides: Any,
    ) -> list[CutDocument]:
        """Return the chunks of each document that `rank` scores with these arguments. Raises the same errors."""
        call = Call(self._pair_tokenizer, *resolve_call(self, overrides))
        return Chunking(call, *as_chunks(True, max_chunks_per_doc, overlap)).cut(query, documents)

    def score_lists(
        self,
        lists: Iterable[Iterable[TokenizedPair]],
        cascade: Mapping[int, float] | None = None,
        deadline_ms: float | None = None,
        first_stage_scores: Iterable[Iterable[float | None]] | None = None,
        **overrides: Any,
    ) -> list[list[Hit]]:
        """Score lists of tokenised pairs, the pairs of a list all of one query.

        Args:
            lists: pairs as `tokenize` or `stored_pairs` returns them.
            first_stage_scores: for each list a list with a score, or None, for each pair; None is no fusion.
            cascade, deadline_ms, overrides: as in `rank`, without options that say how texts become tokens.

        Returns:
            For each list a dict for each pair, in the order given: "score", not normalised, with a cascade or a
            deadline "cutoff_layer", with first-stage scores "first_stage_score" and "fused_score", and "is_truncated",
            which is True, if the pair was cut.

        Raises:
            FileNotFoundError, TypeError, ValueError: as in `rank`, and TypeError if a pair is not tokenised.
        """
        deadline = None if deadline_ms is None else Deadline.of(deadline_ms, self._clock)
        call = self._call(cascade, deadline, overrides)
        call = replace(call, fusion=ranking_weight(call.options, overrides, first_stage_scores is not None))
        pairs = as_tokenized(lists)
        if any(pairs):
            refuse_beside_tokens(overrides)
            refuse_other_states([pair for values in pairs for pair in values], call.setting)
        rows = read_first_stage((("", values) for values in pairs), first_stage_scores, None)
        candidates = [Candidates((), values, first_stage=of_first_stage) for _, values, of_first_stage in rows]
        call.tokenize([pair for values in pairs for pair in values])  # refuses pairs that are too long
        run = partial(self._engine.run, between_batches=overrides.get("between_batches"))
        return list(score_lists(run, candidates, call, sum(map(len, pairs)), overrides.get("show_progress_bar")))

    def _call(
        self, cascade: Mapping[int, float] | None, deadline: Deadline | None, overrides: Mapping[str, Any]
    ) -> Call:
        """Return the call of a ranking with these arguments, without fusion."""
        of_run = ("show_progress_bar", "between_batches")
        of_call = {name: value for name, value in overrides.items() if name not in of_run}
        options, setting = resolve_call(self, of_call, cascade, is_ranking=True)
        if of_call.get("max_length") is not None:
            refuse_beyond_positions(self.config, options.max_length)
        return Call(
            self._pair_tokenizer,
            options,
            setting,
            shares=len(self.target_devices),
            is_cascade=bool(setting.cascade) or cascade is not None or deadline is not None,
            deadline=deadline,
            max_tokens=self.model.model.max_positions,
        )

    def setting(self, cascade: Mapping[int, float] | None = None, **overrides: Any) -> Setting:
        """Return the setting that `rank` uses with these arguments. Raises the same errors."""
        return resolve_call(self, overrides, cascade, is_ranking=True)[1]

    def normalizer(
        self,
        cascade: Mapping[int, float] | None = None,
        deadline_ms: float | None = None,
        min_score: float | None = None,
        **overrides: Any,
    ) -> Normalizer | None:
        """Return the function by which `rank` with these arguments normalises raw scores of an exit; None for raw ones.

        Raises: as `rank`.
        """
        deadline = None if deadline_ms is None else Deadline.of(deadline_ms, self._clock)
        call = self._call(cascade, deadline, overrides)
        if min_score is not None:
            refuse_min_score(min_score, call)
        return self._normalizer_of(call) if call.options.normalize else None

    def _normalizer_of(self, call: Call) -> Normalizer:
        """Return the normalizer of a ranking whose scores are normalised.

        Raises:
            FileNotFoundError, ValueError: as `MatryoshkaReranker._normalizer`.
        """
        exits = [] if call.deadline is None else call.setting.readable(self.config.exit_layers)
        return self._normalizer(call.options, call.setting, exits)
