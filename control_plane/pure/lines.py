"""Lines of a log from bytes as they arrive."""

# Bytes of a line; what is longer is cut
LONGEST = 16 * 1024


class Lines:
    """Without their ends; bytes that are no UTF-8 are replaced. It keeps at most `longest` bytes of a line."""

    def __init__(self, longest: int = LONGEST) -> None:
        self._longest = longest
        self._line = bytearray()
        self._begun = False

    def feed(self, data: bytes) -> list[str]:
        """The lines that are complete by now."""
        *ends, rest = data.split(b"\n")
        lines = []
        for end in ends:
            self._add(end)
            lines.append(self._take())
        if rest:
            self._begun = True
            self._add(rest)
        return lines

    def end(self) -> list[str]:
        """The last one, if it was not ended."""
        return [self._take()] if self._begun else []

    def _add(self, data: bytes) -> None:
        self._line += data[: self._longest - len(self._line)]

    def _take(self) -> str:
        line = self._line.removesuffix(b"\r").decode("utf-8", "replace")
        self._line.clear()
        self._begun = False
        return line
