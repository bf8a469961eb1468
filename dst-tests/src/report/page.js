"use strict";

// Everything that comes from the data is put into the document as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const sessions = JSON.parse(document.getElementById("data").textContent);

function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function drawing(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

const number = (value) => value.toLocaleString("en");
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
// A number past 2^53, as seeds and ids of VMs are, comes as a text.
const hex = (seed) => `0x${BigInt(seed).toString(16)}`;
const sum = (values) => values.reduce((all, value) => all + value, 0);

function duration(seconds) {
  if (seconds >= 7200) return `${(seconds / 3600).toFixed(1)} h`;
  if (seconds >= 120) return `${(seconds / 60).toFixed(1)} min`;
  if (seconds >= 1) return `${Number(seconds.toFixed(3))} s`;
  if (seconds >= 1e-3) return `${Number((seconds * 1e3).toFixed(3))} ms`;
  return `${(seconds * 1e6).toFixed(0)} µs`;
}

// ---- What ran

function summary() {
  const failed = sum(sessions.map((session) => session.failed));
  const runs = sum(sessions.map((session) => session.runs));
  const interrupted = sessions.some((session) => session.interrupted);
  const verdict = document.getElementById("verdict");
  const [kind, text] =
    failed > 0 ? ["bad", `${number(failed)} of ${plural(runs, "run")} broke a promise`]
    : runs === 0 ? ["dull", "nothing ran"]
    : interrupted ? ["dull", `interrupted; ${plural(runs, "run")} kept every promise`]
    : ["good", `${plural(runs, "run")} kept every promise`];
  verdict.className = kind;
  verdict.textContent = `${{ bad: "✗", good: "✓", dull: "–" }[kind]} ${text}`;
  document.title = `${kind === "bad" ? "✗ " : ""}Contract report`;

  const rows = [
    ["environment", (it) => it.environment],
    ["seeds", (it) => `${number(it.seeds)}, from ${hex(it.first_seed)} on`],
    ["part", (it) => (it.shard.of === 1 ? "the whole" : `shard ${it.shard.index} of ${it.shard.of}`)],
    ["clauses", (it) => number(it.clauses)],
    ["runs", (it) => number(it.runs) + (it.interrupted ? ", then interrupted" : "")],
    ["failed", (it) => number(it.failed)],
    ["ignored", (it) => plural(it.ignored, "clause")],
    ["run twice", (it) => (it.twice ? `yes; ${number(it.differing)} differ in their fingerprints` : "no")],
    ["time taken", (it) => (it.runs === 0 ? "–" : duration(it.seconds))],
  ];
  const table = element("table", { class: "facts" },
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "backend"),
      sessions.map((it) => element("th", { scope: "col" }, it.backend)))),
    element("tbody", {}, rows.map(([name, value]) => element("tr", {},
      element("th", { scope: "row" }, name),
      sessions.map((it) => element("td", { class: name === "failed" && it.failed > 0 ? "bad" : null }, value(it)))))));
  document.getElementById("summary").append(element("div", { class: "wide" }, table), reasons());
}

/** Why clauses were left out, one line for each reason. */
function reasons() {
  const lines = [];
  for (const session of sessions) {
    const byReason = new Map();
    for (const clause of session.per_clause) {
      if (clause.ignored !== null) byReason.set(clause.ignored, [...(byReason.get(clause.ignored) ?? []), clause.id]);
    }
    for (const [reason, ids] of byReason) {
      lines.push(element("li", {}, element("b", {}, session.backend), ` ${reason}: `,
        element("details", {}, element("summary", {}, plural(ids.length, "clause")), ids.join(", "))));
    }
  }
  if (lines.length === 0) return null;
  return element("div", {}, element("h3", {}, "Left out, and why"), element("ul", { class: "reasons" }, lines));
}

// ---- Failures

/** One failure of each clause before a second of any. */
function ranked(session) {
  const seen = new Map();
  const rank = (failure) => {
    seen.set(failure.clause, (seen.get(failure.clause) ?? 0) + 1);
    return seen.get(failure.clause);
  };
  return session.failures.map((failure) => ({ failure, rank: rank(failure) }))
    .sort((a, b) => a.rank - b.rank).map(({ failure }) => failure);
}

