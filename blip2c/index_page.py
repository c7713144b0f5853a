"""A page that shows what a search found: one file with small copies of the pictures in it, which needs no network."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable
from pathlib import Path

from blip2c.images import PictureError, load_image
from blip2c.index import Hit, Hits

_SIDE = 320
_STYLE = (
    "body{font:16px sans-serif;margin:2em;background:#fafafa;color:#222}"
    "main{display:grid;grid-template-columns:repeat(auto-fill,minmax(260px,1fr));gap:1.5em}"
    "figure{margin:0}img{max-width:100%;height:auto;border-radius:6px}"
    "figcaption{font-size:13px;overflow-wrap:anywhere}.missing{padding:4em 1em;background:#eee;border-radius:6px}"
)


def page_of(hits: Hits) -> str:
    """The page as text: pictures in order, each with its name, scores and a link to its file."""
    title = html.escape(_plain(hits.query))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head>\n<body><h1>{title}</h1>\n<main>\n{''.join(_figures(hits))}</main></body></html>\n"
    )


def write_page(hits: Hits, path: str | os.PathLike[str]) -> None:
    """page_of() to a file."""
    Path(path).write_text(page_of(hits), encoding="utf-8")


def _figures(hits: Iterable[Hit]) -> Iterable[str]:
    for hit in hits:
        name = html.escape(_plain(os.path.basename(hit.path)))
        scores = f"cosine {hit.cosine:+.3f}"
        if hit.probability is not None:
            scores += f", probability {hit.probability:.3f}"
        yield f"<figure>{_picture(hit.path)}<figcaption>{name}<br>{scores}</figcaption></figure>\n"


def _picture(path: str) -> str:
    try:
        image = load_image(path)
    except (PictureError, OSError) as error:
        return f'<div class="missing">{html.escape(_plain(str(error)))}</div>'
    image.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    source = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    link = html.escape(Path(os.path.abspath(path)).as_uri())
    return f'<a href="{link}"><img src="{source}" alt="{html.escape(_plain(os.path.basename(path)))}"></a>'


def _plain(text: str) -> str:
    """A name may be any bytes, a page is UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
