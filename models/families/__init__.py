"""Model families, one file each; `models/loading.py` maps a config's model_type to one of them."""

import sys

# Types that Python 3.10 cannot have: its last transformers names or calls their modules in another way.
OMNI = ("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe", "qwen3_omni_moe_thinker")
TOO_RECENT = () if sys.version_info >= (3, 11) else (*OMNI, "gemma4", "gemma4_text", "gemma4_unified_text")
