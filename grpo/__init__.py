"""The algorithm.

Reading order: types, tree, distribution, sampler, branches, scorer, advantage, loss, trainer, learner.
"""
