"""The page at `/`: what it may load, and what it does in a browser."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from fastapi.responses import HTMLResponse

from flagembedding_matryoshka.serve import create_app
from flagembedding_matryoshka.serve.page import content_security_policy
from tests.serve.conftest import client_of, serving

pytestmark = pytest.mark.usefixtures("one_thread")
QUERY = 'what\'s a "wing"? $(exit 1) `exit 1` !! \\n'
DOCUMENTS = ["<img src=x onerror='document.title = 1'>", "it's </script><b>air</b>", "a wing\nin two lines", "🛫"]


class Elements(HTMLParser):
    """Each element with its attributes, and the text at its beginning."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.texts.append("")
        self.inside = True

    def handle_data(self, text):
        if self.inside:
            self.texts[-1] += text

    def handle_endtag(self, tag):
        self.inside = False

    def values(self, name, value):
        """Attributes and text of each element with this attribute."""
        return [
            (attributes, text)
            for (_, attributes), text in zip(self.found, self.texts, strict=True)
            if attributes.get(name) == value
        ]


@pytest.fixture(scope="module")
def page(client):
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    return answer


def test_it_asks_for_nothing_of_elsewhere(page):
    for tag, attributes in Elements(page.text).found:
        assert tag not in ("img", "iframe", "object", "base") and "src" not in attributes
        assert attributes.get("href", "data:,") in (("docs", "info", "metrics") if tag == "a" else ("data:,",))
    assert not re.search(r"https?:|//[a-z]|@import|url\(|innerHTML|insertAdjacentHTML|localStorage|cookie", page.text)


def test_its_policy_allows_its_own_script_and_style_alone(page):
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for name in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[name])
    assert policy["script-src"] not in content_security_policy(page.text.replace('"use strict"', '"use  strict"'))
    for tag, attributes in Elements(page.text).found:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag


def test_every_control_has_a_label(page):
    found = Elements(page.text).found
    labelled = {attributes.get("for") for tag, attributes in found if tag == "label"}
    controls = [attributes["id"] for tag, attributes in found if tag in ("input", "select", "textarea")]
    assert controls and set(controls) <= labelled
    ((status, _),) = Elements(page.text).values("id", "status")
    assert status["role"] == "status"


def test_it_is_the_same_before_the_token_and_is_none_of_the_documented_routes(page, reranker):
    with client_of(reranker, api_key="key") as secured:
        assert secured.get("/").text == page.text
        assert "/" not in secured.get("/openapi.json").json()["paths"]


def test_info_tells_what_it_offers(client, reranker):
    info = client.get("/info").json()
    assert list(info["presets"]) == ["fast", "balanced", "full"]
    assert [preset["cutoff_layers"] for preset in info["presets"].values()] == [[2], [4], [6]]
    for preset in info["presets"].values():
        assert client.post("/rerank", json={"query": "q", "texts": ["t"]} | preset).status_code == 200
    assert info["exits"] == reranker.config.exit_layers
    assert info["num_hidden_layers"] == reranker.config.num_hidden_layers
    assert info["compress_ratios"] == [1, 2, 4, 8]


@pytest.mark.parametrize("options", [{}, {"cutoff_layers": [4], "compress_layers": [2], "compress_ratio": 4}])
def test_operations_are_the_rerankers_estimate(client, reranker, options):
    body = {"query": "wing", "documents": ["a wing", "air flows", "heat"], **options}
    assert "operations" not in client.post("/rerank", json=body).json()["usage"]
    expected = reranker.estimate_flops([("wing", text) for text in body["documents"]], **options)
    for form in ({}, {"top_k": 3}):  # Cohere's and Voyage's
        answer = client.post("/rerank", json=body | {"return_operations": True} | form).json()
        assert answer["usage"]["operations"] == expected


def test_a_cascade_costs_more_the_more_documents_go_deeper(client):
    body = {"query": "wing", "documents": ["a wing", "air flows", "heat", "lift"], "return_operations": True}

    def operations(**options):
        return client.post("/rerank", json=body | options).json()["usage"]["operations"]

    costs = [operations(cutoff_layers=2), *(operations(cascade={"2": share}) for share in (0.25, 0.5, 1))]
    assert costs == sorted(set(costs)) and costs[2] < operations()


