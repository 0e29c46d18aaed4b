"""The frame of a page: it may load nothing, run nothing, and be styled by its own style sheet alone.

Text in it is escaped by whoever makes the body. The policy is a second wall: what slipped through the first would be
shown by a browser, and neither run nor fetched.
"""

from __future__ import annotations

import base64
import hashlib

from markupsafe import Markup, escape

from soul.visible import one_line


def content_policy(style: str) -> str:
    """Return the Content-Security-Policy of a page with one style sheet (W3C CSP 3): all is forbidden but that sheet.

    Neither scripts nor ``style`` attributes are allowed, nor images, forms, frames or another base address.

    Example:
        >>> content_policy("b{color:red}")[:44]
        "default-src 'none'; style-src 'sha256-ypIZpe"
    """
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def frame(title: str, style: str, body: Markup) -> str:
    """Return a whole page.

    Args:
        title: Its title, any text.
        style: Its style sheet, of our own words.
        body: What is in ``<body>``.
    """
    assert "</" not in style, "it would end the style element"
    assert "\r" not in style, "a browser would not see it, and the digest would be another"
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{content_policy(style)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(one_line(title))}</title>\n"
        f"<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
