"use strict";
// Draws what /api/events sends. Everything that comes from the swarm is set as text, never as markup.

const HISTORY_LENGTH = 300, LOG_LENGTH = 200, MAX_DRAWN_CELLS = 65536;
const PLOT_HEIGHT = 132, PLOT_LEFT = 44, PLOT_BOTTOM = 20, PLOT_TOP = 8;
const WORDS = { version: "optimizer steps", busy: "load of the server", replicas: "replicas", lag: "steps behind" };
const COLUMN = { version: 3, busy: 4, replicas: 2, lag: 5 }; // of an expert's row in a grid

const SPANS = { "5 min": 300, "1 h": 3600, "1 day": 86400 };

const $ = (id) => document.getElementById(id);
let state = null;
let dark = false, colours = {};
const cursors = Object.create(null); // prefix -> [row, column]
const pointed = {}; // series -> x of the pointer over its plot
const sorting = {}; // table -> [column, 1 or -1]
let opened = null; // the address of the page of one expert or server, and what the node told of it

// ---------------------------------------------------------------------------------------------- words and colours

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}
const number = (value, digits = 0) =>
  value === null || value === undefined ? "–"
  : Math.abs(value) >= 1e15 ? value.toExponential(2) : value.toLocaleString("en", { maximumFractionDigits: digits });
