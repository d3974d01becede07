"""Rewards and templates of a user's own file: `path/to/file.py:name`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hark import UserError
from hark.data.examples import Example
from hark.data.prompts import find_template, render, target
from hark.data.rewards import check_rewards, find_reward
from hark.from_file import from_file, save_own_files, short_name
from tests.judged import columns_of

EXAMPLE = Example(id="a", clips=(), question="Which?", choices=("dog", "car"), answer=1)
OWN = """
from pathlib import Path

from hark.data.prompts import Template

with Path("runs").open("a") as file:
    file.write("x")

short = Template("{question} {choices}", "<say>{answer}</say>", ("say",))


def brief(group):
    return [len(text) < 5 for text in group.texts]


def old(example, completion, template):
    return 1.0


class Brief:
    pass


five = 5
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)


def test_a_reward_of_a_file_stands_beside_those_of_the_package():
    rewards = columns_of([EXAMPLE], ["car", "a long dog"], ["accuracy", "mine.py:brief"], "plain")
    assert rewards.tolist() == [[1, 1], [0, 0]]


def test_a_template_of_a_file_gives_prompt_target_and_the_tags_of_the_format_reward():
    assert render(EXAMPLE, "mine.py:short") == "Which? ['dog', 'car']"
    assert target(EXAMPLE, "mine.py:short") == "<say>car</say>"
    completions = ["<say>car</say>", "<answer>car</answer>"]
    assert columns_of([EXAMPLE], completions, ["format"], "mine.py:short").tolist() == [[1], [0]]


def test_a_file_is_run_once_for_all_of_its_names_paths_and_threads(tmp_path):
    names = ["mine.py:brief", "./mine.py:short", f"{tmp_path}/mine.py:five"] * 4
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(from_file, names))
    assert (tmp_path / "runs").read_text() == "x"


def in_a_thread(name):
    """What a name leads to, or the error. The thread may hang for ever, at a lock that it holds itself."""
    found = []

    def find():
        try:
            found.append(from_file(name))
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=find, daemon=True)
    thread.start()
    thread.join(timeout=20)
    return found[0]


def test_a_file_that_is_run_may_use_another_of_its_name(tmp_path):
    use = "from hark.from_file import from_file\n\nname = __name__, from_file('{}')\n"
    (tmp_path / "further").mkdir()
    (tmp_path / "further" / "outer.py").write_text("name = __name__\n")
    (tmp_path / "outer.py").write_text(use.format("further/outer.py:name"))
    outer, inner = in_a_thread("outer.py:name")
    assert outer != inner


def test_files_that_use_each_other_see_what_is_there(tmp_path):
    use = "from hark.from_file import from_file\n\nx = 1\ny = from_file('{}')\n"
    (tmp_path / "one.py").write_text(use.format("two.py:y"))
    (tmp_path / "two.py").write_text(use.format("one.py:x"))
    assert in_a_thread("one.py:y") == 1
    (tmp_path / "self.py").write_text(use.format("self.py:z"))
    for _ in range(2):  # a file that failed is not kept
        assert "self.py:4: OwnFileError: self.py: has no 'z'" in str(in_a_thread("self.py:z"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.py:brief", "none.py: no such file .working directory"),
        ("mine.py:breif", "mine.py: has no 'breif'; did you mean 'brief'"),
        ("mine.py:five", "is of type int; expected a function"),
        ("mine.py:Brief", "is a class; expected a function"),
        (
            "mine.py:old",
            r"has the signature .example, completion, template.; expected a function .group. -> one number",
        ),
        ("raises.py:brief", "raises.py:2: ZeroDivisionError: division by zero"),
        ("syntax.py:brief", "syntax.py:3: SyntaxError"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(name, message, tmp_path):
    (tmp_path / "raises.py").write_text("x = 0\ny = 1 / x\n")
    (tmp_path / "syntax.py").write_text("x = 0\n\ndef brief(:\n")
    with pytest.raises(UserError, match=message) as raised:
        find_reward(name)
    assert "\n" not in str(raised.value)


def test_what_is_no_template_is_refused():
    with pytest.raises(
        UserError, match=r"template 'mine.py:brief' is a function; expected a hark.data.prompts.Template"
    ):
        find_template("mine.py:brief")


def test_rewards_of_one_short_name_are_refused_because_metrics_would_mix_them(tmp_path):
    (tmp_path / "other.py").write_text(OWN)
    assert short_name("a/b.py:brief") == "brief" and short_name("accuracy") == "accuracy"
    check_rewards(["accuracy", "mine.py:brief"])
    with pytest.raises(UserError, match="'mine.py:brief' and 'other.py:brief' would both be shown as 'brief'"):
        check_rewards(["mine.py:brief", "other.py:brief"])


def test_the_text_of_a_file_is_kept_as_it_was_run_and_another_text_beside_it(tmp_path):
    from_file("mine.py:brief")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.py").write_text("earlier")
    (tmp_path / "mine.py").write_text("changed since")
    save_own_files(tmp_path / "kept")
    save_own_files(tmp_path / "kept")
    texts = [path.read_text() for path in sorted((tmp_path / "kept").glob("mine*.py"))]
    assert texts.count("earlier") == 1 and texts.count(OWN) == 1 and "changed since" not in texts
