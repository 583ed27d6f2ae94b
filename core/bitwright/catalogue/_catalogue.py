"""The catalogue of descriptors: who has which name, and what became of items whose name was taken."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from bitwright.catalogue._kinds import COMMAND, KINDS, I_co, Info, Kind, invalid, kind_of, unserved
from bitwright.catalogue._owners import Fault, Owner, PluginWarning
from bitwright.errors import PluginError
from bitwright.hookspecs import API_VERSIONS, ToolInfo

I = TypeVar("I", bound=Info)  # noqa: E741

CORE_COMMANDS = (
    "quantize", "collect", "verify", "report", "diff", "encodings", "targets", "techniques", "plugins", "doctor", "new",
)  # fmt: skip
"""Commands of the command line itself; a test compares them with it."""


@dataclass(frozen=True)
class Descriptor(Generic[I_co]):
    """A descriptor and who gave it."""

    info: I_co
    owner: Owner

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.info.name, *aliases_of(self.info))

    @property
    def title(self) -> str:
        """Such as "technique 'acme' of plugin …", for messages."""
        return f"{item_of(self.info)} of {self.owner.title}"


def aliases_of(info: Info) -> tuple[str, ...]:
    """Other names of an item."""
    return tuple(getattr(info, "aliases", ()))


def item_of(info: Info) -> str:
    """What messages call an item: "technique 'acme'"."""
    return f"{kind_of(type(info)).word} {info.name!r}"


def _bare(info: Any) -> Any:
    """A descriptor without what it may have to go on without."""
    if isinstance(info, ToolInfo):
        return replace(info, command="")
    return replace(info, aliases=()) if aliases_of(info) else replace(info)


def command_of(info: ToolInfo) -> str:
    """What the command line calls a tool; empty where it has no command."""
    return (info.command_name or info.name.replace("_", "-")) if info.command else ""


@dataclass
class Catalogue:
    """What discovery found.

    Attributes:
        owners: every plugin, in the order in which they were read.
        descriptors: what can be used.
        lost: (word of the kind, name) → why nobody has it.
        reserved: word of a kind → names that are the core's own.
    """

    owners: list[Owner] = field(default_factory=list)
    descriptors: list[Descriptor[Any]] = field(default_factory=list)
    lost: dict[tuple[str, str], str] = field(default_factory=dict)
    reserved: Mapping[str, Iterable[str]] = field(default_factory=dict)

    def of(self, kind: type[I]) -> list[Descriptor[I]]:
        """The descriptors of one kind, in the order of discovery."""
        return [d for d in self.descriptors if isinstance(d.info, kind)]

    def holder(self, kind: type[I], name: str) -> Descriptor[I] | None:
        """Who has a name or alias."""
        key = kind_of(kind).key
        return next((d for d in self.of(kind) if key(name) in map(key, d.names)), None)

    def names(self, kind: type[Any]) -> tuple[str, ...]:
        """Every name and alias of a kind."""
        return tuple(n for d in self.descriptors if isinstance(d.info, kind) for n in d.names)

    def find(self, kind: type[I], name: str) -> Descriptor[I]:
        """The descriptor of a name or alias.

        Raises:
            PluginError: unknown, lost to a clash, or left out for a fault of its own.
        """
        if found := self.holder(kind, name):
            return found
        word = kind_of(kind).word
        if reason := self.why_lost(word, name, kind_of(kind).key):
            raise PluginError(reason)
        known = self.names(kind)
        close = difflib.get_close_matches(name, known, n=1)
        names = ", ".join(d.info.name for d in self.of(kind)) or "none"
        message = f"there is no {word} {name!r}"
        message += f" (did you mean {close[0]!r}?)" if close else ""
        message += f"; there are: {names}"
        if failed := [o.name for o in self.owners if any(not f.item or f.item.startswith("hook") for f in o.faults)]:
            message += f" (failed to load: {', '.join(failed)}; see `bitwright plugins`)"
        raise PluginError(message)

    def why_lost(self, word: str, name: str, key: Callable[[str], str] = str) -> str:
        """Why nobody has a name that somebody wanted; empty where nobody did."""
        return self.lost.get((word, key(name)), "")

    # -- taking what a plugin gives

    def take(self, given: Iterable[tuple[Any, Owner]]) -> None:
        """Take descriptors of plugins whose names rank alike: where two want one name, neither gets it.

        What is in the catalogue already keeps its names. An item that loses its name is left out, one that loses an
        alias or its command goes on without; each is a fault of its owner's. All else of a plugin stays.
        """
        fresh = [Descriptor(info, owner) for info, owner in given if self._usable(info, owner)]
        for kind in KINDS:
            mine = [d for d in fresh if isinstance(d.info, kind.info)]
            named = self._winners(kind, [(d, d.info.name) for d in mine])
            mine = [d for d in mine if (id(d), d.info.name) in named]
            # Names go before aliases: they are all there, without aliases, when these are given out.
            held = {id(d): Descriptor(_bare(d.info), d.owner) for d in mine}
            self.descriptors += held.values()
            further = [(d, a) for d in mine for a in aliases_of(d.info) if kind.key(a) != kind.key(d.info.name)]
            kept = self._winners(kind, further, what="alias")
            commands = [(d, command_of(d.info)) for d in mine if isinstance(d.info, ToolInfo) and d.info.command]
            kept |= self._winners(COMMAND, commands, what="command")
            for d in mine:
                info = _bare(d.info)
                if left := tuple(a for a in aliases_of(d.info) if (id(d), a) in kept):
                    info = replace(info, aliases=left)
                if isinstance(d.info, ToolInfo) and (id(d), command_of(d.info)) in kept:
                    info = replace(info, command=d.info.command)
                self.descriptors[self.descriptors.index(held[id(d)])] = Descriptor(info, d.owner)

    def _usable(self, info: Info, owner: Owner) -> bool:
        """Whether a descriptor is valid and of an api that is served; if not, that is a fault of its owner's."""
        word = kind_of(type(info)).word
        if reason := invalid(info):
            self.fault(owner, Fault(f"{word} {info.name!r}", f"its descriptor can't be used: {reason}"))
            return False
        if reason := unserved(info, owner.distribution or owner.name):
            self.fault(owner, Fault(item_of(info), reason))
            key = kind_of(type(info)).key
            told = f"{item_of(info)} of {owner.title} can't be used: {reason}"
            self.lost.update({(word, key(name)): told for name in (info.name, *aliases_of(info))})
            return False
        return True

    def _winners(
        self, kind: Kind[Any], wanted: list[tuple[Descriptor[Any], str]], what: str = "name"
    ) -> set[tuple[int, str]]:
        """(id of the descriptor, name) of those that get the name that they want; the others are told why not."""
        claims: dict[str, list[tuple[Descriptor[Any], str]]] = {}
        for descriptor, name in {(id(d), name): (d, name) for d, name in wanted}.values():
            claims.setdefault(kind.key(name), []).append((descriptor, name))
        won: set[tuple[int, str]] = set()
        for key, claimants in claims.items():
            holder = self._holder_title(kind, key)
            if not holder and len(claimants) == 1:
                won.add((id(claimants[0][0]), claimants[0][1]))
                continue
            if not holder:
                titles = list(dict.fromkeys(d.owner.title for d, _ in claimants))
                told = f"{' and '.join(titles)} both bring" if len(titles) > 1 else f"{titles[0]} brings twice"
                self.lost[kind.word, key] = (
                    f"{told} a {kind.word} {claimants[0][1]!r}, so nobody has the name: uninstall one of them, or "
                    "choose the plugins to load with BITWRIGHT_PLUGINS"
                )
            for descriptor, name in claimants:
                others = dict.fromkeys(d.owner.title for d, _ in claimants if d is not descriptor)
                why = f"belongs to {holder}" if holder else f"is wanted by {' and '.join(others)} too: nobody has it"
                item = item_of(descriptor.info)
                if what == "name":
                    self.fault(descriptor.owner, Fault(item, f"the name {why}; it is left out"))
                else:
                    self.fault(descriptor.owner, Fault(f"{what} {name!r}", f"the name {why}; {item} goes on without"))
        return won

    def _holder_title(self, kind: Kind[Any], key: str) -> str:
        """Who has a name already; empty if nobody."""
        if key in map(kind.key, self.reserved.get(kind.word, ())):
            return "bitwright itself"
        for d in self.descriptors:
            if isinstance(d.info, kind.info):
                names = (command_of(d.info),) if kind is COMMAND else d.names
                if key in map(kind.key, names):
                    return d.owner.title
        return ""

    def fault(self, owner: Owner, fault: Fault) -> None:
        """Remember what is wrong with a plugin, and say so once.

        Raises:
            PluginError: BITWRIGHT_STRICT_PLUGINS=1.
        """
        if owner.add_fault(fault):
            complain(owner, fault)

    # -- by hand

    def admit(self, info: Info) -> None:
        """Take a descriptor that the user's own process adds; one of an earlier `admit` is replaced.

        Raises:
            PluginError: a name belongs to an installed plugin, or the descriptor can't be used.
        """
        kind = kind_of(type(info))
        if reason := invalid(info):
            raise PluginError(f"{kind.word} {info.name!r}: {reason}")
        owner = next((o for o in self.owners if o.name == BY_HAND), None) or Owner(BY_HAND, "", "")
        descriptor = Descriptor(info, owner)
        reserved = {kind.key(n) for n in self.reserved.get(kind.word, ())}
        for name in descriptor.names:
            held = self.holder(type(info), name)
            if held and held.owner is not owner:
                raise PluginError(f"{kind.word} {name!r} belongs to {held.owner.title}; choose another name")
            if kind.key(name) in reserved:
                raise PluginError(f"{kind.word} {name!r} belongs to bitwright itself; choose another name")
        if info.api not in API_VERSIONS:
            raise PluginError(
                f"{info.name!r} asks for plugin api {info.api}; this bitwright serves {list(API_VERSIONS)}"
            )
        if owner not in self.owners:
            self.owners.append(owner)
        mine = set(map(kind.key, descriptor.names))
        self.descriptors = [
            d for d in self.descriptors
            if not (type(d.info) is type(info) and d.owner is owner and set(map(kind.key, d.names)) & mine)
        ]  # fmt: skip
        self.descriptors.append(descriptor)


BY_HAND = "added by hand"


def complain(owner: Owner, fault: Fault) -> None:
    """Warn of a plugin or an item that was left out.

    Raises:
        PluginError: BITWRIGHT_STRICT_PLUGINS=1.
    """
    message = f"{owner.title}: {fault}" if fault.item else f"{owner.title} skipped: {fault}"
    if os.environ.get("BITWRIGHT_STRICT_PLUGINS", "") not in ("", "0"):
        raise PluginError(message)
    warnings.warn(message, PluginWarning, stacklevel=2)