const short = (value) => Math.abs(value) >= 1000
  ? value.toLocaleString("en", { notation: "compact", maximumFractionDigits: 1 })
  : number(value, Math.abs(value) < 1 ? 3 : Math.abs(value) < 10 ? 2 : 0);
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${number(seconds / 3600, 1)} h`;
  return `${Math.round(seconds / 86400)} d`;
}
function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 0.001 ? `${number(1e6 * value)} µs` : `${number(1000 * value, value < 0.1 ? 1 : 0)} ms`;
}

function readColours() {
  dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const style = getComputedStyle(document.documentElement);
  for (const name of ["front", "soft", "line", "empty", "accent", "bad", "lost", "card", "back"]) {
    colours[name] = style.getPropertyValue(`--${name}`).trim();
  }
}
// golden-angle hues: servers met one after the other differ, however many there are
const serverColour = (peer) => peer ? `hsl(${(205 + peer.number * 137.5) % 360} 58% ${dark ? 62 : 46}%)` : colours.soft;
// one hue from faint to full, so that it reads without telling colours apart
const heat = (share) => `hsl(${212 - 12 * share} ${45 + 35 * share}% ${dark ? 26 + 48 * share : 84 - 52 * share}%)`;

// ---------------------------------------------------------------------------------------------- totals

// a dead server's experts live on in its manifest for some seconds: they are not counted
const answering = (grid) => grid.experts.filter((expert) => !state.peers[expert[1]]?.gone).length;

function drawTotals() {
  const totals = state.totals;
  const alive = state.grids.reduce((sum, grid) => sum + answering(grid), 0);
  const all = state.grids.reduce((sum, grid) => sum + grid.size.reduce((a, b) => a * b, 1), 0);
  const present = state.peers.filter((peer) => peer.left_ago === null || peer.left_ago === undefined);
  const silent = present.filter((peer) => peer.error).length;
  const seen = Object.entries(state.seen).sort((a, b) => b[1] - a[1])[0] ?? ["samples", 0];
  const cards = [
    ["live experts", number(alive), all ? ` of ${number(all)}` : "", false],
    [present.length === 1 ? "server" : "servers", number(present.length), silent ? ` ${silent} silent` : "", silent > 0],
    ["calls per second", number(totals.calls_per_second ?? 0, 0)],
    ["rows per second", number(totals.rows_per_second ?? 0)],
    ["steps per second", number(totals.steps_per_second ?? 0, 1)],
    [`${seen[0]} seen`, seen[1] ? short(seen[1]) : "–"],
    totals.merged === undefined ? ["loss, mean", number(totals.loss, 4)] : ["loss, merged", number(totals.merged, 4)],
  ];
  $("totals").replaceChildren(...cards.map(([label, value, more, bad]) => {
    const card = element("div", undefined, bad ? "bad" : ""), strong = element("b", value);
    if (more) strong.append(element("small", more));
    card.append(strong, element("span", label));
    return card;
  }));
}

function drawRun() {
  const run = state.run;
  $("title").textContent = run ? run.name.split("@")[0] : "Tesseract swarm";
  if (!run) {
    $("run").textContent = state.grids.length ? "Experts outside of runs." : "";
    return;
  }
  const safety = run.losses === null ? "how safe they are is not known yet"
    : run.losses > 0 ? `survives the loss of any ${run.losses === 1 ? "member" : `${number(run.losses)} members`}`
    : run.losses < 0 ? "has lost experts" : "may lose experts with the next member that goes";
  const risky = run.at_risk ? `; ${number(run.at_risk)} expert${run.at_risk === 1 ? " is" : "s are"} at risk, led by nobody or lost` : "";
  $("run").title = run.name;
  $("run").textContent = `Run ${run.name.replace(/@(.{8}).*/, "@$1…")}, ${run.mode}: ${number(run.num_experts)} experts (${run.expert})`
    + (run.parameters ? `, ${short(run.parameters)} parameters in total` : "") + `; ${safety}${risky}.`;
}

// ---------------------------------------------------------------------------------------------- grids

// a grid of any number of dimensions as a sheet: the first one downwards, the others flattened to the right
function sheet(grid) {
  if (grid.size.length === 1) { // one dimension: wrapped like text
    const columns = Math.min(grid.size[0], 32);
    return { rows: Math.ceil(grid.size[0] / columns), columns };
  }
  return { rows: grid.size[0], columns: grid.size.slice(1).reduce((a, b) => a * b, 1) };
}
function place(grid, coords) {
  if (grid.size.length === 1) {
    const { columns } = sheet(grid);
    return [Math.floor(coords[0] / columns), coords[0] % columns];
  }
  let column = 0;
  for (let i = 1; i < coords.length; i++) column = column * grid.size[i] + coords[i];
  return [coords[0], column];
}
function coordsAt(grid, [row, column]) {
  if (grid.size.length === 1) return [row * sheet(grid).columns + column];
  const coords = [];
  for (let i = grid.size.length - 1; i > 0; i--) {
    coords.unshift(column % grid.size[i]);
    column = Math.floor(column / grid.size[i]);
  }
  return [row, ...coords];
}

// nobody hosts it at this moment, but members of its run have its state
const waits = (grid, coords) => (grid.standings ?? []).some((one) => String(one[0]) === String(coords) && one[2].length + one[3].length);

function drawGrids() {
  const holder = $("grids");
  $("detail").hidden = state.grids.length === 0;
  if (state.grids.length === 0) {
    if (!holder.querySelector(".quiet")) {
      const lines = [
        element("p", "No expert is alive yet: this node knows of no server.", "quiet"),
        element("p", "Start one, on this computer or on another that reaches this node:", "quiet"),
        element("p"),
        element("p", "It appears here by itself within seconds.", "quiet"),
      ];
      lines[2].append(element("code", `tesseract serve --experts 'ffn.[0:4].[0:4]' --initial-peers ${state.node.join || state.node.address}`));
      holder.replaceChildren(...lines);
    }
    return;
  }
  holder.querySelectorAll(":scope > p").forEach((line) => line.remove());
  for (const grid of state.grids) {
    let box = [...holder.children].find((one) => one.dataset.prefix === grid.prefix);
    if (!box) {
      box = element("div", undefined, "grid");
      box.dataset.prefix = grid.prefix;
      const canvas = element("canvas");
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "application");
      canvas.addEventListener("keydown", (event) => moveCursor(event, grid.prefix));
      canvas.addEventListener("pointermove", (event) => pointAt(event, grid.prefix));
      canvas.addEventListener("click", (event) => { pointAt(event, grid.prefix); openCursor(grid.prefix); });
      canvas.addEventListener("focus", () => { cursors[grid.prefix] ??= [0, 0]; show(grid.prefix); });
      box.append(element("p"), canvas);
      holder.append(box);
    }
    const all = grid.size.reduce((a, b) => a * b, 1);
    const waiting = grid.lost.filter((coords) => waits(grid, coords)).length, lost = grid.lost.length - waiting;
    const gone = (lost ? `, ${number(lost)} lost` : "")
      + (waiting ? `, ${number(waiting)} wait${waiting === 1 ? "s" : ""} for another server` : "");
    const risky = (grid.standings ?? []).filter((one) => one[6] !== "safe").length;
    const safety = risky ? `, ${number(risky)} at risk, not led or lost` : "";
    const line = `${grid.prefix}: ${number(answering(grid))} of ${number(all)} experts alive${gone}${safety} (${grid.size.join(" × ")})`;
    box.querySelector("p").textContent = all > MAX_DRAWN_CELLS ? `${line}: too many to draw` : line;
    const canvas = box.querySelector("canvas");
    canvas.hidden = all > MAX_DRAWN_CELLS;
    canvas.setAttribute("aria-label", `${line}. Arrow keys move from expert to expert.`);
    if (!canvas.hidden) drawSheet(canvas, grid);
  }
}

// the largest value that the chosen colours show, over all grids: one legend for all
function most(by) {
  let found = by === "busy" ? 1 : 0;
  for (const grid of state.grids) for (const expert of grid.experts) found = Math.max(found, expert[COLUMN[by]] ?? 0);
  return found || 1;
}

function prepare(canvas, width, height) {
  canvas.style.width = `${width}px`;
  const scale = devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = `${height}px`;
  const draw = canvas.getContext("2d");
  draw.scale(scale, scale);
  return draw;
}

function drawSheet(canvas, grid) {
  const { rows, columns } = sheet(grid), width = canvas.parentElement.clientWidth, by = $("colour").value;
  // a third of the first screen at most
  const cell = Math.min(64, width / columns, Math.max(3, 0.34 * innerHeight / rows));
  const draw = prepare(canvas, Math.floor(cell * columns), Math.ceil(cell * rows));
  const gap = cell > 14 ? 2 : cell > 5 ? 1 : 0, side = Math.max(1, cell - gap), all = grid.size.reduce((a, b) => a * b, 1);
  const fill = (coords, colour) => {
    const [row, column] = place(grid, coords);
    draw.fillStyle = colour;
    draw.fillRect(column * cell, row * cell, side, side);
    return [column * cell, row * cell];
  };
  draw.fillStyle = colours.empty;
  for (let n = 0; n < all; n++) draw.fillRect((n % columns) * cell, Math.floor(n / columns) * cell, side, side);
  for (const coords of grid.lost) {
    const [x, y] = fill(coords, colours.lost);
    draw.strokeStyle = colours.bad;
    draw.lineWidth = cell > 10 ? 2 : 1;
    if (cell > 4) draw.strokeRect(x + 1, y + 1, side - 2, side - 2);
  }
  const limit = COLUMN[by] ? most(by) : 1;
  for (const expert of grid.experts) {
    const peer = state.peers[expert[1]];
    const [x, y] = fill(expert[0], COLUMN[by] ? heat((expert[COLUMN[by]] ?? 0) / limit) : serverColour(peer));
    if (peer && peer.error) { // its server does not answer: striped, since colours alone do not tell everybody
      draw.save();
      draw.beginPath();
      draw.rect(x, y, side, side);
      draw.clip();
      draw.fillStyle = colours.empty;
      draw.globalAlpha = 0.75;
      draw.fillRect(x, y, side, side);
      draw.globalAlpha = 1;
      draw.strokeStyle = colours.bad;
      draw.lineWidth = Math.max(1, cell / 12);
      draw.beginPath();
      for (let offset = -side; offset < side; offset += Math.max(3, cell / 4)) {
        draw.moveTo(x + offset, y + side);
        draw.lineTo(x + offset + side, y);
      }
      draw.stroke();
      draw.restore();
    }
  }
  canvas.dataset.cell = cell;
  const cursor = cursors[grid.prefix];
  if (cursor) {
    draw.strokeStyle = colours.card;
    draw.lineWidth = 5;
    draw.strokeRect(cursor[1] * cell, cursor[0] * cell, side, side);
    draw.strokeStyle = colours.front;
    draw.lineWidth = 2;
    draw.strokeRect(cursor[1] * cell, cursor[0] * cell, side, side);
  }
}

function drawLegend() {
  const legend = $("legend"), by = $("colour").value, items = [];
  const entry = (mark, text) => {
    const item = element("li");
    item.append(mark, element("span", text));
    items.push(item);
  };
  const swatch = (kind) => element("span", undefined, `swatch ${kind}`);
  if (state.grids.length) {
    if (COLUMN[by]) {
      const ramp = element("span", undefined, "ramp"), limit = most(by);
      ramp.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(heat).join(", ")})`;
      const say = (value) => by === "busy" ? `${number(100 * value)} %` : number(value);
      entry(ramp, `${WORDS[by]}: ${say(0)} to ${say(limit)}`);
    } else {
      for (const peer of state.peers.slice(0, 8)) {
        const mark = swatch("");
        mark.style.background = serverColour(peer);
        entry(mark, peer.short);
      }
      if (state.peers.length > 8) entry(element("span"), `and ${state.peers.length - 8} more`);
    }
    entry(swatch("silent"), "server does not answer");
    entry(swatch("gone"), "lost");
    entry(swatch("empty"), "nobody yet");
  }
  legend.replaceChildren(...items);
}

