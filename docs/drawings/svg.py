"""A small SVG canvas for the drawings of docs/: boxes, text and arrows, readable in light and dark mode.

Left out: layout. Every drawing places its own boxes, 360 units wide, so that text stays readable on a phone.
"""

from __future__ import annotations

from html import escape

WIDTH = 360
STYLE = """
  .paper { fill: #ffffff } .text { fill: #1f2328 } .quiet { fill: #59636e } .line { stroke: #818b98; fill: none }
  .a { fill: #ddf4ff; stroke: #0969da } .b { fill: #dafbe1; stroke: #1a7f37 } .c { fill: #fff1e5; stroke: #bc4c00 }
  .d { fill: #fbefff; stroke: #8250df } .empty { fill: #ffffff; stroke: #818b98 } .off { fill: #eff2f5; stroke: #818b98 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .text { fill: #f0f6fc } .quiet { fill: #9198a1 } .line { stroke: #9198a1 }
    .a { fill: #0c2d6b; stroke: #4493f8 } .b { fill: #033a16; stroke: #3fb950 } .c { fill: #5a1e02; stroke: #db6d28 }
    .d { fill: #3c1e70; stroke: #ab7df8 } .empty { fill: #0d1117; stroke: #9198a1 } .off { fill: #212830; stroke: #656c76 }
  }
  text { font: 13px ui-sans-serif, system-ui, sans-serif }
  .code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12px }
  .title { font-weight: 600 }
"""


class Drawing:
    def __init__(self, title: str, height: int) -> None:
        self.title, self.height = title, height
        self._parts: list[str] = []

    def text(self, x: float, y: float, words: str, style: str = "text", anchor: str = "start") -> None:
        """`style`: CSS classes, "text" or "quiet", with "code" or "title"; `anchor`: start, middle or end."""
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" xml:space="preserve"'
        self._parts.append(f'<text {place} class="{style}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, style: str, words: str = "") -> None:
        """A rectangle of colour `style` ("a" to "d", "empty" or "off") with a short text in its middle."""
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" class="{style}"/>')
        if words:
            self.text(x + width / 2, y + height / 2 + 4.5, words, "text code", "middle")

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with a head at the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(f'<polyline points="{path}" class="line" stroke-width="1.4" marker-end="url(#head)"/>')

    def render(self) -> str:
        head = ('<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
                '<path d="M1 1 L7 4 L1 7" class="line" stroke-width="1.4"/></marker></defs>')
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="440" '
            f'height="{self.height * 440 // WIDTH}" role="img" aria-label="{escape(self.title)}">',
            f"<style>{STYLE}</style>", head, f'<rect width="{WIDTH}" height="{self.height}" rx="8" class="paper"/>',
            *self._parts, "</svg>", ""])
