"""The feature browser: every number against a naive loop, every text as text, and the pages in a real browser."""

import itertools
import json
import re
import time
import urllib.request
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from tsae import features
from tsae.baseline import Affine, Context, Grams, Needs
from tsae.browser import gather as shows
from tsae.browser import pages as browser
from tsae.sae import SAE

HOSTILE = ["<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>",
           "</script><script>window.hacked=1</script>", "<!--<script>", "\u2028\u2029", '"};window.hacked=1;//', "\\",
           "\u202egnp.exe", "\x00\x1b", "\n\t\r", "${window.hacked=1}"]
WORDS = ["<|bos|>", *HOSTILE, " the", " Return", "need le", "a&amp;b", *(f" w{i}" for i in range(14))]


def an_sae(activation: str, lookup: str, seed: int = 0, n: int = 40) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(8, n, activation, k=3, vocabulary=len(WORDS), lookup=lookup, scale=2.0)
    sae.start(torch.zeros(8), torch.randn(len(WORDS), 8), seed=seed)
    with torch.no_grad():
        sae.b_enc[:3] = -100  # three dead features
        if activation == "jumprelu":
            sae.log_threshold.fill_(-1.0)
    return sae.eval()


def a_text() -> browser.Material:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, len(WORDS), (12, 20), generator=generator, dtype=torch.int32)
    rows[:, 0] = 0
    keep = rows != 0
    x, unigrams, unembedding = (torch.randn(size, 8, generator=generator) * 3
                                for size in (int(keep.sum()), len(WORDS), len(WORDS)))
    return browser.Material(x, rows[keep], rows, features.where(keep), WORDS, unigrams, unembedding)


@pytest.fixture(params=[("topk", "none"), ("topk", "learned"), ("relu", "learned"), ("gated", "none"),
                        ("jumprelu", "learned")], ids="-".join)
def shown(request):
    text, sae = a_text(), an_sae(*request.param)
    with torch.no_grad():
        codes = sae.encode(text.x, text.t).numpy()
    return text, sae, codes, browser.gather(sae, "it", text, contexts_each=4)


def live(codes):
    return np.flatnonzero((codes > 0).any(0))


def test_histograms_count_the_firings(shown):
    _, _, codes, pages = shown
    assert pages.scores["feature"].tolist() == live(codes).tolist() and len(pages.features) == len(live(codes)) <= 37
    for feature, found in zip(live(codes), pages.features):
        fired = codes[:, feature][codes[:, feature] > 0]
        assert found["histogram"] == np.histogram(fired, shows.BINS, (0, fired.max()))[0].tolist()
        assert sum(found["histogram"]) == len(fired) and found["peak"] == pytest.approx(fired.max(), rel=1e-3)
    assert pages.scores["frequency"].to_numpy() == pytest.approx((codes > 0).mean(0)[live(codes)])
    assert pages.scores["peak_code"].to_numpy() == pytest.approx(codes.max(0)[live(codes)])


def test_contexts_hold_the_codes_of_their_rows(shown):
    text, _, codes, pages = shown
    grid = np.zeros((*text.rows.shape, codes.shape[1]))
    grid[tuple(text.places.T)] = codes
    for feature, found in zip(live(codes), pages.features):
        of_feature = grid[:, :, feature]
        for row, column, columns, values in itertools.chain(*found["contexts"].values()):
            assert columns == np.flatnonzero(of_feature[row]).tolist() and column in columns
            assert values == pytest.approx(of_feature[row, columns], rel=1e-3)
        top = sorted((row for row in range(12) if of_feature[row].any()), key=lambda row: -of_feature[row].max())[:4]
        assert [context[:2] for context in found["contexts"]["top"]] == [(row, of_feature[row].argmax()) for row in top]
        ranked = sorted(((-code, place) for place, code in np.ndenumerate(of_feature) if code > 0))
        centre = (len(ranked) - 1) / 2
        far = {place: abs(rank - centre) for rank, (_, place) in enumerate(ranked)}
        best = sorted(min(far[place] for place in far if place[0] == row) for row in {row for row, _ in far})[:4]
        assert sorted(far[row, column] for row, column, *_ in found["contexts"]["middle"]) == best
        chosen = [row for row, *_ in found["contexts"]["random"]]
        assert len(chosen) == len(set(chosen)) == min(4, len(set(row for row, _ in far)))