function show(prefix) {
  const grid = state.grids.find((one) => one.prefix === prefix), cursor = cursors[prefix];
  if (!grid || !cursor) return;
  describe(grid, cursor);
  const canvas = [...$("grids").children].find((one) => one.dataset.prefix === prefix)?.querySelector("canvas");
  if (canvas && !canvas.hidden) drawSheet(canvas, grid);
}

function describe(grid, cursor) {
  const coords = coordsAt(grid, cursor), uid = `${grid.prefix}.${coords.join(".")}`;
  const same = (one) => one.length === coords.length && one.every((at, i) => at === coords[i]);
  const expert = grid.experts.find((one) => same(one[0]));
  let text;
  if (expert) {
    const peer = state.peers[expert[1]], replicas = expert[2];
    text = `${uid}: on server ${peer ? peer.short : "unknown"}, ${replicas} replica${replicas === 1 ? "" : "s"}, `
      + (expert[3] === null ? "version not known yet" : `version ${number(expert[3])}`)
      + (expert[5] ? ` (its slowest replica is ${number(expert[5])} behind)` : "")
      + `, server ${number(100 * expert[4])} % busy`
      + (peer && peer.error ? `. The server does not answer: ${peer.error}` : ".");
  } else if (grid.lost.some(same)) {
    text = waits(grid, coords) ? `${uid}: its server is gone; a member that has its state takes over.`
      : `${uid}: lost. It was alive, and nobody hosts it now.`;
  } else {
    text = `${uid}: nobody hosts this expert yet.`;
  }
  const standing = (grid.standings ?? []).find((one) => same(one[0]));
  if (standing) {
    const [, leader, followers, holders, version, losses, word] = standing;
    const list = (some) => (some.length ? some.join(", ") : "nobody");
    text += ` Led by ${leader ?? "nobody"}, followed by ${list(followers)}, held by ${list(holders)}; version `
      + `${number(version)} certified; ${word}`
      + (losses > 0 ? `: survives the loss of ${number(losses)} more member${losses === 1 ? "" : "s"}.` : ".");
  }
  const detail = $("detail");
  if (detail.textContent !== text) detail.textContent = text;
}

