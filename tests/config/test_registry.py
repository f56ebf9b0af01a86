"""Registries: names, and what a plugin of another distribution may do wrong."""

import importlib.metadata

import pytest

from cucafera.config.errors import UserError
from cucafera.config.registry import Registry


def test_an_unknown_name_is_refused_with_the_nearest():
    registry = Registry("optimizer", "cucafera.optimizers")
    registry._entries = {"adamw": object()}
    with pytest.raises(UserError, match="there is no optimizer 'adam'; did you mean adamw"):
        registry.get("adam")
    with pytest.raises(UserError, match="if it comes from a plugin, install that"):
        registry.get("muon-plus-plus")


def test_a_plugin_that_cannot_be_loaded_is_named(monkeypatch):
    point = importlib.metadata.EntryPoint("broken", "no_such_module_anywhere", "cucafera.optimizers")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    with pytest.raises(
        UserError, match=r"no_such_module_anywhere cannot be loaded .*ModuleNotFoundError.*uninstall it"
    ):
        Registry("optimizer", "cucafera.optimizers").names()


def test_two_entries_of_one_name_are_refused():
    registry = Registry("optimizer", "cucafera.optimizers")
    entry = type("Entry", (), {"name": "same"})
    registry.register(entry)
    with pytest.raises(ValueError, match="there are two entries 'same'"):
        registry.register(entry)
