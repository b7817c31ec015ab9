"""Studies: many training runs that answer one question, and what they show.

>>> from syncbn.study import load_study
>>> load_study("quickstart").seeds
(0, 1, 2)
"""

from syncbn.study.api import Study, compare, load_study
from syncbn.study.run.own_loop import Setting

__all__ = ["Setting", "Study", "compare", "load_study"]