function openCursor(prefix) {
  const grid = state.grids.find((one) => one.prefix === prefix);
  if (grid && cursors[prefix]) location.hash = encodeURI(`expert/${prefix}.${coordsAt(grid, cursors[prefix]).join(".")}`);
}

function moveCursor(event, prefix) {
  if (event.key === "Enter") { openCursor(prefix); return; }
  const grid = state.grids.find((one) => one.prefix === prefix), { rows, columns } = sheet(grid);
  const [r, c] = cursors[prefix] ?? [0, 0];
  const to = {
    ArrowUp: [r - 1, c], ArrowDown: [r + 1, c], ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1],
    Home: [r, 0], End: [r, columns - 1], PageUp: [0, c], PageDown: [rows - 1, c],
  }[event.key];
  if (!to) return;
  event.preventDefault();
  cursors[prefix] = [Math.max(0, Math.min(rows - 1, to[0])), Math.max(0, Math.min(columns - 1, to[1]))];
  show(prefix);
}

function pointAt(event, prefix) {
  const cell = Number(event.target.dataset.cell), box = event.target.getBoundingClientRect();
  const { rows, columns } = sheet(state.grids.find((one) => one.prefix === prefix));
  const at = [Math.floor((event.clientY - box.top) / cell), Math.floor((event.clientX - box.left) / cell)];
  if (at[0] < 0 || at[1] < 0 || at[0] >= rows || at[1] >= columns || String(at) === String(cursors[prefix])) return;
  cursors[prefix] = at;
  show(prefix);
}

// ---------------------------------------------------------------------------------------------- over time

// a round number that is not less, for the top of a scale
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 1.5, 2, 3, 4, 5, 8, 10].find((factor) => factor * power >= value * 0.999);
}

