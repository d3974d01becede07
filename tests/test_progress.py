"""launch/common/progress.py: nothing is said of what is quick."""

from hark.launch.common import progress


def test_only_what_takes_long_is_counted_aloud(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 2.0, 4.0, 5.0, 15.0, 16.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.counted("abcde", 5, "letters read")) == list("abcde")
    assert capsys.readouterr().out == "3 of 5 letters read, 3 s left\nall 5 letters read, in 16 s\n"
    clock = iter([0.0, 1.0, 1.5, 2.0])
    assert list(progress.counted("ab", 2, "letters read")) == ["a", "b"]
    clock = iter([0.0, 10.0, 20.0, 30.0])
    assert list(progress.counted("ab", 2, "letters read", show=False)) == ["a", "b"]
    assert capsys.readouterr().out == ""


def test_an_item_counts_its_size(monkeypatch, capsys):
    clock = iter([0.0, 4.0, 8.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.counted(["abc", "d"], 4, "letters read", size=len)) == ["abc", "d"]
    assert capsys.readouterr().out == "3 of 4 letters read, 1 s left\nall 4 letters read, in 20 s\n"
