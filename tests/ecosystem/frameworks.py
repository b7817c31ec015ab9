"""What the processes of `forked.py` begin with."""

from syncbn.compat import import_torchvision

import_torchvision()  # as in conftest.py

import accelerate  # noqa: E402, F401
import lightning  # noqa: E402, F401
from transformers import ResNetForImageClassification, Trainer  # noqa: E402, F401
