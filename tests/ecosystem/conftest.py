"""Lightning imports torchvision by way of torchmetrics; one that does not fit torch has to be prepared first."""

from __future__ import annotations

from syncbn.compat import import_torchvision

import_torchvision()
