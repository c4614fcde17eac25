"""Checks names of clients, which become folders and must not be mistaken; makes texts printable."""

from __future__ import annotations

import difflib
import functools
import ipaddress
import unicodedata
from collections.abc import Callable, Collection, Iterable

from fedcompo.errors import ConfigError, ContributionError

LONGEST = 64
"""Characters."""
LONGEST_BYTES = 200
"""In UTF-8; file systems take 255, and temporary files need some for themselves."""
MANY = 1 << 14
"""Names whose checks are remembered."""
LONGEST_CLASS = 128
"""Characters of a class's name."""
STEERING = {"Cc", "Cs", "Co", "Zl", "Zp"}
"""Unicode's categories that no class's name has: controls, breaks, halves of pairs, private use."""
DIRECTIONS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
"""Characters that turn the direction of writing."""
PUNCTUATION = " -_.,#+&()[]{}"
OPENING = "_([{"
"""Of these, the marks that a name may start with. A shell reads a hyphen as an option, a list or a
table a ``#`` as a comment and a ``+`` as a formula."""
REFERENCE = "(reference)"
"""Stands in place of a client's name in the file of a reference Fisher."""
DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(10))}
RESERVED = {REFERENCE, *DEVICES}
WRITTEN_TOGETHER = {"CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}

CYRILLIC = str.maketrans("авгекмнорстухѕіјһѵԁԛԝӏ", "abrekmhopctyxsljhvdqwl")
GREEK = str.maketrans("αβεζηικμνορτυχ", "abezhlkmnoptyx")
LATIN = str.maketrans("01iıǀɑɡ", "ollllag", "\u0307")  # the dot that is left of a folded İ
LOOKALIKES = CYRILLIC | GREEK | LATIN
"""Letters in lower case. Where the two cases look like different Latin letters, as ν and Ν do, the
capital decides."""


@functools.lru_cache(maxsize=MANY)  # lineages name all clients again and again
def check_client_name(name: str) -> str:
    """Return the name if it can safely name a folder, on any system.

    Raises:
        ContributionError: If it is empty, longer than 64 characters or 200 bytes, or reserved on
            some system; starts with anything but a letter, a digit, an underscore or an opening
            bracket, or ends with a dot, a space or a comma; mixes scripts (Han, Hiragana and
            Katakana go together); or holds anything but letters, the digits 0 to 9, spaces and
            ``-_.,#+&()[]{}``. Combining marks that NFKC leaves are no letters.
    """
    faults = []
    if not 0 < len(name) <= LONGEST:
        faults.append(f"it has {len(name)} characters, expected 1 to {LONGEST}")
    elif (length := len(name.encode("utf-8", "surrogatepass"))) > LONGEST_BYTES:
        faults.append(f"it takes {length} bytes, expected at most {LONGEST_BYTES}")
    plain = unicodedata.normalize("NFKC", name)
    if name != plain:
        faults.append("it is not in Unicode's compatible composed form (NFKC)")
    if bad := sorted({c for c in name if not _allowed(c)}):
        faults.append(f"it holds {', '.join(map(ascii, bad[:8]))}{', …' if bad[8:] else ''}")
    if len(scripts := {_script(c): c for c in reversed(name) if c.isalpha()}) > 1:
        examples = (f"{script} ({scripts[script]!a})" for script in sorted(scripts))
        faults.append(f"it mixes letters of {' and '.join(examples)}")
    starts = name[:1].isalnum() or name[:1] in OPENING
    if name and not starts and name[0] in PUNCTUATION:
        faults.append(f"it starts with {name[0]!a}")
    if name[-1:] in (".", " ", ","):
        faults.append(f"it ends with {name[-1]!a}")
    if plain.partition(".")[0].rstrip(" ").casefold() in RESERVED:
        faults.append("it is reserved, here or on some system")
    if faults:
        raise ContributionError(
            f"{name[:80]!r} cannot be a client's name: {'; '.join(faults)}. "
            f"Use letters of one script, digits, and within the name spaces and {PUNCTUATION[1:]}",
            told="its name, or its folder's, cannot be a client's name",
        )
    return name


def check_client_names(names: Iterable[str]) -> None:
    """Check the names of all clients of a run; raises ``ContributionError`` with all faults."""
    faults, known = [], dict[str, str]()
    for name in names:
        try:
            skeleton = resembles(check_client_name(name))
            check_distinct(name, [known.setdefault(skeleton, name)])
        except ContributionError as error:
            faults.append(str(error))
    if faults:
        raise ContributionError("\n".join([*faults, "Rename the folders, then start again."]))


@functools.lru_cache(maxsize=MANY)
def resembles(name: str) -> str:
    """Return a skeleton that is the same for names that could be taken for one another.

    Names that differ in case alone are one folder on some systems. To the eye ``0`` and ``O`` are
    one, so are ``1``, ``l`` and ``I`` (hence ``i``), and many Cyrillic and Greek letters are Latin
    ones. It may join more than it must (``mail``, ``mall``), and knows no other scripts.
    """
    return unicodedata.normalize("NFKC", name).casefold().translate(LOOKALIKES)


def check_distinct(name: str, known: Iterable[str]) -> str:
    """Return the name if it cannot be mistaken for another one.

    Args:
        name: A client's name.
        known: Names of other clients; the same name may be among them.

    Raises:
        ContributionError: If a known name is different, but resembles it.
    """
    own = resembles(name)
    if alike := [other for other in known if other != name and resembles(other) == own]:
        raise ContributionError(
            f"{name!r} could be mistaken for the client {min(alike)!r}: upper and lower case do "
            "not tell names apart, nor do look-alikes such as 0 and O, or 1, l and I. "
            "Choose a name that differs visibly."
        )
    return name


def check_class_names(names: Iterable[str], owner: str) -> None:
    """Refuse names of classes that steer terminals or the direction of writing.

    What merely cannot be seen, such as a no-break space, is allowed; names that look alike are
    noted (:mod:`fedcompo.report.twins`).

    Raises:
        ContributionError: If one is empty or longer than 128 characters, holds such a character, or
            is not in Unicode's composed form (NFC).
    """
    for name in names:
        steers = any(unicodedata.category(c) in STEERING or c in DIRECTIONS for c in name)
        normal = unicodedata.is_normalized("NFC", name)
        if steers or not (normal and 0 < len(name) <= LONGEST_CLASS):
            raise ContributionError(
                f"{owner} names the class {name[:80]!a}, expected 1 to {LONGEST_CLASS} characters "
                "in Unicode's composed form (NFC), none of which steers a terminal or the "
                "direction of writing. Give the class another name."
            )


def _allowed(c: str) -> bool:
    if c.isascii():
        return c.isalnum() or c in PUNCTUATION
    return c.isalpha() and "FILLER" not in unicodedata.name(c, "")  # Hangul's are invisible


def _script(letter: str) -> str:
    """First word of the letter's Unicode name, which is its script for nearly all letters."""
    first = unicodedata.name(letter, "UNNAMED").partition(" ")[0]
    return "CJK" if first in WRITTEN_TOGETHER else first


def printable(text: str, *, keep: str = "") -> str:
    """Return a text that is safe in a terminal or a log: what cannot be seen stands as its number.

    Some characters steer terminals, turn the direction of writing or forge lines of a log, and what
    clients and registries say of themselves comes from outside.

    Args:
        text: Any.
        keep: Characters that stay as they are, such as line breaks.
    """
    return "".join(c if c.isprintable() or c in keep else number(c) for c in text)


def number(c: str) -> str:
    """A character as its number in Unicode."""
    return f"⟨U+{ord(c):04X}⟩"


def did_you_mean(word: str, known: Iterable[str], form: Callable[[str], str] = repr) -> str:
    """Ask whether the nearest known word was meant; empty: none is near."""
    near = difflib.get_close_matches(word, [*known], 1)
    return f" Did you mean {form(near[0])}?" if near else ""


def require_known(clients: Iterable[str], known: Collection[str], where: str) -> None:
    """Raise ``ContributionError``, naming the nearest known name, unless all clients are known."""
    for client in clients:
        if client not in known:
            raise ContributionError(
                f"There is no client {client!r} in the {where}, which holds "
                f"{', '.join(known) or 'nobody'}.{did_you_mean(client, known)}"
            )


def require_utf8(*texts: str) -> None:
    """Refuse arguments of a command line that are not UTF-8; raises ``ConfigError``."""
    for text in texts:
        if text.encode(errors="replace").decode() != text:
            raise ConfigError(f"{text!r} is no text; write it in UTF-8.")


def address(host: str, port: int) -> str:
    """Host and port as one text; an IPv6 address stands in brackets."""
    try:
        if ipaddress.ip_address(host).version == 6:
            host = f"[{host}]"
    except ValueError:  # a DNS name
        pass
    return f"{host}:{port}"