function failures() {
  const place = document.getElementById("failures");
  let first = true;
  for (const session of sessions) {
    const list = ranked(session);
    list.forEach((failure) => {
      place.append(card(session, failure, first));
      first = false;
    });
    if (session.failed > list.length) {
      place.append(element("p", {}, `and ${plural(session.failed - list.length, "more failed run")} on ${session.backend}`));
    }
  }
  if (first) place.append(element("p", {}, "None."));
}

function card(session, failure, open) {
  const replay = element("code", {}, failure.replay);
  const copy = element("button", { type: "button", onclick: () => {
    const selection = getSelection();
    selection.selectAllChildren(replay);
    const done = navigator.clipboard?.writeText(failure.replay) ?? Promise.reject();
    done.then(() => { copy.textContent = "copied"; }, () => { copy.textContent = "selected"; });
  } }, "copy");
  const place = element("div", { class: "place" });
  const details = element("details", { class: "failure", open,
    ontoggle: () => { if (details.open && !place.hasChildNodes()) place.append(record(failure)); } },
    element("summary", {}, element("span", { class: "bad" }, "✗ "), element("b", {}, failure.clause),
      element("span", { class: "dim" }, ` on ${session.backend}, seed ${hex(failure.seed)}`)),
    element("dl", {},
      element("dt", {}, "promise"), element("dd", {}, failure.promise),
      element("dt", {}, "broken"), element("dd", { class: "broken" }, failure.broken),
      element("dt", {}, "replay"), element("dd", {}, replay, " ", copy)),
    place);
  if (open) place.append(record(failure));
  return details;
}

function record(failure) {
  const kept = failure.record;
  const say = (text) => element("p", { class: "note" }, text);
  if (!kept) return say("What happened in this run was not kept; replay it.");
  const notes = [];
  const second = kept.second;
  if (second?.outcome === "endless") notes.push(say("The run did not end, so there is nothing to show of it."));
  if (second?.outcome === "kept") {
    notes.push(say("This is a second run of the seed, and it kept the promise: the failure does not happen every time."));
  }
  if (second?.outcome === "broken" && second.broken !== failure.broken) {
    notes.push(say(`This is a second run of the seed, which broke the promise in another way: ${second.broken}`));
  }
  if (kept.lines.length === 0) {
    if (notes.length === 0) notes.push(say("This backend writes nothing down."));
    return element("div", {}, notes);
  }
  return element("div", {}, notes, new Timeline(kept.lines, failure.broken).node);
}

// ---- A timeline

const LAYERS = [
  ["calls", "operations", true],
  ["faults", "faults", true],
  ["console", "console", true],
  ["machine", "machine and link", true],
  ["files", "host files", false],
  ["frames", "frames", false],
];
const LAYER_OF = {
  begun: "calls", ended: "calls", state: "calls", ordered: "faults", fault: "faults", console: "console",
  machine: "machine", link: "machine", stream: "machine", took: "machine", host_file: "files", frame: "frames",
};
const LABEL_OF = {
  begun: "call", ended: "return", state: "state", ordered: "ordered", fault: "fault", console: "console",
  machine: "machine", link: "link", stream: "stream", took: "timing", host_file: "file", frame: "frame", note: "note",
};
const STATES = ["created", "starting", "running", "paused", "stopping", "stopped", "crashed"];
const MARKS = [
  ["bar ok", "operation"], ["bar error", "operation that failed"], ["bar dropped", "dropped, or never ended"],
  ["fault", "fault happens"], ["ordered", "fault ordered"], ["point", "anything else"],
];

let timelines = 0;

