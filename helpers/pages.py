"""HTML pages from the templates in helpers/templates.

What is put into one is escaped; what it asks for must be given.
"""

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from helpers.session import ROOT

TEMPLATES = ROOT / "helpers" / "templates"
_PAGES = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
_PAGES.policies["json.dumps_kwargs"] = {"ensure_ascii": False}


def page(template: str, **values: object) -> str:
    """The page that `template` (a file's name) makes of `values`."""
    return _PAGES.get_template(template).render(**values)
