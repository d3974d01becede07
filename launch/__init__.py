"""The programs of Hark, one file each; `hark COMMAND` runs them."""
