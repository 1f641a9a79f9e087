"""For the API reference: a comment above a field, as in ``DLSConfig``, is its description."""

from __future__ import annotations

from typing import Any

import griffe


class CommentsAbove(griffe.Extension):
    """Takes the comment right above an attribute where it has no docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        if attr.docstring or not attr.lineno or not attr.parent or not attr.parent.is_class:
            return
        comment: list[str] = []
        lines = attr.lines_collection[attr.filepath]
        for line in reversed(lines[: attr.lineno - 1]):
            text = line.strip()
            if not text.startswith("#") or text.endswith("---"):  # a heading of several fields
                break
            comment.insert(0, text.lstrip("# "))
        if comment:
            attr.docstring = griffe.Docstring("\n".join(comment), parent=attr)
