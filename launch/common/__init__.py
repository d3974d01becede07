"""What the verbs share: how a command ends, and what a configuration describes, loaded."""
