"""Rows of a data set → text: columns that hold it, conversations through the tokenizer's chat template."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdprune.errors import KDPruneError, one_line

# Sets of columns whose values, joined, are a row's text: the first set that a row has is taken.
COLUMNS: tuple[tuple[str, ...], ...] = (
    ("text",), ("messages",), ("conversations",), ("prompt", "completion"), ("content",))
# How a turn names who speaks and what is said, and how the roles are called that chat templates know.
TURNS = (("role", "content"), ("from", "value"))
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_SHOWN = 8  # columns that a message lists


@dataclass
class Columns:
    """Takes the text out of rows, and counts those that have none.

    Attributes:
        field: the column that holds the text; None: the first of ``COLUMNS`` that a row has.
        tokenizer: its chat template makes text of conversations; None: these are only looked at.
        skipped: rows so far that were null where the text should be.
    """

    field: str | None = None
    tokenizer: Any = None
    skipped: int = 0

    def names(self, found: Iterable[Any], where: str) -> tuple[str, ...]:
        """The columns, of those found, whose values make up the text. Raises KDPruneError where there are none."""
        found = list(found)
        for names in COLUMNS if self.field is None else ((self.field,),):
            if all(name in found for name in names):
                return names
        shown = ", ".join(map(str, found[:_SHOWN])) + (" …" if len(found) > _SHOWN else "")
        if self.field is not None:
            raise KDPruneError(f"got {shown or 'nothing'} in {where}, expected a field {self.field!r}, as --text-field "
                               "says")
        known = " or ".join(" with ".join(map(repr, names)) for names in COLUMNS)
        raise KDPruneError(f"got {shown or 'nothing'} in {where}, expected a field {known}; name the one that holds "
                           "text with --text-field")

    def text(self, row: Any, where: str) -> str | None:
        """The text of a row, a mapping or the text itself; None, which is counted, where it is null.

        Raises:
            KDPruneError: a row of another kind, columns that hold no text, a conversation that the chat template
                refuses or without one; ``where`` says which row.
        """
        if row is None or isinstance(row, str):
            values: list[Any] = [row]
        elif isinstance(row, Mapping):
            values = [row[name] for name in self.names(row, where)]
        else:
            raise KDPruneError(f"got {type(row).__name__} in {where}, expected a row with its text as a string")
        if any(value is None for value in values):
            self.skipped += 1
            return None
        if all(isinstance(value, str) for value in values):
            return "".join(values)
        return self._chat([turn for value in values for turn in _turns(value, where)], where)

    def _chat(self, turns: list[dict[str, Any]], where: str) -> str:
        """A conversation as the model would read it."""
        if self.tokenizer is None:
            return "\n".join(str(turn["content"]) for turn in turns)
        if not getattr(self.tokenizer, "chat_template", None):
            raise KDPruneError(
                f"got a conversation in {where}, but the tokenizer has no chat template; give text, name a column that "
                "holds it with --text-field, or set tokenizer.chat_template")
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # templates are programs, and raise what they like
            raise KDPruneError(f"the tokenizer's chat template refuses {where} ({one_line(error)}); leave such rows "
                               "out, or name another column with --text-field") from error


def _turns(value: Any, where: str) -> list[dict[str, Any]]:
    """A conversation in the form that chat templates take."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise KDPruneError(f"got {type(value).__name__} in {where}, expected text, or a list of turns such as "
                           '{"role": "user", "content": "…"}')
    return [_turn(turn, where) for turn in value]


def _turn(turn: Any, where: str) -> dict[str, Any]:
    for role, content in TURNS if isinstance(turn, Mapping) else ():
        if isinstance(turn.get(role), str) and content in turn:
            rest = {name: part for name, part in turn.items() if name not in (role, content) and part is not None}
            return {**rest, "role": ROLES.get(turn[role], turn[role]), "content": _content(turn[content])}
    got = ", ".join(map(str, turn)) if isinstance(turn, Mapping) else type(turn).__name__
    raise KDPruneError(f"got a turn with {got or 'nothing'} in {where}, expected role and content, or from and value")


def _content(value: Any) -> Any:
    """What is said; of parts those that are text, since there are no images here."""
    if isinstance(value, list):
        return "".join(str(part["text"]) for part in value if isinstance(part, Mapping) and part.get("text"))
    return value
