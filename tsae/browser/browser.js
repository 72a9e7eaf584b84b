"use strict";
(() => {
const ROW = 36, MARGIN = 12, BEFORE = 24, AFTER = 12, COLUMNS = 8;
const $ = id => document.getElementById(id);
let about, text, state = {}, list = null, order = [], at = 0, turn = 0, here = location.hash, wide = false;
let seen = here;  // the page's own hash when it was last looked at: another one is on its way to `follow`

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
const listHash = () => "#" + new URLSearchParams({ sae: list ? list.sae : 0, q: $("search").value,
  sort: list ? list.sort : "" });
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
  seen = location.hash;
  if (write === "pushState") route();
}
function follow() { if (location.hash !== here) { here = seen = location.hash; route(); } }
const toFeature = (sae, feature) => link(featureHash(sae, feature), { className: "id" }, String(feature));
const chip = (id, plain) => plain ? make("span", { className: "chip" }, token(id))
  : link(hash({ token: id }), { className: "chip", title: `token ${id}` }, token(id));

async function load(sae) {
  const table = await need("s" + sae);
  if (table.sae === undefined) {
    const columns = about.saes[sae].columns, numeric = Object.keys(columns).filter(name => columns[name] === "number");
    for (const name of numeric) table.columns[name] = Float64Array.from(table.columns[name], value => value ?? NaN);
    table.columns.feature = Float64Array.from(table.feature);
    const lower = ids => ids.map(id => text.strings[id].toLowerCase());
    const named = i => Object.keys(columns).filter(name => columns[name] !== "number").map(name => {
      const value = table.columns[name][i];
      return columns[name] === "text" ? value.toLowerCase() : value === null ? "" : text.strings[value].toLowerCase();
    });
    Object.assign(table, {
      sae, numeric, sort: "", place: new Map(table.feature.map((feature, i) => [feature, i])),
      fires: table.tokens.map((ids, i) => [...lower(ids), ...named(i)].join("\n")),
      promotes: table.promoted.map(ids => lower(ids).join("\n")),
    });
  }
  return table;
}

// A query is words, "quoted words", fires:word, promotes:word and comparisons such as frequency>0.01; all must hold.
const COMPARISON = /^([^\s<>="]+)(>=|<=|>|<|=)([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)$/i;
// Blanks around a comparison are left out, but for those inside quotation marks.
const close = query => query.split('"').map((part, i) => i % 2 ? part
  : part.replace(/([^\s<>="])\s*(>=|<=|[<>=])\s*(?=[-+.\d])/g, "$1$2")).join('"');
const terms = query => close(query).match(/(?:[a-z]+:)?"[^"]*"?|\S+/gi) || [];
function tests(table, query) {
  return terms(query).map(term => {
    const found = COMPARISON.exec(term);
    if (found && (found[1] === "feature" || table.numeric.includes(found[1]))) {
      const column = table.columns[found[1]], bound = Number(found[3]);
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
  if (about.saes[table.sae].columns[name] === "text")
    return kept.sort((a, b) => way * column[a].localeCompare(column[b]) || a - b);
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
// The first columns, or all of them, and always the one that sorts.
function shownColumns() {
  const all = Object.entries(about.saes[list.sae].columns), sorted = list.sort.replace(/^-/, "");
  $("more").hidden = all.length <= COLUMNS;
  $("more").textContent = wide ? "Fewer columns" : `${all.length - COLUMNS} more columns`;
  return Object.fromEntries(all.filter(([name], i) => wide || i < COLUMNS || name === sorted));
}
function refresh() {
  const query = $("search").value, columns = shownColumns(), promoted = list.promotes.some(Boolean);
  order = arrange(list, query, list.sort);
  at = Math.max(0, Math.min(at, order.length - 1));
  list.promoting = promoted;
  const headings = [heading("feature", "Feature", "number id", "104px"), heading("", "Codes", "", "98px"),
    heading("", "Fires on", "", "auto"), ...(promoted ? [heading("", "Promotes", "", "auto")] : []),
    ...Object.entries(columns).map(([name, kind]) => heading(name, name, kind, kind === "number" ? "98px" : "130px"))];
  const table = $("scroll").querySelector("table");
  styled(table, "min-width", 640 + 98 * Object.keys(columns).length + "px");
  table.setAttribute("aria-rowcount", order.length + 1);
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
  if (location.hash === seen && here !== listHash()) go(listHash(), "replaceState");
  rows();
}
function rows(printed = 0) {
  const box = $("scroll"), focused = box.contains(document.activeElement) && document.activeElement.matches("a.id");
  const first = printed ? 0 : Math.max(0, Math.floor(box.scrollTop / ROW) - MARGIN);
  const last = Math.min(order.length, printed || Math.ceil((box.scrollTop + box.clientHeight) / ROW) + MARGIN);
  const space = height => height === 0 ? []
    : make("tr", { className: "space", ariaHidden: "true" }, styled(make("td"), "height", height + "px"));
  const shown = [];
  for (let at = first; at < last; at++) shown.push(row(order[at], at));
  box.querySelector("tbody").replaceChildren(...[space(first * ROW), shown, space((order.length - last) * ROW)].flat());
  if (focused) box.querySelector("tr.at a.id")?.focus({ preventScroll: true });
}
function row(i, place) {
  const to = featureHash(list.sae, list.feature[i]), sorted = list.sort.replace(/^-/, "");
  const cells = Object.entries(shownColumns()).map(([name, kind]) => {
    const value = list.columns[name][i];
    return make("td", { className: kind + (name === sorted ? " sorted" : "") }, kind === "number" ? number(value)
      : kind === "text" ? visible(value) : value === null ? "–" : chip(value, true));
  });
  const tokens = ids => make("td", {}, ids.slice(0, 4).map(id => chip(id, true)));
  const open = () => { at = place; go(to); }, focus = event => mark(event.target, place);
  const name = link(to, { className: "id", tabIndex: place === at ? 0 : -1, onfocus: focus }, String(list.feature[i]));
  return make("tr", { className: place === at ? "at" : "", "aria-rowindex": place + 2, onclick: open },
    make("td", { className: "number" }, name), make("td", {}, shape(list.shape[i])), tokens(list.tokens[i]),
    ...(list.promoting ? [tokens(list.promoted[i])] : []), ...cells);
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
  const bounds = (term, name, sign) => {
    const found = COMPARISON.exec(term);
    return found?.[1] === name && found[2][0] === sign;
  };
  const field = (name, sign) => {
    const label = sign === ">" ? "at least" : "at most";
    const term = terms($("search").value).find(term => bounds(term, name, sign));
    return make("input", { inputMode: "decimal", ariaLabel: `${name} ${label}`, placeholder: label,
      value: term ? COMPARISON.exec(term)[3] : "", onchange: event => {
        const others = terms($("search").value).filter(term => !bounds(term, name, sign));
        const value = event.target.value.trim();
        if (value !== "" && Number.isFinite(Number(value))) others.push(`${name}${sign}=${Number(value)}`);
        $("search").value = others.join(" ");
        refresh();
      } });
  };
  $("ranges").querySelector("div").replaceChildren(...list.numeric.flatMap(name =>
    [make("label", { title: about.meanings[name] || "" }, name), field(name, ">"), field(name, "<")]));
}

function bars(entries, label, value, kind = "", scale = 0) {
  const most = scale || Math.max(...entries.map(entry => Math.abs(entry[1])), 1e-12);
  return make("div", { className: "rows" }, entries.flatMap(([name, size]) => [make("span", {}, label(name)),
    styled(make("div", { className: "bar " + kind }), "--share", 100 * Math.abs(size) / most + "%"),
    make("span", {}, value(size))]));
}
const box = (title, note, ...children) => make("section", { className: "box" },
  make("h3", {}, title, ...(note ? [make("small", {}, note)] : [])), ...children);
function histogram(counts, peak) {
  const [width, height, left, most] = [360, 120, 34, Math.max(...counts)], top = Math.log1p(most);
  const y = count => height - (height - 8) * Math.log1p(count) / top, step = (width - left) / counts.length;
  const svg = draw("svg", { class: "histogram", viewBox: `0 0 ${width} ${height + 18}`, role: "img",
    "aria-label": `Histogram of its codes, from 0 to ${number(peak)}; ${counts.join(", ")} positions` });
  for (let tick = 1; tick <= most; tick *= 10) {
    svg.append(draw("line", { x1: left, x2: width, y1: y(tick), y2: y(tick) }));
    svg.append(draw("text", { x: left - 6, y: y(tick) + 3.5, "text-anchor": "end" }, whole.format(tick)));
  }
  counts.forEach((count, i) => {
    const [from, to] = [i, i + 1].map(edge => number(edge * peak / counts.length));
    const place = { x: left + i * step, y: y(count), width: step - 1, height: height - y(count), rx: 1 };
    if (count) svg.append(draw("rect", place, draw("title", {}, `${from} to ${to}: ${whole.format(count)} positions`)));
  });
  for (const share of [0, .5, 1]) svg.append(draw("text", { x: left + share * (width - left), y: height + 14,
    "text-anchor": ["start", "middle", "end"][2 * share] }, number(share * peak)));
  return svg;
}
function scores(table, i) {
  return make("div", { className: "rows" }, table.numeric.flatMap(name => {
    const column = table.columns[name], value = column[i];
    let below = 0, all = 0;
    for (const other of column) { below += other < value; all += other === other; }  // NaN is not itself
    const share = 100 * below / Math.max(1, all - 1), title = `above ${Math.round(share)} % of the features`;
    return [make("span", { title: about.meanings[name] || "" }, name), Number.isNaN(value) ? make("div")
      : styled(make("div", { className: "rank", title }), "--share", share + "%"), make("span", {}, number(value))];
  }));
}
function contexts(found, lines, peak) {
  const body = make("tbody");
  for (const [row, column, columns, codes] of found) {
    const ids = lines.get(row), code = new Map(columns.map((place, i) => [place, codes[i]]));
    const piece = (place, broken) => {
      const strength = code.get(place), className = "t" + (strength ? " hot" : "") + (place === column ? " focus" : "");
      const element = make("i", { className, title: strength ? `code ${number(strength)}` : "" },
        broken ? token(ids[place]).replace(/⏎/g, "⏎\n") : token(ids[place]));
      return strength ? styled(element, "--heat", 12 + 88 * strength / peak + "%") : element;
    };
    const pieces = (from, to, broken) => ids.slice(from, to).map((_, i) => piece(from + i, broken));
    const shown = number(code.get(column));
    const button = make("button", { ariaExpanded: "false", ariaLabel: `Code ${shown}: show the whole row` }, shown);
    const line = make("tr", {}, make("td", {}, button),
      make("td", { className: "before" }, make("div", {}, pieces(Math.max(0, column - BEFORE), column))),
      make("td", { className: "after" }, pieces(column, column + 1 + AFTER)));
    line.onclick = () => {
      const open = button.ariaExpanded === "true", all = () => make("td", { colSpan: 3 }, pieces(0, ids.length, true));
      button.ariaExpanded = String(!open);
      open ? line.nextSibling.remove() : line.after(make("tr", { className: "whole" }, all()));
    };
    body.append(line);
  }
  return make("table", { className: "contexts" }, body);
}

// Stars and notes: kept by this browser, under what the pages say of themselves, and exported as csv.
const shelf = () => "tsae:" + about.title + JSON.stringify(about.about);
function kept() {
  try { return JSON.parse(localStorage.getItem(shelf())) ?? {}; } catch { return {}; }  // a page without a store
}
function keep(sae, feature, change) {
  const all = kept(), name = `${sae}:${feature}`, one = { star: false, note: "", ...all[name], ...change };
  if (one.star || one.note) all[name] = one; else delete all[name];
  try { localStorage.setItem(shelf(), JSON.stringify(all)); } catch { return false; }
  count();
  return true;
}
function star(sae, feature) {
  const on = () => !!kept()[`${sae}:${feature}`]?.star;
  const button = make("button", { className: "star", title: "Star it (s)", ariaPressed: String(on()) }, on() ? "★" : "☆");
  button.onclick = () => {
    if (!keep(sae, feature, { star: !on() })) button.title = "This view keeps nothing: open index.html in a tab of its own.";
    button.textContent = on() ? "★" : "☆";
    button.ariaPressed = String(on());
  };
  return button;
}
function note(sae, feature) {
  const field = make("textarea", { ariaLabel: "Your note", rows: 2, value: kept()[`${sae}:${feature}`]?.note ?? "" });
  field.oninput = () => { lost.hidden = keep(sae, feature, { note: field.value.trim() }); };
  const lost = make("p", { className: "more", hidden: true }, "This view keeps nothing: open index.html in a tab of its own.");
  return make("div", {}, field, lost);
}
function count() {
  const held = Object.keys(kept()).length;
  $("export").hidden = !held;
  $("export").textContent = `Export ${held} starred or noted`;
}
function exported() {
  const cell = value => `"${String(value).replace(/"/g, '""')}"`;
  const lines = Object.entries(kept()).map(([name, { star, note }]) => {
    const [sae, feature] = name.split(":");
    return [about.saes[sae]?.name ?? sae, feature, star, note].map(cell).join(",");
  });
  const file = new Blob([["sae,feature,star,note", ...lines, ""].join("\n")], { type: "text/csv" });
  const address = URL.createObjectURL(file);
  make("a", { href: address, download: "features.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
function random() {
  if (order.length) go(featureHash(list.sae, list.feature[order[Math.floor(Math.random() * order.length)]]));
}

async function showFeature(mine) {
  const sae = state.sae, table = await load(sae), i = table.place.get(state.feature), info = about.saes[sae];
  if (i === undefined)
    throw new Error(`Feature ${state.feature} of ${info.name} does not fire on this text, or does not exist.`);
  const found = (await need(`s${sae}f${Math.floor(i / about.part.features)}`))[i % about.part.features];
  const wanted = new Set(Object.values(found.contexts).flat().map(context => context[0])), lines = new Map();
  await Promise.all([...wanted].map(async row => lines.set(row,
    (await need("x" + Math.floor(row / about.part.rows)))[row % about.part.rows])));
  if (mine !== turn) return;
  if (list !== table) {
    list = table;
    list.sort = about.start.sort ?? "";
    $("search").value = about.start.q ?? "";
    order = arrange(table, $("search").value, list.sort);
  }
  const place = order.indexOf(i), kinds = found.contexts;
  if (place >= 0) at = place;
  const counted = found.histogram.reduce((sum, count) => sum + count, 0);
  const everything = kinds.top.reduce((sum, context) => sum + context[3].length, 0) === counted;
  const step = (by, label, sign) => order[place + by] === undefined || place < 0 ? ""
    : link(featureHash(sae, table.feature[order[place + by]]), { ariaLabel: label, title: label }, sign);
  const legend = () => make("span", { className: "legend" }, `code 0 to ${number(found.peak)}`);
  const section = (title, note, which) => box([title, legend()], note, contexts(which, lines, found.peak));
  const words = Object.entries(info.columns).filter(([name, kind]) => kind === "text" && table.columns[name][i]);
  const side = (title, note, name, kind) => found[name] ? [make("div", {},
    make("h3", {}, title, make("small", {}, note)), bars(found[name], id => chip(id), number, kind))] : [];
  const pair = (...sides) => {
    const held = sides.flat();
    return held.length ? [make("section", { className: held.length > 1 ? "box two" : "box" }, held)] : [];
  };
  const counter = place < 0 ? "" : `${whole.format(place + 1)} of ${whole.format(order.length)} `;
  $("feature").replaceChildren(make("div", { className: "page" },
    make("div", { className: "title" },
      make("h2", { tabIndex: -1 }, `Feature ${state.feature}`, make("small", {}, info.name)),
      make("div", { className: "chips" }, table.tokens[i].slice(0, 5).map(id => chip(id))),
      make("span", { className: "step" }, star(sae, state.feature), counter,
        step(-1, "Previous feature in the list (k)", "↑"), step(1, "Next feature in the list (j)", "↓"),
        make("button", { title: "A random feature of the list (r)", onclick: random }, "Random"),
        link(listHash(), { ariaLabel: "Back to the list (Esc)", title: "Back to the list (Esc)" }, "List"))),
    make("div", {},
      everything ? section("Everywhere it fires", `${kinds.top.length} rows of text`, kinds.top) : [
        section("Strongest", "the largest codes, one a row of text", kinds.top),
        section("Around the median", "codes nearest to the median of its firings", kinds.middle),
        section("Random", "drawn from all its firings", kinds.random)]),
    make("aside", {},
      box("Your note", "kept in this browser", note(sae, state.feature)),
      box("Codes", `${whole.format(counted)} firings, logarithmic`, histogram(found.histogram, found.peak)),
      box("Scores", "and where they rank among all features", scores(table, i),
        ...words.map(([name]) => make("p", { className: "more" }, `${name}: ${visible(table.columns[name][i])}`))),
      box("Fires on", "share of its summed codes", bars(found.tokens, id => chip(id), percent, "", 1)),
      ...pair(side("Promotes", "logits", "promoted", ""), side("Suppresses", "", "suppressed", "cold")),
      ...pair(side("Nearest unigrams", "cosine", "unigrams", "plain"),
        side("Nearest table rows", "cosine", "rows", "plain")),
      ...found.near.map((near, other) => box(other === sae ? "Nearest features" : `Nearest ${about.saes[other].name}`,
        "cosine of decoder rows", bars(near, feature => toFeature(other, feature), number, "plain", 1))))));
  $("feature").scrollTop = 0;
  $("feature").querySelector("h2").focus({ preventScroll: true });
}

async function showToken(mine) {
  const id = state.token, asks = "Choose a token of the text to see what each SAE makes of it.";
  if (id === null) return $("answer").replaceChildren(make("p", { className: "error" }, asks));
  const part = text.counts[id] ? await need("t" + Math.floor(id / about.part.tokens)) : null;
  if (!part) throw new Error(`Token ${id} does not occur in this text.`);
  const found = part[id], tables = await Promise.all(about.saes.map((_, sae) => load(sae)));
  if (mine !== turn) return;
  const fact = (label, value) => make("span", {}, label + " ", make("b", {}, value));
  const facts = (...held) => make("div", { className: "facts" }, held.flat());
  const norm = (label, [size, rank]) =>
    [fact(label, number(size)), fact("above", Math.round(100 * rank) + " % of tokens")];
  const nearest = entries => make("p", { className: "near" },
    entries.flatMap(([other, cosine]) => [chip(other), make("small", {}, number(cosine))]));
  const fires = "share of the token's positions where it fires";
  const answers = (features, sae) => make("table", { className: "answers" },
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Feature"), make("th", { scope: "col" }, "Fires on"),
      make("th", { scope: "col", className: "number", title: fires }, "Fires"),
      make("th", { scope: "col", className: "number", title: "where it fires" }, "Mean code"))),
    make("tbody", {}, features.map(([feature, share, code]) => make("tr", {}, make("td", {}, toFeature(sae, feature)),
      make("td", {}, tables[sae].tokens[tables[sae].place.get(feature)].slice(0, 3).map(other => chip(other, true))),
      make("td", { className: "number" }, percent(share)), make("td", { className: "number" }, number(code))))));
  const side = (one, sae) => make("section", { className: "box" }, make("h3", {}, about.saes[sae].name),
    facts(fact("features a position", number(one.l0)), one.row ? norm("norm of its table row", one.row) : "no table"),
    answers(one.features, sae),
    ...(one.row ? [make("h3", { className: "gap" }, "Nearest table rows", make("small", {}, "cosine, centred"))] : []),
    ...(one.row ? [nearest(one.row[2])] : []));
  $("answer").replaceChildren(
    make("div", { className: "title" }, make("h2", { tabIndex: -1 },
      make("span", { className: "chip" }, token(id)), make("small", {}, `token ${id}`))),
    facts(fact("occurs", `${whole.format(text.counts[id])} times`),
      fact("share of the text", percent(text.counts[id] / about.positions)),
      found.unigram ? norm("norm of its unigram", found.unigram) : []),
    ...(found.unigram ? [box("Nearest unigrams", "cosine, centred", nearest(found.unigram[2]))] : []),
    make("div", { className: "sides" }, found.saes.map(side)));
}
function options() {
  const word = $("pick").value.toLowerCase(), box = $("options"), found = [];
  text.counts.forEach((count, id) => { if (count && text.strings[id].toLowerCase().includes(word)) found.push(id); });
  const exact = id => text.strings[id].trim().toLowerCase() === word.trim() ? 1 : 0;
  found.sort((a, b) => exact(b) - exact(a) || text.counts[b] - text.counts[a]);
  const item = { role: "option", ariaSelected: "false", onmousedown: event => event.preventDefault() };
  box.replaceChildren(...found.slice(0, 12).map((id, i) =>
    make("li", { ...item, id: `option${i}`, onclick: () => choose(id) },
      make("span", { className: "chip" }, token(id)), whole.format(text.counts[id]))));
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
function fold() { $("options").hidden = true; $("pick").setAttribute("aria-expanded", "false"); }
function choose(id) { fold(); $("pick").value = ""; go(hash({ token: id })); }

async function route() {
  const params = new URLSearchParams(here.slice(1)), mine = ++turn;
  const id = (name, end) => {
    const value = /^\d+$/.test(params.get(name) ?? "") ? Number(params.get(name)) : end;
    return value < end ? value : null;
  };
  state = { sae: id("sae", about.saes.length) ?? 0, feature: id("feature", 1e9) };
  state.token = id("token", text.strings.length);
  const view = params.has("token") ? "token" : state.feature !== null ? "feature" : "list";
  for (const name of ["list", "feature", "token"]) $(name).hidden = name !== view;
  const named = about.saes[state.sae].name, page = { list: named, feature: `Feature ${state.feature}, ${named}`,
    token: state.token === null ? "Compare a token" : `Token ${token(state.token)}` }[view];
  document.title = `${page} - ${about.title}`;
  const tab = (to, current, title, ...label) =>
    link(to, { title, ...(current && { "aria-current": "page" }) }, ...label);
  $("tabs").replaceChildren(...about.saes.map(({ name, n, live }, sae) =>
    tab(hash({ sae }), view !== "token" && sae === state.sae,
      `${whole.format(live)} of ${whole.format(n)} features fire on this text`,
      name, make("small", {}, whole.format(live)))),
    tab("#token=", view === "token", "What each SAE makes of one token", "Compare a token"));
  try {
    if (view === "feature") await showFeature(mine);
    if (view === "token") await showToken(mine);
    if (view === "list") await showList(mine, params);
    if (view === "token" && mine === turn) (state.token === null ? $("pick") : $("answer").querySelector("h2")).focus();
  } catch (error) {
    if (mine === turn) fail(view === "token" ? $("answer") : $(view), error);
  }
}
async function showList(mine, params) {
  const table = await load(state.sae);
  if (mine !== turn) return;
  if (list !== table) { at = 0; $("scroll").scrollTop = 0; }
  list = table;
  const start = params.has("q") || params.has("sort") ? {} : about.start;  // a link says what it shows
  list.sort = params.get("sort") ?? start.sort ?? "";
  $("search").value = params.get("q") ?? start.q ?? "";
  refresh();
  move(0);
}
function fail(where, error) {
  where.replaceChildren(make("p", { className: "error", role: "alert" }, error.message));
  where.hidden = false;
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !about) return;
  const { key, target } = event, typing = target.matches("input, textarea"), pick = $("pick");
  const view = ["list", "feature", "token"].find(name => !$(name).hidden);
  const open = document.querySelector("details[open]");
  const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, PageDown: 15, PageUp: -15, Home: -1e9, End: 1e9 }[key];
  const items = [...$("options").children], chosen = items.findIndex(item => item.ariaSelected === "true");
  const next = list && order[order.indexOf(list.place.get(state.feature)) + step];
  const does = [  // the first that fits
    [key === "/" && !typing, () => {
      if (view === "feature") go(listHash());
      setTimeout(() => (view === "token" ? pick : $("search")).select(), 30);
    }],
    [target === pick && key === "Escape", () => $("options").hidden ? go(listHash()) : fold()],
    [target === pick && (key === "ArrowDown" || key === "ArrowUp"), () => $("options").hidden ? options()
      : select(Math.max(0, Math.min(items.length - 1, chosen + step)))],
    [target === pick && key === "Enter", () => items[chosen]?.click()],
    [target === pick, null],
    [key === "Escape" && open, () => { open.open = false; open.querySelector("summary").focus(); }],
    [key === "Escape", () => view === "list" ? move(0) : go(listHash())],
    [target === $("search") && key === "Enter" && order.length === 1, () => go(featureHash(list.sae, list.feature[order[0]]))],
    [target === $("search") && (key === "Enter" || key === "ArrowDown"), () => move(0)],
    [view === "list" && step && !typing && !target.closest("details"), () => move(step)],
    [key === "r" && !typing && view !== "token", random],
    [key === "s" && !typing && view === "feature", () => document.querySelector(".star").click()],
    [typing, null],
    [view === "feature" && (key === "j" || key === "k") && next !== undefined,
      () => go(featureHash(state.sae, list.feature[next]))],
  ].find(([fits]) => fits)?.[1];
  if (does) { event.preventDefault(); does(); }
});
document.addEventListener("click", event => {
  for (const open of document.querySelectorAll("details[open]")) if (!open.contains(event.target)) open.open = false;
});
$("more").addEventListener("click", () => { wide = !wide; refresh(); });
$("export").addEventListener("click", exported);
$("search").addEventListener("input", () => { at = 0; $("scroll").scrollTop = 0; refresh(); });
$("scroll").addEventListener("scroll", () => requestAnimationFrame(() => rows()));
for (const [event, printed] of [["resize"], ["beforeprint", 1000], ["afterprint"]])
  window.addEventListener(event, () => { if (list && !$("list").hidden) rows(printed); });
$("pick").addEventListener("input", options);
$("pick").addEventListener("blur", fold);
window.addEventListener("hashchange", follow);
Promise.all([need("about"), need("strings")]).then(([first, second]) => {
  [about, text] = [first, second];
  const facts = { ...about.about, positions: whole.format(about.positions), codes: "in units of the SAE's scale" };
  $("about").querySelector("dl").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  count();
  return route();
}).catch(error => fail($("list"), error));
})();