class Timeline {
  constructor(lines, broken) {
    this.id = `timeline-${(timelines += 1)}`;
    this.events = lines.map((line, index) => ({ ...line, index, time: line.at.secs + line.at.nanos / 1e9,
      kind: line.mark.kind, layer: LAYER_OF[line.mark.kind] ?? "notes" }));
    this.broken = broken;
    this.shown = new Set(LAYERS.filter(([, , on]) => on).map(([name]) => name).concat("notes"));
    this.needle = "";
    this.scale = 1;
    this.lanes = this.findLanes();
    this.picture = element("div", { class: "picture", tabindex: 0, role: "group",
      "aria-label": "Timeline. Left and right choose what happened before and after.", onkeydown: (event) => this.key(event) });
    this.labels = element("div", { class: "lane-names", "aria-hidden": "true" });
    this.list = element("div", { class: "events", tabindex: 0, role: "listbox", "aria-label": "Everything that happened",
      onkeydown: (event) => this.key(event) });
    this.count = element("span", { class: "dim", role: "status" });
    this.node = element("div", { class: "timeline", id: this.id }, this.controls(), this.legend(),
      element("div", { class: "stage" }, this.labels, this.picture),
      element("p", { class: "hint" },
        "Click a mark or a line; with the keyboard: ← → step, Page ↑ ↓ ten at a time, Home, End, E next failure or fault, F frames, + − zoom."),
      this.list);
    this.draw();
    // Once it stands in the document, the last line can be scrolled to.
    requestAnimationFrame(() => this.select(this.visible.at(-1)?.index ?? 0));
  }

  /** The host's lane and one for each VM, in the order in which they appear. */
  findLanes() {
    const lanes = new Map([["host", { name: "host", title: "what is not about one VM" }]]);
    for (const { vm } of this.events) {
      if (vm !== null && !lanes.has(String(vm))) {
        lanes.set(String(vm), { name: `VM ${lanes.size}`, title: `vm-${BigInt(vm).toString(16).padStart(16, "0")}` });
      }
    }
    return lanes;
  }

  laneOf(event) {
    return this.lanes.get(event.vm === null ? "host" : String(event.vm));
  }

  controls() {
    const has = new Set(this.events.map((event) => event.layer));
    const layers = LAYERS.filter(([name]) => has.has(name)).map(([name, text]) => {
      const box = element("input", { type: "checkbox", "data-layer": name, onchange: () => this.toggle(name) });
      box.checked = this.shown.has(name);
      return element("label", {}, box, ` ${text}`);
    });
    const zoom = (text, label, factor) =>
      element("button", { type: "button", "aria-label": label, onclick: () => this.zoom(factor) }, text);
    const search = element("input", { type: "search", placeholder: "find in the lines", "aria-label": "Find in the lines",
      oninput: () => { this.needle = search.value.toLowerCase(); this.draw(); } });
    return element("div", { class: "controls" },
      element("fieldset", {}, element("legend", {}, "show"), layers), search,
      element("span", {}, zoom("−", "Narrower", 1 / 1.5), zoom("+", "Wider", 1.5), zoom("fit", "Fit the width", 0)), this.count);
  }

  legend() {
    const swatch = (name, text) => element("li", {}, drawing("svg", { class: `swatch ${name}`, width: 14, height: 14,
      "aria-hidden": "true" }, this.glyph(name, 7, 7)), text);
    const states = STATES.filter((state) => this.events.some(({ mark }) => mark.from === state || mark.to === state));
    return element("ul", { class: "legend", "aria-label": "Legend" },
      states.map((state) => swatch(`state ${state}`, state)), MARKS.map(([name, text]) => swatch(name, text)));
  }

  glyph(name, x, y) {
    switch (name.split(" ")[0]) {
      case "fault": return drawing("path", { d: `M${x} ${y - 6}l6 11h-12z`, class: "fault" });
      case "ordered": return drawing("path", { d: `M${x} ${y - 6}l6 11h-12z`, class: "ordered" });
      case "point": return drawing("circle", { cx: x, cy: y, r: 3, class: "point" });
      default: return drawing("rect", { x: x - 7, y: y - 5, width: 14, height: 10, rx: 2, class: name });
    }
  }

  toggle(layer) {
    if (!this.shown.delete(layer)) this.shown.add(layer);
    const box = this.node.querySelector(`[data-layer="${layer}"]`);
    if (box) box.checked = this.shown.has(layer);
    this.draw();
  }

  zoom(factor) {
    const room = this.picture.clientWidth - 24;
    this.scale = factor === 0 ? Math.max(0.02, (this.scale * room) / this.width) : Math.min(8, Math.max(0.02, this.scale * factor));
    this.draw();
  }

  draw() {
    this.visible = this.events.filter((event) => this.shown.has(event.layer)
      && (this.needle === "" || event.text.toLowerCase().includes(this.needle)));
    this.count.textContent = `${number(this.visible.length)} of ${plural(this.events.length, "line")}`;
    this.place();
    this.drawPicture();
    this.drawList();
    if (this.chosen !== undefined) this.select(this.chosen, false);
  }

