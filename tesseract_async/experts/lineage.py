"""`Lineage`: the branches of an expert's Terms, and the one that holds. No I/O.

It keeps what was seen of one expert and says which Term holds; all who have seen the same records say the same. Terms
rank by epoch, never by version, so that nobody gains anything by claiming a large version.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.terms import EPOCH_ZERO, Seal, Term, TermKind, read_seal, read_term
from tesseract_async.identity import PeerID
from tesseract_async.lru import LRU

SKEW: Final = 60
"""Seconds by which clocks may differ: a record from farther in the future is refused."""
MAX_KNOWN: Final = 256
"""Records whose signatures are remembered as checked."""
MAX_TERMS: Final = 64
"""Terms of one expert that are remembered."""
MAX_TERMS_OF_ONE: Final = 8
"""The most Terms of one signer among them, besides those that lead to the one that holds."""


class Lineage:
    """The Terms and Seals of one expert that were seen, and the Term that holds.

    Only records of those who may host it are kept, so strangers change nothing. The Term that holds is the largest by

    1. the serial of the owner's appointment that it stands on,
    2. the number of hosts that say they follow its tree, where trees of Terms share no known beginning,
    3. whether that is the tree that this server has followed for long (`stay`),
    4. its epoch, the number of its newest Seal, its hash.

    A Term without a majority behind it (an adoption, one half of a pair) no longer counts once a Seal shows that the
    servers that it thought dead went on. Neither do the Terms of a primary whose newest file nobody could show this
    server for two leases (`missed`), while there are others. A primary that signed two Seals of one number is exposed:
    its Term still counts as the one that others go on from, but nobody listens to it.
    """

    def __init__(self, uid: str, authority: Authority) -> None:
        self.uid = uid
        self.num_forks = 0
        """Terms that lost to a Term which does not descend from them."""
        self._authority = authority
        self._known: LRU[bytes, Term | Seal | None] = LRU(MAX_KNOWN)
        self._terms: dict[bytes, Term] = {}
        self._seals: dict[bytes, Seal] = {}  # by Term: the newest
        self._early: dict[bytes, Seal] = {}  # by Term: whose Term was not seen yet
        self._exposed: dict[bytes, tuple[Seal, Seal]] = {}
        self._missed: dict[PeerID, float] = {}  # since when a file of its Terms has been wanted in vain
        self._unshown: set[PeerID] = set()
        self._hosts: Mapping[PeerID, int] = {}
        self._home: bytes | None = None
        self._is_home_old = False
        self._home_since = 0.0
        self._best: Term | None = None
        self._is_stale = False

    def read(self, blob: object) -> Term | Seal | None:
        """Read a record, whose signature is checked once. None for anything but a Term or Seal of the run.
        Untrusted."""
        if type(blob) is not bytes or not blob:
            return None
        if blob not in self._known:
            record: Term | Seal | None = None
            for read in (read_seal, read_term):
                with contextlib.suppress(ProtocolError):
                    record = read(blob, self._authority.run_id)
                    break
            self._known[blob] = record
        return self._known[blob]

    def add(self, record: Term | Seal, *, now: float, has_term: bool = False) -> bool:
        """Take a record that was read, or that this server signed. `now`: wall-clock seconds. Return whether it was new
        and may count.

        A weak Term from the future counts once its time has come: until then the primary that it thinks dead, which
        sees it at once (`has_term`: of its own), could not show the contrary. The time of that primary's Seals is then
        up to `SKEW` later than its clock.
        """
        if record.blob not in self._known:
            self._known[record.blob] = record
        if record.uid != self.uid or not self._may(record):
            return False
        appointment = self._authority.appointment(self.uid)
        if record.serial > (0 if appointment is None else appointment.serial):
            return False
        horizon = now - EPOCH_ZERO + SKEW
        seal = record if isinstance(record, Seal) else record.seal
        if seal is not None and (max(seal.epoch, seal.time - SKEW) > horizon or self.is_forged(seal)):
            known = self._seals.get(seal.term)
            if known is None or known.digest != seal.digest:  # unless it counts already
                return False
        if isinstance(record, Seal):
            return self._add_seal(record)
        if record.is_weak and seal is not None and not has_term:
            horizon = max(horizon - SKEW, min(horizon, seal.epoch + 1))
        if record.epoch > horizon or record.digest in self._terms or not self._is_founded(record):
            return False
        self._terms[record.digest] = record
        for one in list(self._terms.values()):  # those that came before what they say they go on from
            if one.seal is not None and one.seal.term == record.digest and not _is_of(one.seal, record):
                self._forget(one)
        self._is_stale = True
        if seal is not None and self._may(seal):
            self._add_seal(seal)
        if (early := self._early.pop(record.digest, None)) is not None:
            self._add_seal(early)
        self._prune()
        return record.digest in self._terms

    def _is_founded(self, term: Term) -> bool:
        """Return whether the appointment that it names is its signer's, or the run lets its signer begin. The answer
        stays true, even if another appointment follows."""
        if term.kind is TermKind.GENESIS:
            return self._authority.founder in (None, term.primary)
        appointment = self._authority.appointment(self.uid)
        if term.kind is not TermKind.APPOINTED:
            return True
        return appointment is not None and (appointment.serial, appointment.peer) == (term.serial, term.primary)

    def _add_seal(self, seal: Seal) -> bool:
        term = self._terms.get(seal.term)
        if term is None:
            # strangers to the run never come here; a host's unknown Terms take one place each
            if len(self._early) < MAX_TERMS:
                known = self._early.get(seal.term)
                if known is None or known.number < seal.number:
                    self._early[seal.term] = seal
            return False
        if not _is_of(seal, term):
            return False
        known = self._seals.get(seal.term)
        if known is not None and known.number == seal.number and known.digest != seal.digest:
            new = seal.term not in self._exposed
            self._exposed.setdefault(seal.term, (known, seal))
            return new
        if known is not None and known.number >= seal.number:
            return False
        self._seals[seal.term] = seal
        self._is_stale = True
        return True

    def set_hosts(self, hosts: Mapping[PeerID, int]) -> None:
        """Take the hosts whose manifests name this expert, each with the epoch that it says it follows."""
        if hosts != self._hosts:
            self._hosts = dict(hosts)
            self._is_stale = True

    def stay(self, term: Term, now: float) -> None:
        """Note that this server follows the tree of that Term. After ten leases, no single host's claim changes
        that."""
        if not self.is_home(term):
            self._home_since = now
        is_old = now - self._home_since > 10 * self._authority.lease
        if (term.digest, is_old) != (self._home, self._is_home_old):
            self._home, self._is_home_old, self._is_stale = term.digest, is_old, True

    def is_home(self, term: Term) -> bool:
        home = None if self._home is None else self._terms.get(self._home)
        return home is not None and self._root(home) == self._root(term)

    def missed(self, term: Term, now: float) -> None:
        """Note that nobody shows the file of its newest Seal: after two leases, its signer's Terms no longer count."""
        if now - self._missed.setdefault(term.primary, now) >= 2 * self._authority.lease:
            self._unshown.add(term.primary)
            self._is_stale = True

    def has_passed(self, seal: Seal, term: Term) -> bool:
        """Return whether the Term, or one that leads to it, has this Seal, or goes on from it or a later one of its
        primary: not where the line went on from an earlier one."""
        for step in self._walk(term):
            if step.digest == seal.term:
                return True
            if step.seal is not None and step.seal.term == seal.term:
                return step.seal.number >= seal.number
        return False

    def is_unshown(self, term: Term) -> bool:
        """Return whether its signer's newest file was missed for two leases."""
        return term.primary in self._unshown

    def shown(self, term: Term) -> None:
        self._missed.pop(term.primary, None)
        if term.primary in self._unshown:
            self._unshown.discard(term.primary)
            self._is_stale = True

    @property
    def unshown(self) -> Term | None:
        """The Term that would hold if its file could be had; None where that makes no difference."""
        term = self._find_best(everybody=True) if self._unshown else None
        return None if term is self.best else term

    def authority_changed(self) -> None:
        self._is_stale = True

    @property
    def best(self) -> Term | None:
        if self._is_stale:
            self._is_stale = False
            before, self._best = self._best, self._find_best()
            if before is not None and self._best is not None and before.digest not in self._ancestors(self._best):
                self.num_forks += 1
        return self._best

    @property
    def primary(self) -> PeerID | None:
        """The signer of that Term; None where it is exposed."""
        return None if self.best is None or self.is_exposed(self.best) else self.best.primary

    @property
    def epoch(self) -> int:
        """The epoch of that Term; 0 before any is known."""
        return 0 if self.best is None else self.best.epoch

    def seal_of(self, term: Term) -> Seal | None:
        """The newest Seal of a Term, or its parent where it has none yet: the state that others have of it."""
        if term.digest in self._exposed:
            return term.seal
        return self._seals.get(term.digest, term.seal)

    def own_seal_of(self, term: Term) -> Seal | None:
        return self._seals.get(term.digest)

    def term_of(self, seal: Seal) -> Term | None:
        return self._terms.get(seal.term)

    def is_in_line(self, seal: Seal, term: Term) -> bool:
        """Return whether the Term goes on from this Seal, or has it."""
        return seal.term in self._ancestors(term) and not self.is_forged(seal)

    def is_forged(self, seal: Seal) -> bool:
        """Return whether somebody other than the primary of the Term that it names signed it, as far as that is
        known."""
        term = self._terms.get(seal.term)
        return term is not None and not _is_of(seal, term)

    def is_handed_over(self, before: Term, term: Term) -> bool:
        """Return whether each primary signed the expert over to the next, from that of `before` to that of `term`."""
        for step in self._walk(term):
            if step.digest == before.digest or step.kind is not TermKind.HANDOVER:
                return step.digest == before.digest
        return False

    def is_sealed(self, seal: Seal) -> bool:
        """Return whether a primary in the line of the Term that holds signed this, and no other of that number."""
        term, best = self._terms.get(seal.term), self.best
        if term is None or best is None or self.is_exposed(term):
            return best is not None and best.seal is not None and best.seal.digest == seal.digest
        return seal.uid == self.uid and self.is_in_line(seal, best)

    def line(self, term: Term) -> list[bytes]:
        """The records that show where a Term comes from, as far as they are known, the oldest first; with its Seal."""
        line = [step.blob for step in itertools.islice(self._walk(term), MAX_TERMS_OF_ONE)][::-1]
        seal = self._seals.get(term.digest)
        return line if seal is None else [*line, seal.blob]

    def is_exposed(self, term: Term) -> bool:
        return term.digest in self._exposed

    def evidence(self, term: Term) -> tuple[Seal, Seal] | None:
        return self._exposed.get(term.digest)

    def _may(self, record: Term | Seal) -> bool:
        # a Term by the grants of its time: expiry ends what may begin, not what goes on
        now = EPOCH_ZERO + record.epoch if isinstance(record, Term) else None
        return self._authority.may(record.primary, "host", self.uid, now=now)

    def _find_best(self, *, everybody: bool = False) -> Term | None:
        terms = [term for term in self._terms.values() if self._may(term)]
        if not terms:
            return None
        lines = {term.digest: self._ancestors(term) for term in terms}
        # lines end in their beginning, known or not: those that share it are one tree
        roots = {term.digest: self._root(term) for term in terms}
        weights = self._weigh(terms, roots)
        refuted = {term.digest for term in terms if term.is_weak and self._is_refuted(term, lines)}
        standing = [term for term in terms if not refuted & lines[term.digest]] or terms
        if not everybody:
            standing = [term for term in standing if term.primary not in self._unshown] or standing
        home = None if self._home is None or not self._is_home_old else roots.get(self._home)

        def rank(term: Term) -> tuple[int, int, bool, int, int, bytes]:
            seal = self._seals.get(term.digest)
            number = 0 if seal is None or term.digest in self._exposed else seal.number
            root = roots[term.digest]
            return term.serial, weights[root], root == home, term.epoch, number, term.digest

        return max(standing, key=rank)

    def _weigh(self, terms: Sequence[Term], roots: Mapping[bytes, bytes]) -> Counter[bytes]:
        """Count the hosts that follow each tree, by the epochs that they name, be it of a Term that no longer counts.

        Anybody may begin a tree with an epoch that stands in another. Such an epoch counts for the tree of the Term
        that the host who names it has signed, and otherwise for the tree that this server goes by.
        """
        home = None if self._home is None else roots.get(self._home)
        weights: Counter[bytes] = Counter()
        for peer, epoch in self._hosts.items():
            if not self._authority.may(peer, "host", self.uid, now=None):
                continue
            named = [term for term in terms if term.epoch == epoch]
            trees = {roots[term.digest] for term in named}
            if len(trees) > 1:
                trees = {roots[term.digest] for term in named if term.primary == peer} or trees & {home} or trees
            weights.update(trees)
        return weights

    def _is_refuted(self, term: Term, lines: Mapping[bytes, set[bytes]]) -> bool:
        """Return whether the line that it thought dead went on after it, as that line's primaries have signed."""
        assert term.seal is not None
        adopts = term.kind is TermKind.ADOPTION
        for digest, line in lines.items():
            if term.seal.term not in line or term.digest in line:
                continue
            seal, one = self._seals.get(digest), self._terms[digest]
            took = one.kind in (TermKind.TAKEOVER, TermKind.HANDOVER) and adopts and digest != term.seal.term
            # where clocks differ by more, a last Seal may say so in error: a candidate waits until it is past
            lives = seal is not None and seal.time > term.epoch
            if not lives and not (took and one.epoch > term.epoch - self._authority.lease):
                continue
            if self.goes_on(one, term):
                return True
        return False

    def goes_on(self, one: Term, term: Term) -> bool:
        """Return whether `one` goes on from the primary that a weak Term thought dead, and no Term on the way thought
        so, too: only then does a Seal of `one` refute it. Two adopters do not refute each other."""
        assert term.seal is not None
        for step in self._walk(one):
            if step.digest == term.seal.term:
                return True
            if step.kind is TermKind.ADOPTION or (step.is_weak and term.kind is not TermKind.ADOPTION):
                return False
        return self.is_in_line(term.seal, one)

    def doubts(self, term: Term, own: Term) -> int:
        """Return the highest epoch of the weak Terms that think the line of `own` dead, if that of `term` stands on
        one; otherwise 0. A later Seal of `own` refutes them all."""
        weak = {one.digest: one.epoch for one in self._terms.values() if one.is_weak and self.goes_on(own, one)}
        return max(weak.values()) if any(step.digest in weak for step in self._walk(term)) else 0

    def _walk(self, term: Term) -> Iterator[Term]:
        """The Term and those that it descends from, as far as they are known, the newest first."""
        step: Term | None = term
        while step is not None:  # each names the one before by its hash: no circle
            yield step
            step = None if step.seal is None else self._terms.get(step.seal.term)

    def _ancestors(self, term: Term) -> set[bytes]:
        """The digests of a Term and of those that it descends from, as far as they are known, and one beyond."""
        return {digest for step in self._walk(term) for digest in (step.digest, *_parent(step))}

    def _root(self, term: Term) -> bytes:
        *_, last = self._walk(term)
        return (last.digest, *_parent(last))[-1]

    def _prune(self) -> None:
        best = self._best
        if len(self._terms) > MAX_TERMS // 2 and self._is_stale:
            best = self._find_best()
        line = set() if best is None else self._ancestors(best)
        others: dict[PeerID, list[Term]] = {}
        for term in sorted(self._terms.values(), key=lambda term: term.epoch):
            if term.digest not in line:
                others.setdefault(term.primary, []).append(term)
        for some in others.values():
            for old in some[: max(0, len(some) - MAX_TERMS_OF_ONE)]:
                self._forget(old)
        while len(self._terms) > MAX_TERMS:
            unrelated = [term for term in self._terms.values() if term.digest not in line]
            self._forget(min(unrelated or self._terms.values(), key=lambda term: term.epoch))

    def _forget(self, term: Term) -> None:
        del self._terms[term.digest]
        self._seals.pop(term.digest, None)
        self._exposed.pop(term.digest, None)


def _is_of(seal: Seal, term: Term) -> bool:
    """Return whether the primary of this Term signed the Seal in it: anybody may name a Term in a Seal."""
    return (seal.primary, seal.epoch, seal.serial) == (term.primary, term.epoch, term.serial)


def _parent(term: Term) -> tuple[bytes, ...]:
    return () if term.seal is None else (term.seal.term,)
