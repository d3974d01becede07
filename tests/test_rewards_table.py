"""data/rewards: each reward against numbers worked by hand, conditions, schedules and options."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from hark.data.errors import DataError
from hark.data.examples import Example
from hark.data.rewards import Failure, Judged, RewardError, find_reward
from hark.data.rewards.judging import Judge
from hark.grpo.config import RewardConfig
from hark.grpo.rewards import StepRewards, weights_at
from hark.grpo.runtime.collectives import World
from hark.grpo.types import Rollout
from tests.judged import columns_of, group_of

CHOICES = Example("7", (), "Which?", ("dog", "hot dog", "car"), 0)
SAID = Example("8", (), "What is said?", accepted=("The cat sat on the mat.",), extra={"keywords": ["cat", "mat"]})


def values(name, group, **options):
    return find_reward(name, options)(group)


def near(*numbers):
    return pytest.approx(list(numbers), abs=1e-6)


def test_the_cosine_of_tokens_stops_at_the_limit_and_that_of_characters_goes_on():
    right, wrong = "dog", "car"
    lengths = [(1,) * n for n in (0, 25, 50, 75, 100, 150)]
    for text, expected in (
        (right, (1, 0.926777, 0.75, 0.573223, 0.5, 0.5)),
        (wrong, (-1, -0.926777, -0.75, -0.573223, -0.5, -0.5)),
    ):
        assert values("cosine", group_of(CHOICES, *[text] * 6, ids=tuple(lengths))) == near(*expected)
    padded = [f"<answer>car</answer>{'x' * (n - 20)}" for n in (25, 50, 100, 150, 200)]
    released = values("cosine", group_of(CHOICES, *padded), form="open_rs")
    assert released == near(-0.073223, -0.25, -0.5, -0.25, 0)


def test_the_cosine_of_mathematics_is_that_of_trl_and_of_open_rs():
    """The numbers are those of trl/rewards/accuracy_rewards.py (July 2026) and of src/open_r1/rewards.py of Open-RS."""
    half = Example("1", (), "q", accepted=(r"$\frac{1}{2}$",))
    texts = [r"It is $\boxed{\frac{1}{2}}$", r"$\boxed{0.5}$ it is, at last", r"$\boxed{\frac{1}{3}}$"]
    texts.append(r"no $\boxed{2}$" + " indeed" * 5)
    group = group_of(half, *texts, ids=tuple((1,) * n for n in (20, 90, 30, 160)))
    assert values("cosine", group, by="math") == near(0.95225425, 0.51223587, -0.89694631, -0.5)
    own = {"min_right": 0.1, "max_right": 0.9, "min_wrong": -3.0, "max_wrong": -0.2}
    assert values("cosine", group, by="math", **own) == near(0.82360680, 0.11957739, -2.42289935, -0.2)
    released = {"form": "open_rs", "by": "math", "max_length": 40}
    assert values("cosine", group, **released) == near(0.61937536, 0.60305369, -0.26961477, -0.44010149)
    unread, without = (group_of(Example("1", (), "q", accepted=given), "2") for given in (("?",), ()))
    assert values("cosine", unread, by="math") == [None] and values("cosine", unread, **released) == [None]
    assert values("cosine", without, **released) == [None]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosine", {"form": "both"}, "form is 'both'; expected 'trl' or 'open_rs'"),
        ("cosine", {"by": "judge"}, "by is 'judge'; expected 'accuracy' or 'math'"),
        ("soft_overlong", {"cache": 0}, "cache is 0; expected 1 to 100 tokens"),
        ("soft_overlong", {"cache": 101}, "cache is 101; expected 1 to 100 tokens"),
        ("repetition", {"of": "letters"}, "of is 'letters'; expected 'tokens' or 'words'"),
    ],
)
def test_options_have_values_that_make_sense(name, options, message):
    with pytest.raises(ValueError, match=message):
        values(name, group_of(CHOICES, "dog"), **options)


def test_soft_overlong_falls_over_the_last_tokens():
    ids = tuple((1,) * n for n in (50, 80, 90, 100, 110))
    assert values("soft_overlong", group_of(CHOICES, *"abcde", ids=ids), cache=20) == near(0, 0, -0.5, -1, -1)


def test_the_length_target_is_the_median_of_the_group():
    ids = tuple((1,) * n for n in (40, 50, 60, 100))
    assert values("length_median", group_of(CHOICES, *"abcd", ids=ids)) == near(-15 / 55, -5 / 55, -5 / 55, -45 / 55)


def test_repetition_is_that_of_trl():
    ids = ((5, 5, 5, 5, 5), (1, 2, 1, 2, 1, 2), (1, 2, 3, 1, 2, 3), (1,))
    group = group_of(CHOICES, *"abcd", ids=ids)
    assert values("repetition", group, n=2) == near(-0.75, -0.6, -0.4, 0)
    assert values("repetition", group) == near(-2 / 3, -0.5, -0.25, 0)
    assert values("repetition", group_of(CHOICES, "A a b. a a"), n=1, of="words") == near(-3 / 5)


def test_error_rates_ignore_case_and_punctuation():
    group = group_of(SAID, "the cat sat on the mat", "<answer>The cat, sat on a mat</answer>", "cat", "x " * 20)
    assert values("wer", group) == near(1, 5 / 6, 1 / 6, 0)
    assert values("wer", group, lowest=-9.0)[3] == pytest.approx(1 - 20 / 6)
    # thecatsatonthemat, 17 letters; "a" for "the" is three edits, "cat" fourteen
    assert values("cer", group)[:3] == near(1, 14 / 17, 3 / 17)
    assert values("rouge_l", group)[:3] == near(1, 10 / 12, 2 / 7)
    assert values("wer", group_of(Example("9", (), "q"), "a")) == [None]


def test_hallucinations_are_loops_absence_and_another_script():
    texts = [
        "the cat sat on the mat",
        "the cat sat sat sat sat on the mat",
        "thanks for watching",
        "猫坐在垫子上",
        "cat mat",
    ]
    assert values("hallucination", group_of(SAID, *texts)) == [0, -1, -1, -1, 0]


def test_what_was_said_again_and_again_is_no_hallucination():
    said = Example("9", (), "What is said?", accepted=("No no no no no, stop.",))
    assert values("hallucination", group_of(said, "no no no no stop", "stop stop stop stop")) == [0, -1]


def test_keywords_count_precision_and_recall():
    group = group_of(SAID, "cat mat", "cat", "dog", "cat cat mat", "catmat")
    assert values("keywords", group) == near(1, (1 + 0.5) / 2, 0, (2 / 3 + 1) / 2, 0)
    assert values("keywords", group_of(CHOICES, "cat")) == [None]


def test_thinking_agrees_if_it_names_the_answered_choice_last():
    texts = [
        "<think>A car? No, a dog.</think><answer>dog</answer>",
        "<think>A dog? No, a car.</think><answer>dog</answer>",
        "<think>It is a hot dog.</think><answer>dog</answer>",
        "<think>Hm.</think><answer>dog</answer>",
        "<answer>dog</answer>",
    ]
    assert values("consistency", group_of(CHOICES, *texts)) == [1, 0, 0, None, None]


def test_mathematics_compares_numbers_not_their_digits():
    half = Example("1", (), "q", accepted=("0.5",))
    texts = [r"It is $\frac{1}{2}$", "so the answer is 0.50", "15", "0.05"]
    assert values("math", group_of(half, *texts)) == [1, 1, 0, 0]
    blank = group_of(Example("1", (), "q", accepted=("?",)), "1")
    assert values("math", blank) == [None] and values("math", blank, unparseable=1.0) == [1]


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("3", ["<answer>3</answer>", "<think>5?</think> <answer>$3.0$</answer>", "It is $3$."],
         ["<think>It is 3</think><answer>5</answer>", "<answer>3</answer><answer>5</answer>", "<answer>3",
          "<answer>3\\pi</answer>"]),
        (r"2\pi", ["<answer>2\\pi</answer>", r"so $\boxed{2\pi}$"], ["<answer>2</answer>", "2"]),
        ("1,000", ["<answer>1000</answer>", "1,000"], ["<answer>1</answer>"]),
        ("x^2 + 2x", [r"<answer>$2x + x^2$</answer>"], ["<answer>2x</answer>"]),
        ("7 cm", ["<answer>7</answer>", "<answer>The length is 7 cm</answer>"], ["<answer>8 cm</answer>"]),
    ],
)  # fmt: skip
def test_mathematics_reads_the_answer_tag_and_bare_latex(answer, right, wrong):
    group = group_of(Example("1", (), "q", accepted=(answer,)), *right, *wrong)
    assert values("math", group) == [1] * len(right) + [0] * len(wrong)


def test_words_are_no_mathematics():
    assert values("math", group_of(Example("1", (), "q", accepted=("Paris",)), "Paris", "$Paris$")) == [None, None]


def test_mmau_accepts_words_around_and_refuses_those_of_wrong_choices():
    texts = ["<answer>a dog barks</answer>", "dog car", "<answer>dog</answer><answer>dog</answer>"]
    assert values("mmau", group_of(CHOICES, *texts)) == [1, 0, 0]


def test_tags_have_an_order():
    texts = ["<A>x</A> <B>y</B>", "<B>y</B><A>x</A>", "<A>x</A>", "<A>x</A><B> </B>", "<A>x</A><B>y</B> so"]
    assert values("tags", group_of(CHOICES, *texts), tags=["A", "B"]) == [1, 0, 0, 0, 0]


def test_diversity_is_the_mean_edit_distance_to_the_others():
    group = group_of(CHOICES, *"abc", ids=((1, 2, 3, 4), (1, 2, 3, 4), (1, 2)))
    assert values("diversity", group) == near(0.25, 0.25, 0.5)
    assert values("diversity", group_of(CHOICES, "a")) == [0]


def test_an_artefact_is_decoded_and_scored(tmp_path):
    (tmp_path / "a.py").write_text(
        "def decode(ids):\n    return list(ids), 10\n\ndef score(wave, rate, example):\n    return len(wave) / rate\n"
    )
    group = group_of(CHOICES, "ab", "abcd")
    assert values("artefact", group, decode=f"{tmp_path}/a.py:decode", score=f"{tmp_path}/a.py:score") == near(0.2, 0.4)


def test_a_judge_is_asked_again_after_an_error_and_its_tokens_are_counted(monkeypatch):
    asked, statuses = [], iter([500, 429, 200, 200])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(
                (self.headers["Authorization"], json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            )
            self.send_response(next(statuses))
            self.end_headers()
            text = "Score: 0.75" if len(asked) == 3 else "none"
            usage = {"prompt_tokens": 30, "completion_tokens": 4}
            self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode())

        def log_message(self, *_):
            pass

    monkeypatch.setenv("JUDGE_KEY", "secret")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "key": "JUDGE_KEY", "wait": 0.01}
        with Judge(["judge"], "plain", options={"judge": options}) as judge:
            judged = judge([CHOICES], ["a dog", "a cat"], [[1], [1]], [True, True], 0)
        server.shutdown()
    assert judged.columns[0].item() == 0.75 and math.isnan(judged.columns[1].item())
    assert judged.figures == {"judge/prompt_tokens": 60, "judge/completion_tokens": 8}
    assert len(asked) == 4 and {key for key, _ in asked} == {"Bearer secret"}
    assert "a dog" in asked[0][1]["messages"][0]["content"]


def test_a_condition_makes_a_reward_0_where_another_is_not_above_0():
    texts = ["<answer>dog</answer>", "dog"]
    found = columns_of([CHOICES], texts, ["accuracy", "format"], "answer", only_if={"accuracy": "format"})
    assert found.tolist() == [[1, 1], [0, 0]]


def test_weights_are_linear_between_the_steps_of_a_schedule():
    schedule = {"format": {10: 1.0, 20: 0.0}}
    found = [weights_at({"accuracy": 2.0, "format": 7.0}, schedule, step) for step in (0, 10, 15, 20, 99)]
    assert found == [[2, 1], [2, 1], [2, 0.5], [2, 0], [2, 0]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wer", {"lowst": 0}, "unknown option of reward 'wer' 'lowst'; did you mean 'lowest'"),
        ("tags", {}, "reward 'tags' needs tags; set reward.options"),
        ("wer", {"group": 0}, "unknown option of reward 'wer' 'group'"),
    ],
)
def test_wrong_options_are_refused_before_a_run(name, options, message):
    with pytest.raises(DataError, match=message):
        find_reward(name, options)


OWN = """
import os, time

