"""Who imports whom, as in docs/imports.md (`python -m tests.test_imports` writes it), and what importing costs."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flagembedding_matryoshka.models.backbones import BACKBONES
from flagembedding_matryoshka.models.deferred import MODEL_TYPES

PACKAGE = "flagembedding_matryoshka"
PAGE = Path(__file__).parents[1] / "docs" / "imports.md"
TEXT = """# Who imports whom

```bash
python -m tests.test_imports  # writes this page from the imports of all modules
make lint                     # import-linter refuses an import against the arrows
```

```mermaid
flowchart TD
{}
```

The boxes are the packages of `flagembedding_matryoshka` and the modules beside them. An arrow goes from the importer to
the imported package. Arrows that a path of other arrows implies are left out. A test compares this page with the
imports. [Architecture](architecture.md#packages) says what each package holds.
"""


def drawn() -> str:
    """The page, from what the modules import."""
    grimp = pytest.importorskip("grimp", reason="needs grimp, which import-linter brings")
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    rooms = sorted(graph.find_children(PACKAGE))
    arrows = [
        (importer, imported)
        for importer in rooms
        for imported in rooms
        if importer != imported and graph.direct_import_exists(importer=importer, imported=imported, as_packages=True)
    ]
    # What is imported by a room that another arrow leads to is reached through it: drawn once.
    needed = [
        (importer, imported)
        for importer, imported in arrows
        if not any((importer, middle) in arrows and (middle, imported) in arrows for middle in rooms)
    ]
    names = [(one.removeprefix(f"{PACKAGE}."), other.removeprefix(f"{PACKAGE}.")) for one, other in needed]
    return TEXT.format("\n".join(f"    {one} --> {other}" for one, other in names))


def test_the_picture_is_true():
    assert PAGE.read_text(encoding="utf-8") == drawn()


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def modules(code):
    """Number of modules that are loaded. Their time also depends on what else the machine computes."""
    return int(run(f"{code}, sys; print(len(sys.modules))"))


def test_what_is_heavy_is_imported_where_it_is_used():
    heavy = {"transformers.modeling_utils", "peft", "FlagEmbedding", "sentence_transformers", "datasets"}
    loaded = run(f"import {PACKAGE}.cli.main, sys; print(*sys.modules)").split()
    assert PACKAGE in loaded and not heavy & set(loaded)


@pytest.mark.slow
def test_importing_the_package_takes_little_beside_torch():
    assert modules(f"import torch, {PACKAGE}") < 1.4 * modules("import torch")


def test_everything_that_is_named_is_there():
    import flagembedding_matryoshka as package

    assert set(dir(package)) == set(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert package.SubNetwork is package.Setting
    with pytest.raises(AttributeError, match="has no attribute 'CostWiseNothing'"):
        _ = package.CostWiseNothing


def test_model_types_that_are_deferred_are_those_of_the_backbones():
    assert set(MODEL_TYPES) == {model.config_class.model_type for model in BACKBONES}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cost_wise_mistral", "cost_wise_gemma"])
def test_transformers_knows_a_model_type_before_its_class_is_imported(name, tmp_path):
    code = f"""
        import {PACKAGE}, sys
        from transformers import AutoConfig, AutoModelForCausalLM
        config = AutoConfig.for_model({name!r}, num_hidden_layers=1, layer_wise=True, start_layer=1)
        assert config.model_type == {name!r}
        config.save_pretrained({str(tmp_path)!r})
    """
    run(textwrap.dedent(code))
    code = f"""
        import {PACKAGE}
        from transformers import AutoConfig, AutoModelForCausalLM
        config = AutoConfig.from_pretrained({str(tmp_path)!r})
        import torch
        with torch.device("meta"):
            print(type(AutoModelForCausalLM.from_config(config)).__name__)
    """
    (model,) = (model for model in BACKBONES if model.config_class.model_type == name)
    assert run(textwrap.dedent(code)).strip() == model.__name__


if __name__ == "__main__":
    PAGE.write_text(drawn(), encoding="utf-8")
