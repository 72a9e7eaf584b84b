"""Five kinds of feature planted in one stream, each expected where it belongs on every score, by closed forms.

A table of expected values, one a kind and score, is what the scores are held to; a last test makes sure that no two
kinds could change places unseen.
"""

from itertools import permutations
from math import exp, factorial, log2

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_network
from scipy.sparse import csc_array
from streams import BIGRAM, PLACE, SKIP, TOKEN, TOPIC, stream

from tsae.lm import LM
from tsae.sae import SAE
from tsae.scoring import dictionary, effects, heldout, scores

KINDS = {"one token": TOKEN, "a bigram": BIGRAM, "a skip-gram": SKIP, "a topic": TOPIC, "a position": PLACE}
WEIGHTINGS = ("peak", "drawn", "firing", "mass")
INERT, TWIN = 5, 6  # beside the five: a decoder row that the model cannot read, and a near-copy of the one token's
# The stream: ten letters, all equally likely; half of 320 rows of 63 is fitted on. Planted shares of positions:
RATES = {TOKEN: 1 / 10, BIGRAM: 1 / 100, SKIP: 1 / 100, TOPIC: 0.4 * 0.3, PLACE: 8 / 63}
JITTER = 0.2**2 / 12  # variance of the codes, uniform in 0.9 .. 1.1, which nothing predicts
PRIOR = 2  # of the ladder
SCALE = 2.0  # of the SAE
GAINS = {TOKEN: 1.0, BIGRAM: 1.2, SKIP: 1.4, TOPIC: 1.6, PLACE: 1.8}  # of the hand-made unembedding
PROMOTED, SUPPRESSED = "ABCDE", "VWXYZ"


def h(p: float) -> float:
    """Entropy of a coin in bits."""
    return -p * log2(p) - (1 - p) * log2(1 - p)


def poisson(mean: float, of) -> float:
    return sum(exp(-mean) * mean**k / factorial(k) * of(k) for k in range(60))


def hand_made_logs(kind: int, code: float) -> np.ndarray:
    """Log-probabilities (257,) of the hand-made model with one kind's code so, those of the others 1.

    Its stream is one unit of a direction that nothing reads and SCALE x code of each row; the final norm makes its
    length sqrt(16). The first five logits are those of the promoted tokens, then the suppressed, then all others.
    """
    codes = SCALE * np.where(np.arange(5) == kind, code, 1)
    read = 4 * codes / (1 + codes @ codes)**0.5 * np.array(list(GAINS.values()))
    logits = np.r_[read, -read, np.zeros(247)]
    return logits - np.log(np.exp(logits).sum())