def test_random_contexts_are_drawn_from_all_firings_by_the_seed():
    text, sae = a_text(), an_sae("relu", "none")
    drawn = [[[context[:2] for context in found["contexts"]["random"]] for found in
              browser.gather(sae, "it", text, contexts_each=2, seed=seed).features] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_tokens_of_features_and_features_of_tokens(shown):
    text, sae, codes, pages = shown
    t = text.t.numpy()
    for feature, found in zip(live(codes), pages.features):
        mass = np.bincount(t, codes[:, feature], len(WORDS))
        expected = np.sort(mass)[::-1][:min(shows.LISTED, (mass > 0).sum())] / mass.sum()
        assert [share for _, share in found["tokens"]] == pytest.approx(expected, rel=1e-3)
        assert all(share == pytest.approx(mass[token] / mass.sum(), rel=1e-3) for token, share in found["tokens"])
    assert set(pages.tokens) == set(t.tolist())
    for token, found in pages.tokens.items():
        there = codes[t == token]
        assert found["l0"] == pytest.approx((there > 0).sum(1).mean(), rel=1e-3)
        order = np.sort(there.sum(0))[::-1]
        assert [share * code * len(there) for _, share, code in found["features"]] == pytest.approx(
            order[order > 0][:shows.LISTED], rel=3e-3)
        for feature, share, code in found["features"]:
            fired = there[:, feature] > 0
            assert (share, code) == pytest.approx((fired.mean(), there[fired, feature].mean()), rel=1e-3)
        assert ("row" in found) == (sae.lookup != "none")


def cosines(a, b):
    a, b = (np.asarray(part, float) / np.linalg.norm(part, axis=1, keepdims=True) for part in (a, b))
    return a @ b.T


def test_nearest_and_promoted_by_brute_force(shown):
    text, sae, codes, pages = shown
    W, U = sae.W_dec.detach().numpy()[live(codes)], text.unembedding.numpy()
    logits = W @ (U - U.mean(0)).T * sae.scale
    unigrams = cosines(W, text.unigrams.numpy() - text.unigrams.numpy().mean(0))
    for i, found in enumerate(pages.features):
        for name, table, top in (("promoted", logits, 8), ("suppressed", -logits, 8), ("unigrams", unigrams, 6)):
            assert [token for token, _ in found[name]] == np.argsort(-table[i])[:top].tolist()
            assert [abs(value) for _, value in found[name]] == pytest.approx(np.abs(np.sort(-table[i])[:top]), rel=1e-3)
        assert ("rows" in found) == (sae.lookup != "none")
    written = dict(browser.data(text, [pages, pages], "t", {}, {}))
    near = np.where(np.eye(len(W), dtype=bool), -9, cosines(W, W))
    for i, found in enumerate(written["s0f0"]):
        assert [feature for feature, _ in found["near"][0]] == live(codes)[np.argsort(-near[i])[:6]].tolist()
    if sae.lookup != "none":
        ids = sorted(pages.tokens)
        rows = sae.W_lookup.detach().numpy()[ids]
        near = np.where(np.eye(len(ids), dtype=bool), -9, cosines(rows - rows.mean(0), rows - rows.mean(0)))
        norm = np.linalg.norm(rows, axis=1) * sae.scale
        for i, token in enumerate(ids):
            size, rank, nearest = pages.tokens[token]["row"]
            assert (size, rank) == pytest.approx((norm[i], (norm < norm[i]).sum() / (len(ids) - 1)), rel=1e-3)
            assert [other for other, _ in nearest] == [ids[j] for j in np.argsort(-near[i])[:6]]


def test_an_sae_with_ngrams_or_an_earlier_layer_is_shown_too():
    """Codes are those of its contexts; token rows are shown where it has some."""
    text = a_text()
    ids = Needs(2).context(text.rows, {}).ids[text.rows != 0]
    for known in (Grams(8, len(WORDS), [4]), Affine(8, 1, 8, 2.0)):
        sae = SAE(8, 40, k=3, scale=2.0, encoder_sees="rest", baseline=known).start(torch.zeros(8), seed=0)
        with torch.no_grad():
            for p in known.parameters():
                p.normal_(generator=torch.Generator().manual_seed(4))
            known_text = replace(text, t=Context(ids, {1: text.x + 1}))
            codes = sae.encode(text.x, known_text.t).numpy()
        pages = browser.gather(sae.requires_grad_(False), "it", known_text, contexts_each=4)
        assert pages.scores["feature"].tolist() == live(codes).tolist()
        assert pages.scores["peak_code"].to_numpy() == pytest.approx(codes.max(0)[live(codes)], rel=1e-4)
        assert all(("row" in token) == (sae.lookup == "grams") for token in pages.tokens.values())


def test_short_keeps_four_digits():
    values = np.array([0, 1, -2.34567, 123456.7, 1.23456e-7, np.inf])
    assert shows.short(values).tolist() == [0, 1, -2.346, 123457, 1.235e-7, np.inf]
    assert np.isnan(shows.short(np.nan))


def test_scores_of_any_kind():
    text, sae = a_text(), an_sae("topk", "none")
    scores = pd.DataFrame(dict(feature=[5, 6, 999], purity=[0.5, np.nan, 1], modal_token=[3, 4, 5],
                               kind=["a<b", None, "c"], frequency=[9.0, 8.0, 7.0], whole=[1, 2, 3]))
    pages = browser.gather(sae, "it", text, scores)
    assert list(pages.scores) == ["feature", "frequency", "peak_code", "mean_code", "purity", "modal_token", "kind",
                                  "whole"]
    written = dict(browser.data(text, [pages], "t", {}, {}))
    assert written["about"]["saes"][0]["columns"] == dict.fromkeys(list(pages.scores)[1:], "number") | dict(
        modal_token="token", kind="text")
    columns, row = written["s0"]["columns"], written["s0"]["feature"].index(5)
    assert 999 not in written["s0"]["feature"]
    assert [columns[name][row] for name in ("purity", "modal_token", "kind", "frequency")] == [0.5, 3, "a<b", 9.0]
    assert columns["purity"][row + 1] is None and columns["kind"][row + 1] == "" and columns["purity"][0] is None
    with pytest.raises(ValueError, match='column "feature"'):
        browser.gather(sae, "it", text, scores.drop(columns="feature"))
    with pytest.raises(ValueError, match="names every feature once"):
        browser.gather(sae, "it", text, pd.concat([scores, scores]))


def test_what_does_not_belong_together_is_refused():
    text, sae = a_text(), an_sae("topk", "none")
    parts = dict(x=text.x, t=text.t, rows=text.rows, places=text.places, strings=text.strings, unigrams=text.unigrams)
    backwards = dict(x=text.x.flip(0), t=text.t.flip(0), places=text.places[::-1])
    for change, sentence in ((dict(t=text.t.flip(0)), "do not belong together"),
                             (dict(x=text.x[1:]), "do not belong together"), (backwards, "not in reading order"),
                             (dict(strings=WORDS[:5]), "there are strings for 5"),
                             (dict(unigrams=text.unigrams[1:]), f"unigrams has {len(WORDS) - 1} rows"),
                             (dict(strings=[*WORDS, "more"]), f"strings for {len(WORDS) + 1} tokens")):
        with pytest.raises(ValueError, match=sentence):
            browser.Material(**parts | change)
    with pytest.raises(ValueError, match="the table of 'another' has"):
        browser.gather(SAE(8, 4, k=2, vocabulary=3, lookup="learned"), "another", text)
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    with pytest.raises(ValueError, match="no feature of 'silent' fires"):
        browser.gather(sae, "silent", text)
    pages = browser.gather(an_sae("topk", "none"), "it", text)
    pages.tokens.popitem()
    with pytest.raises(ValueError, match="another text"):
        dict(browser.data(text, [pages], "t", {}, {}))


def test_json_may_stand_in_a_script():
    for value in (HOSTILE, {"</script>": "<!--"}, "\ud800", "\u2028"):
        written = browser.script_json(value)
        assert "<" not in written and written.isascii() and json.loads(written) == value
    with pytest.raises(ValueError):
        browser.script_json(float("nan"))


@pytest.fixture
def pages():
    text = a_text()
    return text, [browser.gather(an_sae("topk", lookup, seed), name, text) for seed, (lookup, name) in
                  enumerate((("none", "plain <i>"), ("learned", "with table")))]


def test_a_folder_is_replaced_whole_or_not_at_all(pages, tmp_path, monkeypatch):
    folder = tmp_path / "browser"
    folder.mkdir()  # an empty folder may be used
    index = browser.write(folder, *pages, "First")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert index == folder / "index.html" and "<title>First</title>" in index.read_text()
    assert folder.stat().st_mode & 0o777 == 0o755

    def breaks(*given):
        yield from itertools.islice(whole(*given), 4)
        raise OSError("the disk is full")

    whole = browser.data
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        patch.setattr(browser, "data", breaks)
        browser.write(folder, *pages, "Second")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / "data" / "of-old.js").write_text("")
    browser.write(folder, *pages, "Third")
    assert "<title>Third</title>" in index.read_text() and not (folder / "data" / "of-old.js").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["browser"]


