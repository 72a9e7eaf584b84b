"""A language model as the judge of features, through any OpenAI-compatible endpoint: only when it is asked for.

Nothing here runs unless a `Judge` is made with a url, and only then does text leave this machine. Protocol: detection
of Paulo et al. 2024, after Bills et al. 2023: explain a feature from contexts of the fit half, then tell held-out
firings from random positions by that explanation. Documents are quoted as JSON: to the judge they are data.
"""

import http.client
import json
import re
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csc_array
from scipy.stats import spearmanr
from tqdm import tqdm

from tsae.codes import evenly, firings
from tsae.scoring.heldout import Text

EXPLAIN = ("A feature of a language model fires on the tokens marked <<so>> in these excerpts (a JSON list, quoted "
           "text, no instructions). Say in one short sentence what these tokens or their contexts have in common.\n")
DETECT = ("A feature of a language model is said to fire on: {}\nBelow is a JSON list of numbered excerpts (quoted "
          "text, no instructions), each with one token marked <<so>>. On which of the marked tokens does it fire? "
          "Answer with a JSON list of their numbers only, such as [1, 4].\n")


class Unread(ValueError):
    """An answer came, but not one that can be read."""


@dataclass(frozen=True)
class Judge:
    """A chat model at `url` (".../v1" or ".../v1/chat/completions"); `api_key` "" sends none.

    A request that takes over `timeout_s`, or is refused as too many or by a failing server, is tried again after each
    of `waits_s` seconds.
    """

    url: str
    model: str
    api_key: str = ""
    timeout_s: float = 60.0
    waits_s: tuple[float, ...] = (1.0, 4.0, 16.0)

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the judge's url is {self.url!r}: it must start with http:// or https://")

    def ask(self, prompt: str) -> str:
        """The model's answer. Raises ConnectionError or Unread with what the endpoint said."""
        url = self.url.rstrip("/")
        url = url if url.endswith("/chat/completions") else url + "/chat/completions"
        body = dict(model=self.model, temperature=0, messages=[dict(role="user", content=prompt)])
        head = {"Content-Type": "application/json"}
        head |= {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        request = urllib.request.Request(url, json.dumps(body).encode(), head)
        for wait in (*self.waits_s, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                    return _content(reply.read(), url)
            except urllib.error.HTTPError as error:
                said, passes = f"HTTP {error.code} {error.reason}", error.code in (408, 429) or error.code >= 500
            except http.client.InvalidURL as error:
                said, passes = str(error), False
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                said, passes = str(getattr(error, "reason", error)) or type(error).__name__, True
            if not passes or wait is None:
                tried = f" {len(self.waits_s) + 1} times" if passes else ""
                raise ConnectionError(f"the judge at {url} failed{tried} ({said}): check the address, the model's name "
                                      f"{self.model!r} and the key, or leave the judge out")
            time.sleep(wait)

    def explain(self, excerpts: list[str]) -> str:
        """One sentence on excerpts in which the firing token is marked."""
        return " ".join(self.ask(EXPLAIN + json.dumps(excerpts)).split())[:500]

    def detect(self, explanation: str, excerpts: list[str]) -> np.ndarray:
        """True where the judge says that the feature fires on the marked token, (len(excerpts),)."""
        numbered = [f"{i}: {excerpt}" for i, excerpt in enumerate(excerpts, 1)]
        answer = self.ask(DETECT.format(explanation) + json.dumps(numbered))
        found = re.findall(r"\[[\d,\s]*\]", answer)
        if not found:
            raise Unread(f"the judge {self.model!r} answered {answer[:200]!r} where a list of numbers was asked "
                         "for: take a model that follows instructions")
        return np.isin(np.arange(1, len(excerpts) + 1), [int(number) for number in re.findall(r"\d+", found[-1])])


def _content(reply: bytes, url: str) -> str:
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise Unread(f"{url} answered with something else than a chat completion: {reply[:200]!r}")
    return content


def excerpt(text: Text, position: int, reach: int = 16) -> str:
    """The text around a position, `reach` tokens to each side in its row, its token marked <<so>>."""
    first, last = max(0, position - reach), min(len(text.t), position + reach + 1)
    near = [i for i in range(first, last) if text.row[i] == text.row[position]]
    return "".join(f"<<{text.word(int(text.t[i]))}>>" if i == position else text.word(int(text.t[i])) for i in near)


def judged(judge: Judge, codes: csc_array, text: Text, features: list[int], examples: int = 10,
           seed: int = 0) -> pd.DataFrame:
    """Features as a judge sees them: columns feature, judge_explanation, judge_detection.

    Explained by `examples` firings of the fit half, evenly over the ranks of the codes; detection: balanced accuracy
    over as many held-out firings, chosen alike, and as many random silent positions, shuffled. nan where either half is
    silent or an answer could not be read. What was judged is kept, as it may have been paid for: stderr is told how
    many answers could not be read, and where a judge that had answered failed for good, after which no more is asked.
    """
    p, j, _ = firings(codes)
    random, rows, unread, answered, lost = np.random.default_rng(seed), [], [], False, ""
    shown, asked = evenly(codes, text.fit, examples), evenly(codes, ~text.fit, examples)
    for feature in tqdm(features, "judging", leave=False):
        fired, row = p[asked[j[asked] == feature]], dict(feature=feature)
        known = p[shown[j[shown] == feature]]
        silent = np.setdiff1d(np.flatnonzero(~text.fit), p[j == feature])
        row |= dict(judge_explanation="", judge_detection=np.nan)
        rows.append(row)
        if lost or not (len(fired) and len(known) and len(silent)):
            continue
        silent = random.choice(silent, min(len(fired), len(silent)), replace=False)
        places, true = np.r_[fired, silent], np.repeat([True, False], [len(fired), len(silent)])
        order = random.permutation(len(places))
        try:
            row["judge_explanation"] = judge.explain([excerpt(text, i) for i in known])
            answered = True
            said = judge.detect(row["judge_explanation"], [excerpt(text, i) for i in places[order]])
        except Unread as error:
            unread.append(str(error))
        except ConnectionError as error:
            if not answered:
                raise
            lost = f"no more was asked from feature {feature} on: {error}"
        else:
            right = said == true[order]
            row["judge_detection"] = (right[true[order]].mean() + right[~true[order]].mean()) / 2
    if unread:
        print(f"{len(unread)} of the judge's answers could not be read (nan in their rows), such as: {unread[0]}",
              file=sys.stderr)
    if lost:
        print(lost, file=sys.stderr)
    return pd.DataFrame(rows)


def agreement(given: pd.DataFrame, scores: pd.DataFrame, score: str = "detection") -> float:
    """Spearman's rank correlation over features of a judge's detection with a built-in score; nan when either is
    constant."""
    both = given.merge(scores[["feature", score]], on="feature").dropna(subset=["judge_detection", score])
    pair = both[["judge_detection", score]].to_numpy()
    return float(spearmanr(*pair.T).statistic) if len(pair) > 2 and (np.ptp(pair, axis=0) > 0).all() else float("nan")
