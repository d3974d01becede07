"""Code that the programs share: reading a configuration, loading its model and questions, training and evaluation."""
