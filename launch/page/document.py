"""The HTML document: template, style, scripts and data, with a policy that allows nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from hark.grpo.instruments.metrics import finite

FOLDER = Path(__file__).parent
SCRIPTS = ("dom.js", "data.js", "curves.js", "tokens.js", "steps.js", "evaluation.js", "page.js")
# JSON may hold these characters as they are, but in a script element < may begin its end.
ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def document(main: dict[str, Any], parts: dict[str, Any], *, connect: str = "'none'") -> str:
    """A page that holds its style, its scripts and its data, each part in an element of its own.

    connect: the source expression of the servers that it may ask.
    """
    data = [element("main", main), *(element(name, part) for name, part in parts.items())]
    pieces = {"POLICY": policy(connect=connect), "STYLE": style(), "SCRIPT": script(), "DATA": "\n".join(data)}
    return filled((FOLDER / "page.html").read_text(encoding="utf-8"), pieces)


def filled(template: str, pieces: dict[str, str]) -> str:
    """The template with each {{NAME}} replaced; what replaces one is not searched for others."""
    first, *rest = template.split("{{")
    found = (piece.split("}}", 1) for piece in rest)
    return first + "".join(pieces[name] + text for name, text in found)


def element(name: str, value: dict[str, Any]) -> str:
    """JSON in a script element, which does not run and is read only when the part is opened."""
    return f'<script type="application/json" id="{name}">{as_json(value)}</script>'


def as_json(value: Any) -> str:
    """JSON in which no character can end a script element or begin a comment or an entity."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(ESCAPES)


def policy(*, connect: str) -> str:
    """The content security policy: the page's own style and script, sounds and images that it holds, nothing else."""
    return (
        f"default-src 'none'; script-src {digest(script())}; style-src {digest(style())}; img-src data:; "
        f"media-src data:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def digest(text: str) -> str:
    """The source expression of an element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def style() -> str:
    return (FOLDER / "page.css").read_text(encoding="utf-8")


def script() -> str:
    """All scripts of the page as one, in a scope of its own."""
    files = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return f'"use strict";\n{{\n{files}\n}}\n'
