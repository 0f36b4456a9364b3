"""Small wrong changes to the code, each with the tests that have to notice it.

A module of this package lists them as ``MUTATIONS``; ``run.py`` applies them one by one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One wrong change.

    ``old`` has to occur once in ``file`` (relative to the repository) and becomes ``new``; then
    ``pytest *tests`` has to fail. ``rebuild``: the compiled extension depends on the file.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    rebuild: bool = False

    def apply(self, text: str) -> str:
        """Raises ValueError where ``old`` does not occur exactly once."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: {self.old!r} occurs {text.count(self.old)} times in {self.file}, "
                "not once"
            )
        return text.replace(self.old, self.new)
