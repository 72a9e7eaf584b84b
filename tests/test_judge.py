"""The judge against a server of our own on this machine: what is sent, what is made of answers, what is said of
failures."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from scipy.sparse import csc_array

from tsae.scoring import heldout, judge


@pytest.fixture
def endpoint():
    """A server: `endpoint.answers` maps a prompt to a reply's text, or to (status, body); `endpoint.seen` is what came;
    `endpoint.length` is the length it claims, if any."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.seen.append((self.path, self.headers.get("Authorization"), body))
            reply = server.answers(body["messages"][0]["content"])
            status, reply = reply if isinstance(reply, tuple) else (
                200, json.dumps(dict(choices=[dict(message=dict(content=reply))])))
            self.send_response(status)
            if server.length:
                self.send_header("Content-Length", str(server.length))
            self.end_headers()
            self.wfile.write(reply.encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that gives up is part of the test
    server.seen, server.length, server.url = [], 0, f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def planted():
    """Feature 0 fires on 'a', 1 on 'b', 2 anywhere, 3 never."""
    random, tokenizer = np.random.default_rng(0), byte_tokenizer()
    rows = np.c_[np.zeros((40, 1), int), random.choice(tokenizer.encode("abcdef"), (40, 30))]
    rows = torch.from_numpy(rows).int()
    text = heldout.prepare(rows, rows != 0, tokenizer)
    letters = np.array([text.word(int(t)) for t in text.t])
    fires = np.stack([letters == "a", letters == "b", random.random(len(letters)) < 0.1, letters == "?"], 1)
    return text, csc_array((fires * random.uniform(1, 2, fires.shape)).astype(np.float32))


def clever(prompt: str) -> str:
    """Explains by the commonest marked token, and detects by it."""
    excerpts = json.loads(prompt[prompt.index("\n[") + 1:] if "\n[" in prompt else prompt[prompt.index("["):])
    marked = [re.search(r"<<(.+?)>>", excerpt)[1] for excerpt in excerpts]
    if prompt.startswith(judge.EXPLAIN[:40]) and "numbered" not in prompt:
        return f"the letter {max(set(marked), key=marked.count)}"
    letter = re.search(r"the letter (\w)", prompt)[1]
    return f"I think: {[i for i, mark in enumerate(marked, 1) if mark == letter]}"


def test_a_judge_explains_and_detects(endpoint):
    text, codes = planted()
    endpoint.answers = clever
    found = judge.judged(judge.Judge(endpoint.url, "some-model", "secret"), codes, text, [0, 1, 2, 3])
    assert found["judge_explanation"][:2].tolist() == ["the letter a", "the letter b"]
    assert found["judge_detection"][:2].tolist() == [1, 1] and found["judge_detection"][2] < 0.9
    assert np.isnan(found["judge_detection"][3])
    assert len(endpoint.seen) == 6, "a feature that never fires is not asked about"
    path, key, body = endpoint.seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "some-model"
    for i, (_, _, body) in enumerate(endpoint.seen):  # explained from the fit half, asked about the other
        for excerpt in re.findall(r'"(?:\d+: )?([^"]*<<.>>[^"]*)"', body["messages"][0]["content"]):
            same = [p for p in range(len(text.t)) if judge.excerpt(text, p) == excerpt]
            assert any(text.fit[p] == (i % 2 == 0) for p in same)


def test_excerpts_stay_in_their_row():
    text, _ = planted()
    row = "".join(text.word(int(t)) for t in text.t[text.row == 1])
    first = int(np.flatnonzero(text.row == 1)[0])
    assert judge.excerpt(text, first, 3) == f"<<{row[0]}>>{row[1:4]}"
    assert judge.excerpt(text, first + 5, 2) == f"{row[3:5]}<<{row[5]}>>{row[6:8]}"


def test_busy_servers_are_asked_again(endpoint):
    replies = iter([(503, "busy"), (429, "slow down"), "[1, 3]"])
    endpoint.answers = lambda prompt: next(replies)
    asked = judge.Judge(endpoint.url + "/chat/completions", "m", waits_s=(0, 0))
    assert asked.detect("x", ["a", "b", "c"]).tolist() == [True, False, True]
    assert len(endpoint.seen) == 3 and endpoint.seen[0][0] == "/v1/chat/completions" and endpoint.seen[0][1] is None


def test_failures_are_sentences(endpoint):
    asked = judge.Judge(endpoint.url, "m", waits_s=(0,))
    endpoint.answers = lambda prompt: (401, "no")
    with pytest.raises(ConnectionError, match="HTTP 401.*check the address"):
        asked.ask("x")
    assert len(endpoint.seen) == 1, "a wrong key is not tried again"
    endpoint.answers = lambda prompt: (500, "no")
    with pytest.raises(ConnectionError, match="failed 2 times .HTTP 500"):
        asked.ask("x")
    for reply in ("<html>", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}'):
        endpoint.answers = lambda prompt, reply=reply: (200, reply)
        with pytest.raises(ValueError, match="something else than a chat completion"):
            asked.ask("x")
    endpoint.answers = lambda prompt: "none of them"
    with pytest.raises(ValueError, match="where a list of numbers was asked for"):
        asked.detect("x", ["a"])
    with pytest.raises(ConnectionError, match="failed 2 times"):
        judge.Judge("http://127.0.0.1:9", "m", waits_s=(0,)).ask("x")
    with pytest.raises(ValueError, match="must start with http"):
        judge.Judge("ftp://x", "m")


def test_one_bad_answer_costs_one_row(endpoint, capsys):
    text, codes = planted()
    asked = judge.Judge(endpoint.url, "m", waits_s=())
    endpoint.answers = clever
    whole = judge.judged(asked, codes, text, [0, 1, 2])
    assert capsys.readouterr().err == ""
    for number, reply in ((4, "all of them, I think"), (3, (200, "<html>"))):  # to the second feature's two questions
        replies = iter(range(1, 7))
        endpoint.answers = lambda prompt, reply=reply, number=number, replies=replies: \
            reply if next(replies) == number else clever(prompt)
        found = judge.judged(asked, codes, text, [0, 1, 2])
        assert found["judge_explanation"].tolist() == ["the letter a", "the letter b" if number == 4 else "",
                                                       whole["judge_explanation"][2]]
        assert np.isnan(found["judge_detection"][1]) and found.drop(1).equals(whole.drop(1))
        said = capsys.readouterr().err
        assert said.startswith("1 of the judge's answers could not be read") and said.count("\n") == 1


def test_a_judge_that_fails_for_good_keeps_what_was_judged(endpoint, capsys):
    text, codes = planted()
    replies = iter(range(1, 9))
    endpoint.answers = lambda prompt: clever(prompt) if next(replies) <= 2 else (402, "pay")
    found = judge.judged(judge.Judge(endpoint.url, "m", waits_s=()), codes, text, [0, 1, 2])
    assert found["feature"].tolist() == [0, 1, 2] and found["judge_detection"].isna().tolist() == [False, True, True]
    assert len(endpoint.seen) == 3, "not asked again after it failed"
    assert re.match("no more was asked from feature 1 on: the judge at .*HTTP 402", capsys.readouterr().err)
    with pytest.raises(ConnectionError, match="HTTP 402"):  # nothing to keep
        judge.judged(judge.Judge(endpoint.url, "m", waits_s=()), codes, text, [0, 1, 2])
    with pytest.raises(UnicodeEncodeError):  # a mistake of ours is no bad answer
        judge.judged(judge.Judge(endpoint.url, "m", "k\u20acy", waits_s=()), codes, text, [0, 1, 2])


def test_broken_http_is_a_sentence(endpoint):
    endpoint.length = 1000  # more than is sent
    endpoint.answers = lambda prompt: "short"
    with pytest.raises(ConnectionError, match="failed 2 times .IncompleteRead.*check the address"):
        judge.Judge(endpoint.url, "m", waits_s=(0,)).ask("x")
    assert len(endpoint.seen) == 2
    for url in ("http://127.0.0.1:port/v1", "http://127.0.0.1:9/v 1"):
        with pytest.raises(ConnectionError, match=r"failed \(.*check the address"):
            judge.Judge(url, "m", waits_s=(9,)).ask("x")


def test_a_slow_server_is_given_up(endpoint):
    waiting = threading.Event()
    endpoint.answers = lambda prompt: waiting.wait(2) or "late"
    with pytest.raises(ConnectionError, match="timed out"):
        judge.Judge(endpoint.url, "m", timeout_s=0.1, waits_s=()).ask("x")
    waiting.set()
