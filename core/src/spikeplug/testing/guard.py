"""Keeps a plugin from deleting or weakening a check without saying so."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest


class Guarded:
    """Base of the kits. Overriding a `test_*` of the kit is an error; `waived` skips one, with its reason."""

    waived: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("spikeplug.testing."):
            return
        kits = [base for base in cls.__mro__ if base.__module__.startswith("spikeplug.testing.")]
        checks = {name: kit for kit in kits for name in vars(kit) if name.startswith("test_")}
        helpers = {name: kit for kit in kits for name in vars(kit) if name.startswith("_") and name[1] != "_"}
        for name, kit in {**checks, **helpers}.items():
            # Whatever came before the kit in the order of resolution, itself or a mixin, would replace the check.
            if inspect.getattr_static(cls, name) is not vars(kit)[name]:
                raise TypeError(f"{cls.__name__} overrides the check {name}: waive it with a reason instead")
        for name, reason in cls.waived.items():
            if name not in checks or not reason.strip():
                raise TypeError(f"{cls.__name__} waives {name!r}: name a check of the kit and give the reason")

    @pytest.fixture(autouse=True)
    def _waive(self, request: pytest.FixtureRequest) -> None:
        reason = self.waived.get(request.node.originalname)
        if reason:
            pytest.skip(f"waived: {reason}")
