"""The page at /: three files of our own, which ask nobody but this server."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
# Nothing from elsewhere, nothing inline, in nobody's frame: what a model writes is text here and stays text.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(request: Request) -> Response:
    if request.url.path == "/" and "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("Ollama is running")  # what ollama's clients look for
    name, kind = FILES[request.url.path]
    return Response((FOLDER / name).read_bytes(), media_type=kind, headers=HEADERS)