function drawPlot(canvas) {
  const series = canvas.dataset.series, caption = canvas.parentElement.querySelector("figcaption");
  const all = state.history[$("span").value], since = (all.at(-1)?.time ?? 0) - SPANS[$("span").value];
  const history = all.filter((point) => point.time >= since), points = history.filter((point) => point[series] !== undefined);
  const width = canvas.parentElement.clientWidth, draw = prepare(canvas, width, PLOT_HEIGHT);
  const right = width - 6, bottom = PLOT_HEIGHT - PLOT_BOTTOM;
  draw.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  draw.fillStyle = colours.soft;
  let now = caption.querySelector("b");
  if (!now) caption.append(now = element("b"));
  if (points.length === 0) {
    const why = series === "loss" ? "no trainer has published any" : "nothing measured yet";
    draw.fillText(why, PLOT_LEFT, PLOT_HEIGHT / 2);
    now.textContent = "";
    canvas.setAttribute("aria-label", `${caption.firstChild.textContent}: ${why}`);
    return;
  }
  const values = points.map((point) => point[series]);
  // each trainer's loss beside the mean of all, and that of the parameters that they share
  const others = series === "loss" ? [...new Set(points.flatMap(Object.keys))].filter((name) => name.startsWith("loss ")) : [];
  const merged = series === "loss" ? points.filter((point) => point.merged !== undefined) : [];
  const top = ceiling(Math.max(...values, ...["merged", ...others].flatMap((name) => points.map((point) => point[name] ?? 0))));
  const until = history.at(-1).time, from = history[0].time, span = Math.max(10, until - from);
  const x = (time) => right - (until - time) / span * (right - PLOT_LEFT);
  const y = (value) => bottom - Math.max(0, value) / top * (bottom - PLOT_TOP);
  draw.strokeStyle = colours.line;
  draw.lineWidth = 1;
  draw.textAlign = "right";
  for (const share of [0, 0.5, 1]) {
    const at = Math.round(y(share * top)) + 0.5;
    draw.beginPath();
    draw.moveTo(PLOT_LEFT, at);
    draw.lineTo(right, at);
    draw.stroke();
    draw.fillText(short(share * top), PLOT_LEFT - 6, at + 4);
  }
  draw.fillText("now", right, PLOT_HEIGHT - 4);
  draw.textAlign = "left";
  draw.fillText(`${duration(span)} ago`, PLOT_LEFT, PLOT_HEIGHT - 4);
  // when servers were lost: the reason for most dents
  draw.strokeStyle = colours.bad;
  draw.setLineDash([3, 3]);
  for (const [time, , kind] of state.log) {
    if (time < from || (kind !== "left" && kind !== "failed")) continue;
    draw.beginPath();
    draw.moveTo(Math.round(x(time)) + 0.5, PLOT_TOP);
    draw.lineTo(Math.round(x(time)) + 0.5, bottom);
    draw.stroke();
  }
  draw.setLineDash([]);
  others.forEach((name) => {
    draw.beginPath();
    points.filter((point) => point[name] !== undefined)
      .forEach((point, index) => draw[index ? "lineTo" : "moveTo"](x(point.time), y(point[name])));
    draw.strokeStyle = curveColour(name.slice("loss ".length));
    draw.lineWidth = 1;
    draw.stroke();
  });
  if (merged.length) {
    draw.beginPath();
    merged.forEach((point, index) => draw[index ? "lineTo" : "moveTo"](x(point.time), y(point.merged)));
    draw.strokeStyle = draw.fillStyle = colours.front;
    draw.lineWidth = 2;
    draw.setLineDash([6, 4]);
    draw.stroke();
    draw.setLineDash([]);
    draw.textAlign = "right";
    draw.fillText(`╌ merged ${number(merged.at(-1).merged, 4)}`, right, PLOT_TOP + 10);
  }
  draw.beginPath();
  points.forEach((point, index) => draw[index ? "lineTo" : "moveTo"](x(point.time), y(point[series])));
  draw.strokeStyle = colours.accent;
  draw.lineWidth = 2;
  draw.lineJoin = "round";
  draw.stroke();
  draw.lineTo(x(points.at(-1).time), bottom);
  draw.lineTo(x(points[0].time), bottom);
  draw.globalAlpha = 0.14;
  draw.fillStyle = colours.accent;
  draw.fill();
  draw.globalAlpha = 1;
  let chosen = points.at(-1), when = "";
  if (pointed[series] !== undefined) {
    for (const point of points) if (Math.abs(x(point.time) - pointed[series]) < Math.abs(x(chosen.time) - pointed[series])) chosen = point;
    draw.fillStyle = colours.accent;
    draw.beginPath();
    draw.arc(x(chosen.time), y(chosen[series]), 4, 0, 7);
    draw.fill();
    when = `${new Date(1000 * chosen.time).toLocaleTimeString()}: `;
  }
  now.textContent = `${when}${number(chosen[series], series === "loss" ? 4 : 1)}`;
  canvas.setAttribute("aria-label", `${caption.firstChild.textContent}: now ${number(values.at(-1), 4)}, `
    + `between ${number(Math.min(...values), 4)} and ${number(Math.max(...values), 4)} in the last ${duration(span)}`
    + (merged.length ? `; merged ${number(merged.at(-1).merged, 4)}` : ""));
}

const plots = [...document.querySelectorAll("canvas[data-series]")];
for (const canvas of plots) {
  const at = (event) => {
    pointed[canvas.dataset.series] = event?.clientX === undefined ? undefined : event.clientX - canvas.getBoundingClientRect().left;
    if (state) drawPlot(canvas);
  };
  canvas.addEventListener("pointermove", at);
  canvas.addEventListener("pointerleave", () => at());
}

