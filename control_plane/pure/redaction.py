"""What nobody may read in a log, and what a model need not: secrets, e-mail addresses, addresses of machines.

Secrets are found by their patterns, and are gone for good. Addresses get placeholders, the same one each time, which
are put back where people look. Each pattern is linear in the length of its text, whatever that is.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from ipaddress import ip_address

SECRET = "<secret>"
_WORD = r"[A-Za-z0-9_-]"
_PEM = r"-----BEGIN [A-Z0-9 ]{1,40}-----"
# On one line, as in JSON and variables; on several: lines_without_secrets.
_BLOCK = re.compile(rf"{_PEM}.*?(?:-----END [A-Z0-9 ]{{1,40}}-----|$)")
# Also behind `\n` of JSON. The third: a JWT, also one that was cut off
_KEY = re.compile(
    rf"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))(?:(?:sk|pk|rk|mt|st)-{_WORD}{{6,}}"
    rf"|(?:hf_|gh[opsru]_|github_pat_|glpat-|xox[a-z]-|AIza){_WORD}{{8,}}"
    rf"|eyJ{_WORD}{{4,}}(?:\.{_WORD}*){{0,4}}"
    r"|(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{12,})"
)
_BEARER = re.compile(r"\b(bearer|basic\b(?=\s+\S*[=0-9]))(\s+)[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE)
# A name, and what is behind it: quoted, or up to the next space. A header's value is all that follows.
_NAMED = re.compile(
    r"(pass(?:word|wd|phrase)|secret|credentials?|api[_-]?key|access[_-]?key|private[_-]?key|signature"
    r"|token(?![a-z])(?!_id))([\w-]{0,32}+[\"'\\]{0,4}\s{0,8}[:=]\s{0,8})(?!<secret>)"
    r"(?:\\?\"[^\"]*+\"?|\\?'[^']*+'?|[^\s&]++)",
    re.IGNORECASE,
)
_HEADER = re.compile(r"((?:authorization|cookie)[\"'\\]{0,4}\s{0,8}[:=]\s{0,8}).++", re.IGNORECASE)
_USERINFO = re.compile(r"(://)[^\s/?#]+@")
_EMAIL = re.compile(r"(?<![\w.+-])[\w.%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")
_PORT = r"(?::\d{1,5}(?!\d))?"
_IPV4 = re.compile(rf"(?<![\w.])(?:\d{{1,3}}\.){{3}}\d{{1,3}}(?![\w]|\.\d){_PORT}")
_IPV6 = re.compile(
    rf"(?<![\w:.])(\[?)(?=[0-9A-Fa-f]{{0,4}}:)([0-9A-Fa-f:]{{2,39}}(?:\d{{0,3}}(?:\.\d{{1,3}}){{3}})?)(?![\w:])(?:%\w{{1,16}})?(\]?){_PORT}"
)
_HOST = re.compile(
    r"(?<![\w./@-])(?:localhost|[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}?"
    r"\.(?:svc|local|internal|lan|[a-z]{2,12}(?=:\d)))(?:\.cluster\.local)?(?![\w-])(?::\d{1,5}(?!\d))?"
)
# core.py:58 is no host.
_FILE = re.compile(r"\.(?:py|rs|cpp|cc|cu|cuh|hpp|h|c|go|js|ts|so|json|yaml|jinja|safetensors|gguf)(?::\d+)?$")
# Lines of a block in PEM are this long, but for the last one and for headers.
_FULL = re.compile(r"(?:^|\s)[A-Za-z0-9+/]{40,}={0,2}\s*$")
_PEM_BEGIN, _PEM_END, _PEM_HEADER = (
    re.compile(_PEM),
    re.compile("-----END "),
    re.compile(r"(?:^|\s)[\w-]+: |(?:^|\])\s*$"),
)
_PLACEHOLDER = re.compile(r"<(?:address|email)-\d+>")


def without_secrets(text: str) -> str:
    """One line, or a text that a model has written."""
    text = _KEY.sub(SECRET, _BLOCK.sub(SECRET, text))
    if "://" in text:
        text = _USERINFO.sub(rf"\1{SECRET}@", text)
    if ":" in text or "=" in text:
        text = _HEADER.sub(rf"\1{SECRET}", text)
        text = _NAMED.sub(rf"\1\2{SECRET}", text)
    return _BEARER.sub(rf"\1\2{SECRET}", text)


def lines_without_secrets(lines: Iterable[str]) -> Iterator[str]:
    """The lines of one log; a private key may be on several."""
    within = False
    for line in lines:
        if within:
            # The first line that is not full is the last one of the key, unless it ends by its own mark.
            within = not _PEM_END.search(line) and bool(_FULL.search(line) or _PEM_HEADER.search(line))
            yield SECRET
            continue
        begin = _PEM_BEGIN.search(line)
        within = begin is not None and not _PEM_END.search(line, begin.end())
        yield without_secrets(line)


class Placeholders:
    """Of one triage: `<address-1>`, `<email-1>`, the same for the same address; `<address>` beyond `most`."""

    def __init__(self, most: int = 1000) -> None:
        self._most = most
        self._by_value: dict[str, str] = {}
        self._by_name: dict[str, str] = {}
        self._counts: Counter[str] = Counter()

    def hide(self, text: str) -> str:
        """With placeholders for addresses."""
        if "@" in text:
            text = _EMAIL.sub(lambda found: self._name("email", found[0]), text)
        text = _IPV4.sub(lambda found: self._name("address", found[0]), text)
        if ":" in text:
            text = _IPV6.sub(self._ipv6, text)
        return _HOST.sub(lambda found: found[0] if _FILE.search(found[0]) else self._name("address", found[0]), text)

    def restore(self, text: str) -> str:
        """With the addresses, for people."""
        return _PLACEHOLDER.sub(lambda found: self._by_name.get(found[0], found[0]), text)

    def _ipv6(self, found: re.Match[str]) -> str:
        if found[0] not in self._by_value:
            if found[2].count(":") < 2:
                return found[0]
            try:
                ip_address(found[2])
            except ValueError:
                # A time, or a name of C++
                return found[0]
        return self._name("address", found[0])

    def _name(self, kind: str, value: str) -> str:
        if value not in self._by_value:
            if len(self._by_value) >= self._most:
                return f"<{kind}>"
            self._counts[kind] += 1
            name = f"<{kind}-{self._counts[kind]}>"
            self._by_value[value], self._by_name[name] = name, value
        return self._by_value[value]
