"""Studies: many runs over arms, axes and seeds, and a report that compares them.

A study is a YAML file. ``syncbn study run --config NAME --out FOLDER`` trains what is missing and writes the report.
"""

from syncbn.study.plan.grid import Study
from syncbn.study.plan.study_file import load_study

__all__ = ["Study", "load_study"]
