"""The modules of `syncbn.integrations` without their frameworks."""

from __future__ import annotations

import importlib
import sys

import pytest


def test_without_lightning_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)  # its import raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "syncbn.integrations.lightning", raising=False)
    with pytest.raises(ImportError, match=r"^Lightning is needed here \(.+\); install: pip install lightning$"):
        importlib.import_module("syncbn.integrations.lightning")