def test_the_file_is_package_data():
    from setuptools.config.setupcfg import read_configuration

    root = Path(__file__).parents[2]
    patterns = read_configuration(root / "setup.cfg")["options"]["package_data"]["flagembedding_matryoshka"]
    assert any(Path("serve/page.html").match(pattern) for pattern in patterns)


@contextmanager
def driven(app, script):
    """The address of a page that runs a script once the model is known, under the page's own policy."""
    with serving(app) as address:
        wait = "const until = async done => { while (!done()) await new Promise(go => setTimeout(go, 20)); };"
        once = f'{wait} addEventListener("load", async () => {{ await until(() => info); {script} }});'
        html = httpx.get(address).text.replace("</body>", f"<script>{once}</script></body>")
        app.get("/driven")(
            lambda: HTMLResponse(html, headers={"Content-Security-Policy": content_security_policy(html)})
        )
        yield f"{address}/driven"


def browse(address):
    """What a page has become."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    return Elements(subprocess.run([*command, address], check=True, capture_output=True, text=True, timeout=200).stdout)


def in_script(value):
    return json.dumps(value).replace("</", "<\\/")


FILLED = f"""
    at("query").value = {in_script(QUERY)};
    at("documents").value = {in_script((chr(10) * 2).join(DOCUMENTS))};
    at("exit").value = 0;
    at("ratios").querySelectorAll("input")[1].checked = true;
    choose("");
    update();