// ---------------------------------------------------------------------------------------------- lists

// of a trainer, by its name: the curve's and, in the table, the chip's
function curveColour(name) {
  let hash = 7;
  for (const letter of name) hash = (31 * hash + letter.codePointAt(0)) % 3600;
  return `hsl(${hash / 10} 55% ${dark ? 62 : 46}%)`;
}
function titled(text, title) {
  const made = element("span", text);
  made.title = title;
  return made;
}
const nameOf = (one) => one.name ? `${one.name} (${one.short})` : one.short;

function link(hash, text) {
  const made = element("a", text);
  made.href = `#${encodeURI(hash)}`;
  return made;
}

// rows of [cells, className, order]: what is shown, and by which the columns are sorted
function fill(body, rows) {
  const table = body.closest("table"), heads = [...table.querySelectorAll("th")];
  const labels = heads.map((head) => head.dataset.label ?? head.textContent);
  heads.forEach((head, column) => {
    if (!head.dataset.label) {
      head.dataset.label = head.textContent;
      const button = element("button", head.textContent);
      button.type = "button";
      button.addEventListener("click", () => {
        const [before, way] = sorting[body.id] ?? [];
        sorting[body.id] = [column, before === column ? -way : column ? -1 : 1]; // numbers: the largest first
        draw();
      });
      head.replaceChildren(button);
    }
    const [by, way] = sorting[body.id] ?? [];
    head.setAttribute("aria-sort", by !== column ? "none" : way > 0 ? "ascending" : "descending");
  });
  if (sorting[body.id]) {
    const [column, way] = sorting[body.id];
    const least = (value) => value === null || value === undefined ? -Infinity : value;
    rows = rows.slice().sort((a, b) => {
      const [x, y] = [least(a[2][column]), least(b[2][column])];
      return way * (x < y ? -1 : x > y ? 1 : 0);
    });
  }
  body.replaceChildren(...rows.map(([cells, className]) => {
    const row = element("tr", undefined, className);
    row.append(...cells.map((content, index) => {
      const cell = element("td");
      cell.append(content instanceof Node ? content : String(content));
      cell.dataset.label = labels[index];
      return cell;
    }));
    return row;
  }));
}

function drawPeers() {
  $("no-peers").hidden = state.peers.length > 0;
  $("peers").closest("table").hidden = state.peers.length === 0;
  const rows = state.peers.map((peer) => {
    const left = peer.left_ago !== null && peer.left_ago !== undefined, first = element("span");
    const chip = element("span", undefined, `swatch${left ? " empty" : peer.error ? " silent" : ""}`);
    if (!peer.error && !left) chip.style.background = serverColour(peer);
    first.append(chip, link(`server/${peer.peer_id}`, nameOf(peer)));
    first.title = peer.peer_id;
    const path = left ? `left ${duration(peer.left_ago)} ago` : peer.error ? `does not answer: ${peer.error}`
      : peer.path ?? peer.addresses[0] ?? "–";
    const order = [
      nameOf(peer), path, peer.rtt, peer.num_experts, peer.calls_per_second, peer.rows_per_second, peer.steps_per_second,
      peer.busy, peer.slow, peer.failures, peer.uptime, peer.answered_ago,
    ];
    return [[
      first, path, seconds(peer.rtt), number(peer.num_experts), number(peer.calls_per_second, 1),
      number(peer.rows_per_second), number(peer.steps_per_second, 1), `${number(100 * peer.busy)} %`,
      peer.slow ? seconds(peer.slow) : "–", number(peer.failures), duration(peer.uptime),
      peer.answered_ago === null ? "never" : `${duration(peer.answered_ago)} ago`,
    ], left ? "left" : peer.error ? "silent" : "", order];
  });
  rows.sort((a, b) => (a[1] === "left") - (b[1] === "left"));
  fill($("peers"), rows);
}

function drawContributors() {
  const some = state.contributors;
  $("no-thanks").hidden = some.length > 0;
  $("thanks").closest("table").hidden = some.length === 0;
  const named = (one) => {
    const made = link(`server/${one.peer_id}`, one.name || one.short);
    if (one.name) made.append(element("span", ` (${one.short})`, "id"));
    return made;
  };
  fill($("thanks"), some.map((one) => [
    [named(one), number(one.rows), number(one.steps), number(one.hours), number(one.trainers)],
    "", [nameOf(one), one.rows, one.steps, one.hours, one.trainers],
  ]));
}

