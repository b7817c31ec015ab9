"""The experiments by which the literature explains batch normalization: its claims, measured again.

An experiment is a study (:mod:`syncbn.study`) of a function from a configuration and a seed to numbers, and a list of
what the claim says about these numbers. ``syncbn experiment`` runs one and writes a page.
"""

from syncbn.experiments.experiment import Experiment, experiment_names, load_experiment

__all__ = ["Experiment", "experiment_names", "load_experiment"]
