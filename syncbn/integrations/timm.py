"""This package's layers as ``norm_layer`` of timm's models.

Some of timm's models, EfficientNets among them, want normalization and activation as one layer. For a class of theirs,
timm looks up the equivalent with an activation in tables, into which :func:`register` enters this package's.
"""

from __future__ import annotations

from syncbn.compat import import_timm
from syncbn.norm_act import WITH_ACTIVATION


def register() -> None:
    """Let ``timm.create_model(name, norm_layer=...)`` take this package's layers.

    Afterwards ``norm_layer`` may be ``syncbn.SyncBatchNorm``, a ``functools.partial`` of a layer with its options, or
    ``"syncbatchnorm"`` and ``"batchrenorm"`` where timm takes the name of a norm, as in its scripts. Calling it again
    changes nothing. timm looks classes up by name alone: ``torch.nn.SyncBatchNorm``, which it refuses in models with
    joint layers, is then taken for this package's.

    :func:`syncbn.convert` needs none of this, and serves every model: those that exist, have pretrained weights, or do
    not take a ``norm_layer``, such as timm's MobileNetV3. Layers that are made here stay in :func:`syncbn.revert`.

    Raises:
        ImportError: timm is not installed, or its tables are not where they were in the releases 1.0.

    Example:
        >>> import functools, syncbn, timm
        >>> register()
        >>> ghost = functools.partial(syncbn.GhostBatchNorm, ghost_batch_size=8)
        >>> model = timm.create_model("test_efficientnet", norm_layer=ghost)
        >>> model.bn1.activation, model.bn1.ghost_batch_size
        ('silu', 8)
    """
    norms, acts = import_timm("layers.create_norm"), import_timm("layers.create_norm_act")
    try:
        by_name = (acts._NORM_ACT_MAP, acts._NORM_TO_NORM_ACT_MAP)
        kinds = (acts._NORM_ACT_TYPES, acts._NORM_ACT_REQUIRES_ARG)
        plain = norms._NORM_MAP
    except AttributeError as error:
        raise ImportError(f"this timm has other tables of its norms than the releases 1.0 ({error})") from error
    for cls, with_activation in WITH_ACTIVATION.items():
        name = cls.__name__.lower()
        plain[name] = cls
        for table in by_name:
            table[name] = with_activation
        for known in kinds:
            known.add(with_activation)
