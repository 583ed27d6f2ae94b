"""Which plugins there are and what they offer: descriptors by kind and name; what they describe isn't imported."""

from __future__ import annotations

from bitwright.catalogue._catalogue import Catalogue, Descriptor, command_of, item_of
from bitwright.catalogue._discovery import current, discover, resolved
from bitwright.catalogue._kinds import Info, kind_of
from bitwright.catalogue._owners import Fault, Owner, PluginStatus, PluginWarning, State, blamed, culprits, described

__all__ = [
    "Catalogue",
    "Descriptor",
    "Fault",
    "Info",
    "Owner",
    "PluginStatus",
    "PluginWarning",
    "State",
    "blamed",
    "command_of",
    "culprits",
    "current",
    "described",
    "discover",
    "item_of",
    "kind_of",
    "resolved",
]
