"""Write the formulas of the site as MathML, which browsers render by themselves: neither scripts nor fonts are loaded."""

import html
import re
from typing import Any

from latex2mathml.converter import convert


def on_page_content(content: str, **kwargs: Any) -> str:
    """Convert what arithmatex found between dollar signs."""

    def mathml(match: re.Match[str]) -> str:
        return match["start"] + convert(html.unescape(match["latex"]), display="block" if match["tag"] == "div" else "inline")

    found = r'(?P<start><(?P<tag>span|div) class="arithmatex">)\\[(\[](?P<latex>.*?)\\[)\]]'
    return re.sub(found, mathml, content, flags=re.DOTALL)