def expected() -> dict[tuple[int, str], tuple]:
    """{(kind, score): (value, tolerance)}; tolerances leave room for the sample, or for rounding alone."""
    table = {}
    for kind, p in RATES.items():
        local, odd = kind in (TOKEN, BIGRAM, SKIP), p * (1 + JITTER) - p**2  # variance of the code
        enough = {TOKEN: 1, BIGRAM: 2, SKIP: 3}.get(kind, 9)  # tokens that tell all
        for n in range(1, 5):
            if n >= enough:
                # All but the jitter, (p - p^2) / var; the skip-gram's trigram is seen k ~ Poisson(10) times in the
                # fitted half and then predicts (k + 2 x 1/10) / (k + 2): what is short of 1 is lost, squared. A fourth
                # token, k ~ Poisson(1), leaves 2 / (k + 2) of that.
                short = poisson(10, lambda k: (PRIOR * 0.9 / (k + PRIOR))**2) if kind == SKIP else 0
                short *= poisson(1, lambda k: (PRIOR / (k + PRIOR))**2) if n == 4 else 1
                r2 = ((p - p**2) / odd - short, 0.02 if kind == SKIP else 0.002)
                auc = (1, 1e-3)
            elif local:
                # The last token alone: fires in 1/10 of its places, so 0.1 x 0.1^2 - p^2 of the variance. A firing
                # ties with the silent places of its token, 0.09 of 0.99, and is above all others.
                r2, auc = ((0.001 - p**2) / odd, 0.04), (1 - 0.09 / 0.99 / 2, 0.01)
            else:
                # Nothing is told; a suffix seen k times predicts with variance k / (k + 2)^2 of the code's, which is
                # all error. k ~ 1000, 100, 10, 1; each level also carries on 4 / (k + 2)^2 of the one before.
                lost = 0.0
                for k in (1008, 101, 10, 1)[:n]:
                    noise = poisson(k, lambda i: i / (i + PRIOR)**2) if k < 50 else 1 / k
                    carried = poisson(k, lambda i: (PRIOR / (i + PRIOR))**2) if k < 50 else 0
                    lost = noise + carried * lost
                r2, auc = (-lost, 0.03 + 0.02 * n), (0.5, 0.05)
            table |= {(kind, f"r2_{n}"): r2, (kind, f"auc_{n}"): auc}
            if n in (1, 3):
                table[kind, f"complexity_{n}"] = (min(1, 1 - r2[0]), r2[1])
        # I(firing; token) = h(p) - sum over tokens of P(token) h(P(firing | token)).
        bits = h(p) - {TOKEN: 0, BIGRAM: h(0.1) / 10, SKIP: h(0.1) / 10}.get(kind, h(p))
        for by in WEIGHTINGS:
            few = by in ("peak", "drawn")  # 20 firings
            # Ten equal tokens; 20 draws show exp(log 10 - 9 / (2 x 20)) of them (Miller and Madow).
            table[kind, f"tokens_{by}"] = (1, 1e-6) if local else (10 * exp(-9 / 40), 2.6) if few else (10, 0.1)
            table[kind, f"modal_share_{by}"] = (1, 1e-6) if local else (0.23, 0.12) if few else (0.1, 0.025)
            table[kind, f"bits_{by}"] = (bits, 0.15 * bits if local else 0.07 if few else 0.002)
            table[kind, f"told_{by}"] = (bits / h(p), 0.03 if local else 0.12 if few else 0.004)
        # A rule fits all but the topic, of which any rule is right in p of its places, however many it covers: recall r
        # can be anything, and F1 = 2 p r / (p + r) <= 2 p / (1 + p).
        chance = dict(detection=(0.5, 0.05), detection_mass=(0.5, 0.05), fuzzing=(0.5, 0.08), precision=(p, 0.03),
                      recall=(0.5, 0.499), rule_f1=(p / (1 + p), p / (1 + p) + 0.03))
        table |= {(kind, score): at if kind == TOPIC else (1, 1e-6) for score, at in chance.items()}
        table[kind, "frequency"] = (p, 0.2 * p)
        clean, ablated, boosted = (hand_made_logs(kind, code) for code in (1, 0, 2))
        for score, after in (("kl_ablate", ablated), ("kl_boost", boosted)):
            kl = float(np.exp(clean) @ (clean - after))
            table[kind, score] = (kl, 0.03 * kl)
        direct = np.zeros(257)
        direct[[kind, 5 + kind]] = 1, -1
        table[kind, "direct_agreement"] = (np.corrcoef(boosted - ablated, direct)[0, 1], 0.005)
        table[kind, "token_share"] = (float(kind == TOKEN), 0.01)
        table[kind, "nearest_cosine"] = (0.98 if kind == TOKEN else 0, 1e-4)
        table[kind, "split"] = ({TOKEN: 2, BIGRAM: 1, SKIP: 1}.get(kind, 0), 0)
    return table


EXPECTED = expected()
SAID = {TOKEN: "the token: 'a'", BIGRAM: "the last 2 tokens: 'bc'", PLACE: "the column: columns 16-23",
        SKIP: "the token and the second before: 'd' _ 'e'"}