function drawTrainers() {
  const trainers = Object.entries(state.losses);
  $("trainers").hidden = trainers.length === 0;
  const chipped = (name) => {
    const made = element("span", undefined, "swatch"), both = element("span");
    made.style.background = curveColour(name);
    both.append(made, name);
    return both;
  };
  fill($("losses"), trainers.map(([name, [step, loss, leftOut, seen, unit]]) => [
    [chipped(name), short(step), number(loss, 4), titled(seen ? short(seen) : "–", `${number(seen)} ${unit}`), short(leftOut)], "",
    [name, step, loss, seen, leftOut],
  ]));
}

// ---------------------------------------------------------------------------------------------- one expert, one server

async function open() {
  const [kind, ...rest] = decodeURIComponent(location.hash.slice(1)).split("/"), name = rest.join("/");
  document.body.classList.toggle("one", kind === "expert" || kind === "server");
  if (kind !== "expert" && kind !== "server") { opened = null; drawOne(); return; }
  const address = kind === "expert" ? `api/expert?uid=${encodeURIComponent(name)}` : `api/server?peer=${encodeURIComponent(name)}`;
  const fresh = opened?.address !== address;
  if (fresh) opened = { address, kind, name, told: null };
  try {
    const answer = await fetch(address), told = answer.ok ? await answer.json() : { error: (await answer.text()).trim() };
    if (opened?.address === address) opened.told = told;
  } catch { /* the header says that the node does not answer */ }
  drawOne();
  if (fresh && opened) $("one-title")?.focus();
}

function facts(pairs) {
  const list = element("dl");
  for (const [what, said] of pairs) {
    const box = element("div"), value = element("dd");
    value.append(said instanceof Node ? said : String(said));
    box.append(element("dt", what), value);
    list.append(box);
  }
  return list;
}

function plainTable(id, heads, rows) {
  const table = element("table"), head = element("thead"), line = element("tr"), body = element("tbody");
  heads.forEach((text) => { const cell = element("th", text); cell.scope = "col"; line.append(cell); });
  head.append(line);
  body.id = id;
  table.append(head, body);
  fill(body, rows);
  return table;
}

const figuresOf = (one) => [
  number(one.version), number(one.num_calls), number(one.num_rows), one.num_calls ? `${number(100 * one.num_failures / one.num_calls, 2)} %` : "–",
  one.median_seconds ? seconds(one.median_seconds) : "–", one.slow_seconds ? seconds(one.slow_seconds) : "–",
];
const orderOf = (one) => [one.version, one.num_calls, one.num_rows, one.num_failures / (one.num_calls || 1), one.median_seconds, one.slow_seconds];
const FIGURES = ["version", "calls", "rows", "failed", "half within", "99 % within"];

function drawOne() {
  const box = $("one");
  box.hidden = opened === null;
  if (opened === null || !state) return;
  const { kind, name, told } = opened, title = element("h2", kind === "expert" ? `Expert ${name}` : `Server ${name.slice(0, 8)}`);
  title.id = "one-title";
  title.tabIndex = -1;
  const had = document.activeElement?.id === "one-title";
  const parts = [link("", "← the whole swarm"), title];
  if (!told) parts.push(element("p", "asking the node …", "quiet"));
  else if (told.error) parts.push(element("p", told.error, "quiet"));
  else if (kind === "expert") {
    if (told.standing) {
      const [, leader, followers, holders, version, losses, word] = told.standing;
      const called = (id) => nameOf(state.peers.find((one) => one.short === id) ?? { short: id });
      const list = (some) => (some.length ? some.map(called).join(", ") : "nobody");
      parts.push(facts([
        ["led by", leader === null ? "nobody" : called(leader)], ["followed by", list(followers)], ["held by", list(holders)],
        ["certified version", number(version)], ["state", losses > 0 ? `${word}: survives ${number(losses)} more` : word],
      ]));
    }
    parts.push(plainTable("one-rows", ["server", "role", ...FIGURES], told.servers.map((one) => [
      [link(`server/${one.peer_id}`, nameOf(one)), one.primary ? "trains it" : "follows", ...figuresOf(one)], "",
      [nameOf(one), one.primary ? "trains it" : "follows", ...orderOf(one)],
    ])));
    if (told.servers.length === 0) parts.push(element("p", "No server hosts it now.", "quiet"));
    const first = told.versions[0], last = told.versions.at(-1);
    if (told.versions.length > 1) {
      const canvas = element("canvas");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `version ${first[1]} to ${last[1]} in ${duration(last[0] - first[0])}`);
      parts.push(element("p", `Version over the last ${duration(last[0] - first[0])}`, "quiet"), canvas);
      requestAnimationFrame(() => drawVersions(canvas, told.versions));
    }
  } else {
    const peer = state.peers.find((one) => one.peer_id === told.peer_id);
    if (peer) {
      title.textContent = `Server ${nameOf(peer)}`;
      parts.push(facts([
        ["answers", peer.error ? `no: ${peer.error}` : `${duration(peer.answered_ago)} ago`],
        ["hardware", peer.hardware || "not told"], ["memory", peer.memory ? `${number(peer.memory / 2 ** 30, 1)} GiB` : "–"],
        ["load", `${number(100 * peer.busy)} %`], ["rows per second", number(peer.rows_per_second)], ["rows that wait", number(peer.waiting_rows)],
        ["states sealed", peer.sync ? `every ${duration(peer.sync)}` : "–"],
        ["up", duration(peer.uptime)], ["path", peer.path ?? "–"], ["software", peer.software ?? "–"],
        ["address", peer.addresses.join(", ") || "–"], ["peer id", peer.peer_id],
      ]));
    }
    parts.push(plainTable("one-rows", ["expert", "role", ...FIGURES], told.experts.map((one) => [
      [link(`expert/${one.uid}`, one.uid), one.primary ? "trains it" : "follows", ...figuresOf(one)], "",
      [one.uid, one.primary ? "trains it" : "follows", ...orderOf(one)],
    ])));
  }
  box.replaceChildren(...parts);
  if (had) title.focus();
}

