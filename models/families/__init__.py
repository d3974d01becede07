"""Model families, one file each; `models/loading.py` maps a config's model_type to one of them."""
