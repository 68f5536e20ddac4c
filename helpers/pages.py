"""HTML pages from the templates in helpers/templates, and pictures as they carry them.

What is put into one is escaped; what it asks for must be given.
"""

import io
from base64 import b64encode
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from helpers.session import ROOT

MAP = "features.html"  # the map of latents, a page beside the report and the name of its template
TEMPLATES = ROOT / "helpers" / "templates"
_PAGES = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
_PAGES.policies["json.dumps_kwargs"] = {"ensure_ascii": False}


def page(template: str, **values: object) -> str:
    """The page that `template` (a file's name) makes of `values`."""
    return _PAGES.get_template(template).render(**values)


def picture(path: Path, width: int = 0) -> str:
    """A PNG in base64, as it is or made at most `width` pixels wide in 64 colours."""
    return _picture(path, path.stat().st_mtime_ns, width)


@cache
def _picture(path: Path, _changed: int, width: int) -> str:
    if not width:
        return b64encode(path.read_bytes()).decode()
    small = io.BytesIO()
    with Image.open(path) as image:
        whole = image.convert("RGB")
    whole.thumbnail((width, 2 * width))
    whole.quantize(64).save(small, "PNG", optimize=True)
    return b64encode(small.getvalue()).decode()