def test_what_is_no_browser_is_left_alone(pages, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text("<title>mine</title>")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("folder", "file", "link"):
        with pytest.raises(ValueError, match="no feature browser"):
            browser.write(tmp_path / name, *pages)
    assert (tmp_path / "folder" / "index.html").read_text() == "<title>mine</title>"
    assert (tmp_path / "file").read_text() == "mine"


HEADING = "(document.querySelector('#feature h2')?.textContent ?? '')"
FEATURES = "[...document.querySelectorAll('#scroll tbody a.id')].map(a => Number(a.textContent))"


@pytest.fixture(params=["folder", "one file"])
def address(pages, tmp_path, request):
    given = (*pages, "<i>Title</i></title><script>window.hacked=1</script>",
             {"<b>fact</b>": "</script><img src=x onerror=window.hacked=1>"}, {"frequency": "<script>"})
    write, name = (browser.write, "a browser") if request.param == "folder" else (browser.write_one, "all of it.html")
    return write(tmp_path / name, *given).as_uri()


@pytest.mark.usefixtures("chromium")
def test_search_sort_and_keys(chromium, pages, address):
    table = pages[1][0].scores.set_index("feature")
    chromium.open(address)
    assert chromium.run(FEATURES)[:5] == table.index[:5].tolist()
    chromium.run("[...document.querySelectorAll('th button')].find(b => b.textContent === 'frequency').click()")
    best = table["frequency"].sort_values(ascending=False, kind="stable").index.tolist()
    assert chromium.run(FEATURES)[:10] == best[:10]
    assert chromium.run("document.querySelector('th[aria-sort]').ariaSort") == "descending"
    chromium.run("document.querySelector('th[aria-sort] button').click()")
    assert chromium.run(FEATURES)[:10] == table["frequency"].sort_values(kind="stable").index.tolist()[:10]
    chromium.run("document.querySelector('th[aria-sort] button').click()")

    chromium.press("/")
    chromium.until("document.activeElement.id === 'search'")
    chromium.type("frequency>0.08 peak_code<=6")
    expected = [feature for feature in best if table["frequency"][feature] > 0.08 and table["peak_code"][feature] <= 6]
    assert chromium.run(FEATURES) == expected and 0 < len(expected) < len(best)
    assert chromium.run("document.getElementById('count').textContent") == f"{len(expected)} of {len(best)} features"
    assert "frequency" in chromium.run("location.hash")
    chromium.press("ArrowDown")
    chromium.press("j")
    chromium.press("j")
    chromium.press("k")
    assert chromium.run("document.activeElement.textContent") == str(expected[1])
    chromium.press("Enter")
    chromium.until(f"{HEADING}.startsWith('Feature {expected[1]}')")
    assert chromium.run("location.hash") == f"#sae=0&feature={expected[1]}"
    chromium.press("j")
    chromium.until(f"{HEADING}.startsWith('Feature {expected[2]}')")
    chromium.press("Escape")
    chromium.until("!document.getElementById('list').hidden && document.activeElement.matches('a.id')")
    assert chromium.run(FEATURES) == expected and chromium.run("document.activeElement.textContent") == str(expected[2])
    for selector, feature in (("a.id", 3), ("td:nth-child(3)", 4)):  # by mouse, on a link and elsewhere in a row
        chromium.click(f"#scroll tbody tr:nth-child({feature}) {selector}")
        chromium.until(f"{HEADING}.startsWith('Feature {expected[feature - 1]}')")
        chromium.run("history.back()")
        chromium.until("!document.getElementById('list').hidden")
        assert chromium.run(FEATURES) == expected

    def search(query):
        chromium.run(f"location.hash = new URLSearchParams({{sae: 0, q: {json.dumps(query)}}})")
        chromium.until(f"document.getElementById('search').value === {json.dumps(query)}")
        return chromium.run(FEATURES)

    def holding(name, word):
        return [feature for feature, found in zip(table.index, pages[1][0].features)
                if word in {WORDS[token] for token, _ in found[name]}]

    assert search("fires:THE") == holding("tokens", " the") != search("promotes:the") == holding("promoted", " the")
    assert search('fires:"need le"') == holding("tokens", "need le")
    assert search("nosuch>1") == [] and "no score nosuch" in chromium.run("document.getElementById('none').textContent")
    chromium.run("document.querySelector('#ranges input[aria-label=\"frequency at least\"]').value = '0.1';"
                 "document.querySelector('#ranges input[aria-label=\"frequency at least\"]').onchange"
                 "({target: document.querySelector('#ranges input[aria-label=\"frequency at least\"]')})")
    assert chromium.run("document.getElementById('search').value") == "nosuch>1 frequency>=0.1"
    assert chromium.trouble() == []


def test_a_list_opens_with_the_features_worth_reading(chromium, pages, tmp_path):
    """By a search and a sort; the first eight columns, and the rest by a button; comparisons may have blanks."""
    text, (one, *others) = pages
    named = {f"score_{i}": np.arange(len(one.scores)) % (i + 3) for i in range(9)}
    first = replace(one, scores=one.scores.assign(**named))
    index = browser.write(tmp_path / "b", text, [first, *others], start=dict(q="score_8>=4", sort="-score_7"))
    chromium.open(index.as_uri())
    table = first.scores[first.scores["score_8"] >= 4].sort_values("score_7", ascending=False, kind="stable")
    assert chromium.run(FEATURES) == table["feature"].tolist()
    assert chromium.run("document.getElementById('search').value") == "score_8>=4"
    headings = "[...document.querySelectorAll('#scroll th')].map(h => h.textContent)"
    few = chromium.run(headings)
    assert "score_0" in few and "score_7" in few and "score_6" not in few, "eight columns, and the one that sorts"
    chromium.click("#more")
    assert "score_6" in chromium.run(headings)
    assert chromium.run("document.getElementById('more').textContent") == "Fewer columns"
    chromium.run("location.hash = 'sae=0&q=score_8 > 3  frequency >=0.01&sort='")
    chromium.until("document.getElementById('search').value.includes('frequency')")
    wanted = first.scores[(first.scores["score_8"] > 3) & (first.scores["frequency"] >= 0.01)]["feature"].tolist()
    chromium.until(f"JSON.stringify({FEATURES}) === '{json.dumps(wanted, separators=(',', ':'))}'")
    chromium.run("document.activeElement.blur()")
    chromium.press("r")
    chromium.until(f"{HEADING}.startsWith('Feature ')")
    assert int(re.search(r"\d+", chromium.run(HEADING))[0]) in wanted, "a random feature of the list"


def test_stars_and_notes_are_kept_and_exported(chromium, address):
    chromium.open(address)
    chromium.run("localStorage.clear(); location.hash = 'sae=0&feature=7'")
    chromium.until(f"{HEADING}.startsWith('Feature 7')")
    chromium.press("s")
    assert chromium.run("document.querySelector('.star').textContent") == "★"
    chromium.click("textarea")
    chromium.type('r: "so, it is"')
    chromium.run("document.querySelector('textarea').blur()")
    chromium.call("Page.reload")
    chromium.until(f"document.readyState === 'complete' && {HEADING}.startsWith('Feature 7')")
    assert chromium.run("document.querySelector('textarea').value") == 'r: "so, it is"', "letters typed are no commands"
    assert chromium.run("document.querySelector('.star').textContent") == "★"
    chromium.press("Escape")
    chromium.until("!document.getElementById('export').hidden")
    chromium.run("URL.createObjectURL = file => (window.caught = file, 'blob:null/x')")
    chromium.click("#export")
    lines = chromium.run("caught.text()").splitlines()
    assert lines[0] == "sae,feature,star,note" and lines[1].endswith(',"7","true","r: ""so, it is"""')
    chromium.run("localStorage.clear()")


def test_a_phone_and_paper(chromium, address):
    """Nothing is wider than 390 px; on paper all of a page is there, with its highlights."""
    try:
        chromium.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        for view, ready in (("", "document.querySelector('tr.at')"), ("#sae=0&feature=7", f"{HEADING}.startsWith('Feature 7')"),
                            ("#token=4", "document.querySelector('#answer .sides')")):
            chromium.open(address + view, ready)
            assert chromium.run("document.documentElement.scrollWidth") <= 390, view
        chromium.call("Emulation.clearDeviceMetricsOverride")
        chromium.open(address + "#sae=0&feature=7", f"{HEADING}.startsWith('Feature 7')")
        chromium.call("Emulation.setEmulatedMedia", media="print")
        style = "getComputedStyle(document.getElementById('feature'))"
        assert chromium.run(f"[{style}.overflow, {style}.printColorAdjust]") == ["visible", "exact"]
        assert chromium.run("document.documentElement.scrollHeight > innerHeight"), "the page is as long as what it holds"
    finally:
        chromium.call("Emulation.clearDeviceMetricsOverride")
        chromium.call("Emulation.setEmulatedMedia", media="")


def test_a_feature_and_its_hostile_text(chromium, pages, address):
    text, (_, shown) = pages
    chromium.open(address + "#sae=1&feature=7", "document.querySelector('#feature .contexts')")
    found = shown.features[shown.scores["feature"].tolist().index(7)]
    lines = chromium.run("[...document.querySelectorAll('#feature .contexts')].map(table => [...table.rows].map("
                         "row => row.querySelector('.focus').textContent))")
    visible = {i: word.replace("\n", "⏎").replace("\t", "→").replace("\r", "␍") for i, word in enumerate(WORDS)}
    assert lines == [[visible[int(text.rows[context[:2]])] for context in part]
                     for part in found["contexts"].values()][:len(lines)]
    chromium.run("document.querySelector('.contexts button').click()")
    row, _, columns, codes = found["contexts"]["top"][0]
    pieces = chromium.run("[...document.querySelector('tr.whole').querySelectorAll('i')].map("
                          "i => [i.textContent, parseFloat(i.style.getPropertyValue('--heat')) || 0])")
    assert [piece.replace("⏎\n", "⏎") for piece, _ in pieces] == [visible[token] for token in text.rows[row].tolist()]
    heat = {column: 12 + 88 * code / found["peak"] for column, code in zip(columns, codes)}
    assert [value for _, value in pieces] == pytest.approx([heat.get(i, 0) for i in range(len(pieces))])
    bars = chromium.run("[...document.querySelectorAll('#feature aside .box')].map(box => ["
                        "box.querySelector('h3').firstChild.data,"
                        "[...box.querySelectorAll('a')].map(a => a.textContent)])")
    assert dict(bars)["Fires on"] == [visible[token] for token, _ in found["tokens"]]
    assert dict(bars)["Promotes"] == [visible[token] for name in ("promoted", "suppressed") for token, _ in found[name]]
    label = chromium.run("document.querySelector('svg.histogram').getAttribute('aria-label')")
    assert label.endswith(f"; {', '.join(map(str, found['histogram']))} positions")
    title = "<i>Title</i></title><script>window.hacked=1</script>"
    assert chromium.run("document.querySelector('h1').textContent") == title
    token = WORDS.index("</script><script>window.hacked=1</script>")
    for hash, page in (("#sae=1&feature=7", "Feature 7, with table"), ("#sae=0", "plain <i>"), ("#sae=1", "with table"),
                       (f"#token={token}", f"Token {WORDS[token]}"), ("#token=", "Compare a token")):
        chromium.run(f"location.hash = {json.dumps(hash)}")
        chromium.until(f"document.title === {json.dumps(f'{page} - {title}')}")
    chromium.open(address + "#sae=1&feature=0", "document.querySelector('#feature .error')")
    assert "does not fire" in chromium.run("document.querySelector('.error').textContent")
    assert chromium.run("typeof window.hacked") == "undefined" and chromium.trouble() == []


def test_compare_a_token(chromium, pages, address):
    text, shown = pages
    chromium.open(address)
    chromium.run("[...document.querySelectorAll('nav a')].at(-1).click()")
    chromium.until("document.activeElement.id === 'pick'")
    chromium.type("<img")
    chromium.press("Enter")
    chromium.until("document.querySelector('#answer h2')")
    token = WORDS.index("<img src=x onerror=window.hacked=1>")
    assert chromium.run("location.hash") == f"#token={token}"
    assert chromium.run("document.querySelector('#answer h2 .chip').textContent") == WORDS[token]
    listed = chromium.run("[...document.querySelectorAll('.answers')].map("
                          "table => [...table.querySelectorAll('a.id')].map(a => Number(a.textContent)))")
    assert listed == [[feature for feature, *_ in page.tokens[token]["features"]] for page in shown]
    facts = chromium.run("[...document.querySelectorAll('.sides .facts')].map(facts => facts.textContent)")
    norm = float(facts[1].split("norm of its table row ")[1].split("above")[0])
    assert "no table" in facts[0] and norm == pytest.approx(shown[1].tokens[token]["row"][0], rel=6e-3)
    chromium.run("document.querySelector('.answers a.id').click()")
    chromium.until(f"{HEADING}.startsWith('Feature {listed[0][0]}')")
    assert chromium.run("typeof window.hacked") == "undefined" and chromium.trouble() == []


def test_the_policy_stops_scripts_and_the_network(chromium, address):
    chromium.open(address)
    chromium.run("window.refused = [];"
                 "document.addEventListener('securitypolicyviolation', of => refused.push(of.effectiveDirective));"
                 "document.body.insertAdjacentHTML('beforeend', '<p onclick=window.hacked=1></p>');"
                 "document.body.lastChild.click();"
                 "for (const [tag, props] of [['script', {textContent: 'window.hacked=1'}],"
                 "['script', {src: 'https://example.org/a.js'}], ['img', {src: 'https://example.org/a.png'}],"
                 "['iframe', {src: 'https://example.org'}]])"
                 "document.body.append(Object.assign(document.createElement(tag), props));"
                 "fetch('https://example.org').catch(() => 0); 1")
    chromium.until("refused.length >= 6")
    assert set(chromium.run("refused")) == {"script-src-attr", "script-src-elem", "img-src", "frame-src", "connect-src"}
    assert chromium.run("typeof window.hacked") == "undefined"


def test_one_file_works_in_the_sandboxed_frame_of_jupyterlab(chromium, pages, tmp_path):
    page = browser.write_one(tmp_path / "all.html", *pages).read_text()
    page = page.replace("<head>", "<head><base href='http://127.0.0.1:9/files/all.html'>", 1)  # as its viewer does
    (tmp_path / "viewer.html").write_text("<body></body>")
    chromium.open((tmp_path / "viewer.html").as_uri(), "true")
    chromium.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
    chromium.run("document.body.append(Object.assign(document.createElement('iframe'), {sandbox: 'allow-scripts',"
                 f"src: URL.createObjectURL(new Blob([{json.dumps(page)}], {{type: 'text/html'}}))}}))")
    for _ in range(100):
        chromium.run("1")
        found = [event["params"] for event in chromium.events if event["method"] == "Target.attachedToTarget"]
        if found:
            break
        time.sleep(0.05)
    chromium.frame = dict(sessionId=found[-1]["sessionId"])
    try:
        chromium.until("document.querySelector('tr.at')")
        assert chromium.run("origin") == "null" and chromium.run("document.baseURI").startswith("http:")
        for selector, view in (("tr.at a.id", "feature"), ("aside a.chip", "token"), ("nav a", "list")):
            chromium.run(f"document.querySelector({json.dumps(selector)}).click()")
            chromium.until(f"!document.getElementById('{view}').hidden")
        chromium.run("document.querySelectorAll('th button')[1].click()")
        best = pages[1][0].scores.sort_values("frequency", ascending=False, kind="stable")["feature"].tolist()
        assert chromium.run(FEATURES)[:9] == best[:9]
    finally:
        chromium.frame = {}
        chromium.call("Target.setAutoAttach", autoAttach=False, waitForDebuggerOnStart=False)


def test_twelve_thousand_features(chromium, tmp_path):
    n, random = 12288, np.random.default_rng(0)
    text = a_text()
    text.strings = WORDS + [f" {i:x}" for i in range(50257 - len(WORDS))]
    contexts = {kind: [(i, 3, [3, 5], [2.5, 1.25]) for i in range(8)] for kind in ("top", "middle", "random")}
    shown = [dict(peak=2.5, histogram=random.integers(1, 90, shows.BINS).tolist(), contexts=contexts,
                  tokens=[(token, 0.1) for token in tokens[:8]], promoted=[(token, 1.0) for token in tokens[8:]])
             for tokens in random.integers(len(text.strings), size=(n, 16)).tolist()]
    scores = pd.DataFrame(random.lognormal(size=(n, 8)), columns=[f"score_{i}" for i in range(8)])
    scores.insert(0, "feature", np.arange(n))
    tokens = {token: dict(features=[(5, 0.5, 1.5)], l0=3.0) for token in set(text.t.tolist())}
    pages = browser.Pages("many", n, scores, shown, tokens, torch.nn.functional.normalize(torch.randn(n, 8), dim=1))
    address = browser.write(tmp_path / "many", text, [pages]).as_uri()
    timed = ("(() => {{ const start = performance.now(); {}; document.body.offsetHeight;"
             "return performance.now() - start }})()")

    def once() -> dict[str, float]:
        """Milliseconds until the first row is drawn, and of each later step until the page is laid out."""
        chromium.open("about:blank", "true")
        watch = chromium.call("Page.addScriptToEvaluateOnNewDocument", source="(function look() {"
                              "if (document.querySelector('tr.at')) window.drawn = performance.now();"
                              "else requestAnimationFrame(look) })()")
        chromium.open(address, "window.drawn")
        chromium.call("Page.removeScriptToEvaluateOnNewDocument", identifier=watch["identifier"])
        took = dict(open=chromium.run("window.drawn"))
        took["sort"] = chromium.run(timed.format("document.querySelectorAll('th button')[3].click()"))
        assert chromium.run(FEATURES)[:9] == scores["score_2"].sort_values(ascending=False).index[:9].tolist()
        assert chromium.run("document.querySelectorAll('#scroll tbody tr').length") < 80
        took["search"] = chromium.run(timed.format(
            "const field = document.getElementById('search'); field.value = 'fires:ab score_1>0.5';"
            "field.dispatchEvent(new Event('input'))"))
        assert 0 < len(chromium.run(FEATURES)) < 80
        chromium.run("location.hash = '#sae=0'")
        chromium.until(f"document.getElementById('count').textContent === '{n:,} features'")
        chromium.press("End")
        assert chromium.run("document.activeElement.textContent") == str(n - 1)
        took["feature"] = chromium.run(
            "new Promise(done => { const start = performance.now(); location.hash = '#sae=0&feature=9999';"
            f"(function look() {{ {HEADING}.startsWith('Feature 9999')"
            "  ? done(performance.now() - start) : setTimeout(look) })() })")
        assert chromium.trouble() == []
        return took

    best = pd.DataFrame([once() for _ in range(3)]).min()  # of three: the machine may be busy
    print({name: f"{milliseconds:.0f} ms" for name, milliseconds in best.items()})
    assert (best < 1000).all(), best.to_dict()


def test_a_browser_is_served_where_a_lab_cannot_reach_it(tmp_path):
    (tmp_path / "index.html").write_text("features")
    address = browser.serve(tmp_path)
    assert address.startswith("http://127.0.0.1:")  # this machine only
    with urllib.request.urlopen(address) as page:
        assert page.read() == b"features"


def test_a_hash_that_is_set_while_a_list_is_drawn_is_followed(chromium, pages, address):
    """The list writes its own hash when it is drawn: not over one that came in between."""
    chromium.open(address + "#sae=0", "document.title.startsWith('plain')")
    for _ in range(10):
        chromium.run("document.querySelector('#search').value = 'the'; document.querySelector('#search').dispatchEvent("
                     "new Event('input')); location.hash = '#sae=1'")
        chromium.until("document.title.startsWith('with table')")
        chromium.run("location.hash = '#sae=0'")
        chromium.until("document.title.startsWith('plain')")


def test_a_list_is_printed_whole_and_a_single_hit_opens(chromium, pages, address):
    chromium.open(address + "#sae=1&q=&sort=", "document.title.startsWith('with table')")
    chromium.run("window.dispatchEvent(new Event('beforeprint'))")
    rows = "document.querySelectorAll('#scroll tbody tr:not(.space)').length"
    assert chromium.run(rows) == len(pages[1][1].scores)
    chromium.run("window.dispatchEvent(new Event('afterprint'))")
    chromium.run("document.querySelector('#search').value = 'feature=7'; document.querySelector('#search').dispatchEvent("
                 "new Event('input'))")
    chromium.until(f"{rows} === 1")
    chromium.run("document.querySelector('#search').focus()")
    chromium.run("document.querySelector('#search').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true}))")
    chromium.until("document.title.startsWith('Feature 7')")


def test_about_fits_a_phone(chromium, pages, address):
    chromium.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    try:
        chromium.open(address + "#sae=1", "document.title.startsWith('with table')")
        chromium.run("document.querySelector('#about').open = true")
        left, right = chromium.run("(({left, right}) => [left, right])(document.querySelector('#about dl')"
                                   ".getBoundingClientRect())")
        assert 0 <= left < right <= 390
    finally:
        chromium.call("Emulation.clearDeviceMetricsOverride")