  /** Time goes to the right, each step by the logarithm of how long it is: microseconds beside hours stay legible. */
  place() {
    this.x = new Map();
    let x = 16;
    let last = null;
    for (const event of this.events) {
      const gap = last === null ? 0 : Math.max(0, event.time - last);
      const step = gap === 0 ? 3 : 6 + 7 * Math.log10(1 + gap * 1e5);
      const wide = this.shown.has(event.layer) ? step : gap === 0 ? 0 : step / 2;
      x += wide * this.scale;
      this.x.set(event.index, x);
      last = event.time;
    }
    this.width = x + 60;
  }

  /** Pairs calls with returns; calls that overlap get rows below each other. */
  calls(vm) {
    const open = new Map();
    const rows = [];
    const calls = [];
    for (const event of this.events) {
      if (event.vm !== vm) continue;
      const key = `${event.mark.operation} ${event.mark.call}`;
      if (event.kind === "begun") {
        let row = rows.findIndex((busy) => !busy);
        if (row < 0) row = rows.push(true) - 1;
        rows[row] = true;
        const call = { event, row, name: event.mark.operation, outcome: null, end: null };
        calls.push(call);
        open.set(key, call);
      } else if (event.kind === "ended" && open.has(key)) {
        const call = open.get(key);
        call.outcome = event.mark.outcome;
        call.end = event;
        rows[call.row] = false;
        open.delete(key);
      }
    }
    return { calls, rows: rows.length };
  }

  drawPicture() {
    const svg = drawing("svg", { width: Math.ceil(this.width), role: "img", "aria-label": "States, operations and faults over time" });
    const names = [];
    this.cursor = drawing("line", { class: "cursor" });
    let y = 26;
    for (const [key, lane] of this.lanes) {
      const vm = key === "host" ? null : this.events.find((event) => String(event.vm) === key).vm;
      const top = y;
      y = this.drawLane(svg, vm, y);
      names.push(element("div", { class: "lane-name", title: lane.title }, lane.name));
      names.at(-1).style.top = `${top}px`;
      names.at(-1).style.height = `${y - top}px`;
    }
    this.drawAxis(svg, y);
    const end = this.x.get(this.events.length - 1) + 8;
    svg.append(drawing("line", { x1: end, x2: end, y1: 18, y2: y, class: "end" }, drawing("title", {}, this.broken)),
      drawing("text", { x: end + 4, y: 26, class: "broken-here" }, "broken"));
    for (const [name, value] of Object.entries({ y1: 18, y2: y })) this.cursor.setAttribute(name, value);
    svg.append(this.cursor);
    svg.setAttribute("height", y + 6);
    this.labels.replaceChildren(...names);
    this.labels.style.height = `${y + 6}px`;
    this.picture.replaceChildren(svg);
  }

  drawAxis(svg, bottom) {
    let free = 0;
    for (const event of this.events) {
      const x = this.x.get(event.index);
      if (x < free) continue;
      free = x + 80;
      svg.append(drawing("line", { x1: x, x2: x, y1: 16, y2: bottom, class: "tick" }),
        drawing("text", { x: x + 3, y: 12, class: "time" }, duration(event.time)));
    }
  }