def hangs(group):
    if group.texts[0] == "hang":
        time.sleep(1000)
    if group.texts[0] == "die":
        os._exit(3)
    return [1.0] * len(group.texts)
"""


def test_a_reward_that_hangs_or_dies_is_replaced_and_costs_only_its_group(tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    examples = [Example(str(n), (), "Which?", ("dog", "car"), 0, line=f"t.jsonl:{n}") for n in range(3)]
    texts = ["hang", "dog", "die", "dog", "dog", "dog"]
    names = [f"{tmp_path}/own.py:hangs", "accuracy"]
    with Judge(names, "plain", on_error="none", timeout=0.3) as judge:
        judged = judge(examples, texts, [[1]] * 6, [True] * 6, 0)
    first, second = judged.columns.T.tolist()
    assert [math.isnan(value) for value in first] == [True] * 4 + [False] * 2 and first[4:] == [1, 1]
    assert second == [0, 1, 0, 1, 1, 1]
    late, dead = judged.failures
    assert "example '0' (t.jsonl:0)" in late.reason and "'hang'" in late.reason and "after 0.3 s" in late.reason
    assert "example '2'" not in dead.reason and "example '1'" in dead.reason and "died with status 3" in dead.reason
    assert "not finished after 0.3 s" in capsys.readouterr().err


def test_a_failure_stops_the_run_if_asked(monkeypatch, tmp_path):
    (tmp_path / "own.py").write_text("def bad(group):\n    return [float('inf'), None]\n")
    with pytest.raises(RewardError, match="is inf; expected a finite number or None"):
        columns_of([CHOICES], ["a", "b"], [f"{tmp_path}/own.py:bad"], "plain")


def test_a_reward_sees_the_tokens_of_each_completion_and_a_failed_call_is_counted_once():
    seen = []

    def judge(examples, texts, ids, stopped, step):
        seen.append((ids, stopped, step))
        return Judged(torch.ones(2, 1), (Failure("accuracy", "failed"),), {"judge/prompt_tokens": 3.0}, 1)

    tokens, mask = torch.tensor([[5, 6, 2], [7, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    rollout = Rollout((), 2, tokens, mask, torch.zeros(2, 3), torch.tensor([False, True]))
    rewards = StepRewards(judge, RewardConfig(), World(0, 1, torch.device("cpu")))
    assert rewards.columns(rewards.start([CHOICES], rollout, ["a", "b"], 4)).tolist() == [[1], [1]]
    assert seen == [([[5, 6, 2], [7, 2]], [False, True], 4)]
    assert rewards.take_figures() == {"reward_failures": 1, "judge/prompt_tokens": 3}
    assert rewards.take_figures() == {}