@torch.no_grad()
def hand_made() -> tuple[LM, SAE, torch.Tensor]:
    """A model that adds nothing to its stream, an SAE for it, and unigrams that vary along the one token's row.

    Every position holds SCALE x the five kinds' rows, and one more direction. Row `kind` of the decoder is read by two
    tokens, +gain and -gain; the inert row is that of ones, which LayerNorm takes out.
    """
    network, tokenizer = tiny_network("gpt2"), byte_tokenizer()
    ones = torch.full((16, 1), 0.25)
    noise = torch.randn(16, 15, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(torch.cat([ones, noise], 1))[0].T[1:]
    for block in network.transformer.h:
        for last in (block.attn.c_proj, block.mlp.c_proj):
            last.weight.zero_()
            last.bias.zero_()
    network.transformer.wpe.weight.zero_()
    network.transformer.wte.weight.copy_(basis[14] + SCALE * basis[:5].sum(0))
    head = torch.zeros(257, 16)
    for kind, gain in GAINS.items():
        for letters, sign in ((PROMOTED, 1), (SUPPRESSED, -1)):
            head[tokenizer.encode(letters[kind])[0]] = sign * gain * basis[kind]
    network.lm_head.weight = torch.nn.Parameter(head)
    sae = SAE(16, 7, "relu", scale=SCALE)
    sae.W_dec.copy_(torch.cat([basis[:5], ones.T, 0.98 * basis[:1] + (1 - 0.98**2)**0.5 * basis[5:6]]))
    unigrams = torch.randn(400, 4, generator=torch.Generator().manual_seed(1)) @ basis[[0, 6, 7, 8]]
    return LM(network, tokenizer, "hand-made"), sae, 3 + unigrams


@pytest.fixture(scope="module")
def found():
    """All scores of the planted features, one row a feature."""
    rows, keep, codes, tokenizer = stream()
    text = heldout.prepare(rows, keep, tokenizer)
    codes = csc_array(np.c_[codes[:, :5], codes[:, TOPIC], codes[:, TOKEN]])
    lm, sae, unigrams = hand_made()
    table = scores.scored(codes, text)
    table["split"] = dictionary.split_tokens(table)
    table = table.merge(dictionary.dictionary(sae, unigrams), on="feature")
    return table.merge(effects.effects(lm, sae, 2, codes, text, rows, before=8, top=1), on="feature")


@pytest.mark.parametrize(("kind", "score"), EXPECTED, ids=lambda of: dict(zip(KINDS.values(), KINDS)).get(of, of))
def test_a_kind_lands_where_it_belongs(found, kind, score):
    value, tolerance = EXPECTED[kind, score]
    assert found[score][kind] == pytest.approx(value, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_is_told_in_words(found, kind):
    one = found.loc[kind]
    assert one.promoted == one.direct_promoted == repr(PROMOTED[kind])
    assert one.direct_suppressed == repr(SUPPRESSED[kind])
    # Probability moves from the likeliest rival, not from the token that was unlikely before.
    moved = np.exp(hand_made_logs(kind, 2)) - np.exp(hand_made_logs(kind, 0))
    assert one.suppressed == repr((PROMOTED + SUPPRESSED)[moved[:10].argmin()])
    assert one.explanation == SAID.get(kind, one.explanation) and (kind == TOPIC) == (one.explanation not in
                                                                                    SAID.values())


def test_a_row_that_the_model_cannot_read_does_nothing(found):
    inert = found.loc[INERT]
    assert inert.firings > 1000 and abs(inert.kl_ablate) < 1e-5 and abs(inert.kl_boost) < 1e-5
    assert found.nearest_feature[TOKEN] == TWIN and found.nearest_feature[TWIN] == TOKEN


def test_no_two_kinds_could_change_places(found):
    local = {TOKEN, BIGRAM, SKIP}
    for kind, other in permutations(KINDS.values(), 2):
        wrong = {score for (of, score), (value, tolerance) in EXPECTED.items()
                 if of == other and abs(found[score][kind] - value) > tolerance}
        if {kind, other} == {BIGRAM, SKIP}:
            apart = {"r2_2", "auc_2"}
        elif {kind, other} <= local:
            apart = {"r2_1", "auc_1", "complexity_1"}
            apart |= {f"{name}_{by}" for name in ("bits", "told") for by in WEIGHTINGS}
        elif {kind, other} <= {TOPIC, PLACE}:  # no window of tokens tells these two apart, but a rule does
            apart = {"detection", "detection_mass", "fuzzing", "precision", "rule_f1"}
        else:
            apart = {f"{name}_{n}" for name in ("r2", "auc") for n in range(1, 5)} | {"complexity_3"}
            apart |= {f"{name}_{by}" for name in ("tokens", "modal_share", "told") for by in WEIGHTINGS} | {"split"}
        assert apart | {"kl_ablate", "kl_boost"} <= wrong, (kind, other, apart - wrong)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_table_holds_for_other_streams(seed):
    rows, keep, codes, tokenizer = stream(seed)
    table = scores.scored(csc_array(codes), heldout.prepare(rows, keep, tokenizer))
    for (kind, score), (value, tolerance) in EXPECTED.items():
        if score in table:
            assert table[score][kind] == pytest.approx(value, abs=tolerance), (kind, score)


def test_probes_find_the_planted_features():
    """A token, a bigram, a topic and a position that are attributes of the text; a skip-gram that is none."""
    random, tokenizer = np.random.default_rng(0), byte_tokenizer()
    head = tokenizer.encode("Args\n")
    drawn = random.choice(tokenizer.encode("a1 .\nb"), (400, 63))
    topical = random.random(400) < 0.4
    drawn[topical, :len(head)] = head
    rows = torch.from_numpy(np.c_[np.zeros((400, 1), int), drawn]).int()
    text = heldout.prepare(rows, rows != 0, tokenizer)
    a, one, line, dot, b = (tokenizer.encode(letter)[0] for letter in "a1\n.b")
    back = [np.where(text.column > by, np.roll(text.t, by), 0) for by in range(3)]
    listed = text.ids[text.names.index("in a parameter list")].astype(bool)
    assert (listed == (topical[text.row] & (text.column > len(head)))).mean() > 0.99
    number, held_by = back[0] == one, back[1] == a
    fires = np.stack([number & ~held_by, (back[1] == line) & (back[0] == a), (back[2] == dot) & (back[0] == b),
                      listed & (random.random(len(listed)) < 0.3), text.column <= 4,
                      number & held_by], 1)
    codes = csc_array((fires * random.uniform(0.9, 1.1, fires.shape)).astype(np.float32))
    best = dictionary.probes(codes, text).set_index("attribute")
    # 5 of 6 numbers do not follow an "a": recall r = 5/6, precision 1; F1 = 2 r / (1 + r), AUC = (1 + r) / 2. The
    # sixth is a specialist's, and absorbed.
    attributes = {"a number": (TOKEN, 5 / 6), "in a parameter list": (TOPIC, 0.3),
                  "first of a line": (BIGRAM, 1 / 4 * 5 / 6)}  # "a" of 4 letters, and no space before it
    for name, (kind, recall) in attributes.items():
        assert best.f1_feature[name] == kind, name
        assert best.f1[name] == pytest.approx(2 * recall / (1 + recall), abs=0.04), name
    for name in ("a number", "in a parameter list"):
        assert best.auc_feature[name] == attributes[name][0]
        assert best.auc[name] == pytest.approx((1 + attributes[name][1]) / 2, abs=0.02)
    # The first four columns hold new tokens only, "Args", in 0.4 of the rows, whose 63 columns hold 10 in all; in the
    # rest so many distinct draws of six letters, of which a row holds all.
    hits, true = 0.4 * 4 + 0.6 * 6 * (1 - (5 / 6)**4), 0.4 * 10 + 0.6 * 6
    first = best.loc["first occurrence"]
    assert first.f1_feature == first.auc_feature == PLACE
    assert first.f1 == pytest.approx(2 * hits / (4 + true), abs=0.02)
    assert first.auc == pytest.approx((1 + hits / true - (4 - hits) / (63 - true)) / 2, abs=0.02)
    number = best.loc["a number"]
    assert number.specialists == 1 and number.absorbed == 1 and number.beside == 0
    assert SKIP not in best.f1_feature[[*attributes, "first occurrence"]].tolist()


def test_rare_token_features_look_more_complex_than_they_are():
    """Pure token features of a Zipf stream: what complexity_1 shows of them is how often their token was seen.

    A token seen k times in the fitted half is predicted k / (k + 2): the error is (2 / (k + 2))^2 a firing. So of
    features that fire rarely complexity is not to be read; of those with at least 50 firings it is.
    """
    random, tokenizer, V = np.random.default_rng(0), byte_tokenizer(), 250
    often = np.arange(1, V + 1)**-1.5
    rows = np.c_[np.zeros((320, 1), int), 1 + random.choice(V, (320, 63), p=often / often.sum())]
    rows = torch.from_numpy(rows).int()
    text = heldout.prepare(rows, rows != 0, tokenizer)
    codes = csc_array((text.t[:, None] == np.arange(1, V + 1)).astype(np.float32))
    table = scores.scored(codes, text)
    feature = table["feature"].to_numpy() + 1
    fitted = np.bincount(text.t[text.fit], minlength=V + 1)[feature]
    tested = np.bincount(text.t[~text.fit], minlength=V + 1)[feature]
    with np.errstate(divide="ignore"):
        exact = np.clip((PRIOR / (fitted + PRIOR))**2 / (1 - tested / (~text.fit).sum()), 0, 1)
    exact[tested == 0] = np.nan
    assert np.allclose(table["complexity_1"], exact, equal_nan=True)
    means, counts = zip(*[(table["complexity_1"][table["firings"].between(low, high)].mean(),
                           table["complexity_1"][table["firings"].between(low, high)].count())
                          for low, high in ((1, 5), (6, 20), (50, np.inf))])
    assert min(counts) > 10
    assert means[0] > 0.3 > means[1] > 0.02 and means[2] < 0.01, means
    assert table["complexity_1"][table["firings"] >= 50].max() < 0.05
    assert (table["told_firing"][table["firings"] >= 50] > 0.9).all()