  /** Draws a lane from `y` on and gives where the next begins. */
  drawLane(svg, vm, y) {
    const events = this.events.filter((event) => event.vm === vm);
    const group = drawing("g", {});
    const { calls, rows } = this.shown.has("calls") ? this.calls(vm) : { calls: [], rows: 0 };
    const marks = y + 12;
    const band = y + 24;
    const first = vm === null ? band : band + 14;
    const end = this.x.get(this.events.length - 1) + 8;
    if (vm !== null) this.drawStates(group, events, band, end);
    for (const call of calls) {
      const from = this.x.get(call.event.index);
      const to = call.end === null ? end : this.x.get(call.end.index);
      const kind = call.outcome === "ok" ? "ok" : call.outcome === null || call.outcome === "dropped" ? "dropped" : "error";
      const top = first + 2 + call.row * 16;
      const title = `${call.event.text}${call.outcome === null ? ", never ended" : `: ${call.outcome}`}`;
      group.append(drawing("rect", { x: from, y: top, width: Math.max(4, to - from), height: 13, rx: 3, class: `bar ${kind}`,
        onclick: () => this.select(call.event.index) }, drawing("title", {}, title)));
      if (to - from > 7 * call.name.length) {
        group.append(drawing("text", { x: from + 4, y: top + 10, class: "call" }, call.name));
      }
    }
    for (const event of events) {
      if (!this.shown.has(event.layer) || ["begun", "ended", "state"].includes(event.kind)) continue;
      const x = this.x.get(event.index);
      const mark = event.kind === "frame"
        ? drawing("path", { d: `M${x} ${marks + (event.mark.sent ? -1 : 5)}v${event.mark.sent ? -6 : 6}`, class: "frame" })
        : this.glyph(["fault", "ordered"].includes(event.kind) ? event.kind : "point", x, marks);
      mark.append(drawing("title", {}, event.text));
      mark.addEventListener("click", () => this.select(event.index));
      group.append(mark);
    }
    const bottom = Math.max(first + rows * 16, y + 30) + 6;
    group.append(drawing("line", { x1: 0, x2: this.width, y1: bottom, y2: bottom, class: "rule" }));
    svg.append(group);
    return bottom;
  }

  drawStates(group, events, y, end) {
    const changes = events.filter((event) => event.kind === "state");
    const begin = this.x.get(events[0].index);
    const paint = (state, from, to, event) => {
      const known = STATES.includes(state) ? state : "created";
      group.append(drawing("rect", { x: from, y, width: Math.max(1, to - from), height: 12, class: `state ${known}`,
        onclick: () => this.select(event.index) }, drawing("title", {}, state)));
      if (to - from > 7 * state.length) {
        group.append(drawing("text", { x: from + 4, y: y + 10, class: `name ${known}` }, state));
      }
    };
    if (changes.length === 0) return;
    paint(changes[0].mark.from, begin, this.x.get(changes[0].index), events[0]);
    changes.forEach((change, at) => {
      const to = changes[at + 1] === undefined ? end : this.x.get(changes[at + 1].index);
      paint(change.mark.to, this.x.get(change.index), to, change);
    });
  }

  drawList() {
    this.list.replaceChildren(...this.visible.map((event) => element("div", { class: `event ${event.kind} ${this.mood(event)}`,
      role: "option", id: `${this.id}-${event.index}`, onclick: () => this.select(event.index) },
      element("span", { class: "time" }, `${event.time.toFixed(6)} s`),
      element("span", { class: "lane" }, this.laneOf(event).name),
      element("span", { class: "kind" }, LABEL_OF[event.kind] ?? event.kind),
      element("span", { class: "text" }, event.text.trimEnd()))));
  }

  /** Says whether people should look at it: a fault, a crash or an error. */
  mood(event) {
    const { kind, mark } = event;
    if (kind === "fault" || (kind === "state" && mark.to === "crashed")) return "alarm";
    if (kind === "ended" && !["ok", "dropped"].includes(mark.outcome)) return "warn";
    return "";
  }

  select(index, follow = true) {
    const event = this.events[index];
    const row = document.getElementById(`${this.id}-${index}`) ?? this.list.querySelector(`#${this.id}-${index}`);
    this.list.querySelector("[aria-selected]")?.removeAttribute("aria-selected");
    this.chosen = index;
    row?.setAttribute("aria-selected", "true");
    if (row) this.list.setAttribute("aria-activedescendant", row.id);
    else this.list.removeAttribute("aria-activedescendant");
    const x = this.x.get(event.index);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    if (row) {
      const { offsetTop, offsetHeight } = row;
      const { scrollTop, clientHeight } = this.list;
      if (offsetTop < scrollTop || offsetTop + offsetHeight > scrollTop + clientHeight) {
        this.list.scrollTop = offsetTop - clientHeight / 2;
      }
    }
    if (follow && (x < this.picture.scrollLeft + 20 || x > this.picture.scrollLeft + this.picture.clientWidth - 60)) {
      this.picture.scrollLeft = x - this.picture.clientWidth / 2;
    }
  }

