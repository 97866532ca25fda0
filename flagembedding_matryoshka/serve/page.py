"""A page to try the server: one HTML file that loads nothing from other hosts."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse

PAGE = "page.html"


def add_page(app: FastAPI) -> None:
    """Serve the page at `/`. It is the same for all models and reads their properties from `/info`."""
    html = files("flagembedding_matryoshka.serve").joinpath(PAGE).read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(html, headers=headers)


def content_security_policy(html: str) -> str:
    """Return a policy that allows the page's own scripts and styles, by hash, and requests to its own server only."""
    directives = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "script-src": _hashes("script", html),
        "style-src": _hashes("style", html),
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())


def _hashes(tag: str, html: str) -> str:
    contents = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [hashlib.sha256(content.encode()).digest() for content in contents]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
