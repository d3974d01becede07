"""The page about runs: what it holds is what was written, in bounds that it names, and no text of it is markup."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import shutil
import socket
import struct
import threading
from pathlib import Path

import pytest

from hark import UserError
from hark.data.clip import Clip
from hark.grpo.instruments.record import place_of, read_step
from hark.launch.page.collect import Bounds, Collection, all_parts, base_of, clips_of, differences, short_names, spread
from hark.launch.page.document import as_json, document
from hark.launch.page.sounds import Sounds
from hark.launch.report import main, twin_of
from hark.launch.watch import Handler, server
from tests.written import GROUP, HOSTILE, replace_tensors, replace_values, values_of, write_metrics, write_run

ELEMENT = re.compile(r'<script type="application/json" id="([^"]+)">(.*?)</script>', re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("page") / "grpo")


def elements(page: str) -> dict[str, dict]:
    """The JSON of a page as a browser finds it, by the ids of its elements."""
    return {name: json.loads(text) for name, text in ELEMENT.findall(page)}


def written(*words: str | Path) -> tuple[str, dict]:
    """The page and the twin that `hark report` writes."""
    main([str(word) for word in words])
    out = Path(words[-1])
    return out.read_text(encoding="utf-8"), json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


def test_the_twin_holds_what_the_page_holds_but_the_sounds(run, tmp_path):
    page, twin = written(run, "--out", tmp_path / "r.html")
    held = elements(page)
    assert twin == twin_of(held.pop("main"), held)
    assert {"step-0-10", "step-0-20", "rows-0"} < held.keys()
    sounds = [part for name, part in held.items() if name.startswith("clip-")]
    assert len(sounds) == 4 and all(part["sound"].startswith("data:audio/") for part in sounds), "each clip once"


def test_curves_and_intervals_are_those_of_the_metrics(run, tmp_path):
    _, twin = written(run, "--out", tmp_path / "r.html")
    (one,) = twin["main"]["runs"]
    assert one["steps"] == list(range(1, 61)) and one["metrics"]["kl"][4] == 0.05
    assert [each["step"] for each in one["evaluations"]] == [20, 40, 60]
    low, high = one["evaluations"][0]["accuracy_interval"]
    assert low == pytest.approx(0.3391, abs=1e-4) and high == pytest.approx(0.4900, abs=1e-4), "Wilson's, of 66 in 160"
    found = {each["name"]: each for each in one["warnings"]}
    slow = found["loader starves the step"]
    assert 20 < slow["step"] <= 40 and "raise data.workers" in slow["text"], "what the diagnosis says"


def test_a_recorded_step_is_whole_to_seven_digits(run, tmp_path):
    _, twin = written(run, "--out", tmp_path / "r.html")
    record, step = read_step(run, 20), twin["step-0-20"]
    assert len(step["groups"]) == 3 and step["questions"] == 3
    for n, group in enumerate(step["groups"]):
        for g, one in enumerate(group["completions"]):
            row = n * GROUP + g
            length = int(record.tensors["mask"][row].sum())
            for u in range(2):
                expected = record.tensors["loss"][row, :length, u].tolist()
                assert one["loss"][u] == pytest.approx(expected, rel=1e-6)
            assert one["tokens"] == record.tensors["tokens"][row, :length].tolist()
        assert group["answers"]["greedy"]["right"] is True and group["answers"]["silent"]["right"] is False


def test_no_text_is_markup_and_every_text_arrives(tmp_path):
    run = write_run(tmp_path / "grpo", texts=HOSTILE, settings=(f"model.path={HOSTILE[0]}",))
    other = write_run(tmp_path / "sft")
    page, twin = written(run, other, "--out", tmp_path / "r.html")
    assert page.count("<script") == len(elements(page)) + 1, "the data and the page's own script"
    assert "<img" not in page and "<!--" not in page and "\u2028" not in page
    group = twin["step-0-10"]["groups"][0]
    assert [one["text"] for one in group["completions"]] == list(HOSTILE[:GROUP])
    assert group["question"].endswith(" ".join(HOSTILE))
    assert [HOSTILE[0], "runs/mini/warm/model"] in [one["values"] for one in twin["main"]["differences"]]


@pytest.mark.parametrize("text", [*HOSTILE, "]]>", "\u2029"])
def test_json_in_an_element_is_the_same_value_and_has_no_sign_of_markup(text):
    escaped = as_json({text: [text]})
    assert json.loads(escaped) == {text: [text]} and not set("<>&\u2028\u2029") & set(escaped)


def test_the_policy_allows_the_pages_own_style_and_script_and_nothing_else(run, tmp_path):
    page, _ = written(run, "--out", tmp_path / "r.html")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'none'"
    assert not re.search(r"\sstyle=|\son\w+=|https?://", page.replace("http://www.w3.org/2000/svg", ""))


def test_the_scripts_never_make_markup_of_text():
    makers = re.compile(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(")
    for path in (Path(__file__).parents[1] / "launch" / "page").glob("*.js"):
        assert not makers.search(path.read_text()), path


def test_bounds_are_kept_and_what_is_left_out_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "grpo", recorded=(10, 20, 30, 40, 50))
    bounds = ("--steps", "2", "--groups", "1", "--clips", "2", "--questions", "3")
    page, twin = written(run, *bounds, "--out", tmp_path / "r.html")
    assert [name for name in twin if name.startswith("step")] == ["step-0-10", "step-0-50"]
    assert len(twin["step-0-10"]["groups"]) == 1 and len(twin["rows-0"]["rows"]) == 3
    assert sum(name.startswith("clip") for name in twin) == 2
    assert twin["main"]["left_out"] == [
        "grpo: 2 of 5 recorded steps are here (--steps)",
        "1 of 3 questions of a recorded step are here (--groups)",
        "of an evaluation with 4 questions the first 3 are here (--questions)",
        "2 of 3 clips can be heard here (--clips)",
    ]
    assert capsys.readouterr().out.count("left out: ") == 4


def test_questions_with_answers_under_the_controls_come_first(tmp_path):
    run = write_run(tmp_path / "grpo")
    part = place_of(run, 20) / "rank-0"
    values = values_of(part)
    del values["prompts"][0]["answers"]
    replace_values(part, values)
    _, twin = written(run, "--groups", "2", "--out", tmp_path / "r.html")
    assert [group["id"] for group in twin["step-0-20"]["groups"]] == ["test-1", "test-2"]
    rows = read_step(run, 20).tensors["rewards"][GROUP : 2 * GROUP].tolist()
    assert [one["rewards"] for one in twin["step-0-20"]["groups"][0]["completions"]] == rows, "its own completions"


def test_a_run_with_nothing_but_its_configuration_has_a_page(run, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text((run / "config.yaml").read_text())
    _, twin = written(tmp_path / "new", "--out", tmp_path / "r.html")
    assert twin["main"]["runs"][0]["steps"] == [] and twin["main"]["runs"][0]["evaluation"] is None


def test_options_that_are_no_values_of_theirs_are_left_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "odd")
    text = re.sub(r"(?m)^(  (?:dtype|steps):).*", r"\1 [1, 2]", (run / "config.yaml").read_text())
    (tmp_path / "odd" / "config.yaml").write_text(text)
    _, twin = written(tmp_path / "odd", "--out", tmp_path / "r.html")
    (one,) = twin["main"]["runs"]
    assert one["total"] is None and one["metrics"]


def test_missing_clips_questions_and_broken_records_are_told_in_their_place(tmp_path):
    run = write_run(tmp_path / "grpo")
    (tmp_path / "data" / "test-0.wav").unlink()
    (tmp_path / "data" / "test.jsonl").unlink()
    (run / "record" / "step-000020" / "rank-0" / "tensors.safetensors").write_bytes(b"no")
    _, twin = written(run, "--out", tmp_path / "r.html")
    assert "no such file" in twin[twin["step-0-10"]["groups"][0]["clips"][0]["part"]]["problem"]
    assert "no such file" in twin["rows-0"]["problem"] and twin["rows-0"]["rows"][0]["prediction"] == "rain"
    assert "tensors.safetensors has 2 bytes instead of" in twin["step-0-20"]["problem"]


def test_a_step_that_an_error_ended_is_shown_as_far_as_it_came(tmp_path):
    run = write_run(tmp_path / "grpo")
    part = run / "record" / "step-000020" / "rank-0"
    tensors = read_step(run, 20).tensors
    kept = {name: tensors[name] for name in ("tokens", "mask", "old_logprobs")}
    replace_tensors(part, kept)
    _, twin = written(run, "--out", tmp_path / "r.html")
    one = twin["step-0-20"]["groups"][0]["completions"][0]
    assert one["tokens"] and "loss" not in one and "reward" not in one


def test_what_is_no_run_and_what_cannot_be_written_are_errors_of_one_line(run, tmp_path):
    with pytest.raises(UserError, match="holds no config.yaml"):
        main([str(tmp_path), "--out", str(tmp_path / "r.html")])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        main([str(run), "--out", str(tmp_path / "file" / "r.html")])
    with pytest.raises(SystemExit):
        main([str(run), "--out", str(tmp_path / "r.htm")])


def test_steps_are_spread_evenly_with_the_first_and_the_last():
    assert spread(range(10, 110, 10), 4) == [10, 40, 70, 100]
    assert spread([1, 2], 4) == [1, 2] and spread([1, 2, 3], 1) == [3] and spread([1, 2], 0) == []


def test_runs_are_told_apart_by_as_little_of_their_paths_as_does():
    assert short_names([Path("/a/grpo"), Path("/a/sft")]) == ["grpo", "sft"]
    assert short_names([Path("/a/x/grpo"), Path("/a/y/grpo")]) == ["x/grpo", "y/grpo"]
    assert len(set(short_names([Path("/a/x"), Path("/a/x")]))) == 2


def test_the_configurations_differ_in_what_is_not_equal_everywhere():
    first, second = {"run.directory": "a", "optim.lr": 1, "x.y": 2}, {"run.directory": "b", "optim.lr": 3, "x.y": 2}
    assert differences([first, second]) == [{"name": "optim.lr", "values": [1, 3]}]
    assert differences([first]) == []


def test_clips_are_found_from_where_the_run_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/mini/grpo"))
    monkeypatch.chdir("/")
    assert base_of(tmp_path / "runs" / "mini" / "grpo") == tmp_path
    _, twin = written(tmp_path / "runs" / "mini" / "grpo", "--out", tmp_path / "r.html")
    assert not [part for part in twin.values() if part.get("problem")]
    assert twin["step-0-10"]["groups"][0]["clips"][0]["source"] == "runs/mini/data/test-0.wav", "no path of the machine"
    assert twin["rows-0"]["rows"][0]["clips"][0]["source"] == "runs/mini/data/test-0.wav"


def test_two_windows_of_a_file_are_two_clips_and_the_same_window_is_one():
    sounds = Sounds()
    windows = [Clip(Path("a.wav"), start) for start in (0.0, 1.0, 1.0)]
    names = [sounds.add(window, Path())["part"] for window in windows]
    assert len(set(names)) == 2 and names[1] == names[2]


def test_clips_are_taken_in_turns_from_all_parts():
    def part(*names: str) -> dict:
        return {"rows": [{"clips": [{"part": name}], "answers": {}} for name in names]}

    assert clips_of({"one": part("z", "b", "c"), "two": part("a", "b")}) == ["z", "a", "b", "c"]


def test_a_report_is_the_same_each_time(run):
    first, second = (document(*all_parts(Collection([run], Bounds()), Bounds())) for _ in range(2))
    assert first == second


# hark watch ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def port(tmp_path):
    """The port of a server about a run."""
    serving = server(Collection([write_run(tmp_path / "grpo")], Bounds()), 0)
    threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
    yield serving.server_address[1]
    serving.shutdown()
    serving.server_close()


@pytest.fixture
def ask(port):
    """A function that asks the server, and returns status, headers and text."""

    def asked(path: str, method: str = "GET", **headers: str) -> tuple[int, dict, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(method, path, headers={"Host": f"localhost:{port}"} | headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read().decode()

    return asked


def test_the_server_gives_the_page_its_data_and_parts_on_demand(ask, tmp_path):
    status, headers, page = ask("/")
    assert status == 200 and elements(page) == {"main": {"live": True}}
    assert "connect-src 'self'" in headers["Content-Security-Policy"] and "connect-src 'self'" in page
    step = json.loads(ask("/step-0-10.json")[2])
    clip = step["groups"][0]["clips"][0]["part"]
    assert json.loads(ask(f"/{clip}.json")[2])["sound"].startswith("data:audio/")
    assert len(json.loads(ask("/rows-0.json")[2])["rows"]) == 4


def test_what_has_not_changed_is_not_sent_again_and_new_lines_are(ask, tmp_path):
    _, headers, text = ask("/main.json")
    assert json.loads(text)["runs"][0]["steps"][-1] == 60
    tag = {"If-None-Match": headers["ETag"]}
    assert ask("/main.json", **tag)[0] == 304
    write_metrics(tmp_path / "grpo", range(61, 64))
    status, _, text = ask("/main.json", **tag)
    assert status == 200 and json.loads(text)["runs"][0]["steps"][-1] == 63


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "[::1]"])
def test_a_foreign_host_name_is_refused(ask, host):
    status, _, text = ask("/main.json", Host=host)
    assert status == 403 and "grpo" not in text


def test_a_forwarded_port_is_no_foreign_name(ask):
    assert ask("/main.json", Host="localhost:9000")[0] == 200


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "<b>"])
def test_nothing_but_get_is_answered(ask, method):
    status, headers, text = ask("/main.json", method)
    assert status == 501 and "grpo" not in text and "<b>" not in text and "Content-Security-Policy" in headers


def test_a_request_without_end_is_refused(ask):
    assert ask("/" + "a" * 70_000)[0] == 414
    assert ask("/main.json", Long="a" * 70_000)[0] == 431
    assert ask("/main.json", **{f"X-{number}": "" for number in range(200)})[0] == 431


def test_who_connects_and_says_nothing_is_left_and_keeps_nobody_waiting(port, ask, monkeypatch):
    assert 0 < Handler.timeout < 60
    monkeypatch.setattr(Handler, "timeout", 0.5)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as idle:
        idle.sendall(b"GET /main.json HTTP/1.1\r\n")
        assert ask("/main.json")[0] == 200
        assert idle.recv(1) == b"", "the server has closed it"


def test_a_browser_that_leaves_before_its_answer_prints_nothing(port, ask, capfd):
    with socket.create_connection(("127.0.0.1", port)) as leaving:
        leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by a reset
        leaving.sendall(b"GET /main.json HTTP/1.1\r\nHost: localhost\r\n")
    assert ask("/main.json")[0] == 200
    for thread in threading.enumerate():
        if "process_request" in thread.name:
            thread.join(30)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "path", ["/config.yaml", "/../config.yaml", "/%2e%2e/config.yaml", "/record/", "/step-0-11.json", "/step-1-10.json",
             "/rows-9.json", "/clip-0000000000000000.json", "/step-0-10", "//etc/passwd", "/main"],
)  # fmt: skip
def test_no_path_is_one_of_a_file_or_a_directory(ask, path):
    status, headers, text = ask(path)
    assert status == 404 and "model" not in text and "Content-Security-Policy" in headers


def test_the_server_listens_on_this_machine_alone_and_a_taken_port_is_an_error(tmp_path):
    collection = Collection([write_run(tmp_path / "grpo")], Bounds())
    with server(collection, 0) as serving:
        assert serving.server_address[0] == "127.0.0.1"
        with pytest.raises(UserError, match="choose another"):
            server(collection, serving.server_address[1])
