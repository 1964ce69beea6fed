"""Self-contained HTML pages, made from the templates."""

import base64
import pathlib
from typing import Any

import jinja2


def write(path: pathlib.Path, template: str, **content: Any) -> None:
    """Fills a template and writes the page; a reader never sees a part of it.

    Args:
      path: The HTML file.
      template: Name of a file in `templates/`.
      content: What the template shows; a name that it uses and that is not given is
        an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("uad_jax"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template(template).render(**content)
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def embedded(png: bytes) -> str:
    """A picture as the source of an `img` that needs no file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
