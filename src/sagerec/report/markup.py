"""HTML from Python values: every string is escaped unless it is markup already."""

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Markup, not to be escaped again."""

    __slots__ = ()


def markup(value: object) -> str:
    """A child of an element: markup as it is, None as nothing, anything else escaped."""
    if value is None:
        return ""
    return str(value) if isinstance(value, Html) else html.escape(str(value))


def join(parts: Iterable[object]) -> Html:
    """Parts one after another."""
    return Html("".join(map(markup, parts)))


def tag(name: str, /, *children: object, **attributes: str | int | bool | None) -> Html:
    """An element. `class_` stands for `class` and `aria_label` for `aria-label`; True is an attribute without a value,
    None and False leave it out.
    """
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written += f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'
    if name in ("br", "meta", "input"):
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def table(caption: object, header: Sequence[object], rows: Iterable[Sequence[object]], *, class_: str = "") -> Html:
    """A table whose first column names its rows, in a frame that scrolls sideways."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    filled = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_=class_ or None)
    return tag("div", filled, class_="scroll", tabindex="0", role="group", aria_label=f"Table: {plain(caption)}")


def details(summary: object, *children: object) -> Html:
    """What is shown when asked for."""
    return tag("details", tag("summary", summary), *children)


def plain(value: object) -> str:
    """Text of a caption for a label; markup without its tags."""
    if not isinstance(value, Html):
        return str(value)
    text, inside = "", False
    for char in value:
        inside = char == "<" or (inside and char != ">")
        text += "" if inside or char == ">" else char
    return html.unescape(text)


def figure(svg: Html, label: str, caption: object, data: Html | None = None) -> Html:
    """A plot with its caption, and its data as a table."""
    image = Html(svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" focusable="false" ', 1))
    return tag("figure", image, tag("figcaption", caption, None if data is None else details("Data", data)))
