"""What a policy is, and one file per model family."""
