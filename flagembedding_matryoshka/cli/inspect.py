"""Show facts about a checkpoint with their sources: backbone, exits, template, instruction, head tokens and more.

flagembedding-matryoshka inspect smollm2

Weights are not read. If the checkpoint cannot be loaded as a re-ranker, the command prints the reason and ends with
exit code 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from flagembedding_matryoshka.checkpoints.loading import hub_options, inspect_checkpoint
from flagembedding_matryoshka.inference.arguments import as_help, explanations
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.parser import Parser


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    about = {name: as_help(text) for name, text in explanations(MatryoshkaReranker).items()}
    parser.add_argument("path", help=about["model_name_or_path"])
    parser.add_argument("--template", help=about["template"])
    parser.add_argument("--json", action="store_true", help="print value and source of each fact as JSON")
    parser.add_argument("--trust_remote_code", action="store_true", help=about["trust_remote_code"])
    parser.add_argument("--allow_pickle", action="store_true", help=about["allow_pickle"])
    parser.add_argument("--cache_dir", help="as in transformers")
    parser.add_argument("--revision", help="as in transformers")
    parser.add_argument("--local_files_only", action="store_true", help="as in transformers")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    options = build_parser().parse_args(arguments)
    hub = hub_options(options.cache_dir, None, options.revision, options.local_files_only)
    try:
        checkpoint = inspect_checkpoint(
            options.path,
            template=options.template,
            trust_remote_code=options.trust_remote_code,
            allow_pickle=options.allow_pickle,
            **hub,
        )
    except (OSError, ImportError, TypeError, ValueError) as error:
        print(f"{options.path} cannot be loaded: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    found = checkpoint.description
    if options.json:
        print(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        return
    rows = list(found.rows())
    width = max(len(name) for name, _, _ in rows)
    for name, value, source in rows:
        print(f"{name:{width}}  {value}  [{source}]")
    if found.is_assumed:
        print(f"\n{found.assumption}", file=sys.stderr)