"""


@pytest.mark.slow
def test_a_browser_ranks_what_is_pasted_and_shows_what_has_moved(reranker):
    go = 'at("documents").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", ctrlKey: true }));'
    with driven(create_app(reranker, "<i>tiny</i>"), FILLED + go) as address:
        page = browse(address)
    options = {"cutoff_layers": 2, "compress_layers": [1], "compress_ratio": 2}
    here, full = [[hit["corpus_id"] for hit in reranker.rank(QUERY, DOCUMENTS, **chosen)] for chosen in (options, {})]
    assert here != full
    assert [text for _, text in page.values("class", "text")] == [DOCUMENTS[index] for index in here]
    labels = [attributes["aria-label"] for attributes, _ in page.values("role", "img")]
    places = [full.index(index) - place for place, index in enumerate(here)]
    assert [int((label if label != "same place" else "0").split()[0]) for label in labels] == list(map(abs, places))
    assert ["up" in label for label in labels] == [place > 0 for place in places]
    assert not {"img", "b", "i"} & {tag for tag, _ in page.found} and page.values("id", "model")[0][1] == "<i>tiny</i>"
    moved, share = re.search(r"(\d) documents? of 4 .* ([\d.]+) %", page.values("role", "status")[0][1]).groups()
    assert int(moved) == sum(place != 0 for place in places)
    pairs = [(QUERY, text) for text in DOCUMENTS]
    operations = [reranker.estimate_flops(pairs, **chosen) for chosen in (options, {})]
    assert float(share) == pytest.approx(100 * operations[0] / operations[1], rel=0.01)
    assert sum("GFLOP" in text for _, text in page.values("class", "value")) == 2
    assert sum(text.endswith(" ms") for _, text in page.values("class", "value")) == 2
    assert len(page.values("class", "bar")) == 2 + len(DOCUMENTS)


@pytest.mark.slow
@pytest.mark.parametrize(("deadline", "exits"), [("", set()), ("0.001", {2}), ("1e9", {6})])
def test_a_browser_gives_a_deadline_and_says_how_deep_each_document_came(reranker, deadline, exits):
    script = f'choose("full"); at("deadline").value = "{deadline}"; await rank();'
    with driven(create_app(reranker, "tiny"), script) as address:
        page = browse(address)
    said = [text for attributes, text in page.values("class", "faint") if text.startswith("score ")]
    assert len(said) == 8
    assert {int(depth) for depth in re.findall(r"read after (\d) layers", " ".join(said))} == exits


@pytest.mark.slow
def test_a_browser_gives_the_order_of_the_documents_a_weight(reranker):
    with driven(create_app(reranker, "tiny"), FILLED + 'at("weight").value = "0.8"; await rank();') as address:
        page = browse(address)
    options = {"cutoff_layers": 2, "compress_layers": [1], "compress_ratio": 2}
    fused = {"first_stage": "order", "fusion": 0.8}
    here, full = [
        [hit["corpus_id"] for hit in reranker.rank(QUERY, DOCUMENTS, **chosen, **fused)] for chosen in (options, {})
    ]
    assert here != [hit["corpus_id"] for hit in reranker.rank(QUERY, DOCUMENTS, **options)]
    assert [text for _, text in page.values("class", "text")] == [DOCUMENTS[index] for index in here]
    labels = [attributes["aria-label"] for attributes, _ in page.values("role", "img")]
    places = [full.index(index) - place for place, index in enumerate(here)]
    assert [int((label if label != "same place" else "0").split()[0]) for label in labels] == list(map(abs, places))
    said = [text for attributes, text in page.values("class", "faint") if text.startswith("fused ")]
    assert len(said) == 4 and all(re.match(r"fused -?\d\.\d{4}, score 0\.\d{4}", text) for text in said)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "a 'key' ✓"])
def test_what_it_copies_does_what_it_does(reranker, key, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    typed = f'at("key").value = {in_script(key)};'
    environment = {"MATRYOSHKA_API_KEY": key, "PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin"}
    options = {"cutoff_layers": 2, "compress_layers": [1], "compress_ratio": 2}
    expected = [(hit["corpus_id"], hit["score"]) for hit in reranker.rank(QUERY, DOCUMENTS, normalize=True, **options)]
    app = create_app(reranker, "tiny", api_key=key or None)
    for name, run in (("curl", ["bash", "-c"]), ("python", [sys.executable, "-c"])):
        with driven(app, FILLED + typed + f'await copy({name}, "{name}");') as address:
            ((_, code),) = browse(address).values("id", "code")
            assert key == "" or key not in code
            code = code.replace("curl ", "curl --noproxy '*' -s ")
            done = subprocess.run([*run, code], check=True, capture_output=True, text=True, env=environment).stdout
        if name == "curl":
            found = [(hit["index"], hit["relevance_score"]) for hit in json.loads(done)["results"]]
            assert found == [(index, pytest.approx(score, abs=1e-6)) for index, score in expected]
        else:
            lines = "".join(f"{score:.4f} {DOCUMENTS[index]}\n" for index, score in expected)
            assert done == lines
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/driven"]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "accepted"), [("", False), ("other", False), ("kéy", True)])
def test_a_browser_asks_for_the_token(reranker, key, accepted):
    # Before a key is typed, the page has ranked its example once, and opens the field when it is refused.
    script = f'await until(() => at("secret").open); at("key").value = {in_script(key)}; await rank();'
    with driven(create_app(reranker, "tiny", api_key="kéy"), script) as address:
        page = browse(address)
    ((_, said),) = page.values("role", "status")
    assert (said == "The server wants its API key.") is not accepted
    assert bool(page.values("class", "text")) is accepted
    ((secret, _),) = page.values("id", "secret")
    assert "open" in secret


@pytest.mark.slow
def test_a_browser_ranks_the_example_at_once(reranker):
    with driven(create_app(reranker, "tiny"), "") as address:
        page = browse(address)
    assert len(page.values("class", "text")) == 8
    assert re.match(r"\d documents? of 8 elsewhere", page.values("role", "status")[0][1])


@pytest.mark.slow
def test_a_browser_says_what_the_server_refuses(reranker):
    script = FILLED + "info.exits[0] = 77; await rank();"
    with driven(create_app(reranker, "tiny"), script) as address:
        page = browse(address)
    ((status, said),) = page.values("role", "status")
    assert status["class"] == "wrong"
    assert said.startswith("The server answers 422: cutoff_layers [77] have no head. This model's exits are [2,")


@pytest.mark.slow
def test_nothing_is_wider_than_a_phone(reranker):
    script = """
        document.documentElement.style.width = "320px";
        at("documents").value = "a wing\\n" + "w".repeat(300);
        await rank();
        await copy(curl, "curl");
        const right = item => item.getBoundingClientRect().right;
        const wide = [...document.querySelectorAll("body *")].filter(item => right(item) > 320.5);
        document.body.dataset.wide = wide.map(item => item.id || item.className || item.tagName).join();
    """
    with driven(create_app(reranker, "tiny"), script) as address:
        page = browse(address)
    assert len(page.values("class", "text")) == 2
    assert page.values("data-wide", "")
