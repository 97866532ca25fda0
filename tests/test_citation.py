from configparser import ConfigParser
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_version_is_the_packages():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert (CITATION["title"], CITATION["version"]) == (setup["metadata"]["name"], setup["metadata"]["version"])
    assert CITATION["license"] == setup["metadata"]["license_expression"]


def test_the_paper_is_the_one_that_the_readme_names():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (paper,) = CITATION["references"]
    assert f"arxiv.org/abs/{paper['identifiers'][0]['value'].removeprefix('arXiv:')}" in readme
    assert paper["title"].split(":")[0] in readme and paper["authors"]
