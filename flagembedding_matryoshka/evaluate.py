"""FlagEmbedding's evaluation on a data set on disk, with a Matryoshka re-ranker.

    python -m flagembedding_matryoshka.evaluate --dataset_dir DIR --embedder_name_or_path … \\
        --reranker_name_or_path output

The options are those of `python -m FlagEmbedding.evaluation.custom`, and `--config FILE.yaml`.
`--reranker_name_or_path` may be any Matryoshka checkpoint. `flagembedding-matryoshka evaluate`, or
`python -m flagembedding_matryoshka.evaluation`, compares settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from FlagEmbedding.evaluation.custom import CustomEvalArgs, CustomEvalModelArgs, CustomEvalRunner
from FlagEmbedding.inference.reranker.model_mapping import AUTO_RERANKER_MAPPING

from flagembedding_matryoshka.dataclass_parser import DataclassParser
from flagembedding_matryoshka.registry import register


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate by the arguments of a command line.

    Args:
        arguments: the arguments; None is `sys.argv`.
    """
    parser = DataclassParser((CustomEvalArgs, CustomEvalModelArgs))
    eval_args, model_args = parser.parse_args_into_dataclasses(list(arguments) if arguments is not None else None)
    path = model_args.reranker_name_or_path
    name = None if path is None else PurePath(path).name
    if name is None or model_args.reranker_model_class is not None or name in AUTO_RERANKER_MAPPING:
        register()
    else:
        register(name)
    CustomEvalRunner(eval_args=eval_args, model_args=model_args).run()


if __name__ == "__main__":
    main()