  /** Goes so many visible lines on, or back. */
  step(by) {
    const at = this.visible.findIndex((event) => event.index >= this.chosen);
    const from = at < 0 ? this.visible.length - 1 : at;
    const to = Math.min(this.visible.length - 1, Math.max(0, from + by));
    if (this.visible.length > 0) this.select(this.visible[to].index);
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const actions = {
      ArrowLeft: () => this.step(-1), ArrowUp: () => this.step(-1), ArrowRight: () => this.step(1), ArrowDown: () => this.step(1),
      PageUp: () => this.step(-10), PageDown: () => this.step(10), Home: () => this.step(-Infinity), End: () => this.step(Infinity),
      "+": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5), f: () => this.toggle("frames"), e: () => this.nextAlarm(),
    };
    const action = actions[event.key];
    if (action === undefined) return;
    event.preventDefault();
    action();
  }

  nextAlarm() {
    const alarms = this.visible.filter((event) => this.mood(event) !== "");
    const next = alarms.find((event) => event.index > this.chosen) ?? alarms[0];
    if (next !== undefined) this.select(next.index);
  }
}

// ---- Clauses on backends

function matrix() {
  const place = document.getElementById("matrix");
  const groups = new Map();
  for (const [at, session] of sessions.entries()) {
    for (const clause of session.per_clause) {
      if (!groups.has(clause.group)) groups.set(clause.group, new Map());
      const group = groups.get(clause.group);
      if (!group.has(clause.id)) group.set(clause.id, { promise: clause.promise, cells: sessions.map(() => null) });
      group.get(clause.id).cells[at] = clause;
    }
  }
  const body = element("tbody");
  const filter = element("input", { type: "search", placeholder: "find a clause", "aria-label": "Find a clause", oninput: show });
  const only = element("select", { "aria-label": "Which clauses", onchange: show },
    [["all", "all clauses"], ["failed", "only failed"], ["ignored", "only ignored"]]
      .map(([value, text]) => element("option", { value }, text)));
  const broke = (rows) => rows.some((row) => row.cells.some((cell) => cell?.failed > 0));
  const opened = new Set([...groups].filter(([, clauses]) => broke([...clauses.values()])).map(([name]) => name));
  const turn = (name) => {
    if (!opened.delete(name)) opened.add(name);
    show();
    body.querySelector(`[data-group="${name}"]`)?.focus();
  };
  const all = (open) => element("button", { type: "button", onclick: () => {
    opened.clear();
    if (open) [...groups.keys()].forEach((name) => opened.add(name));
    show();
  } }, open ? "open all" : "close all");
  function show() {
    const needle = filter.value.trim();
    const searched = needle !== "" || only.value !== "all";
    const chosen = ([id, row]) => (id.includes(needle) || row.promise.includes(needle))
      && (only.value === "all" || row.cells.some((cell) => cell && (only.value === "failed" ? cell.failed > 0 : cell.ignored !== null)));
    const rows = [];
    for (const [name, clauses] of groups) {
      const kept = [...clauses].filter(chosen);
      if (kept.length === 0) continue;
      const open = searched || opened.has(name);
      rows.push(element("tr", { class: "group" }, element("th", { scope: "row" },
        element("button", { type: "button", "data-group": name, "aria-expanded": String(open), onclick: () => turn(name) },
          `${open ? "▾" : "▸"} ${name}`), element("span", { class: "dim" }, plural(kept.length, "clause"))),
        sessions.map((_, at) => total(kept.map(([, row]) => row.cells[at])))));
      if (!open) continue;
      rows.push(...kept.map(([id, row]) => element("tr", {}, element("th", { scope: "row" }, element("div", { class: "clause" },
        element("span", { class: "id" }, id.slice(id.indexOf(".") + 1)), element("span", { class: "promise" }, row.promise))),
        row.cells.map(cell))));
    }
    if (rows.length === 0) rows.push(element("tr", {}, element("td", { colspan: sessions.length + 1 }, "No such clause.")));
    body.replaceChildren(...rows);
  }
  show();
  place.append(element("div", { class: "controls" }, filter, only, element("span", {}, all(true), all(false))),
    element("div", { class: "wide" }, element("table", { class: "matrix" },
      element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "clause and promise"),
        sessions.map((session) => element("th", { scope: "col" }, session.backend)))), body)));
}

