"""The template of the recipes `sari_sft` and `sari`: thoughts in four sections, then the answer.

The sections are those of Audio-Reasoner (arXiv 2503.02318), whose form SARI (arXiv 2504.15900) takes up. The wording of
SARI's prompt could not be found; this one is ours.
"""

from hark.data.prompts import ANSWER, ASK, Template

SECTIONS = ("PLANNING", "CAPTION", "REASONING", "SUMMARY")
ELEMENTS = ", ".join(f"<{name}> </{name}>" for name in SECTIONS)
THINK = f" First think in {ELEMENTS}."

structured = Template(
    ASK + THINK + ANSWER, "<answer>{answer}</answer>", (*SECTIONS, "answer"), "{question}" + THINK + ANSWER
)
