"""What a batch per GPU will cost a model, told before the model is trained."""

from syncbn.advise.remedies import Advice, Remedy, advise
from syncbn.advise.trial import try_nearest
from syncbn.advise.words import print_advice

__all__ = ["Advice", "Remedy", "advise", "print_advice", "try_nearest"]
