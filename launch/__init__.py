"""The programs of Hark, one file each; `hark VERB` runs them."""
