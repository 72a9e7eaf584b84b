"use strict";
(() => {
const ROW = 36, MARGIN = 12, BEFORE = 24, AFTER = 12;
const $ = id => document.getElementById(id);
let about, text, state = {}, list = null, order = [], at = 0, turn = 0, here = location.hash;

// Data comes in parts: scripts beside this one that call tsae(key, value), or blocks of JSON inside the page. A page on
// disk may not fetch, but may load scripts.
const asked = new Map();
window.tsae = (key, value) => asked.get(key).done(value);
function need(key) {
  if (asked.has(key)) return asked.get(key).promise;
  const entry = {}, held = $("data-" + key);
  entry.promise = new Promise((done, fail) => Object.assign(entry, { done, fail }));
  asked.set(key, entry);
  if (held) entry.done(JSON.parse(held.textContent));
  else {
    const script = make("script", { src: `data/${key}.js` });
    script.onload = () => script.remove();
    script.onerror = () =>
      entry.fail(new Error(`data/${key}.js could not be read: keep the folder whole, or write it again`));
    document.head.append(script);
  }
  return entry.promise;
}

// Every element is made here. Text enters as text nodes and properties only, never as markup.
function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) name in element ? element[name] = value
    : element.setAttribute(name, value);
  element.append(...children.flat());
  return element;
}
function draw(tag, props = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const styled = (element, name, value) => (element.style.setProperty(name, value), element);
const visible = string => string.replace(/\n/g, "⏎").replace(/\t/g, "→").replace(/\r/g, "␍");
const token = id => visible(text.strings[id]);
const whole = new Intl.NumberFormat("en");
const three = new Intl.NumberFormat("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
function number(value) {
  if (value === null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000 || Number.isInteger(value)) return whole.format(Math.round(value));
  return size < 1e-4 ? value.toExponential(1) : three.format(value);
}
const percent = share => number(100 * share) + " %";

const hash = params => "#" + new URLSearchParams(Object.entries(params).filter(([, value]) => value !== ""
  && value != null));
const featureHash = (sae, feature) => hash({ sae, feature });
const listHash = () => hash({ sae: list ? list.sae : 0, q: $("search").value, sort: list ? list.sort : "" });
function link(to, props, ...children) {
  return make("a", { href: to, ...props, onclick: event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    event.stopPropagation();
    go(to);
  } }, ...children);
}
// Links are followed by hand: inside a frame, a fragment may lead elsewhere (where there is a <base>) or nowhere.
function go(to, write = "pushState") {
  here = to;
  try { history[write](null, "", location.href.split("#")[0] + to); } catch { /* a frame without a history */ }
  if (write === "pushState") route();
}
function follow() { if (location.hash !== here) { here = location.hash; route(); } }
const chip = (id, plain) => plain ? make("span", { className: "chip" }, token(id))
  : link(hash({ token: id }), { className: "chip", title: `token ${id}` }, token(id));

async function load(sae) {
  const table = await need("s" + sae);
  if (table.sae === undefined) {
    const numeric = Object.entries(about.saes[sae].columns).filter(([, kind]) => kind === "number").map(([name]) =>
      name);
    for (const name of numeric) table.columns[name] = Float64Array.from(table.columns[name], value => value ?? NaN);
    table.columns.feature = Float64Array.from(table.feature);
    const lower = ids => ids.map(id => text.strings[id].toLowerCase());
    Object.assign(table, {
      sae, numeric, sort: "", place: new Map(table.feature.map((feature, i) => [feature, i])), ranks: {},
      fires: table.tokens.map((ids, i) => [...lower(ids), ...named(sae, i)].join("\n")),
      promotes: table.promoted.map(ids => lower(ids).join("\n")),
    });
    function named(sae, i) {
      return Object.entries(about.saes[sae].columns).filter(([, kind]) => kind !== "number").map(([name, kind]) => {
        const value = table.columns[name][i];
        return kind === "text" ? value.toLowerCase() : value === null ? "" : text.strings[value].toLowerCase();
      });
    }
  }
  return table;
}

// A query is words, "quoted words", fires:word, promotes:word and comparisons such as frequency>0.01; all must hold.
const COMPARISON = /^([^\s<>="]+)(>=|<=|>|<|=)([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)$/i;
const terms = query => query.match(/(?:[a-z]+:)?"[^"]*"?|\S+/gi) || [];
function tests(table, query) {
  return terms(query).map(term => {
    const found = COMPARISON.exec(term), column = found && table.numeric.concat("feature").includes(found[1])
      && table.columns[found[1]];
    if (column) {
      const bound = Number(found[3]);
      return { ">": i => column[i] > bound, "<": i => column[i] < bound, ">=": i => column[i] >= bound,
               "<=": i => column[i] <= bound, "=": i => column[i] === bound }[found[2]];
    }
    const [, side, quoted] = /^(?:(fires|promotes):)?([^]*)$/.exec(term.toLowerCase());
    const word = quoted.replace(/^"|"$/g, "");
    return i => (side !== "promotes" && table.fires[i].includes(word))
      || (side !== "fires" && table.promotes[i].includes(word))
      || (!side && String(table.feature[i]) === word);
  });
}
function arrange(table, query, sort) {
  const checks = tests(table, query), kept = [];
  for (let i = 0; i < table.feature.length; i++) if (checks.every(check => check(i))) kept.push(i);
  const name = sort.replace(/^-/, ""), way = sort.startsWith("-") ? -1 : 1, column = table.columns[name];
  if (!column) return kept;
  if (about.saes[table.sae].columns[name] === "text") return kept.sort((a, b) =>
    way * column[a].localeCompare(column[b]) || a - b);
  return kept.sort((a, b) => {
    const x = column[a], y = column[b];
    return Number.isNaN(x) ? (Number.isNaN(y) ? a - b : 1) : Number.isNaN(y) ? -1 : way * (x - y) || a - b;
  });
}

function heading(name, label, kind, width) {
  const sorted = list.sort.replace(/^-/, "") === name;
  const column = make("th", { scope: "col", className: kind }, name === "" ? label : make("button", {
    title: about.meanings[name] || "", onclick: () => {
      const first = kind === "number" && name !== "feature" ? "-" : "";
      list.sort = list.sort === first + name ? (first ? "" : "-") + name : first + name;
      at = 0;
      $("scroll").scrollTop = 0;
      refresh();
      $("scroll").querySelector("th[aria-sort] button").focus();
    } }, ...label.split("_").flatMap((part, i) => i ? ["_", make("wbr"), part] : [part])));
  if (sorted) column.setAttribute("aria-sort", list.sort.startsWith("-") ? "descending" : "ascending");
  return [styled(make("col"), "width", width), column];
}
function refresh() {
  const query = $("search").value, columns = about.saes[list.sae].columns, promoted = list.promotes.some(Boolean);
  order = arrange(list, query, list.sort);
  at = Math.max(0, Math.min(at, order.length - 1));
  list.promoting = promoted;
  const headings = [heading("feature", "Feature", "number id", "104px"), heading("", "Codes", "", "98px"),
    heading("", "Fires on", "", "auto"), ...(promoted ? [heading("", "Promotes", "", "auto")] : []),
    ...Object.entries(columns).map(([name, kind]) => heading(name, name, kind, kind === "number" ? "98px" : "130px"))];
  const table = $("scroll").querySelector("table");
  styled(table, "min-width", 640 + 98 * Object.keys(columns).length + "px").setAttribute("aria-rowcount",
    order.length + 1);
  table.querySelector("colgroup").replaceChildren(...headings.map(pair => pair[0]));
  table.querySelector("thead").replaceChildren(make("tr", { "aria-rowindex": 1 }, headings.map(pair => pair[1])));
  const unknown = terms(query).map(term => COMPARISON.exec(term)).filter(found => found && !(found[1] in list.columns));
  $("count").textContent = order.length === list.feature.length ? `${whole.format(order.length)} features`
    : `${whole.format(order.length)} of ${whole.format(list.feature.length)} features`;
  $("none").textContent = unknown.length
    ? `There is no score ${unknown[0][1]}: it was looked for as text. The scores are ${list.numeric.join(", ")}.`
    : "No feature fits this search.";
  $("none").hidden = order.length > 0;
  ranges();
  if (here !== listHash()) go(listHash(), "replaceState");
  rows();
}
function rows() {
  const box = $("scroll"), focused = box.contains(document.activeElement) && document.activeElement.matches("a.id");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - MARGIN);
  const last = Math.min(order.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + MARGIN);
  const space = height => !height ? [] : make("tr", { className: "space", ariaHidden: "true" },
    styled(make("td"), "height", height + "px"));
  const shown = [];
  for (let at = first; at < last; at++) shown.push(row(order[at], at));
  box.querySelector("tbody").replaceChildren(...[space(first * ROW), shown, space((order.length - last) * ROW)].flat());
  if (focused) box.querySelector("tr.at a.id")?.focus({ preventScroll: true });
}
function row(i, place) {
  const to = featureHash(list.sae, list.feature[i]), sorted = list.sort.replace(/^-/, "");
  const cells = Object.entries(about.saes[list.sae].columns).map(([name, kind]) => {
    const value = list.columns[name][i];
    return make("td", { className: kind + (name === sorted ? " sorted" : "") }, kind === "number" ? number(value)
      : kind === "text" ? visible(value) : value === null ? "–" : chip(value, true));
  });
  return make("tr", { className: place === at ? "at" : "", "aria-rowindex": place + 2,
    onclick: () => { at = place; go(to); } },
    make("td", { className: "number" }, link(to, { className: "id", tabIndex: place === at ? 0 : -1, onfocus: event =>
      mark(event.target, place) },
      String(list.feature[i]))),
    make("td", {}, shape(list.shape[i])), make("td", {}, list.tokens[i].slice(0, 4).map(id => chip(id, true))),
    ...(list.promoting ? [make("td", {}, list.promoted[i].slice(0, 4).map(id => chip(id, true)))] : []), ...cells);
}
function mark(chosen, place) {
  const before = $("scroll").querySelector("tr.at");
  if (before) { before.className = ""; before.querySelector("a.id").tabIndex = -1; }
  chosen.closest("tr").className = "at";
  chosen.tabIndex = 0;
  at = place;
}
function shape(levels) {
  let path = "";
  for (let i = 0; i < levels.length; i++) if (levels[i] > 0) path += `M${i} 9.5V${9 - levels[i]}h.8V9.5z`;
  return draw("svg", { class: "shape", viewBox: `0 0 ${levels.length} 9.5`, preserveAspectRatio: "none",
    "aria-hidden": "true" }, draw("path", { d: path }));
}
function move(step) {
  if (!order.length) return;
  at = Math.max(0, Math.min(order.length - 1, at + step));
  const box = $("scroll"), head = box.querySelector("thead").offsetHeight, top = at * ROW;
  if (top < box.scrollTop) box.scrollTop = top;
  if (top + ROW + head > box.scrollTop + box.clientHeight) box.scrollTop = top + ROW + head - box.clientHeight;
  rows();
  box.querySelector("tr.at a.id")?.focus({ preventScroll: true });
}
function ranges() {
  const bound = (name, sign) => terms($("search").value).map(term => COMPARISON.exec(term)).find(found => found
    && found[1] === name && found[2][0] === sign);
  const field = (name, sign) => make("input", { type: "text", inputMode: "decimal",
    ariaLabel: `${name} ${sign === ">" ? "at least" : "at most"}`,
    placeholder: sign === ">" ? "at least" : "at most", value: bound(name, sign)?.[3] || "", onchange: event => {
      const others = terms($("search").value).filter(term => { const found = COMPARISON.exec(term);
        return !(found && found[1] === name && found[2][0] === sign); });
      const value = event.target.value.trim();
      $("search").value = [...others, ...(value !== "" && Number.isFinite(Number(value))
        ? [`${name}${sign}=${Number(value)}`] : [])].join(" ");
      refresh();
    } });
  $("ranges").querySelector("div").replaceChildren(...list.numeric.flatMap(name =>
    [make("label", { title: about.meanings[name] || "" }, name), field(name, ">"), field(name, "<")]));
}

function bars(entries, label, value, kind = "", scale = 0) {
  const most = scale || Math.max(...entries.map(entry => Math.abs(entry[1])), 1e-12);
  return make("div", { className: "rows" }, entries.flatMap(entry => [make("span", {}, label(entry[0])),
    styled(make("div", { className: "bar " + kind }), "--share", 100 * Math.max(0, Math.abs(entry[1])) / most + "%"),
      make("span", {}, value(entry[1]))]));
}
const box = (title, note, ...children) => make("section", { className: "box" },
  make("h3", {}, title, ...(note ? [make("small", {}, note)] : [])), ...children);
function histogram(counts, peak) {
  const [width, height, left, most] = [360, 120, 34, Math.max(...counts)], top = Math.log1p(most);
  const y = count => height - (height - 8) * Math.log1p(count) / top, step = (width - left) / counts.length;
  const svg = draw("svg", { class: "histogram", viewBox: `0 0 ${width} ${height + 18}`, role: "img",
    "aria-label": `Histogram of its codes, from 0 to ${number(peak)}; ${counts.join(", ")} positions` });
  for (let tick = 1; tick <= most; tick *= 10) svg.append(draw("line",
    { x1: left, x2: width, y1: y(tick), y2: y(tick) }),
    draw("text", { x: left - 6, y: y(tick) + 3.5, "text-anchor": "end" }, whole.format(tick)));
  counts.forEach((count, i) => { if (count) svg.append(draw("rect",
    { x: left + i * step, y: y(count), width: step - 1, height: height - y(count), rx: 1 },
    draw("title", {}, `${number(i * peak / counts.length)} to ${number((i + 1) * peak / counts.length)}: ${whole.format(count)} positions`))); });
  for (const share of [0, .5, 1]) svg.append(draw("text", { x: left + share * (width - left), y: height + 14,
    "text-anchor": ["start", "middle", "end"][2 * share] }, number(share * peak)));
  return svg;
}
function scores(table, i) {
  return make("div", { className: "rows" }, table.numeric.flatMap(name => {
    const sorted = table.ranks[name] ||= table.columns[name].filter(value => !Number.isNaN(value)).sort(),
      value = table.columns[name][i];
    let below = 0, end = sorted.length;
    while (below < end) { const middle = (below + end) >> 1; sorted[middle] < value ? below = middle + 1 : end = middle;
      }
    const share = Number.isNaN(value) ? 0 : 100 * below / Math.max(1, sorted.length - 1);
    return [make("span", { title: about.meanings[name] || "" }, name),
      styled(make("div", { className: "rank", title: `above ${Math.round(share)} % of the features` }), "--share",
      share + "%"),
      make("span", {}, number(value))];
  }));
}
function contexts(found, lines, peak) {
  const body = make("tbody");
  for (const [row, column, columns, codes] of found) {
    const ids = lines.get(row), code = new Map(columns.map((place, i) => [place, codes[i]]));
    const piece = (place, broken) => {
      const strength = code.get(place),
        element = make("i", { className: "t" + (strength ? " hot" : "") + (place === column ? " focus" : ""),
        title: strength ? `code ${number(strength)}` : "" }, token(ids[place]).replace(/⏎/g, broken ? "⏎\n" : "⏎"));
      return strength ? styled(element, "--heat", 12 + 88 * strength / peak + "%") : element;
    };
    const pieces = (from, to, broken) => ids.slice(from, to).map((_, i) => piece(from + i, broken));
    const button = make("button",
      { ariaExpanded: "false", ariaLabel: `Code ${number(code.get(column))}: show the whole row` },
      number(code.get(column)));
    const line = make("tr", { onclick: () => {
      const open = button.ariaExpanded === "true";
      button.ariaExpanded = String(!open);
      open ? line.nextSibling.remove() : line.after(make("tr", { className: "whole" },
        make("td", { colSpan: 3 }, pieces(0, ids.length, true))));
    } }, make("td", {}, button), make("td", { className: "before" },
      make("div", {}, pieces(Math.max(0, column - BEFORE), column))),
      make("td", { className: "after" }, pieces(column, column + 1 + AFTER)));
    body.append(line);
  }
  return make("table", { className: "contexts" }, body);
}

async function showFeature(mine) {
  const sae = state.sae, table = await load(sae), i = table.place.get(state.feature), info = about.saes[sae];
  if (i === undefined) throw new Error(`Feature ${state.feature} of ${info.name} does not fire on this text, or there is none of that number.`);
  const found = (await need(`s${sae}f${Math.floor(i / about.part.features)}`))[i % about.part.features];
  const wanted = new Set(Object.values(found.contexts).flat().map(context => context[0])), lines = new Map();
  await Promise.all([...wanted].map(async row => lines.set(row,
    (await need("x" + Math.floor(row / about.part.rows)))[row % about.part.rows])));
  if (mine !== turn) return;
  if (list !== table) { list = table; order = arrange(table, "", ""); $("search").value = ""; }
  const place = order.indexOf(i), kinds = found.contexts;
  if (place >= 0) at = place;
  const counted = found.histogram.reduce((sum, count) => sum + count, 0),
    everything = kinds.top.reduce((sum, context) => sum + context[3].length, 0) === counted;
  const step = (by, label, sign) => order[place + by] === undefined || place < 0 ? ""
    : link(featureHash(sae, table.feature[order[place + by]]), { ariaLabel: label, title: label }, sign);
  const legend = () => make("span", { className: "legend" }, `code 0 to ${number(found.peak)}`);
  const section = (title, note, which) => box([title, legend()], note, contexts(which, lines, found.peak));
  const words = Object.entries(info.columns).filter(([name, kind]) => kind === "text" && table.columns[name][i]);
  const side = (title, note, name, kind) => found[name] ? [make("div", {},
    make("h3", {}, title, make("small", {}, note)), bars(found[name], id => chip(id), number, kind))] : [];
  const pair = (a, b) => a.length + b.length ? [make("section", { className: a.length && b.length ? "box two" : "box" },
    a, b)] : [];
  $("feature").replaceChildren(make("div", { className: "page" },
    make("div", { className: "title" }, make("h2", { tabIndex: -1 }, `Feature ${state.feature}`,
      make("small", {}, info.name)),
      make("div", { className: "chips" }, table.tokens[i].slice(0, 5).map(id => chip(id))),
      make("span", { className: "step" }, place >= 0 ? `${whole.format(place + 1)} of ${whole.format(order.length)} `
        : "",
        step(-1, "Previous feature in the list (k)", "↑"), step(1, "Next feature in the list (j)", "↓"),
        link(listHash(), { ariaLabel: "Back to the list (Esc)", title: "Back to the list (Esc)" }, "List"))),
    make("div", {},
      everything ? section("Everywhere it fires", `${kinds.top.length} rows of text`, kinds.top) : [
        section("Strongest", "the largest codes, one a row of text", kinds.top),
        section("Around the median", "codes nearest to the median of its firings", kinds.middle),
        section("Random", "drawn from all its firings", kinds.random)]),
    make("aside", {},
      box("Codes", `${whole.format(counted)} firings, logarithmic`, histogram(found.histogram, found.peak)),
      box("Scores", "and where they rank among all features", scores(table, i),
        ...words.map(([name]) => make("p", { className: "more" }, `${name}: ${visible(table.columns[name][i])}`))),
      box("Fires on", "share of its summed codes", bars(found.tokens, id => chip(id), percent, "", 1)),
      ...pair(side("Promotes", "logits", "promoted", ""), side("Suppresses", "", "suppressed", "cold")),
      ...pair(side("Nearest unigrams", "cosine", "unigrams", "plain"),
        side("Nearest table rows", "cosine", "rows", "plain")),
      ...found.near.map((near, other) => box(other === sae ? "Nearest features" : `Nearest ${about.saes[other].name}`,
        "cosine of decoder rows",
        bars(near, feature => link(featureHash(other, feature), { className: "id" }, String(feature)), number, "plain",
          1))))));
  $("feature").scrollTop = 0;
  $("feature").querySelector("h2").focus({ preventScroll: true });
}

async function showToken(mine) {
  const id = state.token;
  if (id === null) return $("answer").replaceChildren(make("p", { className: "error" },
    "Choose a token of the text to see what each SAE makes of it."));
  const part = text.counts[id] ? await need("t" + Math.floor(id / about.part.tokens)) : null;
  if (!part) throw new Error(`Token ${id} does not occur in this text.`);
  const found = part[id], tables = await Promise.all(about.saes.map((_, sae) => load(sae)));
  if (mine !== turn) return;
  const nearest = entries => make("p", { className: "near" },
    entries.flatMap(([other, cosine]) => [chip(other), make("small", {}, number(cosine))]));
  const fact = (label, value) => make("span", {}, label + " ", make("b", {}, value));
  const norm = (label, [size, rank]) => [fact(label, number(size)),
    fact("above", Math.round(100 * rank) + " % of tokens")];
  $("answer").replaceChildren(make("div", { className: "title" },
    make("h2", { tabIndex: -1 }, make("span", { className: "chip" }, token(id)), make("small", {}, `token ${id}`))),
    make("div", { className: "facts" }, fact("occurs", `${whole.format(text.counts[id])} times`),
      fact("share of the text", percent(text.counts[id] / about.positions)),
      ...(found.unigram ? norm("norm of its unigram", found.unigram) : [])),
    ...(found.unigram ? [box("Nearest unigrams", "cosine, centred", nearest(found.unigram[2]))] : []),
    make("div", { className: "sides" }, found.saes.map((one, sae) =>
      make("section", { className: "box" }, make("h3", {}, about.saes[sae].name),
      make("div", { className: "facts" }, fact("features a position", number(one.l0)),
        ...(one.row ? norm("norm of its table row", one.row) : [make("span", {}, "no table")])),
      make("table", { className: "answers" }, make("thead", {},
        make("tr", {}, ["Feature", "Fires on"].map(label => make("th", { scope: "col" }, label)),
        [["Fires", "share of the token's positions where it fires"],
          ["Mean code", "where it fires"]].map(([label, title]) =>
          make("th", { scope: "col", className: "number", title }, label)))),
        make("tbody", {}, one.features.map(([feature, share, code]) =>
          make("tr", {}, make("td", {}, link(featureHash(sae, feature), { className: "id" }, String(feature))),
          make("td", {}, tables[sae].tokens[tables[sae].place.get(feature)].slice(0, 3).map(other =>
            chip(other, true))),
          make("td", { className: "number" }, percent(share)), make("td", { className: "number" }, number(code)))))),
      ...(one.row ? [make("h3", { className: "gap" }, "Nearest table rows", make("small", {}, "cosine, centred")),
        nearest(one.row[2])] : [])))));
}
function options() {
  const word = $("pick").value.toLowerCase(), box = $("options"), found = [];
  text.counts.forEach((count, id) => { if (count && text.strings[id].toLowerCase().includes(word)) found.push(id); });
  const exact = id => text.strings[id].trim().toLowerCase() === word.trim() ? 1 : 0;
  found.sort((a, b) => exact(b) - exact(a) || text.counts[b] - text.counts[a]);
  box.replaceChildren(...found.slice(0, 12).map((id, i) => make("li",
    { id: `option${i}`, role: "option", ariaSelected: "false", onmousedown: event => event.preventDefault(),
    onclick: () => choose(id) }, make("span", { className: "chip" }, token(id)), whole.format(text.counts[id]))));
  box.hidden = !found.length;
  $("pick").setAttribute("aria-expanded", String(!box.hidden));
  select(0);
}
function select(place) {
  const items = [...$("options").children];
  items.forEach((item, i) => item.ariaSelected = String(i === place));
  items[place]?.scrollIntoView({ block: "nearest" });
  $("pick").setAttribute("aria-activedescendant", items[place]?.id || "");
}
function close() { $("options").hidden = true; $("pick").setAttribute("aria-expanded", "false"); }
function choose(id) { close(); $("pick").value = ""; go(hash({ token: id })); }

async function route() {
  const params = new URLSearchParams(here.slice(1)), mine = ++turn;
  const id = (name, most) => /^\d+$/.test(params.get(name) ?? "") && Number(params.get(name)) < most
    ? Number(params.get(name)) : null;
  state = { sae: id("sae", about.saes.length) ?? 0, feature: id("feature", Infinity),
    token: id("token", text.strings.length) };
  const view = params.has("token") ? "token" : state.feature !== null ? "feature" : "list";
  for (const name of ["list", "feature", "token"]) $(name).hidden = name !== view;
  $("tabs").replaceChildren(...about.saes.map(({ name, n, live }, sae) =>
    link(hash({ sae }), { ...(view !== "token" && sae === state.sae && { "aria-current": "page" }),
    title: `${whole.format(live)} of ${whole.format(n)} features fire on this text` }, name,
      make("small", {}, whole.format(live)))),
    link("#token=", { ...(view === "token" && { "aria-current": "page" }), title: "What each SAE makes of one token" },
      "Compare a token"));
  try {
    if (view === "feature") await showFeature(mine);
    if (view === "token") { await showToken(mine); if (mine === turn) (state.token === null ? $("pick")
      : $("answer").querySelector("h2")).focus(); }
    if (view === "list") {
      const table = await load(state.sae);
      if (mine !== turn) return;
      if (list !== table) { at = 0; $("scroll").scrollTop = 0; }
      list = table;
      $("search").value = params.get("q") ?? "";
      list.sort = params.get("sort") ?? "";
      refresh();
      move(0);
    }
  } catch (error) {
    if (mine === turn) (view === "list" ? $("list") : view === "token" ? $("answer")
      : $("feature")).replaceChildren(make("p", { className: "error", role: "alert" }, error.message));
  }
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const view = ["list", "feature", "token"].find(name => !$(name).hidden), typing = event.target.matches("input");
  const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, PageDown: 15, PageUp: -15, Home: -1e9, End: 1e9 }[event.key];
  const done = () => event.preventDefault();
  if (event.key === "/" && !typing) { done(); const field = view === "token" ? $("pick") : $("search");
    if (view === "feature") go(listHash()); setTimeout(() => { field.focus(); field.select(); }, 30); }
  else if (event.target === $("pick")) {
    const place = [...$("options").children].findIndex(item => item.ariaSelected === "true");
    if (event.key === "Escape") { $("options").hidden ? go(listHash()) : close(); done(); }
    else if (event.key.startsWith("Arrow") && step) { $("options").hidden ? options()
      : select(Math.max(0, Math.min($("options").children.length - 1, place + step))); done(); }
    else if (event.key === "Enter") { $("options").children[place]?.click(); done(); }
  } else if (event.key === "Escape") {
    const open = document.querySelector("details[open]");
    if (open) { open.open = false; open.querySelector("summary").focus(); }
    else if (view !== "list") go(listHash());
    else move(0);
    done();
  } else if (view === "list" && typing && event.target === $("search")
    && (event.key === "Enter" || event.key === "ArrowDown")) { done(); move(0); }
  else if (view === "list" && !typing && step && !event.target.closest("details")) { done(); move(step); }
  else if (view === "list" && event.key === "Enter" && event.target === document.body
    && order.length) go(featureHash(list.sae, list.feature[order[at]]));
  else if (view === "feature"
    && (event.key === "j"
    || event.key === "k")) { const next = order[order.indexOf(list.place.get(state.feature)) + step];
    if (next !== undefined) go(featureHash(state.sae, list.feature[next])); }
});
document.addEventListener("click",
  event => { for (const open of document.querySelectorAll("details[open]")) if (!open.contains(event.target)) open.open = false; });
$("search").addEventListener("input", () => { at = 0; $("scroll").scrollTop = 0; refresh(); });
$("scroll").addEventListener("scroll", () => requestAnimationFrame(rows));
window.addEventListener("resize", () => { if (list && !$("list").hidden) rows(); });
$("pick").addEventListener("input", options);
$("pick").addEventListener("blur", close);
window.addEventListener("hashchange", follow);
Promise.all([need("about"), need("strings")]).then(([first, second]) => {
  [about, text] = [first, second];
  const facts = { ...about.about, positions: whole.format(about.positions), codes: "in units of the SAE's scale" };
  $("about").querySelector("dl").replaceChildren(...Object.entries(facts).flatMap(([name, value]) =>
    [make("dt", {}, name), make("dd", {}, value)]));
  return route();
}).catch(error => { $("list").hidden = false; $("list").replaceChildren(make("p", { className: "error", role: "alert" },
  error.message)); });
})();
