"""The algorithm. Read in this order: types, tree, sampler, scorer, advantage, loss, trainer."""
