"""Every error that this package raises on purpose.

::

    TesseractError
      ProtocolError            the peer broke the wire rules
        MessageTooLarge        ... by announcing more than the receiver allows
        UnsupportedVersion     ... by speaking a wire version that this node does not
        HandshakeFailed        ... before it had proven who it is
        InvalidRecord          ... with a signed record that does not verify
      PeerUnreachable          every transport failed; holds each one's error
      ConnectionLost           an established channel died during a call
      RemoteError              the peer said no
        ExpertNotFound         no peer (or not this one) hosts that uid
        SchemaMismatch         the tensors do not fit the expert's schema
        Overloaded             no room, a quota used up, or the server rests; `retry_after` says when to come back
        ExpertFailed           the expert's module raised
        InputsForgotten        the server dropped the forward's inputs; send them again
        NotPrimary             the server does not train this expert; says who does
        NotAllowed             the peer's policy refuses this caller
        UnknownMethod          the peer does not answer such calls
        TooStale               an answer is older than `max_staleness` allows
      NotEnoughExperts         fewer than k_min experts answered; holds each one's error
      CheckpointError          a checkpoint could not be written or read

Timeouts are the built-in `TimeoutError`. A caller's own mistake is `ValueError` or `TypeError`, raised before
anything is sent. A missing key in the network is `None`, not an error: absence is normal.

Instances hold data; `__str__` makes the sentence: what happened, to whom, what to do. `retryable` (class
attribute) says whether the same call may succeed later or elsewhere.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar


class TesseractError(Exception):
    """Base of all errors of this package."""

    retryable: ClassVar[bool] = False


class ProtocolError(TesseractError):
    """The peer sent bytes that break the wire rules. The only error that a `decode_*` function raises."""


class MessageTooLarge(ProtocolError):
    """The peer announced `size` bytes where `limit` are allowed. Nothing was allocated."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit)
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return f"a message of {self.size} bytes was announced, but at most {self.limit} bytes are accepted"


class UnsupportedVersion(ProtocolError):
    """The peer speaks wire version `theirs`; this node speaks `ours`."""

    def __init__(self, theirs: int, ours: int) -> None:
        super().__init__(theirs, ours)
        self.theirs = theirs
        self.ours = ours

    def __str__(self) -> str:
        older = "the peer" if self.theirs < self.ours else "this node"
        return f"the peer speaks wire version {self.theirs}, this node {self.ours}: upgrade {older}"


class HandshakeFailed(ProtocolError):
    """The peer did not prove its identity, is not the expected one, or took too long; the sentence says which."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(reason, sentence)
        self.reason = reason
        """One word for the counters: ``timeout``, ``tls``, ``certificate``, ``wrong_peer``, ``hello``, ``eof``."""
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class InvalidRecord(ProtocolError):
    """A signed record whose signature, owner, key or expiration does not hold."""


class PeerUnreachable(TesseractError):
    """No transport reached the peer. `attempts` maps each tried path, such as ``tcp 10.0.0.1:4000``, to its error."""

    retryable = True

    def __init__(self, peer: str, attempts: Mapping[str, BaseException]) -> None:
        super().__init__(peer, attempts)
        self.peer = peer
        self.attempts = dict(attempts)

    def __str__(self) -> str:
        tried = summarize(self.attempts) or "it has no known address"
        return f"peer {self.peer} cannot be reached ({tried})"


class ConnectionLost(TesseractError):
    """An established channel to `peer` died while a call was under way; `reason` says how it was noticed."""

    retryable = True

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(peer, reason)
        self.peer = peer
        self.reason = reason

    def __str__(self) -> str:
        return f"the connection to {self.peer} was lost: {self.reason}"


class RemoteError(TesseractError):
    """The peer answered with an error. Each subclass travels by its `code`; an unknown code arrives as this class.

    `message` is the remote sentence (at most 2,000 characters are sent) and `details` small msgpack data.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return self.message


class ExpertNotFound(RemoteError):
    """No live server hosts the expert; the sentence names the uid."""

    code = "expert_not_found"


class SchemaMismatch(RemoteError):
    """Number, shape or dtype of the tensors differ from the expert's schema; the sentence holds both."""

    code = "schema_mismatch"


class Overloaded(RemoteError):
    """The server has no room, this node has used up its quota there, or the server is resting or leaving; the sentence
    says which. Try again after `retry_after` seconds, or ask another replica."""

    code = "overloaded"
    retryable = True

    def __init__(self, message: str, *, retry_after: float = 0.0) -> None:
        super().__init__(message, retry_after=retry_after)

    @property
    def retry_after(self) -> float:
        """Seconds until the server expects to have room."""
        return float(self.details["retry_after"])


class ExpertFailed(RemoteError):
    """The expert's module or optimizer raised, or a result was not finite; the sentence holds the remote error's."""

    code = "expert_failed"


class InputsForgotten(RemoteError):
    """The server no longer keeps the inputs that a backward refers to. Repeat the call with the inputs."""

    code = "inputs_forgotten"
    retryable = True


class NotPrimary(RemoteError):
    """The server hosts the expert but does not train it: send the backward to `primary`, under the same call id."""

    code = "not_primary"
    retryable = True

    def __init__(self, message: str, *, primary: bytes | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message, primary=primary, retry_after=retry_after)

    @property
    def primary(self) -> bytes | None:
        """The 32 bytes of the primary's id; None while the server knows of none."""
        primary: bytes | None = self.details["primary"]
        return primary

    @property
    def retry_after(self) -> float:
        """Seconds until the server expects to know its primary."""
        return float(self.details["retry_after"])