function drawVersions(canvas, points) {
  const width = canvas.parentElement.clientWidth - 34, draw = prepare(canvas, width, PLOT_HEIGHT);
  const [from, until] = [points[0][0], points.at(-1)[0]], low = points[0][1], top = Math.max(low + 1, points.at(-1)[1]);
  draw.strokeStyle = colours.accent;
  draw.lineWidth = 2;
  draw.beginPath();
  points.forEach(([time, version], index) => draw[index ? "lineTo" : "moveTo"](
    PLOT_LEFT + (time - from) / (until - from) * (width - PLOT_LEFT - 6),
    PLOT_HEIGHT - PLOT_BOTTOM - (version - low) / (top - low) * (PLOT_HEIGHT - PLOT_BOTTOM - PLOT_TOP)));
  draw.stroke();
  draw.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  draw.fillStyle = colours.soft;
  draw.textAlign = "right";
  draw.fillText(short(top), PLOT_LEFT - 6, PLOT_TOP + 4);
  draw.fillText(short(low), PLOT_LEFT - 6, PLOT_HEIGHT - PLOT_BOTTOM + 4);
}

function drawLog() {
  if (state.log.length === 0) {
    $("log").replaceChildren(element("li", "Nothing has joined, left or failed since this page's node started."));
    return;
  }
  $("log").replaceChildren(...state.log.slice().reverse().map(([time, sentence, kind]) => {
    const line = element("li", undefined, kind);
    line.append(element("time", new Date(1000 * time).toLocaleTimeString()), document.createTextNode(sentence));
    return line;
  }));
}

function draw() {
  readColours();
  if (!state) return;
  drawRun(); drawTotals(); drawGrids(); drawLegend(); plots.forEach(drawPlot);
  drawPeers(); drawContributors(); drawTrainers(); drawLog();
  for (const grid of state.grids) if (cursors[grid.prefix]) describe(grid, cursors[grid.prefix]);
}

// ---------------------------------------------------------------------------------------------- news

// the first message holds everything, the next ones what is new: see `news` in dashboard.py
function take(message) {
  if (!message.whole && state) {
    const changed = new Map(message.grids.map((grid) => [grid.prefix, grid]));
    const grids = state.grids.map((grid) => changed.get(grid.prefix) ?? grid);
    for (const grid of message.grids) if (!state.grids.some((one) => one.prefix === grid.prefix)) grids.push(grid);
    message.grids = grids;
    for (const span of Object.keys(message.history)) {
      message.history[span] = [...state.history[span], ...message.history[span]].slice(-HISTORY_LENGTH);
    }
    message.log = [...state.log, ...message.log].slice(-LOG_LENGTH);
  }
  state = message;
}

const events = new EventSource("api/events");
events.onmessage = (event) => {
  take(JSON.parse(event.data));
  $("connection").textContent = `live, through node ${state.node.peer_id.slice(0, 8)} (${state.node.role})`;
  $("connection").className = "live";
  draw();
  if (location.hash) open();
};
events.onerror = () => {
  $("connection").textContent = "The node does not answer. Trying again …";
  $("connection").className = "lost";
};
$("colour").addEventListener("change", draw);
$("span").addEventListener("change", draw);
addEventListener("hashchange", open);
addEventListener("keydown", (event) => { if (event.key === "Escape" && opened) location.hash = ""; });
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
readColours();
