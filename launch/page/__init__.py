"""The page of `hark report` and `hark watch`: Python collects what runs have written as JSON, page scripts draw it."""