class NotAllowed(RemoteError):
    """The peer's policy does not let this node call, train or host there."""

    code = "not_allowed"


class UnknownMethod(RemoteError):
    """The peer does not answer this kind of call."""

    code = "unknown_method"


class TooStale(RemoteError):
    """A follower's answer lacks more of its primary's steps than `max_staleness` allows, or an unknown number."""

    code = "too_stale"
    retryable = True


class NotEnoughExperts(TesseractError):
    """Fewer than `k_min` experts answered for some row (None: all that were asked have to, as in an `ExpertPool`), or
    none returned the schema of the grid's experts (then `num_rows` is 0). `errors` maps each uid that failed to its
    error; `num_live` experts were known; `what` names what was missing: ``answers`` in forward, ``gradients`` in
    backward."""

    retryable = True

    def __init__(
        self,
        k_min: int | None,
        num_rows: int,
        errors: Mapping[str, BaseException],
        *,
        num_live: int = 0,
        what: str = "answers",
    ) -> None:
        super().__init__(k_min, num_rows, errors)
        self.k_min = k_min
        self.num_rows = num_rows
        self.errors = dict(errors)
        self.num_live = num_live
        self.what = what

    def __str__(self) -> str:
        if not self.errors and not self.num_live:
            return "no expert is alive: start a server that hosts some, or check the gate's prefix and grid"
        if not self.num_rows:
            return f"no expert could be asked what it takes: {summarize(self.errors)}"
        if self.k_min is None:
            rows = "1 row lacks" if self.num_rows == 1 else f"{self.num_rows} rows lack"
            return f"{rows} {self.what} of experts that were asked: {summarize(self.errors)}"
        rows = "1 row has" if self.num_rows == 1 else f"{self.num_rows} rows have"
        least = "k_min" if self.what == "answers" else "backward_k_min"
        alive = "1 is alive" if self.num_live == 1 else f"{self.num_live} are alive"
        none_failed = f"no expert failed, but {alive}, and no other has room"
        return f"{rows} fewer than {least}={self.k_min} {self.what}: {summarize(self.errors) or none_failed}"


class CheckpointError(TesseractError):
    """A checkpoint could not be written, or no readable one exists; the sentence names the file."""


def shortened(text: str, limit: int = 200) -> str:
    """Return the text on one line, cut to at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3].rstrip() + "..."


def printable(text: str) -> str:
    """Return a stranger's text so that a terminal may show it: control characters, and those that turn the direction of
    writing, are escaped. Line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else _harmless(one) for one in text)


def _harmless(letter: str) -> str:
    return " " if letter.isspace() else letter.encode("unicode_escape", "backslashreplace").decode()


def describe(error: BaseException) -> str:
    """Return one line for an error inside another error's sentence: its class, and its message if any, `shortened`. Of
    an error of the system it is only the message, without the error's number."""
    if isinstance(error, OSError) and type(error.errno) is int:
        return shortened(": ".join(_of_system(error)))
    name, message = text_of(lambda: type(error).__name__), shortened(text_of(lambda: str(error)))
    return f"{name}: {message}" if message else name


def sentence_of(error: BaseException, limit: int = 400) -> str:
    """Return an error's message for people, without its class and number; for a group, that of the first error."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError) and type(error.errno) is int:
        sentence = ": ".join(reversed(_of_system(error)))
    else:
        sentence = text_of(lambda: str(error)) or type(error).__name__
    return sentence if len(sentence) <= limit else f"{sentence[: limit - 4]} ..."


def _of_system(error: OSError) -> list[str]:
    """Return the system's words and, if there is one, the file."""
    said = text_of(lambda: str(error.strerror or ""))
    if not said or said.startswith(("Connect call failed", "[Errno")):  # asyncio's words around the system's
        said = text_of(lambda: os.strerror(error.errno or 0))
    return [said] if error.filename is None else [said, text_of(lambda: str(error.filename))]


def text_of(read: Callable[[], str]) -> str:
    """Return what `read` returns, with lone surrogates, which UTF-8 cannot hold, escaped. Never raises."""
    try:
        return read().encode(errors="backslashreplace").decode()
    except BaseException as error:  # a module's own error may do anything
        return f"(unreadable: {type(error).__name__})".encode(errors="backslashreplace").decode()


_TELLING = (RemoteError, ProtocolError, TesseractError, Exception)
_SILENCE = (Overloaded, ExpertNotFound, ConnectionLost, PeerUnreachable, TimeoutError)


def summarize(errors: Mapping[str, BaseException]) -> str:
    """Return many errors in about 300 characters: one example of each type, those that say most about a cause first,
    with two names and the number of the others. Empty if there are none."""
    groups: dict[type[BaseException], list[str]] = {}
    for name, error in errors.items():
        groups.setdefault(type(error), []).append(name)

    def telling(kind: type[BaseException]) -> tuple[int, int]:
        silent = next((len(_TELLING) + at for at, one in enumerate(_SILENCE) if issubclass(kind, one)), None)
        rank = next((at for at, one in enumerate(_TELLING) if issubclass(kind, one)), len(_TELLING))
        return silent or rank, -len(groups[kind])

    said = []
    for kind in sorted(groups, key=telling)[:3]:
        names = groups[kind]
        others = f" and {len(names) - 2} more" if len(names) > 2 else ""
        example = shortened(describe(errors[names[0]]), 90 if len(groups) > 1 else 180)
        said.append(f"{', '.join(shortened(name, 40) for name in names[:2])}{others}: {example}")
    if len(groups) > 3:
        said.append(f"and {len(groups) - 3} other kinds of errors")
    return "; ".join(said)
