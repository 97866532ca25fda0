"""Scoring text pairs at any depth and width, as FlagEmbedding's re-rankers do."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cached_property, partial
from itertools import pairwise
from os import PathLike
from typing import Any, Literal

import torch
from FlagEmbedding.abc.inference import AbsReranker
from typing_extensions import Self

from flagembedding_matryoshka.checkpoints.describing import MAX_LENGTH
from flagembedding_matryoshka.checkpoints.export import export_exits, write_lengths
from flagembedding_matryoshka.checkpoints.export.formats import Format, export_formats
from flagembedding_matryoshka.checkpoints.export.plain import Exit
from flagembedding_matryoshka.checkpoints.loading import hub_options, inspect_checkpoint, load_model, load_tokenizer
from flagembedding_matryoshka.checkpoints.weights import weights_fingerprint
from flagembedding_matryoshka.inference.calibration import Normalizer
from flagembedding_matryoshka.inference.device import (
    check_batch_invariance,
    check_devices,
    fast_batch_tokens,
    follow_cpu_quota,
    resolve_dtype,
    threads_of_each,
    warn_of_slow_bfloat16,
)
from flagembedding_matryoshka.inference.engine import Engine
from flagembedding_matryoshka.inference.fusion import as_fusion
from flagembedding_matryoshka.inference.inputs import Pair, as_lists, as_pairs, excerpt
from flagembedding_matryoshka.inference.memory import keep_freed_memory
from flagembedding_matryoshka.inference.options import (
    CALIBRATED,
    DEPTH_AND_WIDTH,
    Call,
    ScoringOptions,
    refuse_beside_plan,
    refuse_beside_tokens,
    refuse_beyond_positions,
    resolve_call,
)
from flagembedding_matryoshka.inference.plan import Plan, load_plan
from flagembedding_matryoshka.inference.pool.pool import WorkerPool
from flagembedding_matryoshka.inference.ranking import RankingMixin
from flagembedding_matryoshka.inference.scoring import cut_batches, score_pairs
from flagembedding_matryoshka.inference.store import StoredPair, refuse_other_states, whole_length
from flagembedding_matryoshka.models.flops import estimate_flops
from flagembedding_matryoshka.models.quantization import Quantization, check_quantization, quantize
from flagembedding_matryoshka.setting import Layers, Setting, as_layer_tuple
from flagembedding_matryoshka.text.pairs import PairTokenizer, TokenizedPair, count_input_tokens
from flagembedding_matryoshka.text.templates import FLAT, Template


class MatryoshkaReranker(RankingMixin, AbsReranker):
    """A re-ranker whose depth and width are chosen when it scores (arXiv 2501.16302).

    Args:
        model_name_or_path: "smollm2", the shipped re-ranker, unless the working directory holds something of that name;
            a layer-wise checkpoint, a raw one, a GGUF file, or a directory that fine-tuning wrote.
        peft_path: one LoRA adapter or several, merged in order; those that fine-tuning wrote with `finetune_type=token`
            stay separate, and each call uses the adapter of its `compress_ratio`, or none if there is none.
        dtype: "auto" is bfloat16 if the device computes it fast, otherwise float32; or a torch dtype or its name.
        use_fp16, use_bf16: FlagEmbedding's arguments for float16 and bfloat16. On a CPU `use_fp16` has no effect, as in
            FlagEmbedding.
        from_raw: True requires a raw, False a layer-wise checkpoint; None accepts either.
        start_layer, layer_sep: the exits of a raw checkpoint, by default 4, 5, 6, …; a layer-wise checkpoint has its
            own exits.
        max_layer: layers above this one are not loaded, and deeper cutoffs are refused; None loads all layers.
        quantization: "int8" stores the decoder layers in 8 bits, on a CPU, and computes in them: a quarter of float32's
            memory, and faster with VNNI instructions. All else is in float32, or by `dtype` in bfloat16. "nf4" stores
            them in 4 bits (bitsandbytes), on any one device: an eighth, and slower. Scores differ from those of the
            full weights.
        cutoff_layers: exits to score at, an int or several; None is the deepest.
        compress_layers: numbers of layers after which the passage is compressed, an int or several.
        compress_ratio: number of neighbouring passage tokens that become one there: 1 (off), 2, 4 or 8.
        store_layer: number of layers in which passages run apart from their queries, so that the states after them do
            not depend on the query; 0 is none. Passages are then cut to the length that fits beside the longest query.
            A ratio without `compress_layers` compresses after this layer. Scores are good if the model was trained with
            this layer.
        budget: fraction of the full network's floating-point operations. Depth, width and for `rank` a cascade are then
            the best measured setting within it, of the `matryoshka_plan.json` beside the model.
        quality: fraction of the full network's nDCG@10. The cheapest measured setting that reaches it is used.
        template: text around query and passage: a name, a JSON file or the content of such a file, see
            [`~flagembedding_matryoshka.text.templates`]; None is the template that the checkpoint was trained with.
        prompt: text after the passage; None is the template's.
        instruction: description of the task, for a template with a place for it; None is the checkpoint's own, "" is
            none.
        query_instruction_for_rerank, passage_instruction_for_rerank: text around query and passage, as in
            FlagEmbedding. None is the template's; "" is no instruction.
        query_instruction_format, passage_instruction_format: format of these, as in FlagEmbedding. None, or the default
            of FlagEmbedding, is the template's.
        batch_size: pairs in a pass, at most.
        max_tokens_per_batch: tokens in a pass, at most, unless a single pair has more. There is no padding, and a query
            that pairs share counts once, so tokens determine time and memory of a pass. None is 2,048 for each thread
            of a CPU, more for models with less than 256 values per token; on other devices 65,536, or 16,384 for a
            model with a hidden size of 4,096.
        query_max_length: tokens of a query with its instruction; None is the length that the checkpoint was saved with,
            or three quarters of `max_length`.
        max_length: tokens of query and passage, with the template's words on top; for templates of the reference's
            form (`cost_wise`, …) tokens of bos, query, separator and passage, with the prompt on top. None is the
            length that the checkpoint was saved with, or 512.
        normalize: True is the sigmoid of the scores instead of the scores, "calibrated" the probability of relevance
            by the model's plan, which means the same at every depth and width. Rankings are by the raw scores.
        fusion: default weight, at least 0, of the first stage's scores in rankings that have such scores; "auto" is the
            weight in the `matryoshka_plan.json` beside the model. None is no weight, or with `budget` or `quality` the
            plan's weight, if it has one. Other rankings do not depend on it.
        devices: one device or several; None is the first accelerator, or the CPU if there is none.
        compile: fuse norms, rotary embedding and activations with `torch.compile`, which takes ten seconds in the first
            pass and some more in the first pass that compresses. A pass is 1.2 to 2.5 times as fast on an H200, and 1.1
            times on a CPU, where it needs a C++ compiler.
        batch_invariant: in bfloat16 on a CPU the score of a pair is bitwise independent of its batch. Otherwise it may
            differ by rounding, in float32 by up to 1e-6. Costs 10 to 24 % of the speed.
        cache_dir, token, revision, local_files_only: as in transformers; the revision is of `model_name_or_path` only.
        trust_remote_code: as in transformers, for the tokenizer only: the model's code is this package's.
        allow_pickle: read weights from `pytorch_model.bin` and `adapter_model.bin` if there are no safetensors. A
            pickle can run code when it is read: allow it only if its source can be trusted.

    Raises:
        FileNotFoundError: if a checkpoint or an adapter is missing, or a plan that an argument needs.
        TypeError: if `fusion` is neither a number, "auto" nor None.
        ImportError: if a package is missing that the checkpoint needs, with the line that installs it.
        ValueError: if there is no backbone for the checkpoint, arguments contradict it or each other, or nothing
            measured is within `budget` or reaches `quality`, no calibration is in the plan, or `fusion` is negative,
            not finite, or "auto" while the plan has no weight.

    With `budget` or `quality`, `planned` is the setting that `rank` and `rank_batch` use, unless a call names a depth,
    width or cascade of its own. `compute_score` has no list to drop candidates from: its defaults are chosen among
    settings without a cascade, by the same budget or quality. Its scores may be of another exit than those of `rank`.

    A context manager that ends the worker processes of several devices. After `fork` a child process starts workers of
    its own. Pickle and deepcopy load the checkpoint again by the constructor's arguments.

    Attributes:
        target_devices: the devices that scores are computed on.
        planned: the setting that `rank` uses by `budget` or `quality`; None without them.
        fusion: default weight of the first stage's scores in rankings that have such scores; None is no default.
        quantization: the format of the weights, if they are quantized.
        dtype: the format that weights are loaded in, such as "float32".
        words: the template.
        temperature: the template's: scores are divided by it before the sigmoid.
    """

    planned: Setting | None = None

    def __init__(
        self,
        model_name_or_path: str | PathLike[str],
        peft_path: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
        dtype: str | torch.dtype = "auto",
        use_fp16: bool = False,
        use_bf16: bool = False,
        from_raw: bool | None = None,
        start_layer: int | None = None,
        layer_sep: int | None = None,
        max_layer: int | None = None,
        quantization: Quantization | None = None,
        cutoff_layers: Layers = None,
        compress_layers: Layers = None,
        compress_ratio: int = 1,
        store_layer: int = 0,
        budget: float | None = None,
        quality: float | None = None,
        template: str | PathLike[str] | Mapping[str, Any] | None = None,
        prompt: str | None = None,
        instruction: str | None = None,
        query_instruction_for_rerank: str | None = None,
        query_instruction_format: str = FLAT,
        passage_instruction_for_rerank: str | None = None,
        passage_instruction_format: str = FLAT,
        batch_size: int = 1024,
        max_tokens_per_batch: int | None = None,
        query_max_length: int | None = None,
        max_length: int | None = None,
        normalize: bool | str = False,
        fusion: float | Literal["auto"] | None = None,
        devices: str | int | list[str] | list[int] | None = None,
        compile: bool = False,
        batch_invariant: bool = False,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        token: bool | str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        hub = hub_options(cache_dir, token, revision, local_files_only)
        checkpoint = inspect_checkpoint(
            model_name_or_path,
            from_raw,
            start_layer,
            layer_sep,
            max_layer,
            template=template,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            **hub,
        )
        self.description = checkpoint.description
        self.description.check_scoring()
        words = Template.load(checkpoint.config.template).replaced(
            query_instruction=query_instruction_for_rerank,
            query_format=query_instruction_format,
            passage_instruction=passage_instruction_for_rerank,
            passage_format=passage_instruction_format,
            prompt=prompt,
        )
        super().__init__(
            str(model_name_or_path),
            use_fp16=use_fp16,
            query_instruction_for_rerank=words.query_instruction,
            query_instruction_format=words.query_format,
            passage_instruction_for_rerank=words.passage_instruction,
            passage_instruction_format=words.passage_format,
            devices=devices,
            batch_size=batch_size,
            query_max_length=self.description.query_max_length.value if query_max_length is None else query_max_length,
            max_length=(self.description.max_length.value or MAX_LENGTH) if max_length is None else max_length,
            normalize=normalize,
        )
        available = self.get_target_devices(devices)
        if max_length is not None:
            refuse_beyond_positions(checkpoint.config, max_length)
        self.target_devices = available[:1] if devices is None else available
        first = self.target_devices[0]
        self.cutoff_layers = cutoff_layers
        self.compress_layers = compress_layers
        self.compress_ratio = compress_ratio
        self.store_layer = store_layer
        self.prompt = words.prompt
        self.instruction = instruction
        self.words = words
        self.temperature = words.temperature
        words.with_instruction(instruction)
        self.max_layer = max_layer
        self.quantization = quantization
        resolved = resolve_dtype(dtype, use_fp16, use_bf16, first, quantization)
        self.dtype = str(resolved).removeprefix("torch.")
        warn_of_slow_bfloat16(resolved, first)
        if any(torch.device(device).type == "cpu" for device in self.target_devices):
            follow_cpu_quota()
        threads = threads_of_each(self.target_devices)
        fast = fast_batch_tokens(first, resolved, checkpoint.config.hidden_size, threads)
        self.max_tokens_per_batch = fast if max_tokens_per_batch is None else max_tokens_per_batch
        check_quantization(quantization, self.target_devices, resolved)
        if batch_invariant:
            check_batch_invariance(self.target_devices, resolved, quantization, compile)
        self.config = checkpoint.config
        peft_paths = [peft_path] if isinstance(peft_path, str | PathLike) else list(peft_path or ())
        self._weights_fingerprint = weights = partial(weights_fingerprint, checkpoint, peft_paths, **hub)
        adapters = list(map(str, peft_paths))
        self._load_plan = partial(load_plan, str(model_name_or_path), self.config, adapters, weights, **hub)
        self._follow_plan(budget, quality)
        self._choose_fusion(fusion)
        options, setting = resolve_call(self, {})
        if options.normalize:
            self._normalizer(options, setting)
        if self.target_devices == ["cpu"]:
            keep_freed_memory()  # before loading starts threads, each with an arena of its own
        self.tokenizer = load_tokenizer(model_name_or_path, trust_remote_code, **hub)
        self._pair_tokenizer = PairTokenizer(self.tokenizer, words)
        self.model = load_model(checkpoint, self.tokenizer, resolved, peft_paths, attach_token_adapters=True, **hub)
        if quantization is not None:
            quantize(self.model, quantization)
        if batch_invariant:
            self.model.model.become_batch_invariant()
        self._engine: Engine | WorkerPool
        if len(self.target_devices) == 1:
            self._engine = Engine(self.model.to(first), compile)  # type: ignore[arg-type]
        else:
            self._engine = WorkerPool(self.model, self.target_devices, compile)

    def compute_score(
        self,
        sentence_pairs: Iterable[Pair] | Pair | Iterable[TokenizedPair],
        *,
        device: str | None = None,
        show_progress_bar: bool | None = None,
        **overrides: Any,
    ) -> list[float] | list[list[float]]:
        """Score pairs of query and passage.

        Args:
            sentence_pairs: (query, passage) pairs, or a single pair; or the result of `tokenize`.
            device: one of the re-ranker's `devices`; None spreads the work over all of them.
            show_progress_bar: None shows one on work of more than a second.
            overrides: any of the constructor's `cutoff_layers`, `compress_layers` (or `compress_layer`, the reference's
                spelling), `compress_ratio`, `store_layer`, `prompt`, `batch_size`, `max_tokens_per_batch`,
                `query_max_length`, `max_length`, `instruction`, `normalize` and FlagEmbedding's instructions; None
                keeps the default.

        Returns:
            One cutoff layer: a list of floats, one per pair, in the order given. Several: such a list per layer, in
            the order asked for. No pairs: an empty list.

        Raises:
            ArithmeticError: if a score is not a finite number.
            TypeError: if a text is not a string, a pair is not a pair, a keyword is unknown, or an option of
                tokenisation is given together with tokenised pairs.
            ValueError: if the layers, ratio or lengths asked for do not fit the model, or there is no such device.
            torch.OutOfMemoryError: if a single pair does not fit; larger batches are halved until they do.
        """
        if device is not None and device not in self.target_devices:
            raise ValueError(f"device {device!r} is not one of this re-ranker's devices {self.target_devices}.")
        options, setting = resolve_call(self, overrides)
        normalize = self._normalizer(options, setting) if options.normalize else None
        pairs = as_pairs(sentence_pairs)
        if not pairs:
            return []
        is_tokenized = isinstance(pairs[0], TokenizedPair)
        if is_tokenized:
            refuse_beside_tokens(overrides)
            refuse_other_states(pairs, setting)
        if overrides.get("max_length") is not None:
            refuse_beyond_positions(self.config, options.max_length)
        limit = self.model.model.max_positions
        shares = 1 if device else len(self.target_devices)
        call = Call(self._pair_tokenizer, options, setting, shares, max_tokens=limit)
        if is_tokenized:
            call.tokenize(pairs)  # refuses pairs that are too long
        scores = score_pairs(partial(self._engine.run, device=device), pairs, call, show_progress_bar)
        if normalize is not None:
            scores = torch.stack(list(map(normalize, scores, setting.cutoff_layers)))
        per_layer = scores.tolist()
        return per_layer[0] if len(per_layer) == 1 else per_layer

    def compute_score_single_gpu(
        self,
        sentence_pairs: Any,
        *,
        device: str | None = None,
        use_dataloader: bool | None = None,
        num_workers: int | None = None,
        **overrides: Any,
    ) -> Any:
        """Score pairs on one device, by default the first: FlagEmbedding's name for `compute_score`.

        Args:
            use_dataloader, num_workers: arguments of FlagEmbedding's layer-wise class, without effect: pairs are always
                tokenised while others are computed.
        """
        return self.compute_score(sentence_pairs, device=device or self.target_devices[0], **overrides)

    @staticmethod
    def get_target_devices(devices: str | int | list[str] | list[int] | None) -> list[str]:
        """Return the names of devices; None is all accelerators, or the CPU if there is none.

        Raises:
            ValueError: if the list is empty, a name is no device, or this machine does not have the device.
        """
        if not isinstance(devices, str | int) and devices is not None and not devices:
            raise ValueError("devices is an empty list, but must name at least one device, or be None for the default.")
        found = AbsReranker.get_target_devices(devices)
        check_devices(found)
        return found

    def export(
        self,
        output_dir: str,
        cutoff_layers: Layers = None,
        format: Format = "layerwise",
        precision: str | None = None,
        sample: Sequence[tuple[str, str]] | None = None,
        allow_uncapped: bool = False,
    ) -> None:
        """Write a checkpoint, tokenizer included, of these exits (None: the re-ranker's own) and the layers below.

        The words, the instruction and the lengths that the re-ranker was made with become the checkpoint's, as does the
        activation function that CrossEncoder applies. It replaces a checkpoint in `output_dir`, by the list
        [`WRITTEN`][flagembedding_matryoshka.checkpoints.export.WRITTEN]; other files there are not touched.

        Args:
            format: "layerwise" is a checkpoint of this package with all these exits. Any other is one sequence
                classifier for each exit: "transformers" (also for sentence-transformers and vLLM), "onnx", "openvino"
                or "gguf" (llama.cpp). Several exits are written to the folders `exit-9`, `exit-12`, … of `output_dir`.
            precision: of the matrices in a file of "openvino", "f32", "bf16" or "int8", or of "gguf", "f32", "f16" or
                "q8_0". None is "f32". ONNX files are in float32, the other formats in the re-ranker's dtype.
            sample: pairs of query and document that "int8" measures ranges on. None is a built-in sample.
            allow_uncapped: export a model that caps its scores to another runtime, which does not cap them. The order
                stays, the values do not.

        Raises:
            ImportError: if a package is missing that the format needs, with the line that installs it.
            ValueError: if an exit does not exist, token adapters are attached, the weights are quantized, or the format
                has no place for the backbone, its cap or the template.
        """
        if self.quantization is not None:
            raise ValueError(f"quantization={self.quantization!r}: export the model as it was loaded, without it.")
        options, setting = resolve_call(self, {"cutoff_layers": cutoff_layers, "compress_ratio": 1})
        template = Call(self._pair_tokenizer, options, setting).saved_template
        activation = self.description.activation.value
        if format != "layerwise":
            source, weights = self.description.path, self._weights_fingerprint()
            calibrations = self._exported_calibrations()
            exits = [
                Exit(
                    self.model,
                    layer,
                    self.tokenizer,
                    template,
                    activation,
                    options.max_length,
                    source,
                    weights,
                    calibrations.get(layer),
                )
                for layer in setting.cutoff_layers
            ]
            return export_formats(exits, output_dir, format, precision, sample, allow_uncapped)
        others = {"precision": precision, "sample": sample, "allow_uncapped": allow_uncapped or None}
        if given := [f"{name}={excerpt(value)}" for name, value in others.items() if value is not None]:
            raise ValueError(
                f"{', '.join(given)} given, but format='layerwise' takes none of {', '.join(others)}: it has the dtype "
                "of the re-ranker and its cap on scores."
            )
        export_exits(self.model, setting.cutoff_layers, output_dir, template, activation)
        self.tokenizer.save_pretrained(output_dir)
        write_lengths(output_dir, options.query_max_length, options.max_length)

    def _exported_calibrations(self) -> dict[int, dict[str, Any]]:
        """The plan's calibrations of exits at full width, with the conditions that they were fitted in; none without a
        plan. A plan that does not fit the model is warned about, and not used."""
        try:
            plan = self.plan
        except FileNotFoundError:
            return {}
        except ValueError as error:
            warnings.warn(f"the export has no calibration: {error}", UserWarning, stacklevel=3)
            return {}
        about = {"data": plan.data, "scored_with": dict(plan.scored_with)}
        return {
            setting.depth: {"method": fitted.method, **asdict(fitted), **about}
            for setting, fitted in plan.calibrations().items()
            if setting == Setting((setting.depth,))
        }

    def tokenize(self, sentence_pairs: Iterable[Pair] | Pair, **overrides: Any) -> list[TokenizedPair]:
        """Tokenise pairs once for `compute_score`, `score_lists` and `estimate_flops`, at any depth and width.

        Args:
            overrides: arguments of `compute_score` that tokens depend on: `prompt`, `query_max_length`, `max_length`,
                instructions, and `store_layer`, with which passages are cut to fit beside the longest query.

        Returns:
            A `TokenizedPair` for each pair, with 4 bytes per token. Its `is_cut` is True if a text was truncated.

        Raises:
            TypeError, ValueError: as in `compute_score`.
        """
        call = Call(self._pair_tokenizer, *resolve_call(self, overrides))
        return list(call.tokenize(as_pairs(sentence_pairs)))

    def count_tokens(self, query: str, documents: Iterable[str], **overrides: Any) -> tuple[int, list[int]]:
        """Count the tokens that scoring reads.

        Returns:
            the number of tokens of the query part, which a batch holds once, and for each document the number of tokens
            of passage and prompt.
        """
        (query,), (documents,) = as_lists([query], [documents])
        return count_input_tokens(self.tokenize([(query, document) for document in documents], **overrides))

    def estimate_flops(
        self,
        sentence_pairs: Iterable[Pair] | Pair | Iterable[TokenizedPair],
        depths: Sequence[int] | None = None,
        stored: bool = False,
        **overrides: Any,
    ) -> int:
        """Count the floating-point operations of `compute_score` for all of these pairs, in the batches that it uses.

        Args:
            depths: for each pair the exit where it stops, as the "cutoff_layer" of a cascade's hits, with all exits of
                the cascade as `cutoff_layers`. None is the deepest cutoff layer.
            stored: whether passages are in a store of the `store_layer` and ratio. Those of `stored_pairs` are.

        Raises:
            TypeError, ValueError: as in `compute_score`, and if `depths` are not a cutoff layer for each pair, or
                `stored` is given without a store layer.
        """
        options, setting = resolve_call(self, overrides)
        pairs = as_pairs(sentence_pairs)
        if pairs and isinstance(pairs[0], TokenizedPair):
            refuse_beside_tokens(overrides)
            refuse_other_states(pairs, setting)
            stored = stored or isinstance(pairs[0], StoredPair)
        if stored and not setting.store_layer:
            raise ValueError("stored=True needs a store_layer.")
        inputs = Call(self._pair_tokenizer, options, setting).tokenize(pairs)
        if depths is not None:
            depths = as_layer_tuple("depths", depths) or ()
            if len(depths) != len(inputs) or not set(depths) <= set(setting.cutoff_layers):
                raise ValueError(
                    f"depths must be one of cutoff_layers={list(setting.cutoff_layers)} for each of {len(inputs)} "
                    f"pairs, got {excerpt(list(depths))}."
                )
        total = 0
        for batch in cut_batches(inputs, options.batch_size, options.max_tokens_per_batch):
            own = [inputs[index] for index in batch]
            total += estimate_flops(
                self.config,
                setting,
                query_lengths=torch.tensor([pair.query_length for pair in own]),
                passage_lengths=torch.tensor([whole_length(pair) for pair in own]),
                prompt_lengths=torch.tensor([pair.prompt_length for pair in own]),
                shares_prefix=torch.tensor([False, *(a.prefix == b.prefix for a, b in pairwise(own))]),
                passage_first=own[0].passage_first,
                depths=None if depths is None else torch.tensor([depths[index] for index in batch]),
                read_alone=setting.cutoff_layers if depths is None else {*depths, setting.depth},
                stored=stored,
            )
        return total

    @cached_property
    def plan(self) -> Plan:
        """The measurements of this model by an evaluation.

        Raises:
            FileNotFoundError, ValueError: if there is no plan beside the model, or it is the plan of another model.
        """
        return self._load_plan()

    def _follow_plan(self, budget: float | None, quality: float | None) -> None:
        """Make the plan's choice the default. At most one argument may be given."""
        if budget is None and quality is None:
            return
        refuse_beside_plan(self)
        self.planned = self.plan.choose(budget, quality)
        for name, value in self.plan.choose(budget, quality, cascades=False).arguments.items():
            setattr(self, name, value)

    def _choose_fusion(self, fusion: Any) -> None:
        """Set the default weight: the given one, or for None the weight of the plan that `budget` or `quality` use."""
        follows = fusion is None and self.planned is not None
        self.fusion = self.plan.fusion if follows else as_fusion(fusion, lambda: self.plan.fusion_weight())

    def _normalizer(self, options: ScoringOptions, setting: Setting, exits: Collection[int] = ()) -> Normalizer:
        """Return the function that `normalize` asks for: the sigmoid of score ÷ temperature, or the plan's map for each
        exit.

        In a cascade each exit has its own map. It was fitted to all candidates; of the candidates that came so far a
        larger fraction may be relevant.

        Args:
            exits: further exits where scores may be read.

        Raises:
            FileNotFoundError: if there is no plan.
            ValueError: if the plan has no map for an exit, or was measured with other words, weights or dtype.
        """
        if options.normalize == CALIBRATED:
            self.plan.check_conditions(self.scored_with(options))
            layers = (*exits, *dict(setting.cascade), *setting.cutoff_layers)
            maps = {layer: self.plan.calibration(setting, layer) for layer in layers}
            return lambda scores, layer: maps[layer](scores)
        return lambda scores, layer: (scores / self.temperature).sigmoid()

    def scored_with(self, options: ScoringOptions) -> dict[str, Any]:
        """Return, as JSON values, the conditions that scores depend on beside weights, depth, width and lengths.

        These are the template with its temperature and head tokens, the words of the call, quantization and dtype. A
        plan notes them.
        """
        return self.words.to_json() | {
            "query_instruction": options.query_instruction_for_rerank,
            "query_format": options.query_instruction_format,
            "passage_instruction": options.passage_instruction_for_rerank,
            "passage_format": options.passage_instruction_format,
            "instruction": self.words.instruction if options.instruction is None else options.instruction,
            "prompt": options.prompt,
            "quantization": self.quantization,
            "dtype": self.dtype,
        }

    def close(self) -> None:
        """End the worker processes of several devices; the next call starts new ones."""
        self._engine.close()

    def stop_self_pool(self) -> None:
        """End the worker processes: FlagEmbedding's name for `close`."""
        if hasattr(self, "_engine"):  # FlagEmbedding also calls it if the constructor failed
            self.close()

    def start_multi_process_pool(self) -> Any:
        """Raise NotImplementedError: FlagEmbedding's pool is replaced by this class's own worker processes."""
        raise NotImplementedError(
            f"start_multi_process_pool: {type(self).__name__} starts its worker processes itself. Give the constructor "
            "several devices and call compute_score or rank."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by the constructor's arguments and the current defaults.

        The copy loads the checkpoint again, from the same path. Weights changed in memory are not in it. The pickle
        holds all arguments but a `token` that is a string, which is a secret: the copy asks the hub with the token of
        its own environment (HF_TOKEN).
        """
        defaults = {
            name: getattr(self, name) for name in (*DEPTH_AND_WIDTH, *(one.name for one in fields(ScoringOptions)))
        }
        secret = {"token"} if isinstance(self._arguments["token"], str) else set()
        arguments = {name: value for name, value in self._arguments.items() if name not in secret}
        return partial(type(self), **arguments), (), defaults

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # When the interpreter ends, modules are gone, and multiprocessing has ended the workers.
        if not is_finalizing():
            self.stop_self_pool()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