/** What a group came to on a backend. */
function total(cells) {
  const count = (wanted) => cells.filter((cell) => cell !== null && wanted(cell)).length;
  const failed = count((cell) => cell.failed > 0);
  const ignored = count((cell) => cell.ignored !== null);
  const kept = count((cell) => cell.failed === 0 && cell.runs > 0);
  const parts = [
    failed > 0 ? element("span", { class: "bad" }, `✗ ${number(failed)} broken `) : null,
    kept > 0 ? element("span", { class: "good" }, `✓ ${number(kept)} kept `) : null,
    ignored > 0 ? element("span", { class: "dim" }, `– ${number(ignored)} ignored`) : null,
  ];
  return element("td", {}, parts.every((part) => part === null) ? "–" : parts);
}

function cell(clause) {
  if (clause === null) return element("td", { class: "dim" }, "not planned");
  if (clause.ignored !== null) return element("td", { class: "ignored", title: clause.ignored }, "– ", element("small", {}, clause.ignored));
  if (clause.failed > 0) return element("td", { class: "bad" }, `✗ ${number(clause.failed)} of ${number(clause.runs)} failed`);
  if (clause.runs === 0) return element("td", { class: "dim" }, "no run ended");
  return element("td", { class: "good" }, `✓ ${plural(clause.runs, "run")}`);
}

// ---- Faults

function faults() {
  const place = document.getElementById("faults");
  place.append(element("p", {}, "How often each fault happened while the clauses of a group ran, and how often their checks ordered it. ",
    "The stronger the colour, the more often. Faults happen without an order too: half of the simulator's seeds have some that no promise may be affected by."));
  for (const session of sessions) {
    const kinds = Object.keys(session.faults_fired);
    place.append(element("h3", {}, session.backend));
    if (kinds.length === 0) place.append(element("p", {}, "This backend makes no faults happen."));
    else if (session.runs === 0) place.append(element("p", {}, `Nothing ran; ${plural(kinds.length, "kind")} of fault could happen.`));
    else place.append(heatMap(session, kinds));
  }
}

function heatMap(session, kinds) {
  const groups = new Map();
  for (const clause of session.per_clause) {
    if (clause.ignored !== null) continue;
    if (!groups.has(clause.group)) groups.set(clause.group, { fired: {}, ordered: {} });
    const group = groups.get(clause.group);
    for (const [into, from] of [[group.fired, clause.faults_fired], [group.ordered, clause.faults_ordered]]) {
      for (const [kind, times] of Object.entries(from)) into[kind] = (into[kind] ?? 0) + times;
    }
  }
  const most = Math.max(1, ...[...groups.values()].flatMap(({ fired }) => Object.values(fired)));
  const row = (kind) => {
    const all = session.faults_fired[kind];
    return element("tr", {}, element("th", { scope: "row" }, kind),
      element("td", { class: all === 0 ? "bad" : null }, all === 0 ? "never" : number(all)),
      [...groups].map(([name, { fired, ordered }]) => {
        const [happened, asked] = [fired[kind] ?? 0, ordered[kind] ?? 0];
        const title = `${kind} in ${name}: happened ${number(happened)} times, ordered ${number(asked)} times`;
        const node = element("td", { class: happened > 0 ? "heat" : asked > 0 ? "unfired" : "none", title },
          happened === 0 && asked === 0 ? "" : number(happened), asked > 0 ? element("small", {}, ` / ${number(asked)}`) : null);
        node.style.setProperty("--heat", happened === 0 ? 0 : (0.15 + 0.85 * Math.log(1 + happened) / Math.log(1 + most)).toFixed(3));
        return node;
      }));
  };
  return element("div", {},
    element("ul", { class: "legend" },
      element("li", {}, element("b", {}, "12"), " happened 12 times, never on order"),
      element("li", {}, element("b", {}, "12 / 8"), " happened 12 times, ordered 8 times"),
      element("li", { class: "unfired" }, element("b", {}, "0 / 8"), " ordered and never happened")),
    element("div", { class: "wide", tabindex: 0, role: "region", "aria-label": `Faults on ${session.backend}` }, element("table", { class: "heat-map" },
      element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "fault"), element("th", { scope: "col" }, "in all"),
        [...groups.keys()].map((name) => element("th", { scope: "col", class: "slanted" }, element("span", {}, name))))),
      element("tbody", {}, kinds.map(row)))));
}

summary();
failures();
matrix();
faults();
