"""The rules by which the benchmarks decide whether a prediction is right. Plain Python, no framework is imported.

The rules are those of the official scripts, with which a test compares them row by row:
MMAU, Sakshi et al. 2024, arXiv:2410.19168: evaluation.py of github.com/Sakshi113/MMAU;
MMAR, Ma et al. 2025, arXiv:2505.13032: code/evaluation.py of github.com/ddlBoJack/MMAR, which has the rule of MMAU;
MMSU, Wang et al. 2025, arXiv:2506.04779: mmsu_evaluation.py of github.com/dingdongwang/MMSU.

Two figures are reported. The official figure counts the rows that the script counts. Hark's own figure differs in this:

- A row without a prediction is wrong. The scripts of MMAU and MMAR leave it out of the total.
- A prediction in which MMSU's script finds no letter is wrong. The script leaves the row out of the total, unless the
  prediction is empty or "None", which is wrong.
- A row whose right answer is null or empty is left out of the total, because it cannot be graded. The scripts count it.

Neither figure follows the scripts in this:

- MMAU and MMAR: a number as a choice, answer or prediction is read as its text, null as no prediction, and a task,
  modality or category that the script does not list is a group of its own. The scripts stop with a traceback.
- All: a line that is not valid JSON, a row without choices or answer, and a list or an object as a prediction are
  errors that name the row. MMSU's script leaves such lines and predictions out, and reads a missing value as "".
- MMAU's script reads the key "model_output", its README and older versions "model_prediction"; MMAR's script reads
  "answer_prediction". The official figure uses the first of the benchmark's keys that any row of the file has. Hark's
  own figure uses, in each row, the first key that the row has.
- launch/convert.py accepts an answer that equals a choice up to case, spaces and quotes, or that is its letter. MMSU's
  script compares exactly, so that no prediction is right for such a row.
"""

import re
from collections.abc import Callable, Sequence

from hark.data.choices import is_correct, normalise
from hark.data.json_files import as_text

Value = str | int | float | None  # a choice or an answer as it is in a benchmark's file
Rule = Callable[[str, Sequence[Value], Value], bool]  # (prediction, choices, right answer) -> is it right?
LETTERS = ("A", "B", "C", "D")


def index_of(answer: Value, choices: Sequence[Value]) -> int | None:
    """The index of the answer among the choices: the first equal one, else the first that equals it normalised."""
    if answer in choices:
        return list(choices).index(answer)
    target = normalise(as_text(answer) or "")
    return next((n for n, choice in enumerate(choices) if normalise(as_text(choice) or "") == target), None)


def strict(prediction: str, choices: Sequence[Value], answer: Value) -> bool:
    """The rule of the accuracy reward: equal to the right choice and to no other, both normalised."""
    index = index_of(answer, choices)
    return index is not None and is_correct(prediction, [as_text(choice) or "" for choice in choices], index)


def words(value: Value) -> set[str]:
    return set(re.findall(r"\b\w+\b", (as_text(value) or "").lower()))


def mmau(prediction: str, choices: Sequence[Value], answer: Value) -> bool:
    """The prediction has all words of the answer and no word that only wrong choices have, in any order and number."""
    given, right = words(prediction), words(answer)
    wrong = set().union(*(words(choice) - right for choice in choices))
    return bool(given) and right <= given and given.isdisjoint(wrong)


def mmsu(prediction: str, choices: Sequence[Value], answer: Value) -> bool:
    """The choice at the prediction's letter equals the answer, as Python compares them; "3" does not equal 3."""
    letter = letter_of(prediction)
    index = LETTERS.index(letter) if letter else len(choices)
    return index < len(choices) and choices[index] == answer


def letter_of(prediction: str) -> str | None:
    """The first character if it is one of A to D, as in "B. rain", else the second-last one, as in "It is B."

    Surrounding spaces and all newlines are removed first. Only capital letters count: "Dogs" has the letter D.
    """
    text = prediction.strip().replace("\n", "")
    return next((character for character in (text[:1], text[-2:-1]) if character in LETTERS), None)


# Whether the official script leaves a row out of the total, by the value of its prediction (None: the row has none).


def without_prediction(prediction: object) -> bool:
    """MMAU, MMAR: rows without a prediction."""
    return prediction is None


def without_letter(prediction: object) -> bool:
    """MMSU: predictions that are not text, and those without a letter that are neither empty nor "None"."""
    if not isinstance(prediction, str):
        return True
    return letter_of(prediction) is None and prediction.strip().replace("\n", "") not in ("", "None")
