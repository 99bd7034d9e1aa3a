"""Keeps a plugin from deleting or weakening a check without saying so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest


class Guarded:
    """Base of the kits. Overriding a `test_*` of the kit is an error; `waived` skips one, with its reason."""

    waived: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Guarded in cls.__bases__:
            return
        checks = {name for base in cls.__mro__[1:] for name in vars(base) if name.startswith("test_")}
        for name in vars(cls):
            if name in checks:
                raise TypeError(f"{cls.__name__} overrides the check {name}: waive it with a reason instead")
        for name, reason in cls.waived.items():
            if name not in checks or not reason.strip():
                raise TypeError(f"{cls.__name__} waives {name!r}: name a check of the kit and give the reason")

    @pytest.fixture(autouse=True)
    def _waive(self, request: pytest.FixtureRequest) -> None:
        reason = self.waived.get(request.node.originalname)
        if reason:
            pytest.skip(f"waived: {reason}")
